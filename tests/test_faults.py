"""Nothing is ever lost: runs that are killed, stopped, cut off, flipped, filled up; and what comes back."""

import contextlib
import csv
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import tokens
import train_gpt2
from conftest import (
    BOOKS_TEXT,
    ENVIRONMENT,
    ROOT,
    assert_close,
    command,
    losses,
    read_log,
    run,
    start,
    wait_for_step,
    weights,
    with_fault,
)
from model import GPT, GPTConfig
from runs import compiling_above
from runtime import checkpoint

# 2 layers, 64 wide, 32 tokens, 2 rows a step, 60 steps, a save every 5; dropout, so that random numbers count, too.
RUN = (
    "--n_layer 2 --n_head 2 --n_embd 64 --seq_len 32 --total_batch_size 64 --max_steps 60 --max_lr 1e-3 --dropout 0.1 "
    "--dtype float32 --compile off --device cpu --eval_every 10 --eval_tokens 256 --sample_every 0 --save_every 5 "
    "--dist_timeout 60"
).split()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(BOOKS_TEXT.read_text()[:40000])
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, text) -> Path:
    """The log directory of a run to its end; its micro-batch is one that two ranks can have, too."""
    log = tmp_path_factory.mktemp("undisturbed")
    run("train_gpt2.py", *RUN, "--data", text, "--log_dir", log, "--micro_batch_size", 1)
    return log


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, text) -> Path:
    """The directory of a run that a SIGTERM has stopped after step 11."""
    directory = tmp_path_factory.mktemp("stopped")
    script = with_fault(directory, "if calls == 1 + 2 * 12: os.kill(os.getpid(), signal.SIGTERM)")
    run(script, *RUN, "--data", text, "--log_dir", directory / "log", "--micro_batch_size", 1, status=143)
    assert list(checkpoint.saves(directory / "log")) == [10, 12]
    return directory / "log"


@pytest.fixture
def log(tmp_path, stopped) -> Path:
    """A copy of that."""
    return Path(shutil.copytree(stopped, tmp_path / "log"))


def resume(log: Path, text: Path, *flags, script: str | Path = "train_gpt2.py", **kwargs):
    return run(script, *RUN, "--data", text, "--log_dir", log, "--micro_batch_size", 1, "--resume", *flags, **kwargs)


def assert_same_run(log: Path, undisturbed: Path) -> None:
    """Each loss and the last weights bit for bit, each step logged once."""
    for kind in "train", "val":
        assert read_log(log, kind) == read_log(undisturbed, kind)
    assert weights(log) == weights(undisturbed)
    with open(log / "steps.csv") as f:
        assert [int(row["step"]) for row in csv.DictReader(f)] == list(range(60))
    assert not list(log.glob(".unfinished-*"))


# Kills


