#!/usr/bin/env python3
"""rrouter: a local router between the Claude Code CLI and CLIProxyAPI.

    Claude Code -> rrouter (localhost:8316) -> CLIProxyAPI (localhost:8317) -> Antigravity / Claude

The path of a request, each step a method or function of that name in this file:

    ProxyHandler.handle           a thread for each client connection, one request after the other
    ProxyHandler._handle_request  one request, or the error that refuses it
      ClientConnection.read_head    its head, strictly parsed
      check_origin, outbound_head   a web page's request is refused; Host becomes the upstream's
      ClientConnection.read_body    its whole body, because it may be sent twice
      find_model                    the model name in the body, and where it stands
    Exchange.run                  the request gets its number
    Exchange._forward             up to the response:
      Router.snapshot               config and mode as the files, or /@MODE, say at this moment
      decide_route                  the first matching rule names the model for a target
      Failover.admit                in auto mode: whose turn it is
      Attempt.run                   one try on one target
        splice                        the model name is replaced, nothing else
        Upstream.send                 on a kept or a new connection; the response head is read
        Attempt._hold_back            the response is held until it is known to be of use
        without_thinking              sent once more if the target rejects the history
      judge                         after a second attempt, on the other target: which failure
                                    counts, and which response the client gets
    Exchange._answer, _relay      the response is forwarded as it arrives (ResponseWriter)
      Exchange._settle              Failover learns the outcome (commit, credit, charge, release)
      Exchange._end                 the request is counted as ended; then its last bytes are sent
    Exchange._line                its line in the log

Files: ~/.rrouter/{mode,config.json,rrouter.pid,rrouter.lock,run.json,state.json,logs/rrouter.log}
Environment: RROUTER_PORT, RROUTER_UPSTREAM, RROUTER_HOST, RROUTER_ALLOWED_HOSTS.
Exit status: 0 done, 1 failed, 2 usage, 3 not running.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", sys.flags.isolated):
    del sys.path[0]     # the folder of this file, where any file could pose as a standard module

import argparse
import codecs
import contextlib
import datetime
import email.utils
import enum
import errno
import fcntl
import fnmatch
import http.client
import http.server
import ipaddress
import itertools
import json
import math
import os
import re
import select
import signal
import socket
import socketserver
import ssl
import stat
import struct
import threading
import time
import urllib.parse
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple, NoReturn, TypeVar, Union

__version__ = "5.0.0"


# Constants ####################################################################

DEFAULT_ENVIRONMENT = {
    "RROUTER_ALLOWED_HOSTS": "",
    "RROUTER_HOST": "localhost",
    "RROUTER_PORT": "8316",
    "RROUTER_UPSTREAM": "http://localhost:8317",    # CLIProxyAPI's default port
}
PORT_MAX = 65535
HOST_MAX = 253                  # characters; the longest name in DNS

DEFAULT_CONFIG: dict[str, Any] = {
    "modes": {
        "antigravity": {"mappings": [
            {"match": "claude-sonnet-*", "rewrite": "gemini-claude-sonnet-4-5-thinking"},
            {"match": "claude-opus-*", "rewrite": "gemini-claude-opus-4-5-thinking"},
            {"match": "claude-haiku-*", "rewrite": "gemini-3-flash-preview"}]},
        "claude": {"mappings": []},
    },
    "defaultMode": "claude",
    "auto": {
        "targets": ["antigravity", "claude"],
        "failureThreshold": 3,
        "timeoutThreshold": 2,              # lower, because each timeout costs the user minutes
        "cooldownMinutes": [30, 60, 120, 240],
        # Longer than the retries of CLIProxyAPI (90 s), and short enough for two attempts before
        # Claude Code gives up (358 s).
        "firstByteTimeoutSeconds": 150,
    },
}
MODE_AUTO = "auto"              # built in: config.json cannot define it

# The numbers that config.json may hold.  The low ends let a trial run in seconds; values beyond the
# high ends can only be typing errors.
THRESHOLDS = (1, 1000)
COOLDOWN_MINUTES = (0.0001, 525600)     # up to a year
FIRST_BYTE_S = (0.001, 86400)           # up to a day

# Auto mode.
# A response that is not streamed is generated as a whole before its first byte arrives.
UNSTREAMED_FACTOR = 2
UNSTREAMED_MAX_S = 280          # Claude Code gives up at 300 s, so a later timeout comes too late
RECHECK_S = 60                  # a shorter cooldown moves a conversation, uncached, back and forth
EVENT_S = 2                     # between failures that one event may have caused
EVENTS_REMEMBERED = 16          # failures that a later one is compared with
LONG_FAILURE_S = 60             # a failure this slow counts although the client did not wait longer
ABANDONED_S = 120               # of silence in a stream, after which a client gives the target up
MODELS_REMEMBERED = 256         # bounds the memory that names from outside can take
SESSIONS_REMEMBERED = 256
STAY_S = 300                    # a pause after which a prompt cache is gone, for auto.stay
STAY_MAX_S = 3600               # after a recovery, for a session that never pauses
MODEL_NAME_MAX = 256            # characters; a longer name has no failover machine

# Heads and bodies.  A smaller limit refuses real messages, a larger one lets a peer take memory.
HEAD_MAX_BYTES = 64 * 1024      # start line and fields together; nginx allows 32 KiB, Go 1 MiB
FIELDS_MAX = 200                # of a request; Claude Code sends about 23
LENGTH_DIGITS_MAX = 15          # of Content-Length and chunk sizes; fits a 64-bit integer
CHUNK_LINE_MAX_BYTES = 256      # size and extensions of one chunk
TRAILERS_MAX_BYTES = 8 * 1024
BODY_MAX_BYTES = 64 * 1024 * 1024   # of a request; Anthropic's API allows 32 MB
READ_AHEAD_MAX_BYTES = 1024 * 1024  # of a response held back; error bodies are a few KB
READ_AHEAD_S = 10               # from the head of an error response to its end

# Connections.
TICK_S = 0.5                    # how late a client that left is noticed; 1 s is promised
LIST_S = 5                      # for the whole list of models, when `check` asks for it
CONNECT_S = 3                   # per address of the upstream, which is on this machine or near it
IDLE_S = 300                    # between two requests; if less, clients reuse connections we close
HEAD_S = 15                     # for one request head; if more, a slow client holds a thread longer
BODY_STALL_S = 60               # without a byte of the request body, whose memory is held meanwhile
WRITE_STALL_S = 300             # without the client reading; Claude Code itself waits 300 s
LINGER_S = 1                    # for the client to close first; else a reset destroys the response
UNACKNOWLEDGED_S = 120          # until a remote connection is broken: Linux waits 15 min; a peer
                                # that lives but does not read for so long is broken off as well
POOL_MAX = 32                   # idle upstream connections; each one costs a descriptor
POOL_IDLE_S = 60                # if more, servers close them first, commonly after 60 s or later
CONNECTIONS_MAX = 512           # clients at once; each one costs a thread
CONNECTIONS_RESERVE = 16        # beyond those, for /health and for responding 503
BACKLOG = 128                   # VS Code opens 50 at once; with the default of 5 they wait seconds
RECEIVE_BYTES = 64 * 1024       # from the upstream; a larger buffer costs each event 10 %
REQUEST_BYTES = 256 * 1024      # from a client; 8 % faster than 64 KiB for a request of 77 KB
JOINED_BYTES = 64 * 1024        # a larger request costs more to copy than a second call to send
BODY_STEP_BYTES = 1024 * 1024   # with which the memory of a request body starts at most
STALE_S = 1                     # a kept connection that closes so soon was dead before
STOPPED_S = 1                   # beyond a wait: the process was stopped, and a time limit with it
RECONNECT_EVERY_S = 0.25        # while the upstream is not there,
RECONNECT_FOR_S = 15            # which a restart of CLIProxyAPI takes at most

# Files and the daemon.
POLL_S = 0.2                    # how often the watcher looks at the files; 0.25 s is promised
# A file younger than this may change without a new time stamp: the kernel's clock for them ticks
# every 4 to 10 ms.  Where they are whole seconds (HFS+, FAT, some network file systems) the second
# value holds.
SETTLED_S, SETTLED_COARSE_S = 0.05, 2
TRIM_S = 1                      # at least, between two returns of free memory to the system
FILE_MAX_BYTES = 1024 * 1024    # mode, config.json and state.json are a few KB
LOG_MAX_BYTES = 10 * 1024 * 1024    # of one log file
LOG_FILES = 3                   # rotated ones, beside the one being written
CUT_OFF_S = 1                   # for requests to end that the drain has not waited for
DRAIN_S = 30                    # for running requests after SIGTERM; systemd kills after 45 s
STATUS_SCOPES = 3               # in a status line: auto itself, and models that switched alone
HOOK_S = 10                     # for the program of auto.onSwitch
START_S = 15                    # for a new daemon to respond; the slowest machine seen takes 1 s

# RFC 9110 §7.6.1, and those that golang/go net/http/httputil/reverseproxy.go removes as well.
HOP_BY_HOP = frozenset((
    b"connection", b"proxy-connection", b"keep-alive", b"proxy-authenticate",
    b"proxy-authorization", b"te", b"trailer", b"transfer-encoding", b"upgrade"))

# The types that Anthropic's API uses with these statuses; Claude Code shows and sorts by them.
ERROR_TYPES = {
    403: "permission_error", 404: "not_found_error", 408: "timeout_error",
    413: "request_too_large", 500: "api_error", 502: "api_error", 503: "overloaded_error",
    504: "timeout_error"}

# Claude Code's patterns (lower case, without backticks), then the wordings of Gemini, which it does
# not know.  A row matches if all its words are present, in any order.
SIGNATURE_WORDINGS = (
    (b"signature in thinking block",),
    (b"invalid data in redacted_thinking block",),
    (b"thinking.signature", b"field required"),
    (b"thinking block", b"cannot be modified"),
    (b"thinking block", b"invalid signature"),
    (b"redacted_thinking", b"cannot be modified"),
    (b"redacted_thinking", b"invalid signature"),
    (b"corrupted thought signature",),
    (b"invalid thought signature",),
    (b"thought signature is not valid",),
    (b"bound to a different conversation",))
# Responses of CLIProxyAPI that come without asking a provider: statuses, words, name in the log.
UNKNOWN_MODEL = "unknown provider for model"
SHELF_WORDINGS = (
    ((503,), (b"auth_unavailable",), "auth_unavailable"),
    ((429,), (b"all credentials for model", b"cooling down"), "cooling down"),
    ((429, 503), (b"model_cooldown",), "model_cooldown"),
    ((400, 502), (b"unknown provider for model",), UNKNOWN_MODEL))

# What targets say of a request beyond their limits, in lower case.
TOO_LARGE_WORDINGS = tuple((words,) for words in (
    b"prompt is too long", b"exceeds the context window", b"exceeds the maximum number of tokens",
    b"input is too long", b"prompt token count of", b"prompt_too_long", b"context length exceeded",
    b"request too large"))
THINKING_TYPES = ("thinking", "redacted_thinking")
EMPTY_CONTENT = b'{"type":"text","text":"(no content)"}'    # the API refuses []


# Errors #######################################################################

class RouterError(Exception):
    """A failure described for the user: the thing, what is wrong with it, what to do."""

    http_status = 500
    exit_code = 1


class ConfigError(RouterError):
    """config.json is unusable; the message begins with line:column or with the JSON path."""


class StateError(RouterError):
    """state.json is unusable."""


class UsageError(RouterError):
    """A command or an environment variable is invalid."""

    exit_code = 2


class DaemonError(RouterError):
    """The daemon does not start, respond or stop."""


class RequestError(RouterError):
    """The client's request is refused with `http_status`.

    Its connection is closed, because the bytes that follow cannot be trusted.
    """

    def __init__(self, http_status: int, message: str, logged: str = "") -> None:
        super().__init__(message)
        self.http_status = http_status
        self.logged = logged or message     #: for the log, without values that the client sent


class ClientGone(RouterError):
    """The client left or broke its request off, so no response can reach it."""

    def __init__(self, message: str = "the client left") -> None:
        super().__init__(message)


class UpstreamError(RouterError):
    """The upstream broke off or sent something other than HTTP."""

    http_status = 502
    what = "connection dropped"
    remedy = "see the log of CLIProxyAPI"


def without_trace(error: UpstreamError) -> UpstreamError:
    """Return `error` without its traceback and causes, so that it can be kept.

    Their frames hold the request, which would hold the error: the body of each failed request would
    stay in memory until the garbage collector runs.
    """
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


class UpstreamUnreachable(UpstreamError):
    """No connection could be opened; the providers of the upstream are not to blame."""

    what = "upstream unreachable"
    remedy = "start CLIProxyAPI or set RROUTER_UPSTREAM"


class UpstreamTimeout(UpstreamError):
    """The upstream sent no first byte in time."""

    http_status = 504
    what = "timeout"
    remedy = "see the log of CLIProxyAPI, or raise auto.firstByteTimeoutSeconds"


# Values #######################################################################

BytesLike = Union[bytes, bytearray, memoryview]
T = TypeVar("T")


class Rule(NamedTuple):
    """One mapping: model names that match the glob `match` become `rewrite`.

    With a glob `agent` or `request_class` only in requests of such an agent or class.
    """

    match: str
    rewrite: str
    agent: str = ""
    request_class: str = ""


class AutoSettings(NamedTuple):
    """The `auto` section of config.json."""

    targets: tuple[str, str]
    failure_threshold: int
    timeout_threshold: int
    cooldowns_s: tuple[float, ...]
    first_byte_s: float
    stay_s: float = STAY_S      #: the pause after which a session returns to a recovered target
    on_switch: tuple[str, ...] = ()     #: a program and its arguments, run at each move

    def first_byte_limit_s(self, streamed: bool) -> float:
        """Return how long an attempt may stay silent, in seconds."""
        if streamed:
            return self.first_byte_s
        return min(self.first_byte_s * UNSTREAMED_FACTOR, UNSTREAMED_MAX_S)


class Config(NamedTuple):
    """The content of a valid config.json."""

    modes: dict[str, tuple[Rule, ...]]
    default_mode: str
    auto: AutoSettings
    auto_error: str             #: why mode auto cannot be used; "" if it can
    problems: tuple[str, ...]   #: complaints that do no harm

    @property
    def usable_modes(self) -> list[str]:
        """The names of the modes, `auto` among them if it can be used."""
        return [*self.modes] + [MODE_AUTO] * (not self.auto_error)

    def resolve(self, mode: str) -> str:
        """Return the mode in force for `mode`, one of the modes or a usable `auto`."""
        if mode in self.modes or (mode == MODE_AUTO and not self.auto_error):
            return mode
        if mode != MODE_AUTO and self.default_mode == MODE_AUTO and not self.auto_error:
            return MODE_AUTO
        return self.default_mode if self.default_mode in self.modes else next(iter(self.modes))


class Snapshot(NamedTuple):
    """Config and mode, always read together; a request uses one from its beginning to its end."""

    config: Config
    mode: str                   #: the mode in force
    problems: tuple[str, ...]


class Route(NamedTuple):
    """Where a request goes: the target, and the model name to send there."""

    target: str
    model: str | None


class Fields(NamedTuple):
    """The fields of a head: the values that the router reads, and the lines that it forwards."""

    values: dict[bytes, list[bytes]]    #: by lower-case name, one for each line
    options: set[bytes]                 #: what Connection lists, in lower case
    end_to_end: list[bytes]             #: bytes untouched, each line with its CR LF

    def all(self, name: bytes) -> list[bytes]:
        """Return the values of the field `name`, line by line; none if it is absent."""
        return self.values.get(name, [])

    def text(self, name: bytes) -> str:
        """Return the first value of the field `name`; "" if it is absent."""
        return self.all(name)[0].decode("latin-1") if name in self.values else ""


class RequestHead(NamedTuple):
    """A request line and its fields, valid and unambiguous."""

    method: str
    target: bytes               #: in origin form (or `*`), without /@MODE, bytes untouched
    authority: str              #: the host the client asks for; "" in HTTP/1.0 without Host
    http11: bool
    fields: Fields
    length: int | None          #: of the body, in bytes; None if it is chunked
    keep_alive: bool
    expects_continue: bool
    path: str                   #: the target without its query, which may hold secrets
    mode: str | None            #: what /@MODE at the beginning of the target names, in lower case


class ResponseHead(NamedTuple):
    """A status line and its fields, valid and unambiguous."""

    status: int
    reason: bytes
    end_to_end: bytes           #: the field lines to forward, bytes untouched
    values: dict[bytes, list[bytes]]    #: see `Fields`
    length: int | None          #: None if the body is chunked or ends with the connection
    chunked: bool
    keep_alive: bool

    def value(self, name: bytes) -> str:
        """Return the first value of the field `name`, in lower case; "" if it is absent."""
        values = self.values.get(name)
        return values[0].lower().decode("latin-1") if values else ""

    @property
    def is_event_stream(self) -> bool:
        """True if the body is server-sent events."""
        return self.value(b"content-type").startswith("text/event-stream")

    @property
    def coding(self) -> str:
        """The content encoding of the body, "" for none."""
        coding = self.value(b"content-encoding")
        return "" if coding == "identity" else coding


class Fault(enum.Enum):
    """Why an attempt failed, as far as judging needs to know it."""

    STATUS = "status"           #: HTTP 400 and above
    TOO_LARGE = "too large"     #: a request that this target cannot take
    REJECTED = "rejected"       #: thinking signatures of another backend, with nothing to remove
    SHELF = "shelf"             #: CLIProxyAPI responded without asking a provider
    NO_MESSAGE = "no message"   #: a 2xx without a message, or with an empty one
    TIMEOUT = "timeout"
    DROPPED = "dropped"         #: the connection dropped, or what came is not HTTP
    UNREACHABLE = "unreachable"
    OWN = "own"                 #: an error that another rrouter generated
    LEFT = "left"               #: the client left before the attempt ended


class Outcome(NamedTuple):
    """How one attempt ended, as far as it is known before the client has received a byte."""

    fault: Fault | None         #: None: the attempt succeeded
    status: int                 #: of the response; of rrouter's own error where none came
    what: str                   #: the status or the fault, for people
    began: float = 0.0          #: Unix seconds
    ended: float = 0.0
    retry_after_s: float | None = None
    keeps_400: bool = False     #: the healed send failed, and the client gets the original 400
    direct: bool = False        #: it came after the first content and could not be rescued


LEFT = Outcome(Fault.LEFT, 499, "the client left")


class Verdict(NamedTuple):
    """What the outcomes of one request mean."""

    counts: tuple[bool, bool]   #: whether the first and the second failure count
    chosen: int                 #: whose response the client gets: 0 or 1


class Ticket(NamedTuple):
    """The right to one attempt; it goes out with `admit` and comes back with its outcome."""

    target: str
    model: str
    alone: bool                 #: the model follows a machine of its own
    generation: int             #: of the machine when the attempt began
    probe: int = 0              #: number of the probe this is; 0 for none
    quiet: bool = False         #: a probe of the shelf, logged only if its response changes
    session: str = ""           #: "" if the client names none


class Settings(NamedTuple):
    """Where to listen and where to send, from the environment."""

    host: str
    port: int
    upstream: str
    allowed_hosts: tuple[str, ...] = ()     #: names for Host besides those of loopback

    @property
    def listen_addr(self) -> str:
        """The address as people write it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


# Text #########################################################################

def printable(text: str, limit: int = 300) -> str:
    """Return at most `limit` characters of `text`, safe in a log line, a header or a terminal.

    Everything but printable ASCII is escaped, which adds to the length.
    """
    if len(text) > limit:
        text = text[:limit] + "..."
    if text.isascii() and text.isprintable():
        return text
    # No codec such as `unicode_escape`: Python loads it at its first use, and an upgrade may have
    # removed it by then.
    return "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in text)


def span(seconds: float) -> str:
    """Return a duration as people say it: 30m, 90s."""
    whole = math.ceil(seconds)
    return f"{whole // 60}m" if whole >= 60 and whole % 60 == 0 else f"{whole}s"


def tidy(number: float) -> float:
    """Return `number` as an int if it is whole, so that JSON shows no ".0"."""
    return int(number) if number == int(number) else number


