import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_pt_utils import get_model_param_count

from ...credit.running_mean import RunningMean
from ...credit.segment_gae import segment_advantages, segment_of_token
from ...critics.card import loading_code
from ...critics.engine.engine import seeded
from ...critics.facts import CriticFacts
from ...critics.generative.branch_mask import attending, attention_of, refuse_unpackable, takes_flex_attention
from ...critics.generative.critic import GenerativeCritic, context_of
from ...critics.generative.network import make_generative_critic
from ...critics.generative.packed import CriticQuery, answer_log_probs, plan_rows
from ...critics.generative.prefixes import StatePrompt
from ...critics.generative.question import TEMPLATE, TEMPLATE_WITHOUT_HINT, Question, refuse_other_segmenter
from ...critics.generative.reading import (
    Reading,
    answer_means,
    as_tensors,
    as_text,
    correlation,
    table_rows,
    with_stand_ins,
)
from ...critics.prompt import load_critic_tokenizer
from ...saved import read_json
from ...seam.lm_head import why_not_tiled
from ...segmenting import DelimiterSegmenter, Segmenter
from ..critic.critic_trainer import CriticTrainer
from ..critic.pretraining import PRETRAINING
from ..critic.reward_range import RewardRange
from ..value_report import fit_report, value_means
from .genac_config import GenACConfig
from .writer import Writer


STATE_FILE = "genac_state.json"


class GenACTrainer(CriticTrainer):
    """
    Trainer for GenAC: policy optimization with segment-level advantages from a critic that reasons in words before it
    gives a value.

    The method, Generative Actor-Critic, was introduced in [Bringing Value Models Back: Generative Critics for Value
    Modeling in LLM Reinforcement Learning](https://huggingface.co/papers/2604.10701). Arguments are those of
    [`~trl.GRPOTrainer`], with `args` a [`GenACConfig`], and four more.

    Args:
        critic (`str`, `Path` or `PreTrainedModel`, *optional*):
            What the critic starts from: a path or Hub id of a causal LM, or a model. It should have learned to answer
            with a score. Default: the policy's checkpoint.
        critic_processing_class (`PreTrainedTokenizerBase`, *optional*):
            The critic's tokenizer, with its chat template. Default: that of the critic's checkpoint, or the policy's if
            the critic is not given by path.
        critic_peft_config (`~peft.PeftConfig`, *optional*):
            Train adapters of the critic instead of all its weights.
        segmenter ([`~trl_credit.segmenting.Segmenter`], *optional*):
            Divides completions into segments. Default: a [`~trl_credit.segmenting.DelimiterSegmenter`] with the
            lengths in `args`.

    Example:

    ```python
    from datasets import load_dataset
    from trl.rewards import accuracy_reward
    from trl_credit import GenACConfig, GenACTrainer

    trainer = GenACTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=accuracy_reward,
        args=GenACConfig("Qwen2.5-0.5B-GenAC"),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
        critic="Qwen2.5-0.5B-GenAC-critic",
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "trl-credit", "genac"]
    _name = "GenAC"
    _paper = {
        "title": "Bringing Value Models Back: Generative Critics for Value Modeling in LLM Reinforcement Learning",
        "id": "2604.10701",
        # docstyle-ignore
        "citation": """\
