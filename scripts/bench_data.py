"""Measure opening a corpus and building batches, against a naive version."""

import sys
from pathlib import Path

# works from a clone that is not installed, too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_embed.commands.bench_data import main

if __name__ == "__main__":
    sys.exit(main())
