// Curves: one chart per panel, one colour per run, one dash per metric of a panel; the runs share all axes.

const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3], [12, 4], [1, 4]];
const curveData = [];
const charts = [];

const runColor = (run) => getComputedStyle(document.documentElement).getPropertyValue(`--run-${run % 8}`).trim();
const cssColor = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

async function openCurves() {
  for (const run of PAGE.curves.runs) {
    const values = run.block ? await unpackFloats(run.block) : new Float64Array(0);
    const metrics = new Map();
    run.metrics.forEach((name, i) => metrics.set(name, values.subarray(i * run.points, (i + 1) * run.points)));
    curveData.push(metrics);
  }
  const { axes, metrics } = PAGE.curves;
  for (const axis of axes) option(element("axis"), axis.key, axis.label);
  for (const name of metrics) option(element("metric"), name, name);
  DEFAULTS.x = axes.some((axis) => axis.key === "generated") ? "generated" : "step";
  if (!axes.some((axis) => axis.key === state.x)) state.x = DEFAULTS.x;
  bind(element("axis"), "x");
  bind(element("smooth"), "smooth");
  showRunToggles();
  element("metric").addEventListener("change", () => {
    const name = element("metric").value;
    const added = state.add ? state.add.split(",") : [];
    if (name && !added.includes(name)) setState({ add: [...added, name].join(",") });
    element("metric").value = "";
  });
  const smoothing = () => (element("smooth-value").textContent = Number(state.smooth) ? Number(state.smooth).toFixed(2) : "off");
  watch(["smooth"], smoothing);
  smoothing();
  watch(["x", "smooth", "hide", "add"], drawCharts);
  watch(["theme"], () => charts.forEach((chart) => chart.redraw(false, true)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach((chart) => chart.redraw(false, true)));
  let width = 0;
  new ResizeObserver(() => {
    if (Math.abs(element("charts").clientWidth - width) < 2) return;
    width = element("charts").clientWidth;
    for (const chart of charts) chart.setSize({ width: chart.root.parentElement.clientWidth, height: chart.height });
  }).observe(element("charts"));
  drawCharts();
}

function hiddenRuns() {
  return new Set(state.hide ? state.hide.split(",").map(Number) : []);
}

function showRunToggles() {
  const box = element("run-toggles");
  if (PAGE.runs.length < 2) return;
  PAGE.runs.forEach((name, run) => {
    const label = make("label", `run-${run % 8} toggle`);
    const check = make("input");
    check.type = "checkbox";
    check.checked = !hiddenRuns().has(run);
    check.addEventListener("change", () => {
      const hidden = hiddenRuns();
      if (check.checked) hidden.delete(run);
      else hidden.add(run);
      setState({ hide: [...hidden].sort((a, b) => a - b).join(",") });
    });
    label.append(check, make("span", "swatch"), make("bdi", "", name));
    box.append(label);
  });
}

function smoothed(values, weight) {
  if (!weight) return values;
  let mean = 0;
  let total = 0;
  return values.map((value) => {
    mean = mean * weight + value * (1 - weight);
    total = total * weight + 1 - weight;
    return mean / total;
  });
}

// The updates that share a rollout stand at one place of the axes that count tokens: there, their mean is drawn.
function onePerPlace(places, values) {
  const sums = new Map();
  for (let i = 0; i < values.length; i++) {
    if (!Number.isFinite(values[i]) || !Number.isFinite(places[i])) continue;
    const sum = sums.get(places[i]) ?? [0, 0];
    sums.set(places[i], [sum[0] + values[i], sum[1] + 1]);
  }
  return { x: [...sums.keys()], y: Array.from(sums.values(), ([sum, count]) => sum / count) };
}

function panelLines(panel, axis) {
  const lines = [];
  const hidden = hiddenRuns();
  curveData.forEach((metrics, run) => {
    if (hidden.has(run)) return;
    panel.series.forEach((series, dash) => {
      const values = metrics.get(series.metric);
      const places = metrics.get(axis.metric);
      if (!values || !places) return;
      const line = onePerPlace(places, values);
      if (line.x.length) lines.push({ run, dash, label: series.label, x: line.x, y: smoothed(line.y, Number(state.smooth)) });
    });
  });
  return lines;
}

function shortNumber(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${rounded(value / 1e9)} G`;
  if (size >= 1e6) return `${rounded(value / 1e6)} M`;
  if (size >= 1e4) return `${rounded(value / 1e3)} k`;
  return rounded(value, 4);
}

function drawCharts() {
  const box = element("charts");
  for (const chart of charts.splice(0)) chart.destroy();
  box.replaceChildren();
  const axis = PAGE.curves.axes.find((entry) => entry.key === state.x) ?? PAGE.curves.axes[0];
  const added = (state.add ? state.add.split(",") : []).filter((name) => PAGE.curves.metrics.includes(name));
  const extra = added.map((name) => ({ key: `add-${name}`, title: name, unit: "", note: "", series: [{ metric: name, label: name }], added: name }));
  for (const panel of [...PAGE.curves.panels, ...extra]) drawPanel(box, panel, axis);
}

function drawPanel(box, panel, axis) {
  const lines = panelLines(panel, axis);
  if (!lines.length && !panel.added) return;
  const figure = make("figure", "chart");
  const title = make("figcaption", "", panel.title);
  if (panel.unit) title.append(make("span", "unit", ` ${panel.unit}`));
  if (panel.note) title.title = panel.note;
  if (panel.added) {
    const remove = make("button", "remove", "remove");
    remove.type = "button";
    remove.addEventListener("click", () => setState({ add: state.add.split(",").filter((name) => name !== panel.added).join(",") }));
    title.append(remove);
  }
  const holder = make("div", "plot");
  const legend = make("ul", "key");
  figure.append(title, holder, legend);
  box.append(figure);
  if (!lines.length) {
    holder.append(make("p", "empty", "not logged on this axis"));
    return;
  }
  const data = lines.length > 1 ? uPlot.join(lines.map((line) => [line.x, line.y])) : [lines[0].x, lines[0].y];
  const several = PAGE.runs.length > 1;
  const outputs = lines.map((line) => {
    const entry = make("li", `run-${line.run % 8} dash-${line.dash % DASHES.length}`);
    entry.append(make("span", "sample"), make("bdi", "", several ? `${PAGE.runs[line.run]}${panel.series.length > 1 ? ` · ${line.label}` : ""}` : line.label));
    const value = make("output", "", shortNumber(line.y[line.y.length - 1]));
    entry.append(value);
    legend.append(entry);
    return value;
  });
  const few = data[0].length === 1;
  const axisLook = { stroke: () => cssColor("--soft"), grid: { stroke: () => cssColor("--line"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
  const chart = new uPlot(
    {
      width: holder.clientWidth || 400,
      height: 170,
      legend: { show: false },
      cursor: { sync: { key: "curves" }, y: false, points: { size: 6 } },
      padding: [8, 12, 0, 0],
      scales: { x: { time: false, range: few ? (_, low, high) => [low - 1, high + 1] : undefined } },
      axes: [
        { ...axisLook, size: 26, values: (_, ticks) => ticks.map(shortNumber) },
        { ...axisLook, size: 54, values: (_, ticks) => ticks.map(shortNumber) },
      ],
      series: [
        {},
        ...lines.map((line) => ({
          stroke: () => runColor(line.run),
          width: 1.6,
          dash: DASHES[line.dash % DASHES.length],
          spanGaps: true,
          points: { show: line.x.length < 40, size: 4 },
        })),
      ],
      hooks: {
        setCursor: [
          (plot) => {
            const at = plot.cursor.idx;
            lines.forEach((line, i) => {
              const value = at === null || at === undefined ? line.y[line.y.length - 1] : nearest(plot.data[i + 1], at);
              outputs[i].textContent = value === null ? "-" : shortNumber(value);
            });
          },
        ],
      },
    },
    data,
    holder,
  );
  chart.root.querySelector("canvas").setAttribute("role", "img");
  const spoken = lines.map((line) => `${PAGE.runs[line.run]} ${line.label}: first ${shortNumber(line.y[0])}, last ${shortNumber(line.y[line.y.length - 1])}`);
  chart.root.querySelector("canvas").setAttribute("aria-label", `${panel.title} over ${axis.label}. ${spoken.join("; ")}`);
  charts.push(chart);
}

// The value at a place, or the last one before it: runs log at different places.
function nearest(values, at) {
  for (let i = at; i >= 0; i--) if (values[i] !== null && values[i] !== undefined) return values[i];
  return null;
}
