"""evaluate.py compared with straightforward loops over `transformers`, one sequence at a time, and with lm-eval."""

from errors import run_script
import http.server
import json
import math
import threading
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import zero_shot
from conftest import BOOKS_TEXT, ROOT, perturbed, run_ranks
from detokenizers import Detokenizer
from model import GPT, GPTConfig
from runtime.distributed import Distributed
from runtime.shards import write_shard
from scoring import Result, Scorer
from tokens import END_OF_TEXT, gpt2_tokenizer

SHARED = ROOT.parent / "shared/data"
TEXT = BOOKS_TEXT.read_text()[5000:8000]
PASSAGES = [
    "The baker had run out of flour, so she sent her son across the bridge to the mill. He came back without any flour",
    "Nobody had opened the gate for years. When at last the key turned, there was nothing but a garden",
    "We walked until it rained, and then we ran until we found the barn. It smelled of straw, horses and marzipan",
    "He asked whether it was hers, and she said that it was not, that it had never been, and that it was his and his",
    "It was a long way down to the river",
]
WIKITEXT = """ = Kettle =

 A kettle is a pot , usually made of metal , for boiling water . It was " invented " ( they say ) in 3 @,@ 500 BC .
 = = Use = =

 The kettle 's lid keeps the heat in ; a half @-@ full kettle boils sooner , doesn 't it ?

 = Teapot =

 Teapots <unk> hold 1 @.@ 5 litres . They aren 't kettles !
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """The directory of a small model whose weights are far from their small initial values."""
    directory = tmp_path_factory.mktemp("model")
    perturbed(GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=32), std=0.2).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def hf(model_dir):
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(model_dir).eval()


@pytest.fixture(scope="module")
def scorer(model_dir):
    return Scorer(GPT.from_pretrained(model_dir).eval(), 1024, Distributed())


def last_logprobs(hf, tokens, n) -> tuple[list[float], list[int]]:
    """The log-probabilities of the last n tokens, and the most likely ones in their places."""
    with torch.no_grad():
        logprobs = hf(torch.tensor([[int(t) for t in tokens[:-1]]])).logits[0].double().log_softmax(-1)
    rows = logprobs[-n:]
    return [rows[i, int(t)].item() for i, t in enumerate(tokens[-n:])], rows.argmax(-1).tolist()


def stream_nats(hf, tokens, stride, block_size=64) -> float:
    """Minus the log-probability of all tokens but the first, each computed in the window that ends with its group."""
    nats, done = 0.0, 1
    while done < len(tokens):
        n = min(block_size if done == 1 else stride, len(tokens) - done)
        window = tokens[: done + n][-(block_size + 1) :]
        nats -= sum(last_logprobs(hf, window, n)[0])
        done += n
    return nats


def stream(*texts) -> list[int]:
    return [token for text in texts for token in (END_OF_TEXT, *gpt2_tokenizer().encoding.encode_ordinary(text))]


def evaluate_json(*flags, status=0) -> dict:
    """Run the script in this process; return its JSON's tasks, as lists of results."""
    assert run_script(evaluate.main, [*map(str, flags), "--json", "numbers.json"]) == status
    return {name: task["results"] for name, task in json.loads(Path("numbers.json").read_text())["tasks"].items()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_text_equals_straightforward_loop(here, model_dir, hf, batch_tokens):
    (here / "my.txt").write_text(TEXT)
    flags = "--model", model_dir, "--data", "my.txt", "--stride", 16, "--batch_tokens", batch_tokens, "--device", "cpu"
    results = evaluate_json(*flags)["text"]
    tokens = stream(TEXT)
    for stride in 64, 16:
        nats = stream_nats(hf, tokens, stride)
        expected = {
            "nats/token": nats / (len(tokens) - 1),
            "ppl/token": math.exp(nats / (len(tokens) - 1)),
            "ppl/word": math.exp(nats / len(TEXT.split())),
            "ppl/word+line": math.exp(nats / (len(TEXT.split()) + TEXT.count("\n"))),
            "bits/byte": nats / (math.log(2) * len(TEXT.encode())),
        }
        found = {r["metric"]: r["value"] for r in results if r["convention"] == f"my.txt, stride {stride}"}
        # Sums of a thousand log-probabilities in float32, of about -11 each.
        assert found == pytest.approx(expected, rel=1e-4) and len(results) == 10


def test_documents_and_shards_are_one_stream(here, model_dir, hf):
    documents = ["It was dark.\nIt was late. ☃", "The second one.", TEXT[:500]]
    (here / "my.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in documents))
    pq.write_table(pa.table(dict(text=documents)), here / "my.parquet")
    (here / "shards").mkdir()
    tokens = np.array(stream(*documents), dtype=np.uint16)
    write_shard(here / "shards/x_val_0.npy", tokens[:100])
    write_shard(here / "shards/x_val_1.npy", tokens[100:])
    write_shard(here / "shards/x_train_0.npy", tokens[:50])
    nats = stream_nats(hf, tokens, 64)
    for data in "my.jsonl", "my.parquet", "shards":
        results = evaluate_json("--model", model_dir, "--data", data, "--device", "cpu")["text"]
        found = {r["metric"]: (r["total"], r["n"]) for r in results}
        n_bytes = len("".join(documents).encode())
        assert found["nats/token"] == (pytest.approx(nats, rel=1e-5), len(tokens) - 1)
        assert found["bits/byte"] == (pytest.approx(nats, rel=1e-5), n_bytes)
        assert found["ppl/word"][1] == sum(len(text.split()) for text in documents)


def test_default_is_newest_checkpoint_and_validation_text(here, model_dir, hf, capsys):
    GPT.from_pretrained(model_dir).save_pretrained(here / "log/step_000010")
    results = evaluate_json("--device", "cpu", "--limit", 3)["text"]
    text = BOOKS_TEXT.read_text()
    tokens = stream(text[len(text) * 9 // 10 :])[: 3 * 64 + 1]
    assert results[0]["total"] == pytest.approx(stream_nats(hf, tokens, 64), rel=1e-5) and results[0]["n"] == 3 * 64
    assert "the last tenth of input.txt, stride 64" in capsys.readouterr().out


def lambada_baseline(hf, texts) -> dict[tuple[str, str], float]:
    stop_ids = [
        ids[0] for w in zero_shot.STOP_WORDS if len(ids := gpt2_tokenizer().encoding.encode_ordinary(" " + w)) == 1
    ]
    n_right, n_allowed, n_last, nats, last_nats, n_tokens = 0, 0, 0, 0.0, 0.0, 0
    for text in texts:
        tokens = gpt2_tokenizer().encoding.encode_ordinary(text)
        n = len(tokens) - len(gpt2_tokenizer().encoding.encode_ordinary(text[: text.rindex(" ")]))
        window = tokens[-65:]
        logprobs, greedy = last_logprobs(hf, window, n)
        with torch.no_grad():
            logits = hf(torch.tensor([window[:-1]])).logits[0, -n:]
        logits[:, stop_ids] = -math.inf
        n_right += greedy == tokens[-n:]
        n_allowed += logits.argmax(-1).tolist() == tokens[-n:]
        n_last += greedy[-1] == tokens[-1]
        nats, last_nats, n_tokens = nats - sum(logprobs), last_nats - logprobs[-1], n_tokens + n
    return {
        ("as it is, last word", "accuracy"): n_right / len(texts),
        ("as it is, last word, no stop word", "accuracy"): n_allowed / len(texts),
        ("as it is, last token", "accuracy"): n_last / len(texts),
        ("as it is, last word", "ppl/word"): math.exp(nats / len(texts)),
        ("as it is, last word", "ppl/token"): math.exp(nats / n_tokens),
        ("as it is, last token", "ppl/token"): math.exp(last_nats / len(texts)),
    }


def with_greedy_ends(hf, texts, excluded=()) -> list[str]:
    """Texts whose last word is what the model finds most likely, so that some are predicted right."""
    ended = []
    for text in texts:
        with torch.no_grad():
            logits = hf(torch.tensor([gpt2_tokenizer().encoding.encode_ordinary(text)[-64:]])).logits[0, -1]
        logits[list(excluded)] = -math.inf
        words = (gpt2_tokenizer().encoding.decode([token]) for token in logits.argsort(descending=True).tolist())
        ended.append(text + next(word for word in words if word.startswith(" ") and word[1:].isalpha()))
    return ended


def test_lambada_equals_straightforward_loop(here, model_dir, hf):
    texts = PASSAGES + with_greedy_ends(hf, PASSAGES[:3]) + [TEXT[:400].replace("\n", " ") + " marzipan"]
    (here / "lambada.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
    expected = lambada_baseline(hf, texts)
    for batch_tokens in 1, 200, 10_000:
        flags = "--model", model_dir, "--data_dir", here, "--batch_tokens", batch_tokens, "--device", "cpu"
        results = evaluate_json("--tasks", "lambada", *flags)["lambada"]
        assert {(r["convention"], r["metric"]): r["value"] for r in results} == pytest.approx(expected, rel=1e-4)
    assert {r["published"] for r in results} == {0.4599, 35.13}


def test_stop_words_are_not_predicted(here, model_dir, hf):
    stop_ids = [
        ids[0] for w in zero_shot.STOP_WORDS if len(ids := gpt2_tokenizer().encoding.encode_ordinary(" " + w)) == 1
    ]
    with torch.no_grad():  # a model that always finds a stop word most likely
        model = GPT.from_pretrained(model_dir)
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(model.transformer.wte.weight[stop_ids[5]] * 10)
        model.save_pretrained(here / "model")
    from transformers import GPT2LMHeadModel

    hf = GPT2LMHeadModel.from_pretrained(here / "model").eval()
    texts = [
        PASSAGES[0] + gpt2_tokenizer().encoding.decode([stop_ids[5]]),
        *with_greedy_ends(hf, PASSAGES[1:3], stop_ids),
    ]
    (here / "lambada.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
    results = evaluate_json("--tasks", "lambada", "--model", "model", "--data_dir", here, "--device", "cpu")["lambada"]
    found = {(r["convention"], r["metric"]): r["value"] for r in results}
    assert found == pytest.approx(lambada_baseline(hf, texts), rel=1e-4)
    assert found["as it is, last word", "accuracy"] == pytest.approx(1 / 3)
    assert found["as it is, last word, no stop word", "accuracy"] == pytest.approx(2 / 3)


def test_cbt_equals_straightforward_loop(here, model_dir, hf):
    words = "mill bridge flour gate key garden barn straw horses river".split()
    records = []
    for n in range(12):
        sentences = [f"`` It is n't {words[n % 10]} , '' said Mr. {word.title()} ." for word in words[: 3 + n % 3]]
        question = f"Then they saw the XXXXX , and went home {words[n % 7]} ."
        records.append(dict(sentences=sentences, question=question, options=words, answer=words[n * 7 % 10]))
    pq.write_table(pa.Table.from_pylist(records), here / "cbt-cn.parquet")
    expected = dict.fromkeys(("as it is", "de-tokenized"), 0)
    for version in expected:
        for record in records:
            scores = []
            for word in record["options"]:
                text = " ".join(record["sentences"] + [record["question"].replace("XXXXX", word)])
                if version == "de-tokenized":
                    text = text.replace("`` ", '"').replace(" ''", '"').replace(" n't", "n't")
                    text = text.replace(" .", ".").replace(" ,", ",")
                tokens = stream(text)
                n = len(stream(text)) - len(stream(text[: text.index("Then they saw")]))
                scores.append(sum(last_logprobs(hf, tokens[-65:], n)[0]))
            expected[version] += words[scores.index(max(scores))] == record["answer"]
    for batch_tokens in 1, 10_000:
        flags = "--model", model_dir, "--data_dir", here, "--batch_tokens", batch_tokens, "--device", "cpu"
        results = evaluate_json("--tasks", "cbt-cn", *flags)["cbt-cn"]
        assert {r["convention"].split(",")[0]: r["total"] for r in results} == expected
        assert all(0 < r["total"] < r["n"] == 12 and r["published"] == 0.8765 for r in results)


def test_corpora_are_scored_per_original_word(here, model_dir, hf):
    (here / "wikitext2.txt").write_text(WIKITEXT)
    results = evaluate_json("--tasks", "wikitext2", "--model", model_dir, "--data_dir", here, "--device", "cpu")
    found = {(r["convention"], r["metric"]): (r["total"], r["n"]) for r in results["wikitext2"]}
    n_words, n_lines = len(WIKITEXT.split()), WIKITEXT.count("\n")
    plain = """= Kettle =

A kettle is a pot, usually made of metal, for boiling water. It was "invented" (they say) in 3,500 BC.
= = Use = =

The kettle's lid keeps the heat in; a half-full kettle boils sooner, doesn 't it?

= Teapot =

Teapots <unk> hold 1.5 litres. They aren 't kettles!
"""
    for version, text in ("as it is", WIKITEXT), ("de-tokenized", plain):
        nats = pytest.approx(stream_nats(hf, stream(text), 64), rel=1e-5)
        assert found[f"{version}, stride 64", "ppl/token"] == (nats, len(stream(text)) - 1)
        assert found[f"{version}, stride 64", "ppl/word"] == (nats, n_words)
        assert found[f"{version}, stride 64", "ppl/word+line"] == (nats, n_words + n_lines)


def test_enwik8_is_the_last_five_million_bytes(here, model_dir, hf):
    text = "☃" + TEXT[:300] + "\n"
    with zipfile.ZipFile(here / "enwik8.zip", "w") as archive:
        archive.writestr("enwik8", b"x" * 10**6 + "☃".encode() * 1_666_566 + text.encode())
    last = "".join(zero_shot.read("enwik8", here / "enwik8.zip")).encode()
    assert 5_000_000 - 2 <= len(last) <= 5_000_000 and last.endswith(text.encode())
    (here / "text8.txt").write_text(text)
    results = evaluate_json("--tasks", "text8", "--model", model_dir, "--data_dir", here, "--device", "cpu")["text8"]
    bits = next(r for r in results if r["metric"] == "bits/byte")
    assert bits["value"] == pytest.approx(
        stream_nats(hf, stream(text), 64) / math.log(2) / len(text.encode()), rel=1e-5
    )
    assert bits["published"] == 1.17


def test_two_ranks_have_the_same_numbers(here, model_dir):
    (here / "wikitext2-raw.txt").write_text(WIKITEXT * 3)
    (here / "my.txt").write_text(TEXT)
    flags = "--tasks", "text", "wikitext2-raw", "--data", "my.txt", "--model", model_dir, "--data_dir", here
    flags += "--batch_tokens", 128, "--device", "cpu"
    expected = evaluate_json(*flags)
    done = run_ranks("evaluate.py", *flags, "--json", "two.json", cwd=here)
    assert done.stdout.count("ppl/byte") == 1
    assert {k: v["results"] for k, v in json.loads((here / "two.json").read_text())["tasks"].items()} == expected


def test_two_ranks_report_missing_data_once(here, model_dir):
    flags = "--tasks", "text", "--data", "nowhere.txt", "--model", model_dir, "--device", "cpu"
    done = run_ranks("evaluate.py", *flags, status=2, cwd=here)
    assert done.stderr.count("error") == 1 and "evaluate.py: error: --data nowhere.txt: no such file" in done.stderr


def test_lines_are_those_of_the_corpus(here):
    pq.write_table(pa.table(dict(text=[" = A = \n", "", " b \n"])), here / "wikitext2.parquet")  # as on the hub
    assert zero_shot.read("wikitext2", here / "wikitext2.parquet") == [" = A = \n", " \n", " b \n"]
    (here / "ptb.txt").write_text("a b \u2028 c\x85 d\ne")
    assert zero_shot.read("ptb", here / "ptb.txt") == ["a b \u2028 c\x85 d\n", "e\n"]


def test_hellaswag_is_that_of_the_script(here, model_dir, monkeypatch):
    import hellaswag

    monkeypatch.setattr(hellaswag, "FILE", ROOT / "tests/data/hellaswag_100.jsonl")
    flags = "--limit", 20, "--device", "cpu"
    results = evaluate_json("--model", model_dir, "--tasks", "hellaswag", *flags)["hellaswag"]
    line = "--model", model_dir, "--data", hellaswag.FILE, "--json", "script.json", *flags
    assert run_script(hellaswag.main, [*map(str, line)]) == 0
    numbers = json.loads(Path("script.json").read_text())
    for r in results:
        rendering, metric = r["convention"].split(", ")
        assert numbers[rendering][metric]["correct"] == r["total"] and r["n"] == 20


def test_nearest_convention_is_marked(capsys):
    results = [Result("ptb", name, "ppl/word", math.log(value), 1) for name, value in (("a", 60.0), ("b", 66.0))]
    evaluate.print_table([*results, Result("ptb", "b", "bits/byte", 1.0, 1)], 0)
    marked = [line.endswith("*") for line in capsys.readouterr().out.splitlines()]
    assert marked == [False, True, False]
    assert evaluate.published(results[0], 3) == 35.76
    assert evaluate.published(Result("wikitext103-raw", "", "ppl/token", 1, 1), 1) == 26.37
    assert evaluate.published(Result("lambada-original", "", "accuracy", 1, 1), 2) == 0.6012


WORDS = "a Mr. U.S. ( ) [ \" `` '' ' 's n't do @-@ @,@ @.@ - , . ... 1 000 : \\ \\x \"x x\" $ # % <unk> = (( x-y 1,2 x.".split()


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.sampled_from([*WORDS, ""]), max_size=12).map(" ".join) | st.text("ab1 .,'\"()@-`\\\n$") | st.text())
def test_detokenizers_are_invertible(text):
    for d in Detokenizer(), Detokenizer("``", "''"), Detokenizer(joiners=True):
        assert d.tokenize(d.detokenize(text)) == text


@pytest.mark.skipif(not SHARED.exists(), reason="WikiText-2 is not here")
def test_wikitext2_is_detokenized_and_inverted():
    text = (SHARED / "wikitext2_test_tokens.txt").read_text()
    text = "\n".join(line.strip() for line in text.split("\n"))
    plain = Detokenizer(joiners=True).detokenize(text)
    assert Detokenizer(joiners=True).tokenize(plain) == text
    assert (
        text.count(" , ") > 10_000 > 1000 * plain.count(" @-@ ") and plain.count(" , ") < 100 and plain.count("\\") < 5
    )


@pytest.mark.parametrize(
    "flags, status, message",
    [
        (["--tasks", "lambda"], 2, "--tasks lambda: no such task; there are text, lambada, "),
        (["--data", "nowhere.txt"], 2, "--data nowhere.txt: no such file"),
        (["--data", "numbers.csv"], 2, "--data numbers.csv: no such file, or neither .txt nor .jsonl nor .parquet"),
        (["--data", "empty.jsonl"], 2, "--data empty.jsonl: holds no text"),
        (["--data", "empty.txt"], 2, "--data empty.txt: holds no text"),
        (["--data", "bad.jsonl"], 2, "bad.jsonl: document 1 is not a JSON object"),
        (["--model", "nowhere/at/all"], 2, "--model nowhere/at/all: "),
        (["--stride", "65"], 2, "--stride 65: is more than the model's context, 64"),
        (["--stride", "0"], 2, "--stride 0: must be from 1 to"),
        (["--tasks", "enwik8"], 2, "enwik8.zip: cannot be read as a zip file"),
        (["--tasks", "cbt-ne"], 2, "cbt-ne.jsonl: not all of its records are questions"),
        (["--tasks", "cbt-cn"], 2, "cbt-cn.jsonl: document 0 has no sentences"),
        (["--tasks", "wikitext2"], 2, "wikitext2.txt: holds no text"),
        (["--tasks", "1bw"], 2, "1bw.jsonl: document 0 has 7 in text, which is not text"),
        (["--data", "shards"], 2, "x_val_0.npy: token 5,000 is 60000"),
        (["--data", "blank.jsonl"], 2, "--data blank.jsonl: holds no text"),
        (["--tasks", "lambada"], 2, "lambada: record 2 has only one word"),
        (["--tasks", "ptb"], 4, "no {here}/ptb.txt, and it could not be downloaded"),
        (["--data_dir", ""], 2, "--data_dir: is empty"),
    ],
)
def test_errors_are_one_line(here, model_dir, capsys, monkeypatch, flags, status, message):
    (here / "numbers.csv").write_text("1,2\n")
    (here / "empty.jsonl").touch()
    (here / "empty.txt").touch()
    (here / "blank.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    (here / "wikitext2.txt").write_text(" \n \n")
    (here / "1bw.jsonl").write_text('{"text": 7}\n')
    (here / "shards").mkdir()
    for split in "val", "train":
        ids = np.full(20_000, 5, dtype=np.uint16)
        ids[5000] = 60_000 if split == "val" else 5
        write_shard(here / f"shards/x_{split}_0.npy", ids)
    (here / "bad.jsonl").write_text('{"text": "a"}\n[1]\n')
    (here / "enwik8.zip").write_text("no zip")
    (here / "cbt-ne.jsonl").write_text(
        json.dumps(dict(sentences=["a"], question=None, options=["c"], answer="c")) + "\n"
    )
    (here / "cbt-cn.jsonl").write_text('{"text": "a"}\n')
    (here / "lambada.jsonl").write_text('{"text": "two words"}\n{"text": "one"}\n')
    monkeypatch.setitem(zero_shot.SOURCES, "ptb", "http://127.0.0.1:9/ptb.test.txt")
    flags = [*flags, *(["--model", str(model_dir)] if "--model" not in flags else [])]
    flags += ["--data_dir", str(here)] if "--data_dir" not in flags else []
    assert run_script(evaluate.main, [*flags, "--device", "cpu"]) == status
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1 and lines[0].startswith("evaluate.py: error: ") and message.format(here=here) in lines[0]


def test_batch_that_does_not_fit_is_one_line(here, model_dir, capsys, monkeypatch):
    def score_batch(*args):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Scorer, "score_batch", score_batch)
    assert run_script(evaluate.main, ["--model", str(model_dir), "--device", "cpu", "--limit", "1"]) == 2
    line = "evaluate.py: error: a batch of 1,024 tokens does not fit into memory: try a smaller --batch_tokens"
    assert capsys.readouterr().err.splitlines()[-1] == line


def test_no_checkpoint_is_one_line(here, capsys):
    assert run_script(evaluate.main, []) == 2
    assert capsys.readouterr().err.startswith("evaluate.py: error: no checkpoint in log/: train a model with")


def test_data_is_downloaded_once(here, model_dir, monkeypatch):
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write("".join(json.dumps(dict(text=text)) + "\n" for text in PASSAGES).encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setitem(zero_shot.SOURCES, "lambada", f"http://127.0.0.1:{server.server_port}/x/lambada_test.jsonl")
    flags = "--model", model_dir, "--tasks", "lambada", "--data_dir", here / "new", "--device", "cpu"
    assert run_script(evaluate.main, [*map(str, flags)]) == 4 and not [*(here / "new").iterdir()]  # another file
    monkeypatch.setattr(zero_shot, "SHA256", {})
    first = evaluate_json(*flags)
    server.shutdown()
    assert evaluate_json(*flags) == first and len(requests) == 2
    assert [path.name for path in (here / "new").iterdir()] == ["lambada.jsonl"]


# lm-evaluation-harness itself


def lm_eval_results(directory, task, original, path, tmp_path) -> dict[str, float]:
    """The results of one of its tasks on a local file and our directory."""
    import datasets
    import lm_eval
    import yaml
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    datasets.config.HF_DATASETS_CACHE = tmp_path / "cache"
    local = dict(
        include=str(Path(lm_eval.__file__).parent / "tasks" / original), task=f"{task}_local", tag=[],
        dataset_path="json", dataset_name=None, training_split=None, validation_split=None,
        dataset_kwargs=dict(data_files=dict(test=str(path)), cache_dir=str(tmp_path / "cache")),
    )  # fmt: skip
    (tmp_path / f"{task}_local.yaml").write_text(yaml.dump(local))
    model = HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=8)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    done = lm_eval.simple_evaluate(
        model, tasks=[f"{task}_local"], task_manager=manager, bootstrap_iters=0, verbosity="ERROR"
    )
    return {name.split(",")[0]: value for name, value in done["results"][f"{task}_local"].items()}


@pytest.mark.slow
@pytest.mark.parametrize("which", ["passages", "all"])
def test_lambada_equals_lm_eval(here, model_dir, hf, which):
    if which == "all" and not SHARED.exists():
        pytest.skip("LAMBADA is not here")
    texts = PASSAGES + with_greedy_ends(hf, PASSAGES[:3])
    if which == "all":
        texts = [json.loads(line)["text"] for line in (SHARED / "lambada_test.jsonl").read_text().splitlines()]
        texts[:500] = with_greedy_ends(hf, texts[:500])
    (here / "lambada.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
    results = evaluate_json("--tasks", "lambada", "--model", model_dir, "--data_dir", here, "--device", "cpu")
    found = {(r["convention"], r["metric"]): r for r in results["lambada"]}
    theirs = lm_eval_results(model_dir, "lambada", "lambada/lambada_openai.yaml", here / "lambada.jsonl", here)
    right = found["as it is, last word", "accuracy"]
    assert right["n"] == len(texts) and right["total"] == round(theirs["acc"] * len(texts)) > 0
    assert found["as it is, last word", "ppl/word"]["value"] == pytest.approx(theirs["perplexity"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["pages", "a third"])
def test_wikitext_equals_lm_eval(here, model_dir, which):
    text = WIKITEXT * 3
    if which == "a third":
        if not SHARED.exists():
            pytest.skip("WikiText-2 is not here")
        text = "".join((SHARED / "wikitext2_test_tokens.txt").read_text().splitlines(keepends=True)[:1500])
    (here / "wikitext2-raw.txt").write_text(text)
    results = evaluate_json("--tasks", "wikitext2-raw", "--model", model_dir, "--data_dir", here, "--device", "cpu")
    found = {r["metric"]: r["value"] for r in results["wikitext2-raw"] if r["convention"] == "as lm-evaluation-harness"}
    pages, current = [], []
    for line in text.splitlines(keepends=True):
        words = line.split()
        title = words[:1] == ["="] == words[-1:] and words[1] != "=" and len(words) > 2
        if title and "".join(current).strip():
            pages, current = [*pages, "".join(current).removesuffix("\n")], []  # its loader joins lines by "\n"
        current.append(line)
    pages.append("".join(current))
    (here / "pages.jsonl").write_text("".join(json.dumps(dict(page=page)) + "\n" for page in pages))
    theirs = lm_eval_results(model_dir, "wikitext", "wikitext/wikitext.yaml", here / "pages.jsonl", here)
    ours = found["ppl/word"], found["ppl/byte"], found["bits/byte"]
    names = "word_perplexity", "byte_perplexity", "bits_per_byte"
    assert ours == pytest.approx(tuple(theirs[name] for name in names), rel=1e-4)
