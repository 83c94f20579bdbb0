"""`python -m … FILE N_TOKENS` reads JSON texts from standard input and writes their tokens and vectors to
standard output."""

from __future__ import annotations

import json
import sys
import urllib.request
from typing import Any


def main(file: str, n_tokens: int, texts: list[str]) -> dict[str, Any]:
    """Loads the file into llama.cpp's server and asks it. The server listens on this host only."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.embedding = True
    params.n_ctx = params.n_batch = params.n_ubatch = n_tokens
    params.n_gpu_layers = 0
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = False
    params.verbosity = 0
    server = xllamacpp.Server(params)
    vectors = [_asked(server, text) for text in texts]
    return {"ids": [_ids(server.listening_address, text) for text in texts], "vectors": vectors}


def _asked(server: Any, text: str) -> list[float]:
    answer = server.handle_embeddings({"input": text, "model": "encoder"})
    if "data" not in answer:
        raise SystemExit(str(answer))
    return list(answer["data"][0]["embedding"])


def _ids(address: str, text: str) -> list[int]:
    asked = {"content": text, "add_special": True, "parse_special": True}
    request = urllib.request.Request(
        f"{address}/tokenize", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return list(json.load(answer)["tokens"])


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), json.load(sys.stdin))))
