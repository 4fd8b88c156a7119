#!/bin/sh
# Installs rrouter for the user who runs this, or takes it back: `./install.sh --help`.
#
# The shell reads the options and looks for Python; the rest is Python.  Each change to a file is a temporary file and a
# rename, and is noted in ~/.rrouter/install.json before it is made.  So an installation that was stopped half-way can
# be run again, and the uninstallation knows what there was before.

set -u

usage() {
    cat <<'EOF'
Usage: ./install.sh [--claude] [--dry-run]
       ./install.sh --uninstall [--purge] [--dry-run]

Installs rrouter.py as ~/bin/rrouter, creates ~/.rrouter, and starts rrouter as a service: a systemd user unit on
Linux, a launchd agent on macOS, `rrouter start` where neither is to be had.  Running it again upgrades.

  --claude      also write env.ANTHROPIC_BASE_URL into ~/.claude/settings.json (a backup is kept beside it)
  --uninstall   stop rrouter and take back what was installed; ~/.rrouter stays
  --purge       with --uninstall: remove ~/.rrouter too
  --dry-run     change nothing, say what would be done
  -h, --help    print this

Environment:
  PYTHON        the Python to use (3.9 or newer); otherwise the first one found
  RROUTER_PORT, RROUTER_UPSTREAM, RROUTER_HOST
                if set, written to ~/.config/rrouter.env for the service, unless you have such a file already
EOF
}

fail() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}

wrong() {
    printf 'install.sh: %s\n\n' "$*" >&2
    usage >&2
    exit 2
}

would='' claude='' purge='' action=install
for option in "$@"; do
    case $option in
    --claude) claude=yes ;;
    --dry-run) would='would ' ;;
    --uninstall) action=uninstall ;;
    --purge) purge=yes ;;
    -h | --help)
        usage
        exit 0 ;;
    *) wrong "unknown option $option" ;;
    esac
done
case $action$claude$purge in
install*yes) [ -z "$purge" ] || wrong "--purge goes with --uninstall only" ;;
uninstall*yes) [ -z "$claude" ] || wrong "--claude does not go with --uninstall, which takes the setting back anyway" ;;
esac
case ${HOME:-} in
/*) ;;
*) fail "HOME is not set to a directory" ;;
esac
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P) || exit 1
[ -f "$here/rrouter.py" ] || fail "rrouter.py is not beside install.sh: run install.sh inside a clone"


# Python #######################################################################

# Prints the path that is to stand in the first line of ~/bin/rrouter, or says why this Python will not do.
# sys.executable is the interpreter behind a pyenv shim.  The links of the system and of Homebrew are kept as they are:
# they survive an upgrade, what they point to does not.  Neither does a virtual environment, unless asked for.
# shellcheck disable=SC2016
probe='
import os, sys
sys.path = [path for path in sys.path if path]      # not the files that lie about where this is run
if sys.version_info < (3, 9):
    sys.exit("is Python %d.%d" % sys.version_info[:2])
try:
    import _ssl, fcntl, http       # the parts that a minimal or home-made one lacks
except ImportError as problem:
    sys.exit("lacks a part of the standard library: %s" % problem)
named, asked = sys.argv[1:]
path = sys.executable
if os.path.dirname(named) in ("/usr/bin", "/usr/local/bin", "/opt/homebrew/bin"):
    with open(named, "rb") as program:
        path = path if program.read(2) == b"#!" else named
elif sys.prefix != sys.base_prefix and not asked:
    path = os.path.join(sys.base_prefix, "bin", "python%d.%d" % sys.version_info[:2])
if not path or not os.access(path, os.X_OK):
    sys.exit("does not know its own path")
print(path)
'

python_names='python3 python3.14 python3.13 python3.12 python3.11 python3.10 python3.9'

python_candidates() {
    for name in $python_names; do
        command -v "$name"
    done
    for candidate in "$HOME"/.pyenv/versions/*/bin/python3 /opt/homebrew/bin/python3* /usr/local/bin/python3*; do
        [ ! -x "$candidate" ] || printf '%s\n' "$candidate"
    done
}

