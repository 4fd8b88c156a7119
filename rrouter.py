#!/usr/bin/env python3
"""rrouter: a local router between the Claude Code CLI and CLIProxyAPI.

    Claude Code --> rrouter (localhost:8316) --> CLIProxyAPI (localhost:8317) --> Antigravity / Claude

The path of a request, each step a function of that name in this file:

    read_request   one request, strictly framed, from the client         (ProxyHandler)
    snapshot       config and mode as they are in the files just now     (Store)
    admit          in auto mode: which target's turn it is               (Failover)
    decide_route   the first matching rule names the model               (pure)
    attempt        that one name spliced in, sent on, the head read      (ProxyHandler, Upstream)
    relay          the answer passed on as it arrives, the outcome kept  (ProxyHandler, Failover)

Files: ~/.rrouter/{mode,config.json,rrouter.pid,rrouter.lock,run.json,state.json,logs/rrouter.log}
Environment: RROUTER_PORT, RROUTER_UPSTREAM, RROUTER_HOST.  Exit status: 0 done, 1 failed, 2 usage, 3 not running.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import errno
import fcntl
import fnmatch
import itertools
import json
import mmap
import os
import re
import select
import signal
import socket
import socketserver
import stat
import struct
import sys
import threading
import time
import urllib.parse
from collections import OrderedDict, deque
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from typing import Any, NamedTuple

# `http.client` takes `ssl` along if it can: 4 MB and 15 ms that a plain upstream never needs.  Upstream fetches it.
if "ssl" not in sys.modules:
    sys.modules["ssl"] = None           # type: ignore[assignment]
import http.client
import http.server

if sys.modules["ssl"] is None:
    del sys.modules["ssl"]

__version__ = "5.0.0"


# Constants ####################################################################

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
        "timeoutThreshold": 2,              # one less than failures: each costs the user minutes
        "cooldownMinutes": [30, 60, 120, 240],
        "firstByteTimeoutSeconds": 150,     # over CLIProxyAPI's own rounds (90 s); twice is under Claude Code's 358 s
    },
}

# Of a request without "stream": true the whole answer is generated before its first byte.
UNSTREAMED_FACTOR = 2
UNSTREAMED_MAX_S = 280          # Claude Code gives up at 300 s
RETRY_AFTER_MIN_S = 60          # a shorter Retry-After would move a conversation, uncached, back and forth
MODELS_REMEMBERED = 256         # machines of single models; names come from outside
MODEL_NAME_MAX = 256            # characters; a longer name has no machine of its own

HEAD_MAX_BYTES = 64 * 1024      # request line and fields together; nginx takes 32 KiB, Go 1 MiB
FIELDS_MAX = 200
CHUNK_LINE_MAX_BYTES = 256      # size and extensions of one chunk
TRAILERS_MAX_BYTES = 8 * 1024
BODY_MAX_BYTES = 64 * 1024 * 1024   # Anthropic takes 32 MB
READ_AHEAD_MAX_BYTES = 1024 * 1024  # of an answer held back; error bodies are a few KB
READ_AHEAD_S = 10               # for the rest of an error body whose head has come, where no other limit holds

TICK_S = 0.5                    # how often a wait for the upstream looks after the client and the deadline
CONNECT_S = 3                   # for each address of the upstream; it is on this machine or near
IDLE_S = 300                    # client connection between two requests; the client should be the first to close
HEAD_S = 15                     # from the first byte of a request head to its last
BODY_STALL_S = 60               # request body without progress
WRITE_STALL_S = 300             # a client that does not read; Claude Code itself gives up after 300 s
LINGER_S = 1                    # how long a client may take to close first; what it still sends is dropped
POOL_MAX, POOL_IDLE_S = 32, 60  # idle upstream connections; servers commonly close theirs after 60 s or more
CONNECTIONS_MAX = 512           # clients at once; each costs a thread
CONNECTIONS_RESERVE = 16        # beyond that, for /health and for saying 503
BACKLOG = 128                   # VS Code opens up to 50 connections at once; the default of 5 makes them wait seconds
RECEIVE_BYTES = 64 * 1024       # from the upstream: more makes each event of a stream dearer, by 10 %
REQUEST_BYTES = 256 * 1024      # from a client: a request in one piece, 8 % faster at 77 KB
JOINED_BYTES = 64 * 1024        # smaller requests go upstream in one piece
MAPPED_BODY_BYTES = 256 * 1024  # request bodies from here on live in BodyMemory

POLL_S = 0.2                    # how often the watcher looks at the files
# A file younger than this may change again without a new time stamp: the clock of the stamps ticks every 4 to 10 ms,
# and where they are whole seconds (HFS+, FAT, some network file systems) the grain is up to 2 s.
SETTLED_S, SETTLED_COARSE_S = 0.05, 2
TRIM_S = 5                      # how often free memory is given back at most, each time when nothing is under way
FILE_MAX_BYTES = 1024 * 1024
LOG_MAX_BYTES, LOG_FILES = 10 * 1024 * 1024, 3
DRAIN_S = 30                    # for running answers when told to stop
START_S = 15                    # for a daemon to answer; the slowest machine seen needs one

MODE_AUTO = "auto"

# RFC 9110 §7.6.1, and what golang/go net/http/httputil/reverseproxy.go removes besides.
HOP_BY_HOP = frozenset((b"connection", b"proxy-connection", b"keep-alive", b"proxy-authenticate",
                        b"proxy-authorization", b"te", b"trailer", b"transfer-encoding", b"upgrade"))

# The types Anthropic's API gives these statuses: Claude Code shows and sorts errors by them.
ERROR_TYPES = {403: "permission_error", 408: "timeout_error", 413: "request_too_large", 502: "api_error",
               503: "overloaded_error", 504: "timeout_error", 500: "api_error"}

# Which of two failures helps the client more; lower is better.  Other 4xx: 0, other 5xx: 4.
RANK = {429: 1, 401: 2, 403: 2, 404: 3, 408: 4, 504: 5}

# Claude Code's own patterns (lower case, without backticks), then the wordings of Gemini, which it does not know.
# All words of a row must be there, in any order.
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
    (b"thought signature is not valid",))
EMPTY_CONTENT = b'{"type":"text","text":"(no content)"}'    # the API refuses an empty content


# Errors #######################################################################

class RouterError(Exception):
    """What went wrong, in words for the user: the thing, what is wrong with it, what to do."""

    http_status = 500
    exit_code = 1


class ConfigError(RouterError):
    """config.json does not parse or does not fit; the message begins with line:column or the JSON path."""


class StateError(RouterError):
    """state.json cannot be used."""


class UsageError(RouterError):
    """A command or the environment asks for what cannot be."""

    exit_code = 2


class DaemonError(RouterError):
    """The daemon does not start, answer or stop."""


class RequestError(RouterError):
    """The client's request is refused with `http_status`; its connection is closed, for what follows is unknown."""

    def __init__(self, http_status: int, message: str):
        super().__init__(message)
        self.http_status = http_status


class ClientGone(RouterError):
    """The client left, or broke its request off; nobody is there to be answered."""


class UpstreamError(RouterError):
    """The upstream broke off or answered what is no HTTP."""

    http_status = 502
    what = "connection dropped"
    remedy = "see the log of CLIProxyAPI"


def without_trace(error: UpstreamError) -> UpstreamError:
    """Return `error` without what led to it, to be kept.

    The calls it came through hold the request, which would hold the error: until the garbage collector comes by, the
    body of each failed request would stay in memory.
    """
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


class UpstreamUnreachable(UpstreamError):
    """No connection: whatever lives behind the upstream is not to blame."""

    what = "upstream unreachable"
    remedy = "start CLIProxyAPI or set RROUTER_UPSTREAM"


class UpstreamTimeout(UpstreamError):
    """No first byte in time."""

    http_status = 504
    what = "timeout"
    remedy = "see the log of CLIProxyAPI, or raise auto.firstByteTimeoutSeconds"


# Values #######################################################################

class Rule(NamedTuple):
    """One mapping: model names matching the glob `match` become `rewrite`."""

    match: str
    rewrite: str


class AutoSettings(NamedTuple):
    """The `auto` section of config.json."""

    targets: tuple[str, str]
    failure_threshold: int
    timeout_threshold: int
    cooldowns_s: tuple[float, ...]
    first_byte_s: float

    def first_byte_limit_s(self, streamed: bool) -> float:
        """Return how long an attempt may stay silent, in seconds."""
        return self.first_byte_s if streamed else min(self.first_byte_s * UNSTREAMED_FACTOR, UNSTREAMED_MAX_S)


class Config(NamedTuple):
    """What config.json says, checked.  `problems` are complaints that do no harm."""

    modes: dict[str, tuple[Rule, ...]]
    default_mode: str
    auto: AutoSettings
    auto_error: str             #: why mode auto cannot be used; "" if it can
    problems: tuple[str, ...]

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
    """Where a request goes: the target's name, and the model name to send there."""

    target: str
    model: str | None


class RequestHead(NamedTuple):
    """A request line and its fields, valid and unambiguous.  `length` is None for a chunked body."""

    method: str
    target: bytes               #: in origin form (or `*`), bytes untouched
    authority: str              #: what the request says it is for; "" in HTTP/1.0 without Host
    http11: bool
    fields: Fields
    length: int | None
    keep_alive: bool
    expects_continue: bool
    path: str                   #: the target without its query, which may hold secrets
    outbound: tuple[bytes, bytes] = (b"", b"")      #: what goes upstream before and behind the number of the length


class ResponseHead(NamedTuple):
    """A status line and its fields, valid and unambiguous.  `length` None: chunked, or else up to the close."""

    status: int
    reason: bytes
    end_to_end: bytes           #: the field lines that go on to the client, bytes untouched
    values: dict[bytes, bytes]  #: of the fields that the router itself reads, by name; both in lower case
    length: int | None
    chunked: bool
    keep_alive: bool

    def value(self, name: bytes) -> str:
        """Return the value of the field `name`, one of those in `values`; "" if there is none."""
        return self.values.get(name, b"").decode("latin-1")

    @property
    def is_event_stream(self) -> bool:
        """True if the body is server-sent events that can be read: an encoded one cannot."""
        return (self.values.get(b"content-type", b"").startswith(b"text/event-stream")
                and self.values.get(b"content-encoding", b"") in (b"", b"identity"))


class Ticket(NamedTuple):
    """The right to one attempt; it goes out with `admit` and comes back with its outcome."""

    target: str
    model: str
    alone: bool                 #: the model follows a machine of its own
    generation: int             #: of the machine when the attempt began
    probe: int                  #: number of the probe this is; 0 for none


class Settings(NamedTuple):
    """Where to listen and where to send, from the environment."""

    host: str
    port: int
    upstream: str

    @property
    def listen_addr(self) -> str:
        """The address as people write it."""
        return "%s:%d" % ("[%s]" % self.host if ":" in self.host else self.host, self.port)


# Text #########################################################################

def printable(text: str, limit: int = 300) -> str:
    """Return `text` fit for one line of a log, a header or a terminal: odd characters escaped, not over `limit`."""
    if len(text) > limit:
        text = text[:limit] + "..."
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if " " <= c <= "~" else c.encode("unicode_escape").decode("ascii") for c in text)


