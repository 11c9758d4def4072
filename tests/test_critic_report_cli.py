"""`trl-credit critic-report`, from the command line to the page, on a policy whose values are known."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from chain_policy import LENGTH, LETTERS, chain_policy_dir, true_value
from launch import BIN, run
from tiny import tiny_model, tiny_tokenizer
from transformers import GenerationMixin

from trl_credit.cli import main
from trl_credit.cli.critic_report import make_parser
from trl_credit.critic_report.layout import SECTIONS
from trl_credit.critic_report.report import CriticReport
from trl_credit.critic_report.report_page import draw, show, write_page
from trl_credit.critic_report.statistics import Figure
from trl_credit.critics.token import make_token_critic


REWARDS = "def no_x(completions, **kwargs): return [float('x' not in text) for text in completions]\n"
HOSTILE = "<b>&\"'critic"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder: a policy, a critic of it with a name that is no good in HTML, prompts and a reward."""
    path = tmp_path_factory.mktemp("user")
    chain_policy_dir(path / "policy")
    critic = make_token_critic(tiny_model(hidden=32, seed=5, initializer_range=0.1), initial_value=0.4)
    torch.nn.init.normal_(critic.score.weight, std=0.05, generator=torch.Generator().manual_seed(0))
    critic.save_pretrained(path / HOSTILE)
    tiny_tokenizer().save_pretrained(path / HOSTILE)
    rows = [{"prompt": letter} for letter in LETTERS[:-1] * 4]
    (path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "chain_reward.py").write_text(REWARDS)
    return path


def arguments(folder, *critics, **changes) -> list[str]:
    options = {
        "policy": folder / "policy",
        "dataset_name": folder / "prompts.jsonl",
        "reward_funcs": "chain_reward.no_x",
        "cuts": 1,
        "max_completion_length": LENGTH,
        "continuations": 32,
        "batch_size": 512,
        "draws": 50,
        "output_dir": folder / "out",
        **changes,
    }
    pairs = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return ["critic-report", *pairs, "--critics", *map(str, critics)]


@pytest.fixture
def generate_calls(monkeypatch):
    calls, generate = [], GenerationMixin.generate

    def counted(self, *args, **kwargs):
        calls.append(len(kwargs["input_ids"]))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", counted)
    return calls


