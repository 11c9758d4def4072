"""A run publishes its model with the real `huggingface_hub` client, and others load what it published.

The Hub is `hub_server.py` on loopback. Its clients run in processes of their own, as users' do: `HF_ENDPOINT` is read
when `huggingface_hub` is imported.
"""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from hub_server import Hub, Repo
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file
from tiny import tiny_model_dir


pytestmark = pytest.mark.slow


SCRIPT = Path(__file__).parents[1] / "examples" / "push_to_hub.py"
TOKENS = {"hf_writes": ("user", "write"), "hf_reads": ("user", "read")}
TINY_RUN = shlex.split("""--max_steps 2 --save_steps 1 --logging_steps 1 --max_completion_length 16 --num_generations 4
    --per_device_train_batch_size 4 --learning_rate 1e-2 --use_cpu --bf16 false --report_to none
    --hub_always_push""")  # a push is otherwise left out while the one before it is under way


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub"), TOKENS) as hub:
        yield hub
    assert hub.unknown == []  # the client asked for nothing that the server had to refuse for not knowing it


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The arguments that swap the example's model and data for tiny local ones."""
    root = tmp_path_factory.mktemp("inputs")
    rows = [{"prompt": [{"role": "user", "content": f"{i}+3=?"}], "solution": f"${i + 3}$"} for i in range(8)]
    (root / "data").mkdir()
    (root / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["--model", str(tiny_model_dir(root)), "--dataset", str(root / "data")]


@pytest.fixture
def client(hub, tmp_path):
    """Runs a command as a user of this Hub would, with an empty cache."""
    return lambda *command, **kwargs: run_client(hub, tmp_path / "cache", *command, **kwargs)


def run_client(hub, cache, *command, token="hf_writes"):
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1"}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), env=env, text=True, capture_output=True, timeout=240)


def train(hub, inputs, out, repo, *flags, token="hf_writes"):
    command = [sys.executable, SCRIPT, *inputs, *TINY_RUN, "--output_dir", out, "--hub_model_id", repo, *flags]
    return run_client(hub, out.parent / f"{out.name}-cache", *command, token=token)


@pytest.fixture(scope="module")
def published(hub, inputs, tmp_path_factory):
    """A finished run of the example: its output folder and what is on the Hub."""
    out = tmp_path_factory.mktemp("run") / "out"
    settings = ["--trace_lambda", "0.9", "--trace_style", "both", "--min_advantage", "-0.5"]
    settings += ["--log_credit", "--log_credit_steps", "1"]
    run = train(hub, inputs, out, "user/full", *settings)
    assert run.returncode == 0, run.stderr
    return out, hub.files("models/user/full")


def test_published_weights_are_the_final_weights_bit_for_bit(hub, inputs, published):
    out, files = published
    final = load_file(out / "checkpoint-2" / "model.safetensors")  # written by the trainer after the last step
    on_hub, initial = load(files["model.safetensors"]), load_file(Path(inputs[1]) / "model.safetensors")
    assert on_hub.keys() == final.keys()
    assert all(on_hub[name].equal(final[name]) for name in final)
    assert not any(on_hub[name].equal(initial[name]) for name in initial if "proj.weight" in name)
    oid = hashlib.sha256(files["model.safetensors"]).hexdigest()
    assert f"PUT /lfs/{oid} 200" in hub.calls  # came over LFS, by the client's own upload


def test_every_save_is_pushed(hub, published):
    out, files = published
    repo = hub.repos["models/user/full"]
    # Pushes run beside the training, so that a short run may have saved step 2 before step 1 is read from its folder.
    # The client then finds nothing new to commit for step 2. But there must be a push for each save and a last one.
    assert hub.calls.count("POST /api/models/user/full/preupload/main 200") == 3
    expected = ["initial commit", "Training in progress, step 1", "Training in progress, step 2", "End of training"]
    assert len(repo.messages) > 1
    assert set(repo.messages) <= set(expected)
    assert not any(path.startswith("checkpoint-") for path in files)  # those are other strategies


def test_published_model_loads_and_the_quick_start_of_its_card_runs(client, published, tmp_path):
    out, files = published
    quick_start = re.search(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)[1]
    user = f"""{quick_start}
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("user/full")
tokenizer = AutoTokenizer.from_pretrained("user/full")
prompt = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "1+2=?"}}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
print("\\ntokens", model.generate(**prompt, max_new_tokens=8, min_new_tokens=8).shape[1] - prompt.input_ids.shape[1])
print("round trip", tokenizer.decode(tokenizer("3+8\\n é").input_ids) == "3+8\\n é")
save_file(model.state_dict(), {str(tmp_path / "loaded.safetensors")!r})"""
    run = client(sys.executable, "-c", user)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-2:] == ["tokens 8", "round trip True"]
    loaded, final = load_file(tmp_path / "loaded.safetensors"), load_file(out / "model.safetensors")
    assert loaded.keys() == final.keys()
    assert all(loaded[name].equal(final[name]) for name in final)


