"""Cut a trained model to a rank, a depth and a vector length, as a model folder of its own."""

import sys
from pathlib import Path

# works from a clone that is not installed, too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_embed.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
