"""GRPO-λ as a trainer, against the paper's equations written out densely in float64."""

import pytest
import torch
from datasets import Dataset
from test_traces import dense_trace

from trl_credit import GRPOLambdaConfig, GRPOLambdaTrainer


ROWS, PROMPT, LENGTH = 4, 5, 12
EPSILON, EPSILON_HIGH = 0.2, 0.28


def make_trainer(model_dir, tmp_path, **settings):
    config = GRPOLambdaConfig(
        str(tmp_path),
        **{
            "per_device_train_batch_size": ROWS,
            "num_generations": ROWS,
            "max_completion_length": LENGTH,
            "bf16": False,
            "report_to": [],
            "epsilon": EPSILON,
            "epsilon_high": EPSILON_HIGH,
            **settings,
        },
    )
    trainer = GRPOLambdaTrainer(
        model=model_dir,
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["a", "b", "c", "d"]}),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # as Trainer sets it before a step
    return trainer


def make_rollout(trainer, off_policy: bool, seed: int = 0) -> dict:
    """Random sequences with left and right padding, a tool gap, a truncated and a masked row, and ratios ≠ 1."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 200, (ROWS, PROMPT + LENGTH), generator=generator)
    prompt_mask = torch.ones(ROWS, PROMPT, dtype=torch.long)
    prompt_mask[1, :3] = 0
    completion_mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    completion_mask[1, 7:] = 0
    completion_mask[3] = 0
    tool_mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    tool_mask[2, 3:6] = 0
    rollout = {
        "prompt_ids": ids[:, :PROMPT],
        "prompt_mask": prompt_mask,
        "completion_ids": ids[:, PROMPT:],
        "completion_mask": completion_mask,
        "tool_mask": tool_mask,
        "advantages": torch.tensor([1.2, -0.7, 0.4, 2.0]),
        "num_items_in_batch": (completion_mask * tool_mask).sum(),
    }
    logps = policy_logps(trainer.model, rollout, trainer.temperature).detach()
    noise = 0.15 * torch.randn(logps.shape, generator=generator, dtype=torch.float64)
    if off_policy:
        rollout["old_per_token_logps"] = (logps + noise).float()
    if trainer.beta:
        rollout["ref_per_token_logps"] = (logps + 2 * noise.flip(1)).float()
    return rollout


def logged(trainer) -> dict:
    """What the trainer would log now."""
    trainer.log(logs := {})
    return logs


def policy_logps(model, rollout, temperature):
    """Log-probabilities of the completion by a plain softmax, in the model's dtype."""
    ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], 1)
    mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, PROMPT - 1 : -1].double() / temperature
    return logits.log_softmax(-1).gather(2, rollout["completion_ids"].unsqueeze(2)).squeeze(2)


def paper_loss(logps, rollout, args, scale: int = 1):
    """The loss of GRPO-λ for each completion token, then TRL's aggregation, all dense and in float64."""
    decay = args.gamma * args.trace_lambda
    mask = (rollout["completion_mask"] * rollout["tool_mask"]).double()
    losses = []
    for b in range(ROWS):
        tokens = mask[b].nonzero()[:, 0]
        trace = dense_trace(len(tokens), decay, args.trace_style, args.trace_floor)
        if args.trace_normalization == "mean":
            trace = trace / (trace.sum() / max(len(tokens), 1))
        logp, advantage = logps[b, tokens], rollout["advantages"][b].double()
        old = rollout["old_per_token_logps"][b, tokens].double() if "old_per_token_logps" in rollout else logp.detach()
        log_ratio, weight = logp - old, 1.0
        if args.trace_update == "trace":
            log_ratio = trace @ log_ratio
        else:
            weight = trace.sum(1) * (1 + torch.sigmoid(logp - 1))
        if args.importance_sampling_level == "sequence":
            log_ratio = log_ratio.mean().expand(len(tokens))
        ratio = log_ratio.exp()
        if args.loss_type == "cispo":
            traced_logp = trace @ logp if args.trace_update == "trace" else logp
            loss = -ratio.clamp(max=args.epsilon_high).detach() * advantage * traced_logp
        elif args.loss_type == "sapo":
            temperature = args.sapo_temperature_pos if advantage > 0 else args.sapo_temperature_neg
            loss = -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantage
        else:
            loss = -torch.min(ratio * advantage, ratio.clamp(1 - EPSILON, 1 + EPSILON_HIGH) * advantage)
        loss = loss * weight
        if args.beta:
            gap = rollout["ref_per_token_logps"][b, tokens].double() - logp
            kl = gap.exp() - gap - 1
            if args.use_bias_correction_kl:
                plain = (logp - old) if args.importance_sampling_level == "token" else (logp - old).mean()
                kl = kl * plain.exp()
            loss = loss + args.beta * kl
        losses.append(loss)
    lengths = mask.sum(1).clamp(min=1)
    sums = torch.stack([loss.sum() for loss in losses])
    return {
        "grpo": (sums / lengths).mean(),
        "sapo": (sums / lengths).mean(),
        "bnpo": sums.sum() / mask.sum(),
        "dr_grpo": sums.sum() / (ROWS * LENGTH),
        "dapo": sums.sum() / mask.sum(),
        "cispo": sums.sum() / mask.sum(),
        "luspo": sums.mean(),
    }[args.loss_type]