@pytest.mark.parametrize(
    "kills, steps",
    [
        pytest.param(5, 60),
        pytest.param(20, 60, marks=pytest.mark.slow),
        pytest.param(100, 300, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments(tmp_path, text, undisturbed, kills, steps):
    """One command, again and again, killed at random moments: half of them when a save has just begun."""
    rng = random.Random(kills)
    flags = *RUN, "--data", text, "--micro_batch_size", 1, "--resume", "--max_steps", steps
    if steps > 60:
        undisturbed = tmp_path / "undisturbed"
        run("train_gpt2.py", *flags, "--log_dir", undisturbed)
    log, fell = tmp_path / "log", []
    while len(fell) < kills:
        process = start(*flags, "--log_dir", log)
        if len(fell) % 2:  # in one of the first two saves, or in the deletion after it
            for _ in range(rng.randrange(2)):
                next(line for line in process.stdout if "saved" in line)
            while not list(log.glob(".unfinished-*")) and process.poll() is None:
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.1))
        else:
            for _ in range(rng.randrange(7)):
                next(line for line in process.stdout if "loss" in line)
            time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        unfinished = [p.name.removeprefix(".unfinished-") for p in log.glob(".unfinished-*")]
        lines = (log / "log.txt").read_text().splitlines() if (log / "log.txt").exists() else []
        saved = [*checkpoint.saves(log)] if log.exists() else []
        after = f"after {lines[-1].split()[1]} at step {lines[-1].split()[0]}" if lines else "before the first step"
        inside = [f"{'pruning' if saved and int(name[5:]) < saved[-1] else 'saving'} {name}" for name in unfinished]
        fell.append(f"{after}{', ' if inside else ''}{', '.join(inside)}; saves {saved}")
        assert len(saved) == 0 or checkpoint.newest(log)[1]["step"] == saved[-1]
    done = run("train_gpt2.py", *flags, "--log_dir", log)
    print(f"\n{kills} kills:", *fell, sep="\n  ")
    assert sum("saving" in where for where in fell) >= kills // 4
    assert "resumed" in done.stdout
    assert read_log(log) == read_log(undisturbed) and read_log(log, "val") == read_log(undisturbed, "val")
    assert weights(log) == weights(undisturbed) and not list(log.glob(".unfinished-*"))


@pytest.mark.slow
def test_killed_at_the_default_settings(tmp_path, text):
    """In bfloat16, compiled as --compile auto decides for more than 40 of the 60 steps, on two threads: bitwise."""
    script = tmp_path / "compiling.py"
    script.write_text(compiling_above(40 * 512 * 6 * 50304 * 64))
    flags = *RUN, "--data", text, "--dtype", "bfloat16", "--compile", "auto", "--total_batch_size", 512, "--resume"
    env = dict(OMP_NUM_THREADS="2")
    whole = run(script, *flags, "--log_dir", tmp_path / "whole", env=env)
    log = tmp_path / "log"
    for step in 8, 29:
        process = start(*flags, "--log_dir", log, script=script, **env)
        wait_for_step(log, step, process)
        process.kill()
        process.communicate()
    done = run(script, *flags, "--log_dir", log, env=env)
    assert "resumed" in done.stdout and "not compiled" not in whole.stdout + done.stdout
    assert read_log(log) == read_log(tmp_path / "whole") and weights(log) == weights(tmp_path / "whole")


DYING = """
import os, shutil, sys
sys.path.insert(0, {root!r})
from pathlib import Path
import torch, tokens
from runtime import checkpoint
from model import GPT, GPTConfig

def state(step):
    torch.manual_seed(step)
    model = GPT(GPTConfig(8, 512, 1, 1, 8))
    return model, dict(optimizer=torch.full((100,), float(step)), scaler={{}})

os.fsync = lambda fd: None  # a process that dies takes no written byte along
log = Path("log")
log.mkdir()
for step in 5, 10:
    checkpoint.save(log, step, *state(step), {{}})
shutil.copytree(log, "before")

def save_and_prune(last_line):
    lines = 0
    def trace(frame, event, arg):
        nonlocal lines
        files = checkpoint.__file__, tokens.__file__, GPT.save_pretrained.__code__.co_filename, shutil.__file__
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            lines += 1
            if lines == last_line:
                os._exit(9)
        return trace
    args = *state(15), {{}}
    sys.settrace(trace)
    checkpoint.save(log, 15, *args)
    checkpoint.prune(log, 1, None)
    sys.settrace(None)
    os._exit(0)

deaths = 0
found = []
while True:
    deaths += 1
    if (child := os.fork()) == 0:
        save_and_prune(deaths)
    _, status = os.waitpid(child, 0)
    directory, record, passed_over = checkpoint.newest(log)
    assert not passed_over, passed_over
    model, loaded = checkpoint.load(directory)
    expected, trained = state(record["step"])
    assert loaded["optimizer"].equal(trained["optimizer"])
    assert all(a.equal(b) for a, b in zip(model.parameters(), expected.parameters()))
    found.append(record["step"])
    checkpoint.clean(log)
    assert all(p.name.startswith("step_") for p in log.iterdir()), list(log.iterdir())
    if status == 0:
        break
    assert os.waitstatus_to_exitcode(status) == 9
    shutil.rmtree(log)
    shutil.copytree("before", log)
assert found == sorted(found) and list(checkpoint.saves(log)) == [15]
print(deaths - 1, found.count(10), found.count(15))
"""


def test_death_before_each_line_of_save_and_prune(tmp_path):
    """A child process for every line that they run, which dies before it: what is found is whole, the last save or the
    one before; what is left lying about is removed."""
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(root=str(ROOT)))
    done = run(script, cwd=tmp_path)
    deaths, before, after = map(int, done.stdout.split())
    print(f"{deaths} deaths: {before} times the save before was found, {after} times the new one")
    assert deaths > 100 and before > 50 and after > 10


