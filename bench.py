"""Measure speed as ratios: run each variant in its own process, all in turn, several times; print the medians.

    python bench.py                                    all but fineweb, which needs documents
    python bench.py small 124M                         training: tokens per second
    python bench.py memory generate hellaswag          GPT-2 124M: peak memory, generation, HellaSwag
    python bench.py optimizer                          what Muon adds to a step of small
    python bench.py fineweb --files 'books/*.parquet'  preparation of token shards, from your documents ten times over

Nothing else should run meanwhile. The last variant of a benchmark is its baseline. All variants have random weights and
the fastest precision of the device.
"""

from errors import UserError, run_script

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import fineweb
import hellaswag
import train_gpt2
from model import GPT, GPTConfig, sample
from recipe import PRESETS, TrainConfig
from runtime.device import choose_device, choose_dtype, peak_memory, tune_malloc
from runtime.files import write_atomically
from runtime.options import input_file, option, output_file, parse_options
from tokens import END_OF_TEXT, VOCAB_SIZE, gpt2_encoding

ROOT = Path(__file__).resolve().parent
SCRIPT = __file__  # what a child runs


def seconds(work: Callable, *args) -> float:
    """Return how long work(*args) takes."""
    started = time.perf_counter()
    work(*args)
    return time.perf_counter() - started


# --------------------------------------------------------------------------------------------------------------------
# Training: tokens per second, and the peak of memory in GB, of steps of one micro-batch

SHAPES = {"small": ("small", 8), "124M": ("gpt2", 2), "memory": ("gpt2", 4), "optimizer": ("small", 32)}
GPT2 = GPTConfig()  # 124M, which generates and is evaluated


def shape_of(name: str) -> tuple[int, GPTConfig]:
    """Return the sequences of a micro-batch, and the network."""
    preset, B = SHAPES[name]
    c = TrainConfig(**PRESETS[preset])
    return B, GPTConfig(block_size=c.seq_len, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)


def train(args: "Options", name: str, compiled: bool = True, tuned: bool = True, optimizer: str = "adamw") -> float:
    """Run four steps of train_gpt2.py itself, as a dry run; return tokens per second, or for memory the peak in GB."""
    preset, (B, shape) = SHAPES[name][0], shape_of(name)
    if not tuned:
        train_gpt2.tune_malloc = lambda: None
    flags = dict(preset=preset, micro_batch_size=B, total_batch_size=B * shape.block_size, data=ROOT / "input.txt")
    flags |= dict(device=args.device.type, compile="on" if compiled else "off", optimizer=optimizer)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert train_gpt2.main(["--dry_run", *(f"--{key}={value}" for key, value in flags.items())]) == 0
    if name == "memory":
        return float(re.search(r"memory +([\d.]+) GB", output.getvalue())[1])
    return B * shape.block_size / float(re.search(r"([\d.e+]+) s a step", output.getvalue())[1])


def measure_loop(args: "Options", name: str, loss_of: Callable, optimizer: torch.optim.Optimizer) -> float:
    """Return the same figure for a straightforward loop."""
    B, shape = shape_of(name)
    rows = torch.randint(VOCAB_SIZE, (B, shape.block_size + 1), device=args.device)
    x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step() -> None:
        optimizer.zero_grad()
        with autocast(args):
            loss = loss_of(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        loss.item()

    step()  # warm up
    median_seconds = sorted(seconds(step) for _ in range(4))[1]  # as in a dry run
    if name == "memory":
        return peak_memory(args.device) / 1e9
    return B * shape.block_size / median_seconds


def autocast(args: "Options") -> torch.autocast:
    return torch.autocast(args.device.type, args.dtype, enabled=args.dtype != torch.float32)


def transformers_model(config: GPTConfig) -> torch.nn.Module:
    """Return transformers' GPT-2 of this shape, with random weights, SDPA and no dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(**config.to_hf(), attn_implementation="sdpa"))


def train_transformers(args: "Options", name: str) -> float:
    """Train transformers' GPT-2, eager with autocast, with the default AdamW and the default allocator."""
    model = transformers_model(shape_of(name)[1]).to(args.device).train()

    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())

    return measure_loop(args, name, loss_of, torch.optim.AdamW(model.parameters(), lr=6e-4))


