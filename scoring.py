"""Log-probabilities of continuations after their contexts, many sequences at a time, on all ranks of a run together."""

from errors import UserError
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from data import to_device
from model import GPT
from runtime import checkpoint
from runtime.device import choose_device, oom_as_user_error, sdpa_without_cudnn, tune_malloc
from runtime.distributed import Distributed
from runtime.options import option
from tokens import Tokenizer, gpt2_tokenizer


@dataclass(frozen=True)
class Example:
    """A context, and one or several continuations of it to score."""

    context: Sequence[int]  # token ids, at least one
    continuations: list[Sequence[int]]  # token ids


@dataclass(frozen=True)
class Scores:
    """The scores of n continuations with N tokens in total, in the order of the examples."""

    logprobs: Tensor  # (N,) of float32: each token's log-probability, in nats
    is_greedy: Tensor  # (N,): whether it is the most likely token
    is_allowed_greedy: Tensor  # (N,): whether it is the most likely token of those that are not excluded
    lengths: Tensor  # (n,): tokens of each continuation
    n_cut: int  # contexts that were cut on the left

    def sums(self) -> Tensor:
        """Return the log-probability of each continuation, (n,) of float64."""
        return torch.segment_reduce(self.logprobs.double(), "sum", lengths=self.lengths)

    def all_greedy(self, allowed: bool = False) -> Tensor:
        """Return whether greedy decoding, of all ids or the allowed ones, gives the continuation, for each, (n,)."""
        greedy = self.is_allowed_greedy if allowed else self.is_greedy
        return torch.segment_reduce(greedy.float(), "min", lengths=self.lengths) > 0  # 1 only if all are


@dataclass(frozen=True)
class Row:
    """A sequence of a context and continuations, each of which attends to the context and to itself: the context is
    computed once."""

    context: Sequence[int]
    continuations: dict[int, Sequence[int]]  # by the index of their first token in Scores

    def __len__(self) -> int:
        return len(self.context) + sum(len(c) - 1 for c in self.continuations.values())  # the last predicts nothing


def make_rows(examples: list[Example], max_tokens: int) -> tuple[list[Row], int]:
    """Return rows, longest first, and how many contexts were cut on the left, so that no context and continuation
    together have more than max_tokens. Raise UserError if a continuation is too long."""
    rows, n_cut, first = [], 0, 0
    for i, e in enumerate(examples, start=1):
        longest = max(map(len, e.continuations))
        if longest >= max_tokens:
            raise UserError(f"record {i:,}: {longest} tokens to score do not fit into the model's context", agreed=True)
        continuations = {}
        for c in e.continuations:
            continuations[first] = c
            first += len(c)
        if len(e.context) + longest <= max_tokens:
            rows.append(Row(e.context, continuations))
        else:  # each continuation with as much of the context as fits before it
            n_cut += 1
            rows += [Row(e.context[-(max_tokens - len(c)) :], {index: c}) for index, c in continuations.items()]
    return sorted(rows, key=len, reverse=True), n_cut


