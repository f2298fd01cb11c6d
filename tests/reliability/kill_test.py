"""SIGKILL at random moments of real runs: what comes out is what an uninterrupted run gives, bit for bit.

ALIGN_JAX_KILLS=20 kills so many times in all (default 6), over SFT, DPO and PPO.
"""

import os
import random
import signal

import numpy as np
import pytest

KILLS = int(os.environ.get("ALIGN_JAX_KILLS", "6"))
PHASES = ("sft", "dpo", "ppo")
SITES = ("save", "step", "data", "line", "end", "start", "rollout")


def bombs(phase: str, every: int) -> list[dict]:
  """Where this phase's share of the kills happens: every site in turn, at a random passage of it."""
  rng = random.Random(f"bombs of {phase}")
  share = len(range(PHASES.index(phase), KILLS, len(PHASES)))
  sites = [site for site in SITES if site != "rollout" or phase == "ppo"]
  first = rng.randrange(len(sites))
  chosen = [sites[(first + i) % len(sites)] for i in range(share)]
  most = {"save": 2, "start": 1, "end": 1}
  return [
    {
      "site": site,
      "count": rng.randint(1, most.get(site, every + 1)),
      "delay": rng.choice((0.0, rng.uniform(0, 0.5))) if site in ("save", "step", "start") else 0.0,
    }
    for site in chosen
  ]


@pytest.mark.parametrize("phase", PHASES)
def test_killed_and_resumed_is_as_good_as_uninterrupted(runner, whole, tmp_path, phase):
  reference, folder = whole(phase), tmp_path / "run"
  for bomb in bombs(phase, runner.every):
    status = runner.run(phase, reference.config, folder, bomb=bomb)
    # A bomb beyond the end of what was left to do does not go off.
    assert status in (-signal.SIGKILL, 0), runner.said(folder)
  assert runner.run(phase, reference.config, folder) == 0, runner.said(folder)
  assert "Traceback" not in runner.said(folder)
  ours, theirs = runner.state_of(folder), runner.state_of(reference.folder)
  assert ours.keys() == theirs.keys()
  for name, x in theirs.items():
    np.testing.assert_array_equal(ours[name], x, err_msg=name)
  assert runner.lines_of(folder) == runner.lines_of(reference.folder)
  steps = [line["step"] for line in runner.lines_of(folder) if "loss" in line]
  assert steps == list(range(runner.steps))
  said_there = runner.lines_of(reference.folder, "rollouts.jsonl")
  assert runner.lines_of(folder, "rollouts.jsonl") == said_there and bool(said_there) == (
    phase == "ppo"
  )
