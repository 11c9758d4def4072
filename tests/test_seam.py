"""
The canary: every name, signature, key and shape of TRL that `trl_credit` builds on.

Each check says which name of TRL moved. That it would is shown by moving each name in turn, in TRL's own source.
"""

import ast
import contextlib
import gc
import importlib
import inspect
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from tiny import tiny_model_dir

import trl_credit
from trl_credit.seam import CreditTrainer
from trl_credit.trainers.grpo_lambda.grpo_lambda_config import TRACED_LOSS_TYPES


PACKAGE = Path(trl_credit.__file__).parent
FORWARD = "_get_per_token_logps_and_entropies"
WRAPPED = (
    "_tokenize_prompts",
    "_calculate_rewards",
    "_generate_and_score_completions",
    FORWARD,
    "_compute_loss",
    "_get_grad_norm",
    "log",
    "create_model_card",
)
# Names that only trainers with a critic need: `test_seam_critic.py` looks at them.
FOR_CRITICS = {
    "training_step",
    "_prepare_inputs",
    "_get_train_sampler",
    "_get_output_dir",
    "_save_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_rng_state",
    "_load_from_checkpoint",
    "_buffered_inputs",
    "_tokenizer",
    "environment_factories",
    "chat_template_kwargs",
    "save_model",
    "get_train_dataloader",
    "log_completions",
    "num_generations",
    "num_generations_eval",
    "num_iterations",
    "split_tensor_dict",
    "unwrap_model_for_generation",
    "VLLMGeneration",
}
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


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    gc.freeze()  # a trainer collects garbage, which takes longer than all else here
    return str(tiny_model_dir(tmp_path_factory.mktemp("model"), "qwen3_moe", layers=1))


# --- A run of TRL, looked at


class Seen(SimpleNamespace):
    """A call: `args`, `kwargs`, and the `result` if there was one."""


def count_letters(completions, **kwargs):
    return [float(len(set(completion))) for completion in completions]


def watch(model_dir: str, out: Path) -> SimpleNamespace:
    """Train two steps with TRL's trainer as it is now, and keep what its methods were given and gave back."""
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
    last_loss, last_forward = calls["_compute_loss"][-1:], calls[FORWARD][-1:]
    return SimpleNamespace(trainer=trainer, calls=calls, crash=crash, last_loss=last_loss, last_forward=last_forward)


def loss_inputs(run) -> dict:
    """The last micro-batch, with ratios and advantages of all kinds."""
    assert run.last_loss, "`_compute_loss` is not called any more"
    inputs, logps = dict(run.last_loss[0].args[1]), run.last_forward[0].result[0].detach()
    noise = torch.linspace(-0.8, 0.8, logps.numel()).view_as(logps)
    changes = {"old_per_token_logps": logps + noise, "ref_per_token_logps": logps - 2 * noise}
    return inputs | changes | {"advantages": torch.tensor([1.0, -1.0])}


def loss_of(run, inputs, **attributes) -> float:
    """TRL's loss, with attributes of the trainer changed as `trl_seam` changes them."""
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
        try:
            function(*run)
        except AssertionError as error:
            yield str(error).splitlines()[0]
        except Exception as error:  # TRL itself broke: not the answer that is asked for
            yield f"{function.__name__} could not run: {error!r}"


@check
def constructor():
    names = list(inspect.signature(trl.GRPOTrainer.__init__).parameters)[1:]
    for position, name in enumerate(("model", "reward_funcs", "args")):
        assert names[position] == name, f"argument {position} of `GRPOTrainer` is not `{name}` but `{names[position]}`"


@check
def wrapped_methods_are_called_as_we_take_them(run):
    for name in WRAPPED:
        assert run.calls[name], f"`{name}` is not called by a training step any more"
        for seen in run.calls[name]:
            try:
                inspect.signature(getattr(CreditTrainer, name)).bind(None, *seen.args, **seen.kwargs)
            except TypeError as error:
                raise AssertionError(f"`{name}` is called with arguments that we do not take: {error}") from error


