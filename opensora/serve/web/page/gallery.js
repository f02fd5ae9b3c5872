// The gallery: a card for each clip that is done, with its settings, and what can be done with it.

import * as api from "./api.js";
import { lengthOf, rows, settingsOf, still } from "./settings.js";
import { duration, short, size, when } from "./words.js";

const PAGE = 24;
const SMALL = 160; // pixels: enlarged without blur, as a clip of a small model is
const SURE_MS = 5000; // to say it once more
const at = (id) => document.getElementById(id);

/** Events: "again" and "side" with the job; "said" with words; "failed" with an error of a call. */
export class Gallery extends EventTarget {
  #jobs;
  #cards = new Map(); // id -> {card, free: [functions]}
  #shown = PAGE;
  #near = new IntersectionObserver((seen) => this.#reach(seen), { rootMargin: "400px" });

  constructor(jobs) {
    super();
    this.#jobs = jobs;
    jobs.addEventListener("change", () => this.#show());
    at("more-clips").addEventListener("click", () => this.#older());
  }

  /** Marks the clips that are chosen for side by side. */
  mark(ids) {
    for (const [id, { card }] of this.#cards) {
      card.classList.toggle("chosen", ids.includes(id));
      card.querySelector(".side")?.setAttribute("aria-pressed", String(ids.includes(id)));
    }
  }

  #show() {
    const done = this.#jobs.done;
    const here = new Set(done.slice(0, this.#shown).map((job) => job.id));
    for (const id of this.#cards.keys()) if (!here.has(id)) this.#end(id);
    done.slice(0, this.#shown).forEach((job, index) => {
      const card = this.#cards.get(job.id)?.card ?? this.#begin(job);
      if (at("gallery").children[index] !== card) at("gallery").insertBefore(card, at("gallery").children[index] ?? null);
    });
    at("empty").hidden = done.length > 0;
    at("more-clips").hidden = done.length <= this.#shown && !this.#jobs.more;
  }

  async #older() {
    this.#shown += PAGE;
    if (this.#jobs.done.length < this.#shown && this.#jobs.more) {
      await this.#call(() => this.#jobs.older());
    }
    this.#show();
  }

  #begin(job) {
    const card = at("card-template").content.firstElementChild.cloneNode(true);
    card.dataset.id = job.id;
    this.#cards.set(job.id, { card, free: [] });
    describe(card, job);
    const on = (name, act) => card.querySelector(name)?.addEventListener("click", act);
    on(".again", () => this.#tell("again", job));
    on(".side", () => this.#tell("side", job));
    on(".delete", () => this.#delete(job, card));
    on(".play", () => this.#play(job, card));
    on(".download", (event) => this.#download(event, job));
    card.addEventListener("focusout", (event) => event.target.matches(".delete") && calm(event.target));
    if (job.status === "completed") this.#near.observe(card);
    return card;
  }

  #end(id) {
    const { card, free } = this.#cards.get(id);
    const held = card.contains(document.activeElement);
    const beside = card.nextElementSibling ?? card.previousElementSibling;
    this.#near.unobserve(card);
    this.#cards.delete(id);
    card.remove();
    free.forEach((one) => one());
    if (held) (beside?.querySelector(".again") ?? at("gallery-title")).focus();
  }

  /** Thumbnails are fetched as their cards come near. */
  #reach(seen) {
    for (const { target, isIntersecting } of seen) {
      if (!isIntersecting) continue;
      this.#near.unobserve(target);
      this.#call(async () => {
        target.querySelector(".play img").src = await this.#media(target.dataset.id, "thumbnail");
      });
    }
  }

  async #media(id, variant) {
    const { url, free } = await api.media(id, variant);
    const entry = this.#cards.get(id);
    if (entry) entry.free.push(free);
    else free();
    return url;
  }

  #play(job, card) {
    return this.#call(async () => {
      const settings = settingsOf(job);
      const url = await this.#media(job.id, "video");
      const shown = document.createElement(still(settings) ? "img" : "video");
      if (still(settings)) shown.alt = settings.prompt;
      else Object.assign(shown, { controls: true, loop: true, muted: true, playsInline: true, autoplay: true });
      shown.setAttribute("aria-label", `Clip: ${short(settings.prompt, 200)}`);
      shown.className = "clip";
      shown.tabIndex = 0;
      shown.src = url;
      card.querySelector(".play").replaceWith(shown);
      shown.focus({ preventScroll: true });
    });
  }

  /** Without a key the link itself does it. */
  #download(event, job) {
    if (!api.key.get()) return;
    event.preventDefault();
    this.#call(async () => {
      const link = document.createElement("a");
      Object.assign(link, { href: await this.#media(job.id, "video"), download: fileName(job) });
      link.click();
    });
  }

  async #delete(job, card) {
    const button = card.querySelector(".delete");
    if (!button.classList.contains("sure")) {
      button.classList.add("sure");
      button.querySelector(".words").hidden = false;
      button.setAttribute("aria-label", `Delete for good: ${short(job.prompt)}`);
      this.#tell("said", "Press again to delete the clip for good.");
      setTimeout(() => calm(button), SURE_MS);
      return;
    }
    await this.#call(async () => {
      await api.remove(job.id);
      this.#jobs.forget(job.id);
      this.#tell("said", "The clip is deleted.");
    });
  }

  async #call(act) {
    try {
      await act();
    } catch (error) {
      if (error.status === 404) return void this.#jobs.soon(); // gone meanwhile
      this.#tell("failed", error);
    }
  }

  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

