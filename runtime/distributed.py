"""The processes of a run, and the signals that stop it."""

from errors import UserError

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


def disk_error(e: OSError) -> UserError:
    return UserError(f"{e.filename}: {e.strerror}" if e.filename else str(e), 4)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run and this one's place among them; without torchrun there is one."""

    rank: int
    local_rank: int
    size: int
    local_size: int  # on this host
    device: torch.device

    @classmethod
    def start(cls, device: str, timeout: float) -> "Ranks":
        """Choose this rank's device and meet the others. Raises UserError."""
        rank, local_rank, size, local_size = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))
        )
        has = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
        if device == "auto":
            device = next(d for d in has if has[d])
        if not has[device]:
            raise UserError(f"--device {device}: PyTorch finds no such device here; try --device auto")
        if device == "mps" and size > 1:
            raise UserError(f"--device mps: one rank at most, not {size}; leave torchrun out, or use --device cpu")
        if device == "cuda":
            if local_size > torch.cuda.device_count():
                n = torch.cuda.device_count()
                raise UserError(f"{local_size} ranks on a host with {n} GPUs: use --nproc_per_node={n} or --device cpu")
            device = f"cuda:{local_rank}"
            torch.cuda.set_device(device)
        if size > 1:
            backend = "nccl" if device.startswith("cuda") else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        return cls(rank, local_rank, size, local_size, torch.device(device))

    def each(self, fn: Callable):
        """Run fn on every rank and return its result here; the first UserError of any is raised on all."""
        result = error = None
        try:
            result = fn()
        except UserError as e:
            error = e
        except OSError as e:
            error = disk_error(e)
        errors = [error] * self.size
        if self.size > 1:
            dist.all_gather_object(errors, error)
        for error in filter(None, errors):
            raise error
        return result

    def first(self, fn: Callable):
        """Run fn on rank 0 and return its result on every rank; a UserError is raised on all."""
        result = [self.each(lambda: fn() if self.rank == 0 else None)]
        if self.size > 1:
            dist.broadcast_object_list(result, src=0)
        return result[0]

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks, added up elementwise."""
        tensor = tensor.to(self.device)
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum(self, *values: torch.Tensor | float) -> list[float]:
        """The values added up over all ranks: one collective, one read by the host."""
        scalar = dict(dtype=torch.float32, device=self.device)  # full() fills on the device: no wait, unlike a copy
        return self.add(
            torch.stack([v.to(**scalar) if torch.is_tensor(v) else torch.full((), v, **scalar) for v in values])
        ).tolist()


class Signals:
    """SIGTERM and SIGINT ask the run to finish its step, save and stop; a second one ends it at once, if it comes more
    than a second later: what is sent to every process of a job reaches a rank twice, directly and from torchrun."""

    numbers = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.received = [0.0, 0.0, 0.0]  # by this rank: these two, and that a save has failed
        self.seen = [0.0, 0.0, 0.0]  # by any rank, as all agreed at the end of the last step
        self.before = [signal.signal(number, self.receive) for number in self.numbers]

    def receive(self, number: int, frame) -> None:
        if any(self.received[:2]):
            if time.monotonic() > self.first + 1:
                os._exit(128 + number)
            return
        self.first = time.monotonic()
        self.received[self.numbers.index(number)] = 1.0
        with contextlib.suppress(OSError):  # whoever read may have ended by the same Ctrl-C
            os.write(2, b"\nfinishing the step, then saving; a second signal stops at once\n")

    @property
    def stopping(self) -> signal.Signals | None:
        """The signal that the ranks have agreed to stop for."""
        return next((number for number, seen in zip(self.numbers, self.seen, strict=False) if seen), None)

    @property
    def failed(self) -> bool:
        """Whether a save has failed."""
        return self.seen[-1] > 0

    def restore(self) -> None:
        for number, handler in zip(self.numbers, self.before, strict=True):
            signal.signal(number, handler)
