"""What the tests share: the scripts run as a user runs them, on models small enough for a test."""

from errors import run_script
import contextlib
import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from textwrap import indent
from types import SimpleNamespace

import pytest

# Before torch is imported: bits are compared, and pytest-xdist has every core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

import plot  # noqa: E402
import train_gpt2  # noqa: E402
from launcher import Finished, Launcher  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from runs import TINY, write_shards  # noqa: E402
from runtime import checkpoint, runlog  # noqa: E402

# Drawing curves.png takes as long as a test's steps: runs leave an empty one, but for a test with `drawn_curves`.
runlog.plot = SimpleNamespace(draw=lambda log_dirs, file: file.touch())

# A job that a shell has put into the background ignores Ctrl-C, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
BOOKS_TEXT = ROOT / "input.txt"

# Comparisons of bits need one thread; nothing may reach for the network; the flags come from the test alone.
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")},
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "CUDA_VISIBLE_DEVICES": "",
}

# 2 layers, 32 wide, 32 tokens, 8 rows a step, in float32 and eager.
SMALL = (
    "--n_layer 2 --n_head 2 --n_embd 32 --seq_len 32 --total_batch_size 256 --max_steps 8 --max_lr 1e-3 "
    "--dtype float32 --compile off --device cpu --eval_every 4 --eval_tokens 256 --sample_every 0 --save_every 4 "
    "--dist_timeout 60"
).split()

# 2 layers, 32 wide, 16 tokens, 2 sequences a step, in micro-batches that two ranks can have, too; 30 steps, a checkpoint
# every 5; dropout, so that random numbers count, too.
RUN = (
    "--n_layer 2 --n_head 2 --n_embd 32 --seq_len 16 --total_batch_size 32 --micro_batch_size 1 --max_steps 30 "
    "--max_lr 1e-3 --dropout 0.1 --dtype float32 --compile off --device cpu --eval_every 10 --eval_tokens 64 "
    "--sample_every 0 --save_every 5 --dist_timeout 60"
).split()


def command(script: str, *flags, ranks: int = 1) -> list[str]:
    """The command line of a script, alone or under torchrun."""
    python = [sys.executable]
    if ranks > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*python, str(ROOT / script), *map(str, flags)]


def run(script: str, *flags, ranks: int = 1, status: int | None = 0, **kwargs) -> subprocess.CompletedProcess:
    """Run a script to its end and check its exit status."""
    options = dict(env=ENVIRONMENT | kwargs.pop("env", {}), capture_output=True, text=True, timeout=240)
    done = subprocess.run(command(script, *flags, ranks=ranks), **options | kwargs)
    assert status is None or done.returncode == status, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def run_in_process(*flags, status: int = 0) -> subprocess.CompletedProcess:
    """Run train_gpt2.py in this process, which has imported torch already, and check its exit status."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        done = run_script(train_gpt2.main, [*map(str, flags)])
    assert done == status, f"exit {done}\n{stdout.getvalue()}\n{stderr.getvalue()}"
    return subprocess.CompletedProcess(flags, done, stdout.getvalue(), stderr.getvalue())


@cache
def launcher() -> Launcher:
    """Return the one launcher of this process, which ends with it."""
    return Launcher(ENVIRONMENT)


def run_ranks(script: str | Path, *flags, ranks: int = 2, status: int = 0, cwd: Path | str = ".") -> Finished:
    """Run a script by the launcher, without torchrun; check the exit status of rank 0."""
    done = launcher().launch(*flags, ranks=ranks, script=ROOT / script, status=None, cwd=cwd, timeout=240)
    assert done.statuses[0] == status, f"exit {done.statuses}\n{done.stdout}\n{done.stderr}"
    return done


def resume(log: Path, text: Path, *flags, status: int = 0) -> subprocess.CompletedProcess:
    """Resume the run of RUN in this process."""
    return run_in_process(*RUN, "--data", text, "--log_dir", log, "--resume", *flags, status=status)


def assert_same_run(log: Path, undisturbed: Path) -> None:
    """Each loss and the last weights bit for bit, each step logged once, nothing left unfinished."""
    for kind in "train", "val":
        assert read_log(log, kind) == read_log(undisturbed, kind)
    assert weights(log) == weights(undisturbed)
    with open(log / "steps.csv") as f:
        assert [int(row["step"]) for row in csv.DictReader(f)] == list(read_log(undisturbed))
    assert not list(log.glob(".unfinished-*"))


def read_log(log_dir: Path, name: str = "train") -> dict[int, str]:
    """The values of a kind in log.txt by step, as they are written; a step that is logged twice is an error."""
    lines = [line.split(" ") for line in (log_dir / "log.txt").read_text().splitlines()]
    assert all(len(line) == 3 for line in lines)
    values = [(int(step), value) for step, kind, value in lines if kind == name]
    assert len(values) == len(dict(values)), f"a step of {name} is logged twice"
    return dict(values)


def losses(log_dir: Path, name: str = "train") -> dict[int, float]:
    return {step: float(value) for step, value in read_log(log_dir, name).items()}


def assert_close(a: dict, b: dict) -> None:
    """Losses of two runs that differ in the order of their sums: float32 rounds at 6e-8, and 40 steps add to it."""
    assert a.keys() == b.keys()
    assert max(abs(a[step] - b[step]) for step in a) <= 1e-5


def weights(log_dir: Path) -> bytes:
    """Return the weights of the newest checkpoint."""
    return (max(log_dir.glob("step_*")) / "model.safetensors").read_bytes()


def start(*flags, ranks: int = 1, script: str | Path = "train_gpt2.py", **env: str) -> subprocess.Popen:
    """Start a run, both of whose outputs are to be read from its stdout."""
    line = command(script, *flags, ranks=ranks)
    return subprocess.Popen(line, env=ENVIRONMENT | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(log_dir: Path, step: int, process: subprocess.Popen) -> None:
    while not ((log_dir / "log.txt").exists() and f"\n{step} train" in (log_dir / "log.txt").read_text()):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


FAULTY = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from errors import run_script
import torch, train_gpt2
from model import GPT
from runtime import checkpoint, runlog
rank, step, micro_step, calls, trainer = int(os.environ.get("RANK", 0)), -1, 0, 0, None
forward, train_step = GPT.forward, train_gpt2.Trainer.train_step

def counted_train_step(self):
    global step, micro_step, trainer
    step, micro_step, trainer = self.step, -1, self
    return train_step(self)

def faulty(model, idx, targets=None):
    global calls, micro_step
    calls += model.training
    micro_step += model.training
    loss = forward(model, idx, targets)
{fault}
    return loss

train_gpt2.Trainer.train_step, GPT.forward = counted_train_step, faulty
sys.exit(run_script(train_gpt2.main))
"""


