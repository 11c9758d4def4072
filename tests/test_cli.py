import json
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import trl
from launch import BIN, run
from safetensors.torch import load_file
from tiny import tiny_model_dir

import trl_credit
from trl_credit import GRPOLambdaTrainer
from trl_credit.cli import _TRAINING, main
from trl_credit.cli.env import _installed
from trl_credit.methods import METHODS
from trl_credit.options import documented_options
from trl_credit.scripts.pretrain import pretrainer
from trl_credit.scripts.train import main as train
from trl_credit.scripts.train import make_parser
from trl_credit.seam.scripts import run_grpo_script, split_launch_arguments


# What a run on the CPU needs to say.
ON_CPU = ["--use_cpu", "--bf16", "false", "--output_dir", "out"]
# The reward of a user's own module; it also notes what wraps the model that is trained.
REWARDS = """
import gc
from pathlib import Path

def even_tokens(completion_ids, **kwargs):
    wrappers = {type(thing).__name__ for thing in gc.get_objects()} & {"DistributedDataParallel", "DeepSpeedEngine"}
    Path("wrappers.txt").write_text(" ".join(wrappers))
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]
"""
YAML = """
model_name_or_path: {model}
datasets:
  - path: json
    data_files: problems.jsonl
reward_funcs: [accuracy_reward, my_rewards.even_tokens]
trace_lambda: 0.5
trace_style: recent
min_advantage: null
output_dir: out
bf16: false
use_cpu: true
report_to: none
max_steps: 2
logging_steps: 1
save_steps: 2
per_device_train_batch_size: 4
num_generations: 4
max_completion_length: 8
learning_rate: 1.0e-3
"""


def error_of(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in argv])
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def folder(tmp_path):
    """A user's folder: a config, data, a reward function and a model."""
    rows = [{"prompt": [{"role": "user", "content": f"1+{i}=?"}], "solution": str(1 + i)} for i in range(4)]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "config.yaml").write_text(YAML.format(model=tiny_model_dir(tmp_path)))
    return tmp_path


# --- Help and environment


def test_help_imports_nothing_heavy():
    code = "import sys, trl_credit.cli as cli; cli.main([]); sys.exit(bool({'torch', 'trl'} & sys.modules.keys()))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(name in output for name in ("grpo-lambda", "quickstart", "env"))


@pytest.mark.parametrize("method", METHODS)
def test_help_shows_the_text_and_default_of_every_option_of_ours(method):
    config = METHODS[method].load()[0]
    ours = [field for field in fields(config) if field.name in config._declared]
    assert {"log_credit", *documented_options(config.__doc__)} <= {field.name for field in ours} | {"epsilon"}
    shown = "".join(make_parser(method).format_help().split())
    for field in ours:
        default = field.default_factory() if field.default is MISSING else field.default
        text = field.metadata["help"].replace("%%", "%")
        assert f"--{field.name}" in shown and "".join(f"{text} (default: {default})".split()) in shown, field.name


