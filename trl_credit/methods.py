"""The methods of this package: lazy imports, commands and recipes come from this table, and pages are held to it."""

from importlib import import_module
from typing import NamedTuple


class Method(NamedTuple):
    """
    A method: a folder in `trl_credit/trainers` with `<folder>_config.py` and `<folder>_trainer.py`.

    Args:
        command (`str`):
            What it is called on the command line; with underscores, its folder.
        name (`str`):
            What the names of its config and its trainer begin with.
        help (`str`):
            What the command does, in a line.
        recipes (`tuple[str, ...]`):
            Files in `trl_credit/recipes` with settings of papers.
    """

    command: str
    name: str
    help: str
    recipes: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """Its folder in `trl_credit/trainers`."""
        return self.command.replace("-", "_")

    @property
    def places(self) -> dict[str, str]:
        """The public names of its config and trainer, and their modules."""
        return {
            f"{self.name}{what.title()}": f"trl_credit.trainers.{self.folder}.{self.folder}_{what}"
            for what in ("config", "trainer")
        }

    def load(self) -> tuple[type, type]:
        """Its config and its trainer."""
        config, trainer = (getattr(import_module(module), name) for name, module in self.places.items())
        return config, trainer


METHODS = {
    method.command: method
    for method in (
        Method(
            "grpo-lambda", "GRPOLambda", "Train with GRPO-lambda: GRPO with token-level credit from eligibility traces"
        ),
        Method(
            "vineppo",
            "VinePPO",
            "Train with VinePPO: segment-level credit from continuations, no critic",
            recipes=("vineppo",),
        ),
        Method(
            "vapo",
            "VAPO",
            "Train with VAPO, VC-PPO or PPO: token-level credit from a critic",
            recipes=("vapo", "vc_ppo", "ppo"),
        ),
        Method(
            "sppo",
            "SPPO",
            "Train with SPPO: one completion a prompt, and a critic that reads the prompt alone",
            recipes=("sppo_1p5b", "sppo_7b_small_critic"),
        ),
        Method(
            "genac",
            "GenAC",
            "Train with GenAC: segment-level credit from a critic that reasons in words",
            recipes=("genac",),
        ),
        Method(
            "sao",
            "SAO",
            "Train with SAO: VAPO with one completion a prompt, masked ratios and a critic with frozen attention",
            recipes=("sao",),
        ),
        Method(
            "bpco",
            "BPCO",
            "Train with BPCO: VAPO with one completion a prompt, bounded values and a critic that may be told more",
            recipes=("bpco",),
        ),
    )
}
