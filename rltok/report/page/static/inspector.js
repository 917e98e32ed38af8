// The inspector: filters and list at the left, completions in the middle, the numbers of one token at the right.

const allSamples = new Map();
let samples = null;
let list = null;
let cards = [];
let drawing = 0;
let shownPlace = null;

const observer = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      observer.unobserve(entry.target);
      entry.target.closest(".completion").card.fill(entry.target.block);
    }
  },
  { root: element("cards"), rootMargin: "1200px 0px" },
);

async function openInspector() {
  PAGE.runs.forEach((name, run) => PAGE.samples[run].rows && option(element("run"), run, name));
  element("run-choice").hidden = element("run").options.length < 2;
  if (!PAGE.samples[Number(state.run)]?.rows) state.run = element("run").options[0].value;
  list = new CompletionList((row, enter) => chooseRow(row, enter));
  for (const [id, key, event] of [
    ["run", "run"], ["quantity", "q"], ["range", "range"], ["step-from", "from"], ["step-to", "to"], ["reward-name", "reward"],
    ["reward-low", "min"], ["reward-high", "max"], ["group", "group"], ["prompt-text", "text"], ["order", "order"],
  ]) bind(element(id), key, event);
  element("range").options[0].textContent = PAGE.runs.length > 1 ? "all runs" : "the whole run";
  element("filters").addEventListener("submit", (event) => event.preventDefault());
  element("clear").addEventListener("click", () => setState({ from: "", to: "", reward: "", min: "", max: "", group: "", text: "", order: "run" }));
  for (const view of ["one", "group"]) element(`view-${view}`).addEventListener("click", () => setState({ view }));
  watch(["run"], openRun);
  watch(["from", "to", "reward", "min", "max", "group", "text", "order"], showList);
  watch(["q", "range", "theme"], recolor);
  watch(["view"], showCompletions);
  watch(["sel"], followAddress);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolor);
  listenToTokens();
  await openRun();
}

async function openRun() {
  const run = Number(state.run);
  if (!allSamples.has(run)) allSamples.set(run, new Samples(run));
  const opened = await allSamples.get(run).open();
  if (run !== Number(state.run)) return;
  samples = opened;
  const quantity = element("quantity");
  quantity.replaceChildren();
  for (const one of PAGE.quantities) if (samples.has(one)) option(quantity, one.name, one.label);
  const rewards = element("reward-name");
  rewards.replaceChildren();
  option(rewards, "", "weighted sum");
  for (const name of samples.index.rewards) option(rewards, name, name);
  if (!samples.index.rewards.includes(state.reward)) state.reward = "";
  rewards.value = state.reward;
  const available = [...quantity.options].map((one) => one.value);
  DEFAULTS.q = available.includes("credit_used") ? "credit_used" : (available[0] ?? "");
  if (!available.includes(state.q)) state.q = DEFAULTS.q;
  quantity.value = state.q;
  element("quantity").disabled = !available.length;
  showList();
}

const NO_QUANTITY = { name: "", label: "no quantity", unit: "", meaning: "", kind: "discrete", values: [], of: [], centre: null, log: false };

const chosenQuantity = () => QUANTITIES.get(state.q) ?? NO_QUANTITY;

function currentScale() {
  const quantity = chosenQuantity();
  if (state.range === "view" && cards.length && quantity.kind !== "discrete") {
    const parts = cards.filter((card) => card.values).map((card) => card.values);
    return makeScale(quantity, ...rangeOf(quantity, parts));
  }
  return makeScale(quantity);
}

function filteredRows() {
  const { rows } = samples;
  const bound = (text, otherwise) => (text.trim() === "" || Number.isNaN(Number(text)) ? otherwise : Number(text));
  const from = bound(state.from, -Infinity);
  const to = bound(state.to, Infinity);
  const low = bound(state.min, -Infinity);
  const high = bound(state.max, Infinity);
  const group = bound(state.group, null);
  const text = state.text.toLowerCase();
  const holding = rows.prompts.map((prompt) => !text || prompt.toLowerCase().includes(text));
  const byReward = state.min.trim() !== "" || state.max.trim() !== "";
  const found = [];
  for (let row = 0; row < samples.index.rows; row++) {
    const reward = samples.reward(row, state.reward);
    if (rows.step[row] < from || rows.step[row] > to) continue;
    if (byReward && (reward === null || reward < low || reward > high)) continue;
    if (group !== null && rows.group[row] !== group) continue;
    if (!holding[rows.prompt[row]]) continue;
    found.push(row);
  }
  return inOrder(found);
}

// The list and the cards of a group stand in the same order.
function inOrder(found) {
  const { length } = samples.rows;
  const value = (row) => samples.reward(row, state.reward) ?? -Infinity;
  if (state.order === "high") found.sort((a, b) => value(b) - value(a) || a - b);
  if (state.order === "low") found.sort((a, b) => value(a) - value(b) || a - b);
  if (state.order === "long") found.sort((a, b) => length[b] - length[a] || a - b);
  return found;
}

