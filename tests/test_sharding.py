"""--shard and --recompute: the losses of one process, on any ranks and after any kill, in less memory."""

import re
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from conftest import (
    BOOKS_TEXT,
    ENVIRONMENT,
    ROOT,
    RUN,
    SMALL,
    assert_close,
    assert_same_run,
    at_step,
    command,
    losses,
    perturbed,
    read_log,
    run_in_process,
    run_ranks,
    with_fault,
)
from model import GPT, SIZES, GPTConfig
from recipe import PRESETS
from runtime import checkpoint, plan

# RUN with sequences enough for four ranks.
FOUR = *RUN, "--total_batch_size", 64, "--max_steps", 40


def keep_rows(directory) -> tuple:
    """Return a script that is train_gpt2.py, but keeps the rows of each step, and a function that reads them."""
    directory.mkdir()
    file = f"open({str(directory)!r} + f'/rows-{{rank}}', 'a')"
    script = with_fault(directory, f"if step >= 0 and model.training: print(step, idx.tolist(), file={file})")

    def read() -> list[str]:
        return sorted(line for path in directory.glob("rows-*") for line in path.read_text().splitlines())

    return script, read


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
    """The run of FOUR on one rank, and the rows that it read. To read only."""
    directory = tmp_path_factory.mktemp("whole")
    script, rows = keep_rows(directory / "rows")
    run_ranks(script, *FOUR, "--data", text, "--log_dir", directory / "log", ranks=1)
    return SimpleNamespace(log=directory / "log", rows=rows())


@pytest.mark.parametrize(
    "ranks, flags",
    [
        (1, "--recompute"),
        (2, "--shard --recompute"),
        (4, "--shard --recompute"),
        pytest.param(2, "", marks=pytest.mark.slow),
        pytest.param(2, "--shard", marks=pytest.mark.slow),
        pytest.param(2, "--recompute", marks=pytest.mark.slow),
        pytest.param(4, "", marks=pytest.mark.slow),
        pytest.param(4, "--shard", marks=pytest.mark.slow),
        pytest.param(4, "--recompute", marks=pytest.mark.slow),
    ],
)
def test_sharded_and_recomputed_runs_equal_one_process(tmp_path, text, whole, ranks, flags):
    """With dropout, in micro-batches of one sequence, which have the same masks everywhere."""
    log = tmp_path / "log"
    script, rows = keep_rows(tmp_path / "rows")
    done = run_ranks(script, *FOUR, "--data", text, "--log_dir", log, *flags.split(), ranks=ranks)
    summary = " ".join(done.stdout.split())  # its lines are wrapped
    assert (", sharded" in summary) == ("--shard" in flags)
    assert ("recomputing activations" in summary) == ("--recompute" in flags)
    for kind in "train", "val":
        assert_close(losses(log, kind), losses(whole.log, kind))
    assert rows() == whole.rows and len(whole.rows) == 40 * 4
    if ranks == 1:
        assert_same_run(log, whole.log)


def test_recomputed_gradients_are_bitwise():
    """With dropout; and each block enters its MLP twice, but once in an evaluation."""
    model = perturbed(GPTConfig(16, 512, 2, 2, 32, dropout=0.2)).train()
    idx, gradients, calls = torch.arange(32).view(2, 16), [], []
    model.transformer.h[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for recompute in False, True:
        model.set_recompute(recompute)
        torch.manual_seed(5)
        model(idx, idx).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)) and len(calls) == 1 + 2
    model.eval()(idx)
    assert len(calls) == 1 + 2 + 1