def span(seconds: float) -> str:
    """Return a duration as people say it: 30m, 90s."""
    whole = int(-(-seconds // 1))
    return "%dm" % (whole // 60) if whole >= 60 and whole % 60 == 0 else "%ds" % whole


def utc(when: float | None) -> str | None:
    """Return a time (Unix seconds) as 2026-01-29T15:00:00Z, or None for None."""
    if when is None:
        return None
    return datetime.datetime.fromtimestamp(int(when), datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def error_body(status: int, message: str) -> bytes:
    """Return one of rrouter's own errors in Anthropic's shape, whose message Claude Code shows."""
    kind = ERROR_TYPES.get(status, "invalid_request_error")
    return json.dumps({"type": "error", "error": {"type": kind, "message": "rrouter: " + message}}).encode()


def describe_defect(error: BaseException | None) -> str:
    """Return a defect of ours in one line: where and what kind, never values, which may be the user's."""
    where, trace = [], error.__traceback__ if error is not None else None
    while trace is not None:
        where.append("%s:%d" % (trace.tb_frame.f_code.co_name, trace.tb_lineno))
        trace = trace.tb_next
    return "internal error: %s at %s; please report it" % (type(error).__name__, " > ".join(where))


# Configuration ################################################################

def _parse_json(text: str) -> Any:
    # What Python's parser takes though it is no JSON, or refuses without telling where.
    # A string may lack its end: looking for one from every quote would take hours for 1 MB of \".
    for odd in re.finditer(r'(?s)"[^"\\]*(?:\\.[^"\\]*)*"?|(NaN|-?Infinity|[0-9]{1000,})', text):
        if odd.group(1):
            before = text[:odd.start()]
            raise ConfigError("%d:%d: expected a plain JSON number, found %s" % (
                before.count("\n") + 1, len(before) - before.rfind("\n"), printable(odd.group(1), 20)))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        rest = text[error.pos:error.pos + 20]
        raise ConfigError("%d:%d: %s, found %s" % (
            error.lineno, error.colno, error.msg[0].lower() + error.msg[1:].replace("Expecting", "expecting"),
            repr(rest) if rest else "the end of the file")) from error
    except RecursionError as error:     # 100,000 brackets
        raise ConfigError("1:1: expected an object of modes, found nesting that is too deep") from error


def _found(value: Any) -> str:
    try:
        return printable(json.dumps(value), 60)
    except RecursionError:              # just shallow enough to be read
        return "nesting that is too deep"


def _members(value: Any, what: str, prefix: str, known: tuple[str, ...], problems: list[str]) -> dict[str, Any]:
    """Return the object `value`; what it has beyond `known` is added to `problems`."""
    if not isinstance(value, dict):
        raise ConfigError("%s: expected an object, found %s" % (what, _found(value)))
    problems.extend("%s%s: unknown key, ignored; known are %s" % (prefix, printable(key), ", ".join(known))
                    for key in value if key not in known)
    return value


def _parse_rule(value: Any, path: str, problems: list[str]) -> Rule:
    members = _members(value, path, path + ".", ("match", "rewrite"), problems)
    for key in ("match", "rewrite"):
        if key not in members:
            raise ConfigError("%s.%s: missing, expected a string" % (path, key))
        if not isinstance(members[key], str) or not members[key]:
            raise ConfigError("%s.%s: expected a string, not empty, found %s" % (path, key, _found(members[key])))
    try:
        re.compile(fnmatch.translate(members["match"]))
    except re.error as error:           # [z-a], before Python 3.10
        raise ConfigError("%s.match: expected a glob, found %s" % (path, _found(members["match"]))) from error
    return Rule(members["match"], members["rewrite"])


def _parse_modes(value: Any, problems: list[str]) -> dict[str, tuple[Rule, ...]]:
    if not isinstance(value, dict) or not value:
        raise ConfigError("modes: expected an object with at least one mode, found %s" % _found(value))
    modes = {}
    for name, mode in value.items():
        path = "modes." + printable(name)
        if name == MODE_AUTO:
            raise ConfigError("%s: expected another name, found auto, which is built in" % path)
        if not name or name != name.lower() or not printable(name) == name or name.split() != [name]:
            raise ConfigError("%s: expected a name in lower-case ASCII without spaces, found %s" % (path, _found(name)))
        mappings = _members(mode, path, path + ".", ("mappings",), problems).get("mappings", [])
        if not isinstance(mappings, list):
            raise ConfigError("%s.mappings: expected a list, found %s" % (path, _found(mappings)))
        modes[name] = tuple(_parse_rule(rule, "%s.mappings[%d]" % (path, index), problems)
                            for index, rule in enumerate(mappings))
    return modes


def _number(value: Any, path: str, low: float, high: float, whole: bool = False) -> float:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise ConfigError("%s: expected a %snumber from %s to %s, found %s" % (
            path, "whole " if whole else "", low, high, _found(value)))
    return value


def _parse_auto(value: Any, problems: list[str]) -> AutoSettings:
    members = dict(DEFAULT_CONFIG["auto"])
    members.update(_members(value, "auto", "auto.", tuple(members), problems))
    targets, minutes = members["targets"], members["cooldownMinutes"]
    if not (isinstance(targets, list) and len(targets) == 2 and all(isinstance(t, str) for t in targets)
            and targets[0] != targets[1]):
        raise ConfigError("auto.targets: expected two different names of modes, found %s" % _found(targets))
    if not isinstance(minutes, list) or not minutes:
        raise ConfigError("auto.cooldownMinutes: expected a list of minutes, found %s" % _found(minutes))
    return AutoSettings(
        (targets[0], targets[1]),
        int(_number(members["failureThreshold"], "auto.failureThreshold", 1, 1000, whole=True)),
        int(_number(members["timeoutThreshold"], "auto.timeoutThreshold", 1, 1000, whole=True)),
        tuple(60.0 * _number(m, "auto.cooldownMinutes[%d]" % i, 0.0001, 525600) for i, m in enumerate(minutes)),
        _number(members["firstByteTimeoutSeconds"], "auto.firstByteTimeoutSeconds", 0.001, 86400))


def parse_config(text: str) -> Config:
    """Return the configuration that the JSON text `text` describes; raise ConfigError if any of it does not fit."""
    value = _parse_json(text)
    problems: list[str] = []
    top = _members(value, "the top level", "", ("modes", "defaultMode", "auto"), problems)
    if "modes" not in top:
        raise ConfigError("modes: missing, expected an object of modes")
    modes = _parse_modes(top["modes"], problems)
    default_mode = top.get("defaultMode", DEFAULT_CONFIG["defaultMode"])
    if "defaultMode" not in top and default_mode not in modes:
        default_mode = next(iter(modes))
    if default_mode != MODE_AUTO and (not isinstance(default_mode, str) or default_mode not in modes):
        raise ConfigError("defaultMode: expected one of %s, found %s" % (
            ", ".join(sorted(modes) + [MODE_AUTO]), _found(default_mode)))
    auto = _parse_auto(top.get("auto", {}), problems)
    unknown = [target for target in auto.targets if target not in modes]
    auto_error = ""
    if unknown:
        auto_error = "auto.targets: %s: not among the modes (%s), so mode auto cannot be used" % (
            ", ".join(map(_found, unknown)), ", ".join(modes))
        if "targets" in top.get("auto", {}) or default_mode == MODE_AUTO:
            problems.append(auto_error)
    return Config(modes, default_mode, auto, auto_error, tuple(problems))


def _tidy(number: float) -> float:
    return int(number) if number == int(number) else number


def config_of(content: bytes | None) -> Config:
    """Return the configuration in a file of this content, None being no file; raise ConfigError, UnicodeDecodeError."""
    return parse_config(json.dumps(DEFAULT_CONFIG) if content is None else content.decode("utf-8-sig"))


def config_text(config: Config) -> str:
    """Return `config` as the JSON text that would give it."""
    auto = config.auto
    return json.dumps({
        "modes": {name: {"mappings": [rule._asdict() for rule in rules]} for name, rules in config.modes.items()},
        "defaultMode": config.default_mode,
        "auto": {"targets": list(auto.targets), "failureThreshold": auto.failure_threshold,
                 "timeoutThreshold": auto.timeout_threshold,
                 "cooldownMinutes": [_tidy(seconds / 60) for seconds in auto.cooldowns_s],
                 "firstByteTimeoutSeconds": _tidy(auto.first_byte_s)},
    }, indent=2, ensure_ascii=False)


def _is_host_name(host: str) -> bool:
    """Return whether the name service can be asked for `host` at all: no label empty or over 63 characters."""
    try:
        return bool(host.encode("idna"))
    except UnicodeError:
        return False


def _without_password(url: str) -> str:
    return re.sub(r"(?s)\A([A-Za-z]+:/+)?.*@", r"\1***@", url)


def read_environment(environ: dict[str, str]) -> Settings:
    """Return the settings; raise UsageError naming the variable, its value and what is allowed."""
    port = environ.get("RROUTER_PORT") or "8316"
    if not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise UsageError("RROUTER_PORT=%s: expected a port number from 1 to 65535" % printable(port))
    host = (environ.get("RROUTER_HOST") or "localhost").strip("[]")
    if not re.fullmatch(r"[A-Za-z0-9._:%-]{1,253}", host) or not _is_host_name(host):
        raise UsageError("RROUTER_HOST=%s: expected localhost, an address or a host name" % printable(host))
    upstream = environ.get("RROUTER_UPSTREAM") or "http://localhost:8317"
    try:
        url = urllib.parse.urlsplit(upstream)
        fits = (url.scheme in ("http", "https") and url.hostname and url.port != 0 and "@" not in url.netloc
                and not url.query and not url.fragment and re.fullmatch("[!-~]+", upstream)
                and _is_host_name(url.hostname))
    except ValueError:                                  # a port that is none, an unclosed bracket
        fits = False
    if not fits:
        raise UsageError("RROUTER_UPSTREAM=%s: expected http://HOST[:PORT][/PATH] or https://…, without user, "
                         "query or fragment" % printable(_without_password(upstream)))
    return Settings(host, int(port), upstream.rstrip("/"))


# Routing ######################################################################

def match_rule(rules: tuple[Rule, ...], model: str) -> Rule | None:
    """Return the first rule whose glob matches `model`, case-sensitively, or None."""
    for rule in rules:
        if fnmatch.fnmatchcase(model, rule.match):
            return rule
    return None


def decide_route(config: Config, target: str, model: str | None) -> Route:
    """Return where a request for `model` goes when it is the turn of `target`."""
    rule = match_rule(config.modes[target], model) if model is not None else None
    return Route(target, rule.rewrite if rule is not None else model)


# Messages: heads ##############################################################

# `http.server` and `http.client` parse heads with the e-mail parser, which ends a head at its first odd line (the
# fields behind it, Content-Length among them, vanish and the body becomes the next request), obeys a bare CR and takes
# the first of two lengths: python/cpython#150499.  One expression that admits exactly RFC 9112 §2-5 does not.
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_NAME = re.compile(b"(?:%b)?" % _TOKEN)
_FIELDS = rb"((?:" + _TOKEN + rb":[\t\x20-\x7e\x80-\xff]*\r\n)*)"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])\r\n")
_REQUEST_HEAD = re.compile(_REQUEST_LINE.pattern + _FIELDS + rb"\r\n")
_STATUS_LINE = rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: ([\t\x20-\x7e\x80-\xff]*))?\r\n"
_RESPONSE_HEAD = re.compile(_STATUS_LINE + _FIELDS + rb"\r\n")
_TRAILERS = re.compile(_FIELDS + rb"\r\n")
# Of an answer's fields: those that are read and passed on, and with them those that are not passed on, read or not.
_READ = frozenset((b"content-length", b"content-type", b"content-encoding", b"retry-after"))
_NOTED = _READ | HOP_BY_HOP
_JOINED = frozenset((b"connection", b"transfer-encoding", b"content-length"))
# What Connection may name that is no field, or not to be named away: the body would lose its end.
_NO_FIELDS_TO_DROP = frozenset((b"", b"keep-alive", b"content-length"))
_ABSOLUTE = re.compile(rb"(?i)https?://([^/?#]*)(.*)")
_LOOPBACK = r"(?:localhost|127\.0\.0\.1|\[::1\])\.?(?::[0-9]{0,5})?"
_LOOPBACK_HOST = re.compile("(?i)" + _LOOPBACK)
_LOOPBACK_ORIGIN = re.compile("(?i)https?://" + _LOOPBACK)
_ONE_LENGTH = re.compile(rb"(?i)\r\nContent-Length:[ ]?([0-9]{1,15})\r\n")
_NUMBER = re.compile(rb"[0-9]{1,15}")
_BARE_LF = re.compile(rb"(?<!\r)\n")


def field_value(line: bytes) -> str:
    """Return the value of a field line, without the white space around it."""
    return line.partition(b":")[2].strip(b" \t").decode("latin-1")


class Fields(list[tuple[bytes, bytes]]):
    """The fields of a request in order, as (lower-case name, line as received).

    `values` holds those that the router itself reads, by name; a head is gone through once.
    """

    READ = frozenset((b"host", b"content-length", b"transfer-encoding", b"connection", b"expect", b"origin",
                      b"sec-fetch-site"))

    def __init__(self, block: bytes):
        super().__init__([(line.partition(b":")[0].lower(), line) for line in block.split(b"\r\n")[:-1]])
        self.values: dict[bytes, list[str]] = {}
        for name, line in self:
            if name in self.READ:
                self.values.setdefault(name, []).append(field_value(line))
        #: what Connection names, in lower case
        self.connection = [token.strip(" \t").lower().encode("latin-1")
                           for value in self.all(b"connection") for token in value.split(",")]

    def all(self, name: bytes) -> list[str]:
        """Return the values of the field `name`, one of READ, line by line."""
        return self.values.get(name, [])

    def end_to_end(self, *drop: bytes) -> list[tuple[bytes, bytes]]:
        """Return the fields that go on: all but the hop-by-hop ones, those named by Connection, and `drop`.

        Connection cannot name Content-Length away: the body would lose its end.
        """
        removed = HOP_BY_HOP.union(self.connection).difference((b"content-length",)).union(drop)
        return [field for field in self if field[0] not in removed]


def _refusal(head: bytes) -> RequestError:
    """Return the error that says what is wrong with a head that does not match."""
    line, _, rest = head.partition(b"\r\n")
    if not _REQUEST_LINE.match(line + b"\r\n"):
        return RequestError(400, "malformed request line: expected METHOD TARGET HTTP/1.1")
    for field in rest.split(b"\r\n"):
        if field and not _TRAILERS.fullmatch(field + b"\r\n\r\n"):
            name = _NAME.match(field).group()[:40].decode("ascii")  # type: ignore[union-attr]   # no value, no secret
            return RequestError(400, "malformed header field %s: expected NAME: VALUE without control characters, "
                                     "space before the colon or continuation lines" % printable(repr(name)))
    return RequestError(400, "malformed request head")


def _origin_form(method: bytes, target: bytes, host: str) -> tuple[bytes, str]:
    """Return (target in origin form, authority); the one in an absolute target replaces Host (RFC 9112 §3.2.2)."""
    if method in (b"CONNECT", b"TRACE"):    # a tunnel would leave the upstream; an echo would show credentials
        raise RequestError(405, "%s is not supported" % method.decode("ascii"))
    if target.startswith(b"/") or (target == b"*" and method == b"OPTIONS"):
        return target, host
    absolute = _ABSOLUTE.fullmatch(target)
    if not absolute:
        raise RequestError(400, "malformed request target: expected a path")
    path = absolute.group(2)
    return path if path.startswith(b"/") else b"/" + path, absolute.group(1).decode("ascii")


def _request_length(fields: Fields, http11: bool) -> int | None:
    """Return the length of the body in bytes, or None if it is chunked (RFC 9112 §6)."""
    lengths, codings = fields.all(b"content-length"), fields.all(b"transfer-encoding")
    if codings:
        if lengths:
            raise RequestError(400, "malformed request: both Content-Length and Transfer-Encoding")
        if not http11:
            raise RequestError(400, "malformed request: Transfer-Encoding in HTTP/1.0")
        if [coding.lower() for coding in codings] != ["chunked"]:
            raise RequestError(501, "Transfer-Encoding not supported: expected chunked alone")
        return None
    if not lengths:
        return 0
    if len(lengths) > 1 or not re.fullmatch("[0-9]{1,15}", lengths[0]):
        raise RequestError(400, "malformed request: expected one Content-Length of digits alone")
    if int(lengths[0]) > BODY_MAX_BYTES:
        raise RequestError(413, "body of %s bytes is over the limit of %d MiB" % (lengths[0], BODY_MAX_BYTES >> 20))
    return int(lengths[0])


def parse_request_head(head: bytes) -> RequestHead:
    """Return the request whose head is `head`, blank line included.

    Raises RequestError for all that RFC 9112 forbids or that two parsers might read differently.
    """
    match = _REQUEST_HEAD.fullmatch(head)
    if not match:
        raise _refusal(head)
    method, target, major, minor, block = match.groups()
    if major != b"1":
        raise RequestError(505, "HTTP version not supported: use HTTP/1.1")
    http11 = minor != b"0"
    fields = Fields(block)
    if len(fields) > FIELDS_MAX:
        raise RequestError(431, "more than %d header fields" % FIELDS_MAX)
    hosts = fields.all(b"host")
    if len(hosts) > 1 or (http11 and not hosts):
        raise RequestError(400, "malformed request: expected exactly one Host field, found %d" % len(hosts))
    target, authority = _origin_form(method, target, hosts[0] if hosts else "")
    length = _request_length(fields, http11)
    expectation = [value.lower() for value in fields.all(b"expect")] if http11 else []
    if expectation and expectation != ["100-continue"]:
        raise RequestError(417, "unknown expectation: only 100-continue is met")
    keep_alive = http11 and b"close" not in fields.connection
    return RequestHead(method.decode("ascii"), target, authority, http11, fields, length, keep_alive, bool(expectation),
                       target.partition(b"?")[0].decode("latin-1"))


def head_too_large(data: bytes) -> RequestError:
    """Return the error for a head over the limit: 414 if its first line is, else 431."""
    return RequestError(431 if b"\r\n" in data[:HEAD_MAX_BYTES] else 414,
                        "request head over %d KiB" % (HEAD_MAX_BYTES // 1024))


def check_head_start(data: bytes, seen: int) -> None:
    """Raise RequestError as soon as the incomplete head `data`, looked at up to `seen`, cannot become a valid one.

    Else a client that speaks TLS, HTTP/0.9 or bare line feeds would wait for the end of a head that never comes.
    """
    end = data.find(b"\n")
    if end >= 0 and not _REQUEST_LINE.match(data[:end + 1]):
        parse_request_head(data[:end + 1])
    if not re.match(_TOKEN, data) or _BARE_LF.search(data, seen):
        raise RequestError(400, "malformed request: expected HTTP/1.1, lines ending in CR LF")


def check_origin(head: RequestHead, only_loopback: bool) -> None:
    """Raise RequestError 403 for what a web page may send.

    Without this any page could spend the user's quota: the upstream answers every Origin and preflight with
    `Access-Control-Allow-Origin: *`, a text/plain POST needs no preflight, and a name of the page's own can be
    rebound to 127.0.0.1 (CVE-2024-28224, CVE-2025-66414).  `Sec-Fetch-Mode` is no sign: Node's fetch sends it as well.
    """
    if only_loopback and (head.authority or head.http11) and not _LOOPBACK_HOST.fullmatch(head.authority):
        raise RequestError(403, "Host %s is not this machine: use localhost, 127.0.0.1 or [::1]" % (
            printable(repr(head.authority), 80)))
    if not all(_LOOPBACK_ORIGIN.fullmatch(origin) for origin in head.fields.all(b"origin")):
        raise RequestError(403, "requests of web pages from elsewhere are refused (Origin)")
    if any(site.lower() == "cross-site" for site in head.fields.all(b"sec-fetch-site")):
        raise RequestError(403, "requests of web pages from elsewhere are refused (Sec-Fetch-Site)")


def outbound_head(head: RequestHead, authority: bytes, base_path: bytes) -> tuple[bytes, bytes]:
    """Return the head that goes upstream: the client's, Host and framing made the upstream's, in their places.

    In two parts, the number of the length to go between them; the second is empty where there is no length.
    """
    target = base_path + head.target if head.target != b"*" else head.target
    lines = [b"%b %b HTTP/1.1" % (head.method.encode("ascii"), target)]
    after: list[bytes] = []
    here, named = lines, False
    for name, line in head.fields.end_to_end():
        if name == b"host":
            line, named = b"%b: %b" % (line[:4], authority), True
        elif name == b"content-length":
            line = line[:14] + b": "
        here.append(line)
        if name == b"content-length":
            here = after
    if head.length is None:
        here.append(b"Content-Length: ")
        here = after
    if not named:
        lines.insert(1, b"Host: " + authority)
    if here is lines:
        return b"\r\n".join(lines) + b"\r\n\r\n", b""
    return b"\r\n".join(lines), b"\r\n".join([b"", *after, b"", b""])


def _tell_apart(head: bytes) -> tuple[dict[bytes, bytes], bytes]:
    """Return what of an answer's fields is read, by name, and the lines that go on to the client.

    Names and values are in lower case.  Of a field in several lines the first one counts; Connection and those that say
    where the body ends are joined by commas (RFC 9110 §5.3), so that nothing is overlooked.  The upstream's CORS fields
    stay here as well: they would open rrouter to every web page.
    """
    values: dict[bytes, bytes] = {}
    kept = []
    for line in head[head.index(b"\n") + 1:-2].split(b"\r\n")[:-1]:
        name, _, value = line.partition(b":")
        name = name.lower()
        if name in _NOTED:
            value = value.strip(b" \t").lower()
            if name not in values:
                values[name] = value
            elif name in _JOINED:
                values[name] += b"," + value
            if name not in _READ:
                continue
        elif name.startswith(b"access-control-"):
            continue
        kept.append(line)
    return values, b"\r\n".join([*kept, b""])


def _without(lines: bytes, names: Any) -> bytes:
    """Return those of the field lines `lines` whose lower-case name is not among `names`."""
    return b"".join(line + b"\r\n" for line in lines.split(b"\r\n")[:-1]
                    if line.partition(b":")[0].lower() not in names)


def parse_response_head(head: bytes) -> ResponseHead:
    """Return the answer whose head is `head`, blank line included; raise UpstreamError if it is not sound."""
    match = _RESPONSE_HEAD.fullmatch(head)
    if not match:
        raise UpstreamError("sent a malformed answer head")
    minor, status, reason = match.group(1, 2, 3)
    values, end_to_end = _tell_apart(head)
    length, coding = values.get(b"content-length"), values.get(b"transfer-encoding")
    if coding is not None and (length is not None or minor == b"0" or coding != b"chunked"):
        raise UpstreamError("sent an answer with ambiguous Transfer-Encoding")
    if length is not None and not _NUMBER.fullmatch(length):
        raise UpstreamError("sent an answer with a malformed Content-Length")
    if status == b"101":
        raise UpstreamError("switched protocols unasked")
    keep_alive = minor == b"1"
    if b"connection" in values:
        named = {token.strip(b" \t") for token in values[b"connection"].split(b",")}
        keep_alive = keep_alive and b"close" not in named
        if not named <= _NO_FIELDS_TO_DROP:
            end_to_end = _without(end_to_end, named - _NO_FIELDS_TO_DROP)
    return ResponseHead(int(status), reason or b"", end_to_end, values, int(length) if length is not None else None,
                        coding is not None, keep_alive)


def response_head_bytes(head: ResponseHead, extra: bytes) -> bytes:
    """Return the head that goes to the client: the upstream's end-to-end fields, and the lines `extra`."""
    fields = head.end_to_end
    if head.status < 200 or head.status == 204:         # RFC 9110 §8.6
        fields = _without(fields, {b"content-length"})
    return b"HTTP/1.1 %d %b\r\n%b%b\r\n" % (head.status, head.reason, fields, extra)


# Messages: bodies #############################################################

class FixedBody:
    """A body of known length, fed with bytes as they come."""

    delimited = True                    #: its end does not need the end of the connection

    def __init__(self, length: int):
        self._left = length
        self.done = not length
        self.rest = b""                 #: bytes behind the end

    def feed(self, data: bytes) -> bytes:
        """Return what of `data` is payload."""
        if len(data) > self._left:
            data, self.rest = data[:self._left], data[self._left:]
        self._left -= len(data)
        self.done = not self._left
        return data

    def finish(self) -> None:
        """Take the end of the connection; raise UpstreamError if the body is not whole."""
        raise UpstreamError("broke off in the middle of its answer")


class ClosingBody:
    """A body that ends with its connection (HTTP/1.0)."""

    delimited = False
    done = False
    rest = b""

    def feed(self, data: bytes) -> bytes:
        """Return what of `data` is payload: all."""
        return data

    def finish(self) -> None:
        """Take the end of the connection, which is the end of the body."""
        self.done = True


class ChunkedBody(FixedBody):
    """A body in chunked transfer coding (RFC 9112 §7.1), strictly; extensions and trailers are dropped.

    Each size line but the first follows the CR LF of the chunk before it.  Starting with a CR LF nobody sent makes
    them all alike.
    """

    # The lengths keep a size line within CHUNK_LINE_MAX_BYTES where it comes in one piece.
    _SIZE = re.compile(rb"\r\n([0-9A-Fa-f]{1,15})(?:[ \t]{0,20};[\t\x20-\x7e\x80-\xff]{0,200})?\r\n")
    _PLAIN_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})\r\n")
    _UNFINISHED = re.compile(rb"\r?|\r\n(?:[0-9A-Fa-f]{1,15}(?:[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?)?\r?)?")

    def __init__(self):
        super().__init__(0)
        self.done = False
        self._held = b"\r\n"            # a size line or trailers not yet whole
        self._trailers = False

    def feed(self, data: bytes) -> bytes:
        """Return the payload in `data`; raise UpstreamError where the coding is broken."""
        if self._left >= len(data):     # the middle of a large chunk
            self._left -= len(data)
            return data
        if self._held == b"\r\n":        # one whole chunk, as events come: a third of the time of what follows
            size_line = self._PLAIN_SIZE.match(data)
            if size_line and data.endswith(b"\r\n"):
                start = size_line.end()
                if start < len(data) - 2 == start + int(size_line.group(1), 16):
                    return data[start:-2]
        pieces = []
        position = self._left
        if position:
            pieces.append(data[:position])
        elif self._held:
            data, self._held = self._held + data, b""
        while not self._trailers:
            size_line = self._SIZE.match(data, position)
            if not size_line:
                self._hold(data[position:])
                return b"".join(pieces)
            start, size = size_line.end(), int(size_line.group(1), 16)
            if not size:
                self._trailers, position = True, start
                break
            position = start + size
            pieces.append(data[start:position])
            if position > len(data):
                self._left = position - len(data)
                return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._left = 0
        self._end(data[position:])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _hold(self, data: bytes) -> None:
        if len(data) > CHUNK_LINE_MAX_BYTES or not self._UNFINISHED.fullmatch(data):
            raise UpstreamError("sent a malformed chunk")
        self._left, self._held = 0, data

    def _end(self, data: bytes) -> None:
        """Take the trailers: nothing, or fields and a blank line."""
        end = 0 if data.startswith(b"\r\n") else data.find(b"\r\n\r\n") + 2
        if end == 1:                    # not found
            if len(data) > TRAILERS_MAX_BYTES or (data[:1] == b"\r" and len(data) > 1):
                raise UpstreamError("sent malformed trailers")
            self._held = data
            return
        if end > TRAILERS_MAX_BYTES or not _TRAILERS.fullmatch(data[:end + 2]):
            raise UpstreamError("sent malformed trailers")
        self.done, self.rest = True, data[end + 2:]


def response_body(head: ResponseHead, method: str) -> Any:
    """Return the decoder for the body of an answer to `method` (RFC 9112 §6.3)."""
    if method == "HEAD" or head.status in (204, 304):
        return FixedBody(0)
    if head.chunked:
        return ChunkedBody()
    return ClosingBody() if head.length is None else FixedBody(head.length)


# Messages: JSON ###############################################################

_SPACE = re.compile(r"[ \t\n\r]*")
_LEADING_MODEL = re.compile(rb'[ \t\n\r]*\{[ \t\n\r]*"model"[ \t\n\r]*:[ \t\n\r]*("[^"\\\x00-\x1f]*")[ \t\n\r]*[,}]')
_OPENS_OBJECT = re.compile(rb"[ \t\n\r]*\{")
_STREAM_MEMBER = re.compile(rb'"stream"\s*:\s*true')


def _refuse_constant(name: str) -> Any:
    raise ValueError("%s is no JSON" % name)


# The hooks spare building numbers and objects that nobody reads, and the refusal of long integers; NaN is refused.
_decode = json.JSONDecoder(
    parse_int=len, parse_float=len, parse_constant=_refuse_constant, object_pairs_hook=len).raw_decode


def _expect(text: str, position: int, character: str) -> int:
    """Return where the next value begins behind `character`, which must stand at `position`."""
    if text[position] != character:
        raise ValueError("expected %s" % character)
    return _SPACE.match(text, position + 1).end()       # type: ignore[union-attr]


def _walk_object(text: str, position: int):
    """Yield (key, start, end) of each member of the object at `position`; raise ValueError if it is none.

    After the last one the closing bracket is the next character but for white space; of an empty object nothing is
    yielded.  `raw_decode` of the standard library does the scanning, in C.
    """
    position = _expect(text, position, "{")
    if text[position] == "}":
        return
    while True:
        key, colon = _decode(text, position)
        if not isinstance(key, str) or text[position] != '"':
            raise ValueError("a key that is no string")
        start = _expect(text, _SPACE.match(text, colon).end(), ":")     # type: ignore[union-attr]
        _, end = _decode(text, start)
        yield key, start, end
        position = _SPACE.match(text, end).end()        # type: ignore[union-attr]
        if text[position] == "}":
            return
        position = _expect(text, position, ",")


def _walk_to_model(text: str) -> tuple[int, int] | None:
    try:
        found, begin = None, _SPACE.match(text).end()   # type: ignore[union-attr]
        end = begin
        for key, start, end in _walk_object(text, begin):
            if key == "model" and found is None:
                found = (start, end) if text[start] == '"' else (0, 0)
        end = _SPACE.match(text, end).end() + 1         # type: ignore[union-attr]
        whole = _SPACE.match(text, end).end() == len(text)      # type: ignore[union-attr]
    except (ValueError, IndexError, RecursionError):    # no JSON, cut short, or nested too deep
        return None
    return found if whole and found != (0, 0) else None


def find_model(body: Any) -> tuple[int, int, str] | None:
    """Return (start, end, name) of the top-level `model` string of a JSON object, or None if it has none.

    `start` and `end` are byte offsets, quotes included.  If `model` is the first member and plain, as Claude Code
    sends it, nothing behind it is looked at.  Else the whole top level is walked, so that a body that is no JSON is
    left alone, and the first `model` counts: CLIProxyAPI (gjson) reads the first as well.
    """
    leading = _LEADING_MODEL.match(body)
    try:
        if leading:
            start, end = leading.span(1)
            return start, end, str(leading.group(1)[1:-1], "utf-8")     # plain: there is nothing to unescape
        if not _OPENS_OBJECT.match(body):
            return None
        found = _walk_to_model(str(body, "latin-1"))            # latin-1: one character for each byte
        return (*found, json.loads(str(body[found[0]:found[1]], "utf-8"))) if found else None
    except ValueError:                                          # the name is no UTF-8
        return None


def _walk_array(text: str, position: int):
    """Yield (start, end) of each element of the array at `position`."""
    position = _expect(text, position, "[")
    if text[position] == "]":
        return
    while True:
        _, end = _decode(text, position)
        yield position, end
        position = _SPACE.match(text, end).end()        # type: ignore[union-attr]
        if text[position] == "]":
            return
        position = _expect(text, position, ",")


def asks_for_stream(body: Any) -> bool:
    """Return whether `body` seems to ask for a stream.  A guess by its two ends, for it only moves a time limit."""
    return bool(_STREAM_MEMBER.search(body[-2048:]) or _STREAM_MEMBER.search(body[:2048]))


@lru_cache(maxsize=256)         # the names come from config.json
def _json_string(text: str) -> bytes:
    return json.dumps(text).encode("ascii")


def splice(body: Any, start: int, end: int, model: str) -> list[Any]:
    """Return `body` in pieces, the bytes from `start` to `end` replaced by the JSON string `model`.

    Views, for joining 10 MB would cost more than sending them.
    """
    view = memoryview(body)
    return [view[:start], _json_string(model), view[end:]]


def _block_type(text: str, position: int) -> str | None:
    if text[position] != "{":
        return None
    for key, start, end in _walk_object(text, position):
        if key == "type":
            return json.loads(text[start:end]) if text[start] == '"' else None
    return None


def _thinking_cuts(text: str, message: int) -> list[tuple[int, int, bytes]]:
    """Return (start, end, replacement) of the thinking blocks of the message at `message`, with their commas."""
    for key, start, _ in _walk_object(text, message):
        if key != "content" or text[start] != "[":
            continue
        blocks = [(s, e, _block_type(text, s)) for s, e in _walk_array(text, start)]
        thinking = [kind in ("thinking", "redacted_thinking") for _, _, kind in blocks]
        if not any(thinking):
            return []
        if all(thinking):
            return [(blocks[0][0], blocks[-1][1], EMPTY_CONTENT)]
        first_kept = thinking.index(False)
        cuts = [(blocks[0][0], blocks[first_kept][0], b"")] if first_kept else []
        return cuts + [(blocks[i - 1][1], blocks[i][1], b"") for i in range(first_kept, len(blocks)) if thinking[i]]
    return []


def without_thinking(body: Any) -> bytes | None:
    """Return `body` with the thinking blocks taken out of its messages, or None if there are none.

    All other bytes stay as they are.  A content that would be left empty gets a short text block.
    """
    text = str(body, "latin-1")
    cuts: list[tuple[int, int, bytes]] = []
    try:
        for key, start, _ in _walk_object(text, _SPACE.match(text).end()):      # type: ignore[union-attr]
            if key == "messages":
                for message, _ in _walk_array(text, start):
                    cuts += _thinking_cuts(text, message)
                break
    except (ValueError, IndexError, RecursionError):
        return None
    if not cuts:
        return None
    pieces, position = [], 0
    for start, end, replacement in cuts:
        pieces += [bytes(body[position:start]), replacement]
        position = end
    return b"".join(pieces) + bytes(body[position:])


def names_foreign_signature(body: bytes) -> bool:
    """Return whether the body of a 400 says that thinking blocks of the history were signed by another backend."""
    text = bytes(body).lower().replace(b"`", b"")
    return any(all(word in text for word in words) for words in SIGNATURE_WORDINGS)


# Messages: event streams ######################################################

class EventScan:
    """What an attempt's event stream has shown so far.

    Fed with the payload as it comes.  The first event that is no ping or comment sets `failed` if it is an `error`
    (there is nothing to lose: the attempt may be rescued), else `committed`; an `error` after that sets `broken`.
    """

    _BLANK_LINE = re.compile(rb"\r\n\r\n|\n\n|\r\r|\n\r\n")
    _TYPE = re.compile(rb'^data:[ ]?\{\s*"type"\s*:\s*"([a-z_]+)"', re.M)
    # JSON escapes line feeds, so that no text of a model can look like this.
    _ERROR = re.compile(rb'(?:\A|[\r\n])(?:event:[ ]?error[ \t]*[\r\n]|data:[ ]?\{\s*"type"\s*:\s*"error")')
    _OVERLAP = 64                           # bytes; longer than what _ERROR matches

    def __init__(self):
        self.committed = self.failed = self.broken = False
        self._tail = b""

    def feed(self, payload: bytes) -> None:
        """Take more of the stream."""
        data = self._tail + payload
        if self.committed:
            if b"error" in data and self._ERROR.search(data):
                self.broken = True
            self._tail = data[-self._OVERLAP:]
            return
        position = 0
        for blank in self._BLANK_LINE.finditer(data):
            self._judge(data[position:blank.start()])
            position = blank.end()
            if self.committed or self.failed:
                break
        self._tail = data[position:]
        if self.committed:
            self._tail = b"\n"
            self.feed(data[position:])

    def _judge(self, block: bytes) -> None:
        """Take one event."""
        lines = [line for line in block.lstrip(b"\xef\xbb\xbf").splitlines() if line and not line.startswith(b":")]
        names = [line[6:].strip() for line in lines if line.startswith(b"event:")]
        if not names and not any(line.startswith(b"data") for line in lines):
            return                          # comments, or an id alone
        found = self._TYPE.search(b"\n".join(lines))
        kind = names[-1] if names else found.group(1) if found else b""
        if kind == b"error":
            self.failed = True
        elif kind != b"ping":
            self.committed = True


# Failover #####################################################################

CLOSED, OPEN, HALF_OPEN = "closed", "open", "half-open"


def blames_request(status: int) -> bool:
    """Return whether `status`, answered by both targets, says that the request (or its key) is at fault."""
    return 400 <= status < 500 and status not in (408, 429)


def rank(status: int) -> int:
    """Return how useful a failure is to the client; lower is better."""
    return RANK.get(status, 0 if status < 500 else 4)


def retry_after_s(value: str | None, now: float) -> float | None:
    """Return the seconds that a Retry-After field asks for, as a number or a date (RFC 9110 §10.2.3), else None."""
    if not value:
        return None
    if re.fullmatch("[0-9]{1,9}", value):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
        return max(0.0, date.replace(tzinfo=date.tzinfo or datetime.timezone.utc).timestamp() - now)
    except (TypeError, ValueError, IndexError, OverflowError):      # IndexError: Python 3.9
        return None


class Failure(NamedTuple):
    """A failed attempt as the machines see it."""

    what: str                           #: 429, timeout, error event ...
    timed_out: bool = False
    retry_after_s: float | None = None


# One machine answers "which of two targets?" for one scope: the whole target, or one model on it.
#
#   state      event                                        next state   what else
#   CLOSED     success of home                              CLOSED       n = 0
#   CLOSED     failure of home, n-th in a row, n < limit    CLOSED       n counted
#   CLOSED     failure of home, n = limit                   OPEN         n = 0, the N-th wait begins
#   OPEN       success of away                              OPEN         n = 0; N + 1 once for each switch
#   OPEN       failure of away, n-th in a row, n < limit    OPEN         n counted
#   OPEN       failure of away, n = limit                   CLOSED       n = 0, wait void, N stays
#   OPEN       a request asks, wait over                    HALF_OPEN    that request is the probe of home
#   HALF_OPEN  the probe succeeds                           CLOSED       n = 0: recovered
#   HALF_OPEN  the probe fails                              OPEN         n = 0, the next wait begins
#   HALF_OPEN  the probe counts for nobody                  OPEN         wait stays over: the next request is the probe
#   HALF_OPEN  success or failure of away                   as in OPEN
#   any        outcome of the target that does not serve    same         nothing (the rescue of a request, say)
#   any        failure of an attempt from before a switch   same         nothing: the switch has dealt with it
#
# n is kept for HTTP failures and for timeouts apart.  N goes back to the first wait when twice the last wait has passed
# since home was returned to, without a switch.


class Breaker:
    """Which of two targets serves one scope: `home` while closed, `away` while open.

    Methods take the time (Unix seconds, for it outlives the process) and return lines for the log.  Not locked.
    """

    def __init__(self, targets: tuple[str, str], serial: Iterator[int], label: str = ""):
        self._serial = serial           # numbers that no other breaker gives out: a ticket fits one machine alone
        self.label = label              #: " for MODEL", or ""
        self.level = 0                  # index of the next wait
        self.switch_count = 0
        self.last_cooldown_s = 0.0
        self.returned_at: float | None = None
        self.close(targets)

    def close(self, targets: tuple[str, str]) -> None:
        """Start anew on the first of `targets`; N and the number of switches stay."""
        self.home, self.away = targets
        self.state = CLOSED
        self.generation = next(self._serial)    # a new one with each change of `current`
        self.probe = 0
        self.answered = True            # whether the target last switched to has answered since
        self.reason: str | None = None
        self.switched_at: float | None = None
        self.retry_at: float | None = None
        self.failures = self.timeouts = 0       # in a row, of `current`

    @property
    def current(self) -> str:
        """The target whose turn it is."""
        return self.home if self.state == CLOSED else self.away

    @property
    def idle(self) -> bool:
        """True if there is nothing to remember."""
        return self.state == CLOSED and not (self.level or self.failures or self.timeouts)

    def remaining_s(self, now: float) -> float:
        """Return the seconds until home may be probed.  A clock that was set back does not make the wait longer."""
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

    def succeed(self, now: float, ticket: Ticket) -> list[str]:
        """Take a success of `ticket.target`."""
        if self.state == HALF_OPEN and ticket.probe == self.probe:
            self.close((self.home, self.away))
            self.returned_at = now
            return ["RECOVERED: %s answers again%s" % (self.home, self.label)]
        if ticket.target == self.current:
            self.failures = self.timeouts = 0
            self.level += not self.answered
            self.answered = True
        return []

    def fail(self, now: float, ticket: Ticket, failure: Failure, auto: AutoSettings, followed: str) -> list[str]:
        """Take a failure of `ticket.target`; `followed` is the target that the scope gets once it is closed."""
        if self.state == HALF_OPEN and ticket.probe == self.probe:
            lines = ["PROBE of %s failed%s: %s" % (self.home, self.label, failure.what)]
            return lines + self._open(now, "failed a probe, last " + failure.what, failure, auto)
        if ticket.generation != self.generation or ticket.target != self.current:
            return ["%s failed%s: %s" % (ticket.target, self.label, failure.what)]
        self.timeouts += failure.timed_out
        self.failures += not failure.timed_out
        count, limit, name = ((self.timeouts, auto.timeout_threshold, "timeouts") if failure.timed_out else
                              (self.failures, auto.failure_threshold, "HTTP errors"))
        lines = ["%s failed%s: %s (%d of %d %s in a row)" % (
            ticket.target, self.label, failure.what, count, limit, name)]
        if count < limit:
            return lines
        reason = "%d consecutive %s" % (count, name)
        if not failure.timed_out:
            reason += ", last " + failure.what
        if self.state != CLOSED and followed == self.away:
            self.close((self.away, self.home))      # closed it would follow to the very target that it leaves
        if self.state == CLOSED:
            return lines + self._open(now, reason, failure, auto)
        self.close((self.home, self.away))
        self.returned_at = now
        self.switch_count += 1
        return lines + ["SWITCH %s -> %s%s: %s" % (self.away, self.home, self.label, reason)]

    def _open(self, now: float, reason: str, failure: Failure, auto: AutoSettings) -> list[str]:
        """Leave home, or stay away from it, for the next wait."""
        self.forget_level(now)
        self.returned_at = None
        wait_s = auto.cooldowns_s[min(self.level, len(auto.cooldowns_s) - 1)]
        if failure.retry_after_s is not None:
            wait_s = min(wait_s, max(RETRY_AFTER_MIN_S, failure.retry_after_s))
        if self.state == CLOSED:
            self.generation = next(self._serial)
        self.state, self.probe, self.answered = OPEN, 0, False
        self.failures = self.timeouts = 0
        self.switch_count += 1
        self.reason, self.switched_at, self.retry_at, self.last_cooldown_s = reason, now, now + wait_s, wait_s
        return ["SWITCH %s -> %s%s: %s; retry in %s" % (self.home, self.away, self.label, reason, span(wait_s))]

    def release(self, ticket: Ticket) -> list[str]:
        """Take an outcome that counts for nobody: the probe's place is free again."""
        if self.state == HALF_OPEN and ticket.probe == self.probe:
            self.state, self.probe = OPEN, 0
            return ["PROBE of %s came to nothing%s: the next request tries" % (self.home, self.label)]
        return []

    def forget_level(self, now: float) -> None:
        """Set N back if home has held for long enough."""
        if self.returned_at is not None:
            self.returned_at = min(self.returned_at, now)
            if now - self.returned_at >= 2 * self.last_cooldown_s:
                self.level, self.returned_at = 0, None

    def report(self, now: float) -> dict[str, Any]:
        """Return what /health tells of it."""
        is_open, remaining_s = self.state != CLOSED, self.remaining_s(now)
        return {"currentTarget": self.current, "switched": is_open, "switchCount": self.switch_count,
                "failureCount": self.failures, "timeoutCount": self.timeouts,
                "reason": self.reason, "switchedAt": utc(self.switched_at), "retryAt": utc(self.retry_at),
                "cooldownSeconds": _tidy(round(self.last_cooldown_s, 3)) if is_open else 0,
                "cooldownRemainingSeconds": int(-(-remaining_s // 1))}

    SAVED: dict[str, Any] = {
        "home": (str,), "away": (str,), "level": (int,), "switch_count": (int,), "answered": (bool,), "reason": (str,),
        "switched_at": (float, int), "retry_at": (float, int), "returned_at": (float, int),
        "last_cooldown_s": (float, int)}

    def save(self) -> dict[str, Any]:
        """Return what a restart must keep: all but the counts and a probe under way."""
        return dict({name: getattr(self, name) for name in self.SAVED}, open=self.state != CLOSED)

    def restore(self, saved: Any, longest_s: float) -> None:
        """Take what `save` returned, from a file anybody may have written; raise StateError if it does not fit."""
        if not isinstance(saved, dict):
            raise StateError("expected an object")
        values: dict[str, Any] = {name: saved.get(name) for name in self.SAVED}
        for name, kinds in self.SAVED.items():
            value = values[name]
            if value is None and name.endswith(("_at", "reason")) and not (saved.get("open") and name != "returned_at"):
                continue
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise StateError("%s: expected %s" % (name, kinds[0].__name__))
            if not isinstance(value, str) and not 0 <= value < 1e11:
                raise StateError("%s: expected a number that can be" % name)
        if {values["home"], values["away"]} != {self.home, self.away} or values["last_cooldown_s"] > longest_s:
            raise StateError("the targets or waits are not those of config.json")
        vars(self).update(values, reason=values["reason"] and printable(values["reason"]))
        self.state = OPEN if saved.get("open") else CLOSED


class Failover:
    """Whose turn it is in auto mode: one breaker for the whole target, one for each model that fails alone.

    All methods may be called from any thread; `clock` returns Unix seconds.  Lines for the log are returned.
    """

    def __init__(self, clock, auto: AutoSettings):
        self._clock = clock
        self._lock = threading.Lock()
        self._serial = itertools.count(1)
        self._auto = auto
        self._clear()

    def _clear(self) -> None:
        self._whole = Breaker(self._auto.targets, self._serial)
        self._models: OrderedDict[str, Breaker] = OrderedDict()

    def reset(self, auto: AutoSettings, why: str) -> list[str]:
        """Forget everything, and go on with the settings `auto`."""
        with self._lock:
            used = not self._whole.idle or self._whole.switch_count or self._models
            self._auto = auto
            self._clear()
        return ["RESET: %s; on %s" % (why, auto.targets[0])] if used else []

    def admit(self, model: str, targets: tuple[str, str]) -> Ticket:
        """Return the ticket for the first attempt of a request; `targets` are those of the request's snapshot."""
        with self._lock:
            if targets != self._auto.targets:           # the config changed since the snapshot was taken
                return Ticket(targets[0], model, False, -1, 0)
            breaker, alone = self._breaker(model)
            target, probe = breaker.admit(self._clock())
            return Ticket(target, model, alone, breaker.generation, probe)

    def rescue(self, ticket: Ticket, targets: tuple[str, str]) -> Ticket:
        """Return the ticket for the second attempt, on the other of `targets`."""
        other = targets[1] if ticket.target == targets[0] else targets[0]
        with self._lock:
            if targets != self._auto.targets:
                return ticket._replace(target=other, generation=-1, probe=0)
            breaker, alone = self._breaker(ticket.model)
            return Ticket(other, ticket.model, alone, breaker.generation, 0)

    def current(self, model: str | None, targets: tuple[str, str]) -> str:
        """Return the target, one of `targets`, for a request that counts for nobody."""
        with self._lock:
            current = self._breaker(model)[0].current
            return current if current in targets else targets[0]

    def _breaker(self, model: str | None) -> tuple[Breaker, bool]:
        """Return (the breaker that serves `model`, whether it is the model's own)."""
        own = self._models.get(model) if model is not None else None
        return (own, True) if own is not None and own.state != CLOSED else (self._whole, False)

    def credit(self, ticket: Ticket) -> list[str]:
        """Take a success: the upstream's answer of 2xx is complete."""
        with self._lock:
            now, whole, own = self._clock(), self._whole, self._models.get(ticket.model)
            unprobing = ticket._replace(probe=0) if ticket.probe else ticket    # a probe is that of one machine alone
            generation = whole.generation
            lines = whole.succeed(now, unprobing if ticket.alone else ticket)
            if whole.generation != generation:
                self._follow()
            if own is not None:
                lines += own.succeed(now, ticket if ticket.alone else unprobing)
                self._align(ticket.model, own)
            return lines

    def charge(self, ticket: Ticket, failure: Failure) -> list[str]:
        """Take a failure.

        A model switched alone is charged in its own machine only: an exhausted model must not drag the others along,
        neither with its probes nor with what it had under way when it switched.
        """
        with self._lock:
            now, whole, own = self._clock(), self._whole, self._models.get(ticket.model)
            if ticket.alone or (own is not None and own.state != CLOSED and not ticket.probe):
                if own is None:
                    return []
                lines = own.fail(now, ticket, failure, self._auto, whole.current)
                self._align(ticket.model, own)
                return lines
            generation = whole.generation
            fresh = ticket.generation == generation and ticket.target == whole.current
            lines = whole.fail(now, ticket, failure, self._auto, whole.home)
            if whole.generation != generation:
                self._follow()
            elif fresh:
                lines += self._charge_model(now, ticket, failure)
            return lines

    def release(self, ticket: Ticket) -> list[str]:
        """Take an outcome that counts for nobody; after `credit` or `charge` it does nothing."""
        with self._lock:
            breaker = self._models.get(ticket.model) if ticket.alone else self._whole
            return breaker.release(ticket) if breaker is not None else []

    def look_at_clock(self) -> None:
        """Bound the waits by a clock that was set back: else they would begin anew only when somebody asks."""
        with self._lock:
            now = self._clock()
            for breaker in (self._whole, *self._models.values()):
                breaker.remaining_s(now)

    def _charge_model(self, now: float, ticket: Ticket, failure: Failure) -> list[str]:
        """Count a failure of the whole target for its model too; its line is told only if the model switches."""
        if len(ticket.model) > MODEL_NAME_MAX:
            return []
        own = self._models.get(ticket.model)
        if own is None:
            if len(self._models) >= MODELS_REMEMBERED:      # the one longest unseen goes, if it can be one not switched
                closed = (model for model, other in self._models.items() if other.state == CLOSED)
                del self._models[next(closed, next(iter(self._models)))]
            own = Breaker(self._ordered(), self._serial, " for " + printable(ticket.model))
            self._models[ticket.model] = own
        self._models.move_to_end(ticket.model)
        lines = own.fail(now, ticket._replace(generation=own.generation), failure, self._auto, own.home)
        return lines[1:]

    def _ordered(self) -> tuple[str, str]:
        """Return the targets, the one that serves the whole first."""
        whole = self._whole
        return (whole.home, whole.away) if whole.state == CLOSED else (whole.away, whole.home)

    def _align(self, model: str, own: Breaker) -> None:
        """Let a model follow the whole unless it is switched alone; forget it if there is nothing to remember.

        A model alone on the very target that the whole has returned to has nothing left to be alone for.
        """
        first, second = self._ordered()
        if own.state == CLOSED and own.home != first or own.state != CLOSED and own.away == first == self._whole.home:
            own.close((first, second))
        if own.idle:
            self._models.pop(model, None)

    def _follow(self) -> None:
        """Start the counts of the models anew, for the whole has moved."""
        for model, own in list(self._models.items()):
            self._align(model, own)

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
        """Take what `save` returned; raise StateError, leaving everything as it was, if it does not fit."""
        longest_s = max(self._auto.cooldowns_s)
        if not isinstance(saved, dict) or not isinstance(saved.get("models"), dict):
            raise StateError("expected an object with whole and models")
        whole = Breaker(self._auto.targets, self._serial)
        whole.restore(saved.get("whole"), longest_s)
        if whole.home != self._auto.targets[0]:
            raise StateError("whole.home: expected %s" % self._auto.targets[0])
        models: OrderedDict[str, Breaker] = OrderedDict()
        for model, own in list(saved["models"].items())[:MODELS_REMEMBERED]:
            models[model] = Breaker(self._auto.targets, self._serial, " for " + printable(model))
            models[model].restore(own, longest_s)
        with self._lock:
            self._whole, self._models = whole, models


# ---- Everything above is pure; everything below does I/O. ----


# Files ########################################################################

def reason_of(error: OSError) -> str:
    """Return the system's words for `error`, in lower case."""
    return (error.strerror or str(error) or type(error).__name__).lower()


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
        self.log = os.path.join(self.root, "logs", "rrouter.log")

    def create(self) -> None:
        """Create the directories, for this user alone; raise DaemonError if that cannot be."""
        try:
            for directory in (self.root, os.path.dirname(self.log)):
                os.makedirs(directory, 0o700, exist_ok=True)
                os.chmod(directory, 0o700)
        except OSError as error:
            raise DaemonError("%s: %s: rrouter keeps its files there; set HOME to a directory you can write" % (
                error.filename or self.root, reason_of(error))) from error


def write_atomically(path: str, text: str, durable: bool = True) -> None:
    """Write `text` to `path` so that a reader sees all of it or what was there before; mode 0600.

    A symbolic link stays, its target is replaced.  Unless `durable`, that need not hold if the machine crashes.
    Raises OSError.
    """
    path = os.path.realpath(path)
    temporary = "%s.%d.%d.tmp" % (path, os.getpid(), threading.get_ident())
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            if durable:                 # else a crash of the machine may leave the new name with no content
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def read_file(path: str) -> bytes | None:
    """Return the bytes of a regular file, or None if there is none; raise OSError for anything else at `path`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)     # a FIFO would block for ever
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        if status.st_size > FILE_MAX_BYTES:
            raise OSError(errno.EFBIG, "larger than %d bytes" % FILE_MAX_BYTES, path)
        content = b""
        while True:
            more = os.read(descriptor, FILE_MAX_BYTES)
            content += more
            if not more or len(content) > FILE_MAX_BYTES:
                return content
    finally:
        os.close(descriptor)


def _signature(path: str) -> Any:
    """Return what changes with each write of the file; None if there is none.

    Compared by equality: `mv` and `git checkout` can bring an older time.  The last member, the time of the last change
    of any kind, sees a writer who sets the other time back.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        return error.errno
    return status.st_mtime_ns, status.st_size, status.st_ino, status.st_ctime_ns


def _if_stable(signature: Any) -> Any:
    """Return `signature`, or what equals nothing if the file may change again without a new one."""
    if isinstance(signature, tuple):
        settled_s = SETTLED_S if signature[3] % 1_000_000_000 else SETTLED_COARSE_S
        if time.time() - signature[3] / 1e9 < settled_s:
            return object()
    return signature


def _write_all(descriptor: int, data: bytes) -> OSError | None:
    """Write `data`, in one piece if the system lets; return the error there was."""
    try:
        while data:
            data = data[os.write(descriptor, data):]
    except OSError as error:
        return error
    return None


def until(condition, limit_s: float) -> bool:
    """Wait until `condition()` holds, at most `limit_s`; return whether it does."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


class Log:
    """The log file: one line a call, rotated by size.  No failure of it ever reaches a request.

    The lines of requests are left to a thread of the log's own, which gathers them under load: for each of 32 busy
    connections to write its own line cost a sixth of the requests/s.  So `kill -9` can lose those of the last GATHER_S.
    """

    HELD_MAX = 10_000                   # lines; only a disk that blocks could have more wait
    GATHER_S = 0.02                     # the least time between two writes of that thread
    ECHO_S = 0.2                        # how long a stderr that takes nothing is waited for, once

    def __init__(self, path: str, echo: bool):
        self._path, self._echo = path, echo
        self._turn = threading.Lock()   # held by whoever writes
        self._order = threading.Lock()  # of the lines: that of their times
        self._left = threading.Event()  # `leave` was called
        self._lines: deque[bytes] = deque(maxlen=self.HELD_MAX)
        self._echo_stuck = False
        self._descriptor: int | None = None
        self._size = 0
        self._stamp = (0, "")           # a second and how it is written
        self.thread: int | None = None       #: the native id of the one in `write_for_ever`
        self.problem: str | None = None
        self.reopen()

    def write(self, tag: str, text: str) -> None:
        """Write one line; `text` is made printable by those who take parts of it from outside."""
        self._hold(tag, text)
        self._write_held()

    def leave(self, tag: str, text: str) -> None:
        """Leave one line to `write_for_ever`."""
        self._hold(tag, text)
        if not self._left.is_set():
            self._left.set()

    def _hold(self, tag: str, text: str) -> None:
        with self._order:
            now = time.time()
            second, stamp = self._stamp
            if second != int(now):
                second, stamp = self._stamp = int(now), time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
            if len(self._lines) == self.HELD_MAX:
                self.problem = "rrouter.log: takes nothing: log lines are lost"
            line = "%s.%03d [%s] %s\n" % (stamp, int(now % 1 * 1000), tag, text)
            self._lines.append(line.encode("utf-8", "replace"))

    def write_for_ever(self) -> None:
        """Write what is left; for a thread of its own."""
        self.thread = threading.get_native_id()
        while True:
            self._left.wait()
            self._left.clear()          # first: a line that comes from here on sets it again
            try:
                self._write_held()
            except Exception as error:  # of whatever kind: without this thread there would be no log
                self.problem = "rrouter.log: internal error: %s: log lines are lost" % type(error).__name__
            time.sleep(self.GATHER_S)

    def _write_held(self) -> None:
        if not self._turn.acquire(timeout=1):       # a disk that hangs
            self._left.set()
            return
        try:
            lines = [self._lines.popleft() for _ in range(len(self._lines))]    # only who has the turn takes any
            if lines:
                self._write_out(b"".join(lines))
        finally:
            self._turn.release()

    def _write_out(self, data: bytes) -> None:
        if self._descriptor is not None:
            problem = _write_all(self._descriptor, data)
            if problem is not None or self.problem is not None:
                self._note(problem)
            self._size += len(data)
            if self._size > LOG_MAX_BYTES:
                self._rotate(self._descriptor)
        if self._echo:
            self._write_stderr(data)

    def _write_stderr(self, data: bytes) -> None:
        """Write to stderr what it takes: a terminal may have been stopped, a pipe may be full."""
        poller = select.poll()
        poller.register(2, select.POLLOUT)
        for start in range(0, len(data), select.PIPE_BUF):      # as much goes into a pipe that takes anything
            if not poller.poll(0 if self._echo_stuck else int(self.ECHO_S * 1000)):
                self._echo_stuck = True
                return
            self._echo_stuck = False
            _write_all(2, data[start:start + select.PIPE_BUF])

    def _note(self, error: OSError | None) -> None:
        """Keep the problem for /health; say it once on stderr, which is all that is left."""
        problem = "rrouter.log: %s: log lines are lost" % reason_of(error) if error is not None else None
        if problem and not self.problem:        # the path, which /health does not tell, names the user
            self._write_stderr(("rrouter: %s (%s)\n" % (problem, self._path)).encode("utf-8", "replace"))
        self.problem = problem

    def reopen(self) -> None:
        """Open the file at the path again if it is no longer the one in use (rotated or removed by others)."""
        if self._turn.acquire(timeout=1):
            try:
                self._open()
            except OSError as error:    # what is written to a file that is no longer there is lost as well
                self._drop()
                self._note(error)
            finally:
                self._turn.release()

    def _open(self) -> None:
        try:
            there = os.stat(self._path)
            here = os.fstat(self._descriptor) if self._descriptor is not None else None
            if here is not None and (there.st_ino, there.st_dev) == (here.st_ino, here.st_dev):
                return
        except FileNotFoundError:
            os.makedirs(os.path.dirname(self._path), 0o700, exist_ok=True)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o600)    # for a FIFO
        self._drop()
        self._descriptor = descriptor
        if not self._echo:              # the daemon's stderr, for what Python itself may have to say
            os.dup2(descriptor, 2)
        self._size = os.fstat(descriptor).st_size
        self._note(None)

    def _drop(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _rotate(self, descriptor: int) -> None:
        self._size = 0                  # if it fails, it is tried again after as much more
        with contextlib.suppress(OSError):
            # Another process may write the same file: one of them rotates it, and the other finds that done.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there, here = os.stat(self._path), os.fstat(descriptor)
            if there.st_ino == here.st_ino and there.st_size > LOG_MAX_BYTES:
                for number in range(LOG_FILES - 1, 0, -1):
                    with contextlib.suppress(FileNotFoundError):
                        os.replace("%s.%d" % (self._path, number), "%s.%d" % (self._path, number + 1))
                os.replace(self._path, self._path + ".1")
            self._open()

    def close(self) -> None:
        """Give what is left, a second at the most, until it is written."""
        until(lambda: not self._lines and not self._turn.locked(), 1)


def _jsonable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def complain_about_config(error: Exception) -> str:
    """Return one line that says what is wrong with config.json and where."""
    if isinstance(error, UnicodeDecodeError):
        return "config.json: expected UTF-8, found byte 0x%02x at offset %d" % (error.object[error.start], error.start)
    if isinstance(error, OSError):
        return "config.json: cannot be read: %s" % reason_of(error)
    text = str(error)
    return "config.json%s%s" % (":" if text[:1].isdigit() else ": ", text)


class Store:
    """What the user last asked for: config and mode, always read together, and never stale.

    `changed(old, new, mode_written)` is called, one at a time, before the new snapshot is given to anybody.
    """

    def __init__(self, paths: Paths, log: Log, changed):
        self.paths, self._log, self._changed = paths, log, changed
        self._lock = threading.Lock()
        self.condition = threading.Condition()      #: notified when the watcher should look at once
        self._config = config_of(None)
        self._config_bytes: Any = None
        self._config_error: str | None = None
        self._word: str | None = None
        self._mode_error: str | None = None
        self.mode_signature: Any = None
        self._current: Snapshot = Snapshot(self._config, "", ())
        self._seen: Any = None
        self._reload(first=True)

    def snapshot(self) -> Snapshot:
        """Return config and mode as they are now: whoever wrote a file before this call is heard."""
        if (_signature(self.paths.mode), _signature(self.paths.config)) == self._seen:
            return self._current
        return self._reload()

    def wake(self) -> None:
        """Let the watcher look at once."""
        with self.condition:
            self.condition.notify_all()

    def _reload(self, first: bool = False) -> Snapshot:
        with self._lock:
            seen: Any = _signature(self.paths.mode), _signature(self.paths.config)
            self._read_config()
            written = self._read_mode(seen[0]) and not first
            old, new = self._current, self._compose()
            if first:
                self._log.write("MODE", new.mode)
            elif new.mode != old.mode:
                self._log.write("MODE", "%s -> %s" % (old.mode, new.mode))
            if not first and (written or new != old):
                self._changed(old, new, written)
            self._current = new
            readable = self._mode_error is None and not isinstance(self._config_bytes, OSError)
            # Last: who sees it may use _current without the lock.  What could not be read is tried again at once.
            self._seen = tuple(map(_if_stable, seen)) if readable else None
            return new

    def _read_config(self) -> None:
        try:
            content = read_file(self.paths.config)
            if content == self._config_bytes and not isinstance(self._config_bytes, OSError):
                return
            self._config_bytes = content
            self._config = config_of(content)
            self._config_error = None
            for problem in self._config.problems:
                self._log.write("CONFIG", "config.json: " + problem)
            self._log.write("CONFIG", "config.json loaded" if content is not None else "no config.json: the defaults")
        except (ConfigError, UnicodeDecodeError, OSError) as error:
            complaint = complain_about_config(error)
            if isinstance(error, OSError):
                self._config_bytes = error
            if complaint != self._config_error:
                self._config_error = complaint
                self._log.write("CONFIG", complaint + "; the previous one stays in force")

    def _read_mode(self, signature: Any) -> bool:
        """Read the mode file; return whether it was written since it was last read."""
        try:
            content = read_file(self.paths.mode)
        except OSError as error:
            self._mode_error = "mode: %s: the mode in force stays" % reason_of(error)
            return False
        self._mode_error = None
        word = content.decode("utf-8", "backslashreplace").strip().lower() if content is not None else None
        if word == "":                  # somebody is just writing it
            return False
        self._word = word
        written = signature[:3] if isinstance(signature, tuple) else signature      # chmod is no writing
        changed, self.mode_signature = written != self.mode_signature, written
        return changed

    def _compose(self) -> Snapshot:
        config, word = self._config, self._word
        mode = config.resolve(word if word is not None else config.default_mode)
        problems = [self._config_error, *("config.json: " + problem for problem in config.problems), self._mode_error]
        if word is not None and word != mode:
            if word == MODE_AUTO:
                problems += [p for p in ["config.json: " + config.auto_error] if p not in problems]
            else:
                problems.append("mode: %r is not defined by config.json (defined: %s); %s is in force" % (
                    printable(word, 40), ", ".join([*config.modes, MODE_AUTO]), mode))
        return Snapshot(config, mode, tuple(problem for problem in problems if problem))

    def save_state(self, mode_signature: Any, failover: dict[str, Any]) -> None:
        """Write the state of auto mode to state.json; raise OSError."""
        auto = list(map(_jsonable, self._current.config.auto))
        write_atomically(self.paths.state, json.dumps({
            "version": 1, "modeFile": _jsonable(mode_signature), "auto": auto, **failover}, indent=1) + "\n")

    def load_state(self) -> dict[str, Any] | None:
        """Return what `save_state` wrote, or None if there is nothing to go on with; raise StateError."""
        try:
            content = read_file(self.paths.state)
        except OSError as error:
            raise StateError(reason_of(error)) from error
        if content is None:
            return None
        try:
            state = json.loads(content.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise StateError("not the JSON that rrouter wrote") from error
        if not isinstance(state, dict) or state.get("version") != 1:
            raise StateError("not what this version of rrouter writes")
        if state.get("modeFile") != _jsonable(self.mode_signature):
            raise StateError("the mode file was written since")
        if state.get("auto") != list(map(_jsonable, self._current.config.auto)):
            raise StateError("the auto section of config.json was written since")
        return state


# Upstream #####################################################################

# As a number: `|` of the standard library's flags is Python code of 5 us.
PEEK_NOW = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)
NOTHING_CAME = (BlockingIOError, socket.timeout)        # within the socket's time limit
SSL_ERROR_WANT_READ = 2         # that of `ssl`, which is not imported for a plain upstream


def has_left(client: socket.socket) -> bool:
    """Return whether the client has closed its connection.

    A half-closed one counts as gone, as with Go and HAProxy (abortonclose).  A byte it sent before it left, the next
    request perhaps, hides the end from `recv`, but not from `poll`.
    """
    try:
        if not client.recv(1, PEEK_NOW):
            return True
    except BlockingIOError:
        return False
    except OSError:
        return True
    poller = select.poll()              # `select` fails with descriptors over 1023
    poller.register(client, getattr(select, "POLLRDHUP", 0))
    return bool(poller.poll(0))


class Watch:
    """What ends a wait for the upstream: the client (None: nobody to watch) leaving, or the deadline of an attempt.

    `find_limit_s()`, if there is one, returns the time limit in seconds, which is not below `limit_s`.  It is called
    only when those have passed, for it would be a third of what auto mode adds to a request.
    """

    def __init__(self, client: socket.socket | None, limit_s: float | None = None, find_limit_s=None):
        self._client, self._limit_s, self._find_limit_s = client, limit_s, find_limit_s
        self._looked_at = time.monotonic()
        self.deadline: float | None = None

    def start(self) -> None:
        """Let the time limit begin, if it has not."""
        if self._limit_s is not None and self.deadline is None:
            self.deadline = time.monotonic() + self._limit_s

    def lift(self) -> None:
        """Let there be no time limit any more."""
        self._limit_s = self.deadline = None

    def check(self) -> float:
        """Return the seconds until this is to be asked again, whether or not something has moved by then.

        Raises ClientGone or UpstreamTimeout if the wait is over.
        """
        now = time.monotonic()
        if now - self._looked_at >= TICK_S * 0.9 and self._client is not None:
            self._looked_at = now
            if has_left(self._client):
                raise ClientGone("the client left")
        if self.deadline is None:
            return TICK_S
        if now >= self.deadline:
            self._pass_deadline(now)
        left_s = self.deadline - now
        return TICK_S if left_s >= TICK_S else max(0.001, left_s)

    def _pass_deadline(self, now: float) -> None:
        """Move the deadline to where the limit says, or raise UpstreamTimeout."""
        assert self.deadline is not None and self._limit_s is not None
        if self._find_limit_s is not None:
            limit_s, self._find_limit_s = self._find_limit_s(), None
            self.deadline += limit_s - self._limit_s
            self._limit_s = limit_s
        if now >= self.deadline:
            raise UpstreamTimeout("sent no first byte within %g s" % self._limit_s)


def ask_libc(function: str, *arguments: int) -> None:
    """Call a function of the C library if it has it; the two below are glibc's."""
    with contextlib.suppress(ImportError, OSError, AttributeError, MemoryError):
        import ctypes
        getattr(ctypes.CDLL(None), function)(*arguments)


def use_one_heap() -> None:
    """Keep glibc from giving threads heaps of their own, to be called before there are any.

    It never returns the free end of those: 55 MB after some thousand requests in place of 21.  The interpreter lock
    lets one thread allocate at a time anyway.
    """
    ask_libc("mallopt", -8, 1)          # M_ARENA_MAX in <malloc.h>


def return_free_memory() -> None:
    """Give back to the system what Python has freed and the C library keeps."""
    ask_libc("malloc_trim", 0)


class BodyMemory:
    """Memory for large request bodies, kept for the next ones while they come.

    A map of its own is memory only as far as bytes have come, and goes back to the system at once.  Private, not
    shared, for shared pages are slow to fault in, in huge pages where there are, and used again: 10 MB pass in 10 ms
    in place of 28.
    """

    STEP = 2 << 20                      # bytes; a huge page
    KEPT_MAX, KEPT_S = 2, 0.5

    def __init__(self):
        self._free: list[mmap.mmap] = []
        self._used_at: float | None = time.monotonic()       # None: nothing to prune

    def take(self, length: int) -> mmap.mmap:
        """Return a map of at least `length` bytes."""
        for memory in list(self._free):
            if length <= len(memory) <= 4 * length + self.STEP:
                with contextlib.suppress(ValueError):       # another thread has taken it
                    self._free.remove(memory)
                    return memory
        memory = mmap.mmap(-1, -(-length // self.STEP) * self.STEP, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

    def give_back(self, memory: mmap.mmap) -> None:
        """Take a map back that nobody reads or writes any more."""
        self._used_at = time.monotonic()
        if len(self._free) < self.KEPT_MAX:
            self._free.append(memory)

    def prune(self) -> None:
        """Give back to the system what was not used lately, and with it what else is free.

        For the first time soon after the start: there is as much to give back as then remains (29 -> 21 MB).
        """
        if self._used_at is not None and time.monotonic() - self._used_at > self.KEPT_S:
            self._used_at = None
            self._free.clear()
            return_free_memory()


def _timeval(seconds: float) -> bytes:
    return struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))


class Wire:
    """One end of a connection: its socket, and the bytes received but not yet used.

    Time limits of a plain socket are the kernel's (SO_RCVTIMEO): Python's own `settimeout` costs a poll before each
    call, a second system call where there should be one.
    """

    def __init__(self, sock: socket.socket, send_limit_s: float, receive_bytes: int):
        self.sock = sock
        self.held: Any = b""            #: bytes, or a view of what a large request came with
        self._receive_bytes = receive_bytes
        self._plain = type(sock) is socket.socket     # a TLS socket would take EAGAIN for a reason to try again
        self._limit_s = 0.0
        if self._plain:
            sock.settimeout(None)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(send_limit_s))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)      # else each event waits 40 ms for an ACK
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def limit(self, seconds: float) -> None:
        """Let `receive` raise one of NOTHING_CAME after so many seconds without a byte."""
        if seconds != self._limit_s:
            self._limit_s = seconds
            if self._plain:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(seconds))
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
    """A connection to the upstream, opened by `http.client`, whose answers are read by our own strict parser.

    `http.client` itself takes a head cut short for a 200 with an empty body, hands on unknown transfer codings, and
    ends a body cut short as if it were whole (python/cpython#115997).
    """

    def __init__(self, connection: http.client.HTTPConnection):
        super().__init__(connection.sock, TICK_S, RECEIVE_BYTES)
        self._connection = connection
        self._poller = select.poll()
        self._poller.register(connection.sock, select.POLLIN)
        self.heard = False              #: has sent a byte of the answer due
        self.idle_since = 0.0

    def has_input(self) -> bool:
        """Return whether something has come that is not yet read, be it the end of the connection.

        To be asked by one thread at a time, and not of a closed one: another may have its number by then.
        """
        if self._plain:
            return bool(self._poller.poll(0))
        # TLS: session tickets come unasked, and only reading tells them from an answer.
        self.limit(0)
        try:
            self.held += self.sock.recv(RECEIVE_BYTES)
            return True
        except OSError as error:
            return error.errno != SSL_ERROR_WANT_READ

    def send(self, pieces: list[Any], watch: Watch) -> list[memoryview]:
        """Send `pieces`; return what is left of them where the upstream answers, or closes, before it has read all."""
        if sum(map(len, pieces)) < JOINED_BYTES:
            pieces = [b"".join(pieces)]
        views = [memoryview(piece) for piece in pieces if len(piece)]
        if not self._plain:
            self.limit(watch.check())       # `has_input` leaves it at 0
        while views:
            try:
                sent = self.sock.sendmsg(views) if self._plain and len(views) > 1 else self.sock.send(views[0])
            except NOTHING_CAME as error:
                sent = 0
                if error.errno == errno.ETIMEDOUT or self.has_input():
                    return views
                self.limit(watch.check())
            except OSError:
                return views            # there may be an answer to read: 413, say
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = views[0][sent:]
            if views:
                watch.check()
        return views

    def wait(self, watch: Watch) -> bytes:
        """Return the next bytes, b"" at the end; raise what `watch` says, or UpstreamError."""
        while True:
            self.limit(watch.check())
            try:
                return self.receive()
            except NOTHING_CAME as error:
                if error.errno == errno.ETIMEDOUT:      # the network's, not ours
                    raise UpstreamError("broke the connection: timed out") from error
            except OSError as error:
                raise UpstreamError("broke the connection: %s" % reason_of(error)) from error

    def read_head(self, watch: Watch) -> ResponseHead:
        """Return the next head, 1xx ones included."""
        data = b""
        while True:
            more = self.wait(watch)
            if not more:
                raise UpstreamError("closed the connection before its answer" if not data else
                                    "broke off in the head of its answer")
            self.heard = True
            data += more
            end = data.find(b"\r\n\r\n", max(0, len(data) - len(more) - 3)) + 4
            if end >= 4:
                self.held = data[end:]
                return parse_response_head(data[:end])
            if len(data) > HEAD_MAX_BYTES or not b"HTTP/1.".startswith(data[:7]):
                raise UpstreamError("sent a malformed answer head")

    def close(self) -> None:
        """Close the connection, without the rest of an answer."""
        with contextlib.suppress(OSError):
            self._connection.close()


class Answer:
    """An answer of the upstream: its head, and its body as it comes.

    `ahead` is payload that was read before it was known whether this answer goes to the client.
    """

    def __init__(self, upstream: Upstream, connection: UpstreamConnection, head: ResponseHead, method: str,
                 asked_in_full: bool):
        self.head, self._asked_in_full = head, asked_in_full
        self.ahead = b""
        self._upstream, self._connection = upstream, connection
        self._body = response_body(head, method)
        self._error: UpstreamError | None = None
        if self._body.done:
            self._give_back()

    @property
    def complete(self) -> bool:
        """True when the whole body has been received."""
        return self._body.done

    def at_hand(self) -> bytes:
        """Return the payload that came together with the head, without waiting for more."""
        payload = b""
        if self._connection.held and not self._body.done:
            payload = self._body.feed(self._connection.receive())
            if self._body.done:
                self._give_back()
        return payload

    def receive(self, watch: Watch) -> bytes:
        """Return the next payload; b"" may come with `complete`.  Raises UpstreamError, ClientGone, UpstreamTimeout."""
        if self._error is not None:
            raise type(self._error)(str(self._error))       # a new one, for the reason of `without_trace`
        if self._body.done:
            return b""
        payload, body = b"", self._body
        while not payload and not body.done:
            data = self._connection.wait(watch)
            if data:
                payload = body.feed(data)
            else:
                body.finish()
        if body.done:
            self._give_back()
        return payload

    def text(self) -> bytes:
        """Return what is in `ahead`, unzipped if it is zipped: Claude Code accepts gzip."""
        if self.head.value(b"content-encoding") not in ("gzip", "deflate"):
            return self.ahead
        import zlib
        with contextlib.suppress(zlib.error):
            return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(self.ahead, READ_AHEAD_MAX_BYTES)
        return b""

    def read_ahead(self, watch: Watch) -> bool:
        """Receive more into `ahead`; return whether there may be still more.

        A body that breaks off or stalls is kept as far as it came: `receive` tells of the break in its turn.
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

    def _give_back(self) -> None:
        # Where the request was not sent in full, the next one would be taken for the rest of it.
        reusable = self.head.keep_alive and self._asked_in_full and not self._body.rest and not self._connection.held
        if reusable and self._body.delimited:
            self._upstream.keep(self._connection)
        else:
            self._connection.close()

    def close(self) -> None:
        """Break the connection off unless the answer is complete."""
        if not self.complete:
            self._connection.close()


class Upstream:
    """The upstream and the connections kept open to it."""

    def __init__(self, url: str, is_own_address):
        parts = urllib.parse.urlsplit(url)
        self.url = url
        self.authority = parts.netloc.encode("ascii")
        self.base_path = parts.path.encode("ascii")
        self._host, self._port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        self._is_own_address = is_own_address
        self._kept: deque[UpstreamConnection] = deque()   # last in, first out: the busiest stay alive
        self._tls: Any = None
        if parts.scheme == "https":
            import importlib
            import ssl
            if not hasattr(http.client, "HTTPSConnection"):
                importlib.reload(http.client)
            self._tls = ssl.create_default_context()

    def exchange(self, method: str, pieces: list[Any], watch: Watch, interim) -> Answer:
        """Send a request and return the answer, its head read; `interim` is called with each 1xx head before it.

        None: they are dropped, for a client of HTTP/1.0 (RFC 9110 §15.2).

        A kept connection that turns out to be dead before a byte of the answer came says nothing of the upstream: the
        request is sent once more on a new one.  (RFC 9110 §9.2.2 leaves that to clients for POST; model calls change
        nothing, and the client would only see an error and do the same.)
        """
        connection = self._take()
        if connection is not None:
            try:
                return self._exchange_on(connection, method, pieces, watch, interim)
            except (UpstreamTimeout, ClientGone):
                raise
            except UpstreamError:
                if connection.heard:
                    raise
        return self._exchange_on(self.connect(), method, pieces, watch, interim)

    def _exchange_on(self, connection: UpstreamConnection, method: str, pieces: list[Any], watch: Watch,
                     interim) -> Answer:
        connection.heard = False
        watch.start()
        try:
            unsent = connection.send(pieces, watch)
            head = connection.read_head(watch)
            while head.status < 200:
                if interim is not None and head.status != 100:      # the client has had its own 100 (Continue)
                    interim(head)
                unsent = connection.send(unsent, watch)
                head = connection.read_head(watch)
            return Answer(self, connection, head, method, not unsent)
        except BaseException:
            connection.close()
            raise

    def connect(self) -> UpstreamConnection:
        """Return a new connection; raise UpstreamUnreachable."""
        connection = self.open()
        try:
            if not self._is_own_address(connection.sock):
                return UpstreamConnection(connection)
        except OSError as error:            # reset as soon as it was accepted
            connection.close()
            raise UpstreamError("broke the connection: %s" % reason_of(error)) from error
        connection.close()
        raise UpstreamUnreachable("is rrouter itself")

    def open(self) -> http.client.HTTPConnection:
        """Return a new connection of the standard library; raise UpstreamUnreachable."""
        connection = (http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_S) if self._tls is None else
                      http.client.HTTPSConnection(self._host, self._port, timeout=CONNECT_S, context=self._tls))
        connection.auto_open = 0            # it shall not connect again by itself
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            raise UpstreamUnreachable("cannot be reached: %s" % reason_of(error)) from error
        except UnicodeError as error:       # a host name that is none
            raise UpstreamUnreachable("cannot be reached: no such host name") from error
        return connection

    def _take(self) -> UpstreamConnection | None:
        """Return a kept connection that seems alive, or None."""
        while True:
            try:
                connection = self._kept.pop()
            except IndexError:
                return None
            if time.monotonic() - connection.idle_since < POOL_IDLE_S and not connection.has_input():
                return connection
            connection.close()

    def keep(self, connection: UpstreamConnection) -> None:
        """Take a connection back whose answer is complete."""
        connection.idle_since = time.monotonic()
        self._kept.append(connection)
        if len(self._kept) > POOL_MAX:
            with contextlib.suppress(IndexError):
                self._kept.popleft().close()

    def prune(self) -> None:
        """Close the connections that have been idle for too long."""
        with contextlib.suppress(IndexError):
            while time.monotonic() - self._kept[0].idle_since >= POOL_IDLE_S:
                self._kept.popleft().close()


# Proxy ########################################################################

class Attempt:
    """One try of a request on one target: an answer, or the error there was in its place."""

    def __init__(self, route: Route, ticket: Ticket | None, watch: Watch):
        self.route, self.ticket, self.watch = route, ticket, watch
        self.answer: Answer | None = None
        self.error: UpstreamError | None = None
        self.status = 0                 #: that of the answer; of our own error where none came
        self.scan: EventScan | None = None       #: of an event stream in auto mode
        self.blames_history = False                 #: a 400 for foreign thinking signatures
        self.stream_charged = False     #: a stream that has been charged

    @property
    def failed(self) -> bool:
        """True if the answer should not go to the client while another target is left."""
        return self.answer is None or self.status >= 400 or self.stream_failed

    @property
    def stream_failed(self) -> bool:
        """True if an event stream brought no event, or an error."""
        return self.scan is not None and not self.scan.committed

    @property
    def blames_request(self) -> bool:
        """True if a like answer of the other target would clear this one."""
        return self.answer is not None and blames_request(self.status)

    @property
    def rank(self) -> int:
        """How useful this failure is to the client; lower is better."""
        return rank(500 if self.stream_failed else self.status)

    @property
    def failure(self) -> Failure:
        """What the failover machines are told."""
        if self.answer is None:
            assert self.error is not None
            return Failure(self.error.what, isinstance(self.error, UpstreamTimeout))
        if self.scan is not None:
            return Failure("error event" if self.scan.failed else "empty stream")
        what = str(self.status)
        if self.status in (400, 502) and b"unknown provider for model" in self.answer.text():
            what += ": the upstream does not know the model %s" % printable(self.route.model or "", 80)
        return Failure(what, False, retry_after_s(self.answer.head.value(b"retry-after"), time.time()))

    def close(self) -> None:
        """Break the answer off unless it is complete."""
        if self.answer is not None:
            self.answer.close()


class Exchange:
    """One proxied request, from its arrival to its line in the log."""

    def __init__(self, router: Router, head: RequestHead, body: Any):
        self.head, self.body = head, body
        self.started = time.monotonic()
        self.snapshot = router.store.snapshot()
        self.found = find_model(body)
        self.model = self.found[2] if self.found else None
        self.attempts: list[Attempt] = []
        self.chosen: Attempt | None = None       #: the one whose answer the client gets
        self.answering = False          #: a byte of the final answer has gone to the client
        self._outcome = 0, "", 0.0      # status, note, duration in seconds
        self._router = router
        self.number = router.begin()

    @property
    def may_be_rescued(self) -> bool:
        """True if auto mode may try, count and time it: it carries a model and is no count_tokens."""
        return (self.snapshot.mode == MODE_AUTO and self.model is not None
                and not self.head.path.endswith("/count_tokens"))

    def record(self, status: int, note: str = "") -> None:
        """Count the request as ended, once, before the client can know that it is."""
        if not self._outcome[0]:
            self._outcome = status, note, time.monotonic() - self.started
            self._router.end()

    def line(self) -> str:
        """Return what the log tells of it, once it has ended."""
        status, note, duration_s = self._outcome
        routed = ""
        if self.model is not None and self.attempts:
            route = (self.chosen or self.attempts[-1]).route
            routed = "%s -> %s %s " % (printable(self.model), route.target, printable(route.model or ""))
        line = "#%d %s %s %s%d %.2fs" % (
            self.number, self.head.method, printable(self.head.path), routed, status, duration_s)
        for attempt in self.attempts:
            if self.chosen not in (None, attempt):
                line += " (%s failed: %s)" % (attempt.route.target, attempt.failure.what)
        return "%s (%s)" % (line, note) if note else line


class OneCore:
    """Keeps the threads of the connections, and the log's, on one core of Linux while they have much to do.

    One of them at a time runs Python code anyway, and to pass the interpreter lock from core to core takes longer than
    most of what it is needed for: 32 busy connections get half as many requests/s again, for half the CPU, and two
    thirds of the p99.  With little to do a thread is better off on whichever core is free.
    """

    ACTIVE_MIN = 8                      # requests under way
    BUSY, CALM = 0.2, 0.1               # of the time of one core: where this begins, and where it ends
    PERIOD_S = POLL_S * 0.9             # a shorter time says nothing

    def __init__(self):
        self._core: int | None = None        # the one they keep to
        self._seen = 0.0, 0.0

    def look(self, active: int, connections: list[int], log: int | None, now: float, used_s: float) -> None:
        """Decide anew, called from none of these threads, which are given by their native ids.

        `active` is the number of requests under way; `now` (time.monotonic) and `used_s` (of the processor, outside
        the kernel, which does not ask for the interpreter lock) tell how busy the process was since the last call.
        """
        if now - self._seen[0] < self.PERIOD_S or not hasattr(os, "sched_setaffinity"):
            return
        busy = (used_s - self._seen[1]) / (now - self._seen[0])
        self._seen = now, used_s
        with contextlib.suppress(OSError):              # a sandbox may forbid it
            allowed = os.sched_getaffinity(0)           # each time, for the user may change it
            threads = connections + [log] if log is not None else connections
            enough = min(active, len(connections)) >= self.ACTIVE_MIN
            if not enough or busy < (self.BUSY if self._core is None else self.CALM):
                if self._core is not None:
                    self._core = None
                    self._place(threads, allowed)
                return
            if self._core not in allowed:
                self._core = self._core_of(connections[0])
            if self._core in allowed:
                self._place(threads, {self._core})

    @staticmethod
    def _core_of(thread: int) -> int | None:
        """Return the core that a busy thread ran on last: the kernel knows the fast ones from the slow ones."""
        with contextlib.suppress(OSError, ValueError, IndexError):      # it has ended, or there is no /proc
            descriptor = os.open("/proc/self/task/%d/stat" % thread, os.O_RDONLY)
            try:
                return int(os.read(descriptor, 4096).rpartition(b")")[2].split()[36])
            finally:
                os.close(descriptor)
        return None

    @staticmethod
    def _place(threads: list[int], cores: Any) -> None:
        for thread in threads:
            with contextlib.suppress(OSError):      # it has ended
                os.sched_setaffinity(thread, cores)


class Router:
    """What all connections share: settings, store, failover, upstream, log and counters."""

    def __init__(self, settings: Settings, paths: Paths, log: Log, started_by: str):
        self.settings, self.log, self.started_by = settings, log, started_by
        # Before the store, which calls `_changed` whenever a file is written.
        self.failover = Failover(time.time, config_of(None).auto)
        self.store = Store(paths, log, self._changed)
        self.failover.reset(self.store.snapshot().config.auto, "")
        self.upstream = Upstream(settings.upstream, self._is_own_address)
        self.bodies = BodyMemory()
        self.connections: set[ProxyHandler] = set()
        self.connections_max = CONNECTIONS_MAX
        self._one_core = OneCore()
        self.draining = False
        self.addresses: list[tuple[str, int]] = []      #: what the servers are bound to
        self.keeps_state = False        #: whether state.json is ours to write
        self._saved_state: Any = None
        self._state_problem: str | None = None
        self._lock = threading.Lock()
        self._requests = self._active = 0
        self._trimmed = 0, 0.0          # after how many requests free memory was last given back, and when
        self._started = time.monotonic()

    def begin(self) -> int:
        """Count a request; return its number."""
        with self._lock:
            self._requests += 1
            self._active += 1
            return self._requests

    def end(self) -> None:
        """Count the end of a request."""
        with self._lock:
            self._active -= 1

    def log_decisions(self, lines: list[str], number: int = 0) -> None:
        """Log decisions of auto mode, and let the watcher save what has come of them."""
        for line in lines:
            self.log.write("AUTO", "#%d %s" % (number, line) if number and "SWITCH" not in line else line)
        if lines:
            self.store.wake()

    def _changed(self, old: Snapshot, new: Snapshot, mode_written: bool) -> None:
        """Clear the failover state when the user asks for it: by the mode file, or by the auto section."""
        if mode_written or old.mode != new.mode:
            why = "mode %s" % new.mode if old.mode != new.mode else "mode %s written again" % new.mode
        elif old.config.auto != new.config.auto:
            why = "the auto section of config.json changed"
        else:
            return
        self.log_decisions(self.failover.reset(new.config.auto, why))

    def _is_own_address(self, sock: socket.socket) -> bool:
        """Return whether `sock` is connected to rrouter itself."""
        own, peer = sock.getsockname()[:2], sock.getpeername()[:2]
        return any(port == peer[1] and (host == peer[0] or (host in ("0.0.0.0", "::") and own[0] == peer[0]))
                   for host, port in self.addresses)

    def load_state(self) -> None:
        """Go on with the failover state of before a restart, if it still fits, and keep it from now on."""
        self.keeps_state = True
        try:
            state = self.store.load_state()
            if state is not None and self.store.snapshot().mode == MODE_AUTO:
                self.failover.restore(state)
                self.log.write("AUTO", "state.json: on %s" % self.failover.report(True)["currentTarget"])
        except StateError as error:
            self.log.write("AUTO", "state.json set aside: %s" % error)

    def save_state(self) -> None:
        """Write state.json if there is something new."""
        if not self.keeps_state:
            return
        # The mode's signature first: a reset by a mode written meanwhile must not be undone by what is saved here.
        state = self.store.mode_signature, self.failover.save()
        if state == self._saved_state:
            return
        try:
            self.store.save_state(*state)
            self._saved_state, self._state_problem = state, None
        except OSError as error:
            problem = "state.json: cannot be written: %s: a restart forgets the cooldowns" % reason_of(error)
            if problem != self._state_problem:
                self.log.write("AUTO", problem)
            self._state_problem = problem

    def watch(self) -> None:
        """Look at the files and at the clock; one step of the watcher."""
        # First, for the rest takes long as long as threads contend for the interpreter lock.
        connections = [connection.thread for connection in list(self.connections)]
        self._one_core.look(self._active, connections, self.log.thread, time.monotonic(), os.times().user)
        self.store.snapshot()
        self.failover.look_at_clock()
        self.save_state()
        self.log.reopen()
        self.upstream.prune()
        self.bodies.prune()
        self._trim(time.monotonic())

    def _trim(self, now: float) -> None:
        """Give back to the system what requests have left free: 50 streams of a minute leave up to 45 MB."""
        count, when = self._trimmed
        if not self._active and self._requests != count and now - when >= TRIM_S:
            self._trimmed = self._requests, now
            return_free_memory()

    def health(self) -> dict[str, Any]:
        """Return what /health tells."""
        snapshot = self.store.snapshot()
        is_auto = snapshot.mode == MODE_AUTO
        auto = self.failover.report(is_auto)
        problems = list(snapshot.problems) + [p for p in (self.log.problem, self._state_problem) if p]
        return {"status": "ok", "version": __version__, "mode": snapshot.mode,
                "currentTarget": auto["currentTarget"] if is_auto else snapshot.mode,
                "defaultMode": snapshot.config.default_mode, "requestCount": self._requests,
                "activeRequests": self._active, "uptimeSeconds": int(time.monotonic() - self._started),
                "pid": os.getpid(), "startedBy": self.started_by, "listenAddr": self.settings.listen_addr,
                "upstreamURL": self.settings.upstream, "problems": problems, "autoSwitch": auto}


class ProxyHandler(http.server.BaseHTTPRequestHandler):
    """One client connection: its requests, one after the other.

    Of the standard handler the frame is used (setup, handle, finish, a thread each); parsing and writing are our own,
    for what it does to heads is told above, and its buffered reader hides bytes from the watch for the client.
    """

    server: ProxyServer

    def setup(self) -> None:
        """Take the connection."""
        self.router = self.server.router
        try:
            self.wire = Wire(self.request, WRITE_STALL_S, REQUEST_BYTES)
        except OSError as error:        # macOS: reset already
            raise ClientGone("the client left") from error
        self.thread = threading.get_native_id()
        self.busy = False               #: a request is under way
        self.asks_head = False          #: HEAD: no answer has a body, be the request otherwise refused
        self.crowded = False            #: one connection too many: only /health is answered, and once
        #: what was before and behind the number of the length, and what it meant
        self.last_head: tuple[bytes, bytes, RequestHead | None] = b"", b"", None
        self.memory: mmap.mmap | None = None     #: of a large body under way
        self.shut = False               #: told to read no more, by `drain`: an end of file says nothing of the client

    def handle(self) -> None:
        """Carry requests through until one side ends the connection."""
        self.router.connections.add(self)
        try:
            beyond = len(self.router.connections) - self.router.connections_max
            self.crowded = beyond > 0
            if beyond > CONNECTIONS_RESERVE:
                return
            while self.handle_one_request() and not self.crowded:
                self.busy = False
        finally:
            self.router.connections.discard(self)

    def finish(self) -> None:
        """Leave the connection to the server, which closes it."""

    def handle_one_request(self) -> bool:       # type: ignore[override]
        """Carry one request through; return whether the connection can carry another."""
        head = None
        try:
            head = self.read_head()
            if head is None:
                return False
            is_health = head.path == "/health" and head.method in ("GET", "HEAD")
            if self.crowded and not is_health:
                raise RequestError(503, "too many connections (%d)" % self.router.connections_max)
            body = self.read_body(head)
            if is_health:
                self.report_health(head)
            else:
                self.proxy(head, body)
            if head.keep_alive and not self.router.draining and not self.crowded:
                return True
        except RequestError as error:
            self._fail(head, error)
        except ClientGone:
            return False
        except Exception:               # a defect of ours: told in the log, and to the client
            self.server.handle_error(self.request, self.client_address)
            self._fail(head, RouterError("internal error; see ~/.rrouter/logs/rrouter.log"))
        finally:
            if self.memory is not None:
                self.router.bodies.give_back(self.memory)
                self.memory = None
        self._linger()
        return False

    # ---- reading

    def read_head(self) -> RequestHead | None:
        """Return the next request's head; None if the client closes, or is silent for too long, before it begins."""
        wire = self.wire
        data = bytes(wire.held)
        wire.held = b""
        wire.limit(LINGER_S if self.crowded else IDLE_S)
        deadline, seen = None, 0
        while True:
            known = self._take_known_head(data)
            if known is not None:
                return known
            data = data[2:] if data.startswith(b"\r\n") else data       # RFC 9112 §2.2: ignored before a request
            self.asks_head = data.startswith(b"HEAD ")
            end = data.find(b"\r\n\r\n", max(0, seen - 5)) + 4
            if end >= 4:
                self.busy = True
                if end > HEAD_MAX_BYTES:
                    raise head_too_large(data)
                wire.held = data[end:]
                return self._parse_head(data[:end])
            if data not in (b"", b"\r"):
                self.busy = True
                if len(data) > HEAD_MAX_BYTES:
                    raise head_too_large(data)
                check_head_start(data, max(0, seen - 3))
                deadline = deadline or time.monotonic() + HEAD_S
                wire.limit(max(0.001, deadline - time.monotonic()))
            try:
                more = wire.receive()
                if deadline is not None and time.monotonic() > deadline:
                    raise socket.timeout()
            except NOTHING_CAME:
                if deadline is None:
                    return None
                raise RequestError(408, "request head not complete within %d s" % HEAD_S) from None
            except OSError as error:
                raise ClientGone("the client left") from error
            if not more:
                return None
            seen = len(data)
            data += more

    def _take_known_head(self, data: bytes) -> RequestHead | None:
        """Return the head of the connection's last request if `data` begins with it, but for its Content-Length.

        The requests of one connection differ there by nothing else: a quarter less time for a small one.
        """
        before, after, head = self.last_head
        if head is None or not data.startswith(before):
            return None
        length, end = head.length, len(before)
        if after:
            number = _NUMBER.match(data, end)
            if not number or not data.startswith(after, number.end()):
                return None
            length, end = int(number.group()), number.end() + len(after)
            if length > BODY_MAX_BYTES:
                return None
        self.busy, self.asks_head, self.wire.held = True, head.method == "HEAD", memoryview(data)[end:]
        return head if length == head.length else head._replace(length=length)

    def _parse_head(self, data: bytes) -> RequestHead:
        """Return the head, its origin checked, and what of it goes upstream."""
        head = parse_request_head(data)
        check_origin(head, self.server.only_loopback)
        upstream = self.router.upstream
        head = head._replace(outbound=outbound_head(head, upstream.authority, upstream.base_path))
        number = _ONE_LENGTH.search(data)
        self.last_head = (data[:number.start(1)], data[number.end(1):], head) if number else (data, b"", head)
        return head

    def read_body(self, head: RequestHead) -> Any:
        """Return the whole body, as a bytes-like object."""
        if head.length == 0:
            return b""
        if head.expects_continue and not self.wire.held:
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        return self._read_chunks() if head.length is None else self._read_fixed(head.length)

    def _read_fixed(self, length: int) -> Any:
        wire = self.wire
        if len(wire.held) >= length:
            whole, wire.held = wire.held[:length], bytes(wire.held[length:])
            return whole
        body: Any
        if length >= MAPPED_BODY_BYTES:
            try:
                self.memory = self.router.bodies.take(length)
            except (OSError, MemoryError) as error:
                raise RequestError(503, "no memory for a body of %d bytes" % length) from error
            body = memoryview(self.memory)[:length]
        else:
            body = bytearray(length)
        have = len(wire.held)
        body[:have] = wire.held
        wire.held = b""
        with memoryview(body) as view:
            while have < length:
                have += self._receive(partial(wire.sock.recv_into, view[have:]))
        return body

    def _read_chunks(self) -> bytes:
        body, decoder = bytearray(), ChunkedBody()
        try:
            while not decoder.done:
                body += decoder.feed(self._receive(self.wire.receive))
                if len(body) > BODY_MAX_BYTES:
                    raise RequestError(413, "body over the limit of %d MiB" % (BODY_MAX_BYTES >> 20))
        except UpstreamError as error:
            raise RequestError(400, "malformed request body: the client %s" % error) from error
        self.wire.held = decoder.rest
        return bytes(body)

    def _receive(self, receive) -> Any:
        self.wire.limit(BODY_STALL_S)
        try:
            received = receive()
        except NOTHING_CAME:
            raise RequestError(408, "request body without progress for %d s" % BODY_STALL_S) from None
        except OSError as error:
            raise ClientGone("the client left") from error
        if not received:
            raise ClientGone("the client left before the end of its request")
        return received

    # ---- forwarding

    def proxy(self, head: RequestHead, body: Any) -> None:
        """Carry one request through: forward, relay, record.

        Its line goes to the log behind the last byte of the answer.
        """
        exchange = Exchange(self.router, head, body)
        try:
            attempt = exchange.chosen = self.forward(exchange)
            for other in exchange.attempts:
                if other is not attempt:
                    other.close()
            if attempt.error is not None:
                self._answer_for_upstream(exchange, attempt.error)
            else:
                self.relay(exchange, attempt)
        except UpstreamError as error:
            self._answer_for_upstream(exchange, error)
        except ClientGone:
            self._record(exchange, 499, "the client left")
            raise
        except Exception:               # a defect of ours
            self._record(exchange, 500, "internal error")
            if exchange.answering:
                self.server.handle_error(self.request, self.client_address)
                self._abort(exchange)
            raise
        finally:
            for attempt in exchange.attempts:
                attempt.close()
            self.router.log.leave("REQ", exchange.line())

    def _answer_for_upstream(self, exchange: Exchange, error: UpstreamError) -> None:
        """Tell the client of `error`, by an answer or, within one, by breaking off."""
        note = "the upstream " + str(error)
        if exchange.answering:
            self._record(exchange, exchange.chosen.status if exchange.chosen else 0, note)
            self._abort(exchange)
        self._record(exchange, error.http_status, note)
        self._fail(exchange.head, type(error)("upstream %s %s; %s" % (
            self.router.settings.upstream, error, error.remedy)), self._reply_fields(exchange))

    def _record(self, exchange: Exchange, status: int, note: str = "") -> None:
        """Let the request end, for the counters and the log; what has counted for nobody frees the probe's place."""
        for attempt in exchange.attempts:
            if attempt.ticket is not None and attempt.ticket.probe:     # for one credited or charged it does nothing
                self.router.log_decisions(self.router.failover.release(attempt.ticket), exchange.number)
        exchange.record(status, note)

    def forward(self, exchange: Exchange) -> Attempt:
        """Return the attempt whose answer the client gets, after at most two.

        In auto mode what has failed by then is charged, but for what counts for nobody.
        """
        snapshot, failover = exchange.snapshot, self.router.failover
        targets = snapshot.config.auto.targets
        if not exchange.may_be_rescued:
            target = failover.current(exchange.model, targets) if snapshot.mode == MODE_AUTO else snapshot.mode
            return self.attempt(exchange, target, None)
        ticket = failover.admit(exchange.model or "", targets)
        if ticket.probe:
            self.router.log_decisions(["PROBE of %s" % ticket.target], exchange.number)
        first = self.attempt(exchange, ticket.target, ticket)
        if not first.failed or isinstance(first.error, UpstreamUnreachable):
            return first
        if not self.shut and has_left(self.request):
            raise ClientGone("the client left")
        if not first.blames_request:
            self._charge(exchange, first)
        if self.router.draining:        # the client's own retry finds the next rrouter
            return first
        ticket = failover.rescue(ticket, targets)
        second = self.attempt(exchange, ticket.target, ticket)
        if first.blames_request and not second.blames_request:
            self._charge(exchange, first)
        if not second.failed:
            return second
        if not isinstance(second.error, UpstreamUnreachable) and not (first.blames_request and second.blames_request):
            self._charge(exchange, second)
        return min(first, second, key=lambda attempt: attempt.rank)

    def _charge(self, exchange: Exchange, attempt: Attempt) -> None:
        if attempt.ticket is not None and not attempt.blames_history:
            self.router.log_decisions(self.router.failover.charge(attempt.ticket, attempt.failure), exchange.number)

    def attempt(self, exchange: Exchange, target: str, ticket: Ticket | None) -> Attempt:
        """Try a request on `target`, healed if its history needs that; with a ticket, by the rules of auto mode.

        Raises ClientGone.
        """
        route = decide_route(exchange.snapshot.config, target, exchange.model)
        attempt = Attempt(route, ticket, self._watch_first_byte(exchange, ticket))
        exchange.attempts.append(attempt)
        self._try(exchange, exchange.body, attempt)
        if attempt.status == 400 and attempt.answer is not None and names_foreign_signature(attempt.answer.text()):
            attempt.blames_history = True
            body = without_thinking(exchange.body)
            if body is not None:
                self.router.log.write("HEAL", "#%d %s refused thinking blocks of another backend: sent again without"
                                      % (exchange.number, target))
                healed = Attempt(route, ticket, self._watch_first_byte(exchange, ticket))
                self._try(exchange, body, healed)
                if healed.failed:
                    healed.close()
                else:
                    attempt.close()
                    exchange.attempts[-1] = attempt = healed
        return attempt

    def _try(self, exchange: Exchange, body: Any, attempt: Attempt) -> None:
        """Send `body` once and take the answer as far as must be known before the client gets a byte."""
        head, upstream = exchange.head, self.router.upstream
        found = exchange.found if body is exchange.body else find_model(body)
        pieces = [body]
        if found is not None and attempt.route.model != found[2]:
            pieces = splice(body, found[0], found[1], attempt.route.model or "")
        before, after = head.outbound
        pieces.insert(0, b"%b%d%b" % (before, sum(map(len, pieces)), after) if after else before)
        try:
            attempt.answer = upstream.exchange(head.method, pieces, attempt.watch,
                                               self._pass_interim if head.http11 else None)
            attempt.status = attempt.answer.head.status
            self._hold_back(exchange, attempt)
        except UpstreamError as error:
            attempt.close()
            attempt.answer, attempt.error, attempt.status = None, without_trace(error), error.http_status
        except BaseException:
            attempt.close()
            raise

    def _watch_first_byte(self, exchange: Exchange, ticket: Ticket | None) -> Watch:
        client, auto = None if self.shut else self.request, exchange.snapshot.config.auto
        if ticket is None:
            return Watch(client)
        body = exchange.body            # not `exchange` itself, which holds the attempts, which hold the watch
        return Watch(client, min(auto.first_byte_s, UNSTREAMED_MAX_S),
                     lambda: auto.first_byte_limit_s(asks_for_stream(body)))

    def _pass_interim(self, interim: ResponseHead) -> None:
        self.send(response_head_bytes(interim, b""))

    def _hold_back(self, exchange: Exchange, attempt: Attempt) -> None:
        """Read as much of the answer as decides whether it goes to the client.

        In auto mode that is all of a failure, and of an event stream up to the first event that is no ping; in every
        mode all of a 400, which may ask for healing.  Nothing else is held back.
        """
        answer = attempt.answer
        assert answer is not None
        is_auto = attempt.ticket is not None
        if (is_auto and attempt.status >= 400) or (attempt.status == 400 and exchange.model is not None):
            watch = Watch(None if self.shut else self.request, READ_AHEAD_S)
            watch.start()
            while answer.read_ahead(watch):
                pass
        elif is_auto and attempt.status == 200 and answer.head.is_event_stream and exchange.head.method != "HEAD":
            attempt.scan = scan = EventScan()
            while not (scan.committed or scan.failed or answer.complete):
                payload = answer.receive(attempt.watch)
                answer.ahead += payload
                scan.feed(payload)
                scan.committed = scan.committed or len(answer.ahead) > READ_AHEAD_MAX_BYTES
        else:
            answer.ahead = answer.at_hand()         # broken coding right behind the head can still be rescued

    # ---- answering

    def relay(self, exchange: Exchange, attempt: Attempt) -> None:
        """Pass the answer on as it comes; its outcome is kept before its end goes out."""
        answer, watch, scan = attempt.answer, attempt.watch, attempt.scan
        assert answer is not None
        watch.lift()
        head, fields = answer.head, self._reply_fields(exchange)
        bodiless = exchange.head.method == "HEAD" or head.status in (204, 304)
        chunked = head.length is None and not bodiless and exchange.head.http11
        if chunked:
            fields += b"Transfer-Encoding: chunked\r\n"
        if not exchange.head.keep_alive or self.router.draining:
            fields += b"Connection: close\r\n"
        out = response_head_bytes(head, fields)
        try:
            payload, answer.ahead = answer.ahead, b""
            if scan is not None:
                self._inspect(exchange, attempt, scan, b"")     # an error right behind the first event
            while True:
                complete = answer.complete
                if complete:
                    self._credit(exchange, attempt)
                    self._record(exchange, head.status)
                if chunked:
                    out += b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""
                    out += b"0\r\n\r\n" if complete else b""
                else:
                    out = out + payload if out else payload
                exchange.answering = True
                self.send(out)
                if complete:
                    return
                out, payload = b"", answer.receive(watch)
                if scan is not None:
                    self._inspect(exchange, attempt, scan, payload)
        except UpstreamError:
            if not attempt.failed:
                self._charge_stream(exchange, attempt, Failure("stream broke off"))
            raise

    def _inspect(self, exchange: Exchange, attempt: Attempt, scan: EventScan, payload: bytes) -> None:
        """Look for an error event in a stream under way; it is charged at once, for the client may leave upon it."""
        if scan.committed and not attempt.stream_charged:
            scan.feed(payload)
            if scan.broken:
                self._charge_stream(exchange, attempt, Failure("error event"))

    def _credit(self, exchange: Exchange, attempt: Attempt) -> None:
        if (attempt.ticket is not None and 200 <= attempt.status < 300 and not attempt.stream_failed
                and not attempt.stream_charged):
            self.router.log_decisions(self.router.failover.credit(attempt.ticket), exchange.number)

    def _charge_stream(self, exchange: Exchange, attempt: Attempt, failure: Failure) -> None:
        """Charge a stream that fails after its first event, once."""
        if attempt.ticket is not None and not attempt.stream_charged:
            attempt.stream_charged = True
            self.router.log_decisions(self.router.failover.charge(attempt.ticket, failure), exchange.number)

    def _reply_fields(self, exchange: Exchange) -> bytes:
        """Return the field lines that tell where a request with a model went."""
        if exchange.model is None or exchange.chosen is None:
            return b""
        route = exchange.chosen.route
        return ("x-rrouter-target: %s\r\nx-rrouter-model: %s\r\nx-rrouter-attempts: %d\r\n" % (
            printable(route.target), printable(route.model or ""), len(exchange.attempts))).encode("ascii")

    def report_health(self, head: RequestHead) -> None:
        """Answer /health."""
        body = json.dumps(self.router.health(), indent=2).encode("utf-8") + b"\n"
        self._send_json(200, body, b"Cache-Control: no-store\r\n", head.keep_alive and not self.crowded)

    def _fail(self, head: RequestHead | None, error: RouterError, fields: bytes = b"") -> None:
        """Answer with an error of our own.  Only after one of the upstream's can the connection go on."""
        keep_alive = head is not None and head.keep_alive and isinstance(error, UpstreamError)
        self._send_json(error.http_status, error_body(error.http_status, str(error)), fields, keep_alive)

    def _send_json(self, status: int, body: bytes, fields: bytes, keep_alive: bool) -> None:
        if not keep_alive or self.router.draining:
            fields += b"Connection: close\r\n"
        self.send(b"HTTP/1.1 %d %b\r\nDate: %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b\r\n%b" % (
            status, http.client.responses.get(status, "Error").encode("ascii"),
            self.date_time_string().encode("ascii"), len(body), fields, b"" if self.asks_head else body))

    def send(self, data: bytes) -> None:
        """Send to the client; raise ClientGone if it has left or does not read."""
        try:
            self.request.sendall(data)
        except OSError as error:
            raise ClientGone("the client left") from error

    def _linger(self) -> None:
        """Let the client close first, and drop what it still sends.

        To a byte that comes after a close the system answers with a reset, which can destroy what the client has not
        read yet.
        """
        deadline = time.monotonic() + LINGER_S
        with contextlib.suppress(OSError):
            self.request.shutdown(socket.SHUT_WR)
            while time.monotonic() < deadline:
                self.wire.limit(max(0.001, deadline - time.monotonic()))
                if not self.request.recv(RECEIVE_BYTES):
                    break

    def _abort(self, exchange: Exchange) -> None:
        """Break the connection off, so that nobody takes what came for the whole; raises ClientGone.

        Where neither length nor chunks tell the end, only a reset does; it may drop bytes still on their way, so the
        others are spared it.
        """
        answer = exchange.chosen.answer if exchange.chosen is not None else None
        if not exchange.head.http11 and answer is not None and answer.head.length is None:
            with contextlib.suppress(OSError):
                self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.wire.close()
        raise ClientGone("broken off, as the upstream did")


class ProxyServer(http.server.ThreadingHTTPServer):
    """One listening socket; a thread for each of its connections."""

    request_queue_size = BACKLOG
    daemon_threads = True
    allow_reuse_address = True          # TIME_WAIT would keep a restart off the port
    allow_reuse_port = False            # else two could share it, each with half of the requests

    def __init__(self, family: int, address: Any, router: Router, only_loopback: bool):
        self.address_family = family
        self.router, self.only_loopback = router, only_loopback
        self._complained_at = 0.0
        super().__init__(address, ProxyHandler)

    def server_bind(self) -> None:
        """Bind without asking the name service for the host's name, which can stall for 35 s on macOS."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]    # type: ignore[assignment]

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection; out of descriptors, wait a little: the loop above would spin."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                if time.monotonic() - self._complained_at > 60:
                    self._complained_at = time.monotonic()
                    self.router.log.write("ERROR", "cannot accept connections: %s" % reason_of(error))
                time.sleep(0.1)
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a defect of ours in one line: where and what kind, never values, which may be the user's."""
        error = sys.exc_info()[1]
        if isinstance(error, (ConnectionError, ClientGone)):
            return
        self.router.log.write("ERROR", describe_defect(error))


# Daemon #######################################################################

class Lock:
    """The file whose lock says that a daemon lives.  It is never removed: two could then each hold "the" lock.

    `flock`, not `lockf`: the latter is lost as soon as any descriptor of the file is closed.  The pid in it is
    written by the holder alone, at once; who signals it asks twice, for the moment between.
    """

    def __init__(self, path: str):
        self._path = path
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Take the lock for the life of this process; return False if another has it.  Raises DaemonError."""
        try:
            return self._acquire()
        except OSError as error:
            is_other = os.path.lexists(self._path) and not os.path.isfile(self._path)
            raise DaemonError("%s: cannot be written: %s: %s" % (self._path, reason_of(error), (
                "it is no regular file: remove it" if is_other else "see to its rights and to free space"))) from error

    def _acquire(self) -> bool:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        for _ in range(25):             # `holder` of another command may have it for a moment
            with contextlib.suppress(BlockingIOError):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno in (errno.EWOULDBLOCK, errno.EINTR):
                        raise
                    os.close(descriptor)
                    raise DaemonError("%s: cannot be locked: %s: put HOME on a file system with locks" % (
                        self._path, reason_of(error))) from error
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
                self._descriptor = descriptor
                return True
            time.sleep(0.02)
        os.close(descriptor)
        return False

    def mark_stopping(self) -> None:
        """Tell those who look that this process takes no more requests."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self._descriptor, b"%d stopping\n" % os.getpid(), 0)

    def holder(self) -> int | None:
        """Return the pid of the process that holds the lock, or None.  Raises DaemonError."""
        found = self.look()
        return found[0] if found else None

    def look(self) -> tuple[int, bool] | None:
        """Return (pid, whether it is stopping) of the process that holds the lock, or None.  Raises DaemonError."""
        words: list[bytes] = []
        for _ in range(25):
            try:
                descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)   # a FIFO would block for ever
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError as error:
                raise DaemonError("%s: %s: it belongs to another user, who may have started rrouter with your HOME: "
                                  "give it back to you with chown" % (self._path, reason_of(error))) from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            except BlockingIOError:
                with contextlib.suppress(OSError):      # a FIFO, which another command has opened
                    words = os.pread(descriptor, 32, 0).split()
                if words and words[0].isdigit() and 0 < int(words[0]) < 1 << 31:    # 0 would be our own process group
                    return int(words[0]), words[1:] == [b"stopping"]
            finally:
                os.close(descriptor)
            time.sleep(0.02)            # taken this moment, the pid not yet written
        return None

    def release(self) -> None:
        """Give the lock back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Signals:
    """Signals as bytes in a pipe.  A handler that did more could run in the middle of anything, locks held."""

    def __init__(self):
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)

    def wait(self, timeout_s: float | None = None) -> bytes:
        """Return the numbers of the signals that came, at the latest after `timeout_s`."""
        poller = select.poll()
        poller.register(self._read, select.POLLIN)
        if not poller.poll(None if timeout_s is None else int(timeout_s * 1000)):
            return b""
        with contextlib.suppress(BlockingIOError):
            return os.read(self._read, 1)   # one at a time: the second has its own meaning
        return b""


def addresses_of(settings: Settings) -> list[tuple[int, Any]]:
    """Return (family, address) of each address to listen on; raise UsageError."""
    if settings.host == "localhost":
        return [(socket.AF_INET, ("127.0.0.1", settings.port)), (socket.AF_INET6, ("::1", settings.port))]
    try:
        return [(info[0], info[4]) for info in socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)]
    except OSError as error:
        raise UsageError("RROUTER_HOST=%s: %s: expected localhost, an address of this machine or a name of one" % (
            settings.host, reason_of(error))) from error


def _port_owner_from_proc(port: int) -> str:
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table, encoding="ascii") as file:
            rows = [line.split() for line in file][1:]
            inodes |= {"socket:[%s]" % row[9] for row in rows
                       if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
    for pid in filter(str.isdigit, os.listdir("/proc") if inodes else []):
        with contextlib.suppress(OSError):
            for descriptor in os.listdir("/proc/%s/fd" % pid):
                if os.readlink("/proc/%s/fd/%s" % (pid, descriptor)) in inodes:
                    with open("/proc/%s/comm" % pid, encoding="utf-8", errors="replace") as file:
                        return "%s (pid %s)" % (printable(file.read().strip()), pid)
    return ""


def port_owner(port: int) -> str:
    """Return the name and pid of the program that listens on `port`, as far as the system tells us; else ""."""
    import subprocess
    for command in (["lsof", "-nP", "-iTCP:%d" % port, "-sTCP:LISTEN", "-Fpc"], ["ss", "-Hltnp", "sport = :%d" % port]):
        try:
            output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=3,
                                    stdin=subprocess.DEVNULL).stdout.decode("utf-8", "replace")
        except (OSError, subprocess.SubprocessError):
            continue
        found = (re.search(r"p(?P<pid>\d+)\nc(?P<name>[^\n]+)", output)
                 or re.search(r'\("(?P<name>[^"]+)",pid=(?P<pid>\d+)', output))
        if found:
            return "%s (pid %s)" % (printable(found.group("name")), found.group("pid"))
    return _port_owner_from_proc(port)


def ask_health(host: str, port: int, timeout_s: float = 3) -> dict[str, Any] | None:
    """Return what /health of an rrouter tells, or None if no rrouter answers there."""
    for address in {"localhost": ("127.0.0.1", "::1"), "0.0.0.0": ("127.0.0.1",), "::": ("::1",)}.get(host, (host,)):
        connection = http.client.HTTPConnection(address, port, timeout=timeout_s)
        try:
            connection.request("GET", "/health", headers={"Host": "localhost"})
            health = json.loads(connection.getresponse().read(FILE_MAX_BYTES))
            if isinstance(health, dict) and "autoSwitch" in health and isinstance(health.get("pid"), int):
                return health
        except (OSError, http.client.HTTPException, ValueError):
            continue
        finally:
            connection.close()
    return None


def describe_taken(settings: Settings) -> str:
    """Return what to tell when the port is taken."""
    health = ask_health(settings.host, settings.port, timeout_s=1)
    owner = "rrouter (pid %s)" % health["pid"] if health else port_owner(settings.port)
    return ("port %d is taken%s: stop that program or set RROUTER_PORT (CLIProxyAPI's pprof uses 8316 by default: "
            "see pprof.addr in its config)" % (settings.port, " by " + owner if owner else ""))


def listen(settings: Settings, router: Router) -> list[ProxyServer]:
    """Return the servers, bound and listening; raise DaemonError if an address is taken or is none of ours."""
    servers: list[ProxyServer] = []
    problem: OSError | None = None
    for family, address in addresses_of(settings):
        try:
            servers.append(ProxyServer(family, address, router, settings.host == "localhost"))
        except OSError as error:
            problem = error
            if error.errno == errno.EADDRINUSE:
                break
            router.log.write("START", "not listening on %s: %s" % (address[0], reason_of(error)))
    if problem is not None and (problem.errno == errno.EADDRINUSE or not servers):
        for server in servers:
            server.server_close()
        raise DaemonError(describe_taken(settings) if problem.errno == errno.EADDRINUSE else
                          "cannot listen on %s: %s" % (settings.listen_addr, reason_of(problem)))
    router.addresses = [server.server_address[:2] for server in servers]    # type: ignore[misc]
    return servers


LAUNCHD_LABEL = "com.rrouter"


def who_starts() -> str:
    """Return what started this process in the foreground: systemd, launchd, or a person with `serve`."""
    if os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid()):
        return "systemd"
    if os.environ.get("XPC_SERVICE_NAME", "0") == LAUNCHD_LABEL:
        return "launchd"
    return "serve"


def tell(ready: int, words: str) -> None:
    """Tell `start` how it went, unless it was killed meanwhile.

    It reads to the end: where this process is about to end, `start` returns after it.
    """
    with contextlib.suppress(OSError):
        os.write(ready, words.encode("utf-8", "replace"))
        if words == "ready":
            os.close(ready)


def claim(paths: Paths, settings: Settings, router: Router) -> None:
    """Write pid and run.json: where the daemon is, for whoever asks.  Without them it works as well."""
    try:
        write_atomically(paths.pid, "%d\n" % os.getpid(), durable=False)
        write_atomically(paths.run, json.dumps({
            "host": settings.host, "port": settings.port, "upstream": settings.upstream, "pid": os.getpid(),
            "startedBy": router.started_by, "version": __version__}, indent=2) + "\n", durable=False)
    except OSError as error:
        router.log.write("ERROR", "%s: %s: other commands may not find this daemon" % (paths.run, reason_of(error)))


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


def _watch_for_ever(router: Router) -> None:
    while True:
        with router.store.condition:
            router.store.condition.wait(POLL_S)
        try:
            router.watch()
        except Exception as error:      # of whatever kind: without the watcher cooldowns and logs would be lost
            router.log.write("ERROR", "internal error in the watcher: %s" % type(error).__name__)


def wait_for_the_end(signals: Signals, router: Router) -> None:
    """Return when SIGTERM or SIGINT comes; on SIGHUP read all files again."""
    while True:
        for number in signals.wait():
            if number != signal.SIGHUP:
                router.log.write("STOP", "%s: running requests may finish within %d s" % (
                    signal.Signals(number).name, DRAIN_S))
                return
            router.watch()
            router.log.write("START", "SIGHUP: files read again")


def drain(signals: Signals, router: Router, servers: list[ProxyServer]) -> None:
    """Take no more connections, and wait for the requests under way; a second signal ends the wait."""
    router.draining = True
    for server in servers:
        with contextlib.suppress(OSError):
            server.socket.shutdown(socket.SHUT_RDWR)    # refuses at once, and wakes the loop
        server.shutdown()
        server.server_close()
    deadline = time.monotonic() + DRAIN_S
    while router.connections and time.monotonic() < deadline:
        for handler in list(router.connections):
            if not handler.busy:
                handler.shut = True
                with contextlib.suppress(OSError):
                    handler.request.shutdown(socket.SHUT_RD)
        if any(number != signal.SIGHUP for number in signals.wait(0.02)):
            router.log.write("STOP", "second signal: ending at once")
            return


def remove_files(*paths: str) -> None:
    """Remove files that may not be there."""
    for path in paths:
        with contextlib.suppress(OSError):
            os.unlink(path)


def run_to_the_end(signals: Signals, lock: Lock, router: Router, servers: list[ProxyServer]) -> None:
    """Wait for a signal, drain, and end the process."""
    try:
        wait_for_the_end(signals, router)
        lock.mark_stopping()
        drain(signals, router, servers)
        router.save_state()
        if router.keeps_state:
            remove_files(router.store.paths.pid, router.store.paths.run)
        router.log.write("STOP", "rrouter ends, pid %d" % os.getpid())
        router.log.close()
        lock.release()
        os._exit(0)                     # threads of streams past the drain time would hold the interpreter up
    except Exception as error:          # a defect of ours
        router.log.write("ERROR", describe_defect(error))
        router.log.close()
        os._exit(1)


def serve(settings: Settings, paths: Paths, ready: int | None = None) -> int:
    """Set the router going; return 0, also where another one runs already.

    `ready` is the descriptor on which `start` waits for one word: `ready`, `running`, or what is wrong.

    Python keeps the syntax tree of its main script, 8 MB, until the script has ended.  So the main thread goes back
    and ends it; the interpreter then waits for `run_to_the_end`, whose thread is no daemon, before it takes anything
    down.
    """
    signals = Signals()
    paths.create()
    lock = Lock(paths.lock)
    owns_files = lock.acquire()
    if ready is not None and not owns_files:
        tell(ready, "running")
        return 0
    log = Log(paths.log, echo=ready is None)
    raise_descriptor_limit()
    use_one_heap()
    router = Router(settings, paths, log, who_starts() if ready is None else "start")
    router.connections_max = min(CONNECTIONS_MAX, max(1, (descriptor_limit() - CONNECTIONS_RESERVE - 24) // 2))
    servers = listen(settings, router)
    if owns_files:
        router.load_state()
        claim(paths, settings, router)
    else:
        log.write("START", "a daemon (pid %s) runs already: this one shares its mode and config, and leaves its pid, "
                           "run and state files alone" % lock.holder())
    if settings.host != "localhost":
        log.write("START", "RROUTER_HOST=%s: whoever reaches that address can spend your quota" % settings.host)
    log.write("START", "rrouter %s on %s -> %s, pid %d, by %s" % (
        __version__, settings.listen_addr, settings.upstream, os.getpid(), router.started_by))
    for loop in [server.serve_forever for server in servers] + [lambda: _watch_for_ever(router),
                                                                       log.write_for_ever]:
        threading.Thread(target=loop, daemon=True).start()
    if ready is not None:
        tell(ready, "ready")
    if (3, 12) <= sys.version_info < (3, 12, 2):    # there no thread starts once the script has ended (gh-113964)
        run_to_the_end(signals, lock, router, servers)
    threading.Thread(target=run_to_the_end, args=(signals, lock, router, servers)).start()
    return 0


class Running(NamedTuple):
    """A live daemon, as its files tell."""

    pid: int
    host: str
    port: int
    started_by: str
    stopping: bool              #: takes no more requests, those under way finish


def find_daemon(paths: Paths, settings: Settings | None = None) -> Running | None:
    """Return the daemon that lives now, or None.  Where run.json is no help, the environment says where it listens."""
    found = Lock(paths.lock).look()
    if found is None:
        return None
    pid, stopping = found
    try:
        run = json.loads(read_file(paths.run) or b"{}")
        if run["pid"] == pid:
            return Running(pid, str(run["host"]), int(run["port"]), str(run["startedBy"]), stopping)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        pass
    settings = settings or read_environment(dict(os.environ))
    return Running(pid, settings.host, settings.port, "unknown", stopping)


def last_lines(path: str, count: int = 5) -> str:
    """Return the last lines of a file, for people."""
    try:
        with open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            lines = file.read().decode("utf-8", "replace").splitlines()[-count:]
    except OSError as error:
        lines = ["%s: %s" % (path, reason_of(error))]
    return "\n".join("  " + printable(line) for line in lines)


def wait_for_health(paths: Paths) -> tuple[Running, dict[str, Any]]:
    """Return the daemon and its /health once it answers; raise DaemonError with the log's last lines if it does not."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        daemon = find_daemon(paths)
        health = ask_health(daemon.host, daemon.port) if daemon else None
        if daemon and health and health["pid"] == daemon.pid:
            return daemon, health
        time.sleep(0.02)
    raise DaemonError("the daemon does not answer; the log ends with\n" + last_lines(paths.log))


