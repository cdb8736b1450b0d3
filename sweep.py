"""Ways to train GPT-2 124M on a GPU, each in a process of its own: what `bench.py gpu` and `bench.py ladder` measure.

A variant is train_gpt2.py with some changes: options, environment variables, or a patch of its code. Before it is
timed, its gradient is compared with that of the eager model in float32. On a CPU the same code runs with `tiny`.
"""

from errors import UserError
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity
from tqdm import tqdm

import train_gpt2
from data import inputs_and_targets
from model import GPT, GPTConfig
from runtime.device import peak_memory
from runtime.options import option
from tokens import VOCAB_SIZE

TEXT = Path(__file__).resolve().parent / "input.txt"
MAX_GRADIENT_ERROR = 2e-2  # relative; bfloat16 rounds at 4e-3


class Size(NamedTuple):
    """What is trained: a step has grad_accum_steps micro-batches."""

    preset: str
    micro_batch_size: int
    grad_accum_steps: int
    steps: int
    gate_sequences: int  # the gradient of so many is compared


SIZES = {
    "gpu": dict(cuda=Size("gpt2", 64, 8, 10, 64), cpu=Size("tiny", 2, 2, 3, 4)),
    "ladder": dict(cuda=Size("gpt2", 16, 1, 10, 64), cpu=Size("tiny", 2, 1, 3, 4)),  # as in the lecture
}


# -- Patches of the code: candidates for a faster step, and what the ladder takes away


def residual_in_16_bit() -> None:
    """Cast once after the embeddings, so that the blocks add in autocast's precision. Master weights stay float32."""
    init = GPT.__init__

    def cast(module, args, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x

    def init_with_cast(self, config: GPTConfig) -> None:
        init(self, config)
        self.transformer.drop.register_forward_hook(cast)

    GPT.__init__ = init_with_cast


def padded_loss() -> None:
    """Compute the loss over all rows of the padded vocabulary, with -inf for the padded ones: an aligned width."""

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        logits = F.linear(self.hidden(idx), self.transformer.wte.weight).float()  # (B, T, padded V)
        padding = torch.arange(logits.size(-1), device=logits.device) >= self.config.vocab_size
        logits = logits.masked_fill(padding, -math.inf)
        if targets is None:
            return logits[..., : self.config.vocab_size]
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))

    GPT.forward = forward


def larger_vocabulary() -> None:
    """Let the padded rows be tokens, as build-nanogpt does."""
    GPTConfig.vocab_size = 50304


def no_cudnn() -> None:
    torch.backends.cuda.enable_cudnn_sdp(False)


def no_tf32() -> None:
    torch.set_float32_matmul_precision = lambda precision: None


def explicit_attention() -> None:
    """Compute attention with all T × T scores in memory."""

    def attention(q, k, v, mask=None, dropout_p=0.0, is_causal=False) -> torch.Tensor:  # noqa: PLR0913
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, nh, T, T)
        if is_causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return scores.softmax(dim=-1) @ v

    F.scaled_dot_product_attention = attention


def unpadded_vocabulary() -> None:
    GPTConfig.padded_vocab_size = property(lambda self: self.vocab_size)


def unfused_adamw() -> None:
    adamw = torch.optim.AdamW
    torch.optim.AdamW = lambda groups, **options: adamw(groups, **options | dict(fused=None))


@dataclass(frozen=True)
class Change:
    """A difference from train_gpt2.py as it is."""

    options: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    patch: Callable[[], None] | None = None
    batch_factor: float = 1  # of the micro-batch; the total batch stays