def test_run_changes_ranks_and_sharding_at_each_kill(tmp_path, text, whole):
    """A process is killed at steps 8, 18 and 27, and each command has other ranks or another of DDP and FSDP2."""
    log = tmp_path / "log"
    flags = *FOUR, "--data", text, "--log_dir", log, "--resume", "--dist_timeout", 5
    changes = []
    for step, ranks, more in (8, 4, "--shard"), (18, 2, "--shard off"), (27, 2, "--shard --recompute"):
        directory = tmp_path / str(step)
        directory.mkdir()
        script = with_fault(directory, at_step(step, "os.kill(os.getpid(), signal.SIGKILL)", rank=ranks - 1))
        done = run_ranks(script, *flags, *more.split(), ranks=ranks, status=1)
        assert done.statuses[-1] == -signal.SIGKILL
        changes += re.findall(r"step_\d+ at step \d+: .*", done.stdout)
    changes += re.findall(r"step_\d+ at step \d+: .*", run_in_process(*flags).stdout)
    assert changes == [
        "step_000005 at step 5: shard on → off, ranks 4 → 2",
        "step_000015 at step 15: recompute off → on, shard off → on",
        "step_000025 at step 25: shard on → off, ranks 2 → 1",  # recomputation stays as it was typed
    ]
    assert_close(losses(log), losses(whole.log))
    assert_close(losses(log, "val"), losses(whole.log, "val"))


def test_lost_rank_of_a_sharded_run_costs_nothing(tmp_path, text):
    """The other rank ends in bounded time, and the same command continues bit for bit."""
    log, undisturbed = tmp_path / "log", tmp_path / "undisturbed"
    flags = *RUN, "--data", text, "--shard", "--recompute", "--dist_timeout", 5, "--max_steps", 10
    run_ranks("train_gpt2.py", *flags, "--log_dir", undisturbed)
    fault = "print('lost at', time.monotonic(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    done = run_ranks(with_fault(tmp_path, at_step(8, fault, rank=1)), *flags, "--log_dir", log, status=1)
    (lost,) = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("lost at")]
    assert time.monotonic() - lost < 5 + 10 + 5  # the timeout; to end a process; what the launcher waits
    assert "train_gpt2.py: error: rank 0 has lost another rank: " in done.stderr
    run_ranks("train_gpt2.py", *flags, "--log_dir", log, "--resume")
    assert_same_run(log, undisturbed)


def test_full_disk_ends_a_sharded_run_and_loses_nothing(tmp_path, text):
    """The checkpoint of step 6 does not fit any more; the ranks are about to gather that of step 9 when they learn of it."""
    log, undisturbed = tmp_path / "log", tmp_path / "undisturbed"
    flags = *RUN, "--data", text, "--shard", "--max_steps", 10, "--save_every", 3
    run_ranks("train_gpt2.py", *flags, "--log_dir", undisturbed)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))"
    fault = at_step(4, f"trainer.writer.writing.result(); {limit}")  # the checkpoint of step 3 is complete
    script = with_fault(tmp_path, "checkpoint.Writer.failed = False\n" + fault)  # learn of it as late as possible
    done = run_ranks(script, *flags, "--log_dir", log, status=4)
    assert done.statuses == [4, 4]
    assert done.stderr.count(f"error: {log}/step_000006: could not be written: ") == 1
    assert list(checkpoint.checkpoints(log)) == [3] and not list(log.glob(".unfinished-*"))
    run_ranks("train_gpt2.py", *flags, "--log_dir", log, "--resume")
    assert_same_run(log, undisturbed)


def test_signal_stops_a_sharded_run_and_resume_is_bitwise(tmp_path, text):
    log, undisturbed = tmp_path / "log", tmp_path / "undisturbed"
    flags = *RUN, "--data", text, "--shard", "--max_steps", 8
    run_ranks("train_gpt2.py", *flags, "--log_dir", undisturbed)
    script = with_fault(tmp_path, at_step(3, "os.kill(os.getpid(), signal.SIGTERM)", rank=1))
    done = run_ranks(script, *flags, "--log_dir", log, status=143)
    assert done.statuses == [143, 143] and done.stdout.count("step 4: saved") == 1
    run_ranks("train_gpt2.py", *flags, "--log_dir", log, "--resume")
    assert_same_run(log, undisturbed)