def utc(when: float | None) -> str | None:
    """Return a time (Unix seconds) as 2026-01-29T15:00:00Z; None for None."""
    if when is None:
        return None
    moment = datetime.datetime.fromtimestamp(int(when), datetime.timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def reason_of(error: OSError) -> str:
    """Return the system's words for `error`, in lower case."""
    return (error.strerror or str(error) or type(error).__name__).lower()


def error_body(status: int, message: str) -> bytes:
    """Return an error of rrouter in Anthropic's shape, so that Claude Code shows the message."""
    kind = ERROR_TYPES.get(status, "invalid_request_error")
    error = {"type": kind, "message": f"rrouter: {message}"}
    return json.dumps({"type": "error", "error": error}).encode("ascii")


def describe_defect(error: BaseException | None) -> str:
    """Return the place and the kind of an internal error in one line.

    Values stay out of it, because they may be the user's.
    """
    where, trace = [], error.__traceback__ if error is not None else None
    while trace is not None:
        where.append(f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"internal error: {type(error).__name__} at {' > '.join(where)}; please report it"


# Configuration ################################################################

# The first alternative skips strings.  Its closing quote is optional, because looking for a missing
# one from each quote would take hours in 1 MB of \".  The second matches what json.loads accepts
# but JSON forbids, and integers that it may refuse without a position (4,300 digits by default).
_STRING_OR_ODD_NUMBER = re.compile(
    r'(?s)"[^"\\]*(?:\\.[^"\\]*)*"?|(?P<odd>NaN|-?Infinity|[0-9]{1000,})')
_EXCERPT_CHARS = 20             # of the text, in a complaint about it


def _check_numbers(text: str) -> None:
    for match in _STRING_OR_ODD_NUMBER.finditer(text):
        odd = match["odd"]
        if odd:
            before = text[:match.start()]
            line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
            raise ConfigError(f"{line}:{column}: expected a plain JSON number, found "
                              + printable(odd, _EXCERPT_CHARS))


def _parse_json(text: str) -> Any:
    _check_numbers(text)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        what = error.msg[0].lower() + error.msg[1:].replace("Expecting", "expecting")
        rest = text[error.pos:error.pos + _EXCERPT_CHARS]
        found = repr(rest) if rest else "the end of the file"
        raise ConfigError(f"{error.lineno}:{error.colno}: {what}, found {found}") from error
    except RecursionError as error:     # 100,000 brackets
        raise ConfigError("1:1: expected an object of modes, found nesting that is too deep"
                          ) from error


def _found(value: Any) -> str:
    """Return `value` as it stands in a complaint."""
    try:
        return printable(json.dumps(value), limit=60)
    except RecursionError:              # json.loads gets a little deeper than json.dumps
        return "nesting that is too deep"


def _members(value: Any, what: str, prefix: str, known: Collection[str],
             problems: list[str]) -> dict[str, Any]:
    """Return the object `value`; add each member that is not `known` to `problems`."""
    if not isinstance(value, dict):
        raise ConfigError(f"{what}: expected an object, found {_found(value)}")
    problems.extend(f"{prefix}{printable(key)}: unknown key, ignored; known are {', '.join(known)}"
                    for key in value if key not in known)
    return value


_RULE_KEYS = dict(zip(("match", "rewrite", "agent", "class"), Rule._fields))


def _parse_rule(value: Any, path: str, problems: list[str]) -> Rule:
    members = _members(value, path, f"{path}.", _RULE_KEYS, problems)
    for key in ("match", "rewrite"):
        if key not in members:
            raise ConfigError(f"{path}.{key}: missing, expected a string")
    given = {key: members[key] for key in _RULE_KEYS if key in members}
    for key, text in given.items():
        if not isinstance(text, str) or not text:
            raise ConfigError(f"{path}.{key}: expected a string that is not empty, "
                              f"found {_found(text)}")
        try:
            re.compile(fnmatch.translate(text) if key != "rewrite" else "")
        except re.error as error:       # [z-a], before Python 3.10
            raise ConfigError(f"{path}.{key}: expected a glob, found {_found(text)}") from error
    return Rule(**{_RULE_KEYS[key]: text for key, text in given.items()})


def _is_mode_name(name: str) -> bool:
    """Return whether `name` can be typed as a command and written to the mode file."""
    return bool(name) and name == name.lower() == printable(name) and name.split() == [name]


def _parse_modes(value: Any, problems: list[str]) -> dict[str, tuple[Rule, ...]]:
    if not isinstance(value, dict) or not value:
        raise ConfigError("modes: expected an object with at least one mode, found "
                          + _found(value))
    modes = {}
    for name, mode in value.items():
        path = f"modes.{printable(name)}"
        if name == MODE_AUTO:
            raise ConfigError(f"{path}: expected another name, found auto, which is built in")
        if not _is_mode_name(name):
            raise ConfigError(f"{path}: expected a name in lower-case ASCII without spaces, "
                              f"found {_found(name)}")
        mappings = _members(mode, path, f"{path}.", ("mappings",), problems).get("mappings", [])
        if not isinstance(mappings, list):
            raise ConfigError(f"{path}.mappings: expected a list, found {_found(mappings)}")
        modes[name] = tuple(_parse_rule(rule, f"{path}.mappings[{index}]", problems)
                            for index, rule in enumerate(mappings))
    return modes


def _number(value: Any, path: str, limits: tuple[float, float], whole: bool = False) -> float:
    low, high = limits
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise ConfigError(f"{path}: expected a {'whole ' if whole else ''}number "
                          f"from {low} to {high}, found {_found(value)}")
    return value


def _threshold(value: Any, path: str) -> int:
    return int(_number(value, path, THRESHOLDS, whole=True))


def _parse_auto(value: Any, problems: list[str]) -> AutoSettings:
    members = {**DEFAULT_CONFIG["auto"], "stay": STAY_S / 60, "onSwitch": []}
    members.update(_members(value, "auto", "auto.", tuple(members), problems))
    targets, minutes, hook = (members[key] for key in ("targets", "cooldownMinutes", "onSwitch"))
    if not (isinstance(targets, list) and len(targets) == 2
            and all(isinstance(target, str) for target in targets) and targets[0] != targets[1]):
        raise ConfigError("auto.targets: expected two different names of modes, found "
                          + _found(targets))
    if not isinstance(minutes, list) or not minutes:
        raise ConfigError("auto.cooldownMinutes: expected a list of minutes, found "
                          + _found(minutes))
    if not isinstance(hook, list) or not all(isinstance(word, str) for word in hook):
        raise ConfigError("auto.onSwitch: expected a list of strings, a program and its arguments, "
                          f"found {_found(hook)}")
    return AutoSettings(
        targets=(targets[0], targets[1]),
        failure_threshold=_threshold(members["failureThreshold"], "auto.failureThreshold"),
        timeout_threshold=_threshold(members["timeoutThreshold"], "auto.timeoutThreshold"),
        cooldowns_s=tuple(60.0 * _number(cooldown, f"auto.cooldownMinutes[{i}]", COOLDOWN_MINUTES)
                          for i, cooldown in enumerate(minutes)),
        first_byte_s=_number(members["firstByteTimeoutSeconds"], "auto.firstByteTimeoutSeconds",
                             FIRST_BYTE_S),
        stay_s=60 * _number(members["stay"], "auto.stay", (0, STAY_MAX_S // 60)),
        on_switch=tuple(hook))


def _parse_default_mode(top: dict[str, Any], modes: Collection[str]) -> str:
    """Return `defaultMode`; if it is missing, the built-in one or else the first mode."""
    if "defaultMode" not in top:
        built_in: str = DEFAULT_CONFIG["defaultMode"]
        return built_in if built_in in modes else next(iter(modes))
    name = top["defaultMode"]
    if isinstance(name, str) and (name == MODE_AUTO or name in modes):
        return name
    raise ConfigError(f"defaultMode: expected one of {', '.join([*sorted(modes), MODE_AUTO])}, "
                      f"found {_found(name)}")


def _find_auto_error(targets: tuple[str, str], modes: Collection[str]) -> str:
    """Return why mode auto cannot be used; "" if it can."""
    unknown = ", ".join(_found(target) for target in targets if target not in modes)
    if not unknown:
        return ""
    return (f"auto.targets: {unknown}: not among the modes ({', '.join(modes)}), "
            "so mode auto cannot be used")


def parse_config(text: str) -> Config:
    """Return the configuration in the JSON text `text`; raise ConfigError if any part is wrong."""
    problems: list[str] = []
    top = _members(_parse_json(text), "the top level", "", ("modes", "defaultMode", "auto"),
                   problems)
    if "modes" not in top:
        raise ConfigError("modes: missing, expected an object of modes")
    modes = _parse_modes(top["modes"], problems)
    default_mode = _parse_default_mode(top, modes)
    auto = _parse_auto(top.get("auto", {}), problems)
    auto_error = _find_auto_error(auto.targets, modes)
    # The built-in targets do not matter to a config that never uses auto.
    if auto_error and ("targets" in top.get("auto", {}) or default_mode == MODE_AUTO):
        problems.append(auto_error)
    return Config(modes, default_mode, auto, auto_error, tuple(problems))


def config_of(content: bytes | None) -> Config:
    """Return the configuration in a file with this content; the embedded default for None.

    Raises ConfigError or UnicodeDecodeError.
    """
    if content is None:
        return parse_config(json.dumps(DEFAULT_CONFIG))
    return parse_config(content.decode("utf-8").removeprefix("\ufeff"))


def config_text(config: Config) -> str:
    """Return the JSON text that `parse_config` reads as `config`."""
    auto = config.auto
    optional: dict[str, Any] = {"onSwitch": list(auto.on_switch)} if auto.on_switch else {}
    if auto.stay_s != STAY_S:
        optional["stay"] = tidy(auto.stay_s / 60)
    return json.dumps({
        "modes": {name: {"mappings": [{key: text for key, text in zip(_RULE_KEYS, rule) if text}
                                      for rule in rules]}
                  for name, rules in config.modes.items()},
        "defaultMode": config.default_mode,
        "auto": {
            "targets": list(auto.targets),
            "failureThreshold": auto.failure_threshold,
            "timeoutThreshold": auto.timeout_threshold,
            "cooldownMinutes": [tidy(seconds / 60) for seconds in auto.cooldowns_s],
            "firstByteTimeoutSeconds": tidy(auto.first_byte_s), **optional},
    }, indent=2, ensure_ascii=False)


def mode_word(content: bytes | None) -> str | None:
    """Return the word in the mode file, or None if the file does not exist.

    Windows PowerShell writes UTF-16, or UTF-8 with a byte order mark.
    """
    if content is None:
        return None
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if is_utf_16 else "utf-8", "backslashreplace")
    return text.removeprefix("\ufeff").strip().lower()


def describe_config_error(error: Exception) -> str:
    """Return one line that says what is wrong with config.json and where."""
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return f"config.json: expected UTF-8, found byte 0x{byte:02x} at offset {error.start}"
    if isinstance(error, OSError):
        return f"config.json: cannot be read: {reason_of(error)}"
    text = str(error)
    return f"config.json{':' if text[:1].isdigit() else ': '}{text}"


def _is_host_name(host: str) -> bool:
    """Return whether a lookup of `host` is possible: no label empty or over 63 characters."""
    try:
        return bool(host.encode("idna"))
    except UnicodeError:
        return False


def _is_host(host: str) -> bool:
    return bool(re.fullmatch("[A-Za-z0-9._:%-]+", host) and len(host) <= HOST_MAX
                and _is_host_name(host))


def _is_upstream_url(text: str) -> bool:
    """Return whether `text` is http://HOST[:PORT][/PATH], or the same with https."""
    try:
        url = urllib.parse.urlsplit(text)
        return bool(
            url.scheme in ("http", "https") and url.hostname and _is_host_name(url.hostname)
            and url.port != 0 and "@" not in url.netloc and not url.query and not url.fragment
            and re.fullmatch("[!-~]+", text))
    except ValueError:                  # the port is not a number, or a bracket is not closed
        return False


def _without_password(url: str) -> str:
    return re.sub(r"(?s)\A([A-Za-z]+:/+)?.*@", r"\1***@", url)


def read_environment(environ: Mapping[str, str]) -> Settings:
    """Return the settings; raise UsageError with the variable, its value and what is allowed.

    An empty variable counts as unset.
    """
    values = {name: environ.get(name) or default for name, default in DEFAULT_ENVIRONMENT.items()}
    port = values["RROUTER_PORT"]
    if not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= PORT_MAX:
        raise UsageError(f"RROUTER_PORT={printable(port)}: "
                         f"expected a port number from 1 to {PORT_MAX}")
    host = values["RROUTER_HOST"].strip("[]")
    if not _is_host(host):
        raise UsageError(f"RROUTER_HOST={printable(host)}: "
                         "expected localhost, an address or a host name")
    upstream = values["RROUTER_UPSTREAM"]
    if not _is_upstream_url(upstream):
        raise UsageError(f"RROUTER_UPSTREAM={printable(_without_password(upstream))}: expected "
                         "http(s)://HOST[:PORT][/PATH] without user, query or fragment")
    words = values["RROUTER_ALLOWED_HOSTS"].split(",")
    allowed = tuple(word.strip(" []").rstrip(".").lower() for word in words if word.strip())
    if not all(map(_is_host, allowed)):
        raise UsageError(f"RROUTER_ALLOWED_HOSTS={printable(','.join(words))}: expected names or "
                         "addresses, without port, separated by commas")
    return Settings(host, int(port), upstream.rstrip("/"), allowed)


# Routing ######################################################################

@lru_cache(maxsize=32768)       # that of `fnmatch` holds 256 in Python 3.9
def _glob(pattern: str) -> Callable[[str], object]:
    return re.compile(fnmatch.translate(pattern)).match


def _suits(pattern: str, name: str) -> bool:
    """Return whether `name` exists and matches the glob in any case; Claude Code has `Explore`."""
    return bool(name and re.match("(?i)" + fnmatch.translate(pattern), name))


class Sender:
    """The agent and the class of a request, "" where it has none.

    `search` returns the agent that the body names; it is called at most once, if a rule asks.
    """

    def __init__(self, agent: str = "", request_class: str = "",
                 search: Callable[[], str] = str) -> None:
        self._class, self._header, self._search = request_class, agent, search

    @cached_property
    def _agent(self) -> str:
        """The name in the header, unless it is the one that all agents of plugins share."""
        found = self._search() if self._header in ("", "custom") else ""
        return found or self._header

    def suits(self, rule: Rule) -> bool:
        """Return whether a rule is meant for such requests."""
        return ((not rule.request_class or _suits(rule.request_class, self._class))
                and (not rule.agent or _suits(rule.agent, self._agent)))


def match_rule(rules: Iterable[Rule], model: str,
               find_sender: Callable[[], Sender] = Sender) -> Rule | None:
    """Return the first rule that matches: `model` by equality or as a glob, and the sender."""
    sender = None
    for rule in rules:
        if model == rule.match or _glob(rule.match)(model):
            if rule.agent or rule.request_class:
                sender = sender or find_sender()
            if sender is None or sender.suits(rule):
                return rule
    return None


def decide_route(config: Config, target: str, model: str | None,
                 find_sender: Callable[[], Sender] = Sender) -> Route:
    """Return where a request for `model` goes when it is the turn of `target`."""
    rule = match_rule(config.modes[target], model, find_sender) if model is not None else None
    return Route(target, model if rule is None else rule.rewrite)


# Messages: heads ##############################################################

# `http.server` and `http.client` parse heads with the e-mail parser: it ends a head at its first
# odd line (the later fields, Content-Length among them, vanish and the body becomes the next
# request), obeys a bare CR and takes the first of two lengths (python/cpython#150499).  These
# expressions admit exactly what RFC 9112 §2-5 allows.
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_TEXT = rb"[\t\x20-\x7e\x80-\xff]*"
_FIELDS = b"((?:%b:%b\r\n)*)" % (_TOKEN, _TEXT)
_REQUEST_LINE = re.compile(rb"(%b) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])\r\n" % _TOKEN)
_REQUEST_HEAD = re.compile(b"%b%b\r\n" % (_REQUEST_LINE.pattern, _FIELDS))
_STATUS_LINE = rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: (%b))?\r\n" % _TEXT
_RESPONSE_HEAD = re.compile(b"%b%b\r\n" % (_STATUS_LINE, _FIELDS))
_TRAILERS = re.compile(b"%b\r\n" % _FIELDS)
_TRUNCATED_TRAILERS = re.compile(b"%b(?:\r|%b(?::%b\r?)?)?" % (_FIELDS, _TOKEN, _TEXT))
_NAME = re.compile(_TOKEN)
_NUMBER = re.compile(b"[0-9]{1,%d}" % LENGTH_DIGITS_MAX)
_BARE_LF = re.compile(rb"(?<!\r)\n")
_ABSOLUTE = re.compile(rb"(?i)https?://([^/?#]*)(.*)")
_AUTHORITY = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z\-._~%!$&'()*+,;=]*)(?::[0-9]{0,5})?")
_MODE_PREFIX = re.compile(rb"/@([^/?#]*)")
_LOOPBACK_ORIGIN = re.compile(
    rb"(?i)https?://(?:localhost|127\.0\.0\.1|\[::1\])\.?(?::[0-9]{0,5})?")

# The fields whose values the router reads.
_READ = frozenset((
    b"connection", b"content-length", b"transfer-encoding",
    b"host", b"expect", b"origin", b"sec-fetch-site",
    b"x-claude-code-agent-type", b"x-claude-code-request-class", b"x-claude-code-session-id",
    b"content-type", b"content-encoding", b"retry-after", b"retry-after-ms", b"x-rrouter-error"))
# Options of Connection that remove no field.  Without Content-Length the body would lose its end.
_KEPT_OPTIONS = frozenset((b"", b"keep-alive", b"content-length"))
# Fields of a response that are not forwarded: CORS would open rrouter to every web page, and in a
# chain of routers each one adds its own x-rrouter fields.
_WITHHELD = (b"access-control-", b"x-rrouter-target", b"x-rrouter-model", b"x-rrouter-attempts")


def _field_name(line: bytes) -> bytes:
    return line.partition(b":")[0].lower()


def _without(lines: Iterable[bytes], names: Collection[bytes]) -> list[bytes]:
    return [line for line in lines if _field_name(line) not in names]


def _parse_fields(block: bytes, withheld: tuple[bytes, ...] = ()) -> Fields:
    """Return the fields in the valid lines `block`.

    Not forwarded: hop-by-hop fields, those that Connection lists (RFC 9110 §7.6.1), and those
    whose name begins with one of `withheld`.
    """
    values: dict[bytes, list[bytes]] = {}
    end_to_end = []
    for line in block.splitlines(keepends=True):
        name, _, value = line.partition(b":")
        name = name.lower()
        if name in _READ:
            values.setdefault(name, []).append(value.strip())
        if name not in HOP_BY_HOP and not name.startswith(withheld):
            end_to_end.append(line)
    options = set()
    if b"connection" in values:
        options = {option.strip().lower()
                   for value in values[b"connection"] for option in value.split(b",")}
        listed = options - _KEPT_OPTIONS
        if listed:
            end_to_end = _without(end_to_end, listed)
    return Fields(values, options, end_to_end)


def _refusal(head: bytes) -> RequestError:
    """Return the error that says what is wrong with a head that does not match."""
    line, _, rest = head.partition(b"\r\n")
    if not _REQUEST_LINE.match(line + b"\r\n"):
        return RequestError(400, "malformed request line: expected METHOD TARGET HTTP/1.1")
    for field in rest.split(b"\r\n"):
        if field and not _TRAILERS.fullmatch(field + b"\r\n\r\n"):
            token = _NAME.match(field)          # never the value, which may be a secret
            name = token.group()[:40].decode("ascii") if token else ""
            return RequestError(400, f"malformed header field {name!r}: expected NAME: VALUE "
                                     "without control characters, space before the colon or "
                                     "continuation lines",
                                "malformed header field")    # the name may be half a value
    return RequestError(400, "malformed request head")


def _origin_form(method: bytes, target: bytes, host: bytes) -> tuple[bytes, bytes]:
    """Return (target in origin form, authority).

    The authority of an absolute target replaces Host (RFC 9112 §3.2.2).
    """
    if method in (b"CONNECT", b"TRACE"):    # a tunnel bypasses the upstream; an echo shows secrets
        raise RequestError(405, f"{method.decode('ascii')} is not supported")
    if target.startswith(b"/") or (target == b"*" and method == b"OPTIONS"):
        return target, host
    absolute = _ABSOLUTE.fullmatch(target)
    if not absolute:
        raise RequestError(400, "malformed request target: expected a path")
    authority, path = absolute.groups()
    return path if path.startswith(b"/") else b"/" + path, authority


def _take_mode(target: bytes) -> tuple[str | None, bytes]:
    """Return (mode, the target to forward) of a target that begins with /@MODE, else None first."""
    named = _MODE_PREFIX.match(target)
    if not named:
        return None, target
    rest = target[named.end():]
    mode = urllib.parse.unquote(named.group(1).decode("ascii")).lower()
    return mode, rest if rest.startswith(b"/") else b"/" + rest


def _request_length(fields: Fields, http11: bool) -> int | None:
    """Return the length of the body in bytes, or None if it is chunked (RFC 9112 §6)."""
    lengths, codings = fields.all(b"content-length"), fields.all(b"transfer-encoding")
    if codings:
        if lengths:
            raise RequestError(400, "malformed request: both Content-Length and Transfer-Encoding")
        if not http11:
            raise RequestError(400, "malformed request: Transfer-Encoding in HTTP/1.0")
        names = [name.strip().lower() for name in b",".join(codings).split(b",")]
        if b"chunked" in names[:-1]:
            raise RequestError(400, "malformed Transfer-Encoding: chunked is not the last coding")
        if names != [b"chunked"]:
            raise RequestError(501, "Transfer-Encoding not supported: expected only chunked")
        return None
    if not lengths:
        return 0
    if len(lengths) > 1 or not _NUMBER.fullmatch(lengths[0]):
        raise RequestError(400, "malformed request: expected one Content-Length of only digits")
    length = int(lengths[0])
    if length > BODY_MAX_BYTES:
        raise RequestError(413, f"body of {length} bytes is over the limit of "
                                f"{BODY_MAX_BYTES >> 20} MiB")
    return length


def parse_request_head(head: bytes) -> RequestHead:
    """Return the request whose head is `head`, blank line included.

    Raises RequestError for all that RFC 9112 forbids and all that two parsers may read differently.
    """
    match = _REQUEST_HEAD.fullmatch(head)
    if not match:
        raise _refusal(head)
    method, target, major, minor, block = match.groups()
    if major != b"1":
        raise RequestError(505, "HTTP version not supported: use HTTP/1.1")
    http11 = minor != b"0"
    if block.count(b"\n") > FIELDS_MAX:
        raise RequestError(431, f"more than {FIELDS_MAX} header fields")
    fields = _parse_fields(block)
    hosts = fields.all(b"host")
    if len(hosts) > 1 or (http11 and not hosts):
        raise RequestError(400, "malformed request: expected exactly one Host field, "
                                f"found {len(hosts)}")
    target, authority = _origin_form(method, target, hosts[0] if hosts else b"")
    mode, target = _take_mode(target)
    if not all(map(_AUTHORITY.fullmatch, [authority, *hosts])):
        raise RequestError(400, "malformed Host: expected NAME or NAME:PORT")
    length = _request_length(fields, http11)
    expectations = [value.lower() for value in fields.all(b"expect") if value and http11]
    if expectations not in ([], [b"100-continue"]):
        raise RequestError(417, "unknown expectation: only 100-continue is supported")
    return RequestHead(
        method=method.decode("ascii"), target=target, authority=authority.decode("latin-1"),
        http11=http11, fields=fields, length=length,
        keep_alive=http11 and b"close" not in fields.options, expects_continue=bool(expectations),
        path=target.partition(b"?")[0].decode("ascii"), mode=mode)


def head_too_large(data: bytes) -> RequestError:
    """Return the error for a head over the limit: 414 if its first line alone is, else 431."""
    return RequestError(431 if b"\r\n" in data[:HEAD_MAX_BYTES] else 414,
                        f"request head over {HEAD_MAX_BYTES >> 10} KiB")


def check_head_start(data: bytes, seen: int) -> None:
    """Raise RequestError as soon as the incomplete head `data` cannot become a valid one.

    Its first `seen` bytes have been checked before.  Without this a client that speaks TLS,
    HTTP/0.9 or bare line feeds would wait for the end of a head that never comes.
    """
    end = data.find(b"\n")
    if end >= 0 and not _REQUEST_LINE.match(data[:end + 1]):
        parse_request_head(data[:end + 1])
    if not _NAME.match(data) or _BARE_LF.search(data, seen):
        raise RequestError(400, "malformed request: expected HTTP/1.1 with lines that end in CR LF")


def check_origin(head: RequestHead, hosts: Collection[str]) -> None:
    """Raise RequestError 403 for a request that a web page may have sent.

    `hosts` are the names that Host may have; with none of them it may have any.

    Any page could otherwise spend the user's quota: the upstream responds to every Origin and
    preflight with `Access-Control-Allow-Origin: *`, a text/plain POST needs no preflight, and a
    page can rebind its host name to 127.0.0.1 (CVE-2024-28224, CVE-2025-66414).  `Sec-Fetch-Mode`
    proves nothing, because Node's fetch sends it as well.
    """
    host = re.sub(r"\.?(?::[0-9]*)?\Z", "", head.authority, count=1).lower()
    if hosts and (head.http11 or head.authority) and host not in hosts:
        raise RequestError(403, f"Host {printable(repr(head.authority), 80)} is not this machine: "
                                "use localhost, 127.0.0.1 or [::1], or start rrouter with the name "
                                "in RROUTER_ALLOWED_HOSTS", "Host is not this machine")
    if not all(_LOOPBACK_ORIGIN.fullmatch(origin) for origin in head.fields.all(b"origin")):
        raise RequestError(403, "requests from foreign web pages are refused (Origin)")
    if any(site.lower() == b"cross-site" for site in head.fields.all(b"sec-fetch-site")):
        raise RequestError(403, "requests from foreign web pages are refused (Sec-Fetch-Site)")


def outbound_head(head: RequestHead, authority: bytes, base_path: bytes) -> tuple[bytes, bytes]:
    """Return the head to forward: the client's, with the upstream's Host and framing in place.

    In two parts, before and after the Content-Length value; without a Content-Length the second
    part is empty.
    """
    target = head.target if head.target == b"*" else base_path + head.target
    request_line = b"%b %b HTTP/1.1\r\n" % (head.method.encode("ascii"), target)
    lines = list(head.fields.end_to_end)
    names = [_field_name(line) for line in lines]
    if b"host" in names:
        place = names.index(b"host")
        lines[place] = b"%b: %b\r\n" % (lines[place][:4], authority)    # its name as received
    else:
        request_line += b"Host: %b\r\n" % authority
    if b"content-length" in names:
        place = names.index(b"content-length")
        name, after = lines[place][:14], lines[place + 1:]
    elif head.length is None:
        place, name, after = len(lines), b"Content-Length", []
    else:
        return b"".join([request_line, *lines, b"\r\n"]), b""
    before = [request_line, *lines[:place], name, b": "]
    return b"".join(before), b"".join([b"\r\n", *after, b"\r\n"])


def parse_response_head(head: bytes) -> ResponseHead:
    """Return the response whose head is `head`, blank line included.

    Raises UpstreamError if it is malformed or ambiguous.
    """
    match = _RESPONSE_HEAD.fullmatch(head)
    if not match:
        raise UpstreamError("sent a malformed response head")
    minor, status, reason, block = match.groups()
    http11 = minor == b"1"
    values, options, end_to_end = _parse_fields(block, withheld=_WITHHELD)
    lengths, codings = values.get(b"content-length"), values.get(b"transfer-encoding")
    if codings and (lengths or not http11 or [c.lower() for c in codings] != [b"chunked"]):
        raise UpstreamError("sent a response with an ambiguous Transfer-Encoding")
    if lengths and (len(lengths) > 1 or not _NUMBER.fullmatch(lengths[0])):
        raise UpstreamError("sent a response with a malformed Content-Length")
    if status == b"101":
        raise UpstreamError("switched protocols unasked")
    length = int(lengths[0]) if lengths else None
    keep_alive = http11 and b"close" not in options
    return ResponseHead(int(status), reason or b"", b"".join(end_to_end), values, length,
                        bool(codings), keep_alive)


def response_head_bytes(head: ResponseHead, extra: bytes) -> bytes:
    """Return the head to forward: the upstream's end-to-end fields and the lines `extra`."""
    fields = head.end_to_end
    if head.status < 200 or head.status == 204:         # RFC 9110 §8.6
        fields = b"".join(_without(fields.splitlines(keepends=True), (b"content-length",)))
    return b"HTTP/1.1 %d %b\r\n%b%b\r\n" % (head.status, head.reason, fields, extra)


# Messages: bodies #############################################################

class FixedBody:
    """Decodes a body of known length, fed with bytes as they arrive."""

    delimited = True                    #: it ends before its connection does

    def __init__(self, length: int) -> None:
        self.left = length              #: bytes that are due, of the body or of a chunk
        self.done = not length
        self.rest = b""                 #: the bytes after the end

    def feed(self, data: bytes) -> bytes:
        """Return the payload in `data`."""
        if len(data) > self.left:
            data, self.rest = data[:self.left], data[self.left:]
        self.left -= len(data)
        self.done = not self.left
        return data

    def finish(self) -> None:
        """Take the end of the connection; raise UpstreamError because the body is truncated."""
        raise UpstreamError("broke off in the middle of its response")


class ClosingBody:
    """Decodes a body that ends with its connection (HTTP/1.0)."""

    delimited = False
    done = False
    rest = b""

    def feed(self, data: bytes) -> bytes:
        """Return the payload in `data`, which is all of it."""
        return data

    def finish(self) -> None:
        """Take the end of the connection, which is the end of the body."""
        self.done = True


class ChunkedBody(FixedBody):
    """Decodes chunked transfer coding (RFC 9112 §7.1) strictly; drops extensions and trailers.

    Each size line but the first follows the CR LF of the chunk before it.  The decoder starts with
    a CR LF that was never sent, so that all size lines look alike.
    """

    _SIZE = b"([0-9A-Fa-f]{1,%d})" % LENGTH_DIGITS_MAX
    _QUOTED = rb'"(?:[\t !\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*"'
    _EXTENSION = rb"[ \t]*;[ \t]*%b(?:[ \t]*=[ \t]*(?:%b|%b))?" % (_TOKEN, _TOKEN, _QUOTED)
    # Size and extensions together stay below CHUNK_LINE_MAX_BYTES.
    _SIZE_LINE = re.compile(rb"\r\n%b(?:(?=[^\r]{1,220}\r)(?:%b)+)?\r\n" % (_SIZE, _EXTENSION))
    _PLAIN_SIZE_LINE = re.compile(b"%b\r\n" % _SIZE)
    _TRUNCATED_SIZE_LINE = re.compile(
        rb"\r?|\r\n(?:%b(?:[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?)?\r?)?" % _SIZE)

    def __init__(self) -> None:
        super().__init__(0)
        self.done = False
        self._held = b"\r\n"            # a size line or trailers, truncated so far
        self._in_trailers = False

    def feed(self, data: bytes) -> bytes:
        """Return the payload in `data`; raise UpstreamError where the coding is broken."""
        if self.left >= len(data):     # the middle of a large chunk
            self.left -= len(data)
            return data
        # One whole chunk, as events come; _walk would take three times as long.
        if self._held == b"\r\n":
            size_line = self._PLAIN_SIZE_LINE.match(data)
            if size_line and data.endswith(b"\r\n"):
                start = size_line.end()
                if start < len(data) - 2 == start + int(size_line.group(1), 16):
                    return data[start:-2]
        return self._walk(data)

    def _walk(self, data: bytes) -> bytes:
        """Return the payload in `data`, which may begin and end anywhere in the coding."""
        position = self.left           # where the chunk under way ends
        payload = [data[:position]] if position else []
        self.left = 0
        data, self._held = self._held + data, b""
        while not self._in_trailers:
            size_line = self._SIZE_LINE.match(data, position)
            if not size_line:
                self._hold_size_line(data[position:])
                return b"".join(payload)
            start, size = size_line.end(), int(size_line.group(1), 16)
            position = start + size
            self._in_trailers = not size
            payload.append(data[start:position])
            if position > len(data):
                self.left = position - len(data)
                return b"".join(payload)
        self._read_trailers(data[position:])
        return b"".join(payload)

    def _hold_size_line(self, data: bytes) -> None:
        if len(data) > CHUNK_LINE_MAX_BYTES or not self._TRUNCATED_SIZE_LINE.fullmatch(data):
            raise UpstreamError("sent a malformed chunk")
        self._held = data

    def _read_trailers(self, data: bytes) -> None:
        """Take the trailers, which are nothing or fields, and the blank line after them."""
        whole = _TRAILERS.match(data)
        if whole and whole.end(1) <= TRAILERS_MAX_BYTES:
            self.done, self.rest = True, data[whole.end():]
        elif len(data) > TRAILERS_MAX_BYTES or not _TRUNCATED_TRAILERS.fullmatch(data):
            raise UpstreamError("sent malformed trailers")
        else:
            self._held = data


def response_body(head: ResponseHead, method: str) -> FixedBody | ClosingBody:
    """Return the decoder for the body of a response to `method` (RFC 9112 §6.3)."""
    if method == "HEAD" or head.status in (204, 304):
        return FixedBody(0)
    if head.chunked:
        return ChunkedBody()
    return ClosingBody() if head.length is None else FixedBody(head.length)


# Messages: JSON ###############################################################

_SPACE = re.compile(r"[ \t\n\r]*")
_LEADING_MODEL = re.compile(
    rb'[ \t\n\r]*\{[ \t\n\r]*"model"[ \t\n\r]*:[ \t\n\r]*("[^"\\\x00-\x1f]*")[ \t\n\r]*[,}]')
_OPENS_OBJECT = re.compile(rb"[ \t\n\r]*\{")
_AGENT = re.compile(rb"oh-my-claudecode:([A-Za-z0-9_-]+)")
_STREAM_MEMBER = re.compile(rb'"stream"\s*:\s*true')
_BODY_END_BYTES = 2048          # room for the few small members before or after the messages


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# Scans a value in C.  The hooks avoid building numbers and objects that are never read, and the
# limit of int() on digits; they refuse NaN, which is not JSON.
_decode = json.JSONDecoder(
    parse_int=len, parse_float=len, parse_constant=_refuse_constant, object_pairs_hook=len,
).raw_decode


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _skip_character(text: str, position: int, character: str) -> int:
    """Return where the next token begins after `character`, which must be at `position`."""
    if text[position] != character:
        raise ValueError(f"expected {character}")
    return _skip_space(text, position + 1)


def _read_key(text: str, position: int) -> tuple[str, int]:
    """Return the key at `position` and where its value begins."""
    if text[position] != '"':
        raise ValueError("expected a key")
    key, end = _decode(text, position)
    return key, _skip_character(text, _skip_space(text, end), ":")


def _walk(text: str, position: int, opening: str) -> Iterator[tuple[str, int, int]]:
    """Yield (key, start, end) of each value in the object or array at `position`.

    `opening` is "{" for an object and "[" for an array, whose keys are "".  Raises ValueError or
    IndexError where the text is not JSON.  After the last value only white space stands before the
    closing bracket.
    """
    closing = "}" if opening == "{" else "]"
    key, start = "", _skip_character(text, position, opening)
    if text[start] == closing:
        return
    while True:
        if opening == "{":
            key, start = _read_key(text, start)
        _, end = _decode(text, start)
        yield key, start, end
        position = _skip_space(text, end)
        if text[position] == closing:
            return
        start = _skip_character(text, position, ",")


def _walk_to_model(text: str) -> tuple[int, int] | None:
    """Return the span of the first top-level `model`.

    None if it is not a string, or if the text is not one whole JSON object.
    """
    found = None
    try:
        end = begin = _skip_space(text, 0)
        for key, start, end in _walk(text, begin, "{"):
            if key == "model" and found is None:
                found = start, end
        bracket = _skip_space(text, end)
        whole = _skip_space(text, bracket + 1) == len(text)
    except (ValueError, IndexError, RecursionError):    # not JSON, truncated, or nested too deep
        return None
    return found if whole and found and text[found[0]] == '"' else None


def find_model(body: BytesLike) -> tuple[int, int, str] | None:
    """Return (start, end, name) of the top-level `model` string of a JSON object, or None.

    `start` and `end` are byte offsets, quotes included.  If `model` is the first member and plain,
    as Claude Code sends it, nothing after it is examined.  Otherwise the whole top level is walked,
    so that a body that is not JSON stays untouched, and the first `model` counts, because
    CLIProxyAPI (gjson) reads the first as well.
    """
    leading = _LEADING_MODEL.match(body)
    try:
        if leading:
            start, end = leading.span(1)
            return start, end, str(leading.group(1)[1:-1], "utf-8")     # plain: nothing to unescape
        if not _OPENS_OBJECT.match(body):
            return None
        found = _walk_to_model(str(body, "latin-1"))    # latin-1: one character for each byte
        if not found:
            return None
        start, end = found
        return start, end, json.loads(str(body[start:end], "utf-8"))
    except ValueError:                                  # the name is not UTF-8
        return None


def find_agent(body: BytesLike) -> str:
    """Return the name after `oh-my-claudecode:` in the system prompt, "" without one.

    Messages may mention the word, so it counts only within the top-level `system` value, which is
    looked for only if the word occurs at all.
    """
    if not _AGENT.search(body):
        return ""
    text = str(body, "latin-1")
    with contextlib.suppress(ValueError, IndexError, RecursionError):   # not JSON, or truncated
        for key, start, end in _walk(text, _skip_space(text, 0), "{"):
            if key == "system":
                found = _AGENT.search(body, start, end)
                return str(found.group(1), "ascii") if found else ""
    return ""


def asks_for_stream(body: BytesLike) -> bool:
    """Return whether `body` seems to ask for a stream.

    It is searched for as text, first at the two ends where clients write it, because it only moves
    a time limit.
    """
    return bool(_STREAM_MEMBER.search(body[-_BODY_END_BYTES:])
                or _STREAM_MEMBER.search(body[:_BODY_END_BYTES]) or _STREAM_MEMBER.search(body))


@lru_cache(maxsize=256)         # the names come from config.json
def _json_string(text: str) -> bytes:
    return json.dumps(text).encode("ascii")


def splice(body: BytesLike, start: int, end: int, model: str) -> list[BytesLike]:
    """Return `body` in pieces, its bytes from `start` to `end` replaced by the JSON string `model`.

    The pieces are views, because joining 10 MB would cost more than sending them.
    """
    view = memoryview(body)
    return [view[:start], _json_string(model), view[end:]]


def _is_thinking(text: str, block: int) -> bool:
    """Return whether the value at `block` is an object of a thinking type."""
    if text[block] != "{":
        return False
    for key, start, end in _walk(text, block, "{"):
        if key == "type":
            return text[start] == '"' and json.loads(text[start:end]) in THINKING_TYPES
    return False


def _cut_content(text: str, content: int) -> list[tuple[int, int, bytes]]:
    """Return (start, end, replacement) that remove the thinking blocks of the array at `content`.

    Each cut takes the comma along that would be left over.
    """
    blocks = [(start, end, _is_thinking(text, start))
              for _, start, end in _walk(text, content, "[")]
    kept = [index for index, (_, _, is_thinking) in enumerate(blocks) if not is_thinking]
    if len(kept) == len(blocks):
        return []
    if not kept:
        return [(blocks[0][0], blocks[-1][1], EMPTY_CONTENT)]
    first = kept[0]
    leading = [(blocks[0][0], blocks[first][0], b"")] if first else []
    return leading + [(blocks[index - 1][1], end, b"")
                      for index, (_, end, is_thinking) in enumerate(blocks)
                      if is_thinking and index > first]


def _cut_message(text: str, message: int) -> list[tuple[int, int, bytes]]:
    """Return the cuts in the content of the message at `message`."""
    for key, start, _ in _walk(text, message, "{"):
        if key == "content" and text[start] == "[":
            return _cut_content(text, start)
    return []


def without_thinking(body: BytesLike) -> bytes | None:
    """Return `body` without the thinking blocks in its messages, or None if it has none.

    All other bytes stay as they are.  A content that would be left empty gets a short text block.
    """
    text = str(body, "latin-1")
    cuts: list[tuple[int, int, bytes]] = []
    try:
        for key, start, _ in _walk(text, _skip_space(text, 0), "{"):
            if key == "messages":
                for _, message, _ in _walk(text, start, "["):
                    cuts += _cut_message(text, message)
                break
    except (ValueError, IndexError, RecursionError):    # not JSON, truncated, or nested too deep
        return None
    if not cuts:
        return None
    pieces, position = [], 0
    for start, end, replacement in cuts:
        pieces += [body[position:start], replacement]
        position = end
    return b"".join([*pieces, body[position:]])


# Messages: responses ##########################################################

def _matches(text: bytes, wordings: Iterable[tuple[bytes, ...]]) -> bool:
    """Return whether all words of one of the `wordings` stand in `text`, which is in lower case."""
    return any(all(word in text for word in words) for words in wordings)


def names_foreign_signature(body: bytes) -> bool:
    """Return whether the body of a 400 rejects thinking blocks that another backend signed."""
    return _matches(body.lower().replace(b"`", b""), SIGNATURE_WORDINGS)


# In the text, because a hop on the way may drop our header.
_OWN_ERROR = re.compile(rb'"message"\s*:\s*"rrouter: ')


def read_failure(status: int, text: bytes) -> tuple[Fault, str]:
    """Return the fault in a response of `status` 400 and above, and what to call it."""
    if _OWN_ERROR.search(text):
        return Fault.OWN, str(status)
    text = text.lower()
    for statuses, words, name in SHELF_WORDINGS:
        if status in statuses and _matches(text, (words,)):
            return Fault.SHELF, f"{status} {name}"
    if status == 413 or (status in (400, 422) and _matches(text, TOO_LARGE_WORDINGS)):
        return Fault.TOO_LARGE, f"{status} too large"
    return Fault.STATUS, str(status)


_RESET_AFTER = re.compile(
    rb"reset after (?:([0-9]{1,6})h)?(?:([0-9]{1,6})m)?(?:([0-9]{1,9})(?:\.[0-9]+)?s)?")


def read_retry_after(seconds: str, milliseconds: str, text: bytes, now: float) -> float | None:
    """Return after how many seconds a failed response asks for a retry, None if it does not.

    `seconds` is the value of Retry-After, a number or a date (RFC 9110 §10.2.3), `milliseconds`
    that of retry-after-ms; `text` may say `reset after 1h2m3s`; `now` is in Unix seconds.
    """
    if re.fullmatch(r"[0-9]{1,12}(\.[0-9]+)?", milliseconds):
        return float(milliseconds) / 1000
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", seconds):
        return float(seconds)
    with contextlib.suppress(TypeError, ValueError, IndexError, OverflowError):
        date = email.utils.parsedate_to_datetime(seconds)   # IndexError: Python 3.9
        zone = date.tzinfo or datetime.timezone.utc
        return max(0.0, date.replace(tzinfo=zone).timestamp() - now)
    found = _RESET_AFTER.search(text)
    if found and any(found.groups()):
        hours, minutes, rest = (int(group or 0) for group in found.groups())
        return 3600.0 * hours + 60.0 * minutes + rest
    return None


def _is_content(block: Any) -> bool:
    """Return whether a content block says anything: an empty text block does not."""
    return not (isinstance(block, dict) and block.get("type") == "text" and not block.get("text"))


def _is_silent_failure(usage: Any, stop_reason: Any) -> bool:
    """Return whether an empty message is a failure: no tokens, and no reason to be silent."""
    tokens = usage.get("output_tokens") if isinstance(usage, dict) else None
    return (tokens == 0 and not isinstance(tokens, bool)
            and stop_reason not in ("refusal", "max_tokens"))


def _load_object(data: bytes) -> dict[str, Any] | None:
    """Return the JSON object `data`, None for anything else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def message_defect(body: bytes) -> str:
    """Return what is wrong with `body` as a message that was not streamed, "" if nothing is."""
    message = _load_object(body)
    if message is None:
        return "not a message" if body.strip() else "empty response"
    if message.get("error") is not None or message.get("type") == "error":
        return "error in a 2xx"
    if message.get("type") != "message":
        return "not a message"
    content = message.get("content")
    blocks = content if isinstance(content, list) else []
    if not any(map(_is_content, blocks)) and _is_silent_failure(
            message.get("usage"), message.get("stop_reason")):
        return "empty message"
    return ""


class StreamScan:
    """What an event stream has shown so far.

    `committed` is set by the first content of a message, on other paths by the first event that is
    not an error, and in any case after READ_AHEAD_MAX_BYTES.  `defect` is set if something else
    decides before: an error, or an end without content.  After the commit `broken` says that an
    error came, `ended` that the message ended.
    """

    _BLANK_LINE = re.compile(rb"\r\n\r\n|\n\n|\r\r|\n\r\n")
    _TYPE = re.compile(rb'\{\s*"type"\s*:\s*"([a-z_]+)"')
    _USUAL = b"event: content_block_delta\n"

    def __init__(self, is_message: bool) -> None:
        self._is_message = is_message
        self._partial = b""             # an event that is not complete yet
        self._size = 0                  # of the stream so far, in bytes
        self.committed = self.broken = self.ended = False
        self.defect = ""
        self.events = 0                 #: other than pings and comments

    def feed(self, payload: bytes) -> None:
        """Read more of the stream."""
        if self.committed and not self._partial and self._is_usual(payload):
            self.events += 1
            return
        data, start = self._partial + payload, 0
        for blank in self._BLANK_LINE.finditer(data, max(0, len(self._partial) - 3)):
            self._read_block(data[start:blank.start()])
            start = blank.end()
        self._partial = data[start:]
        self._size += len(payload)
        if self._size > READ_AHEAD_MAX_BYTES and not self.defect:
            self.committed = True
        if len(self._partial) > READ_AHEAD_MAX_BYTES:
            self._partial = self._partial[:len(self._USUAL)]    # the rest of it cannot matter

    @classmethod
    def _is_usual(cls, payload: bytes) -> bool:
        """Return whether whole events carry content and nothing else, as nearly all do.

        Finding that out costs a tenth of reading them.
        """
        return (payload.startswith(cls._USUAL) and payload.endswith(b"\n\n")
                and b"error" not in payload and b"message_stop" not in payload)

    def finish(self) -> None:
        """Read the end of the stream."""
        self._read_block(self._partial)
        self._partial = b""
        if not self.committed and not self.defect:
            self.defect = "stream without content" if self.events else "empty stream"

    def _read_block(self, block: bytes) -> None:
        """Read the lines up to a blank one."""
        if self.defect:
            return
        may_be_error = b"error" in block
        lines = [line for line in block.lstrip(b"\xef\xbb\xbf").splitlines()
                 if line and not line.startswith(b":")]
        names = [line[6:].strip() for line in lines if line.startswith(b"event:")]
        data = b"\n".join(line[5:].strip() for line in lines if line.startswith(b"data:"))
        if not names and not data:
            return                      # comments, or an id alone
        found = self._TYPE.match(data)
        needs_parsing = not self.committed or may_be_error or not (found or names)
        event = _load_object(data) or {} if needs_parsing else {}
        kind = (found.group(1) if found else names[-1] if names else b"").decode("latin-1")
        if isinstance(event.get("type"), str):
            kind = event["type"]
        is_error = kind == "error" or b"error" in names or event.get("error") is not None
        self.events += kind != "ping"
        if self.committed:
            self.broken = self.broken or is_error
            self.ended = self.ended or kind == "message_stop"
        elif is_error:
            self.defect = "error event"
        elif self._is_message:
            self._read_lifecycle(kind, event, data)
        else:
            self.committed = True

    def _read_lifecycle(self, kind: str, event: dict[str, Any], data: bytes) -> None:
        """Read an event of a message that has shown no content yet."""
        if kind == "content_block_delta":
            self.committed = True
        elif kind == "content_block_start":
            self.committed = _is_content(event.get("content_block"))
        elif kind == "message_delta":
            delta = event.get("delta")
            stop_reason = delta.get("stop_reason") if isinstance(delta, dict) else None
            if _is_silent_failure(event.get("usage"), stop_reason):
                self.defect = "empty message"
            else:
                self.committed = True   # the model may have nothing to say
        elif kind == "message_stop" or data == b"[DONE]":
            self.defect = "empty message"


class TokenReader:
    """Reads the tokens that a message reports, from the payloads of its response.

    It holds the beginning of a line of a stream, or a body that is not streamed, at most
    READ_AHEAD_MAX_BYTES.  What it cannot read has no tokens.
    """

    _LINE_MAX = 16 * 1024       # bytes; the lines with tokens have less than 2 KB
    _USAGE = re.compile(rb'"usage"\s*:\s*(?=\{)')
    _decode = json.JSONDecoder().raw_decode
    _NAMES = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens",
              "output_tokens")

    def __init__(self, head: ResponseHead) -> None:
        coding = head.coding
        self._is_stream = head.is_event_stream
        self._decoder = zlib.decompressobj(zlib.MAX_WBITS | 16) if coding else None
        self._can_read = coding in ("", "gzip")
        self._held = b""
        self._counts: dict[str, int] = {}

    def feed(self, payload: bytes) -> None:
        """Read more of the response."""
        if self._decoder is not None:
            with contextlib.suppress(zlib.error):
                while payload:
                    self._read(self._decoder.decompress(payload, RECEIVE_BYTES))
                    payload = self._decoder.unconsumed_tail
        elif (self._held or not self._is_stream or b'"usage"' in payload
                or not payload.endswith(b"\n")):   # else whole events without tokens, as nearly all
            self._read(payload)

    def _read(self, text: bytes) -> None:
        if not self._can_read:
            return
        self._held += text
        if self._is_stream:
            end = max(self._held.rfind(b"\n"), self._held.rfind(b"\r")) + 1
            for line in self._held[:end].splitlines() if b'"usage"' in self._held else ():
                if b'"message_start"' in line or b'"message_delta"' in line:
                    self._take(line)
            self._held = self._held[end:][:self._LINE_MAX]      # the rest of it cannot matter
        self._can_read = len(self._held) <= READ_AHEAD_MAX_BYTES

    def _take(self, data: bytes) -> None:
        """Take the counts of the last `usage`; within strings its quotes would be escaped."""
        found = self._USAGE.match(data, data.rfind(b'"usage"'))
        if found is None:
            return
        try:
            counts, _ = self._decode(str(data, "latin-1"), found.end())
        except (ValueError, RecursionError):
            return
        for name in self._NAMES:
            count = counts.get(name)
            if type(count) is int and 0 <= count < 10 ** 12:    # later counts replace earlier ones
                self._counts[name] = count or self._counts.get(name, 0)

    def note(self) -> str:
        """Return " in 1203+48211 out 512": uncached, from cache, out; "" if nothing is reported."""
        if not self._is_stream and self._can_read:
            self._take(self._held)
        if not self._counts:
            return ""
        uncached, written, cached, out = [self._counts.get(name, 0) for name in self._NAMES]
        return f" in {uncached + written}+{cached} out {out}"


# Failover #####################################################################

CLOSED, OPEN, HALF_OPEN = "closed", "open", "half-open"

# What a fault leads to.  The other faults are neutral: they change no counter.
COUNTED = frozenset((Fault.STATUS, Fault.SHELF, Fault.NO_MESSAGE, Fault.TIMEOUT))
RESCUED = COUNTED | {Fault.TOO_LARGE, Fault.REJECTED, Fault.DROPPED}
# Faults of the second attempt that excuse a timeout of the first, and the reverse.
EXCUSES = frozenset((Fault.TIMEOUT, Fault.DROPPED, Fault.UNREACHABLE))

# Which of two failures helps the client more; lower is better.  Statuses first.
RANK = {429: 1, 401: 2, 403: 2, 404: 3, 408: 4, 504: 5}
OTHER_4XX_RANK, OTHER_5XX_RANK = 0, 4
FAULT_RANK: dict[Fault | None, int] = {Fault.SHELF: 6, Fault.NO_MESSAGE: 7}
OWN_ERROR_RANK, LAST_RANK = 8, 9


def rank(failure: Outcome, other: Outcome) -> int:
    """Return how useful a failure is to the client beside the `other` one; lower is better."""
    fault, status = failure.fault, failure.status
    if failure.keeps_400:
        return OTHER_4XX_RANK
    if fault is Fault.TOO_LARGE:
        # The client would compact its conversation, although a retry may serve it as it is.
        is_passing = other.fault in (Fault.STATUS, Fault.SHELF) and (
            other.status in (408, 429) or other.status >= 500)
        return LAST_RANK if is_passing else OTHER_4XX_RANK
    if fault in (Fault.STATUS, Fault.REJECTED):
        return RANK.get(status, OTHER_4XX_RANK if status < 500 else OTHER_5XX_RANK)
    return FAULT_RANK.get(fault, OWN_ERROR_RANK)


def judge(first: Outcome, second: Outcome) -> Verdict:
    """Return which failures of a request count, and which response the client gets.

    `first` failed, and the request was sent to the other target, or the client left before.

      first         second          counts        the client gets
      failed        succeeded       the first     the second
      failed        client left     the first, if it timed out or took a minute
      failed        failed          neither       the more useful one
      timed out     failed          the first     the more useful one
      failed        timed out       the second    the more useful one

    A timeout does not count beside one of the EXCUSES; only faults in COUNTED count at all.
    """
    if second.fault is None:
        return Verdict((first.fault in COUNTED, False), 1)
    if second.fault is Fault.LEFT:
        took_long = first.ended - first.began >= LONG_FAILURE_S
        counts = first.fault is Fault.TIMEOUT or (first.fault in COUNTED and took_long)
        return Verdict((counts, False), 0)
    return Verdict((first.fault is Fault.TIMEOUT and second.fault not in EXCUSES,
                    second.fault is Fault.TIMEOUT and first.fault not in EXCUSES),
                   0 if rank(first, second) <= rank(second, first) else 1)


# One machine answers "which of two targets?" for one scope: the whole target, or one model on it.
#
#   state      event                                        next state   what else
#   CLOSED     success of home                              CLOSED       n = 0
#   CLOSED     failure of home, n-th in a row, n < limit    CLOSED       n counted
#   CLOSED     failure of home, n = limit                   OPEN         n = 0, N-th cooldown begins
#   OPEN       success of away                              OPEN         n = 0; N + 1 once a switch
#   OPEN       failure of away, n-th in a row, n < limit    OPEN         n counted
#   OPEN       failure of away, n = limit                   CLOSED       n = 0, cooldown cancelled
#   OPEN       a request asks, cooldown over                HALF_OPEN    that request probes home
#   HALF_OPEN  the probe commits                            CLOSED       n = 0: recovered
#   HALF_OPEN  the probe fails                              OPEN         n = 0, N-th cooldown begins
#   HALF_OPEN  the probe fails, as the shelf does, after    OPEN         another minute
#              a switch that the shelf caused
#   HALF_OPEN  the probe is neutral                         OPEN         the next one after a minute
#   HALF_OPEN  success or failure of away                   as in OPEN
#   any        outcome of the target that does not serve    same         nothing
#   any        failure of an attempt from before a switch   same         nothing
#   any        failure of the same event as the last one    same         nothing
#
# HTTP failures and timeouts are counted apart.  N returns to the first cooldown when twice the last
# cooldown has passed since the return to home, without a switch.


class Move(str):
    """A line for the log about a scope that moves to another target."""

    words: dict[str, str]       #: for auto.onSwitch


class Breaker:
    """Which of two targets serves one scope: `home` while closed, `away` while open.

    Methods take the time (Unix seconds, because the state outlives the process) and return lines
    for the log.  Not locked.
    """

    def __init__(self, targets: tuple[str, str], serial: Iterator[int], label: str = "") -> None:
        self._serial = serial           # numbers of one sequence, so that a ticket fits one machine
        self._counted_at: deque[float] = deque(maxlen=EVENTS_REMEMBERED)    # times of failures
        self.label = label              #: " for MODEL", or ""
        self.level = 0                  # index of the next cooldown
        self.switch_count = 0
        self.last_cooldown_s = 0.0
        self.returned_at: float | None = None
        self.close(targets)

    def close(self, targets: tuple[str, str]) -> None:
        """Start again on the first of `targets`; N and the number of switches stay."""
        self.home, self.away = targets
        self.state = CLOSED
        self.generation = next(self._serial)    # a new one with each change of `current`
        self.probe = 0
        self.answered = True            # whether the target switched to has answered since
        self.on_shelf = False           # whether the shelf caused the switch
        self.shelf_said = ""            # the last response to a probe of the shelf
        self.reason: str | None = None
        self.switched_at: float | None = None
        self.retry_at: float | None = None
        self.recovered_at: float | None = None  # if home serves because a probe of it succeeded
        self.start_counting()

    def start_counting(self) -> None:
        """Set the counters back; what one event caused stays known."""
        self.failures = self.timeouts = 0       # in a row, of `current`
        self.real_failure = ""          # the first one in the row that the shelf did not cause

    @property
    def current(self) -> str:
        """The target whose turn it is."""
        return self.home if self.state == CLOSED else self.away

    @property
    def idle(self) -> bool:
        """True if there is nothing to remember."""
        return self.state == CLOSED and not (self.level or self.failures or self.timeouts)

    def _is_same_event(self, outcome: Outcome) -> bool:
        """Return whether an event that was counted may have caused this failure too.

        They are compared by the times at which they failed.  Their rescues, which decide whether
        they count, take longer or shorter.
        """
        return any(outcome.began < at and abs(outcome.ended - at) <= EVENT_S
                   for at in self._counted_at)

    def remaining_s(self, now: float) -> float:
        """Return the seconds until home may be probed, within the cooldown if the clock was set."""
        if self.retry_at is None:
            return 0.0
        self.retry_at = min(self.retry_at, now + self.last_cooldown_s)
        return max(0.0, self.retry_at - now)

    def admit(self, now: float) -> tuple[str, int]:
        """Return (target, number of the probe or 0) for one request."""
        if self.state == OPEN and not self.remaining_s(now):
            self.state, self.probe = HALF_OPEN, next(self._serial)
            return self.home, self.probe
        return self.current, 0

    def lets_stay(self, now: float, target: str) -> bool:
        """Return whether sessions may stay on `target`, the one that served during the cooldown."""
        return (self.state == CLOSED and target == self.away and self.recovered_at is not None
                and now - self.recovered_at <= STAY_MAX_S)

    def is_probe(self, ticket: Ticket) -> bool:
        """Return whether the ticket is that of the probe under way."""
        return self.state == HALF_OPEN and ticket.probe == self.probe

    def recover(self, now: float) -> list[str]:
        """Return to home, because its probe has committed."""
        self.close((self.home, self.away))
        self.returned_at = self.recovered_at = now
        return [self._move(f"RECOVERED: {self.home} answers again{self.label}", self.home,
                           "answers again")]

    def _move(self, line: str, to: str, reason: str, cooldown_s: float = 0) -> Move:
        move = Move(line)
        move.words = {"from": self.away if to == self.home else self.home, "to": to,
                      "scope": self.label.removeprefix(" for ") or MODE_AUTO, "reason": reason,
                      "minutes": str(tidy(round(cooldown_s / 60, 1)))}
        return move

    def succeed(self, ticket: Ticket) -> None:
        """Count a success of `ticket.target`."""
        if ticket.target == self.current:
            self.start_counting()
            self.level += not self.answered and not self.on_shelf
            self.answered = True

    def fail(self, now: float, ticket: Ticket, outcome: Outcome, auto: AutoSettings,
             followed: str) -> list[str]:
        """Count a failure of `ticket.target`.

        `followed` is the target that the scope gets once it is closed.  A direct failure does not
        switch back before the target switched to has answered.
        """
        failed = f"{ticket.target} failed{self.label}: {outcome.what}"
        if self.is_probe(ticket):
            return self._fail_probe(now, outcome, auto)
        if ticket.generation != self.generation or ticket.target != self.current:
            return [failed]
        if self._is_same_event(outcome):
            return [failed + " (the same event)"]
        count, limit, name = self._count(outcome, auto)
        of_limit = f" of {limit}" if count <= limit else ""
        lines = [f"{failed} ({count}{of_limit} {name} in a row)"]
        if count < limit or (outcome.direct and not self.answered):
            return lines
        reason = f"{count} consecutive {name}"
        if outcome.fault is not Fault.TIMEOUT:
            reason += f", last {outcome.what}"
        if outcome.fault is Fault.SHELF and self.real_failure:
            reason += f", after {self.real_failure}"
        if self.state != CLOSED and followed == self.away:
            # Closed, it would follow to the very target that it leaves.
            self.close((self.away, self.home))
        if self.state == CLOSED:
            return lines + self._open(now, reason, outcome, auto)
        self.close((self.home, self.away))
        self.returned_at = now
        self.switch_count += 1
        return [*lines, self._move(f"SWITCH {self.away} -> {self.home}{self.label}: {reason}",
                                   self.home, reason)]

    def _count(self, outcome: Outcome, auto: AutoSettings) -> tuple[int, int, str]:
        """Count a failure; return (how many in a row, how many switch, their name)."""
        self._counted_at.append(outcome.ended)
        if outcome.fault is not Fault.SHELF:
            self.real_failure = self.real_failure or outcome.what
        if outcome.fault is Fault.TIMEOUT:
            self.timeouts += 1
            return self.timeouts, auto.timeout_threshold, "timeouts"
        self.failures += 1
        return self.failures, auto.failure_threshold, "HTTP errors"

    def _open(self, now: float, reason: str, outcome: Outcome, auto: AutoSettings) -> list[str]:
        """Leave home, or stay away from it, for the next cooldown."""
        self.forget_level(now)
        self.returned_at = None
        cooldown_s = auto.cooldowns_s[min(self.level, len(auto.cooldowns_s) - 1)]
        shortest_s = min(cooldown_s, RECHECK_S)
        on_shelf = outcome.fault is Fault.SHELF
        if on_shelf:
            cooldown_s = shortest_s
        elif outcome.retry_after_s is not None:
            cooldown_s = min(cooldown_s, max(shortest_s, outcome.retry_after_s))
        if self.state == CLOSED:
            self.generation = next(self._serial)
        self.state, self.probe, self.answered = OPEN, 0, False
        self.on_shelf, self.shelf_said = on_shelf, outcome.what if on_shelf else ""
        self.start_counting()
        self.switch_count += 1
        self.reason, self.switched_at = reason, now
        self.retry_at, self.last_cooldown_s = now + cooldown_s, cooldown_s
        line = f"SWITCH {self.home} -> {self.away}{self.label}: {reason}; "
        return [self._move(f"{line}retry in {span(cooldown_s)}", self.away, reason, cooldown_s)]

    def _fail_probe(self, now: float, outcome: Outcome, auto: AutoSettings) -> list[str]:
        lines = [f"PROBE of {self.home} failed{self.label}: {outcome.what}"]
        still_on_shelf = outcome.fault is Fault.SHELF or (outcome.fault is Fault.STATUS and (
            outcome.status in (401, 403, 404) or outcome.status >= 500))
        if not (self.on_shelf and still_on_shelf):
            self._counted_at.append(outcome.ended)
            return lines + self._open(now, f"failed a probe, last {outcome.what}", outcome, auto)
        self._postpone_probe(now)
        if self.shelf_said == outcome.what:
            return []
        self.shelf_said = outcome.what
        return lines

    def _postpone_probe(self, now: float) -> None:
        self.state, self.probe = OPEN, 0
        self.retry_at = now + min(self.last_cooldown_s, RECHECK_S)

    def release(self, now: float, ticket: Ticket) -> list[str]:
        """Free the place of the probe, because its outcome is neutral."""
        if not self.is_probe(ticket):
            return []
        self._postpone_probe(now)
        left_s = self.remaining_s(now)
        return [f"PROBE of {self.home} inconclusive{self.label}; the next one in {span(left_s)}"]

    def forget_level(self, now: float) -> None:
        """Set N back if home has held for long enough."""
        if self.returned_at is not None:
            self.returned_at = min(self.returned_at, now)
            if now - self.returned_at >= 2 * self.last_cooldown_s:
                self.level, self.returned_at = 0, None

    def report(self, now: float) -> dict[str, Any]:
        """Return what /health shows of it."""
        is_open, remaining_s = self.state != CLOSED, self.remaining_s(now)
        return {"currentTarget": self.current, "switched": is_open,
                "switchCount": self.switch_count,
                "failureCount": self.failures, "timeoutCount": self.timeouts,
                "reason": self.reason, "switchedAt": utc(self.switched_at),
                "retryAt": utc(self.retry_at),
                "cooldownSeconds": tidy(round(self.last_cooldown_s, 3)) if is_open else 0,
                "cooldownRemainingSeconds": math.ceil(remaining_s)}

    SAVED: dict[str, tuple[type, ...]] = {
        "home": (str,), "away": (str,), "level": (int,), "switch_count": (int,),
        "answered": (bool,), "on_shelf": (bool,), "reason": (str,), "switched_at": (float, int),
        "retry_at": (float, int), "returned_at": (float, int), "last_cooldown_s": (float, int)}

    def save(self) -> dict[str, Any]:
        """Return what a restart must keep: all but the counters and a probe under way."""
        return dict({name: getattr(self, name) for name in self.SAVED}, open=self.state != CLOSED)

    def restore(self, saved: Any, longest_s: float) -> None:
        """Take over what `save` returned; raise StateError if it does not fit.

        `saved` comes from a file that anyone may have written; an older one has no `on_shelf`.
        """
        if not isinstance(saved, dict):
            raise StateError("expected an object")
        values: dict[str, Any] = {"on_shelf": False}
        values.update((name, saved[name]) for name in self.SAVED if name in saved)
        is_open = bool(saved.get("open"))
        for name, kinds in self.SAVED.items():
            value = values.setdefault(name, None)
            may_lack = name.endswith(("_at", "reason")) and not (is_open and name != "returned_at")
            if value is None and may_lack:
                continue
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise StateError(f"{name}: expected {kinds[0].__name__}")
            if isinstance(value, (int, float)) and not 0 <= value < 1e11:
                raise StateError(f"{name}: expected a number within reason")
        if ({values["home"], values["away"]} != {self.home, self.away}
                or values["last_cooldown_s"] > longest_s):
            raise StateError("the targets or cooldowns are not those of config.json")
        vars(self).update(values, reason=values["reason"] and printable(values["reason"]))
        self.state = OPEN if is_open else CLOSED


class Sessions(OrderedDict[Any, T]):
    """Facts about the sessions that sent last, for any thread; keys begin with the session's id."""

    def note(self, key: tuple[str, ...], value: T) -> None:
        """Keep `value` for some time, unless the key would take much memory."""
        if key[0] and len(key[0]) <= MODEL_NAME_MAX and len(key[-1]) <= MODEL_NAME_MAX:
            self.pop(key, None)         # it becomes the last
            self[key] = value
            while len(self) > SESSIONS_REMEMBERED:
                self.popitem(last=False)


class Failover:
    """Whose turn it is in auto mode: one breaker for the whole target, one for each single model.

    All methods may be called from any thread; `clock` returns Unix seconds.  They return lines for
    the log.
    """

    def __init__(self, clock: Callable[[], float], auto: AutoSettings) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._serial = itertools.count(1)
        self._auto = auto
        self._clear()

    def _clear(self) -> None:
        self._whole = Breaker(self._auto.targets, self._serial)
        self._models: OrderedDict[str, Breaker] = OrderedDict()
        self._places: Sessions[tuple[str, float]] = Sessions()      # last target, and when

    def reset(self, auto: AutoSettings, why: str) -> list[str]:
        """Forget everything, and continue with the settings `auto`."""
        with self._lock:
            used = self._whole.switch_count or not all(
                breaker.idle for breaker in (self._whole, *self._models.values()))
            self._auto = auto
            self._clear()
        return [f"RESET: {why}; on {auto.targets[0]}"] if used else []

    def admit(self, model: str, targets: tuple[str, str], session: str = "") -> Ticket:
        """Return the ticket for the first attempt of a request.

        `targets` are those of the request's snapshot.  If the configuration has changed since, the
        outcome of the attempt is ignored, as it is where a session stays.
        """
        with self._lock:
            if targets != self._auto.targets:
                return Ticket(targets[0], model, False, -1)
            now = self._clock()
            breaker, alone = self._breaker(model)
            cached = "" if alone else self._find_cache(now, session, model)
            if cached:
                ticket = Ticket(cached, model, False, -1, session=session)
            else:
                target, probe = breaker.admit(now)
                ticket = Ticket(target, model, alone, breaker.generation, probe,
                                bool(probe) and breaker.on_shelf, session)
            self._places.note((session, model), (ticket.target, now))
            return ticket

    def _find_cache(self, now: float, session: str, model: str) -> str:
        """Return the target where the session stays because of its prompt cache, or ""."""
        target, sent_at = self._places.get((session, model), ("", now))
        stays = now - sent_at < self._auto.stay_s and any(
            scope.lets_stay(now, target)
            for scope in (self._whole, self._models.get(model, self._whole)))
        return target if stays else ""

    def rescue(self, ticket: Ticket, targets: tuple[str, str]) -> Ticket:
        """Return the ticket for the second attempt, on the other of `targets`."""
        other = targets[1] if ticket.target == targets[0] else targets[0]
        with self._lock:
            if targets != self._auto.targets:
                return Ticket(other, ticket.model, False, -1)
            now, place = self._clock(), (ticket.session, ticket.model)
            self._places.note(place, (other, now))
            if self._find_cache(now, *place):   # only a recovery that is yet to come lets it stay
                del self._places[place]
            breaker, alone = self._breaker(ticket.model)
            return Ticket(other, ticket.model, alone, breaker.generation, session=ticket.session)

    def current(self, model: str | None, targets: tuple[str, str]) -> str:
        """Return the target, one of `targets`, for a request that is not judged."""
        with self._lock:
            current = self._breaker(model)[0].current
            return current if current in targets else targets[0]

    def _breaker(self, model: str | None) -> tuple[Breaker, bool]:
        """Return (the breaker that serves `model`, whether it is the model's own)."""
        own = self._models.get(model) if model is not None else None
        return (own, True) if own is not None and own.state != CLOSED else (self._whole, False)

    def commit(self, ticket: Ticket) -> tuple[Ticket, list[str]]:
        """Let a probe succeed, because the client gets its response.

        Returns the ticket with which the attempt continues, and lines for the log.
        """
        with self._lock:
            breaker = self._models.get(ticket.model) if ticket.alone else self._whole
            if not ticket.probe or breaker is None or not breaker.is_probe(ticket):
                return ticket, []
            lines = breaker.recover(self._clock())
            for place in [place for place in self._places if place[0] == ticket.session]:
                del self._places[place]
            if ticket.alone:
                self._align(breaker)
            else:
                self._follow()
            breaker, alone = self._breaker(ticket.model)
            return Ticket(ticket.target, ticket.model, alone, breaker.generation), lines

    def credit(self, ticket: Ticket) -> None:
        """Count a success: the upstream's response is complete."""
        with self._lock:
            self._whole.succeed(ticket)
            own = self._models.get(ticket.model)
            if own is not None:
                own.succeed(ticket)
                self._align(own)

    def charge(self, ticket: Ticket, outcome: Outcome) -> list[str]:
        """Count a failure.

        A model switched alone is charged in its own machine only: an exhausted model must not take
        the others along, neither with its probes nor with what it had under way when it switched.
        """
        with self._lock:
            now, whole, own = self._clock(), self._whole, self._models.get(ticket.model)
            place = ticket.session, ticket.model
            if place in self._places and self._places[place][0] == ticket.target:
                del self._places[place]
            if ticket.alone or (own is not None and own.state != CLOSED and not ticket.probe):
                if own is None:
                    return []
                lines = own.fail(now, ticket, outcome, self._auto, whole.current)
                self._align(own)
                return lines
            switches = whole.switch_count
            fresh = ticket.generation == whole.generation and ticket.target == whole.current
            lines = whole.fail(now, ticket, outcome, self._auto, whole.home)
            if whole.switch_count != switches:
                self._follow()
            elif fresh:
                lines += self._charge_model(now, ticket, outcome)
            return lines

    def release(self, ticket: Ticket) -> list[str]:
        """Take a neutral outcome: it frees the place of a probe."""
        with self._lock:
            breaker = self._models.get(ticket.model) if ticket.alone else self._whole
            return breaker.release(self._clock(), ticket) if breaker is not None else []

    def look_at_clock(self) -> None:
        """Bound the cooldowns if the clock was set back, although nothing asks for a target."""
        with self._lock:
            now = self._clock()
            for breaker in (self._whole, *self._models.values()):
                breaker.remaining_s(now)

    def _charge_model(self, now: float, ticket: Ticket, outcome: Outcome) -> list[str]:
        """Count a failure of the whole target for its model too; logged only if that switches."""
        if len(ticket.model) > MODEL_NAME_MAX:
            return []
        own = self._models.get(ticket.model)
        if own is None:
            if len(self._models) >= MODELS_REMEMBERED:
                # The one longest unseen goes, if possible one that is not switched.
                closed = (m for m, other in self._models.items() if other.state == CLOSED)
                del self._models[next(closed, next(iter(self._models)))]
            own = Breaker(self._ordered(), self._serial, f" for {printable(ticket.model)}")
            self._models[ticket.model] = own
        self._models.move_to_end(ticket.model)
        own.answered = self._whole.answered     # they are on the same target
        ticket = ticket._replace(generation=own.generation)
        lines = own.fail(now, ticket, outcome, self._auto, own.home)
        own.answered = own.answered or own.state == CLOSED
        return lines[1:]

    def _ordered(self) -> tuple[str, str]:
        """Return the targets, the one that serves the whole first."""
        whole = self._whole
        return (whole.home, whole.away) if whole.state == CLOSED else (whole.away, whole.home)

    def _align(self, own: Breaker) -> None:
        """Let a model follow the whole target unless it is switched alone.

        A model alone on the very target that the whole has returned to has no reason to be alone.
        """
        first, second = self._ordered()
        if ((own.state == CLOSED and own.home != first)
                or (own.state != CLOSED and own.away == first == self._whole.home)):
            own.close((first, second))

    def _follow(self) -> None:
        """Reset the counters of the models, because the whole target has switched."""
        for own in self._models.values():
            if own.state == CLOSED:
                own.start_counting()
            self._align(own)

    def report(self, active: bool) -> dict[str, Any]:
        """Return the `autoSwitch` object of /health."""
        with self._lock:
            now, common = self._clock(), {"active": active, "targets": list(self._auto.targets)}
            models = {model: dict(common, **own.report(now))
                      for model, own in self._models.items() if own.state != CLOSED}
            return dict(common, **self._whole.report(now), models=models)

    def save(self) -> dict[str, Any]:
        """Return what state.json keeps."""
        with self._lock:
            return {"whole": self._whole.save(),
                    "models": {model: own.save() for model, own in self._models.items()
                               if own.state != CLOSED or own.level}}

    def restore(self, saved: Any) -> None:
        """Take over what `save` returned; if it does not fit, change nothing, raise StateError."""
        longest_s = max(self._auto.cooldowns_s)
        if not isinstance(saved, dict) or not isinstance(saved.get("models"), dict):
            raise StateError("expected an object with whole and models")
        whole = Breaker(self._auto.targets, self._serial)
        whole.restore(saved.get("whole"), longest_s)
        if whole.home != self._auto.targets[0]:
            raise StateError(f"whole.home: expected {self._auto.targets[0]}")
        models: OrderedDict[str, Breaker] = OrderedDict()
        for model, own in list(saved["models"].items())[:MODELS_REMEMBERED]:
            models[model] = Breaker(self._auto.targets, self._serial, f" for {printable(model)}")
            models[model].restore(own, longest_s)
        with self._lock:
            self._whole, self._models = whole, models


def _status_note(auto: dict[str, Any]) -> str:
    """Return " (antigravity 429, 23m)": which target failed, how, and when it is probed."""
    if not auto["switched"]:
        return ""
    failed = next(name for name in auto["targets"] if name != auto["currentTarget"])
    what = re.sub("^(.*last|[0-9]+ consecutive) |,.*", "", auto["reason"] or "")
    left = auto["cooldownRemainingSeconds"]
    when = f"{math.ceil(left / 60)}m" if left >= 60 else f"{left}s" if left else "now"
    return f" ({failed} {printable(what, 40)}, {when})"


def status_line(health: dict[str, Any], models: tuple[str, ...] = ()) -> str:
    """Return /health in one line, or the `models` that a session asked for and got, and why."""
    auto = health["autoSwitch"]
    if models:
        asked, answered = (printable(model.removeprefix("claude-"), 40) for model in models)
        own = auto["models"].get(models[0], auto)
        parts = [f"asked {asked}, answered {answered}{_status_note(own) if auto['active'] else ''}"]
    elif auto["active"]:
        scopes = {"auto": auto, **auto["models"]}
        parts = [f"{printable(name, 40)} → {own['currentTarget']}{_status_note(own)}"
                 for name, own in itertools.islice(scopes.items(), STATUS_SCOPES)]
        hidden = len(scopes) - len(parts)
        parts += [f"{hidden} more"] if hidden else []
    else:
        parts = [health["mode"]]
    count = len(health["problems"])
    parts += [f"{count} problem{'s' * (count > 1)}: rrouter status"] if count else []
    return ", ".join(parts)


# ---- Everything above is pure; everything below does I/O. ----


# Files ########################################################################

class Paths:
    """Where rrouter keeps its files."""

    def __init__(self, home: str):
        self.root = os.path.join(home, ".rrouter")
        self.mode = os.path.join(self.root, "mode")
        self.config = os.path.join(self.root, "config.json")
        self.pid = os.path.join(self.root, "rrouter.pid")
        self.lock = os.path.join(self.root, "rrouter.lock")
        self.run = os.path.join(self.root, "run.json")
        self.state = os.path.join(self.root, "state.json")
        self.record = os.path.join(self.root, "install.json")
        self.log = os.path.join(self.root, "logs", "rrouter.log")

    def create(self) -> None:
        """Create the directories, for this user alone; raise DaemonError if that fails."""
        try:
            for directory in (self.root, os.path.dirname(self.log)):
                os.makedirs(directory, 0o700, exist_ok=True)
                if stat.S_IMODE(os.stat(directory).st_mode) != 0o700:   # chmod can hang
                    os.chmod(directory, 0o700)
        except OSError as error:
            path = error.filename or self.root
            if os.path.islink(path) and not os.path.exists(path):
                raise DaemonError(f"{path}: a symbolic link that leads nowhere: remove it, or "
                                  "create its target") from error
            raise DaemonError(f"{path}: {reason_of(error)}: rrouter keeps "
                              "its files there; set HOME to a directory you can write") from error


def write_atomically(path: str, text: str, durable: bool = True) -> None:
    """Write `text` to `path`, mode 0600: a reader sees the whole new content or the whole old one.

    A symbolic link stays, its target is replaced.  Unless `durable`, a crash of the machine may
    lose the content.  Raises OSError.
    """
    path = os.path.realpath(path)
    temporary = f"{path}.{os.getpid()}.{threading.get_ident()}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            if durable:                 # else a crash may leave the new name with no content
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def read_file(path: str) -> bytes | None:
    """Return the bytes of a regular file, None if nothing is at `path`; else raise OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)     # a FIFO would block
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        if status.st_size > FILE_MAX_BYTES:
            raise OSError(errno.EFBIG, f"larger than {FILE_MAX_BYTES} bytes", path)
        content = b""
        while True:
            more = os.read(descriptor, FILE_MAX_BYTES)
            content += more
            if not more or len(content) > FILE_MAX_BYTES:
                return content
    finally:
        os.close(descriptor)


def _signature(path: str) -> tuple[int, int, int, int] | int | None:
    """Return a value that changes with each write of the file; None if it does not exist.

    Compared by equality, because `mv` and `git checkout` can bring an older time.  The last member,
    the time of the last change of any kind, changes even if a writer sets the other time back.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        return error.errno
    return status.st_mtime_ns, status.st_size, status.st_ino, status.st_ctime_ns


def _if_stable(signature: object) -> object:
    """Return `signature`, or what equals nothing while the next write may not change it."""
    if isinstance(signature, tuple):
        settled_s = SETTLED_S if signature[3] % 1_000_000_000 else SETTLED_COARSE_S
        if time.time() - signature[3] / 1e9 < settled_s:
            return object()
    return signature


def _write_all(descriptor: int, data: bytes) -> OSError | None:
    """Write `data`, in one piece if the system lets; return the error that ended it early."""
    try:
        while data:
            data = data[os.write(descriptor, data):]
    except OSError as error:
        return error
    return None


class Log:
    """The log file, rotated by size.  Any thread may add lines; only the watcher writes them.

    So a disk that hangs holds up no request; `kill -9` can lose the lines of the last POLL_S.
    `open`, `reopen` and `flush` are for one thread at a time.
    """

    HELD_MAX = 10_000       # lines; only while the disk hangs can so many be held
    MANY = 1_000            # lines that wake the watcher early
    ECHO_S = 0.2            # how long to wait, once, for a stderr that accepts nothing

    def __init__(self, path: str, echo: bool):
        self._path, self._echo = path, echo
        self.wake: Callable[[], None] = lambda: None    #: wakes the watcher; must not block
        self.problem: str | None = None
        self._lock = threading.Lock()       # keeps the lines in the order of their times
        self._lines: deque[bytes] = deque(maxlen=self.HELD_MAX)
        self._second, self._stamp = 0, ""   # of the last line
        self._descriptor: int | None = None
        self._echo_stuck = False

    def write(self, tag: str, text: str) -> None:
        """Add one line; the caller has made everything printable that comes from outside."""
        with self._lock:
            now = time.time()
            if self._second != int(now):
                self._second = int(now)
                self._stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
            if len(self._lines) == self.HELD_MAX:
                self.problem = "rrouter.log: the disk does not respond: log lines are lost"
            line = f"{self._stamp}.{int(now % 1 * 1000):03d} [{tag}] {text}\n"
            self._lines.append(line.encode("utf-8", "replace"))
            many = len(self._lines) == self.MANY
        if many:
            self.wake()

    def flush(self) -> None:
        """Write the lines added so far."""
        data = b"".join([self._lines.popleft() for _ in range(len(self._lines))])
        if not data:
            return
        if self._descriptor is not None:
            self._rotate_if_full(self._descriptor, len(data))
        if self._descriptor is not None:
            self._note(_write_all(self._descriptor, data))
        if self._echo:
            self._write_stderr(data)

    def _write_stderr(self, data: bytes) -> None:
        """Write as much to stderr as it accepts: a terminal may be stopped, a pipe full."""
        poller = select.poll()
        poller.register(2, select.POLLOUT)
        # A pipe that is ready accepts PIPE_BUF bytes without blocking.
        for start in range(0, len(data), select.PIPE_BUF):
            if not poller.poll(0 if self._echo_stuck else int(self.ECHO_S * 1000)):
                self._echo_stuck = True
                return
            self._echo_stuck = False
            _write_all(2, data[start:start + select.PIPE_BUF])

    def _note(self, error: OSError | None) -> None:
        """Keep the problem for /health; say it once on stderr, with the path."""
        problem = f"rrouter.log: {reason_of(error)}: log lines are lost" if error else None
        if problem and not self.problem:        # /health has no path, because it names the user
            line = f"rrouter: {problem} ({self._path})\n"
            self._write_stderr(line.encode("utf-8", "replace"))
        self.problem = problem

    def open(self) -> None:
        """Open the file; if that fails, `problem` says why."""
        problem: OSError | None = None
        descriptor = None
        try:
            os.makedirs(os.path.dirname(self._path), 0o700, exist_ok=True)
            # A FIFO without a reader would block.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
            descriptor = os.open(self._path, flags, 0o600)
        except OSError as error:
            problem = error
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = descriptor
        if descriptor is not None and not self._echo:
            os.dup2(descriptor, 2)      # the daemon's stderr, for messages of Python itself
        self._note(problem)

    def reopen(self) -> None:
        """Open the file at the path if it is another one: others rotate and remove files too."""
        with contextlib.suppress(OSError):
            if self._descriptor is not None and os.path.samestat(
                    os.stat(self._path), os.fstat(self._descriptor)):
                return
        self.open()

    def _rotate_if_full(self, descriptor: int, coming: int) -> None:
        """Begin a new file if the next `coming` bytes do not fit; if that fails, keep the old."""
        with contextlib.suppress(OSError):
            if os.fstat(descriptor).st_size + coming <= LOG_MAX_BYTES:
                return
            # Two processes may write the same file.  One of them rotates it; the other finds
            # another file at the path.  Closing the file in `open` releases the lock.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(self._path), os.fstat(descriptor)):
                for number in range(LOG_FILES - 1, 0, -1):
                    with contextlib.suppress(FileNotFoundError):
                        os.replace(f"{self._path}.{number}", f"{self._path}.{number + 1}")
                os.replace(self._path, f"{self._path}.1")
            self.open()


class Store:
    """The user's config and mode, always read together and never stale.

    `changed(old, new, mode_written)` is called, one call at a time, before any thread gets the new
    snapshot.  Call `load` before anything else.
    """

    def __init__(self, paths: Paths, log: Log, changed: Callable[[Snapshot, Snapshot, bool], None]):
        self.paths, self._log, self._changed = paths, log, changed
        self._lock = threading.Lock()
        self.condition = threading.Condition()      #: notified to let the watcher look at once
        self._config = config_of(None)
        self._config_bytes: bytes | OSError | None = None
        self._config_error: str | None = None
        self._word: str | None = None
        self._mode_error: str | None = None
        self.mode_signature: tuple[int, ...] | int | None = None
        self._current = Snapshot(self._config, "", ())
        self._seen: object = None

    def load(self) -> Snapshot:
        """Read the files for the first time; return config and mode."""
        with self._lock:
            seen = self._read()
            new = self._compose()
            self._log.write("MODE", new.mode)
            return self._publish(new, seen)

    def snapshot(self) -> Snapshot:
        """Return config and mode as they are now: every write before this call has its effect.

        It takes no lock.  That holds without the interpreter lock too, because `_publish` stores
        `_seen` after `_current`, and Python's attribute access is atomic (PEP 703).
        """
        if (_signature(self.paths.mode), _signature(self.paths.config)) == self._seen:
            return self._current
        return self._reload()

    def wake(self) -> None:
        """Let the watcher look at once."""
        with self.condition:
            self.condition.notify_all()

    def fingerprint(self) -> dict[str, Any]:
        """Return what ties a saved state to the mode file and to the `auto` section."""
        with self._lock:        # not between a new mode and the reset that it brings
            written = self.mode_signature
            return {"modeFile": list(written) if isinstance(written, tuple) else written,
                    "auto": [list(value) if isinstance(value, tuple) else value
                             for value in self._current.config.auto]}

    def _reload(self) -> Snapshot:
        with self._lock:
            old, old_signature = self._current, self.mode_signature
            seen = self._read()
            new, written = self._compose(), self.mode_signature != old_signature
            if new.mode != old.mode:
                self._log.write("MODE", f"{old.mode} -> {new.mode}")
            if written or new != old:
                self._changed(old, new, written)
            return self._publish(new, seen)

    def _read(self) -> tuple[Any, Any]:
        """Read both files; return the signatures they had before."""
        seen = _signature(self.paths.mode), _signature(self.paths.config)
        self._read_config()
        self._read_mode(seen[0])
        return seen

    def _publish(self, new: Snapshot, seen: tuple[Any, Any]) -> Snapshot:
        self._current = new
        # `_seen` last, because `snapshot` compares it without the lock.  A file that could not be
        # read is read again by the next request.
        readable = self._mode_error is None and not isinstance(self._config_bytes, OSError)
        self._seen = (_if_stable(seen[0]), _if_stable(seen[1])) if readable else None
        return new

    def _read_config(self) -> None:
        try:
            content = read_file(self.paths.config)
            if content == self._config_bytes:
                return
            self._config_bytes = content
            self._config = config_of(content)
            self._config_error = None
            for problem in self._config.problems:
                self._log.write("CONFIG", f"config.json: {problem}")
            self._log.write("CONFIG", "config.json loaded" if content is not None else
                            "no config.json: the defaults are in force")
        except (ConfigError, UnicodeDecodeError, OSError) as error:
            complaint = describe_config_error(error)
            if isinstance(error, OSError):
                self._config_bytes = error
            if complaint != self._config_error:
                self._config_error = complaint
                self._log.write("CONFIG", f"{complaint}; the previous config stays in force")

    def _read_mode(self, signature: tuple[int, ...] | int | None) -> None:
        try:
            content = read_file(self.paths.mode)
        except OSError as error:
            self._mode_error = f"mode: {reason_of(error)}: the mode in force stays"
            return
        self._mode_error = None
        word = mode_word(content)
        if word != "":                  # else it is just being written
            self._word = word
            # chmod changes the last member, but does not write the mode.
            self.mode_signature = signature[:3] if isinstance(signature, tuple) else signature

    def _compose(self) -> Snapshot:
        config, word = self._config, self._word
        mode = config.resolve(word if word is not None else config.default_mode)
        problems = [self._config_error, *(f"config.json: {problem}" for problem in config.problems),
                    self._mode_error]
        if word == MODE_AUTO and word != mode:
            complaint = f"config.json: {config.auto_error}"
            problems += [] if complaint in problems else [complaint]
        elif word is not None and word != mode:
            defined = ", ".join([*config.modes, MODE_AUTO])
            problems.append(f"mode: '{printable(word, 40)}' is not defined by config.json "
                            f"(defined: {defined}); {mode} is in force")
        return Snapshot(config, mode, tuple(problem for problem in problems if problem))


class StateFile:
    """state.json: the state of auto mode, kept over a restart.

    One thread at a time writes it, and takes the state while it has the turn, so that an older
    state never replaces a newer one.
    """

    def __init__(self, path: str, log: Log):
        self._path, self._log = path, log
        self._lock = threading.Lock()
        self._saved: dict[str, Any] | None = None
        self.problem: str | None = None     #: why the last state could not be written

    def load(self, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
        """Return the state that was saved with this `fingerprint`, or None without a file.

        Raises StateError if the file is unusable or was saved with another fingerprint.
        """
        try:
            content = read_file(self._path)
            if content is None:
                return None
            state = json.loads(content.decode("utf-8"))
        except OSError as error:
            raise StateError(reason_of(error)) from error
        except (ValueError, RecursionError) as error:
            raise StateError("not the JSON that rrouter wrote") from error
        if not isinstance(state, dict) or state.get("version") != 1:
            raise StateError("not written by this version of rrouter")
        for name, what in (("modeFile", "the mode file"), ("auto", "the auto section")):
            if state.get(name) != fingerprint[name]:
                raise StateError(f"{what} was written since")
        return state

    def forget(self) -> None:
        """Let the next `save` write, because the file was removed."""
        self._saved = None

    def save(self, make: Callable[[], dict[str, Any]]) -> None:
        """Write the state that `make` returns, fingerprint included, unless it is the last saved.

        Never raises; a failure is logged once.
        """
        with self._lock:
            state = make()
            if state == self._saved:
                return
            try:
                text = json.dumps({"version": 1, **state}, indent=1)
                write_atomically(self._path, text + "\n")
                self._saved, self.problem = state, None
            except OSError as error:
                problem = (f"state.json: cannot be written: {reason_of(error)}: "
                           "a restart forgets the cooldowns")
                if problem != self.problem:
                    self._log.write("AUTO", problem)
                self.problem = problem


# Resources ####################################################################

# Each part of this section saves processor time or memory and does nothing else.  Without it:
#
#   RememberedHead         a request of 1 KB takes 353 us instead of 257
#   OneCore                32 busy connections get 0.6 of the requests/s
#   use_one_heap           46 MB stay resident after load instead of 18
#   return_free_memory     50 streams of a minute leave up to 45 MB
#   outlive_main_script    27 MB are resident when idle instead of 18

_ONE_LENGTH = re.compile(b"(?i)\r\nContent-Length:[ ]?(%b)\r\n" % _NUMBER.pattern)


class RememberedHead:
    """The last request head of a connection: the next one often differs only by its length."""

    def __init__(self) -> None:
        self._before = self._after = b""    # the bytes before and after the Content-Length value
        self._head: RequestHead | None = None

    def remember(self, data: bytes, head: RequestHead) -> None:
        """Keep `head`, which was parsed from `data`."""
        number = _ONE_LENGTH.search(data)
        if number:
            self._before, self._after = data[:number.start(1)], data[number.end(1):]
        else:
            self._before, self._after = data, b""
        self._head = head

    def match(self, data: bytes) -> tuple[RequestHead, int] | None:
        """Return (head, its size in bytes) if `data` begins with the same head, else None."""
        head, end = self._head, len(self._before)
        if head is None or not data.startswith(self._before):
            return None
        if not self._after:
            return head, end
        number = _NUMBER.match(data, end)
        if not number or not data.startswith(self._after, number.end()):
            return None
        length = int(number.group())
        if length > BODY_MAX_BYTES:
            return None
        end = number.end() + len(self._after)
        return (head if length == head.length else head._replace(length=length)), end


class OneCore:
    """Keeps the threads of the connections on one core of Linux while they have much to do.

    Only one of them at a time runs Python code, and passing the interpreter lock from core to core
    takes longer than most of what the lock is needed for.  When there is little to do, a thread is
    better off on whichever core is free.
    """

    ACTIVE_MIN = 8                      # requests under way
    BUSY, CALM = 0.2, 0.1               # share of one core: where this begins, and where it ends
    PERIOD_S = POLL_S * 0.9             # a shorter time proves nothing

    def __init__(self) -> None:
        self._core: int | None = None   # the core that the threads keep to
        self._seen = 0.0, 0.0

    def look(self, active: int, threads: list[int], now: float, used_s: float) -> None:
        """Decide again; not to be called from one of `threads`, which are native ids.

        `active` is the number of requests under way.  `now` (time.monotonic) and `used_s` show how
        busy the process was since the last call: processor time in user mode, because the kernel
        does not need the interpreter lock.
        """
        if now - self._seen[0] < self.PERIOD_S or not hasattr(os, "sched_setaffinity"):
            return
        busy = (used_s - self._seen[1]) / (now - self._seen[0])
        self._seen = now, used_s
        with contextlib.suppress(OSError):              # a sandbox may forbid it
            allowed = os.sched_getaffinity(0)           # each time, because the user may change it
            enough = min(active, len(threads)) >= self.ACTIVE_MIN
            if not enough or busy < (self.BUSY if self._core is None else self.CALM):
                if self._core is not None:
                    self._core = None
                    self._place(threads, allowed)
                return
            if self._core not in allowed:
                self._core = self._core_of(threads[0])
            if self._core in allowed:
                self._place(threads, {self._core})

    @staticmethod
    def _core_of(thread: int) -> int | None:
        """Return the core a busy thread last ran on: the kernel knows the fast cores."""
        # The thread may have ended, and not every system has /proc.
        with contextlib.suppress(OSError, ValueError, IndexError):
            descriptor = os.open("/proc/self/task/%d/stat" % thread, os.O_RDONLY)
            try:
                return int(os.read(descriptor, 4096).rpartition(b")")[2].split()[36])
            finally:
                os.close(descriptor)
        return None

    @staticmethod
    def _place(threads: list[int], cores: Iterable[int]) -> None:
        for thread in threads:
            with contextlib.suppress(OSError):          # it has ended
                os.sched_setaffinity(thread, cores)


def _ask_libc(function: str, *arguments: int) -> None:
    """Call a function of glibc; do nothing on other systems."""
    with contextlib.suppress(ImportError, OSError, AttributeError, MemoryError):
        import ctypes
        getattr(ctypes.CDLL(None), function)(*arguments)


def use_one_heap() -> None:
    """Make glibc use one malloc arena, because it never returns the free end of the others.

    To be called before there are threads.  The interpreter lock lets one thread allocate at a time
    anyway.
    """
    _ask_libc("mallopt", -8, 1)         # M_ARENA_MAX in <malloc.h>


def return_free_memory() -> None:
    """Return to the system what Python has freed and the C library keeps."""
    _ask_libc("malloc_trim", 0)


def outlive_main_script(run: Callable[[], None]) -> None:
    """Call `run` in a thread that outlives the main script.

    Python keeps the syntax tree of the script, 8 MB, until it has ended.  The interpreter waits for
    the thread before it finalizes anything.
    """
    if (3, 12) <= sys.version_info < (3, 12, 2):    # no thread starts there after it (gh-113964)
        run()
    else:
        threading.Thread(target=run).start()


# Upstream #####################################################################

# The option that ends a connection which no longer acknowledges, and its value.
UNACKNOWLEDGED = ((0x80, UNACKNOWLEDGED_S) if sys.platform == "darwin" else     # RXT_CONNDROPTIME
                  (getattr(socket, "TCP_USER_TIMEOUT", None), UNACKNOWLEDGED_S * 1000))
# As a number, because `|` of the standard library's flags runs 5 us of Python code.
PEEK_NOW = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)
NOTHING_CAME = (BlockingIOError, socket.timeout)        # within the socket's time limit


class Watch:
    """What ends a wait for the upstream: the client leaves, or the attempt's time limit expires.

    `has_left` says whether the client has left; None if there is no client to watch.
    """

    def __init__(self, has_left: Callable[[], bool] | None, limit_s: float | None = None) -> None:
        self._has_left, self._limit_s = has_left, limit_s
        self._looked_at = self._checked_at = time.monotonic()
        self._deadline: float | None = None

    def start(self) -> None:
        """Let the time limit begin, unless it has."""
        if self._limit_s is not None and self._deadline is None:
            self._checked_at = time.monotonic()
            self._deadline = self._checked_at + self._limit_s

    def lift(self) -> None:
        """Remove the time limit."""
        self._limit_s = self._deadline = None

    def check(self, has_input: Callable[[], bool] | None = None) -> float:
        """Return the seconds after which to ask again.

        Raises ClientGone or UpstreamTimeout if the wait is over.  The limit does not expire while
        the process is not running, nor before what has arrived is read: `has_input` says whether
        there is something to read.
        """
        now = time.monotonic()
        if self._has_left is not None and now - self._looked_at >= TICK_S * 0.9:
            self._looked_at = now
            if self._has_left():
                raise ClientGone()
        if self._deadline is None:
            return TICK_S
        stopped_s = now - self._checked_at - TICK_S
        if stopped_s > STOPPED_S:
            self._deadline += stopped_s
        self._checked_at = now
        if now < self._deadline:
            return min(TICK_S, max(0.001, self._deadline - now))
        if has_input is None or not has_input():
            raise UpstreamTimeout("sent no first byte within %g s" % (self._limit_s or 0))
        return TICK_S


class Patience:
    """How long one request waits for an upstream that is not there: a restart, say."""

    def __init__(self, has_left: Callable[[], bool]) -> None:
        self._has_left = has_left
        self._give_up_at: float | None = None

    def wait(self) -> bool:
        """Wait a moment before the next try; return False if it is time to give up.

        Raises ClientGone.
        """
        now = time.monotonic()
        if self._give_up_at is None:
            self._give_up_at = now + RECONNECT_FOR_S
        if now + RECONNECT_EVERY_S > self._give_up_at:
            return False
        time.sleep(RECONNECT_EVERY_S)
        if self._has_left():
            raise ClientGone()
        return True

    def give_up(self) -> None:
        """Wait no more, because the upstream has responded."""
        self._give_up_at = 0.0


class Outbound(NamedTuple):
    """A request as it goes upstream."""

    method: str
    pieces: Sequence[BytesLike]
    #: called with each 1xx head; None drops them: HTTP/1.0 does not know them (RFC 9110 §15.2)
    interim: Callable[[ResponseHead], None] | None


def is_loopback(address: str) -> bool:
    """Return whether an address, in figures, is one of this machine alone."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def set_kernel_limit(sock: socket.socket, option: int, seconds: float) -> None:
    """Set SO_RCVTIMEO or SO_SNDTIMEO; raise OSError."""
    time_value = int(seconds), int(seconds % 1 * 1e6)
    try:
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", *time_value))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # A 32-bit system with 64-bit time.  Not first: 32-bit x86 accepts and misreads it.
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@qq", *time_value))


class Wire:
    """One end of a connection: its socket, and the bytes received but not yet used.

    The time limits of a plain socket are the kernel's (SO_RCVTIMEO), because Python's `settimeout`
    costs a poll before each call.
    """

    def __init__(self, sock: socket.socket, receive_bytes: int) -> None:
        self.sock = sock
        self.held: bytes | memoryview = b""
        self._receive_bytes = receive_bytes
        # A TLS socket would take EAGAIN for a reason to try again.
        self._plain = type(sock) is socket.socket
        self._limit_s = 0.0

    def set_up(self, send_limit_s: float) -> None:
        """Set the socket's options; raise OSError if it is closed already."""
        if self._plain:
            self.sock.settimeout(None)
            set_kernel_limit(self.sock, socket.SO_SNDTIMEO, send_limit_s)
        # Without this each event of a stream waits 40 ms for an acknowledgement.
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def limit(self, seconds: float) -> None:
        """Let `receive` raise one of NOTHING_CAME after so many seconds without a byte."""
        if seconds != self._limit_s:
            self._limit_s = seconds
            if self._plain:
                set_kernel_limit(self.sock, socket.SO_RCVTIMEO, seconds)
            else:
                self.sock.settimeout(seconds)

    def receive(self) -> bytes:
        """Return the next bytes, b"" at the end of the connection."""
        if self.held:
            data, self.held = self.held, b""
            return bytes(data)
        return self.sock.recv(self._receive_bytes)

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(OSError):
            self.sock.close()


class UpstreamConnection(Wire):
    """A connection to the upstream, opened by `http.client`, whose responses our parser reads.

    `http.client` takes a truncated head for a 200 with an empty body, passes unknown transfer
    codings on, and ends a truncated body as if it were whole (python/cpython#115997).
    """

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        super().__init__(connection.sock, RECEIVE_BYTES)
        self._connection = connection
        self._poller = select.poll()
        self._responding = False        # a byte of the response due has come
        self._sent_at: float | None = None      # the time of the last byte, None: sending failed
        self._idle_since = 0.0, 0.0     # monotonic time and wall clock

    def set_up(self, send_limit_s: float) -> None:
        """Set the socket's options."""
        super().set_up(send_limit_s)
        self._poller.register(self.sock, select.POLLIN)
        option, value = UNACKNOWLEDGED
        if option is not None and not is_loopback(self.sock.getpeername()[0]):
            with contextlib.suppress(OSError):          # a system that imitates Linux
                self.sock.setsockopt(socket.IPPROTO_TCP, option, value)
        if isinstance(self.sock, ssl.SSLSocket):    # an end without close_notify is a truncation
            setattr(self.sock, "suppress_ragged_eofs", False)   # noqa: B010 - typeshed lacks it

    def has_input(self) -> bool:
        """Return whether something has come that is not yet read, or the end of the connection.

        To be asked by one thread at a time, and not of a closed connection, because another one may
        have its number by then.
        """
        if self._plain:
            return bool(self._poller.poll(0))
        # TLS: session tickets come unasked, and only reading tells them from a response.
        self.limit(0)
        try:
            self.held = bytes(self.held) + self.sock.recv(RECEIVE_BYTES)
            return True
        except OSError as error:
            return not isinstance(error, ssl.SSLWantReadError)

    def send(self, pieces: Sequence[BytesLike], watch: Watch) -> list[memoryview]:
        """Send `pieces`; return what is left of them.

        Something is left where the upstream responds, or closes, before it has read everything.
        """
        if sum(map(len, pieces)) < JOINED_BYTES:
            pieces = [b"".join(pieces)]
        views = [memoryview(piece) for piece in pieces if len(piece)]
        self._sent_at = None
        if not self._plain:
            self.limit(watch.check())       # `has_input` leaves it at 0
        while views:
            several = self._plain and len(views) > 1
            try:
                sent = self.sock.sendmsg(views) if several else self.sock.send(views[0])
            except NOTHING_CAME as error:
                sent = 0
                if error.errno == errno.ETIMEDOUT or self.has_input():
                    return views
                self.limit(watch.check())
            except OSError:
                return views            # there may be a response to read: 413, say
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = views[0][sent:]
            if views:
                watch.check()
        self._sent_at = time.monotonic()
        return views

    def rest(self) -> None:
        """Be idle from now on."""
        self._idle_since = time.monotonic(), time.time()

    @property
    def is_old(self) -> bool:
        """True if it has been idle for too long; the monotonic clock stops while systems sleep."""
        since, wall_since = self._idle_since
        return max(time.monotonic() - since, abs(time.time() - wall_since)) >= POOL_IDLE_S

    def expect_response(self) -> None:
        """Begin a request: no byte of its response has come."""
        self._responding = False

    @property
    def was_stale(self) -> bool:
        """True if this connection broke as one does that was dead before the request."""
        soon = self._sent_at is None or time.monotonic() - self._sent_at < STALE_S
        return soon and not self._responding

    def wait(self, watch: Watch) -> bytes:
        """Return the next bytes, b"" at the end; raise what `watch` raises, or UpstreamError."""
        if self.held:
            return self.receive()
        while True:
            self.limit(watch.check(self.has_input))
            try:
                return self.receive()
            except NOTHING_CAME as error:
                if error.errno == errno.ETIMEDOUT:      # the network's limit, not ours
                    raise UpstreamError("broke the connection: timed out") from error
            except OSError as error:
                raise UpstreamError(f"broke the connection: {reason_of(error)}") from error

    def read_head(self, watch: Watch) -> ResponseHead:
        """Return the next head, 1xx ones included."""
        data = b""
        while True:
            more = self.wait(watch)
            if not more:
                raise UpstreamError("broke off in the head of its response" if data else
                                    "closed the connection before its response")
            self._responding = True
            data += more
            end = data.find(b"\r\n\r\n", max(0, len(data) - len(more) - 3)) + 4
            if end >= 4:
                self.held = data[end:]
                return parse_response_head(data[:end])
            if (len(data) > HEAD_MAX_BYTES or not b"HTTP/1.".startswith(data[:7])
                    or _BARE_LF.search(data, len(data) - len(more))):
                raise UpstreamError("sent a malformed response head")

    def close(self) -> None:
        """Close the connection, without the rest of a response."""
        with contextlib.suppress(OSError):
            self._connection.close()


class Response:
    """A response of the upstream: its head, and its body as it comes.

    `ahead` is payload that was read before it was known whether the client gets this response.
    `release` takes the connection when the body is complete and another request may use it.
    """

    CODINGS = ("", "gzip", "deflate")       #: the content encodings that `text` understands

    def __init__(self, head: ResponseHead, body: FixedBody | ClosingBody,
                 connection: UpstreamConnection,
                 release: Callable[[UpstreamConnection], None] | None) -> None:
        self.head, self.ahead = head, b""
        self._body, self._connection, self._release = body, connection, release
        self._error: UpstreamError | None = None

    @property
    def complete(self) -> bool:
        """True when the whole body has been received."""
        return self._body.done

    def hand_back(self) -> None:
        """Return the connection to the pool, or close it, if the body is complete."""
        if self._body.done:
            if (self._release is None or not self.head.keep_alive or not self._body.delimited
                    or self._body.rest or self._connection.held):
                self._connection.close()
            else:
                self._release(self._connection)

    def take_held(self) -> None:
        """Add to `ahead` the payload that came together with the head, without waiting for more."""
        if self._connection.held and not self._body.done:
            self.ahead += self._body.feed(self._connection.receive())
            self.hand_back()

    def receive(self, watch: Watch) -> bytes:
        """Return the next payload; b"" may come with `complete`.

        Raises UpstreamError, ClientGone, UpstreamTimeout.
        """
        if self._error is not None:
            raise type(self._error)(str(self._error))   # a new one: see `without_trace`
        if self._body.done:
            return b""
        payload, body = b"", self._body
        while not payload and not body.done:
            data = self._connection.wait(watch)
            if data:
                payload = body.feed(data)
            else:
                body.finish()
        self.hand_back()
        return payload

    def text(self) -> bytes:
        """Return what is in `ahead`, decompressed if it is compressed.

        Of what decompresses to more than READ_AHEAD_MAX_BYTES one byte more than these is returned.
        """
        if self.head.coding not in ("gzip", "deflate"):
            return self.ahead
        for format_bits in (zlib.MAX_WBITS | 32, -zlib.MAX_WBITS):  # with a header, or without
            with contextlib.suppress(zlib.error):
                decoder = zlib.decompressobj(format_bits)
                return decoder.decompress(self.ahead, READ_AHEAD_MAX_BYTES + 1)
        return b""

    def read_ahead(self, watch: Watch) -> bool:
        """Receive more into `ahead`; return whether there may be still more.

        A body that breaks off or stalls is kept as far as it came; `receive` reports the break.
        """
        if self.complete or self._error is not None or len(self.ahead) > READ_AHEAD_MAX_BYTES:
            return False
        try:
            self.ahead += self.receive(watch)
        except UpstreamTimeout:
            return False
        except UpstreamError as error:
            self._error = without_trace(error)
            return False
        return not self.complete

    def close(self) -> None:
        """Break the connection off unless the response is complete."""
        if not self.complete:
            self._connection.close()


class Upstream:
    """The upstream and the connections kept open to it."""

    def __init__(self, url: str, is_own_address: Callable[[socket.socket], bool]) -> None:
        parts = urllib.parse.urlsplit(url)
        self.url = url
        self.authority = parts.netloc.encode("ascii")
        self.base_path = parts.path.encode("ascii")
        self._is_tls = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port or (443 if self._is_tls else 80)
        self._is_own_address = is_own_address
        self._kept: deque[UpstreamConnection] = deque()     # last in, first out: the busiest live
        self._tls: ssl.SSLContext | None = None     # made at the first connection
        self._missed_at: float | None = None    # when a request last did not reach it

    def send(self, outbound: Outbound, watch: Watch, patience: Patience | None,
             notes: list[str]) -> Response:
        """Send a request and return the response, its head read; raise UpstreamError, ClientGone.

        While the upstream is not there, the request waits as long as its `patience` lasts.

        A request goes out a second time only if the kept connection was stale: sending failed, or
        it closed within a second, before any byte of a response.  RFC 9110 §9.2.2 leaves that to
        the client for POST; model calls change nothing, and the client would do the same after an
        error.  `notes` then says so.
        """
        connection = self._take()
        if connection is not None:
            try:
                return self._send_on(connection, outbound, watch, patience)
            except (UpstreamTimeout, ClientGone):
                raise
            except UpstreamError:
                if not connection.was_stale:
                    raise
            notes.append("sent again: the kept connection was stale")
        while True:
            try:
                connection = self.connect()
                break
            except UpstreamUnreachable:
                if patience is None or not patience.wait():
                    raise
        return self._send_on(connection, outbound, watch, patience)

    def _send_on(self, connection: UpstreamConnection, outbound: Outbound, watch: Watch,
                 patience: Patience | None) -> Response:
        watch.start()
        connection.expect_response()
        try:
            unsent = connection.send(outbound.pieces, watch)
            head = connection.read_head(watch)
            while head.status < 200:
                if outbound.interim is not None and head.status != 100:     # rrouter sent its own
                    outbound.interim(head)
                unsent = connection.send(unsent, watch) if unsent else []
                head = connection.read_head(watch)
        except BaseException:
            connection.close()
            raise
        self._missed_at = None
        if patience is not None:
            patience.give_up()
        # After a request not sent in full the next one would be taken for the rest of it.
        response = Response(head, response_body(head, outbound.method), connection,
                            None if unsent else self.keep)
        response.hand_back()
        return response

    def miss(self, started: float) -> bool:
        """Take note that a request did not reach the upstream.

        `started` is when the request began, by time.monotonic.  Returns whether the one before it
        in time missed as well; parallel requests are one.
        """
        is_repeated = self._missed_at is not None and self._missed_at <= started
        self._missed_at = time.monotonic()
        return is_repeated

    def connect(self) -> UpstreamConnection:
        """Return a new connection; raise UpstreamUnreachable."""
        connection = self.open()
        try:
            if not self._is_own_address(connection.sock):
                wire = UpstreamConnection(connection)
                wire.set_up(TICK_S)
                return wire
        except OSError as error:            # reset as soon as it was accepted
            connection.close()
            raise UpstreamError(f"broke the connection: {reason_of(error)}") from error
        connection.close()
        raise UpstreamUnreachable("is rrouter itself")

    def open(self) -> http.client.HTTPConnection:
        """Return a new connection of the standard library; raise UpstreamUnreachable."""
        connection = self._new_connection()
        connection.auto_open = 0            # it must not connect again by itself
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            raise UpstreamUnreachable(f"cannot be reached: {reason_of(error)}") from error
        except UnicodeError as error:       # not a host name
            raise UpstreamUnreachable("cannot be reached: no such host name") from error
        return connection

    def _new_connection(self) -> http.client.HTTPConnection:
        if not self._is_tls:
            return http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_S)
        if self._tls is None:
            context = ssl.create_default_context()
            # Python 3.9 sets it, and would take a truncated response for a whole one.
            context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
            self._tls = context
        return http.client.HTTPSConnection(
            self._host, self._port, timeout=CONNECT_S, context=self._tls)

    def _take(self) -> UpstreamConnection | None:
        """Return a kept connection that seems alive, or None."""
        while True:
            try:
                connection = self._kept.pop()
            except IndexError:
                return None
            if not connection.is_old and not connection.has_input():
                return connection
            connection.close()

    def keep(self, connection: UpstreamConnection) -> None:
        """Keep a connection whose response is complete."""
        connection.rest()
        self._kept.append(connection)
        if len(self._kept) > POOL_MAX:
            with contextlib.suppress(IndexError):
                self._kept.popleft().close()

    def prune(self) -> None:
        """Close the connections that have been idle for too long."""
        with contextlib.suppress(IndexError):
            while self._kept[0].is_old:
                self._kept.popleft().close()


# Proxy ########################################################################

class ClientConnection(Wire):
    """A client's connection: it reads whole requests, strictly framed, and sends responses."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock, REQUEST_BYTES)
        self._last_head = RememberedHead()
        self._asks_head = False         # HEAD: no response has a body, not even a refusal
        self._read_shut = False         # by `stop_reading`: an end of file proves nothing
        self.busy = False               #: a request is under way
        self.thread = 0                 #: native id of the thread that serves it

    def set_up(self, send_limit_s: float) -> None:
        """Set the socket's options; called in the thread that serves the connection."""
        super().set_up(send_limit_s)
        self.thread = threading.get_native_id()

    # ---- Reading

    def read_head(self, idle_s: float) -> RequestHead | None:
        """Return the head of the next request.

        None if the client closes, or sends nothing for `idle_s` seconds, before a request begins.
        """
        self.busy = False
        data, self.held = bytes(self.held), b""
        self.limit(idle_s)
        deadline, seen = None, 0
        while True:
            if data.startswith(b"\r\n"):        # RFC 9112 §2.2: ignored before a request
                data, seen = data[2:], 0
            head = self._find_head(data, seen)
            if head is not None:
                self.busy = True
                return head
            if data not in (b"", b"\r"):
                self.busy = True
                deadline = deadline or time.monotonic() + HEAD_S
                self.limit(max(0.001, deadline - time.monotonic()))
            more = self._receive_head(deadline)
            if not more:
                return None
            seen = len(data)
            data += more

    def _find_head(self, data: bytes, seen: int) -> RequestHead | None:
        """Return the head that `data` begins with, None if it is not complete.

        Raises RequestError.  `seen` bytes of `data` were searched before.
        """
        self._asks_head = data.startswith(b"HEAD ")
        known = self._last_head.match(data)
        if known is not None:
            head, size = known
            self.held = memoryview(data)[size:]
            return head
        end = data.find(b"\r\n\r\n", max(0, seen - 3)) + 4
        if (end if end >= 4 else len(data)) > HEAD_MAX_BYTES:
            raise head_too_large(data)
        if end < 4:
            if data not in (b"", b"\r"):
                check_head_start(data, max(0, seen - 3))
            return None
        self.held = data[end:]
        head = parse_request_head(data[:end])
        self._last_head.remember(data[:end], head)
        return head

    def _receive_head(self, deadline: float | None) -> bytes:
        """Return more of a head, whose end is due at `deadline` if it has begun."""
        try:
            more = self.receive()
            if deadline is not None and time.monotonic() > deadline:
                raise socket.timeout()
        except NOTHING_CAME:
            if deadline is None:
                return b""
            raise RequestError(408, "request head not complete within %d s" % HEAD_S) from None
        except OSError as error:
            raise ClientGone() from error
        return more

    def read_body(self, head: RequestHead) -> BytesLike:
        """Return the whole body of the request; raise RequestError, ClientGone."""
        if head.length == 0:
            return b""
        if head.expects_continue and not self.held:
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        return self._read_chunks() if head.length is None else self._read_fixed(head.length)

    def _read_fixed(self, length: int) -> BytesLike:
        if len(self.held) >= length:
            whole, self.held = self.held[:length], bytes(self.held[length:])
            return whole
        # Memory grows with what has come, not with what is claimed: from a part, by doubling.
        size = length
        while size > max(len(self.held), BODY_STEP_BYTES):
            size = (size + 1) // 2
        have, body = len(self.held), bytearray(size)
        body[:have], self.held = self.held, b""
        while have < length:
            if have == len(body):
                body *= 2
            with memoryview(body) as view:
                end = min(len(body), length)
                have += self._receive_body(partial(self.sock.recv_into, view[have:end]))
        return body if len(body) == length else memoryview(body)[:length]

    def _read_chunks(self) -> BytesLike:
        body, decoder = bytearray(), ChunkedBody()
        try:
            while not decoder.done:
                body += decoder.feed(self._receive_body(self.receive))
                if len(body) + decoder.left > BODY_MAX_BYTES:
                    raise RequestError(413, f"body over the limit of {BODY_MAX_BYTES >> 20} MiB")
        except UpstreamError as error:
            raise RequestError(400, f"malformed request body: the client {error}") from error
        self.held = decoder.rest
        return body

    def _receive_body(self, receive: Callable[[], T]) -> T:
        self.limit(BODY_STALL_S)        # only here, because each change is a system call
        try:
            received = receive()
        except NOTHING_CAME:
            raise RequestError(
                408, "request body without progress for %d s" % BODY_STALL_S) from None
        except OSError as error:
            raise ClientGone() from error
        if not received:
            raise ClientGone("the client left before the end of its request")
        return received

    def has_left(self) -> bool:
        """Return whether the client has closed its connection.

        A half-closed one counts as gone, as with Go and HAProxy (abortonclose).  A byte that the
        client sent before it left, the next request perhaps, hides the end from `recv`, but not
        from `poll`.
        """
        if self._read_shut:
            return False
        try:
            if not self.sock.recv(1, PEEK_NOW):
                return True
        except BlockingIOError:
            return False
        except OSError:
            return True
        poller = select.poll()          # `select` fails with descriptors over 1023
        poller.register(self.sock, getattr(select, "POLLRDHUP", 0))
        return bool(poller.poll(0))

    def stop_reading(self, cut_off: bool) -> None:
        """Let a wait for the next request end; called from another thread.

        With `cut_off` the request under way ends too, as if the client had left.
        """
        self._read_shut = not cut_off
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RD)

    # ---- Sending

    def send(self, data: BytesLike) -> None:
        """Send bytes; raise ClientGone if the client has left or does not read."""
        try:
            self.sock.sendall(data)
        except OSError as error:
            raise ClientGone() from error

    def send_whole(self, status: int, body: bytes, fields: bytes,
                   content_type: bytes = b"application/json") -> None:
        """Send a whole response of rrouter's own."""
        date = email.utils.formatdate(time.time(), usegmt=True)
        self.send(b"HTTP/1.1 %d %b\r\nDate: %b\r\nContent-Type: %b\r\n"
                  b"Content-Length: %d\r\n%b\r\n%b" % (
                      status, http.client.responses.get(status, "Error").encode("ascii"),
                      date.encode("ascii"), content_type, len(body), fields,
                      b"" if self._asks_head else body))

    def send_error(self, error: RouterError, fields: bytes) -> None:
        """Send an error of rrouter's own in Anthropic's shape."""
        self.send_whole(error.http_status, error_body(error.http_status, str(error)),
                        b"x-rrouter-error: 1\r\n" + fields)

    def linger(self) -> None:
        """Let the client close first, and drop what it still sends.

        The system responds to a byte that comes after a close with a reset, which can destroy what
        the client has not read yet.
        """
        deadline = time.monotonic() + LINGER_S
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
            while time.monotonic() < deadline:
                self.limit(max(0.001, deadline - time.monotonic()))
                if not self.sock.recv(RECEIVE_BYTES):
                    break

    def reset_on_close(self) -> None:
        """Let `close` reset the connection."""
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class ResponseWriter:
    """One response on its way to the client: it frames the payload.

    A body that ends with the upstream's connection is sent in chunks, so that the client sees
    whether it is whole.
    """

    def __init__(self, client: ClientConnection, head: RequestHead) -> None:
        self._client, self._request_head = client, head
        self._pending = b""             # the head, which goes out with the first payload
        self._is_chunked = self._ends_with_connection = False
        self.has_begun = False          #: a byte has been sent

    def start(self, head: ResponseHead, fields: bytes) -> None:
        """Begin with the upstream's `head` and our `fields`."""
        has_body = self._request_head.method != "HEAD" and head.status not in (204, 304)
        is_unbounded = head.length is None and has_body
        self._is_chunked = is_unbounded and self._request_head.http11
        self._ends_with_connection = is_unbounded and not self._is_chunked
        if self._is_chunked:
            fields += b"Transfer-Encoding: chunked\r\n"
        self._pending = response_head_bytes(head, fields)

    def send(self, payload: bytes, is_last: bool) -> None:
        """Send payload; `is_last` ends the response.  Raises ClientGone."""
        if self._is_chunked:
            if payload:
                payload = b"%x\r\n%b\r\n" % (len(payload), payload)
            if is_last:
                payload += b"0\r\n\r\n"
        if self._pending:
            payload, self._pending = self._pending + payload, b""
        self.has_begun = True
        self._client.send(payload)

    def send_interim(self, head: ResponseHead) -> None:
        """Send a 1xx head."""
        self._client.send(response_head_bytes(head, b""))

    def break_off(self) -> None:
        """Close the connection, so that what was sent cannot pass for the whole.

        Where neither a length nor chunks show the end, only a reset does.  It may drop bytes still
        on their way, so the other responses are spared it.
        """
        if self._ends_with_connection:
            self._client.reset_on_close()
        self._client.close()


