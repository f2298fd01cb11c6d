"""The theory of preference optimisation, checked where everything about it is exact."""

import dataclasses
import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import losses
from align_jax.worlds import tabular

DIVERGENCES = (("reverse_kl", None), ("forward_kl", None), ("js", None), ("alpha", 0.5))


@pytest.fixture(scope="module")
def world():
  return tabular.random_world(0)


@pytest.fixture(scope="module")
def two_answers():
  """One prompt with a better and a worse answer, under an even reference."""
  return tabular.TabularWorld(np.array([[1.0, 0.0]]), np.log(np.full((1, 2), 0.5)))


@pytest.fixture(scope="module")
def even(world):
  """The world's rewards under a reference that prefers nothing."""
  return dataclasses.replace(world, ref_logps=np.log(np.full((3, 4), 0.25)))


@pytest.fixture(scope="module")
def wordy():
  """Answers of different lengths."""
  lengths = np.array([[1, 2, 3, 2], [3, 1, 2, 2], [2, 3, 1, 1]])
  return dataclasses.replace(tabular.random_world(1), lengths=lengths)


def train(world, loss, *, steps=3000, rate=None, batch=None, params=None, **settings):
  """Gradient descent on a pair loss, by default on Bradley–Terry preferences."""
  batch = tabular.pairs(world) if batch is None else batch
  rate = 20.0 / settings.get("beta", 1.0) ** 2 if rate is None else rate
  objective = tabular.pair_objective(world, batch, functools.partial(loss, **settings))
  return tabular.fit(world, objective, steps=steps, learning_rate=rate, params=params)


def train_thumbs(world, loss, up, *, steps=2000, rate=None, **settings):
  rate = 3.0 / settings["beta"] if rate is None else rate
  objective = tabular.thumb_objective(
    world, tabular.thumbs(up), functools.partial(loss, **settings)
  )
  return tabular.fit(world, objective, steps=steps, learning_rate=rate)


def normalised(scores):
  scores = np.asarray(scores, np.float64)
  return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def distance(trajectory, logps):
  return tabular.total_variation(trajectory.logps[-1], logps)


def ratios(world, trajectory):
  """log π/π_ref at the end, [X, Y]."""
  return trajectory.logps[-1] - world.ref_logps


def margin(trajectory, chosen=0, rejected=1):
  """Δ of the first prompt over training: the chosen log-ratio minus the rejected one, [S + 1]."""
  gains = trajectory.logps[:, 0] - trajectory.logps[0, 0]
  return gains[:, chosen] - gains[:, rejected]


def one_pair():
  """A label without doubt: answer 0 of prompt 0 is better than answer 1."""
  return tabular.Pairs(*(np.array([i]) for i in (0, 0, 1)), weight=np.ones(1))


# DPO and PPO.


@pytest.mark.parametrize("beta", [0.05, 0.3, 1.0, 3.0])
def test_dpo_descends_to_the_optimum(world, beta):
  reached = train(world, losses.dpo_loss, beta=beta)
  best = normalised(world.ref_logps + world.rewards / beta)
  np.testing.assert_allclose(tabular.optimum(world, beta=beta), best, atol=1e-9)
  assert distance(reached, best) < 1e-4
  # It was not there at the start, and the optimum of another β is somewhere else.
  assert tabular.total_variation(reached.logps[0], best) > 0.05
  assert distance(reached, tabular.optimum(world, beta=4 * beta)) > 0.03


def test_dpo_finds_the_optimum_however_often_each_pair_is_asked(world):
  """Which pairs are compared how often moves nothing, as long as their labels are Bradley–Terry."""
  batch = tabular.pairs(world)
  low, high = np.minimum(batch.chosen, batch.rejected), np.maximum(batch.chosen, batch.rejected)
  often = np.random.default_rng(0).uniform(0.1, 1.0, (3, 4, 4))[batch.prompt, low, high]
  uneven = dataclasses.replace(batch, weight=batch.weight * often / (batch.weight @ often))
  best = tabular.optimum(world, beta=0.5)
  assert distance(train(world, losses.dpo_loss, beta=0.5, batch=uneven), best) < 1e-4
  skewed = dataclasses.replace(
    batch, weight=np.roll(batch.weight, 1)
  )  # labels of other pairs: not Bradley–Terry on r
  assert distance(train(world, losses.dpo_loss, beta=0.5, batch=skewed), best) > 0.05


