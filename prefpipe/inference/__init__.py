"""Prompts to completions and completions to log-probs, shard by shard through an engine."""
