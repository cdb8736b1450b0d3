"""What a run leaves in its directory and prints on the terminal."""

from errors import UserError, first_line, silence
import contextlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

import plot
from recipe import TrainConfig
from runtime import checkpoint
from runtime.files import write_json

ROOT = Path(__file__).resolve().parent.parent


class WandB:
    """Logs to Weights & Biases. Whatever fails there, or hangs, costs one line, and not the run."""

    timeout = 60.0  # seconds, for each call

    def __init__(self, config: dict, log_dir: Path, print_line: Callable[[str], None]):
        self.failed, self.print_line = False, print_line
        self.attempt(lambda: self.start(config, log_dir))

    def start(self, config: dict, log_dir: Path) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # no questions, and no lines over the progress bar
        os.environ.setdefault("WANDB_CACHE_DIR", str(log_dir))
        import wandb

        self.teardown = wandb.teardown
        settings = dict(project=config["wandb"], console="off", resume="allow")
        # These come before the timeout of a call: they end what its process is still trying to do, too.
        settings |= dict(init_timeout=self.timeout / 2, finish_timeout=self.timeout / 2, finish_timeout_raises=True)
        id_file = log_dir / "wandb/id.txt"  # a resumed run continues the same run there
        if id_file.exists():
            settings["run_id"] = id_file.read_text(encoding="utf-8")
        self.run = wandb.init(dir=log_dir, config=config, settings=settings)
        id_file.write_text(self.run.id, encoding="utf-8")
        self.print_line(f"Weights & Biases: {self.run.url or self.run.dir}")

    def log(self, step: int, **values: float) -> None:
        if not self.failed:
            self.attempt(lambda: self.run.log(values, step=step))

    def close(self) -> None:
        if not self.failed:
            self.attempt(self.run.finish)
        self.attempt(lambda: self.teardown())  # or wandb would wait for its process without a limit

    def attempt(self, call: Callable[[], None]) -> None:
        """Make a call of wandb. Print the first that fails, or takes longer than the timeout."""

        def stop_waiting(number: int, frame) -> None:
            raise TimeoutError(f"it has not answered for {self.timeout:g} seconds")

        handler_before = signal.signal(signal.SIGALRM, stop_waiting)
        signal.setitimer(signal.ITIMER_REAL, self.timeout)
        try:
            call()
        except (Exception, SystemExit) as e:  # teardown() exits with its process's status
            if not self.failed:
                self.print_line(f"no Weights & Biases: {first_line(e)}")
            self.failed = True
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler_before)


