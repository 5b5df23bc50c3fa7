/** One call from its request to its pictures. */

import { ask, blobOf, watch } from "./api.js";

const pictureOf = ({ b64_json, seed, share, theta }) => {
  const blob = blobOf(b64_json);
  return { blob, url: URL.createObjectURL(blob), seed, share, theta };
};

/** The pictures of a call that says nothing on its way. */
export async function draw(request, signal) {
  const { data } = await ask(request, signal);
  return data.map(pictureOf);
}

/** A call that streams: `picture(index, picture)` is given previews and what is done, `progress(event)` every step. */
export async function stream(request, signal, { picture, progress }) {
  const previews = [];
  let missing = request.fields.n ?? 1;
  try {
    for await (const { event, data } of watch(request, signal)) {
      if (event === "unclip.progress") {
        progress(data);
        continue;
      }
      const drawn = pictureOf(data);
      if (event.endsWith(".completed")) missing -= 1;
      else previews.push(drawn.url);
      picture(data.picture, drawn);
    }
  } finally {
    // Not at once: the last one may still be on the screen.
    setTimeout(() => previews.forEach((url) => URL.revokeObjectURL(url)), 5000);
  }
  if (missing) throw new Error("The answer ended before the picture was done. Try again.");
}
