"""Starts programs as a user would, on the engines that users have, on a machine without a GPU."""

import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


TESTS = Path(__file__).parent
# TRL's accelerate configs, found without importing TRL.
CONFIGS = Path(find_spec("trl").submodule_search_locations[0]) / "accelerate_configs"
BIN = Path(sys.executable).parent
_ENV = {"OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "CUDA_VISIBLE_DEVICES": ""}
# DeepSpeed and FSDP2 take the CPU for their accelerator; `cpu_fsdp` holds a shim for the latter.
_ENGINE_ENV = {
    "zero2": {"DS_ACCELERATOR": "cpu"},
    "zero3": {"DS_ACCELERATOR": "cpu"},
    "fsdp2": {"ACCELERATE_TORCH_DEVICE": "cpu", "PYTHONPATH": str(TESTS / "distributed" / "cpu_fsdp")},
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def accelerate(config: Path, *args, processes: int = 2, port: int | None = None) -> list:
    """`accelerate launch` with a config made for GPUs, without any: fewer processes, float32, a port of our own."""
    overrides = ["--num_processes", processes, "--mixed_precision", "no", "--main_process_port", port or free_port()]
    return [BIN / "accelerate", "launch", "--config_file", config, *overrides, *args]


def start(command: list, engine: str = "ddp", cwd: Path | None = None) -> subprocess.Popen:
    """Starts a command with the environment that `engine` needs, and collects what it prints; see [`finish`]."""
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **_ENV, **_ENGINE_ENV.get(engine, {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, timeout: float = 540) -> str:
    """Waits for the end, which must be a good one, and returns what was printed."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launchers pass it on to their processes
        output, _ = process.communicate(timeout=60)
        raise AssertionError(f"Still running after {timeout} s:\n{output[-5000:]}") from None
    assert process.returncode == 0, f"exit status {process.returncode}:\n{output[-5000:]}"
    return output
