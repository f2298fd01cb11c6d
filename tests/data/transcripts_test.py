"""hh-rlhf: dialogues as one string. [9] Split at the last "Assistant:"; [45] bad rows are named."""

import pytest

from align_jax.data import records, transcripts
from align_jax.data.rows import Row
from align_jax.errors import InputError

DIALOGUE = "\n\nHuman: Is tea hot?\n\nAssistant: Yes.\n\nHuman: And ice?\n\nAssistant:"
PROMPT = (
  {"role": "user", "content": "Is tea hot?"},
  {"role": "assistant", "content": "Yes."},
  {"role": "user", "content": "And ice?"},
)


def pair(chosen, rejected, **options):
  return records.parse_preference(Row("f:1", {"chosen": chosen, "rejected": rejected}), **options)


def test_implicit_prompt_is_split_at_the_last_assistant():
  record = pair(DIALOGUE + " No, it is cold.", DIALOGUE + " Nobody knows.")
  assert record.prompt == PROMPT
  assert (record.chosen, record.rejected) == ("No, it is cold.", "Nobody knows.")


def test_answers_that_begin_alike_are_whole():
  """The longest common prefix reaches into the answers; the cut does not."""
  record = pair(DIALOGUE + " No, it is cold.", DIALOGUE + " No, it is not.")
  assert (record.chosen, record.rejected) == ("No, it is cold.", "No, it is not.")


def test_an_answer_that_is_a_prefix_of_the_other_is_whole():
  record = pair(DIALOGUE + " No", DIALOGUE + " No, cold.")
  assert (record.chosen, record.rejected) == ("No", "No, cold.")
  assert pair(DIALOGUE, DIALOGUE + " No").chosen == ""


def test_an_explicit_transcript_prompt_says_the_same():
  row = Row("f:1", {"prompt": DIALOGUE, "chosen": "a", "rejected": "b"})
  assert records.parse_preference(row).prompt == PROMPT
  row = Row("f:1", {"prompt": DIALOGUE.lstrip(), "chosen": "a", "rejected": "b"})
  assert records.parse_preference(row).prompt == PROMPT


def test_the_word_assistant_inside_a_turn_is_not_a_turn():
  text = "\n\nHuman: Who is the Assistant: you?\nHuman: yes\n\nAssistant:"
  (message,) = transcripts.parse_prompt(Row("f:1", {}), text)
  assert message["content"] == "Who is the Assistant: you?\nHuman: yes"


def test_empty_turns_are_left_out_and_neighbours_joined():
  text = "\n\nHuman: a\n\nAssistant:\n\nHuman: b\n\nAssistant: c\n\nHuman: d\n\nAssistant:"
  assert [m["content"] for m in transcripts.parse_prompt(Row("f:1", {}), text)] == [
    "a\n\nb",
    "c",
    "d",
  ]


def test_literal_transcripts_keep_every_character():
  record = pair(DIALOGUE + " a ", DIALOGUE + " b", chat=False)
  assert record.prompt == ({"role": "text", "content": DIALOGUE},)
  assert (record.chosen, record.rejected) == (" a ", " b")


@pytest.mark.parametrize(
  "chosen, rejected, complaint",
  [
    ("yes", "no", "field 'prompt' is missing, and no .* is shared by both answers"),
    (
      DIALOGUE + " a\n\nHuman: b\n\nAssistant: c",
      DIALOGUE + " d",
      "field 'chosen' differs from its",
    ),
    (
      "\n\nHuman:\n\nAssistant: a",
      "\n\nHuman:\n\nAssistant: b",
      "field 'prompt' must be a transcript",
    ),
    (DIALOGUE, None, "field 'rejected' is missing"),
  ],
)
def test_what_is_no_pair_is_named(chosen, rejected, complaint):
  with pytest.raises(InputError, match="f:1: " + complaint):
    pair(chosen, rejected)


def test_message_lists_must_share_all_but_the_last():
  a, b = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
  with pytest.raises(InputError, match="f:1: field 'chosen' and 'rejected' must share"):
    pair([a, b, a, b], [a, b])
  with pytest.raises(InputError, match="f:1: field 'rejected' must end with an assistant turn"):
    pair([a, b], [a, a])
