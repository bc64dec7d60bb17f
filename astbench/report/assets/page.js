"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = new Map(DATA.runs.map((run) => [run.id, run]));
const GROUPS = new Map(DATA.groups.map((group) => [group.name, group]));
const main = document.getElementById("main");

// -- elements: texts are always text, never markup ---------------------------------------------------

function add(parent, tag, options = {}, ...children) {
  const element = document.createElement(tag);
  set(element, options);
  element.append(...children);
  parent.append(element);
  return element;
}

function addSvg(parent, tag, options = {}, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  set(element, options);
  if (text) element.textContent = text;
  parent.append(element);
  return element;
}

function set(element, options) {
  for (const [name, value] of Object.entries(options)) {
    if (value === false || value === null || value === undefined) continue;
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
}

// Words between backquotes as code, as the records' tables write them.
function addWords(parent, words) {
  String(words).split("`").forEach((part, n) => (n % 2 ? add(parent, "code", { text: part }) : parent.append(part)));
}

// -- numbers -------------------------------------------------------------------------------------------

const missing = (value) => value === null || value === undefined;
const shown = (value, digits = 3) => (missing(value) ? "" : Number(value.toPrecision(digits)).toLocaleString("en", { maximumFractionDigits: 6 }));
const fixed = (value, digits) => (missing(value) ? "" : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }));
const whole = (value) => (missing(value) ? "" : value.toLocaleString("en"));
const bytes = (value) => (missing(value) ? "" : `${fixed(value / 2 ** 30, 1)} GiB`);
const lasted = (s) => (missing(s) ? "" : s < 90 ? `${fixed(s, 0)} s` : s < 5400 ? `${fixed(s / 60, 0)} min` : `${fixed(s / 3600, 1)} h`);
const ticks = (s) => (s < 1e-3 ? `${shown(s * 1e6)} µs` : s < 1 ? `${shown(s * 1e3)} ms` : `${shown(s)} s`);
const link = (id) => `#/run/${id.split("/").map(encodeURIComponent).join("/")}`;

// -- pages ---------------------------------------------------------------------------------------------

const PAGES = [
  ["", "Leaderboard", leaderboard],
  ["frontier", "Quality over density", frontier],
  ["costs", "Time and memory", costs],
  ["tables", "Tables", tables],
  ["choices", "What was chosen", choices],
];

function route() {
  const words = location.hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);
  const page = words[0] === "run" ? null : PAGES.find(([name]) => name === words[0]) || PAGES[0];
  const nav = document.getElementById("nav");
  nav.replaceChildren();
  for (const [name, title, draw] of PAGES) {
    if (draw === choices && !Object.keys(DATA.patterns).length) continue;
    if (draw === costs && !DATA.benches.length) continue;
    add(nav, "a", { href: `#/${name}`, text: title, "aria-current": page && page[0] === name ? "page" : false });
  }
  main.replaceChildren();
  if (words[0] === "run") showRun(words.slice(1).join("/"));
  else page[2](words.slice(1));
}

function choose(parent, label, options, value, changed) {
  const box = add(parent, "label", {}, label);
  const select = add(box, "select", { onchange: () => changed(select.value) });
  for (const [name, text] of options) add(select, "option", { value: name, text, selected: name === value });
  return select;
}

// -- leaderboard ---------------------------------------------------------------------------------------

const COLUMNS = [
  ["attention", (run) => run.label, (run) => run.label, false],
  ["run", (run) => run.id, (run) => run.id, false],
  ["metric", (run) => run.metric, (run) => run.metric, false],
  ["value", (run) => run.value, (run) => (missing(run.value) ? "" : fixed(run.value, 2)), true],
  ["density", (run) => run.density, (run) => fixed(run.density, 3), true],
  ["tiles", (run) => run.tiles, (run) => fixed(run.tiles, 3), true],
  ["tokens", (run) => run.length, (run) => whole(run.length), true],
  ["parameters", (run) => run.parameters, (run) => (missing(run.parameters) ? "" : `${shown(run.parameters / 1e6)} M`), true],
  ["learned", (run) => run.learned, (run) => run.learned, false],
  ["steps", (run) => run.steps, (run) => whole(run.steps), true],
  ["training", (run) => run.train_seconds, (run) => lasted(run.train_seconds), true],
  ["memory", (run) => run.memory, (run) => bytes(run.memory), true],
  ["seed", (run) => run.seed, (run) => String(run.seed), true],
  ["date", (run) => run.date, (run) => run.date, false],
];
const board = { task: "", group: "", text: "", sort: 1, down: false };

