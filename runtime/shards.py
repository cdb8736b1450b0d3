"""Token shards, and the manifest that says which of them are valid.

A shard is a flat array of uint16 token ids in one of two formats:

    .npy    what numpy.save writes: one dimension, uint16 (build-nanogpt and fineweb.py)
    .bin    llm.c's: 256 int32 (20240520, version 1, token count, zeros), then the ids as uint16
"""

from errors import UserError, first_line
import json
import re
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from runtime.files import write_atomically
from tokens import VOCAB_SIZE

BIN_HEADER = 256 * 4  # bytes: 256 int32
BIN_MAGIC, BIN_VERSION = 20240520, 1


class ShardError(UserError):
    """A token file that is damaged; the message names the file, what was expected and what was found."""


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write token ids (uint16, one dimension) as numpy.save does."""
    if tokens.dtype != np.uint16 or tokens.ndim != 1:
        raise ShardError(f"{path}: a shard is a flat array of uint16, not {tokens.dtype} of shape {tokens.shape}")
    with write_atomically(path) as f:  # not by numpy.save, which does not tell a full disk from other errors
        npy.write_array_header_1_0(f, npy.header_data_from_array_1_0(tokens))
        f.write(np.ascontiguousarray(tokens).data)


def open_shard(path: Path, vocab_size: int = VOCAB_SIZE) -> np.ndarray:
    """Return a shard's token ids as a read-only memmap (n,) of uint16, once its header and size are validated."""
    if not path.is_file():  # a directory, or a pipe, at which reading would wait forever
        raise ShardError(f"{path}: is not a regular file")
    offset, n = _npy_layout(path) if path.suffix == ".npy" else _bin_layout(path)
    expected, found = offset + 2 * n, path.stat().st_size
    if found != expected:
        what = f"{'truncated' if found < expected else 'trailing bytes'}: {n:,} tokens make {expected:,} bytes"
        raise ShardError(f"{path}: {what}, found {found:,}; download or write it again")
    if n == 0:
        raise ShardError(f"{path}: holds no tokens")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=offset, shape=(n,))
    for start in 0, max(0, n - 2048):  # its first and last page; the others are checked as they are read
        check_ids(path.name, start, tokens[start : start + 2048], vocab_size)
    return tokens


def _npy_layout(path: Path) -> tuple[int, int]:
    """Return where the tokens of a .npy shard begin, in bytes, and how many there should be."""
    with open(path, "rb") as f:
        try:
            read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(f)]
            shape, _, dtype = read_header(f)
        except (ValueError, KeyError, RecursionError, MemoryError) as e:
            raise ShardError(f"{path}: expected a .npy header, found none that can be read ({first_line(e)})") from None
        if dtype != np.dtype("<u2"):
            raise ShardError(f"{path}: expected tokens of type uint16, found {dtype}")
        if len(shape) != 1:
            raise ShardError(f"{path}: expected one dimension, found shape {shape}")
        return f.tell(), shape[0]


def _bin_layout(path: Path) -> tuple[int, int]:
    """The same for a .bin shard."""
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256:
        raise ShardError(f"{path}: truncated: expected a header of {BIN_HEADER} bytes, found {4 * len(header)}")
    magic, version, n = (int(x) for x in header[:3])
    if (magic, version) != (BIN_MAGIC, BIN_VERSION):
        expected = f"expected magic {BIN_MAGIC} and version {BIN_VERSION}, found {magic} and {version}"
        raise ShardError(f"{path}: {expected}; is this a token file in llm.c's GPT-2 format?")
    if n < 0:
        raise ShardError(f"{path}: expected a token count, found {n}")
    return BIN_HEADER, n


def check_ids(name: str, start: int, ids: np.ndarray, vocab_size: int) -> None:
    """Raise ShardError if any of these ids of a file, from position start on, is not one of the vocabulary's."""
    if ids.max() >= vocab_size:
        at = int(np.argmax(ids >= vocab_size))
        raise ShardError(f"{name}: token {start + at:,} is {ids[at]}, but its vocabulary ends at {vocab_size - 1}")


def split_of(name: str) -> str | None:
    """Return which split a shard is for, by the last of the words "train" and "val" in its name."""
    words = re.findall("[A-Za-z]+", name)
    return next((word for word in reversed(words) if word in ("train", "val")), None)


