"""Checks of what TRL's loss reads, when, and what follows from it."""

import contextlib
from collections import defaultdict

import pytest
import torch

from trl_credit.seam.versions import HAS_TILED_HEAD
from trl_credit.trainers.grpo_lambda.grpo_lambda_config import TRACED_LOSS_TYPES

from .run import FORWARD, check, loss_inputs, loss_of


@check
def log_probabilities_come_from_the_hidden_states(run):
    kept, inputs = {}, loss_inputs(run)
    hook = run.trainer.model.base_model.register_forward_hook(
        lambda module, args, output: kept.update(states=output.last_hidden_state)
    )
    try:
        loss_of(run, inputs)
    finally:
        hook.remove()
    assert "states" in kept, "the hidden states of a loss are not those of `base_model`"
    ids = inputs["completion_ids"]
    logits = run.trainer.model.get_output_embeddings()(kept["states"][:, -ids.shape[1] - 1 : -1]) / 0.7
    expected = logits.log_softmax(-1).gather(2, ids.unsqueeze(2)).squeeze(2)
    assert torch.allclose(run.all_calls[FORWARD][-1].result[0], expected, atol=1e-4), (
        "log-probabilities are not the softmax of LM head · `base_model` / `temperature`"
    )


@check
def networks_beside_the_policy_have_log_probabilities_without_logits(run):
    if not HAS_TILED_HEAD:
        return
    model, ids = run.trainer.model, loss_inputs(run)["completion_ids"]
    tokens = ids.roll(1, 1)
    tokens[:, 1] = -100
    try:
        found = model(input_ids=ids, shift_labels=tokens, fused_lm_head=True).log_probs
    except (TypeError, AttributeError) as error:
        raise AssertionError(
            f"`add_fused_lm_head` does not make a forward with `shift_labels` and `fused_lm_head`: {error}"
        ) from error
    logits = model(input_ids=ids).logits / 0.7
    expected = logits.log_softmax(-1).gather(2, tokens.clamp(min=0).unsqueeze(2)).squeeze(2)
    assert torch.allclose(found, torch.where(tokens == -100, 0, expected), atol=1e-4), (
        "`log_probs` of a `fused_lm_head` are not those of `shift_labels`, 0 where they are -100"
    )


@check
def loss_reads_its_terms_after_the_log_probabilities(run):
    events = []

    class Inputs(dict):
        def __getitem__(self, key):
            events.append(key)
            return super().__getitem__(key)

        def get(self, key, default=None):
            events.append(key)
            return super().get(key, default)

        def __contains__(self, key):
            events.append(key)
            return super().__contains__(key)

    inputs = Inputs(loss_inputs(run))
    inputs["sampling_per_token_logps"] = inputs["old_per_token_logps"]
    trainer = run.trainer
    forward = trainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (events.append("logps"), forward(*a, **k))[1]
    events.clear()
    try:
        loss_of(run, inputs, off_policy_mask_threshold=1.0)
    finally:
        del trainer._get_per_token_logps_and_entropies
    assert events.count("logps") == 1, (
        f"`_compute_loss` calls `_get_per_token_logps_and_entropies` {events.count('logps')} times"
    )
    before, after = events[: events.index("logps")], events[events.index("logps") :]
    for key in ("completion_ids", "completion_mask", "tool_mask"):
        assert key in before, f"`_compute_loss` does not read `{key}`"
    for key in ("advantages", "old_per_token_logps", "sampling_per_token_logps", "ref_per_token_logps"):
        assert key in after, f"`_compute_loss` does not read `{key}`"
        assert key not in before, f"`_compute_loss` reads `{key}` before the log-probabilities are known"


@check
def loss_takes_advantages_per_token(run):
    inputs = loss_inputs(run)
    per_token = inputs["advantages"].unsqueeze(1).expand(inputs["completion_ids"].shape)
    try:
        losses = loss_of(run, inputs), loss_of(run, inputs | {"advantages": per_token})
    except (RuntimeError, IndexError) as error:
        raise AssertionError(f"`_compute_loss` refuses `advantages` of shape (B, T): {error}") from error
    assert losses[0] == pytest.approx(losses[1]), "`_compute_loss` reads `advantages` of shape (B, T) in another way"


@check
def loss_follows_the_attributes_that_we_set_or_read(run):
    inputs = loss_inputs(run)
    loss = loss_of(run, inputs)
    others = {
        "beta": 0.0,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "top_entropy_quantile": 0.5,
        "off_policy_mask_threshold": -1.0,
        "epsilon_low": 0.5,
        "epsilon_high": 0.05,
        "importance_sampling_level": "sequence",
        "loss_type": "sapo",
    }
    for name, value in others.items():
        with contextlib.suppress(TypeError):  # followed in one place and not in another
            if loss_of(run, inputs, **{name: value}) != loss:
                continue
        raise AssertionError(f"`_compute_loss` does not follow `{name}`")
    default = run.trainer.args.use_bias_correction_kl
    run.trainer.args.use_bias_correction_kl = not default
    corrected = loss_of(run, inputs)
    run.trainer.args.use_bias_correction_kl = default
    assert corrected != loss, "`_compute_loss` does not follow `use_bias_correction_kl`"


@check
def loss_types(run):
    inputs = loss_inputs(run)
    for name in TRACED_LOSS_TYPES:
        try:
            loss_of(run, inputs, loss_type=name)
        except ValueError as error:
            raise AssertionError(f"`loss_type` `{name}` is gone: {error}") from error


@check
def metrics(run):
    inputs, expected = loss_inputs(run), {}
    expected["grpo"] = {"kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}
    expected["cispo"] = {"kl", "cispo_clip_ratio"}
    for loss_type, names in expected.items():
        found = {"train": defaultdict(list)}
        loss_of(run, inputs, loss_type=loss_type, _metrics=found)
        assert found["train"], "`_metrics` of the trainer is not where the loss puts its metrics"
        for name in names:
            assert len(found["train"][name]) == 1, f"the metric `{name}` of `loss_type={loss_type}` is gone"
        strange = {name for name in found["train"] if "clip_ratio" in name} - names
        assert strange <= {"clip_ratio/low_min", "clip_ratio/high_max"}, f"a new `clip_ratio` metric: {strange}"
    run.trainer._metrics["train"] = defaultdict(list, {"ours": [1.0, 2.0]})
    run.trainer.log(logs := {})
    assert logs.get("ours") == 1.5, "`log` does not log the means of `_metrics`"
