"""Ten optimizer steps beside TRL: the same weights, order and optimizer must give the same losses.

The loss before update k depends on the gradients of all updates before it, so agreement over ten
steps is agreement of the objective, its normalisation, its gradient, the clipping and AdamW. AdamW
does not see the scale of a gradient; the norm before clipping does, and is compared too. Both sides
start from one saved Llama, against a reference that is not the policy, and see five batches
twice. TRL tokenises its own records; that its tokens and masks are ours is asserted for every batch.
Where a convention of TRL 1.16 is not ours, the case says so and our settings make up for it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")

from align_jax import data, losses, models, sharding, worlds  # noqa: E402
from align_jax.losses import Mean  # noqa: E402
from align_jax.training import (  # noqa: E402
  optimizer,
  preference_objectives,
  reward_objectives,
  state,
  step,
)
from align_jax.training.preferences import PreferenceConfig  # noqa: E402

TOLERANCE = 1e-4  # absolute, and relative where a loss is larger than one
NORM_TOLERANCE = 1e-3  # likewise: a norm gathers the rounding of all weights
PAIRS, LENGTH = 20, 64
BETA = 0.3
ROWS = ("tokens", "segment_ids", "response_mask")


class Ours:
  """Our steps, from the weights that TRL starts from."""

  def __init__(self, trl_runs):
    self.tokenizer = trl_runs.tokenizer
    self.steps, self.batch = trl_runs.steps, trl_runs.batch
    self.tx = optimizer.make_optimizer(trl_runs.optimizer, self.steps)
    self.mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    self.model, self.params = models.load_pretrained(trl_runs.policy, mesh=self.mesh)
    self.ref = models.load_pretrained(trl_runs.ref, mesh=self.mesh)[1]

  def batches(self, read, records) -> list[dict[str, np.ndarray]]:
    stream = read(records, self.tokenizer, length=LENGTH, batch_size=self.batch, shuffle=False)
    return [dict(next(stream)) for _ in range(self.steps)]

  def pair_batches(self, pairs):
    return self.batches(data.preference_batches, pairs)

  def train(self, objective, batches, *, trainable=None, frozen=None, carried=None, **options):
    """{metric: [steps]}, each of before its update."""
    trainable = self.params if trainable is None else trainable
    frozen = {"ref": self.ref} if frozen is None else frozen
    now = state.create_state(trainable, self.tx, 0, self.mesh, carried=carried)
    batches = [sharding.put_batch(batch, self.mesh) for batch in batches]
    run = step.make_train_step(objective, self.tx, **options).lower(now, frozen, batches[0])
    run = run.compile({"xla_backend_optimization_level": 0})  # it runs ten times only
    taken = []
    for batch in batches:
      now, metrics = run(now, frozen, batch)
      means = {k: v for k, v in metrics.items() if isinstance(v, Mean)}
      taken.append({k: float(v.compute()) for k, v in means.items()})
    return {name: np.array([t[name] for t in taken]) for name in taken[0]}

  def prefer(self, name, batches, *, wrap=None, **settings):
    """Training by a preference objective, all that it carries from step to step included."""
    config = PreferenceConfig(name, **settings)
    objective = preference_objectives.preference_objective(self.model, config)
    carried = preference_objectives.carried(config, self.params, {})
    if "ref" in carried:  # TR-DPO starts from a reference that is the policy; here it is not
      carried["ref"] = self.ref
    return self.train(
      wrap(objective) if wrap else objective,
      batches,
      frozen={} if carried.get("ref") else {"ref": self.ref},
      prepare=preference_objectives.prepare(self.model, config),
      carry=preference_objectives.carry(config),
      carried=carried,
    )


@pytest.fixture(scope="module")
def ours(trl_runs):
  return Ours(trl_runs)


@pytest.fixture(scope="module")
def pairs():
  return worlds.Microworld().preferences(PAIRS)


@pytest.fixture(scope="module")
def level_pairs(ours):
  """(pairs, L): all chosen responses have L tokens, so that means over tokens and responses agree."""
  drawn = worlds.Microworld().preferences(20 * PAIRS)
  encoded = [data.encode_preference(r, ours.tokenizer, LENGTH) for r in drawn]
  counts = np.array([int(e.chosen.response_mask.sum()) for e in encoded])
  level = np.bincount(counts).argmax()
  level_pairs = [r for r, count in zip(drawn, counts) if count == level][:PAIRS]
  assert len(level_pairs) == PAIRS
  return level_pairs, int(level)


def turn(text: str) -> list[dict[str, str]]:
  return [{"role": "assistant", "content": text}]


def pair_rows(pairs, *columns) -> list[dict]:
  """Our records as TRL reads them."""
  return [
    {"prompt": list(r.prompt), "chosen": turn(r.chosen), "rejected": turn(r.rejected)}
    | {name: getattr(r, name) for name in columns}
    for r in pairs
  ]


def difference(ours, theirs) -> float:
  """The largest |ours - theirs|, relative to theirs where those are larger than one."""
  return float(np.max(np.abs(ours - theirs) / np.maximum(1.0, np.abs(theirs))))


def assert_agree(ours, run):
  low, high = run.losses.min(), run.losses.max()
  assert high - low > 100 * TOLERANCE, "losses that do not move prove nothing"
  apart = {
    name: (difference(ours[name], theirs), ours[name], theirs)
    for name, theirs in (("loss", run.losses), ("grad_norm", run.grad_norms))
  }
  worst = " ".join(f"{name} {values[0]:.1e}" for name, values in apart.items())
  print(f"max difference of {worst}; losses {low:.3f} to {high:.3f}")
  for name, (largest, our_values, theirs) in apart.items():
    limit = TOLERANCE if name == "loss" else NORM_TOLERANCE
    assert largest <= limit, f"{name}\nours   {our_values}\ntheirs {theirs}"


def assert_differ(ours, run):
  assert difference(ours["loss"], run.losses) > 30 * TOLERANCE


def assert_same_rows(batch, tokens, real, response=None, prefix=""):
  """Our rows [N, T] hold what TRL's [N, t] hold, and nothing behind it."""
  for name, theirs in zip(ROWS, (tokens, real, response)):
    if theirs is not None:
      rows = batch[prefix + name]
      np.testing.assert_array_equal(rows[:, : theirs.shape[1]], theirs)
      assert not rows[:, theirs.shape[1] :].any()


