"""The tokenizer inside a GGUF file, as a transformers tokenizer."""

import tokenizers
import transformers
from tokenizers import decoders, normalizers, pre_tokenizers, processors

from align_jax.errors import InputError, one_line
from align_jax.models.gguf_file import GgufFile

# Token types of llama.cpp.
_CONTROL, _USER_DEFINED = 3, 4
# How text is cut before byte-level BPE, by `tokenizer.ggml.pre`.
_LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"llama-bpe": _LLAMA3, "qwen2": _LLAMA3.replace("{1,3}", "")}


def load(file: GgufFile) -> transformers.PreTrainedTokenizerFast:
  """The file's tokenizer with its special tokens and chat template; InputError if none works."""
  try:
    return _load(file)
  except InputError:
    raise
  except Exception as error:  # of the library in Rust too
    what = f"{type(error).__name__}: {one_line(error)}"
    raise InputError(f"{file.path} holds no tokenizer that can be read ({what})") from error


def _load(file: GgufFile) -> transformers.PreTrainedTokenizerFast:
  kind = file.field("tokenizer.ggml.model")
  tokens = file.field("tokenizer.ggml.tokens")
  if kind == "gpt2":
    backend = _byte_level(file, tokens)
  elif kind == "llama":
    backend = _sentence_piece(file, tokens)
  else:
    raise InputError(f"{file.path}: the tokenizer {kind!r} is not supported; gpt2 and llama are")
  _add_special_tokens(file, backend, tokens)
  return _wrap(file, backend, tokens)


def _byte_level(file, tokens):
  pre = file.field("tokenizer.ggml.pre", "default")
  cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
  if pre == "smollm":
    first = pre_tokenizers.Digits(individual_digits=True)
  elif pre in _SPLITS:
    first = pre_tokenizers.Split(tokenizers.Regex(_SPLITS[pre]), "isolated")
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  else:
    raise InputError(f"{file.path}: the pre-tokenizer {pre!r} is not supported")
  merges = [tuple(m.split(" ")) for m in file.field("tokenizer.ggml.merges")]
  vocab = {token: i for i, token in enumerate(tokens)}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
  backend.pre_tokenizer = pre_tokenizers.Sequence([first, cut])
  backend.decoder = decoders.ByteLevel()
  return backend


def _sentence_piece(file, tokens):
  vocab = {token: i for i, token in enumerate(tokens)}
  merges = _merges(vocab, file.field("tokenizer.ggml.scores"))
  unknown = tokens[file.field("tokenizer.ggml.unknown_token_id", 0)]
  model = tokenizers.models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
  backend = tokenizers.Tokenizer(model)
  spaces = [normalizers.Replace(" ", "▁")]
  strip = []
  if file.field("tokenizer.ggml.add_space_prefix", True):
    spaces.insert(0, normalizers.Prepend("▁"))
    strip = [decoders.Strip(" ", 1, 0)]
  backend.normalizer = normalizers.Sequence(spaces)
  backend.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
  )
  return backend


def _merges(vocab, scores):
  """SentencePiece merges the pair with the best-scored whole; BPE wants the pairs so ordered."""
  found = []
  for token, index in vocab.items():
    parts = [(token[:i], token[i:]) for i in range(1, len(token))]
    parts = [(a, b) for a, b in parts if a in vocab and b in vocab]
    parts.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    found += [(-scores[index], pair) for pair in parts]
  found.sort(key=lambda item: item[0])
  return [pair for _, pair in found]


def _add_special_tokens(file, backend, tokens):
  types = file.field("tokenizer.ggml.token_type")
  for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
    added = [t for t, kind in zip(tokens, types) if kind == wanted]
    added = [tokenizers.AddedToken(t, special=special, normalized=False) for t in added]
    backend.add_special_tokens(added) if special else backend.add_tokens(added)
  if file.field("tokenizer.ggml.add_bos_token", False):
    index = file.field("tokenizer.ggml.bos_token_id")
    bos = tokens[index]
    backend.post_processor = processors.TemplateProcessing(
      single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, index)]
    )


def _wrap(file, backend, tokens):
  names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
  fields = {name: f"tokenizer.ggml.{key}_token_id" for key, name in names.items()}
  special = {name: tokens[file.field(f)] for name, f in fields.items() if file.has(f)}
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, clean_up_tokenization_spaces=False, **special
  )
  if file.has("tokenizer.chat_template"):
    tokenizer.chat_template = file.field("tokenizer.chat_template")
  return tokenizer
