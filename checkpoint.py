"""Saving a run so that nothing is lost, and finding the newest save that verifies.

A save is a directory `step_000250/` that holds a Hugging Face model (weights, config, tokenizer), `trainer_state.pt`
(what else the run needs to go on) and `checkpoint.json`: the step, the run's configuration, and size and SHA-256 of
every other file. It is written beside its place under another name, flushed to disk, and renamed: before the rename
there is no save, after it there is a whole one. Nothing here knows of ranks.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from model import GPT

UNFINISHED = ".unfinished-"  # what is being written or deleted has this before its name, and is no save


class CheckpointError(Exception):
    """A save that cannot be trusted; the message names the file, what was expected and what was found."""


class DiskError(OSError):
    """A save that could not be written; the message names the path and the bytes free there."""


def save(log_dir: Path, step: int, model: GPT, trainer_state: dict, info: dict) -> Path:
    """Write `log_dir/step_NNNNNN` and return its path; info goes into checkpoint.json as it is.

    Raises DiskError, and leaves nothing behind, if the disk is full or fails.
    """
    final = log_dir / f"step_{step:06d}"
    partial = log_dir / (UNFINISHED + final.name)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        torch.save(trainer_state, partial / "trainer_state.pt")
        files = {p.name: dict(bytes=p.stat().st_size, sha256=_sha256(p)) for p in sorted(partial.iterdir())}
        record = dict(info, step=step, files=files)
        (partial / "checkpoint.json").write_bytes(_canonical(dict(record, sha256=_digest(record))))
        for p in partial.iterdir():
            _fsync(p)
        _fsync(partial)
        partial.rename(final)
        _fsync(log_dir)
    except (OSError, RuntimeError, SafetensorError) as e:  # torch reports some full disks as RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(log_dir).free
        reason = str(e).strip().splitlines()[0]
        raise DiskError(f"{final}: could not be saved, with {free:,} bytes free on its disk: {reason}") from e
    return final


def verify(directory: Path) -> dict:
    """Read a save's checkpoint.json after checking every byte of the save against it. Raises CheckpointError."""
    path = directory / "checkpoint.json"
    try:
        content = path.read_bytes()
        record = json.loads(content)
        stated = record.pop("sha256")
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as e:
        raise CheckpointError(f"{path}: expected a save's record, found none that can be read ({e})") from None
    if stated != _digest(record) or content != _canonical(dict(record, sha256=stated)):
        raise CheckpointError(f"{path}: does not match its own SHA-256")
    for name, expected in record["files"].items():
        path = directory / name
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise CheckpointError(f"{path}: expected {expected['bytes']:,} bytes, found {size:,}")
            if _sha256(path) != expected["sha256"]:
                raise CheckpointError(f"{path}: does not match its SHA-256")
        except OSError as e:
            raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from None
    return record


def load(directory: Path) -> tuple[GPT, dict]:
    """The model and the trainer state of a save that has been verified, on the CPU."""
    return GPT.from_pretrained(directory), torch.load(
        directory / "trainer_state.pt", map_location="cpu", weights_only=True
    )


def saves(log_dir: Path) -> dict[int, Path]:
    """The saves of a run by step, oldest first; whether they verify is another question."""
    steps = {int(p.name[5:]): p for p in log_dir.glob("step_*") if re.fullmatch(r"step_\d+", p.name) and p.is_dir()}
    return dict(sorted(steps.items()))


def newest(log_dir: Path) -> tuple[Path | None, dict | None, list[str]]:
    """The newest save that verifies, its record, and why newer ones were passed over; (None, None, reasons) if none."""
    passed_over = []
    for directory in reversed(saves(log_dir).values()):
        try:
            return directory, verify(directory), passed_over
        except CheckpointError as e:
            passed_over.append(str(e))
    return None, None, passed_over


def set_aside(log_dir: Path, chosen: Path | None, step: int) -> list[str]:
    """Move out of the way what a run that goes on from the chosen save, of that step, will write again: later saves
    become `old-…`, those that do not verify `bad-…`. Returns a line for each."""
    lines = []
    for directory in [d for s, d in saves(log_dir).items() if s >= step]:
        if chosen is not None and directory.samefile(chosen):
            continue
        try:
            verify(directory)
            name = f"old-{directory.name}"
        except CheckpointError:
            name = f"bad-{directory.name}"
        taken = len(list(log_dir.glob(name + "*")))
        target = directory.rename(log_dir / (f"{name}-{taken + 1}" if taken else name))
        lines.append(f"{directory} set aside as {target.name}")
    return lines


def prune(log_dir: Path, keep: int, best_step: int | None) -> list[str]:
    """Delete all saves but the newest `keep` and that of best_step. Returns a line for each that would not go."""
    failures = []
    for step, directory in list(saves(log_dir).items())[:-keep]:
        if step == best_step:
            continue
        try:
            shutil.rmtree(directory.rename(log_dir / (UNFINISHED + directory.name)))
        except OSError as e:
            failures.append(f"{directory} could not be deleted ({e.strerror}); going on")
    return failures


def clean(log_dir: Path) -> None:
    """Remove what a process that died while saving or deleting left unfinished."""
    for p in log_dir.glob(UNFINISHED + "*"):
        shutil.rmtree(p, ignore_errors=True)


def _canonical(record: dict) -> bytes:
    return (json.dumps(record, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def _digest(record: dict) -> str:
    return hashlib.sha256(_canonical(record)).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk (Windows has no such thing for directories)."""
    if path.is_dir() and os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
