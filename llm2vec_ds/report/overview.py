"""All scores of all variants in one picture: a panel for each score, a row for each variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PANELS_PER_ROW = 4
PANEL_INCHES, ROW_INCHES, NAMES_INCHES = 2.2, 0.27, 1.7
LEAST_METRICS, LEAST_VARIANTS = 3, 3
"""Fewer are easier to read one by one."""

Scores = Mapping[str, Mapping[str, Sequence[float]]]
"""By metric, then by variant: one value a seed."""


def chosen(scores: Scores) -> dict[str, Mapping[str, Sequence[float]]]:
    """The scores to draw; empty if there are few.

    Leaves out the second readings of a task (`pos, same_token`), which only explain the first (`pos`).
    """
    main = {metric: found for metric, found in scores.items() if not _is_second(metric, scores)}
    variants = {variant for by_variant in main.values() for variant in by_variant}
    return main if len(main) >= LEAST_METRICS and len(variants) >= LEAST_VARIANTS else {}


def _is_second(metric: str, scores: Scores) -> bool:
    first, comma, _ = metric.partition(", ")
    return bool(comma) and first in scores


def size_inches(scores: Scores) -> tuple[float, float]:
    n_rows = -(-len(scores) // PANELS_PER_ROW)
    n_columns = min(len(scores), PANELS_PER_ROW)
    n_variants = len(_variants(scores))
    return NAMES_INCHES + PANEL_INCHES * n_columns, n_rows * (0.6 + ROW_INCHES * n_variants)


def draw(figure: Any, scores: Scores, ink: str, colours: Sequence[str]) -> int:
    """Fills an empty figure; returns the number of means drawn.

    A large dot is the mean over seeds, a small dot is one seed. Dots, not bars: axes need not begin at 0.
    """
    n_columns = min(len(scores), PANELS_PER_ROW)
    n_rows = -(-len(scores) // n_columns)
    panels = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    variants, n_means = _variants(scores), 0
    for number, (axes, (metric, by_variant)) in enumerate(zip(panels, scores.items(), strict=False)):
        n_means += _panel(axes, variants, by_variant, ink, colours)
        names = variants if number % n_columns == 0 else [""] * len(variants)
        axes.set_yticks(range(len(variants)), names, fontsize=9)
        axes.set_title(metric, fontsize=9, loc="left")
    for axes in panels[len(scores) :]:
        axes.set_axis_off()
    return n_means


def _panel(
    axes: Any,
    variants: list[str],
    by_variant: Mapping[str, Sequence[float]],
    ink: str,
    colours: Sequence[str],
) -> int:
    means = {variant: float(np.mean(values)) for variant, values in by_variant.items()}
    best = max(means.values())
    for row, variant in enumerate(variants):
        axes.axhline(row, color=ink, alpha=0.12, linewidth=0.8)
        if variant not in means:
            continue
        values, mean = by_variant[variant], means[variant]
        axes.plot([mean], [row], "o", color=colours[1] if mean == best else colours[0], markersize=7)
        if len(values) > 1:
            axes.plot(values, [row] * len(values), "o", color=ink, markersize=2.5)
        weight = "bold" if mean == best else "normal"
        place = axes.get_yaxis_transform()  # x in widths of the panel, y in rows
        axes.text(1.02, row, f"{mean:.3f}", transform=place, va="center", fontsize=8, fontweight=weight)
    axes.set_ylim(len(variants) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return len(means)


def _variants(scores: Scores) -> list[str]:
    return list(dict.fromkeys(variant for by_variant in scores.values() for variant in by_variant))
