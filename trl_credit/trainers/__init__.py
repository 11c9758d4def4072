"""One folder a trainer: its config and its trainer."""
