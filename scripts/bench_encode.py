"""Measure Embedder.encode on the CPU, against sentence-transformers' encode of the same model."""

import sys
from pathlib import Path

# works from a clone that is not installed, too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_embed.commands.bench_encode import main

if __name__ == "__main__":
    sys.exit(main())