# try_python PATH ASKED: sets $python, or $why.
try_python() {
    if [ "$1" = /usr/bin/python3 ] && [ "$(uname -s)" = Darwin ] && ! xcode-select -p >/dev/null 2>&1; then
        why="is Apple's stand-in, which needs the command line tools"      # and would open a window to say so
    elif why=$("$1" -E -B -c "$probe" "$1" "$2" 2>&1 </dev/null); then
        python=$why
        return 0
    fi
    why="$1: $(printf '%s\n' "$why" | tail -n 1)"
    return 1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        candidate=$(command -v "$PYTHON") || fail "PYTHON: $PYTHON is not a program: name a Python 3.9 or newer"
        try_python "$candidate" asked || fail "PYTHON: $why: name a Python 3.9 or newer"
        return
    fi
    found=$(python_candidates | awk '!seen[$0]++')
    seen=
    while IFS= read -r candidate; do
        [ -n "$candidate" ] || continue
        ! try_python "$candidate" "" || return 0
        seen="$seen
  $why"
    done <<EOF
$found
EOF
    fail "no Python 3.9 or newer found: install one, or set PYTHON to its path$seen"
}


find_python


# Installing and uninstalling ##################################################

exec "$python" -I -B - "$python" "$here" "$would" "$action" "$claude$purge" <<'EOF'
import hashlib
import importlib
import json
import os
import shutil
import stat
import subprocess
import sys
import time

# WOULD is "would " in a dry run, and empty otherwise; EXTRA is not empty with --claude or --purge.
PYTHON, HERE, WOULD, ACTION, EXTRA = sys.argv[1:]
HOME = os.environ["HOME"].rstrip("/")
CONFIGURATION = os.environ.get("XDG_CONFIG_HOME") or os.path.join(HOME, ".config")
DATA = os.path.join(HOME, ".rrouter")
RECORD = os.path.join(DATA, "install.json")
PROGRAM = os.path.join(HOME, "bin", "rrouter")
SETTINGS = os.path.join(HOME, ".claude", "settings.json")
ENVIRONMENT = os.path.join(HOME, ".config", "rrouter.env")
VARIABLES = ("RROUTER_PORT", "RROUTER_UPSTREAM", "RROUTER_HOST")
URL = "ANTHROPIC_BASE_URL"
ANSWER_S = 10       # a started daemon answers in less than one; more only on a machine that is very busy
UNLOAD_S = 45       # what launchd gives a job to end


def show(path):
    return "~" + path[len(HOME):] if path.startswith(HOME + "/") else path


def say(text):
    print("  %s%s" % (WOULD, text), flush=True)


def refuse(path, problem):
    sys.exit("install.sh: %s: %s" % (show(path), problem))


