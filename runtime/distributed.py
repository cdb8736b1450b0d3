"""The processes (ranks) of a run, what they agree on, and the signals that stop them."""

from errors import UserError, first_line, print_error
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Event

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.utils._pytree import tree_leaves, tree_map_only

from runtime.device import free_memory_at_peak, oom_as_user_error


class Distributed:
    """The ranks of a run, without torchrun one; a context manager that connects and disconnects them.

    What only one rank can decide, the main rank does (`from_main`); what can fail on one rank fails on all (`agree`).
    """

    def __init__(self, script: str = "train_gpt2.py"):
        """Read torchrun's environment. Raise UserError if it does not fit together."""
        self.script = script  # its name stands before error messages
        self.rank, self.size = read_environment("RANK", 0), read_environment("WORLD_SIZE", 1)
        self.local_rank = read_environment("LOCAL_RANK", 0)
        self.local_size = read_environment("LOCAL_WORLD_SIZE", 1)
        if not (self.rank < self.size and self.local_rank < self.local_size):
            names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"
            values = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
            raise UserError(f"{values}: do not fit together; start ranks with torchrun")
        self.is_main = self.rank == 0
        self.device = torch.device("cpu")
        self.timeout = 600.0  # seconds, until set_timeout

    def __enter__(self) -> "Distributed":
        if self.size > 1:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            try:
                dist.init_process_group(backend, timeout=timedelta(seconds=self.timeout))
            except ValueError as e:
                address = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')}, MASTER_PORT={os.environ.get('MASTER_PORT')}"
                raise UserError(f"{address}: {first_line(e)}; start ranks with torchrun") from None
            except dist.DistError as e:
                raise UserError(f"rank {self.rank} does not reach the others: {first_line(e)}", 4) from None
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self.size == 1:
            return
        agreed = isinstance(error, UserError) and error.agreed
        if agreed and self.local_rank == 0:
            print_error(self.script, error, error.status)
        if agreed or error is None:
            with self.agree():  # wait for the main rank, which may still write
                pass
        dist.destroy_process_group()
        if agreed:
            sys.exit(error.status)
        # gloo raises a RuntimeError whose message contains a path of its source.
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error)):
            message = f"rank {self.rank} has lost another rank: {first_line(error)}"
            if self.script == "train_gpt2.py":
                message += "; --resume continues from the newest checkpoint"
            raise UserError(message, 1) from None

    def set_device(self, name: str) -> None:
        """Use this rank's device of that name. Raise UserError if there are fewer than ranks."""
        if name in ("mps", "xpu") and self.size > 1:
            raise UserError(f"--device {name}: one rank only, not {self.size}; leave torchrun out, or use --device cpu")
        if name == "cuda":
            n = torch.cuda.device_count()
            if self.local_size > n:
                raise UserError(f"{self.local_size} ranks on a host with {n} GPUs: use --nproc_per_node={n}")
            name = f"cuda:{self.local_rank}"
            torch.cuda.set_device(name)
        self.device = torch.device(name)

    def set_timeout(self, timeout: float) -> None:
        """Set the seconds after which a rank that gets no answer from another stops."""
        self.timeout = timeout
        if self.size > 1:
            _set_pg_timeout(timedelta(seconds=timeout))

    @contextlib.contextmanager
    def agree(self) -> Iterator[None]:
        """Run the block on every rank, then raise the first error of any rank on all ranks.

        The block may take longer than the timeout, for example to hash a checkpoint: until all ranks have left it, a
        thread calls all_reduce every few seconds. The block itself must call no collective; the two would mix.
        """
        if self.size == 1:
            yield
            return
        error, finished = None, Event()
        with ThreadPoolExecutor(1) as pool:
            keeping_alive = pool.submit(self.keep_alive, finished)
            try:
                yield
            except (UserError, OSError) as e:
                error = UserError.from_error(e)
            finally:
                finished.set()
            keeping_alive.result()
        errors: list = [None] * self.size
        dist.all_gather_object(errors, error)
        for error in filter(None, errors):
            error.agreed = True
            raise error

    def keep_alive(self, finished: Event) -> None:
        """Call all_reduce several times per timeout, until all ranks have finished."""
        unfinished = torch.ones(1)
        while unfinished > 0:
            finished.wait(min(10.0, self.timeout / 4))
            unfinished = torch.tensor([0.0 if finished.is_set() else 1.0])
            dist.all_reduce(unfinished)

    def from_main(self, function: Callable):
        """Call a function on the main rank; return its result, or raise its error, on all ranks."""
        result = [None]
        with self.agree():
            if self.is_main:
                result = [function()]
        if self.size > 1:
            dist.broadcast_object_list(result, src=0, device=torch.device("cpu"))
        return result[0]

    def broadcast_tree(self, tree, mesh=None):
        """Return the main rank's tree (lists and dicts that hold tensors, on the CPU) on all ranks. With a
        DeviceMesh, tensors that have a dimension become DTensors, divided like FSDP2's parameters."""
        if self.size == 1:
            return tree

        def send(tensor: torch.Tensor) -> torch.Tensor:
            divide = mesh is not None and tensor.dim() > 0
            if tensor.is_meta:
                tensor = torch.empty_like(tensor, device=self.device if divide else "cpu")
            if divide:
                from torch.distributed.tensor import Shard, distribute_tensor  # here: the import takes a second

                return distribute_tensor(tensor, mesh, [Shard(0)])
            dist.broadcast(tensor, src=0)
            return tensor

        shapes = self.from_main(lambda: tree_map_only(torch.Tensor, lambda t: t.to("meta"), tree))
        return tree_map_only(torch.Tensor, send, tree if self.is_main else shapes)

    def gather_tree(self, tree):
        """Return a copy of the tree on the main rank, and a tree of None on the others. It is on the CPU, and DTensors
        are gathered there, one by one. Without DTensors it stays on a GPU, if it fits: that copy takes milliseconds."""

        def copy(tensor: torch.Tensor) -> torch.Tensor | None:
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            return whole.detach().to("cpu", copy=True) if self.is_main else None

        tensors = [t for t in tree_leaves(tree) if torch.is_tensor(t)]
        on_gpu = self.device.type == "cuda" and not any(hasattr(t, "full_tensor") for t in tensors)
        # The copy stays while training continues, and free memory may be in pieces: half of it must suffice.
        if on_gpu and sum(t.nbytes for t in tensors) < free_memory_at_peak(self.device) / 2:
            with contextlib.suppress(torch.OutOfMemoryError):
                copies = tree_map_only(torch.Tensor, lambda t: t.detach().clone() if self.is_main else None, tree)
                torch.cuda.synchronize()
                return copies
        with oom_as_user_error("the copy that a checkpoint is written from"):
            return tree_map_only(torch.Tensor, copy, tree)

    def broadcast_parameters(self, model: torch.nn.Module) -> None:
        """Give all ranks the main rank's parameters."""
        if self.size > 1:
            for p in model.parameters():
                dist.broadcast(p.data, src=0)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the elementwise sum of the ranks' tensors, on this rank's device."""
        tensor = tensor.to(self.device)
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_scalars(self, *values: torch.Tensor | float) -> list[float]:
        """Return the sums of these scalars over all ranks, with one collective and one device-to-host copy."""
        scalar = dict(dtype=torch.float32, device=self.device)  # full() fills on the device: no wait, unlike a copy
        values = [v.to(**scalar) if torch.is_tensor(v) else torch.full((), v, **scalar) for v in values]
        return self.all_reduce(torch.stack(values)).tolist()


def read_environment(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise UserError(f"{name}={value}: is not a number; start ranks with torchrun")
    return int(value)


class StopSignals:
    """SIGTERM and SIGINT ask the run to finish its step, save a checkpoint and stop. A second one, over a second later,
    ends the process at once. (One that is sent to every process of a job reaches a rank twice, also from torchrun.)"""

    numbers = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.received = [0.0, 0.0]  # by this rank, of each number
        self.first_time = 0.0
        self.handlers_before = [signal.signal(number, self.receive) for number in self.numbers]

    def receive(self, number: int, frame) -> None:
        if any(self.received):
            if time.monotonic() > self.first_time + 1:
                os._exit(128 + number)
            return
        self.first_time = time.monotonic()
        self.received[self.numbers.index(number)] = 1.0
        with contextlib.suppress(OSError):  # the same Ctrl-C may have ended the reader
            os.write(2, b"\nfinishing the step, then saving a checkpoint; a second signal stops at once\n")

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in zip(self.numbers, self.handlers_before, strict=True):
            signal.signal(number, handler)
