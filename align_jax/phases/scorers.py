"""Scores of texts: by a reward model, by what a policy was trained to prefer, or by length alone."""

import dataclasses
import functools
import logging
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from align_jax import config as config_lib
from align_jax import data, models, sharding
from align_jax.errors import InputError
from align_jax.phases import workspace
from align_jax.phases.sections import ModelSection
from align_jax.training import objectives, preferences, workdir

SOURCES = (
  "'<workdir of a reward model>', 'average:<several of them>', "
  "'implicit:<workdir of experiments.preference>', 'implicit:<policy>,<reference>,beta=0.1', "
  "'longer' or 'longer:<model whose tokens are counted>'"
)
_SIXTEENTHS = (1, 2, 3, 4, 6, 8, 12, 16)  # of the longest row: the widths of rows
_WHOLE = sys.maxsize  # no text is longer
_CHUNK = 128  # positions through the LM head at a time

Rows = dict[str, jax.Array]  # tokens, segment_ids and response_mask, [B, T] each


@dataclasses.dataclass(frozen=True)
class Scores:
  """What a scorer says of n texts; `members` [k, n] are the rewards of an ensemble's members."""

  rewards: np.ndarray  # [n] float64; of an ensemble the mean of its members
  lengths: np.ndarray  # [n] int, tokens of the whole response with the one that ends it
  truncated: np.ndarray  # [n] bool, whether prompt and response were cut to fit a row
  members: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Scorer:
  """`scorer(prompts, responses) -> Scores`; the same for a text whatever it is scored with."""

  name: str
  tokenizer: Any  # None: lengths are numbers of characters
  score: Callable[[Rows], np.ndarray] | None  # rows to [k, B]; None: the length is the score
  mesh: jax.sharding.Mesh
  length: int  # tokens of the longest row; longer texts are cut as in training
  batch_size: int  # rows at a time

  def __call__(
    self,
    prompts: Sequence[tuple[data.Message, ...]],
    responses: Sequence[str],
    sources: Sequence[str] | None = None,
  ) -> Scores:
    """Scores every response after its prompt; a pair that occurs twice is scored once.

    sources: where the texts are from, for the InputError about one that cannot be encoded.
    """
    if len(prompts) != len(responses):
      raise ValueError(f"{len(prompts)} prompts for {len(responses)} responses.")
    places: dict[Any, int] = {}  # text -> its place among the different ones
    inverse = np.array(
      [places.setdefault(_key(*text), len(places)) for text in zip(prompts, responses)], int
    )
    first = np.zeros(len(places), int)
    first[inverse[::-1]] = np.arange(len(inverse))[::-1]
    sources = sources or [f"text {i}" for i in range(len(responses))]
    found = self._unique([(prompts[i], responses[i], sources[i]) for i in first])
    return Scores(*(None if x is None else x[..., inverse] for x in found))

  def _unique(self, texts: Sequence[tuple[Any, str, str]]) -> tuple[np.ndarray | None, ...]:
    """(rewards, lengths, truncated, members) of texts that are all different."""
    if self.tokenizer is None:
      lengths = np.array([len(response) for _, response, _ in texts], int)
      return lengths.astype(float), lengths, np.zeros(len(texts), bool), None
    encoded, lengths, truncated = [], np.zeros(len(texts), int), np.zeros(len(texts), bool)
    for i, (prompt, response, source) in enumerate(texts):
      record = data.Feedback(prompt, response, True, source=source)
      whole = data.encode_feedback(record, self.tokenizer, _WHOLE)
      lengths[i], truncated[i] = whole.response_mask.sum(), len(whole.tokens) > self.length
      cut = truncated[i] and self.score is not None
      encoded.append(data.encode_feedback(record, self.tokenizer, self.length) if cut else whole)
    if self.score is None:
      return lengths.astype(float), lengths, np.zeros(len(texts), bool), None
    if truncated.any():
      message = "%s: %d of %d texts were longer than %d tokens and were cut"
      logging.warning(message, self.name, truncated.sum(), len(texts), self.length)
    members = self._in_batches(encoded)
    alone = len(members) == 1
    return members.mean(axis=0), lengths, truncated, None if alone else members

  def _in_batches(self, encoded: Sequence[data.Encoded]) -> np.ndarray:
    """[k, n] float64: the longest texts first, few widths of rows, always as many rows."""
    sizes = np.array([len(e.tokens) for e in encoded], int)
    order = np.argsort(-sizes, kind="stable")
    widths = np.array(sorted({-(-part * self.length // 16) for part in _SIXTEENTHS}))
    starts = range(0, len(order), self.batch_size)
    out = None
    for start in tqdm.tqdm(
      starts, self.name, unit=" batches", delay=5, mininterval=0.5 if sys.stderr.isatty() else 10.0
    ):
      group = order[start : start + self.batch_size]
      width = int(widths[np.searchsorted(widths, sizes[group[0]])])
      # The last batch is filled with its last row: one shape, one program.
      filled = np.minimum(np.arange(self.batch_size), len(group) - 1)
      rows = _rows([encoded[i] for i in group], width, data.pad_id(self.tokenizer))
      scores = self.score(sharding.put_batch({k: x[filled] for k, x in rows.items()}, self.mesh))
      if out is None:
        out = np.zeros((len(scores), len(order)))
      out[:, group] = scores[:, : len(group)]
    return np.zeros((1, 0)) if out is None else out


def open_scorer(
  source: str, mesh, *, dtype: str = "float32", length: int, batch_size: int
) -> Scorer:
  """The scorer that `source` names; see `SOURCES`.

  The implicit reward of a policy is β Σ_t (log π - log π_ref) over the response and its end (Rafailov
  et al. 2023, https://arxiv.org/abs/2305.18290). Of a workdir, β and the reference are those of its
  run, and objectives on log-probs per token (ipo_mean, dpo_norm) mean them over the response as they
  did in training. InputError where the source is none of these, or rows are longer than the model's
  positions.
  """
  if length < 1 or batch_size < 1:
    raise InputError("a scorer's length and batch_size must be positive")
  kind, _, rest = source.partition(":")
  name, score = kind, None
  if kind == "longer":
    tokenizer = workspace.tokenizer_of(ModelSection(rest)) if rest else None
  elif kind == "implicit":
    name, tokenizer, score = _implicit(rest, mesh, dtype, length)
  else:
    name, tokenizer, score = _reward_model(source, mesh, dtype, length)
  return Scorer(name, tokenizer, score, mesh, length, batch_size)


def _reward_model(source: str, mesh, dtype: str, length: int):
  averaged = source.startswith(workspace.AVERAGE)
  if not averaged and (not source or not (pathlib.Path(source) / "model.json").exists()):
    raise InputError(f"{source!r} is no reward model: a scorer is {SOURCES}")
  members = workspace.load_members(source, mesh, dtype=dtype)
  first = members[0]
  if first.head is None:
    raise InputError(f"{source} is a policy: what it prefers is scored by 'implicit:{source}'")
  _check_positions(source, first.model, length)
  if all(member.params is first.params for member in members):
    groups = [members]  # heads on one trunk are read off it together
  else:
    groups = [[member] for member in members]
  stacks = [_side_by_side(group) for group in groups]

  def score(rows: Rows) -> np.ndarray:
    found = [_rewards(first.model, {"params": params}, heads, rows) for params, heads in stacks]
    return np.concatenate([np.asarray(rewards).T for rewards in found])

  name = source if averaged else pathlib.Path(source).resolve().name
  return name, first.tokenizer, score


def _side_by_side(members: Sequence[workspace.Loaded]) -> tuple[Any, Any]:
  """(trunk, heads) of members on one trunk: kernel [D, k] and bias [k]."""
  heads = [member.head for member in members]
  return members[0].params, jax.tree.map(lambda *x: jnp.stack(x, axis=-1), *heads)


def _implicit(text: str, mesh, dtype: str, length: int):
  policy_path, reference_path, scale, per_token = _log_ratio(text)
  policy, reference = (
    workspace.load(path, mesh, dtype=dtype) for path in (policy_path, reference_path)
  )
  for path, found in ((policy_path, policy), (reference_path, reference)):
    if found.head is not None:
      raise InputError(f"{path} is a reward model: an implicit reward is of two policies")
    _check_positions(path, found.model, length)
  workspace.same_vocabulary(policy, reference, reference_path)

  def score(rows: Rows) -> np.ndarray:
    ours, theirs = (
      np.asarray(_logprobs(found.model, {"params": found.params}, rows), np.float64)
      for found in (policy, reference)
    )
    mask = np.asarray(rows["response_mask"])[:, 1:]
    ratios = ((ours - theirs) * mask).sum(axis=1)
    return scale * (ratios / mask.sum(axis=1) if per_token else ratios)[None]

  return f"implicit {pathlib.Path(policy_path).name}", policy.tokenizer, score


def _log_ratio(text: str) -> tuple[str, str, float, bool]:
  """(policy, reference, scale, whether per token) of what follows 'implicit:'."""
  parts = [part.strip() for part in text.split(",")]
  if len(parts) == 1 and parts[0]:
    return (parts[0], *_reference_of(pathlib.Path(parts[0])))
  key, _, value = parts[-1].partition("=")
  try:
    scale = float(value)
  except ValueError:
    scale = 0.0
  if len(parts) != 3 or key != "beta" or not scale > 0 or not all(parts):
    raise InputError(f"'implicit:{text}' does not say what is scored: a scorer is {SOURCES}")
  return parts[0], parts[1], scale, False


def _reference_of(folder: pathlib.Path) -> tuple[str, float, bool]:
  """(reference, scale, whether per token) of a finished run of `experiments.preference`."""
  settings = workdir.read_json(folder / "config.json")
  lineage = workdir.read_json(folder / "lineage.json")
  references = [p["path"] for p in lineage["parents"] if p["role"] == "ref"]
  if not isinstance(settings.get("objective"), dict) or not references:
    raise InputError(
      f"{folder} is no preference run with a reference: write 'implicit:<policy>,<reference>,beta=0.1'"
    )
  place = f"{folder}/config.json: objective"
  objective = config_lib.build(preferences.PreferenceConfig, settings["objective"], place)
  if objective.sync_every:
    raise InputError(f"{folder} moved its reference while it trained, and did not keep it")
  path = references[0]
  if path == settings["model"]["init"]:
    path = workspace.read_description(folder).base  # wherever the run was started
  return path, objective.reward_scale, "policy_chosen_mean_logps" in objective.lead.arrays


def _check_positions(source: str, model: models.Transformer, length: int) -> None:
  if length > model.config.max_length:
    raise InputError(
      f"{source} has {model.config.max_length} positions: rows of {length} tokens do not fit"
    )


def _key(prompt: Sequence[data.Message], response: str):
  return tuple((message["role"], message["content"]) for message in prompt), response


def _rows(encoded: Sequence[data.Encoded], width: int, pad: int) -> dict[str, np.ndarray]:
  tokens = np.full((len(encoded), width), pad, np.int32)
  segment_ids, mask = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
  for row, e in enumerate(encoded):
    tokens[row, : len(e.tokens)] = e.tokens
    segment_ids[row, : len(e.tokens)] = 1
    mask[row, : len(e.tokens)] = e.response_mask
  return {"tokens": tokens, "segment_ids": segment_ids, "response_mask": mask}


@functools.partial(jax.jit, static_argnames="model")
def _rewards(model, variables, heads, rows: Rows) -> jax.Array:
  """[B, H] of H heads on one trunk."""
  return objectives.response_scores(model, variables, heads, **rows)


@functools.partial(jax.jit, static_argnames="model")
def _logprobs(model, variables, rows: Rows) -> jax.Array:
  """[B, T-1]; they are summed on the host in float64, where thousands of them lose no digits."""
  return models.token_logprobs(
    model, variables, rows["tokens"], segment_ids=rows["segment_ids"], chunk_size=_CHUNK
  )
