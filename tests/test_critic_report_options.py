"""What `trl-credit critic-report` is asked is what it samples and measures."""

import json

from sppo_runs import critic_dir
from test_critic_report_cli import REWARDS

from trl_credit.cli import main


def report(folder, model_dir, critics, **options) -> dict:
    """The probes' settings and the rows of the reports of a small run."""
    (folder / "chain_reward.py").write_text(REWARDS)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": letter}) + "\n" for letter in "abcd"))
    given = {"prompts": 2, "completions": 2, "continuations": 3, "candidates": 2, "max_completion_length": 5} | options
    pairs = [text for name, value in given.items() for text in (f"--{name}", *str(value).split())]
    paths = ["--policy", model_dir, "--dataset_name", str(folder / "prompts.jsonl"), "--output_dir", str(folder)]
    reward = ["--reward_funcs", "chain_reward.no_x"]
    assert main(["critic-report", *paths, *reward, *pairs, "--critics", *critics]) == 0
    reports = json.loads((folder / "report.json").read_text())
    return reports if isinstance(reports, list) else reports["critics"]


def test_every_option_of_the_sampling_reaches_the_probes(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    decoding = {"temperature": 0.9, "top_p": 0.8, "top_k": 50}
    report(tmp_path, model_dir, ["constant:0.5"], **decoding, seed=7, cuts="2")
    manifest = json.loads((tmp_path / "probes" / "probes.json").read_text())
    settings = manifest["settings"]
    assert settings.pop("decoding") == decoding
    assert {name: settings[name] for name in ("completions", "continuations", "candidates")} == {
        "completions": 2,
        "continuations": 3,
        "candidates": 2,
    }
    assert (settings["seed"], settings["cuts"], settings["max_completion_length"]) == (7, "2", 5)
    assert manifest["prompts"].startswith("2 rows")


def test_the_range_of_rewards_reaches_a_critic_of_prompts(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    critic_dir(tmp_path / "critic")
    found = {}
    for number, options in enumerate(({}, {"reward_range": "-1 3"}, {"critic_loss": "mse"})):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        (one,) = report(folder, model_dir, [f"prompt:{tmp_path / 'critic'}"], probes=tmp_path / "probes", **options)
        found[number] = one["rows"]["error/bias"]["estimate"]
    assert len({round(bias, 4) for bias in found.values()}) == 3
