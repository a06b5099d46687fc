#!/usr/bin/env bash
# The whole test suite, in an environment of its own making (shared with quickstart.sh). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
prepare_environment plot,sentence-transformers,lora,ann,mteb,dev

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
exec "$PYTHON" -m pytest -q "$@"
