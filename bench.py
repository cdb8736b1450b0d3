"""Measure speed as ratios: run each variant in its own process, all in turn, several times; print the medians.

    python bench.py                    all benchmarks but gpu and ladder
    python bench.py small 124M         training: tokens per second
    python bench.py memory generate    GPT-2 124M: peak memory of training, tokens per second of generation
    python bench.py optimizer          what Muon adds to a step of small
    python bench.py lambada            GPT-2 124M: records per second of an evaluation
    python bench.py gpu                ways to train GPT-2 124M on a GPU, and which kernels take the time
    python bench.py ladder             what each optimization adds to GPT-2 124M on a GPU

Nothing else should run meanwhile. The last variant of a benchmark is its baseline. All variants have random weights and
the fastest precision of the device. gpu and ladder have options of their own: see python bench.py gpu --help.
"""

from errors import UserError, run_script
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

import sweep
import train_gpt2
from model import GPT, GPTConfig, sample
from recipe import PRESETS, TrainConfig
from runtime.device import choose_device, choose_dtype, peak_memory, sdpa_without_cudnn, tune_malloc
from runtime.distributed import Distributed
from runtime.files import write_json
from runtime.options import option, output_file, parse_options
from scoring import Scorer
from sweep import TEXT, ChildError, open_dry_run, run_child
from tokens import END_OF_TEXT, VOCAB_SIZE, gpt2_tokenizer
from zero_shot import lambada

SCRIPT = __file__  # what a child runs
SHAPES = {"small": ("small", 8), "124M": ("gpt2", 2), "memory": ("gpt2", 4), "optimizer": ("small", 32)}
GPT2 = GPTConfig()  # 124M, which generates


def seconds(work: Callable, *args) -> float:
    """Return how long work(*args) takes."""
    started = time.perf_counter()
    work(*args)
    return time.perf_counter() - started


def autocast(args: "Options") -> torch.autocast:
    return torch.autocast(args.device.type, args.dtype, enabled=args.dtype != torch.float32)


def transformers_model(config: GPTConfig) -> torch.nn.Module:
    """Return transformers' GPT-2 of this shape, with random weights, SDPA and no dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(**config.to_hf(), attn_implementation="sdpa"))


def shape_of(name: str) -> tuple[int, GPTConfig]:
    """Return the sequences of a micro-batch, and the network."""
    preset, B = SHAPES[name]
    c = TrainConfig(**PRESETS[preset])
    return B, GPTConfig(block_size=c.seq_len, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)


def train(args: "Options", name: str, compile: str = "on", tuned: bool = True, optimizer: str = "adamw") -> float:
    """Take four steps of train_gpt2.py itself; return tokens per second, or for memory the peak in GB."""
    B, shape = shape_of(name)
    if not tuned:
        train_gpt2.tune_malloc = lambda: None
    flags = dict(preset=SHAPES[name][0], micro_batch_size=B, total_batch_size=B * shape.block_size, data=TEXT)
    flags |= dict(device=args.device.type, compile=compile, optimizer=optimizer)
    with open_dry_run(flags) as trainer:
        median_seconds = sorted(trainer.train_step().seconds for _ in range(4))[1]  # the first is slow
    if name == "memory":
        return peak_memory(args.device) / 1e9
    return B * shape.block_size / median_seconds


def measure_loop(args: "Options", name: str, loss_of: Callable, optimizer: torch.optim.Optimizer) -> float:
    """Return the same figure for a straightforward loop."""
    B, shape = shape_of(name)
    rows = torch.randint(VOCAB_SIZE, (B, shape.block_size + 1), device=args.device)
    x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step() -> None:
        optimizer.zero_grad()
        with autocast(args):
            loss = loss_of(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        loss.item()

    step()  # warm up
    median_seconds = sorted(seconds(step) for _ in range(4))[1]  # as in a dry run
    if name == "memory":
        return peak_memory(args.device) / 1e9
    return B * shape.block_size / median_seconds


def train_transformers(args: "Options", name: str) -> float:
    """Train transformers' GPT-2, eager with autocast, with the default AdamW and the default allocator."""
    model = transformers_model(shape_of(name)[1]).to(args.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4)
    cross_entropy = torch.nn.functional.cross_entropy
    return measure_loop(args, name, lambda x, y: cross_entropy(model(x).logits.flatten(0, 1), y.flatten()), optimizer)


