"""Monte-Carlo continuations by vLLM: they are the policy's, and none is drawn twice."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM


vllm = pytest.importorskip("vllm", reason="vLLM is not installed; tests/with_vllm/make_env.sh makes an environment")

from trl_credit.cli import main  # noqa: E402
from trl_credit.critic_report import Decoding, ProbeSettings, VLLMPolicy, draw_probes  # noqa: E402
from trl_credit.critic_report.policies import checkpoint_identity  # noqa: E402


pytestmark = pytest.mark.vllm


def short(completion_ids, **kwargs):
    return [float(len(ids) < 12) for ids in completion_ids]


@pytest.fixture(scope="module")
def policy(model_dir):
    return VLLMPolicy(str(model_dir), dtype="float32", gpu_memory_utilization=0.1, max_model_len=256)


def test_continuations_follow_the_models_probabilities(policy, model_dir):
    assert type(policy.llm) is vllm.LLM and policy.identity == checkpoint_identity(str(model_dir))
    starts = [[70, 71, 72]] * 2000
    samples = policy.sample(starts, [4] * 2000, Decoding(), seed=0)
    assert policy.sample(starts[:20], [4] * 20, Decoding(), seed=0) == samples[:20], "the seed decides"
    assert all(len(ids) == 4 or ids[-1] in policy.eos_ids for ids in samples)
    assert not any(set(ids[:-1]) & policy.eos_ids for ids in samples)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor(starts[:1])).logits[0, -1].softmax(-1)
    found = torch.zeros_like(expected).index_add_(
        0, torch.tensor([ids[0] for ids in samples]), torch.full((2000,), 1 / 2000)
    )
    noise = (expected * (1 - expected) / 2000).sqrt()
    likely = expected > 0.005
    assert likely.sum() > 5
    assert ((found - expected)[likely].abs() < 4.5 * noise[likely]).all()


def test_a_second_time_nothing_is_sampled(policy, tmp_path, monkeypatch):
    settings = ProbeSettings(completions=2, continuations=4, max_completion_length=16)
    rows = [{"prompt": "abc"}, {"prompt": "d"}]
    first = draw_probes(tmp_path, policy, rows, short, settings)
    assert all(rollout.returns.shape == (len(rollout.cuts), 4) for rollout in first.rollouts)
    assert {rollout.reward for rollout in first.rollouts} <= {0.0, 1.0}
    monkeypatch.setattr(policy.llm, "generate", None)  # whoever calls it fails
    assert draw_probes(tmp_path, policy, rows, short, settings).sampled_tokens == first.sampled_tokens


def test_the_command_with_vllm(model_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "abc"}\n{"prompt": "d"}\n')
    (tmp_path / "vllm_reward.py").write_text(
        "def short(completion_ids, **kwargs): return [float(len(ids) < 12) for ids in completion_ids]\n"
    )
    monkeypatch.chdir(tmp_path)
    command = ["critic-report", "--policy", str(model_dir), "--critics", "constant", "leave_one_out", "--use_vllm"]
    command += ["--vllm_gpu_memory_utilization", "0.1", "--vllm_max_model_length", "256", "--dtype", "float32"]
    command += ["--dataset_name", "prompts.jsonl", "--reward_funcs", "vllm_reward.short"]
    assert main([*command, "--max_completion_length", "16", "--continuations", "4", "--draws", "20"]) == 0
    reports = json.loads((tmp_path / "critic_report/report.json").read_text())
    assert [report["critic"] for report in reports] == ["constant", "leave-one-out mean"]
    assert "mean squared error" in (tmp_path / "critic_report/report.html").read_text()
