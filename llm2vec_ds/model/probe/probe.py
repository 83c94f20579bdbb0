"""Before weights are read: does a model of this config see both ways, and each text for itself?

A miniature of the config shows it, or the type is refused by name with what it did instead. A type of which
no miniature can be made is tried when it is loaded, by its own first layers.
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
"""Of texts for a loaded trunk, whose limits are thousands of tokens away."""
MOST_TRIES = 3
OF_NO_TRUNK = ("_name_or_path", "transformers_version", "architectures", "dtype", "id2label", "label2id")


def check_config(config: Any, causal: bool, *, trust_remote_code: bool = False) -> bool:
    """Whether a miniature of `config` showed what `checks` ask for; False: none can be built.

    Args:
        config: of the trunk, of the text model alone where it is part of another.

    Raises:
        UserError: it showed something else.
    """
    if not _is_of_transformers(config):  # code beside the weights, of any version
        return _check_miniature(config, causal, trust_remote_code)
    return _kept("trunk", _checked, config, causal)


def check_head(config: Any, *, trust_remote_code: bool = False) -> None:
    """The language head of such a model is one linear layer over the trunk, but for a scale or a cap.

    Raises:
        UserError: there is more between them, as in BERT.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        log.info("model type %s: its head is part of a larger model and is not tried", config.model_type)
    elif _is_of_transformers(config):
        _kept("head", _head_checked, config, True)


def _is_of_transformers(config: Any) -> bool:
    return type(config).__module__.startswith("transformers.")


def _kept(question: str, answer: Callable[[Any, str, bool], bool], config: Any, causal: bool) -> bool:
    """The answer for a config; once it was yes, a file of the cache says so."""
    values = {key: value for key, value in config.to_dict().items() if key not in OF_NO_TRUNK}
    text = json.dumps(values, sort_keys=True, default=str)
    name = f"{_key(question, config, text, causal)}.json"
    if (shown := cache_root() / "probes" / name).is_file():
        return True
    if not answer(type(config), text, causal):
        return False
    with suppress(OSError):  # a cache that cannot be written costs half a second at each start
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
    """Of everything that a miniature's answer depends on here: this folder's siblings, and the attention."""
    import llm2vec_kernels.attention as kernels

    folders = Path(__file__).parents[1], Path(kernels.__file__).parent
    return files_sha256(sorted(file for folder in folders for file in folder.rglob("*.py")))


@cache
def _checked(config_class: Any, text: str, causal: bool) -> bool:
    """Once a process for each config. Refusals are raised and not kept."""
    return _check_miniature(config_class.from_dict(json.loads(text)), causal, False)


@cache
@torch.no_grad()
def _head_checked(config_class: Any, text: str, causal: bool) -> bool:
    """Whether logits stand in the order of the head's own products, token by token."""
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
    """As `check_config`, without a cache."""
    try:
        with torch.random.fork_rng(devices=[]):  # building draws numbers, and a run's are no part of it
            small, trunk = _first_that_runs(config, causal, trust_remote_code)
            Check(trunk).all(causal)
            _check_own_attention(small, trunk)
    except CannotBuild as error:
        log.info("model type %s: no miniature can be built (%s)", config.model_type, error)
        return False
    except Differs as error:
        raise refused(config.model_type, error) from None
    except Exception as error:  # of any kind: it is another's code
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
    """A width at which it can be built may still be one at which it cannot run."""
    wrong: list[Exception] = []
    for small in islice(miniatures(config, causal, trust_remote_code), MOST_TRIES):
        try:
            trunk = small.trunk(causal, register())
            with torch.no_grad():
                hidden_states(trunk, [torch.arange(3, 3 + SHORT)])
        except Exception as error:  # of any kind: it is another's code
            wrong.append(error)
        else:
            return small, trunk
    raise _cannot_run(wrong[0])


def _check_own_attention(small: Miniature, trunk: Any) -> None:
    """Where transformers' own attention does not become bidirectional (chunks), as a causal model."""
    try:
        Check(trunk).own_attention()
    except Differs:
        Check(small.trunk(True, register())).own_attention()


def check_loaded(trunk: Any, causal: bool) -> None:
    """By the first layers of a trunk, with its own weights, in its own precision.

    Raises:
        UserError: they showed something else, or cannot be tried.
    """
    log.info("its first layers are tried instead")
    precise = next(trunk.parameters()).dtype == torch.float32
    try:
        with first_layers(trunk):
            Check(trunk, LOADED_LENGTHS, 1e-3 if precise else 5e-2).all(causal)
    except Differs as error:
        raise refused(trunk.config.model_type, error) from None
    except Exception as error:  # of any kind: it is another's code
        raise refused(trunk.config.model_type, _cannot_run(error)) from error
