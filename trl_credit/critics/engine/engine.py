"""A second network trained beside the policy: its optimizer, schedule, clipping, processes and checkpoints."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from torch import nn
from transformers import get_scheduler
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from .backends import STATE_FILE, make_backend


@dataclass
class CriticOptimization:
    """
    How a critic is optimized.

    Args:
        learning_rate (`float`):
            Peak learning rate of AdamW.
        total_steps (`int`):
            Number of updates in the whole run, for schedules that end.
        scheduler (`str`, *optional*, defaults to `"constant_with_warmup"`):
            Name of a schedule of transformers.
        warmup_steps (`int`, *optional*, defaults to `0`):
            Updates of linear warm-up.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Applied to matrices only, not to biases and norms.
        betas, eps:
            Of AdamW.
        max_grad_norm (`float`, *optional*, defaults to `1.0`):
            Norm to which gradients are clipped; 0 for no clipping.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            Trade time for memory.
        gradient_checkpointing_kwargs (`dict`, *optional*):
            E.g. `{"use_reentrant": False}`.
    """

    learning_rate: float
    total_steps: int
    scheduler: str = "constant_with_warmup"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    gradient_checkpointing_kwargs: dict | None = field(default_factory=lambda: {"use_reentrant": False})


class CriticEngine:
    """
    Trains a network beside the policy, on the same processes and with the same kind of sharding.

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
        self.checkpointing_kwargs: dict = {}
        if settings.gradient_checkpointing:
            self.checkpointing_kwargs = _checkpoint_gradients(network, settings.gradient_checkpointing_kwargs)
        self.backend = make_backend(network, accelerator, self._make_optimizer, settings.max_grad_norm)
        self.network = self.backend.network
        self.module.eval()
        self.schedule = get_scheduler(
            settings.scheduler, self.backend.optimizer, settings.warmup_steps, max(settings.total_steps, 1)
        )

    @property
    def module(self) -> Any:
        """The network as it is wrapped: call this one."""
        return self.backend.module

    @property
    def num_processes(self) -> int:
        return self.accelerator.num_processes

    @property
    def process_index(self) -> int:
        return self.accelerator.process_index

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor of all processes, of one shape on each, along its first dimension."""
        return self.accelerator.gather(x)

    @property
    def learning_rate(self) -> float:
        return self.schedule.get_last_lr()[0]

    @torch.no_grad()
    def evaluate(self, forward: Callable[[nn.Module], Any]) -> Any:
        """`forward(network)` without gradients. Every process must call it equally often."""
        with self.accelerator.autocast():
            return forward(self.module)

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
            `dict`: `loss`, `grad_norm` before clipping and `learning_rate`; `None` if nothing counts anywhere, in which
            case nothing is changed.

        Raises:
            FloatingPointError: If the loss is not finite; the weights are left as they were.
        """
        total = self._total(sum(count(micro_batch) for micro_batch in micro_batches))
        if total == 0:
            return None
        summed: Any = 0.0
        self.module.train()
        try:
            for i, micro_batch in enumerate(micro_batches):
                last = i + 1 == len(micro_batches)
                with self.backend.micro_batch(last):
                    with self.accelerator.autocast():
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
                "with broken weights. Usual causes: a learning rate that is too high, rewards of very different sizes."
            )
        rate = self.learning_rate
        norm = self.backend.step()
        self.schedule.step()
        self.steps += 1
        return {"loss": mean, "grad_norm": norm, "learning_rate": rate}

    def save(self, folder: str | Path) -> None:
        """Save the network in plain `save_pretrained` form. Every process must call this."""
        weights = self.backend.weights()
        if self.accelerator.is_main_process:
            self.network.save_pretrained(folder, state_dict=weights)
        self.accelerator.wait_for_everyone()

    def save_state(self, folder: str | Path, **counters: int) -> None:
        """Save optimizer, schedule and counters beside it. Every process must call this."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        extra = {"schedule": self.schedule.state_dict(), "steps": self.steps, "counters": counters}
        self.backend.save_state(Path(folder), extra)
        self.accelerator.wait_for_everyone()

    def load_state(self, folder: str | Path, network_folder: str | Path) -> dict[str, int]:
        """
        Continue where [`save`] and [`save_state`] left off.

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
            return type(self.backend.network).from_pretrained(network_folder, dtype=_dtype(self.network))

        extra = self.backend.load_state(folder, load_saved_network)
        self.schedule.load_state_dict(extra["schedule"])
        self.steps = extra["steps"]
        return extra["counters"]

    def go_back(self, folder: str | Path) -> None:
        """
        Restore the network and its optimizer as [`save`] and [`save_state`] left them in one folder. The update count
        and the schedule continue.
        """
        steps, schedule = self.steps, self.schedule.state_dict()
        self.load_state(folder, folder)
        self.steps = steps
        self.schedule.load_state_dict(schedule)
        for group, rate in zip(self.backend.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate

    def _make_optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        trained = [p for p in network.parameters() if p.requires_grad]
        matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) > 1]
        rest = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.settings.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.settings.learning_rate,
            betas=self.settings.betas,
            eps=self.settings.eps,
        )

    def _total(self, x) -> float:
        x = torch.as_tensor(x, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(x, reduction="sum").item()


def _dtype(network: nn.Module) -> torch.dtype:
    return next(p.dtype for p in network.parameters() if p.is_floating_point())


def _checkpoint_gradients(network: Any, kwargs: dict | None) -> dict:
    kwargs = dict(kwargs or {})
    if is_peft_model(network):
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
