/** The call that repeats what is on the screen, to copy. */

import { apiKey } from "./api.js";
import { curl, python } from "./calls.js";
import { byId, copyText, saveFile, tabs } from "./dom.js";

let language = "curl";
let shown = null;

/** The request that makes the picture on the screen again, and its place in the answer. */
function callOf({ request, walk, pictures, index }) {
  if (walk) return { request, index };
  const { n, ...fields } = request.fields;
  return { request: { ...request, fields: { ...fields, seed: pictures[index].seed } }, index: 0 };
}

function write() {
  if (!shown) return;
  const { request, index } = callOf(shown);
  byId("code").textContent = { curl, python }[language](request, index, location.origin, Boolean(apiKey()));
  const read = request.files.map(({ file }) => file.name);
  byId("reads").hidden = !read.length;
  byId("reads").firstElementChild.textContent = `It reads ${read.join(" and ")}.`;
}

/** Writes the call for the picture of a result that is looked at. */
export function repeat(result) {
  shown = result;
  write();
}

tabs(byId("languages"), { curl: "curl", python: "Python" }, (chosen) => {
  language = chosen;
  write();
})(language);

byId("copy").onclick = async () => {
  const said = await copyText(byId("code").textContent).then(() => "Copied", (error) => error.message);
  byId("copy").textContent = byId("status").textContent = said;
  setTimeout(() => Object.assign(byId("copy"), { textContent: "Copy" }), 2000);
};

byId("save").onclick = () => shown.request.files.forEach(({ file }) => saveFile(file));
