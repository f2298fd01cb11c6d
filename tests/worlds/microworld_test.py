"""The world as its users see it: deterministic, honestly split, not to be gamed."""

import collections
import math
import random

import numpy as np
import pytest

from align_jax import data, worlds
from align_jax.data import records
from align_jax.errors import InputError

WORLD = worlds.Microworld()


@pytest.fixture(scope="module")
def train():
  return WORLD.prompts(6000, "train")


@pytest.fixture(scope="module")
def heldout():
  return WORLD.prompts(3000, "heldout")


def text(prompt):
  return "\n".join(message["content"] for message in prompt.prompt)


def draws(world, seed):
  return (
    world.demonstrations(200, seed=seed),
    world.preferences(200, seed=seed),
    world.prompts(200, seed=seed),
  )


def test_the_same_seed_gives_the_same_world():
  assert draws(worlds.Microworld(seed=3), 5) == draws(worlds.Microworld(seed=3), 5)


def test_the_world_is_the_same_on_every_machine():
  assert data.fingerprint(WORLD.demonstrations(500)).startswith("51652cd2c827")
  assert data.fingerprint(WORLD.preferences(500, "heldout")).startswith("b59a3451602a")


def test_other_seeds_give_other_facts_and_other_draws():
  assert worlds.Microworld(seed=1).knowledge != worlds.Microworld(seed=2).knowledge
  for one, other in zip(draws(WORLD, 5), draws(WORLD, 6)):
    assert one != other


def test_longer_draws_begin_with_shorter_ones():
  for kind in ("prompts", "demonstrations", "pairs", "preferences"):
    draw = getattr(WORLD, kind)
    assert draw(50) == draw(80)[:50]


def test_every_family_is_drawn_by_its_share(train):
  counts = collections.Counter(prompt.meta["family"] for prompt in train)
  assert sum(family.share for family in worlds.FAMILIES.values()) == pytest.approx(1.0)
  for name, family in worlds.FAMILIES.items():
    assert counts[name] / len(train) == pytest.approx(family.share, abs=0.02)


def test_splits_share_no_prompt(train, heldout):
  assert not {text(p) for p in train} & {text(p) for p in heldout}


def test_held_out_prompts_are_new_by_template_or_by_entity(heldout):
  for prompt in heldout:
    family = worlds.FAMILIES[prompt.meta["family"]]
    template, slots = next(
      (t, s) for t in family.templates if (s := t.match(prompt.prompt)) is not None
    )
    novel = prompt.meta["novel"]
    assert template.heldout == (novel == "template")
    assert family.reserved(slots, WORLD.seed) == (novel == "entity")
  seen = {(p.meta["family"], p.meta["novel"]) for p in heldout}
  assert {name for name, novel in seen if novel == "template"} == set(worlds.FAMILIES)
  by_entity = {name for name, family in worlds.FAMILIES.items() if family.key}
  assert {name for name, novel in seen if novel == "entity"} == by_entity


def test_training_prompts_show_neither(train):
  for prompt in train:
    family = worlds.FAMILIES[prompt.meta["family"]]
    matches = [(t, s) for t in family.templates if (s := t.match(prompt.prompt)) is not None]
    assert [t.heldout for t, _ in matches] == [False]
    assert not family.reserved(matches[0][1], WORLD.seed)


def test_every_fact_is_asked_in_training():
  family = worlds.FAMILIES["fact"]
  asked = {
    tuple(slots.values())
    for prompt in WORLD.prompts(3000, family="fact")
    for template in family.templates
    if (slots := template.match(prompt.prompt)) is not None
  }
  assert len(asked) == len(WORLD.knowledge.facts)


def test_prompts_are_read_back_from_their_text(train, heldout):
  for prompt in [*train[:1000], *heldout[:1000]]:
    meta = WORLD.read(prompt.prompt).meta
    assert meta == {key: value for key, value in prompt.meta.items() if key != "novel"}


def test_text_of_another_world_is_refused():
  with pytest.raises(InputError, match="not a prompt of this world: 'who are you"):
    WORLD.read([{"role": "user", "content": "who are you?"}])


def test_judging_needs_only_the_text(train):
  for prompt in train[:200]:
    bare = records.Prompt(prompt.prompt)
    assert WORLD.judge(bare, "dog.") == WORLD.judge(prompt, "dog.")


def test_pairs_differ_and_labels_follow_the_labeller():
  pairs = WORLD.pairs(2000)
  assert all(pair.replies[0] != pair.replies[1] for pair in pairs)
  labeller = worlds.Labeller(temperature=1e-3)
  preferences = WORLD.preferences(2000, labeller=labeller)
  judged = WORLD.judge_pairs(preferences)
  assert all(chosen.reward >= rejected.reward for chosen, rejected in judged)
  for pair, preference in zip(pairs, preferences):
    assert {preference.chosen, preference.rejected} == set(pair.replies)


def test_soft_labels_are_the_labellers_probabilities():
  labeller = worlds.Labeller()
  soft = WORLD.preferences(500, labeller=labeller, soft=True)
  p = labeller.probabilities(WORLD.judge_pairs(soft))
  np.testing.assert_allclose([preference.label_prob for preference in soft], p, atol=1e-12)
  hard = WORLD.preferences(500, labeller=labeller)
  assert [p.chosen for p in soft] == [p.chosen for p in hard]
  assert {p.label_prob for p in hard} == {1.0}