def assert_loss_and_gradient_match(trainer, rollout):
    kept = {name: value.clone() for name, value in rollout.items()}
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, rollout)
    loss.backward()
    grads = [p.grad.double().clone() for p in trainer.model.parameters()]
    assert all(torch.equal(kept[name], rollout[name]) for name in kept), "the rollout serves later iterations too"

    trainer.model.zero_grad()
    expected = paper_loss(policy_logps(trainer.model, rollout, trainer.temperature), rollout, trainer.args)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=2e-6)
    for (name, p), grad in zip(trainer.model.named_parameters(), grads, strict=True):
        scale = p.grad.abs().max().item()
        assert (grad - p.grad).abs().max() < 1e-4 * scale + 1e-6, name
    return loss


@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("update", ["trace", "weight"])
@pytest.mark.parametrize("style", ["recent", "both"])
def test_loss_and_gradient_match_the_paper(model_dir, tmp_path, style, update, off_policy):
    trainer = make_trainer(model_dir, tmp_path, trace_lambda=0.9, gamma=0.95, trace_style=style, trace_update=update)
    assert_loss_and_gradient_match(trainer, make_rollout(trainer, off_policy))


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo"])
def test_every_loss_type_sees_the_traced_ratio(model_dir, tmp_path, loss_type):
    high = 5.0 if loss_type == "cispo" else EPSILON_HIGH
    trainer = make_trainer(model_dir, tmp_path, trace_lambda=0.8, loss_type=loss_type, epsilon_high=high)
    assert_loss_and_gradient_match(trainer, make_rollout(trainer, off_policy=True))


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo"])
def test_sequence_level_ratio_is_the_mean_of_the_trace(model_dir, tmp_path, loss_type):
    trainer = make_trainer(
        model_dir, tmp_path, trace_lambda=0.8, importance_sampling_level="sequence", loss_type=loss_type
    )
    assert_loss_and_gradient_match(trainer, make_rollout(trainer, off_policy=True))


