"""plot.py: the picture holds what was logged."""

from errors import run_script
import json
import shutil
import statistics
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import plot
import recipe
import train_gpt2
from conftest import ROOT, SMALL, run, with_fault
from runtime import plan


def write_run(directory, data="edu_fineweb10B", hella=True):
    """Four steps of 1,000 tokens and half a minute each."""
    directory.mkdir()
    network = dict(n_layer=2, n_head=2, n_embd=32, seq_len=32)
    config = dict(preset="tiny", data=f"x/{data}", total_batch_size=1000, max_steps=4, **network)
    (directory / "run.json").write_text(json.dumps(dict(config=config)))
    rows = [f"{s},{1000 * (s + 1)},{9 - s},{0.1 * s},{2.5},30" for s in range(4)]
    (directory / "steps.csv").write_text("\n".join(["step,tokens,loss,lr,norm,seconds", *rows, ""]))
    lines = [f"{s} train {9 - s}" for s in range(4)] + ["0 val 9.5", "4 val 5.5"] + ["0 hella 0.25"] * hella
    (directory / "log.txt").write_text("\n".join([*lines, ""]))
    return directory


@pytest.fixture
def figure(monkeypatch):
    """A list that the figures which are drawn are added to."""
    from matplotlib.figure import Figure

    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: figures.append(self) or savefig(self, *args, **kw))
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
    assert run_script(plot.main, []) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"plot.py: error: {message}") and error.count("\n") == 1
    assert not (tmp_path / "log/curves.png").exists()


def test_without_matplotlib_a_run_says_so_and_ends_well(tmp_path, text, monkeypatch, capsys, drawn_curves):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    flags = *SMALL, "--data", text, "--log_dir", tmp_path / "log", "--max_steps", 1
    assert train_gpt2.main([*map(str, flags)]) == 0
    assert f"no {tmp_path}/log/curves.png: " in capsys.readouterr().out


# What a crash or a hostile file may leave


@pytest.mark.parametrize(
    "name, torn", [("steps.csv", "4,50"), ("log.txt", "4 tra"), ("steps.csv", "\0\0\0"), ("log.txt", "4 val 1")]
)
def test_torn_last_line_is_skipped(tmp_path, name, torn):
    directory = write_run(tmp_path / "a")
    before = plot.Run.read(directory)
    with open(directory / name, "a") as f:
        f.write(torn)
    assert plot.Run.read(directory) == before


def test_hole_is_compared_as_far_as_there_are_points(tmp_path, capsys):
    log = shutil.copytree(SEEDS[0], tmp_path / "log")
    lines = (log / "steps.csv").read_text().splitlines(keepends=True)
    (log / "steps.csv").write_text("".join(lines[:38] + lines[42:]))  # steps 37 to 40, of two means
    assert run_script(plot.main, ["--check", str(log)]) == 0
    n = (len(lines) - 1) // 10
    assert f"training loss: {n - 2} of {n - 2} points within the bands" in capsys.readouterr().out


def edit_run(**changes):
    """Return a function that writes a run whose run.json has these changes, None leaving a key out."""

    def make(directory):
        config = json.loads((write_run(directory) / "run.json").read_text())["config"] | changes
        config = {key: value for key, value in config.items() if value is not None}
        (directory / "run.json").write_text(json.dumps(dict(config=config)))

    return make


def edit_log(name, content):
    """Return a function that writes a run in which this file has this content."""
    return lambda directory: (write_run(directory) / name).write_bytes(content)


HEADER = b"step,tokens,loss,lr,norm,seconds\n"


