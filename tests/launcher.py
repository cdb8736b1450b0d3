"""Runs forked from a process that has imported the libraries: importing them takes longer than a small run.

Each rank runs train_gpt2.py, or a script like it, as `__main__`, in the state that a fresh interpreter would be in,
after the code `fault`, which finds the rank's number in `rank` and may patch what it likes.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

SCRIPT = Path(__file__).resolve().parent.parent / "train_gpt2.py"


class Finished(NamedTuple):
    statuses: list[int]  # of each rank
    stdout: str
    stderr: str


class Launcher:
    """The process that forks. It ends with the one that has started it."""

    def __init__(self, env: dict[str, str]):
        line = [sys.executable, __file__]
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def launch(
        self,
        *flags,
        ranks: int = 1,
        script: Path = SCRIPT,
        cwd: Path | str = ".",
        fault: str = "",
        status: int | None = 0,
        timeout: float = 60,
    ) -> Finished:
        """Run with these flags to the end and check the exit status of each rank. Once one rank has failed, the others
        are killed after five seconds; at the timeout, in seconds, all are."""
        with tempfile.TemporaryDirectory() as outputs:
            request = dict(script=str(script), flags=[*map(str, flags)], ranks=ranks, cwd=os.path.abspath(cwd))
            self.process.stdin.write(json.dumps(request | dict(fault=fault, outputs=outputs, timeout=timeout)) + "\n")
            self.process.stdin.flush()
            statuses = json.loads(self.process.stdout.readline())
            stdout, stderr = (Path(outputs, name).read_text(errors="backslashreplace") for name in ("stdout", "stderr"))
        assert status is None or statuses == [status] * ranks, f"exit {statuses}\n{stdout}\n{stderr}"
        return Finished(statuses, stdout, stderr)


def run_rank(rank: int, port: int, request: dict) -> None:
    """Be one rank, in a child process."""
    for fd, name in (1, "stdout"), (2, "stderr"):
        os.dup2(os.open(Path(request["outputs"], name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    if request["ranks"] > 1:
        for name, value in ("RANK", rank), ("WORLD_SIZE", request["ranks"]):
            os.environ[name] = os.environ[f"LOCAL_{name}"] = str(value)
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv, sys.path[0] = [request["script"], *request["flags"]], str(SCRIPT.parent)
    exec(request["fault"], dict(rank=rank))
    from runtime import runlog

    runlog.plot = SimpleNamespace(draw=lambda log_dirs, file: file.touch())  # as in conftest.py
    runpy.run_path(request["script"], run_name="__main__")


def wait(ranks: dict[int, int], timeout: float) -> list[int]:
    """The exit statuses of the ranks, given by process id."""
    statuses, deadline = [0] * len(ranks), time.monotonic() + timeout
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            statuses[ranks.pop(pid)] = os.waitstatus_to_exitcode(status)
            if status:
                deadline = min(deadline, time.monotonic() + 5)
        elif time.monotonic() > deadline:
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return statuses


if __name__ == "__main__":
    import filelock  # noqa: F401
    import safetensors.torch  # noqa: F401
    import tiktoken  # noqa: F401
    import torch._dynamo  # noqa: F401
    import torch.distributed.fsdp  # noqa: F401
    import tqdm  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        pids = {}
        for rank in range(request["ranks"]):
            if (pid := os.fork()) == 0:
                run_rank(rank, port, request)
                sys.exit()
            pids[pid] = rank
        print(json.dumps(wait(pids, request["timeout"])), flush=True)
