"""A critic that is a second adapter on the policy's base: one set of base weights, and two networks that stay apart."""

import copy

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import tiny_model_dir
from transformers import AutoModelForTokenClassification
from vapo_runs import make_trainer

from trl_credit.networks.token_critic import make_token_critic, read_values


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("model"))


def shared(model_dir, folder, **settings):
    adapters = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)  # so that an adapter shows at once
    settings = {"critic_learning_rate": 1e-2, "max_steps": 2, "optim": "adamw_torch", **settings}
    return make_trainer(model_dir, folder, peft_config=adapters, critic_share_base=True, **settings)


def test_the_base_is_in_memory_once(model_dir, tmp_path):
    trainer = shared(model_dir, tmp_path)
    own = {name: p.numel() for name, p in trainer.critic.named_parameters()}
    policy = sum(p.numel() for name, p in trainer.model.named_parameters() if ".default." in name)
    assert sum(own.values()) == policy + 16 + 1  # an adapter like the policy's, and a head
    assert not any(p.requires_grad for name, p in trainer.model.named_parameters() if ".critic." in name)


def test_both_learn_and_neither_moves_the_others_weights(model_dir, tmp_path):
    moments = []

    class Looking(type(shared(model_dir, tmp_path / "a"))):
        def update_critic(self, micro_batches, *args):
            before = copy.deepcopy(self.model.state_dict())
            result = super().update_critic(micro_batches, *args)
            after = self.model.state_dict()
            moments.append({name.rsplit(".", 2)[1] for name in after if not torch.equal(before[name], after[name])})
            return result

    trainer = shared(model_dir, tmp_path, trainer=Looking)
    start = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    # The second update: in the first the head is zero and passes no gradient on.
    assert moments == [set(), {"critic"}]
    assert all(p.grad is None for p in trainer.critic.parameters())
    moved = {name for name, p in trainer.model.state_dict().items() if not torch.equal(start[name], p)}
    assert {name.rsplit(".", 2)[1] for name in moved} == {"critic", "default"}
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in trainer.critic.parameters()}


def test_the_policy_and_the_critic_are_saved_apart_and_both_load(model_dir, tmp_path):
    trainer = shared(model_dir, tmp_path)
    trainer.train()
    trainer.save_model()
    policy = load_file(tmp_path / "adapter_model.safetensors")
    assert policy and not any("critic" in name or "score" in name for name in policy)
    assert not (tmp_path / "critic" / "critic").exists()
    inputs = trainer.rollouts_seen[-1]
    with torch.no_grad(), trainer.critic.active():
        values = read_values(trainer.critic, inputs)
    assert values.abs().max() > 1e-3
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path / "critic", num_labels=1)
    for critic in (plain, make_token_critic(tmp_path / "critic")):
        torch.testing.assert_close(read_values(critic, inputs), values, rtol=0, atol=1e-5)


def test_a_resumed_run_is_the_run(model_dir, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    (whole := shared(model_dir, tmp_path, **saving)).train()
    (resumed := shared(model_dir, tmp_path, **saving)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for one, other in ((resumed.model, whole.model), (resumed.critic, whole.critic)):
        weights = other.state_dict()
        assert all(torch.equal(p, weights[name]) for name, p in one.state_dict().items())


def test_gradient_checkpointing_changes_nothing(model_dir, tmp_path):
    plain, checkpointed = (shared(model_dir, tmp_path / str(on), gradient_checkpointing=on) for on in (False, True))
    plain.train()
    checkpointed.train()
    for a, b in zip(plain.critic.parameters(), checkpointed.critic.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_policy_without_adapters_has_no_base_to_share(model_dir, tmp_path):
    with pytest.raises(ValueError, match="`critic_share_base=True` needs a policy with adapters"):
        make_trainer(model_dir, tmp_path, critic_share_base=True)
    with pytest.raises(ValueError, match="`critic` has no effect with `critic_share_base=True`"):
        make_trainer(model_dir, tmp_path, critic_share_base=True, critic=str(model_dir), peft_config=LoraConfig())
