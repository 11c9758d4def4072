"""The critic's error on a fixed set of states, while it trains."""

import math

import numpy as np
import torch
from transformers import TrainerCallback

from ..critics.critic import as_rollout
from ..trainers.critic.critic_trainer import CriticTrainer
from . import statistics as st
from .probes import Probes


class CriticProbeCallback(TrainerCallback):
    """
    Measures a critic during training on fixed probes: does it forget what it knew?

    The probes belong to one policy, say the one that training starts from. As the policy moves, so does the truth: the
    error on the probes shows the critic's memory, not its fit to the new policy. For the latter, run
    `trl-credit critic-report` on a checkpoint.

    Logs `critic_probe/mse`, `critic_probe/explained_variance` and `critic_probe/bias`, the mean of V − V*, as in
    [`evaluate_critic`], and `critic_probe/parse_rate`, the share of states for which the critic's answer could be read;
    the other metrics cover only these. It measures before the first step and after every `every_n_steps`, and logs with
    the next line of the log; if a line covers several measurements, their mean. It changes nothing in the run.

    Args:
        trainer ([`~trl_credit.trainers.critic.CriticTrainer`]):
            A trainer with a critic; add the callback to it with `trainer.add_callback`.
        probes ([`Probes`]):
            See [`draw_probes`].
        every_n_steps (`int`, *optional*, defaults to `50`):
            Steps between two measurements, at least 1.

    Example:

    ```python
    from trl_credit.critic_report import CriticProbeCallback, draw_probes, load_policy

    probes = draw_probes("probes", load_policy("Qwen/Qwen2.5-0.5B-Instruct"), dataset.select(range(64)), reward_func)
    trainer.add_callback(CriticProbeCallback(trainer, probes))
    ```
    """

    def __init__(self, trainer: CriticTrainer, probes: Probes, every_n_steps: int = 50):
        if not isinstance(trainer, CriticTrainer):
            raise TypeError(f"CriticProbeCallback needs a trainer with a critic, got a {type(trainer).__name__}.")
        if not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"`every_n_steps` must be a whole number of at least 1, got {every_n_steps!r}.")
        self.trainer, self.probes, self.every_n_steps = trainer, probes, every_n_steps

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.log(self._measure())  # an entry of its own, not a part of the first step's

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every_n_steps == 0:
            for name, value in self._measure().items():
                self.trainer.log_value("train", name, value)

    def _measure(self) -> dict[str, float]:
        rollouts = self.probes.rollouts
        rows = self._values()
        values = np.concatenate([row[rollout.cuts] for row, rollout in zip(rows, rollouts, strict=True)])
        returns = np.concatenate([rollout.returns for rollout in rollouts]).astype(float)
        read = ~np.isnan(values)
        parse_rate = {"critic_probe/parse_rate": float(read.mean())}
        if not read.any():
            return parse_rate
        values, returns = values[read], returns[read]
        truth, noise, weights = np.nanmean(returns, axis=1), st.noise_of_mean(returns), np.ones(len(returns))
        return {
            "critic_probe/mse": st.squared_error(values, truth, noise, weights),
            "critic_probe/explained_variance": st.explained_variance(values, truth, noise, weights),
            "critic_probe/bias": st.mean(values - truth, weights),
            **parse_rate,
        }

    def _values(self) -> np.ndarray:
        """Values of all states, shape `(B, T + 1)`. Each process asks about a share, all of one size."""
        accelerator, rollouts = self.trainer.accelerator, self.probes.rollouts
        share = math.ceil(len(rollouts) / accelerator.num_processes)
        start = share * accelerator.process_index
        rows = [row % len(rollouts) for row in range(start, start + share)]
        whole = as_rollout(rollouts, accelerator.device)
        own = {name: x[rows] if torch.is_tensor(x) else [x[row] for row in rows] for name, x in whole.items()}
        return accelerator.gather(self.trainer.state_values(own))[: len(rollouts)].double().cpu().numpy()
