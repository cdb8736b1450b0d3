"""walkthrough.ipynb runs from top to bottom, and what it keeps is what a run of it has written.

python tests/test_walkthrough.py    run it and write its outputs into the file, as is due after each change to it
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import matplotlib.font_manager  # noqa: F401  (it makes its cache now, and not with a word about it in the notebook)
import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parent.parent / "walkthrough.ipynb"


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run of it, in its directory, by this Python, on the CPU."""
    notebook = nbformat.read(path, as_version=4)
    own = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))  # whatever kernels are installed
    client = NotebookClient(
        notebook,
        km=own,
        timeout=300,
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
    """Of the code and its outputs."""
    content = [[cell.source, cell.execution_count, cell.outputs] for cell in code_cells(notebook)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def kinds(cell: nbformat.NotebookNode) -> list[tuple]:
    """What a cell has put out, but for the content."""
    return [(output.output_type, output.get("name"), {*output.get("data", {})}) for output in cell.outputs]


def text(cell: nbformat.NotebookNode) -> str:
    """All that a cell has put out, but for pictures."""
    return "".join(output.get("text", "") + output.get("data", {}).get("text/html", "") for output in cell.outputs)


@pytest.fixture(scope="module")
def kept() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_runs_as_it_is_kept_and_leaves_nothing_behind(kept, tmp_path):
    for path in NOTEBOOK, NOTEBOOK.parent / "input.txt", *NOTEBOOK.parent.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(NOTEBOOK.parent / "assets", tmp_path / "assets")
    before = {*tmp_path.rglob("*")}
    fresh = execute(tmp_path / NOTEBOOK.name)  # raises CellExecutionError where a component is not the module's
    assert all("__pycache__" in path.parts for path in {*tmp_path.rglob("*")} - before)

    trained = False  # from there on, the last bits of float32 decide
    for now, then in zip(code_cells(fresh), code_cells(kept), strict=True):
        assert kinds(now) == kinds(then), then.source
        trained |= ".backward()" in then.source
        assert trained or text(now) == text(then), then.source


def test_what_it_keeps_is_what_a_run_wrote(kept):
    assert kept.metadata.get("sha256") == sha256(kept), "run python tests/test_walkthrough.py, which renews it"
    assert [cell.execution_count for cell in code_cells(kept)] == [*range(1, len(code_cells(kept)) + 1)]


def test_plots_are_in_the_file_and_nothing_that_is_elsewhere(kept):
    for cell in code_cells(kept):
        pictures = sum("image/png" in output.get("data", {}) for output in cell.outputs)
        assert pictures == cell.source.count("plt.subplots(") + cell.source.count("Image("), cell.source
        assert not any(output.get("name") == "stderr" for output in cell.outputs)
        assert not re.search(r"https?:|//cdn|import\(|@import|(^|[\s\"'(])(/|[A-Z]:\\)\w+/", text(cell))
        assert "execution" not in cell.metadata
    assert NOTEBOOK.stat().st_size < 1.5e6


def test_the_interactive_figure_holds_the_patterns(kept):
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
