"""Every mistake a user can make: one line that names the file or flag and the fix, exit status 2, nothing written."""

from errors import UserError, run_script
import json
import math
import os
import shlex
import shutil
from dataclasses import fields

import numpy as np
import pytest
from filelock import FileLock

import hellaswag
import model
import train_gpt2
from conftest import BOOKS_TEXT, SMALL, run_ranks
from recipe import PRESETS, TrainConfig
from runtime import checkpoint
from runtime.distributed import Distributed
from runtime.options import check_values

IDS = np.arange(2000, dtype=np.uint16)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with a text in it."""
    (tmp_path / "text.txt").write_text(BOOKS_TEXT.read_text()[:8000])
    monkeypatch.chdir(tmp_path)
    for name in "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE":
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def refuse(capsys, *flags, printed: str = "") -> str:
    """Run in vain; return the one line on stderr, after checking that nothing is written or, but for what begins with
    `printed`, printed."""
    before = sorted(os.walk("."))
    assert run_script(train_gpt2.main, [*map(str, flags)]) == 2
    out, err = capsys.readouterr()
    assert sorted(os.walk(".")) == before
    assert out.startswith(printed) and bool(out) == bool(printed), out
    assert err.startswith("train_gpt2.py: error: ") and err.count("\n") == 1, err
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
        ("--decay_fraction 1.5", "--decay_fraction 1.5: must be from 0 to 1"),
        ("--muon_lr_scale -1", "--muon_lr_scale -1.0: must be from 0 to"),
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
            "--micro_batch_size 3: does not divide the 8 sequences of a step and rank; 2 would",
        ),
        ("--data nowhere", "--data nowhere: no such file or directory"),
        (
            "--seq_len 9999 --total_batch_size 9999",
            "text.txt: 2,025 tokens are too few for a sequence of --seq_len 9999",
        ),
        ("--init_from nowhere/at/all", "--init_from nowhere/at/all: cannot be loaded as a GPT-2"),
        ("--init_from gpt2", "--init_from gpt2: cannot be loaded as a GPT-2"),
        ("--init_from .", "--init_from .: cannot be loaded as a GPT-2"),
        ("--device cuda", "--device cuda: PyTorch finds no such device here"),
        ("--log_dir ''", "--log_dir: is empty"),
        ("--data ''", "--data: is empty"),
        ("--init_from ''", "--init_from: is empty"),
        ("--resume ''", "--resume: is empty"),
        ("--resume nowhere", "--resume nowhere: nowhere/checkpoint.json: cannot be read as the record of a checkpoint"),
        ("--warmup_steps 9", "--warmup_steps 9: more than --max_steps 8"),
    ],
)
def test_wrong_flags_are_one_line(here, capsys, monkeypatch, flags, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    data = () if "--data" in flags else ("--data", "text.txt")
    assert message in refuse(capsys, *SMALL, *data, *shlex.split(flags))


@pytest.mark.parametrize(
    "name, allowed, refused",
    [
        ("n_layer", [1, 1000], [0, -1, 1001]),
        ("n_head", [1, 2**24], [0, 2**24 + 1]),
        ("total_batch_size", [1, 2**40], [0, 2**40 + 1]),
        ("keep", [1], [0]),
        ("max_steps", [None, 0], [-1]),
        ("dist_timeout", [1.0], [0.99, math.nan]),
        ("dropout", [0.0, 0.99], [-1e-9, 1.0, math.nan]),
        ("decay_fraction", [0.0, 1.0], [-0.1, 1.1]),
        ("max_lr", [0.0, 1.0], [-1e-9, math.inf, -math.inf, math.nan]),
        ("seed", [0, 2**31], [-1, 2**31 + 1]),
        ("bias", [True, False], []),
        ("log_dir", ["log"], [""]),
        ("wandb", [None, "project"], [""]),
    ],
)
def test_bounds_of_an_option_are_inclusive(name, allowed, refused):
    for value in allowed:
        check_values(TrainConfig, {name: value})
    for value in refused:
        with pytest.raises(UserError, match=f"^--{name}( {value}: must be from .* to .*|: is empty)$"):
            check_values(TrainConfig, {name: value})


def test_every_default_and_preset_is_within_its_bounds():
    for preset in PRESETS.values():
        check_values(TrainConfig, vars(TrainConfig(**preset)))


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
        (only("x_val_000000.npy"), 'data: none of its 1 shards has the word "train" in its name'),
        (only("x_train_000001.npy"), 'data: none of its 1 shards has the word "val" in its name'),
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
            "token 257 is 50257, but its vocabulary ends at 50256",
        ),
        (
            both_then(lambda d: shard(d / "x_train_000001.npy", IDS[:5])),
            "5 tokens are too few for a sequence of --seq_len 32",
        ),
        (both_then(lambda d: shard(d / "x_val_000000.npy", IDS[:5])), "x_val_000000.npy: 5 tokens are too few"),
    ],
)
def test_wrong_shards_are_one_line(here, capsys, make, message):
    (here / "data").mkdir()
    make(here / "data")
    assert message in refuse(capsys, *SMALL, "--data", "data")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"caf\xe9 au lait", "--data wrong.txt: not UTF-8 text (byte 3)"),
        (b"", "wrong.txt: 0 tokens are too few for a sequence of --seq_len 32 and its target"),
        (b"too short", "wrong.txt: 3 tokens are too few for a sequence of --seq_len 32 and its target"),
        (
            b"words and words " * 40,
            "the last tenth of wrong.txt: 13 tokens are too few",
        ),  # enough to train on, not to validate on
    ],
)
def test_wrong_text_is_one_line(here, capsys, content, message):
    (here / "wrong.txt").write_bytes(content)
    assert message in refuse(capsys, *SMALL, "--data", "wrong.txt")


def test_bad_token_id_inside_a_shard_is_found_when_read(here, capsys):
    (here / "data").mkdir()
    ids = np.zeros(20000, dtype=np.uint16)
    shard(here / "data/x_val_000000.npy", ids)
    ids[2100] = 60000  # the first page, of 2048 tokens, is checked at the start
    shard(here / "data/x_train_000001.npy", ids)
    assert run_script(train_gpt2.main, [*SMALL, "--data", "data", "--max_steps", "100", "--eval_every", "0"]) == 2
    err = capsys.readouterr().err
    assert err == "train_gpt2.py: error: x_train_000001.npy: token 2,100 is 60000, but its vocabulary ends at 50256\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A directory with text.txt, and in log/ a finished run of two steps."""
    directory = tmp_path_factory.mktemp("finished")
    (directory / "text.txt").write_text(BOOKS_TEXT.read_text()[:8000])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        assert run_script(train_gpt2.main, [*SMALL, "--data", "text.txt", "--max_steps", "2"]) == 0
    return directory


