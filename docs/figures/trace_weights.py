"""Draws `trace_weights-light.svg` and `trace_weights-dark.svg`, the figure of the GRPO-λ page, into this folder."""

from pathlib import Path

import matplotlib
import torch

from trl_credit import adjoint_trace, eligibility_trace


matplotlib.use("svg")
from matplotlib import pyplot as plt


TOKENS, ROW = 256, 160
STYLES = {"recent": "-", "both": "--"}
DECAYS = {0.9: "#e07b39", 0.99: "#4f7fd9"}


def draw(path: Path, ink: str) -> None:
    mask = torch.ones(1, TOKENS)
    unit = torch.eye(TOKENS)
    fig, (row_axes, weight_axes) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for decay, color in DECAYS.items():
        for style, line in STYLES.items():
            label = f"{style}, λ = {decay}"
            # S applied to a unit vector is a column of its matrix; the entries at ROW of all columns are row ROW.
            row = eligibility_trace(unit, mask.expand(TOKENS, -1), decay, style)[:, ROW]
            row_axes.plot(row[: ROW + 1], line, color=color, label=label)
            weights = adjoint_trace(torch.ones(1, TOKENS), mask, decay, style)[0]
            weight_axes.plot(weights, line, color=color, label=label)
    row_axes.set(title=f"Share of token j in the ratio of token {ROW}", xlabel="token j", xlim=(0, ROW), ylim=(0, 1.05))
    weight_axes.set(
        title="Effective weight of token j", xlabel="token j", xlim=(0, TOKENS), yscale="log", ylim=(0.8, 400)
    )
    weight_axes.axhline(1, color=ink, linewidth=0.8, linestyle=":")
    weight_axes.annotate("GRPO", (8, 1.06), color=ink, fontsize=8)
    row_axes.legend(loc="upper center", labelcolor=ink, frameon=False, fontsize=8)
    for axes in (row_axes, weight_axes):
        axes.tick_params(which="both", colors=ink)
        axes.spines[:].set_visible(False)
        axes.grid(color=ink, alpha=0.15)
        axes.title.set(color=ink, fontsize=10)
        axes.xaxis.label.set_color(ink)
    fig.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "trl_credit", "font.family": "sans-serif"})
    for theme, ink in (("light", "#333333"), ("dark", "#c8ccd8")):
        draw(Path(__file__).with_name(f"trace_weights-{theme}.svg"), ink)
