#!/usr/bin/env bash
# Sees to Debian packages:  debian.sh venv PYTHON  for what a virtual environment needs,  debian.sh test  for what the tests need.
# Installs what is missing as root or by passwordless sudo; otherwise names it and says what goes without. "test" never fails:
# tests that miss a program are skipped and say so.
set -euo pipefail

have() { command -v "$1" >/dev/null 2>&1; }
has_browser() { have chromium || have chromium-browser || have google-chrome; }
has_fonts() { [ -d /usr/share/fonts/truetype/liberation ] || [ -d /usr/share/fonts/truetype/liberation2 ] || [ -d /usr/share/fonts/liberation ]; }
is_ubuntu() { grep -q '^ID=ubuntu' /etc/os-release 2>/dev/null; }

as_root() {
    if [ "$(id -u)" -eq 0 ]; then env DEBIAN_FRONTEND=noninteractive "$@"; else sudo -n env DEBIAN_FRONTEND=noninteractive "$@"; fi
}
may_install() { have apt-get && { [ "$(id -u)" -eq 0 ] || { have sudo && sudo -n true 2>/dev/null; }; }; }

# A fresh machine often updates itself just then and holds apt's locks; the lists' lock knows no timeout, so try again.
apt() {
    local attempt
    for attempt in 1 2 3 4 5 6 7 8; do
        as_root apt-get -q -o DPkg::Lock::Timeout=120 -o Acquire::Retries=3 "$@" && return 0
        [ "$attempt" -eq 8 ] || { echo "apt-get $1 failed (attempt $attempt of 8); trying again in $((attempt * 3)) s" >&2; sleep $((attempt * 3)); }
    done
    return 1
}
install() {
    echo "Installing with apt-get: $*"
    as_root apt-get -q -o DPkg::Lock::Timeout=120 install -y --no-install-recommends "$@" && return 0
    apt update && apt install -y --no-install-recommends "$@"
}

venv() {
    "$1" -c 'import ensurepip, venv' 2>/dev/null && return 0
    local package
    package="python$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
    if may_install && install "$package"; then return 0; fi
    echo "$1 cannot make virtual environments. Install $package (apt-get install $package), then run make again." >&2
    return 1
}

# Ubuntu's chromium is a snap, which a test cannot drive from a container; Playwright's own build serves there.
browser_by_playwright() {
    local playwright=${PLAYWRIGHT:-.venv/bin/playwright}
    [ -x "$playwright" ] || return 1
    echo "Installing Chromium with Playwright"
    if may_install; then as_root "$playwright" install-deps chromium || return 1; fi
    "$playwright" install chromium
}
playwright_has_browser() { ls "${PLAYWRIGHT_BROWSERS_PATH:-$HOME/.cache/ms-playwright}"/chromium* >/dev/null 2>&1; }

test_packages() {
    local missing=()
    if ! has_browser && ! playwright_has_browser; then
        if is_ubuntu; then browser_by_playwright || missing+=(chromium); else missing+=(chromium); fi
    fi
    have pdffonts && have pdftotext || missing+=(poppler-utils)
    has_fonts || missing+=(fonts-liberation)
    [ ${#missing[@]} -eq 0 ] && return 0
    if may_install && install "${missing[@]}"; then return 0; fi
    echo "Missing and not installable from here: ${missing[*]}" >&2
    echo "Without chromium the browser tests are skipped, without poppler-utils some checks of exported PDFs." >&2
    echo "To run them all:  sudo apt-get update && sudo apt-get install ${missing[*]}" >&2
}

case "${1:-}" in
    venv) venv "$2" ;;
    test) test_packages ;;
    *) echo "usage: debian.sh venv PYTHON | debian.sh test" >&2; exit 2 ;;
esac
