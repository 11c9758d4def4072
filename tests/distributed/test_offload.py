"""`critic_offload` is for one process."""

import pytest
from launch import BIN, TESTS, run


pytestmark = pytest.mark.distributed


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
    assert "`critic_offload=True` works on one process, got MULTI_CPU" in run(command)