class Request(NamedTuple):
    """One request, received in full."""

    head: RequestHead
    outbound: tuple[bytes, bytes]       #: the head to forward, see `outbound_head`
    body: BytesLike
    found: tuple[int, int, str] | None      #: where its model name stands, and the name

    @property
    def model(self) -> str | None:
        """The model name as the client sent it."""
        return self.found[2] if self.found else None

    @property
    def is_judged(self) -> bool:
        """True if auto mode may rescue, count and time it: it carries a model to generate with."""
        return self.found is not None and not self.head.path.endswith("/count_tokens")

    @property
    def is_message(self) -> bool:
        """True if the response should be a message of Anthropic's API."""
        return self.head.path.endswith("/messages")

    @property
    def session(self) -> str:
        """The id of the client's conversation."""
        return self.head.fields.text(b"x-claude-code-session-id")

    def find_sender(self) -> Sender:
        """Return the agent and the class of the request."""
        fields = self.head.fields
        return Sender(fields.text(b"x-claude-code-agent-type"),
                      fields.text(b"x-claude-code-request-class"), partial(find_agent, self.body))

    @property
    def asks_for_stream(self) -> bool:
        """True if the response should be a stream."""
        return asks_for_stream(self.body)


class Ends(NamedTuple):
    """What all attempts of one request share."""

    client: ClientConnection
    writer: ResponseWriter
    upstream: Upstream
    patience: Patience | None   #: for an upstream that is not there; None: none at all


