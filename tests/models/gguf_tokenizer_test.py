"""Tokenizers inside GGUF files written here: what they cut, merge and give back."""

import gguf
import pytest

from align_jax import models
from align_jax.errors import InputError

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "0", "1", "2", "12", "a", "b", "ab", "Ġ"]


@pytest.fixture
def path(tmp_path):
  return tmp_path / "model.gguf"


def finish(writer):
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def load(path, pre="smollm", kind="gpt2"):
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_tokenizer_model(kind)
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(TOKENS)
  writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
  writer.add_token_merges(["1 2", "a b"])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  writer.add_pad_token_id(2)
  writer.add_chat_template(
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
  )
  finish(writer)
  return models.load_tokenizer(str(path))


def test_digits_are_split_before_merging(path):
  tokenizer = load(path)
  assert tokenizer("ab12")["input_ids"] == [9, 4, 5], "12 must not become one token"
  assert tokenizer.decode([9, 10, 4, 5]) == "ab 12"


def test_special_tokens_and_template(path):
  tokenizer = load(path)
  assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
  chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], return_dict=False)
  assert chat == [1, 9, 2]
  assert tokenizer.decode(chat, skip_special_tokens=True) == "ab"


@pytest.mark.parametrize("wrong", [dict(pre="klingon"), dict(kind="runes")])
def test_what_is_not_supported_is_named(path, wrong):
  with pytest.raises(InputError, match="klingon|runes"):
    load(path, **wrong)


def test_sentence_pieces_merge_by_score(path):
  """Scores say 'bc' before 'ab'; a space is a letter; unknown letters fall back to bytes."""
  tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "c", "ab", "bc", "<0xC3>", "<0xA9>"]
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_tokenizer_model("llama")
  writer.add_token_list(tokens)
  writer.add_token_scores([0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -9.0, -2.0, -1.0, 0.0, 0.0])
  writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 1, 1, 6, 6])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  writer.add_unk_token_id(0)
  writer.add_add_bos_token(True)
  writer.add_add_space_prefix(False)
  finish(writer)
  tokenizer = models.load_tokenizer(str(path))
  ids = tokenizer("abc ab\u00e9")["input_ids"]
  assert ids == [1, 4, 8, 3, 7, 9, 10]
  assert tokenizer.decode(ids, skip_special_tokens=True) == "abc ab\u00e9"
