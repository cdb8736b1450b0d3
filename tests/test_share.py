"""A checkpoint that is uploaded as it is: its model card, its tokenizer.json, and what converters look for."""

import json
import re
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.cli import hf as cli
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from tokenizers import Tokenizer

from conftest import BOOKS_TEXT, ENVIRONMENT, ROOT, SMALL, read_log, run_in_process
from runtime.checkpoint import verify
from runtime.model_card import model_card
from tokens import gpt2_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("share")
    (directory / "text.txt").write_text(BOOKS_TEXT.read_text()[:8000])
    run_in_process(*SMALL, "--data", directory / "text.txt", "--log_dir", directory / "log")
    return directory / "log/step_000008"


def test_model_card_is_one_of_the_hub_s(checkpoint):
    card = ModelCard.load(checkpoint / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.license is None and "\n# license: fill in" in (checkpoint / "README.md").read_text()
    for step in 0, 4, 8:
        val, bpb = (float(read_log(checkpoint.parent, name)[step]) for name in ("val", "bpb"))
        assert f"| {step} | {val:.4f} | {bpb:.4f} |  |" in card.text
    assert "Trained, on 2,048 tokens of `text.txt`" in card.text
    options = json.loads(re.search(r"```json\n(.*?)```", card.text, re.DOTALL)[1])
    config = json.loads((checkpoint / "checkpoint.json").read_text())["config"]
    assert options == config | dict(data="text.txt", log_dir="log", resume="")  # no path of this machine
    assert str(checkpoint.parent.parent) not in card.content


def test_model_card_of_a_fine_tuned_model_with_hellaswag():
    config = dict(
        init_from="a/gpt2", data="x/y", resume=None, log_dir="z", total_batch_size=100, n_layer=1, n_head=2, n_embd=3
    )
    card = model_card(dict(step=50, config=config), b"0 train 3.5\n50 val 3.25\n50 bpb 1\n50 hella 0.3\n")
    assert "Fine-tuned from a/gpt2, on 5,000 tokens of `y`" in card and "| 50 | 3.2500 | 1.0000 | 0.3000 |" in card


def test_tokenizer_json_equals_the_other_files(checkpoint):
    text = BOOKS_TEXT.read_text()[:50_000] + "Straße ☃ 🙂\n\n\n  x"
    theirs = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert theirs.encode(text).ids == gpt2_tokenizer().encode(text).tolist()
    assert theirs.encode("a<|endoftext|>b").ids == [64, 50256, 65] and theirs.decode([15496, 11]) == "Hello,"


def test_gguf_knows_every_tensor(checkpoint):
    """llama.cpp's converter is not on the package index; gguf, with which it names tensors, is."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, n_blocks=2)
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        unknown = [name for name in file.keys() if names.get_name(name, (".weight", ".bias")) is None]
    assert unknown == []


def test_tensorboard_recipe_as_printed(checkpoint):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/share.md").read_text(), re.DOTALL)[1]
    log = checkpoint.parent
    subprocess.run([sys.executable, "-c", code], cwd=log.parent, env=ENVIRONMENT, check=True, timeout=120)
    events = EventAccumulator(str(log / "tensorboard")).Reload()
    found = {event.step: event.value for event in events.Scalars("loss")}
    assert found == pytest.approx({step: float(loss) for step, loss in read_log(log).items()}, rel=1e-6)


def test_notebook_images_keep_their_packages():
    """The line for Colab installs nothing where all packages are there, in whatever version."""
    page = (ROOT / "docs/gpu.md").read_text()
    line = re.search(r"^!(sed .*\| xargs) pip install (.*)$", page, re.MULTILINE)
    pip = f"{sys.executable} -m pip install {line[2].replace('--quiet', '')} --dry-run --no-index"
    done = subprocess.run(
        ["bash", "-euc", f"{line[1]} {pip}"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    names = [line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line]
    assert done.returncode == 0 and "Would install" not in done.stdout and "==" not in done.stdout.split("(")[0]
    for name in names:
        assert re.search(rf"already satisfied: {name} in", done.stdout, re.IGNORECASE), done.stdout


def test_command_of_the_docs_uploads_what_others_need(checkpoint):
    command = re.search(r"^hf upload (.*)$", (ROOT / "docs/share.md").read_text(), re.MULTILINE)[1]
    upload = cli.app.get_command(None, "upload").materialize()
    options = upload.make_context("upload", command.split()).params
    assert options["repo_id"] == "USER/NAME" and options["local_path"] == "log/step_000550"
    assert options["path_in_repo"] is None
    excluded = options["exclude"]
    files = [p.name for p in checkpoint.iterdir()]
    left = set(filter_repo_objects(files, ignore_patterns=excluded))
    assert set(files) - left == {"trainer_state.pt", "checkpoint.json"}
    assert not any(str(checkpoint.parent.parent).encode() in (checkpoint / name).read_bytes() for name in left)


def test_completed_card_does_not_hinder_a_resume(checkpoint):
    """Its license is for the reader to fill in."""
    card = checkpoint / "README.md"
    card.write_text(card.read_text().replace("# license: fill in, for example mit", "license: mit"))
    assert ModelCard.load(card).data.license == "mit"
    verify(checkpoint)
