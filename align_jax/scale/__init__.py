"""Pods from a laptop: what a slice is, whether a step fits it, and what it costs in time."""
