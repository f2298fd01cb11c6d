"""Runs of the whole phase from one tiny checkpoint: layouts, reference, objectives, eight devices."""

import json
import shutil

import jax
import numpy as np
import pytest
import tensorstore as ts

from align_jax import config as config_lib
from align_jax.errors import InputError
from align_jax.phases import preference, reference, sft
from align_jax.training import workdir
from configs import preference as preference_config
from configs import sft as sft_config

WORLD = "microworld:n=40"
HELD_OUT = "microworld:n=10,split=heldout,draw=1"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A finished workdir of one step of SFT."""
  settings = sft_config.get_config()
  settings.model.scratch.update(layers=1, embed_dim=32, heads=2, kv_heads=2, mlp_dim=64)
  settings.data.update(train=WORLD, eval=None, batch_size=8)
  settings.loop.update(steps=1, eval_every=0)
  folder = tmp_path_factory.mktemp("sft")
  sft.run(config_lib.build(sft.SftConfig, settings.to_dict()), str(folder), jax.devices()[:1])
  return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def train(checkpoint, root):
  """`(name, settings) -> lines of metrics` of four steps in the workdir of that name under `root`."""

  def run(name, devices=1, **changes):
    settings = preference_config.get_config()
    settings.model.update(init=str(checkpoint), remat="none", logits_chunk=16)
    settings.data.update(train=WORLD, eval=HELD_OUT, batch_size=8)
    settings.loop.update(steps=4, eval_every=0)
    for dotted, value in changes.items():
      settings.update_from_flattened_dict({dotted.replace("__", "."): value})
    config = config_lib.build(preference.PreferenceConfig, settings.to_dict())
    preference.run(config, str(root / name), jax.devices()[:devices])
    assert workdir.is_finished(root / name)
    text = (root / name / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]

  return run


@pytest.fixture(scope="module")
def shared(train, root):
  """DPO as the config has it: shared rows, the reference's log-probs cached."""
  return train("shared", reference="cached", reference_cache=str(root / "cache"))


def losses_of(lines):
  return [line["loss"] for line in lines if "loss" in line]


def evaluations_of(lines):
  return [line["eval/loss"] for line in lines if "eval/loss" in line]


def test_both_layouts_start_alike_and_finish(train, shared):
  """Their batches are others, but the first loss is ln 2 and the held-out one the same."""
  padded = train("padded", layout="padded")
  for lines in (shared, padded):
    losses = losses_of(lines)
    np.testing.assert_allclose(losses[0], np.log(2.0), rtol=1e-5)
    assert len(losses) == 4 and np.abs(np.diff(losses)).min() > 1e-6
  np.testing.assert_allclose(evaluations_of(shared)[0], evaluations_of(padded)[0], rtol=1e-5)
  assert evaluations_of(shared)[-1] != evaluations_of(shared)[0]


def test_a_cache_changes_no_loss(train, shared):
  recomputed = train("recomputed", reference="recomputed")
  for values in (losses_of, evaluations_of):
    np.testing.assert_allclose(values(shared), values(recomputed), rtol=1e-5)


def test_runs_share_a_cache(train, shared, root, monkeypatch):
  folders = sorted((root / "cache").iterdir())
  assert len(folders) == 2  # training and held-out pairs

  def nothing_missing(score, costs, store, missing):
    assert not len(missing)

  monkeypatch.setattr(reference, "_complete", nothing_missing)
  again = train(
    "again", reference_cache=str(root / "cache"), objective__name="ipo", objective__tau=0.5
  )
  np.testing.assert_allclose(losses_of(again)[0], 1.0, rtol=1e-5)
  assert sorted((root / "cache").iterdir()) == folders


def test_a_cache_of_wrong_numbers_stops_the_run(train, shared, root, tmp_path):
  shutil.copytree(root / "cache", tmp_path / "cache")
  for folder in (tmp_path / "cache").iterdir():
    kvstore = {"driver": "file", "path": str(folder / "logprobs")}
    store = ts.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()
    store.write(store.read().result() + 0.1).result()
  with pytest.raises(InputError, match="differ by 0.1 nats from those computed now"):
    train("wrong", reference_cache=str(tmp_path / "cache"))