@check
def names_of_ours_are_free(run):
    ours = set(vars(CreditTrainer)) - set(vars(object)) - set(WRAPPED) - FOR_CRITICS
    ours -= {"__init__", "__module__", "__annotations__"}
    for name in ours | {"_scores", "_loss", "_sums", "_token_scores", "_step_inputs", "_resume_from", "_credit_log"}:
        assert not hasattr(run.trainer, name), f"TRL has taken the name `{name}`, which is ours"


@check
def attributes(run):
    expected = {
        "beta": 0.04,
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "epsilon_low": 0.1,
        "epsilon_high": 0.3,
        "temperature": 0.7,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "aux_loss_enabled": True,
        "_entropy_bonus_enabled": True,
        "eos_token_ids": [run.trainer.processing_class.eos_token_id],
        "reward_func_names": ["count_letters"],
        "reward_funcs": [count_letters],
        "rollout_func": None,
    }
    for name, value in expected.items():
        found = getattr(run.trainer, name, "missing")
        assert found == value, f"`{name}` of GRPOTrainer should be {value!r} here and is {found!r}"
    assert set(getattr(run.trainer, "_metrics", {})) == {"train", "eval"}, "`_metrics` is not by `train` and `eval`"
    weights = getattr(run.trainer, "reward_weights", None)
    assert isinstance(weights, torch.Tensor) and weights.shape == (1,), f"`reward_weights` is {weights!r}"


@check
def prompt_ids_come_first(run):
    for seen in run.calls["_tokenize_prompts"]:
        (prompts,) = seen.args
        expected = run.trainer.processing_class(text=prompts)["input_ids"]
        assert isinstance(seen.result, tuple) and seen.result[0] == expected, (
            "`_tokenize_prompts` does not return the prompts' ids first"
        )


@check
def scores_are_those_of_all_reward_functions(run):
    for seen in run.calls["_calculate_rewards"]:
        assert isinstance(seen.result, torch.Tensor) and seen.result.shape == (4, 1), (
            "`_calculate_rewards` does not return a tensor (B, reward functions)"
        )


@check
def rollout(run):
    calls = [seen.result for seen in run.calls["_generate_and_score_completions"] if seen.result is not None]
    assert calls, "`_generate_and_score_completions` returned nothing"
    batch, prompt, length = 4, 3, SETTINGS["max_completion_length"]  # no completion of this seed ends before
    shapes = {
        "prompt_ids": (batch, prompt),
        "prompt_mask": (batch, prompt),
        "completion_ids": (batch, length),
        "completion_mask": (batch, length),
        "advantages": (batch,),
        "num_items_in_batch": (),
        "old_per_token_logps": (batch, length),
        "ref_per_token_logps": (batch, length),
    }
    for key, shape in shapes.items():
        found = calls[0].get(key)
        assert found is not None, f"`{key}` is not in the rollout any more"
        assert found.shape == shape, f"`{key}` of the rollout has shape {tuple(found.shape)} instead of {shape}"


@check
def tensors_of_ours_are_shuffled_and_split_with_the_rollout(run):
    micro_batches = [seen.args[1] for seen in run.calls["_compute_loss"]]
    assert len(micro_batches) == 4, "`_compute_loss` is not called once for each micro-batch"
    for inputs in micro_batches:
        assert "first_token" in inputs and torch.equal(inputs["first_token"], inputs["completion_ids"][:, 0]), (
            "`shuffle_sequence_dict` and `split_tensor_dict` do not treat our tensors as they treat TRL's"
        )


@check
def advantages_are_shown_in_the_completions_table(run):
    logs = getattr(run.trainer, "_logs", {})
    assert "advantages" in logs, "`_logs` has no `advantages` any more"
    calls = [seen.result for seen in run.calls["_generate_and_score_completions"] if seen.result is not None]
    assert list(logs["advantages"]) == pytest.approx(calls[-1].get("advantages", torch.zeros(0)).tolist()), (
        "`_logs` does not show the `advantages` of all completions of the latest rollout in order"
    )


