"""Loading a saved critic from its folder alone."""

from typing import Any

from .critic import Critic
from .facts import CriticFacts
from .generative.critic import GenerativeCritic
from .probe.critic import ProbeCritic
from .prompt import PromptCritic
from .token import TokenCritic


def load_critic(
    path: str, policy_tokenizer, kind: str | None = None, batch_size: int = 32, dtype="auto", **settings: Any
) -> Critic:
    """
    A saved critic, asked what its trainer asked it.

    Args:
        path (`str`):
            A folder or Hub id.
        policy_tokenizer (`PreTrainedTokenizerBase`):
            The policy's.
        kind (`str`, *optional*):
            `"token"`, `"prompt"`, `"generative"` or `"probe"`. Default: what its `critic.json` says, or else `"token"`.
        batch_size (`int`, *optional*, defaults to `32`):
            Completions or prompts per batch.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Of its weights.
        settings:
            Arguments of its class's `from_pretrained`, as far as that takes them: `critic_loss` and `reward_range` for
            prompt critics, `max_completion_length` for generative ones.

    Raises:
        ValueError: If the critic is of another kind, or a given setting differs from the critic's.
    """
    if kind is None:
        facts = CriticFacts.load(path)
        kind = "token" if facts is None else facts.kind
    if kind == "generative":
        known = {name: settings[name] for name in ("max_completion_length",) if name in settings}
        return GenerativeCritic.from_pretrained(path, policy_tokenizer, dtype, **known)
    if kind == "prompt":
        known = {name: settings[name] for name in ("critic_loss", "reward_range") if name in settings}
        return PromptCritic.from_pretrained(
            path, batch_size=batch_size, policy_tokenizer=policy_tokenizer, dtype=dtype, **known
        )
    if kind == "probe":
        return ProbeCritic.from_pretrained(path, policy_tokenizer, batch_size, dtype=dtype)
    return TokenCritic.from_pretrained(path, policy_tokenizer, batch_size, dtype=dtype)
