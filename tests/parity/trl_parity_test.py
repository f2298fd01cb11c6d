"""Ten optimizer steps beside TRL: the same weights, order and optimizer must give the same losses.

The loss before update k depends on the gradients of all updates before it, so agreement over ten
steps is agreement of the objective, its normalisation, its gradient, the clipping and AdamW. Both
sides start from one saved Llama, against a reference that is not the policy, and see five batches
twice. TRL tokenises its own records; that its tokens and masks are ours is asserted for every batch.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")

from align_jax import data, losses, models, sharding, worlds  # noqa: E402
from align_jax.training import objectives, optimizer, state, step  # noqa: E402

TOLERANCE = 1e-4  # absolute, and relative where a loss is larger than one
PAIRS, LENGTH = 20, 64
BETA = 0.3


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

  def train(self, objective, batches, *, trainable=None, frozen=None, tx=None, **options):
    """{metric: [steps]}, of before each update."""
    tx = tx or self.tx
    now = state.create_state(self.params if trainable is None else trainable, tx, 0, self.mesh)
    frozen = {"ref": self.ref} if frozen is None else frozen
    run = step.make_train_step(objective, tx, **options)
    taken = []
    for batch in batches:
      now, metrics = run(now, frozen, sharding.put_batch(batch, self.mesh))
      means = {k: v for k, v in metrics.items() if isinstance(v, losses.Mean)}
      taken.append({k: float(v.compute()) for k, v in means.items()})
    return {name: np.array([t[name] for t in taken]) for name in taken[0]}

  def preference(self, name, *, model=None, **settings):
    config = objectives.PreferenceConfig(name, **settings)
    return objectives.preference_objective(model or self.model, config)


@pytest.fixture(scope="module")
def ours(trl_runs):
  return Ours(trl_runs)


@pytest.fixture(scope="module")
def pairs():
  return worlds.Microworld().preferences(PAIRS)


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


def assert_agree(ours, theirs):
  apart = difference(ours, theirs)
  print(f"max difference {apart:.1e} of losses {theirs.min():.3f} to {theirs.max():.3f}")
  assert np.ptp(theirs) > 100 * TOLERANCE, "losses that do not move prove nothing"
  assert apart <= TOLERANCE, f"\nours   {ours}\ntheirs {theirs}"


def assert_same_rows(batch, seen, ids="input_ids", mask="attention_mask", response=None, prefix=""):
  """A batch of ours [B, 2, T] or [B, T] has TRL's rows: first all chosen, then all rejected."""

  def rows(name):
    x = batch[prefix + name]
    return np.swapaxes(x, 0, 1).reshape(-1, LENGTH) if x.ndim == 3 else x

  length = seen[ids].shape[1]
  for name, theirs in (("tokens", ids), ("segment_ids", mask), ("response_mask", response)):
    if theirs is not None:
      np.testing.assert_array_equal(rows(name)[:, :length], seen[theirs])
      assert not rows(name)[:, length:].any()


# TRL's settings, our objective and its settings.
PAIR_CASES = {
  "sigmoid": (dict(loss_type=["sigmoid"]), "dpo", dict(beta=BETA)),
}


@pytest.mark.parametrize("case", PAIR_CASES)
def test_pairs(case, trl_runs, ours, pairs):
  settings, name, our_settings = PAIR_CASES[case]
  run = trl_runs.dpo(pair_rows(pairs), beta=BETA, **settings)
  batches = ours.pair_batches(pairs)
  for batch, seen in zip(batches, run.batches):
    assert_same_rows(batch, seen, response="completion_mask")
  assert_agree(ours.train(ours.preference(name, **our_settings), batches)["loss"], run.losses)


class TestKTO:
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
  def rotated(batch):
    """TRL's mismatched pairs: each prompt of a batch with the answer of the row above it.

    Ours are drawn from the whole data set, anew each time; the estimate is of the same thing.
    """
    batch = batch | {f"mismatched_{k}": np.zeros_like(batch[k]) for k in ROW_NAMES}
    for i in range(len(batch["tokens"])):
      prompt = batch["tokens"][i][: int(np.argmax(batch["response_mask"][i]))]
      answer = batch["tokens"][i - 1][batch["response_mask"][i - 1] > 0]
      end = len(prompt) + len(answer)
      batch["mismatched_tokens"][i, :end] = np.concatenate([prompt, answer])
      batch["mismatched_segment_ids"][i, :end] = 1
      batch["mismatched_response_mask"][i, len(prompt) : end] = 1
    return batch

  def test_kto(self, trl_runs, ours, records, rows):
    weights = dict(desirable_weight=1.3, undesirable_weight=0.8)
    run = trl_runs.kto(rows, beta=BETA, loss_type="kto", **weights)
    drawn = ours.batches(data.feedback_batches, records)
    batches = [self.rotated(batch) for batch in drawn]
    for batch, seen in zip(batches, run.batches):
      assert_same_rows(batch, seen, response="completion_mask")
      names = ("KL_input_ids", "KL_attention_mask", "KL_completion_mask")
      assert_same_rows(batch, seen, *names, prefix="mismatched_")
      np.testing.assert_array_equal(batch["is_desirable"], seen["label"])
    objective = ours.preference("kto", beta=BETA, **weights)
    prepare = objectives.kto_prepare(ours.model)
    result = ours.train(objective, batches, prepare=prepare)
    assert_agree(result["loss"], run.losses)
    assert np.ptp(result["kl/baseline"]) > 0.1, "a baseline that stays at zero proves nothing"
    other = ours.train(objective, drawn, prepare=prepare)["loss"]
    assert difference(other, run.losses) > 10 * TOLERANCE, "the mismatched pairs must matter"


ROW_NAMES = ("tokens", "segment_ids", "response_mask")


class TestReward:
  @pytest.fixture(scope="class")
  def records(self, pairs):
    return [dataclasses.replace(r, margin=0.25 * (i % 5)) for i, r in enumerate(pairs)]

  @pytest.mark.parametrize("columns", [(), ("margin",)], ids=["plain", "margin"])
  @pytest.mark.parametrize("centering", [0.0, 0.05])
  def test_reward(self, trl_runs, ours, pairs, records, columns, centering):
    torch.manual_seed(3)
    theirs = trl_runs.load(trl_runs.policy, "AutoModelForSequenceClassification", num_labels=1)
    head = {
      "kernel": jnp.asarray(theirs.score.weight.detach().numpy()[0]),
      "bias": jnp.zeros(()),
    }
    records = records if columns else pairs
    run = trl_runs.reward(
      pair_rows(records, *columns), theirs, center_rewards_coefficient=centering or None
    )
    batches = ours.pair_batches(records)
    for batch, seen in zip(batches, run.batches):
      assert_same_rows(batch, seen)
    # TRL's head has no bias. Without its gradient ours stays at zero and leaves the clipping alone.
    frozen_bias = optax.masked(optax.set_to_zero(), is_bias)
    result = ours.train(
      objectives.reward_objective(ours.model, centering=centering),
      batches,
      trainable={"trunk": ours.params, "head": head},
      frozen={},
      tx=optax.chain(frozen_bias, ours.tx),
    )
    assert_agree(result["loss"], run.losses)


def is_bias(params):
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "bias", params)


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
    ours.preference("dpo", model=model, beta=BETA),
    ours.pair_batches(pairs),
    trainable=lora,
    frozen={"base": ours.params},
    accumulate=parts,
  )
  assert_agree(result["loss"], run.losses)