@check
def log_probabilities(run):
    assert run.calls[FORWARD], f"`{FORWARD}` is not called any more"
    for seen in run.calls[FORWARD]:
        assert isinstance(seen.result, tuple) and len(seen.result) == 3, (
            f"`{FORWARD}` does not return (log-probabilities, entropies, auxiliary loss)"
        )
        assert seen.result[0].shape[1] == SETTINGS["max_completion_length"], f"`{FORWARD}` does not return (B, T)"
    assert seen.result[0].requires_grad, f"`{FORWARD}` of the loss has no gradient"


@check
def reward_and_rollout_functions_can_be_replaced(run):
    trainer, seen = run.trainer, {}

    def reward(completions, **kwargs):
        seen["reward"] = True
        return [0.0, 1.0]

    def own_rollout(prompts, trainer):
        seen["prompts"] = prompts
        return {
            "prompt_ids": [[65], [66]],
            "completion_ids": [[67, 68], [69, 70]],
            "logprobs": [[-1.0, -2.0], [-3.0, -4.0]],
            "env_mask": [[1, 0], [1, 1]],
        }

    trainer.reward_funcs, trainer.rollout_func = [reward], own_rollout
    try:
        rollout = trainer._generate_and_score_completions([{"prompt": "a"}, {"prompt": "a"}])
    except TypeError as error:
        raise AssertionError(f"`rollout_func` is not called with (prompts, trainer): {error}") from error
    finally:
        trainer.reward_funcs, trainer.rollout_func = [count_letters], None
    assert "prompts" in seen, "`rollout_func` of the trainer is not what makes the rollout"
    assert "reward" in seen, "`reward_funcs` of the trainer are not what scores the rollout"
    mask, sampled = rollout.get("tool_mask"), rollout.get("sampling_per_token_logps")
    assert mask is not None and mask.tolist() == [[1, 0], [1, 1]], "`tool_mask` is not in the rollout"
    assert sampled is not None and sampled.tolist() == [[-1, -2], [-3, -4]], (
        "`sampling_per_token_logps` is not in the rollout"
    )


@check
def log_probabilities_come_from_the_hidden_states(run):
    kept, inputs = {}, loss_inputs(run)
    hook = run.trainer.model.base_model.register_forward_hook(
        lambda module, args, output: kept.update(states=output.last_hidden_state)
    )
    try:
        loss_of(run, inputs)
    finally:
        hook.remove()
    assert "states" in kept, "the hidden states of a loss are not those of `base_model`"
    ids = inputs["completion_ids"]
    logits = run.trainer.model.get_output_embeddings()(kept["states"][:, -ids.shape[1] - 1 : -1]) / 0.7
    expected = logits.log_softmax(-1).gather(2, ids.unsqueeze(2)).squeeze(2)
    assert torch.allclose(run.calls[FORWARD][-1].result[0], expected, atol=1e-4), (
        "log-probabilities are not the softmax of LM head · `base_model` / `temperature`"
    )


@check
def loss_reads_its_terms_after_the_log_probabilities(run):
    events = []

    class Inputs(dict):
        def __getitem__(self, key):
            events.append(key)
            return super().__getitem__(key)

        def get(self, key, default=None):
            events.append(key)
            return super().get(key, default)

        def __contains__(self, key):
            events.append(key)
            return super().__contains__(key)

    inputs = Inputs(loss_inputs(run))
    inputs["sampling_per_token_logps"] = inputs["old_per_token_logps"]
    trainer = run.trainer
    forward = trainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (events.append("logps"), forward(*a, **k))[1]
    events.clear()
    try:
        loss_of(run, inputs, off_policy_mask_threshold=1.0)
    finally:
        del trainer._get_per_token_logps_and_entropies
    assert events.count("logps") == 1, (
        f"`_compute_loss` calls `_get_per_token_logps_and_entropies` {events.count('logps')} times"
    )
    before, after = events[: events.index("logps")], events[events.index("logps") :]
    for key in ("completion_ids", "completion_mask", "tool_mask"):
        assert key in before, f"`_compute_loss` does not read `{key}`"
    for key in ("advantages", "old_per_token_logps", "sampling_per_token_logps", "ref_per_token_logps"):
        assert key in after, f"`_compute_loss` does not read `{key}`"
        assert key not in before, f"`_compute_loss` reads `{key}` before the log-probabilities are known"


