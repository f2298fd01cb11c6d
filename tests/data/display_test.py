"""What `inspect_data` prints."""

from align_jax import data
from align_jax.data import display

PROMPT = ({"role": "user", "content": "a b"},)


def test_a_demonstration_shows_specials_and_marks_the_response(tokenizer):
  record = data.Demonstration((*PROMPT, {"role": "assistant", "content": "c"}), 2.0, "f.jsonl:3")
  assert display.show(record, tokenizer, 64, colour=False) == (
    "── f.jsonl:3 · 9 tokens: 7 prompt, 2 response · weight 2\n"
    "<|im_start|> user a b <|im_end|> <|im_start|> assistant⟦c <|im_end|>⟧\n"
  )
  coloured = display.show(record, tokenizer, 64)
  assert "\x1b[1;32mc <|im_end|>\x1b[0m" in coloured and "⟦" not in coloured


def test_the_other_kinds_say_what_they_are(tokenizer):
  pair = display.show(data.Preference(PROMPT, "c", "d", margin=0.5), tokenizer, 64, colour=False)
  assert "chosen" in pair and "rejected" in pair and "margin 0.5" in pair
  assert "⟦c <|im_end|>⟧" in pair and "⟦d <|im_end|>⟧" in pair
  for label, word in ((True, " desirable"), (False, " undesirable")):
    assert word in display.show(data.Feedback(PROMPT, "c", label), tokenizer, 64, colour=False)
  prompt = display.show(data.Prompt(PROMPT, {"i": 1}), tokenizer, 64, colour=False)
  assert prompt.endswith("<|im_start|> assistant\n") and "meta {'i': 1}" in prompt


def test_line_ends_are_visible(bpe):
  record = data.Demonstration((*PROMPT, {"role": "assistant", "content": "x\ny"}))
  assert "⟦x↵\ny<|im_end|>⟧" in display.show(record, bpe(), 64, colour=False)


def test_summary_counts_tokens(tokenizer):
  records = [data.Preference(PROMPT, "c", "d e"), data.Preference(PROMPT, "", "d e f")]
  text = display.summary(records, tokenizer, 10)
  assert text.splitlines() == [
    "2 records, 4 sequences",
    "  prompt         7 …     7.0 …      7 tokens",
    "  response       1 …     2.5 …      4 tokens",
    "  whole          8 …     9.5 …     11 tokens",
    "  1 of 4 sequences are over 10 tokens",
  ]
