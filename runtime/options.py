"""Command lines from a dataclass of options."""

from errors import UserError

import argparse
import difflib
from dataclasses import fields
from typing import get_args

from recipe import FULL_RUN, PRESETS, TrainConfig

EPILOG = """
The defaults above are the published recipe of GPT-2 124M. A preset lays these over them, and your flags go over both:
{presets}

Ctrl-C or SIGTERM: the step is finished, saved, and the run ends, to go on with --resume; a second one ends it at once.
Exit status: 0 done, 2 wrong flags or data, 3 loss not finite, 4 disk or network, 130 Ctrl-C, 143 SIGTERM, 1 else.

The full reproduction: {full_run}
"""


def parse_flags(argv: list[str] | None) -> dict:
    """The options given on the command line and no others, each checked by itself. Raises UserError."""
    presets = "\n".join(f"  {name:12}" + " ".join(f"{k}={v}" for k, v in p.items()) for name, p in PRESETS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EPILOG.format(presets=presets, full_run=FULL_RUN),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )
    for f in fields(TrainConfig):
        kind = next(t for t in (*get_args(f.type), f.type) if t is not type(None))
        text = f.metadata["help"] + ("" if f.default is None else f" (default: {f.default})")
        if kind is bool:
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, help=text)
        elif f.name == "resume":
            parser.add_argument("--resume", nargs="?", const="newest", metavar="DIR", help=text)
        else:
            choices = f.metadata["choices"] or None
            metavar = None if choices else f.metadata["metavar"] or kind.__name__.upper()
            parser.add_argument(f"--{f.name}", type=kind, choices=choices, help=text, metavar=metavar)
    try:
        namespace, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as e:
        raise UserError(str(e).removeprefix("argument ")) from None
    if unknown:
        known = [f"--{f.name}" for f in fields(TrainConfig)]
        close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "see --help"
        raise UserError(f"{unknown[0]}: there is no such option; {hint}")
    given = vars(namespace)
    for f in fields(TrainConfig):
        value, low, high = given.get(f.name), f.metadata["low"], f.metadata["high"]
        if isinstance(value, int | float) and not low <= value <= high:  # NaN, too
            raise UserError(f"--{f.name} {value}: must be from {low:g} to {high:g}")
    return given
