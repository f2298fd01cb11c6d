"""Reward modelling as a phase: what it learns from, ensembles, the scale of a reward, what it refuses."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from align_jax import config as config_lib
from align_jax import data, sharding, worlds
from align_jax.errors import InputError
from align_jax.phases import pipeline, reward, scorers, workspace
from align_jax.training import checkpoints, loop, objectives
from configs import quickstart, reward_ensemble
from configs import reward as reward_file

WORLD = worlds.Microworld(seed=0)
LENGTH = 46
SCALE = {"source": "microworld:n=16,draw=9", "n": 16, "std": True}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """A folder with two tiny policies, `sft` and `other`."""
  root, settings = tmp_path_factory.mktemp("reward"), quickstart.get_config()
  settings.sft.model.scratch.update(layers=1, embed_dim=32, heads=2, kv_heads=2, mlp_dim=64)
  settings.sft.data.update(train="microworld:n=32", eval="", batch_size=8)
  settings.sft.data.eval = None
  settings.sft.loop.update(steps=2, eval_every=0)
  config = config_lib.build(
    pipeline.PipelineConfig, pipeline.resolve(settings.to_dict(), str(root))
  )
  for name, seed in (("sft", 0), ("other", 1)):
    task = pipeline.tasks(config, root)[0]
    task.train(dataclasses.replace(task.config, seed=seed), str(root / name), jax.devices()[:1])
  return root


def _settings(root, file=reward_file, **changes):
  config = file.get_config()
  config.model.init = str(root / "sft")
  config.data.update(train="microworld:n=48", eval="microworld:n=8,split=heldout", batch_size=8)
  config.loop.update(steps=4, eval_every=0, checkpoint_every=2)
  values = config.to_dict()
  for name, value in changes.items():
    *path, last = name.split("__")
    section = values
    for part in path:
      section = section[part]
    section[last] = value
  return config_lib.build(reward.RewardConfig, values)


def _train(config, folder, devices=1):
  reward.run(config, str(folder), jax.devices()[:devices])
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _mesh(devices=1):
  return sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:devices])


def _score(source, n=6, **options):
  """Rewards of held-out pairs' chosen answers."""
  pairs = WORLD.preferences(n, "heldout")
  scorer = scorers.open_scorer(str(source), _mesh(), length=LENGTH, batch_size=8, **options)
  return scorer([pair.prompt for pair in pairs], [pair.chosen for pair in pairs])


ENSEMBLES = {
  "nothing": {},
  "base": {"ensemble__share": "base", "model__lora__rank": 2},
  "trunk": {"ensemble__share": "trunk", "ensemble__bootstrap": True, "layout": "shared"},
}


@pytest.mark.parametrize("share", ENSEMBLES)
def test_an_ensemble_is_read_back_as_members_that_differ(root, tmp_path, share):
  config = _settings(root, reward_ensemble, ensemble__members=3, **ENSEMBLES[share])
  lines = _train(config, tmp_path)
  assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
  members = workspace.load_members(str(tmp_path), _mesh())
  assert len(members) == 3 and workspace.member_count(str(tmp_path)) == 3
  found = _score(tmp_path)
  assert found.members.shape == (3, 6) and np.all(found.members.std(axis=0) > 1e-4)
  np.testing.assert_allclose(found.rewards, found.members.mean(axis=0), rtol=1e-6)
  if share == "trunk":
    mean = workspace.load(str(tmp_path), _mesh()).head
    np.testing.assert_allclose(
      mean["kernel"], sum(m.head["kernel"] for m in members) / 3, rtol=1e-6
    )
  else:
    with pytest.raises(InputError, match="is an ensemble of 3 reward models"):
      workspace.load(str(tmp_path), _mesh())


def test_a_member_is_what_training_it_alone_gives(root, tmp_path):
  """The second of two members under vmap, and a run of one reward model with its seed."""
  _train(_settings(root, reward_ensemble, ensemble__members=2), tmp_path / "both")
  _train(_settings(root, layout="padded", seed=1), tmp_path / "alone")
  both, alone = _score(tmp_path / "both"), _score(tmp_path / "alone")
  np.testing.assert_allclose(both.members[1], alone.rewards, rtol=1e-3, atol=1e-4)
  assert np.abs(both.members[0] - alone.rewards).max() > 1e-2


