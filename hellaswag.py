"""Evaluate a model on HellaSwag (Zellers et al., 2019): which of four endings does it find most likely?

    python hellaswag.py --model gpt2
    python hellaswag.py --model log/step_000550 --limit 1000

There are two common ways to render a record as text, and two scores for each:

    build-nanogpt    the context, a space, an ending. `acc` compares the sums of the endings' log-probabilities,
                     `acc_norm` their means over tokens. The training log has this acc_norm as `hella`. GPT-2 124M:
                     29.55%.
    lm-eval          EleutherAI's lm-evaluation-harness: the activity before the context, without brackets. `acc`
                     compares the sums, `acc_norm` the sums divided by the endings' lengths in characters. GPT-2 124M:
                     31.14%.
"""

from errors import UserError, run_script

import hashlib
import json
import math
import re
import sys
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

from model import GPT
from runtime import checkpoint
from runtime.device import choose_device, tune_malloc
from runtime.files import write_atomically
from runtime.options import input_file, option, output_file, parse_options
from tokens import gpt2_encoding

FILE = Path(__file__).resolve().parent / "hellaswag" / "hellaswag_val.jsonl"
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
N_RECORDS = 10042


# --------------------------------------------------------------------------------------------------------------------
# Data


def find_file() -> Path:
    """Return the validation set's file, downloaded on first use and checked. Raise UserError."""
    if not FILE.exists():
        try:
            FILE.parent.mkdir(exist_ok=True)
            with urllib.request.urlopen(URL, timeout=30) as response:
                content = response.read()
        except (OSError, HTTPException) as e:
            raise UserError(f"no {FILE}, and it could not be downloaded ({e}); put it there from {URL}", 4) from None
        found = hashlib.sha256(content).hexdigest()
        if found != SHA256:
            raise UserError(f"{URL}: expected SHA-256 {SHA256}, found {found}; try again later", 4)
        with write_atomically(FILE) as f:
            f.write(content)
    return FILE


@dataclass(frozen=True)
class Example:
    """A context and four endings."""

    context: list[int]  # token ids
    endings: list[list[int]]  # token ids
    lengths: list[float]  # acc_norm divides the endings' log-probabilities by these
    label: int  # number of the right ending
    line: int  # in the file, from 1


def read_examples(path: Path, render, limit: int | None = None) -> list[Example]:
    """Return the first `limit` records of a HellaSwag file, rendered. Raise UserError if one is not a record."""
    examples = []
    with open(path, "rb") as f:
        for line, text in enumerate(f, start=1):
            if len(examples) == limit:
                break
            try:
                record = json.loads(text)
                endings, label = record["endings"], int(record["label"])
                if len(endings) != 4 or not all(isinstance(e, str) and e.strip() for e in endings):
                    raise ValueError("expected four endings that are not empty")
                if label not in range(4):
                    raise ValueError(f"expected a label from 0 to 3, found {label}")
                context, endings, lengths = render(record)
                if not context or not all(endings):
                    raise ValueError("nothing is left of the context or an ending")
            except Exception as e:  # of many types, by what the record holds instead
                reason = f"lacks {e}" if isinstance(e, KeyError) else e
                raise UserError(f"{path}, line {line}: {reason}") from None
            examples.append(Example(context, endings, lengths, label, line))
    if not examples:
        raise UserError(f"{path}: holds no records")
    return examples


def render_nanogpt(record: dict) -> tuple[list[int], list[list[int]], list[float]]:
    """Return context, endings and their lengths in tokens, as karpathy/build-nanogpt does."""
    encode = gpt2_encoding().encode_ordinary
    endings = [encode(" " + ending) for ending in record["endings"]]
    return encode(record["ctx"]), endings, [len(tokens) for tokens in endings]


def render_lm_eval(record: dict) -> tuple[list[int], list[list[int]], list[float]]:
    """Return context, endings and their lengths in characters, as lm-evaluation-harness's task `hellaswag` does."""

    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")  # WikiHow's marks
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    encode = gpt2_encoding().encode_ordinary
    context = clean(f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}")
    endings = [clean(ending) for ending in record["endings"]]
    prefix = encode(context.rstrip())  # a trailing space belongs to what follows
    both = [encode(f"{context} {ending}") for ending in endings]
    return prefix, [tokens[len(prefix) :] for tokens in both], [len(ending) for ending in endings]


# --------------------------------------------------------------------------------------------------------------------
# Scoring


