"""Draws a report's figures as SVG in the page's colours, and as PNG."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llm2vec_ds.report import overview
from llm2vec_ds.report.data import ReportData, Run
from llm2vec_ds.report.example_sentences import SENTENCES, TOPIC_OF, TOPICS, Examples

INK = "#010203"
"""Placeholder for the page's text colour. The SVG gets the real one, so it suits light and dark pages."""
COLOURS = ["#4477aa", "#ee6677", "#228833", "#aa3377", "#66ccee", "#ccbb44", "#999999"]
SIZE_INCHES = (5.2, 3.4)
OVER_STEPS = {
    "loss": ("loss", "training loss"),
    "accuracy": ("accuracy", "accuracy in training"),
    "lr": ("lr", "learning rate"),
    "tokens_per_s": ("tokens/s", "tokens per second"),
    "peak_mib": ("MiB", "peak memory, MiB"),
}


@dataclass(frozen=True)
class Figure:
    """One figure: `svg` for the page, `png` for other uses. `n_marks` counts its points, bars or cells."""

    name: str
    caption: str
    svg: str
    png: bytes
    n_marks: int

    def save_png(self, folder: Path) -> None:
        """Writes `folder/<name>.png`."""
        (folder / f"{self.name}.png").write_bytes(self.png)


def figures_of(data: ReportData, examples: Mapping[str, Examples]) -> list[Figure]:
    """Draws all figures that the data give, in the page's order."""
    figures = _overview(data) + [_scores(metric, found) for metric, found in data.scores.items()]
    for stage in dict.fromkeys(run.stage for run in data.runs):
        runs = [run for run in data.runs if run.stage == stage]
        figures += [
            _over_steps(stage, key, runs) for key in OVER_STEPS if any(key in r.steps[0] for r in runs)
        ]
        figures += [_held_out(stage, metric, runs) for metric in _measured_over_steps(runs)]
    figures += [_merged(what, data) for what in dict.fromkeys(curve.measured for curve in data.curves)]
    for name, found in examples.items():
        figures += [_map(name, found), _similarities(name, found)]
    return list(_with_distinct_names(figures))


def _with_distinct_names(figures: Sequence[Figure]) -> Iterator[Figure]:
    """Numbers figures of one name. Names that differ in signs alone, such as `F1-a` and `F1 a`, give one."""
    seen: Counter[str] = Counter()
    for figure in figures:
        seen[figure.name] += 1
        again = seen[figure.name]
        yield figure if again == 1 else replace(figure, name=f"{figure.name}_{again}")


def _overview(data: ReportData) -> list[Figure]:
    if not (scores := overview.chosen(data.scores)):
        return []

    def draw(figure: Any) -> int:
        return overview.draw(figure, scores, INK, COLOURS)

    return [_drawn_on("overview", "all variants", draw, overview.size_inches(scores))]


def _drawn(name: str, caption: str, draw: Callable[[Any], int]) -> Figure:
    """Draws a figure of one panel, which `draw` fills."""
    return _drawn_on(name, caption, lambda figure: draw(figure.subplots()), SIZE_INCHES)


def _drawn_on(name: str, caption: str, draw: Callable[[Any], int], size: tuple[float, float]) -> Figure:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    name = "".join(c if c.isalnum() else "_" for c in name).strip("_").lower()
    inks = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    )
    style = {
        **inks,
        "svg.fonttype": "none",
        "svg.hashsalt": name,  # ids differ between the figures of one page
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 10,
        "legend.frameon": False,
        "text.parse_math": False,  # names may hold a dollar sign
    }
    with matplotlib.rc_context(style):
        figure = Canvas(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        n_marks = draw(figure)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=150, facecolor="white")
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    text = svg.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return Figure(name, caption, text, png.getvalue(), n_marks)


def _lines(
    axes: Any,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    ylabel: str,
    xlabel: str = "step",
    dots: bool = False,
) -> int:
    n_points = 0
    for i, (label, (x, y)) in enumerate(series.items()):
        marker = "o" if dots or len(x) < 3 else None
        axes.plot(x, y, color=COLOURS[i % len(COLOURS)], label=label, marker=marker, linewidth=1.4)
        n_points += len(x)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    if len(series) > 1:
        axes.legend(fontsize=8)
    return n_points


