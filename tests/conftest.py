"""What every test may ask for: models as small as they can be, of the kinds that go wrong in different ways."""

import gc
import os


# Before torch is imported: a tiny model computes faster on one thread than on several, and the same each time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from tiny import tiny_model_dir
from transformers import AutoTokenizer, GenerationConfig


def pytest_collection_finish():
    # A trainer collects garbage, and everything that has been imported is no garbage: without this, looking through it
    # takes longer than most tests.
    gc.freeze()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A Qwen2 with a chat template and a token for padding alone."""
    return str(tiny_model_dir(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="session")
def pad_is_eos_dir(tmp_path_factory):
    """One that is padded with its end of sequence, as many a published model is."""
    return str(tiny_model_dir(tmp_path_factory.mktemp("model"), pad_is_eos=True))


@pytest.fixture(scope="session", params=["<|endoftext|>", "<|im_start|>"], ids=["the second pads", "neither pads"])
def two_eos_dir(request, tmp_path_factory):
    """One that may end in two ways, as Qwen's do, whose second end pads too, and Llama 3's, where neither does."""
    path = tiny_model_dir(tmp_path_factory.mktemp("model"))
    config = GenerationConfig.from_pretrained(path)
    config.eos_token_id = [
        config.eos_token_id,
        AutoTokenizer.from_pretrained(path).convert_tokens_to_ids(request.param),
    ]
    config.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def moe_dir(tmp_path_factory):
    """A mixture of experts, whose router has a loss of its own."""
    return str(tiny_model_dir(tmp_path_factory.mktemp("model"), "qwen3_moe", layers=1, router_aux_loss_coef=0.1))
