/** A place for a picture: chosen, dropped, pasted, or taken from what was made. */

import { make } from "./dom.js";

const TYPES = ["image/png", "image/jpeg", "image/webp"];
const EMPTY = "Choose, drop or paste a picture";

export class Slot {
  /** `changed(bitmap)` hears of every new picture, null when there is none any more. */
  constructor(root, label, changed = () => {}) {
    this.file = null;
    this.limit = Infinity;
    this.changed = changed;
    this.label = label;
    this.error = root.parentElement.querySelector(".error");
    this.input = make("input", { type: "file", accept: TYPES.join(), hidden: true, onchange: () => this.put(this.input.files[0]) });
    this.thumbnail = make("img", { alt: "", hidden: true });
    this.text = make("span");
    this.button = make("button", { type: "button", className: "drop", onclick: () => this.input.click() }, this.thumbnail, this.text);
    this.remove = make("button", { type: "button", textContent: "Remove", hidden: true, onclick: () => this.clear() });
    root.append(this.input, this.button, this.remove);
    for (const kind of ["dragover", "dragleave", "drop"]) {
      root.addEventListener(kind, (event) => this.drag(event));
    }
    this.show(EMPTY, "");
  }

  drag(event) {
    event.preventDefault();
    this.button.classList.toggle("over", event.type === "dragover");
    if (event.type !== "drop") return;
    event.stopPropagation();
    this.put(event.dataTransfer.files[0]);
  }

  /** Takes a file; one that is no picture, or too large, is refused in words. */
  async put(file) {
    if (!file) return;
    this.error.textContent = "";
    try {
      if (!TYPES.includes(file.type)) throw new Error(`${file.name} is not a PNG, JPEG or WebP picture.`);
      if (file.size > this.limit) throw new Error(`${file.name} is larger than the ${Math.floor(this.limit / 2 ** 20)} MB that the server reads.`);
      const bitmap = await createImageBitmap(file).catch(() => {
        throw new Error(`${file.name} cannot be read as a picture.`);
      });
      this.fill(file, bitmap);
    } catch (error) {
      this.error.textContent = error.message;
    }
  }

  fill(file, bitmap) {
    // Names without anything that a shell or curl's -F would read as its own.
    this.file = new File([file], file.name.replace(/[^\w.-]+/g, "_").replace(/^[-.]+/, ""), { type: file.type });
    this.show(file.name, URL.createObjectURL(file));
    this.changed(bitmap);
  }

  clear() {
    this.file = null;
    this.input.value = "";
    this.show(EMPTY, "");
    this.changed(null);
  }

  show(text, url) {
    if (this.url) URL.revokeObjectURL(this.url);
    this.url = url;
    if (url) this.thumbnail.src = url;
    else this.thumbnail.removeAttribute("src");
    this.thumbnail.hidden = this.remove.hidden = !url;
    this.text.textContent = text;
    this.button.ariaLabel = `${this.label}: ${text}`;
    this.remove.ariaLabel = `Remove ${this.label.toLowerCase()}`;
  }

  rename(label) {
    this.label = label;
    this.button.ariaLabel = `${label}: ${this.text.textContent}`;
  }
}
