"""What the reference model makes of a rollout, overheard in the forward pass that the KL penalty needs anyway."""

from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import trl.trainer.utils as trl_utils
from accelerate.utils import is_peft_model
from torch import nn

from .recording import RecordingSeam
from .versions import refuse_before_tiles


class Reading(NamedTuple):
    """
    What a model makes of a rollout.

    Args:
        states (`dict[int, torch.Tensor]`):
            By layer the hidden states from which each token was chosen, shape `(B, T, H)`, or `(B, 1, H)` with
            `first_only`, on the host, in the model's dtype.
        logps (`torch.Tensor`):
            Log-probabilities of the tokens, shape `(B, T)`, float32.
        entropy (`torch.Tensor`):
            Entropies of the distributions that they were chosen from, shape `(B, T)`, float32.
    """

    states: dict[int, torch.Tensor]
    logps: torch.Tensor
    entropy: torch.Tensor


class ReferenceSeam(RecordingSeam):
    """The part of [`CreditTrainer`] that listens to the reference model."""

    _reference_layers: tuple[int, ...] | None = None  # see `listen_to_reference`
    _first_only = False
    _reading: tuple[torch.Tensor, Reading] | None = None  # of the latest rollout, with the token ids that were read

    def listen_to_reference(self, layers: tuple[int, ...], first_only: bool = False) -> None:
        """
        From now on keep what the reference makes of a rollout until its credit is assigned.

        Args:
            layers (`tuple[int, ...]`):
                Whose states are kept: 0 is the embedding, -1 what the LM head reads.
            first_only (`bool`, *optional*, defaults to `False`):
                Keep only the state at the end of the prompt.

        Raises:
            ValueError: If there is no reference, for `beta` is 0; if the policy has no such layer, or its layers are
                not where they are in most models.
        """
        refuse_before_tiles("Listening to the reference model")
        if self.beta == 0:
            raise ValueError("There is no reference model to listen to with `beta=0.0`. Set `beta`, e.g. to 0.03.")
        for layer in layers:
            module_of_layer(self._causal_lm(), layer)
        self._reference_layers, self._first_only = layers, first_only
        if self.ref_model is not None:  # of which TRL wants no entropies; of the policy it does
            trl_utils.add_fused_lm_head(
                self.accelerator.unwrap_model(self.ref_model),
                temperature=self.temperature,
                cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32,
                outputs=("log_probs", "entropy"),
            )

    def read_with_reference(self, rollout: dict) -> Reading:
        """
        What the reference makes of completions. For the rollout whose credit is being assigned it is known from the
        pass that TRL makes for the KL penalty; for others it takes a pass, on every process. Call
        [`listen_to_reference`] first.

        Args:
            rollout (`dict`):
                TRL's, or `prompt_ids`, `prompt_mask`, `completion_ids` and `completion_mask` like it.
        """
        device = self.accelerator.device
        ids, mask = (
            torch.cat([rollout[f"prompt_{what}"], rollout[f"completion_{what}"]], dim=1).to(device)
            for what in ("ids", "mask")
        )
        if self._reading is not None and torch.equal(self._reading[0], ids):
            return self._reading[1]
        kept, self._reading = self._reading, None
        adapters: Any = nullcontext()
        if self.ref_model is None:
            policy = self.accelerator.unwrap_model(self.model)
            adapters = trl_utils.use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None)
        with torch.no_grad(), adapters:
            self._get_per_token_logps_and_entropies(
                self.model if self.ref_model is None else self.ref_model,
                ids,
                mask,
                rollout["completion_ids"].shape[1],
                batch_size=self.args.per_device_train_batch_size,
            )
        assert self._reading is not None
        (_, reading), self._reading = self._reading, kept
        return reading

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        forward = super()._get_per_token_logps_and_entropies
        # Where adapters are switched off for the reference, its pass is the last one of a rollout.
        is_reference = self.ref_model is None or model is self.ref_model
        if self._reference_layers is None or self._loss is not None or not is_reference:
            return forward(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        unwrapped: Any = self.accelerator.unwrap_model(model)
        with overheard(unwrapped, self._reference_layers, logits_to_keep, self._first_only) as heard:
            outputs = forward(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        whole = {name: torch.cat(parts) for name, parts in heard.items()}
        reading = Reading({layer: whole[layer] for layer in self._reference_layers}, whole["logps"], whole["entropy"])
        self._reading = input_ids, reading
        return outputs


@contextmanager
def overheard(model: Any, layers: tuple[int, ...], length: int, first_only: bool = False):
    """
    Keep what a model's forward passes say of the last `length` tokens, chunk by chunk.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            A causal LM, not wrapped.
        layers (`tuple[int, ...]`):
            As in [`ReferenceSeam.listen_to_reference`].
        length (`int`):
            T.
        first_only (`bool`, *optional*, defaults to `False`):
            Keep only the state from which the first of them was chosen.

    Yields:
        `dict`: Lists of states by layer, and, if TRL has put its own loss into the model's forward, `"logps"` and
        `"entropy"`.
    """
    model = model.get_base_model() if is_peft_model(model) else model
    heard: dict[Any, list[torch.Tensor]] = {name: [] for name in (*layers, "logps", "entropy")}

    def keep_states(layer):
        def keep(module, args, output):
            states = getattr(output, "last_hidden_state", output)
            states = states[0] if isinstance(states, tuple) else states
            states = states.detach()[:, -length - 1 : -1]
            # A copy on the host: on the device all layers of a whole rollout would be in the way of its generation.
            heard[layer].append(states[:, : 1 if first_only else length].to("cpu", copy=True))

        return keep

    def keep_outputs(module, args, output):
        if getattr(output, "log_probs", None) is not None:
            heard["logps"].append(output.log_probs.detach()[:, -length:].float())
            heard["entropy"].append(output.entropy.detach()[:, -length:].float())

    handles = [model.register_forward_hook(keep_outputs)]
    handles += [module_of_layer(model, layer).register_forward_hook(keep_states(layer)) for layer in layers]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def module_of_layer(model: Any, layer: int) -> nn.Module:
    """
    What puts out the states of a layer of a causal LM.

    Raises:
        ValueError: If the model has no such layer, or its layers are not where they are in most models.
    """
    number = model.config.get_text_config().num_hidden_layers
    if not -number - 1 <= layer <= number:
        raise ValueError(f"A {type(model).__name__} has layers 0 (its embedding) to {number}; {layer} is asked for.")
    layer %= number + 1
    if layer == 0:
        return model.get_input_embeddings()
    if layer == number:
        return model.base_model  # whose last states are after the last norm
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module[layer - 1]
    raise ValueError(
        f"The {number} layers of a {type(model).__name__} are in no list of that length: of its states only those of "
        "layer 0 and layer -1 are known."
    )
