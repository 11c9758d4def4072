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
    "trust_region",
    "trust_region_threshold",
    "epsilon",
    "epsilon_high",
    "beta",
    "scale_rewards",
    "max_completion_length",
    "temperature",
)


def add_credit_section(card: Path, trainer, base_config_class: type) -> None:
    """
    Write into a run's model card what came of it and its settings, before the section on framework versions.

    Args:
        card (`Path`):
            The `README.md` that TRL has written.
        trainer ([`~trl_credit.seam.CreditTrainer`]):
            The run.
        base_config_class (`type`):
            The config that the run's extends: fields it adds are listed first.
    """
    base = {field.name for field in fields(base_config_class)}
    names = [field.name for field in fields(trainer.args) if field.name not in base] + list(_SHARED_SETTINGS)
    section = (
        "### Credit assignment\n\n"
        f"Trained with [trl_credit](https://pypi.org/project/trl-credit/) {version('trl-credit')}. {_result(trainer)}"
        f"{_critic(trainer)}\n\n{settings_table(trainer.args, names)}\n\n"
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


def settings_table(config, names: list[str]) -> str:
    """A table of settings. Those that are `None` because nobody has set them say nothing, and are left out."""
    values = {name: getattr(config, name) for name in names}
    defaults = {field.name: field.default for field in fields(config)}
    rows = [
        f"| `{name}` | `{value}` |".replace("\n", "\\n")
        for name, value in values.items()
        if not (value is None and defaults[name] is None)
    ]
    return "\n".join(["| setting | value |", "| --- | --- |", *rows])


def _result(trainer) -> str:
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    steps = f"Optimizer steps: {trainer.state.global_step}."
    return f"{steps} Mean reward, as logged last: {rewards[-1]:.3g}." if rewards else steps


def _critic(trainer) -> str:
    if "critic" not in trainer.folders_of_networks:
        return ""
    repo, folder = trainer.args.critic_hub_model_id, "in the folder `critic`"
    if trainer.hub_model_id is not None:
        folder = f"[in the folder `critic`](https://huggingface.co/{trainer.hub_model_id}/tree/main/critic)"
    own = f", and [in a repository of its own](https://huggingface.co/{repo})" if repo else ""
    return f" Its critic is {folder}{own}."
