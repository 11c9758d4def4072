"""Draws `floors-light.svg` and `floors-dark.svg`, the picture of the architecture page, into this folder."""

from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch
from theme import save


# From the roof down. A room knows those below its floor, and its neighbours as far as no circle comes of it.
FLOORS = (
    ("what you type", ("cli", "scripts", "recipes", "methods.py")),
    ("what you look at", ("critic_report", "toy")),
    ("one folder a method", ("grpo_lambda", "vineppo", "vapo", "sppo", "genac")),
    ("value models", ("critics: token, prompt, generative", "critics/engine")),
    ("TRL, and nobody else knows it", ("seam: hooks, services, configs",)),
    ("what was given to each token", ("credit_log",)),
    ("no TRL, no trainer", ("credit: tensors in, tensors out", "segmenting", "sampling", "journal")),
)
COLORS = ("#8a8f9c", "#c9803a", "#4f7fd9", "#3f9d73", "#b2555f", "#8d6bb8", "#5b8f9e")
WIDTH, HEIGHT, GAP = 10.0, 0.62, 0.16


def draw(ink: str) -> plt.Figure:
    fig, axes = plt.subplots(figsize=(9, 4.4), layout="constrained")
    for floor, ((name, rooms), color) in enumerate(zip(FLOORS, COLORS, strict=True)):
        bottom = -floor * (HEIGHT + GAP)
        axes.text(-0.15, bottom + HEIGHT / 2, name, ha="right", va="center", color=ink, fontsize=9)
        letters = sum(len(room) + 4 for room in rooms)
        left = 0.0
        for room in rooms:
            width = (WIDTH - GAP * (len(rooms) - 1)) * (len(room) + 4) / letters
            box = FancyBboxPatch(
                (left, bottom), width, HEIGHT, boxstyle="round,pad=0,rounding_size=0.08", facecolor=color, linewidth=0
            )
            box.set_alpha(0.85)
            axes.add_patch(box)
            axes.text(left + width / 2, bottom + HEIGHT / 2, room, ha="center", va="center", color="white", fontsize=9)
            left += width + GAP
    axes.set(xlim=(-3.6, WIDTH), ylim=(bottom - 0.05, HEIGHT + 0.05))
    axes.axis("off")
    return fig


if __name__ == "__main__":
    save("floors", draw)
