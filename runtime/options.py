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

    low, high: bounds of a number (default: 0 and 2**40); empty: whether a text may be empty; aliases: further names;
    positional: whether it has no name; const: its value if only the name is typed; type, choices, metavar: argparse's.
    """
    return field(default=default, metadata=dict(metadata, help=help))


class Parser(argparse.ArgumentParser):
    """argparse's parser, with errors for run_script."""

    def error(self, message: str) -> None:
        raise UserError(message.removeprefix("argument "))

    def print_help(self, file=None) -> None:
        print(self.format_help(), end="", flush=True)  # argparse's own ignores that stdout is full


def parse_options(cls, argv: list[str] | None, description: str, epilog: str = "") -> dict:
    """Return the options that were typed, by name. Raise UserError for unknown options and for values out of bounds."""
    parser = Parser(description=description, epilog=epilog, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for f in fields(cls):
        add_option(parser, f)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [f"--{f.name}" for f in fields(cls) if not f.metadata.get("positional")]
        close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "see --help"
        raise UserError(f"{unknown[0]}: there is no such option; {hint}")
    check_values(cls, vars(namespace))
    return vars(namespace)


def add_option(parser: argparse.ArgumentParser, f) -> None:
    """Add the option of a dataclass field to the parser."""
    kind, positional = value_type(f), f.metadata.get("positional")
    names = [f.name] if positional else [f"--{f.name}", *f.metadata.get("aliases", ())]
    text = f.metadata["help"]
    if f.default and not isinstance(f.default, tuple):
        text += f" (default: {f.default})"
    settings = {key: f.metadata[key] for key in ("type", "choices", "metavar", "const") if key in f.metadata}
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction if f.default else "store_true"
    else:
        metavar = None if "choices" in settings else kind.__name__.upper()  # argparse lists choices itself
        nargs = "?" if "const" in settings else None
        settings = dict(type=path if kind is Path else kind, metavar=metavar, nargs=nargs) | settings
    if get_origin(f.type) is tuple:
        settings["nargs"] = "*" if positional else "+"
    parser.add_argument(*names, help=text.replace("%", "%%"), **settings)


def value_type(f) -> type:
    """Return the type of a field's value, or of each of its values: of `int | None` and `tuple[int, ...]`, int."""
    return next(t for t in (*get_args(f.type), f.type) if t not in (type(None), ...))


def check_values(cls, values: dict) -> None:
    """Raise UserError if one of these values is not what its option allows."""
    for f in fields(cls):
        value, kind = values.get(f.name), value_type(f)
        if value is None or get_origin(f.type) is tuple:
            continue
        choices = f.metadata.get("choices", ())
        if not isinstance(value, float | int if kind is float else kind) or (choices and value not in choices):
            raise UserError(f"--{f.name} {value!r}: must be {' or '.join(choices) or kind.__name__}")
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


def output_file(name: str) -> Path:
    """Return the path of a file to write, after a trial, so that hours of work do not end in vain."""
    try:
        open(name, "xb").close()
        os.unlink(name)
    except OSError as e:
        if os.path.isdir(name) or not isinstance(e, FileExistsError):
            reason = "it is a directory" if os.path.isdir(name) else e.strerror
            raise argparse.ArgumentTypeError(f"cannot write {name}: {reason}") from None
    return Path(name)
