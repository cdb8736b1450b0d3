"""sample.py as its user runs it: prompts from everywhere, text as it comes, characters never cut."""

from errors import run_script
import io
import json
import os
import pty
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sample
from conftest import ENVIRONMENT, command, perturbed, run
from model import GPTConfig
from tokens import END_OF_TEXT, gpt2_tokenizer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """The directory of a random model whose weights are far from their small initial values."""
    directory = tmp_path_factory.mktemp("model_dir") / "log/step_000010"
    perturbed(GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=32), std=0.2).save_pretrained(directory)
    return directory


@settings(deadline=None)  # the first one builds the tokenizer
@given(st.text(max_size=40), st.text(min_size=1, max_size=3) | st.none())
def test_streamed_text_ends_before_the_stop(text, stop):
    """Whatever the tokens, no character comes in halves; a stop string is found wherever tokens end."""
    tokens = [token for character in text for token in gpt2_tokenizer().encoding.encode_ordinary(character)]
    parts = [*sample.stream_text(iter([*tokens, END_OF_TEXT, 11]), gpt2_tokenizer(), stop)]
    assert "".join(parts) == (text.split(stop)[0] if stop else text)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in parts)


def test_text_comes_as_soon_as_it_is_decided():
    encoding = gpt2_tokenizer().encoding
    flag = [*map(encoding.encode_single_token, [b"\xf0\x9f", b"\x98", b"\x80"])]
    assert encoding.decode(flag) == "😀"
    assert [*sample.stream_text(iter([464, *flag, 1770, 13, 383]), gpt2_tokenizer(), "Mr.")] == [
        "The",
        "",
        "",
        "😀",
        " ",
        "",
    ]
    assert [*sample.stream_text(iter([464, *flag[:2]]), gpt2_tokenizer(), None)] == [
        "The",
        "",
        "",
        "\ufffd",
    ]  # the last token was half of one


def test_greedy_text_is_that_of_transformers(model_dir):
    from transformers import AutoTokenizer, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    prompt = tokenizer("First Citizen:", return_tensors="pt")
    theirs = GPT2LMHeadModel.from_pretrained(model_dir)
    ids = theirs.generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=END_OF_TEXT)
    flags = (
        "--model",
        model_dir,
        "--prompt",
        "First Citizen:",
        "--max_new_tokens",
        20,
        "--temperature",
        0,
        "--device",
        "cpu",
    )
    assert run("sample.py", *flags).stdout == tokenizer.decode(ids[0], clean_up_tokenization_spaces=False) + "\n"


def test_prompts_of_all_kinds_for_the_newest_checkpoint(model_dir, tmp_path, monkeypatch, capsys):
    def output(*more, stdin: str | None = None) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        assert run_script(sample.main, [*map(str, flags), *map(str, more)]) == 0
        return capsys.readouterr().out

    (tmp_path / "log/step_000007").mkdir(parents=True)  # nothing in it: it must not be the one that is taken
    shutil.copytree(model_dir, tmp_path / "log/step_000012")
    (tmp_path / "beginning.txt").write_text("Straße\n")
    flags = "--num_samples", 2, "--max_new_tokens", 40, "--device", "cpu"
    monkeypatch.chdir(tmp_path)
    by_flag = output("--prompt", "Straße")
    assert by_flag.count("Straße") >= 2 and by_flag.count("-" * 80) == 2
    first, second, _ = by_flag.split("-" * 80 + "\n")
    assert first != second
    assert output("--prompt_file", "beginning.txt") == by_flag
    assert output(stdin="Straße\n") == by_flag
    assert output("--seed", 2, stdin="Straße\n") != by_flag


