"""Score passages and negatives of raw data with a cross-encoder, for training with `kd_loss`."""

import sys
from pathlib import Path

# works from a clone that is not installed, too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_embed.commands.score_candidates import main

if __name__ == "__main__":
    sys.exit(main())
