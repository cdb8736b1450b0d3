"""The run's directory, and the terminal."""

from errors import UserError

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

import plot
from data import Data
from model import GPT
from recipe import FULL_RUN, TrainConfig
from runtime import checkpoint
from runtime.distributed import Ranks
from tokens import first_line

ROOT = Path(__file__).resolve().parent.parent


class WandB:
    """What RunLog writes, on Weights & Biases, too. A thread of its own sends it: no step waits for that, and whatever
    goes wrong there, from the import to the end, costs a line and not the run."""

    patience = 60.0  # seconds, for its beginning and for its end

    def __init__(self, config: dict, log_dir: Path, say: Callable):
        self.rows, self.say, self.given_up = SimpleQueue(), say, False
        self.thread = Thread(target=self.send, args=(config, log_dir), daemon=True)
        self.thread.start()

    def log(self, step: int, **values: float) -> None:
        self.rows.put((step, values))

    def send(self, config: dict, log_dir: Path) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # no questions, and nothing over the progress bar
        os.environ.setdefault("WANDB_CACHE_DIR", str(log_dir))  # it adds the wandb/ itself
        settings = dict(project=config["wandb"], console="off", resume="allow", init_timeout=self.patience)
        settings |= dict(finish_timeout=self.patience, finish_timeout_raises=True)
        id_file = log_dir / "wandb/id.txt"  # a run that is resumed goes on there, too
        if id_file.exists():
            settings["run_id"] = id_file.read_text(encoding="utf-8")
        try:
            import wandb

            try:
                run = wandb.init(dir=log_dir, config=config, settings=settings)
                id_file.write_text(run.id, encoding="utf-8")
                self.say(f"Weights & Biases: {run.url or run.dir}")
                for step, values in iter(self.rows.get, None):
                    run.log(values, step=step)
                run.finish()
            finally:
                wandb.teardown()  # ends its process, or forgets one that has died
        except Exception as e:
            if not self.given_up:
                self.say(f"no Weights & Biases: {first_line(e)}")

    def close(self) -> None:
        """Wait until all is sent, but not for ever."""
        self.rows.put(None)
        self.thread.join(1.5 * self.patience)
        if self.thread.is_alive():
            self.given_up = True
            self.say("no Weights & Biases: it does not answer")
            Thread(target=lambda: sys.modules["wandb"].teardown(), daemon=True).start()  # else Python's exit would wait


