"""Computes a frozen encoder's vector for each word of a sentence."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from llm2vec_ds.data.packing import pack, plan_micro_batches
from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.data.tagged import TaggedSentence
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.encoder.passes import tokens_of_a_pass
from llm2vec_ds.errors import UserError, writing
from llm2vec_ds.model.damage import check_ids, why_not_finite
from llm2vec_ds.process.progress import Progress
from llm2vec_ds.storage.output_folder import replaced_folder

log = logging.getLogger(__name__)

Shift = Literal["same_token", "next_token"]
SHIFTS: tuple[Shift, ...] = ("same_token", "next_token")


@dataclass(frozen=True)
class WordFeatures:
    """Vectors of N words, by shift, with their labels and sentences.

    With `same_token`, a word's vector is the mean over its sub-words' hidden states. With `next_token`, it is
    the mean over the hidden states one token before each sub-word. A next-token objective trains these states
    to predict the sub-word.

    Attributes:
        vectors: by shift `[N, D]` fp32, perhaps memory-mapped.
        labels: `[N]`, the label of each word.
        sentence: `[N]`, the number of each word's sentence, ascending.
        n_unscored: words without vectors. Either the sentence was cut before the word, or the word begins at
            the very first token, which has no token before it. Both shifts leave these words out, so that
            they are measured on the same words.
    """

    vectors: dict[Shift, np.ndarray]
    labels: list[str]
    sentence: np.ndarray
    n_unscored: int


def word_features(
    encoder: Encoder,
    sentences: Sequence[TaggedSentence],
    *,
    micro_batch_tokens: int | None = None,
    cache: Path | None = None,
    progress: bool = False,
) -> WordFeatures:
    """Runs the encoder once over the sentences, or reads the vectors from `cache`.

    Args:
        cache: a folder only for this encoder and these sentences. It is made if it is missing.
    """
    texts, places = zip(*(_tokens_of_words(encoder, s.words) for s in sentences), strict=True)
    scored = [[i for i, tokens in enumerate(words) if tokens] for words in places]
    labels = [s.labels[i] for s, kept in zip(sentences, scored, strict=True) for i in kept]
    sentence = np.repeat(np.arange(len(sentences)), [len(kept) for kept in scored])
    n_unscored = sum(len(s.words) for s in sentences) - len(labels)
    kept_places = [[tokens for tokens in words if tokens] for words in places]
    vectors = _cached(cache)
    if vectors is None:
        vectors = _vectors(encoder, texts, kept_places, micro_batch_tokens, progress)
        if cache is not None:
            vectors = _store(cache, vectors)
    return WordFeatures(vectors, labels, sentence, n_unscored)


def _tokens_of_words(encoder: Encoder, words: Sequence[str]) -> tuple[TokenizedText, list[list[int]]]:
    """Returns the tokenised sentence (words separated by spaces), and the tokens of each word.

    A word's tokens are those with any of its characters, or with only the space before it. A word that cannot
    be scored has no tokens.
    """
    limit = encoder.settings.max_tokens
    encoding: Any = encoder.tokenizer(" ".join(words), return_attention_mask=False, verbose=False)
    n_tokens = len(encoding["input_ids"])
    # Special tokens that the tokenizer adds have no characters (None).
    spans = [encoding[0].token_to_chars(i) or (0, 0) for i in range(n_tokens)]
    places: list[list[int]] = []
    begin, first = 0, 0
    for word in words:
        end = begin + len(word)
        while first < n_tokens and spans[first][1] < begin:
            first += 1
        tokens = []
        for i in range(first, n_tokens):
            start, stop = spans[i]
            if start >= end:
                break
            if stop > start and (stop > begin or start >= begin - 1):
                tokens.append(i)
        scored = tokens and tokens[0] > 0 and tokens[-1] < limit
        places.append(tokens if scored else [])
        begin = end + 1
    input_ids = encoding["input_ids"][:limit]
    return TokenizedText(input_ids, 0, len(input_ids), 0), places


@torch.no_grad()
def _vectors(
    encoder: Encoder,
    texts: Sequence[TokenizedText],
    places: Sequence[Sequence[Sequence[int]]],
    micro_batch_tokens: int | None,
    progress: bool,
) -> dict[Shift, np.ndarray]:
    starts = np.concatenate([[0], np.cumsum([len(words) for words in places])])
    shape = (int(starts[-1]), encoder.dimensions)
    check_ids(max(max(text.input_ids, default=0) for text in texts), encoder.trunk)
    vectors: dict[Shift, np.ndarray] = {shift: np.empty(shape, dtype=np.float32) for shift in SHIFTS}
    was_training = encoder.training
    encoder.eval()
    budget = max(tokens_of_a_pass(encoder.device, micro_batch_tokens), encoder.settings.max_tokens)
    with Progress("words", "sentence", total=len(texts), shown=progress) as bar:
        for group in plan_micro_batches([len(text) for text in texts], budget):
            batch = pack([texts[i] for i in group]).to(encoder.device)
            hidden_TD = encoder.hidden_states(batch).float().cpu()
            if not hidden_TD.isfinite().all():
                raise UserError(f"word vectors are not finite: {why_not_finite(encoder.trunk)}")
            offset = 0
            for i in group:
                of_text = hidden_TD[offset : offset + len(texts[i])]
                for shift in SHIFTS:
                    back = 1 if shift == "next_token" else 0
                    vectors[shift][starts[i] : starts[i + 1]] = _means(of_text, places[i], back)
                offset += len(texts[i])
            bar.update(len(group))
    encoder.train(was_training)
    return vectors


def _means(hidden_TD: torch.Tensor, places: Sequence[Sequence[int]], back: int) -> np.ndarray:
    """Returns the mean over each word's tokens, `back` tokens earlier, `[words, D]`."""
    word = torch.tensor([w for w, tokens in enumerate(places) for _ in tokens], dtype=torch.long)
    token = torch.tensor([t - back for tokens in places for t in tokens], dtype=torch.long)
    sums = torch.zeros(len(places), hidden_TD.shape[1]).index_add_(0, word, hidden_TD[token])
    counts = torch.tensor([[len(tokens)] for tokens in places], dtype=torch.float32).reshape(-1, 1)
    means: np.ndarray = (sums / counts).numpy()
    return means


def _cached(folder: Path | None) -> dict[Shift, np.ndarray] | None:
    if folder is None or not folder.is_dir():
        return None
    log.info("%s: using word vectors of an earlier run", folder)
    return {shift: np.load(folder / f"{shift}.npy", mmap_mode="r") for shift in SHIFTS}


def _store(folder: Path, vectors: dict[Shift, np.ndarray]) -> dict[Shift, np.ndarray]:
    """Stores the vectors. At any moment the folder is complete or absent."""
    what = f"word vectors {folder}"
    with writing(what), replaced_folder(folder, what) as unfinished:
        for shift, rows in vectors.items():
            np.save(unfinished / f"{shift}.npy", rows)
    return vectors
