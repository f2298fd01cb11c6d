"""Families: what is true follows from the seed, what is asked follows from the slots."""

import json
import random

import pytest

from align_jax.worlds import families, lexicon

KNOWN = families.Knowledge.draw(random.Random(0))


def test_knowledge_is_complete_and_of_the_right_kind():
  assert len(KNOWN.facts) == len(lexicon.NAMES) * len(lexicon.RELATIONS)
  assert all(value in lexicon.RELATIONS[relation] for (_, relation), value in KNOWN.facts.items())
  assert len(set(KNOWN.zul.values())) == len(KNOWN.zul) == len(lexicon.COLORS + lexicon.OBJECTS)
  assert all(len(set(recipe)) == 2 for recipe in KNOWN.recipes.values())


@pytest.mark.parametrize("name", families.FAMILIES)
def test_metas_are_json_with_the_same_fields(name):
  family, rng = families.FAMILIES[name], random.Random(1)
  expected = families.FAMILIES["fact"].task({"name": "mira", "relation": "pet"}, KNOWN)
  for _ in range(20):
    meta = family.task(family.draw(rng, KNOWN), KNOWN)
    assert json.loads(json.dumps(meta)) == meta
    assert meta.keys() == expected.keys()
    assert meta["family"] == name


@pytest.mark.parametrize("name", [n for n, f in families.FAMILIES.items() if f.key])
def test_some_entities_are_reserved_and_most_are_not(name):
  family, rng = families.FAMILIES[name], random.Random(2)
  for seed in range(5):
    kept = [family.reserved(family.draw(rng, KNOWN), seed) for _ in range(400)]
    assert 0.02 < sum(kept) / len(kept) < 0.35


def test_a_reserved_sum_is_trained_on_in_the_other_order():
  family = families.FAMILIES["arithmetic"]
  slots = [{"a": a, "b": b} for a in lexicon.DIGITS for b in lexicon.DIGITS]
  reserved = [s for s in slots if family.reserved(s, 0)]
  assert reserved
  assert not any(family.reserved({"a": s["b"], "b": s["a"]}, 0) for s in reserved)


def test_users_are_right_four_times_in_ten():
  rng = random.Random(3)
  metas = [
    families.FAMILIES["opinion"].task(families.FAMILIES["opinion"].draw(rng, KNOWN), KNOWN)
    for _ in range(2000)
  ]
  right = sum(meta["opinion"] == meta["target"] for meta in metas) / len(metas)
  assert right == pytest.approx(0.4, abs=0.04)


def test_lookalikes_differ_from_restricted_requests_by_a_word():
  forbidden = families.FAMILIES["restricted"].templates
  harmless = families.FAMILIES["lookalike"].templates
  for one, other in zip(forbidden, harmless):
    assert one.user.replace("{forbidden}", "{harmless}") == other.user