def train_build_nanogpt(args: "Options", name: str) -> float:
    """Train the network of karpathy/build-nanogpt with its optimizer: the part of its script before the data."""
    source = (args.peer / "train_gpt2.py").read_text(encoding="utf-8")
    network = source.split("\nimport tiktoken")[0].replace("from hellaswag import", "# from hellaswag import")
    peer = dict(__name__="peer", master_process=False)
    exec(network, peer)
    c = shape_of(name)[1]
    shape = dict(block_size=c.block_size, vocab_size=50304, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)
    model = peer["GPT"](peer["GPTConfig"](**shape)).to(args.device)
    optimizer = model.configure_optimizers(0.1, 6e-4, args.device.type)
    return measure_loop(args, name, lambda x, y: model(x, y)[1], optimizer)


def multiply(args: "Options", name: str) -> float:
    """Return the tokens per second that the device could train on if it only multiplied square matrices."""
    n = 8192 if args.device.type == "cuda" else 2048
    A, B = (torch.randn(n, n, device=args.device, dtype=args.dtype) for _ in range(2))
    torch.set_float32_matmul_precision("high")
    durations = [seconds(lambda: (A @ B)[0, 0].item()) for _ in range(12)]
    with torch.device("meta"):
        flops_per_token = GPT(shape_of(name)[1]).flops_per_token()
    return 2 * n**3 / median(durations[2:]) / flops_per_token


CEILING = "matrix products alone"


def training(name: str) -> dict[str, Callable]:
    """Return the variants of a training benchmark."""
    return {
        "train_gpt2.py": partial(train, name=name),
        "… uncompiled": partial(train, name=name, compiled=False),
        "… and with the default allocator": partial(train, name=name, compiled=False, tuned=False),
        CEILING: partial(multiply, name=name),
        "build-nanogpt": partial(train_build_nanogpt, name=name),
        "transformers, eager baseline": partial(train_transformers, name=name),
    }


# --------------------------------------------------------------------------------------------------------------------
# Generation: new tokens per second of GPT-2 124M, four sequences of 32 tokens continued by 64


def generate(args: "Options", how: str, dtype: torch.dtype | None = None) -> float:
    idx = torch.randint(VOCAB_SIZE, (4, 32), device=args.device)

    def loop(n: int) -> torch.Tensor:
        """Compute the whole sequence again for each token, as build-nanogpt does."""
        tokens = idx
        for _ in range(n):
            with torch.no_grad(), autocast(args):
                logits = model(tokens)[0][:, -1]
            tokens = torch.cat((tokens, sample(logits, top_k=50)[:, None]), dim=1)
        return tokens

    if how == "transformers":
        model = transformers_model(GPT2).eval().to(args.device, dtype)
        options = dict(do_sample=True, top_k=50, pad_token_id=END_OF_TEXT)
        run = lambda n: model.generate(idx, max_new_tokens=n, min_new_tokens=n, **options)  # noqa: E731
    else:
        model = GPT(GPT2).eval().to(args.device)
        run = loop
        if how == "ours":
            tune_malloc()
            model.to(args.dtype)
            run = lambda n: model.generate(idx, n, top_k=50)  # noqa: E731
    run(8)  # warm up
    return 4 * 64 / seconds(lambda: run(64)[0, -1].item())


# --------------------------------------------------------------------------------------------------------------------
# Preparing shards: tokens per second, from parquet files to files of tokens


SHARD_SIZE = 100_000_000  # tokens


def prepare(args: "Options", gigatoken: bool) -> float:
    """Run fineweb.py with two threads."""
    if not gigatoken:
        fineweb.find_spec = lambda name: None
    with tempfile.TemporaryDirectory() as directory:
        flags = f"--out_dir={directory} --num_proc=2 --shard_size={SHARD_SIZE} --files".split()
        duration = seconds(fineweb.main, [*flags, *map(str, args.files * 10)])
        manifest = json.loads((Path(directory) / "manifest.json").read_text())
    return sum(shard["tokens"] for shard in manifest["shards"]) / duration


