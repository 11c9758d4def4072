"""Commands of the command line, and names of earlier versions, lead where they say."""

from importlib import import_module

import pytest

from trl_credit.cli import main
from trl_credit.cli.launch import with_recipe


@pytest.mark.parametrize(
    ("command", "own", "others"),
    [
        ("pretrain-critic", "--length_adaptive_alpha", "--hint_momentum"),
        ("genac-pretrain", "--hint_momentum", "--length_adaptive_alpha"),
        ("sppo", "--reward_range", "--hint_momentum"),
    ],
)
def test_a_command_has_the_options_of_its_method(command, own, others, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and f"{own} " in text and f"{others} " not in text


def test_a_file_of_the_user_wins_over_a_recipe_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", "vapo", "--output_dir", "vapo"]
    found = with_recipe(arguments, ("vapo",))
    assert found[1].endswith("recipes/vapo.yaml") and found[2:] == arguments[2:]
    (tmp_path / "vapo").write_text("learning_rate: 1.0\n")
    assert with_recipe(arguments, ("vapo",)) == arguments


@pytest.mark.parametrize(
    ("name", "now", "what"),
    [
        ("viewer", "credit_log", "write_page"),
        ("oracle_traces", "trainers.genac.traces", "TraceCollector"),
        ("trl_seam", "seam", "CreditTrainer"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_package_of_0_2_0_gives_what_is_now_elsewhere(name, now, what):
    old, new = import_module(f"trl_credit.{name}"), import_module(f"trl_credit.{now}")
    assert getattr(old, what) is getattr(new, what)
