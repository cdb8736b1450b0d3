"""Checkpoints that are damaged, deleted, copied or forged: none is loaded, and the one before is found."""

import json
import os
import pickle
import random
import shutil
import time
from pathlib import Path

import pytest
import torch

import tokens
from conftest import SMALL, assert_same_run, read_log, record, resume, run_in_process, weights
from model import GPT, GPTConfig
from runtime import checkpoint
from tokens import gpt2_tokenizer


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as f:
        f.seek(bit // 8)
        byte = f.read(1)[0]
        f.seek(bit // 8)
        f.write(bytes([byte ^ 1 << bit % 8]))


def test_no_flipped_bit_and_no_truncation_is_loaded(tmp_path):
    """300 bits and 20 lengths, in all files of the newest checkpoint in turn: the one before is found each time."""
    rng = random.Random(0)
    model, logs = GPT(GPTConfig(8, 512, 1, 1, 8)), dict.fromkeys(checkpoint.LOGS, b"0 train 1\n")
    for step in 5, 10:
        saved = checkpoint.save(
            tmp_path, model, dict(optimizer=torch.zeros(1000)), logs, record(step), gpt2_tokenizer()
        )
    files = sorted(p for p in saved.iterdir() if p.name != "README.md")  # which its reader completes
    assert {"checkpoint.json", "model.safetensors", "trainer_state.pt", *logs} <= {path.name for path in files}
    for i in range(320):
        path = files[i % len(files)]
        content = path.read_bytes()
        if i < 300:
            flip(path, rng.randrange(8 * len(content)))
        else:
            os.truncate(path, rng.randrange(len(content)))
        directory, found, skipped = checkpoint.newest(tmp_path)
        assert found["step"] == 5 and directory.name == "step_000005"
        assert len(skipped) == 1 and str(path) in skipped[0]
        with pytest.raises(checkpoint.CheckpointError):
            checkpoint.verify(saved)
        path.write_bytes(content)
    assert checkpoint.newest(tmp_path)[1]["step"] == 10


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, text, monkeypatch):
    """The files hold the state of their own step, however late they are written."""
    flags = *SMALL, "--data", text, "--save_every", 4, "--log_dir"
    run_in_process(*flags, tmp_path / "prompt")
    save = checkpoint.save

    def late_save(log_dir, model, state, logs, record, *args):
        deadline = time.monotonic() + 60
        while record["step"] == 4 and "\n7 train" not in (log_dir / "log.txt").read_text():
            assert time.monotonic() < deadline, "training does not go on"
            time.sleep(0.01)
        return save(log_dir, model, state, logs, record, *args)

    monkeypatch.setattr(checkpoint, "save", late_save)
    run_in_process(*flags, tmp_path / "late")
    for name in "model.safetensors", "trainer_state.pt", *checkpoint.LOGS[:1]:
        late, prompt = (tmp_path / log / "step_000004" / name for log in ("late", "prompt"))
        assert late.read_bytes() == prompt.read_bytes()


def test_damaged_checkpoint_is_skipped_and_renamed(log, text, undisturbed):
    damaged, older = log / "step_000012", Path(shutil.copytree(log / "step_000010", log / "step_000005"))
    flip(damaged / "model.safetensors", 8 * 100_000 + 3)
    flip(older / "model.safetensors", 8 * 100_000 + 3)
    refused = run_in_process("--device", "cpu", "--resume", damaged, status=2)
    assert "step_000012/model.safetensors: does not match its SHA-256; --resume alone takes" in refused.stderr
    done = resume(log, text, "--keep", 50)
    assert f"skipped a checkpoint: {damaged}/model.safetensors: does not match its SHA-256" in done.stdout
    (old,) = log.glob("old-*")
    assert f"{log} are now in {old}; --resume {old}/step_000012" in done.stdout and (old / "step_000012").is_dir()
    assert older.is_dir()
    assert_same_run(log, undisturbed)


def test_older_checkpoint_may_be_chosen(log, text, undisturbed):
    """By another name of its directory, too; later checkpoints are archived."""
    resume(log, text, "--keep", 50)
    (log.parent / "link").symlink_to(log)
    again = resume(log, text, log.parent / "link/step_000020", "--keep", 50)
    (old,) = log.glob("old-*")
    assert f"{old.name}/step_000030 continues it" in again.stdout and "at step 20" in again.stdout
    assert {"step_000025", "step_000030"} == {p.name for p in old.iterdir()} < {p.name for p in log.iterdir()}
    assert_same_run(log, undisturbed)


def test_resume_with_only_damaged_checkpoints_is_refused(log, text):
    """A new run would archive them; nothing is touched."""
    for directory in checkpoint.checkpoints(log).values():
        (directory / "trainer_state.pt").write_bytes(b"")
    before = sorted(log.rglob("*"))
    error = resume(log, text, status=2).stderr
    assert error.startswith(
        f"train_gpt2.py: error: --resume: none of the 2 checkpoints in {log} verifies: {log}/step_00"
    )
    assert "trainer_state.pt: expected " in error and error.count("\n") == 1
    assert sorted(log.rglob("*")) == before


def test_deleted_and_copied_checkpoints_resume(tmp_path, log, text, undisturbed):
    moved = Path(shutil.copytree(log / "step_000010", tmp_path / "elsewhere/copied"))
    shutil.rmtree(log / "step_000012")
    assert "at step 10" in resume(log, text).stdout
    assert_same_run(log, undisturbed)
    new = tmp_path / "new"
    run_in_process("--resume", moved, "--device", "cpu", "--log_dir", new)  # the rest comes from the checkpoint
    assert read_log(new) == read_log(undisturbed) and weights(new) == weights(undisturbed)


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    def make(step: int, loss: float | None) -> None:
        directory = tmp_path / f"step_{step:06d}"
        directory.mkdir()
        (directory / "checkpoint.json").write_text(json.dumps(record(step, validation_loss=loss)))

    for keep in 2, 3, 4:
        for step in range(5, 45, 5):
            make(step, None)  # never evaluated
        checkpoint.prune(tmp_path, keep, pytest.fail)
        assert list(checkpoint.checkpoints(tmp_path)) == [*range(5, 45, 5)][-keep:]
        make(5, 1.0)
        make(10, 2.0)
        checkpoint.prune(tmp_path, keep, pytest.fail)
        assert list(checkpoint.checkpoints(tmp_path)) == [5, *range(5, 45, 5)[-keep:]]
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
    make(5, 2.0)
    make(10, 1.0)  # the newest is the best: one is enough
    checkpoint.prune(tmp_path, 1, pytest.fail)
    assert list(checkpoint.checkpoints(tmp_path)) == [10]


class Payload:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("rehashed", [False, True])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps(Payload()), Payload(), {}, [1]])
def test_forged_trainer_state_is_refused_and_never_runs(tmp_path, stopped, monkeypatch, content, rehashed):
    """With the wrong hash, and by somebody who knew how to make a right one."""
    monkeypatch.chdir(tmp_path)
    directory = Path(shutil.copytree(stopped / "step_000012", tmp_path / "step_000012"))
    path = directory / "trainer_state.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    if rehashed:
        its_record = json.loads((directory / "checkpoint.json").read_text())
        del its_record["sha256"]
        its_record["files"][path.name] = dict(bytes=path.stat().st_size, sha256=tokens.sha256(path))
        (directory / "checkpoint.json").write_bytes(checkpoint.encode_record(its_record))
    error = run_in_process("--resume", directory, "--device", "cpu", status=2).stderr
    assert error.startswith("train_gpt2.py: error: ") and error.count("\n") == 1
    assert ("cannot be loaded" if rehashed else "trainer_state.pt: ") in error
    assert not (tmp_path / "ran").exists()


def test_code_in_a_model_file_never_runs(tmp_path, stopped, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = Path(shutil.copytree(stopped / "step_000012", tmp_path / "step_000012"))
    (directory / "model.safetensors").unlink()
    torch.save(Payload(), directory / "pytorch_model.bin")
    error = run_in_process("--init_from", directory, "--data", text, "--device", "cpu", status=2).stderr
    assert "step_000012: cannot be loaded as a GPT-2: " in error
    assert not (tmp_path / "ran").exists()
