// Colour of a value. Scales are tables of 256 colours; text on them is black or white, whichever contrasts more.

const STEPS = 256;

function darkMode() {
  const chosen = document.documentElement.dataset.theme;
  return chosen === "dark" || (chosen !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
}

function themeColors() {
  return PAGE.colors[darkMode() ? "dark" : "light"];
}

function parseColor(text) {
  return [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
}

function luminance([r, g, b]) {
  const linear = (part) => (part / 255 <= 0.04045 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4);
  return 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
}

function inkOn(color) {
  return luminance(color) > Math.sqrt(1.05 * 0.05) - 0.05 ? "#000000" : "#ffffff";
}

const css = (color) => `rgb(${color.map(Math.round).join(" ")})`;

function colorTable(stops) {
  const parsed = stops.map(parseColor);
  const table = [];
  for (let i = 0; i < STEPS; i++) {
    const place = (i / (STEPS - 1)) * (parsed.length - 1);
    const low = Math.min(Math.floor(place), parsed.length - 2);
    const color = parsed[low].map((part, c) => Math.round(part + (parsed[low + 1][c] - part) * (place - low)));
    table.push({ back: css(color), ink: inkOn(color), color });
  }
  return table;
}

// A scale: paint(value) gives {back, ink, color} or null for a value without colour.
function makeScale(quantity, low = quantity.low, high = quantity.high) {
  const colors = themeColors();
  if (quantity.kind === "discrete") {
    const paints = new Map();
    for (const swatch of quantity.values) {
      if (swatch.color) {
        const color = parseColor(colors.palette[swatch.color]);
        paints.set(swatch.value, { back: css(color), ink: inkOn(color), color });
      }
    }
    return { quantity, colors, paint: (value) => paints.get(value) ?? null, weight: (value) => (paints.has(value) ? 1 : 0) };
  }
  const table = colorTable(colors[quantity.kind]);
  const measure = quantity.log ? Math.log : (value) => value;
  const start = measure(low);
  const width = measure(high) - start;
  const share = (value) => {
    if (quantity.log && value <= 0) return 0;
    const at = Math.min(Math.max((measure(value) - start) / width, 0), 1);
    return quantity.reverse ? 1 - at : at;
  };
  return {
    quantity,
    colors,
    low,
    high,
    table,
    paint: (value) => (Number.isNaN(value) ? null : table[Math.round(share(value) * (STEPS - 1))]),
    weight: (value) => {
      if (Number.isNaN(value)) return -1;
      return quantity.kind === "diverging" ? Math.abs(share(value) - 0.5) * 2 : share(value);
    },
  };
}

// Range of what is shown: as the run's range is found, without two percent at either end.
function rangeOf(quantity, parts) {
  const all = [];
  for (const part of parts) {
    for (const value of part) if (Number.isFinite(value) && !(quantity.log && value <= 0)) all.push(value);
  }
  if (!all.length || quantity.kind === "discrete") return [quantity.low, quantity.high];
  all.sort((a, b) => a - b);
  const at = (share) => all[Math.min(Math.max(Math.round(share * (all.length - 1)), 0), all.length - 1)];
  let [low, high] = [at(0.02), at(0.98)];
  if (quantity.kind === "diverging" && quantity.log) {
    const half = Math.max(Math.abs(Math.log(low / quantity.centre)), Math.abs(Math.log(high / quantity.centre)), 1e-3);
    return [quantity.centre * Math.exp(-half), quantity.centre * Math.exp(half)];
  }
  if (quantity.kind === "diverging") {
    const half = Math.max(Math.abs(low - quantity.centre), Math.abs(high - quantity.centre), 1e-6);
    return [quantity.centre - half, quantity.centre + half];
  }
  if (quantity.reverse) high = 0;
  if (low > 0 && low < 0.1 * high) low = 0;
  if (low >= high) low = high - 1e-3 * Math.max(Math.abs(high), 1);
  return [low, high];
}

function drawLegend(box, scale) {
  box.replaceChildren();
  const { quantity } = scale;
  const part = (className, text) => {
    const element = document.createElement("span");
    element.className = className;
    if (text !== undefined) element.textContent = text;
    box.append(element);
    return element;
  };
  if (quantity.kind === "discrete") {
    for (const swatch of quantity.values) {
      const element = part("swatch-text", swatch.text);
      const paint = scale.paint(swatch.value);
      if (paint) {
        element.style.backgroundColor = paint.back;
        element.style.color = paint.ink;
      }
    }
    box.setAttribute("aria-label", `Scale of ${quantity.label}: ${quantity.values.map((swatch) => swatch.text).join(", ")}`);
    return;
  }
  const order = quantity.reverse ? [...scale.table].reverse() : scale.table;
  const bar = part("bar");
  bar.style.background = `linear-gradient(to right, ${order.filter((_, i) => i % 15 === 0).map((paint) => paint.back).join(", ")})`;
  const middle = quantity.log ? Math.sqrt(scale.low * scale.high) : (scale.low + scale.high) / 2;
  for (const [name, value] of [["low", scale.low], ["middle", middle], ["high", scale.high]]) part(`tick ${name}`, rounded(value));
  part("unit", quantity.unit + (quantity.log ? (quantity.unit ? ", log scale" : "log scale") : ""));
  box.title = quantity.meaning;
  box.setAttribute("aria-label", `Scale of ${quantity.label} ${quantity.unit}: ${rounded(scale.low)} to ${rounded(scale.high)}${quantity.log ? ", logarithmic" : ""}`);
}
