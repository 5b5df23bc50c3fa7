/** What the page can make, and the request of each. */

import { byId } from "./dom.js";
import { FieldError } from "./problems.js";

/**
 * `streams`: the API shows pictures on the way; `walk`: it makes frames of a way, the slider's label; `embeds`: the
 * model has to read pictures by CLIP.
 */
export const MODES = {
  create: {
    name: "Create",
    path: "/v1/images/generations",
    streams: true,
    empty: "Type a prompt and watch it become a picture.",
    slots: {},
  },
  variations: {
    name: "Variations",
    path: "/v1/images/variations",
    embeds: true,
    empty: "Drop a picture to see others that show the same.",
    slots: { image: "Picture" },
  },
  edit: {
    name: "Edit",
    path: "/v1/images/edits",
    streams: true,
    empty: "Drop a picture, paint over a part of it, and say what shall be there.",
    slots: { image: "Picture" },
  },
  blend: {
    name: "Blend",
    path: "/v1/images/interpolations",
    embeds: true,
    walk: "Between the two",
    empty: "Drop two pictures and walk from one to the other.",
    slots: { image: "First picture", second: "Second picture" },
  },
  diff: {
    name: "Text diff",
    path: "/v1/images/text-diffs",
    embeds: true,
    walk: "Towards the words",
    empty: "Drop a picture and say in words what it shall become.",
    slots: { image: "Picture" },
  },
};

/** Left out of a request where they are the API's own defaults, so that copied calls stay short. */
const DEFAULTS = { n: "1", prior: "prior", noise: "interpolated", source_prompt: "a photo" };

const controls = (form) => [...form.elements].filter((control) => control.name && !control.disabled);

/** The form as a request {path, fields, files}. Raises FieldError. */
export async function requestOf(mode, form, { model, slots, painter }) {
  for (const control of controls(form)) {
    if (!control.checkValidity()) throw new FieldError(control.name, control.validationMessage);
  }
  const { path, slots: wanted } = MODES[mode];
  const files = mode === "edit" ? await painted(slots, painter) : await chosen(wanted, slots);
  const fields = { model };
  for (const { name, type, value } of controls(form)) {
    const text = value.trim();
    if (text === DEFAULTS[name] || (!text && name !== "source_prompt")) continue;
    fields[name] = type === "number" ? Number(text) : text;
  }
  return { path, fields, files };
}

async function chosen(wanted, slots) {
  const files = Object.entries(wanted).map(([name, label]) => {
    const { file } = slots[name];
    if (!file) throw new FieldError(name, `${label}: choose one, or drop it here.`);
    return { name: "image", file };
  });
  if (files.length === 2 && files[0].file.name === files[1].file.name) {
    const { file } = files[1];
    files[1].file = new File([file], `second-${file.name}`, { type: file.type });
  }
  return files;
}

async function painted(slots, painter) {
  if (!slots.image.file) throw new FieldError("image", "Picture: choose one, or drop it here.");
  if (!painter.painted()) throw new FieldError("mask", "Paint over what shall be drawn anew.");
  return painter.files();
}

/** Shows the fields that a mode has, and only those take part in it. */
export function arrange(mode, form, slots) {
  for (const field of form.querySelectorAll("[data-modes]")) {
    const there = field.dataset.modes.split(" ").includes(mode);
    field.hidden = !there || (field.id === "painter" && !slots.image.file);
    for (const control of field.querySelectorAll("[name]")) control.disabled = !there;
  }
  byId("more").hidden = !byId("more").querySelector("[data-modes]:not([hidden])");
  for (const [name, label] of Object.entries(MODES[mode].slots)) {
    byId(`${name}-name`).textContent = label;
    slots[name].rename(label);
  }
  form.querySelector("label[for=prompt]").textContent = { edit: "What shall be there", diff: "It shall show" }[mode] ?? "Prompt";
}
