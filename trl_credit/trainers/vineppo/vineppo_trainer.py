import math
import time
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ...credit.segment_gae import segment_of_token
from ...credit.vine import monte_carlo_values, vine_advantages
from ...seam import CreditTrainer
from ...segmenting import DelimiterSegmenter, Segmenter, check_ends
from ..value_report import fit_report, value_means
from .vineppo_config import VinePPOConfig


class VinePPOTrainer(CreditTrainer):
    """
    Trainer for VinePPO: PPO without a critic. The value of a state is the mean reward of continuations sampled from it.

    The method was introduced in [VinePPO: Refining Credit Assignment in RL Training of
    LLMs](https://huggingface.co/papers/2410.01679). Arguments are those of [`~trl.GRPOTrainer`], with `args` a
    [`VinePPOConfig`], and one more.

    Args:
        segmenter ([`~trl_credit.segmenting.Segmenter`], *optional*):
            Divides completions into segments. Default: a [`~trl_credit.segmenting.DelimiterSegmenter`] with the
            lengths in `args`.

    Example:

    ```python
    from datasets import load_dataset
    from trl.rewards import accuracy_reward
    from trl_credit import VinePPOConfig, VinePPOTrainer

    trainer = VinePPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=accuracy_reward,
        args=VinePPOConfig("Qwen2.5-0.5B-VinePPO", use_vllm=True),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "trl-credit", "vineppo"]
    _name = "VinePPO"
    _paper = {
        "title": "VinePPO: Refining Credit Assignment in RL Training of LLMs",
        "id": "2410.01679",
        # docstyle-ignore
        "citation": """\
@inproceedings{kazemnejad2025vineppo,
    title        = {{VinePPO: Refining Credit Assignment in RL Training of LLMs}},
    author       = {Amirhossein Kazemnejad and Milad Aghajohari and Eva Portelance and Alessandro Sordoni and others},
    booktitle    = {International Conference on Machine Learning},
    year         = 2025,
    eprint       = {arXiv:2410.01679},
}""",
    }
    args: VinePPOConfig
    config_class = VinePPOConfig
    scores_continuations = True

    def __init__(self, *args, segmenter: Segmenter | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.segmenter = segmenter or DelimiterSegmenter.of(self.args)

    def assign_credit(self, rollout: dict, rewards: torch.Tensor, mode: str) -> dict:
        mask = self.trained_tokens(rollout) & rewards.isfinite().unsqueeze(1)
        # A state is what the policy has read and written, and the row of the dataset by which that is judged. Equal
        # ones, as the prompts of a group are, have one value.
        states: dict[tuple, int] = {}
        rows: list[dict] = []  # of the states
        ends: list[list[int]] = []
        places: list[torch.Tensor] = []  # of each completion's states among all
        for row, data in enumerate(self.rollout_rows):
            prompt, written = (
                tuple(rollout[f"{part}_ids"][row][rollout[f"{part}_mask"][row].bool()].tolist())
                for part in ("prompt", "completion")
            )
            ends.append(self.cut(written) if mask[row].any() else [])
            judge = repr(data)
            keys = [(judge, prompt, written[:start]) for start in [0, *ends[row]][:-1]]
            place = [states.setdefault(key, len(states)) for key in keys]
            rows += [data] * (len(states) - len(rows))
            places.append(torch.tensor([*place, -1], device=mask.device))
        index = pad_sequence(places, batch_first=True, padding_value=-1)  # (B, K)

        rewards_of_states, tokens, seconds = self.continue_from(list(states), rows)
        values, errors = monte_carlo_values(rewards_of_states)
        values = torch.cat([values, values.new_full((1,), torch.nan)])[index]
        segments = segment_of_token(ends, mask)
        advantages = vine_advantages(values, rewards, segments)

        counts = [len(states), (index >= 0).sum(), tokens, rollout["completion_mask"].sum()]
        self._report(mode, values, errors, rewards, counts, seconds)
        self.add_column("values", [[round(v, 3) for v in row if math.isfinite(v)] for row in values.tolist()])
        self.add_credit("value", values.gather(1, segments.clamp(min=0)))
        self.add_credit("segments", segment_rows(ends, values, advantages))
        return {**rollout, "advantages": advantages}

    def cut(self, written: tuple[int, ...]) -> list[int]:
        """The segment ends of a completion."""
        ends = list(self.segmenter(written, self.processing_class))
        check_ends(ends, len(written))
        return ends

    def continue_from(self, states: list[tuple], rows: list[dict]) -> tuple[torch.Tensor, int, float]:
        """Rewards of K continuations of each of S states, shape `(S, K)`; their number of tokens; the seconds taken."""
        number = self.args.vine_continuations
        states = [state for state in states for _ in range(number)]
        rows = [row for row in rows for _ in range(number)]
        longest: Any = self.args.max_completion_length
        started = time.perf_counter()
        continuations = self.sample(
            [[*prompt, *written] for _, prompt, written in states],
            [longest - len(written) for *_, written in states],
            self.args.vine_batch_tokens,
        )
        seconds = time.perf_counter() - started
        completions = [[*written, *tokens] for (*_, written), tokens in zip(states, continuations, strict=True)]
        return self.score(rows, completions).view(-1, number), sum(map(len, continuations)), seconds

    def _report(self, mode, values, errors, rewards, counts, seconds) -> None:
        counts = torch.stack([torch.as_tensor(count, device=values.device) for count in counts])
        states, boundaries, tokens, own_tokens = self.total(counts).tolist()
        known, outcomes = values.isfinite(), rewards.unsqueeze(1).expand(values.shape)
        generations = (self.num_generations if mode == "train" else self.num_generations_eval) or 1
        numbers = {
            "states": states,
            "equal_states": boundaries - states,
            "continuation_tokens": tokens,
            "continuation_time": seconds,
            "token_share": tokens / max(tokens + own_tokens, 1),
            **fit_report(self, values, outcomes, known, generations),
        }
        for name, number in numbers.items():
            self.log_value(mode, f"vine/{name}", number)
        means = {f"value_{name}": pair for name, pair in value_means(values, known, rewards > 0).items()}
        means["value_noise"] = (errors.nansum(), errors.isfinite().sum())
        self.log_means(mode, {f"vine/{name}": pair for name, pair in means.items()})


def segment_rows(ends: list[list[int]], values: torch.Tensor, advantages: torch.Tensor) -> list[list[dict]]:
    """The segments of each completion as the viewer shows them: tokens `start` to `end`, `value` and `advantage`."""
    numbers = zip(ends, values.tolist(), advantages.tolist(), strict=True)
    return [
        [
            {"start": start, "end": end, "value": value, "advantage": advantage[start]}
            for start, end, value in zip([0, *own_ends], own_ends, own_values, strict=False)
        ]
        for own_ends, own_values, advantage in numbers
    ]
