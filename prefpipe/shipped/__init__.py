"""Recipes and prompts that come with the package, and the demo that runs them.

`stages` and `data` here are links to the folders at the top of a checkout; a wheel holds the files in their place.
"""

from pathlib import Path

ROOT = Path(__file__).parent
