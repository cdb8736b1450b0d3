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
from functools import partial
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
BATCH, BATCH_BYTES = 256, 2**22  # a batch of documents, encoded together, ends at either
READ_AHEAD = 2**26  # bytes of text that wait for an encoder


# --------------------------------------------------------------------------------------------------------------------
# Reading: documents in order, then batches of them


class Document(NamedTuple):
    """A text, which file of the source and which document of that file it is, and the fraction of the source before."""

    file: int
    number: int
    text: str
    done: float


@dataclass(frozen=True)
class Cursor:
    """Where to continue: from this document of this source file on, `tokens` tokens are already written."""

    file: int = 0
    document: int = 0
    tokens: int = 0


Batch = list[Document]


def make_batches(documents: Iterable[Document]) -> Iterator[Batch]:
    """Group documents into batches of at most BATCH documents, which end where they reach BATCH_BYTES."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += sys.getsizeof(document.text)
        if len(batch) == BATCH or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def read_files(paths: list[Path], column: str, start: Cursor) -> Iterator[Document]:
    """Yield the documents of local files from start on. Raise UserError naming file and document."""
    for i in range(start.file, len(paths)):
        for n, (text, fraction) in enumerate(find_reader(paths[i])(paths[i], column)):
            if (i, n) >= (start.file, start.document):
                check_text(text, n, column, str(paths[i]))
                yield Document(i, n, text, (i + fraction) / len(paths))


def check_text(text: object, n: int, column: str, source: str) -> None:
    """Raise UserError if what document n has in a column is not text."""
    if not isinstance(text, str):
        raise UserError(f"{source}: document {n:,} has {repr(text)[:80]} in {column}, which is not text")


def find_reader(path: Path) -> Callable[[Path, str], Iterator[tuple[object, float]]] | None:
    """Return the reader of a file by the end of its name, or None."""
    if path.suffix == ".parquet":
        return read_parquet
    kind = Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix
    return {".jsonl": read_jsonl, ".json": read_jsonl, ".txt": read_text}.get(kind)


def read_parquet(path: Path, column: str) -> Iterator[tuple[object, float]]:
    """Yield each document of a file, and the fraction of the file that lies before it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names, total = file.schema_arrow.names, file.metadata.num_rows
            if column not in names:
                raise UserError(f"{path}: has no column {column}, but {', '.join(names)}")
            batches = file.iter_batches(BATCH, columns=[column])
            for n, value in enumerate(value for batch in batches for value in batch.column(0)):
                yield value.as_py(), n / total
    except UnicodeDecodeError:
        raise UserError(f"{path}: document {n:,} has no UTF-8 text in {column}") from None
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{path}: cannot be read as parquet ({first_line(e)})") from None


def read_jsonl(path: Path, column: str) -> Iterator[tuple[object, float]]:
    """The same for lines of JSON."""
    size = path.stat().st_size
    with open_compressed(path) as (file, tell):
        for n, line in enumerate(iter(lambda: file.readline(MAX_DOCUMENT + 1), b"")):
            check_size(line, n, path)
            try:
                text = json.loads(line)[column]
            except KeyError:
                raise UserError(f"{path}: document {n:,} has no {column}, but {', '.join(json.loads(line))}") from None
            except (ValueError, TypeError, RecursionError) as e:
                raise UserError(f"{path}: document {n:,} is not a JSON object ({first_line(e)})") from None
            yield replace_surrogates(text), tell() / size


def read_text(path: Path, column: str) -> Iterator[tuple[object, float]]:
    """The same for a text file, which is one document."""
    with open_compressed(path) as (file, _):
        content = file.read(MAX_DOCUMENT + 1)
    check_size(content, 0, path)
    try:
        yield content.decode("utf-8"), 0.0
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text (byte {e.start:,})") from None


def check_size(content: bytes, n: int, path: Path) -> None:
    """Raise UserError if document n is larger than MAX_DOCUMENT, as a few compressed bytes can be."""
    if len(content) > MAX_DOCUMENT:
        raise UserError(f"{path}: document {n:,} has over {MAX_DOCUMENT:,} bytes; split it")


@contextlib.contextmanager
def open_compressed(path: Path) -> Iterator[tuple[io.BufferedIOBase, Callable[[], int]]]:
    """Open a file to read bytes, decompressed if its name ends in .gz or .zst; yield it and its method `tell`."""
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


@contextlib.contextmanager
def hub_errors(dataset: str) -> Iterator[None]:
    """Raise UserError for whatever the hub's clients raise."""
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    what = "--pretokenized" if dataset == PRETOKENIZED else f"--dataset {dataset}"
    try:
        yield
    except UserError:
        raise
    except RepositoryNotFoundError:
        raise UserError(f"{what}: no such data set on the hub, or not open to you") from None
    except Exception as e:  # ValueError: no such name, configuration or split; others: the network, damaged bytes
        if type(e) in (ValueError, HFValidationError):
            raise UserError(f"{what}: {first_line(e)}") from None
        raise UserError(f"{what}: cannot be read from the hub ({first_line(e)})", 4) from None


