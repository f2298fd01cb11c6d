"""Conversations to tokens, through the tokenizer's own chat template.

The response mask is found by *position*: the whole conversation is rendered and tokenised once, and
each assistant turn is located in the text, from where the template would ask the model to speak to
the end of the turn's last special token. No token id is ever compared with pad or EOS to make a
mask.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from align_jax.data.transcripts import Message
from align_jax.errors import InputError

_PROBE = "zebra"


class Encoded(NamedTuple):
  """tokens [T] int32; response_mask [T] bool, true on what the assistant says and its turn end."""

  tokens: np.ndarray
  response_mask: np.ndarray


class TemplateFacts(NamedTuple):
  """What a look at a tokenizer tells: the text that ends a turn, special tokens, a leading BOS."""

  turn_end: str
  special: tuple[str, ...]
  bos_id: int | None


def encode_messages(
  messages: Sequence[Message], tokenizer: Any, source: str = "", *, last_only: bool = False
) -> Encoded:
  """Encodes a whole conversation; its assistant turns, or only the last, are the response.

  Exactly one BOS leads if the tokenizer leads with one. The last assistant turn ends with the
  template's turn end, or with EOS where the template writes none; what the template adds after
  that is left out.
  """
  find = _literal_spans if is_literal(messages) else _chat_spans
  turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
  text, spans = find(messages, turns[-1:] if last_only else turns, tokenizer, source)
  facts = template_facts(tokenizer, tokenizer.chat_template)
  cuts = sorted({0, *(cut for span in spans for cut in span)})
  starts = {start for start, _ in spans}
  tokens, response = [], []
  for cut, piece in zip(cuts, _tokenize_between(text[: cuts[-1]], cuts, tokenizer)):
    tokens += piece
    response += [cut in starts] * len(piece)
  tokens, response = _one_bos(tokens, response, facts.bos_id)
  if spans and not text[: cuts[-1]].endswith(facts.special):
    if tokenizer.eos_token_id is None:
      raise InputError(f"{source}: the tokenizer has neither a turn end nor an EOS token")
    tokens, response = tokens + [tokenizer.eos_token_id], response + [True]
  return Encoded(np.array(tokens, np.int32), np.array(response, bool))


def encode_prompt_messages(
  messages: Sequence[Message], tokenizer: Any, source: str = ""
) -> np.ndarray:
  """Tokens [P] up to where the assistant is to speak: the same that lead `encode_messages`."""
  if is_literal(messages):
    text = "".join(message["content"] for message in messages)
  else:
    _check_contents(messages, tokenizer, source)
    text = _render(messages, tokenizer, source, ask=True)
  facts = template_facts(tokenizer, tokenizer.chat_template)
  tokens = _tokenize(text, tokenizer)
  return np.array(_one_bos(tokens, [False] * len(tokens), facts.bos_id)[0], np.int32)


def is_literal(messages: Sequence[Message]) -> bool:
  """True of literal text, which no template touches: its first message has the role "text"."""
  return messages[0]["role"] == "text"


def stop_ids(tokenizer: Any) -> tuple[int, ...]:
  """The ids at which a sampler stops: EOS, and the token that ends a turn in the chat template."""
  ids = {tokenizer.eos_token_id} - {None}
  facts = template_facts(tokenizer, tokenizer.chat_template)
  if facts.turn_end:
    ids.add(_tokenize(facts.turn_end, tokenizer)[-1])
  return tuple(sorted(ids))


@functools.lru_cache(maxsize=16)
def template_facts(tokenizer: Any, chat_template: str | None) -> TemplateFacts:
  """Reads off the template what ends an assistant turn; "" if nothing special does."""
  added = tokenizer.added_tokens_decoder.values()
  special = {t.content for t in added if t.special} | set(tokenizer.all_special_tokens)
  special = tuple(sorted(special, key=len, reverse=True))
  empty = tokenizer("", add_special_tokens=True)["input_ids"]
  bos = tokenizer.bos_token_id
  leads = bos is not None and bos in empty[:1]
  turn_end = ""
  if chat_template is not None:
    turns = ({"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE})
    rest = _render(turns, tokenizer, "chat template").rpartition(_PROBE)[2]
    turn_end = rest[: max((rest.rfind(s) + len(s) for s in special if s in rest), default=0)]
  return TemplateFacts(turn_end, special, bos if leads else None)


def _literal_spans(
  messages: Sequence[Message], turns: Sequence[int], tokenizer: Any, source: str
) -> tuple[str, list[tuple[int, int]]]:
  """The contents one after the other, and the [start, end) characters of the given turns."""
  stops = np.cumsum([len(message["content"]) for message in messages]).tolist()
  text = "".join(message["content"] for message in messages)
  return text, [(stops[i] - len(messages[i]["content"]), stops[i]) for i in turns]


def _chat_spans(
  messages: Sequence[Message], turns: Sequence[int], tokenizer: Any, source: str
) -> tuple[str, list[tuple[int, int]]]:
  """The rendered conversation, and the [start, end) characters of the given turns."""
  _check_contents(messages, tokenizer, source)
  text = _render(messages, tokenizer, source)
  turn_end = template_facts(tokenizer, tokenizer.chat_template).turn_end
  spans = []
  for i in turns:
    before = _render(messages[:i], tokenizer, source, ask=True) if i else _opening(text, messages)
    if not text.startswith(before):
      raise InputError(f"{source}: the chat template rewrites what precedes message {i}")
    spans.append((len(before), _turn_stop(text, len(before), messages[i], turn_end, source)))
  return text, spans


def _opening(text: str, messages: Sequence[Message]) -> str:
  """What precedes the words of a first turn that is the assistant's: nobody asked it to speak."""
  return text[: max(0, text.find(messages[0]["content"].strip()))]