def call(*command, stderr=subprocess.STDOUT):
    """Run a command; return (status, what it printed)."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr,
                              errors="replace")
        return done.returncode, done.stdout.strip()
    except OSError as problem:
        return 127, "%s: %s" % (command[0], problem.strerror)


def step(*command, text=None):
    """Say and run a command; return whether it succeeded, with its output shown if not."""
    say(text or "run " + " ".join(map(show, command)))
    if WOULD:
        return True
    status, output = call(*command)
    if status:
        print(output, file=sys.stderr, flush=True)
    return not status


# Files and the record of them ---

def read(path):
    with open(path, "rb") as file:
        return file.read()


def digest(path):
    """Return what tells a file, or a link, from another one; None if there is nothing."""
    if os.path.islink(path):
        return "link to " + os.readlink(path)
    return hashlib.sha256(read(path)).hexdigest() if os.path.exists(path) else None


def temporary_of(path, kind="new"):
    """Always the same name: what a killed run leaves behind, the next one overwrites or removes."""
    return os.path.join(os.path.dirname(path), ".%s.%s" % (os.path.basename(path), kind))


def stage(path, data, mode):
    """Write what is to become `path` beside it, and return its name."""
    temporary = temporary_of(path)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(temporary, mode)
    return temporary


def write(path, data, mode):
    os.replace(stage(path, data, mode), path)


def remove_temporary(path):
    for temporary in (temporary_of(path), temporary_of(path, "old")):
        if not WOULD and os.path.lexists(temporary):
            os.unlink(temporary)


# What was installed: {"files": {path: {"sha256": [...], "backup": path or null}}, "directories": [...],
# "claude": {"before": what settings.json held of our key, "written": [URLs], "sha256": ..., "backup": ...}}.

def load_record():
    try:
        record = json.loads(read(RECORD))
    except FileNotFoundError:
        record = {}
    except ValueError as problem:
        refuse(RECORD, "cannot be read (%s): remove it, or repair it" % problem)
    return {"files": record.get("files", {}), "directories": record.get("directories", []),
            "claude": record.get("claude")}


def save_record():
    if not WOULD:
        os.makedirs(DATA, mode=0o700, exist_ok=True)
        write(RECORD, (json.dumps(record, indent=2) + "\n").encode(), 0o600)


announced = set()       # the directories that a dry run would have made by now


def make_directory(path, mode=0o755):
    if os.path.isdir(path) or path in announced:
        return
    if os.path.lexists(path):
        refuse(path, "is not a directory: move it away")
    make_directory(os.path.dirname(path))
    say("create " + show(path))
    announced.add(path)
    if not WOULD:
        if path != DATA:
            record["directories"].append(path)
            save_record()
        os.mkdir(path, mode)


def keep(path):
    """Copy what is at `path` beside it, and return the copy's name."""
    name = "%s.bak-%s" % (path, time.strftime("%Y%m%d-%H%M%S"))
    copy, number = name, 1
    while os.path.lexists(copy):
        number += 1
        copy = "%s-%d" % (name, number)
    say("keep the old %s as %s" % (show(path), os.path.basename(copy)))
    if not WOULD:
        if os.path.islink(path) and path != SETTINGS:       # a link may lead anywhere; the settings' text is meant
            os.symlink(os.readlink(path), copy)
        else:
            shutil.copy2(path, temporary_of(path, "old"))
            os.replace(temporary_of(path, "old"), copy)
    return copy


def same_program(path, data):
    """Whether `path` is rrouter as shipped, whatever interpreter its first line names."""
    return not os.path.islink(path) and read(path).partition(b"\n")[2] == data.partition(b"\n")[2]


def put(path, data, mode, changed, foreign="replace", try_out=None):
    """Install `data` as `path`.

    `changed` and `foreign` say what happens to a file that was changed since we wrote it, or is not ours at all:
    "replace" (a copy is kept) or "leave".
    """
    if os.path.isdir(path):
        refuse(path, "is a directory: move it away")
    entry = record["files"].get(path, {})
    old, new = digest(path), hashlib.sha256(data).hexdigest()
    ours = old in entry.get("sha256", ()) or old and foreign == "replace" and same_program(path, data)
    backup = entry.get("backup")
    replaced = old and not ours and (not backup or digest(backup) != old)     # equal: stopped before the rename
    if replaced and (changed if entry else foreign) == "leave":
        say("leave %s as it is: %s" % (show(path), "changed since it was installed" if entry else "it is yours"))
        return
    make_directory(os.path.dirname(path))
    staged = None if WOULD else stage(path, data, mode)
    if staged and try_out:
        try_out(staged)
    if replaced:
        kept = keep(path)
        backup = backup if entry else kept      # what was there before us comes back, later copies just stay
    say(("leave %s, it is up to date" if old == new else "upgrade %s" if ours else "install %s") % show(path))
    record["files"][path] = {"sha256": [old, new] if ours else [new], "backup": backup}
    save_record()
    if staged:
        os.replace(staged, path)


def put_program():
    data = read(os.path.join(HERE, "rrouter.py"))
    if data.startswith(b"#!"):
        data = data.partition(b"\n")[2]
    line = '#!/usr/bin/env -S "%s"' % PYTHON if " " in PYTHON else "#!" + PYTHON
    put(PROGRAM, os.fsencode(line) + b"\n" + data, 0o755, changed="replace", try_out=try_program)


def try_program(path):
    """See that the program starts where it is going to be, before it takes the old one's place."""
    status, output = call(path, "--version")
    if status:
        with open(path, "rb") as file:
            line = os.fsdecode(file.readline().strip())
        os.unlink(path)
        refuse(os.path.dirname(path), "rrouter does not start here with the first line %s: %s" % (line, output))


