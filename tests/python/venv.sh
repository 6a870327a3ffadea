#!/usr/bin/env bash
# Makes a virtual environment with the official Kusto client and httpx, pinned, and prints its Python.
# usage: venv.sh DIRECTORY
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
directory=${1:?usage: venv.sh DIRECTORY}
python3 -m venv "$directory" >&2
"$directory/bin/pip" install --quiet --disable-pip-version-check --no-deps \
    --requirement "$here/requirements.txt" >&2
printf '%s\n' "$directory/bin/python"
