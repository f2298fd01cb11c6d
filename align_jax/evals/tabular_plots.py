"""Figures of preference objectives on the tabular world, in the look of `plots`.

Chosen answers are blue, rejected ones orange and dashed, all others grey, in every figure.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from align_jax.evals.plots import INK, MUTED, look_of, styled
from align_jax.worlds import tabular
from align_jax.worlds.tabular import TabularWorld, Trajectory

_CHOSEN, _REJECTED, _OTHER = "#0067a5", "#c14e00", "#9aa3ab"
_SIDES = ((_CHOSEN, "-"), (_REJECTED, "--"))
_LOW_IS_PALE = LinearSegmentedColormap.from_list("loss", ["#ffffff", "#c9d3dc"])
_DASHES = (0, (4, 3))
_REF_LOGP = -4.0  # log π_ref of the two answers in figures over their log-ratios

PairLoss = Callable[..., jax.Array]


def at_ratios(loss: PairLoss, chosen: np.ndarray, rejected: np.ndarray) -> tuple[np.ndarray, ...]:
  """A pair loss and its pulls, for an answer pair of which the reference makes log π_ref = −4 each.

  Args:
    loss: with its settings bound, as `tabular.pair_losses` takes it.
    chosen: [N], log π/π_ref of the chosen answer; its log π stays below 0 for ratios below 4.
    rejected: [N], of the rejected one.

  Returns:
    ([N] loss, [N] −∂L/∂log π⁺, [N] −∂L/∂log π⁻): how descent moves the two log-probs.
  """
  count = len(chosen)
  rest = math.log(1.0 - 2.0 * math.exp(_REF_LOGP))
  ref = np.tile([_REF_LOGP, _REF_LOGP, rest], (count, 1))
  world = TabularWorld(np.zeros((count, 3)), ref)
  first, second = np.zeros(count, int), np.ones(count, int)
  batch = tabular.Pairs(np.arange(count), first, second, np.full(count, 1.0 / count))

  def values(ratios: jax.Array) -> jax.Array:
    logps = jnp.concatenate([_REF_LOGP + ratios, jnp.full((count, 1), rest)], 1)
    return tabular.pair_losses(world, batch, logps, loss)

  ratios = jnp.stack([chosen, rejected], 1)
  pulls = -np.asarray(jax.grad(lambda r: values(r).sum())(ratios))
  return np.asarray(values(ratios)), pulls[:, 0], pulls[:, 1]


@styled
def shapes(family: Mapping[str, PairLoss], *, reach: float = 7.0) -> Figure:
  """Every loss over the margin Δ, and how hard its gradient pulls at either log-prob there.

  The margin is split evenly: the chosen log-ratio is Δ/2, the rejected one −Δ/2.
  """
  figure, panels = _grid(family, width=2.25, height=1.75, share=False)
  margins = np.linspace(-reach, reach, 281)
  for axes, (name, loss) in zip(panels, family.items()):
    value, chosen, rejected = at_ratios(loss, margins / 2, -margins / 2)
    behind = axes.twinx()
    behind.fill_between(margins, value, value.min(), color="#e9edf0", linewidth=0)
    behind.plot(margins, value, color=_OTHER, linewidth=1)
    behind.set_yticks([])
    behind.spines[:].set_visible(False)
    behind.set_ylim(value.min(), value.min() + 1.1 * np.ptp(value) + 1e-9)
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    for pull, (colour, dash) in zip((chosen, rejected), _SIDES):
      axes.plot(margins, pull, color=colour, linestyle=dash, linewidth=1.7)
    axes.set_title(name)
    axes.grid(visible=False)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.margins(x=0)
  figure.supxlabel("margin Δ = log-ratio of chosen − log-ratio of rejected (nats)", fontsize=10)
  figure.supylabel("pull on the log-prob (−∂L/∂log π)", fontsize=10)
  _key(figure, {"chosen": _SIDES[0], "rejected": _SIDES[1], "loss (own scale)": (_OTHER, "-")})
  return figure


@styled
def fields(family: Mapping[str, PairLoss], *, reach: float = 3.0) -> Figure:
  """The plane of both log-ratios: level (grey is higher) and descent (arrows) of every loss.

  An arrow's length is the root of the gradient's, relative to the longest of its panel.
  """
  figure, panels = _grid(family, width=2.15, height=2.15)
  ticks = np.linspace(-reach, reach, 57)
  across, up = np.meshgrid(ticks, ticks)
  for axes, (name, loss) in zip(panels, family.items()):
    found = at_ratios(loss, across.ravel(), up.ravel())
    value, right, upward = (array.reshape(across.shape) for array in found)
    axes.contourf(across, up, value, levels=12, cmap=_LOW_IS_PALE)
    axes.plot([-reach, reach], [-reach, reach], color=MUTED, linewidth=0.9, linestyle=_DASHES)
    here = (slice(4, None, 8), slice(4, None, 8))
    length = np.hypot(right, upward)[here]
    scale = np.sqrt(length / length.max()) / np.maximum(length, 1e-9)  # roots: weak pulls show too
    arrows = [array[here] for array in (across, up)] + [
      array[here] * scale for array in (right, upward)
    ]
    axes.quiver(
      *arrows, color=_CHOSEN, angles="xy", scale_units="xy", scale=1.3, width=0.011, pivot="mid"
    )
    axes.plot([0], [0], "o", color=INK, markersize=4)
    axes.set_title(name)
    axes.set_aspect("equal")
    axes.set_xlim(-reach, reach)
    axes.set_ylim(-reach, reach)
    axes.grid(visible=False)
  figure.supxlabel("log-ratio of the chosen answer (nats)", fontsize=10)
  figure.supylabel("log-ratio of the rejected answer (nats)", fontsize=10)
  return figure


@styled
def journeys(runs: Mapping[str, Trajectory], *, chosen: int = 0, rejected: int = 1) -> Figure:
  """log π of the first prompt's answers over training, as change since its start."""
  figure, panels = _grid(runs, width=2.25, height=1.75 if len(runs) > 5 else 2.4)
  for axes, (name, run) in zip(panels, runs.items()):
    _journey(axes, run, chosen, rejected)
    axes.set_title(name)
  figure.supxlabel("step of gradient descent", fontsize=10)
  figure.supylabel("change of log π (nats)", fontsize=10)
  _key(figure, {"chosen": _SIDES[0], "rejected": _SIDES[1], "other answers": (_OTHER, "-")})
  return figure


