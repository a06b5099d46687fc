#!/usr/bin/env bash
# The test suite, in an environment of its own making (shared with quickstart.sh).
#   bash scripts/test.sh              lint, types, and all tests but those marked slow
#   bash scripts/test.sh --all        every test
#   bash scripts/test.sh --oldest     the tests, with the oldest versions that pyproject.toml promises
# Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
extras=plot,sentence-transformers,lora,adamw-8bit,ann,bm25,mteb,onnx,gguf,static,dev

versions=tested
slow="not slow and "
while [[ "${1:-}" == --all || "${1:-}" == --oldest ]]; do
    [ "$1" = --oldest ] && versions=oldest || slow=""
    shift
done

prepare_environment "$extras" "$versions"
if [ "$versions" = tested ]; then # linters of other versions see other things
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m mypy
fi

# Two at a time, then what measures time or memory. pytest says 5 where it finds no test.
found=5
run_tests() {
    local code=0
    "$PYTHON" -m pytest -q "$@" || code=$?
    [ $code = 5 ] || found=0
    [ $code = 0 ] || [ $code = 5 ] || exit $code
}
run_tests -n 2 --dist loadfile -m "${slow}not gpu and not alone" "$@"
run_tests -m "${slow}not gpu and alone" "$@"
exit $found