def put_environment():
    """A service has no shell: hand it what this shell sets for rrouter."""
    values = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if not values:
        return
    for name, value in values.items():
        if not value.isprintable() or set(value) & set("'\\"):
            sys.exit("install.sh: %s: %r cannot be passed on to a service" % (name, value))
    if digest(ENVIRONMENT) in record["files"].get(ENVIRONMENT, {}).get("sha256", ()):
        lines = read(ENVIRONMENT).decode().splitlines()[1:]         # as written below: what is not set now stays
        values = dict([(name, value[1:-1]) for name, _, value in (line.partition("=") for line in lines)], **values)
    text = "# Environment of the rrouter service, in force from the next `rrouter restart` on.\n"
    put(ENVIRONMENT, (text + "".join("%s='%s'\n" % pair for pair in values.items())).encode(), 0o600,
        changed="leave", foreign="leave")


def owns(path, source=""):
    """Whether `path` was installed by us; without a record, whether it looks so."""
    if path in record["files"]:
        return True
    source = os.path.join(HERE, source)
    return os.path.isfile(path) and os.path.isfile(source) and same_program(path, read(source))


def take_back(path, source=""):
    remove_temporary(path)
    if not owns(path, source):
        if os.path.lexists(path):
            say("leave %s as it is: not installed by install.sh" % show(path))
        return
    entry = record["files"].get(path) or {"sha256": [digest(path)], "backup": None}
    now, backup = digest(path), entry["backup"]
    if backup and not os.path.lexists(backup):
        backup = None
    if backup and now == digest(backup):        # an installation stopped before it put ours in its place
        say("leave %s, it was never replaced" % show(path))
        if not WOULD:
            os.unlink(backup)
    else:
        if now and now not in entry["sha256"]:
            keep(path)
        if backup:
            say("put the old %s back" % show(path))
        elif now:
            say("remove " + show(path))
        if not WOULD and backup:
            os.replace(backup, path)
        elif not WOULD and now:
            os.unlink(path)
    record["files"].pop(path, None)
    save_record()


def take_back_directories():
    for path in reversed(record["directories"]):
        if WOULD:
            say("remove %s if nothing else is in it" % show(path))
        elif os.path.isdir(path) and not os.path.islink(path) and not os.listdir(path):
            say("remove " + show(path))
            os.rmdir(path)


# settings.json of Claude Code ---

def unique(pairs):
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is there twice")
    return values


def constant(name):
    raise ValueError("%s is not JSON" % name)


def load_settings():
    """Return (bytes, content); (None, {}) without a file.  Refuses what could not be written back unharmed."""
    try:
        data = read(SETTINGS)
    except FileNotFoundError:
        return None, {}
    except OSError as problem:
        refuse(SETTINGS, "cannot be read: %s" % problem.strerror)
    try:
        settings = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
        json.dumps(settings, allow_nan=False)
    except (ValueError, RecursionError) as problem:
        refuse(SETTINGS, "is not JSON (%s): left untouched; repair it, then run this again" % problem)
    if not isinstance(settings, dict) or not isinstance(settings.get("env", {}), dict):
        refuse(SETTINGS, "%s is not an object: left untouched; repair it, then run this again" % (
            "env" if isinstance(settings, dict) else "the whole"))
    return data, settings


def settings_text(old, settings):
    """Return the settings as bytes, in the form the old ones had."""
    first = (old or b"").partition(b"\n")[2]
    indent = first[:len(first) - len(first.lstrip(b" \t"))].decode() or "  "
    try:
        data = json.dumps(settings, indent=indent, ensure_ascii=False).encode()
    except UnicodeEncodeError:      # half a surrogate pair, which only an escape can hold
        data = json.dumps(settings, indent=indent).encode()
    return data + (b"\n" if old is None or old.endswith(b"\n") else b"")


def mode_of(path, otherwise):
    return stat.S_IMODE(os.stat(path).st_mode) if os.path.exists(path) else otherwise