def find_shards(directory: Path) -> list[Path]:
    """Return all shards of a directory in the order of their names."""
    return sorted(p for p in directory.glob("*") if p.suffix in (".npy", ".bin"))


def shard_paths(directory: Path, split: str) -> list[Path]:
    """Return the shards of a split, "train" or "val". Raise ShardError if there are none."""
    shards = find_shards(directory)
    if not shards:
        raise ShardError(f"{directory}: holds no .npy or .bin shards; prepare some with `python fineweb.py`")
    if len({p.suffix for p in shards}) > 1:
        raise ShardError(f"{directory}: holds both .npy and .bin shards; keep one kind, or they may count twice")
    chosen = [p for p in shards if split_of(p.name) == split]
    if not chosen:
        raise ShardError(f'{directory}: none of its {len(shards)} shards has the word "{split}" in its name')
    return chosen


def part_name(part: str) -> str:
    """Return the directory's name of a part "i/N". Raise ShardError if it is not one."""
    i, n = map(int, part.split("/")) if re.fullmatch(r"[1-9]\d{0,4}/[1-9]\d{0,4}", part) else (0, 0)
    if not 1 <= i <= n:
        raise ShardError(f"--part {part}: must be i/N, from 1/N to N/N")
    return f"part-{i:05}-of-{n:05}"


def find_parts(directory: Path) -> list[Path]:
    """Return the parts of a directory in order; if it has none, itself. Raise ShardError if they are not complete."""
    found = sorted(p.name for p in directory.glob("part-*-of-*") if p.is_dir())
    n = int(found[-1][-5:]) if found and found[-1][-5:].isdecimal() else 0
    names = [part_name(f"{i}/{n}") for i in range(1, n + 1)]
    if found != names or (found and find_shards(directory)):
        differ = ", ".join(sorted({*found} ^ {*names})) or "shards beside the parts"
        raise ShardError(f"{directory}: of {n} parts, these are missing or do not belong there: {differ}")
    return [directory / name for name in names] or [directory]


def read_manifest(directory: Path) -> dict:
    """Return a directory's manifest.json. Raise ShardError if it is not one that fineweb.py has written."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        check_types(manifest, source=dict, shards=list, documents=int, complete=bool)
        for shard in manifest["shards"]:
            check_types(shard, name=str, tokens=int, sha256=str)
            if not is_shard_name(shard["name"]):
                raise ValueError(f"{shard['name']!r} is not the name of a shard")
        if manifest["shards"] and not manifest["complete"]:
            check_types(manifest.get("cursor"), file=int, document=int, tokens=int)
    except (OSError, ValueError, RecursionError) as e:
        raise ShardError(f"{directory / 'manifest.json'}: cannot be read as a manifest ({first_line(e)})") from None
    return manifest


def check_types(record: object, **types: type) -> None:
    """Raise ValueError if record is not a dict with these keys and types of values."""
    for key, kind in types.items():
        if not isinstance(record, dict) or type(record.get(key)) is not kind:
            raise ValueError(f"expected {key} of type {kind.__name__}")


def is_shard_name(name: str) -> bool:
    """Return whether this is the bare name of a .npy or .bin file: it cannot lead out of its directory."""
    return re.fullmatch(r"\w[\w.-]*\.(npy|bin)", name) is not None


def write_manifest(directory: Path, manifest: dict) -> None:
    """Write a directory's manifest.json, which makes the shards that it names valid."""
    with write_atomically(directory / "manifest.json") as f:
        f.write((json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())


def check_manifest(directory: Path, found: dict, key: str = "tokens") -> dict:
    """Return manifest.json after comparing it with shards, by name their tokens or sha256. Raise ShardError naming all
    that differs."""
    manifest = read_manifest(directory)
    if not manifest["complete"]:
        raise ShardError(f"{directory}: not all of its shards are written yet: give the command again that began it")
    expected = {shard["name"]: shard[key] for shard in manifest["shards"]}
    wrong = []
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            has, says = (f"{key} {n[name]}" if name in n else "no such shard" for n in (found, expected))
            wrong.append(f"{name}: {has} there, but manifest.json says {says}")
    if wrong:
        raise ShardError(f"{directory}: {'; '.join(wrong)}; restore the files that differ")
    return manifest