def spawn_daemon(paths: Paths) -> None:
    """Start `serve` as a daemon; return when it listens or finds another one running.  Raises DaemonError.

    Forked twice, so that it can never get a terminal again and belongs to nobody; then a new program, for what macOS
    loads into a process does not survive a fork (python/cpython#105912).
    """
    paths.create()
    program = os.path.abspath(__file__ if os.path.isfile(__file__) else sys.argv[0])
    read_end, write_end = os.pipe()
    log = os.open(paths.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o600)     # for a FIFO
    null = os.open(os.devnull, os.O_RDWR)
    arguments = [sys.executable, program, "serve", "--ready-descriptor", "3"]
    highest = min(descriptor_limit(), 1 << 16)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            if os.fork() == 0:
                os.umask(0o077)
                os.chdir("/")
                # First out of the way: a caller that closed its own 0 to 3 has these numbers given out again.
                sources = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in (null, log, log, write_end)]
                for target, source in enumerate(sources):
                    os.dup2(source, target)
                os.closerange(4, highest)
                os.execv(sys.executable, arguments)
        finally:
            os._exit(1)
    for descriptor in (write_end, log, null):
        os.close(descriptor)
    os.waitpid(child, 0)
    with os.fdopen(read_end, "rb") as pipe:
        poller = select.poll()
        poller.register(pipe, select.POLLIN)
        words = pipe.read().decode("utf-8", "replace") if poller.poll(START_S * 1000) else ""
    if words not in ("ready", "running"):
        raise DaemonError(words or "the daemon did not start; the log ends with\n" + last_lines(paths.log))


