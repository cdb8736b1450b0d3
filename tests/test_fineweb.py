"""fineweb.py against a straightforward loop over the documents, killed at random moments, and over a small hub."""

from errors import run_script
import contextlib
import errno
import gzip
import io
import json
import os
import random
import shutil
import signal
import subprocess
import time
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer

import fineweb
import tokens
from conftest import ENVIRONMENT, ROOT, command, run, run_in_process
from hub import REVISION, Hub
from runtime import shards

BOOKS = ROOT.parent / "shared/data/books"
ENCODERS = {
    "tiktoken": lambda tokenizer: partial(fineweb.encode_tiktoken, tokenizer),
    "gigatoken": fineweb.make_gigatoken,
}


@lru_cache
def bpe() -> ByteLevelBPETokenizer:
    """GPT-2's byte-pair encoding by `tokenizers`, which shares no code with tiktoken or gigatoken."""
    return ByteLevelBPETokenizer(str(ROOT / "assets/vocab.json"), str(ROOT / "assets/merges.txt"))


def shards_of(texts: list[str], shard_size: int) -> dict[str, bytes]:
    """What the files must be, byte for byte: the shards of build-nanogpt, <|endoftext|> before each document."""
    stream = []
    for text in texts:
        stream += [50256] + bpe().encode(text).ids
    files = {}
    for number, start in enumerate(range(0, len(stream), shard_size)):
        file = io.BytesIO()
        np.save(file, np.array(stream[start : start + shard_size], dtype=np.uint16))
        files[f"edufineweb_{'val' if number == 0 else 'train'}_{number:06d}.npy"] = file.getvalue()
    return files


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def shard_files(directory: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(directory).items() if name.endswith(".npy")}


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """1,500 documents from a novelist's day's work to a single word, and some that are empty."""
    rng = random.Random(0)
    text = (ROOT / "input.txt").read_text()
    texts = ["", "word", "<|endoftext|>", "naïve — 東京 🙂‍↔️\x00\t \n\n", "x" * 5000]
    for _ in range(1495):
        start = rng.randrange(len(text) - 3000)
        texts.append(text[start : start + rng.choice([0, 20, 300, 1000, 3000])])
    return texts


@pytest.fixture(scope="module")
def parquet(documents, tmp_path_factory) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    directory = tmp_path_factory.mktemp("parquet")
    for i in range(3):
        part = documents[i * 500 : (i + 1) * 500]
        table = pa.table({"id": list(range(500)), "text": part})
        pq.write_table(table, directory / f"part-{i}.parquet", row_group_size=170)
    return directory


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("num_proc, shard_size", [(1, 100_000), (2, 7_001), (4, 1_000)])
def test_equals_a_straightforward_loop(tmp_path, parquet, documents, monkeypatch, encoder, num_proc, shard_size):
    if encoder == "tiktoken":
        monkeypatch.setattr(fineweb, "find_spec", lambda name: None)
    flags = "--files", f"{parquet}/*.parquet", "--out_dir", tmp_path / "out", "--shard_size", shard_size
    assert fineweb.main([str(f) for f in (*flags, "--num_proc", num_proc)]) == 0
    expected = shards_of(documents, shard_size)
    assert shard_files(tmp_path / "out") == expected
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["complete"] and manifest["documents"] == 1500 and len(manifest["shards"]) == len(expected)
    assert fineweb.main(["--verify", str(tmp_path / "out")]) == 0


def test_jsonl_gz_zst_and_txt(tmp_path, documents):
    import pyarrow as pa

    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents[:600])
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as f:
        f.write(lines)
    with pa.CompressedOutputStream(str(tmp_path / "c.jsonl.zst"), "zstd") as f:
        f.write(lines.encode())
    (tmp_path / "d.txt").write_text("One document,\nof two lines.")
    flags = "--files", tmp_path / "*.jsonl*", tmp_path / "d.txt", "--out_dir", tmp_path / "out", "--shard_size", 9999
    assert fineweb.main([str(f) for f in flags]) == 0
    texts = documents[:600] * 3 + ["One document,\nof two lines."]
    assert shard_files(tmp_path / "out") == shards_of(texts, 9999)