@pytest.mark.parametrize(
    "make",
    [
        edit_run(data=None),
        edit_run(data=5),
        edit_run(total_batch_size="many"),
        edit_run(total_batch_size=None),
        edit_log("run.json", b"[]"),
        edit_log("run.json", b"null"),
        edit_log("run.json", b"\xff"),
        edit_log("run.json", b"[" * 100000),
        edit_log("steps.csv", b""),
        edit_log("steps.csv", b"a,b\n1,2\n"),
        edit_log("steps.csv", b"step,tokens,loss\n0,1000,9\n"),
        edit_log("steps.csv", HEADER + b"0,1000,9,0.1,2.5\n"),
        edit_log("steps.csv", HEADER + b"0,1000,nine,0.1,2.5,30\n"),
        edit_log("steps.csv", HEADER + b"nan,1000,9,0.1,2.5,30\n"),
        edit_log("steps.csv", HEADER + b"0,inf,9,0.1,2.5,30\n"),
        edit_log("steps.csv", b"\xff\n"),
        edit_log("log.txt", b"0 val\n"),
        edit_log("log.txt", b"zero val 5\n"),
        edit_log("log.txt", b"0 val five\n"),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--check",)])
def test_bad_log_is_one_line(tmp_path, capsys, make, flags):
    make(tmp_path / "log")
    assert run_script(plot.main, [*flags, str(tmp_path / "log")]) == 2
    error = capsys.readouterr().err
    assert error == f"plot.py: error: {tmp_path}/log: holds no steps of a run that could be drawn\n"
    assert not (tmp_path / "log/curves.png").exists()


@pytest.mark.parametrize("loss", ["nan", "inf", "-inf", "1e30", "0"])
def test_loss_of_any_size_is_drawn(tmp_path, loss):
    log = write_run(tmp_path / "log")
    (log / "steps.csv").write_bytes(
        HEADER + b"".join(b"%d,1000,%s,0,%s,0\n" % (i, loss.encode(), loss.encode()) for i in range(3))
    )
    assert run_script(plot.main, [str(log)]) == 0 and (log / "curves.png").exists()


@pytest.mark.parametrize(
    "flags, message, status",
    [
        ("log --out nowhere/x.png", "--out: cannot write nowhere/x.png: No such file or directory", 2),
        ("log --out log", "--out: cannot write log: it is a directory", 2),
        ("log --out x.pdf", "--out x.pdf: the picture is a PNG", 2),
        ("log --out full.png", "full.png: cannot be written (No space left on device)", 4),
        (f"log --out {'x' * 300}.png", "--out: cannot write xxx", 2),
        ("log/run.json", "log/run.json: holds no run: run.json cannot be read (Not a directory)", 2),
        ("log nowhere", "nowhere: holds no run", 2),
        ("log --chek", "--chek: there is no such option; did you mean --check?", 2),
    ],
)
def test_bad_flags_are_one_line(tmp_path, monkeypatch, capsys, flags, message, status):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "log")
    (tmp_path / "full.png").symlink_to("/dev/full")
    assert run_script(plot.main, flags.split()) == status
    out, err = capsys.readouterr()
    assert err.startswith(f"plot.py: error: {message}") and err.count("\n") == 1 and not out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full.png", "log"]


# Is my loss normal?

SEEDS = sorted(plot.REFERENCE.glob("*/seed-*"))
WRONG = Path(__file__).parent / "data" / "wrong"  # logs of the first steps of tiny, each with one mistake


def test_the_reference_is_of_the_presets_as_they_are():
    """A preset that is changed needs new runs."""
    defaults = {f.name: f.default for f in fields(recipe.TrainConfig)}
    for log_dir in SEEDS:
        config = plot.Run.read(log_dir).config
        preset = defaults | recipe.PRESETS[log_dir.parent.name] | dict(preset=log_dir.parent.name)
        material = {*plan.RESUME_INVARIANT, "eval_tokens"} - {"seed", "vocab_size"}  # GPT-2's
        assert {k: config[k] for k in material} == {k: preset[k] for k in material}
        assert log_dir.name == f"seed-{config['seed']}"


def test_picture_of_one_run_has_its_reference(figure, tmp_path):
    """As a run draws it at its end; there is none for several runs, nor, but to compare, for another recipe."""
    log_dir = plot.REFERENCE / "tiny/seed-1"
    wrong = Path(shutil.copytree(WRONG / "ten-times", tmp_path / "wrong"))
    plot.draw([log_dir], tmp_path / "a.png")
    assert run_script(plot.main, ["--check", str(wrong)]) == 1
    plot.draw([log_dir, log_dir], tmp_path / "b.png")
    plot.draw([write_run(tmp_path / "a")], tmp_path / "c.png")
    plot.draw([wrong], tmp_path / "d.png")
    legends = [{text.get_text() for text in drawn.axes[0].get_legend().get_texts()} for drawn in figure]
    training, validation = "normal training loss of tiny", "normal validation loss of tiny"
    assert [training in legend for legend in legends] == [True, True, False, False, False]
    assert [validation in legend for legend in legends] == [True, False, False, False, False]  # the second ends before


@pytest.mark.parametrize("log_dir", SEEDS, ids=lambda d: f"{d.parent.name}-{d.name}")
def test_each_reference_seed_is_normal_among_the_others(log_dir, capsys):
    log = plot.Run.read(log_dir)
    others = [run for run in plot.reference_for(log) if run.config["seed"] != log.config["seed"]]
    assert len(others) == len([*log_dir.parent.glob("seed-*")]) - 1 >= 4
    assert plot.check(log, others), capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["ten-times", "no-warm-up", "targets-are-inputs", "targets-one-too-far"])
def test_mistakes_are_found(wrong, tmp_path, capsys):
    log_dir = shutil.copytree(WRONG / wrong, tmp_path / wrong)
    assert plot.main(["--check", str(log_dir)]) == 1
    out = capsys.readouterr().out
    assert f"of 550 steps, compared with {len([*plot.REFERENCE.glob('tiny/seed-*')])} seeds of tiny" in out
    assert "first outside at step" in out and "The loss is not that of this recipe." in out
    assert ("--max_lr is 0.02, and 0.002 in the reference" in out) == (wrong == "ten-times")
    assert ("--warmup_steps is 0, and 100 in the reference" in out) == (wrong == "no-warm-up")
    assert (log_dir / "curves.png").read_bytes().startswith(b"\x89PNG")


