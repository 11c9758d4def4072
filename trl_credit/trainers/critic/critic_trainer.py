import copy
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, is_peft_model
from torch import nn
from transformers import ProcessorMixin, Trainer
from transformers.training_args import OptimizerNames

from ...critics.card import loading_code, push_critic, write_critic_card
from ...critics.critic import PROMPTS, ROWS, Critic, Runner
from ...critics.engine.engine import CriticEngine, CriticOptimization, seeded
from ...critics.facts import PROBE, CriticFacts, fingerprint
from ...critics.freezing import freeze
from ...critics.fresh_head import answers_everywhere, trained_head
from ...critics.refusals import refuse_image_columns, refuse_other_vocabulary
from ...critics.shared_base import make_shared_base_critic
from ...critics.token import make_token_critic
from ...seam.trainer import critic_source
from .bounds import BoundsOfValues
from .critic_config import CriticConfig
from .pretraining import CRITIC_FOLDER
from .symptoms import Symptoms


# An AdamW step moves every weight by the rate, and with it a value by about the rate times the width: that is to be the
# same for all widths. Measured: docs/results/critic_rates.md.
HIGHEST_RATE, RATE_TIMES_WIDTH = 1e-3, 0.1


class CriticTrainer(BoundsOfValues):
    """
    A trainer with a critic beside the policy, which it creates, pretrains, updates, saves and resumes. Subclasses say
    what network the critic is, what its loss is and, in `assign_credit`, how its values are used.
    """

    args: CriticConfig
    critic: Any
    processing_class: Any
    config_class: type[CriticConfig] = CriticConfig
    critic_kind: str  # see [`~trl_credit.critics.facts.CriticFacts`]
    folders_of_networks = (CRITIC_FOLDER,)

    def __init__(self, model, reward_funcs=None, args=None, *rest, critic=None, critic_peft_config=None, **kwargs):
        policy = model
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        _refuse_processor(self.processing_class)
        for dataset in (self.train_dataset, self.eval_dataset):
            refuse_image_columns(dataset)
        if critic is not None and self.args.critic_model_name_or_path is not None:
            raise ValueError(
                f"The critic is given twice: `critic` and `critic_model_name_or_path="
                f"{self.args.critic_model_name_or_path!r}`. Drop one of them."
            )
        if critic_peft_config is not None and self.args.critic_peft_config is not None:
            raise ValueError("`critic_peft_config` is given twice: to the trainer and in its config. Drop one of them.")
        if critic_peft_config is None and self.args.critic_peft_config is not None:
            from peft import LoraConfig

            critic_peft_config = LoraConfig(**self.args.critic_peft_config)  # type: ignore[arg-type]
        critic = critic if critic is not None else self.args.critic_model_name_or_path
        # What the critic that this run starts from was trained with, if it says so.
        self._source_facts = None
        if critic != PROBE:
            self._source_facts = CriticFacts.load(critic, self.args.critic_model_init_kwargs)  # type: ignore[arg-type]
        self.critic_kind = self.kind_of(critic, self._source_facts)
        if self._source_facts is not None:
            self.args = self._source_facts.applied_to(self.args, self.critic_kind, critic)
        self._range = self.of_critic.range_to_begin_with()
        if self.args.critic_share_base:
            _refuse_split_base(self.accelerator)
        if getattr(self.args, "critic_prompt_template", None) is not None and self.environment_factories is not None:
            raise ValueError(
                "`environment_factory` adds to the prompts what a critic with a `critic_prompt_template` does not see. "
                "Leave one of them out."
            )
        _optimizer_of(self.args)  # refused before anything is loaded
        self._deciding = self._deciding_functions()
        with seeded(self.args.seed):
            self.critic = self.of_critic.make_critic(policy, critic, critic_peft_config)
        if self.args.critic_freeze is not None:
            freeze(self.critic, self.args.critic_freeze, self.critic_head())
        self._engine: CriticEngine | None = None
        self.add_callback(Symptoms(self))
        self._critic_reader: Critic | None = None

    # --- What a subclass says

    @property
    def of_critic(self) -> Any:
        """
        Whose the hooks below are, about what the critic is and does: this trainer's, for a network beside the policy.
        """
        return self

    def kind_of(self, critic: Any, facts: CriticFacts | None) -> str:
        """The kind of critic that there will be, from the trainer's `critic` argument and what that says of itself."""
        if critic == PROBE:
            raise ValueError(
                f"`critic={PROBE!r}` is for critics that give numbers; a {type(self).__name__} needs one of kind "
                f"{self.critic_kind!r}. (A folder of that name is {f'./{PROBE}'!r}.)"
            )
        return self.critic_kind

    def make_critic(self, policy, critic, peft_config) -> nn.Module:
        """The network, from the trainer's `critic` argument, or from the policy if that is None."""
        raise NotImplementedError

    def make_critic_reader(self, runner: Runner) -> Critic:
        """What the network is asked and how its answers are read."""
        raise NotImplementedError

    def critic_loss(self, network: nn.Module, inputs: dict) -> torch.Tensor:
        """Sum of the critic's loss over what counts in a micro-batch."""
        raise NotImplementedError

    def critic_count(self, inputs: dict) -> torch.Tensor:
        """How much counts in it."""
        raise NotImplementedError

    def critic_batches(self, micro_batches: list[dict]) -> list[dict]:
        """
        What is in the micro-batches of an optimizer step, as the critic is trained on it: as many batches on every
        process. The sums of loss and count over all of them are what matters, not what is in which.
        """
        return micro_batches

    @property
    def sequences_at_once(self) -> int:
        """Sequences that the critic may read at a time, however long they are."""
        return self.args.per_device_train_batch_size if self.args.critic_update_batch_tokens is None else 1

    def critic_head(self) -> dict[str, Any]:
        """Parameters of the critic that are trained at `critic_head_learning_rate`, by name."""
        return trained_head(self.critic)

    def critic_learning_rates(self) -> tuple[float, float]:
        """Those of what is below the critic's head, and of the head."""
        rate, head_rate = self.args.critic_learning_rate, self.args.critic_head_learning_rate
        widths = [getattr(p, "ds_shape", p.shape)[-1] for p in self.critic_head().values() if p.dim() > 1]
        default = min(HIGHEST_RATE, RATE_TIMES_WIDTH / widths[0]) if widths else 0.0
        rate = default if rate is None else rate
        return rate, (rate and max(rate, default)) if head_rate is None else head_rate

    def describe_critic(self) -> str:
        """What the critic is and how to read its values, in Markdown for its model card."""
        return (
            "A value model: for every token of a prompt and completion it gives the reward that the policy is expected "
            "to end\nwith. The value of the state in which token t is chosen is the output at the token before it.\n\n"
            f"```python\n{loading_code(self.critic)}\noutputs = critic(input_ids).logits.squeeze(-1)\n"
            f"values = {self._values_as_code('outputs')}\n```"
        )

    def _values_as_code(self, outputs: str) -> str:
        if self.value_range is None:
            return outputs
        low, high = self.value_range
        return f"{low:g} + {high - low:g} * {outputs}.sigmoid()"

    def critic_settings(self) -> dict[str, Any]:
        """The config options that determine what the critic is asked and how its answers are read."""
        return {"reward_range": None if self._range is None else list(self._range)}

    def critic_options(self) -> list[str]:
        """The config options that say how the critic is trained, for its model card."""
        return [name for name in sorted(vars(self.args)) if name.startswith("critic_")]

    def critic_facts(self) -> CriticFacts:
        """What the critic is, for whatever loads it."""
        config = self.critic.config.get_text_config()
        return CriticFacts(
            self.critic_kind,
            self.critic_settings(),
            context=getattr(config, "max_position_embeddings", None),
            tokenizer=fingerprint(self.critic_processing_class),
            own_tokenizer=self.critic_processing_class is not self.processing_class,
            vocabulary_size=config.vocab_size,
            updates=self.updates_of_critic,
        )

    # --- The critic in the run

    @property
    def updates_of_critic(self) -> int:
        """Updates of the critic so far, those of earlier runs among them."""
        earlier = 0 if self._source_facts is None else self._source_facts.updates
        return earlier + self.engine.steps

    def make_value_model(self, policy, critic, peft_config) -> nn.Module:
        """A network with one number for each token. A fresh head waits for the first rollout, or starts as asked."""
        asked = self.args.critic_initial_value
        start = 0.0 if asked is None else self.head_output(asked)
        if self.args.critic_share_base:
            network = make_shared_base_critic(self.model, critic, start, peft_config)
        else:
            source, init_kwargs = self.critic_checkpoint(policy, critic)
            network = make_token_critic(source, start, peft_config, init_kwargs)
            if self.critic_kind == "token":
                reader = self.accelerator.unwrap_model(self.model)
                refuse_other_vocabulary(network, critic, reader, self.processing_class)
        is_fresh = answers_everywhere(network, start)
        if asked is not None and not is_fresh:
            raise ValueError(
                f"`critic_initial_value={asked}` has no effect: the critic comes with a head, which is left as it is. "
                "Drop it."
            )
        self._head_waits = asked is None and is_fresh
        return network

    def critic_checkpoint(self, policy, critic) -> tuple[Any, dict | None]:
        """What a critic with its own base starts from, by default the policy's checkpoint, and how to load it."""
        init_kwargs: Any = self.args.critic_model_init_kwargs
        if critic is not None:
            return critic, init_kwargs
        model = self.accelerator.unwrap_model(self.model)
        in_memory = not isinstance(policy, str) and getattr(model.config, "quantization_config", None) is None
        if in_memory:  # its own weights, which need not be those of the checkpoint that it was loaded from
            return without_adapters(model), {"dtype": "float32", **(init_kwargs or {})}
        source = critic_source(policy)
        if isinstance(source, str):  # loaded as the policy was: its revision, attention, ...
            shared: Any = self.args.model_init_kwargs or {}
            shared = {name: value for name, value in shared.items() if value is not None}
            shared.pop("quantization_config", None)
            init_kwargs = {**shared, **(init_kwargs or {})}
        return source, init_kwargs

    @property
    def critic_processing_class(self):
        """The critic's tokenizer, which is saved beside it."""
        return self.processing_class

    @property
    def engine(self) -> CriticEngine:
        """The critic's engine. It is created when first needed, because the policy's must exist before it."""
        if self._engine is None:
            self._engine = self.of_critic.make_engine()
            self.critic = self._engine.network
        return self._engine

    def make_engine(self) -> CriticEngine:
        """What runs and trains the critic, when the policy's engine is there."""
        checkpointing = self.args.critic_gradient_checkpointing
        optimizer, optimizer_kwargs = _optimizer_of(self.args)
        rate, head_rate = self.critic_learning_rates()
        return CriticEngine(
            self.critic,
            self.accelerator,
            CriticOptimization(
                learning_rate=rate,
                head=frozenset(self.critic_head()),
                head_learning_rate=head_rate,
                optimizer=optimizer,
                optimizer_kwargs=optimizer_kwargs,
                scheduler=self.args.critic_lr_scheduler_type,
                warmup_steps=self.args.critic_warmup_steps,
                scheduler_kwargs=self.args.critic_lr_scheduler_kwargs,  # type: ignore[arg-type]
                weight_decay=self.args.critic_weight_decay,
                max_grad_norm=self.args.critic_max_grad_norm,
                gradient_checkpointing=self.args.gradient_checkpointing if checkpointing is None else checkpointing,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,  # type: ignore[arg-type]
                offload=self.args.critic_offload,
            ),
        )

    @property
    def critic_reader(self) -> Any:
        """The network as a [`~trl_credit.critics.critic.Critic`], created together with the engine that runs it."""
        if self._critic_reader is None:
            self._critic_reader = self.of_critic.make_critic_reader(self.engine)
        return self._critic_reader

    def with_prompts(self, rollout: dict) -> dict:
        """The latest rollout with its rows of the dataset and their prompts, for critics that read them."""
        return {PROMPTS: [row["prompt"] for row in self.rollout_rows], ROWS: self.rollout_rows, **rollout}

    def state_values(self, rollout: dict) -> torch.Tensor:
        """
        The critic's values of all states of a rollout, as `assign_credit` uses them. The run is not affected.

        Args:
            rollout (`dict`):
                As [`~trl_credit.critics.critic.Critic.state_values`] takes it. `prompts` may be left out for the latest
                rollout of this process.

        Returns:
            `torch.Tensor`: `(B, T + 1)`, float32, NaN where the critic has no answer.
        """
        return self.critic_reader.state_values(self.with_prompts(rollout))

    def update_critic(self, micro_batches: list[dict], prefix: str = "critic") -> dict[str, float] | None:
        """One update on the micro-batches of an optimizer step."""
        started = time.perf_counter()
        result = self.engine.update(self.critic_batches(micro_batches), self.critic_loss, self.critic_count)
        if result is not None:
            for name, value in result.items():
                self.log_value("train", f"{prefix}/{name}", value)
            self.log_value("train", f"{prefix}/update_time", time.perf_counter() - started)
        return result

    def finish_step(self, micro_batches: list[dict]) -> None:
        for _ in range(self.args.critic_updates_per_step):
            self.update_critic(micro_batches)

    # --- What is right

    @property
    def right_by(self) -> str:
        """The reward functions that say whether a completion is right."""
        names = [repr(self.reward_func_names[i]) for i in self._deciding] or ["the sum of all rewards"]
        return " and ".join(names)

    def _deciding_functions(self) -> list[int]:
        """Which reward functions say whether a completion is right."""
        names, asked = list(self.reward_func_names), self.args.positive_reward_funcs
        if asked is not None:
            unknown = [name for name in asked if name not in names]
            if unknown or not asked:
                raise ValueError(f"`positive_reward_funcs={asked!r}` must be some of the reward functions, {names}.")
            return [names.index(name) for name in asked]
        return [i for i, weight in enumerate(self.reward_weights.tolist()) if weight > 0]

    def is_right(self, rewards: torch.Tensor, threshold: float) -> torch.Tensor:
        """
        Which completions of the latest rollout are right: each deciding reward function would put the reward above the
        threshold if all others agreed with it. The credit log is told, too.

        Args:
            rewards (`torch.Tensor`):
                Weighted sums, shape `(B,)`, NaN for none.
            threshold (`float`):
                On their scale.

        Returns:
            `torch.Tensor`: Shape `(B,)`, boolean; False where no deciding function gave a score.
        """
        if len(self.reward_func_names) == 1 or not self._deciding:
            judged, right = rewards.isfinite(), torch.nan_to_num(rewards, nan=-torch.inf) > threshold
        else:
            scores = self.reward_scores[:, self._deciding]
            total_weight = self.reward_weights.clamp(min=0).sum().to(scores.device)
            above = (scores * total_weight > threshold) | scores.isnan()
            judged = ~scores.isnan().all(1)
            right = above.all(1) & judged
        self.add_credit(
            "right", [x if known else None for x, known in zip(right.tolist(), judged.tolist(), strict=True)]
        )
        self.add_credit("right_by", [f"{self.right_by} above {threshold:g}"] * len(right))
        return right

    # --- The run

    def begin_training(self, checkpoint: str | None) -> None:
        self._announce(
            f"Which completions are right is decided by {self.right_by}"
            + (", each of which must say so" if len(self._deciding) > 1 else "")
            + " (`positive_reward_funcs`)."
        )
        if checkpoint is None:
            self.drop_the_best()  # of an earlier run
        else:
            facts = CriticFacts.load(Path(checkpoint) / CRITIC_FOLDER)
            self.take_range(facts)
            if facts is not None:
                facts.refuse_other_run(self.critic_kind, self.of_critic.critic_settings(), checkpoint)
            self._pretraining |= self.engine.load_state(checkpoint, Path(checkpoint) / CRITIC_FOLDER)
            self._head_waits = bool(self._pretraining.pop("head_waits", 0))
        pretraining_steps = self.updates_of_pretraining(is_resumed=checkpoint is not None)
        self.engine.begin(pretraining_steps + self.state.max_steps * self.args.critic_updates_per_step)
        if not self._pretraining["pretraining_done"]:
            self._pretrain(checkpoint, pretraining_steps)
        self.drop_the_best()  # only now that no checkpoint needs it

    # --- Saving

    def save_critic(self, folder: str | Path) -> None:
        """Save the critic in plain `save_pretrained` form. Every process must call this."""
        self.engine.save(folder)
        if self.accelerator.is_main_process:
            self.critic_processing_class.save_pretrained(folder)
            self.of_critic.critic_facts().save(folder)
            write_critic_card(Path(folder), self)

    def save_networks(self, folder: Path) -> None:
        self.save_critic(folder / CRITIC_FOLDER)

    def load_networks(self, folder: Path) -> None:
        self.engine.go_back(folder, folder / CRITIC_FOLDER)
        self.take_range(CriticFacts.load(folder / CRITIC_FOLDER))

    def save_training_state(self, folder: Path) -> None:
        self.engine.save_state(folder, **self._pretraining, head_waits=int(self._head_waits))

    def push_to_hub(self, *args, **kwargs):
        """As TRL's; the critic is pushed too, as the folder `critic` or to its own repository."""
        result = super().push_to_hub(*args, **kwargs)
        if self.args.critic_hub_model_id is not None and self.accelerator.is_main_process:
            push_critic(Path(str(self.args.output_dir)) / CRITIC_FOLDER, self.args.critic_hub_model_id, self.args)
        return result


