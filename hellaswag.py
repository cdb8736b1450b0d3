"""Evaluate a model on HellaSwag (Zellers et al., 2019): which of four endings does it find most likely?

    python hellaswag.py --model log/step_000550 --limit 1000

A record becomes text as in build-nanogpt (the context, a space, an ending) and as in EleutherAI's lm-eval (with the
activity before the context, without brackets). `acc` compares the sums of the endings' log-probabilities; `acc_norm`
divides them by the endings' lengths, in tokens (build-nanogpt; in the training log it is `hella`) or in characters.
"""

from errors import UserError, run_script
import hashlib
import json
import math
import re
import sys
import urllib.request
from collections import namedtuple
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
from runtime.options import option, output_file, parse_options
from tokens import gpt2_encoding

FILE = Path(__file__).resolve().parent / "hellaswag" / "hellaswag_val.jsonl"
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
N_RECORDS = 10042
# How many examples are right by each score, and how many are decided by less than 1e-5.
Result = namedtuple("Result", "acc acc_norm near_ties")


def find_file() -> Path:
    """Return the validation set's file, downloaded on first use and checked. Raise UserError."""
    if not FILE.exists():
        try:
            FILE.parent.mkdir(exist_ok=True)
            with urllib.request.urlopen(URL, timeout=30) as response:
                content = response.read()
            if hashlib.sha256(content).hexdigest() != SHA256:
                raise OSError(f"found {len(content):,} bytes that do not have the expected SHA-256 {SHA256}")
        except (OSError, HTTPException) as e:
            raise UserError(f"no {FILE}, and it could not be downloaded ({e}); put it there from {URL}", 4) from None
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


def read_examples(path: Path, render, limit: int | None = None) -> list[Example]:
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
            example = Example(*render(record), label)
            if not example.context or not all(example.endings):
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
    encode = gpt2_encoding().encode_ordinary
    endings = [encode(" " + ending) for ending in record["endings"]]
    return encode(record["ctx"]), endings, [len(tokens) for tokens in endings]


def render_lm_eval(record: dict) -> tuple[list[int], list[list[int]], list[float]]:
    """Return context, endings and their lengths in characters, as lm-evaluation-harness's task `hellaswag` does."""
    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    texts = [text.strip().replace(" [title]", ". ") for text in (context, *record["endings"])]  # WikiHow's marks
    context, *endings = [re.sub(r"\[.*?\]", "", text).replace("  ", " ") for text in texts]
    encode = gpt2_encoding().encode_ordinary
    prefix = encode(context.rstrip())  # a trailing space belongs to what follows
    both = [encode(f"{context} {ending}") for ending in endings]
    return prefix, [tokens[len(prefix) :] for tokens in both], [len(ending) for ending in endings]


@dataclass(frozen=True)
class Row:
    """A sequence of a context and endings, each of which attends to the context and to itself: it is computed once."""

    context: list[int]
    endings: dict[int, list[int]]  # by example · 4 + choice

    def __len__(self) -> int:
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings.values())  # the last predicts nothing


def make_rows(examples: list[Example], block_size: int) -> tuple[list[Row], int]:
    """Return rows, longest first, and how many contexts were cut on the left to fit into block_size."""
    rows, cut = [], 0
    for i, e in enumerate(examples):
        longest = max(map(len, e.endings))
        if longest > block_size:
            raise UserError(f"line {i + 1}: an ending of {longest} tokens, but the model's context is {block_size}")
        endings = dict(enumerate(e.endings, start=4 * i))
        if len(e.context) + longest - 1 <= block_size:
            rows.append(Row(e.context, endings))
        else:  # each ending with as much of the context as fits before it
            cut += 1
            rows += [Row(e.context[-(block_size - len(end) + 1) :], {owner: end}) for owner, end in endings.items()]
    return sorted(rows, key=len, reverse=True), cut


