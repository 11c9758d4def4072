"""
What each process of the test runs: `python packed_worker.py OUTPUT`. Rank 0 leaves in `OUTPUT` the gradients of a
critic's update whose micro-batches two processes share unevenly, one of them without an answer in some.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import save_file
from test_packed import completions, refuse_unpackable, tiny_model
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from trl_credit.critics.generative.packed import answer_log_probs, plan_rows


def main(output: str) -> None:
    distributed.init_process_group("gloo")
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    model = tiny_model("qwen3")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    network = DistributedDataParallel(model.train())
    refuse_unpackable(network)
    queries, answers = completions()
    batches = plan_rows(queries[rank::processes], answers[rank::processes], 30)
    most = torch.tensor(len(batches))
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    empty = most - len(batches)
    distributed.all_reduce(empty)
    batches += [[]] * (int(most) - len(batches))
    for rows in batches:
        loss = -answer_log_probs(network, rows, temperature=0.7)[0].sum()
        (loss * processes).backward()  # DDP averages
    if rank == 0:
        gradients = {name: p.grad for name, p in model.named_parameters()}
        save_file({**gradients, "processes": torch.tensor(processes), "empty": empty}, output)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
