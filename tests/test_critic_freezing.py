"""Parts of a critic that are frozen by name."""

import copy

import pytest
import torch
from genac_runs import make_trainer as make_genac
from tiny import ARCHITECTURES, tiny_model
from vapo_runs import make_trainer

from trl_credit.critics.freezing import freeze
from trl_credit.critics.token import make_token_critic


def trained(network):
    return [name for name, p in network.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_attention_is_what_projects_queries_keys_and_values_and_not_the_norm_behind_it(arch):
    network = make_token_critic(tiny_model(arch))
    freeze(network, ["attention"])
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert {name.split(".")[-2] for name in frozen} >= {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert all(".self_attn." in name for name in frozen)
    left = trained(network)
    assert any("post_attention_layernorm" in name for name in left) and any(".mlp." in name for name in left)
    assert "score.weight" in left and "model.embed_tokens.weight" in left


def test_embeddings_and_patterns_add_up():
    network = make_token_critic(tiny_model())
    freeze(network, ["embeddings", "*layers.0.mlp*"])
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    projections = {f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert frozen == {"model.embed_tokens.weight"} | projections


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["atention"], "`critic_freeze` has 'atention', which is no part of the critic"),
        (["embeddings", "*embed*", "layers"], "'layers', which is no part"),
        (["score*"], r"'score\*', which would freeze the critic's head: \['score.bias', 'score.weight'\]"),
    ],
)
def test_what_cannot_be_meant_is_refused(parts, message, model_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(model_dir, tmp_path, critic_freeze=parts)


def test_a_critic_that_would_not_train_at_all_is_refused():
    with pytest.raises(ValueError, match=r"`critic_freeze=\['\*'\]` leaves nothing"):
        freeze(make_token_critic(tiny_model()), ["*"])


@pytest.mark.parametrize("settings", [{}, {"critic_weight_decay": 0.5}])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_frozen_weights_stay_bit_for_bit_and_all_others_move(settings, reentrant, model_dir, tmp_path):
    if reentrant is not None:
        settings = {**settings, "gradient_checkpointing": True}
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    trainer = make_trainer(model_dir, tmp_path, max_steps=2, critic_freeze=["attention", "embeddings"], **settings)
    before = copy.deepcopy(trainer.critic.state_dict())
    trainer.train()
    names = trained(trainer.critic)
    assert names == [
        name for name, _ in trainer.critic.named_parameters() if "attn." not in name and "embed" not in name
    ]
    for name, weight in trainer.critic.state_dict().items():
        assert torch.equal(weight, before[name]) == (name not in names), name
    held = [p for group in trainer.engine.backend.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in trainer.critic.parameters() if p.requires_grad}
    assert all(p.grad is None for p in trainer.critic.parameters() if not p.requires_grad)


def test_the_adapters_of_a_part_are_frozen(model_dir, tmp_path):
    peft = {"r": 2, "target_modules": "all-linear"}
    # The head moves first, then what is above the adapters' zeros, then what is below them.
    settings = {"max_steps": 3, "critic_learning_rate": 0.1}
    trainer = make_trainer(model_dir, tmp_path, critic_peft_config=peft, critic_freeze=["attention"], **settings)
    names = trained(trainer.critic)
    assert any("mlp" in name and "lora" in name for name in names) and not any("self_attn" in name for name in names)
    before = copy.deepcopy(trainer.critic.state_dict())
    trainer.train()
    assert {name for name, x in trainer.critic.state_dict().items() if not torch.equal(x, before[name])} == set(names)


def test_a_generative_critic_may_have_frozen_parts_too(model_dir, tmp_path):
    trainer = make_genac(model_dir, tmp_path, critic_freeze=["attention"])
    assert not any("self_attn" in name for name in trained(trainer.critic))


def test_a_resumed_run_has_the_same_parts_frozen(model_dir, tmp_path):
    settings = {"critic_freeze": ["attention"], "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    whole = make_trainer(model_dir, tmp_path, **settings)
    whole.train()
    resumed = make_trainer(model_dir, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, weight in resumed.critic.state_dict().items():
        assert torch.equal(weight, whole.critic.state_dict()[name]), name
