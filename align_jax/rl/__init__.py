"""Online reinforcement learning: rollouts, rewards, advantages, updates."""

from align_jax.rl.ppo import PpoConfig, PpoState, check_identity, create_state, make_iteration
from align_jax.rl.rewards import Reward, model_reward, text_reward
from align_jax.rl.rollouts import Rollout
from align_jax.rl.shaping import ShapingConfig

__all__ = [
  "PpoConfig",
  "PpoState",
  "Reward",
  "Rollout",
  "ShapingConfig",
  "check_identity",
  "create_state",
  "make_iteration",
  "model_reward",
  "text_reward",
]
