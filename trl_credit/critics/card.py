"""A critic's model card, and its way to the Hub."""

from importlib.metadata import version
from pathlib import Path

from ..model_card import settings_table
from .backbone import BackboneForTokenClassification


def write_critic_card(folder: Path, trainer) -> None:
    """
    Write the `README.md` of a critic.

    Args:
        folder (`Path`):
            Where it is saved.
        trainer ([`~trl_credit.trainers.critic.CriticTrainer`]):
            The trainer that made it.
    """
    policy = trainer.model.config.name_or_path if hasattr(trainer.model, "config") else ""
    args, critic = trainer.args, trainer.of_critic
    base = f"base_model: {policy}\n" if policy and not Path(policy).exists() else ""
    names = critic.critic_options()
    others = ("reward_range", "gamma", "truncation", "num_generations", "max_completion_length")
    names += [name for name in others if hasattr(args, name)]
    beside = f"[the policy](https://huggingface.co/{trainer.hub_model_id})" if trainer.hub_model_id else "the policy"
    rate, head_rate = critic.critic_learning_rates()
    (folder / "README.md").write_text(
        f"""---
library_name: transformers
{base}tags:
- trl
- trl-credit
- critic
- value-model
---

# Critic of a policy trained with {trainer._name}

{critic.describe_critic()}

Trained with [trl_credit](https://pypi.org/project/trl-credit/) {version("trl-credit")} for {trainer.engine.steps}
updates, beside {beside}. Learning rate: {rate:.3g}, of its head {head_rate:.3g}.

{settings_table(args, names)}
""",
        encoding="utf-8",
    )


def push_critic(folder: Path, repo_id: str, args) -> str:
    """
    Push a saved critic to a repository of its own.

    Args:
        folder (`Path`):
            Where it is saved.
        repo_id (`str`):
            The repository; it is made if it is not there.
        args ([`~transformers.TrainingArguments`]):
            `hub_token`, `hub_private_repo`.

    Returns:
        `str`: The repository.
    """
    from huggingface_hub import create_repo, upload_folder

    repo = create_repo(repo_id, token=args.hub_token, private=args.hub_private_repo, exist_ok=True)
    upload_folder(repo_id=repo.repo_id, folder_path=folder, token=args.hub_token, commit_message="Critic")
    return repo.repo_id


def loading_code(critic, task: str = "TokenClassification") -> str:
    """How a critic is loaded from `path`, as Python; `task` is what transformers calls its kind of model."""
    base = critic.get_base_model() if hasattr(critic, "peft_config") else critic
    if isinstance(base, BackboneForTokenClassification):  # which transformers does not know of
        return "from trl_credit.critics.token import make_token_critic\n\ncritic = make_token_critic(path).eval()"
    if hasattr(critic, "peft_config"):
        loader, kwargs = f"AutoPeftModelFor{task}", ", num_labels=1" if task == "TokenClassification" else ""
        package = "peft"
    else:
        loader, kwargs, package = f"AutoModelFor{task}", "", "transformers"
    return f"from {package} import {loader}\n\ncritic = {loader}.from_pretrained(path{kwargs})"
