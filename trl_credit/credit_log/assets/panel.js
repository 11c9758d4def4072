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
  if (c.right !== null) facts.push(`right: ${visible(c.rightBy)}`);
  element.append(head, make("p", "facts", facts.join(" · ")));
  if (DATA.prompts[c.prompt]) element.append(fold("Prompt", DATA.prompts[c.prompt], DATA.prompts[c.prompt].length < 400));
  for (const name in c.facts) element.append(fold(visible(name), c.facts[name], false));

  const has = c.columns[state.quantity] !== undefined;
  const scale = has ? scaleOf(state.quantity, ($("scale").checked ? shown : [c]).map(origin)) : null;
  p.unread = c.segments.filter((s) => !s.read);
  p.numbers = make("div", "numbers");
  p.numbers.setAttribute("role", "status");
  p.text = make("div", "tokens");
  p.text.tabIndex = 0;
  p.text.setAttribute("role", "listbox");
  p.text.setAttribute("aria-label", "Tokens; arrow keys move between them");
  p.pages = make("div", "pages");
  p.lists = largestChanges(c); // the first of the first list is marked in the curve and in the text
  p.chart = chart(p);
  if (p.chart) element.append(p.chart.element);
  if (p.lists.length) element.append(changeList(p));
  element.append(legend(scale, has, p.unread.length), p.numbers, p.text, p.pages);
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
  p.toChange = (by) => {
    if (!p.lists.length) return;
    const { changes } = p.lists[0];
    const now = changes.findIndex((change) => change.i === p.active);
    p.show(changes[now < 0 ? (by > 0 ? 0 : changes.length - 1) : (now + by + changes.length) % changes.length].i, true);
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

function legend(scale, has, unread) {
  const element = make("div", "legend");
  if (!has) {
    element.append(make("span", "", state.quantity ? `No ${quantityName(state.quantity).toLowerCase()} in this table.` : "This table has no numbers per token."));
    return element;
  }
  const bar = make("span", "scale"), ticks = make("span", "ticks");
  for (const t of scale.kind === "diverging" ? [-1, -0.5, 0, 0.5, 1] : scale.kind === "reversed" ? [1, 0.5, 0] : [0, 0.5, 1]) {
    ticks.append(make("span", "", number(Number(numberAt(t, scale).toPrecision(2)), scale.center === 0)));
  }
  bar.append(make("span", `bar ${scale.kind}`), ticks);
  element.append(make("span", "", quantityName(state.quantity)), bar);
  if (scale.kind === "diverging") element.append(make("span", "", `below ${number(scale.center)} underlined`));
  if (unread) element.append(make("span", "tok unread", "not read"));
  return element;
}

// The largest changes as buttons that lead to their tokens.
function changeList(p) {
  const box = make("div", "changes");
  for (const { name, changes } of p.lists) {
    const line = make("p", "", `Largest changes of the ${name.toLowerCase()}: `);
    for (const { i, by } of changes) {
      const go = make("button", by < 0 ? "fall" : "rise", `${packedNumber("", by, true)} `);
      go.type = "button";
      go.title = `token ${position(p.c, i) + 1}`;
      go.append(make("code", "", short(p.c.tokens[i].replaceAll("\n", "↵").replaceAll("\t", "⇥"), 12).trim() || "␣"), ` at ${(position(p.c, i) + 1).toLocaleString("en")}`);
      go.addEventListener("click", () => p.show(i, true));
      line.append(go);
    }
    box.append(line);
  }
  return box;
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
    if (isUnread(p, i)) token.classList.add("unread");
    if (p.lists[0]?.changes[0].i === i) {
      token.classList.add("peak", p.lists[0].changes[0].by < 0 ? "fall" : "rise");
      token.dataset.by = packedNumber("", p.lists[0].changes[0].by, true);
    }
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

const isUnread = (p, i) => p.unread.some((s) => s.start <= position(p.c, i) && position(p.c, i) < s.end);

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
  const token = make("span", "token", JSON.stringify(visible(c.tokens[i])) + (c.ids[i] === null ? "" : ` (${c.ids[i]})`));
  p.numbers.replaceChildren(place, token);
  for (const name of QUANTITIES) {
    if (c.columns[name] === undefined) continue;
    const cell = make("span", name === state.quantity ? "chosen" : "", `${quantityName(name)} `);
    cell.dataset.name = name;
    cell.append(make("b", "", packedNumber(name, at(c, name, i), KNOWN[name]?.center === 0)));
    p.numbers.append(cell);
  }
  if (!isTrained(c, i)) p.numbers.append(make("span", "", "not trained on"));
  const k = c.segments.findIndex((s) => s.start <= position(c, i) && position(c, i) < s.end);
  if (k >= 0) p.numbers.append(make("span", "", `segment ${k + 1}: value ${c.segments[k].read ? number(c.segments[k].value) : "not read"}, advantage ${number(c.segments[k].advantage, true)}`));
}

function chart(p) {
  const { c } = p;
  const name = c.columns[curveName(c)] === undefined ? Object.keys(c.columns)[0] : curveName(c);
  const line = name === undefined ? null : curve(c, name);
  if (!line) return null;
  const element = make("div", "chart");
  const { scale } = line;
  const what = `${quantityName(name)} over position, on an axis from ${number(Number(scale.low.toPrecision(3)))} to ${number(Number(scale.high.toPrecision(3)))}`;
  const svg = draw("svg", { viewBox: "0 0 1000 100", preserveAspectRatio: "none", role: "img", "aria-label": what });
  if (line.zero !== null) svg.append(draw("line", { class: "zero", x1: 0, x2: 1000, y1: line.zero, y2: line.zero }));
  for (const s of p.unread) svg.append(draw("rect", { class: "unread", x: (s.start / c.length) * 1000, width: ((s.end - s.start) / c.length) * 1000, y: 0, height: 100 }));
  svg.append(draw("path", { d: line.path, class: line.alone ? "dots" : "" }));
  const here = draw("line", { class: "here", y1: 0, y2: 100 });
  svg.append(here);
  element.append(make("p", "", what), svg);
  if (p.lists.length) {
    const [{ i, by }] = p.lists[0].changes, x = ((position(c, i) + 0.5) / c.length) * 100;
    const mark = make("div", `largest ${by < 0 ? "fall" : "rise"}${x > 70 ? " left" : ""}`, `${packedNumber("", by, true)} at ${(position(c, i) + 1).toLocaleString("en")}`);
    mark.style.setProperty("--x", `${x}%`);
    element.append(mark);
  }
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
    const item = make("li", "", `tokens ${s.start + 1} to ${s.end} · value ${s.read ? number(s.value) : "not read"} · advantage ${number(s.advantage, true)} `);
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
