"""plot.py: the picture holds what was logged."""

import json
import sys

import pytest

import plot
import train_gpt2
from conftest import SMALL


def write_run(directory, data="edu_fineweb10B", hella=True):
    """Four steps of 1,000 tokens and half a minute each."""
    directory.mkdir()
    (directory / "run.json").write_text(json.dumps(dict(config=dict(data=f"x/{data}", total_batch_size=1000))))
    rows = [f"{s},{1000 * (s + 1)},{9 - s},{0.1 * s},{2.5},30" for s in range(4)]
    (directory / "steps.csv").write_text("\n".join(["step,tokens,loss,lr,norm,seconds", *rows, ""]))
    lines = [f"{s} train {9 - s}" for s in range(4)] + ["0 val 9.5", "4 val 5.5"] + ["0 hella 0.25"] * hella
    (directory / "log.txt").write_text("\n".join([*lines, ""]))
    return directory


@pytest.fixture
def figure(monkeypatch):
    """A list that the figures which are drawn are added to."""
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    return figures


def test_the_picture_shows_every_value_over_tokens_and_time(tmp_path, figure):
    plot.draw([write_run(tmp_path / "a"), write_run(tmp_path / "b")], tmp_path / "x.png")
    by_tokens, by_time, lr, norm, hella = figure[0].axes
    assert [panel.get_xlabel() for panel in (by_tokens, by_time)] == ["tokens (thousands)", "minutes of training"]
    train, val = by_tokens.lines[:2]
    assert [*train.get_xdata()] == [0, 1, 2, 3] and [*train.get_ydata()] == [9, 8, 7, 6]
    assert [*val.get_xdata()] == [0, 4] and [*val.get_ydata()] == [9.5, 5.5]
    assert [*by_time.lines[1].get_xdata()] == [0, 2]
    assert [*lr.lines[0].get_xdata()] == [1, 2, 3, 4]
    assert [*hella.lines[0].get_ydata()] == [25]
    assert [text.get_text() for text in by_tokens.get_legend().get_texts()] == [
        "a on edu_fineweb10B",
        "b on edu_fineweb10B",
    ]
    assert {text.get_text() for text in hella.texts} == {"GPT-2 124M", "GPT-3 124M"}
    assert [text.get_text() for text in by_tokens.texts] == ["GPT-2 124M"]
    assert by_tokens.lines[0].get_color() != by_tokens.lines[2].get_color()
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_what_gpt2_reached_on_other_data_is_not_drawn(tmp_path, figure):
    plot.draw([write_run(tmp_path / "a", data="input.txt", hella=False)], tmp_path / "x.png")
    assert len(figure[0].axes) == 4 and not any(panel.texts for panel in figure[0].axes)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda d: None, "log: holds no run: run.json cannot be read (No such file"),
        (
            lambda d: (write_run(d) / "steps.csv").write_text("step,tokens,loss,lr,norm,seconds\n"),
            "log: holds no steps",
        ),
        (lambda d: (write_run(d) / "run.json").write_text("{}"), "log: holds no steps"),
        (lambda d: (write_run(d) / "run.json").write_text('{"config": {}}'), "log: holds no steps"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, make, message):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "log")
    assert plot.main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"plot.py: error: {message}") and error.count("\n") == 1
    assert not (tmp_path / "log/curves.png").exists()


def test_without_matplotlib_a_run_says_so_and_ends_well(tmp_path, text, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    flags = *SMALL, "--data", text, "--log_dir", tmp_path / "log", "--max_steps", 1
    assert train_gpt2.main([*map(str, flags)]) == 0
    assert f"no {tmp_path}/log/curves.png: " in capsys.readouterr().out
