"""The table of `docs/bad_input.md`, row by row: what is said, and that nothing is trained on NaN."""

import builtins
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig

from trl_credit import GRPOLambdaConfig, GRPOLambdaTrainer


DOCS = Path(__file__).parent.parent / "docs" / "bad_input.md"
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def bench(model_dir, tmp_path):
    return Bench(model_dir, tmp_path)


class Bench:
    """A place to train in: a model of 16 dimensions, four completions of 8 tokens a step, two steps."""

    def __init__(self, model_dir: str, out: Path):
        self.model_dir, self.out = model_dir, out

    def config(self, config_class=GRPOLambdaConfig, **settings):
        common = {
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "max_completion_length": 8,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "trace_lambda": 0.9,
            "bf16": False,
            "report_to": [],
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        if config_class is GRPOConfig:
            del common["trace_lambda"]
        return config_class(str(self.out), **common | settings)

    def trainer(self, reward=None, prompts=("a", "b"), args=None, callbacks=(), rollout_func=None, **settings):
        return GRPOLambdaTrainer(
            model=self.model_dir,
            reward_funcs=reward or (lambda completions, **kwargs: [float(len(set(c))) for c in completions]),
            args=args or self.config(**settings),
            train_dataset=Dataset.from_dict({"prompt": list(prompts)}),
            callbacks=list(callbacks),
            rollout_func=rollout_func,
        )

    def train(self, **kwargs):
        """Train, whatever comes of it, and see that no weight is NaN afterwards."""
        trainer = self.trainer(**kwargs)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        try:
            trainer.train()
        finally:
            assert all(p.isfinite().all() for p in trainer.model.parameters())
        trainer.moved = any(not torch.equal(p, q) for p, q in zip(before, trainer.model.parameters(), strict=True))
        return trainer


# --- The cases, by the first column of the table


def settings(text: str):
    return lambda bench: bench.config(**eval(f"dict({text})"))


def reward(values):
    def case(bench, is_async=False):
        if is_async:

            async def reward(completions, **kwargs):
                return values(len(completions))
        else:

            def reward(completions, **kwargs):
                return values(len(completions))

        return bench.train(reward=reward)

    return case


def rollout(completions, logprobs=True, **settings):
    def rollout_func(prompts, trainer):
        ids = completions(len(prompts), trainer.processing_class.eos_token_id)
        if ids is None:
            return None
        output = {"prompt_ids": [[65]] * len(prompts), "completion_ids": ids}
        return output | ({"logprobs": [[-1.0] * len(row) for row in ids]} if logprobs else {})

    return lambda bench: bench.train(
        # Rewards that differ where completions do not
        reward=lambda completions, **kwargs: [float(i) for i in range(len(completions))],
        rollout_func=rollout_func,
        **settings,
    )


def prompts_with(prompt):
    def case(bench):
        with pytest.raises(ValueError, match="Drop such rows from the dataset"):
            bench.train(prompts=["a", prompt])
        bench.train(prompts=[prompt, prompt])

    return case


def wrong_config(bench):
    return bench.trainer(args=bench.config(GRPOConfig))


def wrong_trl(version, moved="pass"):
    def case(bench):
        return refused_on_import(
            f"""
from importlib import metadata
import trl
version = metadata.version
metadata.version = lambda name: {version!r} if name == "trl" else version(name)
{moved}
import trl_credit.seam
"""
        )

    return case


def refused_on_import(code):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""}
    )
    assert result.returncode == 1
    name, message = re.search(r"^(\w+Error): (.*)\Z", result.stderr.strip(), re.M | re.S).groups()
    raise {"ImportError": ImportError}[name](message)


def all_truncated(bench):
    eos = [bench.trainer().processing_class.eos_token_id, bench.trainer().processing_class.pad_token_id]
    trainer = bench.train(
        mask_truncated_completions=True, max_completion_length=3, generation_kwargs={"suppress_tokens": eos}
    )
    assert not trainer.moved
    assert [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry] == [0, 0]
    return trainer


class Break(TrainerCallback):
    """Break the weights, or their gradient, when the second step begins."""

    def __init__(self, what: str):
        self.what = what

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            weight = next(model.parameters())
            if self.what == "weights":
                self.kept = weight.detach().clone()
                weight.data.fill_(NAN)
            else:
                weight.register_hook(lambda grad: grad * NAN)


def broken(what: str, **settings):
    def case(bench):
        breaker = Break(what)
        trainer = bench.trainer(callbacks=[breaker], save_strategy="steps", save_steps=1, **settings)
        try:
            trainer.train()
        finally:
            if what == "gradient":
                assert all(p.isfinite().all() for p in trainer.model.parameters())
            saved = AutoModelForCausalLM.from_pretrained(bench.out / "checkpoint-1")
            assert all(p.isfinite().all() for p in saved.parameters())
            assert sorted(path.name for path in bench.out.glob("checkpoint-*")) == ["checkpoint-1"]

    return case