def score_batch(model: GPT, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each token of the endings its ending (example · 4 + choice) and its log-probability, both (n,)."""
    B, S = len(rows), len(rows[0])
    batch = torch.zeros(3, B, S, dtype=torch.int64)
    idx, pos, part = batch  # (B, S) each; part tells the endings apart, and is 0 for the context and padding
    source, target, owners = [], [], []  # where a scored token is predicted, which it is, whose it is
    for b, row in enumerate(rows):
        n = end = len(row.context)
        idx[b, :n] = torch.tensor(row.context)
        pos[b, :n] = torch.arange(n)
        for owner, ending in row.endings.items():
            start, end = end, end + len(ending) - 1
            idx[b, start:end] = torch.tensor(ending[:-1])
            pos[b, start:end] = torch.arange(n, n + end - start)
            part[b, start:end] = owner + 1
            source += [b * S + n - 1, *range(b * S + start, b * S + end)]
            target += ending
            owners += [owner] * len(ending)
    idx, pos, part = batch.to(model.transformer.wte.weight.device)
    earlier = torch.ones(S, S, dtype=torch.bool, device=idx.device).tril()
    mask = earlier & ((part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None]))  # (B, S, S)
    x = model.hidden(idx, pos=pos, mask=mask[:, None]).view(B * S, -1)[source]  # (scored tokens, C)
    # 512 tokens at a time: their logits are by far the largest thing here.
    chunks = zip(x.split(512), torch.tensor(target, device=idx.device).split(512), strict=True)
    losses = [F.cross_entropy(model.head(some_x), some_target, reduction="none") for some_x, some_target in chunks]
    return torch.tensor(owners), -torch.cat(losses).cpu().double()


@torch.inference_mode()
def score(
    model: GPT, examples: list[Example], batch_tokens: int, rank: int = 0, size: int = 1, progress: bool = False
) -> tuple[torch.Tensor, int]:
    """Return the endings' log-probabilities (n, 4), zeros for other ranks' part, and how many contexts were cut."""
    rows, cut = make_rows(examples, model.config.block_size)
    batches = []
    while rows:  # rows of similar length together, up to batch_tokens with padding
        n = max(1, batch_tokens // len(rows[0]))
        batches.append(rows[:n])
        rows = rows[n:]
    scores = torch.zeros(len(examples) * 4, dtype=torch.float64)
    for batch in tqdm(batches[rank::size], unit="batch", disable=not progress):  # neighbors take similar time
        scores.index_add_(0, *score_batch(model, batch))
    return scores.view(-1, 4).float(), cut


def compute_accuracy(scores: torch.Tensor, examples: list[Example]) -> Result:
    """Compare the most likely endings, by sum and by sum over length, with the right ones."""
    labels = torch.tensor([e.label for e in examples])
    both = torch.stack([scores, scores / torch.tensor([e.lengths for e in examples])])  # (2, n, 4)
    acc, acc_norm = (both.argmax(dim=-1) == labels).sum(dim=-1).tolist()
    best, second = both.topk(2).values.unbind(dim=-1)  # (2, n) each
    return Result(acc, acc_norm, near_ties=int((best - second < 1e-5).any(dim=0).sum()))


RENDERINGS = {"build-nanogpt": render_nanogpt, "lm-eval": render_lm_eval}
PUBLISHED = {  # acc and acc_norm, per cent
    "build-nanogpt": ("GPT-2 124M 28.59, XL 38.42", "GPT-2 124M 29.55, XL 48.93; GPT-3 124M 33.7"),
    "lm-eval": ("GPT-2 124M 28.92, XL 40.04", "GPT-2 124M 31.14, XL 50.89"),
}


@dataclass(frozen=True)
class Options:
    model: str = option("gpt2", "name on the hub, or directory", aliases=("-m", "--model_type"), metavar="MODEL")
    device: str = option("auto", "cpu, cuda, cuda:1, mps, or auto for the fastest", aliases=("-d",), metavar="DEVICE")
    data: Path | None = option(None, "HellaSwag file (default: download it once)", metavar="FILE")
    limit: int | None = option(None, "evaluate only the first N records (default: all)", low=1, metavar="N")
    batch_tokens: int | None = option(None, "tokens at once (default: 1,024; 65,536 on CUDA)", low=1, metavar="N")
    dtype: str = option("float32", "precision of the weights", choices=("float32", "bfloat16", "float16"))
    json: Path | None = option(None, "write the numbers to this file", type=output_file, metavar="FILE")


def main(argv: list[str] | None = None) -> int:
    """Evaluate a model in all four ways and print the results. Raise UserError."""
    args = Options(**parse_options(Options, argv, __doc__))
    device = torch.device(choose_device(args.device))
    tune_malloc()
    path = args.data or find_file()
    if not path.is_file():
        raise UserError(f"--data {path}: no such file")
    model = checkpoint.load_model("--model", args.model).eval().to(device, getattr(torch, args.dtype))
    torch.set_float32_matmul_precision("high")
    batch_tokens = args.batch_tokens or (65536 if device.type == "cuda" else 1024)
    numbers = dict(model=args.model, dtype=args.dtype)
    for name, render in RENDERINGS.items():
        examples = read_examples(path, render, args.limit)
        scores, cut = score(model, examples, batch_tokens, progress=True)
        if not scores.isfinite().all():
            raise UserError(f"--model {args.model}: its log-probabilities in {args.dtype} are not finite")
        n, result = len(examples), compute_accuracy(scores, examples)
        if n != N_RECORDS and not args.limit:
            print(f"{path}: {n:,} records, where the validation set has {N_RECORDS:,}")
        numbers[name] = dict(n=n, near_ties=result.near_ties, contexts_cut=cut)
        for metric, correct, published in zip(("acc", "acc_norm"), result[:2], PUBLISHED[name], strict=True):
            p = correct / n
            error = math.sqrt(p * (1 - p) / max(1, n - 1))
            numbers[name][metric] = dict(correct=correct, value=p, stderr=error)
            print(f"{name:14}{metric:9}{p:7.2%} ± {error:.2%}  ({correct:,}/{n:,})   published: {published}")
        print(f"{name:14}decided by less than 1e-5: {result.near_ties}; contexts cut on the left: {cut}")
    if args.json:
        with write_atomically(args.json) as f:
            f.write((json.dumps(numbers, indent=2) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
