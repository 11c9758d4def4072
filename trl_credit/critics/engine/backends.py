"""How a second network is split over processes: alone or with DDP, by DeepSpeed, by FSDP2."""

import math
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, is_peft_model
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ...saved import fitting, read_tensors
from .offload import Offload


STATE_FILE = "critic_state.pt"


def make_backend(
    network: nn.Module, accelerator: Accelerator, make_optimizer, max_grad_norm: float, offload: bool = False
):
    """
    The backend that goes with what the policy is trained with.

    Args:
        network (`nn.Module`):
            The network to train beside the policy.
        accelerator (`Accelerator`):
            The run's accelerator.
        make_optimizer (`Callable`):
            Makes an optimizer of the network's parameters.
        max_grad_norm (`float`):
            Norm to which gradients are clipped; 0 for no clip.
        offload (`bool`, *optional*, defaults to `False`):
            Keep what the network does not need at the moment on the host.
    """
    kind = accelerator.distributed_type
    if offload and kind != DistributedType.NO:
        raise ValueError(
            f"`critic_offload=True` works on one process, got {kind.value}. Leave it out; DeepSpeed and FSDP2 have "
            "`offload_optimizer` and `fsdp_offload_params` in their configs, for both networks."
        )
    if kind == DistributedType.DEEPSPEED:
        return DeepSpeedBackend(network, accelerator, make_optimizer, max_grad_norm)
    if accelerator.mixed_precision == "fp16":
        raise ValueError("A critic cannot be trained with fp16, whose gradients underflow. Use bf16 or float32.")
    if kind == DistributedType.FSDP:
        if accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise ValueError("A critic needs FSDP2: set `fsdp_version: 2` in the accelerate config.")
        return FSDP2Backend(network, accelerator, make_optimizer, max_grad_norm)
    return LocalBackend(network, accelerator, make_optimizer, max_grad_norm, offload)


class LocalBackend:
    """One process, or several with a whole copy each (DDP)."""

    network: Any  # a `PreTrainedModel`, a `PeftModel`, ...
    module: Any  # the same as it is wrapped: DDP, a DeepSpeed engine, an FSDP module
    # Whether weights are split over processes, which must then make their forward passes together.
    splits_weights = False

    def __init__(self, network, accelerator, make_optimizer, max_grad_norm, offload=False):
        self.network, self.accelerator, self.max_grad_norm = network, accelerator, max_grad_norm
        self.module = self.wrap()
        self.optimizer = make_optimizer(network)
        self.offload = Offload(network, self.optimizer) if offload else None

    def wrap(self) -> Any:
        return self.accelerator.prepare_model(self.network)

    def turn(self, updates: bool = False):
        """Around passes of the network, and its update if there is one: what is on the host comes to the device."""
        return nullcontext() if self.offload is None else self.offload.turn(updates)

    @contextmanager
    def micro_batch(self, last: bool):
        """Around forward and backward; gradients meet those of other processes in the last one of a step."""
        with nullcontext() if last or not isinstance(self.module, DistributedDataParallel) else self.module.no_sync():
            yield

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def step(self) -> float | None:
        """Clip, step if the norm is finite, forget the gradients; returns their norm before the clip, if known."""
        limit = self.max_grad_norm or torch.inf
        trained = [p for p in self.network.parameters() if p.requires_grad]
        norm = float(_whole_tensor(nn.utils.clip_grad_norm_(trained, limit)))
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def fill(self, parameter: nn.Parameter, value: float) -> None:
        """Set all of a parameter to a number. Every process must call this."""
        parameter.fill_(value)

    def shift(self, parameter: nn.Parameter, by: float) -> None:
        """Add a number to all of a parameter. Every process must call this."""
        parameter.add_(by)

    def after_evaluation(self) -> None:
        """Called after passes without gradients."""

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights, whole, on the main process at least. Every process must call this."""
        return self.network.state_dict()

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Load weights, which only the main process needs to have. Every process must call this."""
        if self.accelerator.is_main_process:
            self.network.load_state_dict(weights, strict=not is_peft_model(self.network))
        if self.accelerator.num_processes > 1:
            for weight in self.network.state_dict().values():
                distributed.broadcast(weight, src=0)

    def optimizer_state(self) -> dict:
        return self.optimizer.state_dict()

    def load_optimizer_state(self, state: dict) -> None:
        self.optimizer.load_state_dict(state)

    def save_state(self, folder: Path, extra: dict) -> None:
        """Save what a resumed run needs beyond the `save_pretrained` folder. Every process must call this."""
        state = {"optimizer": self.optimizer_state(), **extra}
        if is_peft_model(self.network):  # few, and their names on disk are others
            trained = {name for name, p in self.network.named_parameters() if p.requires_grad}
            state["weights"] = {name: weight for name, weight in self.weights().items() if name in trained}
        if self.accelerator.is_main_process:
            torch.save(state, folder / STATE_FILE)

    def load_state(self, folder: Path, load_saved_network) -> dict:
        """The reverse of `save_state`; returns the `extra`. Every process must call this."""
        # Of what a file holds each process reads what it keeps, and the main process alone makes another network.
        state = read_tensors(folder / STATE_FILE, mapped=True)
        weights = state.pop("weights", None)
        if weights is None:
            weights = load_saved_network().state_dict() if self.accelerator.is_main_process else {}
        with fitting(f"The critic of {folder}", "Give the run the critic that it began with, and the same adapters."):
            self.load_weights(weights)
        how = (
            "Parameters with other rates or decay are other groups: give `critic_learning_rate`, "
            "`critic_head_learning_rate` and `critic_weight_decay` as it had them."
        )
        with fitting(f"The critic's optimizer in {folder / STATE_FILE}", how):
            self.load_optimizer_state(state.pop("optimizer"))
        return state


