"""Reinforcement-learning fine-tuning of language models with token-aware credit."""

__version__ = "0.1.0"
