"""What a probe critic is and does in a run, in the place of a network beside the policy."""

import copy
import time
from typing import Any

import torch

from ...credit.gae import gae
from ...credit.trust import mixed_advantages
from ...critics.facts import PROBE, RUNNING, CriticFacts, fingerprint
from ...critics.probe.critic import PROMPT, ProbeCritic, Question
from ...critics.probe.engine import ProbeEngine
from ...critics.probe.learner import ProbeLearner
from ...critics.probe.network import ProbeNetwork
from ...critics.probe.replay import ReplayBuffer
from ...segmenting import Segmenter
from .probe_config import MEASURED
from .reward_range import RewardRange


DEFAULT_RATE = 5e-3


class Probe:
    """
    The hooks of [`~trl_credit.trainers.critic.CriticTrainer`] about its critic, for a probe critic: a head that has no
    pretraining and no engine of the policy's kind, and that learns when a rollout is there, not when the policy steps.

    Args:
        trainer ([`~trl_credit.trainers.critic.probe_trainer.ProbeTrainer`]):
            The trainer.
        segmenter ([`~trl_credit.segmenting.Segmenter`], *optional*):
            Where segments end.
    """

    def __init__(self, trainer: Any, segmenter: Segmenter | None = None):
        self.trainer, self.segmenter = trainer, segmenter

    # --- What it is

    # What to do where rewards have no range.
    takes_any_reward = "or take another critic than `'probe'`, whose `reward_range` may be 'running'"

    def range_to_begin_with(self) -> RewardRange:
        """The range of the first rollout, and of all others."""
        args, own = self.trainer.args, self.trainer.range_of_source
        if args.reward_range == args._default("reward_range"):
            return RewardRange(own or (0.0, 1.0))
        if args.reward_range == RUNNING:
            raise ValueError(
                f"{type(args).__name__}: `reward_range={RUNNING!r}` cannot be had with a probe critic, whose replay "
                "buffer is of one range. Set it to the lowest and the highest reward."
            )
        return RewardRange(args.reward_range)

    def make_critic(self, policy, critic, peft_config) -> ProbeNetwork:
        """The head, a fresh one or that of an earlier run."""
        trainer = self.trainer
        args: Any = copy.copy(trainer.args)
        trainer.args = args
        # There is nothing to pretrain or to freeze, nor to update when the policy steps.
        args.critic_pretraining_steps, args.critic_updates_per_step, args.critic_freeze = 0, 0, None
        args.reward_range = low, high = list(trainer.value_range)
        if trainer.critic_processing_class is not trainer.processing_class:
            raise ValueError("`critic_processing_class` has no effect: a probe critic reads no text. Drop it.")
        if (args.probe_boundaries == PROMPT) != (args._default("probe_boundaries") == PROMPT):
            raise ValueError(
                f"The probe critic {critic} was trained to value states of `probe_boundaries="
                f"{args.probe_boundaries!r}`, which a {type(trainer).__name__} does not ask for. Begin with a fresh "
                f"one, `critic={PROBE!r}`."
            )
        trainer.listen_to_reference(tuple(args.probe_layers), first_only=args.probe_boundaries == PROMPT)
        if critic != PROBE:
            return ProbeNetwork.load(critic)
        config = trainer.accelerator.unwrap_model(trainer.model).config.get_text_config()
        return ProbeNetwork(
            self.question.feature_size(config.hidden_size),
            args.probe_hidden_size,
            (low, high),
            trainer.max_completion_length,
            args.seed,
        )

    @property
    def question(self) -> Question:
        """What it is asked."""
        args = self.trainer.args
        return Question(args.probe_boundaries, tuple(args.probe_layers), args.probe_uncertainty, self.segmenter)

    def make_engine(self) -> ProbeEngine:
        """What runs and teaches it."""
        args, network = self.trainer.args, self.trainer.critic
        states = int(args.probe_buffer_memory * 2**30 / ReplayBuffer.bytes_of_state(len(network.shift)))
        if states < args.probe_buffer_rollouts:
            raise ValueError(
                f"`probe_buffer_memory={args.probe_buffer_memory}` GiB have room for {states} states of "
                f"{len(network.shift)} features, fewer than `probe_buffer_rollouts={args.probe_buffer_rollouts}`."
            )
        learner = ProbeLearner(
            network,
            learning_rate=self.critic_learning_rates()[1],
            updates=args.probe_updates,
            batch_size=args.probe_batch_size,
            buffer_rollouts=args.probe_buffer_rollouts,
            buffer_states=states,
            seed=args.seed,
        )
        return ProbeEngine(learner, self.trainer.accelerator)

    def make_critic_reader(self, runner) -> ProbeCritic:
        """What it is asked, and how that is read."""
        trainer = self.trainer
        return ProbeCritic(runner, trainer.read_with_reference, trainer.processing_class, self.question)

    def critic_learning_rates(self) -> tuple[float, float]:
        """The head's, twice: there is nothing below it."""
        rate = self.trainer.args.critic_head_learning_rate
        rate = DEFAULT_RATE if rate is None else rate
        return rate, rate

    def critic_settings(self) -> dict[str, Any]:
        """See [`~trl_credit.trainers.critic.CriticTrainer.critic_settings`]."""
        names = ("boundaries", "boundary_quantile", "layers", "uncertainty", "hidden_size")
        own = {f"probe_{name}": getattr(self.trainer.args, f"probe_{name}") for name in names}
        return {"reward_range": list(self.trainer.value_range), **own}

    def critic_options(self) -> list[str]:
        """See [`~trl_credit.trainers.critic.CriticTrainer.critic_options`]."""
        args = self.trainer.args
        shared = [name for name in ("critic_head_learning_rate", "critic_lambda") if hasattr(args, name)]
        return [*shared, *args.options_of_probe()]

    def critic_facts(self) -> CriticFacts:
        """See [`~trl_credit.trainers.critic.CriticTrainer.critic_facts`]."""
        trainer = self.trainer
        policy = trainer.accelerator.unwrap_model(trainer.model)
        # An adapter that was trained further is its own reference, of which there is no folder.
        is_adapter = "ref" in getattr(policy, "peft_config", ())
        source = policy.config.name_or_path
        return CriticFacts(
            PROBE,
            self.critic_settings(),
            tokenizer=fingerprint(trainer.processing_class),
            reads=None if is_adapter or not source else {"model": source, "temperature": trainer.temperature},
            updates=trainer.updates_of_critic,
        )

    def describe_critic(self) -> str:
        """See [`~trl_credit.trainers.critic.CriticTrainer.describe_critic`]."""
        return (
            "A probe critic: a small head that gives states of a completion the reward that the policy is expected to "
            "end\nwith, from what the policy that the run started from makes of them.\n\n"
            "```python\nfrom transformers import AutoTokenizer\nfrom trl_credit.critics.loading import load_critic\n\n"
            "critic = load_critic(path, AutoTokenizer.from_pretrained(path))\n"
            "values = critic.state_values(rollout)\n```"
        )

    # --- Its part in the credit

    def time_steps(self, rollout: dict, mode: str) -> torch.Tensor:
        """The tokens of a new rollout before which it is asked, boolean, shape `(B, T)`."""
        args = self.trainer.args

        def move_threshold(entropy, mask):
            self.trainer.engine.move_threshold(entropy, mask, args.probe_boundary_quantile)

        moves = mode == "train" and args.probe_boundaries == "entropy"
        return self.trainer.critic_reader.ask(rollout, move_threshold if moves else None).starts

    def prompt_values(self, rollout: dict, mode: str) -> tuple[torch.Tensor, dict]:
        """Its values of a rollout's prompts, shape `(B,)`; it adds nothing to the rollout."""
        return self.trainer.state_values(rollout)[:, 0].nan_to_num(), {}

    def measure(self, values: torch.Tensor, returns: torch.Tensor, counted: torch.Tensor, mode: str) -> None:
        """Take note of how well a rollout was valued, before it learns from it."""
        if mode == "train":
            self.trainer.engine.measure(values[counted], returns[counted])

    @property
    def trust(self) -> float:
        """w: how far it is leant on."""
        asked = self.trainer.args.critic_trust
        return self.trainer.engine.trust if asked == MEASURED else float(asked)

    @property
    def measured_lambda(self) -> float:
        """λ for `policy_lambda="measured"`: what the critic's changes of value do not account for."""
        return 1 - self.trainer.engine.trust_in_changes

    def measure_changes(self, earned, values, returns, steps: torch.Tensor, mode: str) -> None:
        """Take note of how its values changed from state to state, before it learns from the rollout."""
        if mode == "train":
            changes, _ = gae(earned, values, steps, lam=0.0)
            goes_on = steps & (steps.flip(1).cumsum(1).flip(1) > 1)  # what comes after the last is the reward itself
            self.trainer.engine.measure_changes(changes[goes_on], returns[goes_on])

    def lean(self, advantages, rewards, rollout: dict, mode: str) -> torch.Tensor:
        """Its advantages as far as it is trusted, and for the rest those of the group or of the rollout."""
        trainer = self.trainer
        generations = trainer.num_generations if mode == "train" else trainer.num_generations_eval
        fallback = rollout["advantages"]
        if (generations or 1) == 1:
            scored = rewards.isfinite()
            total, count = trainer.total(torch.stack([torch.where(scored, rewards, 0).sum(), scored.sum()]))
            fallback = torch.where(scored, rewards - total / count.clamp(min=1), 0)
        return mixed_advantages(advantages, fallback, self.trust)

    def learn(self, rollout: dict, targets: torch.Tensor, steps: torch.Tensor, mode: str) -> None:
        """Learn from a rollout that has been valued. An evaluation changes nothing."""
        trainer, reader = self.trainer, self.trainer.critic_reader
        asked = reader.ask(rollout)
        rows = steps.any(1)
        trainer.log_means(mode, {"critic/states": (steps.sum(), rows.sum())})
        trainer.log_value(mode, "critic/trust", self.trust)
        if mode == "train":
            started = time.perf_counter()
            counted = steps[asked.starts].cpu()  # an unscored completion was asked about too
            loss = trainer.engine.learn(asked.features[counted], targets[steps])
            trainer.log_value(mode, "critic/loss", loss)
            trainer.log_value(mode, "critic/update_time", time.perf_counter() - started)
        reader.forget()
