"use strict";
// All text of a completion reaches the page through `textContent`, never as markup.

const DATA = JSON.parse(document.getElementById("data").textContent);
const PAGE = 2000; // tokens on the page at once
const POINTS = 300; // of a curve
const KNOWN = {
  credit: { name: "Credit", kind: "diverging", center: 0 },
  advantage: { name: "Advantage", kind: "diverging", center: 0 },
  value: { name: "Value", kind: "sequential" },
  value_change: { name: "Value change", kind: "diverging", center: 0 },
  weight: { name: "Effective weight", kind: "sequential" },
  ratio: { name: "Ratio", kind: "diverging", center: 1 },
  logp: { name: "Log-probability", kind: "reversed" },
  entropy: { name: "Entropy", kind: "sequential" },
  ref_logp: { name: "Reference log-probability", kind: "reversed" },
  token_reward: { name: "Reward of the token", kind: "diverging", center: 0 },
  return: { name: "Return", kind: "sequential" },
};
const $ = (id) => document.getElementById(id);

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function draw(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const name in attributes) element.setAttribute(name, attributes[name]);
  return element;
}

// --- Text

// Characters that cannot be seen, or that would move others, are spelled out; so are piles of combining marks.
function visible(text) {
  return text
    .replace(/(\p{M}{4})(\p{M}+)/gu, (_, kept, rest) => `${kept}‹+${[...rest].length} marks›`)
    .replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/gu, (c) =>
      c === "\n" || c === "\t" || c === "\u200d" || c === "\u200c"
        ? c
        : `‹U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}›`)
    .replace(/^\p{M}/u, "◌$&");
}

function number(x, signed) {
  if (x === null || x === undefined) return "–";
  const text = x !== 0 && Math.abs(x) < 0.001 ? x.toExponential(1) : Number(x.toPrecision(4)).toString();
  return signed && x > 0 ? `+${text}` : text.replaceAll("-", "−");
}

const count = (n, thing) => `${n.toLocaleString("en")} ${thing}${n === 1 ? "" : "s"}`;
const quantityName = (name) => (KNOWN[name] ? KNOWN[name].name : name);
const verdict = (c) => (c.right === null ? "" : c.right ? "✓ right" : "✗ wrong");
const origin = (c) => (c.method === c.source ? c.source : `${c.method}, ${c.source}`);

// --- Numbers

const isTrained = (c, i) => c.trained === null || c.trained[i] === 1;

function at(c, name, i) {
  const column = c.columns[name];
  if (column === undefined || !isTrained(c, i)) return null;
  return Array.isArray(column) ? column[i] : column;
}

const numbersOf = (c, name) => c.tokens.map((_, i) => at(c, name, i)).filter((x) => x !== null);
// A completion that is cut in the middle keeps the positions of its tokens.
const position = (c, i) => (i < c.cutAt ? i : i + c.leftOut);
const index = (c, p) =>
  p < c.cutAt ? p : Math.max(Math.min(c.cutAt, c.tokens.length - 1), Math.min(p - c.leftOut, c.tokens.length - 1));

const scales = new Map();
// What the ends of the colours stand for: the range of all completions of a method but the outermost hundredth.
function scaleOf(name, origins) {
  const key = JSON.stringify([name, origins]);
  if (scales.has(key)) return scales.get(key);
  const all = DATA.completions.filter((c) => origins.includes(origin(c))).flatMap((c) => numbersOf(c, name));
  all.sort((a, b) => a - b);
  const quantile = (q) => all[Math.min(all.length - 1, Math.floor(q * all.length))];
  let { kind, center } = KNOWN[name] || { kind: "sequential" };
  if (!KNOWN[name] && all[0] < 0) [kind, center] = ["diverging", 0];
  let low = quantile(0.01), high = quantile(0.99);
  if (kind === "diverging") {
    const reach = Math.max(Math.abs(high - center), Math.abs(low - center)) || Math.max(Math.abs(all[0] - center), Math.abs(all.at(-1) - center)) || 1;
    [low, high] = [center - reach, center + reach];
  } else if (name === "entropy" || name === "weight") low = Math.min(0, low);
  else if (kind === "reversed") high = Math.max(0, high);
  if (high <= low) high = low + 1;
  const scale = { kind, center, low, high, clipped: all.length > 0 && (all[0] < low || all.at(-1) > high) };
  scales.set(key, scale);
  return scale;
}

