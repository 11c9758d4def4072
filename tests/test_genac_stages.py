"""The stages before GenAC's joint training: what an oracle is asked, what the critic learns of it, and the commands."""

import json

import pytest
from chat_server import serving
from datasets import Dataset, load_dataset
from genac_runs import GENAC, TEMPLATE, share_of_even
from tiny import tiny_tokenizer
from vapo_runs import PROMPTS, SETTINGS, fixed_rollout

from trl_credit.journal import Journal, read_rows
from trl_credit.scripts.genac_sft import CriticSFTTrainer, GenACSFTConfig
from trl_credit.scripts.genac_traces import filter_file
from trl_credit.trainers.genac.traces import GenACTracesConfig, TraceCollector, write_dataset
from trl_credit.trainers.genac.traces.dataset import reason_to_drop
from trl_credit.trainers.genac.traces.oracle import State, Unavailable


TRACES = {"max_steps": -1, "critic_max_completion_length": 80}  # one pass over the prompts


def collector(model_dir, folder, rollout=fixed_rollout, reward=share_of_even, prompts=PROMPTS, **settings):
    oracle = settings.pop("oracle_function", None)
    return TraceCollector(
        model=str(model_dir),
        reward_funcs=reward,
        args=GenACTracesConfig(str(folder), **{**SETTINGS, **GENAC, **TRACES, **settings}),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        rollout_func=rollout,
        oracle=oracle,
    )


def thoughtful(state: State) -> str:
    return f"It reads {state.partial_solution!r}. <score>{round(10 * state.success_rate)}</score>"


# --- What the oracle is asked


def test_states_are_the_prefixes_of_the_solutions_and_the_first_is_the_prompt_alone(model_dir, tmp_path):
    run = collector(model_dir, tmp_path, oracle_function=thoughtful)
    run.train()
    (header, *rollouts) = read_rows(tmp_path / "solutions.jsonl")
    solutions = [solution for rollout in rollouts for solution in rollout]
    assert header["temperature"] == 1.0 and len(rollouts) == 2 and len(solutions) == 8
    assert sorted(solution["prompt"] for solution in solutions) == sorted(PROMPTS)
    rate = sum(solution["reward"] for solution in solutions) / 8
    states = list(read_rows(tmp_path / "states.jsonl"))
    assert {state["success_rate"] for state in states} == {float(f"{rate:.2f}")}
    for solution in solutions:
        mine = [state for state in states if state["problem"] == solution["prompt"]]
        partials = [state["partial_solution"] for state in mine]
        assert partials[0] == "" and len(set(partials)) == len(partials)
        assert all(solution["completion"].startswith(partial) for partial in partials)
        assert max(map(len, partials)) < len(solution["completion"])
        assert all(state["reward"] == solution["reward"] for state in mine)
        for state in mine:
            slots = {"success_rate": f"{rate:.2f}", "problem": state["problem"]}
            assert state["query"] == TEMPLATE.format(**slots, partial_solution=state["partial_solution"])
    assert len(states) == 16


def test_the_query_is_what_the_critic_will_read_in_the_later_stages(model_dir, tmp_path):
    run = collector(model_dir, tmp_path)
    run.train()
    assert not (tmp_path / "answers.jsonl").exists()  # no oracle was named
    tokenizer, queries = tiny_tokenizer(), {state.query for state in run.states()}
    solution = next(iter(read_rows(tmp_path / "solutions.jsonl")))  # the header
    assert "model" in solution
    for rollout in list(read_rows(tmp_path / "solutions.jsonl"))[1:]:
        for solution in rollout:
            rate = next(iter(run.states())).success_rate
            chosen = [bool(token) for token in solution["chosen"]]
            for ids in run.question.about(solution["completion_ids"], solution["prompt"], rate, chosen).query.prompts():
                read = tokenizer.decode(ids)
                assert any(
                    read
                    == tokenizer.apply_chat_template(
                        [{"role": "user", "content": query}], add_generation_prompt=True, tokenize=False
                    )
                    for query in queries
                )


