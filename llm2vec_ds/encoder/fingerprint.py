"""Identifies an encoder by all that its vectors depend on."""

from __future__ import annotations

from llm2vec_ds.encoder.of_run import encoder_of
from llm2vec_ds.encoder.settings import stored_settings
from llm2vec_ds.model.fingerprint import model_fingerprint
from llm2vec_ds.storage.fingerprint import key_of

FORMAT_VERSION = 1


def encoder_fingerprint(model: str) -> str | None:
    """Returns a key of an encoder's weights and settings. None: its weights are not on this machine.

    Args:
        model: the folder of an encoder, of a run or of an LLM, or a hub id.
    """
    place = encoder_of(model)
    weights = model_fingerprint(place)
    return None if weights is None else key_of(weights, stored_settings(place), version=FORMAT_VERSION)