def set_url(url):
    old, settings = load_settings()
    had = "env" in settings
    now = settings.get("env", {}).get(URL)
    if now == url:
        say("leave %s, it has this %s already" % (show(SETTINGS), URL))
        return
    make_directory(os.path.dirname(SETTINGS), 0o700)
    entry = record["claude"]
    untouched = entry and old is not None and hashlib.sha256(old).hexdigest() == entry["sha256"]
    backup = keep(SETTINGS) if old is not None and not untouched else None
    if not entry or now not in entry["written"]:
        before = None if old is None else {"env": {URL: now} if URL in settings["env"] else {}} if had else {}
        entry = {"before": before, "written": [], "backup": backup}
    elif not untouched:
        entry["backup"] = None      # it lacks what has been changed since: not to be put back as a whole
    settings.setdefault("env", {})[URL] = url
    new = settings_text(old, settings)
    entry.update(written=entry["written"] + [url], sha256=hashlib.sha256(new).hexdigest())
    record["claude"] = entry
    say("set env.%s = %s in %s" % (URL, url, show(SETTINGS)))
    if not WOULD:
        save_record()
        write(os.path.realpath(SETTINGS), new, mode_of(SETTINGS, 0o600))


def wrote_url():
    """Whether settings.json holds a URL of an earlier installation, which must not go stale."""
    return bool(record["claude"]) and load_settings()[1].get("env", {}).get(URL) in record["claude"]["written"]


def current_url():
    """Return our key's value, or None; what is wrong with the file is nothing to those who only look."""
    try:
        return json.loads(read(SETTINGS))["env"][URL]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def restore_url():
    remove_temporary(SETTINGS)
    remove_temporary(os.path.realpath(SETTINGS))
    url, entry = current_url(), record["claude"]
    if entry and url in entry["written"]:
        say("put env.%s in %s back as it was" % (URL, show(SETTINGS)))
        undo_url(*load_settings(), entry)
    elif isinstance(url, str) and any(name in url for name in ("//localhost:", "//127.0.0.1:")):
        say("leave %s: env.%s = %s is not what install.sh wrote; if it means rrouter, take it out" % (
            show(SETTINGS), URL, url))
    record["claude"] = None
    save_record()


def undo_url(old, settings, entry):
    before, backup = entry["before"], entry["backup"]
    if hashlib.sha256(old).hexdigest() == entry["sha256"] and (before is None or backup and os.path.exists(backup)):
        new = None if before is None else read(backup)      # nothing else was changed: the very bytes
    else:
        backup = None
        keep(SETTINGS)
        env = settings["env"]
        env.update((before or {}).get("env", {}))
        if URL not in (before or {}).get("env", {}):
            del env[URL]
        if not env and "env" not in (before or {}):
            del settings["env"]
        new = None if before is None and not settings else settings_text(old, settings)
    if WOULD:
        return
    if new is None:
        os.unlink(os.path.realpath(SETTINGS))
    else:
        write(os.path.realpath(SETTINGS), new, mode_of(SETTINGS, 0o600))
    if backup:
        os.unlink(backup)


def hint(url):
    """Say what Claude Code needs, unless it has been done."""
    if os.environ.get("CLAUDE_CONFIG_DIR"):
        print("CLAUDE_CONFIG_DIR is set: Claude Code reads settings.json there, not in ~/.claude.")
    if WOULD and EXTRA:
        return
    if current_url() == url:
        print("Claude Code: %s has %s = %s." % (show(SETTINGS), URL, url))
    else:
        print("Claude Code: put this into %s (`./install.sh --claude` does it):\n%s" % (
            show(SETTINGS), json.dumps({"env": {URL: url}}, indent=2)))


# rrouter ---

def rrouter(*arguments):
    """Return a command of the version that is being installed."""
    return (PYTHON, os.path.join(HERE, "rrouter.py")) + arguments


def check():
    """Refuse early what would fail half-way."""
    if not os.path.isdir(HOME):
        refuse(HOME, "HOME is not a directory")
    if os.geteuid() == 0 and os.stat(HOME).st_uid != 0:
        refuse(HOME, "belongs to another user: run install.sh as that user, without sudo")
    if ACTION == "install" and EXTRA or record["claude"]:
        load_settings()
    if ACTION == "install" and any(os.environ.get(name) for name in VARIABLES):
        sys.path.insert(0, HERE)
        module = importlib.import_module("rrouter")
        try:
            module.read_environment(dict(os.environ))
        except module.RouterError as problem:
            sys.exit("install.sh: %s" % problem)


def health():
    """Return what the running daemon says of itself; {} if it does not answer, None if none runs."""
    status, output = call(*rrouter("status", "--json"), stderr=subprocess.DEVNULL)
    if status == 3:
        return None
    try:
        return json.loads(output)
    except ValueError:
        return {}


