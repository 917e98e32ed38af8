// The list of completions: only the rows on the screen are in the document.

const ROW_HEIGHT = 62;

class CompletionList {
  constructor(onChoose) {
    this.box = element("list");
    this.inner = element("list-inner");
    this.onChoose = onChoose;
    this.rows = [];
    this.shown = new Map();
    this.spare = [];
    this.chosen = -1;
    let due = false;
    const later = () => {
      if (due) return;
      due = true;
      requestAnimationFrame(() => {
        due = false;
        this.draw();
      });
    };
    this.box.addEventListener("scroll", later, { passive: true });
    new ResizeObserver(later).observe(this.box);
    this.box.addEventListener("click", (event) => {
      const row = event.target.closest(".entry");
      if (row) this.choose(row.place);
    });
    this.box.addEventListener("keydown", (event) => this.#key(event));
  }

  #key(event) {
    const page = Math.max(Math.floor(this.box.clientHeight / ROW_HEIGHT) - 1, 1);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -this.rows.length, End: this.rows.length };
    if (event.key in moves) {
      event.preventDefault();
      this.choose(Math.min(Math.max(this.chosen + moves[event.key], 0), this.rows.length - 1));
    } else if (event.key === "Enter") {
      event.preventDefault();
      this.onChoose(this.rows[this.chosen], true);
    }
  }

  // Show other rows, with one of them chosen where it is among them.
  set(samples, rows, scale, row) {
    Object.assign(this, { samples, rows, scale });
    this.inner.style.height = `${rows.length * ROW_HEIGHT}px`;
    for (const entry of this.shown.values()) this.#release(entry);
    this.shown.clear();
    this.chosen = rows.indexOf(row);
    if (this.chosen >= 0) this.reveal();
    this.draw();
  }

  recolor(scale) {
    this.scale = scale;
    for (const entry of this.shown.values()) this.#strip(entry);
  }

  choose(place) {
    if (!this.rows.length || place < 0) return;
    this.mark(place);
    this.onChoose(this.rows[place], false);
  }

  mark(place) {
    if (place < 0 || place === this.chosen) return;
    this.chosen = place;
    this.reveal();
    this.draw();
  }

  reveal() {
    const top = this.chosen * ROW_HEIGHT;
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    else if (top + ROW_HEIGHT > this.box.scrollTop + this.box.clientHeight) this.box.scrollTop = top + ROW_HEIGHT - this.box.clientHeight;
  }

  draw() {
    const first = Math.max(Math.floor(this.box.scrollTop / ROW_HEIGHT) - 3, 0);
    const last = Math.min(Math.ceil((this.box.scrollTop + this.box.clientHeight) / ROW_HEIGHT) + 3, this.rows.length);
    for (const [place, entry] of this.shown) {
      if (place < first || place >= last) {
        this.#release(entry);
        this.shown.delete(place);
      }
    }
    for (let place = first; place < last; place++) {
      if (!this.shown.has(place)) this.shown.set(place, this.#entry(place));
      const entry = this.shown.get(place);
      const chosen = place === this.chosen;
      entry.classList.toggle("chosen", chosen);
      entry.setAttribute("aria-selected", String(chosen));
    }
    if (this.shown.has(this.chosen)) this.box.setAttribute("aria-activedescendant", `entry-${this.chosen}`);
    else this.box.removeAttribute("aria-activedescendant");
  }

  #release(entry) {
    entry.remove();
    this.spare.push(entry);
  }

  #entry(place) {
    const entry = this.spare.pop() ?? this.#made();
    const { rows } = this.samples;
    const row = this.rows[place];
    entry.place = place;
    entry.id = `entry-${place}`;
    entry.setAttribute("aria-posinset", place + 1);
    entry.setAttribute("aria-setsize", this.rows.length);
    entry.style.transform = `translateY(${place * ROW_HEIGHT}px)`;
    const advantage = rows.advantage[row];
    entry.parts.where.textContent = `step ${rows.step[row]} · group ${rows.group[row]} · row ${rows.row[row]}`;
    entry.parts.reward.textContent = rounded(rows.reward[row]);
    entry.parts.reward.className = `pill ${advantage > 0 ? "plus" : advantage < 0 ? "minus" : ""}`;
    entry.parts.text.textContent = rows.head[row].replace(/\s+/gu, " ").replace(new RegExp(HIDDEN.source, "gu"), "�");
    this.#strip(entry);
    this.inner.append(entry);
    return entry;
  }

  #made() {
    const entry = make("div", "entry");
    entry.setAttribute("role", "option");
    const line = make("div", "entry-line");
    const parts = { where: make("span", "where"), reward: make("span", "pill"), text: make("bdi", "head"), strip: make("canvas", "strip") };
    parts.strip.width = 300;
    parts.strip.height = 1;
    parts.strip.setAttribute("aria-hidden", "true");
    line.append(parts.where, parts.reward);
    entry.append(line, parts.text, parts.strip);
    entry.parts = parts;
    return entry;
  }

  async #strip(entry) {
    const { samples, scale } = this;
    const row = this.rows[entry.place];
    const values = await samples.quantity(row, scale.quantity);
    if (this.samples === samples && this.scale === scale && this.rows[entry.place] === row) drawStrip(entry.parts.strip, values, scale);
  }
}
