"""Saving a run so that nothing is lost, and finding the newest save that verifies.

A save is a directory `step_000250/` that holds a Hugging Face model (weights, config, tokenizer), `trainer_state.pt`
(what else the run needs to go on) and `checkpoint.json`: the step, the run's configuration, and size and SHA-256 of
every other file. It is written beside its place under another name, flushed to disk, and renamed: before the rename
there is no save, after it there is a whole one. Nothing here knows of ranks.
"""

from errors import UserError

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.utils._pytree import tree_map_only

from model import GPT, GPT2_VOCAB_SIZE
from tokens import first_line, sha256

UNFINISHED = ".unfinished-"  # what is being written or deleted has this before its name, and is no save


class CheckpointError(UserError):
    """A save that cannot be trusted; the message names the file, what was expected and what was found."""


class DiskError(OSError):
    """A save, or a line of a log, that could not be written; the message names the path and what was wrong."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


def pretrained(name_or_dir: str | Path, flag: str) -> GPT:
    """The model with GPT-2's vocabulary that this flag names, by its directory or on the hub. Raises UserError."""
    try:
        model = GPT.from_pretrained(name_or_dir)
    except Exception as e:  # whatever a hub's client may raise, or a file that is no model
        raise UserError(f"{flag} {name_or_dir}: no GPT-2 there, or out of reach: {first_line(e)}") from None
    if model.config.vocab_size < GPT2_VOCAB_SIZE:
        raise UserError(f"{flag} {name_or_dir}: has {model.config.vocab_size} tokens, not GPT-2's {GPT2_VOCAB_SIZE}")
    return model


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
        files = {p.name: dict(bytes=p.stat().st_size, sha256=sha256(p)) for p in sorted(partial.iterdir())}
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
        raise DiskError(errno.EIO, f"could not be saved: {first_line(e)} ({free:,} bytes are free there)", final) from e
    return final


class Saver:
    """Writes one save at a time, in a thread and from a copy of the state: training waits for that copy, and for the
    save before this one if it is still being written, but not for the disk."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(max_workers=1)
        self.writing: Future | None = None

    def start(self, write: Callable[[GPT, dict], None], model: GPT, trainer_state: dict) -> None:
        """Call write on copies of both, in the thread; what was started before must have been waited for."""
        with torch.device("meta"):  # shapes alone; the copied weights take their places
            copy = GPT(model.config)
        weights, trainer_state = tree_map_only(
            torch.Tensor, lambda t: t.detach().to("cpu", copy=True), (model.state_dict(), trainer_state)
        )
        copy.load_state_dict(weights, assign=True)
        self.writing = self.pool.submit(write, copy, trainer_state)

    def wait(self) -> None:
        """Until nothing is being written any more. Raises what write raised."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def close(self) -> BaseException | None:
        """Wait, for good; what write raised, if that is not known yet, is returned and not raised."""
        self.pool.shutdown()
        return self.writing and self.writing.exception()


def verify(directory: Path) -> dict:
    """Read a save's checkpoint.json after checking every byte of the save against it. Raises CheckpointError."""
    path = directory / "checkpoint.json"
    try:
        content = path.read_bytes()
        record = json.loads(content)
        stated = record.pop("sha256")
        intact = stated == _digest(record) and content == _canonical(dict(record, sha256=stated))
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as e:
        raise CheckpointError(f"{path}: expected a save's record, found none that can be read ({e})") from None
    if not intact:
        raise CheckpointError(f"{path}: does not match its own SHA-256")
    for name, expected in record["files"].items():
        path = directory / name
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise CheckpointError(f"{path}: expected {expected['bytes']:,} bytes, found {size:,}")
            if sha256(path) != expected["sha256"]:
                raise CheckpointError(f"{path}: does not match its SHA-256")
        except OSError as e:
            raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from None
    return record


def load(directory: Path) -> tuple[GPT, dict]:
    """The model and the trainer state of a save that has been verified, on the CPU. Raises CheckpointError if the files
    are what was written, but not what a run writes; code in them is refused and never runs."""
    try:
        state = torch.load(directory / "trainer_state.pt", map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not {"optimizer", "scaler"} <= state.keys():
            raise ValueError("trainer_state.pt holds no optimizer and scaler")
        return GPT.from_pretrained(directory), state
    except (OSError, ValueError, EOFError, RuntimeError, pickle.UnpicklingError) as e:
        raise CheckpointError(f"{directory}: cannot be loaded ({first_line(e)})") from None


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


def set_aside(log_dir: Path, chosen: Path, step: int) -> list[str]:
    """Move out of the way what a run that goes on from the chosen save, of that step, will write again: later saves
    become `old-…`, and those that do not verify, of any step, `bad-…`. Returns a line for each."""
    lines = []
    for other_step, directory in saves(log_dir).items():
        if directory.samefile(chosen):
            continue
        try:
            verify(directory)
            if other_step < step:
                continue
            name = f"old-{directory.name}"
        except CheckpointError:
            name = f"bad-{directory.name}"
        taken = len(list(log_dir.glob(name + "*")))
        target = directory.rename(log_dir / (f"{name}-{taken + 1}" if taken else name))
        lines.append(f"{directory} set aside as {target.name}")
    return lines


def archive(log_dir: Path) -> Path | None:
    """Move the files of the run that lies here, and nothing else, to `old-<date-time>/`; returns that, if any did."""
    patterns = "log.txt", "steps.csv", "run.json", "curves.png", "wandb", "step_*", "old-step_*", "bad-step_*"
    files = [p for pattern in patterns for p in log_dir.glob(pattern)]
    if not files:
        return None
    old = log_dir / f"old-{datetime.now():%Y%m%d-%H%M%S-%f}"
    old.mkdir()
    for p in files:
        p.rename(old / p.name)
    return old


def cut_log(path: Path, step: int, kept: tuple[str, ...] = ()) -> None:
    """Keep of a log the whole lines of earlier steps, and of this one those of the kinds that are named: the run that
    goes on from here writes the others again."""
    if path.exists():
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            whole = re.fullmatch(r"(\d+)[ ,](\S+).*\n", line)
            if (
                line.startswith("step,")
                or whole
                and (int(whole[1]) < step or int(whole[1]) == step and whole[2] in kept)
            ):
                lines.append(line)
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(lines), encoding="utf-8")
        partial.replace(path)


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


def _fsync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk (Windows has no such thing for directories)."""
    if path.is_dir() and os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
