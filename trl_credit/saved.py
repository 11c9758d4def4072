"""Folders that are whole or absent, and reading what was saved in them, with errors that name the file."""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


MANIFEST = "manifest.json"
_REPLACED = "_replaced"


def write_manifest(folder: Path) -> None:
    """
    List a folder's files with their hashes in `manifest.json`, its last file. All of them are on the disk when this
    returns.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): _hash(path, flush=True) for path in paths}
    write_whole(folder / MANIFEST, json.dumps({"sha256": hashes}, indent=2).encode())


def write_whole(path: Path, content: Any) -> None:
    """Write bytes to a file, all of them or none."""
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def differences(folder: Path) -> list[str]:
    """What is not as a folder's manifest says, in words; nothing where there is no manifest."""
    if not (folder / MANIFEST).is_file():
        return []
    found = []
    for name, expected in read_json(folder / MANIFEST)["sha256"].items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif _hash(path) != expected:
            found.append(f"{name} is not the file that was saved with the others")
    return found


def put_in_place(folder: Path, place: Path) -> None:
    """Move a whole folder to its place and remove what was there, along with all else beside the folder."""
    replaced = folder.parent / _REPLACED
    shutil.rmtree(replaced, ignore_errors=True)
    if place.exists():
        place.rename(replaced)
    folder.rename(place)
    shutil.rmtree(folder.parent, ignore_errors=True)


def finish_moves(beside: Path, places: Path) -> None:
    """Put in place what is whole in `beside`: the process that was to do so was killed."""
    for manifest in sorted(beside.glob(f"[!_]*/{MANIFEST}")):
        put_in_place(manifest.parent, places / manifest.parent.name)


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


def read_tensors(path: Path, mapped: bool = False) -> Any:
    """
    The content of a file of `torch.save`, on the CPU. If it is mapped, the memory is the file's, which processes have
    in common, until it is written to.
    """
    with reading(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


@contextmanager
def reading(path: Path):
    """Around code that reads a file or a folder: its error names it, and says how to go on."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read ({_in_short(error)}): it is truncated or damaged, as after a full disk or a killed "
            "copy. Take another checkpoint, or copy it again."
        ) from error


@contextmanager
def fitting(what: str, way_on: str):
    """Around code that loads a state: where it does not fit, the error says what does not, and how to go on."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{what} does not fit this run ({_in_short(error)}). {way_on}") from error


def _hash(path: Path, flush: bool = False) -> str:
    with open(path, "rb") as file:
        if flush:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
