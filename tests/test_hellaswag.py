"""The HellaSwag evaluation compared with a baseline, one sequence at a time by `transformers`, and with lm-eval."""

from errors import run_script
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hellaswag
from conftest import ROOT, SMALL, launcher, perturbed, read_log, run, run_in_process, run_ranks
from model import GPT, GPTConfig
from scoring import Scorer, Scores

RECORDS = ROOT / "tests/data/hellaswag_100.jsonl"


def score(model, examples, batch_tokens, rank=0, size=1):
    """The scores of one of several ranks, zeros for the others' part."""
    one_rank = SimpleNamespace(rank=rank, size=size, is_main=True, all_reduce=lambda tensor: tensor)
    return Scorer(model, batch_tokens, one_rank).score(examples)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """The directory of a small model whose weights are far from their small initial values."""
    directory = tmp_path_factory.mktemp("model")
    perturbed(GPTConfig(block_size=256, n_layer=2, n_head=2, n_embd=64), std=0.1).save_pretrained(directory)
    return directory


def baseline_scores(directory, records, rendering, block_size=256):
    """Log-probabilities of each ending, one sequence at a time, all its logits computed, and the lengths for acc_norm."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)

    def encode(text):
        return tokenizer(text)["input_ids"]

    def clean(text):
        text = text.strip().replace(" [title]", ". ")
        text = re.sub("\\[.*?\\]", "", text)
        return text.replace("  ", " ")

    scores, lengths = [], []
    for record in records:
        for ending in record["endings"]:
            if rendering == "build-nanogpt":
                context, choice = encode(record["ctx"]), encode(" " + ending)
                lengths.append(len(choice))
            else:
                query = clean(record["activity_label"] + ": " + record["ctx_a"] + " " + record["ctx_b"].capitalize())
                ending = clean(ending)
                context = encode(query)
                choice = encode(query + " " + ending)[len(context) :]
                lengths.append(len(ending))
            row = (context + choice)[-(block_size + 1) :]
            with torch.no_grad():
                logprobs = model(torch.tensor([row[:-1]])).logits[0].log_softmax(-1)
            scores.append(sum(logprobs[-n, row[-n]].item() for n in range(1, len(choice) + 1)))
    return torch.tensor(scores).view(-1, 4), torch.tensor(lengths).view(-1, 4)


@pytest.fixture(scope="module")
def records():
    return [json.loads(line) for line in RECORDS.read_text().splitlines()[:50]]


@pytest.mark.parametrize("rendering", hellaswag.RENDERINGS)
def test_equals_the_baseline_for_every_batch_size(model_dir, records, rendering):
    expected, lengths = baseline_scores(model_dir, records, rendering)
    model = GPT.from_pretrained(model_dir).eval()
    examples = hellaswag.read_examples(RECORDS, hellaswag.RENDERINGS[rendering], limit=50)
    labels = torch.tensor([record["label"] for record in records])
    for batch_tokens in 1, 1000, 100_000:
        found = score(model, examples, batch_tokens)
        scores = found.sums().view(-1, 4).float()
        # Sums of up to 60 log-probabilities of about -11: float32 keeps four digits behind the point.
        torch.testing.assert_close(scores, expected, atol=1e-3, rtol=0)
        result = hellaswag.compute_accuracy(found, examples)
        lengths_read = torch.tensor([e.lengths for e in examples])
        assert torch.equal(scores.argmax(1), expected.argmax(1)) and found.n_cut == 0
        assert torch.equal((scores / lengths_read).argmax(1), (expected / lengths).argmax(1))
        assert result.acc == (expected.argmax(1) == labels).sum()
        assert result.acc_norm == ((expected / lengths).argmax(1) == labels).sum()
        assert 5 < result.acc < 25  # some are right and some are wrong


def test_long_contexts_are_cut_on_the_left_and_counted(model_dir, records, tmp_path):
    model = GPT.from_pretrained(model_dir).eval()
    model.crop_block_size(60)
    model.save_pretrained(tmp_path)
    expected, _ = baseline_scores(tmp_path, records, "build-nanogpt", block_size=60)
    examples = hellaswag.read_examples(RECORDS, hellaswag.render_nanogpt, limit=50)
    scores = score(model, examples, 2000)
    torch.testing.assert_close(scores.sums().view(-1, 4).float(), expected, atol=1e-3, rtol=0)
    assert scores.n_cut == sum(len(e.context) + max(map(len, e.continuations)) - 1 > 60 for e in examples) > 5


def test_scores_of_ranks_add_up(model_dir):
    model = GPT.from_pretrained(model_dir).eval()
    examples = hellaswag.read_examples(RECORDS, hellaswag.render_nanogpt)
    expected = score(model, examples, 1000).sums()
    parts = [score(model, examples, 1000, rank, 3).sums().view(-1, 4) for rank in range(3)]
    assert torch.equal(sum(parts).flatten(), expected)
    work = [sum(len(e.context) for e, row in zip(examples, part, strict=True) if row.any()) for part in parts]
    assert max(work) < 1.5 * min(work)


def test_near_ties_are_counted():
    example = hellaswag.Question([1], [[2]] * 4, [1, 1, 1, 1], 0)
    sums = torch.tensor([[-1.0, -1.000001, -2, -3], [-1, -1.1, -2, -3], [-3, -3, -3, -1]])
    scores = Scores(sums.flatten(), None, None, torch.ones(12, dtype=torch.int64), 0)
    assert hellaswag.compute_accuracy(scores, [example] * 3).near_ties == 1


RECORD = json.loads(RECORDS.read_text().splitlines()[0])


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2: Expecting property name"),
        ("[]", "line 2: "),
        (json.dumps(RECORD | dict(endings=["a", "b", "c"])), "line 2: expected four endings that are not empty"),
        (json.dumps(RECORD | dict(endings=["a", "b", "c", " "])), "line 2: expected four endings that are not empty"),
        (json.dumps(RECORD | dict(endings=None)), "line 2: "),
        (json.dumps(RECORD | dict(label=4)), "line 2: expected a label from 0 to 3, found 4"),
        (json.dumps(RECORD | dict(label="x")), "line 2: invalid literal"),
        (json.dumps({k: v for k, v in RECORD.items() if k != "ctx"}), "line 2: lacks 'ctx'"),
        (json.dumps(RECORD | dict(ctx="")), "line 2: nothing is left of the context"),
        (json.dumps(RECORD | dict(ctx=["a"])), "line 2: "),
        (json.dumps(RECORD | dict(label=float("inf"))), "line 2: cannot convert float infinity to integer"),
        ("[" * 100_000, "line 2: maximum recursion depth exceeded"),
        ("", "line 2: Expecting value"),
    ],
)
def test_a_bad_record_stops_with_its_line(tmp_path, line, message):
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(RECORD) + "\n" + line + "\n")
    with pytest.raises(hellaswag.UserError, match=message) as error:
        hellaswag.read_examples(path, hellaswag.render_nanogpt)
    assert str(error.value).startswith(f"{path}, line 2: ") and error.value.status == 2


def test_an_ending_longer_than_the_context_stops_with_its_line(model_dir):
    model = GPT.from_pretrained(model_dir).eval()
    model.crop_block_size(16)
    examples = hellaswag.read_examples(RECORDS, hellaswag.render_nanogpt)
    line = next(i for i, e in enumerate(examples, start=1) if max(map(len, e.continuations)) > 16)
    with pytest.raises(
        hellaswag.UserError, match=f"record {line}: .* tokens to score do not fit into the model.s context"
    ):
        score(model, examples, 1000)


def test_the_script(model_dir, tmp_path):
    flags = "-m", model_dir, "-d", "cpu", "--data", RECORDS, "--json", tmp_path / "numbers.json"
    done = run("hellaswag.py", *flags, "--batch_tokens", 2000)
    assert "100 records, where the validation set has 10,042" in done.stdout
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["model"] == str(model_dir) and numbers["dtype"] == "float32"
    model = GPT.from_pretrained(model_dir).eval()
    for name, render in hellaswag.RENDERINGS.items():
        examples = hellaswag.read_examples(RECORDS, render)
        result = hellaswag.compute_accuracy(score(model, examples, 2000), examples)
        assert numbers[name]["n"] == 100 and numbers[name]["near_ties"] == result.near_ties
        for metric, correct in ("acc", result.acc), ("acc_norm", result.acc_norm):
            assert numbers[name][metric]["correct"] == correct
            assert re.search(rf"{name} +{metric} .*\({correct}/100\)", done.stdout)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["-m", "nowhere/at/all"], "--model nowhere/at/all: "),
        (["-m", "FEW"], "the model has a vocabulary of its own: evaluate.py can score --tasks text"),
        (["-m", "MODEL", "--data", "nowhere.jsonl"], "--data nowhere.jsonl: no such file"),
        (["-m", "MODEL", "-d", "cuda"], "--device cuda: PyTorch finds no such device here"),
        (["-m", "MODEL", "-d", "gpu"], "--device gpu: PyTorch finds no such device here"),
        (["-m", "MODEL", "-d", "meta"], "--device meta: PyTorch finds no such device here"),
        (["-m", "MODEL", "--json", "."], "--json: cannot write .: it is a directory"),
        (["-m", "MODEL", "--limit", "0"], "--limit 0: must be from 1 to"),
        (["-m", "MODEL", "--limit", "9" * 20], f"--limit {'9' * 20}: must be from 1 to"),
        (["-m", "MODEL", "--batch_tokens", "-1"], "--batch_tokens -1: must be from 1 to"),
        (["-m", "MODEL", "--batch_tokens", "1e9"], "--batch_tokens: invalid int value: '1e9'"),
        (["-m", "MODEL", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["-m", "MODEL", "--data", "."], "--data .: no such file"),
        (["-m", "MODEL", "--data", "/dev/null"], "--data /dev/null: no such file"),
        (["-m", "MODEL", "--data", "two\nlines"], "--data two lines: no such file"),
        (["-m", "MODEL", "--data", "x" * 300], "File name too long"),
        (["-m", "MODEL", "-d", "hpu"], "--device hpu: PyTorch finds no such device here"),
        (["-m", ""], "--model: is empty"),
        (["-m", "MODEL", "--json", "x" * 300], "--json: cannot write xxx"),
        (["-m", "NAN"], "NAN: cannot be loaded as a GPT-2: "),
        (["-m", "HUGE"], "the model's log-probabilities in float16 are not finite"),
        (["-m", "MODEL", "--limit", "ten"], "--limit: invalid int value: 'ten'"),
        (
            ["-m", "MODEL", "--json", "nowhere/x.json"],
            "--json: cannot write nowhere/x.json: No such file or directory",
        ),
    ],
)
def test_the_script_s_errors_are_one_line(model_dir, tmp_path, capsys, monkeypatch, flags, message):
    if "FEW" in flags:
        GPT(GPTConfig(8, 1000, 1, 1, 8)).save_pretrained(tmp_path)  # with the first tokens of GPT-2's vocabulary
    if "NAN" in flags or "HUGE" in flags:
        model = GPT.from_pretrained(model_dir)
        model.transformer.ln_f.weight.data[3] = float("nan") if "NAN" in flags else 1e30
        model.save_pretrained(tmp_path / flags[1])
        message = message.replace(flags[1], str(tmp_path / flags[1]))
        flags = ["-m", tmp_path / flags[1], "--dtype", "float16", "--limit", 2]
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    flags = [dict(MODEL=model_dir, FEW=tmp_path).get(flag, flag) for flag in flags]
    if "--data" not in flags:
        flags += ["--data", RECORDS]
    status = run_script(hellaswag.main, [*map(str, flags)])
    out, err = capsys.readouterr()
    assert status == (3 if "float16 are" in message else 2) and not out
    lines = [line for line in err.splitlines() if line.strip() and "%|" not in line]  # of a progress bar
    assert len(lines) == 1 and lines[0].startswith("hellaswag.py: error: ") and message in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_two_ranks_print_the_numbers_once(model_dir):
    flags = "--model", model_dir, "--data", RECORDS, "--limit", 10, "--device", "cpu"
    assert run_ranks("hellaswag.py", *flags).stdout == run_ranks("hellaswag.py", *flags, ranks=1).stdout


def test_full_disk_is_one_line(model_dir, tmp_path, capsys):
    (tmp_path / "full").symlink_to("/dev/full")
    flags = "-m", model_dir, "--data", RECORDS, "--limit", 2, "--json", tmp_path / "full"
    assert run_script(hellaswag.main, [*map(str, flags)]) == 4
    line = f"hellaswag.py: error: {tmp_path}/full: cannot be written (No space left on device)"
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


class Server:
    """A web server on loopback that sends what it is told to."""

    def __init__(self, content: bytes, length: int | None = None):
        import http.server
        import threading

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Length", str(length or len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return f"http://127.0.0.1:{self.server.server_port}/hellaswag_val.jsonl"

    def __exit__(self, *exception):
        self.server.shutdown()


def test_download_is_verified_and_complete_or_absent(tmp_path, monkeypatch):
    import hashlib

    file = tmp_path / "hellaswag/hellaswag_val.jsonl"
    content = RECORDS.read_bytes()
    monkeypatch.setattr(hellaswag, "FILE", file)
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(content).hexdigest())
    for wrong, length, message in (
        (content[:-10] + b"x" * 10, None, "expected SHA-256"),
        (content[:1000], len(content), "could not be downloaded"),  # the connection is cut
    ):
        with Server(wrong, length) as url:
            monkeypatch.setattr(hellaswag, "URL", url)
            with pytest.raises(hellaswag.UserError, match=message) as error:
                hellaswag.find_file()
        assert error.value.status == 4 and not list(file.parent.iterdir())
    with Server(content) as url:
        monkeypatch.setattr(hellaswag, "URL", url)
        assert hellaswag.find_file() == file and file.read_bytes() == content
    assert hellaswag.find_file() == file  # without a server


def test_hellaswag_in_training_matches_script(tmp_path, text, monkeypatch):
    records = tmp_path / "records.jsonl"
    records.write_text("".join(RECORDS.read_text().splitlines(keepends=True)[:25]))
    monkeypatch.setattr(hellaswag, "FILE", records)
    fault = f"import hellaswag, pathlib; hellaswag.FILE = pathlib.Path({str(records)!r})"
    flags = *SMALL, "--data", text, "--seq_len", 128, "--hellaswag_every", 1, "--max_steps", 2, "--eval_every", 0
    flags += "--micro_batch_size", 1
    run_in_process(*flags, "--log_dir", tmp_path / "one")
    launcher().launch(*flags, "--log_dir", tmp_path / "two", "--compile", "on", ranks=2, fault=fault, timeout=240)
    values = read_log(tmp_path / "one", "hella")
    assert list(values) == [0, 1, 2] and values == read_log(tmp_path / "two", "hella")
    numbers = tmp_path / "numbers.json"
    line = "-m", tmp_path / "one/step_000002", "--data", records, "--json", numbers, "--device", "cpu"
    assert run_script(hellaswag.main, [*map(str, line)]) == 0
    value = json.loads(numbers.read_text())["build-nanogpt"]["acc_norm"]["value"]
    assert value == pytest.approx(float(values[2]))


# lm-evaluation-harness itself


def lm_eval_counts(directory, path, n, tmp_path) -> dict[str, int]:
    """How many of the first n records its task `hellaswag` gets right, reading the local file and our directory."""
    import datasets
    import lm_eval
    import yaml
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    datasets.config.HF_DATASETS_CACHE = tmp_path / "cache"
    original = Path(lm_eval.__file__).parent / "tasks/hellaswag/hellaswag.yaml"
    task = dict(
        include=str(original), task="hellaswag_local", tag=[], dataset_path="json", training_split=None,
        dataset_kwargs=dict(data_files=dict(validation=str(path)), cache_dir=str(tmp_path / "cache")),
    )  # fmt: skip
    (tmp_path / "hellaswag_local.yaml").write_text(yaml.dump(task))
    model = HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=8)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model, tasks=["hellaswag_local"], task_manager=manager, limit=n, bootstrap_iters=0, verbosity="ERROR"
    )["results"]["hellaswag_local"]
    return {metric: round(results[f"{metric},none"] * n) for metric in ("acc", "acc_norm")}


@pytest.mark.slow
def test_lm_eval_counts_the_same(model_dir, tmp_path):
    model = GPT.from_pretrained(model_dir).eval()
    examples = hellaswag.read_examples(RECORDS, hellaswag.render_lm_eval)
    result = hellaswag.compute_accuracy(score(model, examples, 2000), examples)
    assert lm_eval_counts(model_dir, RECORDS, 100, tmp_path) == dict(acc=result.acc, acc_norm=result.acc_norm)


VALIDATION_SET = next(
    (p for p in (hellaswag.FILE, ROOT.parent / "shared/data/hellaswag_val.jsonl") if p.exists()), None
)


@pytest.mark.slow
@pytest.mark.skipif(VALIDATION_SET is None, reason="the validation set is not here")
@pytest.mark.parametrize("which", ["trained", "124M"])
def test_a_thousand_records(tmp_path, which):
    """A small trained model, and a random one of the 124M shape: all four numbers, and lm-eval's two."""
    directory = tmp_path / "log/step_000060"
    if which == "trained":
        flags = "--preset", "tiny", "--seq_len", 256, "--max_steps", 60, "--log_dir", tmp_path / "log"
        run(
            "train_gpt2.py",
            *flags,
            "--device",
            "cpu",
            "--eval_every",
            0,
            "--sample_every",
            0,
            env={"OMP_NUM_THREADS": "2"},
        )
    else:
        torch.manual_seed(0)
        GPT(GPTConfig()).save_pretrained(directory)
    model = GPT.from_pretrained(directory).eval()
    block_size = model.config.block_size
    records = [json.loads(line) for line in VALIDATION_SET.read_text().splitlines()[:1000]]
    for name, render in hellaswag.RENDERINGS.items():
        examples = hellaswag.read_examples(VALIDATION_SET, render, limit=1000)
        found = score(model, examples, 4096)
        scores, result = found.sums().view(-1, 4), hellaswag.compute_accuracy(found, examples)
        expected, lengths = baseline_scores(directory, records, name, block_size)
        differ = scores.argmax(1) != expected.argmax(1)
        differ |= (scores / torch.tensor([e.lengths for e in examples])).argmax(1) != (expected / lengths).argmax(1)
        print(f"{which}, {name}: acc {result.acc}, acc_norm {result.acc_norm}, near ties {result.near_ties}")
        assert differ.sum() <= result.near_ties
    assert lm_eval_counts(directory, VALIDATION_SET, 1000, tmp_path) == dict(acc=result.acc, acc_norm=result.acc_norm)
