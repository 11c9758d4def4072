"""The policy's vLLM, lent to a network that is trained beside it."""

from typing import Any

from accelerate.utils import is_peft_model
from torch import nn
from trl.generation.vllm_generation import VLLMGeneration


# Of a model's config, what vLLM does not build the model by.
_NO_PART_OF_THE_MODEL = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "pad_token_id",
    "transformers_version",
    "use_cache",
}


def why_not_lent(policy: nn.Module, network: nn.Module) -> str | None:
    """
    Why the policy's engine cannot take the weights of another network; `None` if it can.

    Args:
        policy, network (`PreTrainedModel` or `PeftModel`):
            Not wrapped.
    """
    own, other = _config_of(policy), _config_of(network)
    if "quantization_config" in own:
        return "the policy is quantized"
    if different := sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name)):
        return f"its architecture is not the policy's ({', '.join(different[:3])} differ)"
    return None


class LentEngine(VLLMGeneration):
    """
    The policy's engine with the weights of another network. Call `sync_weights` before each `generate`: the policy's
    weights are lost by that, and come back before the policy generates again.

    Args:
        trainer ([`CreditTrainer`]):
            The trainer, whose policy generates with vLLM.
        network (`nn.Module`):
            A network for which [`why_not_lent`] knows no reason.
        processing_class (`PreTrainedTokenizerBase`):
            Its tokenizer.
        settings:
            Of its generation, see [`~trl.generation.vllm_generation.VLLMGeneration`].
    """

    def __init__(self, trainer: Any, network: nn.Module, processing_class: Any, **settings: Any):
        self._trainer, self._owner = trainer, trainer.vllm_generation
        super().__init__(
            model=network,  # type: ignore[arg-type]
            accelerator=trainer.accelerator,
            processing_class=processing_class,
            mode=self._owner.mode,
            tensor_parallel_size=self._owner.tensor_parallel_size,
            enable_sleep_mode=self._owner.enable_sleep_mode,
            **settings,
        )

    def _init_vllm(self):
        for name in ("llm", "tp_group", "vllm_client"):  # those that there are
            if hasattr(self._owner, name):
                setattr(self, name, getattr(self._owner, name))

    def sync_weights(self):
        """As TRL's. The policy's weights have to be loaded again before it generates."""
        self._trainer._last_loaded_step = -1
        super().sync_weights()

    def generate(self, *args, **kwargs):
        """As TRL's, with the weights of the last `sync_weights`."""
        written = super().generate(*args, **kwargs)
        if self.enable_sleep_mode:  # which it has gone to by now, and knows by this
            self._owner._llm_weights_sleeping = True
        return written


def _config_of(model: Any) -> dict:
    base = model.get_base_model() if is_peft_model(model) else model
    return {key: value for key, value in base.config.to_dict().items() if key not in _NO_PART_OF_THE_MODEL}