SYSTEMD_UNIT = "rrouter.service"


def _run(command: tuple[str, ...]) -> tuple[int, str]:
    """Run a manager's command; return its status and what it printed."""
    import subprocess
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              timeout=DRAIN_S + 15)
        return done.returncode, done.stdout.decode("utf-8", "replace")
    except (OSError, subprocess.SubprocessError) as error:
        return 127, str(error)


class Manager(NamedTuple):
    """A service manager that has rrouter installed: its name and its commands."""

    name: str
    start_commands: tuple[tuple[str, ...], ...]
    stop_command: tuple[str, ...]

    def start(self) -> None:
        """Ask for the start; raise DaemonError if the manager refuses."""
        for command in self.start_commands[:-1]:
            _run(command)               # fails where it is loaded already
        self._demand(self.start_commands[-1])

    def stop(self) -> None:
        """Ask for the stop; raise DaemonError if the manager refuses."""
        self._demand(self.stop_command)

    def _demand(self, command: tuple[str, ...]) -> None:
        status, output = _run(command)
        if status:
            raise DaemonError("%s failed: %s" % (" ".join(command), printable(output.strip()) or "status %d" % status))


def unit_path(home: str) -> str:
    """Return where the systemd user unit is installed."""
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.join(home, ".config")
    return os.path.join(config, "systemd", "user", SYSTEMD_UNIT)


