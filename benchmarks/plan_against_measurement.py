"""
The planner's memory against that of real steps on a CPU.

    python benchmarks/plan_against_measurement.py --output docs/results/plan

Each run is two optimizer steps of a trainer with random weights, in a process of its own. Completions are given, so
that nothing is generated but the answers of GenAC's critic. Measured is what tensors hold: every storage that an
operation of torch takes or makes is counted from then until it is freed. Peaks are those of the second step, when the
optimizers' states are there: in the forward and backward passes of the policy, and in the critic's update. Runs that
the JSON file holds already are not made again.
"""

import argparse
import json
import sys
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from measuring import make_tokenizer, run_in_process
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


METHODS = ("grpo-lambda", "vapo", "sppo", "genac")
ANSWER, SEGMENT = 16, 32


@dataclass(frozen=True)
class Size:
    """A model and a micro-batch of it. With adapters the critic of VAPO and SPPO shares the policy's base."""

    hidden: int
    layers: int
    vocab: int
    completion: int
    batch: int
    checkpointing: bool = False
    tied: bool = True
    lora: int = 0
    bf16: bool = False

    def __str__(self) -> str:
        how = ", checkpointing" * self.checkpointing + ", head not tied" * (not self.tied)
        how += f", adapters of rank {self.lora}" * bool(self.lora) + ", bfloat16" * self.bf16
        return f"{self.layers} × {self.hidden}, {self.vocab} words, {self.batch} × {self.completion} tokens{how}"


RUNS = {
    Size(128, 4, 4096, 256, 4): METHODS,
    Size(256, 5, 1024, 320, 2): ("grpo-lambda", "vapo", "genac"),
    Size(192, 12, 512, 256, 2, checkpointing=True): ("vapo",),
    Size(256, 4, 512, 128, 2, lora=8): ("vapo", "genac"),
    Size(256, 4, 512, 192, 2, bf16=True): ("vapo",),
    Size(384, 3, 512, 128, 2, tied=False): ("vapo",),
}
PROMPT = 32


