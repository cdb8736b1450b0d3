"""Weights, gradients and optimizer state divided among the ranks, by PyTorch's FSDP2."""

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from model import GPT
from runtime.distributed import Distributed


def shard(model: GPT, dist: Distributed) -> DeviceMesh:
    """Keep only a part of each parameter on each rank, as a DTensor; return the mesh of the ranks.

    A pass gathers a block's parameters when it reaches the block, then frees them; those of embeddings and head stay.
    """
    from torch.distributed.fsdp import fully_shard  # here: the import takes a second

    mesh = init_device_mesh(dist.device.type, (dist.size,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return mesh


def models_to_probe(model: GPT, dist: Distributed) -> tuple[GPT, GPT]:
    """Return two models whose passes take the memory of this one's, but do not communicate, so that no rank waits for
    one that runs out of memory: a whole model, uninitialized, and a sharded one that uses this one's tensors."""
    with torch.device("meta"):
        whole, sharded = GPT(model.config), GPT(model.config)
    sharded.set_recompute(model.transformer.h[0].recompute)
    shard(sharded, dist)
    for module in sharded, *sharded.transformer.h:
        module.set_custom_all_gather(NoCommunication())
        module.set_custom_reduce_scatter(NoCommunication())
    sharded.load_state_dict(model.state_dict(), assign=True)
    return whole.to_empty(device=dist.device), sharded


class NoCommunication:
    """Takes the place of FSDP2's all-gather and reduce-scatter: it allocates buffers and does not fill them."""

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, **options) -> None:
        pass
