// The queue: a row for each job that waits or runs, the same element as long as it does.

import * as api from "./api.js";
import { duration, plural, short } from "./words.js";
import { lengthOf, settingsOf } from "./settings.js";

const at = (id) => document.getElementById(id);

/** Events: "said" with words for people; "failed" with an error of a call. */
export class Queue extends EventTarget {
  #jobs;
  #rows = new Map();

  constructor(jobs) {
    super();
    this.#jobs = jobs;
    jobs.addEventListener("change", () => this.#show());
  }

  #show() {
    const waiting = this.#jobs.waiting;
    const open = new Set(waiting.map((job) => job.id));
    for (const [id, row] of this.#rows) if (!open.has(id)) this.#end(id, row);
    const focused = document.activeElement;
    waiting.forEach((job, index) => {
      const row = this.#rows.get(job.id) ?? this.#begin(job);
      fill(row, job);
      if (at("queue").children[index] !== row) at("queue").insertBefore(row, at("queue").children[index] ?? null);
    });
    if (at("queue").contains(focused)) focused.focus({ preventScroll: true }); // a row that is moved loses it
    at("queue-section").hidden = !waiting.length;
    at("queue-count").textContent = waiting.length > 1 ? String(waiting.length) : "";
  }

  #begin(job) {
    const row = at("job-template").content.firstElementChild.cloneNode(true);
    row.dataset.id = job.id;
    row.querySelector(".prompt").textContent = short(job.prompt, 200);
    row.querySelector(".cancel").setAttribute("aria-label", `Cancel: ${short(job.prompt)}`);
    row.querySelector(".cancel").addEventListener("click", () => this.#cancel(job.id, row));
    row.querySelector("progress").setAttribute("aria-label", `Progress of: ${short(job.prompt)}`);
    this.#rows.set(job.id, row);
    return row;
  }

  #end(id, row) {
    const held = row.contains(document.activeElement);
    this.#rows.delete(id);
    row.remove();
    if (held) (at("queue").querySelector(".cancel") ?? at("gallery-title")).focus();
  }

  async #cancel(id, row) {
    const button = row.querySelector(".cancel");
    if (button.getAttribute("aria-disabled") === "true") return;
    button.setAttribute("aria-disabled", "true"); // not disabled: the focus would be lost
    button.textContent = "Cancelling";
    try {
      const asked = performance.now();
      const job = await api.cancel(id);
      if (job?.id === id) this.#jobs.put(job, asked);
      this.#jobs.soon();
    } catch (error) {
      if (error.status === 404 || error.status === 409) return this.#jobs.soon(); // it has ended meanwhile
      button.setAttribute("aria-disabled", "false");
      button.textContent = "Cancel";
      this.dispatchEvent(new CustomEvent("failed", { detail: error }));
    }
  }
}

function fill(row, job) {
  const bar = row.querySelector("progress");
  const runs = job.status === "in_progress";
  const words = where(job);
  row.dataset.state = job.status;
  if (bar.value !== job.progress) bar.value = job.progress;
  bar.setAttribute("aria-valuetext", runs ? `${job.progress} percent, ${words}` : words);
  set(row.querySelector(".where"), words);
  const left = job.x?.eta_s;
  set(row.querySelector(".eta"), left == null ? about(job) : `about ${duration(left)} left`);
}

function about(job) {
  const settings = settingsOf(job);
  return [job.size?.replace("x", "×"), lengthOf(settings)].filter(Boolean).join(" · ");
}

function where(job) {
  const { step = 0, steps = 0, queue_position: place, batch = 1 } = job.x ?? {};
  if (job.status === "queued") {
    if (place == null) return "Starting";
    return place === 0 ? "Next in the queue" : `${plural(place, "job")} before it`;
  }
  const together = batch > 1 ? `, ${batch} clips together` : "";
  if (job.progress < 90 || step < steps) return `Step ${step} of ${steps}${together}`;
  return job.progress < 98 ? "Decoding" : "Writing the file";
}

/** Text that is the same is not written again: a screen reader would read it again. */
function set(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