class Attempt:
    """One try of a request on one target: a response, or the error that came in its place.

    Without a ticket it is not judged: it has no time limit and holds nothing back, except a 400,
    because the history may need healing.
    """

    def __init__(self, ends: Ends, request: Request, route: Route, ticket: Ticket | None,
                 limit_s: float | None) -> None:
        self.route, self.ticket = route, ticket
        self.response: Response | None = None
        self.error: UpstreamError | None = None
        self.watch = Watch(None)        #: of the latest send
        self.scan: StreamScan | None = None     #: of an event stream that is judged
        self.outcome = LEFT             # until the attempt has ended
        self.notes: list[str] = []      #: for the line in the log
        self.healed = False             #: sent again without thinking blocks
        self.settled = False            #: its outcome is recorded
        self._ends, self._request, self._limit_s = ends, request, limit_s
        self._message_defect = ""        #: of a buffered response
        self._began = 0.0               # of the latest send, in Unix seconds
        self._active_at = 0.0           # of that or the last event, by time.monotonic

    def run(self) -> None:
        """Send the request, healed if its history needs that; raise ClientGone."""
        self._send(self._request.body, self._request.found)
        if self.outcome.fault is not Fault.REJECTED or self._request.model is None:
            return
        rejection, body = self.response, without_thinking(self._request.body)
        if body is None:
            return
        self.healed = True
        self._send(body, find_model(body))
        if self.outcome.fault is None:
            if rejection is not None:
                rejection.close()
        else:
            self.close()
            self.response, self.error, self.scan = rejection, None, None
            if self.outcome.fault is Fault.REJECTED:    # it has no such history any more
                self.outcome = self.outcome._replace(fault=Fault.STATUS)
            self.outcome = self.outcome._replace(status=400, keeps_400=True)

    def _send(self, body: BytesLike, found: tuple[int, int, str] | None) -> None:
        """Send `body` once and receive as much as must be known before the client gets a byte."""
        head, model = self._request.head, self.route.model or ""
        client, writer, upstream, patience = self._ends
        pieces: list[BytesLike] = [body]
        if found is not None and model != found[2]:
            pieces = splice(body, found[0], found[1], model)
        before, after = self._request.outbound
        length = b"%d" % sum(map(len, pieces)) if after else b""
        outbound = Outbound(head.method, [before + length + after, *pieces],
                            writer.send_interim if head.http11 else None)
        self.response = self.error = self.scan = None
        self.watch = Watch(client.has_left, self._limit_s)
        self._began, self._active_at = time.time(), time.monotonic()
        try:
            self.response = upstream.send(outbound, self.watch, patience, self.notes)
            self._hold_back(self.response)
        except UpstreamError as error:
            self.close()
            self.response, self.error = None, without_trace(error)
        except BaseException:
            self.close()
            raise
        self.outcome = self._read_outcome()

    def _hold_back(self, response: Response) -> None:
        """Read as much of the response as decides whether the client gets it."""
        head, request = response.head, self._request
        judged = self.ticket is not None and request.head.method != "HEAD"
        if (judged and head.status >= 400) or (head.status == 400 and request.model is not None):
            self._hold_failure(response)
        elif judged and head.status < 300 and head.is_event_stream and not head.coding:
            self._hold_stream(response)
        elif (judged and head.status < 300 and request.is_message and not head.is_event_stream
              and head.coding in Response.CODINGS):
            self._hold_message(response)
        else:
            response.take_held()        # broken chunks right after the head can still be rescued

    def _hold_failure(self, response: Response) -> None:
        """Read a failed response to its end, or as far as it comes."""
        watch = Watch(self._ends.client.has_left, READ_AHEAD_S)
        watch.start()
        while response.read_ahead(watch):
            pass

    def _hold_stream(self, response: Response) -> None:
        """Read an event stream up to the event that decides."""
        self.scan = StreamScan(self._request.is_message)
        while not (self.scan.committed or self.scan.defect):
            payload = response.receive(self.watch)
            response.ahead += payload
            self.inspect(payload, response.complete)

    def _hold_message(self, response: Response) -> None:
        """Read a message that is not streamed to its end."""
        while not response.complete and len(response.ahead) <= READ_AHEAD_MAX_BYTES:
            response.ahead += response.receive(self.watch)
        text = response.text()
        if response.complete and len(text) <= READ_AHEAD_MAX_BYTES:
            self._message_defect = message_defect(text)

    def inspect(self, payload: bytes, is_last: bool) -> None:
        """Read more of the response's body, for what it says about the target."""
        if self.scan is None:
            self._active_at = time.monotonic()
            return
        events = self.scan.events
        self.scan.feed(payload)
        if is_last:
            self.scan.finish()
        if self.scan.events != events:
            self._active_at = time.monotonic()

    def _read_outcome(self) -> Outcome:
        """Return how the attempt ended, as far as it is known before the client gets a byte."""
        ended, error = time.time(), self.error
        if self.response is None:
            assert error is not None
            kind = (Fault.TIMEOUT if isinstance(error, UpstreamTimeout) else
                    Fault.UNREACHABLE if isinstance(error, UpstreamUnreachable) else Fault.DROPPED)
            return Outcome(kind, error.http_status, error.what, self._began, ended)
        head, what = self.response.head, str(self.response.head.status)
        fault: Fault | None = None
        retry_after = None
        if head.value(b"x-rrouter-error"):
            fault = Fault.OWN
        elif head.status >= 400:
            text = self.response.text()
            fault, what = read_failure(head.status, text)
            if what.endswith(UNKNOWN_MODEL):
                what += " " + printable(self.route.model or "", 80)
            if head.status == 400 and names_foreign_signature(text):
                fault = Fault.REJECTED
            retry_after = read_retry_after(
                head.value(b"retry-after"), head.value(b"retry-after-ms"), text, ended)
        elif self._message_defect or (self.scan is not None and self.scan.defect):
            fault, what = Fault.NO_MESSAGE, self._message_defect or (
                self.scan.defect if self.scan else "")
        return Outcome(fault, head.status, what, self._began, ended, retry_after)

    @property
    def late_failure(self) -> str:
        """What failed after the first content of a message, "" if nothing has."""
        scan, response = self.scan, self.response
        if scan is None or response is None or not self._request.is_message:
            return ""
        if scan.broken:
            return "error event in the stream"
        return "stream without its end" if response.complete and not scan.ended else ""

    @property
    def is_complete(self) -> bool:
        """True if the response carries everything, although its last bytes may be missing."""
        scan, response = self.scan, self.response
        return response is not None and response.head.status < 300 and (
            response.complete or (scan is not None and scan.ended and not scan.broken))

    @property
    def is_abandoned(self) -> bool:
        """True if a client that leaves now gives up a stream that has been silent for too long."""
        return (self._request.asks_for_stream
                and time.monotonic() - self._active_at >= ABANDONED_S)

    def direct_outcome(self, fault: Fault, what: str) -> Outcome:
        """Return the outcome of a failure that can no longer be rescued."""
        return Outcome(fault, 500, what, self._began, time.time(), direct=True)

    def close(self) -> None:
        """Break the response off unless it is complete."""
        if self.response is not None:
            self.response.close()


