"""What a critic knows: Monte-Carlo truth, and how far its values are from it."""

from ..critics.generative.critic import GenerativeCritic
from ..critics.prompt import PromptCritic
from ..critics.token import TokenCritic
from .callback import CriticProbeCallback
from .critics import ConstantCritic, Critic, LeaveOneOutMean
from .policies import Decoding, TransformersPolicy, VLLMPolicy, load_policy
from .probes import Probes, ProbeSettings, Rollout, draw_probes
from .report import CriticReport, evaluate_critic


__all__ = [
    "ConstantCritic",
    "Critic",
    "CriticProbeCallback",
    "CriticReport",
    "Decoding",
    "GenerativeCritic",
    "LeaveOneOutMean",
    "ProbeSettings",
    "Probes",
    "PromptCritic",
    "Rollout",
    "TokenCritic",
    "TransformersPolicy",
    "VLLMPolicy",
    "draw_probes",
    "evaluate_critic",
    "load_policy",
]