INDUCTOR = "TORCHINDUCTOR_"
TUNE = {f"{INDUCTOR}COORDINATE_DESCENT_TUNING": "1", f"{INDUCTOR}MAX_AUTOTUNE_POINTWISE": "1"}
ATEN = {f"{INDUCTOR}MAX_AUTOTUNE_GEMM": "1", f"{INDUCTOR}MAX_AUTOTUNE_GEMM_BACKENDS": "ATEN"}
CHANGES = {
    "reference": Change(options=dict(compile="off", dtype="float32"), patch=no_tf32),  # its gradient is compared with
    "eager": Change(options=dict(compile="off")),
    "nanogpt": Change(options=dict(compile="off"), patch=larger_vocabulary),
    "residual": Change(patch=residual_in_16_bit),
    "loss": Change(patch=padded_loss),
    "flash": Change(patch=no_cudnn),
    "half_batch": Change(batch_factor=0.5),
    "double_batch": Change(batch_factor=2),
    "cublaslt": Change(environment={"TORCH_BLAS_PREFER_CUBLASLT": "1"}),
    "tune": Change(environment=TUNE),
    "aten": Change(environment=ATEN),
    "no_tf32": Change(patch=no_tf32),
    "float32": Change(options=dict(dtype="float32")),
    "explicit": Change(patch=explicit_attention),
    "unpadded": Change(patch=unpadded_vocabulary),
    "unfused": Change(patch=unfused_adamw),
    "default": Change(),
}
# The ladder's first rung is without all of these; each further rung adds the first that is missing.
RUNGS = "float32", "TF32", "bfloat16", "compiled", "flash attention", "padded vocabulary", "fused AdamW"
REMOVED = "no_tf32", "float32", "eager", "explicit", "unpadded", "unfused"
LADDER = {rung: "+".join(REMOVED[i:]) or "default" for i, rung in enumerate(RUNGS)}
GPU = "nanogpt eager default residual residual+loss flash half_batch double_batch cublaslt tune aten".split()
SWEEPS = dict(gpu={name: name for name in GPU}, ladder=LADDER)  # variants by name: changes joined by +


@dataclass(frozen=True)
class SweepOptions:
    """The options of bench.py for gpu and ladder."""

    device: str | torch.device = option("auto", "cpu, cuda, or auto for the fastest", metavar="DEVICE")
    only: tuple[str, ...] = option((), "gpu, ladder: these variants; changes joined by +", metavar="VARIANT")
    micro_batch_size: int | None = option(None, "gpu, ladder: sequences at once (default: 64, 16)", low=1, metavar="N")
    time_limit: float = option(100.0, "gpu, ladder: seconds for one variant", low=1, high=1e6, metavar="S")
    deadline: float = option(3600.0, "gpu, ladder: seconds for all together", low=1, high=1e6, metavar="S")
    results: Path | None = option(None, "gpu, ladder: add each result to this file, as JSON", metavar="FILE")
    profile: Path | None = option(None, "gpu, ladder: write traces of three steps here", metavar="DIR")
    gradient: Path | None = option(None, "in a child process: the gradient to compare with")

    def size(self, sweep: str) -> Size:
        size = SIZES[sweep][self.device.type]
        return size._replace(micro_batch_size=self.micro_batch_size or size.micro_batch_size)


def find_changes(joined: str) -> list[Change]:
    """Return the changes of a variant, whose names are joined by +. Raise UserError."""
    names = joined.split("+")
    if unknown := [name for name in names if name not in CHANGES]:
        raise UserError(f"{unknown[0]}: no such variant; there are {', '.join(CHANGES)}, and several joined by +")
    return [CHANGES[name] for name in names]


# -- In the child process


