"""rollouts.jsonl: what the policy said while it was trained, a few responses every so many iterations."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from align_jax.errors import InputError
from align_jax.evals import results
from align_jax.rl.rollouts import Rollout

FILE = "rollouts.jsonl"


@dataclasses.dataclass(frozen=True)
class RolloutLogConfig:
  """How much is kept of what is said."""

  every: int = 10  # iterations; 0 keeps nothing
  rows: int = 8  # the first of a rollout, prompt by prompt

  def __post_init__(self):
    if self.every < 0 or self.rows < 1:
      raise InputError("rollouts.every must not be negative and rollouts.rows positive")


class RolloutLog:
  """Appends one line a response; `write` is called at every iteration and knows which are due.

  The first call says at which step the run begins or goes on: lines of that step and later ones, which
  a killed run has left, are dropped then.  Only the first process writes.
  """

  def __init__(self, folder: pathlib.Path, config: RolloutLogConfig):
    self._file, self._config = pathlib.Path(folder) / FILE, config
    self._started = False

  def write(self, step: int, rollout: Rollout, extra: Mapping[str, np.ndarray]):
    """Logs the first rows if `step` is due.

    Args:
      step: the iteration, as in metrics.jsonl.
      rollout: of B responses.
      extra: more columns, name -> [B]: "kl" (nats a response), "score"...
    """
    if jax.process_index() != 0 or not self._config.every:
      return
    if not self._started:
      self._drop(step)
      self._started = True
    if step % self._config.every:
      return
    rows = range(min(self._config.rows, len(rollout.texts)))
    lines = [json.dumps(results.to_json(_line(step, r, rollout, extra))) + "\n" for r in rows]
    with self._file.open("a") as file:
      file.write("".join(lines))

  def _drop(self, step: int):
    if self._file.exists():
      kept = [row for _, row in results.read_lines(self._file) if row["step"] < step]
      results.write_text(self._file, "".join(json.dumps(row) + "\n" for row in kept))


def _line(step: int, row: int, rollout: Rollout, extra: Mapping[str, np.ndarray]) -> dict[str, Any]:
  return {
    "step": step,
    "row": row,
    "prompt": list(rollout.prompts[row].prompt),
    "response": rollout.texts[row],
    "length": int(rollout.samples.lengths[row]),
    "finished": bool(rollout.samples.finished[row]),
    "scores": {name: float(values[row]) for name, values in rollout.scores.items()},
    **{name: float(values[row]) for name, values in extra.items()},
  }
