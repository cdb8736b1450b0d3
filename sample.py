"""Let a model write: a save of yours, or a published GPT-2.

python sample.py                                       the newest save in log/ asks for prompts; Ctrl-C stops a text
python sample.py --model gpt2 --prompt "Hello, I'm"    a model of the Hugging Face hub
python sample.py --prompt_file beginning.txt --num_samples 3
echo "Once upon a time" | python sample.py
python sample.py --prompt ""                           from <|endoftext|> on, as at the beginning of a document
"""

from errors import UserError, run_script

import argparse
import codecs
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import checkpoint
from model import GPT
from options import ArgumentParser, device, number
from tokens import END_OF_TEXT, gpt2_encoding


def load(name_or_dir: str | None) -> GPT:
    """Return the model of that name or directory, or the newest checkpoint in log/. Raises UserError."""
    if name_or_dir is None:
        saves = [*checkpoint.saves(Path("log")).values()]
        if not saves:
            raise UserError("no checkpoint in log/: train a model with python train_gpt2.py, or try --model gpt2")
        name_or_dir = saves[-1]
    return checkpoint.pretrained(name_or_dir, "--model").eval()


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
    top_k, top_p = args.top_k or None, args.top_p if args.top_p < 1 else None
    steps = model.stream(idx, args.max_new_tokens, args.temperature, top_k, top_p, generator=generator)
    for piece in pieces((token.item() for token in steps), args.stop):
        print(piece, end="", flush=True)
    print()


def converse(model: GPT, args: argparse.Namespace, generator: torch.Generator) -> None:
    """Ask for prompts until there are no more."""
    with contextlib.suppress(ImportError):  # on Windows, which needs none
        import readline  # noqa: F401  (input() then has a history and can be edited)
    sys.stdin.reconfigure(errors="replace")  # what a terminal sends may be in another encoding

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
    """Return the flags, each checked. Raises UserError."""
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--model", metavar="DIR_OR_NAME", help="a directory, or a name on the hub (default: the newest in log/)"
    )
    parser.add_argument(
        "--prompt", help="the text to continue, which is printed, too (default: ask, or standard input)"
    )
    parser.add_argument("--prompt_file", type=Path, metavar="FILE", help="a UTF-8 file to continue")
    for flag, kind, low, high, default, text in (
        ("num_samples", int, 1, 1e6, 1, "how many continuations"),
        ("max_new_tokens", int, 1, 1e6, 200, "the longest continuation, in tokens"),
        ("temperature", float, 0, 100, 0.8, "0 takes the most likely token, 1 the model's own odds"),
        ("top_k", int, 0, 50257, 50, "draw from the N most likely tokens only; 0 for all"),
        ("top_p", float, 1e-6, 1, 1.0, "and from the fewest that together have this probability"),
        ("seed", int, 0, 1e18, 1337, "of the random numbers"),
    ):
        parser.add_argument(
            f"--{flag}",
            type=number(kind, low, high),
            default=default,
            metavar="N",
            help=f"{text} (default: %(default)s)",
        )
    parser.add_argument("--stop", help="end before this string; <|endoftext|> ends in any case")
    parser.add_argument(
        "--device", type=device, default="auto", help="cpu, cuda, mps, or auto for the fastest (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.prompt is not None and args.prompt_file:
        raise UserError("--prompt and --prompt_file: give one of them")
    return args


def find_prompt(args: argparse.Namespace) -> str | None:
    """Return the prompt, wherever it comes from, or None if there is a terminal to ask at. Raises UserError."""
    if args.prompt is not None:
        return args.prompt
    if not args.prompt_file and sys.stdin.isatty():
        return None
    source = f"--prompt_file {args.prompt_file}" if args.prompt_file else "standard input"
    try:
        text = args.prompt_file.read_text(encoding="utf-8") if args.prompt_file else sys.stdin.read()
    except OSError as e:
        raise UserError(f"{source}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{source}: the prompt is not {e.encoding} text (byte {e.start:,})") from None
    return text.removesuffix("\n")


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    prompt = find_prompt(args)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    model = load(args.model).to(args.device)
    if prompt is None:
        converse(model, args, generator)
        return 0
    for _ in range(args.num_samples):
        print(prompt, end="", flush=True)
        write(model, prompt, args, generator)
        if args.num_samples > 1:
            print("-" * 80)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
