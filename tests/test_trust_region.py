"""Trust regions by mask: DIS and DPPO."""

import copy
import math
import random

import pytest
import torch
from datasets import Dataset
from genac_runs import make_trainer as make_genac
from sppo_runs import make_trainer as make_sppo
from tiny import tiny_model
from transformers import AutoModelForCausalLM
from vapo_oracle import Oracle
from vapo_runs import SETTINGS, fixed_rollout, make_trainer, samples_of

from trl_credit import GRPOLambdaConfig, GRPOLambdaTrainer, SPPOConfig, VAPOConfig
from trl_credit.credit.trust_region import binary_divergence, within_divergence, within_ratios
from trl_credit.critics.token import make_token_critic


BASE = {"bf16": False, "use_cpu": True, "report_to": [], "per_device_train_batch_size": 4, "num_generations": 1}


# --- The functions


def test_dis_keeps_ratios_within_its_two_sides_both_ends_included():
    ratios = torch.tensor([0.5, 0.7, 0.71, 1.0, 5.99, 6.0, 6.01], dtype=torch.float64)
    assert within_ratios(ratios.log(), 0.3 + 1e-12, 5.0 + 1e-12).tolist() == [
        False,
        True,
        True,
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("kind", ["tv", "kl"])
def test_a_divergence_is_that_of_two_coins(kind):
    rng = random.Random(0)
    pairs = [(rng.random(), rng.random()) for _ in range(200)] + [(1 - 1e-9, 1 - 1e-7), (1e-9, 0.5)]
    found = binary_divergence(*(torch.tensor(p, dtype=torch.float64).log() for p in zip(*pairs, strict=True)), kind)
    for (pi, mu), divergence in zip(pairs, found.tolist(), strict=True):
        exact = abs(pi - mu)
        if kind == "kl":
            exact = mu * math.log(mu / pi) + (1 - mu) * math.log((1 - mu) / (1 - pi))
        assert divergence == pytest.approx(exact, rel=1e-6, abs=1e-15)


def test_the_kl_is_that_of_the_policy_seen_from_its_sampler():
    pi, mu = torch.tensor([0.1]), torch.tensor([0.4])  # 0.4 ln 4 + 0.6 ln(2/3), not 0.1 ln(1/4) + 0.9 ln(3/2)
    assert binary_divergence(pi.log(), mu.log(), "kl").item() == pytest.approx(0.311238, abs=1e-5)


def test_certain_tokens_have_no_divergence_and_one_that_became_impossible_has_all():
    certain, never = torch.zeros(1), torch.tensor([-torch.inf])
    assert binary_divergence(certain, certain, "kl").item() == 0
    assert binary_divergence(certain, torch.tensor([0.5]).log(), "kl").item() == math.inf
    assert binary_divergence(never, certain, "tv").item() == 1


@pytest.mark.parametrize(
    ("pi", "mu", "advantage", "counts"),
    [
        (0.9, 0.6, 1.0, False),  # further up
        (0.3, 0.6, 1.0, True),  # back
        (0.3, 0.6, -1.0, False),  # further down
        (0.9, 0.6, -1.0, True),  # back
        (0.75, 0.6, 1.0, True),  # near
        (0.9, 0.6, 0.0, True),  # no way to go
    ],
)
def test_dppo_leaves_out_only_what_pushes_a_far_token_further(pi, mu, advantage, counts):
    pi, mu = (torch.tensor([[p]], dtype=torch.float64).log() for p in (pi, mu))
    assert within_divergence(pi, mu, torch.tensor([[advantage]]), 0.2).item() is counts


def test_a_rare_token_may_become_four_times_as_likely_under_dppo_and_not_under_clipping():
    mu = torch.tensor([[0.001]], dtype=torch.float64)
    assert within_divergence((4 * mu).log(), mu.log(), torch.ones(1, 1), 0.2).item()


# --- In a run


def known_sampler(model_dir):
    """`fixed_rollout`, by a sampler that is not quite the policy, and has forgotten some of its probabilities."""
    policy = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)

    @torch.no_grad()
    def rollout(prompts, trainer):
        written = fixed_rollout(prompts, trainer)
        written["logprobs"] = []
        rng = random.Random(1)
        for prompt, ids in zip(written["prompt_ids"], written["completion_ids"], strict=True):
            logits = policy(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            logps = logits.log_softmax(-1)[range(len(ids)), ids].tolist()
            written["logprobs"].append(
                [None if i % 5 == 4 else min(x + rng.uniform(-0.6, 0.6), -1e-3) for i, x in enumerate(logps)]
            )
        return written

    return rollout


REGIONS = {
    "dis": {"trust_region": "dis", "epsilon": 0.25, "epsilon_high": 0.6},
    "dppo_tv": {"trust_region": "dppo_tv", "trust_region_threshold": 0.001},
    "dppo_kl": {"trust_region": "dppo_kl", "trust_region_threshold": 0.0002},
}


@pytest.mark.parametrize("region", REGIONS)
def test_two_steps_are_the_textbooks(region, model_dir, tmp_path):
    critic = make_token_critic(tiny_model(seed=1))
    with torch.no_grad():
        critic.score.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
    settings = {"gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 2, "policy_lambda": 0.7}
    settings |= {"rollout": known_sampler(model_dir), "learning_rate": 0.1, **REGIONS[region]}
    trainer = make_trainer(model_dir, tmp_path, critic=copy.deepcopy(critic), **settings)
    oracle = Oracle(model_dir, trainer.critic, trainer.args)
    trainer.train()
    rollout = trainer.rollouts_seen[0]
    samples = samples_of(trainer, rollout, trainer.rewards_seen[0])
    credit = oracle.judge(samples)
    for row, sample in enumerate(samples):
        given = rollout["sampling_per_token_logps"][row].tolist()
        sample.sampler_logps = [old if math.isnan(mu) else mu for mu, old in zip(given, sample.old_logps, strict=False)]
    for entry in [entry for entry in trainer.state.log_history if "loss" in entry]:
        expected = oracle.step(samples, credit)
        assert entry["grad_norm"] == pytest.approx(expected["policy_norm"], rel=1e-4)
        share = len(oracle.masked)
        assert entry["trust_region/masked_low"] == pytest.approx(oracle.masked.count(-1) / share)
        assert entry["trust_region/masked_high"] == pytest.approx(oracle.masked.count(1) / share)
        assert 0 < oracle.masked.count(-1) < share / 2 and 0 < oracle.masked.count(1) < share / 2
        assert not any("clip_ratio" in name for name in entry)  # nothing is clipped
    for (name, parameter), expected in zip(trainer.model.named_parameters(), oracle.policy.parameters(), strict=True):
        torch.testing.assert_close(parameter.double(), expected, rtol=0, atol=2e-6, msg=name)


def weights_after(trainer):
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("region", ["dis", "dppo_kl"])
@pytest.mark.slow
def test_on_policy_it_is_the_clipped_loss_of_every_loss_type(loss_type, region, model_dir, tmp_path):
    settings = {"rollout": None, "loss_type": loss_type, "max_steps": 2, "gradient_accumulation_steps": 2, "beta": 0.1}
    clipped = weights_after(make_trainer(model_dir, tmp_path / "clip", **settings))
    masked = make_trainer(model_dir, tmp_path / region, trust_region=region, **settings)
    torch.testing.assert_close(weights_after(masked), clipped, rtol=0, atol=1e-6)
    log = masked.state.log_history[0]
    assert log["trust_region/masked_low"] == log["trust_region/masked_high"] == 0
    assert log["trust_region/ratio_mean"] == pytest.approx(1)


def test_the_samplers_correction_is_counted_once(tmp_path):
    with_clip = VAPOConfig(str(tmp_path), use_vllm=True, **BASE)
    with_mask = VAPOConfig(str(tmp_path), use_vllm=True, trust_region="dis", **BASE)
    assert with_clip.vllm_importance_sampling_correction and not with_mask.vllm_importance_sampling_correction


def test_sppo_and_genac_take_it(model_dir, tmp_path):
    for name, make in {"sppo": make_sppo, "genac": make_genac}.items():
        trainer = make(model_dir, tmp_path / name, rollout=known_sampler(model_dir), trust_region="dppo_tv")
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry][0]
        assert log["trust_region/ratio_mean"] != pytest.approx(1, abs=1e-3) and math.isfinite(log["grad_norm"])


def grpo_lambda(model_dir, folder, **settings):
    settings = {name: x for name, x in SETTINGS.items() if not name.startswith("critic")} | settings
    return GRPOLambdaTrainer(
        model=str(model_dir),
        reward_funcs=lambda completion_ids, **kwargs: [len(set(ids)) / 10 for ids in completion_ids],
        args=GRPOLambdaConfig(str(folder), **{**settings, "num_generations": 4}),
        train_dataset=Dataset.from_dict({"prompt": ["ab", "cd", "e", "f"]}),
    )


def test_grpo_lambda_takes_it_with_weights_and_refuses_it_with_ratios_that_are_mixed(model_dir, tmp_path):
    plain = weights_after(grpo_lambda(model_dir, tmp_path / "plain", trace_update="weight"))
    masked = weights_after(grpo_lambda(model_dir, tmp_path / "dis", trace_update="weight", trust_region="dis"))
    torch.testing.assert_close(masked, plain, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="`trust_region='dis'` judges each token by its own ratio"):
        GRPOLambdaConfig(str(tmp_path), trust_region="dis", **{**BASE, "num_generations": 4})


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (VAPOConfig, {"trust_region": "trpo"}, "`trust_region` must be one of"),
        (
            VAPOConfig,
            {"trust_region": "dis", "loss_type": "cispo"},
            "`loss_type='cispo'` bounds ratios in a way of its",
        ),
        (VAPOConfig, {"trust_region": "dis", "loss_type": "sapo"}, "`loss_type='sapo'` bounds ratios in a way of its"),
        (SPPOConfig, {"trust_region": "dis", "loss_type": "vespo"}, "`loss_type='vespo'` bounds ratios"),
        (VAPOConfig, {"trust_region": "dis", "delta": 2.0}, "`delta=2.0` has no effect with `trust_region='dis'`"),
        (VAPOConfig, {"trust_region": "dppo_tv", "epsilon": 0.3}, "`epsilon=0.3` has no effect .* Leave it at 0.2"),
        (VAPOConfig, {"trust_region": "dppo_kl", "epsilon_high": 5.0}, "`epsilon_high=5.0` has no effect"),
        (VAPOConfig, {"trust_region_threshold": 0.1}, "`trust_region_threshold=0.1` has no effect"),
        (VAPOConfig, {"trust_region": "dis", "trust_region_threshold": 0.1}, "has no effect with `trust_region='dis'`"),
        (VAPOConfig, {"trust_region": "dppo_tv", "trust_region_threshold": 0.0}, "must be a finite number above 0"),
        (
            SPPOConfig,
            {"trust_region": "dis", "loss_type": "grpo", "importance_sampling_level": "sequence"},
            "`importance_sampling_level='sequence'` gives a completion one ratio",
        ),
    ],
)
def test_what_has_no_effect_or_cannot_be_is_refused_by_name(config, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(str(tmp_path), **{**BASE, **settings})
