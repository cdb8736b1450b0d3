"""Documents to token shards, which train_gpt2.py reads.

    python fineweb.py                                      FineWeb-Edu sample-10BT, from the Hugging Face hub
    python fineweb.py --pretokenized 10                    its first 10 shards, tokenized by others: ready at once
    python fineweb.py --files 'books/*.parquet' --out_dir books    documents of your own
    python fineweb.py --verify edu_fineweb10B              hash a directory against its manifest

Each document is <|endoftext|> and then its tokens; all of them, end to end, are cut into shards of exactly shard_size
tokens, two bytes each (sample-10BT: 20 GB), the first shard for validation. Interrupted in any way, the same command
goes on after the last whole shard.
"""

from errors import UserError, first_line

import argparse
import base64
import contextlib
import glob
import io
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tokens import (
    END_OF_TEXT,
    SHA256,
    gpt2_encoding,
    open_shard,
    read_manifest,
    sha256,
    write_shard,
)

ROOT = Path(__file__).resolve().parent
PRETOKENIZED = "kjj0/finewebedu10B-gpt2"
BATCH = 256  # documents that are read, encoded and counted together


# --------------------------------------------------------------------------------------------------------------------
# Reading: batches of documents, in order, from a place on


@dataclass(frozen=True)
class Batch:
    """Some documents; the place from which reading yields them first; the share of the source that lies before."""

    texts: list[str]
    place: list[int]  # which file of the source, and which document in it
    done: float


def read_files(paths: list[Path], column: str, place: list[int] | None) -> Iterator[Batch]:
    """The documents of local files from place on: [file, document in it]. UserErrors name file and document."""
    first_file, first_document = place or (0, 0)
    sizes = [p.stat().st_size for p in paths]
    readers = {".parquet": read_parquet, ".jsonl": read_jsonl, ".json": read_jsonl, ".txt": read_text}
    for i, path in enumerate(paths[first_file:], start=first_file):
        skip = first_document if i == first_file else 0
        read = readers[next(s for s in reversed(path.suffixes) if s in readers)]
        for n, texts, share in read(path, column, skip):
            check_texts(texts, n, column, str(path))
            yield Batch(texts, [i, n], (sum(sizes[:i]) + share * sizes[i]) / max(1, sum(sizes)))


def check_texts(texts: list, first: int, column: str, source: str) -> None:
    """Raise UserError, naming the document, if one of these, the first of which has that number, is no text."""
    for n, text in enumerate(texts, start=first):
        if not isinstance(text, str):
            raise UserError(f"{source}: document {n:,} has {text!r} in {column}, which is not text")


