"""Runs a loss on all vectors of a batch in the activation memory of one micro-batch, with the exact gradient.

The method is GradCache (Gao et al., 2021, arXiv 2101.06983):

1. Each micro-batch runs forward without a graph. Only its vectors are kept.
2. The loss on all vectors gives the gradient with respect to each vector.
3. Each micro-batch runs forward again, with a graph and the same dropout, then backward of the scalar
   Σ vector · cached gradient. By the chain rule this is the gradient of the loss.

Step 3 needs one scalar backward a micro-batch, which every ZeRO stage supports. If there is only one
micro-batch, it keeps its graph and runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from llm2vec_ds.batch import PackedBatch
from llm2vec_ds.encoder.encoder import Encoder

Share = torch.Tensor
LARGEST_SCALE = 100.0
"""A learned scale cannot grow beyond this."""


class ScaledEncoder(nn.Module):
    """Encoder and the loss's scale in one module, which the engine trains.

    `forward` returns the scale, because ZeRO-3 gathers a module's parameters only for its forward pass.
    """

    def __init__(self, encoder: Encoder, scale: float = 1.0, *, learn_scale: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.start_scale = scale
        # scale = start_scale · exp(log_gain). The parameter is near 0, where bf16 (DeepSpeed's dtype on GPUs)
        # has fine steps. At the scale itself, bf16's steps are too coarse.
        self.log_gain = nn.Parameter(torch.zeros(1, device=encoder.device)) if learn_scale else None

    def forward(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns vectors `[S, D]` and the scale, a scalar in fp32."""
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
        micro_batches: this rank's micro-batches, at least one.
        seeds: `n_passes` dropout seeds, one for each pass.
        loss_share: (vectors of all micro-batches in order, scale) → this rank's share of the loss.
        backward: called with (scalar, micro-batch number, last); adds the scalar's gradient.
        n_passes: number of micro-batches that every rank runs. A rank with fewer repeats its first one with
            weight 0.

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
            torch.manual_seed(seeds[index])  # the second pass sets the same seed, so dropout repeats
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
        # Every pass returns the same scale, so its gradient counts once: in the last pass.
        surrogate = (vectors * weight).sum() + scale * (scale_gradient if last else 0.0)
        backward(surrogate, own, last)
    return leaf.detach(), share.detach()
