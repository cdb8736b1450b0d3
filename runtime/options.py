"""Command lines from dataclasses: each field of a script's options class is one option."""

from errors import UserError

import argparse
import difflib
import os
from dataclasses import field, fields
from pathlib import Path
from typing import get_args, get_origin


def option(default, help: str, **metadata):
    """Declare an option: its default and help, and as metadata what is allowed.

    low, high: bounds of a number (default: 0 and 2**40); choices: the allowed values; type: a function that converts
    and checks the text; metavar: the value's name in the help; const: the value of the option without one; aliases:
    further names; positional: whether it is typed without a name; empty: whether a text may be empty; hidden: whether
    --help omits it.
    """
    return field(default=default, metadata=dict(metadata, help=help))


class Parser(argparse.ArgumentParser):
    """argparse's parser, with errors for run_script."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see --help")

    def print_help(self, file=None) -> None:
        print(self.format_help(), end="", flush=True)  # argparse's own ignores that stdout is full


def parse_options(cls, argv: list[str] | None, description: str, epilog: str = "") -> dict:
    """Return the options that were typed, by name. Raise UserError for unknown options and for values out of bounds."""
    parser = Parser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )
    for f in fields(cls):
        add_option(parser, f)
    try:
        namespace, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as e:
        raise UserError(str(e).removeprefix("argument ")) from None
    if unknown:
        known = [f"--{f.name}" for f in fields(cls) if not f.metadata.get("positional")]
        close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "see --help"
        raise UserError(f"{unknown[0]}: there is no such option; {hint}")
    flags = vars(namespace)
    check_values(cls, flags)
    return flags


def add_option(parser: argparse.ArgumentParser, f) -> None:
    """Add the option of a dataclass field to the parser."""
    kind = f.metadata.get("type", value_type(f))
    names = [f"--{f.name}", *f.metadata.get("aliases", ())]
    text = f.metadata["help"]
    if f.default not in (None, False) and not isinstance(f.default, tuple):
        text += f" (default: {f.default})"
    settings = dict(help=argparse.SUPPRESS if f.metadata.get("hidden") else text.replace("%", "%%"))
    if kind is bool:
        action = argparse.BooleanOptionalAction if f.default else "store_true"
        parser.add_argument(*names, action=action, **settings)
        return
    settings["type"] = path if kind is Path else kind
    if "choices" in f.metadata:
        settings["choices"] = f.metadata["choices"]
    else:
        settings["metavar"] = f.metadata.get("metavar", value_type(f).__name__.upper())
    if "const" in f.metadata:
        settings |= dict(nargs="?", const=f.metadata["const"])
    if get_origin(f.type) is tuple:
        settings["nargs"] = "*" if f.metadata.get("positional") else "+"
    if f.metadata.get("positional"):
        names = [f.name]
    else:
        settings["dest"] = f.name
    parser.add_argument(*names, **settings)


def value_type(f) -> type:
    """Return the type of a field's value, or of each of its values: of `int | None` and `tuple[int, ...]`, int."""
    return next(t for t in (*get_args(f.type), f.type) if t not in (type(None), ...))


def check_values(cls, values: dict) -> None:
    """Raise UserError if one of these values is not what its option allows."""
    for f in fields(cls):
        value, kind = values.get(f.name), value_type(f)
        expected = float | int if kind is float else kind
        if value is not None and get_origin(f.type) is not tuple and not isinstance(value, expected):
            raise UserError(f"--{f.name} {value!r}: must be of type {kind.__name__}")
        if value is not None and value not in f.metadata.get("choices", (value,)):
            raise UserError(f"--{f.name} {value!r}: must be one of {', '.join(f.metadata['choices'])}")
        low, high = f.metadata.get("low", 0), f.metadata.get("high", 2**40)
        if isinstance(value, int | float) and not low <= value <= high:  # NaN is not, either
            raise UserError(f"--{f.name} {value}: must be from {low:g} to {high:g}")
        if value == "" and not f.metadata.get("empty"):
            raise UserError(f"--{f.name}: is empty")


def path(name: str) -> Path:
    """Return the path of this name. An empty one would be the working directory."""
    if not name:
        raise argparse.ArgumentTypeError("is empty")
    return Path(name)


def input_file(name: str) -> Path:
    """Return the path of a file that exists."""
    if not os.path.isfile(name):
        raise argparse.ArgumentTypeError(f"no such file: {name}")
    return Path(name)


def output_file(name: str) -> Path:
    """Return the path of a file to write, after a trial, so that hours of work do not end in vain."""
    try:
        open(name, "xb").close()
        os.unlink(name)
    except FileExistsError:
        if os.path.isdir(name):
            raise argparse.ArgumentTypeError(f"cannot write {name}: it is a directory") from None
    except OSError as e:
        raise argparse.ArgumentTypeError(f"cannot write {name}: {e.strerror}") from None
    return Path(name)
