"""Compare the two starts of the token factors (`mel_init`) on a pretrained model."""

import sys
from pathlib import Path

# works from a clone that is not installed, too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_embed.commands.compare_mel_init import main

if __name__ == "__main__":
    sys.exit(main())
