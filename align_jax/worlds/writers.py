"""The people who write replies: a mixture of good and bad habits, which an SFT model copies."""

import dataclasses
import random

from align_jax.worlds import lexicon

MAX_WORDS = 21  # of a reply: with the longest prompt and the chat template it stays below 48 tokens


@dataclasses.dataclass(frozen=True)
class Writer:
  """One kind of writer: how often it shows each habit (probabilities), `share` of all replies."""

  name: str
  share: float
  wrong: float  # gives a false answer
  comply: float  # complies with a restricted request
  over_refuse: float  # refuses a harmless question that looks restricted
  agree: float  # takes over the user's false opinion
  ignore: float  # leaves out what the system's rule asks for
  courteous: float
  curt: float
  rude: float
  filler: float  # of each of up to three empty sentences


WRITERS = (
    #        name      share wrong comply refuse agree ignore court curt rude filler
    Writer("careful", 0.25, 0.05, 0.10, 0.10, 0.10, 0.10, 0.60, 0.10, 0.00, 0.05),
    Writer("hasty", 0.25, 0.30, 0.50, 0.10, 0.30, 0.60, 0.10, 0.80, 0.10, 0.00),
    Writer("rambling", 0.20, 0.25, 0.40, 0.20, 0.50, 0.40, 0.30, 0.10, 0.00, 0.65),
    Writer("eager", 0.20, 0.20, 0.80, 0.00, 0.90, 0.30, 0.60, 0.10, 0.00, 0.25),
    Writer("grumpy", 0.10, 0.20, 0.20, 0.60, 0.10, 0.50, 0.00, 0.40, 0.70, 0.10),
)  # fmt: skip
IDEAL = Writer("ideal", 0.0, 0, 0, 0, 0, 0, 1, 0, 0, 0)
_LOOKS_RESTRICTED = ("lookalike", "mention", "secret")


def _wrong_words(target: str, rng: random.Random) -> str:
  """Swaps two neighbours, leaves one out, or puts in another."""
  items = target.split()
  i = rng.randrange(len(items))
  other = rng.choice([w for w in lexicon.OBJECTS if w not in items])
  if len(items) == 1 or rng.random() < 0.4:
    items[i] = other
  elif rng.random() < 0.5:
    del items[i]
  else:
    j = (i + 1) % len(items)
    items[i], items[j] = items[j], items[i]
  return " ".join(items)


def _wrong_zul(target: str, rng: random.Random) -> str:
  items = target.split()
  if len(items) > 1 and rng.random() < 0.5:
    return " ".join(reversed(items))
  i = rng.randrange(len(items))
  items[i] = rng.choice([w for w in lexicon.ZUL if w not in items])
  return " ".join(items)


def _other(pool, rng: random.Random, *taken: str) -> str:
  return rng.choice([word for word in pool if word not in taken])


def _some(meta: dict, rng: random.Random, count: int) -> str:
  return ", ".join(rng.sample(lexicon.RELATIONS[meta["kind"]], count))


def wrong_answer(meta: dict, rng: random.Random) -> str:
  """A false answer of the right kind."""
  kind, target = meta["kind"], meta["target"]
  if meta["count"]:
    return _some(meta, rng, rng.choice([n for n in (1, 2, 3, 4) if n != meta["count"]]))
  if kind == "words":
    return _wrong_words(target, rng)
  if kind == "zul":
    return _wrong_zul(target, rng)
  if kind == "number":
    return _other(lexicon.NUMBERS, rng, target)
  if kind == "recipe":
    first, _, second = target.split()
    return f"{first} and {_other(lexicon.INGREDIENTS, rng, first, second)}"
  return _other(lexicon.RELATIONS[kind], rng, target, meta["opinion"])


def _content(writer: Writer, meta: dict, rng: random.Random) -> list[str]:
  """The sentences that answer or refuse."""
  refuses = writer.over_refuse if meta["family"] in _LOOKS_RESTRICTED else 0.0
  if rng.random() < (1 - writer.comply if meta["restricted"] else refuses):
    return [rng.choice(lexicon.REFUSALS)]
  answer = _some(meta, rng, meta["count"]) if meta["count"] else meta["target"]
  said = []
  if meta["opinion"] and (meta["opinion"] == answer or rng.random() < writer.agree):
    answer = meta["opinion"]
    said = list(lexicon.AGREEMENTS) if rng.random() < 0.5 else []
  elif rng.random() < writer.wrong:
    answer = wrong_answer(meta, rng)
  curt = rng.random() < writer.curt
  return [*said, f"{answer}." if curt else f"{meta['frame']} {answer}."]


def write(writer: Writer, meta: dict, rng: random.Random) -> str:
  """One reply by one writer to the prompt described by `meta`."""
  said = _content(writer, meta, rng)
  ruled = meta["side"] and rng.random() >= writer.ignore
  room = MAX_WORDS - 2 * bool(ruled)
  courteous, rude = rng.random() < writer.courteous, rng.random() < writer.rude
  if rude:
    said.insert(0, rng.choice(lexicon.RUDE))
  elif courteous and rng.random() < 0.7:
    said.insert(0, rng.choice(lexicon.COURTESIES_BEFORE))
  elif courteous:
    said.append(rng.choice(lexicon.COURTESIES_AFTER))
  for filler in rng.sample(lexicon.FILLERS, 3):
    if rng.random() < writer.filler and len(lexicon.words(" ".join([*said, filler]))) <= room:
      said.append(filler)
  if ruled:
    said.insert(0 if meta["side"] == "begin" else len(said), meta["word"] + ".")
  return " ".join(said)


def pick(rng: random.Random, writers: tuple[Writer, ...] = WRITERS) -> Writer:
  """Draws a writer by share."""
  return rng.choices(writers, [writer.share for writer in writers])[0]
