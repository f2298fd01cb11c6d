"""Online learning: rollouts, rewards, advantages, updates."""

from align_jax.rl.config import (
  GROUPED,
  ImportanceConfig,
  KlConfig,
  PolicyGradientConfig,
  SamplingConfig,
  ValueConfig,
)
from align_jax.rl.engine import check_identity, compile_learner, make_iteration, policy_draw
from align_jax.rl.layout import make_layouts
from align_jax.rl.online_preference import (
  OnlinePreferenceConfig,
  preference_draw,
  preference_learner,
)
from align_jax.rl.policy_gradient import policy_gradient_learner
from align_jax.rl.rejection import RejectionConfig, rejection_learner
from align_jax.rl.rewards import Reward, model_reward, text_reward
from align_jax.rl.rollouts import Rollout
from align_jax.rl.shaping import ShapingConfig
from align_jax.rl.state import OnlineState, abstract_fresh, create_state

__all__ = [
  "GROUPED",
  "ImportanceConfig",
  "KlConfig",
  "OnlinePreferenceConfig",
  "OnlineState",
  "PolicyGradientConfig",
  "RejectionConfig",
  "Reward",
  "Rollout",
  "SamplingConfig",
  "ShapingConfig",
  "ValueConfig",
  "abstract_fresh",
  "check_identity",
  "compile_learner",
  "create_state",
  "make_iteration",
  "make_layouts",
  "model_reward",
  "policy_draw",
  "policy_gradient_learner",
  "preference_draw",
  "preference_learner",
  "rejection_learner",
  "text_reward",
]
