// The page: shows what the daemon pushes.
//
// Invariants:
// * The connection is closed a while after the tab is hidden, and opened again when the tab is shown. A broken one is
//   retried, with the number of the newest step seen, until the daemon answers.
// * At most MAX_POINTS steps are kept; when full, every second one of the older half is removed, as in the daemon.

import { Charts } from "./charts.js";
import { engines, events, figures, leases, make, sources, steps } from "./tables.js";
import { duration, number } from "./words.js";

const MAX_POINTS = 4096;
const RETRY_MS = 1000;
const HIDDEN_MS = 60000; // browsers allow six connections to a server: background tabs give theirs up
const SILENCE_MS = 5000; // a status arrives every second

const $ = (id) => document.getElementById(id);
const state = { fields: [], points: [], status: null, rate: null, heard: 0, source: null, linked: false };

function at(point, name, field) {
  return point.sources[name]?.[state.fields.indexOf(field)];
}

const charts = new Charts(at, number);

// -- the connection ---------------------------------------------------------------------------------------------------

function connect() {
  state.source?.close();
  const source = (state.source = new EventSource("/events"));
  source.addEventListener("steps", (event) => takeSteps(JSON.parse(event.data)));
  source.addEventListener("status", (event) => takeStatus(JSON.parse(event.data)));
  source.onerror = () => {
    showLink();
    // A browser does not retry after a response that is no stream (too many pages, or another server).
    if (source.readyState === EventSource.CLOSED && state.source === source) setTimeout(connect, RETRY_MS);
  };
}

let hiding = null;
document.addEventListener("visibilitychange", () => {
  clearTimeout(hiding);
  if (document.hidden) hiding = setTimeout(() => { state.source?.close(); state.source = null; }, HIDDEN_MS);
  else if (!state.source) connect();
});

function showLink() {
  const silent = Date.now() - state.heard, isLive = silent < SILENCE_MS && state.source?.readyState === EventSource.OPEN;
  const link = $("link");
  link.className = isLive ? "live" : state.heard ? "lost" : "";
  link.textContent = isLive ? "live" : state.heard ? `no contact with the daemon for ${duration(Math.floor(silent / 1000))}; retrying` : "connecting …";
}

// -- what arrives -----------------------------------------------------------------------------------------------------

function takeSteps({ fields, reset, points }) {
  state.fields = fields;
  if (reset) state.points = [];
  for (const point of points) {
    while (state.points.length && state.points.at(-1).step >= point.step) state.points.pop();
    state.points.push(point);
  }
  while (state.points.length > MAX_POINTS) {
    const half = state.points.length >> 1;
    state.points = state.points.filter((_, i) => i >= half || i % 2 === 0);
  }
  if (points.length || reset) requestAnimationFrame(showSteps);
}

function takeStatus(status) {
  const tokens = (of) => of.engines.reduce((sum, engine) => sum + engine.tokens, 0);
  const before = state.status;
  if (before && before.run.pid === status.run.pid && status.time > before.time) {
    const rate = Math.max(0, tokens(status) - tokens(before)) / (status.time - before.time);
    state.rate = state.rate === null ? rate : 0.7 * state.rate + 0.3 * rate;
  } else state.rate = null;
  state.status = status;
  state.heard = Date.now();
  requestAnimationFrame(showStatus);
}

// -- what is shown ----------------------------------------------------------------------------------------------------

/** The current sources, then those that only older steps have. */
function names() {
  const known = Object.keys(state.status?.sources ?? {});
  const older = new Set(state.points.slice(-200).flatMap((point) => Object.keys(point.sources)));
  return [...known, ...[...older].filter((name) => !known.includes(name))];
}

function showSteps() {
  charts.draw(state.points, names());
  state.linked = state.status?.run.has_archive;
  steps($("steps"), state.points, names(), at, state.linked);
}

function showStatus() {
  const status = state.status, run = status.run;
  if (names().join("/") !== charts.names.join("/") || state.linked !== run.has_archive) showSteps();
  document.title = `${status.headline.level === "late" ? "⚠ " : ""}${run.name} · step ${status.step}`;
  $("run").textContent = run.name;
  const end = run.num_rollout ? ` of ${number(run.num_rollout)}` : "";
  $("where").replaceChildren(
    "step ", make("b", { "data-path": '["step"]', "data-value": JSON.stringify(status.step) }, number(status.step)),
    `${end} · up ${duration(run.uptime_s)} · ${run.rollout_batch_size} groups of ${run.n_samples_per_prompt} samples a batch · pid ${run.pid}`,
  );
  $("headline").textContent = status.headline.text;
  $("headline").dataset.level = status.headline.level;
  document.body.dataset.time = status.time; // the time of the status shown
  const faults = [...(status.state.fault ? [`Disk: ${status.state.fault}`] : []),
    ...(status.archive?.fault ? [`Archive: ${status.archive.fault}`] : []),
    ...status.sinks.filter((sink) => sink.fault).map((sink) => `Metrics to ${sink.name}: ${sink.fault}`),
    ...status.problems.map((text) => `Damage found at startup: ${text}`)];
  $("problems").replaceChildren(...faults.map((text) => make("li", {}, text)));
  figures($("figures"), status, state.rate);
  showLegend();
  sources($("sources"), status, (name) => charts.colour(name));
  engines($("engines"), status);
  leases($("leases"), status);
  events($("events"), status);
  showLink();
}

function showLegend() {
  const wanted = charts.names.map((name) => `${name}:${charts.hidden.has(name)}`).join("/");
  if ($("legend").dataset.shown === wanted) return;
  $("legend").dataset.shown = wanted;
  $("legend").replaceChildren(...charts.names.map((name) => {
    const button = make("button", { type: "button", "aria-pressed": String(!charts.hidden.has(name)) },
      make("span", { class: `dot ${charts.colour(name)}` }), name);
    button.onclick = () => { charts.toggle(name); showLegend(); };
    return button;
  }));
}

connect();
setInterval(showLink, 1000);
