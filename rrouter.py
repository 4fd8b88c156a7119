#!/usr/bin/env python3
"""rrouter: a local router between the Claude Code CLI and CLIProxyAPI.

    Claude Code -> rrouter (localhost:8316) -> CLIProxyAPI (localhost:8317) -> Antigravity / Claude

The path of a request, each step a method or function of that name in this file:

    ProxyHandler.handle           a thread for each client connection, one request after another
    ProxyHandler._handle_request  one request, or the error that refuses it
      ClientConnection.read_head    its head, strictly parsed
      check_origin, outbound_head   a web page's request is refused; Host becomes the upstream's
      ClientConnection.read_body    its whole body, because it may be sent twice
      find_model                    the model name in the body, and where it stands
    Exchange.run                  the request gets its number
      Router.snapshot               config and mode as the files, or /@MODE, say at this moment
    Exchange._forward             up to the response:
      decide_route                  the first matching rule names the model for a target
      Failover.admit                in auto mode: whose turn it is
      Attempt.run                   one try on one target
        splice                        the model name is replaced, nothing else
        Upstream.send                 on a kept or a new connection; the response head is read
        Attempt._hold_back            the response is held until it is known to be usable
        without_thinking              heals the history for a second send if the target rejects it
      judge                         after a second try: which failure counts, which response wins
    Exchange._relay               the response is forwarded as it arrives (ResponseWriter)
      Failover.commit               a probe succeeds, because the client gets its response
      Exchange._settle              Failover learns the outcome (credit, charge, release)
      Exchange._end                 it is counted and logged; then its last bytes are sent

Files: ~/.rrouter/{mode,{config,state,run,install}.json,rrouter.{pid,lock},logs/rrouter.log}
Environment: RROUTER_PORT, RROUTER_UPSTREAM, RROUTER_HOST, RROUTER_ALLOWED_HOSTS.
Exit status: 0 done, 1 failed, 2 usage, 3 not running.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", sys.flags.isolated):
    del sys.path[0]     # the folder of this file, where any file could pose as a standard module

import argparse
import contextlib
import datetime
import email.utils
import enum
import errno
import fcntl
import fnmatch
import glob
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
from functools import partial
from typing import Any, BinaryIO, NamedTuple, NoReturn, TextIO, TypeVar, Union

__version__ = "5.1.0"


# Constants ####################################################################

DEFAULT_ENVIRONMENT = {
    "RROUTER_ALLOWED_HOSTS": "",
    "RROUTER_HOST": "localhost",
    "RROUTER_PORT": "8316",
    "RROUTER_UPSTREAM": "http://localhost:8317",    # CLIProxyAPI's default port
}

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
LOOPBACK_NAMES = "localhost", "127.0.0.1", "::1"

# Auto mode.
RECHECK_S = 60                  # least time before a probe, because a move loses the prompt cache
EVENT_S = 2                     # failures this close together may have one cause
EVENTS_REMEMBERED = 16          # failures that a later one is compared with
SLOW_FAILURE_S = 20             # a failure slower than this means that CLIProxyAPI retried first
LONG_FAILURE_S = 60             # a failure this slow counts even if the client left the rescue
ABANDONED_S = 120               # when a client leaves a stream this silent, the target timed out
NAMES_REMEMBERED = 256          # models and sessions, because clients must not fill the memory
STAY_S = 300                    # default of auto.stay: by then a prompt cache has expired
STAY_MAX_S = 3600               # limit of auto.stay, and of a stay without any pause
MODEL_NAME_MAX = 256            # characters; a longer name gets no breaker

# Heads and bodies.  Smaller limits refuse real messages, larger ones let a peer take memory.
HEAD_MAX_BYTES = 64 * 1024      # start line and fields together; nginx allows 32 KiB, Go 1 MiB
FIELDS_MAX = 200                # of a request; Claude Code sends about 23
LENGTH_DIGITS_MAX = 15          # of Content-Length and chunk sizes; fits a 64-bit integer
TRAILERS_MAX_BYTES = 8 * 1024   # also of the line that begins a chunk
BODY_MAX_BYTES = 64 * 1024 * 1024   # of a request; Anthropic's API allows 32 MB
READ_AHEAD_MAX_BYTES = 1024 * 1024  # of a response held back; error bodies are a few KB
GZIP_MEMBERS_MAX = 100          # of a response that is held back
READ_AHEAD_S = 10               # from the head of an error response to its end

# Connections.
TICK_S = 0.5                    # how late a client that left is noticed; 1 s is promised
LIST_S = 5                      # for the whole list of models, when `check` asks for it
CONNECT_S = 3                   # per address of the upstream, which is on this machine or near it
IDLE_S = 300                    # between requests; if less, clients reuse connections just closed
HEAD_S = 15                     # for one request head; if more, a slow client holds a thread longer
BODY_STALL_S = 60               # without a byte of the request body, whose memory is held meanwhile
WRITE_STALL_S = 300             # without the client reading; Claude Code itself waits 300 s
LINGER_S = 1                    # for the client to close first; else a reset may cut the response
POOL_MAX = 32                   # idle upstream connections; each one costs a descriptor
POOL_IDLE_S = 60                # if more, the server closes first; many do after 60 s
CONNECTIONS_MAX = 512           # clients at once; each one costs a thread
CONNECTIONS_RESERVE = 16        # beyond those, for /health and for 503 responses
BACKLOG = 128                   # VS Code opens 50 at once; with the default of 5 they wait seconds
RECEIVE_BYTES = 64 * 1024       # from the upstream; a larger buffer costs each event 10 %
REQUEST_BYTES = 256 * 1024      # from a client; 8 % faster than 64 KiB for a request of 77 KB
JOINED_BYTES = 64 * 1024        # copying a larger request costs more than a second call of send
BODY_STEP_BYTES = 1024 * 1024   # the most memory that a request body gets before its bytes arrive
STALE_S = 1                     # a kept connection that closes this soon was dead before
STOPPED_S = 1                   # a longer delay means a stopped process, so limits are extended
RECONNECT_EVERY_S = 0.25        # between connection attempts while the upstream is away
RECONNECT_FOR_S = 15            # for all of them; a restart of CLIProxyAPI takes less

# Files and the daemon.
POLL_S = 0.2                    # how often the watcher looks at the files; 0.25 s is promised
# A file younger than this may change without a new time stamp, because the kernel's clock ticks
# every 4 to 10 ms.  The second value is for whole seconds (HFS+, FAT, some network file systems).
SETTLED_S, SETTLED_COARSE_S = 0.05, 2
TRIM_S = 1                      # minimum between two returns of free memory to the system
FILE_MAX_BYTES = 1024 * 1024    # mode, config.json and state.json are a few KB
LOG_MAX_BYTES = 10 * 1024 * 1024    # of one log file
LOG_FILES = 3                   # rotated ones, in addition to the one being written
CUT_OFF_S = 1                   # for requests to end once the drain has cut them off
DRAIN_S = 30                    # for running requests after SIGTERM; systemd kills after 45 s
LOG_SHOWN = 20                  # lines that `logs` begins with
MODELS_SHOWN = 5                # by `explain` without a name
HOOK_S = 10                     # for the program of auto.onSwitch
START_S = 15                    # for a new daemon to respond; the slowest machine seen takes 1 s

# The fields of RFC 9110 §7.6.1, and the others that Go's httputil.ReverseProxy removes.
HOP_BY_HOP = frozenset((
    b"connection", b"proxy-connection", b"keep-alive", b"proxy-authenticate",
    b"proxy-authorization", b"te", b"trailer", b"transfer-encoding", b"upgrade"))

# Anthropic's types for the statuses of rrouter's errors; the others are invalid_request_error.
ERROR_TYPES = {
    403: "permission_error", 404: "not_found_error", 408: "timeout_error", 413: "request_too_large",
    500: "api_error", 502: "api_error", 503: "overloaded_error", 504: "timeout_error"}

# The patterns of Claude Code (lower case, without backticks), then wordings of Gemini, which Claude
# Code does not know.  A row matches if all its words are present, in any order.
SIGNATURE_WORDINGS = (
    (b"signature in thinking block",), (b"invalid data in redacted_thinking block",),
    (b"thinking.signature", b"field required"),
    (b"thinking block", b"cannot be modified"), (b"thinking block", b"invalid signature"),
    (b"redacted_thinking", b"cannot be modified"), (b"redacted_thinking", b"invalid signature"),
    (b"corrupted thought signature",), (b"invalid thought signature",),
    (b"thought signature is not valid",), (b"bound to a different conversation",))
# Shelf responses (CLIProxyAPI asked no provider): statuses, words, name in the log.
UNKNOWN_MODEL = "unknown provider for model"
SHELF_WORDINGS = (
    ((503,), (b"auth_unavailable",), "auth_unavailable"),
    ((429,), (b"all credentials for model", b"cooling down"), "cooling down"),
    ((429, 503), (b"model_cooldown",), "model_cooldown"),
    ((400, 502), (UNKNOWN_MODEL.encode("ascii"),), UNKNOWN_MODEL))

# How targets say, in lower case, that a request is beyond their limits.
TOO_LARGE_WORDINGS = (
    b"prompt is too long", b"exceeds the context window", b"exceeds the maximum number of tokens",
    b"input is too long", b"prompt token count of", b"prompt_too_long", b"context length exceeded",
    b"request too large")


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
    """The client's request is refused; its connection is closed, because the rest is suspect."""

    def __init__(self, http_status: int, message: str, logged: str = "") -> None:
        super().__init__(message)
        self.http_status = http_status
        self.logged = logged or message     #: for the log, without values that the client sent


class ClientGone(RouterError):
    """The client left or broke its request off, so no response can reach it."""


class UpstreamError(RouterError):
    """The upstream broke off or sent something other than HTTP."""

    http_status = 502
    what = "connection dropped"
    remedy = "see the log of CLIProxyAPI"


class UpstreamUnreachable(UpstreamError):
    """No connection could be opened."""

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
RULE_KEYS = "match", "rewrite", "agent", "class"    # in config.json, in the order of Rule's fields


class Rule(NamedTuple):
    """One mapping: model names that match the glob `match` become `rewrite`."""

    match: str
    rewrite: str
    agent: str = ""             #: a glob that the agent must match as well; "" for any
    request_class: str = ""     #: the same for the request class


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
        # A response that is not streamed is generated as a whole before its first byte arrives.
        # Claude Code gives up on it at 300 s, so a later timeout would come too late.
        return self.first_byte_s if streamed else min(2 * self.first_byte_s, 280)


class Config(NamedTuple):
    """The content of a valid config.json."""

    modes: dict[str, tuple[Rule, ...]]
    default_mode: str
    auto: AutoSettings
    auto_error: str             #: why mode auto cannot be used; "" if it can
    problems: tuple[str, ...]   #: mistakes that do no harm
    conditions: frozenset[str]  #: the keys among "agent" and "class" that rules use

    @property
    def choices(self) -> list[str]:
        """The modes that can be set."""
        return [*self.modes] + [MODE_AUTO] * (not self.auto_error)

    def resolve(self, mode: str) -> str:
        """Return `mode` if it can be set, else the default mode, else the first that can."""
        usable = self.choices
        return next(name for name in (mode, self.default_mode, *usable) if name in usable)


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
    """The fields of a head: their values, and the lines that the router forwards."""

    values: dict[bytes, list[bytes]]    #: by lower-case name, one for each line
    options: set[bytes]                 #: what Connection lists, in lower case
    end_to_end: list[bytes]             #: bytes untouched, each line with its CR LF

    def all(self, name: bytes) -> list[bytes]:
        """Return the values of the field `name`, line by line; none if it is absent."""
        return self.values.get(name, [])

    def value(self, name: bytes) -> str:
        """Return the first value of the field `name`, in lower case; "" if it is absent."""
        values = self.values.get(name)
        return values[0].lower().decode("latin-1") if values else ""


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
    fields: Fields
    length: int | None          #: None if the body is chunked or ends with the connection
    chunked: bool
    keep_alive: bool

    @property
    def is_event_stream(self) -> bool:
        """True if the body is server-sent events."""
        return self.fields.value(b"content-type").startswith("text/event-stream")

    @property
    def coding(self) -> str:
        """The content encoding of the body, "" for none."""
        return self.fields.value(b"content-encoding").replace("identity", "")


class Fault(enum.Enum):
    """Why an attempt failed, as far as `judge` needs to know."""

    STATUS = "status"           #: HTTP 400 and above
    TOO_LARGE = "too large"     #: a request that this target cannot take
    REJECTED = "rejected"       #: thinking signatures rejected, with no thinking block to remove
    SHELF = "shelf"             #: CLIProxyAPI responded without asking a provider
    NO_MESSAGE = "no message"   #: a 2xx without a message, or with an empty one
    TIMEOUT = "timeout"
    DROPPED = "dropped"         #: the connection dropped, or the upstream did not send HTTP
    UNREACHABLE = "unreachable"
    OWN = "own"                 #: an error that another rrouter generated
    LEFT = "left"               #: the client left before the attempt ended


class Outcome(NamedTuple):
    """How one attempt ended."""

    fault: Fault | None         #: None: the attempt succeeded
    status: int                 #: of the response, or of the error that replaces it
    what: str                   #: the status or the fault, for people
    began: float = 0.0          #: Unix seconds
    ended: float = 0.0
    retry_after_s: float | None = None
    keeps_400: bool = False     #: the healed send failed, and the client gets the original 400
    direct: bool = False        #: the failure came too late for a rescue


LEFT = Outcome(Fault.LEFT, 499, "the client left")


class Verdict(NamedTuple):
    """What `judge` decides about the two attempts of one request."""

    counts: tuple[bool, bool]   #: whether the first and the second failure count
    chosen: int                 #: whose response the client gets: 0 or 1


class Ticket(NamedTuple):
    """The right to one attempt: Failover issues it, and gets it back with the outcome."""

    target: str
    model: str
    generation: int             #: of the breaker when the attempt began
    probe: int = 0              #: number of the probe this is; 0 for none
    quiet: bool = False         #: log no start of the probe, because the shelf caused the switch
    session: str = ""           #: "" if the client names none


class Settings(NamedTuple):
    """Where to listen and where to send, from the environment."""

    host: str
    port: int
    upstream: str
    allowed_hosts: tuple[str, ...] = ()     #: allowed in Host, in addition to the loopback names

    @property
    def listen_addr(self) -> str:
        """HOST:PORT, with an IPv6 address in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


# Text #########################################################################

def printable(text: str, limit: int = 300) -> str:
    """Return at most `limit` characters of `text`, escaped for a log, a header or a terminal."""
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
    return f"{datetime.datetime.fromtimestamp(int(when), datetime.timezone.utc):%Y-%m-%dT%H:%M:%SZ}"


def reason_of(error: OSError) -> str:
    """Return the system's words for `error`, in lower case."""
    return (error.strerror or str(error) or type(error).__name__).lower()


def error_body(status: int, message: str) -> bytes:
    """Return an error of rrouter in Anthropic's shape, so that Claude Code shows the message."""
    kind = ERROR_TYPES.get(status, "invalid_request_error")
    error = {"type": kind, "message": f"rrouter: {message}"}
    return json.dumps({"type": "error", "error": error}).encode("ascii")


def describe_defect(error: BaseException | None) -> str:
    """Return the place and kind of an internal error, without values, which may be secret."""
    where, trace = [], error.__traceback__ if error is not None else None
    while trace is not None:
        where.append(f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"internal error: {type(error).__name__} at {' > '.join(where)}; please report it"


# Configuration ################################################################

def _parse_json(text: str) -> Any:
    def refuse(constant: str) -> NoReturn:      # NaN or Infinity
        raise json.JSONDecodeError("Expecting a number", text, text.index(constant))

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        what = error.msg[0].lower() + error.msg[1:]
        rest = text[error.pos:error.pos + 20]
        found = repr(rest) if rest else "the end of the file"
        raise ConfigError(f"{error.lineno}:{error.colno}: {what}, found {found}") from error
    except (ValueError, RecursionError) as error:       # 5,000 digits; 100,000 brackets
        raise ConfigError("1:1: found a number that is too long or nesting too deep") from error


def _expect(fits: bool, path: str, what: str, value: Any) -> None:
    """Raise ConfigError unless the value at `path` fits."""
    if not fits:
        try:
            found = printable(json.dumps(value), limit=60)
        except RecursionError:          # json.loads gets a little deeper than json.dumps
            found = "nesting that is too deep"
        raise ConfigError(f"{path}: expected {what}, found {found}")


def _members(value: Any, path: str, known: Collection[str],
             problems: list[str]) -> dict[str, Any]:
    """Return the object `value`; add each member that is not `known` to `problems`."""
    _expect(isinstance(value, dict), path or "the top level", "an object", value)
    prefix = f"{path}." if path else ""
    problems.extend(f"{prefix}{printable(key)}: unknown key, ignored; known: {', '.join(known)}"
                    for key in value if key not in known)
    return dict(value)


def _parse_rule(value: Any, path: str, problems: list[str]) -> Rule:
    members = _members(value, path, RULE_KEYS, problems)
    for key in RULE_KEYS:
        if key not in members and key in RULE_KEYS[:2]:
            raise ConfigError(f"{path}.{key}: missing, expected a string")
        text = members.get(key, "*")
        _expect(isinstance(text, str) and text != "", f"{path}.{key}", "a non-empty string", text)
        try:
            re.compile(fnmatch.translate(text if key != "rewrite" else ""))
        except re.error:                # [z-a], before Python 3.10
            _expect(False, f"{path}.{key}", "a glob", text)
    return Rule(*(members.get(key, "") for key in RULE_KEYS))


def _parse_modes(value: Any, problems: list[str]) -> dict[str, tuple[Rule, ...]]:
    _expect(isinstance(value, dict) and len(value) > 0, "modes",
            "an object with at least one mode", value)
    modes = {}
    for name, mode in value.items():
        path = f"modes.{printable(name)}"
        _expect(name != MODE_AUTO, path, "another name, because auto is built in", name)
        _expect(name.split() == [name] and name == name.lower() == printable(name), path,
                "a name in lower-case ASCII without spaces", name)
        mappings = _members(mode, path, ("mappings",), problems).get("mappings", [])
        _expect(isinstance(mappings, list), f"{path}.mappings", "a list", mappings)
        modes[name] = tuple(_parse_rule(rule, f"{path}.mappings[{index}]", problems)
                            for index, rule in enumerate(mappings))
    return modes


def _number(value: Any, path: str, low: float, high: float) -> Any:
    """Return `value`, a number from `low` to `high`; it must be an int if `low` is one."""
    kind = "whole number" if isinstance(low, int) else "number"
    kinds = int if isinstance(low, int) else (int, float)
    _expect(isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high, path,
            f"a {kind} from {low} to {high}", value)
    return value


def _parse_auto(value: Any, problems: list[str]) -> AutoSettings:
    members = {**DEFAULT_CONFIG["auto"], "stay": STAY_S / 60, "onSwitch": []}
    members.update(_members(value, "auto", tuple(members), problems))
    targets, minutes, hook = (members[key] for key in ("targets", "cooldownMinutes", "onSwitch"))
    _expect(isinstance(targets, list) and len(targets) == 2 and targets[0] != targets[1]
            and all(isinstance(target, str) for target in targets),
            "auto.targets", "the names of two different modes", targets)
    _expect(isinstance(minutes, list) and len(minutes) > 0, "auto.cooldownMinutes",
            "a list of minutes", minutes)
    _expect(isinstance(hook, list) and all(isinstance(word, str) for word in hook),
            "auto.onSwitch", "a list of strings, a program and its arguments", hook)
    # The lower bounds let a trial run in seconds; a value above an upper bound is a typo.
    return AutoSettings(
        targets=(targets[0], targets[1]),
        failure_threshold=_number(members["failureThreshold"], "auto.failureThreshold", 1, 1000),
        timeout_threshold=_number(members["timeoutThreshold"], "auto.timeoutThreshold", 1, 1000),
        cooldowns_s=tuple(60.0 * _number(cooldown, f"auto.cooldownMinutes[{i}]", 0.0001, 525600)
                          for i, cooldown in enumerate(minutes)),
        first_byte_s=_number(members["firstByteTimeoutSeconds"], "auto.firstByteTimeoutSeconds",
                              0.001, 86400),
        stay_s=60 * _number(members["stay"], "auto.stay", 0.0, STAY_MAX_S / 60),
        on_switch=tuple(hook))


def parse_config(text: str) -> Config:
    """Return the configuration in the JSON text `text`; raise ConfigError if any part is wrong."""
    problems: list[str] = []
    top = _members(_parse_json(text), "", ("modes", "defaultMode", "auto"), problems)
    if "modes" not in top:
        raise ConfigError("modes: missing, expected an object of modes")
    modes = _parse_modes(top["modes"], problems)
    built_in = DEFAULT_CONFIG["defaultMode"]
    default_mode = top.get("defaultMode", built_in if built_in in modes else next(iter(modes)))
    names = [*sorted(modes), MODE_AUTO]
    _expect(default_mode in names, "defaultMode", f"one of {', '.join(names)}", default_mode)
    auto, auto_error = _parse_auto(top.get("auto", {}), problems), ""
    unknown = ", ".join(printable(json.dumps(target), 60) for target in auto.targets
                        if target not in modes)
    if unknown:
        auto_error = (f"auto.targets: {unknown}: not among the modes ({', '.join(modes)}), "
                      "so mode auto cannot be used")
        # A config that never uses auto need not define the built-in targets.
        if "targets" in top.get("auto", {}) or default_mode == MODE_AUTO:
            problems.append(auto_error)
    conditions = frozenset(key for rules in modes.values() for rule in rules
                           for key, pattern in zip(RULE_KEYS[2:], rule[2:]) if pattern)
    return Config(modes, default_mode, auto, auto_error, tuple(problems), conditions)


def config_of(content: bytes | None) -> Config:
    """Return the configuration in a file with this content; the embedded default for None."""
    if content is None:
        return parse_config(json.dumps(DEFAULT_CONFIG))
    return parse_config(content.decode("utf-8").removeprefix("\ufeff"))


def config_text(config: Config) -> str:
    """Return the JSON text that `parse_config` reads as `config`."""
    auto = config.auto
    return json.dumps({
        "modes": {name: {"mappings": [{key: text for key, text in zip(RULE_KEYS, rule) if text}
                                      for rule in rules]}
                  for name, rules in config.modes.items()},
        "defaultMode": config.default_mode,
        "auto": {
            "targets": list(auto.targets),
            "failureThreshold": auto.failure_threshold,
            "timeoutThreshold": auto.timeout_threshold,
            "cooldownMinutes": [tidy(seconds / 60) for seconds in auto.cooldowns_s],
            "firstByteTimeoutSeconds": tidy(auto.first_byte_s),
            **({"stay": tidy(auto.stay_s / 60)} if auto.stay_s != STAY_S else {}),
            **({"onSwitch": list(auto.on_switch)} if auto.on_switch else {})},
    }, indent=2, ensure_ascii=False)


def mode_word(content: bytes | None) -> str | None:
    """Return the word in the mode file, or None if the file does not exist."""
    if content is None:
        return None
    # Windows PowerShell writes UTF-16, or UTF-8 with a byte order mark.
    is_utf_16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
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


def describe_unknown_mode(mode: str, choices: Iterable[str]) -> str:
    """Return why `mode` cannot be set, and which modes can."""
    return f"'{printable(mode, 40)}' is not defined by config.json (defined: {', '.join(choices)})"


def _is_host(host: str) -> bool:
    """Return whether `host` is an address or a name that can be looked up."""
    try:
        return bool(re.fullmatch("[A-Za-z0-9._:%-]{1,253}", host) and host.encode("idna"))
    except UnicodeError:                # a label is empty or over 63 characters
        return False


def _is_upstream_url(text: str) -> bool:
    """Return whether `text` is http://HOST[:PORT][/PATH], or the same with https."""
    try:
        url = urllib.parse.urlsplit(text)
        return bool(
            url.scheme in ("http", "https") and _is_host(url.hostname or "") and url.port != 0
            and "@" not in url.netloc and not url.query and not url.fragment
            and re.fullmatch("[!-~]+", text))
    except ValueError:                  # the port is not a number, or a bracket is not closed
        return False


def _without_password(url: str) -> str:
    return re.sub(r"(?s)\A([A-Za-z]+:/+)?.*@", r"\1***@", url)


def read_environment(environ: Mapping[str, str]) -> Settings:
    """Return the settings; raise UsageError with the variable, its value and what is allowed."""
    # An empty variable counts as unset.
    values = {name: environ.get(name) or default for name, default in DEFAULT_ENVIRONMENT.items()}
    port, host = values["RROUTER_PORT"], values["RROUTER_HOST"].strip("[]")
    upstream, words = values["RROUTER_UPSTREAM"], values["RROUTER_ALLOWED_HOSTS"].split(",")
    allowed = tuple(word.strip(" []").rstrip(".").lower() for word in words if word.strip())
    for name, fits, expected in (
            ("RROUTER_PORT", re.fullmatch("[0-9]{1,5}", port) and 1 <= int(port) <= 65535,
             "a port number from 1 to 65535"),
            ("RROUTER_HOST", _is_host(host), "localhost, an address or a host name"),
            ("RROUTER_UPSTREAM", _is_upstream_url(upstream),
             "http(s)://HOST[:PORT][/PATH] without user, query or fragment"),
            ("RROUTER_ALLOWED_HOSTS", all(map(_is_host, allowed)),
             "names or addresses, without ports, separated by commas")):
        if not fits:
            raise UsageError(f"{name}={printable(_without_password(values[name]))}: "
                             f"expected {expected}")
    return Settings(host, int(port), upstream.rstrip("/"), allowed)


# Routing ######################################################################

def match_rule(rules: Iterable[Rule], model: str,
               sender: tuple[str, str] = ("", "")) -> Rule | None:
    """Return the first rule that matches `model` and `sender` (agent and class), or None."""
    for rule in rules:
        if model != rule.match and not fnmatch.fnmatchcase(model, rule.match):
            continue
        if not (rule.agent or rule.request_class) or all(
                not pattern or (name and fnmatch.fnmatchcase(name, pattern.lower()))
                for name, pattern in zip(sender, rule[2:])):
            return rule
    return None


def decide_route(config: Config, target: str, model: str | None,
                 sender: tuple[str, str] = ("", "")) -> Route:
    """Return where a request for `model` goes when it is the turn of `target`."""
    rule = match_rule(config.modes[target], model, sender) if model is not None else None
    return Route(target, model if rule is None else rule.rewrite)


# Messages: heads ##############################################################

# `http.server` and `http.client` parse heads with the e-mail parser: it ends a head at its first
# malformed line (the later fields, Content-Length among them, vanish and the body becomes the next
# request), ends a line at a bare CR and takes the first of two lengths (python/cpython#150499).
# These expressions follow the grammar of RFC 9112 §2-5, and accept any visible ASCII as a target.
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_TEXT = rb"[\t\x20-\x7e\x80-\xff]*"
_FIELDS = b"((?:%b:%b\r\n)*)" % (_TOKEN, _TEXT)
_REQUEST_LINE = re.compile(rb"(%b) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])\r\n" % _TOKEN)
_REQUEST_START = re.compile(_REQUEST_LINE.pattern + _FIELDS)
_REQUEST_HEAD = re.compile(_REQUEST_START.pattern + b"\r\n")
_RESPONSE_HEAD = re.compile(
    rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: (%b))?\r\n%b\r\n" % (_TEXT, _FIELDS))
_TRAILERS = re.compile(b"%b\r\n" % _FIELDS)
_TRUNCATED_TRAILERS = re.compile(rb"%b[^\r\n]*\r?" % _FIELDS)
_NAME = re.compile(_TOKEN)
_NUMBER = re.compile(b"[0-9]{1,%d}" % LENGTH_DIGITS_MAX)
_BARE_LF = re.compile(rb"(?<!\r)\n")
_HOST_LINE = re.compile(rb"(?im)^(host:)[^\r]*")
_LENGTH_LINE = re.compile(rb"(?im)^(content-length:)[^\r]*")
_ABSOLUTE = re.compile(rb"(?i)https?://([^/?#]*)(.*)")
_AUTHORITY = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z\-._~%!$&'()*+,;=]*)(?::[0-9]{0,5})?")
_MODE_PREFIX = re.compile(rb"/@([^/?#]*)/?(.*)")
_LOOPBACK_ORIGIN = re.compile(rb"(?i)https?://(localhost|127\.0\.0\.1|\[::1\])\.?(:[0-9]{0,5})?")

# How much of a subscription is used (a fraction), and when its window ends (Unix seconds).
_WINDOWS = {name: tuple(b"anthropic-ratelimit-unified-%b-%b" % (name.encode("ascii"), what)
                        for what in (b"utilization", b"reset")) for name in ("5h", "7d")}
# Fields of a response that are not forwarded: CORS would open rrouter to every web page, and in a
# chain of routers each one adds its own x-rrouter fields.
_WITHHELD = (b"access-control-", b"x-rrouter-target", b"x-rrouter-model", b"x-rrouter-attempts")


def _without(lines: Iterable[bytes], names: Collection[bytes]) -> list[bytes]:
    return [line for line in lines if line.partition(b":")[0].lower() not in names]


def _parse_fields(block: bytes, withheld: tuple[bytes, ...] = ()) -> Fields:
    """Parse valid lines; do not forward hop-by-hop fields or names that begin with `withheld`."""
    values: dict[bytes, list[bytes]] = {}
    end_to_end = []
    for line in block.splitlines(keepends=True):
        name, _, value = line.partition(b":")
        name = name.lower()
        values.setdefault(name, []).append(value.strip())
        if name not in HOP_BY_HOP and not name.startswith(withheld):
            end_to_end.append(line)
    options = {option.strip().lower()
               for value in values.get(b"connection", ()) for option in value.split(b",")}
    # Connection cannot remove Content-Length, because the body would lose its end.
    listed = options - {b"keep-alive", b"content-length"}
    return Fields(values, options, _without(end_to_end, listed) if listed else end_to_end)


def _refusal(head: bytes) -> RequestError:
    """Return the error for a head that does not match _REQUEST_HEAD."""
    valid = _REQUEST_START.match(head)
    if not valid:
        return RequestError(400, "malformed request line: expected METHOD TARGET HTTP/1.1")
    token = _NAME.match(head, valid.end())      # never the value, which may be a secret
    name = token.group()[:40].decode("ascii") if token else ""
    return RequestError(400, f"malformed header field {name!r}: expected NAME: VALUE without "
                             "control characters, space before the colon or continuation lines",
                        "malformed header field")       # the name may be part of a value


def _origin_form(method: bytes, target: bytes, host: bytes) -> tuple[bytes, bytes]:
    """Return the target in origin form, and its authority: `host` unless it was absolute."""
    if method in (b"CONNECT", b"TRACE"):    # a tunnel bypasses the upstream; an echo shows secrets
        raise RequestError(405, f"{method.decode('ascii')} is not supported")
    if target.startswith(b"/") or (target == b"*" and method == b"OPTIONS"):
        return target, host
    absolute = _ABSOLUTE.fullmatch(target)
    if not absolute:
        raise RequestError(400, "malformed request target: expected a path")
    authority, path = absolute.groups()
    return path if path.startswith(b"/") else b"/" + path, authority


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
    """Return the parsed `head` of a request; raise RequestError if it is malformed or ambiguous."""
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
    named = _MODE_PREFIX.match(target)
    if named:
        target = b"/" + named[2]
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
        path=target.partition(b"?")[0].decode("ascii"),
        mode=urllib.parse.unquote(named[1].decode("ascii")).lower() if named else None)


