"""vLLM in the process that trains: a real engine on CPU, with the help of `cpu_build`."""

import json
import math
from pathlib import Path

import pytest
import torch


vllm = pytest.importorskip("vllm", reason="vLLM is not installed; tests/with_vllm/make_env.sh makes an environment")

import cpu_build  # noqa: E402
import vllm.model_executor.layers.utils as layer_utils  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from vllm_training import SAME, assert_example_trained, example_command, logp_gap, make_trainer, steps  # noqa: E402


pytestmark = pytest.mark.vllm
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about the CPU build")
HERE = Path(__file__).parent
PACK_LINEAR_WEIGHTS = layer_utils.dispatch_cpu_unquantized_gemm  # before `cpu_engine` replaces it


def test_vllm_generates_with_the_weights_of_each_step(model_dir, tmp_path, float32):
    trainer = make_trainer(model_dir, tmp_path, trace_lambda=0.9)
    engine = trainer.vllm_generation.llm
    assert trainer.use_vllm and trainer.vllm_mode == "colocate"
    assert type(engine) is vllm.LLM
    assert engine.llm_engine.model_config.dtype == torch.float32

    start = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert all(not torch.equal(p, q) for p, q in zip(trainer.model.parameters(), start, strict=True))
    assert len(steps(trainer)) == len(trainer.rollouts_seen) == 4
    for step in steps(trainer):
        assert step["sampling/sampling_logp_difference/max"] < SAME, "generated with this step's weights"

    before = logp_gap(trainer)  # vLLM has the weights that the last rollout was generated with
    trainer.vllm_generation.sync_weights()
    after = logp_gap(trainer)
    print(f"log-probabilities: {before:.1e} apart before the sync, {after:.1e} after")
    assert before > 100 * SAME, "a sync that does nothing would not go unseen"
    assert after < SAME


def test_traced_loss_is_weighed_by_the_sampler_correction(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, trace_lambda=0.9, vllm_importance_sampling_mode="token_truncate")
    assert trainer.vllm_generation.llm.llm_engine.model_config.dtype == torch.bfloat16, "so the samplers differ"
    trainer.train()
    for step in steps(trainer):
        assert 1e-3 < step["sampling/sampling_logp_difference/max"] < 0.5
        assert step["sampling/importance_sampling_ratio/min"] < 1 < step["sampling/importance_sampling_ratio/max"]
        traced = {name: value for name, value in step.items() if name.startswith("trace/")}
        assert {"trace/weight_first", "trace/weight_mean", "trace/value_gap_bound_mean"} <= set(traced)
        assert all(math.isfinite(value) for value in [step["loss"], step["grad_norm"], *traced.values()])
        assert step["trace/weight_mean"] > 1

    rollout = trainer.rollouts_seen[-1]
    mask = rollout["completion_mask"].bool()
    difference = rollout["old_per_token_logps"] - rollout["sampling_per_token_logps"]
    ratio = rollout["importance_sampling_ratio"]
    torch.testing.assert_close(ratio[mask], difference.exp().clamp(max=3.0)[mask])

    def loss(ratio):
        return trainer._compute_loss(trainer.model, {**rollout, "importance_sampling_ratio": ratio})

    trainer.vllm_importance_sampling_correction = False
    uncorrected = loss(None).item()
    trainer.vllm_importance_sampling_correction = True
    assert abs(uncorrected) > 1e-3
    assert loss(torch.ones_like(ratio)).item() == pytest.approx(uncorrected, rel=1e-5)
    assert loss(torch.full_like(ratio, 0.5)).item() == pytest.approx(uncorrected / 2, rel=1e-5)
    assert loss(ratio).item() != pytest.approx(uncorrected, rel=1e-4)


def test_no_trace_and_no_clamp_is_grpo_bit_for_bit(model_dir, tmp_path):
    """vLLM samples from torch's generator, which the trainer seeds: the same run twice gives the same completions."""
    ours = make_trainer(model_dir, tmp_path, trace_lambda=0.0, min_advantage=None, beta=0.04)
    ours.train()
    theirs = make_trainer(model_dir, tmp_path, GRPOTrainer, GRPOConfig, beta=0.04)
    theirs.train()
    for a, b in zip(ours.rollouts_seen, theirs.rollouts_seen, strict=True):
        assert a.keys() == b.keys()
        for name in ("completion_ids", "sampling_per_token_logps", "importance_sampling_ratio", "advantages"):
            assert torch.equal(a[name], b[name]), name
    for a, b in zip(steps(ours), steps(theirs), strict=True):
        ignored = {"step_time", "rewards/unscored"}
        assert {k: v for k, v in a.items() if k not in ignored} == {k: v for k, v in b.items() if k not in ignored}
        assert a["grad_norm"] > 0
    for (name, p), q in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(p, q), name


@on_cpu
def test_cpu_build_alone_takes_no_weights(model_dir, tmp_path, monkeypatch):
    """Why `cpu_build` is there. Once this fails, it can go."""
    monkeypatch.setattr(layer_utils, "dispatch_cpu_unquantized_gemm", PACK_LINEAR_WEIGHTS)
    trainer = make_trainer(model_dir, tmp_path)
    with pytest.raises(AttributeError, match="'Parameter' object has no attribute 'weight_loader'"):
        trainer.vllm_generation.sync_weights()


@on_cpu
def test_two_processes_each_with_an_engine(model_dir, tmp_path, run):
    run(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2),
        *(cpu_build.__file__, HERE / "two_processes.py", model_dir, tmp_path),
    )
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for rank in (first, second):
        assert rank["world_size"] == 2
        assert rank["model"] == "DistributedDataParallel"
        assert rank["engine"] == "vllm.entrypoints.llm.LLM"
        assert rank["logp_gap_before"] > 100 * SAME
        assert rank["logp_gap_after"] < SAME
        assert rank["steps"] == 3
        assert all(math.isfinite(loss) for loss in rank["losses"])
    assert first["weights"] == second["weights"] != first["start"] == second["start"]
    assert first["completions"] != second["completions"], "each engine generates its own"


def test_example_trains_colocated(model_dir, dataset, tmp_path, run):
    flags = {"vllm_gpu_memory_utilization": 0.1, "vllm_max_model_length": 256}
    run(cpu_build.__file__, *example_command(model_dir, dataset, tmp_path, "colocate", **flags))
    assert_example_trained(model_dir, tmp_path)
