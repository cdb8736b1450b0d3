"""tokens.py against the published ids, the `transformers` tokenizer, and files that are not what they should be."""

from errors import UserError
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer

import tokens
from conftest import BOOKS_TEXT, ROOT
from runtime import shards


def test_published_ids():
    ids = [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert tokens.gpt2_tokenizer().encoding.encode_ordinary("Hello, I'm a language model,") == ids
    assert tokens.gpt2_tokenizer().encoding.eot_token == tokens.END_OF_TEXT == 50256
    assert tokens.gpt2_tokenizer().encoding.n_vocab == tokens.VOCAB_SIZE == 50257


def test_end_of_text_written_out_is_plain_text():
    ids = tokens.gpt2_tokenizer().encoding.encode_ordinary("a<|endoftext|>b")
    assert tokens.END_OF_TEXT not in ids
    assert tokens.gpt2_tokenizer().encoding.decode(ids) == "a<|endoftext|>b"


@pytest.fixture(scope="module")
def bpe():
    """GPT-2's byte-pair encoding by `tokenizers`, which shares no code with tiktoken."""
    return ByteLevelBPETokenizer(str(ROOT / "assets/vocab.json"), str(ROOT / "assets/merges.txt"))


@pytest.fixture(scope="module")
def reference():
    from transformers import GPT2Tokenizer

    return GPT2Tokenizer(str(ROOT / "assets/vocab.json"), str(ROOT / "assets/merges.txt"))


def test_equals_transformers_on_a_whole_text(reference):
    text = BOOKS_TEXT.read_text()[:200_000]
    assert tokens.gpt2_tokenizer().encoding.encode_ordinary(text) == reference(text)["input_ids"]


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_equals_transformers_on_any_text(reference, text):
    text = text.replace("<|endoftext|>", "")
    ids = tokens.gpt2_tokenizer().encoding.encode_ordinary(text)
    assert ids == reference(text)["input_ids"]
    assert tokens.gpt2_tokenizer().encoding.decode(ids) == text


def test_an_altered_vocabulary_is_refused(tmp_path):
    for name in "errors.py", "tokens.py":
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    merges = tmp_path / "assets/merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"h e", b"e h", 1))
    done = subprocess.run(
        [sys.executable, "-c", "import tokens; tokens.gpt2_tokenizer().encoding"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode != 0 and "merges.txt: 'Ġt he' does not merge two earlier tokens into a new one" in done.stderr
    )


def write_bin(path, ids, magic=20240520, version=1, count=None):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids, dtype="<u2").tobytes())


def test_shards_come_back_as_written(tmp_path):
    ids = np.random.default_rng(0).integers(0, 50257, 1000).astype(np.uint16)
    shards.write_shard(tmp_path / "a_train_000001.npy", ids)
    write_bin(tmp_path / "a_train_000001.bin", ids)
    assert np.array_equal(np.load(tmp_path / "a_train_000001.npy"), ids)
    for suffix in ".npy", ".bin":
        shard = shards.open_shard(tmp_path / f"a_train_000001{suffix}")
        assert isinstance(shard, np.memmap) and shard.dtype == np.uint16 and np.array_equal(shard, ids)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a_train_000001.bin", "a_train_000001.npy"]


@pytest.mark.parametrize("wrong", [np.zeros(4, np.int32), np.zeros((2, 2), np.uint16)])
def test_writing_anything_but_a_flat_uint16_array_is_refused(tmp_path, wrong):
    with pytest.raises(shards.ShardError, match="flat array of uint16"):
        shards.write_shard(tmp_path / "x_train.npy", wrong)
    assert not list(tmp_path.iterdir())


def npy(array):
    return lambda path: np.save(path, array)


def bytes_of(array, change):
    def make(path):
        np.save(path, array)
        path.write_bytes(change(path.read_bytes()))

    return make


IDS = np.arange(100, dtype=np.uint16)