def check_head_start(data: bytes, seen: int) -> None:
    """Raise RequestError if the incomplete head `data`, checked up to `seen`, cannot become valid.

    A client that sends TLS, HTTP/0.9 or bare line feeds would otherwise wait for a response.
    """
    if b"\n" in data and not _REQUEST_LINE.match(data):
        raise _refusal(data)
    if not _NAME.match(data) or _BARE_LF.search(data, seen):
        raise RequestError(400, "malformed request: expected HTTP/1.1 with lines that end in CR LF")


def check_origin(head: RequestHead, hosts: Collection[str]) -> None:
    """Raise RequestError 403 for a request that a web page may have sent.

    Host must be one of `hosts`, unless that is empty.  Otherwise any page could spend the user's
    quota: the upstream allows every Origin, a text/plain POST needs no preflight, and a page can
    rebind its host name to 127.0.0.1 (CVE-2024-28224, CVE-2025-66414).  `Sec-Fetch-Mode` proves
    nothing, because Node's fetch sends it as well.
    """
    host = re.sub(r"\.?(?::[0-9]*)?\Z", "", head.authority, count=1).lower()
    if hosts and (head.http11 or head.authority) and host not in hosts:
        raise RequestError(403, f"Host {printable(repr(head.authority), 80)} is not this machine: "
                                "use localhost, 127.0.0.1 or [::1], or start rrouter with the name "
                                "in RROUTER_ALLOWED_HOSTS", "Host is not this machine")
    if not all(map(_LOOPBACK_ORIGIN.fullmatch, head.fields.all(b"origin"))):
        raise RequestError(403, "requests from foreign web pages are refused (Origin)")
    if b"cross-site" in map(bytes.lower, head.fields.all(b"sec-fetch-site")):
        raise RequestError(403, "requests from foreign web pages are refused (Sec-Fetch-Site)")


def outbound_head(head: RequestHead, authority: bytes, base_path: bytes) -> tuple[bytes, bytes]:
    """Return the head to forward, in two parts: before and after the Content-Length value.

    Without a Content-Length the second part is empty.
    """
    target = head.target if head.target == b"*" else base_path + head.target
    fields, hosts = _HOST_LINE.subn(lambda line: line[1] + b" " + authority,
                                    b"".join(head.fields.end_to_end))
    if not hosts:                       # HTTP/1.0
        fields = b"Host: %b\r\n%b" % (authority, fields)
    fields = b"%b %b HTTP/1.1\r\n%b" % (head.method.encode("ascii"), target, fields)
    if head.length is None:             # chunked; the whole body is read before it is forwarded
        fields += b"Content-Length:\r\n"
    before, *rest = _LENGTH_LINE.split(fields, maxsplit=1)
    return (before + rest[0] + b" ", rest[1] + b"\r\n") if rest else (fields + b"\r\n", b"")


def parse_response_head(head: bytes) -> ResponseHead:
    """Return the parsed `head` of a response; raise UpstreamError if malformed or ambiguous."""
    match = _RESPONSE_HEAD.fullmatch(head)
    if not match:
        raise UpstreamError("sent a malformed response head")
    minor, status, reason, block = match.groups()
    http11 = minor == b"1"
    fields = _parse_fields(block, withheld=_WITHHELD)
    lengths, codings = fields.all(b"content-length"), fields.all(b"transfer-encoding")
    if codings and (lengths or not http11 or [c.lower() for c in codings] != [b"chunked"]):
        raise UpstreamError("sent a response with an ambiguous Transfer-Encoding")
    if lengths and (len(lengths) > 1 or not _NUMBER.fullmatch(lengths[0])):
        raise UpstreamError("sent a response with a malformed Content-Length")
    if status == b"101":
        raise UpstreamError("switched protocols unasked")
    return ResponseHead(
        int(status), reason or b"", fields, length=int(lengths[0]) if lengths else None,
        chunked=bool(codings), keep_alive=http11 and b"close" not in fields.options)


def read_windows(fields: Fields) -> dict[str, dict[str, Any]]:
    """Return the usage windows that a response reports, by name, as /health shows them."""
    windows = {}
    for name, (used, reset) in _WINDOWS.items():
        if used in fields.values:
            with contextlib.suppress(ValueError, OverflowError, OSError):   # unusable numbers
                windows[name] = {"usedPercent": round(100 * float(fields.value(used))),
                                 "until": utc(int(fields.value(reset)[:10]))}
    return windows


def response_head_bytes(head: ResponseHead, extra: bytes) -> bytes:
    """Return the head to forward: the upstream's end-to-end fields and the lines `extra`."""
    lines = head.fields.end_to_end
    if head.status < 200 or head.status == 204:         # RFC 9110 §8.6
        lines = _without(lines, (b"content-length",))
    return b"HTTP/1.1 %d %b\r\n%b%b\r\n" % (head.status, head.reason, b"".join(lines), extra)


# Messages: bodies #############################################################

class PlainBody:
    """Decodes a body of `length` bytes, or, with None, one that ends with its connection."""

    def __init__(self, length: int | None) -> None:
        self.delimited = length is not None     #: its end is marked
        self.left = 1 << 62 if length is None else length   #: bytes to come, of the body or a chunk
        self.done = length == 0
        self.rest = b""                 #: the bytes after the end
        self.fault = ""                 #: what broke the body; `finish` raises it

    def feed(self, data: bytes) -> bytes:
        """Return the payload in `data`."""
        if len(data) > self.left:
            data, self.rest = data[:self.left], data[self.left:]
        self.left -= len(data)
        self.done = not self.left
        return data

    def finish(self) -> None:
        """End the body where its connection ends; raise UpstreamError if truncated or faulty."""
        if self.delimited or self.fault:
            raise UpstreamError(self.fault or "broke off in the middle of its response")
        self.done = True


class ChunkedBody(PlainBody):
    """Decodes chunked transfer coding (RFC 9112 §7.1) strictly; drops extensions and trailers."""

    _SIZE = b"([0-9A-Fa-f]{1,%d})" % LENGTH_DIGITS_MAX
    _QUOTED = rb'"(?:[\t !\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*"'
    _EXTENSION = rb"[ \t]*;[ \t]*%b(?:[ \t]*=[ \t]*(?:%b|%b))?" % (_TOKEN, _TOKEN, _QUOTED)
    _SIZE_LINE = re.compile(rb"\r\n%b(?:(?=[^\r]{1,220}\r)(?:%b)+)?\r\n" % (_SIZE, _EXTENSION))
    _TRUNCATED_SIZE_LINE = re.compile(rb"\r?|\r\n(?:%b[^\r\n]*\r?)?" % _SIZE)

    def __init__(self) -> None:
        super().__init__(0)
        self.done = self._in_trailers = False
        # The incomplete size line or trailers.  A CR LF that was never sent makes the first size
        # line look like the others, which follow the CR LF of the chunk before.
        self._held = b"\r\n"

    def feed(self, data: bytes) -> bytes:
        """Return the payload in `data`, which may begin and end anywhere in the coding."""
        if self.left >= len(data):     # the middle of a large chunk
            self.left -= len(data)
            return data
        position = self.left           # where the current chunk ends
        payload = [data[:position]] if position else []
        self.left = 0
        data, self._held = self._held + data, b""
        while not self._in_trailers:
            size_line = self._SIZE_LINE.match(data, position)
            if not size_line:
                self._hold(data[position:], self._TRUNCATED_SIZE_LINE)
                return b"".join(payload)
            start, size = size_line.end(), int(size_line.group(1), 16)
            position = start + size
            self._in_trailers = not size
            payload.append(data[start:position])
            if position > len(data):
                self.left = position - len(data)
                return b"".join(payload)
        trailers = _TRAILERS.match(data, position)
        if trailers and trailers.end(1) - position <= TRAILERS_MAX_BYTES:
            self.done, self.rest = True, data[trailers.end():]
        else:
            self._hold(data[position:], _TRUNCATED_TRAILERS)
        return b"".join(payload)

    def _hold(self, data: bytes, truncated: re.Pattern[bytes]) -> None:
        """Keep `data` until more comes; set `fault` if it does not match `truncated`."""
        self._held = data
        if data == b"\r\n":              # the usual case: `feed` ended with a whole chunk
            return
        if len(data) > TRAILERS_MAX_BYTES or not truncated.fullmatch(data):
            self.fault = "sent a malformed chunk"


def response_body(head: ResponseHead, method: str) -> PlainBody:
    """Return the decoder for the body of a response to `method` (RFC 9112 §6.3)."""
    if method == "HEAD" or head.status in (204, 304):
        return PlainBody(0)
    return ChunkedBody() if head.chunked else PlainBody(head.length)


# Messages: JSON ###############################################################

_LEADING_MODEL = re.compile(
    rb'[ \t\n\r]*\{[ \t\n\r]*"model"[ \t\n\r]*:[ \t\n\r]*("[^"\\\x00-\x1f]*")[ \t\n\r]*[,}]')
_AGENT = re.compile(rb"oh-my-claudecode:([A-Za-z0-9_-]+)")
_STREAM_MEMBER = re.compile(rb'"stream"\s*:\s*true')
# Scans a value in C.  The hooks avoid numbers and objects that are never read, and the limit on the
# digits of an int.  int() raises ValueError for NaN, which is not JSON.
_DECODER = json.JSONDecoder(
    parse_int=len, parse_float=len, parse_constant=int, object_pairs_hook=len)
_BETWEEN_TOKENS = re.compile(r"[ \t\n\r]*[,:]?[ \t\n\r]*")


def _next_token(text: str, position: int) -> int:
    """Return where the next token begins, after white space and at most one comma or colon."""
    match = _BETWEEN_TOKENS.match(text, position)
    return match.end() if match else position


def _walk(text: str, position: int, opening: str) -> Iterator[tuple[str, int, int]]:
    """Yield (key, start, end) of each value in the object or array at `position` of valid JSON.

    `opening` is "{" for an object and "[" for an array, whose keys are ""; others raise ValueError.
    """
    if text[position] != opening:
        raise ValueError(f"expected {opening}")
    key, position = "", _next_token(text, position + 1)
    while text[position] not in "}]":
        if opening == "{":
            key, end = _DECODER.raw_decode(text, position)
            position = _next_token(text, end)
        _, end = _DECODER.raw_decode(text, position)
        yield key, position, end
        position = _next_token(text, end)


def _walk_body(body: BytesLike) -> tuple[str, Iterator[tuple[str, int, int]]]:
    """Return (text, what `_walk` yields for its top level); raise ValueError if it is not JSON."""
    text = str(body, "latin-1")         # one character for each byte
    _DECODER.decode(text)
    return text, _walk(text, _next_token(text, 0), "{")


def find_model(body: BytesLike) -> tuple[int, int, str] | None:
    """Return (start, end, name) of the top-level `model` string of a JSON object, or None.

    `start` and `end` are byte offsets, quotes included.  If `model` is the first member and plain,
    as Claude Code sends it, nothing after it is examined.  Otherwise the whole body must be JSON,
    and the first `model` counts, because CLIProxyAPI (gjson) reads the first as well.
    """
    leading = _LEADING_MODEL.match(body)
    try:
        if leading:                     # plain, so there is nothing to unescape
            return (*leading.span(1), str(leading[1][1:-1], "utf-8"))
        start, end = next(
            (start, end) for key, start, end in _walk_body(body)[1] if key == "model")
        name = json.loads(str(body[start:end], "utf-8"))
    except (ValueError, StopIteration, RecursionError):     # not JSON or UTF-8, or too deep
        return None
    return (start, end, name) if isinstance(name, str) else None


def find_agent(body: BytesLike) -> str:
    """Return the name after `oh-my-claudecode:` in the top-level `system`, "" without one."""
    # Most bodies lack the word and are not parsed.  In a message the word names no agent.
    with contextlib.suppress(ValueError, RecursionError):       # not JSON, or too deep
        for key, start, end in _walk_body(body)[1] if _AGENT.search(body) else ():
            if key == "system":
                found = _AGENT.search(body, start, end)
                return str(found.group(1), "ascii") if found else ""
    return ""


def asks_for_stream(body: BytesLike) -> bool:
    """Return whether `body` seems to ask for a stream, a guess that only timeouts depend on."""
    # The two ends first, because the small members stand there, before or after the messages.
    return any(map(_STREAM_MEMBER.search, (body[-2048:], body[:2048], body)))


def splice(body: BytesLike, start: int, end: int, model: str) -> list[BytesLike]:
    """Return `body` in pieces; the JSON string `model` replaces the bytes from `start` to `end`."""
    view = memoryview(body)             # because joining 10 MB would cost more than sending them
    return [view[:start], json.dumps(model).encode("ascii"), view[end:]]


def _items(text: str, members: Iterable[tuple[str, int, int]], name: str) -> list[tuple[int, int]]:
    """Return the spans of the items in the first member `name`, if that is an array."""
    for key, start, _ in members:
        if key == name:
            return [item[1:] for item in _walk(text, start, "[")] if text[start] == "[" else []
    return []


def _is_thinking(text: str, block: int) -> bool:
    """Return whether the value at `block` is an object of a thinking type."""
    members = _walk(text, block, "{") if text[block] == "{" else ()
    kind = next((text[start:end] for key, start, end in members if key == "type"), "null")
    return _DECODER.decode(kind) in ("thinking", "redacted_thinking")


def without_thinking(body: BytesLike) -> bytes | None:
    """Return `body` without its thinking blocks; None if it has none."""
    position, pieces = 0, []
    try:
        text, members = _walk_body(body)
        for message, _ in _items(text, members, "messages"):
            blocks = _items(text, _walk(text, message, "{"), "content")
            kept = [text[start:end] for start, end in blocks if not _is_thinking(text, start)]
            if len(kept) < len(blocks):
                empty = '{"type":"text","text":"(no content)"}'     # the API refuses []
                pieces += [text[position:blocks[0][0]], ",".join(kept) or empty]
                position = blocks[-1][1]        # the space between the blocks is lost, too
    except (ValueError, RecursionError):        # not JSON, or nested too deep
        return None
    return "".join([*pieces, text[position:]]).encode("latin-1") if pieces else None


# Messages: responses ##########################################################

# Searched in the body, because a hop on the way may drop `x-rrouter-error`.
_OWN_ERROR = re.compile(rb'"message"\s*:\s*"rrouter: ')
_RESET_AFTER = re.compile(
    rb"reset after (?:([0-9]{1,6})h)?(?:([0-9]{1,6})m)?(?:([0-9]{1,9})(?:\.[0-9]+)?s)?")


def read_failure(status: int, text: bytes) -> tuple[Fault, str]:
    """Return the fault in a response of `status` 400 and above, and what to call it."""
    if _OWN_ERROR.search(text):
        return Fault.OWN, str(status)
    text = text.lower().replace(b"`", b"")
    if status == 400 and any(all(word in text for word in row) for row in SIGNATURE_WORDINGS):
        return Fault.REJECTED, str(status)
    for statuses, words, name in SHELF_WORDINGS:
        if status in statuses and all(word in text for word in words):
            return Fault.SHELF, f"{status} {name}"
    if status == 413 or (status in (400, 422) and any(row in text for row in TOO_LARGE_WORDINGS)):
        return Fault.TOO_LARGE, f"{status} too large"
    return Fault.STATUS, str(status)


def read_retry_after(seconds: str, milliseconds: str, text: bytes, now: float) -> float | None:
    """Return the seconds after which a failed response asks for a retry, None if it does not ask.

    The parameters are the values of Retry-After and retry-after-ms, the body, and the time.
    """
    if re.fullmatch(r"[0-9]{1,12}(\.[0-9]+)?", milliseconds):
        return float(milliseconds) / 1000
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", seconds):
        return float(seconds)
    with contextlib.suppress(TypeError, ValueError, IndexError, OverflowError):
        date = email.utils.parsedate_to_datetime(seconds)   # Python 3.9 raises IndexError
        zone = date.tzinfo or datetime.timezone.utc
        return max(0.0, date.replace(tzinfo=zone).timestamp() - now)
    found = _RESET_AFTER.search(text)
    if found and any(found.groups()):
        hours, minutes, rest = (int(group or 0) for group in found.groups())
        return 3600.0 * hours + 60.0 * minutes + rest
    return None


def _is_content(block: Any) -> bool:
    """Return whether a content block is not an empty text block."""
    return not (isinstance(block, dict) and block.get("type") == "text" and not block.get("text"))


def _is_silent_failure(usage: Any, end: Any) -> bool:
    """Return whether an empty message is a failure: no tokens, and no reason to be silent."""
    tokens = usage.get("output_tokens") if isinstance(usage, dict) else None
    reason = end.get("stop_reason") if isinstance(end, dict) else None
    return tokens == 0 and reason not in ("refusal", "max_tokens")


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
    is_empty = not any(map(_is_content, blocks))
    return "empty message" if is_empty and _is_silent_failure(message.get("usage"), message) else ""


class StreamScan:
    """The state of an event stream, as far as it has arrived."""

    _BLANK_LINE = re.compile(rb"\r\n\r\n|\n\n|\r\r|\n\r\n")

    def __init__(self, is_message: bool) -> None:
        self._is_message = is_message
        self._partial = b""             # an event that is not complete yet
        self._size = 0                  # of the stream so far, in bytes
        # Set by the first content of a message, on other paths by the first event that is not an
        # error, and in any case after READ_AHEAD_MAX_BYTES.
        self.committed = False
        self.defect = ""                #: before that: an error, or an end without content
        self.broken = self.ended = False    #: after that: an error came; the message ended
        self.events = 0                 #: grows with each payload of more than pings

    def feed(self, payload: bytes) -> None:
        """Read more of the stream."""
        # Whole events with only content need no parsing; this test costs a tenth of it.
        if (self.committed and not self._partial and payload.endswith(b"\n\n")
                and payload.startswith(b"event: content_block_delta\n")
                and b"error" not in payload and b"message_stop" not in payload):
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
            self._partial = self._partial[:100]     # enough for the name of the event

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
        lines = [line for line in block.lstrip(b"\xef\xbb\xbf").splitlines()
                 if line and not line.startswith(b":")]
        names = [line[6:].strip() for line in lines if line.startswith(b"event:")]
        data = b"\n".join(line[5:].strip() for line in lines if line.startswith(b"data:"))
        if not names and not data:
            return                      # comments, or an id alone
        event = _load_object(data) or {}
        kind = event.get("type", names[-1].decode("latin-1") if names else "")
        is_error = kind == "error" or b"error" in names or event.get("error") is not None
        self.events += kind != "ping"
        if self.committed:
            self.broken = self.broken or is_error
            self.ended = self.ended or kind == "message_stop"
        elif is_error:
            self.defect = "error event"
        elif not self._is_message or kind == "content_block_delta":
            self.committed = True
        elif kind == "content_block_start":
            self.committed = _is_content(event.get("content_block"))
        elif kind == "message_delta" and not _is_silent_failure(
                event.get("usage"), event.get("delta")):
            self.committed = True       # the model may have nothing to say
        elif kind in ("message_delta", "message_stop") or data == b"[DONE]":
            self.defect = "empty message"


class TokenReader:
    """Reads the token counts near the beginning and the end of a response."""

    _END_BYTES, _USAGE_BYTES = 4096, 512    # more than an event with tokens, or its `usage`, takes
    # Quotes in a string would be escaped.  Later counts are sums and win, unless they are 0.
    _KINDS = b"input", b"cache_creation_input", b"cache_read_input", b"output"
    _COUNT = re.compile(rb'"(%b)_tokens"\s*:\s*([1-9][0-9]{0,11})[\s,}]' % b"|".join(_KINDS))

    def __init__(self, coding: str) -> None:
        self._gzip = zlib.decompressobj(zlib.MAX_WBITS | 16) if coding == "gzip" else None
        self._text = bytearray()        # both ends of the response, or all of it

    def feed(self, payload: bytes) -> None:
        """Read more of the response; encodings other than gzip show no tokens."""
        text, end, decoder = self._text, self._END_BYTES, self._gzip
        try:
            if decoder is not None:         # after its end it would keep all that follows
                payload = b"" if decoder.eof else decoder.decompress(payload, READ_AHEAD_MAX_BYTES)
            text += payload
        except zlib.error:                  # damaged, or an earlier payload was over the limit
            return
        if len(text) > 4 * end:         # not at each call, because this moves the end
            del text[end:-end]

    def note(self) -> str:
        """Return " in 1203+48211 out 512": uncached, from cache, out; "" if nothing is reported."""
        text, last = self._text, self._text.rfind(b'"usage"')
        counts: dict[bytes, bytes] = {}
        for start in (text.find(b'"usage"', 0, last), last):
            found = self._COUNT.findall(text[start:start + self._USAGE_BYTES])
            counts.update(reversed(found))          # the first wins: parts of a sum may follow it
        new, written, cached, out = [int(counts.get(kind, 0)) for kind in self._KINDS]
        return f" in {new + written}+{cached} out {out}" if counts else ""


# Failover #####################################################################

CLOSED, OPEN, HALF_OPEN = "closed", "open", "half-open"
OUTDATED = -1       # generation of a ticket whose failure no breaker counts

# Faults that can count (others are neutral), and faults after which the other target is tried.
COUNTED = frozenset((Fault.STATUS, Fault.SHELF, Fault.NO_MESSAGE, Fault.TIMEOUT))
RESCUED = COUNTED | {Fault.TOO_LARGE, Fault.REJECTED, Fault.DROPPED}
# Faults of one attempt that excuse a timeout of the other.
EXCUSES = frozenset((Fault.TIMEOUT, Fault.DROPPED, Fault.UNREACHABLE))

# Which of two failures helps the client more: the lower rank.
STATUS_RANK = {429: 1, 401: 2, 403: 2, 404: 3, 408: 4, 504: 5}      # other 4xx: 0; other 5xx: 4
FAULT_RANK: dict[Fault | None, int] = {Fault.SHELF: 6, Fault.NO_MESSAGE: 7}     # no response: 8


def rank(failure: Outcome, other: Outcome) -> int:
    """Return the rank of `failure`, given the `other` one; the lower, the more useful."""
    if failure.keeps_400:
        return 0
    fault, status = failure.fault, failure.status
    if fault is Fault.TOO_LARGE and other.fault in (Fault.STATUS, Fault.SHELF) and (
            other.status in (408, 429) or other.status >= 500):
        return 9    # the client would compact its conversation, although a retry may succeed
    if fault in (Fault.STATUS, Fault.REJECTED, Fault.TOO_LARGE):
        return STATUS_RANK.get(status, 0 if status < 500 else 4)
    return FAULT_RANK.get(fault, 8)


