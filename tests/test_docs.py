"""The documentation says what the package does: tables, metrics, commands and code blocks are held against it."""

import ast
import doctest
import os
import re
import shlex
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from datasets import Dataset
from peft import PeftModel
from tiny import tiny_model_dir

import trl_credit
from trl_credit import GRPOLambdaConfig, GRPOLambdaTrainer
from trl_credit.methods import METHODS
from trl_credit.options import plain
from trl_credit.scripts.train import make_parser
from trl_credit.toy.quickstart import make_parser as quickstart_parser


ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs/plugins"))
from options import on_page_markdown  # noqa: E402


PAGES = sorted((ROOT / "docs").rglob("*.md"))
TRAINER_PAGE = (ROOT / "docs/trainers/grpo_lambda.md").read_text(encoding="utf-8")


def section(page: str, heading: str) -> str:
    level = heading.split()[0]
    return page.split(f"{heading}\n", 1)[1].split(f"\n{level} ", 1)[0]


def rows(text: str) -> list[list[str]]:
    """Cells of the body rows of the tables in `text`, without backticks around the whole cell."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [[re.sub(r"^`([^`]*)`$", r"\1", cell.strip()) for cell in line[1:-1].split("|")] for line in lines]


def blocks(page: str, opening: str) -> list[str]:
    """Contents of fenced code blocks that open with ```` ```<opening> ````, indented ones included."""
    found = re.findall(rf"^( *)```{re.escape(opening)}\n(.*?)^ *```$", page, flags=re.DOTALL | re.MULTILINE)
    return ["".join(line[len(indent) :] for line in code.splitlines(keepends=True)) for indent, code in found]


# --- Options


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.command)
def test_the_page_of_a_method_has_the_table_of_its_options(method):
    page = (ROOT / f"docs/trainers/{method.folder}.md").read_text(encoding="utf-8")
    config = method.load()[0]
    table = rows(on_page_markdown(section(page, "## Configuration")))
    for option in fields(config):
        if option.name in config.__annotations__:
            default = str(option.default_factory() if option.default is MISSING else option.default)
            (row,) = [row for row in table if row[0] == option.name]
            assert (row[1] or "None").replace("e-6", "e-06") == default, option.name
            assert plain(row[2]).split("[")[0] in option.metadata["help"], option.name


def test_the_paper_index_has_every_method():
    table = rows((ROOT / "docs/paper_index.md").read_text(encoding="utf-8"))
    for method in METHODS.values():
        trainer = method.load()[1]
        (row,) = [row for row in table if row[0] == trainer._paper["title"]]
        assert row[1] == "[{id}](https://arxiv.org/abs/{id})".format(**trainer._paper)
        assert row[2].startswith(f"[`{trainer.__name__}`](trainers/{method.folder}.md)")


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.command)
def test_a_methods_card_cites_its_paper(method):
    paper = method.load()[1]._paper
    assert f"arXiv:{paper['id']}" in paper["citation"]
    assert paper["title"].replace("λ", "$\\lambda$") in paper["citation"]


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.command)
def test_every_method_has_a_page_in_the_menu_and_a_recipe_is_named_on_it(method):
    assert f"trainers/{method.folder}.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    page = (ROOT / f"docs/trainers/{method.folder}.md").read_text(encoding="utf-8")
    assert all(recipe in page for recipe in method.recipes)


def test_defaults_beside_the_settings_of_the_paper_are_the_defaults(tmp_path):
    config = GRPOLambdaConfig(str(tmp_path), bf16=False)
    table = rows(section(TRAINER_PAGE, "## Hyper-parameters of the paper"))
    stated = {}
    for names, _, defaults in table[1:]:
        if names.replace("`", "").split(", ")[0] in vars(config):
            names, defaults = names.replace("`", "").split(", "), defaults.replace("`", "").split(", ")
            stated |= dict(zip(names, defaults, strict=True))
    assert len(stated) == 12
    assert {name: value.replace("−", "-") for name, value in stated.items()} == {
        name: re.sub(r"e-0", "e-", str(getattr(config, name))) for name in stated
    }


