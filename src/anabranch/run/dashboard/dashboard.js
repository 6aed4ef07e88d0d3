// The dashboard: asks the server every second what it tells of itself, and draws the last five minutes.

const EVERY = 1000; // milliseconds from one look to the next
const PATIENCE = 5000; // milliseconds after which a server that does not answer counts as unreachable
const KEPT = 300; // seconds
const OUTPUTS = 4; // of a watched stream, and groups of predictions
const RECENT = 30; // seconds over which the quality of predictions is drawn
const COLOURS = ["#3d85e0", "#e07a2f", "#c04a98", "#2a9d6f"]; // to be told apart on light and on dark ground

// Numbers for people

const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const count = (n) => compact.format(n);
const digits = (n, most = 3) => n.toLocaleString("en", { maximumSignificantDigits: most });
const whole = (n) => n.toLocaleString("en");
const percent = (share) => `${digits(100 * share)} %`;
const duration = (seconds) => (seconds < 1 ? `${digits(1000 * seconds)} ms` : `${digits(seconds)} s`);
const clock = (seconds) => new Date(1000 * seconds).toLocaleTimeString("en-GB");
// Times of a stream are since 1970, or since whatever its rows count from.
const streamTime = (t) => (t > 1e8 && t < 1e11 ? new Date(1000 * t).toISOString().slice(0, 19) : `${digits(t, 9)} s`);

function bytes(n) {
  const power = Math.min(4, Math.floor(Math.log10(Math.max(1, n)) / 3));
  return `${digits(n / 1000 ** power)} ${["B", "kB", "MB", "GB", "TB"][power]}`;
}

function age(seconds) {
  const [size, unit] = [[86400, "d"], [3600, "h"], [60, "min"]].find(([size]) => seconds >= size) ?? [1, "s"];
  return `${Math.floor(seconds / size)} ${unit}`;
}

// The server

let token = sessionStorage.getItem("token");

class Refused extends Error {
  constructor(path, status) {
    super(`The server answers ${status} to ${path}`);
    this.status = status;
  }
}

async function ask(path) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const response = await fetch(path, { headers, signal: AbortSignal.timeout(PATIENCE) });
  if (!response.ok) throw new Refused(path, response.status);
  return response.json();
}

// The page

const $ = (id) => document.getElementById(id);

function make(tag, text = "", ...children) {
  const element = document.createElement(tag);
  element.textContent = text; // names come from clients: never as HTML
  element.append(...children);
  return element;
}

function table(element, head, rows) {
  const line = (tag, cells) => make("tr", "", ...cells.map((cell) => make(tag, cell)));
  element.replaceChildren(
    make("thead", "", line("th", head)),
    make("tbody", "", ...rows.map((row) => line("td", row))),
  );
}

let alarms = []; // the last ones, oldest first

function markAlarms(plot) {
  const { left, top, width, height } = plot.bbox;
  plot.ctx.save();
  plot.ctx.strokeStyle = getComputedStyle(document.body).getPropertyValue("--trouble");
  plot.ctx.setLineDash([4, 4]);
  for (const { noticed } of alarms) {
    const x = plot.valToPos(noticed, "x", true);
    if (x < left || x > left + width) continue;
    plot.ctx.beginPath();
    plot.ctx.moveTo(x, top);
    plot.ctx.lineTo(x, top + height);
    plot.ctx.stroke();
  }
  plot.ctx.restore();
}

