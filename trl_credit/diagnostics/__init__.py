"""What a critic knows: Monte-Carlo truth, and how far its values are from it."""

from .policies import Decoding, TransformersPolicy, VLLMPolicy, load_policy
from .probes import Probes, ProbeSettings, Rollout, draw_probes


__all__ = [
    "Decoding",
    "ProbeSettings",
    "Probes",
    "Rollout",
    "TransformersPolicy",
    "VLLMPolicy",
    "draw_probes",
    "load_policy",
]