def judge(first: Outcome, second: Outcome) -> Verdict:
    """Return which failures of a request count, and which response the client gets.

    `first` failed; `second` is the attempt on the other target, or LEFT if the client left first.

      first         second          counts        the client gets
      failed        succeeded       the first     the second
      failed        client left     the first, if it timed out or took a minute
      failed        failed          neither       the more useful one
      timed out     failed          the first     the more useful one
      failed        timed out       the second    the more useful one

    A timeout does not count if the other fault is in EXCUSES; only faults in COUNTED count.
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


# The attributes of a Breaker that a restart keeps, and their types.
SAVED: dict[str, Callable[[Any], Any]] = {
    "home": str, "away": str, "answered": bool, "on_shelf": bool, "level": int,
    "switch_count": int, "last_cooldown_s": float, "returned_at": float,
    "reason": str, "switched_at": float, "retry_at": float}


# A breaker decides which of two targets serves one scope: the whole target, or one model on it.
#
#   state      event                                            next state   effect
#   any        success of the current target                    same         n = 0
#   any        its n-th failure in a row, n < limit             same         n counted
#   CLOSED     the same, n = limit                              OPEN         N-th cooldown begins
#   not CLOSED the same, n = limit                              CLOSED       cooldown cancelled
#   not CLOSED first success of away since the switch           same         N + 1, unless on_shelf
#   OPEN       a request asks, cooldown over                    HALF_OPEN    it probes home
#   HALF_OPEN  the probe commits                                CLOSED       recovered
#   HALF_OPEN  the probe fails                                  OPEN         N-th cooldown begins
#   HALF_OPEN  on_shelf, and the probe fails like the shelf     OPEN         next in a minute
#   HALF_OPEN  the probe is neutral                             OPEN         next in a minute
#   any        outcome of the target that does not serve;       same         none
#              failure of an attempt from before a switch,
#              or of an event that has counted
#
# Each change of the current target sets n = 0.  HTTP errors and timeouts count separately.  N,
# or `level`, starts over if no switch follows the return to home for twice the last cooldown.


class Move(str):
    """A line for the log about a scope that switches or recovers."""

    words: dict[str, str]       #: for auto.onSwitch


class Breaker:
    """Which of two targets serves one scope: `home` while closed, `away` while open.

    Methods take the time (Unix seconds, because the state outlives the process) and return lines
    for the log.  Not thread-safe: Failover holds the lock.
    """

    def __init__(self, auto: AutoSettings, serial: Iterator[int], model: str = "") -> None:
        self._auto = auto
        self._serial = serial           # shared, so that a ticket fits only one breaker
        self._label = f" for {printable(model)}" if model else ""
        self._counted_at: deque[float] = deque(maxlen=EVENTS_REMEMBERED)    # times of failures
        self.probe = 0                  # number of the latest probe
        self.level = 0                  # index of the next cooldown
        self.switch_count = 0
        self.last_cooldown_s = 0.0
        self.returned_at: float | None = None
        self.close(auto.targets)

    def close(self, targets: tuple[str, str]) -> None:
        """Start again on the first of `targets`; N and the number of switches stay."""
        self.home, self.away = targets
        self.state = CLOSED
        self.generation = next(self._serial)    # a new one with each change of `current`
        self.answered = True            # whether the target switched to has succeeded since
        self.on_shelf = False           # whether the shelf caused the switch
        self.shelf_said = ""            # the last failure that was logged while on_shelf
        self.reason: str | None = None
        self.switched_at: float | None = None
        self.retry_at: float | None = None
        self.start_counting()

    def start_counting(self) -> None:
        """Reset the counters of consecutive failures."""
        self.failures = self.timeouts = 0       # in a row, of `current`
        self.real_failure = ""          # the first one in the row that the shelf did not cause

    @property
    def order(self) -> tuple[str, str]:
        """Both targets, beginning with the one whose turn it is."""
        return (self.home, self.away) if self.state == CLOSED else (self.away, self.home)

    @property
    def current(self) -> str:
        """The target whose turn it is."""
        return self.order[0]

    def remaining_s(self, now: float) -> float:
        """Return the seconds until home may be probed; a clock set back cannot prolong them."""
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

    def is_probe(self, ticket: Ticket) -> bool:
        """Return whether the ticket belongs to the probe under way."""
        return self.state == HALF_OPEN and ticket.probe == self.probe

    def recover(self, now: float) -> list[str]:
        """Return to home, because a probe has committed or away has failed."""
        self.close((self.home, self.away))
        self.returned_at = now
        line = f"RECOVERED: {self.home} responds again{self._label}"
        return [self._move(self.home, "responds again", line=line)]

    def _move(self, to: str, reason: str, cooldown_s: float = 0, line: str = "") -> Move:
        start = self.away if to == self.home else self.home
        retry = f"; retry in {span(cooldown_s)}" if cooldown_s else ""
        move = Move(line or f"SWITCH {start} -> {to}{self._label}: {reason}{retry}")
        move.words = {"from": start, "to": to, "reason": reason,
                      "scope": self._label.removeprefix(" for ") or MODE_AUTO,
                      "minutes": str(tidy(round(cooldown_s / 60, 1)))}
        return move

    def succeed(self, ticket: Ticket) -> None:
        """Count a success of `ticket.target`."""
        if ticket.target == self.current:
            self.start_counting()
            self.level += self.state != CLOSED and not self.answered and not self.on_shelf
            self.answered = True

    def fail(self, now: float, ticket: Ticket, outcome: Outcome, followed: str = "") -> list[str]:
        """Count a failure of `ticket.target`; `followed` serves a model whose breaker closes."""
        if self.is_probe(ticket):
            return self._fail_probe(now, outcome)
        failed = f"{ticket.target} failed{self._label}: {outcome.what}"
        if ticket.generation != self.generation or ticket.target != self.current:
            return [failed]
        # Compares times of failure, because each is counted only after its rescue has ended.
        if any(outcome.began < at and abs(outcome.ended - at) <= EVENT_S
               for at in self._counted_at):
            return [failed + " (the same event)"]
        self._counted_at.append(outcome.ended)
        if outcome.fault is Fault.TIMEOUT:
            self.timeouts += 1
            count, limit, name = self.timeouts, self._auto.timeout_threshold, "timeouts"
        else:
            self.failures += 1
            count, limit, name = self.failures, self._auto.failure_threshold, "HTTP errors"
        if outcome.fault is not Fault.SHELF:
            self.real_failure = self.real_failure or outcome.what
        lines = [f"{failed} ({count} of {limit} {name} in a row)"]
        if count < limit or (outcome.direct and not self.answered):
            return lines                # home has just failed, and away has yet to succeed
        reason = f"{count} consecutive {name}"
        if outcome.fault is not Fault.TIMEOUT:
            reason += f", last {outcome.what}"
        if outcome.fault is Fault.SHELF and self.real_failure:
            reason += f", after {self.real_failure}"
        if self.state != CLOSED and followed == self.away:
            self.close(self.order)      # else it would stay on the target that has just failed
        if self.state == CLOSED:
            return lines + self._open(now, reason, outcome)
        self.recover(now)
        self.switch_count += 1
        return [*lines, self._move(self.home, reason)]

    def _open(self, now: float, reason: str, outcome: Outcome) -> list[str]:
        """Leave home, or stay away from it, for the next cooldown."""
        if self.returned_at is not None and now - self.returned_at >= 2 * self.last_cooldown_s:
            self.level = 0
        self.returned_at = None
        cooldown_s = self._auto.cooldowns_s[:self.level + 1][-1]
        shortest_s = min(cooldown_s, RECHECK_S)
        on_shelf = outcome.fault is Fault.SHELF
        if on_shelf:
            cooldown_s = shortest_s
        elif outcome.retry_after_s is not None:
            cooldown_s = min(cooldown_s, max(shortest_s, outcome.retry_after_s))
        if self.state == CLOSED:
            self.generation = next(self._serial)
        self.state, self.answered = OPEN, False
        self.on_shelf, self.shelf_said = on_shelf, outcome.what if on_shelf else ""
        self.start_counting()
        self.switch_count += 1
        self.reason, self.switched_at = reason, now
        self.retry_at, self.last_cooldown_s = now + cooldown_s, cooldown_s
        return [self._move(self.away, reason, cooldown_s)]

    def _fail_probe(self, now: float, outcome: Outcome) -> list[str]:
        still_on_shelf = outcome.fault is Fault.SHELF or (outcome.fault is Fault.STATUS and (
            outcome.status in (401, 403, 404) or outcome.status >= 500))
        if not (self.on_shelf and still_on_shelf):
            self._counted_at.append(outcome.ended)
            return self._open(now, f"failed a probe, last {outcome.what}", outcome)
        self._postpone_probe(now)
        if outcome.what == self.shelf_said:
            return []
        self.shelf_said = outcome.what
        return [f"PROBE of {self.home} failed{self._label}: {outcome.what}"]

    def _postpone_probe(self, now: float) -> None:
        self.state = OPEN
        self.retry_at = now + min(self.last_cooldown_s, RECHECK_S)

    def release(self, now: float) -> list[str]:
        """Free the place of the probe under way, because its outcome is neutral."""
        self._postpone_probe(now)
        if self.on_shelf:               # its start was not logged either
            return []
        return [f"PROBE of {self.home} inconclusive{self._label}; "
                f"the next one in {span(self.remaining_s(now))}"]

    def report(self, now: float) -> dict[str, Any]:
        """Return what /health shows of the scope."""
        is_open, remaining_s = self.state != CLOSED, self.remaining_s(now)
        return {"currentTarget": self.current, "switched": is_open,
                "switchCount": self.switch_count, "failureCount": self.failures,
                "timeoutCount": self.timeouts, "reason": self.reason,
                "switchedAt": utc(self.switched_at), "retryAt": utc(self.retry_at),
                "cooldownSeconds": tidy(round(self.last_cooldown_s, 3)) if is_open else 0,
                "cooldownRemainingSeconds": math.ceil(remaining_s)}

    def save(self, now: float) -> dict[str, Any]:
        """Return what a restart keeps; the counters and a probe under way are lost."""
        self.remaining_s(now)           # notices a clock set back even if no request comes
        return {name: getattr(self, name) for name in SAVED}

    def restore(self, saved: Any) -> None:
        """Take over what `save` returned; raise an error of any kind if it does not fit."""
        values: dict[str, Any] = {
            name: None if saved[name] is None else convert(saved[name])
            for name, convert in SAVED.items() if name in saved or name != "on_shelf"}
        absent = {name for name, value in values.items() if value is None} - {"returned_at"}
        if (absent not in (set(), {"reason", "switched_at", "retry_at"})
                or {values["home"], values["away"]} != set(self._auto.targets)
                or values["last_cooldown_s"] > max(self._auto.cooldowns_s)
                or not all(0 <= value < 1e11 for value in values.values()
                           if isinstance(value, (int, float)))):
            raise ValueError
        vars(self).update(values, reason=values["reason"] and printable(values["reason"]))
        self.state = CLOSED if absent else OPEN


def remember(known: OrderedDict[Any, T], key: Any, value: T) -> None:
    """Add the value as the newest of at most NAMES_REMEMBERED; any thread may call it."""
    known.pop(key, None)
    known[key] = value
    if len(known) > NAMES_REMEMBERED:
        known.popitem(last=False)


class Failover:
    """Whose turn it is in auto mode: one breaker for the whole target, one for each failing model.

    `clock` returns Unix seconds.  Any thread may call the methods; they return lines for the log.
    """

    def __init__(self, clock: Callable[[], float], auto: AutoSettings) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._serial = itertools.count(1)
        self._clear(auto)

    def _clear(self, auto: AutoSettings) -> None:
        self._auto, self._whole = auto, Breaker(auto, self._serial)
        self._models: OrderedDict[str, Breaker] = OrderedDict()
        # By session and model: the target used last, when, and since when it stays there.
        self._places: OrderedDict[tuple[str, str], tuple[str, float, float]] = OrderedDict()

    def reset(self, auto: AutoSettings, why: str) -> list[str]:
        """Forget everything, and continue with the settings `auto`."""
        with self._lock:
            used = any(breaker.switch_count or breaker.failures or breaker.timeouts
                       for breaker in (self._whole, *self._models.values()))
            self._clear(auto)
        return [f"RESET: {why}; on {auto.targets[0]}"] if used else []

    def admit(self, model: str, targets: tuple[str, str], session: str = "") -> Ticket:
        """Return the ticket for the first attempt of a request.

        `targets` are those of the request's snapshot.  If they have changed since, or the session
        stays away from the current target, a failure of the attempt is not counted.
        """
        with self._lock:
            if targets != self._auto.targets:
                return Ticket(targets[0], model, OUTDATED)
            breaker, now = self._breaker(model), self._clock()
            cached, sent_at, since = self._places.get((session, model), ("", 0.0, 0.0))
            if (cached != breaker.current and abs(now - sent_at) < self._auto.stay_s
                    and since >= max(now - STAY_MAX_S, breaker.returned_at or 0.0)):
                return self._sent(Ticket(cached, model, OUTDATED, session=session), now, since)
            target, probe = breaker.admit(now)
            return self._sent(
                Ticket(target, model, breaker.generation, probe, breaker.on_shelf, session), now)

    def _sent(self, ticket: Ticket, now: float, since: float = 0.0) -> Ticket:
        """Remember where the session sends its request, and `since` when it stays there."""
        if ticket.session and len(ticket.model) <= MODEL_NAME_MAX:
            remember(self._places, (ticket.session, ticket.model), (ticket.target, now, since))
        return ticket

    def rescue(self, ticket: Ticket, targets: tuple[str, str]) -> Ticket:
        """Return the ticket for the second attempt, on the other of `targets`."""
        other = targets[1] if ticket.target == targets[0] else targets[0]
        with self._lock:
            fits = targets == self._auto.targets
            generation = self._breaker(ticket.model).generation if fits else OUTDATED
            return self._sent(
                Ticket(other, ticket.model, generation, session=ticket.session), self._clock())

    def current(self, model: str | None, targets: tuple[str, str]) -> str:
        """Return the target, one of `targets`, for a request that is not judged."""
        with self._lock:
            current = self._breaker(model).current
            return current if current in targets else targets[0]

    def _breaker(self, model: str | None) -> Breaker:
        """Return the breaker that serves `model`: its own while it is switched alone."""
        own = self._models.get(model or "")
        return own if own is not None and own.state != CLOSED else self._whole

    def _probed(self, ticket: Ticket) -> Breaker | None:
        """Return the breaker for which this ticket probes, or None."""
        own = self._models.get(ticket.model)
        breaker = own if own is not None and own.is_probe(ticket) else self._whole
        return breaker if breaker.is_probe(ticket) else None

    def commit(self, ticket: Ticket) -> tuple[Ticket, list[str]]:
        """Let a probe succeed, because the client gets its response; return the renewed ticket."""
        with self._lock:
            breaker = self._probed(ticket)
            if breaker is None:
                return ticket, []
            now = self._clock()
            for (session, model), (target, sent_at, _) in self._places.items():
                if (session != ticket.session and target == breaker.away
                        and self._breaker(model) is breaker):
                    self._places[session, model] = target, sent_at, now
            lines = breaker.recover(now)
            if breaker is self._whole:
                self._follow()
            else:
                breaker.close(self._whole.order)
            generation = self._breaker(ticket.model).generation
            return ticket._replace(generation=generation, probe=0), lines

    def credit(self, ticket: Ticket) -> None:
        """Count a success: the upstream's response is complete."""
        with self._lock:
            self._whole.succeed(ticket)
            own = self._models.get(ticket.model)
            if own is not None:
                own.succeed(ticket)

    def charge(self, ticket: Ticket, outcome: Outcome) -> list[str]:
        """Count a failure.

        While a model is switched alone, its failures count for its own breaker only, because an
        exhausted model must not switch the others.
        """
        with self._lock:
            now, whole, own = self._clock(), self._whole, self._models.get(ticket.model)
            place = ticket.session, ticket.model
            if self._places.get(place, ("",))[0] == ticket.target:
                del self._places[place]         # a failure ends a stay
            if own is not None and own.state != CLOSED and not whole.is_probe(ticket):
                return own.fail(now, ticket, outcome, followed=whole.current)
            switches = whole.switch_count
            fresh = ticket.generation == whole.generation and ticket.target == whole.current
            lines = whole.fail(now, ticket, outcome)
            if whole.switch_count != switches:
                self._follow()
            elif fresh and len(ticket.model) <= MODEL_NAME_MAX:
                if own is None:
                    own = Breaker(self._auto, self._serial, ticket.model)
                    own.close(whole.order)
                remember(self._models, ticket.model, own)
                own.answered = whole.answered           # they are on the same target
                ticket = ticket._replace(generation=own.generation)
                own_lines = own.fail(now, ticket, outcome)
                is_repeated = own_lines[0].endswith(lines[0].partition(": ")[2])    # the same count
                lines += own_lines[is_repeated:]
            return lines

    def release(self, ticket: Ticket) -> list[str]:
        """Accept a neutral outcome: another request may probe."""
        with self._lock:
            breaker = self._probed(ticket)
            return breaker.release(self._clock()) if breaker is not None else []

    def _follow(self) -> None:
        """Let each model follow the whole target, with new counters, unless it stays switched."""
        targets = self._whole.order
        for own in self._models.values():
            if own.state == CLOSED or own.away == targets[0] == self._whole.home:
                own.close(targets)

    def report(self, active: bool) -> dict[str, Any]:
        """Return the `autoSwitch` object of /health."""
        with self._lock:
            now = self._clock()
            common = {"active": active, "targets": list(self._auto.targets),
                      "failureThreshold": self._auto.failure_threshold,
                      "timeoutThreshold": self._auto.timeout_threshold}
            models = {model: dict(common, **own.report(now))
                      for model, own in self._models.items() if own.state != CLOSED}
            return dict(common, **self._whole.report(now), models=models)

    def save(self) -> dict[str, Any]:
        """Return what state.json keeps."""
        with self._lock:
            now = self._clock()
            return {"whole": self._whole.save(now),
                    "models": {model: own.save(now) for model, own in self._models.items()
                               if own.state != CLOSED or own.level}}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what `save` returned; raise StateError, and change nothing, if it is unfit."""
        whole, models = Breaker(self._auto, self._serial), OrderedDict[str, Breaker]()
        try:                            # anyone may have written the file
            whole.restore(saved["whole"])
            if whole.home != self._auto.targets[0]:
                raise ValueError
            for model, own in itertools.islice(saved["models"].items(), NAMES_REMEMBERED):
                models[model] = Breaker(self._auto, self._serial, model)
                models[model].restore(own)
        except (LookupError, AttributeError, TypeError, ValueError, OverflowError) as error:
            raise StateError("not the state that rrouter wrote") from error
        with self._lock:
            self._whole, self._models = whole, models


def slow_failure(outcome: Outcome) -> str:
    """Return what to do about a failure that came late, "" if there is nothing to do."""
    took_s = outcome.ended - outcome.began
    if (outcome.fault not in (Fault.STATUS, Fault.SHELF) or took_s <= SLOW_FAILURE_S
            or (outcome.status < 500 and outcome.status not in (403, 408, 429))):
        return ""
    return (f"CLIProxyAPI waited {took_s:.0f} s before this {outcome.status}; "
            "set max-retry-interval: 8")


def failed_side(auto: dict[str, Any]) -> tuple[str, str, str]:
    """Return the target that was left, why (gave 3 HTTP errors in a row, last 429), and `429`."""
    failed = next(name for name in auto["targets"] if name != auto["currentTarget"])
    reason = auto["reason"] or ""
    why = re.sub(r"^(\d+) consecutive (HTTP errors|timeouts)", r"gave \1 \2 in a row", reason)
    return failed, why, printable(re.sub("^(.*last|[0-9]+ consecutive) |,.*", "", reason), 40)


def until_probe(auto: dict[str, Any]) -> str:
    """Return when the target that was left is probed: 23m, 59s, now."""
    left_s: int = auto["cooldownRemainingSeconds"]
    return f"{math.ceil(left_s / 60)}m" if left_s >= 60 else f"{left_s}s" if left_s else "now"


def counted(auto: dict[str, Any]) -> str:
    """Return the failures that count against the current target: 2 of 3 failures."""
    return ", ".join(f"{auto[kind + 'Count']} of {auto[kind + 'Threshold']} {kind}s"
                     for kind in ("failure", "timeout") if auto[kind + "Count"])


def describe_windows(windows: dict[str, Any]) -> Iterator[str]:
    """Yield usage windows in words and local time: 5h 83 % until 16:40."""
    for name, window in windows.items():
        when = datetime.datetime.fromisoformat(window["until"].replace("Z", "+00:00")).astimezone()
        clock = when.strftime("%H:%M" if name == "5h" else "%a %H:%M")
        yield f"{name} {window['usedPercent']} % until {clock}"


def status_line(health: dict[str, Any], last: list[str] | None = None) -> str:
    """Return /health in one line, or the models that a session asked for and got, and why."""
    auto, problems = health["autoSwitch"], len(health["problems"])
    scopes = {"auto": auto, **auto["models"]} if auto["active"] else {}
    rows = [(f"{printable(key, 40)} → {own['currentTarget']}", own) for key, own in scopes.items()]
    if last:
        asked, answered = (printable(model.removeprefix("claude-"), 40) for model in last[::2])
        rows = [(f"asked {asked}, answered {answered}", scopes.get(last[0], auto))]
    parts = [] if rows else [health["mode"]]
    for text, own in rows:
        if own["switched"] and scopes:
            failed, _, what = failed_side(own)
            text += f" ({failed} {what}, {until_probe(own)})"
        parts.append(text)
    target = last[1] if last else health["currentTarget"]
    parts += describe_windows(health["usageWindows"].get(target, {}))
    if problems:
        parts.append(f"{problems} problem{'s' * (problems > 1)}: rrouter status")
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
            raise DaemonError(f"{path}: " + (
                "a symbolic link that leads nowhere: remove it, or create its target"
                if os.path.islink(path) and not os.path.exists(path) else
                f"{reason_of(error)}: rrouter keeps its files there; set HOME to a directory you "
                "can write to")) from error


def remove_files(*paths: str) -> None:
    """Remove the files that exist and can be removed."""
    for path in paths:
        with contextlib.suppress(OSError):
            os.unlink(path)


def write_atomically(path: str, content: str | bytes, mode: int = 0o600) -> None:
    """Write `content` to `path`: a reader sees the whole new content or the whole old one.

    A symbolic link stays and its target is replaced.  Raises OSError.
    """
    path = os.path.realpath(path)
    temporary = f"{path}.{os.getpid()}.{threading.get_ident()}.tmp"
    try:
        with open(temporary, "wb", opener=partial(os.open, mode=0o600)) as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            if mode != 0o600:
                os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())     # else a crash may leave the new name with no content
        os.replace(temporary, path)
    finally:
        remove_files(temporary)         # there only if something failed


def spare_name(path: str) -> str:
    """Return PATH.bak-YYYYmmdd-HHMMSS, with a number added if that exists."""
    name = f"{path}.bak-{time.strftime('%Y%m%d-%H%M%S')}"
    return next(spare for spare in (name, *(f"{name}-{number}" for number in range(2, 1000)))
                if not os.path.lexists(spare))


def open_for_reading(path: str) -> BinaryIO:
    """Open a file to read its bytes, without waiting for a writer if it is a FIFO."""
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def read_file(path: str) -> bytes | None:
    """Return the bytes of a regular file, None if nothing is at `path`; else raise OSError."""
    try:
        file = open_for_reading(path)
    except FileNotFoundError:
        return None
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        content = file.read(FILE_MAX_BYTES + 1)
    if len(content) > FILE_MAX_BYTES:
        raise OSError(errno.EFBIG, f"larger than {FILE_MAX_BYTES} bytes", path)
    return content


def is_at(path: str, descriptor: int) -> bool:
    """Return whether the open file is still the one at `path`: others rotate and remove files."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    return False


def _signature(path: str) -> tuple[int, ...] | None:
    """Return a value that changes with each write of the file, None without a file.

    Compare it by equality, because `mv` and `git checkout` can bring an older time.  The last
    member, the ctime, changes even if a writer sets the mtime back.
    """
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino, status.st_ctime_ns


def _is_settled(signature: tuple[int, ...] | None) -> bool:
    """Return whether the next write of the file is sure to change its signature."""
    if signature is None:
        return True
    settled_s = SETTLED_S if signature[3] % 1_000_000_000 else SETTLED_COARSE_S
    return time.time() - signature[3] / 1e9 >= settled_s


def open_log(path: str) -> int:
    """Open the log file, without waiting for a reader if it is a FIFO; return its descriptor."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o600)


class Log:
    """The log file, rotated by size.  Any thread may add lines; the watcher writes them.

    A disk that hangs thus holds up no request.  `kill -9` can lose the lines of the last POLL_S.
    """

    HELD_MAX = 10_000       # lines; so many are held only while the disk hangs
    ECHO_S = 0.1            # how long a stderr that accepts nothing may hold up a flush

    def __init__(self, path: str, echo: bool):
        self._path, self._echo = path, echo
        self.problem: str | None = None
        self._lines: deque[bytes] = deque(maxlen=self.HELD_MAX)
        self._descriptor: int | None = None

    def write(self, tag: str, text: str) -> None:
        """Add one line; the caller has made text from outside printable."""
        now = datetime.datetime.fromtimestamp(time.time())
        if len(self._lines) == self.HELD_MAX:
            self.problem = "rrouter.log: the disk does not respond: log lines are lost"
        line = f"{now.isoformat(' ', 'milliseconds')} [{tag}] {text}\n"
        self._lines.append(line.encode("utf-8", "replace"))

    def flush(self) -> None:
        """Write the lines added so far; open the file unless it is open and at its path."""
        data = b"".join([self._lines.popleft() for _ in range(len(self._lines))])
        try:
            self._rotate_if_full(len(data))
            descriptor = self._descriptor
            if descriptor is None or not is_at(self._path, descriptor):
                descriptor = self._open()
            rest = data
            while rest:                 # one call usually writes all of it
                rest = rest[os.write(descriptor, rest):]
            if data:
                self.problem = None
        except OSError as error:
            problem = f"rrouter.log: {reason_of(error)}: log lines are lost"
            if not self.problem:        # /health shows it without the path, which names the user
                self._write_stderr(os.fsencode(f"rrouter: {problem} ({self._path})\n"))
            self.problem = problem
        if self._echo:
            self._write_stderr(data)

    def _write_stderr(self, data: bytes) -> None:
        """Write as much to stderr as it accepts: a terminal may be stopped, or a pipe full."""
        # A pipe that is ready accepts PIPE_BUF bytes without blocking.
        with contextlib.suppress(OSError):
            for start in range(0, len(data), select.PIPE_BUF):
                if not select.select([], [2], [], self.ECHO_S)[1]:
                    return
                os.write(2, data[start:start + select.PIPE_BUF])

    def _open(self) -> int:
        """Close the file that was open, if any, and open the one at the path."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        with contextlib.suppress(FileExistsError):          # not `makedirs`: HOME may be unmounted
            os.mkdir(os.path.dirname(self._path), 0o700)
        self._descriptor = open_log(self._path)
        if not self._echo:
            os.dup2(self._descriptor, 2)        # the daemon's stderr, where Python itself writes
        self.problem = None
        return self._descriptor

    def _rotate_if_full(self, coming: int) -> None:
        """Move the file away if the next `coming` bytes do not fit; keep it if that fails."""
        descriptor = self._descriptor
        with contextlib.suppress(OSError):
            if descriptor is None or os.fstat(descriptor).st_size + coming <= LOG_MAX_BYTES:
                return
            # Two processes may write the same file.  One of them rotates it; the other finds
            # another file at the path.  Closing the file in `_open` releases the lock.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_at(self._path, descriptor):
                for number in range(LOG_FILES - 1, 0, -1):
                    with contextlib.suppress(FileNotFoundError):
                        os.replace(f"{self._path}.{number}", f"{self._path}.{number + 1}")
                os.replace(self._path, f"{self._path}.1")


class Store:
    """The user's config and mode, always read together and never stale.

    `changed(old, new, mode_written)` is called, one call at a time, before any thread gets the new
    snapshot, also for the first one.
    """

    def __init__(self, paths: Paths, log: Log, changed: Callable[[Snapshot, Snapshot, bool], None]):
        self.paths, self._log, self._changed = paths, log, changed
        self._lock = threading.Lock()
        self.condition = threading.Condition()      #: the watcher waits on it between two rounds
        self._config = config_of(None)
        self._config_bytes: bytes | OSError | None = None   # or why they could not be read
        self._config_error: str | None = None
        self._word: str | None = None
        self._mode_error: str | None = None
        self._mode_signature: object = None
        self._current = Snapshot(self._config, "", ())
        self._seen: object = None       # the signatures of the files in `_current`

    def snapshot(self) -> Snapshot:
        """Return config and mode as they are now: every write before this call is in effect.

        It takes no lock unless a file has changed.  That is safe without the interpreter lock too,
        because `_reload` stores `_seen` last, and Python's attribute access is atomic (PEP 703).
        """
        if (_signature(self.paths.mode), _signature(self.paths.config)) == self._seen:
            return self._current
        with self._lock:
            return self._reload()

    def wake(self) -> None:
        """Let the watcher begin its next round at once."""
        with self.condition:
            self.condition.notify_all()

    def fingerprint(self) -> dict[str, Any]:
        """Return what ties a saved state to the mode file and to the `auto` section."""
        with self._lock:        # never between a new mode and the reset that it causes
            values = {"modeFile": self._mode_signature, "auto": self._current.config.auto}
        return dict(json.loads(json.dumps(values)))     # as state.json returns it: no tuples

    def _reload(self) -> Snapshot:
        """Read both files, after taking their signatures, and publish what they say."""
        seen = _signature(self.paths.mode), _signature(self.paths.config)
        old, old_signature = self._current, self._mode_signature
        self._read_config()
        self._read_mode(seen[0])
        new, written = self._compose(), self._mode_signature != old_signature
        if new.mode != old.mode:
            self._log.write("MODE", f"{old.mode and old.mode + ' -> '}{new.mode}")
        if written or new != old:
            self._changed(old, new, written)
        self._current = new
        # If a file could not be read or is not settled, the next request reads both again.
        readable = self._mode_error is None and not isinstance(self._config_bytes, OSError)
        self._seen = seen if readable and all(map(_is_settled, seen)) else None
        return new

    def _read_config(self) -> None:
        try:
            content = read_file(self.paths.config)
            if content == self._config_bytes:
                return
            self._config_bytes = content
            self._config, self._config_error = config_of(content), None
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
                self._log.write("CONFIG", f"{complaint}; the config in force stays")

    def _read_mode(self, signature: tuple[int, ...] | None) -> None:
        try:
            word = mode_word(read_file(self.paths.mode))
            self._mode_error = None
        except OSError as error:
            word, self._mode_error = "", f"mode: {reason_of(error)}: the mode in force stays"
        if word != "":                  # else it is unreadable or just being written
            self._word = word
            # Without the ctime, which chmod changes as well.
            self._mode_signature = signature and signature[:3]

    def _compose(self) -> Snapshot:
        config, word = self._config, self._word
        mode = config.resolve(word if word is not None else config.default_mode)
        problems = [self._config_error, *(f"config.json: {problem}" for problem in config.problems),
                    self._mode_error]
        if word not in (None, mode):
            problems.append(
                f"config.json: {config.auto_error}" if word == MODE_AUTO else
                f"mode: {describe_unknown_mode(word, config.choices)}; {mode} is in force")
        return Snapshot(config, mode, tuple(dict.fromkeys(filter(None, problems))))


