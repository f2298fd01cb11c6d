"""Rows of reward-model benchmarks in their own formats, and what is said of rows that are not."""

import json

import pytest

from align_jax.data import benchmarks
from align_jax.errors import InputError

ASK = ({"role": "user", "content": "2 + 2?"},)
GOOD = {
  "rewardbench": {
    "prompt": "2 + 2?", "chosen": "4", "rejected": "5", "subset": "math-prm", "id": 7,
    "chosen_model": "human",
  },
  "rewardbench2": {
    "id": "12", "prompt": "2 + 2?", "chosen": ["4"], "rejected": ["5", "6", "7"], "num_correct": 1,
    "subset": "Math",
  },
  "rm_bench": {
    "id": 3, "prompt": "2 + 2?", "chosen": ["4", "It is 4", "**4**"], "rejected": ["5", "6", "7"],
    "domain": "safety-refuse",
  },
  "rmb": {
    "id": "9", "category": "Helpfulness/Open QA/Factual", "chosen": "4", "rejected": "5",
    "conversation": [{"role": "user", "content": "2 + 2?"}],
  },
  "judgebench": {
    "pair_id": "x", "source": "mmlu-pro-math", "question": "2 + 2?", "response_A": "5",
    "response_B": "4", "label": "B>A",
  },
  "llmbar": {
    "subset": "LLMBar/Adversarial/GPTOut", "i": 0, "input": "2 + 2?", "output_1": "5",
    "output_2": "4", "label": 2,
  },
}  # fmt: skip


def read(tmp_path, name, *rows):
  file = tmp_path / f"{name}.jsonl"
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return benchmarks.read(name, str(file))


def test_every_format_has_a_good_row():
  assert set(GOOD) == set(benchmarks.FORMATS)


@pytest.mark.parametrize(
  "name, section, subset, wrong",
  [
    ("rewardbench", "Reasoning", "math-prm", ("5",)),
    ("rewardbench2", "Math", "Math", ("5", "6", "7")),
    ("rm_bench", "safety", "safety-refuse", ("5", "6", "7")),
    ("rmb", "Helpfulness, pairs", "Open QA/Factual", ("5",)),
    ("judgebench", "knowledge", "mmlu-pro-math", ("5",)),
    ("llmbar", "Adversarial", "GPTOut", ("5",)),
  ],
)
def test_a_row_is_a_prompt_with_right_and_wrong_answers(tmp_path, name, section, subset, wrong):
  (item,) = read(tmp_path, name, GOOD[name])
  assert item.prompt == ASK and item.chosen[0] == "4" and item.rejected == wrong
  assert (item.section, item.subset) == (section, subset)
  assert item.source.endswith(f"{name}.jsonl:1")


@pytest.mark.parametrize(
  "name, changes, field, message",
  [
    ("rewardbench", {"subset": "math"}, "subset", "must be one of alpacaeval-easy"),
    ("rewardbench", {"chosen": ["4"]}, "chosen", "must be a string"),
    ("rewardbench", {"prompt": " "}, "prompt", "is empty"),
    ("rewardbench", {"prompt": None}, "prompt", "is missing"),
    ("rewardbench2", {"subset": "Maths"}, "subset", "must be one of Factuality"),
    ("rewardbench2", {"chosen": ["4", "four"]}, "num_correct", "is not the number of answers"),
    ("rewardbench2", {"chosen": ["4", "four"], "num_correct": 2}, "chosen", "one answer outside"),
    ("rewardbench2", {"subset": "Ties"}, "id", "must be 'ref:<number>' or 'tied:<number>'"),
    ("rewardbench2", {"rejected": []}, "rejected", "one or more answers, not 0"),
    ("rm_bench", {"chosen": ["4", "four"]}, "chosen", "must be a list of 3 answers, not 2"),
    ("rm_bench", {"domain": "cooking"}, "domain", "must be one of chat"),
    ("rm_bench", {"rejected": ["5", 6, "7"]}, r"rejected\[1\]", "must be a string"),
    ("rmb", {"category": "Honesty/S1"}, "category", "must be Helpfulness/<scenario>"),
    ("rmb", {"category": "Helpfulness"}, "category", "must be Helpfulness/<scenario>"),
    ("rmb", {"best": {"answer": "4"}}, "losers", "is missing"),
    ("rmb", {"best": {"answer": "4"}, "losers": []}, "losers", "a list of one answer or more"),
    ("rmb", {"best": {"text": "4"}, "losers": ["5"]}, "best.answer", "is missing"),
    ("rmb", {"conversation": [{"role": "user"}]}, r"conversation\[0\].content", "is missing"),
    (
      "rmb",
      {"conversation": [{"role": "assistant", "content": "4"}]},
      "conversation",
      "must not end with an assistant turn",
    ),
    ("judgebench", {"label": "A=B"}, "label", "must be one of A>B, B>A, not 'A=B'"),
    ("judgebench", {"source": "gsm8k"}, "source", "must begin with one of mmlu-pro"),
    ("llmbar", {"label": 0}, "label", "must be one of 1, 2, not 0"),
    ("llmbar", {"label": True}, "label", "must be one of 1, 2, not True"),
    ("llmbar", {"subset": "LLMBar/Adversarial/Hard"}, "subset", "must end with one of Neighbor"),
  ],
)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path, name, changes, field, message):
  with pytest.raises(InputError, match=rf"{name}.jsonl:2: field '{field}' .*{message}"):
    read(tmp_path, name, GOOD[name], GOOD[name] | changes)