def measure_variant(args: SweepOptions, sweep: str, changes: str) -> dict:
    """Train with these changes; return speed, memory, the error of the gradient, and where the time went. The
    reference only writes its gradient."""
    size, chosen = args.size(sweep), find_changes(changes)
    options = dict(preset=size.preset, data=TEXT, device=args.device.type, compile="on")
    for change in chosen:
        options |= change.options
        if change.patch:
            change.patch()
    seq_len = train_gpt2.PRESETS[size.preset].get("seq_len", 1024)
    options["total_batch_size"] = size.micro_batch_size * size.grad_accum_steps * seq_len
    options["micro_batch_size"] = int(size.micro_batch_size * math.prod(c.batch_factor for c in chosen))
    argv = ["--dry_run", *(f"--{name}={value}" for name, value in options.items())]
    with contextlib.redirect_stdout(sys.stderr), train_gpt2.open_trainer(argv) as trainer:
        if changes == "reference":
            torch.save((weights(trainer), compute_gradient(trainer, size.gate_sequences)), args.gradient)
            return {}
        error = compare_gradient(trainer, args.gradient, size.gate_sequences)
        ends = []
        for _ in range(size.steps + 2):  # the first ends the warm-up
            trainer.train_step()
            ends.append(time.perf_counter())
        durations = [end - start for start, end in zip(ends[1:], ends[2:], strict=False)]
        memory = peak_memory(trainer.dist.device) / 1e9
        found = profile_steps(trainer, args.profile and args.profile / f"{changes}.json")
        config, B = trainer.config, trainer.config.micro_batch_size
    speed = config.total_batch_size / median(durations)
    result = dict(tokens_per_second=speed, seconds=durations, peak_memory_gb=memory, gradient_error=error)
    return result | found | dict(micro_batch_size=B, dtype=config.dtype, compile=config.compile)


def weights(trainer: train_gpt2.Trainer) -> dict[str, torch.Tensor]:
    """Return the parameters without the rows that pad the vocabulary, whose number differs between variants."""
    return {name: p.detach()[:VOCAB_SIZE] for name, p in trainer.raw_model.named_parameters()}


def compare_gradient(trainer: train_gpt2.Trainer, file: Path, n: int) -> float:
    """Return the relative error of the gradient of n sequences, with the weights of the file. Raise UserError."""
    expected_weights, expected = torch.load(file, map_location=trainer.dist.device, weights_only=True)
    for name, p in weights(trainer).items():
        p.copy_(expected_weights[name])
    gradient = compute_gradient(trainer, n)
    squares = [((gradient[name] - t).square().sum(), t.square().sum()) for name, t in expected.items()]
    error = math.sqrt(sum(difference for difference, _ in squares) / sum(total for _, total in squares))
    if not error <= MAX_GRADIENT_ERROR:  # nan, too
        raise UserError(f"the gradient differs by {error:.1e} from that in float32, more than {MAX_GRADIENT_ERROR}", 1)
    return error


def compute_gradient(trainer: train_gpt2.Trainer, n: int) -> dict[str, torch.Tensor]:
    """Return the gradient of the mean loss of n sequences, in float32, by the names of the parameters."""
    B = trainer.config.micro_batch_size
    rows = trainer.train_loader.rows(0, n).repeat(math.ceil(B / n), 1)  # of equal rows, the mean is the same
    for some_rows in rows.split(B):
        x, y = inputs_and_targets(some_rows, trainer.dist.device)
        with trainer.autocast:
            loss = trainer.model(x, y)
        trainer.scaler.scale(loss * len(some_rows) / len(rows)).backward()
    scale = trainer.scaler.get_scale()
    gradient = {name: p.grad[:VOCAB_SIZE] / scale for name, p in trainer.raw_model.named_parameters()}
    trainer.optimizer.zero_grad(set_to_none=True)
    return gradient


def profile_steps(trainer: train_gpt2.Trainer, trace: Path | None) -> dict:
    """Profile a step, or three for a trace; return which attention ran, and the kernels that took most of the time."""
    cuda = trainer.dist.device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    steps = 3 if trace else 1
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            trainer.train_step()
        if cuda:
            torch.cuda.synchronize()
    if trace:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    events, prefix = profiler.key_averages(), "aten::_scaled_dot_product_"
    attention = {e.key.removeprefix(prefix) for e in events if e.key.startswith(prefix) and "backward" not in e.key}
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    times = {e.key: getattr(e, field) for e in events if e.device_type == kind and not e.is_user_annotation}
    total = sum(times.values())
    top = sorted(times.items(), key=lambda item: -item[1])[:12]
    kernels = [dict(name=key, ms=t / steps / 1e3, fraction=t / total) for key, t in top]
    return dict(attention=" and ".join(sorted(attention)) or "explicit", kernels=kernels)


