"""A language model small enough to train in a test, and real in every other way.

The tokenizer is a `Qwen2Tokenizer` over the 256 bytes, without merges: one token per ASCII character, and every text
survives a round trip. That it is this class matters: `AutoTokenizer` turns the tokenizer of a folder with a Qwen
config into a `Qwen2Tokenizer`, which drops, without a word, the characters that a vocabulary of any other kind spells
differently.
"""

from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen2Tokenizer


PAD, EOS = "<|endoftext|>", "<|im_end|>"
# As Qwen2.5's, so that TRL's prompts, completions and tool turns look as they do in a real run. The text before an
# assistant's turn does not depend on that turn ("prefix preserving"), which TRL asks for when tools are used.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{{ call.function | tojson }}
</tool_call>
{%- endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
ARCHITECTURES = {
    "qwen2": {},
    "llama": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def tiny_tokenizer(pad_is_eos: bool = False, chat_template: str | None = CHAT_TEMPLATE) -> Qwen2Tokenizer:
    vocab = {symbol: i for i, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    special = {"eos_token": EOS, "pad_token": EOS if pad_is_eos else PAD, "unk_token": PAD}
    tokenizer = Qwen2Tokenizer(vocab, merges=[], padding_side="left", **special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model(arch: str = "qwen2", *, tokenizer=None, hidden: int = 16, layers: int = 2, seed: int = 0, **config):
    """A randomly initialised `arch` in float32, the same for the same `seed`; `config` overrides its config."""
    tokenizer = tokenizer or tiny_tokenizer()
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,  # the usual 0.02 would make every next token equally likely at this width
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **ARCHITECTURES[arch],
        **config,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **config))
    with torch.no_grad():  # a louder end of sequence, so that some completions of 16 tokens end and some are cut off
        model.get_output_embeddings().weight[tokenizer.eos_token_id] *= 3
    return model.eval()


def tiny_model_dir(
    tmp_path: Path,
    arch: str = "qwen2",
    *,
    pad_is_eos: bool = False,
    chat_template: str | None = CHAT_TEMPLATE,
    **kwargs,
) -> Path:
    """
    Saves a [`tiny_model`] with its tokenizer, as `from_pretrained` and vLLM expect them, and returns the folder.

    Args:
        arch (`str`): `"qwen2"`, `"llama"`, `"qwen3"` or `"qwen3_moe"`.
        pad_is_eos (`bool`): Share one token for padding and end of sequence, as many a published model does.
        chat_template (`str` or `None`): Another template, or none.
        kwargs: `hidden`, `layers`, `seed` and fields of the model's config, see [`tiny_model`].
    """
    tokenizer = tiny_tokenizer(pad_is_eos, chat_template)
    path = Path(tmp_path) / "-".join(["tiny", arch] + ["pad-is-eos"] * pad_is_eos)
    tiny_model(arch, tokenizer=tokenizer, **kwargs).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def tiny_vision_language_model():
    """A LLaVA of 16 dimensions: CLIP's vision tower, 4 patches an image, and Qwen2 for the text."""
    from transformers import AutoConfig, AutoModelForImageTextToText, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<image>"]})
    template = (
        "{%- for message in messages -%}<|im_start|>{{ message.role }}\n"
        "{% for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    width = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tiny_model("qwen2", tokenizer=tokenizer, layers=1).config.to_dict()
    vision = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **width}
    config = AutoConfig.for_model(
        "llava",
        text_config=text,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    return processor, model
