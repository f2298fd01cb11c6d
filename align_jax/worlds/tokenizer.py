"""The microworld's tokenizer: one token a word, ChatML-like turns, loadable by transformers."""

from align_jax.worlds import families, lexicon, templates

PAD, UNK, BOS, EOS = "<|pad|>", "<|unk|>", "<|begin|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL = (PAD, UNK, BOS, EOS, *ROLES)
CHAT_TEMPLATE = (
  "{{ bos_token }}{% for message in messages %}"
  "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
  "{{ raise_exception('Unknown role ' + message['role']) }}{% endif %}"
  "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
  "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def vocabulary() -> dict[str, int]:
  """Every token and its id: special tokens first, then all words in alphabetical order."""
  texts = [text for pool in lexicon.POOLS for text in pool]
  texts += [templates.without_slots(frame) for frame in families.FRAMES.values()]
  texts += [t.literals() for family in families.FAMILIES.values() for t in family.templates]
  known = {word for text in texts for word in lexicon.words(text)}
  return {token: i for i, token in enumerate((*SPECIAL, *sorted(known)))}


def build():
  """Returns a transformers.PreTrainedTokenizerFast over the whole vocabulary.

  Words are lower case; punctuation is its own token and sits on the word before it, so that
  decode(encode(text)) is `text` for all text of this world. The end of a turn is the EOS token.
  """
  import tokenizers
  import transformers

  core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary(), unk_token=UNK))
  core.normalizer = tokenizers.normalizers.Lowercase()
  core.pre_tokenizer = tokenizers.pre_tokenizers.Split(
    tokenizers.Regex(lexicon.WORD_PATTERN), "removed", invert=True
  )
  core.decoder = tokenizers.decoders.WordPiece(prefix="##", cleanup=True)
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=core, pad_token=PAD, unk_token=UNK, bos_token=BOS, eos_token=EOS,
      additional_special_tokens=list(ROLES), chat_template=CHAT_TEMPLATE,
      clean_up_tokenization_spaces=False, padding_side="right",
  )  # fmt: skip
