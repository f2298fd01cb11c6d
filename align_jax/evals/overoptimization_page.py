"""The over-optimisation report as files: overoptimization.json, .html and its pictures."""

import json
import pathlib
import statistics

from align_jax.evals import overoptimization_plots, plots, report, results
from align_jax.evals.overoptimization import Extrapolation, Fit
from align_jax.evals.overoptimization_report import TRAITS, Curve, Report, RlCurve
from align_jax.evals.report import Picture
from align_jax.evals.rounds_page import Cell, Table
from align_jax.evals.statistics import Estimate


def write(folder: pathlib.Path, found: Report) -> pathlib.Path:
  """Writes all files into `folder` and returns the page's path."""
  figures = {"bon": overoptimization_plots.bon(found)}
  if overoptimization_plots.rl_groups(found.rl):
    figures["rl"] = overoptimization_plots.rl(found)
  figures["accuracy"] = overoptimization_plots.accuracy(found)
  pictures = {}
  for name, figure in figures.items():
    png = plots.to_png(figure)
    (folder / f"overoptimization_{name}.png").write_bytes(png)
    pictures[name] = Picture(name, png, _ALT[name], round(108 * figure.get_figwidth()))
  text = json.dumps(results.to_json(found), indent=2, allow_nan=False)
  results.write_text(folder / "overoptimization.json", text + "\n")
  html = report.page(
    "overoptimization.html",
    title=folder.resolve().name,
    sentences=sentences(found),
    pictures=pictures,
    captions={
      "bon": overoptimization_plots.CAPTION,
      "rl": overoptimization_plots.RL_CAPTION,
      "accuracy": overoptimization_plots.ACCURACY_CAPTION,
    },
    tables=tables(found),
  )
  page = folder / "overoptimization.html"
  results.write_text(page, html)
  return page


_ALT = {
  "bon": "Gold reward of best-of-n against the root of its KL, by data, size and ensemble",
  "rl": "Gold and proxy reward of online learning against the root of its KL",
  "accuracy": "Agreement of proxies with held-out labels as comparisons grow, beside its ceiling",
}


def sentences(found: Report) -> list[str]:
  """What was found, in words that the intervals support."""
  told = [
    f"{found.prompts} prompts with {found.samples:,} samples of the policy each "
    f"({report.percent(found.distinct.value)} of a prompt’s samples differ). One sample has gold reward "
    f"{report.number(found.start.value)} ({report.interval(found.start)})."
  ]
  interior = [c for c in found.curves if c.peak.is_interior]
  told.append(
    f"Gold has an interior maximum, beyond the 95 % interval of its fall, under {len(interior)} of "
    f"{len(found.curves)} proxies."
  )
  told += [_ladder(found, arm) for arm in dict.fromkeys(c.arm for c in found.curves)]
  told += _laws(found)
  told += [_of_ensemble(e) for e in found.ensembles]
  told += [_of_run(r) for r in found.rl]
  return told


def _ladder(found: Report, arm: str) -> str:
  curves = sorted((c for c in found.curves if c.arm == arm), key=lambda c: c.comparisons)
  gains = ", ".join(
    f"{report.signed(c.peak.gain.value)} at n = {c.peak.n:,} ({c.comparisons:,})" for c in curves
  )
  last = curves[-1]
  told = f"{arm}: the highest gold gain (comparisons) is {gains}"
  if last.over_less is not None:
    told += f"; most over fewest comparisons {_difference(last.over_less)}"
  if last.over_smaller is not None:
    told += f"; over the smallest size {_difference(last.over_smaller)}"
  return f"{told}."


def _difference(estimate: Estimate) -> str:
  return f"{report.signed(estimate.value)} ({report.interval(estimate)})"


