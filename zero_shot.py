"""The zero-shot tasks of the GPT-2 paper (Radford et al., 2019, table 3), each in several conventions.

No code of the paper's evaluation was published; docs/evaluation.md says what is known of its conventions.
"""

from errors import UserError
import io
import itertools
import json
import re
from pathlib import Path

import numpy as np

from detokenizers import Detokenizer, lm_eval_wikitext
from fineweb import check_texts, find_reader
from runtime.files import download, open_zip
from scoring import Example, Result, Scorer, split_common_prefix
from tokens import ASSETS, gpt2_tokenizer

DATA = json.loads((ASSETS / "zero_shot.json").read_text())
SOURCES, SHA256 = DATA["sources"], DATA["sha256"]  # of each task's file; of CBT the validation set, as in the paper
PAPER = DATA["paper"]  # the paper's figures for 124M, 350M, 774M and 1558M
STOP_WORDS = DATA["stop_words"].split()  # seldom end a passage of LAMBADA: an approximation to the paper's filter


def find_file(task: str, data_dir: Path) -> Path:
    """Return the file of a task: one that is in the directory, or else downloaded there. Raise UserError."""
    suffixes = [".jsonl", ".parquet"]
    if task in ("enwik8", "text8"):
        suffixes = [".zip", ".txt"]
    elif not task.startswith(("lambada", "cbt")):
        suffixes.append(".txt")
    for suffix in suffixes:
        if (path := data_dir / f"{task}{suffix}").is_file():
            return path
    return download(SOURCES[task], data_dir / f"{task}{Path(SOURCES[task]).suffix}", SHA256.get(task))


def read(task: str, path: Path) -> list:
    """Return the records of a task's file: texts, lines of text, or what questions of CBT consist of."""
    if task in ("enwik8", "text8"):  # whose last 5 million bytes are for testing
        content = path.read_bytes()
        if path.suffix == ".zip":
            with open_zip(path) as archive:
                content = archive.read(task)
        return split_lines(content[-5_000_000:].decode(errors="ignore"))
    if task.startswith("cbt"):
        columns = (find_reader(path)(path, column) for column in ("sentences", "question", "options", "answer"))
        records = [*zip(*columns, strict=True)]
        if not all(is_question(*record) for record in records):
            raise UserError(f"{path}: not all of its records are questions of the Children's Book Test")
        return records
    texts = [*check_texts(find_reader(path)(path, "text"), "text", str(path))]
    if task.startswith("lambada"):
        return [text.strip() for text in texts]
    if task.startswith("wikitext"):  # in the hub's files, empty lines have lost their only space
        texts = [text or " " for text in texts]
    return split_lines("".join(text if text.endswith("\n") else f"{text}\n" for text in texts))


def is_question(sentences: object, question: object, options: object, answer: object) -> bool:
    """Return whether these are text, as they should be, with a blank and the answer among the options."""
    lists = isinstance(sentences, list) and isinstance(options, list) and answer in options
    return lists and all(isinstance(x, str) for x in (question, *sentences, *options)) and "XXXXX" in question


def split_lines(text: str) -> list[str]:
    return io.StringIO(text, newline="\n").readlines()  # splitlines() would also split at other characters


def versions(task: str, texts: list[str]) -> dict[str, list[str]]:
    """Return texts as they are and, where words and punctuation have spaces between them, de-tokenized."""
    if task in ("lambada", "enwik8", "text8"):
        return {"as it is": texts}
    if task == "1bw" or task.startswith("wikitext"):
        detokenizer = Detokenizer(joiners=task != "1bw")
    else:
        detokenizer = Detokenizer("``", "''")
    plain = []
    for text in texts:  # spaces at the ends of a line are not scored
        plain.append(detokenizer.detokenize(text.strip(" \n")) + ("\n" if text.endswith("\n") else ""))
    return {"as it is": texts, "de-tokenized": plain}


def lambada(scorer: Scorer, task: str, texts: list[str]) -> list[Result]:
    """Predict the last word of each text (Paperno et al., 2016)."""
    stop_ids = [ids[0] for word in STOP_WORDS if len(ids := gpt2_tokenizer().encoding.encode_ordinary(f" {word}")) == 1]
    results = []
    for version, some_texts in versions(task, texts).items():
        examples = []
        for i, text in enumerate(some_texts, start=1):
            context = gpt2_tokenizer().encode(text.rpartition(" ")[0])
            if not len(context):
                raise UserError(f"{task}: record {i:,} has only one word", agreed=True)
            examples.append(Example(context, [gpt2_tokenizer().encode(text)[len(context) :]]))
        scores = scorer.score(examples, excluded=stop_ids, name=task)
        n, last = len(texts), scores.lengths.cumsum(dim=0) - 1  # the last token of each text
        n_allowed = int(scores.all_greedy(allowed=True).sum())
        nats, last_nats = -scores.logprobs.double().sum().item(), -scores.logprobs[last].double().sum().item()
        results += [
            Result(task, f"{version}, last word", "accuracy", int(scores.all_greedy().sum()), n),
            Result(task, f"{version}, last word, no stop word", "accuracy", n_allowed, n),
            Result(task, f"{version}, last token", "accuracy", int(scores.is_greedy[last].sum()), n),
            Result(task, f"{version}, last word", "ppl/word", nats, n),
            Result(task, f"{version}, last word", "ppl/token", nats, len(scores.logprobs)),
            Result(task, f"{version}, last token", "ppl/token", last_nats, n),
        ]
    return results