def train_build_nanogpt(args: "Options", name: str) -> float:
    """Train the network of karpathy/build-nanogpt with its optimizer: the part of its script before the data."""
    source = (args.peer / "train_gpt2.py").read_text(encoding="utf-8")
    network = source.split("\nimport tiktoken")[0].replace("from hellaswag import", "# from hellaswag import")
    peer = dict(__name__="peer", master_process=False)
    exec(network, peer)
    c = shape_of(name)[1]
    shape = dict(block_size=c.block_size, vocab_size=50304, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)
    model = peer["GPT"](peer["GPTConfig"](**shape)).to(args.device)
    optimizer = model.configure_optimizers(0.1, 6e-4, args.device.type)
    return measure_loop(args, name, lambda x, y: model(x, y)[1], optimizer)


def multiply(args: "Options", name: str) -> float:
    """Return the tokens per second that the device could train on if it only multiplied square matrices."""
    n = 8192 if args.device.type == "cuda" else 2048
    A, B = (torch.randn(n, n, device=args.device, dtype=args.dtype) for _ in range(2))
    torch.set_float32_matmul_precision("high")
    durations = [seconds(lambda: (A @ B)[0, 0].item()) for _ in range(12)]
    with torch.device("meta"):
        flops_per_token = GPT(shape_of(name)[1]).flops_per_token()
    return 2 * n**3 / median(durations[2:]) / flops_per_token


@sdpa_without_cudnn()
def time_generation(args: "Options", generate: Callable[[torch.Tensor, int], torch.Tensor]) -> float:
    """Return new tokens per second, four sequences at once: generate(idx, n) continues idx (4, 32) to (4, 32 + n)."""
    idx = torch.randint(VOCAB_SIZE, (4, 32), device=args.device)
    generate(idx, 8)  # warm up
    return 4 * 64 / seconds(lambda: generate(idx, 64)[0, -1].item())


def generate(args: "Options", name: str) -> float:
    tune_malloc()
    model = GPT(GPT2).eval().to(args.device, args.dtype)
    return time_generation(args, partial(model.generate, top_k=50))


def generate_transformers(args: "Options", name: str, dtype: torch.dtype) -> float:
    model = transformers_model(GPT2).eval().to(args.device, dtype)
    options = dict(do_sample=True, top_k=50, pad_token_id=END_OF_TEXT)
    return time_generation(args, lambda idx, n: model.generate(idx, max_new_tokens=n, min_new_tokens=n, **options))


def generate_without_cache(args: "Options", name: str) -> float:
    """Compute the whole sequence again for each token, as build-nanogpt does."""
    model = GPT(GPT2).eval().to(args.device)

    def loop(idx: torch.Tensor, n: int) -> torch.Tensor:
        for _ in range(n):
            with torch.no_grad(), autocast(args):
                logits = model(idx)[:, -1]
            idx = torch.cat((idx, sample(logits, top_k=50)[:, None]), dim=1)
        return idx

    return time_generation(args, loop)


def lambada_texts() -> list[str]:
    """Return 40 passages of 40 to 110 words, as LAMBADA's are."""
    words = iter(TEXT.read_text(encoding="utf-8").split())
    return [" ".join(next(words) for _ in range(40 + n * 37 % 71)) for n in range(40)]


def evaluate_lambada(args: "Options", name: str) -> float:
    """Evaluate the passages as evaluate.py does; return passages per second."""
    tune_malloc()
    scorer = Scorer(GPT(GPT2).eval().to(args.device, args.dtype), 1024, Distributed())
    texts = lambada_texts()
    lambada(scorer, name, texts[:5])  # warm up
    return len(texts) / seconds(lambada, scorer, name, texts)


def evaluate_one_by_one(args: "Options", name: str) -> float:
    """Compute all logits of one passage after the other, by transformers."""
    model = transformers_model(GPT2).eval().to(args.device, args.dtype)
    encode = gpt2_tokenizer().encoding.encode_ordinary
    texts = lambada_texts()

    def evaluate(texts: list[str]) -> None:
        for text in texts:
            tokens = torch.tensor([encode(text)], device=args.device)
            with torch.no_grad():
                logprobs = model(tokens[:, :-1]).logits.float().log_softmax(dim=-1)
            logprobs[0, -1, tokens[0, -1]].item()

    evaluate(texts[:5])  # warm up
    return len(texts) / seconds(evaluate, texts)


