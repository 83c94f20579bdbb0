"""Word-level tasks: known answers, the shift, the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from llm2vec_ds import Encoder
from llm2vec_ds.cli.app import app
from llm2vec_ds.data.tagged import TaggedSentence, load_tagged
from llm2vec_ds.errors import UserError
from llm2vec_ds.evaluate.word_features import SHIFTS, WordFeatures, word_features
from llm2vec_ds.evaluate.word_level import ProbeOptions, probe
from llm2vec_ds.evaluate.word_task import WordTask, run_word_task
from tests.support.evaluation_files import TAGS, conllu
from tests.support.tiny import tiny_tokenizer

QUICK = ProbeOptions(max_steps=300, lr=0.05)


def features(path: Path, make: Any) -> WordFeatures:
    """Vectors that `make(label)` gives, in place of an encoder's."""
    sentences = load_tagged(str(path), "upos")
    labels = [label for s in sentences for label in s.labels]
    sentence = np.repeat(np.arange(len(sentences)), [len(s.words) for s in sentences])
    vectors = np.stack([make(label) for label in labels]).astype(np.float32)
    return WordFeatures(dict.fromkeys(SHIFTS, vectors), labels, sentence, 0)


def test_features_that_carry_the_label_are_always_right(tmp_path: Path) -> None:
    files = conllu(tmp_path / "train.conllu", 30), conllu(tmp_path / "test.conllu", 20, seed=1)
    train, test = (features(f, lambda label: np.eye(3)[TAGS.index(label)]) for f in files)
    scores = probe(train, test, "same_token", QUICK)
    assert scores.accuracy == 1.0
    assert scores.n_words == 120
    assert scores.entity_f1 is None


def test_constant_features_give_the_majority_rate(tmp_path: Path) -> None:
    files = conllu(tmp_path / "train.conllu", 30), conllu(tmp_path / "test.conllu", 20, seed=1)
    train, test = (features(f, lambda label: np.ones(3)) for f in files)
    most = max(set(train.labels), key=train.labels.count)
    scores = probe(train, test, "same_token", QUICK)
    assert scores.accuracy == scores.majority == test.labels.count(most) / len(test.labels)


def test_an_unknown_label_is_wrong(tmp_path: Path) -> None:
    train = features(conllu(tmp_path / "a.conllu", 30), lambda label: np.eye(3)[TAGS.index(label)])
    test = features(conllu(tmp_path / "b.conllu", 10), lambda label: np.eye(3)[TAGS.index(label)])
    n_adjectives = test.labels.count("ADJ")
    renamed = ["X" if label == "ADJ" else label for label in test.labels]
    scores = probe(train, WordFeatures(test.vectors, renamed, test.sentence, 0), "same_token", QUICK)
    assert n_adjectives > 0
    assert scores.accuracy == pytest.approx(1 - n_adjectives / len(renamed))


def test_entities_count_whole() -> None:
    """Two of three entities found, one cut short: precision 2/3, recall 2/3; entities end with sentences."""
    labels = ["B-PER", "I-PER", "O", "B-LOC", "B-ORG", "I-ORG", "O"]
    sentence = np.array([0, 0, 0, 0, 1, 1, 1])
    names = sorted(set(labels))
    seen = ["B-PER", "I-PER", "O", "B-LOC", "B-ORG", "O", "O"]
    one_hot = {s: np.stack([np.eye(6)[names.index(x)] for x in labels]).astype(np.float32) for s in SHIFTS}
    seen_hot = {s: np.stack([np.eye(6)[names.index(x)] for x in seen]).astype(np.float32) for s in SHIFTS}
    train = WordFeatures(one_hot, labels, sentence, 0)
    scores = probe(train, WordFeatures(seen_hot, labels, sentence, 0), "same_token", QUICK)
    assert scores.accuracy == pytest.approx(6 / 7)
    assert scores.entity_f1 == pytest.approx(2 / 3)


@pytest.fixture(scope="module")
def encoder(tiny_model_dir: Path) -> Encoder:
    return Encoder.from_pretrained(tiny_model_dir, attention="torch")


SENTENCES = [
    TaggedSentence(["the", "neighbourless", "river"], ["DET", "ADJ", "NOUN"]),
    TaggedSentence(["bread"], ["NOUN"]),
    TaggedSentence(["rain", "falls", ",", "nobody", "waits"], ["NOUN", "VERB", "PUNCT", "PRON", "VERB"]),
]


