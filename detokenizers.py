"""De-tokenizers: from corpora with a space between words and punctuation to plain text, and back.

The GPT-2 paper (section 3.1) scores such corpora through "invertible de-tokenizers", so that the probability of the
plain text is the probability of the corpus. They were not published; these are our own.
"""

import re

OPENING, CLOSING = "([{$£#", ")]}%.,;:?!"  # followed by no space; preceded by no space
CONTRACTION = re.compile(r"n't|'(?:s|m|d|ll|re|ve)?", re.IGNORECASE)
LAST = re.compile(rf"(.+?)({CONTRACTION.pattern}|[{re.escape(CLOSING)}\"])", re.IGNORECASE | re.DOTALL)  # of a chunk
TITLES = "mr|mrs|ms|dr|st|jr|sr|col|gen|lt|sgt|capt|rev|sen|gov|prof|inc|co|corp|ltd|bros|nos?|vs|al|pp?"
ABBREVIATION = re.compile(rf"(?:.*\W)?(?:\w|\w+\.\w|{TITLES})\.|\.+", re.IGNORECASE)  # the last point is part of it
JOINERS = {"@-@": "-", "@,@": ",", "@.@": "."}  # WikiText's hyphen, comma and point within a word


class Detokenizer:
    """Joins words to plain text and splits it again: tokenize(detokenize(text)) == text for every text.

    Words that are joined are a chunk. A chunk that would not be split into the same words is not joined, and a word
    that would be split by itself is written after a backslash.
    """

    def __init__(self, opening: str = '"', closing: str = '"', joiners: bool = False):
        self.opening, self.closing = opening, closing  # words that open and close a quotation
        self.joiners = JOINERS if joiners else {}
        self.plain = {opening: '"', closing: '"'} | self.joiners  # words that are written in another way

    def detokenize(self, text: str) -> str:
        """Return the plain text."""
        return "\n".join(" ".join(self.join_line(line.split(" "))) for line in text.split("\n"))

    def tokenize(self, text: str) -> str:
        """Return the text that was de-tokenized. Only the tests need it, to prove that there is an inverse."""
        lines = text.split("\n")
        return "\n".join(" ".join(word for chunk in line.split(" ") for word in self.split(chunk)) for line in lines)

    def join_line(self, words: list[str]) -> list[str]:
        """Return the chunks of a line."""
        chunks, group = [], []
        quoted = attach_next = False
        for word in words:
            opens = word == self.opening and not (quoted and word == self.closing)
            closes = word == self.closing and not opens
            attaches = closes or word in self.joiners or word in [*CLOSING] or CONTRACTION.fullmatch(word)
            if group and not (attaches or attach_next):
                chunks += self.join(group)
                group = []
            group.append(word)
            quoted = opens or (quoted and not closes)
            attach_next = opens or word in self.joiners or word in [*OPENING]
        return chunks + self.join(group)

    def join(self, words: list[str]) -> list[str]:
        """Return these words as one chunk, if it can be split again, or else each as a chunk."""
        chunk = "".join(self.plain.get(word, word) for word in words)
        if self.split(chunk) == words:
            return [chunk]
        return [word if self.split(word) == [word] else "\\" + word for word in words]

    def split(self, chunk: str) -> list[str]:
        """Return the words of a chunk."""
        if chunk.startswith("\\"):
            return [chunk[1:]]
        first, last = [], []
        while len(chunk) > 1 and chunk[0] in OPENING + '"':
            first.append(self.opening if chunk[0] == '"' else chunk[0])
            chunk = chunk[1:]
        while (match := LAST.fullmatch(chunk)) and not ABBREVIATION.fullmatch(chunk):
            chunk = match[1]
            last.insert(0, self.closing if match[2] == '"' else match[2])
        if self.joiners:
            chunk = re.sub(r"(?<=[\w>])-(?=[\w<])|(?<=\d)[,.](?=\d)", r" @\g<0>@ ", chunk)
        return [*first, *chunk.split(" "), *last]


def lm_eval_wikitext(page: str) -> str:
    """Return a page of WikiText as lm-evaluation-harness's task `wikitext` scores it. This cannot be inverted."""
    page = re.sub("/' [0-9]/", "/'[0-9]/", page.replace("s '", "s'"))
    for mark in "-,.":
        page = page.replace(f" @{mark}@ ", mark)
    for mark in ":;.!?,":
        page = page.replace(f" {mark} ", f"{mark} ")
    for opening, closing in (r"\(", r"\)"), (r"\[", r"\]"), ("{", "}"), ('"', '"'), ("'", "'"):
        page = re.sub(rf"{opening}\s*([^{closing}]*?)\s*{closing}", rf"{opening[-1]}\1{closing[-1]}", page)
    for spaced, plain in ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"):
        page = page.replace(spaced, plain)
    return page.replace("\n ", "\n").replace(" N ", " 1 ").replace(" 's", "'s")