def test_limit_tokens(tmp_path, parquet, documents):
    flags = "--files", f"{parquet}/*.parquet", "--out_dir", tmp_path, "--shard_size", 5000, "--limit_tokens", 12345
    assert fineweb.main([str(f) for f in flags]) == 0
    lengths = [len(np.load(p)) for p in sorted(tmp_path.glob("*.npy"))]
    assert sum(lengths) == 12345
    expected = shards_of(documents, 5000)
    assert (tmp_path / "edufineweb_train_000001.npy").read_bytes() == expected["edufineweb_train_000001.npy"]


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments_change_no_byte(tmp_path, parquet, kills):
    """Slowed down by many small shards, each of which is flushed to the disk."""
    flags = "--files", f"{parquet}/*.parquet", "--shard_size", 800, "--num_proc", 2
    run("fineweb.py", *flags, "--out_dir", tmp_path / "uncut")
    rng, killed = random.Random(kills), 0
    target = len(contents(tmp_path / "uncut"))
    while killed < kills:
        process = subprocess.Popen(
            command("fineweb.py", *flags, "--out_dir", tmp_path / "cut"),
            env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        # Let it write a fraction of the shards that are left, then kill it at any moment.
        have = len(list((tmp_path / "cut").glob("*.npy"))) if (tmp_path / "cut").exists() else 0
        goal = have + max(1, (target - have) // (kills - killed + 1))
        while process.poll() is None and (
            not (tmp_path / "cut").exists() or len(list((tmp_path / "cut").glob("*.npy"))) < goal
        ):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        process.kill()
        process.wait()
        killed += 1
        for path in (tmp_path / "cut").glob("*.npy"):  # a shard is complete or absent
            assert path.read_bytes() == (tmp_path / "uncut" / path.name).read_bytes()
    done = run("fineweb.py", *flags, "--out_dir", tmp_path / "cut")
    assert "continuing after" in done.stdout
    assert contents(tmp_path / "cut") == contents(tmp_path / "uncut")


class Killed(BaseException):
    """What stands for SIGKILL: after it no file is touched any more."""


@pytest.fixture
def few(documents, tmp_path_factory, monkeypatch) -> list[str]:
    """Flags for four shards, the last of which is short, that are encoded at once."""
    path = tmp_path_factory.mktemp("few") / "few.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[:20]))
    tokens_each = sum(len(bpe().encode(text).ids) + 1 for text in documents[:20]) // 4 + 3
    encoding = tokens.gpt2_tokenizer().encoding
    monkeypatch.setattr(tokens.Tokenizer, "encoding", encoding)
    monkeypatch.setattr(fineweb, "find_spec", lambda name: None)
    monkeypatch.setattr(fineweb, "BATCH", 3)
    return ["--files", str(path), "--shard_size", str(tokens_each), "--out_dir"]


@contextlib.contextmanager
def killed(owner, name: str, n: int, after: bool):
    """Kill the process at call n of a function, before or after it."""
    calls, function, unlink = 0, getattr(owner, name), Path.unlink

    def wrapper(*args):
        nonlocal calls
        calls += 1
        result = function(*args) if calls < n or after else None
        if calls >= n:
            raise Killed
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, wrapper)
        patch.setattr(Path, "unlink", lambda *args, **kwargs: calls < n and unlink(*args, **kwargs))
        yield


RENAMES = 9  # the empty manifest, and each of four shards and the manifest that names it


@pytest.mark.parametrize("after", [False, True])
def test_death_at_any_rename_is_harmless(tmp_path, few, after):
    assert fineweb.main([*few, str(tmp_path / "uncut")]) == 0
    uncut = contents(tmp_path / "uncut")
    assert len(uncut) == 1 + 4
    for n in range(1, RENAMES + 1):
        out = tmp_path / f"killed-{n}"
        with killed(Path, "replace", n, after):
            fineweb.main([*few, str(out)])
        assert fineweb.main([*few, str(out)]) == 0
        assert contents(out) == uncut, f"rename {n}"
    with pytest.raises(pytest.fail.Exception), killed(Path, "replace", RENAMES + 1, after):
        fineweb.main([*few, str(tmp_path / "no more")])


def test_death_while_hashing_is_harmless(tmp_path, few):
    assert fineweb.main([*few, str(tmp_path / "uncut")]) == 0
    with killed(fineweb, "sha256", 1, False):
        fineweb.main([*few, str(tmp_path / "out")])
    assert fineweb.main([*few, str(tmp_path / "out")]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "uncut")


def test_a_full_disk_then_the_same_command(tmp_path, few, capsys):
    """At each write of a preparation, the first and the last manifest included."""
    assert fineweb.main([*few, str(tmp_path / "uncut")]) == 0
    uncut = contents(tmp_path / "uncut")
    for n in range(RENAMES):
        writes = iter([True] * n)

        def fsync(fd, writes=writes):
            if not next(writes, False):
                raise OSError(errno.ENOSPC, "No space left on device")

        out = tmp_path / f"full-{n}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            line = refuse(capsys, *few, out, status=4)
        assert "cannot be written (No space left on device); the same command continues after" in line
        assert not list(out.glob("*.partial"))
        assert fineweb.main([*few, str(out)]) == 0
        assert contents(out) == uncut, f"write {n}"


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_interrupted_politely(tmp_path, parquet, number, status):
    flags = "--files", f"{parquet}/*.parquet", "--shard_size", 20_000, "--out_dir", tmp_path / "out"
    script = tmp_path / "interrupted.py"  # when the third shard is written
    script.write_text(
        f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import fineweb
from errors import run_script
from runtime import shards

def write_shard(path, tokens, write=shards.write_shard):
    write(path, tokens)
    if path.name == "edufineweb_train_000003.npy":
        os.kill(os.getpid(), {number:d})

shards.write_shard = write_shard
sys.exit(run_script(fineweb.main))
"""
    )
    process = subprocess.Popen(command(script, *flags), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    assert process.communicate()[1].endswith("last complete shard\n") == (number == signal.SIGINT)
    assert process.returncode == status
    for out in "out", "uncut":
        assert fineweb.main([*map(str, flags[:-1]), str(tmp_path / out)]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "uncut")


# The two encoders

anything = st.text(st.characters(), max_size=60) | st.sampled_from(
    [
        "",
        " " * 300,
        "a" * 3000,
        "\n\n \t\r\n",
        "🙂‍↔️👩‍👩‍👧",
        "<|endoftext|>",
        "\ud800",
        "\udc00\ud800",
        "1234567890" * 30,
        "don't WE'LL'll",
    ]
)


def without_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@pytest.fixture(scope="module")
def fast():
    return fineweb.make_gigatoken(tokens.gpt2_tokenizer())


@settings(max_examples=400, deadline=None)
@given(texts=st.lists(st.lists(anything, max_size=4).map("".join).map(without_surrogates), min_size=1, max_size=5))
def test_both_encoders_are_gpt2_s(fast, texts):
    expected = [i for text in texts for i in [50256] + bpe().encode(text).ids]
    assert fineweb.encode_tiktoken(tokens.gpt2_tokenizer(), texts).tolist() == expected
    assert fast(texts).tolist() == expected


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(), max_size=20))
def test_surrogates_are_replaced_as_by_tiktoken(tmp_path, text):
    (tmp_path / "text.jsonl").write_text(json.dumps(dict(text=text)))
    (found,) = fineweb.read_jsonl(tmp_path / "text.jsonl", "text")
    encode = tokens.gpt2_tokenizer().encoding.encode_ordinary
    assert encode(found) == encode(text)


def test_a_difference_between_the_encoders_stops_the_run(tmp_path, parquet, monkeypatch, capsys):
    original = fineweb.encode_tiktoken
    monkeypatch.setattr(fineweb, "encode_tiktoken", lambda *args: original(*args)[::-1])
    flags = "--files", f"{parquet}/part-1.parquet", "--out_dir", tmp_path / "out", "--shard_size", 1000
    assert run_script(fineweb.main, [str(f) for f in flags]) == 1
    assert "gigatoken differs from tiktoken on" in capsys.readouterr().err


@pytest.mark.parametrize("fails", [2, 29])
def test_nothing_is_written_after_a_batch_that_fails(fails):
    """Else the same command would continue after it, and leave a hole."""

    def encode(texts):
        if texts == [str(fails)]:
            raise fineweb.UserError("no")
        return texts

    batches, written = (fineweb.Batch(fineweb.Cursor(0, i), [str(i)], 50) for i in range(30)), []
    with pytest.raises(fineweb.UserError, match="no"):
        for _, block in fineweb.encode_in_order(batches, encode, 2):
            written += block
    assert written == [str(i) for i in range(fails)]


def test_read_ahead_is_bounded_in_bytes():
    """64 MiB and one batch, whatever the number of threads."""
    read = encoded = most = 0

    def documents():
        nonlocal read, most
        for i in range(600):
            yield chr(97 + i % 26) * 500_000
            read += 500_000
            most = max(most, read - encoded)

    batches = fineweb.read_batches([documents()], fineweb.Cursor())
    for batch, _ in fineweb.encode_in_order(batches, lambda texts: np.zeros(1), 64):
        encoded += sum(map(len, batch.texts))
    assert read == encoded == 600 * 500_000
    assert 32 * 2**20 < most <= fineweb.READ_AHEAD + 2 * (fineweb.BATCH_BYTES + 500_000)


def test_batches_are_bounded_in_documents_and_bytes():
    documents = ["x" * size for size in [1] * 600 + [3_000_000] * 3 + [1] * 3]
    files = documents[:300], documents[300:600], documents[600:]
    batches = list(fineweb.read_batches(files, fineweb.Cursor()))
    assert [len(batch.texts) for batch in batches] == [256, 256, 90, 4]
    assert [batch.start for batch in batches] == [(0, 0, 0), (0, 256, 0), (1, 212, 0), (2, 2, 0)]
    (rest,) = fineweb.read_batches(files, fineweb.Cursor(2, 2, 7))
    assert rest.start == (2, 2, 0) and rest.texts == batches[3].texts


# The hub, as a small server on loopback

IMPATIENT = """
import sys, time
sys.path.insert(0, {root!r})
import datasets.config
datasets.config.STREAMING_READ_MAX_RETRIES = 2
time.sleep = lambda seconds: None  # between the retries of the hub's client
import fineweb
fineweb.BATCH = 32  # what is read and not yet encoded is lost with the connection
from errors import run_script
sys.exit(run_script(fineweb.main))
"""


@pytest.fixture
def hub(parquet, tmp_path):
    files = {f"data/train-0000{i}-of-00003.parquet": p.read_bytes() for i, p in enumerate(sorted(parquet.iterdir()))}
    rng = np.random.default_rng(0)
    ready = {}
    for name in "val_000000", "train_000001", "train_000002", "train_000003":
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, 5000
        ids = rng.integers(0, 50257, 5000).astype("<u2")
        ready[f"finewebedu_{name}.bin"] = header.tobytes() + ids.tobytes()
    hub = Hub({"some/documents": files, fineweb.PRETOKENIZED: ready})
    yield hub
    hub.close()


@pytest.fixture
def from_hub(hub, tmp_path):
    script = tmp_path / "fineweb_impatient.py"
    script.write_text(IMPATIENT.format(root=str(ROOT)))
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return lambda *flags, status=0: run(script, *flags, status=status, env=env)


def test_a_data_set_on_the_hub(tmp_path, from_hub, documents):
    flags = "--dataset", "some/documents", "--out_dir", tmp_path / "out", "--shard_size", 30_000
    from_hub(*flags)
    assert shard_files(tmp_path / "out") == shards_of(documents, 30_000)
    source = json.loads((tmp_path / "out/manifest.json").read_text())["source"]
    assert source == dict(dataset="some/documents", name=None, split="train", revision=REVISION)


def test_same_command_continues_after_a_cut_connection(tmp_path, hub, from_hub, documents):
    flags = "--dataset", "some/documents", "--out_dir", tmp_path / "out", "--shard_size", 30_000
    hub.faults["data/train-00002-of-00003.parquet"] = "cut"
    done = from_hub(*flags, status=4)
    line = done.stderr.splitlines()[-1]
    assert line.startswith("fineweb.py: error: --dataset some/documents: ") and "the same command continues" in line
    before = shard_files(tmp_path / "out")
    assert 2 < len(before) < len(shards_of(documents, 30_000))
    hub.faults.clear()
    hub.requests.clear()
    hub.newest = "f" * 40  # a new commit, which is not what was begun
    done = from_hub(*flags)
    assert "continuing after" in done.stdout
    assert shard_files(tmp_path / "out") == shards_of(documents, 30_000)
    # Of the first file nothing is read again but its schema, for which `datasets` asks once.
    assert sum("GET" in r and "train-00000-of" in r for r in hub.requests) == 1


@pytest.mark.parametrize("damaged", [slice(100, 50_000), slice(-8, None)])
def test_damaged_bytes_from_the_hub_are_exit_4(tmp_path, hub, from_hub, damaged):
    """In a page OSError is raised, in the file's end ValueError."""
    name = "data/train-00001-of-00003.parquet"
    content = bytearray(hub.datasets["some/documents"][name])
    content[damaged] = bytes(len(content[damaged]))
    hub.faults[name] = bytes(content)
    done = from_hub("--dataset", "some/documents", "--out_dir", tmp_path / "out", "--shard_size", 30_000, status=4)
    line = done.stderr.splitlines()[-1]
    assert line.startswith("fineweb.py: error: --dataset some/documents: ") and "the same command continues" in line


@pytest.mark.parametrize(
    "flags, status, message",
    [
        (["--dataset", "a b"], 2, "--dataset a b: "),
        (["--dataset", "no/such"], 2, "--dataset no/such: no such data set on the hub"),
        (
            ["--dataset", "some/documents", "--text_column", "body"],
            2,
            "--text_column body: some/documents has id, text",
        ),
        (["--dataset", "some/documents", "--split", "dev"], 2, "--dataset some/documents: "),
        (["--dataset", "some/documents", "--name", "dev"], 2, "--dataset some/documents: "),
    ],
)
def test_wrong_data_sets(tmp_path, from_hub, flags, status, message):
    done = from_hub(*flags, "--out_dir", tmp_path / "out", "--shard_size", 1000, status=status)
    line = done.stderr.splitlines()[-1]
    assert line.startswith("fineweb.py: error: ") and message in line
    assert not (tmp_path / "out").exists()


def test_pretokenized_shards(tmp_path, hub, from_hub):
    ready = hub.datasets[fineweb.PRETOKENIZED]
    from_hub("--pretokenized", 2, "--out_dir", tmp_path / "out")
    names = "finewebedu_val_000000.bin", "finewebedu_train_000001.bin", "finewebedu_train_000002.bin"
    found = contents_of_files(tmp_path / "out")
    assert found.keys() - {"manifest.json"} == set(names) and all(found[name] == ready[name] for name in names)
    hub.newest = "f" * 40
    from_hub("--pretokenized", "all", "--out_dir", tmp_path / "out")
    from_hub("--pretokenized", 1, "--out_dir", tmp_path / "out")  # keeps what is there
    assert len(contents_of_files(tmp_path / "out")) == 5
    assert fineweb.main(["--verify", str(tmp_path / "out")]) == 0
    flags = (
        "--preset",
        "tiny",
        "--n_layer",
        1,
        "--n_embd",
        64,
        "--max_steps",
        1,
        "--eval_tokens",
        1024,
        "--device",
        "cpu",
    )
    run_in_process("--data", tmp_path / "out", "--log_dir", tmp_path / "log", *flags, "--sample_every", 0)


def contents_of_files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}


@pytest.mark.parametrize("fault", ["cut", 404, b"x" * 20_000])
def test_broken_pretokenized_shard_is_exit_4_and_not_kept(tmp_path, hub, from_hub, fault):
    hub.faults["finewebedu_train_000002.bin"] = fault
    done = from_hub("--pretokenized", 3, "--out_dir", tmp_path / "out", status=4)
    line = done.stderr.splitlines()[-1]
    assert line.startswith("fineweb.py: error: ")
    assert "finewebedu_train_000002.bin: its download has a wrong SHA-256" in line or not isinstance(fault, bytes)
    kept = contents_of_files(tmp_path / "out").keys()
    assert kept == {"finewebedu_val_000000.bin", "finewebedu_train_000001.bin", "manifest.json"}
    hub.faults.clear()
    from_hub("--pretokenized", 3, "--out_dir", tmp_path / "out")
    assert len(contents_of_files(tmp_path / "out")) == 5 and not (tmp_path / "out/.download").exists()


# With the trainer


@pytest.fixture(scope="module")
def prepared(parquet, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("prepared") / "shards"
    flags = "--files", f"{parquet}/*.parquet", "--shard_size", 100_000, "--out_dir", directory
    assert fineweb.main([str(f) for f in flags]) == 0
    return directory


def test_the_trainer_reads_what_is_prepared(tmp_path, prepared):
    done = run_in_process(
        "--data", prepared, "--preset", "tiny", "--max_steps", 2, "--log_dir", tmp_path,
        "--eval_tokens", 1024, "--sample_every", 0, "--device", "cpu", "--n_layer", 1, "--n_embd", 64,
    )  # fmt: skip
    assert " shards of " in " ".join(done.stdout.split()) and (tmp_path / "step_000002").is_dir()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda d: (d / "edufineweb_train_000002.npy").unlink(),
            "edufineweb_train_000002.npy: no such shard there, but manifest.json says tokens 1",
        ),
        (
            lambda d: shards.write_shard(d / "edufineweb_train_000002.npy", np.zeros(7, np.uint16)),
            "edufineweb_train_000002.npy: tokens 7 there, but manifest.json says tokens 1",
        ),
        (
            lambda d: shards.write_shard(d / "edufineweb_train_000099.npy", np.zeros(7, np.uint16)),
            "edufineweb_train_000099.npy: tokens 7 there, but manifest.json says no such shard",
        ),
        (lambda d: (d / "manifest.json").write_text("{"), "manifest.json: cannot be read as a manifest"),
    ],
)
def test_the_trainer_checks_the_manifest(tmp_path, prepared, change, message):
    shutil.copytree(prepared, tmp_path / "shards")
    change(tmp_path / "shards")
    done = run_in_process("--data", tmp_path / "shards", "--preset", "tiny", "--device", "cpu", status=2)
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_a_preparation_that_is_not_finished_is_no_data_yet(tmp_path, prepared):
    shutil.copytree(prepared, tmp_path / "shards")
    change_manifest(tmp_path / "shards", complete=False, cursor=dict(file=0, document=0, tokens=0))
    done = run_in_process("--data", tmp_path / "shards", "--preset", "tiny", "--device", "cpu", status=2)
    assert "not all of its shards are written yet" in done.stderr


