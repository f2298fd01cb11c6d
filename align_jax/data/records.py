"""The four kinds of record, and how a row of a file becomes one.

A record is checked once, here, and carries where it came from (`source`, "file.jsonl:12"); nothing
after this room looks at raw rows. Formats (those TRL's users already have):

  Demonstration  {"messages"} | {"prompt", "completion"} | {"text"}
  Preference     {"prompt", "chosen", "rejected"} | {"chosen", "rejected"} (the prompt is implicit)
                 with {"labels": {labeller: 1 for chosen, 0 for rejected, 0.5 for a tie}} if several judged
  Feedback       {"prompt", "completion", "label"} | {"messages", "label"}
  Prompt         {"prompt"} | {"messages"}; every other column goes to `meta`

with optional `weight`, and for preferences `margin` and `label_prob`. A prompt is a string or a
list of messages. A string becomes one user message, or, if it is a "\\n\\nHuman: …
\\n\\nAssistant:" transcript, its turns; with `chat=False` it is literal text (role "text"), to
which no template is applied.
"""

import dataclasses
import gzip
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from align_jax.data import sources, transcripts
from align_jax.data.rows import Row
from align_jax.data.transcripts import Message


@dataclasses.dataclass(frozen=True)
class Demonstration:
  """A conversation whose assistant turns are to be imitated."""

  messages: tuple[Message, ...]
  weight: float = 1.0
  source: str = ""


@dataclasses.dataclass(frozen=True)
class Preference:
  """Two answers to one prompt; `label_prob` is the probability that `chosen` is the better.

  With several labellers `labels` holds each one's vote, and `label_prob` is by default their mean.
  """

  prompt: tuple[Message, ...]
  chosen: str
  rejected: str
  margin: float = 0.0
  weight: float = 1.0
  label_prob: float = 1.0
  labels: dict[str, float] = dataclasses.field(default_factory=dict)
  source: str = ""