@pytest.mark.parametrize("settings", [{"trace_floor": 0.3}, {"trace_normalization": "mean"}, {"trace_lambda": 1.0}])
@pytest.mark.parametrize("update", ["trace", "weight"])
@pytest.mark.parametrize("style", ["recent", "both"])
def test_trace_options_match_the_paper(model_dir, tmp_path, style, update, settings):
    settings = {"trace_lambda": 0.7, "trace_style": style, "trace_update": update, **settings}
    trainer = make_trainer(model_dir, tmp_path, **settings)
    assert_loss_and_gradient_match(trainer, make_rollout(trainer, off_policy=True))


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("update", ["trace", "weight"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo"])
def test_kl_term_is_not_traced(model_dir, tmp_path, update, bias_correction, loss_type):
    trainer = make_trainer(
        model_dir,
        tmp_path,
        trace_lambda=0.9,
        beta=0.3,
        trace_update=update,
        use_bias_correction_kl=bias_correction,
        loss_type=loss_type,
    )
    rollout = make_rollout(trainer, off_policy=True)
    assert_loss_and_gradient_match(trainer, rollout)
    assert trainer.beta == 0.3
    gap = rollout["ref_per_token_logps"].double() - policy_logps(trainer.model, rollout, trainer.temperature)
    kl = gap.exp() - gap - 1
    if bias_correction:
        kl = kl * (policy_logps(trainer.model, rollout, 1.0) - rollout["old_per_token_logps"]).exp()
    mask = rollout["completion_mask"] * rollout["tool_mask"]
    assert logged(trainer)["kl"] == pytest.approx(((kl * mask).sum() / mask.sum()).item(), rel=1e-4)


def test_on_policy_gradient_is_that_of_grpo_with_weighed_tokens(model_dir, tmp_path):
    """Fact: at ratio 1 the ε-trace is GRPO with per-token advantages A · (1 - a^{T-k}) / (1 - a)."""
    traced = make_trainer(model_dir, tmp_path, trace_lambda=0.9)
    rollout = make_rollout(traced, off_policy=False)
    traced._compute_loss(traced.model, rollout).backward()
    grpo = make_trainer(model_dir, tmp_path, trace_lambda=0.0)
    mask = (rollout["completion_mask"] * rollout["tool_mask"]).bool()
    left = mask.flip(1).cumsum(1).flip(1)  # T - k, tool tokens not counted
    weights = (1 - 0.9**left) / (1 - 0.9)
    grpo._compute_loss(grpo.model, {**rollout, "advantages": rollout["advantages"][:, None] * weights}).backward()
    for (name, p), q in zip(traced.model.named_parameters(), grpo.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
    metrics = logged(traced)
    trained = weights[:3].masked_fill(~mask[:3], 0)
    assert metrics["trace/weight_first"] == pytest.approx(trained[:, 0].mean().item(), rel=1e-5)
    assert metrics["trace/weight_mean"] == pytest.approx((trained.sum() / mask.sum()).item(), rel=1e-5)
    assert metrics["trace/weight_last"] == pytest.approx(1.0)


def test_huge_traced_ratio_of_a_bad_completion_stays_finite(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, trace_lambda=1.0)
    rollout = make_rollout(trainer, off_policy=True)
    rollout["old_per_token_logps"] -= 20  # exp(12 · 20) is infinite
    loss = trainer._compute_loss(trainer.model, rollout)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in trainer.model.parameters())


def test_cispo_bears_a_traced_ratio_that_underflows(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, trace_lambda=1.0, loss_type="cispo", epsilon_high=5.0)
    rollout = make_rollout(trainer, off_policy=True)
    rollout["old_per_token_logps"][:, 4:] += 40  # exp(-8 · 40) is 0 in float32, as after thousands of tokens at -0.03
    assert_loss_and_gradient_match(trainer, rollout)


def test_clip_shares_of_traced_and_true_ratio_are_apart(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, trace_lambda=0.9)
    rollout = make_rollout(trainer, off_policy=True)
    trainer._compute_loss(trainer.model, rollout)
    mask = (rollout["completion_mask"] * rollout["tool_mask"]).double()
    x = (policy_logps(trainer.model, rollout, 1.0) - rollout["old_per_token_logps"].double()).detach() * mask
    traced = torch.zeros_like(x)
    for b in range(ROWS):
        tokens = mask[b].nonzero()[:, 0]
        traced[b, tokens] = dense_trace(len(tokens), 0.9) @ x[b, tokens]

    def clipped(log_ratio):
        ratio, advantage = log_ratio.exp(), rollout["advantages"][:, None]
        outside = ((ratio < 1 - EPSILON) & (advantage < 0)) | ((ratio > 1 + EPSILON_HIGH) & (advantage > 0))
        return ((outside * mask).sum() / mask.sum()).item()

    metrics = logged(trainer)
    assert metrics["clip_ratio/region_mean"] == pytest.approx(clipped(x))
    assert metrics["trace/clip_ratio/region_mean"] == pytest.approx(clipped(traced))
    assert clipped(traced) > clipped(x) >= 0
    approx_kl = ((x.exp() - 1 - x) * mask).sum() / mask.sum()
    assert metrics["approx_kl"] == pytest.approx(approx_kl.item(), rel=1e-4)


def test_value_gap_bound_is_that_of_the_full_softmax(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, temperature=0.7)
    rollout = make_rollout(trainer, off_policy=True)
    rollout["completion_ids"][1, 6] = trainer.eos_token_ids[0]
    trainer._compute_loss(trainer.model, rollout)
    ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], 1)
    attention = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], 1)
    logits = trainer.model(input_ids=ids, attention_mask=attention).logits[:, PROMPT - 1 : -1]
    eos = (logits / 0.7).softmax(-1)[..., trainer.eos_token_ids].sum(-1)
    mask = rollout["completion_mask"] * rollout["tool_mask"]
    total, last = 0.0, []
    for b in range(3):
        go_on = 1.0
        for t in mask[b].nonzero()[:, 0]:
            bound = 1 - go_on
            total += bound
            go_on *= 1 - eos[b, t].item()
        last.append(bound)
    metrics = logged(trainer)
    assert metrics["trace/value_gap_bound_mean"] == pytest.approx(total / mask.sum().item(), rel=1e-4)
    assert metrics["trace/value_gap_bound_last"] == pytest.approx(sum(last) / 3, rel=1e-4)
