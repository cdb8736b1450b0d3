"""Runs on several ranks and hosts: they stop together, end when one is lost, and resume on other numbers of ranks."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import (
    ENVIRONMENT,
    ROOT,
    RUN,
    assert_close,
    assert_same_run,
    at_step,
    command,
    losses,
    read_log,
    resume,
    run_in_process,
    run_ranks,
    wait_for_step,
    with_fault,
)
from runtime import checkpoint


def test_two_ranks_stop_together_and_resume_is_bitwise(tmp_path, text):
    """One of them has got the signal."""
    log, whole = tmp_path / "log", tmp_path / "whole"
    flags = *RUN, "--data", text, "--max_steps", 16
    run_ranks("train_gpt2.py", *flags, "--log_dir", whole)
    script = with_fault(tmp_path, at_step(8, "os.kill(os.getpid(), signal.SIGTERM)", rank=1))
    done = run_ranks(script, *flags, "--log_dir", log, status=143)
    assert done.statuses == [143, 143]
    assert done.stdout.count("stopped by SIGTERM after step 8") == 1 and done.stdout.count("step 9: saved") == 1
    run_ranks("train_gpt2.py", *flags, "--log_dir", log, "--resume")
    assert_same_run(log, whole)


def test_signal_to_every_process_of_a_job_stops_it(tmp_path, text):
    """As systemd sends it, and Slurm with SignalChildrenProcesses: each rank gets it twice, directly and from torchrun's
    agent, and stops as for one."""
    log = tmp_path / "log"
    script = with_fault(tmp_path, "if step >= 8: time.sleep(0.5)")
    line = command(script, *RUN, "--data", text, "--log_dir", log, ranks=2)
    with open(tmp_path / "output", "w") as output:
        agent = subprocess.Popen(line, env=ENVIRONMENT, stdout=output, stderr=output)
    wait_for_step(log, 8, agent)
    ranks = ranks_of(agent)
    for pid in [*ranks, agent.pid]:
        os.kill(pid, signal.SIGTERM)
    ended = all_end(ranks, 60)
    kill_all(agent)
    output = (tmp_path / "output").read_text()
    assert ended and "stopped by SIGTERM" in output and "forcefully" not in output, output
    assert max(checkpoint.checkpoints(log)) == max(read_log(log)) + 1


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_lost_rank_ends_the_other_in_bounded_time(tmp_path, text, undisturbed, name):
    log = tmp_path / "log"
    fault = f"print('lost at', time.monotonic(), flush=True); os.kill(os.getpid(), signal.{name})"
    script = with_fault(tmp_path, at_step(12, fault, rank=1))
    flags = *RUN, "--data", text, "--log_dir", log, "--dist_timeout", 5
    done = run_ranks(script, *flags, status=1)
    (lost,) = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("lost at")]
    # The timeout, what a busy machine takes to end a process, and what the launcher waits for the other one.
    assert time.monotonic() - lost < 5 + 10 + 5
    assert "train_gpt2.py: error: rank 0 has lost another rank: " in done.stderr
    assert done.statuses == [1, -signal.SIGKILL]
    resume(log, text)
    assert_close(losses(log), losses(undisturbed))


def test_torchrun_restarts_from_the_newest_checkpoint(tmp_path, text, undisturbed):
    """A rank dies at step 13."""
    log, mark = tmp_path / "log", tmp_path / "died"
    fault = (
        f"if not os.path.exists({str(mark)!r}): open({str(mark)!r}, 'w').close(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    script = with_fault(tmp_path, at_step(13, fault, rank=1))
    line = command(script, *RUN, "--data", text, "--log_dir", log, "--resume", ranks=2)
    line.insert(line.index("--standalone"), "--max-restarts=3")  # one, and more if another process takes the port
    env = ENVIRONMENT | dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")  # as the README has it: pytorch issue 135712
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and mark.exists(), done.stderr
    assert "step_000010 at step 10: nothing changed" in done.stdout
    assert_close(losses(log), losses(undisturbed))


def test_ranks_and_micro_batch_may_change_at_resume(tmp_path, text):
    """One rank, then two, then one: the same tokens each step, and so the same losses. (With dropout the masks would be
    others, which are drawn for a micro-batch.)"""
    log, whole = tmp_path / "log", tmp_path / "whole"
    flags = *RUN, "--data", text, "--dropout", 0, "--total_batch_size", 64, "--keep", 10
    run_in_process(*flags, "--log_dir", whole, "--micro_batch_size", 4)
    shutil.copytree(whole / "step_000010", log / "step_000010")  # as if it had died there
    script = with_fault(tmp_path, at_step(19, "os.kill(os.getpid(), signal.SIGTERM)"))
    done = run_ranks(script, *flags, "--log_dir", log, "--micro_batch_size", 2, "--resume", status=143)
    assert "micro_batch_size 4 → 2, " in done.stdout and "ranks 1 → 2" in done.stdout
    done = run_in_process(*flags, "--log_dir", log, "--resume")
    assert "at step 20: micro_batch_size 2 → 1, ranks 2 → 1" in done.stdout
    assert_close(losses(log), losses(whole))


@pytest.mark.parametrize(
    "ranks, what, code",
    [
        (1, "loss nan", "return loss * float('nan')"),
        (2, "loss nan", "return loss * float('nan')"),
        (2, "gradient norm nan", "model.transformer.wpe.weight.register_hook(lambda grad: grad * float('nan'))"),
    ],
)
def test_nonfinite_values_stop_all_ranks_before_the_update(tmp_path, text, ranks, what, code):
    log = tmp_path / "log"
    script = with_fault(tmp_path, at_step(7, code, rank=ranks - 1))
    done = run_ranks(script, *RUN, "--data", text, "--log_dir", log, "--save_every", 7, ranks=ranks, status=3)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("train_gpt2.py: error")]
    assert line.startswith("train_gpt2.py: error: step 7: ") and what in line
    assert line.endswith("stopped before any weight changed")
    assert done.statuses == [3] * ranks
    assert list(read_log(log)) == list(range(7))
    directory, record, skipped = checkpoint.newest(log)
    assert record["step"] == 7 and not skipped
    model, state = checkpoint.load(directory)
    moments = [t for entry in state["optimizer"]["state"].values() for t in entry.values()]
    assert all(t.isfinite().all() for t in [*model.parameters(), *moments])


# Two hosts (slow): network namespaces with an address each, a link between them, and no directory in common but the text


@pytest.fixture
def hosts(tmp_path):
    """Two hosts as functions that start torchrun there, with these flags of torchrun's and these of the run."""
    names = [f"gpt2-{os.getpid()}-{i}" for i in (0, 1)]
    ends = [f"g{os.getpid() % 100_000}x{i}" for i in (0, 1)]

    def ip(*args):
        subprocess.run(["ip", *args], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for i in 0, 1:
            ip("link", "set", ends[i], "netns", names[i])
            ip("-n", names[i], "address", "add", f"10.213.0.{i + 1}/24", "dev", ends[i])
            ip("-n", names[i], "link", "set", ends[i], "up")
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("network namespaces cannot be made here")

    started = []

    def launch(i: int, text: Path, *torchrun, script: str | Path = "train_gpt2.py") -> subprocess.Popen:
        directory = tmp_path / f"host{i}"
        directory.mkdir(exist_ok=True)
        flags = *RUN, "--data", text, "--log_dir", "log", "--dist_timeout", 10, "--resume"
        line = ["ip", "netns", "exec", names[i], sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        line += [f"--node_rank={i}", "--nproc_per_node=1", *torchrun, str(ROOT / script), *map(str, flags)]
        env = ENVIRONMENT | dict(GLOO_SOCKET_IFNAME=ends[i], TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        pipes = dict(stdout=open(directory / "output", "a"), stderr=subprocess.STDOUT)
        started.append(subprocess.Popen(line, env=env, cwd=directory, start_new_session=True, **pipes))
        return started[-1]

    launch.link = lambda state: ip("-n", names[1], "link", "set", ends[1], state)
    yield launch
    for process in started:
        kill_all(process)
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def ranks_of(agent: subprocess.Popen) -> list[int]:
    """The process ids of the ranks that an agent of torchrun's has started."""
    return [int(pid) for pid in subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True).stdout.split()]


def kill_all(agent: subprocess.Popen) -> None:
    for pid in [*ranks_of(agent), agent.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    agent.wait()


def all_end(pids: list[int], seconds: float) -> bool:
    """Whether all these processes end within that time."""
    end = time.monotonic() + seconds
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < end:
        time.sleep(0.1)
    return not left


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False


AT_FIRST = "--master_addr=10.213.0.1", "--master_port=29500"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed", "cut off"])
def test_lost_host_ends_the_other(tmp_path, text, undisturbed, hosts, fault):
    """The other's rank ends within --dist_timeout (torchrun's own agents may wait longer), and both resume later."""
    agents = [hosts(i, text, *AT_FIRST) for i in (0, 1)]
    log = tmp_path / "host0/log"
    wait_for_step(log, 12, agents[0])
    ranks = [ranks_of(agent) for agent in agents]
    if fault == "killed":
        kill_all(agents[1])
        assert all_end(ranks[0], 10 + 10)
    else:
        hosts.link("down")
        assert all_end(ranks[0] + ranks[1], 10 + 10)
        hosts.link("up")
    assert "rank 0 has lost another rank" in (tmp_path / "host0/output").read_text()
    for agent in agents:
        kill_all(agent)
    assert len(read_log(log)) < 30
    agents = [hosts(i, text, *AT_FIRST) for i in (0, 1)]
    assert [agent.wait(timeout=200) for agent in agents] == [0, 0], (tmp_path / "host0/output").read_text()
    assert_close(losses(log), losses(undisturbed))
    assert not (tmp_path / "host1/log").exists()


@pytest.mark.slow
def test_torchrun_restarts_two_hosts(tmp_path, text, undisturbed, hosts):
    """The rank of one is killed; both agents start theirs again, and the run resumes from the newest checkpoint."""
    agents = [hosts(i, text, *AT_FIRST, "--max-restarts=3") for i in (0, 1)]
    log = tmp_path / "host0/log"
    wait_for_step(log, 12, agents[0])
    (rank,) = ranks_of(agents[1])
    os.kill(rank, signal.SIGKILL)
    assert [agent.wait(timeout=200) for agent in agents] == [0, 0], (tmp_path / "host0/output").read_text()
    assert "resumed" in (tmp_path / "host0/output").read_text()
    assert_close(losses(log), losses(undisturbed))
