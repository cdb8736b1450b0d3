"""Plot the logs of runs: loss by tokens and by time, learning rate, gradient norm, HellaSwag accuracy.

python plot.py                 plot log/ to log/curves.png, as each run does at its end
python plot.py log/a log/b     plot several runs to curves.png
python plot.py --check log     is this loss normal? Compare the run so far with other seeds of the same recipe
"""

from errors import UserError, run_script
import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.files import write_atomically
from runtime.options import option, output_file, parse_options

# Okabe and Ito's (2008) colors, told apart by the color-blind, darkest first; the lines of other models are gray.
COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
TOKENS = {1e9: "tokens (billions)", 1e6: "tokens (millions)", 1e3: "tokens (thousands)", 1: "tokens"}
TIME = {86400: "days of training", 3600: "hours of training", 60: "minutes of training", 1: "seconds of training"}

# Reference logs, several seeds of a recipe in RECIPE/seed-N/. A run is compared with those of the same SHAPE.
REFERENCE = Path(__file__).resolve().parent / "assets" / "reference"
SHAPE = "n_layer", "n_head", "n_embd", "seq_len", "total_batch_size", "train_tokens"
COLUMNS = "step", "tokens", "loss", "lr", "norm", "seconds"
BLOCK = 10  # number of steps whose training losses, of one batch each, are averaged


@dataclass(frozen=True)
class Run:
    """What a run has logged: columns of steps.csv, evaluations as {"val" or "hella": {step: value}}, and run.json."""

    name: str
    columns: dict[str, list[float]]  # by COLUMNS
    results: dict[str, dict[int, float]]
    config: dict  # with train_tokens

    @classmethod
    def read(cls, log_dir: Path) -> "Run":
        """Read the logs of a run. Raise UserError."""
        try:
            metadata = json.loads((log_dir / "run.json").read_text(encoding="utf-8"))
            config = metadata["config"] | dict(train_tokens=metadata.get("train_tokens"))
            config |= dict(data=Path(config["data"]).name, total_batch_size=int(config["total_batch_size"]))
            # Of a log the complete lines: a crash may have left a part of one.
            lines, steps = ((log_dir / n).read_text("utf-8").split("\n")[:-1] for n in ("log.txt", "steps.csv"))
            rows = [*csv.DictReader(steps)]
            columns = {name: [float(row[name]) for row in rows] for name in COLUMNS}
            if not rows or not np.isfinite(columns["step"] + columns["tokens"]).all():
                raise ValueError
            results = dict(val={}, hella={})
            for line in lines:
                step, name, value = line.split()
                if name in results:
                    results[name][int(step)] = float(value)
            return cls(log_dir.resolve().name, columns, results, config)
        except OSError as e:
            raise UserError(f"{log_dir}: holds no run: {Path(e.filename).name} cannot be read ({e.strerror})") from None
        except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError):
            raise UserError(f"{log_dir}: holds no steps of a run that could be drawn") from None

    @property
    def curves(self) -> dict[str, dict[int, float]]:
        """Return what is compared, by step: the mean training loss of the BLOCK steps before, the validation loss."""
        loss = dict(zip(self.columns["step"], self.columns["loss"], strict=True))
        blocks = [range(int(start), int(start) + BLOCK) for start in sorted(loss) if start % BLOCK == 0]
        training = {b.stop: float(np.mean([loss[i] for i in b])) for b in blocks if loss.keys() >= {*b}}
        return dict(training=training, validation={step: v for step, v in self.results["val"].items() if step > 0})


def reference_for(run: Run) -> list[Run]:
    """Return reference runs of the same network on the same tokens and batches."""
    logs = [Run.read(file.parent) for file in sorted(REFERENCE.glob("*/seed-*/run.json"))]
    return [log for log in logs if all(log.config[key] == run.config.get(key) for key in SHAPE)]


def differing(run: Run, reference: list[Run]) -> set[str]:
    """Return the options, but for the seed, that make a run another recipe than its reference."""
    from runtime.plan import RESUME_INVARIANT  # which imports torch

    recipe = reference[0].config
    material = {*RESUME_INVARIANT, "eval_tokens"} - {"seed"}  # all others change the loss by no more than a seed does
    return {key for key in material & run.config.keys() & recipe.keys() if run.config[key] != recipe[key]}