const rowName = (row) => `${samples.rows.rollout[row]}.${samples.rows.row[row]}`;

function chosenRow(among) {
  const known = among.find((row) => rowName(row) === state.sel);
  return known ?? among[0] ?? -1;
}

function showList() {
  const found = filteredRows();
  element("found").textContent = `${found.length.toLocaleString("en")} of ${samples.index.rows.toLocaleString("en")} completions`;
  const row = chosenRow(found);
  list.set(samples, found, makeScale(chosenQuantity()), row);
  if (row >= 0) state.sel = rowName(row);
  writeAddress();
  showCompletions();
}

// A row was chosen in the list; `enter` moves the focus to its tokens.
async function chooseRow(row, enter) {
  if (row === undefined) return;
  const isNew = state.sel !== rowName(row);
  state.sel = rowName(row);
  if (isNew) state.tok = "";
  writeAddress();
  if (!cards.some((card) => card.row === row)) await showCompletions();
  const card = cards.find((one) => one.row === row);
  markChosen(row);
  if (card && enter) card.focusToken(card.current);
  else if (card && isNew) card.root.scrollIntoView({ block: "nearest" });
}

function markChosen(row) {
  for (const card of cards) card.root.classList.toggle("chosen", cards.length > 1 && card.row === row);
}

// The address names another completion.
function followAddress() {
  list.mark(list.rows.indexOf(chosenRow(list.rows)));
  showCompletions();
}

function rowsOfGroup(row) {
  const { rollout, group } = samples.rows;
  const members = [];
  for (let other = row; other >= 0 && rollout[other] === rollout[row] && group[other] === group[row]; other--) members.unshift(other);
  for (let other = row + 1; other < samples.index.rows && rollout[other] === rollout[row] && group[other] === group[row]; other++) members.push(other);
  return members;
}

async function showCompletions() {
  const turn = ++drawing;
  const row = list.chosen >= 0 ? list.rows[list.chosen] : -1;
  for (const view of ["one", "group"]) element(`view-${view}`).setAttribute("aria-pressed", String(state.view === view));
  const box = element("cards");
  box.classList.toggle("many", state.view === "group");
  if (row < 0) {
    cards = [];
    element("prompt").replaceChildren();
    box.replaceChildren(make("p", "empty", "No completion fits the filters."));
    drawLegend(element("legend"), currentScale());
    return;
  }
  const members = state.view === "group" ? inOrder(rowsOfGroup(row)) : [row];
  const scale = makeScale(chosenQuantity());
  const made = members.map((member) => new Card(samples, member));
  await Promise.all(made.map((card) => card.open(scale, observer)));
  if (turn !== drawing) return;
  cards = made;
  markChosen(row);
  box.replaceChildren(...cards.map((card) => card.root));
  box.scrollTop = 0;
  showPrompt(row, members);
  if (state.range === "view") await recolorCards(currentScale());
  drawLegend(element("legend"), cards[0].scale);
  const place = Number(state.tok);
  const card = cards.find((one) => one.row === row);
  if (state.tok !== "" && card && place < card.length) {
    card.setCurrent(place);
    card.span(place).scrollIntoView({ block: "nearest" });
    showToken(card, place);
  } else showNothing();
}

function showPrompt(row, members) {
  const { rows } = samples;
  const box = element("prompt");
  const line = make("p", "facts");
  const size = PAGE.group_sizes[samples.run];
  const all = rowsOfGroup(row).length;
  const fact = (label, value) => {
    const item = make("span", "fact");
    item.append(make("span", "what", label), make("strong", "", value));
    line.append(item);
  };
  fact("step", String(rows.step[row]));
  fact("generation batch", String(rows.rollout[row]));
  fact("group", `${rows.group[row]}${size && all < size ? ` (${all} of ${size} recorded)` : ""}`);
  if (rows.updates[row] !== null) fact("updates so far", String(rows.updates[row]));
  if (members.length > 1) {
    const rewards = members.map((member) => rows.reward[member]).filter((value) => value !== null);
    const mean = rewards.reduce((sum, value) => sum + value, 0) / rewards.length;
    fact("mean reward of the group", rounded(mean, 4));
  }
  const prompt = make("div", "prompt-text");
  prompt.dir = "auto";
  prompt.tabIndex = 0;
  prompt.setAttribute("role", "region");
  prompt.setAttribute("aria-label", "Prompt");
  const text = make("span");
  fillToken(text, rows.prompts[rows.prompt[row]], null);
  prompt.append(text);
  box.replaceChildren(line, prompt);
}

async function recolorCards(scale) {
  await Promise.all(cards.map((card) => card.recolor(scale)));
}

