"""`python -m … FILE MAX_TOKENS` reads JSON batches of texts from standard input and writes their vectors to
standard output.

It reads the exported folder as other people would: without torch, and without any code of this package.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np


def main(file: Path, max_tokens: int, batches: list[list[str]]) -> list[list[float]]:
    """Returns the vectors of all texts of all batches, in order."""
    import onnxruntime
    from tokenizers import Tokenizer

    folder = file.parents[1]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(max_tokens)
    tokenizer.enable_padding(pad_id=json.loads((folder / "config.json").read_text())["pad_token_id"])
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    vectors: list[list[float]] = []
    for batch in batches:
        encoded = tokenizer.encode_batch(batch)
        inputs = {
            "input_ids": np.array([text.ids for text in encoded], dtype=np.int64),
            "attention_mask": np.array([text.attention_mask for text in encoded], dtype=np.int64),
        }
        vectors += session.run(["sentence_embedding"], inputs)[0].tolist()
    return vectors


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), json.load(sys.stdin))))
