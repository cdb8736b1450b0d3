"""bench.py gpu and ladder: every change of a variant, the check of its gradient, and children that hang or fail."""

from errors import UserError, run_script
import gzip
import json
import os
import re
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import bench
import sweep
import train_gpt2
from conftest import ROOT, run
from model import GPT, GPTConfig
from runtime.plan import Plan
from sweep import CHANGES, Change, Options, measure_variant

# A network small enough for a test, here and in the children.
SHRINK = """
train_gpt2.PRESETS["tiny"] |= dict(n_layer=1, n_head=1, n_embd=16, seq_len=16)
sweep.REHEARSAL = sweep.Workload("tiny", 2, 2, 2, 4)
"""
SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from errors import run_script
import bench, sweep, train_gpt2
{SHRINK}
sweep.SCRIPT = __file__
if __name__ == "__main__":
    sys.exit(run_script(bench.main))
"""


@pytest.fixture
def small(monkeypatch):
    """The network is small, and what a variant's patch changes is restored."""
    patched = [(GPT, "__init__"), (GPT, "forward"), (F, "scaled_dot_product_attention"), (torch.optim, "AdamW")]
    patched += [(Plan, "model_config"), (GPTConfig, "padded_vocab_size"), (torch, "set_float32_matmul_precision")]
    for owner, name in patched:
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setitem(train_gpt2.PRESETS, "tiny", dict(train_gpt2.PRESETS["tiny"]))
    monkeypatch.setattr(sweep, "REHEARSAL", sweep.REHEARSAL)
    exec(SHRINK, dict(train_gpt2=train_gpt2, sweep=sweep))
    yield
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.fixture
def args(tmp_path, small) -> Options:
    """What a child is called with, after the reference."""
    args = Options(device="cpu", variant=sweep.REFERENCE, gradient=tmp_path / "gradient.pt")
    sweep.write_reference(args, sweep.REHEARSAL)
    return args


# Here the others change nothing: cuDNN and TF32 are not on a CPU, and a child has its environment.
EFFECTIVE = "eager nanogpt residual loss half_batch double_batch no_autocast no_sdpa no_padding no_fused".split()


@pytest.mark.parametrize("change", EFFECTIVE)
def test_change_keeps_the_gradient(args, monkeypatch, change):
    """In float32, and eager: compiled variants are the slow test's."""
    if CHANGES[change].patch is sweep.residual_in_16_bit:
        monkeypatch.setitem(CHANGES, "eager", Change(dict(compile="off", dtype="bfloat16")))
    result = measure_variant(replace(args, variant=f"eager+{change}"), sweep.REHEARSAL)
    # Sums of float32 in another order; bfloat16 rounds at 4e-3; 47 more tokens of 50,304 take part of each probability.
    limit = dict(residual=2e-2, nanogpt=2e-2).get(change, 1e-5)
    assert 0 <= result["gradient_error"] <= limit
    assert (result["gradient_error"] > 1e-5) == (change in ("residual", "nanogpt"))  # the change is one
    assert len(result["seconds"]) == 2 and result["tokens_per_second"] > 0 and result["peak_memory_gb"] > 0.1
    assert result["attention"] == ("explicit" if change == "no_sdpa" else "flash")
    assert result["micro_batch_size"] == dict(half_batch=1, double_batch=4).get(change, 2)
    assert sum(kernel["fraction"] for kernel in result["kernels"]) <= 1.001
    assert json.loads(json.dumps(result)) == result


def test_patched_losses_give_padded_rows_no_gradient(small):
    model = GPT(GPTConfig(block_size=16, vocab_size=200, n_layer=1, n_head=1, n_embd=16))
    x, y = torch.randint(200, (2, 2, 16)).unbind()
    expected = model(x, y)
    sweep.padded_loss()
    loss = model(x, y)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert not model.transformer.wte.weight.grad[200:].any() and model(x).shape == (2, 16, 200)


def test_wrong_gradient_is_refused(args, monkeypatch, capsys):
    """A variant that computes something else is not timed."""

    def scale_the_loss() -> None:
        forward = GPT.forward
        GPT.forward = lambda self, idx, targets=None: 1.05 * forward(self, idx, targets)

    monkeypatch.setitem(CHANGES, "wrong", Change(patch=scale_the_loss))
    flags = ["gpu", "--device", "cpu", "--gradient", str(args.gradient), "--variant", "eager+wrong"]
    assert run_script(bench.main, flags) == 1
    line = "bench.py: error: the gradient differs by 5.0e-02 from that in float32, more than 0.02"
    assert capsys.readouterr().err.splitlines()[-1] == line


