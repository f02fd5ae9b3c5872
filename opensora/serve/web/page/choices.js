// Model, size and length: only what the model can make.

import { clipLength, size } from "./words.js";

const at = (id) => document.getElementById(id);

/** Events: "change" when a choice is another, "model" when the model is. */
export class Choices extends EventTarget {
  models = [];

  constructor() {
    super();
    at("model").addEventListener("change", () => this.#offer({}));
    at("sizes").addEventListener("change", () => this.#changed());
    for (const id of ["length", "steps", "fps"]) at(id).addEventListener("input", () => this.#changed());
  }

  get model() {
    return this.models.find((model) => model.name === at("model").value) ?? null;
  }

  /** Whether a worker waits for jobs. */
  get ready() {
    return this.models.some((model) => model.ready);
  }

  /** "WxH"; null before there is a model. */
  get size() {
    return at("sizes").querySelector("input:checked")?.value ?? null;
  }

  get frames() {
    return this.model?.frames[Number(at("length").value)] ?? null;
  }

  get fps() {
    return Number(at("fps").value) || this.model?.defaults.fps;
  }

  /** Models as the service tells them now; what was chosen stays chosen. */
  take(models) {
    const plain = (list) => JSON.stringify(list.map((model) => ({ ...model, ready: true })));
    const same = plain(models) === plain(this.models);
    const before = this.model && this.#chosen();
    this.models = models;
    if (same) return;
    at("model").replaceChildren(...models.map((model) => new Option(model.name, model.name)));
    at("model-field").hidden = models.length < 2;
    if (models.length) this.choose(before ?? {});
  }

  /** {model, size, frames, steps, guidance, fps, negative, lora}; what is left out is the model's own. */
  choose(wanted) {
    const known = !wanted.model || this.models.some((model) => model.name === wanted.model);
    if (known && wanted.model) at("model").value = wanted.model;
    this.#offer(known ? wanted : {}); // sizes of a model that is gone are not another's
  }

  #chosen() {
    const names = ["model", "steps", "guidance", "fps", "negative", "lora"];
    return { ...Object.fromEntries(names.map((id) => [id, at(id).value])), size: this.size, frames: this.frames };
  }

  #offer(wanted) {
    const { model } = this;
    const own = model.defaults;
    at("steps").value = wanted.steps || own.num_steps;
    at("guidance").value = wanted.guidance ?? own.guidance;
    at("fps").value = wanted.fps || own.fps;
    at("negative").value = wanted.negative ?? model.neg ?? "";
    this.#offerSizes(wanted.size);
    this.#offerLengths(wanted.frames ?? own.num_frames);
    at("lora").replaceChildren(new Option("None", ""), ...model.loras.map((name) => new Option(name, name)));
    at("lora").value = model.loras.includes(wanted.lora) ? wanted.lora : "";
    at("lora-field").hidden = !model.loras.length;
    this.dispatchEvent(new Event("model"));
    this.#changed();
  }

  #offerSizes(wanted) {
    const { sizes } = this.model;
    const chosen = wanted ?? sizes[0];
    const offered = sizes.includes(chosen) ? sizes : [...sizes, chosen]; // an earlier clip's, asked for over the API
    at("sizes").replaceChildren(...offered.map((one) => chip(one, one === chosen)));
  }

  #offerLengths(frames) {
    const lengths = this.model.frames;
    const far = (one) => Math.abs(one - frames);
    const nearest = lengths.reduce((best, one) => (far(one) <= far(best) ? one : best), lengths[0]);
    at("length").max = lengths.length - 1;
    at("length").value = lengths.indexOf(nearest);
    at("length").disabled = lengths.length < 2;
  }

  #changed() {
    const { frames } = this;
    const words = frames === 1 ? "still picture" : `${clipLength(frames, this.fps)}, ${frames} frames`;
    at("length-text").textContent = words;
    at("length").setAttribute("aria-valuetext", words);
    this.dispatchEvent(new Event("change"));
  }
}

/** A choice of a size, with its shape drawn beside the numbers. */
function chip(value, checked) {
  const [width, height] = value.split("x").map(Number);
  const label = document.createElement("label");
  const input = document.createElement("input");
  const shape = document.createElement("span");
  Object.assign(input, { type: "radio", name: "size", value, checked, className: "unseen" });
  shape.className = "shape";
  shape.setAttribute("aria-hidden", "true");
  const longer = Math.max(width, height);
  shape.style.width = `${(14 * width) / longer}px`;
  shape.style.height = `${(14 * height) / longer}px`;
  label.className = "chip";
  label.append(input, shape, size(width, height));
  return label;
}