def test_card_says_what_was_trained_and_how(published, inputs):
    text = published[1]["README.md"].decode()
    card = ModelCard(text)
    assert {"trl", "trl-credit", "grpo-lambda"} <= set(card.data.tags)
    assert card.data.library_name == "transformers"
    assert card.data.get("base_model") is None  # a folder of this machine is no model on the Hub
    assert "huggingface.co/papers/2510.00194" in text
    assert "@article{parthasarathi2025grpolambda" in text
    settings = dict(re.findall(r"^\| `(\w+)` \| `(.*)` \|$", text, re.MULTILINE))
    chosen = {"trace_lambda": "0.9", "trace_style": "both", "min_advantage": "-0.5", "learning_rate": "0.01"}
    defaults = {"gamma": "1.0", "trace_update": "trace", "trace_floor": "0.0", "trace_normalization": "none"}
    assert settings.items() >= (chosen | defaults).items()
    assert not [path for path in inputs[1::2] if path in text]
    assert "fine-tuned version of a local model" in text


def test_the_prompts_of_the_credit_log_stay_here(published):
    out, files = published
    assert len(list((out / "_credit").glob("*.parquet"))) == 2
    assert not [path for path in files if "credit" in path or path.endswith(".parquet")]


def test_card_says_what_came_of_it_and_nothing_that_nobody_has_set(published):
    out, files = published
    text = files["README.md"].decode()
    history = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    reward = [entry["reward"] for entry in history if "reward" in entry][-1]
    assert f"Optimizer steps: 2. Mean reward, as logged last: {reward:.3g}." in text
    assert "https://pypi.org/project/trl-credit/" in text
    assert "| `None` |" not in text and "Its critic" not in text


def test_all_checkpoints_go_to_a_private_repository(hub, client, inputs, tmp_path):
    flags = ["--hub_strategy", "all_checkpoints", "--hub_private_repo", "true"]
    run = train(hub, inputs, tmp_path / "out", "user/all", *flags)
    assert run.returncode == 0, run.stderr
    assert hub.repos["models/user/all"].private
    files = hub.files("models/user/all")
    for step in ("checkpoint-1", "checkpoint-2"):
        local = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out" / step).iterdir()}
        assert {path for path in files if path.startswith(step)} == local
        assert all(files[path] == (tmp_path / "out" / path).read_bytes() for path in local)


def test_adapter_of_a_model_on_the_hub_and_its_last_checkpoint_load_with_peft(hub, client, published, inputs, tmp_path):
    out = tmp_path / "out"
    base = ["--model", "user/full"]
    run = train(hub, inputs, out, "user/adapter", *base, "--lora", "--hub_strategy", "checkpoint")
    assert run.returncode == 0, run.stderr
    files = hub.files("models/user/adapter")
    assert "model.safetensors" not in files
    assert files["adapter_model.safetensors"] == (out / "checkpoint-2" / "adapter_model.safetensors").read_bytes()
    assert json.loads(files["last-checkpoint/trainer_state.json"])["global_step"] == 2
    card = ModelCard(files["README.md"].decode())
    assert {"trl-credit", "grpo-lambda"} <= set(card.data.tags)
    assert card.data.base_model == "user/full"
    user = f"""
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
trained = load_file({str(out / "adapter_model.safetensors")!r})
prompt = torch.arange(8)[None]
for model in (
    AutoPeftModelForCausalLM.from_pretrained("user/adapter"),
    PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained("user/full"), "user/adapter", subfolder="last-checkpoint"
    ),
):
    loaded = get_peft_model_state_dict(model)
    print("same", loaded.keys() == trained.keys() and all(loaded[name].equal(trained[name]) for name in trained))
    adapted = model(prompt).logits
    with model.disable_adapter():
        print("adapted", not torch.equal(adapted, model(prompt).logits))
    print("tokens", model.generate(input_ids=prompt, max_new_tokens=4, min_new_tokens=4).shape[1])"""
    loaded = client(sys.executable, "-c", user)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.splitlines()[-6:] == ["same True", "adapted True", "tokens 12"] * 2


def test_wrong_token_is_told_before_training(hub, inputs, tmp_path):
    run = train(hub, inputs, tmp_path / "out", "user/wrong", token="hf_wrong")
    assert run.returncode != 0
    assert "Invalid credentials in Authorization header" in run.stderr.strip().splitlines()[-1]
    assert "train_runtime" not in run.stdout
    assert "models/user/wrong" not in hub.repos


