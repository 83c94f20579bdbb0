"""A contrastive batch of any size in the memory of one micro-batch, with the exact gradient.

GradCache (Gao et al., 2021, arXiv 2101.06983): (1) vectors without a graph, micro-batch by micro-batch;
(2) the loss on those vectors gives its gradient with respect to each; (3) each micro-batch again, with a
graph and the same dropout, and backward of the scalar Σ vector · cached gradient. One scalar backward a
micro-batch is what every ZeRO stage supports. A single micro-batch keeps its graph and skips all that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.encoder.encoder import Encoder
from llm2vec_ds.recipe.objectives import ContrastiveConfig

Share = torch.Tensor
LARGEST_SCALE = 100.0


class ContrastiveModel(nn.Module):
    """Encoder and the loss's scale as one module, as the engine trains them.

    The scale comes out of `forward` so that a learned one is whole when it is used (ZeRO-3 gathers a
    module's parameters for its forward pass).
    """

    def __init__(self, encoder: Encoder, config: ContrastiveConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.start_scale = config.scale
        # A gain rather than the scale itself: near zero, bf16 (DeepSpeed's dtype on GPUs) is fine enough.
        self.log_gain = nn.Parameter(torch.zeros(1, device=encoder.device)) if config.learn_scale else None

    def forward(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors `[S, D]` and the scale, a scalar in fp32."""
        vectors = self.encoder(batch)
        scale = torch.tensor(self.start_scale, device=vectors.device)
        if self.log_gain is not None:
            scale = (scale * self.log_gain[0].float().exp()).clamp(max=LARGEST_SCALE)
        return vectors, scale


def vectors_loss_backward(
    forward: Callable[[PackedBatch], tuple[torch.Tensor, torch.Tensor]],
    micro_batches: Sequence[PackedBatch],
    seeds: Sequence[int],
    loss_share: Callable[[torch.Tensor, torch.Tensor], Share],
    backward: Callable[[torch.Tensor, int, bool], None],
    *,
    n_passes: int,
) -> tuple[torch.Tensor, Share]:
    """Runs one step's forward, loss and backward.

    Args:
        forward: packed batch → vectors `[S, D]` and the scale.
        micro_batches: this rank's, at least one.
        seeds: one for each pass, `n_passes` of them: dropout's seed.
        loss_share: vectors of all micro-batches, concatenated in order, and the scale → this rank's share
            of the loss.
        backward: (scalar, micro-batch number, last) → adds its gradient.
        n_passes: micro-batches that every rank runs; a rank with fewer repeats its first with weight 0.

    Returns:
        The vectors `[N, D]` and the loss share, both detached.
    """
    if n_passes == 1:
        torch.manual_seed(seeds[0])
        vectors, scale = forward(micro_batches[0])
        share = loss_share(vectors, scale)
        backward(share, 0, True)
        return vectors.detach(), share.detach()

    cached = []
    with torch.no_grad():
        for index in range(n_passes):
            torch.manual_seed(seeds[index])
            vectors, scale = forward(micro_batches[index if index < len(micro_batches) else 0])
            if index < len(micro_batches):
                cached.append(vectors)
    leaf, scale_leaf = torch.cat(cached).requires_grad_(), scale.clone().requires_grad_()
    share = loss_share(leaf, scale_leaf)
    gradient, scale_gradient = torch.autograd.grad(share, [leaf, scale_leaf], materialize_grads=True)
    gradients = gradient.split([len(vectors) for vectors in cached])
    for index in range(n_passes):
        torch.manual_seed(seeds[index])
        own = index if index < len(micro_batches) else 0
        last = index == n_passes - 1
        vectors, scale = forward(micro_batches[own])
        weight = gradients[own] if own == index else torch.zeros_like(gradients[own])
        surrogate = (vectors * weight).sum() + scale * (scale_gradient if last else 0.0)
        backward(surrogate, own, last)
    return leaf.detach(), share.detach()