@check
def loss_takes_advantages_per_token(run):
    inputs = loss_inputs(run)
    per_token = inputs["advantages"].unsqueeze(1).expand(inputs["completion_ids"].shape)
    try:
        losses = loss_of(run, inputs), loss_of(run, inputs | {"advantages": per_token})
    except (RuntimeError, IndexError) as error:
        raise AssertionError(f"`_compute_loss` refuses `advantages` of shape (B, T): {error}") from error
    assert losses[0] == pytest.approx(losses[1]), "`_compute_loss` reads `advantages` of shape (B, T) in another way"


@check
def loss_follows_the_attributes_that_we_set_or_read(run):
    inputs = loss_inputs(run)
    loss = loss_of(run, inputs)
    others = {
        "beta": 0.0,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "top_entropy_quantile": 0.5,
        "off_policy_mask_threshold": -1.0,
        "epsilon_low": 0.5,
        "epsilon_high": 0.05,
        "importance_sampling_level": "sequence",
        "loss_type": "sapo",
    }
    for name, value in others.items():
        with contextlib.suppress(TypeError):  # followed in one place and not in another
            if loss_of(run, inputs, **{name: value}) != loss:
                continue
        raise AssertionError(f"`_compute_loss` does not follow `{name}`")
    default = run.trainer.args.use_bias_correction_kl
    run.trainer.args.use_bias_correction_kl = not default
    corrected = loss_of(run, inputs)
    run.trainer.args.use_bias_correction_kl = default
    assert corrected != loss, "`_compute_loss` does not follow `use_bias_correction_kl`"


@check
def loss_types(run):
    inputs = loss_inputs(run)
    for name in TRACED_LOSS_TYPES:
        try:
            loss_of(run, inputs, loss_type=name)
        except ValueError as error:
            raise AssertionError(f"`loss_type` `{name}` is gone: {error}") from error


