#!/usr/bin/env bash
# The test suite, in an environment of its own making (shared with quickstart.sh).
#   bash scripts/test.sh              lint, types, and all tests but those marked slow
#   bash scripts/test.sh --all        every test
#   bash scripts/test.sh --oldest     the tests, with the oldest versions that pyproject.toml promises
# Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
extras=plot,sentence-transformers,lora,ann,mteb,dev

versions=tested
selected=()
while [[ "${1:-}" == --all || "${1:-}" == --oldest ]]; do
    [ "$1" = --oldest ] && versions=oldest || selected=(-m "")
    shift
done

prepare_environment "$extras" "$versions"
if [ "$versions" = tested ]; then # linters of other versions see other things
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m mypy
fi
exec "$PYTHON" -m pytest -q "${selected[@]}" "$@"
