"""Measure tokenizing a file, with reading and writing, against the tokenizers library alone."""

import sys
from pathlib import Path

# works from a clone that is not installed, too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_embed.commands.bench_tokenize import main

if __name__ == "__main__":
    sys.exit(main())
