"""Pages of `trl-credit inspect` in a real browser, for the tests of them: fixtures and what to do with such a page."""

import json
import random

import pytest
from browser import chromium

from trl_credit.credit_log import read_completions, write_page


def completion(tokens, seed=0, **more) -> dict:
    rng = random.Random(seed)
    return {
        "step": 0,
        "prompt": "What is it?",
        "tokens": tokens,
        "reward": 1.0,
        "advantage": [rng.uniform(-1, 1) for _ in tokens],
        "value": [rng.random() for _ in tokens],
        "logp": [-rng.random() for _ in tokens],
        "entropy": [rng.random() for _ in tokens],
        "ratio": [rng.uniform(0.8, 1.2) for _ in tokens],
        "weight": [rng.uniform(0, 5) for _ in tokens],
        **more,
    }


def words(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(f"words {seed}")
    return [rng.choice([" the", " sum", " of", "3", "+", "\n", " therefore", ","]) for _ in range(n)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as chrome:
        yield chrome


@pytest.fixture
def show(browser, tmp_path):
    """Write a page of completions, open it from disk, and hand the browser over."""

    def open_page(rows: list[dict], compare: list[dict] = ()):
        completions = []
        for name, of_table in (("table", rows), ("other", compare)):
            if of_table:
                (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, of_table)))
                completions += read_completions(tmp_path / f"{name}.jsonl", limit=200)[0]
        info = write_page(completions, tmp_path / "page.html", "A table")
        assert info["bytes"] == (tmp_path / "page.html").stat().st_size <= 5_000_000
        browser.get_log("performance")  # of its own start
        browser.get((tmp_path / "page.html").as_uri())
        is_ready(browser)
        return browser

    yield open_page
    errors = [entry["message"] for entry in browser.get_log("browser")]
    assert not errors  # a script that failed, a policy that was broken, a file that was not found
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    # Of the page, not of the browser's own pages.
    urls = {r["request"]["url"].split("#")[0] for r in requests if r["documentURL"].startswith("file:")}
    assert urls == {(tmp_path / "page.html").as_uri()}


def is_ready(browser) -> None:
    """The page unpacks its numbers before it shows anything."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60).until(lambda b: b.execute_script("return document.body.dataset.ready"))


def texts(browser, selector: str) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(element => element.textContent)", selector
    )


def choose(browser, name: str, value) -> None:
    browser.execute_script(
        "const s = document.getElementById(arguments[0]); s.value = arguments[1]; s.dispatchEvent(new Event('change'))",
        name,
        str(value),
    )


def press(browser, selector: str, *keys: str) -> None:
    element = browser.find_element("css selector", selector)
    browser.execute_script("arguments[0].focus()", element)
    element.send_keys(*keys)
