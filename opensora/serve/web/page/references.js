// What the next clip goes on from, pictures or clips: dropped, pasted or chosen, shown, and taken out again.

const KINDS = {
  i2v_head: "first frame", i2v_tail: "last frame", i2v_loop: "first and last frame",
  v2v_head: "beginning", v2v_tail: "end", v2v_head_easy: "beginning, closely", v2v_tail_easy: "end, closely",
};
const PICTURES = ["image/png", "image/jpeg", "image/webp"];
const CLIPS = ["video/mp4"];
const at = (id) => document.getElementById(id);

const ofClips = (kind) => kind.startsWith("v2v");
const isClip = (file) => CLIPS.includes(file.type);

/** Events: "change" when references or what they are changed; "said" and "refused" with words for people. */
export class References extends EventTarget {
  #files = []; // {file, url}
  #takes = {}; // kind -> files it takes

  constructor() {
    super();
    at("file").addEventListener("change", (event) => {
      this.#add([...event.target.files]);
      event.target.value = ""; // the same file may be chosen again
    });
    at("kind").addEventListener("change", () => this.#changed());
    this.#listenForDrops();
    document.addEventListener("paste", (event) => {
      const files = [...(event.clipboardData?.files ?? [])];
      if (files.length && this.wanted) {
        event.preventDefault();
        this.#add(files);
      }
    });
  }

  get files() {
    return this.#files.map((one) => one.file);
  }

  /** The files as the service takes them, in order. */
  urls() {
    return Promise.all(this.files.map(async (file) => ({ image_url: await dataUrl(file) })));
  }

  /** What they are to the model; null without. */
  get kind() {
    return this.#files.length && this.#fitting().length ? at("kind").value : null;
  }

  /** What the model takes, in words; "" if nothing. */
  get wanted() {
    return [count(this.#most(false), "picture"), count(this.#most(true), "clip")].filter(Boolean).join(" or ");
  }

  /** What a model takes. Those that it has no use for are taken out. */
  offer(model) {
    const kinds = model.cond_types.filter((kind) => model.references[kind] > 0);
    this.#takes = Object.fromEntries(kinds.map((kind) => [kind, model.references[kind]]));
    at("file").accept = [...(this.#most(false) ? PICTURES : []), ...(this.#most(true) ? CLIPS : [])].join();
    while (this.#files.length && this.#files.length > this.#most(isClip(this.files[0]))) this.#drop(this.#files.at(-1));
    this.#show();
  }

  /** Choose a kind again, as of an earlier clip. */
  choose(kind) {
    if ([...at("kind").options].some((option) => option.value === kind)) at("kind").value = kind;
  }

  #listenForDrops() {
    const over = (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault(); // else the browser leaves the page for the file
      at("drop").classList.toggle("over", event.type === "dragover");
      if (event.type === "drop") this.#add([...event.dataTransfer.files]);
    };
    for (const type of ["dragover", "dragleave", "drop"]) document.addEventListener(type, over);
  }

  #add(files) {
    const fitting = files.filter((file) => at("file").accept.split(",").includes(file.type));
    if (fitting.length) this.#take(fitting);
    if (fitting.length === files.length) return;
    this.#refuse(`The model goes on from ${this.wanted || "a prompt alone"}; files are PNG, JPEG, WebP or MP4.`);
  }

  #take(files) {
    files.forEach((file) => this.#put(file));
    this.#say(`Reference added: ${nameOf(files[0])}`);
    this.#changed();
  }

  /** The new one takes the place of the oldest where there is no more room, and of all that are of the other sort. */
  #put(file) {
    const others = this.#files.filter((one) => isClip(one.file) !== isClip(file));
    others.forEach((one) => this.#drop(one));
    if (this.#files.length >= this.#most(isClip(file))) this.#drop(this.#files[0]);
    this.#files.push({ file, url: URL.createObjectURL(file) });
  }

  #most(clips) {
    return Math.max(0, ...Object.keys(this.#takes).filter((kind) => ofClips(kind) === clips).map((kind) => this.#takes[kind]));
  }

  #drop(one) {
    URL.revokeObjectURL(one.url);
    this.#files = this.#files.filter((other) => other !== one);
  }

  #remove(one) {
    this.#drop(one);
    this.#say("Reference removed");
    this.#changed();
    at("file").focus();
  }

  #fitting() {
    const fits = (kind) => this.files.every((file) => isClip(file) === ofClips(kind));
    return Object.keys(this.#takes).filter((kind) => this.#takes[kind] === this.#files.length && fits(kind));
  }

  #changed() {
    this.#show();
    this.dispatchEvent(new Event("change"));
  }

  #show() {
    at("reference-field").hidden = !this.wanted;
    at("pictures").replaceChildren(...this.#files.map((one) => this.#picture(one)));
    const room = this.#files.length && this.#most(isClip(this.files[0])) > this.#files.length;
    at("drop-text").replaceChildren(...dropWords(this.wanted, this.#files.length, room));
    this.#showKinds();
  }

  #showKinds() {
    const kinds = this.#fitting();
    const before = at("kind").value;
    at("kind").replaceChildren(...kinds.map((kind) => new Option(KINDS[kind] ?? kind, kind)));
    if (kinds.includes(before)) at("kind").value = before;
    at("kind-field").hidden = !kinds.length;
  }

  #picture(one) {
    const item = document.createElement("li");
    const shown = document.createElement(isClip(one.file) ? "video" : "img");
    const button = document.createElement("button");
    if (isClip(one.file)) Object.assign(shown, { muted: true, playsInline: true });
    else shown.alt = `Reference: ${nameOf(one.file)}`;
    shown.setAttribute("aria-label", `Reference: ${nameOf(one.file)}`);
    shown.src = one.url;
    Object.assign(button, { type: "button", textContent: "Remove", className: "quiet" });
    button.setAttribute("aria-label", `Remove reference ${nameOf(one.file)}`);
    button.addEventListener("click", () => this.#remove(one));
    item.append(shown, button);
    return item;
  }

  #refuse(words) {
    this.dispatchEvent(new CustomEvent("refused", { detail: words }));
  }

  #say(words) {
    this.dispatchEvent(new CustomEvent("said", { detail: words }));
  }
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

const nameOf = (file) => file.name || "pasted picture";

function count(most, word) {
  return most > 1 ? `up to ${most} ${word}s` : most && `a ${word}`;
}

function dropWords(wanted, held, room) {
  const choose = document.createElement("u");
  choose.textContent = "choose";
  return ["Drop, paste or ", choose, held ? (room ? " another" : " another in its place") : ` ${wanted}`];
}
