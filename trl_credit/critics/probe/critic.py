"""The probe critic: at which states it is asked, what it reads there, and what it answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError

from ...credit.boundaries import first_tokens, held, position_features, segment_starts, turn_starts, uncertain_starts
from ...credit.running_mean import RunningMean
from ...credit.segment_gae import segment_of_token
from ...seam.loss import trained_tokens
from ...seam.reference import Reading, overheard
from ...segmenting import DelimiterSegmenter, Segmenter
from ..critic import Critic, Runner, nan_beyond_the_end, on_device
from ..facts import FACTS_FILE, CriticFacts
from ..refusals import refuse_images
from .network import ProbeNetwork


BOUNDARIES = ("entropy", "segments", "turns", "tokens")
# The one boundary of a critic of prompts.
PROMPT = "prompt"


@dataclass(frozen=True)
class Question:
    """
    What a probe critic is asked.

    Args:
        boundaries (`str`, *optional*, defaults to `"entropy"`):
            At which states: `"entropy"`, where the entropy of the reference is above a running quantile; `"segments"`,
            at those between the segments; `"turns"`, where the policy has its turn; `"tokens"`, at all; `"prompt"`, at
            the end of the prompt.
        layers (`Sequence[int]`, *optional*, defaults to `(0,)`):
            Layers of the reference whose states it reads.
        uncertainty (`bool`, *optional*, defaults to `True`):
            Whether it reads the log-probabilities of the token before the state and of all the policy's tokens so far,
            and the entropy at the state.
        segmenter ([`~trl_credit.segmenting.Segmenter`], *optional*):
            Where segments end. Default: a [`~trl_credit.segmenting.DelimiterSegmenter`].
    """

    boundaries: str = "entropy"
    layers: Sequence[int] = (0,)
    uncertainty: bool = True
    segmenter: Segmenter | None = None

    def feature_size(self, width: int) -> int:
        """Features of a state, of a reference with hidden states of this width."""
        return len(self.layers) * width + 3 + 3 * self.uncertainty


@dataclass(frozen=True)
class Asked:
    """
    The states of a rollout at which a probe critic is asked, and what it reads there.

    Args:
        starts (`torch.Tensor`):
            The tokens that are chosen in them, boolean, shape `(B, T)`.
        features (`torch.Tensor`):
            Shape `(M, F)`, in the order of `starts.nonzero()`, on the host.
    """

    starts: torch.Tensor
    features: torch.Tensor


class ProbeCritic(Critic):
    """
    A value for the states between parts of a completion, or for its prompt, from what a model that is read anyway makes
    of it: the critic of VAPO, PPO, SAO, BPCO and SPPO with `critic="probe"`.

    Args:
        network ([`~trl_credit.critics.probe.network.ProbeNetwork`] or [`~trl_credit.critics.critic.Runner`]):
            The head, or what runs it.
        read (`Callable`):
            `read(rollout)`, what the start policy makes of a rollout, a [`~trl_credit.seam.reference.Reading`].
        tokenizer (`PreTrainedTokenizerBase`):
            The policy's.
        question ([`Question`], *optional*):
            What it is asked.
        name (`str`, *optional*, defaults to `"probe critic"`):
            What it is called in a report.
    """

    kind = "probe"

    def __init__(
        self,
        network: ProbeNetwork | Runner,
        read: Callable[[dict], Reading],
        tokenizer,
        question: Question | None = None,
        name: str = "probe critic",
        batch_size: int | None = None,
    ):
        super().__init__(network, name)
        self.read = read
        self.tokenizer = tokenizer
        self.question = question or Question()
        self.batch_size = batch_size
        self._latest: tuple[Any, Asked] | None = None

    @classmethod
    def from_pretrained(cls, path: str, tokenizer, batch_size: int = 32, **model_init_kwargs) -> "ProbeCritic":
        """
        A critic that was saved, with the policy whose states it reads.

        Args:
            path (`str`):
                A folder or Hub id.
            tokenizer (`PreTrainedTokenizerBase`):
                The policy's.
            batch_size (`int`, *optional*, defaults to `32`):
                Completions that are read at a time.
            model_init_kwargs:
                Of `from_pretrained` of that policy.

        Raises:
            ValueError: If it is of another kind, does not say which policy it reads, or that is not there.
        """
        from transformers import AutoModelForCausalLM

        facts = CriticFacts.load(path)
        if facts is None or facts.kind != cls.kind:
            raise ValueError(f"{path} is not a probe critic by its critic.json.")
        if not facts.reads:
            raise ValueError(
                f"The probe critic {path} reads the states of a policy that had no folder of its own, as an adapter "
                "that was trained further: it can be asked in its run only."
            )
        try:
            model = AutoModelForCausalLM.from_pretrained(facts.reads["model"], **model_init_kwargs)
        except (OSError, HFValidationError) as error:
            raise ValueError(
                f"The probe critic {path} reads the states of the policy {facts.reads['model']}, which cannot be "
                f"loaded here: {error} Put it there, or name its place in the critic's {FACTS_FILE}, under `reads`."
            ) from error
        settings = facts.settings
        question = Question(settings["probe_boundaries"], settings["probe_layers"], settings["probe_uncertainty"])
        read = partial(read_with, on_device(model.eval()), tuple(question.layers), facts.reads["temperature"])
        return cls(ProbeNetwork.load(path), read, tokenizer, question, path, batch_size)

    def ask(self, rollout: dict, move_threshold: Callable[[torch.Tensor, torch.Tensor], None] | None = None) -> Asked:
        """
        At which states of a rollout it is asked, and what it reads there.

        Args:
            rollout (`dict`):
                As in [`state_values`].
            move_threshold (`Callable`, *optional*):
                Called with the entropies and the mask of its tokens before boundaries are found by them.
        """
        if self._latest is not None and self._latest[0] is rollout["completion_ids"]:
            return self._latest[1]
        refuse_images(rollout)
        reading = self.read(rollout)
        mask = trained_tokens(rollout)
        if move_threshold is not None:
            move_threshold(reading.entropy.to(mask.device), mask)
        starts = self._starts(rollout, reading, mask)
        asked = Asked(starts, self._features(starts, mask, reading))
        self._latest = rollout["completion_ids"], asked
        return asked

    def forget(self) -> None:
        """Let go of the latest rollout."""
        self._latest = None

    def state_values(self, rollout: dict) -> torch.Tensor:
        """
        See [`~trl_credit.critics.critic.Critic.state_values`]. A value holds for the states up to the next at which the
        critic is asked, and that of the prompt for all; of the state after the last token there is no other.
        """
        asked = self.ask(rollout)
        values = torch.zeros(asked.starts.shape, device=asked.starts.device)
        values[asked.starts] = self.network.values(asked.features).to(values)
        values = torch.nn.functional.pad(held(values, asked.starts), (0, 1), value=torch.nan)
        if self.question.boundaries == PROMPT:
            return nan_beyond_the_end(values[:, :1].expand_as(values), rollout)
        after = rollout["completion_mask"].sum(1, keepdim=True).to(values.device)
        return nan_beyond_the_end(values.scatter(1, after, torch.nan), rollout)

    def _starts(self, rollout: dict, reading: Reading, mask: torch.Tensor) -> torch.Tensor:
        kind = self.question.boundaries
        if kind == "tokens":
            return mask
        if kind == PROMPT:
            return first_tokens(mask)
        if kind == "turns":
            return turn_starts(mask)
        if kind == "entropy":
            threshold = RunningMean(*self.network.threshold.tolist()).value
            return uncertain_starts(reading.entropy.to(mask.device), mask, threshold)
        segmenter = self.question.segmenter or DelimiterSegmenter()
        ends = []
        for ids, there, trained in zip(rollout["completion_ids"], rollout["completion_mask"], mask, strict=True):
            length = int(there.sum())
            ends.append(segmenter(ids[:length].tolist(), self.tokenizer, trained[:length].tolist()))
        return segment_starts(segment_of_token(ends, mask))

    def _features(self, starts: torch.Tensor, mask: torch.Tensor, reading: Reading) -> torch.Tensor:
        here = starts.cpu()
        position = position_features(starts, mask, int(self.network.length)).cpu()
        read = [reading.states[layer] for layer in self.question.layers]
        pieces = [*(states[here[:, : states.shape[1]]] for states in read), position[here]]
        if self.question.uncertainty:
            logps = reading.logps.cpu()
            so_far = torch.where(mask.cpu(), logps, 0).cumsum(1)
            before = torch.nn.functional.pad(torch.stack([logps, so_far], dim=-1), (0, 0, 1, 0))[:, :-1]
            pieces.append(torch.cat([before, reading.entropy.cpu().unsqueeze(2)], dim=-1)[here])
        return torch.cat([piece.float() for piece in pieces], dim=-1)


@torch.no_grad()
def read_with(model: Any, layers: tuple[int, ...], temperature: float, rollout: dict) -> Reading:
    """
    What a causal LM makes of a rollout, in a pass of its own.

    Args:
        model (`PreTrainedModel`):
            The model.
        layers (`tuple[int, ...]`):
            Layers whose states are wanted.
        temperature (`float`):
            At which log-probabilities and entropies are taken.
        rollout (`dict`):
            With `prompt_ids`, `prompt_mask`, `completion_ids` and `completion_mask`.
    """
    ids, mask = (
        torch.cat([rollout[f"prompt_{what}"], rollout[f"completion_{what}"]], dim=1).to(model.device)
        for what in ("ids", "mask")
    )
    length = rollout["completion_ids"].shape[1]
    with overheard(model, layers, length) as heard:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]
    distribution = (logits.float() / temperature).log_softmax(-1)
    logps = distribution.gather(2, ids[:, -length:].unsqueeze(2)).squeeze(2)
    entropy = -(distribution.exp() * distribution).sum(-1)
    return Reading({layer: torch.cat(heard[layer]) for layer in layers}, logps, entropy)