def run_hook(command: Sequence[str], words: dict[str, str], log: Log) -> None:
    """Run the program of auto.onSwitch; what it prints goes nowhere, a failure is one line."""
    import subprocess
    with_words = [re.sub(r"\{(from|to|scope|reason|minutes)\}", lambda found: words[found[1]], word)
                  for word in command]
    try:
        process = subprocess.Popen(
            with_words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            status = process.wait(HOOK_S)
            problem = f"ended with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)      # with what it has started
            process.wait()
            problem = f"did not end within {HOOK_S} s"
    except (OSError, ValueError) as error:      # ValueError: a null byte in config.json
        problem = str(error)
    if problem:
        log.write("AUTO", f"onSwitch: {printable(command[0])}: {printable(problem)}")


class Router:
    """What all connections share: settings, files, failover, upstream, log and counters."""

    def __init__(self, settings: Settings, paths: Paths, log: Log, started_by: str) -> None:
        self.settings, self.log, self.started_by = settings, log, started_by
        self.failover = Failover(time.time, config_of(None).auto)
        self.store = Store(paths, log, self._changed)
        self.state = StateFile(paths.state, log)
        self.instance = ""              #: the random word that names this process
        self.upstream = Upstream(settings.upstream, self._is_own_address)
        self.connections: set[ClientConnection] = set()
        self.connections_max = CONNECTIONS_MAX
        self.draining = False
        self.addresses: list[tuple[str, int]] = []      #: what the servers are bound to
        self.hosts: frozenset[str] = frozenset()        #: the values of Host served; none: any
        self.keeps_state = False        #: whether state.json is ours to write
        self._one_core = OneCore()
        self._lock = threading.Lock()
        self._requests = self._active = 0
        self._results = {"answered": 0, "rescued": 0, "failed": 0}
        self._last_failure: dict[str, Any] | None = None
        self.sessions: Sessions[tuple[str, ...]] = Sessions()   #: models last asked for, and got
        self._trimmed = -1, 0.0         # requests when free memory was last returned, and the time
        self._started = time.monotonic()

    def begin(self) -> int:
        """Count a request; return its number."""
        with self._lock:
            self._requests += 1
            self._active += 1
            return self._requests

    def end(self, result: str, failure: dict[str, Any] | None) -> None:
        """Count the end of a request: as `answered`, `rescued`, `failed`, or as none of them.

        `failure` is what /health shows as the last one.
        """
        with self._lock:
            self._active -= 1
            if result:
                self._results[result] += 1
            self._last_failure = failure or self._last_failure

    def log_decisions(self, lines: list[str], number: int = 0) -> None:
        """Log decisions of auto mode, and let the watcher save what has come of them."""
        for line in lines:
            with_number = number and "SWITCH" not in line
            self.log.write("AUTO", f"#{number} {line}" if with_number else line)
            if isinstance(line, Move) and (hook := self.store.snapshot().config.auto.on_switch):
                threading.Thread(target=run_hook, args=(hook, line.words, self.log),
                                 daemon=True).start()
        if lines:
            self.store.wake()

    def _changed(self, old: Snapshot, new: Snapshot, mode_written: bool) -> None:
        """Clear the failover state when the user asks for it: by the mode or the auto section."""
        if old.mode != new.mode:
            why = f"mode {new.mode}"
        elif mode_written:
            why = f"mode {new.mode} written again"
        elif old.config.auto != new.config.auto:
            why = "the auto section of config.json changed"
        else:
            return
        self.log_decisions(self.failover.reset(new.config.auto, why))

    def _is_own_address(self, sock: socket.socket) -> bool:
        """Return whether `sock` is connected to rrouter itself."""
        own, peer = sock.getsockname()[:2], sock.getpeername()[:2]
        return any(port == peer[1] and (
            host == peer[0] or (host in ("0.0.0.0", "::") and own[0] == peer[0]))
            for host, port in self.addresses)

    def load(self) -> None:
        """Read mode and config for the first time."""
        self.failover.reset(self.store.load().config.auto, "")

    def load_state(self) -> None:
        """Continue with the failover state of before a restart if it fits; keep it from now on."""
        self.keeps_state = True
        try:
            state = self.state.load(self.store.fingerprint())
            if state is not None and self.store.snapshot().mode == MODE_AUTO:
                self.failover.restore(state)
                target = self.failover.report(True)["currentTarget"]
                self.log.write("AUTO", f"state.json: on {target}")
        except StateError as error:
            self.log.write("AUTO", f"state.json set aside: {error}")

    def save_state(self) -> None:
        """Write state.json if there is something new."""
        if self.keeps_state:
            # The fingerprint first: a reset by a mode written meanwhile must not be undone.
            self.state.save(lambda: {**self.store.fingerprint(), **self.failover.save()})

    def watch(self) -> None:
        """Look at the files and at the clock; one step of the watcher."""
        # First, because the rest takes long while threads contend for the interpreter lock.
        threads = [client.thread for client in list(self.connections)]
        self._one_core.look(self._active, threads, time.monotonic(), os.times().user)
        self.store.snapshot()
        self.failover.look_at_clock()
        self.save_state()
        self.upstream.prune()
        self._trim(time.monotonic())

    def _trim(self, now: float) -> None:
        """Return free memory after requests, and once after the start, while none is under way."""
        count, when = self._trimmed
        if not self._active and self._requests != count and now - when >= TRIM_S:
            self._trimmed = self._requests, now
            return_free_memory()

    def snapshot(self, mode: str | None) -> Snapshot:
        """Return config and mode for a request that names `mode`; raise RequestError 404."""
        snapshot = self.store.snapshot()
        if mode is None:
            return snapshot
        modes = snapshot.config.usable_modes
        if mode not in modes:
            raise RequestError(404, f"mode '{printable(mode, 40)}' in /@MODE is not defined by "
                               f"config.json; defined are {', '.join(modes)}",
                               "the mode in /@MODE is not defined")
        return snapshot._replace(mode=mode)

    def health(self, mode: str | None = None) -> dict[str, Any]:
        """Return what /health shows, /@MODE/health if a mode is named."""
        snapshot = self.snapshot(mode)
        is_auto = snapshot.mode == MODE_AUTO
        auto = self.failover.report(is_auto)
        problems = [*snapshot.problems, self.log.problem, self.state.problem]
        return {"status": "ok", "version": __version__, "mode": snapshot.mode,
                "currentTarget": auto["currentTarget"] if is_auto else snapshot.mode,
                "defaultMode": snapshot.config.default_mode, "requestCount": self._requests,
                "activeRequests": self._active,
                "requests": {**self._results, "lastFailure": self._last_failure},
                "uptimeSeconds": int(time.monotonic() - self._started),
                "pid": os.getpid(), "instance": self.instance, "startedBy": self.started_by,
                "listenAddr": self.settings.listen_addr, "upstreamURL": self.settings.upstream,
                "problems": [problem for problem in problems if problem], "autoSwitch": auto}


class Effect(enum.Enum):
    """What Failover is asked to do with an attempt."""

    COMMIT = "the client gets this response"
    CREDIT = "it is complete"
    CHARGE = "its failure counts"
    RELEASE = "its outcome is neutral"


class Exchange:
    """One proxied request, from its snapshot to its line in the log."""

    def __init__(self, router: Router, client: ClientConnection, request: Request) -> None:
        self._router, self._client, self._request = router, client, request
        self._writer = ResponseWriter(client, request.head)
        self._attempts: list[Attempt] = []
        self._chosen: Attempt | None = None     # whose response the client gets
        self._tokens: TokenReader | None = None
        self._number = 0
        self._started = 0.0             # time.monotonic
        self._ended: tuple[int, str, float] | None = None   # status, note, duration in seconds

    def run(self) -> None:
        """Carry the request through; raise ClientGone if the connection cannot carry another."""
        snapshot = self._router.snapshot(self._request.head.mode)
        self._started, self._number = time.monotonic(), self._router.begin()
        try:
            self._answer(self._forward(snapshot))
        except UpstreamError as error:
            self._report(error)
        except ClientGone:
            self._leave()
            if self._writer.has_begun:
                self._writer.break_off()
            raise
        except Exception as error:      # a defect of ours
            self._end(500, "internal error")
            if self._writer.has_begun:
                self._router.log.write("ERROR", describe_defect(error))
                self._break_off()
            raise
        finally:
            for attempt in self._attempts:
                attempt.close()
            self._router.log.write("REQ", self._line())

    # ---- Up to the response

    def _forward(self, snapshot: Snapshot) -> Attempt:
        """Return the attempt whose response the client gets, after at most two."""
        config, model, failover = snapshot.config, self._request.model, self._router.failover
        targets, sender = config.auto.targets, self._request.find_sender
        ends = Ends(self._client, self._writer, self._router.upstream,
                    Patience(self._client.has_left) if model is not None else None)
        if snapshot.mode != MODE_AUTO:
            return self._try(ends, decide_route(config, snapshot.mode, model, sender), None, None)
        routes = {target: decide_route(config, target, model, sender) for target in targets}
        if not self._request.is_judged or len({route.model for route in routes.values()}) == 1:
            return self._try(ends, routes[failover.current(model, targets)], None, None)
        limit_s = config.auto.first_byte_limit_s(self._request.asks_for_stream)
        ticket = failover.admit(model or "", targets, self._request.session)
        if ticket.probe and not ticket.quiet:
            self._router.log_decisions([f"PROBE of {ticket.target}"], self._number)
        first = self._try(ends, routes[ticket.target], ticket, limit_s)
        if first.outcome.fault not in RESCUED or self._router.draining:
            return first                # while draining, the client's retry finds the next rrouter
        if self._client.has_left():
            raise ClientGone()
        ticket = failover.rescue(ticket, targets)
        second = self._try(ends, routes[ticket.target], ticket, limit_s)
        verdict = judge(first.outcome, second.outcome)
        for attempt, counts in zip((first, second), verdict.counts):
            if attempt.outcome.fault is not None:
                self._settle(attempt, Effect.CHARGE if counts else Effect.RELEASE)
        return self._attempts[verdict.chosen]

    def _try(self, ends: Ends, route: Route, ticket: Ticket | None,
             limit_s: float | None) -> Attempt:
        """Return an attempt that has run; with a ticket it is judged."""
        attempt = Attempt(ends, self._request, route, ticket, limit_s)
        self._attempts.append(attempt)
        try:
            attempt.run()
        finally:
            if attempt.healed:
                self._router.log.write(
                    "HEAL", "#%d %s rejected thinking blocks of another backend: sent again "
                    "without them" % (self._number, route.target))
        return attempt

    # ---- From the response on

    def _answer(self, attempt: Attempt) -> None:
        """Send the client the response of the attempt, or its error."""
        for other in self._attempts:
            if other is not attempt:
                other.close()
        self._chosen = attempt
        if attempt.response is not None:
            self._relay(attempt, attempt.response)
        elif attempt.error is not None:
            self._report(attempt.error)

    def _relay(self, attempt: Attempt, response: Response) -> None:
        """Forward the response as it comes; its outcome is settled before its end is sent."""
        if attempt.outcome.fault is None:
            self._settle(attempt, Effect.COMMIT)
        attempt.watch.lift()
        self._writer.start(response.head, self._reply_fields())
        if self._request.is_message and response.head.status < 300:
            self._tokens = TokenReader(response.head)
        payload, response.ahead = response.ahead, b""
        while True:
            if attempt.ticket is not None and attempt.outcome.fault is None:
                self._settle_progress(attempt, response)
            is_last = response.complete
            if is_last:
                self._end(response.head.status)
            self._writer.send(payload, is_last)
            if self._tokens is not None:
                self._tokens.feed(payload)
            if is_last:
                return
            payload = response.receive(attempt.watch)
            attempt.inspect(payload, response.complete)

    def _settle_progress(self, attempt: Attempt, response: Response) -> None:
        """Settle a response as soon as it is known to have failed, or is complete."""
        failure = attempt.late_failure
        if failure:
            self._settle(attempt, Effect.CHARGE,
                         attempt.direct_outcome(Fault.NO_MESSAGE, failure))
        elif response.complete and response.head.status < 300:
            self._settle(attempt, Effect.CREDIT)

    def _settle(self, attempt: Attempt, effect: Effect, outcome: Outcome | None = None) -> None:
        """Report an attempt to Failover: a commit, then one outcome.

        What is not judged, and what comes after the outcome, changes nothing.
        """
        ticket, failover = attempt.ticket, self._router.failover
        lines: list[str] = []
        if ticket is None or attempt.settled:
            return
        attempt.settled = effect is not Effect.COMMIT
        if effect is Effect.COMMIT:
            attempt.ticket, lines = failover.commit(ticket)
        elif effect is Effect.CREDIT:
            failover.credit(ticket)
        elif effect is Effect.RELEASE:
            lines = failover.release(ticket)
        else:
            lines = failover.charge(ticket, outcome or attempt.outcome)
        self._router.log_decisions(lines, self._number)

    # ---- The end

    def _end(self, status: int, note: str = "") -> None:
        """Let the request end, once, before the client can know that it has ended."""
        if self._ended is not None:
            return
        for attempt in self._attempts:
            self._settle(attempt, Effect.RELEASE)
        self._ended = status, note, time.monotonic() - self._started
        self._router.end(*self._result(status, note))
        if status < 400 and self._request.is_judged and self._chosen is not None:
            asked, answered = self._request.model or "", self._chosen.route.model or ""
            self._router.sessions.note((self._request.session,), (asked[:41], answered[:41]))

    def _result(self, status: int, note: str) -> tuple[str, dict[str, Any] | None]:
        """Return what the request counts as in /health, and its last failure."""
        failure = None
        for attempt in self._attempts:
            outcome, late = attempt.outcome, attempt.late_failure
            if outcome.fault not in (None, Fault.LEFT) or late:
                failure = {"at": utc(outcome.ended), "target": attempt.route.target,
                           "what": late or outcome.what}
        if status == LEFT.status:       # neither an answer nor a failure
            return "", failure
        if note and failure is None and self._chosen is not None:
            failure = {"at": utc(time.time()), "target": self._chosen.route.target, "what": note}
        if note or status >= 400 or (self._chosen is not None and self._chosen.late_failure):
            return "failed", failure
        return "answered" if self._chosen is self._attempts[0] else "rescued", failure

    def _leave(self) -> None:
        """Settle what was under way when the client left."""
        first, current = self._attempts[0], self._chosen or self._attempts[-1]
        if first.outcome.fault not in (None, Fault.LEFT):
            counts = judge(first.outcome, LEFT).counts[0]
            self._settle(first, Effect.CHARGE if counts else Effect.RELEASE)
        if current.outcome.fault in (None, Fault.LEFT):
            if current.is_complete:
                self._settle(current, Effect.CREDIT)
            elif current.is_abandoned:
                self._settle(current, Effect.CHARGE, current.direct_outcome(
                    Fault.TIMEOUT, "timeout, ended by the client"))
        self._end(LEFT.status, LEFT.what)

    def _report(self, error: UpstreamError) -> None:
        """Report `error` to the client: by a response or, within one, by breaking off."""
        note, upstream = f"the upstream {error}", self._router.upstream
        if self._writer.has_begun:
            response = self._chosen.response if self._chosen else None
            self._end(response.head.status if response else 0, note)
            self._break_off()
        self._end(error.http_status, note)
        fields = self._reply_fields()
        # Without it Claude Code retries for three silent minutes.
        if (isinstance(error, UpstreamUnreachable) and self._request.model is not None
                and upstream.miss(self._started)):
            fields += b"x-should-retry: false\r\n"
        message = f"upstream {upstream.url} {error}; {error.remedy}"
        self._client.send_error(type(error)(message), fields)

    def _break_off(self) -> NoReturn:
        self._writer.break_off()
        raise ClientGone("the response was broken off")

    def _reply_fields(self) -> bytes:
        """Return our fields of the response: where a request with a model went, and its end."""
        fields = b""
        if self._request.model is not None and self._chosen is not None:
            route = self._chosen.route
            fields = (f"x-rrouter-target: {printable(route.target)}\r\n"
                      f"x-rrouter-model: {printable(route.model or '')}\r\n"
                      f"x-rrouter-attempts: {len(self._attempts)}\r\n").encode("ascii")
        if not self._request.head.keep_alive or self._router.draining:
            fields += b"Connection: close\r\n"
        return fields

    def _line(self) -> str:
        """Return the request's line in the log."""
        status, note, duration_s = self._ended or (0, "", 0.0)
        head, model, routed, notes = self._request.head, self._request.model, "", []
        if model is not None and self._attempts:
            route = (self._chosen or self._attempts[-1]).route
            routed = f"{printable(model)} -> {route.target} {printable(route.model or '')} "
        for attempt in self._attempts:
            if self._chosen not in (None, attempt):
                notes.append(f"{attempt.route.target} failed: {attempt.outcome.what}")
            notes += attempt.notes
        late = self._chosen.late_failure if self._chosen is not None else ""
        notes += [text for text in (late, note) if text]
        prefix = f"/@{head.mode}" if head.mode is not None else ""
        line = f"#{self._number} {printable(head.method, 40)} {prefix}{printable(head.path)}"
        line += f" {routed}{status} {duration_s:.2f}s{self._tokens.note() if self._tokens else ''}"
        return line + "".join(f" ({note})" for note in notes)


class ProxyHandler(socketserver.BaseRequestHandler):
    """The requests of one client connection, one after the other.

    `http.server` has a handler for HTTP, but its parser misreads heads (see "Messages: heads") and
    its buffered reader would hide bytes from `has_left`.
    """

    def __init__(self, *arguments: Any, router: Router) -> None:
        self._router = router
        self._checked: Fields | None = None     # fields of the last head that was checked
        self._outbound = b"", b""
        super().__init__(*arguments)    # the standard frame: setup, handle, finish

    def setup(self) -> None:
        """Take the connection."""
        self._client = ClientConnection(self.request)
        try:
            self._client.set_up(WRITE_STALL_S)
        except OSError as error:        # macOS: reset already
            raise ClientGone() from error

    def handle(self) -> None:
        """Carry requests through until one side ends the connection."""
        connections = self._router.connections
        connections.add(self._client)
        try:
            beyond = len(connections) - self._router.connections_max
            self._is_crowded = beyond > 0           # only /health is answered, and once
            if beyond > CONNECTIONS_RESERVE:
                self._refuse(self._too_many())
            else:
                while self._handle_request():
                    pass
        except ClientGone:
            pass
        finally:
            connections.discard(self._client)

    def _admit(self, head: RequestHead) -> None:
        """Check a head, and prepare what of it goes upstream; raise RequestError.

        The requests of a connection share their fields, so that this happens once.
        """
        if head.fields is self._checked:
            return
        check_origin(head, self._router.hosts)
        upstream = self._router.upstream
        self._outbound = outbound_head(head, upstream.authority, upstream.base_path)
        self._checked = head.fields

    def _handle_request(self) -> bool:
        """Carry one request through; return whether the connection can carry another."""
        client, router = self._client, self._router
        try:
            head = client.read_head(LINGER_S if self._is_crowded else IDLE_S)
            if head is None:
                return False
            self._admit(head)
            is_health = head.path == "/health" and head.method in ("GET", "HEAD")
            if self._is_crowded and not is_health:
                raise self._too_many()
            body = client.read_body(head)
            if is_health:
                self._report_health(head)
            else:
                request = Request(head, self._outbound, body, find_model(body))
                Exchange(router, client, request).run()
            if head.keep_alive and not router.draining and not self._is_crowded:
                return True
        except RequestError as error:
            self._refuse(error)
        except ClientGone:
            return False
        except Exception:               # a defect of ours: in the log, and to the client
            self.server.handle_error(self.request, self.client_address)
            defect = RouterError("internal error; see ~/.rrouter/logs/rrouter.log")
            client.send_error(defect, b"Connection: close\r\n")
        client.linger()
        return False

    def _too_many(self) -> RequestError:
        return RequestError(503, f"too many connections ({self._router.connections_max})")

    def _refuse(self, error: RequestError) -> None:
        """Send the error, and log it."""
        self._router.log.write("REFUSED", f"{error.http_status} {error.logged}")
        self._client.send_error(error, b"Connection: close\r\n")

    def _report_health(self, head: RequestHead) -> None:
        health, content_type = self._router.health(head.mode), b"application/json"
        text = json.dumps(health, indent=2)
        query = head.target.partition(b"?")[2].decode("ascii").split("&")
        if "line" in query:
            session = "".join(part[8:] for part in query if part.startswith("session="))
            models = self._router.sessions.get((urllib.parse.unquote(session),), ())
            text, content_type = status_line(health, models), b"text/plain; charset=utf-8"
        fields = b"Cache-Control: no-store\r\n"
        if not head.keep_alive or self._router.draining or self._is_crowded:
            fields += b"Connection: close\r\n"
        self._client.send_whole(200, text.encode("utf-8") + b"\n", fields, content_type)


class ProxyServer(http.server.ThreadingHTTPServer):
    """One listening socket; a thread for each of its connections."""

    request_queue_size = BACKLOG
    daemon_threads = True
    allow_reuse_address = True          # TIME_WAIT would keep a restart off the port
    allow_reuse_port = False            # else two could share it, each with half of the requests

    def __init__(self, family: int, address: Any, router: Router) -> None:
        self.address_family = family
        self._router, self._complained_at = router, 0.0
        super().__init__(address, partial(ProxyHandler, router=router), bind_and_activate=False)

    def server_bind(self) -> None:
        """Bind without asking for the host's name, which can take 35 s on macOS."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]    # type: ignore[assignment]

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection; without descriptors wait a little, because the loop would spin."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                if time.monotonic() - self._complained_at > 60:
                    self._complained_at = time.monotonic()
                    self._router.log.write(
                        "ERROR", f"cannot accept connections: {reason_of(error)}")
                time.sleep(0.1)
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a defect of ours in one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, ClientGone)):
            self._router.log.write("ERROR", describe_defect(error))


# Daemon #######################################################################

def until(condition: Callable[[], object], limit_s: float) -> bool:
    """Wait until `condition()` holds, at most `limit_s`; return whether it does."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def own_place() -> tuple[str, int]:
    """Return the host and the pid namespace of this process, 0 where the system has none."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return re.sub(r"\s", "_", socket.gethostname()) or "-", namespace


class Holder(NamedTuple):
    """The process that holds the lock, as it names itself; earlier versions wrote a pid alone."""

    pid: int
    instance: str = ""          #: random, repeated in run.json and by /health
    host: str = ""
    pid_namespace: int = 0
    stopping: bool = False      #: accepts no more requests; those under way finish

    @property
    def elsewhere(self) -> str:
        """Where the process lives if its pid means nothing here, else ""."""
        if not self.instance or (self.host, self.pid_namespace) == own_place():
            return ""
        return f"in another container or on another host ({printable(self.host)})"

    @property
    def name(self) -> str:
        """The process in words."""
        return f"pid {self.pid}{self.elsewhere and ' ' + self.elsewhere}"

    def is_same(self, other: Holder | None) -> bool:
        """Return whether `other` is the same process, stopping or not."""
        return other is not None and other[:2] == self[:2]


class Lock:
    """The file whose flock says that a daemon lives, and whose one line names it.

    It is never removed, because two processes could then each hold "the" lock.  Not lockf, because
    closing any descriptor of the file would release it.
    """

    LINE = re.compile(r"([1-9][0-9]{0,8})(?: ([0-9a-f]+) (\S+) ([0-9]{1,20}))?( stopping)?\n")
    PATIENCE_S = 0.5        # for a command that looks, or a holder that has not written its line

    def __init__(self, path: str):
        self._path = path
        self._descriptor: int | None = None
        self._holder: Holder | None = None      # this process, as the file names it
        self.stopping = False           #: what `renew` says of this process

    def acquire(self, instance: str, patience_s: float = PATIENCE_S) -> bool:
        """Lock the file for the life of this process; return False if another process holds it.

        Raises DaemonError.
        """
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                if not until(lambda: self._try(descriptor, fcntl.LOCK_EX), patience_s):
                    os.close(descriptor)
                    return False
                os.ftruncate(descriptor, 0)         # it named the last holder
                self._write(descriptor, Holder(os.getpid(), instance, *own_place()))
            except (OSError, DaemonError):
                os.close(descriptor)
                raise
            self.release()              # a file that has left the path
            self._descriptor = descriptor
            return True
        except OSError as error:
            is_other = os.path.lexists(self._path) and not os.path.isfile(self._path)
            raise DaemonError(f"{self._path}: cannot be written: {reason_of(error)}: " + (
                "it is no regular file: remove it" if is_other
                else "check its permissions and free space")) from error

    def _try(self, descriptor: int, kind: int) -> bool:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise DaemonError(f"{self._path}: cannot be locked: {reason_of(error)}: "
                              "put HOME on a file system with locks") from error
        return True

    def _write(self, descriptor: int, holder: Holder) -> None:
        words = [str(word) for word in holder[:4]] + ["stopping"] * holder.stopping
        line = os.fsencode(" ".join(words) + "\n")
        os.pwrite(descriptor, line, 0)
        os.ftruncate(descriptor, len(line))
        self._holder = holder

    def is_removed(self) -> bool:
        """Return whether the file that this process holds has left its path."""
        try:
            return self._descriptor is not None and not os.path.samestat(
                os.stat(self._path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return True
        except OSError:
            return False

    def renew(self) -> None:
        """Correct the line if this process holds the lock: laptops change their host names."""
        if self._descriptor is None or self._holder is None:
            return
        holder = Holder(*self._holder[:2], *own_place(), self.stopping)
        if holder != self._holder:
            with contextlib.suppress(OSError):
                self._write(self._descriptor, holder)

    def look(self) -> Holder | None:
        """Return the process that holds the lock, or None.  Raises DaemonError."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)   # a FIFO would block
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            raise DaemonError(f"{self._path}: {reason_of(error)}: it belongs to another user, who "
                              "may have run rrouter with your HOME: chown it to you") from error
        try:
            deadline = time.monotonic() + self.PATIENCE_S
            while time.monotonic() < deadline and not self._try(descriptor, fcntl.LOCK_SH):
                with contextlib.suppress(OSError):      # a FIFO that another command has open
                    line = self.LINE.match(os.fsdecode(os.pread(descriptor, 512, 0)))
                    if line:
                        return Holder(int(line[1]), line[2] or "", line[3] or "",
                                      int(line[4] or 0), bool(line[5]))
                time.sleep(0.02)
            return None
        finally:
            os.close(descriptor)

    def release(self) -> None:
        """Release the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def has_terminal() -> bool:
    """Return whether this process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK))
        return True
    except OSError:
        return False


