"""Turn documents into token shards, which train_gpt2.py reads.

    python fineweb.py                                      FineWeb-Edu sample-10BT, from the Hugging Face hub
    python fineweb.py --pretokenized 10                    its first 10 shards, tokenized by others
    python fineweb.py --files 'books/*.parquet' --out_dir books    documents of your own
    python fineweb.py --verify edu_fineweb10B              compare a directory with its manifest

Each document is <|endoftext|> and then its tokens; all of them, end to end, are cut into shards of exactly shard_size
tokens, two bytes each (sample-10BT: 20 GB), the first shard for validation. Interrupted in any way, the same command
continues after the last complete shard.
"""

from errors import UserError, first_line, run_script

import base64
import contextlib
import glob
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from runtime.options import option, parse_options
from runtime.shards import (
    ShardError,
    check_types,
    find_shards,
    is_shard_name,
    open_shard,
    read_manifest,
    split_of,
    write_manifest,
    write_shard,
)
from tokens import END_OF_TEXT, SHA256, encode, gpt2_encoding, sha256

ROOT = Path(__file__).resolve().parent
PRETOKENIZED = "kjj0/finewebedu10B-gpt2"
CONTINUE = "the same command continues after the last complete shard"
MAX_DOCUMENT = 2**30  # bytes, decompressed
BATCH, BATCH_BYTES = 256, 2**22  # documents that are encoded together: at most so many, and once they are so large
READ_AHEAD = 2**26  # bytes of text that wait for an encoder


# --------------------------------------------------------------------------------------------------------------------
# Reading: documents in order, then batches of them


class Document(NamedTuple):
    """A text, where the source has it, and the fraction of the source that lies before."""

    file: int  # which file of the source, and which document in it
    number: int
    text: str
    done: float


@dataclass(frozen=True)
class Cursor:
    """Where to continue: from this document of this source file on, `tokens` tokens are already written."""

    file: int = 0
    document: int = 0
    tokens: int = 0


class Batch(NamedTuple):
    """Documents that follow each other, where the first one is, and their size in bytes."""

    texts: list[str]
    cursor: Cursor
    done: float
    size: int


def make_batches(documents: Iterable[Document]) -> Iterator[Batch]:
    """Group documents into batches of at most BATCH documents, which end where they reach BATCH_BYTES."""
    texts, size = [], 0
    for document in documents:
        if not texts:
            first = document
        texts.append(document.text)
        size += sys.getsizeof(document.text)
        if len(texts) == BATCH or size >= BATCH_BYTES:
            yield Batch(texts, Cursor(first.file, first.number), first.done, size)
            texts, size = [], 0
    if texts:
        yield Batch(texts, Cursor(first.file, first.number), first.done, size)


def read_files(paths: list[Path], column: str, start: Cursor) -> Iterator[Document]:
    """Yield the documents of local files from start on. Raise UserError naming file and document."""
    sizes = [p.stat().st_size for p in paths]
    for i, path in enumerate(paths[start.file :], start=start.file):
        before, total = sum(sizes[:i]), max(1, sum(sizes))
        skip = start.document if i == start.file else 0
        for n, text, fraction in find_reader(path)(path, column, skip):
            check_text(text, n, column, str(path))
            yield Document(i, n, text, (before + fraction * sizes[i]) / total)


def check_text(text: object, n: int, column: str, source: str) -> None:
    """Raise UserError if what document n has in a column is not text."""
    if not isinstance(text, str):
        raise UserError(f"{source}: document {n:,} has {repr(text)[:80]} in {column}, which is not text")


def find_reader(path: Path) -> Callable[[Path, str, int], Iterator[tuple[int, object, float]]] | None:
    """Return the reader of a file by the end of its name, or None."""
    if path.suffix == ".parquet":
        return read_parquet
    kind = Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix
    return {".jsonl": read_jsonl, ".json": read_jsonl, ".txt": read_text}.get(kind)