@check
def metrics(run):
    inputs, expected = loss_inputs(run), {}
    expected["grpo"] = {"kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}
    expected["cispo"] = {"kl", "cispo_clip_ratio"}
    for loss_type, names in expected.items():
        found = {"train": defaultdict(list)}
        loss_of(run, inputs, loss_type=loss_type, _metrics=found)
        assert found["train"], "`_metrics` of the trainer is not where the loss puts its metrics"
        for name in names:
            assert len(found["train"][name]) == 1, f"the metric `{name}` of `loss_type={loss_type}` is gone"
        strange = {name for name in found["train"] if "clip_ratio" in name} - names
        assert strange <= {"clip_ratio/low_min", "clip_ratio/high_max"}, f"a new `clip_ratio` metric: {strange}"
    run.trainer._metrics["train"] = defaultdict(list, {"ours": [1.0, 2.0]})
    run.trainer.log(logs := {})
    assert logs.get("ours") == 1.5, "`log` does not log the means of `_metrics`"


@check
def evaluation_goes_the_same_way(run):
    before = {name: len(run.calls[name]) for name in ("_generate_and_score_completions", "_compute_loss")}
    run.trainer.model.eval()
    try:
        run.trainer.prediction_step(run.trainer.model, [{"prompt": "a"}, {"prompt": "a"}], False)
    finally:
        run.trainer.model.train()
    for name, count in before.items():
        assert len(run.calls[name]) == count + 1, f"`{name}` is not called in evaluation"
    assert run.trainer._metrics["eval"]["reward"], "`_metrics` of evaluation are not under `eval`"


@check
def model_card(run):
    ours = {
        "_name": "our-method",
        "_tag_names": ["our-tag"],
        "_paper": {"title": "our-paper", "id": "1", "citation": "our-citation"},
    }
    run.trainer.__dict__.update(ours)
    run.trainer.create_model_card()
    path = Path(run.trainer.args.output_dir, "README.md")
    assert path.exists(), "`create_model_card` does not write `README.md`"
    card = path.read_text(encoding="utf-8")
    assert "### Framework versions" in card, "the card has no `### Framework versions`"
    for name, texts in {**ours, "_paper": ours["_paper"].values(), "_name": ["our-method"]}.items():
        assert all(text in card for text in texts), f"the card does not say what `{name}` does"


@check
def functions():
    utils = importlib.import_module("trl.trainer.utils")
    for name in ("get_config_model_id", "is_async_callable", "maybe_gather_lm_head_ctx"):
        assert hasattr(utils, name), f"`trl.trainer.utils` has no `{name}` any more"

    async def coroutine():
        pass

    assert utils.is_async_callable(coroutine) and not utils.is_async_callable(print), "`is_async_callable` errs"
    assert utils.get_config_model_id(SimpleNamespace(_name_or_path="a/b")) == "a/b", "`get_config_model_id` errs"
    try:
        context = utils.maybe_gather_lm_head_ctx(torch.nn.Parameter(torch.zeros(1)), None)
    except TypeError as error:
        raise AssertionError(f"`maybe_gather_lm_head_ctx` does not take (weight, bias): {error}") from error
    assert isinstance(context, contextlib.AbstractContextManager), "`maybe_gather_lm_head_ctx` is no context"


@check
def command_line():
    script = importlib.import_module("trl.scripts.grpo")
    assert hasattr(script, "GRPOScriptArguments"), "`trl.scripts.grpo` has no `GRPOScriptArguments` any more"
    classes = (script.GRPOScriptArguments, trl.GRPOConfig, trl.ModelConfig, trl.DatasetMixtureConfig)
    parser = trl.TrlParser(classes, prog="trl-credit", allow_abbrev=False)
    try:
        *_, from_file, from_argv = parser.parse_args_and_config(
            ["--output_dir", "out", "--bf16", "False", "--num_processes", "2"],
            return_remaining_strings=True,
            separate_remaining_strings=True,
        )
    except (AttributeError, TypeError) as error:
        raise AssertionError(f"`parse_args_and_config` has another signature: {error}") from error
    assert (from_file, from_argv) == ([], ["--num_processes", "2"]), (
        "`parse_args_and_config` does not return the remaining arguments of file and command line last"
    )
    for name, attribute, arguments, expected in (
        ("trl.cli.commands.training", "_subtract_subsequence", (["a", "b", "c"], ["b"]), ["a", "c"]),
        ("trl.cli.accelerate_config", "resolve_accelerate_config_argument", (["--x"],), ["--x"]),
    ):
        function = getattr(importlib.import_module(name), attribute, None)
        assert function is not None and function(*arguments) == expected, f"`{name}.{attribute}` is gone or errs"


@check
def launcher():
    module, seen = importlib.import_module("trl.cli.accelerate_launcher"), []
    launch = getattr(module, "launch_training_script", None)
    assert launch is not None, "`trl.cli.accelerate_launcher` has no `launch_training_script` any more"
    try:
        launch(
            __file__,
            ["--num_processes", "2"],
            ["--x"],
            launch_command_fn=seen.append,
            launch_parser_fn=importlib.import_module("accelerate.commands.launch").launch_command_parser,
        )
    except TypeError as error:
        raise AssertionError(f"`launch_training_script` has another signature: {error}") from error
    assert [(args.training_script, args.num_processes) for args in seen] == [(__file__, 2)], (
        "`launch_training_script` does not launch a script by its absolute path"
    )


@check
def script_gets_its_trainer_from_trl_when_it_runs():
    for script, trainer in (("trl.scripts.grpo", "GRPOTrainer"), ("trl.scripts.sft", "SFTTrainer")):
        main = getattr(importlib.import_module(script), "main", None)
        assert isinstance(main, FunctionType), f"`{script}` has no `main` any more"
        assert trainer in main.__code__.co_varnames, f"`main` does not import `{trainer}` when it is called"
        parameters = list(inspect.signature(main).parameters)
        assert parameters == ["script_args", "training_args", "model_args", "dataset_args"], (
            f"`main` takes {parameters}, not what its parser returns"
        )
    env = importlib.import_module("trl.scripts.env")
    assert hasattr(env, "print_env"), "`trl.scripts.env` has no `print_env` any more"


def test_trl_is_as_we_know_it(model_dir, tmp_path):
    assert watch(model_dir, tmp_path).crash is None
    assert list(canary(model_dir, tmp_path)) == []


# --- Each check can fail

MODULES = (
    "transformers.trainer",
    "trl.trainer.utils",
    "trl.trainer.base_trainer",
    "trl.trainer.grpo_trainer",
    "trl.scripts.utils",
    "trl.scripts.env",
    "trl.scripts.grpo",
    "trl.scripts.sft",
    "trl.cli.accelerate_config",
    "trl.cli.accelerate_launcher",
    "trl.cli.commands.training",
)


FUNCTIONS = (
    "get_config_model_id",
    "is_async_callable",
    "maybe_gather_lm_head_ctx",
    "resolve_accelerate_config_argument",
    "_subtract_subsequence",
    "launch_training_script",
    "GRPOScriptArguments",
    "parse_args_and_config",
    "print_env",
)
ATTRIBUTES = (
    "beta",
    "loss_type",
    "importance_sampling_level",
    "epsilon_low",
    "epsilon_high",
    "temperature",
    "top_entropy_quantile",
    "off_policy_mask_threshold",
    "aux_loss_enabled",
    "_entropy_bonus_enabled",
    "eos_token_ids",
    "reward_func_names",
    "reward_funcs",
    "reward_weights",
    "rollout_func",
    "_metrics",
    "_logs",
)
KEYS = (
    "completion_ids",
    "completion_mask",
    "tool_mask",
    "advantages",
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
    "prompt_ids",
    "prompt_mask",
    "num_items_in_batch",
    "kl",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "cispo_clip_ratio",
    *TRACED_LOSS_TYPES,
)
LOSS = "    def _compute_loss(self, model, inputs):\n"
# What moves, and how: texts of TRL's source and what stands there instead, wherever they occur.
MOVES: list[tuple[str, ...]] = [
    *((name, f"def {name}( → def {name}_2(", f".{name}( → .{name}_2(") for name in WRAPPED if name != "log"),
    *((name, f"{name} → {name}_2") for name in FUNCTIONS),
    *((name, f"self.{name} → self.{name}_2") for name in ATTRIBUTES),
    *((name, f'"{name}" → "{name}_2"') for name in KEYS),
    *(
        (name, f"self._step = 0\n → self._step = 0\n        self.{name} = 0\n")
        for name in ("_scores", "_loss", "_sums", "_token_scores", "_step_inputs", "_resume_from")
    ),
    *((name, f" {name} = →  {name}_2 =", f"self.{name} → self.{name}_2") for name in ("_name", "_tag_names", "_paper")),
    # Signatures
    ("reward_funcs", "reward_funcs: RewardFunc | list[RewardFunc] | None = None,\n        args: → args:"),
    ("log", "self.log( → self.log_2(", "def log( → def log_2("),
    (
        "_tokenize_prompts",
        '(self, prompts: list):\n        """T → (self, prompts: list, _=0):\n        """T',
        "_prompts(prompts) → _prompts(prompts, 1)",
    ),
    (
        "_compute_loss",
        f"{LOSS} → {LOSS[:-3]}, _=None):\n",
        "_compute_loss(model, inputs) → _compute_loss(model, inputs, 0)",
    ),
    ("rollout_func", "self.rollout_func(prompts, self) → self.rollout_func(prompts)"),
    (
        "maybe_gather_lm_head_ctx",
        "lm_head_ctx(*params → lm_head_ctx(params",
        "lm_head_ctx(weight, bias) → lm_head_ctx(weight)",
    ),
    ("launch_training_script", "launch_command_fn → command"),
    ("parse_args_and_config", "separate_remaining_strings → separate"),
    ("main", "def main(script_args, training_args, → def main(training_args, script_args,"),
    # Order and number of calls
    ("old_per_token_logps", f'{LOSS} → {LOSS}        inputs.get("old_per_token_logps")\n'),
    ("advantages", f'{LOSS} → {LOSS}        inputs["advantages"]\n'),
    (
        FORWARD,
        f"        # Compute the loss\n →         self.{FORWARD}(model, input_ids, attention_mask, logits_to_keep)\n",
    ),
    ("GRPOTrainer", "    from trl import GRPOTrainer, →     global GRPOTrainer\n    from trl import GRPOTrainer,"),
    ("SFTTrainer", "    from trl import SFTTrainer, →     global SFTTrainer\n    from trl import SFTTrainer,"),
    # Shapes
    (FORWARD, "return logps, entropies, aux_loss → return logps, entropies"),
    (FORWARD, "logps = torch.cat(all_logps, dim=0) → logps = torch.cat(all_logps, dim=0)[:, 1:]"),
    ("advantages", "if advantages.dim() == 1:\n            advantages → if True:\n            advantages"),
    ("advantages", '"advantages": advantages, → "advantages": advantages.unsqueeze(1),'),
    ("_calculate_rewards", "return rewards_per_func\n → return rewards_per_func.sum(1)\n"),
    (
        "_tokenize_prompts",
        "return prompt_ids, images, multimodal_fields\n → return images, prompt_ids, multimodal_fields\n",
    ),
    ("_metrics", '{"train": defaultdict(list), "eval" → {"training": defaultdict(list), "eval"'),
    # Where the loss finds the options that we switch while it is computed
    ("beta", "if self.beta != → if self.args.beta !=", "self.beta * per → self.args.beta * per"),
    ("top_entropy_quantile", "if self.top_entropy_quantile → if self.args.top_entropy_quantile"),
    ("off_policy_mask_threshold", "if self.off_policy_mask_threshold → if self.args.off_policy_mask_threshold"),
    ("aux_loss_enabled", "if self.aux_loss_enabled: → if self.router_aux_loss_coef:"),
    ("_entropy_bonus_enabled", "if self._entropy_bonus_enabled: → if self.entropy_coef:"),
    # Behaviour
    ("use_bias_correction_kl", "if self.args.use_bias_correction_kl: → if False:"),
    ("temperature", "temperature=self.temperature,\n            cast → temperature=1.0,\n            cast"),
    ("base_model", "getattr(self, backbone_attr)(*args → getattr(self, backbone_attr).forward(*args"),
    ("shuffle_sequence_dict", "permute(val) for key → permute(val) if key[:2] != 'fi' else val for key"),
    ("_logs", 'self._logs["advantages"].extend(all → self._logs["advantages"].extendleft(all'),
    ("_metrics", "= sum(valid) / len(valid) if valid else None → = sum(valid)"),
    (
        "reward_funcs",
        "zip(self.reward_funcs, self.reward_p → zip(self._funcs, self.reward_p",
        "self.reward_funcs = reward_funcs → self._funcs = self.reward_funcs = reward_funcs",
    ),
    (
        "_compute_loss",
        "loss = self.compute_loss(model, inputs)\n            loss → loss = torch.zeros(1)\n            loss",
    ),
    ("launch_training_script", 'joinpath(script_name) → joinpath(script_name.split("/")[-1])'),
    (
        "### Framework versions",
        "    return card\n →     card.content = card.content.replace('Framework', '')\n    return card\n",
    ),
]


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move[0])
def test_canary_names_what_moved(model_dir, tmp_path, monkeypatch, move):
    name, *texts = move
    move_in_trl(monkeypatch, [tuple(text.split(" → ")) for text in texts])
    complaints = []
    for complaint in canary(model_dir, tmp_path):
        complaints.append(complaint)
        if f"`{name}`" in complaint or f".{name}`" in complaint:
            return
    raise AssertionError(f"the canary does not name {name}: {complaints}")


