"""Vocabularies: the first tokens of GPT-2's, and one trained by fineweb.py, in shards, runs, checkpoints and tools."""

from errors import UserError, run_script
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer

import evaluate
import fineweb
import hellaswag
import sample
from conftest import BOOKS_TEXT, ROOT, SMALL, read_log, run_in_process, weights
from data import open_data
from model import GPT, GPTConfig, load_tokenizer
from runs import rewrite_record
from runtime.shards import find_shards
from tokens import Tokenizer, gpt2_tokenizer

V = 380
GREEK = (
    "Μῆνιν ἄειδε θεὰ Πηληϊάδεω Ἀχιλῆος οὐλομένην, ἣ μυρί᾽ Ἀχαιοῖς ἄλγε᾽ ἔθηκε, πολλὰς δ᾽ ἰφθίμους ψυχὰς Ἄϊδι προΐαψεν"
)


def theirs(directory):
    """The tokenizer of a directory by `transformers`."""
    from transformers import AutoTokenizer, GPT2Tokenizer

    if (directory / "config.json").exists():
        return AutoTokenizer.from_pretrained(directory)
    return GPT2Tokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """GPT-2's first V tokens, cut from its files in another way, by `tokenizers`."""
    directory = tmp_path_factory.mktemp("first")
    vocab = json.loads((ROOT / "assets/vocab.json").read_text())
    ids = {token: i for token, i in vocab.items() if i < V - 1} | {"<|endoftext|>": V - 1}
    (directory / "vocab.json").write_text(json.dumps(ids))
    (directory / "merges.txt").write_text("".join((ROOT / "assets/merges.txt").open().readlines()[: 1 + V - 257]))
    return ByteLevelBPETokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"))


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_first_tokens_of_gpt2_equal_tokenizers(first, text):
    tokenizer = gpt2_tokenizer().first(V)
    ids = tokenizer.encode(text).tolist()
    assert ids == first.encode(text).ids
    assert tokenizer.encoding.decode(ids) == text


def test_first_tokens_on_a_text(first):
    text = BOOKS_TEXT.read_text()[:100_000]
    tokenizer = gpt2_tokenizer().first(V)
    ids = tokenizer.encode(text)
    assert ids.tolist() == first.encode(text).ids and tokenizer.end_of_text == V - 1 == tokenizer.vocab_size - 1
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert gpt2_tokenizer().first(257).encode("aé").tolist() == [64, *(first.encode("é").ids)]  # bytes


def test_assets_are_the_files_of_openai():
    """The SHA-256 of the hub's gpt2."""
    assert gpt2_tokenizer().sha256 == {
        "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    }
    for name, content in gpt2_tokenizer().files.items():
        assert (ROOT / "assets" / name).read_bytes() == content


@pytest.fixture(scope="module")
def greek(tmp_path_factory):
    """A directory with documents in another script, and shards of them with a vocabulary trained on them."""
    directory = tmp_path_factory.mktemp("greek")
    rng = np.random.default_rng(0)
    words = GREEK.split()
    documents = [" ".join(rng.permutation(words * 3)) + "\n" for _ in range(60)]
    (directory / "text.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in documents))
    (directory / "text.txt").write_text("\n".join(documents))
    flags = "--files", directory / "text.jsonl", "--out_dir", directory / "shards", "--shard_size", 2000
    assert run_script(fineweb.main, [*map(str, flags), "--train_tokenizer", str(V)]) == 0
    return directory, documents


def test_trained_tokenizer_is_the_one_of_transformers(greek):
    """The shards hold, end to end, what `transformers` makes of the documents."""
    directory, documents = greek
    tokenizer = theirs(directory / "shards")
    assert len(tokenizer) == V and tokenizer.eos_token_id == V - 1
    expected = [i for text in documents for i in [V - 1, *tokenizer(text)["input_ids"]]]
    train, val = ([p for p in find_shards(directory / "shards") if split in p.name] for split in ("train", "val"))
    stream = np.concatenate([np.load(path) for path in val + train])
    assert stream.tolist() == expected
    gpt2 = sum(len(gpt2_tokenizer().encode(text)) for text in documents)
    assert len(expected) < gpt2 / 3  # it has learned Greek


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from(GREEK + " \n0aé🙂"), max_size=80))
def test_trained_tokenizer_on_any_text(greek, text):
    directory, _ = greek
    tokenizer = Tokenizer.load(directory / "shards")
    assert tokenizer.encode(text).tolist() == theirs_of(directory / "shards").encode(text).ids