class StateFile:
    """state.json: the state of auto mode, kept across restarts.  Only the watcher writes it."""

    def __init__(self, path: str):
        self._path = path
        self.saved: dict[str, Any] | None = None    #: the last state written; None: write the next
        self.problem: str | None = None             #: why the last state could not be written

    def load(self, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
        """Return the state saved with this `fingerprint`, None without a file; raise StateError."""
        try:
            state: dict[str, Any] | None = json.loads(read_file(self._path) or b"null")
            if state is None:
                return None
            if state["version"] != 1:
                raise ValueError
        except OSError as error:
            raise StateError(reason_of(error)) from error
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            raise StateError("not written by this version of rrouter") from error
        for name, what in (("modeFile", "the mode file"), ("auto", "the auto section")):
            if state.get(name) != fingerprint[name]:
                raise StateError(f"{what} was written since")
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Write the state unless the file holds it already."""
        if state == self.saved:
            return
        try:
            write_atomically(self._path, json.dumps({"version": 1, **state}, indent=1) + "\n")
            self.saved, self.problem = state, None
        except OSError as error:
            self.problem = (f"state.json: cannot be written: {reason_of(error)}: "
                            "a restart forgets the cooldowns")


# Resources ####################################################################

# Each part of this section saves processor time or memory and does nothing else.  Without it:
#
#   RememberedHead         a request of 1 KB takes 353 us instead of 257
#   OneCore                32 busy connections get 0.6 of the requests/s
#   use_one_heap           46 MB stay resident after load instead of 18
#   return_free_memory     50 streams of a minute leave up to 45 MB
#   outlive_main_script    39 MB are resident when idle instead of 25

_ONE_LENGTH = re.compile(b"(?i)\r\nContent-Length:[ ]?(%b)\r\n" % _NUMBER.pattern)


class RememberedHead:
    """The last request head of a connection: the next often differs only in its Content-Length."""

    def __init__(self) -> None:
        self._before = self._after = b""    # the bytes before and after the Content-Length value
        self._head: RequestHead | None = None

    def remember(self, data: bytes, head: RequestHead) -> None:
        """Keep `head`, which was parsed from `data`."""
        number = _ONE_LENGTH.search(data)
        begin, end = number.span(1) if number else (len(data), len(data))
        self._before, self._after, self._head = data[:begin], data[end:], head

    def match(self, data: bytes) -> tuple[RequestHead, int] | None:
        """Return (head, its size in bytes) if `data` begins with the same head, else None."""
        head, end = self._head, len(self._before)
        if head is None or not data.startswith(self._before):
            return None
        if not self._after:
            return head, end
        number = _NUMBER.match(data, end)
        if (not number or not data.startswith(self._after, number.end())
                or int(number.group()) > BODY_MAX_BYTES):
            return None
        return head._replace(length=int(number.group())), number.end() + len(self._after)


class OneCore:
    """Keeps the threads of the connections on one core of Linux while they have much to do.

    Passing the interpreter lock from core to core takes longer than most of the work done under it.
    When there is little to do, any free core is better.
    """

    REQUESTS, BUSY = 8, 0.2     # requests under way and share of a core in use that make it pay

    def __init__(self) -> None:
        self._shared = False            # the threads keep to one core
        self._seen = 0.0, 0.0

    def look(self, active: int, threads: list[int], now: float, used_s: float) -> None:
        """Decide again, with `active` requests under way; must not run in one of `threads`.

        `threads` are native ids, `now` is time.monotonic, `used_s` is the processor time in user
        mode: the kernel does not need the interpreter lock.
        """
        period_s, busy_s = now - self._seen[0], used_s - self._seen[1]
        if period_s < POLL_S / 2 or not hasattr(os, "sched_setaffinity"):
            return                      # a short time proves nothing
        was_shared, self._seen = self._shared, (now, used_s)
        self._shared = min(active, len(threads)) >= self.REQUESTS and busy_s >= self.BUSY * period_s
        if self._shared or was_shared:
            with contextlib.suppress(OSError):          # a sandbox may forbid it, or hide /proc
                cores = os.sched_getaffinity(0)         # read again: the user may change it
                if self._shared:        # where one ran last, because the kernel prefers fast cores
                    status = read_file(f"/proc/self/task/{threads[0]}/stat") or b""
                    core = status.rpartition(b")")[2].split()[36:37]
                    cores = cores.intersection(map(int, core)) or cores
                for thread in threads:
                    with contextlib.suppress(OSError):  # the thread has ended
                        os.sched_setaffinity(thread, cores)


def _ask_libc(function: str, *arguments: int) -> None:
    """Call a function of glibc; do nothing on other systems."""
    with contextlib.suppress(ImportError, OSError, AttributeError, MemoryError):
        import ctypes
        getattr(ctypes.CDLL(None), function)(*arguments)


# Make glibc use one malloc arena (M_ARENA_MAX), because it never returns the free end of the
# others.  Called before there are threads, because each may get an arena at its start.
use_one_heap = partial(_ask_libc, "mallopt", -8, 1)
# Return to the system what Python has freed and the C library keeps.
return_free_memory = partial(_ask_libc, "malloc_trim", 0)


def outlive_main_script(run: Callable[[], None]) -> None:
    """Call `run` in a thread that outlives the main script, whose syntax tree takes 13 MB."""
    if (3, 12) <= sys.version_info < (3, 12, 2):    # no new threads at exit (gh-113964)
        run()
    else:
        threading.Thread(target=run).start()


# Upstream #####################################################################

# The option that ends a connection after 120 s without acknowledgement, because Linux waits for 15
# minutes.  It also ends one whose peer is alive but has not read anything for that long.
UNACKNOWLEDGED = ((0x80, 120) if sys.platform == "darwin" else      # RXT_CONNDROPTIME
                  (getattr(socket, "TCP_USER_TIMEOUT", None), 120_000))
# As a number, because `|` on the standard library's flags takes 5 us.
PEEK_NOW = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)
NOTHING_CAME = (BlockingIOError, socket.timeout)        # within the socket's time limit


class Watch:
    """Ends a request's wait for the upstream: when the client leaves, or at a time limit.

    With `awaits_start` it also waits for an upstream that is away, because that may be restarting.
    """

    def __init__(self, has_left: Callable[[], bool], awaits_start: bool) -> None:
        self._has_left = has_left
        self._looked_at = self._checked_at = time.monotonic()
        self._limit_s: float | None = None
        self._deadline: float | None = None
        self.give_up_at = math.inf if awaits_start else 0.0     #: while the upstream is away

    def limit(self, seconds: float | None) -> None:
        """Set the time limit, which begins with `start`; None for none."""
        self._limit_s, self._deadline = seconds, None

    def start(self) -> None:
        """Let the time limit begin unless it has begun."""
        if self._limit_s is not None and self._deadline is None:
            self._checked_at = time.monotonic()
            self._deadline = self._checked_at + self._limit_s

    def check(self, has_input: Callable[[], bool] | None = None) -> float:
        """Return the seconds until the next check is due; raise ClientGone or UpstreamTimeout.

        The limit does not expire while the process is stopped, nor while there is input to read.
        """
        now = time.monotonic()
        if now - self._looked_at >= TICK_S * 0.9:
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

    def wait_to_reconnect(self) -> bool:
        """Wait before the next try to connect; return False if it is time to give up."""
        now = time.monotonic()
        self.give_up_at = min(self.give_up_at, now + RECONNECT_FOR_S)
        if now + RECONNECT_EVERY_S > self.give_up_at:
            return False
        time.sleep(RECONNECT_EVERY_S)
        if self._has_left():
            raise ClientGone()
        return True


def is_loopback(address: str) -> bool:
    """Return whether a numeric address is a loopback address."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def set_kernel_limit(sock: socket.socket, option: int, seconds: float) -> None:
    """Set SO_RCVTIMEO or SO_SNDTIMEO; raise OSError."""
    time_value = int(seconds), int(seconds % 1 * 1e6)
    try:
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", *time_value))
    except OSError:
        # A 32-bit system with 64-bit times.  Not tried first: 32-bit x86 accepts and misreads it.
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@qq", *time_value))


class Wire:
    """One end of a connection: its socket, and the bytes received but not yet used."""

    def __init__(self, sock: socket.socket, receive_bytes: int) -> None:
        self.sock = sock
        self.held: bytes | memoryview = b""
        self._receive_bytes = receive_bytes
        # The time limits of a plain socket are the kernel's, because `settimeout` costs a poll
        # before each call; a TLS socket would retry on their EAGAIN.
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
        """Let `receive` raise one of NOTHING_CAME after `seconds` without a byte."""
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
    """A connection to the upstream, opened by `http.client`."""

    # Our parser reads the responses, because `http.client` takes a truncated head for a 200 with an
    # empty body, and ends a truncated body as if it were whole (python/cpython#115997).
    def __init__(self, connection: http.client.HTTPConnection) -> None:
        super().__init__(connection.sock, RECEIVE_BYTES)
        self._poller = select.poll()
        self._sent_at: float | None = None      # when the last byte was sent; None: sending failed
        self.rest()

    def set_up(self, send_limit_s: float) -> None:
        """Set the socket's options; raise OSError if it is closed already."""
        super().set_up(send_limit_s)
        self._poller.register(self.sock, select.POLLIN)
        option, value = UNACKNOWLEDGED
        if option is not None and not is_loopback(self.sock.getpeername()[0]):
            with contextlib.suppress(OSError):          # a system that imitates Linux
                self.sock.setsockopt(socket.IPPROTO_TCP, option, value)
        if isinstance(self.sock, ssl.SSLSocket):    # an end without close_notify is a truncation
            setattr(self.sock, "suppress_ragged_eofs", False)   # noqa: B010 - typeshed lacks it

    def has_input(self) -> bool:
        """Return whether there is something to read, or the end; for open connections only."""
        if self._plain:
            return bool(self._poller.poll(0))
        # TLS: session tickets arrive unrequested, and only reading shows that they are not data.
        self.limit(0)
        try:
            self.held = bytes(self.held) + self.sock.recv(RECEIVE_BYTES)
            return True
        except OSError as error:
            return not isinstance(error, ssl.SSLWantReadError)

    def send(self, pieces: Sequence[BytesLike], watch: Watch) -> list[memoryview]:
        """Send `pieces`; return what is left if the upstream responds or closes early."""
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
        """Be idle until the next request."""
        self._responding = False        # no byte of its response has come
        self._idle_since = time.time()      # because time.monotonic stops while systems sleep

    @property
    def is_old(self) -> bool:
        """True if it has been idle for too long, or if the clock was set back since."""
        return abs(time.time() - self._idle_since) >= POOL_IDLE_S

    @property
    def was_stale(self) -> bool:
        """True if its break suggests that it was dead before the request."""
        return not self._responding and (
            self._sent_at is None or time.monotonic() - self._sent_at < STALE_S)

    def wait(self, watch: Watch) -> bytes:
        """Return the next bytes, b"" at the end; raise what `watch` raises, or UpstreamError."""
        if self.held:
            return self.receive()
        while True:
            self.limit(watch.check(self.has_input))
            try:
                return self.receive()
            except OSError as error:            # ETIMEDOUT: the network's limit, not ours
                if not isinstance(error, NOTHING_CAME) or error.errno == errno.ETIMEDOUT:
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


class Response:
    """A response of the upstream: its head, and its body as it comes.

    `ahead` is payload that was read before it was known whether the client gets this response.
    `release` takes the connection when the body is complete and another request may use it.
    """

    CODINGS = ("", "gzip", "deflate")       #: the content encodings that `text` understands

    def __init__(self, head: ResponseHead, body: PlainBody, connection: UpstreamConnection,
                 release: Callable[[UpstreamConnection], None] | None) -> None:
        self.head, self.ahead = head, b""
        self._body, self._connection, self._release = body, connection, release

    @property
    def complete(self) -> bool:
        """True when the whole body has been received."""
        return self._body.done

    def hand_back(self) -> None:
        """Return the connection to the pool, or close it, if the body is complete."""
        body, connection = self._body, self._connection
        if body.done:
            is_clean = not (body.rest or connection.held) and body.delimited
            if self._release is not None and self.head.keep_alive and is_clean:
                self._release(connection)
            else:
                connection.close()

    def take_held(self) -> None:
        """Add to `ahead` the payload that came together with the head, without waiting for more."""
        if self._connection.held and not self._body.done:
            self.ahead += self._body.feed(self._connection.receive())
            if self._body.fault and not self.ahead:
                self._body.finish()
            self.hand_back()

    def receive(self, watch: Watch) -> bytes:
        """Return the next payload; b"" may come with `complete`.  Raises what `wait` raises."""
        payload, body = b"", self._body
        while not payload and not body.done:
            data = b"" if body.fault else self._connection.wait(watch)
            if data:
                payload = body.feed(data)
            else:
                body.finish()
            self.hand_back()
        return payload

    def text(self) -> bytes:
        """Return `ahead`, decompressed, but at most READ_AHEAD_MAX_BYTES and one byte more."""
        if self.head.coding not in ("gzip", "deflate"):
            return self.ahead
        text, members = b"", 0
        for format_bits in (zlib.MAX_WBITS | 32, -zlib.MAX_WBITS):  # with a header, or without
            data = b"" if text else self.ahead
            with contextlib.suppress(zlib.error):
                # gzip may have several members; each one copies the rest, so few are read.
                while data and len(text) <= READ_AHEAD_MAX_BYTES and members < GZIP_MEMBERS_MAX:
                    members += 1
                    decoder = zlib.decompressobj(format_bits)
                    text += decoder.decompress(data, READ_AHEAD_MAX_BYTES + 1 - len(text))
                    data = decoder.unused_data
        return text

    def read_ahead(self, watch: Watch) -> None:
        """Receive into `ahead` to the end, or as much as is held back.

        A body that breaks off or stalls is kept as far as it came; `receive` reports the break.
        """
        try:
            while not self.complete and len(self.ahead) <= READ_AHEAD_MAX_BYTES:
                self.ahead += self.receive(watch)
        except UpstreamTimeout:
            pass
        except UpstreamError as error:
            self._body.fault = str(error)

    def close(self) -> None:
        """Close the connection unless the response is complete."""
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
        self._kept: deque[UpstreamConnection] = deque()     # last in, first out: idle ones age
        self._tls: ssl.SSLContext | None = None     # made at the first connection
        self._missed_at: float | None = None    # when a request last failed to reach it

    def send(self, method: str, pieces: Sequence[BytesLike],
             interim: Callable[[bytes], None] | None, watch: Watch, notes: list[str]) -> Response:
        """Send a request and return the response, its head read; raise UpstreamError, ClientGone.

        `interim` is called with each 1xx head.  A request goes out a second time, and `notes` says
        so, only if the kept connection was stale: sending failed, or it closed within a second,
        before any byte of a response.  RFC 9110 §9.2.2 leaves that to the client for POST; model
        calls change nothing, and the client would do the same after an error.
        """
        kept = self._take()
        while True:
            try:
                return self._send_on(kept or self.connect(), method, pieces, interim, watch)
            except UpstreamUnreachable:
                if not watch.wait_to_reconnect():
                    raise
            except UpstreamError as error:
                if kept is None or isinstance(error, UpstreamTimeout) or not kept.was_stale:
                    raise
                notes.append("sent again: the kept connection was stale")
                kept = None

    def _send_on(self, connection: UpstreamConnection, method: str, pieces: Sequence[BytesLike],
                 interim: Callable[[bytes], None] | None, watch: Watch) -> Response:
        watch.start()
        try:
            unsent = connection.send(pieces, watch)
            head = connection.read_head(watch)
            while head.status < 200:
                if interim is not None and head.status != 100:      # rrouter sent its own
                    interim(response_head_bytes(head, b""))
                unsent = connection.send(unsent, watch) if unsent else []
                head = connection.read_head(watch)
        except BaseException:
            connection.close()
            raise
        self._missed_at = None
        watch.give_up_at = 0.0              # the upstream responds
        # After a request not sent in full the next one would be taken for the rest of it.
        response = Response(head, response_body(head, method), connection,
                            None if unsent else self.keep)
        response.hand_back()
        return response

    def miss(self, started: float) -> bool:
        """Note that a request, begun at `started` (time.monotonic), did not reach the upstream.

        Returns whether the one before it missed as well; parallel requests count as one.
        """
        before, self._missed_at = self._missed_at, time.monotonic()
        return before is not None and before <= started

    def connect(self) -> UpstreamConnection:
        """Return a new connection; raise UpstreamUnreachable."""
        connection = UpstreamConnection(self.open())
        try:
            connection.set_up(TICK_S)
            if not self._is_own_address(connection.sock):
                return connection
        except OSError as error:            # reset as soon as it was accepted
            connection.close()
            raise UpstreamError(f"broke the connection: {reason_of(error)}") from error
        connection.close()
        raise UpstreamUnreachable("is rrouter itself")

    def open(self) -> http.client.HTTPConnection:
        """Return a new connection of the standard library; raise UpstreamUnreachable."""
        if self._is_tls and self._tls is None:
            context = ssl.create_default_context()
            # Python 3.9 sets it, and would take a truncated response for a whole one.
            context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
            self._tls = context
        kind = (partial(http.client.HTTPSConnection, context=self._tls) if self._is_tls else
                http.client.HTTPConnection)
        connection = kind(self._host, self._port, timeout=CONNECT_S)
        connection.auto_open = 0            # it must not connect again by itself
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            raise UpstreamUnreachable(f"cannot be reached: {reason_of(error)}") from error
        return connection

    def _take(self) -> UpstreamConnection | None:
        """Return a kept connection that seems alive, or None."""
        with contextlib.suppress(IndexError):
            while True:
                connection = self._kept.pop()
                if not connection.is_old and not connection.has_input():
                    return connection
                connection.close()
        return None

    def keep(self, connection: UpstreamConnection) -> None:
        """Keep a connection whose response is complete."""
        connection.rest()
        self._kept.append(connection)
        self.prune()

    def prune(self) -> None:
        """Close surplus connections and those that have been idle for too long."""
        with contextlib.suppress(IndexError):
            while len(self._kept) > POOL_MAX or self._kept[0].is_old:
                self._kept.popleft().close()


# Proxy ########################################################################

CLOSE = b"Connection: close\r\n"


class ClientConnection(Wire):
    """A client's connection: it reads whole requests, strictly framed, and sends responses."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock, REQUEST_BYTES)
        self._last_head = RememberedHead()
        self._asks_head = False         # HEAD: no response has a body, not even a refusal
        self._read_shut = False         # by `stop_reading`: an end of file proves nothing
        self.busy = False               #: a request is under way
        self.thread = threading.get_native_id()     #: the one that serves it

    # ---- Reading

    def read_head(self, idle_s: float) -> RequestHead | None:
        """Return the head of the next request.

        None if the client closes, or sends nothing for `idle_s` seconds, before a request begins.
        """
        data, self.held = bytes(self.held), b""
        self.busy = self._asks_head = False
        deadline, seen = 0.0, 0
        while True:
            if data.startswith(b"\r\n"):        # RFC 9112 §2.2: ignored before a request
                data, seen = data[2:], 0
            if data not in (b"", b"\r"):
                self.busy = True
                head = self._find_head(data, seen)
                if head is not None:
                    return head
                deadline = deadline or time.monotonic() + HEAD_S
            left_s = max(0.001, deadline - time.monotonic()) if deadline else idle_s
            more = self._receive(left_s, self.receive)
            if deadline and (more is None or time.monotonic() > deadline):
                raise RequestError(408, f"request head not complete within {HEAD_S:.0f} s")
            if not more:
                return None
            seen = len(data)
            data += more

    def _find_head(self, data: bytes, seen: int) -> RequestHead | None:
        """Return the head that starts `data`, None if truncated; `seen` bytes are searched."""
        self._asks_head = data.startswith(b"HEAD ")
        known = self._last_head.match(data)
        if known is not None:
            head, size = known
            self.held = memoryview(data)[size:]
            return head
        end = data.find(b"\r\n\r\n", max(0, seen - 3)) + 4
        if (end if end >= 4 else len(data)) > HEAD_MAX_BYTES:
            raise RequestError(431 if b"\r\n" in data[:HEAD_MAX_BYTES] else 414,
                               f"request head over {HEAD_MAX_BYTES >> 10} KiB")
        if end < 4:
            check_head_start(data, max(0, seen - 3))
            return None
        self.held = data[end:]
        head = parse_request_head(data[:end])
        self._last_head.remember(data[:end], head)
        return head

    def _receive(self, limit_s: float, receive: Callable[[], T]) -> T | None:
        """Return what `receive` returns, None if nothing came in time; raise ClientGone."""
        try:
            self.limit(limit_s)
            return receive()
        except NOTHING_CAME:
            return None
        except OSError as error:
            raise ClientGone() from error

    def _receive_body(self, receive: Callable[[], T]) -> T:
        received = self._receive(BODY_STALL_S, receive)
        if received is None:
            raise RequestError(408, f"request body without progress for {BODY_STALL_S:.0f} s")
        if not received:
            raise ClientGone()
        return received

    def read_body(self, head: RequestHead) -> BytesLike:
        """Return the whole body of the request; raise RequestError, ClientGone."""
        length, have = head.length, len(self.held)
        if head.expects_continue and length != 0 and not have:
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if length is None:
            return self._read_chunks()
        if length <= have:
            whole, self.held = self.held[:length], bytes(self.held[length:])
            return whole
        # Memory follows the bytes received, not the length claimed: a part first, then doubled.
        size = length
        while size > max(have, BODY_STEP_BYTES):
            size = (size + 1) // 2
        body = bytearray(size)
        body[:have], self.held = self.held, b""
        while have < length:
            if have == len(body):
                body *= 2
            with memoryview(body) as view:
                have += self._receive_body(partial(self.sock.recv_into, view[have:length]))
        del body[length:]
        return body

    def _read_chunks(self) -> BytesLike:
        body, decoder = bytearray(), ChunkedBody()
        try:
            while not decoder.done:
                body += decoder.feed(self._receive_body(self.receive))
                if decoder.fault:
                    decoder.finish()
                if len(body) + decoder.left > BODY_MAX_BYTES:
                    raise RequestError(413, f"body over the limit of {BODY_MAX_BYTES >> 20} MiB")
        except UpstreamError as error:
            raise RequestError(400, f"malformed request body: the client {error}") from error
        self.held = decoder.rest
        return body

    def has_left(self) -> bool:
        """Return whether the client has closed its connection.

        A half-closed one counts as gone, as with Go and HAProxy (abortonclose).  A byte that the
        client sent before it left, the next request perhaps, hides the end from `recv`, but not
        from `poll`.
        """
        if self._read_shut:
            return False
        poller = select.poll()          # `select` fails with descriptors over 1023
        poller.register(self.sock, getattr(select, "POLLRDHUP", 0))
        try:
            return not self.sock.recv(1, PEEK_NOW) or bool(poller.poll(0))
        except BlockingIOError:
            return False
        except OSError:
            return True

    def stop_reading(self, cut_off: bool) -> None:
        """End a wait for the next request; called from another thread.

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
        """Send a whole response made by rrouter."""
        date = email.utils.formatdate(time.time(), usegmt=True)
        self.send(b"HTTP/1.1 %d %b\r\nDate: %b\r\nContent-Type: %b\r\n"
                  b"Content-Length: %d\r\n%b\r\n%b" % (
                      status, http.client.responses.get(status, "Error").encode("ascii"),
                      date.encode("ascii"), content_type, len(body), fields,
                      b"" if self._asks_head else body))

    def send_error(self, error: RouterError, fields: bytes) -> None:
        """Send an error made by rrouter, in Anthropic's shape."""
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


class ResponseWriter:
    """One response on its way to the client: the upstream's head, our fields, framed payload.

    A body that ends with the upstream's connection is sent in chunks, so that the client sees
    whether it is whole.
    """

    def __init__(self, client: ClientConnection, request: RequestHead, head: ResponseHead,
                 fields: bytes) -> None:
        self._client = client
        is_unbounded = (head.length is None and head.status not in (204, 304)
                        and request.method != "HEAD")
        self._is_chunked = is_unbounded and request.http11
        self._ends_with_connection = is_unbounded and not request.http11
        if self._is_chunked:
            fields += b"Transfer-Encoding: chunked\r\n"
        self._pending = response_head_bytes(head, fields)   # goes out with the first payload

    def send(self, payload: bytes, is_last: bool) -> None:
        """Send payload; `is_last` ends the response.  Raises ClientGone."""
        if self._is_chunked:
            if payload:
                payload = b"%x\r\n%b\r\n" % (len(payload), payload)
            if is_last:
                payload += b"0\r\n\r\n"
        if self._pending:
            payload, self._pending = self._pending + payload, b""
        self._client.send(payload)

    def break_off(self) -> None:
        """Close the connection, so that what was sent cannot pass for the whole.

        Where neither a length nor chunks show the end, only a reset does.  It may drop bytes still
        on their way, so the other responses are spared it.
        """
        if self._ends_with_connection:
            with contextlib.suppress(OSError):
                self._client.sock.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._client.close()


class Request(NamedTuple):
    """One request, received in full, and the client that waits for its response."""

    client: ClientConnection
    head: RequestHead
    outbound: tuple[bytes, bytes]       #: the head to forward, see `outbound_head`
    body: BytesLike
    found: tuple[int, int, str] | None      #: where its model name stands, and the name
    watch: Watch                        #: what ends its waiting for the upstream

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

    def sender(self, conditions: Collection[str]) -> tuple[str, str]:
        """Return the agent and the class, as far as rules with these conditions need them."""
        agent = self.head.fields.value(b"x-claude-code-agent-type")
        if "agent" in conditions and agent in ("", "custom"):       # "custom": any plugin's agent
            agent = find_agent(self.body).lower() or agent
        return agent, self.head.fields.value(b"x-claude-code-request-class")


FAULT_OF_ERROR = {UpstreamTimeout: Fault.TIMEOUT, UpstreamUnreachable: Fault.UNREACHABLE}


class Attempt:
    """One try of a request on one target: a response, or the error that replaces it.

    Without a ticket it is not judged: it has no time limit and holds nothing back except a 400,
    because the history may need healing.
    """

    def __init__(self, upstream: Upstream, request: Request, route: Route, ticket: Ticket | None,
                 limit_s: float | None) -> None:
        self.route = route
        self.ticket = ticket            #: until Failover knows the outcome
        self.response: Response | None = None
        self.error: UpstreamError       #: instead of a response
        self.outcome = LEFT             #: LEFT until the attempt has ended
        self.notes: list[str] = []      #: for the line in the log
        self._upstream, self._request, self._limit_s = upstream, request, limit_s
        self._scan: StreamScan | None = None    # of an event stream that is judged
        self._began = 0.0               # of the latest send, in Unix seconds
        self._active_at = 0.0           # of that or the last event, by time.monotonic

    def run(self) -> None:
        """Send the request, healed if its history needs that; raise ClientGone."""
        self._send(self._request.body, self._request.found)
        rejection, request = self.response, self._request
        is_rejected = self.outcome.fault is Fault.REJECTED and request.found is not None
        body = without_thinking(request.body) if is_rejected else None
        if body is None or rejection is None:
            return
        self.notes.append(f"{self.route.target} rejected thinking blocks of another backend: "
                          "sent again without them")
        self._send(body, find_model(body))
        fault = self.outcome.fault
        if fault is None:
            rejection.close()
            return
        self.close()
        self.response, self._scan = rejection, None
        self.outcome = self.outcome._replace(       # a second REJECTED is an ordinary 400
            fault=Fault.STATUS if fault is Fault.REJECTED else fault, status=400, keeps_400=True)

    def _send(self, body: BytesLike, found: tuple[int, int, str] | None) -> None:
        """Send `body` once and receive as much as must be known before the client gets a byte."""
        request, model = self._request, self.route.model or ""
        pieces: list[BytesLike] = [body]
        if found is not None and model != found[2]:
            pieces = splice(body, found[0], found[1], model)
        before, after = request.outbound
        length = b"%d" % sum(map(len, pieces)) if after else b""
        # HTTP/1.0 does not know interim responses (RFC 9110 §15.2).
        interim = request.client.send if request.head.http11 else None
        self.response = self._scan = None
        request.watch.limit(self._limit_s)
        self._began, self._active_at = time.time(), time.monotonic()
        try:
            self.response = self._upstream.send(
                request.head.method, [before + length + after, *pieces], interim, request.watch,
                self.notes)
            defect = self._hold_back(self.response)
            self.outcome = self._read_outcome(self.response, defect)
        except UpstreamError as error:
            self.close()
            # A new error, because the frames in the old traceback would keep the request alive.
            self.response, self.error = None, type(error)(str(error))
            fault = FAULT_OF_ERROR.get(type(error), Fault.DROPPED)
            self.outcome = Outcome(fault, error.http_status, error.what, self._began, time.time())

    def _hold_back(self, response: Response) -> str:
        """Read as much as decides whether the client gets the response; return a defect or ""."""
        head, request = response.head, self._request
        is_judged = self.ticket is not None and request.head.method != "HEAD"
        is_success = is_judged and head.status < 300
        if is_success and head.is_event_stream and not head.coding:
            scan = self._scan = StreamScan(request.is_message)
            while not (scan.committed or scan.defect):
                response.ahead += self.receive(response)
            return scan.defect
        if (is_success and request.is_message and not head.is_event_stream
                and head.coding in Response.CODINGS):
            while not response.complete and len(response.ahead) <= READ_AHEAD_MAX_BYTES:
                response.ahead += response.receive(request.watch)
            text = response.text()
            is_whole = response.complete and len(text) <= READ_AHEAD_MAX_BYTES
            return message_defect(text) if is_whole else ""
        if (is_judged and head.status >= 400) or (head.status == 400 and request.model is not None):
            request.watch.limit(READ_AHEAD_S)
            request.watch.start()
            response.read_ahead(request.watch)
        else:
            response.take_held()        # broken chunks right after the head can still be rescued
        return ""

    def _read_outcome(self, response: Response, defect: str) -> Outcome:
        """Return how the attempt ended, as far as it is known before the client gets a byte."""
        head, ended, retry_after_s = response.head, time.time(), None
        fault, what = Fault.NO_MESSAGE if defect else None, defect or str(head.status)
        if head.fields.value(b"x-rrouter-error"):
            fault = Fault.OWN
        elif head.status >= 400:
            text = response.text()
            fault, what = read_failure(head.status, text)
            if what.endswith(UNKNOWN_MODEL):
                what += " " + printable(self.route.model or "", 80)
            retry_after_s = read_retry_after(head.fields.value(b"retry-after"),
                                             head.fields.value(b"retry-after-ms"), text, ended)
        return Outcome(fault, head.status, what, self._began, ended, retry_after_s)

    def receive(self, response: Response) -> bytes:
        """Return the next payload, after scanning it for signs of failure."""
        payload, scan = response.receive(self._request.watch), self._scan
        if scan is not None:
            events = scan.events
            scan.feed(payload)
            if response.complete:
                scan.finish()
        if scan is None or scan.events != events:
            self._active_at = time.monotonic()
        return payload

    def fail_late(self, fault: Fault, what: str) -> None:
        """Change the outcome to a failure that comes too late for a rescue."""
        self.outcome = Outcome(fault, 500, what, self._began, time.time(), direct=True)

    @property
    def late_defect(self) -> str:
        """Why a message that seemed good has failed after its first content, "" if it has not."""
        scan, response = self._scan, self.response
        if (scan is None or response is None or self.outcome.fault is not None
                or not self._request.is_message):
            return ""
        if scan.broken:
            return "error event in the stream"
        return "stream without its end" if response.complete and not scan.ended else ""

    @property
    def is_complete(self) -> bool:
        """True if it succeeded and carries everything, although its last bytes may be missing."""
        scan, response = self._scan, self.response
        if self.outcome.fault is not None or response is None or response.head.status >= 300:
            return False
        return response.complete or (scan is not None and scan.ended and not scan.broken)

    @property
    def is_abandoned(self) -> bool:
        """True if a client that leaves now gives up a stream that has been silent for too long."""
        return (self.ticket is not None and self.outcome.fault in (None, Fault.LEFT)
                and not self.is_complete and asks_for_stream(self._request.body)
                and time.monotonic() - self._active_at >= ABANDONED_S)

    def close(self) -> None:
        """Abort the response unless it is complete."""
        if self.response is not None:
            self.response.close()


def run_hook(command: Sequence[str], words: dict[str, str], log: Log) -> None:
    """Run the program of auto.onSwitch; discard its output, log a failure in one line."""
    command = [re.sub(r"\{(\w+)\}", lambda found: words.get(found[1], found[0]), part)
               for part in command]
    try:
        import subprocess
        program = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        status = program.wait(HOOK_S)
        problem = f"ended with status {status}" if status else ""
    # Python may have been upgraded since the start; a word of config.json may have a null byte.
    except (ImportError, OSError, ValueError) as error:
        problem = str(error)
    except subprocess.TimeoutExpired:
        problem = f"did not end within {HOOK_S} s"
        with contextlib.suppress(OSError):          # it may run as another user, as `sudo` does
            os.killpg(program.pid, signal.SIGKILL)  # it and its children
            program.wait()
    if problem:
        log.write("AUTO", f"onSwitch: {printable(command[0])}: {printable(problem)}")


class Router:
    """The settings, files, failover, upstream, log and counters that all connections share."""

    def __init__(self, settings: Settings, paths: Paths, log: Log, started_by: str) -> None:
        self.settings, self.log, self.started_by = settings, log, started_by
        self.failover = Failover(time.time, config_of(None).auto)
        self.store = Store(paths, log, self._changed)
        self.state = StateFile(paths.state)
        self.instance = ""              #: the random word that names this process
        self.upstream = Upstream(settings.upstream, self._is_own_address)
        self.connections: set[ClientConnection] = set()
        self.connections_max = CONNECTIONS_MAX
        self.draining = False
        self.addresses: list[tuple[str, int]] = []      #: what the servers are bound to
        self.hosts: frozenset[str] = frozenset()        #: the values of Host accepted; none: any
        self.keeps_state = False        #: whether state.json is ours to write
        self.usage_limits: bool | None = None   #: whether messages of Claude carry usage limits
        self.windows: dict[str, dict[str, dict[str, Any]]] = {}     #: usage windows by target
        self._one_core = OneCore()
        self._lock = threading.Lock()
        self._requests = self._active = 0
        self._results = {"answered": 0, "rescued": 0, "failed": 0}
        self._last_failure: dict[str, Any] | None = None
        self.sessions: OrderedDict[str, list[str]] = OrderedDict()  #: model asked, target, model
        self._trimmed = -1, 0.0         # requests when free memory was last returned, and the time
        self._started = time.monotonic()

    def begin(self) -> int:
        """Count a request; return its number."""
        with self._lock:
            self._requests += 1
            self._active += 1
            return self._requests

    def end(self, result: str, failure: dict[str, Any] | None) -> None:
        """Count the end of a request by its result, "" for none; keep its failure for /health."""
        with self._lock:
            self._active -= 1
            if result:
                self._results[result] += 1
            self._last_failure = failure or self._last_failure

    def log_decisions(self, lines: list[str], number: int = 0) -> None:
        """Log decisions of auto mode, and let the watcher save the new state."""
        for line in lines:
            self.log.write("AUTO", f"#{number} {line}" if number and "SWITCH" not in line else line)
            if isinstance(line, Move) and (hook := self.store.snapshot().config.auto.on_switch):
                hook_run = threading.Thread(target=run_hook, args=(hook, line.words, self.log))
                with contextlib.suppress(RuntimeError):     # there are too many threads
                    hook_run.start()
        if lines:
            self.store.wake()

    def _changed(self, old: Snapshot, new: Snapshot, mode_written: bool) -> None:
        """Clear the failover state when the user asks for it: by the mode or the auto section."""
        if MODE_AUTO in (old.mode, new.mode) and (old.mode != new.mode or mode_written):
            why = f"mode {new.mode}" + " written again" * (old.mode == new.mode)
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

    def load_state(self) -> None:
        """Restore the failover state from before a restart if it fits; save it from now on."""
        self.keeps_state = True
        try:
            if state := self.state.load(self.store.fingerprint()):
                self.failover.restore(state)
                target = self.failover.report(True)["currentTarget"]
                self.log.write("AUTO", f"state.json: on {target}")
        except StateError as error:
            self.log.write("AUTO", f"state.json set aside: {error}")

    def watch(self) -> None:
        """Look at the files and at the clock; one step of the watcher."""
        # First, because the rest takes long while threads contend for the interpreter lock.
        threads = [client.thread for client in list(self.connections)]
        self._one_core.look(self._active, threads, time.monotonic(), os.times().user)
        self.store.snapshot()
        if self.keeps_state:
            # The fingerprint first: a reset by a mode written meanwhile must not be undone.
            self.state.save({**self.store.fingerprint(), **self.failover.save()})
        self.upstream.prune()
        (count, when), now = self._trimmed, time.monotonic()
        if not self._active and self._requests != count and now - when >= TRIM_S:
            self._trimmed = self._requests, now
            return_free_memory()        # after requests, and once after the start

    def snapshot(self, mode: str | None) -> Snapshot:
        """Return config and mode for a request that names `mode`; raise RequestError 404."""
        snapshot = self.store.snapshot()
        if mode is not None and mode not in snapshot.config.choices:
            why = (mode == MODE_AUTO and snapshot.config.auto_error
                   or describe_unknown_mode(mode, snapshot.config.choices))
            raise RequestError(404, f"/@MODE: {why}", "the mode in /@MODE is not defined")
        return snapshot if mode is None else snapshot._replace(mode=mode)

    def health(self, mode: str | None = None) -> dict[str, Any]:
        """Return what /health shows, or /@MODE/health."""
        snapshot = self.snapshot(mode)
        is_auto = snapshot.mode == MODE_AUTO
        auto = self.failover.report(is_auto)
        problems = [*snapshot.problems, self.log.problem, self.state.problem]
        now = utc(time.time()) or ""
        windows = {target: {name: window for name, window in own.items() if window["until"] > now}
                   for target, own in list(self.windows.items())}
        return {"status": "ok", "version": __version__, "mode": snapshot.mode,
                "currentTarget": auto["currentTarget"] if is_auto else snapshot.mode,
                "defaultMode": snapshot.config.default_mode, "modes": snapshot.config.choices,
                "requestCount": self._requests, "activeRequests": self._active,
                "requests": {**self._results, "lastFailure": self._last_failure},
                "usageLimits": self.usage_limits, "usageWindows": windows,
                "uptimeSeconds": int(time.monotonic() - self._started),
                "pid": os.getpid(), "instance": self.instance, "startedBy": self.started_by,
                "listenAddr": self.settings.listen_addr, "upstreamURL": self.settings.upstream,
                "problems": [problem for problem in problems if problem], "autoSwitch": auto}


class Exchange:
    """One proxied request, from its snapshot to its line in the log."""

    def __init__(self, router: Router, request: Request) -> None:
        self._router, self._request = router, request
        self._session = request.head.fields.value(b"x-claude-code-session-id")[:MODEL_NAME_MAX]
        self._attempts: list[Attempt] = []
        self._chosen: Attempt | None = None     # whose response the client gets
        self._writer: ResponseWriter | None = None      # of that response, once it begins
        self._number, self._started = 0, 0.0    # the latter by time.monotonic
        self._has_ended = False
        self._tokens: TokenReader | None = None

    def run(self) -> None:
        """Carry the request through; raise ClientGone if the connection cannot carry another."""
        snapshot = self._router.snapshot(self._request.head.mode)
        self._started, self._number = time.monotonic(), self._router.begin()
        try:
            chosen = self._chosen = self._forward(snapshot)
            if chosen.response is None:
                self._report(chosen.error)
            else:
                self._relay(chosen, chosen.response)
        except Exception as error:
            if isinstance(error, ClientGone):
                self._leave()
            else:                       # a defect of ours
                self._end(500, "internal error")
            if self._writer is not None:
                self._writer.break_off()
            raise

    # ---- Up to the response

    def _forward(self, snapshot: Snapshot) -> Attempt:
        """Return the attempt whose response the client gets, after at most two."""
        config, request, failover = snapshot.config, self._request, self._router.failover
        model, targets = request.model, config.auto.targets
        sender = request.sender(config.conditions) if config.conditions else ("", "")
        if snapshot.mode != MODE_AUTO:
            return self._try(decide_route(config, snapshot.mode, model, sender))
        routes = {target: decide_route(config, target, model, sender) for target in targets}
        if not request.is_judged or len({route.model for route in routes.values()}) == 1:
            return self._try(routes[failover.current(model, targets)])
        limit_s = config.auto.first_byte_limit_s(asks_for_stream(request.body))
        ticket = failover.admit(model or "", targets, self._session)
        if ticket.probe and not ticket.quiet:
            self._router.log_decisions([f"PROBE of {ticket.target}"], self._number)
        first = self._try(routes[ticket.target], ticket, limit_s)
        if first.outcome.fault not in RESCUED or self._router.draining:
            return first                # while draining, the client's retry finds the next rrouter
        if request.client.has_left():
            raise ClientGone()
        ticket = failover.rescue(ticket, targets)
        second = self._try(routes[ticket.target], ticket, limit_s)
        verdict = judge(first.outcome, second.outcome)
        for attempt, counts in zip(self._attempts, verdict.counts):
            if attempt.outcome.fault is not None:
                self._settle(attempt, counts)
        self._attempts[1 - verdict.chosen].close()
        return self._attempts[verdict.chosen]

    def _try(self, route: Route, ticket: Ticket | None = None,
             limit_s: float | None = None) -> Attempt:
        """Return an attempt that has run; with a ticket it is judged."""
        attempt = Attempt(self._router.upstream, self._request, route, ticket, limit_s)
        self._attempts.append(attempt)
        attempt.run()
        if attempt.response is not None and (windows := read_windows(attempt.response.head.fields)):
            self._router.windows[route.target] = windows
        return attempt

    # ---- From the response on

    def _relay(self, attempt: Attempt, response: Response) -> None:
        """Forward the response as it comes; its outcome is settled before its end is sent."""
        if attempt.ticket is not None and attempt.outcome.fault is None:
            attempt.ticket, lines = self._router.failover.commit(attempt.ticket)
            self._router.log_decisions(lines, self._number)
        self._request.watch.limit(None)
        writer = self._writer = ResponseWriter(
            self._request.client, self._request.head, response.head, self._reply_fields())
        payload, response.ahead = response.ahead, b""
        if response.head.status == 200 and self._request.is_message:
            self._tokens = TokenReader(response.head.coding)
            if (attempt.route.model or "").startswith("claude"):
                self._router.usage_limits = attempt.route.target in self._router.windows
        while True:
            if self._tokens is not None:
                self._tokens.feed(payload)
            defect = attempt.late_defect
            if defect:
                attempt.fail_late(Fault.NO_MESSAGE, defect)
                self._settle(attempt, counts=True)
            if response.complete:
                self._end(response.head.status)
                writer.send(payload, is_last=True)
                return
            writer.send(payload, is_last=False)
            try:
                payload = attempt.receive(response)
            except UpstreamError as error:
                if attempt.outcome.fault is None:
                    attempt.fail_late(Fault.DROPPED, f"the upstream {error}")
                self._end(response.head.status)
                raise ClientGone() from error

    def _report(self, error: UpstreamError) -> None:
        """Send the client the error that replaces a response."""
        upstream, fields = self._router.upstream, self._reply_fields()
        self._end(error.http_status, f"the upstream {error}")
        # Without this field Claude Code retries for three silent minutes.
        if (isinstance(error, UpstreamUnreachable) and self._request.model is not None
                and upstream.miss(self._started)):
            fields += b"x-should-retry: false\r\n"
        message = f"upstream {upstream.url} {error}; {error.remedy}"
        self._request.client.send_error(type(error)(message), fields)

    def _reply_fields(self) -> bytes:
        """Return our fields of the response: where a request with a model went, and `close`."""
        fields = b""
        if self._request.model is not None and self._chosen is not None:
            route = self._chosen.route
            fields = (f"x-rrouter-target: {printable(route.target)}\r\n"
                      f"x-rrouter-model: {printable(route.model or '')}\r\n"
                      f"x-rrouter-attempts: {len(self._attempts)}\r\n").encode("ascii")
        if not self._request.head.keep_alive or self._router.draining:
            fields += CLOSE
        return fields

    # ---- The end

    def _settle(self, attempt: Attempt, counts: bool = False) -> None:
        """Report a judged attempt to Failover, once: it counts, has succeeded, or is neutral."""
        ticket, attempt.ticket = attempt.ticket, None
        failover = self._router.failover
        if ticket is None:
            return
        if not counts and attempt.is_complete:
            failover.credit(ticket)
            return
        lines = failover.charge(ticket, attempt.outcome) if counts else failover.release(ticket)
        self._router.log_decisions(lines, self._number)

    def _leave(self) -> None:
        """Settle what was under way when the client left."""
        first, current = self._attempts[0], self._chosen or self._attempts[-1]
        if first.outcome.fault not in (None, Fault.LEFT):
            self._settle(first, judge(first.outcome, LEFT).counts[0])
        if current.is_abandoned:
            current.fail_late(Fault.TIMEOUT, "timeout, ended by the client")
            self._settle(current, counts=True)
        self._end(LEFT.status, LEFT.what)

    def _end(self, status: int, note: str = "") -> None:
        """End the request, once, before the client can know that it has ended."""
        if self._has_ended:
            return
        self._has_ended, request = True, self._request
        for attempt in self._attempts:
            self._settle(attempt)
            attempt.close()
        self._router.end(*self._result(status))
        if status < 400 and self._chosen is not None and self._session and request.is_judged:
            last = [(name or "")[:MODEL_NAME_MAX] for name in (request.model, *self._chosen.route)]
            remember(self._router.sessions, self._session, last)
        self._router.log.write("REQ", self._line(status, note))

    def _result(self, status: int) -> tuple[str, dict[str, Any] | None]:
        """Return what the request counts as in /health, and its last failure."""
        failure = None
        for attempt in self._attempts:
            if attempt.outcome.fault not in (None, Fault.LEFT):
                failure = {"at": utc(attempt.outcome.ended), "target": attempt.route.target,
                           "what": attempt.outcome.what, "slow": slow_failure(attempt.outcome)}
        if status == LEFT.status:       # neither an answer nor a failure
            return "", failure
        if status >= 400 or self._chosen is None or self._chosen.outcome.fault is not None:
            return "failed", failure
        return "answered" if self._chosen is self._attempts[0] else "rescued", failure

    def _line(self, status: int, note: str) -> str:
        """Return the request's line in the log."""
        head, model, routed, notes = self._request.head, self._request.model, "", []
        if model is not None and self._attempts:
            route = (self._chosen or self._attempts[-1]).route
            routed = f"{printable(model)} -> {route.target} {printable(route.model or '')} "
        for attempt in self._attempts:
            outcome = attempt.outcome
            if self._chosen not in (None, attempt):
                notes.append(f"{attempt.route.target} failed: {outcome.what}")
            elif outcome.direct or outcome.fault is Fault.NO_MESSAGE:
                notes.append(outcome.what)
            notes += [*attempt.notes, slow_failure(outcome)]
        prefix = f"/@{head.mode}" if head.mode is not None else ""
        line = f"#{self._number} {printable(head.method, 40)} {prefix}{printable(head.path)}"
        line += f" {routed}{status} {time.monotonic() - self._started:.2f}s"
        line += self._tokens.note() if self._tokens is not None else ""
        return line + "".join(f" ({text})" for text in [*notes, note] if text)


class ProxyHandler(socketserver.BaseRequestHandler):
    """The requests of one client connection, one after the other.

    `http.server` has a handler for HTTP, but its parser misreads heads (see "Messages: heads") and
    its buffered reader would hide bytes from `has_left`.
    """

    server: Any                         # the ProxyServer that accepted the connection
    _checked: Fields | None = None      # fields of the last head that was checked
    _outbound = b"", b""                # what that head becomes upstream

    def handle(self) -> None:
        """Carry requests through until one side ends the connection."""
        self._client = ClientConnection(self.request)
        self._router: Router = self.server.router
        connections = self._router.connections
        connections.add(self._client)
        try:
            self._client.set_up(WRITE_STALL_S)
            beyond = len(connections) - self._router.connections_max
            # Beyond the limit, only one request for /health is served.
            self._full = RequestError(503, "too many connections (%d)" %
                                      self._router.connections_max) if beyond > 0 else None
            if self._full and beyond > CONNECTIONS_RESERVE:
                self._refuse(self._full)
            else:
                while self._handle_request():
                    pass
        except (ClientGone, OSError):   # macOS: reset before it was accepted
            pass
        finally:
            connections.discard(self._client)

    def _admit(self, head: RequestHead) -> None:
        """Check a head, and prepare the one to forward; raise RequestError."""
        if head.fields is self._checked:        # most requests of a connection share them
            return
        check_origin(head, self._router.hosts)
        upstream = self._router.upstream
        self._outbound = outbound_head(head, upstream.authority, upstream.base_path)
        self._checked = head.fields

    def _handle_request(self) -> bool:
        """Carry one request through; return whether the connection can carry another."""
        client, router = self._client, self._router
        try:
            head = client.read_head(LINGER_S if self._full else IDLE_S)
            if head is None:
                return False
            if self._full or router.draining:
                head = head._replace(keep_alive=False)
            self._admit(head)
            is_health = head.path == "/health" and head.method in ("GET", "HEAD")
            if self._full and not is_health:
                raise self._full
            body = client.read_body(head)
            if is_health:
                self._report_health(head)
            else:
                found = find_model(body)
                watch = Watch(client.has_left, awaits_start=found is not None)
                request = Request(client, head, self._outbound, body, found, watch)
                Exchange(router, request).run()
            if head.keep_alive and not router.draining:
                return True
        except RequestError as error:
            self._refuse(error)
        except ClientGone:
            return False
        except Exception:               # a defect of ours: in the log, and to the client
            self.server.handle_error(self.request, self.client_address)
            defect = RouterError("internal error; see ~/.rrouter/logs/rrouter.log")
            client.send_error(defect, CLOSE)
        client.linger()
        return False

    def _refuse(self, error: RequestError) -> None:
        """Send the error, and log it."""
        self._router.log.write("REFUSED", f"{error.http_status} {error.logged}")
        self._client.send_error(error, CLOSE)

    def _report_health(self, head: RequestHead) -> None:
        health = self._router.health(head.mode)
        query = urllib.parse.parse_qs(head.target.partition(b"?")[2].decode("ascii"), True)
        if "line" in query:
            last = self._router.sessions.get(query.get("session", [""])[0].lower())
            text, content_type = status_line(health, last), b"text/plain; charset=utf-8"
        else:
            text, content_type = json.dumps(health, indent=2), b"application/json"
        fields = b"Cache-Control: no-store\r\n" + (b"" if head.keep_alive else CLOSE)
        self._client.send_whole(200, text.encode("utf-8") + b"\n", fields, content_type)


class ProxyServer(http.server.ThreadingHTTPServer):
    """One listening socket; a thread for each of its connections."""

    request_queue_size = BACKLOG
    allow_reuse_address = True          # TIME_WAIT would keep a restart off the port
    allow_reuse_port = False            # else two could share it, each with half of the requests

    def __init__(self, family: int, address: Any, router: Router) -> None:
        self.address_family = family
        self.router, self._complained_at = router, 0.0
        super().__init__(address, ProxyHandler, bind_and_activate=False)

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
                    self.router.log.write(
                        "ERROR", f"cannot accept connections: {reason_of(error)}")
                time.sleep(0.1)
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a defect of ours in one line."""
        self.router.log.write("ERROR", describe_defect(sys.exc_info()[1]))


# Daemon #######################################################################

def until(condition: Callable[[], object], limit_s: float) -> bool:
    """Wait until `condition()` is true, at most `limit_s`; return whether it is."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def own_place() -> str:
    """Return "HOST NAMESPACE" of this process; the pid namespace is 0 on macOS."""
    namespace = 0
    with contextlib.suppress(OSError):
        namespace = os.stat("/proc/self/ns/pid").st_ino
    host = re.sub(r"\s", "_", socket.gethostname()) or "-"
    return f"{host} {namespace}"


class Holder(NamedTuple):
    """The process that holds the lock, as it names itself; 5.0.0 wrote only its pid."""

    pid: int
    instance: str = ""          #: random, repeated in run.json and by /health
    place: str = ""             #: its `own_place`
    stopping: bool = False      #: it accepts no more connections; running requests finish

    @classmethod
    def named_in(cls, values: dict[str, Any]) -> Holder:
        """Return the process that run.json or /health names; raise KeyError, ValueError."""
        return cls(int(values["pid"]), str(values.get("instance", "")))

    @property
    def elsewhere(self) -> str:
        """Where the process lives if its pid means nothing here, else ""."""
        if not self.instance or self.place == own_place():
            return ""
        return f"in another container or on another host ({printable(self.place.split()[0])})"

    @property
    def name(self) -> str:
        """The process in words."""
        return f"pid {self.pid}{self.elsewhere and ' ' + self.elsewhere}"

    def is_same(self, other: Holder | None) -> bool:
        """Return whether `other` is the same process, stopping or not."""
        return other is not None and other[:2] == self[:2]


class Lock:
    """The file that a daemon keeps locked while it lives; its one line names the daemon.

    It is never removed, because two processes could then hold locks on two files.  It is locked
    with flock, because a lock of lockf ends when the process closes any descriptor of the file.
    """

    LINE = re.compile(r"([1-9][0-9]{0,8})(?: ([0-9a-f]+) (\S+ [0-9]{1,20}))?( stopping)?\n")
    PATIENCE_S = 0.5        # a command may be looking, or a new holder may not have written yet

    def __init__(self, path: str):
        self._path = path
        self._descriptor: int | None = None
        self._written = Holder(0)       # this process, as the file names it

    def acquire(self, instance: str, patience_s: float = PATIENCE_S) -> bool:
        """Lock the file until this process ends, or return False.  Raises DaemonError."""
        try:
            with contextlib.ExitStack() as failed:
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
                failed.callback(os.close, descriptor)
                if not until(lambda: self._try(descriptor, fcntl.LOCK_EX), patience_s):
                    return False
                # Written at once, because the line still names the last holder.
                self._write(descriptor, Holder(os.getpid(), instance, own_place()))
                failed.pop_all()
        except OSError as error:
            raise DaemonError(f"{self._path}: cannot be written: {reason_of(error)}: check that it "
                              "is a regular file, its permissions and free space") from error
        if self._descriptor is not None:        # of a file that has left its path
            os.close(self._descriptor)
        self._descriptor = descriptor
        return True

    def _try(self, descriptor: int, kind: int) -> bool:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise DaemonError(f"{self._path}: cannot be locked: {reason_of(error)}: "
                              "put HOME on a file system that supports locks") from error
        return True

    def _write(self, descriptor: int, holder: Holder) -> None:
        line = os.fsencode(" ".join(map(str, holder[:3])) + " stopping" * holder.stopping + "\n")
        os.pwrite(descriptor, line, 0)
        os.ftruncate(descriptor, len(line))
        self._written = holder

    def is_removed(self) -> bool:
        """Return whether this process holds a file that has left its path."""
        return self._descriptor is not None and not is_at(self._path, self._descriptor)

    def renew(self, stopping: bool) -> None:
        """Update the line if this process holds the lock; a laptop may change its host name."""
        holder = self._written._replace(place=own_place(), stopping=stopping)
        if self._descriptor is not None and holder != self._written:
            with contextlib.suppress(OSError):
                self._write(self._descriptor, holder)

    def look(self) -> Holder | None:
        """Return the process that holds the lock, or None.  Raises DaemonError."""
        try:
            file = open_for_reading(self._path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP):
                return None
            raise DaemonError(f"{self._path}: {reason_of(error)}: another user may have run "
                              "rrouter with your HOME: chown it to you") from error
        with file:
            deadline = time.monotonic() + self.PATIENCE_S
            while time.monotonic() < deadline and not self._try(file.fileno(), fcntl.LOCK_SH):
                with contextlib.suppress(OSError):      # a FIFO cannot be read at an offset
                    if line := self.LINE.match(os.fsdecode(os.pread(file.fileno(), 512, 0))):
                        return Holder(int(line[1]), line[2] or "", line[3] or "", bool(line[4]))
                time.sleep(0.02)
        return None


class Signals:
    """Signals as bytes in a pipe, because a handler can run in the middle of anything."""

    hang_up_ends = False        #: SIGHUP means that our terminal closed, not "read the files again"

    def install(self) -> None:
        """Catch SIGTERM, SIGINT and SIGHUP from now on; call it in the main thread."""
        self._read, write_end = os.pipe()
        os.set_blocking(write_end, False)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:       # nohup ignores it
            with contextlib.suppress(OSError):                      # fails without a terminal
                os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK))
                self.hang_up_ends = True
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)

    def wait(self, timeout_s: float | None = None) -> int:
        """Return the number of the next signal, 0 if none comes within `timeout_s`."""
        is_there = select.select([self._read], [], [], timeout_s)[0]
        return os.read(self._read, 1)[0] if is_there else 0     # one byte is one signal


