import functools
import logging
import random
import subprocess
import sys
import warnings
from dataclasses import replace

import datasets
import pytest
import torch
from tiny import tiny_model_dir
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_credit.toy
from trl_credit.credit.fit import explained_variance, fit_sums
from trl_credit.critics.critic import Critic
from trl_credit.toy import quickstart, tiny_model
from trl_credit.toy.scoring import Estimate, evaluate, explained_within_problems, held_out_problems
from trl_credit.toy.task import ALPHABET, ChainTask, ChatTask, Teacher, solve, value
from trl_credit.toy.tiny_model import TinyModelSettings, fit_and_save, load, make_tokenizer


CHAIN = ChainTask((4, 5, 6))
CHAT = ChatTask((3,))


# --- Problems and their verifier


def test_products_come_first_and_digits_are_modulo_10():
    assert solve("3+4*2-1") == "3+8-1=1-1=0"
    assert solve("7-9*9*2") == "7-1*2=7-2=5"
    assert solve("2-4*2") == "2-8=4"
    assert value("3+4*2-1") == 10
    assert value("7-9*9*2") == -155


def test_a_teacher_that_always_forgets_works_from_left_to_right():
    assert Teacher(forgets=1.0, slips=0.0).solve("3+4*2-1", random.Random(0)) == "7*2-1=4-1=3"


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("3+8-1=1-1=0", True),
        ("0", True),  # only the answer is looked at
        ("7*2-1=4-1=3", False),
        ("3+8-1=1-1=10", False),
        ("3+8-1=1-1=", False),
        ("3+8-1=1-1", False),
        ("=0", False),
        ("3+8-1==0", False),
        ("3+8-1=1-1=0=", False),
        ("3+8-1=1-1=0 ", False),
        ("", False),
    ],
)
def test_verifier_of_chains(completion, right):
    assert CHAIN.is_correct("3+4*2-1", completion) is right


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("4 * 2 = 8, 3 + 8 = 11.\nAnswer: 11", True),
        ("So, the answer is **11**.", True),
        ("It is 14. No: 11.0", True),
        ("The answer is 14.", False),
        ("11, or 14", False),
        ("11.5", False),
        ("-11", False),
        ("110", False),
        ("eleven", False),
        ("", False),
    ],
)
def test_verifier_of_plain_language(completion, right):
    assert CHAT.is_correct("3+4*2", completion) is right


def test_a_minus_between_numbers_is_not_a_sign():
    assert CHAT.is_correct("9-3*2", "9-6 = 6-3")
    assert not CHAT.is_correct("9-3*2", "-3")
    assert CHAT.is_correct("3-3*2", "3 - 6 = -3")


@pytest.mark.parametrize("task", [CHAIN, CHAT])
def test_training_never_sees_a_held_out_problem(task):
    rng = random.Random(0)
    trained = {task.draw(rng) for _ in range(3000)}
    assert len(trained) > 1000
    assert trained.isdisjoint(held_out_problems(task, 3000))


def test_completions_have_room():
    longest = max(len(solve(problem)) for problem in held_out_problems(CHAIN, 200))
    assert longest == len("1+1+1+1+1=1+1+1+1=1+1+1=1+1=1")
    assert longest < CHAIN.max_completion_length  # and the end of the sequence


# --- The tiny model


def test_tokenizer_survives_a_round_trip_through_the_disk(tmp_path):
    saved = make_tokenizer()
    saved.save_pretrained(tmp_path)
    tiny_model.make_model(saved, TinyModelSettings()).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in [ALPHABET, "3+4*2-1=3+8-1=1-1=0"]:
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer("0" + tokenizer.eos_token).input_ids[-1] == saved.eos_token_id == tokenizer.eos_token_id


