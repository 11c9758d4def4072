"""A report as one HTML page that opens from disk: tables and plots, light and dark, nothing fetched."""

import json
import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from .layout import SECTIONS, Plot, Section
from .report import CriticReport
from .statistics import Figure


# Of a plot, in pixels: its size and the margins around the axes.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 260, 52, 12, 12, 42
# Shapes as well as colours tell critics apart.
_MARKERS = ("circle", "square", "triangle", "diamond", "cross")


def write_page(path: str | Path, reports: Sequence[CriticReport]) -> None:
    """
    Write reports on the same probes as one page.

    Args:
        path (`str` or `Path`):
            The `.html` file.
        reports (`Sequence[CriticReport]`):
            One for each critic.
    """
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    names = ", ".join(report.critic for report in reports)
    legend = "".join(
        f'<li><svg viewBox="-8 -8 16 16" width="16" height="16" class="c{i % 5}" aria-hidden="true">{_marker(i, 0, 0)}'
        f"</svg> {escape(report.critic)}</li>"
        for i, report in enumerate(reports)
    )
    body = "\n".join(_section(section, reports) for section in SECTIONS)
    Path(path).write_text(
        f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Critic report: {escape(names)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>Critic report</h1>
{"".join(_verdict(i, report) for i, report in enumerate(reports))}
{_probes(reports[0].probes)}
<ul class="legend">{legend}</ul>
{body}
</main>
</body>
</html>
""",
        encoding="utf-8",
    )


def write_json(path: str | Path, reports: Sequence[CriticReport]) -> None:
    """
    Write reports as JSON; NaN becomes `null`.

    Args:
        path (`str` or `Path`):
            The `.json` file.
        reports (`Sequence[CriticReport]`):
            One for each critic.
    """
    text = json.dumps([report.to_dict() for report in reports], indent=1, allow_nan=False, ensure_ascii=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


def show(figure: Figure | None, digits: int = 3) -> str:
    """An estimate and its interval as text."""
    if figure is None or math.isnan(figure.estimate):
        return "–"
    text = _number(figure.estimate, digits)
    if math.isnan(figure.low):
        return text
    return f"{text} [{_number(figure.low, digits)}, {_number(figure.high, digits)}]"


def _number(x: float, digits: int = 3) -> str:
    return f"{x + 0.0:.{digits}f}".replace("-0.000", "0.000").replace("-", "−")


def _verdict(i: int, report: CriticReport) -> str:
    if report.verdict is None:
        return ""
    first, *rest = report.verdict.sentences
    more = "".join(f"<p>{escape(sentence)}</p>" for sentence in rest)
    return (
        f'<section class="verdict c{i % 5}"><h2>{escape(report.critic)}</h2>'
        f"<p><strong>{escape(first)}</strong></p>{more}</section>\n"
    )


def _probes(probes: dict) -> str:
    settings = probes.get("settings", {})
    facts = {
        "policy": probes.get("policy"),
        "prompts": probes.get("prompts"),
        "completions": probes.get("completions"),
        "mean reward": f"{probes['mean_reward']:.3f}",
        "states": probes.get("states"),
        "continuations of each": settings.get("continuations"),
        "cuts": settings.get("cuts"),
        "states with ranked next steps": probes.get("ranked_states"),
        "tokens sampled": f"{probes['sampled_tokens']:,}",
    }
    items = "".join(
        f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items() if value is not None
    )
    return f"<dl>{items}</dl>\n<p>Brackets and bars are 95 % intervals; prompts are what varies.</p>"


def _section(section: Section, reports: Sequence[CriticReport]) -> str:
    parts = [f"<section>\n<h2>{escape(section.title)}</h2>\n<p>{escape(section.text)}</p>"]
    if section.rows:
        head = "".join(f"<th scope=col>{escape(report.critic)}</th>" for report in reports)
        lines = "".join(
            f"<tr><th scope=row>{escape(row.label)}</th>"
            + "".join(f"<td>{_cell(report.rows.get(row.name))}</td>" for report in reports)
            + f"<td>{escape(row.ideal)}</td></tr>\n"
            for row in section.rows
        )
        parts.append(
            f'<div class="scroll"><table><thead><tr><th></th>{head}<th scope=col>ideal</th></tr></thead>\n'
            f"<tbody>{lines}</tbody></table></div>"
        )
    plots = "".join(draw(plot, reports) for plot in section.plots)
    return "\n".join([*parts, f'<div class="plots">{plots}</div>' if plots else "", "</section>"])


def _cell(figure: Figure | None) -> str:
    estimate, _, interval = show(figure).partition(" ")
    return f"{estimate}<br><small>{interval}</small>" if interval else estimate


# --- Plots


def draw(plot: Plot, reports: Sequence[CriticReport]) -> str:
    """
    One plot as inline SVG, a line for each report; points that cannot be told are left out.

    Args:
        plot ([`Plot`]):
            What is drawn.
        reports (`Sequence[CriticReport]`):
            One for each critic.
    """
    curves = [_known(report.curves.get(plot.name, [])) for report in reports]
    truth = _known(reports[0].curves.get(plot.truth, [])) if plot.truth else []
    points = [point for curve in [*curves, truth] for point in curve]
    if not points:
        return ""
    ticks_x = sorted({x for x, _ in points})
    position = {x: float(i) for i, x in enumerate(ticks_x)} if plot.categorical else {x: x for x in ticks_x}
    low_x, high_x = _range(position.values(), margin=0.04)
    # Intervals count up to as far as estimates spread again: a few very wide ones would flatten the rest.
    ys = [figure.estimate for _, figure in points]
    ys += [y for y in (plot.ideal,) if y is not None] + ([low_x, high_x] if plot.diagonal else [])
    reach = max(max(ys) - min(ys), 0.05)
    limits = [min(max(y, min(ys) - reach), max(ys) + reach) for _, f in points for y in (f.low, f.high) if y == y]
    low_y, high_y = _range([*ys, *limits], margin=0.06)

    def px(x: float) -> float:
        return LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        share = (min(max(y, low_y), high_y) - low_y) / (high_y - low_y)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    axes = []
    for y in _nice(low_y, high_y):
        axes.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        axes.append(f'<text x="{LEFT - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{_tick(y)}</text>')
    for x in ticks_x if plot.categorical else _nice(low_x, high_x):
        at = px(position[x] if plot.categorical else x)
        axes.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_tick(x)}</text>')
    axes.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(plot.x)}</text>')
    if plot.ideal is not None:
        axes.append(f'<path class="ideal" d="M{LEFT} {py(plot.ideal):.1f}H{WIDTH - RIGHT}"/>')
    if plot.diagonal:
        axes.append(f'<path class="ideal" d="M{px(low_x):.1f} {py(low_x):.1f}L{px(high_x):.1f} {py(high_x):.1f}"/>')
    if truth:
        axes.append(f'<path class="truth" d="{_path([(px(position[x]), py(f.estimate)) for x, f in truth])}"/>')
    lines = []
    for i, (report, curve) in enumerate(zip(reports, curves, strict=True)):
        # Side by side, so that intervals do not cover each other.
        shift = (i - (len(reports) - 1) / 2) * 3
        marks = [f'<path class="line" d="{_path([(px(position[x]) + shift, py(f.estimate)) for x, f in curve])}"/>']
        for x, figure in curve:
            at = px(position[x]) + shift
            bar = f'<path class="bar" d="M{at:.1f} {py(figure.low):.1f}V{py(figure.high):.1f}"/>'
            mark = _marker(i, at, py(figure.estimate))
            title = f"<title>{escape(report.critic)}, {_tick(x)}: {show(figure)}, {figure.n} rows</title>"
            marks.append(f"<g>{title}{bar if figure.low == figure.low else ''}{mark}</g>")
        lines.append(f'<g class="c{i % 5}">{"".join(marks)}</g>')
    label = escape(plot.label)
    return (
        f'<figure><figcaption>{label}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(axes)}{''.join(lines)}</svg></figure>\n"
    )


def _known(curve) -> list[tuple[float, Figure]]:
    return [(x, figure) for x, figure in curve if math.isfinite(figure.estimate)]


def _path(points: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) if points else ""


def _marker(i: int, x: float, y: float) -> str:
    kind = _MARKERS[i % len(_MARKERS)]
    if kind == "circle":
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
    shapes: dict[str, list[tuple[float, float]]] = {
        "square": [(-3.2, -3.2), (3.2, -3.2), (3.2, 3.2), (-3.2, 3.2)],
        "triangle": [(0, -4.2), (4, 3.2), (-4, 3.2)],
        "diamond": [(0, -4.6), (4.6, 0), (0, 4.6), (-4.6, 0)],
        "cross": [(-1.3, -4), (1.3, -4), (1.3, -1.3), (4, -1.3), (4, 1.3), (1.3, 1.3), (1.3, 4), (-1.3, 4)]
        + [(-1.3, 1.3), (-4, 1.3), (-4, -1.3), (-1.3, -1.3)],
    }
    return f'<path class="mark" d="{_path([(x + dx, y + dy) for dx, dy in shapes[kind]])}Z"/>'


def _range(values, margin: float) -> tuple[float, float]:
    values = list(values)
    low, high = min(values), max(values)
    space = (high - low) * margin or 0.5
    return low - space, high + space


def _nice(low: float, high: float) -> list[float]:
    """About five round numbers between two."""
    rough = (high - low) / 5
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _tick(x: float) -> str:
    return f"{x + 0.0:.4g}".replace("-", "−")