class Signals:
    """Signals as bytes in a pipe, because a handler can run in the middle of anything."""

    def __init__(self) -> None:
        self._read = self._write = -1
        self.hang_up_ends = False       #: SIGHUP means that our terminal closed, not "read again"

    def install(self) -> None:
        """Catch SIGTERM, SIGINT and SIGHUP from now on; for the main thread."""
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN     # by nohup
        self.hang_up_ends = not ignored and has_terminal()
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)

    def wait(self, timeout_s: float | None = None) -> bytes:
        """Return the number of the next signal, b"" if none comes within `timeout_s`."""
        poller = select.poll()
        poller.register(self._read, select.POLLIN)
        if not poller.poll(None if timeout_s is None else int(timeout_s * 1000)):
            return b""
        with contextlib.suppress(BlockingIOError):
            return os.read(self._read, 1)       # one at a time: the second has another meaning
        return b""


def addresses_of(settings: Settings) -> list[tuple[int, Any]]:
    """Return (family, address) of each address to listen on; raise UsageError."""
    if settings.host == "localhost":
        return [(socket.AF_INET, ("127.0.0.1", settings.port)),
                (socket.AF_INET6, ("::1", settings.port))]
    try:
        found = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # Two lines of /etc/hosts may give one address twice.
        return list(dict.fromkeys((info[0], info[4]) for info in found))
    except OSError as error:
        raise UsageError(f"RROUTER_HOST={settings.host}: {reason_of(error)}: expected localhost, "
                         "or an address or a name of this machine") from error


