"""The benchmark next to TRL, without TRL: what it counts, when it refuses, and its processes."""

import json

import numpy as np
import pytest

from align_jax import config as config_lib
from align_jax import data, models, worlds
from align_jax.errors import InputError
from align_jax.evals import benchmark_plots
from align_jax.phases import (
  peer_benchmark,
  peer_config,
  peer_flops,
  peer_process,
  peer_records,
  peer_summary,
)
from configs import benchmark_peers, common


def settings(**changes):
  config = benchmark_peers.get_config("cpu,reward_hh")
  config.model = common.microworld_model()
  config.model.scratch.update(layers=1, embed_dim=16, heads=1, kv_heads=1, mlp_dim=16)
  config.tasks.reward_hh.data.update(train="microworld:n=24", length=46, batch_size=4)
  config.update(batches=2, repeats=1, matmul=16)
  return config.to_dict() | changes


def build(values):
  return config_lib.build(peer_config.PeerBenchmarkConfig, values)


def test_ours_is_measured_alone_where_trl_is_missing(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(peer_benchmark, "missing_packages", lambda peer: [peer])
  values = settings()
  values["tasks"]["policy_hh"] = values["tasks"]["reward_hh"] | {"phase": "policy"}
  peer_benchmark.run(build(values), str(tmp_path))
  assert "not compared with trl: trl is not installed" in capsys.readouterr().out
  sets = json.loads((tmp_path / "benchmark.json").read_text())["sets"]
  assert list(sets) == ["reward_hh", "policy_hh"]
  for found in sets.values():
    row = found["variants"][peer_config.OURS]
    assert list(found["variants"]) == [peer_config.OURS] and found["examples"] == 8
    assert 0 < row["mfu"] and row["flops"] > 0
    assert row["useful_tokens"] <= row["padded_tokens"] and row["peak_bytes"] > 1e7
  rows = [sets[name]["variants"][peer_config.OURS] for name in sets]
  assert rows[1]["useful_tokens"] == rows[0]["useful_tokens"]  # a pair's prompt once in both
  assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
  with pytest.raises(InputError, match="holds a benchmark already"):
    peer_benchmark.run(build(settings()), str(tmp_path))


def test_a_process_that_fails_shows_its_log(tmp_path):
  process = peer_process.Process("prepare", "all", tmp_path, {})  # there is no config.json
  with pytest.raises(RuntimeError, match="config.json"):
    process.ready()


class TestCompare:
  def compare(self, ours, theirs):
    wrap = lambda losses: [{"loss": x} for x in losses]  # noqa: E731
    return peer_benchmark.compare("task", {"trl": wrap(theirs), "align_jax": wrap(ours)}, 1e-3)

  def test_what_agrees(self):
    found = self.compare([1.0, 0.5], [1.0005, 0.5])
    assert found["largest_difference"]["align_jax"] == pytest.approx(0.0005 / 1.0005)

  @pytest.mark.parametrize(
    "ours, message",
    [
      ([1.002, 0.5], "loss at step 0 is 1.002 by align_jax and 1 by trl"),
      ([1.0, 0.501], "loss at step 1"),
      ([float("nan"), 0.5], "loss at step 0 is nan"),
    ],
  )
  def test_what_does_not(self, ours, message):
    with pytest.raises(FloatingPointError, match=message):
      self.compare(ours, [1.0, 0.5])

  def test_an_update_that_moves_nothing_proves_nothing(self):
    with pytest.raises(FloatingPointError, match="raise config.optimizer.learning_rate"):
      self.compare([1.0, 1.0005], [1.0, 1.0001])


class TestFlops:
  """Against the closed form of a small Llama."""

  D, LAYERS, HEADS, DIM, MLP, VOCAB = 16, 3, 2, 8, 24, 40

  @pytest.fixture(scope="class")
  def model(self):
    return models.Transformer(
      models.ModelConfig(
        vocab_size=self.VOCAB, embed_dim=self.D, num_layers=self.LAYERS, num_heads=self.HEADS,
        num_kv_heads=1, head_dim=self.DIM, mlp_dim=self.MLP,
      )
    )  # fmt: skip

  def forward(self, tokens, attended, scored):
    wide, narrow = self.HEADS * self.DIM, self.DIM
    weights = self.D * (2 * wide + 2 * narrow) + 3 * self.D * self.MLP
    trunk = self.LAYERS * (2 * weights * tokens + 4 * wide * attended)
    return trunk + 2 * self.D * self.VOCAB * scored

  def test_rows_of_demonstrations(self, model):
    positions = np.array([[0, 1, 2, 0, 1, 0, 0, 0]])
    batch = {
      "segment_ids": np.array([[1, 1, 1, 2, 2, 0, 0, 0]]),
      "positions": positions,
      "loss_mask": np.array([[0, 0, 1, 0, 0.5, 0, 0, 0]]),
    }
    found = peer_flops.model_flops(model, "sft", [batch], recomputed=False)
    assert found == pytest.approx(3 * self.forward(5, 1 + 2 + 3 + 1 + 2, 2))

  @pytest.mark.parametrize("phase, recomputed, times", [("dpo", False, 3), ("dpo", True, 4)])
  def test_rows_of_pairs(self, model, phase, recomputed, times):
    """Of a prompt p and answers c and r: both attend to the prompt and to themselves."""
    world = worlds.Microworld(seed=0)
    plan = data.Batching(4, epochs=1)
    pairs = data.tokenise_pairs(world.preferences(4), world.tokenizer(), plan, length=46)
    batches = list(data.shared_batches(pairs))
    lengths, shared = pairs.corpus.lengths.reshape(-1, 2), pairs.shared
    squares = lambda n: n * (n + 1) // 2  # noqa: E731
    attended = squares(lengths).sum() - squares(shared).sum()
    expected = self.forward(pairs.costs.sum(), attended, pairs.scored.sum())
    found = peer_flops.model_flops(model, phase, batches, recomputed=recomputed)
    assert found == pytest.approx(times * expected)

  def test_requests(self, model):
    """Of prompts of 3 and 2 tokens and responses of 4 and 1; what is drawn last is not read."""
    requests = [{"prompt_ids": [5] * p, "new_tokens": n} for p, n in ((3, 4), (2, 1))]
    expected = self.forward(6 + 2, 6 * 7 / 2 + 2 * 3 / 2, 4 + 1)
    assert peer_flops.sampling_flops(model, requests) == pytest.approx(expected)


class TestRequests:
  """What is to be sampled: the last response of a record, behind all that stands before it."""

  TOKENIZER = worlds.Microworld(seed=0).tokenizer()

  def record(self, *turns):
    roles = ("user", "assistant") * len(turns)
    messages = tuple({"role": r, "content": c} for r, c in zip(roles, turns))
    return data.Demonstration(messages, source="file.jsonl:7")

  def test_the_last_response_is_asked_for(self):
    turns = "say red", "red", "say blue blue", "blue blue"
    encoded = data.encode_demonstration(self.record(*turns), self.TOKENIZER, 64)
    found = peer_records.request(self.record(*turns), self.TOKENIZER, 64)
    alone = data.encode_demonstration(self.record(*turns[2:]), self.TOKENIZER, 64)
    assert found["new_tokens"] == alone.response_mask.sum()
    end = len(found["prompt_ids"]) + found["new_tokens"]
    assert encoded.response_mask[len(found["prompt_ids"]) : end].all()
    assert found["prompt_ids"] == encoded.tokens[: len(found["prompt_ids"])].tolist()
    assert not encoded.response_mask[end:].any()


def test_a_peak_is_measured():
  assert peer_flops.matmul_rate(32, "float32", repeats=2) > 0


def measured(seconds, **more):
  memory = {"peak_bytes": more.pop("peak", 100), "peak_device_bytes": None}
  start = {"settings": {}, "reference_pass": None} | more | memory
  return {"starts": [start, start], "passes": [{"seconds": s} | memory | more for s in seconds]}


def summary():
  task = peer_config.PeerTask("reward", build(settings()).tasks["reward_hh"].data)
  ours = {"padded_tokens": 50, "steps": 2, "shapes": ["(1, 48)"], "compile_s": 2.0}
  ours |= {"flops": 30.0, "matmul_flops_per_s": [100.0, 100.0], "peak": 25}
  peer = {"padded_tokens": 80, "settings": {"versions": {}}}
  agreement = {"largest_difference": {peer_config.OURS: 1e-5}}
  found = {"trl": measured([4.0, 2.0, 3.0], **peer)}
  found[peer_config.OURS] = measured([1.0, 1.0, 2.0], **ours)
  slower = {"matmul_flops_per_s": [70.0, 50.0]}  # the machine, by then
  found[peer_config.OURS]["passes"][2] |= slower
  return peer_summary.summary(task, 8, 40, agreement, found)


def test_ratios_are_of_neighbours_in_time():
  made = summary()
  row = made["variants"][peer_config.OURS]
  assert row["speedup"] == 2.0 and row["speedup_range"] == [1.5, 4.0]
  assert row["examples_per_s"] == 8.0 and row["useful_tokens_per_s"] == 40.0
  assert row["mfu"] == pytest.approx(0.3)
  assert row["mfu_of_passes"] == pytest.approx([0.3, 0.3, 0.25])
  assert row["memory_ratio"] == 0.25
  table = peer_summary.table("task", made)
  assert "2.00 [1.50, 4.00]" in table and "30%" in table and "30, 30, 25 %" in table


def test_a_chart_has_the_sides_that_each_set_has():
  made = summary()
  alone = {"variants": {"trl": made["variants"]["trl"]}}
  drawn = benchmark_plots.peer_figure({"alone": alone, "both": made})
  assert [len(axes.containers) for axes in drawn.axes] == [4, 2]  # bars and ranges; bars
  assert [t.get_text() for t in drawn.axes[0].get_xticklabels()] == ["alone", "both"]


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"repeats": 0}, "config.batches, repeats and matmul must be positive"),
    ({"tasks": {}}, "tasks given"),
    ({"shape": "llama3.2-1b"}, "config.shape: with model.init='scratch'"),
  ],
)
def test_what_cannot_be_measured_is_refused(changes, message):
  with pytest.raises(InputError, match=message):
    build(settings(**changes))


def test_an_optimizer_that_only_one_side_has_is_refused():
  values = settings()
  values["optimizer"]["schedule"] = "cosine"
  with pytest.raises(InputError, match="config.optimizer.schedule must be 'constant'"):
    build(values)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"phase": "ppo"}, "config.tasks.phase must be one of sft, reward, dpo, policy, sample"),
    ({"phase": "dpo"}, "config.tasks.ways is for phases dpo, sample, which need one"),
    ({"ways": ("cached",)}, "config.tasks.ways is for phases dpo, sample"),
    (
      {"phase": "sample", "ways": ("cached",)},
      "config.tasks.ways must be one of batches, continuous",
    ),
  ],
)
def test_tasks_that_make_no_sense_are_refused(changes, message):
  values = settings()
  values["tasks"]["reward_hh"].update(changes)
  with pytest.raises(InputError, match=message):
    build(values)


def test_tasks_are_chosen_by_name():
  assert list(benchmark_peers.get_config("cpu,sft").tasks) == ["sft"]
  assert benchmark_peers.get_config("gpu").model.dtype == "bfloat16"
  for wrong in ("tpu", "cpu,ppo"):
    with pytest.raises(ValueError, match="ppo|tpu"):
      benchmark_peers.get_config(wrong)