def test_commands_and_yaml_of_the_command_line_page_parse(tmp_path, monkeypatch):
    page = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (settings,) = blocks(page, "yaml")
    Path("grpo_lambda.yaml").write_text(settings)
    lines = "".join(blocks(page, "bash")).replace("\\\n", "").splitlines()
    commands = [shlex.split(line)[2:] for line in lines if re.match("trl-credit grpo-lambda (?!--help)", line)]
    assert len(commands) == 3
    parsed = [
        make_parser("grpo-lambda").parse_args_and_config([*c, "--bf16", "False"], return_remaining_strings=True)
        for c in commands
    ]
    assert [config.trace_lambda for _, config, *_ in parsed] == [0.99, 0.98, 0.99]
    assert [config.min_advantage for _, config, *_ in parsed] == [-0.1, None, None]
    assert [rest for *_, rest in parsed] == [[], [], ["--accelerate_config", "zero2", "--num_processes", "8"]]
    _, config, *_ = make_parser("grpo-lambda").parse_args_and_config(
        [*commands[0], "--bf16", "False", "--min_advantage", "None"]
    )
    assert config.min_advantage is None


def test_options_of_the_quickstart_are_on_its_page_with_their_defaults():
    page = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8")
    table = rows(page.split("## Results")[0])[1:]
    options = {a.option_strings[0]: a.help for a in quickstart_parser()._actions if a.dest != "help"}
    defaults = {a.option_strings[0]: a.default for a in quickstart_parser()._actions}
    assert [row[0] for row in table] == list(options)
    for name, *stated, _ in table:
        for value in set(stated) - {"", "a tiny model", "the trainer's"}:
            assert value == str(defaults[name]) or value in options[name], name


# --- Metrics


def logged_metrics(model_dir, output_dir, **settings) -> set[str]:
    def letters(completions, **kwargs):
        return [len(set(completion)) / 10 for completion in completions]

    config = GRPOLambdaConfig(
        str(output_dir),
        **{
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "max_completion_length": 8,
            "bf16": False,
            "report_to": [],
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            **settings,
        },
    )
    prompts = Dataset.from_dict({"prompt": ["ab", "cd ef", "a", "b c d"]})
    trainer = GRPOLambdaTrainer(model=model_dir, reward_funcs=letters, args=config, train_dataset=prompts)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 2
    return {re.sub(r"^rewards/letters/", "rewards/<function>/", name) for entry in steps for name in entry} - {"step"}


@pytest.mark.slow
def test_every_logged_metric_is_explained_and_every_explained_one_is_logged(model_dir, tmp_path):
    moe = str(tiny_model_dir(tmp_path / "moe", "qwen3_moe"))
    logged = (
        logged_metrics(model_dir, tmp_path, beta=0.04, num_iterations=2, entropy_coef=0.01)
        | logged_metrics(model_dir, tmp_path, trace_update="weight")
        | logged_metrics(model_dir, tmp_path, loss_type="cispo", epsilon_high=5.0)
        | logged_metrics(moe, tmp_path, router_aux_loss_coef=0.001, model_init_kwargs={"output_router_logits": True})
    )
    explained = [metric for metric, _, _ in rows(section(TRAINER_PAGE, "## Logged metrics")) if metric != "metric"]
    assert len(explained) == len(set(explained))
    assert logged == set(explained)


# --- Code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_of_a_page_is_python_and_its_examples_give_what_they_show(page):
    text = page.read_text(encoding="utf-8")
    for code in blocks(text, "python"):
        compile(code, page.name, "exec")
    examples = "".join(blocks(text, "pycon"))
    test = doctest.DocTestParser().get_doctest(examples, {}, page.name, str(page), 0)
    report = []
    doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert not report, "".join(report)