def test_nan_gradient_is_refused(args, monkeypatch):
    def nan() -> None:
        forward = GPT.forward
        GPT.forward = lambda self, idx, targets=None: forward(self, idx, targets) * torch.tensor(float("nan"))

    monkeypatch.setitem(CHANGES, "nan", Change(patch=nan))
    with pytest.raises(UserError, match="differs by nan"):
        measure_variant(replace(args, variant="eager+nan"), sweep.REHEARSAL)


# In the parent process. The children of these tests import no torch.

CHILD = """
import json, os, subprocess, sys, time
name = sys.argv[sys.argv.index("--variant") + 1]
if name == "no_cudnn":  # hangs, with a process of its own
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open("pid", "w").write(str(child.pid))
    print("compiling", file=sys.stderr, flush=True)
    time.sleep(600)
if name == "reference" and os.path.exists("fail"):
    sys.exit("RuntimeError: no memory")
if name == "reference":
    open("references", "a").write("one")
    sys.exit(print("{}"))
if name == "loss":
    sys.exit(print("no JSON"))
if name == "nanogpt":
    os.kill(os.getpid(), 9)
if name == "aten":
    sys.exit("RuntimeError: no valid kernel\\n\\nSet TORCHDYNAMO_VERBOSE=1 for more")
print("a line of a library")
environment = {key: value for key, value in os.environ.items() if key.startswith("TORCHINDUCTOR_CO")}
result = dict(tokens_per_second=2.0 if name == "residual" else 1.0, peak_memory_gb=1.0, gradient_error=0.0)
result |= dict(micro_batch_size=2, attention="flash", environment=environment, argv=sys.argv[1:])
print(json.dumps(result | dict(kernels=[dict(name=name, ms=1.0, fraction=1.0)])))
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(sweep, "SCRIPT", str(tmp_path / "child.py"))
    monkeypatch.chdir(tmp_path)


def rows(file: Path) -> dict[str, dict]:
    return {result["name"]: result for result in map(json.loads, file.read_text().splitlines())}


def sweep_gpu(*flags) -> int:
    return run_script(bench.main, ["gpu", "--device", "cpu", "--results", "results.jsonl", *map(str, flags)])


def test_children_that_hang_or_fail_do_not_end_the_sweep(child, capsys):
    assert sweep_gpu("--time_limit", 3, "--only", "eager", "no_cudnn", "aten", "residual") == 1
    found = rows(Path("results.jsonl"))
    assert [*found] == ["eager", "no_cudnn", "aten", "residual"]
    assert found["no_cudnn"]["error"] == "no result after 3 s" and found["no_cudnn"]["stderr"] == ["compiling"]
    assert found["aten"]["error"] == "RuntimeError: no valid kernel" and len(found["aten"]["stderr"]) == 3
    deadline = time.monotonic() + 10  # of a process that was killed, nothing but an entry may be left
    status = Path(f"/proc/{Path('pid').read_text()}/status")
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"  residual +2 +2\.00 +1\.0 +0e\+00 +2  flash", lines[-2])  # twice as fast as the first
    assert lines[-1].split() == ["1.00", "ms", "100.0%", "residual"]  # the kernels of the fastest
    assert max(map(len, lines)) <= 80


def test_deadline_cuts_a_sweep(child, capsys):
    assert sweep_gpu("--deadline", 4, "--only", "eager", "no_cudnn", "residual") == 1
    found = rows(Path("results.jsonl"))
    assert "error" not in found["eager"] and re.fullmatch(r"no result after [1-4] s", found["no_cudnn"]["error"])
    assert found["residual"]["error"] == "not run: the deadline has passed"


def test_sweep_ends_without_a_reference(child, capsys):
    Path("fail").touch()
    assert sweep_gpu("--only", "eager") == 1
    error = "the gradient in float32 could not be computed: RuntimeError: no memory"
    assert capsys.readouterr().err == f"bench.py: error: {error}\n" and not os.path.exists("results.jsonl")


def test_variants_run_in_turn_with_their_environment(child, capsys):
    assert sweep_gpu("--repeats", 2, "--only", "eager", "tune+loss", "--profile", "traces") == 0
    results = [json.loads(line) for line in Path("results.jsonl").read_text().splitlines()]
    assert [result["name"] for result in results] == ["eager", "tune+loss"] * 2
    assert results[0]["environment"] == {} and results[1]["environment"] == {
        "TORCHINDUCTOR_COORDINATE_DESCENT_TUNING": "1"
    }
    argv = results[1]["argv"]
    assert argv[0] == "gpu" and argv[argv.index("--profile") + 1] == "traces" and argv[-1] == "tune+loss"


def test_ladder_adds_one_optimization_at_a_time():
    rows = [set(changes.split("+")) - {"default"} for changes in sweep.SWEEPS["ladder"].values()]
    assert all(above > below and len(above - below) == 1 for above, below in pairwise(rows))
    assert all(
        set(changes.split("+")) <= CHANGES.keys() for names in sweep.SWEEPS.values() for changes in names.values()
    )


@pytest.mark.parametrize("flags, name", [("--only nonsense", "nonsense"), ("--only eager+lost", "lost")])
def test_unknown_variants_are_one_line(child, capsys, flags, name):
    assert sweep_gpu(*flags.split()) == 2
    assert capsys.readouterr().err.startswith(f"bench.py: error: {name}: no such change; choose from default, eager,")
    assert not os.path.exists("results.jsonl")


def shrunk_script(directory: Path) -> Path:
    script = directory / "bench.py"
    script.write_text(SCRIPT)
    return script


def test_sweep_rehearses_on_a_cpu(tmp_path):
    flags = "gpu", "--device", "cpu", "--only", "eager", "--results", tmp_path / "r.jsonl", "--profile", tmp_path / "t"
    lines = run(shrunk_script(tmp_path), *flags).stdout.splitlines()
    assert lines[1].startswith("gpu: tiny, 2 × 2 sequences a step, cpu, torch ")
    found = rows(tmp_path / "r.jsonl")
    assert [*found] == ["eager"] and found["eager"]["gradient_error"] < 1e-5
    trace = json.loads(gzip.decompress((tmp_path / "t/gpu-eager.json.gz").read_bytes()))["traceEvents"]
    assert sum(event["name"] == "Optimizer.step#AdamW.step" for event in trace) == 3  # three steps


@pytest.mark.slow
@pytest.mark.parametrize("which", sweep.SWEEPS)
def test_whole_sweep_rehearses_on_a_cpu(tmp_path, which):
    """Compiled variants, too."""
    flags = which, "--device", "cpu", "--results", tmp_path / "r.jsonl"
    done = run(shrunk_script(tmp_path), *flags, timeout=900)
    found = rows(tmp_path / "r.jsonl")
    assert [*found] == [*sweep.SWEEPS[which]] and not any("error" in r for r in found.values()), done.stdout


def test_children_without_a_result_are_named(child):
    assert sweep_gpu("--only", "loss", "nanogpt", "eager") == 1
    found = rows(Path("results.jsonl"))
    assert found["loss"]["error"] == "printed no result" and found["nanogpt"]["error"] == "killed by signal 9"
    assert "error" not in found["eager"]


def test_ratio_is_to_the_last_run_of_the_first_variant():
    def result(name: str, speed: float | None) -> dict:
        measured = dict(tokens_per_second=speed, peak_memory_gb=1.0, gradient_error=0.0, micro_batch_size=2)
        return dict(name=name) | (dict(measured, attention="flash") if speed else dict(error="none"))

    results = [result("a", 10.0), result("b", 15.0), result("a", 5.0), result("b", 15.0), result("a", None)]
    found = [sweep.row(results[i], results[: i + 1], "a").split()[1:3] for i in range(4)]
    assert found == [["10", "1.00"], ["15", "1.50"], ["5", "1.00"], ["15", "3.00"]]
    assert sweep.row(results[1], results[1:2], "a").split()[2] == "–"  # the first variant has no result


def test_two_sweeps_share_a_reference(child):
    assert run_script(bench.main, ["ladder", "gpu", *"--device cpu --results results.jsonl --only eager".split()]) == 0
    found = [json.loads(line) for line in Path("results.jsonl").read_text().splitlines()]
    assert [(r["sweep"], r["name"]) for r in found] == [("ladder", "eager"), ("gpu", "eager")]
    assert Path("references").read_text() == "one"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("gpu --results nowhere/x", "--results: cannot write nowhere/x: No such file or directory"),
        ("gpu --device foo", "--device foo: PyTorch finds no such device here"),
        ("gpu small", "small: no such sweep; there are gpu, ladder"),
        ("gpu --variant eager", "--variant: is for child processes"),
        ("ladder gpu --only TF32", "TF32: no such change"),
        ("gpu --profile child.py", "child.py: File exists"),
    ],
)
def test_errors_are_one_line(child, capsys, flags, message):
    assert run_script(bench.main, flags.split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"bench.py: error: {message}") and err.count("\n") == 1 and not out
    assert [p.name for p in Path().iterdir()] == ["child.py"]


def test_only_a_gpu_or_a_cpu_is_measured(child, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "choose_device", lambda name: "mps")
    assert run_script(bench.main, ["gpu"]) == 2
    assert capsys.readouterr().err == "bench.py: error: --device mps: the sweeps need cuda, or cpu to try them out\n"
