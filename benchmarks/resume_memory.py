"""
Host memory that each process takes while it loads a critic and its optimizer from a checkpoint.

    python benchmarks/resume_memory.py --output docs/results/resume_memory.md

Two processes on one machine, without a GPU, so that what a GPU would hold is in this memory, too: a copy of the weights
and of AdamW's two moments with DDP, half of it with FSDP2. Counted is memory that no other process can share
(`RssAnon` of Linux), at its peak while a checkpoint is loaded, over what there was before, in units of the
critic's weights. What is loaded is compared with what was saved, bit for bit.
"""

import argparse
import hashlib
import json
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

ENGINES = ("ddp", "fsdp2")


def unshared() -> int:
    """Bytes of this process's memory that no other process can share."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """The most memory between its start and its `stop`."""

    def __init__(self):
        super().__init__(daemon=True)
        self.bytes, self.stopped = unshared(), threading.Event()

    def run(self):
        while not self.stopped.is_set():
            self.bytes = max(self.bytes, unshared())
            time.sleep(0.002)

    def stop(self) -> int:
        self.stopped.set()
        self.join()
        return self.bytes


def work(folder: Path, engine_name: str, hidden: int) -> None:
    """Each process leaves `rank-….json` in the folder."""
    import ctypes
    import gc

    import torch
    from accelerate import Accelerator
    from measuring import make_model, make_tokenizer

    from trl_credit.critics.engine.engine import CriticEngine, CriticOptimization

    accelerator = Accelerator(cpu=engine_name == "ddp")
    torch.set_num_threads(1)

    def digest(engine) -> str:
        found = hashlib.sha256()
        for weights in (engine.backend.weights(), *engine.backend.optimizer_state().get("state", {}).values()):
            for name, weight in sorted(weights.items()):
                found.update(str(name).encode() + weight.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def loss(network, ids):
        return network(input_ids=ids).logits.square().mean()

    network = make_model(make_tokenizer(), hidden, 4, vocab=512)
    size = 4 * sum(p.numel() for p in network.parameters())
    engine = CriticEngine(network, accelerator, CriticOptimization(learning_rate=1e-3))
    engine.begin(2)
    engine.update([torch.arange(8).unsqueeze(0)], loss, lambda ids: torch.tensor(1))
    engine.save(folder / "critic")
    engine.save_state(folder)
    saved = digest(engine)
    engine.update([torch.arange(8, 16).unsqueeze(0)], loss, lambda ids: torch.tensor(1))
    moved = digest(engine)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free belongs to the system again
    accelerator.wait_for_everyone()
    before, peak = unshared(), Peak()
    peak.start()
    engine.load_state(folder, folder / "critic")
    highest = peak.stop()
    loaded = digest(engine)
    assert loaded == saved, "what was loaded is not what was saved"
    assert saved != moved or not accelerator.is_main_process, "there was nothing to load"
    found = {"weights": size, "more": highest - before}
    (folder / f"rank-{accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


def measure(engine: str, hidden: int) -> list[dict]:
    """What the two processes found."""
    from launch import BIN, CONFIGS, accelerate, run

    with TemporaryDirectory() as folder:
        script = [Path(__file__), "--work", folder, "--engine", engine, "--hidden", hidden]
        if engine == "ddp":
            command = [BIN / "torchrun", "--standalone", "--nproc-per-node", 2, *script]
        else:
            command = accelerate(CONFIGS / f"{engine}.yaml", *script)
        run(command, engine=engine)
        return [json.loads((Path(folder) / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work, args.engine, args.hidden)
    lines = ["| engine | weights, MiB | process 0 takes | process 1 takes |", "| --- | --- | --- | --- |"]
    for engine in ENGINES:
        found = measure(engine, args.hidden)
        shares = (f"{rank['more'] / rank['weights']:.2f} times the weights" for rank in found)
        lines.append(f"| {engine} | {found[0]['weights'] / 2**20:.0f} | {' | '.join(shares)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