@pytest.mark.parametrize("beta, iterations", [(0.1, 6000), (0.3, 2000), (1.0, 2000), (3.0, 2000)])
def test_ppo_with_a_kl_penalty_climbs_to_the_same_optimum(world, beta, iterations):
  reached = tabular.fit_ppo(world, beta=beta, iterations=iterations, learning_rate=1.0 / beta)
  assert distance(reached, tabular.optimum(world, beta=beta)) < 1e-3
  assert distance(reached, train(world, losses.dpo_loss, beta=beta).logps[-1]) < 1e-3
  # On the way it only ever gained: the regularised objective rises at every iteration.
  gains = np.diff(reached.reward - beta * reached.kl)
  assert gains.min() > -1e-5


def test_ppo_without_a_penalty_forgets_the_reference(world):
  reached = tabular.fit_ppo(world, beta=0.0, iterations=4000, learning_rate=2.0)
  best = np.exp(reached.logps[-1])[np.arange(3), world.rewards.argmax(1)]
  assert best.min() > 0.99
  assert distance(reached, tabular.optimum(world, beta=0.5)) > 0.1


# Labels without doubt: who stops, and where.


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_ipo_stops_at_its_margin_where_dpo_goes_on_like_log_t(two_answers, tau):
  batch = tabular.pairs(two_answers, temperature=0)
  ipo = train(two_answers, losses.ipo_loss, batch=batch, tau=tau, rate=0.1)
  np.testing.assert_allclose(margin(ipo)[-1], 1.0 / (2.0 * tau), rtol=1e-5)
  np.testing.assert_allclose(margin(ipo)[1500], margin(ipo)[-1], rtol=1e-5)

  beta, rate, steps = 0.5, 4.0, 30_000
  dpo = margin(train(two_answers, losses.dpo_loss, batch=batch, beta=beta, rate=rate, steps=steps))
  # Δ′ = 2ηβσ(−βΔ), so that e^βΔ grows by 2ηβ² a step: Δ ≈ log(2ηβ²t)/β, for ever.
  late = np.array([300, 3000, 30_000])
  np.testing.assert_allclose(dpo[late], np.log(2 * rate * beta**2 * late) / beta, rtol=0.01)
  np.testing.assert_allclose(np.diff(dpo[late]), np.log(10) / beta, rtol=0.01)


def test_ipo_has_its_closed_form_and_it_is_not_the_bradley_terry_optimum(world):
  """π ∝ π_ref·exp(P(y ≻ μ)/τ), with μ the policy that the compared answers come from."""
  tau = 0.25
  reached = train(world, losses.ipo_loss, tau=tau, rate=0.5)
  wins = tabular.preference_probabilities(world).mean(-1)
  assert distance(reached, normalised(world.ref_logps + wins / tau)) < 1e-5
  assert distance(reached, tabular.optimum(world, beta=tau)) > 0.05
  hard = train(world, losses.ipo_loss, tau=tau, rate=0.5, batch=tabular.pairs(world, temperature=0))
  wins = tabular.preference_probabilities(world, temperature=0).mean(-1)
  assert distance(hard, normalised(world.ref_logps + wins / tau)) < 1e-5


