"""From the laboratory's folders to its report."""

import math
import pathlib

import jax
import numpy as np
import tqdm

from align_jax import models, worlds
from align_jax.evals import best_of_n, overoptimization, results, statistics
from align_jax.evals import overoptimization_report as report_lib
from align_jax.phases import overoptimization_steps as steps
from align_jax.phases import records, workspace
from align_jax.phases.overoptimization_config import (
  SURE,
  Arm,
  Ensemble,
  OveroptimizationConfig,
  Trunk,
)
from align_jax.rl import rewards


class Collector:
  """Reads scores once, and has the curves made of them."""

  def __init__(self, config: OveroptimizationConfig, root: pathlib.Path):
    self.config, self.root = config, root
    self.pool = steps.Pool.read(steps.parts(config, root))
    self.gold = self.pool.by_prompt(self.pool.gold)
    pairs = steps.held_out_pairs(config)
    self.judged = worlds.Microworld(seed=records.parse_world(config.held_out).seed).judge_pairs(
      pairs
    )
    self._gains: dict[str, report_lib.Gains] = {}

  def choose(self) -> None:
    """Best-of-n by every proxy; what was found before with the same n is read."""
    sizes = sorted({1, *self.config.best_of})
    for proxy in tqdm.tqdm(self.config.proxies, desc="best of n", mininterval=10.0):
      file = self.root / "proxies" / proxy.name / "best_of_n.npz"
      if file.exists():
        with np.load(file) as found:
          if found["sizes"].tolist() == sizes:
            parts = (found[name] for name in ("gold", "proxy", "kl"))
            self._gains[proxy.name] = report_lib.Gains(tuple(sizes), *parts)
            continue
      gains = report_lib.Gains.of(self._scores(proxy), self.gold, sizes)
      arrays = {"gold": gains.gold, "proxy": gains.proxy, "kl": gains.kl}
      steps.save(file, arrays | {"sizes": np.array(sizes)})
      self._gains[proxy.name] = gains

  def report(self) -> report_lib.Report:
    config, index = self.config, self.pool.index
    distinct = [len(np.unique(row)) / len(row) for row in index]
    curves = tuple(
      self._curve(name, arm, n) for name, arm in config.arms.items() for n in arm.comparisons
    )
    return report_lib.Report(
      policy=config.policy,
      prompts=len(index),
      samples=index.shape[1],
      distinct=statistics.proportion(distinct),
      start=statistics.mean(self.gold.mean(axis=1)),
      rl_start=self._rl_start() if config.rl_runs else None,
      fit_up_to=config.fit_up_to,
      curves=curves,
      ensembles=tuple(self._ensemble(name, e) for name, e in config.ensembles.items()),
      behaviours=self._behaviours(curves),
      rl=tuple(self._rl(name) for name in config.rl_runs),
    )

  def _scores(self, proxy) -> np.ndarray:
    return self.pool.by_prompt(steps.load_scores(self.root, proxy))

  def _curve(self, name: str, arm: Arm, comparisons: int) -> report_lib.Curve:
    members = self.config.members(arm, comparisons)
    by_seed, gains = (
      [self._gains[proxy.name] for proxy in members],
      self._mean_gains(arm, comparisons),
    )
    least, smallest = min(arm.comparisons), self._smallest(arm, comparisons)
    law, extrapolation = report_lib.bon_law(gains, self.config.fit_up_to)
    return report_lib.Curve(
      name=f"{name}-{comparisons}",
      **self._facts(name, arm, comparisons),
      combine=None,
      points=gains.points,
      peak=report_lib.peak_of(gains),
      seed_peaks=tuple(float(g.gold.mean(axis=0).max()) for g in by_seed),
      law=law,
      extrapolation=extrapolation,
      accuracy=self._accuracy(arm, members),
      over_less=None
      if comparisons == least
      else report_lib.peak_difference(gains, self._mean_gains(arm, least)),
      over_smaller=None
      if smallest is arm
      else report_lib.peak_difference(gains, self._mean_gains(smallest, comparisons)),
      over_single=None,
      error_correlation=None,
      disagreement=None,
    )

  def _mean_gains(self, arm: Arm, comparisons: int) -> report_lib.Gains:
    """Over the arm's seeds."""
    members = self.config.members(arm, comparisons)
    return report_lib.Gains.mean([self._gains[proxy.name] for proxy in members])

  def _smallest(self, arm: Arm, comparisons: int) -> Arm:
    """The arm of the smallest size among those with the same labels and this amount."""
    alike = [
      other
      for other in self.config.arms.values()
      if other.temperature == arm.temperature and comparisons in other.comparisons
    ]
    least = min(alike, key=lambda other: self._parameters(other.size))
    return arm if self._parameters(least.size) == self._parameters(arm.size) else least

  def _facts(self, name: str, arm: Arm, comparisons: int) -> dict:
    return {
      "arm": name,
      "size": arm.size,
      "parameters": self._parameters(arm.size),
      "comparisons": comparisons,
      "temperature": arm.temperature,
      "seeds": len(arm.seeds),
    }

  def _parameters(self, size: str) -> int:
    scratch = self.config.sft_config(Trunk(size)).model.scratch
    vocabulary = len(workspace.tokenizer_of(self.config.sft.model))
    model = models.Transformer(workspace.scratch_config(scratch, vocabulary))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(models.abstract_params(model)))

  def _accuracy(self, arm: Arm, members) -> report_lib.Accuracy:
    labeller = worlds.Labeller(temperature=arm.temperature or SURE)
    return report_lib.accuracy_of(
      [steps.load_pairs(self.root, proxy) for proxy in members],
      labeller.probabilities(self.judged),
      np.array([a.reward - b.reward for a, b in self.judged]),
    )

  def _ensemble(self, name: str, ensemble: Ensemble) -> report_lib.Curve:
    arm = self.config.arms[ensemble.arm]
    proxies = self.config.members(arm, ensemble.comparisons)
    members = np.stack([self._scores(proxy) for proxy in proxies])
    standard = overoptimization.standardise_members(members)
    combined = rewards.combine_members(standard, ensemble.combine, ensemble.variance_coef)
    gains = report_lib.Gains.of(combined, self.gold, self.config.best_of)
    single = self._mean_gains(arm, ensemble.comparisons)
    law, extrapolation = report_lib.bon_law(gains, self.config.fit_up_to)
    correlations = overoptimization.error_correlations(members, self.gold)
    return report_lib.Curve(
      name=name,
      **self._facts(ensemble.arm, arm, ensemble.comparisons),
      combine=ensemble.combine,
      points=gains.points,
      peak=report_lib.peak_of(gains),
      seed_peaks=(),
      law=law,
      extrapolation=extrapolation,
      accuracy=None,
      over_less=None,
      over_smaller=None,
      over_single=statistics.paired_difference(gains.gold[:, -1], single.gold[:, -1]),
      error_correlation=float(correlations[np.triu_indices(len(members), 1)].mean()),
      disagreement=statistics.mean(overoptimization.disagreement(standard)),
    )

  def _behaviours(self, curves) -> tuple[report_lib.Behaviour, ...]:
    """Of every arm's largest amount: one sample, the peak, and the largest n."""
    pool, world = self.pool, worlds.Microworld(seed=self.config.world_seed)
    owners = np.zeros(len(pool.gold), int)
    owners[pool.index] = np.arange(len(pool.index))[:, None]
    prompts = records.read(self.config.pool.prompts, "prompts")
    found = [world.judge(prompts[p], text) for p, text in zip(owners, pool.texts.tolist())]
    traits = {
      name: pool.by_prompt(np.array([getattr(judgement, name) for judgement in found], float))
      for name in report_lib.TRAITS
    }
    largest = {curve.arm: curve for curve in sorted(curves, key=lambda c: c.comparisons)}
    behaviours = []
    for name, arm in self.config.arms.items():
      curve = largest[name]
      proxy = self._scores(self.config.members(arm, curve.comparisons)[0])
      for n in sorted({1, curve.peak.n, curve.points[-1].n}):
        means = {
          trait: statistics.mean(best_of_n.best_of_n_scores(proxy, values, n))
          for trait, values in traits.items()
        }
        behaviours.append(report_lib.Behaviour(curve.name, n, means))
    return tuple(behaviours)

  def _rl_start(self):
    with np.load(self.root / "rl" / "start.npz") as found:
      return statistics.mean(found["gold"])

  def _rl(self, name: str) -> report_lib.RlCurve:
    run, config = self.config.rl_runs[name], self.config
    rows = [row for _, row in results.read_lines(self.root / "rl" / name / "metrics.jsonl")]
    columns = ("kl/ref", "score/gold", "score/proxy")
    kl, gold, proxy = np.array(
      [[row[column] for column in columns] for row in rows if "score/gold" in row], np.float64
    ).T
    points = report_lib.rl_points(kl, gold, proxy, self._rl_start().value, config.rl_window)
    law, extrapolation = report_lib.rl_law(points, config.rl_fit_share)
    return report_lib.RlCurve(
      name=name,
      arm=run.arm,
      comparisons=run.comparisons,
      kl_coef=run.kl_coef,
      combine=run.combine,
      points=points,
      peak=report_lib.rl_peak(points, gold, config.rl_window),
      law=law,
      extrapolation=extrapolation,
    )
