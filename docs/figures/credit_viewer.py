"""
Makes the screenshots of the page on `trl-credit inspect`, from real runs of the quickstart's model, into this folder.

    python docs/figures/credit_viewer.py --runs outputs/credit_viewer

GRPO-λ and VAPO train the same model on the same problems with the same seed, so that the completions of step 0 have the
same tokens. VAPO's critic is pretrained before. Needs Chromium, and Pillow, which comes with matplotlib.
"""

import argparse
import random
import shutil
import subprocess
import tempfile
from pathlib import Path

from datasets import Dataset
from PIL import Image
from trl import GRPOConfig

from trl_credit import GRPOLambdaConfig, GRPOLambdaTrainer, VAPOConfig, VAPOTrainer
from trl_credit.cli import main
from trl_credit.toy.task import ChainTask
from trl_credit.toy.tiny_model import TinyModelSettings, fit_and_save, load


STEPS = 41
TASK = ChainTask(TinyModelSettings().terms)
SETTINGS = {
    "per_device_train_batch_size": 64,
    "num_generations": 8,
    "max_completion_length": TASK.max_completion_length,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant",
    "max_steps": STEPS,
    "log_credit": True,
    "log_credit_steps": 20,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 20,
}


def trainer_of(trainer_class: type, config: GRPOConfig, start: Path, **kwargs):
    rng = random.Random("train 0")
    problems = [TASK.draw(rng) for _ in range(STEPS * 8)]

    def correct(completions, problem, **kwargs):
        return [float(TASK.is_correct(p, text)) for p, text in zip(problem, completions, strict=True)]

    model, tokenizer = load(start)
    return trainer_class(
        model=model,
        reward_funcs=correct,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [TASK.prompt(p) for p in problems], "problem": problems}),
        processing_class=tokenizer,
        **kwargs,
    )


def train(runs: Path) -> None:
    """Whatever of it is not there yet."""
    start = TinyModelSettings().folder(runs)
    if not start.exists():
        fit_and_save(TinyModelSettings(), start)
    last_table = f"_credit/step_{STEPS - 1:07d}.parquet"
    if not (runs / "grpo-lambda" / last_table).exists():
        trainer_of(GRPOLambdaTrainer, GRPOLambdaConfig(str(runs / "grpo-lambda"), **SETTINGS), start).train()
    critic = {"critic_learning_rate": 2e-3, "length_adaptive_alpha": 1.0}
    if not (runs / "pretraining/critic").exists():
        config = VAPOConfig(str(runs / "pretraining"), critic_pretraining_steps=300, **critic, **SETTINGS)
        trainer_of(VAPOTrainer, config, start, critic=str(start)).pretrain_critic()
    if not (runs / "vapo" / last_table).exists():
        config = VAPOConfig(str(runs / "vapo"), critic_pretraining_steps=0, **critic, **SETTINGS)
        trainer_of(VAPOTrainer, config, start, critic=str(runs / "pretraining/critic")).train()


def screenshot(page: str, picture: Path, dark: bool) -> None:
    """A picture of a page, by its address, in a fresh Chromium."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as profile:
        raw = Path(profile) / "raw.png"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
        size = ["--window-size=1280,620", f"--screenshot={raw}"]
        subprocess.run([browser, *options, *theme, *size, page], check=True, capture_output=True)
        Image.open(raw).convert("RGB").save(picture, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("outputs/credit_viewer"))
    runs = parser.parse_args().runs
    train(runs)
    here = Path(__file__).parent
    main(["inspect", str(runs / "vapo"), "--output", str(runs / "vapo.html")])
    both = ["--compare", str(runs / "vapo"), "--steps", "0", "--output", str(runs / "both.html")]
    main(["inspect", str(runs / "grpo-lambda"), *both])
    for name, page, completion, dark in (("one", "vapo", 43, False), ("two", "both", 9, True)):
        address = (runs / f"{page}.html").absolute().as_uri()
        screenshot(f"{address}#{completion}", here / f"credit_viewer-{name}.png", dark)
