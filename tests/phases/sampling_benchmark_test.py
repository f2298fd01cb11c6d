"""The sampling benchmark on a model of one layer: both sides do the same work; what it refuses."""

import json

import jax
import pytest

from align_jax import config as config_lib
from align_jax.errors import InputError
from align_jax.phases import sampling_benchmark
from configs import benchmark_sampling


def settings(**changes):
  config = benchmark_sampling.get_config()
  del config.sets["smollm2"]
  world = config.sets.microworld
  world.model.scratch.update(layers=1, embed_dim=16, heads=1, kv_heads=1, mlp_dim=16)
  world.update({"requests": 6, "slots": 2, "prompt_length": 8, "new_tokens": (2, 8)} | changes)
  config.repeats = 2
  return config_lib.build(sampling_benchmark.SamplingBenchmarkConfig, config.to_dict())


def test_both_sides_of_every_comparison_draw_the_same_tokens(tmp_path):
  pytest.importorskip("torch")
  sampling_benchmark.run(settings(equal_tokens=3), str(tmp_path), jax.devices()[:1])
  found = json.loads((tmp_path / "benchmark.json").read_text())
  mixed = found["mixed"]["microworld"]["variants"]
  equal = found["transformers"]["microworld"]["variants"]
  assert list(mixed) == ["batches", "continuous"] and list(equal) == ["transformers", "align_jax"]
  assert mixed["batches"]["tokens"] == mixed["continuous"]["tokens"] >= 12
  assert equal["transformers"]["tokens"] == equal["align_jax"]["tokens"] == 6
  for rows in (mixed, equal):
    first = next(iter(rows.values()))
    assert first["speedup"] == 1.0
    assert all(len(row["seconds"]) == 2 for row in rows.values())
  assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_without_torch_that_part_is_left_out_and_said(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sampling_benchmark.importlib.util, "find_spec", lambda name: None)
  found = sampling_benchmark.run(settings(equal_tokens=3), str(tmp_path), jax.devices()[:1])
  assert found["transformers"] == {}
  assert "torch is not installed" in capsys.readouterr().out


def test_sides_that_do_different_work_are_no_comparison():
  sides = [sampling_benchmark.Side("a", lambda: 3), sampling_benchmark.Side("b", lambda: 4)]
  with pytest.raises(RuntimeError, match="different numbers of tokens"):
    sampling_benchmark.measure(sides, 1, "name")


@pytest.mark.parametrize("changes", [{"slots": 0}, {"new_tokens": (9, 8)}, {"new_tokens": (0, 8)}])
def test_wrong_sizes_are_refused(changes):
  with pytest.raises(InputError, match="config.sets"):
    settings(**changes)