# Errors


def refuse(capsys, *flags, status=2) -> str:
    assert run_script(fineweb.main, [str(f) for f in flags]) == status
    line = capsys.readouterr().err.split("\r")[-1].splitlines()[-1]
    assert line.startswith("fineweb.py: error: ")
    return line


def write_parquet(path, **columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize(
    "name, make, message",
    [
        ("x.parquet", None, "x.parquet: no such file"),
        ("x.csv", lambda p: p.write_text("a,b"), "x.csv: neither .parquet nor .jsonl nor .txt"),
        ("x.parquet", lambda p: p.write_bytes(b"no parquet"), "x.parquet: cannot be read as parquet"),
        ("x.parquet", lambda p: write_parquet(p, body=["a"]), "has no column text, but body"),
        ("x.parquet", lambda p: write_parquet(p, text=["a", None]), "x.parquet: document 1 has None in text"),
        ("x.parquet", lambda p: write_parquet(p, text=[1, 2]), "x.parquet: document 0 has 1 in text"),
        ("x.jsonl", lambda p: p.write_text('{"text": "a"}\n{'), "x.jsonl: document 1 is not a JSON object"),
        ("x.jsonl", lambda p: p.write_text('{"text": "a"}\n[1]'), "x.jsonl: document 1 is not a JSON object"),
        ("x.jsonl", lambda p: p.write_text('{"body": "a"}'), "x.jsonl: document 0 has no text, but body"),
        ("x.jsonl", lambda p: p.write_text('{"text": 7}'), "x.jsonl: document 0 has 7 in text, which is not text"),
        ("x.jsonl.gz", lambda p: p.write_bytes(b"no gzip"), "x.jsonl.gz: cannot be read"),
        ("x.txt", lambda p: p.write_bytes(b"caf\xe9"), "x.txt: not UTF-8 text (byte 3)"),
        ("x.parquet", lambda p: write_bad_utf8(p), "x.parquet: document 1 has no UTF-8 text in text"),
        ("x.jsonl", lambda p: p.write_text('{"text":' + "[" * 100_000), "document 0 is not a JSON object (maximum rec"),
        ("x.jsonl", lambda p: p.write_text('{"text": [' + "1, " * 10_000 + "1]}"), "x.jsonl: document 0 has [1, 1, 1"),
        ("x.jsonl", lambda p: p.write_text("7"), "x.jsonl: document 0 is not a JSON object"),
        ("x.jsonl", lambda p: p.write_bytes(b'{"text": "caf\xe9"}'), "x.jsonl: document 0 is not a JSON object"),
        ("x.jsonl", lambda p: p.write_text('{"a\\nb": 1}'), "x.jsonl: document 0 has no text, but a b"),
        ("x.jsonl.gz", lambda p: p.write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-9]), "gz: cannot be read"),
        ("x.parquet.gz", lambda p: p.write_bytes(b""), "x.parquet.gz: neither .parquet nor"),
        ("x.txt.bak", lambda p: p.write_text("a"), "x.txt.bak: neither .parquet nor"),
        ("x.txt", Path.mkdir, "x.txt: neither .parquet nor"),
        ("x.txt", os.mkfifo, "x.txt: neither .parquet nor"),
        ("x\ny.txt", None, "x y.txt: no such file"),
        ("x.txt", lambda p: p.write_bytes(b""), "1 tokens leave none to train on at --shard_size 50"),
        ("x.jsonl", lambda p: p.write_text(""), "0 tokens leave none to train on"),
        (
            "x.txt",
            lambda p: p.write_text("word " * 40),
            "42 tokens leave none to train on at --shard_size 50; try --shard_size 4",
        ),
    ],
)
def test_a_wrong_source_is_one_line(tmp_path, capsys, name, make, message):
    if make:
        make(tmp_path / name)
    flags = "--files", tmp_path / name, "--out_dir", tmp_path / "out", "--shard_size", 50
    assert message in refuse(capsys, *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "Expecting"),
        ("[]", "expected source of type dict"),
        ("{}", "expected source of type dict"),
        ("[" * 100_000, "recursion"),
        ('{"source": {}, "shards": [{}], "documents": 1, "complete": true}', "expected name of type str"),
        ('{"source": {}, "shards": [], "documents": 1.5, "complete": true}', "expected documents of type int"),
    ],
)
def test_what_is_no_manifest_is_one_line(tmp_path, capsys, content, message):
    (tmp_path / "manifest.json").write_text(content)
    (tmp_path / "x.txt").write_text("word")
    error = f"fineweb.py: error: {tmp_path}/manifest.json: cannot be read as a manifest ("
    for flags in ("--verify", tmp_path), ("--files", tmp_path / "x.txt", "--out_dir", tmp_path):
        line = refuse(capsys, *flags)
        assert line.startswith(error) and message in line


