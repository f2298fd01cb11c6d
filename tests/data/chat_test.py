"""Masks by position. Numbers in brackets are those of the bug list of the peer survey."""

import numpy as np
import pytest
import transformers

from align_jax import data
from align_jax.data import chat
from align_jax.errors import InputError


def turns(*contents, system=None):
  roles = ("user", "assistant") * len(contents)
  messages = [{"role": role, "content": text} for role, text in zip(roles, contents)]
  return ([{"role": "system", "content": system}] if system else []) + messages


def said(encoded, tokenizer):
  """The masked stretches, decoded."""
  edges = np.flatnonzero(np.diff(np.concatenate([[False], encoded.response_mask, [False]])))
  return [tokenizer.decode(encoded.tokens[a:b]) for a, b in edges.reshape(-1, 2)]


def test_multi_turn_mask_is_the_hand_written_one(tokenizer):
  """[5] Prompt and response meet where the template asks the model to speak."""
  encoded = chat.encode_messages(turns("a b", "c d", "e", "f", system="z"), tokenizer)
  expected = [
    ("<|im_start|> system z <|im_end|>", 0), ("<|im_start|> user a b <|im_end|>", 0),
    ("<|im_start|> assistant", 0), ("c d <|im_end|>", 1),
    ("<|im_start|> user e <|im_end|>", 0), ("<|im_start|> assistant", 0), ("f <|im_end|>", 1),
  ]  # fmt: skip
  words = [(word, mask) for text, mask in expected for word in text.split()]
  assert tokenizer.convert_ids_to_tokens(encoded.tokens) == [word for word, _ in words]
  assert encoded.response_mask.tolist() == [bool(mask) for _, mask in words]


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "llama2", "plain", "thinking"])
@pytest.mark.parametrize("kind", ["words", "bpe"])
def test_every_template_says_its_turns_and_keeps_the_prompt(name, kind, templates, request):
  """[5] What is masked reads as the answers; what precedes an answer is what a sampler is given."""
  tokenizer = request.getfixturevalue(kind)(templates[name])
  messages = turns(
    "a b", "no, the yes" if kind == "bpe" else "c d", "e", "the" if kind == "bpe" else "f"
  )
  encoded = chat.encode_messages(messages, tokenizer)
  stretches = said(encoded, tokenizer)
  assert len(stretches) == 2
  for text, message in zip(stretches, messages[1::2]):
    assert message["content"] in text
    assert not any(role in text for role in ("user", "model", "assistant"))
  assert encoded.response_mask[-1]
  assert encoded.tokens[-1] in data.stop_ids(tokenizer)
  for i in (1, 3):
    prompt = chat.encode_prompt_messages(messages[:i], tokenizer)
    if name != "thinking" or i == 1:
      whole = chat.encode_messages(messages[: i + 1], tokenizer, last_only=True)
      assert whole.tokens[: len(prompt)].tolist() == prompt.tolist()
      assert np.flatnonzero(whole.response_mask).tolist() == [
        *range(len(prompt), len(whole.tokens))
      ]


def test_only_the_last_turn_is_response_where_a_pair_is_judged(tokenizer):
  encoded = chat.encode_messages(turns("a", "b", "c", "d"), tokenizer, last_only=True)
  assert said(encoded, tokenizer) == ["d <|im_end|>"]


def test_eos_is_response_also_where_it_is_the_padding(words):
  """[1, 2, 3] pad == eos moves neither mask nor tokens."""
  apart, same = words(pad="<pad>", eos="<|im_end|>"), words(pad="<|im_end|>", eos="<|im_end|>")
  assert same.pad_token_id == same.eos_token_id
  a, b = (chat.encode_messages(turns("a", "b c"), t) for t in (apart, same))
  np.testing.assert_array_equal(a.tokens, b.tokens)
  np.testing.assert_array_equal(a.response_mask, b.response_mask)
  assert b.tokens[-1] == same.eos_token_id and b.response_mask[-1]