function chart(parent, title, names, format, { x = clock, top = null, marked = false } = {}) {
  // A colour is looked up when it is drawn: the page may have turned dark.
  const css = (name) => () => getComputedStyle(document.body).getPropertyValue(name);
  const grid = { stroke: css("--line"), width: 1 };
  const axis = { stroke: css("--quiet"), grid, ticks: { show: false }, font: "11px system-ui" };
  const time = x === clock;
  const ground = make("div");
  parent.append(make("figure", "", make("figcaption", title), ground));
  const options = {
    width: ground.clientWidth,
    height: 150,
    hooks: { draw: marked ? [markAlarms] : [] },
    cursor: { drag: { x: false, y: false }, ...(time && { sync: { key: "time" } }) },
    scales: {
      x: { time, range: (_, from, to) => [time ? Math.min(from, to - 60) : from, to] },
      y: { range: (_, low, high) => [low < 0 ? 1.1 * low : 0, top ?? (high > 0 ? 1.1 * high : low < 0 ? 0 : 1)] },
    },
    axes: [
      { ...axis, space: 80, size: 26, values: (_, ticks) => ticks.map(x) },
      { ...axis, space: 30, size: 56, values: (_, ticks) => ticks.map(format) },
    ],
    series: [
      { value: (_, v) => (v == null ? "–" : time ? x(v) : `event ${x(v)}`) },
      ...names.map((label, i) => ({
        label,
        stroke: COLOURS[i],
        width: 1.5,
        points: { show: false },
        value: (_, v) => (v == null ? "–" : format(v)),
      })),
    ],
  };
  const plot = new uPlot(options, [[], ...names.map(() => [])], ground);
  new ResizeObserver(() => plot.setSize({ width: ground.clientWidth, height: options.height })).observe(ground);
  return (data) => {
    plot.setData(data);
    if (plot.cursor.left < 0) plot.setLegend({ idx: data[0].length - 1 });
  };
}

// The last five minutes

const total = (stats, what) => Object.values(stats.keys).reduce((sum, stage) => sum + stage[what], 0);
const answered = (stats, value) => (stats.events_per_s > 0 ? value : null); // there is no latency of nothing

const quantile = (name) => (stats) => answered(stats, stats.latency[name]);

const CHARTS = [
  ["Events per second", count, { marked: true }, { "events/s": (s) => s.events_per_s }],
  ["Latency", duration, {}, { p50: quantile("p50"), p95: quantile("p95"), p99: quantile("p99") }],
  ["Batch size", count, {}, { events: (s) => answered(s, s.batch) }],
  ["Busy share", percent, { top: 1 }, { busy: (s) => s.busy }],
  ["Keys", count, {}, { keys: (s) => total(s, "keys"), spilled: (s) => total(s, "spilled") }],
  ["Memory", bytes, {}, { resident: (s) => s.resident }],
];
let samples = []; // [time in seconds, stats, or null where the server was not reached]
let charts = null;

function draw(stats) {
  const now = Date.now() / 1000;
  samples = [...samples.filter(([time]) => time > now - KEPT), [now, stats]];
  const times = samples.map(([time]) => time);
  charts ??= CHARTS.map(([title, format, options, series]) =>
    chart($("charts"), title, Object.keys(series), format, options),
  );
  for (const [i, [, , , series]] of CHARTS.entries()) {
    charts[i]([times, ...Object.values(series).map((value) => samples.map(([, s]) => (s ? value(s) : null)))]);
  }
  drawQuality(times);
}

let quality = null; // {names of the groups, draw}

function drawQuality(times) {
  const last = samples.findLast(([, s]) => s?.quality)?.[1].quality ?? {};
  const names = Object.keys(last).filter((name) => last[name].n > 0);
  names.splice(0, names.length, ...names.sort((a, b) => last[b].n - last[a].n).slice(0, OUTPUTS).sort());
  if (names.length === 0) return;
  const metrics = { log_loss: "Log loss", mae: "MAE", accuracy: "Accuracy" };
  const metric = Object.keys(metrics).find((name) => name in last[names[0]]);
  if (quality?.names !== names.join()) {
    $("quality").querySelector("figure")?.remove();
    const title = `${metrics[metric]}, labels of the last ${RECENT} s`;
    quality = { names: names.join(), draw: chart($("quality"), title, names, (y) => digits(y, 4), { marked: true }) };
  }
  quality.draw([times, ...names.map((name) => recentMeans(name, metric))]);
}

// The server tells means of all labels so far: those of the last seconds are in the difference of two.
function recentMeans(group, metric) {
  let from = 0;
  return samples.map(([time, stats], i) => {
    const now = stats?.quality?.[group];
    while (from < i && (samples[from][0] < time - RECENT || !samples[from][1]?.quality)) from += 1;
    const then = samples[from][1]?.quality?.[group] ?? { n: 0 };
    const n = (now?.n ?? 0) - then.n;
    return n > 0 && from < i ? (now.n * now[metric] - then.n * (then[metric] ?? 0)) / n : null;
  });
}