def test_an_ensemble_resumes_bit_exactly(root, tmp_path, monkeypatch):
  config = _settings(root, reward_ensemble, ensemble__members=2)
  whole = _train(config, tmp_path / "whole")
  cut = dataclasses.replace(config)
  fit = loop.fit

  def until_two(state, **options):
    return fit(state, **options | {"config": dataclasses.replace(options["config"], steps=2)})

  monkeypatch.setattr(loop, "fit", until_two)
  reward.run(cut, str(tmp_path / "cut"), jax.devices()[:1])
  (tmp_path / "cut" / "lineage.json").unlink()
  monkeypatch.setattr(loop, "fit", fit)
  again = _train(cut, tmp_path / "cut")
  assert [line["loss"] for line in whole if "loss" in line][2:] == [
    line["loss"] for line in again if "loss" in line
  ][2:]
  found = [_score(tmp_path / name).members for name in ("whole", "cut")]
  np.testing.assert_array_equal(*found)


def test_members_may_begin_with_trunks_of_their_own_and_one_head(root, tmp_path):
  trunks = (str(root / "sft"), str(root / "other"))
  config = _settings(
    root, reward_ensemble, ensemble__members=2, ensemble__trunks=trunks, ensemble__same_head=True
  )
  built = reward._trainable(
    config,
    workspace.start(config.model, _mesh(), seed=0),
    reward.head_of(config, ()),
    _mesh(),
  )[0]
  np.testing.assert_array_equal(built["head"]["kernel"][0], built["head"]["kernel"][1])
  for i, name in enumerate(trunks):
    loaded = workspace.load(name, _mesh()).params
    jax.tree.map(
      lambda stacked, own, i=i: np.testing.assert_array_equal(stacked[i], own),
      built["trunk"],
      loaded,
    )


def test_the_average_of_the_weights_is_one_reward_model(root, tmp_path):
  _train(_settings(root, reward_ensemble, ensemble__members=2), tmp_path)
  members = workspace.load_members(str(tmp_path), _mesh())
  averaged = workspace.load(f"average:{tmp_path}", _mesh())
  for get in (lambda m: m.params, lambda m: m.head):
    jax.tree.map(
      lambda a, x, y: np.testing.assert_allclose(a, (x + y) / 2, rtol=1e-6, atol=1e-7),
      *(get(m) for m in (averaged, *members)),
    )
  with pytest.raises(InputError, match="two reward models or more"):
    workspace.load(f"average:{root / 'sft'}", _mesh())


@pytest.mark.parametrize("changes", [{}, ENSEMBLES["nothing"] | {"ensemble": True}])
def test_the_scale_is_that_of_reference_replies(root, tmp_path, changes):
  if changes.pop("ensemble", False):
    config = _settings(root, reward_ensemble, ensemble__members=2, normalise=SCALE)
  else:
    config = _settings(root, normalise=SCALE)
  _train(config, tmp_path)
  replies = WORLD.demonstrations(16, seed=9)
  scorer = scorers.open_scorer(str(tmp_path), _mesh(), length=LENGTH, batch_size=8)
  found = scorer([r.messages[:-1] for r in replies], [r.messages[-1]["content"] for r in replies])
  values = found.rewards[None] if found.members is None else found.members
  np.testing.assert_allclose(values.mean(axis=1), 0.0, atol=1e-4)
  np.testing.assert_allclose(values.std(axis=1), 1.0, atol=1e-4)


def _votes_file(folder):
  file = folder / "votes.jsonl"
  rows = [
    data.to_row(dataclasses.replace(pair, labels={"u": 1.0, "v": float(i % 2), "w": 0.5}))
    for i, pair in enumerate(WORLD.preferences(24))
  ]
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(file)


