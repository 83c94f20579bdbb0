"""The section of a model card that shows how to load the model, for each tool that reads the format."""

from __future__ import annotations

from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.export.vllm import start_of

PLACE = "FOLDER"
"""Placeholder for the folder. It becomes the hub's repository if that is known and the tool accepts it."""


def how_to_load(encoder: Encoder, format: str, repository: str | None = None) -> str:
    """Returns the section as Markdown.

    Args:
        format: `sentence-transformers`, `transformers`, or the name of an ONNX or GGUF file.
        repository: `owner/name` on the hub.
    """
    if format.endswith((".onnx", ".gguf")):
        how = _onnx(encoder, format) if format.endswith(".onnx") else _gguf(encoder, format)
        fetched = f"```\nhf download {repository} --local-dir {PLACE}\n```\n\n" if repository else ""
        return fetched + how
    how = _transformers(encoder) if format == "transformers" else _sentence_transformers(encoder)
    return how.replace(PLACE, repository or PLACE)


def _onnx(encoder: Encoder, file: str) -> str:
    length = encoder.settings.max_tokens
    return (
        "```python\nimport numpy as np\nimport onnxruntime\nfrom tokenizers import Tokenizer\n\n"
        'tokenizer = Tokenizer.from_file("FOLDER/tokenizer.json")\n'
        f"tokenizer.enable_truncation({length})\ntokenizer.enable_padding()\n"
        f'session = onnxruntime.InferenceSession("FOLDER/{file}")\n'
        'encoded = tokenizer.encode_batch(["a text"])\n'
        'inputs = {"input_ids": np.array([e.ids for e in encoded]), '
        '"attention_mask": np.array([e.attention_mask for e in encoded])}\n'
        '(vectors,) = session.run(["sentence_embedding"], inputs)  # of length 1\n```\n\n'
        "With transformers.js, use `AutoModel.from_pretrained` and take `sentence_embedding` of its output. "
        "With sentence-transformers, use "
        f'`SentenceTransformer("FOLDER", backend="onnx", model_kwargs={{"file_name": "{file}"}})`.'
    )


def _gguf(encoder: Encoder, file: str) -> str:
    length = encoder.settings.max_tokens
    return (
        "This needs llama.cpp of 2026 or later. `/v1/embeddings` follows OpenAI's API, and vectors have "
        "length 1:\n\n"
        f"```\nllama-server -m FOLDER/{file} --embeddings --ubatch-size {length} --flash-attn off\n```"
    )


def _own(encoder: Encoder) -> str:
    return (
        "```python\nfrom llm2vec_ds import Encoder\n\n"
        f'vectors = Encoder.from_pretrained("FOLDER").encode(["a text"]{_named(encoder)}, normalize=True)\n'
        f"```{_prompts(encoder)}"
    )


def _prompts(encoder: Encoder) -> str:
    """Returns what the encoder's prompts say, each in a line, or nothing."""
    rows = [f"- `{name}`: `{text}`" for name, text in encoder.settings.prompts.items()]
    return "\n".join(["", "", "Prompts:", "", *rows]) if rows else ""


def _named(encoder: Encoder) -> str:
    prompt = next(iter(encoder.settings.prompts), None)
    return f', prompt_name="{prompt}"' if prompt else ""


def _transformers(encoder: Encoder) -> str:
    return (
        f"{_own(encoder)}\n\n`AutoModel.from_pretrained` of transformers ≥ 5.2 gives the token vectors "
        "(earlier versions ignore `is_causal` and stay causal)."
    )


def _sentence_transformers(encoder: Encoder) -> str:
    standard = (
        "```python\nfrom sentence_transformers import SentenceTransformer\n\n"
        f'vectors = SentenceTransformer("FOLDER").encode(["a text"]{_named(encoder)}, '
        "normalize_embeddings=True)\n```"
    )
    start = start_of(encoder.trunk.config, encoder.settings.max_tokens)
    lines = ["text-embeddings-router --model-id FOLDER --dtype float16"]
    if start.refusal is None:
        lines.insert(0, f"vllm serve FOLDER --runner pooling{start.line}")
    servers = "Servers (see the limits below):\n\n```\n" + "\n".join(lines) + "\n```"
    return f"{standard}\n\n{servers}\n\n{_transformers(encoder)}"
