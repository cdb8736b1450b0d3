"""Compare variants of training GPT-2 124M on a GPU, each in its own process: `bench.py gpu` and `bench.py ladder`.

    python bench.py gpu                           possible improvements, at 524,288 tokens a step
    python bench.py gpu --only default residual+loss --repeats 3
    python bench.py ladder                        what each optimization adds: the lecture's table
    python bench.py gpu ladder --device cpu       the same code with tiny, to try it out

A variant is train_gpt2.py with some changes: options, environment variables, or a patch of its code. Before it is
timed, its gradient is compared with that of the eager model in float32. docs/gpu.md explains the changes and the table.
"""

from errors import UserError, run_script
import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import torch
from torch.nn import functional as F
from tqdm import tqdm

from data import inputs_and_targets
from model import GPT, GPTConfig
from recipe import PRESETS, TrainConfig
from runtime.device import choose_device, peak_memory
from runtime.options import option, output_file, parse_options
from runtime.plan import Plan
from tokens import VOCAB_SIZE
from train_gpt2 import Trainer, open_trainer

SCRIPT = __file__  # what a child runs
TEXT = Path(__file__).resolve().parent / "input.txt"
MAX_GRADIENT_ERROR = 2e-2  # relative; bfloat16 rounds at 4e-3
RECORDED = "preset", "total_batch_size", "micro_batch_size", "dtype", "compile", "recompute"  # in the results


@dataclass(frozen=True)
class Workload:
    """What a variant trains, and for how long."""

    preset: str
    micro_batch_size: int
    grad_accum_steps: int
    steps: int
    gradient_sequences: int  # number of sequences in the comparison of gradients


REHEARSAL = Workload("tiny", micro_batch_size=2, grad_accum_steps=2, steps=3, gradient_sequences=4)
WORKLOADS = {
    "gpu": Workload("gpt2", micro_batch_size=64, grad_accum_steps=8, steps=10, gradient_sequences=64),
    "ladder": Workload("gpt2", micro_batch_size=16, grad_accum_steps=1, steps=10, gradient_sequences=64),
}


# -- Patches: possible improvements, and optimizations that the ladder removes


def residual_in_16_bit() -> None:
    """Cast once after the embeddings, so that the residual stream has 16 bit. Master weights stay float32."""
    init = GPT.__init__

    def cast(module, args, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x

    def init_with_cast(self, config: GPTConfig) -> None:
        init(self, config)
        self.transformer.drop.register_forward_hook(cast)

    GPT.__init__ = init_with_cast


def padded_loss() -> None:
    """Compute the loss over all padded logits, with -inf in the padded ones: their number is a multiple of 128."""

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        logits = F.linear(self.hidden(idx), self.transformer.wte.weight).float()  # (B, T, padded V)
        padding = torch.arange(logits.size(-1), device=logits.device) >= self.config.vocab_size
        logits = logits.masked_fill(padding, -math.inf)
        if targets is None:
            return logits[..., : self.config.vocab_size]
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))

    GPT.forward = forward


def larger_vocabulary() -> None:
    """Use all 50,304 logits in the softmax, as build-nanogpt does."""
    model_config = Plan.model_config.fget
    Plan.model_config = property(lambda self: replace(model_config(self), vocab_size=50304))


def no_cudnn() -> None:
    torch.backends.cuda.enable_cudnn_sdp(False)


def no_tf32() -> None:
    """Ignore what open_trainer sets."""
    torch.set_float32_matmul_precision = lambda precision: None


def no_sdpa() -> None:
    """Compute attention with all T × T scores in memory."""

    def attention(q, k, v, mask=None, dropout_p=0.0, is_causal=False) -> torch.Tensor:  # noqa: PLR0913
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, nh, T, T)
        if is_causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return scores.softmax(dim=-1) @ v

    F.scaled_dot_product_attention = attention


def no_padding() -> None:
    GPTConfig.padded_vocab_size = property(lambda self: self.vocab_size)


def no_fused_adamw() -> None:
    """Let PyTorch choose, which takes its implementation of several kernels."""
    adamw = torch.optim.AdamW
    torch.optim.AdamW = lambda groups, **options: adamw(groups, **options | dict(fused=None))


