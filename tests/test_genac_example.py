"""The three stages of GenAC by their commands, in the example's script: on a tiny model, with the data swapped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from chat_server import serving
from launch import BIN, run
from tiny import tiny_model_dir

from trl_credit.toy.tiny_model import TinyModelSettings, make_model, make_tokenizer


pytestmark = pytest.mark.slow


EXAMPLES = Path(__file__).parent.parent / "examples"
# What makes hours on a GPU a minute on a CPU. The template is short, the script and the stages are the example's.
SMALL = {
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "logging_steps": 1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "save_steps": 1,
}
CRITIC = {
    "critic_template": "{success_rate} {problem} {partial_solution} ?",
    "critic_max_completion_length": 24,
    "max_completion_length": 8,
    "segment_min_length": 1,
    "segment_target_length": 3,
    "segment_max_length": 5,
}
STAGES = {
    "traces": {**CRITIC, "oracle_request": {"max_tokens": 24}},
    "sft": {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": 150, "save_steps": 150},
    "pretrain": {
        **CRITIC,
        "critic_pretraining_steps": 3,
        "critic_learning_rate": 1e-3,
        "critic_validation_steps": 1,
        "test_split_size": 8,
        "per_device_eval_batch_size": 8,
    },
    "joint": {**CRITIC, "max_steps": 2, "critic_learning_rate": 1e-3, "num_generations": 4},
}


@pytest.fixture
def folder(tmp_path):
    """Where a user would start the script."""
    model = tiny_model_dir(tmp_path, hidden=32, initializer_range=0.1)
    rows = [
        {"prompt": [{"role": "user", "content": f"{i % 50}+{i % 50}"}], "solution": f"${2 * (i % 50)}$"}
        for i in range(160)
    ]
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "configs").mkdir()
    for stage, settings in STAGES.items():
        config = yaml.safe_load((EXAMPLES / "configs/genac" / f"{stage}.yaml").read_text())
        config |= {**SMALL, **settings, "model_name_or_path": str(model)}
        if stage == "traces":
            config["max_traces"] = 24
        (tmp_path / "configs" / f"{stage}.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


class Script:
    """The example's script, as a user starts it, and as the machine may end it."""

    def __init__(self, folder: Path, *arguments: str):
        env = {**os.environ, "CONFIGS": str(folder / "configs"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        env["PATH"] = f"{BIN}:{env['PATH']}"
        self.output = open(folder / "output.txt", "a")  # noqa: SIM115
        self.process = subprocess.Popen(
            ["bash", str(EXAMPLES / "genac.sh"), *arguments],
            cwd=folder,
            env=env,
            stdout=self.output,
            stderr=self.output,
            start_new_session=True,
        )

    def kill_when(self, path: Path) -> None:
        while not path.exists():
            assert self.process.poll() is None, Path(self.output.name).read_text()[-4000:]
            time.sleep(0.05)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def finish(self) -> None:
        assert self.process.wait(500) == 0, Path(self.output.name).read_text()[-4000:]


def log(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


@pytest.mark.distributed
def test_the_stages_follow_each_other_and_go_on_where_they_were_killed(folder):
    with serving(lambda query: f"<score>{len(query) % 10}</score>") as server:
        arguments = ["--oracle", server.url, "--oracle_model", "oracle"]
        Script(folder, *arguments).kill_when(folder / "genac-pretrain/checkpoint-0/trainer_state.json")
        assert len(server.asked) == 24 and set(server.asked.values()) == {1}
        traces = (folder / "genac-traces/answers.jsonl").read_bytes()
        sft = (folder / "genac-sft/model.safetensors").read_bytes()
        Script(folder, *arguments).finish()
        assert sum(server.asked.values()) == 24  # nothing was asked again
    # What was done is left alone.
    assert (folder / "genac-traces/answers.jsonl").read_bytes() == traces
    assert (folder / "genac-sft/model.safetensors").read_bytes() == sft
    assert (folder / "genac-pretrain/critic/model.safetensors").read_bytes() != sft

    losses = [entry["loss"] for entry in log(folder / "genac-sft/checkpoint-150") if "loss" in entry]
    assert len(losses) == 150 and losses[-1] < 0.5 * losses[0]
    steps = [entry for entry in log(folder / "genac/checkpoint-2") if "critic/mse" in entry]
    assert len(steps) == 2
    # It has learned the form of the answer from the traces, and kept it through the other stages.
    assert all(step["critic/parse_rate"] > 0.5 for step in steps), [step["critic/parse_rate"] for step in steps]
    assert "critic_template" in (folder / "genac/critic/README.md").read_text()


@pytest.mark.distributed
def test_two_processes_sample_and_one_asks(folder):
    (folder / "my_oracle.py").write_text(
        "def value(state):\n    open('asked.txt', 'a').write('x')\n    return f'{state.problem}: <score>5</score>'\n"
    )
    config = folder / "configs" / "traces.yaml"
    settings = yaml.safe_load(config.read_text()) | {"oracle": "my_oracle:value", "oracle_request": None}
    config.write_text(yaml.safe_dump(settings | {"per_device_train_batch_size": 2}))
    command = [BIN / "trl-credit", "genac-traces", "--config", config, "--num_processes", 2]
    run([*command, "--accelerate_config", "multi_gpu", "--mixed_precision", "no"], cwd=folder)
    header, *rollouts = map(json.loads, (folder / "genac-traces/solutions.jsonl").read_text().splitlines())
    assert header["num_processes"] == 2
    prompts = [solution["prompt"][0]["content"] for rollout in rollouts for solution in rollout]
    assert [len(rollout) for rollout in rollouts] == [4] * 4 and len(set(prompts)) == 16
    summary = json.loads((folder / "genac-traces/summary.json").read_text())
    assert summary["traces"] == summary["kept"] == 24 == len((folder / "asked.txt").read_text())


def test_the_stages_from_python_on_the_quickstarts_model(tmp_path):
    tiny = TinyModelSettings()
    actor = make_tokenizer()
    (tmp_path / "out").mkdir()
    make_model(actor, tiny).save_pretrained(tiny.folder(tmp_path / "out"))
    actor.save_pretrained(tiny.folder(tmp_path / "out"))
    numbers = {"trace_problems": 500, "sft_steps": 4, "pretraining_rollouts": 1, "steps": 1}
    flags = [part for name, value in numbers.items() for part in (f"--{name}", value)]
    output = run([sys.executable, EXAMPLES / "genac_chains.py", "--output_dir", "out", *flags], cwd=tmp_path)
    assert "Held-out problems solved, before: " in output
    for model in ("sft", "pretraining/critic", "joint", "joint/critic"):
        assert (tmp_path / "out" / model / "model.safetensors").exists()
