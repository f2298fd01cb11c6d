"""Scores of texts: the same in any batch, padding and order, and equal to what is computed elsewhere."""

import dataclasses
import functools
import json
import logging

import jax
import numpy as np
import pytest
from ml_collections import config_dict

from align_jax import config as config_lib
from align_jax import data, models, sharding, worlds
from align_jax.errors import InputError
from align_jax.evals import reward_model
from align_jax.phases import preference, reward, scorers, sft, workspace
from configs import preference as preference_config
from configs import reward as reward_config
from configs import sft as sft_config

WORLD = "microworld:n=24"
LENGTH = 46
TOLERANCE = dict(rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Workdirs of one tiny policy, and of reward models, ensembles and preference runs made of it."""
  root = tmp_path_factory.mktemp("runs")
  settings = sft_config.get_config()
  settings.model.scratch.update(layers=1, embed_dim=32, heads=2, kv_heads=2, mlp_dim=64)
  settings.data.update(train=WORLD, eval=None, batch_size=8)
  settings.loop.update(steps=2, eval_every=0)
  _run(sft.run, sft.SftConfig, settings, root / "sft")
  for name, module, cls, file in (
    ("reward", reward, reward.RewardConfig, reward_config),
    ("trunk", reward, reward.RewardConfig, reward_config),
    ("whole", reward, reward.RewardConfig, reward_config),
    ("dpo", preference, preference.PreferenceConfig, preference_config),
  ):
    settings = file.get_config()
    settings.model.update(init=str(root / "sft"), remat="none")
    settings.data.update(train=WORLD, eval=None, batch_size=8)
    settings.loop.update(steps=3, eval_every=0)
    settings.optimizer.update(learning_rate=0.01)
    if name == "dpo":
      settings.objective.beta = 0.3
    if name in ("trunk", "whole"):
      share = "nothing" if name == "whole" else "trunk"
      settings.layout = "padded"
      settings.ensemble = config_dict.create(members=2, share=share)
    _run(module.run, cls, settings, root / name)
  return root


def _run(run, cls, settings, folder):
  run(config_lib.build(cls, settings.to_dict()), str(folder), jax.devices()[:1])


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def pairs():
  world = worlds.Microworld(seed=0)
  return world.preferences(11, split="heldout", labeller=worlds.Labeller(), seed=3)


@pytest.fixture(scope="module")
def texts(pairs):
  """(prompts, responses), chosen and rejected of a pair as neighbours."""
  rows = [(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
  return [prompt for prompt, _ in rows], [text for _, text in rows]


def _altered(folder, copy, **changes):
  """A copy of a workdir whose JSON files `changes` have been made to; the weights are links."""
  copy.mkdir()
  for file in folder.iterdir():
    (copy / file.name).symlink_to(file)
  for name, change in changes.items():
    file = copy / f"{name}.json"
    values = json.loads(file.read_text())
    change(values)
    file.unlink()
    file.write_text(json.dumps(values))
  return copy


def _open(source, mesh, **changes):
  return scorers.open_scorer(str(source), mesh, **dict(length=LENGTH, batch_size=8) | changes)


@functools.partial(jax.jit, static_argnums=0)
def _hidden(model, params, tokens):
  """[1, T, D] of one row without padding."""
  return model.apply({"params": params}, tokens[None], method="hidden")


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens):
  return model.apply({"params": params}, tokens[None])[0]


def _alone(model, params, encoded):
  """Log-probs of the response [T-1] and the mask, of one row without padding."""
  logits = _logits(model, params, encoded.tokens)
  logprobs = jax.nn.log_softmax(np.asarray(logits, np.float64), axis=-1)
  picked = np.take_along_axis(np.asarray(logprobs)[:-1], encoded.tokens[1:, None], axis=1)[:, 0]
  return picked[encoded.response_mask[1:]].sum()


@pytest.mark.parametrize("source", ["reward", "implicit:dpo"])
def test_scores_do_not_depend_on_batch_padding_or_order(runs, mesh, texts, source):
  prompts, responses = texts
  source = source.replace("dpo", str(runs / "dpo")) if ":" in source else runs / source
  expected = _open(source, mesh, batch_size=len(responses))(prompts, responses)
  assert np.ptp(expected.rewards) > 1e-3 and len(set(expected.lengths)) > 3
  for batch_size, length in ((1, LENGTH), (3, LENGTH), (8, 61), (64, 50)):
    found = _open(source, mesh, batch_size=batch_size, length=length)(prompts, responses)
    np.testing.assert_allclose(found.rewards, expected.rewards, **TOLERANCE)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
  order = np.random.default_rng(0).permutation(len(responses))
  shuffled = _open(source, mesh)([prompts[i] for i in order], [responses[i] for i in order])
  np.testing.assert_allclose(shuffled.rewards, expected.rewards[order], **TOLERANCE)
  one = _open(source, mesh)(prompts[:1], responses[:1])
  np.testing.assert_allclose(one.rewards, expected.rewards[:1], **TOLERANCE)


def test_over_eight_devices_scores_are_the_same(runs, mesh, texts):
  spread = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
  for source in (runs / "reward", f"implicit:{runs / 'dpo'}"):
    expected, found = _open(source, mesh)(*texts), _open(source, spread)(*texts)
    np.testing.assert_allclose(found.rewards, expected.rewards, **TOLERANCE)


def test_a_reward_models_scores_are_those_of_its_evaluation(runs, mesh, texts, pairs):
  found = _open(runs / "reward", mesh)(*texts)
  loaded = workspace.load(str(runs / "reward"), mesh)
  batches = data.preference_batches(
    pairs, loaded.tokenizer, length=LENGTH, batch_size=4, epochs=1, shuffle=False, pad_last=True
  )
  rewards, lengths = reward_model.pair_rewards(
    loaded.model, {"params": loaded.params}, loaded.head, batches
  )
  np.testing.assert_allclose(found.rewards.reshape(-1, 2), rewards, **TOLERANCE)
  np.testing.assert_array_equal(found.lengths.reshape(-1, 2), lengths)
  assert found.rewards.dtype == np.float64 and found.members is None


@pytest.mark.parametrize("name", ["trunk", "whole"])
def test_an_ensembles_members_are_scored_one_by_one_and_meaned(runs, mesh, texts, name):
  found = _open(runs / name, mesh)(*texts)
  members = workspace.load_members(str(runs / name), mesh)
  assert found.members.shape == (2, len(texts[1])) and len(members) == 2
  encoded = [data.encode_response(*text, members[0].tokenizer, LENGTH) for text in zip(*texts)]
  for member, rewards in zip(members, found.members):
    hidden = [_hidden(member.model, member.params, e.tokens)[0, -1] for e in encoded]
    expected = np.array(hidden) @ np.array(member.head["kernel"]) + float(member.head["bias"])
    np.testing.assert_allclose(rewards, expected, **TOLERANCE)
  assert np.abs(np.diff(found.members, axis=0)).max() > 1e-3
  np.testing.assert_allclose(found.rewards, found.members.mean(axis=0), rtol=1e-12)


def test_averaged_weights_are_one_reward_model(runs, mesh, texts):
  source = f"average:{runs / 'whole'}"
  found, averaged = _open(source, mesh)(*texts), workspace.load(source, mesh)
  encoded = data.encode_response(texts[0][0], texts[1][0], averaged.tokenizer, LENGTH)
  hidden = _hidden(averaged.model, averaged.params, encoded.tokens)
  by_hand = models.scalar_head(averaged.head, hidden)[0, -1]
  np.testing.assert_allclose(found.rewards[0], by_hand, **TOLERANCE)
  assert found.members is None


def test_an_implicit_reward_is_beta_times_the_log_ratio(runs, mesh, texts):
  """Against softmaxes in float64 over one row at a time, without padding."""
  prompts, responses = texts
  policies = [workspace.load(str(runs / name), mesh) for name in ("dpo", "sft")]
  expected, lengths = [], []
  for prompt, response in zip(prompts, responses):
    encoded = data.encode_response(prompt, response, policies[0].tokenizer, LENGTH)
    ours, theirs = (_alone(p.model, p.params, encoded) for p in policies)
    expected.append(0.3 * (ours - theirs))
    lengths.append(encoded.response_mask.sum())
  found = _open(f"implicit:{runs / 'dpo'}", mesh)(prompts, responses)
  np.testing.assert_allclose(found.rewards, expected, atol=2e-5)
  np.testing.assert_array_equal(found.lengths, lengths)
  spelt = f"implicit:{runs / 'dpo'},{runs / 'sft'},beta=0.6"
  np.testing.assert_allclose(_open(spelt, mesh)(*texts).rewards, 2 * found.rewards, rtol=1e-12)
  itself = f"implicit:{runs / 'sft'},{runs / 'sft'},beta=1"
  assert not _open(itself, mesh)(*texts).rewards.any()


def test_an_objective_on_means_has_means_as_its_rewards(runs, mesh, texts, tmp_path):
  def mean(config):
    config["objective"].update(name="ipo_mean", beta=None, tau=0.2)

  copy = _altered(runs / "dpo", tmp_path / "ipo_mean", config=mean)
  found, sums = (
    _open(f"implicit:{copy}", mesh)(*texts),
    _open(f"implicit:{runs / 'dpo'}", mesh)(*texts),
  )
  np.testing.assert_allclose(found.rewards, sums.rewards / 0.3 * 0.2 / sums.lengths, rtol=1e-9)


def test_the_reference_is_found_from_any_folder(runs, mesh, texts, tmp_path, monkeypatch):
  """A run was started with a relative path: its model.json knows where the model lay."""
  _altered(
    runs / "dpo",
    tmp_path / "dpo",
    config=lambda c: c["model"].update(init="elsewhere/sft"),
    lineage=lambda x: [p.update(path="elsewhere/sft") for p in x["parents"]],
  )
  monkeypatch.chdir(tmp_path)
  expected = _open(f"implicit:{runs / 'dpo'}", mesh)(*texts)
  np.testing.assert_array_equal(_open("implicit:dpo", mesh)(*texts).rewards, expected.rewards)


def test_the_same_text_is_scored_once(runs, mesh, texts, monkeypatch):
  prompts, responses = texts
  scorer, rows = _open(runs / "reward", mesh, batch_size=4), []

  def counted(batch):
    rows.extend({tuple(row) for row in np.asarray(batch["tokens"]).tolist()})
    return scorer.score(batch)

  twice = dataclasses.replace(scorer, score=counted)
  found = twice([*prompts, *prompts, prompts[0]], [*responses, *responses, responses[1]])
  expected = scorer(prompts, responses)
  count = len({(p[0]["content"], r) for p, r in zip(prompts, responses)})
  assert len(rows) == count and count <= len(responses)
  again = np.concatenate([expected.rewards, expected.rewards, expected.rewards[1:2]])
  np.testing.assert_allclose(found.rewards, again, **TOLERANCE)


def test_long_texts_are_cut_as_in_training_and_counted(runs, mesh, texts, caplog):
  prompts, responses = texts
  length = 20
  loaded = workspace.load(str(runs / "reward"), mesh)
  whole = [data.encode_response(*text, loaded.tokenizer, 2**20) for text in zip(*texts)]
  long = np.array([len(e.tokens) > length for e in whole])
  assert 0 < long.sum() < len(long)
  with caplog.at_level(logging.WARNING):
    found = _open(runs / "reward", mesh, length=length)(prompts, responses)
  np.testing.assert_array_equal(found.truncated, long)
  np.testing.assert_array_equal(found.lengths, [e.response_mask.sum() for e in whole])
  different = len({(p[0]["content"], r) for p, r in zip(prompts, responses)})
  assert f"of {different} texts were longer than {length} tokens and were cut" in caplog.text
  full = _open(runs / "reward", mesh)(prompts, responses)
  assert not full.truncated.any()
  np.testing.assert_allclose(found.rewards[~long], full.rewards[~long], **TOLERANCE)
  # A cut row is read at the last token that is left of its response.
  place = int(np.flatnonzero(long)[0])
  cut = data.encode_response(prompts[place], responses[place], loaded.tokenizer, length)
  hidden = _hidden(loaded.model, loaded.params, cut.tokens)
  by_hand = models.scalar_head(loaded.head, hidden)[0, np.flatnonzero(cut.response_mask)[-1]]
  np.testing.assert_allclose(found.rewards[place], by_hand, **TOLERANCE)


def test_the_longer_one_needs_no_model(runs, mesh):
  prompts = [({"role": "user", "content": "a question"},)] * 3
  responses = ["yes", "yes it is so", "no"]
  characters = _open("longer", mesh)(prompts, responses)
  assert characters.rewards.tolist() == [3, 12, 2] == characters.lengths.tolist()
  tokens = _open(f"longer:{runs / 'sft'}", mesh, length=1)(prompts, responses)
  assert tokens.rewards.tolist() == [2, 5, 2] == tokens.lengths.tolist()  # their end included
  assert not tokens.truncated.any()


@pytest.mark.parametrize(
  "source, message",
  [
    ("", "a scorer is '<workdir of a reward model>', 'average:<several of them>'"),
    ("reward:here", "'reward:here' is no reward model: a scorer is"),
    ("{sft}", "is a policy: what it prefers is scored by 'implicit:"),
    ("implicit:", "does not say what is scored"),
    ("implicit:{dpo},{sft}", "does not say what is scored"),
    ("implicit:{dpo},{sft},beta=0", "does not say what is scored"),
    ("implicit:{dpo},{sft},beta=x", "does not say what is scored"),
    (
      "implicit:{sft}",
      "is no preference run with a reference: write 'implicit:<policy>,<reference>",
    ),
    ("implicit:nowhere", "config.json is missing"),
    ("implicit:{dpo},{reward},beta=1", "reward is a reward model: an implicit reward is of two"),
    ("longer:nowhere", "nowhere is no folder"),
  ],
)
def test_bad_sources_say_what_is_expected(runs, mesh, source, message):
  paths = {name: runs / name for name in ("sft", "dpo", "reward")}
  with pytest.raises(InputError, match=message):
    _open(source.format(**paths), mesh)


def test_bad_sizes_and_texts_are_said(runs, mesh):
  with pytest.raises(InputError, match="has 64 positions: rows of 65 tokens do not fit"):
    _open(runs / "reward", mesh, length=65)
  with pytest.raises(InputError, match="length and batch_size must be positive"):
    _open("longer", mesh, batch_size=0)
  special = workspace.load(str(runs / "sft"), mesh).tokenizer.all_special_tokens[0]
  prompts = [({"role": "user", "content": "hello"},)] * 2
  with pytest.raises(InputError, match="b.jsonl:2: message 1 contains the special token"):
    _open(runs / "reward", mesh)(prompts, ["yes", f"no {special}"], ["b.jsonl:1", "b.jsonl:2"])
  with pytest.raises(ValueError, match="2 prompts for 1 responses"):
    _open("longer", mesh)(prompts, ["yes"])


def test_runs_whose_reference_is_not_there_are_refused(runs, mesh, tmp_path):
  moved = _altered(
    runs / "dpo", tmp_path / "moved", config=lambda c: c["objective"].update(sync_every=5)
  )
  with pytest.raises(InputError, match="moved its reference while it trained"):
    _open(f"implicit:{moved}", mesh)
  none = _altered(
    runs / "dpo", tmp_path / "none", lineage=lambda x: x.update(parents=x["parents"][:1])
  )
  with pytest.raises(InputError, match="none is no preference run with a reference"):
    _open(f"implicit:{none}", mesh)
