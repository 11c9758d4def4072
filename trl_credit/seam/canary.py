"""Whether TRL still is what this package builds on: its names, their signatures, the keys of a rollout."""

import inspect
from collections.abc import Iterator
from importlib import import_module
from types import CodeType
from typing import Any

import torch


# Where what is from. Each name with the arguments that we give, or that our method of that name passes on, in order and
# by name (`x=`); without any where that is `*args, **kwargs`.
FUNCTIONS = {
    "trl.generation.vllm_generation": {
        "VLLMGeneration": "model=, accelerator=, processing_class=, server_timeout=, tensor_parallel_size=, "
        "enable_sleep_mode=, model_impl=, trust_remote_code=, mode=, server_base_url=, group_port=, "
        "gpu_memory_utilization=, max_model_length=, temperature=, max_completion_length=",
    },
    "trl.models.utils": {
        "disable_gradient_checkpointing": "model, kwargs",
        "unwrap_model_for_generation": "model, accelerator, gather_deepspeed3_params=, gradient_checkpointing_kwargs=",
    },
    "trl.trainer.utils": {
        "add_fused_lm_head": "model, temperature=, cast_lm_head_to_fp32=, outputs=",
        "_CHUNKED_LOGPROB_CHUNK_SIZE": "",
        "get_config_model_id": "config",
        "is_async_callable": "function",
        "maybe_gather_lm_head_ctx": "weight, bias",
        "shuffle_sequence_dict": "rollout",
        "split_tensor_dict": "rollout, parts",
        "use_adapter": "model, adapter_name=",
    },
    "trl.trainer.grpo_trainer": {"GRPOTrainer": "model, reward_funcs, args"},
    "trl.scripts.grpo": {"main": "script_args, training_args, model_args, dataset_args", "GRPOScriptArguments": ""},
    "trl.scripts.sft": {"main": "script_args, training_args, model_args, dataset_args"},
    "trl.scripts.env": {"print_env": ""},
    "trl.scripts.utils": {"DatasetConfig": "path=, data_files="},
    "trl.cli.accelerate_config": {"resolve_accelerate_config_argument": "arguments"},
    "trl.cli.accelerate_launcher": {
        "launch_training_script": "script, launch, arguments, launch_command_fn=, launch_parser_fn="
    },
    "trl.cli.commands.training": {"_subtract_subsequence": "whole, part"},
}
METHODS = {
    "trl.trainer.grpo_trainer.GRPOTrainer": {
        "train": "resume_from_checkpoint",
        "training_step": "",
        "log": "logs",
        "save_model": "output_dir, internal",
        "create_model_card": "",
        "get_train_dataloader": "",
        "prediction_step": "model, inputs, loss_only",
        "_calculate_rewards": "inputs, prompts, completions, completion_ids",
        "_compute_loss": "model, inputs",
        "_generate": "prompts",
        "_generate_and_score_completions": "inputs",
        "_generate_single_turn": "texts, images, fields, number",
        "_get_grad_norm": "",
        "_get_output_dir": "trial",
        "_get_per_token_logps_and_entropies": "model, input_ids, attention_mask, logits_to_keep, batch_size=",
        "_get_train_sampler": "",
        "_load_best_model": "",
        "_load_from_checkpoint": "checkpoint, model",
        "_load_optimizer_and_scheduler": "checkpoint",
        "_load_rng_state": "checkpoint",
        "_prepare_inputs": "batch",
        "_push_from_checkpoint": "folder",
        "_save_checkpoint": "model, trial",
        "_tokenize_prompts": "prompts",
    },
    "trl.generation.vllm_generation.VLLMGeneration": {
        "_init_vllm": "",
        "generate": "prompts, images, number",
        "sync_weights": "",
    },
}
# Keys of a rollout and names of attributes that are written in a method.
KEYS = {
    "trl.trainer.grpo_trainer.GRPOTrainer._compute_loss": (
        "completion_ids completion_mask tool_mask advantages old_per_token_logps ref_per_token_logps "
        "sampling_per_token_logps num_items_in_batch kl cispo_clip_ratio clip_ratio/low_mean clip_ratio/high_mean "
        "clip_ratio/region_mean"
    ),
    "trl.trainer.grpo_trainer.GRPOTrainer._generate_and_score_completions": (
        "prompt_ids prompt_mask completion_ids completion_mask tool_mask advantages old_per_token_logps "
        "ref_per_token_logps sampling_per_token_logps num_items_in_batch"
    ),
    "trl.trainer.grpo_trainer.GRPOTrainer._generate_single_turn": "vllm_generation _last_loaded_step",
    "trl.generation.vllm_generation.VLLMGeneration.generate": "max_completion_length _llm_weights_sleeping",
    "trl.generation.vllm_generation.VLLMGeneration._init_vllm": "llm tp_group vllm_client",
}
# What a trainer has when it is made.
ATTRIBUTES = (
    "_buffered_inputs _logs _metrics _pending_extra_logs _pending_metrics _step _tokenizer _entropy_bonus_enabled "
    "aux_loss_enabled beta environment_factories eos_token_ids epsilon_high epsilon_low generation_config "
    "importance_sampling_level log_completions loss_type max_completion_length num_generations num_generations_eval "
    "num_iterations off_policy_mask_threshold ref_model reward_func_names reward_funcs reward_weights rollout_func "
    "temperature tools top_entropy_quantile use_transformers_continuous_batching use_vllm "
    "vllm_importance_sampling_correction vllm_mode"
)


