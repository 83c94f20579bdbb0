"""Loads the trunk of a decoder-only LLM, ready for packed input, and its language head."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from llm2vec_kernels.attention import (
    AttentionBackend,
    choose_attention_backend,
)
from llm2vec_kernels.devices import triton_refusal
from llm2vec_kernels.row_ops.api import runs_on
from torch import nn

from llm2vec_ds.errors import UserError, chain_of
from llm2vec_ds.model.accepted import accepted
from llm2vec_ds.model.attention import attention_needs, register
from llm2vec_ds.model.bidirectional import check_can_be_bidirectional, is_causal
from llm2vec_ds.model.cpu_linear import use_fast_products
from llm2vec_ds.model.damage import damaged_file
from llm2vec_ds.model.fused_layers import fuse_layers
from llm2vec_ds.model.probe.probe import check_head, check_loaded
from llm2vec_ds.model.quantization import (
    adopt_nf4,
    checkpoint_bits,
    nf4_config,
    prepare_for_training,
    whole,
)
from llm2vec_ds.model.rope import choose_rope_by_text
from llm2vec_ds.model.text_part import class_of_whole, text_model_in, with_text_part
from llm2vec_ds.process.full_memory import full_memory

log = logging.getLogger(__name__)

CODE = "auto_map"
"""The key under which the settings of a model or tokenizer name their own code. Code that is not trusted was
not used, so a model that is saved afterwards does not name it either."""
NO_PICKLED_WEIGHTS = (UnpicklingError, EOFError)
"""Errors that torch raises for a pickle of weights that is damaged or holds more than tensors."""


Partition = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True)
class TrunkOptions:
    """Says how a trunk is built.

    Attributes:
        causal: None keeps what the folder says. An LLM is then bidirectional.
        partition: makes a context in which each rank keeps only its part of the weights (ZeRO-3). All ranks
            must load together.
        quantization: None or `nf4`.
        fused_layers: `auto` or `off`.
    """

    causal: bool | None = False
    attention: str = "auto"
    precision: str = "auto"
    attention_dropout: float | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    partition: Partition = nullcontext
    trust_remote_code: bool = False
    quantization: str | None = None
    fused_layers: str = "auto"

    @property
    def dtype(self) -> torch.dtype:
        if self.precision == "auto":
            return torch.bfloat16 if self.device.type == "cuda" else torch.float32
        known = {"fp32": torch.float32, "bf16": torch.bfloat16}
        if self.precision not in known:
            raise UserError(f"precision {self.precision!r} is unknown: choose auto, fp32 or bf16")
        return known[self.precision]


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Any:
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, path, trust_remote_code=trust_remote_code)
    if not trust_remote_code:
        tokenizer.init_kwargs.pop(CODE, None)
    longest = tokenizer.model_max_length
    if not isinstance(longest, int | float):
        raise UserError(f"model {path!r}: its tokenizer says model_max_length={longest!r}: write a number")
    return tokenizer


def load_trunk(path: str, options: TrunkOptions) -> Any:
    """Loads the bare trunk (`LlamaModel` …) in evaluation mode onto `options.device`.

    Raises:
        UserError: there is no such model, or its type cannot be made bidirectional.
    """
    from transformers import AutoModel

    loaded = _load(AutoModel, path, options)
    _prepare(loaded, loaded.trunk, options)
    return loaded.trunk


def load_trunk_and_head(path: str, options: TrunkOptions) -> tuple[Any, nn.Linear]:
    """Loads trunk and language head. The head may be tied to the embeddings.

    Raises:
        UserError: as `load_trunk`. Or the folder holds no head, and the model does not tie one.
    """
    from transformers import AutoModelForCausalLM

    loaded = _load(AutoModelForCausalLM, path, options)
    model, trunk, head = loaded.model, loaded.trunk, loaded.model.get_output_embeddings()
    if trunk is model or not isinstance(head, nn.Linear):
        raise UserError(
            f"{path}: {type(model).__name__} has no linear language head over a trunk, and MNTP needs one"
        )
    check_head(trunk.config, trust_remote_code=options.trust_remote_code)
    _prepare(loaded, nn.ModuleList([trunk, head]), options)
    return trunk, head


@dataclass(frozen=True)
class _Loaded:
    """A loaded model and its trunk. `shown`: a miniature has passed the checks. Else the trunk must pass."""

    model: Any
    trunk: Any
    shown: bool


def _prepare(loaded: _Loaded, kept: nn.Module, options: TrunkOptions) -> None:
    """Checks the trunk, moves it to its device, and puts our layers into it.

    Args:
        kept: the part of the model that is used.
    """
    trunk = loaded.trunk
    if not is_causal(trunk.config):
        check_can_be_bidirectional(trunk)
    choose_rope_by_text(trunk)
    if options.quantization is not None:
        trunk.is_loaded_in_4bit = True  # transformers marks only the outermost model, but peft asks the trunk
        prepare_for_training(kept)
    kept.to(options.device).eval()
    if not loaded.shown:
        check_loaded(trunk, bool(is_causal(trunk.config)))
    _fuse(trunk, options)
    use_fast_products(trunk, options.device)


def _fuse(trunk: nn.Module, options: TrunkOptions) -> None:
    if options.fused_layers == "off":
        log.info("fused layers: off")
        return
    fused = ", ".join(f"{n} {kind}" for kind, n in fuse_layers(trunk).items()) or "none that are known"
    here = "" if runs_on(options.device) else f", but not on this device: {triton_refusal(options.device)}"
    log.info("fused layers: %s%s", fused, here)


def _load(auto_class: Any, path: str, options: TrunkOptions) -> _Loaded:
    from transformers import AutoConfig

    outer = _from_pretrained(AutoConfig, path, trust_remote_code=options.trust_remote_code)
    with loading(path):
        found = accepted(outer, options.causal, trust_remote_code=options.trust_remote_code)
    config, part, causal = found.config, found.part, found.causal
    if options.attention_dropout is not None:
        if not hasattr(config, "attention_dropout"):
            raise UserError(
                f"model type {config.model_type!r} has no attention dropout: set attention_dropout: 0"
            )
        config.attention_dropout = options.attention_dropout
    bits = checkpoint_bits(outer, path, options.quantization)
    backend = _attention_backend(config, causal, options)
    log.info(
        "%s: %s%s attention by %s (%s), %s on %s",
        path,
        f"{options.quantization}, " if options.quantization else "",
        "causal" if causal else "bidirectional",
        backend.name,
        backend.reason,
        str(options.dtype).removeprefix("torch."),
        options.device,
    )
    # A quantised model is read whole by every rank. Under ZeRO-3 it is split afterwards.
    attention = register(options.attention)
    with options.partition() if options.quantization is None and bits is None else nullcontext():
        model, info = _from_pretrained(
            auto_class if part is None else class_of_whole(outer),
            path,
            config=with_text_part(outer, part, config),
            dtype=options.dtype,
            attn_implementation=attention if part is None else {part: attention},
            output_loading_info=True,
            trust_remote_code=options.trust_remote_code,
            **_quantized(options, bits),
        )
    model = _as_wanted(model, path, bits, options)
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{path} lacks weights: {', '.join(missing[:5])}; start from the full language model")
    if not options.trust_remote_code:
        vars(model.config).pop(CODE, None)
    if part is None:
        return _Loaded(model, model.base_model, found.shown)
    log.info("%s: of %s, only the text model %s is used", path, outer.model_type, config.model_type)
    return _Loaded(model, text_model_in(model, config), found.shown)


def _quantized(options: TrunkOptions, bits: int | None) -> dict[str, Any]:
    """Returns what `from_pretrained` needs for 4-bit weights.

    Weights are quantised one by one while they are read. So at most one of them is whole at a time.
    """
    place = {"device_map": {"": options.device}}
    if bits is not None:
        return place
    return {} if options.quantization is None else {"quantization_config": nf4_config(options.dtype), **place}


def _as_wanted(model: Any, path: str, bits: int | None, options: TrunkOptions) -> Any:
    """Converts weights that the checkpoint holds in 4 or 8 bits to what the run wants."""
    if bits is None:
        return model
    if options.quantization is not None:
        log.info("%s: its weights are already in nf4, and stay as they are", path)
        adopt_nf4(model, options.dtype)
        return model
    log.info("%s: its weights are in %s bits, and are dequantised to %s", path, bits, options.dtype)
    return whole(model, options.dtype)


def _attention_backend(config: Any, causal: bool, options: TrunkOptions) -> AttentionBackend:
    """Returns the backend that will run. Refuses an impossible one before any weight is read."""
    try:
        needs = attention_needs(
            config.get_text_config(),
            causal=causal,
            device=options.device,
            dtype=options.dtype,
            dropout_p=options.attention_dropout or 0.0,
        )
        return choose_attention_backend(options.attention, needs)
    except ValueError as error:
        raise UserError(str(error)) from None


def _from_pretrained(auto_class: Any, path: str, *, trust_remote_code: bool, **options: Any) -> Any:
    with loading(path):
        return auto_class.from_pretrained(path, trust_remote_code=trust_remote_code, **options)


@contextmanager
def loading(path: str) -> Iterator[None]:
    """Turns errors of loading the model `path` into a UserError.

    Raises:
        UserError: transformers, torch or safetensors cannot use the files, or a package that reads quantised
            weights is missing. Names cause and fix.
    """
    try:
        yield
    except Exception as error:  # a damaged file can raise errors of every kind
        if isinstance(error, UserError) or full_memory(error) is not None:
            raise
        damaged = damaged_file(Path(path))
        cause = f"{damaged}: get it from its source again" if damaged else _cause(path, error)
        raise UserError(f"model {path!r} cannot be loaded: {cause}") from error


def _cause(path: str, error: BaseException) -> str:
    """Names cause and fix. Reads the whole chain of errors: transformers' error often hides the hub's."""
    from huggingface_hub import errors as hub
    from huggingface_hub import is_offline_mode

    chain = chain_of(error)

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if "trust_remote_code" in str(error):
        return (
            "it needs its own code, and only a recipe (of train, prepare or plan) can allow that: read "
            "the code, then set model.trust_remote_code=true"
        )
    if isinstance(error, NO_PICKLED_WEIGHTS):
        return (
            "its weights are a pickle that is damaged or holds more than tensors, and nothing in it was run: "
            "use a copy of the model with weights in safetensors"
        )
    if caused_by(hub.GatedRepoError):
        page = f"https://huggingface.co/{path}"
        return f"it is gated: accept its terms at {page}, then run `hf auth login` or set HF_TOKEN"
    if caused_by(hub.HFValidationError):
        return "there is no such folder, and a hub id has the form owner/name"
    if caused_by(hub.RepositoryNotFoundError):
        return "there is no such folder, and no such model on the hub (a private one needs `hf auth login`)"
    if caused_by(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError):
        offline = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the hub cannot be reached"
        return f"there is no such folder, and {offline}: give a folder, or connect to the network"
    words = " ".join(str(error).split())[:240]
    if caused_by(OSError, ValueError, RuntimeError, ImportError):
        return words
    return f"{words or 'no reason given'} ({type(error).__name__}): check its config.json and tokenizer files"
