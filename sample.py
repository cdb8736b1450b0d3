"""Generate text with a checkpoint, or a published GPT-2. At the prompt, Ctrl-C ends a text, a second one the program.

python sample.py                                       the newest checkpoint in log/; asks for prompts
python sample.py --model gpt2 --prompt "Hello, I'm"    a model of the Hugging Face hub
python sample.py --prompt_file beginning.txt --num_samples 3
python sample.py --prompt ""                           start a new document, after <|endoftext|>
"""

from errors import UserError, run_script
import codecs
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from model import GPT
from runtime import checkpoint
from runtime.device import choose_device, sdpa_without_cudnn
from runtime.options import option, parse_options
from tokens import Tokenizer


@dataclass(frozen=True)
class Options:
    model: str | None = option(None, "name on the hub, or directory (default: newest in log/)", metavar="MODEL")
    prompt: str | None = option(None, "text to continue (default: ask, or read standard input)", empty=True)
    prompt_file: Path | None = option(None, "UTF-8 file to continue", metavar="FILE")
    num_samples: int = option(1, "number of continuations", low=1, high=1_000_000, metavar="N")
    max_new_tokens: int = option(200, "longest continuation, in tokens", low=1, high=1_000_000, metavar="N")
    temperature: float = option(0.8, "0 takes the most likely token, 1 keeps the model's probabilities", high=100)
    top_k: int = option(50, "sample from the N most likely tokens; 0 for all", high=50257, metavar="N")
    top_p: float = option(1.0, "sample from the fewest tokens with this probability together", low=1e-6, high=1)
    seed: int = option(1337, "seed of the random numbers", high=10**18)
    stop: str | None = option(None, "end before this text; <|endoftext|> always ends it")
    device: str = option("auto", "such as cpu or cuda:1, or auto for the fastest", metavar="DEVICE")


def stream_text(tokens: Iterator[int], tokenizer: Tokenizer, stop: str | None) -> Iterator[str]:
    """Yield the text of the tokens as they come, up to <|endoftext|> or the text stop, without either."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end within a character
    held = ""  # an end of the text that may be the beginning of stop; the next tokens decide
    for token in tokens:
        if token == tokenizer.end_of_text:
            break
        held += decoder.decode(tokenizer.encoding.decode_single_token_bytes(token))
        if stop and stop in held:
            yield held[: held.index(stop)]
            return
        keep = next((n for n in range(min(len(stop or ""), len(held)), 0, -1) if stop.startswith(held[-n:])), 0)
        yield held[: len(held) - keep]
        held = held[len(held) - keep :]
    yield held + decoder.decode(b"", final=True)


@sdpa_without_cudnn()
def print_continuation(model: GPT, tokenizer: Tokenizer, prompt: str, args: Options, generator: torch.Generator):
    """Print a continuation of the prompt, token by token."""
    ids = tokenizer.encoding.encode_ordinary(prompt) or [tokenizer.end_of_text]
    idx = torch.tensor([ids], device=generator.device)  # (1, T)
    top_k, top_p = args.top_k or None, args.top_p if args.top_p < 1 else None
    steps = model.stream(idx, args.max_new_tokens, args.temperature, top_k, top_p, generator=generator)
    for piece in stream_text((token.item() for token in steps), tokenizer, args.stop):
        print(piece, end="", flush=True)
    print()


def repl(model: GPT, tokenizer: Tokenizer, args: Options, generator: torch.Generator) -> None:
    """Ask for prompts until there are no more."""
    with contextlib.suppress(ImportError):  # on Windows, which needs none
        import readline  # noqa: F401  (input() then has a history and can be edited)
    sys.stdin.reconfigure(errors="replace")  # what a terminal sends may be in another encoding
    while True:
        try:
            prompt = input("\nprompt> ")
        except (EOFError, KeyboardInterrupt):
            return print()
        with contextlib.suppress(KeyboardInterrupt):
            print_continuation(model, tokenizer, prompt, args, generator)


def find_prompt(args: Options) -> str | None:
    """Return the prompt of the option, the file or standard input; None if there is a terminal to ask at."""
    if args.prompt is not None or (not args.prompt_file and sys.stdin.isatty()):
        return args.prompt
    source = f"--prompt_file {args.prompt_file}" if args.prompt_file else "standard input"
    try:
        text = args.prompt_file.read_text(encoding="utf-8") if args.prompt_file else sys.stdin.read()
    except OSError as e:
        raise UserError(f"{source}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{source}: the prompt is not {e.encoding} text (byte {e.start:,})") from None
    return text.removesuffix("\n")


def main(argv: list[str] | None = None) -> int:
    """Generate text. Raise UserError."""
    args = Options(**parse_options(Options, argv, __doc__))
    if args.prompt is not None and args.prompt_file:
        raise UserError("--prompt and --prompt_file: give one of them")
    prompt = find_prompt(args)
    generator = torch.Generator(choose_device(args.device)).manual_seed(args.seed)
    name = args.model or checkpoint.newest_model()
    model, tokenizer = checkpoint.load_model("--model", name)
    model = model.eval().to(generator.device)
    if prompt is None:
        repl(model, tokenizer, args, generator)
        return 0
    for _ in range(args.num_samples):
        print(prompt, end="", flush=True)
        print_continuation(model, tokenizer, prompt, args, generator)
        if args.num_samples > 1:
            print("-" * 80)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