def agent_path(home: str) -> str:
    """Return where the launchd agent is installed."""
    return os.path.join(home, "Library", "LaunchAgents", LAUNCHD_LABEL + ".plist")


def find_manager(home: str) -> Manager | None:
    """Return the service manager in which rrouter is installed and which answers, or None."""
    if os.path.isfile(unit_path(home)) and _run(("systemctl", "--user", "show-environment"))[0] == 0:
        return Manager("systemd", (("systemctl", "--user", "daemon-reload"),
                                   ("systemctl", "--user", "reset-failed", SYSTEMD_UNIT),
                                   ("systemctl", "--user", "start", SYSTEMD_UNIT)),
                       ("systemctl", "--user", "stop", SYSTEMD_UNIT))
    domain = "gui/%d" % os.getuid()
    if os.path.isfile(agent_path(home)) and _run(("launchctl", "print", domain))[0] == 0:
        # Loaded anew at each start: `kickstart` would go on with the plist as it was when it was loaded.
        return Manager("launchd", (("launchctl", "bootstrap", domain, agent_path(home)),
                                   ("launchctl", "kickstart", "%s/%s" % (domain, LAUNCHD_LABEL))),
                       ("launchctl", "bootout", "%s/%s" % (domain, LAUNCHD_LABEL)))
    return None


