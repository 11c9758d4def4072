"""A critic that starts from the policy has the policy's weights, and one that does not know its tokens is refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_model_dir, tiny_tokenizer
from transformers import AutoModelForCausalLM
from vapo_runs import make_trainer

from trl_credit.critics.token import head_of, make_token_critic


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


def logits_of_backbone(network, ids):
    with torch.no_grad():
        return network.base_model(ids).last_hidden_state


def test_a_policy_in_memory_gives_its_own_weights_and_not_those_of_its_checkpoint(model, tmp_path):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    trainer = make_trainer(model, tmp_path)
    for name, p in trainer.critic.model.state_dict().items():
        assert torch.equal(p, model.model.state_dict()[name]), name
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in trainer.critic.parameters()}, "a copy"
    trainer.train()


def test_trained_adapters_of_the_policy_are_merged_into_the_critic_and_the_policy_keeps_them(model, tmp_path):
    policy = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(64, 80).unsqueeze(0)
    before = {name: p.clone() for name, p in policy.state_dict().items()}
    expected = logits_of_backbone(policy.get_base_model(), ids)
    trainer = make_trainer(policy, tmp_path)
    torch.testing.assert_close(logits_of_backbone(trainer.critic, ids), expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(p, before[name]) for name, p in policy.state_dict().items())
    assert not any("lora" in name for name, _ in trainer.critic.named_parameters())


def test_a_policy_with_resized_embeddings_has_a_critic_with_as_many(model, tmp_path):
    model.resize_token_embeddings(300)
    trainer = make_trainer(model, tmp_path)
    assert trainer.critic.get_input_embeddings().num_embeddings == 300
    trainer.train()


def test_a_critic_of_another_vocabulary_is_refused_before_anything_is_generated(model_dir, tmp_path):
    tiny_model(vocab_size=4000).save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match=r"large' knows 4000 tokens, the policy 259 and its tokenizer 259"):
        make_trainer(model_dir, tmp_path, critic=tmp_path / "large")
    tiny_model(vocab_size=258).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"small' knows 258 tokens, .* if the policy's embeddings were resized"):
        make_trainer(model_dir, tmp_path, critic=tmp_path / "small")
    tiny_model(vocab_size=320).save_pretrained(tmp_path / "padded")
    assert make_trainer(model_dir, tmp_path, critic=tmp_path / "padded").critic.config.vocab_size == 320
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(tmp_path / "padded")
    with pytest.raises(ValueError, match="padded' has another vocabulary than the policy"):
        make_trainer(model_dir, tmp_path, critic=tmp_path / "padded")


def test_a_head_that_has_learned_is_not_given_an_initial_value_without_a_word(model_dir, tmp_path):
    critic = make_token_critic(str(model_dir))
    torch.nn.init.normal_(head_of(critic).weight)
    critic.save_pretrained(tmp_path / "critic")
    assert make_trainer(model_dir, tmp_path, critic=tmp_path / "critic")
    with pytest.raises(ValueError, match="has a head that has learned already, which cannot start at `critic_initial"):
        make_trainer(model_dir, tmp_path, critic=tmp_path / "critic", critic_initial_value=0.3)