@pytest.mark.parametrize("number, status, step", [(signal.SIGTERM, 143, 6), (signal.SIGINT, 130, 23)])
def test_stopped_by_a_signal(tmp_path, text, undisturbed, number, status, step):
    """The step ends, one save is made, of that step, and the run goes on from there."""
    log = tmp_path / "log"
    script = with_fault(tmp_path, f"if calls == {1 + 2 * (step + 1)}: os.kill(os.getpid(), {int(number)})")
    flags = *RUN, "--data", text, "--log_dir", log, "--micro_batch_size", 1
    done = run(script, *flags, status=status)
    assert f"stopped by {number.name} after step {step}; add --resume" in done.stdout
    assert [line for line in done.stdout.splitlines() if f"step {step + 1}: saved" in line]
    assert list(read_log(log)) == list(range(step + 1)) and max(checkpoint.saves(log)) == step + 1
    assert f"at step {step + 1}: nothing changed" in resume(log, text).stdout
    assert_same_run(log, undisturbed)


def test_a_second_signal_stops_at_once(tmp_path, text):
    fault = "if calls > 13: os.kill(os.getpid(), signal.SIGTERM); time.sleep(2)\nif calls > 14: raise AssertionError"
    log = tmp_path / "log"
    flags = *RUN, "--data", text, "--log_dir", log, "--micro_batch_size", 1
    run(with_fault(tmp_path, fault), *flags, status=143)
    assert max(read_log(log)) == 5 and max(checkpoint.saves(log)) == 5  # in the middle of step 6, the last save at 5


# Ranks and hosts


def test_two_ranks_stop_together_for_a_signal_to_one(tmp_path, text):
    """And resumed on two, they are bit for bit what two would have been."""
    log, whole = tmp_path / "log", tmp_path / "whole"
    flags = *RUN, "--data", text, "--micro_batch_size", 1, "--max_steps", 25
    run("train_gpt2.py", *flags, "--log_dir", whole, ranks=2)
    script = with_fault(tmp_path, "if rank == 1 and calls == 14: os.kill(os.getpid(), signal.SIGTERM)")
    done = run(script, *flags, "--log_dir", log, ranks=2, status=1)  # 1 is torchrun's own
    assert done.stdout.count("stopped by SIGTERM after step 12") == 1 and done.stdout.count("step 13: saved") == 1
    run("train_gpt2.py", *flags, "--log_dir", log, "--resume", ranks=2)
    assert read_log(log) == read_log(whole) and read_log(log, "val") == read_log(whole, "val")
    assert weights(log) == weights(whole)


def test_a_signal_to_every_process_of_a_job(tmp_path, text):
    """As systemd sends it, and Slurm with SignalChildrenProcesses: each rank has it twice, directly and from torchrun's
    agent, and stops as for one."""
    log = tmp_path / "log"
    script = with_fault(tmp_path, "if calls > 12: time.sleep(0.5)")
    line = command(script, *RUN, "--data", text, "--log_dir", log, "--micro_batch_size", 1, ranks=2)
    agent = subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_step(log, 12, agent)
    for pid in [*ranks_of(agent), agent.pid]:
        os.kill(pid, signal.SIGTERM)
    output = agent.communicate(timeout=60)[0]
    assert "stopped by SIGTERM" in output and max(checkpoint.saves(log)) == max(read_log(log)) + 1, output


