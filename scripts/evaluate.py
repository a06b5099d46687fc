"""Evaluate a model at every rank, depth and vector length, beside chance and a baseline."""

import sys
from pathlib import Path

# works from a clone that is not installed, too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_embed.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
