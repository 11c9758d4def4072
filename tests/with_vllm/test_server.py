"""vLLM as a server. On CPU it generates for real; weights reach it over NCCL only, so between two GPUs."""

import math
import socket
import tempfile
import time

import pytest
import torch


pytest.importorskip("vllm", reason="vLLM is not installed; tests/with_vllm/make_env.sh makes an environment")

import requests
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from vllm_training import (
    SAME,
    assert_example_trained,
    example_command,
    logp_gap,
    make_trainer,
    steps,
)


pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def server(python, model_dir):
    """Address of a server that is started as TRL says, in float32, on the last GPU where there is one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        process = python(
            *("-m", "vllm.entrypoints.cli.main", "serve", model_dir, "--host", "127.0.0.1", "--port", port),
            *("--weight-transfer-config", '{"backend": "nccl"}', "--logprobs-mode", "processed_logprobs"),
            *("--max-logprobs", -1, "--dtype", "float32", "--max-model-len", 256, "--gpu-memory-utilization", 0.1),
            "--enforce-eager",
            stdout=log,
            VLLM_SERVER_DEV_MODE="1",
            CUDA_VISIBLE_DEVICES=str(torch.cuda.device_count() - 1),
        )
        url = f"http://127.0.0.1:{port}"
        try:
            await_server(url, process, log)
            yield url
        finally:
            process.terminate()
            process.wait(30)


def await_server(url, process, log, timeout=180):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        try:
            requests.get(f"{url}/health", timeout=5).raise_for_status()
            return
        except requests.RequestException:
            time.sleep(0.5)
    log.seek(0)
    pytest.fail(f"No server after {timeout} s (exit code {process.poll()}):\n{log.read()[-8000:]}")


def test_server_takes_no_weights_from_a_cpu_and_says_why(server, model_dir, tmp_path):
    with pytest.raises(NotImplementedError, match="NCCL.*needs a CUDA device, got 'cpu"):
        make_trainer(model_dir, tmp_path, vllm_mode="server", vllm_server_base_url=server, use_cpu=True)


def test_server_generates_for_the_trainer(server, model_dir, tmp_path, monkeypatch):
    """One step without a weight sync: the server has loaded the very weights that the trainer starts from."""
    monkeypatch.setattr(VLLMClient, "init_communicator", lambda self, device: None)
    monkeypatch.setattr(VLLMGeneration, "sync_weights", lambda self: None)
    trainer = make_trainer(
        model_dir,
        tmp_path,
        vllm_mode="server",
        vllm_server_base_url=server,
        trace_lambda=0.9,
        max_steps=1,
        use_cpu=True,
    )
    assert trainer.vllm_generation.vllm_client.base_url == server
    assert not hasattr(trainer.vllm_generation, "llm"), "no engine in this process"
    assert logp_gap(trainer) < SAME

    start = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    (step,) = steps(trainer)
    assert step["sampling/sampling_logp_difference/max"] < SAME
    assert step["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=SAME)
    assert step["trace/weight_mean"] > 1
    assert math.isfinite(step["loss"]) and step["grad_norm"] > 0
    assert all(not torch.equal(p, q) for p, q in zip(trainer.model.parameters(), start, strict=True))
    assert logp_gap(trainer) > 100 * SAME, "the server still has the old weights"


@pytest.mark.skipif(
    torch.cuda.device_count() < 2,
    reason="needs two GPUs: weights reach a vLLM server over NCCL only, which wants a GPU for each side",
)
def test_example_trains_with_a_server_that_gets_the_weights(server, model_dir, dataset, tmp_path, run):
    command = example_command(model_dir, dataset, tmp_path, "server", vllm_server_base_url=server)
    run(*command, CUDA_VISIBLE_DEVICES="0")
    for entry in assert_example_trained(model_dir, tmp_path):
        assert entry["sampling/sampling_logp_difference/max"] < 1e-2, "generated with this step's weights"
