"""Evaluate a GPT-2: the perplexity of any text, the tasks of the GPT-2 paper, HellaSwag, CORE.

    python evaluate.py                                     newest checkpoint in log/, validation part of input.txt
    python evaluate.py --model gpt2 --data my.txt          perplexity of a text, .jsonl, .parquet, or shard directory
    python evaluate.py --model gpt2 --tasks paper          table 3 of the paper, which stands beside it
    python evaluate.py --model gpt2-xl --tasks hellaswag core --dtype bfloat16
    torchrun --standalone --nproc_per_node=8 evaluate.py --tasks all

docs/evaluation.md says what each number is, and what it can be compared with.
"""

from errors import UserError, run_script
import hashlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import core
import hellaswag
import zero_shot
from data import open_data
from fineweb import check_texts, find_reader
from model import SIZES
from runtime import checkpoint
from runtime.distributed import Distributed
from runtime.files import write_atomically
from runtime.options import option, output_file, parse_options
from scoring import Result, Scorer, ScoringOptions, document
from tokens import END_OF_TEXT, gpt2_encoding, sha256

ROOT = Path(__file__).resolve().parent
PAPER = [*zero_shot.SOURCES]
TASKS = ["text", *PAPER, "hellaswag", "core"]


@dataclass(frozen=True)
class Options(ScoringOptions):
    model: str | None = option(None, "name on the hub, or directory (default: newest in log/)", metavar="MODEL")
    tasks: tuple[str, ...] = option(("text",), f"some of {', '.join(TASKS)}; paper; all", metavar="TASK")
    data: Path | None = option(None, "text to score (default: the validation part of input.txt)", metavar="FILE")
    data_dir: Path = option(ROOT / "evaluation", "directory of the tasks' data, downloaded if missing", metavar="DIR")
    core_dir: Path | None = option(None, "directory of CORE's unpacked bundle (default: download it)", metavar="DIR")
    stride: int | None = option(None, "also score N tokens per window, with more context", low=1, metavar="N")
    limit: int | None = option(None, "only the first N records, lines, or windows of a task", low=1, metavar="N")
    json: Path | None = option(None, "write the numbers to this file", type=output_file, metavar="FILE")


def read_tokens(path: Path | None) -> np.ndarray:
    """Return the tokens of a text, of documents, or of a directory's validation shards, (n,) of uint16."""
    if path is None or path.is_dir():
        parts = [tokens for _, tokens in open_data(path or ROOT / "input.txt").val]
    else:
        reader = find_reader(path)
        if reader is None or not path.is_file():
            raise UserError(f"--data {path}: no such file, or neither .txt nor .jsonl nor .parquet")
        parts = [document(text) for text in check_texts(reader(path, "text"), "text", str(path))]
    tokens = np.concatenate([document(""), *parts])
    if len(tokens) < 3:
        raise UserError(f"--data {path}: holds no text")
    return tokens[1:] if tokens[1] == END_OF_TEXT else tokens


def choose_tasks(names: tuple[str, ...]) -> list[str]:
    """Return the tasks of these names, "paper" and "all" being several. Raise UserError if there is no such task."""
    groups = dict(paper=PAPER, all=TASKS[1:])
    if unknown := [name for name in names if name not in (*TASKS, *groups)]:
        raise UserError(f"--tasks {unknown[0]}: no such task; there are {', '.join((*TASKS, *groups))}")
    return [task for task in TASKS if any(task == name or task in groups.get(name, ()) for name in names)]


