"""Rewards by their settings: what is refused before a model is loaded, and what is built."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from align_jax import config as config_lib
from align_jax import data, models, rl, sampling, worlds
from align_jax.errors import InputError
from align_jax.phases import evaluate, online, records, workspace
from align_jax.phases import rewards as rewards_phase
from align_jax.phases.rewards import RewardConfig
from align_jax.rl import rewards
from align_jax.rl.rollouts import Rollout
from configs import smollm2_grpo

PROMPTS = [
  data.Prompt(({"role": "user", "content": "2 + 2?"},), {"answer": "#### 4", "p": r"\d"}, "f.jsonl:1"),
  data.Prompt(({"role": "user", "content": "1 + 1?"},), {"answer": 2, "p": "two"}, "f.jsonl:2"),
]  # fmt: skip


def shout(prompts, texts):
  """Counts exclamation marks: a reward function by name, for these tests."""
  del prompts
  return np.array([text.count("!") for text in texts])


def _config(**settings):
  return config_lib.build(RewardConfig, settings, "config.rewards.x")


def _check(prompts=PROMPTS, source="f.jsonl", reward_model=None, **terms):
  configs = {name: _config(**settings) for name, settings in terms.items()}
  rewards_phase.check(configs, prompts, prompts_source=source, reward_model=reward_model)


def _build(prompts=PROMPTS, source="f.jsonl", reward_model=None, reference=None, **terms):
  _check(prompts, source, reward_model, **terms)
  return rewards_phase.build(
    {name: _config(**settings) for name, settings in terms.items()},
    prompts_source=source,
    reward_model=reward_model,
    policy=types.SimpleNamespace(tokenizer=Tokenizer()),
    mesh=None,
    dtype="float32",
    reference=reference,
  )


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"kind": "exakt"}, "kind must be one of model, ensemble"),
    ({"kind": "exact", "pattern": "a"}, "pattern is not a setting of RewardConfig"),
    ({"kind": "exact", "text": "a"}, "text is not used by a reward of kind 'exact'"),
    ({"kind": "gold", "source": "a"}, "source is not used"),
    ({"kind": "lower", "at_most": 3}, "at_most is not used"),
    ({"kind": "numeric", "where": "first"}, "where must be one of last, marked, only"),
    ({"kind": "numeric", "tolerance": -1.0}, "tolerance must be in"),
    ({"kind": "choice", "letters": "A"}, "letters must be two or more"),
    ({"kind": "choice", "letters": "ABA"}, "letters must be two or more"),
    ({"kind": "regex"}, "needs text or field, and not both"),
    ({"kind": "contains", "text": "a", "field": "b"}, "needs text or field, and not both"),
    ({"kind": "words"}, "give one or both"),
    ({"kind": "words", "at_least": 5, "at_most": 4}, "1 <= at_least <= at_most"),
    ({"kind": "sentences", "at_most": 0}, "1 <= at_least <= at_most"),
    ({"kind": "length", "target": 0}, "target must be at least 1"),
    ({"kind": "model", "standardise": 1}, "at least 2 responses"),
    ({"kind": "ensemble", "source": "", "combine": "mean"}, "two workdirs or more"),
    ({"kind": "ensemble", "source": "a,a", "combine": "mean"}, "two workdirs or more"),
    ({"kind": "ensemble", "source": "a,b"}, "combine must be one of mean, min, uwo"),
    (
      {"kind": "ensemble", "source": "a,b", "combine": "min"},
      "offsets are arbitrary: set standard",
    ),
    (
      {"kind": "ensemble", "source": "a,b", "combine": "uwo", "standardise": 8},
      "variance_coef is for combine='uwo'",
    ),
    (
      {"kind": "ensemble", "source": "a,b", "combine": "mean", "variance_coef": 0.0},
      "variance_coef is for combine='uwo'",
    ),
    ({"kind": "function", "source": "math.sqrt"}, "is written 'module:name'"),
    ({"kind": "function", "source": "no_such_module:f"}, "No module named"),
    ({"kind": "function", "source": "math:root"}, "no attribute 'root'"),
    ({"kind": "function", "source": "math:pi"}, "is not a function"),
  ],
)
def test_settings_are_refused_when_they_are_made(settings, message):
  with pytest.raises(InputError, match=message):
    _config(**settings)


def test_every_kind_takes_some_settings_and_every_setting_is_some_kinds():
  used = {name for names in rewards_phase.USES.values() for name in names}
  assert used | {"kind", "weight"} == {f.name for f in dataclasses.fields(RewardConfig)}


@pytest.mark.parametrize(
  "terms, message",
  [
    ({}, "at least one reward"),
    ({"g": {"kind": "gold"}}, "config.rewards.g: kind 'gold' judges microworld prompts only"),
    ({"m": {"kind": "model"}}, "config.rewards.m: set source, or config.reward_model"),
    ({"m": {"kind": "model", "source": "no/where"}}, "no/where is not the workdir of a reward"),
    (
      {"c": {"kind": "choice"}},
      "config.rewards.c: f.jsonl:1: field 'answer': no letter of ABCD in the reference",
    ),
    ({"e": {"kind": "exact", "field": "solution"}}, "e: f.jsonl:1: field 'solution' is missing"),
    ({"n": {"kind": "numeric", "field": "p"}}, "n: f.jsonl:1: field 'p': no single number"),
    ({"r": {"kind": "regex", "text": "("}}, "config.rewards.r: text is no regular expression"),
    ({"s": {"kind": "contains", "text": "?!"}}, "config.rewards.s: a phrase to look for"),
  ],
)
def test_what_fails_without_a_model_fails_before_one_is_loaded(terms, message):
  with pytest.raises(InputError, match=message):
    _check(**terms)


def test_a_bad_reference_is_named_by_file_line_and_field(tmp_path):
  file = tmp_path / "a.jsonl"
  rows = [{"q": "1?", "a": "1"}, {"q": "2?", "a": "two"}, {"q": "3?", "a": "("}]
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  prompts = records.read(str(file), "prompts", columns="prompt=q,answer=a")
  with pytest.raises(InputError, match="a.jsonl:2: field 'answer': no single number in .*'two'"):
    _check(prompts, n={"kind": "numeric"})
  with pytest.raises(InputError, match="a.jsonl:3: field 'answer' is no regular expression"):
    _check(prompts, r={"kind": "regex", "field": "answer"})


def _rollout(prompts, texts, new=3):
  rows = len(texts)
  mask = np.zeros((rows, 8), bool)
  mask[:, 2 : 2 + new] = True
  samples = sampling.Samples(
    np.full((rows, 8), 5, np.int32), np.full(rows, 2), mask, np.zeros((rows, 8)), np.ones(rows, bool)
  )  # fmt: skip
  return Rollout(prompts, texts, samples)


def test_terms_are_built_in_order_and_score_what_they_say():
  terms, judges = _build(
    right={"kind": "numeric", "weight": 2.0},
    only={"kind": "numeric", "where": "only"},
    same={"kind": "exact"},
    pattern={"kind": "regex", "field": "p"},
    polite={"kind": "ends_with", "text": "thank you"},
    brief={"kind": "words", "at_most": 2},
    small={"kind": "lower"},
    loud={"kind": "function", "source": f"{__name__}:shout", "weight": -0.5},
    tokens={"kind": "length", "weight": 0.0},
    near={"kind": "length", "target": 4},
  )
  assert judges == {}
  scores = rewards.score(terms, _rollout(PROMPTS, ["It is 4. Thank you!", "two"]))
  values = {name: list(map(float, row)) for name, row in scores.items()}
  assert list(values) == [
    "right", "only", "same", "pattern", "polite", "brief", "small", "loud", "tokens", "near", ""
  ]  # fmt: skip
  assert values == {
    "right": [1, 0], "only": [0, 0], "same": [0, 0], "pattern": [0, 1], "polite": [1, 0],
    "brief": [0, 1], "small": [0, 1], "loud": [1, 0], "tokens": [3, 3], "near": [0.75, 0.75],
    "": [2 + 1 - 0.5 + 0.75, 1 + 1 + 1 + 0.75],
  }  # fmt: skip


def test_the_gold_judge_is_that_of_the_prompts_world():
  source = "microworld:n=4,seed=3"
  prompts = records.read(source, "prompts")
  (term,), _ = _build(prompts, source, gold={"kind": "gold", "weight": 0.0})
  world = worlds.Microworld(seed=3)
  texts = [world.ideal(prompt) for prompt in prompts]
  np.testing.assert_allclose(
    term.function(_rollout(prompts, texts)), world.gold_rewards(prompts, texts)
  )
  assert term.weight == 0


class Tokenizer:
  """Stands for the policy's and the reward models'."""

  def get_vocab(self):
    return {"a": 0}


@pytest.fixture
def judge_folders(tmp_path, tiny_model, monkeypatch):
  """Three workdirs of reward models with different heads; `loads` counts how often each is read."""
  model, params = tiny_model
  heads = {
    str(tmp_path / name): models.init_scalar_head(jax.random.key(seed), model.config.embed_dim)
    for seed, name in enumerate("abc")
  }
  for folder in heads:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "model.json").write_text("{}")
  loads = []

  def load(workdir, mesh, *, dtype):
    loads.append(workdir)
    return (workspace.Loaded(model, params, Tokenizer(), heads[workdir]),)

  monkeypatch.setattr(workspace, "load_members", load)
  return types.SimpleNamespace(names=list(heads), heads=heads, loads=loads)


def test_every_reward_model_is_loaded_once_and_the_named_one_first(judge_folders):
  a, b, c = judge_folders.names
  terms, judges = _build(
    reward_model=c,
    m={"kind": "model", "source": a, "weight": 3.0},
    own={"kind": "model"},
    e={"kind": "ensemble", "source": f"{a}, {b},{c}", "combine": "mean"},
  )
  assert list(judges) == judge_folders.loads == [c, a, b]
  rollout = _rollout(PROMPTS, ["x", "y"])
  scores = rewards.score(terms, rollout)
  members = {
    name: rl.model_reward("m", judges[name].model, {"trunk": judges[name].params, "head": head})
    for name, head in judge_folders.heads.items()
  }
  values = {name: member.function(rollout) for name, member in members.items()}
  np.testing.assert_allclose(scores["m"], values[a], rtol=1e-5)
  np.testing.assert_allclose(scores["own"], values[c], rtol=1e-5)
  together = np.stack(list(values.values()))
  np.testing.assert_allclose(scores["e"], together.mean(0), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(scores["e/spread"], together.std(0), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(scores[""], 3 * values[a] + values[c] + together.mean(0), rtol=1e-4)


def test_members_are_standardised_over_one_reference_rollout(judge_folders):
  a, b, _ = judge_folders.names
  rng = np.random.default_rng(0)
  reference = _rollout(PROMPTS * 4, ["x"] * 8)
  reference.samples.tokens[:] = rng.integers(2, 60, reference.tokens.shape)
  asked = []

  def sample(n):
    asked.append(n)
    return reference

  terms, _ = _build(
    reference=sample,
    m={"kind": "model", "source": a, "standardise": 8},
    e={"kind": "ensemble", "source": f"{a},{b}", "combine": "min", "standardise": 8},
  )
  assert asked == [8]
  scores = rewards.score(terms, reference)
  np.testing.assert_allclose([scores["m"].mean(), scores["m"].std()], [0, 1], atol=1e-5)
  assert np.all(scores["e"] <= scores["m"] + 1e-6) and np.any(scores["e"] < scores["m"] - 1e-3)
  with pytest.raises(InputError, match="responses of a starting policy"):
    _build(m={"kind": "model", "source": a, "standardise": 8})


def test_a_policy_is_no_reward_model(judge_folders):
  folder = judge_folders.names[0]
  judge_folders.heads[folder] = None
  with pytest.raises(InputError, match="is not a reward model"):
    _build(m={"kind": "model", "source": folder})


def test_every_reference_of_gsm8k_holds_one_number(data_folder):
  file = str(data_folder / "gsm8k" / "train.jsonl")
  prompts = records.read(file, "prompts", columns="prompt=question,answer=answer")
  _check(prompts, n={"kind": "numeric"}, marked={"kind": "numeric", "where": "marked"})
  solutions = [prompt.meta["answer"] for prompt in prompts]
  term = rewards_phase.verified("n", _config(kind="numeric", where="marked"))
  np.testing.assert_array_equal(term.function(_rollout(prompts, solutions)), 1)
  other = term.function(_rollout(prompts, solutions[1:] + solutions[:1]))
  assert 0 < other.mean() < 0.05  # another problem's solution is right by chance only


def test_the_judgements_of_published_solutions_agree_with_theirs(data_folder):
  """gsm8k's own verdicts on 3,924 model solutions, whose last number is their answer."""
  file = data_folder / "gsm8k" / "model_solutions_dev.jsonl"
  rows = [json.loads(line) for line in file.read_text().splitlines()]
  answers = [row["ground_truth"].rpartition("A:")[2] for row in rows]
  prompts = [data.Prompt(({"role": "user", "content": "?"},), {"answer": a}) for a in answers]
  term = rewards_phase.verified("n", _config(kind="numeric"))
  found = term.function(_rollout(prompts, [row["solution"] for row in rows])) > 0
  assert np.mean(found == np.array([row["is_correct"] for row in rows])) > 0.98


