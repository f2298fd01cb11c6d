"""A sweep of online runs of a tiny model: one reward model for all, and collapse that is noticed."""

import json

import pytest

from align_jax import app
from align_jax.evals import dashboard
from align_jax.phases import sweep
from configs import online_sweep

WORLD, HELD_OUT = "microworld:n=64", "microworld:n=16,split=heldout,draw=1"


def tiny():
  """Two runs under the same limits: one that learns slowly, one that is paid to say nothing."""
  config = online_sweep.get_config()
  config.sft.model.scratch.update(layers=1, embed_dim=32, heads=2, kv_heads=2, mlp_dim=64)
  for phase in (config.sft, config.reward_models.reward):
    phase.data.update(train=WORLD, eval=HELD_OUT, batch_size=8)
    phase.loop.update(steps=3, eval_every=0)
  config.online.prompts.update(train=WORLD, batch_size=8)
  config.online.sampling.max_new_tokens = 8
  config.online.loop.steps = 24
  config.online.stops.update(distinct_min=0.5, patience=2)
  config.evaluation.update(data=HELD_OUT, max_new_tokens=8, batch_size=16)
  config.seeds, config.processes = (0,), 1
  values = config.to_dict()
  values["variants"] = {
    "well": {"optimizer": {"learning_rate": 1e-4}},
    "silent": {
      "optimizer": {"learning_rate": 0.05},
      "rewards": {"model": {"weight": 0.0}, "length": {"kind": "length", "weight": -1.0}},
      "shaping": {"missing_eos_penalty": 0.0},
      "policy_gradient": {"kl": {"coef": 0.0}},
    },
  }
  values["baseline"] = "well"
  return values


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  root = tmp_path_factory.mktemp("sweep")
  return root, sweep.run(tiny(), str(root), app.worker_devices)


def metrics(folder, name):
  lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
  return [line[name] for line in lines if name in line]


def test_collapse_is_seen_by_the_instruments_and_ends_the_run_with_a_reason(finished):
  root, table = finished
  folder = root / "silent" / "seed0"
  distinct = metrics(folder, "distinct/responses")
  assert distinct[0] > 0.9 and distinct[-1] < 0.5
  for name in ("entropy", "response_length"):
    values = metrics(folder, name)
    assert values[-1] < 0.5 * values[0]
  assert len(distinct) < 24
  (run,) = table.stopped
  assert (
    run.reason.startswith("distinct/responses was") and "stops.distinct_min = 0.5" in run.reason
  )
  assert run.reason in (root / "sweep.md").read_text()
  assert "stopped after" in dashboard.read_run(folder).state


def test_a_healthy_run_is_not_stopped_by_the_same_limits(finished):
  """Control, under the very limits that the other variant passes."""
  root, table = finished
  folder = root / "well" / "seed0"
  assert len(metrics(folder, "distinct/responses")) == 24
  assert min(metrics(folder, "distinct/responses")) > 0.9
  assert not (folder / "stopped.json").exists()
  assert [r.variant for r in table.stopped] == ["silent"]


def test_what_was_stopped_counts_as_a_result(finished):
  _, table = finished
  assert table.summary == "2 of 2 runs finished (1 stopped early)" and not table.failed
  silent = next(row for row in table.rows if row.variant == "silent")
  assert silent.metrics["gain"].n == 1 and silent.metrics["length"].value < 4


def test_the_reward_model_is_trained_once_and_read_by_all(finished):
  root, _ = finished
  assert json.loads((root / "reward" / "lineage.json").read_text())["phase"] == "reward"
  for folder in root.glob("*/seed*"):
    parents = json.loads((folder / "lineage.json").read_text())["parents"]
    assert {p["role"]: p["path"] for p in parents}["reward_model"] == str(root / "reward")


def test_the_page_shows_the_scores_while_training(finished):
  root, table = finished
  assert (root / "sweep_scores.png").exists()
  assert set(table.curves) == {"well", "silent"}
  assert set(table.curves["silent"][0].scores) == {"model", "gold", "length"}
  assert table.curves["silent"][0].learned == ("length",)


def test_again_is_nothing_to_do(finished):
  def never(index, count):
    raise AssertionError("a worker was started")

  root, table = finished
  assert sweep.run(tiny(), str(root), never).summary == table.summary
