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
