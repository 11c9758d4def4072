"""The examples with an agent, with a reward per step and with SLURM, and a script of TRL's with other names in it."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from unittest.mock import patch

import genac_runs
import pytest
import torch
from datasets import Dataset
from test_turn_rewards import turns_of
from tiny import tiny_model_dir, tiny_tokenizer

import trl_credit
from trl_credit.methods import METHODS


EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "critic_pretraining_steps": 0,
    "report_to": "none",
    "bf16": "false",
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def agent_dir(tmp_path_factory):
    """A model with a chat template that knows tools."""
    template = (files("trl") / "chat_templates" / "qwen2_5.jinja").read_text(encoding="utf-8")
    folder = tmp_path_factory.mktemp("agent")
    return str(tiny_model_dir(folder, chat_template=template, max_position_embeddings=8192))


def tool_call(name: str, **arguments) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call><|im_end|>"


def saying(*texts: str):
    """In the place of the policy's `generate`: it says these texts, one after the other, in all completions."""
    said, tokenizer = iter(texts), tiny_tokenizer()

    def generate(self, input_ids, **kwargs):
        own = tokenizer(next(said))["input_ids"]
        return torch.cat([input_ids, torch.tensor([own] * len(input_ids), device=input_ids.device)], 1)

    return generate


def run_example(name: str, folder: Path, generate=None, **settings) -> dict:
    """The names of an example's script after it has run as a person would start it."""
    given = {**SMALL, "output_dir": folder / "out", **settings}
    argv = [str(EXAMPLES / name), "--use_cpu", *(f"--{key}={value}" for key, value in given.items())]
    with patch.object(sys, "argv", argv), patch.object(sys, "path", [str(EXAMPLES), *sys.path]):
        if generate is None:
            return runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        with patch("transformers.GenerationMixin.generate", generate):
            return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


# --- An agent with an environment


def test_a_game_says_what_a_guess_was_and_what_could_have_been_known():
    game = runpy.run_path(str(EXAMPLES / "sao_agent.py"))["Game"]()
    game.reset(secret=70, prompt="not read")
    answers = [game.guess(number) for number in (50, 40, 75, 80, 70)]
    assert answers == [
        "It is higher.",
        "You could have known that.",
        "It is lower.",
        "You could have known that.",
        "That is it.",
    ]


@pytest.mark.slow
def test_the_agent_is_rewarded_turn_by_turn(agent_dir, tmp_path):
    secret = 50  # of the first game with this seed
    said = [tool_call("guess", number=10), tool_call("guess", number=5), tool_call("look"), "I give up.<|im_end|>"]
    kept = []

    class Watched(trl_credit.SAOTrainer):
        def assign_credit(self, rollout, rewards, mode):
            fallen = self.rewards_where_they_fall(rollout, rewards)
            kept.append((super().assign_credit(rollout, rewards, mode), rewards, fallen))
            return kept[-1][0]

    settings = {"model": agent_dir, "games": 4, "max_completion_length": 4096, "policy_lambda": 1.0}
    with patch.object(trl_credit, "SAOTrainer", Watched), patch("random.Random.randint", lambda *args: secret):
        names = run_example("sao_agent.py", tmp_path, saying(*said), **settings)
    assert type(names["trainer"]) is Watched and names["trainer"].args.time_step == "turn"
    ((rollout, rewards, fallen),) = kept
    worth = [-0.05, -0.25, -0.05, 0.0]  # higher; known already; no such tool; nothing asked
    assert rewards.tolist() == pytest.approx([sum(worth)] * 4)
    ends = turns_of(rollout["tool_mask"][0].tolist())
    assert len(ends) == 4
    assert fallen[0, ends].tolist() == pytest.approx(worth, abs=1e-6)
    assert fallen[0].sum().item() == pytest.approx(sum(worth))
    mean = sum(worth)  # where a fresh critic starts
    to_come = [sum(worth[k:]) - mean for k in range(4)]
    assert rollout["advantages"][0, ends].tolist() == pytest.approx(to_come, abs=1e-5)
    assert (tmp_path / "out" / "critic" / "model.safetensors").exists()


# --- A reward for each step of a solution


def test_lines_with_equations_are_rewarded_at_their_last_token():
    with patch.object(sys, "path", [str(EXAMPLES), *sys.path]):
        names = runpy.run_path(str(EXAMPLES / "process_reward.py"))
    tokenizer = tiny_tokenizer()
    lines = ["3 + 4 = 7, so far\n", "nothing here\n", "2 * 5 = 11\n", "8/2 = 4 and 1-1=1"]
    assert [names["worth_of_line"](line) for line in lines] == [0.1, None, -0.1, -0.1]
    ids = tokenizer("".join(lines))["input_ids"]
    (rewards,) = names["checked_lines"](tokenizer)(completion_ids=[ids])
    assert len(rewards) == len(ids)
    ends = [len(tokenizer("".join(lines[: k + 1]))["input_ids"]) - 1 for k in range(4)]
    assert {t: reward for t, reward in enumerate(rewards) if reward is not None} == {
        ends[0]: 0.1,
        ends[2]: -0.1,
        ends[3]: -0.1,
    }


