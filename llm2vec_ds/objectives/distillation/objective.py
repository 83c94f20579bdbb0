"""Distillation: the encoder learns a teacher's vector of each text, and the cosines between texts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.data.batches import EpochBatches, rank_slice
from llm2vec_ds.data.packing import pack, plan_micro_batches
from llm2vec_ds.data.pairs import PreparedPairs
from llm2vec_ds.data.prepare import PreparedTexts
from llm2vec_ds.data.prompts import TokenizedText
from llm2vec_ds.distributed import all_reduce_sum, rank, world_size
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.errors import UserError
from llm2vec_ds.objectives.base import (
    Backward,
    Forward,
    Objective,
    Parts,
    PlannedWork,
    Rows,
    StepResult,
    dropout_seed,
    equal_count,
)
from llm2vec_ds.objectives.distillation.contrast import Contrast
from llm2vec_ds.objectives.distillation.loss import DistillationLoss
from llm2vec_ds.objectives.distillation.teacher import prepare_teacher, section_of, teacher_folder
from llm2vec_ds.objectives.embedding_cache import vectors_loss_backward
from llm2vec_ds.objectives.spread import are_alike, spread
from llm2vec_ds.objectives.teacher_vectors import TeacherVectors
from llm2vec_ds.objectives.whitening import Whitening
from llm2vec_ds.recipe.objectives import DistilConfig
from llm2vec_ds.recipe.recipe import Recipe

log = logging.getLogger(__name__)


class Distillation(Objective):
    """Trains the encoder on a teacher's vectors of the same texts."""

    section = DistilConfig

    def prepare(self, recipe: Recipe) -> None:
        for path in (recipe.data.path, recipe.data.held_out_path):
            if path is not None:
                prepare_teacher(recipe, path)

    def data_fingerprint(self, recipe: Recipe, training: Rows) -> str:
        teacher = TeacherVectors(teacher_folder(recipe, recipe.data.path))
        return f"{training.fingerprint}-{teacher.fingerprint[:16]}"

    def build(self, parts: Parts) -> DistillationStage:
        """See `Objective.build`.

        Raises:
            UserError: also if a text has no teacher vector, or if the widths do not match.
        """
        recipe, data = parts.recipe, parts.recipe.data
        assert isinstance(parts.training, PreparedTexts)
        assert not isinstance(parts.held_out, PreparedPairs)
        teacher = TeacherVectors(teacher_folder(recipe, data.path))
        whitening = None
        if power := section_of(recipe).teacher_whitening:
            whitening = Whitening.of(finite(teacher.blocks()), power)
            log.info("distil.teacher: vectors whitened to the power %g, by the training texts", power)
        training, held_out = TaughtTexts(parts.training, teacher, whitening, "data.path"), None
        if parts.held_out is not None and data.held_out_path is not None:
            if section_of(recipe).similarity_weight and len(parts.held_out) < 2:
                raise UserError("data.held_out_path has one text, and no other to compare it with: add some")
            teacher = TeacherVectors(teacher_folder(recipe, data.held_out_path))
            held_out = TaughtTexts(parts.held_out, teacher, whitening, "data.held_out_path")
        model = DistillationModel(parts.encoder, section_of(recipe), training.teacher.width, recipe.seed)
        return DistillationStage(
            model, training, held_out, recipe, self.data_fingerprint(recipe, parts.training)
        )

    def planned_work(self, recipe: Recipe) -> PlannedWork:
        """Leaves out the projection: its size is unknown until the teacher's vectors exist."""
        n_copies = Contrast(section_of(recipe)).n_copies
        return PlannedWork(texts_per_row=n_copies, embedding_cache=True, documents_per_row=1)


