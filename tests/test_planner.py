"""The planner: its formulas against torch, its plans against what was measured, its pages and its command."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import trl.trainer.utils as trl_utils
from transformers import AutoConfig, AutoModelForCausalLM
from trl.kernels import chunked_logprob

from trl_credit import GenACConfig, VinePPOConfig
from trl_credit.cli import main
from trl_credit.cli.plan import make_parser
from trl_credit.critics.token import make_token_critic
from trl_credit.planner import GIB, Setup, critics, logits, make_plan, read_config, shape_of, time_shares
from trl_credit.planner.activations import Pass, Precision, copies_bytes, layer_bytes
from trl_credit.planner.advice import advice
from trl_credit.planner.generation import cache_bytes
from trl_credit.planner.memory import ANSWERS, CRITIC, GENERATION, PHASES, POLICY, STEP
from trl_credit.planner.setup import METHODS_WITH_CRITIC, PLANNED_METHODS
from trl_credit.planner.training import training
from trl_credit.seam import lm_head


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import memory_table
import plan_against_measurement


ROOT = Path(__file__).parents[1]
BILLION = 10**9


def small_config(tied: bool = True, model: str = "qwen2"):
    return AutoConfig.for_model(
        model,
        vocab_size=128,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )


@pytest.fixture(scope="module")
def seven():
    return memory_table.qwen_shape("7B")


@pytest.fixture(scope="module")
def half():
    return memory_table.qwen_shape("0.5B")


def gib(plan, owner: str, what: str, phase: str) -> float:
    return sum(part.bytes.get(phase, 0.0) for part in plan.parts if (part.owner, part.what) == (owner, what)) / GIB


# --- Shapes


@pytest.mark.parametrize("tied", [True, False])
def test_a_shape_counts_the_parameters_of_policy_value_model_and_adapters(tied, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = small_config(tied)
    shape, model = shape_of(config), AutoModelForCausalLM.from_config(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.tied == tied
    assert shape.attention == sum(p.numel() for name, p in model.named_parameters() if "self_attn" in name)
    assert shape.value_model == sum(p.numel() for p in make_token_critic(model).parameters())
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert shape.adapters(4) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_the_shapes_of_the_page_are_those_of_qwen(seven, half):
    assert [half.parameters, seven.parameters] == [494_032_768, 7_615_616_512]


def test_a_config_is_read_from_a_folder_or_a_file_without_weights(tmp_path):
    small_config().save_pretrained(tmp_path)
    assert shape_of(read_config(str(tmp_path))) == shape_of(read_config(str(tmp_path / "config.json")))


@pytest.mark.parametrize("model, message", [("./nothing", "is no file or folder here"), (".", "has no config.json")])
def test_a_config_that_cannot_be_had_is_refused_by_name(model, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"'{re.escape(model)}' {message}.*Give a folder"):
        read_config(model)


def test_a_model_that_sees_is_refused():
    with pytest.raises(ValueError, match="reads more than text"):
        shape_of(AutoConfig.for_model("gemma3"))


# --- Activations


def kept_by_a_layer(dtype: torch.dtype, is_autocast: bool, masked: bool) -> tuple[int, int]:
    """Bytes that autograd keeps of a layer's pass, and those of them that are copies of weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(), dtype=dtype)
    rows, width, layer = 2, 24, model.model.layers[0]
    states = torch.randn(rows, width, 64, dtype=dtype, requires_grad=True)
    positions = torch.arange(width)[None]
    rotation = model.model.rotary_emb(states, positions)
    mask = torch.ones(rows, 1, width, width, dtype=torch.bool).tril() if masked else None
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own |= {x.untyped_storage().data_ptr() for x in (*rotation, *([mask] if masked else []))}
    sizes = {p.numel() for p in layer.parameters() if p.dim() > 1}
    storages, copies = {}, {}

    def keep(tensor):
        place = tensor.untyped_storage().data_ptr()
        is_copy = is_autocast and tensor.dim() == 2 and tensor.numel() in sizes
        if place not in own:
            (copies if is_copy else storages)[place] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=is_autocast),
    ):
        layer(states, attention_mask=mask, position_embeddings=rotation)
    return sum(n for n, _ in storages.values()), sum(n for n, _ in copies.values())


