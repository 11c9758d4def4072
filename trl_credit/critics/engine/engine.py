"""A second network trained beside the policy: its optimizer, schedule, clipping, processes and checkpoints."""

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from torch import nn
from transformers import get_scheduler
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import CONFIG_NAME

from ...saved import reading
from ..critic import AcceleratedRunner
from .backends import STATE_FILE, make_backend


logger = get_logger(__name__)


@dataclass
class CriticOptimization:
    """
    How a critic is optimized.

    Args:
        learning_rate (`float`):
            Peak learning rate.
        head (`frozenset[str]`, *optional*):
            Names of the parameters with their own learning rate.
        head_learning_rate (`float`, *optional*):
            Their peak learning rate. Default: `learning_rate`.
        optimizer (`type`, *optional*, defaults to `torch.optim.AdamW`):
            Class of the optimizer.
        optimizer_kwargs (`dict`, *optional*):
            Its arguments besides rates and weight decay.
        scheduler (`str`, *optional*, defaults to `"constant_with_warmup"`):
            Name of a schedule of transformers.
        warmup_steps (`int`, *optional*, defaults to `0`):
            Updates of linear warm-up.
        scheduler_kwargs (`dict`, *optional*):
            Further arguments of the schedule.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Applied to matrices only, not to biases and norms.
        max_grad_norm (`float`, *optional*, defaults to `1.0`):
            Norm to which gradients are clipped; 0 for no clipping.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            Trade time for memory.
        gradient_checkpointing_kwargs (`dict`, *optional*):
            E.g. `{"use_reentrant": False}`.
        offload (`bool`, *optional*, defaults to `False`):
            Keep weights and optimizer state on the host between turns.
    """

    learning_rate: float
    head: frozenset[str] = frozenset()
    head_learning_rate: float | None = None
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW
    optimizer_kwargs: dict = field(default_factory=dict)
    scheduler: str = "constant_with_warmup"
    warmup_steps: int = 0
    scheduler_kwargs: dict | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    gradient_checkpointing_kwargs: dict | None = field(default_factory=lambda: {"use_reentrant": False})
    offload: bool = False


