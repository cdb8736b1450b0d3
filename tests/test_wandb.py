"""--wandb with the real package, offline: it records what is logged, and whatever fails there, the run does not."""

import os
import signal
import struct
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from conftest import BOOKS_TEXT, SMALL, at_step, read_log, run_in_process, run_ranks, with_fault
from runtime.runlog import WandB


def records(path: Path):
    """Yield the records of a .wandb file: seven bytes, then LevelDB's log format (github.com/google/leveldb, log_format.md)."""
    content, at, record = path.read_bytes(), 7, b""
    while at < len(content):
        left = 32768 - at % 32768  # in this block, whose last bytes are void if too few for a header
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(record)
            record = b""


def read_wandb(log_dir: Path) -> tuple[str, dict, dict]:
    """Return the id, the configuration and, by name and step, the values of all that is in log_dir/wandb, oldest first."""
    ids, config, values = set(), {}, defaultdict(dict)
    for path in sorted((log_dir / "wandb").glob("offline-run-*/*.wandb")):
        for record in records(path):
            if record.HasField("run"):
                ids.add((record.run.project, record.run.run_id))
                config |= {item.key: item.value_json for item in record.run.config.update}
            for item in record.history.item:
                values[item.key or ".".join(item.nested_key)][record.history.step.num] = item.value_json
    ((project, run_id),) = ids
    assert project == "a project"
    return run_id, config, values


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A directory with a text, and the log of a run without --wandb."""
    here = tmp_path_factory.mktemp("here")
    (here / "text.txt").write_text(BOOKS_TEXT.read_text()[:8000])
    run_in_process(*SMALL, "--data", here / "text.txt", "--log_dir", here / "plain")
    return here


def flags(here, log_dir, *more) -> list:
    return [*SMALL, "--data", here / "text.txt", "--log_dir", log_dir, "--wandb", "a project", *more]


def environment(tmp_path) -> dict:
    """Offline, and in a home where nobody has logged in."""
    return dict(WANDB_MODE="offline", HOME=str(tmp_path / "home"), WANDB_API_KEY="")


def wandb_line(output: str) -> str:
    """Return the one line on Weights & Biases."""
    (line,) = [line for line in output.splitlines() if "Weights & Biases" in line]
    return line


def test_wandb_records_what_is_logged_and_continues_at_resume(here, tmp_path):
    log_dir = tmp_path / "log"
    with patch.dict(os.environ, environment(tmp_path)):
        done = run_in_process(*flags(here, log_dir))
    assert "/wandb/offline-run-" in wandb_line(done.stdout) and "wandb:" not in done.stdout + done.stderr
    run_id, config, values = read_wandb(log_dir)
    assert config["max_steps"] == "8" and config["data"] == f'"{here / "text.txt"}"'

    log = (log_dir / "log.txt").read_bytes()
    assert log == (here / "plain/log.txt").read_bytes()

    def check(values):
        for kind in "train", "val":
            assert {step: f"{float(value):.9g}" for step, value in values[kind].items()} == read_log(log_dir, kind)
        assert [*values["tokens"].values()] == [str(256 * (step + 1)) for step in range(8)]
        assert set(values) >= {"lr", "norm", "tokens_per_second"}

    check(values)
    (log_dir / "step_000008").rename(tmp_path / "gone")  # as if it had died after the checkpoint before
    with patch.dict(os.environ, environment(tmp_path)):
        run_in_process("--resume", "--log_dir", log_dir, "--device", "cpu")  # to the same project
    assert (log_dir / "log.txt").read_bytes() == log and len(list(log_dir.glob("wandb/offline-run-*"))) == 2
    again = read_wandb(log_dir)
    assert again[0] == run_id
    check(again[2])

    with patch.dict(os.environ, environment(tmp_path)):
        run_in_process(*flags(here, log_dir, "--max_steps", 1))  # another run, and another there
    assert len(list(log_dir.glob("wandb/offline-run-*"))) == 1 and read_wandb(log_dir)[0] != run_id
    (old,) = log_dir.glob("old-*")
    assert read_wandb(old)[0] == run_id and not list((tmp_path / "home").rglob("*wandb*"))


def test_missing_wandb_costs_one_line(here, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("raise ModuleNotFoundError(\"No module named 'wandb'\")")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb")
    with patch.dict(os.environ, environment(tmp_path)):
        done = run_in_process(*flags(here, tmp_path / "log"))
    assert wandb_line(done.stdout) == "no Weights & Biases: No module named 'wandb'" and not done.stderr
    assert (tmp_path / "log/log.txt").read_bytes() == (here / "plain/log.txt").read_bytes()


@pytest.mark.parametrize(
    "env, timeout, message",
    [
        (dict(WANDB_MODE="online"), 60, "No API key configured."),
        (dict(WANDB_MODE="online", WANDB_API_KEY=40 * "a", WANDB_BASE_URL="http://127.0.0.1:9"), 6, ""),
    ],
)
def test_wandb_that_cannot_start_costs_one_line(here, tmp_path, env, timeout, message):
    fault = f"os.environ |= {environment(tmp_path) | env}\nimport wandb\nrunlog.WandB.timeout = {timeout}"
    started = time.monotonic()
    done = run_ranks(with_fault(tmp_path, fault), *flags(here, "log"), ranks=1, cwd=tmp_path)
    assert time.monotonic() - started < 80  # its process, which has the same stdout, would try for 90 seconds
    assert wandb_line(done.stdout).startswith(f"no Weights & Biases: {message}") and not done.stderr
    assert (tmp_path / "log/log.txt").read_bytes() == (here / "plain/log.txt").read_bytes()


FAULT = """
from pathlib import Path
runlog.WandB.timeout = 2.0
(pid,) = [int(pid) for f in Path("/proc/self/task").glob("*/children") for pid in f.read_text().split()]
Path("pid").write_text(str(pid))
os.kill(pid, signal.{})
"""


@pytest.mark.parametrize("name, message", [("SIGKILL", ""), ("SIGSTOP", "it has not answered for 2 seconds")])
def test_wandb_that_dies_or_hangs_costs_one_line(here, tmp_path, name, message):
    """Its process, in the middle of the run."""
    fault = f"os.environ |= {environment(tmp_path)}\n" + at_step(3, FAULT.format(name))
    done = run_ranks(with_fault(tmp_path, fault), *flags(here, "log"), ranks=1, cwd=tmp_path)
    if name == "SIGSTOP":
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    _, *rest = [line for line in done.stdout.splitlines() if "Weights & Biases" in line]
    assert len(rest) == 1 and rest[0].startswith(f"no Weights & Biases: {message}") and not done.stderr
    assert (tmp_path / "log/log.txt").read_bytes() == (here / "plain/log.txt").read_bytes()


@pytest.mark.parametrize("name", ["init", "log", "finish"])
def test_each_wandb_call_ends_at_the_timeout(tmp_path, monkeypatch, name):
    """As when the pipe to its process is full: it hangs, and nothing after that is called but teardown, which hangs too."""
    called = []

    def call(this, result=None):
        called.append(this)
        if this in (name, "teardown"):
            time.sleep(60)
        return result

    its_run = SimpleNamespace(id="1", url="a url", log=lambda values, step: call("log"), finish=lambda: call("finish"))
    fake = SimpleNamespace(init=lambda **_: call("init", its_run), teardown=lambda: call("teardown"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(WandB, "timeout", 0.2)
    (tmp_path / "wandb").mkdir()
    handler, lines, started = signal.getsignal(signal.SIGALRM), [], time.monotonic()
    with patch.dict(os.environ):
        wandb = WandB(dict(wandb="a project"), tmp_path, lines.append)
        wandb.log(0, loss=1.0)
        wandb.close()
    assert time.monotonic() - started < 30
    order = ["init", "log", "finish"]
    assert called == order[: order.index(name) + 1] + ["teardown"]
    assert lines[-1] == "no Weights & Biases: it has not answered for 0.2 seconds"
    assert len(lines) == (1 if name == "init" else 2)  # the first is its address
    assert signal.getsignal(signal.SIGALRM) == handler
