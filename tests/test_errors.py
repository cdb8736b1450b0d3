"""Every mistake a user can make: one line that names the file or flag and the fix, exit status 2, nothing written."""

import json
import os
import shutil
from dataclasses import fields

import numpy as np
import pytest

import model
import recipe
import tokens
import train_gpt2
from conftest import ROOT, SMALL, run
from runtime import checkpoint

IDS = np.arange(2000, dtype=np.uint16)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with a text in it."""
    (tmp_path / "text.txt").write_text((ROOT / "input.txt").read_text()[:8000])
    monkeypatch.chdir(tmp_path)
    for name in "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE":
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def refuse(capsys, *flags, status: int = 2, said: str = "") -> str:
    """Run in vain: the one line, after making sure that it is one and that nothing was written (or said before)."""
    before = sorted(os.walk("."))
    assert train_gpt2.main([*map(str, flags)]) == status
    out, err = capsys.readouterr()
    assert sorted(os.walk(".")) == before
    assert (
        out.startswith(said)
        and bool(out) == bool(said)
        and err.startswith("train_gpt2.py: error: ")
        and err.count("\n") == 1
    ), out + err
    return err


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--max_step 5", "--max_step: there is no such option; did you mean --max_steps"),
        ("--learning_rate=1", "--learning_rate=1: there is no such option"),
        ("--zzz 5", "--zzz: there is no such option; see --help"),
        ("tiny", "tiny: there is no such option"),
        ("--preset tini", "--preset: invalid choice: 'tini' (choose from"),
        ("--device tpu", "--device: invalid choice: 'tpu'"),
        ("--compile yes", "--compile: invalid choice: 'yes'"),
        ("--optimizer sgd", "--optimizer: invalid choice: 'sgd' (choose from"),
        ("--schedule linear", "--schedule: invalid choice: 'linear' (choose from"),
        ("--decay_share 1.5", "--decay_share 1.5: must be from 0 to 1"),
        ("--muon_ratio -1", "--muon_ratio -1.0: must be from 0 to"),
        ("--n_layer two", "--n_layer: invalid int value: 'two'"),
        ("--n_layer", "--n_layer: expected one argument"),
        ("--n_layer 0", "--n_layer 0: must be from 1 to"),
        ("--max_lr nan", "--max_lr nan: must be from 0 to"),
        ("--max_lr inf", "--max_lr inf: must be from 0 to"),
        ("--max_lr -1", "--max_lr -1.0: must be from 0 to"),
        ("--dropout 1.0", "--dropout 1.0: must be from 0 to 0.99"),
        ("--keep 0", "--keep 0: must be from 1 to"),
        ("--seed -1", "--seed -1: must be from 0 to"),
        ("--min_lr 1 --max_lr 0.5", "--min_lr 1: larger than --max_lr 0.5"),
        ("--n_head 3 --n_embd 64", "--n_head 3: does not divide --n_embd 64; 2 would"),
        ("--total_batch_size 100 --seq_len 32", "--total_batch_size 100: not a multiple of 32"),
        (
            "--total_batch_size 16 --seq_len 32",
            "--total_batch_size 16: not a multiple of 32 = seq_len 32 × 1 rank; 32 would",
        ),
        (
            "--total_batch_size 256 --seq_len 32 --micro_batch_size 3",
            "--micro_batch_size 3: does not divide the 8 rows of a step and rank; 2 would",
        ),
        ("--data nowhere", "--data nowhere: no such file or directory"),
        ("--seq_len 9999 --total_batch_size 9999", "text.txt: 2025 tokens are too few for a row of --seq_len 9999"),
        ("--init_from nowhere/at/all", "--init_from nowhere/at/all: no GPT-2 there, or out of reach"),
        ("--init_from gpt2", "--init_from gpt2: no GPT-2 there, or out of reach"),
        ("--init_from .", "--init_from .: no GPT-2 there, or out of reach"),
        ("--device cuda", "--device cuda: PyTorch finds no such device here"),
        ("--log_dir text.txt", "--log_dir text.txt: text.txt is a file, not a directory"),
        ("--log_dir text.txt/log", "--log_dir text.txt/log: "),
        ("--resume nowhere", "--resume nowhere: nowhere/checkpoint.json: expected a save's record, found none"),
    ],
)
def test_wrong_flags(here, capsys, monkeypatch, flags, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    given = list(SMALL)
    if "--data" not in flags:
        given += ["--data", "text.txt"]
    assert message in refuse(capsys, *given, *flags.split())


def shard(path, ids=IDS):
    with open(path, "wb") as f:
        np.save(f, ids)


def only(name):
    return lambda d: shard(d / name)


def both_then(change):
    def make(directory):
        shard(directory / "x_train_000001.npy")
        shard(directory / "x_val_000000.npy")
        change(directory)

    return make


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda d: None, "data: holds no .npy or .bin shards; prepare some with `python fineweb.py`"),
        (only("x_val_000000.npy"), 'data: none of its 1 shards has "train" in its name'),
        (only("x_train_000001.npy"), 'data: none of its 1 shards has "val" in its name'),
        (both_then(lambda d: (d / "x_train_000002.bin").write_bytes(b"")), "data: holds both .npy and .bin shards"),
        (
            both_then(lambda d: os.truncate(d / "x_train_000001.npy", 1000)),
            "x_train_000001.npy: truncated: 2,000 tokens",
        ),
        (both_then(lambda d: open(d / "x_val_000000.npy", "ab").write(b"x")), "x_val_000000.npy: trailing bytes"),
        (
            both_then(lambda d: shard(d / "x_val_000000.npy", IDS.astype(int))),
            "expected tokens of type uint16, found int64",
        ),
        (
            both_then(lambda d: shard(d / "x_val_000000.npy", IDS[None])),
            "expected one dimension, found shape (1, 2000)",
        ),
        (
            both_then(lambda d: shard(d / "x_train_000001.npy", IDS + 50000)),
            "token 257 is 50257, but GPT-2's ids end at 50256",
        ),
        (
            both_then(lambda d: shard(d / "x_train_000001.npy", IDS[:5])),
            "5 tokens are too few for a row of --seq_len 32",
        ),
        (both_then(lambda d: shard(d / "x_val_000000.npy", IDS[:5])), "x_val_000000.npy: 5 tokens are too few"),
    ],
)
def test_wrong_shards(here, capsys, make, message):
    (here / "data").mkdir()
    make(here / "data")
    assert message in refuse(capsys, *SMALL, "--data", "data")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"caf\xe9 au lait", "--data wrong.txt: not UTF-8 text (byte 3)"),
        (b"", "wrong.txt: 0 tokens are too few for a row of --seq_len 32 and its target"),
        (b"too short", "wrong.txt: 3 tokens are too few for a row of --seq_len 32 and its target"),
        (
            b"words and words " * 40,
            "the last tenth of wrong.txt: 13 tokens are too few",
        ),  # enough to train on, not to validate on
    ],
)
def test_wrong_text(here, capsys, content, message):
    (here / "wrong.txt").write_bytes(content)
    assert message in refuse(capsys, *SMALL, "--data", "wrong.txt")


def test_an_id_out_of_range_in_the_middle_of_a_shard_is_found_when_it_is_read(here, capsys):
    (here / "data").mkdir()
    ids = np.zeros(20000, dtype=np.uint16)
    shard(here / "data/x_val_000000.npy", ids)
    ids[10000] = 60000
    shard(here / "data/x_train_000001.npy", ids)
    assert train_gpt2.main([*SMALL, "--data", "data", "--max_steps", "100", "--eval_every", "0"]) == 2
    err = capsys.readouterr().err
    assert err == "train_gpt2.py: error: x_train_000001.npy: token 10,000 is 60000, but GPT-2's ids end at 50256\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A finished run of two steps."""
    directory = tmp_path_factory.mktemp("saved")
    (directory / "text.txt").write_text((ROOT / "input.txt").read_text()[:8000])
    run("train_gpt2.py", *SMALL, "--data", "text.txt", "--max_steps", 2, cwd=directory)
    return directory


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--n_layer 3 --n_embd 64", "n_layer 2 → 3, n_embd 32 → 64"),
        ("--total_batch_size 512", "total_batch_size 256 → 512"),
        ("--seq_len 16", "seq_len 32 → 16"),
        ("--seed 3", "seed 1337 → 3"),
        ("--max_lr 0.5", "max_lr 0.001 → 0.5"),
        ("--warmup_steps 1", "warmup_steps 0 → 1"),
        ("--max_steps 3", "max_steps 2 → 3"),
        ("--dropout 0.1", "dropout 0.0 → 0.1"),
        ("--weight_decay 0", "weight_decay 0.1 → 0.0"),
        ("--optimizer muon --muon_ratio 2", "optimizer adamw → muon, muon_ratio 1.0 → 2.0"),
        ("--schedule wsd --decay_share 0.2", "schedule cosine → wsd, decay_share 0.5 → 0.2"),
        ("--preset gpt2 --seq_len 32 --total_batch_size 256", "n_layer 2 → 12"),
        ("--data other.txt", "the data text.txt → other.txt, which has other tokens"),
        ("--init_from gpt2", "init_from None → gpt2"),
    ],
)
def test_resuming_as_another_run(here, saved, capsys, flags, message):
    shutil.copytree(saved / "log", here / "log")
    (here / "other.txt").write_text((here / "text.txt").read_text() + "more")
    given = ["--device", "cpu", "--resume", "--dtype", "float32"]
    line = refuse(capsys, *given, *flags.split())
    assert message in line and "may not change in mid-run" in line


