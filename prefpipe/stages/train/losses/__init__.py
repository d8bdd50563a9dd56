"""Losses of preference optimization: pure functions of tensors and settings."""
