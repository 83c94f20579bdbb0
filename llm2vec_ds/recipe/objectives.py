"""The recipe section of each objective, by `stage`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from llm2vec_ds.recipe.sections import (
    BatchConfig,
    DataConfig,
    Place,
    Positive,
    Section,
    Share,
)


class ObjectiveConfig(Section):
    """The keys and checks that every objective has."""

    reads_pairs: ClassVar[bool] = False
    """Whether its rows are examples of `data.pairs`. Else they are texts."""

    attention_dropout: Share = 0.0
    """Dropout on attention weights."""

    places: ClassVar[tuple[str, ...]] = ()
    """Keys that name a place. They may change on resume, because the content is compared, not the place."""

    def mistake_with(self, stage: str, batch: BatchConfig, data: DataConfig) -> str | None:
        """Returns what in these sections makes the objective useless, or None."""
        return None


def _rates(value: Any) -> Any:
    """Checks a rate or a pair of rates. Pydantic alone would report a mistake once for each type."""
    pair = isinstance(value, list | tuple) and len(value) == 2
    rates = list(value) if pair else [value]
    if not all(isinstance(rate, int | float) and 0 < rate < 1 for rate in rates) or rates != sorted(rates):
        raise ValueError("must be a number between 0 and 1, or two of them as [lowest, highest]")
    return value


MaskRate = Annotated[float | tuple[float, float], BeforeValidator(_rates)]


class MntpConfig(ObjectiveConfig):
    """Masked next token prediction (BehnamGhader et al., 2024, arXiv 2404.05961, section 2)."""

    mask_token: str = "_"
    """The text that replaces a masked token. It must be one token of the tokenizer."""
    mask_rate: MaskRate = 0.2
    """Share of a text's ordinary tokens that are predicted. Or two shares, `[0.1, 0.7]`: each step draws a
    share between them for each text (as masked diffusion does, arXiv 2406.07524)."""
    masking: Literal["bert", "all"] = "bert"
    """`bert`: of the predicted tokens 80 % become the mask token, 10 % a random one, 10 % stay.
    `all`: every one becomes the mask token."""
    head_chunk_tokens: Positive = 1024
    """For how many masked tokens the logits are in memory at once."""

    @property
    def mask_rates(self) -> tuple[float, float]:
        """The lowest and the highest mask rate."""
        rate = self.mask_rate
        return rate if isinstance(rate, tuple) else (rate, rate)


Rounding = Literal["int8", "binary"]


class ContrastiveConfig(ObjectiveConfig):
    """InfoNCE over the global batch: all ranks' queries against all ranks' documents."""

    scale: Annotated[float, Field(gt=0)] = 20.0
    """Factor on cosine similarities, the inverse of the temperature."""
    learn_scale: bool = False
    """True trains the scale. It starts at `scale` and never exceeds 100 (CLIP, arXiv 2103.00020)."""
    symmetric: bool = False
    """True adds the loss of each positive against all ranks' queries. The loss is the mean of both."""
    between_queries: bool = False
    """True makes other queries negatives of a query too, unless known pairs connect both (arXiv
    2308.03281)."""
    between_documents: bool = False
    """True makes other documents negatives of a query's positive too, unless known pairs connect both."""
    matryoshka_dims: list[Positive] | None = None
    """The loss is the mean of one loss for each of these vector lengths (arXiv 2205.13147)."""
    stored_as: list[Rounding] | None = None
    """`int8`, `binary` or both. Each adds a loss to the mean. For it, documents are rounded as `encode
    --store` rounds them, and queries are not (docs/quantization.md)."""
    false_negative_margin: Annotated[float, Field(ge=0)] | None = None
    """A document is no negative for a query if its cosine exceeds the positive's by more than this. null:
    only known positives of the same query, from any row, are left out."""
    hardness: Annotated[float, Field(ge=0)] = 0.0
    """A negative counts exp(hardness · its cosine with the query) times, so hard negatives weigh more (cf.
    arXiv 2010.04592). This factor has no gradient. 0: each counts once."""
    score_precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Vectors are rounded to this before they are multiplied. Normalisation and sums stay fp32. On a GPU,
    `tf32` and `bf16` run on tensor cores, which large batches need (docs/info_nce.md)."""
    exchange: Literal["gather", "ring"] = "gather"
    """How ranks get each other's documents. `gather`: all at once. `ring`: from one rank at a time, so memory
    does not grow with the number of ranks. Both give the same numbers."""
    exchange_precision: Literal["fp32", "bf16"] = "fp32"
    """Document vectors are rounded to this before ranks exchange them. Gradients are sent in fp32."""

    def mistake_with(self, stage: str, batch: BatchConfig, data: DataConfig) -> str | None:
        if batch.global_batch_size == 1 and self.between_queries:
            return (
                f"{stage}.between_queries does nothing with batch.global_batch_size=1: raise the batch size, "
                "or leave it out"
            )
        if batch.global_batch_size > 1 or (data.pairs is not None and data.pairs.max_negatives > 0):
            return None
        return (
            f"batch.global_batch_size=1 leaves the {stage} loss without negatives, so it is always 0: raise "
            "the batch size"
        )


class SimcseConfig(ContrastiveConfig):
    """Unsupervised SimCSE (Gao et al., 2021, arXiv 2104.08821): two dropout passes of a text are a pair."""

    attention_dropout: Share = 0.3
    """Dropout on attention weights. It makes the two passes differ (LLM2Vec: 0.3)."""
    word_dropout: Share = 0.0
    """The share of a text's words that each pass leaves out, at random. It makes the two passes differ more,
    and a step cheaper (cf. token cutoff, arXiv 2105.11741). In scripts without upper and lower case it leaves
    out tokens. 0: none."""


class SupervisedConfig(ContrastiveConfig):
    """Supervised contrastive learning (arXiv 2404.05961, section 4) on queries, positives and negatives."""

    reads_pairs: ClassVar[bool] = True
    places: ClassVar[tuple[str, ...]] = ("guide",)

    scale: Annotated[float, Field(gt=0)] = 50.0
    """Factor on cosine similarities, the inverse of the temperature (LLM2Vec: 50)."""
    guide: Place | None = None
    """Another encoder that decides which negatives count (GISTEmbed, arXiv 2402.16829). It takes the same
    forms as `distil.teacher`. A document is no negative for a query if the guide's cosine of both is above
    `guide_ratio` times that of the query and its positive, minus `guide_margin`. null: all count."""
    guide_query_prompt: str | None = None
    """Goes before each query, for the guide only. An encoder of this toolkit gets it as its instruction."""
    guide_document_prompt: str | None = None
    """The same before each document."""
    guide_margin: Annotated[float, Field(ge=0)] = 0.0
    """Absolute margin of the guide. A larger margin leaves out more negatives."""
    guide_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Relative margin of the guide, such as 0.95. A smaller ratio leaves out more negatives."""
    guide_filters: bool = True
    """False: the guide leaves nothing out. It only teaches, by `guide_weight`."""
    guide_weight: Annotated[float, Field(ge=0)] = 0.0
    """Factor on a second loss (distillation beside InfoNCE). For a query and all documents of the global
    batch, it compares the encoder's cosines with the guide's. 0: no second loss."""
    guide_loss: Literal["kl", "mse"] = "kl"
    """The second loss: `kl`, the divergence of the softmax of both, or `mse`, the mean squared difference."""
    guide_temperature: Annotated[float, Field(gt=0)] = 0.05
    """Cosines are divided by it before the softmax of `kl`."""

    def mistake_with(self, stage: str, batch: BatchConfig, data: DataConfig) -> str | None:
        given = self.model_fields_set & {
            "guide_query_prompt",
            "guide_document_prompt",
            "guide_margin",
            "guide_ratio",
            "guide_filters",
            "guide_weight",
        }
        idle = [
            name for name in sorted(given) if getattr(self, name) != type(self).model_fields[name].default
        ]
        if self.guide is None and idle:
            return f"{stage}.{idle[0]} does nothing without {stage}.guide: set the guide, or leave it out"
        if not self.guide_filters and not self.guide_weight:
            return (
                f"{stage}.guide does nothing without guide_filters and guide_weight: set one, or leave it out"
            )
        if self.guide_weight and self.exchange == "ring":
            return f"{stage}.guide_weight needs all documents at once: set {stage}.exchange: gather"
        return super().mistake_with(stage, batch, data)