def tokenize(text: str) -> np.ndarray:
    return np.array([END_OF_TEXT] + gpt2_encoding().encode_ordinary(text)).astype(np.uint16)


def prepare_with_pool(args: "Options") -> float:
    """Tokenize a document at a time in a pool of two processes, as the known scripts do."""
    import multiprocessing

    import pyarrow.parquet as pq

    def documents() -> Iterator[str]:
        for path in args.files * 10:
            for batch in pq.ParquetFile(path).iter_batches(columns=["text"]):
                yield from batch.column(0).to_pylist()

    parts, n, total, shards = [], 0, 0, 0
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory, multiprocessing.Pool(2) as pool:
        for tokens in pool.imap(tokenize, documents(), chunksize=16):
            parts.append(tokens)
            n, total = n + len(tokens), total + len(tokens)
            if n >= SHARD_SIZE:
                np.save(Path(directory) / f"{shards}.npy", np.concatenate(parts))
                parts, n, shards = [], 0, shards + 1
        np.save(Path(directory) / f"{shards}.npy", np.concatenate(parts))
        return total / (time.perf_counter() - started)


# --------------------------------------------------------------------------------------------------------------------
# HellaSwag: examples per second of GPT-2 124M, tokenized beforehand


def evaluate(args: "Options", one_at_a_time: bool) -> float:
    examples = hellaswag.read_examples(args.data, hellaswag.render_nanogpt)[::100]
    torch.manual_seed(0)
    model = GPT(GPT2).eval().to(args.device)

    def score_one_at_a_time(examples: list[hellaswag.Example]) -> None:
        """Compute all logits of four padded sequences per example, under autocast, as build-nanogpt does."""
        for e in examples:
            rows = [torch.tensor(e.context + ending) for ending in e.endings]
            tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(args.device)
            with torch.no_grad(), autocast(args):
                logits = model(tokens)[0][:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(4, -1)
            sums = [loss[i, len(e.context) - 1 : len(row) - 1].sum() for i, row in enumerate(rows)]
            torch.stack(sums).argmin().item()

    if one_at_a_time:
        work = score_one_at_a_time
    else:
        tune_malloc()  # as the script does
        model.to(args.dtype)
        work = lambda examples: hellaswag.score(model, examples, 1024)  # noqa: E731
    work(examples[:8])  # warm up
    return len(examples) / seconds(work, examples)


UNITS = {"memory": "GB", "hellaswag": "examples/s"}  # of the others, tokens/s
BENCHMARKS = {
    "small": training("small"),
    "124M": training("124M"),
    "memory": {variant: measure for variant, measure in training("memory").items() if variant != CEILING},
    "generate": {
        "GPT.generate": partial(generate, how="ours"),
        "transformers.generate, float32": partial(generate, how="transformers", dtype=torch.float32),
        "transformers.generate, bfloat16": partial(generate, how="transformers", dtype=torch.bfloat16),
        "without a cache": partial(generate, how="loop"),
    },
    "fineweb": {
        "fineweb.py with gigatoken": partial(prepare, gigatoken=True),
        "fineweb.py with tiktoken": partial(prepare, gigatoken=False),
        "a document at a time, Pool(2)": prepare_with_pool,
    },
    "hellaswag": {
        "hellaswag.py": partial(evaluate, one_at_a_time=False),
        "an example at a time": partial(evaluate, one_at_a_time=True),
    },
    "optimizer": {
        f"--optimizer {which}": partial(train, name="optimizer", optimizer=which) for which in ("muon", "adamw")
    },
}


@dataclass(frozen=True)
class Options:
    names: tuple[str, ...] = option((), f"some of {', '.join(BENCHMARKS)}", positional=True, metavar="NAME")
    repeats: int = option(5, "number of runs of each variant", low=1, high=1000, metavar="N")
    files: tuple[str, ...] = option((), "parquet files for fineweb, with a column text", metavar="FILE")
    data: Path | None = option(None, "HellaSwag file (default: as hellaswag.py)", type=input_file, metavar="FILE")
    peer: Path | None = option(None, "a checkout of karpathy/build-nanogpt to measure, too", metavar="DIR")
    device: str | torch.device = option("auto", "cpu, cuda, or auto for the fastest", metavar="DEVICE")
    json: Path | None = option(None, "write all figures to this file", type=output_file, metavar="FILE")
    variant: str | None = option(None, "in a child process: run this variant once and print its figure", hidden=True)

    @property
    def dtype(self) -> torch.dtype:
        """Return the fastest precision of the device."""
        return getattr(torch, choose_dtype("auto", self.device.type))


def parse_arguments(argv: list[str] | None) -> Options:
    """Return the options, with files, device and the names of the benchmarks found. Raise UserError."""
    args = Options(**parse_options(Options, argv, __doc__))
    names = args.names or [name for name in BENCHMARKS if args.files or name != "fineweb"]
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise UserError(f"{', '.join(unknown)}: no such benchmark; there are {', '.join(BENCHMARKS)}")
    if "fineweb" in names and not args.files:
        raise UserError("fineweb: needs documents, --files")
    files = fineweb.expand(args.files)
    if other := [path for path in files if path.suffix != ".parquet"]:
        raise UserError(f"--files {other[0]}: is not a .parquet file")
    if args.peer and not os.path.isfile(args.peer / "train_gpt2.py"):
        raise UserError(f"--peer {args.peer}: there is no train_gpt2.py in it")
    if args.variant and args.variant not in BENCHMARKS[names[0]]:
        raise UserError(f"--variant {args.variant}: no such variant of {names[0]}")
    device = torch.device(choose_device(args.device))
    data = args.data or (hellaswag.find_file() if "hellaswag" in names else None)
    return replace(args, names=names, files=files, data=data, device=device)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmarks, each variant in a child process, and print their tables. Raise UserError."""
    args = parse_arguments(argv)
    if args.variant:
        torch.manual_seed(0)
        print("figure", BENCHMARKS[args.names[0]][args.variant](args))
        return 0
    print(f"{args.device}, {torch.get_num_threads()} threads, {args.dtype}, torch {torch.__version__}", flush=True)
    figures = {}
    for name in args.names:
        runs: dict[str, list[float]] = {v: [] for v in BENCHMARKS[name] if args.peer or v != "build-nanogpt"}
        with tqdm(total=args.repeats * len(runs), leave=False, disable=None) as bar:  # on a terminal
            for variant in [*runs] * args.repeats:
                bar.set_description(f"{name}: {variant}")
                runs[variant].append(measure_in_child(args, name, variant))
                bar.update()
        unit = UNITS.get(name, "tokens/s")
        print_table(name, unit, runs)
        figures[name] = dict(unit=unit, runs=runs)
    if args.json:
        about = dict(device=str(args.device), dtype=str(args.dtype), torch=torch.__version__)
        with write_atomically(args.json) as f:
            f.write((json.dumps(about | figures, indent=1) + "\n").encode())
    return 0


def measure_in_child(args: "Options", name: str, variant: str) -> float:
    """Run a variant once, in a process of its own, and return its figure. Raise UserError."""
    options = dict(variant=[variant], device=[args.device], files=args.files, data=[args.data], peer=[args.peer])
    line = [[f"--{key}", *map(str, value)] for key, value in options.items() if any(value)]
    done = subprocess.run(
        [sys.executable, SCRIPT, name, *sum(line, [])], capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError(f"{name}, {variant}: {reason[-1]}", 1)
    return float(done.stdout.split("figure ")[-1])


def print_table(name: str, unit: str, runs: dict[str, list[float]]) -> None:
    print(f"\n{name} ({unit})")
    baseline = [*runs.values()][-1]
    for variant, values in runs.items():
        ratio = median(value / base for value, base in zip(values, baseline, strict=True))
        spread = f"{min(values):,.4g} to {max(values):,.4g}"
        fraction = f", {median(values) / median(runs[CEILING]):.0%} of the matrix rate" if CEILING in runs else ""
        print(f"  {variant:34} {median(values):12,.4g}   ({spread})   × {ratio:.2f}{fraction}")


if __name__ == "__main__":
    sys.exit(run_script(main))
