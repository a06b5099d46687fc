"""Write the prompts that mteb holds of a model as the `datasets` of a config."""

import sys
from pathlib import Path

# works from a clone that is not installed, too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_embed.commands.import_prompts import main

if __name__ == "__main__":
    sys.exit(main())
