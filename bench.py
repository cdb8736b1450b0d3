"""How fast it is, as ratios: each variant in a process of its own, all in turn, several times; medians and spreads.

    python bench.py                                    everything
    python bench.py fineweb --files 'books/*.parquet'  preparation, on documents of yours, ten times over
    python bench.py hellaswag                          the exam, GPT-2 124M's shape, bfloat16

Nothing else should run meanwhile. A benchmark's last variant is what the others are compared with.
"""

import argparse
import glob
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np

import fineweb
import hellaswag
from tokens import END_OF_TEXT, gpt2_encoding

ROOT = Path(__file__).resolve().parent


# --------------------------------------------------------------------------------------------------------------------
# Preparing shards: tokens per second, from parquet files to files of tokens


def prepare(args: argparse.Namespace, gigatoken: bool) -> float:
    """fineweb.py with two threads."""
    if not gigatoken:
        fineweb.find_spec = lambda name: None
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        assert fineweb.main(["--files", *args.files * 10, "--out_dir", directory, "--num_proc", "2"]) == 0
        seconds = time.perf_counter() - started
        manifest = json.loads((Path(directory) / "manifest.json").read_text())
    return sum(shard["tokens"] for shard in manifest["shards"]) / seconds


def tokenize(text: str) -> np.ndarray:
    return np.array([END_OF_TEXT] + gpt2_encoding().encode_ordinary(text)).astype(np.uint16)


def prepare_plainly(args: argparse.Namespace) -> float:
    """A pool of two processes, a document at a time, as the known scripts have it."""
    import multiprocessing

    import pyarrow.parquet as pq

    def documents() -> Iterator[str]:
        for path in [path for pattern in args.files * 10 for path in sorted(glob.glob(pattern))]:
            for batch in pq.ParquetFile(path).iter_batches(columns=["text"]):
                yield from batch.column(0).to_pylist()

    shard_size, n, total, shards = 100_000_000, 0, 0, 0
    buffer = np.empty(shard_size, dtype=np.uint16)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory, multiprocessing.Pool(2) as pool:
        for tokens in pool.imap(tokenize, documents(), chunksize=16):
            rest = tokens[shard_size - n :]
            buffer[n : n + len(tokens) - len(rest)] = tokens[: len(tokens) - len(rest)]
            n, total = n + len(tokens) - len(rest), total + len(tokens)
            if n == shard_size:
                np.save(Path(directory) / f"{shards}.npy", buffer)
                buffer[: len(rest)] = rest
                n, shards = len(rest), shards + 1
        np.save(Path(directory) / f"{shards}.npy", buffer[:n])
        return total / (time.perf_counter() - started)


# --------------------------------------------------------------------------------------------------------------------
# HellaSwag: examples per second in bfloat16, for random weights of GPT-2 124M's shape, tokenized beforehand


def exam(args: argparse.Namespace, plainly: bool) -> float:
    import torch
    from torch.nn import functional as F

    from model import GPT, GPTConfig, keep_pages

    examples = hellaswag.read_examples(args.data, hellaswag.render_nanogpt)[::100]
    torch.manual_seed(0)
    model = GPT(GPTConfig()).eval().to(args.device)

    def one_at_a_time(examples: list[hellaswag.Example]) -> None:
        """Four padded rows an example, every logit of theirs, under an autocast of its own, as build-nanogpt has it."""
        for e in examples:
            rows = [torch.tensor(e.context + ending) for ending in e.endings]
            tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(args.device)
            with torch.no_grad(), torch.autocast(tokens.device.type, torch.bfloat16):
                logits = model(tokens)[0][:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(4, -1)
            sums = [loss[i, len(e.context) - 1 : len(row) - 1].sum() for i, row in enumerate(rows)]
            torch.stack(sums).argmin().item()

    def measure(work: Callable) -> float:
        work(examples[:8])  # warm up
        started = time.perf_counter()
        work(examples)
        return len(examples) / (time.perf_counter() - started)

    if plainly:
        return measure(one_at_a_time)
    keep_pages()  # as the script does
    model.bfloat16()
    return measure(lambda examples: hellaswag.score(model, examples, 1024))


BENCHMARKS = {
    "fineweb": (
        "tokens/s",
        {
            "fineweb.py with gigatoken": lambda args: prepare(args, gigatoken=True),
            "fineweb.py with tiktoken": lambda args: prepare(args, gigatoken=False),
            "a document at a time, Pool(2)": prepare_plainly,
        },
    ),
    "hellaswag": (
        "examples/s",
        {
            "hellaswag.py": lambda args: exam(args, plainly=False),
            "an example at a time": lambda args: exam(args, plainly=True),
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], help=f"which: {', '.join(BENCHMARKS)} (all)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each variant (5)")
    parser.add_argument("--files", nargs="+", default=[], help="parquet files for fineweb, with a column text")
    parser.add_argument("--data", type=Path, default=hellaswag.FILE, help="the HellaSwag file (%(default)s)")
    parser.add_argument("--device", default="cpu", help="where to compute (cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # a child: run this one once, and print its figure
    args = parser.parse_args()
    if args.variant:
        print("figure", BENCHMARKS[args.names[0]][1][args.variant](args))
        return
    figures = {}
    for name in args.names or BENCHMARKS:
        unit, variants = BENCHMARKS[name]
        runs: dict[str, list[float]] = {variant: [] for variant in variants}
        for _ in range(args.repeats):
            for variant, values in runs.items():
                line = [sys.executable, __file__, name, *sys.argv[1:], "--variant", variant]
                done = subprocess.run(line, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"bench.py: {name}, {variant}: {done.stderr.strip()}")
                values.append(float(done.stdout.split("figure ")[-1]))
        plain = [*runs.values()][-1]
        print(f"\n{name} ({unit})")
        for variant, values in runs.items():
            ratios = [value / base for value, base in zip(values, plain, strict=True)]
            spread = f"{min(values):,.4g} to {max(values):,.4g}"
            print(f"  {variant:32} {median(values):14,.4g}   ({spread})   × {median(ratios):.2f}")
        figures[name] = dict(unit=unit, runs=runs)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
