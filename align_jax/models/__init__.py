"""The model room: one transformer for every family, its heads, adapters and files."""

from align_jax.models.adapters import load_adapter as load_adapter
from align_jax.models.adapters import save_adapter as save_adapter
from align_jax.models.config import ModelConfig as ModelConfig
from align_jax.models.config import RopeScaling as RopeScaling
from align_jax.models.context_attention import tiles_from as tiles_from
from align_jax.models.heads import head_variables as head_variables
from align_jax.models.heads import init_scalar_head as init_scalar_head
from align_jax.models.heads import map_positions as map_positions
from align_jax.models.heads import scalar_head as scalar_head
from align_jax.models.heads import target_logprobs as target_logprobs
from align_jax.models.heads import token_logprobs as token_logprobs
from align_jax.models.lora import init_lora as init_lora
from align_jax.models.lora import lora_axes as lora_axes
from align_jax.models.lora import merge_lora as merge_lora
from align_jax.models.lora import quantise_base as quantise_base
from align_jax.models.params import abstract_params as abstract_params
from align_jax.models.params import init_cache as init_cache
from align_jax.models.params import init_params as init_params
from align_jax.models.params import logical_axes as logical_axes
from align_jax.models.params import num_params as num_params
from align_jax.models.pretrained import load_pretrained as load_pretrained
from align_jax.models.pretrained import load_tokenizer as load_tokenizer
from align_jax.models.pretrained import save_pretrained as save_pretrained
from align_jax.models.shapes import SHAPES as SHAPES
from align_jax.models.shapes import named_shape as named_shape
from align_jax.models.transformer import Transformer as Transformer
