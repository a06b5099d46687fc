"""Run mteb's tasks on a model at any cuts of it, with the prompts that its folder holds."""

import sys
from pathlib import Path

# works from a clone that is not installed, too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_embed.commands.evaluate_mteb import main

if __name__ == "__main__":
    sys.exit(main())