def move_in_trl(monkeypatch, replacements) -> None:
    """Load TRL again from a source in which some texts are others."""
    moved = {}
    for name in MODULES:
        module = importlib.import_module(name)
        source = inspect.getsource(module)
        texts = [(old, new) for old, new in replacements if old in source]
        # Modules that build on one that moved are loaded again too.
        if not texts and not (moved and name in ("trl.trainer.base_trainer", "trl.trainer.grpo_trainer")):
            continue
        for old, new in texts:
            source = source.replace(old, new)
        fresh = ModuleType(name)
        fresh.__dict__.update({key: vars(module)[key] for key in ("__package__", "__file__", "__spec__", "__loader__")})
        monkeypatch.setitem(sys.modules, name, fresh)
        parent, _, leaf = name.rpartition(".")
        monkeypatch.setattr(sys.modules[parent], leaf, fresh)
        exec(compile(source, f"{name}, moved", "exec"), vars(fresh))
        for package in (sys.modules["transformers"], sys.modules["trl"]):
            for public, value in vars(module).items():
                if public in vars(fresh) and vars(package).get(public) is value and isinstance(value, type):
                    monkeypatch.setattr(package, public, vars(fresh)[public])
        moved[name] = texts
    missing = [old for old, _ in replacements if not any(old == text for texts in moved.values() for text, _ in texts)]
    assert not missing, f"not in TRL's source: {missing}"


