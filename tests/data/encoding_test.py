"""What is too long is cut by the stated policy; pairs keep one prompt."""

import numpy as np
import pytest

from align_jax import data
from align_jax.errors import InputError

LONG = " ".join("abcdefghijklmnopqrst")  # 20 tokens


def user(text):
  return ({"role": "user", "content": text},)


def text_of(tokenizer, encoded):
  return tokenizer.convert_ids_to_tokens(encoded.tokens)


def test_what_fits_is_whole(tokenizer):
  record = data.Preference(user("a b"), "c", "d e")
  pair = data.encode_preference(record, tokenizer, 32)
  prompt = data.encode_prompt(data.Prompt(record.prompt), tokenizer, 32).tolist()
  for encoded, answer in zip(pair, ("c", "d e")):
    assert encoded.tokens.tolist()[: len(prompt)] == prompt
    assert tokenizer.decode(encoded.tokens[encoded.response_mask]) == answer + " <|im_end|>"


def test_the_prompt_is_cut_from_the_left_and_alike_for_both_answers(tokenizer):
  pair = data.encode_preference(data.Preference(user(LONG), "a", "a b c"), tokenizer, 20)
  heads = [encoded.tokens[~encoded.response_mask].tolist() for encoded in pair]
  assert heads[0] == heads[1]
  assert len(pair.rejected.tokens) == 20
  assert text_of(tokenizer, pair.rejected) == "f g h i j k l m n o p q r s t".split()[-13:] + (
    "<|im_end|> <|im_start|> assistant a b c <|im_end|>".split()
  )
  assert tokenizer.decode(pair.chosen.tokens[pair.chosen.response_mask]) == "a <|im_end|>"


def test_the_response_is_cut_from_the_right_and_does_not_learn_to_stop_there(tokenizer):
  encoded = data.encode_demonstration(
    data.Demonstration((*user("a"), {"role": "assistant", "content": LONG})), tokenizer, 16
  )
  assert (
    text_of(tokenizer, encoded)[:6]
    == "<|im_start|> user a <|im_end|> <|im_start|> assistant".split()
  )
  assert len(encoded.tokens) == 16 and encoded.response_mask[6:].all()
  assert "<|im_end|>" not in text_of(tokenizer, encoded)[6:]


def test_both_too_long_share_the_length(tokenizer):
  encoded = data.encode_feedback(data.Feedback(user(LONG), LONG, True), tokenizer, 16)
  assert encoded.response_mask.tolist() == [False] * 8 + [True] * 8
  assert text_of(tokenizer, encoded)[5:10] == ["<|im_end|>", "<|im_start|>", "assistant", "a", "b"]


def test_bos_survives_a_cut(words):
  tokenizer = words(leads=True)
  encoded = data.encode_feedback(data.Feedback(user(LONG), "a", True), tokenizer, 16)
  assert encoded.tokens[0] == tokenizer.bos_token_id and len(encoded.tokens) == 16
  prompt = data.encode_prompt(data.Prompt(user(LONG)), tokenizer, 8)
  assert prompt[0] == tokenizer.bos_token_id and len(prompt) == 8
  assert tokenizer.convert_ids_to_tokens(prompt[-2:]) == ["<|im_start|>", "assistant"]


def test_dropping_is_dropping(tokenizer):
  kinds = (
    (
      data.encode_demonstration,
      data.Demonstration((*user(LONG), {"role": "assistant", "content": "a"})),
    ),
    (data.encode_preference, data.Preference(user("a"), "b", LONG)),
    (data.encode_feedback, data.Feedback(user("a"), LONG, True)),
    (data.encode_prompt, data.Prompt(user(LONG))),
  )
  for encode, record in kinds:
    assert encode(record, tokenizer, 16, "drop") is None
    assert encode(record, tokenizer, 64, "drop") is not None
    with pytest.raises(InputError, match="overlong must be one of truncate, drop, not 'cut'"):
      encode(record, tokenizer, 16, "cut")


def test_empty_answers_and_prompts_without_tokens(tokenizer, words):
  """[45] An empty answer is its turn end; a prompt of no tokens cannot be answered."""
  pair = data.encode_preference(data.Preference(user("a"), "", "b"), tokenizer, 16)
  assert pair.chosen.response_mask.sum() == 1 and pair.rejected.response_mask.sum() == 2
  empty = data.Prompt(({"role": "text", "content": ""},), source="f:1")
  with pytest.raises(InputError, match="f:1: field 'prompt' has no tokens"):
    data.encode_prompt(empty, words(None), 16)


def test_a_reward_model_scores_the_form_it_was_trained_on(tokenizer):
  pair = data.encode_preference(data.Preference(user("a"), "b c", "d"), tokenizer, 32)
  scored = data.encode_response(user("a"), "b c", tokenizer, 32)
  np.testing.assert_array_equal(scored.tokens, pair.chosen.tokens)
  np.testing.assert_array_equal(scored.response_mask, pair.chosen.response_mask)


def test_a_bos_that_opens_every_turn_does_not_survive_a_cut(bpe):
  """SmolLM2's BOS is <|im_start|>: kept alone at the front it would open a turn of no role."""
  tokenizer = bpe()
  tokenizer.bos_token = "<|im_start|>"
  prompt = data.encode_prompt(data.Prompt(user("the answer " * 9)), tokenizer, 20)
  assert prompt.tolist().count(tokenizer.bos_token_id) == 1
  assert tokenizer.decode(prompt[-4:]).endswith("<|im_start|>assistant\n")
