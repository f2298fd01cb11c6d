"""What is looked for in the metrics of every step: losses that leap, and losses that never move."""

import collections
import math
import statistics
from collections.abc import Callable

from align_jax.errors import InputError

ACTIONS = ("warn", "stop", "off")
Watch = Callable[[int, dict[str, float]], str | None]  # (step, its metrics) -> what is wrong

_WINDOW = 50  # losses that the next one is compared with
_LEAST = 20  # of them, before anything is said
_SPREADS = 10.0  # deviations from the median that make a leap; 1.4826 median deviations each
_STILL = 1e-3  # how near to the loss of an untrained model is still there
_SHARE = 0.2  # of the steps of a run: warm-up is over


def check_action(name: str, action: str) -> None:
  """Raises InputError unless it is one of `ACTIONS`."""
  if action not in ACTIONS:
    raise InputError(f"{name} must be one of {', '.join(ACTIONS)}, not {action!r}")


def spikes() -> Watch:
  """A loss far above the median of the last 50, measured by how far those are from it themselves.

  Medians, because one leap must not hide the next.  A loss that stays up is told once.
  """
  recent, up = collections.deque(maxlen=_WINDOW), False

  def watch(step: int, values: dict[str, float]) -> str | None:
    nonlocal up
    loss, known = values["loss"], list(recent)
    recent.append(loss)
    if len(known) < _LEAST:
      return None
    middle = statistics.median(known)
    spread = 1.4826 * statistics.median(abs(x - middle) for x in known)
    spread = max(spread, 1e-3 * abs(middle), 1e-6)  # a curve that stands still has no spread
    told, up = up, loss > middle + _SPREADS * spread
    if told or not up:
      return None
    return f"the loss leapt to {loss:.4g} from about {middle:.4g}"

  return watch


def stuck(start: float, steps: int) -> Watch:
  """50 losses in a row within 1e-3 of `start`, that of a policy which is its reference.

  Looked for once a fifth of the `steps` is done, because a rate that is still being warmed up moves
  little.  It speaks once.
  """
  still, told = 0, False

  def watch(step: int, values: dict[str, float]) -> str | None:
    nonlocal still, told
    still = still + 1 if abs(values["loss"] - start) <= _STILL * max(1.0, abs(start)) else 0
    if told or still < _WINDOW or step + 1 < _SHARE * steps:
      return None
    told = True
    name = "ln 2" if math.isclose(start, math.log(2), rel_tol=1e-6) else f"{start:.4g}"
    return f"the loss has not left {name}, where it began, for {_WINDOW} steps: nothing is learned"

  return watch