def test_a_session_at_a_terminal(model_dir):
    ours, theirs = pty.openpty()
    line = command("sample.py", "--model", model_dir, "--max_new_tokens", 5, "--device", "cpu")
    process = subprocess.Popen(
        line, env=ENVIRONMENT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    output = b""

    def read_until(text: bytes, count: int) -> None:
        nonlocal output
        while output.count(text) < count:
            output += os.read(ours, 1000)

    read_until(b"prompt> ", 1)
    os.write(ours, b"Hello\n")
    read_until(b"prompt> ", 2)
    os.write(ours, b"\x04")
    assert process.wait(timeout=30) == 0
    answer = output.split(b"Hello\r\n")[1].split(b"prompt> ")[0]
    assert len(answer.strip()) > 3 and b"Traceback" not in output


@pytest.mark.parametrize("temperature", ["1e-46", "1e-300", "1e-40", "1e-9"])
def test_tiny_temperature_takes_the_most_likely_token(model_dir, capsys, temperature):
    flags = "--model", str(model_dir), "--prompt", "x", "--device", "cpu", "--max_new_tokens", "20", "--temperature"
    texts = []
    for value in "0", temperature:
        assert run_script(sample.main, [*flags, value]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--prompt x", "no checkpoint in log/: train a model with python train_gpt2.py"),
        ("--prompt x --model nowhere/at/all", "--model nowhere/at/all: cannot be loaded as a GPT-2"),
        ("--prompt x --temperature nan", "--temperature nan: must be from 0 to 100"),
        ("--prompt x --num_samples 0", "--num_samples 0: must be from 1 to 1e+06"),
        ("--prompt x --top_p 0", "--top_p 0.0: must be from 1e-06 to 1"),
        ("--prompt x --seed 99999999999999999999999", "--seed 99999999999999999999999: must be from 0 to 1e+18"),
        (
            "--prompt x --model ../x/step_000001",
            "cannot be loaded as a GPT-2: no such directory; in ../x there is garbage",
        ),
        ("--prompt x --model garbage", "--model garbage: cannot be loaded as a GPT-2"),
        ("--prompt x --prompt_file y", "--prompt and --prompt_file: give one of them"),
        ("--prompt_file nowhere.txt", "--prompt_file nowhere.txt: No such file or directory"),
        ("--prompt_file latin1.txt", "--prompt_file latin1.txt: the prompt is not utf-8 text (byte 1)"),
        ("--prompt x --device gpu", "--device gpu: PyTorch finds no such device here"),
        ("--prompt x --temperature=-1e-9", "--temperature -1e-09: must be from 0 to 100"),
        ("--prompt x --temperature warm", "--temperature: invalid float value: 'warm'"),
        ("--prompt x --max_new_tokens 0", "--max_new_tokens 0: must be from 1 to 1e+06"),
        ("--prompt x --top_k 50258", "--top_k 50258: must be from 0 to 50257"),
        ("--prompt x --top_k -1", "--top_k -1: must be from 0 to 50257"),
        ("--prompt x --top_p nan", "--top_p nan: must be from 1e-06 to 1"),
        ("--prompt x --seed -1", "--seed -1: must be from 0 to 1e+18"),
        ("--prompt x --device meta", "--device meta: PyTorch finds no such device here"),
        (
            "--prompt x --model nan",
            "--model nan: cannot be loaded as a GPT-2: nan: h.0.ln_1.weight: holds values that are not finite",
        ),
        ("--prompt_file .", "--prompt_file .: Is a directory"),
        ("--prompt", "--prompt: expected one argument"),
        ("--prompt x --tempreature 1", "--tempreature: there is no such option; did you mean --temperature"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, flags, message):
    tmp_path /= "x"
    tmp_path.mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin1.txt").write_bytes("aß".encode("latin1"))
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage/config.json").write_text(json.dumps(GPTConfig().to_hf()))
    (tmp_path / "garbage/pytorch_model.bin").write_bytes(b"garbage")
    model = perturbed(GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=8))
    model.transformer.h[0].ln_1.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    status = run_script(sample.main, flags.split())
    out, err = capsys.readouterr()
    assert status == 2 and not out
    assert err.startswith("sample.py: error: ") and err.count("\n") == 1 and message in err
