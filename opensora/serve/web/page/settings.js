// What a clip was made with, as the service tells it of a job: one place that knows the names.

import { clipLength, size } from "./words.js";

// of x.request, those that the page has a field for or shows by another name
const OWN = new Set([
  "width", "height", "num_frames", "seed", "num_steps", "guidance", "fps", "negative_prompt", "cond_type", "lora",
  "resolution", "aspect_ratio", // said by width and height
]);
const own = new Map(); // model's name -> its defaults, which a request is silent of

export function remember(models) {
  for (const model of models) own.set(model.name, model.defaults);
}

export function settingsOf(job) {
  const x = job.x ?? {};
  const asked = { ...own.get(job.model), ...x.request };
  const [width, height] = (job.size ?? "").split("x").map(Number);
  const others = Object.entries(x.request ?? {}).filter(([name]) => !OWN.has(name));
  return {
    prompt: job.prompt ?? "",
    model: job.model,
    size: job.size,
    width,
    height,
    frames: x.num_frames ?? null,
    fps: asked.fps ?? x.fps ?? null,
    seconds: Number(job.seconds),
    seed: x.seed == null ? "" : String(x.seed),
    steps: x.steps ?? null,
    guidance: asked.guidance ?? null,
    negative: asked.negative_prompt ?? null,
    kind: asked.cond_type ?? null,
    lora: asked.lora ?? null,
    references: x.references ?? 0,
    others: Object.fromEntries(others), // what was asked for over the API
  };
}

export const still = (settings) => settings.frames === 1;

export function lengthOf(settings) {
  if (settings.frames && settings.fps) return clipLength(settings.frames, settings.fps);
  return Number.isFinite(settings.seconds) ? `${settings.seconds} s` : "";
}

/** "shift false, cache.kind first_block" */
export function othersInWords(others, before = "") {
  const words = ([name, value]) => {
    if (value !== null && typeof value === "object") return othersInWords(value, `${before}${name}.`);
    return `${before}${name} ${value}`;
  };
  return Object.entries(others).map(words).join(", ");
}

/** [[name, value], ...] in the order that people look for them; what was not chosen is left out. */
export function rows(settings) {
  const all = [
    ["Prompt", settings.prompt],
    ["Negative prompt", settings.negative],
    ["Model", settings.model],
    ["Size", size(settings.width, settings.height)],
    ["Length", lengthOf(settings)],
    ["Frames", settings.frames],
    ["Frames a second", settings.fps],
    ["Seed", settings.seed],
    ["Steps", settings.steps],
    ["Guidance", settings.guidance],
    ["Reference", settings.references ? settings.kind : null],
    ["LoRA", settings.lora],
    ["Others", othersInWords(settings.others)],
  ];
  return all.filter(([, value]) => value !== null && value !== undefined && value !== "");
}
