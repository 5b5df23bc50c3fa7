/** The large picture: previews, progress, the pictures of a call, and the slider of a walk. */

import { byId, make } from "./dom.js";

const STAGES = { prior: "Prior", decoder: "Decoder", upsampler_256: "Upsampler to 256", upsampler_1024: "Upsampler to 1024" };

const say = (text) => {
  byId("status").textContent = text;
};

/** What is on the screen is `result` = {mode, prompt, request, walk, pictures: [{url, seed, share, theta}], index}. */
export class Screen {
  /** `chosen(result)` hears which picture of a result is looked at. */
  constructor(chosen) {
    this.result = null;
    this.chosen = chosen;
    byId("position").oninput = (event) => this.choose(Number(event.target.value));
  }

  empty(text) {
    byId("empty").textContent = text;
  }

  /** Shows a result, or what there is of one that is being made. */
  show(result) {
    this.result = result;
    const { pictures, walk } = result;
    byId("walk").hidden = !walk;
    byId("walk").firstElementChild.textContent = walk;
    byId("several").hidden = walk || pictures.length < 2;
    byId("position").max = pictures.length - 1;
    byId("several").replaceChildren(...pictures.map((_, index) => this.tile(index)));
    this.choose(result.index);
  }

  /** Goes back to what was shown before a run that came to nothing. */
  back(before) {
    if (before) return this.show(before);
    this.result = null;
    byId("picture").hidden = byId("several").hidden = true;
    byId("empty").hidden = false;
  }

  /** Shows one picture of the result again, which has changed. */
  update(index) {
    byId("several").children[index].firstElementChild.src = this.result.pictures[index].url;
    if (index === this.result.index) this.choose(index);
  }

  tile(index) {
    const { url } = this.result.pictures[index];
    const image = make("img", url ? { src: url, alt: "" } : { alt: "" });
    return make("button", { type: "button", ariaLabel: `Picture ${index + 1}`, onclick: () => this.choose(index) }, image);
  }

  choose(index) {
    const { result } = this;
    result.index = index;
    const { url } = result.pictures[index];
    byId("picture").hidden = !url;
    byId("empty").hidden = true;
    if (url) byId("picture").src = url;
    byId("picture").alt = describe(result);
    byId("position").value = index;
    byId("place").textContent = byId("position").ariaValueText = placeOf(result);
    [...byId("several").children].forEach((tile, at) => {
      tile.ariaPressed = String(at === index);
    });
    if (result.done && byId("stage").ariaBusy !== "true") byId("steps").textContent = `Seed ${result.pictures[index].seed}`;
    this.chosen(result);
  }

  /** Shows that work has begun on `count` pictures that will go through `stages`; none where the call does not tell how far it is. */
  begin(count, stages) {
    this.shares = Array(count).fill(0);
    this.stages = stages;
    this.stage = null;
    byId("stage").ariaBusy = "true";
    byId("bar").hidden = false;
    byId("bar").classList.toggle("unknown", !stages.length);
    byId("steps").replaceChildren(...(stages.length ? stages.map(stageName) : ["Drawing"]));
    this.advance(0);
    say("Started.");
    byId("frame").scrollIntoView({ block: "nearest" });
  }

  /** Takes a progress event. */
  progress({ picture, stage, steps, total }) {
    this.shares[picture] = (this.stages.indexOf(stage) + steps / total) / this.stages.length;
    this.advance(this.shares.reduce((sum, one) => sum + one, 0) / this.shares.length);
    for (const name of byId("steps").children) {
      name.ariaCurrent = name.dataset.stage === stage ? "step" : null;
      if (name.ariaCurrent) name.lastElementChild.textContent = this.shares.length > 1 ? "" : ` ${steps}/${total}`;
    }
    if (stage !== this.stage) say(STAGES[stage] ?? stage);
    this.stage = stage;
  }

  advance(share) {
    const percent = Math.round(100 * share);
    byId("bar").ariaValueNow = byId("bar").classList.contains("unknown") ? null : percent;
    byId("bar").firstElementChild.style.width = `${percent}%`;
  }

  /** Ends the progress with a last word. */
  end(text) {
    byId("stage").ariaBusy = "false";
    byId("bar").hidden = true;
    byId("steps").textContent = text;
    say(text);
  }
}

function describe({ mode, prompt, pictures, index }) {
  return [mode, prompt, pictures.length > 1 ? `picture ${index + 1} of ${pictures.length}` : ""].filter(Boolean).join(", ");
}

function stageName(stage) {
  const name = make("span", {}, STAGES[stage] ?? stage, make("span"));
  name.dataset.stage = stage;
  return name;
}

function placeOf({ pictures, index }) {
  const share = pictures[index]?.theta ?? pictures[index]?.share;
  if (share != null) return `${Math.round(100 * share)}%`;
  return `${index + 1} of ${pictures.length}`;
}
