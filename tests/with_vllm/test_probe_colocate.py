"""The probe critic beside a policy that vLLM generates for: it reads the trainer's own pass, not the engine's."""

import pytest
import torch


vllm = pytest.importorskip("vllm", reason="vLLM is not installed; tests/with_vllm/make_env.sh makes an environment")

from transformers import AutoModelForCausalLM  # noqa: E402
from vllm_training import SAME, make_trainer, steps  # noqa: E402

from trl_credit import SPPOConfig, SPPOTrainer, VAPOConfig, VAPOTrainer  # noqa: E402
from trl_credit.critics.probe.critic import read_with  # noqa: E402


pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(("trainer_class", "config"), [(VAPOTrainer, VAPOConfig), (SPPOTrainer, SPPOConfig)])
def test_a_probe_critic_learns_from_what_vllm_has_generated(trainer_class, config, model_dir, tmp_path, float32):
    settings = {"critic_model_name_or_path": "probe", "beta": 0.03, "num_generations": 1, "reward_range": [0, 2]}
    trainer = make_trainer(model_dir, tmp_path, trainer_class, config, max_steps=3, probe_layers=[-1], **settings)
    assert trainer.use_vllm and type(trainer.vllm_generation.llm) is vllm.LLM
    start = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    trainer.train()
    assert trainer.critic_kind == "probe" and trainer.engine.steps == 3 * trainer.args.probe_updates
    log = steps(trainer)
    assert all(entry["critic/loss"] > 0 and 0 <= entry["critic/trust"] <= 1 for entry in log)
    rollout = trainer.rollouts_seen[-1]
    read = trainer.read_with_reference(rollout).states[-1]
    alone = read_with(start, (-1,), trainer.temperature, rollout).states[-1][:, : read.shape[1]]
    there = rollout["completion_mask"].bool()[:, : read.shape[1]]
    assert torch.allclose(read[there], alone[there], atol=SAME), "the start policy's, though the policy has moved"
    moved = [p for name, p in trainer.model.state_dict().items() if not torch.equal(p, start.state_dict()[name])]
    assert moved
