"""How every script ends: by Ctrl-C, in narrow encodings, on closed and full streams, with a reader that ends early."""

import os
import shutil
import signal
import subprocess

import pytest

from conftest import ENVIRONMENT, ROOT, command, perturbed
from model import GPTConfig

RECORDS = ROOT / "tests/data/hellaswag_100.jsonl"

# By script: a quick command, whose output is not all ASCII where possible, its status, and one that works for longer
# after its first output.
SCRIPTS = {
    "sample.py": (
        "--model model --device cpu --max_new_tokens 5 --num_samples 3 --prompt Straße☃",
        0,
        "--model model --device cpu --max_new_tokens 100000 --prompt x",
    ),
    "hellaswag.py": (
        "--model_type model --data records.jsonl --limit 2",
        0,
        "--model_type model --data records.jsonl --batch_tokens 1",
    ),
    "evaluate.py": ("--model model --data größe☃.txt --limit 2", 0, "--model model --data größe☃.txt --batch_tokens 1"),
    "plot.py": ("größe☃ --out größe☃.png", 0, "--check größe☃"),
    "bench.py": ("größe☃", 2, "generate --device cpu"),
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A directory with a model, HellaSwag records and a run's log."""
    here = tmp_path_factory.mktemp("scripts")
    perturbed(GPTConfig(block_size=256, n_layer=2, n_head=2, n_embd=32), std=0.2).save_pretrained(here / "model")
    (here / "records.jsonl").write_text(RECORDS.read_text() * 10)
    (here / "größe☃.txt").write_text("Straße☃ " * 20000)
    shutil.copytree(ROOT / "assets/reference/tiny/seed-1", here / "größe☃")
    return here


def interrupt(process: subprocess.Popen) -> None:
    """Wait for its first output, press Ctrl-C, and check that it ends as it should."""
    said = process.stdout.read(1)
    os.killpg(process.pid, signal.SIGINT)
    said += process.communicate(timeout=60)[0]
    assert process.returncode == 130 and b"Traceback" not in said and b"Exception" not in said, said.decode()


def start(line: list[str], cwd, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        line, cwd=cwd, env=ENVIRONMENT | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_interrupt_during_imports(tmp_path, script):
    for module in "numpy", "torch":
        (tmp_path / f"{module}.py").write_text("import time\nprint('importing')\ntime.sleep(60)\n")
    interrupt(start(command(script), tmp_path, PYTHONPATH=str(tmp_path)))


@pytest.mark.parametrize("script", SCRIPTS)
def test_interrupt_during_work(here, script):
    interrupt(start(command(script, *SCRIPTS[script][2].split()), here))


@pytest.mark.parametrize(
    "encoding, redirection, status, script",
    [
        *(("ascii", "2>&-", None, script) for script in SCRIPTS),
        ("utf-8", ">&-", None, "sample.py"),
        ("utf-8", ">/dev/full", 4, "plot.py"),
        ("utf-8", ">/dev/full", 4, "hellaswag.py"),
        ("cp1252", "| head -1", 0, "bench.py"),
    ],
)
def test_output_streams(here, encoding, redirection, status, script):
    flags, quick, _ = SCRIPTS[script]
    if status is not None and quick:  # its quick command prints nothing on stdout
        flags, quick = "--help", 0
    line = ["bash", "-c", f'"$@" {redirection}; exit ${{PIPESTATUS[0]}}', "bash", *command(script, *flags.split())]
    done = subprocess.run(
        line, cwd=here, env=ENVIRONMENT | dict(PYTHONIOENCODING=encoding), capture_output=True, timeout=120
    )
    error = done.stderr.decode(encoding)
    assert done.returncode == (quick if status is None else status), error
    lines = [text for text in error.splitlines() if text.strip() and "%|" not in text]  # of a progress bar
    assert len(lines) == (done.returncode != 0 and redirection != "2>&-"), error
    if status == 4:
        assert lines == [f"{script}: error: standard output: No space left on device"]


def test_clone_with_windows_line_ends_is_the_same(tmp_path):
    """Compare what is hashed: the tokenizer, the reference logs and the text."""
    subprocess.run(
        ["git", "clone", "--quiet", "--depth", "1", "-c", "core.autocrlf=true", f"file://{ROOT}", tmp_path / "clone"],
        check=True,
    )
    files = [p for p in [ROOT / "input.txt", *(ROOT / "assets").rglob("*")] if p.is_file()]
    assert len(files) > 10
    assert [p for p in files if (tmp_path / "clone" / p.relative_to(ROOT)).read_bytes() != p.read_bytes()] == []
