"""Draws the demo's scores."""

from __future__ import annotations

from pathlib import Path

STAGES = {
    "causal": "causal\nbaseline",
    "bidirectional": "+ bidirectional\nattention",
    "mntp": "+ MNTP",
    "simcse": "+ SimCSE",
    "distil": "+ distillation",
}
METRICS = {"sts_spearman": "Similarity (Spearman's ρ)", "retrieval_ndcg_at_10": "Retrieval (nDCG@10)"}


def plot_stages(metrics: dict[str, dict[str, float]], path: Path, title: str) -> None:
    """Writes a PNG with one panel per metric and one bar per LLM2Vec stage."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    stages = [stage for stage in STAGES if stage in metrics]
    for axes, (metric, label) in zip(figure.subplots(1, len(METRICS)), METRICS.items(), strict=True):
        values = [metrics[stage][metric] for stage in stages]
        colours = ["#9aa5b1", "#9aa5b1", "#5b8db8", "#1f5f99"]
        bars = axes.bar([STAGES[stage] for stage in stages], values, color=colours)
        axes.bar_label(bars, fmt="%.3f", padding=2, fontsize=9)
        axes.set_title(label, fontsize=10)
        axes.set_ylim(min(0.0, *values) * 1.15, max(0.1, *values) * 1.15)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
