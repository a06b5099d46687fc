"""Compare cuts of one nested run with models that are trained alone for what each cut gives."""

import sys
from pathlib import Path

# works from a clone that is not installed, too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_embed.commands.compare_dedicated import main

if __name__ == "__main__":
    sys.exit(main())
