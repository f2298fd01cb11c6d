"""The benchmark on a model of one layer: what it counts, that all variants do the same work, its errors."""

import json

import jax
import pytest

from align_jax import config as config_lib
from align_jax import data, worlds
from align_jax.errors import InputError
from align_jax.phases import benchmark
from configs import benchmark as benchmark_config
from configs import common

VARIANTS = ("padded/recomputed", "shared/recomputed", "padded/cached", "shared/cached")


def settings_of(file, **changes):
  config = benchmark_config.get_config()
  config.model = common.microworld_model()
  config.model.scratch.update(layers=1, embed_dim=16, heads=1, kv_heads=1, mlp_dim=16)
  config.model.logits_chunk = 16
  for name in list(config.data):
    del config.data[name]
  config.data.world = common.data(str(file), None, length=46, batch_size=4)
  config.update(variants=VARIANTS, batches=2, repeats=2)
  return config.to_dict() | changes


def build(settings):
  return config_lib.build(benchmark.BenchmarkConfig, settings)


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
  file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
  data.write(file, worlds.Microworld(seed=0).preferences(24))
  return file


@pytest.fixture(scope="module")
def found(pairs_file, tmp_path_factory):
  """(folder, what benchmark.json holds of the one set)."""
  folder = tmp_path_factory.mktemp("benchmark")
  benchmark.run(build(settings_of(pairs_file)), str(folder), jax.devices()[:1])
  return folder, json.loads((folder / "benchmark.json").read_text())["sets"]["world"]


def test_all_variants_are_timed_on_the_same_pairs(found):
  folder, measured = found
  assert measured["examples"] == 8 and measured["batch_size"] == 4
  rows = measured["variants"]
  assert tuple(rows) == VARIANTS
  assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows.values())
  assert len({row["useful_tokens"] for row in rows.values()}) == 1
  assert (folder / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_sharing_a_prompt_saves_tokens_and_ratios_are_to_the_first(found):
  rows = found[1]["variants"]
  first, shared = rows["padded/recomputed"], rows["shared/recomputed"]
  assert shared["useful_tokens"] <= shared["padded_tokens"] < first["padded_tokens"]
  assert first["speedup"] == first["memory_ratio"] == 1.0
  for row in rows.values():
    low, high = row["speedup_range"]
    assert low <= row["speedup"] <= high
    assert row["memory_ratio"] == pytest.approx(row["temp_bytes"] / first["temp_bytes"])


def test_a_cache_spares_the_second_forward_pass(found):
  """Counted by the compiler, so that a noisy machine cannot hide it: fewer buffers, same tokens."""
  rows = found[1]["variants"]
  for layout in ("padded", "shared"):
    cached, recomputed = rows[f"{layout}/cached"], rows[f"{layout}/recomputed"]
    assert cached["padded_tokens"] == recomputed["padded_tokens"]
    assert cached["temp_bytes"] <= recomputed["temp_bytes"]


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"variants": ("packed/cached",)}, "config.variants must be among .*, not 'packed/cached'"),
    ({"variants": ()}, "data and variants given"),
    ({"repeats": 0}, "config.repeats must be positive"),
    ({"objective": {"name": "simpo"}}, "simpo has no pairs or no reference"),
    ({"objective": {"name": "kto"}}, "kto has no pairs or no reference"),
  ],
)
def test_what_cannot_be_measured_is_refused(pairs_file, changes, message):
  with pytest.raises(InputError, match=message):
    build(settings_of(pairs_file, **changes))


def test_too_few_pairs_are_said(pairs_file, tmp_path):
  config = build(settings_of(pairs_file, batches=7))
  with pytest.raises(InputError, match="has 24 pairs; 28 are needed"):
    benchmark.run(config, str(tmp_path), jax.devices()[:1])