def test_resuming_a_save_that_is_older_than_some_options(here, saved, capsys):
    shutil.copytree(saved / "log", here / "log")
    path = here / "log/step_000002/checkpoint.json"
    record = json.loads(path.read_text())
    del record["sha256"]
    for part in "requested", "config":
        for name in "optimizer", "muon_ratio", "schedule", "decay_share":
            del record[part][name]
    path.write_bytes(checkpoint._canonical(record | dict(sha256=checkpoint._digest(record))))
    assert train_gpt2.main(["--resume", "--device", "cpu"]) == 0
    assert "at step 2: nothing changed" in capsys.readouterr().out


def test_resuming_from_what_is_no_save(here, saved, capsys):
    there = f"no save, but there is {saved}/log/step_000002"
    for name in "log", "log/step_000001":
        line = refuse(capsys, "--resume", saved / name, "--device", "cpu")
        assert f"--resume {saved / name}: {there}" in line
    shutil.copytree(saved / "log/step_000002", here / "save")
    with open(here / "save/model.safetensors", "r+b") as f:
        f.seek(5000)
        f.write(b"\xff")
    line = refuse(capsys, "--resume", "save", "--device", "cpu")
    assert "save/model.safetensors: does not match its SHA-256; --resume alone takes the newest" in line


def test_initialising_from_another_kind_of_model(here, capsys):
    (here / "llama").mkdir()
    (here / "llama/config.json").write_text(json.dumps(dict(model_type="llama")))
    assert "llama: no GPT-2: its config.json has model_type 'llama'" in refuse(capsys, "--init_from", "llama")


