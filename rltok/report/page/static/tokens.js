// Completions token by token. Texts become text nodes and nothing else: they are what a model wrote.

const BLOCK_TOKENS = 160;
const LONGEST_BLOCK = 480;
const STRIP_WIDTH = 600;

const SPECIAL = /^(<[^<>\s]{1,60}>|\[[A-Z_]{2,20}\])$/u;
// Characters that are invisible or reorder text; the joiners stay where letters or signs need them.
const HIDDEN = /(?![\n\t\u0600-\u0605\u06dd\u200c\u200d])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Co}\p{Cs}]/u;
const PIECES = new RegExp(`(\\n| +|\\t+|[\\u00a0\\u2000-\\u200a\\u202f\\u3000]+|${HIDDEN.source})`, "u");
const LONE_JOINER = /^[\u200c\u200d]+$/u;

function boxed(text) {
  return make("span", "boxed", text);
}

function codePoints(text) {
  return Array.from(text, (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`).join(" ");
}

function fillToken(span, text, shown) {
  if (shown !== null) {
    span.classList.add("bytes");
    span.textContent = shown;
    span.dir = "ltr";
    return;
  }
  if (text === "") {
    span.append(boxed("empty"));
    return;
  }
  if (SPECIAL.test(text)) span.classList.add("special");
  if (LONE_JOINER.test(text)) {
    span.append(boxed(codePoints(text)));
    return;
  }
  if (!PIECES.test(text)) {
    span.textContent = text;
    return;
  }
  for (const piece of text.split(PIECES)) {
    if (!piece) continue;
    if (piece === "\n") span.append(space(piece, "↵", "newline"));
    else if (/^ +$/u.test(piece)) span.append(space(piece, "·".repeat(piece.length), "space"));
    else if (/^\t+$/u.test(piece)) span.append(space(piece, "→", "space"));
    else if (/^[\u00a0\u2000-\u200a\u202f\u3000]+$/u.test(piece)) span.append(space(piece, "␣".repeat(piece.length), "space"));
    else if (HIDDEN.test(piece)) span.append(boxed(piece === "\r" ? "␍" : codePoints(piece)));
    else span.append(document.createTextNode(piece));
  }
}

// White space stays itself, for copying and line breaks; the style draws its sign over it.
function space(text, sign, className) {
  const made = make("i", className, text);
  made.dataset.sign = sign;
  return made;
}

// One completion on the page.
class Card {
  constructor(samples, row, options) {
    Object.assign(this, { samples, row, options });
    this.length = samples.rows.length[row];
    this.root = make("article", "completion");
    this.root.card = this;
    this.strip = make("canvas", "strip");
    this.strip.height = 1;
    this.strip.width = STRIP_WIDTH;
    this.strip.setAttribute("aria-hidden", "true");
    this.body = make("div", "body");
    this.body.setAttribute("role", "group");
    this.body.setAttribute("aria-label", `Tokens of row ${samples.rows.row[row]}`);
    this.root.append(this.#head(), this.strip, this.body);
    this.strip.addEventListener("click", (event) => {
      const box = this.strip.getBoundingClientRect();
      this.focusToken(Math.floor(((event.clientX - box.left) / box.width) * this.length));
    });
    this.blocks = [];
    this.current = 0;
  }

  #head() {
    const { rows } = this.samples;
    const head = make("header", "completion-head");
    const title = make("h3", "", `Row ${rows.row[this.row]}`);
    const facts = make("p", "facts");
    const fact = (label, value, className) => {
      const item = make("span", className ? `fact ${className}` : "fact");
      if (label) item.append(make("span", "what", label));
      item.append(make("strong", "", value));
      facts.append(item);
    };
    fact("reward", rounded(rows.reward[this.row], 4));
    const advantage = rows.advantage[this.row];
    fact("advantage", rounded(advantage, 4), advantage > 0 ? "plus" : advantage < 0 ? "minus" : "");
    for (const name of this.samples.index.rewards) fact(name, rounded(rows.rewards[name][this.row], 4));
    fact("tokens", String(this.length));
    const ended = rows.ended[this.row];
    if (ended !== null) fact("", ended ? "ended" : "cut off");
    head.append(title, facts);
    return head;
  }

  async open(scale, observer) {
    const { samples, row } = this;
    const names = ["in_loss", "kept", "forced", "clipped"];
    const [tokens, ...marks] = await Promise.all([samples.column(row, "tokens"), ...names.map((name) => samples.column(row, name))]);
    this.tokens = tokens;
    this.marks = Object.fromEntries(names.map((name, i) => [name, marks[i]]));
    this.values = await samples.quantity(row, scale.quantity);
    this.scale = scale;
    this.#cut();
    if (!this.length) this.body.append(make("p", "empty", "no tokens"));
    this.blocks.slice(0, 2).forEach((block) => this.fill(block));
    this.blocks.slice(2).forEach((block) => observer.observe(block.root));
    this.drawStrip();
    return this;
  }

  // Blocks end at line ends where there are some, so that a block is a whole number of lines.
  #cut() {
    const { texts } = this.samples.vocabulary;
    let start = 0;
    for (let i = 0; i < this.length; i++) {
      const size = i + 1 - start;
      const lineEnd = texts[this.tokens[i]].endsWith("\n");
      if ((lineEnd && size >= BLOCK_TOKENS) || size >= LONGEST_BLOCK || i + 1 === this.length) {
        const root = make("div", "block");
        root.dir = "auto";
        root.style.minHeight = `${Math.ceil(size / 14) * 1.75}em`;
        const block = { root, start, end: i + 1, filled: false };
        root.block = block;
        this.blocks.push(block);
        this.body.append(root);
        start = i + 1;
      }
    }
  }

  fill(block) {
    if (block.filled) return;
    const { texts, shown } = this.samples.vocabulary;
    const part = document.createDocumentFragment();
    for (let i = block.start; i < block.end; i++) {
      const span = make("span", "t");
      const token = this.tokens[i];
      fillToken(span, texts[token], shown[token]);
      this.#mark(span, i);
      this.#paint(span, i);
      span.tabIndex = i === this.current ? 0 : -1;
      span.place = i;
      part.append(span);
    }
    block.root.append(part);
    block.root.style.minHeight = "";
    block.filled = true;
  }

  #mark(span, i) {
    const { in_loss: inLoss, kept, forced, clipped } = this.marks;
    if (inLoss?.[i] === 0 || kept?.[i] === 0) span.classList.add("out");
    if (forced?.[i] === 1) span.classList.add("forced");
    if (clipped?.[i] === 1) span.classList.add("clip-high");
    if (clipped?.[i] === -1) span.classList.add("clip-low");
  }

  #paint(span, i) {
    const paint = this.scale.paint(this.values[i]);
    span.style.backgroundColor = paint ? paint.back : "";
    span.style.color = paint ? paint.ink : "";
  }

  async recolor(scale) {
    this.values = await this.samples.quantity(this.row, scale.quantity);
    this.scale = scale;
    for (const block of this.blocks) {
      if (block.filled) for (const span of block.root.children) this.#paint(span, span.place);
    }
    this.drawStrip();
  }

  drawStrip() {
    drawStrip(this.strip, this.values, this.scale);
  }

  span(i) {
    const block = this.blocks.find((one) => i >= one.start && i < one.end);
    if (!block) return null;
    this.fill(block);
    return block.root.children[i - block.start];
  }

  setCurrent(i) {
    if (i === this.current) return;
    const old = this.span(this.current);
    if (old) old.tabIndex = -1;
    this.current = i;
    const span = this.span(i);
    if (span) span.tabIndex = 0;
  }

  focusToken(i) {
    if (!this.length) return;
    this.setCurrent(Math.min(Math.max(i, 0), this.length - 1));
    const span = this.span(this.current);
    span.focus({ preventScroll: true });
    span.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  // The token above or below on the page.
  neighbourLine(i, direction) {
    const from = this.span(i).getBoundingClientRect();
    const middle = (from.left + from.right) / 2;
    let best = null;
    let line = null;
    for (let j = i + direction; j >= 0 && j < this.length && Math.abs(j - i) < 2 * LONGEST_BLOCK; j += direction) {
      const box = this.span(j).getBoundingClientRect();
      const beyond = direction > 0 ? box.top > from.top + from.height / 2 : box.top < from.top - from.height / 2;
      if (!beyond) continue;
      if (line === null) line = box.top;
      if (Math.abs(box.top - line) > from.height / 2) break;
      const distance = Math.abs((box.left + box.right) / 2 - middle);
      if (best === null || distance < best.distance) best = { j, distance };
    }
    return best ? best.j : i;
  }
}

// A whole completion in one row of pixels; a pixel that stands for several tokens shows the most marked of them.
function drawStrip(canvas, values, scale) {
  const context = canvas.getContext("2d");
  const { width } = canvas;
  const image = context.createImageData(width, 1);
  const count = values.length;
  for (let x = 0; x < width && count; x++) {
    const first = Math.floor((x * count) / width);
    const last = Math.max(Math.floor(((x + 1) * count) / width), first + 1);
    let chosen = values[first];
    for (let i = first + 1; i < last; i++) if (scale.weight(values[i]) > scale.weight(chosen)) chosen = values[i];
    const paint = scale.paint(chosen);
    if (paint) image.data.set([...paint.color, 255], 4 * x);
  }
  context.putImageData(image, 0, 0);
}
