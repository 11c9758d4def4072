"""A run of VAPO or SPPO publishes its critic too, with the real `huggingface_hub` client against a Hub on loopback."""

import json
import shlex
import sys
from pathlib import Path

import pytest
from hub_server import Hub
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file
from sppo_runs import critic_dir, critic_ids
from test_hub import TOKENS, run_client
from tiny import tiny_model_dir


pytestmark = pytest.mark.slow


EXAMPLES = Path(__file__).parents[1] / "examples"
TINY_RUN = shlex.split("""--max_steps 2 --save_steps 1 --logging_steps 1 --max_completion_length 8 --num_generations 1
    --per_device_train_batch_size 4 --learning_rate 1e-2 --critic_learning_rate 1e-2 --critic_pretraining_steps 1
    --use_cpu --bf16 false --report_to none --push_to_hub --hub_always_push""")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub"), TOKENS) as hub:
        yield hub
    assert hub.unknown == []


@pytest.fixture(scope="module", params=["vapo", "sppo"])
def published(request, hub, tmp_path_factory):
    """The name of a trainer, which its repositories have, and what is in its output folder."""
    name, root = request.param, tmp_path_factory.mktemp("run")
    rows = [{"prompt": [{"role": "user", "content": f"{i}+3=?"}], "solution": f"${i + 3}$"} for i in range(8)]
    (root / "data").mkdir()
    (root / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    inputs = ["--model", tiny_model_dir(root), "--dataset", root / "data", "--output_dir", root / "out"]
    if name == "sppo":  # a critic with a tokenizer of its own
        inputs += ["--critic_model_name_or_path", critic_dir(root / "llama")]
    else:  # a fresh head that is wrong about rewards that are all the same
        inputs += ["--critic_initial_value", "0.5"]
    repos = ["--hub_model_id", f"user/{name}", "--critic_hub_model_id", f"user/{name}-critic"]
    script = EXAMPLES / f"{name}.py"
    result = run_client(hub, root / "cache", sys.executable, script, *inputs, *TINY_RUN, *repos)
    assert result.returncode == 0, result.stderr[-3000:]
    return name, root / "out"


def test_the_critic_is_on_the_hub_in_the_policys_folder_and_in_a_repository_of_its_own(hub, published):
    name, out = published
    final = load_file(out / "checkpoint-2" / "critic" / "model.safetensors")
    policy, critic = hub.files(f"models/user/{name}"), hub.files(f"models/user/{name}-critic")
    for weights in (policy["critic/model.safetensors"], critic["model.safetensors"]):
        on_hub = load(weights)
        assert on_hub.keys() == final.keys() and all(on_hub[name].equal(final[name]) for name in final)
    assert final["score.weight"].abs().max() > 0
    assert "score.weight" not in load(policy["model.safetensors"])


def test_its_card_says_what_it_is_and_how_it_was_trained(hub, published):
    name, _ = published
    card = ModelCard(hub.files(f"models/user/{name}-critic")["README.md"].decode())
    assert {"critic", "trl-credit", "value-model"} <= set(card.data.tags)
    assert "| `critic_learning_rate` | `0.01` |" in card.text
    assert "for 3\nupdates" in card.text


def test_the_policys_card_cites_the_method_and_says_where_the_critic_is(hub, published):
    name, _ = published
    text = hub.files(f"models/user/{name}")["README.md"].decode()
    cited = {"vapo": "@article{yue2025vapo,", "sppo": "@article{wang2026sppo,"}
    assert cited[name] in text
    assert f"[in the folder `critic`](https://huggingface.co/user/{name}/tree/main/critic)" in text
    assert f"(https://huggingface.co/user/{name}-critic)" in text
    critic = hub.files(f"models/user/{name}-critic")["README.md"].decode()
    assert f"beside [the policy](https://huggingface.co/user/{name})." in critic
    assert "| `None` |" not in text and "| `None` |" not in critic


def test_others_load_it_from_the_hub(hub, published, tmp_path):
    name, _ = published
    code = f"""
import torch
from transformers import AutoModelForTokenClassification
one = AutoModelForTokenClassification.from_pretrained("user/{name}-critic")
two = AutoModelForTokenClassification.from_pretrained("user/{name}", subfolder="critic")
ids = torch.tensor([[10, 11, 12]])
assert one.config.num_labels == 1 and torch.equal(one(ids).logits, two(ids).logits)
print(one(ids).logits.squeeze().tolist())
"""
    result = run_client(hub, tmp_path / "cache", sys.executable, "-c", code, token="hf_reads")
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(json.loads(result.stdout.splitlines()[-1])) == 3


@pytest.mark.parametrize("published", ["sppo"], indirect=True)
def test_a_critics_own_tokenizer_is_found_on_the_hub_beside_it(hub, published, tmp_path):
    code = """
from trl_credit.critics.prompt import load_critic_tokenizer, tokenize_prompts
one = load_critic_tokenizer("user/sppo-critic")
two = load_critic_tokenizer("user/sppo", {"subfolder": "critic", "dtype": "float32"})
prompt = [[{"role": "user", "content": "ab"}]]
assert tokenize_prompts(one, prompt) == tokenize_prompts(two, prompt)
print(tokenize_prompts(one, prompt)[0])
"""
    result = run_client(hub, tmp_path / "cache", sys.executable, "-c", code, token="hf_reads")
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1]) == critic_ids([{"role": "user", "content": "ab"}])


def test_the_critic_of_a_private_run_is_in_a_private_repository(hub, tmp_path):
    folder = tmp_path / "critic"
    folder.mkdir()
    (folder / "README.md").write_text("A critic.")
    code = f"""
from pathlib import Path
from transformers import TrainingArguments
from trl_credit.critics.card import push_critic
push_critic(Path({str(folder)!r}), "user/secret", TrainingArguments({str(tmp_path)!r}, hub_private_repo=True))
"""
    result = run_client(hub, tmp_path / "cache", sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr[-3000:]
    assert hub.repos["models/user/secret"].private