def evaluate(scorer: Scorer, task: str, args: Options) -> tuple[str, list[Result]]:
    """Return the hash of a task's data, and its results. Raise UserError."""
    block_size = scorer.model.config.block_size
    strides = [block_size, *([args.stride] if args.stride else [])]
    if task == "text":
        with scorer.dist.agree():
            tokens = read_tokens(args.data)[: args.limit and args.limit * block_size + 1]
        text = gpt2_encoding().decode_bytes(tokens[tokens != END_OF_TEXT].tolist())
        name = {args.data.name if args.data else "the last tenth of input.txt": tokens}
        results = [r for stride in strides for r in zero_shot.perplexities(scorer, task, name, text, stride)]
        return hashlib.sha256(tokens.tobytes()).hexdigest(), results
    if task == "core":
        bundle = scorer.dist.from_main(lambda: core.find_bundle(args.core_dir, args.data_dir))
        return core.fingerprint(bundle), core.evaluate(scorer, bundle, args.limit)
    if task == "hellaswag":
        path = scorer.dist.from_main(hellaswag.find_file)
        numbers = hellaswag.evaluate(scorer, path, args.limit)
        found = [(name, metric, n) for name, n in numbers.items() for metric in ("acc", "acc_norm")]
        results = [Result(task, f"{name}, {m}", "accuracy", n[m]["correct"], n["n"]) for name, m, n in found]
        return sha256(path), results
    path = scorer.dist.from_main(lambda: zero_shot.find_file(task, args.data_dir))
    return sha256(path), zero_shot.evaluate(scorer, task, path, strides, args.limit)


def published(result: Result, size: int) -> float | None:
    """Return the figure of OpenAI's model of this size, counted from the smallest, that a result compares with."""
    if result.task == "core":
        return core.PUBLISHED[size]
    figures = zero_shot.PAPER.get(result.task.removesuffix("-raw").removesuffix("-original"), {})
    return None if result.metric == "ppl/byte" else figures.get(kind(result), [None] * 4)[size]


def kind(result: Result) -> str:
    return result.metric.split("/")[0]  # ppl, whatever it is counted by


def print_table(results: list[Result], size: int) -> None:
    """Print a task's results with the published figures, and which of several conventions comes nearest to one."""
    for result in results:
        line = f"  {result.convention:<39.39} {result.metric:13} {result.value:>9.4g}"
        if figure := published(result, size):
            same = [r for r in results if published(r, size) == figure and kind(r) == kind(result)]
            nearest = len(same) > 1 and min(same, key=lambda r: abs(r.value - figure)) is result
            line += f" {figure:>8.4g}{' *' if nearest else ''}"
        print(line)


def main(argv: list[str] | None = None) -> int:
    """Evaluate a model on all chosen tasks and print the results. Raise UserError."""
    with Distributed("evaluate.py") as dist:
        with dist.agree():
            args = Options(**parse_options(Options, argv, __doc__))
            tasks = choose_tasks(args.tasks)
            names = [args.model] if args.model else [*checkpoint.checkpoints(Path("log")).values()]
            if not names:
                raise UserError("no checkpoint in log/: train a model with python train_gpt2.py, or try --model gpt2")
        args = replace(args, model=str(names[-1]))
        scorer = args.open(dist)
        config = scorer.model.config
        if args.stride and args.stride > config.block_size:
            context = config.block_size
            raise UserError(f"--stride {args.stride}: must be at most the model's context, {context}", agreed=True)
        shapes = [(shape["n_layer"], shape["n_embd"]) for shape in SIZES.values()]
        shape = (config.n_layer, config.n_embd)
        size = shapes.index(shape) if shape in shapes else 0
        report = dict(model=args.model, dtype=args.dtype, limit=args.limit, tasks={})
        for task in tasks:
            sha, results = evaluate(scorer, task, args)
            numbers = [r._asdict() | dict(value=r.value, published=published(r, size)) for r in results]
            report["tasks"][task] = dict(sha256=sha, results=numbers)
            if dist.is_main:
                print(f"\n{f'{task}, sha256 {sha[:8]}…':66} {f'paper, {[*SIZES][size]}' * (task in PAPER)}")
                print_table(results, size)
        if args.json and dist.is_main:
            with write_atomically(args.json) as f:
                f.write((json.dumps(report, indent=2) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