def write_bad_utf8(path):
    import pyarrow as pa

    offsets, content = np.array([0, 1, 3], np.int32), b"a\xff\xfe"
    column = pa.StringArray.from_buffers(2, pa.py_buffer(offsets), pa.py_buffer(content))
    write_parquet(path, text=column)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.txt", "x.txt.gz"])
def test_a_document_that_is_too_large_is_one_line(tmp_path, capsys, monkeypatch, name):
    import pyarrow as pa

    monkeypatch.setattr(fineweb, "MAX_DOCUMENT", 100_000)
    content = json.dumps({"text": "x" * 5_000_000}).encode()
    kind = {".gz": "gzip", ".zst": "zstd"}.get(Path(name).suffix)
    with pa.CompressedOutputStream(str(tmp_path / name), kind) if kind else open(tmp_path / name, "wb") as f:
        f.write(content)
    line = refuse(capsys, "--files", tmp_path / name, "--out_dir", tmp_path / "out")
    assert f"{name}: document 0 has over 100,000 bytes; split it" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--limit_tokens", 50, "--shard_size", 50], "--limit_tokens 50: must be more than --shard_size 50"),
        (["--limit_tokens", 0], "--limit_tokens 0: must be from 1 to"),
        (["--shard_size", 0], "--shard_size 0: must be from 1 to"),
        (["--shard_size", 2**40], f"--shard_size {2**40}: a shard must fit in memory"),
        (["--shard_size", 10**15], f"--shard_size {10**15}: must be from 1 to"),
        (["--num_proc", 10**9], "--num_proc 1000000000: must be from 1 to 1024"),
        (["--num_proc", -1], "--num_proc -1: must be from 1 to 1024"),
        (["--text_column", ""], "--text_column: is empty"),
        (["--out_dir", ""], "--out_dir: is empty"),
        (["--out_dir", "/proc"], "--out_dir /proc: cannot be written to"),
        (["--out_dir", "/proc/no/such"], "--out_dir /proc/no/such: cannot be written to"),
        (["--out_dir", "/dev/null"], "--out_dir /dev/null: cannot be written to"),
        (["--out_dir", "x" * 300], "cannot be written to (File name too long)"),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text("word " * 100)
    flags = ["--files", "x.txt", "--out_dir", "out", "--shard_size", 50, *flags]
    assert message in refuse(capsys, *flags)
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


