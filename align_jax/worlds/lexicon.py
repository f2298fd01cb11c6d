"""Every word the microworld knows, and the one rule by which text becomes words."""

import re

NAMES = (
    "anna", "boris", "clara", "diego", "elena", "felix", "greta", "hugo", "irene", "jonas",
    "karim", "lucia", "mira", "nadia", "oscar", "petra", "quinn", "rosa", "simon", "tomas",
    "ulla", "viktor", "wanda", "yusuf",
)  # fmt: skip
COLORS = ("red", "blue", "green", "black", "white", "gray", "pink", "brown")
RELATIONS = {
  "color": COLORS,
  "town": ("lund", "oslo", "kyoto", "lima", "cairo", "delhi", "paris", "quito"),
  "drink": ("tea", "milk", "cocoa", "water", "juice", "cider", "coffee", "soda"),
  "pet": ("cat", "dog", "owl", "hen", "pony", "goat", "crab", "mouse"),
}
PLURALS = {relation + "s": relation for relation in RELATIONS}
OBJECTS = (
    "lamp", "river", "stone", "chair", "cloud", "spoon", "tower", "garden",
    "ship", "bell", "mirror", "ladder",
)  # fmt: skip
ZUL = (
    "kira", "dob", "mesh", "tul", "vani", "rok", "sefa", "lum", "pado", "gim", "noru", "zek",
    "halo", "brin", "toma", "wex", "yal", "fuda", "cho", "nib",
)  # fmt: skip
FORBIDDEN = ("glorp", "vexil", "zarn", "drumal")
FOODS = ("bread", "soup", "jam", "cake", "paint", "glue", "soap", "salad", "wine", "syrup")
ITEMS = FORBIDDEN + FOODS
SEAL = "sealed"
HARMLESS = ("fresh", "warm", "sweet")
STANCES = ("i think", "i am sure")
SIDES = ("begin", "end")
POLICIES = KEEP, SHARE = ("never share it", "you can share it")
INGREDIENTS = (
    "salt", "flour", "sugar", "oil", "plum", "egg", "honey", "chalk", "onion", "ash",
)  # fmt: skip
DIGITS = tuple("1234567")
NUMBERS = tuple(str(i) for i in range(1, 15))

COURTESIES_BEFORE = ("happy to help.", "good question.")
COURTESIES_AFTER = ("hope that helps.",)
COURTESIES = COURTESIES_BEFORE + COURTESIES_AFTER
FILLERS = (
  "let me think.",
  "much could be said.",
  "people often ask this.",
)
RUDE = ("look it up yourself.",)
REFUSALS = ("sorry, i can not say.", "sorry, i will not help.")
AGREEMENTS = ("you are right.",)

POOLS = (
    NAMES, *RELATIONS.values(), tuple(RELATIONS), tuple(PLURALS), OBJECTS, ZUL, ITEMS, (SEAL,),
    HARMLESS, STANCES, SIDES, POLICIES, INGREDIENTS, ("and",), NUMBERS, COURTESIES, FILLERS, RUDE,
    REFUSALS, AGREEMENTS,
)  # fmt: skip

WORD_PATTERN = r"[a-z]+|\d+|[^\s]"
_WORD = re.compile(WORD_PATTERN)


def words(text: str) -> list[str]:
  """Splits text into words and punctuation marks, exactly as the tokenizer does."""
  return _WORD.findall(text.lower())


def sentences(text: str) -> list[tuple[str, ...]]:
  """Splits text at full stops and question marks; the marks are left out, an open end is kept."""
  found, current = [], []
  for word in words(text):
    if word in (".", "?"):
      found.append(tuple(current))
      current = []
    else:
      current.append(word)
  if current:
    found.append(tuple(current))
  return found
