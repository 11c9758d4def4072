"""The canary sings: TRL is as `trl_credit` knows it, and all that the package builds on is looked at."""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from pathlib import Path

import transformers
import trl
from canary import canary
from canary.moves import KEYS, MOVES
from canary.training import FOR_CRITICS

import trl_credit
from trl_credit import trainers
from trl_credit.seam import CreditTrainer


PACKAGE = Path(trl_credit.__file__).parent
LISTED = {name for name, *_ in MOVES} | FOR_CRITICS
# Declared by a subclass, as TRL asks for.
DECLARED = {"_tag_names", "_name", "_paper"}


def test_trl_is_as_we_know_it(moe_dir, tmp_path):
    assert list(canary(moe_dir, tmp_path)) == []


def test_trainers_take_what_the_seam_hands_to_their_hooks():
    for module in pkgutil.walk_packages(trainers.__path__, f"{trainers.__name__}."):
        importlib.import_module(module.name)
    hooks = {name for name in dir(CreditTrainer) if not name.startswith("_") and not hasattr(trl.GRPOTrainer, name)}
    subclasses, found = [CreditTrainer], set()
    while subclasses:
        subclasses += (trainer := subclasses.pop()).__subclasses__()
        for name in vars(trainer).keys() & hooks if trainer.__module__.startswith(trainers.__name__) else ():
            ours, theirs = getattr(trainer, name), getattr(CreditTrainer, name)
            if callable(theirs):
                found.add(name)
                assert [*inspect.signature(ours).parameters] == [*inspect.signature(theirs).parameters], ours
    assert {"assign_credit", "shape_loss", "extra_loss", "begin_step", "finish_step"} <= found


# --- The lists are complete, and no other room needs one


def sources(*rooms: str) -> dict[str, ast.Module]:
    """The files of these rooms of the package, or all of it."""
    paths = [path for room in rooms or (".",) for path in (PACKAGE / room).rglob("*.py")]
    assert paths
    return {str(path.relative_to(PACKAGE)): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def names_used(trees: Iterable[ast.Module]) -> set[str]:
    """What is read of any object, private names in texts, and the methods that are defined, which may be TRL's."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {node.value for node in nodes if isinstance(node, ast.Constant) and str(node.value).startswith("_")}
    return used | {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def names_imported(trees: Iterable[ast.Module]) -> set[str]:
    """What is imported from inside TRL."""
    return {
        alias.name
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trl.") and not node.level
        for alias in node.names
    }


def names_of_trl() -> set[str]:
    """Attributes and methods that `GRPOTrainer` adds to `Trainer`, and the private ones of `Trainer`."""
    tree = ast.parse(inspect.getsource(importlib.import_module("trl.trainer.grpo_trainer")))
    names = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    names |= set(vars(trl.GRPOTrainer)) | {name for name in dir(transformers.Trainer) if name.startswith("_")}
    return {name for name in names if not name.startswith("__")}


def test_every_name_of_trl_that_we_use_is_looked_at():
    used = names_used(sources("seam", "trainers").values()) & names_of_trl()
    ours = {"tools", "model", "args"}  # names of `Trainer` itself, public
    ours |= {"chat_template", "generation_config"}  # of a tokenizer, a model
    ours |= {"vllm_tensor_parallel_size", "max_completion_length", "generation_kwargs"}  # of the config
    ours |= {"vllm_importance_sampling_correction"}
    ours |= {"_full_logits_logps"}  # of 1.14 alone, see seam/versions.py
    assert used - ours - LISTED == set()

    imported = names_imported(sources().values())
    assert imported - LISTED == {"accuracy_reward"} & imported, "functions imported from inside TRL"


def test_every_key_of_a_rollout_that_the_seam_reads_is_looked_at():
    nodes = [node for tree in sources("seam").values() for node in ast.walk(tree)]
    texts = {node.value for node in nodes if isinstance(node, ast.Constant)}
    assert set(KEYS[:5]) <= texts


def test_what_is_listed_for_critics_is_used_and_looked_at():
    trees = sources().values()
    assert set() == FOR_CRITICS - names_used(trees) - names_imported(trees)
    checks = Path(__file__).with_name("test_seam_critic.py").read_text(encoding="utf-8")
    assert {name for name in FOR_CRITICS if name not in checks} == set()


def test_no_room_but_the_seam_touches_a_private_name_of_trl():
    private = {name for name in names_of_trl() if name.startswith("_")} - DECLARED
    for path, tree in sources().items():
        if path.startswith("seam/"):
            continue
        for node in ast.walk(tree):
            where = f"{path}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute):
                assert node.attr not in private, where
            elif isinstance(node, ast.FunctionDef):
                assert node.name not in private, where
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("trl", "transformers"):
                inside = node.module.split(".") + [alias.name for alias in node.names]
                assert not any(name.startswith("_") for name in inside), where