@pytest.mark.parametrize(
    "dtype, precision, tolerance",
    [
        (torch.float32, Precision(4, 4), 0.02),
        (torch.bfloat16, Precision(2, 2), 0.02),
        (torch.float32, Precision(4, 2), 0.02),
    ],
    ids=["float32", "bfloat16", "autocast"],
)
def test_a_layer_keeps_what_the_formula_says(dtype, precision, tolerance):
    kept, copies = kept_by_a_layer(dtype, precision.is_autocast, masked=True)
    shape = shape_of(small_config())
    assert layer_bytes(shape, precision, Pass(2, 24)) == pytest.approx(kept, rel=tolerance)
    in_layer = sum(inputs * outputs for inputs, outputs in shape.linear) / shape.layers
    assert copies_bytes(in_layer, precision) == copies


def test_attention_without_a_mask_repeats_no_keys():
    masked, plain = (layer_bytes(shape_of(small_config()), Precision(4, 4), Pass(2, 24, masked=m)) for m in (1, 0))
    assert masked - plain == 2 * 24 * (2 * 64 - 2 * 32) * 4 + 4 * 2 * 24**2


def test_the_cache_of_a_token_is_that_of_qwen(seven):
    assert cache_bytes(seven, Precision(2, 2), 1) == 2 * 28 * 4 * 128 * 2


# --- Networks between passes


def test_adamw_keeps_two_numbers_a_weight():
    one = training(0, BILLION, 4, 4, "one", 1, 0, 0)
    assert (one.weights, one.gradients, one.optimizer) == (4e9, 4e9, 8e9)
    assert (one.step, one.gathered) == (0, 0)
    assert training(0, BILLION, 4, 4, "one", 1, 0, 0, is_fused=False).step == 4e9
    assert training(0, BILLION, 4, 4, "ddp", 8, 0, 0).gathered == 4e9


def test_adapters_have_gradients_and_the_base_has_none():
    one = training(BILLION, 10**6, 2, 4, "one", 1, 0, 0)
    assert (one.weights, one.gradients, one.optimizer) == (2e9 + 4e6, 4e6, 8e6)


@pytest.mark.parametrize(
    "split, weights, gradients, optimizer",
    [("zero2", 2e9, 0.25e9, 1.5e9), ("zero3", 0.25e9, 0.25e9, 1.5e9), ("fsdp2", 0.5e9, 0.5e9, 1e9)],
)
def test_shards_are_an_eighth_on_eight_gpus(split, weights, gradients, optimizer):
    found = training(0, BILLION, 4, 4, split, 8, 0, 0)
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, optimizer)


def test_fsdp2_keeps_whole_gradients_of_a_policy_that_accumulates():
    assert training(0, BILLION, 4, 4, "fsdp2", 8, 0, 0, accumulates_whole=True).gradients == 2e9


# --- Plans


def test_what_the_planner_assumes_is_what_trl_and_the_configs_have():
    assert logits.TILE_TOKENS == chunked_logprob.TOKEN_CHUNK_SIZE
    assert logits.TILE_WORDS == trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
    assert logits.CRITICS_TILE_WORDS_ON_CPU == lm_head._WORDS_ON_CPU
    config = GenACConfig
    assert config.segment_target_length == critics.SEGMENT
    assert config.critic_update_batch_tokens == critics.UPDATE_BATCH_TOKENS
    assert config.critic_generation_batch_tokens == critics.GENERATION_BATCH_TOKENS
    assert config.critic_mask_memory * GIB == critics.MASK_MEMORY
    assert VinePPOConfig.vine_continuations == time_shares.VINE_CONTINUATIONS


