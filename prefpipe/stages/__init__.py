"""The commands: one folder each, `stage.py` runs it from top to bottom."""