def test_nonfinite_gradient_stops_all_shards(tmp_path, text):
    """Only the last rank has it, in the rows of wte that the first rank keeps."""
    code = "model.transformer.wte.weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), torch.nan))"
    script = with_fault(tmp_path, at_step(3, code, rank=1))
    done = run_ranks(script, *RUN, "--data", text, "--log_dir", tmp_path / "log", "--shard", status=3)
    assert done.statuses == [3, 3] and "step 3: loss " in done.stderr and "gradient norm nan" in done.stderr
    assert list(read_log(tmp_path / "log")) == list(range(3))


def test_float16_scaler_skips_the_same_steps_sharded(tmp_path, text):
    """The first scale is too large; in step 3 the loss of one rank is so large that its gradient is infinite."""
    script = with_fault(tmp_path, at_step(3, "return loss * 1e30", rank=1))
    runs = {}
    for name, *more in ("ddp",), ("shard", "--shard"):
        log = tmp_path / name
        flags = "--data", text, "--log_dir", log, "--max_steps", 6, "--dtype", "float16", "--dropout", 0
        done = run_ranks(script, *RUN, *flags, *more)
        assert done.statuses == [0, 0]
        runs[name] = losses(log)
    assert runs["ddp"].pop(3) == pytest.approx(runs["shard"].pop(3), rel=1e-4)
    assert runs["shard"] == pytest.approx(runs["ddp"], abs=2e-3)  # of 10.8, in float16, which rounds at 5e-4


@pytest.mark.slow
def test_sharded_compiled_run_equals_eager_run(tmp_path, text):
    flags = *SMALL, "--data", text, "--max_steps", 3, "--sample_every", 2, "--shard", "--recompute"
    for compile in "on", "off":
        done = run_ranks("train_gpt2.py", *flags, "--log_dir", tmp_path / compile, "--compile", compile)
        assert ("compiling" in done.stdout) == (compile == "on") and "not compiled, " not in done.stdout
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), abs=1e-4)


def test_muon_cannot_be_sharded(tmp_path, text):
    flags = *RUN, "--data", text, "--log_dir", tmp_path / "log", "--shard", "--optimizer", "muon"
    done = run_ranks("train_gpt2.py", *flags, status=2)
    assert done.stderr.count("error: --shard: Muon needs whole matrices; use --optimizer adamw, or no --shard") == 1


def test_shards_communicate_gradients_once_a_step(tmp_path, text):
    """Of four micro-steps, for each of two blocks and for all else; the probe communicates nothing."""
    count = """
import torch.distributed as dist
if step < 0 and rank == 0 and not hasattr(dist, "uncounted"):
    dist.uncounted = dist.reduce_scatter_single
    def counted(*args, **kwargs):
        print("reduce-scatter", step, micro_step)
        return dist.uncounted(*args, **kwargs)
    dist.reduce_scatter_single = counted
"""
    flags = *RUN, "--data", text, "--log_dir", tmp_path / "log", "--total_batch_size", 128, "--max_steps", 2
    done = run_ranks(with_fault(tmp_path, count), *flags, "--shard", "--recompute")
    calls = re.findall(r"reduce-scatter (-?\d+) (\d+)", done.stdout)
    assert calls == [("0", "3")] * 3 + [("1", "3")] * 3


# Memory


def test_out_of_memory_of_one_shard_halves_both(tmp_path, text):
    """The other rank does not wait for it: the timeout is longer than the test may take."""
    fault = "if rank == 1 and idx.size(0) > 2 and model.training: raise torch.OutOfMemoryError('CUDA out of memory')"
    flags = *SMALL, "--data", text, "--shard", "--micro_batch_size", 4, "--dist_timeout", 600
    done = run_ranks(with_fault(tmp_path, fault), *flags, "--log_dir", tmp_path / "log")
    assert "out of memory: micro-batch 4 → 2, the total batch stays" in done.stdout
    run_in_process(*SMALL, "--data", text, "--log_dir", tmp_path / "reference", "--micro_batch_size", 2)
    assert_close(losses(tmp_path / "log"), losses(tmp_path / "reference"))


