"""Estimate what large runs take: memory, time and storage for every size of Qwen3."""

import sys
from pathlib import Path

# works from a clone that is not installed, too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_embed.commands.estimate_scale import main

if __name__ == "__main__":
    sys.exit(main())
