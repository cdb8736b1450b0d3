"""fineweb.py --part: parts made on several machines are one stream to the trainer, a straightforward loop over files."""

from errors import UserError, run_script
import json
import re
import shlex
import shutil

import numpy as np
import pytest

import fineweb
from conftest import BOOKS_TEXT, ROOT, SMALL, run_in_process
from data import DataLoaderLite, open_data
from runtime.options import parse_options
from tokens import gpt2_tokenizer

N = 3


def make_part(source, out, part: str, *flags) -> int:
    files = [str(source / "*.jsonl")]
    return run_script(
        fineweb.main, ["--files", *files, "--out_dir", str(out), "--part", part, "--shard_size", "700", *flags]
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Seven files of documents."""
    directory = tmp_path_factory.mktemp("source")
    text = BOOKS_TEXT.read_text()
    for i in range(7):
        lines = (json.dumps(dict(text=text[n : n + 900])) for n in range(i * 5000, i * 5000 + 4500, 900))
        (directory / f"{i}.jsonl").write_text("\n".join(lines) + "\n")
    return directory


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """All parts, the last first, in one directory."""
    out = tmp_path_factory.mktemp("whole")
    for i in range(N, 0, -1):
        assert make_part(source, out, f"{i}/{N}") == 0
    return out


def documents(path) -> list[int]:
    encode = gpt2_tokenizer().encoding.encode_ordinary
    return [token for line in path.read_text().splitlines() for token in [50256, *encode(json.loads(line)["text"])]]


def test_parts_are_one_stream(source, whole):
    """Files are dealt in turn. The first 700 tokens, of part 1, are for validation; nothing else is left out."""
    files = sorted(source.glob("*.jsonl"))
    expected = [token for i in range(N) for path in files[i::N] for token in documents(path)]
    data = open_data(whole)
    assert np.concatenate([ids for _, ids in data.val]).tolist() == expected[:700]
    assert np.concatenate([ids for _, ids in data.train]).tolist() == expected[700:]
    loader = DataLoaderLite(data.train, T=64)
    stream = np.array(expected[700:])
    for i in 0, 3, loader.n_rows - 1:
        assert loader.rows(i, 1)[0].tolist() == stream[i * 64 : i * 64 + 65].tolist()
    assert {name.split("/")[0] for name, _ in data.train} == {f"part-0000{i}-of-00003" for i in (1, 2, 3)}


def test_run_on_parts_and_verify(whole, tmp_path, capsys):
    done = run_in_process(*SMALL, "--data", whole, "--log_dir", tmp_path / "log", "--max_steps", 2)
    assert re.search(r"data +\S+, \d+ shards of [\d,]+", done.stdout.replace("\n         ", " "))
    assert run_script(fineweb.main, ["--verify", str(whole)]) == 0
    assert capsys.readouterr().out.count("shards are as written") == N


def test_missing_and_foreign_parts_are_refused(source, whole, tmp_path):
    for i in 1, 3:
        make_part(source, tmp_path / "a", f"{i}/{N}")
    with pytest.raises(UserError, match="of 3 parts, these are missing or do not belong there: part-00002-of-00003"):
        open_data(tmp_path / "a")
    make_part(source, tmp_path / "a", "2/2")
    with pytest.raises(UserError, match="part-00002-of-00002"):
        open_data(tmp_path / "a")
    for name in "1/2", "2/2":
        make_part(source, tmp_path / "b", name)
    (source / "7.jsonl").write_text((source / "6.jsonl").read_text())
    try:
        make_part(source, tmp_path / "c", "1/2")
    finally:
        (source / "7.jsonl").unlink()
    (tmp_path / "c/part-00001-of-00002").rename(tmp_path / "c/old")
    (tmp_path / "b/part-00001-of-00002").rename(tmp_path / "b-old")
    (tmp_path / "c/old").rename(tmp_path / "b/part-00001-of-00002")
    with pytest.raises(UserError, match="part-00002-of-00002/manifest.json: is of another source or another part"):
        open_data(tmp_path / "b")


@pytest.mark.parametrize(
    "part, message",
    [
        ("4/3", "--part 4/3: must be i/N, from 1/N to N/N"),
        ("0/3", "--part 0/3: must be i/N"),
        ("three", "--part three: must be i/N"),
        ("01/16", "--part 01/16: must be i/N"),  # not "1/16", by which the first part is told
        ("8/8", "--part 8/8: the source has 7 files, so there can be no more parts"),
    ],
)
def test_wrong_part_is_one_line(source, tmp_path, capsys, part, message):
    assert make_part(source, tmp_path / "out", part) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_parts_get_the_same_trained_tokenizer(source, tmp_path):
    for i in 1, 2:
        assert make_part(source, tmp_path, f"{i}/2", "--train_tokenizer", "400") == 0
    assert open_data(tmp_path).tokenizer.vocab_size == 400


def test_copied_tokenizer_is_used_by_all_parts(source, tmp_path):
    """vocab.json and merges.txt in --out_dir, where the parts are made."""
    for name, content in gpt2_tokenizer().first(300).files.items():
        (tmp_path / name).write_bytes(content)
    for i in 1, 2:
        assert make_part(source, tmp_path, f"{i}/2") == 0
    data = open_data(tmp_path)
    assert data.tokenizer == gpt2_tokenizer().first(300)
    (first, *_) = (json.loads(line)["text"] for line in (source / "0.jsonl").read_text().splitlines())
    expected = [299, *gpt2_tokenizer().first(300).encode(first)]
    assert data.val[0][1][: len(expected)].tolist() == expected[:700]


def test_shards_beside_parts_are_refused(source, whole, tmp_path):
    np.save(shutil.copytree(whole, tmp_path / "whole") / "x_train_000001.npy", np.zeros(9, dtype=np.uint16))
    with pytest.raises(UserError, match="do not belong there: shards beside the parts"):
        open_data(tmp_path / "whole")


def test_part_by_another_part_s_name_is_refused(source, tmp_path):
    for i in 1, 2, 3:
        make_part(source, tmp_path, f"{i}/3")
    names = [tmp_path / f"part-0000{i}-of-00003" for i in (2, 3)]
    names[0].rename(tmp_path / "old")
    names[1].rename(names[0])
    (tmp_path / "old").rename(names[1])
    with pytest.raises(UserError, match="part-00002-of-00003/manifest.json: is of another source or another part"):
        open_data(tmp_path)


@pytest.mark.parametrize("flags", ["--part 1/2", "--train_tokenizer 300"])
def test_ready_shards_have_neither_parts_nor_other_tokens(tmp_path, capsys, flags):
    assert run_script(fineweb.main, ["--pretokenized", "1", "--out_dir", str(tmp_path), *flags.split()]) == 2
    assert "--pretokenized: these shards are ready, without --part and --train_tokenizer" in capsys.readouterr().err


def test_commands_of_the_data_page_are_valid():
    page = (ROOT / "docs/data.md").read_text()
    commands = re.findall(r"^python fineweb\.py ((?:.*\\\n)*.*?)(?:  +#.*)?$", page, re.MULTILINE)
    assert len(commands) > 8
    for command in commands:
        command = command.replace("\\\n", " ").replace("$SLURM_ARRAY_TASK_ID", "3").replace("$SLURM_CPUS_PER_TASK", "4")
        words = shlex.split(command)
        assert len(parse_options(fineweb.Options, words, "")) == sum(word.startswith("--") for word in words)