def test_the_same_settings_give_the_same_model(tmp_path):
    settings = TinyModelSettings(steps=3, batch_size=4)
    for name in "ab":
        torch.manual_seed(ord(name))
        fit_and_save(settings, tmp_path / name)
    weights = [load(tmp_path / name)[0].state_dict() for name in "ab"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_confidence_interval():
    estimate = Estimate.of([True] * 50 + [False] * 50)
    assert estimate.mean == 0.5
    assert estimate.half_width == pytest.approx(1.96 * 0.05025, rel=1e-3)
    assert f"{estimate} {estimate:+}" == "50.0 ± 9.8 % +50.0 ± 9.8 %"


# --- What a critic knows


class BeginsWithADigit(ChainTask):
    """Right with a digit as the first token, which a model with random weights writes more often than not."""

    def is_correct(self, problem: str, completion: str) -> bool:
        return completion[:1].isdigit()


class ReadingCritic(Critic):
    """Values by the kind of the first token, `before` where there is none yet, and an offset by the prompt's tokens."""

    def __init__(self, before: float, right: float, wrong: float, offset: float = 0.0):
        super().__init__(torch.nn.Linear(1, 1), "by the first token")
        self.before, self.right, self.wrong, self.offset = before, right, wrong, offset

    def state_values(self, rollout: dict) -> torch.Tensor:
        first = rollout["completion_ids"][:, 0] < 10  # ids of digits
        values = torch.full((len(first), rollout["completion_ids"].shape[1] + 1), self.before)
        values[:, 1:] = torch.where(first, self.right, self.wrong)[:, None]
        problem = rollout["prompt_ids"].sum(1, keepdim=True)
        return values + self.offset * problem


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    return tiny_model.make_model(tokenizer, TinyModelSettings(hidden_size=32, layers=1, heads=2)), tokenizer


def explained(untrained, critic: Critic, problems: int = 8) -> Estimate:
    task = BeginsWithADigit((3,))
    return explained_within_problems(critic, *untrained, task, held_out_problems(task, problems), batch_size=16)


def test_a_critic_that_knows_problems_and_no_step_explains_nothing_within_them(untrained):
    for offset in (0.0, 0.1):
        known = explained(untrained, ReadingCritic(0.6, 0.6, 0.6, offset))
        assert known.mean == pytest.approx(0.0, abs=1e-6)
        assert known.half_width == pytest.approx(0.0, abs=1e-6)


def test_a_critic_that_sees_the_deciding_token_explains_all_but_the_state_before_it(untrained):
    known = explained(untrained, ReadingCritic(0.6, 1.0, 0.0))
    assert 0.5 < known.mean < 0.8  # of about ten states one is before the first token: without it 0.84
    assert 0 < known.half_width < 0.3
    assert explained(untrained, ReadingCritic(0.6, 0.0, 1.0)).mean < -1  # a critic that has it the wrong way round


def test_what_a_critic_explains_is_the_explained_variance_within_prompts(untrained, monkeypatch):
    lines = []
    monkeypatch.setattr("trl_credit.toy.scoring.fit_sums", lambda *of: lines.append(fit_sums(*of)) or lines[-1])
    known = explained(untrained, ReadingCritic(0.6, 0.9, 0.2))
    assert len(lines) == 8 * 8
    assert known.mean == pytest.approx(explained_variance(torch.cat(lines), torch.arange(64) // 8), abs=1e-9)


def test_interval_of_a_share_holds_it_95_times_in_100():
    rng = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(1000):
        wholes = torch.rand(100, generator=rng) + 0.1
        share = Estimate.of_share(wholes * (0.3 + torch.randn(100, generator=rng)), wholes)
        held += abs(share.mean - 0.3) <= share.half_width
    assert held / 1000 == pytest.approx(0.95, abs=0.025)


# --- The program


@pytest.fixture
def small(monkeypatch):
    """A smaller model of shorter problems, with little training: the program runs as ever, in seconds."""
    settings = functools.partial(TinyModelSettings, hidden_size=32, layers=1, heads=2, steps=60, batch_size=32)
    monkeypatch.setattr(tiny_model, "TinyModelSettings", settings)
    for name in ("TINY", "TINY_WITH_CRITIC"):
        monkeypatch.setattr(quickstart, name, replace(getattr(quickstart, name), terms=(3,)))
    return settings(terms=(3,))


@pytest.mark.parametrize("trainer", ["grpo-lambda", "grpo", "vapo"])
@pytest.mark.slow
def test_from_nothing_to_table_picture_and_checkpoint(tmp_path, small, capsys, trainer):
    argv = ["--steps", "2", "--problems", "32", "--trainer", trainer, "--output_dir", str(tmp_path)]
    assert trl_credit.toy.main(argv) == 0
    shown = capsys.readouterr().out
    for text in ("Fitting a tiny model", "32 held-out problems", "sampled", "greedy", "gain", "after", "checkpoint"):
        assert text in shown
    assert ("GRPO-λ" in shown) == (trainer == "grpo-lambda")
    assert len(shown.splitlines()) < 30  # nothing but that
    for text in ("Pretraining its critic", "the critic's values explain"):
        assert (text in shown) == (trainer == "vapo")

    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model", padding_side="left")
    assert tokenizer.decode(tokenizer(ALPHABET).input_ids) == ALPHABET
    start, _ = load(small.folder(tmp_path))
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))
    assert len(evaluate(model, tokenizer, CHAIN, held_out_problems(CHAIN, 4)).greedy) == 4

    fitted = small.folder(tmp_path).stat().st_mtime_ns
    assert trl_credit.toy.main(argv) == 0  # the tiny model is there already
    assert "Fitting" not in capsys.readouterr().out
    assert small.folder(tmp_path).stat().st_mtime_ns == fitted


@pytest.mark.slow
def test_time_limit_ends_the_training(tmp_path, small, capsys):
    argv = ["--steps", "500", "--problems", "4", "--minutes", "0.001", "--output_dir", str(tmp_path)]
    assert trl_credit.toy.main(argv) == 0
    assert "Stopped after 0.001 minutes, at step 1 of 500" in capsys.readouterr().out


def test_model_without_chat_template_is_refused(tmp_path, small, capsys):
    fit_and_save(replace(small, steps=1), tmp_path / "model")
    assert trl_credit.toy.main(["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path)]) == 2
    assert "must be a chat model" in capsys.readouterr().out


def test_chat_model_of_ones_own(tmp_path, capsys):
    model = tiny_model_dir(tmp_path)
    argv = ["--model", str(model), "--steps", "1", "--problems", "4", "--output_dir", str(tmp_path / "out")]
    assert trl_credit.toy.main(argv) == 0
    assert "4 held-out problems" in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")


@pytest.mark.slow
def test_libraries_talk_again_after_the_run(small, tmp_path):
    before = (logging.root.manager.disable, datasets.are_progress_bars_disabled(), list(warnings.filters))
    trl_credit.toy.main(["--steps", "1", "--problems", "4", "--output_dir", str(tmp_path)])
    assert (logging.root.manager.disable, datasets.are_progress_bars_disabled(), list(warnings.filters)) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "0"], "--steps must be positive, got 0"),
        (["--trace_lambda", "1.5"], r"--trace_lambda must be in [0, 1], got 1.5"),
        (["--trace_lambda", "0.9", "--trainer", "grpo"], "--trace_lambda is an option of --trainer grpo-lambda"),
        (["--trainer", "ppo"], "invalid choice: 'ppo'"),
    ],
)
def test_bad_options_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        trl_credit.toy.main(argv)
    assert message in capsys.readouterr().err


def test_help_is_quick():
    code = """
import sys, trl_credit.toy
try:
    trl_credit.toy.main(["--help"])
finally:
    print("torch loaded:", "torch" in sys.modules)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--model" in shown
    assert "torch loaded: False" in shown
