"""What may move in TRL: the names, signatures and shapes that the canary is to miss, and how to move each of them."""

import importlib
import inspect
import sys
from types import ModuleType

from trl_credit.trainers.grpo_lambda.grpo_lambda_config import TRACED_LOSS_TYPES

from .run import FORWARD, WRAPPED


MODULES = (
    "transformers.trainer",
    "trl.models.utils",
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


CALLED = ("_generate", "_generate_single_turn")
FUNCTIONS = (
    "get_config_model_id",
    "is_async_callable",
    "maybe_gather_lm_head_ctx",
    "add_fused_lm_head",
    "_CHUNKED_LOGPROB_CHUNK_SIZE",
    "disable_gradient_checkpointing",
    "resolve_accelerate_config_argument",
    "_subtract_subsequence",
    "launch_training_script",
    "GRPOScriptArguments",
    "parse_args_and_config",
    "print_env",
    "DatasetConfig",
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
    "use_vllm",
    "vllm_importance_sampling_correction",
    "use_transformers_continuous_batching",
    "max_completion_length",
    "vllm_generation",
    "_last_loaded_step",
    "vllm_mode",
    "generation_config",
    "_pending_extra_logs",
    "_pending_metrics",
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
CONTINUATIONS = ("_generate", "_generate_single_turn")
LOSS = "    def _compute_loss(self, model, inputs):\n"
# What moves, and how: texts of TRL's source and what stands there instead, wherever they occur.
MOVES: list[tuple[str, ...]] = [
    *((name, f"def {name}( → def {name}_2(", f".{name}( → .{name}_2(") for name in WRAPPED if name != "log"),
    *((name, f"def {name}( → def {name}_2(", f".{name}( → .{name}_2(") for name in CALLED),
    *((name, f"{name} → {name}_2") for name in FUNCTIONS),
    *((name, f"self.{name} → self.{name}_2") for name in ATTRIBUTES),
    *((name, f'"{name}" → "{name}_2"') for name in KEYS),
    *(
        (name, f"self._step = 0\n → self._step = 0\n        self.{name} = 0\n")
        for name in ("_scores", "_loss", "_sums", "_token_scores", "_step_inputs", "_resume_from")
    ),
    *((name, f" {name} = →  {name}_2 =", f"self.{name} → self.{name}_2") for name in ("_name", "_tag_names", "_paper")),
    *((name, f"def {name}( → def {name}_2(", f"self.{name}( → self.{name}_2(") for name in CONTINUATIONS),
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
    ("shift_labels", "shift_labels → shift_labels_2"),
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