# --- The table is complete, and no other module needs one


def sources() -> dict[str, ast.Module]:
    return {
        str(path.relative_to(PACKAGE)): ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")
    }


def names_of_trl(private_only: bool) -> set[str]:
    """Attributes and methods that `GRPOTrainer` adds to `Trainer`, and the private ones of `Trainer`."""
    tree = ast.parse(inspect.getsource(importlib.import_module("trl.trainer.grpo_trainer")))
    names = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    names |= set(vars(trl.GRPOTrainer)) | {name for name in dir(transformers.Trainer) if name.startswith("_")}
    names = {name for name in names if not name.startswith("__")}
    return {name for name in names if name.startswith("_")} if private_only else names


def test_every_name_of_trl_that_we_use_is_in_the_table():
    covered = {name for name, *_ in MOVES}
    trees = sources()
    hooks = [trees["trl_seam.py"]] + [tree for name, tree in trees.items() if name.startswith("trainers")]
    used = {node.attr for tree in hooks for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    ours = {"tools", "model", "args"}  # names of `Trainer` itself, public
    ours |= {"chat_template", "generation_config", "vllm_tensor_parallel_size"}  # of a tokenizer, a model, the config
    assert (used & names_of_trl(private_only=False)) - ours - covered - FOR_CRITICS == set()

    keys = {node.value for node in ast.walk(trees["trl_seam.py"]) if isinstance(node, ast.Constant)}
    assert set(KEYS[:5]) <= keys, "what the seam reads from a rollout"

    imported = {
        alias.name
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trl.") and not node.level
        for alias in node.names
    }
    assert imported - covered - FOR_CRITICS == {"accuracy_reward"} & imported, "functions imported from inside TRL"


def test_no_module_but_the_seam_touches_a_private_name_of_trl():
    private = names_of_trl(private_only=True) - {"_tag_names", "_name", "_paper"}  # a subclass is to declare these
    for path, tree in sources().items():
        if path == "trl_seam.py":
            continue
        for node in ast.walk(tree):
            where = f"{path}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute):
                assert node.attr not in private, where
            elif isinstance(node, ast.FunctionDef):
                assert node.name not in private, where
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("trl", "transformers"):
                inside = node.module.split(".") + [alias.name for alias in node.names]
                assert not any(name.startswith("_") for name in inside), where
