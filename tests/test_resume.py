"""A resumed run is the run that was not interrupted, and what a checkpoint promises is there."""

import csv
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import read_log, weights
from runs import ASKED, TINY, assert_one_line, compiling_above, rewrite_record, train, tree, write_shards


def assert_same_run(log: Path, whole: Path) -> None:
    """Each loss and the last weights bit for bit, each step logged once."""
    for kind in "train", "val":
        assert read_log(log, kind) == read_log(whole, kind)
    assert weights(log) == weights(whole)
    rows = [[*csv.reader(open(directory / "steps.csv"))] for directory in (log, whole)]
    assert [row[:5] for row in rows[0]] == [row[:5] for row in rows[1]]  # the sixth is seconds


# Bitwise


# Compiled or not can be seen in the losses.
SCALED = """
import functools, torch

def scaled(graph, example_inputs):
    return lambda *args: tuple(1.01 * t for t in graph(*args))

torch.compile = functools.partial(torch.compile, backend=scaled)
"""


def test_compile_auto_is_decided_for_the_whole_run(here, finished, launch):
    """The whole is 8 steps; for the 4 that a resumed run has left, compiling alone would not pay."""
    flags = *TINY, "--compile", "auto"
    fault = SCALED + compiling_above(6 * 32 * 6 * 50304 * 8)  # 6 steps of 32 tokens, at 6 a token and parameter
    shutil.rmtree("log")
    whole = launch(*flags, fault=fault)
    assert "not compiled" not in whole.stdout and read_log(here / "log") != read_log(finished / "log")
    shutil.copytree("log", "whole")
    shutil.rmtree("log/step_000008")
    resumed = launch("--resume", fault=fault)
    assert "not compiled" not in resumed.stdout and "at step 4: nothing changed" in resumed.stdout
    assert_same_run(here / "log", here / "whole")


def test_resume_on_three_ranks_is_bitwise(here, launch):
    """DDP arranges its buckets anew after its first step; of three summands the order counts."""
    flags = *TINY, "--total_batch_size", 48, "--max_steps", 4, "--save_every", 2, "--dist_timeout", 60
    shutil.rmtree("log")
    launch(*flags, ranks=3)
    shutil.copytree("log", "whole")
    shutil.rmtree("log/step_000004")
    assert "at step 2: nothing changed" in launch(*flags, "--resume", ranks=3).stdout
    assert_same_run(here / "log", here / "whole")


# Ranks


def test_ranks_with_different_shards_are_refused(tmp_path, launch):
    """As on two hosts, of which one lacks a shard."""
    write_shards(tmp_path / "0/data")
    write_shards(tmp_path / "1/data", ("x_train_000001.npy", "x_val_000000.npy"))
    before = tree(tmp_path)
    done = launch(*TINY, ranks=2, cwd=tmp_path, fault="import os; os.chdir(str(rank))", status=2)
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.startswith("train_gpt2.py: error: ") and "data" in line
    assert "step 0" not in done.stdout and tree(tmp_path) == before


SLOW_DISK = """
import os, time
fsync = os.fsync
if rank == 0:
    os.fsync = lambda fd: (time.sleep(1), fsync(fd))
"""


def test_slow_last_checkpoint_is_not_lost(here, launch):
    """Flushing its nine files and directories takes longer than a rank waits for another."""
    shutil.rmtree("log")
    launch(*TINY, "--save_every", 0, "--max_steps", 1, "--dist_timeout", 6, ranks=2, fault=SLOW_DISK)
    assert sorted(p.name for p in here.glob("log/*step_*")) == ["step_000001"]
    train("--resume", "log/step_000001", "--dry_run")  # it verifies


SLOW_HASHING = """
import hashlib, time
file_digest = hashlib.file_digest
if rank == 0:
    hashlib.file_digest = lambda *args: (time.sleep(1.2), file_digest(*args))[1]
"""


