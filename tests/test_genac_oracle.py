"""Asking an oracle: what goes wrong on the way, and that no answer is lost and nothing is asked twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chat_server import busy, cuts_short, hangs, hangs_up, out_of_room, sends, serving

from trl_credit.journal import Journal
from trl_credit.trainers.genac.traces.asking import ask_all
from trl_credit.trainers.genac.traces.oracle import (
    Answer,
    Endpoint,
    OracleError,
    State,
    Unavailable,
    make_oracle,
)


STATES = [State(f"query {i} π") for i in range(12)]


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "answers.jsonl")


def endpoint(server, **settings):
    return Endpoint(server.url, "oracle", **{"timeout": 5.0, **settings})


def ask(server, journal, states=STATES, **settings):
    how = {name: settings.pop(name) for name in ("concurrency", "retries") if name in settings}
    return ask_all(endpoint(server, **settings), states, journal, **{"retries": 3, "pause": 0.01, **how})


def traces(journal):
    return {row["query"]: row["trace"] for row in journal.rows()}


EXPECTED = {state.query: f"{state.query}!" for state in STATES}


def shout(content):
    return f"{content}!"


# --- The endpoint


def test_each_state_is_asked_once_and_its_answer_written_down(journal):
    with serving(shout, key="secret") as server:
        twice = [*STATES, *STATES]
        assert ask(server, journal, twice, api_key="secret", request={"temperature": 0.7, "max_tokens": 9}) == {}
    assert traces(journal) == EXPECTED and len(journal.rows()) == 12
    assert server.asked == server.answered == dict.fromkeys(EXPECTED, 1)
    assert server.bodies[0]["model"] == "oracle"
    assert (server.bodies[0]["temperature"], server.bodies[0]["max_tokens"]) == (0.7, 9)
    assert journal.rows()[0]["usage"] == {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}


def test_as_many_are_asked_at_a_time_as_allowed(journal):
    def slow(content):
        time.sleep(0.05)
        return shout(content)

    with serving(slow) as server:
        ask(server, journal, concurrency=3)
    assert server.most_at_once == 3
    assert traces(journal) == EXPECTED


NO_COMPLETION = [
    b"<html>Bad gateway</html>",
    b'{"choices": [{"mess',
    b"\xff\xfe",
    b"",
    {},
    [],
    {"choices": []},
    {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]},
    {"choices": [{"message": {"content": 7}, "finish_reason": "stop"}]},
    {"error": {"message": "overloaded"}},
]


@pytest.mark.parametrize(
    "fault",
    [500, 502, 503, 504, 429, 408, 409, busy, hangs_up, cuts_short, *map(sends, NO_COMPLETION)],
    ids=lambda fault: getattr(fault, "__name__", str(fault)),
)
@pytest.mark.slow
def test_what_may_pass_is_asked_again(journal, fault):
    with serving(shout, faults=[None, fault, None, fault, fault]) as server:
        ask(server, journal)
    assert traces(journal) == EXPECTED
    assert server.answered == dict.fromkeys(EXPECTED, 1)
    assert sum(server.asked.values()) == 15  # three faults


@pytest.mark.slow
def test_what_takes_too_long_is_asked_again(journal):
    with serving(shout, faults=[None, hangs(2.0), None, hangs(2.0)]) as server:
        ask(server, journal, timeout=0.5, retries=8)
    assert traces(journal) == EXPECTED and len(journal.rows()) == 12
    assert sum(server.asked.values()) >= 14  # two faults, or more on a machine that is slow itself


def test_a_pause_that_the_server_asks_for_is_kept(journal):
    with serving(shout, faults=[busy]) as server:
        began = time.monotonic()
        ask(server, journal, STATES[:1])
        assert time.monotonic() - began > 0.2
    assert server.asked[STATES[0].query] == 2


def test_no_server_at_all(journal):
    oracle = Endpoint("http://127.0.0.1:1/v1", "oracle")
    with pytest.raises(Unavailable, match="Connection refused"):
        ask_all(oracle, STATES, journal, retries=2, pause=0.01)
    assert journal.rows() == []


def test_when_the_server_goes_down_what_it_answered_is_kept_and_the_rest_asked_later(journal):
    with serving(shout, faults=[None] * 5 + [503] * 4) as server:
        with pytest.raises(Unavailable, match="HTTP 503 Service Unavailable: .*a fault on demand"):
            ask(server, journal)
        assert len(journal.rows()) == 5 and sum(server.asked.values()) == 9
        ask(server, journal)
    assert traces(journal) == EXPECTED
    assert server.answered == dict.fromkeys(EXPECTED, 1)


@pytest.mark.slow
def test_answers_under_way_when_another_fails_are_kept(journal):
    def reply(content):
        time.sleep(0.3)
        return shout(content)

    with serving(reply, faults=[None, None, 401]) as server:
        with pytest.raises(OracleError, match="HTTP 401"):
            ask(server, journal, concurrency=3)
        assert len(journal.rows()) == 2
        ask(server, journal, concurrency=3)
    assert server.answered == dict.fromkeys(EXPECTED, 1)


def test_a_wrong_key_or_path_ends_the_run_at_once(journal):
    with serving(shout, key="secret") as server:
        with pytest.raises(OracleError, match="HTTP 401 Unauthorized: .*Incorrect API key"):
            ask(server, journal, api_key="wrong")
        with pytest.raises(OracleError, match="HTTP 404 .*no such path: /v2/chat/completions"):
            ask_all(Endpoint(server.url.replace("v1", "v2"), "oracle"), STATES, journal)
    assert not server.asked


def test_a_query_that_is_refused_does_not_keep_the_others_from_being_answered(journal):
    with serving(shout, faults=[None, 400]) as server:
        refused = ask(server, journal)
        assert list(refused) == [STATES[1].query] and "HTTP 400" in refused[STATES[1].query]
        assert len(journal.rows()) == 11
        assert ask(server, journal) == {}  # asked again, once
    assert traces(journal) == EXPECTED
    assert server.answered == dict.fromkeys(EXPECTED, 1)


def test_a_request_that_is_always_refused_ends_the_run(journal):
    with (
        serving(shout) as server,
        pytest.raises(OracleError, match="8 queries in a row.*Unrecognized request argument"),
    ):
        ask(server, journal, request={"max_tokes": 9})
    assert journal.rows() == []


def test_an_answer_that_was_cut_off_says_so(journal):
    with serving(shout, faults=[out_of_room]) as server:
        ask(server, journal, STATES[:2])
    assert [(row["trace"], row["cut_off"]) for row in journal.rows()] == [("", True), ("query 1 π!", False)]


# --- The function


def test_a_function_is_an_oracle(journal, tmp_path, monkeypatch):
    (tmp_path / "my_oracle.py").write_text(
        "def value(state):\n"
        "    if state.problem == 'hard': return None\n"
        "    return f'{state.problem} {state.partial_solution} {state.success_rate}'\n"
        "async def later(state): return ''\n"
        "def number(state): return 7\n"
    )
    monkeypatch.chdir(tmp_path)
    states = [State("a", "1+1", "=2", 0.5), State("b", "hard", "", 0.5)]
    refused = ask_all(make_oracle("my_oracle:value"), states, journal)
    assert traces(journal) == {"a": "1+1 =2 0.5"} and refused == {"b": "the function returned None"}
    with pytest.raises(TypeError, match="must return a string or None, got 7"):
        ask_all(make_oracle("my_oracle:number"), states, journal)
    for name, message in {
        "my_oracle:later": "must be a plain function",
        "my_oracle:nothing": "could not be imported: module 'my_oracle' has no attribute 'nothing'",
        "no_module:value": "could not be imported: No module named 'no_module'",
    }.items():
        with pytest.raises(ValueError, match=message):
            make_oracle(name)


def test_an_error_of_the_function_ends_the_run_and_loses_nothing(journal):
    calls = []

    def fails_at_the_fourth(state):
        calls.append(state.query)
        if len(calls) == 4:
            raise ZeroDivisionError
        return Answer(shout(state.query))

    with pytest.raises(ZeroDivisionError):
        ask_all(fails_at_the_fourth, STATES, journal)
    ask_all(fails_at_the_fourth, STATES, journal)
    assert traces(journal) == EXPECTED
    assert len(calls) == 13


# --- Kill and resume


PROGRAM = """
import sys
from pathlib import Path
from trl_credit.trainers.genac.traces.asking import ask_all
from trl_credit.journal import Journal
from trl_credit.trainers.genac.traces.oracle import Endpoint, State
states = [State(f"query {i} π") for i in range(12)]
ask_all(Endpoint(sys.argv[1], "oracle"), states, Journal(Path(sys.argv[2])), concurrency=2)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_and_started_again_asks_only_what_has_no_answer(tmp_path):
    path = tmp_path / "answers.jsonl"

    def slow(content):
        time.sleep(0.05)
        return shout(content)

    with serving(slow) as server:
        command = [sys.executable, "-c", PROGRAM, server.url, str(path)]
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})
        while not path.exists() or path.read_bytes().count(b"\n") < 4:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = traces(Journal(path))
        assert 4 <= len(kept) < 12 and kept.items() <= EXPECTED.items()
        before = server.asked.copy()
        subprocess.run(command, check=True)
    assert traces(Journal(path)) == EXPECTED
    assert all(server.asked[query] == before[query] for query in kept)
    assert max(server.asked.values()) <= 2  # twice: what was under way when it was killed
    assert len(Journal(path).rows()) == 12


def test_a_line_that_was_not_finished_is_cut_off_and_asked_again(journal):
    journal.append({"query": STATES[0].query, "trace": "kept"})
    with open(journal.path, "ab") as file:
        file.write('{"query": "query 1 π", "tra'.encode())
    again = Journal(journal.path)
    with serving(shout) as server:
        ask(server, again)
    assert traces(again) == {**EXPECTED, STATES[0].query: "kept"}
    assert STATES[0].query not in server.asked


def test_a_line_in_the_middle_that_is_not_json_is_named(journal):
    journal.path.write_text('{"query": "a", "trace": "b"}\nnot json\n{"query": "c", "trace": "d"}\n')
    with pytest.raises(ValueError, match=r"answers\.jsonl, line 2 is not JSON"):
        journal.rows()


@pytest.mark.parametrize("trace", ["\u2028 two\nlines\r\n", "\ud800", "\x00 ‮ e\u0301", ""])
def test_any_text_survives_the_journal(journal, trace):
    journal.append({"query": "q", "trace": trace})
    assert Journal(journal.path).rows() == [{"query": "q", "trace": trace}]
    assert json.loads(journal.path.read_bytes().decode("utf-8", "surrogatepass"))["trace"] == trace