def _turn_stop(text: str, start: int, message: Message, turn_end: str, source: str) -> int:
  """Where the turn that starts at `start` ends; templates may strip its content."""
  content = message["content"]
  for needle in (content + turn_end, content.strip() + turn_end):
    at = text.find(needle, start)
    if at >= 0 and not (turn_end and turn_end in text[start:at]):
      return at + len(needle)
  raise InputError(f"{source}: the chat template rewrites the message {content[:40]!r}")


def _check_contents(messages: Sequence[Message], tokenizer: Any, source: str) -> None:
  special = template_facts(tokenizer, tokenizer.chat_template).special
  for i, message in enumerate(messages):
    found = next((s for s in special if s in message["content"]), None)
    if found is not None:
      raise InputError(f"{source}: message {i} contains the special token '{found}'")
    if message["role"] == "text":
      raise InputError(f"{source}: message {i} is literal text inside a conversation")


def _render(messages: Sequence[Message], tokenizer: Any, source: str, ask: bool = False) -> str:
  if tokenizer.chat_template is None:
    raise InputError(f"{source}: the tokenizer has no chat template; read the data with chat=False")
  try:
    text = tokenizer.apply_chat_template(
      [dict(message) for message in messages], tokenize=False, add_generation_prompt=ask
    )
  except Exception as error:  # a template can go wrong in as many ways as a program
    raise InputError(f"{source}: the chat template refuses this conversation ({error})") from error
  # Newer transformers return a BatchEncoding when asked to tokenise; its length is not the text's.
  assert isinstance(text, str), type(text)
  return text


def _tokenize(text: str, tokenizer: Any) -> list[int]:
  return _tokenize_all([text], tokenizer)[0]


def _tokenize_all(texts: list[str], tokenizer: Any) -> list[list[int]]:
  """The ids of every text, and nothing else where the tokenizer can leave the rest: half of its time."""
  backend = getattr(tokenizer, "backend_tokenizer", None)
  if backend is None or backend.truncation or backend.padding:
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
  else:
    ids = [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
  assert all(isinstance(i, int) for text in ids for i in text[:1]), type(ids)
  return ids


def _tokenize_between(text: str, cuts: Sequence[int], tokenizer: Any) -> list[list[int]]:
  """Tokens of the whole text, divided at the character positions `cuts`, 0 to its end.

  Where a token would straddle a cut the text is tokenised apart there: so the tokens before a
  response are always those a sampler is given, and those after it are what it could have said.
  """
  heads = _tokenize_all([text[:cut] for cut in cuts[1:]], tokenizer)
  pieces, begin, ids, done = [], 0, heads[-1] if heads else [], 0
  for head, previous, cut in zip(heads, cuts, cuts[1:]):
    before = _tokenize(text[begin:cut], tokenizer) if begin else head
    if ids[: len(before)] == before:
      pieces.append(ids[done : len(before)])
      done = len(before)
    else:
      pieces.append(_tokenize(text[previous:cut], tokenizer))
      begin, ids, done = cut, _tokenize(text[cut:], tokenizer), 0
  return pieces


def _one_bos(
  tokens: list[int], response: list[bool], bos_id: int | None
) -> tuple[list[int], list[bool]]:
  """Exactly one leading BOS, if this tokenizer leads with one at all."""
  if bos_id is None:
    return tokens, response
  if tokens[:1] != [bos_id]:
    tokens, response = [bos_id] + tokens, [False] + response
  return tokens, response
