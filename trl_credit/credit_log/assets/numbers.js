"use strict";
// All text of a completion reaches the page through `textContent`, never as markup.

const DATA = JSON.parse(document.getElementById("data").textContent);
const PAGE = 2000; // tokens on the page at once
const POINTS = 300; // of a curve
const CHANGES = 5; // the largest that are listed
const KNOWN = {
  credit: { name: "Credit", kind: "diverging", center: 0 },
  advantage: { name: "Advantage", kind: "diverging", center: 0 },
  value: { name: "Value", kind: "axis" },
  value_change: { name: "Value change", kind: "diverging", center: 0 },
  weight: { name: "Effective weight", kind: "sequential" },
  ratio: { name: "Ratio", kind: "diverging", center: 1 },
  logp: { name: "Log-probability", kind: "reversed" },
  entropy: { name: "Entropy", kind: "sequential" },
  ref_logp: { name: "Reference log-probability", kind: "reversed" },
  token_reward: { name: "Reward of the token", kind: "diverging", center: 0 },
  return: { name: "Return", kind: "axis" },
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

function number(x, signed, digits = 4) {
  if (x === null || x === undefined) return "–";
  const text = x !== 0 && Math.abs(x) < 0.001 ? x.toExponential(2) : Number(x.toPrecision(digits)).toString();
  return signed && x > 0 ? `+${text}` : text.replaceAll("-", "−");
}

// What is packed is exact to three digits, those of the distance from what is packed as a distance.
function packedNumber(name, x, signed) {
  if (x === null || x === undefined) return "–";
  const center = KNOWN[name]?.center || 0;
  return number(Number((center + Number((x - center).toPrecision(3))).toPrecision(12)), signed, 12);
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

// --- Scales

const scales = new Map();
// Colours and curves reach over all numbers of a method, so that nothing is beyond the end of the scale; what is small is
// still seen, for the share of the colour is the square root of the share of the way. Values are on an axis of their own,
// from 0 to 1, or from the least to the largest reward: a critic that knows nothing is flat.
function scaleOf(name, origins) {
  const key = JSON.stringify([name, origins]);
  if (scales.has(key)) return scales.get(key);
  const shown = DATA.completions.filter((c) => origins.includes(origin(c)));
  let low = Infinity, high = -Infinity;
  for (const c of shown) for (const x of numbersOf(c, name)) { low = Math.min(low, x); high = Math.max(high, x); }
  if (low > high) [low, high] = [0, 1];
  let { kind, center } = KNOWN[name] || { kind: "sequential" };
  if (!KNOWN[name] && low < 0) [kind, center] = ["diverging", 0];
  if (kind === "axis") {
    const rewards = DATA.completions.map((c) => c.reward).filter((x) => x !== null);
    const isPenalty = rewards.some((x) => x < 0) && rewards.every((x) => x <= 0);
    [low, high] = [Math.min(0, low, ...rewards), Math.max(isPenalty ? 0 : 1, high, ...rewards)];
  } else if (kind === "diverging") {
    const reach = Math.max(high - center, center - low) || 1;
    [low, high] = [center - reach, center + reach];
  } else if (name === "entropy" || name === "weight") low = Math.min(0, low);
  else if (kind === "reversed") high = Math.max(0, high);
  if (high <= low) high = low + 1;
  const scale = { kind, center, low, high };
  scales.set(key, scale);
  return scale;
}

// Where a number is on its scale: -1 to 1 on a diverging one, else 0 to 1.
function share(x, { kind, center, low, high }) {
  if (kind === "diverging") return Math.sign(x - center) * Math.sqrt(Math.min(1, Math.abs(x - center) / (high - center)));
  const part = Math.min(1, Math.max(0, (kind === "reversed" ? high - x : x - low) / (high - low)));
  return kind === "axis" ? part : Math.sqrt(part);
}

// The number that has this share.
function numberAt(t, { kind, center, low, high }) {
  if (kind === "diverging") return center + Math.sign(t) * t * t * (high - center);
  if (kind === "axis") return low + t * (high - low);
  return kind === "reversed" ? high - t * t * (high - low) : low + t * t * (high - low);
}

function paint(element, x, scale) {
  const t = share(x, scale);
  element.classList.add(scale.kind !== "diverging" ? "more" : t < 0 ? "below" : "above");
  const percent = Math.round(100 * Math.abs(t));
  if (percent < 25) element.classList.remove("below"); // too small to stand out is too small to be underlined
  if (percent < 25 && t < 0) element.classList.add("slightly-below");
  element.style.setProperty("--t", percent);
}

// --- Changes

// The largest changes of the value by a token, and of the advantage from one token to the next, largest first.
function largestChanges(c) {
  const found = [];
  if (c.columns.value_change !== undefined) found.push(["Value", (i) => at(c, "value_change", i)]);
  if (c.columns.advantage !== undefined && Array.isArray(c.columns.advantage)) {
    let before = null;
    const steps = c.tokens.map((_, i) => {
      const x = at(c, "advantage", i), by = x === null || before === null || (i === c.cutAt && c.leftOut) ? null : x - before;
      if (x !== null) before = x;
      return by;
    });
    found.push(["Advantage", (i) => steps[i]]);
  }
  return found.map(([name, by]) => ({
    name,
    changes: c.tokens.map((_, i) => ({ i, by: by(i) })).filter((x) => x.by).sort((a, b) => Math.abs(b.by) - Math.abs(a.by)).slice(0, CHANGES),
  })).filter((list) => list.changes.length);
}

// --- Curves

// A path through the least and the largest number of neighbouring tokens, in a box of 1000 x 100, on the scale of the
// colours.
function curve(c, name) {
  const scale = scaleOf(name, [origin(c)]);
  const bins = Math.min(POINTS, c.length);
  const y = (x) => (scale.kind === "diverging" ? 50 - 46 * share(x, scale) : 96 - 92 * (scale.kind === "reversed" ? 1 - share(x, scale) : share(x, scale)));
  const ends = new Map(); // of each bin its least and largest number, in their order
  for (let i = 0; i < c.tokens.length; i++) {
    const x = at(c, name, i);
    if (x === null) continue;
    const bin = Math.floor((position(c, i) / c.length) * bins);
    const [first, second] = ends.get(bin) || [x, x];
    const least = Math.min(first, second), most = Math.max(first, second);
    if (!ends.has(bin)) ends.set(bin, [x, x]);
    else if (x < least) ends.set(bin, [most, x]);
    else if (x > most) ends.set(bin, [least, x]);
  }
  if (!ends.size) return null;
  let path = "", last = null;
  for (const [bin, [first, second]] of ends) {
    const x = ((bin + 0.5) / bins) * 1000;
    path += `${last === null || (c.leftOut && bin - last > 2) ? "M" : "L"}${x} ${y(first)}`;
    if (second !== first) path += `L${x} ${y(second)}`;
    last = bin;
  }
  const alone = ends.size === 1;
  return { path: alone ? `${path}h0` : path, alone, scale, zero: scale.kind === "diverging" ? 50 : null };
}

const curveName = (c) => (c.columns.value !== undefined ? "value" : state.quantity);

function sketch(c) {
  const svg = draw("svg", { viewBox: "0 0 1000 100", preserveAspectRatio: "none", "aria-hidden": "true" });
  const line = c.columns[curveName(c)] === undefined ? null : curve(c, curveName(c));
  if (line) svg.append(draw("path", { d: line.path, class: line.alone ? "dots" : "" }));
  return svg;
}

// --- The packed numbers

// Of each 16 bits, the half float that they are.
const HALF = Float64Array.from({ length: 1 << 16 }, (_, bits) => {
  const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 31) return NaN;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
});

async function unpack() {
  const packed = Uint8Array.from(atob($("numbers").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer()), half = bytes.length / 2;
  const bits = (start) => (i) => (bytes[start + i] << 8) | bytes[half + start + i];
  for (const c of DATA.completions) {
    const [low, high] = [bits(c.tokens[0]), c.tokens[1] === null ? () => 0 : bits(c.tokens[1])];
    const rows = Array.from({ length: c.count }, (_, i) => low(i) + high(i) * 65536);
    c.tokens = rows.map((row) => DATA.texts[row]);
    c.ids = rows.map((row) => DATA.ids[row]);
    for (const name in c.columns) {
      const column = c.columns[name];
      if (column === null || typeof column === "number") continue;
      const number = bits(column.at);
      c.columns[name] = Array.from({ length: c.count }, (_, i) => {
        const x = column.center + column.unit * HALF[number(i)];
        return Number.isNaN(x) ? null : x;
      });
    }
  }
  for (const c of DATA.completions) addCredit(c);
}

// What the policy's gradient multiplies a token's log-probability by: the advantage, times its trace weight if it has one.
function addCredit(c) {
  if (c.columns.advantage === undefined || c.columns.credit !== undefined) return;
  const credit = (i) => { const a = at(c, "advantage", i), w = at(c, "weight", i); return a === null || w === null ? null : a * w; };
  c.columns.credit = c.columns.weight === undefined ? c.columns.advantage : c.tokens.map((_, i) => credit(i));
}