@pytest.mark.parametrize("flag", ["--pretokenized", "--verify"])
@pytest.mark.parametrize("value, message", [("", "is empty"), ("0", "0: must be a number"), ("-1", ""), ("no", "no")])
def test_wrong_pretokenized_and_verify_are_one_line(tmp_path, capsys, monkeypatch, flag, value, message):
    monkeypatch.chdir(tmp_path)
    try:
        assert run_script(fineweb.main, [flag, value, "--out_dir", "out"]) == 2
    except SystemExit as e:  # from argparse
        assert e.code == 2
    line = capsys.readouterr().err
    assert line.startswith("fineweb.py: error: ") and line.count("\n") == 1
    assert message in line or flag == "--verify"
    assert not list(tmp_path.iterdir())


def test_as_many_tokens_as_a_shard_leave_nothing_behind(tmp_path, capsys):
    (tmp_path / "x.txt").write_text(" word" * 49)
    flags = "--files", tmp_path / "x.txt", "--out_dir", tmp_path / "out"
    assert "50 tokens leave none to train on" in refuse(capsys, *flags, "--shard_size", 50)
    assert not (tmp_path / "out").exists()
    assert fineweb.main([str(f) for f in (*flags, "--shard_size", 5)]) == 0


def test_a_file_name_with_brackets_is_found(tmp_path):
    (tmp_path / "part[0].txt").write_text(" word" * 49)
    flags = "--files", tmp_path / "part[0].txt", "--out_dir", tmp_path / "out", "--shard_size", 20
    assert fineweb.main([str(f) for f in flags]) == 0


