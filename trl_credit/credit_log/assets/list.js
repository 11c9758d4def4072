// --- State

let QUANTITIES = [];
const state = { quantity: "", selected: null, beside: null, panels: [] };

// First what changed the value; without values, the first quantity that differs from token to token.
function chooseQuantity() {
  const names = new Set(DATA.completions.flatMap((c) => Object.keys(c.columns)));
  QUANTITIES = [...Object.keys(KNOWN).filter((n) => names.has(n)), ...[...names].filter((n) => !KNOWN[n]).sort()];
  const varied = (n) => DATA.completions.some((c) => Array.isArray(c.columns[n]));
  state.quantity = ["value_change", ...QUANTITIES].find(varied) || QUANTITIES[0] || "";
}

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
    if (event.key === "n" || event.key === "p") state.panels[0]?.toChange(event.key === "n" ? 1 : -1);
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
  // The counterpart in another run is that of the same step, prompt and place among the completions of the prompt.
  const isCounterpart = (o) => origin(o) !== origin(c) && o.step === c.step && o.prompt === c.prompt && o.index === c.index;
  const rank = (o) => (isCounterpart(o) ? 0 : o.text === c.text ? 1 : o.prompt === c.prompt ? 2 : 3);
  const others = DATA.completions.filter((o) => o !== c).sort((a, b) => rank(a) - rank(b));
  const label = (o) => `${["Counterpart", "Same tokens", "Same prompt", ""][rank(o)]}${rank(o) === 0 ? (o.text === c.text ? ", same tokens" : ", other tokens") : ""}${rank(o) < 3 ? ": " : ""}${origin(o)}, step ${o.step}, row ${o.row} ${verdict(o)}`;
  options($("beside"), [["", "nothing"], ...others.map((o) => [o.at, label(o)])]);
  state.beside = others.find((o) => origin(o) !== origin(c)) || null;
  $("beside").value = state.beside ? state.beside.at : "";
  history.replaceState(null, "", `#${at}`); // opened again, the page shows the same completion
  mark();
  showPanels();
}

unpack().then(() => {
  chooseQuantity();
  setUp();
  state.selected = DATA.completions[Number(location.hash.slice(1))] || DATA.completions[0];
  showList();
  select(state.selected.at);
  document.body.dataset.ready = "yes";
}).catch((error) => {
  $("panels").replaceChildren(make("p", "nothing", `This page needs a browser of 2023 or later, with DecompressionStream: ${error}`));
});
