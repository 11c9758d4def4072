"""A critic of every text model, also of those that transformers has no token classification for."""

import pytest
import torch
from tiny import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from vapo_runs import make_trainer

from trl_credit.critics.backbone import BackboneForTokenClassification, token_classifier
from trl_credit.critics.token import head_of, make_token_critic, read_values


ARCHITECTURES = ["gemma3_text", "olmo2", "granite", "cohere2"]


def tiny(architecture):
    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model_dir(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tiny(request.param).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_it_has_the_weights_of_the_causal_lm_and_saves_and_loads_plainly(model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for source in (str(model_dir), model):
        critic = make_token_critic(source, initial_value=0.25)
        assert isinstance(critic, BackboneForTokenClassification)
        for name, p in critic.model.state_dict().items():
            assert torch.equal(p, model.model.state_dict()[name]), name
        torch.nn.init.normal_(head_of(critic).weight)
    critic.save_pretrained(tmp_path)
    ids = torch.tensor([[70, 71, 72, 73]])
    ones = torch.ones_like(ids)
    rollout = {"prompt_ids": ids, "prompt_mask": ones, "completion_ids": ids, "completion_mask": ones}
    for again in (type(critic).from_pretrained(tmp_path), make_token_critic(str(tmp_path))):
        with torch.no_grad():
            torch.testing.assert_close(read_values(again.eval(), rollout), read_values(critic, rollout))


def test_the_card_says_how_it_is_loaded(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path)
    trainer.train()
    trainer.save_model()
    code = (tmp_path / "critic" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {"path": str(tmp_path / "critic"), "input_ids": torch.tensor([[70, 71]])}
    exec(code, names)
    assert names["values"].shape == (1, 2)


@pytest.mark.slow
def test_it_trains_and_resumes(model_dir, tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "critic_learning_rate": 1e-2}
    trainer = make_trainer(model_dir, tmp_path, **settings)
    trainer.train()
    again = make_trainer(model_dir, tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for (name, p), other in zip(trainer.critic.named_parameters(), again.critic.parameters(), strict=True):
        assert torch.equal(p, other), name


def test_a_model_that_reads_images_is_refused_by_name():
    config = AutoConfig.for_model("idefics3")
    with pytest.raises(ValueError, match="Idefics3Config is of a model that reads more than text"):
        token_classifier(config)
