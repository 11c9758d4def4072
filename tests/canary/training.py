"""Checks of how TRL makes a rollout and calls what we wrap."""

import inspect
from collections import defaultdict

import pytest
import torch
import trl

from trl_credit.seam import CreditTrainer

from .run import FORWARD, SETTINGS, WRAPPED, check, count_letters


FOR_CRITICS = {
    "training_step",
    "_prepare_inputs",
    "_get_train_sampler",
    "_get_output_dir",
    "train",
    "_save_checkpoint",
    "_push_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_rng_state",
    "_load_from_checkpoint",
    "_load_best_model",
    "_buffered_inputs",
    "_step",
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
    "ref_model",
    "add_fused_lm_head",
    "use_adapter",
}


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
    seam = [cls for cls in CreditTrainer.__mro__ if cls.__module__.startswith("trl_credit.")]
    ours = {name for cls in seam for name in vars(cls)} - set(vars(object)) - set(WRAPPED) - FOR_CRITICS
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
        "use_vllm": False,
        "vllm_mode": "colocate",
        "use_transformers_continuous_batching": False,
        "max_completion_length": SETTINGS["max_completion_length"],
    }
    for name, value in expected.items():
        found = getattr(run.trainer, name, "missing")
        assert found == value, f"`{name}` of GRPOTrainer should be {value!r} here and is {found!r}"
    assert set(getattr(run.trainer, "_metrics", {})) == {"train", "eval"}, "`_metrics` is not by `train` and `eval`"
    for name in ("_pending_extra_logs", "_pending_metrics"):
        assert isinstance(getattr(run.trainer, name, None), defaultdict), f"`{name}` is not what rewards log to"
    limit = getattr(getattr(run.trainer, "generation_config", None), "max_new_tokens", None)
    assert limit == SETTINGS["max_completion_length"], f"`generation_config` has {limit} for `max_new_tokens`"
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
def evaluation_goes_the_same_way(run):
    before = {name: len(run.all_calls[name]) for name in ("_generate_and_score_completions", "_compute_loss")}
    run.trainer.model.eval()
    try:
        run.trainer.prediction_step(run.trainer.model, [{"prompt": "a"}, {"prompt": "a"}], False)
    finally:
        run.trainer.model.train()
    for name, count in before.items():
        assert len(run.all_calls[name]) == count + 1, f"`{name}` is not called in evaluation"
    assert run.trainer._metrics["eval"]["reward"], "`_metrics` of evaluation are not under `eval`"


@check
def a_run_can_begin_and_end_without_an_epoch(run):
    trainer, steps, seen = run.trainer, len(run.all_calls["_compute_loss"]), []

    def no_epoch(*args, **kwargs):
        seen.append("_run_epoch")
        trainer.control.should_training_stop = True

    trainer._run_epoch, trainer._finalize_training = no_epoch, lambda *args: seen.append("_finalize_training")
    try:
        trainer.train()
    finally:
        del trainer._run_epoch, trainer._finalize_training
    assert "_run_epoch" in seen, "`_run_epoch` is not what trains for an epoch"
    assert seen[-1] == "_finalize_training", "`_finalize_training` is not what ends a run"
    assert seen == ["_run_epoch", "_finalize_training"], "`_run_epoch` is called again when training should stop"
    assert len(run.all_calls["_compute_loss"]) == steps, "there is training outside of `_run_epoch`"


@check
def continuations_can_be_sampled_and_scored(run):
    trainer = run.trainer
    for name in ("use_vllm", "use_transformers_continuous_batching"):
        assert getattr(trainer, name, None) is False, f"`{name}` of the trainer is gone"
    assert getattr(trainer, "vllm_importance_sampling_correction", None) is True, (
        "`vllm_importance_sampling_correction` of the trainer is gone"
    )
    for name in ("_pending_extra_logs", "_pending_metrics"):
        assert getattr(trainer, name, None) == {}, f"`{name}`, what reward functions log, is gone"
    for name in ("_generate", "_generate_single_turn"):
        assert hasattr(trainer, name), f"`{name}` is gone"
    assert "vllm_generation" in trl.GRPOTrainer._generate_single_turn.__code__.co_names, "`vllm_generation` is gone"

    limit, trainer.generation_config.max_new_tokens = trainer.generation_config.max_new_tokens, 2
    try:
        written = trainer._generate_single_turn([[65], [66, 67]], None, {}, 1)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"`_generate_single_turn` has another signature: {error}") from error
    finally:
        trainer.generation_config.max_new_tokens = limit
    assert isinstance(written, tuple) and isinstance(written[0], list) and len(written[0]) == 2, (
        "`_generate_single_turn` does not return the completions' ids first"
    )
    assert max(map(len, written[0])) <= 2, "`_generate_single_turn` does not follow `generation_config`"

    trainer.rollout_func = lambda prompts, trainer: {
        "prompt_ids": [[65]] * 2,
        "completion_ids": [[70, 71], [72]],
        "logprobs": None,
    }
    try:
        made = trainer._generate(["a", "a"])
    finally:
        trainer.rollout_func = None
    texts = trainer.processing_class.batch_decode([[70, 71], [72]])
    assert made[3] == texts, "`_generate` does not return the completions of a rollout function as its fourth"
