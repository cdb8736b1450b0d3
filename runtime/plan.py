"""From flags, preset, checkpoint and data to the configuration of a run."""

from errors import UserError

import math
import os
from dataclasses import asdict, replace
from pathlib import Path

from data import Data
from model import GPTConfig
from recipe import PRESETS, TrainConfig
from runtime import checkpoint
from runtime.device import choose_dtype, rows_that_fit
from runtime.distributed import Ranks

ROOT = Path(__file__).resolve().parent.parent


# What may not change when a run is resumed: with any of these changed it would be another run.
FIXED = (
    "n_layer n_head n_embd bias init_from max_steps total_batch_size seq_len max_lr min_lr schedule decay_share "
    "warmup_steps optimizer muon_ratio weight_decay grad_clip dropout seed"
).split()


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
