// The jobs as the service knows them: asked for again and again, and told by events of the one that runs.
// Nothing is kept here that a reload would lose.

import * as api from "./api.js";

const LEAST = 20; // jobs a look asks for; all that are not finished, and some of the others
const MOST = 100; // the service gives no more at once
const BUSY_MS = 1500;
const WATCHED_MS = 4000; // while events come
const IDLE_MS = 4000; // other clients have jobs of the same key
const HIDDEN_MS = 30_000;
const RETRY_MS = [1000, 2000, 4000, 8000, 15_000];

export const finished = (job) => job.status === "completed" || job.status === "failed";
const newestFirst = (one, other) => other.created_at - one.created_at || (other.id < one.id ? -1 : 1);

/** Events: "change" when a job is new, other or gone; "ended" with the job; "connection" {lost, retryMs}; "locked". */
export class Jobs extends EventTarget {
  #known = new Map();
  #changed = new Map(); // when this page last heard of a job otherwise; an older look says nothing of it
  #gone = new Set();
  #failures = 0;
  #wake = null;
  #watched = null; // {id, stop}
  #locked = false; // a key is asked for: no more looks until ``soon``
  #first = true;
  #oldest = null; // id that the next older page begins after
  more = false; // whether the service has older ones than are known

  get all() {
    return [...this.#known.values()].sort(newestFirst);
  }

  get(id) {
    return this.#known.get(id);
  }

  get lost() {
    return this.#failures > 0;
  }

  /** In the order in which they are done: those that run, then by place. */
  get waiting() {
    const place = (job) => (job.status === "in_progress" ? -1 : job.x?.queue_position ?? Infinity);
    const open = this.all.filter((job) => !finished(job)).reverse();
    return open.sort((one, other) => (place(one) === place(other) ? 0 : place(one) - place(other)));
  }

  get done() {
    return this.all.filter(finished);
  }

  /** Looks until the page is closed. ``beside`` is called before each look, as for models that are not there yet. */
  async run(beside) {
    for (;;) {
      try {
        await beside();
        await this.#look();
        this.#connected();
      } catch (error) {
        if (!this.#failed(error)) throw error;
      }
      await this.#pause();
    }
  }

  /** Look now, also where the next look is far. */
  soon() {
    this.#wake?.();
  }

  /** What the service answered to a call, or told by an event. */
  put(job, at = performance.now()) {
    if (this.#gone.has(job.id)) return;
    const before = this.#known.get(job.id);
    this.#known.set(job.id, job);
    this.#changed.set(job.id, at);
    if (before && !finished(before) && finished(job)) this.#tell("ended", job);
    if (JSON.stringify(before) !== JSON.stringify(job)) this.#tell("change");
  }

  forget(id) {
    this.#gone.add(id);
    this.#known.delete(id);
    if (id === this.#oldest) this.#oldest = this.all.at(-1)?.id ?? null;
    this.#tell("change");
  }

  async older() {
    const asked = performance.now();
    const page = await api.list(MOST, this.#oldest);
    page.data.forEach((job) => this.put(job, asked));
    this.#reaches(page);
    this.#tell("change");
  }

  async #look() {
    const asked = performance.now();
    const first = this.#first;
    const page = await this.#list(first ? MOST : Math.min(this.waiting.length + LEAST, MOST), first);
    this.#first = false;
    page.data.filter((job) => !(this.#changed.get(job.id) > asked)).forEach((job) => this.put(job, asked));
    await this.#missed(page, asked);
    if (first) this.#reaches(page);
    if (first) this.#tell("change"); // an empty list is news as well
    this.#watch();
  }

  /** The newest jobs; later on so many that they meet those that are known, as other clients may have sent a crowd. */
  async #list(limit, first) {
    const page = await api.list(limit);
    const meets = () => first || !page.has_more || this.#known.has(page.data.at(-1)?.id);
    const listed = (job) => page.data.some((one) => one.id === job.id);
    const second = () => page.data.at(-1)?.created_at; // within it only the service knows the order
    const splits = () => page.has_more && this.all.some((job) => job.created_at === second() && !listed(job));
    while (!meets() || (!first && splits())) {
      const next = await api.list(MOST, page.last_id);
      page.data.push(...next.data);
      [page.has_more, page.last_id] = [next.has_more, next.last_id];
    }
    return page;
  }

  #reaches(page) {
    this.more = page.has_more;
    this.#oldest = page.data.at(-1)?.id ?? this.#oldest;
  }

  /** Jobs that the page of the list does not have: gone where it should have them, else asked for one by one. */
  async #missed(page, asked) {
    const listed = new Set(page.data.map((job) => job.id));
    const oldest = page.data.at(-1);
    for (const job of this.all.filter((one) => !listed.has(one.id) && !(this.#changed.get(one.id) > asked))) {
      const within = !page.has_more || !oldest || job.created_at > oldest.created_at;
      if (within) this.forget(job.id);
      else if (!finished(job)) await this.#ask(job.id);
    }
  }

  async #ask(id) {
    try {
      this.put(await api.get(id));
    } catch (error) {
      if (error.status !== 404) throw error;
      this.forget(id);
    }
  }

  /** Events of the job that is next to change. One stream: a browser opens six connections to a host, no more. */
  #watch() {
    const next = this.waiting[0];
    if (this.#watched && this.#watched.id === next?.id) return;
    this.#watched?.stop.abort();
    this.#watched = null;
    if (!next || document.hidden) return;
    const watched = { id: next.id, stop: new AbortController(), live: false };
    this.#watched = watched;
    const told = (job) => {
      watched.live = true;
      if (job.deleted) this.forget(job.id);
      else if (job.id === watched.id) this.put(job);
    };
    const over = () => {
      if (this.#watched === watched) this.#watched = null; // the next look opens another
      if (finished(this.get(next.id) ?? next)) this.soon();
    };
    const broken = () => setTimeout(over, BUSY_MS); // looks go on meanwhile
    api.watch(next.id, told, watched.stop.signal).then(over, broken);
  }

  #connected() {
    const before = this.#failures;
    this.#failures = 0;
    if (before) this.#tell("connection", { lost: false });
  }

  /** Whether it is a failure that passes, or that a key mends. */
  #failed(error) {
    if (error instanceof api.Refused && error.status === 401) {
      this.#locked = true;
      this.#tell("locked");
      return true;
    }
    if (!(error instanceof api.Unreachable || error instanceof api.Refused)) return false;
    this.#failures += 1;
    this.#tell("connection", { lost: true, retryMs: this.#waitMs() });
    return true;
  }

  #waitMs() {
    if (this.#failures) return RETRY_MS[Math.min(this.#failures, RETRY_MS.length) - 1];
    if (document.hidden) return HIDDEN_MS;
    if (!this.waiting.length) return IDLE_MS;
    return this.#watched?.live && this.waiting.length === 1 ? WATCHED_MS : BUSY_MS;
  }

  #pause() {
    return new Promise((resolve) => {
      const timer = this.#locked ? 0 : setTimeout(resolve, this.#waitMs());
      this.#wake = () => {
        this.#locked = false;
        clearTimeout(timer);
        resolve();
      };
    });
  }

  #tell(type, detail = null) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
