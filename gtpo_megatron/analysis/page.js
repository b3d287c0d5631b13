"use strict";
const byId = id => document.getElementById(id);
const summary = JSON.parse(byId("summary").textContent), figures = summary.figures, parts = summary.parts;
const steps = figures.by_step, LN2 = Math.LN2, other = summary.other;
const state = { part: 0, group: 0, colour: "weight", view: "text", query: "", behind: null };
let loaded = null, search = 0, drawn = 0;

// All text of the dump goes through textContent: nothing in it is ever read as HTML.
function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}
const show = (value, digits = 3) => value === null || value === undefined ? "not known"
  : Number.isInteger(value) ? value.toLocaleString("en") : Math.abs(value) < 0.001 ? value.toExponential(1) : value.toFixed(digits);
const percent = value => value === null || value === undefined ? "not known" : (100 * value).toFixed(2) + " %";

async function load(index) {
  const bytes = Uint8Array.from(atob(byId("part-" + index).textContent), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function cards() {
  const facts = [["completions", show(figures.completions)], ["groups", show(figures.groups)],
    ["groups without signal", show(figures.groups_without_signal)], ["tokens", show(figures.tokens)],
    ["protected (weight 0)", percent(figures.conflict.protected_share)],
    ["amplified (weight 2)", percent(figures.conflict.amplified_share)],
    ["GRPO's coefficients on conflict tokens", percent(figures.grpo_gradient.coefficient_share)],
    ["reward, mean", show(figures.reward.mean)], ["length, mean", show(figures.length.mean, 1)],
    ["truncated", percent(figures.truncated)], ["repeated 4-grams", percent(figures.repetition)],
    ["first entropy (ln 2 = 0.693)", show(figures.entropy.initial)]];
  for (const [name, value] of facts) {
    const card = make("div", "card", "");
    card.append(make("b", "", value), make("span", "soft", name));
    byId("cards").append(card);
  }
  byId("title").textContent = summary.title;
  byId("about").textContent = `${figures.format}, ${steps.length} steps. The weights are those that GTPO gives each token.`;
  for (const lack of figures.lacks) byId("lacks").lastElementChild.append(make("li", "", lack));
  byId("lacks").hidden = !figures.lacks.length;
}

// What a completion puts into the gradient, as far as the dump says: its coefficient, or |advantage| / length.
const force = c => Math.abs(c.k ?? c.a / Math.max(1, c.n)) * pulled(c);
// Sum over its tokens of weight times 1 - p, the pull on the sampled token's own logit; without log-probabilities of weights.
function pulled(c) {
  let sum = 0;
  c.t.forEach((_, k) => {
    const logprob = c.tl ? c.tl[k] : c.lp ? c.lp[k] : null;
    sum += weight(c, place(c, k)) * (logprob === null ? 1 : -Math.expm1(Math.min(0, logprob / 100)));
  });
  return sum * c.n / Math.max(1, c.t.length);
}
const gapOf = c => c.tl && c.lp ? Math.max(0, ...c.tl.map((v, k) => Math.abs(v - c.lp[k]))) : null;
const entropyOf = c => c.h ?? (c.e ? c.e.reduce((a, b) => a + b, 0) / Math.max(1, c.e.length) / 100 : null);
const conflictOf = (c, sign) => Math.sign(c.a) === sign ? Math.min(c.n, c.p + c.s) : 0;

// Name, value of a step, a rule, and what makes a completion stand behind a high value (or, with "low", a low one).
const CHARTS = [
  ["gradient norm", s => s.metrics?.grad_norm, undefined, force],
  ["loss", s => s.metrics?.loss, undefined, force],
  ["|trainer \u2212 sampler| logprob, largest", s => s.metrics?.["logprob_gap/max"], undefined, gapOf],
  ["protected share", s => s.protected_tokens / s.tokens, undefined, c => conflictOf(c, -1)],
  ["amplified share", s => s.amplified_tokens / s.tokens, undefined, c => conflictOf(c, 1)],
  ["groups without signal, share", s => s.groups_without_signal / s.groups, undefined, c => c.a === 0 ? 1 : 0],
  ["reward", s => s.reward, undefined, c => c.r ?? null], ["length", s => s.length, undefined, c => c.n],
  ["entropy, nats", s => s.entropy, LN2, entropyOf],
  ["gate passes, share", s => s.gate_pass, undefined, c => c.gate ?? null],
  ["truncated, share", s => s.truncated, undefined, c => c.u ? c.n : 0],
  ["repeated 4-grams, share", s => s.repetition, undefined, repeated],
  ["different completions in a group, share", s => s.diversity, undefined, () => null],
  ["staleness, steps", s => s.staleness, undefined, c => c.age ?? null]];

function repeated(c) {
  const seen = new Set();
  for (let k = 0; k + 4 <= c.t.length; k++) seen.add(c.t.slice(k, k + 4).join());
  return Math.max(0, c.t.length - 3) - seen.size;
}

const median = values => { const s = [...values].sort((a, b) => a - b); return s.length % 2 ? s[s.length >> 1] : (s[s.length / 2 - 1] + s[s.length / 2]) / 2; };

// Points far from their neighbourhood: over 5 times the usual distance (and a tenth of the value) from the median of 15 steps.
function spikesOf(points) {
  const found = [];
  points.forEach(([i, y], k) => {
    const near = points.slice(Math.max(0, k - 7), k + 8).map(([, v]) => v);
    if (near.length < 8) return;
    const middle = median(near), usual = median(near.map(v => Math.abs(v - middle)));
    const distance = Math.abs(y - middle);
    if (distance > 5 * usual && distance > 0.1 * Math.abs(middle)) found.push({ step: steps[i].step, y, middle, times: distance / (usual || distance) });
  });
  return found;
}

// The completion of a step that has most of something (or least), and its place.
async function behind(step, score, low) {
  let best = null;
  for (let index = 0; index < parts.length; index++) {
    if (parts[index].side || parts[index].step !== step) continue;
    const data = index === state.part && loaded ? loaded : await load(index);
    data.groups.forEach((group, g) => group.c.forEach((c, i) => {
      const value = score(c);
      if (value !== null && Number.isFinite(value) && (best === null || (low ? value < best.value : value > best.value)))
        best = { value, part: index, group: g, completion: i };
    }));
  }
  return best;
}

async function open(step, score, low, name) {
  const mine = ++search;
  const best = await behind(step, score, low);
  if (mine !== search) return;
  if (best === null) { await go(parts.findIndex(p => !p.side && p.step === step), 0); return; }
  await go(best.part, best.group, best.completion);
  byId("status").textContent = `step ${step}, ${name}: the ${low ? "least" : "most"} of it has completion #${best.completion} here, outlined.`;
}

function spikes() {
  const all = [];
  for (const [name, value, , score] of CHARTS)
    for (const spike of spikesOf(steps.map((s, i) => [i, value(s)]).filter(([, y]) => Number.isFinite(y)))) all.push({ ...spike, name, score });
  all.sort((a, b) => b.times - a.times);
  for (const { step, name, y, middle, score } of all.slice(0, 12)) {
    const button = make("button", "", `step ${step}: ${name} ${show(y)}, ${show(middle)} around it`);
    button.addEventListener("click", () => open(step, score, y < middle, name));
    byId("spikes").lastElementChild.append(button);
  }
  byId("spikes").hidden = !all.length;
}

function chart(name, value, rule, score) {
  const points = steps.map((s, i) => [i, value(s)]).filter(([, y]) => Number.isFinite(y));
  const others = (other?.by_step ?? []).map((s, i) => [i, value(s)]).filter(([, y]) => Number.isFinite(y));
  if (!points.length) return;
  const box = make("div", "card chart"), space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const ys = points.concat(others).map(([, y]) => y).concat(rule === undefined ? [] : [rule]);
  const low = Math.min(...ys), high = Math.max(...ys), span = high - low || 1;
  const longest = Math.max(steps.length, other ? other.by_step.length : 0);
  const x = i => longest > 1 ? 8 + 284 * i / (longest - 1) : 150, y = v => high === low ? 45 : 82 - 74 * (v - low) / span;
  const draw = (tag, attributes) => {
    const node = document.createElementNS(space, tag);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    svg.append(node);
    return node;
  };
  svg.setAttribute("viewBox", "0 0 300 90"); svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${name} over the steps, from ${show(low)} to ${show(high)}`);
  if (rule !== undefined) draw("line", { class: "rule", x1: 0, x2: 300, y1: y(rule), y2: y(rule) });
  const line = series => series.map(([i, v], k) => (k ? "L" : "M") + x(i) + " " + y(v)).join("");
  if (others.length) draw("path", { class: "other", d: line(others) });
  draw("path", { d: line(points) });
  const high_at = points.length ? median(points.map(([, v]) => v)) : 0;
  const every = Math.max(1, Math.ceil(points.length / 120));
  points.forEach(([i, v], k) => {
    if (k % every && k !== points.length - 1) return;
    const dot = draw("circle", { cx: x(i), cy: y(v), r: 4, "data-step": steps[i].step });
    const title = document.createElementNS(space, "title");
    title.textContent = `step ${steps[i].step}: ${show(v, 4)}`;
    dot.append(title);
    dot.addEventListener("click", () => open(steps[i].step, score, v < high_at, name));
  });
  box.append(make("span", "", name), make("span", "soft", `  ${show(points[0][1])} \u2192 ${show(points.at(-1)[1])}`), svg);
  byId("charts").append(box);
}

function strings() {
  const table = make("table", "plain"), head = make("tr");
  for (const name of ["token", "id", "protected", "amplified"]) head.append(make("th", "", name));
  table.append(head);
  for (const s of figures.conflict.strings) {
    const row = make("tr");
    row.append(make("td", "", s.text === null ? String(s.token) : JSON.stringify(s.text)), make("td", "", String(s.token)),
      make("td", "", show(s.protected)), make("td", "", show(s.amplified)));
    table.append(row);
  }
  byId("strings").lastElementChild.append(table);
  byId("strings").hidden = !figures.conflict.strings.length;
}

const word = (token, data) => data.v[token] ?? `\u27e8${token}\u27e9`;
// Place of a shown token in its whole completion: of a long one only the two ends are in this file.
const place = (c, k) => c.t.length === c.n || k < c.t.length / 2 ? k : c.n - c.t.length + k;
const weight = (c, t) => { const what = kind(c, t); return what === "protected" ? 0 : what ? 2 : 1; };
const kind = (c, t) => c.a === 0 || (t >= c.p && t < c.n - c.s) ? "" : c.a < 0 ? "protected" : "amplified";

// Colours by what a token has: name -> [strength from 0 to 1, or null where this dump does not say it].
const STRENGTH = {
  logprob: (c, k) => c.lp ? Math.min(1, -c.lp[k] / 500) : null,
  "trainer's logprob": (c, k) => c.tl ? Math.min(1, -c.tl[k] / 500) : null,
  "trainer \u2212 sampler": (c, k) => c.tl && c.lp ? Math.min(1, Math.abs(c.tl[k] - c.lp[k]) / 50) : null,
  entropy: (c, k) => c.e ? Math.min(1, c.e[k] / 300) : null,
  gradient: (c, k, most) => {
    const logprob = c.tl ? c.tl[k] : c.lp ? c.lp[k] : null;
    return logprob === null || !most ? null : Math.min(1, pullOf(c) * weight(c, place(c, k)) * -Math.expm1(Math.min(0, logprob / 100)) / most);
  } };
// Coefficient of a completion's tokens: training's own where it was recorded, else |A| / L.
const pullOf = c => Math.abs(c.k ?? c.a / Math.max(1, c.n));

function paint(node, c, k, most) {
  const t = place(c, k), what = kind(c, t);
  if (state.colour === "weight" && what) node.classList.add(what);
  const strength = STRENGTH[state.colour]?.(c, k, most);
  if (strength) node.style.background = `rgba(var(--scale), ${(0.75 * strength).toFixed(2)})`;
  const said = [["logprob", c.lp], ["trainer's", c.tl], ["entropy", c.e]].filter(([, values]) => values)
    .map(([name, values]) => `, ${name} ${(values[k] / 100).toFixed(2)}`).join("");
  node.title = `token ${t}, id ${c.t[k]}` + (what ? `, in conflict, ${what}` : "") + said;
}

function facts(c, i) {
  const line = make("div", "facts");
  line.append(make("b", "", `#${i}`));
  const terms = Object.entries(c.terms || {}).map(([name, value]) => `${name} ${show(value)}`).join(", ");
  line.append(make("span", "soft", [c.r === undefined ? "" : `reward ${show(c.r)}${terms ? ` (${terms})` : ""}`,
    `advantage ${show(c.a)}`, c.h === undefined ? "" : `entropy ${show(c.h)}`, c.gate === 0 ? "dropped by the gate" : "",
    c.k === undefined ? "" : `coefficient ${c.k.toPrecision(3)}`, `${c.n} tokens`, `conflict ${c.p} + ${c.s}`, c.u ? "truncated" : "",
    c.age === undefined || c.age === null ? "" : `${show(c.age, 1)} steps old`, `row ${c.row}`].filter(Boolean).join(" \u00b7 ")));
  return line;
}

function asText(c, data, most) {
  const node = make("div", "tokens");
  c.t.forEach((token, k) => {
    if (k === c.t.length / 2 && c.t.length < c.n) node.append(make("span", "gap", ` \u2026 ${c.n - c.t.length} tokens that are not in this file \u2026 `));
    const span = make("span", "", word(token, data));
    paint(span, c, k, most);
    node.append(span);
  });
  return node;
}

function aligned(group, fromEnd, data, most) {
  const table = make("table", "aligned"), width = Math.min(400, Math.max(...group.c.map(c => c.t.length)));
  group.c.forEach((c, i) => {
    const row = make("tr"), half = c.t.length === c.n ? c.t.length : c.t.length / 2, n = Math.min(width, half);
    row.append(make("th", "", `#${i} ${c.a > 0 ? "+" : c.a < 0 ? "\u2212" : "0"}`));
    if (fromEnd) for (let k = n; k < width; k++) row.append(make("td"));
    for (let k = 0; k < n; k++) {
      const at = fromEnd ? c.t.length - n + k : k, cell = make("td", "k", word(c.t[at], data).replaceAll("\n", "\u23ce"));
      paint(cell, c, at, most);
      row.append(cell);
    }
    table.append(row);
  });
  const scroll = make("div", "scroll");
  scroll.tabIndex = 0;
  scroll.append(table);
  if (fromEnd) requestAnimationFrame(() => { scroll.scrollLeft = scroll.scrollWidth; });
  return scroll;
}

const content = (c, data) => c.x ?? c.t.map(token => data.v[token] ?? ` ${token}`).join("");

function render() {
  const list = byId("groups"), target = byId("group"), group = loaded.groups[state.group];
  list.replaceChildren(...loaded.groups.map((g, i) => {
    const conflict = g.c.some(c => c.p + c.s > 0), silent = g.c.every(c => c.a === 0);
    const button = make("button", "", `${g.g}${silent ? " \u2205" : conflict ? " \u26a1" : ""}`);
    button.title = silent ? "no signal: all advantages are 0" : conflict ? "has conflict tokens" : "no conflict";
    button.setAttribute("aria-current", i === state.group);
    button.addEventListener("click", () => go(state.part, i));
    return button;
  }));
  const chosen = list.children[state.group];  // scrolled by hand: scrollIntoView would move the page, too
  if (chosen.offsetTop < list.scrollTop || chosen.offsetTop + chosen.offsetHeight > list.scrollTop + list.clientHeight)
    list.scrollTop = chosen.offsetTop;
  draw(target, group, loaded, `Group ${group.g}, ${group.c.length} completions`, state.behind);
  const step = parts[state.part].step;
  for (const dot of document.querySelectorAll("circle")) dot.classList.toggle("here", Number(dot.dataset.step) === step);
  byId("step").value = state.part;
  byId("status").textContent = "\u26a1 has conflict tokens, \u2205 no signal; underlined twice: amplified, dotted: protected." + unknown(group);
  if (other) beside(group, step);
}

// Which of the chosen colour's figures this dump does not hold; a colour that is not there must not look like a small value.
function unknown(group) {
  const strength = STRENGTH[state.colour];
  const lacks = strength && group.c.some(c => c.t.length && strength(c, 0, 1) === null);
  return lacks ? ` ${state.colour} is not known of ${group.c.every(c => !c.t.length || strength(c, 0, 1) === null) ? "these" : "some"} completions: nothing is coloured there.` : "";
}

// A group with its completions in a section of the page.
function draw(target, group, data, title, chosen) {
  const most = Math.max(...group.c.map(c => 2 * pullOf(c)));
  target.replaceChildren(make("h2", "", title));
  if (group.prompt) target.append(make("pre", "", group.prompt));
  if (state.view !== "text") target.append(aligned(group, state.view === "end", data, most));
  group.c.forEach((c, i) => {
    const box = make("div", "completion");
    if (state.query && content(c, data).toLowerCase().includes(state.query)) box.classList.add("hit");
    if (i === chosen) box.classList.add("behind");
    box.append(facts(c, i));
    if (state.view === "text") box.append(asText(c, data, most));
    if (c.x !== undefined) {
      const more = make("details"); more.append(make("summary", "", "text"), make("pre", "", c.x)); box.append(more);
    }
    target.append(box);
  });
  target.querySelector(".behind")?.scrollIntoView({ block: "nearest" });
}

// The same prompt in the other run: at the same step if it was asked there, else at the nearest one.
async function beside(group, step) {
  const mine = ++drawn, target = byId("beside");
  const places = parts.flatMap((p, part) => p.side ? p.keys.map((key, g) => [key, part, g]) : []).filter(([key]) => key && key === group.key);
  places.sort((a, b) => Math.abs(parts[a[1]].step - step) - Math.abs(parts[b[1]].step - step));
  if (!places.length) {
    target.replaceChildren(make("h2", "", other.title), make("p", "soft", "This prompt is not among the other run's."));
    return;
  }
  const [, part, g] = places[0], data = await load(part);
  if (mine !== drawn) return;
  const found = data.groups[g];
  draw(target, found, data, `${other.title}: step ${parts[part].step}, group ${found.g}, ${found.c.length} completions`, null);
}

async function go(part, group, completion = null) {
  if (part < 0 || part >= parts.length || parts[part].side) return;
  if (part !== state.part || !loaded) {
    byId("status").textContent = "reading\u2026";
    const data = await load(part);
    loaded = data;
  }
  state.part = part;
  state.behind = completion;
  state.group = Math.max(0, Math.min(group, loaded.groups.length - 1));
  history.replaceState(null, "", `#part=${state.part}&group=${state.group}`);
  render();
}

async function find(query) {
  const mine = ++search, results = byId("results");
  state.query = query.toLowerCase();
  results.replaceChildren();
  if (!query) { render(); return; }
  let hits = 0;
  for (let k = 0; k < parts.length && hits < 100; k++) {
    const index = (state.part + k) % parts.length;
    if (parts[index].side) continue;
    const data = index === state.part ? loaded : await load(index);
    if (mine !== search) return;
    byId("status").textContent = `searching: ${k + 1} of ${parts.length}, found ${hits}`;
    data.groups.forEach((group, g) => group.c.forEach((c, i) => {
      const text = content(c, data), at = text.toLowerCase().indexOf(state.query);
      if (at < 0 || hits >= 100) return;
      hits++;
      const button = make("button", "", `step ${parts[index].step}, group ${group.g}, #${i}: ${text.slice(Math.max(0, at - 30), at + 60)}`);
      button.addEventListener("click", () => go(index, g));
      results.append(button);
    }));
  }
  byId("status").textContent = `${hits}${hits === 100 ? " or more" : ""} found`;
}

function cycle(id) {
  const select = byId(id);
  select.selectedIndex = (select.selectedIndex + 1) % select.options.length;
  select.dispatchEvent(new Event("change"));
}

function start() {
  cards(); strings();
  for (const entry of CHARTS) chart(...entry);
  spikes();
  if (other) {
    byId("beside").hidden = byId("sides").hidden = false;
    document.querySelector(".both").classList.add("two");
    byId("sides").append(make("span", "key"), ` ${summary.title} `, make("span", "key other"), ` ${other.title}; steps count from each one's first.`);
  }
  parts.forEach((p, i) => {
    if (p.side) return;
    const several = parts.filter(q => !q.side && q.step === p.step).length > 1;
    const option = make("option", "", several ? `${p.step}, part ${p.part + 1}` : String(p.step));
    option.value = i;
    byId("step").append(option);
  });
  for (const name of ["weight", ...Object.keys(STRENGTH), "none"]) byId("colour").append(make("option", "", name));
  byId("step").addEventListener("change", event => go(Number(event.target.value), 0));
  byId("colour").addEventListener("change", event => { state.colour = event.target.value; render(); });
  byId("view").addEventListener("change", event => { state.view = event.target.value; render(); });
  byId("before").addEventListener("click", () => go(state.part - 1, 0));
  byId("after").addEventListener("click", () => go(state.part + 1, 0));
  byId("help").addEventListener("click", () => { byId("keys").hidden = !byId("keys").hidden; });
  byId("search").addEventListener("change", event => find(event.target.value));
  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey || /INPUT|SELECT/.test(event.target.tagName)) return;
    const keys = { "[": () => go(state.part - 1, 0), "]": () => go(state.part + 1, 0), j: () => go(state.part, state.group + 1),
      k: () => go(state.part, state.group - 1), c: () => cycle("colour"), v: () => cycle("view"),
      "/": () => byId("search").focus(), "?": () => byId("help").click() };
    if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
  });
  const asked = new URLSearchParams(location.hash.slice(1));
  const step = asked.get("step"), part = step === null ? Number(asked.get("part") ?? 0) : parts.findIndex(p => !p.side && p.step === Number(step));
  go(part >= 0 && part < parts.length ? part : 0, Number(asked.get("group") ?? 0) || 0);
}
start();