// Figures of now

function show(stats) {
  document.title = `${stats.name} · Anabranch`;
  $("name").textContent = stats.name;
  for (const id of ["tiles", "charts", "uptime"]) $(id).hidden = !isWhole(stats);
  if (!isWhole(stats)) return showOwn(stats);
  $("uptime").textContent = `up for ${age(stats.seconds)}`;
  $("rate").textContent = count(stats.events_per_s);
  $("p99").textContent = stats.events_per_s > 0 ? duration(stats.latency.p99) : "–";
  $("keys").textContent = count(total(stats, "keys"));
  $("keys-label").textContent = isCell(stats) ? "Streams" : "Keys";
  $("memory").textContent = bytes(stats.resident);

  const labels = Object.fromEntries(Object.entries(stats.labels ?? {}).map(([name, n]) => [`labels ${name}`, n]));
  const figures = { waiting: stats.waiting, sessions: stats.sessions, "batches/s": stats.batches_per_s, ...labels };
  const troubles = { "bad events": stats.bad, "refused events": stats.refused, "dead letters": stats.dead_letters };
  const entry = (name, n, trouble) => {
    const element = make("div", "", make("dt", name), make("dd", n < 100 ? digits(n) : whole(Math.round(n))));
    element.classList.toggle("trouble", trouble && n > 0);
    return element;
  };
  const entries = (figures, trouble) =>
    Object.entries(figures).flatMap(([name, n]) => (n == null ? [] : [entry(name, n, trouble)]));
  $("counts").replaceChildren(...entries(figures, false), ...entries(troubles, true));

  const stage = ([name, { keys, spilled, bytes: size, seconds, events }]) => [
    name,
    whole(keys),
    whole(spilled),
    bytes(size),
    keys > 0 ? bytes(size / keys) : "–",
    whole(events),
    duration(seconds),
    events > 0 ? `${digits((1e6 * seconds) / events)} µs` : "–",
  ];
  table(
    $("stages").querySelector("table"),
    ["stage", "keys", "spilled", "states", "a key", "events, last minute", "took", "an event"],
    Object.entries(stats.keys).map(stage),
  );

  const groups = Object.entries(stats.quality ?? {}).filter(([, scores]) => scores.n > 0);
  const metrics = [...new Set(groups.flatMap(([, scores]) => Object.keys(scores)))];
  const score = (value) => (value == null ? "–" : Number.isInteger(value) ? whole(value) : value.toFixed(4));
  $("quality").hidden = groups.length === 0;
  table(
    $("quality").querySelector("table"),
    ["group", ...metrics.map((name) => name.replaceAll("_", " "))],
    groups.map(([group, scores]) => [group, ...metrics.map((name) => score(scores[name]))]),
  );
}

const isWhole = (stats) => "seconds" in stats; // a tenant is told no figures but its own

function showOwn(stats) {
  $("counts").replaceChildren(make("div", "", make("dt", "waiting"), make("dd", whole(stats.waiting))));
  const stages = Object.entries(stats.keys).map(([name, { keys }]) => [name, whole(keys)]);
  table($("stages").querySelector("table"), ["stage", "keys"], stages);
}

function showAlarms({ counts, recent }) {
  alarms = recent;
  $("alarms").hidden = recent.length === 0;
  const named = Object.entries(counts).map(([stage, n]) => `${stage}: ${whole(n)}`);
  $("alarms").querySelector("p").textContent = `So far ${named.join(", ")}.`;
  const number = (value) => (value == null ? "–" : digits(value, 4));
  const row = ({ time, noticed, stage, key, output, value, before }) => [
    clock(noticed),
    stage ? `${stage}: ${output}` : "error of predictions",
    key || "–",
    before == null ? number(value) : `${number(before)} → ${number(value)}`,
    streamTime(time),
  ];
  table(
    $("alarms").querySelector("table"),
    ["noticed", "what", "key", "value", "time of the stream"],
    recent.toReversed().map(row),
  );
}

