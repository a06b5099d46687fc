# Sourced by quickstart.sh and test.sh: a virtual environment with the tested versions, made once and then reused.
# Usage: prepare_environment EXTRAS, e.g. prepare_environment plot. Sets PYTHON to the environment's interpreter.

prepare_environment() {
    local extras="$1" environment="${ML_EMBED_VENV:-.venv}"
    local base="${ML_EMBED_PYTHON:-python3}"
    local stamp="$environment/.installed-$extras"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "error: Python 3.11 or newer is needed; name one with ML_EMBED_PYTHON=/path/to/python" >&2; exit 1; }
    [ -x "$environment/bin/python" ] || "$base" -m venv "$environment"
    PYTHON="$environment/bin/python"
    if ! cmp -s <(cat pyproject.toml constraints.txt) "$stamp"; then
        echo "Installing into $environment (once) ..."
        # torch by its exact version, asked for by itself: the build that fits this machine. No byte-compiling ahead:
        # most of what is installed is never imported.
        local torch
        torch="$(grep -E '^torch==' constraints.txt)"
        "$PYTHON" -m pip install -qq --disable-pip-version-check --no-compile -c constraints.txt \
            "$torch" -e ".[$extras]"
        cat pyproject.toml constraints.txt > "$stamp"
    fi
}
