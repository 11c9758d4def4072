"""A critic with a prompt of its own: it is told what the policy is not."""

import json

import pytest
import torch
from datasets import Dataset
from sppo_runs import SETTINGS as SPPO_SETTINGS
from vapo_runs import PROMPTS, SETTINGS, Watched, fixed_rollout, share_of_even

from trl_credit import SPPOConfig, SPPOTrainer, VAPOConfig
from trl_credit.critic_report.probes import Rollout
from trl_credit.critics.loading import load_critic
from trl_credit.critics.prompt_tokens import critic_prompts


SECRETS = [f"Z{i}Z{i}" for i in range(len(PROMPTS))]
TEMPLATE = "{prompt} <{secret}>"
CHATS = [[{"role": "system", "content": "S"}, {"role": "user", "content": prompt}] for prompt in PROMPTS]


class PolicySeen(Watched):
    """Keeps what the policy's loss saw."""

    def shape_loss(self, terms, mode):
        self.__dict__.setdefault("logps_seen", []).append(terms.logps.detach().clone())
        return super().shape_loss(terms, mode)


def make_trainer(model_dir, folder, template=TEMPLATE, prompts=PROMPTS, rollout=None, **settings):
    return PolicySeen(
        model=str(model_dir),
        reward_funcs=share_of_even,
        args=VAPOConfig(str(folder), **{**SETTINGS, "critic_prompt_template": template, **settings}),
        train_dataset=Dataset.from_dict({"prompt": prompts, "secret": SECRETS}),
        rollout_func=rollout,
    )


# --- Its text


def test_a_text_and_the_last_message_of_the_user_are_filled_into_the_template():
    rows = [
        {"prompt": "2+2?", "secret": "4 {x}"},
        {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "secret": "c"},
    ]
    text, chat = critic_prompts("{prompt} {{{secret}}}", {"rows": rows})
    assert text == "2+2? {4 {x}}"
    assert chat == [{"role": "user", "content": "a {c}"}, {"role": "assistant", "content": "b"}]
    assert rows[1]["prompt"][0]["content"] == "a"  # the policy's own is not touched


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{secret}", r"must have \{prompt\} and names of columns in braces, got \['secret'\]"),
        ("{prompt} {}", "must have"),
        ("{prompt.__class__}{prompt}", "must have"),
        ("{prompt} {", "is no template"),
    ],
)
def test_what_is_no_template_is_refused(template, message, tmp_path):
    for config in (VAPOConfig, SPPOConfig):
        with pytest.raises(ValueError, match=message):
            config(str(tmp_path), bf16=False, use_cpu=True, critic_prompt_template=template)


def test_a_column_that_is_not_there_and_a_prompt_without_a_user_are_refused_by_name():
    with pytest.raises(ValueError, match=r"names \['answer'\], and the dataset has \['prompt', 'secret'\]"):
        critic_prompts("{prompt}{answer}", {"rows": [{"prompt": "a", "secret": "b"}]})
    with pytest.raises(ValueError, match="last message of the user, and a prompt has none"):
        critic_prompts("{prompt}", {"rows": [{"prompt": [{"role": "system", "content": "b"}]}]})


# --- In a run


