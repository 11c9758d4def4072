"""What each token of a run's completions was given: tables, and the page that shows them. Reading needs no torch."""

from .reader import BadTable, Completion, Right, read_completions
from .viewer import write_page


__all__ = ["BadTable", "Completion", "Right", "read_completions", "write_page"]


def __getattr__(name: str):  # the names that 0.2.0 had here
    from ..moved import moved_name

    return moved_name(__name__, name)
