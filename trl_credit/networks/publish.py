"""A critic's model card, and its way to the Hub."""

from importlib.metadata import version
from pathlib import Path


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
    args = trainer.args
    base = f"base_model: {policy}\n" if policy and not Path(policy).exists() else ""
    names = [name for name in sorted(vars(args)) if name.startswith("critic_")]
    names += [
        name for name in ("gamma", "truncation", "num_generations", "max_completion_length") if hasattr(args, name)
    ]
    table = "\n".join(f"| `{name}` | `{getattr(args, name)}` |" for name in names)
    task, extra = trainer.critic_task, ", num_labels=1" if trainer.critic_task == "TokenClassification" else ""
    if hasattr(trainer.critic, "peft_config"):
        loader = f"AutoPeftModelFor{task}"
        load = f"from peft import {loader}\n\ncritic = {loader}.from_pretrained(path{extra})"
    else:
        loader = f"AutoModelFor{task}"
        load = f"from transformers import {loader}\n\ncritic = {loader}.from_pretrained(path)"
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

{trainer.critic_card[0]}

```python
{load}
{trainer.critic_card[1]}
```

Trained with [trl_credit](https://pypi.org/project/trl-credit/) {version("trl-credit")} for {trainer.engine.steps}
updates, beside the policy.

| setting | value |
| --- | --- |
{table}
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
