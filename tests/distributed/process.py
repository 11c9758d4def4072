"""What the processes of all distributed tests have in common."""

import os
import sys
from collections.abc import Callable, Iterable

from torch import distributed


def run_scenarios(train: Callable, scenarios: Iterable[str]) -> None:
    """`train(scenario, **settings)` for each, with the settings that the engine needs where there is no GPU."""
    # DDP wants `use_cpu`; DeepSpeed and FSDP2 take the CPU for an accelerator that talks through gloo.
    accelerated = {"ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"} & os.environ.keys()
    on_cpu = {"ddp_backend": "gloo"} if accelerated else {"use_cpu": True}
    for scenario in scenarios:
        train(scenario, **on_cpu)
    # Threads of gloo may outlive what they use, and abort the process when Python is taken down: it is not.
    if distributed.is_initialized():
        distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def engine(module, accelerator) -> dict:
    """What really wraps a network."""
    found = {"classes": [cls.__name__ for cls in type(module).__mro__], "processes": accelerator.num_processes}
    if hasattr(module, "zero_optimization_stage"):
        found["zero_stage"] = module.zero_optimization_stage()
    found["sharded"] = all(type(p).__name__ == "DTensor" for p in module.parameters())
    return found
