"""GenAC's page says what its config and its log say."""

import re
from pathlib import Path

from datasets import Dataset
from genac_runs import fit_critic, make_trainer
from test_docs import blocks, rows, section
from tiny import tiny_model_dir

from trl_credit import GenACConfig


PAGE = (Path(__file__).parents[1] / "docs/trainers/genac.md").read_text(encoding="utf-8")


def test_the_recipe_is_a_config_with_the_papers_settings(tmp_path):
    import yaml

    recipe = Path(__file__).parents[1] / "trl_credit/recipes/genac.yaml"
    settings = yaml.safe_load(recipe.read_text())
    config = GenACConfig(str(tmp_path), bf16=False, per_device_train_batch_size=8, **settings)
    assert (config.num_generations, config.critic_learning_rate, config.epsilon_high) == (8, 1e-6, None)
    assert (config.max_completion_length, config.critic_max_completion_length) == (8192, 1024)


def named(cell: str) -> set[str]:
    """Metrics of a cell of the table: `critic/value_right_at_0`, … `_25` stand for names that begin alike."""
    full, *others = re.findall(r"`([^`]+)`", cell) or [cell]  # `rows` takes the marks off a cell that is all code
    stem = re.sub(r"_\d+$", "", full)
    return {full} | {name if "/" in name else stem + name for name in others}


def test_every_logged_metric_is_explained_and_every_explained_one_is_logged(tmp_path):
    model_dir = tiny_model_dir(tmp_path / "model")
    critic = fit_critic(tmp_path / "critic")
    evaluation = Dataset.from_dict({"prompt": ["ab", "q"]})
    trainer = make_trainer(
        model_dir,
        tmp_path,
        critic=critic,
        max_steps=3,
        num_generations=2,
        eval_dataset=evaluation,
        critic_pretraining_steps=2,
        log_completions=True,
    )
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry if name.startswith("critic/")}
    explained = [named(metric) for metric, *_ in rows(section(PAGE, "## Logged metrics"))[1:]]
    wrong = {f"critic/value_wrong_at_{share}" for share in (25, 50, 75, 100)}  # "the same"
    assert logged == set().union(*explained) | wrong
    assert sum(map(len, explained)) == len(set().union(*explained))

    # The table of completions: each segment with what the critic said before it, as text.
    table = trainer._logs
    for completion, shown in zip(table["completion"], table["extra"]["segments"], strict=True):
        assert isinstance(shown, str) and shown.startswith("0–") and shown.endswith("⟩")
        parts = re.findall(
            r"(\d+)–(\d+): (?:value [01]\.\d\d|not read), advantage [+-]\d\.\d\d\n(.*?)\n⟨.*?⟩(?:\n\n|$)", shown, re.S
        )
        assert "".join(text for *_, text in parts).startswith(completion)


def test_code_of_the_page_is_python():
    (code,) = blocks(PAGE, "python")
    compile(code, "genac.md", "exec")
