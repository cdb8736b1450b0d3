"""bench.py: every variant runs, in a child as its user runs it, and the ratios in its tables are right."""

from errors import run_script
import json
import re
from argparse import Namespace
from statistics import median

import pytest
import torch

import bench
import train_gpt2
from conftest import ROOT, run
from model import GPTConfig

# A network small enough for a test, here and in the children.
SHRINK = """
bench.SHAPES = dict.fromkeys(bench.SHAPES, ("small", 2))
bench.GPT2 = GPTConfig(block_size=512, n_layer=1, n_head=1, n_embd=16)
train_gpt2.PRESETS["small"] |= dict(n_layer=1, n_head=1, n_embd=16, seq_len=16)
"""
SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from errors import run_script
import bench, train_gpt2
from model import GPTConfig
{SHRINK}
bench.SCRIPT = __file__
bench.BENCHMARKS["generate"] = {{"GPT.generate": bench.generate}}
if __name__ == "__main__":
    sys.exit(run_script(bench.main))
"""

PEER = """
import torch
import torch.nn as nn
from dataclasses import dataclass
from hellaswag import render_example, iterate_examples

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, idx, targets=None):
        logits = self.wte(idx) @ self.wte.weight.t()
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, device_type):
        if master_process:
            print("fused")
        return torch.optim.AdamW(self.parameters(), lr=learning_rate)

# ----
import tiktoken
raise SystemExit("the data is not there")
"""


@pytest.fixture
def small(monkeypatch):
    """Every network is small, and what a variant changes is restored."""
    for module, name in (bench, "SHAPES"), (bench, "GPT2"), (train_gpt2, "tune_malloc"):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setitem(train_gpt2.PRESETS, "small", dict(train_gpt2.PRESETS["small"]))
    exec(SHRINK, dict(bench=bench, train_gpt2=train_gpt2, GPTConfig=GPTConfig))


@pytest.fixture
def args(tmp_path):
    """What the variants are called with."""
    (tmp_path / "train_gpt2.py").write_text(PEER)
    return Namespace(device=torch.device("cpu"), dtype=torch.float32, peer=tmp_path)


UNTRIED = {"train_gpt2.py", bench.CEILING, "transformers.generate, bfloat16"}  # compiled, large, or tried in float32
VARIANTS = [
    (name, variant) for name in ("small", "memory", "generate", "lambada") for variant in bench.BENCHMARKS[name]
]


@pytest.mark.parametrize("name, variant", [(name, v) for name, v in VARIANTS if v not in UNTRIED])
def test_variant_gives_a_figure(small, args, name, variant):
    assert bench.BENCHMARKS[name][variant](args, name) > 0


def test_script_measures_in_children(tmp_path):
    script = tmp_path / "bench.py"
    script.write_text(SCRIPT)
    flags = "generate", "--repeats", 1, "--device", "cpu", "--json", tmp_path / "figures.json"
    lines = run(script, *flags).stdout.splitlines()
    assert re.fullmatch(r"cpu, 1 threads, torch\.\w+, torch \S+", lines[0])
    assert lines[1:3] == ["", "generate (tokens/s)"] and len(lines) == 4
    figures = json.loads((tmp_path / "figures.json").read_text())["generate"]
    assert figures["unit"] == "tokens/s" and [*figures["runs"]] == ["GPT.generate"]
    assert all(len(values) == 1 and values[0] > 0 for values in figures["runs"].values())


def fake(monkeypatch, figures: dict[str, list[float]]) -> None:
    """Have these figures measured, in turn."""
    turns = {variant: iter(values) for variant, values in figures.items()}
    monkeypatch.setattr(bench, "measure_in_child", lambda args, name, variant: next(turns[variant]))


def test_table_compares_with_the_last_variant(monkeypatch, capsys):
    """Ratios are medians of those of one turn, not ratios of medians."""
    figures = {
        "GPT.generate": [10, 40, 30],
        "transformers.generate, float32": [4, 5, 6],
        "transformers.generate, bfloat16": [1, 1, 1],
        "without a cache": [10, 10, 20],
    }
    fake(monkeypatch, figures)
    assert run_script(bench.main, ["generate", "--repeats", "3", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "generate (tokens/s)" and len(lines) == 3 + len(figures)
    for line, (variant, values) in zip(lines[3:], figures.items(), strict=True):
        ratio = median(a / b for a, b in zip(values, figures["without a cache"], strict=True))
        figure = rf"{median(values)}   \({min(values)} to {max(values)}\)   × {ratio:.2f}"
        assert re.fullmatch(rf"  {re.escape(variant)} +{figure}", line), line
    assert "× 1.50" in lines[3]  # while the ratio of the medians is 3


def test_table_shows_the_fraction_of_the_matrix_rate(monkeypatch, capsys):
    figures = {variant: [float(i)] for i, variant in enumerate(bench.BENCHMARKS["small"], 1)}
    fake(monkeypatch, figures)
    assert run_script(bench.main, ["small", "--repeats", "1", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "build-nanogpt" not in out  # without --peer
    assert re.search(r"train_gpt2.py .* × 0.17, 25% of the matrix rate", out)


def test_json_holds_every_figure(monkeypatch, tmp_path):
    figures = {"--optimizer muon": [3.0, 4.0], "--optimizer adamw": [1.0, 2.0]}
    fake(monkeypatch, figures)
    flags = "optimizer", "--repeats", 2, "--device", "cpu", "--json", tmp_path / "x.json"
    assert run_script(bench.main, [*map(str, flags)]) == 0
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["optimizer"] == dict(unit="tokens/s", runs=figures) and written["device"] == "cpu"


@pytest.mark.parametrize(
    "child, reason",
    [
        ("raise RuntimeError('no room')", "RuntimeError: no room"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9"),
        ("import sys; sys.exit('bench.py: error: a line')", "bench.py: error: a line"),
    ],
)
def test_child_that_fails_is_one_line(tmp_path, monkeypatch, capsys, child, reason):
    (tmp_path / "child.py").write_text(child)
    monkeypatch.setattr(bench, "SCRIPT", str(tmp_path / "child.py"))
    assert run_script(bench.main, ["generate", "--device", "cpu", "--json", str(tmp_path / "x.json")]) == 1
    assert capsys.readouterr().err == f"bench.py: error: generate, GPT.generate: {reason}\n"
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("nonsense", "nonsense: no such benchmark; there are small, 124M"),
        ("small nonsense", "nonsense: no such benchmark"),
        ("small --variant nonsense", "--variant nonsense: no such variant of small"),
        ("--device foo", "--device foo: PyTorch finds no such device here"),
        ("--repeats 0", "--repeats 0: must be from 1 to 1000"),
        ("--repeats 1e3", "--repeats: invalid int value: '1e3'"),
        ("--peer nowhere", "--peer nowhere: there is no train_gpt2.py in it"),
        ("--json nowhere/x", "--json: cannot write nowhere/x: No such file or directory"),
        ("--json .", "--json: cannot write .: it is a directory"),
        ("--reapets 1", "--reapets: there is no such option; did you mean --repeats"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("x")
    assert run_script(bench.main, flags.split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"bench.py: error: {message}") and err.count("\n") == 1 and not out
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]