def test_hinge_stops_once_every_margin_is_one_over_beta(world):
  beta, batch = 0.5, tabular.pairs(world, temperature=0)
  reached = train(world, losses.hinge_loss, batch=batch, beta=beta, rate=0.1, steps=6000)
  h = ratios(world, reached)
  margins = h[batch.prompt, batch.chosen] - h[batch.prompt, batch.rejected]
  np.testing.assert_allclose(margins.min(), 1.0 / beta, atol=1e-3)
  np.testing.assert_allclose(reached.logps[-1], reached.logps[-2000], atol=1e-3)


@pytest.mark.parametrize("loss", ["cdpo_loss", "dpo_loss", "exo_loss"])
@pytest.mark.parametrize("epsilon", [0.05, 0.3])
def test_label_smoothing_turns_certain_labels_into_a_finite_margin(two_answers, loss, epsilon):
  """σ(βΔ) = 1 − ε: conservative DPO believes that a share ε of the labels is wrong."""
  batch = tabular.pairs(two_answers, temperature=0)
  reached = train(
    two_answers, getattr(losses, loss), batch=batch, beta=0.5, label_smoothing=epsilon, rate=4.0
  )
  np.testing.assert_allclose(1 / (1 + np.exp(-0.5 * margin(reached)[-1])), 1 - epsilon, atol=1e-5)


def test_robust_sees_through_flipped_labels_where_dpo_does_not(world):
  flipped, best = tabular.pairs(world, flip=0.2), tabular.optimum(world, beta=0.5)
  robust = train(world, losses.robust_loss, batch=flipped, beta=0.5, label_smoothing=0.2, rate=20.0)
  assert distance(robust, best) < 1e-4
  assert distance(train(world, losses.dpo_loss, batch=flipped, beta=0.5), best) > 0.05
  # Smoothing is not the remedy: it doubts the labels once more, and lands further away.
  cdpo = train(world, losses.cdpo_loss, batch=flipped, beta=0.5, label_smoothing=0.2)
  assert distance(cdpo, best) > distance(
    train(world, losses.dpo_loss, batch=flipped, beta=0.5), best
  )


# Other members with an exact optimum.


@pytest.mark.parametrize("divergence, alpha", DIVERGENCES)
def test_f_dpo_reaches_the_optimum_of_its_own_divergence(world, divergence, alpha):
  beta = 0.7
  settings = {"divergence": divergence} | ({"alpha": alpha} if alpha else {})
  reached = train(world, losses.f_dpo_loss, beta=beta, rate=2.0, steps=20_000, **settings)
  ratio = np.exp(ratios(world, reached))
  slope = {
    "reverse_kl": np.log,
    "forward_kl": lambda u: -1 / u,
    "js": lambda u: np.log(2 * u / (1 + u)),
    "alpha": lambda u: (1 - u**-0.5) / 0.5,
  }[divergence](ratio)
  difference = beta * (slope - slope[:, :1])
  np.testing.assert_allclose(difference, world.rewards - world.rewards[:, :1], atol=1e-3)
  best = tabular.optimum(world, beta=beta, divergence=divergence, alpha=alpha)
  assert distance(reached, best) < 1e-4
  others = [pair for pair in DIVERGENCES if pair[0] != divergence]
  for name, value in others:
    assert distance(reached, tabular.optimum(world, beta=beta, divergence=name, alpha=value)) > 0.01


def test_r_dpo_is_optimal_for_a_reward_that_pays_for_length(wordy):
  """βΔ + α·(|y⁺| − |y⁻|) fits the labels where π ∝ π_ref·exp((r − α|y|)/β)."""
  reached = train(wordy, losses.r_dpo_loss, beta=0.5, alpha=0.4)
  charged = dataclasses.replace(wordy, rewards=wordy.rewards - 0.4 * wordy.lengths)
  assert distance(reached, tabular.optimum(charged, beta=0.5)) < 1e-4
  assert distance(reached, tabular.optimum(wordy, beta=0.5)) > 0.1


