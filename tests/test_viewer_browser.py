"""The page of `trl-credit inspect` in a real browser: what it shows, that it is safe, and that everyone can use it."""

import pytest
from browser import chromium
from viewer_page import choose, completion, is_ready, press, texts, words


pytest_plugins = ["viewer_page"]

pytestmark = pytest.mark.slow


HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<!--<script>",
    "\x00\x1b[31m\x07",
    "\u202egnp.exe\u202c",
    "مرحبا بالعالم",
    "שלום",
    "e" + "\u0301" * 500,
    "\u0301 alone",
    "\ud800 lone surrogate",
    "\u2028\u2029\ufeff",
    "{{data}} ${window.hacked = 1} `${hacked}`",
    "javascript:alert(1)",
    "&lt;b&gt; &amp;",
    "👩\u200d👩\u200d👧",
    "\n\n\tindented",
    "long" * 1000,
]


# --- Hostile content


def test_hostile_content_is_shown_as_text_everywhere_and_harms_nothing(show):
    everywhere = "".join(HOSTILE)
    row = completion(
        HOSTILE,
        prompt=everywhere,
        method=everywhere,
        rewards={everywhere: 1.0},
        segments=[{"start": 0, "end": 4, "value": 0.5, "advantage": 1, "reasoning": everywhere}],
    )
    row[everywhere] = everywhere
    row["<b onclick=hacked=1>"] = [0.5] * len(HOSTILE)
    browser = show([row, completion(["fine"], method=HOSTILE[0])])
    assert browser.execute_script("return window.hacked") is None
    assert browser.execute_script("return document.scripts.length") == 3
    assert browser.execute_script("return document.querySelectorAll('img, b[onclick], iframe, a').length") == 0
    shown = texts(browser, ".panel:first-child .tok")
    assert len(shown) == len(HOSTILE)
    for position in (0, 1, 2, 5, 6, 11, 12, 13, 14):  # as they are
        assert shown[position] == HOSTILE[position]
    assert shown[3] == "‹U+0000›‹U+001B›[31m‹U+0007›"
    assert shown[4] == "‹U+202E›gnp.exe‹U+202C›"
    assert shown[7] == "e" + "\u0301" * 4 + "‹+496 marks›"
    assert shown[8] == "◌\u0301 alone"
    assert shown[10] == "‹U+2028›‹U+2029›‹U+FEFF›"
    assert shown[15] == "↵\n↵\n⇥\tindented"
    assert shown[16] == "long" * 250 + " … (3,000 more characters)"
    pres = " ".join(texts(browser, "pre"))
    assert pres.count("</script><script>window.hacked = 1</script>") == 3  # prompt, column, reasoning
    assert "\x00" not in pres and "\u202e" not in pres