def read_hub(source: dict, column: str, start: Cursor) -> Iterator[Document]:
    """Stream the documents of a data set on the Hugging Face hub from start on. Raise UserError."""
    from datasets import load_dataset

    name = source["dataset"]
    with hub_errors(name):
        options = dict(name=source["name"], split=source["split"], revision=source["revision"])
        stream = load_dataset(name, **options, streaming=True)
        if stream.column_names and column not in stream.column_names:
            raise UserError(f"--text_column {column}: {name} has {', '.join(stream.column_names)}")
        stream = stream.select_columns([column]).with_format("arrow")
        for i in range(start.file, stream.num_shards):  # source files, not token shards
            tables = stream.shard(stream.num_shards, i).iter(BATCH)
            for n, value in enumerate(value for table in tables for value in table[column]):
                if (i, n) >= (start.file, start.document):
                    text = value.as_py()
                    check_text(text, n, column, f"{name}, file {i:,}")
                    yield Document(i, n, text, i / stream.num_shards)


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
                texts = [document.text for document in batch]
                waiting.append((batch, pool.submit(encoder, texts), sum(map(sys.getsizeof, texts))))
                size += waiting[-1][2]
                while len(waiting) > 4 * num_proc or size > READ_AHEAD:
                    yield waiting[0][0], waiting[0][1].result()
                    size -= waiting.popleft()[2]  # not before: if this one fails, nothing later may follow
        except UserError as e:
            failure = e
        for batch, block, _ in waiting:  # what was read before a failure is kept
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
    """Return a directory's manifest, or a new one. Raise UserError if it was begun with other settings."""
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
        except MemoryError:
            raise UserError(f"--shard_size {settings['shard_size']}: a shard must fit in memory") from None
        self.filled, self.cursor = 0, Cursor()
        self.manifest = open_manifest(directory, settings)
        for shard in self.manifest["shards"]:
            if not (directory / shard["name"]).is_file():
                raise UserError(f"{directory / shard['name']}: is missing; restore it, or use another --out_dir")
        if self.manifest["shards"] and not self.manifest["complete"]:
            try:
                check_types(self.manifest.get("cursor"), file=int, document=int, tokens=int)
            except ValueError as e:
                raise ShardError(f"{directory / 'manifest.json'}: cannot be continued ({e})") from None
            self.cursor = Cursor(**self.manifest["cursor"])

    def describe(self) -> str:
        shards, documents = self.manifest["shards"], self.manifest["documents"]
        return f"{sum(s['tokens'] for s in shards):,} tokens of {documents:,} documents in {len(shards)} shards"

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
            self.directory.mkdir(parents=True, exist_ok=True)
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


# --------------------------------------------------------------------------------------------------------------------
# The script


def prepare(args: "Options") -> None:
    """Read, encode and write documents, from the beginning or from where the manifest says. Raise UserError."""
    if args.limit_tokens is not None and args.limit_tokens <= args.shard_size:
        raise UserError(f"--limit_tokens {args.limit_tokens}: must be more than --shard_size {args.shard_size}")
    if args.files:
        paths = expand(args.files)
        source = dict(files=[[p.name, p.stat().st_size] for p in paths])
        read = partial(read_files, paths)
    else:
        revision = find_revision(args.out_dir, args.dataset)
        name = args.name or ("sample-10BT" if args.dataset == Options.dataset else None)
        source = dict(dataset=args.dataset, name=name, split=args.split, revision=revision)
        read = partial(read_hub, source)
    settings = dict(source=source, text_column=args.text_column, tokenizer=SHA256)
    settings |= dict(shard_size=args.shard_size, limit_tokens=args.limit_tokens)
    out = ShardWriter(args.out_dir, settings)
    if not out.manifest["complete"]:
        if out.manifest["shards"]:
            print(f"{args.out_dir}: continuing after {out.describe()}")
        encode_and_write(read(args.text_column, out.cursor), out, args)
    print(f"{args.out_dir} is complete: {out.describe()}")