async function recolor() {
  if (!samples) return;
  list.recolor(makeScale(chosenQuantity()));
  if (!cards.length) return drawLegend(element("legend"), currentScale());
  await recolorCards(makeScale(chosenQuantity()));
  if (state.range === "view") await recolorCards(currentScale());
  drawLegend(element("legend"), cards[0].scale);
  if (shownPlace) showToken(shownPlace.card, shownPlace.place);
}

// Tokens: hover and focus show their numbers, arrow keys move.

function tokenAt(target) {
  const span = target.closest?.(".t");
  const root = span?.closest(".completion");
  return root ? { card: root.card, place: span.place } : null;
}

function listenToTokens() {
  const box = element("cards");
  box.addEventListener("pointerover", (event) => {
    const at = tokenAt(event.target);
    if (at) showToken(at.card, at.place);
  });
  box.addEventListener("pointerleave", () => {
    const at = document.activeElement && tokenAt(document.activeElement);
    if (at) showToken(at.card, at.place);
  });
  box.addEventListener("click", (event) => {
    const at = tokenAt(event.target);
    if (at && getSelection().isCollapsed) at.card.focusToken(at.place);
  });
  box.addEventListener("focusin", (event) => {
    const at = tokenAt(event.target);
    if (!at) return;
    at.card.setCurrent(at.place);
    state.tok = String(at.place);
    state.sel = rowName(at.card.row);
    writeAddress();
    list.mark(list.rows.indexOf(at.card.row));
    markChosen(at.card.row);
    showToken(at.card, at.place);
    speak(at.card, at.place);
  });
  box.addEventListener("keydown", (event) => {
    const at = tokenAt(event.target);
    if (!at || event.ctrlKey || event.metaKey || event.altKey) return;
    const { card, place } = at;
    if (event.shiftKey && (event.key === "ArrowRight" || event.key === "ArrowLeft")) {
      event.preventDefault();
      const next = cards[cards.indexOf(card) + (event.key === "ArrowRight" ? 1 : -1)];
      next?.focusToken(place);
      return;
    }
    const forward = getComputedStyle(card.span(place)).direction === "rtl" ? -1 : 1;
    const moves = {
      ArrowRight: () => place + forward,
      ArrowLeft: () => place - forward,
      ArrowDown: () => card.neighbourLine(place, 1),
      ArrowUp: () => card.neighbourLine(place, -1),
      Home: () => 0,
      End: () => card.length - 1,
    };
    if (event.key in moves) {
      event.preventDefault();
      card.focusToken(moves[event.key]());
    } else if (event.key === "Escape") element("list").focus();
  });
}

// For screen readers: the chosen quantity of the token that has the focus; the panel holds the rest.
function speak(card, place) {
  const { quantity } = card.scale;
  const value = card.values[place];
  const said = quantity.kind === "discrete" ? quantity.values.find((one) => one.value === value)?.text : `${number(value)} ${quantity.unit}`;
  element("spoken").textContent = `${quantity.label} ${said ?? "not recorded"}`;
}

function showNothing() {
  shownPlace = null;
  element("panel-body").replaceChildren(make("p", "empty", "Point at a token, or move to one with the keyboard."));
}

async function showToken(card, place) {
  shownPlace = { card, place };
  const own = card.samples;
  const names = PAGE.quantities.filter((quantity) => own.has(quantity));
  const values = await Promise.all(names.map((quantity) => own.quantity(card.row, quantity)));
  if (shownPlace?.card !== card || shownPlace.place !== place) return;
  const token = card.tokens[place];
  const text = own.vocabulary.texts[token];
  const head = make("div", "panel-token");
  const shown = make("bdi", "t big");
  fillToken(shown, text, own.vocabulary.shown[token]);
  const paint = card.scale.paint(card.values[place]);
  if (paint) {
    shown.style.backgroundColor = paint.back;
    shown.style.color = paint.ink;
  }
  head.append(shown);
  const where = make("p", "where", `token ${place + 1} of ${card.length}, id ${own.vocabulary.ids[token]}, row ${own.rows.row[card.row]}`);
  const raw = make("p", "raw");
  raw.append(make("code", "", JSON.stringify(text)));
  const points = make("span", "points", codePoints(text.slice(0, 8)));
  raw.append(points);
  const table = make("dl", "values");
  names.forEach((quantity, i) => {
    const value = values[i][place];
    const said = quantity.kind === "discrete" && !Number.isNaN(value) ? quantity.values.find((one) => one.value === value)?.text : undefined;
    const line = make("div", quantity.name === state.q ? "active" : "");
    const label = make("dt", "", quantity.label);
    label.title = quantity.meaning;
    const shownValue = make("dd", "", said ?? number(value));
    shownValue.dataset.quantity = quantity.name;
    if (quantity.unit && !Number.isNaN(value)) shownValue.append(make("span", "unit", ` ${quantity.unit}`));
    line.append(label, shownValue);
    table.append(line);
  });
  element("panel-body").replaceChildren(head, where, raw, table);
}