CEILING, PEER = "matrix products alone", "build-nanogpt"
TRAINING = {
    "train_gpt2.py": train,
    "… uncompiled": partial(train, compile="off"),
    "… and with the default allocator": partial(train, compile="off", tuned=False),
    CEILING: multiply,
    PEER: train_build_nanogpt,
    "transformers, eager baseline": train_transformers,
}
GENERATION = {
    "GPT.generate": generate,
    "transformers.generate, float32": partial(generate_transformers, dtype=torch.float32),
    "transformers.generate, bfloat16": partial(generate_transformers, dtype=torch.bfloat16),
    "without a cache": generate_without_cache,
}
BENCHMARKS = {
    "small": TRAINING,
    "124M": TRAINING,
    "memory": {variant: measure for variant, measure in TRAINING.items() if variant != CEILING},
    "generate": GENERATION,
    "lambada": {"evaluate.py": evaluate_lambada, "one record at a time": evaluate_one_by_one},
    "optimizer": {f"--optimizer {which}": partial(train, optimizer=which) for which in ("muon", "adamw")},
}


@dataclass(frozen=True)
class Options:
    names: tuple[str, ...] = option((), f"some of {', '.join(BENCHMARKS)}", positional=True, metavar="NAME")
    repeats: int = option(5, "number of runs of each variant", low=1, high=1000, metavar="N")
    peer: Path | None = option(None, "a checkout of karpathy/build-nanogpt to measure, too", metavar="DIR")
    device: str | torch.device = option("auto", "cpu, cuda, or auto for the fastest", metavar="DEVICE")
    json: Path | None = option(None, "write all figures to this file", type=output_file, metavar="FILE")
    variant: str | None = option(None, "in a child process: run this variant once and print its figure")

    @property
    def dtype(self) -> torch.dtype:
        """Return the fastest precision of the device."""
        return getattr(torch, choose_dtype("auto", self.device.type))


def main(argv: list[str] | None = None) -> int:
    """Run the benchmarks, each variant in a child process, and print their tables. Raise UserError."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in sweep.SWEEPS:
        return sweep.main(argv)
    args = Options(**parse_options(Options, argv, __doc__))
    names = args.names or tuple(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise UserError(f"{', '.join(unknown)}: no such benchmark; there are {', '.join(BENCHMARKS)}")
    if args.peer and not os.path.isfile(args.peer / "train_gpt2.py"):
        raise UserError(f"--peer {args.peer}: there is no train_gpt2.py in it")
    if args.variant and args.variant not in BENCHMARKS[names[0]]:
        raise UserError(f"--variant {args.variant}: no such variant of {names[0]}")
    args = replace(args, device=torch.device(choose_device(args.device)))
    if args.variant:
        torch.manual_seed(0)
        print(json.dumps(BENCHMARKS[names[0]][args.variant](args, names[0])))
        return 0
    print(f"{args.device}, {torch.get_num_threads()} threads, {args.dtype}, torch {torch.__version__}", flush=True)
    figures = dict(device=str(args.device), dtype=str(args.dtype), torch=torch.__version__)
    for name in names:
        runs: dict[str, list[float]] = {variant: [] for variant in BENCHMARKS[name] if args.peer or variant != PEER}
        for variant in tqdm([*runs] * args.repeats, desc=name, leave=False, disable=None):  # on a terminal
            runs[variant].append(measure_in_child(args, name, variant))
        unit = dict(memory="GB", lambada="records/s").get(name, "tokens/s")
        print_table(name, unit, runs)
        figures[name] = dict(unit=unit, runs=runs)
    if args.json:
        write_json(args.json, figures)
    return 0


def measure_in_child(args: Options, name: str, variant: str) -> float:
    """Run a variant once, in a process of its own, and return its figure. Raise UserError."""
    line = [sys.executable, SCRIPT, name, "--variant", variant, "--device", str(args.device)]
    if args.peer:
        line += ["--peer", str(args.peer)]
    try:
        return run_child(line)
    except ChildError as e:
        raise UserError(f"{name}, {variant}: {e}", 1) from None


def print_table(name: str, unit: str, runs: dict[str, list[float]]) -> None:
    print(f"\n{name} ({unit})")
    baseline = [*runs.values()][-1]
    for variant, values in runs.items():
        ratio = median(value / base for value, base in zip(values, baseline, strict=True))
        spread = f"{min(values):,.4g} to {max(values):,.4g}"
        fraction = f", {median(values) / median(runs[CEILING]):.0%} of the matrix rate" if CEILING in runs else ""
        print(f"  {variant:34} {median(values):12,.4g}   ({spread})   × {ratio:.2f}{fraction}")


if __name__ == "__main__":
    sys.exit(run_script(main))