@dataclass(frozen=True)
class Row:
    """A context and some of an example's endings, in one sequence.

    An ending attends to the context and to itself, so that the context is computed once. The last token of an ending
    predicts nothing and is left out.
    """

    example: int
    choices: list[int]
    context: list[int]
    endings: list[list[int]]

    def __len__(self) -> int:
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


def make_rows(examples: list[Example], block_size: int) -> tuple[list[Row], int]:
    """Return rows, longest first, and how many contexts were cut on the left to fit into block_size."""
    rows, cut = [], 0
    for i, e in enumerate(examples):
        longest = max(map(len, e.endings))
        if longest > block_size:
            raise UserError(f"line {e.line}: an ending of {longest} tokens, but the model's context is {block_size}")
        if len(e.context) + longest - 1 <= block_size:
            rows.append(Row(i, [0, 1, 2, 3], e.context, e.endings))
        else:  # each ending with as much of the context as fits before it
            cut += 1
            for choice, ending in enumerate(e.endings):
                rows.append(Row(i, [choice], e.context[-(block_size - len(ending) + 1) :], [ending]))
    return sorted(rows, key=len, reverse=True), cut


def score_batch(model: GPT, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each token of the endings its ending (example · 4 + choice) and its log-probability, both (n,)."""
    B, S = len(rows), len(rows[0])
    idx = torch.zeros(B, S, dtype=torch.int64)
    pos = torch.zeros(B, S, dtype=torch.int64)
    part = torch.zeros(B, S, dtype=torch.int64)  # 0 for the context and padding, then 1, 2 … by ending
    source, target, owner = [], [], []  # where a scored token is predicted, which it is, whose it is
    for b, row in enumerate(rows):
        n = end = len(row.context)
        idx[b, :n] = torch.tensor(row.context)
        pos[b, :n] = torch.arange(n)
        for k, ending in enumerate(row.endings, start=1):
            start, end = end, end + len(ending) - 1
            idx[b, start:end] = torch.tensor(ending[:-1])
            pos[b, start:end] = torch.arange(n, n + end - start)
            part[b, start:end] = k
            source += [b * S + n - 1, *range(b * S + start, b * S + end)]
            target += ending
            owner += [row.example * 4 + row.choices[k - 1]] * len(ending)
    device = model.transformer.wte.weight.device
    idx, pos, part, target = idx.to(device), pos.to(device), part.to(device), torch.tensor(target, device=device)
    earlier = torch.ones(S, S, dtype=torch.bool, device=device).tril()
    mask = earlier & ((part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None]))  # (B, S, S)
    x = model.hidden(idx, pos=pos, mask=mask[:, None]).view(B * S, -1)[source]  # (scored tokens, C)
    losses = [  # 512 tokens at a time: their logits are by far the largest thing here
        F.cross_entropy(model.head(some_x), some_target, reduction="none")
        for some_x, some_target in zip(x.split(512), target.split(512), strict=True)
    ]
    return torch.tensor(owner), -torch.cat(losses).cpu()


@torch.inference_mode()
def score(
    model: GPT, examples: list[Example], batch_tokens: int, rank: int = 0, size: int = 1, progress: bool = False
) -> tuple[torch.Tensor, int]:
    """Return the log-probabilities of the endings (n, 4), float32, and how many contexts were cut on the left.

    Of several ranks, each computes a part and leaves zeros elsewhere. Raise UserError if an ending does not fit.
    """
    rows, cut = make_rows(examples, model.config.block_size)
    batches = []
    while rows:  # rows of similar length together, up to batch_tokens with padding
        n = max(1, batch_tokens // len(rows[0]))
        batches.append(rows[:n])
        rows = rows[n:]
    scores = torch.zeros(len(examples) * 4, dtype=torch.float64)
    for batch in tqdm(batches[rank::size], unit="batch", disable=not progress):  # neighbors take similar time
        owner, log_probabilities = score_batch(model, batch)
        scores.index_add_(0, owner, log_probabilities.double())
    return scores.view(-1, 4).float(), cut


@dataclass(frozen=True)
class Result:
    """How many of n examples are right by each score, and how many are decided by less than 1e-5."""

    n: int
    acc: int
    acc_norm: int
    near_ties: int
    predictions: list[tuple[int, int]]


def compute_accuracy(scores: torch.Tensor, examples: list[Example]) -> Result:
    """Compare the most likely endings, by sum and by sum over length, with the right ones."""
    label = torch.tensor([e.label for e in examples])
    by_score = scores, scores / torch.tensor([e.lengths for e in examples])
    choice, choice_norm = (s.argmax(dim=1) for s in by_score)
    best, second = torch.stack(by_score).topk(2).values.unbind(dim=-1)  # (2, n) each
    return Result(
        n=len(examples),
        acc=int((choice == label).sum()),
        acc_norm=int((choice_norm == label).sum()),
        near_ties=int((best - second < 1e-5).any(dim=0).sum()),
        predictions=list(zip(choice.tolist(), choice_norm.tolist(), strict=True)),
    )


# --------------------------------------------------------------------------------------------------------------------
# The script

RENDERINGS = {"build-nanogpt": render_nanogpt, "lm-eval": render_lm_eval}
PUBLISHED = {  # per cent
    ("build-nanogpt", "acc"): "GPT-2 124M 28.59, XL 38.42",
    ("build-nanogpt", "acc_norm"): "GPT-2 124M 29.55, XL 48.93; GPT-3 124M 33.7",
    ("lm-eval", "acc"): "GPT-2 124M 28.92, XL 40.04",
    ("lm-eval", "acc_norm"): "GPT-2 124M 31.14, XL 50.89",
}


@dataclass(frozen=True)
class Options:
    model: str = option("gpt2", "name on the hub, or directory", aliases=("-m", "--model_type"), metavar="MODEL")
    device: str = option("auto", "cpu, cuda, cuda:1, mps, or auto for the fastest", aliases=("-d",), metavar="DEVICE")
    data: Path | None = option(None, "HellaSwag file (default: download it once)", type=input_file, metavar="FILE")
    limit: int | None = option(None, "evaluate only the first N records (default: all)", low=1, metavar="N")
    batch_tokens: int | None = option(
        None, "tokens computed at once (default: 1,024; 65,536 on CUDA)", low=1, high=2**24, metavar="N"
    )
    dtype: str = option("float32", "precision of the weights", choices=("float32", "bfloat16", "float16"))
    json: Path | None = option(None, "write the numbers to this file", type=output_file, metavar="FILE")
    save_predictions: Path | None = option(None, "write the choices, as CSV", type=output_file, metavar="FILE")


def main(argv: list[str] | None = None) -> int:
    """Evaluate a model in all four ways and print the results. Raise UserError."""
    args = Options(**parse_options(Options, argv, __doc__))
    device = torch.device(choose_device(args.device))
    tune_malloc()
    path = args.data or find_file()
    model = checkpoint.load_model("--model", args.model).eval().to(device)
    torch.set_float32_matmul_precision("high")
    model.to(getattr(torch, args.dtype))
    batch_tokens = args.batch_tokens or (65536 if device.type == "cuda" else 1024)
    numbers, columns = {}, {}
    for name, render in RENDERINGS.items():
        examples = read_examples(path, render, args.limit)
        scores, cut = score(model, examples, batch_tokens, progress=True)
        if not scores.isfinite().all():
            raise UserError(f"--model {args.model}: its log-probabilities in {args.dtype} are not finite")
        result = compute_accuracy(scores, examples)
        columns[name] = result.predictions
        numbers[name] = dict(n=result.n, near_ties=result.near_ties, contexts_cut=cut)
        if result.n != N_RECORDS and not args.limit:
            print(f"{path}: {result.n:,} records, where the validation set has {N_RECORDS:,}")
        for metric in "acc", "acc_norm":
            correct = getattr(result, metric)
            p = correct / result.n
            error = math.sqrt(p * (1 - p) / max(1, result.n - 1))
            numbers[name][metric] = dict(correct=correct, value=p, stderr=error)
            known = PUBLISHED[name, metric]
            print(f"{name:14}{metric:9}{p:7.2%} ± {error:.2%}  ({correct:,}/{result.n:,})   published: {known}")
        print(f"{name:14}decided by less than 1e-5: {result.near_ties}; contexts cut on the left: {cut}")
    if args.json:
        text = json.dumps(dict(model=args.model, dtype=args.dtype, **numbers), indent=2) + "\n"
        with write_atomically(args.json) as f:
            f.write(text.encode())
    if args.save_predictions:
        header = "record,label," + ",".join(f"{name} {metric}" for name in columns for metric in ("acc", "acc_norm"))
        rows = zip(examples, *columns.values(), strict=True)
        lines = [f"{e.line},{e.label}," + ",".join(f"{a},{b}" for a, b in choices) for e, *choices in rows]
        with write_atomically(args.save_predictions) as f:
            f.write("".join(line + "\n" for line in [header, *lines]).encode())
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