@dataclasses.dataclass(frozen=True)
class Feedback:
  """One answer with a thumb up (`label` true) or down."""

  prompt: tuple[Message, ...]
  completion: str
  label: bool
  weight: float = 1.0
  source: str = ""


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt to be answered; `meta` carries what a judge needs."""

  prompt: tuple[Message, ...]
  meta: dict[str, Any] = dataclasses.field(default_factory=dict)
  source: str = ""


Record = Demonstration | Preference | Feedback | Prompt


def read_demonstrations(
  path: str, *, columns: sources.Columns = None, chat: bool = True, invalid: str = "raise"
) -> list[Demonstration]:
  """Reads demonstrations; see `read_preferences` for the arguments."""
  return sources.read(path, parse_demonstration, columns=columns, chat=chat, invalid=invalid)


def read_preferences(
  path: str, *, columns: sources.Columns = None, chat: bool = True, invalid: str = "raise"
) -> list[Preference]:
  """Reads preferences from a file (.jsonl, .jsonl.gz, .parquet), a folder, or "hf:org/name:split".

  columns: where our fields are in foreign rows, {"prompt": ("instruction", "input")}; texts of
    several
    columns are joined by a newline, empty ones left out. Or the name of a map in
    `sources.COLUMN_MAPS`.
  chat: a string prompt is a user message (or a transcript); False: it is literal text.
  invalid: "raise" an InputError at the first bad row, or "skip" bad rows with a logged count.
  """
  return sources.read(path, parse_preference, columns=columns, chat=chat, invalid=invalid)


def read_feedback(
  path: str, *, columns: sources.Columns = None, chat: bool = True, invalid: str = "raise"
) -> list[Feedback]:
  """Reads thumbs up and down; see `read_preferences` for the arguments."""
  return sources.read(path, parse_feedback, columns=columns, chat=chat, invalid=invalid)


def read_prompts(
  path: str, *, columns: sources.Columns = None, chat: bool = True, invalid: str = "raise"
) -> list[Prompt]:
  """Reads prompts; see `read_preferences` for the arguments.

  `columns` may also name what a judge needs, {"prompt": "question", "answer": "solution"}: it is then
  in every record's `meta`, and a row without it is an error.
  """
  return sources.read(path, parse_prompt, columns=columns, chat=chat, invalid=invalid, carries=True)


def parse_demonstration(row: Row, chat: bool = True) -> Demonstration:
  row.allow("messages", "prompt", "completion", "text", "weight")
  if row.has("text"):
    messages = _literal("") + _answer(row.text("text"))
  elif row.has("messages"):
    messages = row.messages("messages")
    if messages[-1]["role"] != "assistant":
      raise row.error("messages", "must end with an assistant turn")
  else:
    prompt = parse_prompt_field(row, chat)
    messages = prompt + _answer(_response(row, "completion", prompt))
  return Demonstration(messages, _weight(row), row.source)


def parse_preference(row: Row, chat: bool = True) -> Preference:
  # A column "label" is none of ours, and common in public files: no slip for "labels".
  row.allow("prompt", "chosen", "rejected", "margin", "weight", "label_prob", "labels", "label")
  if row.has("prompt"):
    prompt = parse_prompt_field(row, chat)
    chosen, rejected = _responses(row, prompt)
  else:
    prompt, chosen, rejected = transcripts.split_pair(row, chat)
  labels = row.numbers("labels", low=0.0, high=1.0)
  mean = sum(labels.values()) / len(labels) if labels else 1.0
  return Preference(
    prompt,
    chosen,
    rejected,
    margin=row.number("margin", 0.0),
    weight=_weight(row),
    label_prob=row.number("label_prob", mean, low=0.0, high=1.0),
    labels=labels,
    source=row.source,
  )


def parse_feedback(row: Row, chat: bool = True) -> Feedback:
  row.allow("prompt", "completion", "messages", "label", "weight")
  if row.has("messages"):
    messages = row.messages("messages")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
      raise row.error("messages", "must be a prompt that ends with an assistant turn")
    prompt, completion = messages[:-1], messages[-1]["content"]
  else:
    prompt = parse_prompt_field(row, chat)
    completion = _response(row, "completion", prompt)
  return Feedback(prompt, completion, row.boolean("label"), _weight(row), row.source)


def parse_prompt(row: Row, chat: bool = True) -> Prompt:
  if row.has("messages") and not row.has("prompt"):
    messages = row.messages("messages")
    prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not prompt:
      raise row.error("messages", "has no turn before the assistant's")
  elif row.has("prompt"):
    prompt = parse_prompt_field(row, chat)
  else:
    prompt = transcripts.split_pair(row, chat)[0]
  meta = row.mapping("meta")
  others = {k: v for k, v in row.fields.items() if k not in ("prompt", "messages", "meta")}
  return Prompt(prompt, {**others, **meta}, row.source)


def parse_prompt_field(row: Row, chat: bool) -> tuple[Message, ...]:
  """The prompt as messages: a list of them, literal text, a transcript, or one user message."""
  if not isinstance(row.fields.get("prompt"), str):
    messages = row.messages("prompt")
    if messages[-1]["role"] == "assistant":
      raise row.error("prompt", "must not end with an assistant turn")
    return messages
  text = row.text("prompt")
  if not chat:
    return _literal(text)
  if not text.strip():
    raise row.error("prompt", "is empty")
  if transcripts.is_transcript(text):
    return transcripts.parse_prompt(row, text)
  return ({"role": "user", "content": text},)


def to_row(record: Record) -> dict[str, Any]:
  """The record as the JSON object that reads back as it; `source` is left out, and absent labels."""
  row = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
  del row["source"]
  if not row.get("labels", True):
    del row["labels"]
  for name in ("messages", "prompt"):
    if name in row:
      row[name] = [dict(message) for message in row[name]]
  return row


def write(path: str, records: Sequence[Record]) -> None:
  """Writes records as JSON Lines that the readers above read back."""
  with (gzip.open if str(path).endswith(".gz") else open)(path, "wt", encoding="utf-8") as file:
    for record in records:
      file.write(json.dumps(to_row(record), ensure_ascii=False, default=str) + "\n")


def fingerprint(records: Sequence[Record]) -> str:
  """SHA-256 of what the records say, in order; where they came from does not enter."""
  digest = hashlib.sha256()
  for record in records:
    row = [type(record).__name__, to_row(record)]
    text = json.dumps(row, sort_keys=True, ensure_ascii=True, default=str)  # Parquet has dates too
    digest.update(text.encode() + b"\n")
  return digest.hexdigest()


def _literal(text: str) -> tuple[Message, ...]:
  return ({"role": "text", "content": text},)


def _answer(text: str) -> tuple[Message, ...]:
  return ({"role": "assistant", "content": text},)


def _weight(row: Row) -> float:
  return row.number("weight", 1.0, low=0.0)


def _response(row: Row, name: str, prompt: tuple[Message, ...]) -> str:
  """The answer as text; a message list must be the prompt (or nothing) and one assistant turn."""
  if isinstance(row.fields.get(name), str):
    return row.text(name)
  messages = row.messages(name)
  if messages[: len(prompt)] == prompt:
    messages = messages[len(prompt) :]
  if len(messages) != 1 or messages[0]["role"] != "assistant":
    raise row.error(name, "must be one assistant turn")
  return messages[0]["content"]


def _responses(row: Row, prompt: tuple[Message, ...]) -> tuple[str, str]:
  """Both answers; a transcript prompt that both repeat is taken off."""
  chosen, rejected = _response(row, "chosen", prompt), _response(row, "rejected", prompt)
  text = row.fields["prompt"]
  if isinstance(text, str) and transcripts.is_transcript(text):
    if chosen.startswith(text) and rejected.startswith(text):
      chosen, rejected = chosen[len(text) :].strip(), rejected[len(text) :].strip()
  return chosen, rejected
