"""Small tokenizers made on the spot: words with several chat templates, and a byte-level BPE."""

import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, processors

TURNS = "{% for m in messages %}"
ASK = "{% endfor %}{% if add_generation_prompt %}"

TEMPLATES = {
  "chatml": TURNS
  + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
  + ASK
  + "<|im_start|>assistant\n{% endif %}",
  "llama3": TURNS
  + "{% if loop.first %}{{ bos_token }}{% endif %}"
  + "<|start|>{{ m['role'] }}<|head|>\n\n{{ m['content'] | trim }}<|eot|>"
  + ASK
  + "<|start|>assistant<|head|>\n\n{% endif %}",
  "gemma": "{{ bos_token }}"
  + TURNS
  + "{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
  + "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
  + "<|start|>{{ role }}\n{{ m['content'] | trim }}<|eot|>\n"
  + ASK
  + "<|start|>model\n{% endif %}",
  "llama2": TURNS
  + "{% if m['role'] == 'assistant' %} {{ m['content'] | trim }} {{ eos_token }}"
  + "{% else %}{{ bos_token }}[INST] {{ m['content'] | trim }} [/INST]{% endif %}{% endfor %}",
  "plain": TURNS + "{{ m['role'] }}: {{ m['content'] }}\n" + ASK + "assistant: {% endif %}",
  "thinking": TURNS
  + "<|im_start|>{{ m['role'] }}\n"
  + "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
  + "{{ m['content'] }}<|im_end|>\n"
  + ASK
  + "<|im_start|>assistant\n{% endif %}",
}

TAGS = ("<|im_start|>", "<|im_end|>", "<|start|>", "<|head|>", "<|eot|>")
SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>", *TAGS)
ROLES = ("system", "user", "assistant", "model", "[INST]", "[/INST]", "user:", "assistant:")
WORDS = (*"abcdefghijklmnopqrstuvwxyz", "<think>", "</think>", "Question:", "Answer:")


def word_tokenizer(template=TEMPLATES["chatml"], *, pad="<pad>", eos="<eos>", leads=False):
  """One token a word; leads=True prepends BOS as Llama's and Gemma's tokenizers do."""
  vocabulary = {word: i for i, word in enumerate((*SPECIAL, *ROLES, *WORDS))}
  core = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
  core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return _wrapped(core, template, pad, eos, leads)


def bpe_tokenizer(template=TEMPLATES["chatml"], *, leads=False):
  """A byte-level BPE that merges newlines and leading spaces, as GPT-2's does."""
  core = tokenizers.Tokenizer(models.BPE(unk_token=None))
  core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=360,
    special_tokens=list(SPECIAL),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  lines = [
    "user\n\n\n\nthe answer is yes",
    "assistant\n\nno, the other\n\n\n\n",
    "the  yes  no",
  ] * 4
  core.train_from_iterator(lines, trainer)
  return _wrapped(core, template, "<pad>", "<eos>", leads)


def _wrapped(core, template, pad, eos, leads):
  if leads:
    core.post_processor = processors.TemplateProcessing(
      single="<bos> $A", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
    )
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=core, pad_token=pad, eos_token=eos, bos_token="<bos>", unk_token="<unk>",
    additional_special_tokens=list(TAGS),
  )  # fmt: skip
  tokenizer.chat_template = template
  return tokenizer


@pytest.fixture(scope="session")
def words():
  return word_tokenizer


@pytest.fixture(scope="session")
def bpe():
  return bpe_tokenizer


@pytest.fixture(scope="session")
def templates():
  return TEMPLATES


@pytest.fixture(scope="session")
def tokenizer():
  return word_tokenizer()
