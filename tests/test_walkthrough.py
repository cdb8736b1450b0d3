"""walkthrough.ipynb runs from top to bottom, and its outputs are those of a run.

python tests/test_walkthrough.py    run it and write its outputs into the file; needed after each change to its code
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import matplotlib.font_manager  # noqa: F401  (it makes its cache here, rather than with a message in the notebook)
import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parent.parent / "walkthrough.ipynb"

# Cells whose output depends on the last bits of float32: text that is sampled, and details of the learned weights.
VARIABLE = {
    "first-sample",
    "neighbors",
    "trades",
    "interactive",
    "generate",
    "own-sample",
    "own-wandb",
    "own-evaluation",
}


def execute(path: Path) -> nbformat.NotebookNode:
    """Return the notebook with the outputs of a run of it, in its directory, by this Python, on the CPU."""
    notebook = nbformat.read(path, as_version=4)
    own = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))  # whatever kernels are installed
    client = NotebookClient(
        notebook,
        km=own,
        timeout=600,
        record_timing=False,
        coalesce_streams=True,
        resources=dict(metadata=dict(path=path.parent)),
    )
    client.execute(env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, cleanup_kc=True)
    notebook.metadata = dict(
        kernelspec=dict(display_name="Python 3", language="python", name="python3"),
        language_info=dict(name="python"),
        sha256=sha256(notebook),
    )
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def sha256(notebook: nbformat.NotebookNode) -> str:
    """Return the SHA-256 of the code and its outputs."""
    content = [[cell.source, cell.execution_count, cell.outputs] for cell in code_cells(notebook)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def kinds(cell: nbformat.NotebookNode) -> list[tuple]:
    """Return the kinds of a cell's outputs."""
    return [(output.output_type, output.get("name"), {*output.get("data", {})}) for output in cell.outputs]


def text(cell: nbformat.NotebookNode) -> str:
    """Return all outputs of a cell but its pictures."""
    return "".join(output.get("text", "") + output.get("data", {}).get("text/html", "") for output in cell.outputs)


def words_and_numbers(cell: nbformat.NotebookNode) -> tuple[str, list[float]]:
    """Return a cell's text without its numbers, and these. Of a run of train_gpt2.py, only the losses count."""
    content = text(cell)
    if cell.id == "own-run":
        content = "\n".join(re.findall(r"step \d+: (?:validation )?loss [\d.]+", content))
    number = r"\d[\d,]*(?:\.\d+)?"
    return re.sub(number, "#", content), [float(n.replace(",", "")) for n in re.findall(number, content)]


@pytest.fixture(scope="module")
def kept() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_notebook_runs_with_the_outputs_it_has(kept, tmp_path):
    for path in NOTEBOOK, NOTEBOOK.parent / "input.txt", *NOTEBOOK.parent.glob("*.py"):
        shutil.copy(path, tmp_path)
    for name in "assets", "runtime":
        shutil.copytree(NOTEBOOK.parent / name, tmp_path / name)
    before = {*tmp_path.rglob("*")}
    fresh = execute(tmp_path / NOTEBOOK.name)  # raises CellExecutionError where a component is not the module's
    assert all("__pycache__" in path.parts for path in {*tmp_path.rglob("*")} - before)

    assert VARIABLE < {cell.id for cell in code_cells(kept)}
    trained = False  # from there on, results are equal but for the order of float32's sums
    for now, then in zip(code_cells(fresh), code_cells(kept), strict=True):
        assert kinds(now) == kinds(then), then.source
        trained |= ".backward()" in then.source
        if not trained:
            assert text(now) == text(then), then.source
        elif then.id not in VARIABLE:
            (words, numbers), (old_words, old_numbers) = words_and_numbers(now), words_and_numbers(then)
            assert words == old_words, then.source
            assert numbers == pytest.approx(old_numbers, rel=0.03, abs=0.02), then.source


def test_notebook_outputs_are_those_of_its_code(kept):
    assert kept.metadata.get("sha256") == sha256(kept), "run python tests/test_walkthrough.py, which renews it"
    assert [cell.execution_count for cell in code_cells(kept)] == [*range(1, len(code_cells(kept)) + 1)]


def test_notebook_holds_its_plots_and_no_outside_reference(kept):
    for cell in code_cells(kept):
        pictures = sum("image/png" in output.get("data", {}) for output in cell.outputs)
        assert pictures == cell.source.count("plt.subplots(") + cell.source.count("Image("), cell.source
        assert not any(output.get("name") == "stderr" for output in cell.outputs)
        assert not re.search(r"https?:|//cdn|import\(|@import|(^|[\s\"'(])(/|[A-Z]:\\)\w+/", text(cell))
        assert "execution" not in cell.metadata
    assert NOTEBOOK.stat().st_size < 1.5e6


def test_interactive_figure_holds_attention_patterns(kept):
    (html,) = [text(cell) for cell in code_cells(kept) if "<script>" in text(cell)]
    data = json.loads(re.search(r"= (\{.*\});\n", html)[1])
    n = len(data["words"])
    for pattern in (pattern for layer in data["patterns"] for pattern in layer):
        assert len(pattern) == n and all(len(row) == n for row in pattern)
        for i, row in enumerate(pattern):
            assert sum(row) == pytest.approx(1000, abs=n / 2) and not any(row[i + 1 :])
    assert max(row[i - 1] for layer in data["patterns"] for p in layer for i, row in enumerate(p) if i > 5) > 500


if __name__ == "__main__":
    nbformat.write(execute(NOTEBOOK), NOTEBOOK)