function calm(button) {
  button.classList.remove("sure");
  button.querySelector(".words").hidden = true;
  button.setAttribute("aria-label", `Delete: ${short(button.closest(".card")?.querySelector(".prompt").textContent ?? "")}`);
}

const fileName = (job) => `${job.id}.${still(settingsOf(job)) ? "png" : "mp4"}`;

function describe(card, job) {
  const settings = settingsOf(job);
  const name = short(settings.prompt);
  const failed = job.status === "failed";
  card.querySelector(".card-text .prompt").textContent = settings.prompt;
  card.querySelector(".card-text .meta").textContent = facts(job, settings).filter(Boolean).join(" · ");
  card.querySelector("dl").replaceChildren(...terms(job, settings));
  for (const control of card.querySelectorAll(".actions > *")) {
    control.setAttribute("aria-label", `${control.title || control.textContent}: ${name}`);
  }
  card.querySelector("summary").setAttribute("aria-label", `Settings: ${name}`);
  showMedia(card, job, settings, failed);
}

function showMedia(card, job, settings, failed) {
  const play = card.querySelector(".play");
  const link = card.querySelector(".download");
  play.querySelector("img").alt = `${still(settings) ? "Show" : "Play"}: ${short(settings.prompt, 200)}`;
  const ratio = settings.width / settings.height;
  card.querySelector(".media").style.aspectRatio = String(Math.min(Math.max(ratio || 1, 1), 16 / 9));
  card.classList.toggle("small", Math.max(settings.width, settings.height) <= SMALL);
  if (!failed) return void Object.assign(link, { href: `v1/videos/${job.id}/content`, download: fileName(job) });
  const cancelled = job.error?.code === "cancelled";
  card.classList.add("without");
  card.querySelector(".failed").hidden = false;
  card.querySelector(".failed").textContent = cancelled ? "Cancelled" : `Failed: ${job.error?.message ?? "no reason told"}`;
  for (const one of [play, link, card.querySelector(".side")]) one.remove();
}

function facts(job, settings) {
  const seed = settings.seed && `seed\u00a0${settings.seed}`;
  return [size(settings.width, settings.height), lengthOf(settings), settings.steps && `${settings.steps} steps`, seed];
}

function terms(job, settings) {
  const more = [
    ["Made", when(job.completed_at ?? job.created_at)],
    ["Took", job.x?.seconds_used == null ? null : duration(job.x.seconds_used)],
    ["Name", job.id],
  ];
  const shown = [...rows(settings), ...more.filter(([, value]) => value)];
  return shown.flatMap(([name, value]) => {
    const [term, told] = [document.createElement("dt"), document.createElement("dd")];
    [term.textContent, told.textContent] = [name, value];
    return [term, told];
  });
}
