/** Small helpers for the page's elements. */

export const byId = (id) => document.getElementById(id);

/** An element with properties (`ariaLabel`, `onclick`, …) and children. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** Buttons of which one is chosen, as tabs: arrow keys go from one to the next, Tab leaves them. */
export function tabs(list, names, choose) {
  const keys = Object.keys(names);
  const select = (key, focus = false) => {
    for (const tab of list.children) {
      const chosen = tab.dataset.key === key;
      tab.ariaSelected = String(chosen);
      tab.tabIndex = chosen ? 0 : -1;
      if (chosen && focus) tab.focus();
    }
    choose(key);
  };
  for (const key of keys) {
    const tab = make("button", { type: "button", role: "tab", textContent: names[key], onclick: () => select(key) });
    tab.dataset.key = key;
    list.append(tab);
  }
  list.addEventListener("keydown", (event) => {
    const at = keys.indexOf(event.target.dataset.key);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: keys.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    select(keys.at(to % keys.length), true);
  });
  return select;
}

/** Copies text. Pages that came by plain HTTP have no clipboard, so they copy a selection. */
export async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = make("textarea", { value: text, className: "unseen" });
  const before = document.activeElement;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  before?.focus();
  if (!copied) throw new Error("The browser does not let this page copy. Select the text instead.");
}

/** Saves a file as a download does. */
export function saveFile(file) {
  const url = URL.createObjectURL(file);
  make("a", { href: url, download: file.name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
