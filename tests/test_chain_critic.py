"""The generative critic of the quickstart's task: its oracle, its segments and its tokens."""

import random

import pytest

from trl_credit.critics.generative.question import parse_score, render
from trl_credit.segmenting import segment_texts
from trl_credit.toy.chain_critic import TEMPLATE, make_tokenizer, save_start, segment_lines, trace
from trl_credit.toy.task import ChainTask, Teacher, answer
from trl_credit.toy.tiny_model import TinyModelSettings, load, make_model
from trl_credit.toy.tiny_model import make_tokenizer as make_actor_tokenizer
from trl_credit.trainers.genac.traces.oracle import State


@pytest.mark.parametrize(
    ("problem", "partial", "expected", "scores"),
    [
        ("3+4*2-1=", "", "3+8-1=1-1=0|3+8-1=1-1=0|00+", range(2, 5)),
        ("3+4*2-1=", "3+8-1=", "1-1=0|3+8-1=1-1=0|00+", range(4, 7)),
        ("3+4*2-1=", "7*2-1=", "4-1=3|3+8-1=1-1=0|30-", range(3)),
        ("3+4*2-1=", "3+8-1=1-1=0=", "0|3+8-1=1-1=0|00+", range(8, 11)),
        ("3+4*2-1=", "3+8-1=1+=", "|3+8-1=1-1=0|-", range(1)),
    ],
)
def test_the_oracle_checks_the_last_line(problem, partial, expected, scores):
    text = trace(State("q", problem, partial))
    assert text.startswith(expected + "<score>") and text.endswith("</score>")
    assert round(10 * parse_score(text)) in scores


def test_the_oracle_is_right_about_every_chain_of_the_teacher():
    rng, task, right = random.Random(0), ChainTask((4,)), 0
    for _ in range(200):
        problem = task.draw(rng)
        lines = Teacher().solve(problem, rng).split("=")
        partial = "=".join(lines[: rng.randrange(len(lines))]) + "="
        line = partial.rstrip("=").split("=")[-1] or problem
        still_right = (answer(line) if len(line) > 1 else line) == answer(problem)
        assert ("+<score>" in trace(State("q", problem + "=", partial))) == still_right
        right += still_right
    assert 0 < right < 200


@pytest.mark.parametrize(
    ("completion", "texts"),
    [
        ("3+8-1=1-1=0", ["3+8-1=", "1-1=", "0<|im_end|>"]),
        ("0", ["0<|im_end|>"]),
        ("=", ["=", "<|im_end|>"]),
    ],
)
def test_each_line_is_a_segment(completion, texts):
    tokenizer = make_actor_tokenizer()
    ids = [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
    assert segment_texts(ids, segment_lines(ids, tokenizer), tokenizer) == texts
    assert segment_lines([], tokenizer) == []


def test_the_critic_reads_and_writes_all_that_it_has_to(tmp_path):
    tokenizer, actor = make_tokenizer(), make_actor_tokenizer()
    query = render(TEMPLATE, success_rate="0.29", problem="3+4*2-1=", partial_solution="3+8-1=")
    text = query + trace(State(query, "3+4*2-1=", "3+8-1="))
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
    assert {**actor.get_vocab(), **tokenizer.get_vocab()} == tokenizer.get_vocab()  # with the actor's ids

    model = make_model(actor, TinyModelSettings())
    model.save_pretrained(tmp_path / "actor")
    actor.save_pretrained(tmp_path / "actor")
    save_start(tmp_path / "actor", tmp_path / "critic")
    critic, saved = load(tmp_path / "critic")
    assert saved(text)["input_ids"] == ids
    assert critic.get_input_embeddings().weight.shape[0] == len(tokenizer) == len(actor) + 4
    assert critic.get_input_embeddings().weight[: len(actor)].equal(model.get_input_embeddings().weight)
