// The tables and figures: from a status object to elements.
//
// Invariants:
// * Text from the daemon becomes text nodes, never markup.
// * Every number taken from the status names its source: `data-path` is its place in the status, `data-value` the value
//   as JSON. A test compares all of them with `orchestrator status --json`.

import { bytes, clock, duration, number, percent } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
const STEPS_SHOWN = 10;
const STATE_CLASS = { up: "good", trial: "warn", updating: "warn", draining: "warn" };

/** An element with attributes and children (elements or texts). */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A span that shows the value at a path of the status, formatted by a function. */
function shown(status, path, words = number) {
  const value = path.reduce((inner, key) => inner?.[key], status);
  return make("span", { "data-path": JSON.stringify(path), "data-value": JSON.stringify(value ?? null) }, words(value));
}

function row(tag, cells) {
  const tr = make("tr");
  for (const [content, kind = ""] of cells) {
    const cell = make(tag, kind ? { class: kind } : {});
    cell.append(...(Array.isArray(content) ? content : [content]));
    tr.append(cell);
  }
  return tr;
}

function fill(table, head, rows, empty) {
  const body = rows.length ? rows.map((cells) => row("td", cells)) : [row("td", [[empty, "quiet text"]])];
  table.replaceChildren(...(rows.length ? [row("th", head)] : []), ...body);
}

/** The tiles under the headline; `rate` is tokens a second, null while unknown. */
export function figures(list, status, rate) {
  const sum = (of) => Object.values(status.sources).reduce((total, source) => total + of(source), 0);
  const slots = status.engines.reduce((total, engine) => total + engine.max_in_flight, 0);
  const tiles = [
    ["policy version", [shown(status, ["policy_version"])]],
    ["trainer waiting", [status.starvation.waiting ? duration(status.starvation.waiting_s ?? 0) : "no"]],
    ["requests in flight", [shown(status, ["generation", "in_flight"]), small(` of ${number(slots)}`)]],
    ["waiting for a slot", [shown(status, ["generation", "waiting"])]],
    ["groups in flight", [number(sum((s) => s.groups.in_flight)), small(` ${number(sum((s) => s.partial_groups))} partial`)]],
    ["groups buffered", [number(sum((s) => s.groups.buffered)), small(` ${bytes(sum((s) => s.buffered_bytes))}`)]],
    ["tokens a second", [rate === null ? "–" : number(Math.round(rate))]],
    ["log on disk", [shown(status, ["state", "written_bytes"], bytes), ...(status.state.backlog_bytes > 2 ** 20 ? [small(` +${bytes(status.state.backlog_bytes)}`)] : [])]],
  ];
  list.replaceChildren(...tiles.map(([name, content]) => make("div", {}, make("dt", {}, name), make("dd", {}, ...content))));
}

function small(text) {
  return make("small", {}, text);
}

/** Buffered and in flight groups against the bound, with a mark at the plan. */
function bar(source) {
  const { buffered, in_flight: flight } = source.groups;
  const most = Math.max(source.bound, source.wanted, buffered + flight, 1);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "bar");
  svg.setAttribute("viewBox", "0 0 100 14");
  svg.setAttribute("preserveAspectRatio", "none");
  const rect = (kind, from, to) => {
    const part = document.createElementNS(SVG, "rect");
    const place = { class: kind, x: (100 * from) / most, y: 2, width: (100 * (to - from)) / most, height: 10 };
    for (const [name, value] of Object.entries(place)) part.setAttribute(name, value);
    svg.append(part);
  };
  rect("bound", 0, source.bound);
  rect("ready", 0, buffered);
  rect("flight", buffered, buffered + flight);
  const mark = document.createElementNS(SVG, "line");
  const at = Math.min(99, Math.max(1, (100 * source.wanted) / most));
  for (const [name, value] of Object.entries({ class: "plan", x1: at, x2: at, y1: 0, y2: 14 })) mark.setAttribute(name, value);
  const title = document.createElementNS(SVG, "title");
  title.textContent = `${buffered} buffered, ${flight} in flight; the plan wants ${source.wanted}, the bound is ${source.bound} (${source.bound_by})`;
  svg.append(mark, title);
  return svg;
}

function remarks(source) {
  const said = ["paused", "exhausted"].filter((word) => source[word]);
  if (source.debt) said.push(`${number(Math.abs(source.debt))} groups ${source.debt > 0 ? "owed" : "ahead"}`);
  if (source.weight.set_at_run_time) said.push(`weight set: ${source.weight.text}`);
  const oldest = source.producer.oldest;
  if (oldest?.generating.length) {
    const [index, tokens] = oldest.generating[0];
    said.push(`oldest: group ${oldest.group_index}, ${duration(oldest.running_s)}, sample ${index} at ${number(tokens)} tokens`);
  }
  return said.join(" · ");
}