class RunLog:
    """What a run leaves in its directory and shows on the terminal; rank 0 has one.

    log.txt     `{step} train {loss}`, `{step} val {loss}`, `{step} hella {acc}`: three fields and nothing else
    steps.csv   step, tokens so far, loss, lr, norm, seconds, for each optimizer step
    run.json    configuration, versions, hardware, counts
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.dir = Path(config.log_dir)
        self.lock = FileLock(self.dir / ".lock")
        self.files, self.bar, self.wandb = [], None, None
        existing = next(p for p in (self.dir, *self.dir.absolute().parents) if p.exists())
        if not existing.is_dir():
            raise UserError(f"--log_dir {self.dir}: {existing} is a file, not a directory")
        if not os.access(existing, os.W_OK):
            raise UserError(f"--log_dir {self.dir}: {existing} cannot be written to")

    def open(self, resumed: Path | None, step: int, facts: dict) -> None:
        """Lock the directory; move an older run out of the way; of the run that goes on keep, or bring from where the
        save is, the log up to its step."""
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=0)
            checkpoint.clean(self.dir)
            source = resumed and resumed.resolve().parent
            here = source == self.dir.resolve()
            if here:
                for line in checkpoint.set_aside(self.dir, resumed, step):
                    self.say(line)
            elif old := checkpoint.archive(self.dir):
                saved = [*checkpoint.saves(old).values()]
                back = f"; --resume {saved[-1]} would go on with it" if saved else ""
                self.say(f"the run that was in {self.dir} is now in {old}{back}")
            if source is not None:
                again = dict(val=self.config.eval_every, hella=self.config.hellaswag_every)
                kept = tuple(kind for kind, every in again.items() if not is_due(every, step, self.config.max_steps))
                for name, kinds in ("log.txt", kept), ("steps.csv", ()):
                    if not here and (source / name).exists():
                        shutil.copy(source / name, self.dir)
                    checkpoint.cut_log(self.dir / name, step, kinds)
            (self.dir / "run.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            # Line by line: what is written is on its way to the disk, whatever happens to this process.
            self.files = [
                open(self.dir / name, "a", encoding="utf-8", buffering=1) for name in ("log.txt", "steps.csv")
            ]
            if self.files[1].tell() == 0:
                self.files[1].write("step,tokens,loss,lr,norm,seconds\n")
        except Timeout:
            raise UserError(f"--log_dir {self.dir}: another run is writing there; give this one its own") from None
        except OSError as e:
            raise UserError(f"--log_dir {self.dir}: {e.filename} cannot be used ({e.strerror})") from None
        # A terminal may have no size, as `script` makes them: a bar would be invisible there.
        if sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).lines:
            self.bar = tqdm(total=self.config.max_steps, initial=step, unit="step", dynamic_ncols=True)
        if self.config.wandb:
            self.wandb = WandB(facts["config"], self.dir, self.say)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.wandb is not None:
            self.wandb.close()
        for file in self.files:
            file.close()
        self.lock.release()

    def write(self, i: int, line: str) -> None:
        """Add a line to one of the files. Raises DiskError."""
        try:
            self.files[i].write(line + "\n")
        except OSError as e:
            raise checkpoint.DiskError(e.errno, f"cannot be written to ({e.strerror})", self.files[i].name) from None

    def say(self, line: str) -> None:
        """Print a line, above the progress bar if there is one."""
        try:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read has ended, like the tee of `… | tee out` at Ctrl-C; the run has not
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def train(self, step: int, loss: float, lr: float, norm: float, seconds: float, mfu: float | None) -> None:
        """The step that led to step + 1, which took so many seconds."""
        batch = self.config.total_batch_size
        self.write(0, f"{step} train {loss:.9g}")
        self.write(1, f"{step},{(step + 1) * batch},{loss:.9g},{lr:.9g},{norm:.9g},{seconds:.6g}")
        if self.wandb is not None:
            tokens = dict(tokens=(step + 1) * batch, tokens_per_second=batch / seconds)
            self.wandb.log(step, train=loss, lr=lr, norm=norm, **tokens)
        speed = f"{batch / seconds:,.0f} tok/s, MFU {'n/a' if mfu is None else f'{mfu:.1%}'}"
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}, {speed}", refresh=False)
            self.bar.update()
        else:
            left = timedelta(seconds=round(seconds * (self.config.max_steps - step - 1)))
            self.say(f"step {step}: loss {loss:.4f}, norm {norm:.3f}, lr {lr:.2e}, {speed}, {left} left")

    def result(self, step: int, name: str, value: float, text: str) -> None:
        """An evaluation of the weights as they are at a step."""
        if self.files:
            self.write(0, f"{step} {name} {value:.9g}")
        if self.wandb is not None:
            self.wandb.log(step, **{name: value})
        self.say(f"step {step}: {text} {value:.4f}")

    def draw(self) -> None:
        """Draw the curves of the run so far."""
        try:
            plot.draw([self.dir], self.dir / "curves.png")
        except Exception as e:  # whatever it is: the run is over, and well
            self.say(f"no {self.dir / 'curves.png'}: {first_line(e)}")

    def best_saved_step(self, before: int) -> int | None:
        """The step, among those saved before this one, with the lowest validation loss."""
        saved = checkpoint.saves(self.dir)
        lines = [line.split() for line in (self.dir / "log.txt").read_text(encoding="utf-8").splitlines()]
        losses = {
            int(step): float(value)
            for step, name, value in lines
            if name == "val" and int(step) < before and int(step) in saved
        }
        return min(losses, key=losses.get, default=None)


def is_due(every: int, step: int, max_steps: int) -> bool:
    """Whether something that comes every so many steps, and at the end, comes at this one."""
    return every > 0 and (step % every == 0 or step == max_steps)


def facts(config: TrainConfig, ranks: Ranks, model: GPT, data: Data) -> dict:
    """What to know of a run later on: for run.json."""
    git = shutil.which("git") and subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return dict(
        config=asdict(config),
        git_commit=git.stdout.strip() if git and git.returncode == 0 else None,
        versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__),
        device=torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ranks.device.type,
        ranks=ranks.size,
        machine=platform.machine(),
        threads=torch.get_num_threads(),
        parameters=model.num_parameters(),
        train_tokens=data.n_tokens,
    )


def introduce(
    config: TrainConfig, given: dict, resumed: Path | None, data: Data, ranks: Ranks, model: GPT, eager: str | None
) -> list[str]:
    """The first lines of a run: what was chosen, and why."""
    why = "as asked" if "preset" in given else "of the save" if resumed else f"the default on {config.device}"
    origin = f", from {config.init_from}" if config.init_from else ""
    kind = "text" if data.is_text else f"{len(data.train)} training shards"
    by_default = "" if "data" in given or resumed else ", the default"
    by_default += ", as there are no shards in edu_fineweb10B/" if by_default and data.is_text else ""
    tokens, B = config.max_steps * config.total_batch_size, config.micro_batch_size
    accumulate = config.total_batch_size // (B * config.seq_len * ranks.size)
    plan = f"{config.max_steps:,} steps of {config.total_batch_size:,} tokens, {tokens / data.n_tokens:.2f} epochs"
    plan += "; nothing is written" if config.dry_run else f"; log and saves in {config.log_dir}/"
    return [
        f"preset   {config.preset} ({why})",
        f"model    {config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, context {config.seq_len}, "
        f"{model.num_parameters() / 1e6:,.2f}M parameters{origin}",
        f"data     {config.data} ({kind}{by_default}): {data.n_tokens:,} training tokens",
        f"run      {plan if config.max_steps else 'no steps: it only evaluates, and writes nothing'}",
        f"compute  {ranks.size} × {config.device}, {config.dtype}, {accumulate} × {B} rows a step, "
        f"{f'not compiled: {eager}' if eager else 'compiling (the first time takes a minute)'}",
        f"GPT-2 124M in full: {FULL_RUN}",
    ]
