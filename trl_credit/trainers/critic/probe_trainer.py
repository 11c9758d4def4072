import copy
import time
from typing import Any

import torch

from ...credit.boundaries import held
from ...credit.trust import mixed_advantages
from ...critics.critic import Critic
from ...critics.facts import PROBE, CriticFacts, fingerprint
from ...critics.probe.critic import ProbeCritic, Question
from ...critics.probe.engine import ProbeEngine
from ...critics.probe.learner import ProbeLearner
from ...critics.probe.network import ProbeNetwork
from ...segmenting import Segmenter
from .critic_trainer import CriticTrainer
from .probe_config import MEASURED, ProbeConfig


DEFAULT_RATE = 5e-3


class ProbeTrainer(CriticTrainer):
    """
    A trainer with a critic beside the policy, or a probe critic on what the reference makes of its rollouts. The latter
    is no network beside the policy: it has no pretraining, no engine of the policy's kind, and it learns when a rollout
    is there, not when the policy steps.
    """

    args: ProbeConfig
    config_class: type[ProbeConfig] = ProbeConfig

    def __init__(self, *args, segmenter: Segmenter | None = None, **kwargs):
        self._segmenter = segmenter
        super().__init__(*args, **kwargs)

    @property
    def has_probe(self) -> bool:
        """Whether the critic is a probe critic."""
        return self.critic_kind == PROBE

    # --- What it is

    def kind_of(self, critic: Any, facts: CriticFacts | None) -> str:
        is_probe = critic == PROBE or (facts is not None and facts.kind == PROBE)
        self.args.check_probe(is_probe)
        if self._segmenter is not None and not (is_probe and self.args.probe_boundaries == "segments"):
            raise ValueError(
                "`segmenter` has no effect: it is for a probe critic (`critic='probe'`) with "
                "`probe_boundaries='segments'`. Drop it."
            )
        return PROBE if is_probe else super().kind_of(critic, facts)

    def make_probe(self, critic: Any) -> ProbeNetwork:
        """The head, a fresh one or that of an earlier run."""
        args: Any = copy.copy(self.args)
        self.args = args
        args.critic_pretraining_steps = 0
        args.reward_range = args.reward_range or [0.0, 1.0]
        self.listen_to_reference(tuple(args.probe_layers))
        if critic != PROBE:
            return ProbeNetwork.load(critic)
        config = self.accelerator.unwrap_model(self.model).config.get_text_config()
        assert self.max_completion_length is not None
        low, high = args.reward_range
        return ProbeNetwork(
            self.question.feature_size(config.hidden_size),
            args.probe_hidden_size,
            (low, high),
            self.max_completion_length,
            args.seed,
        )

    @property
    def question(self) -> Question:
        """What a probe critic is asked."""
        args = self.args
        return Question(args.probe_boundaries, tuple(args.probe_layers), args.probe_uncertainty, self._segmenter)

    @property
    def engine(self) -> Any:
        if not self.has_probe:
            return super().engine
        if self._engine is None:
            learner = ProbeLearner(
                self.critic,
                learning_rate=self.critic_learning_rates()[1],
                updates=self.args.probe_updates,
                batch_size=self.args.probe_batch_size,
                buffer_rollouts=self.args.probe_buffer_rollouts,
                buffer_states=self.args.probe_buffer_states,
                seed=self.args.seed,
            )
            self._engine = ProbeEngine(learner, self.accelerator)  # type: ignore[assignment]
        return self._engine

    def make_probe_reader(self, runner) -> Critic:
        """What it is asked, and how that is read."""
        return ProbeCritic(runner, self.read_with_reference, self.processing_class, self.question)

    def critic_learning_rates(self) -> tuple[float, float]:
        if not self.has_probe:
            return super().critic_learning_rates()
        rate = self.args.critic_head_learning_rate
        rate = DEFAULT_RATE if rate is None else rate
        return rate, rate

    def critic_settings(self) -> dict[str, Any]:
        if not self.has_probe:
            return super().critic_settings()
        names = ("boundaries", "boundary_quantile", "layers", "uncertainty", "hidden_size")
        return {f"probe_{name}": getattr(self.args, f"probe_{name}") for name in names}

    def critic_options(self) -> list[str]:
        own = self.args.options_of_probe()
        if self.has_probe:
            return ["critic_head_learning_rate", "critic_lambda", *own]
        return [name for name in super().critic_options() if name not in own]

    def critic_facts(self) -> CriticFacts:
        if not self.has_probe:
            return super().critic_facts()
        policy = self.accelerator.unwrap_model(self.model)
        # An adapter that was trained further is its own reference, of which there is no folder.
        is_adapter = "ref" in getattr(policy, "peft_config", ())
        source = policy.config.name_or_path
        earlier = 0 if self._source_facts is None else self._source_facts.updates
        return CriticFacts(
            PROBE,
            self.critic_settings(),
            tokenizer=fingerprint(self.processing_class),
            reads=None if is_adapter or not source else {"model": source, "temperature": self.temperature},
            updates=earlier + self.engine.steps,
        )

    def describe_critic(self) -> str:
        if not self.has_probe:
            return super().describe_critic()
        return (
            "A probe critic: a small head that gives states of a completion the reward that the policy is expected to "
            "end\nwith, from what the policy that the run started from makes of them.\n\n"
            "```python\nfrom transformers import AutoTokenizer\nfrom trl_credit.critics.loading import load_critic\n\n"
            "critic = load_critic(path, AutoTokenizer.from_pretrained(path))\n"
            "values = critic.state_values(rollout)\n```"
        )

    def pretrain_critic(self, *args, **kwargs) -> dict[str, int]:
        if self.has_probe:
            raise ValueError(
                "A probe critic has no pretraining: it learns from the rollouts that the policy learns from."
            )
        return super().pretrain_critic(*args, **kwargs)

    def finish_step(self, micro_batches: list[dict]) -> None:
        if not self.has_probe:  # which has learnt when the rollout was there
            super().finish_step(micro_batches)

    # --- Its part in the credit

    def probe_starts(self, rollout: dict, mode: str) -> torch.Tensor:
        """The tokens of a new rollout before which it is asked, boolean, shape `(B, T)`."""

        def move_threshold(entropy, mask):
            self.engine.move_threshold(entropy, mask, self.args.probe_boundary_quantile)

        moves = mode == "train" and self.args.probe_boundaries == "entropy"
        return self.critic_reader.ask(rollout, move_threshold if moves else None).starts

    def measure_trust(self, values, returns, steps, mode: str) -> None:
        """
        Take note of how well a rollout was valued. An evaluation changes nothing.

        Args:
            values, returns, steps (`torch.Tensor`):
                Values, Monte-Carlo returns and the tokens before which the critic was asked, shape `(B, T)`.
            mode (`str`):
                `"train"` or `"eval"`.
        """
        if mode == "train":
            self.engine.measure(values[steps], returns[steps])

    @property
    def trust(self) -> float:
        """w: how far the probe critic is leant on."""
        asked: Any = self.args.critic_trust
        return self.engine.trust if asked == MEASURED else float(asked)

    def mix(self, advantages, rewards, steps, mask, rollout: dict, mode: str) -> torch.Tensor:
        """
        The probe critic's advantages as far as it is trusted, and for the rest those of the group or of the rollout.

        Args:
            advantages (`torch.Tensor`):
                Shape `(B, T)`, those of `steps`.
            rewards (`torch.Tensor`):
                Shape `(B,)`, NaN for none.
            steps, mask (`torch.Tensor`):
                Where the critic was asked, and the tokens that count, boolean, shape `(B, T)`.
            rollout (`dict`):
                TRL's.
            mode (`str`):
                `"train"` or `"eval"`.
        """
        generations = self.num_generations if mode == "train" else self.num_generations_eval
        fallback = rollout["advantages"]
        if (generations or 1) == 1:
            scored = rewards.isfinite()
            total, count = self.total(torch.stack([torch.where(scored, rewards, 0).sum(), scored.sum()]))
            fallback = torch.where(scored, rewards - total / count.clamp(min=1), 0)
        mixed = mixed_advantages(held(advantages, steps), fallback, self.trust)
        return torch.where(mask, mixed, 0)

    def learn_probe(self, rollout: dict, targets, steps, mode: str) -> None:
        """
        Let the probe critic learn from a rollout that it has valued, and log it. An evaluation changes nothing.

        Args:
            rollout (`dict`):
                The rollout.
            targets, steps (`torch.Tensor`):
                What it should have said, and where, shape `(B, T)`.
            mode (`str`):
                `"train"` or `"eval"`.
        """
        reader = self.critic_reader
        asked = reader.ask(rollout)
        rows = steps.any(1)
        self.log_means(mode, {"critic/states": (steps.sum(), rows.sum())})
        self.log_value(mode, "critic/trust", self.trust)
        if mode == "train":
            started = time.perf_counter()
            counted = steps[asked.starts].cpu()  # an unscored completion was asked about too
            loss = self.engine.learn(asked.features[counted], targets[steps])
            self.log_value(mode, "critic/loss", loss)
            self.log_value(mode, "critic/update_time", time.perf_counter() - started)
        reader.forget()