def _laws(found: Report) -> list[str]:
  fitted = [c for c in (*found.curves, *found.ensembles) if c.law is not None]
  tested = [c.extrapolation for c in fitted if c.extrapolation is not None]
  told = []
  if fitted:
    lowest = min(c.law.r_squared or 0.0 for c in fitted)
    told.append(
      f"R = d (α − β d) was fitted to {len(fitted)} best-of-n curves, with a weighted R² of at least "
      f"{lowest:.3f}."
    )
  if tested:
    wins = sum(e.prefers_its_form for e in tested)
    told.append(
      f"Fitted up to n = {found.fit_up_to}, it predicts the rest better than the RL form in {wins} of "
      f"{len(tested)} curves; there its median error is "
      f"{report.number(statistics.median(e.rmse for e in tested))}, and the median of predicted − measured "
      f"{report.signed(statistics.median(e.bias for e in tested))}."
    )
  return told


def _of_ensemble(e: Curve) -> str:
  return (
    f"{e.combine} of {e.seeds} {e.arm} proxies ({e.comparisons:,} comparisons, their errors correlate "
    f"{report.number(e.error_correlation)}): highest gold gain {report.signed(e.peak.gain.value)} at "
    f"n = {e.peak.n:,}; at n = {e.points[-1].n:,} it is {report.signed(e.over_single.value)} over one "
    f"member ({report.interval(e.over_single)})."
  )


def _of_run(r: RlCurve) -> str:
  fallen = "falls" if r.peak.is_interior else "does not fall beyond noise"
  return (
    f"{r.name}: gold gains {report.signed(r.peak.gain.value)} at √KL = {report.number(r.peak.distance)} "
    f"and {fallen} afterwards (by {report.number(r.peak.fall.value)}), ending at "
    f"√KL = {report.number(r.points[-1].distance)}."
  )


def tables(found: Report) -> list[Table]:
  """Curves, ensembles, runs and accuracies, each only where there is something."""
  shown = [_curves(found), _accuracy(found), _behaviours(found)]
  shown += [_ensembles(found)] if found.ensembles else []
  shown += [_runs(found)] if found.rl else []
  return shown


_LAW = ("α", "β", "d* fitted", "R* fitted", "R²", "held-out error", "AIC − other’s")


def _curves(found: Report) -> Table:
  return Table(
    "Best of n",
    "Gains of gold over one sample, means over the seeds of a proxy, with 95 % intervals over prompts. The "
    "fall is from the peak to the largest n, the peak chosen on the other half of the prompts. Laws are "
    f"fitted to all n; held-out error and AIC are of the n beyond {found.fit_up_to}, after a fit to those "
    "up to it, and an AIC difference below 0 is for the law.",
    (
      "proxy", "parameters", "comparisons", "labeller’s T", "seeds", "peak at n", "its √KL", "gain",
      "seeds’ own", "over fewest comparisons", "over smallest size", "fall", *_LAW,
    ),
    [
      [
        (c.name, ""),
        (f"{c.parameters:,}", ""),
        (f"{c.comparisons:,}", ""),
        (f"{c.temperature:g}" if c.temperature else "gold", ""),
        (str(c.seeds), ""),
        *_peak(c),
        _seeds(c.seed_peaks),
        _number(c.over_less, signed=True),
        _number(c.over_smaller, signed=True),
        _number(c.peak.fall),
        *_law(c.law, c.extrapolation),
      ]
      for c in found.curves
    ],
  )  # fmt: skip


def _ensembles(found: Report) -> Table:
  return Table(
    "Ensembles",
    "Members are standardised on the pool. Over one member: gold at the largest n, less the mean of the "
    "members chosen by alone, paired over prompts.",
    (
      "ensemble", "members", "comparisons", "errors correlate", "disagreement", "peak at n", "its √KL",
      "gain", "fall", "over one member", *_LAW,
    ),
    [
      [
        (e.name, ""),
        (str(e.seeds), ""),
        (f"{e.comparisons:,}", ""),
        (report.number(e.error_correlation), ""),
        _number(e.disagreement),
        *_peak(e),
        _number(e.peak.fall),
        _number(e.over_single, signed=True),
        *_law(e.law, e.extrapolation),
      ]
      for e in found.ensembles
    ],
  )  # fmt: skip


