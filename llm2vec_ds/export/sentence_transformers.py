"""Writes the files that sentence-transformers, vLLM and text-embeddings-inference read besides the trunk.

What each parser needs, as read in its sources in November 2026:

- sentence-transformers 6.2: `modules.json`, `config_sentence_transformers.json`, `pooling_mode` in the
  pooling's config.json (from 5.4 on), module types under their old names as aliases.
- vLLM (`vllm/transformers_utils/config.py`): the pooling module by its type in `modules.json`, `pooling_mode`
  or a true `pooling_mode_*`; `max_seq_length` *and* `do_lower_case` in `sentence_bert_config.json`;
  `is_causal` in config.json (Gemma 3: `use_bidirectional_attention`).
- text-embeddings-inference (`router/src/lib.rs`, `backends/candle/src/models/*.rs`): the booleans
  `pooling_mode_*` in `1_Pooling/config.json`, `max_seq_length`, a `pad_token_id` that is not null, a
  `rope_theta` at the top level (older versions), `use_bidirectional_attention` (Qwen 2: `is_causal`).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2vec_ds.data.prompts import Template, added_ids
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.errors import UserError
from llm2vec_ds.model.bidirectional import has_own_flag
from llm2vec_ds.model.pooling import OF_ONE_TOKEN

POOLING_MODES = {
    "mean": "mean",
    "weighted_mean": "weightedmean",
    "last": "lasttoken",
    "eos": "lasttoken",
    "bos": "cls",
}
LEGACY_POOLING_KEYS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
DEFAULT_PROMPTS = ("document", "text", "default")
"""Names for the prompt of the template's beginning. The first one that no other prompt has is taken."""
INPUT_NAMES = ["input_ids", "attention_mask"]
"""Inputs that the tokenizer returns. Decoders take no token types, but some readers pass on all of them."""


@dataclass(frozen=True)
class Plan:
    """An encoder in sentence-transformers' terms.

    Attributes:
        prompts: for each name, the characters that go before a text.
        default_prompt: name of the prompt before every text, if there is one.
        pooling_mode: sentence-transformers' name of the pooling.
        include_prompt: True if the prompt's tokens are pooled.
        silent_ids: special tokens that are attended to and not pooled.
    """

    prompts: dict[str, str]
    default_prompt: str | None
    pooling_mode: str
    include_prompt: bool
    silent_ids: tuple[int, ...]


def plan(encoder: Encoder) -> Plan:
    """Translates the encoder into sentence-transformers' modules.

    Raises:
        UserError: the modules cannot express it.
    """
    settings = encoder.settings
    template = Template(settings.template, settings.special_tokens)
    before, after = added_ids(encoder.tokenizer)
    _check(encoder, template, before, after)
    prompts = {name: _head(template, instruction) for name, instruction in settings.prompts.items()}
    default = None
    if head := _head(template, None):
        free = (name for name in DEFAULT_PROMPTS if prompts.get(name, head) == head)
        default = next(free, None)
        if default is None:
            raise UserError(
                f"prompts have the names {', '.join(DEFAULT_PROMPTS)}, so none is left for the template's "
                f"beginning {head!r}: rename one of them"
            )
        prompts[default] = head
    pools_all = settings.pooled_tokens == "all" or settings.pooling in OF_ONE_TOKEN
    silent = () if pools_all else tuple(dict.fromkeys(before + after))
    return Plan(prompts, default, POOLING_MODES[settings.pooling], pools_all or not prompts, silent)


def _head(template: Template, instruction: str | None) -> str:
    string, begin, _ = template.render(instruction, "")
    return string[:begin]


def _check(encoder: Encoder, template: Template, before: list[int], after: list[int]) -> None:
    settings, fix = encoder.settings, "use --format transformers"
    if settings.pooling not in POOLING_MODES:
        raise UserError(f"sentence-transformers has no pooling {settings.pooling!r}: {fix}")
    if template.form.partition("{text}")[2]:
        raise UserError(f"sentence-transformers cannot put {settings.template!r} around a text: {fix}")
    if not settings.special_tokens and (before or after):
        raise UserError(f"sentence-transformers cannot leave out the tokenizer's special tokens: {fix}")
    if settings.text_span != "offsets":
        raise UserError(f"sentence-transformers does not support text_span={settings.text_span!r}: {fix}")
    excludes = settings.pooled_tokens == "text" and bool(before or after or settings.prompts)
    if settings.pooling == "weighted_mean" and excludes:
        raise UserError(
            "sentence-transformers weights tokens by their place in the whole input, but this encoder's "
            f"weighted_mean by their place in the text: {fix}, or train with pooled_tokens=all"
        )
    if settings.pooling == "last" and after and settings.pooled_tokens == "text":
        raise UserError(
            "sentence-transformers cannot skip the tokens that this tokenizer adds at the end, as pooling "
            f"`last` would: {fix}"
        )


def write_config(folder: Path, tokenizer: Any, matryoshka_dims: list[int] | None = None) -> None:
    """Adds keys to `config.json`, so that every reader understands the same.

    Args:
        tokenizer: the exported tokenizer.
        matryoshka_dims: vector lengths that the encoder was trained for. vLLM allows only these.
    """
    from transformers import AutoConfig

    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    stored = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    own_flag = has_own_flag(stored)
    # If the model type has its own flag, a second one would shift its sliding window.
    if "is_causal" in config and not own_flag:
        config["use_bidirectional_attention"] = not config["is_causal"]
    if config.get("pad_token_id") is None or config["pad_token_id"] >= stored.get_text_config().vocab_size:
        config["pad_token_id"] = tokenizer.pad_token_id
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
    if matryoshka_dims:
        config["matryoshka_dimensions"] = matryoshka_dims
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def padded_tokenizer(encoder: Encoder) -> Any:
    """Returns a copy of the tokenizer that can pad.

    If it has no padding token, or the model has no embedding for it, it pads with the end-of-sequence token.
    """
    import copy

    padded = copy.deepcopy(encoder.tokenizer)
    n_ids = encoder.trunk.config.get_text_config().vocab_size
    if padded.pad_token_id is None or padded.pad_token_id >= n_ids:
        if padded.eos_token is None:
            raise UserError("the tokenizer has no padding token and no end-of-sequence token: add one")
        padded.pad_token = padded.eos_token
    padded.padding_side = "right"
    padded.model_input_names = INPUT_NAMES
    return padded


