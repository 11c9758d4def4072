"""SPPO's page, its recipes and its command say what it does."""

import json
import re
import shlex
from pathlib import Path

import pytest
from launch import BIN, run
from safetensors.torch import load_file
from sppo_runs import CONVERSATIONS, critic_dir, make_trainer
from test_docs import blocks, rows, section
from transformers import AutoTokenizer

from trl_credit import SPPOTrainer
from trl_credit.cli.launch import with_recipe
from trl_credit.methods import METHODS
from trl_credit.scripts.train import make_parser


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/trainers/sppo.md").read_text(encoding="utf-8")
BASE = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", "--bf16", "false", "--use_cpu"]


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    return critic_dir(tmp_path_factory.mktemp("critic"))


# --- Options


def test_a_range_comes_from_a_flag_and_from_a_file(tmp_path):
    def parse(*argv):
        return make_parser("sppo").parse_args_and_config([*BASE, *argv])[1].reward_range

    assert parse() == "running" == parse("--reward_range", "running")
    assert parse("--reward_range", "-1", "1", "--critic_loss", "bce") == [-1, 1]
    for text in ("reward_range: [-0.5, 2]", "reward_range:\n- -0.5\n- 2"):
        (tmp_path / "config.yaml").write_text(text)
        assert parse("--config", str(tmp_path / "config.yaml")) == [-0.5, 2]


# --- Recipes


IN_RECIPES = ["num_generations", "learning_rate", "weight_decay", "max_grad_norm", "epsilon", "temperature"]
IN_RECIPES += ["lr_scheduler_type", "critic_lr_scheduler_type", "critic_learning_rate", "critic_weight_decay"]


@pytest.mark.parametrize("name", ["sppo_1p5b", "sppo_7b_small_critic"])
def test_every_recipe_is_read_by_the_parser_and_has_the_settings_of_the_page(name):
    batch = ["--per_device_train_batch_size", "16"]
    _, args, _, _ = make_parser("sppo").parse_args_and_config(
        [*with_recipe(["--config", name], METHODS["sppo"].recipes), *BASE, *batch]
    )
    header, *table = rows(section(PAGE, "## Recipes"))
    for option in IN_RECIPES:
        (row,) = [row for row in table if option in re.findall(r"\w+", row[3])]
        stated, value = row[header.index(name)].split(",")[0], getattr(args, option)
        assert (value == float(stated)) if isinstance(value, (int, float)) else (value == stated), option
    assert args.max_completion_length == 8192 and args.beta == 0
    assert (args.critic_loss, args.reward_range, args.critic_pretraining_steps) == ("bce", [0, 1], 0)
    assert (args.critic_model_name_or_path is not None) == (name == "sppo_7b_small_critic")


# --- Metrics


def test_every_logged_metric_is_explained_and_every_explained_one_is_logged(model_dir, critic, tmp_path):
    logged = set()
    for settings in ({"critic_pretraining_steps": 1, "max_steps": 3}, {"critic_loss": "mse"}):
        trainer = make_trainer(model_dir, tmp_path, critic=critic, **settings)
        trainer.train()
        logged |= {name for entry in trainer.state.log_history for name in entry if name.startswith("critic")}
    explained = set()
    for cell, *_ in rows(section(PAGE, "## Logged metrics"))[1:]:
        explained |= set(re.findall(r"critic/[\w/]+", cell if "`" in cell else f"`{cell}`"))
    decile = re.compile(r"decile_\d")
    logged = {decile.sub("decile_0", name) for name in logged}
    pretraining = {name for name in logged if name.startswith("critic_pretraining/")}
    of_pretraining = {"step"} | {name.removeprefix("critic/") for name in explained} - {"head_learning_rate"}
    assert {f"critic_pretraining/{name}" for name in of_pretraining} <= pretraining, "and TRL's, of the same rollouts"
    assert logged - pretraining == explained


# --- Runs


def test_the_script_of_the_page_trains(model_dir, critic, tmp_path, monkeypatch):
    from datasets import Dataset

    problems = {"prompt": CONVERSATIONS, "solution": [f"${n}$" for n in range(len(CONVERSATIONS))]}
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: Dataset.from_dict(problems))
    monkeypatch.chdir(tmp_path)
    (code, *_) = blocks(PAGE, "python")
    short = "max_steps=1, max_completion_length=8, bf16=False, report_to=[], per_device_train_batch_size=4"
    for old, new in (
        ('"Qwen/Qwen2.5-7B-Instruct"', repr(str(model_dir))),
        ('"Qwen/Qwen2.5-1.5B-Instruct"', repr(str(critic))),
        ('"Qwen2.5-7B-SPPO"', f'"out", {short}'),
    ):
        assert old in code
        code = code.replace(old, new)
    names = {}
    exec(code, names)
    assert isinstance(names["trainer"], SPPOTrainer) and names["trainer"].engine.steps == 1


def test_the_command_of_the_page_parses():
    (command,) = blocks(PAGE, "bash")
    argv = shlex.split(command.replace("\\\n", ""))
    assert argv[:2] == ["trl-credit", "sppo"]
    _, args, model, _, rest = make_parser("sppo").parse_args_and_config(
        [*with_recipe(argv[2:], METHODS["sppo"].recipes), "--bf16", "false"], return_remaining_strings=True
    )
    assert rest == [] and model.model_name_or_path == "Qwen/Qwen2.5-1.5B-Instruct"
    # 256 prompts on one device, two updates.
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 128
    assert args.per_device_train_batch_size * args.steps_per_generation == 256


@pytest.mark.slow
def test_the_command_trains_with_a_critic_of_another_family(model_dir, critic, tmp_path):
    problems = [{"prompt": prompt, "solution": "7"} for prompt in CONVERSATIONS]
    (tmp_path / "problems.jsonl").write_text("\n".join(json.dumps(problem) for problem in problems))
    (tmp_path / "my_rewards.py").write_text(
        "def sign(completion_ids, **k): return [1.0 if len(c) > 5 else -1.0 for c in completion_ids]"
    )
    (tmp_path / "data.yaml").write_text("datasets:\n  - path: json\n    data_files: problems.jsonl\n")
    flags = shlex.split("""--config data.yaml --reward_funcs my_rewards.sign --reward_range -1 1 --use_cpu --bf16 false
        --report_to none --max_completion_length 8 --per_device_train_batch_size 4 --max_steps 2 --save_steps 2
        --logging_steps 1 --learning_rate 1e-3 --critic_learning_rate 1e-2 --output_dir out --num_processes 1""")
    models = ["--model_name_or_path", model_dir, "--critic_model_name_or_path", critic]
    run([BIN / "python", BIN / "trl-credit", "sppo", *flags, *models], cwd=tmp_path)
    out = tmp_path / "out"
    log = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in log if "loss" in entry]
    assert len(steps) == 2 and all(0 < entry["critic/brier"] < 1 and entry["critic/loss"] > 0 for entry in steps)
    for folder, start in ((out, model_dir), (out / "critic", critic)):
        before, after = (load_file(f"{path}/model.safetensors") for path in (start, folder))
        assert before.keys() == after.keys() and any(not after[name].equal(before[name]) for name in before)
    assert len(AutoTokenizer.from_pretrained(out / "critic")) == len(AutoTokenizer.from_pretrained(critic))
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "SPPO" in card and "| `reward_range` | `[-1.0, 1.0]` |" in card