@pytest.mark.parametrize("votes", ["soft", "majority", "agreement", "heads", "spread"])
def test_votes_of_several_labellers(root, tmp_path, votes):
  centering = 0.0 if votes == "spread" else 0.01
  file = _votes_file(tmp_path)
  config = _settings(root, data__train=file, data__eval=file, votes=votes, centering=centering)
  lines = _train(config, tmp_path / "run")
  head = json.loads((tmp_path / "run" / "model.json").read_text())["head"]
  expected = {"heads": ["u", "v", "w"], "spread": ["mean", "log_std"]}.get(votes, ["reward"])
  assert head["outputs"] == expected
  assert ("rewards/rater_std" in lines[1]) == (votes == "spread")
  assert np.isfinite(_score(tmp_path / "run").rewards).all()


def test_votes_must_be_settled_and_a_setting_must_be_used(root, tmp_path):
  with pytest.raises(InputError, match="config.votes must say what becomes of them"):
    _train(_settings(root, data__train=_votes_file(tmp_path)), tmp_path / "a")
  with pytest.raises(InputError, match="votes='soft' is not used: no record has"):
    _train(_settings(root, votes="soft"), tmp_path / "b")


def test_ranked_lists_and_ratings(root, tmp_path):
  rankings, ratings = tmp_path / "rankings.jsonl", tmp_path / "ratings.jsonl"
  pairs = WORLD.preferences(24)
  rows = [
    {
      "prompt": list(p.prompt),
      "responses": [p.rejected, p.chosen, p.chosen + " ."],
      "ranks": [2, 1, 2],
    }
    for p in pairs
  ]
  rankings.write_text("".join(json.dumps(row) + "\n" for row in rows))
  rows = [
    {"prompt": list(p.prompt), "completion": p.chosen, "ratings": {"a": i % 3, "b": 1.0}}
    for i, p in enumerate(pairs)
  ]
  ratings.write_text("".join(json.dumps(row) + "\n" for row in rows))
  common = {"layout": "padded"}
  config = _settings(
    root,
    records="rankings",
    ranking_loss="pairs",
    data__train=str(rankings),
    data__eval=str(rankings),
    **common,
  )
  assert {"eval/loss", "eval/rewards/accuracy"} <= set(_train(config, tmp_path / "lists")[0])
  config = _settings(
    root,
    records="ratings",
    aspects=("a", "b"),
    aspect_weights=(1.0, -0.5),
    centering=0.0,
    data__train=str(ratings),
    data__eval=str(ratings),
    **common,
  )
  assert "eval/ratings/b/error" in _train(config, tmp_path / "rated")[0]
  # The one reward is the weighted sum of what the two heads say.
  raw = checkpoints.load_params(
    tmp_path / "rated",
    {
      "trunk": workspace.abstract_params(workspace.load(str(root / "sft"), _mesh()).model, _mesh()),
      "head": workspace.abstract_head(workspace.load(str(root / "sft"), _mesh()).model, _mesh(), 2),
    },
  )
  one = workspace.load(str(tmp_path / "rated"), _mesh()).head
  np.testing.assert_allclose(
    one["kernel"], raw["head"]["kernel"] @ np.float32([1, -0.5]), rtol=1e-5
  )


def test_the_head_learns_alone_at_first(root, tmp_path):
  _train(_settings(root, head_first=3, loop__checkpoint_every=1, loop__keep=9), tmp_path)
  mesh, sft = _mesh(), workspace.load(str(root / "sft"), _mesh())
  abstract = {
    "trunk": workspace.abstract_params(sft.model, mesh),
    "head": workspace.abstract_head(sft.model, mesh),
  }
  after = {s: checkpoints.load_params(tmp_path, abstract, step=s) for s in (1, 3, 4)}
  same = [jax.tree.map(np.array_equal, after[s]["trunk"], sft.params) for s in (1, 3, 4)]
  assert all(jax.tree.leaves(same[0])) and all(jax.tree.leaves(same[1]))
  assert not all(jax.tree.leaves(same[2]))
  assert np.any(after[1]["head"]["kernel"] != after[3]["head"]["kernel"])


def test_two_heads_keep_the_one_that_is_blind_to_length(root, tmp_path):
  debias = {"correlation": 1.0, "orthogonality": 1.0}
  lines = _train(_settings(root, debias=debias, centering=0.0), tmp_path)
  assert "rewards/length_penalty" in lines[1]
  sft = workspace.load(str(root / "sft"), _mesh())
  raw = checkpoints.load_params(
    tmp_path,
    {
      "trunk": workspace.abstract_params(sft.model, _mesh()),
      "head": workspace.abstract_head(sft.model, _mesh(), 2),
    },
  )
  kept = workspace.load(str(tmp_path), _mesh()).head
  np.testing.assert_allclose(kept["kernel"], raw["head"]["kernel"][:, 0], rtol=1e-6)