@article{shan2026genac,
    title        = {{Bringing Value Models Back: Generative Critics for Value Modeling in LLM Reinforcement Learning}},
    author       = {Zikang Shan and Han Zhong and Liwei Wang and Li Zhao},
    year         = 2026,
    eprint       = {arXiv:2604.10701},
}""",
    }
    args: GenACConfig
    config_class = GenACConfig
    critic_kind = "generative"
    rollout_keys = {"readings": "[B]"}
    rollout_types = (Reading, CriticQuery)

    def __init__(self, *args, critic=None, critic_processing_class=None, segmenter: Segmenter | None = None, **kwargs):
        super().__init__(*args, critic=critic, **kwargs)
        source = critic if critic is not None else self.args.critic_model_name_or_path
        self._critic_is_policy = source is None
        if critic_processing_class is None and source is not None and not isinstance(source, nn.Module):
            critic_processing_class = load_critic_tokenizer(source, self.args.critic_model_init_kwargs)  # type: ignore[arg-type]
        self._critic_processing_class = critic_processing_class
        facts = self._source_facts
        if facts is not None:
            refuse_other_segmenter(facts, segmenter, source)
        self.question = Question(
            self.critic_processing_class,
            self.processing_class,
            self.args.critic_template or (TEMPLATE if self.args.hint_momentum is not None else TEMPLATE_WITHOUT_HINT),
            self.args.actor_description or _describe(self.model),
            segmenter or DelimiterSegmenter.of(self.args),
            self.reward_range,
        )
        self._momentum = 0.9 if self.args.hint_momentum is None else self.args.hint_momentum
        # What the critic is told, and what stands in for a value that it does not give, both from stage to stage.
        hint = (facts and facts.hint) or {}
        self.success_rate, self.mean_value = (RunningMean(*hint.get(n, ())) for n in ("success_rate", "mean_value"))
        self._evaluated_rate = RunningMean()  # of the evaluation under way
        # Of the pretraining: lowest error on the evaluation data, evaluations since, updates at the next one.
        self._validation = {"lowest": float("inf"), "since": 0, "next": 0}
        # The policy's completions of that data, with their rewards and prompts, made once.
        self._validation_rollouts: list[tuple] = []
        self._is_validating = False
        self.warn_of_answers()

    # --- The critic

    @property
    def critic_processing_class(self):
        """The critic's tokenizer: its own, or else the policy's."""
        return self.processing_class if self._critic_processing_class is None else self._critic_processing_class

    def make_critic(self, policy, critic, peft_config) -> nn.Module:
        source, init_kwargs = self.critic_checkpoint(policy, critic)
        network = make_generative_critic(source, peft_config, init_kwargs, copy_model=critic is None)
        self.writer = Writer(self, network)
        # Of its updates, with `critic_packing`; `None` for the one that it has.
        self._update_attention: str | None = None
        if self.args.critic_packing:
            refuse_unpackable(network)
            is_chosen = isinstance(source, nn.Module) or "attn_implementation" in (init_kwargs or {})
            if self.accelerator.device.type == "cuda" and not is_chosen and takes_flex_attention(network):
                self._update_attention = "flex_attention"
        if reason := why_not_tiled(network):
            self.warn_once(
                "The critic's update will hold the logits of whole micro-batches, 16 bytes per token of an answer and "
                f"word of the vocabulary: {reason}. If memory runs out, lower `critic_update_batch_tokens`."
            )
        return network

    def critic_head(self) -> dict[str, Any]:
        return {}  # it writes its values

    def make_critic_reader(self, runner) -> GenerativeCritic:
        question = self.question
        return GenerativeCritic(
            runner,
            question.tokenizer,
            question.policy_tokenizer,
            question.template,
            question.actor_description,
            max_completion_length=self.args.critic_max_completion_length,
            batch_tokens=self.args.critic_generation_batch_tokens,
            temperature=self.args.critic_temperature,
            segmenter=question.segmenter,
            context=self.writer.context,
            write=self._write,
            reads_prefixes_once=self.writer.reads_prefixes_once,
            seed=self.args.seed,
            reward_range=self.reward_range,
        )

    @property
    def reward_range(self) -> RewardRange:
        """The rewards that the scores 0 and 10 stand for."""
        assert self._range is not None
        return self._range

    def critic_settings(self) -> dict[str, Any]:
        return {
            **self.question.settings(),
            "hint_momentum": self.args.hint_momentum,
            "critic_temperature": self.args.critic_temperature,
            "critic_max_completion_length": self.args.critic_max_completion_length,
        }

    def warn_of_answers(self) -> None:
        """Say what the critic's answers will cost, where that is much."""
        self.writer.warn(head=len(self.critic_processing_class(self.question.template)["input_ids"]))

    def critic_facts(self) -> CriticFacts:
        hint = {"success_rate": list(self.success_rate), "mean_value": list(self.mean_value)}
        return replace(super().critic_facts(), hint=hint if self.success_rate.weight else None)

    @property
    def critic_context(self) -> float:
        """Most tokens that the critic can be given, its answer included."""
        return min(context_of(self.critic), self.writer.context or float("inf"))

    def describe_critic(self) -> str:
        return (
            "A generative value model: asked with the text below about a problem and a partial solution, it reasons "
            f"and ends with a\nscore from 0, which stands for a reward of {self.reward_range[0]:g}, to 10, for one of "
            f"{self.reward_range[1]:g}.\n`trl_credit.critics.generative.question` lays out the question and reads the "
            "score.\n\n"
            f"```text\n{self.question.wording}\n```\n\n"
            f"```python\n{loading_code(self.critic, 'CausalLM')}\nanswer_ids = critic.generate(input_ids)\n```"
        )

    def critic_loss(self, network: nn.Module, inputs: dict) -> torch.Tensor:
        log_probs, _ = answer_log_probs(network, inputs["rows"], self.args.critic_temperature)
        weights = torch.tensor(inputs["weights"], device=log_probs.device)
        return -(log_probs.sum(1) * weights).sum()

    def critic_count(self, inputs: dict) -> torch.Tensor:
        return torch.tensor(sum(row.answer_tokens for row in inputs["rows"]))

    def update_critic(self, micro_batches: list[dict], prefix: str = "critic") -> dict[str, float] | None:
        """One update on the critic's answers of an optimizer step. Each answer is trained on once."""
        readings = [reading for inputs in micro_batches for reading in inputs.pop("readings", ()) if reading]
        ages = [self.engine.steps - reading.updates for reading in readings for answer in reading.answers if answer]
        self.log_means("train", {f"{prefix}/answer_age": (sum(ages), len(ages))})
        attention = self._update_attention or attention_of(self.critic)
        mask_bytes = None if attention == "flex_attention" else self.args.critic_mask_memory * 2**30
        batches = plan_rows(
            [reading.query for reading in readings],
            [reading.answers for reading in readings],
            self.args.critic_update_batch_tokens,
            self.args.critic_packing,
            None if mask_bytes is None else int(mask_bytes),
            itemsize=2 if self.args.bf16 else 4,
        )
        self._log_total("train", f"{prefix}/update_tokens", sum(len(row) for rows in batches for row in rows))
        batches += [[]] * (self.most(len(batches)) - len(batches))  # so that processes keep step
        inputs = [
            {"rows": rows, "weights": [readings[row.index].weights[k] for row in rows for k in row.states]}
            for rows in batches
        ]
        with attending(self.critic, self._update_attention):
            return super().update_critic(inputs, prefix)

    # --- What the critic is asked, and what it answers

    def state_values(self, rollout: dict) -> torch.Tensor:
        """See [`CriticTrainer.state_values`]; the critic's answers are sampled as in an evaluation."""
        self.critic_reader.success_rate = self._hint("eval")
        return super().state_values(rollout)

    def ask(self, readings: list[Reading], mode: str) -> None:
        """Ask the critic about all states of this process's completions that leave room for an answer."""
        started = time.perf_counter()
        critic = self.critic_reader
        if mode == "eval":
            # The same noise in every evaluation, and none of the run's random numbers.
            with seeded(critic.seed + self.accelerator.process_index):
                critic.ask(readings)
        else:
            critic.ask(readings)
        for reading in readings:
            reading.updates = self.engine.steps
        self.log_value(mode, "critic/generation_time", time.perf_counter() - started)
        self._log_total(mode, "critic/generation_tokens", critic.tokens)

    def _write(self, prompts: list[StatePrompt]) -> list[list[int]]:
        return self.writer.write(prompts)

    # --- Credit

    def assign_credit(self, rollout: dict, rewards: torch.Tensor, mode: str) -> dict:
        self.keep_in_range(rollout, rewards, mode, "or to 'running'")
        right = self.is_right(rewards, sum(self.reward_range) / 2)
        if self._is_validating:
            self._validation_rollouts.append((rollout, rewards, right, self.rollout_rows))
        readings, values, advantages, segments = self._judge(rollout, rewards, right, mode)
        if self.args.log_completions or self.logs_credit:
            rows = table_rows(readings, advantages, segments, self.critic_reader.text_of)
            self.add_column("segments", [as_text(segments) for segments in rows])
            self.add_credit("segments", rows)
            self.add_credit("value", values.gather(1, segments.clamp(min=0)))
        return {**rollout, "advantages": advantages, "readings": readings}

    def _judge(self, rollout: dict, rewards: torch.Tensor, right: torch.Tensor, mode: str) -> tuple:
        """The critic's readings, its values `(B, K)` as read, and the tokens' advantages and segments `(B, T)`."""
        mask = self.trained_tokens(rollout) & rewards.isfinite().unsqueeze(1)
        counted = mask.any(1)
        hint = self._hint(mode)
        readings = self.critic_reader.readings(self.with_prompts(rollout), hint, counted)
        self.ask([reading for reading in readings if reading is not None], mode)
        # Only now: a hint with a completion's own reward in it would give away what the critic is asked.
        everywhere = self.accelerator.gather(rewards)
        if mode == "train":
            self.success_rate = self.success_rate.updated(everywhere, self._momentum)
        else:
            self._evaluated_rate = self._evaluated_rate.updated(everywhere, self._momentum)
        values, states, heard = as_tensors(readings, rewards.device)
        parsed = values.isfinite()

        total, count = self.total(torch.stack([torch.where(parsed, values, 0).sum(), parsed.sum()])).tolist()
        if mode == "train" and count:
            self.mean_value = self.mean_value.updated(torch.tensor([total / count]), self._momentum)
        what_was_read = values
        values = with_stand_ins(values, self.mean_value.value if self.mean_value.weight else hint)
        outcomes = torch.where(counted, rewards, 0).unsqueeze(1).expand(values.shape)
        low, high = self.reward_range
        earned = torch.where(parsed, 1 - ((outcomes - values) / (high - low)).square(), 0)
        self._weigh(readings, earned, heard)

        segments = segment_of_token([reading.ends if reading is not None else [] for reading in readings], mask)
        advantages = segment_advantages(outcomes[:, 0], values, segments, self.args.segment_lambda)
        self._report(mode, hint, readings, values, outcomes, right, earned, states, heard, parsed)
        return readings, what_was_read, advantages, segments

    def _hint(self, mode: str) -> float:
        """The mean reward of earlier rollouts or, in an evaluation before any, of its own earlier batches."""
        known = self.success_rate
        if not known.weight and mode == "eval":
            known = self._evaluated_rate
        return known.value if known.weight else sum(self.reward_range) / 2

    def evaluate(self, *args, **kwargs):
        """As TRL's. Before the first rollout, the critic's hint comes from the evaluation's own earlier batches."""
        self._evaluated_rate = RunningMean()
        return super().evaluate(*args, **kwargs)

    def _weigh(self, readings: list[Reading | None], earned: torch.Tensor, heard: torch.Tensor) -> None:
        """The factor of each answer's log-probability: its reward, minus the mean of all others if configured."""
        weights = earned
        if self.args.critic_baseline == "leave_one_out":
            total, count = self.total(torch.stack([earned[heard].double().sum(), heard.sum()]))
            weights = earned - (total - earned) / (count - 1) if count > 1 else earned
        for reading, row in zip(readings, weights.tolist(), strict=True):
            if reading is not None:
                reading.weights = row[: len(reading.ends)]

    # --- Pretraining

    def _pretraining_is_enough(self, losses: list[float]) -> bool:
        patience, validation = self.args.critic_pretraining_patience, self._validation
        if patience is None or self._pretraining["pretraining_steps"] < validation["next"]:
            return False
        validation["next"] = self._pretraining["pretraining_steps"] + self.args.critic_validation_steps
        with self.logging_pretraining():
            error = self.validation_error()
        return self.keep_the_best(error, validation, patience)

    def finish_pretraining(self) -> None:
        self.go_back_to_the_best(self._validation)

    def validation_error(self) -> float:
        """
        Mean squared error of the critic's values on completions of the evaluation data. The policy writes them only
        once, since it does not move meanwhile.
        """
        if self.eval_dataset is None:
            raise ValueError("`critic_pretraining_patience` needs an `eval_dataset` to tell when the error settles.")
        before = len(self.state.log_history)
        with seeded(self.args.seed + self.accelerator.process_index):
            if self._validation_rollouts:
                self._judge_again()
            else:
                self._is_validating = True
                try:
                    self.evaluate()
                finally:
                    self._is_validating = False
        names = ("eval_critic/mse", f"eval_{PRETRAINING}/mse")
        errors = [entry[name] for entry in self.state.log_history[before:] for name in names if name in entry]
        return sum(errors) / len(errors) if errors else float("nan")

    def _judge_again(self) -> None:
        """The evaluation without the policy's part."""
        self.model.eval()
        self._evaluated_rate = RunningMean()
        for rollout, rewards, right, rows in self._validation_rollouts:
            self.rollout_rows = rows
            self._judge(rollout, rewards, right, "eval")
        self.log({})

    # --- Saving

    def begin_training(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            path = Path(checkpoint) / STATE_FILE
            if not path.is_file():
                raise FileNotFoundError(
                    f"{checkpoint} holds no {STATE_FILE}: the run cannot be resumed from it. It was saved with "
                    "`save_only_model=True` or by another trainer."
                )
            state = read_json(path)
            self._validation = state.pop("validation")
            self.success_rate, self.mean_value = (RunningMean(*state[name]) for name in ("success_rate", "mean_value"))
        elif self._critic_is_policy and self.args.critic_pretraining_steps == 0:
            self.warn_once(
                "The critic is a copy of the policy that has never been taught to answer with a score, and "
                "`critic_pretraining_steps=0`: its values will be noise. Start from a critic that `trl-credit "
                "genac-sft` has trained (`critic_model_name_or_path`), or pretrain it here."
            )
        super().begin_training(checkpoint)

    def save_training_state(self, folder: Path) -> None:
        super().save_training_state(folder)
        if self.accelerator.is_main_process:
            state = {
                "success_rate": list(self.success_rate),
                "mean_value": list(self.mean_value),
                "validation": self._validation,
            }
            (folder / STATE_FILE).write_text(json.dumps(state, indent=2), encoding="utf-8")

    # --- What is logged

    def _log_total(self, mode: str, name: str, number: float) -> None:
        self.log_value(mode, name, self.total(torch.tensor(float(number), device=self.accelerator.device)).item())

    def _report(self, mode, hint, readings, values, outcomes, right, earned, states, heard, parsed) -> None:
        generations = self.num_generations if mode == "train" else self.num_generations_eval
        fit = fit_report(self, values, outcomes, states, generations or 1)
        numbers = {"hint": hint, "correlation": correlation(values, outcomes, states, self.total)}
        for name, value in {**fit, **numbers}.items():
            self.log_value(mode, f"critic/{name}", value)
        error = (values - outcomes).square()
        means = {
            "mse": (error[states].sum(), states.sum()),
            "mse_of_parsed": (error[parsed].sum(), parsed.sum()),
            "parse_rate": (parsed.sum(), heard.sum()),
            "reward": (earned[heard].sum(), heard.sum()),
            "segments": (states.sum(), states.any(1).sum()),
            "states_without_room": ((states & ~heard).sum(), states.sum()),
            **answer_means([reading for reading in readings if reading], self.critic_reader.ends),
            **{f"value_{name}": pair for name, pair in value_means(values, states, right).items()},
        }
        self.log_means(mode, {f"critic/{name}": pair for name, pair in means.items()})


def _describe(model: nn.Module) -> str:
    count = get_model_param_count(model)
    size = f"{count / 1e9:.1f}B" if count >= 1e9 else f"{max(round(count / 1e6), 1)}M"
    return f"A language model of {size} parameters"
