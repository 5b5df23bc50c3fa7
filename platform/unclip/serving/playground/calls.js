/** The text of a call that makes a picture again: for a shell, and for Python with the openai client. */

const OPENAI = {
  "/v1/images/generations": ["images.generate", ["model", "prompt", "n", "size", "response_format"]],
  "/v1/images/edits": ["images.edit", ["model", "prompt", "n", "size", "response_format"]],
  "/v1/images/variations": ["images.create_variation", ["model", "n", "size", "response_format"]],
};

/** A word of a shell, whatever it holds. */
const word = (value) => `'${String(value).replaceAll("'", "'\\''")}'`;

const literal = (value) => (value === true ? "True" : value === false ? "False" : JSON.stringify(value));

/** `request` as {path, fields, files}; `index` of the picture in the answer. */
export function curl({ path, fields, files }, index, origin, withKey) {
  const parts = [`curl -sS --fail-with-body ${word(origin + path)}`];
  if (withKey) parts.push('-H "Authorization: Bearer $UNCLIP_API_KEY"');
  if (files.length) {
    parts.push(...files.map(({ name, file }) => `-F ${word(`${name}=@${file.name}`)}`));
    parts.push(...Object.entries(fields).map(([name, value]) => `--form-string ${word(`${name}=${value}`)}`));
  } else {
    parts.push("-H 'Content-Type: application/json'", `-d ${word(JSON.stringify(fields))}`);
  }
  return `${parts.join(" \\\n  ")} \\\n  | jq -r '.data[${index}].b64_json' | base64 -d > picture.png`;
}

function namedArguments({ fields, files }, known) {
  const lines = files.map(({ name, file }) => `${name}=open(${literal(file.name)}, "rb"),`);
  const extra = Object.entries(fields).filter(([name]) => !known.includes(name));
  for (const name of known.filter((name) => name in fields)) lines.push(`${name}=${literal(fields[name])},`);
  if (extra.length) lines.push(`extra_body={${extra.map(([name, value]) => `"${name}": ${literal(value)}`).join(", ")}},`);
  return lines;
}

function rawArguments({ path, fields, files }) {
  return [
    `${literal(path.replace("/v1", ""))},`,
    "cast_to=ImagesResponse,",
    `body={${Object.entries(fields).map(([name, value]) => `"${name}": ${literal(value)}`).join(", ")}},`,
    `files=[${files.map(({ name, file }) => `("${name}", open(${literal(file.name)}, "rb"))`).join(", ")}],`,
    'options={"headers": {"Content-Type": "multipart/form-data"}},',
  ];
}

/** As `curl`, for Python. */
export function python(request, index, origin, withKey) {
  const [method, known] = OPENAI[request.path] ?? ["post"];
  const lines = known ? namedArguments(request, known) : rawArguments(request);
  const key = withKey ? 'os.environ["UNCLIP_API_KEY"]' : '"none"';
  return [
    withKey ? "import base64\nimport os\n" : "import base64\n",
    "from openai import OpenAI",
    ...(known ? [] : ["from openai.types import ImagesResponse"]),
    "",
    `client = OpenAI(base_url=${literal(`${origin}/v1`)}, api_key=${key})`,
    `answer = client.${method}(`,
    ...lines.map((line) => `    ${line}`),
    ")",
    'with open("picture.png", "wb") as file:',
    `    file.write(base64.b64decode(answer.data[${index}].b64_json))`,
    "",
  ].join("\n");
}
