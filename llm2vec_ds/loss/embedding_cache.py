"""A contrastive batch of any size in the memory of one micro-batch, with the exact gradient.

GradCache (Gao et al., 2021, arXiv 2101.06983): (1) vectors without a graph, micro-batch by micro-batch;
(2) the loss on those vectors gives its gradient with respect to each; (3) each micro-batch again, with a
graph and the same dropout, and backward of the scalar Σ vector · cached gradient. One scalar backward a
micro-batch is what every ZeRO stage supports. A single micro-batch keeps its graph and skips all that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from llm2vec_ds.batch import PackedBatch

Share = torch.Tensor


def vectors_loss_backward(
    forward: Callable[[PackedBatch], torch.Tensor],
    micro_batches: Sequence[PackedBatch],
    seeds: Sequence[int],
    loss_share: Callable[[torch.Tensor], Share],
    backward: Callable[[torch.Tensor, int, bool], None],
    *,
    n_passes: int,
) -> tuple[torch.Tensor, Share]:
    """Runs one step's forward, loss and backward.

    Args:
        forward: packed batch → vectors `[S, D]`.
        micro_batches: this rank's, at least one.
        seeds: one for each pass, `n_passes` of them: dropout's seed.
        loss_share: vectors of all micro-batches, concatenated in order → this rank's share of the loss.
        backward: (scalar, micro-batch number, last) → adds its gradient.
        n_passes: micro-batches that every rank runs; a rank with fewer repeats its first with weight 0.

    Returns:
        The vectors `[N, D]` and the loss share, both detached.
    """
    if n_passes == 1:
        torch.manual_seed(seeds[0])
        vectors = forward(micro_batches[0])
        share = loss_share(vectors)
        backward(share, 0, True)
        return vectors.detach(), share.detach()

    cached = []
    with torch.no_grad():
        for index in range(n_passes):
            torch.manual_seed(seeds[index])
            vectors = forward(micro_batches[index] if index < len(micro_batches) else micro_batches[0])
            if index < len(micro_batches):
                cached.append(vectors)
    leaf = torch.cat(cached).requires_grad_()
    share = loss_share(leaf)
    (gradient,) = torch.autograd.grad(share, leaf)
    gradients = gradient.split([len(vectors) for vectors in cached])
    for index in range(n_passes):
        torch.manual_seed(seeds[index])
        own = index if index < len(micro_batches) else 0
        vectors = forward(micro_batches[own])
        weight = gradients[own] if own == index else torch.zeros_like(gradients[own])
        backward((vectors * weight).sum(), own, index == n_passes - 1)
    return leaf.detach(), share.detach()
