"""What `trl-credit inspect` reads, and what it says of what it cannot read."""

import base64
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trl_credit.cli import main
from trl_credit.cli.inspect import make_parser
from trl_credit.credit_log import BadTable, Right, read_completions, write_page


PAGE = (Path(__file__).parents[1] / "docs/inspect.md").read_text(encoding="utf-8")


def jsonl(path: Path, *rows) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def only(path: Path, **options):
    ((completion,), _) = read_completions(path, **options)
    return completion


# --- Formats


def test_rl_logging_board(tmp_path):
    row = {
        "prompt": "<PAD>Zwei Verse",
        "response": "威仪如<EOD><PAD>",
        "response_tokens": ["威", "仪", "如", "<EOD>", "<PAD>"],
        "logprobs": [-4.8, -1.0, -3.2, -0.1],  # none for the padding
        "ref_logprobs": [-4.8, -1.1, -3.2, -0.1],
        "values": [-0.5, 0.0, 0.5, 0.25],
        "token_rewards": [0.0, 0.0, 0.0, 1.0],
        "reward": 1.0,
        "step": 4,
        "ref_response": "从",
        "ref_reward": 0.0,
    }
    c = only(jsonl(tmp_path / "data.jsonl", row))
    assert (c.step, c.reward, c.right, c.prompt) == (4, 1.0, True, "<PAD>Zwei Verse")
    assert c.tokens == row["response_tokens"] and c.source == c.method == "data"
    assert c.columns == {
        "logp": [-4.8, -1.0, -3.2, -0.1, None],
        "ref_logp": [-4.8, -1.1, -3.2, -0.1, None],
        "value": [-0.5, 0.0, 0.5, 0.25, None],
        "token_reward": [0.0, 0.0, 0.0, 1.0, None],
        "value_change": [0.5, 0.5, -0.25, 0.75, None],
    }
    assert c.facts == {"ref_response": "从", "ref_reward": "0.0"}


def test_rollout_dump_of_verl(tmp_path):
    row = {"input": "1+1=?", "output": "It is\n 2.", "gts": ["2"], "score": 0.5, "acc": False, "reward_extra": {"n": 1}}
    jsonl(tmp_path / "10.jsonl", row | {"step": 10})
    jsonl(tmp_path / "9.jsonl", row)  # the step is the file's name
    completions, number = read_completions(tmp_path)
    assert [c.step for c in completions] == [9, 10] and number == 2
    for c in completions:
        assert c.tokens == ["It", " is", "\n 2."]  # words, where there are no tokens
        assert (c.prompt, c.reward, c.right, c.columns) == ("1+1=?", 0.5, False, {})
        assert c.facts == {"gts": '["2"]', "reward_extra": '{"n": 1}'}


def test_dump_with_numbers_per_token_of_any_name(tmp_path):
    row = {
        "tokens": ["a", "b", "c"],
        "advantages": -0.5,
        "log_ratio": [0.0, None, float("nan")],
        "my_number": [1, 2, 3],
        "response_mask": [1, 1, 0],
        "completion_ids": [5, 6, 7],
        "prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}],
    }
    c = only(jsonl(tmp_path / "x.jsonl", row))
    assert c.columns == {"advantage": [-0.5, -0.5, None], "ratio": [1.0, None, None], "my_number": [1.0, 2.0, 3.0]}
    assert (c.trained, c.token_ids) == ([True, True, False], [5, 6, 7])
    assert (c.prompt, c.reward, c.right) == ("user: Hi\nassistant: Yes?", None, None)


def test_value_change_skips_what_is_not_trained_and_ends_with_the_reward(tmp_path):
    row = {"tokens": list("abcd"), "value": [0.5, 0.25, 9, 0.75], "trained": [1, 1, 0, 1], "reward": 0}
    assert only(jsonl(tmp_path / "x.jsonl", row)).columns["value_change"] == [-0.25, 0.5, None, -0.75]


