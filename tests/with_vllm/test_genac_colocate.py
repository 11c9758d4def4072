"""GenAC's critic in an engine of its own, beside the policy's: real engines on CPU, with the help of `cpu_build`."""

import pytest
import torch


vllm = pytest.importorskip("vllm", reason="vLLM is not installed; tests/with_vllm/make_env.sh makes an environment")

from genac_runs import GENAC, fit_critic  # noqa: E402
from vllm_training import PROMPTS, SAME, logp_gap, make_trainer, steps  # noqa: E402

from trl_credit import GenACConfig, GenACTrainer  # noqa: E402


pytestmark = pytest.mark.vllm

SETTINGS = {
    **GENAC,
    "max_steps": 2,
    "num_generations": 1,
    "max_completion_length": 8,
    "critic_learning_rate": 1e-2,
}
OWN_ENGINE = {
    "critic_vllm_mode": "colocate",
    "critic_vllm_gpu_memory_utilization": 0.1,
    "critic_vllm_max_model_length": 160,
}


@pytest.fixture(scope="module")
def critic_dir(tmp_path_factory):
    # vLLM's attention on CPU takes heads of 32 at least.
    return fit_critic(tmp_path_factory.mktemp("critic"), hidden=64)


@torch.no_grad()
def critic_gap(trainer, prompts) -> float:
    """Largest difference between vLLM's log-probabilities of what it writes now and those of the trained critic."""
    _, answers, logps, _ = trainer.writer.generation.generate(prompts, None, num_generations=1)
    gap = 0.0
    for prompt, answer, logp in zip(prompts, answers, logps, strict=True):
        ids = torch.tensor([prompt + list(answer)])
        expected = trainer.critic(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = expected.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
        gap = max(gap, (expected - torch.tensor(logp).squeeze(1)).abs().max().item())
    return gap


@pytest.mark.parametrize("use_vllm", [True, False], ids=["beside the policy's", "alone"])
def test_vllm_writes_the_critics_answers_with_its_latest_weights(use_vllm, model_dir, critic_dir, tmp_path, float32):
    settings = {**SETTINGS, **OWN_ENGINE, "use_vllm": use_vllm, "critic_model_name_or_path": critic_dir}
    if not use_vllm:
        settings |= {"vllm_gpu_memory_utilization": 0.3, "vllm_max_model_length": None}
    trainer = make_trainer(model_dir, tmp_path, GenACTrainer, GenACConfig, **settings)
    trainer.train()
    assert type(trainer.writer.generation.llm) is vllm.LLM and trainer.use_vllm == use_vllm
    if use_vllm:
        assert trainer.writer.generation.llm is not trainer.vllm_generation.llm
    log = steps(trainer)
    assert trainer.engine.steps == len(log) == 2
    for entry, rollout in zip(log, trainer.rollouts_seen, strict=True):
        assert entry["critic/parse_rate"] > 0.5 and entry["critic/loss"] != 0
        readings = rollout["readings"]
        ends = {answer[-1] for reading in readings for answer in reading.answers}
        assert trainer.processing_class.eos_token_id in ends
        # What the states of a completion share is read once.
        answers = sum(len(answer) for reading in readings for answer in reading.answers)
        each = sum(len(prompt) for reading in readings for prompt in reading.query.prompts())
        assert entry["critic/generation_tokens"] < each + answers
        assert any(len(reading.ends) > 1 for reading in readings)

    prompts = [prompt for reading in trainer.rollouts_seen[-1]["readings"] for prompt in reading.query.prompts()]
    before = critic_gap(trainer, prompts)  # vLLM has the weights that wrote the last answers
    trainer.writer.generation.sync_weights()
    after = critic_gap(trainer, prompts)
    print(f"log-probabilities: {before:.1e} apart before the sync, {after:.1e} after")
    assert before > 100 * SAME, "a sync that does nothing would not go unseen"
    assert after < SAME
    if use_vllm:
        trainer.vllm_generation.sync_weights()
        assert logp_gap(trainer) < SAME, "each engine has the weights of its own network"


def test_the_policys_engine_writes_for_the_critic_by_default_and_each_finds_its_own_weights(
    model_dir, critic_dir, tmp_path, float32
):
    settings = {**SETTINGS, "critic_model_name_or_path": critic_dir, "vllm_max_model_length": 160}
    trainer = make_trainer(model_dir, tmp_path, GenACTrainer, GenACConfig, **settings)
    assert trainer.writer.vllm == "policy" and trainer.critic_context == 160
    trainer.train()
    assert trainer.writer.generation.llm is trainer.vllm_generation.llm
    log = steps(trainer)
    assert trainer.engine.steps == len(log) == 2
    for entry in log:
        # Of its completions, against the policy. Before each rollout but the first it had the critic's weights.
        assert entry["sampling/sampling_logp_difference/max"] < SAME
        assert entry["critic/parse_rate"] > 0.5, "a policy would write no scores"

    prompts = [prompt for reading in trainer.rollouts_seen[-1]["readings"] for prompt in reading.query.prompts()]
    trainer.writer.generation.sync_weights()
    assert critic_gap(trainer, prompts) < SAME
    assert logp_gap(trainer) > 100 * SAME, "it has the critic's weights now"
    written, _ = trainer._generate_single_turn(trainer.processing_class(PROMPTS)["input_ids"], None, {}, 1)
    assert len(written) == len(PROMPTS) and logp_gap(trainer) < SAME


def test_an_engine_that_cannot_be_lent_is_not(model_dir, tmp_path_factory, tmp_path):
    narrow = fit_critic(tmp_path_factory.mktemp("critic"), hidden=32)
    settings = {**SETTINGS, "critic_model_name_or_path": narrow}
    trainer = make_trainer(model_dir, tmp_path, GenACTrainer, GenACConfig, **settings)
    assert trainer.writer.vllm == "colocate"
    with pytest.raises(ValueError, match="cannot be: its architecture is not the policy's"):
        make_trainer(model_dir, tmp_path, GenACTrainer, GenACConfig, **settings, critic_vllm_mode="policy")
