"""Records to token arrays that fit a length.

Policy for what is too long: the prompt is cut from the left, down to half the length (BOS stays);
then the response is cut from the right, losing its turn end, so that stopping there is not taught.
With overlong="drop" the record is left out instead. Both are counted.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from align_jax.data import chat
from align_jax.data.chat import Encoded
from align_jax.data.records import Demonstration, Feedback, Preference, Prompt
from align_jax.errors import InputError

OVERLONG = ("truncate", "drop")


class EncodedPair(NamedTuple):
  """Two encoded sequences over one and the same prompt."""

  chosen: Encoded
  rejected: Encoded


def encode_demonstration(
  record: Demonstration, tokenizer: Any, max_length: int, overlong: str = "truncate"
) -> Encoded | None:
  """Tokens and response mask [T ≤ max_length]; None if the record was dropped as too long."""
  encoded = chat.encode_messages(record.messages, tokenizer, record.source)
  return _fit((encoded,), tokenizer, max_length, overlong, record.source)[0]


def encode_preference(
  record: Preference, tokenizer: Any, max_length: int, overlong: str = "truncate"
) -> EncodedPair | None:
  """Both answers after the same prompt tokens; None if the record was dropped as too long."""
  texts = (record.chosen, record.rejected)
  fitted = encode_responses(record.prompt, texts, tokenizer, max_length, overlong, record.source)
  return None if fitted is None else EncodedPair(*fitted)


def encode_responses(
  prompt: tuple[dict[str, str], ...],
  responses: Sequence[str],
  tokenizer: Any,
  max_length: int,
  overlong: str = "truncate",
  source: str = "",
) -> tuple[Encoded, ...] | None:
  """All answers after the same prompt tokens; None if they were dropped as too long."""
  answers = tuple(_answered(prompt, text, tokenizer, source) for text in responses)
  fitted = _fit(answers, tokenizer, max_length, overlong, source)
  return None if fitted[0] is None else fitted


def encode_feedback(
  record: Feedback, tokenizer: Any, max_length: int, overlong: str = "truncate"
) -> Encoded | None:
  """Tokens and response mask of one judged answer; None if it was dropped as too long."""
  encoded = _answered(record.prompt, record.completion, tokenizer, record.source)
  return _fit((encoded,), tokenizer, max_length, overlong, record.source)[0]


def encode_prompt(
  record: Prompt, tokenizer: Any, max_length: int, overlong: str = "truncate"
) -> np.ndarray | None:
  """Prompt tokens [P ≤ max_length], cut from the left; None if it was dropped as too long."""
  _check_policy(overlong)
  tokens = chat.encode_prompt_messages(record.prompt, tokenizer, record.source)
  if not len(tokens):
    raise InputError(f"{record.source}: field 'prompt' has no tokens")
  if len(tokens) <= max_length:
    return tokens
  if overlong == "drop":
    return None
  return _cut_left(tokens, max_length, tokenizer)


def encode_response(
  prompt: tuple[dict[str, str], ...], response: str, tokenizer: Any, max_length: int
) -> Encoded:
  """An answer to a prompt, as it is scored by a reward model: the form training saw."""
  encoded = _answered(prompt, response, tokenizer, "response")
  return _fit((encoded,), tokenizer, max_length, "truncate", "response")[0]


def _check_policy(overlong: str) -> None:
  if overlong not in OVERLONG:
    raise InputError(f"overlong must be one of {', '.join(OVERLONG)}, not '{overlong}'")


def _answered(prompt: Any, response: str, tokenizer: Any, source: str) -> Encoded:
  messages = (*prompt, {"role": "assistant", "content": response})
  # Assistant turns inside the prompt are context, not response.
  return chat.encode_messages(messages, tokenizer, source, last_only=True)


def _fit(
  sequences: tuple[Encoded, ...], tokenizer: Any, max_length: int, overlong: str, source: str
) -> tuple[Encoded | None, ...]:
  """Applies the policy to sequences that share their prompt."""
  _check_policy(overlong)
  if not all(s.response_mask.any() for s in sequences):
    raise InputError(f"{source}: the response has no tokens")
  longest = max(len(s.tokens) for s in sequences)
  if longest <= max_length:
    return sequences
  if overlong == "drop":
    return (None,) * len(sequences)
  return tuple(_truncate(s, longest - max_length, max_length, tokenizer) for s in sequences)


def _truncate(sequence: Encoded, excess: int, max_length: int, tokenizer: Any) -> Encoded:
  tokens, mask = sequence
  prompt = int(np.argmax(mask))
  keep = max(min(prompt, max_length // 2), prompt - excess)
  head = _cut_left(tokens[:prompt], keep, tokenizer)
  tail = slice(prompt, prompt + max_length - keep)
  return Encoded(
    np.concatenate([head, tokens[tail]]),
    np.concatenate([np.zeros(keep, bool), mask[tail]]),
  )


def _cut_left(tokens: np.ndarray, keep: int, tokenizer: Any) -> np.ndarray:
  """The last `keep` tokens, with a leading BOS kept; one that opens every turn is no such BOS."""
  if len(tokens) <= keep:
    return tokens
  bos = chat.template_facts(tokenizer, tokenizer.chat_template).bos_id
  once = tokens[0] == tokenizer.bos_token_id and tokens[0] not in tokens[1:]
  lead = int(keep > 0 and (once or tokens[0] == bos))
  return np.concatenate([tokens[:lead], tokens[len(tokens) - keep + lead :]])