@pytest.mark.slow
def test_the_example_of_process_rewards_trains(model_dir, tmp_path):
    problems = [{"question": "What is 2 + 2?", "answer": "#### 4"}] * 4
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, problems)))
    kept = []

    class Watched(trl_credit.VAPOTrainer):
        def assign_credit(self, rollout, rewards, mode):
            kept.append(self.rewards_where_they_fall(rollout, rewards))
            return super().assign_credit(rollout, rewards, mode)

    text = "2 + 2 = 5\n2 + 2 = 4\n\\boxed{4}<|im_end|>"
    settings = {"model": model_dir, "dataset": tmp_path / "problems.jsonl", "num_generations": 4}
    with patch.object(trl_credit, "VAPOTrainer", Watched):
        run_example("process_reward.py", tmp_path, saying(text), max_completion_length=64, **settings)
    tokenizer = tiny_tokenizer()
    first, second = (len(tokenizer(part)["input_ids"]) - 1 for part in ("2 + 2 = 5\n", "2 + 2 = 5\n2 + 2 = 4\n"))
    (fallen,) = kept
    last = len(tokenizer(text)["input_ids"]) - 1
    assert fallen[0].nonzero().flatten().tolist() == [first, second, last]
    assert fallen[0, [first, second, last]].tolist() == pytest.approx([-0.1, 0.1, 1.0])


# --- TRL's agent with other names in it: three functions, rewards from about -3 to 3


def query(sql: str) -> str:
    """
    Asks a database.

    Args:
        sql: The question.

    Returns:
        Its rows.
    """
    return "[('BRCA1',)]"


def correctness_reward(completions, answer, **kwargs):
    said = [completion[-1].get("content") or "" for completion in completions]
    return [0.6 if f"*{a}*" in text else -1.0 if "*" in text else -0.5 for text, a in zip(said, answer, strict=True)]


def structure_reward(completions, **kwargs):
    return [0.1 if any(m["role"] == "tool" for m in completion) else -0.15 for completion in completions]


def query_reward(completions, answer, **kwargs):
    return [2.0 if a == "yes" else -1.5 for a in answer]


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in METHODS.values() if m.name != "VinePPO"], ids=lambda m: m.command)
def test_a_script_of_trls_for_agents_trains_with_other_names_in_it(method, agent_dir, tmp_path):
    """VinePPO goes on from the middle of completions, where no tool would answer: it refuses tools by name."""
    config, trainer_class = method.load()
    known = {option.name for option in fields(config)}
    given = {name: value for name, value in SMALL.items() if name in known}
    given |= {"bf16": False, "use_cpu": True, "report_to": [], "max_completion_length": 2048}
    if method.name not in ("SAO", "BPCO", "SPPO"):
        given["num_generations"] = 2
    if method.name == "GenAC":
        given["critic_max_completion_length"] = 8
    args = config(str(tmp_path / "out"), **given)
    prompts = [[{"role": "user", "content": f"Does gene {n} exist?"}] for n in range(4)]
    settings = {}
    if method.name == "GenAC":
        settings["critic"] = genac_runs.fit_critic(tmp_path / "critic", context=8192)
    trainer = trainer_class(
        model=agent_dir,
        train_dataset=Dataset.from_dict({"prompt": prompts, "answer": ["yes", "no"] * 2}),
        tools=[query],
        reward_funcs=[correctness_reward, structure_reward, query_reward],
        args=args,
        **settings,
    )
    said = [tool_call("query", sql="SELECT * FROM genes"), "*yes*<|im_end|>"]
    with patch.object(trainer.model, "generate", saying(*said).__get__(trainer.model)):
        trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    rewards = {"yes": 0.6 + 0.1 + 2.0, "no": -1.0 + 0.1 - 1.5}
    assert log["rewards/query_reward/mean"] in (2.0, -1.5, 0.25)
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    if method.name in ("BPCO", "SPPO", "GenAC"):
        lowest, highest = log["critic/lowest_reward"], log["critic/highest_reward"]
        assert lowest == pytest.approx(min(rewards["no"], 0)) and highest == pytest.approx(rewards["yes"])


# --- SLURM


def test_the_job_of_slurm_starts_every_machine_with_arguments_that_accelerate_takes(tmp_path):
    """`srun` and `scontrol` are played; what they hand to `accelerate` is read by its own parser."""
    from accelerate.commands.launch import launch_command_parser

    job = EXAMPLES / "slurm" / "two_nodes.sbatch"
    subprocess.run(["bash", "-n", job], check=True)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    commands = {
        "scontrol": "echo node-a; echo node-b",
        "srun": 'shift; for n in 0 1; do SLURM_NODEID=$n "$@"; done',
        "accelerate": 'printf "%s\\n" "$@" > "$SLURM_NODEID.txt"',
    }
    for name, text in commands.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_ID": "4711", "SLURM_NNODES": "2"}
    env = {**os.environ, **slurm, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    script = ["examples/vapo.py", "--output_dir", "with a space", "--max_steps", "3"]
    subprocess.run(["bash", job, *script], check=True, cwd=tmp_path, env=env)
    for rank in (0, 1):
        command, *argv = (tmp_path / f"{rank}.txt").read_text().splitlines()
        args = launch_command_parser().parse_args(argv)
        assert command == "launch" and args.config_file == "examples/accelerate/two_nodes.yaml"
        assert (EXAMPLES.parent / args.config_file).is_file()
        assert (args.num_machines, args.num_processes, args.machine_rank) == (2, 16, rank)
        assert (args.main_process_ip, args.main_process_port) == ("node-a", 24711)
        assert [args.training_script, *args.training_script_args] == script
