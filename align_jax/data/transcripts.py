"""Dialogues written as one string, "\\n\\nHuman: …\\n\\nAssistant: …", the form of hh-rlhf."""

import re
from typing import Any

Message = dict[str, str]  # {"role": one of ROLES, "content": text}

# "text" is literal text, to which no chat template is applied.
ROLES = ("system", "user", "assistant", "tool", "text")

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ANSWER = "\n\nAssistant:"
_NAMES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(text: str) -> bool:
  """True of a string that begins with a human turn and ends by asking for the assistant's."""
  return text.startswith(("\n\nHuman:", "Human:")) and text.rstrip().endswith(_ANSWER)


def parse_prompt(row: Any, text: str) -> tuple[Message, ...]:
  """The turns of a prompt transcript: empty turns are left out, neighbours of one role joined."""
  pieces = _TURN.split(text if text.startswith("\n\n") else "\n\n" + text)[1:]
  messages: list[Message] = []
  for name, content in zip(pieces[::2], map(str.strip, pieces[1::2])):
    if not content:
      continue
    if messages and messages[-1]["role"] == _NAMES[name]:
      content = messages.pop()["content"] + "\n\n" + content
    messages.append({"role": _NAMES[name], "content": content})
  if not messages or messages[-1]["role"] != "user":
    raise row.error("prompt", "must be a transcript whose last turn with words is the human's")
  return tuple(messages)


def split_pair(row: Any, chat: bool) -> tuple[tuple[Message, ...], str, str]:
  """(prompt, chosen, rejected) of two dialogues that share their beginning.

  Transcripts are cut at the last "\\n\\nAssistant:" of their longest common prefix, message lists
  before their last message. What follows the cut must be one assistant turn.
  """
  if isinstance(row.fields.get("chosen"), str):
    return _split_texts(row, row.text("chosen"), row.text("rejected"), chat)
  chosen, rejected = row.messages("chosen"), row.messages("rejected")
  if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
    raise row.error("chosen", "and 'rejected' must share all messages but the last")
  for name, messages in (("chosen", chosen), ("rejected", rejected)):
    if messages[-1]["role"] != "assistant":
      raise row.error(name, "must end with an assistant turn")
  return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def _split_texts(
  row: Any, chosen: str, rejected: str, chat: bool
) -> tuple[tuple[Message, ...], str, str]:
  shared = next(
    (i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b),
    min(len(chosen), len(rejected)),
  )
  start = chosen.rfind(_ANSWER, 0, shared)
  if start < 0:
    complaint = "is missing, and no '\\n\\nAssistant:' is shared by both answers"
    raise row.error("prompt", complaint + " (`columns` can rename fields)")
  cut = start + len(_ANSWER)
  for name, text in (("chosen", chosen), ("rejected", rejected)):
    if _TURN.search(text, cut):
      complaint = "differs from its partner before its last assistant turn"
      raise row.error(name, complaint + " (invalid='skip' leaves such rows out)")
  if not chat:
    return ({"role": "text", "content": chosen[:cut]},), chosen[cut:], rejected[cut:]
  prompt = parse_prompt(row, chosen[:cut])
  return prompt, chosen[cut:].strip(), rejected[cut:].strip()