@pytest.mark.parametrize(
    "name, make, message",
    [
        ("x.npy", npy(IDS.astype(np.int64)), "expected tokens of type uint16, found int64"),
        ("x.npy", npy(IDS.astype(">u2")), "expected tokens of type uint16, found >u2"),
        ("x.npy", npy(IDS.reshape(10, 10)), r"expected one dimension, found shape \(10, 10\)"),
        ("x.npy", npy(IDS[:0]), "holds no tokens"),
        ("x.npy", bytes_of(IDS, lambda b: b[:-2]), "truncated: 100 tokens make 328 bytes, found 326"),
        ("x.npy", bytes_of(IDS, lambda b: b + b"\0"), "trailing bytes: 100 tokens make 328 bytes, found 329"),
        ("x.npy", bytes_of(IDS, lambda b: b""), "expected a .npy header"),
        ("x.npy", bytes_of(IDS, lambda b: b"PK" + b), "expected a .npy header"),
        ("x.bin", lambda p: write_bin(p, IDS, magic=7), "expected magic 20240520 and version 1, found 7 and 1"),
        (
            "x.bin",
            lambda p: write_bin(p, IDS, version=7),
            "version 1, found 20240520 and 7",
        ),
        ("x.bin", lambda p: write_bin(p, IDS, count=101), "truncated: 101 tokens make 1,226 bytes, found 1,224"),
        ("x.bin", lambda p: write_bin(p, IDS, count=99), "trailing bytes"),
        ("x.bin", lambda p: write_bin(p, IDS, count=-1), "expected a token count, found -1"),
        ("x.bin", lambda p: write_bin(p, []), "holds no tokens"),
        ("x.bin", lambda p: p.write_bytes(b"short"), "truncated: expected a header of 1024 bytes, found 4"),
    ],
)
def test_a_file_that_is_no_shard_is_refused_by_name(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(shards.ShardError, match=message) as error:
        shards.open_shard(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


def test_shards_of_a_split_in_order(tmp_path):
    for name in "b_train_000002.npy", "b_train_000001.npy", "b_val_000000.npy", "manifest.json":
        (tmp_path / name).touch()
    assert [p.name for p in shards.shard_paths(tmp_path, "train")] == ["b_train_000001.npy", "b_train_000002.npy"]
    assert [p.name for p in shards.shard_paths(tmp_path, "val")] == ["b_val_000000.npy"]


@pytest.mark.parametrize(
    "names, message",
    [
        ([], "holds no .npy or .bin shards"),
        (["a_train_1.npy", "a_val_0.bin"], "both .npy and .bin"),
        (["a_train_1.npy"], '"val" in its name'),
    ],
)
def test_a_directory_without_the_split_is_refused(tmp_path, names, message):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(shards.ShardError, match=message):
        shards.shard_paths(tmp_path, "val")


def test_split_is_a_word_of_the_file_name(tmp_path):
    train = "a-train-1.npy", "fineweb_train_000001.npy", "retrieval_train_1.npy", "train.npy", "val_of_x_train_2.npy"
    val = "edufineweb_val_000000.npy", "a_constrained_val_1.npy"
    for name in (*train, *val, "trainval_1.npy", "interval_3.npy"):
        (tmp_path / name).touch()
    assert [p.name for p in shards.shard_paths(tmp_path, "train")] == sorted(train)
    assert [p.name for p in shards.shard_paths(tmp_path, "val")] == sorted(val)


@pytest.mark.parametrize("name", ["x.npy", "x.bin"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda p: p.symlink_to("nowhere")])
def test_what_is_no_regular_file_is_no_shard(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(shards.ShardError, match=f"{name}: is not a regular file"):
        shards.open_shard(tmp_path / name)


def test_oversized_npy_header_is_one_line(tmp_path):
    header = str({"descr": "<u2", "fortran_order": False, "shape": (100,), "x": "y" * 20_000}).encode()
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(shards.ShardError, match="expected a .npy header") as error:
        shards.open_shard(tmp_path / "x.npy")
    assert "\n" not in str(error.value)


# Text of which GPT-2's pattern makes the same pieces, however long its runs of whitespace


@pytest.mark.parametrize("space", [" ", "\n"])
def test_a_million_spaces_encode_as_in_gpt2(bpe, space):
    text = "a" + space * 1_000_100 + "x"
    assert np.array_equal(tokens.gpt2_tokenizer().encode(text), bpe.encode(text).ids)


spaces = st.text(st.sampled_from(" \n\t\r\x0b\x1c\x1f\x85\xa0\u1680\u2028\u3000\u200b\u180e"), max_size=12)
words = st.sampled_from(["a", "'s", "12", "!?", "\u00e9", "\U0001f642", "<|endoftext|>"])


@settings(max_examples=200, deadline=None)
@given(text=st.lists(spaces | words, max_size=8).map("".join), run=st.integers(1, 4))
def test_cutting_whitespace_leaves_the_ids(bpe, text, run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "LONG_RUN", run)
        ids = tokens.gpt2_tokenizer().encode(text)
    assert ids.dtype == np.uint16 and ids.tolist() == bpe.encode(text).ids


# Manifests


GOOD = dict(name="a_train_000001.npy", tokens=1, sha256="0")


@pytest.mark.parametrize(
    "name", ["../a.npy", "/a.npy", "d/a.npy", "..", "", "d\\a.npy", ".npy", "a.npy\n", "a.txt", [], None]
)
def test_shard_names_in_manifests_are_bare(tmp_path, name):
    manifest = dict(source={}, documents=1, complete=True, shards=[GOOD, GOOD | dict(name=name)])
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(shards.ShardError, match="manifest.json: cannot be read as a manifest") as error:
        shards.read_manifest(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_failed_write_removes_only_its_own_file(tmp_path, monkeypatch, step):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "other.npy.partial").touch()
    (tmp_path / "a.npy").write_bytes(b"old")
    owner = {"write": np.lib.format, "fsync": os, "replace": Path}[step]
    monkeypatch.setattr(owner, {"write": "write_array_header_1_0"}.get(step, step), fail)
    with pytest.raises(UserError, match=r"a.npy: cannot be written \(No space left on device\)") as error:
        shards.write_shard(tmp_path / "a.npy", IDS)
    assert error.value.status == 4
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"other.npy.partial": b"", "a.npy": b"old"}
