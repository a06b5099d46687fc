"""Make a model folder of a released model (U.pth, V.pth), or of any Qwen3 embedding model."""

import sys
from pathlib import Path

# works from a clone that is not installed, too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_embed.commands.import_model import main

if __name__ == "__main__":
    sys.exit(main())