def test_an_ensemble_on_eight_devices_is_that_on_one(root, tmp_path):
  config = _settings(root, reward_ensemble, ensemble__members=2)
  config = dataclasses.replace(config, mesh=sharding.MeshConfig(data=2, fsdp=2, tensor=2))
  _train(config, tmp_path / "eight", devices=8)
  one = dataclasses.replace(config, mesh=sharding.MeshConfig())
  _train(one, tmp_path / "one")
  np.testing.assert_allclose(
    _score(tmp_path / "eight").members, _score(tmp_path / "one").members, rtol=1e-3, atol=2e-4
  )


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"votes": "mean"}, "config.votes must be one of soft, majority"),
    ({"ties": "rao_kupper"}, "tie_theta and ties='rao_kupper' go together"),
    ({"tie_theta": 2.0}, "tie_theta and ties='rao_kupper' go together"),
    ({"ties": "rao_kupper", "tie_theta": 1.0}, "tie_theta must be above 1"),
    ({"records": "rankings"}, "ranking_loss and records='rankings' go together"),
    ({"ranking_loss": "pairs"}, "ranking_loss and records='rankings' go together"),
    ({"records": "rankings", "ranking_loss": "pairs"}, "layout must be 'padded'"),
    ({"records": "ratings"}, "aspects and aspect_weights"),
    ({"aspects": ("a",), "aspect_weights": (1.0,)}, "aspects and aspect_weights"),
    ({"records": "ratings", "votes": "soft"}, "config.votes is for records='pairs'"),
    ({"votes": "spread"}, "centering is not used with votes='spread'"),
    ({"votes": "spread", "centering": 0.0, "label_smoothing": 0.1}, "label_smoothing is not used"),
    ({"debias": {}}, "centering is not used with debias"),
    ({"debias": {}, "centering": 0.0, "accumulate": 2}, "accumulate must be 1"),
    ({"debias": {}, "votes": "heads", "centering": 0.0}, "cannot go together"),
    ({"ensemble": {"members": 1}}, "members must be at least 2"),
    ({"ensemble": {"members": 2}}, "layout must be 'padded'"),
    ({"ensemble": {"members": 2, "share": "base"}}, "'base' with model.lora"),
    ({"ensemble": {"members": 2, "share": "all"}}, "share must be one of nothing, base, trunk"),
    ({"ensemble": {"members": 2, "bootstrap": True}}, "bootstrap is for share 'trunk'"),
    ({"ensemble": {"members": 3, "trunks": ("a", "b")}}, "one for each member"),
    ({"ensemble": {"members": 2, "share": "trunk"}, "accumulate": 2}, "accumulate must be 1"),
    ({"normalise": {"source": "x", "n": 1}}, "normalise.n must be at least 2"),
    ({"head_first": 4}, "head_first must be in"),
  ],
)
def test_settings_that_cannot_be(root, changes, message):
  with pytest.raises(InputError, match=message):
    _settings(root, **changes)


def test_scores_do_not_depend_on_the_head_having_been_wide(root, tmp_path):
  """An ensemble's first member, read from its workdir, is the head of that column."""
  config = _settings(root, reward_ensemble, ensemble__members=2, **ENSEMBLES["trunk"])
  _train(config, tmp_path)
  member = workspace.load_members(str(tmp_path), _mesh())[0]
  pair = WORLD.preferences(1, "heldout")[0]
  encoded = data.encode_response(pair.prompt, pair.chosen, member.tokenizer, LENGTH)
  rows = (
    encoded.tokens[None],
    np.ones((1, len(encoded.tokens)), np.int32),
    encoded.response_mask[None],
  )
  alone = objectives.response_scores(member.model, {"params": member.params}, member.head, *rows)
  np.testing.assert_allclose(_score(tmp_path, n=1).members[0], alone, rtol=1e-5, atol=1e-6)
