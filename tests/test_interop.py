"""A checkpoint in other tools: the README's recipes for `transformers`, CTranslate2 and lm-eval, run as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hellaswag
from conftest import BOOKS_TEXT, ENVIRONMENT, ROOT, SMALL, run, run_in_process
from model import GPT
from runtime.distributed import Distributed
from runtime.shards import write_shard
from scoring import Scorer
from tokens import gpt2_tokenizer

RECORDS = ROOT / "tests/data/hellaswag_100.jsonl"
PROMPT = "ROMEO:"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A directory with log/step_000550 in it, as a run leaves one, of a model that knows two sequences of text by heart:
    its greedy text is varied, and each token of it clearly the most likely one."""
    here = tmp_path_factory.mktemp("here")
    text = BOOKS_TEXT.read_text()
    ids = gpt2_tokenizer().encoding.encode_ordinary(text[text.index(PROMPT) :][:1000])[: 2 * 64 + 1]
    for split in "train", "val":
        write_shard(here / f"{split}_000000.npy", np.array(ids, dtype=np.uint16))
    flags = "--n_embd 64 --seq_len 64 --total_batch_size 128 --max_steps 50 --max_lr 1e-2 --save_every 0".split()
    run_in_process(*SMALL, *flags, "--data", here, "--log_dir", here / "log")
    (here / "log/step_000050").rename(here / "log/step_000550")
    return here


@pytest.fixture(scope="module")
def greedy(here) -> str:
    """The prompt and the 50 tokens that the model generates after it."""
    model = GPT.from_pretrained(here / "log/step_000550").eval()
    prompt = gpt2_tokenizer().encoding.encode_ordinary(PROMPT)
    ids = model.generate(torch.tensor([prompt]), 50, temperature=0)  # (1, T)
    best, second = model(ids)[0, len(prompt) - 1 : -1].topk(2).values.unbind(dim=-1)  # (50) each
    # Others differ by 1e-4 at most (tests/test_model.py): no rounding decides a token.
    assert (best - second).min() > 0.1 and len(set(ids[0].tolist())) > 25
    return gpt2_tokenizer().encoding.decode(ids[0].tolist())


def recipe(here, first_line: str) -> str:
    """Run the code block of the README's section that begins so; return what it prints."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## With other tools\n")[1].split("\n## ")[0]
    ((language, code),) = re.findall(rf"```(\w+)\n({re.escape(first_line)}.*?)```", section, re.DOTALL)
    line = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = ENVIRONMENT | dict(PATH=path, HF_DATASETS_CACHE=str(here / "cache"))
    done = subprocess.run(line, cwd=here, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sample_py_generates_the_same_text(here, greedy):
    assert BOOKS_TEXT.read_text().count(greedy) == 1  # what the model was trained on
    flags = "--model", here / "log/step_000550", "--prompt", PROMPT, "--max_new_tokens", 50, "--temperature", 0
    assert run("sample.py", *flags, "--device", "cpu").stdout == greedy + "\n"


def test_transformers_pipeline_recipe_generates_the_same_text(here, greedy):
    assert recipe(here, "from transformers import pipeline") == greedy + "\n"


def test_ctranslate2_recipe_generates_the_same_text(here, greedy):
    recipe(here, "ct2-transformers-converter")
    assert recipe(here, "import ctranslate2") == greedy + "\n"


def test_lm_eval_recipe_equals_hellaswag_py(here):
    """lm_eval finds in the working directory what it would else download under the same name."""
    (here / "Rowan/hellaswag").mkdir(parents=True)
    lines = RECORDS.read_text().splitlines(keepends=True)
    for split in "train", "validation", "test":
        (here / f"Rowan/hellaswag/{split}.jsonl").write_text("".join(lines[:40]))
    table = recipe(here, "lm_eval ")
    theirs = {metric: float(value) for metric, value in re.findall(r"\|(acc|acc_norm) *\|↑ *\| *([\d.]+)\|", table)}
    examples = hellaswag.read_examples(RECORDS, hellaswag.render_lm_eval, limit=40)
    model = GPT.from_pretrained(here / "log/step_000550").eval()
    ours = hellaswag.compute_accuracy(Scorer(model, 2000, Distributed()).score(examples), examples)
    assert theirs == dict(acc=ours.acc / 40, acc_norm=ours.acc_norm / 40), table  # 40 leave no more than three digits