def read_parquet(path: Path, column: str, skip: int) -> Iterator[tuple[int, object, float]]:
    """Yield from document `skip` on: its number, its text and the fraction of the file that lies before it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    n = 0
    try:
        with pq.ParquetFile(path) as file:
            names, total = file.schema_arrow.names, file.metadata.num_rows
            if column not in names:
                raise UserError(f"{path}: has no column {column}, but {', '.join(names)}")
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if n + rows <= skip:
                    n += rows
                    continue
                for batch in file.iter_batches(BATCH, row_groups=[group], columns=[column]):
                    for value in batch.column(0):
                        if n >= skip:
                            yield n, value.as_py(), n / total
                        n += 1
    except UnicodeDecodeError:
        raise UserError(f"{path}: document {n:,} has no UTF-8 text in {column}") from None
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{path}: cannot be read as parquet ({first_line(e)})") from None


def read_jsonl(path: Path, column: str, skip: int) -> Iterator[tuple[int, object, float]]:
    """The same for lines of JSON, of which .gz and .zst are decompressed while reading."""
    size = path.stat().st_size
    with open_compressed(path) as (file, tell):
        for n, line in enumerate(iter(lambda: file.readline(MAX_DOCUMENT + 1), b"")):
            check_size(line, n, path)
            if n < skip:
                continue
            try:
                text = json.loads(line)[column]
            except KeyError:
                raise UserError(f"{path}: document {n:,} has no {column}, but {', '.join(json.loads(line))}") from None
            except (ValueError, TypeError, RecursionError) as e:
                raise UserError(f"{path}: document {n:,} is not a JSON object ({first_line(e)})") from None
            yield n, replace_surrogates(text), tell() / size


def read_text(path: Path, column: str, skip: int) -> Iterator[tuple[int, object, float]]:
    """The same for a text file, which is one document."""
    if skip == 0:
        with open_compressed(path) as (file, _):
            content = file.read(MAX_DOCUMENT + 1)
            check_size(content, 0, path)
            try:
                yield 0, content.decode("utf-8"), 0.0
            except UnicodeDecodeError as e:
                raise UserError(f"{path}: not UTF-8 text (byte {e.start:,})") from None


def check_size(content: bytes, n: int, path: Path) -> None:
    """Raise UserError if document n is larger than MAX_DOCUMENT, as a few compressed bytes can be."""
    if len(content) > MAX_DOCUMENT:
        raise UserError(f"{path}: document {n:,} has over {MAX_DOCUMENT:,} bytes; split it")


@contextlib.contextmanager
def open_compressed(path: Path) -> Iterator[tuple[io.BufferedIOBase, Callable[[], int]]]:
    """Open a file to read bytes, through gzip or zstd where its name says so; with what tells the place in the file."""
    import pyarrow as pa

    kind = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    try:
        with open(path, "rb") as raw:
            yield io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), kind)) if kind else raw, raw.tell
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({first_line(e)})") from None


def replace_surrogates(text: object) -> object:
    """Replace halves of surrogate pairs, which JSON may hold and UTF-8 cannot, by U+FFFD, as tiktoken does."""
    if isinstance(text, str) and not text.isascii():
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def read_hub(source: dict, column: str, start: Cursor) -> Iterator[Document]:
    """Yield the documents of a data set on the Hugging Face hub from start on. They are streamed, so that no copy of
    it lands on the disk. Raise UserError."""
    from datasets import load_dataset

    name = source["dataset"]
    try:
        stream = load_dataset(
            name, name=source["name"], split=source["split"], revision=source["revision"], streaming=True
        )
        if stream.column_names and column not in stream.column_names:
            raise UserError(f"--text_column {column}: {name} has {', '.join(stream.column_names)}")
        stream = stream.select_columns([column]).with_format("arrow")
        for i in range(start.file, stream.num_shards):  # source files, not token shards
            n, skip = 0, start.document if i == start.file else 0
            for table in stream.shard(stream.num_shards, i).iter(BATCH):
                for value in table[column] if n + len(table) > skip else ():
                    if n >= skip:
                        text = value.as_py()
                        check_text(text, n, column, f"{name}, file {i:,}")
                        yield Document(i, n, text, i / stream.num_shards)
                    n += 1
    except UserError:
        raise
    except Exception as e:  # ValueError: no such configuration, split or column; others: the network, damaged bytes
        raise UserError(f"--dataset {name}: {first_line(e)}", 2 if type(e) is ValueError else 4) from None


# --------------------------------------------------------------------------------------------------------------------
# Encoding


Encoder = Callable[[list[str]], np.ndarray]  # documents to their part of the stream, (n,) of uint16


def encode_tiktoken(texts: list[str]) -> np.ndarray:
    """<|endoftext|> and the tokens of a document, for each of them."""
    end = np.array([END_OF_TEXT], dtype=np.uint16)
    return np.concatenate([part for text in texts for part in (end, encode(text))])


def make_gigatoken() -> Encoder:
    """The same by gigatoken, many times as fast, checked against tiktoken on the first document of every batch."""
    from gigatoken import Tokenizer

    ranks = sorted(gpt2_encoding()._mergeable_ranks.items(), key=lambda item: item[1])
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "gpt2.tiktoken"
        path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks))
        tokenizer = Tokenizer.from_tiktoken(path, pretokenizer="gpt2", special_tokens={})

    def encode_gigatoken(texts: list[str]) -> np.ndarray:
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

    return encode_gigatoken


def encode_in_order(batches: Iterable[Batch], encoder: Encoder, num_proc: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yield each batch and its block, in order, encoded by num_proc threads: encoders release the interpreter's lock.

    At most READ_AHEAD bytes of text wait, and one batch."""
    with ThreadPoolExecutor(num_proc) as pool:
        waiting: deque = deque()
        failure, size = None, 0
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(encoder, batch.texts)))
                size += batch.size
                while len(waiting) > 4 * num_proc or size > READ_AHEAD:
                    yield waiting[0][0], waiting[0][1].result()
                    size -= waiting.popleft()[0].size  # not before: if this one fails, nothing later may follow
        except UserError as e:
            failure = e
        for batch, block in waiting:  # what was read before a failure is kept
            yield batch, block.result()
        if failure:
            raise failure


