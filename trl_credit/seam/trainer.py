"""The base of every trainer: hooks for credit, services for them, and the run around them."""

import math
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import get_config_model_id

from ..credit_log.log import CreditLog
from ..model_card import add_credit_section
from .config import CreditConfig
from .kept_rollouts import KeptRolloutSeam
from .lent_engine import LentEngine
from .resuming import BeginTraining, FinishStep, ResumableSampler, checkpoint_to_resume, save_rollout, saved_whole
from .user_functions import checked_reward_func, checked_rollout_func, distinct_names, stop_token_ids
from .versions import unwrapped_for_generation


logger = get_logger(__name__)
# With fewer in a logging interval, steps without a gradient are bad luck.
_ENOUGH_STEPS = 5


class CreditTrainer(KeptRolloutSeam):
    """`GRPOTrainer` with hooks for credit assignment. Subclasses override the hooks and name themselves."""

    config_class: type[CreditConfig]
    # Folders of a saved policy that hold other networks.
    folders_of_networks: tuple[str, ...] = ()
    # Whether a reward function may return a list of rewards for a completion, one per token or one per turn. In it
    # `None` is one that the function does not score, and a list of these alone a completion that it does not.
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
        self.reward_func_names = distinct_names(self.reward_func_names)
        self.reward_funcs = [
            func
            if isinstance(func, nn.Module)
            else checked_reward_func(func, name, token_scores if self.takes_token_rewards else None)
            for func, name, token_scores in zip(
                self.reward_funcs, self.reward_func_names, self._token_scores, strict=True
            )
        ]
        # TRL knows the ends of the model's config. At another one that the user names it would go on: to it the padding
        # behind is text that the policy wrote.
        self.eos_token_ids = [*dict.fromkeys([*self.eos_token_ids, *stop_token_ids(args.generation_kwargs)])]
        if self.rollout_func is not None:
            self.rollout_func = checked_rollout_func(self.rollout_func)
        self._step_inputs: list[dict] = []  # micro-batches of the optimizer step under way
        self._resume_from: str | None = None
        self._saved_beside: Path | None = None  # where a checkpoint is being saved
        self._moves_policy = True  # see `run_without_training`
        self._name_in_stage: Callable[[str], str] | None = None  # see `logging_as`
        self._steps_without_gradient = 0
        self._warned: set[str] = set()
        if args.log_credit:
            self._credit_log = CreditLog(args, self.accelerator, self._tokenizer, self._name)
        if self.scores_continuations:
            self._refuse_unscorable()
        self.add_callback(BeginTraining(self))
        self.callback_handler.callbacks.insert(0, FinishStep(self))  # others see both networks after the step

    # --- Hooks

    def begin_log(self, mode: str) -> None:
        """Called before metrics are logged: the moment to add metrics over everything since the last log."""

    def finish_step(self, micro_batches: list[dict]) -> None:
        """
        Called with the same micro-batches when the policy's optimizer has stepped and its gradient is gone, before
        anything else that happens at the end of a step: callbacks, logs, evaluations, checkpoints.
        """

    def begin_training(self, checkpoint: str | None) -> None:
        """Called when the policy is on its devices, before its first step; with a checkpoint if the run is resumed."""

    def save_networks(self, folder: Path) -> None:
        """Called on every process when the policy is saved: save other networks beside it."""

    def save_training_state(self, folder: Path) -> None:
        """Called on every process when a checkpoint is made: save what a resumed run needs."""

    def load_networks(self, folder: Path) -> None:
        """Called on every process when the best policy is loaded at the end: load other networks from beside it."""

    # --- Services for the hooks

    def warn_once(self, text: str) -> None:
        """Warn on the main process, of the same thing once in the life of this trainer."""
        if text not in self._warned:
            self._warned.add(text)
            logger.warning(text)

    @contextmanager
    def logging_as(self, stage: str, step: int, name: Callable[[str], str]):
        """
        What is logged inside belongs to a stage before the training, with names and an x-axis of its own.

        Args:
            stage (`str`):
                Its name, which tables of completions then bear.
            step (`int`):
                The step that integrations and tables are told.
            name (`Callable`):
                What a metric is called there.
        """
        global_step = self.state.global_step
        self._stage, self._name_in_stage, self.state.global_step = stage, name, step
        try:
            yield
        finally:
            self._name_in_stage, self.state.global_step = None, global_step

    def run_without_training(self, checkpoint: str | bool | None = None) -> None:
        """
        Everything in [`~transformers.Trainer.train`] up to and including [`begin_training`], but no step of the policy.

        Args:
            checkpoint (`str` or `bool`, *optional*):
                As `resume_from_checkpoint` of `train`.
        """
        self._moves_policy = False
        try:
            super().train(resume_from_checkpoint=checkpoint_to_resume(self, checkpoint))
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
        gather = self.args.ds3_gather_for_generation
        with unwrapped_for_generation(
            module, self.accelerator, checkpointing_kwargs, gather_deepspeed3_params=gather
        ) as network:
            yield network

    def vllm_beside(self, network: nn.Module, processing_class, **settings) -> VLLMGeneration:
        """
        vLLM for a network trained beside the policy, with the policy's parallelism and sleep mode: but vLLM lets only
        one engine of a process sleep, and that is the policy's. Call `sync_weights` before `generate` whenever the
        network has changed, and call both on every process, with equally many prompts.

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
            enable_sleep_mode=self.args.vllm_enable_sleep_mode and not (self.use_vllm and self.vllm_mode == "colocate"),
            model_impl=self.args.vllm_model_impl,
            trust_remote_code=self.args.trust_remote_code,
            **settings,
        )

    def vllm_of_policy(self, network: nn.Module, processing_class, **settings) -> VLLMGeneration:
        """
        The policy's vLLM, lent to a network of the policy's architecture that is trained beside it, see
        [`~trl_credit.seam.lent_engine.why_not_lent`]. Call `sync_weights` before each `generate`, and both on every
        process, with equally many prompts.

        Args:
            network (`nn.Module`):
                The network, on its devices.
            processing_class (`PreTrainedTokenizerBase`):
                Its tokenizer.
            settings:
                Of its generation, see [`~trl.generation.vllm_generation.VLLMGeneration`].
        """
        return LentEngine(self, network, processing_class, **settings)

    # --- Wrapped methods of TRL

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As TRL's, from a checkpoint that is whole: others are refused by name. The text `"true"` counts as `True`."""
        return super().train(checkpoint_to_resume(self, resume_from_checkpoint), *args, **kwargs)

    def _get_grad_norm(self, *args, **kwargs):
        norm = super()._get_grad_norm(*args, **kwargs)
        # A loss can be finite and its gradient not. (A gradient scaler, with float16, skips such steps by itself.)
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(norm):
            raise FloatingPointError(
                f"The gradient norm of step {self.state.global_step} is {float(norm)}: training stops here rather than "
                "step to broken weights; checkpoints are as they were."
            )
        self._steps_without_gradient = self._steps_without_gradient + 1 if norm == 0 else 0
        return norm

    def log(self, logs, *args, **kwargs):
        """As TRL's, with the metrics of `log_means`, and under the names of a stage."""
        self.begin_log(self._mode)
        metrics = self._metrics[self._mode]
        if sums := self._sums[self._mode]:
            totals = self.accelerator.reduce(torch.stack(list(sums.values())), reduction="sum").tolist()
            for name, (total, count) in zip(sums, totals, strict=True):
                if count:
                    metrics[name] = [total / count]
            sums.clear()
        if self._mode == "train" and self._steps_without_gradient >= max(self.args.logging_steps, _ENOUGH_STEPS):
            self.warn_once(
                "The gradient of the policy is exactly 0, and has been for a whole logging interval: it learns "
                "nothing. Usual causes: rewards that are all the same, advantages that are all 0, a mask that leaves "
                "no token."
            )
        if self._name_in_stage is None:
            return super().log(logs, *args, **kwargs)
        for name in list(metrics):
            metrics[self._name_in_stage(name)] = metrics.pop(name)
        prefix = "eval_" if self._mode == "eval" else ""
        logs = {
            name if name == "epoch" else prefix + self._name_in_stage(name.removeprefix(prefix)): value
            for name, value in logs.items()
        }
        super().log(logs, *args, **kwargs)
        table = Path(str(self.args.output_dir), "completions", f"completions_{self.state.global_step:05d}.parquet")
        if self.log_completions and self.is_world_process_zero() and table.exists():
            table.rename(table.with_name(f"{self._stage}_{self.state.global_step:05d}.parquet"))

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

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._saved_beside is None else str(self._saved_beside)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self._saved_beside is None:  # else it is pushed from its place
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial):
        run = Path(self._get_output_dir(trial=trial))
        place = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with saved_whole(place, self) as folder:
            if not self.args.save_only_model:
                save_rollout(self, folder)
                self.save_training_state(folder)
            super()._save_checkpoint(model, trial)
            best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best == place or best.is_dir():  # TRL has looked for it beside
                self.state.best_model_checkpoint = str(best)
                if self.args.should_save:
                    self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(place))
        if self.args.should_save:
            rotate_checkpoints(str(run), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)

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

    def _load_best_model(self):
        super()._load_best_model()
        self.load_networks(Path(str(self.state.best_model_checkpoint)))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resume_from = checkpoint

    def create_model_card(self, *args, **kwargs):
        """As TRL's, plus the settings that say how credit was assigned."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_credit_section(Path(str(self.args.output_dir), "README.md"), self, CreditConfig)


def critic_source(model):
    """What a copy of a policy's checkpoint is loaded from: its path or Hub id, or else the model itself."""
    if isinstance(model, str):
        return model
    base = model.get_base_model() if is_peft_model(model) else model
    return get_config_model_id(base.config) or base
