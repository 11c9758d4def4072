"""Draws `trace_weights-light.svg` and `trace_weights-dark.svg`, the figure of the GRPO-λ page, into this folder."""

import torch
from matplotlib import pyplot as plt
from theme import save, tone

from trl_credit import adjoint_trace, eligibility_trace


TOKENS, ROW = 256, 160
STYLES = {"recent": "-", "both": "--"}
DECAYS = {0.9: "#e07b39", 0.99: "#4f7fd9"}


def draw(ink: str) -> plt.Figure:
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
        tone(axes, ink)
    return fig


if __name__ == "__main__":
    save("trace_weights", draw)