def read_parquet(path: Path, column: str, skip: int) -> Iterator[tuple[int, list, float]]:
    """From document `skip` on: a number, the documents from it on, and the share of the file that lies before."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise UserError(f"{path}: has no column {column}, but {', '.join(file.schema_arrow.names)}")
            n, total = 0, file.metadata.num_rows
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if n + rows <= skip:
                    n += rows
                    continue
                for batch in file.iter_batches(BATCH, row_groups=[group], columns=[column]):
                    texts = batch.column(0).to_pylist()
                    start = max(n, skip)
                    if start < n + len(texts):
                        yield start, texts[start - n :], start / total
                    n += len(texts)
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{path}: cannot be read as parquet ({str(e).splitlines()[0]})") from None


def read_jsonl(path: Path, column: str, skip: int) -> Iterator[tuple[int, list, float]]:
    """The same for lines of JSON, of which .gz and .zst are decompressed on the way."""
    size, texts, n = path.stat().st_size, [], 0
    with open_compressed(path) as (file, tell):
        share = 0.0
        for n, line in enumerate(file):  # noqa: B007
            if n < skip:
                continue
            try:
                record = json.loads(line)
                texts.append(record[column])
            except KeyError:
                raise UserError(f"{path}: document {n:,} has no {column}, but {', '.join(record)}") from None
            except (ValueError, TypeError) as e:
                raise UserError(f"{path}: document {n:,} is not a JSON object ({e})") from None
            if len(texts) == BATCH:
                yield n - BATCH + 1, [whole(t) for t in texts], share
                texts, share = [], tell() / size
        if texts:
            yield n - len(texts) + 1, [whole(t) for t in texts], share


def read_text(path: Path, column: str, skip: int) -> Iterator[tuple[int, list, float]]:
    """The same for a text file, which is one document."""
    if skip == 0:
        with open_compressed(path) as (file, _):
            try:
                yield 0, [file.read().decode("utf-8")], 0.0
            except UnicodeDecodeError as e:
                raise UserError(f"{path}: not UTF-8 text (byte {e.start:,})") from None


@contextlib.contextmanager
def open_compressed(path: Path) -> Iterator[tuple[io.BufferedIOBase, Callable[[], int]]]:
    """Open a file to read bytes, through gzip or zstd where its name says so; with what tells the place in the file."""
    import pyarrow as pa

    kind = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    try:
        with open(path, "rb") as raw:
            yield io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), kind)) if kind else raw, raw.tell
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e})") from None


def whole(text: object) -> object:
    """JSON may hold halves of surrogate pairs, which no UTF-8 can: each becomes U+FFFD, as tiktoken has it."""
    if isinstance(text, str) and not text.isascii():
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def read_hub(
    dataset: str, name: str | None, split: str, column: str, revision: str, place: list[int] | None
) -> Iterator[Batch]:
    """The documents of a data set on the Hugging Face hub from place on: [file, document in it]. They are streamed, so
    that no copy of it lands on the disk. Raises UserError."""
    from datasets import load_dataset

    first_file, first_document = place or (0, 0)
    try:
        stream = load_dataset(dataset, name=name, split=split, revision=revision, streaming=True)
        if stream.column_names and column not in stream.column_names:
            raise UserError(f"--text_column {column}: {dataset} has {', '.join(stream.column_names)}")
        stream = stream.select_columns([column]).with_format("arrow")
        for i in range(first_file, stream.num_shards):  # source files; not shards of ours
            file, n = stream.shard(stream.num_shards, i), 0
            for table in file.iter(BATCH):
                if i > first_file or n >= first_document:
                    texts = table[column].to_pylist()
                    check_texts(texts, n, column, f"{dataset}, file {i:,}")
                    yield Batch(texts, [i, n], i / stream.num_shards)
                n += len(table)
    except UserError:
        raise
    except ValueError as e:  # no such configuration, split or column
        raise UserError(f"--dataset {dataset}: {first_line(e)}") from None
    except Exception as e:  # whatever the hub's client raises when the network fails
        raise UserError(f"--dataset {dataset}: {first_line(e)}; the same command goes on from here", 4) from None


# --------------------------------------------------------------------------------------------------------------------
# Encoding


_thread = threading.local()
Encoder = Callable[[list[str]], np.ndarray]  # documents to their part of the stream, (n,) of uint16


def encode_tiktoken(texts: list[str]) -> np.ndarray:
    """<|endoftext|> and the tokens of a document, for each of them."""
    if not hasattr(_thread, "encoding"):
        _thread.encoding = gpt2_encoding.__wrapped__()  # one each: threads that share one wait for each other
    encode, end = _thread.encoding.encode_to_numpy, np.array([END_OF_TEXT], dtype=np.uint32)
    parts = [part for text in texts for part in (end, encode(text, disallowed_special=()))]  # all of a text is text
    return np.concatenate(parts).astype(np.uint16)


def make_gigatoken() -> Encoder:
    """The same by gigatoken, many times as fast, checked against tiktoken on the first document of every batch."""
    from gigatoken import Tokenizer

    ranks = sorted(gpt2_encoding()._mergeable_ranks.items(), key=lambda item: item[1])
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "gpt2.tiktoken"
        path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks))
        tokenizer = Tokenizer.from_tiktoken(path, pretokenizer="gpt2", special_tokens={})

    def encode(texts: list[str]) -> np.ndarray:
        layout = tokenizer.encode_batch(texts, parallel=False).layout
        tokens, starts = layout.content.data, layout.offsets.data[:-1] + np.arange(len(texts))
        block = np.full(len(tokens) + len(texts), END_OF_TEXT, dtype=np.uint16)
        is_token = np.ones(len(block), dtype=bool)
        is_token[starts] = False
        block[is_token] = tokens
        expected = encode_tiktoken(texts[:1])
        if not np.array_equal(block[: len(expected)], expected):
            raise UserError(f"gigatoken differs from tiktoken on {texts[0][:80]!r}…; uninstall it, and report this", 1)
        return block

    return encode


def encode_in_order(batches: Iterable[Batch], encode: Encoder, num_proc: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """Each batch and its block, in order, encoded by num_proc threads: encoders run outside the interpreter's lock."""
    with ThreadPoolExecutor(num_proc) as pool:
        waiting: deque = deque()
        failure = None
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(encode, batch.texts)))
                if len(waiting) > 4 * num_proc:
                    yield waiting[0][0], waiting[0][1].result()
                    waiting.popleft()  # not before: where this one fails, nothing later may follow
        except UserError as e:
            failure = e
        for batch, block in waiting:  # what was read before a failure is kept
            yield batch, block.result()
        if failure:
            raise failure


