"""Mine hard negatives for raw data with any embedding model, and write the raw layout with them."""

import sys
from pathlib import Path

# works from a clone that is not installed, too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_embed.commands.mine import main

if __name__ == "__main__":
    sys.exit(main())