class DistillationModel(nn.Module):
    """Encoder and projection in one module, which the engine trains."""

    def __init__(self, encoder: Encoder, config: DistilConfig, teacher_width: int, seed: int) -> None:
        """Raises UserError if there is no projection and the encoder's vectors are too short."""
        super().__init__()
        self.encoder = encoder
        self.projection: nn.Linear | None = None
        if config.vector_weight and config.projection == "linear":
            self.projection = nn.Linear(encoder.dimensions, teacher_width, bias=False, device=encoder.device)
            # The seed gives all ranks the same start. An orthogonal one keeps the encoder's cosines, if the
            # teacher is at least as wide.
            start = torch.empty(self.projection.weight.shape)
            nn.init.orthogonal_(start, generator=torch.Generator().manual_seed(seed))
            self.projection.weight.data.copy_(start)
        elif config.vector_weight and encoder.dimensions < teacher_width:
            raise UserError(
                f"distil.projection: none cannot compare {encoder.dimensions} components with the teacher's "
                f"{teacher_width}: use linear"
            )

    def forward(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns each text's vector and its projection, `[S, D + T]` fp32 (`[S, D]` without a projection).

        The second result is the number 1. Contrastive models return their scale there.
        """
        vectors = self.encoder(batch)
        one = torch.ones((), device=vectors.device)
        if self.projection is None:
            return vectors, one
        projected = self.projection(vectors.to(self.projection.weight.dtype))
        return torch.cat([vectors, projected.float()], dim=-1), one


@dataclass(frozen=True)
class TaughtTexts:
    """Texts with the teacher's vectors. `key` is the recipe key that names the texts."""

    texts: PreparedTexts
    teacher: TeacherVectors
    whitening: Whitening | None
    key: str

    def __post_init__(self) -> None:
        """Raises UserError if a text has no vector."""
        hashes = self.texts.rows.data.column("text_hash").to_numpy()
        known = self.teacher.known(hashes)
        if not known.all():
            raise UserError(
                f"distil.teacher has no vector for {np.count_nonzero(~known)} of the {len(known)} texts of "
                f"{self.key} (the first is text {int(np.argmin(known))}, counted from 0): encode these texts "
                "with the teacher, or set distil.teacher to a model"
            )

    def __len__(self) -> int:
        return len(self.texts)

    def vectors(self, hashes: np.ndarray) -> torch.Tensor:
        """Returns what is learnt from the teacher for these texts, `[N, T]` fp32."""
        (found,) = finite([self.teacher[hashes].numpy()])
        vectors = torch.from_numpy(found)
        return vectors if self.whitening is None else self.whitening(vectors)


def finite(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields the blocks of the teacher's vectors. Raises UserError at one with a NaN or an infinity."""
    for block in blocks:
        if not np.isfinite(block).all():
            raise UserError("distil.teacher holds a NaN or an infinity: encode its texts again")
        yield block


class PackedTexts:
    """Texts, once or twice each, as packed micro-batches on the CPU, with the teacher's vectors.

    Attributes:
        groups: for each micro-batch, the numbers of its copies. The first copies of all texts are counted
            before the second copies.
        teacher: the teacher's vectors, `[texts, T]`.
        ids: int64 `[texts]`. Equal texts have equal ids on every rank.
    """

    def __init__(
        self, source: TaughtTexts, rows: np.ndarray, max_tokens: int, device: torch.device, n_copies: int = 1
    ) -> None:
        own = source.texts[rows]
        texts = own * n_copies
        self.rows, self.n_texts = rows, len(own)
        self.groups = plan_micro_batches([len(text) for text in texts], max_tokens)
        self.batches = [pack([texts[i] for i in group]).ready_for(device) for group in self.groups]
        self._place = torch.from_numpy(np.argsort(np.concatenate(self.groups)))
        hashes = np.array([text.text_hash for text in own], dtype=np.int64)
        self.ids, self.teacher = torch.from_numpy(hashes), source.vectors(hashes)
        self.n_distinct = len(np.unique(hashes))

    def copies(self, found: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns `[texts, …]` for each copy, from `found`: the rows of all micro-batches in order."""
        return found[self._place.to(found.device)].split(self.n_texts)

    def rows_of(self, group: int) -> list[int]:
        """Returns the rows whose texts are in a micro-batch."""
        found: list[int] = self.rows[np.unique(self.groups[group] % self.n_texts)].tolist()
        return found


class DistillationStage:
    """Trains on the `DistillationLoss` of the global batch, plus SimCSE if the recipe asks for it."""

    def __init__(
        self,
        model: DistillationModel,
        training: TaughtTexts,
        held_out_texts: TaughtTexts | None,
        recipe: Recipe,
        data_fingerprint: str,
    ) -> None:
        self.model, self.encoder = model, model.encoder
        self.training, self.held_out_texts = training, held_out_texts
        self.data_fingerprint = data_fingerprint
        self.seed, self.micro_batch_tokens = recipe.seed, recipe.batch.micro_batch_tokens
        self.global_batch = EpochBatches(len(training), recipe.batch.global_batch_size, recipe.seed)
        self.loss = DistillationLoss(section_of(recipe))
        self.contrast = Contrast(section_of(recipe))

    def text(self, row: int) -> TokenizedText:
        (text,) = self.training.texts[[row]]
        return text

    def batches(self, step: int, rows: np.ndarray) -> PackedTexts:
        return PackedTexts(
            self.training, rows, self.micro_batch_tokens, self.encoder.device, self.contrast.n_copies
        )

    def sample_batch(self, texts: Sequence[TokenizedText]) -> PackedBatch:
        return pack(texts)

    def step(
        self, step: int, rows: np.ndarray, batches: PackedTexts, forward: Forward, backward: Backward
    ) -> StepResult:
        device, packed = self.encoder.device, batches
        n_passes, n_global = equal_count(packed.groups, device), self._n_global(packed)
        parts = torch.zeros(3, device=device)

        def loss_share(found: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            copies = packed.copies(found)
            shares = self._shares(copies[0], packed, n_global)
            contrast = self.contrast([copy[:, : self.encoder.dimensions] for copy in copies], packed.ids)
            parts.copy_(torch.cat([shares, contrast[None]]).detach())
            share: torch.Tensor = self.loss.weighted(*shares.unbind()) + self.contrast.weight * contrast
            return share

        found, _ = vectors_loss_backward(
            forward,
            [batch.to(device) for batch in packed.batches],
            [dropout_seed(self.seed, step, rank(), index) for index in range(n_passes)],
            loss_share,
            lambda scalar, index, last: backward(scalar, rows=packed.rows_of(index), last=last),
            n_passes=n_passes,
        )
        copies = [copy[:, : self.encoder.dimensions] for copy in packed.copies(found)]
        sums = all_reduce_sum(torch.cat([parts, spread(copies[0], packed.n_distinct)]))
        vector, similarity, contrast, *distance = sums.tolist()

        def bad_rows() -> list[int]:
            bad = ~torch.stack(copies).isfinite().all(-1).all(0).cpu().numpy()
            found_rows: list[int] = rows[bad].tolist()
            return found_rows

        own = {"simcse_loss": contrast} if self.contrast.weight else {}
        return StepResult(
            loss=self.loss.weighted(vector, similarity) + self.contrast.weight * contrast,
            n_tokens=sum(batch.n_tokens for batch in packed.batches),
            metrics={"vector_loss": vector, "similarity_loss": similarity, **own},
            bad_rows=bad_rows,
            vectors_alike=are_alike(*distance),
        )

    @torch.no_grad()
    def held_out(self, forward: Forward) -> dict[str, float] | None:
        """Returns the losses of all held-out texts, taken as one batch."""
        if self.held_out_texts is None:
            return None
        rows = rank_slice(np.arange(len(self.held_out_texts)), rank(), world_size())
        packed = PackedTexts(self.held_out_texts, rows, self.micro_batch_tokens, self.encoder.device)
        device, found = self.encoder.device, []
        for index in range(equal_count(packed.groups, device)):
            own = index < len(packed.groups)
            vectors, _ = forward(packed.batches[index if own else 0].to(device))
            found += [vectors] if own else []
        (own_vectors,) = packed.copies(torch.cat(found))
        shares = self._shares(own_vectors, packed, self._n_global(packed))
        vector, similarity = all_reduce_sum(shares).tolist()
        loss = self.loss.weighted(vector, similarity)
        return {"loss": loss, "vector_loss": vector, "similarity_loss": similarity}

    def _n_global(self, packed: PackedTexts) -> torch.Tensor:
        return all_reduce_sum(torch.tensor(float(packed.n_texts), device=self.encoder.device))

    def _shares(self, found: torch.Tensor, packed: PackedTexts, n_global: torch.Tensor) -> torch.Tensor:
        """Returns this rank's share of both losses, from the model's output for each text."""
        width, teacher = self.encoder.dimensions, packed.teacher.to(found.device)
        if self.model.projection is not None:
            return self.loss(found[:, :width], found[:, width:], teacher, n_global)
        missing = max(0, width - teacher.shape[1])
        return self.loss(found, found, F.pad(teacher, (0, missing)), n_global)
