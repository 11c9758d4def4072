"""The probe critic with what else a run has: adapters, checkpointing, streams, log, callback, report and Hub."""

import copy
import json
import math
import shlex
import sys
from pathlib import Path

import pytest
import torch
import vapo_runs
from datasets import Dataset
from hub_server import Hub
from peft import LoraConfig, get_peft_model
from safetensors.torch import load
from test_hub import TOKENS, run_client
from test_probe_methods import METHODS, PROBE, make
from tiny import tiny_model_dir
from transformers import AutoModelForCausalLM

from trl_credit import CriticProbeCallback
from trl_credit.cli import main
from trl_credit.credit_log import read_completions
from trl_credit.credit_log.reader import CREDIT_FOLDER
from trl_credit.critic_report import ProbeSettings, draw_probes, load_policy
from trl_credit.critics.loading import load_critic


def numbers(trainer) -> list[dict]:
    """What was logged, but for times."""
    return [
        {name: x for name, x in entry.items() if not any(part in name for part in ("time", "per_second", "probe"))}
        for entry in trainer.state.log_history
    ]


# --- Policies


def test_an_adapter_that_is_trained_further_is_read_as_it_was(model_dir, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    policy = get_peft_model(base, adapter)
    start = copy.deepcopy(policy).eval()
    trainer = make("vapo", policy, tmp_path / "out", learning_rate=0.3, probe_layers=[-1])
    trainer.train()
    rollout = trainer.rollouts_seen[-1][0]
    ids, mask = (
        torch.cat([rollout[f"prompt_{what}"], rollout[f"completion_{what}"]], dim=1) for what in ("ids", "mask")
    )
    length = rollout["completion_ids"].shape[1]
    with torch.no_grad():
        before, now = (
            network(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1][
                :, -length - 1 : -1
            ]
            for network in (start, trainer.model)
        )
    there = rollout["completion_mask"].bool()
    read = trainer.read_with_reference(rollout).states[-1]
    assert torch.allclose(read[there], before[there], atol=1e-4)
    assert (now[there] - before[there]).abs().mean() > 0.01

    trainer.save_model()
    assert json.loads((tmp_path / "out" / "critic" / "critic.json").read_text())["reads"] is None
    with pytest.raises(ValueError, match="as an adapter that was trained further: it can be asked in its run only"):
        load_critic(str(tmp_path / "out" / "critic"), trainer.processing_class)


def test_gradient_checkpointing_changes_nothing(model_dir, tmp_path):
    runs = []
    for checkpointing in (False, True):
        settings = {"gradient_checkpointing": checkpointing, "probe_layers": [0, 1, -1], "max_steps": 3}
        trainer = make("vapo", model_dir, tmp_path / str(checkpointing), **settings)
        trainer.train()
        runs.append(trainer)
    plain, checkpointed = (trainer.critic.state_dict() for trainer in runs)
    assert all(torch.allclose(plain[name].double(), x.double(), atol=1e-5) for name, x in checkpointed.items())
    assert runs[1].is_gradient_checkpointing if hasattr(runs[1], "is_gradient_checkpointing") else True


@pytest.mark.parametrize("method", ["vapo", "sppo"])
def test_a_stream_trains_as_a_table_does_and_an_evaluation_before_training_changes_nothing(method, model_dir, tmp_path):
    trainer_class, config = METHODS[method]
    data, runs = Dataset.from_dict({"prompt": vapo_runs.PROMPTS}), []
    for streamed in (False, True):
        settings = {**vapo_runs.SETTINGS, **PROBE, "shuffle_dataset": False, "per_device_eval_batch_size": 4}
        settings["critic_learning_rate"] = config("x", bf16=False).critic_learning_rate
        trainer = trainer_class(
            str(model_dir),
            lambda completion_ids, **kwargs: [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids],
            config(str(tmp_path / str(streamed)), **settings),
            data.to_iterable_dataset() if streamed else data,
            data.select(range(4)),
            rollout_func=vapo_runs.fixed_rollout,
        )
        if streamed:
            assert math.isfinite(trainer.evaluate()["eval_critic/value_mean"])
            assert not trainer.critic.begun and trainer.engine.steps == 0
            trainer.state.log_history.clear()
        trainer.train()
        runs.append(trainer)
    plain, streamed = (trainer.critic.state_dict() for trainer in runs)
    assert all(torch.equal(plain[name], x) for name, x in streamed.items())


# --- What reads it


@pytest.mark.parametrize("method", ["vapo", "sppo"])
def test_the_credit_log_has_its_values(method, model_dir, tmp_path):
    trainer = make(method, model_dir, tmp_path, log_credit=True, log_credit_steps=1, log_completions=True)
    trainer.train()
    found = [c for path in sorted((tmp_path / CREDIT_FOLDER).glob("*.parquet")) for c in read_completions(path)[0]]
    assert len(found) == 16
    for step, (rollout, rewards, credited) in enumerate(trainer.rollouts_seen):
        for row in range(8):
            logged = next(c for c in found if c.step == step and c.row == row)
            mask = rollout["completion_mask"][row].bool()
            trained = mask & (rollout["tool_mask"][row].bool() if "tool_mask" in rollout else True)
            for name, values in (("value", credited["values"]), ("advantage", credited["advantages"])):
                expected = values[row] if values.dim() == 2 else values[row].expand(len(mask))
                numbers = torch.tensor([math.nan if x is None else x for x in logged.columns[name]])
                assert torch.allclose(numbers[trained[mask]], expected[trained].float(), atol=1e-6), name
            assert logged.reward == pytest.approx(rewards[row].item())


@pytest.fixture(scope="module")
def probes(model_dir, tmp_path_factory):
    """States of completions with their Monte-Carlo values."""
    rows = [{"prompt": prompt} for prompt in vapo_runs.PROMPTS[:2]]
    settings = ProbeSettings(completions=1, continuations=2, candidates=0, max_completion_length=8)

    def reward(completion_ids, **kwargs):
        return [len(set(ids)) / 8 for ids in completion_ids]

    return draw_probes(tmp_path_factory.mktemp("probes"), load_policy(str(model_dir)), rows, reward, settings)


@pytest.mark.parametrize("method", ["vapo", "sppo"])
def test_the_callback_measures_it_and_changes_nothing(method, probes, model_dir, tmp_path):
    logs = []
    for measured in (True, False):
        trainer = make(method, model_dir, tmp_path / str(measured), max_steps=3)
        if measured:
            trainer.add_callback(CriticProbeCallback(trainer, probes, every_n_steps=1))
        trainer.train()
        logs.append(trainer.state.log_history if measured else None)
        logs.append([entry for entry in numbers(trainer) if "loss" in entry])
    history, with_it, _, without = logs
    errors = [entry["critic_probe/mse"] for entry in history if "critic_probe/mse" in entry]
    assert len(errors) == 4 and all(map(math.isfinite, errors)) and len(set(errors)) > 1
    assert with_it == without


@pytest.mark.slow
def test_the_report_reads_a_saved_one(model_dir, tmp_path, monkeypatch, capsys):
    trainer = make("vapo", model_dir, tmp_path / "run", rollout=None, probe_boundaries="tokens")
    trainer.train()
    trainer.save_model()
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in vapo_runs.PROMPTS))
    Path("evens.py").write_text(
        "def share(completion_ids, **kwargs):\n"
        "    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]\n"
    )
    options = f"""critic-report --policy {model_dir} --critics run/critic constant:0.5 --dataset_name rows.jsonl
        --reward_funcs evens.share --cuts 3 --max_completion_length 8 --continuations 4 --draws 20 --output_dir out"""
    assert main(shlex.split(options)) == 0
    report = json.loads(Path("out/report.json").read_text())
    assert "run/critic" in capsys.readouterr().out
    assert len(report) == 2 and "run/critic" in json.dumps(report)


