"""A run of TRL, looked at, and the checks that are made of it."""

import inspect
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from datasets import Dataset


FORWARD = "_get_per_token_logps_and_entropies"
WRAPPED = (
    "_tokenize_prompts",
    "_calculate_rewards",
    "_generate_and_score_completions",
    FORWARD,
    "_compute_loss",
    "_get_grad_norm",
    "_run_epoch",
    "_finalize_training",
    "log",
    "create_model_card",
)
SETTINGS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_generations": 2,
    "num_iterations": 2,
    "max_completion_length": 4,
    "max_steps": 2,
    "temperature": 0.7,
    "beta": 0.04,
    "loss_type": "grpo",
    "entropy_coef": 0.01,
    "epsilon": 0.1,
    "epsilon_high": 0.3,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "disable_tqdm": True,
    "save_only_model": True,
    "save_steps": 2,
}


class Seen(SimpleNamespace):
    """A call: `args`, `kwargs`, and the `result` if there was one."""


def count_letters(completions, **kwargs):
    return [float(len(set(completion))) for completion in completions]


def watch(model_dir: str, out: Path) -> SimpleNamespace:
    """Train two steps with TRL's trainer as it is now. `calls` are those of the training, `all_calls` goes on."""
    calls: dict[str, list[Seen]] = defaultdict(list)

    def remember(name, original):
        def method(self, *args, **kwargs):
            calls[name].append(seen := Seen(args=args, kwargs=kwargs, result=None))
            seen.result = original(self, *args, **kwargs)
            if name == "_generate_and_score_completions" and "completion_ids" in seen.result:
                seen.result["first_token"] = seen.result["completion_ids"][:, 0]  # what a trainer of ours would add
            return seen.result

        return method

    base, trainer, crash = trl.GRPOTrainer, None, None
    methods = {name: remember(name, getattr(base, name)) for name in WRAPPED if hasattr(base, name)}
    try:
        trainer = type("Watched", (base,), methods)(
            model=model_dir,
            reward_funcs=count_letters,
            args=trl.GRPOConfig(str(out), **SETTINGS),
            train_dataset=Dataset.from_dict({"prompt": ["ab", "cde"]}),
        )
        trainer.train()
    except Exception as error:
        crash = error
    if trainer is not None:
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
    training = defaultdict(list, {name: list(seen) for name, seen in calls.items()})
    return SimpleNamespace(trainer=trainer, calls=training, all_calls=calls, crash=crash)


def loss_inputs(run) -> dict:
    """The last micro-batch, with ratios and advantages of all kinds."""
    assert run.calls["_compute_loss"], "`_compute_loss` is not called any more"
    inputs, logps = dict(run.calls["_compute_loss"][-1].args[1]), run.calls[FORWARD][-1].result[0].detach()
    noise = torch.linspace(-0.8, 0.8, logps.numel()).view_as(logps)
    changes = {"old_per_token_logps": logps + noise, "ref_per_token_logps": logps - 2 * noise}
    return inputs | changes | {"advantages": torch.tensor([1.0, -1.0])}


def loss_of(run, inputs, **attributes) -> float:
    """TRL's loss, with attributes of the trainer changed as the seam changes them."""
    kept = {name: getattr(run.trainer, name) for name in attributes if hasattr(run.trainer, name)}
    run.trainer.__dict__.update(attributes)
    try:
        return run.trainer._compute_loss(run.trainer.model, inputs).item()
    finally:
        run.trainer.__dict__.update(kept)


# --- The checks

CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def canary(model_dir: str, out: Path) -> Iterator[str]:
    """What TRL no longer offers, by name: first what can be seen from outside, then what a run of TRL shows."""
    run: list[SimpleNamespace] = []
    for function in sorted(CHECKS, key=lambda function: len(inspect.signature(function).parameters)):
        if inspect.signature(function).parameters and not run:
            run.append(watch(model_dir, out))
            if run[0].crash is not None:
                yield f"a run of TRL ends with {run[0].crash!r}"
        try:
            function(*run)
        except AssertionError as error:
            yield str(error).splitlines()[0]
        except Exception as error:  # TRL itself broke: not the answer that is asked for
            yield f"{function.__name__} could not run: {error!r}"
