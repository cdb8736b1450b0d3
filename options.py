"""Command lines of the scripts: an argument parser whose errors are UserErrors, and types that check their values."""

from errors import UserError

import argparse
import os
from collections.abc import Callable
from pathlib import Path


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser with a description that is printed as it is, and with UserErrors."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> None:
        raise UserError(f"{message.removeprefix('argument ')}; see --help")

    def print_help(self, file=None) -> None:
        print(self.format_help(), end="", flush=True)  # argparse's own ignores that stdout is full


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """Return an argparse type: an int or a float from low to high."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:  # NaN, too
            raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}, found {text}")
        return value

    parse.__name__ = kind.__name__  # which argparse names for what is no number at all
    return parse


def device(name: str):
    """Return the torch.device of this name, of "auto" the fastest there is; an argparse type."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except Exception:  # of many types, by the device that is missing
        raise argparse.ArgumentTypeError(f"PyTorch finds no device {name} here; try --device cpu") from None
    return torch.device(name)


def input_file(name: str) -> Path:
    """Return the path of a file that exists; an argparse type."""
    if not os.path.isfile(name):
        raise argparse.ArgumentTypeError(f"no such file: {name}")
    return Path(name)


def output_file(name: str) -> Path:
    """Return the path of a file to write, after a trial, so that hours of work do not end in vain; an argparse type."""
    try:
        open(name, "xb").close()
        os.unlink(name)
    except FileExistsError:
        if os.path.isdir(name):
            raise argparse.ArgumentTypeError(f"cannot write {name}: it is a directory") from None
    except OSError as e:
        raise argparse.ArgumentTypeError(f"cannot write {name}: {e.strerror}") from None
    return Path(name)
