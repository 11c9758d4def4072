"""The quickstart: a small language model learns to reason better, in minutes, on any machine."""


def main(argv: list[str] | None = None) -> int:
    """
    Run the quickstart.

    Args:
        argv (`list[str]`, *optional*):
            Command line arguments; those of the process by default.

    Returns:
        `int`: Exit status.
    """
    from .quickstart import run

    return run(argv)
