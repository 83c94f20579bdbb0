"""The same steps in plain code with transformers, peft and torch: padding, sdpa, AdamW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from steps.meter import StepMeter
from steps.ours import ADAPTER

Batch = dict[str, torch.Tensor]


def load(auto_class: Any, folder: Path, device: torch.device, attention_dropout: float = 0.0) -> Any:
    """Loads a bidirectional model with sdpa, in bf16 on a GPU, else in fp32."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.is_causal = False
    config.attention_dropout = attention_dropout
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    options = {"config": config, "dtype": dtype, "attn_implementation": "sdpa"}
    model = auto_class.from_pretrained(folder, trust_remote_code=False, **options)
    return model.to(device)


def with_lora(model: Any, *, fp32_adapters: bool, recompute: bool) -> Any:
    """Adds peft's LoRA to all linear layers. With `recompute`, whole layers run again in backward."""
    from peft import LoraConfig, get_peft_model

    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    lora = LoraConfig(
        r=ADAPTER["rank"],
        lora_alpha=ADAPTER["alpha"],
        lora_dropout=ADAPTER["dropout"],
        target_modules="all-linear",
    )
    return get_peft_model(model, lora, autocast_adapter_dtype=fp32_adapters).train()


class PlainRun:
    """A model with its optimizer. `backward` fills the gradients of the next step and returns its loss."""

    def __init__(self, model: nn.Module, backward: Callable[[], torch.Tensor]) -> None:
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-4, weight_decay=0.0)
        self.backward = backward
        self.losses: list[float] = []

    def step(self) -> None:
        loss = self.backward()
        nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())  # once a step, like a loop that logs

    def measured(self, meter: StepMeter) -> dict[str, Any]:
        figures = meter.measure(self.step)
        return {**figures, "first_losses": [round(loss, 4) for loss in self.losses[:3]]}


def mntp_run(
    folder: Path,
    batches: Sequence[Any],
    device: torch.device,
    *,
    fp32_adapters: bool,
    recompute: bool = False,
) -> PlainRun:
    """Makes an MNTP run from packed `batches` with labels. Texts are padded to the longest of their step."""
    from transformers import AutoModelForCausalLM

    model = load(AutoModelForCausalLM, folder, device)
    model = with_lora(model, fp32_adapters=fp32_adapters, recompute=recompute)
    padded = cycle([pad_packed(batch) for batch in batches])

    def backward() -> torch.Tensor:
        batch = {name: x.to(device) for name, x in next(padded).items()}
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return PlainRun(model, backward)


def pad_packed(batch: Any) -> Batch:
    """Returns ids, mask and labels `[texts, longest]` of a packed batch with labels."""
    ends = batch.cu_seqlens.tolist()
    spans = [slice(start, end) for start, end in pairwise(ends)]
    labels = [batch.labels[span] for span in spans]
    made = pad([batch.input_ids[span].tolist() for span in spans])
    return {**made, "labels": nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)}


def pad(texts: Sequence[Sequence[int]]) -> Batch:
    """Returns ids and mask `[texts, longest]`."""
    ids = [torch.tensor(text) for text in texts]
    masks = [torch.ones_like(x) for x in ids]
    join = nn.utils.rnn.pad_sequence
    return {"input_ids": join(ids, batch_first=True), "attention_mask": join(masks, batch_first=True)}


def mean_vectors(trunk: Any, batch: Batch) -> torch.Tensor:
    """Returns the mean of the real tokens' hidden states, `[texts, D]` fp32."""
    hidden = trunk(**batch, use_cache=False).last_hidden_state.float()
    mask = batch["attention_mask"][..., None].float()
    return (hidden * mask).sum(1) / mask.sum(1)


def contrastive_run(
    folder: Path,
    examples: Sequence[Sequence[str]],
    device: torch.device,
    *,
    texts_per_pass: int | None = None,
    scale: float = 50.0,
    attention_dropout: float = 0.0,
) -> PlainRun:
    """Makes a run of SimCSE or supervised steps on one batch.

    Args:
        examples: query, positive and negatives of each.
        texts_per_pass: caches embeddings (GradCache): a pass without a graph for this many texts at a time,
            the loss, and a second pass with the same dropout. None: one pass for all.
    """
    from transformers import AutoModel, AutoTokenizer

    trunk = with_lora(
        load(AutoModel, folder, device, attention_dropout),
        fp32_adapters=device.type != "cuda",
        recompute=False,
    )
    texts = [text for column in zip(*examples, strict=True) for text in column]
    ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(texts)["input_ids"]
    size = texts_per_pass or len(ids)
    batches = [pad(ids[i : i + size]) for i in range(0, len(ids), size)]

    def backward() -> torch.Tensor:
        moved = [{name: x.to(device) for name, x in batch.items()} for batch in batches]
        if len(moved) == 1:
            loss = in_batch_loss(mean_vectors(trunk, moved[0]), len(examples), scale)
            loss.backward()
            return loss.detach()
        return cached_backward(trunk, moved, len(examples), scale)

    return PlainRun(trunk, backward)


def cached_backward(trunk: Any, batches: Sequence[Batch], n_queries: int, scale: float) -> torch.Tensor:
    seeds = torch.randint(2**31, (len(batches),)).tolist()
    with torch.no_grad():
        cached = [seeded_vectors(trunk, batch, seed) for batch, seed in zip(batches, seeds, strict=True)]
    leaves = [vectors.requires_grad_() for vectors in cached]
    loss = in_batch_loss(torch.cat(leaves), n_queries, scale)
    loss.backward()
    for batch, seed, leaf in zip(batches, seeds, leaves, strict=True):
        (seeded_vectors(trunk, batch, seed) * leaf.grad).sum().backward()
    return loss.detach()


def seeded_vectors(trunk: Any, batch: Batch, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return mean_vectors(trunk, batch)


def in_batch_loss(vectors: torch.Tensor, n_queries: int, scale: float) -> torch.Tensor:
    """Computes InfoNCE. The first vectors are queries, then their positives, then hard negatives."""
    unit = F.normalize(vectors, dim=-1)
    scores = scale * unit[:n_queries] @ unit[n_queries:].T
    return F.cross_entropy(scores, torch.arange(n_queries, device=scores.device))


def encoder_of(folder: Path, device: torch.device) -> Callable[[list[str]], Any]:
    """Returns a function from texts to numpy vectors: tokenise, pad, one pass, mean."""
    from transformers import AutoModel, AutoTokenizer

    trunk = load(AutoModel, folder, device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    @torch.no_grad()
    def encode(texts: list[str]) -> Any:
        batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        moved = {name: x.to(device) for name, x in batch.items()}
        return mean_vectors(trunk, moved).cpu().numpy()

    return encode
