"""The table of all trainers on the page about migration says what their configs take."""

from pathlib import Path

import pytest

from trl_credit.methods import METHODS


PAGE = (Path(__file__).parents[1] / "docs" / "migration.md").read_text(encoding="utf-8")
LOSSES = ("grpo", "dr_grpo", "bnpo", "dapo", "cispo", "sapo", "luspo", "vespo")
NAMES = {"GRPOLambda": "GRPO-λ"}


def table() -> dict[str, dict[str, str]]:
    """By method what each row says."""
    lines = PAGE.split("## The other trainers")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("|")]
    head, body = rows[0], rows[2:]
    return {name: {row[0]: row[number] for row in body} for number, name in enumerate(head, start=1)}


def accepts(config, folder, **settings) -> bool:
    try:
        config(str(folder), use_cpu=True, bf16=False, **settings)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_the_page_on_migration_says_what_a_config_takes(method, tmp_path):
    config, _ = method.load()
    said = table()[NAMES.get(method.name, method.name)]
    one = {row.split("`")[1]: text for row, text in said.items() if "`" in row}
    assert config(str(tmp_path), use_cpu=True, bf16=False).num_generations == int(one["num_generations"])
    taken = [scale for scale in ("group", "batch", "none") if accepts(config, tmp_path, scale_rewards=scale)]
    assert taken == (["group", "batch", "none"] if one["scale_rewards"] == "any" else ["none"])
    takes_gspo = accepts(config, tmp_path, importance_sampling_level="sequence")
    assert one['importance_sampling_level="sequence"'] == ("works" if takes_gspo else "refused")
    refused = [loss for loss in LOSSES if not accepts(config, tmp_path, loss_type=loss)]
    assert one["loss_type"] == (", ".join(f"`{loss}`" for loss in refused) or "–")
    _, trainer = method.load()
    assert said["rewards per token"] == ("yes" if trainer.takes_token_rewards else "–")