@pytest.mark.parametrize("extra", [dict(), dict(cursor=None), dict(cursor=dict(file=0, document="x", tokens=0))])
def test_shards_without_a_cursor_are_not_begun_again(tmp_path, few, capsys, extra):
    """Else the documents would be in the data set twice."""
    with killed(Path, "replace", 7, True):
        fineweb.main([*few, str(tmp_path)])
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["cursor"]
    path.write_text(json.dumps(manifest | extra))
    assert "manifest.json: cannot be read as a manifest (expected " in refuse(capsys, *few, tmp_path)


def test_a_source_that_ends_before_the_cursor_is_refused(tmp_path, few, capsys):
    with killed(Path, "replace", 7, True):
        fineweb.main([*few, str(tmp_path)])
    source = Path(few[1])
    source.write_text('{"text": ""}' + " " * (source.stat().st_size - 12))
    before = contents(tmp_path)
    assert "no tokens are left to continue with" in refuse(capsys, *few, tmp_path)
    assert contents(tmp_path) == before


def test_a_lost_shard_is_not_complete(tmp_path, few, capsys):
    assert fineweb.main([*few, str(tmp_path)]) == 0
    (tmp_path / "edufineweb_train_000002.npy").unlink()
    assert "edufineweb_train_000002.npy: is missing" in refuse(capsys, *few, tmp_path)


