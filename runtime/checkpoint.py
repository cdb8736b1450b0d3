"""Checkpoints that are complete or absent, and how to find the newest one that verifies.

A checkpoint is a directory `step_000250/`: a Hugging Face model, `trainer_state.pt` (what else a run needs to resume),
the run's logs so far, and `checkpoint.json`: step, configuration, validation loss, and size and SHA-256 of every other
file. It is written under another name, flushed to disk and renamed: the rename is the commit.
"""

from errors import UserError, first_line
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import torch
from safetensors import SafetensorError

from model import GPT, GPTConfig, load_tokenizer
from runtime.device import copy_to_cpu, oom_as_user_error
from runtime.model_card import model_card
from tokens import Tokenizer, sha256

UNFINISHED = ".unfinished-"  # prefix of what is being written or deleted, which is no checkpoint
LOGS = "log.txt", "steps.csv"
RECORD = dict(step=int, ranks=int, flags=dict, config=dict, data=dict, evaluated=bool, files=dict)  # in checkpoint.json


class CheckpointError(UserError):
    """A checkpoint that cannot be trusted; the message names the file, what was expected and what was found."""


def save(log_dir: Path, model: GPT, state: dict, logs: dict[str, bytes], record: dict, tokenizer: Tokenizer) -> Path:
    """Write and return `log_dir/step_NNNNNN`. Raise UserError, and leave nothing, if the disk is full or fails."""
    final = log_dir / f"step_{record['step']:06d}"
    partial = log_dir / (UNFINISHED + final.name)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial, tokenizer)
        torch.save(state, partial / "trainer_state.pt")
        for name, content in logs.items():
            (partial / name).write_bytes(content)
        files = {p.name: dict(bytes=p.stat().st_size, sha256=sha256(p)) for p in sorted(partial.iterdir())}
        (partial / "checkpoint.json").write_bytes(encode_record(dict(record, files=files)))
        card = model_card(record, logs["log.txt"]).encode(errors="replace")
        (partial / "README.md").write_bytes(card)  # not hashed: its reader fills in the license
        for p in partial.iterdir():
            fsync(p)
        fsync(partial)
        partial.rename(final)
        fsync(log_dir)
    except (OSError, RuntimeError, SafetensorError) as e:  # torch reports some full disks as RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(log_dir).free
        raise UserError(f"{final}: could not be written: {first_line(e)} ({free:,} bytes are free there)", 4) from e
    return final


class Writer:
    """Writes one checkpoint at a time, in a thread, and deletes old ones."""

    def __init__(self, log_dir: Path, keep: int, tokenizer: Tokenizer, print_line: Callable[[str], None]):
        self.log_dir, self.keep, self.tokenizer, self.print_line = log_dir, keep, tokenizer, print_line
        self.pool = ThreadPoolExecutor(max_workers=1)
        self.writing: Future | None = None

    def start(self, config: GPTConfig, weights: dict, state: dict, record: dict, logs: dict[str, bytes]) -> None:
        """Write a checkpoint in the thread, after the one before. Nothing may change the tensors any more."""
        self.writing = self.pool.submit(self.write, config, dict(weights=weights, state=state), record, logs)

    def write(self, config: GPTConfig, tree: dict, record: dict, logs: dict[str, bytes]) -> None:
        """Write a checkpoint, then delete old ones."""
        with oom_as_user_error("the copy that a checkpoint is written from"):
            on_cpu = copy_to_cpu(tree)
        tree.clear()  # the last references to copies on a GPU
        model = GPT.from_weights(config, on_cpu["weights"])
        directory = save(self.log_dir, model, on_cpu["state"], logs, record, self.tokenizer)
        self.print_line(f"step {record['step']}: saved {directory}")
        prune(self.log_dir, self.keep, self.print_line)

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint could not be written."""
        return self.writing is not None and self.writing.done() and self.writing.exception() is not None

    def wait(self) -> None:
        """Wait until nothing is being written. Raise what write raised."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def close(self) -> BaseException | None:
        """Wait; return an error that wait() has not raised, because the run has ended by another one."""
        self.pool.shutdown()
        return self.writing and self.writing.exception()


def prune(log_dir: Path, keep: int, print_line: Callable[[str], None]) -> None:
    """Delete all checkpoints but the newest `keep` and the best by validation loss. Print each failure."""
    directories = list(checkpoints(log_dir).values())
    losses = {}
    for directory in directories:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # it may be damaged
            losses[directory] = float(json.loads((directory / "checkpoint.json").read_bytes())["validation_loss"])
    best = min(losses, key=losses.get, default=None)
    for directory in directories[:-keep]:
        if directory != best:
            try:
                shutil.rmtree(directory.rename(log_dir / (UNFINISHED + directory.name)))
            except OSError as e:
                print_line(f"{directory}: could not be deleted ({e.strerror}); the run continues")


def clean(log_dir: Path) -> None:
    """Remove what a process left unfinished that died while it wrote or deleted a checkpoint."""
    for p in log_dir.glob(UNFINISHED + "*"):
        shutil.rmtree(p, ignore_errors=True)


