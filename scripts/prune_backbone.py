"""Prune a Qwen3 backbone to fewer layers and to its most active hidden and MLP dimensions."""

import sys
from pathlib import Path

# works from a clone that is not installed, too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_embed.commands.prune_backbone import main

if __name__ == "__main__":
    sys.exit(main())