def rewrite_record(path, change) -> None:
    """Change a checkpoint.json, with a digest that fits."""
    record = json.loads(path.read_bytes())
    del record["sha256"]
    change(record)
    path.write_bytes(checkpoint.encode_record(record))


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
        ("--optimizer muon --muon_lr_scale 2", "optimizer adamw → muon, muon_lr_scale 1.0 → 2.0"),
        ("--schedule wsd --decay_fraction 0.2", "schedule cosine → wsd, decay_fraction 0.5 → 0.2"),
        ("--preset gpt2 --seq_len 32 --total_batch_size 256", "n_layer 2 → 12"),
        ("--data other.txt", "the data text.txt → other.txt, which has other tokens"),
        ("--init_from gpt2", "init_from None → gpt2"),
    ],
)
def test_resume_refuses_what_would_be_another_run(here, finished, capsys, flags, message):
    shutil.copytree(finished / "log", here / "log")
    (here / "other.txt").write_text((here / "text.txt").read_text() + "more")
    line = refuse(capsys, "--device", "cpu", "--resume", "--dtype", "float32", *flags.split())
    assert "--resume log/step_000002: these may not change in a run: " in line
    assert message in line and "start a new run?" in line


def test_resume_of_a_checkpoint_without_newer_options(here, finished, capsys):
    shutil.copytree(finished / "log", here / "log")

    def remove_options(record):
        for name in "optimizer", "muon_lr_scale", "schedule", "decay_fraction":
            del record["config"][name]

    rewrite_record(here / "log/step_000002/checkpoint.json", remove_options)
    assert run_script(train_gpt2.main, ["--resume", "--device", "cpu"]) == 0
    assert "resumed log/step_000002 at step 2: nothing changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda r: r["config"].update(n_layer=2**40),
            "checkpoint.json: --n_layer 1099511627776: must be from 1 to 1000",
        ),
        (lambda r: r["config"].update(keep=0), "checkpoint.json: --keep 0: must be from 1 to"),
        (lambda r: r["config"].update(init_from=""), "checkpoint.json: --init_from: is empty"),
        (
            lambda r: r["config"].update(no_option=1),
            "checkpoint.json: TrainConfig.__init__() got an unexpected keyword",
        ),
        (lambda r: r.pop("flags"), "checkpoint.json: cannot be read as the record of a checkpoint (lacks 'flags')"),
        (lambda r: r.update(step="2"), "checkpoint.json: cannot be read as the record of a checkpoint (step is '2')"),
    ],
)
def test_resume_refuses_a_record_that_no_run_wrote(here, finished, capsys, change, message):
    shutil.copytree(finished / "log", here / "log")
    rewrite_record(here / "log/step_000002/checkpoint.json", change)
    assert message in refuse(capsys, "--resume", "log/step_000002", "--device", "cpu")