def archive(log_dir: Path, resume_from: Path | None, step: int) -> Path | None:
    """Move the checkpoints after step, or the whole run if resume_from is not of it, to `old-<date-time>/`; return that
    if there was something to move. Other files stay."""
    if resume_from is not None and resume_from.parent.samefile(log_dir):
        files = [p for n, p in checkpoints(log_dir).items() if n > step and not p.samefile(resume_from)]
    else:
        names = [*LOGS, "run.json", "curves.png"]
        if (log_dir / "wandb/id.txt").is_file():
            names.append("wandb")
        files = [p for name in names if (p := log_dir / name).exists()] + [*checkpoints(log_dir).values()]
    if not files:
        return None
    old = log_dir / f"old-{datetime.now():%Y%m%d-%H%M%S-%f}"
    old.mkdir()
    for p in files:
        p.rename(old / p.name)
    return old


def checkpoints(log_dir: Path) -> dict[int, Path]:
    """Return the checkpoints of a run by step, oldest first, whether they verify or not."""
    steps = {int(p.name[5:]): p for p in log_dir.glob("step_*") if re.fullmatch(r"step_\d+", p.name) and p.is_dir()}
    return dict(sorted(steps.items()))


def newest(log_dir: Path) -> tuple[Path | None, dict | None, list[str]]:
    """Return the newest checkpoint that verifies, its record, and why newer ones were skipped; (None, None, []) if
    there are no checkpoints. Raise CheckpointError if there are some and none verifies."""
    directories = checkpoints(log_dir)
    skipped = []
    for directory in reversed(directories.values()):
        try:
            return directory, verify(directory), skipped
        except CheckpointError as e:
            skipped.append(str(e))
    if skipped:
        message = f"--resume: none of the {len(skipped)} checkpoints in {log_dir} verifies: {skipped[0]}"
        raise CheckpointError(f"{message}; restore one, or start a new run without --resume")
    return None, None, []


def verify(directory: Path) -> dict:
    """Return the record of a checkpoint after checking every file against it. Raise CheckpointError."""
    record = read_record(directory / "checkpoint.json")
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


def read_record(path: Path) -> dict:
    """Return the content of a checkpoint.json that is what a run has written. Raise CheckpointError."""
    try:
        content = path.read_bytes()
        record = json.loads(content)
        del record["sha256"]
        if content != encode_record(record):
            raise ValueError("does not match its own SHA-256")
        for key, kind in RECORD.items():
            if type(record[key]) is not kind:
                raise ValueError(f"{key} is {record[key]!r}")
        if record["step"] < 1 or not {"model.safetensors", "trainer_state.pt", *LOGS} <= record["files"].keys():
            raise ValueError("a step or a file is missing")
        for name, file in record["files"].items():
            if Path(name).name != name or {type(file["bytes"]), type(file["sha256"])} != {int, str}:
                raise ValueError(f"{name!r} is not a file of a checkpoint")
        return record
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as e:
        problem = f"lacks {e}" if isinstance(e, KeyError) else getattr(e, "strerror", None) or first_line(e)
        raise CheckpointError(f"{path}: cannot be read as the record of a checkpoint ({problem})") from None


def load(directory: Path) -> tuple[GPT, dict]:
    """Return model and trainer state of a checkpoint, on the CPU. Raise UserError. Code in the files never runs."""
    with errors_of(f"{directory}: cannot be loaded"):
        state = torch.load(directory / "trainer_state.pt", map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not {"optimizer", "scaler"} <= state.keys():
            raise ValueError("trainer_state.pt holds no optimizer and scaler")
        return GPT.from_pretrained(directory), state


def newest_model() -> str:
    """Return the directory of the newest checkpoint in log/. Raise UserError if there is none."""
    directories = [*checkpoints(Path("log")).values()]
    if not directories:
        raise UserError("no checkpoint in log/: train a model with python train_gpt2.py, or try --model gpt2")
    return str(directories[-1])


def load_model(flag: str, name_or_dir: str | Path) -> tuple[GPT, Tokenizer]:
    """Return the model that this flag names, a directory or a name on the hub, and its tokenizer."""
    with errors_of(f"{flag} {name_or_dir}: cannot be loaded as a GPT-2"):
        model = GPT.from_pretrained(name_or_dir)
        return model, load_tokenizer(name_or_dir, model.config.vocab_size)


@contextlib.contextmanager
def errors_of(what: str) -> Iterator[None]:
    """Raise UserError for whatever a hub's client may raise, or files that are not what they should be."""
    try:
        yield
    except Exception as e:
        raise UserError(f"{what}: {first_line(e)}") from None


def encode_record(record: dict) -> bytes:
    """Return the bytes of checkpoint.json, which are the same for equal records: the record and its SHA-256."""
    options = dict(sort_keys=True, indent=1, allow_nan=False)
    sha256 = hashlib.sha256((json.dumps(record, **options) + "\n").encode()).hexdigest()
    return (json.dumps(dict(record, sha256=sha256), **options) + "\n").encode()


def fsync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot flush directories
        return
    fd = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if not (path.is_dir() and e.errno == errno.EINVAL):  # some network file systems cannot, either
            raise
    finally:
        os.close(fd)