class FSDP2Backend(LocalBackend):
    """
    Weights, gradients and optimizer state split over processes by `fully_shard`. Gradients meet in every micro-batch:
    else each process would keep whole ones until the last.
    """

    splits_weights = True

    def wrap(self) -> Any:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model
        from torch.distributed.fsdp import register_fsdp_forward_method

        plugin = self.accelerator.state.fsdp_plugin
        kept = plugin.transformer_cls_names_to_wrap
        # The policy's layers were looked up for the policy; a critic of another architecture has its own.
        layers = getattr(self.network, "_no_split_modules", None)
        plugin.transformer_cls_names_to_wrap = list(layers) if layers else kept
        try:
            self.network = fsdp2_prepare_model(self.accelerator, self.network)
        finally:
            plugin.transformer_cls_names_to_wrap = kept
        if is_peft_model(self.network) and hasattr(self.network, "generate"):
            # It calls its base model, not itself, and FSDP gathers what no layer holds when the whole is called.
            register_fsdp_forward_method(self.network, "generate")
        return self.network

    def after_evaluation(self):
        from torch.distributed.fsdp import FSDPModule

        # Without a backward pass the outermost weights stay whole, and are not those that are saved, filled and loaded.
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def weights(self):
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        return get_model_state_dict(self.module, options=_full())

    def load_weights(self, weights):
        from torch.distributed.checkpoint.state_dict import set_model_state_dict

        set_model_state_dict(self.module, weights, options=_of_main_process(not is_peft_model(self.network)))

    def optimizer_state(self):
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        return get_optimizer_state_dict(self.module, self.optimizer, options=_full())

    def load_optimizer_state(self, state):
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        state = state if self.accelerator.is_main_process else {}
        set_optimizer_state_dict(self.module, self.optimizer, state, options=_of_main_process())


