"""Losses of preference optimization: functions of tensors and of the settings that they read."""