@dataclass
class Scorer:
    """A model that scores examples."""

    model: GPT
    batch_tokens: int  # at once, with padding
    dist: Distributed
    tokenizer: Tokenizer = field(default_factory=gpt2_tokenizer)

    def check_vocabulary(self) -> None:
        """Raise UserError if the model's tokens are not GPT-2's, in which the tasks are encoded."""
        if self.tokenizer != gpt2_tokenizer():
            raise UserError("the model has a vocabulary of its own: evaluate.py can score --tasks text", agreed=True)

    @property
    def device(self) -> torch.device:
        return self.model.transformer.wte.weight.device

    @torch.inference_mode()
    @sdpa_without_cudnn()
    def score(
        self, examples: list[Example], max_tokens: int | None = None, excluded: list[int] | None = None, name: str = ""
    ) -> Scores:
        """Score the examples' continuations, with a progress bar if these have a name.

        A context and a continuation have at most max_tokens, by default as many as the model can take. The excluded ids
        cannot be the most likely. Raise UserError if a continuation is too long, memory too small, or a result not
        finite.
        """
        rows, n_cut = make_rows(examples, max_tokens or self.model.config.block_size + 1)  # the last is only a target
        excluded = torch.tensor(excluded or [], dtype=torch.int64, device=self.device)
        batches = []
        while rows:  # rows of similar length together
            n = max(1, self.batch_tokens // len(rows[0]))
            batches.append(rows[:n])
            rows = rows[n:]
        lengths = torch.tensor([len(c) for e in examples for c in e.continuations])
        scores = torch.zeros(3, int(lengths.sum()), device=self.device)
        mine = batches[self.dist.rank :: self.dist.size]  # neighbors take similar time
        with oom_as_user_error(f"a batch of {self.batch_tokens:,} tokens", "a smaller --batch_tokens"):
            for batch in tqdm(mine, name, unit="batch", disable=not (name and self.dist.is_main), leave=False):
                indices, found = self.score_batch(batch, excluded)
                scores[:, indices] = found
        scores = self.dist.all_reduce(scores).cpu()
        if not scores.isfinite().all():
            dtype = str(self.model.transformer.wte.weight.dtype).removeprefix("torch.")
            raise UserError(f"the model's log-probabilities in {dtype} are not finite", 3, agreed=True)
        return Scores(scores[0], scores[1] > 0, scores[2] > 0, lengths, n_cut)

    def score_batch(self, rows: list[Row], excluded: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices (n,) in Scores of the tokens of these rows' continuations, and what Scores holds of them:
        log-probability, whether it is the most likely token, and whether of the allowed ones, (3, n). On a GPU, nothing
        here waits for the device."""
        B, S = len(rows), len(rows[0])
        batch = np.zeros((3, B, S), dtype=np.int64)
        idx, pos, part = batch  # (B, S) each; part tells the continuations apart, and is 0 for the context and padding
        source, target, indices = [], [], []  # where a scored token is predicted, which it is, its index in Scores
        for b, row in enumerate(rows):
            n = start = len(row.context)
            idx[b, :n] = row.context
            pos[b, :n] = np.arange(n)
            for i, (first, tokens) in enumerate(row.continuations.items(), start=1):
                end = start + len(tokens) - 1  # the last token is only a target
                idx[b, start:end] = tokens[:-1]
                pos[b, start:end] = np.arange(n, n + len(tokens) - 1)  # each continuation follows the context
                part[b, start:end] = i
                # The context's last token predicts the first token, each token the next one.
                source += [[b * S + n - 1], np.arange(b * S + start, b * S + end)]
                target.append(tokens)
                indices.append(np.arange(first, first + len(tokens)))
                start = end
        idx, pos, part = to_device(torch.from_numpy(batch), self.device)
        scored = np.stack([np.concatenate(ids).astype(np.int64) for ids in (source, target, indices)])
        source, target, indices = to_device(torch.from_numpy(scored), self.device)  # (scored tokens,) each
        mask = None  # causal
        if any(len(row.continuations) > 1 for row in rows):
            causal = torch.ones(S, S, dtype=torch.bool, device=idx.device).tril()  # hides padding, at the end, too
            mask = causal & ((part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None]))  # (B, S, S)
            mask = mask[:, None]  # (B, 1, S, S): for all heads
        x = self.model.hidden(idx, pos=pos, mask=mask).view(B * S, -1)[source]  # (scored tokens, C)
        found = []
        # Some tokens at a time: their logits are by far the largest thing here.
        piece = 8192 if self.device.type == "cuda" else 512
        for some_x, some_target in zip(x.split(piece), target.split(piece), strict=True):
            logits = self.model.head(some_x)  # (piece, V)
            loss = F.cross_entropy(logits, some_target, reduction="none")
            greedy = allowed_greedy = is_argmax(logits, some_target)
            if len(excluded):
                logits[:, excluded] = -torch.inf
                allowed_greedy = is_argmax(logits, some_target)
            found.append(torch.stack((-loss, greedy, allowed_greedy)))  # (3, piece)
        return indices, torch.cat(found, dim=1)

    def score_documents(self, documents: list[np.ndarray], stride: int, name: str = "") -> tuple[float, int]:
        """Return the nats of all tokens of the documents but the first of each, and how many these are."""
        block_size = self.model.config.block_size
        scores = self.score([w for tokens in documents for w in windows(tokens, block_size, stride)], name=name)
        return -scores.logprobs.double().sum().item(), len(scores.logprobs)


def is_argmax(logits: Tensor, target: Tensor) -> Tensor:
    """Return whether argmax of logits (n, V) is the target (n,). On a CPU, amax is five times as fast as argmax."""
    if logits.device.type != "cpu":
        return logits.argmax(dim=-1) == target
    is_max = logits.gather(1, target[:, None])[:, 0] == logits.amax(dim=-1)  # (n,)
    rows = is_max.nonzero()[:, 0]  # of several equal logits, argmax takes one
    is_max[rows] = logits[rows].argmax(dim=-1) == target[rows]
    return is_max


def windows(tokens: np.ndarray, block_size: int, stride: int) -> list[Example]:
    """Return windows of at most block_size inputs that score each token but the first once: all tokens of the first
    window, then `stride` at the end of each. With stride = block_size only the last overlaps the one before."""
    examples, start = [], 1
    while start < len(tokens):
        end = min(len(tokens), start + (block_size if start == 1 else stride))
        begin = max(0, end - 1 - block_size)  # the last token is only a target
        examples.append(Example(tokens[begin:start], [tokens[start:end]]))
        start = end
    return examples


def split_common_prefix(sequences: list[np.ndarray]) -> Example:
    """Return sequences as continuations of their longest common prefix that leaves a token of each."""
    common = len(os.path.commonprefix([s.tolist() for s in sequences]))  # of any sequences, not only paths
    n = min(common, min(map(len, sequences)) - 1)
    return Example(sequences[0][:n], [s[n:] for s in sequences])


class Result(NamedTuple):
    """A number of an evaluation, from a total (of right answers or nats, say) and a count."""

    task: str
    convention: str
    metric: str  # accuracy; nats/token; ppl/token, ppl/word, ppl/word+line, ppl/byte: perplexities; bits/byte; centered
    total: float
    n: int

    @property
    def value(self) -> float:
        mean = self.total / self.n
        if self.metric.startswith("ppl"):
            return math.exp(min(mean, 700.0))  # exp(710) is not finite
        return mean / math.log(2) if self.metric == "bits/byte" else mean


@dataclass(frozen=True)
class ScoringOptions:
    """The options of a script that scores."""

    model: str = option("gpt2", "name on the hub, or directory", aliases=("-m", "--model_type"), metavar="MODEL")
    device: str = option("auto", "such as cpu or cuda:1, or auto for the fastest", aliases=("-d",), metavar="DEVICE")
    dtype: str = option("float32", "precision of the weights", choices=("float32", "bfloat16", "float16"))
    batch_tokens: int | None = option(None, "tokens at once (default: 1,024; 65,536 on CUDA)", low=1, metavar="N")

    def load_scorer(self, dist: Distributed) -> Scorer:
        """Load the model that the options name. Raise UserError."""
        with dist.agree():
            dist.set_device(choose_device(self.device))
            model, tokenizer = checkpoint.load_model("--model", self.model)
        tune_malloc()
        torch.set_float32_matmul_precision("highest")  # no TF32: the numbers are compared with those of others
        batch_tokens = self.batch_tokens or (65536 if dist.device.type == "cuda" else 1024)
        return Scorer(model.eval().to(dist.device, getattr(torch, self.dtype)), batch_tokens, dist, tokenizer)
