"""The GPU run is never broken: all of it at toy size on the CPU, and what becomes of jobs that fail."""

import json
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "gpu"))
import make_table
import run as gpu_run
import shapes


@pytest.mark.slow
def test_the_whole_run_works_at_toy_size(tmp_path, capsys):
    file = tmp_path / "gpu.json"
    assert gpu_run.main(["--toy", "--output", str(file)]) == 0
    results = json.loads(file.read_text())
    jobs = results["jobs"]
    assert list(jobs) == [job.name for job in gpu_run.jobs(toy=True)]
    assert results["about"]["device"] == "CPU" and results["about"]["toy"]
    assert all(row["error"] < 1e-5 for row in jobs["kernels"]["rows"] if row["dtype"] == "float32")
    for trainer in shapes.TRAINERS:
        step = jobs[f"step 0.5B 2048 {trainer}"]
        assert step["step_s"] > 0 and step["planned_gib"] > 0
        assert (step["critic_update_s"] > 0.1 * step["step_s"]) == (trainer in ("vapo", "sppo", "genac"))
    for name, arms in (("logits", ("tiles", "whole")), ("attention", ("sdpa", "flex_attention"))):
        for row in jobs[name]["rows"]:
            assert row[arms[0]]["loss"] == pytest.approx(row[arms[1]]["loss"], rel=1e-4)
    assert [jobs[f"learning {trainer}"]["steps"] for trainer in ("grpo", "vapo")] == [2, 2]
    text = make_table.tables(results)
    assert "| 0.5B | 160 | `vapo` |" in text and "Not measured" not in text


@pytest.fixture
def quick(monkeypatch):
    """Jobs of a second: one that works, one that fails, one for which there is no time."""
    scripts = {
        "works.py": 'import json, sys; print("noise"); print(json.dumps({"argv": sys.argv[1:]}))',
        "fails.py": 'raise RuntimeError("out of memory")',
        "late.py": "",
    }
    jobs = [gpu_run.Job(name.removesuffix(".py"), (name, "x"), 9999 * (name == "late.py")) for name in scripts]

    def start(folder):
        for name, text in scripts.items():
            (folder / name).write_text(text)
        monkeypatch.setattr(gpu_run, "HERE", folder)
        monkeypatch.setattr(gpu_run, "jobs", lambda toy: jobs)
        monkeypatch.setattr(gpu_run.torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(gpu_run.torch.cuda, "get_device_name", lambda: "a GPU")
        return folder / "out.json"

    return start


def test_a_job_that_fails_is_written_down_and_the_next_one_is_made(quick, tmp_path, capsys):
    file = quick(tmp_path)
    assert gpu_run.main(["--output", str(file)]) == 1
    jobs = json.loads(file.read_text())["jobs"]
    assert jobs["works"]["argv"][0] == "x" and int(jobs["works"]["argv"][2]) > 1000
    assert jobs["fails"]["error"].endswith("RuntimeError: out of memory")
    assert jobs["late"]["error"] == "no time was left"
    text = make_table.tables(json.loads(file.read_text()))
    assert "Not measured: fails (RuntimeError: out of memory); late (no time was left)." in text


def test_a_second_run_makes_what_is_missing_and_keeps_the_rest(quick, tmp_path, capsys):
    file = quick(tmp_path)
    gpu_run.main(["--output", str(file), "--only", "works"])
    assert list(json.loads(file.read_text())["jobs"]) == ["works"]
    (tmp_path / "works.py").write_text("raise RuntimeError")
    (tmp_path / "fails.py").write_text("print('{}')")
    gpu_run.main(["--output", str(file)])
    jobs = json.loads(file.read_text())["jobs"]
    assert "argv" in jobs["works"] and "error" not in jobs["fails"]


def test_a_job_is_cut_off_when_the_time_is_over(tmp_path, monkeypatch):
    (tmp_path / "sleeps.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(gpu_run, "HERE", tmp_path)
    assert gpu_run.run(gpu_run.Job("sleeps", ("sleeps.py",), 0), 1.0) == {"error": "cut off after 1 s"}


def test_results_of_another_machine_are_not_mixed_in(quick, tmp_path, capsys):
    file = quick(tmp_path)
    file.write_text(json.dumps({"about": {**gpu_run.about(False), "device": "another"}, "jobs": {}}))
    with pytest.raises(SystemExit):
        gpu_run.main(["--output", str(file)])
    assert "holds results of another machine" in capsys.readouterr().err


def test_without_a_gpu_the_run_refuses(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_run.main(["--output", str(tmp_path / "out.json")])
    assert "--toy runs on a CPU" in capsys.readouterr().err


def test_what_matters_most_comes_first_and_all_fits_in_its_time():
    names = [job.name for job in gpu_run.jobs(toy=False)]
    assert names[0] == "kernels" and names[1].endswith("grpo") and names[2].endswith("vapo")
    assert len(names) == 1 + 2 * 2 * 5 + 2 + 2
    assert names.index("step 1.5B 8192 vapo") < names.index("step 0.5B 2048 genac")
