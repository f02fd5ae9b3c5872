// Numbers as people read them. Nothing here knows of the page.

export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "";
  if (seconds < 1) return "a second";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 90) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return minutes % 60 ? `${hours} h ${minutes % 60} min` : `${hours} h`;
}

export function bytes(count) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) {
    count /= 1024;
    unit += 1;
  }
  return `${count >= 100 || unit === 0 ? Math.round(count) : count.toFixed(1)} ${units[unit]}`;
}

export function size(width, height) {
  return `${width}×${height}`;
}

/** "1.5 s", of a clip; a still has no length. */
export function clipLength(frames, fps) {
  if (frames === 1) return "still";
  const seconds = frames / fps;
  return `${seconds < 10 ? Number(seconds.toFixed(1)) : Math.round(seconds)} s`;
}

export function clock(seconds) {
  const minutes = Math.floor(seconds / 60);
  return `${minutes}:${(seconds - 60 * minutes).toFixed(2).padStart(5, "0")}`;
}

export function plural(count, one, many = `${one}s`) {
  return `${count} ${count === 1 ? one : many}`;
}

/** A prompt cut for a label, at a border of words where there is one. */
export function short(text, most = 60) {
  const flat = text.replace(/\s+/g, " ").trim();
  if (flat.length <= most) return flat;
  const cut = [...flat].slice(0, most).join("");
  return `${cut.slice(0, Math.max(cut.lastIndexOf(" "), most - 20))} …`;
}

export function when(secondsSince1970) {
  const date = new Date(secondsSince1970 * 1000);
  const today = new Date().toDateString() === date.toDateString();
  const day = today ? {} : { day: "numeric", month: "short" };
  return date.toLocaleString("en", { hour: "2-digit", minute: "2-digit", hour12: false, ...day });
}