def _journey(axes, run: Trajectory, chosen: int, rejected: int) -> None:
  gains = run.logps[:, 0] - run.logps[0, 0]
  steps = np.arange(len(gains))
  axes.axhline(0, color=MUTED, linewidth=0.8)
  for answer in range(gains.shape[1]):
    if answer not in (chosen, rejected):
      axes.plot(steps, gains[:, answer], color=_OTHER, linewidth=1.1)
  for answer, (colour, dash) in zip((chosen, rejected), _SIDES):
    axes.plot(steps, gains[:, answer], color=colour, linestyle=dash, linewidth=1.8)
  axes.xaxis.set_major_locator(MaxNLocator(2, integer=True))
  axes.margins(x=0)


@styled
def optima(
  world: TabularWorld, reached: Mapping[float, Mapping[str, Trajectory]], *, prompt: int = 0
) -> Figure:
  """π* beside what training reached, one panel a β, and the distance to it over training.

  reached: β -> objective ("dpo", "ppo") -> trajectory.
  """
  figure = Figure(figsize=(9.6, 3.3), layout="constrained")
  panels = figure.subplots(1, len(reached) + 1, width_ratios=[1.0] * len(reached) + [1.5])
  order = np.argsort(world.rewards[prompt])
  answers, ref = np.arange(len(order)), np.exp(world.ref_logps[prompt, order])
  for place, (axes, (beta, runs)) in enumerate(zip(panels, reached.items())):
    best = tabular.optimum(world, beta=beta)
    axes.bar(answers, np.exp(best[prompt, order]), color="#d5dbe0", width=0.8)
    axes.hlines(ref, answers - 0.42, answers + 0.42, color=MUTED, linewidth=1.2, linestyle=_DASHES)
    for shift, (name, run) in zip((-0.18, 0.18), runs.items()):
      colour, marker = look_of(name)
      probability = np.exp(run.logps[-1, prompt, order])
      axes.plot(answers + shift, probability, marker, color=colour, markersize=6)
      panels[-1].plot(
        1 + np.arange(len(run.logps)),
        np.maximum(tabular.total_variation(run.logps, best), 1e-8),
        color=colour,
        linewidth=1.5,
        linestyle=("-", "--", ":")[place % 3],
      )
    axes.set_title(f"β = {beta:g}")
    axes.set_ylim(0, 1.02)
    axes.set_xticks(answers, map(_signed, world.rewards[prompt, order]), fontsize=8)
    axes.grid(axis="x", visible=False)
    axes.tick_params(labelleft=place == 0)
  panels[0].set_ylabel("probability of the answer")
  panels[len(reached) // 2].set_xlabel("reward of the answer")
  panels[-1].set(xscale="log", yscale="log", title="Distance to π*")
  panels[-1].set_xlabel("step of DPO, iteration of PPO")
  panels[-1].set_ylabel("total variation, worst prompt")
  _optima_key(figure, next(iter(reached.values())), list(reached))
  return figure


def _optima_key(figure: Figure, names: Sequence[str], betas: Sequence[float]) -> None:
  handles = [
    Line2D([], [], color="#d5dbe0", marker="s", markersize=9, linestyle="none", label="π*"),
    Line2D([], [], color=MUTED, linestyle=_DASHES, linewidth=1, label="reference"),
  ]
  for name in names:
    colour, marker = look_of(name)
    handles.append(
      Line2D([], [], color=colour, marker=marker, linestyle="none", label=name.upper())
    )
  for beta, dash in zip(betas, ("-", "--", ":")):
    handles.append(Line2D([], [], color=INK, linestyle=dash, label=f"β = {beta:g}"))
  figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), handletextpad=0.5)