def bands(reference: list[Run]) -> dict[str, dict[int, tuple[float, float]]]:
    """Return the range in which a normal run stays, as {curve: {step: (low, high)}}.

    It is the mean of n runs ± five times s·√(1 + 1/n), the standard deviation of one more run from that mean. s is
    pooled over fifteen consecutive points of the training loss, and over all points of the validation loss.
    """
    curves = [run.curves for run in reference]
    result = {}
    for name, reach in ("training", 7), ("validation", len(curves[0]["validation"])):
        steps = sorted(set.intersection(*(set(curve[name]) for curve in curves)))
        values = np.array([[curve[name][step] for step in steps] for curve in curves])  # (n, steps)
        variance = values.var(axis=0, ddof=1)
        pooled = np.array([variance[max(i - reach, 0) : i + reach + 1].mean() for i in range(len(steps))])
        half = 5 * np.sqrt(pooled * (1 + 1 / len(reference)))
        result[name] = {step: (m - h, m + h) for step, m, h in zip(steps, values.mean(axis=0), half, strict=True)}
    return result


def check(run: Run, reference: list[Run]) -> bool:
    """Print whether the run so far is within the bands, and where it first leaves them. Raise UserError."""
    if not reference:
        logs = map(Run.read, REFERENCE.glob("*/seed-*"))
        known = ", ".join(sorted({f"--preset {log.config['preset']} --data {log.config['data']}" for log in logs}))
        raise UserError(f"{run.name}: no reference has its network, its data and its tokens a step; there is {known}")
    recipe, curves, other = reference[0].config, run.curves, differing(run, reference)
    if "eval_tokens" in other:
        del curves["validation"]  # it is of other tokens
    if not any(curves.values()):
        raise UserError(f"{run.name}: too early to say: no evaluation after step 0, and fewer than {BLOCK} steps")
    progress = f"{int(run.columns['step'][-1]) + 1} of {recipe['max_steps']} steps"
    print(f"{run.name}: {progress}, compared with {len(reference)} seeds of {recipe['preset']}")
    for key in sorted(other):
        print(f"  --{key} is {run.config[key]}, and {recipe[key]} in the reference")
    normal = True
    for name, band in bands(reference).items():
        values = {step: value for step, value in curves.get(name, {}).items() if step in band}
        outside = [step for step, value in values.items() if not band[step][0] <= value <= band[step][1]]
        if values:
            before = f", means of the {BLOCK} steps before" if name == "training" else ""
            print(f"  {name} loss: {len(values) - len(outside)} of {len(values)} points within the bands{before}")
        if outside:
            (low, high), value = band[outside[0]], values[outside[0]]
            print(f"    first outside at step {outside[0]}: {value:.3f}, where {low:.3f} to {high:.3f} is normal")
            normal = False
    print(f"The loss is {'normal so far' if normal else 'not that of this recipe'}.")
    return normal


