"""`llm2vec-ds report`: writes one HTML file that needs no other file, and its figures as PNG."""

from __future__ import annotations

import html
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llm2vec_ds import __version__
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.errors import writing
from llm2vec_ds.evaluate.identity import encoder_key, result_key
from llm2vec_ds.report.data import ReportData, read_folders
from llm2vec_ds.report.example_sentences import SENTENCES, TOPIC_OF, Examples, examples_of
from llm2vec_ds.report.figures import Figure, figures_of
from llm2vec_ds.storage.durable import replace_json, replace_text
from llm2vec_ds.storage.reading import checked_json
from llm2vec_ds.storage.tables import mean_and_spread

log = logging.getLogger(__name__)

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --paper: #fff; --line: #d5dae1; --soft: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --paper: #14181d; --line: #343c47; --soft: #1c222a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.figures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0; padding: .7rem; border: 1px solid var(--line); border-radius: .4rem;
  background: var(--soft); }
figure svg { display: block; width: 100%; height: auto; }
#overview { grid-column: 1 / -1; overflow-x: auto; } #overview svg { min-width: 44rem; }
figcaption { font-size: .9rem; margin-bottom: .3rem; overflow-wrap: anywhere; }
pre { overflow-x: auto; padding: .7rem; border: 1px solid var(--line); background: var(--soft);
  font-size: .85rem; }
"""


def write_report(folders: Sequence[Path], output: Path, *, with_examples: bool = True) -> list[Figure]:
    """Writes `output` (HTML) and a folder of PNGs of the same name beside it. Returns the figures.

    Args:
        with_examples: whether to load each encoder, for a map and a similarity matrix of example sentences.

    Raises:
        UserError: a folder holds nothing to show, an encoder cannot be loaded, or `output` cannot be written.
    """
    data = read_folders(folders)
    pictures = output.with_suffix("")
    with writing(f"--output {output}"):
        pictures.mkdir(parents=True, exist_ok=True)
    examples = _examples(data, pictures / "examples.json") if with_examples else {}
    figures = figures_of(data, examples)
    with writing(f"--output {output}"):
        for figure in figures:
            figure.save_png(pictures)
        replace_text(output, page(data, figures, [folder.name for folder in folders], bool(examples)))
    return figures


def _examples(data: ReportData, cache: Path) -> dict[str, Examples]:
    """Returns the examples of each encoder. They are stored, so a second report loads no model."""
    kept = _kept(cache)
    found = {}
    for name, (path, causal) in data.encoders.items():
        key = result_key(path, encoder_key(path), causal, SENTENCES)
        if key not in kept:
            log.info("%s: example sentences", name)
            made = examples_of(Encoder.from_pretrained(path, causal=causal))
            kept[key] = (made.places.tolist(), made.cosines.tolist())
        found[name] = Examples(*map(np.asarray, kept[key]))
    replace_json(cache, kept, None)
    return found


def _kept(cache: Path) -> dict[str, tuple[list[list[float]], list[list[float]]]]:
    """Returns the examples that an earlier report stored. Returns nothing if they are damaged."""
    if not cache.exists():
        return {}
    try:
        return checked_json(cache.read_bytes(), dict[str, tuple[list[list[float]], list[list[float]]]])
    except ValueError as error:
        log.warning("%s is damaged (%s): encoding the example sentences again", cache, error)
        return {}


def page(data: ReportData, figures: Sequence[Figure], folders: Sequence[str], with_examples: bool) -> str:
    """Returns the text of the HTML file."""
    title = f"LLM2Vec-DS: {', '.join(folders)}"
    parts = [f"<h1>{_text(title)}</h1>"]
    if data.scores:
        parts += ["<h2>Scores</h2>", _score_table(data.scores), _grid(figures, ("overview", "score_"))]
    if data.runs:
        stages = tuple(dict.fromkeys(f"{run.stage}_" for run in data.runs))
        parts += ["<h2>Training</h2>", _grid(figures, stages)]
    if data.curves:
        parts += ["<h2>Merged encoders</h2>", _grid(figures, ("merge_",))]
    if with_examples:
        parts += ["<h2>Example sentences</h2>", _grid(figures, ("map_", "similarity_")), _sentences()]
    if data.facts:
        parts += ["<h2>Run</h2>", _table([("", ""), *data.facts.items()])]
    parts += [
        f"<details><summary>Recipe of {_text(run.name)}</summary><pre>{_text(run.recipe)}</pre></details>"
        for run in data.runs
        if run.recipe
    ]
    parts.append(f"<p><small>Made by llm2vec-ds {__version__}.</small></p>")
    head = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body>'
    )
    return head + "\n".join(parts) + "</body></html>\n"


def _text(value: object) -> str:
    return html.escape(str(value))


def _grid(figures: Sequence[Figure], beginnings: tuple[str, ...]) -> str:
    shown = [
        f'<figure id="{f.name}"><figcaption>{_text(f.caption)}</figcaption>{f.svg}</figure>'
        for f in figures
        if f.name.startswith(beginnings)
    ]
    return f'<div class="figures">{"".join(shown)}</div>'


def _score_table(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    variants = list(dict.fromkeys(variant for by_variant in scores.values() for variant in by_variant))
    rows = [("", *scores)]
    rows += [
        (v, *(mean_and_spread(by_variant.get(v, [])) for by_variant in scores.values())) for v in variants
    ]
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    cells = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    lines = [f"<tr>{cells}</tr>" if any(head) else ""]
    for name, *values in body:
        numbers = "".join(f'<td class="number">{_text(value)}</td>' for value in values)
        lines.append(f"<tr><td>{_text(name)}</td>{numbers}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _sentences() -> str:
    rows = [("sentence", "topic"), *zip(SENTENCES, TOPIC_OF, strict=True)]
    return f"<details><summary>The sentences</summary>{_table(rows)}</details>"
