"""Tokenizers: GPT-2's, whose vocabulary is in `assets/`, its first tokens, or one of your own."""

import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

ASSETS = Path(__file__).resolve().parent / "assets"
END_OF_TEXT = 50256  # of GPT-2's vocabulary
VOCAB_SIZE = END_OF_TEXT + 1

WHITESPACE, NO_WHITESPACE = r"[^\S\x1c-\x1f]", r"[\S\x1c-\x1f]"  # what tiktoken's \s matches, four fewer than Python's
LONG_RUN = 100_000  # characters of whitespace; tiktoken fails at a million

# The bytes, in the order of their tokens, by the characters that stand for them in the files: those that can be printed
# stand for themselves, the characters from 256 on for the others.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
BYTE_OF = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(OTHERS)}

_thread = threading.local()


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@dataclass(frozen=True)
class Tokenizer:
    """Byte-pair encoding in GPT-2's layout: the token ids are 256 bytes, one for each merge, and <|endoftext|>."""

    merges: tuple[str, ...]  # two earlier tokens each, with a space between them, as in merges.txt

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Load vocab.json and merges.txt. Raise OSError, or ValueError if they are not in GPT-2's layout."""
        lines = (directory / "merges.txt").read_text(encoding="utf-8").split("\n")
        tokenizer = cls(tuple(line for line in lines if line and not line.startswith("#version")))
        if tokenizer.vocab_size > VOCAB_SIZE:
            raise ValueError(f"{directory}: has {tokenizer.vocab_size} tokens, more than GPT-2's {VOCAB_SIZE}")
        if json.loads((directory / "vocab.json").read_text(encoding="utf-8")) != tokenizer.vocab:
            raise ValueError(f"{directory}: vocab.json is not the bytes, the tokens of merges.txt, and <|endoftext|>")
        return tokenizer

    @classmethod
    def train(cls, texts: Iterator[str], vocab_size: int) -> "Tokenizer":
        """Learn the merges from texts, most frequent pairs first. Raise ValueError if there are too few pairs."""
        from tokenizers import ByteLevelBPETokenizer

        theirs = ByteLevelBPETokenizer()
        theirs.train_from_iterator(texts, vocab_size - 1, show_progress=sys.stderr.isatty())
        tokenizer = cls(tuple(map(" ".join, json.loads(theirs.to_str())["model"]["merges"])))
        if tokenizer.vocab_size < vocab_size:
            raise ValueError(f"the text gives no more than {tokenizer.vocab_size:,} tokens")
        return tokenizer

    def first(self, vocab_size: int) -> "Tokenizer":
        """Return the tokenizer with the first tokens of this one, and <|endoftext|>."""
        return self if vocab_size == self.vocab_size else Tokenizer(self.merges[: vocab_size - 257])

    @property
    def vocab_size(self) -> int:
        return len(self.merges) + 257

    @property
    def end_of_text(self) -> int:
        """Return the id of <|endoftext|>, the last one."""
        return self.vocab_size - 1

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Return the content of vocab.json. Raise ValueError if a merge is not of two characters or earlier tokens."""
        tokens = {char: i for i, char in enumerate(BYTE_OF)}
        for merge in self.merges:
            left, _, right = merge.partition(" ")
            if left not in tokens or right not in tokens or left + right in tokens:
                raise ValueError(f"merges.txt: {merge!r} does not merge two earlier tokens into a new one")
            tokens[left + right] = len(tokens)
        return tokens | {"<|endoftext|>": self.end_of_text}

    @cached_property
    def files(self) -> dict[str, bytes]:
        """Return the content of vocab.json and merges.txt."""
        lines = ["#version: 0.2", *self.merges, ""]
        return {"vocab.json": json.dumps(self.vocab).encode(), "merges.txt": "\n".join(lines).encode()}

    @property
    def sha256(self) -> dict[str, str]:
        """Return the SHA-256 of each file."""
        return {name: hashlib.sha256(content).hexdigest() for name, content in self.files.items()}

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Return the number of bytes of each token, (vocab_size,). <|endoftext|> has none."""
        return np.array([*map(len, [*self.vocab][:-1]), 0], dtype=np.uint16)

    @cached_property
    def tokenizer_json(self) -> bytes:
        """Return the content of tokenizer.json, with which other programs need neither of the files."""
        from tokenizers import ByteLevelBPETokenizer

        theirs = ByteLevelBPETokenizer(self.vocab, [tuple(merge.split(" ")) for merge in self.merges])
        theirs.add_special_tokens(["<|endoftext|>"])
        return theirs.to_str().encode()

    @property
    def encoding(self) -> tiktoken.Encoding:
        """Return tiktoken's encoding, one per thread: threads that share one wait for each other."""
        if getattr(_thread, "tokenizer", None) is not self:
            ranks = {bytes(BYTE_OF[c] for c in token): i for token, i in self.vocab.items() if i != self.end_of_text}
            special = {"<|endoftext|>": self.end_of_text}
            encoding = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)
            _thread.tokenizer, _thread.encoding = self, encoding
        return _thread.encoding

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids of a text, (n,) of uint16. "<|endoftext|>" in it is encoded like any other characters.

        tiktoken fails at a very long run of whitespace. GPT-2's pattern ends a piece before the last character of a
        run, so a text that is cut there keeps its pieces and ids.
        """
        parts = [text]
        if len(text) > LONG_RUN:
            parts = re.split(f"(?={WHITESPACE}{NO_WHITESPACE})(?<={WHITESPACE}{{{LONG_RUN}}})", text)
        ids = [self.encoding.encode_to_numpy(part, disallowed_special=()) for part in parts]
        return np.concatenate(ids).astype(np.uint16)

    def encode_document(self, text: str) -> np.ndarray:
        """Return <|endoftext|> and the token ids of a text, (n,) of uint16."""
        return np.append(np.uint16(self.end_of_text), self.encode(text))


@lru_cache
def gpt2_tokenizer() -> Tokenizer:
    """Return GPT-2's. Raise ValueError if the files in assets/ do not fit together, OSError if one is missing."""
    return Tokenizer.load(ASSETS)
