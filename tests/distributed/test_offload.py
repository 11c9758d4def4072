"""`critic_offload` under ZeRO: the optimizer's state is on the host and steps there, and the critic is the same."""

import pytest
import torch
from launch import BIN, CONFIGS, TESTS, accelerate, run
from tiny import tiny_model_dir


pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_deepspeed_steps_on_the_host_to_the_same_weights(engine, tmp_path):
    pytest.importorskip("deepspeed")
    output, model_dir = tmp_path / "found.pt", tiny_model_dir(tmp_path)
    script = TESTS / "distributed" / "offload_worker.py"
    run(accelerate(CONFIGS / f"{engine}.yaml", script, output, model_dir), engine=engine)
    found = torch.load(output, weights_only=True)
    assert found[True]["class"] == "DeepSpeedCPUAdam" and found[False]["class"] == "AdamW"
    for name, weight in found[False]["weights"].items():
        own = found[True]["weights"][name]
        assert (own - weight).abs().max() <= 1e-6, name
        first, second = (resumed[name] for resumed in found[True]["resumed"])
        assert torch.equal(first, second), "a resumed optimizer is the one that was saved"
        assert not torch.equal(first, own) or "k_proj.bias" in name


def test_it_is_refused_with_ddp(tmp_path):
    script = tmp_path / "refused.py"
    script.write_text(
        "from accelerate import Accelerator\n"
        "from torch import distributed\n"
        f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
        "from tiny import tiny_model\n"
        "from trl_credit.critics.engine.engine import CriticEngine, CriticOptimization\n"
        "try:\n"
        "    CriticEngine(tiny_model(), Accelerator(cpu=True), CriticOptimization(1e-3, offload=True))\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "distributed.destroy_process_group()\n"
    )
    command = [BIN / "torchrun", "--standalone", "--nproc-per-node", 2, script]
    assert "`critic_offload=True` works on one process and with DeepSpeed, got MULTI_CPU" in run(command)