def _port_owner_from_proc(port: int) -> str:
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table, encoding="ascii") as file:
            rows = [line.split() for line in file][1:]
            inodes |= {f"socket:[{row[9]}]" for row in rows
                       if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
    for pid in filter(str.isdigit, os.listdir("/proc") if inodes else []):
        with contextlib.suppress(OSError):
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                if os.readlink(f"/proc/{pid}/fd/{descriptor}") in inodes:
                    name = read_file(f"/proc/{pid}/comm") or b""
                    return f"{printable(name.decode('utf-8', 'replace').strip())} (pid {pid})"
    return ""


def run_program(command: Sequence[str], timeout_s: float) -> tuple[int, str]:
    """Run a program of the system; return its status and output, 127 and why if it cannot run."""
    import subprocess
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=timeout_s)
        return done.returncode, done.stdout.decode("utf-8", "replace")
    except (OSError, subprocess.SubprocessError) as error:
        return 127, str(error)


def port_owner(port: int) -> str:
    """Return name and pid of the program that listens on `port`, "" if they are not known."""
    for command in (("lsof", "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-Fpc"),
                    ("ss", "-Hltnp", f"sport = :{port}")):
        output = run_program(command, timeout_s=3)[1]
        found = (re.search(r"p(?P<pid>\d+)\nc(?P<name>[^\n]+)", output)
                 or re.search(r'\("(?P<name>[^"]+)",pid=(?P<pid>\d+)', output))
        if found:
            return f"{printable(found['name'])} (pid {found['pid']})"
    return _port_owner_from_proc(port)


@contextlib.contextmanager
def total_limit(sock: socket.socket, seconds: float) -> Iterator[None]:
    """End a connection after so many seconds, because an endless drip never times out."""
    def cut() -> None:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()                    # the caller may fork


def ask_health(host: str, port: int, timeout_s: float = 3) -> dict[str, Any] | None:
    """Return /health of the rrouter that answers there, or None."""
    several = {"localhost": ("127.0.0.1", "::1"), "0.0.0.0": ("127.0.0.1",), "::": ("::1",)}
    for address in several.get(host, (host,)):
        connection = http.client.HTTPConnection(address, port, timeout=timeout_s)
        try:
            connection.connect()
            with total_limit(connection.sock, timeout_s):
                connection.request("GET", "/health", headers={"Host": "localhost"})
                health = json.loads(connection.getresponse().read(FILE_MAX_BYTES))
            if (isinstance(health, dict) and "autoSwitch" in health
                    and isinstance(health.get("pid"), int)):
                return health
        except (OSError, http.client.HTTPException, ValueError):
            continue
        finally:
            connection.close()
    return None


def describe_taken(settings: Settings) -> str:
    """Return what to say when the port is taken."""
    health = ask_health(settings.host, settings.port, timeout_s=1)
    owner = f"rrouter (pid {health['pid']})" if health else port_owner(settings.port)
    return (f"port {settings.port} is taken{f' by {owner}' if owner else ''}: stop that program or "
            "set RROUTER_PORT (CLIProxyAPI's pprof uses 8316 by default: see pprof.addr in its "
            "config)")


def open_server(router: Router, family: int, address: Any) -> ProxyServer:
    """Return a server that listens on `address`; raise OSError."""
    server = ProxyServer(family, address, router)
    try:
        server.server_bind()
        server.server_activate()
    except OSError:
        server.server_close()
        raise
    return server


def listen(settings: Settings, router: Router) -> list[ProxyServer]:
    """Return the listening servers; raise DaemonError if an address is taken or none is ours."""
    servers: list[ProxyServer] = []
    problem: OSError | None = None
    for family, address in addresses_of(settings):
        try:
            servers.append(open_server(router, family, address))
        except OSError as error:
            problem = error
            if error.errno == errno.EADDRINUSE:
                break
            router.log.write("START", f"not listening on {address[0]}: {reason_of(error)}")
    if problem is not None and (problem.errno == errno.EADDRINUSE or not servers):
        for server in servers:
            server.server_close()
        raise DaemonError(describe_taken(settings) if problem.errno == errno.EADDRINUSE else
                          f"cannot listen on {settings.listen_addr}: {reason_of(problem)}")
    router.addresses = [server.server_address[:2] for server in servers]    # type: ignore[misc]
    if all(is_loopback(host) for host, _ in router.addresses):
        own = settings.host.lower().rstrip(".")
        names = "localhost", "127.0.0.1", "::1", own, *settings.allowed_hosts
        router.hosts = frozenset(f"[{name}]" if ":" in name else name for name in names)
    return servers


LAUNCHD_LABEL = "com.rrouter"


def who_starts() -> str:
    """Return what started this process in the foreground: systemd, launchd, or `serve` by hand."""
    if os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid()):
        return "systemd"
    if os.environ.get("XPC_SERVICE_NAME", "0") == LAUNCHD_LABEL:
        return "launchd"
    return "serve"


def report_start(ready: int, words: str) -> None:
    """Report to `start` how it went, unless it was killed meanwhile.

    It reads to the end of file, so after a failure `start` returns when this process has ended.
    """
    with contextlib.suppress(OSError):
        os.write(ready, words.encode("utf-8", "replace"))
        if words == "ready":
            os.close(ready)


def write_run_files(router: Router) -> bool:
    """Write pid and run.json, which say where the daemon is; return False if that failed.

    The daemon works without them as well.
    """
    paths, settings = router.store.paths, router.settings
    run = {"host": settings.host, "port": settings.port, "upstream": settings.upstream,
           "pid": os.getpid(), "instance": router.instance, "startedBy": router.started_by,
           "allowedHosts": ",".join(settings.allowed_hosts), "version": __version__}
    try:
        write_atomically(paths.pid, f"{os.getpid()}\n", durable=False)
        write_atomically(paths.run, json.dumps(run, indent=2) + "\n", durable=False)
    except OSError as error:
        router.log.write("ERROR", f"{paths.run}: {reason_of(error)}: "
                                  "other commands may not find this daemon")
        return False
    return True


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open files, 256 on macOS, as far as is useful."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * CONNECTIONS_MAX
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def descriptor_limit() -> int:
    """Return how many files this process may have open."""
    import resource
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


