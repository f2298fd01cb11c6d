"""Every notebook runs from top to bottom, on fewer steps and records, and ships without outputs."""

import pathlib

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

# Run behind the cell that reads a config: tokenising and scoring its records takes longer than the steps.
FEWER_RECORDS = """
import re

def fewer_records(section):
  for name, value in section.items():
    if isinstance(value, str):
      section[name] = re.sub("^microworld:n=[0-9]+", "microworld:n=128", value)
    elif hasattr(value, "items"):
      fewer_records(value)

fewer_records(SETTINGS)
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs_and_draws(path, monkeypatch):
  monkeypatch.setenv("ALIGN_JAX_NOTEBOOK_STEPS", "0.02")
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  notebook = nbformat.read(path, as_version=4)
  assert notebook.cells[0].cell_type == "markdown" and "colab" in notebook.cells[0].source
  assert not any(cell.get("outputs") for cell in notebook.cells), "strip the outputs"
  fewer = nbformat.v4.new_code_cell(FEWER_RECORDS)
  notebook.cells = [
    c for cell in notebook.cells for c in [cell] + [fewer] * ("get_config()" in cell.source)
  ]
  client = nbclient.NotebookClient(
    notebook, timeout=900, resources={"metadata": {"path": str(FOLDER.parent)}}
  )
  client.execute()
  outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
  assert sum("image/png" in o.get("data", {}) for o in outputs) >= 4
  assert not any(o.output_type == "error" for o in outputs)


def test_there_are_notebooks():
  assert NOTEBOOKS
