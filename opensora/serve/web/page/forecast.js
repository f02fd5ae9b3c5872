// What the next clip will take: the service's own forecast, asked for when choices have rested for a moment.

import * as api from "./api.js";
import { bytes, duration, plural } from "./words.js";

const REST_MS = 200;
const GIB = 2 ** 30;

/** Event: "change" when there is another forecast. */
export class Forecast extends EventTarget {
  time = "";
  memory = "";
  refusal = ""; // why it cannot be; "" if it can, or nobody knows yet
  #asked = "";
  #timer = 0;

  /** Of the fields of a request; ``ahead``: jobs that wait, whose number changes the answer. */
  ask(fields, ahead) {
    const asked = JSON.stringify([fields, ahead]);
    if (asked === this.#asked) return;
    this.#asked = asked;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#call(fields, asked), REST_MS);
  }

  /** Ask again, though nothing is another: the service may be. */
  forget() {
    this.#asked = "";
  }

  async #call(fields, asked) {
    let told;
    try {
      told = words(await api.forecast(fields));
    } catch (error) {
      if (!(error instanceof api.Refused || error instanceof api.Unreachable)) throw error;
      told = { time: "", memory: "", refusal: [400, 422].includes(error.status) ? error.message : "" };
      if (!told.refusal) this.forget();
    }
    if (this.#asked !== asked && this.#asked) return; // of choices that are others by now
    Object.assign(this, told);
    this.dispatchEvent(new Event("change"));
  }
}

function words(told) {
  const needs = bytes(told.peak_gib * GIB);
  const room = told.room_gib ? bytes(told.room_gib * GIB) : "";
  if (!told.fits) {
    const mend = "Choose a shorter length or a smaller size.";
    return { time: "", memory: "", refusal: `Needs ${needs} of memory, and a device has ${room}. ${mend}` };
  }
  const after = told.waiting ? `, after ${plural(told.waiting, "job")}` : "";
  const time = told.takes_s ? `About ${duration(told.takes_s)}${after}` : `No forecast yet${after}`;
  const memory = told.peak_gib ? `${needs}${room && ` of ${room}`} memory` : "";
  return { time, memory, refusal: "" };
}