def test_the_authors_own_names_of_rmb_are_read(tmp_path):
  talk = [
    {"role": "user", "content": "hello", "language": "English"},
    {"role": "assistant", "content": "hi", "language": "English"},
    {"role": "user", "content": "2 + 2?", "language": "English"},
  ]
  pair = {
    "pair_uid": "1", "conversation_input": talk, "chosen": {"llm_name": "a", "answer": "4"},
    "reject": {"llm_name": "b", "answer": "5"}, "category_path": "Pairwise_set/Harmlessness/S1",
  }  # fmt: skip
  best = {
    "bon_uid": "2", "conversation_input": talk, "bon_best": {"llm_name": "a", "answer": "4"},
    "loser_list": [{"answer": "5"}, {"answer": "6"}], "category_path": "BoN_set/Harmlessness/S1",
  }  # fmt: skip
  first, second = read(tmp_path, "rmb", pair, best)
  assert first.prompt == tuple({"role": m["role"], "content": m["content"]} for m in talk)
  assert (first.chosen, first.rejected, first.id) == (("4",), ("5",), "1")
  assert (second.chosen, second.rejected, second.id) == (("4",), ("5", "6"), "2")
  assert [i.section for i in (first, second)] == ["Harmlessness, pairs", "Harmlessness, best of n"]
  assert first.unit == second.unit and first.key != second.key


def test_labels_put_the_right_answer_first(tmp_path):
  first = GOOD["judgebench"] | {"label": "A>B"}
  assert read(tmp_path, "judgebench", first)[0].chosen == ("5",)
  first = GOOD["llmbar"] | {"label": 1, "subset": "LLMBar/Natural"}
  (item,) = read(tmp_path, "llmbar", first)
  assert (item.chosen, item.section, item.subset) == (("5",), "Natural", "Natural")


def test_files_may_be_several_and_are_told_apart_by_their_hash(tmp_path):
  (item,) = read(tmp_path, "llmbar", GOOD["llmbar"])
  other = tmp_path / "other.jsonl"
  other.write_text(json.dumps(GOOD["llmbar"] | {"input": "1 + 1?"}) + "\n")
  path = f"{tmp_path / 'llmbar.jsonl'}, {other}"
  items = benchmarks.read("llmbar", path)
  assert items[0] == item and items[1].prompt[0]["content"] == "1 + 1?"
  found = benchmarks.fingerprints(items)
  assert list(found) == [str(tmp_path / "llmbar.jsonl"), str(other)]
  # Of the empty text it is known; these two differ.
  assert len(set(found.values())) == 2 and all(len(digest) == 64 for digest in found.values())
  with pytest.raises(InputError, match="no benchmark 'mmlu' is known; known are rewardbench"):
    benchmarks.read("mmlu", path)


def test_rewardbench_makes_maths_weigh_as_much_as_code():
  weights = benchmarks.REWARDBENCH["Reasoning"]
  assert weights["math-prm"] == sum(w for name, w in weights.items() if name != "math-prm") == 984
  core = [name for part in benchmarks.REWARDBENCH.values() for name in part]
  assert len(core) == len(set(core)) == 27
  published = sum(
    w for section, part in benchmarks.REWARDBENCH.items() for w in part.values()
    if section != "Prior Sets"
  )  # fmt: skip
  assert published - 984 + 447 == 2985  # examples of the published set
