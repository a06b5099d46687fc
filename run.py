"""Train a nested embedding model: `accelerate launch run.py --config configs/config.json`."""

import sys

from ml_embed.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
