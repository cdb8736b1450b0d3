"""Train GPT-2: the same script on a laptop and on eight GPUs.

python train_gpt2.py                               the default for this machine and the data that is there
torchrun --nproc_per_node=8 train_gpt2.py          one process per GPU
python train_gpt2.py --init_from gpt2 --data my.txt    fine-tune on a text of yours
python train_gpt2.py --resume                      go on where the run in log/ stopped
"""

from errors import UserError

import argparse
import contextlib
import difflib
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from filelock import FileLock, Timeout
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

import checkpoint
import hellaswag
import plot
from model import GPT, GPT2_VOCAB_SIZE, SIZES, GPTConfig, keep_pages
from tokens import (
    ShardError,
    check_ids,
    check_manifest,
    first_line,
    gpt2_encoding,
    open_shard,
    sha256,
    shard_paths,
)

ROOT = Path(__file__).resolve().parent
FULL_RUN = "python fineweb.py && torchrun --nproc_per_node=8 train_gpt2.py --preset gpt2"


# --------------------------------------------------------------------------------------------------------------------
# Options

# Laid over the defaults of TrainConfig, which are the published recipe of GPT-2 124M, and under the user's flags.
PRESETS = {
    "tiny": dict(
        n_layer=4, n_head=4, n_embd=256, seq_len=128, total_batch_size=2048,
        max_steps=550, max_lr=2e-3, min_lr=0.0, warmup_steps=100,
        eval_every=110, eval_tokens=32768, hellaswag_every=0, sample_every=110, save_every=110,
    ),
    "small": dict(
        n_layer=6, n_head=6, n_embd=384, seq_len=256, total_batch_size=8192,
        max_steps=200, max_lr=1.5e-3, min_lr=0.0, warmup_steps=40,
        eval_every=50, eval_tokens=32768, hellaswag_every=0, sample_every=50, save_every=100,
    ),
    **SIZES,
}  # fmt: skip

# What leads the same network to the same loss in half the steps: small's rates are from a sweep, gpt2's are not.
FAST = dict(optimizer="muon", schedule="wsd", decay_share=0.5, min_lr=0.0)
PRESETS |= {
    "small-fast": PRESETS["small"] | FAST | dict(max_steps=100, max_lr=4e-3, warmup_steps=15),
    "gpt2-fast": PRESETS["gpt2"] | FAST | dict(max_steps=9536, max_lr=1.2e-3, warmup_steps=715),
}


def option(default, text: str, low: float = 0, high: float = 2**40, choices: tuple = (), metavar: str = ""):
    """A field of TrainConfig: its default, its line of help, and the values that are allowed."""
    return field(default=default, metadata=dict(help=text, low=low, high=high, choices=choices, metavar=metavar))


@dataclass(frozen=True)
class TrainConfig:
    """The options of a run. None stands for what is worked out when the run starts, as the help says."""

    preset: str | None = option(
        None,
        "size and recipe to start from, listed below (default: tiny on a CPU, small on a GPU, gpt2 on one with shards)",
        choices=(*PRESETS,),
    )
    n_layer: int = option(12, "layers", low=1)
    n_head: int = option(12, "attention heads per layer", low=1)
    n_embd: int = option(768, "width of the residual stream", low=1)
    bias: bool = option(True, "biases in linear maps and LayerNorms, as GPT-2 has them")
    data: str | None = option(
        None,
        "directory of token shards, or a UTF-8 text file (default: edu_fineweb10B/ if it is there, else input.txt)",
        metavar="PATH",
    )
    log_dir: str = option("log", "directory of this run's log and saves", metavar="DIR")
    init_from: str | None = option(
        None,
        "fine-tune this model: a directory, or a name on the Hugging Face hub (its shape and seq_len are then the "
        "defaults, and a constant learning rate of 3e-5)",
        metavar="MODEL",
    )
    resume: str | None = option(
        None, "go on from the save DIR, such as log/step_000110, or without DIR from the newest in log_dir"
    )
    max_steps: int | None = option(
        None, "optimizer steps; 0 only evaluates (default: 19,073, or one epoch of shards under 9.5B tokens)"
    )
    total_batch_size: int = option(524288, "tokens per optimizer step, over all ranks", low=1)
    micro_batch_size: int | None = option(
        None, "rows of seq_len tokens per forward pass and rank (default: the most that divide and should fit)", low=1
    )
    seq_len: int = option(1024, "tokens per row, the model's context", low=1)
    max_lr: float = option(6e-4, "learning rate after warm-up")
    min_lr: float | None = option(None, "learning rate at the end (default: max_lr / 10)")
    schedule: str = option("cosine", "the learning rate's way down, from warm-up on or late", choices=("cosine", "wsd"))
    decay_share: float = option(0.5, "share of the steps, the last, in which wsd goes down", high=1)
    warmup_steps: int | None = option(None, "steps of linear warm-up (default: 715, at most max_steps / 10)")
    optimizer: str = option("adamw", "muon: for the blocks' matrices, adamw for the rest", choices=("adamw", "muon"))
    muon_ratio: float = option(1.0, "learning rate of muon's matrices, as a multiple of the rest's")
    weight_decay: float = option(0.1, "decay of matrices and embeddings")
    grad_clip: float = option(1.0, "largest norm of the gradient; 0 for no limit")
    dropout: float = option(0.0, "its probability, in embedding, attention and residual", high=0.99)
    seed: int = option(1337, "of weights, order of rows, dropout", high=2**31)
    device: str = option(
        "auto", "where to compute: auto takes cuda, else mps, else cpu", choices=("auto", "cpu", "cuda", "mps")
    )
    dtype: str = option(
        "auto",
        "precision of matrix products: auto takes bfloat16 where the hardware has it, else float16 on cuda or float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    compile: str = option("auto", "torch.compile: auto where it can work and pays", choices=("auto", "on", "off"))
    eval_every: int = option(250, "steps between evaluations on the validation tokens; 0 for none")
    eval_tokens: int = option(10485760, "validation tokens per evaluation, however many ranks", low=1)
    hellaswag_every: int = option(250, "steps between HellaSwag exams, whose questions are downloaded once; 0 for none")
    sample_every: int = option(250, "steps between samples; 0 for none")
    save_every: int = option(1000, "steps between saves; 0 for one at the end")
    keep: int = option(2, "newest saves to keep, besides the best by validation loss", low=1)
    wandb: str | None = option(
        None, "project on Weights & Biases to log to, too (pip install wandb)", metavar="PROJECT"
    )
    dist_timeout: float = option(600.0, "seconds until a rank that waits for another gives up", low=1)
    dry_run: bool = option(False, "take four steps, say what the run would take, and write nothing")


EPILOG = """
The defaults above are the published recipe of GPT-2 124M. A preset lays these over them, and your flags go over both:
{presets}

Ctrl-C or SIGTERM: the step is finished, saved, and the run ends, to go on with --resume; a second one ends it at once.
Exit status: 0 done, 2 wrong flags or data, 3 loss not finite, 4 disk or network, 130 Ctrl-C, 143 SIGTERM, 1 else.

The full reproduction: {full_run}
"""

# What may not change when a run is resumed: with any of these changed it would be another run.
FIXED = (
    "n_layer n_head n_embd bias init_from max_steps total_batch_size seq_len max_lr min_lr schedule decay_share "
    "warmup_steps optimizer muon_ratio weight_decay grad_clip dropout seed"
).split()


def parse_flags(argv: list[str] | None) -> dict:
    """The options given on the command line and no others, each checked by itself. Raises UserError."""
    presets = "\n".join(f"  {name:12}" + " ".join(f"{k}={v}" for k, v in p.items()) for name, p in PRESETS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EPILOG.format(presets=presets, full_run=FULL_RUN),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )
    for f in fields(TrainConfig):
        kind = next(t for t in (*get_args(f.type), f.type) if t is not type(None))
        text = f.metadata["help"] + ("" if f.default is None else f" (default: {f.default})")
        if kind is bool:
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, help=text)
        elif f.name == "resume":
            parser.add_argument("--resume", nargs="?", const="newest", metavar="DIR", help=text)
        else:
            choices = f.metadata["choices"] or None
            metavar = None if choices else f.metadata["metavar"] or kind.__name__.upper()
            parser.add_argument(f"--{f.name}", type=kind, choices=choices, help=text, metavar=metavar)
    try:
        namespace, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as e:
        raise UserError(str(e).removeprefix("argument ")) from None
    if unknown:
        known = [f"--{f.name}" for f in fields(TrainConfig)]
        close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "see --help"
        raise UserError(f"{unknown[0]}: there is no such option; {hint}")
    given = vars(namespace)
    for f in fields(TrainConfig):
        value, low, high = given.get(f.name), f.metadata["low"], f.metadata["high"]
        if isinstance(value, int | float) and not low <= value <= high:  # NaN, too
            raise UserError(f"--{f.name} {value}: must be from {low:g} to {high:g}")
    return given