def test_word_problems_are_a_source_of_prompts():
  prompts = records.read("arithmetic:n=20,split=heldout,families=lookup+less", "prompts")
  assert {p.meta["family"] for p in prompts} == {"lookup", "less"}
  _check(prompts, n={"kind": "numeric"}, e={"kind": "exact"})
  for source, kind, message in (
    ("arithmetic:n=3", "preferences", "makes prompts with a reference answer, and no preferences"),
    ("arithmetic:n=3,draw=1", "prompts", "unknown setting 'draw'; known are n, seed, split"),
    ("arithmetic:seed=1", "prompts", "must say how many"),
  ):
    with pytest.raises(InputError, match=message):
      records.read(source, kind)


def test_an_evaluation_by_rewards_needs_both_settings():
  term = {"n": RewardConfig(kind="numeric")}
  for settings in ({"scorer": "rewards"}, {"rewards": term}):
    with pytest.raises(InputError, match="give both or neither"):
      evaluate.EvaluateConfig(data="arithmetic:n=3", **settings)
  config = evaluate.EvaluateConfig(data="arithmetic:n=3", scorer="rewards", rewards=term)
  scorer, judge = evaluate.make_scorer(config, None, None)
  prompts = evaluate.read_prompts(config)
  texts = [f"It is {prompt.meta['answer']}" for prompt in prompts[:2]] + ["It is none"]
  responses = _rollout(prompts, texts)
  np.testing.assert_array_equal(scorer(prompts, responses), [1, 1, 0])
  assert judge is None


def test_a_bad_reference_stops_an_evaluation_before_the_policy_is_loaded(tmp_path):
  config = evaluate.EvaluateConfig(
    data="arithmetic:n=3", scorer="rewards", rewards={"c": RewardConfig(kind="choice")}
  )
  with pytest.raises(InputError, match="c: arithmetic-0/train:1: field 'answer': no letter"):
    evaluate.run(config, str(tmp_path), jax.devices()[:1])


def test_the_real_models_settings_are_whole_and_its_problems_are_held_out():
  training = config_lib.build(online.OnlineConfig, smollm2_grpo.get_config().to_dict())
  settings = smollm2_grpo.get_config("evaluation").to_dict()
  evaluation = config_lib.build(evaluate.EvaluateConfig, settings)
  assert training.rewards == evaluation.rewards
  seen = records.read(training.prompts.train, "prompts")
  asked = evaluate.read_prompts(evaluation)
  _check(seen + asked, n={"kind": "numeric"})
  assert not {str(p.prompt) for p in seen} & {str(p.prompt) for p in asked}
  with pytest.raises(ValueError, match="has the parts training, evaluation"):
    smollm2_grpo.get_config("test")
