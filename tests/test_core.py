"""CORE compared with a loop over one record at a time, which renders by jinja2 and predicts by `transformers`."""

from errors import run_script
import http.server
import json
import os
import random
import shutil
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from jinja2 import Template
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

import core
import evaluate
from conftest import ROOT, launcher, perturbed
from model import GPTConfig
from runtime.distributed import Distributed
from scoring import Scorer
from tokens import END_OF_TEXT, gpt2_tokenizer

# Three tasks of eight records: a question and choices; a beginning, two ways to go on, and the end; a text and its end.
TEXTS = dict(
    questions="Where does the ferry stop?~at the old pier~at the old mill~by the sea / Who rang?~Ada~the son of Ada / "
    "What is <|endoftext|>? ~the end~the start~a bird / How do you dry a boot?~Fill it with paper.~Fill it with tea. / "
    "  Which café is open?~one by a park~one by a bridge~none / Why so\u2028late?\x85~snow on the line~snow  on a roof / "
    "What is\nin the box?~ten nails~a clock~ten screws / When does the shop close?~at six~at seven~at eight~never",
    pronouns="The jug hit the table as the~jug~table~was loose. / ~Rain~The long rain~made the path hard. / Tom called Max"
    ", but ~Tom~Max~did not hear it. / The goat ran from the dog as the~goat~dog~was tired of it. / The cup is not in the "
    "bag, as the~cup~bag~is too small. / The fox saw the hen before the~fox~hen~could run. / Anna thanked Eve since ~Anna~"
    "Eve~had found the lost key. / The nurse met the boy when the~nurse~tall boy~came out.",
    endings="The baker opened the oven and took out the~bread /   In the morning the lake was covered with\n~a thin mist / "
    "She counted the coins and put them into her ~purse / The postman ran away from the dog to the~gate / A kite hung in a"
    "~tree / He walked back to the~station / The café was ~closed / They rowed until dark and slept under the~boat",
)
MAKE = dict(
    questions=lambda i, query, *choices: dict(query=query, choices=choices, gold=i % 2),
    pronouns=lambda i, start, a, b, end: dict(context_options=[start + a, start + b], continuation=end, gold=i % 2),
    endings=lambda i, context, end: dict(context=context, continuation=end),
)
TASKS = [
    dict(label="questions", icl_task_type="multiple_choice", num_fewshot=[0], dataset_uri="some/questions.jsonl"),
    dict(label="pronouns", icl_task_type="schema", num_fewshot=[3], dataset_uri="some/pronouns.jsonl"),
    dict(label="endings", icl_task_type="language_modeling", num_fewshot=[2], dataset_uri="some/endings.jsonl"),
]
TASKS[2]["continuation_delimiter"] = "\nSo it is:"
BASELINES = "Eval Task,Category,Random baseline\nquestions,,31.25\npronouns,,50\nendings,,0\n"
TEMPLATE = "{%% for s in shots %%}{{ %s }}{{ by }}{{ %s }}\n\n{%% endfor %%}{{ %s }}{{ by }}{{ %s }}"
TEMPLATES = dict(
    multiple_choice=TEMPLATE % ("s.query", "s.choices[s.gold]", "record.query", "option"),
    schema=TEMPLATE % ("s.context_options[s.gold]", "s.continuation", "option", "record.continuation"),
    language_modeling=TEMPLATE % ("s.context | trim", "s.continuation", "record.context | trim", "option"),
)


def sequences(task, records, i):
    """The sequences of one of the shuffled records, and how many of each one's last tokens are scored."""
    record, kind, by = records[i], task["icl_task_type"], task.get("continuation_delimiter", " ")
    others = [other for j, other in enumerate(records) if j != i]
    shots = random.Random(1234 + i).sample(others, task["num_fewshot"][0])
    options = record.get("choices") or record.get("context_options") or ["", record["continuation"]]
    texts = [Template(TEMPLATES[kind]).render(shots=shots, record=record, by=by, option=o) for o in options]
    if kind == "language_modeling":
        texts[0] = texts[0].strip()
    rows = [[END_OF_TEXT, *gpt2_tokenizer().encoding.encode_ordinary(text)] for text in texts]
    same = len(os.path.commonprefix([row[::-1] for row in rows] if kind == "schema" else rows))
    if kind == "language_modeling":
        assert len(rows.pop(0)) == same
    return [(row, same if kind == "schema" else len(row) - same) for row in rows]


