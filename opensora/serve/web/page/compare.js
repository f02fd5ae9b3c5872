// Two clips side by side, in step, with what differs in their settings.

import * as api from "./api.js";
import { rows, settingsOf, still } from "./settings.js";
import { clock, short } from "./words.js";

const DRIFT_S = 0.05; // more than that is seen
const at = (id) => document.getElementById(id);
const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Events: "chosen" with ids; "failed" with an error of a call. */
export class Compare extends EventTarget {
  #chosen = [];
  #clips = [];
  #free = [];
  #frame = 0; // of the browser's animation
  #fps = 24;

  constructor() {
    super();
    at("compare-close").addEventListener("click", () => at("compare").close());
    at("compare").addEventListener("close", () => this.#closed());
    at("compare").addEventListener("keydown", (event) => this.#key(event));
    at("tray-clear").addEventListener("click", () => this.#choose([]));
    at("compare-play").addEventListener("click", () => this.#turn());
    at("compare-back").addEventListener("click", () => this.#move(-1));
    at("compare-next").addEventListener("click", () => this.#move(1));
    at("compare-time").addEventListener("input", (event) => {
      this.#stop();
      this.#seek((event.target.value / 1000) * this.#length);
    });
  }

  /** A clip is chosen, or no longer; two are shown. */
  toggle(job) {
    const others = this.#chosen.filter((one) => one.id !== job.id);
    this.#choose(others.length < this.#chosen.length ? others : [...others, job]);
    if (this.#chosen.length === 2) this.#open();
  }

  drop(known) {
    const left = this.#chosen.filter((job) => known(job.id));
    if (left.length < this.#chosen.length) this.#choose(left);
  }

  get #length() {
    return Math.max(...this.#clips.map((clip) => clip.duration || 0), 0);
  }

  /** The longer clip leads. */
  get #lead() {
    return this.#clips.reduce((best, clip) => ((clip.duration || 0) > (best.duration || 0) ? clip : best));
  }

  #choose(jobs) {
    this.#chosen = jobs;
    at("tray").hidden = jobs.length !== 1;
    this.dispatchEvent(new CustomEvent("chosen", { detail: jobs.map((job) => job.id) }));
  }

  async #open() {
    const settings = this.#chosen.map(settingsOf);
    this.#fps = Math.max(...settings.map((one) => one.fps ?? 24));
    at("differences").tBodies[0].replaceChildren(...differences(...settings));
    at("pair").replaceChildren();
    at("compare").showModal();
    try {
      const figures = await Promise.all(this.#chosen.map((job, index) => this.#figure(job, settings[index])));
      at("pair").replaceChildren(...figures);
    } catch (error) {
      at("compare").close();
      return void this.dispatchEvent(new CustomEvent("failed", { detail: error }));
    }
    this.#clips = [...at("pair").querySelectorAll("video")];
    at("transport").hidden = !this.#clips.length;
    await Promise.all(this.#clips.map(loaded));
    this.#seek(0);
    if (this.#clips.length && !calm()) this.#start();
  }

  async #figure(job, settings) {
    const { url, free } = await api.media(job.id, "video");
    this.#free.push(free);
    const figure = document.createElement("figure");
    const words = document.createElement("figcaption");
    const shown = document.createElement(still(settings) ? "img" : "video");
    if (still(settings)) shown.alt = settings.prompt;
    else Object.assign(shown, { muted: true, playsInline: true, preload: "auto" });
    shown.setAttribute("aria-label", `Clip: ${short(settings.prompt, 200)}`);
    shown.classList.toggle("small", Math.max(settings.width, settings.height) <= 160);
    shown.src = url;
    words.textContent = settings.prompt;
    figure.append(shown, words);
    return figure;
  }

  #closed() {
    this.#stop();
    this.#free.splice(0).forEach((one) => one());
    at("pair").replaceChildren();
    this.#clips = [];
    this.#choose([]);
  }

  #turn() {
    if (this.#frame) this.#stop();
    else this.#start();
  }

  #start() {
    if (this.#lead.ended || this.#lead.currentTime >= this.#length) this.#seek(0);
    at("compare-play").textContent = "Pause";
    for (const clip of this.#clips) clip.play().catch(() => {}); // a clip that ended, or a dialog that closed
    const tick = () => {
      this.#keepStep();
      this.#frame = requestAnimationFrame(tick);
    };
    this.#frame = requestAnimationFrame(tick);
  }

  #stop() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    at("compare-play").textContent = "Play";
    for (const clip of this.#clips) clip.pause();
  }

  #keepStep() {
    const lead = this.#lead;
    if (lead.ended) {
      this.#seek(0);
      for (const clip of this.#clips) clip.play().catch(() => {});
    }
    for (const clip of this.#clips) {
      const wanted = Math.min(lead.currentTime, clip.duration);
      if (!clip.ended && !clip.seeking && Math.abs(clip.currentTime - wanted) > DRIFT_S) clip.currentTime = wanted;
    }
    this.#tell(lead.currentTime);
  }

  #move(frames) {
    this.#stop();
    this.#seek(Math.min(Math.max(this.#lead.currentTime + frames / this.#fps, 0), this.#length));
  }

  #seek(seconds) {
    for (const clip of this.#clips) clip.currentTime = Math.min(seconds, clip.duration || 0);
    this.#tell(seconds);
  }

  #tell(seconds) {
    const words = `${clock(seconds)} of ${clock(this.#length)}`;
    at("compare-clock").textContent = words;
    at("compare-time").value = this.#length ? (1000 * seconds) / this.#length : 0;
    at("compare-time").setAttribute("aria-valuetext", words);
  }

  /** Keys of players; a button keeps its own. */
  #key(event) {
    const typed = event.target.matches("button, input");
    if (!this.#clips.length || (typed && event.key !== "," && event.key !== ".")) return;
    const act = { " ": () => this.#turn(), ",": () => this.#move(-1), ".": () => this.#move(1) };
    const more = { ...act, ArrowLeft: act[","], ArrowRight: act["."] }[event.key];
    if (!more) return;
    event.preventDefault();
    more();
  }
}

function loaded(clip) {
  if (clip.readyState >= HTMLMediaElement.HAVE_CURRENT_DATA) return null;
  return new Promise((resolve) => {
    for (const type of ["loadeddata", "error"]) clip.addEventListener(type, resolve, { once: true });
  });
}

/** A table row for each setting, marked where both differ. */
function differences(first, second) {
  const [left, right] = [new Map(rows(first)), new Map(rows(second))];
  const names = [...new Set([...left.keys(), ...right.keys()])];
  return names.map((name) => {
    const row = document.createElement("tr");
    const head = document.createElement("th");
    Object.assign(head, { textContent: name, scope: "row" });
    const differs = String(left.get(name)) !== String(right.get(name));
    row.classList.toggle("differs", differs);
    row.append(head, ...[left, right].map((one) => cell(one.get(name))));
    return row;
  });
}

function cell(value) {
  const told = document.createElement("td");
  told.textContent = value ?? "–";
  return told;
}
