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