@dataclass(frozen=True)
class Change:
    """A difference from train_gpt2.py as it is."""

    options: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    patch: Callable[[], None] | None = None
    batch_factor: float = 1  # of the micro-batch; the total batch stays


CHANGES = {
    "default": Change(),
    "eager": Change(options=dict(compile="off")),
    "nanogpt": Change(options=dict(compile="off"), patch=larger_vocabulary),
    "residual": Change(patch=residual_in_16_bit),
    "loss": Change(patch=padded_loss),
    "half_batch": Change(batch_factor=0.5),
    "double_batch": Change(batch_factor=2),
    "cublaslt": Change(environment={"TORCH_BLAS_PREFER_CUBLASLT": "1"}),
    "aten": Change(
        environment={"TORCHINDUCTOR_MAX_AUTOTUNE_GEMM": "1", "TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS": "ATEN"}
    ),
    "tune": Change(
        environment={"TORCHINDUCTOR_COORDINATE_DESCENT_TUNING": "1", "TORCHINDUCTOR_MAX_AUTOTUNE_POINTWISE": "1"}
    ),
    # The cache of compiled graphs does not distinguish which attention they contain (pytorch issue 185449).
    "no_cudnn": Change(environment={"TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}, patch=no_cudnn),
    "no_tf32": Change(patch=no_tf32),
    "no_autocast": Change(options=dict(dtype="float32")),
    "no_sdpa": Change(patch=no_sdpa),
    "no_padding": Change(patch=no_padding),
    "no_fused": Change(patch=no_fused_adamw),
}
REFERENCE = "no_tf32+no_autocast+eager"  # the gradients of the others are compared with this one's
GPU = "default nanogpt eager residual residual+loss no_cudnn half_batch double_batch cublaslt aten tune".split()
SWEEPS = {
    "gpu": {variant: variant for variant in GPU},
    # Each row adds one optimization: it is without one change of the row above.
    "ladder": {
        "float32": "no_tf32+no_autocast+eager+no_sdpa+no_padding+no_fused",
        "TF32": "no_autocast+eager+no_sdpa+no_padding+no_fused",
        "bfloat16": "eager+no_sdpa+no_padding+no_fused",
        "compiled": "no_sdpa+no_padding+no_fused",
        "flash attention": "no_padding+no_fused",
        "padded vocabulary": "no_fused",
        "fused AdamW": "default",
    },
}


def find_changes(variant: str) -> list[Change]:
    """Return the changes of a variant, whose names are joined by +. Raise UserError."""
    names = variant.split("+")
    if unknown := [name for name in names if name not in CHANGES]:
        raise UserError(f"{unknown[0]}: no such change; choose from {', '.join(CHANGES)}, or join several with +")
    return [CHANGES[name] for name in names]


@dataclass(frozen=True)
class Options:
    names: tuple[str, ...] = option((), f"some of {', '.join(SWEEPS)}", positional=True, metavar="NAME")
    only: tuple[str, ...] = option((), "these variants: rows of the sweep, or changes joined by +", metavar="VARIANT")
    repeats: int = option(1, "runs of each variant, in turn", low=1, high=1000, metavar="N")
    micro_batch_size: int | None = option(None, "sequences at once (default: gpu 64, ladder 16)", low=1, metavar="N")
    time_limit: float = option(240.0, "time limit of each variant, in seconds", low=1, high=1e6, metavar="S")
    deadline: float = option(3600.0, "time limit of all variants together, in seconds", low=1, high=1e6, metavar="S")
    results: Path | None = option(None, "append each result to this file, as JSON", type=output_file, metavar="FILE")
    profile: Path | None = option(None, "write a trace of three steps of each variant here", metavar="DIR")
    device: str = option("auto", "cuda, cpu, or auto for the fastest", metavar="DEVICE")
    variant: str | None = option(None, "in a child process: measure this variant", metavar="VARIANT")
    gradient: Path | None = option(None, "in a child process: file of the reference's gradient", metavar="FILE")

    def workload(self, sweep: str) -> Workload:
        workload = REHEARSAL if self.device == "cpu" else WORKLOADS[sweep]
        return replace(workload, micro_batch_size=self.micro_batch_size or workload.micro_batch_size)


# -- In the child process


@contextlib.contextmanager
def open_dry_run(options: dict) -> Iterator[Trainer]:
    """Yield the trainer of a dry run with these options of train_gpt2.py. What it prints goes to stderr."""
    argv = ["--dry_run", *(f"--{name}={value}" for name, value in options.items())]
    with contextlib.redirect_stdout(sys.stderr), open_trainer(argv) as trainer:
        yield trainer


@contextlib.contextmanager
def open_variant(args: Options, workload: Workload) -> Iterator[Trainer]:
    """Apply the changes of a variant, which last as long as the process; yield its trainer. Raise UserError."""
    B, seq_len = workload.micro_batch_size, TrainConfig(**PRESETS[workload.preset]).seq_len
    options = dict(preset=workload.preset, data=TEXT, device=args.device, compile="on")
    options |= dict(micro_batch_size=B, total_batch_size=B * workload.grad_accum_steps * seq_len)
    for change in find_changes(args.variant):
        options |= change.options
        options["micro_batch_size"] = int(options["micro_batch_size"] * change.batch_factor)
        if change.patch:
            change.patch()
    with open_dry_run(options) as trainer:
        if trainer.config.compile != options["compile"]:
            raise UserError("could not be compiled", 1)
        yield trainer


def write_reference(args: Options, workload: Workload) -> None:
    """Write weights and gradient of the reference."""
    with open_variant(args, workload) as trainer:
        gradient = compute_gradient(trainer, workload.gradient_sequences)
        torch.save((unpadded_weights(trainer), gradient), args.gradient)


def measure_variant(args: Options, workload: Workload) -> dict:
    """Train; return speed, peak memory, the error of the gradient, and where the time went. Raise UserError."""
    with open_variant(args, workload) as trainer:
        error = compare_gradient(trainer, args.gradient, workload.gradient_sequences)
        seconds = [trainer.train_step().seconds for _ in range(workload.steps + 2)][2:]  # after two to warm up
        config = trainer.config
        return dict(
            tokens_per_second=config.total_batch_size / median(seconds),
            seconds=seconds,
            peak_memory_gb=peak_memory(trainer.dist.device) / 1e9,
            gradient_error=error,
            **{name: getattr(config, name) for name in RECORDED},
            **profile_steps(trainer, args),
        )


def unpadded_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return the parameters without the rows that pad the vocabulary, whose number differs between variants."""
    return {name: p.detach()[:VOCAB_SIZE] for name, p in trainer.raw_model.named_parameters()}


def compute_gradient(trainer: Trainer, n: int) -> dict[str, torch.Tensor]:
    """Return the gradient of the mean loss of n sequences, without padded rows, by the names of the parameters."""
    B = trainer.config.micro_batch_size
    # A compiled model takes B sequences. If that is more than n, repeat them: the mean stays the same.
    rows = trainer.train_loader.rows(0, n).repeat(math.ceil(B / n), 1)
    for some_rows in rows.split(B):
        x, y = inputs_and_targets(some_rows, trainer.dist.device)
        with trainer.autocast:
            loss = trainer.model(x, y)
        trainer.scaler.scale(loss * len(some_rows) / len(rows)).backward()
    scale = trainer.scaler.get_scale()
    gradient = {name: p.grad[:VOCAB_SIZE] / scale for name, p in trainer.raw_model.named_parameters()}
    trainer.optimizer.zero_grad(set_to_none=True)
    return gradient


def compare_gradient(trainer: Trainer, reference: Path, n: int) -> float:
    """Take the reference's weights; return the relative error of the gradient there. Raise UserError."""
    weights, expected = torch.load(reference, map_location=trainer.dist.device, weights_only=True)
    for name, p in unpadded_weights(trainer).items():  # with more padded rows, other initial weights are drawn
        p.copy_(weights[name])
    gradient = compute_gradient(trainer, n)
    difference = sum((gradient[name] - t).square().sum() for name, t in expected.items())
    error = math.sqrt(difference / sum(t.square().sum() for t in expected.values()))
    if math.isnan(error) or error > MAX_GRADIENT_ERROR:
        raise UserError(f"the gradient differs by {error:.1e} from that in float32, more than {MAX_GRADIENT_ERROR}", 1)
    return error


def profile_steps(trainer: Trainer, args: Options) -> dict:
    """Profile a step, or three for a trace; return which attention ran, and the kernels that took most of the time."""
    steps, cuda = 3 if args.profile else 1, args.device == "cuda"
    with torch.profiler.profile() as profiler:
        for _ in range(steps):
            trainer.train_step()
    if args.profile:
        profiler.export_chrome_trace(str(args.profile / f"{args.names[0]}-{args.variant.replace('+', '-')}.json.gz"))
    events = profiler.key_averages()
    attention = {
        m[1] for e in events if (m := re.fullmatch("aten::_scaled_dot_product_(.*)_attention(_for_cpu)?", e.key))
    }
    device_type = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    times = {}
    for e in events:
        if e.device_type == device_type and not e.is_user_annotation:
            times[e.key] = e.self_device_time_total if cuda else e.self_cpu_time_total  # in microseconds
    top = sorted(times, key=times.get, reverse=True)[:12]
    total = sum(times.values())
    kernels = [dict(name=key, ms=times[key] / steps / 1e3, fraction=times[key] / total) for key in top]
    return dict(attention=" and ".join(sorted(attention)) or "explicit", kernels=kernels)


# -- In the parent process


class ChildError(Exception):
    """A child that gave no result: why, and the end of its stderr."""

    def __init__(self, reason: str, stderr: str):
        super().__init__(reason)
        self.stderr = stderr.splitlines()[-40:]


def run_child(command: list, timeout: float | None = None, environment: dict | None = None):
    """Run a command in its own process group; return the last line of its output, which is JSON. Kill the group when
    the command ends, at the timeout, and at Ctrl-C. Raise ChildError."""
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", process_group=0)
    with subprocess.Popen([*map(str, command)], env=os.environ | (environment or {}), **options) as child:
        try:
            stdout, stderr = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill_group(child)
            raise ChildError(f"no result after {timeout:.0f} s", child.communicate()[1]) from None
        finally:
            kill_group(child)
    if child.returncode < 0:
        raise ChildError(f"killed by signal {-child.returncode}", stderr)
    if child.returncode:
        lines = stderr.strip().splitlines() or [f"exit status {child.returncode}"]
        # PyTorch prints hints after the line that names the error.
        named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Failed|OutOfResources)\b.*:", line)]
        last = lines[-1] if ": error: " in lines[-1] or not named else named[-1]
        raise ChildError(last, stderr)
    try:
        return json.loads(stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise ChildError("printed no result", stderr) from None


def kill_group(child: subprocess.Popen) -> None:
    if not hasattr(os, "killpg"):  # on Windows
        child.kill()
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def find_variants(args: Options, sweep: str) -> dict[str, str]:
    """Return the variants of a sweep that are to be measured, by name. Raise UserError."""
    variants = {name: SWEEPS[sweep].get(name, name) for name in args.only or SWEEPS[sweep]}
    for variant in variants.values():
        find_changes(variant)
    return variants


def run_sweep(args: Options, sweep: str, gradient: Path, deadline: float) -> bool:
    """Measure the variants of a sweep in turn, up to a point in time; print each result when it comes. Return whether
    all have one."""
    variants, workload, results = find_variants(args, sweep), args.workload(sweep), []
    device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    batch = f"{workload.grad_accum_steps} × {workload.micro_batch_size} sequences a step"
    print(f"\n{sweep}: {workload.preset}, {batch}, {device}, torch {torch.__version__}")
    print(HEADER, flush=True)
    command = child_command(args, sweep, gradient)
    for name, variant in tqdm(
        [*variants.items()] * args.repeats, desc=sweep, unit="variant", leave=False, disable=None
    ):
        limit = min(args.time_limit, deadline - time.monotonic())
        result = dict(sweep=sweep, name=name, variant=variant, device=device, torch=torch.__version__)
        result |= measure_in_child(command, variant, limit)
        results.append(result)
        if args.results:
            with open(args.results, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
        tqdm.write(row(result, results, baseline=[*variants][0]))
        sys.stdout.flush()
    fastest = max(results, key=lambda result: result.get("tokens_per_second", 0))
    for kernel in fastest.get("kernels", []):
        print(f"  {kernel['ms']:10.2f} ms  {kernel['fraction']:6.1%}  {kernel['name'][:55]}")
    return not any("error" in result for result in results)


def child_command(args: Options, sweep: str, gradient: Path) -> list:
    """Return the command of a child, but for its --variant."""
    command = [sys.executable, SCRIPT, sweep, "--device", args.device, "--gradient", gradient]
    command += ["--micro_batch_size", args.workload(sweep).micro_batch_size]
    return command + (["--profile", args.profile] if args.profile else [])


def measure_in_child(command: list, variant: str, limit: float) -> dict:
    """Run a variant; return its result, or why there is none."""
    if limit < 1:
        return dict(error="not run: the deadline has passed")
    environment = {key: value for change in find_changes(variant) for key, value in change.environment.items()}
    try:
        return run_child([*command, "--variant", variant], limit, environment)
    except ChildError as e:
        return dict(error=str(e), stderr=e.stderr)


HEADER = f"  {'variant':18} {'tokens/s':>9} {'ratio':>6} {'GB':>6} {'gradient':>9} {'batch':>6}  attention"


def row(result: dict, results: list[dict], baseline: str) -> str:
    """Return a row of the table: speed, also relative to the baseline's last run, peak memory, error of the gradient,
    micro-batch size, attention."""
    name = f"  {result['name']:18}"
    if "error" in result:
        return f"{name} {result['error']}"
    speed = result["tokens_per_second"]
    of_baseline = [r["tokens_per_second"] for r in results if r["name"] == baseline and "tokens_per_second" in r]
    ratio = f"{speed / of_baseline[-1]:6.2f}" if of_baseline else f"{'–':>6}"
    numbers = f"{result['peak_memory_gb']:6.1f} {result['gradient_error']:9.0e} {result['micro_batch_size']:6}"
    return f"{name} {speed:9,.0f} {ratio} {numbers}  {result['attention']}"


def main(argv: list[str] | None = None) -> int:
    """Run sweeps, or in a child process one of their variants. Return 1 if a variant has no result. Raise UserError."""
    started = time.monotonic()
    args = Options(**parse_options(Options, argv, __doc__))
    if unknown := [name for name in args.names if name not in SWEEPS]:
        raise UserError(f"{unknown[0]}: no such sweep; there are {', '.join(SWEEPS)}")
    args = replace(args, device=choose_device(args.device))
    if args.device not in ("cuda", "cpu"):
        raise UserError(f"--device {args.device}: the sweeps need cuda, or cpu to try them out")
    if args.variant and not (args.names and args.gradient):
        raise UserError("--variant: is for child processes, with a sweep and --gradient")
    if args.variant == "reference":
        write_reference(replace(args, variant=REFERENCE), args.workload(args.names[0]))
        print("{}")
        return 0
    if args.variant:
        print(json.dumps(measure_variant(args, args.workload(args.names[0]))))
        return 0
    names = args.names or tuple(SWEEPS)
    for name in names:
        find_variants(args, name)  # raises before anything has run
    if args.profile:
        args.profile.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        gradient = Path(directory) / "gradient.pt"  # both sweeps have the same model and sequences
        try:
            run_child(
                [*child_command(args, names[0], gradient), "--variant", "reference"],
                min(args.time_limit, args.deadline),
            )
        except ChildError as e:
            raise UserError(f"the gradient in float32 could not be computed: {e}", 1) from None
        complete = [run_sweep(args, name, gradient, started + args.deadline) for name in names]
    return 0 if all(complete) else 1


if __name__ == "__main__":
    sys.exit(run_script(main))
