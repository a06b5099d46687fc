"""Search a corpus with a model, or any cut of it: the texts nearest to each text that is given."""

import sys
from pathlib import Path

# works from a clone that is not installed, too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_embed.commands.search import main

if __name__ == "__main__":
    sys.exit(main())
