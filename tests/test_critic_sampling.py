"""What is sampled is drawn from the model alone, and ends where the model has learned to end."""

import pytest
import torch
from genac_runs import fitted_critic, make_trainer
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_model_dir, tiny_tokenizer
from transformers import GenerationConfig

from trl_credit.critic_report import Decoding, TransformersPolicy
from trl_credit.critics.engine.engine import seeded
from trl_credit.critics.generative.question import end_of_turn
from trl_credit.sampling import sample_continuations
from trl_credit.scripts.genac_sft import CriticSFTTrainer, GenACSFTConfig


# What a checkpoint's generation config can hold that `generate` would take from it.
OF_A_CHECKPOINT = {
    "min_p": 0.9,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.2,
    "eta_cutoff": 0.2,
    "top_h": 0.1,
    "repetition_penalty": 3.0,
    "suppress_tokens": list(range(64, 200)),
    "begin_suppress_tokens": list(range(128)),
    "bad_words_ids": [[token] for token in range(200, 250)],
    "no_repeat_ngram_size": 1,
    "forced_eos_token_id": 65,
    "exponential_decay_length_penalty": [1, 5.0],
    "sequence_bias": [[[66], 9.0]],
    "min_new_tokens": 5,
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("model"))


def sampled(network, **settings):
    prompts = [[70, 71, 72], [80], [81, 82]] * 10
    with seeded(0):
        return sample_continuations(network, prompts, [12] * len(prompts), {257, 256}, 256, **settings)


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("option", OF_A_CHECKPOINT)
def test_no_setting_of_a_checkpoint_changes_what_is_sampled(option, peft):
    def network():
        torch.manual_seed(0)
        model = tiny_model()
        return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")) if peft else model

    plain, other = network(), network()
    other.generation_config.update(**{option: OF_A_CHECKPOINT[option]})
    if peft:
        other.get_base_model().generation_config = other.generation_config
    before = other.generation_config.to_dict()
    answers = sampled(plain)
    assert sampled(other) == answers and len({token for answer in answers for token in answer}) > 50
    assert other.generation_config.to_dict() == before and before[option] == OF_A_CHECKPOINT[option]


def test_neither_does_one_of_the_policy_in_the_monte_carlo_truth():
    plain, other = (TransformersPolicy(tiny_model(), tiny_tokenizer()) for _ in range(2))
    other.model.generation_config.update(**{name: OF_A_CHECKPOINT[name] for name in ("min_p", "suppress_tokens")})
    draws = [policy.sample([[70, 71]] * 20, [8] * 20, Decoding(), seed=3) for policy in (plain, other)]
    assert draws[0] == draws[1]


def test_nor_one_of_the_critic_in_training(model_dir, tmp_path):
    answers = []
    for config in ({}, {"min_p": 0.9, "no_repeat_ngram_size": 2}):
        critic = fitted_critic(0.15, 32)
        critic.generation_config = GenerationConfig(eos_token_id=critic.config.eos_token_id, **config)
        trainer = make_trainer(model_dir, tmp_path, critic=critic)
        trainer.train()
        answers.append([reading.answers for reading in trainer.rollouts_seen[0]["readings"] if reading])
    assert answers[0] == answers[1]


# --- Where an answer ends


def base_tokenizer():
    """That of a base model: its end of sequence is not what ends a turn in its chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


def test_a_turn_ends_with_the_templates_own_token():
    tokenizer = base_tokenizer()
    assert tokenizer.decode([end_of_turn(tokenizer)]) == "<|im_end|>"
    assert end_of_turn(tokenizer) != tokenizer.eos_token_id
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert end_of_turn(tokenizer) is None
    tokenizer.chat_template = None
    assert end_of_turn(tokenizer) is None


def test_the_critic_of_a_base_model_stops_where_its_turn_ends(model_dir, tmp_path):
    tokenizer, model = base_tokenizer(), fitted_critic(0.15, 32)  # it has learned to end with <|im_end|>
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(tmp_path / "critic")
    tokenizer.save_pretrained(tmp_path / "critic")
    trainer = make_trainer(model_dir, tmp_path, critic=str(tmp_path / "critic"))
    trainer.train()
    end = end_of_turn(tokenizer)
    answers = [a for reading in trainer.rollouts_seen[0]["readings"] if reading for a in reading.answers]
    assert trainer.critic_reader.ends == {end, tokenizer.eos_token_id}
    assert all(end not in answer[:-1] for answer in answers)
    assert sum(answer[-1] == end for answer in answers) > len(answers) / 2
    assert max(map(len, answers)) <= 24
    log = trainer.state.log_history[0]
    assert log["critic/cut_off_answers"] < 0.5 and log["critic/parse_rate"] > 0.5


def test_fine_tuning_teaches_that_token(tmp_path):
    tokenizer, model = base_tokenizer(), tiny_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    from datasets import Dataset

    rows = [
        {
            "prompt": [{"role": "user", "content": "q"}],
            "completion": [{"role": "assistant", "content": "<score>7</score>"}],
        }
    ]
    args = GenACSFTConfig(str(tmp_path / "out"), bf16=False, use_cpu=True, report_to=[])
    trainer = CriticSFTTrainer(str(tmp_path), args, train_dataset=Dataset.from_list(rows))
    labels = next(iter(trainer.get_train_dataloader()))["labels"][0]
    assert end_of_turn(tokenizer) in labels[labels != -100].tolist()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ends an assistant's turn with no special token"):
        CriticSFTTrainer(str(tmp_path), args, train_dataset=Dataset.from_list(rows))
