"""
Makes the screenshots of the page on `trl-credit inspect`, light and dark, into this folder: chains of sums, two of
which go wrong at a step that is planted, and the values of a critic that sees it.

    python docs/figures/credit_viewer.py

Needs Chromium, and Pillow, which comes with matplotlib.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from PIL import Image

from trl_credit import gae
from trl_credit.cli import main


STEPS, LAMBDA = 12, 0.95
# The step of each completion that goes wrong, if any.
WRONG = (None, 7, None, 3)
WORDS = ("First", "Then", "Next", "So far", "Now", "And", "Plus", "Going on", "After that", "More", "Almost", "Last")


def completion(number: int, wrong: int | None) -> dict:
    """
    A row of a table. Values are the chance to get through to the end, each step going wrong with 4 %, give or take a
    little; after the wrong step a tenth is left of it, for who errs can notice.
    """
    rng = random.Random(number)
    total, terms = rng.randint(10, 60), [rng.randint(2, 40) for _ in range(STEPS)]
    prompt = " + ".join(map(str, [total, *terms])) + " = ?"
    tokens, values = [], []
    chance = 0.96**STEPS
    for step, term in enumerate(terms):
        right = total + term
        total = right + 10 if step == wrong else right
        line = re.findall(r"\d| ?[^\d\s]+|\s", f"{WORDS[step]}, {right - term} + {term} = {total}.\n")
        result = len(line) - 2 - len(str(total))  # its first digit that can be wrong decides
        fallen = result + next((i for i, (a, b) in enumerate(zip(str(total), str(right), strict=False)) if a != b), 0)
        for position, token in enumerate(line):
            tokens.append(token)
            values.append(min(max(chance + rng.gauss(0, 0.015), 0), 1))
            if step == wrong and position == fallen:
                chance *= 0.1
        chance = min(chance / 0.96, 1)
    reward = float(wrong is None)
    advantages, _ = gae(torch.tensor([reward]), torch.tensor([values]), torch.ones(1, len(values)), lam=LAMBDA)
    return {
        "prompt": prompt,
        "step": 40,
        "method": "VAPO",
        "tokens": tokens,
        "reward": reward,
        "rewards": {"correct": reward},
        "value": values,
        "advantage": advantages[0].tolist(),
        "entropy": [rng.expovariate(8) for _ in tokens],
    }


def screenshot(page: str, picture: Path, dark: bool, width: int, height: int) -> None:
    """A picture of a page, by its address, in a fresh Chromium. Windows are 500 px wide at least, frames are not."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as profile:
        raw = Path(profile) / "raw.png"
        if width < 500:
            frame = f'<body style="margin:0"><iframe src="{page}" style="border:0;width:{width}px;height:{height}px">'
            (Path(profile) / "frame.html").write_text(frame)
            page = (Path(profile) / "frame.html").as_uri()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
        size = [f"--window-size={max(width, 500)},{height}", "--virtual-time-budget=5000", f"--screenshot={raw}"]
        subprocess.run([browser, *options, *theme, *size, page], check=True, capture_output=True)
        image = Image.open(raw).convert("RGB").crop((0, 0, width, height))
        image.quantize(256, dither=Image.Dither.NONE).save(picture, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of the pictures")
    parser.add_argument("--widths", type=int, nargs="+", default=[1280], help="in pixels, a picture of each")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table, page = Path(folder) / "sums.jsonl", Path(folder) / "sums.html"
        rows = [completion(number, wrong) for number, wrong in enumerate(WRONG)]
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        main(["inspect", str(table), "--output", str(page)])
        for width in args.widths:
            for theme in ("light", "dark"):
                name = f"credit_viewer-{theme}.png" if width == 1280 else f"credit_viewer-{theme}-{width}.png"
                height = 800 if width > 600 else 1500
                screenshot(f"{page.as_uri()}#1", args.output / name, theme == "dark", width, height)
