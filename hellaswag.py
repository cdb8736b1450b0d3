"""Evaluate a model on HellaSwag (Zellers et al., 2019): which of four endings does it find most likely?

    python hellaswag.py --model log/step_000550 --limit 1000

A record becomes text as in build-nanogpt (the context, a space, an ending) and as in EleutherAI's lm-eval (with the
activity before the context, without brackets). `acc` compares the sums of the endings' log-probabilities; `acc_norm`
divides them by the endings' lengths, in tokens (build-nanogpt; in the training log it is `hella`) or in characters.
"""

from errors import UserError, run_script
import json
import math
import re
import sys
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.distributed import Distributed
from runtime.files import download, write_json
from runtime.options import option, output_file, parse_options
from scoring import Example, Scorer, Scores, ScoringOptions
from tokens import gpt2_tokenizer

FILE = Path(__file__).resolve().parent / "hellaswag" / "hellaswag_val.jsonl"
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
N_RECORDS = 10042
# How many examples are right by each score, and how many are decided by less than 1e-5.
Accuracy = namedtuple("Accuracy", "acc acc_norm near_ties")


def find_file() -> Path:
    """Return the validation set's file, downloaded on first use and checked. Raise UserError."""
    return download(URL, FILE, SHA256)


@dataclass(frozen=True)
class Question(Example):
    """A context and four endings."""

    lengths: list[float]  # acc_norm divides the endings' log-probabilities by these
    label: int  # number of the right ending


def read_examples(path: Path, render, limit: int | None = None) -> list[Question]:
    """Return the first `limit` records of a HellaSwag file, rendered. Raise UserError if one is not a record."""
    examples = []
    for line, text in enumerate(path.read_bytes().splitlines()[:limit], start=1):
        try:
            record = json.loads(text)
            endings, label = record["endings"], int(record["label"])
            if len(endings) != 4 or not all(isinstance(e, str) and e.strip() for e in endings):
                raise ValueError("expected four endings that are not empty")
            if label not in range(4):
                raise ValueError(f"expected a label from 0 to 3, found {label}")
            example = Question(*render(record), label)
            if not example.context or not all(example.continuations):
                raise ValueError("nothing is left of the context or an ending")
        except Exception as e:  # of many types, by what the record holds instead
            reason = f"lacks {e}" if isinstance(e, KeyError) else e
            raise UserError(f"{path}, line {line}: {reason}") from None
        examples.append(example)
    if not examples:
        raise UserError(f"{path}: holds no records")
    return examples


def render_nanogpt(record: dict) -> tuple[list[int], list[list[int]], list[float]]:
    """Return context, endings and their lengths in tokens, as karpathy/build-nanogpt does."""
    encode = gpt2_tokenizer().encoding.encode_ordinary
    endings = [encode(" " + ending) for ending in record["endings"]]
    return encode(record["ctx"]), endings, [len(tokens) for tokens in endings]


def render_lm_eval(record: dict) -> tuple[list[int], list[list[int]], list[float]]:
    """Return context, endings and their lengths in characters, as lm-evaluation-harness's task `hellaswag` does."""
    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    texts = [text.strip().replace(" [title]", ". ") for text in (context, *record["endings"])]  # WikiHow's marks
    context, *endings = [re.sub(r"\[.*?\]", "", text).replace("  ", " ") for text in texts]
    encode = gpt2_tokenizer().encoding.encode_ordinary
    prefix = encode(context.rstrip())  # a trailing space belongs to what follows
    both = [encode(f"{context} {ending}") for ending in endings]
    return prefix, [tokens[len(prefix) :] for tokens in both], [len(ending) for ending in endings]


def compute_accuracy(scores: Scores, examples: list[Question]) -> Accuracy:
    """Compare the most likely endings, by sum and by sum over length, with the right ones."""
    sums = scores.sums().view(-1, 4).float()  # (n, 4)
    labels = torch.tensor([e.label for e in examples])
    both = torch.stack([sums, sums / torch.tensor([e.lengths for e in examples])])  # (2, n, 4)
    acc, acc_norm = (both.argmax(dim=-1) == labels).sum(dim=-1).tolist()
    best, second = both.topk(2).values.unbind(dim=-1)  # (2, n) each
    return Accuracy(acc, acc_norm, near_ties=int((best - second < 1e-5).any(dim=0).sum()))


RENDERINGS = {"build-nanogpt": render_nanogpt, "lm-eval": render_lm_eval}
PUBLISHED = {  # acc and acc_norm, per cent
    "build-nanogpt": ("GPT-2 124M 28.59, XL 38.42", "GPT-2 124M 29.55, XL 48.93; GPT-3 124M 33.7"),
    "lm-eval": ("GPT-2 124M 28.92, XL 40.04", "GPT-2 124M 31.14, XL 50.89"),
}


def evaluate(scorer: Scorer, path: Path, limit: int | None = None) -> dict[str, dict]:
    """Return the numbers of both renderings, by name. Raise UserError."""
    numbers = {}
    for name, render in RENDERINGS.items():
        with scorer.dist.agree():
            examples = read_examples(path, render, limit)
        scores = scorer.score(examples, name=f"hellaswag, {name}")
        n, result = len(examples), compute_accuracy(scores, examples)
        numbers[name] = dict(n=n, near_ties=result.near_ties, contexts_cut=scores.n_cut)
        for metric, correct in ("acc", result.acc), ("acc_norm", result.acc_norm):
            p = correct / n
            numbers[name][metric] = dict(correct=correct, value=p, stderr=math.sqrt(p * (1 - p) / max(1, n - 1)))
    return numbers


@dataclass(frozen=True)
class Options(ScoringOptions):
    data: Path | None = option(None, "HellaSwag file (default: download it once)", metavar="FILE")
    limit: int | None = option(None, "evaluate only the first N records (default: all)", low=1, metavar="N")
    json: Path | None = option(None, "write the numbers to this file", type=output_file, metavar="FILE")


def main(argv: list[str] | None = None) -> int:
    """Evaluate a model in all four ways and print the results. Raise UserError."""
    args = Options(**parse_options(Options, argv, __doc__))
    with Distributed("hellaswag.py") as dist:
        path = args.data or dist.from_main(find_file)
        if not path.is_file():
            raise UserError(f"--data {path}: no such file", agreed=True)
        scorer = args.load_scorer(dist)
        scorer.check_vocabulary()
        numbers = evaluate(scorer, path, args.limit)
    if not dist.is_main:
        return 0
    for name, found in numbers.items():
        n = found["n"]
        if n != N_RECORDS and not args.limit:
            print(f"{path}: {n:,} records, where the validation set has {N_RECORDS:,}")
        for metric, published in zip(("acc", "acc_norm"), PUBLISHED[name], strict=True):
            p, right = found[metric], f"({found[metric]['correct']:,}/{n:,})"
            print(f"{name:14}{metric:9}{p['value']:7.2%} ± {p['stderr']:.2%}  {right}   published: {published}")
        cut = found["contexts_cut"]
        print(f"{name:14}decided by less than 1e-5: {found['near_ties']}; contexts cut on the left: {cut}")
    if args.json:
        write_json(args.json, dict(model=args.model, dtype=args.dtype) | numbers)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
