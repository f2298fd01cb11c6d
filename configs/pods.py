"""Jobs that want a pod, for `experiments.compile`: the table of the README.

python -m experiments.compile --config=configs/pods.py --output=pods.json

Every entry's settings are a config as its own command takes it; on a slice it would run with
--config.model.init=hf:... instead of a shape.
"""

from ml_collections import config_dict

from configs import ppo, preference, sft


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.jobs = config_dict.ConfigDict()
  jobs = {
    "SFT 8B, 64 x 4k": _job("sft", "llama3-8b", "v5e-64", _sft(64, 4096)),
    "DPO 8B, 64 pairs x 4k": _job("preference", "llama3-8b", "v5e-64", _dpo(64, 4096)),
    "DPO 8B, 32 pairs x 8k": _job("preference", "llama3-8b", "v6e-16", _dpo(32, 8192)),
    "DPO 8B, 8 pairs x 32k": _job(
      "preference", "llama3-8b", "v5e-64", _dpo(8, 32_768, context=8, fsdp=8)
    ),
    "DPO 70B, 128 pairs x 4k": _job("preference", "llama3-70b", "v5p-256", _dpo(128, 4096)),
    "DPO 70B LoRA, 16 pairs x 8k": _job(
      "preference", "llama3-70b", "v5p-32", _dpo(16, 8192, rank=16)
    ),
    "DPO 70B LoRA on int8, 16 pairs x 4k": _job(
      "preference", "llama3-70b", "v6e-16", _dpo(16, 4096, rank=16, base_dtype="int8")
    ),
    "PPO update 8B, 64 x 2k": _job("ppo", "llama3-8b", "v5p-16", _ppo(64, 1024, 1024)),
    "decode 8B, 64 x 2k": _job("decode", "llama3-8b", "v5p-16", _ppo(64, 1024, 1024, tensor=8)),
    "DPO 70B, 2 slices": _job("preference", "llama3-70b", "2xv5p-128", _dpo(128, 4096, data=2)),
  }
  for name, job in jobs.items():
    config.jobs[name] = job
  return config


def _job(phase: str, shape: str, topology: str, settings) -> config_dict.ConfigDict:
  return config_dict.create(phase=phase, shape=shape, topology=topology, settings=settings)


def _on_a_pod(
  config, *, chunk: int | None = 512, rank: int = 0, base_dtype: str = "float32", **mesh
):
  config.model.dtype = "bfloat16"
  config.model.remat = "full"
  config.model.logits_chunk = chunk
  config.model.lora.update(rank=rank, base_dtype=base_dtype)
  config.mesh.update(mesh)
  return config


def _sft(rows: int, length: int, **how):
  config = sft.get_config()
  config.model = preference.get_config().model
  config.data.update(batch_size=rows, length=length)
  return _on_a_pod(config, **how)


def _dpo(pairs: int, length: int, **how):
  """Pairs in rows that hold the prompt once, as `length` tokens of prompt and both answers."""
  config = _on_a_pod(preference.get_config(), **how)
  config.data.update(batch_size=pairs, length=length, buckets=(length,))
  return config


def _ppo(prompts: int, prompt_length: int, new_tokens: int, **mesh):
  config = _on_a_pod(ppo.get_config(), chunk=None, **mesh)
  config.prompts.update(batch_size=prompts, max_length=prompt_length)
  config.sampling.max_new_tokens = new_tokens
  config.policy_gradient.logits_chunk = 512
  config.policy_gradient.minibatches = 4
  return config
