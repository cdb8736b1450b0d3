"""Run a script on two ranks: python two_ranks.py SCRIPT FLAGS.

They are forks of one process that has imported torch, which torchrun and its ranks would do once each. A rank that is
stopped by SIGSTOP is killed when the other has ended. The exit status is that of rank 0.
"""

import os
import runpy
import signal
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_gpt2  # noqa: E402, F401

with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]  # a free one
sys.argv = sys.argv[1:]
pids = []
for rank in "01":
    if (pid := os.fork()) == 0:
        os.environ |= dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        runpy.run_path(sys.argv[0], run_name="__main__")  # which exits
    pids.append(pid)
statuses = []
for pid in pids:
    _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    statuses.append(os.waitstatus_to_exitcode(status))
print("exit statuses", *statuses, file=sys.stderr)
sys.exit(statuses[0])
