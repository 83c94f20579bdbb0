"""infinity's server, started by the line of docs/serving.md, beside transformers 5."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from tests.support.ports import free_port
from tests.support.served_encoders import (
    SERVED,
    TABLE,
    TEXTS,
    asked,
    check_rows,
    exported,
    lines_of,
    pooling_row,
    tiny_encoder,
)
from tests.support.servers import embedded, serving
from tests.support.serving_environment import clean_environment, version

pytestmark = pytest.mark.slow


def test_poolings_and_instructions(infinity: Path, tmp_path: Path) -> None:
    """One server has all encoders."""
    encoders = [tiny_encoder(kind, windows=kind == "gemma3_text", **settings) for kind, settings in SERVED]
    folders = [exported(encoder, tmp_path / str(i)) for i, encoder in enumerate(encoders)]
    port = free_port()
    line = lines_of("bash infinity").replace("runs/exported", str(folders[0])).replace("7997", str(port))
    others = [word for folder in folders[1:] for word in ("--model-id", str(folder))]
    names = [word for i in range(len(folders)) for word in ("--served-model-name", str(i))]
    environment = clean_environment(
        PATH=f"{infinity}{os.pathsep}{os.environ['PATH']}",
        DO_NOT_TRACK="1",
        INFINITY_ANONYMOUS_USAGE_STATS="0",
    )
    command = [*shlex.split(line), *others, *names, "--no-model-warmup"]
    rows, name = [], f"infinity-emb {version('infinity')}"
    with serving(command, environment, tmp_path / "server.log", port) as address:
        for i, ((kind, _), encoder) in enumerate(zip(SERVED, encoders, strict=True)):
            sent = [*TEXTS, *(asked(encoder, text) for text in TEXTS)]
            rows.append(pooling_row(name, kind, encoder, embedded(f"{address}/embeddings", sent, str(i))))
    for row, (_, settings) in zip(rows, SERVED, strict=True):
        own_tokens = settings.get("pooled_tokens") == "text"
        assert row.count("1 −") == (1 if own_tokens else 2), row
    check_rows(TABLE, f"| {name} |", rows)
