"""Compute a teacher's vectors of tokenized data once, for training with `teacher_vectors_path`."""

import sys
from pathlib import Path

# works from a clone that is not installed, too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_embed.commands.embed_teacher import main

if __name__ == "__main__":
    sys.exit(main())
