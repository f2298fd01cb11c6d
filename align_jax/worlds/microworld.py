"""The microworld: a closed world made by code, where every claim has an exact answer."""

import dataclasses
import functools
import os
import random
from collections.abc import Sequence

import numpy as np

from align_jax.data import records
from align_jax.errors import InputError
from align_jax.worlds import families, judges, labellers, tokenizer, writers

SPLITS = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class Pair:
  """One prompt and two different replies, as two writers gave them."""

  prompt: records.Prompt
  replies: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Microworld:
  """Facts, prompts, writers and judges of one world; all of it follows from `seed`.

  Every draw has a seed of its own: the same (seed, n, split) gives the same records, and the first
  n records of a longer draw are the records of a shorter one. `weights` is the gold reward.
  """

  seed: int = 0
  weights: judges.RewardWeights = judges.DEFAULT_WEIGHTS
  mixture: tuple[writers.Writer, ...] = writers.WRITERS

  @functools.cached_property
  def knowledge(self) -> families.Knowledge:
    """What is true here."""
    return families.Knowledge.draw(random.Random(f"knowledge/{self.seed}"))

  def tokenizer(self):
    """A transformers.PreTrainedTokenizerFast, word level; pad, eos and bos differ."""
    return tokenizer.build()

  def prompts(
    self, n: int, split: str = "train", seed: int = 0, *, family: str | None = None
  ) -> list[records.Prompt]:
    """Draws n prompts, of one family or of all by share; `meta` is what `judge` needs."""
    rng = self._rng("prompts", split, seed)
    chosen = None if family is None else _family(family)
    return [self._prompt(rng, split, chosen, i) for i in range(n)]

  def demonstrations(
    self, n: int, split: str = "train", seed: int = 0, *, family: str | None = None
  ) -> list[records.Demonstration]:
    """Draws n prompts, each answered by one writer, good or bad."""
    rng = self._rng("replies", split, seed)
    return [
      records.Demonstration(
        (*prompt.prompt, {"role": "assistant", "content": self._reply(prompt, rng)}),
        source=prompt.source,
      )
      for prompt in self.prompts(n, split, seed, family=family)
    ]

  def pairs(
    self, n: int, split: str = "train", seed: int = 0, *, family: str | None = None
  ) -> list[Pair]:
    """Draws n prompts with two different replies by independent writers."""
    rng = self._rng("pairs", split, seed)
    prompts = self.prompts(n, split, seed, family=family)
    return [Pair(prompt, tuple(self.candidates(prompt, rng))) for prompt in prompts]

  def preferences(
    self,
    n: int,
    split: str = "train",
    labeller: labellers.Labeller = labellers.DEFAULT,
    seed: int = 0,
    *,
    soft: bool = False,
    votes: int = 1,
    family: str | None = None,
  ) -> list[records.Preference]:
    """Draws n pairs and has `labeller` choose; soft=True also tells its P(chosen) as label_prob.

    votes: how many such labellers vote on a pair; the majority's choice is chosen, and label_prob is
    its share.  Raises InputError unless they are positive, and one where soft.
    """
    if votes < 1 or (soft and votes > 1):
      raise InputError(f"votes must be positive, and 1 with soft labels, not {votes}")
    pairs = self.pairs(n, split, seed, family=family)
    probabilities = labeller.probabilities(self.judge_pairs(pairs))
    rng = self._rng("labels", split, seed)
    labelled = []
    for pair, p in zip(pairs, probabilities):
      share = sum(rng.random() < p for _ in range(votes)) / votes
      first = share >= 0.5
      chosen, rejected = pair.replies if first else pair.replies[::-1]
      share = float(p) if soft else share
      label_prob = share if first else 1 - share
      labelled.append(
        records.Preference(
          pair.prompt.prompt, chosen, rejected, label_prob=label_prob, source=pair.prompt.source
        )
      )
    return labelled

  def candidates(self, prompt: records.Prompt, rng: random.Random, n: int = 2) -> list[str]:
    """Draws n different replies by independent writers."""
    replies: dict[str, None] = {}
    while len(replies) < n:
      replies[self._reply(prompt, rng)] = None
    return list(replies)

  def ideal(self, prompt: records.Prompt, seed: int = 0) -> str:
    """A reply with the highest gold reward."""
    return writers.write(writers.IDEAL, prompt.meta, random.Random(f"ideal/{seed}"))

  def judge(self, prompt: records.Prompt, response: str) -> judges.Judgement:
    """What a reply did, and its gold reward. A prompt without our meta is read from its text."""
    meta = prompt.meta if "frame" in prompt.meta else self.read(prompt.prompt).meta
    return judges.judge(meta, response, self.weights)

  def gold_rewards(self, prompts: Sequence[records.Prompt], responses: Sequence[str]) -> np.ndarray:
    """Gold reward of every (prompt, response), f32 [N]."""
    if len(prompts) != len(responses):
      raise InputError(f"gold_rewards: {len(prompts)} prompts but {len(responses)} responses.")
    rewards = [self.judge(p, response).reward for p, response in zip(prompts, responses)]
    return np.array(rewards, np.float32)

  def judge_pairs(self, pairs: Sequence[Pair | records.Preference]) -> list[labellers.Pair]:
    """Both judgements of every pair; of a Preference, chosen first."""
    judged = []
    for pair in pairs:
      if isinstance(pair, records.Preference):
        pair = Pair(self.read(pair.prompt), (pair.chosen, pair.rejected))
      judged.append(tuple(self.judge(pair.prompt, reply) for reply in pair.replies))
    return judged

  def read(self, messages) -> records.Prompt:
    """The prompt that `messages` are, with its meta; InputError if it is not of this world."""
    for family in families.FAMILIES.values():
      for template in family.templates:
        slots = template.match(messages)
        if slots is not None:
          return records.Prompt(tuple(messages), family.task(slots, self.knowledge))
    raise InputError(f"Microworld: not a prompt of this world: {messages[-1]['content']!r}.")

  def write(
    self,
    folder: str,
    *,
    demonstrations: int = 20_000,
    preferences: int = 5_000,
    prompts: int = 2_000,
    heldout: int = 500,
    labeller: labellers.Labeller = labellers.DEFAULT,
    seed: int = 0,
  ) -> list[str]:
    """Writes {demonstrations,preferences,prompts}-{split}.jsonl, `heldout` lines in each of that
    split, and tokenizer/; returns the paths."""
    os.makedirs(folder, exist_ok=True)
    paths = [os.path.join(folder, "tokenizer")]
    self.tokenizer().save_pretrained(paths[0])
    for split, sizes in (
      ("train", (demonstrations, preferences, prompts)),
      ("heldout", 3 * (heldout,)),
    ):
      for kind, rows in (
        ("demonstrations", self.demonstrations(sizes[0], split, seed)),
        ("preferences", self.preferences(sizes[1], split, labeller, seed)),
        ("prompts", self.prompts(sizes[2], split, seed)),
      ):
        paths.append(os.path.join(folder, f"{kind}-{split}.jsonl"))
        records.write(paths[-1], rows)
    return paths

  def _rng(self, purpose: str, split: str, seed: int) -> random.Random:
    if split not in SPLITS:
      raise InputError(f"Microworld: split must be one of {SPLITS}, got {split!r}.")
    return random.Random(f"{purpose}/{self.seed}/{split}/{seed}")

  def _reply(self, prompt: records.Prompt, rng: random.Random) -> str:
    return writers.write(writers.pick(rng, self.mixture), prompt.meta, rng)

  def _prompt(self, rng, split: str, family: families.Family | None, index: int) -> records.Prompt:
    family = family or _draw_family(rng)
    novel = ""
    if split == "heldout":
      novel = "entity" if family.key and rng.random() < 0.5 else "template"
    wanted = [t for t in family.templates if t.heldout == (novel == "template")]
    template = rng.choice(wanted)
    slots = family.draw(rng, self.knowledge)
    while family.reserved(slots, self.seed) != (novel == "entity"):
      slots = family.draw(rng, self.knowledge)
    meta = {**family.task(slots, self.knowledge), "novel": novel}
    return records.Prompt(template.fill(slots), meta, f"microworld-{self.seed}/{split}:{index + 1}")


def _family(name: str) -> families.Family:
  if name not in families.FAMILIES:
    raise InputError(f"Microworld: no family {name!r}; there are {', '.join(families.FAMILIES)}.")
  return families.FAMILIES[name]


def _draw_family(rng: random.Random) -> families.Family:
  known = tuple(families.FAMILIES.values())
  return rng.choices(known, [family.share for family in known])[0]
