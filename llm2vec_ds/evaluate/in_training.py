"""Evaluation during training: runs the tasks of a recipe's `evaluation` on the current encoder.

This module imports mteb. Commands import it only when they run.
"""

from __future__ import annotations

from collections.abc import Callable

from mteb.models.model_meta import ModelMeta, ScoringFunction

from llm2vec_ds.distributed import broadcast_object
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.errors import UserError
from llm2vec_ds.evaluate.mteb import MtebEncoder, measure
from llm2vec_ds.evaluate.mteb_tasks import tasks_for
from llm2vec_ds.evaluate.shards import RankEncoder
from llm2vec_ds.evaluate.word_features import SHIFTS, word_features
from llm2vec_ds.evaluate.word_level import ProbeOptions, probe
from llm2vec_ds.evaluate.word_task import WordTask
from llm2vec_ds.recipe.sections import EvaluationConfig, WordsConfig


def in_training_evaluation(config: EvaluationConfig) -> Callable[[Encoder], dict[str, float]]:
    """Reads the data once. Returns a function that measures an encoder, with the same result on every rank.

    Each rank runs all tasks, so that all ranks gather partitioned weights (ZeRO-3) equally often.

    Raises:
        UserError: there is nothing to measure, or the data cannot be read.
    """
    if not config.tasks and config.words is None:
        raise UserError("evaluation measures nothing: set evaluation.tasks or evaluation.words")
    tasks = tasks_for(config.tasks, exclude_self=config.exclude_self) if config.tasks else []
    words = _word_task(config.words) if config.words else None

    meta = ModelMeta.create_empty({"similarity_fn_name": ScoringFunction.COSINE})

    def measured(encoder: Encoder) -> dict[str, float]:
        scores: dict[str, float] = {}
        wrapped = MtebEncoder(RankEncoder(encoder), meta, {})
        for task in tasks:
            scores[task.metadata.name] = measure(wrapped, task, None).value
        if words is not None:
            scores |= words(encoder)
        return broadcast_object(scores)

    return measured


def _word_task(config: WordsConfig) -> Callable[[Encoder], dict[str, float]]:
    task = WordTask(config.train, config.test, config.column, config.max_sentences)
    task.check()
    train, test = task.sentences(task.train), task.sentences(task.test)
    options = ProbeOptions(max_steps=config.max_steps)

    def measured(encoder: Encoder) -> dict[str, float]:
        parts = word_features(encoder, train), word_features(encoder, test)
        return {f"words_{shift}": probe(*parts, shift, options).accuracy for shift in SHIFTS}

    return measured
