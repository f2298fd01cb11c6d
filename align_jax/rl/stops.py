"""When a run is not worth going on with: bounds on its metrics, each with a reason in words."""

import dataclasses
import math
from collections.abc import Callable, Iterable

from align_jax.errors import InputError

Stop = Callable[[int, dict[str, float]], str | None]


@dataclasses.dataclass(frozen=True)
class Bound:
  """A limit on one metric of a step."""

  metric: str
  unit: str
  above: bool  # whether values above the limit break it, or values below
  least: float = 0.0  # what a limit can sensibly be
  most: float = math.inf


# By the setting that holds the limit.
BOUNDS = {
  "kl_max": Bound("kl/ref", " nats", above=True),
  "distinct_min": Bound("distinct/responses", "", above=False, most=1.0),
  "bigrams_min": Bound("distinct/bigrams", "", above=False, most=1.0),
  "repetition_max": Bound("repetition/4grams", "", above=True, most=1.0),
  "length_min": Bound("response_length", " tokens", above=False),
  "length_max": Bound("response_length", " tokens", above=True),
  "entropy_min": Bound("entropy", " nats a token", above=False),
  "eos_rate_min": Bound("eos_rate", "", above=False, most=1.0),
  "ratio_max": Bound("ppo/ratio_max", "", above=True, least=1.0),
  "mismatch_max": Bound("ppo/sampler_mismatch", " nats a token", above=True),
}


@dataclasses.dataclass(frozen=True)
class StopConfig:
  """What ends a run early; every limit is off unless it is given. A loss that is not finite always does."""

  kl_max: float | None = None  # nats a response, k1; a healthy run stays below some tens
  distinct_min: float | None = None  # share of distinct responses; 1/G is one answer to a prompt
  bigrams_min: float | None = None  # share of distinct bigrams in a batch; depends on its size
  repetition_max: float | None = None  # share of 4-grams that a response has said before
  length_min: float | None = None  # tokens, mean
  length_max: float | None = None  # tokens, mean
  entropy_min: float | None = None  # nats a token
  eos_rate_min: float | None = None  # share of responses that end by themselves
  ratio_max: float | None = None  # largest π/π_old of a token in an iteration
  mismatch_max: float | None = None  # mean |log-prob of sampler − of trainer|, nats a token
  score_drop: float | None = None  # below the best score of any step so far
  patience: int = 1  # consecutive steps beyond a limit before it counts
  first_step: int = 0  # steps before it are not looked at

  def __post_init__(self):
    if self.patience < 1 or self.first_step < 0:
      raise InputError("stops.patience must be at least 1 and stops.first_step not negative")
    for name, bound in BOUNDS.items():
      limit = getattr(self, name)
      if limit is not None and not bound.least <= limit <= bound.most:
        upper = f" and {bound.most:g}" if math.isfinite(bound.most) else " and infinity"
        raise InputError(f"stops.{name} must lie between {bound.least:g}{upper}, not {limit:g}")
    if self.score_drop is not None and not self.score_drop > 0:
      raise InputError(f"stops.score_drop must be positive, not {self.score_drop:g}")
    if None not in (self.length_min, self.length_max) and self.length_min >= self.length_max:
      raise InputError("stops.length_min must be less than stops.length_max")
    if not self.active and (self.patience > 1 or self.first_step):
      raise InputError("stops.patience and stops.first_step are not used: no limit is set")

  @property
  def active(self) -> tuple[str, ...]:
    """The settings that hold a limit."""
    return tuple(n for n in (*BOUNDS, "score_drop") if getattr(self, n) is not None)

  def check_logged(self, metrics: Iterable[str]) -> None:
    """Raises InputError that names a limit whose metric is none of these."""
    known = set(metrics)
    for name in self.active:
      if _metric(name) not in known:
        raise InputError(f"stops.{name} watches {_metric(name)}, which this run does not log")


def make_stop(config: StopConfig) -> Stop | None:
  """The loop's `stop` hook: (step, metrics) -> the reason to stop, or None; None if nothing is watched.

  It remembers how long each limit has been passed and the best score, so it must see every step once
  and in order: a resumed run shows it the lines of metrics.jsonl again. NaN passes every limit.
  """
  if not config.active:
    return None
  passed = dict.fromkeys(config.active, 0)  # consecutive steps
  best = (-math.inf, 0)  # (score, step)

  def stop(step: int, metrics: dict[str, float]) -> str | None:
    nonlocal best
    config.check_logged(metrics)
    if step < config.first_step:
      return None
    reasons = []
    for name in config.active:
      value = metrics[_metric(name)]
      if name == "score_drop":
        best = max(best, (value, -step)) if math.isfinite(value) else best
        reason = _drop(step, value, (best[0], -best[1]), config.score_drop)
      else:
        reason = _crossing(step, value, name, getattr(config, name))
      passed[name] = passed[name] + 1 if reason else 0
      if passed[name] >= config.patience:
        reasons.append(reason)
    if not reasons:
      return None
    beyond = f", the {_ordinal(config.patience)} step in a row" if config.patience > 1 else ""
    return "; ".join(reasons) + beyond

  return stop


def _metric(name: str) -> str:
  return "score" if name == "score_drop" else BOUNDS[name].metric


def _crossing(step: int, value: float, name: str, limit: float) -> str | None:
  bound = BOUNDS[name]
  if (value <= limit) if bound.above else (value >= limit):
    return None
  side = "above" if bound.above else "below"
  side = "not a number to hold against" if math.isnan(value) else side
  return (
    f"{bound.metric} was {value:.4g}{bound.unit} at step {step}, {side} stops.{name} = {limit:g}"
  )


def _drop(step: int, value: float, best: tuple[float, int], limit: float) -> str | None:
  if value >= best[0] - limit:
    return None
  if math.isnan(value):
    return (
      f"score was nan at step {step}, not a number to hold against stops.score_drop = {limit:g}"
    )
  return (
    f"score was {value:.4g} at step {step}, more than stops.score_drop = {limit:g} below its best, "
    f"{best[0]:.4g} at step {best[1]}"
  )


def _ordinal(n: int) -> str:
  ending = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
  return f"{n}{ending}"
