"""Draw what runs have logged: loss by tokens and by time, learning rate, gradient norm and, if examined, HellaSwag.

python plot.py                 log/ as log/curves.png, as each run does at its end
python plot.py log/a log/b     several runs in one picture, curves.png
"""

import argparse
import csv
import json
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate, cycle
from pathlib import Path

# What there is to reach: validation loss on FineWeb-Edu, and HellaSwag, both as build-nanogpt measures them.
GPT2_LOSS = {"GPT-2 124M": 3.2924}
HELLASWAG = {"GPT-2 124M": 29.55, "GPT-3 124M": 33.7}  # per cent

# Okabe and Ito's (2008) colours, told apart by the colour-blind, darkest first; the lines of other models are grey.
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"


class PlotError(Exception):
    """What ends the script with one line for its user and exit status 2."""


@dataclass(frozen=True)
class Run:
    """What a run has logged: columns of steps.csv, and evaluations as {name: (steps, values)}."""

    name: str
    columns: dict[str, list[float]]  # step, tokens, loss, lr, norm, seconds
    results: dict[str, tuple[list[int], list[float]]]  # val, hella
    data: str
    tokens_per_step: int

    @classmethod
    def read(cls, log_dir: Path) -> "Run":
        """Raises PlotError."""
        try:
            config = json.loads((log_dir / "run.json").read_text(encoding="utf-8"))["config"]
            with open(log_dir / "steps.csv", encoding="utf-8") as f:
                rows = [*csv.DictReader(f)]
            columns = {name: [float(row[name]) for row in rows] for name in rows[0]}
            results = defaultdict(lambda: ([], []))
            for line in (log_dir / "log.txt").read_text(encoding="utf-8").splitlines():
                step, name, value = line.split()
                if name != "train":
                    results[name][0].append(int(step))
                    results[name][1].append(float(value))
            return cls(log_dir.name, columns, results, Path(config["data"]).name, config["total_batch_size"])
        except OSError as e:
            raise PlotError(f"{log_dir}: holds no run: {Path(e.filename).name} cannot be read ({e.strerror})") from None
        except (IndexError, KeyError, ValueError, TypeError):
            raise PlotError(f"{log_dir}: holds no steps of a run that could be drawn") from None

    def seconds(self, steps: list[float]) -> list[float]:
        """How long training had taken before each of these steps, or in all before one that is still to come."""
        before = dict(zip(self.columns["step"], accumulate(self.columns["seconds"], initial=0.0), strict=False))
        return [before.get(step, sum(self.columns["seconds"])) for step in steps]


def draw(log_dirs: list[Path], file: Path) -> None:
    """Draw these runs into a PNG file. Raises PlotError, ImportError without matplotlib, OSError on a full disk."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter

    runs = [Run.read(log_dir) for log_dir in log_dirs]
    panels = [["loss by tokens", "loss by time"], ["lr", "norm"]]
    if any("hella" in run.results for run in runs):
        panels = [["loss by tokens"] * 3 + ["loss by time"] * 3, ["lr", "lr", "norm", "norm", "hella", "hella"]]
    figure, axes = plt.subplot_mosaic(panels, figsize=(12, 8), layout="constrained")
    tokens, tokens_label = scale(
        max(run.columns["tokens"][-1] for run in runs),
        {1e9: "tokens (billions)", 1e6: "tokens (millions)", 1e3: "tokens (thousands)", 1: "tokens"},
    )
    time, time_label = scale(
        max(run.seconds([math.inf])[0] for run in runs),
        {86400: "days of training", 3600: "hours of training", 60: "minutes of training", 1: "seconds of training"},
    )

    for run, colour in zip(runs, cycle(COLOURS), strict=False):
        dots = dict(color=colour, marker="o", markersize=4, linestyle="none", markeredgecolor="white")
        by_tokens = [t / tokens for t in run.columns["tokens"]]
        steps, val = run.results["val"]
        for panel, at in (
            (axes["loss by tokens"], lambda steps, run=run: [s * run.tokens_per_step / tokens for s in steps]),
            (axes["loss by time"], lambda steps, run=run: [s / time for s in run.seconds(steps)]),
        ):
            panel.plot(at(run.columns["step"]), run.columns["loss"], color=colour, alpha=0.5, linewidth=0.8)
            panel.plot(at(steps), val, label=f"{run.name} on {run.data}", **dots | dict(markersize=6))
        for name in "lr", "norm":
            axes[name].plot(by_tokens, run.columns[name], color=colour, alpha=0.7, linewidth=1)
        if "hella" in run.results:
            steps, accuracies = run.results["hella"]
            axes["hella"].plot([s * run.tokens_per_step / tokens for s in steps], [100 * a for a in accuracies], **dots)

    for name, label in ("loss by tokens", tokens_label), ("loss by time", time_label):
        axes[name].set(xlabel=label, ylabel="loss (nats): training lines, validation dots")
        # The first fiftieth, which falls from 11, would leave no room for the rest.
        axes[name].set_ylim(top=max(run.columns["loss"][len(run.columns["loss"]) // 50] for run in runs))
        if any("fineweb" in run.data for run in runs):
            mark(axes[name], GPT2_LOSS)
    axes["loss by tokens"].legend(frameon=False, loc="upper right")
    axes["lr"].set(xlabel=tokens_label, ylabel="learning rate")
    axes["lr"].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes["norm"].set(xlabel=tokens_label, ylabel="norm of the gradient", yscale="log")
    axes["norm"].yaxis.set(major_formatter=LogFormatter(), minor_formatter=LogFormatter(minor_thresholds=(1, 0.4)))
    if "hella" in axes:
        axes["hella"].set(xlabel=tokens_label, ylabel="HellaSwag (% right)")
        mark(axes["hella"], HELLASWAG)
    for panel in axes.values():
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110, format="png")
    plt.close(figure)


def scale(most: float, units: dict[float, str]) -> tuple[float, str]:
    """The largest of these units, in descending order, in which `most` is at least one, and what it is called."""
    return next(((unit, name) for unit, name in units.items() if most >= unit), [*units.items()][-1])


def mark(panel, levels: dict[str, float]) -> None:
    """Draw what other models have reached."""
    for name, level in levels.items():
        panel.axhline(level, color="0.4", linestyle="--", linewidth=1)
        panel.annotate(name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="0.3")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "log_dirs", nargs="*", type=Path, default=[Path("log")], metavar="DIR", help="log directories (default: log)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the picture, a PNG (default: curves.png, for one run in its directory)",
    )
    parser.error = lambda message: parser.exit(2, f"plot.py: error: {message}; see --help\n")
    args = parser.parse_args(argv)
    file = args.out or (args.log_dirs[0] / "curves.png" if len(args.log_dirs) == 1 else Path("curves.png"))
    try:
        draw(args.log_dirs, file)
    except PlotError as e:
        print(f"plot.py: error: {e}", file=sys.stderr)
        return 2
    except ImportError:
        print("plot.py: error: matplotlib is not installed; pip install -r requirements.txt", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"plot.py: error: {file}: cannot be written ({e.strerror})", file=sys.stderr)
        return 4
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