class RunLog:
    """The files and the terminal of a run. It writes nothing before open(), and prints on the main rank only.

    log.txt     `{step} {name} {value}`: train, val (losses), bpb (val in bits per byte), hella (accuracy)
    steps.csv   step, tokens so far, loss, lr, norm, seconds, for each optimizer step
    run.json    configuration, versions, hardware, counts
    """

    def __init__(self, config: TrainConfig, is_main: bool):
        self.config, self.is_main = config, is_main
        self.dir = Path(config.log_dir)
        self.lock = FileLock(self.dir / ".lock")
        self.files, self.bar, self.wandb = {}, None, None
        self.seconds = deque(maxlen=10)  # of the last steps, over which the speed is averaged
        self.peak_speed: float | None = None  # tokens per second at an MFU of 100%, where that is known

    def open(self, step: int, resume_from: Path | None, metadata: dict) -> None:
        """Lock the directory, archive an earlier run or restore the logs of the resumed one, and open the logs."""
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=0)
            checkpoint.clean(self.dir)
            if old := checkpoint.archive(self.dir, resume_from, step):
                found = list(checkpoint.checkpoints(old).values())
                hint = f"; --resume {found[-1]} continues it" if found else ""
                self.print(f"files of an earlier run in {self.dir} are now in {old}{hint}")
            if resume_from is not None:
                self.restore_logs(resume_from)
            write_json(self.dir / "run.json", metadata)
            for name in checkpoint.LOGS:  # buffering=1: each line survives the death of this process
                self.files[name] = open(self.dir / name, "a", encoding="utf-8", buffering=1)
            if self.files["steps.csv"].tell() == 0:
                self.write("steps.csv", "step,tokens,loss,lr,norm,seconds")
        except Timeout:
            raise UserError(f"--log_dir {self.dir}: another run is writing there; give this one its own") from None
        except OSError as e:
            error = UserError.from_error(e)
            raise UserError(f"--log_dir {self.dir}: cannot be written: {error}", error.status) from None
        # A terminal may have no size, as `script` makes them: a bar would be invisible there.
        if sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).lines:
            self.bar = tqdm(total=self.config.max_steps, initial=step, unit="step", dynamic_ncols=True)
        if self.config.wandb:
            self.wandb = WandB(metadata["config"], self.dir, self.print)

    def restore_logs(self, resume_from: Path) -> None:
        """Make the logs what they were when the checkpoint was written; print which of them had lost lines."""
        for name in checkpoint.LOGS:
            path, content = self.dir / name, (resume_from / name).read_bytes()
            if path.exists() and not path.read_bytes().startswith(content):
                self.print(f"{path}: had lost lines, which are restored from {resume_from}")
            path.write_bytes(content)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.wandb is not None:
            self.wandb.close()
        for file in self.files.values():
            with contextlib.suppress(OSError):  # write() has raised it already
                file.close()
        self.lock.release()

    def write(self, name: str, line: str) -> None:
        """Add a line to a file. Raise UserError if the disk is full or fails."""
        if name in self.files:
            try:
                self.files[name].write(line + "\n")
            except OSError as e:
                raise UserError(f"{self.dir / name}: could not be written: {e.strerror}", 4) from None

    def print(self, line: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if not self.is_main:
            return
        try:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # the reader or the terminal is gone, like the tee of `… | tee out` at Ctrl-C; the run goes on
            silence(1)

    def step(self, step: int, stats) -> None:
        """Log an optimizer step: its StepStats, and the speed and MFU (model FLOPs utilization) of the last steps."""
        self.seconds.append(stats.seconds)
        batch = self.config.total_batch_size
        tokens, speed = (step + 1) * batch, batch * len(self.seconds) / sum(self.seconds)
        self.write("log.txt", f"{step} train {stats.loss:.9g}")
        fields = f"{stats.loss:.9g},{stats.lr:.9g},{stats.grad_norm:.9g},{stats.seconds:.6g}"
        self.write("steps.csv", f"{step},{tokens},{fields}")
        if self.wandb is not None:
            numbers = dict(train=stats.loss, lr=stats.lr, norm=stats.grad_norm)
            self.wandb.log(step, **numbers, tokens=tokens, tokens_per_second=speed)
        shown = f"{speed:,.0f} tok/s"
        if self.peak_speed is not None:
            shown += f", MFU {speed / self.peak_speed:.1%}"
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {stats.loss:.4f}, {shown}", refresh=False)
            self.bar.update()
        else:
            left = timedelta(seconds=round(batch * (self.config.max_steps - step - 1) / speed))
            line = f"step {step}: loss {stats.loss:.4f}, grad_norm {stats.grad_norm:.3f}, lr {stats.lr:.2e}, {shown}"
            self.print(f"{line}, {left} left")

    def result(self, step: int, text: str, **values: float) -> None:
        """Log the values of an evaluation of the weights as they are at a step, and print the text."""
        for name, value in values.items():
            self.write("log.txt", f"{step} {name} {value:.9g}")
        if self.wandb is not None:
            self.wandb.log(step, **values)
        self.print(f"step {step}: {text}")

    def print_sample(self, step: int, text: str) -> None:
        """Print a text that the model has continued, with its line breaks, in lines that fit a terminal."""
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)  # what a terminal could take for a command
        lines = [part for line in text.split("\n") for part in textwrap.wrap(line, 76) or [""]]
        self.print("\n".join([f"step {step}: sample", *(f"  | {line}".rstrip() for line in lines)]))

    def contents(self) -> dict[str, bytes]:
        """Return what the files hold by now."""
        return {name: (self.dir / name).read_bytes() for name in self.files}

    def finish(self) -> None:
        """Draw the curves of the run, and print what it leaves and what to do next."""
        if not self.files:
            return
        try:
            plot.draw([self.dir], self.dir / "curves.png")
            self.print(f"curves: {self.dir / 'curves.png'}")
        except Exception as e:  # whatever it is: the run itself has ended well
            self.print(f"no {self.dir / 'curves.png'}: {first_line(e)}")
        self.print(f"try the model: python sample.py --model {self.dir / f'step_{self.config.max_steps:06}'}")


def run_metadata(config: TrainConfig, ranks: int, parameters: int, train_tokens: int) -> dict:
    """Return what to know of a run later: the content of run.json."""
    git = shutil.which("git") and subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    commit = git.stdout.strip() if git and git.returncode == 0 else None
    versions = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)
    device = torch.cuda.get_device_name() if config.device == "cuda" else config.device
    machine = dict(device=device, machine=platform.machine(), threads=torch.get_num_threads(), ranks=ranks)
    counts = dict(parameters=parameters, train_tokens=train_tokens)
    return dict(config=asdict(config), git_commit=commit, versions=versions, **machine, **counts)
