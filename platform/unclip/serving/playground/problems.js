/** Errors in words, near where they belong. */

import { byId } from "./dom.js";

const form = byId("form");

/** An error that belongs to a field of the form. */
export class FieldError extends Error {
  constructor(field, message) {
    super(message);
    this.param = field;
  }
}

export function clearProblems() {
  for (const place of form.querySelectorAll(".error")) place.textContent = "";
  for (const control of form.querySelectorAll("[aria-invalid]")) control.removeAttribute("aria-invalid");
}

/** Says an error below the field that it names, where the form shows that one, or else above the button. */
export function tellProblem(error) {
  const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  const control = controlOf((error.param ?? "").replace("[]", ""));
  const place = control?.closest(".field:not([hidden])")?.querySelector(".error");
  (place ?? byId("failure")).textContent = `${error.message}${wait}`;
  if (!place) return;
  control.closest("details")?.setAttribute("open", "");
  control.setAttribute("aria-invalid", "true");
  control.setAttribute("aria-errormessage", place.id);
  control.focus();
}

function controlOf(name) {
  if (name === "mask") return byId("mask");
  return form.elements.namedItem(name) ?? byId(`slot-${name}`)?.querySelector("button");
}