# --------------------------------------------------------------------------------------------------------------------
# Ranks


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


# --------------------------------------------------------------------------------------------------------------------
# Data


@dataclass(frozen=True)
class Data:
    """Training and validation tokens, as lists of (file name, ids (n,) of uint16), and what tells them from others."""

    train: list[tuple[str, np.ndarray]]
    val: list[tuple[str, np.ndarray]]
    is_text: bool
    fingerprint: dict[str, int | str]

    @property
    def n_tokens(self) -> int:
        """How many there are to train on."""
        return sum(len(tokens) for _, tokens in self.train)


def open_data(path: Path) -> Data:
    """A directory of shards, or a text file, whose last tenth is for validation. Raises UserError."""
    try:
        if path.is_dir():
            train, val = ([(p.name, open_shard(p)) for p in shard_paths(path, split)] for split in ("train", "val"))
            fingerprint = {name: len(tokens) for name, tokens in val + train}
            if (path / "manifest.json").exists():
                check_manifest(path, fingerprint)
                fingerprint["manifest.json"] = sha256(path / "manifest.json")
            return Data(train, val, False, fingerprint)
        content = path.read_bytes()
        text = content.decode("utf-8")
        cut = len(text) * 9 // 10
        train, val = (gpt2_encoding().encode_ordinary(part) for part in (text[:cut], text[cut:]))
    except FileNotFoundError:
        raise UserError(f"--data {path}: no such file or directory") from None
    except UnicodeDecodeError as e:
        raise UserError(f"--data {path}: not UTF-8 text (byte {e.start:,}); token shards go into a directory") from None
    except (OSError, ValueError, ShardError) as e:
        raise UserError(f"--data {path}: {e}") from None
    train, val = np.array(train, dtype=np.uint16), np.array(val, dtype=np.uint16)
    fingerprint = {path.name: hashlib.sha256(content).hexdigest()}
    return Data([(path.name, train)], [(f"the last tenth of {path.name}", val)], True, fingerprint)


