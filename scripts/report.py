"""Write a run's report: one HTML page of loss curves, throughput and the cuts to choose from."""

import sys
from pathlib import Path

# works from a clone that is not installed, too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_embed.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