@styled
def margins(
  runs: Mapping[str, Trajectory], predictions: Mapping[str, Callable[[np.ndarray], np.ndarray]]
) -> Figure:
  """Margin of the first prompt's answers 0 and 1 over training, and what the theory says it does.

  predictions: by run name, step [S] -> margin [S] (nats), dashed.
  """
  figure = Figure(figsize=(7.6, 3.8), layout="constrained")
  axes = figure.add_subplot()
  top = 0.0
  for name, run in runs.items():
    colour, _ = look_of(name)
    gains = run.logps[:, 0] - run.logps[0, 0]
    steps = np.arange(1, len(gains))
    axes.plot(steps, gains[1:, 0] - gains[1:, 1], color=colour, linewidth=1.9)
    top = max(top, gains[-1, 0] - gains[-1, 1])
    axes.annotate(
      name,
      (steps[-1], gains[-1, 0] - gains[-1, 1]),
      xytext=(6, 0),
      textcoords="offset points",
      color=colour,
      va="center",
      annotation_clip=False,
    )
    if name in predictions:
      expected = predictions[name](steps)
      axes.plot(steps, expected, color=INK, linewidth=1, linestyle=_DASHES)
  axes.set(xscale="log", ylim=(0, 1.08 * top), xlim=(1, len(gains) - 1))
  axes.set_xlabel("step of gradient descent (log scale)")
  axes.set_ylabel("margin Δ (nats)")
  axes.plot([], [], color=INK, linewidth=1, linestyle=_DASHES, label="predicted")
  axes.legend(loc="upper left")
  return figure