def test_pretokenized_leaves_other_data_sets_alone(tmp_path, few, capsys):
    assert fineweb.main([*few, str(tmp_path)]) == 0
    before = contents(tmp_path)
    assert "was begun with other settings" in refuse(capsys, "--pretokenized", 1, "--out_dir", tmp_path)
    assert contents(tmp_path) == before


def test_no_place_for_the_shards_is_one_line(tmp_path, capsys):
    (tmp_path / "x.txt").write_text("word")
    for out_dir in "x.txt", "x.txt/out":
        line = refuse(capsys, "--files", tmp_path / "x.txt", "--out_dir", tmp_path / out_dir)
        assert f"--out_dir {tmp_path / out_dir}: cannot be written to (Not a directory)" in line


def test_continuing_with_other_settings_is_refused(tmp_path, capsys, parquet):
    flags = "--files", f"{parquet}/*.parquet", "--out_dir", tmp_path / "out"
    assert fineweb.main([str(f) for f in (*flags, "--shard_size", 90_000)]) == 0
    assert "shard_size 90000 → 80000" in refuse(capsys, *flags, "--shard_size", 80_000)
    assert "text_column text → id" in refuse(capsys, *flags, "--shard_size", 90_000, "--text_column", "id")
    (tmp_path / "out/manifest.json").unlink()
    assert "holds shards but no manifest.json" in refuse(capsys, *flags, "--shard_size", 90_000)


