"""Recipes have the numbers of their papers, written here a second time."""

from pathlib import Path

import pytest
import yaml

import trl_credit
from trl_credit.cli.launch import with_recipe
from trl_credit.methods import METHODS
from trl_credit.scripts.train import make_parser


RECIPES = Path(trl_credit.__file__).parent / "recipes"
OF_PPO = {"learning_rate": 1e-6, "critic_learning_rate": 2e-6, "temperature": 1.0, "beta": 0.0, "epsilon": 0.2}
OF_SPPO = {"learning_rate": 1e-6, "critic_learning_rate": 5e-6, "num_generations": 1, "temperature": 0.6, "beta": 0.0}
OF_SPPO |= {"max_completion_length": 8192, "epsilon": 0.2, "critic_loss": "bce", "reward_range": [0.0, 1.0]}
PAPERS = {
    "vapo": {
        **OF_PPO,
        "num_generations": 16,
        "epsilon_high": 0.28,
        "gamma": 1.0,
        "critic_lambda": 1.0,
        "policy_lambda": "length_adaptive",
        "length_adaptive_alpha": 0.05,
        "positive_lm_coef": 0.1,
    },
    "vc_ppo": {**OF_PPO, "epsilon_high": 0.2, "gamma": 1.0, "critic_lambda": 1.0, "policy_lambda": 0.95},
    "ppo": {**OF_PPO, "epsilon_high": 0.2, "gamma": 1.0, "critic_lambda": 0.95, "policy_lambda": 0.95},
    "sao": {
        "learning_rate": 1e-6,
        "critic_learning_rate": 5e-6,
        "num_generations": 1,
        "trust_region": "dis",
        "epsilon": 0.3,
        "epsilon_high": 5.0,
        "critic_lambda": 1.0,
        "policy_lambda": "length_adaptive",
        "length_adaptive_alpha": 1.5,
        "critic_freeze": ["attention"],
        "critic_updates_per_step": 2,
    },
    "bpco": {
        "num_generations": 1,
        "trust_region": "dppo_tv",
        "reward_range": [0.0, 1.0],
        "critic_lambda": 1.0,
        "policy_lambda": "length_adaptive",
        "whiten_advantages": False,
    },
    "sppo_1p5b": {**OF_SPPO, "weight_decay": 0.01, "critic_weight_decay": 0.01},
    "sppo_7b_small_critic": {**OF_SPPO, "weight_decay": 0.1, "critic_weight_decay": 0.01},
    "genac": {
        "learning_rate": 1e-6,
        "critic_learning_rate": 1e-6,
        "num_generations": 8,
        "temperature": 1.0,
        "max_completion_length": 8192,
        "critic_max_completion_length": 1024,
        "critic_temperature": 1.0,
        "beta": 0.0,
        "epsilon": 0.2,
        "segment_target_length": 120,
        "segment_lambda": 1.0,
        "hint_momentum": 0.9,
    },
    "vineppo": {
        "learning_rate": 1e-6,
        "num_generations": 8,
        "num_iterations": 2,
        "temperature": 0.6,
        "top_p": 0.9,
        "beta": 1e-4,
        "epsilon": 0.2,
        "vine_continuations": 9,
    },
}


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_has_the_numbers_of_its_paper(name):
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    assert {option: recipe.get(option) for option in PAPERS[name]} == PAPERS[name]


def test_every_recipe_is_here():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(PAPERS)


@pytest.mark.parametrize(("command", "name"), [(m.command, name) for m in METHODS.values() for name in m.recipes])
def test_a_recipe_by_its_name_runs_with_the_batches_that_trl_has_by_default(command, name):
    asked = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", "--bf16", "false", "--use_cpu"]
    argv = with_recipe(["--config", name, *asked], METHODS[command].recipes)
    _, args, _, _ = make_parser(command).parse_args_and_config(argv)
    assert args.generation_batch_size % args.num_generations == 0
    assert args.steps_per_generation % args.gradient_accumulation_steps == 0
