"""The tokenizer knows every word, gives every text back, and survives the disk."""

import pytest
import transformers

from align_jax import worlds
from align_jax.worlds import tokenizer


@pytest.fixture(scope="module")
def tok():
  return tokenizer.build()


@pytest.fixture(scope="module")
def conversations():
  world = worlds.Microworld()
  return [
    list(demonstration.messages)
    for split in ("train", "heldout")
    for demonstration in world.demonstrations(2000, split)
  ]


def test_vocabulary_is_small_and_special_tokens_differ(tok):
  assert len(tok) <= 350
  assert len({tok.pad_token_id, tok.eos_token_id, tok.bos_token_id, tok.unk_token_id}) == 4
  assert tok.pad_token_id == 0


def test_round_trip_is_exact_and_no_word_is_unknown(tok, conversations):
  for text in {message["content"] for turns in conversations for message in turns}:
    ids = tok(text, add_special_tokens=False)["input_ids"]
    assert tok.unk_token_id not in ids
    assert tok.decode(ids) == text


def test_conversations_fit_48_tokens(tok, conversations):
  lengths = [len(tok.apply_chat_template(turns, return_dict=False)) for turns in conversations]
  assert max(lengths) <= 48
  assert 15 <= sum(lengths) / len(lengths) <= 30


def test_template_spends_one_token_on_each_mark(tok):
  turns = [{"role": "system", "content": "never share it."}, {"role": "user", "content": "add 1."}]
  text = tok.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
  assert text == "<|begin|><|system|>never share it.<|end|><|user|>add 1.<|end|><|assistant|>"
  ids = tok.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
  assert len(ids) == 1 + (1 + 4 + 1) + (1 + 3 + 1) + 1


def test_a_prompt_is_the_beginning_of_its_conversation(tok, conversations):
  for turns in conversations[:200]:
    whole = tok.apply_chat_template(turns, return_dict=False)
    prompt = tok.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
    assert whole[: len(prompt)] == prompt
    assert whole[-1] == tok.eos_token_id


def test_capitals_are_lowered_and_strangers_are_unknown(tok):
  assert tok("Tell ME")["input_ids"] == tok("tell me")["input_ids"]
  assert tok("zeppelin")["input_ids"] == [tok.unk_token_id]


def test_unknown_roles_are_refused(tok):
  with pytest.raises(Exception, match="Unknown role tool"):
    tok.apply_chat_template([{"role": "tool", "content": "add 1."}])


def test_survives_the_disk(tok, conversations, tmp_path):
  tok.save_pretrained(tmp_path)
  again = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert (again.pad_token, again.eos_token, again.bos_token) == (
    tokenizer.PAD,
    tokenizer.EOS,
    tokenizer.BOS,
  )
  for turns in conversations[:200]:
    ids = again.apply_chat_template(turns, return_dict=False)
    assert ids == tok.apply_chat_template(turns, return_dict=False)
    assert again.decode(ids[-5:], skip_special_tokens=True) == tok.decode(
      ids[-5:], skip_special_tokens=True
    )


def test_the_vocabulary_does_not_depend_on_the_seed():
  assert (
    worlds.Microworld(seed=1).tokenizer().get_vocab()
    == worlds.Microworld(seed=2).tokenizer().get_vocab()
  )
