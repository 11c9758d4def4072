"""Continuations by the engine that generates the completions: a real vLLM on CPU, with the help of `cpu_build`."""

import pytest


vllm = pytest.importorskip("vllm", reason="vLLM is not installed; tests/with_vllm/make_env.sh makes an environment")

from vllm_training import make_trainer  # noqa: E402

from trl_credit import VinePPOConfig, VinePPOTrainer  # noqa: E402


pytestmark = pytest.mark.vllm


class Watched(VinePPOTrainer):
    """Keeps what was sampled from what, and what sampled it."""

    def sample(self, prefixes, room, *rest):
        continuations = super().sample(prefixes, room, *rest)
        self.__dict__.setdefault("sampled", []).append((prefixes, room, continuations))
        return continuations

    def assign_credit(self, rollout, rewards, mode):
        self.logps = (self.sampler_logps(rollout), rollout["sampling_per_token_logps"])
        return super().assign_credit(rollout, rewards, mode)


def test_vllm_continues_completions_within_their_room_and_reads_what_they_share_once(model_dir, tmp_path):
    trainer = make_trainer(
        model_dir,
        tmp_path,
        Watched,
        VinePPOConfig,
        max_steps=2,
        num_generations=2,
        vine_continuations=3,
        segment_min_length=2,
        segment_target_length=3,
        segment_max_length=4,
    )
    engine = trainer.vllm_generation
    limit = engine.max_completion_length
    trainer.train()
    assert engine.llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
    assert engine.max_completion_length == limit
    ends = set(trainer.eos_token_ids)
    assert len(trainer.sampled) == 2
    for prefixes, rooms, continuations in trainer.sampled:
        assert len(prefixes) == len(continuations) > 6
        assert len(set(rooms)) > 1
        for room, tokens in zip(rooms, continuations, strict=True):
            assert 1 <= len(tokens) <= room and not ends & set(tokens[:-1])
            assert len(tokens) == room or tokens[-1] in ends
        # Equal prefixes are sampled independently.
        assert any(len({str(c) for c in continuations[i : i + 3]}) > 1 for i in range(0, len(prefixes), 3))
    found, given = trainer.logps
    assert found is given
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["vine/continuation_tokens"] > 0 and entry["grad_norm"] == entry["grad_norm"] for entry in log)
