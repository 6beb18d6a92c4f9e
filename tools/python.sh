#!/usr/bin/env bash
# Prints the Python to build .venv with: $PYTHON when set, else the first of the usual names that is 3.11, 3.12 or 3.13
# and can make virtual environments. Says what to do when there is none.
set -euo pipefail

supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'

# Runs the candidate: a name on the path may be a shim for a Python that is not there.
fits() { "$1" -c "$supported" >/dev/null 2>&1; }
version() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo "not runnable"; }

if [ -n "${PYTHON:-}" ]; then
    fits "$PYTHON" && { echo "$PYTHON"; exit 0; }
    echo "PYTHON=$PYTHON is $(version "$PYTHON"); Workbench needs Python 3.11, 3.12 or 3.13. Pass another: make PYTHON=python3.12" >&2
    exit 1
fi

for candidate in python3 python3.12 python3.13 python3.11 python; do
    fits "$candidate" && { echo "$candidate"; exit 0; }
done
echo "No Python 3.11, 3.12 or 3.13 found (python3 is $(version python3))." >&2
echo "Install one (Debian 12, Ubuntu 24.04: apt-get install python3 python3-venv) or name it: make PYTHON=/path/to/python3.12" >&2
exit 1