def test_resume_from_no_checkpoint_names_those_there_are(here, finished, capsys):
    for name in "log", "log/step_000001":
        line = refuse(capsys, "--resume", finished / name, "--device", "cpu")
        assert f"--resume {finished / name}: is not a checkpoint; there is {finished}/log/step_000002" in line


def test_resume_from_a_damaged_checkpoint_names_the_file(here, finished, capsys):
    shutil.copytree(finished / "log/step_000002", here / "copy")
    with open(here / "copy/model.safetensors", "r+b") as f:
        f.seek(5000)
        f.write(b"\xff")
    line = refuse(capsys, "--resume", "copy", "--device", "cpu")
    assert "copy/model.safetensors: does not match its SHA-256; --resume alone takes the newest that verifies" in line


def test_init_from_another_kind_of_model_is_refused(here, capsys):
    (here / "llama").mkdir()
    (here / "llama/config.json").write_text(json.dumps(dict(model_type="llama")))
    line = refuse(capsys, "--init_from", "llama")
    assert "--init_from llama: " in line and line.endswith("not a GPT-2: its config.json has model_type 'llama'\n")


def test_init_from_refuses_a_shape_that_contradicts_the_model(here, finished, capsys):
    line = refuse(capsys, "--init_from", finished / "log/step_000002", "--n_layer", 3, "--device", "cpu")
    assert "--n_layer 3: the model of --init_from has 2; leave the flag out" in line


