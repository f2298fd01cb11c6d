"""Which features does a preference reward? Logistic regression on differences of named features.

In the manner of Sharma et al. 2023 (https://arxiv.org/abs/2310.13548), who regress human preferences on
23 features that a language model reads off pairs of answers. Here features are counted in the text, or
known from a world's judge; labels and a reward model are regressed side by side on the same pairs.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from align_jax.evals import logistic, statistics
from align_jax.evals.statistics import Estimate

_PRIOR = 0.01  # precision of the prior on coefficients a deviation: only to keep them finite


@dataclasses.dataclass(frozen=True)
class Feature:
  """One coefficient: by how many nats of log-odds it moves the preference."""

  name: str
  differs: float  # share of pairs whose sides differ in it
  deviation: float  # root mean square of its difference
  coefficient: Estimate  # a unit
  standardised: Estimate  # a deviation


@dataclasses.dataclass(frozen=True)
class Regression:
  """Preferences explained by features; what is held out was not fitted."""

  n: int
  features: tuple[Feature, ...]
  held_out: Estimate  # share of held-out pairs whose preferred side is predicted
  longer: Estimate  # of the same pairs, by the rule that the longer side is preferred
  shuffled: Estimate  # held-out accuracy when preferences are shuffled among pairs: chance
  shuffled_found: int  # coefficients whose interval excludes 0 then; 5 % of them by chance
  left_out: dict[str, str]  # feature -> why it has no coefficient


def regress(
  differences: Mapping[str, npt.ArrayLike],
  preferences: npt.ArrayLike,
  extra: npt.ArrayLike,
  *,
  clusters: npt.ArrayLike | None = None,
  held_out: float = 0.2,
  fewest: int = 8,
  seed: int = 0,
) -> Regression:
  """Fits P(first preferred) = σ(Σ_k w_k Δ_k) and tests it on pairs left out.

  No intercept: nothing is known of which side is first. To that end half the pairs, drawn by `seed`,
  are turned around before they are shuffled for the control. Intervals are robust, by cluster.

  differences: name -> feature of the first side minus that of the second, [n]. preferences [n] within
  [0, 1]: that the first is preferred. extra [n]: tokens of the first minus the second. clusters [n]:
  pairs that share a prompt; they are held out together. held_out: share of clusters. fewest: a
  feature in which fewer pairs differ is left out, as is one that follows from those before it.
  ValueError for fewer than 20 pairs or no feature.
  """
  y, extra = np.asarray(preferences, np.float64), np.asarray(extra, np.float64)
  columns = {name: np.asarray(column, np.float64) for name, column in differences.items()}
  if len(y) < 20 or any(column.shape != y.shape for column in (*columns.values(), extra)):
    raise ValueError("features are regressed on 20 pairs or more, one difference for each.")
  names, left_out = _usable(columns, fewest)
  if not names:
    raise ValueError("no feature differs between the sides of enough pairs.")
  rng = np.random.default_rng(seed)
  clusters = np.arange(len(y)) if clusters is None else _numbers(clusters)
  kept = rng.permutation(clusters.max() + 1)[clusters] >= held_out * (clusters.max() + 1)
  turn = np.where(rng.random(len(y)) < 0.5, -1.0, 1.0)
  x = np.stack([columns[n] for n in names], axis=1) * turn[:, None]
  y, extra = np.where(turn > 0, y, 1 - y), extra * turn
  scale = np.sqrt((x**2).mean(axis=0))
  whole = _fit(x / scale, y, clusters)
  shuffled = rng.permutation(y)
  control = _fit(x / scale, shuffled, clusters)
  return Regression(
    n=len(y),
    features=tuple(
      _feature(name, x[:, i], scale[i], whole.estimate(i)) for i, name in enumerate(names)
    ),
    held_out=_accuracy(x / scale, y, kept, clusters),
    longer=statistics.proportion(_agreement(extra[~kept], y[~kept])),
    shuffled=_accuracy(x / scale, shuffled, kept, clusters),
    shuffled_found=sum(control.estimate(i).excludes(0.0) for i in range(len(names))),
    left_out=left_out,
  )


def _usable(columns: Mapping[str, np.ndarray], fewest: int) -> tuple[list[str], dict[str, str]]:
  """(names that can have a coefficient, why the others cannot)."""
  names, left_out, basis = [], {}, []
  for name, column in columns.items():
    differing = int(np.count_nonzero(column))
    if differing < fewest:
      left_out[name] = f"differs in {differing} pairs"
      continue
    rest = column / np.linalg.norm(column)
    for direction in basis * 2:  # twice: the rounding of the first pass is gone after the second
      rest = rest - (direction @ rest) * direction
    size = np.linalg.norm(rest)
    if size < 1e-6:
      left_out[name] = "follows from the features before it"
      continue
    names.append(name)
    basis.append(rest / size)
  return names, left_out


def _numbers(clusters) -> np.ndarray:
  return np.unique(np.asarray(clusters), return_inverse=True)[1]


def _fit(x, y, clusters) -> logistic.Fit:
  return logistic.fit(x, y, l2=_PRIOR, clusters=clusters)


def _feature(name: str, column: np.ndarray, scale: float, found: Estimate) -> Feature:
  values = (found.value, found.stderr, found.low, found.high)
  raw = Estimate(*(float(v / scale) for v in values), found.n)
  return Feature(name, float(np.mean(column != 0)), float(scale), raw, found)


def _accuracy(x, y, kept: np.ndarray, clusters) -> Estimate:
  fitted = _fit(x[kept], y[kept], clusters[kept])
  return statistics.proportion(_agreement(x[~kept] @ fitted.coefficients, y[~kept]))


def _agreement(scores: np.ndarray, preferences: np.ndarray) -> np.ndarray:
  """1 where both prefer the same side, 0 where not, 0.5 where either is undecided."""
  return (np.sign(scores) * np.sign(preferences - 0.5) + 1) / 2


_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_SENTENCE = re.compile(r"[.!?…。！？]+(?=\s|$|[\"'”’)])")
_LINES = re.MULTILINE


def _counter(pattern: str, flags: int = re.IGNORECASE) -> Callable[[str], float]:
  compiled = re.compile(pattern, flags)
  return lambda text: float(len(compiled.findall(text)))


def _present(pattern: str) -> Callable[[str], float]:
  compiled = re.compile(pattern, re.IGNORECASE)
  return lambda text: float(compiled.search(text) is not None)


_REFUSAL = (
  r"\b(?:can ?not|can['’]t|won['’]t|will not|unable to|not able to|not comfortable|must decline)\s+"
  r"(?:\w+\s+)?(?:help|assist|say|answer|provide|do|discuss|give|recommend|support|fulfill|comply)\b"
)
_HEDGE = (
  r"\b(?:may|might|could|perhaps|maybe|possibly|probably|likely|seems?|appears?|generally|usually|"
  r"often|sometimes|i think|i believe|i guess|not sure|it depends)\b"
)
_COURTESY = (
  r"\b(?:please|thanks?|thank you|you['’]re welcome|happy to|glad to|good question|great question|"
  r"hope (?:that|this) helps|let me know|feel free)\b"
)
_AGREEMENT = (
  r"\b(?:you(?:['’]re| are) (?:absolutely |totally |completely )?right|i agree|good point|"
  r"that(?:['’]s| is) (?:right|true|correct)|exactly|absolutely|of course)\b"
)

# Of the text of one response. Counts are taken as log(1 + count): the tenth list item is not the first.
_COUNTED: dict[str, Callable[[str], float]] = {
  "words": lambda text: float(len(_WORD.findall(text))),
  "sentences": lambda text: float(max(1, len(_SENTENCE.findall(text)))),
  "paragraphs": lambda text: float(len([p for p in re.split(r"\n\s*\n", text) if p.strip()])),
  "list items": _counter(r"^\s*(?:[-*•+]|\d+[.)])\s+", _LINES),
  "questions": _counter(r"[?？]"),
  "exclamations": _counter(r"[!！]"),
  "hedges": _counter(_HEDGE),
  "first person": _counter(r"\b(?:i|i['’]m|i['’]d|i['’]ll|i['’]ve|my|me|mine|myself)\b"),
  "second person": _counter(r"\b(?:you|your|yours|yourself)\b"),
  "numbers": _counter(r"\d+(?:[.,]\d+)*"),
  "negations": _counter(r"\b(?:no|not|never|nothing|\w+n['’]t)\b"),
}
_FOUND: dict[str, Callable[[str], float]] = {
  "markdown": _present(r"(?m)^#{1,6}\s|\*\*[^*\n]+\*\*|^\s*\|.*\|"),
  "code": _present(r"```|`[^`\n]+`"),
  "link": _present(r"https?://|www\."),
  "refusal": _present(_REFUSAL),
  "apology": _present(r"\b(?:sorry|apologi[sz]e|apologies|regret)\b"),
  "courtesy": _present(_COURTESY),
  "agreement": _present(_AGREEMENT),
}
NAMES = (*_COUNTED, *_FOUND, "prompt overlap", "variety")


def of_text(prompt: str, response: str) -> dict[str, float]:
  """The features NAMES of any response, surface marks of the language that they are written in.

  Counts as log(1 + count); marks as 1 or 0; `prompt overlap`, the share of the response's different
  words that the prompt has; `variety`, its different words over its words, both 0 for no words. The
  phrase lists are English and short: they find what is common, and miss much.
  """
  words = [word.lower() for word in _WORD.findall(response)]
  asked = {word.lower() for word in _WORD.findall(prompt)}
  different = set(words)
  found = {name: math.log1p(count(response)) for name, count in _COUNTED.items()}
  found |= {name: mark(response) for name, mark in _FOUND.items()}
  found["prompt overlap"] = len(different & asked) / len(different) if words else 0.0
  found["variety"] = len(different) / len(words) if words else 0.0
  return found


def differences(
  first: Sequence[Mapping[str, float]], second: Sequence[Mapping[str, float]]
) -> dict[str, np.ndarray]:
  """name -> features of the first sides minus those of the second, [n]."""
  return {name: np.array([a[name] - b[name] for a, b in zip(first, second)]) for name in first[0]}
