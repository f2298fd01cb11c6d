"""The command's exit status: 2 and one sentence for wrong settings, 1 where runs failed."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def sweep(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "experiments.sweep", *arguments],
    cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
  )  # fmt: skip


def test_a_wrong_setting_is_one_sentence_and_status_2(tmp_path):
  done = sweep(f"--workdir={tmp_path / 'run'}", "--config.variants.dpo.objective.beta=-1.0")
  assert done.returncode == 2
  assert done.stderr.startswith("error: variant 'dpo': ")
  assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_runs_that_failed_make_the_status_1_and_stand_in_the_table(tmp_path):
  for name in ("dpo", "kto"):
    folder = tmp_path / name / "seed4"
    folder.mkdir(parents=True)
    failure = {"state": "diverged", "reason": "the loss is nan at step 7"}
    (folder / "failure.json").write_text(json.dumps(failure))
  config = tmp_path / "two.py"
  config.write_text(
    "from configs import sweep\n\n\ndef get_config():\n"
    "  config = sweep.get_config()\n"
    "  for name in set(config.variants) - {'dpo', 'kto'}:\n    del config.variants[name]\n"
    "  return config\n"
  )
  done = sweep(f"--config={config}", f"--workdir={tmp_path}", "--config.seeds=(4,)")
  assert done.returncode == 1, done.stderr
  assert "0 of 2 runs finished, 2 failed" in done.stdout
  assert "kto seed 4 diverged: the loss is nan at step 7" in (tmp_path / "sweep.md").read_text()
