"""The command prints what training sees, or one sentence."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def inspect(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "experiments.inspect_data", "--tokenizer=microworld", *arguments],
    cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
  )  # fmt: skip


def test_examples_and_counts_are_printed(tmp_path):
  path = tmp_path / "pairs.jsonl"
  rows = [{"question": "please", "chosen": "tower.", "rejected": "cake.", "margin": 2}] * 3
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  done = inspect(f"--path={path}", "--format=preference", "--columns=prompt=question", "--n=1")
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("──") == 2 and "margin 2" in done.stdout
  assert "⟦tower. <|end|>⟧" in done.stdout and "⟦cake. <|end|>⟧" in done.stdout
  assert "3 records, 6 sequences" in done.stdout


def test_a_bad_row_is_one_sentence_and_status_2(tmp_path):
  path = tmp_path / "pairs.jsonl"
  path.write_text('{"prompt": "a", "chosen": "b"}\n')
  done = inspect(f"--path={path}", "--format=preference")
  assert done.returncode == 2
  assert done.stderr.startswith(f"error: {path}:1: field 'rejected' is missing")
  assert "Traceback" not in done.stderr