@pytest.mark.parametrize(("above", "right"), [(None, True), (0.0, True), (0.5, False)])
def test_right_is_a_reward_above_a_threshold_unless_the_table_says_so_and_nothing_is_asked(tmp_path, above, right):
    file = jsonl(tmp_path / "x.jsonl", {"tokens": ["a"], "reward": 0.5})
    assert only(file, right=Right(above=above)).right == right
    file = jsonl(tmp_path / "y.jsonl", {"tokens": ["a"], "reward": 0.5, "correct": not right})
    assert only(file).right != right
    assert only(file, right=Right(above=0.0 if above is None else above)).right == right


# --- Which completions


@pytest.fixture
def run(tmp_path):
    """A run that logged 4 completions at each of the steps 0, 50, ..., 950."""
    folder = tmp_path / "run" / "credit"
    folder.mkdir(parents=True)
    for step in range(0, 1000, 50):
        rows = [
            {"step": step, "row": row, "tokens": [str(step), str(row)], "advantage": [0.5, 1.0]} for row in range(4)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"step_{step:07d}.parquet")
    return tmp_path / "run"


def places(completions) -> list[tuple[int, int]]:
    return [(c.step, c.row) for c in completions]


def test_whole_rollouts_spread_over_the_run_with_its_last(run):
    completions, number = read_completions(run, limit=13)
    assert number == 80 and places(completions) == [(step, row) for step in (0, 500, 950) for row in range(4)]
    assert {c.source for c in completions} == {"run"}


def test_all_of_a_small_table_and_the_last_of_a_large_one(run):
    assert len(read_completions(run, limit=80)[0]) == 80
    assert places(read_completions(run, limit=2)[0]) == [(950, 0), (950, 1)]
    assert places(read_completions(run / "credit" / "step_0000050.parquet")[0]) == [(50, row) for row in range(4)]


def test_chosen_steps(run):
    assert places(read_completions(run, steps=[100, 0], limit=4)[0]) == [(0, 0), (0, 1), (100, 0), (100, 1)]


def test_counterparts_are_of_the_same_step_prompt_and_place_whatever_their_tokens(tmp_path):
    def table(name, *rows):
        return jsonl(tmp_path / name, *[{"step": s, "prompt": p, "tokens": list(t)} for s, p, t in rows])

    one = table("one.jsonl", (0, "p", "ab"), (0, "p", "ab"), (0, "q", "cd"), (8, "p", "ab"))
    other = table("two.jsonl", (0, "q", "xy"), (0, "p", "ab"), (8, "q", "ab"), (0, "p", "zz"), (0, "q", "cd"))
    completions, _ = read_completions(one)
    assert [c.place for c in completions] == [(0, "p", 0), (0, "p", 1), (0, "q", 0), (8, "p", 0)]
    found, _ = read_completions(other, like=completions)
    assert [(c.place, "".join(c.tokens)) for c in found] == [
        ((0, "q", 0), "xy"),
        ((0, "p", 0), "ab"),
        ((0, "p", 1), "zz"),
    ]
    assert len(read_completions(other, like=completions[3:])[0]) == 5, "where there is none, as without"


# --- What is right


def test_one_reward_function_decides_what_is_right_not_their_sum(tmp_path):
    rows = [
        {"tokens": ["a"], "reward": 0.2, "rewards": {"accuracy": accuracy, "format": 0.2}} for accuracy in (0, 1, None)
    ]
    completions, _ = read_completions(jsonl(tmp_path / "x.jsonl", *rows))
    assert [c.right for c in completions] == [False, True, None]
    assert {c.right_by for c in completions} == {"accuracy above 0"}
    completions, _ = read_completions(tmp_path / "x.jsonl", right=Right("format", 0.1))
    assert [c.right for c in completions] == [True] * 3 and completions[0].right_by == "format above 0.1"
    with pytest.raises(BadTable, match="has no reward of 'style'. Its reward functions are 'accuracy', 'format'"):
        read_completions(tmp_path / "x.jsonl", right=Right("style"))
    completions, _ = read_completions(jsonl(tmp_path / "y.jsonl", {"tokens": ["a"], "reward": 1, "acc": 0}))
    assert (completions[0].right, completions[0].right_by) == (False, "the table's column 'acc'")


