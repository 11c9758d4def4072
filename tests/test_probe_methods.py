"""`critic="probe"` in the methods that are not VAPO: SAO, BPCO, and SPPO, whose critic values prompts."""

import random

import pytest
import torch
from datasets import Dataset
from sppo_runs import CONVERSATIONS
from vapo_runs import LENGTH, PROMPTS, SETTINGS, fixed_rollout

from trl_credit import (
    BPCOConfig,
    BPCOTrainer,
    SAOConfig,
    SAOTrainer,
    SPPOConfig,
    SPPOTrainer,
    VAPOConfig,
    VAPOTrainer,
)
from trl_credit.critics.loading import load_critic


PROBE = {"critic_model_name_or_path": "probe", "beta": 0.03, "per_device_train_batch_size": 8, "max_steps": 2}
METHODS = {
    "vapo": (VAPOTrainer, VAPOConfig),
    "sao": (SAOTrainer, SAOConfig),
    "bpco": (BPCOTrainer, BPCOConfig),
    "sppo": (SPPOTrainer, SPPOConfig),
}


def share_of_even(completion_ids, **kwargs):
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def make(method, model_dir, folder, reward=share_of_even, prompts=PROMPTS, rollout=fixed_rollout, **settings):
    trainer_class, config = METHODS[method]
    arguments = {name: settings.pop(name) for name in ("critic_processing_class", "peft_config") if name in settings}
    settings = {**SETTINGS, "critic_learning_rate": config("x", bf16=False).critic_learning_rate, **PROBE, **settings}
    trainer = trainer_class(
        model=model_dir if isinstance(model_dir, torch.nn.Module) else str(model_dir),
        reward_funcs=reward,
        args=config(str(folder), **settings),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        rollout_func=rollout,
        **arguments,
    )
    trainer.rollouts_seen, assign = [], trainer.assign_credit

    def assign_and_keep(rollout, rewards, mode):
        credited = assign(rollout, rewards, mode)
        trainer.rollouts_seen.append((rollout, rewards, credited))
        return credited

    trainer.assign_credit = assign_and_keep
    return trainer


@pytest.mark.parametrize("method", ["sao", "bpco"])
def test_a_probe_critic_is_the_critic_of_single_rollouts(method, model_dir, tmp_path):
    trainer = make(method, model_dir, tmp_path, rollout=None, max_steps=3)
    start = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.critic_kind == "probe" and trainer.engine.steps == 3 * trainer.args.probe_updates
    assert any(not torch.equal(p, start[name]) for name, p in trainer.model.named_parameters())
    for _, rewards, credited in trainer.rollouts_seen[:1]:  # nothing is known yet: the mean of the rollout
        trained = credited["critic_mask"]
        expected = (rewards - rewards.mean()).unsqueeze(1).expand_as(trained)
        assert torch.allclose(credited["advantages"][trained], expected[trained], atol=1e-6)


# --- SPPO


def test_sppo_asks_at_the_end_of_the_prompt_and_nowhere_else(model_dir, tmp_path):
    trainer = make("sppo", model_dir, tmp_path)
    trainer.train()
    for rollout, _, credited in trainer.rollouts_seen:
        assert "critic_prompts" not in credited and credited["advantages"].shape == (8,)
        values = trainer.state_values(rollout)
        for row, length in enumerate(rollout["completion_mask"].sum(1).tolist()):
            assert values[row, : length + 1].unique().numel() == 1 and values[row, length + 1 :].isnan().all()
        asked = trainer.critic_reader.ask(rollout)
        assert asked.starts.nonzero().tolist() == [[row, 0] for row in range(8)]
        width = trainer.model.config.hidden_size
        read = trainer.ref_model(
            rollout["prompt_ids"], attention_mask=rollout["prompt_mask"], output_hidden_states=True
        ).hidden_states[-1][:, -1]
        assert torch.allclose(asked.features[:, :width], read.detach(), atol=1e-5)
        assert trainer.read_with_reference(rollout).states[-1].shape == (8, 1, width)
    assert [entry["critic/states"] for entry in trainer.state.log_history[:-1]] == [1, 1]
    assert len(trainer.engine.learner.buffer) == 16