function paint(element, x, scale) {
  let t;
  if (scale.kind === "diverging") {
    t = (x - scale.center) / (scale.high - scale.center);
    element.classList.add(t < 0 ? "below" : "above");
    t = Math.abs(t);
  } else {
    t = (x - scale.low) / (scale.high - scale.low);
    if (scale.kind === "reversed") t = 1 - t;
    element.classList.add("more");
  }
  t = Math.round(100 * Math.min(1, Math.max(0, t)));
  if (t === 0) element.classList.remove("below"); // too small to be seen is too small to be underlined
  element.style.setProperty("--t", t);
}

// --- Curves

// A path through the means of neighbouring tokens, in a box of 1000 x 100, with its range.
function curve(c, name) {
  const sums = new Map();
  for (let i = 0; i < c.tokens.length; i++) {
    const x = at(c, name, i);
    if (x === null) continue;
    const bin = Math.floor((position(c, i) / c.length) * Math.min(POINTS, c.length));
    const [sum, n] = sums.get(bin) || [0, 0];
    sums.set(bin, [sum + x, n + 1]);
  }
  const bins = Math.min(POINTS, c.length);
  const means = [...sums].map(([bin, [sum, n]]) => [bin, sum / n]);
  if (!means.length) return null;
  const low = Math.min(...means.map((m) => m[1])), high = Math.max(...means.map((m) => m[1]));
  const y = (x) => (high === low ? 50 : 92 - (84 * (x - low)) / (high - low));
  let path = "", last = null;
  for (const [bin, mean] of means) {
    path += `${last === null || c.leftOut && bin - last > 2 ? "M" : "L"}${((bin + 0.5) / bins) * 1000} ${y(mean)}`;
    last = bin;
  }
  return { path: means.length === 1 ? path + "h0" : path, alone: means.length === 1, low, high, zero: low < 0 && high > 0 ? y(0) : null };
}

const curveName = (c) => (c.columns.value !== undefined ? "value" : state.quantity);

function sketch(c) {
  const svg = draw("svg", { viewBox: "0 0 1000 100", preserveAspectRatio: "none", "aria-hidden": "true" });
  const line = c.columns[curveName(c)] === undefined ? null : curve(c, curveName(c));
  if (line) svg.append(draw("path", { d: line.path, class: line.alone ? "dots" : "" }));
  return svg;
}

// What the policy's gradient multiplies a token's log-probability by: the advantage, times its trace weight if it has one.
for (const c of DATA.completions) {
  if (c.columns.advantage === undefined || c.columns.credit !== undefined) continue;
  const credit = (i) => { const a = at(c, "advantage", i), w = at(c, "weight", i); return a === null || w === null ? null : a * w; };
  c.columns.credit = c.columns.weight === undefined ? c.columns.advantage : c.tokens.map((_, i) => credit(i));
}

// --- State

const names = new Set(DATA.completions.flatMap((c) => Object.keys(c.columns)));
const QUANTITIES = [...Object.keys(KNOWN).filter((n) => names.has(n)), ...[...names].filter((n) => !KNOWN[n]).sort()];
// The first quantity that differs from token to token, if there is one.
const varied = QUANTITIES.find((n) => DATA.completions.some((c) => Array.isArray(c.columns[n])));
const state = { quantity: varied || QUANTITIES[0] || "", selected: null, beside: null, panels: [] };

function options(select, pairs) {
  select.replaceChildren(...pairs.map(([value, text]) => {
    const option = make("option", "", text);
    option.value = value;
    return option;
  }));
}

const short = (text, length) => visible(text.length > length ? `${text.slice(0, length)}…` : text).replace(/\s+/g, " ");

