"""Every wrong field gives one sentence with file, line and field ([45]: before compiling)."""

import pytest

from align_jax.data import records
from align_jax.data.rows import Row
from align_jax.errors import InputError

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
THUMB = {"prompt": "a", "completion": "b", "label": True}
TURN = {"role": "user", "content": "a"}
REPLY = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
  "changes, complaint",
  [
    ({"chosen": None}, r"field 'chosen' is missing \(fields found: 'prompt', 'chosen', 'rejected'"),
    ({"chosen": 3}, "field 'chosen' must be a list of messages, not the number 3"),
    ({"prompt": True}, "field 'prompt' must be a list of messages, not a boolean"),
    ({"prompt": "  "}, "field 'prompt' is empty"),
    ({"prompt": []}, "field 'prompt' is empty"),
    ({"prompt": [REPLY]}, "field 'prompt' must not end with an assistant turn"),
    ({"prompt": ["a"]}, r"field 'prompt\[0\]' must be an object with 'role' and 'content'"),
    ({"prompt": [{"role": "user"}]}, r"field 'prompt\[0\].content' is missing"),
    ({"prompt": [{**TURN, "content": 1}]}, r"field 'prompt\[0\].content' must be a string"),
    ({"prompt": [{**TURN, "role": "human"}]}, r"'prompt\[0\].role' must be one of .*not 'human'"),
    ({"prompt": [{**TURN, "tool_calls": []}]}, r"field 'prompt\[0\].tool_calls' is not supported"),
    ({"chosen": [TURN]}, "field 'chosen' must be one assistant turn"),
    ({"chosen": [REPLY, TURN, REPLY]}, "field 'chosen' must be one assistant turn"),
    ({"weight": float("nan")}, "field 'weight' must be finite, not nan"),
    ({"weight": -1}, "field 'weight' must be at least 0, not -1"),
    ({"weight": "2"}, "field 'weight' must be a number, not a string"),
    ({"margin": True}, "field 'margin' must be a number, not a boolean"),
    ({"margin": float("inf")}, "field 'margin' must be finite, not inf"),
    ({"label_prob": 1.5}, r"field 'label_prob' must be in \[0, 1\], not 1.5"),
    ({"wieght": 2}, "field 'wieght' is not known here; did you mean 'weight'?"),
    ({"label_probs": 1}, "field 'label_probs' is not known here; did you mean 'label_prob'?"),
  ],
)
def test_a_bad_preference_names_its_field(changes, complaint):
  with pytest.raises(InputError, match="^file.jsonl:12: .*" + complaint):
    records.parse_preference(Row("file.jsonl:12", {**PAIR, **changes}))


@pytest.mark.parametrize("label", [1, "true", None, 0.5])
def test_a_label_must_be_a_boolean(label):
  with pytest.raises(InputError, match="file.jsonl:12: field 'label' "):
    records.parse_feedback(Row("file.jsonl:12", {**THUMB, "label": label}))


@pytest.mark.parametrize(
  "fields, complaint",
  [
    ({"messages": []}, "field 'messages' is empty"),
    ({"messages": [REPLY, TURN]}, "field 'messages' must end with an assistant turn"),
    ({"messages": {"role": "user"}}, "field 'messages' must be a list of messages, not an object"),
    ({"prompt": "a"}, "field 'completion' is missing"),
    ({"completion": "a"}, "field 'prompt' is missing"),
    ({"text": 1}, "field 'text' must be a string"),
    ({}, r"field 'prompt' is missing \(fields found: none"),
  ],
)
def test_a_bad_demonstration_names_its_field(fields, complaint):
  with pytest.raises(InputError, match="file.jsonl:12: " + complaint):
    records.parse_demonstration(Row("file.jsonl:12", fields))


@pytest.mark.parametrize(
  "fields, complaint",
  [
    ({"prompt": "a", "meta": [1]}, "field 'meta' must be an object, not a list"),
    ({"messages": [REPLY]}, "field 'messages' has no turn before the assistant's"),
    ({"question": "a"}, "field 'chosen' is missing .*'question'.*`columns` can rename"),
  ],
)
def test_a_bad_prompt_names_its_field(fields, complaint):
  with pytest.raises(InputError, match="file.jsonl:12: " + complaint):
    records.parse_prompt(Row("file.jsonl:12", fields))


def test_columns_that_are_nobodys_misspelling_are_left_alone():
  fields = {**PAIR, "id": 1, "chosen_model": "m", "score_chosen": 3.0, "weights_file": "w"}
  assert records.parse_preference(Row("f:1", fields)).chosen == "b"