def test_one_whose_policy_is_not_here_says_so(model_dir, tmp_path):
    trainer = make("vapo", model_dir, tmp_path)
    trainer.train()
    trainer.save_model()
    path = tmp_path / "critic" / "critic.json"
    facts = json.loads(path.read_text())
    facts["reads"]["model"] = "/elsewhere/policy"
    path.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="reads the states of the policy /elsewhere/policy, which cannot be loaded"):
        load_critic(str(tmp_path / "critic"), trainer.processing_class)


# --- The Hub


@pytest.mark.slow
def test_it_is_published_with_the_policy_and_by_itself_and_read_from_there(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"{i}+3=?"}], "solution": f"${i + 3}$"} for i in range(8)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = tiny_model_dir(tmp_path)
    with Hub(tmp_path / "hub", TOKENS) as hub:
        options = f"""--model {model} --dataset {tmp_path / "data"} --output_dir {tmp_path / "out"}
            --critic_model_name_or_path probe --beta 0.03 --critic_pretraining_steps 0 --max_steps 2 --save_steps 1
            --max_completion_length 8 --num_generations 1 --per_device_train_batch_size 4 --use_cpu --bf16 false
            --report_to none --push_to_hub --hub_model_id user/policy --critic_hub_model_id user/critic"""
        script = Path(__file__).parents[1] / "examples" / "vapo.py"
        result = run_client(hub, tmp_path / "cache", sys.executable, script, *shlex.split(options))
        assert result.returncode == 0, result.stderr[-3000:]
        head = (tmp_path / "out" / "critic" / "probe.safetensors").read_bytes()
        policy, critic = hub.files("models/user/policy"), hub.files("models/user/critic")
        assert policy["critic/probe.safetensors"] == critic["probe.safetensors"] == head
        assert load(head)["begun"] and b"A probe critic" in critic["README.md"]
        assert not [name for name in policy if "probe_state" in name]
        code = """
import torch
from transformers import AutoTokenizer
from trl_credit.critics.loading import load_critic
critic = load_critic("user/critic", AutoTokenizer.from_pretrained("user/critic"))
ids = torch.tensor([[10, 11, 12]])
rollout = {"prompt_ids": ids, "prompt_mask": ids > 0, "completion_ids": ids + 3, "completion_mask": ids > 0}
print(critic.kind, critic.state_values({name: x.long() for name, x in rollout.items()}).tolist())
"""
        result = run_client(hub, tmp_path / "other", sys.executable, "-c", code, token="hf_reads")
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stdout.splitlines()[-1].startswith("probe [[0.")
        assert hub.unknown == []