def settings_to_keep(state):
    """Return, as RROUTER_*, what the running daemon (`state`) was started with and this shell does not set."""
    try:
        run = json.loads(read(os.path.join(DATA, "run.json")))
        if state is None or state.get("pid", run["pid"]) != run["pid"]:
            return {}
        return {name: str(run[key]) for name, key in zip(VARIABLES, ("port", "upstream", "host"))
                if not os.environ.get(name)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}       # it did not write what it runs with


def wait_for_url():
    """Return the URL of the daemon as soon as it answers; in a dry run, the one to expect."""
    end = time.monotonic() + (0 if WOULD else ANSWER_S)
    state = health()
    while not state and time.monotonic() < end:
        time.sleep(0.1)
        state = health()
    if not state and not WOULD:
        found = [line for line in call(*rrouter("check"))[1].splitlines() if line.startswith("fail")]
        sys.exit("\n  ".join(["install.sh: rrouter was started but does not answer: see ~/.rrouter/logs"] + found))
    address = state["listenAddr"] if state else "localhost:" + (os.environ.get("RROUTER_PORT") or "8316")
    host, _, port = address.rpartition(":")
    return "http://%s:%s" % ("localhost" if host in ("", "*", "0.0.0.0", "::", "[::]") else host, port)


# Service managers ---

class Systemd:
    """The user's own instance of systemd."""

    name, source = "systemd", "rrouter.service"
    path = os.path.join(CONFIGURATION, "systemd", "user", source)
    link = os.path.join(CONFIGURATION, "systemd", "user", "default.target.wants", source)

    def problem(self):
        """Return why it cannot be used, or None."""
        status, output = call("systemctl", "--user", "show-environment")
        return "systemctl --user does not answer: " + output if status else None

    def start(self):
        """Have the installed unit started, anew if it runs; return whether it was."""
        if not (step("systemctl", "--user", "daemon-reload") and step("systemctl", "--user", "enable", self.source)):
            return False
        self._forgive()
        return step("systemctl", "--user", "restart", self.source)

    def stop(self):
        step("systemctl", "--user", "disable", "--now", self.source)

    def forget(self):
        """The unit is gone."""
        step("systemctl", "--user", "daemon-reload")
        self._forgive()

    def _forgive(self):
        """Forget earlier failures, or they count against the next start."""
        if not WOULD:
            call("systemctl", "--user", "reset-failed", self.source)

    def clean_up(self):
        """Remove what `enable` made, where systemctl cannot be asked to."""
        if os.path.islink(self.link):
            say("remove " + show(self.link))
            if not WOULD:
                os.unlink(self.link)
                if not os.listdir(os.path.dirname(self.link)):
                    os.rmdir(os.path.dirname(self.link))


class Launchd:
    """The launchd of the user's session at the screen."""

    name, source = "launchd", "com.rrouter.plist"
    path = os.path.join(HOME, "Library", "LaunchAgents", source)
    domain = "gui/%d" % os.getuid()
    job = domain + "/com.rrouter"

    def problem(self):
        status, output = call("launchctl", "print", self.domain)
        return "launchctl does not know %s, is nobody logged in at the screen? %s" % (
            self.domain, output) if status else None

    def start(self):
        self.stop()     # not kickstart: it would go on with the plist as it was loaded
        if not WOULD:
            call("launchctl", "enable", self.job)
        return step("launchctl", "bootstrap", self.domain, self.path)

    def stop(self):
        """Unload the job, and wait until it is gone: it has time to finish its streams."""
        if self._is_loaded():
            step("launchctl", "bootout", self.job)
            end = time.monotonic() + UNLOAD_S
            while not WOULD and self._is_loaded() and time.monotonic() < end:
                time.sleep(0.2)

    def _is_loaded(self):
        return call("launchctl", "print", self.job)[0] == 0

    def forget(self):
        pass

    def clean_up(self):
        pass


def find_manager():
    """Return (the service manager of this system that answers, or None; why there is none)."""
    system = call("uname", "-s")[1]
    manager = {"Linux": Systemd, "Darwin": Launchd}.get(system)
    if not manager:
        return None, "none is known for " + system
    problem = manager().problem()
    return (None, problem) if problem else (manager(), None)


