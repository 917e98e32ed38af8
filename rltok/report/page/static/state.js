// The state of the page, kept in the address behind #, so that a link or a reload shows the same.

const DEFAULTS = {
  run: "0", q: "", range: "run", view: "one", sel: "", tok: "", from: "", to: "", reward: "", min: "", max: "",
  group: "", text: "", order: "run", x: "", smooth: "0", hide: "", add: "", theme: "auto",
};

const state = { ...DEFAULTS };
const watchers = [];

function readAddress() {
  const given = new URLSearchParams(location.hash.replace(/^#/, ""));
  const read = {};
  for (const key of Object.keys(DEFAULTS)) read[key] = given.get(key) ?? DEFAULTS[key];
  return read;
}

let addressTimer = 0;

// Soon, and not for every token that a held arrow key passes.
function writeAddress() {
  clearTimeout(addressTimer);
  addressTimer = setTimeout(writeAddressNow, 150);
}

function writeAddressNow() {
  const kept = new URLSearchParams();
  for (const [key, value] of Object.entries(state)) if (value !== DEFAULTS[key]) kept.set(key, value);
  const text = kept.toString();
  if (`#${text}` !== location.hash && (text || location.hash)) history.replaceState(null, "", `#${text}`);
}

// Change some keys; who watches one of them is told once.
function setState(changes) {
  const changed = Object.keys(changes).filter((key) => String(changes[key]) !== state[key]);
  if (!changed.length) return;
  for (const key of changed) state[key] = String(changes[key]);
  writeAddress();
  for (const [keys, tell] of watchers) if (keys.some((key) => changed.includes(key))) tell();
}

function watch(keys, tell) {
  watchers.push([keys, tell]);
}

// A form control that shows and sets one key.
function bind(element, key, event = "input") {
  const show = () => {
    if (element.value !== state[key]) element.value = state[key];
  };
  element.addEventListener(event, () => setState({ [key]: element.value }));
  watch([key], show);
  show();
}

function option(select, value, text) {
  const element = document.createElement("option");
  element.value = value;
  element.textContent = text;
  select.append(element);
}

const element = (id) => document.getElementById(id);

function make(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}
