"""Runs that are killed or stopped by a signal, at whatever moment, resume as if nothing had happened."""

import os
import random
import shutil
import signal
import sys
import time

import pytest
import torch

import tokens
from conftest import (
    RUN,
    assert_same_run,
    at_step,
    read_log,
    record,
    resume,
    run,
    run_ranks,
    start,
    wait_for_step,
    with_fault,
)
from model import GPT, GPTConfig
from runs import compiling_above
from runtime import checkpoint


@pytest.mark.parametrize(
    "kills, steps",
    [
        pytest.param(4, 30),
        pytest.param(20, 60, marks=pytest.mark.slow),
        pytest.param(100, 300, marks=pytest.mark.slow),
    ],
)
def test_run_killed_at_random_moments_is_bitwise(tmp_path, text, undisturbed, kills, steps):
    """One command, again and again, killed at random moments: half of them when a checkpoint has just been begun."""
    rng = random.Random(5)
    flags = *RUN, "--data", text, "--resume", "--max_steps", steps
    if steps > 30:
        undisturbed = tmp_path / "undisturbed"
        run("train_gpt2.py", *flags, "--log_dir", undisturbed)
    log, moments = tmp_path / "log", []
    while len(moments) < kills:
        process = start(*flags, "--log_dir", log)
        if len(moments) % 2:  # while one of the first two checkpoints is written, or one deleted after it
            for _ in range(rng.randrange(2)):
                next(line for line in process.stdout if "saved" in line)
            while not list(log.glob(".unfinished-*")) and process.poll() is None:
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.02))  # a quick disk needs little more
        else:
            for _ in range(rng.randrange(7)):
                next(line for line in process.stdout if "loss" in line)
            time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        unfinished = [p.name.removeprefix(".unfinished-") for p in log.glob(".unfinished-*")]
        lines = (log / "log.txt").read_text().splitlines() if (log / "log.txt").exists() else []
        steps_saved = [*checkpoint.checkpoints(log)] if log.exists() else []
        moment = f"after {lines[-1].split()[1]} at step {lines[-1].split()[0]}" if lines else "before the first step"
        for name in unfinished:
            deleting = steps_saved and int(name[5:]) < steps_saved[-1]
            moment += f", {'deleting' if deleting else 'writing'} {name}"
        moments.append(f"{moment}; checkpoints {steps_saved}")
        assert not steps_saved or checkpoint.newest(log)[1]["step"] == steps_saved[-1]
    done = run("train_gpt2.py", *flags, "--log_dir", log)
    print(f"\n{kills} kills:", *moments, sep="\n  ")
    assert sum("writing" in moment for moment in moments) >= kills // 4
    assert "resumed" in done.stdout
    assert_same_run(log, undisturbed)


@pytest.mark.slow
def test_killed_compiled_bfloat16_run_is_bitwise(tmp_path, text):
    """In bfloat16 on two threads; --compile auto compiles, as the whole run is long enough, and what is left is not."""
    script = tmp_path / "compiling.py"
    script.write_text(compiling_above(40 * 512 * 6 * 50304 * 32))
    flags = *RUN, "--data", text, "--dtype", "bfloat16", "--compile", "auto", "--max_steps", 60, "--resume"
    flags += "--total_batch_size", 512, "--micro_batch_size", 16
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
    assert_same_run(log, tmp_path / "whole")


def test_death_before_any_line_leaves_a_good_checkpoint(tmp_path, monkeypatch):
    """Before each line that save and prune run, look at what a death there would leave on the disk: the newest
    checkpoint verifies and is the new one or the one before; what is unfinished is removed."""

    def state(step):
        torch.manual_seed(step)
        return GPT(GPTConfig(8, 512, 1, 1, 8)), dict(optimizer=torch.full((100,), float(step)), scaler={})

    def on_disk():
        return sorted((p, p.stat().st_size, p.stat().st_mtime_ns) for p in log.rglob("*"))

    def look():
        """Return the step that is found, and check it."""
        directory, its_record, skipped = checkpoint.newest(log)
        assert not skipped, skipped
        model, loaded = checkpoint.load(directory)
        expected, trained = state(its_record["step"])
        assert loaded["optimizer"].equal(trained["optimizer"])
        assert all(a.equal(b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
        shutil.copytree(log, tmp_path / "copy", copy_function=os.link)
        checkpoint.clean(tmp_path / "copy")
        assert all(p.name.startswith("step_") for p in (tmp_path / "copy").iterdir())
        shutil.rmtree(tmp_path / "copy")
        return its_record["step"]

    def trace(frame, event, arg):
        nonlocal seen
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            if on_disk() != seen:
                found.append(look())
                seen = on_disk()
            else:
                found.append(found[-1])
        return trace

    monkeypatch.setattr(os, "fsync", lambda fd: None)  # a process that dies takes no written byte along
    log, logs = tmp_path / "log", dict.fromkeys(checkpoint.LOGS, b"0 train 1\n")
    log.mkdir()
    for step in 5, 10:
        checkpoint.save(log, *state(step), logs, record(step), tokens.gpt2_tokenizer())
    files = checkpoint.__file__, tokens.__file__, GPT.save_pretrained.__code__.co_filename, shutil.__file__
    seen, found, new = on_disk(), [10], state(15)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        checkpoint.save(log, *new, logs, record(15), tokens.gpt2_tokenizer())
        failures = []
        checkpoint.prune(log, 1, failures.append)
    finally:
        sys.settrace(before)
    assert not failures and found == sorted(found) and list(checkpoint.checkpoints(log)) == [15]
    print(
        f"{len(found)} lines: {found.count(10)} times the checkpoint before is found, {found.count(15)} times the new"
    )
    assert found.count(10) > 50 and found.count(15) > 10


def test_stopped_run_is_bitwise(tmp_path, text, undisturbed, stopped, log):
    """The step ends, one checkpoint is written, of that step, and --resume continues: after SIGTERM, after SIGINT."""

    def check_stop(output, name, step):
        assert f"stopped by {name} after step {step}; add --resume" in output
        assert output.count(f"step {step + 1}: saved") == 1
        assert list(read_log(log)) == list(range(step + 1)) and max(checkpoint.checkpoints(log)) == step + 1

    check_stop((stopped.parent / "output").read_text(), "SIGTERM", 11)
    script = with_fault(tmp_path, at_step(23, "os.kill(os.getpid(), signal.SIGINT)"))
    done = run_ranks(script, *RUN, "--data", text, "--log_dir", log, "--resume", ranks=1, status=130)
    assert "at step 12: log_dir " in done.stdout
    check_stop(done.stdout, "SIGINT", 23)
    assert "at step 24: nothing changed" in resume(log, text).stdout
    assert_same_run(log, undisturbed)


def test_second_signal_stops_at_once(tmp_path, text):
    """In the middle of step 6; the newest checkpoint is the one of step 5."""
    signals = "os.kill(os.getpid(), signal.SIGTERM); time.sleep(2)"
    fault = "\n".join([at_step(6, signals), at_step(6, signals, micro_step=1), at_step(7, "raise AssertionError")])
    flags = *RUN, "--data", text, "--log_dir", tmp_path / "log"
    run_ranks(with_fault(tmp_path, fault), *flags, ranks=1, status=143)
    assert max(read_log(tmp_path / "log")) == 5 and max(checkpoint.checkpoints(tmp_path / "log")) == 5