def test_dpo_norm_gives_every_token_the_reward(wordy):
  """β·log(π/π_ref)/|y| = r − λ(x): long answers move further for the same reward."""
  reached = train(wordy, losses.dpo_norm_loss, beta=1.0)
  per_token = ratios(wordy, reached) / wordy.lengths - wordy.rewards
  np.testing.assert_allclose(per_token, np.broadcast_to(per_token[:, :1], (3, 4)), atol=1e-4)
  assert distance(reached, tabular.optimum(wordy, beta=1.0)) > 0.05


def test_cpo_without_its_sft_term_is_optimal_for_an_even_reference(world):
  reached = train(world, losses.cpo_loss, beta=0.5, sft_weight=0.0)
  assert distance(reached, normalised(world.rewards / 0.5)) < 1e-4


def test_simpo_without_a_margin_gives_every_token_the_reward(wordy):
  reached = train(wordy, losses.simpo_loss, beta=1.0, gamma=0.0)
  per_token = reached.logps[-1] / wordy.lengths - wordy.rewards
  np.testing.assert_allclose(per_token, np.broadcast_to(per_token[:, :1], (3, 4)), atol=1e-4)


@pytest.mark.parametrize(
  "name, settings, sees",
  [
    ("simpo_loss", {"beta": 1.0, "gamma": 0.5}, False),
    ("alphapo_loss", {"beta": 1.0, "gamma": 0.5, "alpha": 0.2}, False),
    ("orpo_loss", {"beta": 1.0}, False),
    ("cpo_loss", {"beta": 1.0}, False),
    ("slic_loss", {"delta": 1.0, "sft_weight": 0.1}, False),
    ("dpo_loss", {"beta": 1.0}, True),
    ("dpo_norm_loss", {"beta": 1.0}, True),
  ],
)
def test_reference_free_losses_train_alike_beside_any_reference(world, name, settings, sees):
  """The same first policy beside two references: only a loss that reads them can tell."""
  other = dataclasses.replace(world, ref_logps=tabular.random_world(7).ref_logps)
  beside = jnp.asarray(world.ref_logps - other.ref_logps, jnp.float32)
  loss = getattr(losses, name)
  here = train(world, loss, rate=1.0, steps=300, **settings)
  there = train(other, loss, rate=1.0, steps=300, params=beside, **settings)
  np.testing.assert_allclose(there.logps[0], here.logps[0], atol=1e-6)
  gap = np.abs(there.logps[-1] - here.logps[-1]).max()
  assert gap > 0.05 if sees else gap < 1e-4
  assert not np.allclose(here.logps[-1], here.logps[0], atol=0.05)


def test_nca_gives_every_answer_twice_its_win_rate(even):
  """e^r = 2·P(y wins), which is a policy again where the answers were drawn from the reference."""
  reached = train(even, losses.nca_loss, beta=1.0, rate=10.0, steps=6000)
  batch = tabular.pairs(even)
  wins = np.zeros((3, 4))
  np.add.at(wins, (batch.prompt, batch.chosen), batch.weight)
  assert distance(reached, np.log(wins / wins.sum(1, keepdims=True))) < 1e-4
  assert distance(reached, tabular.optimum(even, beta=1.0)) > 0.05


def test_bco_recovers_the_optimum_where_thumbs_follow_its_logistic_model(world):
  """P(up) = σ(r* − δ) of the optimum's own implicit reward r* and its mean δ."""
  beta = 0.5
  best = tabular.optimum(world, beta=beta)
  implicit = beta * (best - world.ref_logps)
  up = 1 / (1 + np.exp(-(implicit - implicit.mean())))
  reached = train_thumbs(world, losses.bco_unpaired_loss, up, beta=beta, rate=20.0, steps=6000)
  assert distance(reached, best) < 1e-3
  assert tabular.total_variation(reached.logps[0], best) > 0.1