def tokenizer_for(encoder: Encoder, prompts: dict[str, str]) -> Any:
    """Returns a tokenizer that gives sentence-transformers the encoder's ids and spans for plain strings.

    sentence-transformers finds a prompt's length by tokenizing it alone. A space at its end would then be a
    token of its own, although it belongs to the first word of the text. So the tokenizer drops this space if
    a string is just a prompt. For `eos` pooling, the tokenizer adds the end-of-sequence token itself.
    """
    from tokenizers import Regex, Tokenizer, normalizers
    from transformers import PreTrainedTokenizerFast

    original = padded_tokenizer(encoder)
    alone = [re.escape(prompt[:-1]) for prompt in dict.fromkeys(prompts.values()) if prompt.endswith(" ")]
    adds_eos = encoder.settings.pooling == "eos" and added_ids(original)[1][-1:] != [original.eos_token_id]
    if not alone and not adds_eos:
        return original
    said = json.loads(original.backend_tokenizer.to_str())
    if adds_eos:
        said["post_processor"] = ends_with(said["post_processor"], original.eos_token, original.eos_token_id)
    backend = Tokenizer.from_str(json.dumps(said))
    if alone:
        cuts = [normalizers.Replace(Regex(rf"(?<=\A{prompt}) \z"), "") for prompt in alone]
        backend.normalizer = normalizers.Sequence([*cuts, *filter(None, [backend.normalizer])])
    tokens = {name: token for name, token in original.special_tokens_map.items() if isinstance(token, str)}
    # Not a model's own tokenizer class: those rebuild normalizer and post-processor, and lose these changes.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="right",
        model_input_names=INPUT_NAMES,
        model_max_length=original.model_max_length,
        **tokens,
    )


def ends_with(post_processor: dict[str, Any] | None, token: str, token_id: int) -> dict[str, Any]:
    """Returns tokenizer.json's post-processor with a token at the end of every text.

    The token goes into the existing template: tokenizers follows only one of two templates in a row.
    """
    end = {"SpecialToken": {"id": token, "type_id": 0}}
    known = {token: {"id": token, "ids": [token_id], "tokens": [token]}}
    if post_processor is None:
        sequence = [{"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B")]
        single = [sequence[0], end]
        return {"type": "TemplateProcessing", "single": single, "pair": sequence, "special_tokens": known}
    if post_processor["type"] == "TemplateProcessing":
        single = [*post_processor["single"], end]
        return {
            **post_processor,
            "single": single,
            "special_tokens": {**post_processor["special_tokens"], **known},
        }
    parts = post_processor["processors"] if post_processor["type"] == "Sequence" else [post_processor]
    others = [part for part in parts if part["type"] != "TemplateProcessing"]
    template = next((part for part in parts if part["type"] == "TemplateProcessing"), None)
    return {"type": "Sequence", "processors": [*others, ends_with(template, token, token_id)]}


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Saves the tokenizer under a class name that transformers 4 also knows."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("is_local", "local_files_only"):  # they describe where it was loaded from
        config.pop(key, None)
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_sentence_transformers(folder: Path, encoder: Encoder, plan: Plan) -> None:
    """Writes modules.json and the files of its modules."""
    modules = [("", "Transformer")]
    if plan.silent_ids:
        modules.append(("1_WordWeights", "WordWeights"))
        _write(folder / "1_WordWeights" / "config.json", _word_weights(encoder.tokenizer, plan.silent_ids))
    modules.append(("1_Pooling", "Pooling"))  # the path that text-embeddings-inference opens
    _write(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
            for i, (path, name) in enumerate(modules)
        ],
    )
    _write(folder / "1_Pooling" / "config.json", _pooling(plan, encoder.dimensions))
    _write(
        folder / "sentence_bert_config.json",
        {"max_seq_length": encoder.settings.max_tokens, "do_lower_case": False},
    )
    _write(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": plan.prompts,
            "default_prompt_name": plan.default_prompt,
            "similarity_fn_name": "cosine",
        },
    )


def _pooling(plan: Plan, dimensions: int) -> dict[str, Any]:
    """Returns the pooling's config in both spellings.

    Servers and sentence-transformers before 5.4 read booleans. Later versions read the name.
    """
    legacy = {key: mode == plan.pooling_mode for mode, key in LEGACY_POOLING_KEYS.items()}
    return {
        "word_embedding_dimension": dimensions,
        **legacy,
        "pooling_mode": plan.pooling_mode,
        "include_prompt": plan.include_prompt,
    }


def _word_weights(tokenizer: Any, silent_ids: tuple[int, ...]) -> dict[str, Any]:
    """Returns weight 0 for the silent tokens and 1 for all others. Only silent tokens need names."""
    names = {i: tokenizer.convert_ids_to_tokens(i) for i in silent_ids}
    return {
        "vocab": [names.get(i, "") for i in range(max(len(tokenizer), *(i + 1 for i in silent_ids)))],
        "word_weights": dict.fromkeys(names.values(), 0.0),
        "unknown_word_weight": 1.0,
    }


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