def without_adapters(model: Any) -> Any:
    """A model whose adapters, if it has any, are merged into a copy of it; the model itself is not changed."""
    return copy.deepcopy(model).merge_and_unload() if is_peft_model(model) else model


def _optimizer_of(args: CriticConfig) -> tuple[type[torch.optim.Optimizer], dict]:
    """Class and arguments of the critic's optimizer, by the names that the policy's has."""
    name, optim_args = args.critic_optim, args.critic_optim_args
    ours: Any = copy.copy(args)
    ours.optim, ours.optim_args = OptimizerNames(name), None
    if name.startswith("schedule_free"):
        raise ValueError(f"`critic_optim={name!r}` has weights of its own to evaluate, which a critic does not use.")
    try:
        _, plain = Trainer.get_optimizer_cls_and_kwargs(ours)
    except (ImportError, ValueError) as error:  # of a library that is not installed
        raise ValueError(f"`critic_optim={name!r}` cannot be used here: {error}") from error
    ours.optim_args = optim_args
    optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(ours)
    if optim_args is not None and kwargs == plain:
        raise ValueError(f"`critic_optim_args={optim_args!r}` has no effect on `critic_optim={name!r}`. Drop it.")
    if unfit := {"params", "model", "optimizer_dict"} & kwargs.keys():
        raise ValueError(
            f"`critic_optim={name!r}` picks the weights that it trains by itself ({unfit}), which a critic cannot "
            "have. Choose another."
        )
    return optimizer, {key: value for key, value in kwargs.items() if key != "lr"}


def _refuse_processor(processing_class) -> None:
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"The policy is read with a {type(processing_class).__name__}, as a vision-language model is, and the "
            "critic reads text only. Train it with `GRPOTrainer` or `GRPOLambdaTrainer`; or on text alone, with its "
            "tokenizer as `processing_class`."
        )


def _refuse_split_base(accelerator) -> None:
    kind = accelerator.distributed_type
    if kind != DistributedType.NO and not kind.name.startswith("MULTI_"):
        raise ValueError(
            f"`critic_share_base=True` works on one process and with DDP, got {kind.value}, which takes hold of a "
            "network's weights. Give the critic a base of its own with `critic_peft_config` alone."
        )
