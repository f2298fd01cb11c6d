"""Generation: the settings of a call, checked, and what comes of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from align_jax import models, sharding
from align_jax.errors import InputError
from align_jax.sampling import requests, scheduler, stops
from align_jax.sampling.decode import Policy
from align_jax.sampling.distribution import make_decoding
from align_jax.sampling.samples import Samples

PATIENCE = 8  # with slots, rows are refilled when one in so many has ended
AHEAD = 8  # rows, and prompts are prefilled for at least so many at a time


def generate(
  model: models.Transformer,
  params: Any,
  prompts: Sequence[np.ndarray] | np.ndarray,
  *,
  max_new_tokens: int | Sequence[int],
  eos_ids: Sequence[int],
  pad_id: int,
  rng: jax.Array,
  lengths: np.ndarray | None = None,
  samples_per_prompt: int = 1,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  min_p: float | None = None,
  repetition_penalty: float | None = None,
  stop: Sequence[str] = (),
  tokenizer: Any = None,
  lora: Any = None,
  mixture: tuple[Mapping[str, Any], float] | None = None,
  mesh: jax.sharding.Mesh | None = None,
  prompt_ids: Sequence[int] | None = None,
  batch_size: int | None = None,
  slots: int | None = None,
) -> Samples:
  """Samples G responses to every prompt; rows come prompt by prompt, B = P * G of them.

  Sample g of prompt p draws its token at position t with the key
  fold_in(fold_in(fold_in(rng, prompt_ids[p]), g), t), so it depends on its prompt, its id, its number
  and the seed, and not on the batch it travelled in. A prompt is prefilled once for its G samples.

  Args:
    model: the Flax module.
    params: its parameters.
    prompts: P arrays of token ids; or one right-padded [P, W] array together with `lengths`.
    max_new_tokens: N, the most tokens to draw for a row; or [P], one such number for every prompt.
    eos_ids: the tokens that end a response (and belong to it).
    pad_id: fills the rows behind the response. It may be an EOS id: nothing is found by token id.
    rng: PRNG key.
    lengths: [P], if `prompts` is a padded array.
    samples_per_prompt: G.
    temperature: 0 decodes greedily.
    top_k: see `Decoding`, as for `top_p`, `min_p` and `repetition_penalty`.
    top_p: see `Decoding`.
    min_p: see `Decoding`.
    repetition_penalty: see `Decoding`; it looks at prompt and response.
    stop: a response ends with the token that completes one of these strings in its text (special
      tokens left out of it). The token and all of its text belong to the response, as an EOS does:
      they were sampled, so they are scored and trained on. `decode_texts` can cut the text.
    tokenizer: what turns tokens into that text; needed by `stop` alone.
    lora: a "lora" collection, or None for the bare model.
    mixture: (variables, w): a second set of collections of the same module, with a cache of its own;
      the logits are (1-w) * logits + w * the second's, so the distribution (and the log-probs) are
      those of π^(1-w) π₂^w, normalised (Nash-MD, Munos et al. 2023).
    mesh: splits the rows over `data` and `fsdp`. Where it spans several hosts, each must make the same
      call and is given all responses.
    prompt_ids: [P] integers; 0, 1, 2... by default. Two equal prompts need different ids.
    batch_size: rows decoded at a time, whole prompts of them; all of them by default. The next
      batch begins when the longest response of this one is done.
    slots: rows decoded at a time, continuously: when one in eight has ended, the next of the queue
      take their places. The samples are the same.

  Returns:
    `Samples` of NumPy arrays with S = W + max N, W being the longest prompt (or the width of the
    padded array) rounded up to a multiple of 16. For each (rows, W, max N) and kind of distribution
    at most w = 1 + log2(W / 16) prefills and s = 1 + log2(S / 64) decode loops are compiled, and of
    the small programs w * s admissions and s² resizings.

  Raises:
    InputError: on an empty prompt or a setting out of range.
  """
  decoding = make_decoding(temperature, top_k, top_p, min_p, repetition_penalty)
  sampler = scheduler.Sampler(
    model,
    _policy(params, lora, mixture),
    decoding,
    rng,
    np.array(eos_ids, np.int32),
    stops.check(stop, tokenizer),
    tokenizer,
    mesh,
  )
  asked = requests.make_prompts(prompts, lengths, prompt_ids, max_new_tokens, pad_id)
  plan = _plan(len(asked), samples_per_prompt, batch_size, slots, mesh)
  return _assemble(asked, scheduler.run(sampler, asked, plan), samples_per_prompt, pad_id)


def _policy(params, lora, mixture) -> Policy:
  variables = {"params": params} if lora is None else {"params": params, "lora": lora}
  if mixture is None:
    return Policy((variables,))
  second, weight = mixture
  if not 0 <= weight <= 1:
    raise InputError(f"the weight of a mixture must be in [0, 1], got {weight}")
  return Policy((variables, dict(second)), np.float32(weight))


def _plan(count: int, samples_per_prompt: int, batch_size, slots, mesh) -> scheduler.Plan:
  for name, value in (("samples_per_prompt", samples_per_prompt), ("slots", slots)):
    if value is not None and value < 1:
      raise InputError(f"{name} must be at least 1, got {value}")
  if slots is not None and batch_size is not None:
    raise InputError("slots and batch_size both say how many rows are decoded at a time: give one")
  if batch_size is not None and batch_size < samples_per_prompt:
    raise InputError(
      f"batch_size must be at least {samples_per_prompt}, the samples of one prompt,"
      f" got {batch_size}"
    )
  ways = 1 if mesh is None else sharding.batch_ways(mesh)
  prompts = requests.row_bucket(count)
  if slots is None:
    if batch_size is not None:
      prompts = min(prompts, batch_size // samples_per_prompt)
    prompts = _round_up(prompts, ways)
    rows = prompts * samples_per_prompt
    return scheduler.Plan(rows, prompts, rows, samples_per_prompt)
  rows = _round_up(min(slots, prompts * samples_per_prompt), ways)
  patience = max(rows // PATIENCE, 1)
  # Prompts are read ahead: reading a few takes hardly longer than reading one.
  ahead = max(patience, min(rows, AHEAD))
  prompts = _round_up(-(-ahead // samples_per_prompt), ways)
  return scheduler.Plan(rows, prompts, patience, samples_per_prompt)


def _round_up(count: int, multiple: int) -> int:
  return -(-count // multiple) * multiple


def _assemble(
  prompts: requests.Prompts, responses: scheduler.Responses, samples_per_prompt: int, pad_id: int
) -> Samples:
  """Rows of prompt, response and padding."""
  rows, size = len(responses.counts), prompts.tokens.shape[1] + responses.tokens.shape[1]
  tokens, logprobs = np.full((rows, size), pad_id, np.int32), np.zeros((rows, size), np.float32)
  lengths = np.repeat(prompts.lengths, samples_per_prompt)
  for row, (start, count) in enumerate(zip(lengths, responses.counts)):
    tokens[row, :start] = prompts.tokens[row // samples_per_prompt, :start]
    tokens[row, start : start + count] = responses.tokens[row, :count]
    logprobs[row, start : start + count] = responses.logprobs[row, :count]
  at = np.arange(size)
  mask = (at >= lengths[:, None]) & (at < (lengths + responses.counts)[:, None])
  return Samples(tokens, lengths, mask, logprobs, responses.finished)
