"""Options of configurations: their text, their ranges, and settings that leave them without effect."""

from dataclasses import MISSING, dataclass, field, fields

import pytest

from trl_credit.methods import METHODS
from trl_credit.options import above, at_least, between, documented_options, one_of, plain, unless
from trl_credit.scripts.genac_sft import GenACSFTConfig
from trl_credit.seam import CreditConfig
from trl_credit.trainers.critic import CriticConfig
from trl_credit.trainers.genac.traces import GenACTracesConfig


CONFIGS = [CreditConfig, CriticConfig, GenACTracesConfig, GenACSFTConfig]
CONFIGS += [method.load()[0] for method in METHODS.values()]
BASE = {"bf16": False, "use_cpu": True, "report_to": [], "per_device_train_batch_size": 8}
NAN, INF = float("nan"), float("inf")


def default(option) -> str:
    value = option.default_factory() if option.default is MISSING else option.default
    return f'"{value}"' if isinstance(value, str) else str(value).replace("e-0", "e-")


# --- Texts


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_the_docstring_describes_each_option_with_its_default(config):
    options = {option.name: option for option in fields(config)}
    documented = documented_options(config.__doc__)
    own = [name for name in vars(config).get("__annotations__", ()) if name in options]
    assert set(own) <= set(documented) <= set(options)
    for name, (kind, text) in documented.items():
        assert text and text.endswith("."), name
        assert "*optional*" in kind, name
        stated = kind.partition("defaults to `")[2].rstrip("`") or "None"
        assert stated == default(options[name]), name


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_parsers_find_the_text_in_the_metadata_and_nothing_they_do_not_know(config):
    for name, (_, text) in documented_options(config.__doc__).items():
        if name in config._declared:
            metadata = config.__dataclass_fields__[name].metadata
            assert metadata["help"] == plain(text) and set(metadata) <= {"help", "choices", "aliases"}


def test_links_are_names_and_percent_signs_survive_argparse():
    assert plain("As [`~trl_credit.seam.CreditConfig`], by 20 %.") == "As `CreditConfig`, by 20 %%."


# --- An own config


@dataclass
class FadingConfig(CreditConfig):
    """
    A config of a user's.

    Args:
        fade (`float`, *optional*, defaults to `0.5`):
            How much is left
            a token later.
        kind (`str`, *optional*, defaults to `"slow"`):
            Which.
        depth (`int`, *optional*):
            How deep.
    """

    fade: float = field(default=0.5, metadata=between(0, 1))
    kind: str = field(default="slow", metadata=one_of("slow", "fast"))
    depth: int | None = field(default=None, metadata=at_least(2) | unless(kind="fast"))
    is_on: bool = False


@dataclass
class NarrowConfig(FadingConfig):
    """Declares an option again, and says no more of it than its default."""

    restricted = {"loss_type": (("dapo", "grpo"), "does not fade"), "beta": ((0.0,), "has no effect: nothing is far")}

    fade: float = 0.25


def message_of(tmp_path, config=FadingConfig, **settings) -> str:
    with pytest.raises(ValueError) as caught:
        config(str(tmp_path), **BASE, **settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fade": 1.5}, "FadingConfig: `fade` must be a number in [0, 1], got 1.5."),
        ({"fade": NAN}, "FadingConfig: `fade` must be a number in [0, 1], got nan."),
        ({"fade": True}, "FadingConfig: `fade` must be a number in [0, 1], got True."),
        ({"fade": "0.5"}, "FadingConfig: `fade` must be a number in [0, 1], got '0.5'."),
        ({"fade": None}, "FadingConfig: `fade` must be a number in [0, 1], got None."),
        ({"kind": "quick"}, "FadingConfig: `kind` must be one of ('slow', 'fast'), got 'quick'."),
        ({"depth": 1}, "FadingConfig: `depth` must be a whole number of at least 2, or None, got 1."),
        ({"depth": 2.0}, "FadingConfig: `depth` must be a whole number of at least 2, or None, got 2.0."),
        ({"depth": True}, "FadingConfig: `depth` must be a whole number of at least 2, or None, got True."),
        ({"is_on": "false"}, "FadingConfig: `is_on` must be True or False, got 'false'."),
        ({"log_credit_steps": 0}, "FadingConfig: `log_credit_steps` must be a whole number of at least 1, got 0."),
        ({"depth": 3, "kind": "fast"}, "FadingConfig: `depth=3` has no effect with `kind='fast'`. Leave it at None."),
        ({"log_credit_steps": 9}, "`log_credit_steps=9` has no effect with `log_credit=False`. Leave it at 50."),
    ],
)
def test_an_error_names_class_option_what_was_given_and_what_is_allowed(settings, message, tmp_path):
    assert message in message_of(tmp_path, **settings)


def test_what_is_allowed_is_taken(tmp_path):
    config = FadingConfig(str(tmp_path), fade=1, kind="fast", is_on=True, **BASE)
    assert (config.fade, config.kind, config.depth, config.is_on) == (1, "fast", None, True)
    assert FadingConfig(str(tmp_path), depth=2, **BASE).depth == 2


def test_an_option_that_is_declared_again_keeps_its_range_and_its_text(tmp_path):
    assert "NarrowConfig: `fade` must be a number in [0, 1], got 2" in message_of(tmp_path, NarrowConfig, fade=2)
    assert NarrowConfig.__dataclass_fields__["fade"].metadata["help"] == "How much is left a token later."
    assert NarrowConfig(str(tmp_path), **BASE).fade == 0.25


def test_an_option_of_trl_that_may_be_less_here_says_why(tmp_path):
    said = message_of(tmp_path, NarrowConfig, loss_type="cispo")
    assert said == "NarrowConfig: `loss_type='cispo'` does not fade. Choose one of ('dapo', 'grpo')."
    said = message_of(tmp_path, NarrowConfig, beta=0.1)
    assert said == "NarrowConfig: `beta=0.1` has no effect: nothing is far. Leave it at 0.0."


@pytest.mark.parametrize("value", [0, -1, NAN, INF, False])
def test_above_leaves_its_end_out_and_infinity_is_no_number(value, tmp_path):
    @dataclass
    class PositiveConfig(CreditConfig):
        size: float = field(default=1.0, metadata=above(0))

    assert "`size` must be a finite number above 0, got" in message_of(tmp_path, PositiveConfig, size=value)
    assert PositiveConfig(str(tmp_path), size=1e-9, **BASE).size == 1e-9


# --- Ours


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_no_number_of_ours_may_be_a_truth_value_or_nan(config, tmp_path):
    numbers = [
        option.name
        for option in fields(config)
        if option.name in config._declared and isinstance(option.default, (int, float)) and option.default is not True
        if option.default is not False
    ]
    assert len(numbers) >= 2 or config is GenACSFTConfig
    for name in numbers:
        for value in (True, NAN):
            with pytest.raises(ValueError, match=f"{config.__name__}: `{name}` must be a"):
                config(str(tmp_path), bf16=False, use_cpu=True, **{name: value})
