"""The phases: each assembles a model, records, an objective and the loop, and writes a workdir.

Phases meet only through checkpoints: a phase is started from the workdir of an earlier one.
"""