def test_a_plan_is_within_a_tenth_of_what_was_measured():
    measured = json.loads((ROOT / "docs/results/plan.json").read_text(encoding="utf-8"))
    compared = 0
    for size, methods in plan_against_measurement.RUNS.items():
        for method in methods:
            for network, plan in plan_against_measurement.planned(method, size).items():
                if plan:
                    assert plan == pytest.approx(measured[f"{method}, {size}"][network], rel=0.1), (method, str(size))
                    compared += 1
    assert compared >= 20
    page = (ROOT / "docs/results/plan.md").read_text(encoding="utf-8")
    assert page == plan_against_measurement.table(measured)


@pytest.mark.slow
def test_a_plan_is_within_a_tenth_of_what_is_measured_now():
    size = plan_against_measurement.Size(128, 3, 512, 128, 2)
    measured, plan = (f("vapo", size) for f in (plan_against_measurement.measure, plan_against_measurement.planned))
    assert plan == {network: pytest.approx(measured[network], rel=0.1) for network in ("policy", "critic")}


@pytest.mark.parametrize("method", PLANNED_METHODS)
def test_every_method_has_a_plan_whose_parts_add_up(method, half):
    plan = make_plan(Setup(method, half, completion=2048))
    assert plan.peak == max(plan.total(phase) for phase in plan.phases)
    assert {CRITIC, STEP} <= set(plan.phases) if method in METHODS_WITH_CRITIC else plan.phases == [GENERATION, POLICY]
    assert (ANSWERS in plan.phases) == (method == "genac")
    assert all(set(part.bytes) <= set(PHASES) for part in plan.parts)
    assert gib(plan, "policy", "weights", POLICY) == 4 * half.parameters / GIB
    # The critic is updated when the policy has no gradients.
    assert gib(plan, "policy", "gradients", POLICY) == 4 * half.parameters / GIB
    assert gib(plan, "policy", "gradients", CRITIC) == 0


def test_a_method_without_a_critic_has_nothing_of_one(half):
    assert {part.owner for part in make_plan(Setup("grpo", half)).parts} == {"policy", "process"}
    assert make_plan(Setup("grpo", half)).peak == make_plan(Setup("grpo-lambda", half)).peak


def test_a_shared_base_is_there_once(half):
    lora = Setup("vapo", half, lora_rank=16, dtype="bfloat16")
    own, shared = make_plan(lora), make_plan(replace(lora, shared_base=True))
    spared = gib(own, "critic", "weights", CRITIC) - gib(shared, "critic", "weights", CRITIC)
    assert spared == 4 * half.value_model / GIB
    assert gib(shared, "critic", "weights", CRITIC) == 4 * half.adapters(16) / GIB


def test_sao_has_no_optimizer_for_attention(half):
    vapo, sao = (gib(make_plan(Setup(name, half)), "critic", "optimizer", CRITIC) for name in ("vapo", "sao"))
    assert vapo - sao == pytest.approx(8 * half.attention / GIB)


def test_a_probe_needs_the_reference_and_no_critic(half):
    plan = make_plan(Setup("vapo", half, "probe"))
    assert gib(plan, "reference", "weights", POLICY) == 4 * half.parameters / GIB
    assert "critic" not in {part.owner for part in plan.parts}
    assert "reference" not in {part.owner for part in make_plan(Setup("vapo", half, "probe", lora_rank=8)).parts}


def test_vllm_is_away_during_updates_only_if_it_sleeps(half):
    for sleep, expected in ((False, 24.0), (True, 0.0)):
        plan = make_plan(Setup("grpo", half, vllm=0.3, vllm_sleep=sleep))
        assert gib(plan, "vLLM", "its share", GENERATION) == pytest.approx(24.0)
        assert gib(plan, "vLLM", "its share", POLICY) == pytest.approx(expected)