// Streams

// Only the streams of a cell can be watched. A cell is told as the one stage "cell".
const isCell = (stats) => !("dead_letters" in stats) && Object.keys(stats.keys).join() === "cell";
let watched = null; // {name, names of the outputs, draw}

function* outputs(y, name = "y") {
  if (y !== null && typeof y === "object") {
    const field = (key) => (!Array.isArray(y) ? key : `${name}[${key}]`);
    for (const [key, value] of Object.entries(y)) yield* outputs(value, field(key));
  } else {
    yield [name, y === null ? null : Number(y)];
  }
}

function first(y) {
  const found = [];
  for (const output of outputs(y)) {
    if (found.length === OUTPUTS) break;
    found.push(output);
  }
  return found;
}

function watch(name) {
  watched = { name, names: "", draw: null };
  $("stream").value = name;
  const [title, text] = $("watched").children;
  title.textContent = name;
  text.textContent = "Its next answers are drawn here.";
  $("watched").replaceChildren(title, text);
  $("watched").hidden = false;
}

function showRecent(streams) {
  // The list stands still while somebody is about to choose from it.
  if ($("recent").matches(":hover, :focus-within")) return;
  const entry = ({ stream, n, ago }) => {
    const button = make("button", stream, make("small", `${count(n)} events, ${age(ago)} ago`));
    button.addEventListener("click", () => watch(stream));
    return make("li", "", button);
  };
  $("recent").replaceChildren(...streams.map(entry));
}

function showWatched({ stream, n, recent }) {
  if (watched?.name !== stream) return; // another has been opened meanwhile
  const begin = recent.findLastIndex((answer, i) => i > 0 && answer.n <= recent[i - 1].n); // it has begun anew
  const answers = recent.slice(Math.max(0, begin)).map(({ n, y }) => [n, first(y)]);
  const text = $("watched").querySelector("p");
  if (answers.length === 0) {
    text.textContent = n ? `${whole(n)} events; its next answers are drawn here.` : "It has had no event.";
    return;
  }
  const last = answers.at(-1)[1];
  const names = last.map(([name]) => name);
  text.textContent = `${whole(n)} events`;
  if (watched.names !== names.join()) {
    watched.names = names.join();
    watched.draw = chart($("watched"), "Its last answers", names, (y) => digits(y, 4), { x: whole });
  }
  watched.draw([answers.map(([n]) => n), ...names.map((_, i) => answers.map(([, y]) => y[i][1]))]);
}

// From one look to the next

let lost = null; // when the server was no longer reached

function trouble(error) {
  lost ??= Date.now() / 1000;
  const why = error instanceof Refused ? error.message : "The server cannot be reached";
  $("banner").textContent = `${why}, since ${clock(lost)}. Trying again every second.`;
  $("banner").hidden = false;
}

async function look() {
  let stats = null;
  let streams = null;
  let stream = null;
  try {
    stats = await ask("v1/stats");
    await ask("readyz"); // a server whose model has failed still tells figures
    if (isCell(stats)) ({ streams } = await ask("v1/streams"));
    if (isCell(stats) && watched) stream = await ask(`v1/streams/${encodeURIComponent(watched.name)}`);
    lost = null;
    $("banner").hidden = true;
  } catch (error) {
    if (error.status === 401) return login();
    trouble(error);
  }
  setTimeout(look, EVERY);
  if (stats) {
    $("main").hidden = false;
    $("streams").hidden = !isCell(stats);
    show(stats);
    if (stats.alarms) showAlarms(stats.alarms);
  }
  if (streams) showRecent(streams);
  if (stream) showWatched(stream);
  if (!$("main").hidden && !$("charts").hidden) draw(stats);
}

function login() {
  $("main").hidden = true;
  $("banner").hidden = true;
  $("refused").hidden = !token;
  $("login").hidden = false;
  $("token").focus();
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value;
  sessionStorage.setItem("token", token);
  $("login").hidden = true;
  look();
});

$("open").addEventListener("submit", (event) => {
  event.preventDefault();
  watch($("stream").value);
});

look();
