"""The canary can fail: each name of TRL that it looks at is moved in turn, in TRL's own source."""

import pytest
from canary import canary
from canary.moves import MOVES, move_in_trl


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move[0])
def test_canary_names_what_moved(moe_dir, tmp_path, monkeypatch, move):
    name, *texts = move
    move_in_trl(monkeypatch, [tuple(text.split(" → ")) for text in texts])
    complaints = []
    for complaint in canary(moe_dir, tmp_path):
        complaints.append(complaint)
        if f"`{name}`" in complaint or f".{name}`" in complaint:
            return
    raise AssertionError(f"the canary does not name {name}: {complaints}")
