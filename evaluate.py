"""Evaluate a GPT-2: the perplexity of any text, the tasks of the GPT-2 paper, HellaSwag, CORE.

    python evaluate.py                                     newest checkpoint in log/, validation part of input.txt
    python evaluate.py --model gpt2 --data my.txt          perplexity of a text, .jsonl, .parquet, or shard directory
    python evaluate.py --model gpt2 --tasks paper          the tasks of the paper, with its figures
    python evaluate.py --model gpt2-xl --tasks hellaswag core --dtype bfloat16
    torchrun --standalone --nproc_per_node=8 evaluate.py --tasks all

docs/evaluation.md says what each number is, and what it can be compared with.
"""

from errors import UserError, run_script
import hashlib
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
from runtime.files import write_json
from runtime.options import option, output_file, parse_options
from runtime.shards import check_ids, find_parts, shard_paths
from scoring import Result, Scorer, ScoringOptions
from tokens import Tokenizer, sha256

ROOT = Path(__file__).resolve().parent
TASKS = ["text", *zero_shot.SOURCES, "hellaswag", "core"]
GROUPS = {task: [task] for task in TASKS} | dict(paper=[*zero_shot.SOURCES], all=TASKS[1:])


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


def find_data(task: str, args: Options) -> tuple[Path, str]:
    """Return where the data of a task are, downloaded if needed, and a SHA-256 of them. Raise UserError."""
    if task == "text":
        path = args.data or ROOT / "input.txt"
        if not (path.is_dir() or (path.is_file() and find_reader(path))):
            raise UserError(f"--data {path}: no such file, or neither .txt nor .jsonl nor .parquet")
    elif task == "core":
        path = args.core_dir or core.find_bundle(args.data_dir)
    else:
        path = hellaswag.find_file() if task == "hellaswag" else zero_shot.find_file(task, args.data_dir)
    files = [path]
    if path.is_dir() and task == "text":
        files = shard_paths(find_parts(path)[0], "val")
    elif path.is_dir():
        files = sorted(filter(Path.is_file, path.rglob("*")))
    hashes = [sha256(file) for file in files]
    return path, hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def read_tokens(path: Path, only_val: bool, tokenizer: Tokenizer) -> np.ndarray:
    """Return the tokens of a text, of documents, or of validation data, (n,) of uint16, after <|endoftext|>."""
    parts = [np.array([tokenizer.end_of_text], dtype=np.uint16)]
    if only_val or path.is_dir():
        for name, tokens in open_data(path, tokenizer).val:
            check_ids(name, 0, tokens, tokenizer.vocab_size)
            parts.append(tokens)
    else:
        texts = check_texts(find_reader(path)(path, "text"), "text", str(path))
        parts += [tokenizer.encode_document(text) for text in texts]
    tokens = np.concatenate(parts)
    has_its_own = len(tokens) > 1 and tokens[1] == tokenizer.end_of_text
    return tokens[1:] if has_its_own else tokens


def evaluate_text(scorer: Scorer, path: Path, args: Options, strides: list[int]) -> list[Result]:
    """Return the perplexities of a text, which is one stream of tokens. Raise UserError."""
    with scorer.dist.agree():
        tokenizer, end_of_text = scorer.tokenizer, scorer.tokenizer.end_of_text
        tokens = read_tokens(path, args.data is None, tokenizer)
        if args.limit:
            tokens = tokens[: args.limit * scorer.model.config.block_size + 1]
        documents = np.split(tokens, np.flatnonzero(tokens == end_of_text))  # joined, they would share a word
        originals = [tokenizer.encoding.decode_bytes(ids[ids != end_of_text].tolist()) for ids in documents]
        if not any(text.split() for text in originals):
            raise UserError(f"--data {path}: holds no text")
    name = args.data.name if args.data else "the last tenth of input.txt"
    return zero_shot.perplexities(scorer, "text", {name: tokens}, originals, strides)


def evaluate(scorer: Scorer, task: str, path: Path, args: Options) -> list[Result]:
    """Return the results of a task. Raise UserError."""
    strides = [scorer.model.config.block_size, *([args.stride] if args.stride else [])]
    if task == "text":
        return evaluate_text(scorer, path, args, strides)
    if task == "core":
        return core.evaluate(scorer, path, args.limit)
    if task == "hellaswag":
        numbers = hellaswag.evaluate(scorer, path, args.limit)
        found = [(name, metric, n) for name, n in numbers.items() for metric in ("acc", "acc_norm")]
        return [Result(task, f"{name}, {m}", "accuracy", n[m]["correct"], n["n"]) for name, m, n in found]
    return zero_shot.evaluate(scorer, task, path, strides, args.limit)


def published(result: Result, size: int) -> float | None:
    """Return the figure of OpenAI's model of this size, counted from the smallest, that a result compares with."""
    if result.task == "core":
        return core.PUBLISHED[size]
    figures = zero_shot.PAPER.get(result.task.removesuffix("-raw").removesuffix("-original"), {})
    kind = result.metric.split("/")[0]  # ppl, whether per token or per word
    return figures[kind][size] if kind in figures and result.metric != "ppl/byte" else None


def print_table(results: list[Result], size: int) -> None:
    """Print a task's results with the published figures, and which of several conventions comes nearest to one."""
    width = max(len(r.convention) for r in results)
    for result in results:
        line = f"  {result.convention:{width}} {result.metric:13} {result.value:>9.4g}"
        if figure := published(result, size):
            same = [r for r in results if published(r, size) == figure]
            nearest = len(same) > 1 and min(same, key=lambda r: abs(r.value - figure)) is result
            line += f"{figure:>9.4g}{' *' if nearest else ''}"
        print(line)


def main(argv: list[str] | None = None) -> int:
    """Evaluate a model on all chosen tasks and print the results. Raise UserError."""
    with Distributed("evaluate.py") as dist:
        with dist.agree():
            args = Options(**parse_options(Options, argv, __doc__))
            if unknown := [name for name in args.tasks if name not in GROUPS]:
                raise UserError(f"--tasks {unknown[0]}: no such task; there are {', '.join(GROUPS)}")
        tasks = [task for task in TASKS if any(task in GROUPS[name] for name in args.tasks)]
        args = replace(args, model=args.model or dist.from_main(checkpoint.newest_model))
        data = dist.from_main(lambda: {task: find_data(task, args) for task in tasks})
        scorer = args.load_scorer(dist)
        config = scorer.model.config
        if tasks != ["text"]:
            scorer.check_vocabulary()
        if args.stride and args.stride > config.block_size:
            raise UserError(
                f"--stride {args.stride}: is more than the model's context, {config.block_size}", agreed=True
            )
        shapes = [(shape["n_layer"], shape["n_embd"]) for shape in SIZES.values()]
        shape = (config.n_layer, config.n_embd)
        size = shapes.index(shape) if shape in shapes else 0  # any other is compared with the smallest
        size_name = [*SIZES][size]
        report = dict(model=args.model, dtype=args.dtype, limit=args.limit, published=size_name, tasks={})
        for task, (path, sha) in data.items():
            results = evaluate(scorer, task, path, args)
            numbers = [r._asdict() | dict(value=r.value, published=published(r, size)) for r in results]
            report["tasks"][task] = dict(sha256=sha, results=numbers)
            if dist.is_main:
                note = f"; published for {size_name}" if any(published(r, size) for r in results) else ""
                print(f"\n{task}, sha256 {sha[:8]}…{note}")
                print_table(results, size)
            if args.json:  # after each task, so that an error in the next one loses nothing
                dist.from_main(lambda: write_json(args.json, report))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
