"""The examples run as a person would start them: on a tiny model, with the data swapped."""

import json
from pathlib import Path

import pytest
import torch
from launch import BIN, CONFIGS, accelerate, free_port, run
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification


pytestmark = pytest.mark.slow


EXAMPLES = Path(__file__).parent.parent / "examples"
PROBLEMS = [
    {"question": "Tom has 3 apples and buys 4. How many?", "answer": "3 + 4 = 7\n#### 7"},
    {"question": "A car is 1,000 and a bike 9. Both?", "answer": "1000 + 9 = 1009\n#### 1,009"},
    {"question": "What is 2 + 2?", "answer": "#### 4"},
    {"question": "What is 9 - 4?", "answer": "#### 5"},
]
ANSWERS = ("7", "1009", "4", "5")
# What makes a run of minutes on a GPU one of seconds on a CPU.
SMALL = {
    "max_steps": 2,
    "save_steps": 2,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 8,
    "max_completion_length": 16,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": "none",
    "bf16": "false",
    "output_dir": "out",
}


def flags(**settings) -> list:
    return [part for name, value in {**SMALL, **settings}.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Problems in GSM8K's format, and a tiny model that boxes an answer, the right one to a quarter."""
    path = tmp_path_factory.mktemp("examples")
    (path / "problems.jsonl").write_text("\n".join(map(json.dumps, PROBLEMS)))

    tokenizer, model = tiny_tokenizer(), tiny_model(hidden=32)
    texts = []
    for problem in PROBLEMS:
        system = {"role": "system", "content": "Put the final answer in \\boxed{}."}
        prompt = [system, {"role": "user", "content": problem["question"]}]
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        texts += [f"{text}\\boxed{{{answer}}}{tokenizer.eos_token}" for answer in ANSWERS]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].clone()
    labels[:, : -len("\\boxed{1009}") - 1] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    return path


def check_run(start_dir: Path, output_dir: Path) -> None:
    """Two steps of GRPO-λ were made, with rewards, and left a model that loads and is not the one they started from."""
    log = json.loads((output_dir / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in log if "loss" in entry]
    assert len(steps) == 2
    assert all(entry["trace/weight_first"] > 1 for entry in steps)
    assert any(entry["rewards/accuracy_reward/mean"] > 0 for entry in steps)
    AutoModelForCausalLM.from_pretrained(output_dir)
    if (output_dir / "adapter_model.safetensors").exists():
        weights = load_file(output_dir / "adapter_model.safetensors")
        assert all(value.any() for name, value in weights.items() if "lora_B" in name), "B starts at zero"
    else:
        weights, before = (load_file(path / "model.safetensors") for path in (output_dir, start_dir))
        assert all(not torch.equal(weights[name], before[name]) for name in before)


@pytest.mark.parametrize("lora", [[], ["--lora"]])
def test_gsm8k(folder, tmp_path, lora):
    settings = flags(model=folder / "model", dataset=folder / "problems.jsonl")
    run([BIN / "python", EXAMPLES / "gsm8k.py", *settings, "--use_cpu", *lora], cwd=tmp_path)
    check_run(folder / "model", tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists() == bool(lora)


def test_gsm8k_on_the_command_line(folder, tmp_path):
    script = [BIN / "python", EXAMPLES / "gsm8k_jsonl.py", "gsm8k.jsonl", folder / "problems.jsonl"]
    run(script, cwd=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "gsm8k.jsonl").read_text().splitlines()]
    assert [row["solution"] for row in rows] == list(ANSWERS)

    settings = flags(model_name_or_path=folder / "model")
    config = EXAMPLES / "configs" / "gsm8k.yaml"
    run([BIN / "trl-credit", "grpo-lambda", "--config", config, *settings, "--use_cpu"], cwd=tmp_path)
    check_run(folder / "model", tmp_path / "out")


# A file that only this engine writes into a checkpoint, with two processes.
TRACKS = {
    "multi_gpu": "rng_state_1.pth",
    "zero2": "global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "zero3": "global_step2/zero_pp_rank_1_mp_rank_00_model_states.pt",
    "fsdp2": "pytorch_model_fsdp.bin",
}


@pytest.mark.distributed
@pytest.mark.parametrize("config", TRACKS)
def test_gsm8k_with_accelerate_launch(folder, tmp_path, config):
    settings = flags(model=folder / "model", dataset=folder / "problems.jsonl")
    settings += ["--use_cpu"] if config == "multi_gpu" else ["--ddp_backend", "gloo"]
    command = accelerate(CONFIGS / f"{config}.yaml", EXAMPLES / "gsm8k.py", *settings)
    run(command, engine=config, cwd=tmp_path)
    assert (tmp_path / "out" / "checkpoint-2" / TRACKS[config]).exists()
    check_run(folder / "model", tmp_path / "out")


@pytest.fixture(scope="module")
def vapo_flags(folder):
    data = folder / "vapo"
    data.mkdir()
    rows = [
        {"prompt": [{"role": "user", "content": problem["question"]}], "solution": f"${answer}$"}
        for problem, answer in zip(PROBLEMS, ANSWERS, strict=True)
    ]
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"critic_pretraining_steps": 1, "critic_learning_rate": 1e-3, "num_generations": 4}
    return flags(model=folder / "model", dataset=data, **settings)