Weight = Annotated[float, Field(ge=0)]


class DistilConfig(ObjectiveConfig):
    """Distillation: the encoder learns from another one's vectors of the same texts, without labels."""

    places: ClassVar[tuple[str, ...]] = ("teacher",)

    teacher: Place
    """A sentence-transformers model or an encoder of this toolkit (folder or hub id). Or vectors that
    `llm2vec-ds encode` wrote: a .npy file, or a folder of .npy shards."""
    teacher_prompt: str | None = None
    """Goes before each text, for the teacher only. An encoder of this toolkit gets it as its instruction."""
    teacher_layer: Annotated[int, Field(ge=1)] | None = None
    """Takes the vectors after this layer of the teacher, which is an LLM or an encoder of this toolkit. The
    first layer of an untrained LLM can be a good teacher (docs/results.md). null: the teacher's vectors."""
    teacher_whitening: Share = 0.0
    """Divides each principal direction of the teacher's vectors by its standard deviation to this power. The
    training texts give the directions. 0: the vectors as they are. 1: whitening (arXiv 2103.15316), where all
    directions count the same."""
    vector_loss: Literal["cosine", "mse"] = "cosine"
    """Compares a text's vector with the teacher's. `cosine`: 1 − cosine. `mse`: mean squared difference."""
    vector_weight: Weight = 0.0
    """Factor on the vector loss. 0: no such loss. This is the default, because the similarity loss alone was
    better (docs/log.md)."""
    projection: Literal["linear", "none"] = "linear"
    """`linear` maps the vector to the teacher's length for the vector loss. It is no part of the encoder.
    `none` compares the vector itself, whose components beyond the teacher's length should be 0."""
    similarity_loss: Literal["kl", "mse"] = "kl"
    """For a text and all others of the global batch, it compares the encoder's cosines with the teacher's.
    `kl`: the divergence of the softmax of both, where the teacher's is the target. `mse`: the mean squared
    difference."""
    similarity_weight: Weight = 1.0
    """Factor on the similarity loss. 0: no such loss."""
    temperature: Annotated[float, Field(gt=0)] = 0.05
    """Cosines are divided by it before the softmax of `kl`."""
    simcse_weight: Weight = 0.0
    """Factor on an additional SimCSE loss. Each text then goes through the encoder twice, with
    `attention_dropout` (0.3 in SimCSE) and the adapter's dropout. 0: no such loss."""
    simcse_scale: Annotated[float, Field(gt=0)] = 20.0
    """Factor on the cosines of SimCSE's loss."""

    def mistake_with(self, stage: str, batch: BatchConfig, data: DataConfig) -> str | None:
        if not self.vector_weight and not self.similarity_weight:
            return f"{stage}.vector_weight and {stage}.similarity_weight are both 0: raise one"
        if self.simcse_weight and batch.global_batch_size == 1:
            return (
                f"batch.global_batch_size=1 leaves {stage}.simcse_weight without negatives: raise the batch "
                "size"
            )
        if self.similarity_weight and batch.global_batch_size == 1:
            return (
                "batch.global_batch_size=1 leaves the similarity loss without other texts: raise the batch "
                f"size, or set {stage}.similarity_weight=0"
            )
        if data.long_texts == "split":
            return "data.long_texts: split makes blocks for which the teacher has no vector: use truncate"
        return None