@pytest.mark.parametrize("flags, status", [("", 0), ("--recompute off", 2)])
def test_out_of_memory_with_one_sequence_recomputes(tmp_path, text, monkeypatch, flags, status):
    forward = GPT.forward

    def limited_forward(model, idx, targets=None):
        if model.training and not model.transformer.h[0].recompute:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, idx, targets)

    monkeypatch.setattr(GPT, "forward", limited_forward)
    done = run_in_process(*SMALL, "--data", text, "--log_dir", tmp_path / "log", *flags.split(), status=status)
    assert ("out of memory with one sequence: recomputing activations" in done.stdout) == (not status)
    assert ("error: out of memory with one sequence of 32 tokens: try " in done.stderr) == bool(status)


def test_recomputation_saves_most_activations():
    """Of a fake GPT-2 124M, for sizes alone, at T = 1,024, after the forward pass, by PyTorch's own tracker."""
    activations = []
    for recompute in False, True:
        with FakeTensorMode():
            model, tracker = GPT(GPTConfig(**SIZES["gpt2"])), MemTracker()
            model.set_recompute(recompute)
            tracker.track_external(model)
            idx = torch.zeros(1, 1024, dtype=torch.int64)
            with tracker:
                loss = model(idx, idx)  # holds the activations
                (memory,) = tracker.get_tracker_snapshot("current").values()
        activations.append({str(kind).rsplit(".")[-1]: size for kind, size in memory.items()}["ACT"])
        del loss
    assert activations[1] <= 0.45 * activations[0]


MEMORY = """
if step == 1:
    def print_bytes(optimizer, *_):
        kinds = dict(
            weights=model.parameters(), gradients=[p.grad for p in model.parameters()],
            moments=[t for state in optimizer.state.values() for t in state.values()],
        )
        sizes = {kind: sum(getattr(t, "_local_tensor", t).nbytes for t in tensors) for kind, tensors in kinds.items()}
        print("bytes", rank, *sizes.values(), flush=True)
    trainer.optimizer.register_step_pre_hook(print_bytes)
"""


def state_sizes(directory, text, *flags) -> list[int]:
    """Return the bytes of weights, gradients and moments together of each of two ranks before the second update."""
    directory.mkdir()
    flags = *SMALL, "--data", text, "--log_dir", directory / "log", "--total_batch_size", 64, "--max_steps", 2, *flags
    done = run_ranks(with_fault(directory, MEMORY), *flags)
    return [sum(map(int, sizes.split())) for sizes in re.findall(r"bytes \d (.*)", done.stdout)]


def test_shards_have_half_of_the_state(tmp_path, text):
    whole = state_sizes(tmp_path / "ddp", text)
    shards = state_sizes(tmp_path / "shard", text, "--shard")
    assert len(shards) == len(whole) == 2 and max(shards) < 0.51 * min(whole)


@pytest.mark.slow
def test_medium_shards_have_half_of_the_state(tmp_path, text):
    flags = [word for name, value in SIZES["gpt2-medium"].items() for word in (f"--{name}", value)]
    whole = state_sizes(tmp_path / "ddp", text, *flags)
    shards = state_sizes(tmp_path / "shard", text, *flags, "--shard")
    assert max(shards) < 0.51 * min(whole)


@pytest.mark.slow
def test_large_trains_on_two_shards_in_this_memory(tmp_path):
    """GPT-2 774M, recomputed, one sequence of 1,024 tokens a rank: the four real steps of a dry run. (12 GB a rank are
    its weights, gradients and moments alone, unsharded.) A quarter of an hour on two slow cores, and 22 GB."""
    flags = "--preset gpt2-large --shard --recompute --total_batch_size 2048 --micro_batch_size 1 --eval_tokens 2048"
    others = f"--device cpu --dtype float32 --compile off --dry_run --data {BOOKS_TEXT} --log_dir {tmp_path}"
    line = command("train_gpt2.py", *flags.split(), *others.split(), ranks=2)
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert float(re.search(r"memory   (\S+) GB a rank, at the peak", done.stdout)[1]) < 12


