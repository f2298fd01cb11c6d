"""PPO-ptx: pretraining rows that travel with the responses (Ouyang et al. 2022, appendix C.4)."""

import dataclasses
from typing import Any

import numpy as np

from align_jax import data
from align_jax.data import streams
from align_jax.errors import InputError
from align_jax.phases import records


@dataclasses.dataclass(frozen=True)
class PtxSection:
  """Demonstrations, or plain text, whose likelihood is kept up; `policy_gradient.ptx_coef` weighs it."""

  train: str  # as data.train of SFT
  length: int  # tokens a packed row
  rows_per_response: int = 1  # InstructGPT 8
  columns: str | None = None
  limit: int | None = None
  chat: bool = True

  def __post_init__(self):
    if self.rows_per_response < 1:
      raise InputError(f"ptx.rows_per_response must be positive, not {self.rows_per_response}")


def join(batches, section: PtxSection | None, tokenizer: Any, responses: int, seed: int):
  """The prompt batches, each with pretraining rows for its `responses` responses if asked for."""
  if section is None:
    return batches
  demonstrations = records.read(
    section.train, "demonstrations", columns=section.columns, limit=section.limit, chat=section.chat
  )
  rows = data.sft_batches(
    demonstrations,
    tokenizer,
    length=section.length,
    batch_size=responses * section.rows_per_response,
    seed=seed,
  )
  return streams.Zipped(prompts=batches, ptx=rows)


def split(batch: dict[str, Any], section: PtxSection | None) -> dict[str, np.ndarray]:
  """One flat batch of what `join` gives: pretraining rows [responses, rows_per_response, T]."""
  if section is None:
    return batch
  times = section.rows_per_response
  rows = {f"ptx_{k}": x.reshape(-1, times, *x.shape[1:]) for k, x in batch["ptx"].items()}
  return batch["prompts"] | rows