def test_text_from_right_to_left_and_tall_marks_stay_in_their_place(show):
    browser = show([completion(["a", "مرحبا", "b", "e" + "\u0301" * 500, "c"])])
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('.tok')].map(t => { const b = t.getBoundingClientRect(); "
        "return [b.left, b.right, b.top, b.bottom] })"
    )
    for (_, right, top, _), (left, _, next_top, _) in zip(boxes, boxes[1:], strict=False):
        assert left >= right - 1 and abs(top - next_top) < 12  # one after the other, in one line


def test_a_completion_of_100_000_tokens_is_cut_with_a_count_and_does_not_freeze(show):
    browser = show([completion(words(100_000)), completion(words(50))])
    assert len(browser.find_elements("css selector", ".tok")) == 2000
    assert "of 100,000" in texts(browser, ".pages")[0]
    press(browser, ".tokens", "\ue010")  # End
    assert texts(browser, ".numbers span")[0] == "100,000 / 100,000"
    assert len(browser.find_elements("css selector", ".tok")) <= 2000
    spent = browser.execute_script("const t = performance.now(); showList(); return performance.now() - t")
    assert spent < 20_000


def test_a_page_stays_below_5_mb_by_leaving_out_the_middle_of_long_completions(show):
    browser = show([completion(words(12_000, seed), seed) for seed in range(32)])
    (left_out,) = set(browser.execute_script("return DATA.completions.map(c => c.leftOut)"))
    length = browser.execute_script("return DATA.completions[0].tokens.length")
    assert 4000 < length < 12_000 and length + left_out == 12_000
    press(browser, ".tokens", "\ue010")
    assert texts(browser, ".numbers span")[0] == "12,000 / 12,000"
    browser.execute_script("state.panels[0].show(DATA.completions[0].cutAt)")
    assert texts(browser, ".left-out") == [f"… {left_out:,} tokens left out …"]


# --- What it shows


def test_tokens_are_coloured_by_the_chosen_quantity_and_its_numbers_shown(show):
    row = completion(["a", "b", "c", "d"], advantage=[-1, 0, 0.5, 1], value=[0.25, 0.5, 1, 0.75], trained=[1, 1, 1, 0])
    del row["weight"]
    browser = show([row])
    classes = "return [...document.querySelectorAll('.tok')].map(t => [t.className, t.style.getPropertyValue('--t')])"
    choose(browser, "quantity", "advantage")
    tokens = browser.execute_script(classes)
    assert [t for _, t in tokens] == ["100", "0", "71", ""]
    assert ["below" in c for c, _ in tokens] == [True, False, False, False]
    assert "none" in tokens[3][0].split()
    choose(browser, "quantity", "value_change")
    tokens = browser.execute_script(classes)
    assert ["below" in c for c, _ in tokens] == [False] * 4  # V rises, and the reward of 1 is what the last promised
    press(browser, ".tokens", "\ue010", "\ue012")  # End, left
    names = "return [...document.querySelectorAll('.numbers [data-name]')].map(n => n.dataset.name)"
    numbers = dict(zip(browser.execute_script(names), texts(browser, ".numbers b"), strict=True))
    assert numbers["advantage"] == numbers["credit"] == "+0.5"
    assert (numbers["value"], numbers["value_change"]) == ("1", "0")
    assert texts(browser, ".numbers .chosen b") == ["0"]


def test_credit_is_the_advantage_times_the_weight(show):
    browser = show(
        [completion(["a", "b"], advantage=-0.5, weight=[2, 1]), completion(["c"], advantage=[0.25], weight=None)]
    )
    assert browser.execute_script("return DATA.completions.map(c => c.columns.credit)") == [[-1, -0.5], 0.25]
    assert browser.execute_script("return quantityName('credit')") == "Credit"


def test_filters_by_outcome_step_and_prompt(show):
    rows = [
        completion(["x", str(step), prompt], step=step, prompt=prompt, reward=reward)
        for step in (0, 10)
        for prompt in ("p", "q")
        for reward in (0.0, 1.0)
    ]
    browser = show(rows)

    def shown():
        return len(browser.find_elements("css selector", "#list li"))

    assert (shown(), texts(browser, "#count")) == (8, ["8 of 8 completions"])
    choose(browser, "outcome", "right")
    assert shown() == 4 and all("right" in text for text in texts(browser, "#list li"))
    choose(browser, "step", 10)
    assert shown() == 2 and all("step 10" in text for text in texts(browser, "#list li"))
    choose(browser, "prompt", 1)
    assert shown() == 1 and texts(browser, "pre") == ["q"]
    assert "".join(texts(browser, ".tok")) == "x10q"
    choose(browser, "outcome", "wrong")
    assert shown() == 1 and "wrong" in texts(browser, ".verdict")[0]


def test_the_page_opens_at_the_completion_that_its_address_names(show):
    browser = show([completion([str(i)]) for i in range(3)])
    assert texts(browser, ".tok") == ["0"]
    browser.execute_script("select(2)")
    browser.refresh()
    is_ready(browser)
    assert texts(browser, ".tok") == ["2"] and browser.current_url.endswith("#2")


def test_no_completion_is_like_this(show):
    browser = show([completion(["a"])])
    choose(browser, "outcome", "wrong")
    assert "No completion is like this" in texts(browser, "#panels")[0]
    choose(browser, "outcome", "")
    assert texts(browser, ".tok") == ["a"]


def test_two_methods_are_shown_side_by_side_on_the_same_tokens(show):
    tokens = words(30)
    first = [completion(words(12, 5), method="A"), completion(tokens, 1, method="A")]
    browser = show(first, [completion(words(9, 4), method="B"), completion(tokens, 2, method="B")])
    browser.execute_script("select(1)")
    assert len(browser.find_elements("css selector", ".panel")) == 2
    assert texts(browser, "h2")[0].startswith("A, table") and texts(browser, "h2")[1].startswith("B, other")
    press(browser, ".panel:first-child .tokens", "\ue014", "\ue014")  # right, right
    places = browser.execute_script(
        "return [...document.querySelectorAll('.numbers span:first-child')].map(n => n.textContent)"
    )
    assert places == ["3 / 30", "3 / 30"]
    from selenium.webdriver import ActionChains

    ActionChains(browser).move_to_element(browser.find_elements("css selector", ".panel:last-child .tok")[6]).perform()
    places = browser.execute_script(
        "return [...document.querySelectorAll('.numbers span:first-child')].map(n => n.textContent)"
    )
    assert places == ["7 / 30", "7 / 30"]
    legends = texts(browser, ".legend")
    browser.find_element("id", "scale").click()
    assert legends[0] != legends[1] and len(set(texts(browser, ".legend"))) == 1


def test_segments_have_their_values_and_the_critics_reasoning(show):
    segments = [
        {"start": 0, "end": 3, "read": True, "value": 0.25, "advantage": 0.5, "reasoning": "It begins well."},
        {"start": 3, "end": 6, "value": 0.75, "advantage": -0.25, "reasoning": "Then it errs."},
    ]
    browser = show([completion(words(6), segments=segments)])
    assert texts(browser, ".part-of") == ["1", "2"]
    assert "tokens 4 to 6 · value 0.75 · advantage −0.25" in texts(browser, ".segments li")[1]
    browser.find_elements("css selector", ".part-of")[1].click()
    reasoning = browser.find_elements("css selector", ".segments pre")
    assert [pre.is_displayed() for pre in reasoning] == [False, True] and reasoning[1].text == "Then it errs."
    press(browser, ".tokens", "\ue010")
    assert "segment 2: value 0.75" in texts(browser, ".numbers")[0]


def test_the_curve_of_the_value_leads_to_its_token(show):
    browser = show([completion(words(500), value=[i / 500 for i in range(500)])])
    assert "Value over position, on an axis from 0 to 1" in texts(browser, ".chart p")[0]
    browser.find_element("css selector", ".chart svg").click()  # in its middle
    assert texts(browser, ".numbers span")[0] in ("250 / 500", "251 / 500")


# --- For everyone


def test_the_page_works_from_the_keyboard_alone(show):
    browser = show([completion(words(40, seed), seed, reward=seed % 2) for seed in range(5)])
    press(browser, "#list", "\ue015", "\ue015")  # down, down
    assert browser.execute_script("return state.selected.at") == 2
    assert texts(browser, "#list [aria-selected=true]")[0].startswith("✗ wrong")
    reached = set()
    for _ in range(60):
        browser.switch_to.active_element.send_keys("\ue004")  # tab
        reached.add(browser.execute_script("return document.activeElement.id || document.activeElement.className"))
    assert {"quantity", "outcome", "step", "prompt", "theme", "list", "tokens", "beside"} <= reached
    before = browser.execute_script("return state.quantity")
    press(browser, ".tokens", "]")
    assert browser.execute_script("return state.quantity") != before
    press(browser, ".tokens", "[")
    assert browser.execute_script("return state.quantity") == before


# WCAG 2: relative luminance and contrast, of what is really drawn.
CONTRAST = """
const dot = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function rgb(color) {
  dot.clearRect(0, 0, 1, 1); dot.fillStyle = color; dot.fillRect(0, 0, 1, 1);
  return [...dot.getImageData(0, 0, 1, 1).data];
}
function luminance(color) {
  const [r, g, b] = rgb(color).map(x => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function background(element) {
  for (; element; element = element.parentElement) {
    const color = getComputedStyle(element).backgroundColor;
    if (rgb(color)[3] === 255) return color;
  }
  return getComputedStyle(document.documentElement).backgroundColor;
}
return [...document.querySelectorAll("body *")]
  .filter(e => e.checkVisibility() && !e.closest("script, option"))
  .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
  .map(e => {
    const [a, b] = [luminance(getComputedStyle(e).color), luminance(background(e))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), e.className || e.tagName];
  }).sort((x, y) => x[0] - y[0]);
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_has_a_contrast_of_4_5_on_every_colour(show, theme):
    tokens = words(30)
    ramp = [i / 15 - 1 for i in range(30)]
    segments = [{"start": 0, "end": 3, "value": 0.25, "advantage": 0.5, "reasoning": "It begins well."}]
    row = completion(tokens, advantage=ramp, logp=[x - 1 for x in ramp], trained=[1] * 28 + [0] * 2, segments=segments)
    browser = show([row])
    browser.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
    for quantity in ("advantage", "logp", "value"):
        choose(browser, "quantity", quantity)
        contrasts = browser.execute_script(CONTRAST)
        assert len(contrasts) > 60
        assert contrasts[0][0] >= 4.5, contrasts[:3]


# Machado, Oliveira and Fernandes 2009: what the colour-blind see, in linear RGB, at full severity.
BLINDNESS = {
    "none": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def oklab(rgb, blindness):
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in rgb]
    r, g, b = (min(1, max(0, sum(m * x for m, x in zip(row, linear, strict=True)))) for row in BLINDNESS[blindness])
    lms = (
        (0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b) ** (1 / 3),
        (0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b) ** (1 / 3),
        (0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b) ** (1 / 3),
    )
    rows = (
        (0.2104542553, 0.7936177850, -0.0040720468),
        (1.9779984951, -2.4285922050, 0.4505937099),
        (0.0259040371, 0.7827717662, -0.8086757660),
    )
    return [sum(a * x for a, x in zip(row, lms, strict=True)) for row in rows]


@pytest.mark.parametrize("blindness", BLINDNESS)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_ends_and_middle_of_the_palette_are_apart_for_the_colour_blind(show, theme, blindness):
    browser = show([completion(["a"])])
    browser.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
    colours = browser.execute_script(
        "const dot = document.createElement('canvas').getContext('2d', { willReadFrequently: true });"
        "return ['--above', '--below', '--paper'].map(name => { const e = document.createElement('i');"
        "document.body.append(e); e.style.color = `var(${name})`; dot.fillStyle = getComputedStyle(e).color;"
        "dot.fillRect(0, 0, 1, 1); return [...dot.getImageData(0, 0, 1, 1).data].slice(0, 3).map(x => x / 255) })"
    )
    above, below, paper = (oklab(colour, blindness) for colour in colours)
    for one, other in ((above, below), (above, paper), (below, paper)):
        assert sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5 > 0.12  # 0.02 can just be told apart


def test_light_and_dark_follow_the_system_and_the_button(show, tmp_path_factory):
    browser = show([completion(["a"])])
    paper = "return getComputedStyle(document.documentElement).backgroundColor"
    assert browser.execute_script(paper) == "rgb(255, 255, 255)"
    browser.find_element("id", "theme").click()
    assert browser.execute_script(paper) == "rgb(21, 24, 29)"
    assert browser.find_element("id", "theme").get_attribute("aria-pressed") == "true"
    press(browser, ".tokens", "d")
    assert browser.execute_script(paper) == "rgb(255, 255, 255)"
    with chromium(tmp_path_factory.mktemp("dark"), dark=True) as dark:
        dark.get(browser.current_url)
        assert dark.execute_script(paper) == "rgb(21, 24, 29)"
