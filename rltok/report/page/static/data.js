// Reading the data blocks: base64 -> gzip -> planes of bytes -> numbers. Every column is decoded when first shown.

const PAGE = JSON.parse(document.getElementById("page").textContent);
const NOT_KNOWN = -128;

async function unpack(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function unpackJson(text) {
  return JSON.parse(new TextDecoder().decode(await unpack(text)));
}

// Floats: three planes of zigzag digits, one of the decimal exponent (biased by 64; 253 to 255 say -inf, inf, NaN).
async function unpackFloats(text) {
  const bytes = await unpack(text);
  const count = bytes.length / 4;
  const values = new Float64Array(count);
  for (let i = 0; i < count; i++) {
    const power = bytes[3 * count + i];
    if (power >= 253) {
      values[i] = power === 255 ? NaN : power === 254 ? Infinity : -Infinity;
      continue;
    }
    const zigzag = bytes[i] | (bytes[count + i] << 8) | (bytes[2 * count + i] << 16);
    const digits = zigzag & 1 ? -(zigzag >> 1) : zigzag >> 1;
    const exponent = power - 64;
    if (exponent >= 0) values[i] = digits * 10 ** exponent;
    else values[i] = exponent >= -22 ? digits / 10 ** -exponent : Number(`${digits}e${exponent}`);
  }
  return values;
}

async function unpackSmall(text) {
  return new Int8Array((await unpack(text)).buffer);
}

async function unpackCounts(text, count) {
  const bytes = await unpack(text);
  const values = new Uint32Array(count);
  for (let plane = 0; plane * count < bytes.length; plane++) {
    for (let i = 0; i < count; i++) values[i] += bytes[plane * count + i] * 2 ** (8 * plane);
  }
  return values;
}

const SMALL = new Set(["in_loss", "kept", "forced", "clipped", "mark"]);
const QUANTITIES = new Map(PAGE.quantities.map((quantity) => [quantity.name, quantity]));

// The completions of one run.
class Samples {
  constructor(run) {
    this.run = run;
    this.index = PAGE.samples[run];
    this.columns = new Set(this.index.columns);
    this.blocks = new Map();
    this.decoded = new Map();
  }

  async open() {
    if (!this.rows) {
      const [rows, vocabulary] = await Promise.all([unpackJson(this.index.table), unpackJson(this.index.vocabulary)]);
      this.vocabulary = vocabulary;
      this.chunkOf = [];
      this.offset = [];
      this.chunkTokens = [];
      let at = 0;
      for (let row = 0; row < this.index.rows; row++) {
        if (this.index.chunks[this.chunkTokens.length] === row) {
          this.chunkTokens.push(0);
          at = 0;
        }
        const chunk = this.chunkTokens.length - 1;
        this.chunkOf.push(chunk);
        this.offset.push(at);
        at += rows.length[row];
        this.chunkTokens[chunk] = at;
      }
      this.rows = rows;
    }
    return this;
  }

  has(quantity) {
    const needed = quantity.of.length ? quantity.of : [quantity.name];
    return needed.every((name) => this.columns.has(name) || name === "advantage");
  }

  #column(chunk, name) {
    const key = `${chunk}/${name}`;
    let found = this.decoded.get(key);
    if (!found) {
      if (!this.blocks.has(chunk)) {
        const element = document.getElementById(`chunk-${this.run}-${chunk}`);
        this.blocks.set(chunk, JSON.parse(element.textContent));
      }
      const text = this.blocks.get(chunk)[name];
      if (text === undefined) found = Promise.resolve(null);
      else if (name === "tokens") found = unpackCounts(text, this.chunkTokens[chunk]);
      else found = SMALL.has(name) ? unpackSmall(text) : unpackFloats(text);
      this.decoded.set(key, found);
    }
    return found;
  }

  // Values of a recorded column at the tokens of a row; null where the row has none.
  async column(row, name) {
    const values = await this.#column(this.chunkOf[row], name);
    return values && values.subarray(this.offset[row], this.offset[row] + this.rows.length[row]);
  }

  // Values of a quantity at the tokens of a row, NaN where there is none.
  async quantity(row, quantity) {
    const length = this.rows.length[row];
    const empty = () => new Float64Array(length).fill(NaN);
    if (quantity.name === "credit_share") {
      const credit = await this.column(row, "credit");
      const advantage = this.rows.advantage[row];
      return credit && advantage ? credit.map((value) => value / advantage) : empty();
    }
    if (quantity.name === "mismatch") {
      const [old, sampler] = await Promise.all([this.column(row, "old_logp"), this.column(row, "sampler_logp")]);
      return old && sampler ? old.map((value, i) => value - sampler[i]) : empty();
    }
    const values = await this.column(row, quantity.name);
    if (!values) return empty();
    return SMALL.has(quantity.name) ? Float64Array.from(values, (value) => (value === NOT_KNOWN ? NaN : value)) : values;
  }

  reward(row, name) {
    return name ? this.rows.rewards[name][row] : this.rows.reward[row];
  }
}

// Five significant digits, as many as are stored.
function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "not recorded";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  return String(Number(value.toPrecision(5))).replace("-", "−");
}

function rounded(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "-";
  return String(Number(value.toPrecision(digits))).replace("-", "−");
}
