"""Evaluation: statistics with their uncertainty, policies, reward models, and the report."""