function leaderboard() {
  add(main, "h2", { text: "Leaderboard" });
  add(main, "p", { class: "quiet", text: "Runs of one comparison read the same data. Set side by side only those with the same tokens, parameters and training. A * marks attention that is not strictly causal: of a language model its one-pass value flatters it. A † marks a run that the code would not measure so today. An order is no proof of a difference: the tables have the intervals." });
  const filters = add(main, "div", { class: "filters" });
  const every = (key) => [...new Set(DATA.runs.map((run) => run[key]))].sort();
  choose(filters, "Task", [["", "all"], ...every("task").map((t) => [t, t])], board.task, (v) => { board.task = v; fill(); });
  choose(filters, "Comparison", [["", "all"], ...DATA.groups.map((g) => [g.name, g.title])], board.group, (v) => { board.group = v; fill(); });
  const label = add(filters, "label", {}, "Attention holds");
  const text = add(label, "input", { type: "search", value: board.text, oninput: () => { board.text = text.value; fill(); } });
  const count = add(main, "p", { class: "quiet", role: "status" });
  const table = add(add(main, "div", { class: "scroll" }), "table", { id: "board" });
  const head = add(add(table, "thead"), "tr");
  COLUMNS.forEach(([name, , , number], n) => {
    const cell = add(head, "th", { class: number ? "number" : "", scope: "col" });
    add(cell, "button", { type: "button", text: name, onclick: () => {
      board.down = board.sort === n ? !board.down : false;
      board.sort = n;
      fill();
    } });
  });
  const body = add(table, "tbody");

  function fill() {
    [...head.children].forEach((cell, n) => cell.setAttribute("aria-sort", n === board.sort ? (board.down ? "descending" : "ascending") : "none"));
    const words = board.text.toLowerCase();
    const runs = DATA.runs.filter((run) => (!board.task || run.task === board.task) && (!board.group || run.group === board.group) && run.label.toLowerCase().includes(words));
    const key = COLUMNS[board.sort][1];
    const best = (run) => (missing(run.value) ? Infinity : run.lower ? run.value : -run.value);
    runs.sort((a, b) => compare(key(a), key(b)) * (board.down && !missing(key(a)) && !missing(key(b)) ? -1 : 1) || compare(best(a), best(b)));
    count.textContent = `${runs.length} of ${DATA.runs.length} runs`;
    body.replaceChildren();
    for (const run of runs) {
      const row = add(body, "tr");
      COLUMNS.forEach(([name, , text, number]) => {
        const cell = add(row, "td", { class: number ? "number" : "" });
        if (name === "attention") {
          add(cell, "a", { href: link(run.id), text: text(run) });
          if (run.stale) add(cell, "span", { title: run.stale, text: " †" });
          if (run.causal === false) add(cell, "span", { title: "not strictly causal", text: " *" });
        } else cell.textContent = text(run);
      });
    }
  }
  fill();
}

function compare(a, b) {
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
}

// -- charts --------------------------------------------------------------------------------------------

const HUES = ["#0b62c4", "#c2410c", "#15803d", "#7e22ce", "#b91c1c", "#0e7490", "#a16207", "#be185d", "#4d7c0f", "#4338ca"];
const color = (n) => HUES[n % HUES.length];