def test_several_solutions_share_the_state_of_their_prompt_which_has_their_mean_reward(model_dir, tmp_path):
    run = collector(model_dir, tmp_path, num_generations=4, max_steps=1)
    run.train()
    first = [state for state in run.states() if state.partial_solution == ""]
    rollouts = list(read_rows(tmp_path / "solutions.jsonl"))[1:]
    assert len(first) == len(rollouts) == 1 and len(rollouts[0]) == 4
    assert first[0].reward == pytest.approx(sum(solution["reward"] for solution in rollouts[0]) / 4)


def test_no_more_states_than_asked_for(model_dir, tmp_path):
    run = collector(model_dir, tmp_path, oracle_function=thoughtful, max_traces=5)
    run.train()
    assert len(list(read_rows(tmp_path / "answers.jsonl"))) == 5


def test_completions_without_a_reward_and_states_without_room_are_left_out(model_dir, tmp_path):
    def some(completion_ids, **kwargs):
        return [None if len(ids) % 2 else 1.0 for ids in completion_ids]

    run = collector(model_dir, tmp_path, reward=some)
    run.train()
    problems = {state.problem for state in run.states()}
    rollouts = list(read_rows(tmp_path / "solutions.jsonl"))[1:]
    assert problems == {s["prompt"] for rollout in rollouts for s in rollout if s["reward"] is not None} < set(PROMPTS)

    def length(state):
        prompt = [{"role": "user", "content": state.query}]
        return len(run.critic_processing_class.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])

    states = run.states()
    room = sorted(map(length, states))[len(states) // 2]
    run.critic.config.max_position_embeddings = room + TRACES["critic_max_completion_length"]
    assert run.states() == [state for state in states if length(state) <= room] != states


def test_too_few_prompts_for_a_rollout_are_refused(model_dir, tmp_path):
    with pytest.raises(ValueError, match="The data hold 3 prompts, fewer than the 4 of one rollout"):
        collector(model_dir, tmp_path, prompts=PROMPTS[:3]).train()


def test_rewards_outside_of_what_a_score_can_say_are_refused(model_dir, tmp_path):
    settings = {"reward": lambda completions, **kwargs: [2.0] * len(completions), "reward_range": [0, 1]}
    run = collector(model_dir, tmp_path, **settings)
    with pytest.raises(ValueError, match=r"The reward 2 of completion 0 .* lies outside `reward_range=\[0.0, 1.0\]`"):
        run.train()


# --- Going on


class Killed(BaseException):
    pass


def test_a_run_that_is_killed_while_sampling_goes_on_with_the_same_solutions(model_dir, tmp_path):
    settings = {"rollout": None, "max_steps": 4, "max_completion_length": 8}
    whole = collector(model_dir, tmp_path / "whole", **settings)
    whole.train()
    run = collector(model_dir, tmp_path / "parts", **settings)
    generate, calls = run.assign_credit, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return generate(*args)

    run.assign_credit = killed
    with pytest.raises(Killed):
        run.train()
    with open(tmp_path / "parts" / "solutions.jsonl", "a") as file:
        file.write('[{"prompt": "torn')
    resumed = collector(model_dir, tmp_path / "parts", **settings)
    resumed.train()
    files = [(tmp_path / name / "solutions.jsonl").read_text() for name in ("whole", "parts")]
    assert files[0] == files[1] and len(files[0].splitlines()) == 5
    with pytest.raises(ValueError, match=r"sampled in another way: temperature 1.0, now 0.5"):
        collector(model_dir, tmp_path / "parts", temperature=0.5, **settings).train()


@pytest.mark.slow
def test_a_run_whose_endpoint_went_down_goes_on_and_asks_nothing_twice(model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("ORACLE_KEY", "secret")

    def reply(query):
        return f"Of {len(query)} characters. <score>6</score>"

    with serving(reply, faults=[None] * 7 + [503] * 2, key="secret") as server:
        settings = {
            "oracle": server.url,
            "oracle_model": "gpt-5",
            "oracle_api_key_env": "ORACLE_KEY",
            "oracle_retries": 1,
            "oracle_concurrency": 1,
            "oracle_request": '{"max_completion_tokens": 64}',
        }
        with pytest.raises(Unavailable, match="HTTP 503"):
            collector(model_dir, tmp_path, **settings).train()
        assert len(Journal(tmp_path / "answers.jsonl").rows()) == 7
        assert not (tmp_path / "dataset").exists()
        collector(model_dir, tmp_path, rollout=lambda *args: pytest.fail("sampled again"), **settings).train()
        states = list(read_rows(tmp_path / "states.jsonl"))
        assert server.answered == {state["query"]: 1 for state in states}
        assert sum(server.asked.values()) == len(states) + 2
        assert {body["max_completion_tokens"] for body in server.bodies} == {64}
        third = collector(model_dir, tmp_path, **settings)
        third.train()  # all is there: writes the same data set again
        assert sum(server.asked.values()) == len(states) + 2
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["traces"] == summary["kept"] == len(states)
    assert summary["completion_tokens"] == 5 * len(states) and summary["value_mean"] == pytest.approx(0.6)


# --- What the critic learns from


def test_the_data_set_is_what_the_sft_trainer_takes(model_dir, tmp_path):
    run = collector(model_dir, tmp_path, oracle_function=lambda state: "hm\n<score>7</score> \n")
    run.train()
    rows = load_dataset(str(tmp_path / "dataset"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.column_names == ["prompt", "completion"] and len(rows) == len(run.states())
    assert rows[0]["prompt"] == [{"role": "user", "content": run.states()[0].query}]
    assert rows[0]["completion"] == [{"role": "assistant", "content": "hm\n<score>7</score>"}]


def drop(trace, tokens=10, shortest=2, longest=20, max_disagreement=None, **row):
    return reason_to_drop({"trace": trace, **row}, tokens, shortest, longest, max_disagreement)


@pytest.mark.parametrize(
    ("reason", "arguments"),
    [
        (None, {"trace": "good <score>7</score>\n"}),
        (None, {"trace": "<score>7</score>", "reward": 0.0}),
        (None, {"trace": "<score>7</score>", "reward": 0.4, "max_disagreement": 0.3}),
        (None, {"trace": "<score>7</score>", "max_disagreement": 0.3}),
        ("far from the outcome", {"trace": "<score>7</score>", "reward": 0.3, "max_disagreement": 0.3}),
        ("far from the outcome", {"trace": "<score>7</score>", "reward": 1.0, "max_disagreement": 0.2}),
        ("no score", {"trace": "7"}),
        ("no score", {"trace": "<score>11</score>"}),
        ("no score", {"trace": ""}),
        ("text after the score", {"trace": "<score>7</score>, I think"}),
        ("cut off", {"trace": "<score>7</score>", "cut_off": True}),
        ("too short", {"trace": "<score>7</score>", "tokens": 1}),
        ("too long", {"trace": "<score>7</score>", "tokens": 21}),
    ],
)
def test_which_traces_are_kept(reason, arguments):
    assert drop(**arguments) == reason


def test_a_file_of_traces_is_filtered_and_written(model_dir, tmp_path):
    rows = [{"query": f"q{i}", "trace": f"<score>{i}</score>"} for i in range(12)]
    rows[3]["cut_off"] = True
    file = tmp_path / "traces.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = GenACTracesConfig(str(tmp_path / "out"), oracle=str(file), bf16=False, use_cpu=True)
    filter_file(config, str(model_dir))
    kept = list(read_rows(tmp_path / "out" / "dataset" / "train.jsonl"))
    assert [row["prompt"][0]["content"] for row in kept] == [f"q{i}" for i in (0, 1, 2, 4, 5, 6, 7, 8, 9, 10)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"query": "q"}], r"Trace 1 must have the texts `query` and `trace`, got \{'query': 'q'\}"),
        (["q"], "Trace 1 must have the texts"),
        ([{"query": "q", "trace": "?"}] * 3, "No trace is left to learn from: 3 no score"),
        ([], "No trace is left to learn from: there are none"),
    ],
)
def test_files_of_traces_that_hold_none(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_dataset(rows, tmp_path, tiny_tokenizer(), 1, 100)


# --- Bad settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"oracle": "gpt-5"}, r"`oracle` must be a URL, a function \('module:function'\) or a file"),
        ({"oracle": "https://api.openai.com/v1"}, "`oracle_model=None` with .* needs the name of its model"),
        ({"oracle": "m:f", "oracle_model": "gpt-5"}, "an endpoint, and nothing else, needs"),
        ({"oracle": "m:f", "oracle_request": {"seed": 1}}, "`oracle_request` has no effect without an endpoint"),
        ({"oracle_timeout": 0}, "`oracle_timeout` must be a finite number above 0, got 0"),
        ({"oracle_retries": -1}, "`oracle_retries` must be a whole number of at least 0, got -1"),
        ({"oracle_concurrency": 0}, "`oracle_concurrency` must be a whole number of at least 1, or None, got 0"),
        ({"max_traces": 0}, "`max_traces` must be a whole number of at least 1, or None, got 0"),
        ({"max_disagreement": 1.5}, r"`max_disagreement` must be a number in \[0, 1\], or None, got 1.5"),
        ({"push_to_hub": True}, "`push_to_hub=True` has no effect"),
    ],
)
def test_settings_of_the_oracle_that_cannot_be_right(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        GenACTracesConfig(str(tmp_path), bf16=False, use_cpu=True, **settings)


def test_an_oracle_that_is_given_twice_or_is_a_file_is_refused(model_dir, tmp_path):
    with pytest.raises(ValueError, match="The oracle is given twice"):
        collector(model_dir, tmp_path, oracle="json:dumps", oracle_function=thoughtful)
    with pytest.raises(ValueError, match="a file of traces needs no policy"):
        collector(model_dir, tmp_path, oracle="traces.jsonl")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 1024}, "`max_length=1024` has no use: .* Leave it at None"),
        ({"packing": True}, "`packing=True` has no use: .* Leave it at False"),
        ({"completion_only_loss": False}, "`completion_only_loss=False` has no use: .* Leave it at True"),
    ],
)
def test_settings_that_would_cut_traces_or_learn_the_problems_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        GenACSFTConfig(str(tmp_path), bf16=False, use_cpu=True, **settings)