# --- Answers that were not read


def test_a_segment_that_was_not_read_has_no_value_and_makes_no_change(tmp_path):
    segments = [
        {"start": 0, "end": 2, "value": 0.5, "read": True},
        {"start": 2, "end": 4, "value": 0.7, "read": False},
        {"start": 4, "end": 6, "value": 0.75, "read": True},
    ]
    row = {"tokens": list("abcdef"), "value": [0.5, 0.5, 0.7, 0.7, 0.75, 0.75], "segments": segments, "reward": 1}
    c = only(jsonl(tmp_path / "x.jsonl", row))
    assert c.columns["value"] == [0.5, 0.5, None, None, 0.75, 0.75]
    assert c.columns["value_change"] == [0.0, None, None, None, 0.0, 0.25]
    assert [(s["read"], s["value"]) for s in c.segments] == [(True, 0.5), (False, None), (True, 0.75)]
    segments[1] |= {"value": None, "read": None}
    assert only(jsonl(tmp_path / "y.jsonl", row)).columns == c.columns, "a value of null says the same"


# --- The command


def test_the_command_writes_a_page_and_says_what_is_on_it(run, tmp_path, capsys):
    page = tmp_path / "out.html"
    assert main(["inspect", str(run), "--completions", "8", "--output", str(page)]) == 0
    assert re.fullmatch(rf"{page}: 8 of 80 completions, 0\.0 MB\n", capsys.readouterr().out)
    assert main(["inspect", str(run), "--steps", "50", "--compare", str(run), "--output", str(page)]) == 0
    text = capsys.readouterr().out
    assert "4 of 80 completions, and 4 of 80 to compare them with, 4 of the same step, prompt and place, 4 of" in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text()).group(1))
    assert len({c["source"] for c in data["completions"]}) == 2


def test_a_page_loads_nothing_and_its_policy_forbids_it(tmp_path):
    rows = [{"tokens": ["<script src=//evil>", "</script>"], "reward": 1}]
    completions, _ = read_completions(jsonl(tmp_path / "x.jsonl", *rows))
    write_page(completions, tmp_path / "page.html", "<title>")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert html.count("<script") == html.count("</script>") == 3 and html.count("</title>") == 1
    assert not re.findall(r"\b(?:src|href)=", re.sub(r'<script type="application/json".*?</script>', "", html))
    assert "default-src 'none'; script-src 'sha256-" in html and "unsafe" not in html


def test_numbers_that_are_the_same_for_all_tokens_take_the_room_of_one(tmp_path):
    rows = [{"tokens": ["a"] * 5000, "advantage": 0.123456, "ratio": [1.0] * 5000}]
    completions, _ = read_completions(jsonl(tmp_path / "x.jsonl", *rows))
    write_page(completions, tmp_path / "page.html", "x")
    assert '"advantage":0.1235' in (tmp_path / "page.html").read_text()
    assert '"ratio":1,' in (tmp_path / "page.html").read_text().replace("}", ",")


def unpacked(page: Path) -> tuple[dict, list[dict]]:
    """What the page's script makes of a page: its data, and the tokens, ids and columns of each completion."""
    html = page.read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', html).group(1))
    planes = zlib.decompress(base64.b64decode(re.search(r'id="numbers">(.*?)</script>', html).group(1)))
    numbers = np.frombuffer(planes, np.uint8).reshape(2, -1)[::-1].T.copy().view("<u2").ravel()
    found = []
    for c in data["completions"]:
        rows = numbers[c["tokens"][0] :][: c["count"]]
        columns = {
            name: column["center"] + column["unit"] * numbers[column["at"] :][: c["count"]].view("<f2").astype(float)
            for name, column in c["columns"].items()
            if isinstance(column, dict)
        }
        texts = [[data[key][row] for row in rows] for key in ("texts", "ids")]
        found.append({"tokens": texts[0], "ids": texts[1], **columns})
    return data, found


