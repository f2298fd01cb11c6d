"""A world in which everything about alignment is exact: a few prompts, a few answers to each.

The policy is π_θ(y|x) ∝ π_ref(y|x)·exp(s_θ(x, y)), so that θ = 0 is the reference. Without features s
is a free table θ [X, Y]; with them it is log-linear, s = φ(x, y)·θ. Expectations are sums over all
answers, preferences are weights instead of samples, and gradient descent sees the whole batch, so
what is left of an experiment is the objective. The losses come from the caller; what each of them
reads is found by the names of its arguments.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from align_jax import losses

Objective = Callable[[jax.Array], jax.Array]  # parameters -> loss []


@dataclasses.dataclass(frozen=True, eq=False)
class TabularWorld:
  """Prompts, answers, and what is known about them.

  Attributes:
    rewards: r [X, Y], reward of answer y to prompt x.
    ref_logps: log π_ref [X, Y], every row a distribution.
    features: φ [X, Y, F], or None for a policy that is a free table.
    lengths: [X, Y], tokens of every answer, for losses that average over them; ones by default.
  """

  rewards: np.ndarray
  ref_logps: np.ndarray
  features: np.ndarray | None = None
  lengths: np.ndarray | None = None

  def __post_init__(self):
    shape = np.shape(self.rewards)
    if len(shape) != 2 or np.shape(self.ref_logps) != shape:
      raise ValueError(
        f"TabularWorld: rewards and ref_logps must both be [X, Y], got {shape} and "
        f"{np.shape(self.ref_logps)}."
      )
    if not np.allclose(np.exp(self.ref_logps).sum(1), 1.0, atol=1e-5):
      raise ValueError("TabularWorld: the rows of ref_logps must be distributions.")
    if self.features is not None and np.shape(self.features)[:-1] != shape:
      raise ValueError(f"TabularWorld: features must be [X, Y, F], got {self.features.shape}.")
    if self.lengths is None:
      object.__setattr__(self, "lengths", np.ones(shape))
    if np.shape(self.lengths) != shape:
      raise ValueError(f"TabularWorld: lengths must be [X, Y], got {np.shape(self.lengths)}.")


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
  """Comparisons as a weighted batch: prompt, chosen and rejected [N] are indices; weights sum to 1."""

  prompt: np.ndarray
  chosen: np.ndarray
  rejected: np.ndarray
  weight: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Thumbs:
  """Single answers marked good or bad: prompt, answer, is_desirable [N]; weights [N] sum to 1."""

  prompt: np.ndarray
  answer: np.ndarray
  is_desirable: np.ndarray
  weight: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Trajectory:
  """What training did; entry 0 is the start.

  Attributes:
    logps: [S + 1, X, Y], log π of every answer.
    kl: [S + 1], KL(π ‖ π_ref) in nats, mean over prompts.
    reward: [S + 1], expected reward, mean over prompts.
    params: θ at the end.
  """

  logps: np.ndarray
  kl: np.ndarray
  reward: np.ndarray
  params: np.ndarray


def random_world(seed: int, *, prompts: int = 3, answers: int = 4) -> TabularWorld:
  """A world with standard normal rewards and a reference that is uneven but rules nothing out."""
  rng = np.random.default_rng(seed)
  logits = 0.7 * rng.normal(size=(prompts, answers))
  ref_logps = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  return TabularWorld(rng.normal(size=(prompts, answers)), ref_logps)


def similar_answers() -> TabularWorld:
  """One prompt, and a chosen and a rejected answer that are nearly the same to the policy.

  Answer 0 ("no", reward 1) and answer 1 ("never", reward 0) share the first feature and differ a
  little in the second, along which answer 2 ("yes", reward −2) lies much further out. The reference
  says "no" or "never" nine times in ten.
  """
  ref = np.array([[0.45, 0.45, 0.1]])
  features = np.array([[[1.0, 0.0], [1.0, -0.3], [0.0, 1.5]]])
  return TabularWorld(np.array([[1.0, 0.0, -2.0]]), np.log(ref), features)


def start(world: TabularWorld) -> jax.Array:
  """θ = 0, where the policy is the reference: [X, Y] of a free table, [F] with features."""
  return jnp.zeros(world.rewards.shape if world.features is None else world.features.shape[-1:])


def log_policy(world: TabularWorld, params: jax.Array) -> jax.Array:
  """log π_θ [X, Y]."""
  scores = params if world.features is None else jnp.asarray(world.features) @ params
  return jax.nn.log_softmax(jnp.asarray(world.ref_logps, jnp.float32) + scores, axis=1)


def optimum(
  world: TabularWorld, *, beta: float, divergence: str = "reverse_kl", alpha: float | None = None
) -> np.ndarray:
  """log π*, where π* maximises E_π[r] − β·D_f(π ‖ π_ref) over all distributions.

  Where every answer keeps some probability, β·f′(π*/π_ref) = r − λ(x). The reverse KL gives the
  closed form π* ∝ π_ref·exp(r/β); for the others λ is found by bisection.

  Args:
    world: its rewards and reference are read.
    beta: β > 0.
    divergence: "reverse_kl" f′(ρ) = log ρ, "forward_kl" −1/ρ, "js" log(2ρ/(1 + ρ)), or "alpha"
      (1 − ρ^−α)/α.
    alpha: α > 0 of "alpha".

  Returns:
    [X, Y], float64.

  References:
    Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, eq. 4; Wang et al. 2023,
    https://arxiv.org/abs/2309.16240, theorem 1.
  """
  if divergence == "reverse_kl":
    scores = world.ref_logps + world.rewards / beta
    return scores - np.log(np.sum(np.exp(scores - scores.max()), 1, keepdims=True)) - scores.max()
  inverse, at_one, limit = {  # ρ(f′), f′(1), and what f′ stays below
    "forward_kl": (lambda u: -1.0 / u, -1.0, 0.0),
    "js": (lambda u: np.exp(u) / (2.0 - np.exp(u)), 0.0, math.log(2.0)),
    "alpha": (lambda u: (1.0 - alpha * u) ** (-1.0 / alpha), 0.0, 1.0 / (alpha or 1.0)),
  }[divergence]
  best, worst = (f(world.rewards, axis=1, keepdims=True) for f in (np.max, np.min))
  low = np.maximum(best - beta * limit, worst - beta * at_one)  # total probability >= 1
  high = best - beta * at_one  # <= 1
  for _ in range(200):
    middle = 0.5 * (low + high)
    with np.errstate(divide="ignore"):
      ratio = inverse((world.rewards - middle) / beta)
    above = np.sum(np.exp(world.ref_logps) * ratio, 1, keepdims=True) > 1.0
    low, high = np.where(above, middle, low), np.where(above, high, middle)
  return world.ref_logps + np.log(inverse((world.rewards - high) / beta))


def preference_probabilities(
  world: TabularWorld, *, temperature: float = 1.0, flip: float = 0.0
) -> np.ndarray:
  """P(y ≻ y′|x) = σ((r(x, y) − r(x, y′))/T), then flipped with probability ε: [X, Y, Y].

  temperature: T; 0 is the limit in which the better answer always wins, and equals draw.
  """
  difference = world.rewards[:, :, None] - world.rewards[:, None, :]
  clean = _sigmoid(difference, temperature)
  return (1.0 - flip) * clean + flip * (1.0 - clean)


def pairs(world: TabularWorld, *, temperature: float = 1.0, flip: float = 0.0) -> Pairs:
  """Every ordered pair of different answers to one prompt, weighted by how often it is so labelled."""
  weight = preference_probabilities(world, temperature=temperature, flip=flip)
  prompt, chosen, rejected = np.nonzero((~np.eye(weight.shape[1], dtype=bool)) & (weight > 0))
  weight = weight[prompt, chosen, rejected]
  return Pairs(prompt, chosen, rejected, weight / weight.sum())


def thumb_probabilities(world: TabularWorld, *, temperature: float = 1.0) -> np.ndarray:
  """P(thumbs up) = σ((r − E_ref[r])/T) [X, Y]: up where an answer beats what the reference offers."""
  usual = np.sum(np.exp(world.ref_logps) * world.rewards, 1, keepdims=True)
  return _sigmoid(world.rewards - usual, temperature)


def thumbs(up: np.ndarray) -> Thumbs:
  """Every answer once with each mark, weighted by P(up) [X, Y] and its complement."""
  weight = np.stack([1.0 - up, up], -1)
  prompt, answer, mark = np.nonzero(weight > 0)
  weight = weight[prompt, answer, mark]
  return Thumbs(prompt, answer, mark.astype(np.float32), weight / weight.sum())


def pair_losses(
  world: TabularWorld, batch: Pairs, logps: jax.Array, loss: Callable[..., jax.Array]
) -> jax.Array:
  """A pair loss of every pair, unweighted: [N].

  Args:
    world: the reference and the answers' lengths.
    batch: N pairs.
    logps: log π [X, Y].
    loss: a loss over pairs with its settings bound, such as
      `functools.partial(losses.dpo_loss, beta=0.1)`. What it reads is told by its argument names:
      sums, per-token means, lengths, the reference, BCO's shift (the exact mean of the implicit
      rewards, without gradient), or token arrays [N, 1], an answer being one token there.
  """
  ref = jnp.asarray(world.ref_logps, jnp.float32)
  arrays = {"pair_mask": jnp.ones(batch.weight.shape)}
  for side, answer in (("chosen", batch.chosen), ("rejected", batch.rejected)):
    at = batch.prompt, answer
    for who, table in (("policy", logps), ("ref", ref)):
      arrays[f"{who}_{side}_logps"] = table[at]
      arrays[f"{who}_{side}_mean_logps"] = table[at] / world.lengths[at]
      arrays[f"{who}_{side}_logprobs"] = table[at][:, None]
    arrays[f"{side}_lengths"] = jnp.asarray(world.lengths[at], jnp.float32)
    arrays[f"{side}_mask"] = arrays[f"{side}_step_mask"] = jnp.ones((len(answer), 1))
    arrays[f"{side}_kl"] = losses.exact_kl(ref, logps)[batch.prompt]
  arrays["policy_target_logps"] = arrays["policy_chosen_logps"]
  reads = _arguments(loss)
  if "shift" in reads:
    gains = [(logps - ref)[batch.prompt, answer] for answer in (batch.chosen, batch.rejected)]
    mean = jnp.sum(batch.weight * (gains[0] + gains[1])) / 2.0
    arrays["shift"] = jax.lax.stop_gradient(loss.keywords["beta"] * mean)
  return loss(**{name: arrays[name] for name in reads})


def pair_objective(world: TabularWorld, batch: Pairs, loss: Callable[..., jax.Array]) -> Objective:
  """The weighted mean of `pair_losses` as a function of the parameters."""
  if "pair_mask" in _arguments(loss) and np.ptp(batch.weight) > 1e-9:
    raise ValueError("pair_objective: a loss that sorts its batch needs pairs of equal weight.")
  return lambda params: jnp.sum(
    batch.weight * pair_losses(world, batch, log_policy(world, params), loss)
  )


def thumb_objective(
  world: TabularWorld, batch: Thumbs, loss: Callable[..., jax.Array]
) -> Objective:
  """The weighted mean of an unpaired loss (KTO and its kin); arguments as in `pair_losses`.

  KTO's baseline is what its estimator aims for, the exact KL(π ‖ π_ref) over all prompts; BCO's
  shift is the exact mean of the implicit rewards. Neither carries a gradient.
  """
  reads = _arguments(loss)
  at = batch.prompt, batch.answer

  def objective(params: jax.Array) -> jax.Array:
    logps, ref = log_policy(world, params), jnp.asarray(world.ref_logps, jnp.float32)
    arrays = {
      "policy_logps": logps[at],
      "ref_logps": ref[at],
      "is_desirable": jnp.asarray(batch.is_desirable),
    }
    if "kl_baseline" in reads:
      arrays["kl_baseline"] = jax.lax.stop_gradient(losses.exact_kl(logps, ref).mean())
    if "shift" in reads:
      shift = loss.keywords["beta"] * jnp.sum(batch.weight * (logps[at] - ref[at]))
      arrays["shift"] = jax.lax.stop_gradient(shift)
    return jnp.sum(batch.weight * loss(**{name: arrays[name] for name in reads}))

  return objective


def fit(
  world: TabularWorld,
  objective: Objective,
  *,
  steps: int,
  learning_rate: float,
  params: jax.Array | None = None,
) -> Trajectory:
  """Plain gradient descent on the whole batch, from the reference unless told otherwise."""

  def step(params, _):
    return params - learning_rate * jax.grad(objective)(params), log_policy(world, params)

  run = jax.jit(functools.partial(jax.lax.scan, step, length=steps))
  return _trajectory(world, *run(start(world) if params is None else params))


def fit_ppo(
  world: TabularWorld,
  *,
  beta: float,
  iterations: int,
  learning_rate: float,
  inner_steps: int = 4,
  clip_eps: float = 0.2,
) -> Trajectory:
  """PPO against the reward with a KL penalty, its expectations exact: one entry an iteration.

  Each iteration freezes π_old, gives every answer the advantage of r − β·log(π_old/π_ref) over its
  mean under π_old, and takes `inner_steps` of gradient descent on the clipped loss weighted by π_old.
  """
  ref, ones = jnp.asarray(world.ref_logps, jnp.float32), jnp.ones((world.rewards.size, 1))

  def iteration(params, _):
    old = log_policy(world, params)
    shaped = losses.kl_shaped_rewards(
      jnp.ravel(world.rewards), old.reshape(-1, 1), ref.reshape(-1, 1), ones, kl_coef=beta
    ).reshape(old.shape)
    advantages = shaped - jnp.sum(jnp.exp(old) * shaped, 1, keepdims=True)

    def objective(params):
      loss = losses.ppo_policy_loss(log_policy(world, params), old, advantages, clip_eps=clip_eps)
      return jnp.sum(jnp.exp(old) * loss, 1).mean()

    def inner(_, params):
      return params - learning_rate * jax.grad(objective)(params)

    return jax.lax.fori_loop(0, inner_steps, inner, params), old

  run = jax.jit(functools.partial(jax.lax.scan, iteration, length=iterations))
  return _trajectory(world, *run(start(world)))


def total_variation(logps: np.ndarray, other_logps: np.ndarray) -> np.ndarray:
  """½·Σ_y |π − π′| of log-probs [..., X, Y], at the prompt where it is largest: [...]."""
  return (0.5 * np.abs(np.exp(logps) - np.exp(other_logps)).sum(-1)).max(-1)


def _trajectory(world: TabularWorld, params: jax.Array, before: jax.Array) -> Trajectory:
  logps = jnp.concatenate([before, log_policy(world, params)[None]])
  ref = jnp.broadcast_to(jnp.asarray(world.ref_logps, jnp.float32), logps.shape)
  kl = losses.exact_kl(logps, ref).mean(-1)
  reward = jnp.sum(jnp.exp(logps) * world.rewards, -1).mean(-1)
  return Trajectory(*map(np.asarray, (logps, kl, reward, params)))


def _sigmoid(x: np.ndarray, temperature: float) -> np.ndarray:
  if temperature == 0:
    return 0.5 + 0.5 * np.sign(x)
  return 0.5 + 0.5 * np.tanh(x / (2.0 * temperature))


def _arguments(loss: Callable[..., jax.Array]) -> list[str]:
  """The arrays that a loss reads: its positional arguments."""
  parameters = inspect.signature(loss).parameters.values()
  return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