def start_daemon(paths: Paths, home: str) -> str:
    """Start the daemon unless one runs; return what to tell.  Raises DaemonError, UsageError."""
    daemon = find_daemon(paths)
    if daemon:                          # it may be about to end, or still to answer
        until(lambda: Lock(paths.lock).holder() != daemon.pid or ask_health(daemon.host, daemon.port),
              DRAIN_S + 5 if daemon.stopping else START_S)
        daemon = find_daemon(paths)
    if daemon:
        daemon, _ = wait_for_health(paths)
        return "rrouter is already running (pid %d, port %d)" % (daemon.pid, daemon.port)
    settings = read_environment(dict(os.environ))
    addresses_of(settings)              # a name that does not exist is a wrong use, to be told here
    manager = find_manager(home)
    if manager:
        manager.start()
    else:
        try:
            spawn_daemon(paths)
        except OSError as error:
            raise DaemonError("%s: %s" % (error.filename or "cannot start a process", reason_of(error))) from error
    daemon, health = wait_for_health(paths)
    told = "rrouter runs (pid %d, port %d, by %s), mode %s" % (
        daemon.pid, daemon.port, health["startedBy"], health["mode"])
    runs = Settings(daemon.host, daemon.port, health["upstreamURL"])
    if manager and any(os.environ.get("RROUTER_" + name.upper()) and getattr(settings, name) != getattr(runs, name)
                       for name in Settings._fields):
        told += "\nnote: %s starts it on %s -> %s, and not as RROUTER_* of this shell say: put them into %s" % (
            manager.name, health["listenAddr"], health["upstreamURL"], os.path.join(home, ".config", "rrouter.env"))
    return told