def assert_same_pairs(batches, run):
  """TRL stacks all chosen upon all rejected; its older trainers keep the two apart."""
  for batch, seen in zip(batches, run.batches):
    sides = [{k: batch[k][:, side] for k in ROWS} for side in (0, 1)]
    if "input_ids" in seen:
      stacked = {k: np.concatenate([side[k] for side in sides]) for k in ROWS}
      names = ("input_ids", "attention_mask", "completion_mask")
      assert_same_rows(stacked, *map(seen.get, names))
    else:
      for which, side in zip(("chosen", "rejected"), sides):
        names = ("input_ids", "attention_mask", "labels")
        tokens, real, labels = (seen[f"{which}_{name}"] for name in names)
        assert_same_rows(side, tokens, real, labels != -100)


def loss_type(name, **settings):
  return {"loss_type": [name], "beta": BETA} | settings


def plain(**settings):
  return {"beta": BETA} | settings


# TRL's settings, our objective and its settings.
PAIR_CASES = {
  "sigmoid": (loss_type("sigmoid"), "dpo", plain()),
  # TRL's sigmoid takes no notice of label_smoothing.
  "sigmoid-smoothed": (loss_type("sigmoid", label_smoothing=0.2), "dpo", plain()),
  "hinge": (loss_type("hinge"), "hinge", plain()),
  # TRL's IPO is that of per-token means, and its beta the paper's tau.
  "ipo": (loss_type("ipo"), "ipo_mean", dict(tau=BETA)),
  "exo": (loss_type("exo_pair", label_smoothing=1e-3), "exo", plain(label_smoothing=1e-3)),
  "exo-smoothed": (loss_type("exo_pair", label_smoothing=0.2), "exo", plain(label_smoothing=0.2)),
  "nca": (loss_type("nca_pair"), "nca", plain()),
  "robust": (loss_type("robust", label_smoothing=0.2), "robust", plain(label_smoothing=0.2)),
  "sppo": (loss_type("sppo_hard"), "sppo", plain()),
  "aot": (loss_type("aot"), "aot", plain()),
  "aot-smoothed": (loss_type("aot", label_smoothing=0.2), "aot", plain(label_smoothing=0.2)),
  "aot_unpaired": (loss_type("aot_unpaired"), "aot_unpaired", plain()),
  "aot_unpaired-smoothed": (
    loss_type("aot_unpaired", label_smoothing=0.2),
    "aot_unpaired",
    plain(label_smoothing=0.2),
  ),
  "apo_zero": (loss_type("apo_zero"), "apo_zero", plain()),
  "apo_down": (loss_type("apo_down"), "apo_down", plain()),
  # At the paper's beta: six times that, its narrow gate makes rounding errors grow from step to step.
  "discopop": (
    loss_type("discopop", beta=0.05, discopop_tau=0.05),
    "discopop",
    dict(beta=0.05, temperature=0.05),
  ),
  "discopop-wide": (loss_type("discopop", discopop_tau=0.5), "discopop", plain(temperature=0.5)),
  "sigmoid_norm": (loss_type("sigmoid_norm", beta=5.0), "dpo_norm", dict(beta=5.0)),
  "forward_kl": (
    loss_type("sigmoid", f_divergence_type="forward_kl"),
    "f_dpo",
    plain(divergence="forward_kl"),
  ),
  "js": (loss_type("sigmoid", f_divergence_type="js_divergence"), "f_dpo", plain(divergence="js")),
  # f'(t) is (t^(a-1) - 1)/(a - 1) in TRL and (1 - t^-alpha)/alpha here, so alpha = 1 - a.
  "alpha": (
    loss_type("sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3),
    "f_dpo",
    plain(divergence="alpha", alpha=0.7),
  ),
  # Of TRL 1.16 ld_alpha weighs policy and reference alike, as ours does.
  "ld": (loss_type("sigmoid", ld_alpha=0.4), "ld_dpo", plain(alpha=0.4)),
  # TRL does not cut WPO's weights at 1; none of these pairs gets there.
  "wpo": (loss_type("sigmoid", use_weighting=True), "dpo", plain(wpo=True)),
  "wpo-apo_zero": (loss_type("apo_zero", use_weighting=True), "apo_zero", plain(wpo=True)),
  "mixture": (
    loss_type("sigmoid", loss_type=["sigmoid", "ipo", "nca_pair"], loss_weights=[0.8, 0.1, 0.5]),
    "dpo*0.8 + ipo_mean*0.1 + nca*0.5",
    plain(tau=BETA),
  ),
  "tr-dpo": (
    loss_type("sigmoid", sync_ref_model=True, ref_model_sync_steps=3, ref_model_mixup_alpha=0.6),
    "dpo",
    plain(sync_every=3, sync_alpha=0.6),
  ),
}


@pytest.mark.parametrize("case", PAIR_CASES)
def test_pairs(case, trl_runs, ours, pairs):
  settings, name, our_settings = PAIR_CASES[case]
  run = trl_runs.dpo(pair_rows(pairs), **settings)
  batches = ours.pair_batches(pairs)
  assert_same_pairs(batches, run)
  assert_agree(ours.prefer(name, batches, **our_settings), run)


def test_bco(trl_runs, ours, pairs):
  """TRL's bco_pair compares rewards with 0. Ours, as the paper, with their running mean."""
  run = trl_runs.dpo(pair_rows(pairs), **loss_type("bco_pair"))
  batches = ours.pair_batches(pairs)
  objective = preference_objectives.preference_objective(ours.model, PreferenceConfig("bco", BETA))
  unshifted = {"ref": ours.ref, "shift": Mean(jnp.zeros(()), jnp.ones(()))}
  assert_agree(ours.train(objective, batches, frozen=unshifted), run)
  shifted = ours.prefer("bco", batches, beta=BETA)
  assert difference(shifted["loss"][:1], run.losses[:1]) <= TOLERANCE, "the mean starts at 0"
  assert_differ(shifted, run)


class TestLikelihood:
  """TRL's terms of likelihood are means over the tokens of a batch, ours over its responses."""

  def test_sft(self, trl_runs, ours, pairs):
    """A pair that weighs as its chosen response is long turns our mean into theirs."""
    run = trl_runs.dpo(pair_rows(pairs), **loss_type("sft"))
    batches = ours.pair_batches(pairs)
    weighed = [b | {"weight": b["response_mask"][:, 0].sum(axis=1)} for b in batches]
    assert_agree(ours.prefer("sft", weighed), run)
    assert_differ(ours.prefer("sft", batches), run)

  def test_mixture(self, trl_runs, ours, level_pairs):
    pairs, _ = level_pairs
    mixed = loss_type("sigmoid", loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2])
    run = trl_runs.dpo(pair_rows(pairs), **mixed)
    batches = ours.pair_batches(pairs)
    assert_agree(ours.prefer("dpo + sft*0.2", batches, beta=BETA), run)

  # Ours is the sum over a response, so that over L tokens each a weight of w is TRL's w·L.
  @pytest.mark.parametrize(
    "settings, name, our_settings",
    [
      (dict(loss_type="sigmoid", cpo_alpha=0.0), "cpo", dict(sft_weight=0.0)),
      (dict(loss_type="sigmoid", cpo_alpha=0.7), "cpo", dict(sft_weight=0.7)),
      # max(0, 1 - beta(w - l)) is beta times SLiC's at delta = 1/beta.
      (
        dict(loss_type="hinge", cpo_alpha=0.7),
        f"slic*{BETA}",
        dict(beta=None, delta=1 / BETA, sft_weight=0.7 / BETA),
      ),
      (
        dict(loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.5, beta=2.0),
        "simpo",
        dict(beta=2.0, gamma=0.5),
      ),
      (
        dict(loss_type="alphapo", alpha=0.25, simpo_gamma=0.5, beta=2.0),
        "alphapo",
        dict(beta=2.0, gamma=0.5, alpha=0.25),
      ),
    ],
    ids=["cpo", "cpo-sft", "slic", "simpo", "alphapo"],
  )
  def test_cpo(self, trl_runs, ours, level_pairs, settings, name, our_settings):
    pairs, length = level_pairs
    run = trl_runs.cpo(pair_rows(pairs), **plain(**settings))
    batches = ours.pair_batches(pairs)
    assert_same_pairs(batches, run)
    our_settings = plain(**our_settings)
    if "sft_weight" in our_settings:
      our_settings["sft_weight"] /= length
    assert_agree(ours.prefer(name, batches, **our_settings), run)

  def test_orpo(self, trl_runs, ours, pairs):
    """TRL's likelihood is that of prompt and response; the term of the odds is the same."""
    run = trl_runs.orpo(pair_rows(pairs), beta=BETA)
    batches = ours.pair_batches(pairs)
    assert_same_pairs(batches, run)

    def with_prompts(objective):
      def changed(trainable, frozen, batch, rng):
        total, metrics = objective(trainable, frozen, batch, rng)
        tokens, segments, response = (batch[name][:, 0] for name in ROWS)
        variables = {"params": trainable}
        logprobs = models.token_logprobs(ours.model, variables, tokens, segment_ids=segments)
        per_response = losses.masked_mean(logprobs, response[:, 1:], axis=1)
        per_token = losses.masked_mean(logprobs, segments[:, 1:])
        total += jnp.sum(per_response) - len(tokens) * per_token
        return total, metrics | {"loss": Mean(total, metrics["loss"].weight)}

      return changed

    result = ours.prefer("orpo", batches, wrap=with_prompts, beta=BETA)
    assert_agree(result, run)
    assert_differ(ours.prefer("orpo", batches, beta=BETA), run)


