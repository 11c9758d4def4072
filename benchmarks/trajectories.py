"""
What short runs of the four trainers log, and what they train, to show that a change of the code changes nothing.

    python benchmarks/trajectories.py OUT.json [--only NAME ...]
    python benchmarks/trajectories.py --compare A.json B.json [--tolerance 1e-6]

Each run is made on one process and with DDP on two, unbroken and resumed from its middle, with real sampling. Numbers
are written so that they compare bit for bit, times left out. `--compare` ends with the status 1 if anything differs.
Only public names and files of `tests/` are used, so that it runs before and after modules have moved.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

RUNS = ("grpo_lambda", "vapo", "vapo_shared_base", "sppo", "genac")
ENGINES = ("one process", "ddp")
COMMON = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "num_generations": 2,
    "gradient_accumulation_steps": 2,
    "optim": "adamw_torch",
    "lr_scheduler_type": "linear",
    "model_init_kwargs": {"dtype": "float32"},
}
CRITIC = {
    "critic_pretraining_steps": 2,
    "critic_lr_scheduler_type": "linear",
    "critic_warmup_steps": 2,
    "critic_max_grad_norm": 0.5,
    "critic_weight_decay": 0.1,
}
TRACES = {"trace_lambda": 0.9, "trace_style": "both", "beta": 0.04, "num_iterations": 2, "num_generations": 4}


# --- In each process


def make_trainer(name: str, models: Path, folder: Path):
    import genac_runs
    import sppo_runs
    import vapo_runs
    from datasets import Dataset
    from peft import LoraConfig

    from trl_credit import GenACTrainer, GRPOLambdaConfig, GRPOLambdaTrainer, SPPOTrainer, VAPOTrainer

    policy = next(models.glob("tiny-*"))
    if name == "grpo_lambda":
        settings = {key: value for key, value in vapo_runs.SETTINGS.items() if not key.startswith("critic_")}
        return GRPOLambdaTrainer(
            model=str(policy),
            reward_funcs=vapo_runs.share_of_even,
            args=GRPOLambdaConfig(str(folder), **{**settings, **COMMON, **TRACES}),
            train_dataset=Dataset.from_dict({"prompt": vapo_runs.PROMPTS}),
        )
    settings = {**COMMON, **CRITIC, "rollout": None}
    if name == "sppo":
        critic = str(models / "sppo_critic")
        return sppo_runs.make_trainer(policy, folder, trainer=SPPOTrainer, critic=critic, **settings)
    if name == "genac":
        critic = str(models / "genac_critic")
        return genac_runs.make_trainer(policy, folder, trainer=GenACTrainer, critic=critic, **settings)
    if name == "vapo_shared_base":
        settings |= {"critic_share_base": True, "peft_config": LoraConfig(r=4, target_modules="all-linear")}
    settings |= {"length_adaptive_alpha": 1.5, "whiten_advantages": True}
    return vapo_runs.make_trainer(policy, folder, trainer=VAPOTrainer, **settings)


def weights_of(folder: Path) -> dict:
    """A digest of the weights that were saved, and their norm, which can be compared with a tolerance too."""
    from safetensors.torch import load_file

    digest, squares = hashlib.sha256(), 0.0
    for file in sorted(folder.glob("*model*.safetensors")):
        for name, weight in sorted(load_file(file).items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode() + weight.numpy().tobytes())
            squares += weight.double().square().sum().item()
    assert squares > 0, f"no weights in {folder}"
    return {"sha256": digest.hexdigest(), "norm": squares**0.5}


def record(name: str, engine: str, models: Path, folder: Path, checkpoint: Path | None) -> dict:
    from torch.nn.parallel import DistributedDataParallel

    trainer = make_trainer(name, models, folder)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    trainer.save_model()
    networks = {"policy": folder}
    wrapped = [trainer.model_wrapped]
    if name != "grpo_lambda":
        networks["critic"] = folder / "critic"
        wrapped.append(trainer.engine.module)
    assert all(isinstance(network, DistributedDataParallel) == (engine == "ddp") for network in wrapped)
    assert trainer.accelerator.num_processes == (2 if engine == "ddp" else 1)
    assert trainer.state.global_step == COMMON["max_steps"]
    trainer.accelerator.wait_for_everyone()
    logged = [
        {key: value for key, value in entry.items() if not any(word in key for word in ("time", "second"))}
        for entry in trainer.state.log_history
    ]
    return {"logged": logged, "weights": {network: weights_of(folder) for network, folder in networks.items()}}


def work(models: Path, out: Path, engine: str, names: list[str]) -> None:
    """Rank 0 leaves the runs in `out/runs.json`."""
    import transformers
    import trl
    from torch import __version__, distributed

    import trl_credit

    runs = {}
    for name in names:
        for mode, checkpoint in (("unbroken", None), ("resumed", out / name / "unbroken" / "checkpoint-2")):
            runs[f"{name}, {engine}, {mode}"] = record(name, engine, models, out / name / mode, checkpoint)
    versions = {"torch": __version__, "transformers": transformers.__version__, "trl": trl.__version__}
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        made = {"package": str(Path(trl_credit.__file__).parent), **versions}
        (out / "runs.json").write_text(json.dumps({"made_with": made, "runs": runs}))
    if distributed.is_initialized():
        distributed.destroy_process_group()


# --- Around them


def record_all(names: list[str]) -> dict:
    import torch
    from genac_runs import fit_critic
    from launch import BIN, run
    from sppo_runs import critic_dir
    from tiny import tiny_model_dir

    torch.set_num_threads(1)  # as the processes that it starts: a critic is fitted here
    found = {"runs": {}}
    with TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        tiny_model_dir(models)
        critic_dir(models / "sppo_critic")
        if "genac" in names:
            fit_critic(models / "genac_critic")
        for engine in ENGINES:
            launcher = (
                [BIN / "torchrun", "--standalone", "--nproc-per-node", 2] if engine == "ddp" else [sys.executable]
            )
            out = Path(folder) / engine
            run([*launcher, __file__, "--work", models, out, engine, *names], timeout=1800)
            done = json.loads((out / "runs.json").read_text())
            found["made_with"] = done["made_with"]
            found["runs"] |= done["runs"]
    return found


def leaves(value, path: str = "") -> dict:
    """Every number and text in nested lists and dictionaries, by where it is."""
    if not isinstance(value, (dict, list)):
        return {path: value}
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return {place: leaf for key, x in inner for place, leaf in leaves(x, f"{path}[{key}]").items()}


def compare(one: dict, other: dict, tolerance: float) -> bool:
    """Prints each run as equal or what differs in it; whether any does."""
    missing, any_differs = "nothing", False
    for name in sorted(one["runs"].keys() | other["runs"].keys()):
        a, b = (leaves(runs["runs"].get(name, {})) for runs in (one, other))
        first, largest = None, 0.0
        for place in {**a, **b}:
            x, y = a.get(place, missing), b.get(place, missing)
            if repr(x) == repr(y):  # NaN is equal to NaN here, and 0.0 not to -0.0
                continue
            if tolerance and place.endswith("[sha256]"):
                continue
            if isinstance(x, float) and isinstance(y, float):
                difference = abs(x - y) / max(abs(x), abs(y)) if x or y else 0.0
                largest = max(largest, difference)
                if difference <= tolerance and (tolerance or difference):
                    continue
            first = first or f"{place} is {x!r} and {y!r}"
        any_differs |= first is not None
        words = "equal" if first is None else f"DIFFERS, first: {first}"
        print(f"{name}: {words}" + (f"; largest relative difference {largest:.1e}" if first or largest else ""))
    return any_differs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=RUNS)
    parser.add_argument("--compare", type=Path, nargs=2)
    parser.add_argument("--tolerance", type=float, default=0.0)
    args = parser.parse_args()
    if args.compare:
        sys.exit(compare(*(json.loads(path.read_text()) for path in args.compare), args.tolerance))
    if not args.output:
        parser.error("where to? Give OUT.json, or --compare A.json B.json")
    found = record_all(args.only)
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(found['runs'])} runs of {found['made_with']['package']} in {args.output}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5:])
    else:
        main()