@pytest.mark.parametrize("prompts", [PROMPTS, CHATS], ids=["text", "conversation"])
@pytest.mark.slow
def test_the_policy_does_not_notice(prompts, model_dir, tmp_path):
    """Its tokens, log-probabilities and rewards are those of a run without, bit for bit, while the critic's differ."""
    settings = {"learning_rate": 0.0, "max_steps": 4, "critic_learning_rate": 0.1, "prompts": prompts}
    trainers = []
    for name, template in (("told", TEMPLATE), ("untold", None)):
        trainers.append(make_trainer(model_dir, tmp_path / name, template, **settings))
        trainers[-1].train()
    told, untold = trainers
    for one, other in zip(told.rollouts_seen, untold.rollouts_seen, strict=True):
        for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"):
            assert torch.equal(one[name], other[name])
        assert one["critic_prompt_ids"].shape[1] > one["prompt_ids"].shape[1]
        assert "critic_prompt_ids" not in other
    for one, other in zip(told.rewards_seen + told.logps_seen, untold.rewards_seen + untold.logps_seen, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(told.rollouts_seen[-1]["values"], untold.rollouts_seen[-1]["values"])
    read = told.processing_class.batch_decode(told.rollouts_seen[0]["prompt_ids"])
    assert not any("Z" in prompt for prompt in read)
    told.save_model()
    for file in (tmp_path / "told").iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja", ".md", ".txt"):
            assert "Z0Z0" not in file.read_text(errors="ignore"), file


def test_the_critic_reads_its_prompt_and_then_the_completion(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, rollout=fixed_rollout, max_steps=2, critic_learning_rate=0.1)
    trainer.train()
    rollout, tokenizer = trainer.rollouts_seen[-1], trainer.processing_class
    with torch.no_grad():
        for row in range(len(rollout["completion_ids"])):
            prompt = rollout["critic_prompt_ids"][row][rollout["critic_prompt_mask"][row].bool()].tolist()
            text = tokenizer.decode(prompt)
            number = PROMPTS.index(text.split(" <Z")[0])
            assert text == f"{PROMPTS[number]} <{SECRETS[number]}>"
            completion = rollout["completion_ids"][row][rollout["completion_mask"][row].bool()].tolist()
    state = {**rollout, "rows": [{"prompt": "q", "secret": "x"}] * len(rollout["completion_ids"])}
    values = trainer.state_values(state)
    ids = torch.tensor([tokenizer("q <x>")["input_ids"] + completion])
    by_hand = trainer.critic(input_ids=ids).logits[0, -len(completion) - 1 :, 0]
    torch.testing.assert_close(values[-1, : len(completion) + 1], by_hand, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_it_is_trained_on_what_it_was_asked(model_dir, tmp_path):
    """With only the secret to tell completions apart, it comes to know their rewards."""

    def named_in_the_secret(prompts, secret, **kwargs):
        return [float(text[1]) / 7 for text in secret]

    same = ["ab"] * len(PROMPTS)
    settings = {"prompts": same, "max_steps": 1, "critic_pretraining_steps": 150, "per_device_train_batch_size": 8}
    found = {}
    for template in (TEMPLATE, None):
        trainer = make_trainer(model_dir, tmp_path / str(template), template, critic_learning_rate=0.02, **settings)
        trainer.reward_funcs[0] = named_in_the_secret
        trainer.train()
        found[template] = trainer.explained_variance
    assert found[TEMPLATE] > 0.5 > 0.1 > found[None]


def test_a_saved_critic_names_its_template_and_the_report_asks_it_so(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic_learning_rate=0.1, max_steps=2)
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "critic"
    settings = json.loads((folder / "critic.json").read_text())["settings"]
    assert settings == {"reward_range": None, "critic_prompt_template": TEMPLATE}
    loaded = load_critic(str(folder), trainer.processing_class)
    ids = trainer.processing_class("ab")["input_ids"]
    rollouts = [
        Rollout("ab", ids, [70, 71], [0], torch.zeros(1, 2).numpy(), 0, row={"prompt": "ab", "secret": secret})
        for secret in ("Z1Z1", "Z7Z7")
    ]
    one, other = loaded.values(rollouts)
    assert abs(one - other).max() > 1e-3
    torch.testing.assert_close(
        torch.tensor([*one, *other]), torch.tensor([*trainer.critic_reader.values(rollouts)]).flatten()
    )
    with pytest.raises(ValueError, match="`critic_prompt_template='{prompt}!'` is asked for, but the critic"):
        make_again = VAPOConfig(str(tmp_path / "again"), **{**SETTINGS, "critic_prompt_template": "{prompt}!"})
        PolicySeen(str(model_dir), share_of_even, make_again, train_dataset=trainer.train_dataset, critic=str(folder))


def test_sppos_critic_may_be_told_too(model_dir, tmp_path):
    trainer = SPPOTrainer(
        model=str(model_dir),
        reward_funcs=lambda completion_ids, **kwargs: [float(len(ids) % 2) for ids in completion_ids],
        args=SPPOConfig(str(tmp_path), **{**SPPO_SETTINGS, "critic_prompt_template": TEMPLATE}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS, "secret": SECRETS}),
    )
    trainer.train()
    rollout = {"prompt_ids": torch.tensor([[1]]), "rows": [{"prompt": "ab", "secret": "Z3"}], "prompts": ["ab"]}
    prompts, _ = trainer.critic_reader.prompts(rollout)
    assert trainer.processing_class.decode(prompts[0]) == "ab <Z3>"
    trainer.save_model()
    loaded = load_critic(str(tmp_path / "critic"), trainer.processing_class)
    assert loaded.prompts(rollout)[0].tolist() == prompts.tolist()
