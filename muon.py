"""The Muon optimizer: it orthogonalizes the momentum of matrices, and updates all other parameters by AdamW."""

import math
from collections import defaultdict

import torch
import torch.distributed as dist

MOMENTUM = 0.95


class Muon(torch.optim.AdamW):
    """AdamW, except for parameter groups with the key `parts`: their matrices are updated by Muon.

    For a matrix M (rows, columns) with gradient G and momentum B, a step is

        B ← μ·B + (1 - μ)·G    with μ = 0.95
        M ← (1 - λ·decay)·M - λ·0.2·√max(rows, columns)·orthogonalize(μ·B + (1 - μ)·G)

    (Jordan et al., 2024, "Muon: An optimizer for hidden layers in neural networks"). The root scales the update to the
    RMS of AdamW's, 0.2·λ (Liu et al., 2025, "Muon is scalable for LLM training", section 2.2), so that one learning
    rate serves both: λ is the group's `lr` times its `lr_scale`. A parameter with n `parts` is n matrices, one below
    the other.

    Matrices of the same shape, or of that shape transposed, are orthogonalized together, in `dtype`. With several
    ranks, each orthogonalizes a part of them, and all get the same result. Every rank holds the whole momentum, so a
    checkpoint can be resumed on any number of ranks.
    """

    def __init__(self, groups: list[dict], dtype: torch.dtype, **options):
        super().__init__(groups, **options)
        self.dtype = dtype
        # Let GradScaler skip a whole step with infinite gradients. Fused AdamW would skip inside its kernel, after the
        # matrices are updated.
        self._step_supports_amp_scaling = False

    def __setstate__(self, state: dict) -> None:
        # For load_state_dict. Adam's version reads "step" in the state of all parameters; matrices have no "step".
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self) -> None:
        batches = defaultdict(list)
        for group in self.param_groups:
            if "parts" not in group:
                continue
            lr = group["lr"] * group["lr_scale"]
            for p in group["params"]:
                if p not in self.state:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"]
                momentum.lerp_(p.grad, 1 - MOMENTUM)
                update = p.grad.lerp_(momentum, MOMENTUM)  # in place: the gradient is not needed again
                p.mul_(1 - lr * group["weight_decay"])
                p.grad = None  # AdamW skips what has no gradient
                for M, U in zip(p.chunk(group["parts"]), update.chunk(group["parts"]), strict=True):
                    if M.size(0) > M.size(1):
                        M, U = M.mT, U.mT
                    batches[M.shape].append((M, U, lr * 0.2 * math.sqrt(M.size(1))))
        for batch in batches.values():
            matrices, updates, rates = zip(*batch, strict=True)
            for M, U, rate in zip(matrices, self.orthogonalized(updates), rates, strict=True):
                M.add_(U, alpha=-rate)
        super().step()

    def orthogonalized(self, matrices: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return n matrices, each (rows, columns), orthogonalized: (n, rows, columns)."""
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        per_rank = math.ceil(len(matrices) / ranks)
        X = torch.zeros(per_rank, *matrices[0].shape, dtype=self.dtype, device=matrices[0].device)
        for x, M in zip(X, matrices[rank * per_rank : (rank + 1) * per_rank], strict=False):  # the last may have fewer
            x.copy_(M)
        X = orthogonalize(X)  # (per_rank, rows, columns)
        if ranks > 1:
            gathered = [torch.empty_like(X) for _ in range(ranks)]
            dist.all_gather(gathered, X)
            X = torch.cat(gathered)
        return X[: len(matrices)]


def orthogonalize(X: torch.Tensor) -> torch.Tensor:
    """Return the matrices X = U·S·Vᵀ, (n, rows, columns) with rows ≤ columns, with S set to nearly 1: nearly U·Vᵀ.

    Run five steps of the Newton–Schulz iteration X ← a·X + (b·A + c·A²)·X with A = X·Xᵀ, which maps each singular value
    s to a·s + b·s³ + c·s⁵ (Bernstein & Newhouse, 2024, "Old optimizer, new norm"). With Jordan's a, b, c small singular
    values grow fastest, and none converges to 1: those above 0.002 of the Frobenius norm end between 0.68 and 1.21.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        A = X @ X.mT  # (n, rows, rows)
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X