def addresses_of(settings: Settings) -> list[tuple[int, Any]]:
    """Return (family, address) of each address to listen on; raise UsageError."""
    if settings.host == "localhost":
        return [(socket.AF_INET, ("127.0.0.1", settings.port)),
                (socket.AF_INET6, ("::1", settings.port))]
    try:
        found = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # Two lines of /etc/hosts may give the same address.
        return list(dict.fromkeys((info[0], info[4]) for info in found))
    except OSError as error:
        raise UsageError(f"RROUTER_HOST={settings.host}: {reason_of(error)}: expected localhost, "
                         "or an address or a name of this machine") from error


def run_program(command: Sequence[str], timeout_s: float) -> tuple[int, str]:
    """Run a program; return its status and output, or why it did not end (124) or run (127)."""
    import subprocess
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=timeout_s)
        return done.returncode, done.stdout.decode("utf-8", "replace")
    except (OSError, subprocess.SubprocessError) as error:
        return (124 if isinstance(error, subprocess.TimeoutExpired) else 127), str(error)


def port_owner(port: int) -> str:
    """Return the name and pid of the program that listens on `port`, "" if they are unknown."""
    if not os.path.isdir("/proc/net"):                  # macOS
        output = run_program(("lsof", "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-Fpc"), 3)[1]
        found = re.search(r"p(\d+)\nc([^\n]+)", output)
        return f"{printable(found[2])} (pid {found[1]})" if found else ""
    links = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table, encoding="ascii") as file:
            links |= {f"socket:[{row[9]}]" for row in map(str.split, file)
                      if row[1].endswith(f":{port:04X}") and row[3] == "0A"}
    for path in glob.iglob("/proc/[0-9]*/fd/*") if links else ():
        with contextlib.suppress(OSError):      # the process has ended, or is another user's
            if os.readlink(path) in links:
                pid = path.split("/")[2]
                name = read_file(f"/proc/{pid}/comm") or b""
                return f"{printable(name.decode('utf-8', 'replace').strip())} (pid {pid})"
    return ""


@contextlib.contextmanager
def total_limit(sock: socket.socket, seconds: float) -> Iterator[None]:
    """Shut a connection down after `seconds`, because a slow trickle never times out."""
    def cut() -> None:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()                    # because the caller may fork


def ask_health(host: str, port: int, timeout_s: float = 3) -> dict[str, Any] | None:
    """Return /health of the rrouter that answers there, or None."""
    for address in ("127.0.0.1", "::1") if host == "localhost" else (host,):
        connection = http.client.HTTPConnection(address, port, timeout=timeout_s)
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError, RecursionError), \
                contextlib.closing(connection):
            connection.connect()
            with total_limit(connection.sock, timeout_s):
                connection.request("GET", "/health", headers={"Host": "localhost"})
                health = json.loads(connection.getresponse().read(FILE_MAX_BYTES))
            if (isinstance(health, dict) and "autoSwitch" in health
                    and isinstance(health.get("pid"), int)):
                return health
    return None


def describe_taken(settings: Settings, paths: Paths) -> str:
    """Return who has the port, and what to do."""
    health, holder = ask_health(settings.host, settings.port, timeout_s=1), Lock(paths.lock).look()
    if health and holder and holder.is_same(Holder.named_in(health)):
        return f"already running ({holder.name}): `rrouter stop` stops it"
    if health:
        return f"another rrouter (pid {health['pid']}) has port {settings.port}: set RROUTER_PORT"
    owner = port_owner(settings.port)
    return (f"port {settings.port} is taken{f' by {owner}' if owner else ''}: stop that program or "
            "set RROUTER_PORT (8316 is also CLIProxyAPI's default pprof.addr)")


def listen(settings: Settings, router: Router) -> list[ProxyServer]:
    """Return a server for each address; raise DaemonError if one is taken or none can be used."""
    servers: list[ProxyServer] = []
    why = ""
    for family, address in addresses_of(settings):
        servers.append(ProxyServer(family, address, router))
        try:
            servers[-1].server_bind()
            servers[-1].server_activate()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                for server in servers:
                    server.server_close()
                raise DaemonError(describe_taken(settings, router.store.paths)) from error
            servers.pop().server_close()
            why = reason_of(error)
            router.log.write("START", f"not listening on {address[0]}: {why}")
    if not servers:
        raise DaemonError(f"cannot listen on {settings.listen_addr}: {why}")
    router.addresses = [server.server_address[:2] for server in servers]    # type: ignore[misc]
    if all(is_loopback(host) for host, _ in router.addresses):
        names = (*LOOPBACK_NAMES, settings.host.lower().rstrip("."), *settings.allowed_hosts)
        router.hosts = frozenset(f"[{name}]" if ":" in name else name for name in names)
    return servers


LAUNCHD_LABEL = "com.rrouter"


def who_starts() -> str:
    """Return what started this process in the foreground: systemd, launchd, or `serve` by hand."""
    if os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid()):
        return "systemd"
    return "launchd" if os.environ.get("XPC_SERVICE_NAME") == LAUNCHD_LABEL else "serve"


def write_run_files(router: Router) -> None:
    """Write rrouter.pid and run.json; the daemon works without them, too."""
    paths, settings = router.store.paths, router.settings
    run = {"host": settings.host, "port": settings.port, "upstream": settings.upstream,
           "pid": os.getpid(), "instance": router.instance, "startedBy": router.started_by,
           "allowedHosts": ",".join(settings.allowed_hosts), "version": __version__}
    try:
        write_atomically(paths.pid, f"{os.getpid()}\n")
        write_atomically(paths.run, json.dumps(run, indent=2) + "\n")
    except OSError as error:
        router.log.write("ERROR", f"{paths.run}: {reason_of(error)}: "
                                  "other commands may not find this daemon")


def raise_descriptor_limit() -> int:
    """Raise the limit of open files, 256 on macOS, as far as is useful; return it."""
    import resource
    limits, enough = resource.getrlimit(resource.RLIMIT_NOFILE), 4 * CONNECTIONS_MAX
    soft, most = (enough if limit == resource.RLIM_INFINITY else limit for limit in limits)
    most = min(most, enough)
    with contextlib.suppress(OSError, ValueError):
        if soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
            return most
    return soft


class Watcher(threading.Thread):
    """Does the work that no request waits for, every POLL_S seconds and when woken."""

    def __init__(self, router: Router, lock: Lock):
        super().__init__(daemon=True)
        self._router, self._lock = router, lock
        self._owns_files = router.keeps_state
        self._ending = False

    def run(self) -> None:
        """Take the steps in rounds until `end`; a defect in one does not stop the others."""
        router, condition, log = self._router, self._router.store.condition, self._router.log
        is_last = False
        while not is_last:
            with condition:
                condition.wait(0 if self._ending else POLL_S)
            is_last = self._ending      # lines added before are written in this round
            for step in (self._reclaim, partial(self._lock.renew, router.draining), router.watch,
                         log.flush):
                try:
                    step()
                except Exception as error:      # else the log would end with this thread
                    log.write("ERROR", f"internal error in the watcher: {type(error).__name__}")

    def _reclaim(self) -> None:
        """If the user removed ~/.rrouter, write the files that name this daemon again."""
        if not self._owns_files:
            return
        router, paths = self._router, self._router.store.paths
        is_removed = self._lock.is_removed()
        router.keeps_state = not is_removed     # what is there now may be another daemon's
        if is_removed and os.path.isdir(os.path.dirname(paths.root)):   # else HOME itself is gone
            with contextlib.suppress(DaemonError):
                paths.create()
                if self._lock.acquire(router.instance, patience_s=0):
                    router.state.saved = None
                    write_run_files(router)
                    router.log.write("START", "~/.rrouter was removed: run files are written again")

    def end(self) -> None:
        """Let it save and log the rest; wait only briefly, because the disk may hang."""
        self._ending = True
        self._router.store.wake()
        self.join(1)