function setUp() {
  document.title = $("data") && DATA.title ? `${short(DATA.title, 80)}: credit` : "Credit";
  document.querySelector("h1").textContent = short(DATA.title, 80);
  options($("quantity"), QUANTITIES.length ? QUANTITIES.map((n) => [n, quantityName(n)]) : [["", "nothing to colour by"]]);
  $("quantity").value = state.quantity;
  options($("outcome"), [["", "all"], ["right", "right"], ["wrong", "wrong"]]);
  const steps = [...new Set(DATA.completions.map((c) => c.step))].sort((a, b) => a - b);
  options($("step"), [["", "all"], ...steps.map((s) => [s, s])]);
  const asked = DATA.prompts.map((text, i) => [i, `${short(text, 60) || "(none)"} (${DATA.completions.filter((c) => c.prompt === i).length})`]);
  options($("prompt"), [["", `all ${DATA.prompts.length}`], ...asked]);
  const origins = [...new Set(DATA.completions.map(origin))];
  options($("origin"), [["", "all"], ...origins.map((o) => [o, o])]);
  $("of-origin").hidden = origins.length < 2;
  DATA.completions.forEach((c, i) => { c.at = i; });

  for (const id of ["outcome", "step", "prompt", "origin"]) $(id).addEventListener("change", showList);
  $("quantity").addEventListener("change", () => { state.quantity = $("quantity").value; showList(); });
  $("beside").addEventListener("change", () => { state.beside = $("beside").value === "" ? null : DATA.completions[$("beside").value]; showPanels(); });
  $("scale").addEventListener("change", showPanels);
  $("theme").addEventListener("click", toggleTheme);
  $("list").addEventListener("click", (event) => { const item = event.target.closest("li"); if (item) select(Number(item.dataset.at)); });
  $("list").addEventListener("keydown", (event) => {
    const items = [...$("list").children];
    const now = items.findIndex((item) => Number(item.dataset.at) === state.selected?.at);
    const moves = { ArrowDown: now + 1, ArrowUp: now - 1, Home: 0, End: items.length - 1, PageDown: now + 10, PageUp: now - 10 };
    if (!(event.key in moves) || !items.length) return;
    event.preventDefault();
    select(Number(items[Math.max(0, Math.min(items.length - 1, moves[event.key]))].dataset.at));
  });
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("select, input") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "d") toggleTheme();
    const by = { "[": -1, "]": 1 }[event.key];
    if (by && QUANTITIES.length) {
      state.quantity = QUANTITIES[(QUANTITIES.indexOf(state.quantity) + by + QUANTITIES.length) % QUANTITIES.length];
      $("quantity").value = state.quantity;
      showList();
    }
  });
  const system = matchMedia("(prefers-color-scheme: dark)");
  const tell = () => $("theme").setAttribute("aria-pressed", String(isDark()));
  const isDark = () => (document.documentElement.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  function toggleTheme() {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    tell();
  }
  system.addEventListener("change", tell);
  tell();
}

// --- The list

function matching() {
  const [outcome, step, prompt, from] = ["outcome", "step", "prompt", "origin"].map((id) => $(id).value);
  return DATA.completions.filter((c) =>
    (outcome === "" || c.right === (outcome === "right")) && (step === "" || c.step === Number(step)) &&
    (prompt === "" || c.prompt === Number(prompt)) && (from === "" || origin(c) === from));
}

function showList() {
  const shown = matching();
  $("count").textContent = `${shown.length} of ${count(DATA.completions.length, "completion")}`;
  $("list").replaceChildren(...shown.map((c) => {
    const item = make("li");
    item.id = `completion-${c.at}`;
    item.dataset.at = c.at;
    item.setAttribute("role", "option");
    const what = make("div", "what");
    what.append(make("span", "", verdict(c)), make("span", "", c.reward === null ? "" : number(c.reward)), make("span", "", `step ${c.step} · ${count(c.length, "token")}`));
    item.append(what, sketch(c), make("div", "asked", short(DATA.prompts[c.prompt], 80)));
    return item;
  }));
  if (!shown.length) state.selected = state.beside = null;
  else if (!shown.includes(state.selected)) return select(shown[0].at);
  mark();
  showPanels();
}

function mark() {
  for (const item of $("list").children) item.setAttribute("aria-selected", String(Number(item.dataset.at) === state.selected?.at));
  if (state.selected) {
    $("list").setAttribute("aria-activedescendant", `completion-${state.selected.at}`);
    $(`completion-${state.selected.at}`)?.scrollIntoView({ block: "nearest" });
  }
}