def test_model_survives_a_token_that_may_not_write_and_is_sent_later(hub, client, inputs, tmp_path):
    # The repository exists, so that the right to write is first missed when there is something to lose.
    repo = hub.repos["models/user/readonly"] = Repo(private=False)
    repo.commit("main", {}, "initial commit")
    out = tmp_path / "out"
    run = train(hub, inputs, out, "user/readonly", token="hf_reads")
    assert run.returncode != 0
    assert "You don't have the rights to write to the namespace 'user'" in run.stderr
    assert "Make sure your token has the correct permissions" in run.stderr
    assert repo.messages == ["initial commit"]
    weights = (out / "model.safetensors").read_bytes()
    assert weights == (out / "checkpoint-2" / "model.safetensors").read_bytes()

    hf = Path(sys.executable).with_name("hf")
    later = client(hf, "upload", "user/readonly", out, "--exclude", "checkpoint-*")  # as the example says
    assert later.returncode == 0, later.stderr
    files = hub.files("models/user/readonly")
    assert files["model.safetensors"] == weights
    assert {"README.md", "config.json", "tokenizer.json"} < files.keys()


def test_server_refuses_uploads_that_are_not_what_was_announced(hub):
    def put(link, content, **headers):
        request = urllib.request.Request(link, data=content, headers=headers, method="PUT")
        with pytest.raises(urllib.error.HTTPError) as error, urllib.request.urlopen(request):
            pass
        error.value.close()
        return error.value.code

    content = b"weights"
    oid = hashlib.sha256(content).hexdigest()
    link = hub.storage_link(oid, size=len(content))
    assert put(link, b"wrights") == 400
    assert put(hub.storage_link(oid, size=8), content) == 400
    assert put(link.replace("signature=", "signature=0"), content) == 403
    assert put(link, content, Authorization="Bearer hf_writes") == 403  # the token must not leave the Hub
    assert not hub.blob(oid).exists()


def test_server_keeps_what_the_client_commits(client, tmp_path):
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "sub" / "deep" / "w.bin").write_bytes(b"weights")
    (tmp_path / "a.txt").write_text("text")
    user = f"""
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
api, repo = HfApi(), "user/files"
assert api.whoami()["name"] == "user"
api.create_repo(repo, private=True)
api.upload_folder(repo_id=repo, folder_path={str(tmp_path)!r}, allow_patterns=["sub/**", "a.txt"])
assert api.list_repo_files(repo) == [".gitattributes", "a.txt", "sub/deep/w.bin"]
assert [entry.path for entry in api.list_repo_tree(repo, "sub")] == ["sub/deep"]
assert open(hf_hub_download(repo, "sub/deep/w.bin"), "rb").read() == b"weights"
api.create_branch(repo, branch="v/1")
api.delete_folder("sub", repo_id=repo)
api.delete_file("a.txt", repo_id=repo)
assert api.list_repo_files(repo) == [".gitattributes"]
assert api.list_repo_files(repo, revision="v/1") == [".gitattributes", "a.txt", "sub/deep/w.bin"]
api.create_repo("data", repo_type="dataset")
api.upload_file(repo_id="user/data", repo_type="dataset", path_or_fileobj=b"rows", path_in_repo="rows.parquet")
assert open(hf_hub_download("user/data", "rows.parquet", repo_type="dataset")).read() == "rows"

def refused(error, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except error as raised:
        return raised.response.status_code
    raise SystemExit(f"{{call.__name__}}{{args}} was not refused")

assert refused(HfHubHTTPError, api.create_repo, repo) == 409
assert refused(HfHubHTTPError, api.create_repo, "other/files") == 403
assert refused(HfHubHTTPError, api.whoami, token="hf_wrong") == 401
assert refused(RepositoryNotFoundError, api.model_info, "user/none") == 404
assert refused(RepositoryNotFoundError, api.model_info, repo, token=False) == 404
assert refused(RevisionNotFoundError, api.model_info, repo, revision="v2") == 404
assert refused(EntryNotFoundError, api.delete_file, "a.txt", repo_id=repo) == 404
card = dict(repo_id=repo, path_in_repo="README.md", path_or_fileobj=b"---\\nbase_model: /my/folder\\n---\\n")
try:
    api.upload_file(**card)
except ValueError as error:
    assert '"base_model"' in str(error)
else:
    raise SystemExit("a card that names a folder was not refused")"""
    run = client(sys.executable, "-c", user)
    assert run.returncode == 0, run.stderr