def test_slow_start_of_the_main_rank_is_waited_for(here, launch):
    done = launch("--resume", "--dist_timeout", 6, ranks=2, fault=SLOW_HASHING)
    assert "at step 8" in done.stdout


HANGING = """
import time
import torch
if rank == 1:
    torch.optim.AdamW.step = lambda *args, **kwargs: time.sleep(30)
"""


def test_resume_remembers_dist_timeout(here, launch):
    """A rank that hangs ends the other after the 8 seconds that the run was started with."""
    shutil.rmtree("log/step_000008")
    done = launch("--resume", ranks=2, fault=HANGING, status=None, timeout=30)
    assert done.statuses == [1, -signal.SIGKILL] and "error: rank 0 has lost another" in done.stderr


def test_resume_remembers_the_device(here, capsys, monkeypatch):
    shutil.rmtree("log/step_000008")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    train("--resume", "--dist_timeout", 9)
    assert "at step 4: dist_timeout 8.0 → 9.0\n" in capsys.readouterr().out
    assert json.loads(Path("log/run.json").read_text())["config"]["device"] == "cpu"


# What is not finite


def break_weights_in_step(monkeypatch, last: int, then=lambda: None) -> None:
    """Let the optimizer's step of this number leave a NaN among the weights."""
    adamw, steps = torch.optim.AdamW.step, []

    def step(self, *args, **kwargs):
        adamw(self, *args, **kwargs)
        steps.append(self)
        if len(steps) == last + 1:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(torch.nan)
            then()

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


def finite_checkpoints(log: Path) -> dict[str, bool]:
    files = sorted(log.glob("step_*/model.safetensors"))
    return {path.parent.name: all(t.isfinite().all() for t in load_file(path).values()) for path in files}


def test_blow_up_in_the_only_step_exits_3(here, capsys):
    shutil.rmtree("log")
    train(*TINY, "--max_lr", 1e12, "--max_steps", 1, status=3)
    assert_one_line(capsys.readouterr().err)
    assert all(finite_checkpoints(here / "log").values())


@pytest.mark.parametrize("max_steps", [3, 4])
def test_nan_weights_do_not_replace_the_last_checkpoint(here, capsys, monkeypatch, max_steps):
    """Step 2 breaks them, be it the last or not; --keep 1 would delete the checkpoint before."""
    shutil.rmtree("log")
    break_weights_in_step(monkeypatch, 2)
    train(*TINY, "--max_steps", max_steps, "--keep", 1, "--save_every", 1, status=3)
    assert_one_line(capsys.readouterr().err)
    assert finite_checkpoints(here / "log") == dict(step_000002=True)


def test_nan_weights_are_not_saved_at_a_signal(here, capsys, monkeypatch):
    shutil.rmtree("log")
    break_weights_in_step(monkeypatch, 2, then=lambda: os.kill(os.getpid(), signal.SIGTERM))
    train(*TINY, "--save_every", 2, status=3)
    assert finite_checkpoints(here / "log") == dict(step_000002=True)


# Damage


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.json"])
def test_resume_from_damaged_checkpoints_is_refused(here, capsys, name):
    """Starting afresh would move all that the run has left."""
    for directory in Path("log").glob("step_*"):
        flip_byte(directory / name)
    before = tree(here)
    train(*TINY, "--resume", status=2)
    out, err = capsys.readouterr()
    assert_one_line(err)
    assert f"log/step_000008/{name}" in err and tree(here) == before


def drop_step_1(content: bytes) -> bytes:
    return b"".join(line for line in content.splitlines(keepends=True) if not line.startswith((b"1 ", b"1,")))


def tear_step_2(content: bytes) -> bytes:
    return content[: max(content.find(b"\n2 train"), content.find(b"\n2,")) + 6]


def zero_from_step_2(content: bytes) -> bytes:
    """As file systems leave it that had no time to write a file's last block."""
    kept = tear_step_2(content)
    return kept + bytes(len(content) - len(kept))