def rotated(batch):
  """TRL's mismatched pairs: each prompt of a batch with the answer of the row above it.

  Ours are drawn from the whole data set, anew each time; the estimate is of the same thing.
  """
  batch = batch | {f"mismatched_{k}": np.zeros_like(batch[k]) for k in ROWS}
  for i in range(len(batch["tokens"])):
    prompt = batch["tokens"][i][: int(np.argmax(batch["response_mask"][i]))]
    answer = batch["tokens"][i - 1][batch["response_mask"][i - 1] > 0]
    end = len(prompt) + len(answer)
    batch["mismatched_tokens"][i, :end] = np.concatenate([prompt, answer])
    batch["mismatched_segment_ids"][i, :end] = 1
    batch["mismatched_response_mask"][i, len(prompt) : end] = 1
  return batch


class TestUnpaired:
  @pytest.fixture(scope="class")
  def records(self, pairs):
    """Two thirds good answers, so that no batch is balanced."""
    return [
      data.Feedback(r.prompt, r.chosen if i % 3 else r.rejected, label=bool(i % 3))
      for i, r in enumerate(pairs)
    ]

  @pytest.fixture(scope="class")
  def rows(self, records):
    return [
      {"prompt": list(r.prompt), "completion": turn(r.completion), "label": r.label}
      for r in records
    ]

  @staticmethod
  def assert_same_batches(batches, run, mismatched):
    for batch, seen in zip(batches, run.batches):
      names = ("input_ids", "attention_mask", "completion_mask")
      assert_same_rows(batch, *map(seen.get, names))
      if mismatched:
        assert_same_rows(batch, *(seen[f"KL_{name}"] for name in names), prefix="mismatched_")
      np.testing.assert_array_equal(batch["is_desirable"], seen["label"])

  def test_kto(self, trl_runs, ours, records, rows):
    settings = plain(desirable_weight=1.3, undesirable_weight=0.8)
    run = trl_runs.kto(rows, loss_type="kto", **settings)
    drawn = ours.batches(data.feedback_batches, records)
    batches = [rotated(batch) for batch in drawn]
    self.assert_same_batches(batches, run, mismatched=True)
    result = ours.prefer("kto", batches, **settings)
    assert_agree(result, run)
    assert np.ptp(result["kl/baseline"]) > 0.1, "a baseline that stays at zero proves nothing"
    assert_differ(ours.prefer("kto", drawn, **settings), run)

  def test_apo_zero(self, trl_runs, ours, records, rows):
    run = trl_runs.kto(rows, loss_type="apo_zero_unpaired", beta=BETA)
    batches = ours.batches(data.feedback_batches, records)
    self.assert_same_batches(batches, run, mismatched=False)
    assert_agree(ours.prefer("apo_zero_unpaired", batches, beta=BETA), run)


