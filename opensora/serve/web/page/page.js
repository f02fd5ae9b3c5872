// The page: its parts, and what each tells the others. Text of people only ever becomes textContent.

import * as api from "./api.js";
import { Choices } from "./choices.js";
import { Compare } from "./compare.js";
import { Forecast } from "./forecast.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { Jobs } from "./jobs.js";
import { Queue } from "./queue.js";
import { References } from "./references.js";
import { plural, short } from "./words.js";

const MODELS_MS = 30_000; // between looks at what the models can do
const SPOKEN_MS = 10_000;
const NOTICE_MS = 10_000;
const at = (id) => document.getElementById(id);

const jobs = new Jobs();
const choices = new Choices();
const references = new References();
const forecast = new Forecast();
const form = new Form(choices, references, forecast, jobs);
const queue = new Queue(jobs);
const gallery = new Gallery(jobs);
const compare = new Compare();

let noticed = 0; // timer
let asked = -Infinity; // when, for the models

async function askModels() {
  const now = performance.now();
  if (choices.ready && now - asked < MODELS_MS) return;
  const told = await api.models();
  asked = now;
  form.take(told.data.map((model) => ({ name: model.id, ...model.x })));
  at("key-button").hidden = !api.key.get();
  showState();
}

/** For ears: what is added to a status is read when it is free, one after the other. */
function say(words) {
  const line = document.createElement("p");
  at("spoken").append(line);
  line.textContent = words;
  setTimeout(() => line.remove(), SPOKEN_MS);
}

function state(kind, words) {
  at("service").dataset.state = kind;
  if (at("service-text").textContent !== words) at("service-text").textContent = words;
}

function showState() {
  if (jobs.lost) return state("lost", "Not connected");
  if (!choices.models.length) return state("waiting", "Loading a model");
  if (!choices.ready) return state("waiting", "Waiting for a worker");
  const waiting = jobs.waiting.length;
  return state(waiting ? "busy" : "ready", waiting ? plural(waiting, "job") : "Ready");
}

function showTitle() {
  const running = jobs.waiting.find((job) => job.status === "in_progress");
  document.title = running ? `${running.progress}% · opensora` : "opensora";
}

function failed(error) {
  if (error instanceof api.Refused && error.status === 401) return lock();
  if (!(error instanceof api.Refused || error instanceof api.Unreachable)) throw error;
  at("notice").textContent = error.message;
  at("notice").hidden = false;
  clearTimeout(noticed);
  noticed = setTimeout(() => (at("notice").hidden = true), NOTICE_MS);
}

function connection({ lost, retryMs }) {
  at("lost").hidden = !lost;
  at("lost").textContent = lost
    ? `Connection lost. Trying again in ${Math.round(retryMs / 1000)} s. Jobs go on meanwhile, and nothing is lost.`
    : "";
  if (!lost) {
    forecast.forget();
    asked = -Infinity; // a service that was started again may have others
    say("Connected again");
  }
  showState();
}

function ended(job) {
  const name = short(job.prompt);
  if (job.status === "completed") return say(`Done: ${name}`);
  return say(job.error?.code === "cancelled" ? `Cancelled: ${name}` : `Failed: ${name}. ${job.error?.message ?? ""}`);
}

function lock(refused = true) {
  if (at("key-dialog").open) return;
  state("lost", "Needs a key");
  at("key-button").hidden = false;
  at("key-error").hidden = !(refused && api.key.get());
  at("key-error").textContent = refused && api.key.get() ? "The service does not know this key." : "";
  at("key").value = "";
  at("key-dialog").showModal();
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.key.set(at("key").value.trim());
  at("key-dialog").close();
  asked = -Infinity;
  jobs.soon();
});
at("key-button").addEventListener("click", () => lock(false));

jobs.addEventListener("change", () => {
  showState();
  showTitle();
  compare.drop((id) => jobs.get(id));
});
jobs.addEventListener("ended", (event) => ended(event.detail));
jobs.addEventListener("connection", (event) => connection(event.detail));
jobs.addEventListener("locked", () => lock());
form.addEventListener("locked", () => lock());
gallery.addEventListener("again", (event) => form.again(event.detail));
gallery.addEventListener("side", (event) => compare.toggle(event.detail));
compare.addEventListener("chosen", (event) => gallery.mark(event.detail));
for (const part of [form, references, queue, gallery, compare]) {
  part.addEventListener("said", (event) => say(event.detail));
  part.addEventListener("failed", (event) => failed(event.detail));
}
document.addEventListener("visibilitychange", () => document.hidden || jobs.soon());
addEventListener("online", () => jobs.soon());

jobs.run(askModels);