def encode_and_write(documents: Iterable[Document], out: ShardWriter, args: "Options") -> None:
    """Write the tokens of documents, which begin at the cursor of out. Raise UserError."""
    fast = find_spec("gigatoken") is not None
    encoder = make_gigatoken() if fast else encode_tiktoken
    print(f"encoding by {'gigatoken, checked against tiktoken' if fast else 'tiktoken; gigatoken would be faster'}")
    limit = args.limit_tokens or sys.maxsize
    skip, n_documents = out.cursor.tokens, out.manifest["documents"]
    first = written = sum(shard["tokens"] for shard in out.manifest["shards"])
    started = time.perf_counter()
    bar_format = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=1.0, bar_format=bar_format, dynamic_ncols=True) as bar:
        for batch, block in encode_in_order(make_batches(documents), encoder, args.num_proc):
            new = block[skip : skip + limit - written]
            out.write(new, Cursor(batch[0].file, batch[0].number, skip), n_documents)
            skip, written = max(0, skip - len(block)), written + len(new)
            n_documents += len(batch)
            speed = (written - first) / (time.perf_counter() - started) / 1e6
            bar.set_postfix_str(f"{written:,} tokens, {speed:.1f}M tok/s", refresh=False)
            bar.update(max(batch[0].done, written / limit) - bar.n)
            if written >= limit:
                break
        out.finish(n_documents)
        bar.update(1 - bar.n)


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
            raise UserError(f"--files {path}: neither .parquet nor .jsonl nor .txt, nor .gz or .zst of these two")
    return paths


def find_revision(out_dir: Path, dataset: str) -> str | None:
    """Return the commit of a data set that out_dir was begun with, or else the newest on the hub. Raise UserError."""
    from huggingface_hub import HfApi

    if (out_dir / "manifest.json").exists():
        return read_manifest(out_dir)["source"].get("revision")
    with hub_errors(dataset):
        return HfApi().dataset_info(dataset).sha


def download(out_dir: Path, n: int | None) -> None:
    """Download shards that others have tokenized: those for validation, and the first n for training or all.

    Keep those that are there already. Verify each by its SHA-256. Raise UserError.
    """
    from huggingface_hub import HfApi

    revision = find_revision(out_dir, PRETOKENIZED)
    manifest = open_manifest(out_dir, dict(source=dict(dataset=PRETOKENIZED, revision=revision), tokenizer=SHA256))
    with hub_errors(PRETOKENIZED):
        info = HfApi().dataset_info(PRETOKENIZED, revision=revision, files_metadata=True)
    sha = {f.rfilename: f.lfs.sha256 for f in info.siblings if is_shard_name(f.rfilename)}
    train = sorted(name for name in sha if split_of(name) == "train")
    names = sorted(name for name in sha if split_of(name) == "val")
    names += [name for i, name in enumerate(train) if n is None or i < n or (out_dir / name).exists()]
    out_dir.mkdir(parents=True, exist_ok=True)
    write_manifest(out_dir, manifest | dict(complete=False))
    shards = []
    for name in tqdm(names, unit="shard"):
        path = out_dir / name
        if not path.exists() or sha256(path) != sha[name]:
            fetch(path, revision, sha[name])
        shards.append(dict(name=name, tokens=len(open_shard(path)), sha256=sha[name]))
    write_manifest(out_dir, manifest | dict(shards=shards, complete=True))
    shutil.rmtree(out_dir / ".download", ignore_errors=True)
    print(f"{out_dir} has {sum(s['tokens'] for s in shards):,} tokens in {len(shards)} shards")


def fetch(path: Path, revision: str, expected: str) -> None:
    """Download one shard, at most three times, until its SHA-256 is as expected. Raise UserError."""
    from huggingface_hub import hf_hub_download

    where = dict(repo_type="dataset", revision=revision, local_dir=path.parent / ".download")
    for attempt in range(3):
        with hub_errors(PRETOKENIZED):
            downloaded = Path(hf_hub_download(PRETOKENIZED, path.name, force_download=attempt > 0, **where))
        if sha256(downloaded) == expected:
            downloaded.replace(path)
            return
    raise UserError(f"{path}: downloaded three times, each time with a wrong SHA-256; try again later", 4)


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
    name: str | None = option(None, "its configuration (default: sample-10BT, or the only one)", metavar="NAME")
    split: str = option("train", "its split", metavar="NAME")
    text_column: str = option("text", "column, or field of .jsonl, that holds the documents", metavar="NAME")
    files: tuple[str, ...] = option((), "local .parquet, .jsonl, .txt, also .gz and .zst, or patterns", metavar="FILE")
    pretokenized: str | None = option(None, f"download N training shards of {PRETOKENIZED}, or all", metavar="N")
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
    if args.verify:
        verify(args.verify)
        return 0
    check_writable(args.out_dir)
    try:
        if n:
            download(args.out_dir, None if n == "all" else int(n))
        else:
            prepare(args)
    except KeyboardInterrupt:
        raise UserError(f"interrupted; {CONTINUE}", 130) from None
    except UserError as e:
        raise UserError(f"{e}; {CONTINUE}" if e.status == 4 else str(e), e.status) from None
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