function select(at) {
  const c = (state.selected = DATA.completions[at]);
  const rank = (o) => (o.text === c.text ? 0 : o.prompt === c.prompt ? 1 : 2);
  const others = DATA.completions.filter((o) => o !== c).sort((a, b) => rank(a) - rank(b));
  const label = (o) => `${["Same tokens: ", "Same prompt: ", ""][rank(o)]}${origin(o)}, step ${o.step}, row ${o.row} ${verdict(o)}`;
  options($("beside"), [["", "nothing"], ...others.map((o) => [o.at, label(o)])]);
  // The same tokens under another method belong together.
  state.beside = others.find((o) => o.text === c.text && origin(o) !== origin(c)) || null;
  $("beside").value = state.beside ? state.beside.at : "";
  history.replaceState(null, "", `#${at}`); // opened again, the page shows the same completion
  mark();
  showPanels();
}

// --- A completion

function showPanels() {
  const shown = [state.selected, state.beside].filter((c) => c);
  $("of-scale").hidden = shown.length < 2;
  document.querySelector(".choice").hidden = !shown.length;
  state.panels = shown.map((c) => panel(c, shown));
  $("panels").replaceChildren(...(shown.length ? state.panels.map((p) => p.element) : [make("p", "nothing", "No completion is like this. Choose other filters.")]));
}

function panel(c, shown) {
  const element = make("section", "panel");
  element.setAttribute("aria-label", `Completion: ${origin(c)}, step ${c.step}, row ${c.row}`);
  const p = { c, element, active: 0, page: 0 };

  const head = make("h2", "", `${origin(c)} · step ${c.step} · row ${c.row} `);
  if (c.right !== null) head.append(make("span", "verdict", verdict(c)));
  const facts = [c.reward === null ? "no reward" : `reward ${number(c.reward)}`];
  for (const name in c.rewards) facts.push(`${visible(name)} ${number(c.rewards[name])}`);
  facts.push(count(c.length, "token"));
  element.append(head, make("p", "facts", facts.join(" · ")));
  if (DATA.prompts[c.prompt]) element.append(fold("Prompt", DATA.prompts[c.prompt], DATA.prompts[c.prompt].length < 400));
  for (const name in c.facts) element.append(fold(visible(name), c.facts[name], false));

  const has = c.columns[state.quantity] !== undefined;
  const scale = has ? scaleOf(state.quantity, ($("scale").checked ? shown : [c]).map(origin)) : null;
  element.append(legend(scale, has));
  p.numbers = make("div", "numbers");
  p.numbers.setAttribute("role", "status");
  p.text = make("div", "tokens");
  p.text.tabIndex = 0;
  p.text.setAttribute("role", "listbox");
  p.text.setAttribute("aria-label", "Tokens; arrow keys move between them");
  p.pages = make("div", "pages");
  p.chart = chart(p);
  if (p.chart) element.append(p.chart.element);
  element.append(p.numbers, p.text, p.pages);
  if (c.segments.length) element.append(segmentList(p));

  p.show = (i, follow) => {
    i = Math.max(0, Math.min(c.tokens.length - 1, i));
    p.active = i;
    if (Math.floor(i / PAGE) !== p.page) fill(p, scale, Math.floor(i / PAGE));
    if (!c.tokens.length) return;
    for (const old of p.text.querySelectorAll(".active")) { old.classList.remove("active"); old.removeAttribute("aria-selected"); }
    const token = p.spans[i - p.page * PAGE];
    token.classList.add("active");
    token.setAttribute("aria-selected", "true");
    p.text.setAttribute("aria-activedescendant", token.id);
    if (follow) token.scrollIntoView({ block: "nearest" });
    tell(p, i);
    p.chart?.here(i);
  };
  fill(p, scale, 0);
  listen(p);
  p.show(0, false);
  return p;
}

function fold(name, text, open) {
  const details = make("details");
  details.open = open;
  details.append(make("summary", "", name), make("pre", "", visible(text)));
  return details;
}

