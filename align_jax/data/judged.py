"""Records that reward models learn from besides pairs: ranked lists, and answers with ratings.

  Ranking  {"prompt", "responses": [...]} the best first, or in any order with {"ranks": [...]}, where
           1 is the best and equal ranks are ties
  Rating   {"prompt", "completion", "ratings": {aspect: number}}; an aspect may be missing

with optional `weight`; prompts as in `records`.
"""

import dataclasses

from align_jax.data import records, sources
from align_jax.data.records import Preference
from align_jax.data.rows import Row
from align_jax.data.transcripts import Message


@dataclasses.dataclass(frozen=True)
class Ranking:
  """K ≥ 2 answers to one prompt and their ranks, 1 for the best."""

  prompt: tuple[Message, ...]
  responses: tuple[str, ...]
  ranks: tuple[int, ...]
  weight: float = 1.0
  source: str = ""


@dataclasses.dataclass(frozen=True)
class Rating:
  """One answer with a number for each aspect that was rated."""

  prompt: tuple[Message, ...]
  completion: str
  ratings: dict[str, float]
  weight: float = 1.0
  source: str = ""


def read_rankings(
  path: str, *, columns: sources.Columns = None, chat: bool = True, invalid: str = "raise"
) -> list[Ranking]:
  """Reads ranked lists; see `records.read_preferences` for the arguments."""
  return sources.read(path, parse_ranking, columns=columns, chat=chat, invalid=invalid)


def read_ratings(
  path: str, *, columns: sources.Columns = None, chat: bool = True, invalid: str = "raise"
) -> list[Rating]:
  """Reads rated answers; see `records.read_preferences` for the arguments."""
  return sources.read(path, parse_rating, columns=columns, chat=chat, invalid=invalid)


def parse_ranking(row: Row, chat: bool = True) -> Ranking:
  row.allow("prompt", "responses", "ranks", "weight")
  prompt = records.parse_prompt_field(row, chat)
  responses = row.texts("responses")
  if len(responses) < 2:
    raise row.error("responses", f"must hold two answers or more, not {len(responses)}")
  ranks = row.fields.get("ranks")
  ranks = tuple(range(1, len(responses) + 1)) if ranks is None else _ranks(row, len(responses))
  if len(set(ranks)) == 1:
    raise row.error("ranks", "are all the same: there is nothing to learn from")
  return Ranking(prompt, responses, ranks, row.number("weight", 1.0, low=0.0), row.source)


def _ranks(row: Row, count: int) -> tuple[int, ...]:
  ranks = row.fields["ranks"]
  whole = isinstance(ranks, list | tuple) and all(
    isinstance(rank, int) and not isinstance(rank, bool) and rank > 0 for rank in ranks
  )
  if not whole or len(ranks) != count:
    raise row.error("ranks", f"must be {count} whole numbers from 1, one an answer, not {ranks!r}")
  return tuple(ranks)


def parse_rating(row: Row, chat: bool = True) -> Rating:
  row.allow("prompt", "completion", "ratings", "weight")
  prompt = records.parse_prompt_field(row, chat)
  ratings = row.numbers("ratings")
  if not ratings:
    raise row.error("ratings", "must be an object with one rating or more")
  return Rating(
    prompt, row.text("completion"), ratings, row.number("weight", 1.0, low=0.0), row.source
  )


def pairs_of(ranking: Ranking) -> list[Preference]:
  """Every two answers of different rank as a pair of their own: what an audit looks at."""
  order = sorted(zip(ranking.ranks, ranking.responses), key=lambda ranked: ranked[0])
  return [
    Preference(ranking.prompt, better, worse, weight=ranking.weight, source=ranking.source)
    for i, (rank, better) in enumerate(order)
    for other, worse in order[i + 1 :]
    if rank < other
  ]
