"""Check everything about the GPU path that a CPU cannot tell, within a deadline."""

import sys
from pathlib import Path

# works from a clone that is not installed, too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_embed.commands.check_gpu import main

if __name__ == "__main__":
    sys.exit(main())