function legend(scale, has) {
  const element = make("div", "legend");
  if (!has) {
    element.append(make("span", "", state.quantity ? `No ${quantityName(state.quantity).toLowerCase()} in this table.` : "This table has no numbers per token."));
    return element;
  }
  const { kind, low, high, clipped, center } = scale;
  element.append(make("span", "", `${quantityName(state.quantity)}:`), make("span", "", `${clipped ? "≤ " : ""}${number(low)}`), make("span", `bar ${kind}`), make("span", "", `${clipped ? "≥ " : ""}${number(high)}`));
  if (kind === "diverging") element.append(make("span", "", `below ${number(center)} underlined`));
  return element;
}

function fill(p, scale, page) {
  const { c } = p;
  p.page = page;
  const from = page * PAGE, to = Math.min(c.tokens.length, from + PAGE);
  const starts = new Map(c.segments.map((s, k) => [s.start, k]));
  const box = document.createDocumentFragment();
  p.spans = [];
  for (let i = from; i < to; i++) {
    if (i === c.cutAt && c.leftOut) box.append(make("span", "left-out", `… ${count(c.leftOut, "token")} left out …`));
    const segment = starts.get(position(c, i));
    if (segment !== undefined) {
      const button = make("button", "part-of", `${segment + 1}`);
      button.type = "button";
      button.dataset.segment = segment;
      button.title = `segment ${segment + 1}`;
      box.append(button);
    }
    const text = c.tokens[i], x = scale ? at(c, state.quantity, i) : null;
    const token = make("span", "tok");
    token.id = `${p.c === state.selected ? "a" : "b"}${i}`;
    token.dataset.i = i;
    token.setAttribute("role", "option");
    if (text === "") { token.classList.add("part"); token.textContent = "·"; }
    else write(token, visible(text));
    if (!isTrained(c, i)) token.classList.add("none");
    if (x !== null) paint(token, x, scale);
    p.spans.push(token);
    box.append(token);
  }
  p.text.replaceChildren(box);
  const pages = Math.ceil(c.tokens.length / PAGE);
  p.pages.replaceChildren();
  p.pages.hidden = pages < 2;
  if (pages > 1) {
    const turn = (by, name) => {
      const button = make("button", "", name);
      button.type = "button";
      button.disabled = page + by < 0 || page + by >= pages;
      button.addEventListener("click", () => p.show((page + by) * PAGE, true));
      return button;
    };
    const last = position(c, to - 1) + 1;
    p.pages.append(turn(-1, "← Earlier"), make("span", "", `tokens ${(position(c, from) + 1).toLocaleString("en")} to ${last.toLocaleString("en")} of ${c.length.toLocaleString("en")}`), turn(1, "Later →"));
  }
}

// Line breaks and tabs are seen, and still break the line.
function write(element, text) {
  if (!/[\n\t]/.test(text)) { element.textContent = text; return; }
  for (const part of text.split(/([\n\t])/)) {
    if (part === "\n") element.append(make("span", "sign", "↵"), "\n");
    else if (part === "\t") element.append(make("span", "sign", "⇥"), "\t");
    else element.append(part);
  }
}

function tell(p, i) {
  const { c } = p;
  const place = make("span", "", `${(position(c, i) + 1).toLocaleString("en")} / ${c.length.toLocaleString("en")}`);
  const token = make("span", "token", JSON.stringify(visible(c.tokens[i])) + (c.ids ? ` (${c.ids[i]})` : ""));
  p.numbers.replaceChildren(place, token);
  for (const name of QUANTITIES) {
    if (c.columns[name] === undefined) continue;
    const cell = make("span", name === state.quantity ? "chosen" : "", `${quantityName(name)} `);
    cell.dataset.name = name;
    cell.append(make("b", "", number(at(c, name, i), KNOWN[name]?.center === 0)));
    p.numbers.append(cell);
  }
  if (!isTrained(c, i)) p.numbers.append(make("span", "", "not trained on"));
  const k = c.segments.findIndex((s) => s.start <= position(c, i) && position(c, i) < s.end);
  if (k >= 0) p.numbers.append(make("span", "", `segment ${k + 1}: value ${number(c.segments[k].value)}, advantage ${number(c.segments[k].advantage, true)}`));
}