def a_run(generator: np.random.Generator, shift: float = 0.0, first: int = 0) -> plot.Run:
    """One of 200 steps whose losses have nothing but noise."""
    columns = dict(step=[*range(first, 200)], loss=[*generator.normal(5 + shift, 0.1, 200)[first:]])
    val = dict(zip(range(0, 201, 40), [11.0, *generator.normal(5 + shift, 0.02, 5)], strict=True))
    return plot.Run("a", columns, dict(val=val), dict(preset="tiny", max_steps=200))


def test_bands_are_five_standard_deviations_of_one_more_run():
    """By the book; and of a thousand runs next to none is rejected, while a fifth of a nat is never let pass."""
    generator = np.random.default_rng(0)
    five = [a_run(generator) for _ in range(5)]
    bands = plot.bands(five)
    assert [*bands["training"]] == [*range(10, 201, 10)] and [*bands["validation"]] == [40, 80, 120, 160, 200]
    means = [[statistics.mean(run.columns["loss"][i : i + 10]) for run in five] for i in range(20, 170, 10)]
    vals = [[run.results["val"][step] for run in five] for step in range(40, 201, 40)]
    for (low, high), here, around in (
        (bands["training"][100], means[7], means),
        (bands["validation"][80], vals[1], vals),
    ):
        s = statistics.mean(map(statistics.variance, around)) ** 0.5
        assert (low + high) / 2 == pytest.approx(statistics.mean(here))
        assert (high - low) / 2 == pytest.approx(5 * s * (6 / 5) ** 0.5)
    rejected = sum(
        not plot.check(a_run(generator), five)
        for _ in range(40)
        if (five := [a_run(generator) for _ in range(5)])
        for _ in range(25)
    )
    assert rejected <= 10
    assert not any(plot.check(a_run(generator, shift=shift), five) for shift in (-0.2, 0.2))


def test_steps_count_from_the_start_of_the_run(capsys):
    """As where a resumed run has a directory of its own; the step it was cut off in counts for nothing."""
    generator = np.random.default_rng(0)
    five = [a_run(generator) for _ in range(5)]
    late = a_run(generator, first=33)
    late.results["val"] = {}
    assert [*late.curves["training"]] == [*range(50, 201, 10)]
    assert plot.check(late, five) and "a: 200 of 200 steps" in capsys.readouterr().out


def test_validation_on_other_tokens_is_not_compared(capsys):
    generator = np.random.default_rng(0)
    five = [a_run(generator) for _ in range(5)]
    log = a_run(generator)
    for reference in five:
        reference.config["eval_tokens"] = 100
    log.config["eval_tokens"] = 50
    log.results["val"] = {40: 9.0}
    assert plot.check(log, five)
    out = capsys.readouterr().out
    assert "--eval_tokens is 50, and 100 in the reference" in out and "validation loss" not in out


def test_it_may_be_too_early_to_say(tmp_path):
    log = plot.Run.read(write_run(tmp_path / "a"))
    assert plot.check(log, [log] * 5)  # an evaluation at least
    log.results["val"] = {}
    with pytest.raises(
        plot.UserError, match="a: too early to say: no evaluation after step 0, and fewer than 10 steps"
    ):
        plot.check(log, [log] * 5)


def test_there_may_be_no_reference(tmp_path, capsys):
    log = write_run(tmp_path / "a")
    assert run_script(plot.main, ["--check", str(log)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "plot.py: error: a: no reference has its network, its data and its tokens a step; there is "
    )
    assert "--preset tiny --data input.txt" in error and error.count("\n") == 1 and not (log / "curves.png").exists()
    assert run_script(plot.main, ["--check", str(log), str(log)]) == 2
    assert "--check: takes one log directory" in capsys.readouterr().err


TARGETS_ARE_INPUTS = "train_gpt2.inputs_and_targets = lambda rows, device: (rows[:, :-1].long(), rows[:, :-1].long())"
TARGETS_ONE_TOO_FAR = "train_gpt2.inputs_and_targets = lambda rows, device: (rows[:, :-2].long(), rows[:, 2:].long())"


@pytest.mark.slow
@pytest.mark.parametrize(
    "steps, flags, fault",
    [
        (50, ("--seed", 6), ""),
        (40, ("--max_lr", 2e-2), ""),
        (30, ("--warmup_steps", 0), ""),
        (30, (), TARGETS_ARE_INPUTS),
        (80, (), TARGETS_ONE_TOO_FAR),
    ],
    ids=["a new seed", "ten-times", "no-warm-up", "targets-are-inputs", "targets-one-too-far"],
)
def test_a_run_that_goes_well_is_told_from_others(tmp_path, steps, flags, fault):
    """So were the logs in data/wrong made."""
    script = with_fault(tmp_path, f"{fault}\nif calls == 1 + {steps}: os.kill(os.getpid(), signal.SIGTERM)")
    recipe = *"--preset tiny --data input.txt --micro_batch_size 16 --dtype float32 --sample_every 0".split(), *flags
    run(script, *recipe, "--log_dir", tmp_path / "log", status=143, cwd=ROOT, env=dict(OMP_NUM_THREADS="2"))
    done = run("plot.py", "--check", tmp_path / "log", status=0 if flags[:1] == ("--seed",) else 1)
    assert f"log: {steps} of 550 steps" in done.stdout