def test_rows_of_answers_hold_what_they_share_however_long_it_is(half):
    setup = Setup("genac", half, completion=40_000)
    reading = critics.reading_of(setup)
    shared = critics.QUESTION + setup.length - critics.SEGMENT
    assert reading.of.width == shared + critics.TAIL + setup.answer - 1 > critics.UPDATE_BATCH_TOKENS
    assert (reading.scored, reading.micro_batches) == (setup.answer, 8 * 334)


def test_buckets_of_ddp_stay(half):
    plan = make_plan(Setup("vapo", half, gpus=2, completion=64))
    for phase in (GENERATION, POLICY, CRITIC):
        assert gib(plan, "policy", "gathered weights and buckets", phase) == 4 * half.parameters / GIB


def test_a_small_critic_is_smaller(seven, half):
    large, small = (make_plan(Setup("sppo", seven, critic, completion=1024)) for critic in (None, half))
    assert gib(small, "critic", "weights", CRITIC) == pytest.approx(4 * half.value_model / GIB)
    assert small.peak < large.peak


def test_checkpointing_and_short_completions_take_less(half):
    settings = ({"completion": 1024}, {}, {"checkpointing": False})
    short, kept, whole = (make_plan(Setup("vapo", half, **options)).total(CRITIC) for options in settings)
    assert short < kept < whole


def test_advice_lowers_the_peak_until_it_fits(seven):
    setup = Setup("vapo", seven, gpu_memory=48.0, batch=2, accumulation=4)
    peaks = [make_plan(setup).peak, *(change.plan.peak for change in advice(setup))]
    assert peaks == sorted(peaks, reverse=True) and len(peaks) > 2
    assert peaks[-1] <= 48 * GIB < peaks[-2]
    assert not advice(Setup("grpo", memory_table.qwen_shape("0.5B")))
    assert not advice(Setup("vapo", seven, gpu_memory=4.0))[-1].plan.fits


def test_advice_lists_nothing_that_does_not_help(seven):
    # vLLM takes more than the caches of transformers would, and the peak is that of an update anyway.
    changes = advice(Setup("vapo", seven, gpu_memory=40.0))
    assert [change.text for change in changes if "vllm" in change.text] == []
    assert changes[-1].plan.fits


# --- Time


def test_a_critic_of_the_policys_size_adds_an_update_and_values_where_they_are_read_apart(half):
    # Per token 2P of values and 6P of training, beside the 6P of the policy; checkpointing makes 8P of each 6P.
    assert "critic's values" not in time_shares.time_shares(Setup("vapo", half))
    shares = time_shares.time_shares(Setup("sao", half, prompt=8, completion=8, vllm=0.3))
    update = shares["policy's update"]
    assert shares["critic's update"] / update == pytest.approx(1, rel=0.01)
    assert shares["critic's values"] / update == pytest.approx(1 / 4, rel=0.01)
    prompts = time_shares.time_shares(Setup("sppo", half, prompt=64, completion=4096, generations=1))
    assert prompts["critic's update"] < 0.02 * prompts["policy's update"]
    assert "continuations" in time_shares.time_shares(Setup("vineppo", half))
    assert "reference" in time_shares.time_shares(Setup("vapo", half, "probe"))


