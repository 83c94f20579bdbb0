"""Checks before weights are read that a model of a config is bidirectional and keeps packed texts apart.

A miniature of the config is checked. If it fails, the type is refused, and the message says what it did. If
no miniature can be built, the first layers of the model are checked when it is loaded.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from llm2vec_ds.errors import UserError
from llm2vec_ds.model.attention import register
from llm2vec_ds.model.probe.checks import SHORT, TOLERANCE, Check, Differs, hidden_states
from llm2vec_ds.model.probe.first_layers import first_layers
from llm2vec_ds.model.probe.miniature import CannotBuild, Miniature, miniatures
from llm2vec_ds.storage.cache_folder import cache_root
from llm2vec_ds.storage.durable import replace_json
from llm2vec_ds.storage.fingerprint import files_sha256, key_of

log = logging.getLogger(__name__)

VERSION = 1
LOADED_LENGTHS = (5, SHORT, 64)
"""Lengths of the texts for a loaded trunk. None is beyond its limits, which are thousands of tokens away."""
MOST_TRIES = 3
OF_NO_TRUNK = ("_name_or_path", "transformers_version", "architectures", "dtype", "id2label", "label2id")


def check_config(config: Any, causal: bool, *, trust_remote_code: bool = False) -> bool:
    """Checks a miniature of `config`. Returns False if none can be built.

    Args:
        config: the config of the trunk. If the trunk is part of a larger model, only the trunk's own config.

    Raises:
        UserError: the miniature failed a check.
    """
    # Code beside the weights may change at any time, so the answer is not kept.
    if not _is_of_transformers(config):
        return _check_miniature(config, causal, trust_remote_code)
    return _kept("trunk", _checked, config, causal)


def check_head(config: Any, *, trust_remote_code: bool = False) -> None:
    """Checks that the language head is one linear layer over the trunk, apart from a scale or a cap.

    Raises:
        UserError: there is more between trunk and head, as in BERT.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        log.info("model type %s: its head is part of a larger model and is not checked", config.model_type)
    elif _is_of_transformers(config):
        _kept("head", _head_checked, config, True)


def _is_of_transformers(config: Any) -> bool:
    return type(config).__module__.startswith("transformers.")


def _kept(question: str, answer: Callable[[Any, str, bool], bool], config: Any, causal: bool) -> bool:
    """Returns the answer for a config. A file in the cache keeps the answer yes."""
    values = {key: value for key, value in config.to_dict().items() if key not in OF_NO_TRUNK}
    text = json.dumps(values, sort_keys=True, default=str)
    name = f"{_key(question, config, text, causal)}.json"
    if (shown := cache_root() / "probes" / name).is_file():
        return True
    if not answer(type(config), text, causal):
        return False
    with suppress(OSError):  # without the cache the check only takes half a second at each start
        shown.parent.mkdir(parents=True, exist_ok=True)
        replace_json(shown, {"model_type": config.model_type, "causal": causal})
    return True


def _key(question: str, config: Any, text: str, causal: bool) -> str:
    import transformers

    kind = f"{type(config).__module__}.{type(config).__qualname__}"
    versions = torch.__version__, transformers.__version__, _own_code()
    return key_of(question, kind, text, causal, *versions, version=VERSION)


@cache
def _own_code() -> str:
    """Returns a hash of our code that the answer depends on: everything in `model/`, and the attention."""
    import llm2vec_kernels.attention as kernels

    folders = Path(__file__).parents[1], Path(kernels.__file__).parent
    return files_sha256(sorted(file for folder in folders for file in folder.rglob("*.py")))


@cache
def _checked(config_class: Any, text: str, causal: bool) -> bool:
    """Checks each config once in a process. Refusals are raised and not kept."""
    return _check_miniature(config_class.from_dict(json.loads(text)), causal, False)


@cache
@torch.no_grad()
def _head_checked(config_class: Any, text: str, causal: bool) -> bool:
    """Says whether the logits of each token have the same order as the products of the head alone."""
    config = config_class.from_dict(json.loads(text))
    with torch.random.fork_rng(devices=[]), suppress(CannotBuild):
        model = _first_that_runs(config, causal, False)[0].language_model(register())
        ids = torch.arange(3, 3 + SHORT)[None]
        found = model(input_ids=ids, use_cache=False).logits
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        head = model.get_output_embeddings()
        if hidden.shape[-1] != head.in_features or not _same_order(found, head(hidden)):
            raise UserError(
                f"model type {config.model_type!r} has more than a linear language head over its trunk, and "
                "MNTP needs one: start with SimCSE, or use a type such as llama, mistral, qwen3 or gemma"
            )
    return True


def _same_order(found: torch.Tensor, products: torch.Tensor) -> bool:
    steps = found.gather(-1, products.argsort(-1)).diff(dim=-1)
    return bool((steps >= -TOLERANCE * found.abs().max()).all())


def _check_miniature(config: Any, causal: bool, trust_remote_code: bool) -> bool:
    """Does what `check_config` does, without a cache."""
    try:
        with torch.random.fork_rng(devices=[]):  # building draws random numbers, and must not change a run's
            small, trunk = _first_that_runs(config, causal, trust_remote_code)
            Check(trunk).all(causal)
            _check_own_attention(small, trunk)
    except CannotBuild as error:
        log.info("model type %s: no miniature can be built (%s)", config.model_type, error)
        return False
    except Differs as error:
        raise refused(config.model_type, error) from None
    except Exception as error:  # of any kind: the code is not ours
        raise refused(config.model_type, _cannot_run(error)) from error
    return True


def _cannot_run(error: Exception) -> Differs:
    words = " ".join(str(error).split())[:160]
    return Differs(f"its layers cannot run on packed texts ({type(error).__name__}: {words})")


def refused(model_type: str, error: Differs) -> UserError:
    return UserError(
        f"model type {model_type!r} is refused: {error}. Use a type that docs/architectures.md lists as "
        "exact, such as llama, mistral, qwen3 or gemma"
    )


def _first_that_runs(config: Any, causal: bool, trust_remote_code: bool) -> tuple[Miniature, Any]:
    """Returns the first miniature that runs. One that can be built may still have a width that cannot run."""
    wrong: list[Exception] = []
    for small in islice(miniatures(config, causal, trust_remote_code), MOST_TRIES):
        try:
            trunk = small.trunk(causal, register())
            with torch.no_grad():
                hidden_states(trunk, [torch.arange(3, 3 + SHORT)])
        except Exception as error:  # of any kind: the code is not ours
            wrong.append(error)
        else:
            return small, trunk
    raise _cannot_run(wrong[0])


def _check_own_attention(small: Miniature, trunk: Any) -> None:
    """Compares our attention with transformers' own.

    Some attention of transformers does not become bidirectional (chunks). There a causal model is compared.
    """
    try:
        Check(trunk).own_attention()
    except Differs:
        Check(small.trunk(True, register())).own_attention()


def check_loaded(trunk: Any, causal: bool) -> None:
    """Checks the first layers of a loaded trunk, with its own weights and in its own precision.

    Raises:
        UserError: they failed a check, or cannot run.
    """
    log.info("its first layers are checked instead")
    precise = next(trunk.parameters()).dtype == torch.float32
    try:
        with first_layers(trunk):
            Check(trunk, LOADED_LENGTHS, 1e-3 if precise else 5e-2).all(causal)
    except Differs as error:
        raise refused(trunk.config.model_type, error) from None
    except Exception as error:  # of any kind: the code is not ours
        raise refused(trunk.config.model_type, _cannot_run(error)) from error
