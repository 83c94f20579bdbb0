"""Merges adapters trained over NF4 into the original weights, and measures how far the vectors move."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.encoder.of_run import encoder_of
from llm2vec_ds.errors import UserError
from llm2vec_ds.evaluate.sts import own_graded_pairs
from llm2vec_ds.export.merged_folder import check_merged_folder, save_merged
from llm2vec_ds.model.adapter_stack import put_stack_in, read_stack
from llm2vec_ds.model.adapters import merged_state_dict
from llm2vec_ds.model.loading import TrunkOptions, load_trunk

N_TEXTS = 64


@dataclass(frozen=True)
class Difference:
    """Cosines between the two encoders' vectors of the same text."""

    mean_cosine: float
    least_cosine: float
    n_texts: int


def merge_into_original(
    folder: Path, output: Path, original: str | None = None, *, overwrite: bool = False
) -> Difference:
    """Writes the encoder of `folder` to `output`. Its adapters go into weights that were never in 4 bits.

    Args:
        folder: a run over NF4, or its `encoder/`.
        original: the base model. None: the one that the folder names.

    Raises:
        UserError: the folder has no adapters of its own, or `output` exists and `overwrite` is false.
    """
    folder = Path(encoder_of(str(folder)))
    stack = read_stack(str(folder), "nf4", None)
    if not stack.earlier:
        raise UserError(
            f"{folder} is a single encoder, and not of a run over NF4: name two or more encoders, or add "
            "--last N to average a run's checkpoints"
        )
    check_merged_folder(output, [folder], overwrite)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = Encoder.from_pretrained(folder, device=device)
    texts = own_graded_pairs().first[:N_TEXTS]
    before = torch.from_numpy(trained.encode(texts, normalize=True))
    tokenizer, settings, causal = trained.tokenizer, trained.settings, trained.causal
    del trained  # so that only one model is in memory at a time
    trunk = load_trunk(original or stack.base, TrunkOptions(causal=causal, device=device))
    put_stack_in(trunk, stack)
    encoder = Encoder(trunk.eval(), tokenizer, settings)
    after = torch.from_numpy(encoder.encode(texts, normalize=True))
    save_merged(encoder, output, merged_state_dict(trunk, in_place=True))
    cosine = (before * after).sum(1)
    return Difference(float(cosine.mean()), float(cosine.min()), len(texts))
