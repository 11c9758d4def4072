"""The part of a model card that says how credit was assigned."""

from dataclasses import fields
from importlib.metadata import version
from pathlib import Path


# Settings of the base config that a reader needs to compare two runs.
_SHARED_SETTINGS = (
    "learning_rate",
    "num_generations",
    "num_iterations",
    "loss_type",
    "epsilon",
    "epsilon_high",
    "beta",
    "scale_rewards",
    "max_completion_length",
    "temperature",
)


def add_credit_settings(card: Path, config, base_config_class: type) -> None:
    """
    Write the settings of a run into its model card, before the section on framework versions.

    Args:
        card (`Path`):
            The `README.md` that TRL has written.
        config:
            The run's config.
        base_config_class (`type`):
            The config that it extends: fields it adds are listed first.
    """
    base = {field.name for field in fields(base_config_class)}
    names = [field.name for field in fields(config) if field.name not in base] + list(_SHARED_SETTINGS)
    values = {name: str(getattr(config, name)).replace("\n", "\\n") for name in names}
    table = "\n".join(f"| `{name}` | `{value}` |" for name, value in values.items())
    section = (
        "### Credit assignment\n\n"
        f"Trained with trl_credit {version('trl-credit')}.\n\n"
        f"| setting | value |\n| --- | --- |\n{table}\n\n"
    )
    heading = "### Framework versions"
    text = card.read_text(encoding="utf-8")
    if heading not in text:
        raise RuntimeError(f"{card} has no section '{heading}' to write the credit settings before.")
    text = text.replace(heading, section + heading, 1)
    # A base model that lies in a local folder has no name on the Hub.
    text = text.replace(
        "fine-tuned version of [None](https://huggingface.co/None)", "fine-tuned version of a local model"
    )
    card.write_text(text, encoding="utf-8")
