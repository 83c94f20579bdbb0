"""A few sentences on known topics, written for this package, and what an encoder makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llm2vec_ds.encoder.encoder import Encoder

TOPICS = {
    "weather": [
        "Rain will reach the coast before noon.",
        "A cold wind blew snow across the road.",
        "It stayed dry and sunny all week.",
        "Thunder woke the whole village last night.",
        "Fog hid the bridge until ten o'clock.",
        "The forecast promises frost by the weekend.",
    ],
    "cooking": [
        "Let the dough rise for two hours.",
        "She fried onions in a little butter.",
        "The soup needs salt and more pepper.",
        "Bake the potatoes until their skins are crisp.",
        "He stirred honey into the warm milk.",
        "Chop the herbs and add them last.",
    ],
    "travel": [
        "Our train left the station ten minutes late.",
        "The ferry crosses to the island twice a day.",
        "They missed the last bus to the airport.",
        "Tickets for the night train are sold out.",
        "We changed planes in Madrid.",
        "The taxi took a longer way to the harbour.",
    ],
    "money": [
        "The bank raised its interest rate again.",
        "He paid back the loan within a year.",
        "Share prices fell after the announcement.",
        "She keeps a tenth of her wages as savings.",
        "The shop gives a refund within two weeks.",
        "Taxes on fuel will rise in January.",
    ],
}
SENTENCES = [sentence for sentences in TOPICS.values() for sentence in sentences]
TOPIC_OF = [topic for topic, sentences in TOPICS.items() for _ in sentences]


@dataclass(frozen=True)
class Examples:
    """An encoder's vectors of `SENTENCES`, as a map and as similarities.

    Attributes:
        places: `[N, 2]`, the vectors (of length 1, centred) on their first two principal axes.
        cosines: `[N, N]`, the cosine of each two sentences.
    """

    places: np.ndarray
    cosines: np.ndarray


def examples_of(encoder: Encoder) -> Examples:
    """Encodes the sentences."""
    vectors = encoder.encode(SENTENCES, normalize=True)
    centred = vectors - vectors.mean(0)
    left, size, _ = np.linalg.svd(centred, full_matrices=False)
    return Examples(left[:, :2] * size[:2], vectors @ vectors.T)