def test_the_loss_is_that_of_the_trace_and_its_end(model_dir, tmp_path):
    rows = [
        {"query": "a long question?", "trace": "hm\n<score>7</score>"},
        {"query": "q", "trace": "<score>10</score>"},
    ]
    write_dataset(rows, tmp_path, tiny_tokenizer(), 1, 100)
    trainer = CriticSFTTrainer(
        str(model_dir),
        GenACSFTConfig(str(tmp_path), per_device_train_batch_size=2, bf16=False, use_cpu=True, report_to=[]),
        train_dataset=Dataset.from_list(list(read_rows(tmp_path / "train.jsonl"))),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    learned = {trainer.processing_class.decode(row[row != -100]) for row in batch["labels"]}
    assert learned == {"hm\n<score>7</score><|im_end|>\n", "<score>10</score><|im_end|>\n"}
    read = {
        trainer.processing_class.decode(row[row != trainer.processing_class.pad_token_id]) for row in batch["input_ids"]
    }
    assert any("a long question?" in text for text in read)


def test_data_without_completions_are_refused(model_dir, tmp_path):
    args = GenACSFTConfig(str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match=r"must have the columns `prompt` and `completion`.*got \['text'\]"):
        CriticSFTTrainer(str(model_dir), args, train_dataset=Dataset.from_dict({"text": ["a"]}))
