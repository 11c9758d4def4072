"""The credit viewer: tables of completions in, one HTML file out. Needs neither torch nor TRL."""

from .page import write_page
from .reader import BadTable, Completion, read_completions


__all__ = ["BadTable", "Completion", "read_completions", "write_page"]