def _signal(paths: Paths, pid: int, number: int) -> None:
    """Signal the daemon `pid`, if it still is the one that holds the lock."""
    if Lock(paths.lock).holder() != pid:
        return
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
    except PermissionError as error:
        raise DaemonError("pid %d is not yours to stop" % pid) from error


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
        return True
    except OSError:
        return False


def stop_daemon(paths: Paths, home: str) -> str:
    """Stop the daemon, and return what to tell when its port is free.  Raises DaemonError."""
    daemon = find_daemon(paths)
    if not daemon:
        remove_files(paths.pid, paths.run)
        return "rrouter is not running"
    manager = find_manager(home) if daemon.started_by in ("systemd", "launchd") else None
    if manager:
        manager.stop()
    elif not daemon.stopping:           # a second signal would cut the running answers off
        _signal(paths, daemon.pid, signal.SIGTERM)
    told = "rrouter stopped (pid %d)" % daemon.pid
    if not until(lambda: Lock(paths.lock).holder() != daemon.pid, DRAIN_S + 5):
        _signal(paths, daemon.pid, signal.SIGKILL)
        told = "rrouter killed (pid %d), for it did not stop within %d s" % (daemon.pid, DRAIN_S + 5)
        if not until(lambda: Lock(paths.lock).holder() != daemon.pid, 5):
            raise DaemonError("pid %d does not end: see what holds it" % daemon.pid)
        remove_files(paths.pid, paths.run)
    if not until(lambda: not _listens(daemon.host, daemon.port), 2):
        told += "; port %d is held by %s now" % (daemon.port, port_owner(daemon.port) or "another program")
    return told


# Command line #################################################################

class Context(NamedTuple):
    """What a command works with."""

    home: str
    paths: Paths
    arguments: argparse.Namespace
    commands: tuple[Any, ...]   #: the table COMMANDS, for `help`


def read_config(paths: Paths) -> Config:
    """Return what config.json says, or the defaults if there is none; raise RouterError."""
    try:
        return config_of(read_file(paths.config))
    except (ConfigError, UnicodeDecodeError, OSError) as error:
        raise RouterError("%s (%s): mend it with `rrouter config edit` or start over with `rrouter config reset`" % (
            complain_about_config(error), paths.config)) from error


def write_file(path: str, text: str) -> None:
    """Write a file of ~/.rrouter for a command; raise RouterError."""
    try:
        write_atomically(path, text)
    except OSError as error:
        raise RouterError("%s: cannot be written: %s: see to its rights and to free space" % (
            path, reason_of(error))) from error


def cmd_serve(context: Context) -> int:
    """run in the foreground; log to stderr and the log file"""
    ready = context.arguments.ready_descriptor
    try:
        return serve(read_environment(dict(os.environ)), context.paths, ready)
    except Exception as error:
        if ready is not None:
            tell(ready, str(error) if isinstance(error, RouterError) else describe_defect(error))
        raise


def cmd_start(context: Context) -> int:
    """start the daemon (through systemd or launchd where installed)"""
    print(start_daemon(context.paths, context.home))
    return 0


def cmd_stop(context: Context) -> int:
    """stop it: running requests finish first"""
    print(stop_daemon(context.paths, context.home))
    return 0


def cmd_restart(context: Context) -> int:
    """stop and start"""
    read_environment(dict(os.environ))      # before the stop: a bad value must not end a running daemon
    print(stop_daemon(context.paths, context.home))
    print(start_daemon(context.paths, context.home))
    return 0


def _offline_mode(paths: Paths) -> str:
    try:
        content = read_file(paths.mode)
        config = read_config(paths)
    except OSError as error:
        return "unknown: %s: %s" % (paths.mode, reason_of(error))
    except RouterError as error:
        return "unknown: %s" % error
    word = content.decode("utf-8", "backslashreplace").strip().lower() if content else ""
    mode = config.resolve(word or config.default_mode)
    return mode if not word or word == mode else "%s (the mode file says %r)" % (mode, printable(word, 40))


def _print_rows(*rows: tuple[str, str]) -> None:
    for name, text in rows:
        print("%-10s%s" % (name and name + ":", text))


def _uptime(seconds: int) -> str:
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    return "%dd %dh" % (days, hours) if days else "%dh %dm" % (hours, minutes) if hours else "%dm %ds" % (
        minutes, seconds % 60)


