# Sourced by quickstart.sh and test.sh: a virtual environment, made once and then reused.
# Usage: prepare_environment EXTRAS [oldest], e.g. prepare_environment plot. Sets PYTHON to the
# environment's interpreter. Versions are the tested ones (constraints.txt), or the oldest that
# pyproject.toml promises, in an environment of their own.

prepare_environment() {
    unset PYTHONDONTWRITEBYTECODE # every process would compile all that it imports anew
    local extras="$1" versions="${2:-tested}"
    local base="${ML_EMBED_PYTHON:-python3}"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: Python 3.11 or newer is needed; name one with ML_EMBED_PYTHON=/path/to/python" >&2
        exit 1
    }
    local environment="${ML_EMBED_VENV:-.venv}"
    [ "$versions" = tested ] || environment="$environment-$versions"
    local wanted="$environment/wanted-$extras.txt" stamp="$environment/.installed-$extras"
    [ -x "$environment/bin/python" ] || "$base" -m venv "$environment"
    PYTHON="$environment/bin/python"
    "${versions}_versions" > "$wanted"
    if ! cmp -s <(cat pyproject.toml "$wanted") "$stamp"; then
        echo "Installing into $environment (once) ..."
        # torch by its exact version, asked for by itself: the build that fits this machine. No
        # byte-compiling ahead: most of what is installed is never imported.
        "$PYTHON" -m pip install -qq --disable-pip-version-check --no-compile -c "$wanted" \
            "$(grep -E '^torch==' "$wanted")" -e ".[$extras]"
        cat pyproject.toml "$wanted" > "$stamp"
    fi
}

tested_versions() { cat constraints.txt; }

# The lower bound of every requirement in pyproject.toml, as a pin.
oldest_versions() {
    "$PYTHON" - <<'END'
import re, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
optional = project["optional-dependencies"].values()
for requirement in sum(optional, start=project["dependencies"]):
    print(re.sub(r">=\s*([\w.]+).*", r"==\1", requirement))
END
}
