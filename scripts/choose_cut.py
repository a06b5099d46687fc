"""Choose a cut: measure what each costs here, and show the best ones within your limits."""

import sys
from pathlib import Path

# works from a clone that is not installed, too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_embed.commands.choose_cut import main

if __name__ == "__main__":
    sys.exit(main())
