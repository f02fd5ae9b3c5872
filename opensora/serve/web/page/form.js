// The form of the next clip: draft, checks, and the request that it becomes.

import * as api from "./api.js";
import { othersInWords, remember, settingsOf } from "./settings.js";
import { plural } from "./words.js";

const DRAFT = "opensora.draft";
const TYPED = ["prompt", "seed", "steps", "guidance", "fps", "negative"];
const MAX_SEED = 2n ** 63n - 1n;
const at = (id) => document.getElementById(id);

/** Events: "sent" with the job that the service made; "said" with words for people; "locked" when a key is asked for. */
export class Form extends EventTarget {
  #choices;
  #references;
  #forecast;
  #jobs;
  #sending = false;
  #others = {}; // of a clip that is used again: what there is no field for
  #once = null; // {body, key}: the same request sent again is the same job
  #draft = read(); // until models are there to choose from

  constructor(choices, references, forecast, jobs) {
    super();
    [this.#choices, this.#references, this.#forecast, this.#jobs] = [choices, references, forecast, jobs];
    at("prompt").value = this.#draft.prompt ?? "";
    at("seed").value = this.#draft.seed ?? "";
    at("form").addEventListener("submit", (event) => this.#submit(event));
    at("form").addEventListener("input", () => this.#touched());
    document.addEventListener("keydown", (event) => this.#key(event));
    at("seed-clear").addEventListener("click", () => this.#newSeed());
    at("defaults").addEventListener("click", () => this.#own());
    choices.addEventListener("model", () => references.offer(choices.model));
    choices.addEventListener("change", () => this.show());
    references.addEventListener("change", () => this.#touched());
    references.addEventListener("refused", (event) => this.#error(event.detail));
    forecast.addEventListener("change", () => this.show());
    jobs.addEventListener("change", () => this.show());
  }

  /** Models of the service; the first ones take up the draft. */
  take(models) {
    remember(models);
    const first = !this.#choices.models.length && models.length;
    this.#choices.take(models);
    if (first) this.#choices.choose(this.#draft);
    if (first) this.#keep(this.#draft.others ?? {});
    this.show();
  }

  /** The settings and the seed of a clip, for the next one. */
  again(job) {
    const settings = settingsOf(job);
    at("prompt").value = settings.prompt;
    at("seed").value = settings.seed;
    this.#choices.choose(settings);
    this.#keep(settings.others);
    this.#references.choose(settings.kind);
    at("more").open = true;
    this.#touched();
    at("prompt").focus();
    at("form").scrollIntoView({ block: "start" });
    const without = settings.references > this.#references.files.length;
    this.#say(`Settings and seed of the clip are in the form.${without ? " Add its reference again." : ""}`);
    if (without) this.#error("The clip was made with a reference. Add it again for the same clip.");
  }

  /** Forecast, and whether the button does something. */
  show() {
    if (this.#choices.models.length) this.#forecast.ask(this.#fields(), this.#jobs.waiting.length);
    const { refusal, time, memory } = this.#forecast;
    if (refusal && at("time").textContent !== refusal) this.#say(refusal);
    [at("time").textContent, at("memory").textContent] = [refusal || time, memory];
    at("forecast").classList.toggle("refused", Boolean(refusal));
    const off = Boolean(refusal) || this.#sending || !this.#choices.models.length;
    at("submit").setAttribute("aria-disabled", String(off)); // stays in reach of the keyboard, and says why
    at("submit").textContent = this.#sending ? "Sending …" : "Generate";
  }

  #key(event) {
    const inside = !document.querySelector("dialog[open]");
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && inside) {
      event.preventDefault();
      at("form").requestSubmit();
    }
    if (event.key === "Escape" && inside && at("more").open && at("more").contains(document.activeElement)) {
      at("more").open = false;
      at("more").querySelector("summary").focus();
    }
  }

  /** What keeps it from being sent, with the field that mends it; null: nothing. */
  #problem() {
    const whole = (id) => /^[0-9]+$/.test(at(id).value.trim());
    if (!this.#choices.models.length) return [at("prompt"), "The service has no model yet. It can take a minute to load one."];
    if (!at("prompt").value.trim()) return [at("prompt"), "Write a prompt first."];
    if (this.#forecast.refusal) return [at("length"), this.#forecast.refusal];
    const seed = at("seed").value.trim();
    if (seed && !(whole("seed") && BigInt(seed) <= MAX_SEED)) return [at("seed"), "A seed is a whole number from 0 to 2^63-1."];
    for (const id of ["steps", "guidance", "fps"]) {
      if (!at(id).checkValidity() || !at(id).value) return [at(id), `${at(id).labels[0].textContent}: ${at(id).validationMessage || "give a number."}`];
    }
    const count = this.#references.files.length;
    if (count && !this.#references.kind) return [at("file"), `The model goes on from ${this.#references.wanted}, not from ${plural(count, "file")}.`];
    return null;
  }

  async #submit(event) {
    event.preventDefault();
    if (this.#sending) return;
    const problem = this.#problem();
    if (problem) return this.#point(...problem);
    this.#error("");
    this.#sending = true;
    this.show();
    try {
      const fields = await this.#request();
      this.#sent(await api.create(fields, this.#onceFor(fields)));
    } catch (error) {
      this.#refused(error);
    }
    this.#sending = false;
    this.show();
  }

  async #request() {
    const fields = { prompt: at("prompt").value, ...this.#fields() };
    const seed = at("seed").value.trim();
    if (seed) fields.seed = seed; // as text: it has more bits than a number here
    return this.#references.files.length ? { ...fields, input_reference: await this.#references.urls() } : fields;
  }

  /** All but prompt, seed and references, of which the forecast needs none. */
  #fields() {
    const { model, size, frames } = this.#choices;
    const number = (id) => (at(id).value && at(id).checkValidity() ? Number(at(id).value) : null);
    const fields = {
      ...this.#others,
      model: model.name,
      size,
      num_frames: frames,
      num_inference_steps: number("steps"),
      guidance_scale: number("guidance"),
      fps: number("fps"),
      negative_prompt: at("negative").value === (model.neg ?? "") ? null : at("negative").value,
      lora: at("lora").value || null,
      cond_type: this.#references.kind,
    };
    const kept = ([name, value]) => value !== null || name in this.#others;
    return Object.fromEntries(Object.entries(fields).filter(kept));
  }

  /** After an answer that never came, the same request must not become a second job. */
  #onceFor(fields) {
    const body = JSON.stringify(fields);
    if (this.#once?.body !== body) this.#once = { body, key: random() };
    return this.#once.key;
  }

  #sent(job) {
    this.#once = null;
    this.#jobs.put(job);
    this.#jobs.soon();
    this.#say("The clip is in the queue.");
    this.dispatchEvent(new CustomEvent("sent", { detail: job }));
  }

  #refused(error) {
    if (error.status === 401) return void this.dispatchEvent(new Event("locked"));
    if (!(error instanceof api.Refused || error instanceof api.Unreachable)) throw error;
    const later = error instanceof api.Unreachable ? " Generate again when it is back: it will be one clip." : "";
    this.#error(error.message + later);
  }

  #point(field, words) {
    this.#error(words);
    if (at("more").contains(field)) at("more").open = true;
    field.setAttribute("aria-invalid", "true");
    field.addEventListener("input", () => field.removeAttribute("aria-invalid"), { once: true });
    field.focus();
  }

  #error(words) {
    at("form-error").textContent = words;
    at("form-error").hidden = !words;
  }

  #keep(others) {
    this.#others = others;
    at("others").hidden = !Object.keys(others).length;
    at("others").textContent = `As that clip: ${othersInWords(others)}`;
  }

  #newSeed() {
    at("seed").value = "";
    this.#touched();
    this.#say("Each clip has a new seed.");
  }

  #own() {
    this.#choices.choose({});
    this.#keep({});
    at("seed").value = "";
    this.#touched();
    this.#say("The model’s own settings are in the form.");
  }

  #touched() {
    this.#error("");
    const typed = Object.fromEntries(TYPED.map((id) => [id, at(id).value]));
    const { size, frames } = this.#choices;
    const chosen = { model: at("model").value, size, frames, lora: at("lora").value, others: this.#others };
    if (this.#choices.models.length) localStorage.setItem(DRAFT, JSON.stringify({ ...typed, ...chosen }));
    this.show();
  }

  #say(words) {
    this.dispatchEvent(new CustomEvent("said", { detail: words }));
  }
}

/** crypto.randomUUID is only there over https and on this machine itself. */
function random() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function read() {
  try {
    return JSON.parse(localStorage.getItem(DRAFT)) ?? {};
  } catch {
    return {};
  }
}
