"""Write the vectors of texts, from a model or any cut of it, as the rows of a .npy file."""

import sys
from pathlib import Path

# works from a clone that is not installed, too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_embed.commands.encode import main

if __name__ == "__main__":
    sys.exit(main())