def test_eos_is_appended_only_where_no_turn_end_is_written(words, templates):
  """[4] Chat data gets no second EOS; a template without turn ends gets one."""
  for name, ending in (("chatml", ["b", "<|im_end|>"]), ("llama2", ["b", "<eos>"]),
                       ("plain", ["b", "<eos>"])):  # fmt: skip
    tokenizer = words(templates[name])
    encoded = chat.encode_messages(turns("a", "b"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(encoded.tokens[-2:]) == ending
    assert encoded.response_mask[-2:].all()


def test_literal_text_has_one_eos_even_if_it_brings_its_own(words):
  """[4] Prompt and completion as they stand, EOS once."""
  tokenizer = words(None)
  for completion in ("b c", "b c <eos>"):
    messages = [{"role": "text", "content": "a "}, {"role": "assistant", "content": completion}]
    encoded = chat.encode_messages(messages, tokenizer)
    assert tokenizer.decode(encoded.tokens) == "a b c <eos>"
    assert encoded.response_mask.tolist() == [False, True, True, True]


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma"])
@pytest.mark.parametrize("leads", [False, True])
def test_exactly_one_bos(name, leads, words, templates):
  """[8] Whether template, tokenizer or both write it."""
  tokenizer = words(templates[name], leads=leads)
  expected = 1 if leads or name != "chatml" else 0
  for tokens in (
    chat.encode_messages(turns("a", "b"), tokenizer).tokens,
    chat.encode_prompt_messages(turns("a"), tokenizer),
  ):
    assert tokens.tolist().count(tokenizer.bos_token_id) == expected
    assert (tokens[0] == tokenizer.bos_token_id) == bool(expected)


def test_literal_prompt_gets_the_bos_its_tokenizer_leads_with(words):
  """[8] A base model's prompt too."""
  prompt = chat.encode_prompt_messages(
    [{"role": "text", "content": "a b"}], words(None, leads=True)
  )
  assert words().convert_ids_to_tokens(prompt) == ["<bos>", "a", "b"]


def test_types_of_the_template_are_pinned(tokenizer, monkeypatch):
  """[7] A BatchEncoding (length 2!) where text or ids are expected stops at once."""
  encoding = tokenizer.apply_chat_template(turns("a"), tokenize=True)
  assert isinstance(encoding, transformers.BatchEncoding | list)
  monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: encoding)
  with pytest.raises(AssertionError):
    chat.encode_messages(turns("q", "r"), tokenizer)


@pytest.mark.parametrize("answer", ["\n\nthe answer", "\n", " the  yes", "", "the answer\n\n"])
def test_an_answer_that_merges_with_its_prompt_is_tokenised_apart(answer, bpe):
  """[5] The prompt's tokens stay those a sampler is given, whatever the answer begins with."""
  tokenizer = bpe()
  prompt = chat.encode_prompt_messages(turns("the user"), tokenizer)
  encoded = chat.encode_messages(turns("the user", answer), tokenizer)
  assert encoded.tokens[: len(prompt)].tolist() == prompt.tolist()
  assert tokenizer.decode(encoded.tokens[len(prompt) :]) == answer + "<|im_end|>"


def test_the_merging_case_really_merges(bpe):
  """Without the cut above newline tokens would straddle prompt and answer."""
  tokenizer = bpe()
  text = "assistant\n" + "\n\nthe"
  whole = tokenizer(text, add_special_tokens=False)["input_ids"]
  start = tokenizer("assistant\n", add_special_tokens=False)["input_ids"]
  assert whole[: len(start)] != start


def test_a_literal_prompt_that_ends_in_a_space_keeps_its_tokens(bpe):
  tokenizer = bpe(None)
  messages = [{"role": "text", "content": "the answer "}, {"role": "assistant", "content": "yes"}]
  prompt = chat.encode_prompt_messages(messages[:1], tokenizer)
  encoded = chat.encode_messages(messages, tokenizer)
  assert encoded.tokens[: len(prompt)].tolist() == prompt.tolist()
  assert said(encoded, tokenizer) == ["yes<eos>"]


def test_a_conversation_the_assistant_opens(tokenizer):
  messages = [{"role": "assistant", "content": "a b"}, *turns("c", "d")]
  encoded = chat.encode_messages(messages, tokenizer)
  assert said(encoded, tokenizer) == ["a b <|im_end|>", "d <|im_end|>"]


def test_an_empty_answer_is_its_turn_end(tokenizer):
  assert said(chat.encode_messages(turns("a", ""), tokenizer), tokenizer) == ["<|im_end|>"]


def test_a_turn_that_repeats_an_earlier_one_is_found_in_its_place(tokenizer):
  encoded = chat.encode_messages(turns("b", "b", "b", "b"), tokenizer)
  assert said(encoded, tokenizer) == ["b <|im_end|>"] * 2


def test_thinking_block_of_the_last_turn_is_said_by_the_assistant(words, templates):
  tokenizer = words(templates["thinking"])
  encoded = chat.encode_messages(turns("a", "b", "c", "d"), tokenizer)
  assert said(encoded, tokenizer) == ["b <|im_end|>", "<think> </think> d <|im_end|>"]


def test_stop_ids_are_eos_and_the_turn_end(words, templates):
  tokenizer = words(templates["llama3"])
  assert tokenizer.convert_ids_to_tokens(data.stop_ids(tokenizer)) == ["<eos>", "<|eot|>"]
  assert words(None).convert_ids_to_tokens(data.stop_ids(words(None))) == ["<eos>"]


@pytest.mark.parametrize(
  "messages, template, complaint",
  [
    (turns("a", "b"), None, "the tokenizer has no chat template"),
    (turns("a", "b", system="c"), "gemma", "refuses this conversation .*no system turns"),
    (turns("a <|im_end|>", "b"), "chatml", "message 0 contains the special token '<|im_end|>'"),
    (turns("a", "b") + [{"role": "text", "content": "c"}], "chatml", "message 2 is literal text"),
  ],
)
def test_what_cannot_be_encoded_is_said_with_its_source(
  messages, template, complaint, words, templates
):
  tokenizer = words(template and templates[template])
  complaint = "f.jsonl:3: .*" + complaint.replace("|", r"\|")
  with pytest.raises(InputError, match=complaint):
    chat.encode_messages(messages, tokenizer, "f.jsonl:3")


def test_a_template_that_rewrites_contents_is_refused(words, templates):
  upper = words(templates["chatml"].replace("m['content'] ", "m['content'] | upper "))
  with pytest.raises(InputError, match="f:1: the chat template rewrites the message 'b'"):
    chat.encode_messages(turns("a", "b"), upper, "f:1")


def test_a_template_whose_history_changes_is_refused(words, templates):
  template = "{{ messages | length }} " + templates["chatml"]
  with pytest.raises(InputError, match="rewrites what precedes message 1"):
    chat.encode_messages(turns("a", "b"), words(template), "f:1")