# -- In the parent process


def run_child(
    line: list[str], timeout: float | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run a command in a process group of its own, and kill what is left of that at the end, at the timeout, or at
    Ctrl-C. Raise TimeoutExpired."""
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True)
    with subprocess.Popen(line, env=os.environ | (environment or {}), **options) as child:
        try:
            stdout, stderr = child.communicate(timeout=timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(line, child.returncode, stdout, stderr)


def measure_in_child(args: SweepOptions, line: list[str], changes: str, timeout: float) -> dict:
    """Measure a variant in a child process; return its result, or why there is none."""
    environment = {key: value for change in find_changes(changes) for key, value in change.environment.items()}
    try:
        done = run_child([*line, "--variant", changes], timeout, environment)
    except subprocess.TimeoutExpired:
        return dict(error=f"no result after {timeout:.0f} s")
    if done.returncode:
        return dict(error=(done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def run_sweep(args: SweepOptions, sweep: str, script: str, repeats: int) -> int:
    """Measure the variants of a sweep in turn, and print each result when it comes; return the exit status."""
    variants = {name: SWEEPS[sweep].get(name, name) for name in args.only or SWEEPS[sweep]}
    for changes in variants.values():
        find_changes(changes)  # raises before anything has run
    size, started, failed, fastest, baseline = args.size(sweep), time.monotonic(), False, {}, None
    gpu = f", {torch.cuda.get_device_name(args.device)}" if args.device.type == "cuda" else ""
    print(f"\n{sweep}: {size.preset}, {size.grad_accum_steps} × {size.micro_batch_size} sequences a step{gpu}")
    print(
        f"  {'variant':18} {'tokens/s':>9} {'ratio':>6} {'GB':>6} {'gradient':>9} {'batch':>6}  attention", flush=True
    )
    with tempfile.TemporaryDirectory() as directory:
        line = [sys.executable, script, sweep, "--device", str(args.device), "--gradient", f"{directory}/gradient.pt"]
        line += ["--micro_batch_size", str(size.micro_batch_size)]
        line += ["--profile", str(args.profile)] if args.profile else []
        runs = [("reference", "reference"), *[*variants.items()] * repeats]
        for name, changes in tqdm(runs, desc=sweep, unit="variant", leave=False, disable=None):
            left = args.deadline - (time.monotonic() - started)
            if left < 1:
                result = dict(error=f"not run: the deadline of {args.deadline:g} s has passed")
            else:
                result = measure_in_child(args, line, changes, min(left, args.time_limit))
            result = dict(sweep=sweep, variant=name, changes=changes) | result
            failed |= "error" in result
            if args.results:
                with open(args.results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
            if "tokens_per_second" in result:
                baseline = baseline or result["tokens_per_second"]
                fastest = max(fastest, result, key=lambda r: r.get("tokens_per_second", 0))
            tqdm.write(result_line(result, baseline))
            if result["changes"] == "reference" and "error" in result:
                raise UserError(f"{sweep}: without the reference there is nothing to compare gradients with", 1)
    for kernel in fastest.get("kernels", []):
        print(f"  {kernel['ms']:10.2f} ms  {kernel['fraction']:6.1%}  {kernel['name'][:55]}")
    return 1 if failed else 0


def result_line(result: dict, baseline: float | None) -> str:
    """Return a row of the table: speed, also relative to the first variant's, peak memory, error of the gradient,
    micro-batch size, attention."""
    if "tokens_per_second" not in result:
        return f"  {result['variant']:18} {result.get('error', 'its gradient is written')}"
    speed, attention = result["tokens_per_second"], result["attention"].replace("_attention", "")
    numbers = f"{result['peak_memory_gb']:6.1f} {result['gradient_error']:9.0e} {result['micro_batch_size']:6}"
    return f"  {result['variant']:18} {speed:9,.0f} {speed / baseline:6.2f} {numbers}  {attention}"
