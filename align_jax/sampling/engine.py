"""Batched generation: one compiled prefill and decode loop per shape."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from align_jax import models, sharding
from align_jax.errors import InputError
from align_jax.sampling import requests, stops
from align_jax.sampling.decode import Policy, generate_rows
from align_jax.sampling.distribution import make_decoding
from align_jax.sampling.samples import Samples


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
    mesh: splits the rows over `data` and `fsdp`.
    prompt_ids: [P] integers; 0, 1, 2... by default. Two equal prompts need different ids.
    batch_size: rows decoded at a time, whole prompts of them; all of them by default.

  Returns:
    `Samples` of NumPy arrays with S = W + max N, W being the longest prompt (or the width of the
    padded array) rounded up to a multiple of 16. A program is compiled for each (rows, W, max N)
    and kind of distribution.

  Raises:
    InputError: on an empty prompt or a setting out of range.
  """
  decoding = make_decoding(temperature, top_k, top_p, min_p, repetition_penalty)
  stop = stops.check(stop, tokenizer)
  asked = requests.make_prompts(prompts, lengths, prompt_ids, max_new_tokens, pad_id)
  policy = _policy(params, lora, mixture)
  group = _prompts_at_a_time(len(asked), samples_per_prompt, batch_size, mesh)
  parts = []
  for start in range(0, len(asked), group):
    part = asked.part(start, group)
    batch = part.tokens, part.lengths, part.ids, part.budgets
    parts.append(
      generate_rows(
        model,
        policy,
        *(batch if mesh is None else sharding.put_batch(batch, mesh)),
        rng,
        samples_per_prompt=samples_per_prompt,
        size=asked.tokens.shape[1] + int(asked.budgets.max()),
        eos_ids=np.array(eos_ids, np.int32),
        pad_id=np.int32(pad_id),
        decoding=decoding,
      )
    )
  # One transfer at the end: the device decodes the next group while Python prepares it.
  count = len(asked) * samples_per_prompt
  samples = jax.tree.map(lambda *x: np.concatenate(x)[:count], *jax.device_get(parts))
  return _cut(samples, stop, tokenizer, pad_id) if stop else samples


def _policy(params, lora, mixture) -> Policy:
  variables = {"params": params} if lora is None else {"params": params, "lora": lora}
  if mixture is None:
    return Policy((variables,))
  second, weight = mixture
  if not 0 <= weight <= 1:
    raise InputError(f"the weight of a mixture must be in [0, 1], got {weight}")
  return Policy((variables, dict(second)), np.float32(weight))


def _prompts_at_a_time(count: int, samples_per_prompt: int, batch_size, mesh) -> int:
  if samples_per_prompt < 1:
    raise InputError(f"samples_per_prompt must be at least 1, got {samples_per_prompt}")
  if batch_size is not None and batch_size < samples_per_prompt:
    raise InputError(
      f"batch_size must be at least {samples_per_prompt}, the samples of one prompt,"
      f" got {batch_size}"
    )
  group = requests.row_bucket(count)
  if batch_size is not None:
    group = min(group, batch_size // samples_per_prompt)
  if mesh is not None:
    if jax.process_count() > 1:
      raise InputError(
        "generate works within one process: sampling on several hosts is not built yet"
      )
    ways = sharding.batch_ways(mesh)
    group = -(-group // ways) * ways
  return group


def _cut(samples: Samples, stop: tuple[str, ...], tokenizer: Any, pad_id: int) -> Samples:
  """The samples, each ended by its first stop string."""
  tokens, mask, logprobs, finished = (
    np.array(x) for x in (samples.tokens, samples.response_mask, samples.logprobs, samples.finished)
  )
  for row, response in enumerate(samples.responses()):
    end = stops.first_end(response, stop, tokenizer)
    if end is None:
      continue
    behind = slice(samples.prompt_lengths[row] + end, None)
    tokens[row, behind], mask[row, behind], logprobs[row, behind] = pad_id, False, 0.0
    finished[row] = True
  return Samples(tokens, samples.prompt_lengths, mask, logprobs, finished)