REWARDS = {
    "three rewards": lambda n: [0.0] * (n - 1),
    "five rewards": lambda n: [0.0] * (n + 1),
    "one number for all": lambda n: 1.0,
    "`None` for all": lambda n: None,
    "a string": lambda n: "good",
    "a matrix": lambda n: torch.zeros(n, 2),
    "strings": lambda n: ["good"] * n,
    "lists": lambda n: [[1.0]] * n,
    "infinity": lambda n: [0.0, 1.0, INF, 2.0],
    "minus infinity": lambda n: [0.0, 1.0, -INF, 2.0],
    "a `None` among numbers": lambda n: [0.0, 1.0, None, 2.0],
    "a NaN among numbers": lambda n: [0.0, 1.0, NAN, 2.0],
    "only `None`s": lambda n: [None] * n,
}
CASES = {
    **{name: reward(values) for name, values in REWARDS.items()},
    "`num_generations=3` with batches of 4": settings("num_generations=3"),
    "a `GRPOConfig` for the trainer": wrong_config,
    "an older version of TRL": wrong_trl("1.13.0"),
    "a newer version of TRL without a name that the package builds on": wrong_trl(
        "1.17.0", "del trl.GRPOTrainer._compute_loss"
    ),
    "a tensor, an array, a generator": lambda bench: [
        reward(values)(bench)
        for values in (lambda n: torch.arange(n), lambda n: np.arange(n), lambda n: (float(i) for i in range(n)))
    ][-1],
    "a prompt longer than the context": lambda bench: bench.train(prompts=["a", "x" * 600]),
    "a prompt that is empty, or all of them": prompts_with(""),
    "a prompt that is null, or all of them": prompts_with(None),
    "a `rollout_func` that returns a completion of no tokens": rollout(lambda n, eos: [[66]] + [[]] * (n - 1)),
    "a `rollout_func` that returns no dict": rollout(lambda n, eos: None),
    "a `rollout_func` that leaves `logprobs` out": rollout(lambda n, eos: [[66]] * n, logprobs=False),
    "completions of EOS alone": rollout(lambda n, eos: [[eos]] * n),
    "a batch of truncated completions only, with `mask_truncated_completions=True`": all_truncated,
    "a loss of NaN": broken("weights", num_iterations=2),
    "a gradient of NaN under a finite loss": broken("gradient"),
    "weights of NaN when a rollout starts": broken("weights"),
}


def rows() -> list[tuple[str, str, str]]:
    table = re.findall(r"^\| (.*?) \| (.*?) \| (.*) \|$", DOCS.read_text(encoding="utf-8"), re.M)
    return [row for row in table if row[0] not in ("input", "---")]


def case_of(what: str):
    return CASES[what] if what in CASES else settings(what.strip("`"))


ERRORS = [row for row in rows() if row[1].startswith("`")]
HANDLED = [row for row in rows() if row[1].startswith("trains")]


def named_in(message: str) -> list[str]:
    """Options, values and limits: what is in backticks or quotes, and numbers."""
    return re.findall(r"`[^`]+`|(?<!\w)'[^']+'|-?\b\d[\w.]*\b|\b(?:None|nan|inf)\b", message)


def check_error(run, error: str, message: str):
    with pytest.raises(getattr(builtins, error.strip("`"))) as raised:
        run()
    assert named_in(message), message
    for name in named_in(message):
        assert name in str(raised.value)


@pytest.mark.parametrize("row", ERRORS, ids=lambda row: row[0])
def test_error_says_what_was_given_and_what_is_allowed(bench, row):
    what, error, message = row
    check_error(lambda: case_of(what)(bench), error, message)


@pytest.mark.parametrize("row", [row for row in ERRORS if row[0] in REWARDS], ids=lambda row: row[0])
def test_error_is_the_same_for_an_async_reward(bench, row):
    what, error, message = row
    check_error(lambda: case_of(what)(bench, is_async=True), error, message)


@pytest.mark.parametrize("row", HANDLED, ids=lambda row: row[0])
def test_what_is_handled_is_logged(bench, row):
    what, _, metric = row
    trainer = case_of(what)(bench)
    name, value = re.fullmatch(r"`(.*)` = (.*)", metric).groups()
    logged = [entry[name] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [float(value)] * 2
    assert trainer.moved == (
        what not in ("only `None`s", "a batch of truncated completions only, with `mask_truncated_completions=True`")
    )


@pytest.mark.parametrize("nothing", [None, NAN], ids=str)
def test_unscored_completion_has_no_advantage_and_no_part_in_its_group(bench, nothing):
    trainer = bench.train(
        reward=lambda completions, **kwargs: [0.0, 1.0, nothing, 2.0], min_advantage=None, max_steps=1
    )
    assert list(trainer._logs["advantages"]) == pytest.approx([-1, 0, 0, 1], abs=1e-3)


def test_nan_reward_is_warned_of(bench, caplog):
    with caplog.at_level("WARNING"):
        CASES["a NaN among numbers"](bench)
    assert "'reward' returned NaN for completion 2" in caplog.text


def test_each_case_is_a_row_of_the_docs_and_each_row_a_case():
    inputs = [row[0] for row in rows()]
    assert len(inputs) == len(set(inputs)) == len(ERRORS) + len(HANDLED)
    assert set(CASES) <= set(inputs)
    names = inspect.signature(GRPOLambdaConfig).parameters
    for what in set(inputs) - set(CASES):
        assert re.match(r"`(\w+)=", what)[1] in names, what