def _runs(found: Report) -> Table:
  return Table(
    "Online learning",
    "Gold over the initial policy’s on the same source of prompts, windows of iterations. The fall is to "
    "the last tenth of the windows; the highest of many noisy windows is too high, and its fall too deep.",
    (
      "run", "comparisons", "KL coefficient", "proxy", "peak at iteration", "its √KL", "gain", "fall",
      "last √KL", "last proxy", *_LAW,
    ),
    [
      [
        (r.name, ""),
        (f"{r.comparisons:,}", ""),
        (f"{r.kl_coef:g}", ""),
        (r.combine or "one", ""),
        *_peak(r),
        _number(r.peak.fall),
        (report.number(r.points[-1].distance), ""),
        (report.number(r.points[-1].proxy.value), ""),
        *_law(r.law, r.extrapolation),
      ]
      for r in found.rl
    ],
  )  # fmt: skip


def _accuracy(found: Report) -> Table:
  return Table(
    "Proxies on held-out pairs",
    "The chance p of every label is known, so agreement is its mean over pairs without drawing labels, and "
    "mean max(p, 1 − p) is the most that any model can reach. With gold labels only gold ties are below 1.",
    ("proxy", "agreement with labels", "ceiling", "ceiling − agreement", "agreement with gold"),
    [
      [
        (c.name, ""),
        _share(c.accuracy.labels),
        _share(c.accuracy.ceiling),
        _share(c.accuracy.gap),
        _share(c.accuracy.gold),
      ]
      for c in found.curves
    ],
  )


def _behaviours(found: Report) -> Table:
  return Table(
    "What the proxies chose",
    "The gold judge on the choices of every arm’s proxy with most comparisons, its first seed: one sample, "
    "the n at which gold is highest, and the largest n. Fillers and length a response, the others shares.",
    ("proxy", "n", *TRAITS),
    [
      [
        (b.name, ""),
        (f"{b.n:,}", ""),
        *(
          (_number if trait in ("fillers", "length") else _share)(b.found[trait])
          for trait in TRAITS
        ),
      ]
      for b in found.behaviours
    ],
  )


def _peak(c: Curve | RlCurve) -> list[Cell]:
  return [
    (f"{c.peak.n:,}", ""),
    (report.number(c.peak.distance), ""),
    _number(c.peak.gain, signed=True),
  ]


def _seeds(peaks: tuple[float, ...]) -> Cell:
  if len(peaks) < 2:
    return "–", ""
  return f"{report.number(min(peaks))} to {report.number(max(peaks))}", ""


def _law(law: Fit | None, extrapolation: Extrapolation | None) -> list[Cell]:
  if law is None:
    return [("–", "")] * len(_LAW)
  cells = [_number(e) for e in (law.alpha, law.beta, law.peak_distance, law.peak_gain)]
  cells.append(("–" if law.r_squared is None else f"{law.r_squared:.3f}", ""))
  if extrapolation is None:
    return [*cells, ("–", ""), ("–", "")]
  difference = extrapolation.aic - extrapolation.other_aic
  return [*cells, (report.number(extrapolation.rmse), ""), (report.signed(difference), "")]


def _number(estimate: Estimate | None, *, signed: bool = False) -> Cell:
  if estimate is None or estimate.value != estimate.value:
    return "–", ""
  value = (report.signed if signed else report.number)(estimate.value)
  if estimate.low != estimate.low:
    return value, ""
  high = report.number(estimate.high) if estimate.high == estimate.high else "∞"
  return value, f"{report.number(estimate.low)} to {high}"


def _share(estimate: Estimate) -> Cell:
  return report.percent(estimate.value), report.interval_percent(estimate)