def cbt(scorer: Scorer, task: str, records: list[tuple[list[str], str, list[str], str]]) -> list[Result]:
    """Choose the word for each question's blank (Hill et al., 2016) with which the whole question is most likely."""
    texts = [" ".join([*s, question.replace("XXXXX", o)]) for s, question, options, _ in records for o in options]
    n_options = [len(options) for _, _, options, _ in records]
    starts = np.cumsum([0, *n_options])  # of each record's texts
    results = []
    for version, some_texts in versions(task, texts).items():
        tokens = [gpt2_tokenizer().encode_document(text) for text in some_texts]
        examples = [split_common_prefix(tokens[start:end]) for start, end in itertools.pairwise(starts)]
        sums = scorer.score(examples, name=task).sums().split(n_options)  # of each record (n_options,)
        n_right = 0
        for (_, _, options, answer), candidates in zip(records, sums, strict=True):
            n_right += options[int(candidates.argmax())] == answer
        results.append(Result(task, f"{version}, word and rest of sentence", "accuracy", n_right, len(records)))
    return results


def perplexities(
    scorer: Scorer, task: str, streams: dict[str, np.ndarray], originals: list[bytes], strides: list[int]
) -> list[Result]:
    """Score each version of a text as one stream of tokens. Words, lines and bytes are those of the originals."""
    n_words = sum(len(original.split()) for original in originals)
    n_lines = sum(original.count(b"\n") for original in originals)
    n_bytes = sum(map(len, originals))
    results = []
    for (version, tokens), stride in itertools.product(streams.items(), strides):
        nats, n_tokens = scorer.score_documents([tokens], stride, task)
        counts = {"nats/token": n_tokens, "ppl/token": n_tokens, "ppl/word": n_words}
        counts |= {"ppl/word+line": n_words + n_lines, "bits/byte": n_bytes}
        results += [Result(task, f"{version}, stride {stride}", metric, nats, n) for metric, n in counts.items()]
    return results


def lm_eval(scorer: Scorer, task: str, lines: list[str]) -> list[Result]:
    """Score WikiText page by page, as lm-evaluation-harness does. Words and bytes are those of the original."""
    pages = [""]
    for line in lines:
        if re.fullmatch(r"\s*= [^=].* =\s*", line) and pages[-1].strip():  # a page's title; sections have more "="
            pages.append("")
        pages[-1] += line
    pages = [page.removesuffix("\n") for page in pages[:-1]] + pages[-1:]  # as its loader leaves them
    documents = [gpt2_tokenizer().encode_document(lm_eval_wikitext(page)) for page in pages]
    nats, _ = scorer.score_documents(documents, scorer.model.config.block_size, task)
    n_words = sum(len(re.split(r"\s+", page)) for page in pages)  # empty strings at the ends count, as in its code
    n_bytes = sum(len(page.encode()) for page in pages)
    counts = {"ppl/word": n_words, "ppl/byte": n_bytes, "bits/byte": n_bytes}
    return [Result(task, "as lm-evaluation-harness", metric, nats, n) for metric, n in counts.items()]


def evaluate(scorer: Scorer, task: str, path: Path, strides: list[int], limit: int | None) -> list[Result]:
    """Return the results of a task on a file's first `limit` records, or lines. Raise UserError."""
    with scorer.dist.agree():
        records = read(task, path)[:limit]
        if not records:
            raise UserError(f"{path}: holds no records")
    if task.startswith("lambada"):
        return lambada(scorer, task, records)
    if task.startswith("cbt"):
        return cbt(scorer, task, records)
    encode = gpt2_tokenizer().encode_document
    streams = {version: encode("".join(lines)) for version, lines in versions(task, records).items()}
    originals = ["".join(records).encode()]
    if not originals[0].split():
        raise UserError(f"{path}: holds no text", agreed=True)
    results = perplexities(scorer, task, streams, originals, strides)
    return results + (lm_eval(scorer, task, records) if task.endswith("-raw") else [])