def test_init_from_a_model_with_another_vocabulary_is_refused(here, capsys, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    model.GPT(model.GPTConfig(32, 1000, 1, 1, 8)).save_pretrained(other)
    (other / "merges.txt").unlink()
    flags = SMALL[SMALL.index("--seq_len") :]
    line = refuse(capsys, *flags, "--data", "text.txt", "--init_from", other)
    assert f"--init_from {other}: cannot be loaded as a GPT-2: has 1000 tokens, and its tokenizer" in line


def test_log_dir_in_use_is_refused(here, capsys):
    (here / "log").mkdir()
    with FileLock(here / "log/.lock"):
        line = refuse(capsys, *SMALL, "--data", "text.txt", printed="preset ")
    assert "--log_dir log: another run is writing there; give this one its own" in line


@pytest.mark.parametrize(
    "log_dir, problem",
    [
        ("text.txt", "cannot be written: text.txt: File exists"),
        ("text.txt/log", "cannot be written: text.txt/log: Not a directory"),
        ("/proc/log", "cannot be written: /proc/log: No such file or directory"),
    ],
)
def test_log_dir_that_cannot_be_made_is_refused(here, capsys, log_dir, problem):
    line = refuse(capsys, *SMALL, "--data", "text.txt", "--log_dir", log_dir, printed="preset ")
    assert f"--log_dir {log_dir}: {problem}" in line


def test_model_larger_than_memory_is_refused(here, capsys):
    line = refuse(capsys, *SMALL, "--data", "text.txt", "--n_embd", 2**24)
    # 2 layers of 12·n_embd² weights, 16 bytes each, and the embeddings
    assert "the model does not fit into memory: it takes 108,099,897.9 GB a rank, and " in line
    assert " GB are free; try a smaller --preset" in line


def test_more_ranks_than_gpus_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(UserError, match="^8 ranks on a host with 2 GPUs: use --nproc_per_node=2$"):
        Distributed().set_device("cuda")


def test_bad_token_id_that_one_rank_reads_is_named_once(here):
    (here / "data").mkdir()
    ids = np.zeros(10000, dtype=np.uint16)
    shard(here / "data/x_val_000000.npy", ids)
    ids[256 * 8 + 5 * 32 + 3] = 60000  # in the second rank's half of step 8, after the first page
    shard(here / "data/x_train_000001.npy", ids)
    flags = "--data", "data", "--max_steps", 100, "--eval_every", 0
    done = run_ranks("train_gpt2.py", *SMALL, *flags, status=1, cwd=here)  # rank 0 has lost rank 1
    line = "train_gpt2.py: error: x_train_000001.npy: token 2,211 is 60000, but its vocabulary ends at 50256"
    assert done.stderr.splitlines().count(line) == 1 and done.statuses == [1, 2]


def test_error_on_all_ranks_is_printed_by_one(here):
    flags = "--data", "text.txt", "--total_batch_size", 96
    done = run_ranks("train_gpt2.py", *SMALL, *flags, status=2, cwd=here)
    line = "--total_batch_size 96: not a multiple of 64 = seq_len 32 × 2 ranks; 64 and 128 would be, or 1 ranks"
    assert done.stderr == f"train_gpt2.py: error: {line}\n" and done.statuses == [2, 2]
    assert not (here / "log").exists()


@pytest.mark.parametrize("flags", [(), ("--resume", "log/step_000002")])
def test_restarts_by_torchrun_need_resume(here, capsys, monkeypatch, flags):
    """Without it, or with a directory, each restart would begin at the same step again."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert "torchrun --max-restarts: add --resume without DIR" in refuse(capsys, *SMALL, "--data", "text.txt", *flags)


def test_run_continues_without_hellaswag_file_and_network(here, capsys, monkeypatch):
    monkeypatch.setattr(hellaswag, "FILE", here / "hellaswag/hellaswag_val.jsonl")
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:9/hellaswag_val.jsonl")
    flags = "--data", "text.txt", "--max_steps", "2", "--hellaswag_every", "1"
    assert run_script(train_gpt2.main, [*SMALL, *flags]) == 0
    assert capsys.readouterr().out.count("no HellaSwag evaluation: no ") == 1
    assert (here / "log/step_000002").is_dir() and not list((here / "hellaswag").iterdir())


def test_help_explains_every_option_and_preset(capsys):
    options = fields(TrainConfig)
    assert len(options) <= 39
    with pytest.raises(SystemExit) as end:
        run_script(train_gpt2.main, ["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    words = "".join(out.split())  # as it is wrapped to the terminal's width, at hyphens too
    for f in options:
        assert f"  --{f.name}" in out and "".join(f.metadata["help"].split()) in words
    for preset in PRESETS:
        assert f"\n  {preset}" in out
