"""What upstream `llm2vec` computes on a tiny model with two adapters, kept in tests/fixtures/upstream.

Made (and made anew) so, from the root of a checkout:

    python -m tests.support.upstream build /tmp/upstream-model
    python3 -m venv /tmp/upstream && /tmp/upstream/bin/pip install \
        torch==2.13.0 llm2vec==0.2.3 transformers==4.44.2 peft==0.12.0 accelerate==0.34.2
    /tmp/upstream/bin/python tests/support/upstream.py encode /tmp/upstream-model \
        > tests/fixtures/upstream/vectors.json

`encode` runs under the old versions, so this file imports nothing of the toolkit. Weights are drawn by numpy,
whose generators give the same numbers in every version.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "upstream"
WIDTH, INNER, N_LAYERS, N_HEADS, N_KV_HEADS, VOCABULARY, RANK, ALPHA = 32, 64, 2, 4, 2, 400, 4, 8
CHAT_MODEL = "meta-llama/Llama-2-7b-chat-hf"
"""A name that upstream knows a template for: `[INST] … [/INST]`."""
CHAT_TEMPLATE = "[INST] {instruction} {text} [/INST]"
TEXTS = [
    "bread",
    "the river runs past an old mill",
    "9 trains leave at nine",
    " rain falls",
    "a train to the coast leaves at nine while rain falls on green hills and nobody waits outside",
    "my neighbour repairs clocks, paints doors; grows beans & never sells a single thing he makes",
    " ".join(f"children fish for trout on sundays and bread {i}" for i in range(40)),
]
INSTRUCTIONS = [None, "Given a sentence, find others about the same thing:"]


def linear_shapes() -> dict[str, tuple[int, int]]:
    head_dim = WIDTH // N_HEADS
    shapes = {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (N_KV_HEADS * head_dim, WIDTH),
        "self_attn.v_proj": (N_KV_HEADS * head_dim, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
    }
    return {f"layers.{i}.{name}": shape for i in range(N_LAYERS) for name, shape in shapes.items()}


def draw(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Normal values of deviation 0.2 (norm weights: around 1), each name from a generator of its own."""
    values = {}
    for index, (name, shape) in enumerate(sorted(shapes.items())):
        normal = np.random.default_rng([seed, index]).standard_normal(shape).astype(np.float32) * 0.2
        values[name] = normal + 1 if "norm" in name else normal
    return values


def base_weights() -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linear_shapes().items()}
    norms = [
        f"layers.{i}.{n}" for i in range(N_LAYERS) for n in ("input_layernorm", "post_attention_layernorm")
    ]
    shapes |= {f"{name}.weight": (WIDTH,) for name in [*norms, "norm"]}
    shapes["embed_tokens.weight"] = (VOCABULARY, WIDTH)
    return {f"model.{name}": value for name, value in draw(shapes, 1).items()}


def adapter_weights(seed: int, prefix: str) -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (n_out, n_in) in linear_shapes().items():
        shapes[f"{prefix}{name}.lora_A.weight"] = (RANK, n_in)
        shapes[f"{prefix}{name}.lora_B.weight"] = (n_out, RANK)
    return draw(shapes, seed)


def build(folder: Path) -> None:
    """`base`, `mntp` (adapter beside a config, as upstream publishes it), `chat` (the same), and `task`."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS,
        "num_key_value_heads": N_KV_HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    }
    mark = {"auto_map": {"AutoModel": "modeling_llama_encoder.LlamaEncoderModel"}}
    _model(folder / "base", config)
    _adapter(folder / "mntp", folder / "base", 2, "base_model.model.", {**config, **mark})
    _adapter(
        folder / "chat", folder / "base", 2, "base_model.model.", {**config, "_name_or_path": CHAT_MODEL}
    )
    _adapter(folder / "task", folder / "base", 3, "base_model.model.", None)
    settings = {"pooling_mode": "mean", "max_length": 512, "doc_max_length": 400, "skip_instruction": True}
    (folder / "task" / "llm2vec_config.json").write_text(json.dumps(settings))


def _model(folder: Path, config: dict[str, Any]) -> None:
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(base_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(folder)


def _adapter(folder: Path, base: Path, seed: int, prefix: str, config: dict[str, Any] | None) -> None:
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    lora = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "auto_mapping": {"base_model_class": "LlamaEncoderModel", "parent_library": "elsewhere"},
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "bias": "none",
        "task_type": None,
        "modules_to_save": None,
        "target_modules": sorted({name.rpartition(".")[2] for name in linear_shapes()}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(lora))
    save_file(adapter_weights(seed, prefix), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
        _tokenizer(folder)


def _tokenizer(folder: Path) -> None:
    shutil.copyfile(FIXTURES / "tokenizer.json", folder / "tokenizer.json")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 1024,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def encode(folder: Path) -> dict[str, Any]:
    """Under the old versions: upstream's vectors of every text, by folder, instruction and mask."""
    from importlib.metadata import version

    from llm2vec import LLM2Vec

    rows = []
    for name in ("mntp", "chat"):
        for skip_instruction in (True, False) if name == "mntp" else (True,):
            model = LLM2Vec.from_pretrained(
                str(folder / name),
                peft_model_name_or_path=str(folder / "task"),
                merge_peft=True,
                skip_instruction=skip_instruction,
                attn_implementation="eager",
            )
            for instruction in INSTRUCTIONS:
                pairs = [[instruction or "", text] for text in TEXTS]
                vectors = model.encode(pairs, batch_size=3, show_progress_bar=False)
                rows.append(
                    {
                        "folder": name,
                        "skip_instruction": skip_instruction,
                        "instruction": instruction,
                        "vectors": np.round(np.float64(vectors), 6).tolist(),
                    }
                )
    names = ("llm2vec", "transformers", "peft", "accelerate", "torch", "tokenizers")
    return {"versions": {n: version(n) for n in names}, "rows": rows}


if __name__ == "__main__":
    action, place = sys.argv[1], Path(sys.argv[2])
    if action == "build":
        build(place)
    else:
        print(json.dumps(encode(place)))