# --- What has no meaning is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gpus": 0}, "`gpus` must be at least 1"),
        ({"gpu_memory": 0.0}, "`gpu_memory` must be above 0"),
        ({"vllm": 1.5}, "`vllm` must be between 0 and 1"),
        ({"method": "dpo"}, "`method` must be one of grpo"),
        ({"sharding": "zero3"}, "`sharding='zero3'` has no effect on one GPU"),
        ({"vllm_sleep": True}, "`vllm_sleep` has no effect without `vllm`"),
        ({"method": "grpo", "critic": "probe"}, "grpo has none"),
        ({"method": "sppo", "critic": "probe"}, "is for vapo and bpco"),
        ({"shared_base": True}, "`shared_base` needs a frozen base"),
        ({"method": "genac", "lora_rank": 8, "shared_base": True}, "`shared_base` is for a critic of vapo"),
        ({"lora_rank": 8, "shared_base": True, "gpus": 2, "sharding": "zero3"}, "works on one GPU and with ddp"),
        ({"critic_dtype": "bfloat16"}, "`critic_dtype='bfloat16'` has no effect"),
        ({"lora_rank": -1}, "`lora_rank` must be at least 0"),
        ({"generations": 3}, "batch 1 x accumulation 8 x 1 GPUs = 8 completions.*does not divide"),
    ],
)
def test_what_has_no_meaning_is_refused(options, message, half):
    with pytest.raises(ValueError, match=message):
        Setup(**{"method": "vapo", "policy": half, **options})


# --- The command and the pages


def test_the_command_prints_where_memory_and_time_go(tmp_path, capsys):
    small_config().save_pretrained(tmp_path)
    argv = ["plan", "--model", str(tmp_path), "--method", "vapo", "--completion", "1024"]
    assert main(argv) == 0
    output = capsys.readouterr().out
    for words in ("policy   weights", "critic   optimizer", "critic's step", "generation  ", "It fits: "):
        assert words in output
    assert main([*argv, "--gpu_memory", "1", "--no_gradient_checkpointing"]) == 1
    assert "It does not fit" in capsys.readouterr().out


def test_options_of_the_command_reach_the_plan(tmp_path, capsys, monkeypatch):
    from trl_credit import planner

    small_config().save_pretrained(tmp_path)
    seen = []
    monkeypatch.setattr(planner, "make_plan", lambda setup: seen.append(setup) or make_plan(setup))
    options = "--gpus 2 --gpu_memory 40 --sharding ddp --prompt 64 --completion 128 --batch 2 --accumulation 4"
    options += " --generations 4 --dtype bfloat16 --critic_dtype bfloat16 --lora_rank 8 --vllm 0.2 --vllm_sleep"
    options += " --no_gradient_checkpointing --answer 100"
    assert (
        main(["plan", "--model", str(tmp_path), "--critic", str(tmp_path), "--method", "genac", *options.split()]) == 0
    )
    shape = shape_of(small_config())
    expected = Setup("genac", shape, shape, 2, 40.0, "ddp", 64, 128, 2, 4, 4, "bfloat16", lora_rank=8)
    rest = {"critic_dtype": "bfloat16", "checkpointing": False, "vllm": 0.2, "vllm_sleep": True, "answer": 100}
    assert seen == [replace(expected, **rest)]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--answer", "5"], "--answer has no effect"),
        (["--generations", "3"], "does not divide"),
        (["--model", "./nothing"], "is no file or folder here"),
    ],
)
def test_the_command_says_what_is_wrong(argv, message, tmp_path, capsys):
    small_config().save_pretrained(tmp_path)
    try:
        status = main(["plan", "--model", str(tmp_path), "--method", "vapo", *argv])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_options_of_the_command_are_on_the_page_with_their_defaults():
    page = (ROOT / "docs/memory.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("| `--")]
    table = {cells[1].strip().strip("`"): cells for cells in (line.split("|") for line in lines)}
    options = {action.option_strings[0]: action for action in make_parser()._actions if action.dest != "help"}
    assert list(table) == list(options)
    for name, cells in table.items():
        default = options[name].default
        expected = "" if default is None or default is False else f"{default:g}" if default != str(default) else default
        assert cells[2].strip() == expected, name
        assert cells[3].strip() in options[name].help, name


def test_the_page_shows_what_the_planner_says():
    stored = (ROOT / "docs/results/memory.md").read_text(encoding="utf-8")
    assert stored == memory_table.table()
    assert stored.count("\n| ") == 2 + 3 * 2 * 3
