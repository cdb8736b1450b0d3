"""Turn documents into token shards, which train_gpt2.py reads.

    python fineweb.py                                      FineWeb-Edu sample-10BT, from the Hugging Face hub
    python fineweb.py --pretokenized 10                    its first 10 shards, tokenized by others
    python fineweb.py --files 'books/*.parquet' --out_dir books    documents of your own
    python fineweb.py --files 'de/*.txt' --out_dir german --train_tokenizer 16384  with a vocabulary of their own
    python fineweb.py --part 3/16                          the third of 16 parts, on as many machines
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
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from runtime import shards
from runtime.files import write_atomically
from runtime.options import option, parse_options
from tokens import VOCAB_SIZE, Tokenizer, gpt2_tokenizer, sha256

OUT_DIR = Path(__file__).resolve().parent / "edu_fineweb10B"
PRETOKENIZED = "kjj0/finewebedu10B-gpt2"
CONTINUE = "the same command continues after the last complete shard"
MAX_DOCUMENT = 2**30  # bytes, decompressed
BATCH, BATCH_BYTES = 256, 2**22  # a batch of documents, encoded together, ends at either
READ_AHEAD = 2**26  # bytes of text that wait for an encoder
TRAINING_DOCUMENTS = 50_000  # from which a tokenizer is trained: the first ones of the source


class Cursor(NamedTuple):
    """Where to continue: from this document of this source file on, `tokens` tokens are already written."""

    file: int = 0
    document: int = 0
    tokens: int = 0


class Batch(NamedTuple):
    """Documents that are encoded together, where they start, and their size in bytes."""

    start: Cursor
    texts: list[str]
    size: int


def read_batches(files: list[Iterator[str]], start: Cursor) -> Iterator[Batch]:
    """Yield the documents of the source's files from start on, in batches which end at BATCH or BATCH_BYTES."""
    texts, size = [], 0
    for i in range(start.file, len(files)):
        for n, text in enumerate(files[i]):
            if (i, n) < (start.file, start.document):
                continue
            if not texts:
                first = Cursor(i, n)
            texts.append(text)
            size += sys.getsizeof(text)
            if len(texts) == BATCH or size >= BATCH_BYTES:
                yield Batch(first, texts, size)
                texts, size = [], 0
    if texts:
        yield Batch(first, texts, size)


def check_texts(documents: Iterator[object], column: str, source: str) -> Iterator[str]:
    """Yield documents. Raise UserError if one is not text."""
    for n, text in enumerate(documents):
        if not isinstance(text, str):
            raise UserError(f"{source}: document {n:,} has {repr(text)[:80]} in {column}, which is not text")
        yield text


def find_reader(path: Path) -> Callable[[Path, str], Iterator[object]] | None:
    """Return the reader of a file by the end of its name, or None."""
    if path.suffix == ".parquet":
        return read_parquet
    kind = Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix
    return {".jsonl": read_jsonl, ".json": read_jsonl, ".txt": read_text}.get(kind)