class Watcher:
    """The thread that does, every POLL_S or when woken, what no request may wait for.

    Once it runs, it alone writes the log and the state.
    """

    END_S = 1               # for the last round; a disk that hangs would take for ever

    def __init__(self, router: Router, lock: Lock):
        self._router, self._lock = router, lock
        self._ending = self._is_lost = self._is_unwritten = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin; the log wakes it when it holds many lines."""
        self._router.log.wake = self._router.store.wake
        self._thread.start()

    def _run(self) -> None:
        condition, log = self._router.store.condition, self._router.log
        is_last = False
        while not is_last:
            with condition:
                condition.wait(0 if self._ending else POLL_S)
            is_last = self._ending      # lines added before are written in this round
            for step in (self._reclaim, self._lock.renew, self._router.watch, log.reopen,
                         log.flush):
                try:
                    step()
                except Exception as error:  # of any kind: without the watcher the log would end
                    log.write("ERROR", f"internal error in the watcher: {type(error).__name__}")

    def _reclaim(self) -> None:
        """Write the files that name this daemon again if the user removed ~/.rrouter."""
        router, paths = self._router, self._router.store.paths
        if self._lock.is_removed():
            router.keeps_state = False      # the files may be another daemon's by now
            self._is_lost = True
            with contextlib.suppress(DaemonError):
                if os.path.isdir(os.path.dirname(paths.root)):      # else HOME itself is away
                    paths.create()
                    if self._lock.acquire(router.instance, patience_s=0):
                        router.state.forget()
                        self._is_unwritten = True
                        router.log.write(
                            "START", "~/.rrouter was removed: this daemon has it again")
        elif self._is_lost:
            router.keeps_state, self._is_lost = True, False
        if self._is_unwritten:
            self._is_unwritten = not write_run_files(router)

    def end(self) -> None:
        """Let it save and log the rest in a last round."""
        self._ending = True
        self._router.store.wake()
        self._thread.join(self.END_S)


def wait_for_the_end(signals: Signals, router: Router) -> None:
    """Return when a signal ends rrouter; if SIGHUP does not, read the files again on it."""
    while True:
        for number in signals.wait():
            if number != signal.SIGHUP or signals.hang_up_ends:
                router.log.write("STOP", f"{signal.Signals(number).name}: running requests may "
                                         f"finish within {DRAIN_S} s")
                return
            router.store.snapshot()
            router.log.write("START", "SIGHUP: files read again")
            router.store.wake()


def drain(signals: Signals, router: Router, servers: list[ProxyServer]) -> None:
    """Accept no connection, and wait for the requests under way; a second signal ends the wait."""
    router.draining = True
    for server in servers:
        with contextlib.suppress(OSError):
            server.socket.shutdown(socket.SHUT_RDWR)    # refuses at once, and wakes the loop
        server.shutdown()
        server.server_close()
    deadline = time.monotonic() + DRAIN_S
    while router.connections and time.monotonic() < deadline:
        for client in list(router.connections):
            if not client.busy:
                client.stop_reading(cut_off=False)
        # A closing terminal can send SIGHUP twice: by the kernel and by the shell.
        if any(number != signal.SIGHUP for number in signals.wait(0.02)):
            router.log.write("STOP", "second signal: ending at once")
            break
    for client in list(router.connections):
        client.stop_reading(cut_off=True)
    until(lambda: not router.connections, CUT_OFF_S)    # each request writes its line


def remove_files(*paths: str) -> None:
    """Remove files that may not exist."""
    for path in paths:
        with contextlib.suppress(OSError):
            os.unlink(path)


def run_to_the_end(signals: Signals, lock: Lock, router: Router, servers: list[ProxyServer],
                   watcher: Watcher) -> None:
    """Wait for a signal, drain, and end the process."""
    status = 1
    try:
        wait_for_the_end(signals, router)
        lock.stopping = True            # the watcher writes it down, because a disk may hang
        router.store.wake()
        drain(signals, router, servers)
        router.log.write("STOP", f"rrouter ends, pid {os.getpid()}")
        watcher.end()
        if router.keeps_state:
            remove_files(router.store.paths.pid, router.store.paths.run)
        lock.release()
        status = 0
    except Exception as error:          # a defect of ours
        router.log.write("ERROR", describe_defect(error))
        watcher.end()
    finally:
        os._exit(status)    # threads of streams past the drain time would hold the interpreter up


def prepare(router: Router, lock: Lock, owns_files: bool) -> list[ProxyServer]:
    """Load the files and listen; return the servers.  Raises DaemonError, UsageError."""
    log, settings = router.log, router.settings
    router.load()
    spare = descriptor_limit() - CONNECTIONS_RESERVE - 24
    router.connections_max = min(CONNECTIONS_MAX, max(1, spare // 2))
    servers = listen(settings, router)
    if owns_files:
        router.load_state()
        write_run_files(router)
    else:
        holder = lock.look()
        log.write("START", f"a daemon ({holder.name if holder else 'ending'}) runs already: this "
                  "one shares its mode and config, and leaves its pid, run and state files alone")
    if not router.hosts:
        log.write("START", f"RROUTER_HOST={settings.host}: any client that reaches that address "
                           "can spend your quota")
    log.write("START", f"rrouter {__version__} on {settings.listen_addr} -> {settings.upstream}, "
                       f"pid {os.getpid()}, by {router.started_by}")
    return servers


def serve(settings: Settings, paths: Paths, ready: int | None = None) -> int:
    """Start the router; return 0, also where another one runs already.

    `ready` is the descriptor on which `start` waits for one word: `ready`, `running`, or what is
    wrong.
    """
    signals, lock, instance = Signals(), Lock(paths.lock), os.urandom(8).hex()
    signals.install()
    paths.create()
    owns_files = lock.acquire(instance)
    if ready is not None and not owns_files:
        report_start(ready, "running")
        return 0
    raise_descriptor_limit()
    use_one_heap()
    log = Log(paths.log, echo=ready is None)
    router = Router(settings, paths, log, who_starts() if ready is None else "start")
    router.instance = instance
    log.open()
    try:
        servers = prepare(router, lock, owns_files)
    finally:
        log.flush()                     # before `start` or the caller prints anything
    watcher = Watcher(router, lock)
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    watcher.start()
    if ready is not None:
        report_start(ready, "ready")
    outlive_main_script(partial(run_to_the_end, signals, lock, router, servers, watcher))
    return 0


class Running(NamedTuple):
    """A live daemon, as its files describe it."""

    holder: Holder
    host: str
    port: int
    started_by: str
    upstream: str = ""
    allowed_hosts: str = ""

    @property
    def pid(self) -> int:
        """Its pid, where it lives."""
        return self.holder.pid


def read_run(paths: Paths) -> Running | None:
    """Return the daemon that run.json describes, live or killed; None without a usable file."""
    try:
        run = json.loads(read_file(paths.run) or b"{}")
        holder = Holder(int(run["pid"]), str(run.get("instance", "")))
        return Running(holder, str(run["host"]), int(run["port"]), str(run["startedBy"]),
                       str(run["upstream"]), str(run.get("allowedHosts", "")))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def find_daemon(paths: Paths) -> Running | None:
    """Return the live daemon, or None; without its run.json, on the port of the environment."""
    holder, run = Lock(paths.lock).look(), read_run(paths)
    if holder is None:
        return None
    if run and (run.pid, run.holder.instance) == (holder.pid, holder.instance):
        return run._replace(holder=holder)
    settings = read_environment(dict(os.environ))
    return Running(holder, settings.host, settings.port, "unknown")


def health_of(daemon: Running, timeout_s: float = 3) -> dict[str, Any] | None:
    """Return /health of this very daemon, or None if it does not answer."""
    health = ask_health(daemon.host, daemon.port, timeout_s)
    if health is None or health.get("instance", "") != daemon.holder.instance:
        return None
    return health if health["pid"] == daemon.pid else None


def last_lines(path: str, count: int = 5) -> str:
    """Return the last lines of a file, indented."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)     # a FIFO would block
        with os.fdopen(descriptor, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            lines = file.read().decode("utf-8", "replace").splitlines()[-count:]
    except OSError as error:
        lines = [f"{path}: {reason_of(error)}"]
    return "\n".join(f"  {printable(line)}" for line in lines)


def wait_for_health(paths: Paths) -> tuple[Running, dict[str, Any]]:
    """Return the daemon and its /health once it answers; raise DaemonError with the log's end."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        daemon = find_daemon(paths)
        health = health_of(daemon) if daemon else None
        if daemon and health:
            return daemon, health
        time.sleep(0.02)
    raise DaemonError("the daemon does not answer; the log ends with\n" + last_lines(paths.log))


def _become_daemon(descriptors: tuple[int, ...], arguments: list[str]) -> NoReturn:
    """In a forked child: run the program in a session without a terminal, as an orphan.

    It gets the `descriptors` as 0, 1, 2 ... and no others.
    """
    highest = min(descriptor_limit(), 1 << 16)
    try:
        os.setsid()
        if os.fork() == 0:              # not the session's leader: it never gets a terminal
            os.umask(0o077)
            os.chdir("/")
            # First out of the way: a caller that closed its 0 to 3 has these numbers in use.
            sources = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in descriptors]
            for target, source in enumerate(sources):
                os.dup2(source, target)
            os.closerange(len(sources), highest)
            # A new program, because what macOS loads into a process does not survive a fork
            # (python/cpython#105912).
            os.execv(arguments[0], arguments)
    finally:
        os._exit(1)


def spawn_daemon(paths: Paths) -> None:
    """Run `serve` as a daemon; return when it listens or finds another one.  Raises DaemonError."""
    paths.create()
    program = os.path.abspath(__file__ if os.path.isfile(__file__) else sys.argv[0])
    arguments = [sys.executable, program, "serve", "--ready-descriptor", "3"]
    read_end, write_end = os.pipe()
    # A FIFO in its place would block.
    log = os.open(paths.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o600)
    null = os.open(os.devnull, os.O_RDWR)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _become_daemon((null, log, log, write_end), arguments)
    for descriptor in (write_end, log, null):
        os.close(descriptor)
    os.waitpid(child, 0)
    with os.fdopen(read_end, "rb") as pipe:
        poller = select.poll()
        poller.register(pipe, select.POLLIN)
        words = pipe.read().decode("utf-8", "replace") if poller.poll(START_S * 1000) else ""
    if words not in ("ready", "running"):
        raise DaemonError(words or "the daemon did not start; the log ends with\n"
                          + last_lines(paths.log))


SYSTEMD_UNIT = "rrouter.service"
MANAGER_S = DRAIN_S + 15        # a stop through the service manager includes the drain


class Manager(NamedTuple):
    """A service manager that has rrouter installed: its name and its commands."""

    name: str
    start_commands: tuple[tuple[str, ...], ...]
    stop_command: tuple[str, ...]
    job_query: tuple[str, ...] = ()         #: launchd's: it succeeds while the job is loaded

    def start(self) -> None:
        """Ask for the start; raise DaemonError if the manager refuses."""
        for command in self.start_commands[:-1]:
            run_program(command, MANAGER_S)     # fails where it is loaded already
        self._demand(self.start_commands[-1])

    def stop(self) -> None:
        """Ask for the stop; raise DaemonError if the manager refuses."""
        if not self.job_query:
            self._demand(self.stop_command)
            return
        # `bootout` may report 36 although the job stops, and returns before the job is unloaded;
        # until then `bootstrap` would fail with 5.
        output = run_program(self.stop_command, MANAGER_S)[1]
        if not until(lambda: run_program(self.job_query, MANAGER_S)[0], MANAGER_S):
            raise DaemonError(f"{' '.join(self.stop_command)} did not unload the job within "
                              f"{MANAGER_S} s: {printable(output.strip())}")

    def _demand(self, command: tuple[str, ...]) -> None:
        status, output = run_program(command, MANAGER_S)
        if status:
            why = printable(output.strip()) or f"status {status}"
            raise DaemonError(f"{' '.join(command)} failed: {why}")


def unit_path(home: str) -> str:
    """Return where the systemd user unit is installed."""
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.join(home, ".config")
    return os.path.join(config, "systemd", "user", SYSTEMD_UNIT)


def agent_path(home: str) -> str:
    """Return where the launchd agent is installed."""
    return os.path.join(home, "Library", "LaunchAgents", LAUNCHD_LABEL + ".plist")


def find_manager(home: str) -> Manager | None:
    """Return the service manager that has rrouter installed and answers, or None."""
    systemctl = ("systemctl", "--user")
    if (os.path.isfile(unit_path(home))
            and run_program((*systemctl, "show-environment"), MANAGER_S)[0] == 0):
        return Manager("systemd", ((*systemctl, "daemon-reload"),
                                   (*systemctl, "reset-failed", SYSTEMD_UNIT),
                                   (*systemctl, "start", SYSTEMD_UNIT)),
                       (*systemctl, "stop", SYSTEMD_UNIT))
    domain = f"gui/{os.getuid()}"
    if (os.path.isfile(agent_path(home))
            and run_program(("launchctl", "print", domain), MANAGER_S)[0] == 0):
        # Loaded again at each start, because `kickstart` would use the plist as it was when loaded.
        label = f"{domain}/{LAUNCHD_LABEL}"
        return Manager("launchd", (("launchctl", "bootstrap", domain, agent_path(home)),
                                   ("launchctl", "kickstart", label)),
                       ("launchctl", "bootout", label), ("launchctl", "print", label))
    return None


def running_already(paths: Paths) -> Running | None:
    """Return the daemon that runs and answers, or None when none does.  Raises DaemonError.

    Waits for one that is about to end, or to answer.
    """
    daemon = find_daemon(paths)
    if daemon is None:
        return None
    if daemon.holder.elsewhere and not health_of(daemon):
        raise DaemonError(f"rrouter runs {daemon.holder.elsewhere}: stop it there")
    until(lambda: not daemon.holder.is_same(Lock(paths.lock).look()) or health_of(daemon),
          DRAIN_S + 5 if daemon.holder.stopping else START_S)
    return wait_for_health(paths)[0] if find_daemon(paths) else None


def start_daemon(paths: Paths, home: str) -> str:
    """Start the daemon unless one runs; return what to print.  Raises DaemonError, UsageError."""
    daemon = running_already(paths)
    if daemon:
        return f"rrouter is already running ({daemon.holder.name}, port {daemon.port})"
    settings = read_environment(dict(os.environ))
    addresses_of(settings)              # reports a name that does not exist
    manager = find_manager(home)
    if manager:
        manager.start()
    else:
        try:
            spawn_daemon(paths)
        except OSError as error:
            raise DaemonError(f"{error.filename or 'cannot start a process'}: "
                              f"{reason_of(error)}") from error
    daemon, health = wait_for_health(paths)
    text = (f"rrouter runs (pid {daemon.pid}, port {daemon.port}, by {health['startedBy']}), "
            f"mode {health['mode']}")
    runs = Settings(daemon.host, daemon.port, health["upstreamURL"],
                    tuple(filter(None, daemon.allowed_hosts.split(","))))
    if manager and any(os.environ.get(f"RROUTER_{name.upper()}")
                       and getattr(settings, name) != getattr(runs, name)
                       for name in Settings._fields):
        text += (f"\nnote: {manager.name} starts it on {health['listenAddr']} -> "
                 f"{health['upstreamURL']}, without the RROUTER_* of this shell: put them into "
                 f"{os.path.join(home, '.config', 'rrouter.env')}")
    return text


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
        return True
    except OSError:
        return False


def send_signal(lock: Lock, holder: Holder, number: int) -> None:
    """Signal `holder` if it lives here and the lock still names it.  Raises DaemonError."""
    descriptor = None
    with contextlib.suppress(AttributeError, OSError):      # not Linux, or an old one
        # Opened before the look, so it cannot mean a later process with the same pid.
        descriptor = os.pidfd_open(holder.pid)
    try:
        if holder.elsewhere or lock.look() != holder:
            return
        if descriptor is not None:
            signal.pidfd_send_signal(descriptor, number)
        else:
            os.kill(holder.pid, number)
    except ProcessLookupError:
        pass
    except PermissionError as error:
        raise DaemonError(f"pid {holder.pid} is not yours to stop") from error
    finally:
        if descriptor is not None:
            os.close(descriptor)


def stop_daemon(paths: Paths, home: str) -> str:
    """Stop the daemon; return what to print when its port is free.  Raises DaemonError."""
    daemon, lock = find_daemon(paths), Lock(paths.lock)
    if not daemon:
        remove_files(paths.pid, paths.run)
        return "rrouter is not running"
    if daemon.holder.elsewhere:
        raise DaemonError(f"rrouter runs {daemon.holder.elsewhere}: stop it there")

    def is_gone() -> bool:
        return not daemon.holder.is_same(lock.look())

    manager = find_manager(home) if daemon.started_by in ("systemd", "launchd") else None
    if manager:
        manager.stop()
    elif not daemon.holder.stopping:    # a second signal would cut off the running responses
        send_signal(lock, daemon.holder, signal.SIGTERM)
    text = f"rrouter stopped (pid {daemon.pid})"
    if not until(is_gone, DRAIN_S + 5):
        holder = lock.look()
        if holder and daemon.holder.is_same(holder):
            send_signal(lock, holder, signal.SIGKILL)
        text = (f"rrouter killed (pid {daemon.pid}), because it did not stop within "
                f"{DRAIN_S + 5} s")
        if not until(is_gone, 5):
            raise DaemonError(f"pid {daemon.pid} does not end: find out what holds it")
        remove_files(paths.pid, paths.run)
    if not until(lambda: not _listens(daemon.host, daemon.port), 2):
        owner = port_owner(daemon.port) or "another program"
        text += f"; port {daemon.port} is now held by {owner}"
    return text


# Command line #################################################################

class Command(NamedTuple):
    """A row of COMMANDS."""

    name: str
    aliases: tuple[str, ...]
    run: Callable[[Any], int]               #: gets a Context, returns the exit status
    help: str
    arguments: tuple[tuple[str, dict[str, Any]], ...] = ()      #: as `add_argument` takes them


class Context(NamedTuple):
    """The surroundings of a command."""

    home: str
    paths: Paths
    arguments: argparse.Namespace
    commands: tuple[Command, ...]           #: COMMANDS, for `help`


def complain(text: object) -> None:
    """Print one line on stderr that names rrouter."""
    print(f"rrouter: {text}", file=sys.stderr)


def read_config(paths: Paths) -> Config:
    """Return the config in config.json, the defaults without the file; raise RouterError."""
    try:
        return config_of(read_file(paths.config))
    except (ConfigError, UnicodeDecodeError, OSError) as error:
        raise RouterError(f"{describe_config_error(error)} ({paths.config}): fix it with `rrouter "
                          "config edit` or start over with `rrouter config reset`") from error


def write_file(path: str, text: str) -> None:
    """Write a file of ~/.rrouter for a command; raise RouterError."""
    try:
        write_atomically(path, text)
    except OSError as error:
        raise RouterError(f"{path}: cannot be written: {reason_of(error)}: check its permissions "
                          "and free space") from error


def cmd_serve(context: Context) -> int:
    """Run the router in this process."""
    ready = context.arguments.ready_descriptor
    try:
        return serve(read_environment(dict(os.environ)), context.paths, ready)
    except Exception as error:
        if ready is not None:
            report_start(ready, str(error) if isinstance(error, RouterError)
                         else describe_defect(error))
        raise


def cmd_start(context: Context) -> int:
    """Start the daemon."""
    print(start_daemon(context.paths, context.home))
    return 0


def cmd_stop(context: Context) -> int:
    """Stop the daemon."""
    print(stop_daemon(context.paths, context.home))
    return 0


def cmd_restart(context: Context) -> int:
    """Stop the daemon and start it again, with its settings except what this shell sets."""
    daemon = find_daemon(context.paths) or read_run(context.paths)      # it may have been killed
    if daemon and not find_manager(context.home):       # a service has an environment file
        for name in Settings._fields:
            variable = f"RROUTER_{name.upper()}"
            os.environ[variable] = os.environ.get(variable) or str(getattr(daemon, name))
    read_environment(dict(os.environ))      # first: a bad value must not end a running daemon
    return cmd_stop(context) or cmd_start(context)


def find_health(paths: Paths) -> tuple[Running | None, dict[str, Any] | None]:
    """Return the live daemon and its /health, None for what does not exist."""
    daemon = find_daemon(paths)
    return daemon, health_of(daemon) if daemon else None


def _offline_mode(paths: Paths) -> str:
    try:
        word = mode_word(read_file(paths.mode))
        config = read_config(paths)
    except OSError as error:
        return f"unknown: {paths.mode}: {reason_of(error)}"
    except RouterError as error:
        return f"unknown: {error}"
    mode = config.resolve(word or config.default_mode)
    if not word or word == mode:
        return mode
    return f"{mode} (the mode file says '{printable(word, 40)}')"


def _print_rows(*rows: tuple[str, str]) -> None:
    for name, text in rows:
        print(f"{name and name + ':':10}{text}")


def _uptime(seconds: int) -> str:
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    if days:
        return f"{days}d {hours}h"
    return f"{hours}h {minutes}m" if hours else f"{minutes}m {seconds % 60}s"


def describe_target(auto: dict[str, Any], now: float) -> str:
    """Return in words which target serves, since when, why, and when the other is probed."""
    current: str = auto["currentTarget"]
    if not auto["switched"]:
        failing = [f"{auto[key]} {name}" for key, name in (
            ("failureCount", "HTTP errors"), ("timeoutCount", "timeouts")) if auto[key]]
        return current + (f" ({', '.join(failing)} in a row)" if failing else "")
    failed = next(target for target in auto["targets"] if target != current)
    reason = re.sub(r"^(\d+) consecutive (HTTP errors|timeouts)", r"gave \1 \2 in a row",
                    auto["reason"] or "")
    since = datetime.datetime.strptime(auto["switchedAt"], "%Y-%m-%dT%H:%M:%SZ").replace(
        tzinfo=datetime.timezone.utc).astimezone()
    is_today = since.date() == datetime.datetime.fromtimestamp(now).date()
    left = auto["cooldownRemainingSeconds"]
    tries = f"in {math.ceil(left / 60)} min" if left >= 60 else f"in {left} s" if left else "now"
    return (f"on {current} since {since.strftime('%H:%M' if is_today else '%Y-%m-%d %H:%M')} "
            f"because {failed} {reason}; tries {failed} again {tries}")


def _port_of(parts: urllib.parse.SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


def print_status(holder: Holder, health: dict[str, Any]) -> None:
    """Print /health of the daemon for people."""
    url = urllib.parse.urlsplit(health["upstreamURL"])
    reachable = _listens(url.hostname or "", _port_of(url))
    auto, now = health["autoSwitch"], time.time()
    _print_rows(
        ("mode", health["mode"]),
        ("target", describe_target(auto, now) if auto["active"] else health["currentTarget"]),
        *(("", f"{printable(model)}: {describe_target(own, now)}")
          for model, own in auto["models"].items()),
        ("daemon", f"{holder.name}, {health['listenAddr']}, up "
                   f"{_uptime(health['uptimeSeconds'])}, started by {health['startedBy']}"),
        ("requests", f"{health['requestCount']}, {health['activeRequests']} running"),
        ("upstream", f"{health['upstreamURL']}, {'' if reachable else 'not '}reachable"),
        *(("problem", printable(problem, 500)) for problem in health["problems"]))


def cmd_status(context: Context) -> int:
    """Print mode, target, daemon, upstream and problems."""
    daemon, health = find_health(context.paths)
    as_json = context.arguments.json
    if daemon and daemon.holder.stopping:
        print(f"daemon:   {daemon.holder.name} is stopping: running requests finish first",
              file=sys.stderr if as_json else sys.stdout)
        return 3
    if daemon and not health:
        where = (f"rrouter runs {daemon.holder.elsewhere} and does not answer here on port "
                 f"{daemon.port}: ask it there" if daemon.holder.elsewhere else
                 f"pid {daemon.pid} runs but does not answer on port {daemon.port}: "
                 f"see {context.paths.log}, or `rrouter restart`")
        raise DaemonError(where)
    if daemon and health:
        if as_json:
            print(json.dumps(health, indent=2))
        else:
            print_status(daemon.holder, health)
        return 0
    how = "not running; start it with `rrouter start`"
    if as_json:
        complain(how)
    else:
        _print_rows(("mode", _offline_mode(context.paths)), ("daemon", how))
    return 3


def check_mode(config: Config, mode: str) -> None:
    """Raise RouterError unless `mode` can be set with this config."""
    if mode == MODE_AUTO and config.auto_error:
        raise RouterError(f"config.json: {config.auto_error}")
    if mode not in config.usable_modes:
        raise RouterError(f"mode '{printable(mode, 40)}' is not defined by config.json; "
                          f"defined are {', '.join(config.usable_modes)}")


def set_mode(paths: Paths, mode: str) -> int:
    """Write the mode; return when every request that begins from now on is served by it."""
    paths.create()
    daemon = find_daemon(paths)
    try:
        config = read_config(paths)
    except RouterError as error:
        if daemon is None:
            raise
        complain(error)         # the daemon still has the last good config, and judges by its modes
    else:
        check_mode(config, mode)
    write_file(paths.mode, mode + "\n")
    health = health_of(daemon) if daemon and not daemon.holder.stopping else None
    if daemon is None:
        print(f"mode {mode} (written; no rrouter is running)")
    elif daemon.holder.stopping:
        print(f"mode {mode} (written; rrouter is stopping)")
    elif health and health["mode"] == mode:
        print(f"mode {mode} (in force: pid {daemon.pid}, port {daemon.port})")
    elif daemon.holder.elsewhere and health is None:
        print(f"mode {mode} (written; rrouter runs {daemon.holder.elsewhere} and reads it there)")
    else:
        problem = (f"is in mode {health['mode']}: see `rrouter status`" if health else
                   "does not answer: `rrouter restart`")
        raise DaemonError(f"mode {mode} is written to {paths.mode}, but the daemon (pid "
                          f"{daemon.pid}, port {daemon.port}) {problem}")
    return 0


def cmd_mode(context: Context) -> int:
    """Print the mode, or set the one that is named."""
    if context.arguments.name is not None:
        # As UTF-8 also where the locale is C and Python has made surrogates of it.
        name = os.fsencode(context.arguments.name).decode("utf-8", "replace")
        return set_mode(context.paths, name.strip().lower())
    health = find_health(context.paths)[1]
    print(health["mode"] if health else _offline_mode(context.paths))
    return 0


def cmd_own_mode(context: Context) -> int:
    """Set the mode that has the name of the command."""
    return set_mode(context.paths, context.arguments.command)


def print_problems(config: Config) -> None:
    """Print what is odd in config.json, on stderr."""
    for problem in config.problems:
        complain(f"config.json: {problem}")


def config_show(paths: Paths) -> int:
    """Print the effective config on stdout, its path on stderr."""
    missing = "" if os.path.exists(paths.config) else " (does not exist: these are the defaults)"
    print(paths.config + missing, file=sys.stderr)
    config = read_config(paths)
    print_problems(config)
    print(config_text(config))
    return 0


def config_edit(paths: Paths) -> int:
    """Open the config in the user's editor, then check it."""
    import shlex
    import subprocess
    paths.create()
    if not os.path.lexists(paths.config):
        write_file(paths.config, config_text(config_of(None)) + "\n")
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    try:
        status = subprocess.call([*shlex.split(editor), paths.config])
    except (OSError, ValueError) as error:
        why = reason_of(error) if isinstance(error, OSError) else error
        raise RouterError(f"editor {printable(editor)}: {why}: set VISUAL or EDITOR") from error
    if status:
        raise RouterError(f"editor {printable(editor)} ended with status {status}")
    print_problems(read_config(paths))
    print(f"{paths.config} is valid")
    return 0


def keep_beside(path: str, content: bytes) -> str:
    """Write `content` to a new file PATH.bak-YYYYmmdd-HHMMSS; return its path.  Raises OSError."""
    name = f"{path}.bak-{time.strftime('%Y%m%d-%H%M%S')}"
    for backup in [name, *(f"{name}-{number}" for number in range(2, 1000))]:
        with contextlib.suppress(FileExistsError), open(backup, "xb", buffering=0) as file:
            try:
                os.chmod(backup, 0o600)
                problem = _write_all(file.fileno(), content)
                if problem is not None:
                    raise problem
                os.fsync(file.fileno())
            except OSError:             # a full disk: leave no truncated backup
                os.unlink(backup)
                raise
            return backup
    raise FileExistsError(errno.EEXIST, "too many backups of this second", name)


def config_reset(paths: Paths) -> int:
    """Write the defaults; keep an existing file beside them."""
    paths.create()
    try:
        content = read_file(paths.config)
    except OSError as error:
        raise RouterError(f"{paths.config}: {reason_of(error)}: move it away first") from error
    try:
        if content is not None:
            print(f"kept: {keep_beside(paths.config, content)}")
    except OSError as error:
        raise RouterError(f"{paths.config}: cannot be copied beside itself: {reason_of(error)}: "
                          "check the permissions of its directory and free space") from error
    write_file(paths.config, config_text(config_of(None)) + "\n")
    print(f"{paths.config} holds the defaults")
    return 0


def config_path(paths: Paths) -> int:
    """Print the path of the config."""
    print(paths.config)
    return 0


def cmd_config(context: Context) -> int:
    """Print, edit or reset the config, or print its path."""
    actions = {None: config_show, "edit": config_edit, "reset": config_reset, "path": config_path}
    return actions[context.arguments.action](context.paths)


HELP = """\
rrouter %s - local router between the Claude Code CLI and CLIProxyAPI

usage: rrouter COMMAND

%s

files in ~/.rrouter
  mode          antigravity, claude, auto, or another mode of config.json
  config.json   rules and settings of auto; `rrouter config` prints them
  logs/rrouter.log            one line a request; rotated at %d MB
  run.json, rrouter.pid, rrouter.lock, state.json     written by the daemon
elsewhere
  ~/.config/rrouter.env       RROUTER_* for the service that install.sh installs

environment
  RROUTER_PORT      port to listen on (8316)
  RROUTER_UPSTREAM  where CLIProxyAPI is (http://localhost:8317): http or https,
                    also with a path
  RROUTER_HOST      address to listen on (localhost: 127.0.0.1 and ::1); clients
                    that reach one beyond loopback can spend your quota
  RROUTER_ALLOWED_HOSTS     more names for Host, separated by commas: containers
                    send host.docker.internal

examples
  rrouter start         then, in ~/.claude/settings.json:
                        {"env": {"ANTHROPIC_BASE_URL": "http://localhost:8316"}}
  rrouter ag            the next request goes to Antigravity
  rrouter auto          failures decide; again: retry the failed side at once
  curl http://localhost:8316/health
  tail -f ~/.rrouter/logs/*.log | grep AUTO

exit status: 0 done, 1 failed, 2 wrong usage, 3 `status` when nothing runs"""


def help_text(commands: tuple[Command, ...]) -> str:
    """Return what `rrouter help` prints of `commands`."""
    usage = {"status": "status [--json]", "mode": "mode [NAME]", "usage": "usage [--days N]",
             "config": "config [edit|reset|path]"}
    rows = [f"  {', '.join([usage.get(row.name, row.name), *row.aliases]):26} {row.help}"
            for row in commands]
    return HELP % (__version__, "\n".join(rows), LOG_MAX_BYTES >> 20)


def cmd_help(context: Context) -> int:
    """Print the help."""
    print(help_text(context.commands))
    return 0


def cmd_version(_: Context) -> int:
    """Print the version."""
    print(f"rrouter {__version__}")
    return 0


# Command line: usage ##########################################################

_USAGE_LINE = re.compile(
    r"(?P<day>\S+) \S+ \[REQ\] #\d+ \S+ (?P<path>\S+) .+ -> (?P<target>\S+) (?P<model>.+) "
    r"(?P<status>\d+) \d+\.\d\ds(?: in (?P<in>\d+)\+(?P<fromCache>\d+) out (?P<out>\d+))?"
    r"(?P<notes>.*)")
_USAGE_FAILED = re.compile(r"\((?:error event|stream without|the upstream |internal error)")
# Their widths fill 80 columns with a name of 38 characters.
USAGE_COLUMNS = {"requests": 8, "rescued": 8, "failed": 7, "in": 6, "fromCache": 7, "out": 6}
BAR_CHARACTERS = 60


def add_up(lines: Iterable[str], first_day: str) -> dict[tuple[str, str, str], Counter[str]]:
    """Return the sums of USAGE_COLUMNS by day, target and model, from the lines of a log."""
    sums: dict[tuple[str, str, str], Counter[str]] = {}
    for line in lines:
        found = _USAGE_LINE.match(line) if "[REQ]" in line and line >= first_day else None
        if found is None or found["path"].endswith("/count_tokens"):
            continue
        status, notes = int(found["status"]), found["notes"]
        failed = status != LEFT.status and (status >= 400 or bool(_USAGE_FAILED.search(notes)))
        rescued = status < 400 and not failed and " failed: " in notes
        tokens = {name: int(found[name] or 0) for name in ("in", "fromCache", "out")}
        sums.setdefault((found["day"], found["target"], found["model"]), Counter()).update(
            requests=1, rescued=int(rescued), failed=int(failed), **tokens)
    return sums


def short(count: int) -> str:
    """Return a count in at most five characters: 9999, 48k, 1200M."""
    units = ["", "k", "M", "G", "T", "P"]
    while count > 9999:
        count //= 1000
        del units[0]
    return f"{count}{units[0]}"


def usage_table(sums: dict[tuple[str, str, str], Counter[str]], with_bars: bool) -> Iterator[str]:
    """Yield the lines of the table: each day, with a bar of its tokens, then its rows."""
    def row(name: str, counts: Counter[str]) -> str:
        cells = (f"{short(counts[column]):>{width}}" for column, width in USAGE_COLUMNS.items())
        return f"{name:38.38}{''.join(cells)}"

    yield f"{'day, target and model':38}requests rescued failed    in cached   out"
    days: Counter[str] = Counter()
    for (day, _, _), counts in sums.items():
        days[day] += counts["in"] + counts["fromCache"] + counts["out"]
    for day, keys in itertools.groupby(sorted(sums), key=lambda key: key[0]):
        length = days[day] * BAR_CHARACTERS // max(*days.values(), 1)
        yield f"{day} {'#' * length}" if with_bars else day
        yield from (row(f"  {key[1]} {key[2]}", sums[key]) for key in keys)
    yield row("all", sum(sums.values(), Counter()))


def read_log(path: str) -> Iterator[str]:
    """Yield the lines of the log, those of the rotated files first."""
    for name in [*(f"{path}.{number}" for number in range(LOG_FILES, 0, -1)), path]:
        with contextlib.suppress(FileNotFoundError), \
                open(name, encoding="utf-8", errors="replace") as file:
            yield from file


def cmd_usage(context: Context) -> int:
    """Print requests and tokens by day, target and model."""
    first = datetime.date.today().toordinal() - max(context.arguments.days, 1) + 1
    sums = add_up(read_log(context.paths.log), str(datetime.date.fromordinal(max(first, 1))))
    if context.arguments.json:
        print(json.dumps([{"day": day, "target": target, "model": model,
                           **{column: sums[day, target, model][column] for column in USAGE_COLUMNS}}
                          for day, target, model in sorted(sums)], indent=2))
    else:
        print("\n".join(usage_table(sums, sys.stdout.isatty())))
    return 0


# Command line: check ##########################################################

OK, WARN, FAIL = "ok", "warn", "fail"


def check_daemon(settings: Settings, daemon: Running | None,
                 health: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    """Yield whether the daemon runs, and is this program; if none runs, who has its port."""
    if daemon and health:
        yield OK, (f"daemon: {daemon.holder.name} on {settings.listen_addr}, started by "
                   f"{daemon.started_by}")
        if health["version"] != __version__:
            yield WARN, (f"version: the daemon is {printable(str(health['version']))}, this "
                         f"program {__version__}: rrouter restart")
    elif daemon and daemon.holder.elsewhere:
        yield FAIL, (f"daemon: rrouter runs {daemon.holder.elsewhere} and does not answer here on "
                     f"port {daemon.port}: run check there")
    elif daemon:
        yield FAIL, (f"daemon: pid {daemon.pid} does not answer on port {daemon.port}: "
                     "rrouter restart")
    else:
        yield FAIL, "daemon: not running: rrouter start"
        if _listens(settings.host, settings.port):
            yield FAIL, f"port: {describe_taken(settings)}"


def is_as_installed(home: str, path: str) -> bool:
    """Return whether a file is as install.sh left it, or was not installed by it."""
    import hashlib
    try:
        record = json.loads(read_file(Paths(home).record) or b"{}")
        digest = hashlib.sha256(read_file(path) or b"").hexdigest()
        return bool(digest == record["files"][path]["sha256"][-1])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return True


def check_service(home: str) -> Iterator[tuple[str, str]]:
    """Yield whether the service manager starts this program."""
    program = os.path.join(home, "bin", "rrouter")
    if not os.path.isfile(unit_path(home)) and not os.path.isfile(agent_path(home)):
        yield OK, ("service: none is installed; rrouter start forks a daemon, and nothing starts "
                   "it at the next login")
    for path, name in ((unit_path(home), "systemd unit"), (agent_path(home), "launchd agent")):
        if not os.path.isfile(path):
            continue
        if not os.access(program, os.X_OK):
            yield FAIL, (f"service: {name} {path} starts {program}, which does not exist: "
                         "run install.sh again")
        elif not is_as_installed(home, path):
            yield WARN, (f"service: {name} {path} is not what install.sh wrote: changed by you, "
                         "or older")
        elif find_manager(home) is None:
            yield WARN, (f"service: {name} is installed, but its manager does not answer here: "
                         "rrouter start forks")
        else:
            yield OK, f"service: {name} {path}"


def _points_here(url: str, settings: Settings) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return (parts.hostname in ("localhost", "127.0.0.1", "::1", settings.host)
                and _port_of(parts) == settings.port)
    except ValueError:
        return False


def claude_settings_path(home: str) -> str:
    """Return where Claude Code keeps its settings."""
    directory = os.environ.get("CLAUDE_CONFIG_DIR") or os.path.join(home, ".claude")
    return os.path.join(directory, "settings.json")


def claude_environment(home: str) -> dict[str, str]:
    """Return the `env` of Claude Code's settings.json, {} without one.

    Raises ValueError if the file is not JSON.
    """
    try:
        value = json.loads((read_file(claude_settings_path(home)) or b"{}").decode("utf-8"))
        return {str(key): str(item) for key, item in value["env"].items()}
    except (KeyError, TypeError, AttributeError):
        return {}
    except OSError as error:
        raise ValueError(reason_of(error)) from error
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON") from error


def check_client(home: str, settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield whether Claude Code sends its requests here: by its settings, and by this shell."""
    wanted = f"http://localhost:{settings.port}"
    in_shell = os.environ.get("ANTHROPIC_BASE_URL")
    path = claude_settings_path(home)
    try:
        url = claude_environment(home).get("ANTHROPIC_BASE_URL")
    except ValueError as error:
        yield WARN, f"{path}: {error}: Claude Code cannot read it either"
        return
    if url is None and in_shell and _points_here(in_shell, settings):
        yield OK, f"shell: ANTHROPIC_BASE_URL is {printable(in_shell)} ({path} does not set it)"
    elif url is None:
        yield WARN, f'{path}: set {{"env": {{"ANTHROPIC_BASE_URL": "{wanted}"}}}} to use rrouter'
    elif _points_here(url, settings):
        yield OK, f"{path}: ANTHROPIC_BASE_URL is {printable(_without_password(url))}"
    else:
        yield WARN, (f"{path}: ANTHROPIC_BASE_URL is {printable(_without_password(url))}: "
                     f"Claude Code goes elsewhere; set {wanted}")
    if in_shell and not _points_here(in_shell, settings):
        yield WARN, (f"shell: ANTHROPIC_BASE_URL={printable(_without_password(in_shell))} points "
                     "elsewhere: unset it, also in your shell's start files")


def get_models(upstream: Upstream, fields: dict[str, str]) -> tuple[int, bytes]:
    """Return (status, body) of /v1/models.

    Raises UpstreamUnreachable, OSError, HTTPException.
    """
    connection = upstream.open()
    with contextlib.closing(connection):
        path = upstream.base_path.decode("ascii") + "/v1/models"
        with total_limit(connection.sock, LIST_S):
            connection.request("GET", path, headers=fields)
            response = connection.getresponse()
            return response.status, response.read(READ_AHEAD_MAX_BYTES)


def check_models(config: Config, names: set[str]) -> Iterator[tuple[str, str]]:
    """Yield which names in the rules the upstream does not know, with the lines that add them."""
    rewrites = sorted({rule.rewrite for rules in config.modes.values() for rule in rules})
    missing = [name for name in rewrites if name not in names]
    if not rewrites:
        yield OK, "models: no rule writes a name"
    elif not missing:
        yield OK, f"models: the upstream knows all {len(rewrites)} names that the rules write"
    known = ", ".join(printable(name, 60) for name in sorted(names)[:6]) or "none listed"
    for name in missing:
        yield WARN, (f"models: the upstream does not know {printable(name)} (400 unknown "
                     f"provider): use one of its names ({known}) in a rule, or add to "
                     "CLIProxyAPI's config.yaml:\n"
                     "        oauth-model-alias:\n          antigravity:\n"
                     '            - name: "AN-ID-FROM-THAT-LIST"\n'
                     f'              alias: "{printable(name)}"\n'
                     "              fork: true")


def _client_key(home: str) -> tuple[str, dict[str, str]]:
    """Return the variable that holds the client's key, "" if none does, and the key's header."""
    environment = dict(os.environ)
    with contextlib.suppress(ValueError):
        environment = dict(claude_environment(home), **environment)
    name = next(filter(environment.get, ("ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_API_KEY")), "")
    key = environment.get(name)
    if not key or printable(key, 4096) != key:
        return name, {}
    return name, {"Authorization": f"Bearer {key}"}


def check_upstream(home: str, settings: Settings,
                   config: Config | None) -> Iterator[tuple[str, str]]:
    """Yield whether the upstream answers, accepts the client's key, and knows the rules' names."""
    name, fields = _client_key(home)
    url = settings.upstream
    try:
        # Without Anthropic's headers: CLIProxyAPI responds to those with disguised names.
        status, body = get_models(Upstream(url, lambda _: False), fields)
    except UpstreamUnreachable as error:
        yield FAIL, f"upstream: {url} {error}: {error.remedy}"
        return
    except (OSError, http.client.HTTPException):
        yield FAIL, f"upstream: {url} gives no HTTP response in time: is that CLIProxyAPI?"
        return
    if status in (401, 403):
        refused = "the key of Claude Code" if fields else "a request without a key"
        yield WARN, (f"upstream: {url} answers, but refuses {refused} ({status}): compare api-keys "
                     f"in CLIProxyAPI's config with {name or 'the key that Claude Code has'}")
        return
    yield OK, f"upstream: {url} answers{' and accepts the key' if fields and status == 200 else ''}"
    try:
        models = {str(entry["id"]) for entry in json.loads(body)["data"]} if status == 200 else None
    except (ValueError, KeyError, TypeError, RecursionError):
        models = None
    if models is None:
        yield WARN, (f"models: {url}/v1/models gives no list ({status}): cannot compare the rules "
                     "with it")
    elif config is not None:
        yield from check_models(config, models)


def check_mode_file(paths: Paths, config: Config | None,
                    health: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    """Yield which mode is in force, and the problems in /health but those of the config."""
    if health:
        problems = [problem for problem in health["problems"]
                    if not problem.startswith("config.json")]
        yield (WARN if problems else OK), f"mode: {'; '.join([health['mode'], *problems])}"
    elif config is not None:
        mode = _offline_mode(paths)
        level = FAIL if mode.startswith("unknown:") else WARN if "(" in mode else OK
        yield level, f"mode: {mode}"


def run_checks(context: Context) -> Iterator[tuple[str, str]]:
    """Yield (level, text) of each check."""
    daemon, health = find_health(context.paths)
    settings = (Settings(daemon.host, daemon.port, health["upstreamURL"]) if daemon and health
                else read_environment(dict(os.environ)))
    yield from check_daemon(settings, daemon, health)
    config = None
    try:
        config = read_config(context.paths)
        exists = os.path.exists(context.paths.config)
        yield OK, f"config: {context.paths.config if exists else 'the defaults'}"
        for problem in config.problems:
            yield WARN, f"config: {problem}"
    except RouterError as error:
        yield FAIL, f"config: {error}"
    yield from check_mode_file(context.paths, config, health)
    yield from check_service(context.home)
    yield from check_client(context.home, settings)
    yield from check_upstream(context.home, settings, config)


def cmd_check(context: Context) -> int:
    """Print one line a check, with the remedy."""
    failed = False
    for level, text in run_checks(context):
        print(f"{level:5} {text}")
        failed = failed or level == FAIL
    return 1 if failed else 0


COMMANDS = (
    #       name           aliases               function      help, arguments
    Command("serve",       (),                   cmd_serve,
            "run in the foreground; log to stderr too",
            (("--ready-descriptor", {"type": int, "help": argparse.SUPPRESS}),)),
    Command("start",       (),                   cmd_start,
            "start the daemon; by systemd or launchd if set up"),
    Command("stop",        (),                   cmd_stop,
            "stop it; running requests finish first"),
    Command("restart",     (),                   cmd_restart,
            "stop and start"),
    Command("status",      (),                   cmd_status,
            "show mode, target, daemon, upstream and problems",
            (("--json", {"action": "store_true", "help": "print /health"}),)),
    Command("usage",       (),                   cmd_usage,
            "add up requests and tokens by day, target and model",
            (("--days", {"type": int, "default": 10 ** 6, "metavar": "N"}),
             ("--json", {"action": "store_true", "help": "print a list of objects"}))),
    Command("antigravity", ("ag",),              cmd_own_mode,
            "rewrite model names for Antigravity (Gemini)"),
    Command("claude",      ("c",),               cmd_own_mode,
            "leave model names as they are: Claude"),
    Command("auto",        ("a",),               cmd_own_mode,
            "let failures decide; again: end the cooldowns"),
    Command("mode",        (),                   cmd_mode,
            "print the mode, or set any mode of config.json",
            (("name", {"nargs": "?", "metavar": "NAME"}),)),
    Command("check",       ("health", "--check"), cmd_check,
            "examine everything: one line a check, with remedy"),
    Command("config",      (),                   cmd_config,
            "print, edit or reset the config, or print its path",
            (("action", {"nargs": "?", "choices": ("edit", "reset", "path")}),
             ("--yes", {"action": "store_true", "help": "accepted; reset never asks"}))),
    Command("help",        ("-h", "--help"),     cmd_help,
            "show this text"),
    Command("version",     ("-V", "--version"),  cmd_version,
            "print the version"),
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="rrouter", add_help=False, allow_abbrev=False,
                                     usage="rrouter COMMAND; see `rrouter help`")
    commands = parser.add_subparsers(dest="command", prog="rrouter", metavar="COMMAND",
                                     required=True)
    for row in COMMANDS:
        words = [alias for alias in row.aliases if not alias.startswith("-")]
        command = commands.add_parser(row.name, aliases=words, description=row.help,
                                      allow_abbrev=False)
        command.set_defaults(run=row.run, command=row.name)     # not the alias that was typed
        for argument, options in row.arguments:
            command.add_argument(argument, **options)
    return parser


def open_standard_streams() -> None:
    """Open /dev/null where 0, 1 or 2 is closed: else the next file opened would get its number."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, mode, closefd=False))


def parse_command(argv: list[str] | None) -> argparse.Namespace:
    """Return the command line, `help` if it is empty; exit with status 2 if it is wrong."""
    words = list(sys.argv[1:] if argv is None else argv) or ["help"]
    options = {alias: row.name for row in COMMANDS for alias in row.aliases if alias[0] == "-"}
    words[0] = options.get(words[0], words[0])
    return build_parser().parse_args(words)


def run_command(argv: list[str] | None) -> int:
    """Run one command; return its exit status."""
    open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")       # type: ignore[union-attr]
    arguments = parse_command(argv)
    os.umask(os.umask(0o077) & 0o077)       # an odd one would keep even us from our files
    if not os.environ.get("HOME"):
        os.environ.pop("HOME", None)        # now it is that of the user database
    try:
        home = os.path.expanduser("~")
        if not os.path.isabs(home):
            raise UsageError(f"HOME={printable(home)}: expected the absolute path of your home "
                             "directory")
        status: int = arguments.run(Context(home, Paths(home), arguments, COMMANDS))
        sys.stdout.flush()
        return status
    except RouterError as error:
        complain(error)
        return error.exit_code
    except BrokenPipeError:             # the reader of our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)    # else the flush at exit would fail again
        complain(f"{error.filename or 'output'}: {reason_of(error)}")
        return 1
    except Exception as error:          # once, for all commands: no traceback reaches a user
        complain(describe_defect(error))
        return 1


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit status, or exit with it where `argv` is None."""
    try:
        try:
            status = run_command(argv)
        finally:
            # From here on Ctrl-C ends it at once: Python would show a traceback while it ends.
            if argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
    except KeyboardInterrupt:
        status = 130
    if argv is None:                    # the caller in a zip application drops what `main` returns
        sys.exit(status)
    return status


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:           # before `main` could catch it
        sys.exit(130)