class LiveTensors(TorchDispatchMode):
    """Bytes of all storages that operations have seen and that still are there, and the most of them since a reset."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, int] = {}
        self.held = self.peak = 0

    def reset(self) -> int:
        """The peak until now; a new one begins."""
        peak, self.peak = self.peak, self.held
        return peak

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage) -> None:
        key = storage._cdata
        if key in self.live:
            return
        self.live[key] = storage.nbytes()
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.held -= self.live.pop(key)


def model_config(size: Size, tokenizer):
    """Of a Qwen2."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        "qwen2",
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=4 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=max(size.hidden // 128, 1),
        tie_word_embeddings=size.tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def measure(method: str, size: Size) -> dict:
    """Peaks of a run in this process, in bytes."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    from trl_credit.methods import METHODS as TABLE

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config_class, trainer_class = TABLE[method].load()
    generations = 1 if method == "sppo" else 2
    settings = {"segment_min_length": SEGMENT // 2, "segment_target_length": SEGMENT, "segment_max_length": SEGMENT}
    settings |= {"critic_template": "{problem}{partial_solution}=", "hint_momentum": None}
    settings |= {"critic_max_completion_length": ANSWER, "critic_generation_batch_tokens": 2048}
    extra = settings if method == "genac" else {}
    if method != "grpo-lambda":
        extra["critic_pretraining_steps"] = 0
    adapters = {"r": size.lora, "target_modules": "all-linear"}
    if size.lora and method == "genac":
        extra["critic_peft_config"] = adapters
    elif size.lora and method != "grpo-lambda":
        extra["critic_share_base"] = True
    peaks = {"policy": [], "critic": []}
    live = LiveTensors()
    rows = []

    class Measured(trainer_class):
        def update_critic(self, *args):
            live.reset()
            result = super().update_critic(*args)
            peaks["critic"].append(live.reset())
            return result

        def _prepare_inputs(self, batch):  # a rollout and the critic's update are no part of the policy's
            inputs = super()._prepare_inputs(batch)
            live.reset()
            return inputs

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            peaks["policy"].append(live.reset())
            return loss

    def rollout(prompts, trainer):
        generator = torch.Generator().manual_seed(len(rows))
        rows.append(prompts)
        # One completion a micro-batch is shorter, so that attention has a mask. All are letters without delimiters, so
        # that GenAC's segments are as long as they may be.
        lengths = [size.completion - (i % size.batch == 0) for i in range(len(prompts))]
        return {
            "prompt_ids": [list(tokenizer(p)["input_ids"]) for p in prompts],
            "completion_ids": [torch.randint(64, 90, (n,), generator=generator).tolist() for n in lengths],
            "logprobs": [[0.0] * n for n in lengths],
        }

    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_config(model_config(size, tokenizer), dtype=torch.float32)
        model.save_pretrained(f"{folder}/model")
        tokenizer.save_pretrained(f"{folder}/model")
        del model
        arguments = config_class(
            f"{folder}/out",
            per_device_train_batch_size=size.batch,
            gradient_accumulation_steps=2,
            num_generations=generations,
            max_completion_length=size.completion,
            gradient_checkpointing=size.checkpointing,
            max_steps=2,
            use_cpu=True,
            bf16=size.bf16,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **extra,
        )
        trainer = Measured(
            model=f"{folder}/model",
            reward_funcs=lambda completion_ids, **_: [sum(ids) % 7 / 7 for ids in completion_ids],
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": [f"{i:0{PROMPT}}" for i in range(64)]}),
            processing_class=tokenizer,
            rollout_func=rollout,
            peft_config=LoraConfig(**adapters) if size.lora else None,
        )
        with live:
            trainer.train()
    return {name: max(found[len(found) // 2 :], default=0) for name, found in peaks.items()}


def planned(method: str, size: Size) -> dict:
    """The same by the planner."""
    from trl_credit.planner import Setup, critics, make_plan, shape_of
    from trl_credit.planner.memory import CRITIC, POLICY, STEP

    setup = Setup(
        method,
        shape_of(model_config(size, make_tokenizer())),
        prompt=PROMPT,
        completion=size.completion,
        batch=size.batch,
        accumulation=2,
        generations=1 if method == "sppo" else 2,
        compute="bfloat16" if size.bf16 else "float32",
        lora_rank=size.lora,
        shared_base=bool(size.lora) and method in ("vapo", "sppo"),
        checkpointing=size.checkpointing,
        answer=ANSWER,
        on_cpu=True,
    )
    with patch.multiple(critics, SEGMENT=SEGMENT, QUESTION=0, TAIL=1):  # of the short template
        plan = make_plan(setup)
    critic = max(plan.total(CRITIC), plan.total(STEP)) if setup.has_critic else 0.0
    return {"policy": plan.total(POLICY), "critic": critic}


def table(measured: dict) -> str:
    """Plan and measurement side by side."""
    lines = [
        "Measured by `python benchmarks/plan_against_measurement.py` on a CPU; MiB.",
        "",
        "| model and micro-batch | trainer | update of | measured | planned | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    off = []
    for size, methods in RUNS.items():
        for method in methods:
            found = measured[f"{method}, {size}"]
            for network, plan in planned(method, size).items():
                if not plan:
                    continue
                off.append(plan / found[network] - 1)
                lines.append(
                    f"| {size} | `{method}` | {network} | {found[network] / 2**20:.1f} | {plan / 2**20:.1f} | "
                    f"{off[-1]:+.1%} |"
                )
    far = sum(abs(x) > 0.1 for x in off)
    lines += [
        "",
        f"{len(off) - far} of {len(off)} plans are within 10 %; they are off by {min(off):+.1%} to {max(off):+.1%}.",
    ]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/plan"), help="without its ending")
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.method:
        print(json.dumps(measure(args.method, list(RUNS)[args.size])))
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    file = args.output.with_suffix(".json")
    measured = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for number, (size, methods) in enumerate(RUNS.items()):
        for method in methods:
            key = f"{method}, {size}"
            if key not in measured:
                measured[key] = run_in_process(__file__, "--method", method, "--size", str(number))
                file.write_text(json.dumps(measured, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                print(key, measured[key], file=sys.stderr, flush=True)
    text = table(measured)
    print(text)
    args.output.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