/** One row a source; `colour` gives the class of its colour. */
export function sources(table, status, colour) {
  const plan = status.plan[0];
  const rows = Object.entries(status.sources).map(([name, source]) => {
    const at = (...path) => shown(status, ["sources", name, ...path]);
    const drops = Object.keys(source.dropped).map((reason, i) => [i ? ", " : "", at("dropped", reason, "groups"), ` ${reason}`]);
    return [
      [[make("span", { class: `dot ${colour(name)}` }), name], "name"],
      [plan ? shown(status, ["plan", 0, "weights", name], percent) : "–"],
      [plan ? shown(status, ["plan", 0, "counts", name]) : "–"],
      [[make("span", { class: colour(name) }, bar(source))]],
      [[at("groups", "buffered"), " + ", at("groups", "in_flight")]],
      [[at("wanted"), " / ", at("bound")], "wide"],
      [at("partial_groups"), "wide"],
      [at("handed_out")],
      [drops.length ? drops.flat() : at("groups", "dropped"), "wide"],
      [shown(status, ["sources", name, "producer", "acceptance"], percent), "wide"],
      [remarks(source), "text wide"],
    ];
  });
  const head = [
    ["source"], ["share"], ["next batch"], ["buffered + in flight"], [""], ["plan / bound", "wide"], ["partial", "wide"],
    ["handed out"], ["dropped", "wide"], ["kept by filter", "wide"], ["", "text wide"],
  ];
  fill(table, head, rows, "no sources");
}

export function engines(table, status) {
  const rows = status.engines.map((engine, i) => {
    const at = (key, words) => shown(status, ["engines", i, key], words);
    return [
      [engine.name, "name"],
      [at("state", String), STATE_CLASS[engine.state] ?? "bad"],
      [[at("in_flight"), " / ", at("max_in_flight")]],
      [at("tokens")],
      [at("completed"), "wide"], [at("failed")], [at("stalled"), "wide"], [at("late"), "wide"],
      [at("first_token_s", duration), "wide"], [at("policy_version"), "wide"],
      [engine.last_error ?? "", "text"],
    ];
  });
  const head = [
    ["engine"], ["state"], ["in flight"], ["tokens"], ["done", "wide"], ["failed"], ["stalled", "wide"], ["late", "wide"],
    ["first token", "wide"], ["version", "wide"], ["last error", "text"],
  ];
  fill(table, head, rows, "no engines: add one with orchestrator engines add");
}

export function leases(table, status) {
  const rows = status.leases.map((lease, i) => [
    [shown(status, ["leases", i, "step"])],
    [`${lease.rank} of ${lease.world_size}`],
    [shown(status, ["leases", i, "groups"])],
    [duration(lease.held_s)],
    [lease.held_by_pid === null ? "nobody: it will be handed out again" : `pid ${lease.held_by_pid}`, "text"],
  ]);
  fill(table, [["step"], ["rank"], ["groups"], ["held for"], ["held by", "text"]], rows, "none");
}

/** The newest steps as a table. `samples`: whether there are pages with a step's samples. */
export function steps(table, points, names, at, samples) {
  const rows = points.slice(-STEPS_SHOWN).reverse().map((point) => [
    [samples ? make("a", { href: `/samples/${point.step}` }, number(point.step)) : number(point.step)],
    [point.time === null ? "–" : clock(point.time)],
    [duration(point.wait_s)],
    ...names.map((name) => {
      const groups = at(point, name, "group_count");
      if (groups === undefined || groups === null) return ["–"];
      const reward = groups ? ` · ${number(at(point, name, "raw_reward/mean"))}` : "";
      return [`${number(groups)}${reward}`];
    }),
  ]);
  fill(table, [["step"], ["formed"], ["waited"], ...names.map((name) => [`${name}: groups · reward`])], rows, "none yet");
}

export function events(list, status) {
  const items = status.events.slice().reverse().map((event) => make(
    "li", {},
    make("time", {}, clock(event.time)),
    make("span", { class: { warning: "warn", error: "bad", critical: "bad" }[event.level] ?? "" },
      `${event.source ? `${event.source}: ` : ""}${event.message}`),
  ));
  list.replaceChildren(...items);
}