class TestReward:
  @pytest.fixture(scope="class")
  def records(self, pairs):
    return [dataclasses.replace(r, margin=0.25 * (i % 5)) for i, r in enumerate(pairs)]

  @pytest.mark.parametrize(
    "columns, centering",
    [((), 0.0), (("margin",), 0.0), (("margin",), 0.05)],
    ids=["plain", "margin", "margin-centred"],
  )
  def test_reward(self, trl_runs, ours, pairs, records, columns, centering):
    torch.manual_seed(3)
    theirs = trl_runs.load(trl_runs.policy, "AutoModelForSequenceClassification", num_labels=1)
    kernel = jnp.asarray(theirs.score.weight.detach().numpy()[0])
    records = records if columns else pairs
    run = trl_runs.reward(
      pair_rows(records, *columns), theirs, center_rewards_coefficient=centering or None
    )
    batches = ours.pair_batches(records)
    assert_same_pairs(batches, run)
    result = ours.train(
      without_bias(
        reward_objectives.pair_objective(
          ours.model, reward_objectives.PairLoss(centering=centering)
        )
      ),
      batches,
      trainable={"trunk": ours.params, "head": {"kernel": kernel, "bias": jnp.zeros(())}},
      frozen={},
    )
    assert_agree(result, run)


def without_bias(objective):
  """TRL's head has none. Ours starts at zero, and stays there where no gradient reaches it."""

  def changed(trainable, frozen, batch, rng):
    head = trainable["head"] | {"bias": jnp.zeros(())}
    return objective(trainable | {"head": head}, frozen, batch, rng)

  return changed


@pytest.mark.parametrize("parts", [1, 2])
def test_lora(parts, trl_runs, ours, pairs, tmp_path):
  """Adapters of peft, the reference being the base without them; also in two microbatches."""
  peft = pytest.importorskip("peft")
  torch.manual_seed(4)
  wanted = ["q_proj", "v_proj", "o_proj", "down_proj"]
  adapted = peft.get_peft_model(
    trl_runs.load(trl_runs.policy),
    peft.LoraConfig(r=3, lora_alpha=7, target_modules=wanted, task_type="CAUSAL_LM"),
  )
  adapted.save_pretrained(tmp_path)
  model, lora = models.load_adapter(str(tmp_path), ours.model)
  run = trl_runs.lora_dpo(
    pair_rows(pairs),
    adapted,
    beta=BETA,
    per_device_train_batch_size=ours.batch // parts,
    gradient_accumulation_steps=parts,
  )
  result = ours.train(
    preference_objectives.preference_objective(model, PreferenceConfig("dpo", BETA)),
    ours.pair_batches(pairs),
    trainable=lora,
    frozen={"base": ours.params},
    accumulate=parts,
  )
  assert_agree(result, run)
