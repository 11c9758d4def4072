"""The report on a critic that writes: what it is asked, and what becomes of its answers."""

import numpy as np
import pytest
import torch
from known_process import samples
from tiny import tiny_model, tiny_tokenizer

from trl_credit.critic_report import GenerativeCritic, Rollout


TEMPLATE = "{problem}|{partial_solution}|{success_rate}:"


def rollout(text: str, cuts: list[int], reward: float = 1.0) -> Rollout:
    tokenizer = tiny_tokenizer(chat_template=None)
    ids = tokenizer(text)["input_ids"]
    return Rollout("2+2=", tokenizer("2+2=")["input_ids"], ids, cuts, np.zeros((len(cuts), 2)), 0, reward, [0.0])


class Scripted(GenerativeCritic):
    """A real network and tokenizer; what it samples is kept, and read as the answers given."""

    def __init__(self, answers, **settings):
        tokenizer = tiny_tokenizer(chat_template=None)
        super().__init__(tiny_model(), tokenizer, tokenizer, TEMPLATE, max_completion_length=3, **settings)
        self.answers, decode = iter(answers), tokenizer.batch_decode
        self.asked = []
        tokenizer.batch_decode = lambda ids, **kwargs: (
            [next(self.answers) for _ in ids] if kwargs.get("skip_special_tokens") else decode(ids, **kwargs)
        )

    def ask(self, readings):
        self.asked += self.tokenizer.batch_decode([ids for reading in readings for ids in reading.query.prompts()])
        super().ask(readings)


def test_it_is_asked_about_the_states_in_cuts_and_each_value_is_held_up_to_the_next():
    answers = [f"<score>{n}</score>" for n in (1, 2, 3, 4, 5)]
    critic = Scripted(answers, success_rate=0.25)
    whole, begun = critic.values([rollout("a\nbé\nc", [0, 2, 6]), rollout("xyz", [1, 3])])
    assert critic.asked == ["2+2=||0.25:", "2+2=|a\n|0.25:", "2+2=|a\nbé\n|0.25:", "2+2=|x|0.25:", "2+2=|xyz|0.25:"]
    assert whole.tolist() == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.2, 0.2, 0.3, 0.3])
    assert begun[1:].tolist() == pytest.approx([0.4, 0.4, 0.5])
    assert critic.parse_rate == 1


def test_a_state_without_a_score_has_no_value():
    one = rollout("a\nb", [0, 2])
    critic = Scripted(["none", "<score>6</score>"])
    assert critic.values([one])[0].tolist() == pytest.approx([np.nan] * 2 + [0.6] * 2, nan_ok=True)
    assert critic.parse_rate == 0.5


@pytest.mark.slow
def test_a_real_critic_that_says_nothing_of_use_is_measured_and_measured_alike(tmp_path):
    from trl_credit.critic_report import evaluate_critic

    model = tiny_model(hidden=32)
    model.config.max_position_embeddings = 1024
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    critic = GenerativeCritic.from_pretrained(str(tmp_path), tiny_tokenizer(), max_completion_length=4)
    probes = samples(prompts=2)
    reports = [evaluate_critic(critic, probes, draws=5) for _ in range(2)]
    assert critic.parse_rate == 0
    assert reports[0].to_dict() == reports[1].to_dict()
    assert reports[0].rows["answers/unread"].estimate == 1 and reports[0].rows["answers/unread"].n == 80
    assert reports[0].verdict.knows == "nothing read" and set(reports[0].rows) == {"answers/unread"}
    state = torch.random.get_rng_state()
    critic.values(probes.rollouts[:1])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_template_without_a_slot_is_refused():
    with pytest.raises(ValueError, match=r"has no \{partial_solution\}"):
        GenerativeCritic(tiny_model(), tiny_tokenizer(), tiny_tokenizer(), "{problem}?")