@torch.inference_mode()
def is_right(hf, task, records, i):
    losses = []
    for row, n in sequences(task, records, i):
        row = torch.tensor(row[-hf.config.n_positions :])
        logits = hf(row[None]).logits[0, :-1][-n:]
        losses.append(F.cross_entropy(logits, row[-n:]).item())
    if task["icl_task_type"] == "language_modeling":
        return torch.equal(logits.argmax(1), row[-n:])
    return losses.index(min(losses)) == records[i]["gold"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """For several contexts a model, its directory, a bundle's, each task's shuffled records, and which are right."""
    launcher()  # starts meanwhile
    prepared = {}
    for block_size in 128, 45, 11:
        directory = tmp_path_factory.mktemp("core")
        bundle = directory / "eval_bundle"
        model = perturbed(GPTConfig(block_size, n_layer=2, n_head=2, n_embd=32), std=0.3)
        model.save_pretrained(directory / "model")
        hf = GPT2LMHeadModel.from_pretrained(directory / "model").eval()
        (bundle / "eval_data/some").mkdir(parents=True)
        (bundle / "core.yaml").write_text(yaml.dump(dict(icl_tasks=TASKS)))
        (bundle / "eval_meta_data.csv").write_text(BASELINES)
        records, right = {}, {}
        for task in TASKS:
            label = task["label"]
            made = [MAKE[label](i, *text.split("~")) for i, text in enumerate(TEXTS[label].split(" / "))]
            records[label] = [*made]
            random.Random(1337).shuffle(records[label])
            # Some of the last task's end as the model would, and 6 only begins so. None is a shot of those before it.
            for i in (6, 4, 1, 2, 7) if label == "endings" else ():
                ((row, n),) = sequences(task, records[label], i)
                tokens = model.generate(torch.tensor([row[:-n][2 - block_size :]]), 2, temperature=0)[0, -2:]
                records[label][i]["continuation"] = gpt2_tokenizer().encoding.decode(tokens.tolist()) + " Lisbon" * (
                    i == 6
                )
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in made]
            (bundle / "eval_data" / task["dataset_uri"]).write_text("".join(lines), encoding="utf-8")
            right[label] = [is_right(hf, task, records[label], i) for i in range(8)]
        prepared[block_size] = model, directory / "model", bundle, records, right
    return prepared


@pytest.mark.parametrize(
    "block_size, batch_tokens, limit",
    [(128, 1, 7), (128, 300, None), (128, 10**5, None), (45, 300, None), (11, 300, None)],
)
def test_counts_equal_the_baseline(prepared, block_size, batch_tokens, limit):
    model, _, bundle, _, right = prepared[block_size]
    n, counts = limit or 8, [sum(some[:limit]) for some in right.values()]
    assert all(0 < count < n for count in counts)
    found = core.evaluate(Scorer(model, batch_tokens, Distributed()), bundle, limit)
    assert [(r.total, r.n) for r in found[:-1:2]] == [(count, n) for count in counts]
    centered = [(c / n - b) / (1 - b) for c, b in zip(counts, (0.3125, 0.5, 0), strict=True)]
    assert [r.value for r in (*found[1::2], found[-1])] == pytest.approx([*centered, sum(centered) / 3])


def test_prompts_equal_those_of_jinja2(prepared):
    _, _, bundle, records, _ = prepared[128]
    lengths = []
    for task in core.read_tasks(bundle):
        for delimiter in task["delimiter"], " ", "\n\nAnswer: ":
            task |= dict(continuation_delimiter=delimiter, delimiter=delimiter)
            expected = [sequences(task, records[task["label"]], i) for i in range(8)]
            for i in range(8):
                found = [([*e.context, *c], len(c)) for e in core.render(task, i) for c in e.continuations]
                assert found == expected[i]
            lengths += [max(len(row) for row, _ in some) for some in expected]
    assert all(0 < sum(n > block_size for n in lengths) < len(lengths) for block_size in (45, 11))  # some are cut