def draw(log_dirs: list[Path], file: Path, compare: bool = False) -> None:
    """Draw these runs into a PNG file. A single one gets the bands of its reference runs if it has their recipe, or if
    it is to be compared with them. Raise UserError."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    runs = [Run.read(log_dir) for log_dir in log_dirs]
    panels = [["loss by tokens", "loss by time"], ["lr", "norm"]]
    if any(run.results["hella"] for run in runs):
        panels = [["loss by tokens"] * 3 + ["loss by time"] * 3, ["lr", "lr", "norm", "norm", "hella", "hella"]]
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplot_mosaic(panels)
    tokens = max((unit for unit in TOKENS if any(run.columns["tokens"][-1] >= unit for run in runs)), default=1)
    time = max((unit for unit in TIME if any(sum(run.columns["seconds"]) >= unit for run in runs)), default=1)
    for i, run in enumerate(runs):
        draw_run(axes, run, COLORS[i % len(COLORS)], tokens, time)
    reference = reference_for(runs[0]) if len(runs) == 1 else []
    if reference and (compare or not differing(runs[0], reference)):
        draw_bands(axes["loss by tokens"], runs[0], reference, tokens)
    # The first fiftieth of the losses, which falls from 11, would leave no room for the rest.
    top = 1.02 * max(run.columns["loss"][len(run.columns["loss"]) // 50] for run in runs)
    top = top if np.isfinite(top) else None
    for name in "loss by tokens", "loss by time":
        axes[name].set(ylabel="loss (nats): training lines, validation dots", ylim=(None, top))
        if any("fineweb" in run.config["data"] for run in runs):
            mark(axes[name], {"GPT-2 124M": 3.2924})
    axes["loss by tokens"].legend(frameon=False, loc="upper right")
    axes["lr"].set_ylabel("learning rate")
    axes["lr"].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes["norm"].set(ylabel="gradient norm", yscale="log")
    axes["norm"].yaxis.set(major_locator=LogLocator(subs=(1, 1.5, 2, 3, 5, 7)), major_formatter="{x:g}")
    axes["norm"].minorticks_off()
    if "hella" in axes:
        axes["hella"].set_ylabel("HellaSwag accuracy (%)")
        mark(axes["hella"], {"GPT-2 124M": 29.55, "GPT-3 124M": 33.7})
    for name, panel in axes.items():
        panel.set_xlabel(TIME[time] if name == "loss by time" else TOKENS[tokens])
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    with write_atomically(file) as f:
        figure.savefig(f, dpi=110, format="png")


def draw_run(axes: dict, run: Run, color: str, tokens: float, time: float) -> None:
    """Draw a run into all panels, in these units of tokens and seconds."""
    steps, batch = run.columns["step"], run.config["total_batch_size"] / tokens
    elapsed = np.cumsum([0, *run.columns["seconds"]]) / time  # before each step, and at the end
    val, hella = run.results["val"], run.results["hella"]
    dots = dict(color=color, marker="o", markersize=4, linestyle="none", markeredgecolor="white")
    for panel, x, x_dots in (
        (axes["loss by tokens"], np.array(steps) * batch, np.array([*val]) * batch),
        (axes["loss by time"], elapsed[:-1], np.interp([*val], [*steps, steps[-1] + 1], elapsed)),
    ):
        panel.plot(x, run.columns["loss"], color=color, alpha=0.5, linewidth=0.8)
        panel.plot(x_dots, [*val.values()], label=f"{run.name} on {run.config['data']}", **dots | dict(markersize=6))
    for name in "lr", "norm":
        axes[name].plot(np.array(run.columns["tokens"]) / tokens, run.columns[name], color=color, alpha=0.7)
    if hella:
        axes["hella"].plot(np.array([*hella]) * batch, 100 * np.array([*hella.values()]), **dots)


def draw_bands(panel, run: Run, reference: list[Run], tokens: float) -> None:
    """Draw the bands of the reference runs into the panel, as far as the run has come, in this unit of tokens."""
    for (name, band), gray in zip(bands(reference).items(), ("0.55", "0.25"), strict=True):
        band = {step: bounds for step, bounds in band.items() if step <= run.columns["step"][-1] + 1}
        if band:
            back = BLOCK / 2 if name == "training" else 0  # a mean over steps belongs to their middle
            at = (np.array([*band]) - back) * run.config["total_batch_size"] / tokens
            label = f"normal {name} loss of {reference[0].config['preset']}"
            look = dict(label=label, color=gray, alpha=0.35, linewidth=0, zorder=0)
            panel.fill_between(at, *zip(*band.values(), strict=True), **look)


def mark(panel, levels: dict[str, float]) -> None:
    """Draw the published results of other models, as build-nanogpt measures them."""
    for name, level in levels.items():
        panel.axhline(level, color="0.4", linestyle="--", linewidth=1)
        panel.annotate(name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="0.3")


@dataclass(frozen=True)
class Options:
    log_dirs: tuple[Path, ...] = option((Path("log"),), "runs (default: log)", positional=True, metavar="LOG_DIR")
    check: bool = option(False, "compare the loss with reference runs, and draw them; exit 1 if it is not normal")
    out: Path | None = option(None, "PNG file (default: curves.png, as above)", type=output_file, metavar="FILE")


def main(argv: list[str] | None = None) -> int:
    """Draw, and with --check compare; return the exit status. Raise UserError."""
    args = Options(**parse_options(Options, argv, __doc__))
    if args.check and len(args.log_dirs) > 1:
        raise UserError("--check: takes one log directory")
    file = args.out or (args.log_dirs[0] if len(args.log_dirs) == 1 else Path()) / "curves.png"
    if file.suffix != ".png":
        raise UserError(f"--out {file}: the picture is a PNG; its name has to end in .png")
    run = Run.read(args.log_dirs[0])
    normal = not args.check or check(run, reference_for(run))
    draw([*args.log_dirs], file, args.check)
    print(file)
    return 0 if normal else 1


if __name__ == "__main__":
    sys.exit(run_script(main))