@pytest.mark.slow
def test_64_completions_of_4_000_tokens_fit_and_are_exact_to_what_is_shown(tmp_path):
    rng = np.random.default_rng(0)
    vocabulary = [f" token{i}" for i in range(20_000)]
    ids = np.minimum(rng.zipf(1.3, (64, 4000)) - 1, len(vocabulary) - 1)
    value = np.clip(0.5 + rng.normal(0, 0.01, ids.shape).cumsum(1), 0, 1)
    logp = -(rng.exponential(0.5, ids.shape) ** 4)  # from -1e-12 to -1000
    numbers = {
        "advantage": rng.normal(0, 1, ids.shape),
        "value": value,
        "logp": logp,
        "entropy": rng.exponential(0.3, ids.shape),
        "ratio": np.exp(rng.normal(0, 0.01, ids.shape)),
        "weight": rng.uniform(0, 20, ids.shape),
    }
    rows = [
        {
            "tokens": [vocabulary[i] for i in line],
            "token_ids": line.tolist(),
            "reward": 1,
            "prompt": f"{n} is asked. " * 50,
        }
        | {name: column[n].tolist() for name, column in numbers.items()}
        for n, line in enumerate(ids)
    ]
    completions, _ = read_completions(jsonl(tmp_path / "x.jsonl", *rows))
    info = write_page(completions, tmp_path / "page.html", "x")
    assert info["tokens_left_out"] == 0 and info["bytes"] <= 5_000_000
    _, found = unpacked(tmp_path / "page.html")
    for c, told in zip(completions, found, strict=True):
        assert told["tokens"] == c.tokens and told["ids"] == c.token_ids
        for name, column in c.columns.items():
            center = 1.0 if name == "ratio" else 0.0
            true, error = np.array(column) - center, np.abs(np.array(told[name]) - column)
            # Half of the third digit, of which all that is shown; or nine powers of ten below the largest number.
            assert (error <= np.maximum(np.abs(true) * 5e-4, np.abs(true).max() * 1e-8)).all(), name


def test_numbers_without_a_value_and_any_text_survive_the_packing(tmp_path):
    rows = [
        {
            "tokens": ["a", "", "{{numbers}}", "\u2028"],
            "value": [0.5, None, 0.25, 1.0],
            "advantage": [1e30, 0, None, -1e25],
        },
        {
            "tokens": ["a"] * 4,
            "ratio": [1.0, 1.0, None, 1.5],
            "trained": [1, 1, 0, 1],
            "weight": [0.0, 0.0, 1e-30, 0.0],
        },
    ]
    completions, _ = read_completions(jsonl(tmp_path / "x.jsonl", *rows))
    write_page(completions, tmp_path / "page.html", "{{numbers}}")
    data, (first, second) = unpacked(tmp_path / "page.html")
    assert data["title"] == "{{numbers}}" and first["tokens"] == rows[0]["tokens"]
    assert np.array_equal(first["value"], [0.5, np.nan, 0.25, 1.0], equal_nan=True)
    assert np.allclose(first["advantage"], [1e30, 0, np.nan, -1e25], rtol=5e-4, equal_nan=True)
    assert np.array_equal(second["ratio"], [1.0, 1.0, np.nan, 1.5], equal_nan=True)


def test_a_page_stays_small_whatever_is_long(tmp_path):
    segments = [{"start": 0, "end": 1, "reasoning": "r" * 30_000}] * 12
    row = {"prompt": "p" * 30_000, "value": [0.123] * 1000, "segments": segments}
    rows = [
        {
            **row,
            "note": str(i) * 5000,
            "prompt": f"{i}" + row["prompt"],
            "tokens": [f"{i} {t} {'long' * 15}" for t in range(1000)],
        }
        for i in range(64)
    ]
    completions, _ = read_completions(jsonl(tmp_path / "x.jsonl", *rows))
    page = write_page(completions, tmp_path / "page.html", "x")
    assert 3_000_000 < page["bytes"] <= 5_000_000 and page["tokens_left_out"] > 0
    assert "more characters)" in (tmp_path / "page.html").read_text()


# --- Bad input: the table of the page

