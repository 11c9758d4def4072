import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import cpu_build
import pytest
import torch
from tiny import tiny_model_dir


REPOSITORY = Path(__file__).parents[2]
# What trainers leave in the environment for torch.distributed to read.
DISTRIBUTED = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


@pytest.fixture(scope="session", autouse=True)
def cpu_engine():
    """An engine that takes weights, see `cpu_build`, in this process."""
    logging.getLogger("torch.__trace").propagate = False  # pytest would print thousands of its lines for a failure
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cpu_build.ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setattr("vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm", cpu_build.keep_linear_weights)
        yield


@pytest.fixture
def float32(monkeypatch):
    """vLLM turns float32 models into bfloat16. Kept as they are, its numbers are those of the trained model."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "supported_dtypes", [torch.float32])


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    # vLLM's attention on CPU takes heads of 32 at least.
    return tiny_model_dir(tmp_path_factory.mktemp("model"), hidden=64)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Problems in the form of GSM8K."""
    problems = [{"question": f"{n} + 3 = ?", "answer": f"{n} and 3 is {n + 3}.\n#### {n + 3}"} for n in range(8)]
    path = tmp_path_factory.mktemp("dataset") / "problems.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return path


@pytest.fixture(scope="session")
def python():
    """Starts Python with a command line, in the repository; further keywords are environment variables."""

    def start(*arguments, stdout=subprocess.PIPE, **environment) -> subprocess.Popen:
        inherited = {name: value for name, value in os.environ.items() if name not in DISTRIBUTED}
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=REPOSITORY,
            env={**inherited, **environment},
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.fixture(scope="session")
def run(python):
    """Runs such a command line to its end, which must be a good one."""

    def run(*arguments, timeout: float = 300, **environment):
        with python(*arguments, **environment) as process:
            try:
                output, _ = process.communicate(timeout=timeout)
            finally:
                process.kill()
        assert process.returncode == 0, output[-8000:]

    return run
