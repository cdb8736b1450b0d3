"""Muon: momentum, made orthogonal, for the matrices of the blocks; AdamW for all else, as one optimizer."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
import torch.distributed as dist

MOMENTUM = 0.95


class Muon(torch.optim.AdamW):
    """AdamW, but for the groups that have `parts`: their matrices M, (rows, columns), go by Muon (Jordan et al., 2024,
    "Muon: An optimizer for hidden layers in neural networks", kellerjordan.github.io/posts/muon),

        B ← μ·B + (1 - μ)·G            momentum, μ = 0.95
        O ← orthogonalize(μ·B + (1 - μ)·G)        Nesterov's
        M ← (1 - lr·decay)·M - lr·0.2·√max(rows, columns)·O

    where the last factor gives every update AdamW's size, an RMS of 0.2·lr (Liu et al., 2025, "Muon is scalable for LLM
    training", section 2.2), so that the two share a learning rate: lr is the group's `lr` times `ratio`. A matrix of
    several `parts`, rows under rows, is as many matrices.

    Matrices of one shape, or of one shape and its transpose, are orthogonalised together, in `dtype`. Between processes
    (torch.distributed) they are shared out: each does its part, then all have the same result. The momentum is whole in
    each of them: a state goes on with another number of processes.
    """

    def __init__(self, groups: list[dict], dtype: torch.dtype, **options):
        super().__init__(groups, **options)
        self.dtype = dtype
        self._step_supports_amp_scaling = False  # AdamW's kernel can skip a step; here the scaler has to

    def __setstate__(self, state: dict) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # Adam's asks the state of each parameter for a count of steps

    @torch.no_grad()
    def step(self) -> None:
        batches = defaultdict(list)  # by shape: what is to be orthogonalised, and where it goes
        for group in self.param_groups:
            if "parts" not in group:
                continue
            lr = group["lr"] * group["ratio"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
                p.grad.lerp_(state["momentum"], MOMENTUM)
                p.mul_(1 - lr * group["weight_decay"])
                for M, G in zip(p.chunk(group["parts"]), p.grad.chunk(group["parts"]), strict=True):
                    if M.size(0) > M.size(1):
                        M, G = M.mT, G.mT
                    batches[M.shape].append((M, G, lr * 0.2 * math.sqrt(M.size(1))))
        for batch in batches.values():
            matrices, gradients, rates = zip(*batch, strict=True)
            for M, update, lr in zip(matrices, self.orthogonalized(gradients), rates, strict=False):
                M.add_(update, alpha=-lr)
        for group in self.param_groups:
            if "parts" in group:
                for p in group["params"]:
                    p.grad = None  # so that AdamW passes them over
        super().step()

    def orthogonalized(self, matrices: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """All n matrices (rows, columns), orthogonalised: (n or a few more, rows, columns)."""
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        share = math.ceil(len(matrices) / ranks)
        X = torch.zeros(share, *matrices[0].shape, dtype=self.dtype, device=matrices[0].device)
        for x, M in zip(X, matrices[rank * share : (rank + 1) * share], strict=False):
            x.copy_(M)
        X = orthogonalize(X)
        if ranks == 1:
            return X
        whole = X.new_empty(ranks * share, *X.shape[1:])
        dist.all_gather_into_tensor(whole, X)
        return whole


def orthogonalize(X: torch.Tensor) -> torch.Tensor:
    """For each of the matrices X = U·S·Vᵀ, (n, rows, columns), about U·Vᵀ: singular values near 1, between 0.7 and 1.2.

    Five steps of a Newton–Schulz iteration X ← a·X + (b·A + c·A²)·X, A = X·Xᵀ, which takes every singular value s to
    a·s + b·s³ + c·s⁵; Jordan's coefficients bring small ones up fastest, at the price of not settling at 1 (Bernstein &
    Newhouse, 2024, "Old optimizer, new norm", is where it comes from).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(5):
        A = X @ X.mT  # (n, rows, rows): rows is the smaller side
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X
