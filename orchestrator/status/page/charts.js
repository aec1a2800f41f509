// The charts: from the steps' points to uPlot.
//
// Invariants:
// * The charts show what the points have. Where a source has nothing in a batch, its means are gaps, not zeros.
// * A chart is rebuilt only when the sources, the colours or the theme change; otherwise only its data is replaced.

const COLOURS = 8;
const DASH = [6, 4];

/** One chart: the id of its figure, and the series of one source: [field, how it is drawn]. */
const CHARTS = [
  { id: "chart-share", series: [["share/asked", "line"], ["share/handed", "dots"]], range: [0, 1] },
  { id: "chart-reward", series: [["raw_reward/mean", "line"], ["reward/upper", "edge"], ["reward/lower", "edge"]], band: true },
  { id: "chart-length", series: [["response_len/mean", "line"], ["response_len/max", "dash"]] },
  { id: "chart-wait", series: [["wait_s", "bars"]], whole: true },
  { id: "chart-buffer", series: [["buffer_groups", "line"], ["in_flight", "dash"]] },
  { id: "chart-staleness", series: [["staleness/mean", "line"], ["staleness/max", "dash"]] },
  { id: "chart-dropped", series: [["dropped", "line"]] },
];

/** Figures that mean something only where the source has groups in the batch. */
const OF_GROUPS = /^(raw_reward|response_len|staleness|reward)\//;

export class Charts {
  /** `at(point, source, field)` reads a figure of a point; `words` puts a number into words. */
  constructor(at, words) {
    this.at = at;
    this.words = words;
    this.names = [];
    this.hidden = new Set();
    this.plots = new Map();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.rebuild());
    new ResizeObserver(() => this.resize()).observe(document.getElementById("charts"));
  }

  /** The class that has a source's colour. */
  colour(name) {
    return `c${Math.max(0, this.names.indexOf(name)) % COLOURS}`;
  }

  draw(points, names) {
    const isNew = names.join("/") !== this.names.join("/");
    this.names = names;
    this.points = points;
    if (isNew || !this.plots.size) this.rebuild();
    else for (const chart of CHARTS) {
      const plot = this.plots.get(chart.id);
      plot.setData(this.data(chart));
      this.read(chart, plot);
    }
  }

  toggle(name) {
    if (!this.hidden.delete(name)) this.hidden.add(name);
    this.rebuild();
  }

  resize() {
    for (const [id, plot] of this.plots) plot.setSize(size(id));
  }

  rebuild() {
    if (!this.points) return;
    for (const plot of this.plots.values()) plot.destroy();
    this.plots.clear();
    for (const chart of CHARTS) {
      const place = document.querySelector(`#${chart.id} > div`);
      const plot = new uPlot(this.options(chart), this.data(chart), place);
      this.plots.set(chart.id, plot);
      place.plot = plot; // for tests and for the browser's console
      this.read(chart, plot);
    }
  }

  /** uPlot's columns: the steps, then the series of each source in turn. */
  data(chart) {
    const columns = this.series(chart).map(({ name, field }) => this.points.map((point) => this.figure(point, name, field)));
    return [this.points.map((point) => point.step), ...columns];
  }

  figure(point, name, field) {
    if (name === null) return point[field];
    if (field === "share/asked") return this.at(point, name, "weight") ?? null;
    const groups = this.at(point, name, "group_count") ?? null;
    if (field === "share/handed") {
      const total = this.names.reduce((sum, other) => sum + (this.at(point, other, "group_count") ?? 0), 0);
      return groups === null || !total ? null : groups / total;
    }
    if (OF_GROUPS.test(field) && !groups) return null;
    if (field.startsWith("reward/")) {
      const [mean, std, low, high] = ["mean", "std", "min", "max"].map((of) => this.at(point, name, `raw_reward/${of}`) ?? null);
      if (mean === null || std === null) return mean;
      return field === "reward/upper" ? Math.min(high, mean + std) : Math.max(low, mean - std);
    }
    return this.at(point, name, field) ?? null;
  }

  series(chart) {
    const of = chart.whole ? [null] : this.names;
    return of.flatMap((name) => chart.series.map(([field, style]) => ({ name, field, style })));
  }

  options(chart) {
    const style = getComputedStyle(document.documentElement);
    const colour = (variable) => style.getPropertyValue(variable).trim();
    const axis = { stroke: colour("--quiet"), grid: { stroke: colour("--grid"), width: 1 }, ticks: { stroke: colour("--grid"), width: 1 }, font: "11px system-ui, sans-serif" };
    const series = this.series(chart).map(({ name, field, style: look }) => {
      const stroke = name === null ? colour("--s0") : colour(`--s${this.names.indexOf(name) % COLOURS}`);
      return { label: name === null ? field : `${name} ${field}`, stroke, ...LOOKS[look](stroke), show: !this.hidden.has(name), spanGaps: true };
    });
    const bands = !chart.band ? [] : this.names.map((name, i) => ({
      series: [3 * i + 2, 3 * i + 3],
      fill: `${colour(`--s${i % COLOURS}`)}1c`,
    }));
    return {
      ...size(chart.id),
      legend: { show: false },
      cursor: { sync: { key: "steps" }, points: { show: false } },
      scales: { x: { time: false }, y: { range: (_, low, high) => span(low, high, chart.range) } },
      axes: [{ ...axis, size: 26, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 50000, 100000] }, { ...axis, size: 46 }],
      series: [{}, ...series],
      bands,
      hooks: { setCursor: [(plot) => this.read(chart, plot)] },
    };
  }

  /** Shows the values under the cursor in the figure's caption; without a cursor, those of the newest step. */
  read(chart, plot) {
    const output = document.querySelector(`#${chart.id} output`), at = plot.cursor.idx ?? this.points.length - 1;
    if (at < 0 || at >= plot.data[0].length) return void (output.textContent = "");
    const parts = new Map(); // by source: its lines and dashes, in this order
    this.series(chart).forEach(({ name, style }, i) => {
      const value = plot.data[i + 1][at];
      if (style === "edge" || value === null || value === undefined) return;
      parts.set(name, [...(parts.get(name) ?? []), this.words(value)]);
    });
    const said = [...parts].map(([name, values]) => `${name ?? ""} ${values.join(" / ")}`.trim());
    output.textContent = `step ${plot.data[0][at]}: ${said.join(" · ")}`;
  }
}

const LOOKS = {
  line: () => ({ width: 2, points: { show: false } }),
  dash: () => ({ width: 1, dash: DASH, points: { show: false } }),
  edge: () => ({ width: 0, points: { show: false } }),
  dots: (stroke) => ({ paths: () => null, points: { show: true, size: 4, width: 0, fill: stroke } }),
  bars: (stroke) => ({ width: 1, fill: stroke, paths: uPlot.paths.bars({ size: [0.8, 24] }), points: { show: false } }),
};

function size(id) {
  const place = document.querySelector(`#${id} > div`);
  return { width: Math.max(120, place.clientWidth), height: Math.max(100, place.clientHeight) };
}

/** The y range: it includes zero and is never empty. */
function span(low, high, fixed) {
  if (fixed) return fixed;
  if (low === null || high === null || low === undefined) return [0, 1];
  const from = low >= 0 ? 0 : low * 1.08, to = high > 0 ? high * 1.08 : 0;
  return from === to ? [0, 1] : [from, to];
}
