"""The probe critic in a trainer: its features from the start policy's forward pass, its trust in the advantages."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch

from trl_credit.credit.boundaries import position_features, segment_starts, segments_of_starts, uncertain_starts
from trl_credit.credit.fit import explained_variance, fit_sums
from trl_credit.credit.running_mean import RunningMean
from trl_credit.credit.segment_gae import segment_advantages, segment_of_token
from trl_credit.credit.trust import mixed_advantages
from trl_credit.critics.probe import ProbeCritic
from trl_credit.seam import CreditConfig, CreditTrainer

from .trainers import batch_mean_advantages


BOUNDARIES = ("segments", "entropy", "tokens")
BASELINES = ("batch", "group")


@dataclass
class ProbeConfig(CreditConfig):
    """
    What the probe critic reads, where, and how it is leant on.

    Args:
        boundaries (`str`):
            Where the critic is asked: `"segments"`, those of the task; `"entropy"`, where the start policy's is above
            a running quantile; `"tokens"`, everywhere.
        boundary_quantile (`float`):
            The quantile, with `boundaries="entropy"`.
        feature_layers (`list[int]`, *optional*):
            Hidden layers of the start policy that are features: 0 is the embedding, -1 what the LM head reads.
        feature_uncertainty (`bool`):
            Whether the sampled token's log-probability before the state, and the entropy at it, are features.
        feature_position (`bool`):
            Whether the place in the completion is.
        baseline (`str`):
            What is left where the critic is not trusted: `"batch"` or `"group"` mean.
        policy_lambda (`float`):
            λ of the advantages, over segments.
        critic_trust (`float`, *optional*):
            w, by default measured.
    """

    boundaries: str = "segments"
    boundary_quantile: float = 0.5
    feature_layers: list[int] | None = None
    feature_uncertainty: bool = False
    feature_position: bool = True
    baseline: str = "batch"
    policy_lambda: float = 0.5
    critic_trust: float | None = None
    critic_hidden_size: int = 32
    critic_learning_rate: float = 5e-3
    critic_updates: int = 32
    critic_batch_size: int = 64
    critic_buffer_rollouts: int = 16

    def __post_init__(self):
        super().__post_init__()
        for name, allowed in (("boundaries", BOUNDARIES), ("baseline", BASELINES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"ProbeConfig: `{name}` must be one of {allowed}, got {getattr(self, name)!r}.")


class ProbeTrainer(CreditTrainer):
    """The batch's or the group's mean as baseline, and a probe critic's advantages as far as they are trusted."""

    _name = "probe critic"
    args: ProbeConfig
    config_class = ProbeConfig
    FILE = "probe_critic.pt"

    def __init__(self, *args, task, **kwargs):
        self.task = task
        self.critic_tokens = 0  # read in passes of its own
        self._probe: ProbeCritic | None = None
        self._threshold = RunningMean()
        self._states: dict[int, torch.Tensor] = {}
        super().__init__(*args, **kwargs)
        self._layers = [0] if self.args.feature_layers is None else list(self.args.feature_layers)
        reads_entropy = self.args.feature_uncertainty or self.args.boundaries == "entropy"
        # With a KL penalty TRL reads every rollout with the start policy: the features are taken as they pass by.
        self._own_start = None
        start = self.ref_model
        if start is None:
            self._own_start = start = copy.deepcopy(self.model).eval().requires_grad_(False)
        self._start = start
        wanted = set(self._layers) | ({-1} if reads_entropy else set())
        self._needs_pass = wanted != {0}
        blocks = [start.get_input_embeddings(), *start.base_model.layers]
        for layer in wanted - {0}:
            module = start.base_model.norm if layer == -1 else blocks[layer]
            module.register_forward_hook(self._keep(layer))

    def _keep(self, layer: int):
        def hook(module, inputs, output):
            self._states[layer] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    def assign_credit(self, rollout: dict, rewards: torch.Tensor, mode: str) -> dict:
        fallback = rollout["advantages"] if self.args.baseline == "group" else batch_mean_advantages(rewards)
        mask = self.trained_tokens(rollout) & rewards.isfinite().unsqueeze(1)
        hidden = self._hidden_states(rollout)
        entropy = self._entropy(hidden)
        starts, segments = self._segments(rollout, mask, entropy)
        features = self._features(rollout, hidden, entropy, starts, mask)[starts]
        rows = starts.nonzero()[:, 0]
        returns = rewards[rows]

        if self._probe is None:
            self._probe = self._make_probe(features.shape[1])
        values = self._probe.predict(features)
        self._probe.measure(values, returns)
        weight = self._probe.trust if self.args.critic_trust is None else self.args.critic_trust

        of_segments = values.new_zeros(len(mask), int(segments.max()) + 1)
        of_segments[rows, segments[starts]] = values
        advantages = segment_advantages(
            torch.nan_to_num(rewards), of_segments, segments, gae_lambda=self.args.policy_lambda
        )
        known = torch.zeros_like(of_segments, dtype=torch.bool)
        known[rows, segments[starts]] = True
        fit = explained_variance(fit_sums(of_segments, rewards.unsqueeze(1).expand_as(of_segments), known))
        loss = self._probe.learn(features, returns)
        for name, value in {
            "critic/explained_variance": fit,
            "critic/trust": weight,
            "critic/loss": loss,
            "critic/value_std": values.std().item(),
            "critic/segments": known.sum(1).float().mean().item(),
        }.items():
            self.log_value(mode, name, value)
        return {**rollout, "advantages": mixed_advantages(advantages, fallback, weight)}

    # --- What the critic reads

    @torch.no_grad()
    def _hidden_states(self, rollout: dict) -> dict[int, torch.Tensor]:
        """States of the start policy from which each token was chosen, by layer, each of shape `(B, T, H)`."""
        ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1)
        if self._own_start is not None and self._needs_pass:
            mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1)
            self._own_start.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            self.critic_tokens += int(mask.sum())
        states = {**self._states, 0: self._start.get_input_embeddings()(ids)}
        length = rollout["completion_ids"].shape[1]
        return {layer: state[:, -length - 1 : -1] for layer, state in states.items()}

    @torch.no_grad()
    def _entropy(self, hidden: dict[int, torch.Tensor]) -> torch.Tensor | None:
        if -1 not in hidden:
            return None
        logps = self._start.get_output_embeddings()(hidden[-1]).float().log_softmax(-1)
        self._logps = logps if self.args.feature_uncertainty else None
        return -(logps.exp() * logps).sum(-1)

    def _segments(self, rollout, mask, entropy) -> tuple[torch.Tensor, torch.Tensor]:
        """Where segments start, and the segment of each token, both `(B, T)`."""
        if self.args.boundaries == "segments":
            lengths = rollout["completion_mask"].sum(1).tolist()
            segments = segment_of_token([self.task.segment_ends(length) for length in lengths], mask)
            return segment_starts(segments), segments
        if self.args.boundaries == "tokens":
            return mask, segments_of_starts(mask, mask)
        quantile = torch.quantile(entropy[mask], self.args.boundary_quantile)
        self._threshold = self._threshold.updated(quantile)
        starts = uncertain_starts(entropy, mask, self._threshold.value)
        return starts, segments_of_starts(starts, mask)

    def _features(self, rollout, hidden, entropy, starts, mask) -> torch.Tensor:
        pieces = [hidden[layer] for layer in self._layers]
        if self.args.feature_position:
            pieces.append(position_features(starts, mask, self.task.completion_length))
        if self.args.feature_uncertainty:
            chosen = self._logps.gather(2, rollout["completion_ids"].unsqueeze(2)).squeeze(2)
            before = torch.cat([torch.zeros_like(chosen[:, :1]), chosen[:, :-1]], dim=1)
            pieces.append(torch.stack([before, entropy], dim=-1))
        return torch.cat([piece.float() for piece in pieces], dim=-1)

    # --- The critic in the run

    def _make_probe(self, feature_size: int) -> ProbeCritic:
        return ProbeCritic(
            feature_size,
            hidden_size=self.args.critic_hidden_size,
            learning_rate=self.args.critic_learning_rate,
            updates=self.args.critic_updates,
            batch_size=self.args.critic_batch_size,
            buffer_rollouts=self.args.critic_buffer_rollouts,
            seed=self.args.seed,
        )

    def save_training_state(self, folder: Path) -> None:
        if self._probe is not None:
            folder.mkdir(parents=True, exist_ok=True)
            size = self._probe.head[0].in_features
            state = {"feature_size": size, "probe": self._probe.state_dict(), "threshold": tuple(self._threshold)}
            torch.save(state, folder / self.FILE)

    def begin_training(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state = torch.load(Path(checkpoint) / self.FILE, weights_only=True)
            self._probe = self._make_probe(state["feature_size"])
            self._probe.load_state_dict(state["probe"])
            self._threshold = RunningMean(*state["threshold"])
