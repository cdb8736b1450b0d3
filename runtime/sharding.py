"""Weights, gradients and optimizer state divided among the ranks, by PyTorch's FSDP2."""

import torch

from model import GPT
from runtime.distributed import Distributed


def shard(model: GPT, dist: Distributed) -> None:
    """Keep on each rank only its part of the parameters, which become DTensors. Before, all ranks have the same ones.

    A pass gathers a block's parameters when it reaches that block, and those of embeddings and head at its beginning.
    """
    from torch.distributed.fsdp import fully_shard  # takes a second

    for block in model.transformer.h:
        fully_shard(block, mesh=dist.mesh)
    fully_shard(model, mesh=dist.mesh)


def whole_model(model: GPT) -> GPT:
    """Return a copy of a sharded model that is whole on each rank. All ranks call this."""
    return GPT.from_weights(model.config, {name: p.full_tensor() for name, p in model.state_dict().items()})


def models_to_probe(model: GPT, dist: Distributed) -> tuple[GPT, GPT]:
    """Return two models like this one, with any weights: a whole and a sharded one, whose passes take the memory that
    they would take, but communicate nothing. So no rank waits for one that runs out of memory."""
    with torch.device("meta"):
        whole, sharded = GPT(model.config), GPT(model.config)
    sharded.set_recompute(model.transformer.h[0].recompute)
    shard(sharded, dist)
    for module in sharded, *sharded.transformer.h:
        module.set_custom_all_gather(NoCommunication())
        module.set_custom_reduce_scatter(NoCommunication())
    return whole.to_empty(device=dist.device), sharded.to_empty(device=dist.device)


class NoCommunication:
    """Takes the place of FSDP2's all-gather and reduce-scatter: it allocates buffers and leaves them as they are."""

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, **options) -> None:
        pass