def _over_steps(stage: str, key: str, runs: Sequence[Run]) -> Figure:
    unit, words = OVER_STEPS[key]
    measured = {r.name: [step for step in r.steps if key in step] for r in runs if key in r.steps[0]}
    series = {name: ([s["step"] for s in steps], [s[key] for s in steps]) for name, steps in measured.items()}
    return _drawn(f"{stage}-{key}", f"{stage}: {words}", lambda axes: _lines(axes, series, unit))


def _measured_over_steps(runs: Sequence[Run]) -> list[str]:
    """Returns the metrics of held_out.jsonl that some run measured at least twice. Leaves out counts."""
    rows = [[name for row in run.held_out for name in row] for run in runs]
    names = dict.fromkeys(name for of_run in rows for name in of_run)
    counts = ("step", "n_masked")
    return [name for name in names if name not in counts and any(r.count(name) > 1 for r in rows)]


def _held_out(stage: str, metric: str, runs: Sequence[Run]) -> Figure:
    series = {}
    for run in runs:
        rows = [row for row in run.held_out if metric in row]
        if rows:
            series[run.name] = ([row["step"] for row in rows], [row[metric] for row in rows])
    caption = f"{stage}: held-out {metric}"
    return _drawn(f"{stage}-held-out-{metric}", caption, lambda axes: _lines(axes, series, metric))


def _merged(measured: str, data: ReportData) -> Figure:
    """Draws one line for each two mixed encoders, from the first alone to the second alone."""
    series = {c.name: (c.weights, c.scores) for c in data.curves if c.measured == measured}

    def draw(axes: Any) -> int:
        n_points = _lines(axes, series, measured, "weight of the second encoder", dots=True)
        if len(series) == 1:
            axes.set_title(next(iter(series)), fontsize=10)
        return n_points

    return _drawn(f"merge-{measured}", f"mixtures of two encoders: {measured}", draw)


def _scores(metric: str, by_variant: Mapping[str, Sequence[float]]) -> Figure:
    """Draws one bar per variant, the mean over seeds. If there are several seeds, each gets a dot."""

    def draw(axes: Any) -> int:
        names, means = list(by_variant), [float(np.mean(values)) for values in by_variant.values()]
        colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
        bars = axes.barh(names, means, color=colours, height=0.65)
        axes.bar_label(bars, fmt="%.3f", padding=4)
        for row, values in enumerate(by_variant.values()):
            if len(values) > 1:
                axes.plot(values, [row] * len(values), "o", color=INK, markersize=3)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.axvline(0, color=INK, linewidth=0.8)
        return len(names)

    return _drawn(f"score-{metric}", f"score: {metric}", draw)


def _map(name: str, examples: Examples) -> Figure:
    def draw(axes: Any) -> int:
        for i, topic in enumerate(TOPICS):
            rows = [row for row, of in enumerate(TOPIC_OF) if of == topic]
            axes.scatter(*examples.places[rows].T, color=COLOURS[i], label=topic, s=28)
        axes.legend(fontsize=8)
        axes.set_xlabel("first principal axis")
        axes.set_ylabel("second")
        axes.grid(alpha=0.25)
        return len(SENTENCES)

    return _drawn(f"map-{name}", f"{name}: {len(SENTENCES)} example sentences on two principal axes", draw)


def _similarities(name: str, examples: Examples) -> Figure:
    def draw(axes: Any) -> int:
        n = len(SENTENCES)
        off_diagonal = examples.cosines[~np.eye(n, dtype=bool)]
        limits = {"vmin": float(off_diagonal.min()), "vmax": float(off_diagonal.max())}
        mesh = axes.pcolormesh(examples.cosines, cmap="viridis", **limits)
        axes.figure.colorbar(mesh, ax=axes, label="cosine")
        size = n // len(TOPICS)
        centres = [size * i + size / 2 for i in range(len(TOPICS))]
        axes.set_xticks(centres, list(TOPICS))
        axes.set_yticks(centres, list(TOPICS), rotation=90, va="center")
        axes.tick_params(length=0)
        axes.invert_yaxis()
        axes.set_aspect("equal")
        return n * n

    return _drawn(f"similarity-{name}", f"{name}: cosine between the example sentences", draw)