def start_pair(log: Path, text: Path, port: int) -> list[subprocess.Popen]:
    """Two ranks without an agent that would end one when the other dies."""
    ranks = []
    for rank in "01":
        env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        env |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        flags = "--data", text, "--log_dir", log, "--micro_batch_size", 1, "--dist_timeout", 5, "--resume"
        ranks.append(start(*RUN, *flags, **env))
    return ranks


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_ends_the_other_in_bounded_time(log, text, undisturbed, number):
    first, second = start_pair(log, text, port=29610 + number + os.getpid() % 1000)
    wait_for_step(log, 22, first)
    second.send_signal(number)
    lost = time.monotonic()
    output = first.communicate(timeout=60)[0]
    seconds = time.monotonic() - lost
    second.kill()
    second.communicate()
    assert first.returncode == 1 and "train_gpt2.py: error: rank 0 has lost another: " in output
    assert seconds < 5 + 10  # the timeout, and what a busy machine takes to end a process
    resume(log, text)
    assert_close(losses(log), losses(undisturbed))


def test_torchrun_restarts_from_the_newest_save(tmp_path, text, undisturbed):
    """A rank dies at step 33."""
    log, mark = tmp_path / "log", tmp_path / "died"
    fault = f"if rank == 1 and calls == 35 and not os.path.exists({str(mark)!r}):\n"
    fault += f"    open({str(mark)!r}, 'w').close(); os.kill(os.getpid(), signal.SIGKILL)"
    flags = *RUN, "--data", text, "--log_dir", log, "--micro_batch_size", 1
    line = command(with_fault(tmp_path, fault), *flags, "--resume", ranks=2)
    line.insert(line.index("--standalone"), "--max-restarts=1")
    env = ENVIRONMENT | dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")  # as the README has it: pytorch issue 135712
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and mark.exists(), done.stderr
    assert "step_000030 at step 30: nothing changed" in done.stdout
    assert_close(losses(log), losses(undisturbed))


def test_other_ranks_and_micro_batches_at_each_resume(tmp_path, text):
    """One rank, then two, then one: the same tokens each step, and so the same losses. (With dropout the masks would be
    others, which are drawn for a micro-batch.)"""
    flags = *RUN, "--data", text, "--dropout", 0, "--max_steps", 30, "--total_batch_size", 128
    run("train_gpt2.py", *flags, "--log_dir", tmp_path / "whole")
    log = tmp_path / "log"
    script = with_fault(tmp_path, "if calls == 1 + 10: os.kill(os.getpid(), signal.SIGTERM)")
    run(script, *flags, "--log_dir", log, "--micro_batch_size", 4, status=143)
    done = run(script, *flags, "--log_dir", log, "--micro_batch_size", 2, "--resume", ranks=2, status=1)
    assert "at step 10: micro_batch_size 4 → 2, ranks 1 → 2" in done.stdout
    done = run("train_gpt2.py", *flags, "--log_dir", log, "--micro_batch_size", 1, "--resume")
    assert "at step 20: micro_batch_size 2 → 1, ranks 2 → 1" in done.stdout
    assert_close(losses(log), losses(tmp_path / "whole"))


@pytest.mark.parametrize(
    "ranks, what, code",
    [
        (1, "loss nan", "return None, loss * float('nan')"),
        (2, "loss nan", "return None, loss * float('nan')"),
        (2, "gradient norm nan", "model.transformer.wpe.weight.register_hook(lambda grad: grad * float('nan'))"),
    ],
)
def test_what_is_not_finite_stops_all_ranks_before_any_weight_changes(tmp_path, text, ranks, what, code):
    log = tmp_path / "log"
    fault = f"if rank == {ranks - 1} and calls == 9: {code}"
    flags = *RUN, "--data", text, "--log_dir", log, "--micro_batch_size", 2 // ranks, "--save_every", 7
    done = run(with_fault(tmp_path, fault), *flags, ranks=ranks, status=3 if ranks == 1 else 1)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("train_gpt2.py: error")]
    assert line.startswith("train_gpt2.py: error: step 7: ") and what in line
    assert line.endswith("stopped before any weight changed")
    assert ranks == 1 or "exitcode  : 3" in done.stderr
    assert list(read_log(log)) == list(range(7))
    directory, record, passed_over = checkpoint.newest(log)
    assert record["step"] == 7 and not passed_over
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
        flags = *RUN, "--data", text, "--log_dir", "log", "--micro_batch_size", 1, "--dist_timeout", 10, "--resume"
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