def remove_service(answering):
    """Stop the service and take its file back, whether or not its manager is the one that answers."""
    for manager in (Systemd(), Launchd()):
        answers = answering is not None and answering.name == manager.name
        ours = owns(manager.path, manager.source)
        if ours and answers:
            manager.stop()
        take_back(manager.path, manager.source)
        if ours and answers:
            manager.forget()
        elif ours:
            manager.clean_up()


# The two actions ---

def install():
    check()
    state = health()
    manager, problem = find_manager()
    print("Python: " + PYTHON)
    make_directory(DATA, 0o700)
    put_program()
    for name, what, *command in (("mode", "set the mode to auto", "auto"),
                                 ("config.json", "write the default config", "config", "reset")):
        if not os.path.lexists(os.path.join(DATA, name)) and not step(*rrouter(*command), text=what):
            sys.exit(1)
    start(manager, problem, state)
    url = wait_for_url()
    if not WOULD:
        say("rrouter answers at " + url)
    if EXTRA or wrote_url():        # not before there is a daemon: it would cut Claude Code off
        set_url(url)
    print()
    check_path()
    hint(url)
    print("Then: rrouter status, rrouter check.")


def start(manager, problem, state):
    """Start the daemon, or the new version of the one that runs (`state`), by the manager if there is one."""
    kept = settings_to_keep(state)
    if manager:
        put_environment()
        if state is not None and state.get("startedBy") != manager.name:
            stop_rrouter("stop the running rrouter (started by %s)" % state.get("startedBy", "unknown"))
        put(manager.path, read(os.path.join(HERE, manager.source)), 0o644, changed="leave")
        if manager.start():
            return
        remove_service(manager)
        state, problem = None, "%s did not start it" % manager.name
    print("  no service: " + problem)
    os.environ.update(kept)
    command = "start" if state is None else "restart"
    if not step(PROGRAM, command, text="run rrouter %s instead; nothing starts it at the next login" % command):
        sys.exit(1)


def stop_rrouter(text):
    if not step(*rrouter("stop"), text=text):
        sys.exit(1)


def check_path():
    """Say what is missing for `rrouter` to be found."""
    directory = os.path.dirname(PROGRAM)
    if directory in os.environ.get("PATH", "").split(":"):
        first = shutil.which("rrouter")
        if first and first != PROGRAM and not WOULD:
            print("PATH: %s comes before %s: remove one of them." % (first, show(PROGRAM)))
        return
    shell = os.path.basename(os.environ.get("SHELL", ""))
    if shell == "fish":
        print("PATH: ~/bin is not in it; run: fish_add_path ~/bin")
    else:
        print("PATH: ~/bin is not in it; add this line to %s:\n  export PATH=\"$HOME/bin:$PATH\"" % {
            "zsh": "~/.zshrc", "bash": "~/.bashrc"}.get(shell, "~/.profile"))


def uninstall():
    check()
    restore_url()
    remove_service(find_manager()[0])
    stop_rrouter("stop rrouter if it runs")
    take_back(ENVIRONMENT)
    take_back(PROGRAM, "rrouter.py")
    take_back_directories()
    forget()


def forget():
    """Remove the record, and with --purge the data."""
    remove_temporary(RECORD)
    if not os.path.lexists(DATA):
        return
    say(("remove %s" if EXTRA else "leave %s: mode, config, state and logs") % show(DATA))
    if WOULD:
        return
    if not EXTRA:
        if os.path.exists(RECORD):
            os.unlink(RECORD)
    elif os.path.islink(DATA):
        os.unlink(DATA)
    else:
        shutil.rmtree(DATA)


os.umask(0o022)
try:
    record = load_record()
    {"install": install, "uninstall": uninstall}[ACTION]()
    sys.stdout.flush()
except OSError as problem:
    try:
        sys.stdout.flush()
    except OSError:                     # it would fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if isinstance(problem, BrokenPipeError):
        sys.exit(1 if WOULD else "install.sh: stopped, for nobody reads its output; run it again to go on")
    sys.exit("install.sh: %s" % problem)
except KeyboardInterrupt:
    sys.exit("install.sh: stopped; run it again to go on")
EOF