def with_fault(directory: Path, fault: str) -> Path:
    """Write a script that is train_gpt2.py, but for code that runs after each forward pass.

    The code has rank, trainer, loss, model, and step and micro_step of training; step is -1 in the probe, calls counts
    the passes.
    """
    script = directory / "faulty.py"
    script.write_text(FAULTY.format(root=str(ROOT), fault=indent(fault, "    ")))
    return script


def at_step(step: int, code: str, rank: int = 0, micro_step: int = 0) -> str:
    """Return a fault: code that runs in one forward pass of one rank."""
    return f"if (rank, step, micro_step) == ({rank}, {step}, {micro_step}):\n" + indent(code, "    ")


def perturbed(config: GPTConfig, seed: int = 0, std: float = 0.05) -> GPT:
    """Return a model with every parameter away from its initial value; padded rows stay zero."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += std * torch.randn_like(p)
        model.transformer.wte.weight[config.vocab_size :] = 0.0
    return model


def record(step: int, **values) -> dict:
    """Return the record of a checkpoint of no particular run."""
    config = dict(n_layer=1, n_head=1, n_embd=8, init_from=None, data="data", resume=None, log_dir="log")
    config |= dict(total_batch_size=8)
    return dict(step=step, ranks=1, flags={}, config=config, data={}, evaluated=False, validation_loss=None) | values


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest test, so that no core waits for it at the end."""
    items.sort(key=lambda item: "test_notebook_runs" not in item.name)


@pytest.fixture
def drawn_curves(monkeypatch) -> None:
    """Let runs draw their curves."""
    monkeypatch.setattr(runlog, "plot", plot)


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A text of 40,000 characters, which is quicker to tokenize than the whole. To read only."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(BOOKS_TEXT.read_text()[:40000])
    return path


@pytest.fixture(scope="session")
def launch():
    """`Launcher.launch` of the one launcher."""
    return launcher().launch


@pytest.fixture(scope="session")
def finished(tmp_path_factory, launch) -> Path:
    """A directory with shards in data/ and a run to its end in log/, with checkpoints of steps 4 and 8."""
    directory = tmp_path_factory.mktemp("finished")
    write_shards(directory / "data")
    launch(*TINY, cwd=directory)
    return directory


@pytest.fixture
def here(tmp_path, finished, monkeypatch) -> Path:
    """A copy of that, which is the working directory."""
    here = tmp_path / "here"
    shutil.copytree(finished, here)
    monkeypatch.chdir(here)
    for name in "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE":
        monkeypatch.delenv(name, raising=False)
    return here


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, text) -> Path:
    """The log directory of the run of RUN to its end. To read only."""
    log = tmp_path_factory.mktemp("undisturbed")
    run_in_process(*RUN, "--data", text, "--log_dir", log)
    return log


@pytest.fixture(scope="session")
def stopped(tmp_path_factory, text) -> Path:
    """The log directory of a run that a SIGTERM has stopped after step 11; beside it its output. To read only."""
    directory = tmp_path_factory.mktemp("stopped")
    script = with_fault(directory, at_step(11, "os.kill(os.getpid(), signal.SIGTERM)"))
    done = run_ranks(script, *RUN, "--data", text, "--log_dir", directory / "log", ranks=1, status=143)
    (directory / "output").write_text(done.stdout)
    assert list(checkpoint.checkpoints(directory / "log")) == [10, 12]
    return directory / "log"


@pytest.fixture
def log(tmp_path, stopped) -> Path:
    """A copy of that."""
    return Path(shutil.copytree(stopped, tmp_path / "log"))