# --------------------------------------------------------------------------------------------------------------------
# Writing: shards, and the manifest that says what they are


class Output:
    """A directory of shards and its manifest.json, which is brought up to date after every whole shard.

    The manifest holds `source` and other settings, the shards (name, tokens, SHA-256), the documents read and, until
    all is `complete`, where to read on: a place in the source, and how many tokens from there are written already.
    """

    def __init__(self, directory: Path, settings: dict):
        self.directory = directory
        existing = next(p for p in (directory, *directory.absolute().parents) if p.exists())
        self.manifest = dict(settings, shards=[], documents=0, complete=False, place=None, tokens_written=0)
        if (directory / "manifest.json").exists():
            self.manifest = read_manifest(directory)
            changed = [
                f"{key} {self.manifest.get(key)} → {value}"
                for key, value in settings.items()
                if self.manifest.get(key) != value
            ]
            if changed:
                raise UserError(
                    f"{directory} was begun with other settings: {', '.join(changed)}; use another --out_dir"
                )
        elif not (existing.is_dir() and os.access(existing, os.W_OK)):
            raise UserError(f"--out_dir {directory}: cannot be written to; is {existing} a directory of yours?")
        elif any(p.suffix in (".npy", ".bin") for p in directory.glob("*")):
            raise UserError(f"{directory}: holds shards but no manifest.json to go on from; use another --out_dir")
        self.buffer = np.empty(settings["shard_size"], dtype=np.uint16)
        self.filled = 0

    def write(self, tokens: np.ndarray, place: list[int] | None, tokens_before: int, documents: int) -> None:
        """Add tokens to the stream, tokens_before of those from this place on having come before them."""
        while len(tokens):
            part = tokens[: len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            tokens_before += len(part)
            tokens = tokens[len(part) :]
            if self.filled == len(self.buffer):
                self.flush(place, tokens_before, documents)

    def flush(self, place: list[int] | None, tokens_written: int, documents: int) -> None:
        """Write what has come together as the next shard, and then the manifest."""
        number = len(self.manifest["shards"])
        name = f"edufineweb_{'train' if number else 'val'}_{number:06d}.npy"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_shard(self.directory / name, self.buffer[: self.filled])
            shard = dict(name=name, tokens=self.filled, sha256=sha256(self.directory / name))
            self.manifest["shards"].append(shard)
            self.manifest |= dict(place=place, tokens_written=tokens_written, documents=documents)
            write_manifest(self.directory, self.manifest)
        except OSError as e:
            for partial in self.directory.glob("*.partial"):
                partial.unlink(missing_ok=True)
            free, needed = shutil.disk_usage(self.directory).free, 2 * self.filled
            raise UserError(
                f"{self.directory / name}: {e.strerror}: it takes {needed:,} bytes and {free:,} are free; "
                "all shards so far are kept, and the same command goes on after them",
                4,
            ) from None
        self.filled = 0

    def finish(self, documents: int) -> None:
        """Write the last, short shard and mark the manifest complete."""
        tokens = sum(shard["tokens"] for shard in self.manifest["shards"]) + self.filled
        if tokens <= len(self.buffer):
            hint = f"try --shard_size {max(1, tokens // 10)}" if tokens > 1 else "is the source empty?"
            raise UserError(f"{tokens:,} tokens leave none to train on at --shard_size {len(self.buffer)}; {hint}")
        if self.filled:
            self.flush(None, 0, documents)
        for key in "place", "tokens_written":
            del self.manifest[key]
        self.manifest |= dict(documents=documents, complete=True)
        write_manifest(self.directory, self.manifest)


def write_manifest(directory: Path, manifest: dict) -> None:
    """Write manifest.json, which is at all times the old one or the new."""
    partial = directory / "manifest.json.partial"
    with open(partial, "w", encoding="utf-8") as f:
        f.write(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        f.flush()
        os.fsync(f.fileno())
    partial.replace(directory / "manifest.json")


# --------------------------------------------------------------------------------------------------------------------
# The script


def prepare(args: argparse.Namespace) -> None:
    """Read, encode and write, from the beginning or from where the manifest says. Raises UserError."""
    if args.files:
        paths = expand(args.files)
        source = dict(files=[[p.name, p.stat().st_size] for p in paths])
    else:
        revision = resolve_revision(args.dataset)
        source = dict(dataset=args.dataset, name=args.name, split=args.split, revision=revision)
    settings = dict(
        source=source,
        text_column=args.text_column,
        tokenizer=SHA256,
        shard_size=args.shard_size,
        limit_tokens=args.limit_tokens,
    )
    out = Output(args.out_dir, settings)
    if out.manifest["complete"]:
        print(f"{args.out_dir} is complete: {describe(out.manifest)}")
        return
    place, skip, documents = (out.manifest[key] for key in ("place", "tokens_written", "documents"))
    written = sum(shard["tokens"] for shard in out.manifest["shards"])
    if written:
        print(f"{args.out_dir}: going on after {describe(out.manifest)}")
    if args.files:
        batches = read_files(paths, args.text_column, place)
    else:
        batches = read_hub(args.dataset, args.name, args.split, args.text_column, revision, place)
    fast = find_spec("gigatoken") is not None
    encode = make_gigatoken() if fast else encode_tiktoken
    print(f"encoding by {'gigatoken, checked against tiktoken' if fast else 'tiktoken; gigatoken would be faster'}")
    limit = args.limit_tokens or float("inf")
    started, first, n_bytes = time.perf_counter(), written, 0
    bar_format = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=1.0, bar_format=bar_format, dynamic_ncols=True) as bar:
        for batch, block in encode_in_order(batches, encode, args.num_proc):
            new = block[skip : skip + limit - written] if limit < float("inf") else block[skip:]
            out.write(new, batch.place, skip, documents)
            skip, written = 0, written + len(new)
            documents += len(batch.texts)
            n_bytes += sum(map(len, batch.texts))
            seconds = time.perf_counter() - started
            share = max(batch.done, written / limit)
            bar.update(max(0, share - bar.n))
            bar.set_postfix_str(
                f"{written:,} tokens, {len(out.manifest['shards'])} shards, "
                f"{(written - first) / seconds / 1e6:.1f}M tok/s, {n_bytes / seconds / 1e6:.0f} MB/s",
                refresh=False,
            )
            if written >= limit:
                break
        out.finish(documents)
        bar.update(1 - bar.n)
    print(f"{args.out_dir} is complete: {describe(out.manifest)}")


def describe(manifest: dict) -> str:
    tokens = sum(shard["tokens"] for shard in manifest["shards"])
    return f"{tokens:,} tokens of {manifest['documents']:,} documents in {len(manifest['shards'])} shards"


def expand(patterns: list[str]) -> list[Path]:
    """The files that paths and globs name: patterns as given, the files of each in the order of their names."""
    paths = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise UserError(f"--files {pattern}: no such file")
        paths += map(Path, found)
    for path in paths:
        if not {".parquet", ".jsonl", ".json", ".txt"} & set(path.suffixes[-2:]) or not path.is_file():
            raise UserError(
                f"--files {path}: neither .parquet nor .jsonl nor .txt (.gz and .zst of these are read, too)"
            )
    return paths


def resolve_revision(dataset: str) -> str:
    """The commit of a data set that the hub has now, so that a preparation goes on with what it began with."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(dataset).sha
    except Exception as e:  # whatever the hub's client raises
        if getattr(getattr(e, "response", None), "status_code", None) in (401, 404):
            raise UserError(f"--dataset {dataset}: no such data set on the hub") from None
        raise UserError(
            f"--dataset {dataset}: the hub is out of reach ({first_line(e)}); --files needs none", 4
        ) from None


def download(out_dir: Path, n: str) -> None:
    """Fetch ready-made shards in llm.c's format, the validation shard and the first n for training, each verified."""
    from huggingface_hub import HfApi, hf_hub_download

    try:
        info = HfApi().dataset_info(PRETOKENIZED, files_metadata=True)
        sha = {f.rfilename: f.lfs.sha256 for f in info.siblings if f.rfilename.endswith(".bin")}
        train = sorted(name for name in sha if "train" in name)
        names = sorted(sha.keys() - set(train)) + (train if n == "all" else train[: int(n)])
        out_dir.mkdir(parents=True, exist_ok=True)
        where = dict(repo_type="dataset", revision=info.sha, local_dir=out_dir / ".download")
        shards = []
        for name in tqdm(names, unit="shard"):
            path = out_dir / name
            for attempt in range(3):
                if path.exists() and sha256(path) == sha[name]:
                    break
                partial = Path(hf_hub_download(PRETOKENIZED, name, force_download=attempt > 0, **where))
                if sha256(partial) == sha[name]:
                    partial.replace(path)
                    break
            else:
                raise UserError(f"{path}: downloaded three times, each time with a wrong SHA-256; try again later", 4)
            shards.append(dict(name=name, tokens=len(open_shard(path)), sha256=sha[name]))
        source = dict(dataset=PRETOKENIZED, revision=info.sha)
        manifest = dict(source=source, tokenizer=SHA256, documents=0, shards=shards, complete=True)
        write_manifest(out_dir, manifest)
        shutil.rmtree(out_dir / ".download", ignore_errors=True)
    except UserError:
        raise
    except Exception as e:  # whatever the hub's client raises
        raise UserError(f"{PRETOKENIZED}: {first_line(e)}; the same command goes on from here", 4) from None
    print(f"{out_dir} has {sum(s['tokens'] for s in shards):,} tokens in {len(shards)} shards")


def verify(directory: Path) -> None:
    """Hash every shard of a directory against its manifest. Raises UserError, naming all that differ."""
    manifest = read_manifest(directory)
    wrong = []
    for shard in tqdm(manifest["shards"], unit="shard"):
        path = directory / shard["name"]
        if not path.exists():
            wrong.append(f"{path.name} is missing")
        elif sha256(path) != shard["sha256"]:
            wrong.append(f"{path.name} does not match its SHA-256")
    if wrong:
        raise UserError(f"{directory}: {', '.join(wrong)}")
    print(f"{directory}: all {len(manifest['shards'])} shards are as written")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset", default="HuggingFaceFW/fineweb-edu", help="on the Hugging Face hub (default: %(default)s)"
    )
    parser.add_argument("--name", help="its configuration (default: sample-10BT for FineWeb-Edu, else its only one)")
    parser.add_argument("--split", default="train", help="its part (default: %(default)s)")
    parser.add_argument(
        "--text_column",
        default="text",
        help="the column, or the field of .jsonl, with the documents (default: %(default)s)",
    )
    parser.add_argument(
        "--files",
        nargs="+",
        metavar="FILE",
        help="local files instead, or patterns of them: .parquet, .jsonl, or .txt, a document each; also .gz and .zst",
    )
    parser.add_argument(
        "--out_dir", type=Path, default=ROOT / "edu_fineweb10B", help="where the shards go (default: %(default)s)"
    )
    parser.add_argument("--shard_size", type=int, default=100_000_000, help="tokens per shard (default: %(default)s)")
    parser.add_argument(
        "--num_proc", type=int, default=os.cpu_count(), help="encoder threads (default: all cores, %(default)s)"
    )
    parser.add_argument("--limit_tokens", type=int, help="stop after so many tokens (default: at the end)")
    parser.add_argument(
        "--pretokenized", metavar="N", help=f"download the first N training shards of {PRETOKENIZED}, or all"
    )
    parser.add_argument("--verify", type=Path, metavar="DIR", help="hash a directory against its manifest, and no more")
    parser.error = lambda message: parser.exit(2, f"fineweb.py: error: {message}; see --help\n")
    args = parser.parse_args(argv)
    try:
        for flag in "shard_size", "num_proc", "limit_tokens":
            if getattr(args, flag) is not None and getattr(args, flag) < 1:
                raise UserError(f"--{flag} {getattr(args, flag)}: must be at least 1")
        if args.dataset == parser.get_default("dataset"):
            args.name = args.name or "sample-10BT"
        if args.verify:
            verify(args.verify)
        elif args.pretokenized:
            if args.pretokenized != "all" and not args.pretokenized.isdecimal():
                raise UserError(f"--pretokenized {args.pretokenized}: a number of shards, or all")
            download(args.out_dir, args.pretokenized)
        else:
            prepare(args)
    except UserError as e:
        print(f"fineweb.py: error: {e}", file=sys.stderr)
        return e.status
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the last whole shard", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
