// Calls of the service. Knows the API key, and nothing of the page.

const KEY = "opensora.key";
const WAIT_MS = 20_000; // for the answer to a call; a body that is sent may take longer
const SILENT_MS = 45_000; // for the next event of a stream, which sends one at least every 15 s

/** What the service answered, as its error says it. */
export class Refused extends Error {
  constructor(status, error) {
    super(error.message ?? `The service answered ${status}.`);
    this.status = status;
    this.code = error.code ?? null;
    this.param = error.param ?? null;
  }
}

/** No answer: the service is down, or the network is. */
export class Unreachable extends Error {}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (text) => (text ? sessionStorage.setItem(KEY, text) : sessionStorage.removeItem(KEY)),
};

function headers(more = {}) {
  return key.get() ? { Authorization: `Bearer ${key.get()}`, ...more } : more;
}

/**
 * JSON of the service. A seed has 63 bits and a number of JavaScript 53: seeds come as text, so that "use again" gives
 * the same clip. A quote inside a text is escaped, so only a key can match.
 */
export function parse(text) {
  return JSON.parse(text.replace(/"seed"\s*:\s*(\d+)/g, '"seed":"$1"'));
}

async function answer(response) {
  const text = await response.text();
  let told = null;
  try {
    told = parse(text);
  } catch {
    told = null; // a proxy's page of its own, or nothing
  }
  if (response.ok && told !== null) return told;
  // what stands between the service and this page answers in its place while the service is away
  if (told === null && [502, 503, 504].includes(response.status)) throw new Unreachable("The service is not there.");
  throw new Refused(response.status, told?.error ?? {});
}

async function send(path, options = {}, waitMs = WAIT_MS) {
  const stop = new AbortController();
  const timer = setTimeout(() => stop.abort(), waitMs);
  try {
    const response = await fetch(path, {
      cache: "no-store", ...options, headers: headers(options.headers), signal: stop.signal,
    });
    return await answer(response);
  } catch (error) {
    if (error instanceof Refused || error instanceof Unreachable) throw error;
    throw new Unreachable("The service does not answer.");
  } finally {
    clearTimeout(timer);
  }
}

const job = (id) => `v1/videos/${encodeURIComponent(id)}`;

export const models = () => send("v1/models");
export const forecast = (fields) => send("v1/videos/forecast", post(fields));
export const list = (limit, after = null) =>
  send(`v1/videos?limit=${limit}&order=desc${after ? `&after=${encodeURIComponent(after)}` : ""}`);
export const get = (id) => send(job(id));
export const cancel = (id) => send(`${job(id)}/cancel`, { method: "POST" });
export const remove = (id) => send(job(id), { method: "DELETE" });
export const create = (fields, once) =>
  send("v1/videos", post(fields, { "Idempotency-Key": once }), 10 * WAIT_MS);

/** JSON: a form would send other line ends than were typed. */
function post(fields, more = {}) {
  return { method: "POST", body: JSON.stringify(fields), headers: { "Content-Type": "application/json", ...more } };
}

/** Where a file of a job is: {url, free}. With a key it is fetched, as elements of a page send no key of their own. */
export async function media(id, variant) {
  const path = `${job(id)}/content?variant=${variant}`;
  if (!key.get()) return { url: path, free: () => {} };
  let response;
  try {
    response = await fetch(path, { headers: headers() });
  } catch {
    throw new Unreachable("The service does not answer.");
  }
  if (!response.ok) await answer(response);
  const url = URL.createObjectURL(await response.blob());
  return { url, free: () => URL.revokeObjectURL(url) };
}

/**
 * Events of a job, each a video object, until the stream ends. EventSource cannot send a key, so the stream is read here.
 * Resolves when the service closes it; throws when the connection breaks or stays silent.
 */
export async function watch(id, told, signal) {
  const silence = new AbortController();
  signal.addEventListener("abort", () => silence.abort(), { once: true });
  let timer = setTimeout(() => silence.abort(), SILENT_MS);
  try {
    const response = await fetch(`${job(id)}/events`, {
      headers: headers({ Accept: "text/event-stream" }), cache: "no-store", signal: silence.signal,
    });
    if (!response.ok) return void (await answer(response));
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ; ) {
      const { value, done } = await reader.read();
      if (done) return;
      clearTimeout(timer);
      timer = setTimeout(() => silence.abort(), SILENT_MS);
      rest = readEvents(rest + value, told);
    }
  } finally {
    clearTimeout(timer);
  }
}

/** Hands over each whole event of a stream's text; the rest is the begin of the next one. */
export function readEvents(text, told) {
  const blocks = text.replace(/\r\n/g, "\n").split("\n\n");
  const rest = blocks.pop();
  for (const block of blocks) {
    const lines = block.split("\n").filter((line) => line.startsWith("data:"));
    const data = lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
    if (data.startsWith("{")) told(parse(data));
  }
  return rest;
}