def drain(signals: Signals, router: Router, servers: list[ProxyServer]) -> None:
    """Accept no more connections; wait for running requests until a second signal or DRAIN_S."""
    router.draining = True
    router.store.wake()         # the watcher writes the lock file, because the disk may hang
    for server in servers:
        with contextlib.suppress(OSError):
            server.socket.shutdown(socket.SHUT_RDWR)    # refuses clients at once, wakes the loop
        server.shutdown()
        server.server_close()
    deadline = time.monotonic() + DRAIN_S
    while router.connections and time.monotonic() < deadline:
        for client in list(router.connections):
            if not client.busy:
                client.stop_reading(cut_off=False)
        # A closing terminal can send SIGHUP twice: from the kernel and from the shell.
        if signals.wait(0.02) not in (0, signal.SIGHUP):
            router.log.write("STOP", "second signal: ending at once")
            break
    for client in list(router.connections):
        client.stop_reading(cut_off=True)
    until(lambda: not router.connections, CUT_OFF_S)    # each request writes its log line


def run_to_the_end(signals: Signals, router: Router, servers: list[ProxyServer],
                   watcher: Watcher) -> None:
    """Serve until a signal ends it, drain, and end the process, which releases the lock."""
    log, status = router.log, 1
    try:
        while (number := signals.wait()) == signal.SIGHUP and not signals.hang_up_ends:
            log.write("START", "SIGHUP: files read again")      # flushed after they are read
            router.store.wake()
        log.write("STOP", f"{signal.Signals(number).name}: running requests may finish within "
                          f"{DRAIN_S} s")
        drain(signals, router, servers)
        log.write("STOP", f"rrouter ends, pid {os.getpid()}")
        status = 0
    except Exception as error:          # a defect of ours
        log.write("ERROR", describe_defect(error))
    try:
        watcher.end()
        if router.keeps_state:
            remove_files(router.store.paths.pid, router.store.paths.run)
    finally:
        os._exit(status)    # sys.exit would end only this thread and lose the status


def prepare(router: Router, lock: Lock, owns_files: bool) -> list[ProxyServer]:
    """Load the files and listen; return the servers.  Raises DaemonError, UsageError."""
    log, settings = router.log, router.settings
    spare = raise_descriptor_limit() - CONNECTIONS_RESERVE - 24     # for files and listeners
    router.connections_max = min(CONNECTIONS_MAX, max(1, spare // 2))
    servers = listen(settings, router)  # first, because only a process that listens logs its mode
    router.store.snapshot()             # reads mode and config for the first time
    if owns_files:
        router.load_state()
        write_run_files(router)
    else:
        holder = lock.look()
        log.write("START", f"a daemon ({holder.name if holder else 'ending'}) runs already: this "
                  "process shares its mode and config, and writes no pid, run or state file")
    if not router.hosts:
        log.write("START", f"RROUTER_HOST={settings.host}: any client that reaches that address "
                           "can spend your quota")
    log.write("START", f"rrouter {__version__} on {settings.listen_addr} -> {settings.upstream}, "
                       f"pid {os.getpid()}, started by {router.started_by}")
    return servers


def serve(settings: Settings, paths: Paths, ready: int | None = None) -> int:
    """Start the router; return 0.  `start` waits until the descriptor `ready` is closed."""
    signals, lock, instance = Signals(), Lock(paths.lock), os.urandom(8).hex()
    signals.install()
    paths.create()
    owns_files = lock.acquire(instance)
    if ready is not None and not owns_files:
        return 0                        # another daemon was faster
    use_one_heap()
    log = Log(paths.log, echo=ready is None)
    router = Router(settings, paths, log, who_starts() if ready is None else "start")
    router.instance = instance
    try:
        servers = prepare(router, lock, owns_files)
    finally:
        log.flush()                     # before `start` or the caller prints anything
    watcher = Watcher(router, lock)
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    watcher.start()
    if ready is not None:
        os.close(ready)
    outlive_main_script(partial(run_to_the_end, signals, router, servers, watcher))
    return 0


class Daemon(NamedTuple):
    """A daemon, as the lock and run.json describe it."""

    holder: Holder
    host: str
    port: int
    started_by: str
    upstream: str = ""
    allowed_hosts: str = ""

    @classmethod
    def last(cls, paths: Paths) -> Daemon | None:
        """Return the one in run.json, dead or alive; None without a usable file."""
        try:
            run = json.loads(read_file(paths.run) or b"null")
            return cls(Holder.named_in(run), str(run["host"]), int(run["port"]),
                       str(run["startedBy"]), str(run["upstream"]),
                       str(run.get("allowedHosts", "")))
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None

    @classmethod
    def find(cls, paths: Paths) -> Daemon | None:
        """Return the live one, or None; without its run.json, RROUTER_* say where it listens."""
        holder, last = Lock(paths.lock).look(), cls.last(paths)
        if holder is None:
            return None
        if last and holder.is_same(last.holder):
            return last._replace(holder=holder)
        settings = read_environment(dict(os.environ))
        return cls(holder, settings.host, settings.port, "unknown")

    def health(self) -> dict[str, Any] | None:
        """Return its /health, or None if it does not answer or another process does."""
        health = ask_health(self.host, self.port)
        return health if health and self.holder.is_same(Holder.named_in(health)) else None


def end_of_log(paths: Paths) -> str:
    """Return the last lines of the log, for a message."""
    try:
        with open_for_reading(paths.log) as file:
            lines = [line.decode("utf-8", "replace").rstrip() for line in deque(file, 5)]
    except OSError as error:
        lines = [f"{paths.log}: {reason_of(error)}"]
    return "\n  ".join(["the log ends with", *map(printable, lines)])


def wait_for_daemon(paths: Paths) -> tuple[Daemon, dict[str, Any]] | None:
    """Return the daemon and its /health when it answers, None when none runs; raise DaemonError."""
    begin = time.monotonic()
    while True:
        daemon = Daemon.find(paths)
        if daemon is None:
            return None
        if health := daemon.health():
            return daemon, health
        if daemon.holder.elsewhere:
            raise DaemonError(f"rrouter runs {daemon.holder.elsewhere}: stop it there")
        if time.monotonic() - begin > (DRAIN_S + 5 if daemon.holder.stopping else START_S):
            raise DaemonError(f"the daemon does not answer; {end_of_log(paths)}")
        time.sleep(0.02)


def spawn_daemon(paths: Paths) -> None:
    """Run `serve` as a daemon; return when it listens or ends; raise its error as DaemonError."""
    import subprocess
    paths.create()
    program = os.path.abspath(__file__ if os.path.isfile(__file__) else sys.argv[0])
    read_end, write_end = os.pipe()
    log = open_log(paths.log)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()     # the child below leads no session, so it never gets a terminal
            # A new program, because macOS's libraries do not survive a fork (cpython#105912).
            _orphan = subprocess.Popen(
                (sys.executable, program, "serve", "--ready-descriptor", str(write_end)), cwd="/",
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[write_end], umask=0o077)
        finally:
            os._exit(0)
    os.close(write_end)
    os.close(log)
    os.waitpid(child, 0)
    with os.fdopen(read_end, "rb") as pipe:
        if select.select([pipe], [], [], START_S)[0] and (words := pipe.read()):
            raise DaemonError(words.decode("utf-8", "replace"))


SYSTEMD_UNIT = "rrouter.service"
UNIT_PATH = f"systemd/user/{SYSTEMD_UNIT}"      # below ~/.config or XDG_CONFIG_HOME
AGENT_PATH = f"Library/LaunchAgents/{LAUNCHD_LABEL}.plist"      # below the home directory
MANAGER_S = DRAIN_S + 15        # a stop through the service manager includes the drain


class Manager(NamedTuple):
    """A service manager: systemd or launchd."""

    name: str
    path: str                               #: of the file that starts rrouter: unit or agent
    start: tuple[tuple[str, ...], ...]      #: commands; only the last one must succeed
    stop: tuple[tuple[str, ...], ...]

    def run(self, commands: Sequence[Sequence[str]]) -> None:
        """Run `start` or `stop`; raise DaemonError if it fails."""
        for command in commands:
            status, output = run_program(command, MANAGER_S)
        if status:
            why = printable(output.strip()) or f"status {status}"
            raise DaemonError(f"{' '.join(command)} failed: {why}")


def is_own_home(home: str) -> bool:
    """Return whether `home` is the one in the user database, which service managers use."""
    import pwd
    try:
        return os.path.realpath(pwd.getpwuid(os.getuid()).pw_dir) == os.path.realpath(home)
    except KeyError:                            # a container's user may have no entry
        return False


def reach_manager(home: str) -> tuple[Manager | None, str]:
    """Return the service manager of this HOME if it answers, else None and why."""
    if not is_own_home(home):
        return None, f"service managers serve your home directory, and HOME={home} is another one"
    systemctl = ("systemctl", "--user")
    status, output = run_program((*systemctl, "show-environment"), MANAGER_S)
    if status == 0:
        # The manager's variable, not this shell's; it quotes special characters as $'...'.
        config = re.search(r"(?m)^XDG_CONFIG_HOME=(?:\$')?(.+?)'?$", output)
        directory = config[1] if config else os.path.join(home, ".config")
        return Manager("systemd", os.path.join(directory, UNIT_PATH),
                       ((*systemctl, "daemon-reload"), (*systemctl, "reset-failed", SYSTEMD_UNIT),
                        (*systemctl, "start", SYSTEMD_UNIT)),
                       ((*systemctl, "stop", SYSTEMD_UNIT),)), ""
    asked, domain = "systemctl --user", f"gui/{os.getuid()}"
    if status == 127:
        asked = "launchctl"
        status, output = run_program(("launchctl", "print", domain), MANAGER_S)
    if status == 0:
        # Loaded at each start, because `kickstart` alone would use the plist as it was when loaded.
        path, label = os.path.join(home, AGENT_PATH), f"{domain}/{LAUNCHD_LABEL}"
        # `bootout` may fail with 36 although it stops the job, and returns before the job is
        # unloaded; until then `bootstrap` would fail with 5.
        unloaded = f"while launchctl print {label} >/dev/null 2>&1; do sleep 0.1; done"
        return Manager("launchd", path, (("launchctl", "bootstrap", domain, path),
                                         ("launchctl", "kickstart", label)),
                       (("launchctl", "bootout", label), ("/bin/sh", "-c", unloaded))), ""
    why = printable(output.strip().rpartition("\n")[2]) or f"status {status}"
    return None, ("neither systemd nor launchd runs here" if status == 127 else
                  f"{asked} does not answer: {why}")


def service_files(home: str) -> list[str]:
    """Return the usual paths of the unit and the agent."""
    return [os.path.join(home, ".config", UNIT_PATH), os.path.join(home, AGENT_PATH)]


def find_manager(home: str) -> Manager | None:
    """Return the service manager that has rrouter installed and answers, or None."""
    manager = reach_manager(home)[0]
    return manager if manager and os.path.isfile(manager.path) else None


def start_daemon(paths: Paths, home: str) -> str:
    """Start the daemon unless one runs; return what to print.  Raises DaemonError, UsageError."""
    if found := wait_for_daemon(paths):
        return f"rrouter is already running ({found[0].holder.name}, port {found[0].port})"
    addresses_of(read_environment(dict(os.environ)))    # raises UsageError before anything starts
    if manager := find_manager(home):
        manager.run(manager.start)
        until(lambda: Daemon.find(paths), START_S)      # the manager may return earlier
    else:
        try:
            spawn_daemon(paths)
        except OSError as error:
            raise DaemonError(f"{error.filename or 'cannot start a process'}: "
                              f"{reason_of(error)}") from error
    if not (found := wait_for_daemon(paths)):
        raise DaemonError(f"the daemon did not start; {end_of_log(paths)}")
    address, pid, mode = (found[1][key] for key in ("listenAddr", "pid", "mode"))
    by = f", by {manager.name}" if manager else ""
    return f"rrouter runs on {address} (pid {pid}{by}), mode {mode}"


def _listens(host: str, port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((host, port), timeout=1).close()
        return True
    return False


def send_signal(lock: Lock, holder: Holder, number: int) -> None:
    """Signal `holder` if it lives here and the lock still names it.  Raises DaemonError."""
    send: Callable[[int], None] = partial(os.kill, holder.pid)
    with contextlib.ExitStack() as stack, contextlib.suppress(ProcessLookupError):
        with contextlib.suppress(AttributeError, OSError):      # only Linux since 5.3 has it
            # Opened before `look`, so it cannot refer to a later process with the same pid.
            descriptor = os.pidfd_open(holder.pid)
            stack.callback(os.close, descriptor)
            send = partial(signal.pidfd_send_signal, descriptor)
        try:
            if not holder.elsewhere and lock.look() == holder:
                send(number)
        except PermissionError as error:
            raise DaemonError(f"pid {holder.pid} belongs to another user") from error


def stop_daemon(paths: Paths, home: str) -> str:
    """Stop the daemon, wait for its port, return what to print.  Raises DaemonError."""
    daemon, lock = Daemon.find(paths), Lock(paths.lock)
    if not daemon:
        remove_files(paths.pid, paths.run)
        return "rrouter is not running"
    if daemon.holder.elsewhere:
        raise DaemonError(f"rrouter runs {daemon.holder.elsewhere}: stop it there")
    pid = daemon.holder.pid

    def is_gone() -> bool:
        return not daemon.holder.is_same(lock.look())

    manager = find_manager(home) if daemon.started_by in ("systemd", "launchd") else None
    if manager:
        manager.run(manager.stop)
    elif not daemon.holder.stopping:    # a second signal would cut off running requests
        send_signal(lock, daemon.holder, signal.SIGTERM)
    text = f"rrouter stopped (pid {pid})"
    if not until(is_gone, DRAIN_S + 5):
        holder = lock.look()
        if holder and daemon.holder.is_same(holder):
            send_signal(lock, holder, signal.SIGKILL)
        text = f"rrouter killed (pid {pid}): it did not stop within {DRAIN_S + 5} s"
        if not until(is_gone, 5):
            raise DaemonError(f"pid {pid} survives SIGKILL: a disk or a debugger may hold it")
        remove_files(paths.pid, paths.run)
    if not until(lambda: not _listens(daemon.host, daemon.port), 2):
        text += f"; {port_owner(daemon.port) or 'another program'} now holds port {daemon.port}"
    return text


# Terminal #####################################################################

OK, WARN, FAIL = "ok", "warn", "fail"
COLOURS = {OK: 32, WARN: 33, FAIL: 31, "antigravity": 36, "claude": 35, MODE_AUTO: 34}


def show(text: str, indent: int = 0, word: str = "", to: TextIO | None = None) -> None:
    """Print `text`; on a terminal wrap its first line and colour `word`."""
    stream, env = to or sys.stdout, os.environ.get
    is_terminal = stream.isatty()
    if is_terminal:
        import shutil
        import textwrap
        # Undo `printable` for Korean and Chinese; a stream that lacks them escapes them again.
        text = re.sub(r"\\u([3-9abc][\da-f]{3}|d[0-7][\da-f]{2})",
                      lambda found: chr(int(found[1], 16)), text)
        first, newline, rest = text.partition("\n")
        width = max(40, min(80, shutil.get_terminal_size().columns))
        text = textwrap.fill(first, width, subsequent_indent=" " * indent,
                             break_long_words=False, break_on_hyphens=False) + newline + rest
    wanted = env("FORCE_COLOR") or ("1" if is_terminal and env("TERM") != "dumb" else "0")
    if word in COLOURS and wanted != "0" and not env("NO_COLOR"):
        text = text.replace(word, f"\033[{COLOURS[word]}m{word}\033[0m", 1)
    print(text, file=stream, flush=True)


def complain(*texts: object) -> None:
    """Print each text on stderr, as a line that begins with "rrouter: "."""
    for text in texts:
        show(f"rrouter: {text}", 9, to=sys.stderr)


# Claude Code's settings #######################################################

def claude_settings_path(home: str) -> str:
    """Return where Claude Code keeps its settings."""
    directory = os.environ.get("CLAUDE_CONFIG_DIR") or os.path.join(home, ".claude")
    return os.path.join(directory, "settings.json")


def claude_environment(home: str) -> dict[str, str]:
    """Return the `env` of Claude Code's settings.json, {} without one; raise ValueError."""
    try:
        value = json.loads((read_file(claude_settings_path(home)) or b"{}").decode("utf-8-sig"))
        return {str(key): str(item) for key, item in value["env"].items()}
    except (KeyError, TypeError, AttributeError):
        return {}
    except OSError as error:
        raise ValueError(reason_of(error)) from error
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON") from error


def client_url(listener: Settings | Daemon) -> str:
    """Return the URL at which clients on this machine reach rrouter."""
    host = "localhost" if listener.host in ("0.0.0.0", "::") else listener.host
    return f"http://{Settings(host, listener.port, '').listen_addr}"


def proxy_settings(env: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return the name of a proxy variable in `env`, NO_PROXY, and NO_PROXY with this machine."""
    proxy = next((name for name, value in env.items()
                  if value and re.fullmatch("(?i)(https?|all)_proxy", name)), "")
    known = str(env.get("NO_PROXY") or env.get("no_proxy") or "")
    return proxy, known, f"{known},localhost,127.0.0.1,::1".lstrip(", ")


def edit_member(text: str, name: str, value: str | None) -> tuple[str, str | None]:
    """Set a member like `statusLine` or `env.NO_PROXY` to the JSON text `value`; None removes it.

    Returns the new settings and the member's old JSON text.  A new member comes first.  No other
    byte changes, so that each edit can be undone.  Raises ValueError.
    """
    outer, _, name = name.rpartition(".")
    position: int | None = _next_token(text, int(text.startswith("\ufeff")))
    if outer:
        position = {key: start for key, start, _ in _walk(text, position or 0, "{")}.get(outer)
    if position is None:
        return text, None
    members = [*_walk(text, position, "{")]
    ends = [position + 1, *(end for _, _, end in members)]
    index = max((index for index, member in enumerate(members) if member[0] == name), default=-1)
    if index >= 0:
        _, start, end = members[index]
        if value is not None:
            return text[:start] + value + text[end:], text[start:end]
        rest = text[end:].partition(",")[2] if index == 0 and len(members) > 1 else text[end:]
        return text[:ends[index]] + rest, text[start:end]
    if value is not None:
        rest = text[ends[0]:]
        gap = re.split(r"\S", rest, maxsplit=1)[0]
        gap += "  " * ("\n" in gap and not members)
        text = f"{text[:ends[0]]}{gap}{json.dumps(name)}: {value}{',' * bool(members)}{rest}"
    return text, None


def read_settings(path: str) -> str | None:
    """Return the text of editable settings, None if missing or empty; raise RouterError."""
    try:
        content = read_file(path)
        if content is not None and not os.stat(path).st_mode & stat.S_IWUSR:
            raise RouterError("is read-only")
        text = (content or b"{}").decode("utf-8")
        _parse_json(text.lstrip("\ufeff"))
        edit_member(text, "env.", None)         # fails unless it and its env are objects
        return text if content else None
    except (OSError, ValueError, RouterError) as error:
        why = reason_of(error) if isinstance(error, OSError) else error
        raise RouterError(f"{path}: {why}: left as it is") from error


# Installation #################################################################

SERVICE_FILES = {SYSTEMD_UNIT: """\
# As `rrouter install` writes it.  Settings: RROUTER_PORT=9000 etc. in ~/.config/rrouter.env.
[Unit]
Description=rrouter, the local router between Claude Code and CLIProxyAPI
StartLimitIntervalSec=600
StartLimitBurst=12

[Service]
Type=exec
EnvironmentFile=-%h/.config/rrouter.env
ExecStart=%h/bin/rrouter serve
ExecReload=/bin/kill -HUP $MAINPID
Restart=on-failure
RestartSec=5
RestartPreventExitStatus=2
TimeoutStopSec=45
# Only what an unprivileged user manager can apply, so that it starts in containers too.
UMask=0077
NoNewPrivileges=yes
LockPersonality=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM

[Install]
WantedBy=default.target
""", LAUNCHD_LABEL + ".plist": """\
<?xml version="1.0" encoding="UTF-8"?>
<!-- As `rrouter install` writes it.  Settings: RROUTER_PORT=9000 etc. in ~/.config/rrouter.env. -->
<plist version="1.0"><dict>
    <key>Label</key> <string>com.rrouter</string>
    <!-- launchd expands neither ~ nor $HOME, so a shell does; exec makes rrouter the job. -->
    <key>ProgramArguments</key> <array>
        <string>/bin/sh</string> <string>-c</string>
        <string>settings="$HOME/.config/rrouter.env"
            if [ -r "$settings" ]; then set -a; . "$settings"; fi
            exec "$HOME/bin/rrouter" serve</string>
    </array>
    <key>RunAtLoad</key> <true/>
    <key>KeepAlive</key> <dict> <key>SuccessfulExit</key> <false/> </dict>
    <key>ThrottleInterval</key> <integer>30</integer>
    <key>ExitTimeOut</key> <integer>45</integer>
    <!-- Streams must not wait for the throttled disk and timers of a background job. -->
    <key>ProcessType</key> <string>Interactive</string>
    <key>Umask</key> <integer>63</integer> <!-- 0077 -->
</dict></plist>
"""}
# The first digits of the SHA-256 of each default config.json that an older version wrote.
OLD_DEFAULTS = ("c191a83396e676fd",)    # 5.0.0
# The zip application begins here, also under a Python that is too old for the rest.
ZIP_MAIN = """\
import sys
if sys.version_info < (3, 9):
    sys.exit("rrouter: Python %d.%d is too old: run install.sh again" % sys.version_info[:2])
import rrouter
rrouter.main()
"""
STABLE_LINKS = ("/usr/bin/python3", "/usr/local/bin/python3", "/opt/homebrew/bin/python3")
SHEBANG_MAX_BYTES = 120         # older kernels truncate the line at 127
EMPTY_SETTINGS = b"{\n}\n"
_END_OF_URL = re.compile('(/@[^/"]*/?)?"$')     # of a URL in JSON, to which users may add /@MODE
LINK = b"link to "              # `content_of` puts it before the target of a link
WANTED_LINK = os.path.join("default.target.wants", SYSTEMD_UNIT)    # as `systemctl enable` makes it


def stable_interpreter() -> str:
    """Return a path of this Python that outlasts upgrades: $PYTHON, or a link of the system."""
    import shutil
    names = [os.environ.get("PYTHON") or "", *STABLE_LINKS]
    if sys.prefix != sys.base_prefix:           # a virtual environment may be removed
        names.append(os.path.join(sys.base_prefix, "bin", "python%d.%d" % sys.version_info[:2]))
    return next((os.path.abspath(path) for path in map(shutil.which, names)
                 if path and os.path.realpath(path) == os.path.realpath(sys.executable)),
                sys.executable)


def program_bytes(interpreter: str) -> bytes:
    """Return this program as a zip application; its compiled module makes it start fast."""
    import importlib.util
    import io
    import marshal
    import shlex
    import zipfile
    loader = globals()["__loader__"]            # of the file, or of the zip application
    source = loader.get_source(getattr(loader, "name", __name__))
    # 1 means an unchecked hash; zipimport would skip a module with another time zone's time stamp.
    module = (importlib.util.MAGIC_NUMBER + struct.pack("<L", 1)
              + importlib.util.source_hash(source.encode("utf-8"))
              + marshal.dumps(compile(source, "rrouter.py", "exec", dont_inherit=True)))
    line = f"#!{interpreter}\n"
    if re.search(r"\s", interpreter) or len(os.fsencode(line)) > SHEBANG_MAX_BYTES:
        line = f'#!/bin/sh\nexec {shlex.quote(interpreter)} "$0" "$@"\n'
    archive = io.BytesIO(os.fsencode(line))
    with zipfile.ZipFile(archive, "a") as file:
        for name, content in (("__main__.py", ZIP_MAIN), ("rrouter.py", source),
                              ("rrouter.pyc", module)):
            file.writestr(zipfile.ZipInfo(name), content)
    return archive.getvalue()


def content_of(path: str) -> bytes | None:
    """Return what a file holds or where a link leads, None for nothing; raise OSError."""
    if os.path.islink(path):
        return LINK + os.fsencode(os.readlink(path))
    if not os.path.lexists(path):
        return None
    with open_for_reading(path) as file:
        return file.read()


def digest(content: bytes) -> str:
    """Return the SHA-256 of `content`."""
    import hashlib
    return hashlib.sha256(content).hexdigest()


def convert_record(record: dict[str, Any], home: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a record of 5.0.0 in the form that `read_record` returns."""
    files = {**dict.fromkeys(record["directories"], []),
             **{path: [entry["backup"] or "", *entry["sha256"]]
                for path, entry in record["files"].items()}}
    for unit in [path for path in files if path.endswith(SYSTEMD_UNIT)]:
        link = os.path.join(os.path.dirname(unit), WANTED_LINK)
        files.update({os.path.dirname(link): [], link: ["", digest(LINK + os.fsencode(unit))]})
    if not (claude := record.get("claude")):
        return files, {}
    path = os.path.realpath(os.path.join(home, ".claude", "settings.json"))
    if claude["before"] is None:        # 5.0.0 made the file
        files[path] = ["", digest(EMPTY_SETTINGS)]
    env = (claude["before"] or {}).get("env")
    url = json.dumps(env["ANTHROPIC_BASE_URL"]) if env else None
    return files, {path: {"env": [None, {}], "env.ANTHROPIC_BASE_URL": [url, *claude["written"]]}}


def read_record(paths: Paths) -> tuple[dict[str, list[str]], dict[str, dict[str, list[Any]]]]:
    """Return what was installed; raise RouterError if the record or HOME is not usable.

    {path: [backup of what was there before or "", digests of what was written]}, [] for a
    directory; {settings.json of Claude Code: {member: [JSON text before or None, values written]}}.
    """
    home = os.path.dirname(paths.root)
    if "HOME" not in os.environ:        # `run_command` has removed an empty one
        raise UsageError("HOME is not set: set it to your home directory")
    try:
        record = json.loads(read_file(paths.record) or b"{}")
        files, settings = record.get("files", {}), record.get("settings", {})
        if "directories" in record:
            files, settings = convert_record(record, home)
        "".join(itertools.chain(*files.values()))       # fails unless all are strings
        for before, *_ in itertools.chain(*(members.values() for members in settings.values())):
            json.loads("null" if before is None else before)
        for found in filter(None, map(re.compile("(.*)/bin(/rrouter)?").fullmatch, files)):
            if found[1] != home:
                raise RouterError(f"{paths.record} is for HOME={found[1]}, but HOME is {home}: set "
                                  "the old one, or remove the file if nothing is installed there")
        return files, settings
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise RouterError(f"{paths.record}: not what rrouter wrote ({error}): repair it, or move "
                          "it away and remove by hand what is installed") from error


class Installer:
    """Installs files, and undoes the installation of those that the record names.

    The record is written before each change, so that a command that was killed can be run again or
    undone.  A file is ours only if its digest is in the record.  A dry run changes nothing.
    """

    def __init__(self, home: str, paths: Paths, dry: bool) -> None:
        self.home, self.paths, self.dry = home, paths, dry
        self.program = os.path.join(home, "bin", "rrouter")
        self.environment = os.path.join(home, ".config", "rrouter.env")
        self.files: dict[str, list[str]] = {}
        self.settings: dict[str, dict[str, list[Any]]] = {}
        self.removed: list[str] = []
        self.left: list[str] = []       #: what stays, and how to remove it
        self.failures: list[str] = []

    def save(self) -> None:
        """Write the record."""
        if not self.dry:
            record = {"files": self.files, "settings": self.settings}
            write_atomically(self.paths.record, json.dumps(record, indent=2) + "\n")

    def step(self, text: str, action: Callable[..., object], *arguments: Any) -> None:
        """Print what is done and do it; in a dry run, only print it."""
        print(f"  {'would ' * self.dry}{text}", flush=True)
        if not self.dry:
            action(*arguments)

    def attempt(self, action: Callable[..., object], *arguments: Any) -> None:
        """Do something; if that fails, note why."""
        try:
            action(*arguments)
        except (OSError, RouterError) as error:
            self.failures.append(str(error) if isinstance(error, RouterError) else
                                 f"{error.filename or self.home}: {reason_of(error)}")

    def make_directory(self, path: str) -> None:
        """Make a directory and its parents; `undo` removes them if they are empty."""
        if not os.path.isdir(path) and not (self.dry and path in self.files):
            self.make_directory(os.path.dirname(path))
            self.files[path] = []
            self.save()
            self.step(f"create {path}", os.mkdir, path, 0o755)

    def put(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Install a file or a link; keep a backup of what is there unless that is ours."""
        self.make_directory(os.path.dirname(path))
        old, new, spare = content_of(path), digest(content), ""
        backup, *ours = self.files.get(path, [""])
        write = ((os.symlink, content[len(LINK):], path) if content.startswith(LINK) else
                 (write_atomically, path, content, mode))
        if old is not None and old != content and digest(old) not in ours:
            spare = spare_name(path)
            if not ours or backup and not os.path.lexists(backup):
                backup = spare          # `undo` restores what was there first
        self.files[path] = [backup, *(other for other in ours if other != new), new]
        self.save()
        if spare:
            self.step(f"keep the old {path} as {spare}", os.rename, path, spare)
        try:
            if old != content:
                self.step(f"install {path}", *write)
        except OSError:
            if spare:                   # on a full disk the old file must still be there
                os.rename(spare, path)
            raise

    def remove(self, path: str, action: Callable[[str], None]) -> None:
        """Remove a file or directory, and note it for the report."""
        self.removed.append(path)
        self.step(f"remove {path}", action, path)

    def leave(self, path: str, what: str, command: str = "") -> None:
        """Note for the report that a path stays, and the command that removes it if safe."""
        import shlex
        remedy = f"{command} {shlex.quote(path)}" if command else "look at it before you remove it"
        self.left.append(f"{path} ({what}): {remedy}")

    def undo(self, path: str) -> None:
        """Remove what was installed unless it has changed; put back what was there before."""
        backup, *ours = self.files[path] or [""]
        old = content_of(path) if ours else None
        if not ours:
            if os.path.isdir(path) and not os.path.islink(path) and not os.listdir(path):
                self.remove(path, os.rmdir)
        elif old is not None and digest(old) not in ours:
            if not backup or os.path.lexists(backup):       # else `put` ended before the rename
                self.leave(path, "changed since it was installed", "rm")
        elif os.path.lexists(backup):
            self.step(f"put the old {path} back", os.replace, backup, path)
        elif old is not None:
            self.remove(path, os.unlink)
        del self.files[path]
        self.save()


def offer_no_proxy(text: str) -> dict[str, str]:
    """Return NO_PROXY if Claude Code needs it to reach rrouter and the user wants it, else {}."""
    proxy, known, value = proxy_settings(
        {**os.environ, **json.loads(text.lstrip("\ufeff")).get("env", {})})
    if (not proxy or {"localhost", "*"} & {*re.split("[, ]+", known)}
            or not (sys.stdin.isatty() and sys.stdout.isatty())):       # `check` says it then
        return {}
    with contextlib.suppress(EOFError):
        if input(f'  {proxy} is set, so Claude Code needs "NO_PROXY": "{value}" in its env: write '
                 "it? [Y/n] ").strip().lower() in ("", "y", "yes"):
            return {"env.NO_PROXY": value}
    return {}


def write_settings(path: str, text: str) -> None:
    """Replace a settings file; keep its mode and owner."""
    status = os.stat(path)
    write_atomically(path, text, stat.S_IMODE(status.st_mode))
    with contextlib.suppress(PermissionError):
        os.chown(path, status.st_uid, status.st_gid)


def connect_claude(work: Installer, path: str, url: str, asked: bool) -> None:
    """Point Claude Code at rrouter; unless `asked`, only update what an earlier install wrote."""
    content = read_settings(path)
    text = old = EMPTY_SETTINGS.decode() if content is None else content
    members = {**work.settings.get(path, {})}
    wanted = {"env": {}, "env.ANTHROPIC_BASE_URL": url,
              "statusLine": {"type": "command", "command": f"curl -s '{url}/health?line'"},
              **(offer_no_proxy(text) if asked and not work.dry else {})}
    for name, value in wanted.items():
        now, new = edit_member(text, name, None)[1], json.dumps(value)
        found = json.loads(_END_OF_URL.sub('"', now or "null"))     # without the user's /@MODE
        is_equal = found == value       # also if the record has been lost
        is_ours = found in members.get(name, ())[1:]
        is_free = now is None or name not in ("env", "statusLine") or is_equal and name != "env"
        if (is_ours or asked and is_free) and not (is_ours and is_equal):
            members[name] = [*(members.get(name, [None]) if is_equal or is_ours else [now]), value]
            if is_ours and (end := _END_OF_URL.search(now or "")):
                new = new[:-1] + end[0]
            text = text if is_equal else edit_member(text, name, new)[0]
    if text != old or members != work.settings.get(path, {}):
        work.settings[path] = members
        if content is None:
            work.put(path, EMPTY_SETTINGS, 0o600)
        work.save()
        work.step(f"point Claude Code at rrouter in {path}", write_settings, path, text)


def disconnect_claude(work: Installer, path: str) -> None:
    """Undo `connect_claude`, to the byte if nothing else in the settings has changed."""
    text = old = read_settings(path) or ""
    for name, (before, *written) in sorted(work.settings[path].items(), reverse=True):
        now = old and edit_member(text, name, None)[1] or "null"
        if json.loads(_END_OF_URL.sub('"', now)) in written:
            text = edit_member(text, name, before)[0]
    if path in work.files and (not old or digest(text.encode("utf-8")) in work.files[path]):
        work.files[path].append(digest(old.encode("utf-8")))
        work.undo(path)
    elif text != old:
        work.step(f"undo {', '.join(work.settings[path])} in {path}", write_settings, path, text)
    work.files.pop(path, None)          # what is left is the user's
    del work.settings[path]
    work.save()


def find_senders(here: str, home: str) -> Iterator[str]:
    """Yield the processes whose environment points `here`, and every Claude Code of `home`."""
    for process in {*glob.glob("/proc/[0-9]*")} - {f"/proc/{os.getpid()}"}:
        with contextlib.suppress(OSError):
            name, environment = ((read_file(f"{process}/{file}") or b"").decode("utf-8", "replace")
                                 for file in ("comm", "environ"))
            if re.search(rf"(?:\A|\0)ANTHROPIC_BASE_URL={here}", environment) or (
                    name == "claude\n" and home and f"HOME={home}" in environment.split("\0")):
                yield f"{printable(name.strip())} (pid {os.path.basename(process)})"


def put_environment(work: Installer) -> None:
    """Write each RROUTER_* of this shell for the service; keep those of earlier installations."""
    path, old = work.environment, content_of(work.environment)
    values = {name: os.environ[name] for name in DEFAULT_ENVIRONMENT if os.environ.get(name)}
    if old is not None and digest(old) not in work.files.get(path, ()):
        print(f"  leave {path} as it is, because it is yours")
    elif old or values:
        lines = (old or b"# Environment of the rrouter service\n").decode("utf-8").splitlines()
        lines = [line for line in lines if line.partition("=")[0] not in values]
        lines += [f"{name}='{value}'" for name, value in values.items()]
        work.put(path, "\n".join([*lines, ""]).encode("utf-8"), 0o600)


def start_installed(work: Installer, manager: Manager | None) -> None:
    """Start the new program, through `manager` if there is one."""
    def start() -> None:
        status, output = run_program((work.program, verb), 3 * MANAGER_S)
        if status:
            raise DaemonError(output.strip().removeprefix("rrouter: "))
        print("  " + output.strip().replace("\n", "\n  "))

    if manager:
        put_environment(work)
        work.put(manager.path, SERVICE_FILES[os.path.basename(manager.path)].encode("utf-8"))
        link = os.path.join(os.path.dirname(manager.path), WANTED_LINK)
        is_enabled = os.path.realpath(link) == os.path.realpath(manager.path) and (
            link in work.files or work.files[manager.path][0])      # the user had a unit before
        if manager.name == "systemd" and not is_enabled:
            work.put(link, LINK + os.fsencode(manager.path))
    verb = "restart" if Daemon.find(work.paths) else "start"
    work.step(f"run {work.program} {verb}", start)


def report_installation(work: Installer, before: bytes | None, why: str) -> None:
    """Print what was installed, what `check` says of it, and what to do next."""
    import shlex
    import shutil
    version = re.search(rb'(?m)^__version__ = "([ -~]*)"', before or b"")
    old = f" (before: {version[1].decode('ascii')})" if version else ""
    print(f"\nrrouter {__version__} is installed as {work.program}{old}"
          + f"\nno service, because {why}" * bool(why))
    files = [path for path, digests in work.files.items() if digests]
    print(f"installed or changed: {', '.join(dict.fromkeys([*files, *work.settings]))}")
    print(run_program((work.program, "check"), MANAGER_S)[1].rstrip())
    found, command = shutil.which("rrouter"), "rrouter"
    if not found or os.path.realpath(found) != os.path.realpath(work.program):
        command = shlex.quote(work.program)
        print(f"hint: {found + ' comes first' if found else '~/bin is not'} in PATH: add this to "
              'the startup file of your shell: export PATH="$HOME/bin:$PATH"')
    print(f"next: {command} status" if work.settings else
          f"next: {command} install --claude, which points Claude Code at rrouter")


def install(work: Installer, with_claude: bool) -> list[str]:
    """Install this program for the user, or upgrade it, and start it; return what failed."""
    settings = read_environment(dict(os.environ))
    for name in DEFAULT_ENVIRONMENT:
        if re.search(r"['\\\n]", os.environ.get(name, "")):
            raise UsageError(f"{name}: a service cannot have a quote, backslash or newline here")
    asked = claude_settings_path(work.home) if with_claude else ""
    if asked and not is_own_home(work.home) and not asked.startswith(work.home + "/"):
        raise UsageError(f"{asked} is not in HOME={work.home}: unset CLAUDE_CONFIG_DIR")
    work.files, work.settings = read_record(work.paths)
    program, before = program_bytes(stable_interpreter()), content_of(work.program)
    running = next(filter(os.path.isfile, (__file__, os.path.dirname(__file__))), os.devnull)
    if before and before == content_of(os.path.realpath(running)):      # copied there by hand
        work.files.setdefault(os.path.dirname(work.program), [])
        work.files[work.program] = [*work.files.get(work.program, [""]), digest(before)]
    manager, why = reach_manager(work.home)
    if not work.dry:
        work.paths.create()
    work.put(work.program, program, 0o755)
    config, mode = work.paths.config, work.paths.mode
    if digest(content_of(config) or b"")[:16] in OLD_DEFAULTS:
        spare = spare_name(config)
        work.step(f"move {config}, which holds nothing but defaults, to {spare}",
                  os.rename, config, spare)
    elif not os.path.lexists(config) and not os.path.lexists(mode):
        work.step("set the mode to auto", write_atomically, mode, "auto\n")
    start_installed(work, manager)
    url = client_url(Daemon.find(work.paths) or settings)
    asked = asked and os.path.realpath(asked)
    for path in filter(None, dict.fromkeys((*work.settings, asked))):
        # Last, because rrouter listens there only now.
        work.attempt(connect_claude, work, path, url, path == asked)
    if work.dry:
        print("nothing has been changed")
    else:
        report_installation(work, before, why)
    return [f"cannot point Claude Code at rrouter: {failure}: fix that, then run this again"
            for failure in work.failures]


def remove_installed(work: Installer, daemon: Daemon | None, purge: bool) -> None:
    """Undo what the record names; the program comes last, so that it can run again."""
    import shutil
    manager, root = find_manager(work.home), work.paths.root
    manager = manager if manager and manager.path in work.files else None
    places = [*[path for path, digests in work.files.items() if digests], *work.settings]
    for path in (*places, work.paths.record) if not work.dry else ():   # left by killed commands
        remove_files(*glob.glob(glob.escape(path) + ".[0-9]*.[0-9]*.tmp"))
    for path in list(work.settings):
        work.attempt(disconnect_claude, work, path)
    if manager:
        work.attempt(work.step, f"stop the service of {manager.name}", manager.run, manager.stop)
    if daemon:
        work.attempt(work.step, f"stop rrouter ({daemon.holder.name})",
                     stop_daemon, work.paths, work.home)
    files = [*reversed(work.files)]
    files.sort(key=work.program.startswith)
    for path in files:
        needed = [*work.settings, *[work.program] * bool(work.failures)]
        if not any(other.startswith(path) for other in needed):
            work.attempt(work.undo, path)
    for path in dict.fromkeys(places) if not work.dry else ():
        for backup in sorted(glob.glob(f"{glob.escape(path)}.bak-{'[0-9]' * 8}-*")):
            work.leave(backup, "an earlier backup")
    if manager and manager.name == "systemd":
        work.step("have systemd forget it", run_program, manager.start[0], MANAGER_S)
    if not work.failures and os.path.lexists(root):
        if not work.dry:
            remove_files(work.paths.record)
        if purge and not os.path.islink(root):
            work.attempt(work.remove, root, shutil.rmtree)
        else:
            work.leave(root, "mode, config, state and logs", "rm -r")


def uninstall(work: Installer, purge: bool) -> list[str]:
    """Undo `install`; with `purge`, remove ~/.rrouter as well; return what failed."""
    work.files, work.settings = read_record(work.paths)
    daemon, had_claude = Daemon.find(work.paths), bool(work.settings)
    written = [values for members in work.settings.values() for _, *values in members.values()]
    ports = {str(daemon.port if daemon else DEFAULT_ENVIRONMENT["RROUTER_PORT"]),
             *re.findall(r':([0-9]+)[/"\\]', json.dumps(written))}
    here = rf"http://(?:localhost|127\.0\.0\.1|\[::1\]):(?:{'|'.join(ports)})(?![0-9])"
    for path in (work.program, work.environment, *service_files(work.home)):
        if path not in work.files and os.path.lexists(path):
            work.leave(path, "not recorded as installed")
    remove_installed(work, daemon, purge)
    senders = ["this shell"] * bool(re.match(here, os.environ.get("ANTHROPIC_BASE_URL", "")))
    with contextlib.suppress(ValueError):
        url = claude_environment(work.home).get("ANTHROPIC_BASE_URL", "")
        if re.match(here, url) and not (work.dry and had_claude):
            senders.append(claude_settings_path(work.home))
    senders += find_senders(here, work.home if had_claude else "")
    print(f"\n{'would be ' * work.dry}removed: {', '.join(work.removed) or 'nothing'}")
    for line in work.left:
        print(f"stays: {line}")
    if senders:
        print(f"still pointing at rrouter: {', '.join(senders)}: remove ANTHROPIC_BASE_URL from "
              "shells and files, end processes")
    return [f"not undone: {failure}: fix that, then run this again"
            for failure in work.failures]


# Demo #########################################################################

DEMO_PAUSE_S = 0.8              # for reading a step
DEMO_COOLDOWN_S = 3
DEMO_START = """\
rrouter uses Antigravity's quota first and falls back to Claude when that fails,
without touching your session. This demo runs the real router and a scripted
CLIProxyAPI in one process: no account, no network, and it leaves no files.

Each step ends with a request for claude-sonnet-5-5 and its response: status,
the target that gave it (antigravity or claude) and the model name sent there.
"""
DEMO_NOTICE = "\n  You notice only that another model answers: no error, no restart."
# Title, mode that the step sets, whether Antigravity refuses its request, meaning.
DEMO_STEPS = (
    ("$ rrouter claude", "claude", False, "The name stays as it is."),
    ("$ rrouter antigravity", "antigravity", False, "A rule writes another name." + DEMO_NOTICE),
    ("$ rrouter auto", MODE_AUTO, False, "Antigravity, as long as it works."),
    ("Antigravity's quota runs out: from now on it responds 429", "", True,
     "Antigravity refused, so claude got the same request." + DEMO_NOTICE),
    ("the next request", "", True, "Rescued again. You notice nothing."),
    ("the next request", "", True,
     "The third failure in a row: rrouter switches to claude. You notice nothing."),
    ("the next request", "", True, "Straight to claude. You notice nothing."),
    (f"{DEMO_COOLDOWN_S} s later (30 min outside the demo) the quota is back", "", False,
     "This request probed antigravity: it worked, so everything goes back to it." + DEMO_NOTICE))
DEMO_END = """
Next, with CLIProxyAPI running on {upstream}:
  {rrouter} start     start rrouter on port {port}
  {rrouter} check     what is still missing, and what to do about it
  {rrouter} auto      the mode that you have just seen
  ANTHROPIC_BASE_URL=http://localhost:{port} ANTHROPIC_AUTH_TOKEN=KEY claude
where KEY is one of the api-keys in CLIProxyAPI's config"""
DEMO_STAY = """
This router and its upstream keep running until Ctrl-C. In another shell:
  export ANTHROPIC_BASE_URL={url} ANTHROPIC_AUTH_TOKEN=demo
  curl {url}/v1/messages -d '{{"model": "claude-sonnet-5-5"}}'"""
DEMO_EVENTS: tuple[dict[str, Any], ...] = (
    {"type": "message_start", "message": {
        "id": "msg_demo", "type": "message", "role": "assistant", "model": "demo", "content": [],
        "usage": {"input_tokens": 1, "output_tokens": 0}}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hello"}},
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 1}},
    {"type": "message_stop"})


class DemoUpstream(http.server.BaseHTTPRequestHandler):
    """A scripted CLIProxyAPI: names that begin with gemini are Antigravity's."""

    protocol_version = "HTTP/1.1"
    refuses = False             #: whether Antigravity responds 429

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""

    def do_POST(self) -> None:
        """Respond with a short stream, or with 429."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, kind, data = 200, b"text/event-stream", b"".join(
            b"event: %b\ndata: %b\n\n" % (event["type"].encode(), json.dumps(event).encode())
            for event in DEMO_EVENTS)
        if self.refuses and b'"gemini' in body:
            status, kind, data = 429, b"application/json", b'{"error": "quota exhausted"}'
        self.wfile.write(b"HTTP/1.1 %d Demo\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b"
                         % (status, kind, len(data), data))


def demo_request(port: int) -> str:
    """Send a request as Claude Code does; return status, target and model name of the response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/messages",
                           '{"model": "claude-sonnet-5-5", "stream": true, "messages": []}')
        response = connection.getresponse()
        response.read()
        target, name, tries = (response.headers[f"x-rrouter-{field}"]
                               for field in ("target", "model", "attempts"))
        return f"{response.status} {target} {name}" + ", 2 tries" * (tries == "2")


@contextlib.contextmanager
def demo_router(home: str) -> Iterator[Router]:
    """Run a scripted upstream and a router on free ports, with files in `home`."""
    paths, auto = Paths(home), {"cooldownMinutes": [DEMO_COOLDOWN_S / 60]}
    paths.create()
    write_atomically(paths.config, json.dumps({**DEFAULT_CONFIG, "auto": auto}))
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), DemoUpstream) as upstream:
        upstream.daemon_threads = True
        settings = Settings("127.0.0.1", 0, f"http://127.0.0.1:{upstream.server_address[1]}")
        router = Router(settings, paths, Log(paths.log, echo=False), "demo")
        router.store.snapshot()
        with listen(settings, router)[0] as server:
            router.settings = settings._replace(port=server.server_port)
            for each in (upstream, server):
                threading.Thread(target=each.serve_forever, daemon=True).start()
            try:
                yield router
            finally:
                server.shutdown()
                upstream.shutdown()


def cmd_demo(context: Any) -> None:
    """Show by real requests what rrouter does; with --stay, keep it running."""
    import tempfile
    shell = read_environment(dict(os.environ))          # for the last lines
    for number in (signal.SIGTERM, signal.SIGHUP):      # else they would leave the files
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="rrouter-demo-") as home, demo_router(home) as router:
        print(DEMO_START)
        for title, mode, refuses, meaning in DEMO_STEPS:
            DemoUpstream.refuses = refuses
            if mode:
                write_atomically(router.store.paths.mode, mode)
            show(title)
            left_s = router.failover.report(True)["cooldownRemainingSeconds"]
            time.sleep(DEMO_PAUSE_S if refuses else max(DEMO_PAUSE_S, left_s))
            result = demo_request(router.settings.port)
            show(f"  {result}", 2, result.split()[1])
            show(f"  {meaning}", 2)
        name = os.path.basename(sys.argv[0])
        print(DEMO_END.format(rrouter=name if name == "rrouter" else f"python3 {sys.argv[0]}",
                              port=shell.port, upstream=shell.upstream))
        if context.arguments.stay:
            print(DEMO_STAY.format(url=f"http://{router.settings.listen_addr}"), flush=True)
            signal.pause()