def read_parquet(path: Path, column: str) -> Iterator[object]:
    """Yield each document of a file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise UserError(f"{path}: has no column {column}, but {', '.join(names)}")
            batches = file.iter_batches(BATCH, columns=[column])
            for n, value in enumerate(value for batch in batches for value in batch.column(0)):  # noqa: B007
                yield value.as_py()
    except UnicodeDecodeError:
        raise UserError(f"{path}: document {n:,} has no UTF-8 text in {column}") from None
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{path}: cannot be read as parquet ({first_line(e)})") from None


def read_jsonl(path: Path, column: str) -> Iterator[object]:
    """The same for lines of JSON."""
    for n, line in enumerate(read_bytes(path, by_line=True)):
        try:
            text = json.loads(line)[column]
        except KeyError:
            raise UserError(f"{path}: document {n:,} has no {column}, but {', '.join(json.loads(line))}") from None
        except (ValueError, TypeError, RecursionError) as e:
            raise UserError(f"{path}: document {n:,} is not a JSON object ({first_line(e)})") from None
        if isinstance(text, str) and not text.isascii():
            # JSON may hold halves of surrogate pairs, UTF-8 cannot: replace them by U+FFFD, as tiktoken does.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield text


def read_text(path: Path, column: str) -> Iterator[object]:
    """The same for a text file, which is one document."""
    for content in read_bytes(path, by_line=False):
        try:
            yield content.decode("utf-8")
        except UnicodeDecodeError as e:
            raise UserError(f"{path}: not UTF-8 text (byte {e.start:,})") from None


def read_bytes(path: Path, by_line: bool) -> Iterator[bytes]:
    """Yield the lines of a file, or all of it, decompressed if .gz or .zst. Raise UserError if over MAX_DOCUMENT."""
    import pyarrow as pa

    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    limit = MAX_DOCUMENT + 1
    try:
        with io.BufferedReader(pa.input_stream(str(path), compression)) as file:
            for n, content in enumerate(iter(lambda: file.readline(limit), b"") if by_line else [file.read(limit)]):
                if len(content) > MAX_DOCUMENT:
                    raise UserError(f"{path}: document {n:,} has over {MAX_DOCUMENT:,} bytes; split it")
                yield content
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({first_line(e)})") from None


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


def open_dataset(dataset: str, name: str | None, split: str, revision: str, column: str) -> list[Iterator[str]]:
    """Return the files of a data set on the Hugging Face hub, which are streamed. Raise UserError."""
    from datasets import load_dataset

    with hub_errors(dataset):
        stream = load_dataset(dataset, name, split=split, revision=revision, streaming=True)
        if stream.column_names and column not in stream.column_names:
            raise UserError(f"--text_column {column}: {dataset} has {', '.join(stream.column_names)}")
        stream = stream.select_columns([column]).with_format("arrow")
        n_files = stream.num_shards  # not token shards

    def read(i: int) -> Iterator[object]:
        with hub_errors(dataset):
            for table in stream.shard(n_files, i).iter(BATCH):
                yield from table[column].to_pylist()

    return [check_texts(read(i), column, f"{dataset}, file {i:,}") for i in range(n_files)]


def encode_tiktoken(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Return <|endoftext|> and the tokens of a document, for each of them: (n,) of uint16."""
    return np.concatenate([tokenizer.encode_document(text) for text in texts])


def make_gigatoken(tokenizer: Tokenizer) -> Callable[[list[str]], np.ndarray]:
    """Return the same by gigatoken, many times as fast, checked against tiktoken on the first document of a batch."""
    import gigatoken

    ranks = tokenizer.encoding._mergeable_ranks.items()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "gpt2.tiktoken"
        path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks))
        fast = gigatoken.Tokenizer.from_tiktoken(path, pretokenizer="gpt2", special_tokens={})

    def encode_gigatoken(texts: list[str]) -> np.ndarray:
        layout = fast.encode_batch(texts, parallel=False).layout
        block = np.insert(layout.content.data.astype(np.uint16), layout.offsets.data[:-1], tokenizer.end_of_text)
        expected = encode_tiktoken(tokenizer, texts[:1])
        if not np.array_equal(block[: len(expected)], expected):
            raise UserError(f"gigatoken differs from tiktoken on {texts[0][:80]!r}…; uninstall it, and report this", 1)
        return block

    return encode_gigatoken


