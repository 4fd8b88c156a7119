#!/bin/sh
# Finds a Python for rrouter.py and has it install itself, or undo that.

set -u

usage() {
    cat <<'EOF'
Usage: ./install.sh [--claude] [--dry-run]
       ./install.sh --uninstall [--purge] [--dry-run]

Finds a Python and runs `rrouter.py install` or `rrouter.py uninstall` with it: ~/bin/rrouter,
~/.rrouter, and a systemd user unit or a launchd agent.  Running it again upgrades.

  --claude      also point Claude Code at rrouter in its settings.json, with a status line
  --uninstall   stop rrouter and undo the installation; ~/.rrouter stays
  --purge       with --uninstall: remove ~/.rrouter, too
  --dry-run     change nothing, say what would be done
  -h, --help    print this

Environment:
  PYTHON        the Python to use (3.9 or newer); otherwise the first one found
  RROUTER_*     those that are set go to ~/.config/rrouter.env for the service, unless you wrote or
                changed that file
EOF
}

fail() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}

action=install
for option in "$@"; do      # takes --uninstall out of the arguments
    shift
    case $option in
    --uninstall) action=uninstall ;;
    -h | --help)
        usage
        exit 0 ;;
    *) set -- "$@" "$option" ;;
    esac
done
case "$action $*" in install*--purge*) fail "--purge goes with --uninstall" ;; esac
case ${HOME:-} in
/*) ;;
*) fail "HOME is not set to a directory" ;;
esac
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P) || exit 1
[ -f "$here/rrouter.py" ] || fail "rrouter.py is not next to install.sh: run install.sh in a clone"

# Prints the path of the interpreter, not that of a pyenv shim, or says why this one will not do.
# shellcheck disable=SC2016
probe='
import sys
sys.path = [path for path in sys.path if path]      # no imports from the current directory
if sys.version_info < (3, 9):
    sys.exit("is Python %d.%d" % sys.version_info[:2])
try:
    import _ssl, fcntl, http       # the parts that a minimal or home-made one lacks
except ImportError as problem:
    sys.exit("lacks a part of the standard library: %s" % problem)
print(sys.executable or sys.exit("does not know its own path"))
'

python_candidates() {
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python3.9; do
        command -v "$name"
    done
    for path in "$HOME"/.pyenv/versions/*/bin/python3 \
        /opt/homebrew/bin/python3* /usr/local/bin/python3*; do
        [ ! -x "$path" ] || printf '%s\n' "$path"
    done
}

# try_python PATH: sets $python, or $why.
try_python() {
    if [ "$1" = /usr/bin/python3 ] && [ "$(uname -s)" = Darwin ] &&
        ! xcode-select -p >/dev/null 2>&1; then
        why="is Apple's stand-in, which needs the command line tools"  # and would open a window
    elif why=$("$1" -E -B -c "$probe" 2>&1 </dev/null); then
        python=$why
        return 0
    fi
    why="$1: $(printf '%s\n' "$why" | tail -n 1)"
    return 1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        wanted="name a Python 3.9 or newer"
        candidate=$(command -v "$PYTHON") || fail "PYTHON: $PYTHON is not a program: $wanted"
        try_python "$candidate" || fail "PYTHON: $why: $wanted"
        return
    fi
    found=$(python_candidates | awk '!seen[$0]++')
    seen=
    while IFS= read -r candidate; do
        [ -n "$candidate" ] || continue
        ! try_python "$candidate" || return 0
        seen="$seen
  $why"
    done <<EOF
$found
EOF
    fail "no Python 3.9 or newer found: install one, or set PYTHON to its path$seen"
}

find_python
exec "$python" -E "$here/rrouter.py" "$action" "$@"
