"""What the page of `trl-credit inspect` is for: the one wrong step is found, what is not known not shown as known."""

import random

import pytest
from viewer_page import choose, completion, press, texts, words


pytest_plugins = ["viewer_page"]
pytestmark = pytest.mark.slow

PLANTED = 73
HEIGHTS = """return [...document.querySelector('.chart path').getAttribute('d').matchAll(/[ML][^ ]+ ([\\d.]+)/g)]
.map(match => +match[1])"""  # of the curve


def with_a_wrong_step(drop: float = 0.54, other: float = 0.09, length: int = 160) -> dict:
    """A completion whose value falls at one step for good, and at another a little."""
    rng = random.Random(0)
    level, values = 0.7, []
    for i in range(length):
        values.append(level + rng.gauss(0, 0.01))
        level -= drop if i == PLANTED else other if i == 30 else 0
    return completion(words(length), value=values, reward=0.0)


def shares(browser) -> list[int]:
    return browser.execute_script(
        "return [...document.querySelectorAll('.tok')].map(t => +t.style.getPropertyValue('--t'))"
    )


def test_the_one_wrong_step_stands_out_from_a_small_one_and_both_from_noise(show):
    browser = show([with_a_wrong_step()])
    assert browser.execute_script("return state.quantity") == "value_change"
    t = shares(browser)
    noise = sorted(x for i, x in enumerate(t) if i not in (30, PLANTED, 159))
    assert t[PLANTED] == 100 and 35 <= t[30] <= 48 and noise[-1] < 30 and noise[len(noise) // 2] < 20
    assert "below" in browser.find_elements("css selector", ".tok")[PLANTED].get_attribute("class").split()
    ticks = texts(browser, ".ticks span")
    assert ticks[0] == ticks[-1].replace("+", "−") and float(ticks[-1][1:]) == pytest.approx(0.54, abs=0.04)
    assert float(ticks[3][1:]) == pytest.approx(float(ticks[4][1:]) / 4, abs=0.01) and ticks[2] == "0"


def test_the_largest_change_is_marked_in_text_and_curve(show):
    browser = show([with_a_wrong_step()])
    (peak,) = browser.find_elements("css selector", ".tok.peak")
    assert int(peak.get_attribute("data-i")) == PLANTED and "fall" in peak.get_attribute("class")
    assert peak.get_attribute("data-by").startswith("−0.5") and texts(browser, ".largest")[0].endswith(
        f" at {PLANTED + 1}"
    )


def test_keys_and_a_list_lead_to_the_largest_changes(show):
    browser = show([with_a_wrong_step()])
    lines = texts(browser, ".changes p")
    assert [line.split(":")[0] for line in lines] == [
        "Largest changes of the value",
        "Largest changes of the advantage",
    ]
    assert all(len(browser.find_elements("css selector", f".changes p:nth-child({k}) button")) == 5 for k in (1, 2))
    press(browser, ".tokens", "n")
    assert texts(browser, ".numbers span")[0] == f"{PLANTED + 1} / 160"
    press(browser, ".tokens", "n")
    second = texts(browser, ".numbers span")[0]
    press(browser, ".tokens", "n", "p")
    assert second == texts(browser, ".numbers span")[0] != f"{PLANTED + 1} / 160"
    browser.execute_script("document.querySelector('.changes button').click()")
    assert texts(browser, ".numbers span")[0] == f"{PLANTED + 1} / 160"


def test_a_change_in_a_long_completion_is_seen_in_its_curve(show):
    row = completion(words(6000), value=[0.9 if i < 4000 else 0.1 for i in range(6000)], reward=0.0)
    spike = completion(words(6000), value=[0.2 if i == 4000 else 0.9 for i in range(6000)], reward=0.0)
    browser = show([row, spike])
    for at in (0, 1):
        browser.execute_script(f"select({at})")
        found = browser.execute_script(HEIGHTS)
        assert max(found) - min(found) > 60, "of 100, one token of 6,000"


def test_a_critic_that_knows_nothing_is_flat(show):
    rng = random.Random(1)
    rows = [
        completion(words(50, seed), value=[0.5 + rng.gauss(0, 0.004) for _ in range(50)], reward=seed)
        for seed in (0, 1)
    ]
    browser = show(rows)
    found = browser.execute_script(HEIGHTS)
    assert max(found) - min(found) < 4, "of 100"
    choose(browser, "quantity", "value")
    assert all(45 <= t <= 55 for t in shares(browser)) and texts(browser, ".ticks span") == ["0", "0.5", "1"]


def test_the_axis_of_values_is_the_range_of_the_rewards(show):
    rows = [completion(words(9), value=[0.1] * 8 + [0.2], reward=reward) for reward in (-1.0, 4.0)]
    browser = show(rows)
    assert "on an axis from −1 to 4" in texts(browser, ".chart p")[0]


def test_an_answer_that_was_not_read_is_shown_as_such(show):
    segments = [
        {"start": 0, "end": 3, "read": True, "value": 0.25, "advantage": 0.5},
        {"start": 3, "end": 6, "read": False, "value": 0.65, "advantage": 0.35},
        {"start": 6, "end": 9, "read": True, "value": 0.3, "advantage": 0.7},
    ]
    value = [0.25] * 3 + [0.65] * 3 + [0.3] * 3
    browser = show([completion(words(9), value=value, segments=segments)])
    hatched = "return [...document.querySelectorAll('.tokens .tok')].map(t => t.classList.contains('unread'))"
    assert browser.execute_script(hatched) == [False] * 3 + [True] * 3 + [False] * 3
    assert "value not read · advantage +0.35" in texts(browser, ".segments li")[1]
    assert "not read" in texts(browser, ".legend")[0]
    browser.execute_script("state.panels[0].show(4)")
    numbers = texts(browser, ".numbers")[0]
    assert "segment 2: value not read" in numbers and "Value –" in numbers and "Value change –" in numbers
    assert all("at 3" not in text and "at 4" not in text for text in texts(browser, ".changes p:first-child button"))
    assert len(browser.find_elements("css selector", ".chart rect.unread")) == 1


def test_what_decides_right_is_named_on_the_page(show):
    browser = show([completion(["a"], reward=0.2, rewards={"accuracy": 0.0, "format": 0.2})])
    assert texts(browser, ".verdict") == ["✗ wrong"] and texts(browser, ".facts")[0].endswith("right: accuracy above 0")


def test_beside_a_completion_is_its_counterpart_though_its_tokens_differ(show):
    first = [completion(words(6, k), k, method="A", prompt=prompt) for k, prompt in enumerate("ppq")]
    # Of the second prompt there is one with the tokens of the first one's: no reason to show it there.
    second = [completion(words(6, k), k, method="B", prompt=prompt) for k, prompt in ((9, "p"), (8, "p"), (0, "q"))]
    browser = show(first, second)
    for at, beside in ((0, 3), (1, 4), (2, 5)):
        browser.execute_script(f"select({at})")
        assert browser.execute_script("return state.beside.at") == beside
    assert "Counterpart, other tokens: B, other" in texts(browser, "#beside option")[1]


def test_shown_numbers_are_those_of_the_table(show):
    row = completion(
        words(4),
        logp=[-1.23456e-7, -0.0123456, -12.3456, -0.5],
        ratio=[1.000123, 0.98765, 1.2, 1.0],
        advantage=[123.456, -0.00123456, 1.0, -1.0],
    )
    browser = show([row])
    shown = []
    for i in range(3):
        browser.execute_script(f"state.panels[0].show({i})")
        names = ("logp", "ratio", "advantage")
        shown.append([texts(browser, f".numbers [data-name={name}] b")[0].replace("−", "-") for name in names])
    for i, line in enumerate(shown):
        for name, text in zip(("logp", "ratio", "advantage"), line, strict=True):
            center = 1.0 if name == "ratio" else 0.0
            assert float(text) - center == pytest.approx(row[name][i] - center, rel=1e-2), (name, text)
    assert shown[0][1] == "1.000123" and shown[1][0] == "-0.0123" and shown[0][2] == "+123"


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_screen(show, width):
    browser = show([with_a_wrong_step()])
    emulated = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", emulated)
    try:
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        for mark in (".largest", ".tok.peak"):
            box = browser.execute_script(f"return document.querySelector('{mark}').getBoundingClientRect().toJSON()")
            assert box["left"] >= 0 and box["right"] <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