# Command line #################################################################

class Command(NamedTuple):
    """A row of COMMANDS."""

    usage: str                              #: name and arguments: `config [edit|reset|path]`
    aliases: tuple[str, ...]
    run: Callable[[Any], int | None]        #: gets a Context, returns the exit status, None for 0
    help: str
    example: str = ""                       #: "" for the name alone
    hidden: str = ""                        #: options that the help does not show

    @property
    def name(self) -> str:
        """The first word of its usage."""
        return self.usage.split()[0]


class Context(NamedTuple):
    """The values that every command gets."""

    home: str
    paths: Paths
    arguments: argparse.Namespace           #: `word` is the argument that is not an option
    commands: tuple[Command, ...]           #: COMMANDS


def read_config(paths: Paths) -> Config:
    """Return the config in config.json, the defaults without the file; raise RouterError."""
    try:
        return config_of(read_file(paths.config))
    except (ConfigError, UnicodeDecodeError, OSError) as error:
        where = describe_config_error(error).replace("config.json", paths.config, 1)
        raise RouterError(f"{where}: fix it with `rrouter config edit` or start over with `rrouter "
                          "config reset`") from error


def write_file(path: str, content: str | bytes) -> None:
    """Write a file of ~/.rrouter for a command; raise RouterError."""
    try:
        write_atomically(path, content)
    except OSError as error:
        why = reason_of(error)
        raise RouterError(f"{path}: {why}: check its permissions and free space") from error


def cmd_serve(context: Context) -> int:
    """Run the router in this process."""
    ready = context.arguments.ready_descriptor
    try:
        return serve(read_environment(dict(os.environ)), context.paths, ready)
    except Exception as error:
        if ready is not None:
            words = str(error) if isinstance(error, RouterError) else describe_defect(error)
            with contextlib.suppress(OSError):      # `start` may have been killed
                os.write(ready, words.encode("utf-8", "replace"))
        raise


def find_health(paths: Paths) -> tuple[Daemon | None, dict[str, Any] | None]:
    """Return the live daemon and its /health, None for what does not exist."""
    daemon = Daemon.find(paths)
    return daemon, daemon.health() if daemon and not daemon.holder.stopping else None


def print_rows(*rows: tuple[str, str], width: int = 10) -> None:
    """Print labels and texts in two columns; a text that is a mode gets its colour."""
    for label, text in rows:
        show(f"{label and label + ':':{width}}{text}", width, text)


def address_in(url: str) -> tuple[str, int]:
    """Return the host and the port of a URL; raise ValueError."""
    parts = urllib.parse.urlsplit(url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def points_to(url: str, listener: Settings | Daemon) -> bool:
    """Return whether a URL leads to the address on which rrouter listens."""
    try:
        (host, port), (ours, _) = address_in(url), address_in(client_url(listener))
        is_ours = host in (ours, listener.host) or {host, ours} <= {*LOOPBACK_NAMES}
        return is_ours and port == listener.port
    except ValueError:
        return False


def environment_of(daemon: Daemon) -> dict[str, str]:
    """Return the RROUTER_* variables that start a daemon with the settings of this one."""
    return {f"RROUTER_{name.upper()}": str(getattr(daemon, name)) for name in Settings._fields}


def find_mode(paths: Paths, health: dict[str, Any] | None) -> tuple[str, list[str]]:
    """Return the mode in force, or the one that a daemon would start in, and the problems."""
    if health:
        return health["mode"], health["problems"]
    snapshot = Store(paths, Log(paths.log, echo=False), lambda *_: None).snapshot()
    return snapshot.mode, list(snapshot.problems)


def local_time(text: str) -> str:
    """Return a time of /health as the clock here shows it, with the date unless it is today."""
    when = datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone()
    is_today = when.date() == datetime.date.today()
    return when.strftime("%H:%M" if is_today else "%Y-%m-%d %H:%M")


def describe_target(auto: dict[str, Any]) -> str:
    """Return in words which target serves, since when, why, and when the other is probed."""
    current: str = auto["currentTarget"]
    if not auto["switched"]:
        return current + (f" ({counted(auto)} before a switch)" if counted(auto) else "")
    failed, why, _ = failed_side(auto)
    when = until_probe(auto)
    return (f"{current} since {local_time(auto['switchedAt'])}: {failed} {why}; "
            f"next try {when if when == 'now' else 'in ' + when}")


def trouble_rows(daemon: Daemon, health: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a row for the upstream, with what listens there, and one for each problem."""
    url = health["upstreamURL"]
    state = ("rrouter itself: set RROUTER_UPSTREAM to the address of CLIProxyAPI"
             if points_to(url, daemon) else
             f"{'a program' if _listens(*address_in(url)) else 'nothing'} listens there")
    return [("upstream", f"{url}, {state}"),
            *(("problem", printable(problem, 500)) for problem in health["problems"])]


def status_rows(daemon: Daemon, health: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the rows that show /health to people."""
    auto, counts = health["autoSwitch"], health["requests"]
    starter, failure = health["startedBy"], counts["lastFailure"]
    yield "mode", health["mode"]
    yield "target", describe_target(auto) if auto["active"] else health["currentTarget"]
    for model, own in auto["models"].items():
        yield "", f"{printable(model)}: {describe_target(own)}"
    yield "daemon", (f"{daemon.holder.name}, {health['listenAddr']}, up "
                     f"{datetime.timedelta(seconds=health['uptimeSeconds'])}, started by "
                     + (f"`rrouter {starter}`" if starter in ("serve", "start") else starter))
    yield "requests", (f"{counts['answered']} answered, {counts['rescued']} rescued, "
                       f"{counts['failed']} failed, {health['activeRequests']} running")
    if failure:
        what = f"{failure['target']}: {failure['what']}, {local_time(failure['at'])}"
        yield "failure", "; ".join(filter(None, (what, failure.get("slow"))))
    for target, windows in health.get("usageWindows", {}).items():
        if windows:
            yield "usage", f"{target} {', '.join(describe_windows(windows))}"
    yield from trouble_rows(daemon, health)


def describe_silence(daemon: Daemon | None) -> str:
    """Return why there is no /health, and what to do."""
    if daemon is None:
        return "not running: `rrouter start` starts it"
    if daemon.holder.stopping:
        return f"{daemon.holder.name} is stopping: running requests finish first"
    if daemon.holder.elsewhere:
        return f"rrouter runs {daemon.holder.elsewhere}: run this there"
    return (f"rrouter ({daemon.holder.name}) does not answer on port {daemon.port}: see "
            "`rrouter logs`, then `rrouter restart`")


def show_status(paths: Paths, as_json: bool) -> int:
    """Print the status once; return the exit status."""
    daemon, health = find_health(paths)
    if daemon and health:
        if as_json:
            print(json.dumps(health, indent=2))
        else:
            print_rows(*status_rows(daemon, health))
        return 0
    is_silent = daemon is not None and not daemon.holder.stopping
    if as_json or is_silent:
        complain(describe_silence(daemon))
    else:
        mode, problems = find_mode(paths, None)
        print_rows(("mode", mode), ("daemon", describe_silence(daemon)),
                   *(("problem", problem) for problem in problems))
    return 1 if is_silent else 3


def cmd_status(context: Context) -> int:
    """Print mode, target, daemon, requests, upstream and problems; with --watch every second."""
    arguments = context.arguments
    while arguments.watch:
        print("\033[H\033[2J" * sys.stdout.isatty(), end="")
        show_status(context.paths, arguments.json)
        print(flush=True)
        time.sleep(1)
    return show_status(context.paths, arguments.json)


def cmd_start(context: Context) -> None:
    """Start the daemon; print what is wrong and what to do next."""
    print(start_daemon(context.paths, context.home))
    daemon, health = find_health(context.paths)
    if not daemon or not health:
        return
    rows, runs, remedy = trouble_rows(daemon, health), environment_of(daemon), "`rrouter restart`"
    if daemon.started_by in ("systemd", "launchd"):
        remedy = f"put it into ~/.config/rrouter.env, then run {remedy}"
    for name in runs:
        value = os.environ.get(name) or runs[name]
        try:
            if read_environment({**runs, name: value}) != read_environment(runs):
                rows.append(("note", f"{name}={printable(value)} in this shell is not in force: "
                                     f"{remedy}"))
        except UsageError as error:
            rows.append(("note", str(error)))
    step = "rrouter check"
    if len(rows) == 1 and "a program" in rows[0][1]:
        with contextlib.suppress(ValueError):
            if "ANTHROPIC_BASE_URL" not in {**os.environ, **claude_environment(context.home)}:
                step = f"ANTHROPIC_BASE_URL={client_url(daemon)} claude"
    print_rows(*rows, ("next", step))


def cmd_restart(context: Context) -> None:
    """Stop the daemon and start it again, with its settings except what this shell sets."""
    daemon = Daemon.find(context.paths) or Daemon.last(context.paths)      # it may have been killed
    if daemon and not find_manager(context.home):       # a service has an environment file
        for name, value in environment_of(daemon).items():
            os.environ[name] = os.environ.get(name) or value
    read_environment(dict(os.environ))      # first: a bad value must not end a running daemon
    print(stop_daemon(context.paths, context.home))
    cmd_start(context)


def show_cleared(before: dict[str, Any]) -> None:
    """Print what a mode command has cleared; `before` is `autoSwitch` before the command."""
    if before["active"]:
        notes = [f"cooldown of {failed_side(own)[0]}{f' for {printable(name)}' if name else ''} "
                 f"({failed_side(own)[2]}, {until_probe(own)})"
                 for name, own in {"": before, **before["models"]}.items() if own["switched"]]
        notes += [f"{text} of {before['currentTarget']}" for text in [counted(before)] if text]
        if notes:
            show(f"cleared: {', '.join(notes)}", 9)


def set_mode(paths: Paths, mode: str) -> None:
    """Write the mode; return when every new request is served in it."""
    paths.create()
    before = find_health(paths)[1]
    try:
        config = read_config(paths)
        choices, auto_error = config.choices, config.auto_error
    except RouterError as error:
        if not before:
            raise
        complain(error)         # the daemon continues with the last good config
        choices, auto_error = before.get("modes", []), ""
    if mode not in choices:
        raise RouterError(f"config.json: {auto_error}" if mode == MODE_AUTO and auto_error else
                          f"mode {describe_unknown_mode(mode, choices)}")
    write_file(paths.mode, mode + "\n")
    daemon, after = find_health(paths)
    if after and after["mode"] == mode:
        note = f"in force: pid {after['pid']}, {after['listenAddr']}"
    elif after is None and (not daemon or daemon.holder.stopping or daemon.holder.elsewhere):
        note = f"written; {'' if daemon else 'daemon '}{describe_silence(daemon)}"
    else:
        why = f"the daemon is in mode {after['mode']}" if after else describe_silence(daemon)
        raise DaemonError(f"mode {mode} is written to {paths.mode}, but {why}")
    show(f"mode {mode} ({note})", 5, mode)
    if before and after:
        show_cleared(before["autoSwitch"])


def cmd_mode(context: Context) -> None:
    """Print the mode, or set the one that the argument or the command itself names."""
    name = vars(context.arguments).get("word", context.arguments.command)
    if name is None:
        mode, problems = find_mode(context.paths, find_health(context.paths)[1])
        print(mode)
        complain(*problems)
    else:
        # Decoded again as UTF-8, because in the C locale Python makes surrogates of the bytes.
        set_mode(context.paths, os.fsencode(name).decode("utf-8", "replace").strip().lower())


def log_lines(path: str, word: bytes) -> Iterator[bytes]:
    """Yield the lines of the log that contain `word`, those of the rotated files first."""
    for name in [*(f"{path}.{number}" for number in range(LOG_FILES, 0, -1)), path]:
        with contextlib.suppress(FileNotFoundError), open_for_reading(name) as file:
            yield from (line for line in file if word in line)


def cmd_logs(context: Context) -> None:
    """Print the last lines of the log; with -f, follow it until Ctrl-C."""
    import subprocess
    path, word = context.paths.log, b"[AUTO]" * context.arguments.auto
    if not os.path.exists(path):
        raise RouterError(f"{path} does not exist: `rrouter start` creates it")
    lines: Iterable[bytes] = deque(log_lines(path, word), LOG_SHOWN)
    with contextlib.ExitStack() as stack:
        if context.arguments.f:
            command = ("tail", "-c", f"+{os.path.getsize(path) + 1}", "-F", path)   # -F: rotation
            tail = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE,
                                                        stderr=subprocess.DEVNULL))
            stack.callback(tail.kill)
            lines = itertools.chain(lines, tail.stdout or ())
        for line in lines:
            if word in line:
                print(line.decode("utf-8", "replace"), end="", flush=True)


