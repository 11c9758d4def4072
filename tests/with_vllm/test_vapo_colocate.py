"""A critic beside a policy that vLLM generates for: a real engine on CPU, with the help of `cpu_build`."""

import copy
import json
from collections import Counter

import pytest
import torch


vllm = pytest.importorskip("vllm", reason="vLLM is not installed; tests/with_vllm/make_env.sh makes an environment")

import cpu_build  # noqa: E402
from peft import LoraConfig, PeftModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from sppo_runs import critic_dir  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification  # noqa: E402
from vllm_training import SAME, assert_example_trained, example_command, logp_gap, make_trainer, steps  # noqa: E402

from trl_credit import SPPOConfig, SPPOTrainer, VAPOConfig, VAPOTrainer  # noqa: E402


pytestmark = pytest.mark.vllm


def make_vapo(model_dir, output_dir, **settings):
    """Two updates of the critic alone, then two of both; a rollout for each."""
    settings = {
        "critic_pretraining_steps": 2,
        "critic_learning_rate": 1e-2,
        "max_steps": 2,
        "num_generations": 1,
        **settings,
    }
    return make_trainer(model_dir, output_dir, VAPOTrainer, VAPOConfig, **settings)


def make_sppo(model_dir, output_dir):
    """The same, with a critic of another family that reads the prompt in its own tokens."""
    settings = {"critic_pretraining_steps": 2, "critic_learning_rate": 1e-2, "max_steps": 2, "num_generations": 1}
    settings |= {"reward_range": [0, 2], "critic_model_name_or_path": str(critic_dir(output_dir / "llama"))}
    return make_trainer(model_dir, output_dir, SPPOTrainer, SPPOConfig, **settings)


def weights_received(engine, monkeypatch) -> Counter:
    """Counts the weights that vLLM is given from now on, by name."""
    model = engine.llm_engine.model_executor.driver_worker.model_runner.model
    names, load_weights = Counter(), model.load_weights

    def count_and_load(weights):
        weights = list(weights)
        names.update(name for name, _ in weights)
        return load_weights(weights)

    monkeypatch.setattr(model, "load_weights", count_and_load)
    return names


def sampler_gap(rollout) -> float:
    """Largest difference between the trainer's and vLLM's log-probabilities of what was generated."""
    difference = rollout["old_per_token_logps"] - rollout["sampling_per_token_logps"]
    return difference[rollout["completion_mask"].bool()].abs().max().item()


def snapshot(model) -> dict:
    return copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("make", [make_vapo, make_sppo], ids=["vapo", "sppo"])
def test_vllm_follows_the_policy_and_never_sees_the_critic(make, model_dir, tmp_path, float32, monkeypatch):
    trainer = make(model_dir, tmp_path)
    engine = trainer.vllm_generation.llm
    assert trainer.use_vllm and trainer.vllm_mode == "colocate"
    assert type(engine) is vllm.LLM
    assert engine.llm_engine.model_config.dtype == torch.float32
    received = weights_received(engine, monkeypatch)

    policy, critic = snapshot(trainer.model), snapshot(trainer.critic)
    trainer.train()
    assert trainer.engine.steps == 4 and len(steps(trainer)) == 2
    for network, start in ((trainer.model, policy), (trainer.critic, critic)):
        assert all(not torch.equal(p, start[name]) for name, p in network.state_dict().items())
    assert len(trainer.rollouts_seen) == 4
    for rollout in trainer.rollouts_seen[2:]:  # in pretraining the trainer's own are not computed
        assert sampler_gap(rollout) < SAME, "generated with this step's weights"
    assert all(rollout["values"].any() for rollout in trainer.rollouts_seen[1:])

    before = logp_gap(trainer)  # vLLM has the weights that the last rollout was generated with
    names = set(load_file(model_dir / "model.safetensors"))
    assert received == Counter(2 * list(names)), "for the first rollout, and after the policy moved"
    trainer.vllm_generation.sync_weights()
    after = logp_gap(trainer)
    print(f"log-probabilities: {before:.1e} apart before the sync, {after:.1e} after")
    assert before > 100 * SAME, "a sync that does nothing would not go unseen"
    assert after < SAME