@styled
def thumbs(
  world: TabularWorld, up: np.ndarray, run: Trajectory, controls: Sequence[Trajectory]
) -> Figure:
  """What unpaired marks did to every answer, and the expected reward beside shuffled marks.

  up: [X, Y], P(thumbs up). run: trained on them. controls: trained on them after a shuffle.
  """
  figure = Figure(figsize=(9.0, 3.5), layout="constrained")
  left, right = figure.subplots(1, 2)
  moved = np.exp(run.logps[-1]) - np.exp(world.ref_logps)
  usual = np.sum(np.exp(world.ref_logps) * world.rewards, 1, keepdims=True)
  for mark, colour, marker in ((True, _CHOSEN, "^"), (False, _REJECTED, "v")):
    at = (up > 0.5) == mark
    label = "mostly thumbs up" if mark else "mostly thumbs down"
    left.plot(
      (world.rewards - usual)[at], moved[at], marker, color=colour, markersize=7, label=label
    )
  left.axhline(0, color=MUTED, linewidth=0.8)
  left.axvline(0, color=MUTED, linewidth=0.8)
  left.set_xlabel("reward over the reference’s mean")
  left.set_ylabel("change of the probability")
  left.legend(loc="upper left", fontsize=8.5)
  shuffled = np.array([control.reward for control in controls])
  right.plot(shuffled.T, color=_OTHER, linewidth=0.6, alpha=0.7)
  right.plot(shuffled.mean(0), color=INK, linewidth=1.8, linestyle=_DASHES)
  right.plot(run.reward, color=look_of("kto")[0], linewidth=2)
  right.plot([], [], color=look_of("kto")[0], linewidth=2, label="true thumbs")
  right.plot([], [], color=_OTHER, linewidth=1, label=f"shuffled, {len(shuffled)} ways")
  right.plot([], [], color=INK, linestyle=_DASHES, label="their mean")
  low, high = right.get_ylim()
  right.set_ylim(low - 0.25 * (high - low), high)  # room for the legend
  right.legend(loc="lower left", fontsize=8.5)
  right.margins(x=0)
  right.set_xlabel("step of gradient descent")
  right.set_ylabel("expected reward")
  return figure


@styled
def displacements(changes: Mapping[str, tuple[np.ndarray, float]]) -> Figure:
  """Where the mass went: the probability of every answer at the end, one bar an objective.

  changes: by objective, (probabilities [Y] of chosen, rejected and the rest; expected reward).
  """
  figure = Figure(figsize=(8.4, 0.3 * len(changes) + 1.1), layout="constrained")
  axes = figure.add_subplot()
  for row, (probabilities, reward) in enumerate(changes.values()):
    before = 0.0
    for mass, colour in zip(probabilities, (_CHOSEN, _REJECTED, _OTHER)):
      axes.barh(row, mass, left=before, color=colour, height=0.72, edgecolor="white")
      before += mass
    axes.text(1.02, row, _signed(reward), va="center", color=INK)
  axes.text(1.02, -0.85, "reward", va="center", color=MUTED)
  axes.set_yticks(range(len(changes)), list(changes))
  axes.set_ylim(len(changes) - 0.4, -0.6)
  axes.set_xlim(0, 1.0)
  axes.grid(visible=False)
  axes.set_xlabel("probability after training")
  handles = [
    Line2D([], [], color=c, marker="s", markersize=8, linestyle="none", label=label)
    for c, label in ((_CHOSEN, "chosen"), (_REJECTED, "rejected"), (_OTHER, "never compared"))
  ]
  figure.legend(handles=handles, loc="outside upper center", ncols=3)
  return figure


