"""Best-of-n: what choosing the best of n samples by a proxy buys in the proxy and in the true score."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from align_jax import config as config_lib
from align_jax.errors import InputError
from align_jax.evals import plots, policy, results, statistics
from align_jax.evals.statistics import Estimate


@dataclasses.dataclass(frozen=True)
class BestOfNPoint:
  """One n: both scores of the response that the proxy chooses, means over prompts."""

  n: int
  kl: float  # nats, see `best_of_n_kl`
  proxy: Estimate
  gold: Estimate
  gold_gain: Estimate  # over n = 1, paired prompt by prompt


@dataclasses.dataclass(frozen=True)
class BestOfN:
  """A policy under best-of-n sampling; the interval is over prompts."""

  policy: str
  selector: str  # gives the proxy, which chooses
  scorer: str  # gives the gold score, which is reported
  prompts: int
  samples: int  # N, to each prompt
  seed: int
  temperature: float
  max_new_tokens: int
  points: tuple[BestOfNPoint, ...]


def best_of_n_scores(proxy: np.ndarray, gold: np.ndarray, n: int) -> np.ndarray:
  """E_n = Σ_{i=n..N} C(i−1, n−1)/C(N, n) · g₍ᵢ₎: the gold score of the best by proxy of n of N samples.

  Over all C(N, n) choices at once, so unbiased, and of less variance than drawing some. g₍ᵢ₎ is the
  gold score of the sample that is i-th from below by proxy; samples of equal proxy are chosen between
  at random, which is here an average too.

  Args:
    proxy: [P, N], what chooses.
    gold: [P, N], what is reported of the chosen; the proxy itself for its own curve.
    n: 1 to N.

  Returns:
    [P], float64.

  Raises:
    ValueError: if the scores are not both [P, N] and finite, or n is out of range.

  References:
    Nakano et al. 2021 (WebGPT), https://arxiv.org/abs/2112.09332, appendix I; Gao et al. 2022,
    https://arxiv.org/abs/2210.10760. Neither has ties.
  """
  proxy, gold = np.asarray(proxy, np.float64), np.asarray(gold, np.float64)
  if proxy.ndim != 2 or proxy.shape != gold.shape:
    raise ValueError(f"both scores must be [P, N], got {proxy.shape} and {gold.shape}.")
  if not (np.isfinite(proxy).all() and np.isfinite(gold).all()):
    raise ValueError("best-of-n needs finite scores.")
  total = proxy.shape[1]
  if not 1 <= n <= total:
    raise ValueError(f"n must be in [1, {total}], got {n}.")
  order = np.argsort(proxy, axis=1, kind="stable")
  weights = _rank_weights(total, n)
  rows = zip(np.take_along_axis(proxy, order, axis=1), np.take_along_axis(gold, order, axis=1))
  return np.array([_untied(weights, ranked) @ of_row for ranked, of_row in rows])


def best_of_n_kl(n: int) -> float:
  """log n − (n − 1)/n, the KL from the policy to best-of-n of it, in nats a response.

  Exact where no two responses are tied, and an upper bound in general (Beirami et al. 2024,
  https://arxiv.org/abs/2401.01879).
  """
  if n < 1:
    raise ValueError(f"n must be at least 1, got {n}.")
  return math.log(n) - (n - 1) / n


def _rank_weights(total: int, n: int) -> np.ndarray:
  """[N], C(i−1, n−1)/C(N, n) for i = 1..N: the chance that rank i from below is the best of n."""
  i = np.arange(total, n, -1)
  # w_N = n/N, and one rank below it (i − n)/(i − 1) times as much: no binomial is ever formed.
  weights = np.zeros(total)
  weights[n - 1 :] = np.cumprod(np.concatenate([[n / total], (i - n) / (i - 1)]))[::-1]
  return weights


def _untied(weights: np.ndarray, ranked: np.ndarray) -> np.ndarray:
  """The weights of a sorted row, shared out evenly among equal entries."""
  starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
  sizes = np.diff(np.append(starts, len(ranked)))
  return np.repeat(np.add.reduceat(weights, starts) / sizes, sizes)


def evaluate_best_of_n(
  of: policy.Policy,
  prompts: Sequence[Any],
  tokenizer,
  selector: policy.Scorer,
  scorer: policy.Scorer,
  settings: policy.SamplingSettings,
  *,
  sizes: Sequence[int],
  samples: int,
  selector_name: str,
  scorer_name: str,
  mesh=None,
) -> BestOfN:
  """Draws N samples to every prompt, scores each twice, and estimates every n of `sizes` from them.

  Args:
    of: the policy.
    prompts: data.Prompt records [P].
    tokenizer: of the policy.
    selector: gives the proxy score, which chooses.
    scorer: gives the score that is reported.
    settings: how samples are drawn.
    sizes: the n, each from 1 to N; 1 is added, as gains are measured from it.
    samples: N. Near n = N the estimate rests on few different choices: let N be a few times n.
    selector_name: for the record.
    scorer_name: for the record.
    mesh: of the sampler.

  Raises:
    InputError: if there are no prompts, or an n is not in [1, N].
  """
  check_sizes(sizes, samples)
  if not prompts:
    raise InputError("an evaluation needs at least one prompt")
  repeated = [prompt for prompt in prompts for _ in range(samples)]
  responses = policy.respond(of, prompts, tokenizer, settings, mesh, samples_per_prompt=samples)
  shape = len(prompts), samples
  proxy, gold = (
    np.asarray(score(repeated, responses)).reshape(shape) for score in (selector, scorer)
  )
  return BestOfN(
    policy=of.name,
    selector=selector_name,
    scorer=scorer_name,
    prompts=len(prompts),
    samples=samples,
    seed=settings.seed,
    temperature=settings.temperature,
    max_new_tokens=settings.max_new_tokens,
    points=curve(proxy, gold, sizes),
  )


def check_sizes(sizes: Sequence[int], samples: int) -> None:
  """Raises InputError unless every n is in [1, N] and listed once."""
  if not sizes or len(set(sizes)) < len(sizes):
    raise InputError(f"best_of must list different numbers, got {tuple(sizes)}")
  if not 1 <= min(sizes) <= max(sizes) <= samples:
    raise InputError(f"best_of must lie in [1, best_of_samples] = [1, {samples}]: {tuple(sizes)}")


def curve(proxy: np.ndarray, gold: np.ndarray, sizes: Sequence[int]) -> tuple[BestOfNPoint, ...]:
  """One point for every n, in order, of scores [P, N]; n = 1 is always the first."""
  first = best_of_n_scores(proxy, gold, 1)
  points = []
  for n in sorted({1, *sizes}):
    chosen = best_of_n_scores(proxy, gold, n)
    points.append(
      BestOfNPoint(
        n=n,
        kl=best_of_n_kl(n),
        proxy=statistics.mean(best_of_n_scores(proxy, proxy, n)),
        gold=statistics.mean(chosen),
        gold_gain=statistics.paired_difference(chosen, first),
      )
    )
  return tuple(points)


def save(folder: str | pathlib.Path, found: BestOfN) -> None:
  """Writes best_of_n.json and best_of_n.png."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "best_of_n.png").write_bytes(plots.to_png(figure(found)))
  text = json.dumps(results.to_json(found), indent=2, allow_nan=False)
  results.write_text(folder / "best_of_n.json", text + "\n")


def load(folder: str | pathlib.Path) -> BestOfN:
  """Reads best_of_n.json; InputError that names the file and the field at fault."""
  file = pathlib.Path(folder) / "best_of_n.json"
  return config_lib.build(BestOfN, results.read_json(file), str(file), finite=False)


@plots.styled
def figure(found: BestOfN) -> Figure:
  """Proxy and gold score against √KL of best-of-n, with the n on top (after Gao et al. 2022)."""
  drawing = Figure(figsize=(8.6, 3.6), layout="constrained")
  left, right = drawing.subplots(1, 2)
  roots = [math.sqrt(point.kl) for point in found.points]
  panels = ((left, "proxy", "reward", found.selector), (right, "gold", "dpo", found.scorer))
  for axes, name, look, source in panels:
    estimates = [getattr(point, name) for point in found.points]
    colour, marker = plots.look_of(look)
    axes.errorbar(
      roots,
      [estimate.value for estimate in estimates],
      yerr=plots.interval_bars(estimates),
      marker=marker,
      color=colour,
      linewidth=1.2,
      capsize=3,
    )
    axes.set_title(f"{name.capitalize()} score ({pathlib.PurePath(source).name})", pad=24)
    axes.set_xlabel("√KL of best-of-n  (√nats a response)")
    axes.set_ylabel(f"mean over {found.prompts} prompts")
    top = axes.secondary_xaxis("top")
    top.set_xticks(roots, [str(point.n) for point in found.points])
    top.tick_params(colors=plots.MUTED, length=3, labelsize=7.5)
  return drawing
