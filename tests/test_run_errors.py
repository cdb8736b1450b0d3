"""What goes wrong for a user of train_gpt2.py: one line on stderr, the right exit status, and no file touched."""

from errors import run_script
import errno
import hashlib
import json
import os
import resource
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train_gpt2
from runs import ASKED, TINY, assert_one_line, rewrite_record, train, tree


@contextmanager
def deadline(seconds: int):
    """Fail if what is inside takes longer."""

    def interrupt(number, frame):
        raise pytest.fail.Exception(f"not ended after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refuse(capsys, *flags, status: int = 2) -> str:
    """Run in vain: the one line, with nothing written or renamed."""
    before = tree(Path())
    with deadline(10):
        assert run_script(train_gpt2.main, [*map(str, flags)]) == status
    err = capsys.readouterr().err
    assert_one_line(err)
    assert tree(Path()) == before
    return err


# Files that are not the run's


def test_users_files_stay_when_an_old_run_is_archived(here):
    """As with --log_dir . in a directory of theirs."""
    shutil.move("log", "mine")
    names = "wandb/__init__.py", "step_by_step.md", "step_1.sql", "notes.txt", "step_size/a.txt", "old-step_1.txt"
    for name in names:
        Path("mine", name).parent.mkdir(exist_ok=True)
        Path("mine", name).write_text("mine")
    train(*TINY, "--log_dir", "mine", "--max_steps", 1)
    assert all(Path("mine", name).read_text() == "mine" for name in names)
    (old,) = (p for p in Path("mine").glob("old-*") if p.is_dir())
    run = {"curves.png", "log.txt", "run.json", "step_000004", "step_000008", "steps.csv"}
    assert {p.name for p in old.iterdir()} == run


def test_wandb_of_a_run_is_archived_with_it(here):
    """The file with its id tells that it is the run's."""
    Path("log/wandb").mkdir()
    Path("log/wandb/id.txt").write_text("abc")
    train(*TINY, "--max_steps", 1)
    (old,) = Path("log").glob("old-*")
    assert (old / "wandb/id.txt").exists() and not Path("log/wandb").exists()


@pytest.mark.parametrize("name", ["log_dir", "data", "init_from", "resume", "wandb"])
def test_empty_names_are_refused(here, capsys, name):
    assert f"--{name}" in refuse(capsys, *TINY, f"--{name}", "")


# Disks


@contextmanager
def largest_file(size: int):
    """No file of this process may grow beyond this many bytes: a write fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_log_that_cannot_grow_is_named(here, capsys):
    """Once there is space, --resume goes on: here, from the beginning."""
    shutil.rmtree("log")
    flags = *TINY, "--max_steps", 80, "--save_every", 0, "--eval_every", 0, "--resume"
    with largest_file(3000):
        train(*flags, status=4)
    err = capsys.readouterr().err
    assert_one_line(err)
    assert "log/steps.csv" in err
    train(*flags, "--max_steps", 1)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_no_space_for_the_log_directory_exits_4(here, capsys, monkeypatch, code):
    mkdir = os.mkdir

    def fail(path, *args, **kwargs):
        if Path(path).name == "new":
            raise OSError(code, os.strerror(code), str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", fail)
    line = refuse(capsys, *TINY, "--log_dir", "new", status=4)
    assert "new" in line and os.strerror(code) in line


def test_no_space_for_the_first_files_exits_4(here, capsys):
    with largest_file(100):
        train(*TINY, "--log_dir", "new", status=4)
    err = capsys.readouterr().err
    assert_one_line(err)
    assert "new/" in err


# Streams


ENCODED = """
import io, sys
sys.stdout = io.TextIOWrapper(open(1, "wb", buffering=0, closefd=False), {0!r}, "strict", line_buffering=True)
sys.stderr = io.TextIOWrapper(open(2, "wb", buffering=0, closefd=False), {0!r}, "backslashreplace", line_buffering=True)
"""


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_run_ends_well_in_other_encodings(here, launch, encoding):
    """With arrows, samples that are of random bytes, and an old run that is archived."""
    name = "log→"
    shutil.move("log", name)
    fault = ENCODED.format(encoding)
    done = launch("--log_dir", name, "--resume", "--dist_timeout", 9, fault=fault)
    assert "at step 8" in done.stdout
    done = launch(*TINY, "--log_dir", name, "--max_steps", 1, "--sample_every", 1, fault=fault)
    assert "step 1: validation loss" in done.stdout and not done.stderr
    assert Path(name, "step_000001").is_dir() and len([*Path(name).glob("old-*")]) == 1


@pytest.mark.parametrize("fd, name", [(1, "stdout"), (2, "stderr")])
def test_run_ends_well_with_a_closed_stream(here, launch, fd, name):
    """No file of the run gets the number of the stream, and with it what is printed."""
    done = launch(
        *TINY, "--max_steps", 2, "--save_every", 1, fault=f"import os, sys; os.close({fd}); sys.{name} = None"
    )
    assert not done.stderr and ("step 1" in done.stdout) == (fd == 2)
    assert (
        len(Path("log/log.txt").read_text().splitlines()) == 6
    )  # two of training, two of validation with two values each
    assert Path("log/step_000002").is_dir() and len([*Path("log").glob("old-*")]) == 1


def test_full_stdout_does_not_end_the_run(here, launch):
    """Nor does a terminal that is gone; the log files have all that counts."""
    shutil.rmtree("log")
    launch(*TINY, fault="import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)")
    assert len(Path("log/log.txt").read_text().splitlines()) == 14 and Path("log/step_000008").is_dir()


def test_closed_stderr_does_not_hide_the_status(here, launch):
    before = tree(Path())
    done = launch(*TINY, "--data", "nowhere", fault="import os, sys; os.close(2); sys.stderr = None", status=2)
    assert not done.stdout and tree(Path()) == before


# Environment


@pytest.mark.parametrize(
    "env, name",
    [
        ("WORLD_SIZE=two", "WORLD_SIZE"),
        ("WORLD_SIZE=0", "WORLD_SIZE"),
        ("WORLD_SIZE=-1", "WORLD_SIZE"),
        ("WORLD_SIZE=2 RANK=0", "MASTER_ADDR"),
        ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=127.0.0.1", "MASTER_PORT"),
        ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=http", "MASTER_PORT"),
        ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=65536", "MASTER_PORT"),
        ("WORLD_SIZE=2 RANK=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=1", "RANK"),
        ("WORLD_SIZE=2 RANK=-1 MASTER_ADDR=127.0.0.1 MASTER_PORT=1", "RANK"),
        ("RANK=1", "RANK"),
        ("RANK=first", "RANK"),
        ("LOCAL_RANK=x", "LOCAL_RANK"),
        ("LOCAL_WORLD_SIZE=0", "LOCAL_WORLD_SIZE"),
        ("TORCHELASTIC_MAX_RESTARTS=many", "TORCHELASTIC_MAX_RESTARTS"),
    ],
)
def test_wrong_environment_is_named(here, capsys, monkeypatch, env, name):
    for variable in "MASTER_ADDR", "MASTER_PORT":
        monkeypatch.delenv(variable, raising=False)
    for pair in env.split():
        monkeypatch.setenv(*pair.split("="))
    assert name in refuse(capsys, *TINY, "--dist_timeout", 2)


# Flags


@pytest.mark.parametrize(
    "flags, name",
    [
        (["--warmup_steps", 100, "--max_steps", 3], "--warmup_steps"),
        (["--n_layer", 2**40], "--n_layer"),
        (["--log_dir", "a" * 300], "--log_dir"),
        (["--log_dir", "a/" * 3000], "--log_dir"),
        (["--data", "a" * 300], "aaa: File name too long"),
        (["--init_from", "a" * 300], "--init_from"),
        (["--resume", "a" * 300], "aaa: File name too long"),
        (["--resume", "log/step_000008/checkpoint.json"], "--resume"),
        (["--resume", "data"], "--resume"),
        (["--log_dir", "/dev/null/log"], "--log_dir"),
        (["--data", "/dev/null"], "null"),
        (["--data", "data/x_train_000001.npy"], "--data"),
        (["--dtype", "float16", "--optimizer", "adam"], "--optimizer"),
        (["--n_layer", "1e3"], "--n_layer"),
        (["--no-bias=3"], "bias"),
        (["--resume", "log/step_000008", "log/step_000004"], "log/step_000004"),
    ],
)
def test_wrong_values_are_refused(here, capsys, flags, name):
    assert name in refuse(capsys, *TINY, *flags)


def test_dangling_link_as_log_directory_is_refused(here, capsys):
    Path("link").symlink_to("nowhere")
    assert "--log_dir link" in refuse(capsys, *TINY, "--log_dir", "link")


def test_directory_in_place_of_the_lock_is_refused(here, capsys):
    Path("new/.lock").mkdir(parents=True)
    assert "--log_dir new" in refuse(capsys, *TINY, "--log_dir", "new")


def test_dry_run_of_very_many_steps_ends(here):
    with deadline(10):
        train(*TINY, "--max_steps", 2**40, "--dry_run")


# Data


def put(name: str, content: bytes):
    return lambda: Path("data", name).write_bytes(content)


def put_manifest(content: object):
    return put("manifest.json", json.dumps(content).encode())


def header(*numbers: int) -> bytes:
    return np.array([*numbers, *[0] * (256 - len(numbers))], dtype="<i4").tobytes()


@pytest.mark.parametrize(
    "make, name",
    [
        (put("x_train_000001.npy", b"PK\x03\x04" + bytes(5000)), "x_train_000001.npy"),
        (put("x_train_000001.npy", b""), "x_train_000001.npy"),
        (put("x_train_000001.npy", b"\x93NUMPY\x01\x00\xff\xff{'descr': "), "x_train_000001.npy"),
        (lambda: np.save("data/x_val_000000.npy", np.array([{}]), allow_pickle=True), "x_val_000000.npy"),
        (lambda: Path("data/x_train_000003.npy").mkdir(), "x_train_000003.npy"),
        (lambda: Path("data/x_train_000003.npy").symlink_to("nowhere"), "x_train_000003.npy"),
        (put("manifest.json", b"{"), "manifest.json"),
        (put("manifest.json", b"\xff"), "manifest.json"),
        (put("manifest.json", b"[" * 100_000), "manifest.json"),
        (put_manifest([]), "manifest.json"),
        (put_manifest(dict(shards=[5], documents=1, complete=True)), "manifest.json"),
        (put_manifest(dict(shards={}, documents=1, complete=True)), "manifest.json"),
        (put_manifest(dict(shards=[dict(name=[], tokens=1, sha256="")], documents=1, complete=True)), "manifest.json"),
        (lambda: Path("data/manifest.json").mkdir(), "manifest.json"),
    ],
)
def test_damaged_shards_are_named(here, capsys, make, name):
    (Path("data") / name).unlink(missing_ok=True)
    make()
    assert name in refuse(capsys, *TINY)


@pytest.mark.parametrize("numbers", [(20240520, 2, 100), (20240520, 1, 2**31 - 1), (20240520, 1, -1), (0, 1, 100)])
def test_wrong_bin_header_is_named(here, capsys, numbers):
    Path("bin").mkdir()
    for name in "x_train_000001.bin", "x_val_000000.bin":
        Path("bin", name).write_bytes(header(*numbers) + bytes(200))
    assert "bin/x_train_000001.bin" in refuse(capsys, *TINY, "--data", "bin")


# Models


CONFIG = dict(model_type="gpt2", vocab_size=50257, n_positions=16, n_embd=8, n_layer=1, n_head=2)


@pytest.mark.parametrize(
    "change",
    [
        dict(n_layer=2**40),
        dict(n_layer="two"),
        dict(n_layer=-1),
        dict(n_head=0),
        dict(n_head=3),
        dict(n_embd=2**40),
        dict(n_positions=0),
        dict(n_positions=2**40),
        dict(vocab_size=2**60),
        dict(n_embd=None),
    ],
)
def test_wrong_model_config_is_refused(here, capsys, change):
    shutil.copytree("log/step_000008", "model")
    config = json.loads(Path("model/config.json").read_text())
    assert CONFIG.items() <= config.items()
    Path("model/config.json").write_text(json.dumps(config | change))
    line = refuse(capsys, *TINY[8:], "--init_from", "model")
    assert "--init_from model" in line or "does not fit into memory" in line


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_model_config_that_is_no_config_is_refused(here, capsys, content):
    shutil.copytree("log/step_000008", "model")
    Path("model/config.json").write_bytes(content)
    assert "--init_from model" in refuse(capsys, *TINY[8:], "--init_from", "model")


@pytest.mark.parametrize("size", [0, 7, 1000])
def test_truncated_model_is_refused(here, capsys, size):
    shutil.copytree("log/step_000008", "model")
    os.truncate("model/model.safetensors", size)
    assert "--init_from model" in refuse(capsys, *TINY[8:], "--init_from", "model")


def test_model_of_nan_is_refused(here, capsys):
    shutil.copytree("log/step_000008", "model")
    weights = load_file("model/model.safetensors")
    save_file(
        {name: t * torch.nan for name, t in weights.items()}, "model/model.safetensors", metadata={"format": "pt"}
    )
    assert "--init_from model" in refuse(capsys, *TINY[8:], "--init_from", "model")


# Checkpoints, by somebody who knows how to make their hash right


def drop(*names: str):
    return lambda record: {name: value for name, value in record.items() if name not in names}


def put_in(name: str, value: object):
    return lambda record: record | {name: value}


def ask(name: str, value: object):
    return lambda record: record | {part: record[part] | {name: value} for part in ASKED & record.keys()}


def list_outside(name: str):
    def change(record):
        record["files"][name] = record["files"].pop("merges.txt")

    return change


FORGED = {
    **{f"no {name}": drop(name) for name in ("files", "step", "config", "data", "ranks")},
    "no options": drop(*ASKED),
    "no file listed": put_in("files", {}),
    "list of files": put_in("files", []),
    "file without hash": put_in("files", {"model.safetensors": 5}),
    "file in the parent": list_outside("../merges.txt"),
    "file by absolute path": list_outside("{absolute}/merges.txt"),
    "file in a subdirectory": list_outside("tokenizer/merges.txt"),
    "step of text": put_in("step", "8"),
    "negative step": put_in("step", -1),
    "step and a half": put_in("step", 8.5),
    "ranks of text": put_in("ranks", "one"),
    "data of a number": put_in("data", 5),
    "nothing as config": put_in("config", None),
    "list as config": put_in("config", []),
    "n_layer of text": ask("n_layer", "one"),
    "n_layer out of bounds": ask("n_layer", 2**40),
    "max_lr of a list": ask("max_lr", [1]),
    "unknown preset": ask("preset", "nano"),
    "path of a number": ask("data", 5),
    "micro-batch of text": ask("micro_batch_size", "x"),
    "unknown dtype": ask("dtype", "int3"),
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
def test_forged_record_is_refused(here, capsys, change):
    directory = here / "log/step_000008"
    for place in "log/merges.txt", "absolute/merges.txt", "log/step_000008/tokenizer/merges.txt":
        Path(place).parent.mkdir(exist_ok=True)
        shutil.copy(directory / "merges.txt", place)

    def placed(record):
        changed = change(record) or record
        return json.loads(json.dumps(changed).replace("{absolute}", str(here / "absolute")))

    rewrite_record(directory, placed)
    assert "step_000008" in refuse(capsys, "--resume", "log/step_000008")


@pytest.mark.parametrize("content", [b"", b"null", b"\xff", b"[" * 100_000, b'{"sha256": 1}'])
def test_record_that_is_no_record_is_refused(here, capsys, content):
    Path("log/step_000008/checkpoint.json").write_bytes(content)
    assert "log/step_000008/checkpoint.json" in refuse(capsys, "--resume", "log/step_000008")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: dict(optimizer={}, scaler={}),
        lambda state: dict(optimizer=None, scaler=None),
        lambda state: state | dict(optimizer=dict(state["optimizer"], param_groups=[])),
        lambda state: state | dict(optimizer=dict(state["optimizer"], state={0: dict(exp_avg=5)})),
    ],
    ids=lambda _: "",
)
def test_forged_trainer_state_is_refused(here, capsys, change):
    directory = Path("log/step_000008")
    path = directory / "trainer_state.pt"
    torch.save(change(torch.load(path, weights_only=True)), path)

    def rehash(record):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        record["files"][path.name] = dict(bytes=path.stat().st_size, sha256=sha256)

    rewrite_record(directory, rehash)
    assert "step_000008" in refuse(capsys, "--resume", directory)