def test_a_shape_that_contradicts_the_model(here, saved, capsys):
    line = refuse(capsys, "--init_from", saved / "log/step_000002", "--n_layer", 3, "--device", "cpu")
    assert "--n_layer 3: the model of --init_from has 2; leave the flag out" in line


def test_a_log_directory_in_use(here, capsys):
    from filelock import FileLock

    (here / "log").mkdir()
    with FileLock(here / "log/.lock"):
        line = refuse(capsys, *SMALL, "--data", "text.txt", said="preset ")
    assert "--log_dir log: another run is writing there" in line


def test_a_log_directory_that_cannot_be_written(here, capsys):
    line = refuse(capsys, *SMALL, "--data", "text.txt", "--log_dir", "/proc/log", said="preset ")
    assert "--log_dir /proc/log: /proc/log cannot be used (No such file or directory)" in line


def test_a_model_that_does_not_fit(here, capsys):
    line = refuse(capsys, *SMALL, "--data", "text.txt", "--n_embd", 2**24)
    assert "the model does not fit into memory: try a smaller --preset" in line


@pytest.mark.parametrize("size", [1000])
def test_a_model_with_another_vocabulary(here, capsys, size):
    from model import GPT, GPTConfig

    GPT(GPTConfig(32, size, 1, 1, 8)).save_pretrained("other")
    shutil.move("other", here.parent / "other")
    line = refuse(capsys, *SMALL, "--data", "text.txt", "--init_from", here.parent / "other")
    assert "other: 1000 tokens, not GPT-2's 50257" in line or "has 1000 tokens" in line


