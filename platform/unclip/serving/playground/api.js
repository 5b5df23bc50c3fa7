/** The HTTP API: calls, streams of events, errors, and the key. */

const KEY = "unclip-key";

/** What the server refuses: its message, the field it blames, and the seconds to wait. */
export class ApiError extends Error {
  constructor(status, { message, param = null }, retryAfter = null) {
    super(message);
    Object.assign(this, { status, param, retryAfter });
  }
}

export const apiKey = () => sessionStorage.getItem(KEY);

let askForKey = async () => null;

/** `ask(message)` resolves to a key, or to null where the person gives none. */
export function onUnauthorized(ask) {
  askForKey = ask;
}

async function errorOf(answer) {
  const body = await answer.json().catch(() => ({}));
  const error = body.error ?? { message: `The server answers ${answer.status} ${answer.statusText}.` };
  return new ApiError(answer.status, error, answer.headers.get("retry-after"));
}

async function open(path, init = {}) {
  for (;;) {
    const headers = new Headers(init.headers);
    if (apiKey()) headers.set("authorization", `Bearer ${apiKey()}`);
    const answer = await fetch(path, { ...init, headers }).catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, { message: "The server does not answer. Is it running?" });
    });
    if (answer.ok) return answer;
    const error = await errorOf(answer);
    const key = answer.status === 401 ? await askForKey(error.message) : null;
    if (!key) throw error;
    sessionStorage.setItem(KEY, key);
  }
}

/** What the server can do: its first model, with sizes and limits. */
export async function getModel() {
  const answer = await open("/v1/models");
  return (await answer.json()).data[0];
}

function post({ path, fields, files }, signal, further = {}) {
  const all = { ...fields, ...further };
  if (!files.length) {
    return open(path, { method: "POST", signal, headers: { "content-type": "application/json" }, body: JSON.stringify(all) });
  }
  const form = new FormData();
  for (const { name, file } of files) form.append(name, file, file.name);
  for (const [name, value] of Object.entries(all)) form.append(name, String(value));
  return open(path, { method: "POST", signal, body: form });
}

/** The answer to a call, as JSON. */
export async function ask(request, signal) {
  return (await post(request, signal)).json();
}

/** The events of a call, as {event, data}: previews, progress, and pictures that are done. */
export async function* watch(request, signal) {
  const answer = await post(request, signal, { stream: true, partial_images: 3, progress: true });
  for await (const { event, data } of parse(answer.body)) {
    const body = JSON.parse(data);
    if (event === "error") throw new ApiError(answer.status, body.error);
    yield { event, data: body };
  }
}

/** Server-sent events of a body. EventSource reads only those of GET requests. */
export async function* parse(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      const blocks = (rest + part.value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const event = eventOf(block);
        if (event.data) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function eventOf(block) {
  const lines = block.split(/\r?\n/);
  const values = (name) => lines.filter((line) => line.startsWith(`${name}:`)).map((line) => line.slice(name.length + 1).trimStart());
  return { event: values("event")[0] ?? "message", data: values("data").join("\n") };
}

/** The file in an answer's base64. */
export function blobOf(base64, type = "image/png") {
  return new Blob([Uint8Array.from(atob(base64), (character) => character.charCodeAt(0))], { type });
}