class Elements(HTMLParser):
    """What is on a page: no tag that closes what is not open, and the text of it."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.slow
def test_it_samples_once_measures_and_writes(folder, generate_calls, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    critics = (folder / HOSTILE, f"prompt:{folder / HOSTILE}", "constant:0.5", "constant", "leave_one_out")
    assert main(arguments(folder, *critics)) == 0
    assert sum(generate_calls) > 24 * 4 * 32
    printed = capsys.readouterr().out
    assert "expected" in printed and "report.html" in printed

    generate_calls.clear()
    first = json.loads((folder / "out/report.json").read_text())
    assert main(arguments(folder, *critics)) == 0
    assert generate_calls == [], "a second report samples nothing"
    reports = json.loads((folder / "out/report.json").read_text())
    assert reports == first and len(reports) == 5

    # The constant's error is what the chain says of the very same states.
    rollouts = {}
    for line in map(json.loads, (folder / "out/probes/rollouts.jsonl").read_text().splitlines()):
        rollouts[line["prompt"], line["sample"]] = line["completion_ids"]
    tokenizer, squares = tiny_tokenizer(), []
    for line in map(json.loads, (folder / "out/probes/continuations.jsonl").read_text().splitlines()):
        if line["candidate"] == -1:
            begun = tokenizer.decode(rollouts[line["prompt"], line["sample"]][: line["position"]])
            squares.append((true_value(LETTERS[line["prompt"] % 6], begun) - 0.5) ** 2)
    figure = reports[2]["rows"]["error/mse"]
    assert figure["n"] == len(squares) and figure["estimate"] == pytest.approx(np.mean(squares), abs=0.01)
    assert reports[2]["rows"]["error/explained_variance"]["estimate"] == pytest.approx(0, abs=1e-9)
    assert reports[4]["rows"]["baseline/rho"]["estimate"] is None, "nothing to weigh against itself"

    page = (folder / "out/report.html").read_text(encoding="utf-8")
    elements = Elements(page)
    assert HOSTILE in elements.text and "<b>" not in page
    assert "script" not in elements.tags and "svg" in elements.tags
    assert not {"src", "href", "onload"} & {name for name, _ in elements.attributes}
    assert not re.findall(r"https?://|@import|url\(", page)
    for section in SECTIONS:
        assert section.title in elements.text
        assert all(row.label in elements.text for row in section.rows)


@pytest.mark.slow
def test_it_is_a_command(folder):
    command = [BIN / "trl-credit", *arguments(folder, "constant", output_dir="alone", prompts=2, continuations=4)]
    output = run([*command, "--completions", 1], cwd=folder)
    assert "mean squared error" in output
    assert (folder / "alone/report.html").is_file() and (folder / "alone/probes/probes.json").is_file()


@pytest.mark.parametrize(
    ("critics", "changes", "message"),
    [
        (["{}/policy"], {}, "is a causal LM (Qwen2ForCausalLM), which has no values: give a critic"),
        (["{}/nothing"], {}, "nothing"),
        (["constant:x"], {}, "constant:VALUE needs a number, got 'x'"),
        (["leave_one_out"], {"completions": 1, "output_dir": "few"}, "needs probes with at least 2 completions"),
        (["constant"], {"dataset_name": "none.jsonl"}, "there is no file none.jsonl"),
        (["constant"], {"reward_funcs": "accuracy"}, "'accuracy' is neither one of"),
        (["constant"], {"reward_funcs": "chain_reward.gone"}, "'chain_reward.gone' cannot be imported"),
        (["constant"], {"cuts": "words"}, "`cuts` must be 'deciles', 'lines', a number of tokens or 'after:TEXT'"),
        (["constant"], {"temperature": 0}, "`temperature` must be positive, got 0.0"),
        (["constant"], {"continuations": 8}, "holds probes with continuations=32, and continuations=8 is asked for"),
        (["constant"], {"prompts": 0}, "--prompts must be at least 1, got 0"),
    ],
)
@pytest.mark.slow
def test_bad_input(folder, capsys, monkeypatch, critics, changes, message):
    monkeypatch.chdir(folder)
    if not (folder / "out/probes/probes.json").exists():
        assert main(arguments(folder, "constant")) == 0
    try:
        status = main(arguments(folder, *[critic.format(folder) for critic in critics], **changes))
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_a_critic_of_another_vocabulary_is_refused(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["another"])
    make_token_critic(tiny_model(tokenizer=tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert main(arguments(folder, tmp_path)) == 2
    assert "has another vocabulary than the policy" in capsys.readouterr().err


# --- What the documentation says


def test_options_and_figures_of_the_documentation_are_those_of_the_command():
    page = (Path(__file__).parents[1] / "docs/critic_report.md").read_text(encoding="utf-8")
    options = re.findall(r"^\| `(--\w+)` \| ([^|]*?) ?\| (.*?) \|$", page, flags=re.MULTILINE)
    expected = []
    for action in make_parser()._actions[1:]:
        default = "" if action.default is None or action.default is False else action.default
        default = " ".join(f"{x:g}" for x in default) if isinstance(default, tuple) else str(default)
        text = re.sub(r" ?\(default: .*\)$", "", action.help)
        expected.append((action.option_strings[0], "required" if action.required else default, text))
    assert options == expected
    figures = re.findall(r"^\| ([^|]*)\| ([^|]*) \| (\d?|least|most) ?\| [^|]*\|$", page, flags=re.MULTILINE)
    documented, title = {}, ""
    for section, label, ideal in figures:
        title = section.strip() or title
        documented.setdefault(title, []).append((label.strip(), ideal))
    for section in SECTIONS:
        for row in section.rows:
            assert (row.label, row.ideal) in documented[section.title], row.name


# --- The page


def a_report(name, curves):
    return CriticReport(name, {}, curves, {"mean_reward": 0.5, "sampled_tokens": 1})


def test_plots_leave_out_what_is_not_known():
    (plot,) = (plot for section in SECTIONS for plot in section.plots if plot.name == "error/mse_by_position")
    nan = float("nan")
    curve = [(0.0, Figure(0.1, 0.0, 0.2, 5)), (0.1, Figure(nan, nan, nan, 0)), (0.2, Figure(0.3, nan, nan, 1))]
    svg = draw(plot, [a_report("a", {plot.name: curve})])
    assert svg.count('class="mark"') == 2 and svg.count('class="bar"') == 1 and "nan" not in svg
    assert draw(plot, [a_report("a", {})]) == ""


def test_more_critics_than_colours_and_flat_curves_can_be_drawn(tmp_path):
    curves = {plot.name: [(0.0, Figure(1.0, 1.0, 1.0, 3))] for section in SECTIONS for plot in section.plots}
    write_page(tmp_path / "page.html", [a_report(f"critic {i}", curves) for i in range(7)])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('class="mark"') >= 7 * len(curves) and "nan" not in page
    Elements(page)


def test_figures_as_text():
    assert show(Figure(-0.25, -0.5, 0.0, 9)) == "−0.250 [−0.500, 0.000]"
    assert show(Figure(0.5, float("nan"), float("nan"), 9)) == "0.500"
    assert show(Figure(float("nan"), 0, 0, 0)) == "–" == show(None)
