/** What was made in this visit; nothing is kept when the page is left. */

import { byId, make } from "./dom.js";

const MOST = 60;

export class Gallery {
  /** `open(result)` shows one again. */
  constructor(open) {
    this.open = open;
    this.items = [];
  }

  add(result) {
    const url = result.pictures[result.index].url;
    const label = `${result.mode}${result.prompt ? `: ${result.prompt}` : ""}, seed ${result.pictures[0].seed}`;
    const button = make("button", { type: "button", ariaLabel: label, title: label, onclick: () => this.open(result) }, make("img", { src: url, alt: "" }));
    const item = make("li", {}, button);
    byId("strip").prepend(item);
    byId("history").hidden = false;
    this.items.push({ result, item });
    if (this.items.length > MOST) this.forget(this.items.shift());
  }

  forget({ result, item }) {
    item.remove();
    for (const { url } of result.pictures) URL.revokeObjectURL(url);
  }

  /** Marks the one on the screen. */
  mark(result) {
    for (const { result: made, item } of this.items) item.firstElementChild.ariaCurrent = String(made === result);
  }
}