class DataLoaderLite:
    """Batches that are a pure function of the step: no state to save, no rank that drifts, no token dropped.

    The files, end to end, are one stream of N tokens. Row i is tokens [i·T, i·T + T]: T inputs and, one further on,
    T targets; there are (N - 1) // T rows, and an epoch is each of them once, in an order drawn from (seed, epoch).
    Shards keep the stream's order in the first epoch. Global row g of a run is row order(g // n)[g % n].
    """

    def __init__(self, files: list[tuple[str, np.ndarray]], T: int, seed: int = 0, shuffle_first: bool = False):
        self.files, self.T, self.seed, self.shuffle_first = files, T, seed, shuffle_first
        self.starts = np.cumsum([0] + [len(tokens) for _, tokens in files])  # of each file in the stream, and its end
        self.n_rows = (int(self.starts[-1]) - 1) // T
        if self.n_rows < 1:
            raise UserError(
                f"{files[0][0]}: {self.starts[-1]} tokens are too few for a row of --seq_len {T} and its target"
            )
        self.order = lru_cache(maxsize=2)(self.order)  # a batch may span two epochs

    def order(self, epoch: int) -> np.ndarray:
        """The rows of an epoch, (n_rows), in the order in which they are read."""
        if epoch == 0 and not self.shuffle_first:
            return np.arange(self.n_rows)
        return np.random.default_rng((self.seed, epoch)).permutation(self.n_rows)

    def row_numbers(self, first: int, B: int) -> list[int]:
        """Which rows of the stream are the global rows [first, first + B)."""
        return [int(self.order(g // self.n_rows)[g % self.n_rows]) for g in range(first, first + B)]

    def read(self, start: int, n: int) -> np.ndarray:
        """The n tokens of the stream from start on, across the ends of files: (n,) of uint16. Raises ShardError."""
        parts = []
        i = int(np.searchsorted(self.starts, start, side="right")) - 1
        while n > 0:
            name, tokens = self.files[i]
            offset = start - int(self.starts[i])
            part = tokens[offset : offset + n]
            check_ids(name, offset, part)
            parts.append(part)
            start, n, i = start + len(part), n - len(part), i + 1
        return np.concatenate(parts)

    def rows(self, numbers: list[int]) -> torch.Tensor:
        """These rows of the stream, each with the token that follows it: (len(numbers), T + 1) of int32."""
        return torch.from_numpy(np.stack([self.read(i * self.T, self.T + 1) for i in numbers]).astype(np.int32))

    def micro_batches(self, first: int, B: int, stride: int) -> Iterator[torch.Tensor]:
        """For ever: the B global rows from `first` on, then those `stride` further, and so on, read one ahead."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            ahead = None
            for g in count(first, stride):
                ready, ahead = ahead, pool.submit(lambda g: self.rows(self.row_numbers(g, B)), g)
                if ready is not None:
                    yield ready.result()


def inputs_and_targets(rows: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (B, T + 1) of int32 as inputs and targets on the device, each (B, T) of int64; to a GPU they are copied from
    pinned memory, for which the host need not wait."""
    cuda = device.type == "cuda"  # not MPS, which would read what is freed here at once (pytorch issue 139550)
    rows = (rows.pin_memory() if cuda else rows).to(device, non_blocking=cuda).long()
    return rows[:, :-1], rows[:, 1:]


# --------------------------------------------------------------------------------------------------------------------
# From flags to a run's configuration


def find_save(given: dict) -> tuple[Path | None, dict | None, list[str]]:
    """The save to go on from, its record, and what there is to say about others; Nones for a new run."""
    if given.get("resume") is None:
        return None, None, []
    if given["resume"] == "newest":
        log_dir = Path(given.get("log_dir", TrainConfig.log_dir))
        directory, record, passed_over = checkpoint.newest(log_dir)
        notes = [f"passed over a save: {reason}" for reason in passed_over]
        if directory is None:
            notes.append(f"no save {'that verifies ' if notes else ''}in {log_dir}/: this is a new run")
        return directory, record, notes
    directory = Path(given["resume"])
    others = checkpoint.saves(directory) or ({} if directory.exists() else checkpoint.saves(directory.parent))
    if others:
        raise UserError(f"--resume {directory}: no save, but there is {', '.join(map(str, others.values()))}")
    try:
        return directory, checkpoint.verify(directory), []
    except checkpoint.CheckpointError as e:
        raise UserError(f"--resume {directory}: {e}; --resume alone takes the newest that verifies") from None


def request(
    given: dict, resumed: Path | None, record: dict | None, pretrained: GPTConfig | None, ranks: Ranks
) -> TrainConfig:
    """What is asked for: the flags, over the preset or the save that is resumed, over the defaults."""
    if record is not None:
        saved = {name: value for name, value in record["requested"].items() if name in TrainConfig.__annotations__}
        if record["ranks"] == ranks.size:
            saved["micro_batch_size"] = record["config"]["micro_batch_size"]
        if Path(record["config"]["data"]).exists():
            saved["data"] = record["config"]["data"]
        if given["resume"] == "newest":
            saved["log_dir"] = str(resumed.parent)  # where it was found, should that have been moved
        if given.get("preset", saved["preset"]) != saved["preset"]:
            saved |= PRESETS[given["preset"]]
        return TrainConfig(**(saved | given))
    on_shards = Path(given.get("data") or default_data()).is_dir()
    defaults = dict(cpu="tiny", mps="small", cuda="gpt2" if on_shards else "small")
    preset = given.get("preset", defaults[ranks.device.type])
    values = dict(PRESETS[preset], preset=preset)
    if pretrained is not None:
        shape = {name: getattr(pretrained, name) for name in ("n_layer", "n_head", "n_embd", "bias")}
        for name, value in shape.items():
            if given.get(name, value) != value:
                raise UserError(f"--{name} {given[name]}: the model of --init_from has {value}; leave the flag out")
        if given.get("seq_len", 1) > pretrained.block_size:
            raise UserError(f"--seq_len {given['seq_len']}: --init_from has {pretrained.block_size} positions")
        values |= shape | dict(seq_len=pretrained.block_size, max_lr=3e-5, min_lr=None, warmup_steps=None)
    if "max_steps" in given:
        values.pop("warmup_steps", None)  # a preset's warm-up is for its own length
    return TrainConfig(**(values | given))


def default_data() -> str:
    """The prepared shards if they are here, else the text that comes with the project."""
    shards = ROOT / "edu_fineweb10B"
    return os.path.relpath(shards if shards.is_dir() and any(shards.glob("*train*")) else ROOT / "input.txt")


def resolve(config: TrainConfig, data: Data, ranks: Ranks) -> TrainConfig:
    """The configuration with nothing left open. Raises UserError where it does not work out."""
    T, total = config.seq_len, config.total_batch_size
    steps, min_lr, warmup = config.max_steps, config.min_lr, config.warmup_steps
    if steps is None:
        steps = 19073 if data.is_text or data.n_tokens >= 9.5e9 else max(1, data.n_tokens // total)
    if min_lr is None:
        min_lr = config.max_lr if config.init_from else config.max_lr / 10
    if warmup is None:
        warmup = 0 if config.init_from else min(715, steps // 10)
    if min_lr > config.max_lr:
        raise UserError(f"--min_lr {min_lr:g}: larger than --max_lr {config.max_lr:g}")
    if config.n_embd % config.n_head:
        raise UserError(
            f"--n_head {config.n_head}: does not divide --n_embd {config.n_embd}; "
            f"{divisor_up_to(config.n_head, config.n_embd)} would"
        )

    B, (rows, rest) = config.micro_batch_size, divmod(total, T * ranks.size)
    if rest:
        near = " and ".join(str(n * T * ranks.size) for n in (rows, rows + 1) if n)
        fits = f", or {divisor_up_to(ranks.size, total // T)} ranks" if ranks.size > 1 and total % T == 0 else ""
        raise UserError(
            f"--total_batch_size {total}: not a multiple of {T * ranks.size} = seq_len {T} × {ranks.size} "
            f"rank{'s' * (ranks.size > 1)}; {near} would be{fits}"
        )
    if B and rows % B:
        raise UserError(
            f"--micro_batch_size {B}: does not divide the {rows} rows of a step and rank; "
            f"{divisor_up_to(B, rows)} would"
        )
    B = B or divisor_up_to(rows_that_fit(config, ranks), rows)
    device, dtype = ranks.device.type, choose_dtype(config.dtype, ranks.device)
    return replace(
        config, max_steps=steps, min_lr=min_lr, warmup_steps=warmup, micro_batch_size=B, device=device, dtype=dtype
    )


def divisor_up_to(limit: int, n: int) -> int:
    """The largest divisor of n that is at most limit, or 1."""
    divisors = {d for small in range(1, math.isqrt(n) + 1) if n % small == 0 for d in (small, n // small)}
    return max(d for d in divisors if d == 1 or d <= limit)


def rows_that_fit(config: TrainConfig, ranks: Ranks) -> int:
    """An estimate of the largest micro-batch, from the memory that is free now. (Too large a one is halved later.)

    Weights, gradients and Adam's moments take 16 bytes a parameter. A token's activations in mixed precision take
    about 48 bytes a channel and layer, and its logits, with their copies and gradients, 18 bytes an entry.
    """
    if ranks.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(ranks.device)
    elif ranks.device.type == "mps":
        free = torch.mps.recommended_max_memory()
    else:
        meminfo = Path("/proc/meminfo")  # elsewhere than on Linux, assume a laptop
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines()) if meminfo.exists() else {}
        free = int(lines.get("MemAvailable", "8000000 kB").split()[0]) * 1024 / ranks.local_size
    parameters = 12 * config.n_layer * config.n_embd**2 + (GPT2_VOCAB_SIZE + config.seq_len) * config.n_embd
    per_token = 48 * config.n_layer * config.n_embd + 18 * GPT2_VOCAB_SIZE
    return int((0.8 * free - 16 * parameters) / (per_token * config.seq_len))


def changes(config: TrainConfig, data: Data, ranks: Ranks, directory: Path, record: dict) -> str:
    """What is otherwise than when the run was saved, and may be. Raises UserError if it would be another run."""
    old = asdict(TrainConfig()) | record["config"] | dict(ranks=record["ranks"])  # newer options were at their defaults
    new = asdict(config) | dict(ranks=ranks.size)
    lines = {k: f"{k} {old[k]} → {new[k]}" for k in new if old[k] != new[k] and k != "resume"}
    fixed = [line for name, line in lines.items() if name in FIXED]
    if record["data"] != data.fingerprint:
        fixed.append(f"the data {old['data']} → {new['data']}, which has other tokens")
    if fixed:
        raise UserError(f"--resume {directory}: these may not change in mid-run: {', '.join(fixed)}; start a new run?")
    return ", ".join(lines.values()) or "nothing changed"


# --------------------------------------------------------------------------------------------------------------------
# Precision, speed, memory


def choose_dtype(dtype: str, device: torch.device) -> str:
    """The precision of matrix products: as asked, or the fastest that this device is built for."""
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device.type == "cpu" and (cpuinfo := Path("/proc/cpuinfo")).exists():
        if {"avx512_bf16", "amx_bf16", "bf16"} & set(cpuinfo.read_text().split()):
            return "bfloat16"
    return "float32"


# Compiling takes a minute on a GPU, half of one on a CPU, a few seconds where it was done before. Then it saves a third
# of the time on a GPU, on a CPU up to 15% (tiny; 124M nothing): it pays in runs of more operations than these.
COMPILE_PAYS = dict(cuda=5e16, cpu=1.5e14)


def why_eager(config: TrainConfig, device: torch.device, flops: float) -> str | None:
    """Why a run of so many floating-point operations is not compiled, or None if compiling is to be tried."""
    if config.compile == "off":
        return "--compile off"
    if device.type == "mps":
        return "torch.compile is not ready for MPS"
    if config.compile == "auto" and flops < COMPILE_PAYS[device.type]:
        return "compiling would take longer than it saves in so short a run"
    return None


# Dense matrix peak in 16 bit with float32 accumulation, FLOP/s, from the vendors' data sheets, by patterns of names.
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "GH200": 989e12,
    "A100": 312e12, "A10G": 70e12, "A10": 125e12, "A40": 149.7e12, "L40S": 362e12, "L4": 121e12, "V100-SXM2": 125e12,
    "T4": 65e12, "RTX 4090$": 165.2e12, "RTX 3090$": 71e12,
}  # fmt: skip


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """What this device could do at most, for the MFU (model FLOPs utilisation); None where that is not known."""
    if device.type != "cuda" or dtype == "float32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name)), None)


def out_of_memory(e: Exception) -> bool:
    """Whether this is some device's way to say so."""
    return isinstance(e, torch.OutOfMemoryError | MemoryError) or any(
        s in str(e) for s in ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    )


def if_it_fits(fn: Callable, what: str):
    """Call fn; raises UserError if there is no memory for what it makes."""
    try:
        return fn()
    except (RuntimeError, MemoryError) as e:
        if out_of_memory(e):
            raise UserError(f"{what} does not fit into memory: try a smaller --preset") from None
        raise


def prepare(
    raw_model: GPT,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    ranks: Ranks,
    amp: torch.autocast,
    compiled: bool,
) -> tuple[nn.Module, int, list[str]]:
    """Compile, wrap for DDP, and try an evaluation's pass and a step's; if one fails, with a smaller micro-batch, or
    uncompiled. No rank waits for another in the trial, after which all agree. Returns the module to train with, the
    micro-batch, and what there is to say."""
    B, T = config.micro_batch_size, config.seq_len
    notes = []
    if ranks.size > 1:
        ddp = DistributedDataParallel(raw_model, gradient_as_bucket_view=True)

    def trial() -> None:  # whose end, well or not, ends all that it has made
        moments = [torch.empty_like(p) for p in raw_model.parameters() for _ in range(0 if optimizer.state else 2)]
        if B * T * ranks.size < config.total_batch_size:  # the gradients of micro-batches before
            for p in raw_model.parameters():
                p.grad = torch.zeros_like(p)
        x, y = inputs_and_targets(torch.zeros(B, T + 1, dtype=torch.int32), ranks.device)
        with torch.no_grad(), amp:
            raw_model.eval()(x, y)
        model.train().require_backward_grad_sync = False
        with amp:
            _, loss = model(x, y)
        loss.backward()
        del moments

    while True:
        model = torch.compile(raw_model, dynamic=False) if compiled else raw_model
        if ranks.size > 1:  # compiled inside DDP the graph is cut at its buckets, so that sending overlaps computing
            ddp.module, model = model, ddp
        no_memory, no_compiler = False, ""
        try:
            trial()
        except Exception as e:
            no_memory = out_of_memory(e)
            if not no_memory and compiled and isinstance(e, torch._dynamo.exc.TorchDynamoException):
                no_compiler = first_line(e)
            elif not no_memory:
                raise
        raw_model.zero_grad(set_to_none=True)
        any_no_memory, any_no_compiler = ranks.sum(no_memory, bool(no_compiler))
        if any_no_compiler:
            compiled = False
            notes.append(f"not compiled, torch.compile failed: {no_compiler or 'on another rank'}")
        elif not any_no_memory:
            break
        elif B == 1:
            raise UserError(f"out of memory with one row of {T} tokens: try a smaller --preset or --seq_len")
        else:
            B = divisor_up_to(B // 2, config.total_batch_size // (T * ranks.size))
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
    if B < config.micro_batch_size:
        notes.append(f"out of memory: micro-batch {config.micro_batch_size} → {B}, the total batch stays")
    return model, B, notes


# --------------------------------------------------------------------------------------------------------------------
# Training


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up to max_lr, then down to min_lr at max_steps: along a cosine (GPT-3: Brown et al., 2020, appendix
    B), or with wsd (warm-up, stable, decay) in a line over the last steps alone (Hägele et al., 2024, section 3)."""
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    falling = max(1, config.max_steps - config.warmup_steps)
    if config.schedule == "wsd":
        height = min(1, (config.max_steps - step) / min(falling, max(1, config.decay_share * config.max_steps)))
    else:
        height = 0.5 * (1 + math.cos(math.pi * (step - config.warmup_steps) / falling))
    return config.min_lr + height * (config.max_lr - config.min_lr)


def dropout_seed(config: TrainConfig, step: int, micro_batch: int) -> int:
    """For the step's micro-batch of that number, counted over all ranks: so there is no random state to save."""
    return int(np.random.SeedSequence((config.seed, step, micro_batch)).generate_state(1)[0])


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    micro_batches: Iterator[torch.Tensor],
    step: int,
    config: TrainConfig,
    ranks: Ranks,
    amp: torch.autocast,
    signals: "Signals",
) -> tuple[float, float]:
    """One optimizer step over total_batch_size tokens. Returns the loss before it, over all of them, and the norm of
    its gradient. Raises UserError, with no weight changed on any rank, if either is not finite."""
    accumulate = config.total_batch_size // (config.micro_batch_size * config.seq_len * ranks.size)
    loss_sum = torch.zeros((), device=ranks.device)
    for m in range(accumulate):
        x, y = inputs_and_targets(next(micro_batches), ranks.device)
        torch.manual_seed(dropout_seed(config, step, m * ranks.size + ranks.rank))
        model.require_backward_grad_sync = m == accumulate - 1  # DDP: average over the ranks once, with the last
        with amp:
            _, loss = model(x, y)
        loss = loss / accumulate
        scaler.scale(loss).backward()
        loss_sum += loss.detach()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    # The one time in a step that the host waits for the device: all ranks learn of one's NaN, or its signal to stop.
    loss, norm, *signals.seen = ranks.sum(loss_sum / ranks.size, norm / ranks.size, *signals.received)
    # To a float16 scaler an infinite norm is nothing unusual: it skips the step and halves the scale, down to 1.
    finite = math.isfinite(norm) or (scaler.is_enabled() and scaler.get_scale() >= 1)
    if not (math.isfinite(loss) and finite):
        raise UserError(f"step {step}: loss {loss:g}, gradient norm {norm:g}; stopped before any weight changed", 3)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


@torch.no_grad()
def evaluate(model: GPT, loader: DataLoaderLite, config: TrainConfig, ranks: Ranks, amp: torch.autocast) -> float:
    """Mean loss over the first eval_tokens of the validation rows: the same rows whatever the micro-batch and ranks."""
    n = min(loader.n_rows, max(1, config.eval_tokens // config.seq_len))
    B = config.micro_batch_size
    total = torch.zeros((), device=ranks.device)
    for first in range(ranks.rank * B, n, ranks.size * B):
        numbers = list(range(first, min(first + B, n)))
        x, y = inputs_and_targets(loader.rows(numbers), ranks.device)
        with amp:
            _, loss = model(x, y)
        total += loss * len(numbers)
    (total,) = ranks.sum(total)
    return total / n


def load_exam(seq_len: int) -> tuple[list[hellaswag.Example] | None, str | None]:
    """HellaSwag's examples, or None and why: a run goes on without. Raises UserError if they do not fit."""
    try:
        examples = hellaswag.read_examples(hellaswag.find_file(), hellaswag.render_nanogpt)
        hellaswag.make_rows(examples, seq_len)
        return examples, None
    except UserError as e:
        if e.status == 2:
            raise UserError(f"--hellaswag_every: {e}; 0 leaves the exam out") from None
        return None, f"no HellaSwag exam: {e}"


def take_exam(
    model: GPT, exam: list[hellaswag.Example], config: TrainConfig, ranks: Ranks, amp: torch.autocast
) -> float:
    """The share of HellaSwag that the model gets right by build-nanogpt's acc_norm, each rank doing its part."""
    with amp:
        scores, _ = hellaswag.score(model, exam, config.micro_batch_size * config.seq_len, ranks.rank, ranks.size)
    return hellaswag.judge(ranks.add(scores).cpu(), exam).acc_norm / len(exam)


def draw_samples(model: GPT, device: torch.device) -> list[str]:
    """What the model makes of a beginning: four continuations by 32 tokens, always from the same random numbers."""
    encoding = gpt2_encoding()
    prompt = encoding.encode_ordinary("Hello, I'm a language model,")
    idx = torch.tensor([prompt] * 4, device=device)
    rows = model.generate(idx, 32, top_k=50, generator=torch.Generator(device).manual_seed(42))
    return [encoding.decode(row) for row in rows.tolist()]


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


# --------------------------------------------------------------------------------------------------------------------
# The run's directory, and the terminal


class WandB:
    """What RunLog writes, on Weights & Biases, too. A thread of its own sends it: no step waits for that, and whatever
    goes wrong there, from the import to the end, costs a line and not the run."""

    patience = 60.0  # seconds, for its beginning and for its end

    def __init__(self, config: dict, log_dir: Path, say: Callable):
        self.rows, self.say, self.given_up = SimpleQueue(), say, False
        self.thread = Thread(target=self.send, args=(config, log_dir), daemon=True)
        self.thread.start()

    def log(self, step: int, **values: float) -> None:
        self.rows.put((step, values))

    def send(self, config: dict, log_dir: Path) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # no questions, and nothing over the progress bar
        os.environ.setdefault("WANDB_CACHE_DIR", str(log_dir))  # it adds the wandb/ itself
        settings = dict(project=config["wandb"], console="off", resume="allow", init_timeout=self.patience)
        settings |= dict(finish_timeout=self.patience, finish_timeout_raises=True)
        id_file = log_dir / "wandb/id.txt"  # a run that is resumed goes on there, too
        if id_file.exists():
            settings["run_id"] = id_file.read_text(encoding="utf-8")
        try:
            import wandb

            try:
                run = wandb.init(dir=log_dir, config=config, settings=settings)
                id_file.write_text(run.id, encoding="utf-8")
                self.say(f"Weights & Biases: {run.url or run.dir}")
                for step, values in iter(self.rows.get, None):
                    run.log(values, step=step)
                run.finish()
            finally:
                wandb.teardown()  # ends its process, or forgets one that has died
        except Exception as e:
            if not self.given_up:
                self.say(f"no Weights & Biases: {first_line(e)}")

    def close(self) -> None:
        """Wait until all is sent, but not for ever."""
        self.rows.put(None)
        self.thread.join(1.5 * self.patience)
        if self.thread.is_alive():
            self.given_up = True
            self.say("no Weights & Biases: it does not answer")
            Thread(target=lambda: sys.modules["wandb"].teardown(), daemon=True).start()  # else Python's exit would wait


class RunLog:
    """What a run leaves in its directory and shows on the terminal; rank 0 has one.

    log.txt     `{step} train {loss}`, `{step} val {loss}`, `{step} hella {acc}`: three fields and nothing else
    steps.csv   step, tokens so far, loss, lr, norm, seconds, for each optimizer step
    run.json    configuration, versions, hardware, counts
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.dir = Path(config.log_dir)
        self.lock = FileLock(self.dir / ".lock")
        self.files, self.bar, self.wandb = [], None, None
        existing = next(p for p in (self.dir, *self.dir.absolute().parents) if p.exists())
        if not existing.is_dir():
            raise UserError(f"--log_dir {self.dir}: {existing} is a file, not a directory")
        if not os.access(existing, os.W_OK):
            raise UserError(f"--log_dir {self.dir}: {existing} cannot be written to")

    def open(self, resumed: Path | None, step: int, facts: dict) -> None:
        """Lock the directory; move an older run out of the way; of the run that goes on keep, or bring from where the
        save is, the log up to its step."""
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=0)
            checkpoint.clean(self.dir)
            source = resumed and resumed.resolve().parent
            here = source == self.dir.resolve()
            if here:
                for line in checkpoint.set_aside(self.dir, resumed, step):
                    self.say(line)
            elif old := checkpoint.archive(self.dir):
                saved = [*checkpoint.saves(old).values()]
                back = f"; --resume {saved[-1]} would go on with it" if saved else ""
                self.say(f"the run that was in {self.dir} is now in {old}{back}")
            if source is not None:
                again = dict(val=self.config.eval_every, hella=self.config.hellaswag_every)
                kept = tuple(kind for kind, every in again.items() if not is_due(every, step, self.config.max_steps))
                for name, kinds in ("log.txt", kept), ("steps.csv", ()):
                    if not here and (source / name).exists():
                        shutil.copy(source / name, self.dir)
                    checkpoint.cut_log(self.dir / name, step, kinds)
            (self.dir / "run.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            # Line by line: what is written is on its way to the disk, whatever happens to this process.
            self.files = [
                open(self.dir / name, "a", encoding="utf-8", buffering=1) for name in ("log.txt", "steps.csv")
            ]
            if self.files[1].tell() == 0:
                self.files[1].write("step,tokens,loss,lr,norm,seconds\n")
        except Timeout:
            raise UserError(f"--log_dir {self.dir}: another run is writing there; give this one its own") from None
        except OSError as e:
            raise UserError(f"--log_dir {self.dir}: {e.filename} cannot be used ({e.strerror})") from None
        # A terminal may have no size, as `script` makes them: a bar would be invisible there.
        if sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).lines:
            self.bar = tqdm(total=self.config.max_steps, initial=step, unit="step", dynamic_ncols=True)
        if self.config.wandb:
            self.wandb = WandB(facts["config"], self.dir, self.say)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.wandb is not None:
            self.wandb.close()
        for file in self.files:
            file.close()
        self.lock.release()

    def write(self, i: int, line: str) -> None:
        """Add a line to one of the files. Raises DiskError."""
        try:
            self.files[i].write(line + "\n")
        except OSError as e:
            raise checkpoint.DiskError(e.errno, f"cannot be written to ({e.strerror})", self.files[i].name) from None

    def say(self, line: str) -> None:
        """Print a line, above the progress bar if there is one."""
        try:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read has ended, like the tee of `… | tee out` at Ctrl-C; the run has not
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def train(self, step: int, loss: float, lr: float, norm: float, seconds: float, mfu: float | None) -> None:
        """The step that led to step + 1, which took so many seconds."""
        batch = self.config.total_batch_size
        self.write(0, f"{step} train {loss:.9g}")
        self.write(1, f"{step},{(step + 1) * batch},{loss:.9g},{lr:.9g},{norm:.9g},{seconds:.6g}")
        if self.wandb is not None:
            tokens = dict(tokens=(step + 1) * batch, tokens_per_second=batch / seconds)
            self.wandb.log(step, train=loss, lr=lr, norm=norm, **tokens)
        speed = f"{batch / seconds:,.0f} tok/s, MFU {'n/a' if mfu is None else f'{mfu:.1%}'}"
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}, {speed}", refresh=False)
            self.bar.update()
        else:
            left = timedelta(seconds=round(seconds * (self.config.max_steps - step - 1)))
            self.say(f"step {step}: loss {loss:.4f}, norm {norm:.3f}, lr {lr:.2e}, {speed}, {left} left")

    def result(self, step: int, name: str, value: float, text: str) -> None:
        """An evaluation of the weights as they are at a step."""
        if self.files:
            self.write(0, f"{step} {name} {value:.9g}")
        if self.wandb is not None:
            self.wandb.log(step, **{name: value})
        self.say(f"step {step}: {text} {value:.4f}")

    def draw(self) -> None:
        """Draw the curves of the run so far."""
        try:
            plot.draw([self.dir], self.dir / "curves.png")
        except Exception as e:  # whatever it is: the run is over, and well
            self.say(f"no {self.dir / 'curves.png'}: {first_line(e)}")

    def best_saved_step(self, before: int) -> int | None:
        """The step, among those saved before this one, with the lowest validation loss."""
        saved = checkpoint.saves(self.dir)
        lines = [line.split() for line in (self.dir / "log.txt").read_text(encoding="utf-8").splitlines()]
        losses = {
            int(step): float(value)
            for step, name, value in lines
            if name == "val" and int(step) < before and int(step) in saved
        }
        return min(losses, key=losses.get, default=None)


def facts(config: TrainConfig, ranks: Ranks, model: GPT, data: Data) -> dict:
    """What to know of a run later on: for run.json."""
    git = shutil.which("git") and subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return dict(
        config=asdict(config),
        git_commit=git.stdout.strip() if git and git.returncode == 0 else None,
        versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__),
        device=torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ranks.device.type,
        ranks=ranks.size,
        machine=platform.machine(),
        threads=torch.get_num_threads(),
        parameters=model.num_parameters(),
        train_tokens=data.n_tokens,
    )


def introduce(
    config: TrainConfig, given: dict, resumed: Path | None, data: Data, ranks: Ranks, model: GPT, eager: str | None
) -> list[str]:
    """The first lines of a run: what was chosen, and why."""
    why = "as asked" if "preset" in given else "of the save" if resumed else f"the default on {config.device}"
    origin = f", from {config.init_from}" if config.init_from else ""
    kind = "text" if data.is_text else f"{len(data.train)} training shards"
    by_default = "" if "data" in given or resumed else ", the default"
    by_default += ", as there are no shards in edu_fineweb10B/" if by_default and data.is_text else ""
    tokens, B = config.max_steps * config.total_batch_size, config.micro_batch_size
    accumulate = config.total_batch_size // (B * config.seq_len * ranks.size)
    plan = f"{config.max_steps:,} steps of {config.total_batch_size:,} tokens, {tokens / data.n_tokens:.2f} epochs"
    plan += "; nothing is written" if config.dry_run else f"; log and saves in {config.log_dir}/"
    return [
        f"preset   {config.preset} ({why})",
        f"model    {config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, context {config.seq_len}, "
        f"{model.num_parameters() / 1e6:,.2f}M parameters{origin}",
        f"data     {config.data} ({kind}{by_default}): {data.n_tokens:,} training tokens",
        f"run      {plan if config.max_steps else 'no steps: it only evaluates, and writes nothing'}",
        f"compute  {ranks.size} × {config.device}, {config.dtype}, {accumulate} × {B} rows a step, "
        f"{f'not compiled: {eager}' if eager else 'compiling (the first time takes a minute)'}",
        f"GPT-2 124M in full: {FULL_RUN}",
    ]


# --------------------------------------------------------------------------------------------------------------------
# The run


def build(
    config: TrainConfig, pretrained: GPT | None, resumed: Path | None, ranks: Ranks
) -> tuple[GPT, torch.optim.AdamW, torch.amp.GradScaler]:
    """The model, its optimizer and the float16 scaler: from the save, from --init_from, or new. Rank 0 alone reads, for
    hosts may share no disk; then all get its tensors. Raises UserError."""

    def read() -> tuple[GPT, dict | None]:
        if resumed is not None:
            return checkpoint.load(resumed)
        names = "n_layer", "n_head", "n_embd", "dropout", "bias"
        torch.manual_seed(config.seed)
        return pretrained or GPT(GPTConfig(config.seq_len, **{name: getattr(config, name) for name in names})), None

    def place() -> GPT:
        placed = model or GPT(shape)
        placed.adapt(config.seq_len, config.dropout)
        return placed.to(ranks.device)

    model, state = ranks.each(lambda: if_it_fits(read, "the model") if ranks.rank == 0 else (None, None))
    shape = ranks.first(lambda: model.config)
    model = ranks.each(lambda: if_it_fits(place, "the model"))
    optimizer = model.configure_optimizers(
        config.weight_decay,
        config.max_lr,
        muon_ratio=config.muon_ratio if config.optimizer == "muon" else None,
        muon_dtype=torch.bfloat16 if config.dtype == "bfloat16" else torch.float32,
    )
    scaler = torch.amp.GradScaler(config.device, enabled=config.dtype == "float16")
    if resumed is not None:
        layout = ranks.first(lambda: tree_map_only(torch.Tensor, lambda t: t.to("meta"), state))
        if ranks.rank > 0:
            state = tree_map_only(torch.Tensor, lambda t: torch.empty_like(t, device="cpu"), layout)
        optimizer.load_state_dict(state["optimizer"])
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
    if ranks.size > 1:
        moments = [t for entry in optimizer.state.values() for t in entry.values()]
        for tensor in [p.data for p in model.parameters()] + moments:
            dist.broadcast(tensor, src=0)
    return model, optimizer, scaler


def peak_memory(device: torch.device) -> int | None:
    """The most bytes of the device's memory that this process has held, or None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # Linux
    if device.type != "cpu" or not status.exists():
        return None
    return int(dict(line.split(":\t") for line in status.read_text().splitlines())["VmHWM"].split()[0]) * 1024


def forecast(
    seconds: float, first_step: int, eval_rows: int, config: TrainConfig, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> list[str]:
    """What a run would take from this step on, if a step takes so many seconds: time, memory, disk."""
    eval_tokens = min(config.eval_tokens, eval_rows * config.seq_len)
    evaluations = sum(
        is_due(config.eval_every, step, config.max_steps) for step in range(first_step, config.max_steps + 1)
    )
    evaluation = seconds / 3 * eval_tokens / config.total_batch_size  # forward alone is a third of the work
    total = timedelta(seconds=round(seconds * (config.max_steps - first_step) + evaluations * evaluation))
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    save = sum(t.nbytes for t in weights + [t for entry in optimizer.state.values() for t in entry.values()])
    peak = peak_memory(ranks.device)
    return [
        f"time     {total}: {seconds:.3g} s a step, {evaluation:.3g} s an evaluation, exams and samples not counted",
        f"memory   {f'{peak / 1e9:.2f} GB a rank, at the peak' if peak else 'n/a here'}",
        f"disk     {(config.keep + 2) * save / 1e9:.2f} GB for {config.keep} saves, the best, and one being written",
        "this was a dry run: nothing is written",
    ]


def is_due(every: int, step: int, max_steps: int) -> bool:
    """Whether something that comes every so many steps, and at the end, comes at this one."""
    return every > 0 and (step % every == 0 or step == max_steps)


def train(given: dict, ranks: Ranks) -> int:
    """A whole run, from flags to the last save; returns the exit status. Raises UserError."""
    torch.set_float32_matmul_precision("high")  # TF32, for what is left in float32
    # On a CPU: compiled, its threads would else add up the embedding's gradient in any order, and slowly.
    torch.use_deterministic_algorithms(ranks.device.type == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False
    resumed, record, notes = ranks.first(lambda: find_save(given))
    init_from = None if resumed else given.get("init_from")
    reads = init_from and ranks.rank == 0
    pretrained = ranks.each(lambda: checkpoint.pretrained(init_from, "--init_from") if reads else None)
    requested = ranks.first(lambda: request(given, resumed, record, pretrained and pretrained.config, ranks))
    path = ranks.first(lambda: requested.data or default_data())
    data = ranks.each(lambda: open_data(Path(path)))
    config = ranks.first(lambda: replace(resolve(requested, data, ranks), data=path))
    loader = ranks.each(lambda: DataLoaderLite(data.train, config.seq_len, config.seed, shuffle_first=data.is_text))
    val_loader = ranks.each(lambda: DataLoaderLite(data.val, config.seq_len))
    step = first_step = record["step"] if record else 0
    if record is not None:
        different = ranks.first(lambda: changes(config, data, ranks, resumed, record))
        notes.append(f"resumed {resumed} at step {step}: {different}")
    log = ranks.each(lambda: RunLog(config) if ranks.rank == 0 else None)
    say = log.say if log else lambda line: None

    raw_model, optimizer, scaler = build(config, pretrained, resumed, ranks)
    amp = torch.autocast(config.device, getattr(torch, config.dtype), enabled=config.dtype != "float32")
    exam = None
    if config.hellaswag_every and not config.dry_run:
        exam, problem = ranks.first(lambda: load_exam(config.seq_len))
        notes += [problem] if problem else []
    tokens_left = (config.max_steps - step) * config.total_batch_size
    eager = ranks.first(lambda: why_eager(config, ranks.device, raw_model.flops_per_token() * tokens_left / ranks.size))
    for line in introduce(config, given, resumed, data, ranks, raw_model, eager) + notes:
        say(line)
    if tokens_left:
        model, B, notes = prepare(raw_model, optimizer, config, ranks, amp, compiled=eager is None)
        config = replace(config, micro_batch_size=B)
        for line in notes:
            say(line)
    if config.max_steps and not config.dry_run:  # from here on the run writes; one of no steps only evaluates
        ranks.first(lambda: log.open(resumed, step, facts(config, ranks, raw_model, data)))

    signals, saver = Signals(), checkpoint.Saver()

    def save() -> None:
        saver.wait()
        state = dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
        info = dict(requested=asdict(replace(requested, resume=None)), config=asdict(config))
        info |= dict(data=data.fingerprint, ranks=ranks.size)
        if_it_fits(
            lambda: saver.start(partial(write, step, info), raw_model, state), "the copy that a save is made from"
        )

    def write(step: int, info: dict, model: GPT, state: dict) -> None:
        try:
            say(f"step {step}: saved {checkpoint.save(log.dir, step, model, state, info)}")
            for line in checkpoint.prune(log.dir, config.keep, log.best_saved_step(before=step)):
                say(line)
        except BaseException:
            signals.received[-1] = 1.0  # all ranks stop at the end of their step
            raise

    def due(every: int) -> bool:
        return is_due(every, step, config.max_steps)

    def examine() -> None:
        raw_model.eval()
        if due(config.eval_every):
            loss = evaluate(raw_model, val_loader, config, ranks, amp)
            if log:
                log.result(step, "val", loss, "validation loss")
        if due(config.hellaswag_every) and exam is not None:
            accuracy = take_exam(raw_model, exam, config, ranks, amp)
            if log:
                log.result(step, "hella", accuracy, "HellaSwag accuracy")
        if due(config.sample_every) and log:
            with amp:
                for text in draw_samples(raw_model, ranks.device):
                    say(f"  > {text!r}")
        raw_model.train()

    B, T, W = config.micro_batch_size, config.seq_len, ranks.size
    micro_batches = loader.micro_batches(step * (config.total_batch_size // T) + ranks.rank * B, B, stride=W * B)
    peak = peak_flops(ranks.device, config.dtype)

    def take_step() -> tuple[float, float, float]:
        started = time.perf_counter()
        loss, norm = train_step(model, optimizer, scaler, micro_batches, step, config, ranks, amp, signals)
        return loss, norm, time.perf_counter() - started

    try:
        if config.dry_run and tokens_left:
            seconds = sorted(take_step()[2] for _ in range(4))[1]  # the first is slow, the fastest may be luck
            for line in forecast(seconds, step, val_loader.n_rows, config, optimizer, ranks):
                say(line)
            return 0
        while True:
            last, stopping = step == config.max_steps, signals.stopping
            if signals.failed:
                ranks.first(saver.wait)  # raises what the save failed of
            if step > first_step and (last or stopping or due(config.save_every)):
                ranks.first(save)
            if stopping:
                ranks.first(saver.wait)
                say(f"stopped by {stopping.name} after step {step - 1}; add --resume to go on")
                return 128 + stopping
            if any(map(due, (config.eval_every, config.hellaswag_every, config.sample_every))):
                examine()
            if last:
                ranks.first(saver.wait)
                signals.seen = ranks.sum(*signals.received)
                if log and log.files:
                    log.draw()
                return 128 + signals.stopping if signals.stopping else 0
            loss, norm, seconds = take_step()
            mfu = peak and config.total_batch_size * raw_model.flops_per_token() / (seconds * peak * W)
            if log:
                log.train(step, loss, learning_rate(step, config), norm, seconds, mfu)
            step += 1
    finally:
        if error := saver.close():
            complain(error)
        signals.restore()
        micro_batches.close()
        if log:
            log.close()


def complain(error: object) -> None:
    with contextlib.suppress(OSError):  # nobody may be there to read it
        print(f"train_gpt2.py: error: {error}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run with these flags; returns the exit status."""
    try:
        keep_pages()
        given = parse_flags(argv)
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0 and not given.get("dry_run")
        if restarts and given.get("resume") != "newest":
            raise UserError("torchrun --max-restarts: add --resume without DIR; a restart then takes the newest save")
        ranks = Ranks.start(given.get("device", "auto"), given.get("dist_timeout", TrainConfig.dist_timeout))
        return train(given, ranks)
    except ShardError as e:  # which the rank that read the tokens found alone
        complain(e)
        return 2
    except UserError as e:  # which all ranks know of: one speaks on each host
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            complain(e)
        return e.status
    except OSError as e:
        complain(disk_error(e))
        return 4
    except RuntimeError as e:
        if not (isinstance(e, dist.DistError) or "/gloo/" in str(e)):
            raise
        said = f"rank {os.environ['RANK']} has lost another: {first_line(e)}"
        complain(f"{said}; --resume goes on from the newest save")
        return 1
    except KeyboardInterrupt:  # before the first step: there is nothing to save
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
