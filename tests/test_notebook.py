"""The notebook runs from its first cell to its last, on a tiny planted shop."""

import json

import pytest

TINY = {
    "data.planted.num_users": 60,
    "data.planted.num_items": 40,
    "data.k_core": 1,
    "data.max_length": 4,
    "model.dim": 8,
    "model.num_layers": 1,
    "teacher.num_codes": 8,
    "teacher.num_splits": 4,
    "teacher.num_pairs": 500,
    "train.batch_size": 80,
    "train.epochs": 2,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own libraries
def test_the_notebook_trains_and_shows_metrics(repository, tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("KDSR_NOTEBOOK_WORKDIR", str(tmp_path / "run"))
    monkeypatch.setenv("KDSR_NOTEBOOK_SETTINGS", " ".join(f"--config.{name}={value}" for name, value in TINY.items()))
    monkeypatch.setenv("KDSR_NOTEBOOK_DATA", "")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    notebook = nbformat.read(repository / "experiments" / "colab.ipynb", as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(repository)}})
    client.execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert f"mrr@20       {result['test']['mrr@20']:8.4f} %" in printed and result["device"] in printed