def names_that_moved() -> Iterator[str]:
    """What TRL's modules and the methods of its trainer no longer offer, each in words."""
    for module, names in FUNCTIONS.items():
        try:
            found = import_module(module)
        except ImportError as error:
            yield f"`{module}` cannot be imported ({error})"
            continue
        for name, arguments in names.items():
            if not hasattr(found, name):
                yield f"`{module}.{name}` is gone"
            elif arguments and not _takes(getattr(found, name), arguments):
                yield f"`{module}.{name}` does not take ({arguments.replace('=', '=…')})"
    for place, methods in METHODS.items():
        for name, arguments in methods.items():
            if (method := _found(f"{place}.{name}")) is None:
                yield f"`{place.split('.', 3)[3]}.{name}` is gone"
            elif arguments and not _takes(method, "self, " + arguments):
                yield f"`{place.split('.', 3)[3]}.{name}` does not take ({arguments.replace('=', '=…')})"
    for place, keys in KEYS.items():
        if (method := _found(place)) is not None:
            texts = _texts_of(inspect.unwrap(method).__code__)
            yield from (f"`{place.split('.', 3)[3]}` does not know `{key}`" for key in keys.split() if key not in texts)


def attributes_that_moved(trainer) -> Iterator[str]:
    """What a trainer no longer has when it is made, or has in another shape."""
    yield from (f"`{name}` of the trainer is gone" for name in ATTRIBUTES.split() if not hasattr(trainer, name))
    if set(getattr(trainer, "_metrics", ())) != {"train", "eval"}:
        yield "`_metrics` is not by `train` and `eval`"
    if not {"advantages", "extra"} <= set(getattr(trainer, "_logs", ())):
        yield "`_logs` has no `advantages` and `extra`"
    weights = getattr(trainer, "reward_weights", None)
    if not isinstance(weights, torch.Tensor) or len(weights) != len(getattr(trainer, "reward_funcs", [])):
        yield "`reward_weights` is no tensor of one weight for each reward function"


def rollout_that_moved(rollout: dict) -> Iterator[str]:
    """What TRL's rollout no longer has, or has in another shape."""
    shape = rollout["completion_ids"].shape if "completion_ids" in rollout else (0, 0)
    prompt = rollout["prompt_ids"].shape if "prompt_ids" in rollout else (0, 0)
    shapes: dict[str, tuple] = {
        "prompt_ids": (shape[0], prompt[-1]),
        "prompt_mask": (shape[0], prompt[-1]),
        "completion_ids": shape,
        "completion_mask": shape,
        "advantages": shape[:1],
        "num_items_in_batch": (),
    }
    for name in ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps"):
        if rollout.get(name) is not None:
            shapes[name] = shape
    for name, expected in shapes.items():
        found = rollout.get(name)
        if not isinstance(found, torch.Tensor) or found.shape != expected:
            yield f"`{name}` of the rollout is {_in_words(found)} and not a tensor of shape {tuple(expected)}"


def _found(place: str) -> Any:
    """A method by the names of its module, its class and itself; `None` if it is gone."""
    module, kind, name = place.rsplit(".", 2)
    return getattr(getattr(import_module(module), kind, None), name, None)


def _takes(function, arguments: str) -> bool:
    names = arguments.split(", ")
    keywords = [name[:-1] for name in names if name.endswith("=")]
    try:
        inspect.signature(function).bind(*names[: len(names) - len(keywords)], **dict.fromkeys(keywords))
    except TypeError:
        return False
    return True


def _texts_of(code: CodeType) -> set[str]:
    """The texts and the names of attributes in a function and in the functions inside it."""
    texts: set[str] = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            texts |= _texts_of(constant)
        else:  # the keys of a dict are one tuple
            several = constant if isinstance(constant, tuple) else (constant,)
            texts |= {text for text in several if isinstance(text, str)}
    return texts


def _in_words(found) -> str:
    return f"a tensor of shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else repr(found)