# --------------------------------------------------------------------------------------------------------------------
# Writing: shards, and the manifest that says what they are


def check_writable(directory: Path) -> None:
    """Raise UserError if no files can be made in a directory or, if it is absent, in the nearest above it."""
    try:
        existing = next(p for p in (directory, *directory.absolute().parents) if p.exists())
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as e:
        raise UserError(f"--out_dir {directory}: cannot be written to ({e.strerror})") from None


def open_manifest(directory: Path, settings: dict) -> dict:
    """Return the manifest of what these settings have begun in a directory, or a new one. Raise UserError where others
    have, and where shards have no manifest."""
    if not (directory / "manifest.json").exists():
        if find_shards(directory):
            raise UserError(f"{directory}: holds shards but no manifest.json to continue from; use another --out_dir")
        return dict(settings, shards=[], documents=0, complete=False)
    manifest = read_manifest(directory)
    changed = [f"{key} {manifest.get(key)} → {value}" for key, value in settings.items() if manifest.get(key) != value]
    if changed:
        raise UserError(f"{directory} was begun with other settings: {', '.join(changed)}; use another --out_dir")
    return manifest


class ShardWriter:
    """A directory of shards and its manifest.json, the only record of which shards are valid.

    The manifest is written first, without shards, and again after each shard: a shard that it does not name is
    overwritten by the next run. It holds `source` and other settings, the shards (name, tokens, SHA-256), the number of
    documents and, until all is `complete`, the cursor. The last shard and `complete` are one write.
    """

    def __init__(self, directory: Path, settings: dict):
        self.directory, self.settings = directory, settings
        try:
            self.buffer = np.empty(settings["shard_size"], dtype=np.uint16)
        except (MemoryError, ValueError):
            raise UserError(f"--shard_size {settings['shard_size']}: a shard must fit in memory") from None
        self.filled = 0
        self.manifest = open_manifest(directory, settings)
        for shard in self.manifest["shards"]:
            if not (directory / shard["name"]).is_file():
                raise UserError(f"{directory / shard['name']}: is missing; restore it, or use another --out_dir")
        self.cursor = Cursor()
        if self.manifest["shards"] and not self.manifest["complete"]:
            try:
                check_types(self.manifest, cursor=dict)
                check_types(self.manifest["cursor"], file=int, document=int, tokens=int)
                self.cursor = Cursor(**self.manifest["cursor"])
            except (TypeError, ValueError) as e:
                raise ShardError(f"{directory / 'manifest.json'}: cannot be continued ({e})") from None

    def write(self, tokens: np.ndarray, cursor: Cursor, documents: int) -> None:
        """Add tokens, which follow the cursor, to the stream; `documents` lie before the cursor."""
        while len(tokens):
            if self.filled == len(self.buffer):  # only now: the last shard is written by `finish`
                self.flush(documents=documents, complete=False, cursor=asdict(cursor))
            part = tokens[: len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            cursor = replace(cursor, tokens=cursor.tokens + len(part))
            tokens = tokens[len(part) :]

    def flush(self, **state) -> None:
        """Write the buffer as the next shard, and then the manifest that names it."""
        shards = self.manifest["shards"]
        name = f"edufineweb_{'train' if shards else 'val'}_{len(shards):06d}.npy"
        if not shards:
            make_directory(self.directory)
            write_manifest(self.directory, self.manifest)
        write_shard(self.directory / name, self.buffer[: self.filled])
        shard = dict(name=name, tokens=self.filled, sha256=sha256(self.directory / name))
        self.manifest = dict(self.settings, shards=[*shards, shard], **state)
        write_manifest(self.directory, self.manifest)
        self.filled = 0

    def finish(self, documents: int) -> None:
        """Write the last shard and mark the manifest complete."""
        if not self.manifest["shards"]:
            hint = f"try --shard_size {max(1, self.filled // 10)}" if self.filled > 1 else "is the source empty?"
            raise UserError(f"{self.filled:,} tokens leave none to train on at --shard_size {len(self.buffer)}; {hint}")
        if not self.filled:
            raise UserError(f"{self.directory}: no tokens are left to continue with; has the source changed?")
        self.flush(documents=documents, complete=True)


def make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out_dir {directory}: cannot be made ({e.strerror})", 4) from None


# --------------------------------------------------------------------------------------------------------------------
# The script


def prepare(args: "Options") -> None:
    """Read, encode and write, from the beginning or from where the manifest says. Raise UserError."""
    if args.limit_tokens is not None and args.limit_tokens <= args.shard_size:
        raise UserError(
            f"--limit_tokens {args.limit_tokens}: must be more than --shard_size {args.shard_size}, "
            "the tokens for validation"
        )
    if args.files:
        paths = expand(args.files)
        source = dict(files=[[p.name, p.stat().st_size] for p in paths])
    else:
        revision = find_revision(args.out_dir, args.dataset)
        name = args.name or ("sample-10BT" if args.dataset == Options.dataset else None)
        source = dict(dataset=args.dataset, name=name, split=args.split, revision=revision)
    settings = dict(
        source=source,
        text_column=args.text_column,
        tokenizer=SHA256,
        shard_size=args.shard_size,
        limit_tokens=args.limit_tokens,
    )
    out = ShardWriter(args.out_dir, settings)
    if out.manifest["complete"]:
        print(f"{args.out_dir} is complete: {describe(out.manifest)}")
        return
    cursor, documents = out.cursor, out.manifest["documents"]
    skip, written = cursor.tokens, sum(shard["tokens"] for shard in out.manifest["shards"])
    if written:
        print(f"{args.out_dir}: continuing after {describe(out.manifest)}")
    read = read_files(paths, args.text_column, cursor) if args.files else read_hub(source, args.text_column, cursor)
    fast = find_spec("gigatoken") is not None
    encoder = make_gigatoken() if fast else encode_tiktoken
    print(f"encoding by {'gigatoken, checked against tiktoken' if fast else 'tiktoken; gigatoken would be faster'}")
    limit = args.limit_tokens or float("inf")
    started, first, n_bytes = time.perf_counter(), written, 0
    bar_format = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=1.0, bar_format=bar_format, dynamic_ncols=True) as bar:
        for batch, block in encode_in_order(make_batches(read), encoder, args.num_proc):
            new = block[skip : min(len(block), skip + limit - written)]
            out.write(new, replace(batch.cursor, tokens=skip), documents)
            skip, written = max(0, skip - len(block)), written + len(new)
            documents += len(batch.texts)
            n_bytes += sum(map(len, batch.texts))
            seconds = time.perf_counter() - started
            bar.update(max(0, max(batch.done, written / limit) - bar.n))
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
    """Return the files that paths and patterns name: patterns in their order, the files of each sorted by name."""
    paths = []
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise UserError(f"--files {pattern}: no such file")
        paths += map(Path, found)
    for path in paths:
        if find_reader(path) is None or not path.is_file():
            raise UserError(
                f"--files {path}: neither .parquet nor .jsonl nor .txt (.gz and .zst of these are read, too)"
            )
    return paths