def test_more_ranks_than_gpus(here, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert "8 ranks on a host with 2 GPUs: use --nproc_per_node=2" in refuse(capsys)


def test_an_id_out_of_range_that_only_the_second_rank_reads_is_named(here):
    (here / "data").mkdir()
    ids = np.zeros(20000, dtype=np.uint16)
    shard(here / "data/x_val_000000.npy", ids)
    ids[5 * 32 + 3] = 60000  # in the second rank's half of the first step; the first page is checked at the start
    ids = np.concatenate([np.zeros(256 * 20, dtype=np.uint16), ids])
    shard(here / "data/x_train_000001.npy", ids)
    flags = "--data", "data", "--max_steps", 100, "--eval_every", 0
    done = run("train_gpt2.py", *SMALL, *flags, ranks=2, status=1, cwd=here)
    line = "train_gpt2.py: error: x_train_000001.npy: token 5,283 is 60000, but GPT-2's ids end at 50256"
    assert done.stderr.splitlines().count(line) == 1


def test_under_torchrun_one_rank_speaks(here):
    flags = "--data", "text.txt", "--total_batch_size", 96
    done = run("train_gpt2.py", *SMALL, *flags, ranks=2, status=1, cwd=here)  # 1 is torchrun's own status
    lines = [line for line in done.stderr.splitlines() if line.startswith("train_gpt2.py: error")]
    assert len(lines) == 1 and "Traceback (most" not in done.stderr.split("train_gpt2.py: error")[0]
    assert "not a multiple of 64 = seq_len 32 × 2 ranks; 64 and 128 would be, or 1 ranks" in lines[0]
    assert not (here / "log").exists()


@pytest.mark.parametrize("flags", [(), ("--resume", "log/step_000002")])
def test_restarts_by_torchrun_need_resume(here, capsys, monkeypatch, flags):
    """Without it, or with a directory, each would begin at the beginning."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert "torchrun --max-restarts: add --resume without DIR" in refuse(capsys, *SMALL, "--data", "text.txt", *flags)


def test_no_exam_without_its_file_and_a_network(here, capsys, monkeypatch):
    """Neither a file nor a network: one line, and training goes on."""
    import hellaswag

    monkeypatch.setattr(hellaswag, "FILE", here / "hellaswag/hellaswag_val.jsonl")
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:9/hellaswag_val.jsonl")
    flags = "--data", "text.txt", "--max_steps", "2", "--hellaswag_every", "1"
    assert train_gpt2.main([*SMALL, *flags]) == 0
    assert "no HellaSwag exam: no " in capsys.readouterr().out
    assert (here / "log/step_000002").is_dir() and not list((here / "hellaswag").iterdir())


def test_flags_are_few_and_each_is_explained(capsys):
    options = fields(recipe.TrainConfig)
    assert len(options) <= 36
    done = run("train_gpt2.py", "--help")
    for f in options:
        assert f"--{f.name}" in done.stdout and f.metadata["help"].split()[0] in done.stdout
    for preset in recipe.PRESETS:
        assert f"\n  {preset}" in done.stdout
    assert tokens.VOCAB_SIZE == model.GPT2_VOCAB_SIZE
