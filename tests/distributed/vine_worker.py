"""
What each process of the test runs: `python vine_worker.py MODEL_DIR OUTPUT_DIR SCENARIO...`. Each process leaves in
`OUTPUT_DIR/<scenario>` what it sampled and scored, and the first one its log and weights.
"""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from process import run_scenarios
from vine_runs import LENGTH, Watched, fixed_rollout, make_trainer


COMMON = {
    "use_cpu": False,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_steps": 2,
    "rollout": fixed_rollout,
}
SCENARIOS = {
    # One continuation is like another, so that it does not matter which process samples it.
    "greedy": {"top_k": 1},
    "own completions": {"rollout": None},
    "uneven": {"vine_batch_tokens": 60},
}


class Uneven(Watched):
    """The second process has nothing to sample in the first step, and to score only there; the first has a lot."""

    def assign_credit(self, rollout, rewards, mode):
        second = self.accelerator.process_index == 1
        prefixes = [] if second else [[65 + i] * (1 + i) for i in range(9)]
        before = torch.get_rng_state()
        self.extra = self.sample(prefixes, [2 + i for i in range(len(prefixes))], batch_tokens=30)
        rows, ids = (self.rollout_rows[:1] * 7, [[70 + i] for i in range(7)]) if second else ([], [])
        self.extra_scores = self.score(rows, ids).tolist()
        assert before.equal(torch.get_rng_state())
        return super().assign_credit(rollout, rewards, mode)


def train(model_dir: str, output_dir: str, scenario: str, **settings) -> None:
    trainer = make_trainer(
        model_dir,
        output_dir,
        trainer=Uneven if scenario == "uneven" else Watched,
        **{**COMMON, **SCENARIOS[scenario], **settings},
    )
    trainer.train()
    trainer.save_model()
    wrapped = trainer.model_wrapped
    seen = {
        "classes": [cls.__name__ for cls in type(wrapped).__mro__],
        "processes": trainer.accelerator.num_processes,
        "steps": [entry for entry in trainer.state.log_history if "loss" in entry],
        "states": [len(prefixes) for prefixes, _ in trainer.sampled],
        "continuations": [continuations for _, continuations in trainer.sampled],
        "longest": max(len(ids) for _, completions, _ in trainer.scored for ids in completions),
        "room": LENGTH,
        "extra": getattr(trainer, "extra", None),
        "extra_scores": getattr(trainer, "extra_scores", None),
    }
    (Path(output_dir) / f"process_{trainer.accelerator.process_index}.json").write_text(json.dumps(seen))
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    model_dir, output_dir, *scenarios = sys.argv[1:]
    run_scenarios(
        lambda scenario, **on_cpu: train(model_dir, f"{output_dir}/{scenario}", scenario, **on_cpu), scenarios
    )