def test_sppo_takes_one_step_of_multiplicative_weights(world, even):
  """log π/π_ref → (P(y wins) − ½)/β, which takes the log-partition for zero: O(1/β²), not known to it.

  Where the answers are drawn from the reference, what that spoils vanishes as 1/β³. Drawn otherwise
  (`world`: evenly, under an uneven reference) it shrinks no faster than the step itself.
  """

  def errors(of):
    wins = (tabular.preference_probabilities(of).sum(-1) - 0.5) / 3
    return [
      distance(
        train(of, losses.sppo_loss, beta=beta, rate=1.0, steps=6000),
        normalised(of.ref_logps + (wins - 0.5) / beta),
      )
      for beta in (1.0, 2.0, 4.0)
    ]

  drawn, other = np.array(errors(even)), np.array(errors(world))
  assert np.all(drawn[:-1] > 7 * drawn[1:]) and drawn[-1] < 1e-4
  assert np.all(other[:-1] < 2.5 * other[1:]) and other[-1] > 1e-3


@pytest.mark.parametrize(
  "name, settings",
  [
    ("ld_dpo_loss", {"alpha": 0.3}),
    ("step_dpo_loss", {}),
    ("tdpo_loss", {"alpha": 0.7, "detach_chosen": False}),
  ],
)
def test_token_level_losses_are_dpo_on_answers_of_one_token(world, name, settings):
  """TDPO1 too: one token has one KL, which chosen and rejected share."""
  token = train(world, getattr(losses, name), beta=0.5, steps=50, rate=5.0, **settings)
  plain = train(world, losses.dpo_loss, beta=0.5, steps=50, rate=5.0)
  np.testing.assert_allclose(token.logps, plain.logps, atol=1e-4)


def test_tdpo2_stays_closer_to_the_reference(world):
  """Its gradient sees only the rejected side's KL, which is then a penalty."""
  tdpo = train(world, losses.tdpo_loss, beta=0.5, alpha=1.0, rate=5.0)
  assert tdpo.kl[-1] < 0.8 * train(world, losses.dpo_loss, beta=0.5, rate=5.0).kl[-1]


@pytest.mark.parametrize("name", ["aot_loss", "aot_unpaired_loss"])
def test_aot_on_one_pair_is_dpo(world, name):
  aot = train(world, getattr(losses, name), batch=one_pair(), beta=0.5, steps=100, rate=1.0)
  dpo = train(world, losses.dpo_loss, batch=one_pair(), beta=0.5, steps=100, rate=1.0)
  np.testing.assert_allclose(aot.logps, dpo.logps, atol=1e-4)


def test_apo_zero_raises_the_chosen_and_apo_down_lowers_both(world):
  zero = train(world, losses.apo_zero_loss, batch=one_pair(), beta=0.5, rate=1.0, steps=1000)
  down = train(world, losses.apo_down_loss, batch=one_pair(), beta=0.5, rate=1.0, steps=1000)
  gains = [run.logps[-1, 0, :2] - run.logps[0, 0, :2] for run in (zero, down)]
  assert gains[0][0] > 0.1 and gains[0][1] < -0.1
  assert gains[1][0] < -0.1 and gains[1][1] < gains[1][0] - 0.1


# Unpaired thumbs.


@pytest.mark.parametrize("name", ["kto_loss", "apo_zero_unpaired_loss", "bco_unpaired_loss"])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_thumbs_alone_raise_the_good_and_lower_the_bad(world, name, beta):
  up = tabular.thumb_probabilities(world, temperature=0)
  reached = train_thumbs(world, getattr(losses, name), up, beta=beta)
  moved = ratios(world, reached)
  assert moved[up == 1].min() > 0.05 and moved[up == 0].max() < -1.0
  assert reached.reward[-1] > reached.reward[0] + 0.3


def test_kto_learns_from_noisy_thumbs_without_ending_at_the_optimum(world):
  reached = train_thumbs(world, losses.kto_loss, tabular.thumb_probabilities(world), beta=0.5)
  assert reached.reward[-1] > reached.reward[0] + 0.5
  assert distance(reached, tabular.optimum(world, beta=0.5)) > 0.1