def describe_target(auto: dict[str, Any], now: float) -> str:
    """Return in words which target serves, since when, why, and when the other is tried again."""
    if not auto["switched"]:
        failing = ["%d %s" % (auto[key], name) for key, name in (
            ("failureCount", "HTTP errors"), ("timeoutCount", "timeouts")) if auto[key]]
        return auto["currentTarget"] + (" (%s in a row)" % ", ".join(failing) if failing else "")
    failed = [target for target in auto["targets"] if target != auto["currentTarget"]][0]
    reason = re.sub(r"^(\d+) consecutive (HTTP errors|timeouts)", r"gave \1 \2 in a row", auto["reason"] or "")
    since = datetime.datetime.strptime(auto["switchedAt"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=datetime.timezone.utc)
    left = auto["cooldownRemainingSeconds"]
    tries = "in %d min" % -(-left // 60) if left >= 60 else "in %d s" % left if left else "now"
    today = datetime.datetime.fromtimestamp(now).date()
    return "on %s since %s because %s %s; tries %s again %s" % (
        auto["currentTarget"], since.astimezone().strftime("%H:%M" if since.astimezone().date() == today else
                                                           "%Y-%m-%d %H:%M"), failed, reason, failed, tries)


def cmd_status(context: Context) -> int:
    """show mode, target, daemon, upstream and problems"""
    daemon = find_daemon(context.paths)
    health = ask_health(daemon.host, daemon.port) if daemon else None
    if daemon and daemon.stopping:
        print("daemon:   pid %d is stopping: running answers finish first" % daemon.pid,
              file=sys.stderr if context.arguments.json else sys.stdout)
        return 3
    if daemon and not health:
        raise DaemonError("pid %d runs but does not answer on port %d: see %s, or `rrouter restart`" % (
            daemon.pid, daemon.port, context.paths.log))
    if context.arguments.json:
        if health is None:
            print("rrouter: not running; start it with `rrouter start`", file=sys.stderr)
            return 3
        print(json.dumps(health, indent=2))
        return 0
    if daemon is None or health is None:
        _print_rows(("mode", _offline_mode(context.paths)), ("daemon", "not running; start it with `rrouter start`"))
        return 3
    url = urllib.parse.urlsplit(health["upstreamURL"])
    reachable = _listens(url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
    auto = health["autoSwitch"]
    rows = [("mode", health["mode"]), ("target", describe_target(auto, time.time()) if auto["active"]
                                       else health["currentTarget"])]
    rows += [("", "%s: %s" % (printable(model), describe_target(own, time.time())))
             for model, own in auto["models"].items()]
    rows += [("daemon", "pid %d, %s, up %s, started by %s" % (
                  health["pid"], health["listenAddr"], _uptime(health["uptimeSeconds"]), health["startedBy"])),
             ("requests", "%d, %d running" % (health["requestCount"], health["activeRequests"])),
             ("upstream", "%s, %s" % (health["upstreamURL"], "reachable" if reachable else "not reachable"))]
    rows += [("problem", printable(problem, 500)) for problem in health["problems"]]
    _print_rows(*rows)
    return 0


def set_mode(paths: Paths, mode: str) -> int:
    """Write the mode, and return when it is in force: every request that begins after this is served by it."""
    daemon = find_daemon(paths)
    try:
        config = read_config(paths)
    except RouterError as error:
        if daemon is None:
            raise
        print("rrouter: %s" % error, file=sys.stderr)   # the daemon goes on with the last good one, and knows its modes
    else:
        if mode == MODE_AUTO and config.auto_error:
            raise RouterError("config.json: " + config.auto_error)
        if mode != MODE_AUTO and mode not in config.modes:
            raise RouterError("mode %r is not defined by config.json; defined are %s" % (
                printable(mode, 40), ", ".join([*config.modes] + [MODE_AUTO] * (not config.auto_error))))
    paths.create()
    write_file(paths.mode, mode + "\n")
    if daemon is None or daemon.stopping:
        print("mode %s (written; %s)" % (mode, "rrouter is stopping" if daemon else "no rrouter is running"))
        return 0
    health = ask_health(daemon.host, daemon.port)
    if health is None or health["mode"] != mode:
        raise DaemonError("mode %s is written to %s, but the daemon (pid %d, port %d) %s" % (
            mode, paths.mode, daemon.pid, daemon.port,
            "is in mode %s: see `rrouter status`" % health["mode"] if health else "does not answer: `rrouter restart`"))
    print("mode %s (in force: pid %d, port %d)" % (mode, daemon.pid, daemon.port))
    return 0


def cmd_mode(context: Context) -> int:
    """print the mode, or set any mode of config.json"""
    if context.arguments.name is None:
        daemon = find_daemon(context.paths)
        health = ask_health(daemon.host, daemon.port) if daemon else None
        print(health["mode"] if health else _offline_mode(context.paths))
        return 0
    return set_mode(context.paths, context.arguments.name.strip().lower())


def cmd_antigravity(context: Context) -> int:
    """rewrite model names for Antigravity (Gemini)"""
    return set_mode(context.paths, "antigravity")


def cmd_claude(context: Context) -> int:
    """leave model names as they are: Claude"""
    return set_mode(context.paths, "claude")


def cmd_auto(context: Context) -> int:
    """let failures decide; while in auto: forget the waits, retry at once"""
    return set_mode(context.paths, MODE_AUTO)


def config_show(paths: Paths) -> int:
    """Print the effective config on stdout, its path on stderr."""
    there = os.path.exists(paths.config)
    print(paths.config + ("" if there else " (not there: the defaults)"), file=sys.stderr)
    config = read_config(paths)
    for problem in config.problems:
        print("rrouter: config.json: " + problem, file=sys.stderr)
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
        status = subprocess.call(shlex.split(editor) + [paths.config])
    except (OSError, ValueError) as error:
        raise RouterError("editor %s: %s: set VISUAL or EDITOR" % (
            printable(editor), reason_of(error) if isinstance(error, OSError) else error)) from error
    if status:
        raise RouterError("editor %s ended with status %d" % (printable(editor), status))
    for problem in read_config(paths).problems:
        print("rrouter: config.json: " + problem, file=sys.stderr)
    print("%s is valid" % paths.config)
    return 0


def keep_beside(path: str, content: bytes) -> str:
    """Write `content` to a new file PATH.bak-YYYYmmdd-HHMMSS and return its path; raise OSError."""
    name = "%s.bak-%s" % (path, time.strftime("%Y%m%d-%H%M%S"))
    for suffix in [""] + ["-%d" % number for number in range(2, 1000)]:
        with contextlib.suppress(FileExistsError), open(name + suffix, "xb", buffering=0) as file:
            try:
                os.chmod(name + suffix, 0o600)
                problem = _write_all(file.fileno(), content)
                if problem is not None:
                    raise problem
                os.fsync(file.fileno())
            except OSError:             # a full disk: half a backup is none
                os.unlink(name + suffix)
                raise
            return name + suffix
    raise FileExistsError(errno.EEXIST, "too many backups of this second", name)


def config_reset(paths: Paths) -> int:
    """Write the defaults; what was there is kept beside it."""
    paths.create()
    try:
        content = read_file(paths.config)
    except OSError as error:
        raise RouterError("%s: %s: move it away first" % (paths.config, reason_of(error))) from error
    try:
        if content is not None:
            print("kept: %s" % keep_beside(paths.config, content))
    except OSError as error:
        raise RouterError("%s: cannot be kept beside itself: %s: see to the rights of its directory and to free space"
                          % (paths.config, reason_of(error))) from error
    write_file(paths.config, config_text(config_of(None)) + "\n")
    print("%s holds the defaults" % paths.config)
    return 0


def config_path(paths: Paths) -> int:
    """Print where the config is."""
    print(paths.config)
    return 0


def cmd_config(context: Context) -> int:
    """print the effective config, edit or reset it, or print its path"""
    return {None: config_show, "edit": config_edit, "reset": config_reset,
            "path": config_path}[context.arguments.action](context.paths)


def help_text(commands: tuple[Any, ...]) -> str:
    """Return what `rrouter help` shows of `commands`, the rows of COMMANDS."""
    usage = {"status": "status [--json]", "mode": "mode [NAME]", "config": "config [edit|reset|path]"}
    rows = ["  %-26s %s" % (", ".join((usage.get(name, name),) + aliases), function.__doc__)
            for name, aliases, function, _ in commands]
    return """rrouter %s - local router between the Claude Code CLI and CLIProxyAPI

usage: rrouter COMMAND

%s

files in ~/.rrouter
  mode          antigravity, claude, auto, or another mode of config.json
  config.json   rules and the settings of mode auto; without it the defaults hold (`rrouter config`)
  run.json, rrouter.pid, rrouter.lock, state.json     the daemon's own
  logs/rrouter.log            one line a request; rotated at %d MB
elsewhere
  ~/.config/rrouter.env       RROUTER_* for the service, where install.sh has installed one

environment
  RROUTER_PORT      port to listen on (8316)
  RROUTER_UPSTREAM  where CLIProxyAPI is (http://localhost:8317); http or https, may have a path
  RROUTER_HOST      address to listen on (localhost: 127.0.0.1 and ::1); others can spend your quota if they reach it

examples
  rrouter start                                       then, in ~/.claude/settings.json:
                                                      {"env": {"ANTHROPIC_BASE_URL": "http://localhost:8316"}}
  rrouter ag                                          the next request goes to Antigravity
  rrouter auto                                        failures decide; typed again: retry the failed side at once
  curl http://localhost:8316/health
  tail -f ~/.rrouter/logs/*.log | grep AUTO

exit status: 0 done, 1 failed, 2 wrong usage, 3 `status` when nothing runs""" % (
        __version__, "\n".join(rows), LOG_MAX_BYTES >> 20)


def cmd_help(context: Context) -> int:
    """show this text"""
    print(help_text(context.commands))
    return 0


def cmd_version(_: Context) -> int:
    """print the version"""
    print("rrouter " + __version__)
    return 0


# Command line: check ##########################################################

OK, WARN, FAIL = "ok", "warn", "fail"


def check_daemon(settings: Settings, daemon: Running | None,
                 health: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    """Yield whether the daemon runs, and is this program; if none runs, who has its port."""
    if daemon and health:
        yield OK, "daemon: pid %d on %s, started by %s" % (daemon.pid, settings.listen_addr, daemon.started_by)
        if health["version"] != __version__:
            yield WARN, "version: the daemon is %s, this program %s: rrouter restart" % (
                printable(str(health["version"])), __version__)
    elif daemon:
        yield FAIL, "daemon: pid %d does not answer on port %d: rrouter restart" % (daemon.pid, daemon.port)
    else:
        yield FAIL, "daemon: not running: rrouter start"
        if _listens(settings.host, settings.port):
            yield FAIL, "port: " + describe_taken(settings)


def is_as_installed(home: str, path: str) -> bool:
    """Return whether a file is as install.sh left it, or was not installed by it."""
    import hashlib
    try:
        record = json.loads(read_file(os.path.join(home, ".rrouter", "install.json")) or b"{}")["files"][path]
        return hashlib.sha256(read_file(path) or b"").hexdigest() == record["sha256"][-1]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return True


def check_service(home: str) -> Iterator[tuple[str, str]]:
    """Yield whether what the service manager starts is this program."""
    program = os.path.join(home, "bin", "rrouter")
    if not os.path.isfile(unit_path(home)) and not os.path.isfile(agent_path(home)):
        yield OK, "service: none is installed; rrouter start forks a daemon, and nothing starts it at the next login"
    for path, name in ((unit_path(home), "systemd unit"), (agent_path(home), "launchd agent")):
        if not os.path.isfile(path):
            continue
        if not os.access(program, os.X_OK):
            yield FAIL, "service: %s %s starts %s, which is not there: run install.sh again" % (name, path, program)
        elif not is_as_installed(home, path):
            yield WARN, "service: %s %s is not what install.sh wrote: changed by you, or older" % (name, path)
        elif find_manager(home) is None:
            yield WARN, "service: %s is installed, but its manager does not answer here: rrouter start forks" % name
        else:
            yield OK, "service: %s %s" % (name, path)


def _points_here(url: str, settings: Settings) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.hostname in ("localhost", "127.0.0.1", "::1", settings.host) and (
            parts.port or (443 if parts.scheme == "https" else 80)) == settings.port
    except ValueError:
        return False


def claude_settings_path(home: str) -> str:
    """Return where Claude Code keeps its settings."""
    return os.path.join(os.environ.get("CLAUDE_CONFIG_DIR") or os.path.join(home, ".claude"), "settings.json")


def claude_environment(home: str) -> dict[str, str]:
    """Return the `env` of Claude Code's settings.json, {} if there is none; raise ValueError if it is no JSON."""
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
    wanted = "http://localhost:%d" % settings.port
    in_shell = os.environ.get("ANTHROPIC_BASE_URL")
    path = claude_settings_path(home)
    try:
        url = claude_environment(home).get("ANTHROPIC_BASE_URL")
    except ValueError as error:
        yield WARN, "%s: %s: Claude Code cannot read it either" % (path, error)
        return
    if url is None and in_shell and _points_here(in_shell, settings):
        yield OK, "shell: ANTHROPIC_BASE_URL is %s (%s says nothing)" % (printable(in_shell), path)
    elif url is None:
        yield WARN, '%s: set {"env": {"ANTHROPIC_BASE_URL": "%s"}} to use rrouter' % (path, wanted)
    elif _points_here(url, settings):
        yield OK, "%s: ANTHROPIC_BASE_URL is %s" % (path, printable(_without_password(url)))
    else:
        yield WARN, "%s: ANTHROPIC_BASE_URL is %s: Claude Code goes elsewhere; set %s" % (
            path, printable(_without_password(url)), wanted)
    if in_shell and not _points_here(in_shell, settings):
        yield WARN, "shell: ANTHROPIC_BASE_URL=%s points elsewhere: unset it, also in your shell's start files" % (
            printable(_without_password(in_shell)))


def get_models(upstream: Upstream, fields: dict[str, str]) -> tuple[int, bytes]:
    """Return (status, body) of the upstream's /v1/models; raise UpstreamUnreachable, OSError, HTTPException."""
    connection = upstream.open()
    with contextlib.closing(connection):
        connection.request("GET", upstream.base_path.decode("ascii") + "/v1/models", headers=fields)
        response = connection.getresponse()
        return response.status, response.read(READ_AHEAD_MAX_BYTES)


def check_models(config: Config, names: set[str]) -> Iterator[tuple[str, str]]:
    """Yield which names written by the rules the upstream does not know, with the lines that make it know them."""
    rewrites = sorted({rule.rewrite for rules in config.modes.values() for rule in rules})
    missing = [name for name in rewrites if name not in names]
    if not missing:
        yield OK, ("models: the upstream knows all %d names that the rules write" % len(rewrites) if rewrites else
                   "models: no rule writes a name")
    for name in missing:
        yield WARN, ("models: the upstream does not know %s (400 unknown provider): use one of its names (%s) in a "
                     "rule, or add to CLIProxyAPI's config.yaml:\n"
                     "        oauth-model-alias:\n          antigravity:\n"
                     "            - name: \"AN-ID-FROM-THAT-LIST\"\n              alias: \"%s\"\n"
                     "              fork: true" % (printable(name), ", ".join(
                         printable(n, 60) for n in sorted(names)[:6]) or "none listed", printable(name)))


def check_upstream(home: str, settings: Settings, config: Config | None) -> Iterator[tuple[str, str]]:
    """Yield whether the upstream answers, takes the client's key, and knows the names that the rules write."""
    environment = dict(os.environ)
    with contextlib.suppress(ValueError):
        environment = dict(claude_environment(home), **environment)
    name = next(filter(environment.get, ("ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_API_KEY")), "")
    key = environment.get(name)
    # Without Anthropic's headers: to those CLIProxyAPI shows disguised names.
    fields = {"Authorization": "Bearer " + key} if key and printable(key, 4096) == key else {}
    url = settings.upstream
    try:
        status, body = get_models(Upstream(url, lambda _: False), fields)
    except UpstreamUnreachable as error:
        yield FAIL, "upstream: %s %s: %s" % (url, error, error.remedy)
        return
    except (OSError, http.client.HTTPException):
        yield FAIL, "upstream: %s answers no HTTP in time: is that CLIProxyAPI?" % url
        return
    if status in (401, 403):
        yield WARN, "upstream: %s answers, but refuses %s (%d): compare api-keys in CLIProxyAPI's config with %s" % (
            url, "the key of Claude Code" if key else "a request without a key", status,
            name or "the key that Claude Code is given")
        return
    yield OK, "upstream: %s answers%s" % (url, " and takes the key" if key and status == 200 else "")
    try:
        models = {str(entry["id"]) for entry in json.loads(body)["data"]} if status == 200 else None
    except (ValueError, KeyError, TypeError, RecursionError):
        models = None
    if models is None:
        yield WARN, "models: %s/v1/models gives no list (%d): cannot compare the rules with it" % (url, status)
    elif config is not None:
        yield from check_models(config, models)


def run_checks(context: Context) -> Iterator[tuple[str, str]]:
    """Yield (level, text) of each check."""
    daemon = find_daemon(context.paths)
    health = ask_health(daemon.host, daemon.port) if daemon else None
    settings = (Settings(daemon.host, daemon.port, health["upstreamURL"]) if daemon and health else
                read_environment(dict(os.environ)))
    yield from check_daemon(settings, daemon, health)
    config = None
    try:
        config = read_config(context.paths)
        yield OK, "config: %s" % (context.paths.config if os.path.exists(context.paths.config) else "the defaults")
        for problem in config.problems:
            yield WARN, "config: " + problem
    except RouterError as error:
        yield FAIL, "config: %s" % error
    if health:
        problems = [problem for problem in health["problems"] if not problem.startswith("config.json")]
        yield (WARN if problems else OK), "mode: " + "; ".join([health["mode"]] + problems)
    elif config is not None:
        mode = _offline_mode(context.paths)
        yield FAIL if mode.startswith("unknown:") else WARN if "(" in mode else OK, "mode: " + mode
    yield from check_service(context.home)
    yield from check_client(context.home, settings)
    yield from check_upstream(context.home, settings, config)


def cmd_check(context: Context) -> int:
    """examine everything: one line a check, with the remedy"""
    failed = False
    for level, text in run_checks(context):
        print("%-5s %s" % (level, text))
        failed = failed or level == FAIL
    return 1 if failed else 0


COMMANDS = (
    # name          aliases              function         arguments
    ("serve",       (),                  cmd_serve,       (
        ("--ready-descriptor", {"type": int, "help": argparse.SUPPRESS}),)),
    ("start",       (),                  cmd_start,       ()),
    ("stop",        (),                  cmd_stop,        ()),
    ("restart",     (),                  cmd_restart,     ()),
    ("status",      (),                  cmd_status,      (
        ("--json", {"action": "store_true", "help": "print /health"}),)),
    ("antigravity", ("ag",),             cmd_antigravity, ()),
    ("claude",      ("c",),              cmd_claude,      ()),
    ("auto",        ("a",),              cmd_auto,        ()),
    ("mode",        (),                  cmd_mode,        (("name", {"nargs": "?", "metavar": "NAME"}),)),
    ("check",       ("health", "--check"), cmd_check,     ()),
    ("config",      (),                  cmd_config,      (
        ("action", {"nargs": "?", "choices": ("edit", "reset", "path")}),
        ("--yes", {"action": "store_true", "help": "accepted; reset never asks"}))),
    ("help",        ("-h", "--help"),    cmd_help,        ()),
    ("version",     ("-V", "--version"), cmd_version,     ()),
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="rrouter", add_help=False, allow_abbrev=False)
    parser.print_usage = lambda file=None: print("usage: rrouter COMMAND; see `rrouter help`", file=file)  # type: ignore
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, aliases, function, arguments in COMMANDS:
        words = [alias for alias in aliases if not alias.startswith("-")]
        command = commands.add_parser(name, aliases=words, description=function.__doc__, allow_abbrev=False)
        command.set_defaults(function=function)
        for argument, options in arguments:
            command.add_argument(argument, **options)
    return parser


def open_standard_streams() -> None:
    """Give whoever closed 0, 1 or 2 /dev/null: else the next file opened would get the number, and what is printed."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, closefd=False))


def run_command(argv: list[str] | None) -> int:
    """Run one command; return its exit status."""
    open_standard_streams()
    words = list(sys.argv[1:] if argv is None else argv) or ["help"]
    options = {alias: name for name, aliases, _, _ in COMMANDS for alias in aliases if alias.startswith("-")}
    words[0] = options.get(words[0], words[0])
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")       # type: ignore[union-attr]
    arguments = build_parser().parse_args(words)
    try:
        home = os.path.expanduser("~")
        if not os.path.isabs(home):
            raise UsageError("HOME=%s: expected the absolute path of your home directory" % printable(home))
        status = arguments.function(Context(home, Paths(home), arguments, COMMANDS))
        sys.stdout.flush()
        return status
    except RouterError as error:
        print("rrouter: %s" % error, file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:             # the reader of our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)    # what is left in the buffer would fail again at exit
        print("rrouter: %s: %s" % (error.filename or "output", reason_of(error)), file=sys.stderr)
        return 1
    except Exception as error:          # once, for all commands: no traceback reaches a user
        print("rrouter: " + describe_defect(error), file=sys.stderr)
        return 1


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit status, or exit with it if the command is that of the process."""
    try:
        try:
            status = run_command(argv)
        finally:                        # from here on Ctrl-C ends it at once: Python's own end would show a traceback
            if argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
    except KeyboardInterrupt:
        status = 130
    if argv is None:                    # zipapp's own caller of `main` drops what it returns
        sys.exit(status)
    return status


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:           # before `main` could catch it
        sys.exit(130)
