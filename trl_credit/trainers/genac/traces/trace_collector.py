import json
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig

from ....critics.facts import CriticFacts, fingerprint
from ....critics.generative.critic import context_of
from ....critics.generative.question import problem_text, render
from ....journal import Journal, write_rows
from ..genac_trainer import GenACTrainer
from .asking import ask_all
from .dataset import write_dataset
from .oracle import FunctionOracle, State, make_oracle
from .traces_config import GenACTracesConfig


# What decides which solutions are sampled; a run that goes on must agree with what is on the disk.
_SAMPLING = (
    "seed",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_completion_length",
    "num_generations",
    "generation_batch_size",
    "shuffle_dataset",
)


class TraceCollector(GenACTrainer):
    """
    Stage 1 of GenAC: samples solutions from the policy, asks an oracle about the states between their segments, and
    writes its answers as a dataset for [`~trl.SFTTrainer`]. Nothing is trained.

    Arguments are those of [`GenACTrainer`], with `args` a [`GenACTracesConfig`], and one more. `output_dir` holds

    - `solutions.jsonl`, one line per rollout after a first line that says how they are sampled,
    - `states.jsonl`, the states and what the critic is asked about them,
    - `answers.jsonl`, one line per answer of the oracle, written as it arrives,
    - `dataset/train.jsonl`, the traces that are kept, and `summary.json`.

    To continue an interrupted run, start it again with the same command: it samples and asks only what is missing.

    Args:
        oracle (`Callable`, *optional*):
            A function from a [`~trl_credit.trainers.genac.traces.oracle.State`] to a trace, instead of `args.oracle`.

    Example:

    ```python
    from datasets import load_dataset
    from trl.rewards import accuracy_reward
    from trl_credit.trainers.genac.traces import GenACTracesConfig, TraceCollector

    collector = TraceCollector(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=accuracy_reward,
        args=GenACTracesConfig("traces", oracle="https://api.openai.com/v1", oracle_model="gpt-5", max_traces=2000),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train[:1000]"),
    )
    collector.train()
    ```
    """

    args: GenACTracesConfig
    config_class = GenACTracesConfig

    def __init__(self, *args, oracle: Callable[[State], str | None] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if oracle is not None and self.args.oracle is not None:
            raise ValueError(f"The oracle is given twice: `oracle` and `args.oracle={self.args.oracle!r}`. Drop one.")
        if self.args.is_file:
            raise ValueError(f"`oracle={self.args.oracle!r}`: a file of traces needs no policy, see `write_dataset`.")
        # Before anything is sampled: a name that does not exist should not wait for that.
        self.oracle: Any = FunctionOracle(oracle) if oracle is not None else None
        if self.args.oracle is not None:
            self.oracle = make_oracle(self.args.oracle, **self.args.endpoint)
        self.folder = Path(str(self.args.output_dir))
        self._solutions: list[dict] = []  # of the latest rollout of this process

    def make_critic(self, policy, critic, peft_config) -> nn.Module:
        """No critic yet, only how much it can read."""
        source, init_kwargs = self.critic_checkpoint(policy, critic)
        network = nn.Module()
        kwargs = {"trust_remote_code": (init_kwargs or {}).get("trust_remote_code", False)}
        network.config = (
            source.config if isinstance(source, nn.Module) else AutoConfig.from_pretrained(source, **kwargs)
        )
        return network

    @property
    def critic_context(self) -> float:
        return context_of(self.critic)

    def warn_of_answers(self) -> None:
        """It writes none."""

    # --- The run

    def train(self, *args, **kwargs):
        """Sample, ask and write. Only the main process asks; the others are done by then."""
        self._refuse_few_prompts()
        self.run_without_training()
        if self.accelerator.is_main_process:
            states = self.states()
            write_rows(self.folder / "states.jsonl", [vars(state) for state in states])
            if self.oracle is not None:
                self._show(self.ask_oracle(states))

    def _refuse_few_prompts(self) -> None:
        data: Any = self.train_dataset
        assert self.args.generation_batch_size is not None and self.args.num_generations is not None
        needed = self.args.generation_batch_size // self.args.num_generations
        if hasattr(data, "__len__") and len(data) < needed:
            raise ValueError(
                f"The data hold {len(data)} prompts, fewer than the {needed} of one rollout: lower "
                "`per_device_train_batch_size`, or take more."
            )

    def begin_training(self, checkpoint: str | None) -> None:
        self._sample()

    def save_model(self, *args, **kwargs):
        """Nothing was trained."""

    # --- Sampling

    def assign_credit(self, rollout: dict, rewards: torch.Tensor, mode: str) -> dict:
        self.keep_in_range(rollout, rewards, mode, "or to 'running'")
        chosen = self.trained_tokens(rollout)
        self._solutions = []
        for row, length in enumerate(rollout["completion_mask"].sum(1).tolist()):
            ids = rollout["completion_ids"][row, :length].tolist()
            reward = rewards[row].item()
            self._solutions.append(
                {
                    "prompt": self.rollout_rows[row]["prompt"],
                    "completion_ids": ids,
                    "chosen": chosen[row, :length].int().tolist(),
                    "completion": self.processing_class.decode(ids, skip_special_tokens=False),
                    "reward": reward if reward == reward else None,
                }
            )
        return rollout

    def _sample(self) -> None:
        """Rollouts that are not on the disk yet, each with random numbers of its own."""
        is_main = self.accelerator.is_main_process
        journal = Journal(self.folder / "solutions.jsonl") if is_main else None
        (done,) = broadcast_object_list([self._rollouts_on_disk(journal) if journal else None])
        steps = self._rollout_parts // self.args.gradient_accumulation_steps  # that a rollout is enough for
        rollouts = self.rollouts(skip=done)
        for index in tqdm(range(done, -(-self.state.max_steps // steps)), desc="Sampling", disable=not is_main):
            set_seed(self.args.seed + index * self.accelerator.num_processes, device_specific=True)
            next(rollouts)
            solutions = gather_object(self._solutions)
            if journal:
                journal.append(solutions)

    def _rollouts_on_disk(self, journal: Journal) -> int:
        settings = {name: getattr(self.args, name) for name in _SAMPLING}
        settings |= {"model": self.model.config.name_or_path, "num_processes": self.accelerator.num_processes}
        rows = journal.rows()
        if not rows:
            journal.append(settings)
            return 0
        differ = [name for name, value in settings.items() if rows[0].get(name) != value]
        if differ:
            raise ValueError(
                f"{journal.path} holds solutions that were sampled in another way: "
                + ", ".join(f"{name} {rows[0].get(name)!r}, now {settings[name]!r}" for name in differ)
                + ". Choose another `output_dir`, or the same settings."
            )
        return len(rows) - 1

    # --- States and answers

    def states(self) -> list[State]:
        """The states of all solutions on the disk, each once, with the mean reward of the solutions through it."""
        rollouts = Journal(self.folder / "solutions.jsonl").rows()[1:]
        solutions = [solution for rollout in rollouts for solution in rollout if solution["reward"] is not None]
        if not solutions:
            raise ValueError("No solution has a reward: there is nothing to ask the oracle about.")
        earned = [solution["reward"] for solution in solutions]
        rate = sum(earned) / len(earned)
        self.reward_range.grow_to(min(earned), max(earned))  # those that an earlier run has written
        found: dict[str, State] = {}
        rewards: dict[str, list[float]] = defaultdict(list)
        for solution in solutions:
            chosen = [bool(token) for token in solution["chosen"]]
            reading = self.question.about(solution["completion_ids"], solution["prompt"], rate, chosen)
            for k, prompt in enumerate(reading.query.prompts()):
                if len(prompt) + self.args.critic_max_completion_length > self.critic_context:
                    continue  # the critic will not be asked about this one either
                problem, partial = problem_text(solution["prompt"]), "".join(reading.texts[:k])
                query = render(
                    self.question.wording,
                    **self.question.slots,
                    actor=self.question.actor_description,
                    success_rate=f"{rate:.2f}",
                    problem=problem,
                    partial_solution=partial,
                )
                rewards[query].append(solution["reward"])
                found[query] = State(query, problem, partial, round(rate, 2))
        states = [replace(state, reward=sum(rewards[q]) / len(rewards[q])) for q, state in found.items()]
        if self.args.max_traces is not None and self.args.max_traces < len(states):
            states = random.Random(self.args.seed).sample(states, self.args.max_traces)
        return states

    def ask_oracle(self, states: list[State]) -> dict:
        """
        Ask the oracle about the states that have no answer on the disk, and write the data set.

        Returns:
            `dict`: The summary, see [`~trl_credit.trainers.genac.traces.dataset.write_dataset`].
        """
        journal = Journal(self.folder / "answers.jsonl")
        known = {row["query"] for row in journal.rows()}
        done = sum(state.query in known for state in states)
        with tqdm(total=len(states), initial=done, desc="Asking") as bar:
            refused = ask_all(
                self.oracle,
                states,
                journal,
                concurrency=self.args.oracle_concurrency or self.oracle.concurrency,
                retries=self.args.oracle_retries,
                on_answer=bar.update,
            )
        # On the scale of the scores.
        low, high = self.reward_range
        rewards = {state.query: (state.reward - low) / (high - low) for state in states}
        answers = [row for row in journal.rows() if row["query"] in rewards]
        summary = write_dataset(
            [{**row, "reward": rewards[row["query"]]} for row in answers],
            self.folder / "dataset",
            self.critic_processing_class,
            self.args.min_trace_length,
            self.args.critic_max_completion_length,
            self.args.max_disagreement,
        )
        self._trace_facts(states).save(self.folder / "dataset")
        summary["refused"] = len(refused)
        for name in ("prompt_tokens", "completion_tokens"):
            summary[name] = sum((row.get("usage") or {}).get(name) or 0 for row in answers)
        return summary

    def _trace_facts(self, states: list[State]) -> CriticFacts:
        """What the critic learns to be asked, for the stages after this one."""
        rate = states[0].success_rate if states else 0.0
        length = {"critic_max_completion_length": self.args.critic_max_completion_length}
        return CriticFacts(
            self.critic_kind,
            {**self.question.settings(), **length},
            hint={"success_rate": [rate, 1.0]} if states else None,
            tokenizer=fingerprint(self.critic_processing_class),
            own_tokenizer=self.critic_processing_class is not self.processing_class,
        )

    def _show(self, summary: dict) -> None:
        text = json.dumps(summary, indent=2)
        (self.folder / "summary.json").write_text(text + "\n", encoding="utf-8")
        print(f"{text}\nTraces in {self.folder / 'dataset'}")