def test_sampler_correction_weighs_the_policy_loss_and_not_the_lm_loss(model_dir, tmp_path):
    trainer = make_vapo(model_dir, tmp_path, vllm_importance_sampling_mode="token_truncate")
    assert trainer.vllm_generation.llm.llm_engine.model_config.dtype == torch.bfloat16, "so the samplers differ"
    trainer.train()
    for step in steps(trainer):
        assert 1e-3 < step["sampling/sampling_logp_difference/max"] < 0.5
        assert step["sampling/importance_sampling_ratio/min"] < 1 < step["sampling/importance_sampling_ratio/max"]

    rollout = dict(trainer.rollouts_seen[-1])
    trainer.begin_step([rollout], "train")

    def loss(ratio):
        return trainer._compute_loss(trainer.model, {**rollout, "importance_sampling_ratio": ratio}).item()

    ratio = rollout["importance_sampling_ratio"]
    none, half, full = (loss(torch.full_like(ratio, share)) for share in (0, 0.5, 1))
    assert abs(full - none) > 1e-3
    assert half == pytest.approx((none + full) / 2, rel=1e-5)
    assert loss(ratio) != pytest.approx(full, rel=1e-4)
    assert rollout["positive"].any() and none > 0, "what is left is the LM loss"
    trainer.args.positive_lm_coef = 0
    assert loss(torch.zeros_like(ratio)) == 0
    assert loss(torch.ones_like(ratio)) == pytest.approx(full - none, rel=1e-4)


def test_critic_on_the_base_of_the_policy_stays_out_of_vllm(model_dir, tmp_path, float32, monkeypatch):
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)  # so that it shows at once
    trainer = make_vapo(model_dir, tmp_path, peft_config=adapter, critic_share_base=True)
    engine = trainer.vllm_generation.llm
    assert type(engine) is vllm.LLM
    assert engine.llm_engine.model_config.dtype == torch.float32
    received = weights_received(engine, monkeypatch)
    start = snapshot(trainer.model)
    trainer.train()
    for name, p in trainer.model.state_dict().items():
        moved = (p - start[name]).abs().max().item()
        if "lora_" in name:
            assert moved > 1e-3, name
        else:
            assert moved < 1e-6, "merged for vLLM and unmerged again: rounding, and no more"
    policy_base, critic_base = (
        {p.data_ptr() for name, p in network.named_parameters() if "base_layer" in name}
        for network in (trainer.model, trainer.critic)
    )
    assert policy_base == critic_base, "one set of base weights"
    assert all(sampler_gap(rollout) < SAME for rollout in trainer.rollouts_seen if "old_per_token_logps" in rollout)

    before = logp_gap(trainer)
    trainer.vllm_generation.sync_weights()
    base = load_file(model_dir / "model.safetensors")
    assert received.keys() == base.keys()
    assert before > 100 * SAME, "a sync that does nothing would not go unseen"
    assert logp_gap(trainer) < SAME

    merged = copy.deepcopy(trainer.model).merge_and_unload()
    assert merged.state_dict().keys() == base.keys()
    trainer.save_model()
    assert not [
        name for name in load_file(tmp_path / "adapter_model.safetensors") if "critic" in name or "score" in name
    ]
    saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), tmp_path).merge_and_unload()
    for policy in (merged, saved):
        assert logp_gap(trainer, policy.eval()) < SAME


def test_example_trains_colocated(model_dir, dataset, tmp_path, run):
    problems = tmp_path / "problems"
    problems.mkdir()
    with (problems / "train.jsonl").open("w") as file:
        for problem in map(json.loads, dataset.read_text().splitlines()):
            row = {"prompt": [{"role": "user", "content": problem["question"]}], "solution": problem["answer"]}
            file.write(json.dumps(row) + "\n")
    flags = {"use_vllm": True, "vllm_gpu_memory_utilization": 0.1, "vllm_max_model_length": 256}
    # No completion earns a reward: what is learned from is that this is less than the critic expects.
    flags |= {"critic_pretraining_steps": 1, "critic_initial_value": 0.5, "critic_learning_rate": 1e-2}
    output_dir = tmp_path / "out"
    run(cpu_build.__file__, *example_command(model_dir, problems, output_dir, "colocate", "vapo.py", **flags))
    for entry in assert_example_trained(model_dir, output_dir):
        assert entry["critic/loss"] > 0
    critic = AutoModelForTokenClassification.from_pretrained(output_dir / "critic")
    assert critic.score.bias.item() < 0.5