def gone(pids: list[int], seconds: float) -> bool:
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
def test_a_host_that_is_lost(tmp_path, text, undisturbed, hosts, fault):
    """The other's rank ends within --dist_timeout (torchrun's own agents may wait longer), and both go on later."""
    agents = [hosts(i, text, *AT_FIRST) for i in (0, 1)]
    log = tmp_path / "host0/log"
    wait_for_step(log, 22, agents[0])
    ranks = [ranks_of(agent) for agent in agents]
    if fault == "killed":
        kill_all(agents[1])
        assert gone(ranks[0], 10 + 10)
    else:
        hosts.link("down")
        assert gone(ranks[0] + ranks[1], 10 + 10)
        hosts.link("up")
    assert "rank 0 has lost another" in (tmp_path / "host0/output").read_text()
    for agent in agents:
        kill_all(agent)
    assert len(read_log(log)) < 60
    agents = [hosts(i, text, *AT_FIRST) for i in (0, 1)]
    assert [agent.wait(timeout=200) for agent in agents] == [0, 0], (tmp_path / "host0/output").read_text()
    assert_close(losses(log), losses(undisturbed))
    assert not (tmp_path / "host1/log").exists()


@pytest.mark.slow
def test_torchrun_restarts_two_hosts(tmp_path, text, undisturbed, hosts):
    """The rank of one is killed; both agents start theirs again, and the run goes on from the newest save."""
    agents = [hosts(i, text, *AT_FIRST, "--max-restarts=3") for i in (0, 1)]
    log = tmp_path / "host0/log"
    wait_for_step(log, 22, agents[0])
    (rank,) = ranks_of(agents[1])
    os.kill(rank, signal.SIGKILL)
    assert [agent.wait(timeout=200) for agent in agents] == [0, 0], (tmp_path / "host0/output").read_text()
    assert "resumed" in (tmp_path / "host0/output").read_text()
    assert_close(losses(log), losses(undisturbed))