@pytest.mark.parametrize("name", [name for name in _TRAINING if name not in METHODS])
def test_the_commands_of_stages_have_a_parser(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: trl-credit {name} [--config FILE.yaml]")


@pytest.mark.parametrize("arguments", [[], ["ppo"]])
def test_the_script_says_which_methods_there_are(arguments):
    with pytest.raises(SystemExit, match="is none of the methods grpo-lambda, .*vapo, sppo, genac"):
        train(arguments)


def test_a_method_without_a_critic_has_none_to_pretrain():
    with pytest.raises(SystemExit, match="GRPOLambdaTrainer has no critic to pretrain"):
        pretrainer(GRPOLambdaTrainer)


def test_every_recipe_is_that_of_one_method():
    files = sorted(path.stem for path in (Path(trl_credit.__file__).parent / "recipes").iterdir())
    assert sorted(recipe for method in METHODS.values() for recipe in method.recipes) == files


def test_help_exits_well(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["grpo-lambda", "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(
        "usage: trl-credit grpo-lambda [--config FILE.yaml] [options of the trainer]"
    )


def test_every_option_of_trl_grpo_is_there():
    from trl.scripts.grpo import make_parser as make_trl_parser

    options = [set(parser._option_string_actions) for parser in (make_parser("grpo-lambda"), make_trl_parser())]
    assert options[0] > options[1]


def test_env_prints_versions(capsys):
    assert main(["env"]) == 0
    output = capsys.readouterr().out
    assert f"- TRL version: {trl.__version__}" in output
    assert re.search(r"- trl_credit version: \d+\.\d+", output)
    assert re.search(r"- rich version: \d+\.", output)
    assert _installed("no-such-package") == "not installed"


# --- Bad input


def test_no_such_command(capsys):
    assert "invalid choice: 'grpo'" in error_of(capsys, "grpo")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--trace_lamda", "0.5"], "unrecognized arguments: --trace_lamda"),
        (["--trace_lam", "0.5"], "unrecognized arguments: --trace_lam"),  # no guessing what was meant
        (["config.yaml"], "unrecognized arguments: config.yaml"),
        (["--trace_lambda", "half"], "argument --trace_lambda/--trace-lambda: invalid"),
        (["--trace_lambda", "2"], "`trace_lambda` must be a number in [0, 1], got 2.0"),
        (["--trace_style", "old"], "invalid choice: 'old' (choose from 'recent', 'both')"),
        (["--loss_type", "vespo"], "`loss_type='vespo'` has no ratio per token to trace"),
        (["--config"], "argument --config: expected one argument"),
        (["--config", "none.yaml"], "No such file or directory: 'none.yaml'"),
        (["--accelerate_config", "zero9"], "Accelerate config zero9 is neither a file nor a valid config"),
    ],
)
def test_bad_arguments(capsys, argv, message):
    assert message in error_of(capsys, "grpo-lambda", *ON_CPU, *argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trace_lamda: 0.5", "unrecognized arguments: --trace_lamda"),
        ("trace_lambda: 2", "`trace_lambda` must be a number in [0, 1], got 2"),
        ("trace_style: old", "`trace_style` must be one of ('recent', 'both'), got 'old'"),
        ("- trace_lambda", "must contain a YAML mapping"),
        ("a: [", "expected the node content"),
    ],
)
def test_bad_config_files(capsys, tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(SystemExit) as caught:
        main(["grpo-lambda", *ON_CPU, "--config", str(tmp_path / "config.yaml")])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


# --- From arguments to processes


@pytest.mark.parametrize("name", ["single_gpu", "multi_gpu", "zero1", "zero2", "zero3", "fsdp1", "fsdp2"])
def test_names_of_trls_accelerate_configs(name):
    launch_args, script_args = split_launch_arguments(
        make_parser("grpo-lambda"), [*ON_CPU, "--accelerate_config", name]
    )
    assert launch_args[0] == "--config_file"
    assert Path(launch_args[1]).name == f"{name}.yaml" and Path(launch_args[1]).is_file()
    assert script_args == ON_CPU


def test_arguments_of_accelerate_go_to_accelerate(tmp_path):
    accelerate_config, config = tmp_path / "mine.yaml", tmp_path / "config.yaml"
    accelerate_config.write_text("distributed_type: MULTI_CPU")
    config.write_text(f"accelerate_config: {accelerate_config}\nnum_machines: 1\ntrace_lambda: 0.5")
    ours = [*ON_CPU, "--config", str(config), "--trace_style", "both"]
    launch_args, script_args = split_launch_arguments(make_parser("grpo-lambda"), [*ours, "--num_processes", "2"])
    assert launch_args == ["--config_file", str(accelerate_config), "--num_machines", "1", "--num_processes", "2"]
    assert script_args == ours


def test_trls_script_gets_its_trainer_back():
    args = make_parser("grpo-lambda").parse_args_and_config(ON_CPU)
    with pytest.raises(ValueError, match="Either `datasets` or `dataset_name` must be provided"):
        run_grpo_script(GRPOLambdaTrainer, *args)
    assert trl.GRPOTrainer.__name__ == "GRPOTrainer"


def check_run(folder: Path) -> list[dict]:
    log = json.loads((folder / "out" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    before, after = (load_file(path / "model.safetensors") for path in (folder / "tiny-qwen2", folder / "out"))
    assert all(not after[name].equal(before[name]) for name in before)
    assert "GRPO-λ" in (folder / "out" / "README.md").read_text(encoding="utf-8")
    return [entry for entry in log if "loss" in entry]


@pytest.mark.slow
def test_it_trains_from_a_config_file_that_flags_override(folder):
    command = [BIN / "trl-credit", "grpo-lambda", "--config", "config.yaml", "--accelerate_config", "single_gpu"]
    run([*command, "--mixed_precision", "no", "--trace_lambda", "1.0"], cwd=folder)
    for step in check_run(folder):
        # λ = 1: each token weighs as much as there are tokens from it to the end.
        assert step["trace/weight_first"] == pytest.approx(step["completions/mean_length"])
        assert {"rewards/accuracy_reward/mean", "rewards/even_tokens/mean"} <= step.keys()
    assert "| `min_advantage` | `None` |" in (folder / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_script_trains_without_our_launcher(folder):
    flags = ["--config", "config.yaml", "--max_steps", 2]
    run([sys.executable, "-m", "trl_credit.scripts.train", "grpo-lambda", *flags], cwd=folder)
    assert len(check_run(folder)) == 2


@pytest.mark.slow
@pytest.mark.distributed
def test_it_trains_on_two_processes(folder):
    command = [BIN / "trl-credit", "grpo-lambda", "--config", "config.yaml", "--accelerate_config", "multi_gpu"]
    run([*command, "--num_processes", 2, "--mixed_precision", "no"], cwd=folder)
    assert len(check_run(folder)) == 2
    assert (folder / "wrappers.txt").read_text() == "DistributedDataParallel"
    assert (folder / "out" / "checkpoint-2" / "rng_state_1.pth").exists()


KILLS_ITSELF = """
import os, signal

def kill(completions, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--num_processes", 2, "--accelerate_config", "multi_gpu"]], ids=["one", "two"])
def test_a_run_that_is_killed_says_so(flags, folder):
    (folder / "killer.py").write_text(KILLS_ITSELF)
    command = [BIN / "trl-credit", "grpo-lambda", "--config", "config.yaml", "--reward_funcs", "killer.kill", *flags]
    output = run([*command, *(["--mixed_precision", "no"] if flags else [])], cwd=folder, status=1)
    last = output.splitlines()[-1]
    assert "was killed by SIGKILL, which leaves no error" in last and "`--resume_from_checkpoint true`" in last
    assert "see the first error above" not in output


@pytest.mark.slow
def test_a_run_that_fails_says_so(folder):
    command = [BIN / "trl-credit", "grpo-lambda", "--config", "config.yaml", "--reward_funcs", "accuracy"]
    output = run(command, cwd=folder, status=1)
    assert "Could not load reward function 'accuracy'. Expected one of ['accuracy_reward'" in output
    assert output.splitlines()[-1] == "trl-credit grpo-lambda: training failed, see the first error above."
