"""Rows to records and back."""

import json

import pytest

from align_jax import data
from align_jax.data import records
from align_jax.data.rows import Row

USER, REPLY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
OTHER = {"role": "assistant", "content": "c"}


def parse(kind, fields, **options):
  return getattr(records, f"parse_{kind}")(Row("f.jsonl:1", fields), **options)


def test_plain_text_and_messages_say_the_same():
  assert (
    parse("demonstration", {"prompt": "a", "completion": "b"})
    == parse("demonstration", {"prompt": [USER], "completion": [REPLY]})
    == parse("demonstration", {"messages": [USER, REPLY]})
    == data.Demonstration((USER, REPLY), 1.0, "f.jsonl:1")
  )
  assert (
    parse("preference", {"prompt": "a", "chosen": "b", "rejected": "c"})
    == parse("preference", {"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER]})
    == parse("preference", {"chosen": [USER, REPLY], "rejected": [USER, OTHER]})
    == data.Preference((USER,), "b", "c", source="f.jsonl:1")
  )
  assert (
    parse("feedback", {"prompt": "a", "completion": "b", "label": False})
    == parse("feedback", {"messages": [USER, REPLY], "label": False})
    == data.Feedback((USER,), "b", False, source="f.jsonl:1")
  )


def test_a_prompt_repeated_in_both_answers_is_taken_off():
  """[9] Message lists and transcripts that hold the prompt again."""
  lists = {"prompt": [USER], "chosen": [USER, REPLY], "rejected": [USER, OTHER]}
  text = "\n\nHuman: a\n\nAssistant:"
  strings = {"prompt": text, "chosen": text + " b", "rejected": text + " c"}
  for fields in (lists, strings):
    assert parse("preference", fields) == data.Preference((USER,), "b", "c", source="f.jsonl:1")


def test_a_plain_answer_may_begin_like_its_prompt():
  record = parse("preference", {"prompt": "a", "chosen": "a b", "rejected": "a c"})
  assert (record.chosen, record.rejected) == ("a b", "a c")


def test_literal_text_is_not_a_conversation():
  literal = {"role": "text", "content": "a"}
  fields = {"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c", "label": True}
  assert parse("preference", fields, chat=False).prompt == (literal,)
  assert parse("demonstration", fields, chat=False).messages == (literal, REPLY)
  assert parse("feedback", fields, chat=False).prompt == (literal,)
  assert parse("prompt", {"prompt": ""}, chat=False).prompt[0]["content"] == ""
  assert parse("demonstration", {"text": "b"}).messages == ({"role": "text", "content": ""}, REPLY)


def test_optional_numbers_are_read():
  fields = {"prompt": "a", "chosen": "b", "rejected": "c"}
  record = parse("preference", {**fields, "margin": 2, "weight": 0.5, "label_prob": 0.7})
  assert (record.margin, record.weight, record.label_prob) == (2.0, 0.5, 0.7)
  record = parse("preference", {**fields, "margin": None, "weight": None})
  assert (record.margin, record.weight, record.label_prob) == (0.0, 1.0, 1.0)


def test_a_prompt_keeps_what_a_judge_needs():
  row = {"prompt": "a", "answer": "4", "meta": {"family": "sums"}}
  assert parse("prompt", row).meta == {"answer": "4", "family": "sums"}
  assert parse("prompt", {"messages": [USER, REPLY]}).prompt == (USER,)
  assert parse("prompt", {"chosen": [USER, REPLY], "rejected": [USER, OTHER]}).prompt == (USER,)


RECORDS = {
  "demonstrations": [
    data.Demonstration((USER, REPLY), 0.5),
    data.Demonstration(({"role": "text", "content": ""}, REPLY)),
  ],
  "preferences": [data.Preference((USER,), "b\n", "ü", 1.5, 2.0, 0.75)],
  "feedback": [data.Feedback((USER, REPLY, USER), "", True, 3.0)],
  "prompts": [data.Prompt((USER,), {"facts": ["x", 1, None], "seed": 3})],
}  # fmt: skip


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_written_records_read_back(kind, suffix, tmp_path):
  path = str(tmp_path / f"file{suffix}")
  data.write(path, RECORDS[kind])
  again = getattr(data, f"read_{kind}")(path)
  assert [record.source for record in again] == [f"{path}:{i + 1}" for i in range(len(again))]
  assert [data.to_row(r) for r in again] == [data.to_row(r) for r in RECORDS[kind]]
  assert data.fingerprint(again) == data.fingerprint(RECORDS[kind])


def test_fingerprint_sees_content_and_order_and_nothing_else():
  a, b = data.Prompt((USER,), source="x:1"), data.Prompt((USER, REPLY, USER), source="x:2")
  moved = data.Prompt((USER,), source="elsewhere:9")
  assert data.fingerprint([a, b]) == data.fingerprint([moved, b])
  different = {
    data.fingerprint(r) for r in ([a, b], [b, a], [a], [data.Prompt((USER,), {"k": 1}), b])
  }
  assert len(different) == 4
  assert data.fingerprint([]) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_rows_are_json():
  for kind in RECORDS.values():
    rows = [data.to_row(record) for record in kind]
    assert json.loads(json.dumps(rows)) == rows
