"""Training data: the tokens of a data set, and batches that are a pure function of the step."""

from errors import UserError
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path

import numpy as np
import torch

from runtime.shards import ShardError, check_ids, check_manifest, find_parts, open_shard, shard_paths
from tokens import VOCAB_SIZE, Tokenizer, gpt2_tokenizer, sha256

Files = list[tuple[str, np.ndarray]]  # names, and token ids (n,) of uint16


@dataclass(frozen=True)
class Data:
    """Training and validation tokens, their tokenizer, and a fingerprint, which differs for other tokens: the lengths
    of shards and the manifest's hash, or the text's hash."""

    train: Files
    val: Files
    is_text: bool
    tokenizer: Tokenizer
    fingerprint: dict[str, int | str]

    @property
    def n_tokens(self) -> int:
        """Return the number of training tokens."""
        return sum(len(tokens) for _, tokens in self.train)


def open_data(path: Path, tokenizer: Tokenizer | None = None) -> Data:
    """Open shards, which must be of this tokenizer if there is one, or a text, which it encodes (default: GPT-2's) and
    whose last tenth is for validation. Raise UserError."""
    try:
        if path.is_dir():
            return open_shards(path, tokenizer)
        content = path.read_bytes()
        text = content.decode("utf-8")
        cut = len(text) * 9 // 10
        tokenizer = tokenizer or gpt2_tokenizer()
        train, val = tokenizer.encode(text[:cut]), tokenizer.encode(text[cut:])
    except FileNotFoundError as e:
        raise UserError(f"--data {e.filename}: no such file or directory") from None
    except UnicodeDecodeError as e:
        raise UserError(f"--data {path}: not UTF-8 text (byte {e.start:,}); token shards go into a directory") from None
    except (OSError, ValueError, ShardError) as e:
        raise UserError(f"--data {path}: {e}") from None
    fingerprint = {"text": hashlib.sha256(content).hexdigest()}
    train, val = [(path.name, train)], [(f"the last tenth of {path.name}", val)]
    return Data(train, val, is_text=True, tokenizer=tokenizer, fingerprint=fingerprint)


def open_shards(path: Path, tokenizer: Tokenizer | None) -> Data:
    """Open a directory of shards, or of parts, one after the other. Raise OSError, ValueError or ShardError."""
    train, val, fingerprint, parts = [], [], {}, find_parts(path)
    origin = None  # of the first part
    for i, part in enumerate(parts, start=1):
        name = "" if part == path else f"{part.name}/"
        own = Tokenizer.load(part) if (part / "merges.txt").exists() else gpt2_tokenizer()
        tokenizer = tokenizer or own
        if own != tokenizer:
            raise ValueError(f"{name or path} has another vocabulary than the model, --vocab_size, or the first part")
        counts = {}
        splits = dict(train=train, val=val) if i == 1 else dict(train=train)  # the first part has the validation shard
        for split, files in splits.items():
            for p in shard_paths(part, split):
                files.append((name + p.name, open_shard(p, own.vocab_size)))
                fingerprint[name + p.name] = counts[p.name] = len(files[-1][1])
        if name or (part / "manifest.json").exists():
            manifest = check_manifest(part, counts)
            ours = [manifest.get(key) for key in ("source", "text_column")]
            origin = origin or ours
            if manifest.get("tokenizer", own.sha256) != own.sha256:
                raise ValueError(f"{name}manifest.json: its shards are of another vocabulary than merges.txt there")
            if name and [manifest.get("part"), *ours] != [f"{i}/{len(parts)}", *origin]:
                raise ValueError(f"{name}manifest.json: is of another source or another part")
            fingerprint[f"{name}manifest.json"] = sha256(part / "manifest.json")
    return Data(train, val, is_text=False, tokenizer=tokenizer, fingerprint=fingerprint)


@lru_cache(maxsize=2)  # a batch may span two epochs
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of an epoch's n rows, drawn from (seed, epoch)."""
    return np.random.default_rng((seed, epoch)).permutation(n)


class DataLoaderLite:
    """Reads batches that are a pure function of the step: there is no state to save, and no token is dropped.

    The files, end to end, are one stream of N tokens. Row i is tokens [i·T, i·T + T]: T inputs and, one token later, T
    targets. There are n = (N - 1) // T rows. An epoch reads each row once, in an order drawn from (seed, epoch); shards
    keep the stream's order in the first epoch. Global row g of a run is row permutation(epoch)[g % n] of epoch g // n.
    """

    def __init__(self, files: Files, T: int, seed: int = 0, shuffle_first: bool = False, vocab_size: int = VOCAB_SIZE):
        self.files, self.T, self.seed, self.shuffle_first, self.vocab_size = files, T, seed, shuffle_first, vocab_size
        self.starts = np.cumsum([0] + [len(tokens) for _, tokens in files])  # of each file, and N
        self.n_rows = (int(self.starts[-1]) - 1) // T
        if self.n_rows < 1:
            tokens = f"{files[0][0]}: {self.starts[-1]:,} tokens"
            raise UserError(f"{tokens} are too few for a sequence of --seq_len {T} and its target")

    def rows(self, first: int, B: int) -> torch.Tensor:
        """Return the B global rows from `first` on: (B, T + 1) of int32."""
        rows = []
        for g in range(first, first + B):
            epoch, i = divmod(g, self.n_rows)
            if epoch > 0 or self.shuffle_first:
                i = int(permutation(self.n_rows, self.seed, epoch)[i])
            rows.append(self.read(i * self.T, self.T + 1))
        return torch.from_numpy(np.stack(rows).astype(np.int32))

    def read(self, start: int, n: int) -> np.ndarray:
        """Return n tokens of the stream from start on, across files: (n,) of uint16. Raise ShardError."""
        parts = []
        i = int(np.searchsorted(self.starts, start, side="right")) - 1
        while n > 0:
            name, tokens = self.files[i]
            offset = start - int(self.starts[i])
            part = tokens[offset : offset + n]
            check_ids(name, offset, part, self.vocab_size)
            parts.append(part)
            start, n, i = start + len(part), n - len(part), i + 1
        return np.concatenate(parts)

    def micro_batches(self, first: int, B: int, stride: int) -> Iterator[torch.Tensor]:
        """Yield B global rows from `first` on, then B from `first + stride` on, without end; read one batch ahead."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            batch = pool.submit(self.rows, first, B)
            for g in count(first + stride, stride):
                ready, batch = batch, pool.submit(self.rows, g, B)
                yield ready.result()


def inputs_and_targets(rows: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Move rows (B, T + 1) of int32 to the device; return inputs and targets, each (B, T) of int64."""
    rows = to_device(rows, device).long()
    return rows[:, :-1], rows[:, 1:]


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the tensor on the device. The host does not wait for the copy to a GPU."""
    cuda = device.type == "cuda"  # on MPS, the copy would read freed memory (pytorch issue 139550)
    return (tensor.pin_memory() if cuda else tensor).to(device, non_blocking=cuda)
