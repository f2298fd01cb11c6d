"""The five collections: each does what it says, and costs nothing when absent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import models, sharding
from align_jax.models import transformer

LENGTH, WIDTH, LAYERS = 12, 32, 3
# Every feature at once: grouped heads, norms of heads, biases, caps, windows, two rope bases.
RICH = models.ModelConfig(
  vocab_size=50, embed_dim=WIDTH, num_layers=LAYERS, num_heads=4, num_kv_heads=2, head_dim=8,
  mlp_dim=48, activation="gelu_tanh", scale_embeddings=True, norm_plus_one=True, post_norms=True,
  qk_norm=True, qkv_bias=True, attention_softcap=20.0, logit_softcap=30.0, rope_local_theta=1e3,
  sliding_window=4, local_layers=(True, False, True),
)  # fmt: skip
PLAIN = models.ModelConfig(
  vocab_size=50, embed_dim=WIDTH, num_layers=LAYERS, num_heads=4, num_kv_heads=4, head_dim=8,
  mlp_dim=48, tie_embeddings=False,
)  # fmt: skip


class Subject:
  """A model, its parameters and its jitted calls, compiled once for the whole file."""

  def __init__(self, config):
    self.model = models.Transformer(config)
    params = models.init_params(self.model, jax.random.key(0))
    # Norms and biases start where a misplaced one would not show.
    self.params = jax.tree.map(
      lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params
    )
    self._forward = jax.jit(
      lambda params, tokens, positions, segments: self.model.apply(
        {"params": params}, tokens, positions, segments
      )
    )
    self.tapped = jax.jit(
      lambda edits: self.model.apply(
        {"params": self.params, "edits": edits}, self.tokens, mutable=["taps"]
      )
    )
    self.decode = jax.jit(
      lambda cache, tokens, positions: self.model.apply(
        {"params": self.params, "cache": cache}, tokens, positions, mutable=["cache"]
      )
    )
    self.tokens = jax.random.randint(jax.random.key(1), (3, LENGTH), 0, config.vocab_size)
    self.logits = self.forward(self.params, self.tokens)

  def forward(self, params, tokens, positions=None, segments=None):
    """Everything given, so that one compilation serves all tests."""
    if positions is None:
      positions = jnp.arange(tokens.shape[1])
    if segments is None:
      segments = jnp.ones_like(tokens)
    return self._forward(params, tokens, jnp.broadcast_to(positions, tokens.shape), segments)


@pytest.fixture(scope="module")
def rich():
  return Subject(RICH)


@pytest.fixture(scope="module")
def plain():
  return Subject(PLAIN)


@pytest.fixture(params=["rich", "plain"])
def subject(request):
  return request.getfixturevalue(request.param)


def gradient(subject, model):
  loss = lambda p: models.token_logprobs(model, {"params": p}, subject.tokens).sum()  # noqa: E731
  return jax.jit(jax.grad(loss))(subject.params)


@pytest.fixture(scope="module")
def plain_gradient(plain):
  return gradient(plain, plain.model)


def close(a, b, tolerance=2e-5):
  np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def differs(a, b):
  return np.abs(np.asarray(a) - np.asarray(b)).max() > 1e-3


class TestForward:
  def test_logits_are_float32_of_the_vocabulary(self, subject):
    assert subject.logits.shape == (3, LENGTH, 50) and subject.logits.dtype == jnp.float32

  def test_positions_and_segments_have_defaults(self, plain):
    logits = jax.jit(plain.model.apply)({"params": plain.params}, plain.tokens)
    close(logits, plain.logits)

  def test_no_token_sees_the_future(self, subject):
    changed = subject.tokens.at[:, 7].set((subject.tokens[:, 7] + 1) % 50)
    logits = subject.forward(subject.params, changed)
    close(logits[:, :7], subject.logits[:, :7], 0)
    assert differs(logits[:, 7:], subject.logits[:, 7:])

  def test_only_distances_between_positions_matter(self, subject):
    positions = jnp.broadcast_to(jnp.arange(LENGTH) + 5, subject.tokens.shape)
    close(subject.forward(subject.params, subject.tokens, positions), subject.logits, 1e-4)

  def test_packed_segments_equal_separate_rows(self, subject):
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3] * 3)
    positions = jnp.array([[*range(5), *range(4), 0, 0, 0]] * 3)
    packed = subject.forward(subject.params, subject.tokens, positions, segments)
    alone = jnp.pad(subject.tokens[:, 5:9], ((0, 0), (0, 8)))
    close(packed[:, :5], subject.logits[:, :5])
    close(packed[:, 5:9], subject.forward(subject.params, alone)[:, :4])

  def test_padding_is_never_seen(self, subject):
    segments = jnp.array([[0] * 3 + [1] * 6 + [0] * 3] * 3)
    other = jnp.where(segments == 0, (subject.tokens + 7) % 50, subject.tokens)
    real = segments[0] > 0
    a, b = (
      subject.forward(subject.params, t, None, segments)[:, real] for t in (subject.tokens, other)
    )
    close(a, b, 0)
    assert np.isfinite(a).all()

  def test_shapes_are_enough_to_compile(self, subject):
    abstract = models.abstract_params(subject.model)
    tokens = jax.ShapeDtypeStruct((2, 6), jnp.int32)
    lowered = jax.jit(subject.model.apply).lower({"params": abstract}, tokens)
    assert lowered.out_info.shape == (2, 6, 50)

  def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(self, plain):
    config = dataclasses.replace(PLAIN, dtype="bfloat16")
    logits, taps = jax.jit(
      lambda p: models.Transformer(config).apply({"params": p}, plain.tokens, mutable=["taps"])
    )(plain.params)
    assert logits.dtype == jnp.float32
    assert taps["taps"]["layers"]["resid_post"].dtype == jnp.bfloat16
    close(logits, plain.logits, 0.05 * np.abs(plain.logits).max())

  def test_a_window_ends_where_it_says(self):
    config = dataclasses.replace(PLAIN, num_layers=1, sliding_window=4)
    model = models.Transformer(config)
    params = models.init_params(model, jax.random.key(0))
    embed = jax.random.normal(jax.random.key(1), (LENGTH, WIDTH))
    tokens = jnp.arange(LENGTH)[None]

    def logit(embed):
      table = params["embedding"].at[:LENGTH].set(embed)
      return model.apply({"params": {**params, "embedding": table}}, tokens)[0, 9].sum()

    reach = np.abs(jax.jit(jax.grad(logit))(embed)).sum(-1) > 0
    assert reach.tolist() == [6 <= i <= 9 for i in range(LENGTH)]

  def test_grouped_keys_equal_repeated_keys(self, plain):
    config = dataclasses.replace(PLAIN, num_kv_heads=2)
    layers = plain.params["layers"]
    few = {name: layers[name][:, :, ::2] for name in ("key", "value")}
    many = {name: jnp.repeat(few[name], 2, axis=2) for name in few}
    grouped = jax.jit(models.Transformer(config).apply)(
      {"params": {**plain.params, "layers": {**layers, **few}}}, plain.tokens
    )
    close(grouped, plain.forward({**plain.params, "layers": {**layers, **many}}, plain.tokens))

  @pytest.mark.parametrize("remat", ["dots", "full"])
  def test_remat_changes_memory_not_gradients(self, plain, plain_gradient, remat):
    config = dataclasses.replace(plain.model.config, remat=remat)
    a, b = plain_gradient, gradient(plain, models.Transformer(config))
    jax.tree.map(lambda x, y: close(x, y, 1e-5 + 1e-5 * np.abs(x).max()), a, b)


class TestCache:
  def test_decoding_equals_the_full_forward(self, subject):
    cache = models.init_cache(subject.model, 3, LENGTH + 4)
    logits, state = subject.decode(cache, subject.tokens[:, :5], None)
    close(logits, subject.logits[:, :5])
    for t in range(5, LENGTH):
      logits, state = subject.decode(
        state["cache"], subject.tokens[:, t : t + 1], jnp.full((3, 1), t)
      )
      close(logits[:, 0], subject.logits[:, t])

  def test_rows_may_be_of_different_ages(self, subject):
    """Right-padded prompts: what padding wrote is overwritten before anybody sees it."""
    lengths = jnp.array([5, 2, 4])
    padded = jnp.where(jnp.arange(5) < lengths[:, None], subject.tokens[:, :5], 49)
    _, state = subject.decode(models.init_cache(subject.model, 3, LENGTH + 4), padded, None)
    for step in range(6):
      at = lengths + step
      new = subject.tokens[jnp.arange(3), at]
      logits, state = subject.decode(state["cache"], new[:, None], at[:, None])
      close(logits[:, 0], subject.logits[jnp.arange(3), at])

  def test_a_position_past_the_end_is_dropped(self, plain):
    cache = models.init_cache(plain.model, 3, 4)
    _, state = plain.decode(cache, plain.tokens[:, :4], None)
    _, after = plain.decode(state["cache"], plain.tokens[:, :1], jnp.full((3, 1), 9))
    jax.tree.map(lambda a, b: close(a, b, 0), state["cache"], after["cache"])

  def test_segments_do_not_go_with_a_cache(self, plain):
    cache = models.init_cache(plain.model, 3, 16)
    with pytest.raises(ValueError, match="segment_ids"):
      plain.model.apply(
        {"params": plain.params, "cache": cache}, plain.tokens,
        segment_ids=jnp.ones_like(plain.tokens), mutable=["cache"],
      )  # fmt: skip


def edits(site, **arrays):
  return {"layers": {site: arrays}}


class TestTapsAndEdits:
  def test_taps_hold_every_site_and_add_up(self, rich):
    logits, state = rich.tapped({})
    taps = state["taps"]["layers"]
    assert set(taps) == transformer.SITES
    close(logits, rich.logits)
    close(taps["resid_mid"], taps["resid_pre"] + taps["attention_out"])
    close(taps["resid_post"], taps["resid_mid"] + taps["mlp_out"])
    close(taps["resid_pre"][1:], taps["resid_post"][:-1], 0)
    close(taps["attention_probs"].sum(-1), 1.0)
    assert taps["attention_heads"].shape == (LAYERS, 3, LENGTH, 4, 8)
    assert taps["mlp_hidden"].shape == (LAYERS, 3, LENGTH, 48)

  def test_zero_edits_are_the_identity(self, rich):
    nothing = dict(
      add=jnp.zeros((LAYERS, 1)),
      project=jnp.zeros((LAYERS, 2, WIDTH)),
      replace=jnp.ones((LAYERS, WIDTH)),
      where=jnp.zeros((LAYERS, 1), bool),
    )
    logits, _ = rich.tapped(edits("resid_post", **nothing))
    np.testing.assert_array_equal(logits, rich.tapped({})[0])

  def test_add_moves_one_layer_and_what_follows(self, rich):
    shift = jnp.zeros((LAYERS, WIDTH)).at[1].set(2.0)
    before, after = (
      rich.tapped(e)[1]["taps"]["layers"] for e in ({}, edits("attention_out", add=shift))
    )
    close(after["attention_out"][1], before["attention_out"][1] + 2.0)
    close(after["resid_post"][0], before["resid_post"][0])
    assert differs(after["resid_post"][1], before["resid_post"][1])

  def test_project_removes_a_direction(self, rich):
    rows = np.linalg.qr(np.random.default_rng(0).normal(size=(WIDTH, 2)))[0].T
    tree = edits("resid_mid", project=jnp.zeros((LAYERS, 2, WIDTH)).at[2].set(rows))
    before, after = (rich.tapped(e)[1]["taps"]["layers"]["resid_mid"][2] for e in ({}, tree))
    close(after @ rows.T, 0.0)
    close(after, before - (before @ rows.T) @ rows)

  def test_replacing_the_whole_stream_patches_in_another_run(self, plain):
    """Activation patching: the donor's last residual gives the donor's logits."""
    _, donor = plain.tapped({})
    stream = jnp.roll(donor["taps"]["layers"]["resid_post"], 1, axis=1)
    where = jnp.zeros((LAYERS, 1, 1, 1), bool).at[-1].set(True)
    logits, _ = plain.tapped(edits("resid_post", replace=stream, where=where))
    close(logits, jnp.roll(plain.logits, 1, axis=0))

  @pytest.mark.parametrize(
    "variables",
    [
      {"edits": edits("resid_pots", add=jnp.zeros((LAYERS, 1)))},
      {"edits": edits("resid_post", ad=jnp.zeros((LAYERS, 1)))},
      {"lora": edits("q_proj", a=jnp.zeros(1), b=jnp.zeros(1))},
    ],
  )
  def test_unknown_names_raise(self, plain, variables):
    with pytest.raises(ValueError, match="resid_pots|ad|q_proj"):
      plain.model.apply({"params": plain.params, **variables}, plain.tokens)


def test_eight_devices_equal_one():
  config = dataclasses.replace(RICH, vocab_size=48)
  model = models.Transformer(config)
  params = models.init_params(model, jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (8, LENGTH), 0, 48)
  loss = jax.jit(
    jax.value_and_grad(lambda p, t: models.token_logprobs(model, {"params": p}, t).mean())
  )
  mesh = sharding.make_mesh(sharding.MeshConfig(2, 2, 2), jax.devices())
  where = sharding.tree_shardings(models.logical_axes(model), models.abstract_params(model), mesh)
  there = loss(jax.device_put(params, where), sharding.put_batch(np.asarray(tokens), mesh))
  jax.tree.map(lambda a, b: close(a, b, 1e-6 + 1e-5 * np.abs(a).max()), loss(params, tokens), there)