@pytest.mark.parametrize("index", [0, 1], ids=["script", "lora"])
def test_scripts_of_the_trainer_page_train(model_dir, tmp_path, monkeypatch, index):
    """With the model, the dataset and the length of the run swapped for tiny ones."""
    problems = {"prompt": [[{"role": "user", "content": f"What is {n}+{n}?"}] for n in range(8)]}
    problems["solution"] = [f"${2 * n}$" for n in range(8)]
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: Dataset.from_dict(problems))
    monkeypatch.chdir(tmp_path)
    script = blocks(TRAINER_PAGE, "{ .python .runnable }")[index]
    short = "max_steps=1, max_completion_length=8, bf16=False, report_to=[], "
    for old, new in (
        ('"Qwen/Qwen2.5-0.5B-Instruct"', repr(model_dir)),
        ("GRPOLambdaConfig(out", f"GRPOLambdaConfig({short}out"),
    ):
        assert old in script
        script = script.replace(old, new)
    names = {}
    exec(script, names)
    assert names["trainer"].state.global_step == 1
    assert isinstance(names["trainer"].model, PeftModel) == (index == 1)


def test_method_of_the_contributing_page_trains_and_logs(model_dir, tmp_path):
    page = (ROOT / "docs/contributing.md").read_text(encoding="utf-8")
    names = {"__name__": "own_method"}
    for code in blocks(page, "{ .python .runnable }"):
        exec(code, names)
    with pytest.raises(ValueError, match=r"FadingConfig: `fade` must be .* in \[0, 1\], got 2"):
        names["FadingConfig"](str(tmp_path), fade=2)
    trainer = names["FadingTrainer"](
        model=model_dir,
        reward_funcs=lambda completions, **kwargs: [float(len(set(text))) for text in completions],
        args=names["FadingConfig"](
            str(tmp_path),
            fade=0.5,
            max_steps=1,
            max_completion_length=8,
            bf16=False,
            report_to=[],
            logging_steps=1,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
    )
    trainer.train()
    # Of at most 8 tokens the last weighs 1, the one before it a half, and so on.
    assert 1 / 8 < trainer.state.log_history[0]["fade/weight_mean"] <= 1


# --- The site


def test_every_function_of_credit_is_in_its_reference():
    page = (ROOT / "docs/reference/credit.md").read_text(encoding="utf-8")
    for file in sorted((ROOT / "trl_credit/credit").glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert f"::: trl_credit.credit.{file.stem}.{node.name}\n" in page


def test_every_public_name_is_in_the_reference():
    reference = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/reference").glob("*.md"))
    documented = {path.rsplit(".", 1)[1] for path in re.findall(r"^::: ([\w.]+)$", reference, flags=re.MULTILINE)}
    assert set(trl_credit.__all__) - {"__version__"} <= documented


def test_files_and_tests_that_pages_name_exist():
    named = {
        match
        for page in PAGES
        for match in re.findall(
            r"(?<![\w/.])(?:trl_credit|tests|examples|benchmarks|docs)/[\w/.-]*[\w/](?:::\w+)?", page.read_text()
        )
    }
    for name in named:
        file, _, test = name.partition("::")
        assert (ROOT / file).exists(), name
        assert f"def {test}(" in (ROOT / file).read_text() if test else True, name


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    build = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert build.returncode == 0, build.stderr
    return folder


@pytest.mark.slow
def test_site_builds_without_a_warning_and_fetches_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) >= 15
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"(?:https?:)?//[^>]*>", html), page
        assert not re.findall(r"<link[^>]*rel=\"(?:stylesheet|preconnect|icon)\"[^>]*href=\"(?:https?:)?//", html), page
    for style in site.rglob("*.css"):
        assert not re.findall(r"url\([\"']?(?:https?:)?//|@import", style.read_text(encoding="utf-8")), style


@pytest.mark.slow
def test_no_equation_is_left_as_source(site):
    for page in site.rglob("*.html"):
        text = re.sub(r"<(code|pre|script)\b.*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.findall(r"\\[(\[]|\\\w+\{", text), page
    assert "<math" in (site / "trainers/grpo_lambda/index.html").read_text(encoding="utf-8")
    assert "<math" in (site / "reference/credit/index.html").read_text(encoding="utf-8")
