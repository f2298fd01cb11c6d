"""Prompts as arrays of few different shapes, so that few programs serve them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from align_jax.errors import InputError

PROMPT_BUCKET = 16  # prompt lengths are rounded up to a multiple of this
ROW_BUCKET = 8  # and numbers of rows to a multiple of this, or to a power of two below it


@dataclasses.dataclass(frozen=True)
class Prompts:
  """P right-padded prompts, what names their random numbers, and how much each may draw."""

  tokens: np.ndarray  # [P, W] int32
  lengths: np.ndarray  # [P] int32; 0: no prompt
  ids: np.ndarray  # [P] uint32
  budgets: np.ndarray  # [P] int32, the most tokens of one response

  def __len__(self) -> int:
    return len(self.lengths)

  def part(self, start: int, count: int) -> "Prompts":
    """Prompts start ... start + count - 1; those past the end are empty."""
    missing = max(start + count - len(self), 0)
    arrays = (getattr(self, f.name)[start : start + count] for f in dataclasses.fields(self))
    return Prompts(*(np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for x in arrays))


def make_prompts(prompts, lengths, prompt_ids, max_new_tokens, pad_id: int) -> Prompts:
  """Checked `Prompts`; the arguments are those of `generate`."""
  tokens, lengths = pad_prompts(prompts, lengths, pad_id)
  ids = np.arange(len(tokens)) if prompt_ids is None else np.asarray(prompt_ids)
  if ids.shape != lengths.shape:
    raise InputError(f"there are {len(tokens)} prompts and {ids.size} prompt_ids")
  budgets = np.asarray(max_new_tokens)
  if budgets.dtype.kind not in "iu" or budgets.shape not in ((), lengths.shape):
    raise InputError(f"max_new_tokens must be one integer or one a prompt, got {max_new_tokens}")
  if budgets.min() < 1:
    raise InputError(f"max_new_tokens must be at least 1, got {budgets.min()}")
  budgets = np.broadcast_to(budgets, lengths.shape).astype(np.int32)
  return Prompts(tokens, lengths, ids.astype(np.uint32), budgets)


def pad_prompts(
  prompts: Sequence[np.ndarray] | np.ndarray, lengths: np.ndarray | None, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
  """Right-padded (tokens [P, W] int32, lengths [P] int32), W a multiple of `PROMPT_BUCKET`."""
  if lengths is None:
    lengths = np.array([len(p) for p in prompts], np.int32)
  lengths = np.asarray(lengths, np.int32)
  if len(prompts) != len(lengths):
    raise InputError(f"there are {len(prompts)} prompts and {len(lengths)} lengths")
  if not len(lengths):
    raise InputError("there are no prompts to generate from")
  if lengths.min() < 1:
    raise InputError(f"prompt {int(np.argmin(lengths))} is empty: there is nothing to continue")
  # A padded array keeps its own width, so that batches of one stream share one program.
  width = prompts.shape[1] if isinstance(prompts, np.ndarray) else int(lengths.max())
  width = -(-width // PROMPT_BUCKET) * PROMPT_BUCKET
  tokens = np.full((len(prompts), width), pad_id, np.int32)
  for row, prompt, length in zip(tokens, prompts, lengths):
    row[:length] = np.asarray(prompt)[:length]
  return tokens, lengths


def row_bucket(count: int) -> int:
  """`count` rows rounded up so that there are few different numbers, and few programs."""
  if count < ROW_BUCKET:
    return 1 << (count - 1).bit_length()
  return -(-count // ROW_BUCKET) * ROW_BUCKET