class DistilScoresConfig(ObjectiveConfig):
    """Distillation from scores. A judge, such as a reranker, has scored each query's documents."""

    reads_pairs: ClassVar[bool] = True

    score_column: str = "scores"
    """Column with a list of scores: the positive's first, then the negatives'. `llm2vec-ds score` writes
    it."""
    loss: Literal["kl", "margin_mse"] = "kl"
    """`kl`: the divergence of the softmax over a query's documents, where the judge's is the target.
    `margin_mse`: the squared difference of two margins, the encoder's and the judge's. A margin is the
    positive's score minus the negative's."""
    scale: Annotated[float, Field(gt=0)] = 20.0
    """Factor on the encoder's cosines."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """For `kl`: the judge's scores are divided by it before the softmax."""

    def mistake_with(self, stage: str, batch: BatchConfig, data: DataConfig) -> str | None:
        if data.pairs is None or data.pairs.max_negatives:
            return None
        return f"data.pairs.max_negatives=0 leaves the {stage} loss nothing to compare with: raise it"


SECTIONS: dict[str, type[ObjectiveConfig]] = {
    "mntp": MntpConfig,
    "simcse": SimcseConfig,
    "supervised": SupervisedConfig,
    "distil": DistilConfig,
    "distil_scores": DistilScoresConfig,
}
"""The section by stage. `objectives.registry.register` adds to it."""
