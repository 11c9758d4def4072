"""
What vLLM's CPU build needs before a trainer can send it weights. For tests only: on a GPU none of this applies.

    python tests/with_vllm/cpu_build.py examples/grpo_lambda_vllm.py --model ...

runs a script under it, exactly as `python examples/grpo_lambda_vllm.py --model ...` would.
"""

import os
import runpy
import sys

import torch


# The KV cache in GiB. And no thread is pinned to a core: several engines would be pinned to the same ones.
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


def keep_linear_weights(layer: torch.nn.Module, remove_weight: bool) -> None:
    """
    Multiply by the weights as they are, in place of vLLM's `dispatch_cpu_unquantized_gemm`, which packs them for
    oneDNN once, at start-up, and drops the originals: a trainer's weights would have nowhere to go.
    """
    layer.cpu_linear = torch.nn.functional.linear


if __name__ == "__main__":
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)

    import vllm.model_executor.layers.utils

    vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm = keep_linear_weights
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
