"""The public class `Encoder`: turns texts into vectors by a trunk and a pooling."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import nn

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.data.packing import pack, plan_micro_batches
from llm2vec_ds.data.prompts import (
    Prompt,
    Template,
    TokenizedText,
    check_tokenizer,
    drop_words,
    is_text,
    tokenize,
    truncate,
)
from llm2vec_ds.encoder.arguments import check_arguments
from llm2vec_ds.encoder.bad_texts import BadText, BadTexts
from llm2vec_ds.encoder.inference import (
    device_of,
    has_part_in_training,
    is_partitioned,
    kept_memory,
    no_graph,
)
from llm2vec_ds.encoder.of_run import encoder_of
from llm2vec_ds.encoder.passes import HalvedWhereFull, made_ahead, one_ahead, tokens_of_a_pass
from llm2vec_ds.encoder.replicas import Replicas, devices, text_blocks
from llm2vec_ds.encoder.saving import save_trunk
from llm2vec_ds.encoder.settings import EncoderSettings, settings_at
from llm2vec_ds.errors import UserError, writing
from llm2vec_ds.model.adapter_stack import AdapterStack, adapter_state, write_stack
from llm2vec_ds.model.attention import register_for
from llm2vec_ds.model.bidirectional import is_causal
from llm2vec_ds.model.damage import check_ids, check_length, check_vocabulary, why_not_finite
from llm2vec_ds.model.hidden_states import trunk_hidden_states
from llm2vec_ds.model.loading import TrunkOptions, load_tokenizer, load_trunk
from llm2vec_ds.model.peft_adapters import merge_adapters, resolve, tokenizer_place
from llm2vec_ds.model.pooling import POOLINGS
from llm2vec_ds.network import give_up_on_unreachable_hub
from llm2vec_ds.process.progress import Progress
from llm2vec_ds.storage.output_folder import replaced_folder

log = logging.getLogger(__name__)


class Encoder(nn.Module):
    """A decoder-only LLM as text encoder (LLM2Vec, arXiv 2404.05961).

    Examples:
        >>> encoder = Encoder.from_pretrained("path/to/encoder")
        >>> vectors = encoder.encode(["a text", "another"])  # numpy [2, d], fp32
    """

    def __init__(self, trunk: nn.Module, tokenizer: Any, settings: EncoderSettings | None = None) -> None:
        super().__init__()
        check_tokenizer(tokenizer)
        check_vocabulary(tokenizer, trunk)
        self.trunk: Any = trunk
        self.tokenizer = tokenizer
        self.settings = settings or EncoderSettings()
        self.devices = [next(trunk.parameters()).device]
        self._replicas: Replicas[Any] | None = None
        self.run_trunk: Callable[[PackedBatch], torch.Tensor] | None = None
        """Replaces `trunk_hidden_states`, if it is set. A training run sets it."""
        self.stack: AdapterStack | None = None
        """The adapters over a quantised base. `save` writes them beside the merged weights."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Serves pickle. The process that reads the encoder must register attention too."""
        super().__setstate__(state)
        register_for(self.trunk)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        adapters: Sequence[str | Path] = (),
        settings: Mapping[str, Any] | None = None,
        causal: bool | None = None,
        attention: str = "auto",
        precision: str = "auto",
        device: torch.device | str | Sequence[torch.device | str] | None = None,
    ) -> Encoder:
        """Loads an encoder, or any decoder-only LLM, which is then untrained.

        Args:
            path: the folder of an encoder or of a finished run, a transformers folder, or a hub id.
            adapters: folders or hub ids of LoRA adapters, as peft and upstream `llm2vec` save them. They are
                merged in this order. If `path` holds only an adapter, it stands for the model that it names,
                and its adapter comes first.
            settings: changes to the settings of the folder, by the names of `EncoderSettings`.
            causal: whether a token sees only those before it. None keeps what the folder says. An LLM is
                bidirectional unless this is True.
            attention: the backend: `auto`, `triton`, `flash_attn`, `varlen` or `torch`.
            precision: `auto` (bf16 on CUDA, fp32 on a CPU), `fp32` or `bf16`.
            device: one device, or several that share the work of `encode`. None takes every GPU, or under a
                launcher the GPU of this rank. Without a GPU it takes the CPU.

        Raises:
            UserError: there is no such model, its type cannot be made bidirectional, an adapter does not fit,
                or a setting is unknown.
        """
        chosen = devices(device)
        path = encoder_of(os.path.expanduser(path))  # noqa: PTH111  (a hub id stays as it is)
        if not Path(path).exists():
            give_up_on_unreachable_hub()
        stack = resolve(path, adapters)
        trunk = load_trunk(
            stack.base,
            TrunkOptions(causal=causal, attention=attention, precision=precision, device=chosen[0]),
        )
        merge_adapters(trunk, stack.adapters)
        tokenizer = load_tokenizer(tokenizer_place(path))
        encoder = cls(trunk, tokenizer, settings_at(path, stack.adapters, settings or {}))
        encoder.devices = chosen
        return encoder.eval()

    @property
    def device(self) -> torch.device:
        return device_of(self.trunk)

    @property
    def dimensions(self) -> int:
        """Length of a vector."""
        return int(self.trunk.config.get_text_config().hidden_size)

    @property
    def causal(self) -> bool:
        """Whether a token sees only those before it."""
        return bool(is_causal(self.trunk.config))

    def train(self, mode: bool = True) -> Encoder:
        """Sets the mode. Training drops the copies on other devices, because they would keep old weights."""
        if mode:
            self._replicas = None
        return super().train(mode)

    def hidden_states(self, batch: PackedBatch) -> torch.Tensor:
        """Returns the last hidden state of every token, `[T, D]`."""
        return self._hidden_states(self.trunk, batch)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Returns one vector a text, `[S, D]` fp32, not normalised."""
        return self._vectors(self.trunk, batch)

    def _vectors(self, trunk: Any, batch: PackedBatch) -> torch.Tensor:
        if self.settings.pooled_tokens == "all":
            batch = replace(batch, pool_mask=torch.ones_like(batch.pool_mask))
        return POOLINGS[self.settings.pooling](self._hidden_states(trunk, batch), batch)

    def _hidden_states(self, trunk: Any, batch: PackedBatch) -> torch.Tensor:
        if self.run_trunk is None or trunk is not self.trunk:
            return trunk_hidden_states(trunk, batch)
        return self.run_trunk(batch)

    @overload
    def encode(
        self,
        texts: str | Iterable[str],
        *,
        instruction: str | None = ...,
        prompt_name: str | None = ...,
        normalize: bool = ...,
        truncate_dim: int | None = ...,
        micro_batch_tokens: int | None = ...,
        bad_texts: BadTexts = ...,
        show_progress: bool = ...,
        convert_to_tensor: Literal[False] = ...,
    ) -> np.ndarray: ...

    @overload
    def encode(
        self, texts: str | Iterable[str], *, convert_to_tensor: Literal[True], **options: Any
    ) -> torch.Tensor: ...

    def encode(
        self, texts: str | Iterable[str], *, convert_to_tensor: bool = False, **options: Any
    ) -> np.ndarray | torch.Tensor:
        """Turns texts into vectors, in the order of the texts.

        Args:
            texts: any iterable of strings, or one string.
            convert_to_tensor: give a torch tensor on the CPU in place of a numpy array.
            **options: those of `encode_blocks`, such as `instruction` and `normalize`.

        Returns:
            `[N, D]` fp32. For a single string `[D]`.

        Raises:
            UserError: as `encode_blocks`.
        """
        check_arguments(texts, options)
        if isinstance(texts, str):
            vectors = self.encode([texts], **options)[0]
        else:
            width = options.get("truncate_dim") or self.dimensions
            blocks = [np.empty((0, width), dtype=np.float32), *self.encode_blocks(texts, **options)]
            vectors = np.concatenate(blocks)
        return torch.from_numpy(vectors) if convert_to_tensor else vectors

    def encode_blocks(
        self,
        texts: Iterable[str | None],
        *,
        instruction: str | None = None,
        prompt_name: str | None = None,
        normalize: bool = False,
        truncate_dim: int | None = None,
        micro_batch_tokens: int | None = None,
        bad_texts: BadTexts = "raise",
        first_row: int = 0,
        show_progress: bool = False,
    ) -> Iterator[np.ndarray]:
        """Gives the vectors of `encode` block by block. Neither texts nor vectors need to fit in memory.

        A block is at most 4,096 texts or 16 million characters. Texts are packed by length without padding,
        so their order costs nothing. A text longer than `settings.max_tokens` is cut at its end.

        Args:
            texts: any iterable. A bad text is one that is empty or is not a string.
            instruction: goes before each text. The model attends to it, but it is not pooled.
            prompt_name: takes the instruction of this name from `settings.prompts`.
            normalize: scale every vector to length 1, after `truncate_dim`.
            truncate_dim: keep this many dimensions, for an encoder that was trained with `matryoshka_dims`.
            micro_batch_tokens: tokens of one forward pass. At least one text goes through. None takes 4,096
                on a CPU and 32,768 on a GPU. If memory is full, it takes half of that, and so on.
            bad_texts: `raise` stops at a bad text. `nan` names it in the log and gives NaN in its row.
            first_row: number of the first text, for messages.
            show_progress: show a bar, if there is a terminal.

        Yields:
            `[rows, D]` fp32.

        Raises:
            UserError: a text is bad, `prompt_name` is unknown, `truncate_dim` is impossible, or a good text
                gets a vector with NaN or infinity. The message then names the weight that is not finite.
        """
        if bad_texts not in ("raise", "nan"):
            raise UserError(f"bad_texts {bad_texts!r} is unknown: choose raise or nan")
        if truncate_dim is not None and not 0 < truncate_dim <= self.dimensions:
            raise UserError(f"truncate_dim={truncate_dim}: vectors have {self.dimensions} dimensions")
        instruction = self._instruction(instruction, prompt_name)
        total = len(texts) if isinstance(texts, Sized) else None
        with Progress("encode", "text", total=total, shown=show_progress) as bar:

            def tokens(block: tuple[int, list[str | None]]) -> dict[int, TokenizedText]:
                return self._tokenized(block[1], instruction, block[0], bad_texts)

            blocks = text_blocks(texts, first_row)
            for (first, block), tokenized in made_ahead(tokens, blocks, self.device):
                vectors = np.full((len(block), self.dimensions), np.nan, dtype=np.float32)
                for rows, found in self._encode_tokenized(tokenized, micro_batch_tokens):
                    self._check_finite(found, first + rows)
                    vectors[rows] = found
                    bar.update(len(rows))
                vectors = vectors[:, :truncate_dim]
                if normalize:
                    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)
                yield vectors

    def similarity(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Cosine of each row of `first [A, D]` with each row of `second [B, D]`, as `[A, B]` fp32."""
        a, b = (torch.as_tensor(x).float() for x in (first, second))
        cosines: np.ndarray = (
            nn.functional.normalize(a, dim=-1) @ nn.functional.normalize(b, dim=-1).T
        ).numpy()
        return cosines

    def _instruction(self, instruction: str | None, prompt_name: str | None) -> str | None:
        if prompt_name is None:
            return instruction
        if instruction is not None:
            raise UserError("give an instruction or a prompt_name, not both")
        if prompt_name not in self.settings.prompts:
            known = ", ".join(sorted(self.settings.prompts)) or "none"
            raise UserError(f"prompt_name {prompt_name!r} is unknown; this encoder's prompts: {known}")
        return self.settings.prompts[prompt_name]

    def _tokenized(
        self, texts: Sequence[str | None], instruction: str | None, first_row: int, bad_texts: BadTexts
    ) -> dict[int, TokenizedText]:
        """Tokenises a block. Returns a map from row to tokens, without the bad texts."""
        strings = {row: text for row, text in enumerate(texts) if is_text(text)}
        if self.settings.text_span == "upstream" and (most := self.settings.max_text_tokens):
            longest = self.settings.max_tokens
            strings = {r: drop_words(self.tokenizer, text, most, longest) for r, text in strings.items()}
        tokenized = tokenize(
            self.tokenizer,
            [Prompt(instruction, text) for text in strings.values()],
            Template(self.settings.template, self.settings.special_tokens),
            end_with_eos=self.settings.pooling == "eos",
            text_span=self.settings.text_span,
        )
        good = {
            row: truncate(text, self.settings.max_tokens)
            for row, text in zip(strings, tokenized, strict=True)
            if text.pool_start < text.pool_end
        }
        for row, text in enumerate(texts):
            if row not in good:
                what = "is empty" if is_text(text) else "is not text"
                if bad_texts == "raise":
                    raise BadText(first_row + row, what)
                log.warning("text %s (counted from 0) %s: NaN in its place", first_row + row, what)
        return good

    def _check_finite(self, vectors: np.ndarray, rows: np.ndarray) -> None:
        """Refuses a vector with a NaN or an infinity. Its text is good, so the fault is the model's."""
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            row = rows[~finite].min()
            cause = why_not_finite(self.trunk)
            raise UserError(f"text {row} (counted from 0) gets no finite vector: {cause}")

    def _encode_tokenized(
        self, tokenized: dict[int, TokenizedText], micro_batch_tokens: int | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields rows and their vectors, one micro-batch at a time."""
        texts, rows = list(tokenized.values()), np.fromiter(tokenized, dtype=np.int64)
        check_ids(max((max(text.input_ids) for text in texts), default=0), self.trunk)
        lengths = [len(text) for text in texts]
        check_length(max(lengths, default=0), self.trunk)
        budget = tokens_of_a_pass(self.device, micro_batch_tokens)
        groups = plan_micro_batches(lengths, max(budget, *lengths, 0))
        was_training = self.training
        # A part that was added later may be in training mode. `eval` is slow, so it runs only if needed.
        if has_part_in_training(self):
            self.eval()
        if len(self.devices) > 1 and len(groups) > 1 and self._replicas is None:
            self._replicas = Replicas(self.trunk, self.devices)

        def vectors(trunk: Any, group: np.ndarray) -> torch.Tensor:
            device = device_of(trunk)
            # Outside of `no_graph`: layers share what follows from the bounds of the texts, but not if the
            # bounds are a tensor of inference mode.
            batch = pack([texts[i] for i in group]).ready_for(device).to(device)
            with no_graph(trunk):  # the mode holds for one thread, so each replica's thread sets it
                return self._vectors(trunk, batch).float()

        # Under ZeRO-3 all ranks must run equally many passes. So one rank alone must not halve a pass.
        may_halve = micro_batch_tokens is None and not is_partitioned(self.trunk)
        run = HalvedWhereFull(vectors, lengths) if may_halve else vectors
        found = self._replicas.map(run, groups) if self._replicas else (run(self.trunk, g) for g in groups)
        try:
            with kept_memory(self.device, sum(lengths)):
                for group, block in zip(groups, one_ahead(found), strict=True):
                    yield rows[group], block.cpu().numpy()
        finally:
            if was_training:
                self.train()

    def save(
        self,
        folder: str | Path,
        state_dict: dict[str, torch.Tensor] | None = None,
        adapters: dict[str, dict[str, torch.Tensor]] | None = None,
    ) -> None:
        """Writes weights (safetensors), config, tokenizer and settings into a folder.

        The folder appears in one move when it is complete. A kill leaves the old one or the new one. An
        encoder that was written there before is replaced, by its list of files (`llm2vec_ds_files.json`).
        Other files stay.

        Args:
            folder: a new or empty folder, or one with such an encoder.
            state_dict: the trunk's weights, if they differ from the live ones (merged adapters).
            adapters: `adapter_state`, for a trunk whose parameters are not whole here.

        Raises:
            UserError: the folder holds other things, cannot be written, or the disk is full. What is there
                stays.
        """
        folder = Path(folder)
        what = f"encoder {folder}"
        with writing(what), replaced_folder(folder, what) as unfinished:
            self.save_weights(unfinished, state_dict)
            if self.stack is not None:
                write_stack(self.stack, adapters or adapter_state(self.trunk), unfinished)
            self.tokenizer.save_pretrained(unfinished)
            self.settings.write(unfinished)

    def save_weights(self, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Writes only the trunk: weights and config.json."""
        save_trunk(self.trunk, folder, state_dict)
