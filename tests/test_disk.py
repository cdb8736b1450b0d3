"""Disks that are full, read-only or fail: the run ends in one line or goes on, and what was written stays good."""

import resource
import shutil
import subprocess

import pytest

from conftest import RUN, assert_same_run, at_step, read_log, resume, run_in_process, run_ranks, with_fault
from runtime import checkpoint


@pytest.fixture
def limit_files():
    """A function that limits the size of the files that this process writes, in bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [5 * 2**20, 10 * 2**20], ids=["model.safetensors", "trainer_state.pt"])
def test_checkpoint_that_does_not_fit_ends_the_run(log, text, undisturbed, limit_files, limit):
    """Where safetensors fails, and where torch does."""
    before = {p.name for p in log.iterdir()}
    limit_files(limit)
    done = resume(log, text, status=4)
    limit_files(-1)
    assert f"train_gpt2.py: error: {log}/step_000015: could not be written: " in done.stderr
    assert "bytes are free there" in done.stderr and done.stderr.count("\n") == 1
    assert {p.name for p in log.iterdir()} == before
    assert all(checkpoint.verify(directory) for directory in checkpoint.checkpoints(log).values())
    resume(log, text)
    assert_same_run(log, undisturbed)


@pytest.mark.parametrize(
    "then, status, message",
    [
        ("os.kill(os.getpid(), signal.SIGTERM)", 4, "finishing the step"),
        ("return loss * float('nan')", 3, "step 5: loss nan"),
    ],
)
def test_failed_checkpoint_is_reported_beside_a_stop(tmp_path, text, then, status, message):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
    fault = at_step(5, f"while not trainer.writer.failed: time.sleep(0.01)\n{then}")
    flags = *RUN, "--data", text, "--log_dir", tmp_path / "log"
    done = run_ranks(with_fault(tmp_path, limit + fault), *flags, ranks=1, status=status)
    assert "step_000005: could not be written: " in done.stderr and message in done.stderr
    assert list(read_log(tmp_path / "log"))[-1] == (5 if status == 4 else 4)


@pytest.fixture
def mount(tmp_path):
    """A function that mounts a small file system, or mounts it again with other options."""
    directory = tmp_path / "disk"
    directory.mkdir()

    def mount(options: str):
        line = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory]
        if shutil.which("mount") is None or subprocess.run(line, capture_output=True).returncode:
            pytest.skip("file systems cannot be mounted here")
        return directory

    yield mount
    subprocess.run(["umount", directory], capture_output=True)


def test_full_disk_ends_the_run_and_loses_nothing(mount, text, undisturbed):
    """A checkpoint takes 21 MB: the third that is there at a time does not fit any more."""
    log = mount("size=50m") / "log"
    done = resume(log, text, status=4)
    assert f"error: {log}/step_000015: could not be written: " in done.stderr and "bytes are free there" in done.stderr
    assert not list(log.glob(".unfinished-*"))
    assert [record["step"] for record in map(checkpoint.verify, checkpoint.checkpoints(log).values())] == [5, 10]
    mount("remount,size=100m")
    resume(log, text)
    assert_same_run(log, undisturbed)


def test_read_only_log_directory_is_refused(mount, text):
    log = mount("size=1m,ro")
    done = run_in_process(*RUN, "--data", text, "--log_dir", log, status=2)
    error = f"train_gpt2.py: error: --log_dir {log}: cannot be written: {log}/.lock: Read-only file system\n"
    assert done.stderr == error and "step 0" not in done.stdout


def test_checkpoint_that_cannot_be_deleted_is_reported(tmp_path, text, monkeypatch):
    """The run continues; what could not be deleted is no checkpoint any more, and is removed at the next start."""

    def fail(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(16, "Device busy", str(path))

    log = tmp_path / "log"
    flags = *RUN, "--data", text, "--log_dir", log, "--eval_every", 0, "--max_steps", 20
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", fail)
        done = run_in_process(*flags)
    assert "step_000005: could not be deleted (Device busy); the run continues" in done.stdout
    assert list(checkpoint.checkpoints(log)) == [15, 20]
    assert len(list(log.glob(".unfinished-*"))) == 2
    run_in_process(*flags, "--resume")
    assert not list(log.glob(".unfinished-*"))
