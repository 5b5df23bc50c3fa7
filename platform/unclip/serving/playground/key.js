/** Asking for the API key. */

import { byId } from "./dom.js";

let asked = null;

/** Opens the dialog with the server's words; resolves to a key, or null. Calls that come meanwhile share its answer. */
export function askForKey(message) {
  asked ??= open(message).finally(() => {
    asked = null;
  });
  return asked;
}

function open(message) {
  const dialog = byId("ask");
  byId("ask-why").textContent = message;
  byId("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve((dialog.returnValue === "use" && byId("key").value.trim()) || null), { once: true });
  });
}
