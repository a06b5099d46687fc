"""Make a Qwen3 backbone folder: random weights of a preset size, a tokenizer copied or trained."""

import sys
from pathlib import Path

# works from a clone that is not installed, too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_embed.commands.init_backbone import main

if __name__ == "__main__":
    sys.exit(main())