def test_kto_learns_nothing_from_thumbs_that_know_nothing(world):
  coin = train_thumbs(world, losses.kto_loss, np.full((3, 4), 0.5), beta=0.1)
  np.testing.assert_allclose(coin.logps[-1], coin.logps[0], atol=1e-5)


def test_kto_gains_nothing_on_average_from_shuffled_thumbs():
  """Over all ways to hand the thumbs to other answers the gain is zero; each way moved the policy."""
  even = tabular.TabularWorld(np.array([[1.0, 0.2, -1.2]]), np.log(np.full((1, 3), 1 / 3)))
  up = tabular.thumb_probabilities(even)
  runs = [
    train_thumbs(even, losses.kto_loss, up[:, order], beta=0.5, steps=200)
    for order in map(list, itertools.permutations(range(3)))
  ]
  gains = np.array([run.reward[-1] - run.reward[0] for run in runs])
  np.testing.assert_allclose(gains.mean(), 0.0, atol=1e-5)
  assert gains[0] > 0.5 and gains.std() > 0.2 and all(run.kl[-1] > 0.1 for run in runs)


# Likelihood displacement.


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_on_similar_answers_loses_the_chosen_one_too(beta):
  """Both log-probs fall while the margin rises; what gains is the answer that nobody compared."""
  similar = tabular.similar_answers()
  reached = train(similar, losses.dpo_loss, batch=one_pair(), beta=beta, rate=0.1 / beta)
  gains = reached.logps[:, 0] - reached.logps[0, 0]
  assert np.diff(margin(reached)).min() > 0
  assert gains[-1, 0] < -1.0 and gains[-1, 1] < gains[-1, 0]
  assert np.exp(reached.logps[-1, 0, 2]) > 0.9 and reached.reward[-1] < reached.reward[0] - 1.0


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpop_keeps_the_chosen_answer_at_its_reference(beta):
  similar = tabular.similar_answers()
  reached = train(
    similar, losses.dpop_loss, batch=one_pair(), beta=beta, penalty=50.0, rate=0.01 / beta
  )
  gains = reached.logps[:, 0] - reached.logps[0, 0]
  assert gains[:, 0].min() > -0.005  # the penalty's kink: a step may fall short of it by its size
  assert margin(reached)[-1] > 0.2 and gains[-1, 1] < -0.2


def test_a_free_table_does_not_displace():
  """With a logit of its own every step raises the chosen answer: ∇log π⁺·(−∇L) ∝ 1 − π⁺ + π⁻ > 0."""
  free = dataclasses.replace(tabular.similar_answers(), features=None)
  reached = train(free, losses.dpo_loss, batch=one_pair(), beta=0.5, rate=0.2)
  chosen = reached.logps[:, 0, 0]
  assert np.diff(chosen).min() >= 0 and chosen[-1] > chosen[0] + 0.5


@pytest.mark.parametrize(
  "name, settings, keeps",
  [
    ("ipo_loss", {"tau": 0.25}, False),  # a finite margin is no protection
    ("hinge_loss", {"beta": 0.5}, False),
    ("cdpo_loss", {"beta": 1.0, "label_smoothing": 0.1}, False),
    ("simpo_loss", {"beta": 1.0, "gamma": 1.0}, False),
    ("nca_loss", {"beta": 1.0}, True),  # a target of the chosen answer's own
    ("sppo_loss", {"beta": 0.5}, True),
    ("cpo_loss", {"beta": 1.0}, True),  # a likelihood term
    ("orpo_loss", {"beta": 1.0}, True),
  ],
)
def test_who_keeps_the_chosen_answer(name, settings, keeps):
  similar = tabular.similar_answers()
  loss = getattr(losses, name)
  reached = train(similar, loss, batch=one_pair(), rate=0.1, steps=6000, **settings)
  gained = reached.logps[-1, 0, 0] - reached.logps[0, 0, 0]
  assert gained > 0.05 if keeps else gained < -2.0
  assert margin(reached)[-1] > 0.5