def cmd_explain(context: Context) -> None:
    """Print what becomes of a model name, or of the most recent ones, in each mode."""
    config, health = read_config(context.paths), find_health(context.paths)[1]
    models = [context.arguments.word]
    if models == [None]:
        recent = b"".join(reversed(deque(log_lines(context.paths.log, b"[REQ] "), 1000)))
        models = re.findall(r"#\d+ \S+ \S+ (\S+) -> ", recent.decode("utf-8", "replace"))
        if not models:
            raise RouterError("no request yet: name a model: `rrouter explain claude-sonnet-5-5`")
    for model in list(dict.fromkeys(models))[:MODELS_SHOWN]:
        print(printable(model))
        for mode, rules in config.modes.items():
            label = f"  {mode}"
            for rule in (*rules, Rule("", model)):
                if rule.match and not match_rule([Rule(*rule[:2])], model):
                    continue
                words = ", ".join(f"{key} {glob}" for key, glob in zip(
                    ("rule", *RULE_KEYS[1:]), rule) if glob and key != "rewrite")
                text = f"{rule.rewrite} ({words or 'no rule matches'})"
                print_rows((label, printable(text)), width=15)
                label = ""
                if not any(rule[2:]):
                    break
        if not config.auto_error:
            first, second = config.auto.targets
            text = f"{first} first, {second} if it fails"
            if len({decide_route(config, target, model).model for target in (first, second)}) == 1:
                text = ("no rescue, because both targets get the same name"
                        + ", unless a rule for an agent or class matches" * bool(config.conditions))
            elif health and health["autoSwitch"]["active"]:
                auto = health["autoSwitch"]
                text = describe_target(auto["models"].get(model, auto))
            print_rows((f"  {MODE_AUTO}", text), width=15)
    mode = find_mode(context.paths, health)[0]
    show(f"in force: mode {mode}", 0, mode)


_USAGE_LINE = re.compile(
    r"([\d-]{10}) \S+ \[REQ\] #\d+ \S+ \S+(?<!/count_tokens) .* -> (\S+) (.*) (\d+) \d+\.\d\ds"
    r"(?: in (\d+)\+(\d+) out (\d+))?(.*?)(\((?:error |empty |stream |not a |the upstream ).*)?$")
# The sums that `usage` prints: their keys in JSON and their headings in the table.
USAGE_COLUMNS = {"requests": "  all", "rescued": " rescued", "failed": " failed",
                 "uncachedInputTokens": " uncached", "cachedInputTokens": " cached",
                 "outputTokens": " output"}


def add_up(lines: Iterable[bytes]) -> dict[tuple[str, ...], Counter[str]]:
    """Return the sums by day, by day and target, and by day, target and model, from log lines."""
    sums: dict[tuple[str, ...], Counter[str]] = {}
    for found in filter(None, (_USAGE_LINE.match(str(line, "utf-8", "replace")) for line in lines)):
        *key, status, fresh, cached, out, notes, defect = found.groups("0")
        failed = status != "499" and (status >= "400" or defect != "0")
        rescued = status < "400" and not failed and " failed: " in notes
        counts = 1, int(rescued), int(failed), int(fresh), int(cached), int(out)
        for depth in (1, 2, 3):
            sums.setdefault(tuple(key[:depth]), Counter()).update(dict(zip(USAGE_COLUMNS, counts)))
    return dict(sorted(sums.items()))


def in_short(count: int) -> str:
    """Return a count with at most four digits and a unit: 9999, 12k, 34M."""
    return (f"{count}" if count < 10_000 else
            f"{count // 1000}k" if count < 10_000_000 else f"{count // 1_000_000}M")


def usage_table(sums: dict[tuple[str, ...], Counter[str]]) -> Iterator[str]:
    """Yield the lines of the table; the bar of a day shows its tokens."""
    days = {key[0]: counts for key, counts in sums.items() if len(key) == 1}
    tokens = {day: sum(counts[column] for column in USAGE_COLUMNS if column.endswith("Tokens"))
              for day, counts in days.items()}
    yield f"{'':37}{'requests':^20}{'tokens':^23}".rstrip()
    yield f"{'day        tokens':37}{''.join(USAGE_COLUMNS.values())}"
    for key, counts in {**sums, ("total",): sum(days.values(), Counter())}.items():
        name = "  " * (len(key) - 1) + key[-1]
        if name in tokens:
            name += " " + "#" * (25 * tokens[name] // max(*tokens.values(), 1))
        yield f"{name:37.37}" + "".join(f"{in_short(counts[column]):>{len(heading)}}"
                                        for column, heading in USAGE_COLUMNS.items())


def cmd_usage(context: Context) -> None:
    """Print requests and tokens by day, target and model."""
    sums = add_up(log_lines(context.paths.log, b"[REQ] "))
    days = [key[0] for key in sums if len(key) == 1][-(context.arguments.days or 0):]
    sums = {key: counts for key, counts in sums.items() if key[0] in days}
    if context.arguments.json:
        print(json.dumps([dict(zip(("day", "target", "model"), key), **counts)
                          for key, counts in sums.items() if len(key) == 3], indent=2))
    elif sums:
        print("\n".join(usage_table(sums)))
    else:
        print(f"no request with a model in {context.paths.log} yet")


def config_edit(paths: Paths) -> None:
    """Open the config in the user's editor, then check it."""
    import shlex
    import subprocess
    paths.create()
    if not os.path.lexists(paths.config):
        write_file(paths.config, config_text(config_of(None)) + "\n")
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    try:
        status = subprocess.call([*shlex.split(editor), paths.config])
        why = f"ended with status {status}" if status else ""
    except (OSError, ValueError) as error:
        why = reason_of(error) if isinstance(error, OSError) else str(error)
    if why:
        raise RouterError(f"editor {printable(editor)}: {why}: set VISUAL or EDITOR")
    complain(*(f"config.json: {problem}" for problem in read_config(paths).problems))
    print(f"{paths.config} is valid")


def config_reset(paths: Paths) -> None:
    """Write the defaults; keep a copy of an existing file unless it equals them."""
    paths.create()
    old, new = read_file(paths.config), (config_text(config_of(None)) + "\n").encode()
    if old not in (None, new):
        spare = spare_name(paths.config)
        write_file(spare, old)
        print(f"kept: {spare}")
    write_file(paths.config, new)
    print(f"{paths.config} now holds the defaults")


def cmd_config(context: Context) -> None:
    """Print the effective config, its path on stderr; or edit it, reset it, or print its path."""
    action, paths = context.arguments.word, context.paths
    if action == "edit":
        config_edit(paths)
    elif action == "reset":
        config_reset(paths)
    elif action == "path":
        print(paths.config)
    else:
        note = "" if os.path.exists(paths.config) else " (does not exist: these are the defaults)"
        print(paths.config + note, file=sys.stderr)
        config = read_config(paths)
        complain(*(f"config.json: {problem}" for problem in config.problems))
        print(config_text(config))


COMPLETION = """\
_rrouter() {
    local choices='%s'
    (( COMP_CWORD > 1 )) && case ${COMP_WORDS[1]} in
%s
        *) choices= ;;
    esac
    COMPREPLY=($(compgen -W "$choices" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -F _rrouter rrouter"""


def cmd_completion(context: Context) -> None:
    """Print what the shell needs to complete commands."""
    names = " ".join(row.name for row in context.commands)
    after = {row.name: " ".join(re.findall(r"[\[| ]([a-z-]+)", row.usage))
             for row in context.commands} | {"help": names}
    with contextlib.suppress(RouterError):
        modes = filter(re.compile(r"[\w.-]+").fullmatch, read_config(context.paths).choices)
        after["mode"] = " ".join(modes)         # a quote would end the script's string
    if context.arguments.word == "fish":
        print(f"complete -c rrouter -f -n __fish_use_subcommand -a '{names}'")
        for name, words in after.items():
            print(f"complete -c rrouter -f -n '__fish_seen_subcommand_from {name}' -a '{words}'")
        return
    if context.arguments.word == "zsh":
        print("autoload -U +X compinit bashcompinit && compinit && bashcompinit")
    print(COMPLETION % (names, "\n".join(
        f"        {name}) choices='{words}' ;;" for name, words in after.items())))


def cmd_install(context: Context) -> int:
    """Install or upgrade this program for the user, or undo the installation."""
    arguments, home = context.arguments, context.home
    work = Installer(home, context.paths, arguments.dry_run)
    if os.geteuid() == 0 and os.stat(home).st_uid != 0:
        raise RouterError(f"HOME={home} belongs to another user: run this without sudo")
    with contextlib.suppress(OSError):      # NFS cannot lock a directory
        fcntl.flock(os.open(home, os.O_RDONLY), fcntl.LOCK_EX)      # one after the other
    try:
        failures = (install(work, arguments.claude) if arguments.command == "install" else
                    uninstall(work, arguments.purge))
    except (KeyboardInterrupt, BrokenPipeError):
        complain("interrupted: `install` completes it, `uninstall` undoes it")
        raise
    except OSError as error:
        raise RouterError(f"{error.filename or home}: {reason_of(error)}: fix that, then run this "
                          "again") from error
    complain(*failures)
    return 1 if failures else 0


HELP = """\
rrouter %s - local router between the Claude Code CLI and CLIProxyAPI

usage: rrouter COMMAND             new here? rrouter demo

%s

files in ~/.rrouter     mode, config.json, logs/rrouter.log (rotated at %d MB)

environment (for the service: in ~/.config/rrouter.env)
  RROUTER_PORT          port to listen on (8316)
  RROUTER_UPSTREAM      where CLIProxyAPI is (http://localhost:8317)
  RROUTER_HOST          address to listen on (localhost); anyone who can reach a
                        non-loopback address can spend your quota
  RROUTER_ALLOWED_HOSTS extra Host names, comma-separated: host.docker.internal

exit status: 0 done, 1 failed, 2 wrong usage, 3 `status` when nothing runs"""

# Words that people try as a command, and what to use instead.
HINTS = {"port": "RROUTER_PORT=8400 rrouter start", "setup": "rrouter install",
         "doctor": "rrouter check", "models": "rrouter explain", "modes": "rrouter mode NAME",
         "switch": "rrouter mode NAME", "login": "cli-proxy-api -antigravity-login",
         "edit": "rrouter config edit", "reset": "rrouter config reset"}
ARGUMENTS = {
    "--auto": "only the decisions of auto mode", "--claude": "also point Claude Code at rrouter",
    "--dry-run": "print what would be done", "--json": "print JSON",
    "--purge": "also remove ~/.rrouter", "--stay": "keep it running until Ctrl-C",
    "--watch": "refresh every second until Ctrl-C", "-f": "follow until Ctrl-C",
    "--days N": "the last N days with requests", "NAME": "the mode to set",
    "COMMAND": "show its arguments and an example", "bash|zsh|fish": "your shell",
    "MODEL": "as Claude Code sends it; without it, the most recent ones",
    "edit|reset|path": "open it in $EDITOR; write the defaults; print where it is"}


def parse_command(words: list[str], commands: tuple[Command, ...]) -> argparse.Namespace:
    """Return the parsed command line, `help` if it is empty; raise UsageError."""
    rows = {name.lower(): row for row in commands for name in (row.name, *row.aliases)}
    first, *rest = words or ["help"]
    row = rows.get(first.lower())
    if row is None:
        import difflib
        hint = HINTS.get(first.lower().lstrip("-").partition("=")[0]) or "` or `".join(
            f"rrouter {row.name} {first}" for row in commands if f"[{first}]" in row.usage)
        similar = [name for name in rows if first.isalpha() and name.startswith(first.lower())]
        similar = similar or difflib.get_close_matches(first.lower(), rows, 1)
        raise UsageError(f"no command '{printable(first, 40)}'; " + (
            f"use `{hint}`" if hint else
            f"did you mean '{similar[0]}'?" if similar else "see `rrouter help`"))
    parser = argparse.ArgumentParser(
        f"rrouter {row.name}", f"rrouter {row.usage}", row.help, allow_abbrev=False,
        exit_on_error=False, epilog=f"example: {row.example or 'rrouter ' + row.name}")
    parser.set_defaults(run=row.run, command=row.name)      # not the alias that was typed
    for argument in re.findall(r"\[[^\]]+\]|\S+", f"{row.usage} {row.hidden}")[1:]:
        word = argument.strip("[]")
        about = ARGUMENTS.get(word, argparse.SUPPRESS)
        name, _, value = word.partition(" ")
        if value:
            parser.add_argument(name, type=int, choices=range(1, 10_000), metavar=value, help=about)
        elif word[0] == "-":
            parser.add_argument(word, action="store_true", help=about)
        else:           # "" stands for a required word that is missing
            parser.add_argument("word", nargs="?", metavar=word, help=about,
                                default="" if argument == word else None,
                                choices=word.split("|") if "|" in word else None)
    try:
        found, wrong = parser.parse_known_args(rest)
    except argparse.ArgumentError:
        wrong = [" ".join(rest)]
    if wrong or vars(found).get("word") == "":      # argparse's messages are hard to understand
        takes = re.findall(r"[^][| ]+(?: [A-Z])?", row.usage)[1:]
        given = f", not '{printable(wrong[0], 40)}'" if any(wrong) else ""
        raise UsageError(f"{row.name} takes {', '.join(takes) or 'no argument'}{given}; "
                         f"see `{parser.prog} --help`")
    return found


def cmd_help(context: Context) -> None:
    """Print the help, or that of one command."""
    if context.arguments.word is None:
        rows = "\n".join(f"  {', '.join([row.usage, *row.aliases]):32} {row.help}"
                         for row in context.commands)
        print(HELP % (__version__, rows, LOG_MAX_BYTES >> 20))
    else:
        parse_command([context.arguments.word, "--help"], context.commands)


# Command line: check ##########################################################

def check_service(home: str) -> Iterator[tuple[str, str]]:
    """Yield which Python runs the installed program, and whether a service manager starts it."""
    program = os.path.join(home, "bin", "rrouter")
    head = b""
    with contextlib.suppress(OSError):
        head = (content_of(program) or b"")[:4096]
    if match := re.match(rb"#!(?:/bin/sh\nexec '?([^'\n]+?)'? \"|(\S+))", head):
        python = os.fsdecode(match[1] or match[2])
        is_gone = not os.access(python, os.X_OK)
        yield (FAIL if is_gone else OK), (f"program: {program}, run by {python}"
                                          + ", which is gone: run install.sh again" * is_gone)
    manager, why = reach_manager(home)
    path = next(filter(os.path.isfile, [manager.path] if manager else service_files(home)), None)
    if not path:
        yield OK, "service: none is installed, so nothing starts rrouter at the next login"
    elif not os.access(program, os.X_OK):
        yield FAIL, f"service: {path} starts {program}, which is gone: run install.sh again"
    elif manager is None:
        yield WARN, f"service: {path} is installed, but {why}: `rrouter start` will not use it"
    else:
        yield OK, f"service: {manager.name}, {path}"


def check_client(home: str, settings: Settings, modes: list[str]) -> Iterator[tuple[str, str]]:
    """Yield whether Claude Code is set up to use rrouter, in its settings or in this shell."""
    path, wanted = claude_settings_path(home), client_url(settings)
    try:
        in_file = claude_environment(home)
    except ValueError as error:
        yield WARN, f"claude code: cannot read {path}: {error}"
        return
    both = {**os.environ, **in_file}
    url = both.get("ANTHROPIC_BASE_URL", "")
    where = f"from {path}" if "ANTHROPIC_BASE_URL" in in_file else f"in this shell, not in {path}"
    address, *mode = url.partition("/@")
    shown = printable("".join([_without_password(address), *mode])) + f" ({where})"
    form = re.fullmatch("http://[^/]+(?:/|/@([^/]+)/?)?", url)
    proxy, exempt, names = proxy_settings(both)
    if not url:
        yield WARN, f'claude code: set {{"env": {{"ANTHROPIC_BASE_URL": "{wanted}"}}}} in {path}'
    elif not points_to(url, settings):
        yield WARN, f"claude code: points to {shown}, not to rrouter: set it to {wanted}"
    elif not form:
        yield WARN, f"claude code: {shown} will not work: use {wanted}, or {wanted}/@MODE"
    elif form[1] and modes and form[1].lower() not in modes:
        yield WARN, f"claude code: {shown}: mode {describe_unknown_mode(form[1], modes)}"
    else:
        yield OK, f"claude code: uses {shown}"
        if proxy and not re.search(r"(^|[,\s])(localhost|127\.0\.0\.1|\*)($|[,:\s])", exempt):
            state = "lacks localhost" if exempt else "is not"
            yield WARN, (f"proxy: {proxy} is set and NO_PROXY {state}, so Claude Code cannot "
                         f'reach rrouter: put "NO_PROXY": "{printable(names)}" into env in {path}')


def get_models(upstream: Upstream, fields: dict[str, str]) -> tuple[int, bytes]:
    """Return (status, body) of /v1/models; raise UpstreamUnreachable."""
    try:
        with contextlib.closing(upstream.open()) as connection, \
                total_limit(connection.sock, LIST_S):
            connection.request("GET", f"{upstream.base_path.decode()}/v1/models", headers=fields)
            response = connection.getresponse()
            return response.status, response.read(READ_AHEAD_MAX_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise UpstreamUnreachable("gives no HTTP response in time") from error


def alias_blocks(names: list[str], known: list[str]) -> str:
    """Return lines for CLIProxyAPI's config.yaml that map `names` to the most similar `known`."""
    import difflib
    entries = []
    for name in names:
        found = difflib.get_close_matches(name, known, 1, 0)[0]
        entries += [f'- name: "{printable(found, 80)}"', f'  alias: "{printable(name)}"']
        # `fork` keeps the id as well as its alias; a claude- id must mean Claude's channel alone.
        entries += [] if found.startswith("claude-") else ["  fork: true"]
    heads = (("# version 7", "oauth-model-alias:", "  antigravity:", "    "),
             ("# version 8", "oauth:", "  model-alias:", "    antigravity:", "      "))
    return "\n".join(f"        {line}" for *head, indent in heads
                     for line in (*head, *(indent + entry for entry in entries)))


def check_models(config: Config, body: bytes) -> Iterator[tuple[str, str]]:
    """Yield whether the upstream knows the names in the rules; `body` is its list of models."""
    try:
        owners = {entry["id"]: entry.get("owned_by") for entry in json.loads(body)["data"]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        yield WARN, "models: /v1/models has no list of names: cannot compare the rules with it"
        return
    rewrites = sorted({rule.rewrite for rules in config.modes.values() for rule in rules})
    missing = [name for name in rewrites if name not in owners]
    if not missing:
        yield OK, f"models: the upstream knows all {len(rewrites)} names that the rules write"
        return
    left_alone = {rule.rewrite for rule in config.modes.get("claude", ())}
    ours = [name for name in missing if name.startswith("gemini") and name not in left_alone]
    # A name in the rules may be an alias itself, and an alias of an alias is ignored.
    known = [str(name) for name, owner in owners.items()
             if owner == "antigravity" and name not in rewrites]
    remedy = "log in first: cli-proxy-api -antigravity-login" if ours else "correct your rules"
    if ours and known:
        remedy = ("use an Antigravity model id in your rules ("
                  f"{', '.join(printable(name, 60) for name in known[:6])}), or add the block for "
                  "your version to CLIProxyAPI's config.yaml, which may hold only one such block:\n"
                  + alias_blocks(ours, known))
    yield WARN, (f"models: the upstream does not know {', '.join(map(printable, missing))} (400 "
                 f"unknown provider): {remedy}")


TLS_FAULTS = {      # by OpenSSL's reason
    "CERTIFICATE_VERIFY_FAILED": "has a certificate that is not trusted ({0.verify_message}): set "
        "SSL_CERT_FILE to the file of its CA, also for the daemon, and `rrouter restart`",
    "WRONG_VERSION_NUMBER": "speaks http: set RROUTER_UPSTREAM to http://..."}


def check_upstream(home: str, settings: Settings,
                   config: Config | None) -> Iterator[tuple[str, str]]:
    """Yield whether the upstream answers, accepts the client's key, and knows the rules' names."""
    environment, label, text = dict(os.environ), f"upstream: {settings.upstream}", ""
    with contextlib.suppress(ValueError, OSError):
        environment.update(claude_environment(home))
        text = str(read_file(claude_settings_path(home)))
    variable = next(filter(environment.get, ("ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_API_KEY")), "")
    helper = "what your apiKeyHelper prints" if "apiKeyHelper" in text and not variable else ""
    key = environment.get(variable, "")
    key = key if key.isascii() and key.isprintable() else ""      # as a header requires
    status, body = 502, b"is rrouter itself"
    try:
        if not points_to(settings.upstream, settings):
            # Without Anthropic's headers: CLIProxyAPI responds to those with disguised names.
            status, body = get_models(Upstream(settings.upstream, lambda _: False),
                                      {"Authorization": f"Bearer {key}"} if key else {})
    except UpstreamUnreachable as error:
        fault = TLS_FAULTS.get(getattr(error.__cause__, "reason", ""), "{1}: {1.remedy}")
        yield FAIL, f"{label} {fault.format(error.__cause__, error)}"
        return
    if status == 502 and b"is rrouter itself" in body:
        yield FAIL, f"{label} is rrouter itself: set RROUTER_UPSTREAM to the address of CLIProxyAPI"
    elif status in (401, 403):
        words = printable(" ".join(body.decode("utf-8", "replace").split()), 200)
        words = words.replace(key, "***") if key else words
        yield (WARN if helper else FAIL), (
            f"{label} refuses {'the' if key else 'a request without a'} key ({status} {words}): "
            "compare api-keys (version 8: access.api-keys) in CLIProxyAPI's config with "
            + (helper or variable or "ANTHROPIC_AUTH_TOKEN, which Claude Code has to send"))
    elif status == 400 and b"HTTPS server" in body:         # the words of servers in Go
        yield FAIL, f"{label} speaks https: set RROUTER_UPSTREAM to https://..."
    elif status != 200:
        yield WARN, f"{label} answers /v1/models with {status}: cannot compare the rules with it"
    else:
        yield OK, f"{label} answers{' and accepts the key' if key else ''}"
        yield from check_models(config, body) if config else ()


def check_outcomes(health: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what the last failures show about the targets, and whether usage limits arrive."""
    auto, failure = health["autoSwitch"], health["requests"]["lastFailure"]
    seen = {failed_side(own)[0]: own["reason"] for own in (auto, *auto["models"].values())
            if own["switched"]}
    if failure and not seen:
        seen[failure["target"]] = f"{failure['what']}, {local_time(failure['at'])}"
    for target, why in seen.items():
        is_blocked = any(name in why for _, _, name in SHELF_WORDINGS)
        what = f"CLIProxyAPI has suspended its {target} login" if is_blocked else f"{target} failed"
        if is_blocked or (not auto["active"] and failure["at"] > str(utc(time.time() - 600))):
            yield WARN, (f"target: {what} ({printable(why)}): after a 401 log in again at "
                         "CLIProxyAPI, after a 429 wait or use the other target")
    if health.get("usageLimits") is False:
        yield WARN, ("usage limits: Claude's responses carry none, so Claude Code shows none: set "
                     "passthrough-headers: true in CLIProxyAPI (version 8: under requests)")


def run_checks(context: Context) -> Iterator[tuple[str, str]]:
    """Yield (level, text) of each check; the text begins with a label and a colon."""
    daemon, health = find_health(context.paths)
    if daemon and health:
        settings = Settings(daemon.host, daemon.port, health["upstreamURL"])
        yield OK, f"daemon: {daemon.holder.name} on {settings.listen_addr}"
        if health["version"] != __version__:
            yield WARN, (f"version: the daemon is {printable(str(health['version']))}, this "
                         f"program {__version__}: run `rrouter restart`")
    else:
        settings = read_environment(dict(os.environ))
        is_taken = daemon is None and _listens(settings.host, settings.port)
        yield FAIL, "daemon: " + (f"not running: {describe_taken(settings, context.paths)}"
                                  if is_taken else describe_silence(daemon))
    config, path = None, context.paths.config
    try:
        config = read_config(context.paths)
        yield OK, f"config: {path if os.path.exists(path) else 'the defaults'}"
        yield from ((WARN, f"config: {problem}") for problem in config.problems)
    except RouterError as error:
        yield FAIL, f"config: {error}"
    mode, problems = find_mode(context.paths, health)
    yield from ([(WARN, text) for text in problems if not text.startswith("config.json")]
                or [(OK, f"mode: {mode}")])
    yield from check_service(context.home)
    yield from check_client(context.home, settings, config.choices if config else [])
    yield from check_upstream(context.home, settings, config)
    yield from check_outcomes(health) if health else ()


def cmd_check(context: Context) -> int:
    """Print one line for each check, with the remedy, and say where to begin."""
    found = []
    for level, text in run_checks(context):
        label, _, rest = text.partition(": ")
        found.append({"level": level, "check": label, "text": rest})
        if not context.arguments.json:
            show(f"{level:5} {text}", 6, level)
    levels = [row["level"] for row in found]
    worst = next((level for level in (FAIL, WARN) if level in levels), OK)
    if context.arguments.json:
        print(json.dumps({"status": worst, "checks": found}, indent=2))
    else:
        counts = ", ".join(f"{levels.count(level)} {level}" for level in (OK, WARN, FAIL))
        begin = "" if worst == OK else f"; begin with {found[levels.index(worst)]['check']}"
        print(f"\n{len(found)} checks: {counts}{begin}")
    return 1 if worst == FAIL else 0


COMMANDS = (
    Command("demo [--stay]", (), cmd_demo, "see it work: no account, no network, 10 s"),
    Command("serve", (), cmd_serve, "run in the foreground", "", "[--ready-descriptor N]"),
    Command("start", (), cmd_start, "start the daemon (as a service if installed)",
            "RROUTER_PORT=8400 rrouter start"),
    Command("stop", (), lambda context: print(stop_daemon(context.paths, context.home)),
            "stop it; running requests finish first"),
    Command("restart", (), cmd_restart, "stop and start"),
    Command("status [--json] [--watch]", (), cmd_status, "show mode, target, requests and problems",
            "rrouter status --json | jq .currentTarget"),
    Command("usage [--days N] [--json]", (), cmd_usage, "add up requests and tokens by day",
            "rrouter usage --days 7"),
    Command("antigravity", ("ag",), cmd_mode, "rewrite model names for Antigravity"),
    Command("claude", ("c",), cmd_mode, "leave model names as they are: Claude"),
    Command("auto", ("a",), cmd_mode, "Antigravity, else Claude; repeat to retry now"),
    Command("mode [NAME]", (), cmd_mode, "print the mode, or set one from config.json",
            "rrouter mode claude"),
    Command("explain [MODEL]", (), cmd_explain, "what becomes of a model name in each mode",
            "rrouter explain claude-opus-5-5"),
    Command("logs [-f] [--auto]", (), cmd_logs, "print the end of the log",
            "rrouter logs -f --auto"),
    Command("check [--json]", ("health", "--check"), cmd_check,
            "check everything and say how to fix it"),
    Command("config [edit|reset|path]", (), cmd_config,
            "print, edit, reset or locate the config", "rrouter config | jq .auto",
            "[--yes]"),         # `reset` never asks
    Command("install [--claude] [--dry-run]", (), cmd_install,
            "install to ~/bin and start, or upgrade", "rrouter install --claude"),
    Command("uninstall [--purge] [--dry-run]", (), cmd_install, "undo install"),
    Command("completion bash|zsh|fish", (), cmd_completion, "print the completion for a shell",
            'eval "$(rrouter completion bash)"'),
    Command("help [COMMAND]", ("-h", "--help"), cmd_help, "show this help, or that of a command",
            "rrouter help config"),
    Command("version", ("-V", "--version"), lambda _: print(f"rrouter {__version__}"),
            "print the version"),
)


def run_command(words: list[str]) -> int:
    """Run one command; return its exit status."""
    for name in ("stdin", "stdout", "stderr"):  # else our files would get their numbers
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r+", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")       # type: ignore[union-attr]
    os.umask(os.umask(0o077) & 0o077)       # a stricter one would lock us out of our files
    if not os.environ.get("HOME"):
        os.environ.pop("HOME", None)        # `expanduser` then asks the user database
    try:
        try:
            arguments = parse_command(words, COMMANDS)
            home = os.path.expanduser("~")
            if not os.path.isabs(home):
                raise UsageError(f"HOME={printable(home)}: expected the absolute path of your "
                                 "home directory")
            return arguments.run(Context(home, Paths(home), arguments, COMMANDS)) or 0
        finally:
            sys.stdout.flush()
    except RouterError as error:
        complain(error)
        return error.exit_code
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)    # else the flush at exit would fail again
        if not isinstance(error, BrokenPipeError):      # it only means that the reader is gone
            complain(f"{error.filename or 'output'}: {reason_of(error)}")
        return 1
    except Exception as error:          # once, for all commands: no traceback reaches a user
        complain(describe_defect(error))
        return 1


def main() -> NoReturn:
    """Run one command; exit with its status."""
    try:
        status = run_command(sys.argv[1:])
    except KeyboardInterrupt:
        status = 130
    # From here on Ctrl-C ends the process at once, because Python would print a traceback at exit.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:           # before `main` could catch it
        sys.exit(130)
