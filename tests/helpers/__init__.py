"""What several test modules share: tiny models, tiny data, tiny runs, and the scripts as
modules."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository."""
