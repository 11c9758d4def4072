"""
Lets accelerate use FSDP2 on the CPU, in processes that have this folder on their `PYTHONPATH`.

Without a GPU accelerate falls back to DDP without a word. FSDP2 itself runs on the CPU with gloo; all that is missing
is that accelerate takes gloo for the backend of a distributed accelerator.
"""

import os


if os.environ.get("ACCELERATE_USE_FSDP") == "true" and "LOCAL_RANK" in os.environ:
    from accelerate.state import DistributedType, PartialState

    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