def check_vapo_run(folder: Path, out: Path) -> None:
    """The critic was updated once before the policy and at each of its two steps, and lies beside it."""
    log = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in log if "critic_pretraining/loss" in entry]) == 1
    assert len([entry for entry in log if "critic/loss" in entry]) == 2
    assert AutoModelForTokenClassification.from_pretrained(out / "critic", num_labels=1).config.num_labels == 1


def test_vapo_with_lora_for_policy_and_critic(folder, vapo_flags, tmp_path):
    lora = ["--lora", "--critic_peft_config", '{"r": 4, "target_modules": "all-linear"}', "--use_cpu"]
    run([BIN / "python", EXAMPLES / "vapo.py", *vapo_flags, *lora], cwd=tmp_path)
    check_vapo_run(folder, tmp_path / "out")
    for adapter in (tmp_path / "out", tmp_path / "out" / "critic"):
        weights = load_file(adapter / "adapter_model.safetensors")
        assert any(value.any() for name, value in weights.items() if "lora_B" in name), "B starts at zero"


def test_bpco_with_a_critic_that_is_told_the_answer(folder, vapo_flags, tmp_path):
    run([BIN / "python", EXAMPLES / "bpco.py", *vapo_flags, "--use_cpu"], cwd=tmp_path)
    check_vapo_run(folder, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "critic" / "critic.json").read_text())["settings"]
    assert settings["critic_prompt_template"] == "{prompt}\n\nReference answer: {solution}"
    assert settings["reward_range"] == [0.0, 1.0]


@pytest.mark.distributed
def test_vapo_with_zero3_for_both_networks(folder, vapo_flags, tmp_path):
    settings = [*vapo_flags, "--ddp_backend", "gloo"]
    run(accelerate(CONFIGS / "zero3.yaml", EXAMPLES / "vapo.py", *settings), engine="zero3", cwd=tmp_path)
    check_vapo_run(folder, tmp_path / "out")
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert (checkpoint / TRACKS["zero3"]).exists()
    assert list(checkpoint.glob("critic_engine/state/zero_pp_rank_1_mp_rank_00_model_states.pt"))


def test_genac_with_a_critic_that_is_asked_in_other_words(folder, vapo_flags, tmp_path):
    """The critic is the tiny model, which has not learned to give a score: what is shown is that the script runs."""
    asked = {"critic_template": "{success_rate} {problem} {partial_solution} =", "critic_max_completion_length": 4}
    lengths = {"segment_min_length": 2, "segment_target_length": 4, "segment_max_length": 8}
    settings = [part for name, value in (asked | lengths).items() for part in (f"--{name}", value)]
    run([BIN / "python", EXAMPLES / "genac.py", *vapo_flags, *settings, "--use_cpu"], cwd=tmp_path)
    out = tmp_path / "out"
    log = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in log if "critic/loss" in entry]
    assert len(steps) == 2 and all(entry["critic/segments"] > 1 for entry in steps)
    assert AutoModelForCausalLM.from_pretrained(out / "critic").config.model_type == "qwen2"


@pytest.mark.distributed
def test_gsm8k_on_two_nodes(folder, tmp_path):
    config, port = EXAMPLES / "accelerate" / "two_nodes.yaml", free_port()
    nodes = []
    for rank in (0, 1):
        settings = flags(model=folder / "model", dataset=folder / "problems.jsonl", output_dir=f"node{rank}")
        where = ["--main_process_ip", "127.0.0.1", "--machine_rank", rank]
        script = [*where, EXAMPLES / "gsm8k.py", *settings, "--use_cpu"]
        nodes.append(accelerate(config, *script, port=port))
    run(*nodes, cwd=tmp_path)
    check_run(folder / "model", tmp_path / "node0")
    # The second node took part in one run: it is process 1 of 2, and saves its own state only.
    assert [path.name for path in (tmp_path / "node1" / "checkpoint-2").iterdir()] == ["rng_state_1.pth"]