# Saves that are broken


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as f:
        f.seek(bit // 8)
        byte = f.read(1)[0]
        f.seek(bit // 8)
        f.write(bytes([byte ^ 1 << bit % 8]))


def test_no_flipped_bit_and_no_truncation_is_loaded(tmp_path):
    """300 bits and 20 lengths, in all files of the newest save by turns: each time the one before is found instead."""
    rng = random.Random(0)
    model = GPT(GPTConfig(8, 512, 1, 1, 8))
    for step in 5, 10:
        save = checkpoint.save(tmp_path, step, model, dict(optimizer=torch.zeros(1000)), dict(config=dict(seed=1)))
    files = sorted(save.iterdir())
    assert "checkpoint.json" in [path.name for path in files]
    for i in range(320):
        path = files[i % len(files)]
        whole = path.read_bytes()
        if i < 300:
            flip(path, rng.randrange(8 * len(whole)))
        else:
            os.truncate(path, rng.randrange(len(whole)))
        directory, record, passed_over = checkpoint.newest(tmp_path)
        assert record["step"] == 5 and directory.name == "step_000005"
        assert len(passed_over) == 1 and str(path) in passed_over[0]
        with pytest.raises(checkpoint.CheckpointError):
            checkpoint.verify(save)
        path.write_bytes(whole)
    assert checkpoint.newest(tmp_path)[1]["step"] == 10


def test_a_broken_save_is_passed_over_and_an_older_one_may_be_chosen(log, text, undisturbed):
    flip(log / "step_000012/model.safetensors", 8 * 100_000 + 3)
    refused = run("train_gpt2.py", "--device", "cpu", "--resume", log / "step_000012", status=2)
    assert "step_000012/model.safetensors: does not match its SHA-256; --resume alone takes" in refused.stderr
    done = resume(log, text, "--keep", 50)
    assert f"passed over a save: {log}/step_000012/model.safetensors: does not match its SHA-256" in done.stdout
    assert "step_000012 set aside as bad-step_000012" in done.stdout and (log / "bad-step_000012").is_dir()
    assert_same_run(log, undisturbed)
    (log.parent / "link").symlink_to(log)
    again = resume(log, text, log.parent / "link/step_000050", "--keep", 50)
    assert "step_000055 set aside as old-step_000055" in again.stdout and "at step 50" in again.stdout
    assert {"old-step_000055", "old-step_000060", "step_000055", "step_000060"} < {p.name for p in log.iterdir()}
    assert_same_run(log, undisturbed)


def test_a_save_deleted_by_hand_and_one_copied_elsewhere(tmp_path, log, text, undisturbed):
    moved = Path(shutil.copytree(log / "step_000010", tmp_path / "elsewhere/copied"))
    shutil.rmtree(log / "step_000012")
    assert "at step 10" in resume(log, text).stdout
    assert_same_run(log, undisturbed)
    new = tmp_path / "new"
    run("train_gpt2.py", "--resume", moved, "--device", "cpu", "--log_dir", new)  # the rest comes from the save
    assert list(read_log(new)) == list(range(10, 60)) and weights(new) == weights(undisturbed)


class Payload:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("rehashed", [False, True])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps(Payload()), Payload(), {}, [1]])
def test_what_is_no_state_is_refused_and_never_runs(tmp_path, log, text, capsys, monkeypatch, content, rehashed):
    """With the wrong hash, and by somebody who knew how to make a right one."""
    monkeypatch.chdir(tmp_path)
    path = log / "step_000012/trainer_state.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    if rehashed:
        record = json.loads((path.parent / "checkpoint.json").read_text())
        del record["sha256"]
        record["files"][path.name] = dict(bytes=path.stat().st_size, sha256=tokens.sha256(path))
        record["sha256"] = checkpoint._digest(record)
        (path.parent / "checkpoint.json").write_bytes(checkpoint._canonical(record))
    assert train_gpt2.main(["--resume", str(path.parent), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train_gpt2.py: error: ") and error.count("\n") == 1
    assert ("cannot be loaded" if rehashed else "trainer_state.pt: ") in error
    assert not (tmp_path / "ran").exists()


def test_a_model_file_with_code_in_it_never_runs(tmp_path, log, text, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (log / "step_000012/model.safetensors").unlink()
    torch.save(Payload(), log / "step_000012/pytorch_model.bin")
    flags = "--init_from", log / "step_000012", "--data", text, "--device", "cpu"
    assert train_gpt2.main([*map(str, flags)]) == 2
    assert "step_000012: no GPT-2 there, or out of reach: " in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


# Disks


@pytest.mark.parametrize("limit, where", [(2**20, "model.safetensors"), (20 * 2**20, "trainer_state.pt")])
def test_a_file_that_cannot_be_written_whole(log, text, undisturbed, limit, where):
    """Where safetensors fails, and where torch does."""
    before = {p.name for p in log.iterdir()}
    limits = dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    done = resume(log, text, status=4, **limits)
    assert f"train_gpt2.py: error: {log}/step_000015: could not be saved: " in done.stderr
    assert "bytes are free there" in done.stderr and done.stderr.count("\n") == 1
    assert {p.name for p in log.iterdir()} == before
    assert all(checkpoint.verify(directory) for directory in checkpoint.saves(log).values())
    resume(log, text)
    assert_same_run(log, undisturbed)


@pytest.mark.parametrize(
    "then, status, said",
    [
        ("os.kill(os.getpid(), signal.SIGTERM)", 4, "finishing the step"),
        ("return None, loss * float('nan')", 3, "step 5: loss nan"),
    ],
)
def test_a_save_that_fails_is_told_whatever_else_happens_in_that_step(tmp_path, text, then, status, said):
    script = with_fault(tmp_path, f"if calls == 13:\n    time.sleep(5)\n    {then}")
    flags = *RUN, "--data", text, "--log_dir", tmp_path / "log", "--micro_batch_size", 1
    limits = dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)))
    done = run(script, *flags, status=status, **limits)
    assert "step_000005: could not be saved: " in done.stderr and said in done.stderr
    assert list(read_log(tmp_path / "log"))[-1] == (5 if status == 4 else 4)


