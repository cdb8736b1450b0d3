"""train_gpt2.py as its user runs it: real processes, real text, small models."""

import contextlib
import csv
import json
import math
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
from functools import partial
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import tokens
import train_gpt2
from conftest import (
    ENVIRONMENT,
    ROOT,
    SMALL,
    assert_close,
    command,
    losses,
    read_log,
    run,
    start,
    wait_for_step,
    with_fault,
)
from model import GPT, GPTConfig
from recipe import TrainConfig
from runtime import checkpoint
from runtime.device import choose_dtype, tune_malloc
from runtime.distributed import Ranks as RealRanks


def train(text, log_dir, *flags, **kwargs):
    return run("train_gpt2.py", *SMALL, "--data", text, "--log_dir", log_dir, *flags, **kwargs)


# The recipe


def straightforward_loop(theirs, text, T, R, lrs, seed, decay, clip, muon_ratio=None, amp=contextlib.nullcontext):
    """Loss and norm of each step, by code that shares none of ours, from transformers' weights and over its network."""
    content = text.read_text()
    ids = np.array(tokens.gpt2_encoding().encode_ordinary(content[: len(content) * 9 // 10]))
    n = (len(ids) - 1) // T
    order = np.concatenate([np.random.default_rng((seed, e)).permutation(n) for e in range(len(lrs) * R // n + 1)])
    # For Muon the blocks' matrices, (in, out) here: query, key and value, beside each other in c_attn, are three.
    matrices = {p: 3 if "c_attn" in name else 1 for name, p in theirs.transformer.h.named_parameters() if p.dim() > 1}
    matrices = matrices if muon_ratio else {}
    parts = [torch.nn.Parameter(part) for p, k in matrices.items() for part in p.data.chunk(k, dim=1)]
    decayed = [p for p in theirs.parameters() if p.dim() > 1 and p not in matrices]
    rest = [p for p in theirs.parameters() if p.dim() == 1]
    groups = [dict(params=decayed, weight_decay=decay), dict(params=rest, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=False)
    muon = torch.optim.Muon(parts, momentum=0.95, weight_decay=decay, adjust_lr_fn="match_rms_adamw") if parts else None
    theirs.eval()  # no dropout
    result = []
    for step, lr in enumerate(lrs):
        rows = torch.tensor(np.stack([ids[i * T : i * T + T + 1] for i in order[step * R : step * R + R]]))
        with amp():
            logits = theirs(rows[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip).item()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        if muon:
            for part, grad in zip(parts, (g for p, k in matrices.items() for g in p.grad.chunk(k, dim=1)), strict=True):
                part.grad = grad
            muon.param_groups[0]["lr"] = muon_ratio * lr
            muon.step()
        theirs.zero_grad()
        result.append((loss.item(), norm))
    return result


def cosine(step, steps, warmup, high, low):
    return low + 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) * (high - low)


def late(step, steps, warmup, high, low):
    return low + min(1, (steps - step) / (steps / 2)) * (high - low)


def rates(after_warm_up, steps, warmup, *bounds):
    up = [bounds[0] * (step + 1) / warmup for step in range(warmup)]
    return up + [after_warm_up(step, steps, warmup, *bounds) for step in range(warmup, steps)]


@pytest.mark.parametrize(
    "choice, lrs",
    [
        ("", rates(cosine, 8, 3, 2e-3, 5e-4)),
        ("--schedule wsd --decay_share 0.5 --optimizer muon --muon_ratio 3", rates(late, 8, 3, 2e-3, 5e-4)),
    ],
)
def test_a_run_equals_a_straightforward_loop_over_transformers(tmp_path, text, monkeypatch, choice, lrs):
    """The whole recipe: rows, accumulation, schedule, decay, clipping."""
    from transformers import GPT2Config, GPT2LMHeadModel

    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # torch.optim.Muon rounds, which hides much
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=32, n_layer=2, n_head=2, n_inner=128))
    theirs.save_pretrained(tmp_path / "start")
    recipe = "--max_lr 2e-3 --min_lr 5e-4 --warmup_steps 3 --weight_decay 0.3 --grad_clip 0.7 --seed 5 " + choice
    flags = SMALL[SMALL.index("--total_batch_size") :] + recipe.split() + ["--micro_batch_size", "2"]
    run("train_gpt2.py", *flags, "--data", text, "--init_from", tmp_path / "start", "--log_dir", tmp_path / "log")
    expected = straightforward_loop(theirs, text, 32, 8, lrs, 5, 0.3, 0.7, muon_ratio=3 if choice else None)
    for row, (loss, norm), lr in zip(csv.DictReader(open(tmp_path / "log/steps.csv")), expected, lrs, strict=True):
        assert float(row["loss"]) == pytest.approx(loss, abs=1e-5)
        assert float(row["norm"]) == pytest.approx(norm, rel=1e-4)
        assert float(row["lr"]) == pytest.approx(lr, rel=1e-6)
    assert norm > 0.7  # clipping was at work


@pytest.mark.slow
@pytest.mark.parametrize("dtype, bound", [("float32", 1e-4), ("bfloat16", 0.01)])
def test_the_fast_path_learns_what_the_plain_path_learns(tmp_path, dtype, bound):
    """Compiled, on two threads, with the settings of a user, for 300 steps of small, against eager transformers.

    At GPT-2's rate: at small's own, meant for batches four times as large, roundings grow to differences of 0.02. In
    float32, which rounds at 6e-8, 6e-7 was seen; in bfloat16, which rounds at 4e-3, 9e-4."""
    from transformers import GPT2Config, GPT2LMHeadModel

    if dtype == "bfloat16" and choose_dtype("auto", torch.device("cpu")) != dtype:
        pytest.skip("this processor has no bfloat16")
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=256, n_embd=384, n_layer=6, n_head=6, attn_implementation="sdpa"))
    theirs.save_pretrained(tmp_path / "start")
    recipe = "--total_batch_size 2048 --max_steps 300 --warmup_steps 40 --max_lr 6e-4 --min_lr 0 --seed 5"
    others = f"--dtype {dtype} --compile on --device cpu --eval_every 0 --sample_every 0 --save_every 0".split()
    paths = "--data", ROOT / "input.txt", "--init_from", tmp_path / "start", "--log_dir", tmp_path / "log"
    process = start(*recipe.split(), *others, *paths, OMP_NUM_THREADS="2")
    output = process.communicate()[0]
    assert process.returncode == 0, output
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    tune_malloc()  # half the time, and the same sums
    amp = partial(torch.autocast, "cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    lrs = rates(cosine, 300, 40, 6e-4, 0.0)
    plain = straightforward_loop(theirs, ROOT / "input.txt", 256, 8, lrs, 5, 0.1, 1.0, amp=amp)
    torch.set_num_threads(threads)
    ours = losses(tmp_path / "log")
    difference = np.mean([abs(ours[step] - loss) for step, (loss, _) in enumerate(plain)])
    print(f"{dtype}: mean absolute difference over 300 steps {difference:.2e}, last losses {ours[299]}, {plain[-1][0]}")
    assert difference <= bound and plain[-1][0] < 6


def test_a_step_waits_for_its_device_once():
    """On the device meta nothing can be read, so any other wait than that of Ranks.sum would be an error."""

    class Ranks(RealRanks):
        def sum(self, *values):
            reads.append(values)
            return [1.0] * len(values)

    reads = []
    with torch.device("meta"):
        model = GPT(GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=32, dropout=0.1))
    optimizer = model.configure_optimizers(0.1, 1e-3)
    for group in optimizer.param_groups:
        group["fused"] = False  # there is no such kernel for meta
    config = TrainConfig(seq_len=32, micro_batch_size=2, total_batch_size=256, max_steps=2, warmup_steps=1, min_lr=0)
    surroundings = Ranks(0, 0, 1, 1, torch.device("meta")), contextlib.nullcontext(), SimpleNamespace(received=[0] * 3)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    rows = repeat(torch.zeros(2, 33, dtype=torch.int32))
    train_gpt2.train_step(model, optimizer, scaler, rows, 0, config, *surroundings)
    assert len(reads) == 1


@pytest.fixture(scope="module")
def forty_steps(tmp_path_factory):
    """One rank, one micro-batch of eight rows a step, for 40 steps."""
    directory = tmp_path_factory.mktemp("forty")
    text = directory / "text.txt"
    text.write_text((ROOT / "input.txt").read_text()[:40000])
    train(text, directory / "log", "--max_steps", 40, "--micro_batch_size", 8)
    return text, directory / "log"


def test_eight_micro_batches_of_one_row_equal_one_of_eight(tmp_path, forty_steps):
    text, log = forty_steps
    train(text, tmp_path, "--max_steps", 40, "--micro_batch_size", 1)
    assert_close(losses(log), losses(tmp_path))
    assert_close(losses(log, "val"), losses(tmp_path, "val"))
    assert losses(log)[39] < losses(log)[0] - 0.5


def test_two_ranks_equal_one(tmp_path, forty_steps):
    text, log = forty_steps
    train(text, tmp_path, "--max_steps", 40, "--micro_batch_size", 2, ranks=2)
    assert_close(losses(log), losses(tmp_path))
    assert_close(losses(log, "val"), losses(tmp_path, "val"))


def test_two_ranks_equal_one_with_dropout_at_equal_micro_batch(tmp_path, text):
    options = "--max_steps", 40, "--micro_batch_size", 2, "--dropout", 0.2
    train(text, tmp_path / "one", *options)
    train(text, tmp_path / "two", *options, ranks=2)
    assert_close(losses(tmp_path / "one"), losses(tmp_path / "two"))


# Stopping and going on


def test_resume_with_flags_left_out_and_with_nothing_there(tmp_path, text):
    first = train(text, tmp_path / "log", "--resume", "--max_steps", 4)  # nothing to resume: it starts
    assert "resumed" not in first.stdout
    (tmp_path / "log").rename(tmp_path / "moved")
    again = run("train_gpt2.py", "--resume", "--log_dir", tmp_path / "moved", "--device", "cpu")
    assert "at step 4" in again.stdout and list(read_log(tmp_path / "moved")) == [0, 1, 2, 3]
    assert not (tmp_path / "log").exists()


def test_a_resumed_run_says_what_may_change_and_did(tmp_path, text):
    train(text, tmp_path, "--max_steps", 4)
    done = run("train_gpt2.py", "--resume", "--log_dir", tmp_path, "--device", "cpu", "--micro_batch_size", 2)
    assert "micro_batch_size 8 → 2" in done.stdout


# What a run leaves


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(tmp_path, text):
    flags = "--keep", 3, "--micro_batch_size", 4, "--max_steps", 1000
    done = train(text, tmp_path / "log", "--dry_run", *flags, ranks=2)
    time_line, memory, disk, last = done.stdout.splitlines()[-4:]
    seconds = float(re.search(r"([\d.]+) s a step", time_line)[1])
    evaluation = float(re.search(r"([\d.]+) s an evaluation", time_line)[1])
    assert evaluation == pytest.approx(seconds / 3, rel=0.02)  # as many tokens as a step, forward alone
    hours, minutes, rest = map(int, re.search(r"(\d+):(\d+):(\d+)", time_line).groups())
    assert 3600 * hours + 60 * minutes + rest == pytest.approx(1000 * seconds + 251 * evaluation, rel=0.02, abs=1)
    assert "GB a rank, at the peak" in memory and last == "this was a dry run: nothing is written"
    assert (
        not (tmp_path / "log").exists() and "0.10 GB for 3 saves" in disk
    )  # five of 12 bytes a parameter, 1.63M of them


def test_a_dry_run_of_a_finished_run_writes_nothing_either(tmp_path, text):
    train(text, tmp_path / "log", "--max_steps", 1)
    (tmp_path / "log/curves.png").unlink()
    before = sorted((tmp_path / "log").rglob("*"))
    run("train_gpt2.py", "--log_dir", tmp_path / "log", "--resume", "--dry_run")
    assert sorted((tmp_path / "log").rglob("*")) == before


def test_a_run_goes_on_when_nobody_reads_what_it_says(tmp_path, text):
    """As in `python train_gpt2.py | head`."""
    process = start(*SMALL, "--data", text, "--log_dir", tmp_path)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert (tmp_path / "step_000008").exists() and len(read_log(tmp_path)) == 8


def test_ctrl_c_that_ends_the_reader_too_still_saves(tmp_path, text):
    """As in `python train_gpt2.py 2>&1 | tee out`."""
    process = start(*SMALL, "--data", text, "--log_dir", tmp_path, "--max_steps", 10000)
    wait_for_step(tmp_path, 3, process)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    assert (tmp_path / f"step_{len(read_log(tmp_path)):06d}/checkpoint.json").exists()


def test_log_and_checkpoint(tmp_path, text):
    done = train(text, tmp_path, "--sample_every", 8, "--keep", 1, "--save_every", 2)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    expected = "0 val,0 train,1 train,2 train,3 train,4 val,4 train,5 train,6 train,7 train,8 val"
    assert [line.rsplit(" ", 1)[0] for line in lines] == expected.split(",")
    table = list(csv.DictReader(open(tmp_path / "steps.csv")))
    assert list(table[0]) == ["step", "tokens", "loss", "lr", "norm", "seconds"]
    assert [int(row["tokens"]) for row in table] == [256 * (i + 1) for i in range(8)]
    assert [row["loss"] for row in table] == list(read_log(tmp_path).values())
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["config"]["max_steps"] == 8 and facts["parameters"] == 50257 * 32 + 32 * 32 + 2 * 12704 + 64
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    # The newest, and the best by validation loss of those that were evaluated.
    assert [p.name for p in sorted(tmp_path.glob("step_*"))] == ["step_000004", "step_000008"]
    assert sorted(p.name for p in (tmp_path / "step_000008").iterdir()) == [
        "checkpoint.json", "config.json", "merges.txt", "model.safetensors", "tokenizer_config.json",
        "trainer_state.pt", "vocab.json",
    ]  # fmt: skip
    assert done.stdout.count("> \"Hello, I'm a language model,") == 8  # four before, four after
    assert "tok/s" in done.stdout and "left" in done.stdout and "MFU n/a" in done.stdout


def test_the_last_checkpoint_holds_the_weights_that_were_evaluated(tmp_path, text):
    train(text, tmp_path)
    done = run(
        "train_gpt2.py", *SMALL[SMALL.index("--total_batch_size") :], "--data", text, "--init_from",
        tmp_path / "step_000008", "--max_steps", 0, "--log_dir", tmp_path / "evaluation",
    )  # fmt: skip
    assert f"step 0: validation loss {losses(tmp_path, 'val')[8]:.4f}\n" in done.stdout
    assert not (tmp_path / "evaluation").exists()  # it only evaluates


def test_validation_is_on_the_same_tokens_for_every_micro_batch(tmp_path, text):
    """300 tokens are nine rows, which eight does not divide; an independent mean over them is the oracle."""
    train(text, tmp_path / "a", "--max_steps", 1, "--eval_tokens", 300, "--micro_batch_size", 8)
    train(text, tmp_path / "b", "--max_steps", 1, "--eval_tokens", 300, "--micro_batch_size", 1, ranks=2)
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(tmp_path / "a/step_000001").eval()
    content = text.read_text()
    ids = torch.tensor(tokens.gpt2_encoding().encode_ordinary(content[len(content) * 9 // 10 :]))
    window = ids[: 9 * 32 + 1]
    logits = model(window[:-1].view(9, 32)).logits
    expected = F.cross_entropy(logits.flatten(0, 1), window[1:]).item()
    assert losses(tmp_path / "a", "val")[1] == pytest.approx(expected, abs=1e-5)
    assert losses(tmp_path / "b", "val")[1] == pytest.approx(expected, abs=1e-5)


def test_an_older_run_is_moved_aside_and_nothing_else(tmp_path, text):
    train(text, tmp_path)
    log = (tmp_path / "log.txt").read_bytes()
    (tmp_path / "notes.md").write_text("mine")
    done = train(text, tmp_path, "--max_steps", 2)
    (old,) = tmp_path.glob("old-*")
    assert "--resume" in done.stdout and str(old) in done.stdout
    assert (old / "log.txt").read_bytes() == log
    assert sorted(p.name for p in old.iterdir()) == [
        "curves.png", "log.txt", "run.json", "step_000004", "step_000008", "steps.csv",
    ]  # fmt: skip
    assert (tmp_path / "notes.md").read_text() == "mine" and len(read_log(tmp_path)) == 2

    (line,) = [line for line in done.stdout.splitlines() if " is now in " in line]
    _, flag, save, *_ = line[line.index("; ") :].split()
    assert Path(save) == old / "step_000008"
    elsewhere = tmp_path / "elsewhere"  # with a whole curve
    run("train_gpt2.py", flag, Path(save).with_name("step_000004"), "--log_dir", elsewhere, "--data", text)
    assert (elsewhere / "log.txt").read_bytes() == log and len((elsewhere / "steps.csv").read_text().splitlines()) == 9
    assert (elsewhere / "step_000008/model.safetensors").read_bytes() == Path(save, "model.safetensors").read_bytes()


def test_fine_tuning_takes_the_shape_from_the_model(tmp_path, text):
    train(text, tmp_path / "first", "--max_steps", 2)
    flags = "--init_from", tmp_path / "first/step_000002", "--data", text, "--total_batch_size", 64, "--device", "cpu"
    common = "--max_steps", 3, "--eval_every", 0, "--sample_every", 0, "--log_dir", tmp_path / "second"
    run("train_gpt2.py", *flags, *common, "--seq_len", 16)
    config = json.loads((tmp_path / "second/run.json").read_text())["config"]
    assert (config["n_layer"], config["n_embd"], config["seq_len"]) == (2, 32, 16)
    assert (config["max_lr"], config["min_lr"], config["warmup_steps"]) == (3e-5, 3e-5, 0)
    saved = json.loads((tmp_path / "second/step_000003/config.json").read_text())
    assert saved["n_positions"] == 16
    refused = run("train_gpt2.py", *flags, *common, "--seq_len", 33, status=2)
    assert "--seq_len 33: --init_from has 32 positions" in refused.stderr


def test_shards_are_read_in_both_formats(tmp_path, text):
    ids = np.array(tokens.gpt2_encoding().encode_ordinary(text.read_text()), dtype=np.uint16)
    logs = []
    for kind in "npy", "bin":
        (tmp_path / kind).mkdir()
        for name, part in ("val_000000", ids[:1000]), ("train_000001", ids[1000:5000]), ("train_000002", ids[5000:]):
            path = tmp_path / kind / f"edufineweb_{name}.{kind}"
            if kind == "npy":
                data.write_shard(path, part)
            else:
                header = np.zeros(256, dtype="<i4")
                header[:3] = 20240520, 1, len(part)
                path.write_bytes(header.tobytes() + part.tobytes())
        train(tmp_path / kind, tmp_path / f"log-{kind}")
        logs.append(read_log(tmp_path / f"log-{kind}"))
    assert logs[0] == logs[1]


@pytest.mark.parametrize("rows", [24, 0])
def test_a_terminal_shows_a_bar_if_it_has_a_size(tmp_path, text, rows):
    """Those that `script` and `docker run -t` make may have none, and a bar there would be invisible."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (rows, 5 * rows))
    line = command("train_gpt2.py", *SMALL, "--data", text, "--log_dir", tmp_path)
    process = subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    said = process.communicate()[0]
    assert process.returncode == 0
    if rows:
        assert "8/8" in os.read(ours, 10000).decode() and "step 7: loss" not in said
    else:
        assert "step 7: loss" in said
    os.close(ours)


# Speed, memory, faults


def test_compiled_equals_eager_and_leaves_no_trace_in_names(tmp_path, text):
    shape = "--n_layer", 1, "--max_steps", 3, "--sample_every", 2, "--dropout", 0.0
    train(text, tmp_path / "eager", *shape)
    script = tmp_path / "train.py"
    script.write_text(GRAPHS.format(root=str(ROOT)))
    done = run(script, *SMALL, "--data", text, "--log_dir", tmp_path / "compiled", *shape, "--compile", "on")
    assert "compiling" in done.stdout and "not compiled" not in done.stdout
    assert "graphs 1\n" in done.stdout  # the trial compiles what training uses; evaluation and samples stay eager
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), abs=1e-4)
    from safetensors import safe_open

    with safe_open(tmp_path / "compiled/step_000003/model.safetensors", "pt") as f:
        assert all(name.startswith("transformer.") for name in f.keys())


GRAPHS = """
import sys
sys.path.insert(0, {root!r})
import train_gpt2
status = train_gpt2.main()
from torch._dynamo.utils import counters
print("graphs", counters["stats"]["unique_graphs"])
sys.exit(status)
"""


def test_without_a_compiler_the_run_goes_on_and_says_so(tmp_path, text):
    path = tmp_path / "bin"
    path.mkdir()
    done = train(text, tmp_path / "log", "--max_steps", 2, "--compile", "on", env={"PATH": str(path), "CXX": ""})
    assert "not compiled, torch.compile failed: " in done.stdout and "compiler" in done.stdout


def test_a_compiler_that_fails_is_no_end_either(tmp_path, text):
    fake = tmp_path / "g++"
    fake.write_text("#!/bin/sh\necho no headers >&2\nexit 1\n")
    fake.chmod(0o755)
    env = {"CXX": str(fake), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = train(text, tmp_path / "log", "--max_steps", 2, "--compile", "on", env=env)
    assert "not compiled, torch.compile failed: " in done.stdout


def test_out_of_memory_on_one_of_two_ranks_halves_both(tmp_path, text):
    fault = "if rank == 1 and idx.size(0) > 1: raise torch.OutOfMemoryError('CUDA out of memory')"
    flags = *SMALL, "--data", text, "--log_dir", tmp_path / "log"
    done = run(with_fault(tmp_path, fault), *flags, "--micro_batch_size", 4, ranks=2)
    assert "out of memory: micro-batch 4 → 1, the total batch stays" in done.stdout
    train(text, tmp_path / "reference", "--micro_batch_size", 1)
    assert_close(losses(tmp_path / "log"), losses(tmp_path / "reference"))


BACKWARD_OUT_OF_MEMORY = """
import weakref
losses = globals().setdefault("losses", [])
def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")
if model.training and calls <= 2:
    if any(alive() is not None for alive in losses):
        out_of_memory()
    losses.append(weakref.ref(loss))
    if idx.size(0) > 2:
        loss.register_hook(out_of_memory)
"""


def test_what_ran_out_of_memory_in_the_backward_pass_holds_none_any_more(tmp_path, text):
    script = with_fault(tmp_path, BACKWARD_OUT_OF_MEMORY)
    done = run(script, *SMALL, "--data", text, "--log_dir", tmp_path / "log", "--micro_batch_size", 4)
    assert "out of memory: micro-batch 4 → 2, the total batch stays" in done.stdout


def test_out_of_memory_with_one_row_is_one_line(tmp_path, text):
    fault = "raise torch.OutOfMemoryError('CUDA out of memory')"
    flags = *SMALL, "--data", text, "--log_dir", tmp_path / "log"
    done = run(with_fault(tmp_path, fault), *flags, status=2)
    assert (
        done.stderr
        == "train_gpt2.py: error: out of memory with one row of 32 tokens: try a smaller --preset or --seq_len\n"
    )
    assert not (tmp_path / "log").exists()


# As printed


@pytest.fixture
def clone(tmp_path):
    """What git has of the project, and nothing else."""
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in names.stdout.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_the_first_command_as_printed(clone):
    line = [sys.executable, "train_gpt2.py"]
    process = subprocess.Popen(line, cwd=clone, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 1: loss"):
            process.terminate()
    assert process.wait() == 143
    output = "".join(lines)
    assert "tiny (the default on cpu)" in output and "4 layers, 4 heads, 256 wide, context 128" in output
    assert "input.txt (text, the default, as there are no shards in edu_fineweb10B/): 301,966 training" in output
    assert "GPT-2 124M in full: python fineweb.py && torchrun --nproc_per_node=8 train_gpt2.py --preset gpt2" in output
    assert checkpoint.newest(clone / "log")[0] is not None


def test_eight_ranks_as_printed(clone):
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=8", "train_gpt2.py"]
    few = ["--max_steps", "2", "--eval_tokens", "2048", "--sample_every", "0"]
    done = subprocess.run(line + few, cwd=clone, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "8 × cpu" in done.stdout and "1 × 2 rows a step" in done.stdout
    assert checkpoint.newest(clone / "log")[1]["step"] == 2


def test_evaluating_on_two_ranks_gives_the_weights_of_the_model_to_both(tmp_path, text):
    train(text, tmp_path / "first", "--max_steps", 2)
    flags = "--data", text, "--init_from", tmp_path / "first/step_000002", "--max_steps", 0, "--device", "cpu"
    flags += "--dtype", "float32", "--eval_tokens", 320, "--sample_every", 0, "--total_batch_size", 64
    values = []
    for ranks in 1, 2:
        done = run("train_gpt2.py", *flags, "--log_dir", tmp_path / "none", ranks=ranks)
        (line,) = [line for line in done.stdout.splitlines() if "validation loss" in line]
        values.append(float(line.split()[-1]))
    assert values[0] == pytest.approx(values[1], abs=1.1e-4)  # as printed, four digits behind the point
    assert values[0] == pytest.approx(losses(tmp_path / "first", "val")[2], abs=0.1)
