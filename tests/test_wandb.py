"""--wandb with the real package, offline: what is recorded is what is logged, and whatever fails there, the run does not."""

import os
import signal
import struct
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from conftest import BOOKS_TEXT, ENVIRONMENT, SMALL, command, read_log, run, with_fault

pytest.importorskip("wandb")


def records(path: Path):
    """The records of a .wandb file: seven bytes, then LevelDB's log format (github.com/google/leveldb, log_format.md)."""
    from wandb.proto.wandb_internal_pb2 import Record

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
    """The id, the configuration and, by name and step, the values of all that lies in log_dir/wandb, oldest first."""
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
    """A text, and the log of a run without --wandb."""
    here = tmp_path_factory.mktemp("here")
    (here / "text.txt").write_text(BOOKS_TEXT.read_text()[:8000])
    run("train_gpt2.py", *SMALL, "--data", here / "text.txt", "--log_dir", here / "plain")
    return here


def flags(here, log_dir, *more) -> list:
    return [*SMALL, "--data", here / "text.txt", "--log_dir", log_dir, "--wandb", "a project", *more]


def environment(tmp_path) -> dict:
    """Offline, and in a home where nobody has logged in."""
    return dict(WANDB_MODE="offline", HOME=str(tmp_path / "home"), WANDB_API_KEY="")


def said(output: str) -> str:
    """The one line on Weights & Biases."""
    (line,) = [line for line in output.splitlines() if "Weights & Biases" in line]
    return line


def test_it_records_what_is_logged_and_a_resumed_run_goes_on_there(here, tmp_path):
    env, log_dir = environment(tmp_path), tmp_path / "log"
    done = run("train_gpt2.py", *flags(here, log_dir), env=env)
    assert "/wandb/offline-run-" in said(done.stdout) and "wandb:" not in done.stdout + done.stderr
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
    (log_dir / "step_000008").rename(tmp_path / "gone")  # as if it had died after the save before
    run("train_gpt2.py", "--resume", "--log_dir", log_dir, "--device", "cpu", env=env)  # to the same project
    assert (log_dir / "log.txt").read_bytes() == log and len(list(log_dir.glob("wandb/offline-run-*"))) == 2
    again = read_wandb(log_dir)
    assert again[0] == run_id
    check(again[2])

    run("train_gpt2.py", *flags(here, log_dir, "--max_steps", 1), env=env)  # another run, and another there
    assert len(list(log_dir.glob("wandb/offline-run-*"))) == 1 and read_wandb(log_dir)[0] != run_id
    (old,) = log_dir.glob("old-*")
    assert read_wandb(old)[0] == run_id and not list((tmp_path / "home").rglob("*wandb*"))


@pytest.mark.parametrize(
    "env, message",
    [
        (dict(PYTHONPATH="without"), "No module named 'wandb'"),
        (dict(WANDB_MODE="online"), "No API key configured."),
        (dict(WANDB_MODE="online", WANDB_API_KEY=40 * "a", WANDB_BASE_URL="http://127.0.0.1:9"), ""),
    ],
)
def test_what_cannot_start_is_one_line(here, tmp_path, env, message):
    (tmp_path / "without").mkdir()
    (tmp_path / "without/wandb.py").write_text("raise ModuleNotFoundError(\"No module named 'wandb'\")")
    script = with_fault(tmp_path, "runlog.WandB.patience = 2.0")
    done = run(script, *flags(here, "log"), env=environment(tmp_path) | env, cwd=tmp_path)
    assert said(done.stdout).startswith(f"no Weights & Biases: {message}") and not done.stderr
    assert (tmp_path / "log/log.txt").read_bytes() == (here / "plain/log.txt").read_bytes()


FAULT = """
runlog.WandB.patience = 2.0
if calls == 5 and model.training:
    from pathlib import Path
    while not Path("log/wandb/id.txt").exists():
        time.sleep(0.02)
    (pid,) = [int(pid) for f in Path("/proc/self/task").glob("*/children") for pid in f.read_text().split()]
    Path("pid").write_text(str(pid))
    os.kill(pid, signal.{})
"""


@pytest.mark.parametrize("name, message", [("SIGKILL", ""), ("SIGSTOP", "it does not answer")])
def test_its_process_dies_or_hangs_in_mid_run(here, tmp_path, name, message):
    script = with_fault(tmp_path, FAULT.format(name))
    env = ENVIRONMENT | environment(tmp_path)
    with open(tmp_path / "output", "w") as output:  # no pipe: what hangs would keep it open
        line = command(script, *flags(here, "log"))
        done = subprocess.run(line, cwd=tmp_path, env=env, stdout=output, stderr=output, timeout=240)
    if name == "SIGSTOP":
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    _, *rest = [line for line in (tmp_path / "output").read_text().splitlines() if "Weights & Biases" in line]
    assert done.returncode == 0 and len(rest) == 1 and rest[0].startswith(f"no Weights & Biases: {message}")
    assert "Traceback" not in (tmp_path / "output").read_text()
    assert (tmp_path / "log/log.txt").read_bytes() == (here / "plain/log.txt").read_bytes()
