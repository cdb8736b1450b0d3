"""Let a model write: a save of yours, or a published GPT-2.

python sample.py                                       the newest save in log/ asks for prompts; Ctrl-C stops a text
python sample.py --model gpt2 --prompt "Hello, I'm"    a model of the Hugging Face hub
python sample.py --prompt_file beginning.txt --num_samples 3
echo "Once upon a time" | python sample.py
python sample.py --prompt ""                           from <|endoftext|> on, as at the beginning of a document
"""

from errors import UserError

import argparse
import codecs
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from model import GPT
from runtime import checkpoint
from tokens import END_OF_TEXT, gpt2_encoding


def load(name_or_dir: str | None, device: torch.device) -> GPT:
    """The model of that name or directory, or the newest save in log/, ready to generate. Raises UserError."""
    if name_or_dir is None:
        saves = [*checkpoint.saves(Path("log")).values()]
        if not saves:
            raise UserError("no save in log/: train one with python train_gpt2.py, or try --model gpt2")
        name_or_dir = saves[-1]
    return checkpoint.pretrained(name_or_dir, "--model").eval().to(device)


def pieces(tokens: Iterator[int], stop: str | None) -> Iterator[str]:
    """The text of the tokens as they come, up to <|endoftext|> or the string stop, neither of which is part of it.

    A token may end within a character, and a text within what may become stop: such ends are held back until the
    tokens that follow decide.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    held = ""
    for token in tokens:
        if token == END_OF_TEXT:
            break
        held += decoder.decode(gpt2_encoding().decode_single_token_bytes(token))
        if stop and stop in held:
            yield held[: held.index(stop)]
            return
        keep = next((n for n in range(min(len(stop or ""), len(held)), 0, -1) if stop.startswith(held[-n:])), 0)
        yield held[: len(held) - keep]
        held = held[len(held) - keep :]
    yield held + decoder.decode(b"", final=True)


def write(model: GPT, prompt: str, args: argparse.Namespace, generator: torch.Generator) -> None:
    """Print a continuation of the prompt, token by token."""
    idx = torch.tensor([gpt2_encoding().encode_ordinary(prompt) or [END_OF_TEXT]], device=generator.device)  # (1, T)
    steps = model.stream(idx, args.max_new_tokens, args.temperature, args.top_k, args.top_p, generator=generator)
    for piece in pieces((token.item() for token in steps), args.stop):
        print(piece, end="", flush=True)
    print()


def converse(model: GPT, args: argparse.Namespace, generator: torch.Generator) -> None:
    """Ask for prompts until there are no more."""
    with contextlib.suppress(ImportError):  # on Windows, which needs none
        import readline  # noqa: F401  (input() then has a history and can be edited)

    while True:
        try:
            prompt = input("\nprompt> ")
        except (EOFError, KeyboardInterrupt):
            return print()
        try:
            write(model, prompt, args, generator)
        except KeyboardInterrupt:
            print(" …")


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """The flags, each checked. Raises UserError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", metavar="DIR_OR_NAME", help="a directory, or a name on the hub (default: the newest in log/)"
    )
    parser.add_argument(
        "--prompt", help="the text to continue, which is printed, too (default: ask, or standard input)"
    )
    parser.add_argument("--prompt_file", type=Path, metavar="FILE", help="a UTF-8 file to continue")
    parser.add_argument("--num_samples", type=int, default=1, help="how many continuations (default: %(default)s)")
    parser.add_argument(
        "--max_new_tokens", type=int, default=200, help="the longest continuation, in tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="0 takes the likeliest token, 1 the model's own odds (default: %(default)s)",
    )
    parser.add_argument(
        "--top_k",
        type=int,
        default=50,
        help="draw from the so many likeliest tokens only; 0 for all (default: %(default)s)",
    )
    parser.add_argument(
        "--top_p", type=float, help="and from the fewest that together have this probability (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=1337, help="of the random numbers (default: %(default)s)")
    parser.add_argument("--stop", help="end before this string; <|endoftext|> ends in any case")
    parser.add_argument("--device", help="cpu, cuda, mps (default: the fastest there is)")
    parser.error = lambda message: parser.exit(2, f"sample.py: error: {message}; see --help\n")
    args = parser.parse_args(argv)
    bounds = dict(num_samples=(1, 1e6), max_new_tokens=(1, 1e6), temperature=(0, 100), top_k=(0, 50257))
    for flag, (low, high) in (bounds | dict(top_p=(1e-6, 1), seed=(0, 1e18))).items():
        value = getattr(args, flag)
        if value is not None and not low <= value <= high:  # NaN, too
            raise UserError(f"--{flag} {value}: must be from {low:g} to {high:g}")
    args.top_k = args.top_k or None
    if args.prompt is not None and args.prompt_file:
        raise UserError("--prompt and --prompt_file: one of them, please")
    return args


def find_prompt(args: argparse.Namespace) -> str | None:
    """The prompt, wherever it comes from, or None if there is a terminal to ask at. Raises UserError."""
    if args.prompt is not None:
        return args.prompt
    try:
        if args.prompt_file:
            return args.prompt_file.read_text(encoding="utf-8").removesuffix("\n")
        if sys.stdin is None:
            return ""
        return None if sys.stdin.isatty() else sys.stdin.read().removesuffix("\n")
    except OSError as e:
        raise UserError(f"--prompt_file {args.prompt_file}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"the prompt is not UTF-8 text (byte {e.start:,})") from None


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse_flags(argv)
        prompt = find_prompt(args)
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        try:
            generator = torch.Generator(args.device or best).manual_seed(args.seed)
        except (RuntimeError, AssertionError):  # no such name; no such device
            raise UserError(f"--device {args.device}: PyTorch finds no such device here; try --device cpu") from None
        model = load(args.model, generator.device)
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
        if prompt is None:
            converse(model, args, generator)
            return 0
        for _ in range(args.num_samples):
            print(prompt, end="", flush=True)
            write(model, prompt, args, generator)
            if args.num_samples > 1:
                print("-" * 80)
        return 0
    except UserError as e:
        print(f"sample.py: error: {e}", file=sys.stderr)
        return e.status
    except KeyboardInterrupt:
        print()
        return 130
    except BrokenPipeError:  # whoever was reading has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