class CriticEngine(AcceleratedRunner):
    """
    Trains a network beside the policy, on the same processes and with the same kind of sharding.

    Trained weights are kept in float32, and compute in the dtype they were loaded in: most updates are smaller than
    half of a bfloat16's last digit.

    It does not know what the network is for: callers supply the loss. An update takes all micro-batches of an optimizer
    step at once, so that its loss is one mean over everything that counts, across micro-batches and processes.

    Args:
        network (`nn.Module`):
            A `PreTrainedModel` or `PeftModel`.
        accelerator (`Accelerator`):
            The run's accelerator. Under DeepSpeed and FSDP2 the engine must be created together with the policy's, or
            later.
        settings ([`CriticOptimization`]):
            How it is optimized.
    """

    network: Any

    def __init__(self, network: nn.Module, accelerator: Accelerator, settings: CriticOptimization):
        self.network, self.accelerator, self.settings = network, accelerator, settings
        self.steps = 0
        self._peak_rates: list[float] = []  # of the optimizer's groups
        self.checkpointing_kwargs: dict = {}
        if settings.gradient_checkpointing:
            self.checkpointing_kwargs = _checkpoint_gradients(network, settings.gradient_checkpointing_kwargs)
        self._compute_dtype = _keep_in_float32(network, accelerator)
        self.backend = make_backend(
            network, accelerator, self._make_optimizer, settings.max_grad_norm, settings.offload
        )
        self.network = self.backend.network
        for group in self.backend.optimizer.param_groups:  # as in every state that FSDP2 loads into it
            group["initial_lr"] = group["lr"]
        self.module.eval()
        self.schedule: Any = None  # see `begin`
        self._saved_schedule: dict | None = None

    @property
    def module(self) -> Any:
        """The network as it is wrapped: call this one."""
        return self.backend.module

    def begin(self, total_steps: int) -> None:
        """
        Begin training: the schedule starts at the first update, or where the training restored by [`load_state`] left
        off.

        Args:
            total_steps (`int`):
                Number of updates in the whole training, for schedules that end.
        """
        groups = self.backend.optimizer.param_groups
        for group, rate in zip(groups, self._peak_rates, strict=True):
            group["lr"] = group["initial_lr"] = rate
        self.schedule = get_scheduler(
            self.settings.scheduler,
            self.backend.optimizer,
            self.settings.warmup_steps,
            max(total_steps, 1),
            self.settings.scheduler_kwargs,
        )
        if self._saved_schedule is not None:
            steps, peaks = self._saved_schedule["last_epoch"], self.schedule.base_lrs
            rates = [peak * factor(steps) for peak, factor in zip(peaks, self.schedule.lr_lambdas, strict=True)]
            self.schedule.load_state_dict({**self._saved_schedule, "base_lrs": peaks, "_last_lr": rates})
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            self._saved_schedule = None

    @property
    def learning_rates(self) -> dict[str, float]:
        """The rates of the next update: `learning_rate`, and `head_learning_rate` where it is another."""
        own = self.settings.learning_rate
        return {
            "learning_rate" if peak == own else "head_learning_rate": group["lr"]
            for peak, group in zip(self._peak_rates, self.backend.optimizer.param_groups, strict=True)
        }

    @torch.no_grad()
    def fill(self, parameter: str, value: float) -> None:
        """Set all of a parameter to a number. Every process must call this."""
        self.backend.fill(self.network.get_parameter(parameter), value)

    @torch.no_grad()
    def shift(self, parameter: str, by: float) -> None:
        """Add a number to all of a parameter. Every process must call this."""
        self.backend.shift(self.network.get_parameter(parameter), by)

    @torch.no_grad()
    def evaluate(self, forward: Callable[[nn.Module], Any]) -> Any:
        """`forward(network)` without gradients. Every process must call it equally often."""
        with self.backend.turn(), self._autocast():
            result = forward(self.module)
        self.backend.after_evaluation()
        return result

    def _autocast(self):
        if self._compute_dtype is None:
            return self.accelerator.autocast()
        return torch.autocast(self.accelerator.device.type, self._compute_dtype)

    def update(
        self,
        micro_batches: Sequence[Any],
        loss: Callable[[nn.Module, Any], torch.Tensor],
        count: Callable[[Any], torch.Tensor],
    ) -> dict[str, float] | None:
        """
        One optimizer step on \\\\( \\sum \\text{loss} / \\sum \\text{count} \\\\) over micro-batches and processes.

        Args:
            micro_batches (`Sequence`):
                This process's share of the step, equally many on every process.
            loss (`Callable`):
                `loss(network, micro_batch)`, the *sum* of the loss over what counts, with gradient. It must go through
                the network even where nothing counts.
            count (`Callable`):
                `count(micro_batch)`, how many items count in it, a scalar tensor.

        Returns:
            `dict`: `loss`, `grad_norm` before clipping and [`learning_rates`]; `None` if nothing counts anywhere, in
            which case nothing is changed.

        Raises:
            FloatingPointError: If the loss or its gradient is not finite; the weights are left as they were.
        """
        with self.backend.turn(updates=True):
            return self._update(micro_batches, loss, count)

    def _update(self, micro_batches, loss, count) -> dict[str, float] | None:
        assert self.schedule is not None, "`begin` comes before the first update"
        total = self._total(sum(count(micro_batch) for micro_batch in micro_batches))
        if total == 0:
            return None
        summed: Any = 0.0
        self.module.train()
        try:
            for i, micro_batch in enumerate(micro_batches):
                last = i + 1 == len(micro_batches)
                with self.backend.micro_batch(last):
                    with self._autocast():
                        value = loss(self.module, micro_batch)
                    # Every engine averages gradients over processes.
                    self.backend.backward(value * (self.accelerator.num_processes / total), last)
                summed = summed + value.detach().double()
        finally:
            self.module.eval()
        mean = self._total(summed) / total
        if not torch.isfinite(torch.tensor(mean)):
            raise FloatingPointError(
                f"The critic's loss is {mean} in its update {self.steps + 1}: training stops here rather than go on "
                f"with broken weights. Usual causes: {self._usual_causes}."
            )
        rates = self.learning_rates
        norm = self.backend.step()
        if norm is None:  # DeepSpeed was told not to look at it
            norm = math.nan
        elif not math.isfinite(norm):
            raise FloatingPointError(
                f"The gradient norm of the critic is {norm} in its update {self.steps + 1}, of a loss of {mean:g}: "
                "training stops here rather than step to broken weights; those of the critic are as they were. The "
                "policy has no part in it. Usual causes: an overflow in the critic's backward pass, weights of the "
                f"critic that were broken before, {self._usual_causes}."
            )
        self.schedule.step()
        self.steps += 1
        return {"loss": mean, "grad_norm": norm, **rates}

    @property
    def _usual_causes(self) -> str:
        if any(p.dtype == torch.float16 for p in self.network.parameters()):
            return (
                "weights in float16, whose numbers end at 65504 (load them in bfloat16 or float32, e.g. with "
                '`critic_model_init_kwargs={"dtype": "bfloat16"}`)'
            )
        return "a learning rate that is too high, rewards of very different sizes"

    def save(self, folder: str | Path) -> None:
        """Save the network in plain `save_pretrained` form. Every process must call this."""
        weights = self.backend.weights()
        if self.accelerator.is_main_process:
            self.network.save_pretrained(folder, state_dict=weights)
        self.accelerator.wait_for_everyone()

    def save_state(self, folder: str | Path, **counters: int) -> None:
        """Save optimizer, schedule and counters beside it. Every process must call this."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        assert self.schedule is not None, "`begin` comes before the first checkpoint"
        extra = {
            "schedule": self.schedule.state_dict(),
            "steps": self.steps,
            "counters": counters,
            "options": {**self._applied_options, **self._kept_options},
        }
        self.backend.save_state(Path(folder), extra)
        self.accelerator.wait_for_everyone()

    def load_state(self, folder: str | Path, network_folder: str | Path) -> dict[str, int]:
        """
        Continue where [`save`] and [`save_state`] left off, once [`begin`] is called.

        Args:
            folder (`str` or `Path`):
                That of [`save_state`].
            network_folder (`str` or `Path`):
                That of [`save`].

        Returns:
            `dict`: The counters.
        """
        folder = Path(folder)
        if not (folder / STATE_FILE).is_file() and not (folder / "critic_engine").is_dir():
            raise FileNotFoundError(
                f"{folder} holds no state of the critic ({STATE_FILE} or critic_engine/): the run cannot be resumed "
                "from it. It was saved with `save_only_model=True` or by another trainer."
            )

        def load_saved_network():
            if not (Path(network_folder) / CONFIG_NAME).is_file():  # without it a model of some default size is made
                raise FileNotFoundError(f"{network_folder} holds no critic: it has no {CONFIG_NAME}.")
            with reading(Path(network_folder)):
                return type(self.backend.network).from_pretrained(network_folder, dtype=_dtype(self.network))

        extra = self.backend.load_state(folder, load_saved_network)
        # 0.2.0 saved no more of them than the rates, in the schedule.
        saved = extra.get("options") or {"critic_learning_rate": extra["schedule"]["base_lrs"][0]}
        self._compare_options(saved, folder)
        self._saved_schedule = extra["schedule"]
        self.steps = extra["steps"]
        return extra["counters"]

    def go_back(self, folder: str | Path, network_folder: str | Path) -> None:
        """
        Restore the network and its optimizer as [`save`] and [`save_state`] left them. The update count and the
        schedule continue. Arguments are those of [`load_state`].
        """
        steps = self.steps
        self.load_state(folder, network_folder)
        self.steps, self._saved_schedule = steps, None
        for group, rate in zip(self.backend.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate

    @property
    def _applied_options(self) -> dict[str, Any]:
        """Those of the trainer's config that a resumed run may set anew."""
        settings = self.settings
        return {
            "critic_learning_rate": settings.learning_rate,
            "critic_head_learning_rate": settings.head_learning_rate,
            "critic_lr_scheduler_type": settings.scheduler,
            "critic_warmup_steps": settings.warmup_steps,
            "critic_max_grad_norm": settings.max_grad_norm,
        }

    @property
    def _kept_options(self) -> dict[str, Any]:
        """Those that are a part of the optimizer's state."""
        settings = self.settings
        return {
            "critic_optim": settings.optimizer.__name__,
            "critic_optim_args": str(settings.optimizer_kwargs),
            "critic_weight_decay": settings.weight_decay,
        }

    def _compare_options(self, saved: dict[str, Any], folder: Path) -> None:
        """Say which options are new in this run; raise for those that its optimizer's state would not follow."""
        for name, own in self._kept_options.items():
            if saved.get(name, own) != own:
                raise ValueError(
                    f"The critic's optimizer in {folder} was saved with `{name}={saved[name]}`, and this run asks for "
                    f"{own}. Resume with what it had; or begin a new run, with the `critic` of that folder."
                )
        new = {name: own for name, own in self._applied_options.items() if saved.get(name, own) != own}
        if new:
            was = {name: saved[name] for name in new}
            logger.warning(f"From here the critic is trained with {new}; until {folder} it was with {was}.")

    def _make_optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        settings = self.settings
        head_rate = settings.learning_rate if settings.head_learning_rate is None else settings.head_learning_rate
        members: dict[tuple, list] = {}  # parameters by rate and whether they decay
        for name, p in network.named_parameters():
            if p.requires_grad:
                rate = head_rate if name in settings.head else settings.learning_rate
                is_matrix = len(getattr(p, "ds_shape", p.shape)) > 1
                members.setdefault((rate != settings.learning_rate, not is_matrix), []).append(p)
        groups: list[dict[str, Any]] = [
            {
                "params": parameters,
                "lr": head_rate if is_head else settings.learning_rate,
                "weight_decay": 0.0 if spared else settings.weight_decay,
            }
            for (is_head, spared), parameters in sorted(members.items(), key=lambda item: item[0])
        ]
        self._peak_rates = [group["lr"] for group in groups]
        return settings.optimizer(groups, **{"lr": settings.learning_rate, **settings.optimizer_kwargs})  # type: ignore

    def _total(self, x) -> float:
        x = torch.as_tensor(x, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(x, reduction="sum").item()


def _keep_in_float32(network: nn.Module, accelerator: Accelerator) -> torch.dtype | None:
    """Trained weights of lower precision in float32; returns what they are to compute in, or `None` for no change."""
    low = [p for p in network.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.mixed_precision == "bf16":
        bf16: dict = accelerator.state.deepspeed_plugin.deepspeed_config.get("bf16", {})
        if bf16.get("bf16_master_weights_and_grads") is True:
            logger.warning(
                "`bf16_master_weights_and_grads` in the DeepSpeed config leaves no copy of the critic's weights in "
                "float32: most updates will be lost to rounding. Take it out."
            )
        return None  # DeepSpeed has float32 copies of its own
    if not low:
        return None
    if any(hasattr(p, "ds_id") for p in low):
        logger.warning(
            f"The critic's weights are {low[0].dtype}, which ZeRO-3 has split already, and without `bf16` it keeps no "
            "copy of them in float32: most updates will be lost to rounding. Load the critic with "
            '`critic_model_init_kwargs={"dtype": "float32"}`, or train with `bf16=True`.'
        )
        return None
    logger.warning(
        f"The critic was loaded in {low[0].dtype}. The weights of it that are trained are kept in float32, which takes "
        "twice the memory, and compute in bfloat16: of weights in bfloat16 most updates would be lost to rounding. To "
        'compute in float32 too, set `critic_model_init_kwargs={"dtype": "float32"}`.'
    )
    for p in low:
        p.data = p.data.float()
    return torch.bfloat16


def _dtype(network: nn.Module) -> torch.dtype:
    return next(p.dtype for p in network.parameters() if p.is_floating_point())


def _checkpoint_gradients(network: Any, kwargs: dict | None) -> dict:
    kwargs = dict(kwargs or {})
    if not all(p.requires_grad for p in network.parameters()):
        if is_deepspeed_zero3_enabled():  # ZeRO-3 gathers weights again in the recomputation only when it is reentrant
            kwargs["use_reentrant"] = True
        network.enable_input_require_grads()
    kwargs.setdefault("use_reentrant", False)
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    return kwargs


@contextmanager
def seeded(seed: int):
    """Random numbers of `seed`, the same on every process, and those of the run untouched."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
