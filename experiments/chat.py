"""Talk to a checkpoint in the terminal; an empty line ends the conversation.

python -m experiments.chat --config.model=runs/quickstart/dpo
"""

from align_jax import app

CONFIG = app.define_config("configs/chat.py")


def main():
  from align_jax.phases import chat

  chat.run(app.settings(CONFIG, chat.ChatConfig), app.devices())


if __name__ == "__main__":
  app.run(main)