BAD = {
    "no such path": lambda folder: folder / "nowhere",
    "a folder without tables": lambda folder: folder,
    "a file of another kind": lambda folder: jsonl(folder / "log.txt", {}),
    "an empty file": lambda folder: jsonl(folder / "x.jsonl"),
    "a parquet table without rows": lambda folder: (
        pq.write_table(pa.table({"tokens": pa.array([], pa.list_(pa.string()))}), folder / "x.parquet")
        or folder / "x.parquet"
    ),
    "a file that is no parquet": lambda folder: jsonl(folder / "x.jsonl", "PAR").rename(folder / "x.parquet"),
    "a line that is no JSON": lambda folder: jsonl(folder / "x.jsonl", {"tokens": ["a"]}, "{"),
    "a line that is no object": lambda folder: jsonl(folder / "x.jsonl", "[1]"),
    "neither tokens nor text": lambda folder: jsonl(folder / "x.jsonl", {"prompt": "a", "reward": 1}),
    "tokens that are not texts": lambda folder: jsonl(folder / "x.jsonl", {"tokens": [1, 2]}),
    "numbers per token without tokens": lambda folder: jsonl(folder / "x.jsonl", {"output": "a b", "values": [1]}),
    "more numbers than tokens": lambda folder: jsonl(folder / "x.jsonl", {"tokens": ["a"], "values": [1, 2]}),
    "a step that is no number": lambda folder: jsonl(folder / "x.jsonl", {"tokens": ["a"], "step": "last"}),
    "a segment outside of the tokens": lambda folder: jsonl(
        folder / "x.jsonl", {"tokens": ["a"], "segments": [{"start": 0, "end": 2}]}
    ),
    "a segment without bounds": lambda folder: jsonl(folder / "x.jsonl", {"tokens": ["a"], "segments": ["all"]}),
}


def rows_of(heading: str) -> list[list[str]]:
    lines = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0].splitlines()
    table = [line for line in lines if line.startswith("| ") and not line.startswith("| ---")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line[1:-1])] for line in table][1:]


@pytest.mark.parametrize(("given", "message"), rows_of("Bad input"))
def test_bad_input_is_refused_with_the_message_of_the_page(given, message, tmp_path, capsys):
    path = BAD[given](tmp_path)
    with pytest.raises(BadTable) as caught:
        read_completions(path)
    parts = [part.strip() for part in message.replace("`FILE`", str(path)).replace("`", "").split("…")]
    assert all(part in str(caught.value).replace("`", "") for part in parts), str(caught.value)
    with pytest.raises(SystemExit) as exit:
        main(["inspect", str(path), "--output", str(tmp_path / "page.html")])
    assert exit.value.code == 2 and capsys.readouterr().err == f"trl-credit inspect: error: {caught.value}\n"
    assert not (tmp_path / "page.html").exists()


def test_every_bad_input_that_is_tested_is_on_the_page():
    assert [given for given, _ in rows_of("Bad input")] == list(BAD)


def test_the_table_of_options_is_the_help(run):
    stated = {name.strip("`"): (default, text) for name, default, text in rows_of("Options") if name.startswith("`--")}
    options = {action.option_strings[0]: action for action in make_parser()._actions if action.option_strings}
    assert set(stated) == set(options) - {"-h"}
    for name, (default, text) in stated.items():
        assert default == str("" if options[name].default is None else options[name].default)
        assert options[name].help.split(" (default")[0] in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--completions", "0"], "--completions must be at least 1, got 0"),
        (
            ["--output", "no/folder/page.html"],
            "--output must be a file in a folder that exists, got no/folder/page.html",
        ),
        (["--output", "."], "--output must be a file in a folder that exists"),
        (["--steps", "7"], "has no step 7. It has 20 steps, from 0 to 950."),
        (["--compare", "nowhere"], "There is no file or folder nowhere."),
        (["--right_reward", "accuracy"], "has no reward of 'accuracy'. Its reward functions are not named: it has"),
        (["--complete"], "unrecognized arguments: --complete"),
    ],
)
def test_bad_arguments(run, argv, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["inspect", str(run), *argv])
    assert exit.value.code == 2 and message in capsys.readouterr().err
