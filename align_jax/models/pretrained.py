"""Other people's checkpoints, in and out: Hugging Face folders, GGUF files, packages."""

import dataclasses
import json
import pathlib

from align_jax.errors import InputError, one_line
from align_jax.models import gguf_file, hf_config, layout, packages, safetensors_files
from align_jax.models.lora import merge_lora
from align_jax.models.transformer import Transformer

SHARD_BYTES = 4 << 30
_HUB = "hf:"
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]


def load_pretrained(folder_or_name: str, *, dtype: str | None = None, mesh=None):
  """A checkpoint as (Transformer, parameters).

  folder_or_name: a Hugging Face folder, a .gguf file, `hf:org/name` on the hub, or a package of
  weights (`smollm2`, `gemma3-270m`).  dtype: of parameters and computation; None keeps the file's
  own, float32 for GGUF.  With a mesh every device reads only its own part.
  Raises InputError naming an unsupported architecture, or a tensor missing, unexpected, misshapen.
  """
  path = locate(folder_or_name)
  if path.suffix == ".gguf":
    source = gguf_file.GgufFile(path)
    config, dtype = source.config(), dtype or "float32"
  else:
    config = hf_config.from_hf(read_json(path / "config.json"), str(path / "config.json"))
    source = safetensors_files.Folder(path)
    layout.check(config, source)
    dtype = dtype or source.dtype("model.embed_tokens.weight")
  model = Transformer(dataclasses.replace(config, dtype=dtype, param_dtype=dtype), mesh=mesh)
  return model, layout.assemble(model, source, mesh)


def save_pretrained(
  folder: str,
  model: Transformer,
  params: dict,
  *,
  tokenizer=None,
  lora: dict | None = None,
  shard_bytes: int = SHARD_BYTES,
):
  """Writes a folder that transformers loads; `lora` is merged in with the model's lora_scale.

  With a tokenizer its files and ids go along.  Raises InputError where the family's format has no
  word for what the config says.
  """
  config = hf_config.to_hf(model.config) | {"torch_dtype": str(params["embedding"].dtype)}
  special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
  path = pathlib.Path(folder)
  path.mkdir(parents=True, exist_ok=True)
  if tokenizer is not None:
    special = {
      "bos_token_id": tokenizer.bos_token_id,
      "eos_token_id": tokenizer.eos_token_id,
      "pad_token_id": tokenizer.pad_token_id,
    }
    tokenizer.save_pretrained(path)
  if lora is not None:
    params = merge_lora(params, lora, model.lora_scale)
  safetensors_files.write(path, layout.disassemble(model.config, params), shard_bytes)
  (path / "config.json").write_text(json.dumps({**config, **special}, indent=2))
  (path / "generation_config.json").write_text(json.dumps(special, indent=2))


def load_tokenizer(folder_or_name: str):
  """The transformers tokenizer of what `load_pretrained` would load."""
  path = locate(folder_or_name)
  if path.suffix == ".gguf":
    from align_jax.models import gguf_tokenizer

    return gguf_tokenizer.load(gguf_file.GgufFile(path))
  import transformers

  try:
    return transformers.AutoTokenizer.from_pretrained(path)
  except (
    Exception
  ) as error:  # of two libraries, one of them in Rust; each means the same to the user
    what = f"{type(error).__name__}: {one_line(error)}"
    raise InputError(f"{path} holds no tokenizer that can be read ({what})") from error


def locate(folder_or_name: str) -> pathlib.Path:
  """The folder or .gguf file on this machine, fetched first where the name is remote."""
  if folder_or_name in packages.PACKAGES:
    return packages.fetch(folder_or_name)
  if folder_or_name.startswith(_HUB):
    import huggingface_hub

    name = folder_or_name.removeprefix(_HUB)
    try:
      return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:
      raise InputError(
        f"{folder_or_name} is not to be had: {str(error).splitlines()[0]}"
      ) from error
  path = pathlib.Path(folder_or_name)
  if not path.exists():
    known = ", ".join(packages.PACKAGES)
    raise InputError(
      f"{folder_or_name} is no folder, no .gguf file and none of {known}, hf:org/name"
    )
  return path


def read_json(path: pathlib.Path) -> dict:
  """A JSON object; raises InputError where there is none."""
  try:
    value = json.loads(path.read_text())
  except FileNotFoundError as error:
    raise InputError(f"{path} does not exist") from error
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f"{path} is no JSON: {one_line(error)}") from error
  if not isinstance(value, dict):
    raise InputError(f"{path} must hold a JSON object")
  return value
