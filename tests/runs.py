"""Runs of train_gpt2.py that are as small as they get, and what they left, changed by somebody with bad intentions."""

from errors import run_script
import hashlib
import json
from pathlib import Path

import numpy as np

import train_gpt2

ROOT = Path(__file__).resolve().parent.parent

# 1 layer, 8 wide, 16 tokens, 2 sequences a step, in float32 and eager: a run takes a second.
TINY = (
    "--n_layer 1 --n_head 2 --n_embd 8 --seq_len 16 --total_batch_size 32 --max_steps 8 --max_lr 1e-3 --data data "
    "--dtype float32 --compile off --device cpu --eval_every 4 --eval_tokens 64 --sample_every 0 --save_every 4 "
    "--dist_timeout 8"
).split()

# The parts of a checkpoint's record that hold options.
ASKED = {"flags", "config"}


def train(*flags, status: int = 0) -> None:
    """Run train_gpt2.py to its end in this process and check its exit status."""
    assert run_script(train_gpt2.main, [*map(str, flags)]) == status


def tree(directory: Path) -> dict[str, bytes]:
    """The files below a directory; a lock is none of a run's."""
    paths = (p for p in directory.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(directory)): p.read_bytes() for p in paths}


def assert_one_line(err: str) -> None:
    assert err.startswith("train_gpt2.py: error: ") and err.count("\n") == 1


def write_shards(directory: Path, names: tuple = ("x_train_000001.npy", "x_train_000002.npy", "x_val_000000.npy")):
    directory.mkdir(parents=True)
    for i, name in enumerate(names):
        np.save(directory / name, np.random.default_rng(i).integers(0, 5000, 1000).astype(np.uint16))


def rewrite_record(directory: Path, change) -> None:
    """Change a checkpoint's record, by somebody who knows how to make its hash right."""
    path = directory / "checkpoint.json"
    record = json.loads(path.read_text())
    del record["sha256"]
    record = change(record) or record

    def canonical(record: dict) -> bytes:
        return (json.dumps(record, sort_keys=True, indent=1) + "\n").encode()

    path.write_bytes(canonical(record | dict(sha256=hashlib.sha256(canonical(record)).hexdigest())))


def compiling_above(flops: float) -> str:
    """Code that is train_gpt2.py but for --compile auto, which compiles runs of more floating-point operations."""
    return f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train_gpt2
from errors import run_script
pays = next(vars(m)["COMPILE_PAYS"] for m in [*sys.modules.values()] if "COMPILE_PAYS" in getattr(m, "__dict__", {{}}))
pays["cpu"] = {flops}
sys.exit(run_script(train_gpt2.main))
"""
