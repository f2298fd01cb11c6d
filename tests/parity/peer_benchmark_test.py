"""All sides of the peer benchmark on a tiny model: they compute the same, before and after an update.

The sides run in this process, one after the other, over the channel that a parent would speak to.
"""

import jax
import pytest

from align_jax import config as config_lib
from align_jax.phases import (
  peer_benchmark,
  peer_config,
  peer_ours,
  peer_records,
  peer_summary,
)
from align_jax.training import workdir
from configs import benchmark_peers, common

PASSES = 2


class Asked:
  """A parent that asks for passes, and keeps what it is told."""

  def __init__(self):
    self.told = []

  def send(self, answer):
    self.told.append(answer)

  def goes_on(self) -> bool:
    return len(self.told) <= PASSES

  @property
  def found(self):
    return {"starts": [self.told[0]] * 2, "passes": self.told[1:]}


def settings():
  config = benchmark_peers.get_config("cpu,dpo_hh,policy_hh,reward_hh,sample,sft")
  config.model = common.microworld_model()
  config.model.scratch.update(layers=1, embed_dim=16, heads=2, kv_heads=1, mlp_dim=16)
  config.model.logits_chunk = 16
  for task in config.tasks.values():
    task.data.update(train="microworld:n=24", length=46, batch_size=4)
    task.data.columns = None
  config.optimizer.learning_rate = 3e-3
  config.update(batches=2, repeats=PASSES, matmul=64)
  return config.to_dict()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  folder = tmp_path_factory.mktemp("peers")
  workdir.write_json(folder / "config.json", settings())
  found = peer_config.Place(folder)
  peer_records.prepare(found, jax.devices()[:1])
  return found


def serve(peer, place, task, channel, monkeypatch):
  pytest.importorskip(peer)
  if peer == "tunix":
    from align_jax.phases import peer_tunix

    return peer_tunix.serve(place, task, channel, jax.devices()[:1])
  pytest.importorskip("torch")
  from align_jax.phases import peer_transformers, peer_trl

  if peer == "transformers":
    monkeypatch.setattr(peer_transformers, "cores", lambda: 1)
    return peer_transformers.serve(place, task, channel)

  monkeypatch.setattr(peer_trl, "cores", lambda: 1)  # more threads of so small a model mostly wait
  peer_trl.serve(place, task, channel)


@pytest.mark.parametrize(
  "peer, task",
  [
    ("trl", "dpo_hh"), ("trl", "policy_hh"), ("trl", "reward_hh"), ("trl", "sft"),
    ("tunix", "dpo_hh"), ("tunix", "sft"), ("transformers", "sample"),
  ],
)  # fmt: skip
def test_all_sides_compute_the_same(peer, task, place, monkeypatch):
  section = place.config.tasks[task]
  channels = {side: Asked() for side in section.sides([peer])}
  assert len(channels) > 1
  for side, channel in channels.items():
    if side == peer:
      serve(peer, place, task, channel, monkeypatch)
    else:
      peer_ours.serve(place, task, side, channel, jax.devices()[:1])
  checks = {side: channel.told[0]["check"] for side, channel in channels.items()}
  agreement = peer_benchmark.compare(task, checks, 1e-3)
  assert len(checks[peer]) == (peer_config.CHECKS if section.phase != "sample" else 1)
  found = {side: channel.found for side, channel in channels.items()}
  useful = workdir.read_json(place.tokens(task))["useful_tokens"]
  made = peer_summary.summary(section, 8, useful, agreement, found)
  rows = made["variants"]
  assert all(len(row["seconds"]) == PASSES for row in rows.values())
  assert "examples a pass" in peer_summary.table(task, made)
  told = rows[peer]["settings"]
  if section.phase == "sample":
    return
  assert set(checks[peer][0]) == set(peer_ours.COMPARED[section.phase])
  assert all(row["padded_tokens"] >= useful for row in rows.values())
  assert told["gradient_checkpointing"] is True if peer == "trl" else told["remat"] == "DECODER"


def test_settings_are_read_back(place):
  assert config_lib.to_dict(place.config)["batches"] == 2
