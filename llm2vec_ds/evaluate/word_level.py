"""Word-level tasks by the paper's protocol: a linear layer on the vectors of a frozen encoder.

The paper is BehnamGhader et al., 2024, arXiv 2404.05961. The settings are those of the authors' published
configuration: dropout 0.1 on the word's vector, AdamW at 5e-4, 8 sentences per step, 4000 steps. One thing
differs. Their learning rate falls linearly over a longer run, which they stop early. Until then it has lost
less than a quarter. Here it is constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from llm2vec_ds.errors import UserError
from llm2vec_ds.evaluate.word_features import Shift, WordFeatures


@dataclass(frozen=True)
class ProbeOptions:
    """How the linear layer is trained."""

    max_steps: int = 4000
    sentences_per_step: int = 8
    lr: float = 5e-4
    dropout: float = 0.1
    seed: int = 42


@dataclass(frozen=True)
class WordScores:
    """Scores between 0 and 1.

    Attributes:
        accuracy: share of words with the right label. The paper reports it for every task.
        entity_f1: F1 of whole entities or chunks (micro-averaged, as seqeval counts them). None if the labels
            are no B-/I- spans.
        majority: accuracy of always predicting the training data's most frequent label.
    """

    accuracy: float
    entity_f1: float | None
    majority: float
    n_words: int
    n_unscored: int


def probe(train: WordFeatures, test: WordFeatures, shift: Shift, options: ProbeOptions) -> WordScores:
    """Trains the layer on `train` and measures it on `test`. A label that only `test` has counts as wrong.

    Raises:
        UserError: `train` or `test` has no word with a vector.
    """
    for name, features in (("training", train), ("test", test)):
        if not features.labels:
            raise UserError(f"the {name} data hold no word that can be scored")
    names = sorted(set(train.labels))
    index = {name: i for i, name in enumerate(names)}
    classes = torch.tensor([index[label] for label in train.labels])
    layer = _train(train, shift, classes, len(names), options)
    with torch.no_grad():
        rows = np.array_split(np.arange(len(test.labels)), len(test.labels) // 4096 + 1)
        picks = [layer(_rows(test, shift, part)).argmax(1) for part in rows]
    predicted = [names[i] for i in torch.cat(picks).tolist()]
    majority = names[int(classes.bincount().argmax())]
    return WordScores(
        accuracy=_share_of(predicted, test.labels),
        entity_f1=_entity_f1(predicted, test),
        majority=_share_of([majority] * len(test.labels), test.labels),
        n_words=len(test.labels),
        n_unscored=test.n_unscored,
    )


def _train(
    features: WordFeatures, shift: Shift, classes: torch.Tensor, n_classes: int, options: ProbeOptions
) -> nn.Linear:
    bounds = np.searchsorted(features.sentence, np.arange(features.sentence[-1] + 2))
    sentences = np.flatnonzero(np.diff(bounds))
    order = np.random.default_rng(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    layer = nn.Linear(features.vectors[shift].shape[1], n_classes)
    bound = layer.in_features**-0.5
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=options.lr, weight_decay=0.0)
    left: list[int] = []
    for _ in range(options.max_steps):
        if len(left) < options.sentences_per_step:
            left += order.permutation(sentences).tolist()
        chosen, left = left[: options.sentences_per_step], left[options.sentences_per_step :]
        rows = np.concatenate([np.arange(bounds[s], bounds[s + 1]) for s in chosen])
        vectors = _rows(features, shift, rows)
        kept = torch.rand(vectors.shape, generator=generator) >= options.dropout
        logits = layer(vectors * kept / (1 - options.dropout))
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, classes[rows]).backward()
        optimizer.step()
    return layer


def _rows(features: WordFeatures, shift: Shift, rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(features.vectors[shift][rows], dtype=np.float32))


def _share_of(predicted: Sequence[str], right: Sequence[str]) -> float:
    return float(np.mean(np.asarray(predicted, dtype=object) == np.asarray(right, dtype=object)))


def _entity_f1(predicted: list[str], test: WordFeatures) -> float | None:
    if not any(label.startswith("B-") for label in test.labels):
        return None
    import seqeval.metrics

    cuts = np.flatnonzero(np.diff(test.sentence)) + 1

    def by_sentence(labels: list[str]) -> list[Any]:
        return [part.tolist() for part in np.split(np.asarray(labels, dtype=object), cuts)]

    return float(seqeval.metrics.f1_score(by_sentence(test.labels), by_sentence(predicted)))