@pytest.mark.parametrize("name", ["log.txt", "steps.csv"])
@pytest.mark.parametrize("damage", [drop_step_1, tear_step_2, zero_from_step_2])
def test_resume_restores_a_log_that_lost_lines(here, finished, capsys, name, damage):
    """From the copy in the checkpoint; what was damaged is told."""
    shutil.rmtree("log/step_000008")
    path = Path("log", name)
    path.write_bytes(damage(path.read_bytes()))
    train("--resume")
    out, _ = capsys.readouterr()
    lines = [line for line in out.splitlines() if name in line]
    assert lines == [f"log/{name}: had lost lines, which are restored from log/step_000004"]
    assert_same_run(here / "log", finished / "log")


def test_resume_cuts_a_torn_last_line_silently(here, finished, capsys):
    """Its step is done again."""
    shutil.rmtree("log/step_000008")
    for name in "log.txt", "steps.csv":
        os.truncate(f"log/{name}", os.path.getsize(f"log/{name}") - 8)
    train("--resume")
    out, err = capsys.readouterr()
    assert not err and not [line for line in out.splitlines() if "log.txt" in line or "steps.csv" in line]
    assert_same_run(here / "log", finished / "log")


def test_logs_and_files_are_flushed_before_the_rename(here, monkeypatch):
    """A checkpoint counts on the lines before it; its own rename comes after all that it holds."""
    synced, checkpoints = {}, []

    def recorded(sync):
        def call(fd):
            sync(fd)
            path = Path(os.readlink(f"/proc/self/fd/{fd}"))
            synced[path.name] = path.read_text() if path.suffix in (".txt", ".csv") else None

        return call

    def renaming(rename):
        def call(source, target, **kwargs):
            rename(source, target, **kwargs)
            if Path(target).name.startswith("step_"):
                checkpoints.append((Path(target), dict(synced)))
                synced.clear()

        return call

    for name in "fsync", "fdatasync":
        monkeypatch.setattr(os, name, recorded(getattr(os, name)))
    for name in "rename", "replace":
        monkeypatch.setattr(os, name, renaming(getattr(os, name)))
    shutil.rmtree("log")
    train(*TINY)
    assert [path.name for path, _ in checkpoints] == ["step_000004", "step_000008"]
    for (path, flushed), step in zip(checkpoints, (3, 7), strict=True):
        assert {p.name for p in path.iterdir()} < flushed.keys()
        assert f"\n{step} train" in flushed.get("log.txt", "") and f"\n{step}," in flushed.get("steps.csv", "")
    assert "log" in synced  # after the last rename, the directory that holds the name


# Later checkpoints


def test_each_resume_of_an_older_checkpoint_archives_the_later_ones(here, finished):
    later = weights(here / "log")
    for _ in range(2):
        train("--resume", "log/step_000004", "--log_dir", "log")
        assert_same_run(here / "log", finished / "log")
    first, second = sorted(Path("log").glob("old-*"))
    for old in first, second:
        assert [p.name for p in old.iterdir()] == ["step_000008"]
        assert (old / "step_000008/model.safetensors").read_bytes() == later


# A checkpoint that was copied from another run


def test_copied_checkpoint_leaves_its_run_alone(tmp_path, here, capsys, monkeypatch):
    """The record names the log directory of its run, and what it was logged to; neither is taken from it."""
    original = tmp_path / "original"
    shutil.move("log", original)
    for directory in original.glob("step_*"):

        def change(record):
            for part in ASKED & record.keys():
                record[part] |= dict(log_dir=str(original), wandb="a project")

        rewrite_record(directory, change)
    shutil.copytree(original / "step_000004", "copied")
    before = tree(original)
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails, and would be told
    train("--resume", "copied")
    out, err = capsys.readouterr()
    assert tree(original) == before and (here / "log/step_000008").is_dir()
    assert "Weights & Biases" not in out + err
    assert json.loads(Path("log/run.json").read_text())["config"]["wandb"] is None
    train("--resume", "copied", "--log_dir", "given")
    assert tree(original) == before and (here / "given/step_000008").is_dir()
