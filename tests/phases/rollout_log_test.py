"""The log of rollouts: which responses, with what beside them, and each once however the run went."""

import json
import math
import types

import jax
import numpy as np
import pytest

from align_jax import data, sampling
from align_jax.errors import InputError
from align_jax.phases import rollout_log
from align_jax.phases.rollout_log import RolloutLog, RolloutLogConfig

ROWS = 4


def rollout(step):
  """Four responses of one to four tokens, said at a step."""
  lengths = np.arange(1, ROWS + 1)
  mask = np.arange(6) < lengths[:, None] + 1
  mask[:, 0] = False  # the prompt
  samples = sampling.Samples(
    tokens=np.ones((ROWS, 6), np.int32),
    prompt_lengths=np.ones(ROWS, np.int32),
    response_mask=mask,
    logprobs=np.zeros((ROWS, 6), np.float32),
    finished=lengths % 2 == 1,
  )
  prompts = [data.Prompt(({"role": "user", "content": f"question {r}"},)) for r in range(ROWS)]
  return types.SimpleNamespace(
    prompts=prompts,
    texts=[f"answer {r} of step {step}\u2028" for r in range(ROWS)],
    samples=samples,
    scores={"gold": np.float32([0.5, 1.5, math.nan, 3.5]), "format": np.ones(ROWS)},
  )


def write(folder, steps, **settings):
  log = RolloutLog(folder, RolloutLogConfig(**settings))
  for step in steps:
    log.write(step, rollout(step), {"kl": np.arange(ROWS) + 0.25, "score": np.zeros(ROWS)})


def lines(folder):
  return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().split("\n")[:-1]]


def test_a_line_says_all_about_a_response(tmp_path):
  write(tmp_path, [0], every=1, rows=3)
  found = lines(tmp_path)
  assert found[1] == {
    "step": 0,
    "row": 1,
    "prompt": [{"role": "user", "content": "question 1"}],
    "response": "answer 1 of step 0\u2028",
    "length": 2,
    "finished": False,
    "scores": {"gold": 1.5, "format": 1.0},
    "kl": 1.25,
    "score": 0.0,
  }
  assert found[2]["scores"]["gold"] is None  # JSON has no NaN


def test_every_so_many_steps_the_first_rows(tmp_path):
  write(tmp_path, range(8), every=3, rows=2)
  assert [(x["step"], x["row"]) for x in lines(tmp_path)] == [
    (step, row) for step in (0, 3, 6) for row in (0, 1)
  ]


def test_a_small_rollout_is_logged_whole(tmp_path):
  write(tmp_path, [0], rows=100)
  assert len(lines(tmp_path)) == ROWS


@pytest.mark.parametrize("resumed_at", [0, 3, 4, 6, 7])
def test_a_resumed_run_repeats_no_line(tmp_path, resumed_at):
  """Killed while it wrote a line at step 6, resumed from a checkpoint before that."""
  (tmp_path / "whole").mkdir(), (tmp_path / "killed").mkdir()
  write(tmp_path / "whole", range(10), every=3)
  write(tmp_path / "killed", range(7), every=3)
  file = tmp_path / "killed" / "rollouts.jsonl"
  file.write_text(file.read_text() + '{"step": 6, "row": 4, "prom')
  write(tmp_path / "killed", range(resumed_at, 10), every=3)
  assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


def test_off_and_other_processes_write_nothing(tmp_path, monkeypatch):
  write(tmp_path, range(3), every=0)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  write(tmp_path, range(3), every=1)
  assert not (tmp_path / rollout_log.FILE).exists()


@pytest.mark.parametrize("settings", [{"every": -1}, {"rows": 0}])
def test_nonsense_is_refused(settings):
  with pytest.raises(InputError, match="rollouts.every"):
    RolloutLogConfig(**settings)