// series: {name, color, points: [[x, y, title, href]], line, thick}
function chart(parent, series, { x, y, logX, logY, label }) {
  const width = 860, height = 420, left = 70, right = 20, top = 14, bottom = 46;
  const points = series.flatMap((one) => one.points).filter(([a, b]) => (!logX || a > 0) && (!logY || b > 0));
  if (!points.length) return add(parent, "p", { text: "Nothing was measured here." });
  const scale = (at, log, from, to) => {
    let low = Math.min(...points.map((p) => p[at])), high = Math.max(...points.map((p) => p[at]));
    if (log) [low, high] = [Math.log(low), Math.log(high)];
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    [low, high] = [low - room, high + room];
    const place = (value) => from + ((log ? Math.log(value) : value) - low) / (high - low) * (to - from);
    return [place, marks(low, high, log)];
  };
  const [px, xs] = scale(0, logX, left, width - right), [py, ys] = scale(1, logY, height - bottom, top);
  const svg = addSvg(parent, "svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label });
  for (const value of xs) {
    addSvg(svg, "line", { class: "axis", x1: px(value), x2: px(value), y1: top, y2: height - bottom });
    addSvg(svg, "text", { x: px(value), y: height - bottom + 16, "text-anchor": "middle" }, x.show(value));
  }
  for (const value of ys) {
    addSvg(svg, "line", { class: "axis", x1: left, x2: width - right, y1: py(value), y2: py(value) });
    addSvg(svg, "text", { x: left - 6, y: py(value) + 4, "text-anchor": "end" }, y.show(value));
  }
  addSvg(svg, "text", { x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle" }, x.name);
  addSvg(svg, "text", { x: 14, y: (top + height - bottom) / 2, "text-anchor": "middle", transform: `rotate(-90 14 ${(top + height - bottom) / 2})` }, y.name);
  for (const one of series) {
    const drawn = one.points.filter(([a, b]) => (!logX || a > 0) && (!logY || b > 0));
    if (one.line && drawn.length > 1) addSvg(svg, "polyline", { points: drawn.map(([a, b]) => `${px(a)},${py(b)}`).join(" "), fill: "none", stroke: one.color, "stroke-width": one.thick ? 4 : 1.8 });
    for (const [a, b, title, href] of drawn) {
      const anchor = href ? addSvg(svg, "a", { href, "aria-label": title }) : svg;
      const circle = addSvg(anchor, "circle", { cx: px(a), cy: py(b), r: one.line ? (drawn.length > 60 ? 1 : 3) : 6, fill: one.color });
      addSvg(circle, "title", {}, title);
    }
  }
  const legend = add(parent, "ul", { class: "legend" });
  for (const one of series) {
    const item = add(legend, "li");
    add(item, "span", { class: "swatch", style: `background:${one.color}` });
    addWords(item, one.name);
  }
  return svg;
}

function marks(low, high, log) {
  if (log) {
    const found = [];
    const base = high - low > 4 ? 10 : 2;
    for (let power = Math.ceil(low / Math.log(base) - 1e-9); power * Math.log(base) <= high + 1e-9; power++) found.push(base ** power);
    return found;
  }
  const rough = (high - low) / 6, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high; n++) found.push(n * step);
  return found;
}

function frontier([wanted, trained = ""]) {
  add(main, "h2", { text: "Quality over density" });
  add(main, "p", { class: "quiet", text: "Each point is a run; density is the share of visible (query, key) pairs that was attended to, counted. It is no time: time and memory have a page of their own." });
  const groups = DATA.groups.filter((g) => DATA.runs.some((run) => run.group === g.name && !missing(run.density) && !missing(run.value)));
  const group = groups.find((g) => g.name === wanted) || groups[0];
  if (!group) return add(main, "p", { text: "No run here has a density." });
  const filters = add(main, "div", { class: "filters" });
  choose(filters, "Comparison", groups.map((g) => [g.name, g.title]), group.name, (v) => { location.hash = `#/frontier/${encodeURIComponent(v)}`; });
  const all = DATA.runs.filter((run) => run.group === group.name && !missing(run.density) && !missing(run.value));
  const kinds = [...new Set(all.map((run) => run.learned))];
  if (kinds.length > 1) choose(filters, "What learned", [["", "all, not to be compared"], ...kinds.map((k) => [k, k])], trained, (v) => { location.hash = `#/frontier/${encodeURIComponent(group.name)}/${encodeURIComponent(v)}`; });
  const runs = all.filter((run) => !trained || run.learned === trained);
  for (const metric of new Set(runs.map((run) => run.metric))) {
    const some = runs.filter((run) => run.metric === metric);
    const names = [...new Set(some.map((run) => run.attention))].sort((a, b) => (b === "ast") - (a === "ast") || (b === "dense") - (a === "dense") || a.localeCompare(b));
    const series = names.map((name, n) => ({
      name: `\`${name}\``, color: color(n),
      points: some.filter((run) => run.attention === name).map((run) => [run.density, run.value, `${run.label}: ${metric} ${fixed(run.value, 2)} at density ${fixed(run.density, 3)}, seed ${run.seed}`, link(run.id)]),
    }));
    chart(main, series, { x: { name: "density", show: shown }, y: { name: metric + (some[0].lower ? " (less is better)" : ""), show: shown }, label: `${metric} over density, ${group.title}` });
  }
  return null;
}

function costs([wanted, mode, what = "seconds"]) {
  add(main, "h2", { text: "Time and memory over the length" });
  const titles = DATA.benches.map((b) => [b.id, `${GROUPS.get(b.group).title}: ${b.id.split("/")[1]}`]);
  const bench = DATA.benches.find((b) => b.id === wanted) || DATA.benches[0];
  if (!bench) return add(main, "p", { text: "No bench is on record." });
  const modes = [...new Set(bench.series.map((one) => one.mode))];
  if (!modes.includes(mode)) [mode] = modes;
  const go = (b, m, w) => { location.hash = `#/costs/${[b, m, w].map(encodeURIComponent).join("/")}`; };
  const filters = add(main, "div", { class: "filters" });
  choose(filters, "Bench", titles, bench.id, (v) => go(v, mode, what));
  choose(filters, "Mode", modes.map((m) => [m, m.replaceAll("_", " ")]), mode, (v) => go(bench.id, v, what));
  choose(filters, "What", [["seconds", "time"], ["bytes", "memory"]], what, (v) => go(bench.id, mode, v));
  add(main, "p", { class: "quiet", text: `${bench.pattern.replaceAll("_", " ")}, ${bench.device}, ${bench.threads} threads, ${bench.date}. Dense attention is the thick line; what lies above it loses. What choosing takes is in the time of a layer, not in that of a kernel.` });
  const own = bench.series.filter((one) => one.mode === mode);
  const series = own.map((one, n) => ({
    name: `\`${one.name}\``, color: one.dense ? "var(--text)" : color(n), line: true, thick: one.dense,
    points: one[what].map(([length, value]) => [length, value, `${one.name}, ${whole(length)} tokens: ${what === "seconds" ? ticks(value) : bytes(value)}`]),
  }));
  chart(main, series, { x: { name: "tokens", show: whole }, y: { name: what === "seconds" ? "time of a call" : "peak memory", show: what === "seconds" ? ticks : bytes }, logX: true, logY: true, label: `${what} over tokens` });
  return null;
}

// -- tables --------------------------------------------------------------------------------------------

function tables([wanted]) {
  add(main, "h2", { text: "Tables" });
  const groups = DATA.groups.filter((g) => g.tables.length);
  const group = groups.find((g) => g.name === wanted) || groups[0];
  if (!group) return add(main, "p", { text: "No tables were made." });
  choose(add(main, "div", { class: "filters" }), "Comparison", groups.map((g) => [g.name, g.title]), group.name, (v) => { location.hash = `#/tables/${encodeURIComponent(v)}`; });
  add(main, "h3", { text: group.title });
  for (const line of group.scope.split("\n").filter(Boolean)) addWords(add(main, "p"), line);
  for (const table of group.tables) {
    const element = add(add(main, "div", { class: "scroll" }), "table");
    add(element, "caption", { text: table.caption });
    const side = (n) => ({ class: n >= table.words ? "number" : "" });
    const head = add(add(element, "thead"), "tr");
    table.head.forEach((text, n) => add(head, "th", { ...side(n), scope: "col", text }));
    add(head, "th", { scope: "col", text: "records" });
    const body = add(element, "tbody");
    for (const { cells, runs } of table.rows) {
      const row = add(body, "tr");
      cells.forEach((text, n) => addWords(add(row, "td", side(n)), text));
      const last = add(row, "td");
      runs.filter((id) => RUNS.has(id)).forEach((id, n) => { if (n) last.append(" "); add(last, "a", { href: link(id), text: String(n + 1), "aria-label": `record ${id}` }); });
    }
  }
  for (const [name, why] of Object.entries(group.left_out || {})) add(main, "p", { class: "quiet", text: `Left out: ${name}, ${why}` });
  return null;
}

// -- one run -------------------------------------------------------------------------------------------

function showRun(id) {
  const run = RUNS.get(id);
  if (!run) return add(main, "p", { text: `No run is called ${id}.` });
  add(main, "h2", { text: run.label });
  add(main, "p", { class: "quiet", text: `${run.id}, ${run.command}, ${run.date}, ${run.device}, ${run.threads} threads, commit ${run.commit.slice(0, 12)}${run.dirty ? " with changes" : ""}, seed ${run.seed}` });
  if (run.stale) add(main, "p", { text: `† ${run.stale}` });
  if (run.signature) add(main, "p", { text: run.signature });
  const numbers = [...Object.entries(run.metrics).filter(([, v]) => typeof v === "number").map(([k, v]) => [k, shown(v, 5)]),
    ["density", fixed(run.density, 3)], ["tiles", fixed(run.tiles, 3)], ["parameters", whole(run.parameters)], ["of the attention's own", whole(run.own_parameters)],
    ["steps", whole(run.steps)], ["training", lasted(run.train_seconds)], ["peak memory", bytes(run.memory)], ["kernels", run.backends.join(", ")]];
  pairs(main, "What came out", numbers.filter(([, v]) => v));
  if (run.id in DATA.patterns) add(add(main, "p"), "a", { href: `#/choices/${encodeURIComponent(run.id)}`, text: "What it chose" });
  add(main, "h3", { text: "The command that repeats it" });
  add(main, "pre", { text: run.repeat });
  const curves = Object.entries(run.curves).filter(([, points]) => points.length > 1);
  if (curves.length) {
    add(main, "h3", { text: "Curves" });
    for (const [name, points] of curves) chart(main, [{ name, color: color(0), line: true, points: points.map(([s, v]) => [s, v, `${name} ${shown(v, 5)} at step ${s}`]) }], { x: { name: "step", show: whole }, y: { name, show: shown }, label: name });
  }
  const layers = Object.entries(run.layers).filter(([, heads]) => Array.isArray(heads));
  if (layers.length) {
    add(main, "h3", { text: "Density by layer and head" });
    const table = add(add(main, "div", { class: "scroll" }), "table"), heads = Math.max(...layers.map(([, h]) => h.length));
    const head = add(add(table, "thead"), "tr");
    add(head, "th", { scope: "col", text: "layer" });
    for (let n = 0; n < heads; n++) add(head, "th", { class: "number", scope: "col", text: `head ${n}` });
    const body = add(table, "tbody");
    for (const [path, values] of layers) {
      const row = add(body, "tr");
      add(row, "th", { scope: "row" }, add(document.createDocumentFragment(), "code", { text: path }));
      for (let n = 0; n < heads; n++) add(row, "td", { class: "number", text: fixed(values[n], 3), style: missing(values[n]) ? false : `background:rgba(var(--mass),${0.5 * values[n]})` });
    }
  }
  pairs(main, "Options", Object.entries(run.config).map(([k, v]) => [k, typeof v === "string" ? v : JSON.stringify(v)]));
  return null;
}

function pairs(parent, title, rows) {
  add(parent, "h3", { text: title });
  const body = add(add(add(parent, "div", { class: "scroll" }), "table"), "tbody");
  for (const [name, value] of rows) {
    const row = add(body, "tr");
    add(row, "th", { scope: "row", text: name });
    add(row, "td", { text: value });
  }
}

// -- what was chosen -----------------------------------------------------------------------------------

const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const explored = { layer: 0, head: 0, row: null };

function choices([wanted]) {
  add(main, "h2", { text: "What was chosen" });
  const ids = Object.keys(DATA.patterns);
  const id = ids.includes(wanted) ? wanted : ids[0];
  if (!id) return add(main, "p", { text: "No run here was looked at by astbench analyze." });
  const found = DATA.patterns[id], paths = Object.keys(found.layers);
  const live = found.rows.map((_, n) => n).filter((n) => found.real[n]);
  explored.layer = Math.min(explored.layer, paths.length - 1);
  if (!live.includes(explored.row)) explored.row = live[live.length - 1];
  const filters = add(main, "div", { class: "filters" });
  choose(filters, "Run", ids.map((i) => [i, `${i}: ${RUNS.get(i).label}`]), id, (v) => { location.hash = `#/choices/${encodeURIComponent(v)}`; });
  choose(filters, "Layer", paths.map((p, n) => [String(n), `${n}: ${p}`]), String(explored.layer), (v) => { explored.layer = Number(v); route(); });
  const layer = found.layers[paths[explored.layer]], { heads, blocks, block_size: size } = layer;
  explored.head = Math.min(explored.head, heads - 1);
  choose(filters, "Head", Array.from({ length: heads }, (_, n) => [String(n), String(n)]), String(explored.head), (v) => { explored.head = Number(v); draw(); });
  choose(filters, "Query", live.map((n) => [String(n), `token ${found.rows[n]}: ${JSON.stringify(found.tokens[found.rows[n]])}`]), String(explored.row), (v) => { explored.row = Number(v); draw(); });
  add(main, "p", { class: "quiet", text: `Rows are queries, from the first token down to the last; columns are blocks of ${size} keys. Blue is where dense attention of the same queries and keys would look; orange marks what was kept. Click a row, or move with the arrow keys: up and down through queries, left and right through heads.` });
  const said = add(main, "p", { role: "status" });
  const mass = bytesOf(layer.mass), bits = bytesOf(layer.chosen), wide = Math.ceil(blocks / 8);
  const at = (row, block) => (mass[(explored.head * found.rows.length + row) * blocks + block] / 255) ** 2;
  const kept = (row, block) => (bits[(explored.head * found.rows.length + row) * wide + (block >> 3)] >> (7 - (block & 7))) & 1;
  const cell = Math.max(5, Math.min(18, Math.floor(900 / blocks)));
  const tall = Math.max(5, Math.min(cell, Math.floor(500 / found.rows.length)));
  const box = add(main, "div", { class: "matrix", tabindex: "0", role: "application", "aria-label": "queries and the blocks of keys that they kept", onkeydown: move });
  const canvas = add(box, "canvas", { width: blocks * cell, height: found.rows.length * tall, onclick: (event) => {
    const row = Math.floor(event.offsetY / tall);
    if (found.real[row]) { explored.row = row; draw(); }
  } });
  add(main, "h3", { text: "Over the tokens" });
  const text = add(main, "div", { class: "text", id: "tokens" });

  function move(event) {
    const place = live.indexOf(explored.row);
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    explored.row = live[Math.max(0, Math.min(live.length - 1, place + step[0]))];
    explored.head = Math.max(0, Math.min(heads - 1, explored.head + step[1]));
    draw();
  }

  function draw() {
    const [, , head, query] = filters.querySelectorAll("select");
    head.value = String(explored.head);
    query.value = String(explored.row);
    const style = getComputedStyle(document.documentElement), pen = canvas.getContext("2d");
    const [blue, orange, ink] = ["--mass", "--kept", "--text"].map((name) => style.getPropertyValue(name).trim());
    pen.clearRect(0, 0, canvas.width, canvas.height);
    for (const row of live) for (let block = 0; block < blocks; block++) {
      const y = row * tall, x = block * cell;
      pen.fillStyle = `rgba(${blue},${Math.sqrt(at(row, block))})`;
      pen.fillRect(x, y, cell, tall);
      if (kept(row, block)) { pen.fillStyle = orange; pen.fillRect(x, y + tall - 2, cell - 1, 2); }
    }
    pen.strokeStyle = ink;
    pen.strokeRect(0.5, explored.row * tall + 0.5, canvas.width - 1, tall - 1);
    const place = found.rows[explored.row];
    let held = 0, count = 0;
    text.replaceChildren();
    for (let block = 0; block < blocks; block++) {
      const weight = at(explored.row, block), taken = kept(explored.row, block);
      if (taken) { held += weight; count += 1; }
      const first = block * size, tokens = found.tokens.slice(first, first + size);
      const span = add(text, "span", { class: `${taken ? "kept" : ""}${weight === 0 && !taken ? " later" : ""}`, style: `background:rgba(var(--mass),${0.7 * Math.sqrt(weight)})`, title: `block ${block}: ${fixed(100 * weight, 1)}% of the mass${taken ? ", kept" : ""}` });
      if (place >= first && place < first + tokens.length) {
        span.append(tokens.slice(0, place - first).join(""));
        add(span, "span", { class: "query", text: tokens[place - first] });
        span.append(tokens.slice(place - first + 1).join(""));
      } else span.textContent = tokens.join("");
    }
    said.textContent = `Layer ${explored.layer}, head ${explored.head}, token ${place}: ${count} block${count === 1 ? "" : "s"} kept, ${fixed(100 * held, 1)}% of dense attention's mass on them.`;
  }
  draw();
  return null;
}

addEventListener("hashchange", () => { route(); main.focus({ preventScroll: true }); scrollTo(0, 0); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", route);
route();
