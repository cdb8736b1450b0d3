"""The GPT-2 tokenizer. Its vocabulary is in `assets/`, so nothing here needs the network."""

import hashlib
import os
import re
import threading
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

ASSETS = Path(__file__).resolve().parent / "assets"
SHA256 = {
    "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
END_OF_TEXT = 50256
VOCAB_SIZE = END_OF_TEXT + 1

WHITESPACE, NO_WHITESPACE = r"[^\S\x1c-\x1f]", r"[\S\x1c-\x1f]"  # what tiktoken's \s matches, four fewer than Python's
LONG_RUN = 100_000  # characters of whitespace; tiktoken fails at a million

_thread = threading.local()


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def gpt2_encoding() -> tiktoken.Encoding:
    """Return GPT-2's byte-pair encoding, one per thread: threads that share one wait for each other."""
    if not hasattr(_thread, "encoding"):
        _thread.encoding = load_encoding()
    return _thread.encoding


def load_encoding() -> tiktoken.Encoding:
    """Load the encoding. Raise ValueError if a file in assets/ has been altered, OSError if one is missing."""
    for name, expected in SHA256.items():
        found = sha256(ASSETS / name)
        if found != expected:
            raise ValueError(f"{ASSETS / name}: expected SHA-256 {expected}, found {found}; get the file again")
    # By default tiktoken keeps a second copy of what it reads in the temporary directory; ours is local already.
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")
    ranks = data_gym_to_mergeable_bpe_ranks(str(ASSETS / "merges.txt"), str(ASSETS / "vocab.json"))
    special = {"<|endoftext|>": END_OF_TEXT}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


def encode(text: str) -> np.ndarray:
    """Return the token ids of a text, (n,) of uint16. "<|endoftext|>" in it is encoded like any other characters.

    tiktoken fails at a very long run of whitespace. GPT-2's pattern ends a piece before the last character of a run, so
    a text that is cut there keeps its pieces and ids.
    """
    parts = [text]
    if len(text) > LONG_RUN:
        parts = re.split(f"(?={WHITESPACE}{NO_WHITESPACE})(?<={WHITESPACE}{{{LONG_RUN}}})", text)
    ids = [gpt2_encoding().encode_to_numpy(part, disallowed_special=()) for part in parts]
    return np.concatenate(ids).astype(np.uint16)


def encode_document(text: str) -> np.ndarray:
    """Return <|endoftext|> and the token ids of a text, (n,) of uint16."""
    return np.append(np.uint16(END_OF_TEXT), encode(text))
