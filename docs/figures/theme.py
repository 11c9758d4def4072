"""What the figures of these pages have in common: an SVG for the light scheme of the site, and one for the dark."""

from collections.abc import Callable
from pathlib import Path

import matplotlib


matplotlib.use("svg")
from matplotlib import pyplot as plt


INKS = {"light": "#333333", "dark": "#c8ccd8"}
FOLDER = Path(__file__).parent


def tone(axes, ink: str) -> None:
    """Quiet axes, in the color of the text around them."""
    axes.tick_params(which="both", colors=ink)
    axes.spines[:].set_visible(False)
    axes.grid(color=ink, alpha=0.15)
    axes.title.set(color=ink, fontsize=10)
    axes.xaxis.label.set_color(ink)
    axes.yaxis.label.set_color(ink)


def save(name: str, draw: Callable[[str], plt.Figure]) -> None:
    """Write `name-light.svg` and `name-dark.svg`, as `draw` draws them in an ink; the same bytes every time."""
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "trl_credit", "font.family": "sans-serif"})
    for theme, ink in INKS.items():
        draw(ink).savefig(FOLDER / f"{name}-{theme}.svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close()