def test_two_ranks_find_what_one_finds(prepared, tmp_path):
    _, path, bundle, _, right = prepared[128]
    flags = "--tasks", "core", "--model", path, "--device", "cpu", "--core_dir"
    assert run_script(evaluate.main, [*map(str, (*flags, bundle, "--json", tmp_path / "one.json"))]) == 0
    two_ranks = partial(launcher().launch, *flags, ranks=2, script=ROOT / "evaluate.py")
    two_ranks(bundle, "--json", tmp_path / "two.json")
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one == two and [r["total"] for r in one["tasks"]["core"]["results"][:-1:2]] == [*map(sum, right.values())]
    damaged = shutil.copytree(bundle, tmp_path / "bundle") / "eval_data/some/questions.jsonl"
    damaged.write_text("{}")
    err = two_ranks(tmp_path / "bundle", status=2).stderr
    assert err.startswith("evaluate.py: error: CORE's questions, record ") and err.count("\n") == 1


DAMAGED = [  # a file, what is replaced in it (or the file goes), and words of the message
    ("core.yaml", None, None, "core.yaml"),
    ("core.yaml", "schema", "essay", "pronouns 'essay'"),
    ("eval_meta_data.csv", "pronouns", "x", "eval_meta_data.csv pronouns"),
    ("eval_data/some/endings.jsonl", "}\n", "\n", "some/endings.jsonl"),
    ("eval_data/some/questions.jsonl", "query", "q", "questions record 'query'"),
    ("eval_data/some/questions.jsonl", "gold", "g", "questions record 'gold'"),
]


@pytest.mark.parametrize("name, old, new, words", DAMAGED)
def test_a_damaged_bundle_is_one_line(prepared, tmp_path, capsys, name, old, new, words):
    _, model, bundle, _, _ = prepared[128]
    damaged = shutil.copytree(bundle, tmp_path / "bundle") / name
    text = damaged.read_text(encoding="utf-8")
    damaged.write_text(text.replace(old, new, 1), encoding="utf-8") if old else damaged.unlink()
    flags = "--tasks", "core", "--core_dir", tmp_path / "bundle", "--model", model, "--device", "cpu"
    status = run_script(evaluate.main, [*map(str, flags)])
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.strip() and "%|" not in line]  # of a progress bar
    assert status == 2 and not out and line.startswith("evaluate.py: error: ")
    assert all(word in line for word in words.split())


def test_the_bundle_is_downloaded_once(prepared, tmp_path, monkeypatch):
    bundle = prepared[128][2]
    shutil.make_archive(tmp_path / "eval_bundle", "zip", bundle.parent, bundle.name)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(core, "URL", f"http://127.0.0.1:{server.server_port}/eval_bundle.zip")
        found = core.find_bundle(tmp_path / "data")
        server.shutdown()
    assert found == tmp_path / "data/eval_bundle" == core.find_bundle(tmp_path / "data")  # without the server
    assert sorted(p.relative_to(found) for p in found.rglob("*")) == sorted(
        p.relative_to(bundle) for p in bundle.rglob("*")
    )
    with pytest.raises(core.UserError, match="other/eval_bundle.zip, and it could not be downloaded") as error:
        core.find_bundle(tmp_path / "other")
    assert error.value.status == 4


@pytest.mark.parametrize("damage", ["no zip", "half", "wrong bytes"])
def test_a_broken_zip_is_one_error(prepared, tmp_path, damage):
    path = Path(shutil.make_archive(tmp_path / "eval_bundle", "zip", prepared[128][2].parent, "eval_bundle"))
    content = path.read_bytes()
    i = content.index(b"questions.jsonl") + 40  # of its compressed content
    wrong = content[:i] + bytes(20) + content[i + 20 :]
    path.write_bytes({"no zip": b"<html>", "half": content[: len(content) // 2]}.get(damage, wrong))
    for _ in range(2):  # again: what has been unpacked before the error does not count as the bundle
        with pytest.raises(core.UserError, match="eval_bundle.zip: cannot be read as a zip file") as error:
            core.find_bundle(tmp_path)
        assert error.value.status == 2
