"""Parts of a critic that stay as they are, by name."""

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from torch import nn


# What architectures call their attention, whose norms lie beside it or, as in Qwen3, inside.
_ATTENTION = ("attn", "self_attn", "linear_attn", "cross_attn", "attention", "self_attention")


def freeze(network: nn.Module, parts: Sequence[str], head: Collection[str] = ()) -> None:
    """
    Stop training parts of a network. Its optimizer must be made afterwards.

    Args:
        network (`nn.Module`):
            The network. With adapters, those of the parts are what is frozen.
        parts (`Sequence[str]`):
            Each is `"attention"`, all weights of the attention; `"embeddings"`, all tables of embeddings; or a pattern
            of names of parameters as in a shell, e.g. `"*layers.0.*"`.
        head (`Collection[str]`, *optional*):
            Names of parameters that must go on being trained.

    Raises:
        ValueError: If a part matches nothing that was trained, or matches the head, or nothing is left to train.
    """
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    tables = {id(p) for module in network.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    frozen: set[str] = set()
    for part in parts:
        if part == "attention":
            found = {name for name in trained if any(module in _ATTENTION for module in name.split(".")[:-1])}
        elif part == "embeddings":
            found = {name for name, p in trained.items() if id(p) in tables}
        else:
            found = {name for name in trained if fnmatchcase(name, part)}
        if not found:
            raise ValueError(
                f"`critic_freeze` has {part!r}, which is no part of the critic that is trained. Give 'attention', "
                f"'embeddings' or a pattern of names such as {next(iter(trained))!r}."
            )
        if head_of_it := found & set(head):
            raise ValueError(
                f"`critic_freeze` has {part!r}, which would freeze the critic's head: {sorted(head_of_it)}."
            )
        frozen |= found
    if trained.keys() == frozen:
        raise ValueError(f"`critic_freeze={list(parts)}` leaves nothing of the critic to train.")
    for name in frozen:
        trained[name].requires_grad_(False)
