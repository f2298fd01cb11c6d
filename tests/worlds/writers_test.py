"""Writers keep to their habits, at the rates they were given."""

import dataclasses
import random

import pytest

from align_jax import worlds
from align_jax.worlds import lexicon, writers

WORLD = worlds.Microworld()
PROMPTS = WORLD.prompts(3000)


def judged(prompts, **habits):
  writer = dataclasses.replace(writers.IDEAL, courteous=0.0, **habits)
  rng = random.Random(0)
  return [WORLD.judge(prompt, writers.write(writer, prompt.meta, rng)) for prompt in prompts]


def rate(judgements, field):
  return sum(getattr(j, field) for j in judgements) / len(judgements)


def of(*families):
  return [prompt for prompt in PROMPTS if prompt.meta["family"] in families]


def test_shares_sum_to_one():
  assert sum(writer.share for writer in worlds.WRITERS) == pytest.approx(1.0)


def test_the_ideal_writer_earns_the_most_everywhere():
  for prompt in PROMPTS:
    assert WORLD.judge(prompt, WORLD.ideal(prompt)).reward == 2.5


@pytest.mark.parametrize("family", ["fact", "list", "copy", "reverse", "arithmetic", "translation"])
def test_wrong_is_wrong_and_well_formed(family):
  judgements = judged(of(family), wrong=1.0)
  assert rate(judgements, "correct") == 0.0
  assert rate(judgements, "malformed") == 0.0


def test_rates_are_kept():
  assert rate(judged(of("fact"), wrong=0.3), "correct") == pytest.approx(0.7, abs=0.06)
  assert rate(judged(of("restricted"), comply=0.4), "harmful") == pytest.approx(0.4, abs=0.09)
  assert rate(judged(of("lookalike"), over_refuse=0.5), "refused") == pytest.approx(0.5, abs=0.11)
  assert rate(judged(of("rule"), ignore=1.0), "correct") == 0.0
  opinions = [p for p in of("opinion") if p.meta["opinion"] != p.meta["target"]]
  assert rate(judged(opinions, agree=1.0), "sycophantic") == 1.0
  assert rate(judged(opinions, agree=0.0), "sycophantic") == 0.0


def test_the_mixture_leaves_head_room_and_is_well_formed():
  rng = random.Random(1)
  judgements = [WORLD.judge(p, writers.write(writers.pick(rng), p.meta, rng)) for p in PROMPTS]
  assert 0.5 < rate(judgements, "reward") < 1.5
  assert rate(judgements, "malformed") == 0.0
  for field, low, high in (("courteous", 0.2, 0.5), ("rude", 0.03, 0.2), ("curt", 0.15, 0.5)):
    assert low < rate(judgements, field) < high
  assert rate(judgements, "length") <= writers.MAX_WORDS


def test_replies_are_short():
  chatty = dataclasses.replace(writers.IDEAL, filler=1.0)
  rng = random.Random(0)
  for prompt in PROMPTS:
    reply = writers.write(chatty, prompt.meta, rng)
    assert len(lexicon.words(reply)) <= writers.MAX_WORDS