# What would fit


def plan_with_memory(monkeypatch, text, gigabytes: float, *flags, status: int = 0):
    monkeypatch.setattr(plan, "free_memory", lambda *_: gigabytes * 1e9)
    return run_in_process("--data", text, "--device", "cpu", "--dtype", "float32", *flags, status=status)


def test_model_that_does_not_fit_names_what_would(monkeypatch, text):
    done = plan_with_memory(monkeypatch, text, 24, "--preset", "gpt2-xl", "--dry_run", status=2)
    assert done.stderr == (
        "train_gpt2.py: error: the model does not fit into memory: it takes 24.9 GB a rank, and "
        "24.0 GB are free; try --shard --recompute on 2 ranks with as much memory each (micro-batch 4)\n"
    )
    done = plan_with_memory(monkeypatch, text, 0.1, "--preset", "gpt2-xl", "--dry_run", status=2)
    assert done.stderr.endswith("try a smaller --preset\n")


def test_auto_recomputes_where_one_sequence_does_not_fit(monkeypatch, text, tmp_path):
    """A sequence of 128 tokens of `tiny`, whose state is 0.26 GB."""
    flags = "--preset", "tiny", "--total_batch_size", 256, "--dry_run", "--log_dir", tmp_path
    whole, recomputed = (
        (16 * 16_058_112 + 128 * (bytes_per_channel * 256 + 18 * 50257) / 0.8) / 0.95 / 1e9
        for bytes_per_channel in (48 * 4, 48 + 4 * 4)
    )
    done = plan_with_memory(monkeypatch, text, (whole + recomputed) / 2, *flags)
    assert "2 × 1 sequences a step, recomputing activations, " in " ".join(done.stdout.split())
    done = plan_with_memory(monkeypatch, text, 1.001 * whole, *flags)
    assert "2 × 1 sequences a step, not compiled" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    "name, max_lr", [("gpt2", 6e-4), ("gpt2-medium", 3e-4), ("gpt2-large", 2.5e-4), ("gpt2-xl", 2e-4)]
)
def test_presets_have_gpt3s_learning_rates(name, max_lr):
    """GPT-3 (Brown et al., 2020), table 2.1: 125M, 350M, 760M, 1.3B."""
    assert plan.new_config(dict(preset=name, device="cpu"), {}).max_lr == max_lr
    assert {key: PRESETS[name][key] for key in SIZES[name]} == SIZES[name]


def test_docs_table_is_the_estimate():
    """The table of sizes and memories in docs/gpu.md is what the script's estimate gives."""
    lines = (ROOT / "docs/gpu.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if re.match(r"\| `gpt2[-a-z]*` \| [18] \|", line)]
    assert len(rows) == 4 * 2
    for name, gpus, *cells in rows:
        with torch.device("meta"):
            model = GPT(GPTConfig(**SIZES[name.strip("`")]))
        for memory, cell in zip((8, 12, 24, 48, 80), cells, strict=True):
            assert cell == first_that_fits(model, 0.95 * memory * 1e9, int(gpus)), (name, gpus, memory)


def first_that_fits(model: GPT, free: float, gpus: int) -> str:
    for shards in dict.fromkeys((1, gpus)):
        for recompute in "off", "on":
            B = plan.estimate_micro_batch_size(model, free, recompute, shards)
            if B >= 1:
                options = ", ".join(["shard"] * (shards > 1) + ["recompute"] * (recompute == "on"))
                B = plan.divisor_up_to(B, 512 // gpus)  # of a rank's sequences in a step
                return f"{B} ({options})" if options else f"{B}"
    return "–"