def by_first_letter(prompts, completion_ids, **kwargs):
    """Prompts of one letter are won always, those of the other one time in four."""
    rng = random.Random(str(completion_ids))
    return [1.0 if "a" in prompt else float(rng.random() < 0.25) for prompt in prompts]


def test_sppo_learns_which_prompts_are_hard_and_leans_on_it(model_dir, tmp_path):
    prompts = [letter * (1 + i % 4) for i in range(64) for letter in "ab"]
    trainer = make(
        "sppo",
        model_dir,
        tmp_path,
        reward=by_first_letter,
        prompts=prompts,
        rollout=None,
        per_device_train_batch_size=64,
        max_steps=12,
        learning_rate=0.0,
    )
    trainer.train()
    rollout, rewards, credited = trainer.rollouts_seen[-1]
    easy = torch.tensor(["a" in row["prompt"] for row in trainer.rollout_rows])
    values = credited["values"]
    assert values[easy].mean() > 0.9 and values[~easy].mean() < 0.5
    trust = trainer.state.log_history[-2]["critic/trust"]
    assert trust > 0.7
    expected = (1 - trust) * (rewards - rewards.mean()) + trust * (rewards - values)
    assert torch.allclose(credited["advantages"], expected, atol=1e-5)
    # What is left of the variance, with a critic that knows the prompts.
    assert credited["advantages"].square().mean() < 0.7 * (rewards - rewards.mean()).square().mean()


def test_sppo_with_a_critic_that_knows_nothing_is_the_batch_mean(model_dir, tmp_path):
    trainer = make("sppo", model_dir, tmp_path, critic_trust=0.0)
    trainer.train()
    for _, rewards, credited in trainer.rollouts_seen:
        assert torch.equal(credited["advantages"], rewards - rewards.mean())


def test_a_saved_probe_critic_of_prompts_answers_as_in_its_run_and_is_resumed(model_dir, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "optim": "adamw_torch"}
    whole = make("sppo", model_dir, tmp_path / "whole", **settings)
    whole.train()
    whole.save_model()
    rollout = {name: x for name, x in whole.rollouts_seen[-1][0].items() if name != "tool_mask"}
    critic = load_critic(str(tmp_path / "whole" / "critic"), whole.processing_class)
    assert critic.question.boundaries == "prompt"
    assert torch.allclose(critic.state_values(rollout), whole.state_values(rollout), atol=1e-5, equal_nan=True)
    resumed = make("sppo", model_dir, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for network in ("model", "critic"):
        for a, b in zip(getattr(whole, network).parameters(), getattr(resumed, network).parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_probe_critic_of_the_other_question_is_refused(model_dir, tmp_path):
    for method, other in (("sppo", "vapo"), ("vapo", "sppo")):
        trainer = make(method, model_dir, tmp_path / method, max_steps=1)
        trainer.train()
        trainer.save_model()
        with pytest.raises(ValueError, match="was trained to value states of `probe_boundaries="):
            make(other, model_dir, tmp_path / "other", critic_model_name_or_path=str(tmp_path / method / "critic"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probe_boundaries": "turns"}, r"`probe_boundaries` must be one of \('prompt',\), got 'turns'"),
        ({"probe_boundary_quantile": 0.9}, "no effect with `probe_boundaries='prompt'`"),
        ({"critic_loss": "mse"}, "`critic_loss='mse'` has no effect on a probe critic"),
        ({"critic_prompt_template": "{prompt} {a}"}, "`critic_prompt_template='{prompt} {a}'` has no effect"),
        ({"beta": 0.0}, "`beta=0.0` makes none"),
    ],
)
def test_sppo_refuses_what_a_probe_critic_cannot_have(settings, message, model_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        make("sppo", model_dir, tmp_path, **settings)


def test_sppo_refuses_a_tokenizer_for_a_critic_that_reads_no_text(model_dir, tmp_path):
    from sppo_runs import critic_tokenizer

    with pytest.raises(ValueError, match="`critic_processing_class` has no effect"):
        make("sppo", model_dir, tmp_path, critic_processing_class=critic_tokenizer())


def test_sppo_reads_conversations(model_dir, tmp_path):
    trainer = make("sppo", model_dir, tmp_path, prompts=CONVERSATIONS, rollout=None, max_steps=1)
    trainer.train()
    assert trainer.rollouts_seen[0][2]["values"].isfinite().all()
    assert trainer.max_completion_length == LENGTH
