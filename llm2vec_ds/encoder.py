"""The public class: a trunk and its pooling, text in, vectors out."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

from llm2vec_ds import __version__
from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.data.packing import pack, plan_micro_batches
from llm2vec_ds.data.prompts import PLAIN, Prompt, Template, check_tokenizer, tokenize, truncate
from llm2vec_ds.errors import UserError, writing
from llm2vec_ds.model.adapter_stack import AdapterStack, adapter_state, write_stack
from llm2vec_ds.model.adapters import merged_state_dict
from llm2vec_ds.model.bidirectional import is_causal
from llm2vec_ds.model.loading import TrunkOptions, load_tokenizer, load_trunk
from llm2vec_ds.model.pooling import POOLINGS

SETTINGS_FILE = "llm2vec_ds.json"


@dataclass(frozen=True)
class EncoderSettings:
    """What an encoder folder says beside the trunk's own config.json."""

    pooling: str = "mean"
    max_tokens: int = 512
    template: str = PLAIN
    special_tokens: bool = True


class Encoder(nn.Module):
    """A decoder-only LLM as text encoder (LLM2Vec, arXiv 2404.05961).

    >>> encoder = Encoder.from_pretrained("path/to/encoder")
    >>> vectors = encoder.encode(["a text", "another"])      # numpy [2, d], fp32
    """

    def __init__(self, trunk: nn.Module, tokenizer: Any, settings: EncoderSettings | None = None) -> None:
        super().__init__()
        check_tokenizer(tokenizer)
        self.trunk: Any = trunk
        self.tokenizer = tokenizer
        self.settings = settings or EncoderSettings()
        self.stack: AdapterStack | None = None
        """Where adapters over a quantised base come from; `save` writes them beside the merged weights."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        causal: bool | None = None,
        attention: str = "auto",
        precision: str = "auto",
        device: torch.device | str | None = None,
    ) -> Encoder:
        """Loads an encoder folder, or any decoder-only LLM (untrained, bidirectional unless `causal`).

        Args:
            path: a folder that `save` wrote, a transformers folder, or a hub id.
            causal: None keeps what the folder says.
            attention: backend: `auto`, `triton`, `flash_attn`, `varlen` or `torch`.
            precision: `auto` (bf16 on CUDA, fp32 on CPU), `fp32` or `bf16`.
            device: None takes CUDA where there is one.

        Raises:
            UserError: no such model, or a type that cannot be made bidirectional.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        trunk = load_trunk(str(path), TrunkOptions(causal, attention, precision, device=device))
        settings_file = Path(path) / SETTINGS_FILE
        stored = json.loads(settings_file.read_text()) if settings_file.is_file() else {}
        known = {k: v for k, v in stored.items() if k in EncoderSettings.__dataclass_fields__}
        return cls(trunk, load_tokenizer(str(path)), EncoderSettings(**known))

    @property
    def device(self) -> torch.device:
        return next(self.trunk.parameters()).device

    @property
    def causal(self) -> bool:
        """Does a token see only those before it?"""
        return bool(is_causal(self.trunk.config))

    def hidden_states(self, batch: PackedBatch) -> torch.Tensor:
        """Last hidden state of every token, `[T, D]`."""
        output = self.trunk(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            attention_mask=None,
            use_cache=False,
            cu_seq_lens_q=batch.cu_seqlens,
            cu_seq_lens_k=batch.cu_seqlens,
            max_length_q=batch.max_seqlen,
            max_length_k=batch.max_seqlen,
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """One vector a text, `[S, D]` fp32, not normalised."""
        return POOLINGS[self.settings.pooling](self.hidden_states(batch), batch)

    @torch.no_grad()
    def encode(
        self,
        texts: Sequence[str],
        *,
        instruction: str | None = None,
        normalize: bool = False,
        max_tokens_per_micro_batch: int = 4096,
        progress: bool = False,
    ) -> np.ndarray:
        """Vectors of `texts` in their order, `[N, D]` fp32.

        A text longer than `settings.max_tokens` is cut at its end. `instruction` is put before each
        text, attended and not pooled. Texts are packed by length, so the order costs nothing.

        Raises:
            UserError: a text is empty.
        """
        tokenized = [
            truncate(text, self.settings.max_tokens)
            for text in tokenize(
                self.tokenizer,
                [Prompt(instruction, text) for text in texts],
                Template(self.settings.template, self.settings.special_tokens),
                end_with_eos=self.settings.pooling == "eos",
            )
        ]
        empty = [i for i, text in enumerate(tokenized) if text.pool_start == text.pool_end]
        if empty:
            raise UserError(
                f"text {empty[0]} (counted from 0) is empty: remove the {len(empty)} empty text(s)"
            )
        budget = max(max_tokens_per_micro_batch, self.settings.max_tokens)
        groups = plan_micro_batches([len(text) for text in tokenized], budget)
        was_training = self.training
        self.eval()
        vectors = np.empty((len(texts), self.trunk.config.hidden_size), dtype=np.float32)
        with tqdm(total=len(texts), desc="encode", unit="text", disable=None if progress else True) as bar:
            for group in groups:
                batch = pack([tokenized[i] for i in group]).to(self.device)
                vectors[group] = self(batch).float().cpu().numpy()
                bar.update(len(group))
        self.train(was_training)
        if normalize:
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)
        return vectors

    def save(
        self,
        folder: str | Path,
        state_dict: dict[str, torch.Tensor] | None = None,
        adapters: dict[str, dict[str, torch.Tensor]] | None = None,
    ) -> None:
        """Writes trunk (safetensors), config, tokenizer and settings; the folder appears when complete.

        Args:
            state_dict: the trunk's weights where they differ from the live ones (merged adapters).
            adapters: `adapter_state`, for a trunk whose parameters are not whole here.

        Raises:
            UserError: the folder cannot be written, or the disk is full; an older one at its place stays.
        """
        folder = Path(folder)
        unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
        try:
            with writing(f"encoder {folder}"):
                folder.parent.mkdir(parents=True, exist_ok=True)
                self._save_weights(unfinished, state_dict)
                if self.stack is not None:
                    write_stack(self.stack, adapters or adapter_state(self.trunk), unfinished)
                self.tokenizer.save_pretrained(unfinished)
                settings = {**asdict(self.settings), "llm2vec_ds_version": __version__}
                (unfinished / SETTINGS_FILE).write_text(json.dumps(settings, indent=1) + "\n")
                if folder.exists():
                    shutil.rmtree(folder)
                unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _save_weights(self, folder: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
        try:
            if getattr(self.trunk, "is_loaded_in_4bit", False):
                self._save_dequantized(folder, state_dict)
            else:
                self.trunk.save_pretrained(folder, state_dict=state_dict)
        except SafetensorError as error:  # its name for what the system said
            number = re.search(r"os error (\d+)", str(error))
            said = (int(number[1]), os.strerror(int(number[1]))) if number else (str(error),)
            raise OSError(*said) from None

    def _save_dequantized(self, folder: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
        """A plain checkpoint: transformers would write the 4-bit settings into config.json."""
        from huggingface_hub import save_torch_state_dict

        config = type(self.trunk.config).from_dict(self.trunk.config.to_dict())
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.architectures = [type(self.trunk).__name__]
        config.save_pretrained(folder)
        save_torch_state_dict(state_dict or merged_state_dict(self.trunk), folder)
