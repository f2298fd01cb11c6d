"""Public sets whose rows say in values what ours say in fields: each as a function of a row.

Their names are given where a column map is, `columns="pandalm"`.
"""

from collections.abc import Callable
from typing import Any

from align_jax.data.rows import Row


def pandalm(row: Row) -> Row:
  """Two responses and three annotators: 0 tie, 1 the first is better, 2 the second is."""
  votes = {name: row.choice(name, _SIDES) for name in ("annotator1", "annotator2", "annotator3")}
  prompt = "\n".join(filter(None, (row.text("instruction"), row.text("input"))))
  return _pair(row, prompt, (row.text("response1"), row.text("response2")), votes)


def autoj(row: Row) -> Row:
  """Two responses and one label: 0 the first is better, 1 the second is, 2 tie."""
  first = row.choice("label", {0: 1.0, 1: 0.0, 2: 0.5})
  return _pair(row, row.text("prompt"), (row.text("response 1"), row.text("response 2")), first)


def alpaca_eval(row: Row) -> Row:
  """Two outputs and a judge's preference in [1, 2]: 2 where the second is certainly the better."""
  first = 2.0 - row.number("preference", 1.5, low=1.0, high=2.0)
  answers = row.text("output_1"), row.text("output_2")
  return _pair(row, row.text("instruction"), answers, first)


def oasst_rankings(row: Row) -> Row:
  """A prompt, `history` [[question, reply], ...] before it, and `ranked_outputs`, the best first."""
  messages: list[dict[str, str]] = []
  history = row.fields.get("history")
  if history is not None and not isinstance(history, list):
    raise row.error("history", "must be a list of questions and their replies")
  for i, turn in enumerate(history or ()):
    if not isinstance(turn, list) or len(turn) != 2:
      raise row.error(f"history[{i}]", "must be a question and its reply")
    question, reply = turn
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
  prompt = [*messages, {"role": "user", "content": row.text("prompt")}]
  return Row(row.source, {"prompt": prompt, "responses": list(row.texts("ranked_outputs"))})


_SIDES = {0: 0.5, 1: 1.0, 2: 0.0}


def _pair(row: Row, prompt: str, answers: tuple[str, str], first: Any) -> Row:
  """`first`: how far the first answer is preferred, or each labeller's verdict on that."""
  votes = first if isinstance(first, dict) else {}
  share = sum(votes.values()) / len(votes) if votes else first
  if share < 0.5:
    answers, share = answers[::-1], 1.0 - share
    votes = {name: 1.0 - vote for name, vote in votes.items()}
  fields = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1], "label_prob": share}
  return Row(row.source, fields | ({"labels": votes} if votes else {}))


FORMATS: dict[str, Callable[[Row], Row]] = {
  "pandalm": pandalm,
  "autoj": autoj,
  "alpaca_eval": alpaca_eval,
  "oasst_rankings": oasst_rankings,
}
