"""A save in other hands: the README's recipes for `transformers`, CTranslate2 and lm-eval, run as they are printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hellaswag
from conftest import BOOKS_TEXT, ENVIRONMENT, ROOT, SMALL, run
from model import GPT
from tokens import gpt2_encoding, write_shard

RECORDS = ROOT / "tests/data/hellaswag_100.jsonl"
PROMPT = "ROMEO:"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A directory with log/step_000550 in it, as a run leaves one, of a model that knows two rows of text by heart: its
    greedy text is varied, and every token of it clearly the likeliest."""
    here = tmp_path_factory.mktemp("here")
    text = BOOKS_TEXT.read_text()
    ids = gpt2_encoding().encode_ordinary(text[text.index(PROMPT) :][:1000])[: 2 * 64 + 1]
    for split in "train", "val":
        write_shard(here / f"{split}_000000.npy", np.array(ids, dtype=np.uint16))
    flags = "--n_embd 64 --seq_len 64 --total_batch_size 128 --max_steps 50 --max_lr 1e-2 --save_every 0".split()
    run("train_gpt2.py", *SMALL, *flags, "--data", here, "--log_dir", here / "log")
    (here / "log/step_000050").rename(here / "log/step_000550")
    return here


@pytest.fixture(scope="module")
def greedy(here) -> str:
    """What the model makes of the prompt, 50 tokens on."""
    model = GPT.from_pretrained(here / "log/step_000550").eval()
    prompt = gpt2_encoding().encode_ordinary(PROMPT)
    ids = model.generate(torch.tensor([prompt]), 50, temperature=0)  # (1, T)
    best, second = model(ids)[0][0, len(prompt) - 1 : -1].topk(2).values.unbind(dim=-1)  # (50) each
    # Others differ by 1e-4 at most (tests/test_model.py): no rounding decides a token.
    assert (best - second).min() > 0.1 and len(set(ids[0].tolist())) > 25
    return gpt2_encoding().decode(ids[0].tolist())


def recipe(here, first_line: str) -> str:
    """Run the code block of the README's section that begins so; returns what it prints."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## With other tools\n")[1].split("\n## ")[0]
    ((language, code),) = re.findall(rf"```(\w+)\n({re.escape(first_line)}.*?)```", section, re.DOTALL)
    line = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = ENVIRONMENT | dict(PATH=path, HF_DATASETS_CACHE=str(here / "cache"))
    done = subprocess.run(line, cwd=here, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_text_is_varied_and_sample_py_writes_it(here, greedy):
    assert BOOKS_TEXT.read_text().count(greedy) == 1  # what it was trained on
    flags = "--model", here / "log/step_000550", "--prompt", PROMPT, "--max_new_tokens", 50, "--temperature", 0
    assert run("sample.py", *flags, "--device", "cpu").stdout == greedy + "\n"


def test_transformers_pipeline(here, greedy):
    assert recipe(here, "from transformers import pipeline") == greedy + "\n"


def test_ctranslate2(here, greedy):
    pytest.importorskip("ctranslate2")
    recipe(here, "ct2-transformers-converter")
    assert recipe(here, "import ctranslate2") == greedy + "\n"


def test_lm_eval(here):
    """Its command line finds the exam in the working directory, where it else would fetch it, under the same name."""
    pytest.importorskip("lm_eval")
    (here / "Rowan/hellaswag").mkdir(parents=True)
    lines = RECORDS.read_text().splitlines(keepends=True)
    for split in "train", "validation", "test":
        (here / f"Rowan/hellaswag/{split}.jsonl").write_text("".join(lines[:40]))
    table = recipe(here, "lm_eval ")
    theirs = {metric: float(value) for metric, value in re.findall(r"\|(acc|acc_norm) *\|↑ *\| *([\d.]+)\|", table)}
    examples = hellaswag.read_examples(RECORDS, hellaswag.render_lm_eval, limit=40)
    model = GPT.from_pretrained(here / "log/step_000550").eval()
    ours = hellaswag.judge(hellaswag.score(model, examples, 2000)[0], examples)
    assert theirs == dict(acc=ours.acc / 40, acc_norm=ours.acc_norm / 40), table  # 40 leave no more than three digits