def find_revision(out_dir: Path, dataset: str) -> str | None:
    """Return the commit of a data set that out_dir was begun with, or else the newest on the hub."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    if (out_dir / "manifest.json").exists():
        return read_manifest(out_dir)["source"].get("revision")
    try:
        return HfApi().dataset_info(dataset).sha
    except HFValidationError as e:
        raise UserError(f"--dataset {dataset}: {first_line(e)}") from None
    except Exception as e:  # whatever the hub's client raises
        if getattr(getattr(e, "response", None), "status_code", None) in (401, 403, 404):
            raise UserError(f"--dataset {dataset}: no such data set on the hub, or not open to you") from None
        raise UserError(
            f"--dataset {dataset}: the hub is out of reach ({first_line(e)}); --files needs none", 4
        ) from None


def download(out_dir: Path, n: int | None) -> None:
    """Fetch shards in llm.c's format that others have tokenized: those for validation and the first n for training, or
    all. Those that are there already are kept. Each is verified."""
    from huggingface_hub import HfApi, hf_hub_download

    revision = find_revision(out_dir, PRETOKENIZED)
    manifest = open_manifest(out_dir, dict(source=dict(dataset=PRETOKENIZED, revision=revision), tokenizer=SHA256))
    try:
        info = HfApi().dataset_info(PRETOKENIZED, revision=revision, files_metadata=True)
        sha = {f.rfilename: f.lfs.sha256 for f in info.siblings if is_shard_name(f.rfilename)}
        train = sorted(name for name in sha if split_of(name) == "train")
        names = sorted(name for name in sha if split_of(name) == "val")
        names += [name for i, name in enumerate(train) if n is None or i < n or (out_dir / name).exists()]
        make_directory(out_dir)
        write_manifest(out_dir, manifest | dict(complete=False))
        where = dict(repo_type="dataset", revision=revision, local_dir=out_dir / ".download")
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
        write_manifest(out_dir, manifest | dict(shards=shards, complete=True))
        shutil.rmtree(out_dir / ".download", ignore_errors=True)
    except UserError:
        raise
    except Exception as e:  # whatever the hub's client raises
        raise UserError(f"{PRETOKENIZED}: {first_line(e)}", 4) from None
    print(f"{out_dir} has {sum(s['tokens'] for s in shards):,} tokens in {len(shards)} shards")


def verify(directory: Path) -> None:
    """Compare a directory with its manifest, shards by their SHA-256. Raise UserError naming all that differs."""
    manifest = read_manifest(directory)
    expected = {shard["name"]: shard["sha256"] for shard in manifest["shards"]}
    wrong = [f"{p.name} is not in manifest.json" for p in find_shards(directory) if p.name not in expected]
    for name in tqdm(expected, unit="shard"):
        if not (directory / name).is_file():
            wrong.append(f"{name} is missing")
        elif sha256(directory / name) != expected[name]:
            wrong.append(f"{name} does not match its SHA-256")
    if not manifest["complete"]:
        wrong.append("not all shards are written yet")
    if wrong:
        raise UserError(f"{directory}: {', '.join(wrong)}")
    print(f"{directory}: all {len(expected)} shards are as written")


@dataclass(frozen=True)
class Options:
    dataset: str = option("HuggingFaceFW/fineweb-edu", "data set on the Hugging Face hub", metavar="NAME")
    name: str | None = option(
        None, "its configuration (default: sample-10BT for FineWeb-Edu, else its only one)", metavar="NAME"
    )
    split: str = option("train", "its split", metavar="NAME")
    text_column: str = option("text", "column, or field of .jsonl, that holds the documents", metavar="NAME")
    files: tuple[str, ...] = option(
        (), "read local files, or patterns of them: .parquet, .jsonl, or .txt, a document each; also .gz and .zst",
        metavar="FILE",
    )  # fmt: skip
    pretokenized: str | None = option(
        None, f"download the first N training shards of {PRETOKENIZED}, or all", metavar="N"
    )
    verify: Path | None = option(None, "compare a directory with its manifest, and do nothing else", metavar="DIR")
    out_dir: Path = option(ROOT / "edu_fineweb10B", "directory for the shards", metavar="DIR")
    shard_size: int = option(100_000_000, "tokens per shard", low=1, metavar="N")
    num_proc: int = option(os.cpu_count(), "number of encoder threads", low=1, high=1024, metavar="N")
    limit_tokens: int | None = option(None, "stop after N tokens (default: at the end)", low=1, metavar="N")


def main(argv: list[str] | None = None) -> int:
    """Prepare, download or verify shards. Raise UserError."""
    args = Options(**parse_options(Options, argv, __doc__))
    n = args.pretokenized
    if n not in (None, "all") and not (n.isdecimal() and int(n) > 0):
        raise UserError(f"--pretokenized {n}: must be a number of shards, or all")
    if sum(map(bool, (args.files, args.pretokenized, args.verify))) > 1:
        raise UserError("--files, --pretokenized and --verify: give one of them")
    try:
        if args.verify:
            verify(args.verify)
            return 0
        check_writable(args.out_dir)
        if n:
            download(args.out_dir, None if n == "all" else int(n))
        else:
            prepare(args)
    except KeyboardInterrupt:
        raise UserError(f"interrupted; {CONTINUE}", 130) from None
    except UserError as e:
        if e.status == 4:  # disk or network
            raise UserError(f"{e}; {CONTINUE}", 4) from None
        raise
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
