"""The base of every trainer: hooks for credit, services for them, and the run around them."""

import math
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.generation.vllm_generation import VLLMGeneration
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import get_config_model_id

from ..credit_log.log import CreditLog
from ..model_card import add_credit_section
from .config import CreditConfig
from .resuming import BeginTraining, ResumableSampler
from .rollouts import RolloutSeam
from .user_functions import checked_reward_func, checked_rollout_func


class CreditTrainer(RolloutSeam):
    """`GRPOTrainer` with hooks for credit assignment. Subclasses override the hooks and name themselves."""

    config_class: type[CreditConfig]
    # Folders of a saved policy that hold other networks.
    folders_of_networks: tuple[str, ...] = ()
    # Whether a reward function may return a list of rewards for a completion, one per token.
    takes_token_rewards = False

    def __init__(self, model, reward_funcs=None, args=None, *rest, **kwargs):
        if not issubclass(self.config_class, CreditConfig):
            raise TypeError(
                f"`config_class` of {type(self).__name__} must derive from CreditConfig, got "
                f"{self.config_class.__name__}."
            )
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(f"{name.split('/')[-1]}-{self._name}")
        elif not isinstance(args, self.config_class):
            raise TypeError(
                f"{type(self).__name__} needs `args` to be a {self.config_class.__name__}, got {type(args).__name__}."
            )
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        self.reward_funcs = [
            func if isinstance(func, nn.Module) else checked_reward_func(func, name, self._token_scores_of(name))
            for func, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        if self.rollout_func is not None:
            self.rollout_func = checked_rollout_func(self.rollout_func)
        self._step_inputs: list[dict] = []  # micro-batches of the optimizer step under way
        self._resume_from: str | None = None
        self._moves_policy = True  # see `run_without_training`
        if args.log_credit:
            self._credit_log = CreditLog(args, self.accelerator, self._tokenizer, self._name)
        if self.scores_continuations:
            self._refuse_unscorable()
        self.add_callback(BeginTraining(self))

    # --- Hooks

    def begin_log(self, mode: str) -> None:
        """Called before metrics are logged: the moment to add metrics over everything since the last log."""

    def finish_step(self, micro_batches: list[dict]) -> None:
        """Called with the same micro-batches when the policy's gradient is complete, before its optimizer steps."""

    def begin_training(self, checkpoint: str | None) -> None:
        """Called when the policy is on its devices, before its first step; with a checkpoint if the run is resumed."""

    def save_networks(self, folder: Path) -> None:
        """Called on every process when the policy is saved: save other networks beside it."""

    def save_training_state(self, folder: Path) -> None:
        """Called on every process when a checkpoint is made: save what a resumed run needs."""

    # --- Services for the hooks

    def run_without_training(self, checkpoint: str | bool | None = None) -> None:
        """
        Everything in [`~transformers.Trainer.train`] up to and including [`begin_training`], but no step of the policy.

        Args:
            checkpoint (`str` or `bool`, *optional*):
                As `resume_from_checkpoint` of `train`.
        """
        if not hasattr(super(), "_run_epoch"):
            raise RuntimeError("This version of transformers cannot begin a run without training: use 5.0 or later.")
        self._moves_policy = False
        try:
            super().train(resume_from_checkpoint=checkpoint)
        finally:
            self._moves_policy = True

    @contextmanager
    def unwrapped_for_generation(self, module: nn.Module, checkpointing_kwargs: dict | None = None):
        """
        A network trained beside the policy, prepared for `generate` the way TRL prepares the policy.

        Args:
            module (`nn.Module`):
                The network as it is wrapped.
            checkpointing_kwargs (`dict`, *optional*):
                Arguments of its gradient checkpointing, which is off meanwhile.
        """
        with unwrap_model_for_generation(
            module,  # type: ignore[arg-type]
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=checkpointing_kwargs,
        ) as network:
            yield network

    def vllm_beside(self, network: nn.Module, processing_class, **settings) -> VLLMGeneration:
        """
        vLLM for a network trained beside the policy, with the policy's parallelism and sleep mode. Call `sync_weights`
        before `generate` whenever the network has changed, and call both on every process, with equally many prompts.

        Args:
            network (`nn.Module`):
                The network, on its devices.
            processing_class (`PreTrainedTokenizerBase`):
                Its tokenizer.
            settings:
                Further arguments of [`~trl.generation.vllm_generation.VLLMGeneration`].
        """
        return VLLMGeneration(
            model=network,  # type: ignore[arg-type]
            accelerator=self.accelerator,
            processing_class=processing_class,
            server_timeout=self.args.vllm_server_timeout,
            tensor_parallel_size=self.args.vllm_tensor_parallel_size,
            enable_sleep_mode=self.args.vllm_enable_sleep_mode,
            model_impl=self.args.vllm_model_impl,
            trust_remote_code=self.args.trust_remote_code,
            **settings,
        )

    # --- Wrapped methods of TRL
    def _get_grad_norm(self, *args, **kwargs):
        norm = super()._get_grad_norm(*args, **kwargs)
        # A loss can be finite and its gradient not. (A gradient scaler, with float16, skips such steps by itself.)
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(norm):
            raise FloatingPointError(
                f"The gradient norm of step {self.state.global_step} is {float(norm)}: training stops here rather than "
                "step to broken weights; checkpoints are as they were."
            )
        return norm

    def log(self, *args, **kwargs):
        """As TRL's, with the metrics of `log_means`."""
        self.begin_log(self._mode)
        if sums := self._sums[self._mode]:
            totals = self.accelerator.reduce(torch.stack(list(sums.values())), reduction="sum").tolist()
            for name, (total, count) in zip(sums, totals, strict=True):
                if count:
                    self._metrics[self._mode][name] = [total / count]
            sums.clear()
        super().log(*args, **kwargs)

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._mode == "eval":
            self.begin_step([inputs], "eval")
            return inputs
        if self._buffered_inputs is not before:
            for step in self._steps_of(self._buffered_inputs):
                self._begin_step(step)
        self._step_inputs.append(inputs)
        return inputs

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            step, self._step_inputs = self._step_inputs, []
            self.finish_step(step)
        if self._credit_log is not None:
            self._credit_log.after_loss()
        return loss

    def _run_epoch(self, *args, **kwargs):
        if self._moves_policy:
            return super()._run_epoch(*args, **kwargs)
        self.control.should_training_stop = True
        return None

    def _finalize_training(self, *args, **kwargs):
        if self._moves_policy:
            return super()._finalize_training(*args, **kwargs)
        self.is_in_train = False
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return None

    def _get_train_sampler(self, *args, **kwargs):
        return ResumableSampler(super()._get_train_sampler(*args, **kwargs), self)

    def save_model(self, output_dir=None, _internal_call=False):
        # Before TRL's, which ends with the push to the Hub.
        self.save_networks(Path(output_dir or str(self.args.output_dir)))
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial):
        if not self.args.save_only_model:
            # Before TRL's, which pushes checkpoints, and by which a checkpoint is told to be complete.
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self.save_training_state(folder)
        super()._save_checkpoint(model, trial)

    def save_checkpoint(self) -> None:
        """Make a checkpoint of the run as it is now."""
        self._save_checkpoint(self.model, trial=None)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        others = [name for name in self.folders_of_networks if (Path(resume_from_checkpoint) / name).is_dir()]
        if not others or not is_peft_model(self.accelerator.unwrap_model(self.model)):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        # `Trainer` takes every folder with an adapter in it for one of the policy's: show it the checkpoint without.
        with TemporaryDirectory() as view:
            for path in Path(resume_from_checkpoint).resolve().iterdir():
                if path.name not in others:
                    (Path(view) / path.name).symlink_to(path)
            return super()._load_from_checkpoint(view, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resume_from = checkpoint

    def create_model_card(self, *args, **kwargs):
        """As TRL's, plus the settings that say how credit was assigned."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_credit_section(Path(str(self.args.output_dir), "README.md"), self, CreditConfig)

    # --- Inside the wrapped methods

    def _token_scores_of(self, name: str) -> dict | None:
        return self._token_scores.setdefault(name, {}) if self.takes_token_rewards else None


def critic_source(model):
    """What a copy of a policy's checkpoint is loaded from: its path or Hub id, or else the model itself."""
    if isinstance(model, str):
        return model
    base = model.get_base_model() if is_peft_model(model) else model
    return get_config_model_id(base.config) or base