def test_a_full_disk_is_exit_4_and_keeps_what_there_is(tmp_path, parquet):
    files = f"{parquet}/*.parquet"
    flags = "--files", files, files, files, "--out_dir", tmp_path / "out", "--shard_size", 600_000
    limit = ["bash", "-c", 'ulimit -f 1024; trap "" XFSZ; exec "$@"', "bash"]  # no file larger than 1 MiB
    line = [*limit, *command("fineweb.py", *flags)]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    line = done.stderr.splitlines()[-1]
    assert "edufineweb_val_000000.npy: cannot be written (File too large); the same command continues after" in line
    assert contents(tmp_path / "out").keys() == {"manifest.json"}


def test_verify_names_what_differs(tmp_path, prepared, capsys):
    shutil.copytree(prepared, tmp_path / "d")
    path = tmp_path / "d/edufineweb_train_000001.npy"
    os.truncate(path, path.stat().st_size - 2)
    (tmp_path / "d/edufineweb_train_000002.npy").unlink()
    line = refuse(capsys, "--verify", tmp_path / "d")
    assert "edufineweb_train_000001.npy: sha256 " in line and "000002.npy: no such shard there, but" in line


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda d: replace_by_directory(d / "edufineweb_train_000001.npy"),
            "train_000001.npy: no such shard there, but",
        ),
        (lambda d: (d / "x_train_9.npy").touch(), " there, but manifest.json says no such shard; restore"),
        (lambda d: change_manifest(d, complete=False, shards=[]), "not all of its shards are written yet"),
        (lambda d: change_manifest(d, shards=[dict(name=[], tokens=1, sha256="")]), "expected name of type str"),
        (
            lambda d: change_manifest(d, shards=[dict(name="../x.npy", tokens=1, sha256="")]),
            "'../x.npy' is not the name",
        ),
    ],
)
def test_verify_refuses_what_the_trainer_refuses(tmp_path, prepared, capsys, change, message):
    shutil.copytree(prepared, tmp_path / "d")
    change(tmp_path / "d")
    assert message in refuse(capsys, "--verify", tmp_path / "d")


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def change_manifest(directory: Path, **change) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.slow
@pytest.mark.skipif(not BOOKS.exists(), reason="shared/data/books is absent")
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("num_proc, shard_size", [(1, 10_000_000), (2, 2_000_000), (4, 333_333)])
def test_the_books(tmp_path, monkeypatch, encoder, num_proc, shard_size):
    import pyarrow.parquet as pq

    if encoder == "tiktoken":
        monkeypatch.setattr(fineweb, "find_spec", lambda name: None)
    flags = "--files", f"{BOOKS}/*.parquet", "--out_dir", tmp_path, "--shard_size", shard_size, "--num_proc", num_proc
    assert fineweb.main([str(f) for f in flags]) == 0
    texts = [text for p in sorted(BOOKS.glob("*.parquet")) for text in pq.read_table(p)["text"].to_pylist()]
    assert shard_files(tmp_path) == shards_of(texts, shard_size)
