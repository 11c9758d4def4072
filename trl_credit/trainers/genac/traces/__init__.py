"""
Stage 1 of a generative critic: traces of an oracle on partial solutions of the actor, to fit the critic to.

`trace_collector` samples solutions of the actor and does the rest in turn: `oracle` is who reasons about their states,
`asking` asks about each once, and `dataset` keeps the traces that the critic is to learn from. `journal` is how all of
it survives being killed.
"""

from .dataset import write_dataset
from .oracle import State
from .trace_collector import TraceCollector
from .traces_config import GenACTracesConfig


__all__ = ["GenACTracesConfig", "State", "TraceCollector", "write_dataset"]
