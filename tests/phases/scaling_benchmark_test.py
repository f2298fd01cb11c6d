"""Cost as work grows: the fitted exponents, the batches, a small run; and how a first step is timed."""

import json

import jax
import numpy as np
import pytest

from align_jax import config as config_lib
from align_jax import data, worlds
from align_jax.errors import InputError
from align_jax.phases import first_step, scaling_batches, scaling_benchmark
from configs import benchmark_scaling

SIZES = {"length": 16, "batch": 2, "rank": 0, "vocab": 32}


def settings(**changes):
  config = benchmark_scaling.get_config()
  config.model.scratch.update(layers=1, embed_dim=16, heads=1, kv_heads=1, mlp_dim=16)
  config.model.logits_chunk = 4
  values = config.to_dict()
  values |= {"base": SIZES, "axes": {"rank": (1, 2, 4)}, "repeats": 2, "first_step": {"module": ""}}
  return config_lib.build(scaling_benchmark.ScalingConfig, values | changes)


def test_a_power_law_is_found_exactly():
  sizes = np.array([1.0, 2.0, 8.0, 16.0])
  found = scaling_benchmark.fit(sizes, 3.0 * sizes**1.5)
  assert found.exponent == pytest.approx(1.5)
  assert found.standard_error == pytest.approx(0.0, abs=1e-6)
  assert found.r2 == pytest.approx(1.0)


def test_the_standard_error_is_that_of_numpy():
  rng = np.random.default_rng(0)
  sizes = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
  values = sizes**2 * np.exp(0.1 * rng.normal(size=6))
  found = scaling_benchmark.fit(sizes, values)
  slope, covariance = np.polyfit(np.log(sizes), np.log(values), 1, cov=True)
  assert found.exponent == pytest.approx(slope[0])
  assert found.standard_error == pytest.approx(covariance[0, 0] ** 0.5)
  assert found.r2 == pytest.approx(np.corrcoef(np.log(sizes), np.log(values))[0, 1] ** 2)


def test_batches_have_the_arrays_of_the_pipeline():
  """Names, ranks and types as a run's own, so that the same step is compiled."""
  world = worlds.Microworld(seed=0)
  tokenizer = world.tokenizer()
  plan = data.Batching(2, epochs=1)
  pairs = data.tokenise_pairs(world.preferences(4), tokenizer, plan, length=46)
  edges = pairs.scored_edges
  ref = lambda found: [np.zeros(edges[s + 1] - edges[s], np.float32) for s in found]  # noqa: E731
  real = {
    "dpo": next(data.shared_batches(pairs, reference=ref)),
    "sft": next(data.sft_batches(world.demonstrations(8), tokenizer, length=46, batch_size=2)),
  }
  for name, expected in real.items():
    made = scaling_batches.MAKERS[name](SIZES)
    assert {k: (v.ndim, v.dtype) for k, v in made.items()} == {
      k: (v.ndim, v.dtype) for k, v in expected.items()
    }


def test_a_pair_of_random_tokens_is_scored_where_it_is_predicted():
  made = scaling_batches.dpo(SIZES)
  row = {name: x[0] for name, x in made.items()}
  scored = row["slots"] >= 0
  assert scored.sum() == SIZES["length"] // 2
  for source, target, slot, place in zip(
    *(row[k][scored] for k in ("sources", "targets", "slots", "places"))
  ):
    at = np.flatnonzero(row["branch_ids"] == slot + 1)[place]
    assert row["tokens"][at] == target
    assert row["positions"][source] == row["positions"][at] - 1
    assert row["branch_ids"][source] in (0, slot + 1)
  np.testing.assert_array_equal(row["branch_ids"][row["last"]], [1, 2])


def test_a_small_run(tmp_path):
  scaling_benchmark.run(settings(steps=("dpo",)), str(tmp_path), jax.devices()[:1])
  found = json.loads((tmp_path / "benchmark.json").read_text())["axes"]["rank"]["dpo"]
  assert [row["size"] for row in found["rows"]] == [1, 2, 4]
  assert all(row["range"][0] <= row["s"] <= row["range"][1] for row in found["rows"])
  assert set(found["fit"]) == {"exponent", "standard_error", "r2"}
  assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"steps": ("ppo",)}, "config.steps must be one of sft, dpo"),
    ({"steps": ()}, "config.steps must be given"),
    ({"base": {"length": 8}}, "base have length, batch, rank, vocab"),
    ({"base": SIZES | {"length": 4}}, "config.base.length must be at least 8, not 4"),
    ({"axes": {"heads": (1, 2, 4)}}, "config.axes must be one of length, batch, rank, vocab"),
    ({"axes": {"rank": (0, 2, 4)}}, "config.axes.rank must have three sizes or more, none below 1"),
    ({"axes": {"batch": (2, 4)}}, "config.axes.batch must have three sizes"),
  ],
)
def test_what_cannot_be_fitted_is_refused(changes, message):
  with pytest.raises(InputError, match=message):
    settings(**changes)


class TestFirstStep:
  """A command that only writes what a run writes."""

  @pytest.fixture
  def module(self, tmp_path, monkeypatch):
    (tmp_path / "pretended.py").write_text(
      "import os, pathlib, sys\n"
      "if 'broken' in sys.argv: sys.exit('it is broken')\n"
      "place = pathlib.Path(sys.argv[-1].partition('=')[2])\n"
      "cache = pathlib.Path(os.environ['JAX_COMPILATION_CACHE_DIR'])\n"
      "cache.mkdir(exist_ok=True)\n"
      "place.mkdir()\n"
      "lines = ['{\"eval/loss\": 1}', '{\"step\": 0, \"loss\": 1}', '']\n"
      "(place / 'metrics.jsonl').write_text(chr(10).join(lines))\n"
      "import time\n"
      "time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "pretended"

  def test_it_is_timed_cold_and_warm(self, module):
    found = first_step.measure(first_step.FirstStepSection(module, warm_repeats=2))
    assert 0 < found["cold_s"] < 60 and len(found["warm_s"]) == 2
    assert "first step after" in first_step.sentence(found)

  def test_a_command_that_fails_is_shown(self, module):
    with pytest.raises(RuntimeError, match="it is broken"):
      first_step.measure(first_step.FirstStepSection(module, ("broken",)))

  def test_an_evaluation_is_no_step(self, tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert not first_step._begun(file)
    file.write_text('{"step": 0, "eval/loss": 1}\n{"step": 0, "loss"')
    assert not first_step._begun(file)
    file.write_text('{"step": 0, "eval/loss": 1}\n{"step": 0, "loss": 1}\n')
    assert first_step._begun(file)