def test_a_words_vector_is_the_mean_of_its_sub_words_or_of_the_tokens_before(encoder: Encoder) -> None:
    """Against each sentence run alone through the trunk; `<s>` stands before the first word."""
    found = word_features(encoder, SENTENCES)
    row = 0
    for sentence in SENTENCES:
        ids = encoder.tokenizer(" ".join(sentence.words))["input_ids"]
        with torch.no_grad():
            hidden = encoder.trunk(
                input_ids=torch.tensor([ids]),
                position_ids=torch.arange(len(ids))[None],
                use_cache=False,
                cu_seq_lens_q=torch.tensor([0, len(ids)], dtype=torch.int32),
                cu_seq_lens_k=torch.tensor([0, len(ids)], dtype=torch.int32),
                max_length_q=len(ids),
                max_length_k=len(ids),
            ).last_hidden_state[0]
        position = 1
        for i, word in enumerate(sentence.words):
            n = len(encoder.tokenizer((" " if i else "") + word)["input_ids"]) - 1
            same, before = (hidden[position - b : position - b + n].mean(0).numpy() for b in (0, 1))
            np.testing.assert_allclose(found.vectors["same_token"][row], same, atol=1e-5)
            np.testing.assert_allclose(found.vectors["next_token"][row], before, atol=1e-5)
            position += n
            row += 1
        assert position == len(ids)
    assert row == len(found.labels) == 9
    assert found.n_unscored == 0
    assert found.sentence.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2]


def test_a_first_word_with_no_token_before_it_is_left_out(encoder: Encoder) -> None:
    bare = Encoder(encoder.trunk, tiny_tokenizer(bos=False))
    found = word_features(bare, SENTENCES)
    assert found.labels == ["ADJ", "NOUN", "VERB", "PUNCT", "PRON", "VERB"]
    assert found.n_unscored == 3
    assert found.sentence.tolist() == [0, 0, 2, 2, 2, 2]


def test_words_too_far_in_are_left_out(encoder: Encoder) -> None:
    long = TaggedSentence(["river"] * 600, ["NOUN"] * 600)
    found = word_features(encoder, [long])
    assert len(found.labels) + found.n_unscored == 600
    assert 0 < len(found.labels) < 600


def test_vectors_are_kept(encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = word_features(encoder, SENTENCES, cache=tmp_path / "key")
    monkeypatch.setattr(Encoder, "hidden_states", None)
    again = word_features(encoder, SENTENCES, cache=tmp_path / "key")
    for shift in SHIFTS:
        np.testing.assert_array_equal(first.vectors[shift], again.vectors[shift])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["key"]


def test_the_command(tiny_model_dir: Path, tmp_path: Path) -> None:
    files = conllu(tmp_path / "train.conllu", 30), conllu(tmp_path / "test.conllu", 10, seed=1)
    line = ["evaluate", "words", "--model", str(tiny_model_dir), "--output", str(tmp_path / "out")]
    line += ["--train", str(files[0]), "--test", str(files[1]), "--max-steps", "50", "--json"]
    outcome = CliRunner().invoke(app, [*line, "--seed", "1", "--seed", "2"])
    assert outcome.exit_code == 0, outcome.output
    result = json.loads((tmp_path / "out" / "scores.json").read_text())
    for shift in SHIFTS:
        by_seed = result[shift]["accuracy_by_seed"]
        assert len(by_seed) == 2
        assert result[shift]["accuracy"] == pytest.approx(np.mean(by_seed))
        assert 0 < result[shift]["majority"] < 1
    assert len(list((tmp_path / "out" / "features").iterdir())) == 2


def test_another_file_is_another_cache(encoder: Encoder, tiny_model_dir: Path, tmp_path: Path) -> None:
    file = conllu(tmp_path / "a.conllu", 5)
    for n in (5, 6):
        conllu(file, n)
        run_word_task(
            encoder,
            str(tiny_model_dir),
            WordTask(str(file), str(file)),
            [ProbeOptions(max_steps=1)],
            tmp_path / "cache",
        )
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_data_without_a_word_that_can_be_scored(encoder: Encoder, tmp_path: Path) -> None:
    bare = Encoder(encoder.trunk, tiny_tokenizer(bos=False))
    file = tmp_path / "one.conllu"
    file.write_text("1\tbread\t_\tNOUN\t_\t_\t_\t_\t_\t_\n\n")
    with pytest.raises(UserError, match="training data hold no word that can be scored"):
        run_word_task(bare, "m", WordTask(str(file), str(file)), [ProbeOptions(max_steps=1)], None)
    with pytest.raises(UserError, match="no such file"):
        WordTask("no/such.conllu", str(file)).check()