def test_what_is_carried_goes_over_eight_devices(train):
  """BCO's mean and a moving reference, from rows split eight ways, accumulated, in a mixture."""
  lines = train(
    "bco",
    devices=8,
    objective__name="bco + sft*0.1",
    objective__sync_every=2,
    objective__sync_alpha=0.6,
    accumulate=2,
    data__eval=None,
  )
  steps = [line for line in lines if "loss" in line]
  np.testing.assert_allclose(steps[0]["loss/bco"], 2 * np.log(2.0), rtol=1e-5)
  assert steps[0]["bco/shift"] == steps[1]["bco/shift"] == 0.0 != steps[3]["bco/shift"]
  for step in steps:
    total = step["loss/bco"] + 0.1 * step["loss/sft"]
    np.testing.assert_allclose(step["loss"], total, rtol=1e-5)


@pytest.mark.parametrize(
  "name, loss, changes",
  [
    ("step_dpo + tdpo", 2 * np.log(2.0), {"model__lora__rank": 2, "objective__sync_every": 2}),
    ("bco_unpaired", np.log(2.0), {}),
  ],
)
def test_objectives_that_need_more_run_to_their_end(train, name, loss, changes):
  """Marks of steps, whole distributions, an adapter that moves as reference; single responses."""
  losses = losses_of(train(name, objective__name=name, data__eval=None, **changes))
  assert len(losses) == 4 and np.isfinite(losses).all()
  np.testing.assert_allclose(losses[0], loss, rtol=1e-5)


@pytest.mark.parametrize("rank, how", [(0, "cached"), (2, "recomputed")])
def test_another_policy_may_be_the_reference(train, shared, root, checkpoint, rank, how):
  """The policy starts where the reference has been left: its log-ratios are those that it had gained."""
  options = {"reference_model": str(checkpoint), "reference": how, "model__lora__rank": rank}
  lines = train(f"onwards-{rank}-{how}", model__init=str(root / "shared"), **options)
  assert abs(losses_of(lines)[0] - np.log(2.0)) > 1e-4
  np.testing.assert_allclose(evaluations_of(lines)[0], evaluations_of(shared)[-1], rtol=1e-5)
  text = (root / f"onwards-{rank}-{how}" / "lineage.json").read_text()
  parents = {p["role"]: p["path"] for p in json.loads(text)["parents"]}
  assert parents == {"policy": str(root / "shared"), "ref": str(checkpoint)}


@pytest.mark.parametrize("name, sync_every", [("simpo", 0), ("dpo", 2)])
def test_a_reference_model_that_would_not_be_used_is_an_error(train, name, sync_every):
  changes = {"objective__name": name, "objective__sync_every": sync_every}
  with pytest.raises(InputError, match="reference_model is not used"):
    train("unused", reference_model="smollm2", **changes)


def test_a_run_without_a_reference_keeps_none(train, root, monkeypatch):
  def refuse(*_):
    raise AssertionError("a reference was asked for")

  monkeypatch.setattr(reference, "cached_reference", refuse)
  lines = train("simpo", objective__name="simpo + sft*0.2", data__eval=None)
  assert len(losses_of(lines)) == 4 and not (root / "simpo" / "reference").exists()
  lineage = json.loads((root / "simpo" / "lineage.json").read_text())
  assert [parent["role"] for parent in lineage["parents"]] == ["policy"]


@pytest.mark.parametrize("devices", [1, 8])
def test_a_reference_in_host_memory_is_the_reference(train, devices):
  """Recomputed, it is fetched layer by layer; the numbers are those of one that stays."""
  name = f"host {devices}"
  changes = {"reference": "recomputed", "data__eval": None}
  here = train(f"device {devices}", devices, **changes)
  there = train(name, devices, reference_memory="host", **changes)
  np.testing.assert_allclose(losses_of(there), losses_of(here), rtol=1e-6)


def test_a_memory_for_no_second_copy_is_an_error(train):
  with pytest.raises(InputError, match="reference_memory='host' is not used"):
    train("cached in host memory", reference_memory="host")
  with pytest.raises(InputError, match="must be one of device, host"):
    train("on the moon", reference_memory="moon")
