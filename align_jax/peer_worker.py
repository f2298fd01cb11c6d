"""What a process of the peer benchmark runs: `python -m align_jax.peer_worker ROLE TASK FOLDER`."""

import pathlib
import sys

from align_jax import app
from align_jax.phases.peer_process import Channel


def main(role: str, task: str, folder: str) -> None:
  """ROLE: "prepare" writes weights and records for all tasks; else the name of a side."""
  channel = Channel()
  from align_jax.phases import peer_config

  place = peer_config.Place(pathlib.Path(folder))
  if role == "trl":
    from align_jax.phases import peer_trl

    peer_trl.serve(place, task, channel)
    return
  if role == "transformers":
    from align_jax.phases import peer_transformers

    peer_transformers.serve(place, task, channel)
    return
  # Other packages import torch where it is installed; ours runs as if it were not.
  sys.modules["torch"] = None
  app.prepare()
  if role == "tunix":
    from align_jax.phases import peer_tunix

    peer_tunix.serve(place, task, channel, app.devices())
    return
  from align_jax.phases import peer_ours, peer_records

  if role == peer_config.PREPARE:
    channel.send(peer_records.prepare(place, app.devices()))
  else:
    peer_ours.serve(place, task, role, channel, app.devices())


if __name__ == "__main__":
  main(*sys.argv[1:])