def theirs_of(directory, cache={}):  # noqa: B006 (each example would load it again)
    if directory not in cache:
        cache[directory] = ByteLevelBPETokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"))
    return cache[directory]


def test_same_command_continues_with_its_tokenizer(greek, capsys):
    directory, _ = greek
    before = {p.name: p.read_bytes() for p in (directory / "shards").iterdir()}
    flags = ["--files", str(directory / "text.jsonl"), "--out_dir", str(directory / "shards"), "--shard_size", "2000"]
    assert run_script(fineweb.main, [*flags, "--train_tokenizer", str(V)]) == 0
    assert "is complete" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in (directory / "shards").iterdir()} == before
    assert run_script(fineweb.main, [*flags, "--train_tokenizer", str(V + 1)]) == 2
    assert f"--train_tokenizer {V + 1}: {directory}/shards has a tokenizer of {V}" in capsys.readouterr().err


def test_too_few_words_for_a_vocabulary(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a b c")
    flags = "--files", tmp_path / "a.txt", "--out_dir", tmp_path / "out", "--train_tokenizer", 5000
    assert run_script(fineweb.main, [*map(str, flags)]) == 2
    assert "--train_tokenizer 5000: the text gives no more than 257 tokens" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_shards_of_gpt2_get_no_other_vocabulary(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(BOOKS_TEXT.read_text()[:9000])
    flags = ["--files", str(tmp_path / "a.txt"), "--out_dir", str(tmp_path / "out"), "--shard_size", "500"]
    assert run_script(fineweb.main, flags) == 0
    assert run_script(fineweb.main, [*flags, "--train_tokenizer", "300"]) == 2
    assert "holds shards of GPT-2's vocabulary" in capsys.readouterr().err


def test_shards_without_their_tokenizer_are_refused(greek, tmp_path):
    shards = shutil.copytree(greek[0] / "shards", tmp_path / "shards")
    (shards / "merges.txt").unlink()
    with pytest.raises(UserError, match="manifest.json: its shards are of another vocabulary"):
        open_data(shards)
    for name, content in gpt2_tokenizer().first(V).files.items():
        (shards / name).write_bytes(content)
    with pytest.raises(UserError, match="manifest.json: its shards are of another vocabulary"):
        open_data(shards)


@pytest.fixture(scope="module")
def run(greek):
    """The log directory of a run on the shards."""
    directory, _ = greek
    run_in_process(*SMALL, "--data", directory / "shards", "--log_dir", directory / "log", "--sample_every", 8)
    return directory / "log"


def test_checkpoint_has_the_vocabulary(greek, run, capsys):
    from transformers import GPT2LMHeadModel

    checkpoint = run / "step_000008"
    tokenizer = theirs(checkpoint)
    assert len(tokenizer) == V and json.loads((checkpoint / "config.json").read_text())["vocab_size"] == V
    assert tokenizer(GREEK)["input_ids"] == theirs(greek[0] / "shards")(GREEK)["input_ids"]
    flags = ["--model", str(checkpoint), "--prompt", GREEK[:20], "--max_new_tokens", "8", "--temperature", "0"]
    capsys.readouterr()
    assert run_script(sample.main, [*flags, "--device", "cpu"]) == 0
    ids = torch.tensor([tokenizer(GREEK[:20])["input_ids"]])
    generated = GPT2LMHeadModel.from_pretrained(checkpoint).generate(ids, max_new_tokens=8, do_sample=False)
    assert capsys.readouterr().out == tokenizer.decode(generated[0]) + "\n"


def test_bits_per_byte_in_the_log(greek, run):
    """By `transformers`: a character of its tokens stands for a byte."""
    from transformers import GPT2LMHeadModel

    model, tokenizer = GPT2LMHeadModel.from_pretrained(run / "step_000008").eval(), theirs(run / "step_000008")
    val = np.load(find_shards(greek[0] / "shards")[0].with_name("edufineweb_val_000000.npy")).astype(np.int64)
    n = 8 * 32  # --eval_tokens 256, in sequences of 32
    x, y = (torch.from_numpy(val[i : i + n]).view(8, 32) for i in (0, 1))
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(model(x).logits.flatten(0, 1), y.flatten()).item()
    n_bytes = sum(len(token) for token in tokenizer.convert_ids_to_tokens(y.flatten()) if token != "<|endoftext|>")
    assert float(read_log(run, "bpb")[8]) == pytest.approx(nats * n / math.log(2) / n_bytes, rel=1e-5)
    assert float(read_log(run, "val")[8]) == pytest.approx(nats, rel=1e-5)


def test_bits_per_byte_of_vocabularies_compare(tmp_path):
    """Untrained, each model spends ln V nats on a token: bits per byte are log2(V) over the bytes of a token."""
    (tmp_path / "a.txt").write_text(text := BOOKS_TEXT.read_text()[:20000])
    for size, flags in (50257, []), (512, ["--vocab_size", 512]):
        log = tmp_path / str(size)
        done = run_in_process(*SMALL, "--max_steps", 1, *flags, "--data", tmp_path / "a.txt", "--log_dir", log)
        tokenizer = gpt2_tokenizer().first(size)
        targets = tokenizer.encode(text[len(text) * 9 // 10 :])[1:257]
        n_bytes = len(tokenizer.encoding.decode_bytes(targets.tolist()))
        assert float(read_log(log, "bpb")[0]) == pytest.approx(math.log2(size) * 256 / n_bytes, rel=0.01)
        bpb = float(read_log(log, "bpb")[1])
        assert f"{bpb:.4f} bits per byte" in done.stdout


def test_evaluate_scores_text_and_refuses_other_tasks(greek, run, capsys):
    directory, _ = greek
    flags = ["--model", str(run / "step_000008"), "--device", "cpu"]
    assert run_script(evaluate.main, [*flags, "--data", str(directory / "text.txt"), "--limit", "3"]) == 0
    assert re.search(r"bits/byte +[\d.]+", capsys.readouterr().out)
    records = str(ROOT / "tests/data/hellaswag_100.jsonl")
    assert run_script(hellaswag.main, [*flags, "--data", records]) == 2
    assert "the model has a vocabulary of its own: evaluate.py can score --tasks text" in capsys.readouterr().err


def test_resume_is_bitwise_with_own_vocabulary(greek, run, tmp_path):
    directory, _ = greek
    log = shutil.copytree(run, tmp_path / "log")
    shutil.rmtree(log / "step_000008")
    run_in_process(*SMALL, "--data", directory / "shards", "--log_dir", log, "--resume", "--sample_every", 8)
    assert read_log(log) == read_log(run) and weights(log) == weights(run)


def test_fine_tuning_encodes_the_text_with_the_model_s_tokens(greek, run, tmp_path):
    directory, _ = greek
    flags = *SMALL[SMALL.index("--seq_len") :], "--init_from", run / "step_000008", "--data", directory / "text.txt"
    done = run_in_process(*flags, "--log_dir", tmp_path / "log")
    n = len(
        theirs(directory / "shards")((text := (directory / "text.txt").read_text())[: len(text) * 9 // 10])["input_ids"]
    )
    summary = " ".join(done.stdout.split())  # its lines are wrapped
    assert f"a text of {n:,} training tokens" in summary and f"vocabulary of {V}" in summary
    assert len(theirs(tmp_path / "log/step_000008")) == V


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--data SHARDS --vocab_size 300", "has another vocabulary than the model, --vocab_size, or the first part"),
        ("--data TEXT --vocab_size 256", "--vocab_size 256: must be from 257 to 50257"),
        ("--data TEXT --init_from MODEL --vocab_size 300", "--vocab_size 300: the model of --init_from has 380"),
        ("--data SHARDS --init_from GPT2", "has another vocabulary than the model"),
        ("--data TEXT --resume MODEL --vocab_size 300", "vocab_size None → 300"),
    ],
)
def test_vocabularies_that_do_not_fit_together_are_refused(greek, run, tmp_path, flags, message):
    GPT(GPTConfig(32, n_layer=2, n_head=2, n_embd=32)).save_pretrained(tmp_path / "gpt2")
    names = dict(SHARDS=greek[0] / "shards", TEXT=greek[0] / "text.txt", MODEL=run / "step_000008")
    flags = [str((names | dict(GPT2=tmp_path / "gpt2")).get(flag, flag)) for flag in flags.split()]
    small = [] if "--resume" in flags else SMALL[SMALL.index("--seq_len") :]
    done = run_in_process(*small, *flags, "--device", "cpu", "--log_dir", tmp_path / "log", status=2)
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_checkpoint_of_earlier_code_resumes(text, tmp_path):
    """Its record has no vocab_size, and there is neither tokenizer.json nor a model card."""
    flags = *SMALL, "--data", text, "--log_dir"
    run_in_process(*flags, tmp_path / "whole")
    run_in_process(*flags, tmp_path / "log")
    shutil.rmtree(tmp_path / "log/step_000008")
    old = tmp_path / "log/step_000004"
    for name in "tokenizer.json", "README.md":
        (old / name).unlink()

    def forget(record: dict) -> None:
        del record["config"]["vocab_size"], record["files"]["tokenizer.json"]

    rewrite_record(old, forget)
    done = run_in_process(*flags, tmp_path / "log", "--resume")
    assert "at step 4: nothing changed" in done.stdout
    assert read_log(tmp_path / "log") == read_log(tmp_path / "whole")
    assert weights(tmp_path / "log") == weights(tmp_path / "whole")


def test_model_with_more_tokens_than_gpt2_trains_and_resumes(text, tmp_path):
    """build-nanogpt's has 50,304; its tokenizer is GPT-2's."""
    GPT(GPTConfig(32, 50304, 2, 2, 32)).save_pretrained(tmp_path / "model")
    assert len(theirs(tmp_path / "model")) == 50257
    flags = *SMALL[SMALL.index("--seq_len") :], "--data", text, "--log_dir", tmp_path / "log"
    run_in_process(*flags, "--init_from", tmp_path / "model")
    shutil.rmtree(tmp_path / "log/step_000008")
    done = run_in_process("--resume", tmp_path / "log/step_000004", "--device", "cpu")
    assert "at step 4: nothing changed" in done.stdout
    assert json.loads((tmp_path / "log/step_000008/config.json").read_text())["vocab_size"] == 50304


@pytest.mark.parametrize("size, fits", [(380, True), (400, False), (300, False), (50257, False)])
def test_model_and_tokenizer_of_different_sizes(tmp_path, size, fits):
    GPT(GPTConfig(8, size, 1, 1, 8)).save_pretrained(tmp_path, gpt2_tokenizer().first(380))
    if fits:
        assert load_tokenizer(tmp_path, size).vocab_size == 380
    else:
        with pytest.raises(ValueError, match=rf"has {size} tokens, and its tokenizer .* 380"):
            load_tokenizer(tmp_path, size)


def test_model_of_the_hub_without_network_is_not_taken_for_gpt2(monkeypatch, tmp_path):
    """Its vocabulary may be in files that are not in the cache; that of OpenAI's models is known."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert load_tokenizer("gpt2", 50257) == gpt2_tokenizer()
    with pytest.raises(OSError):
        load_tokenizer("someone/model", 50257)


def test_files_that_are_no_vocabulary_are_named(tmp_path):
    for name, content in gpt2_tokenizer().first(300).files.items():
        (tmp_path / name).write_bytes(content)
    ids = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps({token: (i + 1) % 300 for token, i in ids.items()}))
    with pytest.raises(ValueError, match="vocab.json is not the bytes, the tokens of merges.txt, and"):
        Tokenizer.load(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na bc\n")
    with pytest.raises(ValueError, match="'a bc' does not merge two earlier tokens into a new one"):
        Tokenizer.load(tmp_path)