def encode_in_order(batches: Iterator[Batch], encoder: Callable, num_proc: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yield each batch and its tokens, in order. At most READ_AHEAD bytes of text, and one batch, wait for a thread."""
    with ThreadPoolExecutor(num_proc) as pool:  # encoders release the interpreter's lock
        waiting, size = deque(), 0
        for batch in batches:
            waiting.append((batch, pool.submit(encoder, batch.texts)))
            size += batch.size
            while len(waiting) > 4 * num_proc or size > READ_AHEAD:
                first, block = waiting.popleft()
                size -= first.size
                yield first, block.result()
        for first, block in waiting:
            yield first, block.result()


def open_manifest(directory: Path, settings: dict) -> dict:
    """Return a directory's manifest, or a new one. Raise UserError if it was begun with other settings."""
    if not (directory / "manifest.json").exists():
        if shards.find_shards(directory):
            raise UserError(f"{directory}: holds shards but no manifest.json to continue from; use another --out_dir")
        return dict(settings, shards=[], documents=0, complete=False)
    manifest = shards.read_manifest(directory)
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
        self.filled = 0  # tokens in the buffer
        self.first_split = "val" if (settings["part"] or "1/1").startswith("1/") else "train"
        self.manifest = open_manifest(directory, settings)
        self.cursor = Cursor(**self.manifest.get("cursor", {}))
        for shard in self.manifest["shards"]:
            if not (directory / shard["name"]).is_file():
                raise UserError(f"{directory / shard['name']}: is missing; restore it, or use another --out_dir")

    def describe(self) -> str:
        written, documents = self.manifest["shards"], self.manifest["documents"]
        return f"{sum(s['tokens'] for s in written):,} tokens of {documents:,} documents in {len(written)} shards"

    def write(self, tokens: np.ndarray, cursor: Cursor, documents: int) -> None:
        """Add tokens, which follow the cursor, to the stream; `documents` lie before the cursor."""
        while len(tokens):
            if self.filled == len(self.buffer):  # only now: the last shard is written by `finish`
                self.flush(documents=documents, complete=False, cursor=cursor._asdict())
            part = tokens[: len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            cursor = cursor._replace(tokens=cursor.tokens + len(part))
            tokens = tokens[len(part) :]

    def flush(self, **state) -> None:
        """Write the buffer as the next shard, and then the manifest that names it."""
        written = self.manifest["shards"]
        name = f"edufineweb_{'train' if written else self.first_split}_{len(written):06d}.npy"
        if not written:
            self.directory.mkdir(parents=True, exist_ok=True)
            shards.write_manifest(self.directory, self.manifest)
        shards.write_shard(self.directory / name, self.buffer[: self.filled])
        shard = dict(name=name, tokens=self.filled, sha256=sha256(self.directory / name))
        self.manifest = dict(self.settings, shards=[*written, shard], **state)
        shards.write_manifest(self.directory, self.manifest)
        self.filled = 0

    def finish(self, documents: int) -> None:
        """Write the last shard and mark the manifest complete."""
        if not self.manifest["shards"] and (self.first_split == "val" or not self.filled):
            hint = f"try --shard_size {max(1, self.filled // 10)}" if self.filled > 1 else "is the source empty?"
            raise UserError(f"{self.filled:,} tokens leave none to train on at --shard_size {len(self.buffer)}; {hint}")
        if not self.filled:
            raise UserError(f"{self.directory}: no tokens are left to continue with; has the source changed?")
        self.flush(documents=documents, complete=True)


def prepare(args: "Options") -> None:
    """Read, encode and write documents, from the beginning or from where the manifest says. Raise UserError."""
    if args.limit_tokens is not None and args.limit_tokens <= args.shard_size:
        raise UserError(f"--limit_tokens {args.limit_tokens}: must be more than --shard_size {args.shard_size}")
    if args.files:
        paths = expand(args.files)
        source = dict(files=[[p.name, p.stat().st_size] for p in paths])
    else:
        name = args.name or ("sample-10BT" if args.dataset == Options.dataset else None)
        source = dict(dataset=args.dataset, name=name, split=args.split)
        source["revision"] = find_revision(args.out_dir, args.dataset)
    i, n = map(int, (args.part or "1/1").split("/"))

    def open_files() -> list[Iterator[str]]:
        if args.files:
            files = [check_texts(find_reader(p)(p, args.text_column), args.text_column, str(p)) for p in paths]
        else:
            files = open_dataset(**source, column=args.text_column)
        if n > len(files):
            raise UserError(f"--part {args.part}: the source has {len(files):,} files, so there can be no more parts")
        return files

    tokenizer = find_tokenizer(args, open_files)
    settings = dict(source=source, text_column=args.text_column, tokenizer=tokenizer.sha256)
    settings |= dict(shard_size=args.shard_size, limit_tokens=args.limit_tokens, part=args.part)
    out = ShardWriter(args.out_dir, settings)
    if not out.manifest["complete"]:
        if out.manifest["shards"]:
            print(f"{args.out_dir}: continuing after {out.describe()}")
        encode_and_write(open_files()[i - 1 :: n], tokenizer, out, args)
    print(f"{args.out_dir} is complete: {out.describe()}")


def find_tokenizer(args: "Options", open_files: Callable[[], list[Iterator[str]]]) -> Tokenizer:
    """Return the tokenizer in out_dir or, for a part, the directory above; without one, what --train_tokenizer learns
    from the source's first documents, the same for all parts; or else GPT-2's. Raise UserError."""
    size, directory = args.train_tokenizer, args.out_dir
    places = [directory, directory.parent] if args.part else [directory]
    try:
        tokenizer = next((Tokenizer.load(place) for place in places if (place / "merges.txt").exists()), None)
        if size and tokenizer is None:
            print(f"training a tokenizer, on the first {TRAINING_DOCUMENTS:,} documents at most")
            documents = itertools.islice(itertools.chain.from_iterable(open_files()), TRAINING_DOCUMENTS)
            tokenizer = Tokenizer.train(documents, size)
    except ValueError as e:
        raise UserError(f"--train_tokenizer {size}: {e}" if size else f"--out_dir {directory}: {e}") from None
    if tokenizer is None:
        return gpt2_tokenizer()
    if size not in (None, tokenizer.vocab_size):
        raise UserError(f"--train_tokenizer {size}: {directory} has a tokenizer of {tokenizer.vocab_size}")
    if not (directory / "merges.txt").exists():
        if shards.find_shards(directory):
            raise UserError(f"--out_dir {directory}: holds shards of GPT-2's vocabulary; use another")
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in tokenizer.files.items():  # merges.txt, which is looked for, comes last
            with write_atomically(directory / name) as f:
                f.write(content)
    return tokenizer


def encode_and_write(files: list[Iterator[str]], tokenizer: Tokenizer, out: ShardWriter, args: "Options") -> None:
    """Write the tokens of the documents from the cursor of out on. Raise UserError."""
    fast = find_spec("gigatoken") is not None
    encoder = make_gigatoken(tokenizer) if fast else partial(encode_tiktoken, tokenizer)
    print(f"encoding by {'gigatoken, checked against tiktoken' if fast else 'tiktoken; gigatoken would be faster'}")
    limit = args.limit_tokens or sys.maxsize
    skip, n_documents = out.cursor.tokens, out.manifest["documents"]
    written = sum(shard["tokens"] for shard in out.manifest["shards"])
    with tqdm(total=args.limit_tokens, initial=written, unit="tok", unit_scale=True, dynamic_ncols=True) as bar:
        for batch, block in encode_in_order(read_batches(files, out.cursor), encoder, args.num_proc):
            new = block[skip : skip + limit - written]
            out.write(new, batch.start._replace(tokens=skip), n_documents)
            skip, written = max(0, skip - len(block)), written + len(new)
            n_documents += len(batch.texts)
            bar.set_postfix_str(f"source file {batch.start.file + 1:,} of {len(files):,}", refresh=False)
            if batch.start.file and not args.limit_tokens:  # as if all source files had as many tokens
                bar.total = written * len(files) // batch.start.file
            bar.update(len(new))
            if written >= limit:
                break
        out.finish(n_documents)


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

    for directory in (out_dir, *sorted(out_dir.parent.glob("part-*-of-*"))):  # or that other parts were begun with
        if (directory / "manifest.json").exists():
            source = shards.read_manifest(directory)["source"]
            if directory == out_dir or source.get("dataset") == dataset:
                return source.get("revision")
    with hub_errors(dataset):
        return HfApi().dataset_info(dataset).sha


def download(out_dir: Path, n: int | None) -> None:
    """Download tokenized shards that are not there yet: for validation all, for training n or all. Raise UserError."""
    from huggingface_hub import HfApi, hf_hub_download

    revision = find_revision(out_dir, PRETOKENIZED)
    source = dict(dataset=PRETOKENIZED, revision=revision)
    manifest = open_manifest(out_dir, dict(source=source, tokenizer=gpt2_tokenizer().sha256))
    with hub_errors(PRETOKENIZED):
        info = HfApi().dataset_info(PRETOKENIZED, revision=revision, files_metadata=True)
    sha = {f.rfilename: f.lfs.sha256 for f in info.siblings if shards.is_shard_name(f.rfilename)}
    train = sorted(name for name in sha if shards.split_of(name) == "train")
    names = sorted(name for name in sha if shards.split_of(name) == "val")
    names += [name for i, name in enumerate(train) if n is None or i < n or (out_dir / name).exists()]
    out_dir.mkdir(parents=True, exist_ok=True)
    shards.write_manifest(out_dir, manifest | dict(shards=[], complete=False))
    temporary, done = out_dir / ".download", []
    for name in tqdm(names, unit="shard"):
        path = out_dir / name
        if not path.exists() or sha256(path) != sha[name]:
            with hub_errors(PRETOKENIZED):
                hf_hub_download(PRETOKENIZED, name, repo_type="dataset", revision=revision, local_dir=temporary)
            if sha256(temporary / name) != sha[name]:
                (temporary / name).unlink()
                raise UserError(f"{path}: its download has a wrong SHA-256; try again later", 4)
            (temporary / name).replace(path)
        done.append(dict(name=name, tokens=len(shards.open_shard(path)), sha256=sha[name]))
    shards.write_manifest(out_dir, manifest | dict(shards=done, complete=True))
    shutil.rmtree(temporary, ignore_errors=True)
    print(f"{out_dir} has {sum(shard['tokens'] for shard in done):,} tokens in {len(done)} shards")


def verify(directory: Path) -> None:
    """Compare the shards of a directory, or of its parts, with the manifest's SHA-256. Raise UserError naming all that
    differs."""
    for part in shards.find_parts(directory):
        shards.read_manifest(part)  # before hashing for minutes
        found = {p.name: sha256(p) for p in tqdm(shards.find_shards(part), unit="shard") if p.is_file()}
        shards.check_manifest(part, found, "sha256")
        print(f"{part}: all {len(found)} shards are as written")


@dataclass(frozen=True)
class Options:
    dataset: str = option("HuggingFaceFW/fineweb-edu", "data set on the Hugging Face hub", metavar="NAME")
    name: str | None = option(None, "its configuration (default: sample-10BT, or the only one)", metavar="NAME")
    split: str = option("train", "its split", metavar="NAME")
    text_column: str = option("text", "column, or field of .jsonl, that holds the documents", metavar="NAME")
    files: tuple[str, ...] = option((), "local .parquet, .jsonl, .txt, also .gz and .zst, or patterns", metavar="FILE")
    pretokenized: str | None = option(None, f"download N training shards of {PRETOKENIZED}, or all", metavar="N")
    verify: Path | None = option(None, "compare a directory with its manifest, and do nothing else", metavar="DIR")
    out_dir: Path = option(OUT_DIR, "directory for the shards", metavar="DIR")
    shard_size: int = option(100_000_000, "tokens per shard", low=1, metavar="N")
    train_tokenizer: int | None = option(None, "learn a vocabulary of N tokens", low=257, high=VOCAB_SIZE, metavar="N")
    part: str | None = option(None, "part i of N of the source's files, into its own directory", metavar="i/N")
    num_proc: int = option(os.cpu_count(), "number of encoder threads", low=1, high=1024, metavar="N")
    limit_tokens: int | None = option(None, "stop after N tokens (default: at the end)", low=1, metavar="N")


def main(argv: list[str] | None = None) -> int:
    """Prepare, download or verify shards. Raise UserError."""
    args = Options(**parse_options(Options, argv, __doc__))
    n = args.pretokenized
    if n not in (None, "all") and not (n.isdecimal() and int(n) > 0):
        raise UserError(f"--pretokenized {n}: must be a number of shards, or all")
    if n and (args.part or args.train_tokenizer):
        raise UserError("--pretokenized: these shards are ready, without --part and --train_tokenizer")
    if sum(map(bool, (args.files, args.pretokenized, args.verify))) > 1:
        raise UserError("--files, --pretokenized and --verify: give one of them")
    if args.verify:
        verify(args.verify)
        return 0
    if args.part:
        args = replace(args, out_dir=args.out_dir / shards.part_name(args.part))
    try:  # before hours of work
        existing = next(p for p in (args.out_dir, *args.out_dir.absolute().parents) if p.exists())
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as e:
        raise UserError(f"--out_dir {args.out_dir}: cannot be written to ({e.strerror})") from None
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
