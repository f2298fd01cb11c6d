"""Small word problems made by code, each with its one right number: a task for verifiable rewards.

Names and things of the held-out split occur in no training problem, and neither do its numbers
together, so that a right answer there was not remembered.
"""

import random
import zlib

from align_jax.data import records
from align_jax.errors import InputError

SPLITS = ("train", "heldout")
_NAMES = {
  "train": ("Tom", "Anna", "Ben", "Maria", "Kate", "Omar", "Lucy", "Ivan", "Sara", "Paul"),
  "heldout": ("Nina", "Hugo", "Emma", "Leo", "Rosa", "Max"),
}
_THINGS = {
  "train": ("apples", "books", "coins", "shells", "stamps", "pens", "marbles", "cards"),
  "heldout": ("oranges", "buttons", "tickets", "stones"),
}
_LISTS = (
  "{A} has {a} {x}, {B} has {b} and {C} has {c}. How many {x} does {Q} have?",
  "{A} found {a} {x}, {B} found {b} and {C} found {c}. How many {x} did {Q} find?",
  "{A}'s box holds {a} {x}, {B}'s {b} and {C}'s {c}. How many {x} are in {Q}'s box?",
)
# family -> (texts, the answer)
_STEPS = {
  "more": (
    (
      "{A} has {a} {x} and buys {b} more. How many {x} does {A} have now?",
      "{A} had {a} {x} and found {b} more. How many {x} does {A} have?",
    ),
    lambda a, b: a + b,
  ),
  "less": (
    (
      "{A} has {a} {x} and gives {b} to {B}. How many {x} does {A} have left?",
      "{A} had {a} {x} and lost {b}. How many {x} does {A} have now?",
    ),
    lambda a, b: a - b,
  ),
  "together": (
    (
      "{A} has {a} {x} and {B} has {b} {x}. How many {x} do they have together?",
      "{A} found {a} {x} and {B} found {b}. How many {x} did they find in all?",
    ),
    lambda a, b: a + b,
  ),
}
FAMILIES = ("lookup", *_STEPS)


def prompts(
  n: int, split: str = "train", seed: int = 0, *, families: tuple[str, ...] = FAMILIES
) -> list[records.Prompt]:
  """Draws n problems; `meta` has the `answer` as text and the `family`.

  The first n of a longer draw are those of a shorter one. Families: "lookup" asks for one of three
  numbers between 2 and 99; "more", "less" and "together" take one step with numbers up to 12.
  """
  if split not in SPLITS:
    raise InputError(f"arithmetic: split must be one of {', '.join(SPLITS)}, not {split!r}")
  unknown = sorted(set(families) - set(FAMILIES))
  if unknown or not families:
    raise InputError(f"arithmetic: families are some of {', '.join(FAMILIES)}, not {families}")
  rng = random.Random(f"arithmetic/{split}/{seed}")
  source = f"arithmetic-{seed}/{split}"
  return [_prompt(rng, split, rng.choice(families), f"{source}:{i + 1}") for i in range(n)]


def _prompt(rng: random.Random, split: str, family: str, source: str) -> records.Prompt:
  names, thing = rng.sample(_NAMES[split], 3), rng.choice(_THINGS[split])
  slots = {**dict(zip("ABC", names)), "x": thing}
  if family == "lookup":
    values = _numbers(rng, split, 3, 99)
    asked = rng.randrange(3)
    text, answer = rng.choice(_LISTS), values[asked]
    slots["Q"] = names[asked]
  else:
    values = sorted(_numbers(rng, split, 2, 12), reverse=True)
    texts, step = _STEPS[family]
    text, answer = rng.choice(texts), step(*values)
  slots |= dict(zip("abc", values))
  message = {"role": "user", "content": text.format(**slots)}
  return records.Prompt((message,), {"answer": str(answer), "family": family}, source)


def _numbers(rng: random.Random, split: str, count: int, largest: int) -> list[int]:
  """Different numbers; a fifth of all sets of them, chosen by a hash, is held out."""
  while True:
    values = rng.sample(range(2, largest + 1), count)
    held_out = zlib.crc32(repr(sorted(values)).encode()) % 5 == 0
    if held_out == (split == "heldout"):
      return values