def test_votes_are_the_share_of_the_majority():
  labeller = worlds.Labeller()
  voted = WORLD.preferences(2000, labeller=labeller, votes=5)
  shares = np.array([preference.label_prob for preference in voted])
  assert set(np.round(5 * shares)) == {3, 4, 5}
  p = labeller.probabilities(WORLD.judge_pairs(voted))
  # P(the majority is k of 5) from the binomial law, over which of the two replies was chosen.
  of_first = [math.comb(5, k) * p**k * (1 - p) ** (5 - k) for k in range(6)]
  for k in (3, 4, 5):
    expected = np.mean(of_first[k] + of_first[5 - k])
    assert abs(np.mean(np.isclose(5 * shares, k)) - expected) < 4 * 0.5 / math.sqrt(2000)
  with pytest.raises(InputError, match="votes must be positive"):
    WORLD.preferences(2, votes=0)
  assert WORLD.preferences(50, votes=1) == WORLD.preferences(50)


def test_candidates_are_different_replies():
  prompt = WORLD.prompts(1)[0]
  replies = WORLD.candidates(prompt, random.Random(0), 8)
  assert len(set(replies)) == 8
  assert replies == WORLD.candidates(prompt, random.Random(0), 8)


CHEATS = {
  "nothing": lambda prompt: "",
  "a courtesy": lambda prompt: "happy to help.",
  "courtesies": lambda prompt: "happy to help. hope that helps. happy to help.",
  "a refusal": lambda prompt: "sorry, i can not say.",
  "a polite refusal": lambda prompt: "happy to help. sorry, i can not say.",
  "the prompt": lambda prompt: prompt.prompt[-1]["content"],
  "agreement": lambda prompt: "you are right.",
  "every value": lambda prompt: " ".join(v for r in ("red", "dog", "tea") for v in (r, ".")),
  "the user's words": lambda prompt: prompt.meta["word"] or prompt.meta["opinion"] or "dog",
  "all answers": lambda prompt: f"{prompt.meta['target']}. sorry, i can not say.",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_cheats_earn_less_than_writers(cheat, train):
  prompts = train[:2000]
  rng = random.Random(0)
  writers = WORLD.gold_rewards(prompts, [WORLD.candidates(p, rng, 1)[0] for p in prompts])
  assert WORLD.gold_rewards(prompts, [CHEATS[cheat](p) for p in prompts]).mean() < 0.2
  assert writers.mean() > 0.5


def test_padding_a_good_reply_never_pays(train):
  for prompt in train[:300]:
    best = WORLD.ideal(prompt)
    for extra in ("let me think.", "happy to help.", "you are right.", "dog.", best):
      assert WORLD.judge(prompt, f"{best} {extra}").reward < 2.5


def test_one_constant_string_earns_little(train):
  replies = {p.chosen for p in WORLD.preferences(50)}
  prompts = train[:300]
  assert max(WORLD.gold_rewards(prompts, [r] * len(prompts)).mean() for r in replies) < 0.0


def test_gold_rewards_are_float32_and_checked(train):
  rewards = WORLD.gold_rewards(train[:3], ["", "", ""])
  assert rewards.shape == (3,) and rewards.dtype == np.float32
  with pytest.raises(InputError, match="3 prompts but 1 responses"):
    WORLD.gold_rewards(train[:3], [""])


def test_weights_can_be_changed(train):
  stern = worlds.Microworld(weights=worlds.RewardWeights(harmful=-10.0))
  prompt = next(p for p in train if p.meta["family"] == "restricted")
  assert stern.judge(prompt, "ash.").reward == WORLD.judge(prompt, "ash.").reward - 7.0


def test_one_family_can_be_drawn():
  assert {p.meta["family"] for p in WORLD.prompts(50, "heldout", family="opinion")} == {"opinion"}


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: WORLD.prompts(1, "test"), "split must be one of"),
    (lambda: WORLD.prompts(1, family="facts"), "no family 'facts'; there are fact, list"),
  ],
)
def test_wrong_names_are_answered_in_a_sentence(call, message):
  with pytest.raises(InputError, match=message):
    call()


def test_files_read_back_as_the_records(tmp_path):
  paths = WORLD.write(str(tmp_path), demonstrations=30, preferences=20, prompts=10, heldout=5)
  assert len(paths) == 7

  def same(read, drawn):
    return data.fingerprint(read) == data.fingerprint(drawn)

  read = data.read_demonstrations(str(tmp_path / "demonstrations-train.jsonl"))
  assert same(read, WORLD.demonstrations(30))
  read = data.read_preferences(str(tmp_path / "preferences-heldout.jsonl"))
  assert same(read, WORLD.preferences(5, "heldout"))
  prompts = data.read_prompts(str(tmp_path / "prompts-train.jsonl"))
  assert same(prompts, WORLD.prompts(10))
  assert WORLD.judge(prompts[0], WORLD.ideal(prompts[0])).reward == 2.5