@pytest.fixture
def mount(tmp_path):
    """A function that mounts a small file system, or mounts it again with other options."""
    directory = tmp_path / "disk"
    directory.mkdir()

    def mount(options: str) -> Path:
        line = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory]
        if shutil.which("mount") is None or subprocess.run(line, capture_output=True).returncode:
            pytest.skip("file systems cannot be mounted here")
        return directory

    yield mount
    subprocess.run(["umount", directory], capture_output=True)


def test_a_disk_that_fills_up(mount, text, undisturbed):
    """A save takes 41 MB: the third that is there at a time does not fit any more."""
    log = mount("size=100m") / "log"
    flags = "--data", text, "--log_dir", log, "--micro_batch_size", 1, "--resume"
    done = run("train_gpt2.py", *RUN, *flags, status=4)
    assert f"error: {log}/step_000015: could not be saved: " in done.stderr and "bytes are free there" in done.stderr
    assert not list(log.glob(".unfinished-*"))
    assert [record["step"] for record in map(checkpoint.verify, checkpoint.saves(log).values())] == [5, 10]
    mount("remount,size=200m")
    run("train_gpt2.py", *RUN, *flags)
    assert_same_run(log, undisturbed)


def test_a_log_directory_that_is_read_only(mount, text):
    log = mount("size=1m,ro")
    done = run("train_gpt2.py", *RUN, "--data", text, "--log_dir", log, status=2)
    assert done.stderr == f"train_gpt2.py: error: --log_dir {log}: {log} cannot be written to\n" and not done.stdout


@pytest.mark.parametrize("keep", [2, 3, 4])
def test_the_newest_are_kept_and_the_best(tmp_path, keep):
    for step in range(5, 45, 5):
        (tmp_path / f"step_{step:06d}").mkdir()
    assert checkpoint.prune(tmp_path, keep, best_step=None) == []
    assert list(checkpoint.saves(tmp_path)) == [*range(5, 45, 5)][-keep:]
    (tmp_path / "step_000005").mkdir()
    (tmp_path / "step_000010").mkdir()
    assert checkpoint.prune(tmp_path, keep, best_step=5) == []
    assert list(checkpoint.saves(tmp_path)) == [5, *range(5, 45, 5)[-keep:]]


def test_a_deletion_that_fails(tmp_path, text):
    """The run goes on, and says so; what could not be deleted is no save any more, and goes at the next start."""
    fault = (
        "def fail(path, ignore_errors=False):\n    if not ignore_errors: raise OSError(16, 'Device busy', str(path))"
    )
    flags = *RUN, "--data", text, "--log_dir", tmp_path / "log", "--keep", 2, "--eval_every", 0
    done = run(with_fault(tmp_path, f"{fault}\ncheckpoint.shutil.rmtree = fail"), *flags, "--max_steps", 20)
    assert "step_000005 could not be deleted (Device busy); going on" in done.stdout
    assert list(checkpoint.saves(tmp_path / "log")) == [15, 20]
    assert len(list((tmp_path / "log").glob(".unfinished-*"))) == 2
    run("train_gpt2.py", *flags, "--max_steps", 20, "--resume")
    assert not list((tmp_path / "log").glob(".unfinished-*"))
