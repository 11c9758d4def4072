"""Starts programs as a user would, on the engines that users have, on a machine without a GPU."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile


TESTS = Path(__file__).parent
# TRL's accelerate configs, found without importing TRL.
CONFIGS = Path(find_spec("trl").submodule_search_locations[0]) / "accelerate_configs"
BIN = Path(sys.executable).parent
_ENV = {"OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "CUDA_VISIBLE_DEVICES": ""}
# DeepSpeed and FSDP2 take the CPU for their accelerator; `cpu_fsdp` holds a shim for the latter. What DeepSpeed
# compiles belongs to one environment: those that share a folder compile it again in turn, and a lock that is left there
# stops them all.
_DEEPSPEED = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions")}
_ENGINE_ENV = {
    "zero2": _DEEPSPEED,
    "zero3": _DEEPSPEED,
    "fsdp2": {"ACCELERATE_TORCH_DEVICE": "cpu", "PYTHONPATH": str(TESTS / "distributed" / "cpu_fsdp")},
}


def free_port() -> int:
    """A port below those that the system hands out to connections, which would take it before we do."""
    while True:
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", random.SystemRandom().randrange(20000, 32000)))
            return listener.getsockname()[1]


def accelerate(config: Path, *args, processes: int = 2, port: int | None = None, precision: str = "no") -> list:
    """`accelerate launch` with a config made for GPUs, without any: fewer processes, float32, a port of our own."""
    overrides = ["--num_processes", processes, "--mixed_precision", precision]
    overrides += ["--main_process_port", port or free_port()]
    return [BIN / "accelerate", "launch", "--config_file", config, *overrides, *args]


# Threads of gloo may outlive what they use, and abort a process that has done its work when Python is taken down.
_ABORTED_AT_ITS_END = "terminate called without an active exception"


def run(*commands: list, engine: str = "ddp", cwd: Path | None = None, status: int = 0, timeout: float = 540) -> str:
    """
    Runs commands side by side with the environment that `engine` needs, and returns what they printed.

    All must end with the exit status `status`. If one does not, the others are ended: they may be waiting for it. What
    gloo aborts is run once more.
    """
    for _ in range(2):
        statuses, text = _run(commands, engine, cwd, status, timeout)
        if statuses == {status} or _ABORTED_AT_ITS_END not in text:
            break
    assert statuses == {status}, f"exit statuses {statuses} (None: ended by the test):\n{text[-8000:]}"
    return text


def _run(commands, engine: str, cwd: Path | None, status: int, timeout: float) -> tuple[set[int | None], str]:
    env = {**os.environ, **_ENV, **_ENGINE_ENV.get(engine, {})}
    paths = [env.get("PYTHONPATH"), os.environ.get("PYTHONPATH")]  # ours does not hide the user's
    env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in paths if path))
    with TemporaryFile("w+") as output:
        processes = [
            subprocess.Popen(map(str, command), cwd=cwd, env=env, stdout=output, stderr=output, start_new_session=True)
            for command in commands
        ]
        deadline = time.monotonic() + timeout
        while (statuses := {process.poll() for process in processes}) <= {None, status} and None in statuses:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(60)
        output.seek(0)
        text = output.read()
    return statuses, text