@styled
def divergences(
  world: TabularWorld, optimal: Mapping[str, np.ndarray], reached: Mapping[str, Trajectory]
) -> Figure:
  """log π/π_ref of the first prompt over the reward: optimum (line) and end of training (marker)."""
  figure = Figure(figsize=(7.6, 3.9), layout="constrained")
  axes = figure.add_subplot()
  order = np.argsort(world.rewards[0])
  rewards, ref = world.rewards[0][order], world.ref_logps[0][order]
  looks = dict(zip(optimal, map(look_of, ("dpo", "ipo", "kto", "ppo"))))
  for name, (colour, marker) in looks.items():
    axes.plot(rewards, optimal[name][0][order] - ref, color=colour, linewidth=1.3)
    axes.plot(rewards, reached[name].logps[-1, 0][order] - ref, marker, color=colour, markersize=6)
    axes.plot([], [], color=colour, marker=marker, label=name)
  axes.axhline(0, color=MUTED, linewidth=0.8)
  axes.set_xlabel("reward of the answer")
  axes.set_ylabel("log π/π_ref (nats)")
  axes.legend(loc="lower right")
  return figure


@styled
def reward_frontier(
  world: TabularWorld, runs: Mapping[str, Sequence[Trajectory]], *, betas: Sequence[float]
) -> Figure:
  """Expected reward against √KL where training ended, and what it lacks of the best at its KL.

  runs: by objective, one trajectory a setting, in the order in which they are joined.
  betas: descending; the frontier is what π* reaches at them.
  """
  figure = Figure(figsize=(9.6, 3.9), layout="constrained")
  left, right = figure.subplots(1, 2)
  best = np.array([tabular.optimum(world, beta=beta) for beta in betas])
  kl = np.sum(np.exp(best) * (best - world.ref_logps), -1).mean(-1)
  reward = np.sum(np.exp(best) * world.rewards, -1).mean(-1)
  left.plot(np.sqrt(kl), reward, color=INK, linewidth=1.6, label="π*, all β")
  right.axhline(0, color=INK, linewidth=1.6)
  spare = iter((("#7a6a00", "v"), ("#2f4b9b", "X"), ("#b02a4c", "<"), ("#1f7a8c", ">")))
  for name, ends in runs.items():
    known = name.lower() in ("dpo", "ipo", "kto", "ppo")
    colour, marker = look_of(name) if known else next(spare)
    roots = np.sqrt([max(run.kl[-1], 0.0) for run in ends])
    ended = np.array([run.reward[-1] for run in ends])
    lacking = ended - np.interp(roots, np.sqrt(kl), reward)
    look = {"color": colour, "marker": marker, "markersize": 5.5, "linewidth": 1}
    left.plot(roots, ended, label=name, **look)
    right.plot(roots, lacking, **look)
  for axes in (left, right):
    axes.set_xlim(left=0)
    axes.set_xlabel("√KL(π ‖ π_ref)  (√nats)")
  left.set_ylabel("expected reward")
  right.set_ylabel("reward − best reward at this KL")
  figure.legend(loc="outside right upper")
  return figure


def _grid(names, *, width: float, height: float, share: bool = True) -> tuple[Figure, list]:
  """Small multiples, at most five a row; superfluous places stay empty."""
  columns = min(5, math.ceil(len(names) / math.ceil(len(names) / 5)))
  rows = math.ceil(len(names) / columns)
  figure = Figure(figsize=(width * columns + 0.4, height * rows + 0.7), layout="constrained")
  table = figure.subplots(rows, columns, sharex=True, sharey=share, squeeze=False)
  for axes in table.ravel()[len(names) :]:
    axes.set_visible(False)
  for column in range(columns):  # the lowest visible panel of a column names the ticks
    lowest = [axes for axes in table[:, column] if axes.get_visible()][-1]
    lowest.tick_params(labelbottom=True)
  figure.get_layout_engine().set(w_pad=0.07)
  return figure, list(table.ravel()[: len(names)])


def _signed(value: float) -> str:
  return f"{value:+.2f}".replace("-", "−")


def _key(figure: Figure, looks: Mapping[str, tuple[str, str]]) -> None:
  handles = [
    Line2D([], [], color=colour, linestyle=dash, linewidth=1.8, label=label)
    for label, (colour, dash) in looks.items()
  ]
  figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