function chart(p) {
  const { c } = p;
  const name = c.columns[curveName(c)] === undefined ? Object.keys(c.columns)[0] : curveName(c);
  const line = name === undefined ? null : curve(c, name);
  if (!line) return null;
  const element = make("div", "chart");
  const svg = draw("svg", { viewBox: "0 0 1000 100", preserveAspectRatio: "none", role: "img", "aria-label": `${quantityName(name)} over position, from ${number(line.low)} to ${number(line.high)}` });
  if (line.zero !== null) svg.append(draw("line", { class: "zero", x1: 0, x2: 1000, y1: line.zero, y2: line.zero }));
  svg.append(draw("path", { d: line.path, class: line.alone ? "dots" : "" }));
  const here = draw("line", { class: "here", y1: 0, y2: 100 });
  svg.append(here);
  element.append(make("p", "", `${quantityName(name)} over position, from ${number(line.low)} to ${number(line.high)}`), svg);
  svg.addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect();
    p.show(index(c, Math.floor(((event.clientX - box.left) / box.width) * c.length)), true);
  });
  return { element, here: (i) => { const x = ((position(c, i) + 0.5) / c.length) * 1000; here.setAttribute("x1", x); here.setAttribute("x2", x); } };
}

function segmentList(p) {
  const box = make("details");
  box.open = p.c.segments.length <= 12;
  const list = make("ol", "segments");
  p.c.segments.forEach((s, k) => {
    const item = make("li", "", `tokens ${s.start + 1} to ${s.end} · value ${number(s.value)} · advantage ${number(s.advantage, true)} `);
    const go = make("button", "", "show");
    go.type = "button";
    go.addEventListener("click", () => p.show(index(p.c, s.start), true));
    item.append(go);
    if (s.reasoning) item.append(fold("the critic's reasoning", s.reasoning, false));
    item.dataset.segment = k;
    list.append(item);
  });
  box.append(make("summary", "", count(p.c.segments.length, "segment")), list);
  p.segments = box;
  return box;
}

// What the pointer or the keyboard is on is shown for both panels where they have the same tokens.
function listen(p) {
  const twin = () => state.panels.filter((o) => o === p || o.c.text === p.c.text);
  const tokenOf = (event) => event.target.closest?.(".tok");
  p.text.addEventListener("mouseover", (event) => {
    const token = tokenOf(event);
    if (!token) return;
    for (const o of twin()) {
      const i = index(o.c, position(p.c, Number(token.dataset.i)));
      for (const old of o.text.querySelectorAll(".hover")) old.classList.remove("hover");
      o.spans[i - o.page * PAGE]?.classList.add("hover");
      tell(o, i);
      o.chart?.here(i);
    }
  });
  p.text.addEventListener("mouseleave", () => {
    for (const o of twin()) {
      for (const old of o.text.querySelectorAll(".hover")) old.classList.remove("hover");
      o.show(o.active, false);
    }
  });
  const go = (i) => { for (const o of twin()) o.show(index(o.c, position(p.c, Math.max(0, Math.min(p.c.tokens.length - 1, i)))), o === p); };
  p.text.addEventListener("click", (event) => {
    const token = tokenOf(event), segment = event.target.dataset.segment;
    if (token) go(Number(token.dataset.i));
    if (segment !== undefined && p.segments) {
      p.segments.open = true;
      const item = p.segments.querySelectorAll("li")[segment];
      const fold = item.querySelector("details");
      if (fold) fold.open = true;
      item.scrollIntoView({ block: "nearest" });
    }
  });
  p.text.addEventListener("keydown", (event) => {
    const last = p.c.tokens.length - 1;
    const moves = { ArrowRight: p.active + 1, ArrowLeft: p.active - 1, ArrowDown: p.active + 20, ArrowUp: p.active - 20, Home: 0, End: last, PageDown: p.active + PAGE, PageUp: p.active - PAGE };
    if (!(event.key in moves) || event.target !== p.text) return;
    event.preventDefault();
    go(moves[event.key]);
  });
}

setUp();
state.selected = DATA.completions[Number(location.hash.slice(1))] || DATA.completions[0];
showList();
select(state.selected.at);
