/** The page: modes, the run, and what is done with its pictures. */

import { getModel, onUnauthorized } from "./api.js";
import { byId, make, tabs } from "./dom.js";
import { Gallery } from "./gallery.js";
import { askForKey } from "./key.js";
import { Painter } from "./mask.js";
import { MODES, arrange, requestOf } from "./modes.js";
import { clearProblems, tellProblem } from "./problems.js";
import { repeat } from "./repeat.js";
import { draw, stream } from "./run.js";
import { Screen } from "./screen.js";
import { Slot } from "./slot.js";

const form = byId("form");
let mode = "create";
let model = null;
let running = null;
let selectMode = null;
const painter = new Painter();
const slots = {
  image: new Slot(byId("slot-image"), "Picture", (bitmap) => {
    painter.open(bitmap);
    arrange(mode, form, slots);
  }),
  second: new Slot(byId("slot-second"), "Second picture"),
};
const screen = new Screen(looked);
const gallery = new Gallery((result) => screen.show(result));

// ---- modes

function enter(name) {
  mode = name;
  arrange(mode, form, slots);
  clearProblems();
  screen.empty(MODES[mode].empty);
  history.replaceState(null, "", `#${mode}`);
}

/** The modes that the server's model is able to do, in the tabs and for the picture on the screen. */
function offer() {
  const able = Object.entries(MODES).filter(([, { embeds }]) => !embeds || !model || model.embed_dim);
  selectMode = tabs(byId("modes"), Object.fromEntries(able.map(([key, { name }]) => [key, name])), enter);
  for (const [key, { name, slots: taken }] of able) {
    if (taken.image) byId("uses").append(make("button", { type: "button", textContent: name, onclick: () => useFor(key) }));
  }
  const asked = location.hash.slice(1);
  selectMode(able.some(([key]) => key === asked) ? asked : "create");
}

/** The place that the next picture goes to: the second one of a blend that has its first. */
const place = () => (mode === "blend" && slots.image.file ? slots.second : slots.image);

function useFor(key) {
  const { pictures, index } = screen.result;
  const { blob, seed } = pictures[index];
  selectMode(key);
  const slot = place();
  slot.put(new File([blob], `unclip-${seed}.png`, { type: blob.type }));
  slot.button.focus();
}

function take(file) {
  if (!file?.type.startsWith("image/")) return;
  if (mode === "create") selectMode("variations");
  place().put(file);
}

addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  take(event.dataTransfer.files[0]);
});
addEventListener("paste", (event) => take(event.clipboardData.files[0]));

// ---- the seed

function keep(kept) {
  byId("lock").ariaPressed = String(kept);
}

byId("lock").onclick = () => keep(byId("lock").ariaPressed !== "true");
byId("seed").oninput = () => keep(true);

function newSeed() {
  const seed = byId("seed");
  if (byId("lock").ariaPressed !== "true" || !seed.value) [seed.value] = crypto.getRandomValues(new Uint32Array(1));
}

// ---- a run

/** Cancel stands where Make was, and has its focus. */
function busy(controller) {
  const { activeElement } = document;
  running = controller;
  byId("make").hidden = Boolean(running);
  byId("cancel").hidden = !running;
  if (activeElement === byId("make") || activeElement === byId("cancel")) byId(running ? "cancel" : "make").focus({ preventScroll: true });
}

async function run() {
  const before = screen.result;
  const { name, walk, streams } = MODES[mode];
  clearProblems();
  newSeed();
  busy(new AbortController());
  try {
    if (!model) await load();
    const request = await requestOf(mode, form, { model: model.id, slots, painter });
    const count = streams ? (request.fields.n ?? 1) : 0;
    const pictures = Array.from({ length: count }, () => ({}));
    const result = { mode: name, prompt: request.fields.prompt ?? "", request, walk, pictures, index: 0, done: false };
    screen.begin(count, streams ? stagesOf(request.fields) : []);
    if (streams) await streamed(result);
    else result.pictures = await draw(request, running.signal);
    finished(result);
  } catch (error) {
    stopped(error, before);
  } finally {
    busy(null);
  }
}

/** The stages on the way to a size; smaller sizes than a stage draws are scaled down from it. */
function stagesOf({ size, prior }) {
  const last = model.sizes.find((side) => side >= parseInt(size));
  const stages = Object.entries(model.stages).filter(([, stage]) => !stage.size || stage.size <= last);
  return stages.map(([name]) => name).filter((name) => name !== "prior" || !prior);
}

async function streamed(result) {
  screen.show(result);
  await stream(result.request, running.signal, {
    progress: (event) => screen.progress(event),
    picture: (index, picture) => {
      result.pictures[index] = picture;
      if (screen.result === result) screen.update(index);
    },
  });
}

function finished(result) {
  result.done = true;
  gallery.add(result);
  screen.end("Done");
  screen.show(result);
}

function stopped(error, before) {
  if (screen.result !== before && !screen.result?.done) screen.back(before);
  const cancelled = error.name === "AbortError";
  screen.end(cancelled ? "Cancelled" : "");
  if (!cancelled) tellProblem(error);
}

form.onsubmit = (event) => {
  event.preventDefault();
  if (!running) run();
};
byId("cancel").onclick = () => running?.abort();
byId("prompt").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
};
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !byId("ask").open) running?.abort();
});

// ---- the picture on the screen

function looked(result) {
  for (const part of [byId("tools"), byId("calls")]) {
    part.classList.toggle("veiled", !result.done);
    if (result.done) part.hidden = false;
  }
  if (!result.done) return;
  const { blob, url, seed } = result.pictures[result.index];
  Object.assign(byId("download"), { href: url, download: `unclip-${seed}.${blob.type.split("/")[1]}` });
  gallery.mark(result);
  repeat(result);
}

// ---- the server

async function load() {
  model = await getModel();
  const { pictures_per_request: most, steps, prompt_characters: characters, body_bytes: bytes } = model.limits;
  byId("model").textContent = model.id;
  byId("model").title = `Weights ${model.revision}`;
  byId("credit").textContent = model.attribution ?? "";
  byId("classes").textContent = model.classes.length ? `This model draws: ${model.classes.join(", ")}.` : "";
  byId("size").replaceChildren(...model.sizes.map((size) => new Option(`${size} × ${size}`, `${size}x${size}`)));
  byId("size").selectedIndex = model.sizes.length - 1;
  byId("n").max = byId("frames").max = most;
  byId("num_inference_steps").max = steps;
  for (const name of ["guidance_scale", "num_inference_steps"]) byId(name).placeholder = model.stages.decoder?.[name] ?? "";
  for (const name of ["prompt", "source_prompt", "negative_prompt"]) byId(name).maxLength = characters;
  for (const slot of Object.values(slots)) slot.limit = bytes;
}

onUnauthorized(askForKey);
newSeed();
load().catch(tellProblem).finally(offer);