class DeepSpeedBackend(LocalBackend):
    """A DeepSpeed engine of its own beside the policy's, with the policy's configuration."""

    offload = None

    def __init__(self, network, accelerator, make_optimizer, max_grad_norm):
        import deepspeed

        self.network, self.accelerator = network, accelerator
        self.optimizer = make_optimizer(network)
        self.module, *_ = deepspeed.initialize(
            model=network, optimizer=self.optimizer, config=self.config(max_grad_norm)
        )
        self.stage = self.module.zero_optimization_stage()
        self.splits_weights = self.stage == 3

    def config(self, max_grad_norm: float) -> dict:
        config = deepcopy(self.accelerator.state.deepspeed_plugin.deepspeed_config)
        for ours in ("optimizer", "scheduler"):  # those of the policy; the critic brings its own
            config.pop(ours, None)
        processes = self.accelerator.num_processes
        config.update(
            # Losses come scaled, and steps end where we say.
            train_micro_batch_size_per_gpu=1,
            gradient_accumulation_steps=1,
            train_batch_size=processes,
            gradient_clipping=max_grad_norm,
            zero_force_ds_cpu_optimizer=False,
            zero_allow_untested_optimizer=True,
        )
        for precision in ("bf16", "fp16"):
            section = config.get(precision, {})
            if section.get("enabled") == "auto":
                section["enabled"] = self.accelerator.mixed_precision == precision
            config[precision] = {key: value for key, value in section.items() if value != "auto"}
        if config["bf16"].get("enabled"):
            config["bf16"]["check_grad_overflow"] = True
        if config["fp16"].get("enabled"):
            raise ValueError("A critic cannot be trained with fp16, whose gradients underflow. Use bf16 or float32.")
        zero = config.get("zero_optimization", {})
        config["zero_optimization"] = {key: value for key, value in zero.items() if value != "auto"}
        return {key: value for key, value in config.items() if value != "auto"}

    @contextmanager
    def micro_batch(self, last: bool):
        self.module.set_gradient_accumulation_boundary(is_boundary=last)
        yield

    def backward(self, loss, last):
        self.module.backward(loss)

    def step(self):
        self.module.step()  # which leaves out a step whose gradient is not finite
        if getattr(self.module.optimizer, "overflow", False):
            return math.inf
        norm = self.module.get_global_grad_norm()
        return None if norm is None else float(norm)

    def fill(self, parameter, value):
        self._change(parameter, lambda x: x.fill_(value))

    def shift(self, parameter, by):
        self._change(parameter, lambda x: x.add_(by))

    def _change(self, parameter, change: Callable[[torch.Tensor], Any]) -> None:
        import deepspeed
        from deepspeed import utils

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
            change(parameter.data)
            whole = parameter.data.clone()
        # The optimizer has a copy in float32; under ZeRO-3 a part of it, which may be nothing but padding.
        if self.stage == 3:
            part = utils.safe_get_local_fp32_param(parameter).clone()
            change(part)
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_full_fp32_param(parameter, whole.float())

    def weights(self):
        if self.stage != 3:
            return self.network.state_dict()
        import deepspeed

        weights = {name: buffer.cpu() for name, buffer in self.network.named_buffers()}
        keep = set(self.network.state_dict(keep_vars=True))
        for name, parameter in self.network.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                if self.accelerator.is_main_process:
                    weights[name] = parameter.detach().cpu().clone()
        return {name: weight for name, weight in weights.items() if name in keep}

    def save_state(self, folder, extra):
        self.module.save_checkpoint(str(folder / "critic_engine"), tag="state", client_state=extra)

    def load_state(self, folder, load_saved_network):
        path, extra = self.module.load_checkpoint(
            str(folder / "critic_engine"), tag="state", load_module_strict=not is_peft_model(self.network)
        )
        if path is None:
            raise ValueError(f"{folder} has no readable state of the critic's DeepSpeed engine.")
        return extra


def _full():
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def _of_main_process(strict: bool = True):
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=strict)


def _whole_tensor(x: Any) -> torch.Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x
