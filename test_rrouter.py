#!/usr/bin/env python3
"""Tests of rrouter: `python3 test_rrouter.py [CLASS ...]`, or `python3 -m unittest`.

`python3 test_rrouter.py --soak [SEED]` runs the random and the long tests at length.
RROUTER_SOAK_STREAM_S sets the length of its streams of pings (120 seconds), RROUTER_FUZZ_CASES
and RROUTER_FUZZ_SEED the number and the seed of the random cases.  RROUTER_CLAUDE names the
executable of Claude Code; with `none` its tests are skipped.

rrouter runs as a real process (`rrouter.py serve` in an empty HOME), and every byte passes through
sockets on free ports of the loopback addresses.  The upstream is scripted: it records each request
and plays the responses it was given.  Pure functions are tested by tables, with a clock that only
the test moves.
"""

import __future__

import ast
import atexit
import base64
import calendar
import collections
import concurrent.futures
import contextlib
import copy
import ctypes
import dis
import errno
import faulthandler
import fcntl
import functools
import gzip
import http.client
import inspect
import io
import itertools
import json
import mmap
import os
import pathlib
import plistlib
import pwd
import py_compile
import random
import re
import select
import shutil
import signal
import socket
import ssl
import stat
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import types
import unicodedata
import unittest
import warnings
import zipfile
import zlib
from unittest import mock

try:
    import resource
except ImportError:                     # not a Unix
    resource = None

import rrouter
from rrouter import DEFAULT_CONFIG, Fault, Outcome

# A job in the background inherits SIGINT as ignored, and so would the programs that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
HERE = pathlib.Path(__file__).resolve().parent
RROUTER = str(HERE / "rrouter.py")
RROUTER_TEXT = (HERE / "rrouter.py").read_text(encoding="utf-8")
PYTHON = sys.executable, "-S"           # modules of a machine's site-packages cost time
LINUX = sys.platform.startswith("linux")
PROC = os.path.isdir("/proc/self/task")
SOAKING = bool(os.environ.get("RROUTER_SOAK"))      # --soak sets it to the seed
WAIT_S = 10             # the net under every wait; correct code never uses it up

SONNET = "claude-sonnet-5-5"
GEMINI_SONNET = "gemini-claude-sonnet-4-5-thinking"     # the default rules rewrite SONNET to this

# The headers of Claude Code, with made-up values.
CLAUDE_HEADERS = (
    ("Accept", "application/json"), ("Authorization", "Bearer sk-test"),
    ("Content-Type", "application/json"), ("User-Agent", "claude-cli/2.1.330 (external, cli)"),
    ("X-Claude-Code-Session-Id", "0f6c-1"), ("X-Stainless-Arch", "x64"), ("X-Stainless-Lang", "js"),
    ("X-Stainless-OS", "Linux"), ("X-Stainless-Package-Version", "0.94.0"),
    ("X-Stainless-Retry-Count", "0"), ("X-Stainless-Runtime", "node"),
    ("X-Stainless-Runtime-Version", "v24.3.0"), ("X-Stainless-Timeout", "600"),
    ("anthropic-beta", "claude-code-20250219,interleaved-thinking-2025-05-14"),
    ("anthropic-dangerous-direct-browser-access", "true"), ("anthropic-version", "2023-06-01"),
    ("x-app", "cli"), ("Connection", "keep-alive"), ("Accept-Encoding", "gzip, deflate, br, zstd"))


# Scripted upstream ############################################################

def values(fields, name):
    return [value for key, value in fields if key.lower() == name.lower()]


def value_of(fields, name):
    """Return the values of the header `name`, joined by commas; None if it is missing."""
    return ", ".join(values(fields, name)) or None


class Message:
    """A request or a response with `fields`, a list of (name, value) in order, and a `body`."""

    __slots__ = ()

    def header(self, name):
        return value_of(self.fields, name)

    def json(self):
        return json.loads(self.body)


class Received(Message, collections.namedtuple(
        "Received", "method target version fields body head connection")):
    """One request as the upstream received it: `head` are its bytes, `connection` is a number."""

    __slots__ = ()
    model = property(lambda self: self.json().get("model"))


class Response:
    """One scripted response.

    `chunks` (bytes, or an iterable of bytes) are sent one by one, in chunked coding unless
    `framing` is "length", "close" or "none" (no body).  `raw` (the same types) replaces head and
    body, and the connection closes after it unless `stays`.

    The script may wait: for the gate `before` ahead of the head; for `gate` ahead of each chunk but
    the first, or, if it is a list, for one gate ahead of each chunk; for `pause_s` seconds ahead of
    each chunk but the first.  `early` bytes are sent while the request's body is still unread; the
    body is read when the gate `unread` opens.

    It may end badly: `hangup` closes the connection instead of sending a head, without reading the
    body if there were `early` bytes; `cut` closes it after the chunks, without the end of the body.
    `reset` makes every close a reset.
    """

    def __init__(self, status=200, chunks=(b"{}",), *,
                 fields=(("Content-Type", "application/json"),), reason="OK", framing="chunked",
                 raw=None, stays=False, before=None, gate=None, pause_s=0, early=b"", unread=None,
                 hangup=False, cut=False, reset=False, close=False):
        self.status, self.fields, self.reason, self.framing = status, list(fields), reason, framing
        self.chunks = (chunks,) if isinstance(chunks, bytes) else chunks
        self.raw, self.stays = (raw,) if isinstance(raw, bytes) else raw, stays
        self.before, self.gate, self.pause_s = before, gate, pause_s
        self.early, self.unread = early, unread
        self.hangup, self.cut, self.reset, self.close = hangup, cut, reset, close

    def head(self):
        lines = ["HTTP/1.1 %d %s" % (self.status, self.reason)]
        lines += ["%s: %s" % field for field in self.fields]
        if self.framing == "chunked":
            lines.append("Transfer-Encoding: chunked")
        elif self.framing == "length":
            lines.append("Content-Length: %d" % sum(map(len, self.chunks)))
        if self.close or self.framing == "close":
            lines.append("Connection: close")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def steps(self, method="GET"):
        """Yield the script: bytes to send, gates to wait for, seconds to wait."""
        if self.raw is None:
            yield self.head()
            if method == "HEAD" or self.framing == "none":
                return
        chunked = self.raw is None and self.framing == "chunked"
        for number, chunk in enumerate(self.chunks if self.raw is None else self.raw):
            if isinstance(self.gate, list):
                yield self.gate[number]
            elif number:
                yield self.gate or self.pause_s
            yield b"%x\r\n%b\r\n" % (len(chunk), chunk) if chunked else chunk
        if chunked and not self.cut:
            yield b"0\r\n\r\n"

    def wire(self, method="GET"):
        return b"".join(step for step in self.steps(method) if isinstance(step, bytes))


def event(kind, **data):
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), json.dumps({"type": kind, **data}).encode())


def stream(*chunks, **options):
    """Return a response with a 200 event stream; without arguments a whole short message."""
    chunks = chunks or (
        event("message_start", message={"id": "msg_1", "usage": {}}),
        event("content_block_delta", index=0, delta={"type": "text_delta", "text": "hello"}),
        event("message_stop"))
    fields = (("Content-Type", "text/event-stream; charset=utf-8"),)
    return Response(200, chunks, fields=fields, **options)


def error(status, message="scripted", kind="api_error", fields=(), **options):
    """Return a response of `status` in Anthropic's error shape."""
    body = json.dumps({"type": "error", "error": {"type": kind, "message": message}}).encode()
    return Response(status, body, fields=(("Content-Type", "application/json"), *fields),
                    reason="Scripted", framing="length", **options)


def close_by_reset(connection):
    """Make the next close of a socket send a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Upstream:
    """An HTTP server on a free port of 127.0.0.1 that records requests and plays responses.

    `play(*responses)` queues responses; when the queue is empty, `default` is used.  Both take a
    Response or a function of the Received request that returns one.  `received` lists the requests,
    `heads` counts their heads, `connections` the connections, `closed` those that the other side
    closed or reset while a response was due or under way.
    """

    def __init__(self, default=None, port=0, tls=None):
        self.default = default or Response()
        self.received, self.queue = [], collections.deque()
        self.heads = self.closed = self.connections = 0
        self.changed = threading.Condition()
        self.tls, self.open = tls, set()
        self.listener = socket.create_server(("127.0.0.1", port), backlog=256)
        self.port = self.listener.getsockname()[1]
        self.url = "http%s://127.0.0.1:%d" % ("s" if tls else "", self.port)
        threading.Thread(target=self._accept, daemon=True).start()

    def play(self, *responses):
        self.queue.extend(responses)
        return self

    def clear(self):
        """Forget the requests received and the responses queued."""
        with self.changed:
            self.received.clear()
            self.queue.clear()
            self.heads = self.closed = 0

    def wait(self, condition):
        with self.changed:
            if not self.changed.wait_for(lambda: condition(self), WAIT_S):
                raise AssertionError("upstream: waited %s s in vain; %d received, %d closed" % (
                    WAIT_S, len(self.received), self.closed))

    def close(self):
        self.stop_listening()
        self.break_connections()

    def stop_listening(self):
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def break_connections(self, reset=False):
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                if reset:               # sent when the connection's thread closes it
                    close_by_reset(connection)
                connection.shutdown(socket.SHUT_RDWR)

    def models(self):
        """Return the model names received, in order; None for a request without one."""
        return [r.model if r.body.startswith(b"{") else None for r in list(self.received)]

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.connections += 1
                self.open.add(connection)
                threading.Thread(target=self._serve, args=(connection, self.connections),
                                 daemon=True).start()

    def _serve(self, connection, number):
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.tls:
                plain = connection
                connection = self.tls.wrap_socket(connection, server_side=True)
                self.open.discard(plain)
                self.open.add(connection)
            with connection, connection.makefile("rb") as reader:
                while self._exchange(connection, reader, number):
                    pass
        except (OSError, ValueError):
            pass
        finally:
            self.open.discard(connection)

    def _exchange(self, connection, reader, number):
        """Carry one request through; return whether the connection can carry another."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = reader.readline()
            if not line:
                return False
            head += line
        start, *lines = head[:-4].decode("latin-1").split("\r\n")
        fields = [(name, value[value.startswith(" "):])
                  for name, _, value in (line.partition(":") for line in lines)]
        with self.changed:
            self.heads += 1
            response = self.queue.popleft() if self.queue else self.default
            self.changed.notify_all()
        if not callable(response):
            connection.sendall(response.early)
            if response.unread:
                response.unread.wait(WAIT_S * 3)        # longer than the client waits
            if response.early and response.hangup:
                return False
        length = int(value_of(fields, "content-length") or 0)
        body = reader.read(length)
        if len(body) < length:
            return False
        received = Received(*start.split(" "), fields, body, head, number)
        with self.changed:
            self.received.append(received)
            self.changed.notify_all()
        if callable(response):
            response = response(received)
        try:
            return self._play(connection, response, received.method)
        except OSError:
            with self.changed:
                self.closed += 1
                self.changed.notify_all()
            return False

    def _play(self, connection, response, method):
        if response.before:
            self._hold(connection, response.before)
        if response.reset:
            close_by_reset(connection)
        if response.hangup:
            return False
        for step in response.steps(method):
            if isinstance(step, (int, float)):
                time.sleep(step)
            elif hasattr(step, "wait"):
                self._hold(connection, step)
            elif step is not None:
                connection.sendall(step)
        if response.raw is not None:
            return response.stays
        return not (response.cut or response.close or response.framing == "close")

    def _hold(self, connection, gate):
        """Wait until `gate` is set; raise ConnectionError if the other side leaves before."""
        peek = 0 if self.tls else socket.MSG_PEEK       # TLS cannot peek
        while not gate.wait(0.01):
            if select.select([connection], [], [], 0)[0] and not connection.recv(1, peek):
                raise ConnectionAbortedError


# rrouter as a process #########################################################

PORTS = itertools.count()


def free_port():
    """Return a port that is free on both loopback addresses and that no other test will use.

    It is below the range of outgoing connections, because one of them could take it first.  The
    workers have consecutive pids, so the factor keeps their ports far apart.
    """
    while True:
        port = 10_000 + (os.getpid() * 331 + next(PORTS)) % 22_000
        with socket.socket() as four, socket.socket(socket.AF_INET6) as six:
            try:
                four.bind(("127.0.0.1", port))
                six.bind(("::1", port))
            except OSError as problem:
                if problem.errno in (errno.EADDRINUSE, errno.EACCES):
                    continue                        # other errors mean a machine without IPv6
        return port


@functools.cache
def compiled():
    """Return the path of the compiled rrouter.py; Python would compile a main script each time."""
    directory, owner = tempfile.mkdtemp(prefix="rrouter test "), os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(directory, ignore_errors=True))
    return py_compile.compile(RROUTER, os.path.join(directory, "rrouter.pyc"), doraise=True)


def get_health(port, address="127.0.0.1"):
    """Return /health of the daemon on this port; None if nothing there speaks HTTP."""
    connection = http.client.HTTPConnection(address, port, timeout=WAIT_S)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/health")
        return json.loads(connection.getresponse().read())


def processes(home):
    """Return the pids of all processes with this HOME, except this one."""
    found, mark = [], b"HOME=%b\0" % os.fsencode(str(home.root))
    for entry in os.listdir("/proc") if LINUX else ():
        with contextlib.suppress(OSError):
            if entry.isdigit() and mark in pathlib.Path("/proc", entry, "environ").read_bytes():
                found.append(int(entry))
    return found


def wait_until(condition):
    """Return the first true value of `condition()`; fail after WAIT_S."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.005)
    raise AssertionError("waited %s s in vain" % WAIT_S)


class Home:
    """An empty HOME with its ~/.rrouter, in which commands of rrouter run."""

    KEPT = ("PATH", "LANG", "LC_ALL", "PYENV_VERSION", "PYTHONWARNINGS", "PYTHONDEVMODE",
            "COVERAGE_PROCESS_START")

    def __init__(self, upstream="http://127.0.0.1:9", mode=None, config=None, port=None, env=()):
        self.root = pathlib.Path(tempfile.mkdtemp(prefix="rrouter test "))
        self.dir = self.root / ".rrouter"
        self.port = port or free_port()
        self.env = {name: os.environ[name] for name in self.KEPT if name in os.environ}
        if sys.warnoptions and "PYTHONWARNINGS" not in self.env:    # -W applies to commands too
            self.env["PYTHONWARNINGS"] = ",".join(sys.warnoptions)
        self.env.update(HOME=str(self.root), RROUTER_PORT=str(self.port), TZ="UTC",
                        RROUTER_UPSTREAM=getattr(upstream, "url", upstream))
        self.env.update(env)
        if mode is not None:
            self.write("mode", mode + "\n")
        if config is not None:
            self.write("config.json", config if isinstance(config, str) else json.dumps(config))

    def write(self, name, text):
        """Write ~/.rrouter/NAME in place, as `echo >` does."""
        self.dir.mkdir(mode=0o700, exist_ok=True)
        (self.dir / name).write_text(text, encoding="utf-8")

    def read(self, name):
        return (self.dir / name).read_text(encoding="utf-8", errors="replace")

    def command(self, *arguments, program=None, env=(), **options):
        """Return what subprocess needs to run a command, as (arguments, options).

        `program` (a list) replaces Python and the compiled rrouter.py.
        """
        options = {"stdin": subprocess.DEVNULL, "env": {**self.env, **dict(env)}, **options}
        return [*(program or (*PYTHON, compiled())), *arguments], options

    def run(self, *arguments, check=None, timeout=60, **options):
        """Run a command to its end; return its status with `stdout` and `stderr` as text.

        `check` asserts the exit status; no command may print a traceback.
        """
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
                   "text": True, "timeout": timeout, **options}
        words, options = self.command(*arguments, **options)
        done = subprocess.run(words, **options)
        if "Traceback" in (done.stderr or "") or check not in (None, done.returncode):
            raise AssertionError("rrouter %s: status %d\n%s%s" % (
                " ".join(arguments), done.returncode, done.stdout, done.stderr))
        return done

    def begin(self, *arguments, **options):
        """Start a command and return its Popen; the output is discarded by default."""
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **options}
        words, options = self.command(*arguments, **options)
        return subprocess.Popen(words, **options)

    def run_all(self, *commands, **options):
        """Run the commands (tuples of arguments) side by side; return them, ended, in order."""
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            return list(pool.map(lambda arguments: self.run(*arguments, **options), commands))

    def health(self):
        return get_health(self.port)

    def remove_directory(self):
        """Remove ~/.rrouter in one step, while a daemon may write into it."""
        away = self.dir.rename(self.dir.with_name("removed"))
        shutil.rmtree(str(away))

    def remove(self):
        shutil.rmtree(str(self.root), ignore_errors=True)


class Running:
    """`rrouter serve` as a process, in an empty Home unless one is given; a context manager.

    `code` runs in the process before rrouter is imported, and `limits` replace its constants; the
    other options are those of Popen.
    """

    def __init__(self, upstream, mode="antigravity", config=None, env=(), home=None, *,
                 code="", limits=(), **options):
        self.upstream = upstream
        self.home = home or Home(upstream, mode, config, env=env)
        self.own_home = home is None
        self.port = self.home.port
        self.altered = code, limits, options
        self.start()

    def start(self):
        """Start the process and wait for /health; end the process if that fails."""
        (code, limits, options), arguments = self.altered, (compiled(), "serve")
        if code or limits:
            assert set(limits) <= set(vars(rrouter)), limits
            arguments = "-c", "\n".join((
                "import sys", code, "sys.path[0] = %r" % os.path.dirname(compiled()),
                "import rrouter", "vars(rrouter).update(%r)" % dict(limits),
                "sys.exit(rrouter.run_command(['serve']))"))
        self.output = tempfile.TemporaryFile()     # noqa: SIM115
        self.process = self.home.begin(*arguments, program=PYTHON, stdout=self.output,
                                       stderr=self.output, **options)
        try:
            wait_until(self._answers)
        except BaseException:
            self.kill()
            raise

    def kill(self):
        """End the process at once, as the kernel does when memory runs out."""
        self.process.kill()
        self.process.wait(WAIT_S)
        self.output.close()

    def _answers(self):
        if self.process.poll() is not None:
            raise AssertionError("rrouter serve ended with status %s:\n%s" % (
                self.process.returncode, self.printed()))
        health = self.home.health()
        return health is not None and health["pid"] == self.process.pid

    def stop(self):
        """End the process by SIGTERM; its status must be 0, and it must print no traceback."""
        if self.output.closed:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(WAIT_S * 4)
        printed = self.printed()
        self.output.close()
        if "Traceback" in printed or status != 0:
            raise AssertionError("rrouter serve ended with status %s:\n%s" % (status, printed))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.stop()
        finally:
            self.process.kill()             # does nothing to a process that has ended
            self.process.wait(WAIT_S)
            if self.own_home:
                self.home.remove()

    def printed(self):
        self.output.seek(0)
        return self.output.read().decode("utf-8", "replace")

    def log(self):
        return self.home.read("logs/rrouter.log")

    def health(self):
        health = self.home.health()
        if health is None:
            raise ConnectionError("no answer from /health")
        return health

    def connect(self, family=socket.AF_INET):
        address = "127.0.0.1" if family == socket.AF_INET else "::1"
        connection = socket.create_connection((address, self.port), WAIT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def exchange(self, data, half_close=False):
        """Send raw bytes on a new connection; return all bytes until rrouter closes it.

        rrouter closes it only if `data` asks for that (`Connection: close`) or is malformed.
        """
        with self.connect() as connection:
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            return read_all(connection)

    def request(self, method="POST", target="/v1/messages?beta=true", body=None,
                fields=CLAUDE_HEADERS):
        """Send one request with exactly these headers, Host and Content-Length; return a Reply."""
        with self.connect() as connection:
            connection.sendall(request_bytes(method, target, body, fields, self.port))
            return read_reply(connection, method)

    def post(self, model=SONNET, target="/v1/messages?beta=true", fields=CLAUDE_HEADERS, **members):
        message = {"messages": [{"role": "user", "content": "hi"}], **members}
        return self.request("POST", target, chat(model, **message), fields)


def chat(model=SONNET, **members):
    document = {"model": model, "stream": True, **members}
    return json.dumps(document, separators=(",", ":")).encode()


def request_bytes(method="POST", target="/v1/messages", body=None, fields=(), port=8316):
    """Return one request as bytes, Host first."""
    head = ["%s %s HTTP/1.1" % (method, target), "Host: localhost:%d" % port]
    head += ["%s: %s" % field for field in fields]
    if body is not None:
        head.append("Content-Length: %d" % len(body))
    return ("\r\n".join(head) + "\r\n\r\n").encode("latin-1") + (body or b"")


# Reading responses ############################################################

class Malformed(Exception):
    """Bytes that are not an HTTP/1.1 message, or one that two readers could read differently.

    `body` is the part of the body that came before.
    """

    def __init__(self, what, body=b""):
        super().__init__(what)
        self.body = body


class Unfinished(Malformed):
    """Bytes that more bytes may complete to a message."""


TOKEN = "[!#$%&'*+.^_`|~0-9A-Za-z-]+"
FIELD = re.compile(r"(%s):[ \t]*(.*?)[ \t]*" % TOKEN)
STATUS_LINE = re.compile("(HTTP/1[.][01]) (?!101)([1-9][0-9][0-9])(?: (.*))?")


def text_line(line):
    """Return the text of a line without its CR LF; raise Malformed."""
    if not line.endswith(b"\n"):
        raise Unfinished("a part of a line: %r" % line[:200])
    if not re.fullmatch(rb"[\t -~\x80-\xff]*\r\n", line):
        raise Malformed("a line: %r" % line[:200])
    return line[:-2].decode("latin-1")


def read_fields(reader):
    """Return the fields up to a blank line as a list of (name, value); raise Malformed."""
    fields = []
    for line in iter(lambda: text_line(reader.readline()), ""):
        field = FIELD.fullmatch(line)
        if not field:
            raise Malformed("a field: %r" % line[:200])
        fields.append(field.groups())
    return fields


def read_head(reader):
    """Return (status, reason, fields, version) read from a binary file; None at its end."""
    line = reader.readline()
    if not line:
        return None
    start = STATUS_LINE.fullmatch(text_line(line))
    if not start:
        raise Malformed("a status line: %r" % line[:200])
    return int(start[2]), start[3] or "", read_fields(reader), start[1]


def read_body(reader, version, fields, bodiless=False, by_close=False):
    """Return (body, its framing), by the letter of RFC 9112; raise Malformed.

    With `by_close` a body without a length ends with the connection, otherwise it is empty.
    """
    lengths, codings = values(fields, "content-length"), values(fields, "transfer-encoding")
    if codings and (lengths or version == "HTTP/1.0"
                    or [coding.lower() for coding in codings] != ["chunked"]):
        raise Malformed("the transfer coding")
    if len(lengths) > 1 or lengths and not re.fullmatch("[0-9]{1,15}", lengths[0]):
        raise Malformed("the length")
    if bodiless:
        return b"", "none"
    if codings:
        return read_chunked(reader), "chunked"
    if by_close and not lengths:
        return reader.read(), "close"
    length = int(lengths[0]) if lengths else 0
    body = reader.read(length)
    if len(body) < length:
        raise Unfinished("a body", body)
    return body, "length" if lengths else "none"


def read_chunked(reader):
    """Return a chunked body; raise Malformed."""
    body, size = b"", 1
    try:
        while size:
            line = re.fullmatch("([0-9a-fA-F]{1,15})(?:[ \t]*;.*)?", text_line(reader.readline()))
            if not line:
                raise Malformed("the size of a chunk")
            size = int(line[1], 16)
            piece = reader.read(size)
            body += piece
            if len(piece) < size:
                raise Unfinished("a chunk")
            if size and text_line(reader.readline()):
                raise Malformed("the end of a chunk")
        read_fields(reader)                     # the trailers
        return body
    except Malformed as problem:
        problem.body = body
        raise


def read_chunks(reader):
    """Return (chunked body, whether the last chunk came)."""
    try:
        return read_chunked(reader), True
    except Unfinished as problem:
        return problem.body, False


class Reply(Message, collections.namedtuple(
        "Reply", "status reason fields body complete interim framing")):
    """One response as the client received it.

    `complete` is False where it was broken off; `interim` lists the heads of 1xx responses.
    """

    __slots__ = ()


def read_reply(connection, method="GET"):
    """Read one strictly framed response; None if the connection ends without one."""
    with connection.makefile("rb") as reader:
        return read_reply_from(reader, method)


def read_reply_from(reader, method="GET"):
    """Do the same from a binary file, for several responses on one connection."""
    interim, body, framing = [], b"", ""
    try:
        head = read_head(reader)
        while head and head[0] < 200:
            interim.append(head)
            head = read_head(reader)
    except ConnectionError:
        head = None
    if not head:
        return None
    status, reason, fields, version = head
    try:
        body, framing = read_body(reader, version, fields,
                                  method == "HEAD" or status in (204, 304), by_close=True)
    except Unfinished as problem:
        body = problem.body
    except ConnectionError:
        pass
    return Reply(status, reason, fields, body, bool(framing), interim, framing)


def read_all(connection):
    """Return all bytes until the end of the connection or a reset."""
    data = b""
    with contextlib.suppress(ConnectionError):
        for block in iter(lambda: connection.recv(65536), b""):
            data += block
    return data


def receive(response, size):
    """Return `size` bytes of the body of an http.client response; fewer only at its end."""
    data = b""
    while len(data) < size:
        block = response.read1(size - len(data))
        if not block:
            break
        data += block
    return data


def end_to_end(fields):
    """Return `fields` without those of one hop and rrouter's; the name Host in its usual form."""
    hop = ("connection", "content-length", "transfer-encoding")
    return [("Host" if name.lower() == "host" else name, value) for name, value in fields
            if name.lower() not in hop and not name.lower().startswith("x-rrouter-")]


def reset(connection):
    """Close a socket so that the other side gets a reset."""
    close_by_reset(connection)
    connection.close()


# Bases of the tests ###########################################################

class LoopbackTest(unittest.TestCase):
    """Base of the tests with sockets and processes: what they start ends with the test."""

    def gate(self):
        """Return an Event, which the end of the test sets if the test has not."""
        gate = threading.Event()
        self.addCleanup(gate.set)
        return gate

    def start_upstream(self, *arguments, **options):
        upstream = Upstream(*arguments, **options)
        self.addCleanup(upstream.close)
        return upstream

    def start_rrouter(self, *arguments, **options):
        running = Running(*arguments, **options)
        self.addCleanup(running.__exit__)
        return running

    def make_home(self, *arguments, **options):
        home = Home(*arguments, **options)
        self.addCleanup(home.remove)
        return home

    def assert_error(self, reply, status, *words):
        """The reply is an error of rrouter: this status, Anthropic's shape, these words in it."""
        self.assertEqual(reply.status, status, reply)
        content = json.loads(reply.body)
        self.assertEqual(content["type"], "error")
        self.assertTrue(content["error"]["message"].startswith("rrouter: "), content)
        for word in words:
            self.assertIn(word, content["error"]["message"])

    def assert_fails(self, done, status, *patterns):
        """The command ended with this status and one line on stderr with these patterns."""
        self.assertEqual((done.returncode, done.stdout), (status, ""), done)
        self.assertRegex(done.stderr, r"\Arrouter: (?!internal error|output:)[^\n]*\n\Z")
        for pattern in patterns:
            self.assertRegex(done.stderr, pattern)

    def assert_own_error(self, reply, *statuses):
        """The reply is a complete error of rrouter with one of these statuses."""
        self.assertIsNotNone(reply, "closed without a response")
        self.assertIn(reply.status, statuses)
        self.assert_error(reply, reply.status)
        self.assertIn("application/json", reply.header("content-type"))
        self.assertTrue(reply.complete)


class RouterTest(LoopbackTest):
    """Base of the tests through sockets: one upstream and one rrouter for each class.

    The class attributes are the arguments of Running; `altered` is its `code`.  Each test begins
    with an empty script and the mode of its class.
    """

    mode, config, env, upstream_class, altered, limits = "antigravity", None, (), Upstream, "", ()

    @classmethod
    def setUpClass(cls):
        cls.upstream = cls.upstream_class()
        cls.addClassCleanup(cls.upstream.close)
        cls.rrouter = Running(cls.upstream, cls.mode, cls.config, cls.env, code=cls.altered,
                              limits=cls.limits)
        cls.addClassCleanup(cls.rrouter.__exit__)

    @classmethod
    def tearDownClass(cls):
        if not cls.rrouter.output.closed:
            assert "internal error" not in cls.rrouter.printed(), cls.rrouter.printed()

    def setUp(self):
        self.upstream.clear()
        self.upstream.default = Response()
        mode = self.rrouter.home.read("mode").strip()
        if mode != self.mode or mode == "auto":         # writing auto clears all counters
            self.rrouter.home.write("mode", self.mode + "\n")

    def converse(self, data, *methods):
        """Send `data` in one piece on one connection; return a reply for each of `methods`."""
        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            connection.sendall(data)
            return [read_reply_from(reader, method) for method in methods]

    def get(self, target="/v1/models", fields=()):
        return self.rrouter.request("GET", target, None, fields)

    def assert_refused(self, data, *statuses):
        """`data` gets one error, then the end of the connection; the upstream gets nothing."""
        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
            reply = read_reply_from(reader)
            self.assert_own_error(reply, *statuses)
            self.assertEqual(reply.interim, [])
            with contextlib.suppress(ConnectionError):
                self.assertEqual(reader.read(), b"")
        self.assertEqual(self.upstream.received, [])
        return reply

    @contextlib.contextmanager
    def opened(self, model=SONNET, target="/v1/messages"):
        """POST for a stream; yield the http.client response as soon as its head has arrived."""
        connection = http.client.HTTPConnection("127.0.0.1", self.rrouter.port, timeout=WAIT_S)
        with contextlib.closing(connection):
            connection.request("POST", target, chat(model), {"Content-Type": "application/json"})
            with contextlib.closing(connection.getresponse()) as response:
                yield response


# Configuration, by tables #####################################################

class FakeClock:
    """A clock that only `advance` moves; calling it returns Unix seconds."""

    def __init__(self, now=1_800_000_000.0):
        self.now = now

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


def config_with(**changes):
    """Return the default configuration with some top-level members changed."""
    return rrouter.parse_config(json.dumps(dict(rrouter.DEFAULT_CONFIG, **changes)))


class ParseConfigTest(unittest.TestCase):

    def test_the_default_config_has_no_problems_and_round_trips(self):
        config = config_with()
        self.assertEqual(config.problems, ())
        self.assertEqual(rrouter.parse_config(rrouter.config_text(config)), config)
        self.assertEqual(json.loads(rrouter.config_text(config)), rrouter.DEFAULT_CONFIG)

    REFUSED = (
        # text, words of the complaint
        ('{"modes": }', "1:11: expecting value"), ('{"modes":', "the end of the file"),
        ('{"modes" ' + "x" * 30, "1:10: expecting ':' delimiter, found '" + "x" * 20 + "'"),
        ('{\n  "modes" 1}', "2:11: expecting"), ('', "1:1: expecting value"),
        ('[]', "the top level: expected an object"), ('[' * 100_000, "nesting too deep"),
        ('{"modes": {"a": {}},\n "auto": {"firstByteTimeoutSeconds": NaN}}',
         "2:38: expecting a number, found 'NaN"),
        ('{}', "modes: missing"), ('{"modes": {}}', "modes: expected an object with at least"),
        ('{"modes": []}', "modes: expected an object"),
        ('{"modes": {"a": 1}}', "modes.a: expected an object, found 1"),
        ('{"modes": {"auto": {}}}', "modes.auto: expected another name"),
        ('{"modes": {"Fast": {}}}', "modes.Fast: expected a name in lower"),
        ('{"modes": {"a b": {}}}', "modes.a b: expected a name"),
        ('{"modes": {"": {}}}', "expected a name"),
        ('{"modes": {"a": {"mappings": {}}}}', "modes.a.mappings: expected a list"),
        ('{"modes": {"a": {"mappings": [{"match": 7, "rewrite": "x"}]}}}',
         "modes.a.mappings[0].match: expected a non-empty string"),
        ('{"modes": {"a": {"mappings": [{"match": "x"}]}}}',
         "modes.a.mappings[0].rewrite: missing"),
        ('{"modes": {"a": {"mappings": [{"match": "x", "rewrite": ""}]}}}',
         "mappings[0].rewrite: expected"),
        ('{"modes": {"a": {"mappings": [{"match": "x", "rewrite": "y", "class": null}]}}}',
         "mappings[0].class: expected a non-empty string, found null"),
        ('{"modes": {"a": {}}, "defaultMode": "b"}',
         'defaultMode: expected one of a, auto, found "b"'),
        ('{"modes": {"a": {}}, "defaultMode": null}', "defaultMode: expected one of"),
        ('{"modes": {"a": {"mappings": ["x"]}}}', "modes.a.mappings[0]: expected an object"),
        ('{"modes": {"a": {}}, "auto": []}', "auto: expected an object"),
    )
    REFUSED_AUTO = (
        # member of auto, value, words of the complaint
        ("targets", ["a"], "auto.targets: expected the names of two"),
        ("targets", ["a", "a"], "auto.targets: expected the names of two"),
        ("targets", ["a", "b", "c"], "auto.targets: expected the names of two"),
        ("targets", ["a", 2], "auto.targets: expected the names of two"),
        ("failureThreshold", 0, "auto.failureThreshold: expected a whole"),
        ("failureThreshold", 10 ** 30, "auto.failureThreshold: expected a whole"),
        ("timeoutThreshold", 1.5, "auto.timeoutThreshold: expected a whole"),
        ("failureThreshold", True, "found true"),
        ("cooldownMinutes", [], "auto.cooldownMinutes: expected a list"),
        ("cooldownMinutes", 30, "auto.cooldownMinutes: expected a list"),
        ("cooldownMinutes", [1, 1e300], "auto.cooldownMinutes[1]: expected a number"),
        ("cooldownMinutes", [1, -1], "auto.cooldownMinutes[1]: expected"),
        ("cooldownMinutes", [0], "auto.cooldownMinutes[0]: expected"),
        ("firstByteTimeoutSeconds", "9", "auto.firstByteTimeoutSeconds: expected"),
        ("firstByteTimeoutSeconds", 1e10, "auto.firstByteTimeoutSeconds: expected a number"),
        ("firstByteTimeoutSeconds", 10 ** 400, "auto.firstByteTimeoutSeconds"),
        ("stay", False, "auto.stay: expected a number from 0.0 to 60.0, found false"),
        ("stay", 61, "auto.stay: expected a number from 0.0 to 60.0, found"),
        ("onSwitch", "notify-send", 'auto.onSwitch: expected a list of strings, a program and'),
    )

    def test_an_invalid_config_is_refused_with_the_place_of_the_mistake(self):
        cases = [*self.REFUSED, *((json.dumps({"modes": {"a": {}}, "auto": {member: value}}), words)
                                  for member, value, words in self.REFUSED_AUTO)]
        if sys.version_info < (3, 10):          # later versions of Python accept every glob
            cases.append(('{"modes": {"m": {"mappings": [{"match": "[z-a]*", "rewrite": "x"}]}}}',
                          "modes.m.mappings[0].match: expected a glob"))
        for text, words in cases:
            with self.subTest(text[:100]), self.assertRaises(rrouter.ConfigError) as caught:
                rrouter.parse_config(text)
            self.assertIn(words, str(caught.exception))

    def test_optional_members_are_kept(self):
        rule = {"match": "m", "rewrite": "r", "agent": "explore", "class": "sub*"}
        config = config_with(modes={"antigravity": {"mappings": [rule]}, "claude": {}},
                             auto={"stay": 0.5, "onSwitch": ["notify-send", "{to}"]})
        self.assertEqual((config.auto[-2:], *config.modes["antigravity"], config.problems), (
            (30, ("notify-send", "{to}")), rrouter.Rule("m", "r", "explore", "sub*"), ()))
        self.assertEqual(rrouter.parse_config(rrouter.config_text(config)), config)

    def test_unknown_keys_are_named_and_ignored(self):
        config = rrouter.parse_config(
            '{"modes": {"a": {"x": 1, "mappings": [{"match": "m", "rewrite": "r", "y": 2}]}},'
            '"zoom": 3, "auto": {"speed": 4}}')
        self.assertEqual(config.modes["a"], (rrouter.Rule("m", "r"),))
        self.assertEqual([problem.split(":")[0] for problem in config.problems],
                         ["zoom", "modes.a.x", "modes.a.mappings[0].y", "auto.speed"])

    RESOLVED = (
        # default,  targets,      asked for,  in force
        ("c",       ("a", "c"),   "a",        "a"),
        ("c",       ("a", "c"),   "auto",     "auto"),
        ("c",       ("a", "c"),   "zzz",      "c"),
        ("auto",    ("a", "c"),   "zzz",      "auto"),
        ("auto",    ("a", "x"),   "zzz",      "a"),
        ("c",       ("a", "x"),   "auto",     "c"),
    )

    def test_unknown_modes_and_unusable_auto_fall_back(self):
        for default, targets, asked, expected in self.RESOLVED:
            with self.subTest(default=default, targets=targets, asked=asked):
                config = config_with(modes={"a": {}, "c": {}}, defaultMode=default,
                                     auto={"targets": list(targets)})
                self.assertEqual(config.resolve(asked), expected)
                self.assertEqual("x" in targets, bool(config.auto_error))

    def test_a_response_that_is_not_streamed_gets_twice_the_time_and_at_most_280_s(self):
        for first_byte_s, streamed, expected in (
                (150, True, 150), (150, False, 280), (100, False, 200)):
            auto = config_with().auto._replace(first_byte_s=first_byte_s)
            self.assertEqual(auto.first_byte_limit_s(streamed), expected)


class ReadEnvironmentTest(unittest.TestCase):

    ACCEPTED = (
        # port, upstream, host, allowed hosts,          settings
        (None, None, None, None,                        "localhost:8316 http://localhost:8317"),
        ("", "", "", "",                                "localhost:8316 http://localhost:8317"),
        ("65535", "https://h/base/", "[::1]", None,     "[::1]:65535 https://h/base"),
        ("1", "http://[::1]:1", "0.0.0.0", " Host.Docker.Internal., ,[FD00::1]",
         "0.0.0.0:1 http://[::1]:1 host.docker.internal fd00::1"),
    )

    def test_variables_are_read_and_have_defaults(self):
        names = "RROUTER_PORT", "RROUTER_UPSTREAM", "RROUTER_HOST", "RROUTER_ALLOWED_HOSTS"
        for *given, expected in self.ACCEPTED:
            with self.subTest(given):
                settings = rrouter.read_environment({
                    name: value for name, value in zip(names, given) if value is not None})
                self.assertEqual(expected, " ".join((
                    settings.listen_addr, settings.upstream, *settings.allowed_hosts)))

    REFUSED = (
        # variable, words of the complaint, values
        ("RROUTER_PORT", "from 1 to 65535",
         ("0", "65536", "-1", "abc", "8_316", " 1", "9" * 5000)),
        ("RROUTER_HOST", "an address or a host name", ("no host", "a..b", "a" * 70)),
        ("RROUTER_ALLOWED_HOSTS", "separated by commas", ("a b", "http://a", "a,b/", "a..b")),
        ("RROUTER_UPSTREAM", "http(s)://HOST[:PORT][/PATH] without",
         ("ftp://localhost:8317", "localhost:8317", "http://", "http://:8317", "http://localhost:0",
          "http://localhost:99999", "http://localhost/?key=1", "http://localhost/#x",
          "http://local host/", "http://localhost/\r\nX: y", "http://[::1/", "http://a..b:80")),
        ("RROUTER_UPSTREAM", "***@",
         ("http://user:pa@ss/word@host", "http://user:word@host", "user:word@host:8317",
          "http:user:word@host", "http:/user:pass\nword@host")),
    )

    def test_bad_values_are_refused_in_one_line_without_passwords(self):
        for name, words, values_ in self.REFUSED:
            for value in values_:
                with self.subTest(name, value=value[:40]):
                    with self.assertRaises(rrouter.UsageError) as caught:
                        rrouter.read_environment({name: value})
                    self.assertEqual(caught.exception.exit_code, 2)
                    complaint = str(caught.exception)
                    self.assertRegex(complaint, rf"\A{name}=[ -~…]*\Z")
                    self.assertIn(words, complaint)
                    self.assertNotIn("word", complaint)
                    if "@" not in value:
                        self.assertIn(value.split("\r")[0][:30], complaint)


class RouteTest(unittest.TestCase):

    CASES = (
        # rules as match>rewrite,                 model,                 forwarded as
        ("claude-sonnet-*>g",                     "claude-sonnet-5-5",   "g"),
        ("claude-sonnet-*>g",                     "claude-opus-5-5",     "claude-opus-5-5"),
        ("claude-*>first claude-sonnet-*>second", "claude-sonnet-5",     "first"),
        ("Claude-*>g",                            "claude-sonnet-5",     "claude-sonnet-5"),
        ("*>all",                                 "",                    "all"),
        ("m?del[12]>g",                           "model2",              "g"),
        ("[>g",                                   "[",                   "g"),
        ("",                                      "x",                   "x"),
        ("*>g",                                   None,                  None),
    )

    def test_the_first_matching_rule_wins(self):
        for rules, model, expected in self.CASES:
            with self.subTest(rules=rules, model=model):
                mappings = [dict(zip(("match", "rewrite"), rule.split(">")))
                            for rule in rules.split()]
                config = config_with(modes={"m": {"mappings": mappings}}, defaultMode="m")
                self.assertEqual(rrouter.decide_route(config, "m", model), ("m", expected))

    SENDERS = (
        # agent and class of the rule, of the request, whether the rule matches
        ("explore", "", "explore", "", True),           ("Explore", "", "explore", "", True),
        ("explore", "", "explorer", "", False),         ("e*[er]", "sub*", "explorer", "sub", True),
        ("*", "", "", "main", False),                   ("", "*", "explore", "", False),
        ("explore", "main", "explore", "sub", False),   ("", "", "explore", "sub", True),
    )

    def test_agent_and_class_of_a_rule_match_those_of_the_request(self):
        for *rule, agent, kind, expected in self.SENDERS:
            with self.subTest(rule=rule, agent=agent, kind=kind):
                found = rrouter.match_rule([rrouter.Rule("*", "g", *rule)], "m", (agent, kind))
                self.assertEqual(found is not None, expected)

    def test_a_config_knows_which_conditions_its_rules_use(self):
        for rule, expected in (({}, ""), ({"agent": "a"}, "agent"), ({"class": "*"}, "class")):
            mappings = [{"match": "*", "rewrite": "g", **rule}]
            config = config_with(modes={"m": {"mappings": mappings}}, defaultMode="m")
            self.assertEqual(config.conditions, set(expected.split()))

    AGENTS = (
        # the agent, the members of the body after its model
        ("explore", '"system":"You are oh-my-claudecode:explore."'),
        ("deep-executor_2", '"messages":[{"content":"oh-my-claudecode:critic"}],"system":[{"text":'
                            '"Go"},{"text":"oh-my-claudecode:deep-executor_2\\n\xed\x95\x9c"}]'),
        ("", '"messages":[{"content":"oh-my-claudecode:explore"}],"system":"Go"'),
        ("", '"messages":[{"system":"oh-my-claudecode:explore"}]'),
        ("", '"system":"Go","system":"oh-my-claudecode:explore"'),
        ("", '"messages":[oh-my-claudecode:explore'),
    )

    def test_only_the_system_prompt_names_the_agent(self):
        for agent, members in self.AGENTS:
            with self.subTest(members):
                body = ('{"model":"m",%s}' % members).encode("latin-1")
                for kind in (bytes, bytearray, memoryview):
                    self.assertEqual(rrouter.find_agent(kind(body)), agent)


# Messages, by tables ##########################################################

POST = b"POST / HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = b"Transfer-Encoding: chunked"
BODY_MAX_BYTES = 64 << 20
HEADS = (
    # status, head without its end, the values that replace %b
    (400, b"%b\r\nHost: localhost", (
        b"GET /a b HTTP/1.1", b"GET\t/ HTTP/1.1", b"GET  / HTTP/1.1", b"GET / HTTP/1.1 ", b"GET",
        b" GET / HTTP/1.1", b"GET /\0 HTTP/1.1", b"GET /\x7f HTTP/1.1", b"GET /\xc3\xa9 HTTP/1.1",
        b"G(T / HTTP/1.1", b"GET HTTP/1.1", b"GET hidden HTTP/1.1", b"GET / http/1.1", b"GET /",
        b"GET / HTTP/1.01", b"GET / HTTP/x.y", b"GET * HTTP/1.1", b"GET http://a/ HTTP/1.1\rX:")),
    (505, b"%b\r\nHost: localhost", (b"GET / HTTP/2.0", b"PRI * HTTP/2.0", b"GET / HTTP/0.9")),
    (405, b"%b HTTP/1.1\r\nHost: localhost", (b"CONNECT localhost:443", b"TRACE /")),
    (400, POST + b"%b\r\nContent-Length: 3", (
        b"Content-Length : 3", b"oops", b": x", b"X[]: y", b"X-\xe9: y", b"X: a\0b", b"X: a\x0bb",
        b"X: one\rContent-Length: 3", b"X: a\x0cb", b"Host: localhost", b"X: one\r\n two",
        b"X: one\r\n\ttwo", b"X: one\nY: two", b"X: one\r\n Host: evil.com")),
    (400, POST + b"Content-Length: %b", (
        b"3, 3", b"+3", b"-1", b"0x3", b"0_3", b"3 0", b"3.0", b"", b"three", b"\xb3", b"9" * 5000,
        b"3\r\nContent-Length: 0", b"3\r\ncontent-length: 3")),
    (413, POST + b"Content-Length: %b", (b"%d" % (BODY_MAX_BYTES + 1), b"9" * 15)),
    (200, POST + b"Content-Length: %b", (b"003", b"\t3 ", b"%d" % BODY_MAX_BYTES)),
    (400, POST + b"Transfer-Encoding: %b", (
        b"chunked, chunked", b"chunked, identity", b"chunked\r\nTransfer-Encoding: chunked",
        b"chunked\r\nTransfer-Encoding: gzip", b"chunked\r\nContent-Length: 3",
        b"\r\nContent-Length: 3\r\nTransfer-Encoding: chunked")),
    (501, POST + b"Transfer-Encoding: %b", (
        b",chunked", b"identity", b"xchunked", b"gzip, chunked", b"")),
    (400, POST + b"Transfer-Encoding: %b", (b"\x0bchunked",)),
    (400, b"POST / HTTP/1.%b", (b"1", b"0\r\nTransfer-Encoding: chunked")),
    (417, POST + b"Expect: %b", (b"foo", b"100-continue\r\nExpect: foo")),
    (200, POST + b"Expect: %b", (b"", b"100-Continue")),
    (431, POST + b"%b", (b"\r\n".join([b"X: y"] * rrouter.FIELDS_MAX),)),
    (200, POST + b"%b", (b"\r\n".join([b"X: y"] * (rrouter.FIELDS_MAX - 1)),)),
    (200, b"GET / HTTP/1.1\r\nHost: %b", (
        b"localhost", b"LOCALHOST:8316", b"127.0.0.1", b"127.0.0.1:8316", b"[::1]", b"[::1]:8316",
        b"localhost.", b"localhost:", b"\tLocalHost:8316 ", b"127.0.0.1.:8316")),
    (403, b"GET / HTTP/1.1\r\nHost: %b", (
        b"evil.com", b"evil.com:8316", b"127.0.0.1.nip.io", b"localhost.evil.com", b"127.1",
        b"0.0.0.0", b"2130706433", b"0x7f.1", b"[::]", b"xlocalhost", b"localhost-", b"127.0.0.2",
        b"[::ffff:127.0.0.1]", b"", b"*", b"localhost..", b"localhost%00.evil.com", b"%6cocalhost",
        b"localhost;evil.com")),
    (400, b"GET / HTTP/1.1\r\nHost: %b", (
        b"localhost@evil", b"[::1].evil", b"::1", b"[::1", b"localhost:x", b"localhost, evil.com",
        b"localhost evil.com", b"localhost/evil.com", b"[::1%25lo]", b"localhost\\.evil.com",
        b"localhost:99999999", b"localhost?x", b"\xe9vil.com", b"localhost:8316.evil.com")),
    (403, b"GET http://%b HTTP/1.1\r\nHost: localhost", (
        b"evil.com/x", b"localhost.evil.com/", b"127.1/", b"evil.com")),
    (400, b"GET http://localhost%b HTTP/1.1\r\nHost: local/host", (b"/", b"@evil.com/")),
    (200, b"GET http://LOCALHOST:1%b HTTP/1.1\r\nHost: evil.com", (b"/", b"", b"?a")),
    (200, b"GET / HTTP/1.0%b", (b"", b"\r\nHost: localhost")),
    (200, POST + b"%b", (
        b"Origin: http://localhost:3000", b"Origin: https://127.0.0.1", b"Sec-Fetch-Mode: cors",
        b"Origin: http://[::1]:8080", b"Origin: HTTP://LOCALHOST:3000", b"Sec-Fetch-Site: none",
        b"Sec-Fetch-Site: same-origin", b"Sec-Fetch-Site: same-site")),
    (403, POST + b"%b", (
        b"Origin: https://evil.com", b"Origin: null", b"oRIGIN:http://evil.com:8316", b"Origin:",
        b"Origin: http://localhost.evil.com", b"Origin: http://127.0.0.1.nip.io",
        b"Origin: http://localhost@evil.com", b"Origin: chrome-extension://ab", b"Origin: file://",
        b"Origin: localhost.evil.com:80", b"Origin: http://localhost\r\nOrigin: https://evil.com",
        b"Origin: http://localhost https://evil.com", b"Origin: http://localhost,http://evil.com",
        b"Origin: //localhost", b"Origin: localhost", b"Origin: ws://localhost",
        b"Origin: http://localhost/", b"Sec-Fetch-Site: CROSS-SITE",
        b"sec-fetch-site:cross-site\r\nOrigin: http://localhost",
        b"Sec-Fetch-Site: same-origin\r\nSec-Fetch-Site: cross-site")),
)


class RequestHeadTest(unittest.TestCase):
    """The request heads that are accepted, and how they are forwarded."""

    @staticmethod
    def status(head, hosts=("localhost", "127.0.0.1", "[::1]")):
        """Return the status with which a head is refused; 200 if it is accepted."""
        try:
            rrouter.check_origin(rrouter.parse_request_head(head + b"\r\n\r\n"), hosts)
        except rrouter.RequestError as problem:
            return problem.http_status
        return 200

    def test_heads_that_rfc_9112_forbids_and_requests_of_web_pages_are_refused(self):
        for expected, head, values_ in HEADS:
            for value in values_:
                with self.subTest(head, value=value[:60]):
                    self.assertEqual(self.status(head % value), expected)
        self.assertEqual(self.status(b"GET / HTTP/1.1\r\nHost: evil.com", hosts=()), 200)

    def test_an_error_names_the_field_and_never_a_value(self):
        for lines, name in ((b"X-Key : canary", "'X-Key'"), (b"canary\r\nA: b", "'canary'"),
                            (b"A: b\r\n canary", "''"), (b"A: canary\0", "'A'")):
            with self.subTest(lines), self.assertRaises(rrouter.RequestError) as caught:
                rrouter.parse_request_head(POST + lines + b"\r\n\r\n")
            self.assertIn("malformed header field " + name, str(caught.exception))
            self.assertEqual(caught.exception.logged, "malformed header field")

    def test_a_head_that_cannot_become_valid_is_refused_before_its_end(self):
        head = POST + b"X: y\r\nContent-Length: 3\r\n\r\n"
        for end in range(1, len(head)):
            rrouter.check_head_start(head[:end], max(0, end - 4))
        for start in (b"\x16\x03\x01", b"GET / HTTP/1.0\nHost", b"GET /\r\n", b"\n",
                      POST + b"X: y\nY"):
            with self.subTest(start), self.assertRaises(rrouter.RequestError):
                rrouter.check_head_start(start, 0)

    UNCHANGED = (
        # request line without its version, then header lines
        b"GET //a/../b?x=%zz;y", b"GET /%2e%2e/./%00?", b"GET /a?b?c=/d//e", b"HEAD /api/hello",
        b"GET /x?a[]=1&b={c}|d^e`\"<>\\", b"PROPFIND /", b"purge /", b"M-SEARCH /", b"OPTIONS *",
        b"POST /\r\nx-first: 1\r\nX-Repeat: 1\r\nx-EMPTY:\r\nX-repeat: 2\r\nX-Tab: a\tb  c\r\n"
        b"X-Latin: caf\xe9 \x80\xff\r\nHost-X: 1\r\nx-host: Host: a\r\nX-Quoted: \"a\\\"b\"\r\n"
        b"Cookie: a=1; b=2\r\nCookie: c=3\r\nVia: 1.1 other\r\nX-Forwarded-For: 10.0.0.1",
    )
    FORWARDED = (
        # head without its end, the head forwarded to up:1/base with # for the length
        (b"GET http://localhost:8316/x?y=1 HTTP/1.1\r\nHost: x",
         b"GET /base/x?y=1 HTTP/1.1\r\nHost: up:1"),
        (b"GET HTTP://LOCALHOST HTTP/1.1\r\nA: b\r\nhOST:x",
         b"GET /base/ HTTP/1.1\r\nA: b\r\nhOST: up:1"),
        (b"POST /a HTTP/1.0\r\nA: b", b"POST /base/a HTTP/1.1\r\nHost: up:1\r\nA: b"),
        (b"PUT / HTTP/1.1\r\nContent-LENGTH:003\r\nHost: x\r\nA: b",
         b"PUT /base/ HTTP/1.1\r\nContent-LENGTH: #\r\nHost: up:1\r\nA: b"),
        (b"PUT / HTTP/1.1\r\ntransfer-Encoding:\tChunked \r\nHost: x\r\nA: b",
         b"PUT /base/ HTTP/1.1\r\nHost: up:1\r\nA: b\r\nContent-Length: #"),
        (b"PUT / HTTP/1.1\r\nHost: x\r\nConnection: host, CONTENT-length,a\r\nContent-Length: 1"
         b"\r\nA: b", b"PUT /base/ HTTP/1.1\r\nHost: up:1\r\nContent-Length: #"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nConnection: X-A ,close\r\nX-A: 1\r\nX-B: 1\r\n"
         b"connection: x-b\r\nKeep-Alive: timeout=5\r\nProxy-Connection: keep-alive\r\n"
         b"Trailer: X-T\r\nTE: trailers\r\nUpgrade: h2c\r\nProxy-Authorization: Basic eA==\r\n"
         b"Proxy-Authenticate: Basic\r\nX-C: 1", b"GET /base/ HTTP/1.1\r\nHost: up:1\r\nX-C: 1"),
    )

    def test_only_host_framing_and_hop_by_hop_fields_change(self):
        cases = list(self.FORWARDED)
        for text in self.UNCHANGED:
            line, end, fields = text.partition(b"\r\n")
            after = b"%b HTTP/1.1\r\nHost: %b" + end + fields
            cases.append((after % (line, b"x"), after % (
                line if line.endswith(b"*") else line.replace(b" ", b" /base", 1), b"up:1")))
        for head, expected in cases:
            with self.subTest(head):
                parsed = rrouter.parse_request_head(head + b"\r\n\r\n")
                before, after = rrouter.outbound_head(parsed, b"up:1", b"/base")
                self.assertEqual(before + (b"#" + after if after else b""), expected + b"\r\n\r\n")


class ResponseHeadTest(unittest.TestCase):

    REFUSED = (
        # head without its end
        b"HTTP/1.1 abc OK", b"HTTP/1.1 99 OK", b"ICY 200 OK", b"<html>hello</html>",
        b"HTTP/2.0 200 OK", b"HTTP/1.1 101 Switching Protocols", b"HTTP/1.1 200 a\0b",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked",
        *(b"HTTP/1.1 200 OK\r\n" + lines for lines in (
            b"Content-Length: 2\r\nContent-Length: 5", b"Content-Length: 5\r\nContent-Length: 5",
            b"Content-Length: +5", b"Content-Length: -5", b"Content-Length: 0_5",
            b"Content-Length: abc", b"Content-Length: 5\r\nTransfer-Encoding: chunked",
            b"Transfer-Encoding: zip", b"Transfer-Encoding: gzip, chunked",
            b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", b"oops", b"X: a\0b",
            b"X: one\rContent-Length: 5", b"Content-Length : 5")),
    )

    def test_heads_that_rfc_9112_forbids_are_refused(self):
        for head in self.REFUSED:
            with self.subTest(head), self.assertRaises(rrouter.UpstreamError):
                rrouter.parse_response_head(head + b"\r\n\r\n")

    KEPT = b"X-Latin: caf\xe9 \xff\r\nX-Repeat: 1\r\nx-REPEAT:\t2\r\nX-Empty:\r\nVary: Origin\r\n"
    FORWARDED = (
        # status, header lines that are dropped, those that are kept
        (b"200 It Is\tOK", b"", KEPT), (b"103 ", b"Content-length: 9", b"Link: </x>\r\n"),
        (b"200 ", b"Connection: content-length", b"Content-Length: 5\r\n"),
        (b"304 ", b"Upgrade: h2c", b"Content-Length: 5\r\n"), (b"204 ", b"Content-Length: 5", b""),
        (b"200 ", b"Connection: X-Secret, close\r\nX-Secret: 1", KEPT),
        (b"200 ", b"Connection: X-One\r\nX-One: 1\r\nConnection: x-two ,close\r\nX-Two: 2", KEPT),
        (b"200 ", b"Keep-Alive: timeout=5\r\nProxy-Connection: close\r\nTrailer: X-T", KEPT),
        (b"200 ", b"Proxy-Authenticate: Basic\r\nTransfer-Encoding: chunked", KEPT),
        (b"200 ", b"Access-Control-Allow-Origin: *\r\nACCESS-CONTROL-EXPOSE-HEADERS: x\r\n"
         b"x-rrouter-target: a\r\nX-Rrouter-Model: b\r\nx-rrouter-attempts: 2", KEPT),
    )

    def test_hop_by_hop_cors_and_rrouter_fields_are_dropped_and_all_others_kept(self):
        for status, dropped, kept in self.FORWARDED:
            with self.subTest(status + dropped):
                start = b"HTTP/1.1 " + status + b"\r\n"
                lines = dropped + b"\r\n" if dropped else b""
                head = rrouter.parse_response_head(start + lines + kept + b"\r\n")
                self.assertEqual(rrouter.response_head_bytes(head, b"X: y\r\n"),
                                 start + kept + b"X: y\r\n\r\n")


SPLICED = (
    # body; %s is the model
    '{"model":%s,"messages":[]}', '{"model":%s}', ' \r\n\t{ "model" \n:\r %s ,"a":1 } ',
    ' \n{\t"a" :\r\n [ 1 , 2 ] , "model"\t:\n %s \r\n, "b" : { } }\n\n',
    '{"a":[1e400,9007199254740993,-0,1E-7,0.1e+5],"model":%s,"b":123456789012345678901234567890}',
    '{"a":"\\ud83d \\u0000 \\/ \\" \\\\","\\ud83d\\"":"}","model":%s,"b":"\\u2028\\udc00"}',
    '{"\ud55c\uad6d":"\u2028\U0001f600 caf\u00e9","model":%s,"a":"\uffff"}',
    '{"tools":[{"model":"no"},{"input":{"model":"no"}}],"model":%s,"x":{"model":"no"}}',
    '{"a":"\\"model\\":\\"no\\"","b":"model","model":%s,"c":"{\\"model\\":1}"}',
    '{"Model":"no","model ":"x","":1,"a":1,"a":2,"model":%s,"a":{"b":1,"b":2}}',
    '{"a":1,"\\u006dodel":%s}', '{"m\\u006fdel":%s,"a":1}', '{"model":%s,"model":"no"}',
    '{"a":1,"model":%s,"model":"no","\\u006dodel":"no"}', '{"a":' + "1" * 100_000 + ',"model":%s}',
)
# Only a leading plain model ends the search; what follows it is not examined.
BROKEN_LATER = '{"model":%s,"messages":[{"role":', '{"model":%s} and more'
SPELLED = (b'"claude-sonnet-5"', b'"claude\\u002dsonnet-5"', b'"\\u0063laude-\\u0073onnet-\\/5"',
           '"모델"'.encode())
WITHOUT_MODEL = (
    b"", b" \n", b"{", b'{"', b"{}", b"null", b'"model"', b'[{"model":"a"}]', b'{"a":1}',
    b'["model","a"]', b'[{"model":"a"},1]', b'{"model":null}', b'{"model":{"model":"a"}}',
    b'{"model":true,"a":1}', b'{"a":1,"model":["a"]}', b'{"model":"a\\', b'{"model":"a\x01"}',
    b'{"a":{"model":"a"},"b":[{"model":"a"}]}', b'{"a":"model","b":"model"}', b'{"Model":"a"}',
    b'\xef\xbb\xbf{"model":"a"}', b"model=a", b'{"a":1,"model":"a"', b'{"model":"a',
    b'{"a":1,"model":"a"} x', b'{"a":1}{"model":"a"}', b'{model:"a"}', b'{"a":1,"model" "a"}',
    b'{"model"::"a"}', b'{1:2,"model":"a"}', b'{,"model":"a"}', b'{"a":1,"model":"a",}',
    bytes(range(256)), gzip.compress(b'{"model":"a"}'), '{"model":"a"}'.encode("utf-16"),
    b'{"a":1,"model":null,"model":"b"}', b'{"a":NaN,"model":"a"}', b'{"a":-Infinity,"model":"a"}',
    b'{"a":"\xff","model":"\xff"}', b'{"a":' + b"[" * 100_000, b'{"a":1,"model":5}',
)


class ModelSpanTest(unittest.TestCase):
    """The place of the model in a body; SpliceFuzzTest has random bodies."""

    def test_only_the_first_top_level_model_string_is_replaced(self):
        for text, spelled in (*itertools.product(SPLICED, SPELLED),
                              *itertools.product(BROKEN_LATER, SPELLED[:1])):
            with self.subTest(text[:80], spelled=spelled):
                before, after = text.encode().split(b"%s")
                body = before + spelled + after
                start, end, name = rrouter.find_model(body)
                self.assertEqual((body[start:end], name), (spelled, json.loads(spelled)))
                self.assertEqual(b"".join(rrouter.splice(body, start, end, 'a"\ud55c')),
                                 before + b'"a\\"\\ud55c"' + after)

    def test_bodies_without_a_top_level_model_string_have_none(self):
        for body in WITHOUT_MODEL:
            with self.subTest(body[:60]):
                self.assertIsNone(rrouter.find_model(body))

    def test_the_time_to_find_a_leading_model_does_not_depend_on_the_length_of_the_body(self):
        def best(length):
            body, times = b'{"model":"a","x":"' + b"y" * length + b'"}', []
            for _ in range(20):
                start = time.perf_counter()
                rrouter.find_model(body)
                times.append(time.perf_counter() - start)
            return min(times)
        self.assertLess(best(10_000_000), best(1000) * 20 + 0.0005)


class WithoutThinkingTest(unittest.TestCase):

    CASES = (
        # content before,                                            content after; None: no change
        ('[{"type":"thinking","thinking":"x"} , {"type":"text"}]',   '[{"type":"text"}]'),
        ('[{"type":"text"} ,{"signature":"s","type":"thinking"} ]',  '[{"type":"text"} ]'),
        ('[ {"type":"text"},{"type":"redacted_thinking"},1]',        '[ {"type":"text"},1]'),
        ('[{"type":"thinking"},{"type":"a"},{"type":"thinking"},{"type":"thinking"},{"type":"b"}]',
         '[{"type":"a"},{"type":"b"}]'),
        ('[{"type":"thinking"},{"type":"redacted_thinking"}]',
         '[{"type":"text","text":"(no content)"}]'),
        ('[{"type":"text","text":"{\\"type\\":\\"thinking\\"}"}]',   None),
        ('"thinking"',                                               None),
        ('[]',                                                       None),
        ('[{"type":"tool_result","content":[{"type":"thinking"}]}]', None),
        ('[{"type":"thinking"},{"type":"tool_use","input":{"type":"thinking","f":1E400,"f":1.50}}]',
         '[{"type":"tool_use","input":{"type":"thinking","f":1E400,"f":1.50}}]'),
        ('[{"signature":"x","type":"thinking","thinking":"]},{ \\"type\\":\\"a\\""},7]',   '[7]'),
    )

    def test_only_thinking_blocks_are_removed(self):
        frame = ('{"model":"m", "messages": [{"role":"assistant","content":%s},{"content":"é"} ],'
                 '"x":1e400}')
        for before, after in self.CASES:
            with self.subTest(before):
                result = rrouter.without_thinking((frame % before).encode())
                self.assertEqual(result, (frame % after).encode() if after else None)
        for body in (b"", b"{}", b"[]", b"x", b'{"messages":7}', b'{"messages":[7]}',
                     b'{"messages":[{"content":[', b"\xff"):
            with self.subTest(body):
                self.assertIsNone(rrouter.without_thinking(body))


class BodyTest(unittest.TestCase):

    def test_a_plain_body_ends_after_its_length_or_with_the_connection(self):
        for length, pieces, rest in ((3, (b"abcREST",), b"REST"), (3, (b"ab", b"c"), b"")):
            body = rrouter.PlainBody(length)
            self.assertEqual(b"".join(map(body.feed, pieces)), b"abc")
            self.assertEqual((body.done, body.left, body.rest), (True, 0, rest))
        for length, ends in ((3, False), (None, True)):
            body = rrouter.PlainBody(length)
            self.assertEqual((body.feed(b"ab"), body.done, body.delimited),
                             (b"ab", False, not ends))
            with contextlib.suppress(rrouter.UpstreamError):
                body.finish()
            self.assertEqual(body.done, ends)

    def test_a_chunked_body_is_decoded_however_it_is_cut(self):
        chance = random.Random(8316)
        for _ in range(500):
            chunks = [bytes([chance.randrange(256)]) * chance.choice([1, 2, 17, 300, 5000])
                      for _ in range(chance.randrange(6))]
            coded = b"".join(b"%x%b\r\n%b\r\n" % (
                len(chunk), chance.choice([b"", b";a=b", b" ; x", b';a = "b;\\"=";c']), chunk)
                for chunk in chunks)
            coded += b"0\r\n" + chance.choice([b"", b"X: y\r\n", b"A: b\r\nC: d\r\n"]) + b"\r\n"
            decoder, payload, position, data = rrouter.ChunkedBody(), b"", 0, coded + b"REST"
            while not decoder.done:
                size = chance.choice([1, 2, 3, 50, 4000, 100_000])
                payload += decoder.feed(data[position:position + size])
                position += size
            self.assertEqual(payload, b"".join(chunks))
            self.assertEqual(decoder.rest + data[position:], b"REST")

    BROKEN = (
        # payload, bodies that break off the coding after it
        (b"", (b"0x3\r\nabc\r\n", b"+3\r\n", b"-1\r\n", b" 3\r\n", b"zz\r\n", b"\r\n", b"0_3\r\n",
               b"1" * 17 + b"\r\n", b"0" * 15 + b"3\r\nabc\r\n", b"3\nabc\n", b"3;\x00\r\n",
               b"3;" + b"x" * 70_000, b"3;" + b"x" * 300 + b"\r\n", b"3;\r\n", b"3;a[=b\r\n",
               b"3;a=\r\n", b'3;a="b\r\n', b"3;;a\r\n", b"0\r\nno colon\r\n\r\n", b"0\r\n\n",
               b"0\r\nA: " + b"x" * 9000, b"0\r\nA: " + b"x" * 9000 + b"\r\n\r\n",
               b"0\r\nA: b\r\n\n", b"0\r\nA: b\n")),
        (b"abc", (b"3\r\nabcd\r\n", b"3\r\nabcXY", b"3\r\nabc0\r\n\r\n", b"3\r\nabc\n0\r\n\r\n",
                  b"3\r\nabc\r\n0x2\r\nde", b"3\r\nabc\r\n\r\n", b"3\r\nabc\r\n0\r\nX\r\n")),
    )

    def test_broken_coding_is_refused_at_once(self):
        for payload, cases in self.BROKEN:
            for coded in cases:
                with self.subTest(coded[:20]):
                    decoder = rrouter.ChunkedBody()
                    self.assertEqual(decoder.feed(coded), payload)
                    self.assertIn("malformed", decoder.fault)
                    self.assertRaises(rrouter.UpstreamError, decoder.finish)


class StreamScanTest(unittest.TestCase):

    START = b'event: message_start\ndata: {"type":"message_start","message":{}}\n\n'
    TEXT = b'data: {"type":"content_block_delta","delta":{"text":"a \\"error\\""}}\n\n'
    STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    EMPTY_BLOCK = (b'data: {"type":"content_block_start","content_block":{"type":"text",'
                   b'"text":""}}\n\ndata: {"type":"content_block_stop"}\n\n')
    TOOL = b'data: {"type":"content_block_start","content_block":{"type":"tool_use"}}\n\n'
    ERROR = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error"}}\n\n'
    OTHER_ERROR = b'data: {"error":{"message":"x"}}\n\n'
    PING = b'event: ping\ndata: {"type": "ping"}\n\n'
    SILENT = (b'data: {"type":"message_delta","delta":{"stop_reason":"%b"},'
              b'"usage":{"output_tokens":0}}\n\n')

    MESSAGES = (
        # what the scan reports, streams of /messages
        ("", (b"", b": hello\n\n: again\n\n", b"id: 7\n\n", PING, TEXT[:-1])),
        ("events=1", (START, START.replace(b"\n", b"\r\n"),
                      b'data: {"type":"message_start","error":null}\n\n')),
        ("events=3", (START + EMPTY_BLOCK,)),
        ("committed events=1", (
            TEXT, b"\xef\xbb\xbf" + TEXT, TEXT.replace(b"\n", b"\r\n"), TOOL, TEXT + PING,
            b'data: {"delta":{},"type":"content_block_delta"}\n\n', SILENT % b"refusal",
            SILENT % b"max_tokens", SILENT.replace(b":0", b":2") % b"end_turn",
            b'data: {"type":"message_delta","delta":{}}\n\n')),
        ("error event", (
            START + ERROR, b"event:error\r\ndata: {}\r\n\r\n", OTHER_ERROR,
            b'data: {"error":{"message":"x"},"type":"error"}\n\n')),
        ("empty message", (
            b"data: [DONE]\n\n", START + EMPTY_BLOCK + STOP, SILENT % b"end_turn")),
        ("committed ended events=2", (
            TEXT + STOP, TEXT + b'data: {"usage":{},"type":"message_stop"}\n\n')),
        ("committed broken events=2", (TEXT + ERROR, TEXT + OTHER_ERROR)),
        ("committed broken ended events=3", (TEXT + STOP + ERROR,)),
    )
    OTHERS = (
        # what the scan reports, streams of other paths
        ("", (b": comment\n\n",)), ("error event", (OTHER_ERROR,)),
        ("committed events=1", (b'data: {"id":"x","choices":[]}\n\n',)),
    )

    def test_events_are_read_however_the_stream_is_cut(self):
        for is_message, (expected, streams) in (
                *((True, row) for row in self.MESSAGES), *((False, row) for row in self.OTHERS)):
            for data, size in itertools.product(streams, (1, 2, 3, 7, 1000)):
                with self.subTest(data, size=size):
                    scan = rrouter.StreamScan(is_message)
                    for start in range(0, len(data), size):
                        scan.feed(data[start:start + size])
                    shown = [name for name in ("committed", "broken", "ended")
                             if getattr(scan, name)]
                    shown += ["events=%d" % scan.events] if scan.events else []
                    self.assertEqual(scan.defect or " ".join(shown), expected)

    def test_an_end_is_a_defect_unless_content_came_before_it(self):
        for data, defect in ((b"", "empty stream"), (b": x\n\n", "empty stream"),
                             (self.START, "stream without content"),
                             (self.ERROR[:-1], "error event"),
                             (self.TEXT[:-1], ""), (self.TEXT + self.STOP[:-2], "")):
            with self.subTest(data):
                scan = rrouter.StreamScan(True)
                scan.feed(data)
                scan.finish()
                self.assertEqual((scan.defect, scan.ended),
                                 (defect, data.endswith(self.STOP[:-2])))

    def test_a_stream_commits_when_it_exceeds_the_limit_for_holding_back(self):
        for block in (b": comment\n\n", b"x" * 100_000):
            with self.subTest(block[:10]):
                scan, fed = rrouter.StreamScan(True), 0
                while not scan.committed:
                    scan.feed(block)
                    fed += len(block)
                self.assertLess(fed - rrouter.READ_AHEAD_MAX_BYTES, len(block) + 1)

    def test_stream_true_is_found_at_the_ends_of_a_body_and_in_the_middle(self):
        filler = b'"x":"%b",' % (b"y" * 5000)
        for body, expected in ((b'{"stream":true}', True), (b'{"stream" : true, "a":1}', True),
                               (b"{%b\"stream\":true,%b\"a\":1}" % (filler, filler), True),
                               (b'{"stream":false}', False),
                               (b'{"text":"\\"stream\\":true"}', False)):
            with self.subTest(body[:30]):
                self.assertEqual(rrouter.asks_for_stream(body), expected)


class TokenReaderTest(unittest.TestCase):

    START = event("message_start", message={"type": "message", "usage": {
        "input_tokens": 1200, "cache_creation_input_tokens": 3, "cache_read_input_tokens": 48211,
        "output_tokens": 1, "cache_creation": {"ephemeral_1h_input_tokens": 7}}})
    TALK = event("content_block_delta", delta={"text": '"output_tokens":7,' + "x" * 5000})
    END = event("message_delta", usage={"input_tokens": 0, "output_tokens": 512})
    WHOLE = START + event("message_delta", usage={"output_tokens": 9}) + END + event("message_stop")
    NOTE = " in 1203+48211 out 512"
    BODY = json.dumps({"type": "message", "content": [{"input": {"usage": {"output_tokens": 9}}}],
                       "usage": {"input_tokens": 5, "output_tokens": 6}}).encode()
    LONG, PACKED = START + 99 * TALK + END, gzip.compress(START + 99 * TALK + END)
    CASES = (
        # content encoding, payloads, note
        ("", [WHOLE.replace(b"\n", b"\r")], NOTE), ("", [LONG], NOTE),
        ("", [b"%c" % byte for byte in WHOLE], NOTE),
        ("", [START, *[TALK] * 99, END], NOTE), ("", [BODY], " in 5+0 out 6"),
        ("", [b" " * 9000, BODY[:60], BODY[60:]], " in 5+0 out 6"), ("", [TALK, b"", b"[]"], ""),
        ("", [event("message_delta", usage={"output_tokens": True, "input_tokens": -1})], ""),
        ("", [b'{"output_tokens":1,"usage":{"output_tokens":%d}}' % 10 ** 12], ""),
        ("gzip", [PACKED], NOTE), ("gzip", [b"%c" % byte for byte in PACKED], NOTE),
        ("gzip", [PACKED[:20] + b"damaged" * 9, END], ""), ("br", [zlib.compress(WHOLE)], ""),
        ("gzip", [PACKED, b"junk", PACKED, START], NOTE),
        ("", [event("message_delta", usage={"output_tokens": 8, "iterations": [
            {"output_tokens": 3}, {"output_tokens": 5}]})], " in 0+0 out 8"),
    )

    def test_token_counts_are_read_from_both_ends_of_a_response(self):
        for coding, payloads, note in self.CASES:
            with self.subTest(coding=coding, first=payloads[0][:80], note=note):
                reader = rrouter.TokenReader(coding)
                for payload in payloads:
                    reader.feed(payload)
                self.assertEqual(reader.note(), note)

    def test_bytes_after_the_end_of_the_gzip_data_are_not_kept(self):
        reader = rrouter.TokenReader("gzip")
        reader.feed(self.PACKED)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        for _ in range(50):
            reader.feed(bytes(65536))
        self.assertLess(tracemalloc.get_traced_memory()[1], 500_000)


class MessageTest(unittest.TestCase):

    SILENT = b'{"type":"message","content":[],"stop_reason":"%b","usage":{"output_tokens":0}}'
    TEXT = b'"content":[{"type":"text","text":"%b"}],"usage":{"output_tokens":0}}'
    CASES = (
        # defect, bodies
        ("empty response", (b"", b" \n")),
        ("not a message", (b"<html></html>", b"[]", b"[" * 100_000, b'{"choices":[]}',
                           b'{"type":"message",' + TEXT[:-1] % b"x")),
        ("error in a 2xx", (b'{"type":"error","error":{"message":"x"}}', b'{"type":"error"}',
                            b'{"type":"message","error":{},' + TEXT % b"x")),
        ("empty message", (SILENT % b"", SILENT % b"end_turn", b'{"type":"message",' + TEXT % b"",
                           b'{"type":"message","usage":{"output_tokens":0}}')),
        ("", (SILENT % b"refusal", SILENT % b"max_tokens", b'{"type":"message","content":[]}',
              b'{"type":"message","content":[],"usage":{"output_tokens":3}}',
              b'{"type":"message","content":[7],"usage":{"output_tokens":0}}',
              b'{"type":"message","error":null,' + TEXT % b"x",
              (b'{"type":"message",' + TEXT % b"").replace(b'"text"', b'"tool_use"', 1))),
    )

    def test_a_defect_of_a_message_is_recognized(self):
        for defect, bodies in self.CASES:
            for body in bodies:
                with self.subTest(body[:80]):
                    self.assertEqual(rrouter.message_defect(body), defect)


class FailureTest(unittest.TestCase):
    """The meaning of a failed response."""

    # As Antigravity writes it.
    NESTED = json.dumps({"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": json.dumps(
        {"type": "error", "error": {
            "message": "messages.1.content.0: Invalid `signature` in `thinking` block"}})}})
    FAULTS = (
        # fault, its name in messages, status, texts
        ("STATUS", "529", 529, (b"",)), ("STATUS", "429", 429, (b"cooling down",)),
        ("STATUS", "400", 400, (
            b"invalid", b"redacted_thinking " * 12_000, b"thinking block must not be modified",
            b"thinking.type: Field required",
            b"thinking.budget_tokens: Input should be greater than or equal to 1024")),
        ("REJECTED", "400", 400, (
            NESTED.encode(), b"messages.1.content.0: Invalid `signature` in `thinking` block",
            b"Corrupted thought signature.", b"Invalid thought signature.",
            b"messages.1.content.0.thinking.signature: Field required",
            b"`thinking` or `redacted_thinking` blocks in the latest assistant message cannot be "
            b"modified. These blocks must remain as they were in the original response.",
            b"'thinking' or 'redacted_thinking' blocks in the latest assistant message cannot be "
            b"modified", b"messages.3.content.1: Invalid data in `redacted_thinking` block",
            b"a thinking block with an invalid signature", b"Thought signature is not valid",
            b"Invalid signature in redacted_thinking",
            b"signature is bound to a different conversation")),
        ("STATUS", "503", 503, (b"invalid signature in thinking block",)),
        ("STATUS", "500", 500, (b"auth_unavailable: no auth available", b"prompt is too long")),
        ("SHELF", "503 auth_unavailable", 503, (b"auth_unavailable: no auth available (x)",)),
        ("SHELF", "429 cooling down", 429, (b"All credentials for model X are cooling down",)),
        ("SHELF", "429 model_cooldown", 429, (b'{"code":"model_cooldown"}',)),
        ("SHELF", "400 unknown provider for model", 400, (b"unknown provider for model x",)),
        ("TOO_LARGE", "413 too large", 413, (b"",)),
        ("TOO_LARGE", "400 too large", 400, (b"Prompt is too long: 9 tokens \\u003e 8 maximum",)),
        ("TOO_LARGE", "422 too large", 422, (b"prompt token count of 9 exceeds the limit",)),
        ("OWN", "503", 503, (b'{"error": {"message": "rrouter: too many"}}',)),
    )

    def test_the_fault_is_recognized_by_status_and_text(self):
        for fault, name, status, texts in self.FAULTS:
            for text in texts:
                with self.subTest(text[:80], status=status):
                    self.assertEqual(rrouter.read_failure(status, text), (Fault[fault], name))

    DELAYS = (
        # seconds at 8:00, Retry-After, retry-after-ms, text
        (None, "", "", b""), (120.0, "120", "", b""), (90.5, "90.5", "", b""),
        (999999999.0, "999999999", "", b""), (None, "-1", "", b""), (None, "1e9", "", b""),
        (60.0, "Fri, 15 Jan 2027 08:01:00 GMT", "", b""), (1.5, "120", "1500", b"reset after 7s"),
        (0.0, "Fri, 15 Jan 2027 07:00:00 GMT", "", b""), (30.0, "", "", b"will reset after 30s."),
        (7200.0, "", "", b"reset after 7200s"), (3723.0, "", "", b"reset after 1h2m3s"),
        (300.0, "", "", b"reset after 5m"), (None, "", "", b"reset after lunch"),
    )

    def test_the_delay_is_read_from_headers_and_text(self):
        for expected, *given in self.DELAYS:
            with self.subTest(given):
                self.assertEqual(rrouter.read_retry_after(*given, 1_800_000_000.0), expected)

    def test_no_delay_is_negative_and_no_value_raises(self):
        chance = random.Random(8316)
        words = ["1", "Feb", ",", "00", "Fri", "2027", "GMT", "-0000", ":", "99:99:99", "é", "\0"]
        for _ in range(2000):
            value = " ".join(chance.choice(words) for _ in range(chance.randrange(8)))
            seconds = rrouter.read_retry_after(value, value, value.encode(), 1e9)
            self.assertTrue(seconds is None or seconds >= 0, value)


class WatchTest(unittest.TestCase):

    @staticmethod
    def watch(limit_s=None, has_left=False):
        watch = rrouter.Watch(lambda: has_left, False)
        watch.limit(limit_s)
        return watch

    def test_there_is_no_limit_by_default_and_after_its_removal(self):
        unlimited, lifted = self.watch(), self.watch(0)
        lifted.start()
        lifted.limit(None)
        for watch in unlimited, lifted:
            watch.start()
            self.assertEqual(watch.check(), rrouter.TICK_S)

    def test_the_limit_does_not_expire_while_input_is_unread(self):
        watch = self.watch(0)
        watch.start()
        self.assertEqual(watch.check(lambda: True), rrouter.TICK_S)
        with self.assertRaisesRegex(rrouter.UpstreamTimeout, "within 0 s"):
            watch.check(lambda: False)

    def test_a_client_that_left_ends_the_wait(self):
        watch = self.watch(has_left=True)
        with self.assertRaises(rrouter.ClientGone):
            while True:
                watch.check()


class TextTest(unittest.TestCase):

    CASES = (
        # function, argument, text
        (rrouter.printable, "plain", "plain"), (rrouter.printable, "a\nb", "a\\nb"),
        (rrouter.printable, "\x1b[31m", "\\x1b[31m"), (rrouter.printable, "\x9b", "\\x9b"),
        (rrouter.printable, "한", "\\ud55c"), (rrouter.printable, "\ud83d", "\\ud83d"),
        (rrouter.printable, "\x7f", "\\x7f"), (rrouter.printable, "x" * 301, "x" * 300 + "..."),
        (rrouter.span, 0.2, "1s"), (rrouter.span, 59.5, "1m"), (rrouter.span, 90, "90s"),
        (rrouter.span, 1800, "30m"), (rrouter.tidy, 2.0, 2), (rrouter.tidy, 0.5, 0.5),
        (rrouter.utc, None, None), (rrouter.utc, 1769698800.9, "2026-01-29T15:00:00Z"),
        (rrouter.reason_of, OSError(2, "No Such"), "no such"),
        (rrouter.reason_of, OSError(), "oserror"),
    )

    def test_values_are_printed_for_people_and_terminals(self):
        for function, argument, expected in self.CASES:
            with self.subTest(function.__name__, argument=str(argument)[:10]):
                self.assertEqual(repr(function(argument)), repr(expected))

    def test_a_defect_is_described_by_its_place_and_without_values(self):
        try:
            int("canary")
        except ValueError as problem:
            text = rrouter.describe_defect(problem)
        self.assertRegex(text, r"\Ainternal error: ValueError at test_a_defect\w+:\d+; please")
        self.assertIn("NoneType", rrouter.describe_defect(None))


# Failover, by tables and walks ################################################

def outcome(fault=None, status=None, **changes):
    """Return an Outcome of the fault with this name; its usual status is the default."""
    usual = {None: 200, "SHELF": 503, "NO_MESSAGE": 200, "TIMEOUT": 504, "STATUS": 429}
    status = status or usual[fault]
    return Outcome(Fault[fault] if fault else None, status, str(status))._replace(**changes)


TARGETS = ("ag", "cl")
STEP = re.compile(r"(?:(\d+)\*)?(?:([A-Z])\.)?(?:(\w+)/)?([a-z+]+)(?::(\w+))?")


class FailoverWalk(unittest.TestCase):
    """Base of the walks: requests go to the targets ag and cl, and minutes pass.

    A walk is a list of words.  `ag` is a request that fails on ag with a 429 and is rescued by cl;
    `ag+cl` fails on both targets, `ok` on neither; `late` fails after its first content on any
    target.  `ag:401` fails with another status, `ag:TIMEOUT` with another fault; `opus/ag` names a
    model, `S.ag` a session.  `3*ag` is three requests; `30m` lets 30 minutes pass.
    """

    def setUp(self):
        self.clock, self.lines = FakeClock(), []
        self.auto = rrouter.AutoSettings(TARGETS, 3, 2, (1800.0, 3600.0, 7200.0, 14400.0), 150.0)
        self.failover = rrouter.Failover(self.clock, self.auto)

    def walk(self, steps):
        """Take the steps; return the targets that the last request tried."""
        tried = []
        for step in steps.split():
            if step.endswith("m"):
                self.clock.advance(60 * int(step[:-1]))
                continue
            count, session, model, dead, failure = STEP.fullmatch(step).groups()
            for _ in range(int(count or 1)):
                tried = self.request(model or "opus", dead, failure or "429", session or "")
        return tried

    def request(self, model, dead, failure, session):
        tickets = [self.failover.admit(model, TARGETS, session)]
        if dead == "late":
            ticket = self.failover.commit(tickets[0])[0]
            self.charge(ticket, self.failure("NO_MESSAGE", direct=True))
            return [ticket.target]
        if tickets[0].target in dead:
            tickets.append(self.failover.rescue(tickets[0], TARGETS))
        outcomes = [self.failure(failure) if ticket.target in dead else outcome()
                    for ticket in tickets]
        counts = rrouter.judge(*outcomes).counts if len(tickets) == 2 else (False,)
        for ticket, ended, counted in zip(tickets, outcomes, counts):
            if counted:
                self.charge(ticket, ended)
            elif ended.fault is not None:
                self.lines += self.failover.release(ticket)
            else:
                ticket, lines = self.failover.commit(ticket)
                self.lines += lines
                self.failover.credit(ticket)
        return [ticket.target for ticket in tickets]

    def failure(self, how="429", **changes):
        """Return a failure with this status or fault that begins and ends now."""
        fault, status = ("STATUS", int(how)) if how.isdigit() else (how, None)
        times = {"began": self.clock.now, "ended": self.clock.now}
        return outcome(fault, status, **{**times, **changes})

    def charge(self, ticket, failure):
        self.lines += self.failover.charge(ticket, failure)

    def admit(self, count=1):
        return [self.failover.admit("opus", TARGETS) for _ in range(count)]

    def state(self):
        """Return target, switches, failures, timeouts and minutes left, also of models alone."""
        report = self.failover.report(True)
        scopes = {"": report, **report["models"]}.items()
        names = "currentTarget", "switchCount", "failureCount", "timeoutCount"
        return ", ".join(" ".join(map(str, (
            *filter(None, [model]), *(seen[name] for name in names),
            round(seen["cooldownRemainingSeconds"] / 60)))) for model, seen in scopes)


ALONE = "opus/ag haiku/ok " * 3         # opus switches alone
WALKS = (
    # the rule, then by turns steps and the state after them
    ("three failures in a row switch though each was rescued",
     "2*ag", "ag 0 2 0 0", "ag", "cl 1 0 0 30"),
    ("two timeouts switch and have their own counter",
     "2*ag ag:TIMEOUT", "ag 0 2 1 0", "ag:TIMEOUT", "cl 1 0 0 30"),
    ("a success resets both counters", "2*ag ag:TIMEOUT ok", "ag 0 0 0 0"),
    ("a probe that succeeds brings all requests back", "3*ag 30m ok", "ag 1 0 0 0"),
    ("a probe that fails starts the next cooldown",
     "3*ag 30m ag", "cl 2 0 0 60", "60m ag", "cl 3 0 0 120", "120m ag", "cl 4 0 0 240",
     "240m ag", "cl 5 0 0 240"),
    ("a later failure of the stream that probed counts", "3*ag 30m late", "ag 1 1 0 0"),
    ("a switch by shelf responses lasts a minute and does not lengthen the next cooldown",
     "ag:401 2*ag:SHELF ok", "cl 1 0 0 1", "1m ok 2*ag:SHELF ag", "cl 2 0 0 30"),
    ("after a switch by shelf responses only a failure like a 429 makes a probe the next switch",
     "3*ag:SHELF 1m ag:SHELF", "cl 1 0 0 1", "1m ag:401 1m ag:403 1m ag:404", "cl 1 0 0 1",
     "1m ag:500", "cl 1 0 0 1", "1m ag", "cl 2 0 0 30"),
    ("failures of the fallback switch back and cancel the cooldown",
     "3*ag 2*cl", "cl 1 2 0 30", "cl", "ag 2 0 0 0"),
    ("a direct failure does not switch back before the new target has answered",
     "8*late", "cl 1 5 0 30", "ok 3*late", "ag 2 0 0 0"),
    ("nothing moves while both targets fail",
     "9*ag+cl 9*ag+cl:TIMEOUT 9*ag+cl:SHELF", "ag 0 0 0 0"),
    ("a quiet time after the return resets the cooldown",
     "3*ag 30m ok 59m 3*ag", "cl 2 0 0 60", "60m ok 120m 3*ag", "cl 3 0 0 30"),
    ("a clock set back does not lengthen the cooldown, and one set forward ends it",
     "3*ag -525600m", "cl 1 0 0 30", "31m ok", "ag 1 0 0 0"),
    ("a model that fails while others succeed switches alone",
     ALONE, "ag 0 0 0 0, opus cl 1 0 0 30",
     "30m opus/ag 60m opus/ag", "ag 0 0 0 0, opus cl 3 0 0 120", "120m opus/ok", "ag 0 0 0 0"),
    ("a switch of the whole target resets the counters of its models",
     "2*opus/ag haiku/ag", "cl 1 0 0 30", "3*sonnet/cl haiku/ok opus/ag", "ag 2 1 0 0"),
    ("a model alone stays alone while the whole target switches and returns",
     ALONE + "3*haiku/ag", "cl 1 0 0 30, opus cl 1 0 0 30",
     "10m 3*haiku/cl", "ag 2 0 0 0, opus cl 1 0 0 20"),
    ("a model alone does not return to the target that fails it",
     ALONE + "3*haiku/ag 3*opus/cl haiku/ok", "cl 1 0 0 30, opus ag 2 0 0 60"),
)


class WalkTest(FailoverWalk):
    """The rules one by one; ReferenceModelTest mixes them and has all pairs of outcomes."""

    def test_requests_lead_to_these_states(self):
        for what, *turns in WALKS:
            with self.subTest(what):
                self.setUp()
                for steps, state in zip(turns[::2], turns[1::2]):
                    self.walk(steps)
                    self.assertEqual(self.state(), state, steps)

    def test_the_model_longest_without_a_failure_is_forgotten_first(self):
        for number in (*range(256), 0, 256, 0):
            self.walk(f"m{number}/ag haiku/ok")
        self.assertIn("m0 cl 1", self.state())

    def test_a_model_with_an_overlong_name_never_switches_alone(self):
        self.walk(f"{'m' * 257}/ag haiku/ok " * 3)
        self.assertEqual(self.state(), "ag 0 0 0 0")

    def test_each_decision_has_its_line(self):
        failed = "ag failed: 429 (1 of 3 HTTP errors in a row)"
        for steps, expected in (
                ("ag", [failed]),
                ("2*ag:TIMEOUT", ["ag failed: 504 (1 of 2 timeouts in a row)",
                                  "ag failed: 504 (2 of 2 timeouts in a row)",
                                  "SWITCH ag -> cl: 2 consecutive timeouts; retry in 30m"]),
                ("30m ag+cl 1m ag", ["PROBE of ag inconclusive; the next one in 1m",
                                     "SWITCH ag -> cl: failed a probe, last 429; retry in 60m"]),
                ("60m ok", ["RECOVERED: ag responds again"]),
                ("3*ag 3*cl:500", [
                    "SWITCH cl -> ag: 3 consecutive HTTP errors, last 500"]),
                (ALONE, [failed, failed, "ag failed for opus: 429 (2 of 3 HTTP errors in a row)",
                         failed, "ag failed for opus: 429 (3 of 3 HTTP errors in a row)",
                         "SWITCH ag -> cl for opus: 3 consecutive HTTP errors, last 429; "
                         "retry in 30m"]),
                ("opus/cl", ["cl failed for opus: 429 (1 of 3 HTTP errors in a row)"]),
                ("30m opus/ok", ["RECOVERED: ag responds again for opus"])):
            with self.subTest(steps):
                del self.lines[:]
                self.walk(steps)
                self.assertEqual(self.lines[-len(expected):], expected)

    def test_probe_after_a_shelf_response_is_logged_only_if_the_response_changes(self):
        self.walk("ag:401 2*ag:SHELF")
        self.assertEqual(self.failover.report(True)["reason"],
                         "3 consecutive HTTP errors, last 503, after 401")
        for failure, expected in (("SHELF", []), ("401", ["PROBE of ag failed: 401"]), ("401", [])):
            self.clock.advance(60)
            ticket, = self.admit()
            self.assertTrue(ticket.probe and ticket.quiet)
            self.assertEqual(self.failover.charge(ticket, self.failure(failure)), expected)

    def test_failures_of_one_event_count_once_in_any_order(self):
        tickets, start = self.admit(7), self.clock.now
        for seconds in (1.9, 0.3, 2.2, 0.0, 1.0):
            self.charge(tickets.pop(), self.failure(began=start - 5, ended=start + seconds))
        self.assertEqual(self.lines[4], "ag failed: 429 (the same event)")
        self.assertEqual(self.state(), "ag 0 1 0 0")
        for began, ended, state in ((-5, 4, "ag 0 2 0 0"),      # 2 s later, but begun before
                                    (4.1, 4.2, "cl 1 0 0 30")):     # within 2 s, but begun after
            self.charge(tickets.pop(), self.failure(began=start + began, ended=start + ended))
            self.assertEqual(self.state(), state)

    def test_clock_set_back_is_noticed_without_requests(self):
        for steps, state in (("3*ag", "cl 1 0 0 %d"), (ALONE, "ag 0 0 0 0, opus cl 1 0 0 %d")):
            for moves in ((-86400, 86400), (-86400, 1800), (-86400, -86400, 1800)):
                with self.subTest(steps, moves=moves):
                    self.setUp()
                    self.walk(steps)
                    for seconds in moves:
                        self.clock.advance(seconds)
                        self.failover.save()
                    self.assertEqual(self.state(), state % 0)

    def test_reset_forgets_everything_and_earlier_outcomes(self):
        early = self.admit(3)
        self.walk("3*ag")
        hasty = self.auto._replace(failure_threshold=1)
        self.assertEqual(self.failover.reset(hasty, "mode auto"), ["RESET: mode auto; on ag"])
        self.assertEqual(self.failover.reset(hasty, "mode auto"), [])
        for ticket in early:
            self.charge(ticket, self.failure("500"))
        self.assertEqual(self.state(), "ag 0 0 0 0")
        self.walk("ag")                             # by the new threshold
        self.assertEqual(self.state(), "cl 1 0 0 30")

    def test_a_request_keeps_targets_that_the_config_has_replaced_and_is_neutral(self):
        early, = self.admit()
        self.failover.reset(self.auto._replace(targets=("x", "cl"), failure_threshold=1), "test")
        tickets = [*self.admit(), self.failover.rescue(early, TARGETS)]
        self.assertEqual([ticket.target for ticket in tickets], ["ag", "cl"])
        self.assertEqual(self.failover.current(None, TARGETS), "ag")
        for ticket in tickets:
            self.charge(ticket, self.failure())
        self.assertEqual(self.state(), "x 0 0 0 0")

    def test_at_most_256_models_are_remembered(self):
        for number in range(258):
            self.walk("m%d/ag haiku/ok " % number * 3)
        self.assertIn("m257 cl 1 ", self.state())
        self.assertLessEqual(len(self.failover.report(True)["models"]), 256)


AWAY = "3*P.haiku/ag 26m S.ok T.ok P.ok 4m "        # S and T use cl until the cooldown is over
BACK = AWAY + "P.haiku/ok "
STAYS = (
    # the rule, then by turns steps and the targets that the last request tried
    ("a session stays until it pauses", BACK + "S.ok", "cl", "4m S.ok", "cl", "5m S.ok", "ag"),
    ("one that has paused returns", BACK + "2m T.ok", "ag"),
    ("other sessions return", BACK + "ok", "ag", "P.ok", "ag", "N.ok", "ag", "S.haiku/ok", "ag"),
    ("at most an hour", BACK + "S.ok " + "3m S.ok " * 20, "cl", "3m S.ok", "ag"),
    ("a failure ends the stay", BACK + "S.cl", "cl ag", "S.ok", "ag", "T.late", "cl", "T.ok", "ag"),
    ("a rescue makes a session stay", "3*S.ag:SHELF 1m P.ok S.ok", "cl",
     "T.ag", "ag cl", "T.ok", "ag"),
    ("a switch ends the stay", BACK + "T.ok 3*N.ag T.ok", "cl", "3*N.cl T.ok", "ag"),
    ("a return without a probe moves all", "3*S.ag S.ok 3*T.cl S.ok", "ag"),
    ("also those that stayed before", BACK + "S.ok 1m 3*N.ag 3*N.cl S.ok", "ag"),
    ("a session that was not away follows a switch", "S.ok 3*N.ag:SHELF 1m P.ok 3*ag S.ok", "cl"),
    ("a failed probe moves none", AWAY + "P.haiku/ag S.ok", "cl"),
    ("when the others return, a model that switched alone does not",
     ALONE + "3*haiku/ag 28m S.ok 2m P.ag P.haiku/ok 3*N.cl S.ok", "ag"),
    ("a session stays though its model switched alone",
     ALONE + "29m S.ok T.haiku/ag 1m P.ok S.ok", "cl", "P.ok", "ag", "T.haiku/ok", "ag"),
)


class StayTest(FailoverWalk):
    """After a recovery a session stays where its prompt cache is until it pauses."""

    def test_sessions_go_to_these_targets(self):
        for what, *turns in STAYS:
            with self.subTest(what):
                self.setUp()
                for steps, targets in zip(turns[::2], turns[1::2]):
                    self.assertEqual(" ".join(self.walk(steps)), targets, steps)

    def test_a_reset_moves_all_sessions_and_with_stay_0_none_stays(self):
        self.walk(BACK)
        self.failover.reset(self.auto, "")
        self.assertEqual(self.walk("S.ok"), ["ag"])
        self.failover.reset(self.auto._replace(stay_s=0), "")
        self.assertEqual(self.walk(BACK + "S.ok"), ["ag"])

    def test_a_clock_set_back_ends_a_stay(self):
        self.walk(BACK)
        self.clock.advance(-3600)
        self.assertEqual(self.walk("S.ok"), ["ag"])

    def test_names_that_are_too_long_are_not_remembered(self):
        self.walk("3*ag S.%s/ok" % ("m" * 257))
        self.assertEqual(len(self.failover._places), 0)


class SavedStateTest(FailoverWalk):
    """The content of state.json; StateTest has the file."""

    def test_a_restart_keeps_cooldowns_levels_and_models(self):
        self.walk(ALONE + "3*haiku/ag 10m")
        before, saved = self.failover.report(True), json.loads(json.dumps(self.failover.save()))
        saved["whole"]["reason"] += "\x1b[2J"           # as another program may have written it
        self.failover = rrouter.Failover(self.clock, self.auto)
        self.failover.restore(saved)
        self.assertEqual(self.failover.report(True), {
            **before, "reason": before["reason"] + "\\x1b[2J"})
        self.walk("20m haiku/ag")                   # a failed probe: the second cooldown
        self.assertEqual(self.state(), "cl 2 0 0 60, opus cl 1 0 0 0")

    def test_an_older_state_is_taken_over_and_no_more_models_than_are_remembered(self):
        self.walk(ALONE)
        saved = self.failover.save()
        del saved["whole"]["on_shelf"]
        saved["models"] = {f"m{number}": saved["models"]["opus"] for number in range(300)}
        self.failover.restore(saved)
        self.assertEqual(len(self.failover.report(True)["models"]), 256)

    def test_a_clock_set_meanwhile_does_not_lengthen_a_cooldown(self):
        self.walk("3*ag")
        saved = self.failover.save()
        for years in (10, -20):
            self.clock.advance(years * 365 * 86400)
            self.failover.restore(saved)
            self.assertLessEqual(self.failover.report(True)["cooldownRemainingSeconds"], 240 * 60)

    def test_invalid_content_is_refused_and_changes_nothing(self):
        self.walk("3*ag")
        good, before = self.failover.save(), self.failover.report(True)
        changes = ({"home": "x"}, {"home": "cl", "away": "ag"}, {"home": None}, {"level": -1},
                   {"level": []}, {"level": "x"}, {"level": float("inf")}, {"level": None},
                   {"last_cooldown_s": 1e9}, {"last_cooldown_s": 10 ** 400}, {"retry_at": None},
                   {"retry_at": float("nan")}, {"switched_at": float("inf")},
                   {"switched_at": 1e300}, {"switched_at": None}, {"reason": None})
        for content in ({}, {"whole": good["whole"]}, {**good, "models": []},
                        {**good, "models": {"m": 1}},
                        *({**good, "whole": {**good["whole"], **change}} for change in changes)):
            with self.subTest(content):
                with self.assertRaises(rrouter.StateError):
                    self.failover.restore(content)
                self.assertEqual(self.failover.report(True), before)


# Auto mode against a reference model ##########################################

SHOWN = "currentTarget", "failureCount", "timeoutCount", "cooldownSeconds", "reason"


class ReferenceScope:
    """One scope of the model: the whole target, or one model on it.  Targets are 0 and 1."""

    def __init__(self, home):
        self.home = home                        # the target that serves unless `switched`
        self.switched = self.probing = False
        self.on_shelf = False                   # a shelf response caused the last switch
        self.unanswered = False                 # the target switched to has not answered since
        self.n = 1                              # the next switch is the N-th
        self.switches = self.moves = self.cooldown_s = self.retry_at = 0
        self.reason = self.returned_at = None
        self.counted_at = []                    # when the counted failures failed
        self.zero()

    def zero(self):
        self.errors, self.timeouts, self.first_real = 0, 0, None

    def serving(self):
        return self.home ^ self.switched


class ReferenceFailover:
    """Auto mode by the contract, which is quoted.  Where it is open, the model follows rrouter."""

    def __init__(self, clock, auto):
        self.clock, self.auto = clock, auto
        self.whole, self.models = ReferenceScope(0), {}

    def scopes(self):
        return (self.whole, *self.models.values())

    def scope_of(self, model):
        own = self.models.get(model)    # "A model that has switched alone follows its own machine."
        return own if own and own.switched else self.whole

    def ticket(self, number, model, probe=False):
        scope, target = self.scope_of(model), self.auto.targets[number]
        return types.SimpleNamespace(target=target, number=number, model=model, probe=probe,
                                     scope=scope, moves=scope.moves)

    def is_stale(self, ticket):
        # Open: a failure or probe that began before its scope moved is ignored.
        scopes = [self.scope_of(ticket.model), *(self.scopes() if ticket.probe else ())]
        return ticket.scope not in scopes or ticket.moves != ticket.scope.moves

    def admit(self, model, targets):
        # "After the cooldown one request probes the failed target while all others stay."
        scope = self.scope_of(model)
        probe = scope.switched and not scope.probing and self.clock() >= scope.retry_at
        scope.probing = scope.probing or probe
        return self.ticket(scope.home if probe else scope.serving(), model, probe)

    def rescue(self, ticket, targets):
        return self.ticket(1 - ticket.number, ticket.model)

    def commit(self, ticket):
        # "The probe succeeds when it commits, and recovers the target."
        if ticket.probe and not self.is_stale(ticket):
            self.move(ticket.scope, False)
            ticket = self.ticket(ticket.number, ticket.model)
        return ticket, []

    def credit(self, ticket):
        # "A complete 2xx of that target resets both counters."  Open: so does a stale one.
        for scope in filter(None, (self.whole, self.models.get(ticket.model))):
            if ticket.number == scope.serving():
                scope.zero()
                # "N rises only if the target switched to has answered since."  Open: never after
                # a switch by a shelf response, nor by rescues while the target is not serving.
                scope.n += scope.unanswered and not scope.on_shelf
                scope.unanswered = False

    def release(self, ticket):
        # "After a neutral probe the next one comes after a minute at the earliest."
        if ticket.probe and not self.is_stale(ticket):
            # Open: a shorter cooldown shortens the minute.
            ticket.scope.probing = False
            ticket.scope.retry_at = self.clock() + min(60, ticket.scope.cooldown_s)

    def charge(self, ticket, outcome):
        if self.is_stale(ticket):
            return
        scope, status = ticket.scope, outcome.status if outcome.fault is Fault.STATUS else 0
        shelf = outcome.fault is Fault.SHELF or status in (401, 403, 404) or status >= 500
        if ticket.probe and scope.on_shelf and shelf:   # "starts another such minute"
            scope.probing = False
            self.cool_down(scope, 0)
        elif ticket.probe:                      # "A failure that counts is the next switch."
            scope.counted_at.append(outcome.ended)
            self.switch(scope, outcome, f"failed a probe, last {outcome.what}")
        else:
            own = self.models.setdefault(ticket.model, ReferenceScope(self.whole.serving()))
            any(self.count(each, ticket.number, outcome)
                for each in dict.fromkeys((scope, own)))        # `own` if the whole does not switch

    def count(self, scope, number, outcome):
        """Count a failure and return whether it switches the scope."""
        # "A failure within 2 s of the last counted one in the same scope, from an attempt that
        # began before that one failed, belongs to the same event."  Open: in which order.
        same_event = any(outcome.began < at and abs(outcome.ended - at) <= 2
                         for at in scope.counted_at[-16:])
        if number != scope.serving() or same_event:
            return False
        scope.counted_at.append(outcome.ended)
        shelf, timeout = (outcome.fault is fault for fault in (Fault.SHELF, Fault.TIMEOUT))
        scope.timeouts, scope.errors = scope.timeouts + timeout, scope.errors + (not timeout)
        scope.first_real = scope.first_real or (None if shelf else outcome.what)
        reason = f"{scope.errors} consecutive HTTP errors, last {outcome.what}"
        reason += f", after {scope.first_real}" if shelf and scope.first_real else ""
        reason = f"{scope.timeouts} consecutive timeouts" if timeout else reason
        # "A direct failure of a target that has been switched to does not switch back before it
        # has answered once."
        held = outcome.direct and (scope if scope.switched else self.whole).unanswered
        limits = self.auto.failure_threshold, self.auto.timeout_threshold
        if held or (scope.timeouts if timeout else scope.errors) < limits[timeout]:
            return False
        if scope.switched and (scope is self.whole or scope.home == self.whole.serving()):
            # "traffic switches back at once: the cooldown is cancelled, N stays"
            scope.switches += 1
            self.move(scope, False)
        else:       # Open: a model that fails where the whole target has followed it leaves it
            scope.home, scope.switched = scope.serving(), False
            self.switch(scope, outcome, reason)
        return True

    def switch(self, scope, outcome, reason):
        # "N starts over if no switch happens for twice the last cooldown after a recovery."
        # Open: traffic that switched back has recovered.
        if scope.returned_at and self.clock() - scope.returned_at >= 2 * scope.cooldown_s:
            scope.n = 1
        scope.on_shelf = outcome.fault is Fault.SHELF
        self.cool_down(scope, 0 if scope.on_shelf else outcome.retry_after_s)
        scope.reason, scope.switches = reason, scope.switches + 1
        self.move(scope, True)

    def cool_down(self, scope, shorter_s):
        scope.cooldown_s = self.auto.cooldowns_s[:scope.n][-1]
        if shorter_s is not None:   # "not below one minute, or the configured one if ... shorter"
            scope.cooldown_s = min(scope.cooldown_s, max(shorter_s, 60))
        scope.retry_at = self.clock() + scope.cooldown_s

    def move(self, scope, switched):
        # "A switch starts the new target with zero counters."
        scope.moves += scope.switched != switched
        scope.switched = scope.unanswered = switched
        scope.probing, scope.returned_at = False, None if switched else self.clock()
        scope.zero()
        if scope is not self.whole and not switched:
            scope.home = self.whole.serving()
        for own in self.models.values() if scope is self.whole else ():
            if own.switched and not switched and own.home == 1:
                self.move(own, False)           # Open: the whole target returns to where it is
            elif not own.switched:
                # "when the whole target switches, the counters of its models are reset"
                own.home = scope.serving()
                own.zero()

    def report(self, active):
        def view(scope):
            cooldown = (scope.cooldown_s, scope.reason) if scope.switched else (0, None)
            target = self.auto.targets[scope.serving()]
            return dict(zip(SHOWN, (target, scope.errors, scope.timeouts, *cooldown)))
        alone = {name: view(own) for name, own in self.models.items() if own.switched}
        return {**view(self.whole), "switchCount": self.whole.switches, "models": alone}


def reference_verdict(first, second=None):
    """Return whether each attempt counts, and whose response the client gets."""
    process = (Fault.DROPPED, Fault.UNREACHABLE)        # Open: refused is treated like dropped
    neutral = (*process, Fault.OWN, Fault.TOO_LARGE, Fault.REJECTED, Fault.LEFT)
    if second is None or second.fault is None:
        return (second is not None and first.fault not in neutral, False), int(second is not None)
    if second.fault is Fault.LEFT:              # "if it was a timeout or took 60 s or more"
        slow = first.ended - first.began >= 60 and first.fault not in neutral
        return (slow or first.fault is Fault.TIMEOUT, False), 0
    counts, ranks = [], []
    for mine, other in ((first, second), (second, first)):
        # "a timeout counts unless the other target also timed out or dropped the connection"
        counts.append(mine.fault is Fault.TIMEOUT and other.fault not in (mine.fault, *process))
        rank = 4 if mine.status >= 500 else 0
        rank = {429: 1, 401: 2, 403: 2, 404: 3, 408: 4, 504: 5}.get(mine.status, rank)
        rank = {Fault.SHELF: 6, Fault.NO_MESSAGE: 8}.get(mine.fault, rank)
        if mine.fault in (*process, Fault.TIMEOUT, Fault.OWN):
            rank = 9                            # "rrouter's own errors last"
        # "ranks below 429 and 5xx of the other"  Open: also below its 408 and shelf responses.
        retry = other.status in (408, 429) or other.status >= 500
        if mine.fault is Fault.TOO_LARGE and retry and other.fault in (Fault.STATUS, Fault.SHELF):
            rank = 7
        ranks.append(0 if mine.keeps_400 else rank)
    return tuple(counts), int(ranks[1] < ranks[0])


# Rows of (fault, status, text) for Outcome; of (failures, timeouts, cooldowns) for AutoSettings.
FAULTS = [(None, 200, "200"), (Fault.TIMEOUT, 504, "timeout"), (Fault.NO_MESSAGE, 200, "none"),
          (Fault.SHELF, 503, "503 auth"), (Fault.DROPPED, 502, "dropped"), (Fault.SHELF, 400, "s"),
          *((Fault.STATUS, status, str(status)) for status in (400, 401, 404, 408, 429, 500)),
          (Fault.TOO_LARGE, 413, "413"), (Fault.LEFT, 499, "left")]
SETTINGS = (3, 2, (1800.0, 3600.0, 7200.0, 14400.0)), (1, 1, (1800.0, 3600.0)), (2, 2, (30.0, 90.0))
WAITS = 0.1, 1.0, 2.0, 3.0, 5.0, 60.0, 150.0, 4000.0
# The actions of a walk and their weights.  The last three end a response that has committed.
ACTIONS = {"begin": 30, "attempt": 40, "wait": 16, "wait for probe": 8, "restart": 1,
           "credit": 8, "charge": 4, "release": 2}


class ReferenceWalk:
    """Takes the same steps with rrouter.Failover and with the model."""

    def __init__(self, settings):
        self.now, self.requests = 1000.0, []
        self.auto = rrouter.AutoSettings(("antigravity", "claude"), *settings, 150.0)
        self.clock = lambda: self.now
        self.real = rrouter.Failover(self.clock, self.auto)
        self.model = ReferenceFailover(self.clock, self.auto)

    def difference(self, steps):
        """Return the steps up to the first difference, and both states; "" if all states agree."""
        for number, step in enumerate(steps, 1):
            self.take(*step)
            real, model = self.shown(self.real, 0), self.shown(self.model, 1)
            if real != model:
                return "\n".join(map(str, [*steps[:number], real, "the model:", model]))
        return ""

    def shown(self, side, number):
        report, tickets = side.report(True), [r.tickets[number] for r in self.requests]
        views = {"": report, **report["models"]}.items()
        return (report["switchCount"], {name: [view[key] for key in SHOWN] for name, view in views},
                [(ticket.target, ticket.probe > 0) for ticket in tickets])

    def take(self, action, which, choice, seconds):
        fitting = [r for r in self.requests if r.committed == (action != "attempt")]
        if action == "wait":
            self.now += seconds
        elif action == "wait for probe":
            ends = [scope.retry_at for scope in self.model.scopes() if scope.switched]
            self.now = max(self.now, max(ends, default=0) + which - 1)
        elif action == "restart":
            saved, self.requests = json.loads(json.dumps(self.real.save())), []
            self.real = rrouter.Failover(self.clock, self.auto)
            self.real.restore(saved)
            for scope in self.model.scopes():   # Open: a restart keeps all but the counters
                scope.probing = False
                scope.zero()
        elif action == "begin":
            tickets = [side.admit(choice, self.auto.targets) for side in (self.real, self.model)]
            self.requests.append(types.SimpleNamespace(
                tickets=tickets, began=self.now, attempts=[], committed=False))
        elif fitting:
            request = fitting[which % len(fitting)]
            outcome = Outcome(*choice, request.began, self.now, seconds, direct=action == "charge")
            if action == "attempt":
                self.attempt(request, outcome)
            else:
                self.requests.remove(request)
                self.each(action, request.tickets, *[outcome] * (action == "charge"))

    def each(self, method, tickets, *arguments):
        sides = zip((self.real, self.model), tickets)
        return [getattr(side, method)(ticket, *arguments) for side, ticket in sides]

    def attempt(self, request, outcome):
        """Let the current attempt commit or fail."""
        request.attempts.append((request.tickets, outcome))
        request.committed = outcome.fault is None
        if len(request.attempts) == 1 and outcome.fault not in (None, Fault.LEFT):
            request.tickets = self.each("rescue", request.tickets, self.auto.targets)
            request.began = self.now
            return
        counts = reference_verdict(*(attempt[1] for attempt in request.attempts))[0]
        for (tickets, failure), count in zip(request.attempts, counts):
            if failure.fault is not None:
                self.each(*(("charge", tickets, failure) if count else ("release", tickets)))
        if request.committed:
            request.tickets = [ticket for ticket, _ in self.each("commit", request.tickets)]
        else:
            self.requests.remove(request)


class ReferenceModelTest(unittest.TestCase):
    """rrouter against the model: random sequences of steps, and every pair of outcomes."""

    SEED = os.environ.get("RROUTER_FUZZ_SEED") or "20260129"
    CASES = int(os.environ.get("RROUTER_FUZZ_CASES") or 3000)

    def steps(self, dice):
        models, pool = "mno"[:dice.randint(1, 3)], FAULTS[:1] * 4 + dice.choices(FAULTS, k=4)
        for action in dice.choices(list(ACTIONS), ACTIONS.values(), k=dice.randint(20, 70)):
            choice = {"begin": dice.choice(models), "charge": dice.choice(FAULTS[1:3])}
            seconds = WAITS if action == "wait" else (None, None, 0.5, 90.0, 90000.0)
            yield (action, dice.randrange(4), choice.get(action, dice.choice(pool)),
                   dice.choice(seconds))

    def test_random_sequences_agree(self):
        for case in range(self.CASES):
            dice = random.Random(f"{self.SEED} {case}")
            settings, steps = dice.choice(SETTINGS), list(self.steps(dice))
            if ReferenceWalk(settings).difference(steps):
                for place in 2 * list(reversed(range(len(steps)))):     # find a short sequence
                    shorter = steps[:place] + steps[place + 1:]
                    steps = shorter if ReferenceWalk(settings).difference(shorter) else steps
                self.fail(f"RROUTER_FUZZ_SEED={self.SEED}, case {case}, {settings}\n"
                          + ReferenceWalk(settings).difference(steps))

    def test_verdicts_agree(self):
        rows = [*FAULTS[1:-1], (Fault.UNREACHABLE, 502, ""), (Fault.OWN, 503, ""),
                (Fault.SHELF, 429, ""), (Fault.REJECTED, 400, ""), (Fault.STATUS, 504, "")]
        firsts = [Outcome(*row, 0.0, ended, None, keeps) for row in rows
                  for ended in (59.0, 60.0) for keeps in (False, True)]
        for first in firsts:
            for second in (*firsts, Outcome(*FAULTS[0]), Outcome(*FAULTS[-1])):
                verdict = tuple(rrouter.judge(first, second))
                self.assertEqual(verdict, reference_verdict(first, second), (first, second))


# Files ########################################################################

HASTY_CONFIG = dict(DEFAULT_CONFIG, auto={"failureThreshold": 1})   # switches at the first failure


def switchboard(number, **members):
    """Return a config that rewrites each model to MODE-NUMBER, which shows what is in force."""
    modes = {name: {"mappings": [{"match": "*", "rewrite": "%s-%03d" % (name, number)}]}
             for name in ("one", "two", "spare")}
    return dict({"modes": modes, "defaultMode": "spare", "auto": {"targets": ["one", "two"]}},
                **members)


def put(home, name, content):
    """Replace ~/.rrouter/NAME, even a directory, by rename, as editors do."""
    path = home.dir / name
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    fresh = home.dir / f"{name}.{threading.get_ident()}.new"
    fresh.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str)
                      else content)
    os.replace(str(fresh), str(path))


REFUSED_CONFIGS = (
    # content, a pattern for the message
    (b"// modes\n{}", r"config\.json:1:1: "),
    (b"\0" * 64, r"config\.json:1:1: "),
    (json.dumps(switchboard(1)).encode() * 2, r"config\.json:1:\d+: "),
    (json.dumps(switchboard(1)).encode() + b"\xff", "expected UTF-8, found byte 0xff at offset"),
    (b'{"modes": {"m": {"mappings": []}}, "auto": %s1%s}' % (b"[" * 900, b"]" * 900),
     "auto: |too deep"),
    (b'{"modes": {"m": {}}, "auto": {"failureThreshold": %s}}' % (b"9" * 5000), "number"),
)


class ConfigContentTest(unittest.TestCase):
    """The content of config.json as bytes; ParseConfigTest has text."""

    def test_unusable_content_is_refused_in_one_line(self):
        for content, pattern in REFUSED_CONFIGS:
            with self.subTest(content[:40], pattern=pattern):
                with self.assertRaises((rrouter.ConfigError, UnicodeDecodeError)) as caught:
                    rrouter.config_of(content)
                complaint = rrouter.describe_config_error(caught.exception)
                self.assertRegex(complaint, r"\Aconfig\.json:[^\0-\x1f]+\Z")
                self.assertRegex(complaint, pattern)

    def test_byte_order_mark_is_skipped(self):
        content = json.dumps(switchboard(6)).encode()
        self.assertEqual(rrouter.config_of(b"\xef\xbb\xbf" + content), rrouter.config_of(content))


MODE_WORDS = (
    # content of the mode file,             the word in it
    (None,                                  None),
    (b"",                                   ""),
    (b" \n",                                ""),
    (b"\tAUTO\r\n\n",                       "auto"),
    ("\ufeffclaude\n".encode(),             "claude"),
    ("\ufeffAuto\r\n".encode("utf-16-le"),  "auto"),
    ("\ufeffauto".encode("utf-16-be"),      "auto"),
    (b"\xff\xfe",                           ""),
    (b"\xff\xfea",                          r"\x61"),
    (b"caf\xe9",                            r"caf\xe9"),
)


class ReadFileTest(unittest.TestCase):

    def test_reading_a_directory_leaves_no_descriptor_open(self):
        with tempfile.TemporaryDirectory() as directory:
            before = os.listdir("/dev/fd")
            for _ in range(20):
                with self.assertRaises(OSError):
                    rrouter.read_file(directory)
            self.assertEqual(len(os.listdir("/dev/fd")), len(before))

    def store(self, **options):
        home = Home(**options)
        self.addCleanup(home.remove)
        paths = rrouter.Paths(str(home.root))
        return home, rrouter.Store(paths, rrouter.Log(paths.log, echo=False), lambda *_: None)

    def test_each_write_is_noticed_though_time_stamps_are_whole_seconds(self):
        """Newer kernels have finer time stamps, so only a stand-in for os.stat shows this."""
        stat, (home, store) = os.stat, self.store(config=switchboard(0))

        def coarse_stat(path):
            status = stat(path)
            times = {name: getattr(status, name) // 10 ** 9 * 10 ** 9
                     for name in ("st_mtime_ns", "st_ctime_ns")}
            return types.SimpleNamespace(st_size=status.st_size, st_ino=status.st_ino, **times)

        for mode in ("one", "two") * 9:
            home.write("mode", mode + "\n")
            with mock.patch("os.stat", coarse_stat):
                self.assertEqual(store.snapshot().mode, mode)

    def test_absent_mode_file_has_the_fingerprint_that_earlier_versions_saved(self):
        _, store = self.store()
        store.snapshot()
        self.assertIsNone(store.fingerprint()["modeFile"])

    def test_mode_word_is_read_in_the_encodings_that_shells_write(self):
        for content, word in MODE_WORDS:
            with self.subTest(content):
                self.assertEqual(rrouter.mode_word(content), word)


class LogQueueTest(unittest.TestCase):

    def test_a_full_queue_is_a_problem(self):
        log = rrouter.Log("/nonexistent/rrouter.log", echo=False)
        for _ in range(log.HELD_MAX):
            log.write("REQ", "line")
        self.assertIsNone(log.problem)
        log.write("REQ", "line")
        self.assertRegex(log.problem, "^rrouter.log: .*lines are lost$")

    def test_constructors_have_no_effect(self):
        with tempfile.TemporaryDirectory() as directory:
            before = sorted(os.listdir("/dev/fd"))
            paths = rrouter.Paths(directory)
            log = rrouter.Log(paths.log, echo=False)
            rrouter.Store(paths, log, lambda old, new, written: None)
            rrouter.StateFile(paths.state)
            rrouter.Lock(paths.lock)
            rrouter.Signals()
            self.assertEqual(sorted(os.listdir("/dev/fd")), before)
            self.assertEqual(os.listdir(directory), [])


class StateSavingTest(unittest.TestCase):
    """state.json belongs to one mode file and one auto section."""

    FINGERPRINT = {"modeFile": [1, 2, 3], "auto": [["a", "b"], 3]}

    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = pathlib.Path(directory.name, "sub", "state.json")
        self.path.parent.mkdir()
        self.state = rrouter.StateFile(str(self.path))

    def save(self, number):
        self.state.save(dict(self.FINGERPRINT, whole=number))

    def test_unusable_file_and_state_of_other_files_are_refused(self):
        self.assertIsNone(self.state.load(self.FINGERPRINT))
        self.save(7)
        self.assertEqual(self.state.load(self.FINGERPRINT)["whole"], 7)
        good = self.path.read_text()
        for content, change, pattern in (
                (good, {"modeFile": [1, 2, 4]}, "the mode file was written"),
                (good, {"modeFile": None}, "the mode file was written"),
                (good, {"auto": []}, "the auto section was written"),
                *((bad, {}, "not written by this version") for bad in (
                    good[:-5], "[" * 100_000, '{"version": 2}', "{}", "[1]", "1"))):
            with self.subTest(content[:20], change=change), \
                    self.assertRaisesRegex(rrouter.StateError, pattern):
                self.path.write_text(content)
                self.state.load(dict(self.FINGERPRINT, **change))

    def test_same_state_is_written_again_only_after_it_was_lost(self):
        self.save(7)
        for number, lost, written in ((7, False, False), (8, False, True), (8, True, True)):
            self.path.unlink(missing_ok=True)
            if lost:
                self.state.saved = None
            self.save(number)
            self.assertEqual(self.path.exists(), written)

    def test_failure_is_a_problem_until_it_ends(self):
        self.path.parent.rmdir()
        self.save(2)
        self.assertRegex(self.state.problem, "^state.json: cannot be written: ")
        self.path.parent.mkdir()
        self.save(2)
        self.assertIsNone(self.state.problem)


class SwitchboardTest(RouterTest):
    """Base of the tests that write mode and config.json: modes one, two, and spare by default."""

    mode, config = "one", switchboard(0)

    def setUp(self):
        self.home = self.rrouter.home
        put(self.home, "config.json", json.dumps(switchboard(0)))
        put(self.home, "mode", "one\n")
        super().setUp()
        self.upstream.default = stream()
        self.assertEqual(self.served(), "one-000")
        self.upstream.clear()

    def served(self):
        """Return the model that the upstream gets for a request made now."""
        self.assertEqual(self.rrouter.post().status, 200)
        return self.upstream.models()[-1]

    def problems(self):
        return " | ".join(self.rrouter.health()["problems"])


class FreshnessTest(SwitchboardTest):
    """A request that begins after a write has returned obeys what was written."""

    def ask(self, connection, reader):
        """Post on this connection; return the model that was forwarded."""
        connection.sendall(request_bytes(body=b'{"model":"m"}', port=self.rrouter.port))
        reply = read_reply_from(reader)
        self.assertEqual(reply.status, 200)
        return reply.header("x-rrouter-model")

    def test_every_way_to_write_is_noticed(self):
        root, mode, config = self.home.root, self.home.dir / "mode", self.home.dir / "config.json"
        aside, target = root / "aside", root / "target"

        def in_place(text):
            with open(str(mode), "r+b") as opened:
                opened.write(text.encode())

        def with_its_old_times(text):
            """As `cp -p`, `rsync -t` and `touch -r` write."""
            before = mode.stat()
            in_place(text)
            os.utime(str(mode), ns=(before.st_atime_ns, before.st_mtime_ns))

        def by_older_file(text):
            aside.write_text(text)
            os.utime(str(aside), (1, 1))
            aside.rename(config)

        def by_link(text):
            target.write_text(text)
            aside.symlink_to(target)
            os.replace(str(aside), str(mode))

        def by_other_home(text):
            copied, old = str(root) + ".copy", str(root) + ".old"
            shutil.copytree(str(root), copied, ignore=shutil.ignore_patterns("*.tmp"))
            pathlib.Path(copied, ".rrouter", "mode").write_text(text)
            os.rename(str(root), old)
            os.rename(copied, str(root))
            shutil.rmtree(old)

        for label, act, served in (
                ("in place", lambda: in_place("two\n"), "two-000"),
                ("its times set back", lambda: with_its_old_times("one\n"), "one-000"),
                ("moved away", lambda: mode.rename(aside), "spare-000"),
                ("moved back", lambda: aside.rename(mode), "one-000"),
                ("an older config", lambda: by_older_file(json.dumps(switchboard(1))), "one-001"),
                ("a link", lambda: by_link("two\n"), "two-001"),
                ("the file of the link", lambda: target.write_text("one\n"), "one-001"),
                ("another home", lambda: by_other_home("two\n"), "two-001"),
                ("in that home", lambda: mode.write_text("one\n"), "one-001"),
                ("no config", config.unlink, SONNET),
                ("a mode of the defaults", lambda: mode.write_text("antigravity"), GEMINI_SONNET)):
            with self.subTest(label):
                time.sleep(rrouter.SETTLED_S)   # an older file is not read for each request
                self.served()
                act()
                self.assertEqual(self.served(), served)

    def test_only_valid_writes_take_effect_while_other_requests_read_the_files(self):
        """A request may read a file written in place while it is empty or half written."""
        done, good = threading.Event(), 0

        def ask_on():
            with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
                while not done.is_set():
                    self.ask(connection, reader)

        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            asking = [pool.submit(ask_on) for _ in range(3)]
            try:
                with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
                    for number in range(120):
                        text = json.dumps(switchboard(number))
                        some = (text[:-5], text.replace('"*"', "7"), text)[number % 3]
                        write = put if number % 2 else Home.write
                        mode = ("one", "two")[number % 4 // 2]
                        good = number if number % 3 == 2 else good
                        write(self.home, "config.json", some)
                        write(self.home, "mode", mode + "\n")
                        self.assertEqual(self.ask(connection, reader), "%s-%03d" % (mode, good))
            finally:
                done.set()
            for one in asking:
                one.result()
        models = set(self.upstream.models())
        self.assertLessEqual(models, {"%s-%03d" % (mode, number) for mode in ("one", "two")
                                      for number in (0, *range(2, 120, 3))})
        self.assertEqual(self.problems(), "")


MODE_FILES = (
    # content, mode in force, the word that `problems` contains (None: no problem)
    (b"\tAuto", "auto", None),
    (b" \n", "one", None),
    (b"one two\n", "spare", "one two"),
    (b"\x1b[31mred\n", "spare", "red"),
    (b"long" * 30_000, "spare", "longlong"),
)
CONFIG_FILES = (
    # content, mode, the forwarded model, a pattern for `problems`
    ("{", "one", "one-000", r"config\.json:1:2: "),
    (b"\xff", "one", "one-000", r"config\.json: .*UTF-8"),
    (json.dumps(switchboard(1, auto={"failureThreshold": 0})), "one", "one-000",
     r"auto\.failureThreshold: expected"),
    (json.dumps(switchboard(1, auto={"colour": "red"})), "one", "one-001",
     r"config\.json: auto\.colour: unknown"),
    (json.dumps(switchboard(1, auto={"targets": ["one", "gone"]})), "auto", "spare-001",
     r"auto\.targets.*gone"),
    (json.dumps(switchboard(1, defaultMode="auto")), "nosuch", "one-001", "nosuch"),
)


class ModeAndConfigTest(SwitchboardTest):
    """The content of mode and config.json while rrouter runs."""

    def test_word_in_the_mode_file_decides(self):
        for content, mode, word in MODE_FILES:
            with self.subTest(content[:20]):
                put(self.home, "mode", "one\n")
                self.assertEqual(self.served(), "one-000")
                put(self.home, "mode", content)
                self.assertEqual(self.served(), {"auto": "one"}.get(mode, mode) + "-000")
                self.assertEqual(self.rrouter.health()["mode"], mode)
                problems = self.problems()
                self.assertEqual(bool(problems), word is not None, problems)
                self.assertIn(word or "", problems)
                self.assertNotIn("\x1b", problems)

    def test_bad_config_leaves_the_last_good_one_in_force_and_is_logged_once(self):
        before = len(self.rrouter.log())
        for content, mode, model, pattern in CONFIG_FILES:
            with self.subTest(content[:60]):
                put(self.home, "mode", mode + "\n")
                put(self.home, "config.json", content)
                self.assertEqual([self.served() for _ in range(3)], [model] * 3)
                self.assertRegex(self.problems(), pattern)
                put(self.home, "mode", "one\n")
                put(self.home, "config.json", json.dumps(switchboard(2)))
                self.assertEqual((self.served(), self.problems()), ("one-002", ""))
                put(self.home, "config.json", json.dumps(switchboard(0)))
                self.assertEqual(self.served(), "one-000")
        put(self.home, "mode", "two\n")
        wait_until(lambda: "[MODE] one -> two" in self.rrouter.log()[before:])
        lines = [line for line in self.rrouter.log()[before:].splitlines() if "[CONFIG]" in line]
        for _, _, _, pattern in CONFIG_FILES[:-1]:
            self.assertEqual(len([line for line in lines if re.search(pattern, line)]), 1, lines)

    def test_extreme_settings_of_auto_do_no_harm(self):
        """Every accepted number must fit into the timeout of a socket and into a date."""
        for threshold, minutes in ((1, 525600), (1, 0.0001), (1000, 525600)):
            with self.subTest(threshold=threshold, minutes=minutes):
                put(self.home, "config.json", json.dumps(switchboard(5, auto={
                    "targets": ["one", "two"], "failureThreshold": threshold,
                    "cooldownMinutes": [minutes], "firstByteTimeoutSeconds": 86400})))
                put(self.home, "mode", "auto\n")
                self.upstream.play(error(503))
                self.assertEqual((self.served(), self.problems()), ("two-005", ""))
                self.assertEqual(self.rrouter.health()["autoSwitch"]["switched"], threshold == 1)

    def test_directory_or_fifo_instead_of_a_file_is_named_and_blocks_nothing(self):
        before = len(self.rrouter.log())
        for name, good in (("mode", "one\n"), ("config.json", json.dumps(switchboard(0)))):
            for make in (os.mkdir, os.mkfifo):
                with self.subTest(name, made_by=make.__name__):
                    odd = self.home.root / ("%s %s" % (name, make.__name__))
                    make(str(odd))
                    (self.home.dir / "link").symlink_to(odd)
                    os.replace(str(self.home.dir / "link"), str(self.home.dir / name))
                    self.assertEqual([self.served() for _ in range(3)], ["one-000"] * 3)
                    self.assertRegex(self.problems(), r"^%s: " % re.escape(name))
                    put(self.home, name, good)
                    self.assertEqual((self.served(), self.problems()), ("one-000", ""))
        put(self.home, "mode", "spare\n")
        wait_until(lambda: "[MODE] one -> spare" in self.rrouter.log()[before:])
        self.assertEqual(self.rrouter.log()[before:].count("config.json: cannot be read"), 2)

    def test_a_switch_does_not_affect_a_stream_that_runs(self):
        gate = self.gate()
        self.upstream.play(stream(event("ping"), event("message_stop"), gate=gate))
        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            connection.sendall(request_bytes(body=b'{"model":"m"}', port=self.rrouter.port))
            self.assertEqual(read_head(reader)[0], 200)
            put(self.home, "mode", "two\n")
            put(self.home, "config.json", "{")
            self.assertEqual(self.served(), "two-000")
            gate.set()
            self.assertEqual(read_chunks(reader), (event("ping") + event("message_stop"), True))
        wait_until(lambda: " m -> one one-000 200 " in self.rrouter.log())

    def test_bad_config_at_the_start_means_the_embedded_default(self):
        router = self.start_rrouter(self.upstream, config="{")
        router.post()
        self.assertEqual(self.upstream.models(), [GEMINI_SONNET])
        self.assertRegex(" ".join(router.health()["problems"]), r"config\.json:1:2: ")
        wait_until(lambda: "config.json:1:2: " in router.log())


# Upstream #####################################################################

class UpstreamTest(LoopbackTest):
    def test_base_path_and_host_of_the_upstream_are_used_and_proxies_are_not(self):
        upstream = self.start_upstream()
        url = "http://localhost:%d/Api/v%%31" % upstream.port
        proxies = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
        self.assertEqual(self.start_rrouter(url + "/", env=proxies).post(target="//x").status, 200)
        received = upstream.received[0]
        self.assertEqual((received.target, received.header("host")),
                         ("/Api/v%31//x", "localhost:%d" % upstream.port))

    def test_unreachable_upstream_is_a_bad_gateway_until_it_is_back(self):
        port = free_port()
        running = self.start_rrouter("http://127.0.0.1:%d" % port)
        for _ in range(2):
            reply = running.request("GET", "/v1/models")    # without a model it does not wait
            self.assert_error(reply, 502, "http://127.0.0.1:%d" % port)
            self.assertEqual(reply.json()["error"]["type"], "api_error")
            self.assertEqual(reply.header("x-rrouter-error"), "1")
            self.assertEqual(running.health()["status"], "ok")
            for _ in range(2):              # a restart between two requests goes unnoticed
                upstream = self.start_upstream(port=port)
                self.assertEqual([running.post().status for _ in range(2)], [200, 200])
                upstream.close()

    def test_advice_not_to_retry_comes_only_after_an_earlier_failure(self):
        running = self.start_rrouter("http://127.0.0.1:%d" % free_port(),
                                     limits={"RECONNECT_FOR_S": 0.5})
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            replies = list(pool.map(lambda _: running.post(), range(2)))
        for reply in (*replies, running.post()):
            self.assert_error(reply, 502, "start CLIProxyAPI")
        self.assertEqual([reply.header("x-should-retry") for reply in replies], [None, None])
        self.assertEqual(reply.header("x-should-retry"), "false")

    def test_upstream_that_is_rrouter_itself_makes_no_loop(self):
        port = free_port()
        home = self.make_home("http://localhost:%d" % port, "antigravity", port=port)
        running = self.start_rrouter(None, home=home)
        self.assert_error(running.request("GET", "/v1/models"), 502, "is rrouter itself")
        self.assertLessEqual(running.health()["requestCount"], 2)

    def test_requests_need_neither_ctypes_nor_modules_of_a_removed_library(self):
        code = """if True:
            import encodings
            "a".encode("idna")
            encodings.__path__ = []
            sys.modules["ctypes"] = None"""
        running = self.start_rrouter(self.start_upstream(), code=code)
        self.assertEqual(running.post("\ud55c").status, 200)


class PoolTest(RouterTest):
    """Connections to the upstream stay open for further requests."""

    def fresh(self, response):
        """Let each connection of the upstream give this response once, then hang up."""
        seen = set()

        def respond(received):
            known = received.connection in seen
            seen.add(received.connection)
            return Response(hangup=True) if known else response

        self.upstream.default = respond

    def test_connection_is_reused(self):
        opened = self.upstream.connections
        for _ in range(20):
            self.assertEqual(self.rrouter.post().status, 200)
        self.assertLessEqual(self.upstream.connections - opened, 1)

    def test_stale_connection_is_replaced_unseen_and_is_neutral(self):
        """An upstream may close an idle connection just as the next request arrives."""
        self.rrouter.home.write("mode", "auto\n")
        for when, (tries, padding) in itertools.product(
                ("at reuse", "after the response"), ((50, 0), (10, 1_000_000))):
            with self.subTest(when, padding=padding):
                self.upstream.clear()
                self.upstream.default = stream(framing="length", cut=True)
                if when == "at reuse":
                    self.fresh(stream())
                for _ in range(tries):
                    reply = self.rrouter.post(padding="x" * padding)
                    self.assertEqual(
                        (reply.status, reply.complete, reply.header("x-rrouter-attempts")),
                        (200, True, "1"))
                self.assertLessEqual(len(self.upstream.received), 2 * tries)
                self.assertEqual(set(self.upstream.models()), {GEMINI_SONNET})
        auto = self.rrouter.health()["autoSwitch"]
        self.assertEqual((auto["failureCount"], auto["timeoutCount"]), (0, 0))

    def test_broken_idle_connection_is_replaced(self):
        for turn in range(20):
            self.assertEqual(self.rrouter.post().status, 200)
            self.upstream.break_connections(reset=turn % 2 == 1)
        self.assertEqual(len(self.upstream.received), 20)

    def test_request_is_not_sent_again_after_an_interim_response(self):
        self.upstream.play(Response(), Response(raw=b"HTTP/1.1 102 Processing\r\n\r\n"))
        self.assertEqual([self.rrouter.post().status for _ in range(2)], [200, 502])
        self.assertEqual(len(self.upstream.received), 2)

    def test_connection_kept_while_the_machine_slept_is_not_used(self):
        """Only the wall clock runs during sleep."""
        upstream = self.start_upstream()
        router = self.start_rrouter(upstream, code="""if True:
            import os, time
            real, mark = time.time, os.path.join(os.environ["HOME"], "slept")
            time.time = lambda: real() + 3600 * os.path.exists(mark)""")
        for _ in range(2):
            self.assertEqual(router.post().status, 200)
        (router.home.root / "slept").touch()
        self.assertEqual(router.post().status, 200)
        self.assertEqual([request.connection for request in upstream.received], [1, 1, 2])

    @unittest.skipUnless(hasattr(socket, "TCP_USER_TIMEOUT"), "only Linux has TCP_USER_TIMEOUT")
    def test_connection_beyond_loopback_must_be_acknowledged(self):
        upstream = rrouter.Upstream(self.start_upstream().url, lambda _: False)
        for is_loopback, expected in ((rrouter.is_loopback, 0), (lambda _: False, 120_000)):
            with mock.patch.object(rrouter, "is_loopback", is_loopback), \
                    contextlib.closing(upstream.connect()) as connection:
                self.assertEqual(connection.sock.getsockopt(
                    socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT), expected)

    def test_unfinished_response_ends_its_connection(self):
        self.upstream.play(stream(gate=self.gate()))
        with self.opened() as response:
            self.assertTrue(receive(response, 9))
        self.assertEqual(self.rrouter.post().body, b"{}")
        first, second = self.upstream.received
        self.assertNotEqual(first.connection, second.connection)


class KernelLimitTest(unittest.TestCase):

    def test_both_widths_of_time_are_tried_in_order(self):
        """A 32-bit system may use 64-bit time, and may misread the form that it does not use."""
        for errors in ((0,), (errno.EINVAL, 0), (errno.EBADF, errno.EBADF)):
            connection = mock.Mock()
            connection.setsockopt.side_effect = [
                OSError(number, "refused") if number else None for number in errors]
            with self.subTest(errors), (
                    self.assertRaises(OSError) if errors[-1] else contextlib.nullcontext()):
                rrouter.set_kernel_limit(connection, 7, 2.25)
            self.assertEqual([call[0][1:] for call in connection.setsockopt.call_args_list], [
                (7, struct.pack(layout, 2, 250_000)) for layout in ("@ll", "@qq")[:len(errors)]])


class UnreadRequestTest(RouterTest):
    """Upstreams that respond or pause before they have read the body of the request."""

    BIG = chat(padding="x" * (12 << 20))

    def test_early_response_is_forwarded(self):
        early = error(413, "too long")
        for stays in (False, True):
            for body in (chat(padding="x" * 10), self.BIG):
                with self.subTest(stays=stays, size=len(body)):
                    gate = self.gate()
                    self.upstream.play(
                        Response(raw=(), early=early.wire(), stays=True, unread=gate) if stays
                        else Response(early=early.wire(), hangup=True))
                    reply = self.rrouter.request(body=body)
                    self.assertEqual((reply.status, reply.body), (413, early.chunks[0]))
                    gate.set()
                    # The upstream must not read the next request as the rest of that body.
                    self.assertEqual(self.rrouter.request(body=b'{"x":1}').body, b"{}")

    def test_interim_response_does_not_truncate_the_upload(self):
        gate = self.gate()
        interim = b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
        self.upstream.play(Response(early=interim, unread=gate))
        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            connection.sendall(request_bytes(body=self.BIG))
            self.assertEqual(read_head(reader)[0], 103)
            gate.set()
            reply = read_reply_from(reader)
        self.assertEqual((reply.status, reply.interim), (200, []))
        self.assertEqual(len(self.upstream.received[0].body),
                         len(self.BIG) - len(SONNET) + len(GEMINI_SONNET))

    def test_client_that_leaves_during_a_slow_upload_ends_it(self):
        self.upstream.play(Response(unread=self.gate()))
        with self.rrouter.connect() as connection:
            connection.sendall(request_bytes(body=self.BIG))
            self.upstream.wait(lambda upstream: upstream.heads)
        start = time.monotonic()
        wait_until(lambda: self.rrouter.health()["activeRequests"] == 0)
        self.assertLess(time.monotonic() - start, 2)    # one second, and one for a busy machine


class UpstreamPortTest(unittest.TestCase):

    def test_the_scheme_sets_the_default_port(self):
        with mock.patch("socket.create_connection", side_effect=ConnectionRefusedError) as connect:
            for url in ("http://[::1]", "https://localhost/base", "http://localhost:8317"):
                with self.assertRaises(rrouter.UpstreamUnreachable):
                    rrouter.Upstream(url, lambda _: False).open()
        self.assertEqual([call[0][0] for call in connect.call_args_list],
                         [("::1", 80), ("localhost", 443), ("localhost", 8317)])


class ResponseTextTest(unittest.TestCase):

    PACKED, MOST = gzip.compress(b"hello "), rrouter.READ_AHEAD_MAX_BYTES
    CASES = (
        # Content-Encoding, body, text
        (b"identity", b"x", b"x"), (b"br", b"x", b"x"), (b"gzip", PACKED, b"hello "),
        (b"GZIP", PACKED * 2, b"hello hello "), (b"gzip", PACKED + b"\0\0", b"hello "),
        (b"deflate", zlib.compress(b"x"), b"x"), (b"deflate", zlib.compress(b"x")[2:-4], b"x"),
        (b"gzip", b"x", b""), (b"gzip", PACKED[:4], b""),
        (b"gzip", gzip.compress(bytes(MOST)) * 2, bytes(MOST + 1)),
    )

    def test_compressed_text_is_read_up_to_one_byte_over_the_limit(self):
        for coding, data, expected in self.CASES:
            with self.subTest(coding, data=data[:20]):
                head = b"HTTP/1.1 200 OK\r\nContent-Encoding: " + coding + b"\r\n\r\n"
                response = rrouter.Response(rrouter.parse_response_head(head), None, None, None)
                response.ahead = data
                self.assertTrue(response.text() == expected)            # no diff of 1 MB


CERTIFICATE = """
[req]
distinguished_name = name
x509_extensions = extensions
prompt = no
[name]
CN = rrouter test
[extensions]
subjectAltName = IP:127.0.0.1
basicConstraints = critical, CA:TRUE
keyUsage = critical, digitalSignature, keyCertSign
subjectKeyIdentifier = hash
"""


@unittest.skipUnless(shutil.which("openssl"), "needs openssl to make a certificate")
class TlsTest(RouterTest):
    """Base of the tests with an upstream that speaks TLS."""

    limits = {"TICK_S": 0.05}

    @classmethod
    def setUpClass(cls):
        folder = tempfile.mkdtemp()
        cls.addClassCleanup(shutil.rmtree, folder)
        config, key, certificate = (os.path.join(folder, name)
                                    for name in ("config", "key", "certificate"))
        pathlib.Path(config).write_text(CERTIFICATE)
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                        "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-config", config,
                        "-keyout", key, "-out", certificate],
                       check=True, stderr=subprocess.DEVNULL, timeout=WAIT_S)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        cls.upstream_class = functools.partial(Upstream, tls=context)
        cls.env = {"SSL_CERT_FILE": certificate}
        super().setUpClass()


class TlsUpstreamTest(TlsTest):

    def test_connection_is_reused(self):
        opened = self.upstream.connections
        for _ in range(10):
            self.assertEqual(self.rrouter.post().status, 200)
        self.assertLessEqual(self.upstream.connections - opened, 1)
        self.assertEqual(self.upstream.models(), [GEMINI_SONNET] * 10)

    def test_stale_connection_is_replaced_unseen(self):
        self.upstream.default = Response(framing="length", cut=True)
        for _ in range(20):
            self.assertEqual(self.rrouter.post().status, 200)

    def test_large_bodies_pass_both_ways(self):
        """The rest of the handshake must not count as an early response.

        The second request reuses the connection, whose time limit has changed.
        """
        body, gate = chat("x", padding="x" * (16 << 20)), self.gate()
        self.upstream.break_connections()
        threading.Timer(0.3, gate.set).start()      # rrouter looks for a response six times
        for number, unread in enumerate((gate, None)):
            self.upstream.play(Response(200, [bytes(100_000)] * 30, framing="length",
                                        unread=unread))
            reply = self.rrouter.request("POST", "/v1/messages", body)
            self.assertEqual(reply.body, bytes(3_000_000))
            self.assertTrue(self.upstream.received[number].body == body)    # no diff of 16 MB

    def test_certificate_of_an_unknown_issuer_is_a_bad_gateway(self):
        distrustful = self.start_rrouter(self.upstream)
        reply = distrustful.request("GET", "/v1/models")
        self.assert_error(reply, 502, self.upstream.url)
        self.assertIn(": set SSL_CERT_FILE", distrustful.home.run("check", check=1).stdout)
        self.assertEqual(self.upstream.received, [])


# Requests: framing ############################################################

HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"


def post_with(lines, body=b"abc"):
    """Return a POST with these header lines and `body`, then a request that must not be parsed."""
    return POST + lines + b"\r\n\r\n" + body + HIDDEN


class RequestFramingTest(RouterTest):
    """The end of a request on a connection; RequestHeadTest has more heads that are refused."""

    REFUSED = (
        # status, request
        (400, b"GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n" + HIDDEN),
        (400, post_with(b"Content-Length: 3\r\nContent-Length: 3")),
        (501, post_with(b"Transfer-Encoding: gzip", b"0\r\n\r\n")),
        (417, post_with(b"Content-Length: 3\r\nExpect: foo")),
        (403, post_with(b"Content-Length: 3\r\nOrigin: https://evil.com")),
        (403, post_with(b"Content-Length: 3").replace(b"localhost", b"evil.com", 1)),
        (413, post_with(b"Content-Length: %d" % (BODY_MAX_BYTES + 1))),
        (413, post_with(CHUNKED, b"1\r\nx\r\n%x\r\n" % BODY_MAX_BYTES)),
        (400, post_with(CHUNKED, b"3\r\nabcd\r\n0\r\n\r\n")),
        (400, post_with(CHUNKED, b"0x3\r\nabc\r\n0\r\n\r\n")),
        (400, post_with(CHUNKED, b"3\r\nabc\r\n0\r\nX: " + b"x" * 9000 + b"\r\n\r\n")),
        (414, b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (431, post_with(b"X: " + b"a" * 70000)),
    )

    def test_refused_request_ends_its_connection_and_later_bytes_are_not_parsed(self):
        for status, data in self.REFUSED:
            with self.subTest(data[:80]):
                self.assert_refused(data, status)
        self.assertEqual(self.get("/after").status, 200)
        self.assertEqual([received.target for received in self.upstream.received], ["/after"])

    def test_head_of_the_largest_size_is_accepted_and_one_byte_more_is_refused(self):
        start = b"GET /x HTTP/1.1\r\nHost: localhost\r\nX: "
        value = b"y" * (rrouter.HEAD_MAX_BYTES - len(start) - 4)
        self.assertEqual(self.converse(start + value + b"\r\n\r\n", "GET")[0].status, 200)
        self.assertIn(value, self.upstream.received.pop().head)
        self.assert_refused(start + value + b"y\r\n\r\n", 431)

    def test_http10_response_is_not_chunked_and_ends_with_the_connection(self):
        data = b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n"
        for framing in ("chunked", "length", "close"):
            with self.subTest(framing):
                self.upstream.play(Response(200, (b"012", b"345"), framing=framing))
                head, _, body = self.rrouter.exchange(data).partition(b"\r\n\r\n")
                self.assertRegex(head, rb"^HTTP/1\.[01] 200 OK\r\n")
                self.assertNotIn(b"transfer-encoding", head.lower())
                self.assertEqual(body, b"012345")
        # Without chunks and a length only a reset shows that a body is incomplete.
        self.upstream.play(stream(event("message_start"), cut=True))
        with self.rrouter.connect() as connection, self.assertRaises(ConnectionError):
            connection.sendall(data)
            while connection.recv(65536):
                pass


# Requests: connections ########################################################

class EndOfReadingTest(unittest.TestCase):

    def test_request_that_arrived_before_the_drain_is_read(self):
        for cut_off in (False, True):
            ours, client = socket.socketpair()
            with self.subTest(cut_off=cut_off), ours, client:
                client.sendall(request_bytes("GET"))
                connection = rrouter.ClientConnection(ours)
                connection.stop_reading(cut_off)
                self.assertEqual(connection.read_head(WAIT_S).method, "GET")
                self.assertEqual(connection.has_left(), cut_off)


class RequestSequenceTest(RouterTest):
    """Several requests on one connection, and bodies that await 100 (Continue)."""

    EXPECTING = (b"POST /v1/messages HTTP/1.1\r\nHost: %b\r\nExpect: 100-Continue\r\n"
                 b"Content-Length: %d\r\n\r\n")

    def test_connection_closes_when_the_client_asks_for_it(self):
        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            connection.sendall(request_bytes(fields=[("Connection", "x, close")]) + HIDDEN)
            self.assertEqual(read_reply_from(reader).header("connection"), "close")
            self.assertEqual(reader.read(), b"")

    def test_continue_is_sent_once_and_only_for_a_body_that_will_be_accepted(self):
        body = chat()
        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            connection.sendall(self.EXPECTING % (b"localhost", len(body)))
            self.assertEqual(read_head(reader)[0], 100)
            connection.sendall(body)
            reply = read_reply_from(reader)
        self.assertEqual((reply.status, reply.interim), (200, []))
        self.assertEqual(self.upstream.models(), [GEMINI_SONNET])
        self.upstream.clear()
        self.assert_refused(self.EXPECTING % (b"localhost", BODY_MAX_BYTES + 1), 413)
        self.assert_refused(self.EXPECTING % (b"evil.com", 3), 403)

    def test_http10_client_gets_no_interim_response(self):
        body = chat()
        self.upstream.play(Response(
            raw=b"HTTP/1.1 103 Early Hints\r\n\r\n" + Response(framing="length").wire()))
        head = self.EXPECTING % (b"localhost", len(body))
        self.assertRegex(self.rrouter.exchange(head.replace(b"HTTP/1.1", b"HTTP/1.0") + body),
                         rb"^HTTP/1\.[01] 200 ")

    def test_remembered_head_matches_only_heads_that_differ_in_a_valid_length(self):
        """A connection remembers its last head, because parsing one takes longer."""
        start = POST + b"Content-Length: "
        for known, tails in ((True, (b"3", b"12", b"0", b"0003", b"300000")), (False, (
                b"3x", b"", b"+3", b"3\r\nContent-Length: 0", b"9" * 15, b"9" * 16, b"3 ",
                b"3\r\nX-More: 1", b"3\r\nTransfer-Encoding: chunked"))):
            for tail in tails:
                with self.subTest(tail):
                    first, data = start + b"3\r\n\r\n", start + tail + b"\r\n\r\n"
                    remembered = rrouter.RememberedHead()
                    remembered.remember(first, rrouter.parse_request_head(first))
                    found = remembered.match(data + b"abc")
                    self.assertEqual(found is not None, known)
                    if known:
                        self.assertEqual(found[0]._replace(fields=()), rrouter.parse_request_head(
                            data)._replace(fields=()))
                        self.assertEqual(found[1], len(data))
        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            for data, body in ((b"3\r\n\r\nabc", b"abc"), (b"12\r\n\r\nGET GET GET ", b"GET " * 3),
                               (b"3\r\nX: y\r\n\r\n\r\n\r", b"\r\n\r"), (b"0\r\n\r\n", b"")):
                for pieces in ([start + data], [b"%c" % byte for byte in start + data]):
                    for piece in pieces:
                        connection.sendall(piece)
                    self.assertEqual(read_reply_from(reader).status, 200)
                    self.assertEqual(self.upstream.received[-1].body, body)
            connection.sendall(b"\r\n" + start + b"3\r\n\r\nabc" + HIDDEN + HIDDEN)
            self.assertEqual([read_reply_from(reader).status for _ in range(3)], [200] * 3)
            self.assertEqual([r.body for r in self.upstream.received[-3:]], [b"abc", b"", b""])
            connection.sendall(start + b"3x\r\n\r\nabc")
            self.assert_own_error(read_reply_from(reader), 400)
            self.assertEqual(reader.read(), b"")


# Requests: forwarding #########################################################

class ForwardTest(RouterTest):

    def test_request_arrives_as_it_was_sent_and_nothing_is_added(self):
        """RequestHeadTest has the odd targets and the hop-by-hop headers."""
        fields = [field for field in CLAUDE_HEADERS if field[0] != "Connection"]
        reply = self.rrouter.request("POST", "/v1/messages?beta=true", b"{}", fields)
        self.assertEqual(reply.status, 200)
        self.assertEqual(self.upstream.received[0].head, request_bytes(
            "POST", "/v1/messages?beta=true", b"{}", fields, self.upstream.port).replace(
                b"localhost", b"127.0.0.1", 1)[:-2])

    def test_other_methods_and_paths_are_forwarded_or_refused(self):
        for method, target in (("GET", "/"), ("HEAD", "/"), ("PATCH", "/"), ("OPTIONS", "*")):
            with self.subTest(method + " " + target):
                reply, = self.converse(request_bytes(method, target), method)
                self.assertEqual(reply.status, 200)
                received = self.upstream.received.pop()
                self.assertEqual((received.method, received.target), (method, target))
                self.assertIsNone(received.header("content-length"))
        for method, target in (("CONNECT", "localhost:443"), ("TRACE", "/")):
            reply = self.assert_refused(request_bytes(
                method, target, None, [("Authorization", "canary")]), 405)
            self.assertNotIn(b"canary", reply.body)

    ROUTED = (
        # mode, response, body, x-rrouter-target, x-rrouter-model
        ("antigravity", Response(), chat(), "antigravity", GEMINI_SONNET),
        ("antigravity", stream(), chat("gpt-4"), "antigravity", "gpt-4"),
        ("claude", error(503), chat(), "claude", SONNET), ("claude", stream(), b"[]", None, None),
    )

    def test_replies_to_requests_with_a_model_name_target_and_model(self):
        for mode, response, body, *expected in self.ROUTED:
            with self.subTest(body, mode=mode):
                self.rrouter.home.write("mode", mode)
                self.upstream.play(response)
                reply = self.rrouter.request("POST", "/v1/messages", body)
                self.assertEqual(reply.status, response.status)
                self.assertEqual([reply.header("x-rrouter-" + name) for name in (
                    "target", "model", "attempts")], [*expected, expected[0] and "1"])

    def test_odd_characters_of_a_model_are_escaped_in_the_reply(self):
        self.rrouter.home.write("mode", "claude")
        name = 'claude-sonnet\r\nX-Injected: 1\r\n\r\n\u001b[31m \ud55c\ud83d "\\'
        reply = self.rrouter.post(name)
        self.assertEqual((reply.status, reply.header("x-injected"), reply.body), (200, None, b"{}"))
        self.assertRegex(reply.header("x-rrouter-model"), r"\A[ -~]+\Z")
        self.assertEqual(self.upstream.received[-1].model, name)


# Requests: the model in the body ##############################################

class SpliceTest(RouterTest):
    """Only the bytes of the model's value change; ModelSpanTest has more bodies."""

    config = {**DEFAULT_CONFIG, "modes": {
        **DEFAULT_CONFIG["modes"], "odd": {"mappings": [{"match": "*", "rewrite": "n\u00e9\""}]}}}

    def forwarded(self, body):
        """POST the body; return what the upstream received, its length checked."""
        self.assertEqual(self.rrouter.request("POST", "/v1/messages", body).status, 200)
        received = self.upstream.received.pop()
        self.assertEqual(received.header("content-length"), str(len(received.body)))
        return received.body

    def test_the_mode_decides_which_model_is_forwarded(self):
        for mode, name in (("antigravity", GEMINI_SONNET), ("claude", None), ("odd", "n\u00e9\"")):
            self.rrouter.home.write("mode", mode + "\n")
            for body in (*(text.encode() for text in SPLICED), b"[1, 2 ]", b'{"model":5}'):
                with self.subTest(body[:60], mode=mode):
                    spelled = SPELLED[1] if name is None else json.dumps(name).encode()
                    self.assertEqual(self.forwarded(body.replace(b"%s", SPELLED[1])),
                                     body.replace(b"%s", spelled))

    def test_large_body_is_changed_in_one_place(self):
        message = b'{"content":"line\\n \\"model\\": \xed\x95\x9c"}'
        filler = b'"messages":[' + b",".join([message] * 200_000) + b"]"
        for parts in ((b'{"model":"', b'",' + filler + b"}"),
                      (b"{" + filler + b',"model":"', b'"}')):
            with self.subTest(parts[0][:20]):
                body = self.forwarded(b"claude-sonnet-5".join(parts))
                self.assertTrue(body == GEMINI_SONNET.encode().join(parts))     # no diff of 8 MB

    def test_hostile_body_is_forwarded(self):
        model = b'"model":"claude-sonnet-5"}'
        for body in (
                b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"," + model,
                b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b'{"a":' + b"[" * 100_000,
                b'{"a":' + b"9" * 1_000_000 + b"," + model, b'{"a":"' + b"x" * 5_000_000,
                b'{"a":"' + b"\\" * 1_000_001, b'{"a":1' + b" " * 1_000_000 + b"," + model,
                b"{" + b"".join(b'"%d":0,' % number for number in range(100_000)) + model):
            with self.subTest(body[:20]):
                self.assertIn(self.forwarded(body), (
                    body, body.replace(b"claude-sonnet-5", GEMINI_SONNET.encode())))


# Requests: browsers and strangers #############################################

# `http.server` looks its host up in the name service, which can take 35 s.
DEAD_NAME_SERVICE = """
import socket, threading
def ask(*_):
    threading.Event().wait()
def getaddrinfo(host, *others, **options):
    return real(host, *others, **options) if host in ("127.0.0.1", "::1", "localhost") else ask()
real, socket.getaddrinfo = socket.getaddrinfo, getaddrinfo
socket.getfqdn = socket.gethostbyaddr = socket.gethostbyname = socket.getnameinfo = ask
"""


class GuardTest(RouterTest):
    """Other machines and web pages are refused.  The name service of the process is dead."""

    altered = DEAD_NAME_SERVICE

    CASES = (
        # status, header lines; RequestHeadTest has more
        *((200, b"Host: " + host) for host in (b"localhost", b"127.0.0.1:8316", b"[::1]:1")),
        (403, b"Host: evil.com"), (403, b"Host: [::]"), (400, b"Host: localhost@evil.com"),
        (200, b"Host: localhost\r\nOrigin: http://localhost:3000"),
        (403, b"Host: localhost\r\nOrigin: https://evil.com"),
        (403, b"Host: localhost\r\nSec-Fetch-Site: cross-site"),
    )

    def test_only_loopback_hosts_and_origins_are_served(self):
        self.upstream.default = Response(fields=(("Access-Control-Allow-Origin", "*"),))
        for start in (b"POST /v1/messages", b"OPTIONS /v1/messages", b"GET /health"):
            for status, lines in self.CASES:
                with self.subTest(start + lines):
                    self.upstream.clear()
                    head = start + b" HTTP/1.1\r\n" + lines + b"\r\n\r\n"
                    reply = (self.converse(head, "GET")[0] if status == 200 else
                             self.assert_refused(head, status))
                    self.assertEqual(reply.status, status)
                    self.assertIsNone(reply.header("access-control-allow-origin"))

    def test_both_loopback_addresses_respond_and_no_others_listen(self):
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                with self.rrouter.connect(family) as connection:
                    connection.sendall(request_bytes("GET", "/"))
                    self.assertEqual(read_reply(connection).status, 200)
            except OSError as problem:                  # a machine without IPv6
                self.assertIn(problem.errno, (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL))
        for table in ("/proc/net/tcp", "/proc/net/tcp6") if PROC else ():
            for line in pathlib.Path(table).read_text().splitlines()[1:]:
                address, port, state = re.match(r".*?: (\w+):(\w+) \S+ (\w+)", line).groups()
                if state == "0A" and port == "%04X" % self.rrouter.port:
                    self.assertIn(address, ("0100007F", "00000000000000000000000001000000"))

    def test_refused_head_request_gets_no_body(self):
        for status, lines in ((b"403", b"Host: evil.com"),
                              (b"417", b"Host: localhost\r\nExpect: foo")):
            data = self.rrouter.exchange(b"HEAD / HTTP/1.1\r\n" + lines + b"\r\n\r\n")
            self.assertRegex(data, rb"(?s)\AHTTP/1\.1 " + status + rb" .*\r\n\r\n\Z")


# Responses ####################################################################

CHUNKED_RESPONSE = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n"
BAD_RESPONSES = (
    # raw response, in pieces; ResponseHeadTest has more heads
    (b"HTTP/1.1 200",), (b"HTTP/1.1 200 OK\r\nContent-Type: text/ev",), (b"ICY 200 OK\r\n\r\n",),
    (b"HTTP/1.1 103 Hints\r\n\r\n",), (b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nhello",),
    (b"HTTP/1.1 101 Switching Protocols\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",),
    (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 1_000_000 + b"\r\nContent-Length: 5\r\n\r\nhello",),
    (CHUNKED_RESPONSE + b"5x\r\nhello",),
    (b"HTTP/1.1 200 OK\nContent-Length: 2\n\n{}",), (b"HTTP/1.1 200 OK\r\nX: y", b"\n", b"\n{}"),
)
BROKEN_RESPONSES = (
    # response, the part of its body that the client gets
    (Response(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n" + b"x" * 60), b"x" * 60),
    (stream(event("ping"), event("ping"), cut=True), event("ping") * 2),
    *((Response(raw=CHUNKED_RESPONSE + b"5\r\nhello\r\n" + rest), b"hello" + more)
      for rest, more in ((b"9\r\nworld", b"world"), (b"1", b""), (b"0\r\n", b""),
                         (b"+5\r\nworld\r\n0\r\n\r\n", b""), (b"5\r\nworld0\r\n\r\n", b"world"))),
)


class ResponseTest(RouterTest):

    def reply_and_next(self, response, method="POST"):
        """Send two requests on one connection; return the first reply, check the second."""
        self.upstream.play(response, Response(200, b"next"))
        first, second = self.converse(
            request_bytes(method, "/", chat()) + request_bytes("POST", "/", chat()), method, "POST")
        self.assertEqual((second.status, second.body), (200, b"next"))
        return first

    WITHOUT_BODY = (
        # method, response, Content-Length of the reply
        ("HEAD", Response(200, b"12345", framing="length"), "5"), ("HEAD", Response(), None),
        ("HEAD", Response(framing="close"), None), ("GET", Response(200, ()), None),
        ("GET", Response(204, (), framing="none"), None),
        ("GET", Response(200, (), framing="length"), "0"),
        ("GET", Response(raw=b"HTTP/1.1 204 \r\nContent-Length: 5\r\n\r\n", stays=True), None),
        ("GET", Response(raw=b"HTTP/1.1 304 \r\nContent-Length: 5\r\n\r\n", stays=True), "5"),
        ("GET", Response(raw=CHUNKED_RESPONSE.replace(b"200", b"304"), stays=True), None),
    )

    def test_response_without_a_body_does_not_shift_the_next_one(self):
        for method, response, length in self.WITHOUT_BODY:
            with self.subTest(method, response=response.wire()):
                reply = self.reply_and_next(response, method)
                self.assertEqual((reply.body, reply.header("content-length")), (b"", length))

    def test_interim_responses_do_not_shift_the_final_one(self):
        hints = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\nLink: </y>\r\n\r\n"
        for interim, statuses in (
                (b"HTTP/1.1 100 Continue\r\n\r\n", []), (hints, [103]),
                (hints * 3 + b"HTTP/1.1 102 \r\nContent-Length: 9\r\n\r\n", [103] * 3 + [102])):
            with self.subTest(interim):
                reply = self.reply_and_next(Response(
                    raw=interim + Response(200, b"final", framing="length").wire(), stays=True))
                self.assertEqual((reply.status, reply.body), (200, b"final"))
                self.assertEqual([head[0] for head in reply.interim], statuses)

    def test_malformed_response_is_a_bad_gateway_at_once(self):
        for raw in BAD_RESPONSES:
            with self.subTest(raw[0][:80]):
                self.upstream.clear()
                stays = b"\n\n" in b"".join(raw)
                self.upstream.default = Response(raw=raw, pause_s=0.1, stays=stays)
                reply = self.rrouter.post()
                self.assert_own_error(reply, 502)
                self.assert_error(reply, 502, self.upstream.url)
                self.assertEqual(len(self.upstream.received), 1)

    def test_connection_dropped_before_the_head_is_a_bad_gateway(self):
        self.upstream.play(Response(close=True))
        self.rrouter.post()                         # no connection is left in the pool
        self.upstream.default = Response(hangup=True)
        reply = self.rrouter.post()
        self.assert_error(reply, 502, self.upstream.url)
        self.assertEqual([reply.header("x-rrouter-" + name)
                          for name in ("target", "model", "attempts")],
                         ["antigravity", GEMINI_SONNET, "1"])
        self.assertEqual(len(self.upstream.received), 2)

    def test_truncated_response_never_looks_complete(self):
        for response, body in BROKEN_RESPONSES:
            with self.subTest(response.wire()[:200]):
                self.upstream.clear()
                self.upstream.play(response)
                with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
                    connection.sendall(request_bytes("POST", "/v1/messages", chat()))
                    reply = read_reply_from(reader)
                    self.assertEqual((reply.status, reply.body, reply.complete), (200, body, False))
                    with contextlib.suppress(ConnectionError):
                        self.assertEqual(reader.read(), b"")
                self.assertEqual(len(self.upstream.received), 1)
                self.assertEqual(self.rrouter.post().body, b"{}")


# Streams ######################################################################

EVENTS = (event("message_start", message={"id": "msg_1"}), b": a comment\n\n", event("ping"),
          b"\r\ndata: \xed\x95\x9c\r\n\r\n:\n\n", b"event: content_block_delta\ndata: {\"a\":",
          b"1}\n\n", event("error", error={"type": "overloaded_error"}), event("message_stop"))


class StreamTest(RouterTest):
    framings = ("chunked", "close")

    def test_head_and_each_event_arrive_before_the_next_is_sent(self):
        for mode, framing in itertools.product(("antigravity", "claude"), self.framings):
            with self.subTest(mode + " " + framing):
                self.rrouter.home.write("mode", mode)
                gates = [self.gate() for _ in EVENTS]
                self.upstream.play(stream(*EVENTS, framing=framing, gate=gates))
                with self.opened() as response:
                    self.assertEqual((response.status, response.headers["content-type"]),
                                     (200, "text/event-stream; charset=utf-8"))
                    for gate, data in zip(gates, EVENTS):
                        gate.set()
                        self.assertEqual(receive(response, len(data)), data)
                    self.assertEqual(response.read(), b"")

    def test_small_events_are_sent_at_once(self):
        """Without TCP_NODELAY an event after the head waits 40 ms for an acknowledgement."""
        connection = http.client.HTTPConnection("127.0.0.1", self.rrouter.port, timeout=WAIT_S)
        durations = []
        with contextlib.closing(connection):
            for _ in range(15):
                gate = self.gate()
                self.upstream.play(stream(EVENTS[0], gate=[gate]))
                connection.request("POST", "/v1/messages", chat())
                with connection.getresponse() as response:
                    start = time.monotonic()
                    gate.set()
                    self.assertEqual(receive(response, len(EVENTS[0])), EVENTS[0])
                    durations.append(time.monotonic() - start)
                    response.read()
        self.assertLess(statistics.median(durations), 0.03)

    def test_break_in_the_middle_reaches_the_client_at_once(self):
        gate = self.gate()
        self.upstream.play(stream(EVENTS[0], EVENTS[1], gate=gate, cut=True))
        with self.opened() as response:
            self.assertEqual(receive(response, len(EVENTS[0])), EVENTS[0])
            gate.set()
            with self.assertRaises((http.client.IncompleteRead, ConnectionError)):
                response.read()

    def test_client_that_leaves_ends_the_upstream_request(self):
        gate = self.gate()
        self.upstream.default = lambda received: (
            stream(*EVENTS, gate=gate) if received.target == "/events" else
            Response(400, [b"x"] * 1000, pause_s=0.02) if received.target == "/drip" else
            Response(before=gate))
        more = [b""]
        if hasattr(select, "POLLRDHUP"):        # without it, unread bytes hide that a client left
            more += [b"\r\n", request_bytes(body=chat())]
        cases = [*itertools.product(("/silent", "/events", "/drip"), more,
                                    (socket.socket.close, reset))]
        clients = []
        for target, _, _ in cases:
            clients.append(self.rrouter.connect())
            self.addCleanup(clients[-1].close)
            clients[-1].sendall(request_bytes("POST", target, chat()))
            if target == "/events":
                self.assertTrue(clients[-1].recv(1))
        self.upstream.wait(lambda upstream: len(upstream.received) == len(cases))
        for client, (_, data, leave) in zip(clients, cases):
            client.sendall(data)
            leave(client)
        start = time.monotonic()
        self.upstream.wait(lambda upstream: upstream.closed == len(cases))
        self.assertLess(time.monotonic() - start, 2)    # one second, and one for a busy machine
        wait_until(lambda: self.rrouter.health()["activeRequests"] == 0)
        self.assertEqual(len(self.upstream.received), len(cases))

    def test_bytes_after_the_last_request_do_not_truncate_its_response(self):
        body = bytes(3_000_000)
        self.upstream.default = Response(200, body, framing="length")
        for _ in range(5):
            self.upstream.clear()
            with self.rrouter.connect() as client:
                client.sendall(request_bytes(body=chat(), fields=[("Connection", "close")]))
                self.upstream.wait(lambda upstream: upstream.received)
                client.sendall(b"\r\n")
                self.assertEqual(len(read_reply(client).body), len(body))


class TlsStreamTest(TlsTest, StreamTest):
    framings = ("chunked",)


# Auto mode ####################################################################
# The upstream distinguishes the targets as CLIProxyAPI does, by the name of the model: gemini-*
# is antigravity, claude-* is claude.  "recorded" marks responses of CLIProxyAPI 7.2.140.

OPUS, HAIKU = "claude-opus-5-5", "claude-haiku-4-5"
COUNT_TOKENS, CHAT = "/v1/messages/count_tokens?beta=true", "/v1/chat/completions"

PING, COMMENT = event("ping"), b": keep-alive\n\n"
START = event("message_start", message={
    "id": "r", "type": "message", "role": "assistant", "content": [], "model": "claude-sonnet-4-6",
    "stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 3, "output_tokens": 0}})
STOP = event("message_stop")
OVERLOADED = event("error", error={"type": "overloaded_error", "message": "Overloaded"})
DATA_ERROR = b'data: {"error":{"message":"boom"},"type":"error"}\n\n'


def text_of(words):
    return event("content_block_delta", index=0, delta={"type": "text_delta", "text": words})


def end_of(tokens, reason="end_turn"):
    """Return the event that ends a message after this many tokens."""
    return event("message_delta", delta={"stop_reason": reason, "stop_sequence": None},
                 usage={"input_tokens": 0, "output_tokens": tokens})


NO_TEXT = event("content_block_start", index=0, content_block={"type": "text", "text": ""})
NO_MORE_TEXT, DELTA = event("content_block_stop", index=0), text_of("part one.")
TOOL = event("content_block_start", index=0, content_block={"type": "tool_use", "input": {}})


def sse(*chunks, fields=(), **options):
    return Response(200, chunks, fields=(("Content-Type", "text/event-stream"), *fields), **options)


def whole(target, **options):
    """Return an event stream with a message that names its target."""
    return sse(START, NO_TEXT, text_of("by " + target), NO_MORE_TEXT, end_of(7), STOP, **options)


def plain(content, encoding=None, encode=bytes):
    """Return a 200 that is not streamed; `content` is bytes, or a dictionary for JSON."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    fields = [("Content-Type", "application/json"), ("Content-Encoding", encoding)]
    return Response(200, encode(body), fields=fields[:1 + bool(encoding)], framing="length")


def message(*texts, tokens=7, **members):
    """Return a message that is not streamed, as a dictionary."""
    return {"id": "r", "type": "message", "role": "assistant", "model": "",
            "content": [{"type": "text", "text": text} for text in texts],
            "stop_reason": "end_turn", "stop_sequence": None,
            "usage": {"input_tokens": 0, "output_tokens": tokens}, **members}


SHELF_503 = error(503, "auth_unavailable: no auth available (providers=antigravity, model=%s)"
                  % GEMINI_SONNET)
COOLING_429 = error(429, "All credentials for model %s are cooling down" % GEMINI_SONNET)
UNKNOWN_400 = error(400, "unknown provider for model gemini-nope")
EMPTY_STREAM = sse(START + b"\n", b"\n".join((NO_TEXT, NO_MORE_TEXT, end_of(0), STOP, b"\n")))
EMPTY_MESSAGE = plain(message(tokens=0))                    # recorded, as the stream
TOO_LARGE_400 = error(400, "prompt is too long: 210000 tokens > 200000 maximum")
REJECTION = error(400, "messages.1.content.0: Invalid `signature` in `thinking` block")
OF_A_ROUTER = error(503, fields=(("x-rrouter-error", "1"),))
HANG_UP = Response(hangup=True)
HISTORY = [{"role": "assistant", "content": [
    {"type": "thinking", "thinking": "", "signature": "x"}, {"type": "text", "text": "x"}]}]


def slowly(data, *before):
    """Return an event stream that sends `data` every 20 ms."""
    return sse(*before, *(data,) * 999, pause_s=0.02)


def target_of(received):
    """Return the target of a request by the model that its body begins with, or None."""
    found = re.match(rb'\s*\{\s*"model"\s*:\s*"(gemini|claude)-', received.body)
    return found and {b"gemini": "antigravity", b"claude": "claude"}[found.group(1)]


def auto_config(**auto):
    """Return the default configuration with these values in its `auto` section."""
    return {**copy.deepcopy(DEFAULT_CONFIG), "auto": {"targets": ["antigravity", "claude"], **auto}}


def receive_until(connection, marker):
    """Receive until `marker` has come; return all bytes so far."""
    data = b""
    while marker not in data:
        received = connection.recv(65536)
        if not received:
            raise AssertionError("the end came before %r: %r" % (marker, data[-1000:]))
        data += received
    return data


# Shifts both clocks of a process by the numbers in a file, which the test has mapped, too.
SHIFTED_CLOCKS = """
import mmap, time
with open(%r, "r+b") as file:
    shifts = memoryview(mmap.mmap(file.fileno(), 16)).cast("d")
time.time = lambda real=time.time: real() + shifts[0]
time.monotonic = lambda real=time.monotonic: real() + shifts[1]
"""


class AutoTest(RouterTest):
    """Base of the tests of auto mode: `script` sets the responses of the targets, `ask` posts.

    Calls are written as initials: "ac" is one call to antigravity, then one to claude.  `later`
    advances rrouter's clocks.
    """

    mode = "auto"

    @classmethod
    def setUpClass(cls):
        descriptor, path = tempfile.mkstemp()
        cls.addClassCleanup(os.unlink, path)
        os.write(descriptor, bytes(16))
        cls.shifts = memoryview(mmap.mmap(descriptor, 16)).cast("d")
        os.close(descriptor)
        cls.altered = SHIFTED_CLOCKS % path
        super().setUpClass()

    def setUp(self):
        super().setUp()
        self.script()
        self.upstream.default = self.answer

    def later(self, seconds):
        self.shifts[0] += seconds
        self.shifts[1] += seconds

    def set_mode(self, mode):
        """Write the mode file by rename, as `rrouter MODE` does; writing auto clears all state."""
        self.rrouter.home.write("mode.new", mode + "\n")
        os.replace(str(self.rrouter.home.dir / "mode.new"), str(self.rrouter.home.dir / "mode"))

    def configure(self, config):
        """Write config.json for the rest of this test."""
        self.addCleanup(self.rrouter.home.write, "config.json",
                        json.dumps(self.config or DEFAULT_CONFIG))
        self.rrouter.home.write("config.json", json.dumps(config))

    def script(self, antigravity=None, claude=None, other=None):
        """Set a response for each target, a function of the request, or a list to play once.

        The default is a message.  `other` is for requests without a model of either target.
        """
        self.scripts = {target: list(script) if isinstance(script, list) else script
                        for target, script in (
                            ("antigravity", antigravity), ("claude", claude), (None, other))}

    def script_anew(self, *responses, **targets):
        """Do the same after clearing all state and all received requests."""
        self.set_mode("auto")
        self.upstream.clear()
        self.script(*responses, **targets)

    def answer(self, received):
        target = target_of(received)
        script = self.scripts[target]
        if isinstance(script, list):
            script = script.pop(0) if script else None
        if script is None:
            streamed = re.search(rb'"stream":\s*true', received.body)
            return (Response() if target is None else whole(target) if streamed
                    else plain(message("by " + target)))
        return script(received) if callable(script) else script

    def silent(self):
        """Return a response that does not begin while the test runs."""
        return stream(before=self.gate())

    def calls(self, since=0):
        return "".join((target_of(received) or "-")[0]
                       for received in list(self.upstream.received)[since:])

    def ask(self, model=SONNET, **members):
        """Post a message; return (reply, the calls made for it)."""
        before = len(self.upstream.received)
        reply = self.rrouter.post(model, **members)
        return reply, self.calls(before)

    def ask_for(self, calls, model=SONNET, **members):
        """Post a message for each word of `calls`, which lists the calls made for it.

        A number lets that many seconds pass.  Return the last reply.
        """
        for expected in calls.split():
            if expected.isdigit():
                self.later(int(expected))
            else:
                reply, made = self.ask(model, **members)
                self.assertEqual(made, expected)
        return reply

    def begin(self, *arguments, until=b"", **members):
        """Send a message; return the connection when the upstream has it and `until` has come."""
        before = len(self.upstream.received)
        connection = self.send(*arguments, **members)
        self.upstream.wait(lambda upstream: len(upstream.received) > before)
        receive_until(connection, until)
        return connection

    def send(self, model=SONNET, target="/v1/messages?beta=true", **members):
        connection = self.rrouter.connect()
        self.addCleanup(connection.close)
        body = chat(model, **{"messages": [], **members})
        connection.sendall(request_bytes("POST", target, body, CLAUDE_HEADERS, self.rrouter.port))
        return connection

    def leave(self, *connections):
        """Close connections and wait until rrouter has ended all requests."""
        for connection in connections:
            connection.close()
        wait_until(lambda: not self.rrouter.health()["activeRequests"])

    def trip(self):
        """Let antigravity fail from now on, and switch to claude."""
        self.script(error(429))
        self.ask_for("ac ac ac")

    def assert_served(self, reply, by, attempts):
        """The reply is the whole message of this target, and its headers say so."""
        self.assertEqual((reply.status, reply.complete), (200, True), reply)
        self.assertIn(reply.body, [b"".join(response.chunks) for response in
                                   (whole(by), plain(message("by " + by)))])
        self.assertEqual((reply.header("x-rrouter-target"), reply.header("x-rrouter-attempts")),
                         (by, str(attempts)))

    def assert_forwarded(self, reply, response, target, attempts=1):
        """The reply is this response of the target, byte for byte."""
        self.assertEqual((reply.status, reply.body, reply.complete), (
            response.status, b"".join(response.chunks), not response.cut))
        self.assertEqual((reply.header("x-rrouter-target"), reply.header("x-rrouter-attempts")),
                         (target, str(attempts)))
        self.assertEqual(reply.fields[:len(response.fields)], response.fields)

    def assert_state(self, current="antigravity", **values):
        """/health names this target and has these values in autoSwitch; other counts are 0."""
        health = self.rrouter.health()
        values = {"currentTarget": current, "failureCount": 0, "timeoutCount": 0, "switchCount": 0,
                  "models": {}, **values}
        self.assertEqual({name: health["autoSwitch"][name] for name in values}, values)
        self.assertEqual(health["currentTarget"], current)

    def assert_silent(self, connection, seconds=0.05):
        self.assertEqual(select.select([connection], [], [], seconds)[0], [])


# A row: the responses of the targets; the calls made for each request, as `ask_for` reads them;
# what the last request gets (the whole message of a target, a scripted response, or the 502 of
# rrouter); a part of its log lines; the arguments of `assert_state`.
Script = collections.namedtuple("Script", "what antigravity claude calls gets log state")


def rescued(what, response, failed, *, failures=1):
    return Script(what, response, None, "ac", "claude", "(antigravity failed: %s" % failed,
                  {"failureCount": failures})


def kept(what, response, log="200", *, failures=0):
    return Script(what, response, None, "a", response, log, {"failureCount": failures})


def both_fail(what, response, other, best, log=""):
    return Script(what, response, other, "ac", best, log, {})


def switches(what, failures, **state):
    return Script(what, failures, None, "ac ac ac", "claude", "SWITCH antigravity -> claude: 3 ",
                  {"current": "claude", "switchCount": 1, **state})


GOOD_BYTES, GOOD_EVENTS = whole("antigravity").wire(), b"".join(whole("antigravity").chunks)
BROKEN, TALK = sse(START, DELTA), START + NO_TEXT + DELTA
LATE = "(error event in the stream)"
RATE_LIMIT = error(429, "antigravity", fields=(("Retry-After", "9"), ("x-should-retry", "false")))
CUT_OFF = sse(PING, b": by antigravity\n\n", OVERLOADED)
ENCODINGS = (None, bytes), ("gzip", gzip.compress), ("deflate", zlib.compress)

SCRIPTS = (
    # The other target rescues a failed attempt.
    *(rescued("status", error(status), status) for status in (
        400, 401, 402, 403, 404, 408, 422, 429, 499, 500, 502, 503, 504, 529, 599)),
    rescued("recorded: blocked prompt", EMPTY_STREAM, "empty message"),
    rescued("recorded: error first", sse(OVERLOADED + b"\n"), "error event"),
    rescued("recorded: dropped after start", sse(START + b"\n", DATA_ERROR), "error event"),
    rescued("[DONE] alone", sse(b"data: [DONE]\n\n"), "empty message"),
    rescued("clean end after start", sse(START), "stream without content"),
    rescued("only pings and comments", sse(PING, COMMENT), "empty stream"),
    rescued("an empty Content-Encoding",
            sse(OVERLOADED, fields=(("Content-Encoding", ""),)), "error event"),
    *(rescued("empty message", plain(message(tokens=0), *way), "empty message")
      for way in ENCODINGS),
    *(rescued("HTML", plain(b"<html>login</html>", *way), "not a message") for way in ENCODINGS),
    rescued("cut JSON", plain(plain(message("x")).chunks[0][:-9]), "not a message"),
    rescued("nothing", plain(b""), "empty response"),
    rescued("error in a 200", plain({"error": {"message": "boom"}}), "error in a 2xx"),

    # A dropped connection, and a request too large for one target, are rescued and neutral.
    *(rescued("dropped", response, "connection dropped", failures=0) for response in (
        HANG_UP, Response(hangup=True, reset=True), Response(raw=b"SSH-2.0-OpenSSH_9.6\r\n\r\n"),
        Response(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{} "),
        Response(raw=sse().head() + b"zz\r\n"), Response(200, b'{"type":"message"', cut=True),
        sse(START, PING, NO_TEXT, cut=True),
        *(Response(raw=GOOD_BYTES[:end]) for end in range(1, GOOD_BYTES.index(b"by "), 40)))),
    *(rescued(words, error(status, words), "%d too large" % status, failures=0)
      for status, words in (
          (413, "whatever"), (400, "Your input exceeds the context window of this model"),
          (400, "The input token count (9) exceeds the maximum number of tokens allowed (8)."),
          (400, "Input is too long for requested model."), (400, "context length exceeded"),
          (422, "capability_rejected: prompt_too_long"), (400, "Request too large"))),

    # A response that is good, or that cannot be judged, is forwarded.
    *(kept("good message", plain(message("x"), *way)) for way in ENCODINGS),
    *(kept("more than a mebibyte", plain(b"x" * (1024 * 1024 + 1), *way)) for way in ENCODINGS),
    kept("text, but no tokens", plain(message("x", tokens=0))),
    kept("an encoding that is not read", plain(b"\x0b\x02\x80", "br")),
    kept("a compressed stream", sse(gzip.compress(OVERLOADED), fields=(
        ("Content-Encoding", "gzip"),))),
    kept("recorded: truncation that looks complete",
         sse(TALK, NO_MORE_TEXT + end_of(0) + STOP)),
    Script("error of another rrouter", OF_A_ROUTER, None, "a a a a", OF_A_ROUTER, " 503 ", {}),

    # After the first content a failure is forwarded, and counts; a broken response is neutral.
    kept("recorded: overloaded", sse(TALK, PING, OVERLOADED), LATE, failures=1),
    kept("recorded: error after the end", sse(TALK, STOP, DATA_ERROR), LATE, failures=1),
    kept("recorded: without its end", sse(TALK, PING), "(stream without its end)", failures=1),
    kept("in the chunk of the content", sse(TALK + OVERLOADED), LATE, failures=1),
    kept("a broken message", Response(200, b"x" * (1024 * 1024 + 1), cut=True), "(the upstream"),
    *(kept("a broken stream", sse(GOOD_EVENTS[:end], cut=True), "(the upstream")
      for end in range(GOOD_EVENTS.index(NO_MORE_TEXT), len(GOOD_EVENTS) - len(STOP), 40)),
    Script("a target is left only after it has answered once", [BROKEN] * 3,
           [BROKEN] * 4 + [None] + [BROKEN] * 3, "a a a c c c c c c c c a", "antigravity",
           "-> antigravity: 3 consecutive HTTP errors, last stream", {"switchCount": 2}),

    # If both fail, the client gets the more useful response byte for byte, and nothing counts.
    both_fail("the first wins a tie", RATE_LIMIT, error(429, "claude"), RATE_LIMIT),
    both_fail("the second is better", error(500), RATE_LIMIT, RATE_LIMIT, "(antigravity failed: "),
    both_fail("the first is better", RATE_LIMIT, EMPTY_STREAM, RATE_LIMIT, "(claude failed: empty"),
    both_fail("both are empty", CUT_OFF, EMPTY_MESSAGE, CUT_OFF),
    both_fail("shelf and stream", EMPTY_STREAM, COOLING_429, COOLING_429),
    both_fail("an error beats a drop", HANG_UP, UNKNOWN_400, UNKNOWN_400),
    both_fail("both drop", HANG_UP, HANG_UP, 502, "connection dropped"),
    both_fail("too large, or busy", TOO_LARGE_400, RATE_LIMIT, RATE_LIMIT, "failed: 400 too large"),
    both_fail("unknown, or too large", error(404), TOO_LARGE_400, TOO_LARGE_400),
    *(Script("outage", response, response, "ac " * 4, response, "", {})
      for response in (error(500), SHELF_503)),

    # A healed response is judged like any other, but the client gets the original 400.
    Script("healed", [REJECTION], None, "aa a", "antigravity", "sent again without", {}),
    *(Script("healed in vain", [REJECTION, response], None, "aac", "claude", "failed: ",
             {"failureCount": 1}) for response in (error(500), EMPTY_STREAM, REJECTION)),
    *(Script("healed in vain, then 429", [REJECTION, *rest], error(429), calls, REJECTION, "", {})
      for rest, calls in (([error(500)], "aac"), ([HANG_UP] * 2, "aaac"))),
    both_fail("healed on both in vain", REJECTION, REJECTION, REJECTION)._replace(calls="aacc"),
    Script("rescued and healed there", error(529), [REJECTION], "acc", "claude", "sent again",
           {"failureCount": 1}),

    # Three failures switch; the last one can shorten the cooldown.
    switches("429", error(429), cooldownSeconds=1800, switched=True, active=True, failureCount=0,
             reason="3 consecutive HTTP errors, last 429"),
    switches("not the last", [RATE_LIMIT, RATE_LIMIT, error(500)], cooldownSeconds=1800),
    *(switches(value, error(429, fields=((name, value),)), cooldownSeconds=seconds)
      for name, value, seconds in (
          ("Retry-After", "90.5", 90.5), ("retry-after-ms", "90500", 90.5),
          ("Retry-After", "90\r\nRetry-After: 91", 90),
          ("Retry-After", "Fri, 27 Nov 2020 01:16:59 GMT", 60))),
    switches("recorded: quota", error(429, "Your quota will reset after 20m3s."),
             cooldownSeconds=1203),
    switches("shelf", [error(401), SHELF_503, SHELF_503], cooldownSeconds=60,
             reason="3 consecutive HTTP errors, last 503 auth_unavailable, after 401"),
    switches("unknown model", [UNKNOWN_400] * 3, cooldownSeconds=60,
             reason="3 consecutive HTTP errors, last 400 unknown provider for model "
                    + GEMINI_SONNET),
    switches("real at last", [SHELF_503, SHELF_503, error(500)], cooldownSeconds=1800),

    # After the cooldown one request probes; a neutral one is followed by the next after a minute.
    *(Script("neutral probe", [error(429)] * 3 + [response], [None] * 3 + [other],
             "ac ac ac 1801 %s c 61 a" % calls, "antigravity", "inconclusive; the next one in 1m",
             {"switchCount": 1})
      for response, other, calls in (
          (HANG_UP, None, "ac"), (TOO_LARGE_400, None, "ac"), (error(500), error(500), "ac"),
          (OF_A_ROUTER, None, "a"))),
    Script("healed probe", [error(429)] * 3 + [REJECTION], None, "ac ac ac 1801 aa", "antigravity",
           "RECOVERED: antigravity responds again", {"switchCount": 1}),
    Script("a probe succeeds when it commits", [error(429)] * 3 + [BROKEN], None,
           "ac ac ac 1801 a", BROKEN, "RECOVERED: ", {"switchCount": 1, "failureCount": 1}),
    Script("a probe that fails", error(429), None, "ac ac ac 1801 ac 1801 c", "claude",
           "SWITCH antigravity -> claude: failed a probe, last 429; retry in 60m",
           {"current": "claude", "switchCount": 2, "cooldownSeconds": 3600}),
)


class ScriptTest(AutoTest):
    def test_scripts_have_the_results_of_the_table(self):
        numbers = []
        for row in SCRIPTS:
            with self.subTest(row.what, calls=row.calls, log=row.log):
                self.script_anew(row.antigravity, row.claude)
                self.upstream.break_connections()       # a request on a stale one is sent again
                reply = self.ask_for(row.calls, messages=HISTORY)
                attempts = len(set(row.calls.split()[-1]))      # without those of healing
                if row.gets == 502:
                    self.assert_error(reply, 502, self.upstream.url)
                elif isinstance(row.gets, str):
                    self.assert_served(reply, row.gets, attempts)
                else:
                    is_second = row.gets is row.claude is not row.antigravity
                    self.assert_forwarded(reply, row.gets,
                                          "claude" if is_second else "antigravity", attempts)
                self.assert_state(**row.state)
                numbers.append((row, self.rrouter.health()["requestCount"]))
        rest = wait_until(lambda: "[REQ] #%d " % numbers[-1][1] in self.rrouter.log()
                          and self.rrouter.log())
        for row, number in numbers:
            with self.subTest(row.what, log=row.log):
                lines, end, rest = rest.partition(" [REQ] #%d " % number)
                line, _, rest = rest.partition("\n")
                self.assertIn(row.log, lines + end + line)
        counts, sums = self.rrouter.health()["requests"], collections.Counter()
        rows = json.loads(run_here(self.rrouter.home, "usage", "--json").stdout)
        for row in rows:
            sums.update({name: row[name] for name in ("requests", "rescued", "failed")})
        self.assertEqual(sums, {"requests": self.rrouter.health()["requestCount"],
                                "rescued": counts["rescued"], "failed": counts["failed"]})


class RescueTest(AutoTest):
    """Rescues that do not fit into the table SCRIPTS."""

    REQUESTS = 20_000 if SOAKING else 400
    FAILURES = tuple(row.antigravity for row in SCRIPTS if row.calls == "ac")

    def test_rescue_sends_the_original_body_by_the_other_targets_rules(self):
        self.script(error(500))
        body = b'{ "model" : "claude-opus-5-5", "n":1e-7, "s":"\\ud83d","stream":true}'
        reply = self.rrouter.request(body=body)
        first, second = self.upstream.received
        self.assertEqual(first.body, body.replace(
            OPUS.encode(), b"gemini-claude-opus-4-5-thinking"))
        self.assertEqual((second.body, reply.header("x-rrouter-model")), (body, OPUS))
        for received in (first, second):
            received.fields.remove(("Content-Length", str(len(received.body))))
        self.assertEqual(first.fields, second.fields)

    def test_other_paths_are_judged_by_their_first_event(self):
        first = b'data: {"choices":[{"delta":{}}]}\n\n'
        self.script([sse(), sse(COMMENT, DATA_ERROR), plain({}), sse(first, DATA_ERROR),
                     sse(first, b"", gate=self.gate())])
        self.ask_for("ac ac", target=CHAT)
        self.assert_state(failureCount=2)
        for body in (b"{}", first + DATA_ERROR):
            self.assertEqual(self.rrouter.post(target=CHAT).body, body)
        self.begin(until=first, target=CHAT)
        self.assert_state()

    def test_response_to_head_is_not_judged(self):
        self.script(plain(b""))
        reply = self.rrouter.request("HEAD", "/v1/messages", chat())
        self.assertEqual((reply.status, reply.header("x-rrouter-attempts")), (200, "1"))
        self.assert_state()

    def test_stream_is_held_back_until_its_first_content(self):
        gate = self.gate()
        response = sse(PING + COMMENT + START + NO_TEXT + NO_MORE_TEXT + DELTA[:-1], b"\n", STOP,
                       gate=gate)
        self.script(response)
        connection = self.begin()
        self.assert_silent(connection)
        gate.set()
        self.assert_forwarded(read_reply(connection), response, "antigravity")

    def test_first_content_commits(self):
        for first in (START + PING + DELTA, START + TOOL, START + end_of(5), PING * 30000,
                      (START + DELTA).replace(b"\n", b"\r\n")):
            with self.subTest(first[-60:]):
                gate = self.gate()
                self.script(sse(first, PING, STOP, gate=gate))
                with self.opened() as response:
                    self.assertEqual(receive(response, len(first)), first)
                    gate.set()
                    self.assertEqual(response.read(), PING + STOP)
        self.assert_state()

    def test_draining_rrouter_makes_no_second_attempt(self):
        gate = self.gate()
        self.script(error(500, "as it is", before=gate))
        connection = self.begin()
        self.rrouter.process.send_signal(signal.SIGTERM)
        wait_until(lambda: self.rrouter.home.health() is None)      # it accepts no more connections
        gate.set()
        self.assert_forwarded(read_reply(connection), error(500, "as it is"), "antigravity")
        self.rrouter.stop()
        self.rrouter.start()

    def test_clients_side_by_side_see_no_failure_that_the_other_target_could_avoid(self):
        dice = random.Random(int(os.environ["RROUTER_SOAK"]) if SOAKING else 1)
        failing = [dice.choice((None, "antigravity", "claude")) for _ in range(self.REQUESTS)]

        def respond(received):
            number, target = received.json()["number"], target_of(received)
            if failing[number // 20] == target:
                return self.FAILURES[number * 7919 % len(self.FAILURES)]
            return sse(START, text_of("%d by %s" % (number, target)), STOP)

        def is_served(number):
            if number % 50 == 0:
                self.shifts[0] += 1801
            reply = self.rrouter.post((SONNET, OPUS, HAIKU)[number % 3], number=number)
            words = text_of("%d by %s" % (number, reply.header("x-rrouter-target")))
            return (reply.status, reply.complete, reply.body) == (200, True, START + words + STOP)

        self.upstream.default = respond
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            served = list(pool.map(is_served, range(self.REQUESTS)))
        self.assertEqual([number for number, good in enumerate(served) if not good], [])


class NeutralTest(AutoTest):
    """Requests that are not judged change no counter."""

    def test_count_tokens_is_neutral(self):
        self.script([error(429)] + [error(500)] * 4)
        self.ask_for("ac")
        for status in (500, 500, 500, 500, 200):
            reply = self.rrouter.post(target=COUNT_TOKENS)
            self.assertEqual((reply.status, reply.header("x-rrouter-attempts")), (status, "1"))
        self.assert_state(failureCount=1)

    def test_request_without_a_model_is_neutral(self):
        for response in (error(500), HANG_UP, sse(), REJECTION):
            self.script(other=response)
            for method, target, body in (("GET", "/v1/models", None), ("POST", "/v1/messages", b""),
                                         ("POST", "/v1/messages", b'{"model":null}')):
                reply = self.rrouter.request(method, target, body)
                self.assertIn(reply.status, (response.status, 502))
                self.assertIsNone(reply.header("x-rrouter-target"))
        self.assert_state()

    def test_body_without_a_model_that_comes_in_pieces_is_not_healed(self):
        self.script(other=REJECTION)
        data = request_bytes(body=json.dumps({"messages": HISTORY}).encode())
        with self.rrouter.connect() as connection:
            connection.sendall(data[:-9])
            self.assert_silent(connection)      # or the kernel joins both segments
            connection.sendall(data[-9:])
            self.assertEqual(read_reply(connection).status, 400)
        self.assertEqual(self.calls(), "-")

    # Explicit modes, and names that both targets would get, have one attempt, which is not judged.
    FAILURES = (error(429), error(500), sse(OVERLOADED), EMPTY_STREAM, EMPTY_MESSAGE)

    def test_explicit_mode_neither_rescues_nor_counts(self):
        for mode in ("antigravity", "claude"):
            self.set_mode(mode)
            for response in self.FAILURES:
                self.script(response, response)
                self.assert_forwarded(self.ask_for(mode[0]), response, mode)
            self.assertFalse(self.rrouter.health()["autoSwitch"]["active"])

    def test_name_without_a_rule_goes_once_to_the_current_target(self):
        for response in self.FAILURES:
            self.script(other=response)
            self.assert_forwarded(self.ask_for("-", "gpt-9"), response, "antigravity")
        self.script(other=sse(PING, STOP, gate=self.gate()))
        self.begin(until=PING, model="gpt-9")
        self.assert_state()
        self.trip()
        self.scripts[None] = error(500)
        self.later(1801)
        self.assert_forwarded(self.ask_for("-", "gpt-9"), error(500), "claude")
        self.ask_for("c", target=COUNT_TOKENS)
        self.ask_for("ac")                          # only this one probes


class ClientLeavesTest(AutoTest):
    """A request whose client leaves is neutral, unless the client waited too long."""

    limits = {"TICK_S": 0.05}

    def test_client_that_leaves_after_120_s_of_silence_has_met_a_timeout(self):
        for label, seconds, timeouts, response, received, members in (
                ("before the head", 110, 0, self.silent(), b"", {}),
                ("before the head", 121, 1, self.silent(), b"", {}),
                ("not a stream", 121, 0, self.silent(), b"", {"stream": False}),
                ("in a stream", 110, 0, sse(TALK, DELTA, gate=self.gate()), DELTA, {}),
                ("in a stream", 121, 1, sse(TALK, DELTA, gate=self.gate()), DELTA, {}),
                ("comments alone", 121, 1, slowly(COMMENT), b"", {}),
                ("pings alone", 121, 1, slowly(PING, TALK), DELTA, {})):
            with self.subTest(label, seconds=seconds):
                self.script_anew(response)
                connection = self.begin(until=received, **members)
                self.later(seconds)
                self.leave(connection)
                self.upstream.wait(lambda upstream: upstream.closed >= 1)
                self.assertEqual(self.calls(), "a")
                self.assert_state(timeoutCount=timeouts)

    def test_event_ends_the_silence(self):
        gates = [self.gate() for _ in range(3)]
        gates[0].set()
        self.script(sse(TALK, NO_MORE_TEXT, PING, gate=gates))
        connection = self.begin(until=DELTA)
        self.later(100)
        gates[1].set()
        receive_until(connection, NO_MORE_TEXT)
        self.later(100)
        self.leave(connection)
        self.assert_state()

    def test_response_is_complete_with_message_stop(self):
        self.script([error(500), sse(START + DELTA + STOP, PING, gate=self.gate())])
        self.ask()
        self.leave(self.begin(until=STOP))
        self.assert_state()

    def test_client_that_left_before_the_failure_gets_no_second_attempt(self):
        gate = self.gate()
        for response in (error(500, before=gate), sse(PING, OVERLOADED, gate=gate)):
            gate.clear()
            self.script_anew(response)
            self.begin().close()
            gate.set()
            self.leave()
            self.assertEqual(self.calls(), "a")
            self.assert_state()

    def test_failure_after_60_s_counts_even_if_the_client_leaves_during_the_rescue(self):
        for seconds, failures in ((50, 0), (61, 1)):
            with self.subTest(first_attempt_s=seconds):
                gate = self.gate()
                self.script_anew(error(500, before=gate), self.silent())
                connection = self.begin()
                self.later(seconds)
                gate.set()
                self.upstream.wait(lambda upstream: self.calls() == "ac")
                self.leave(connection)
                self.assert_state(failureCount=failures)


class SwitchTest(AutoTest):

    def test_forty_requests_that_fail_together_count_once(self):
        gate, rescues = self.gate(), [self.gate() for _ in range(3)]
        self.script(error(529, before=gate),
                    [whole("claude", before=rescue) for rescue in rescues] + [None] * 37)
        connections = [self.begin() for _ in range(40)]
        gate.set()
        for left, rescue in zip((3, 2, 1), rescues):
            wait_until(lambda: self.rrouter.health()["activeRequests"] == left)
            self.later(3)
            rescue.set()
        for connection in connections:
            self.assert_served(read_reply(connection), "claude", 2)
        self.assert_state(failureCount=1)

    def test_exhausted_model_switches_and_recovers_alone(self):
        self.script(lambda received: error(429) if "opus" in received.model
                    else whole("antigravity"))
        for _ in range(3):
            self.assertEqual((self.ask(OPUS)[1], self.ask(HAIKU)[1]), ("ac", "a"))
        models = self.rrouter.health()["autoSwitch"]["models"]
        self.assert_state(switched=False, models=models)
        model = models[OPUS]
        self.assertEqual((model["currentTarget"], model["switchCount"], model["cooldownSeconds"]),
                         ("claude", 1, 1800))
        self.assertEqual([self.ask(name)[1] for name in (OPUS, HAIKU, SONNET)], ["c", "a", "a"])
        self.later(1801)
        self.script()
        self.ask_for("a", OPUS)
        self.assert_state()

    def test_one_request_probes_while_all_others_stay(self):
        self.trip()
        self.later(1801)
        gate = self.gate()
        self.script(error(500, before=gate))
        self.upstream.clear()
        connections = [self.send() for _ in range(9)]
        self.upstream.wait(lambda upstream: len(upstream.received) == 9)
        self.assertEqual(sorted(self.calls()), list("a" + "c" * 8))
        self.ask_for("c", OPUS)
        gate.set()
        self.assertEqual({read_reply(one).status for one in connections}, {200})
        self.assert_state("claude", switchCount=2, cooldownSeconds=3600)
        self.script(self.silent())
        self.later(3601)
        self.leave(self.begin())                        # a neutral probe
        self.ask_for("c")
        self.script()
        self.ask_for("61 a")

    def test_a_clock_that_is_set_back_and_then_corrected_ends_a_cooldown(self):
        self.trip()
        for seconds in (-86400, 86400):
            self.shifts[0] += seconds                   # of the time of day alone
            for _ in range(2):          # the second line is written in a later round of the watcher
                before = self.rrouter.log().count("[REFUSED]")
                self.rrouter.request("GET", "/", None, (("Origin", "null"),))
                wait_until(lambda: self.rrouter.log().count("[REFUSED]") > before)
        self.script()
        self.ask_for("a")

    def test_a_write_of_auto_to_the_mode_file_clears_all_state(self):
        for label, way in (
                ("rrouter auto", lambda: self.rrouter.home.run("auto", check=0)),
                ("file written", lambda: self.rrouter.home.write("mode", "AUTO \n")),
                ("left", lambda: (self.set_mode("antigravity"), self.ask(), self.set_mode("auto"))),
                ("auto section", lambda: self.configure(auto_config(timeoutThreshold=7)))):
            with self.subTest(label):
                self.trip()
                gate = self.gate()
                self.script(claude=error(500, before=gate))
                late = self.begin()
                way()
                self.script()
                gate.set()
                self.assert_served(read_reply(late), "antigravity", 2)
                self.ask_for("a")
                self.assert_state()


class SilenceTest(AutoTest):
    """A timeout, after 0.3 s here, is rescued; two switch the target."""

    config, limits = auto_config(firstByteTimeoutSeconds=0.3), {"TICK_S": 0.05}

    def test_limit_runs_until_the_first_content_or_the_last_byte(self):
        gate = self.gate()
        for label, response in (
                ("half a head", Response(raw=(sse().head()[:40], b""), gate=gate)),
                ("no content", sse(PING + START + NO_TEXT, STOP, gate=gate)),
                ("half a message", Response(200, (b'{"type":', b"}"), gate=gate)),
                ("pings for ever", slowly(PING)),
                ("blank lines for ever", Response(200, (b"\n",) * 999, pause_s=0.02))):
            with self.subTest(label):
                self.script_anew(response)
                self.assert_served(self.ask(stream="lines" not in label)[0], "claude", 2)
                self.assert_state(timeoutCount=1)
                self.upstream.wait(lambda upstream: upstream.closed)
        self.ask_for("ac")
        self.assert_state("claude", switchCount=1, reason="2 consecutive timeouts")

    def test_request_without_stream_has_twice_the_limit(self):
        self.script(self.silent())
        slow, quick = self.begin(OPUS, stream=False), self.begin(HAIKU)
        for connection in (slow, quick):
            self.assert_served(read_reply(connection), "claude", 2)
        self.assertEqual(self.upstream.models()[2:], [HAIKU, OPUS])

    def test_timeout_counts_unless_the_other_target_is_silent_or_drops_too(self):
        for first, second, status, timeouts in (
                (None, SHELF_503, 503, 1), (error(529), None, 529, 0), (None, None, 504, 0),
                (None, HANG_UP, 504, 0)):
            with self.subTest([first and first.status, second and second.status]):
                self.script_anew(first or self.silent(), second or self.silent())
                reply = self.ask()[0]
                self.assertEqual((reply.status, reply.header("x-rrouter-attempts")), (status, "2"))
                self.assertEqual(reply.header("x-rrouter-error"), "1" if status == 504 else None)
                self.assert_state(timeoutCount=timeouts)

    def test_other_requests_have_no_time_limit(self):
        gate = self.gate()
        self.script(lambda received: Response(before=gate) if "count" in received.target
                    else sse(START + DELTA, STOP, gate=gate), other=Response(before=gate))
        waiting = [self.begin(), self.begin(target=COUNT_TOKENS), self.begin(model=None)]
        self.set_mode("claude")
        self.script(claude=stream(before=gate))
        waiting.append(self.begin())
        self.set_mode("auto")
        self.script(self.silent())      # these expire later than those would
        self.ask_for("ac ac")
        gate.set()
        self.assertEqual([read_reply(one).status for one in waiting], [200] * 4)

    def test_stopped_process_charges_no_target(self):
        self.configure(auto_config(firstByteTimeoutSeconds=0.5))
        process = self.rrouter.process
        for seconds, comes_meanwhile in ((0.8, True), (1.5, False)):
            gate = self.gate()
            self.script(whole("antigravity", before=gate))
            connection = self.begin()
            process.send_signal(signal.SIGSTOP)
            try:
                os.waitpid(process.pid, os.WUNTRACED)
                if comes_meanwhile:
                    gate.set()
                time.sleep(seconds)     # longer than the limit
            finally:
                process.send_signal(signal.SIGCONT)
            gate.set()
            self.assert_served(read_reply(connection), "antigravity", 1)
        self.assert_state()


class HookTest(AutoTest):
    """auto.onSwitch: a program that runs at each switch and recovery."""

    limits = {"HOOK_S": 0.5}
    NOTE = "import sys; print(7); open(sys.argv[1], 'a').write(' '.join(sys.argv[2:]) + chr(10))"

    def test_program_runs_at_each_switch_and_recovery_with_the_details_as_arguments(self):
        path = self.rrouter.home.dir / "moves"
        self.configure(auto_config(onSwitch=[
            sys.executable, "-c", self.NOTE, str(path), "{from}>{to} $HOME {} {x}",
            "{scope}|{reason}", "{minutes}"]))
        self.trip()
        wait_until(path.exists)
        self.script()
        self.ask_for("1801 a")
        wait_until(lambda: path.read_text().count("\n") == 2)
        self.assertEqual(path.read_text().splitlines(), [
            "antigravity>claude $HOME {} {x} auto|3 consecutive HTTP errors, last 429 30",
            "claude>antigravity $HOME {} {x} auto|responds again 0"])

    def test_program_that_fails_or_hangs_delays_nothing_and_is_logged_once(self):
        for command, words in (
                (["/nowhere"], "/nowhere: [Errno 2] No such file"),
                (["a\0"], "a\\x00: embedded null byte"),
                (["sh", "-c", "exit 3"], "sh: ended with status 3"),
                (["sleep", "60"], "sleep: did not end within 0.5 s")):
            self.configure(auto_config(onSwitch=command))
            self.set_mode("auto")
            before, start = len(self.rrouter.log()), time.monotonic()
            self.trip()
            self.assertLess(time.monotonic() - start, 0.4)
            wait_until(lambda: self.rrouter.log()[before:].count("onSwitch: " + words) == 1)

    def test_program_that_hangs_ends_together_with_the_programs_it_started(self):
        path = self.rrouter.home.dir / "fifo"
        os.mkfifo(path)
        self.configure(auto_config(onSwitch=["sh", "-c", "sleep 60 > '%s' & wait" % path]))
        self.trip()
        start = time.monotonic()
        self.assertEqual(path.read_bytes(), b"")        # the end of the last writer
        self.assertLess(time.monotonic() - start, 30)

    def test_program_that_cannot_be_killed_or_started_is_logged(self):
        log = rrouter.Log("", echo=False)
        with mock.patch("os.killpg", side_effect=PermissionError), \
                mock.patch.object(rrouter, "HOOK_S", 0), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            rrouter.run_hook(["sleep", "0.2"], {}, log)
        with mock.patch.dict(sys.modules, {"subprocess": None}):    # as after an upgrade
            rrouter.run_hook(["sleep", "0.2"], {}, log)
        self.assertIn(b"onSwitch: sleep: did not end within 0 s", log._lines[0])
        self.assertIn(b"onSwitch: sleep: import of subprocess halted", log._lines[1])

    def test_session_stays_on_its_target_when_another_one_recovers_the_other_target(self):
        other = {"fields": (("X-Claude-Code-Session-Id", "S"),)}
        self.trip()
        self.script()
        for calls, fields in (("1700 c", other), ("101 a a", {}), ("c", other)):
            self.ask_for(calls, **fields)


class UpstreamAwayTest(AutoTest):
    """A request waits up to 15 s for an upstream that is away, and is neutral."""

    @staticmethod
    def upstream_class():
        return Upstream(port=free_port())       # no other socket takes this port meanwhile

    @contextlib.contextmanager
    def away(self):
        self.upstream.close()
        try:
            yield
        finally:
            type(self).upstream = Upstream(self.answer, self.upstream.port)
            self.addClassCleanup(self.upstream.close)

    def send_and_wait(self):
        connection = self.send()
        wait_until(lambda: self.rrouter.health()["activeRequests"])
        self.later(10)
        return connection

    def miss(self):
        """Send a request that gets no connection for 15 s; return its reply."""
        connection = self.send_and_wait()
        self.assert_silent(connection)
        self.later(6)
        while not select.select([connection], [], [], 0.5)[0]:
            self.later(6)               # the first one came before rrouter had begun to wait
        reply = read_reply(connection)
        self.assert_error(reply, 502, "127.0.0.1:%d" % self.upstream.port)
        self.assertEqual(reply.header("x-rrouter-error"), "1")
        return reply

    def test_restart_of_the_upstream_is_survived_in_every_mode(self):
        for mode, target in (("auto", "antigravity"), ("claude", "claude")):
            with self.subTest(mode):
                self.set_mode(mode)
                with self.away():
                    self.leave(self.send_and_wait())    # this ends its wait
                    connection = self.send_and_wait()
                self.assert_served(read_reply(connection), target, 1)
                self.assertEqual(self.calls(), target[0])

    def test_client_is_advised_not_to_retry_after_a_second_failure_in_a_row(self):
        for _ in range(2):
            with self.away():
                retries = [self.miss().header("x-should-retry") for _ in range(3)]
                self.assert_error(self.get(), 502)      # without a model: at once
            self.assertEqual(retries, [None, "false", "false"])
            self.ask_for("a")
        self.assert_state()

    def test_second_attempt_does_not_wait_and_the_first_is_neutral(self):
        self.upstream.break_connections()

        def fail_and_go(_):
            self.upstream.stop_listening()
            return error(429, "last words", close=True)

        self.script(fail_and_go)
        self.assertEqual(self.ask_for("a").body, error(429, "last words").chunks[0])
        self.assert_state()
        with self.away():
            pass

    def test_request_is_sent_again_only_if_its_kept_connection_closes_within_a_second(self):
        for mode, seconds, calls, status in (("antigravity", 0, "aa", 200),
                                             ("antigravity", 2, "a", 502), ("auto", 2, "ac", 200)):
            with self.subTest(mode, seconds=seconds):
                self.set_mode(mode)
                self.ask_for("a")
                gate = self.gate()
                self.script([Response(hangup=True, before=gate)])
                self.upstream.clear()
                connection = self.begin()
                if seconds:
                    self.assert_silent(connection, 0.3)     # by then rrouter has sent the request
                    self.later(seconds)
                gate.set()
                self.assertEqual(read_reply(connection).status, status)
                self.assertEqual(self.calls(), calls)
        self.assert_state()
        wait_until(lambda: re.search(r"\[REQ\].*sent again", self.rrouter.log()))


class RequestLoopTest(AutoTest):
    """A request that comes back through another hop unwinds at the connection limit."""

    config, limits = auto_config(), {"CONNECTIONS_MAX": 40}
    config["modes"] = {target: {"mappings": [{"match": "*", "rewrite": target}]}
                       for target in ("antigravity", "claude")}

    def answer(self, received):
        """Send the request back to rrouter; CLIProxyAPI would drop the headers of the reply."""
        reply = self.rrouter.request("POST", received.target, received.body)
        fields = [("x-rrouter-error", reply.header("x-rrouter-error"))] * (not self.drops_headers)
        return Response(reply.status, reply.body, framing="length", fields=fields)

    def test_request_loop_unwinds_at_the_connection_limit(self):
        for mode, self.drops_headers in (("claude", False), ("auto", False), ("auto", True)):
            self.set_mode(mode)
            self.assert_error(self.rrouter.post(), 503)
            self.leave()
        self.assert_state()


class TruncatedTlsTest(TlsTest, AutoTest):
    """The scripted upstream ends TLS connections without close_notify, which is a break."""

    def test_response_that_ends_with_the_connection_is_broken(self):
        response = plain(message("x"))
        response.framing = "close"
        self.script(response)
        self.assert_served(self.ask(stream=False)[0], "claude", 2)
        self.assert_state()
        self.set_mode("antigravity")
        self.assertFalse(self.ask(stream=False)[0].complete)


# Healing ######################################################################

class HealingTest(AutoTest):
    """A history with foreign signatures is sent again to the same target without its thinking.

    SCRIPTS has the results in auto mode, WithoutThinkingTest more histories.
    """

    def send(self, body):
        self.upstream.clear()
        return self.rrouter.request(body=body), self.calls()

    def test_history_is_healed_in_every_mode(self):
        foreign, own = chat(messages=HISTORY), chat(messages=[
            {"role": "assistant", "content": HISTORY[0]["content"][1:]}])
        packed = Response(400, gzip.compress(FailureTest.NESTED.encode()),
                          fields=(("Content-Encoding", "gzip"),))
        for mode, target, model, refusal in (
                ("antigravity", "antigravity", GEMINI_SONNET, REJECTION),
                ("claude", "claude", SONNET, packed),
                ("auto", "antigravity", GEMINI_SONNET, packed)):
            with self.subTest(mode):
                self.set_mode(mode)
                self.script(**{target: [refusal]})
                reply, calls = self.send(foreign)
                self.assert_served(reply, target, 1)
                self.assertEqual(calls, target[0] * 2)
                first, second = self.upstream.received
                self.assertEqual([first.body, second.body], [
                    body.replace(SONNET.encode(), model.encode()) for body in (foreign, own)])
                self.assertEqual(first[:2], second[:2])
                self.assertEqual(end_to_end(first.fields), end_to_end(second.fields))

    def test_request_without_thinking_and_other_refusals_are_not_sent_again(self):
        self.set_mode("antigravity")
        foreign = chat(messages=HISTORY)
        for response, body in ((REJECTION, chat(messages="thinking")), (REJECTION, foreign[:-1]),
                               (error(400, "thinking.type: Field required"), foreign),
                               (error(500, "Corrupted thought signature."), foreign)):
            with self.subTest(body, status=response.status):
                self.script(response)
                reply, calls = self.send(body)
                self.assertEqual((reply.status, reply.body, calls),
                                 (response.status, response.chunks[0], "a"))


# /health, log lines, secrets ##################################################

HEALTH = ("status", "version", "mode", "currentTarget", "defaultMode", "requestCount",
          "activeRequests", "requests", "uptimeSeconds", "pid", "instance", "startedBy",
          "listenAddr", "upstreamURL", "problems", "autoSwitch")


class StatusLineTest(unittest.TestCase):

    AUTO = {"active": True, "targets": ["antigravity", "claude"], "currentTarget": "claude",
            "switched": True, "reason": "3 consecutive HTTP errors, last 429",
            "cooldownRemainingSeconds": 1345, "models": {}}
    HOME = {"currentTarget": "antigravity", "switched": False}
    LINES = (
        # changes to AUTO, number of problems, the line
        ({}, 0, "auto → claude (antigravity 429, 23m)"),
        ({"reason": "2 consecutive timeouts"}, 0, "auto → claude (antigravity timeouts, 23m)"),
        ({"reason": "failed a probe, last 503 auth_unavailable, after 401",
          "cooldownRemainingSeconds": 59}, 0,
         "auto → claude (antigravity 503 auth_unavailable, 59s)"),
        ({"cooldownRemainingSeconds": 60}, 0, "auto → claude (antigravity 429, 1m)"),
        ({"cooldownRemainingSeconds": 0}, 1,
         "auto → claude (antigravity 429, now), 1 problem: rrouter status"),
        (HOME, 2, "auto → antigravity, 2 problems: rrouter status"),
        ({**HOME, "models": {"opus": AUTO}}, 0,
         "auto → antigravity, opus → claude (antigravity 429, 23m)"),
        ({"active": False}, 0, "claude"),
    )

    def test_line_says_where_requests_go_and_why(self):
        for changes, problems, line in self.LINES:
            with self.subTest(line):
                self.assertEqual(line, rrouter.status_line({
                    "mode": "claude", "problems": ["x"] * problems, "currentTarget": "claude",
                    "usageWindows": {"claude": {}, "antigravity": {"5h": {}}},
                    "autoSwitch": {**self.AUTO, **changes}}))

    def test_line_of_a_session_says_which_model_it_asked_for_and_got(self):
        own = {**self.AUTO, "reason": "2 consecutive timeouts"}
        health = {"problems": [], "currentTarget": "claude",
                  "usageWindows": {"claude": {"5h": {}}, "antigravity": {}},
                  "autoSwitch": {**self.AUTO, "models": {"opus": own}}}
        for asked, failed in (("claude-opus-5-5", "429"), ("opus", "timeouts")):
            self.assertEqual("asked %s, answered gemini (antigravity %s, 23m)" % (
                asked.replace("claude-", ""), failed), rrouter.status_line(
                    health, [asked, "antigravity", "gemini"]))


class ModeInTargetTest(RouterTest):
    """Request targets that begin with /@MODE; the mode file says antigravity."""

    TARGETS = (
        # target of the client,               the upstream's,         model there
        ("/@claude/v1/messages?beta=true",    "/v1/messages?beta=true", SONNET),
        ("/@CL%61ude/v1/x%2F?/@y",            "/v1/x%2F?/@y",         SONNET),
        ("http://localhost/@claude/a",        "/a",                   SONNET),
        ("/@claude?a",                        "/?a",                  SONNET),
        ("/@claude/@auto/v1/messages",        "/@auto/v1/messages",   SONNET),
        ("/v1/@claude/messages",              "/v1/@claude/messages", GEMINI_SONNET),
    )

    def test_request_is_served_in_that_mode_and_forwarded_without_the_prefix(self):
        for target, forwarded, model in self.TARGETS:
            with self.subTest(target):
                self.upstream.clear()
                self.assertEqual(self.rrouter.post(target=target).status, 200)
                (received,) = self.upstream.received
                self.assertEqual((received.target, received.model), (forwarded, model))
        wait_until(lambda: " POST /@claude/@auto/v1/messages " in self.rrouter.log())

    def test_unknown_mode_is_refused_with_the_names_of_the_known_ones(self):
        before = self.rrouter.health()["requestCount"]
        for target in ("/@gemini/v1/messages", "/@/v1/messages", "/@gemini/health?line"):
            reply = self.assert_refused(request_bytes("GET", target), 404)
            self.assert_error(reply, 404, "(defined: antigravity, claude, auto)")
        self.assertEqual(self.rrouter.health()["requestCount"], before)

    def test_auto_is_refused_with_the_reason_if_the_config_makes_it_unusable(self):
        with Running(self.upstream, config={"modes": {"claude": {}}}) as router:
            reply = router.request(target="/@auto/v1/messages")
            self.assertIn('auto.targets: "antigravity": not among the modes', reply.body.decode()
                          .replace("\\", ""))
            self.assertEqual(reply.status, 404)

    def test_health_shows_that_mode(self):
        for mode, line in (("claude", "claude"), ("auto", "auto → antigravity")):
            self.assertEqual(self.get(f"/@{mode}/health").json()["mode"], mode)
            self.assertEqual(self.get(f"/@{mode}/health?line").body.decode(), line + "\n")


class SessionTest(RouterTest):
    """GET /health?line&session=ID."""

    def line(self, session):
        return self.get("/health?line&session=" + session).body.decode().strip()

    def post_as(self, session, model=SONNET, target="/v1/messages", **members):
        return self.rrouter.post(model, target, (("x-claude-code-session-id", session),), **members)

    def test_line_names_the_models_of_the_last_request_with_a_success(self):
        self.post_as("one")
        self.post_as("two 2", target="/@claude/v1/messages")
        self.post_as("two 2", "x", target="/v1/messages/count_tokens")
        self.rrouter.post(fields=())
        self.upstream.play(error(429))
        self.post_as("one", "claude-opus-5-5")
        self.assertEqual([*map(self.line, ("one", "two%202", "three", ""))], [
            "asked sonnet-5-5, answered " + GEMINI_SONNET, "asked sonnet-5-5, answered sonnet-5-5",
            "antigravity", "antigravity"])

    def test_only_the_last_256_sessions_are_kept(self):
        for number in range(257):
            self.post_as(f"s{number}", "m")
        self.post_as("s9", "x\n" * 999)
        long = "x\\n" * 20 + "..."
        self.assertEqual([self.line("s0"), self.line("s1"), self.line("s9")],
                         ["antigravity", "asked m, answered m", f"asked {long}, answered {long}"])

    def test_long_names_of_models_are_not_kept_whole(self):
        self.post_as("s", "m" * (4 << 20))
        before = usage_of(self.rrouter.process).resident_kb
        for number in range(20):
            self.post_as(f"s{number}", "m" * (4 << 20))
        time.sleep(1.5)                 # free memory returns to the system
        self.assertLess(usage_of(self.rrouter.process).resident_kb - before, 30 * 1024)


class AgentRuleTest(RouterTest):

    config = {**DEFAULT_CONFIG, "modes": {**DEFAULT_CONFIG["modes"], "antigravity": {"mappings": [
        {"match": "*", "rewrite": "large", "agent": "explore"},
        {"match": "*", "rewrite": "small", "class": "compaction"}]}}}

    def test_headers_and_system_prompt_choose_the_rule(self):
        system = {"system": [{"type": "text", "text": "You are oh-my-claudecode:explore"}]}
        for agent, kind, members, model in (
                (None, None, {}, SONNET), (None, None, system, "large"),
                ("Explore", None, {}, "large"), ("Plan", None, system, SONNET),
                ("custom", None, system, "large"), ("custom", "main", {}, SONNET),
                (None, "compaction", {}, "small")):
            fields = [field for field in (("X-Claude-Code-Agent-Type", agent),
                                          ("x-claude-code-request-class", kind)) if field[1]]
            with self.subTest(fields=fields, members=members):
                self.upstream.clear()
                self.rrouter.post(fields=fields, **members)
                self.assertEqual(self.upstream.received[0].model, model)
                self.assertEqual(self.upstream.received[0].fields[1:-1], fields)


class UsageWindowTest(AutoTest):
    """Responses with headers that say how much of a subscription is used."""

    @staticmethod
    def fields(used, until, window="5h"):
        name = f"anthropic-ratelimit-unified-{window}-"
        return ((name + "utilization", used), (name + "reset", until))

    def test_windows_are_shown_by_target_until_they_end(self):
        now = int(time.time())
        self.script(
            error(429, fields=self.fields("1.004", str(now + 90))),
            Response(200, json.dumps(message("c")).encode(), fields=(
                *self.fields("0.83", str(now + 3600)), *self.fields("0.126", str(now + 99), "7d"))))
        self.ask_for("ac")
        windows = self.rrouter.health()["usageWindows"]
        self.assertEqual({target: {name: window["usedPercent"] for name, window in own.items()}
                          for target, own in windows.items()},
                         {"antigravity": {"5h": 100}, "claude": {"5h": 83, "7d": 13}})
        until = time.strftime("%H:%M", time.localtime(now + 3600))
        self.assertRegex(self.get("/@claude/health?line").body.decode(),
                         rf"\Aclaude, 5h 83 % until {until}, 7d 13 % until [A-Z][a-z]+ \d\d:\d\d\n")
        self.later(100)
        self.assertEqual(list(self.rrouter.health()["usageWindows"]["claude"]), ["5h"])

    def test_unusable_numbers_are_ignored(self):
        for used, until in (("", "9"), ("nan", "9"), ("1", ""), ("0.5", "1e30"), ("inf", "9"),
                            ("1", "-30641760000"), ("1", "9e9")):
            self.upstream.play(Response(fields=self.fields(used, until)))
            self.rrouter.post(target="/@antigravity/v1/messages")
            self.assertEqual(self.get("/@antigravity/health?line").body, b"antigravity\n")
            self.assertNotIn("antigravity", [
                target for target, own in self.rrouter.health()["usageWindows"].items() if own])


class HealthTest(RouterTest):

    def test_every_field_has_its_value(self):
        for mode, target in (("antigravity", "antigravity"), ("claude", "claude"),
                             ("auto", "antigravity")):
            self.rrouter.home.write("mode", mode + "\n")
            health = self.rrouter.health()
            self.assertLessEqual(set(HEALTH), set(health))
            expected = {
                "status": "ok", "version": rrouter.__version__, "pid": self.rrouter.process.pid,
                "mode": mode, "currentTarget": target, "defaultMode": "claude",
                "startedBy": "serve", "listenAddr": "localhost:%d" % self.rrouter.port,
                "upstreamURL": self.upstream.url, "problems": [], "activeRequests": 0,
                "autoSwitch": {
                    "active": mode == "auto", "targets": ["antigravity", "claude"],
                    "failureThreshold": 3, "timeoutThreshold": 2,
                    "currentTarget": "antigravity", "switched": False, "switchCount": 0,
                    "failureCount": 0, "timeoutCount": 0, "reason": None, "switchedAt": None,
                    "retryAt": None, "cooldownSeconds": 0, "cooldownRemainingSeconds": 0,
                    "models": {}}}
            self.assertEqual({name: health[name] for name in expected}, expected)
            self.assertIn(health["uptimeSeconds"], range(3600))

    def test_status_line_is_one_line_of_text(self):
        for target in ("/health?line", "/health?session=1&line"):
            reply = self.get(target)
            self.assertEqual((reply.header("content-type"), reply.body.decode()),
                             ("text/plain; charset=utf-8", "antigravity\n"))
        self.assertEqual(self.rrouter.request("HEAD", "/health?line", fields=()).body, b"")
        self.assertEqual(self.get("/health?lines").json()["mode"], "antigravity")

    def test_only_get_and_head_of_health_are_not_forwarded(self):
        for method, target, is_ours in (
                ("GET", "/health", True), ("HEAD", "/health", True), ("GET", "/health?x=1", True),
                ("POST", "/health", False), ("GET", "/health/x", False), ("GET", "/", False)):
            with self.subTest(method + " " + target):
                self.upstream.clear()
                data = request_bytes(method, target) + request_bytes("GET", "/next")
                first, second = self.converse(data, method, "GET")
                self.assertEqual((first.status, second.body), (200, b"{}"))
                self.assertEqual(len(self.upstream.received), 1 if is_ours else 2)
                if is_ours:
                    self.assertIn("application/json", first.header("content-type"))
                    self.assertGreater(int(first.header("content-length")), 100)
                    self.assertEqual(bool(first.body), method == "GET")

    def test_requests_are_counted_by_result_and_the_last_failure_is_kept(self):
        def counts():
            health, names = self.rrouter.health(), ("answered", "rescued", "failed")
            return [health["requestCount"], *(health["requests"][name] for name in names)]

        before = counts()
        self.upstream.play(Response(), Response(raw=b"HTTP/1.1 x\r\n\r\n"), error(429))
        for _ in range(3):
            self.rrouter.post()
        self.rrouter.home.write("mode", "auto\n")
        self.upstream.play(error(503), stream())
        self.rrouter.post()                         # rescued
        for data in (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
                     b"GET / HTTP/1.1\r\nHost: evil.com\r\n\r\n"):      # these are not counted
            self.converse(data, "GET")
        self.assertEqual([after - past for past, after in zip(before, counts())], [4, 1, 1, 2])
        failure = self.rrouter.health()["requests"]["lastFailure"]
        self.assertEqual((failure["target"], failure["what"]), ("antigravity", "503"))
        self.assertRegex(failure["at"], r"^20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ$")

    def test_problems_name_neither_user_nor_paths(self):
        home = self.rrouter.home
        home.write("config.json", "{")
        home.write("mode", "nosuch\n")
        logs = home.dir / "logs"
        logs.rename(home.dir / "kept")
        logs.write_text("")                 # a file instead of the directory
        try:
            wait_until(lambda: len(self.rrouter.health()["problems"]) == 3)
            text = json.dumps(self.rrouter.health())
        finally:
            logs.unlink()
            (home.dir / "kept").rename(logs)
            (home.dir / "config.json").unlink()
            home.write("mode", self.mode + "\n")
        for secret in (str(home.root), os.path.expanduser("~"), ".rrouter"):
            self.assertNotIn(secret, text)
        wait_until(lambda: not self.rrouter.health()["problems"])


REQUEST_LINE = re.compile(
    r"\[REQ\] #(?P<number>\d+) (?P<method>\S+) (?P<path>\S+) "
    r"((?P<model>.+) -> (?P<target>\S+) (?P<sent>.+) )?"
    r"(?P<status>\d{3}) (?P<seconds>\d+\.\d\d)s\b(?P<notes>.*)$")
LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}) \[[A-Z]+\] \S.*")


def request_lines(text):
    return [line for line in text.splitlines() if "[REQ]" in line]


class RequestLineTest(RouterTest):

    def lines(self):
        """Wait until all requests have their lines; return their matches in order."""
        count = self.rrouter.health()["requestCount"]
        wait_until(lambda: len(request_lines(self.rrouter.log())) == count)
        lines = [REQUEST_LINE.search(line) for line in request_lines(self.rrouter.log())]
        lines.sort(key=lambda line: int(line["number"]))
        self.assertEqual([int(line["number"]) for line in lines], list(range(1, count + 1)))
        return lines

    def leave(self):
        """Send a request and leave without its response."""
        self.upstream.clear()
        self.upstream.play(Response(before=self.gate()))
        with self.rrouter.connect() as connection:
            connection.sendall(request_bytes(body=b'{"model":"m"}', port=self.rrouter.port))
            self.upstream.wait(lambda upstream: upstream.received)
        self.upstream.wait(lambda upstream: upstream.closed)

    def test_each_request_has_one_line_at_its_end(self):
        self.upstream.play(Response(), Response(), error(529), Response(raw=b"HTTP/1.1 x\r\n\r\n"),
                           Response())
        for model in "claude-sonnet-4-5", "other", SONNET, SONNET:
            self.rrouter.post(model)
        self.get("/v1/models?limit=1000")
        self.leave()
        lines = self.lines()[-6:]
        names = "method", "path", "model", "target", "sent", "status"
        target = "/v1/messages", "claude-sonnet-5-5", "antigravity", GEMINI_SONNET
        self.assertEqual([line.group(*names) for line in lines], [
            ("POST", "/v1/messages", "claude-sonnet-4-5", "antigravity", GEMINI_SONNET, "200"),
            ("POST", "/v1/messages", "other", "antigravity", "other", "200"),
            ("POST", *target, "529"),
            ("POST", *target, "502"),
            ("GET", "/v1/models", None, None, None, "200"),
            ("POST", "/v1/messages", "m", "antigravity", "m", "499")])
        for line in lines:
            self.assertLess(float(line["seconds"]), WAIT_S)
            self.assertIn(line.group(0), self.rrouter.printed())
        self.assertNotIn("/health", self.rrouter.log())
        self.assertNotIn("limit=", self.rrouter.log())

    def test_line_has_the_token_counts_of_the_response(self):
        events, body = TokenReaderTest.WHOLE, TokenReaderTest.BODY
        packed = Response(200, gzip.compress(body), fields=(("Content-Encoding", "gzip"),))
        self.upstream.play(sse(events), sse(events, framing="close"), packed, error(429),
                           Response(200, body), Response(200, body))
        for target in ("/v1/messages", *["/@auto/v1/messages"] * 3, "/v1/messages/count_tokens"):
            self.rrouter.post(target=target)
        self.assertEqual([line["notes"] for line in self.lines()[-5:]], [
            TokenReaderTest.NOTE, TokenReaderTest.NOTE, " in 5+0 out 6",
            " in 5+0 out 6 (antigravity failed: 429)", ""])

    def test_refused_request_has_a_line_with_its_status(self):
        # Browsers send the last one without a preflight; the request in its body must not be read.
        before = len(self.rrouter.log())
        for number, (status, data) in enumerate((
                (400, b"GET / HTTP/1.1\r\n\r\n"),
                (431, b"GET / HTTP/1.1\r\nX: %b" % (b"x" * 70000)),
                (413, b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n"),
                (403, b"POST / HTTP/1.1\r\nHost: localhost\r\nOrigin: null\r\n"
                      b"Content-Length: 38\r\n\r\nGET /hidden HTTP/1.1\r\nHost: localhost"))):
            self.assertEqual(self.assert_refused(data, status).header("x-rrouter-error"), "1")
            statuses = wait_until(lambda: re.findall(
                r"\[REFUSED\] (\d+) \S", self.rrouter.log()[before:])[number:])
            self.assertEqual(statuses, [str(status)])

    def test_control_characters_are_escaped(self):
        for model in "\x1b[2J", "a\nb 2026 [REQ] #99", "a\r\nX-Forged: 1", "\u202e", "\ud83d":
            self.assertIsNone(self.rrouter.post(model).header("x-forged"))
        for target in b"/\x1b[2J", b"/\x9b", "/한".encode():
            self.rrouter.exchange(b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % target, True)
        self.lines()
        text = self.rrouter.log()
        self.assertEqual({c for c in text if unicodedata.category(c) in (
            "Cc", "Cf", "Cs", "Zl", "Zp")}, {"\n"})
        self.assertNotRegex(text, r"(?m)^(b 2026|X-Forged)")


class SecretsTest(LoopbackTest):
    """No header value, query or body is written anywhere, however a request ends.

    Each kind of place has another secret word, so that a failure shows where the word came from.
    """

    def setUp(self):
        self.upstream = self.start_upstream()
        self.words = {place: "sk-%s-%08x" % (place, random.getrandbits(32)) for place in (
            "header", "query", "body", "field", "answer", "reason", "chunk", "userinfo")}
        self.target = "/v1/messages?key=" + self.words["query"]
        self.fields = [(name, "Bearer " + self.words["header"]) for name in (
            "Authorization", "X-Api-Key", "Cookie", "Proxy-Authorization", "anthropic-beta",
            "User-Agent", "Referer", "X-Claude-Code-Session-Id", "X-Anything")]

    def assert_silent(self, *texts, files=None):
        """None of the words is in these texts, nor in any file under the directory `files`."""
        texts = [("output", text) for text in texts] + [
            (str(path), path.read_text(errors="replace"))
            for path in (files.rglob("*") if files else ()) if path.is_file()]
        for where, text in texts:
            for place, word in self.words.items():
                self.assertNotIn(word, text, "%s: %s" % (where, place))

    def scripts(self):
        """Return scripts full of secrets, each the responses to one request."""
        words = self.words
        fields = [("Retry-After", words["field"]), ("Content-Type", words["field"]),
                  ("Set-Cookie", words["field"])]
        chunk = event("content_block_delta", delta={"text": words["chunk"]})
        failed = event("error", error={"type": words["chunk"], "message": words["chunk"]})
        signature = error(400, "Corrupted thought signature. " + words["answer"])
        broken = (
            "HTTP/1.1 %(reason)s\r\n\r\n", "HTTP/1.1 200 %(reason)s\r\n%(field)s\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: %(field)s\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: %(field)s\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%(chunk)s\r\n")
        return [
            (Response(200, words["answer"].encode(), fields=fields, reason=words["reason"]),),
            (error(500, words["answer"], fields=fields),
             error(429, words["answer"], words["answer"], fields)),
            (error(502, "unknown provider for model " + words["answer"]),) * 2,
            (signature, stream(chunk)), (signature,) * 3, (stream(failed), stream(chunk)),
            (stream(chunk, failed),), (stream(chunk, cut=True),), (HANG_UP,) * 2,
            *((Response(raw=(text % words).encode()),) * 2 for text in broken)]

    def malformed(self):
        """Return requests full of secrets, all of which are refused."""
        start = "POST /v1/messages?key=%(query)s HTTP/1.1\r\nHost: localhost\r\n"
        lines = (
            "%(header)s", "X-Api-Key : %(header)s", "Authorization: Bearer\r\n %(header)s",
            "Cookie: %(header)s\0", "Content-Length: %(header)s", "Transfer-Encoding: %(header)s",
            "Expect: %(header)s", "Host: %(header)s", "Origin: http://%(header)s",
            "Sec-Fetch-Site: cross-site\r\nReferer: %(header)s", "Cookie: " + "%(header)s" * 4000,
            "Transfer-Encoding: chunked\r\n\r\n%(body)s", "Content-Length: 9999\r\n\r\n%(body)s",
            "Content-Length: 999999999\r\n\r\n%(body)s")
        others = (
            "GET /x?key=%(query)s HTTP/9.9\r\nHost: localhost\r\n\r\n", "%(query)s\r\n\r\n",
            "TRACE /x?%(query)s HTTP/1.1\r\nHost: localhost\r\nCookie: %(header)s\r\n\r\n",
            "GET http://user:%(userinfo)s@localhost/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
            "CONNECT user:%(userinfo)s@localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        return [text % self.words for text in (
            *(start + line + "\r\n\r\n" for line in lines), *others)]

    def break_off(self, router):
        """Break off a request within its body, and another one within its stream."""
        chunk = event("content_block_delta", delta={"text": self.words["chunk"]})
        self.upstream.clear()
        self.upstream.play(stream(chunk, chunk, gate=self.gate()))
        data = request_bytes("POST", self.target, chat(system=self.words["body"]), self.fields)
        with router.connect() as connection:
            connection.sendall(data[:-5])
            reset(connection)
        with router.connect() as connection:
            connection.sendall(data)
            receive_until(connection, self.words["chunk"].encode())
            reset(connection)
        self.upstream.wait(lambda upstream: upstream.closed)

    def test_nothing_is_written_however_a_request_ends(self):
        home = self.make_home(self.upstream, "auto", auto_config(failureThreshold=2),
                              env={"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "always"})
        thinking = [{"role": "assistant", "content": [
            {"type": "thinking", "thinking": self.words["body"]}]}]
        body = chat(system=self.words["body"], messages=thinking)
        with Running(self.upstream, home=home) as router:
            for mode in ("auto", "antigravity"):
                home.write("mode", mode + "\n")
                for script in self.scripts():
                    self.upstream.clear()
                    self.upstream.play(*script)
                    router.request("POST", self.target, body, self.fields)
                self.break_off(router)
            for data in self.malformed():
                router.exchange(data.encode("latin-1"), half_close=True)
            for wanted in ("[AUTO]", "sent again", " 502 ", " 499 ", "SWITCH"):
                wait_until(lambda: wanted in router.log())
            outputs = home.run_all(("status",), ("status", "--json"), ("check",))
            self.assert_silent(router.printed(), *(done.stdout + done.stderr for done in outputs),
                               files=home.dir)
            self.assertLessEqual({"run.json", "rrouter.pid", "state.json"},
                                 {path.name for path in home.dir.iterdir()})
        self.assert_silent(files=home.dir)

    # These make functions of the standard library fail with the secrets in the exception.
    DEFECTS = (
        # before the request is sent
        ("import http.client\ndef connect(self):\n    frame, found = sys._getframe(), []\n"
         "    while frame: found, frame = found + [repr(frame.f_locals)], frame.f_back\n"
         "    raise RuntimeError(found)\nhttp.client.HTTPConnection.connect = connect"),
        # while the response is forwarded
        ("import socket\nreal = socket.socket.sendall\ndef sendall(sock, data, *flags):\n"
         "    if b'crash' in bytes(data): raise RuntimeError(bytes(data))\n"
         "    return real(sock, data, *flags)\nsocket.socket.sendall = sendall"),
    )

    def test_defect_is_logged_with_its_place_and_without_values(self):
        for code in self.DEFECTS:
            with self.subTest(code), Running(self.upstream, code=code,
                                             env={"PYTHONDEVMODE": "1"}) as router:
                self.upstream.play(Response(200, b'"crash %s"' % self.words["answer"].encode()))
                body = chat("crash", system=self.words["body"])
                with router.connect() as connection:
                    connection.sendall(request_bytes("POST", self.target, body, self.fields))
                    reply = read_reply(connection, "POST")          # an error of rrouter, or none
                self.upstream.clear()
                self.assertNotIn("RuntimeError", repr(reply))
                wait_until(lambda: "internal error: RuntimeError at " in router.log())
                self.assertNotIn("Traceback", router.printed())
                self.assert_silent(repr(reply), router.printed(), json.dumps(router.health()),
                                   files=router.home.dir)


def ending_with(test, process):
    """Return the process; the end of the test kills it."""
    test.addCleanup(process.wait)
    test.addCleanup(process.kill)
    return process


class LogFileTest(LoopbackTest):
    """Rotation, times and stderr; HangingDiskTest, FullDiskTest and LogGoneTest have the faults."""

    # Rotation takes a while, so that both processes rotate at once.
    SLOW_DISK = ("import os, time\nreplace = os.replace\ndef slow(old, new):\n"
                 "    time.sleep(0.1 if '.log' in new else 0)\n    replace(old, new)\n"
                 "os.replace = slow")

    def setUp(self):
        self.upstream = self.start_upstream(stream())

    def test_two_processes_rotate_their_common_file_once_and_lose_no_line(self):
        home = self.make_home(self.upstream, "claude")
        logs, full = home.dir / "logs", (b"newest".ljust(79) + b"\n") * 1215
        logs.mkdir(mode=0o700)
        for name, content in ((".log", full), (".log.1", b"older\n"), (".log.2", b"oldest\n")):
            (logs / ("rrouter" + name)).write_bytes(content)
        beside = copy.copy(home)
        beside.port = free_port()
        beside.env = dict(home.env, RROUTER_PORT=str(beside.port))
        options = {"code": self.SLOW_DISK, "limits": {"LOG_MAX_BYTES": 100_000}}
        with Running(self.upstream, home=home, **options) as one, \
                Running(self.upstream, home=beside, **options) as other, \
                concurrent.futures.ThreadPoolExecutor(8) as pool:

            def ask(number):
                router = (one, other)[number % 2]
                return router.request("GET", "/numbered/%d" % number, None, ()).status

            self.assertEqual(set(pool.map(ask, range(120))), {200})
            wait_until(lambda: len(os.listdir(str(logs))) == 4 and (logs / "rrouter.log").exists())
            self.assertEqual(set(pool.map(ask, range(120, 240))), {200})
        newest, *rest = [path.read_bytes() for path in sorted(logs.iterdir())]
        self.assertEqual((rest[1:], rest[0][:len(full)]), ([b"older\n", b"oldest\n"], full))
        text = (rest[0][len(full):] + newest).decode()
        self.assertTrue(text.endswith("\n"))
        self.assertEqual([line for line in text.splitlines() if not LOG_LINE.fullmatch(line)], [])
        found = re.findall(r"\[REQ\] #\d+ GET /numbered/(\d+) 200 ", text)
        self.assertEqual(sorted(map(int, found)), list(range(240)))
        self.assertIn(b"/numbered/", newest)
        self.assertEqual(stat.S_IMODE((logs / "rrouter.log").stat().st_mode), 0o600)

    # Another process rotates the log %r just before this one locks the log for the same purpose.
    OVERTAKEN = (
        "import fcntl, os\nlog, real, done = %r, fcntl.flock, []\ndef flock(descriptor, how):\n"
        "    if not done and os.path.samestat(os.fstat(descriptor), os.stat(log)):\n"
        "        done.append(os.replace(log, log + '.1'))\n        open(log, 'a').close()\n"
        "    return real(descriptor, how)\nfcntl.flock = flock")

    def test_file_that_another_process_has_just_rotated_is_not_rotated_again(self):
        home = self.make_home(self.upstream, "claude")
        home.dir.mkdir(mode=0o700, exist_ok=True)
        log = home.dir / "logs" / "rrouter.log"
        log.parent.mkdir(mode=0o700)
        log.write_bytes(b"x" * 100_000)
        with Running(self.upstream, home=home, code=self.OVERTAKEN % str(log),
                     limits={"LOG_MAX_BYTES": 100_000}) as router:
            router.post()
            wait_until(lambda: request_lines(log.read_text()))
        self.assertEqual(sorted(os.listdir(str(log.parent))), ["rrouter.log", "rrouter.log.1"])

    def test_line_has_the_local_date_and_time_of_its_end(self):
        home = self.make_home(self.upstream, "claude", env={"TZ": "KST-9"})
        clock, midnight = home.root / "clock", calendar.timegm((2031, 12, 31, 15, 0, 0))
        clock.touch()
        code = "import os, time\ntime.time = lambda: os.stat(%r).st_mtime" % str(clock)
        with Running(self.upstream, home=home, code=code, env=home.env) as router:
            for number, seconds in enumerate((-0.5, 0.25, 0.75, 60.0), 1):
                os.utime(str(clock), (0, midnight + seconds))
                router.post()
                wait_until(lambda: len(request_lines(router.log())) == number)
        stamps = [LOG_LINE.fullmatch(line).group(1) for line in request_lines(router.log())]
        self.assertEqual(stamps, ["2031-12-31 23:59:59.500", "2032-01-01 00:00:00.250",
                                  "2032-01-01 00:00:00.750", "2032-01-01 00:01:00.000"])

    def test_stderr_that_is_full_stops_nothing(self):
        """A terminal after Ctrl-S takes nothing, nor does a pager that waits."""
        home = self.make_home(self.upstream, "claude")
        unread, stderr = os.pipe()
        with open(unread, "rb"), open(stderr, "wb") as writer:
            os.set_blocking(stderr, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(stderr, b"x" * 4096)
            os.set_blocking(stderr, True)
            process = ending_with(self, home.begin("serve", stderr=writer))
            wait_until(home.health)
            with socket.create_connection(("127.0.0.1", home.port), WAIT_S) as connection, \
                    connection.makefile("rb") as reader:
                for _ in range(100):
                    connection.sendall(request_bytes(body=chat(), port=home.port))
                    self.assertEqual(read_reply_from(reader).status, 200)
            process.send_signal(signal.SIGTERM)
            self.assertEqual(process.wait(WAIT_S), 0)
        lines = request_lines(home.read("logs/rrouter.log"))
        self.assertEqual([int(REQUEST_LINE.search(line)["number"]) for line in lines],
                         list(range(1, 101)))           # those of one connection are in order


# Load and long life ###########################################################

def processor_seconds(pid):
    fields = pathlib.Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


Usage = collections.namedtuple("Usage", "threads descriptors resident_kb")


def usage_of(process):
    """Return what the process holds; without /proc all numbers are 0."""
    if not PROC:
        return Usage(0, 0, 0)
    root = "/proc/%d/" % process.pid
    status = pathlib.Path(root + "status").read_text()
    threads, resident_kb = (int(re.search(name + r":\s+(\d+)", status).group(1))
                            for name in ("Threads", "VmRSS"))
    return Usage(threads, len(os.listdir(root + "fd")), resident_kb)


class LoadTest(RouterTest):
    """Base of the tests after which rrouter must hold no more than before."""

    @classmethod
    def setUpClass(cls):
        rrouter.raise_descriptor_limit()                # the default of macOS is too low here
        super().setUpClass()
        cls.rrouter.process.send_signal(signal.SIGHUP)  # the last thread of the start answers it
        wait_until(lambda: "SIGHUP" in cls.rrouter.log())

    def at_rest(self):
        """Return the least that rrouter holds when idle, with one kept connection."""
        self.upstream.break_connections()
        wait_until(lambda: not self.upstream.open)
        self.assertEqual(self.get().status, 200)        # closes the dead kept connections
        samples = []
        for _ in range(10):                             # the thread of the request ends later
            samples.append(usage_of(self.rrouter.process))
            time.sleep(0.01)
        return Usage(*map(min, zip(*samples)))

    def assert_nothing_gathered(self, before, resident_kb=4096):
        """There are at most the threads and descriptors of `before`, and hardly more memory."""
        end = time.monotonic() + WAIT_S
        limit = before._replace(resident_kb=before.resident_kb + resident_kb)
        while True:
            after = self.at_rest()
            if all(now <= most for now, most in zip(after, limit)):
                return
            self.assertLess(time.monotonic(), end, "%s have become %s" % (before, after))


class CrowdOfClientsTest(LoadTest):

    def connect_many(self, stack, clients, count):
        """Open connections until there are `count` clients, all of them accepted."""
        while len(clients) < count:
            clients.append(stack.enter_context(self.rrouter.connect()))
            if len(clients) % 100 == 0:
                self.rrouter.health()

    def test_slow_clients_delay_no_other_and_clients_beyond_the_cap_are_refused(self):
        """Half of them are idle after a request, half have sent a part of a head or a body."""
        before, body = self.at_rest(), chat("drip")
        first, again = request_bytes("GET", "/first"), request_bytes("POST", "/v1/messages", body)
        with contextlib.ExitStack() as stack:
            clients = []
            self.connect_many(stack, clients, 500)
            begun = [0 if number % 2 else number % 8 * (len(again) - 1) // 8 + 1
                     for number in range(500)]
            for client, count in zip(clients, begun):
                client.sendall(again[:count] or first)
                if not count:
                    self.assertEqual(read_reply(client).status, 200)
            seconds = []
            for _ in range(9):
                start = time.monotonic()
                self.assertEqual(self.rrouter.post().status, 200)
                seconds.append(time.monotonic() - start)
            self.assertLess(statistics.median(seconds), 0.25, seconds)
            self.assertFalse([r for r in self.upstream.received if b"drip" in r.body])
            for client, count in zip(clients, begun):
                client.sendall(again[count:])
            self.assertEqual([read_reply(client).status for client in clients], [200] * 500)
            received = [r.body for r in self.upstream.received if b"drip" in r.body]
            self.assertEqual(received, [body] * 500)
            self.connect_many(stack, clients, rrouter.CONNECTIONS_MAX + 3)
            with contextlib.suppress(ConnectionError):
                clients[-1].sendall(request_bytes("GET", "/"))
            self.assert_own_error(read_reply(clients[-1]), 503)
            self.assertEqual(self.rrouter.health()["status"], "ok")
            self.rrouter.home.run("antigravity", check=0)
            clients[0].sendall(request_bytes("GET", "/"))
            self.assertEqual(read_reply(clients[0]).status, 200)
        wait_until(lambda: self.get().status == 200)
        self.assert_nothing_gathered(before, 24 * 1024)     # the allocator keeps some memory

    def test_hundred_connections_in_the_queue_are_all_served(self):
        """rrouter is stopped until all of them have connected."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.rrouter.process.send_signal, signal.SIGCONT)
            self.rrouter.process.send_signal(signal.SIGSTOP)
            clients = [stack.enter_context(self.rrouter.connect()) for _ in range(100)]
            for number, client in enumerate(clients):
                client.sendall(request_bytes("POST", "/v1/messages", chat("m%d" % number)))
            self.rrouter.process.send_signal(signal.SIGCONT)
            self.assertEqual([read_reply(client).header("x-rrouter-model") for client in clients],
                             ["m%d" % number for number in range(100)])

    def test_announced_bodies_take_no_memory_before_they_arrive(self):
        before = usage_of(self.rrouter.process).resident_kb
        with contextlib.ExitStack() as stack:
            for _ in range(10):
                client = stack.enter_context(self.rrouter.connect())
                client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\n"
                               b"Content-Length: 60000000\r\n\r\n0123456789")
            self.assertEqual(self.get().status, 200)
            self.assertLess(usage_of(self.rrouter.process).resident_kb - before, 30 * 1024)


class LimitsTest(RouterTest):
    """Requests that take too long or are too large; the time limits are short here."""

    limits = {"HEAD_S": 0.3, "BODY_STALL_S": 0.2, "IDLE_S": 0.3, "WRITE_STALL_S": 0.3,
              "READ_AHEAD_S": 0.2}

    def test_head_that_drips_is_timed_out(self):
        with self.rrouter.connect() as connection:
            for byte in request_bytes("GET", "/" + "a" * 1000):
                if select.select([connection], [], [], 0.02)[0]:
                    break
                connection.sendall(bytes([byte]))
            self.assert_own_error(read_reply(connection), 408)
        self.assertEqual(self.upstream.received, [])

    def test_body_that_stalls_is_timed_out(self):
        for label, framing in (("length", b"Content-Length: 60000000\r\n\r\nabc"),
                               ("chunks", b"Transfer-Encoding: chunked\r\n\r\n9\r\nabc")):
            with self.subTest(label):
                self.assert_refused(b"POST / HTTP/1.1\r\nHost: localhost\r\n" + framing, 408)

    def test_idle_connection_is_closed_without_a_response(self):
        for label, data, expected in (
                ("at once", b"", rb"\A\Z"), ("after line ends", b"\r\n", rb"\A\Z"),
                ("after a response", request_bytes("GET", "/"), rb"\AHTTP/1\.1 200 OK\r\n")):
            with self.subTest(label):
                received = self.rrouter.exchange(data)
                self.assertRegex(received, expected)
                self.assertNotIn(b"408", received)

    def test_connection_of_a_client_that_does_not_read_is_closed(self):
        response = stream(framing="close")
        response.chunks = (bytes(1 << 20) for _ in range(64))
        self.upstream.play(response)
        with self.rrouter.connect() as connection:
            connection.sendall(request_bytes("POST", "/v1/messages", chat()))
            self.upstream.wait(lambda upstream: upstream.closed)

    def test_refusal_whose_body_stalls_is_forwarded(self):
        """The body of a 400 is read first, because it may ask for healing."""
        gate = self.gate()
        self.upstream.play(Response(400, (b"one", b"two"), gate=gate))
        with self.opened() as response:
            self.assertEqual((response.status, receive(response, 3)), (400, b"one"))
            gate.set()
            self.assertEqual(response.read(), b"two")

    def test_413_reaches_a_client_that_sends_its_body_first(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.rrouter.port, timeout=WAIT_S)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/messages", bytes(rrouter.BODY_MAX_BYTES + 1))
            self.assertEqual(connection.getresponse().status, 413)


CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


@unittest.skipUnless(PROC and len(CORES) > 1, "needs Linux and two cores")
class OneCoreTest(RouterTest):
    """While there is much to do, the threads of connections, and they alone, share one core."""

    # Makes the process look busy all the time.
    altered = ("import os, time, types\n"
               "os.times = lambda: types.SimpleNamespace(user=time.monotonic())")
    LOOKS = (
        # label, requests, threads known, seconds since the last look, load, whether they share one
        ("too little to do", 8, 8, 0.2, 0.19, False),
        ("too few requests", 7, 8, 0.2, 1.0, False),
        ("too few threads", 8, 7, 0.2, 1.0, False),
        ("enough", 8, 8, 0.2, 0.21, True),
        ("too soon after the last look", 8, 8, 0.09, 0.0, True),
        ("more", 50, 8, 0.2, 1.1, True),
        ("little", 50, 8, 0.2, 0.19, False))

    def thread(self):
        """Return the native id of a thread that runs now and then until the test ends."""
        end = self.gate()

        def run():
            while not end.wait(0.001):
                pass

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread.native_id

    def test_threads_share_a_core_under_load_and_part_under_a_lower_one(self):
        here, core, now, used_s = os.sched_getaffinity(0), rrouter.OneCore(), 1000.0, 50.0
        thread = self.thread()
        core.look(8, [thread] * 8, now, used_s)     # the first look has nothing to compare with
        for what, active, known, seconds, share, shared in self.LOOKS:
            with self.subTest(what):
                now, used_s = now + seconds, used_s + share * seconds
                core.look(active, [thread] * known, now, used_s)
                self.assertEqual(len(os.sched_getaffinity(thread)), 1 if shared else len(here))
                self.assertEqual(os.sched_getaffinity(0), here)
        core.look(8, [2 ** 22 + 1] * 8, now + 1, used_s + 1)    # threads that have ended

    def test_threads_run_only_on_cores_that_the_user_allows(self):
        first, last, thread = {min(CORES)}, {max(CORES)}, self.thread()

        def look_about():
            """Act as the watcher, whose allowed cores change, too."""
            core = rrouter.OneCore()
            for second, (allowed, used_s) in enumerate(((first, 1), (last, 2), (CORES, 2)), 1):
                for one in (threading.get_native_id(), thread):
                    os.sched_setaffinity(one, allowed)
                time.sleep(0.01)        # the thread runs where it may
                core.look(8, [thread] * 8, second, used_s)
                yield os.sched_getaffinity(thread)

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            places = pool.submit(lambda: list(look_about())).result(WAIT_S)
        self.assertEqual(places, [first, last, CORES])

    def kept_to_one_core(self):
        """Return, for each thread of the process, whether it keeps to one core."""
        kept = []
        for task in pathlib.Path("/proc/%d/task" % self.rrouter.process.pid).iterdir():
            with contextlib.suppress(OSError):
                kept.append(len(os.sched_getaffinity(int(task.name))) == 1)
        return kept

    def test_threads_of_real_connections_share_a_core_and_part_again(self):
        gate = self.gate()
        self.upstream.default = stream(event("ping"), event("message_stop"), gate=gate)
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(self.rrouter.connect()) for _ in range(9)]
            for connection in streams:
                connection.sendall(request_bytes(body=b'{"model":"m"}', port=self.rrouter.port))
            wait_until(lambda: sum(self.kept_to_one_core()) >= 9)
            self.assertFalse(all(self.kept_to_one_core()))
            gate.set()
            for connection in streams:
                self.assertTrue(read_reply(connection).complete)
            wait_until(lambda: not any(self.kept_to_one_core()))


@unittest.skipUnless(PROC, "memory is read from /proc")
class MemoryWithoutCollectorTest(RouterTest):
    """An ended request leaves no memory in use, even without the garbage collector."""

    altered = "import gc\ngc.disable()"
    RESPONSES = (
        Response(framing="length"), stream(), error(500),
        Response(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"),
        Response(raw=b"HTTP/1.1 400 Bad\r\nContent-Length: 9\r\n\r\n{"),
        Response(raw=b"HTP\r\n\r\n"), Response(raw=b""))
    BODY = chat(padding="x" * (200 << 10))

    def test_bodies_do_not_stay_in_memory_whatever_the_response(self):
        for mode in ("claude", "auto"):
            with self.subTest(mode):
                self.rrouter.home.write("mode", mode + "\n")
                resident_kb = []
                for rounds in (4, 10):
                    for response in self.RESPONSES * rounds:
                        self.upstream.default = response
                        self.rrouter.request(body=self.BODY)
                    resident_kb.append(usage_of(self.rrouter.process).resident_kb)
                self.assertLess(resident_kb[1] - resident_kb[0], 10 * 200 / 2)


class Megabytes:
    """An iterable of `count` numbered chunks of a megabyte; `sent` counts those yielded."""

    def __init__(self, count):
        self.count, self.sent = count, 0

    def __iter__(self):
        while self.sent < self.count:
            self.sent += 1
            yield b"%08d" % self.sent * (1 << 17)

    def wait_until_blocked(self):
        """Return when no chunk has been yielded for 0.3 s."""
        quiet = -1
        while quiet != self.sent:
            quiet = self.sent
            time.sleep(0.3)


class ParallelStreamsTest(LoadTest):

    STREAMS, PAUSE_S = 50 if SOAKING else 30, 0.05
    SECONDS = 60 if SOAKING else 1
    SEED = os.environ.get("RROUTER_SOAK") or 20260129

    def events(self, mark):
        dice = random.Random("%s %s" % (self.SEED, mark))
        texts = [chr(dice.randrange(0x20, 0xd7ff)) * (20_000 if dice.random() < 0.02 else
                                                      dice.randrange(200))
                 for _ in range(int(self.SECONDS / self.PAUSE_S))]
        return [event("content_block_delta", mark=mark, text=text) for text in texts] + [
            event("message_stop", mark=mark)]

    def test_each_client_gets_all_events_of_its_stream(self):
        """Half of the streams begin in another mode."""
        before, marks = self.at_rest(), ["mark-%d" % number for number in range(self.STREAMS)]
        self.upstream.clear()
        self.upstream.default = lambda received: Response() if received.method == "GET" else stream(
            *self.events(received.model), pause_s=self.PAUSE_S)
        with concurrent.futures.ThreadPoolExecutor(self.STREAMS) as pool:
            replies = []
            for mode, some in (("claude", marks[::2]), ("auto", marks[1::2])):
                self.rrouter.home.write("mode", mode)
                replies += [(mark, pool.submit(self.rrouter.post, mark)) for mark in some]
                self.upstream.wait(lambda upstream: len(upstream.received) == len(replies))
            self.assertEqual(self.rrouter.health()["activeRequests"], self.STREAMS)
            for mark, reply in replies:
                reply = reply.result(self.SECONDS * 4 + WAIT_S)
                self.assertEqual((reply.status, reply.complete), (200, True))
                self.assertTrue(reply.body == b"".join(self.events(mark)), mark)
        self.assert_nothing_gathered(before, 16 * 1024)

    def test_client_that_stops_reading_stops_only_its_stream(self):
        def resident_kb():
            return usage_of(self.rrouter.process).resident_kb

        stays, leaves = Megabytes(100), Megabytes(100)
        for chunks in (Megabytes(8), stays, leaves):
            response = stream(b"")
            response.chunks = chunks
            self.upstream.play(response)
        with self.opened() as response:         # allocates what is kept
            self.assertEqual(len(response.read()), 8 << 20)
        before = resident_kb()
        with self.opened() as response:
            with self.opened():
                stays.wait_until_blocked()
                leaves.wait_until_blocked()
                for _ in range(5):
                    self.assertEqual(self.rrouter.post().body, b"{}")
                self.assertLess(stays.sent, 60)
                self.assertLess(leaves.sent, 60)
                self.assertLess(resident_kb() - before, 8 * 1024)
            start = time.monotonic()
            self.upstream.wait(lambda upstream: upstream.closed)
            self.assertLess(time.monotonic() - start, 2)    # a second, and one for a busy machine
            for block in Megabytes(100):
                self.assertTrue(response.read(1 << 20) == block, "not %r" % block[:8])
            self.assertEqual(response.read(), b"")
        self.assertEqual(self.upstream.closed, 1)
        self.assertLess(resident_kb() - before, 8 * 1024)


class LeftoversTest(LoadTest):
    """Requests of all kinds, good and broken, leave no thread, descriptor or memory."""

    WARM_UP, REQUESTS, CLIENTS = 150, 15000 if SOAKING else 250, 6
    SEED = os.environ.get("RROUTER_SOAK") or 20260129
    config = dict(DEFAULT_CONFIG, auto={"cooldownMinutes": [0.001]})
    RESPONSES = {
        # kind: the response, the client's status in every mode, whether the client gets all of it
        "plain": (Response(), 200, True),
        "stream": (stream(), 200, True),
        "close": (Response(close=True), 200, True),
        "long": (Response(200, (bytes(100_000),) * 5), 200, True),
        "busy": (error(429), 429, True),
        "down": (error(503), 503, True),
        "refused": (error(400), 400, True),
        "hangup": (Response(hangup=True), 502, True),
        "garbage": (Response(raw=b"garbage\r\n"), 502, True),
        "cut": (stream(event("content_block_delta"), cut=True), 200, False)}

    def respond(self, received):
        kind = received.target.rpartition("/")[2]
        if kind == "silent":
            return Response(before=self.never)
        if kind == "pausing":
            return stream(event("content_block_delta"), event("message_stop"), gate=self.never)
        return self.RESPONSES.get(kind, (Response(),))[0]

    def act(self, number):
        """Make the request that the seed and its number choose."""
        dice = random.Random("%s %d" % (self.SEED, number))
        size = dice.randrange(200_000, 1_500_000)
        post = functools.partial(request_bytes, "POST")
        upload = post("/v1/plain", chat(padding="x" * size))
        others = {
            # kind: the bytes sent, the statuses awaited before the client leaves
            "kept": (post("/v1/plain", chat()) * 3, [200] * 3),
            "upload": (upload, [200]),
            "chunked": (post("/v1/plain", fields=[("Transfer-Encoding", "chunked")])
                        + b"%x\r\n%b\r\n0\r\n\r\n" % (size, bytes(size)), [200]),
            "leaves uploading": (upload[:size // 2], []),
            "leaves early": (post("/v1/silent", chat()), []),
            "leaves late": (post("/v1/pausing", chat()), [200]),
            "malformed": (b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n", [400])}
        kind = dice.choice((*self.RESPONSES, *others))
        if number % 40 == 0:
            put(self.rrouter.home, "mode", dice.choice(("antigravity", "claude", "auto")))
        if kind in self.RESPONSES:
            reply = self.rrouter.post(target="/v1/" + kind, padding="x" * dice.randrange(2000))
            self.assertEqual((reply.status, reply.complete), self.RESPONSES[kind][1:], kind)
            return
        data, statuses = others[kind]
        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            connection.sendall(data)
            for status in statuses:
                self.assertEqual(read_head(reader)[0] if kind == "leaves late"
                                 else read_reply_from(reader).status, status)

    def test_threads_descriptors_and_memory_do_not_grow(self):
        if SOAKING:
            print("soak: seed %s, %d requests, good and broken" % (
                self.SEED, self.REQUESTS), file=sys.stderr)
        self.never = self.gate()
        self.upstream.default = self.respond
        with concurrent.futures.ThreadPoolExecutor(self.CLIENTS) as pool:
            list(pool.map(self.act, range(self.WARM_UP)))
            before = self.at_rest()
            list(pool.map(self.act, range(self.WARM_UP, self.WARM_UP + self.REQUESTS)))
        self.assert_nothing_gathered(before)
        self.assertEqual(self.rrouter.health()["activeRequests"], 0)


@unittest.skipUnless(resource, "needs limits")
class FewDescriptorsTest(LoopbackTest):

    @unittest.skipUnless(PROC and hasattr(resource, "prlimit"), "needs Linux")
    def test_mode_written_while_no_descriptor_is_free_is_in_force_later(self):
        """The file cannot be read meanwhile, but clients that have a connection are served."""
        poor, crowd = self.start_rrouter(self.start_upstream()), contextlib.ExitStack()
        with crowd, poor.connect() as kept, kept.makefile("rb") as reader:

            def ask(method, target, body=None):
                kept.sendall(request_bytes(method, target, body))
                return read_reply_from(reader)

            def target():
                return ask("POST", "/v1/messages", chat()).header("x-rrouter-target")

            def descriptors():
                return len(os.listdir("/proc/%d/fd" % poor.process.pid))

            self.assertEqual(target(), "antigravity")
            resource.prlimit(poor.process.pid, resource.RLIMIT_NOFILE, (64, 64))
            for _ in range(200):
                client = crowd.enter_context(socket.socket())
                client.setblocking(False)           # connects beyond the backlog get no response
                client.connect_ex(("127.0.0.1", poor.port))
            wait_until(lambda: descriptors() >= 64)
            poor.home.write("mode", "claude")
            wait_until(lambda: "too many open files" in str(
                ask("GET", "/health").json()["problems"]))
            used = processor_seconds(poor.process.pid)
            time.sleep(0.5)
            self.assertLess(processor_seconds(poor.process.pid) - used, 0.25)
            self.assertEqual(target(), "antigravity")
            crowd.close()
            wait_until(lambda: descriptors() < 40)
            self.assertEqual(target(), "claude")
            wait_until(lambda: ask("GET", "/health").json()["problems"] == [])
            self.assertEqual(poor.post().status, 200)

    def test_cap_on_connections_fits_a_low_limit_of_descriptors(self):
        """Some of 200 clients are served, and the others are refused or closed."""
        code = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
        poor, served = self.start_rrouter(self.start_upstream(), code=code), []
        request = request_bytes("POST", "/v1/messages", chat())
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(poor.connect()) for _ in range(200)]
            for client in clients:
                with contextlib.suppress(ConnectionError):
                    client.sendall(request)
                    reply = read_reply(client)
                    self.assertIn(reply and reply.status, (200, 503, None))
                    served += [client] if reply and reply.status == 200 else []
            self.assertGreaterEqual(len(served), 10)
            for client in served:
                client.sendall(request)
                self.assertEqual(read_reply(client).status, 200)
        wait_until(lambda: poor.post().status == 200)
        self.assertNotIn("[ERROR]", poor.log())


class LongStreamTest(RouterTest):
    """Gaps longer than rrouter's time limits end no response and hide no client that leaves."""

    PINGS, GAP_S = 3, 0.8
    if SOAKING:
        PINGS, GAP_S = int(os.environ.get("RROUTER_SOAK_STREAM_S") or 120) // 15, 15
    config = {"modes": {"antigravity": {"mappings": []}, "claude": {"mappings": []}},
              "defaultMode": "claude", "auto": {"firstByteTimeoutSeconds": 0.5}}

    def begin(self, mode, response):
        self.upstream.play(response)
        self.rrouter.home.write("mode", mode)
        before = len(self.upstream.received)
        connection = http.client.HTTPConnection("127.0.0.1", self.rrouter.port,
                                                timeout=self.PINGS * self.GAP_S + WAIT_S)
        self.addCleanup(connection.close)
        connection.request("POST", "/v1/messages", chat())
        self.upstream.wait(lambda upstream: len(upstream.received) > before)
        return connection

    def test_gaps_end_no_stream(self):
        first, ping, stop = event("content_block_delta"), event("ping"), event("message_stop")
        pings, speak, go_on, never = [ping] * self.PINGS, self.gate(), self.gate(), self.gate()
        go_on.set()
        silent = self.begin("claude", stream(before=speak))
        ended = self.begin("auto", stream(first, *pings, stop, pause_s=self.GAP_S))
        endless = self.begin("claude", stream(first, *pings, ping, pause_s=self.GAP_S,
                                              gate=[go_on] * (self.PINGS + 1) + [never]))
        for connection in (ended, endless):
            connection.response = response = connection.getresponse()
            self.addCleanup(response.close)
            self.assertEqual((response.status, receive(response, len(first))), (200, first))
        for _ in pings:
            for connection in (ended, endless):
                self.assertEqual(receive(connection.response, len(ping)), ping)
        speak.set()
        self.assertEqual(ended.response.read(), stop)
        with contextlib.closing(silent.getresponse()) as response:
            self.assertEqual((response.status, response.read()),
                             (200, b"".join(stream().chunks)))
        self.assertEqual(self.upstream.closed, 0)
        endless.response.close()
        endless.close()
        left = time.monotonic()
        self.upstream.wait(lambda upstream: upstream.closed)
        self.assertLess(time.monotonic() - left, 2)         # a second, and one for a busy machine
        wait_until(lambda: self.rrouter.health()["activeRequests"] == 0)


# Daemon and state #############################################################

class ListenTest(LoopbackTest):
    """Ports that are taken, and addresses other than localhost."""

    def test_taken_port_is_named_with_its_owner(self):
        upstream = self.start_upstream(                 # resembles rrouter
            Response(200, b'{"status":"ok","autoSwitch":{}}', framing="length"))
        home = self.make_home(port=upstream.port)
        serve, start, check = (home.run(word, timeout=WAIT_S * 2)
                               for word in ("serve", "start", "check"))
        for done in (serve, start):
            self.assertEqual(done.returncode, 1, done)
            self.assertRegex(done.stderr, r"(?m)^rrouter: ")
        for text in (serve.stderr, start.stderr, check.stdout):
            self.assertIn("port %d" % home.port, text)
            self.assertIn("RROUTER_PORT", text)
            self.assertRegex(text, "(?i)CLIProxyAPI.*pprof")
            if LINUX:
                self.assertRegex(text, r"\b%d\b" % os.getpid())
        self.assertIn("fail  daemon: not running: port", text)
        wait_until(lambda: processes(home) == [])
        self.assertFalse((home.dir / "rrouter.pid").exists())

    def test_lsof_names_the_owner_where_there_is_no_proc(self):
        home = self.make_home()
        (home.root / "lsof").write_text("#!/bin/sh\nprintf 'p47\\ncsome program\\nf3\\n'\n")
        (home.root / "lsof").chmod(0o700)
        with mock.patch("os.path.isdir", return_value=False), \
                mock.patch.dict(os.environ, PATH=str(home.root)):
            self.assertEqual(rrouter.port_owner(1), "some program (pid 47)")

    def test_owner_and_upstream_that_drip_without_end_delay_no_command(self):
        for raw, commands in (
                ((b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 300), {"start": 1, "status": 3}),
                ((b"HTTP/1.1 200 OK\r\n\r\n", *[b" "] * 300), {"serve": 1, "check": 1})):
            upstream = self.start_upstream(Response(raw=raw, pause_s=0.1))
            home = self.make_home(upstream, port=upstream.port)
            for command, status in commands.items():
                home.run(command, check=status, timeout=WAIT_S)

    def test_address_that_cannot_be_bound_is_named(self):
        """One address in use is enough, even if the other one is free."""
        home = self.make_home()
        with socket.socket(socket.AF_INET6) as holder:
            holder.bind(("::1", home.port))
            for env, word in (({}, home.port), ({"RROUTER_HOST": "203.0.113.1"}, "203.0.113.1")):
                done = home.run("serve", check=1, env=env, timeout=WAIT_S * 2)
                self.assertRegex(done.stderr, r"(?m)^rrouter: .*\b%s\b" % word)

    @unittest.skipUnless(LINUX, "only Linux has all of 127/8 on loopback")
    def test_another_host_is_bound_instead_of_localhost(self):
        home = self.make_home(self.start_upstream(), env={"RROUTER_HOST": "127.0.0.2"})
        ending_with(self, home.begin("serve"))
        health = wait_until(lambda: get_health(home.port, "127.0.0.2"))
        self.assertEqual(health["listenAddr"], "127.0.0.2:%d" % home.port)
        self.assertIsNone(home.health())                # 127.0.0.1 is not bound
        home.run("status", check=0)

    # Two lines of /etc/hosts give one address twice.
    TWICE = ("import socket\nreal = socket.getaddrinfo\nsocket.getaddrinfo ="
             " lambda host, *others, **options: real('127.0.0.1', *others, **options) * 2")

    def test_host_header_is_checked_on_loopback_only_and_given_names_are_allowed(self):
        allowed = {"RROUTER_HOST": "127.0.0.1",
                   "RROUTER_ALLOWED_HOSTS": "host.docker.internal, Box"}
        for env, code, statuses, warns in (
                (allowed, "", {b"host.docker.internal:8316": 200, b"BOX.": 200, b"localhost": 200,
                               b"evil.com": 403}, False),
                ({"RROUTER_HOST": "0.0.0.0"}, "", {b"box.lan": 200}, True),
                ({"RROUTER_HOST": "box"}, self.TWICE, {b"box": 200}, False)):
            router = self.start_rrouter(self.start_upstream(), env=env, code=code)
            for host, status in statuses.items():
                reply = read_reply_from(io.BytesIO(router.exchange(
                    b"GET / HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n" % host)))
                self.assertEqual(reply.status, status, host)
                self.assertEqual(b"RROUTER_ALLOWED_HOSTS" in reply.body, status == 403)
            self.assertEqual("can spend your quota" in router.log(), warns)


class DrainTest(LoopbackTest):
    """The end of the process while a stream is under way."""

    def setUp(self):
        self.opened = self.gate()
        self.upstream = self.start_upstream(
            stream(event("ping"), event("message_stop"), gate=self.opened))
        self.rrouter = self.start_rrouter(self.upstream)
        self.connection = self.rrouter.connect()
        self.addCleanup(self.connection.close)
        self.reader = self.connection.makefile("rb")
        self.addCleanup(self.reader.close)
        self.connection.sendall(request_bytes(body=b'{"model":"m"}', port=self.rrouter.port))
        self.assertEqual(read_head(self.reader)[0], 200)

    def finish_stream(self):
        self.assertIsNone(self.rrouter.process.poll())
        self.opened.set()
        self.assertEqual(read_chunks(self.reader), (event("ping") + event("message_stop"), True))
        self.assertEqual(self.rrouter.process.wait(WAIT_S), 0)

    def test_stop_waits_for_the_stream_and_admits_no_new_request(self):
        home = self.rrouter.home
        done = home.run("start", check=0)           # finds `serve` running
        self.assertRegex(done.stdout, r"(?i)already running.*\b%d\b" % self.rrouter.process.pid)
        with self.rrouter.connect() as idle:
            stops = [ending_with(self, home.begin("stop"))]
            self.assertEqual(read_all(idle), b"")
        self.assertRaises(OSError, self.rrouter.connect)
        wait_until(lambda: "stopping" in home.read("rrouter.lock"))
        stops.append(ending_with(self, home.begin("stop")))     # sends no second signal
        for _ in range(2):                                      # takes as long as sending one
            self.assertIn("is stopping", home.run("status", check=3).stdout)
        self.assertEqual([stop.poll() for stop in stops], [None, None])
        self.finish_stream()
        self.assertEqual([stop.wait(WAIT_S) for stop in stops], [0, 0])
        socket.create_server(("127.0.0.1", self.rrouter.port)).close()
        for name in ("rrouter.pid", "run.json"):
            self.assertFalse((home.dir / name).exists())

    def test_start_during_the_drain_waits_for_its_end(self):
        home, pid = self.rrouter.home, self.rrouter.process.pid
        self.rrouter.process.send_signal(signal.SIGINT)
        wait_until(lambda: "stopping" in home.read("rrouter.lock"))
        self.addCleanup(home.run, "stop")
        starting = ending_with(self, home.begin("start"))
        home.run("status", check=3)                 # `start` looks at the lock meanwhile
        self.assertIsNone(starting.poll())
        self.finish_stream()
        self.assertEqual(starting.wait(WAIT_S * 2), 0)
        self.assertNotEqual(home.health()["pid"], pid)


class CutOffTest(LoopbackTest):
    """Requests that the drain does not wait for."""

    def test_second_signal_breaks_the_response_off_and_the_request_is_logged(self):
        for version, at_once in ((b"1.1", False), (b"1.0", False), (b"1.1", True)):
            with self.subTest(version, at_once=at_once):
                upstream = self.start_upstream(stream(
                    event("ping"), event("message_stop"), gate=self.gate(), framing="close"))
                running = self.start_rrouter(upstream)
                with running.connect() as connection, connection.makefile("rb") as reader:
                    request = request_bytes(body=b'{"model":"m"}', port=running.port)
                    connection.sendall(request.replace(b"HTTP/1.1", b"HTTP/" + version))
                    self.assertEqual(read_head(reader)[0], 200)
                    for number in [signal.SIGSTOP] * at_once + [signal.SIGTERM]:
                        running.process.send_signal(number)
                    if not at_once:
                        wait_until(lambda: "[STOP] SIGTERM" in running.log())
                    for number in (signal.SIGINT, signal.SIGCONT):
                        running.process.send_signal(number)
                    self.assertEqual(running.process.wait(WAIT_S), 0)
                    if version == b"1.0":               # without chunks only a reset shows it
                        self.assertRaises(ConnectionResetError, reader.read)
                    else:
                        self.assertFalse(read_chunks(reader)[1])
                self.assertEqual(len(request_lines(running.log())), 1)

    def test_connection_beyond_the_reserve_is_refused_with_a_reason(self):
        running = self.start_rrouter(
            self.start_upstream(), limits={"CONNECTIONS_MAX": 2, "CONNECTIONS_RESERVE": 1})
        with contextlib.ExitStack() as stack:
            idle = [stack.enter_context(running.connect()) for _ in range(4)]
            refused = select.select(idle, [], [], WAIT_S)[0][0]
            self.assert_error(read_reply(refused), 503, "too many connections (2)")


class DaemonTestBase(LoopbackTest):
    """Base of the tests with daemons; they end with the test or the class."""

    @classmethod
    def setUpClass(cls):
        cls.upstream = Upstream(stream())
        cls.addClassCleanup(cls.upstream.close)

    @classmethod
    def new_home(cls, add_cleanup, *arguments, **options):
        home = Home(cls.upstream, *arguments, **options)
        add_cleanup(cls.end, home)
        return home

    @staticmethod
    def end(home):
        if not LINUX:
            home.run("stop")
        for pid in processes(home):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        home.remove()

    def sleeper(self):
        return ending_with(self, subprocess.Popen(["sleep", "600"]))

    def assert_alone(self, home):
        """One daemon runs, answers, and is named by pid file and lock; return its pid."""
        health = home.health()
        self.assertIsNotNone(health, "no daemon answers")
        for name in ("rrouter.pid", "rrouter.lock"):
            self.assertEqual(home.read(name).split()[0], str(health["pid"]), name)
        if LINUX:
            # A daemon that lost the race for the lock, or has just released it, may still run.
            wait_until(lambda: processes(home) == [health["pid"]])
        return health["pid"]

    @staticmethod
    @contextlib.contextmanager
    def held(home, line):
        """Hold the lock of this home, with `line` (bytes) in it."""
        with open(str(home.dir / "rrouter.lock"), "wb", buffering=0) as holder:
            fcntl.flock(holder, fcntl.LOCK_EX)
            holder.write(line)
            yield

    def assert_nothing_left(self, home):
        wait_until(lambda: processes(home) == [])
        self.assertFalse((home.dir / "rrouter.pid").exists())
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            socket.create_server((address, home.port), family=family).close()


class RunningDaemonTest(DaemonTestBase):
    """One daemon, started under umask 0 by a process that holds a pipe open."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.home = cls.new_home(cls.addClassCleanup, "antigravity", HASTY_CONFIG)
        cls.pipe, writer = os.pipe()
        cls.addClassCleanup(os.close, cls.pipe)
        mask = os.umask(0)
        try:
            cls.started = cls.home.run(
                "start", program=[sys.executable, os.path.relpath(RROUTER)], pass_fds=(writer,))
        finally:
            os.umask(mask)
            os.close(writer)
        cls.health = cls.home.health()

    def setUp(self):
        self.upstream.clear()
        self.addCleanup(put, self.home, "mode", "antigravity\n")
        self.addCleanup(put, self.home, "config.json", json.dumps(HASTY_CONFIG))

    def test_daemon_is_detached(self):
        pid = self.assert_alone(self.home)
        self.assertNotEqual(os.getsid(pid), os.getsid(0))
        self.assertEqual(os.read(self.pipe, 1), b"", "holds a descriptor of its starter")
        if LINUX:
            process = pathlib.Path("/proc", str(pid))
            fields = process.joinpath("stat").read_text().rpartition(")")[2].split()
            self.assertEqual(int(fields[4]), 0)         # no terminal
            self.assertEqual(os.readlink(str(process / "cwd")), "/")
            self.assertEqual(os.readlink(str(process / "fd" / "0")), "/dev/null")

    def test_files_are_private(self):
        for path in [self.home.dir, *self.home.dir.rglob("*")]:
            if path.name not in ("mode", "config.json"):            # which the test wrote
                with self.subTest(path.name):
                    self.assertEqual(stat.S_IMODE(path.stat().st_mode),
                                     0o700 if path.is_dir() else 0o600)

    def test_output_of_start_run_json_and_lock_identify_the_daemon(self):
        self.assertEqual((self.started.returncode, self.started.stderr), (0, ""))
        self.assertIn("rrouter runs on localhost:%d (pid %d), mode antigravity\n" % (
            self.home.port, self.health["pid"]), self.started.stdout)
        run = json.loads(self.home.read("run.json"))
        expected = {"host": "localhost", "port": self.home.port, "pid": self.health["pid"],
                    "upstream": self.upstream.url, "startedBy": "start",
                    "instance": self.health["instance"]}
        self.assertEqual({name: run[name] for name in expected}, expected)
        self.assertRegex(self.health["instance"], r"\A[0-9a-f]{16}\Z")
        self.assertEqual(self.home.read("rrouter.lock"), "%d %s %s %d\n" % (
            run["pid"], run["instance"], socket.gethostname(),
            os.stat("/proc/self/ns/pid").st_ino if LINUX else 0))

    def test_daemon_is_found_whatever_port_the_shell_sets(self):
        put(self.home, "mode", "nosuch\n")
        as_json, status, start = self.home.run_all(
            ("status", "--json"), ("status",), ("start",), check=0,
            env={"RROUTER_PORT": str(free_port())})
        self.assertLessEqual(set(HEALTH), set(json.loads(as_json.stdout)))
        pid, port = self.health["pid"], self.home.port
        self.assertIn("already running (pid %d, port %d)" % (pid, port), start.stdout)
        for words in ("claude", self.upstream.url + ", a program listens there", "pid %d" % pid,
                      "`rrouter start`", "nosuch"):
            self.assertIn(words, status.stdout)

    def test_mode_commands_return_when_the_switch_is_in_force(self):
        """While config.json is invalid, the last valid one is in force."""
        for mode, config in (("claude", "{"), ("antigravity", json.dumps(HASTY_CONFIG))):
            put(self.home, "config.json", config)
            done = self.home.run(mode, check=0, env={"RROUTER_PORT": str(free_port())})
            self.assertEqual(self.home.health()["mode"], mode)
            self.assertIn(mode, done.stdout)
            self.assertNotRegex(done.stdout + done.stderr, "(?i)not running|no daemon")

    def test_daemon_reads_the_files_again_on_sighup(self):
        os.kill(self.health["pid"], signal.SIGHUP)
        wait_until(lambda: "SIGHUP: files read again" in self.home.read("logs/rrouter.log"))
        self.assertEqual(self.assert_alone(self.home), self.health["pid"])

    def test_another_rrouter_on_the_same_port_is_refused(self):
        other = self.new_home(self.addCleanup, port=self.home.port)
        for home, command, remedy in ((other, "start", "set RROUTER_PORT"),
                                      (self.home, "serve", "`rrouter stop` stops it")):
            done = home.run(command, check=1, timeout=WAIT_S * 2)
            self.assertRegex(done.stderr, r"\Arrouter: .* \(pid %d\).*: %s\n\Z" % (
                self.health["pid"], remedy))
        self.assertNotIn("[", other.read("logs/rrouter.log"))
        self.assertEqual(processes(other), [])

    def test_serve_in_the_same_home_leaves_the_files_of_the_daemon_alone(self):
        names = ("rrouter.pid", "run.json", "rrouter.lock")
        before = [self.home.read(name) for name in names]
        beside = copy.copy(self.home)
        beside.port = free_port()
        beside.env = dict(self.home.env, RROUTER_PORT=str(beside.port))
        with Running(self.upstream, home=beside) as router:
            wait_until(lambda: re.search("(?i)shar.*config|config.*shar", router.printed()))
            self.assertEqual(router.health()["mode"], "antigravity")
            status = json.loads(self.home.run("status", "--json", check=0).stdout)
            self.assertEqual(status["pid"], self.health["pid"])
        self.assertEqual([self.home.read(name) for name in names], before)
        self.assertEqual(self.home.health()["pid"], self.health["pid"])


class DaemonLifeTest(DaemonTestBase):

    def started(self, *arguments, **options):
        """Return a home and the pid of the daemon that `start` began in it."""
        home = self.new_home(self.addCleanup, *arguments, **options)
        home.run("start", check=0)
        return home, self.assert_alone(home)

    def test_restart_starts_or_replaces_a_daemon_and_stop_leaves_nothing(self):
        home = self.new_home(self.addCleanup)
        home.run("restart", check=0)
        first, instance = self.assert_alone(home), home.health()["instance"]
        with socket.create_connection(("127.0.0.1", home.port), WAIT_S) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
                               b"Connection: close\r\n\r\n")
            read_all(connection)            # rrouter closes first: its side stays in TIME_WAIT
        done = home.run("restart", check=0)
        self.assertNotIn("in use", done.stdout + done.stderr)
        self.assertNotEqual(self.assert_alone(home), first)
        self.assertNotEqual(home.health()["instance"], instance)
        done = home.run("stop", check=0, env={"RROUTER_PORT": str(free_port())})
        self.assertRegex(done.stdout, "(?i)stopped")
        self.assert_nothing_left(home)
        home.run("status", check=3)

    def test_restart_keeps_the_settings_that_the_shell_does_not_set(self):
        home, _ = self.started(env={"RROUTER_HOST": "127.0.0.1", "RROUTER_ALLOWED_HOSTS": "a,b"})
        unset = dict.fromkeys(rrouter.DEFAULT_ENVIRONMENT, "")

        def run_file():
            return {name: value for name, value in json.loads(home.read("run.json")).items()
                    if name != "instance"}

        before = run_file()
        self.assertEqual(before["allowedHosts"], "a,b")
        home.run("restart", check=0, env=unset)
        after = run_file()
        self.assertNotEqual(after["pid"], before["pid"])
        self.assertEqual(after, dict(before, pid=after["pid"]))
        home.run("restart", check=0, env=dict(unset, RROUTER_UPSTREAM="http://127.0.0.1:9"))
        after = run_file()
        self.assertEqual(after, dict(before, pid=after["pid"], upstream="http://127.0.0.1:9"))
        os.kill(after["pid"], signal.SIGKILL)
        wait_until(lambda: home.run("status", env=unset).returncode == 3)
        home.run("restart", check=0, env=unset)
        self.assertEqual(run_file()["port"], home.port)

    def test_files_that_were_removed_or_moved_away_are_written_again(self):
        home, pid = self.started("auto")
        away = home.root.with_name(home.root.name + " away")
        self.addCleanup(shutil.rmtree, str(away), ignore_errors=True)

        def log_problems():
            return [text for text in home.health()["problems"] if text.startswith("rrouter.log")]

        for come_back in (lambda: away.rename(home.root), home.root.mkdir):
            home.root.rename(away)
            wait_until(log_problems)
            self.assertFalse(home.root.exists())
            come_back()
            wait_until(lambda: not log_problems() and (home.dir / "run.json").exists())
            self.assertEqual(self.assert_alone(home), pid)
        home.remove_directory()
        wait_until((home.dir / "state.json").exists)
        wait_until(lambda: "was removed" in home.read("logs/rrouter.log"))
        for path in (home.dir, home.dir / "rrouter.lock"):
            self.assertEqual(path.stat().st_mode & 0o077, 0)
        other = {"RROUTER_PORT": str(free_port())}
        self.assertIn("in force: pid %d," % pid, home.run("auto", check=0, env=other).stdout)
        self.assertIn("stopped", home.run("stop", check=0, env=other).stdout)
        self.assert_nothing_left(home)

    def test_directory_of_another_daemon_is_left_alone(self):
        home, pid = self.started()
        with open(home.dir.with_name("lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.kill(pid, signal.SIGSTOP)
            home.dir.rename(home.dir.with_name("old"))
            home.dir.mkdir()
            home.dir.with_name("lock").rename(home.dir / "rrouter.lock")
            os.kill(pid, signal.SIGCONT)
            wait_until((home.dir / "logs" / "rrouter.log").exists)
            time.sleep(0.5)                             # two rounds of the watcher
            self.assertFalse((home.dir / "run.json").exists())
            self.assertEqual(home.read("rrouter.lock"), "")
        wait_until((home.dir / "run.json").exists)
        self.assertEqual(self.assert_alone(home), pid)

    def test_files_of_a_killed_daemon_hinder_nothing_even_if_they_name_another_process(self):
        (home, killed), sleeper = self.started(), self.sleeper()
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: home.health() is None)
        for name in ("rrouter.pid", "rrouter.lock", "run.json"):
            home.write(name, home.read(name).replace(str(killed), str(sleeper.pid)))
        home.run("status", check=3)
        self.assertIn("not running", home.run("stop", check=0).stdout)
        home.run("start", check=0)
        self.assertNotEqual(self.assert_alone(home), killed)
        put(home, "rrouter.pid", "%d\n" % sleeper.pid)
        home.run("stop", check=0)
        wait_until(lambda: processes(home) == [])
        self.assertIsNone(sleeper.poll())

    def test_daemon_of_a_version_that_wrote_only_its_pid_is_stopped(self):
        home, pid = self.started()
        home.write("rrouter.lock", "%d\n" % pid)
        run = json.loads(home.read("run.json"))
        del run["instance"]
        home.write("run.json", json.dumps(run))
        self.assertRegex(home.run("stop", check=0).stdout, r"stopped \(pid %d\)" % pid)
        self.assert_nothing_left(home)

    def test_closed_standard_streams_do_no_harm(self):
        """The next files opened get the numbers 0 to 2."""
        home = self.new_home(self.addCleanup)
        shell = ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, RROUTER]
        home.run("start", program=shell, check=0)
        self.assert_alone(home)
        home.run("status", program=shell, check=0)
        home.run("stop", check=0)
        process = ending_with(self, home.begin("serve", program=shell))
        wait_until(home.health)
        self.assertEqual(self.assert_alone(home), process.pid)
        process.terminate()
        self.assertEqual(process.wait(WAIT_S), 0)
        for line in home.read("logs/rrouter.log").splitlines():
            self.assertRegex(line, LOG_LINE)


RUN_FILE = ('{"pid": %d, "instance": "%s", "host": "localhost", "port": 1, "startedBy": "start",'
            ' "upstream": ""}')
NO_RUN_FILES = ("", "{", "[]", "7", '{"port": -1}', '{"pid": %(pid)d, "instance": "1f"}',
                '{"pid": %(pid)d, "instance": "1f", "port": "y", "host": 7}', "[" * 100_000)


class FalseFilesTest(DaemonTestBase):
    """Only a held lock proves that a daemon runs; LockTest has the lines in it."""

    def setUp(self):
        self.home = self.new_home(self.addCleanup, "claude")
        self.lock = self.home.dir / "rrouter.lock"

    def test_run_json_that_is_invalid_or_of_another_instance_is_ignored(self):
        """The port then comes from the environment."""
        pid, settings = self.sleeper().pid, rrouter.read_environment(dict(os.environ))
        rows = [(RUN_FILE % (pid, "1f"), 1), (RUN_FILE % (pid, "2e"), settings.port),
                (RUN_FILE % (pid + 1, "1f"), settings.port)]
        rows += [(text % {"pid": pid} if "%" in text else text, settings.port)
                 for text in NO_RUN_FILES]
        with self.held(self.home, f"{pid} 1f {rrouter.own_place()}\n".encode()):
            for text, port in rows:
                with self.subTest(text[:60]):
                    self.home.write("run.json", text)
                    found = rrouter.Daemon.find(rrouter.Paths(str(self.home.root)))
                    self.assertEqual((found.holder.pid, found.port), (pid, port))

    def test_health_of_another_rrouter_is_not_mistaken_for_the_daemon(self):
        with Running(self.upstream) as other:
            home = self.new_home(self.addCleanup, "claude", port=other.port)
            line = "%d ab01 %s\n" % (other.process.pid, rrouter.own_place())
            with self.held(home, line.encode()):
                for command in ("status", "auto"):
                    self.assertRegex(home.run(command, check=1).stderr, "does not answer")

    def test_start_fails_in_time_if_the_held_lock_names_no_process(self):
        code = ("import sys; sys.path.insert(0, %r); import rrouter; rrouter.START_S = 1.2; "
                "rrouter.main()" % str(HERE))
        with self.held(self.home, b"0\n"):
            done = self.home.run("start", program=[*PYTHON, "-c", code], start_new_session=True)
        self.assertEqual((done.returncode, done.stdout), (1, ""), done)
        self.assertRegex(done.stderr, r"\Arrouter: the daemon (does not answer|did not start)")

    def test_fifo_or_directory_instead_of_the_lock_blocks_no_command(self):
        """Opened like a file, a FIFO without a writer would block for ever."""
        os.mkfifo(str(self.lock))
        status, stop, start = self.home.run_all(("status",), ("stop",), ("start",),
                                                timeout=WAIT_S * 2)
        self.lock.unlink()
        self.lock.mkdir()
        serve = self.home.run("serve", timeout=WAIT_S * 2)
        self.assertEqual((status.returncode, stop.returncode), (3, 0))
        self.assertIn("not running", stop.stdout)
        for refused in (start, serve):
            self.assertEqual(refused.returncode, 1, refused)
            self.assertRegex(refused.stderr, r"(?m)^rrouter: .*rrouter\.lock: .*regular file")
        self.assertEqual(processes(self.home), [])


class StartRaceTest(DaemonTestBase):

    def test_simultaneous_starts_leave_one_daemon(self):
        home = self.new_home(self.addCleanup)
        for number in range(50 if SOAKING else 1):
            with self.subTest(round=number):
                started = home.run_all(*[("start",)] * 4, check=0)
                pid = self.assert_alone(home)
                for done in started:
                    for word in (pid, home.port):
                        self.assertRegex(done.stdout, r"\b%d\b" % word)
                home.run("stop", check=0)
                self.assertIsNone(home.health())

    @unittest.skipUnless(LINUX, "needs /proc")
    def test_daemon_survives_the_end_of_its_starter(self):
        home = self.new_home(self.addCleanup)
        starter = ending_with(self, home.begin("start"))
        wait_until(lambda: set(processes(home)) - {starter.pid})
        starter.kill()
        self.assertEqual(starter.wait(WAIT_S), -signal.SIGKILL)
        wait_until(home.health)
        home.run("start", check=0)
        self.assert_alone(home)


class StateTest(DaemonTestBase):
    """state.json keeps the switch of a target and of a model when rrouter is killed."""

    KEPT = ("switched", "switchCount", "reason", "switchedAt", "retryAt", "cooldownSeconds",
            "currentTarget")

    def test_requests_in_auto_keep_their_state_while_the_mode_is_another(self):
        home = self.new_home(self.addCleanup, "claude", DEFAULT_CONFIG)
        router = self.start_rrouter(self.upstream, home=home)

        def is_switched(router):
            return router.request("GET", "/@auto/health").json()["autoSwitch"]["switched"]

        for _ in range(3):
            self.upstream.play(error(429))
            router.post(target="/@auto/v1/messages")
        self.assertTrue(is_switched(router))
        put(home, "mode", "antigravity")
        wait_until(lambda: router.health()["mode"] == "antigravity")
        self.assertTrue(is_switched(router))
        router.stop()
        with Running(self.upstream, home=home) as router:
            self.assertTrue(is_switched(router))
            put(home, "mode", "auto")
            self.assertFalse(is_switched(router))

    def test_state_is_kept_until_the_auto_section_or_the_mode_is_written(self):
        home = self.new_home(self.addCleanup, "auto", DEFAULT_CONFIG)
        router = self.start_rrouter(self.upstream, home=home)
        for _ in range(3):
            self.upstream.play(error(429))
            router.post(OPUS)               # rescued
            router.post(HAIKU)
        for _ in range(3):
            self.upstream.play(error(503))
            router.post(HAIKU)
        before, state = router.health()["autoSwitch"], home.dir / "state.json"
        wait_until(lambda: state.exists() and "last 503" in state.read_text()
                   and OPUS in state.read_text())
        router.kill()
        saved = state.read_text()
        self.assertEqual(list(before["models"]), [OPUS])
        config, log = json.dumps(DEFAULT_CONFIG), home.dir / "logs" / "rrouter.log"
        for what, name, content, kept in (
                ("the rules", "config.json", config.replace("claude-haiku-*", "haiku-*"), True),
                ("the auto section", "config.json", json.dumps(HASTY_CONFIG), False),
                ("that section back", "config.json", config, True),
                ("the mode", "mode", "auto\n", False)):
            with self.subTest(what + " was written"):
                put(home, name, content)
                put(home, "state.json", saved)
                length = log.stat().st_size
                with Running(self.upstream, home=home) as router:
                    auto = router.health()["autoSwitch"]
                    self.assertEqual(router.post(HAIKU).status, 200)
                if not kept:
                    self.assertEqual((auto["switched"], auto["switchCount"], auto["models"]),
                                     (False, 0, {}))
                    lines = log.read_text()[length:]
                    self.assertEqual(len(re.findall(r"\[AUTO\] .*state\.json", lines)), 1, lines)
                    continue
                for old, new in ((before, auto),
                                 (before["models"][OPUS], auto["models"][OPUS])):
                    self.assertEqual([new[name] for name in self.KEPT],
                                     [old[name] for name in self.KEPT])
                    self.assertTrue(0 < new["cooldownRemainingSeconds"]
                                    <= old["cooldownRemainingSeconds"])


LOCK_LINES = (
    # line, the holder in it; None if the line is refused
    (b"12\n", (12, "", "", False)), (b"12 stopping\n", (12, "", "", True)),
    (b"12 ab01 host 34\n", (12, "ab01", "host 34", False)),
    (b"12 ab01 h.\xc3\xa9 0 stopping\nrest", (12, "ab01", "h.\u00e9 0", True)),
    # Half-written lines, invalid fields, and pids that would signal a process group.
    *((line, None) for line in (b"", b"12", b"12 ab01 host 3", b"12 ab01 host\n",
                                b"12 xyz! host 34\n", b"0\n", b"-1\n", b"99999999999\n")),
)


class LockTest(DaemonTestBase):
    """The lock names its holder; a process in another place never gets a signal."""

    def setUp(self):
        self.home = self.new_home(self.addCleanup, "claude")
        self.path = str(self.home.dir / "rrouter.lock")

    def test_another_process_can_read_who_holds_the_lock(self):
        lock, other = rrouter.Lock(self.path), rrouter.Lock(self.path)
        self.assertIsNone(other.look())
        self.assertTrue(lock.acquire("ab01"))
        self.assertFalse(other.acquire("cd02"))
        self.assertEqual(other.look(), (os.getpid(), "ab01", rrouter.own_place(), False))
        self.assertEqual(other.look().elsewhere, "")
        lock.renew(stopping=True)
        self.assertTrue(other.look().stopping)
        self.assertTrue(other.look().is_same(rrouter.Holder(os.getpid(), "ab01")))
        with mock.patch("socket.gethostname", return_value="another name"):
            lock.renew(stopping=False)
        self.assertEqual(other.look().place.split()[0], "another_name")
        os.close(lock._descriptor)
        self.assertIsNone(other.look())

    def test_lock_that_cannot_be_written_leaves_no_descriptor_open(self):
        os.mkfifo(self.path)
        before = os.listdir("/dev/fd")
        with self.assertRaises(rrouter.DaemonError):
            rrouter.Lock(self.path).acquire("ab01")
        self.assertEqual(os.listdir("/dev/fd"), before)

    def test_only_a_complete_valid_line_names_a_holder(self):
        lock = rrouter.Lock(self.path)
        lock.PATIENCE_S = 0.05
        for line, holder in LOCK_LINES:
            with self.subTest(line), self.held(self.home, line):
                self.assertEqual(lock.look(), holder)

    def test_signal_goes_only_to_the_process_that_the_lock_names_now(self):
        lock, place = rrouter.Lock(self.path), rrouter.own_place()
        for has_pidfd in (True, False):         # an old system has none
            sleeper, restore = self.sleeper(), bool
            line = f"{sleeper.pid} ab01 {place}\n".encode()
            if not has_pidfd and hasattr(os, "pidfd_open"):
                restore = functools.partial(setattr, os, "pidfd_open", os.pidfd_open)
                self.addCleanup(restore)
                del os.pidfd_open
            with self.subTest(has_pidfd):
                with self.held(self.home, line):
                    seen = lock.look()
                    for other in (seen._replace(instance="cd02"), seen._replace(stopping=True)):
                        rrouter.send_signal(lock, other, signal.SIGKILL)
                rrouter.send_signal(lock, seen, signal.SIGKILL)             # the lock is free
                with self.held(self.home, re.sub(rb" \d+\n", b" 1\n", line)):
                    rrouter.send_signal(lock, lock.look(), signal.SIGKILL)  # another's pid
                with self.held(self.home, line):
                    rrouter.send_signal(lock, seen, signal.SIGTERM)
                restore()               # because subprocess of Python 3.15 uses it
                self.assertEqual(sleeper.wait(WAIT_S), -signal.SIGTERM)

    def test_daemon_in_another_place_is_named_and_left_alone(self):
        sleeper, (host, namespace) = self.sleeper(), rrouter.own_place().split()
        for place, *commands in ((f"another.host {namespace}", "stop", "restart", "start"),
                                 (f"{host} {int(namespace) + 1}", "stop", "status")):
            where = f"runs in another container or on another host ({place.split()[0]})"
            with self.subTest(where), self.held(
                    self.home, f"{sleeper.pid} ab01 {place}\n".encode()):
                self.home.write("run.json", "{}")
                for command in commands:
                    done = self.home.run(command, check=1)
                    self.assertRegex(done.stderr, r"\Arrouter: rrouter [^\n]+\n\Z")
                    self.assertIn(where, done.stderr)
                self.assertEqual(self.home.read("run.json"), "{}")
        with self.held(self.home, b"%d ab01 another.host 1\n" % sleeper.pid):
            self.assertIn("(another.host)", self.home.run("check", check=1).stdout)
            self.assertIn("(another.host)", self.home.run("auto", check=0).stdout)
            self.assertEqual(self.home.read("mode"), "auto\n")
        self.assertIsNone(sleeper.poll())

    IN_NAMESPACE = "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"

    @unittest.skipUnless(LINUX and shutil.which("unshare"), "no pid namespaces")
    def test_process_with_the_pid_of_a_daemon_in_another_namespace_gets_no_signal(self):
        if subprocess.call([*self.IN_NAMESPACE, "true"], stderr=subprocess.DEVNULL):
            self.skipTest("no right to make a pid namespace")
        sleeper = self.sleeper()
        script = 'echo %d > /proc/sys/kernel/ns_last_pid; "$@" & wait' % (sleeper.pid - 1)
        daemon = subprocess.Popen(
            [*self.IN_NAMESPACE, "sh", "-c", script, "sh", *PYTHON, compiled(), "serve"],
            env=self.home.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        self.addCleanup(daemon.wait)
        self.addCleanup(daemon.kill)
        health = wait_until(self.home.health)
        self.assertEqual(health["pid"], sleeper.pid)
        self.assertEqual(self.home.read("rrouter.lock").split()[:2],
                         [str(health["pid"]), health["instance"]])
        self.assertIn("stop it there", self.home.run("stop", check=1).stderr)
        self.assertIsNone(sleeper.poll())
        self.assertEqual(self.home.run("antigravity", check=0).stdout.split()[:4],
                         ["mode", "antigravity", "(in", "force:"])
        self.assertIn("in another container", self.home.run("status", check=0).stdout)


# Makes its standard input the controlling terminal, then runs a program.
WITH_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[1] == "nohup" else signal.SIG_DFL)
os.execv(sys.argv[2], sys.argv[2:])
"""


class HangUpTest(LoopbackTest):
    """SIGHUP ends a `serve` that has a terminal; otherwise the files are read again."""

    def test_closed_terminal_ends_serve_unless_nohup_protects_it(self):
        """The output is redirected; the terminal counts all the same."""
        home = self.make_home(mode="claude")
        for how, line in (("default", "[STOP] SIGHUP: running requests may finish"),
                          ("nohup", "SIGHUP: files read again")):
            with self.subTest(how):
                near, far = os.openpty()
                process = ending_with(self, home.begin(
                    "-c", WITH_TERMINAL, how, *PYTHON, compiled(), "serve", program=PYTHON,
                    stdin=far, start_new_session=True))
                os.close(far)
                wait_until(lambda: process.poll() or get_health(home.port))
                os.close(near)
                wait_until(lambda: line in home.read("logs/rrouter.log"))
                if how == "nohup":
                    self.assertEqual(get_health(home.port)["pid"], process.pid)
                else:
                    self.assertEqual(process.wait(WAIT_S), 0)
                    self.assertIn("rrouter ends", home.read("logs/rrouter.log"))


# Command line #################################################################

USAGE_ERRORS = (
    # command line,         words of the message
    ("stat",                "did you mean 'status'?"),
    ("--port=8400 serve",   "use `RROUTER_PORT="),
    ("modes",               "use `rrouter mode NAME`"),
    ("help nosuch",         "see `rrouter help`"),
    ("ag extra",            "no argument, not 'extra'; see `rrouter antigravity --help`"),
    ("completion",          "takes bash, zsh, fish; see `rrouter completion --help`"),
    ("config edt",          "config takes edit, reset, path, not 'edt'; see"),
    ("logs -n 20",          "logs takes -f, --auto, not '-n'; see"),
    ("--json",              "use `rrouter status --json` or `rrouter usage --json` or"),
    ("reset",               "use `rrouter config reset`"),
    ("usage --days=0",      "usage takes --days N, --json, not '--days=0'; see"),
    ("usage --days -3",     "usage takes --days N, --json, not '--days -3'; see"),
    ("usage --days",        "usage takes --days N, --json, not '--days'; see"),
    ("usage --days x",      "usage takes --days N, --json, not '--days x'; see"),
    ("usage --day 7",       "usage takes --days N, --json, not '--day'; see"),
    ("SETUP",               "use `rrouter install`"),
)
NOT_RUNNING = "not running: `rrouter start` starts it"

Printed = collections.namedtuple("Printed", "returncode stdout stderr")


def run_here(home, *arguments, terminal=False, **env):
    """Run a command in this process, which is twenty times faster.

    It must neither fork nor serve.  `env` is added to the environment of `home`.
    """
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    out.isatty = err.isatty = lambda: terminal
    with mock.patch.dict(os.environ, {**home.env, **env}, clear=True), \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = rrouter.run_command(list(arguments))
        except SystemExit as end:
            status = end.code
        except KeyboardInterrupt:           # one that a test raises
            status = 130
    for stream_ in out, err:
        stream_.flush()
    return Printed(status, *(stream_.buffer.getvalue().decode() for stream_ in (out, err)))


class CommandTest(LoopbackTest):
    """Base of the tests of commands while nothing runs."""

    def setUp(self):
        self.home = self.make_home(env={"HTTP_PROXY": "http://127.0.0.1:9",
                                        "http_proxy": "http://127.0.0.1:9"})
        self.file = self.home.dir / "config.json"

    def run_here(self, *arguments, check=None, **env):
        """Run a command in this process; `check` asserts the exit status."""
        done = run_here(self.home, *arguments, **env)
        self.assertIn(check, (None, done.returncode), done)
        return done


class CommandLineTest(CommandTest):

    def test_exit_statuses_reach_the_shell(self):
        statuses = {"version": 0, "check": 1, "nosuch": 2, "status": 3}     # by command
        done = self.home.run_all(*[(command,) for command in statuses])
        self.assertEqual([each.returncode for each in done], [*statuses.values()])

    def test_every_name_of_help_and_version_prints_the_same_text(self):
        texts = {self.run_here(*words, check=0).stdout
                 for words in ((), ("help",), ("-h",), ("--help",))}
        self.assertEqual(len(texts), 1)
        for words in ("edit|reset|path", "config.json", "logs/rrouter.log", "RROUTER_HOST"):
            self.assertIn(words, *texts)
        self.assertLessEqual(max(map(len, texts.pop().splitlines())), 80)
        for word in ("version", "-V", "-v", "--version"):
            self.assertEqual(self.run_here(word), (0, f"rrouter {rrouter.__version__}\n", ""))
        self.assertFalse(self.home.dir.exists())

    def test_wrong_uses_end_with_status_2_and_the_message_says_what_to_use(self):
        for line, words in USAGE_ERRORS:
            self.assert_fails(self.run_here(*line.split()), 2, re.escape(words))
        self.assert_fails(self.run_here(""), 2, "no command ''")
        self.assert_fails(self.run_here("explain", ""), 2, "explain takes MODEL; see")
        self.assertFalse(self.home.dir.exists())

    def test_help_of_each_command_has_an_example_and_fits_the_terminal(self):
        for row in rrouter.COMMANDS:
            with self.subTest(row.name):
                text = self.run_here("help", row.name, check=0, COLUMNS="60").stdout
                self.assertRegex(text, r"\Ausage: rrouter %s" % row.name)
                self.assertRegex(text, r"(?m)^example: .*rrouter %s" % row.name)
                self.assertLessEqual(max(map(len, text.splitlines())), 60)
            for word in (row.name, *row.aliases):
                self.assertEqual(self.run_here(word, "--help", COLUMNS="60").stdout, text)

    def test_shells_complete_commands_and_their_arguments(self):
        for shell in ("bash", "zsh", "fish"):
            script = self.run_here("completion", shell, check=0).stdout
            if shutil.which(shell):
                subprocess.run([shell, "-n"], input=script.encode(), check=True)
            self.assertEqual([row.name for row in rrouter.COMMANDS if row.name not in script], [])
        self.home.write("config.json", '{"modes": {"claude": {"mappings": []}, "it\'s": {}}}')
        ask = '\nCOMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _rrouter; echo "${COMPREPLY[@]}"'
        script = self.run_here("completion", "bash").stdout + ask
        for line, offered in (("st", "start stop status"), ("status --", "--json --watch"),
                              ("config e", "edit"), ("stop ", ""), ("mode c", "claude"),
                              ("help exp", "explain"), ("completion b", "bash")):
            words = ["rrouter", *line.split(" ")]
            done = subprocess.run(["bash", "-c", script, "bash", *words], capture_output=True)
            self.assertEqual((done.stdout.decode(), done.stderr), (offered + "\n", b""), line)
        self.home.write("config.json", "{")
        self.assertIn("help) choices='demo ", self.run_here("completion", "bash", check=0).stdout)

    def test_only_terminals_get_colours_unless_the_environment_says_otherwise(self):
        for env, in_pipe, on_terminal in (
                ({}, False, True), ({"FORCE_COLOR": "1"}, True, True),
                ({"FORCE_COLOR": "0"}, False, False), ({"TERM": "dumb"}, False, False),
                ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False)):
            for command, word in (("check", "fail"), ("claude", "claude"), ("status", "claude")):
                for terminal, colours in ((False, in_pipe), (True, on_terminal)):
                    with self.subTest(command, env=env, terminal=terminal):
                        done = self.run_here(command, terminal=terminal, **env)
                        self.assertEqual("m%s\033[0m" % word in done.stdout, colours)

    def test_lines_are_wrapped_only_on_a_terminal(self):
        for command, columns, width in (("check", 100, 80), ("explain claude-opus-5-5", 60, 60),
                                        ("mode nosuch", 60, 60)):
            for terminal in (True, False):
                with self.subTest(command, terminal=terminal):
                    done = self.run_here(*command.split(), terminal=terminal, NO_COLOR="1",
                                         COLUMNS=str(columns))
                    lines = [line for line in (done.stdout + done.stderr).splitlines()
                             if "/rrouter" not in line]
                    self.assertEqual(max(map(len, lines)) <= width, terminal)

    def test_each_command_for_a_mode_sets_it(self):
        board = switchboard(0)
        board["modes"].update(antigravity={"mappings": []}, claude={"mappings": []})
        self.home.write("config.json", json.dumps(board))
        for command, mode in (("antigravity", "antigravity"), ("claude", "claude"), ("a", "auto"),
                              ("ag", "antigravity"), ("c", "claude"), ("AUTO", "auto"),
                              ("mode two", "two"), ("mode ONE", "one")):
            done = self.run_here(*command.split(), check=0)
            self.assertEqual(self.home.read("mode"), mode + "\n")
            self.assertEqual(done.stdout, f"mode {mode} (written; daemon {NOT_RUNNING})\n")
        self.assertEqual(self.run_here("mode", check=0).stdout, "one\n")

    def test_an_unknown_mode_is_refused_and_the_known_ones_are_named(self):
        self.home.write("mode", "claude\n")
        self.assert_fails(self.run_here("mode", "nosuch"), 1, r"mode 'nosuch' is not defined by "
                          r"config\.json \(defined: antigravity, claude, auto\)")
        self.home.write("config.json", '{"modes": {"claude": {}}}')
        self.assert_fails(self.run_here("auto"), 1, r"config\.json: auto\.targets")
        self.home.write("config.json", "{")
        self.assert_fails(self.run_here("antigravity"), 1, r"config\.json:1:2")
        self.assertEqual(self.home.read("mode"), "claude\n")

    def test_a_mode_file_that_cannot_be_used_is_named(self):
        self.home.write("mode", "nosuch\n")
        self.assertRegex(self.run_here("mode").stderr, "rrouter: mode: 'nosuch' is not defined by "
                         r"config\.json \(defined: antigravity, claude, auto\); claude is in force")
        self.assertRegex(self.run_here("status", check=3).stdout, "problem: +mode: 'nosuch' is not")

    def test_fresh_files_are_private_and_readable_whatever_the_umask(self):
        self.addCleanup(os.umask, os.umask(0))
        for mask in (0, 0o777):
            os.umask(mask)
            for words in (("config", "reset"), ("claude",), ("mode",), ("config",)):
                self.run_here(*words, check=0)
            self.file.write_text("{")
        for path in self.home.dir.iterdir():
            self.assertEqual(stat.S_IMODE(path.stat().st_mode),
                             0o700 if path.is_dir() else 0o600, path.name)

    def test_commands_say_that_nothing_runs(self):
        self.assertEqual(self.run_here("status", check=3).stdout,
                         f"mode:     claude\ndaemon:   {NOT_RUNNING}\n")
        self.assertEqual(self.run_here("status", "--json"), (3, "", f"rrouter: {NOT_RUNNING}\n"))
        self.assertEqual(self.run_here("stop"), (0, "rrouter is not running\n", ""))
        for name in ("check", "--check", "health"):
            checks, last = self.run_here(name, check=1).stdout.split("\n\n")
            self.assertRegex(checks, r"(?m)^fail  daemon: not running")
            self.assertRegex(checks, r"(?m)^fail  upstream: http://127\.0\.0\.1:9 ")
            self.assertRegex(last, r"\A\d checks: 3 ok, 1 warn, 2 fail; begin with daemon\n\Z")
            for line in checks.splitlines():
                self.assertRegex(line, r"^(ok|warn|fail)\b")

    def test_an_output_that_cannot_be_written_gives_no_traceback(self):
        reader, writer = os.pipe()
        os.close(reader)
        full = [os.open("/dev/full", os.O_WRONLY)] if os.path.exists("/dev/full") else []
        for output in (writer, *full):
            done = self.home.run("config", stdout=output, timeout=WAIT_S * 2)
            os.close(output)
            self.assertNotIn("Exception ignored", done.stderr)
            self.assertEqual((done.returncode, "output: " in done.stderr), (1, output != writer))

    def test_closed_standard_streams_give_no_traceback(self):
        for closed in (">&-", ">&- 2>&-", "<&-"):
            done = self.home.run(check=0, program=[
                "/bin/sh", "-c", 'exec "$0" "$@" claude ' + closed, *PYTHON, compiled()])
            self.assertEqual((self.home.read("mode"), done.stderr), ("claude\n", ""))

    def test_a_home_that_cannot_be_used_is_named(self):
        """A file stands where the directory should be, because permissions do not stop root."""
        (self.home.root / ".rrouter").touch()
        done = self.home.run_all(("serve",), ("start",), timeout=WAIT_S * 2)
        done += [self.run_here(*command.split(), EDITOR="true")
                 for command in ("claude", "config reset", "config edit")]
        done.append(self.home.run("start", env={"HOME": str(self.home.root / ".rrouter")}))
        for ended in done:
            self.assertEqual(ended.returncode, 1, ended)
            self.assertRegex(ended.stderr, r"(?m)^rrouter: .*\.rrouter")
        for command in ("status", "check", "stop", "config", "mode"):
            self.assertIn(self.run_here(command).returncode, (0, 1, 3), command)
        self.assertEqual((self.home.root / ".rrouter").read_text(), "")

    def test_without_home_the_user_database_is_used_and_a_relative_home_is_refused(self):
        del self.home.env["HOME"]
        path = os.path.join(pwd.getpwuid(os.getuid()).pw_dir, ".rrouter", "config.json\n")
        self.assertEqual(self.run_here("config", "path").stdout, path)
        self.assertEqual(self.run_here("config", "path", HOME="").stdout, path)
        self.assert_fails(self.run_here("config", "path", HOME="here"), 2,
                          "HOME=here: expected the absolute path")


# Runs `rrouter claude` of the directory argv[1] by argv[3], the statement that calls `main`.
# SIGINT arrives at function call number argv[2]; with -1 stderr gets the number of calls instead.
INTERRUPTER = """
import atexit, os, signal, sys
directory, moment, last = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)    # the tests may ignore it
sys.path.insert(0, directory)
import rrouter
sys.argv, calls = ["rrouter", "claude"], -1

def count(frame, event, _):
    global calls
    if "call" in event and (calls >= 0 or frame.f_code.co_name == "main"):
        calls += 1
        if str(calls) == moment:
            sys.setprofile(None)
            os.kill(os.getpid(), signal.SIGINT)

if moment == "-1":
    atexit.register(lambda: os.write(2, b"%d" % calls))
sys.setprofile(count)
exec(last, dict(vars(rrouter), __name__="__main__"))
"""


class InterruptTest(CommandTest):
    def test_ctrl_c_ends_a_command_at_any_moment_and_prints_nothing(self):
        last = re.search(r"(?m)^if __name__ == .*\n(?:(?: .*)?\n?)*\Z", RROUTER_TEXT).group()

        def run(moment):
            return self.home.run("-c", INTERRUPTER, os.path.dirname(compiled()), str(moment), last,
                                 program=PYTHON)

        total = int(run(-1).stderr)
        step = total // (300 if SOAKING else 5)
        for moment in (1, 2, *range(3, total, step), *range(total - 4, total + 3)):
            done = run(moment)
            if done.stderr.startswith("Exception ignored in: <function _get_module_lock"):
                continue        # Python's import swallowed it in a callback
            with self.subTest(moment=moment):
                self.assertEqual(done.stderr, "")
                self.assertIn(done.returncode, (130, -signal.SIGINT, *[0] * (moment > total - 5)))


EDITOR = """#!/bin/sh
# Records its arguments and the given file, writes $NEW if set, ends with $CODE.
for file; do :; done
printf '%s\\n' "$0" "$@" > "$HOME/arguments"
cat "$file" > "$HOME/given"
[ -z "$NEW" ] || printf %s "$NEW" > "$file"
exit "${CODE:-0}"
"""


class ConfigCommandTest(CommandTest):

    def setUp(self):
        super().setUp()
        self.editor = self.home.root / "my editor"
        self.editor.write_text(EDITOR)
        self.editor.chmod(0o755)

    def edit(self, editor=None, **env):
        """Run `config edit` with this editor, quoted for its space."""
        return self.run_here("config", "edit", EDITOR=editor or "'%s'" % self.editor, **env)

    def backups(self):
        return sorted(path for path in self.home.dir.iterdir() if ".bak" in path.name)

    def assert_defaults(self, file=None):
        self.assertEqual(json.loads((file or self.file).read_text()), DEFAULT_CONFIG)

    def test_config_prints_the_config_in_force_as_json(self):
        done = self.run_here("config", check=0, RROUTER_PORT="abc", RROUTER_UPSTREAM="ftp://x")
        self.assertEqual(json.loads(done.stdout), DEFAULT_CONFIG)
        self.assertEqual(done.stderr, f"{self.file} (does not exist: these are the defaults)\n")
        self.assertEqual(self.run_here("config", "path"), (0, f"{self.file}\n", ""))
        config = switchboard(3, auto={"targets": ["two", "one"], "failureThreshold": 1})
        self.home.write("config.json", json.dumps({**config, "odd": 1}))
        done = self.run_here("config", check=0)
        self.assertRegex(done.stderr, r"\A%s\nrrouter: config\.json: odd: unknown" % self.file)
        printed = json.loads(done.stdout)
        self.assertEqual(printed["modes"], config["modes"])
        self.assertEqual(printed["auto"], {**DEFAULT_CONFIG["auto"], **config["auto"]})

    def test_edit_opens_the_defaults_in_the_editor_of_the_user_or_in_vi(self):
        done = self.edit("/nonexistent", VISUAL="'%s' -w" % self.editor)
        self.assertEqual(done, (0, f"{self.file} is valid\n", ""))
        self.assertEqual((self.home.root / "arguments").read_text().splitlines(),
                         [str(self.editor), "-w", str(self.file)])
        self.assert_defaults(self.home.root / "given")
        self.assertEqual(stat.S_IMODE(self.file.stat().st_mode), 0o600)
        self.editor.rename(self.home.root / "vi")
        path = "%s:%s" % (self.home.root, self.home.env["PATH"])
        for env in ({"VISUAL": "", "EDITOR": ""}, {}):
            self.run_here("config", "edit", check=0, PATH=path, **env)
            used = (self.home.root / "arguments").read_text().splitlines()[0]
            self.assertEqual(used, str(self.home.root / "vi"))

    def test_edit_checks_the_result(self):
        for new, status, pattern in (
                (json.dumps(switchboard(1)), 0, r"\A\Z"),
                (json.dumps({**switchboard(1), "odd": 1}), 0, r"config\.json: odd: unknown"),
                ("{", 1, r"config\.json.*1:2")):
            done = self.edit(NEW=new)
            self.assertEqual(done.returncode, status, done)
            self.assertRegex(done.stderr, pattern)
            self.assertEqual(self.file.read_text(), new)

    def test_an_editor_that_fails_is_named(self):
        for command, words in ((None, "status 7"), ("/no/editor -w", "/no/editor -w: no such file"),
                               ("'unbalanced", "'unbalanced: "), ("'%s'" % self.home.root, "")):
            self.assert_fails(self.edit(command, CODE="7"), 1, "rrouter: editor .*" + words)

    def test_reset_backs_up_each_file_unless_it_equals_the_defaults(self):
        for _ in range(2):
            self.run_here("config", "reset", check=0)
            self.assertEqual(self.backups(), [])
            self.assert_defaults()
        texts = ["{", "second", "third"]
        for text in texts:
            self.home.write("config.json", text)
            done = self.run_here("config", "reset", "--yes", check=0)
            self.assertRegex(done.stdout, r"config\.json\.bak-\d{8}-\d{6}")
            self.assert_defaults()
        self.assertEqual(sorted(path.read_text() for path in self.backups()), sorted(texts))
        self.assertRegex(self.backups()[0].name, r"^config\.json\.bak-\d{8}-\d{6}$")

    def test_links_stay_links(self):
        """People keep such files in a repository of dotfiles."""
        mine = self.home.root / "dotfiles"
        mine.mkdir()
        self.home.dir.mkdir(mode=0o700)
        for name, text in (("config.json", json.dumps(switchboard(1))), ("mode", "claude\n")):
            (mine / name).write_text(text)
            (self.home.dir / name).symlink_to(mine / name)
        self.assertEqual(self.edit(NEW=json.dumps(switchboard(2))).returncode, 0)
        self.assertEqual(json.loads((mine / "config.json").read_text()), switchboard(2))
        for words in (("config", "reset"), ("mode", "auto")):
            self.run_here(*words, check=0)
        self.assertTrue(self.file.is_symlink() and (self.home.dir / "mode").is_symlink())
        self.assert_defaults(mine / "config.json")
        self.assertEqual((mine / "mode").read_text(), "auto\n")
        self.assertEqual([json.loads(path.read_text()) for path in self.backups()],
                         [switchboard(2)])


class UsageTest(CommandTest):
    """`rrouter usage` reads the log and the rotated logs."""

    REQ = "[REQ] #1 POST /v1/messages claude-opus-5-5 -> "
    TO = "2026-02-03 10:00:00.000 " + REQ + "antigravity gemini "
    LOGS = {
        ".3": ("2026-01-01 10:00:00.000 " + REQ + "claude old 200 1.00s in 1499+2 out 3",),
        ".1": (TO + "200 1.00s in 1203+48211 out 512", "2026-02-03 10:00:01.000 [AUTO] #1 " + REQ,
               "half a li"),
        "": (TO + "200 1.00s (claude failed: 429)", TO + "400 0.02s (claude failed: 429)",
             TO + "200 0.02s in 7+0 out 1 (error event in the stream)",
             TO + "499 9.00s (timeout, ended by the client)",
             "half" + TO + "200 1.00s",
             "2026-01-01 10:00:00.000 [REQ] #1 POST /v1/messages  -> claude  200 1.00s",
             "2026-02-03 10:00:06.000 [REQ] #7 GET /v1/models 200 1.00s",
             "2026-02-03 10:00:07.000 [REQ] #8 POST /@claude/v1/messages a b -> c d -> claude e "
             "200 0.10s (sent again: the kept connection was stale)",
             "2026-02-03 10:00:08.000 [REQ] #9 POST /v1/messages/count_tokens a -> claude e 200 "
             "0.10s")}

    def setUp(self):
        super().setUp()
        (self.home.dir / "logs").mkdir(parents=True)
        for name, lines in self.LOGS.items():
            self.home.write("logs/rrouter.log" + name, "\n".join(lines) + "\n")

    def test_sums_are_by_day_target_and_model(self):
        for days, expected in ((["--days=1"], 2), (["--days", "9999"], 4), ([], 4)):
            rows = json.loads(self.run_here("usage", "--json", *days, check=0).stdout)
            self.assertEqual((len(rows), [list(row.values()) for row in rows[-2:]]), (expected, [
                ["2026-02-03", "antigravity", "gemini", 5, 1, 2, 1210, 48211, 513],
                ["2026-02-03", "claude", "e", 1, 0, 0, 0, 0, 0]]))

    def test_output_is_a_table_within_80_columns_or_says_that_there_is_nothing(self):
        self.assertEqual(self.run_here("usage", check=0).stdout.splitlines(), [
            "                                           requests              tokens",
            "day        tokens                      all rescued failed uncached cached output",
            "2026-01-01                               2       0      0     1499      2      3",
            "  claude                                 2       0      0     1499      2      3",
            "                                         1       0      0        0      0      0",
            "    old                                  1       0      0     1499      2      3",
            "2026-02-03 #########################     6       1      2     1210    48k    513",
            "  antigravity                            5       1      2     1210    48k    513",
            "    gemini                               5       1      2     1210    48k    513",
            "  claude                                 1       0      0        0      0      0",
            "    e                                    1       0      0        0      0      0",
            "total                                    8       1      2     2709    48k    516"])
        for count, cells in ((21_499_999, "#" * 25 + " 21M" * 6), (0, "0" + " 0" * 5)):
            counts = collections.Counter(dict.fromkeys(rrouter.USAGE_COLUMNS, count))
            sums = dict.fromkeys((("day",), ("day", "claude", "m" * 99)), counts)
            lines = list(rrouter.usage_table(sums))
            self.assertEqual(lines[2].split(), ["day", *cells.split()])
            self.assertEqual([len(line) for line in lines[1:]], [80] * 4)
        shutil.rmtree(str(self.home.dir / "logs"))
        self.assertRegex(self.run_here("usage", check=0).stdout, "^no request .*rrouter.log yet\n$")
        self.assertEqual(self.run_here("usage", "--json", check=0).stdout, "[]\n")


class CopiedFileTest(LoopbackTest):

    def test_modules_next_to_the_file_are_never_imported(self):
        home = self.make_home("http://127.0.0.1:9")
        folder = home.root / "bin"
        folder.mkdir()
        shutil.copy(RROUTER, str(folder / "rrouter"))
        for name in ("argparse", "calendar", "email", "json", "socket", "zlib"):
            (folder / f"{name}.py").write_text("raise SystemExit('imported')\n")
        for command in ("help", "config", "start", "check", "stop"):
            done = home.run(command, program=[*PYTHON, str(folder / "rrouter")],
                            check=int(command == "check"))
            self.assertNotIn("imported", done.stdout + done.stderr)


class EnvironmentTest(CommandTest):

    def test_an_unknown_mode_is_printed_in_any_script_and_locale(self):
        locales = {}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        for env in locales:
            done = self.home.run("mode", "\ud55c".encode(), env=env)
            self.assert_fails(done, 1, r"mode '\\ud55c' is not defined")
        self.assertIn("'\ud55c'", self.run_here("mode", "\ud55c", terminal=True).stderr)
        self.assertIn("'\\ubuntu'", self.run_here("mode", "\\ubuntu", terminal=True).stderr)
        with Running(None, home=self.home, mode=None):
            self.home.write("config.json", "{")         # the daemon knows the modes
            for env in locales:
                done = self.home.run("mode", "\ud55c".encode(), env=env, check=1)
                self.assertRegex(done.stderr, r"config\.json:1:2(.|\n)*'\\ud55c' is not defined")
                self.assertFalse((self.home.dir / "mode").exists())
            self.assertIn("in force", self.home.run("auto", check=0).stdout)

    def test_a_dangling_link_is_named_as_such(self):
        for target in ("nowhere", ".rrouter"):
            self.home.dir.symlink_to(target)
            for done in (self.home.run("start"), self.run_here("ag")):
                self.assert_fails(done, 1, r"\.rrouter: .*leads nowhere: remove")
            self.assertIn("not running", self.run_here("status", check=3).stdout)
            self.home.dir.unlink()

    def test_a_terminal_that_is_gone_only_silences_the_echo(self):
        ours, its = os.openpty()
        os.close(ours)                      # each write to the other end gives EIO
        process = ending_with(self, self.home.begin("serve", stderr=its))
        os.close(its)
        wait_until(self.home.health)
        wait_until(lambda: "[START] rrouter" in self.home.read("logs/rrouter.log"))
        process.terminate()
        self.assertEqual(process.wait(WAIT_S), 0)

    def test_a_bad_value_ends_serve_start_and_restart_with_status_2(self):
        for command in ("serve", "start", "restart"):
            self.assert_fails(self.run_here(command, RROUTER_PORT="abc"), 2,
                              "RROUTER_PORT=abc: .*65535")
        self.assertEqual(processes(self.home), [])


class DemoTest(LoopbackTest):
    QUICK = ("import sys; sys.path[0] = sys.argv.pop(1); import rrouter\n"
             "rrouter.DEMO_PAUSE_S, rrouter.DEMO_COOLDOWN_S = 0, 1\n"
             "rrouter.main()")

    def setUp(self):
        self.home = self.make_home(port=1)      # it uses neither this port nor HOME
        self.home.env.update(TMPDIR=str(self.home.root), PYTHONWARNINGS="")
        self.arguments = "-c", self.QUICK, os.path.dirname(compiled()), "demo"

    def test_demo_shows_each_step_by_real_requests_and_leaves_nothing(self):
        done = self.home.run(*self.arguments, program=PYTHON, check=0)
        claude, gemini = "200 claude claude-sonnet-5-5", "200 antigravity " + GEMINI_SONNET
        self.assertEqual(re.findall(r"(?m)^  (\d{3} .*)", done.stdout), [
            claude, gemini, gemini, *[claude + ", 2 tries"] * 3, claude, gemini])
        self.assertLessEqual(max(map(len, done.stdout.splitlines())), 80)
        for title, _, _, meaning in rrouter.DEMO_STEPS:
            self.assertIn(title + "\n  200", done.stdout)
            self.assertIn("\n  %s\n" % meaning, done.stdout)
        self.assertRegex(done.stdout, r"(?s)nothing.*Next.*:9:\n.* auto .*:1 ANTHROPIC_AUTH_TOKEN")
        self.assertEqual((list(self.home.root.iterdir()), done.stderr), ([], ""))

    def test_demo_with_stay_serves_until_it_is_interrupted(self):
        for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            process = ending_with(self, self.home.begin(
                *self.arguments, "--stay", program=PYTHON, stdout=subprocess.PIPE,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)))
            with process.stdout:
                found = (re.search(rb"curl http://127.0.0.1:(\d+)/", line)
                         for line in process.stdout)
                self.assertEqual(get_health(int(next(filter(None, found))[1]))["mode"], "auto")
                process.send_signal(number)
                self.assertEqual(process.wait(WAIT_S), status)
            self.assertEqual(list(self.home.root.iterdir()), [])


class AutoCommandTest(AutoTest):
    """The output of commands about auto mode."""

    def say(self, *arguments, check=0, **env):
        done = run_here(self.rrouter.home, *arguments, **env)
        self.assertEqual(done.returncode, check, done)
        return done.stdout

    def test_status_shows_failures_and_switches_and_auto_says_what_it_clears(self):
        self.upstream.default = lambda request: (
            error(429) if request.model.startswith("gemini") else stream())
        for failures in (1, 2):
            self.rrouter.post()
            self.assertIn("\ntarget:   antigravity (%d of 3 failures before a switch)\n" % failures,
                          self.say("status"))
        self.assertIn("cleared: 2 of 3 failures of antigravity\n", self.say("auto"))
        self.assertNotIn("cleared", self.say("auto"))
        for _ in range(3):
            self.rrouter.post()
        status = self.say("status")
        self.assertRegex(status, r"target: +claude since \d\d:\d\d: antigravity gave 3 HTTP "
                                 "errors in a row, last 429; next try in 30m")
        self.assertRegex(status, r"requests: \d+ answered, \d+ rescued, 0 failed, 0 running")
        self.assertRegex(status, r"failure: +antigravity: 429, \d\d:\d\d\n")
        self.assertRegex(self.say("explain"), "\n".join((
            r"\A%s", r"  antigravity: +%s \(rule claude-sonnet-\*\)",
            r"  claude: +%s \(no rule matches\)", r"  auto: +claude since .*",
            r"in force: mode auto\n\Z")) % (SONNET, GEMINI_SONNET, SONNET))
        self.assertIn("cleared: cooldown of antigravity (429, 30m)\n", self.say("claude"))

    def test_explain_needs_no_earlier_request_if_it_gets_a_model(self):
        self.assertRegex(self.say("explain", "other"), "auto: +no rescue, because both targets get")
        self.assertRegex(self.say("explain", SONNET), "auto: +antigravity\n")

    def test_explain_names_the_conditions_of_rules(self):
        self.configure({**DEFAULT_CONFIG, "modes": {"claude": {}, "antigravity": {"mappings": [
            {"match": "*", "rewrite": "large", "agent": "explore", "class": "sub*"},
            {"match": "opus", "rewrite": "g"}, {"match": "*", "rewrite": "never"}]}}})
        self.assertRegex(self.say("explain", "opus"), "\n".join((
            r"  claude: +opus \(no rule matches\)",
            r"  antigravity: large \(rule \*, agent explore, class sub\*\)",
            r" +g \(rule opus\)", r"  auto")))
        self.assertRegex(self.say("explain", "never"),
                         "the same name, unless a rule for an agent or class matches\n")

    def test_watch_prints_the_status_again_until_it_is_interrupted(self):
        process = ending_with(self, self.rrouter.home.begin(
            "status", "--watch", stdout=subprocess.PIPE))
        with process.stdout as lines:
            modes = filter(re.compile(b"mode: +auto\n").fullmatch, lines)
            self.assertEqual(len([*itertools.islice(modes, 2)]), 2)
            process.send_signal(signal.SIGINT)
            self.assertEqual(process.wait(WAIT_S), 130)

    def test_a_target_whose_credential_is_blocked_is_named_by_check(self):
        home = self.rrouter.home
        self.upstream.play(error(503, "auth_unavailable: no auth available"), stream())
        self.rrouter.post()
        self.assertRegex(run_here(home, "check").stdout, "warn  target: CLIProxyAPI has "
                         r"suspended its antigravity login .*503 auth_unavailable, \d\d:\d\d\)")
        self.upstream.play(error(503), stream())
        self.rrouter.post()
        self.assertNotIn("target: ", run_here(home, "check").stdout)

    def test_a_recent_failure_in_an_explicit_mode_is_named_by_check(self):
        auto = {"active": False, "switched": False, "models": {}}
        for age_s, words in ((590, "target: claude failed (401, "), (610, "")):
            failure = {"at": rrouter.utc(time.time() - age_s), "target": "claude", "what": "401"}
            health = {"autoSwitch": auto, "requests": {"lastFailure": failure}}
            found = rrouter.check_outcomes(health)
            self.assertEqual("".join(text[:len(words)] for _, text in found), words)


class LogsTest(CommandTest):

    def test_logs_include_the_rotated_files(self):
        self.assert_fails(self.run_here("logs"), 1, "`rrouter start` creates it")
        (self.home.dir / "logs").mkdir(parents=True)
        for name, numbers in ((".2", range(30)), (".1", range(30, 35)), ("", range(35, 40))):
            self.home.write("logs/rrouter.log" + name, "".join(
                "%d [AUTO]\n%d\n" % (number, number) for number in numbers))
        self.assertEqual(self.run_here("logs", "--auto", check=0).stdout.split("\n"),
                         [*map("%d [AUTO]".__mod__, range(20, 40)), ""])
        self.assertEqual(self.run_here("logs", check=0).stdout.split()[::3],
                         [*map(str, range(30, 40))])

    def test_following_survives_a_rotation(self):
        (self.home.dir / "logs").mkdir(parents=True)
        self.home.write("logs/rrouter.log", "old [AUTO]\n")
        log = self.home.dir / "logs" / "rrouter.log"
        process = ending_with(self, self.home.begin("logs", "-f", "--auto", stdout=subprocess.PIPE))
        with process.stdout as lines:
            self.assertEqual(lines.readline(), b"old [AUTO]\n")
            with log.open("a") as file:
                file.write("one [AUTO]\nother\n")
            self.assertEqual(lines.readline(), b"one [AUTO]\n")
            log.rename(log.with_suffix(".log.1"))
            self.home.write("logs/rrouter.log", "two [AUTO]\n")
            self.assertEqual(lines.readline(), b"two [AUTO]\n")
            process.send_signal(signal.SIGINT)
            self.assertEqual((lines.read(), process.wait(WAIT_S)), (b"", 130))
        self.assertEqual(processes(self.home), [])


class StartReportTest(LoopbackTest):

    def test_start_names_problems_and_the_next_step(self):
        home = self.make_home(config="{")
        self.addCleanup(home.run, "stop")
        started = home.run("start", check=0).stdout
        self.assertRegex(started, "\n".join((
            r"\Arrouter runs on localhost:%d \(pid \d+\), mode claude",
            r"upstream: http://.*:9, nothing listens there", r"problem:  config\.json:1:2.*",
            r"next:     rrouter check\n\Z")) % home.port)
        home.write("config.json", json.dumps(DEFAULT_CONFIG))
        upstream, other = self.start_upstream(), free_port()
        again = home.run("start", check=0, env={"RROUTER_PORT": str(other)}).stdout
        self.assertRegex(again, "\n".join((
            r"\Arrouter is already running .*", "upstream: .*", "note:     RROUTER_PORT=%d in this "
            "shell is not in force: `rrouter restart`", "next")) % other)
        home.env["RROUTER_UPSTREAM"] = upstream.url
        self.assertRegex(home.run("restart", check=0).stdout, "\n".join((
            r"\A.*stopped.*\n.*runs on.*", "upstream: %s, a program listens there",
            r"next:     ANTHROPIC_BASE_URL=.*:%d claude\n\Z")) % (upstream.url, home.port))
        again = home.run("start", check=0, env={"ANTHROPIC_BASE_URL": "http://h"}).stdout
        self.assertIn("a program listens there\nnext:     rrouter check\n", again)
        again = home.run("start", check=0, env={"RROUTER_PORT": "abc"}).stdout
        self.assertRegex(again, r"(?s)already running .* there\nnote:     RROUTER_PORT=abc: "
                                r"expected [^\n]*\nnext:     rrouter check\n\Z")

    def test_claude_code_is_pointed_at_an_address_on_which_rrouter_listens(self):
        for host, url, has_localhost in (
                ("localhost", "http://localhost:1", True), ("::", "http://localhost:1", True),
                ("::1", "http://[::1]:1", True), ("192.0.2.1", "http://192.0.2.1:1", False)):
            settings = rrouter.Settings(host, 1, "")
            self.assertEqual(rrouter.client_url(settings), url)
            self.assertTrue(rrouter.points_to(url, settings), host)
            self.assertEqual(rrouter.points_to("http://localhost:1", settings), has_localhost, host)

    def test_only_failures_that_cliproxyapi_retries_can_be_late(self):
        for fault, status, took_s, is_late in (
                ("STATUS", 429, 20.1, True), ("STATUS", 429, 20, False), ("STATUS", 500, 60, True),
                ("SHELF", 503, 30, True), ("STATUS", 400, 60, False), ("TIMEOUT", 504, 150, False)):
            outcome = Outcome(Fault[fault], status, "", 1000, 1000 + took_s)
            self.assertEqual(bool(rrouter.slow_failure(outcome)), is_late, outcome)

    def test_a_late_failure_is_named_in_log_and_status(self):
        upstream = self.start_upstream(error(429, pause_s=0))
        upstream.default.before = threading.Event()
        router = self.start_rrouter(upstream, limits={"SLOW_FAILURE_S": 0.05})
        threading.Timer(0.2, upstream.default.before.set).start()
        self.assertEqual(router.post().status, 429)
        words = "CLIProxyAPI waited 0 s before this 429; set max-retry-interval: 8"
        self.assertIn(words, run_here(router.home, "status").stdout)
        wait_until(lambda: f"({words})\n" in router.log())


# Check ########################################################################

LISTED = [rule["rewrite"] for rule in DEFAULT_CONFIG["modes"]["antigravity"]["mappings"]]


def list_models(*names, owner="antigravity"):
    return Response(200, json.dumps({"data": [
        {"id": name, "owned_by": owner} for name in names]}).encode())


class CheckTest(RouterTest):
    """`check` in a sound setup and in setups with one defect each; proxy variables are set."""

    env = dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "all_proxy"),
                        "http://127.0.0.1:9")

    def setUp(self):
        super().setUp()
        self.home = self.rrouter.home
        self.url = "http://localhost:%d" % self.rrouter.port
        self.settings({"ANTHROPIC_BASE_URL": self.url, "ANTHROPIC_AUTH_TOKEN": "sk-secret-token",
                       "NO_PROXY": "127.0.0.1, localhost"})
        self.models = list_models(*LISTED)
        self.upstream.default = lambda request: (
            self.models if request.target.startswith("/v1/models") else Response())

    def settings(self, value):
        """Write Claude Code's settings.json: this `env`, or this text."""
        path = self.home.root / ".claude" / "settings.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps({"env": value}))

    def check(self, *patterns, **env):
        """Run `check`, expect lines with these patterns, and return the lines that are not ok."""
        done = run_here(self.home, "check", **env)
        self.assertNotIn("sk-secret-token", done.stdout + done.stderr)
        for pattern in patterns:
            self.assertRegex(done.stdout, "(?m)^" + pattern)
        bad = re.findall(r"(?m)^(?:warn|fail) .*", done.stdout)
        self.assertEqual(done.returncode, any(line.startswith("fail") for line in bad), done.stdout)
        first = next((line for line in bad if line.startswith("fail") == done.returncode), "")
        begin = first and "; begin with " + first[6:].partition(": ")[0]
        self.assertRegex(done.stdout, r"\n\n\d checks: .* fail%s\n\Z" % begin)
        return bad

    def test_messages_of_claude_without_usage_limits_are_named(self):
        put(self.home, "mode", "claude\n")
        limits = (("anthropic-ratelimit-unified-5h-utilization", "0.5"),
                  ("anthropic-ratelimit-unified-5h-reset", "1800000000"))
        for fields, model, expected in (
                ((), "gemini-3", None), ((), SONNET, False), (limits, SONNET, True),
                ((), SONNET, True)):
            self.upstream.play(Response(fields=fields))
            self.rrouter.post(model)
            with self.subTest(fields=fields, model=model):
                self.assertIs(self.rrouter.health()["usageLimits"], expected)
                self.assertEqual("usage limits: " in str(self.check()), expected is False)

    def test_in_a_sound_setup_every_line_is_ok(self):
        self.assertEqual(self.check(r"ok +upstream: .* accepts the key", r"ok +config: ",
                                    ANTHROPIC_BASE_URL=self.url, ANTHROPIC_AUTH_TOKEN="other"), [])
        request, = self.upstream.received
        self.assertEqual((request.method, request.target), ("GET", "/v1/models"))
        self.assertEqual(request.header("authorization"), "Bearer sk-secret-token")
        # With Anthropic's headers the upstream disguises names.
        self.assertNotRegex(str(request.fields), "(?i)anthropic|claude-cli")

    def test_proxies_of_the_environment_are_ignored(self):
        self.assertEqual(self.rrouter.post().status, 200)
        done = self.home.run("status", "--json", check=0)
        self.assertEqual(json.loads(done.stdout)["pid"], self.rrouter.process.pid)

    CLIENTS = (
        # settings.json,          shell,   level,  words after "claude code: "
        ("here/@claude",          "",      "ok",   r"uses .*/@claude \(from /"),
        ("here/@nope",            "",      "warn", "http.*/@nope .*: mode 'nope' is not"),
        ("here/v1",               "",      "warn", "http.*/v1 .* will not work: use .*/@MODE"),
        ("https://localhost:%d",  "",      "warn", "https:"),
        ("http://localhost:1",    "",      "warn", "points to http://localhost:1 .*not to rrouter"),
        ("http://u:word@h:odd",   "",      "warn", r"points to http://\*\*\*@h:odd "),
        ("{",                     "",      "warn", "cannot read .*json: not JSON"),
        ('{"env": 7}',            "",      "warn", "set "),
        ("{}",                    "",      "warn", "set "),
        ("{}",                    "here",  "ok",   r"uses .* \(in this shell, not in /"),
        ("here",                  "other", "ok",   r"uses .* \(from /"),
    )

    def test_a_client_that_does_not_point_to_rrouter_is_named(self):
        for settings, shell, level, words in self.CLIENTS:
            with self.subTest(settings=settings, shell=shell):
                url = settings.replace("here", self.url).replace("%d", str(self.rrouter.port))
                self.settings(url if url[0] == "{" else {"ANTHROPIC_BASE_URL": url})
                bad = self.check("%s +claude code: %s" % (level, words), NO_PROXY="*",
                                 ANTHROPIC_BASE_URL=shell.replace("here", self.url))
                self.assertEqual(len(bad), level == "warn", bad)
                self.assertNotIn("word", "".join(bad))

    def test_a_proxy_is_named_unless_claude_code_bypasses_it(self):
        for exempt, is_exempt in (("", False), ("h.com,localhost.org", False), ("localhost", True),
                                  ("h.com 127.0.0.1:80", True), ("*", True)):
            for name in ("NO_PROXY", "no_proxy"):
                with self.subTest(exempt, name=name):
                    self.settings({"ANTHROPIC_BASE_URL": self.url, name: exempt})
                    bad = self.check()
                    self.assertEqual(bad, [] if is_exempt else [line for line in bad if re.match(
                        'warn  proxy: HTTP_PROXY is set and NO_PROXY %s, .*"NO_PROXY": "%slocalhost'
                        % (("lacks localhost", exempt + ",") if exempt else ("is not", "")), line)])
                    self.assertEqual(len(bad), not is_exempt)

    UPSTREAMS = (
        # status and body of /v1/models,            key in,                 the line
        (200, "{}",                                 "ANTHROPIC_AUTH_TOKEN", "warn  models: .*list"),
        (200, '{"data":[{"id":1},{"id":"a"}]}',     "ANTHROPIC_AUTH_TOKEN", "warn  .* know gemini"),
        (404, "{}",                                 "ANTHROPIC_AUTH_TOKEN", "warn  .* with 404"),
        (401, '{"x":\n"sk-secret-token"}',          "ANTHROPIC_AUTH_TOKEN",
         r'fail  upstream: .*401 {"x": "\*\*\*"}.*ANTHROPIC_AUTH_TOKEN'),
        (403, '{"error":"unsafe_example_api_key"}', "ANTHROPIC_API_KEY",
         "fail  upstream: .*403 .*unsafe_example_api_key.*ANTHROPIC_API_KEY"),
        (401, "{}",                                 "X", "fail  upstream: .*request without a key"),
        (401, "{}",                                 "apiKeyHelper", "warn  .* your apiKeyHelper"),
        (400, "HTTP request to an HTTPS server",    "X", "fail  upstream: .* speaks https: set"),
        (502, "upstream is rrouter itself;",        "X", "fail  upstream: .*is rrouter itself:"),
    )

    def test_an_upstream_with_an_unexpected_response_is_named(self):
        for status, body, name, line in self.UPSTREAMS:
            with self.subTest(status=status, body=body, key=name):
                self.models = Response(status, body.encode())
                self.settings({"ANTHROPIC_BASE_URL": self.url, name: "sk-secret-token",
                               "NO_PROXY": "*"})
                self.assertEqual(len(self.check(line)), 1)

    def test_an_upstream_that_is_rrouter_itself_is_named_before_anything_runs(self):
        home = self.make_home()
        done = run_here(home, "check", RROUTER_UPSTREAM="http://localhost:%d" % home.port)
        self.assertRegex(done.stdout, "(?m)^fail  upstream: .* is rrouter itself: set RROUTER_UP")
        health = {"upstreamURL": "http://localhost:%d" % home.port, "problems": []}
        daemon = rrouter.Daemon(None, "localhost", home.port, "start")
        self.assertIn(", rrouter itself: set RR", rrouter.trouble_rows(daemon, health)[0][1])

    def test_an_upstream_that_speaks_plain_http_is_named(self):
        done = run_here(self.make_home(), "check",
                        RROUTER_UPSTREAM="https://localhost:%d" % self.rrouter.port)
        self.assertRegex(done.stdout, "(?m)^fail  upstream: .* speaks http: ")

    def test_models_the_upstream_does_not_know_are_named_with_a_block_of_aliases(self):
        opus, flash, other = "claude-opus-4-6-thinking", "gemini-3-flash", "claude-sonnet-4-6"
        for owner, ids, words in (("antigravity", (flash, opus), f"{opus}, {other}, {flash}"),
                                  ("anthropic", (), ": log in first: cli-proxy-api")):
            listed = list_models(LISTED[0], opus, other, flash, owner=owner).chunks[0]
            (level, text), = rrouter.check_models(rrouter.config_of(None), listed)
            first, *lines = text.split("\n")
            self.assertIn("does not know %s, %s (400" % (LISTED[2], LISTED[1]), first)
            self.assertIn(words, first)
            entries = []
            for known, alias in zip(ids, (LISTED[2], LISTED[1])):
                entries += [f'- name: "{known}"', f'  alias: "{alias}"']
                entries += ["  fork: true"] * (known != opus)
            self.assertEqual((level, lines), ("warn", [" " * 8 + line for line in ids and (
                "# version 7", "oauth-model-alias:", "  antigravity:",
                *("    " + entry for entry in entries),
                "# version 8", "oauth:", "  model-alias:", "    antigravity:",
                *("      " + entry for entry in entries))]))
        for mode, name in (("antigravity", "claude-x"), ("claude", "gemini-x")):
            config = rrouter.config_of(json.dumps({"modes": {mode: {"mappings": [
                {"match": "*", "rewrite": name}]}}}).encode())
            (_, text), = rrouter.check_models(config, listed)
            self.assertTrue(text.endswith(name + " (400 unknown provider): correct your rules"))

    def test_with_the_option_json_the_output_is_json(self):
        self.models = Response(401)
        done = run_here(self.home, "check", "--json")
        report = json.loads(done.stdout)
        self.assertEqual((done.returncode, report["status"]), (1, "fail"))
        self.assertIn({"level": "ok", "check": "config", "text": "the defaults"}, report["checks"])

    def test_bad_files_of_rrouter_are_named(self):
        put(self.home, "config.json", "{")
        self.addCleanup((self.home.dir / "config.json").unlink)
        put(self.home, "mode", "nosuch\n")
        bad = self.check(r"fail +config: .*/config\.json:1:2", "warn +mode: 'nosuch' is not")
        self.assertEqual(len(bad), 2)

    def test_an_installed_service_and_another_version_are_named(self):
        unit = self.home.root / ".config" / "systemd" / "user" / "rrouter.service"
        program = self.home.root / "bin" / "rrouter"
        for path in (unit, program):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.addCleanup(path.unlink)
        unit.write_text("[Service]\n")
        program.write_text("")
        self.check("fail +service: .*starts .*/bin/rrouter, which is gone")
        program.write_text("#!/usr/bin/env python3\n")
        program.chmod(0o755)
        self.check("warn +service: .* is installed, but service managers serve",
                   "ok +program: .*/bin/rrouter, run by /usr/bin/env$", PATH="")
        other = self.start_rrouter(self.upstream, limits={"__version__": "9.9.9"})
        self.assertRegex(run_here(other.home, "check").stdout, "warn +version: the daemon is 9.9.9")


# Installation #################################################################

# Stands in for systemctl and launchctl: records each request, and starts and stops the service with
# a bare environment.  Requests that contain the text in the file `fails` fail.  As with the real
# launchd, `bootout` returns with 36 before the job ends, and the job stays known for a while.
MANAGER = r"""#!/bin/sh
cd "${0%/*}" && printf '%s\n' "$*" >>asked
if [ -e fails ]; then
    case $* in *"$(cat fails)"*) echo 'scripted failure' >&2; exit 1 ;; esac
fi
[ -e environment ] || printf "HOME=\$'%s'\n" "$HOME" >environment
config=$(sed -n 's/^XDG_CONFIG_HOME=//p' environment)
unit=${config:-$HOME/.config}/systemd/user/rrouter.service
running() { [ -s pid ] && kill -0 "$(cat pid)" 2>/dev/null; }
stop() { ! running || kill "$(cat pid)"; while running; do sleep 0.01; done; rm -f pid; }
start() {       # the subshell reaps the daemon at once, so that its end is seen
    (env -i HOME="$HOME" PATH=/usr/bin:/bin "$@" & echo $! >pid; wait) >/dev/null 2>&1 &
    until [ -s pid ]; do sleep 0.01; done
}
case $* in
*show-environment) cat environment ;;
*' stop '*) stop ;;
print*/com.rrouter) running || [ -e leaving ] ;;
*' start '*)
    running || start sh -c 'set -a; . "$1"; SYSTEMD_EXEC_PID=$$ exec "$2" serve' sh \
        "$HOME$(sed -n 's/^EnvironmentFile=-%h//p' "$unit")" \
        "$HOME$(sed -n 's/^ExecStart=%h\(.*\) serve/\1/p' "$unit")" ;;
bootstrap*)
    ! running && [ ! -e leaving ] || exit 5
    start XPC_SERVICE_NAME=com.rrouter "$PYTHON" -c 'import os, plistlib, sys
with open(sys.argv[1], "rb") as file: words = plistlib.load(file)["ProgramArguments"]
os.execv(words[0], words)' "$HOME/Library/LaunchAgents/com.rrouter.plist" ;;
kickstart*) running || exit 3 ;;
bootout*)
    touch leaving
    (sleep 0.1; stop; sleep 0.2; rm leaving) >/dev/null 2>&1 &
    exit 36 ;;
esac
"""

# The installed program in most tests: its daemon starts fast, and its commands do nothing.
STUB = '''#!/usr/bin/env python3
"""rrouter: a local router between the tests and nothing."""
import os, sys
__version__ = "0.0.1"

def serve(root, by):
    import fcntl, socket
    port, lock = int(os.environ["RROUTER_PORT"]), open(root + "rrouter.lock", "a+")
    fcntl.flock(lock, fcntl.LOCK_EX)        # waits for the end of the daemon before
    health = ('{"host": "%s", "port": %d, "pid": %d, "mode": "auto", "startedBy": "%s", '
              '"autoSwitch": {}, "problems": [], "upstreamURL": "http://h", "upstream": "", '
              '"listenAddr": ""}' % (os.environ.get("RROUTER_HOST") or "localhost", port,
                                     os.getpid(), by))
    for name, text in (("run.json", health), ("rrouter.lock", "%d\\n" % os.getpid())):
        with open(root + name, "w") as file:
            file.write(text)
    listener = socket.create_server(("127.0.0.1", port))
    while True:
        with listener.accept()[0] as connection:
            connection.recv(65536)
            connection.sendall(("HTTP/1.0 200 OK\\r\\n\\r\\n" + health).encode())

def main():
    root, verb = os.path.expanduser("~/.rrouter/"), sys.argv[1]
    if verb == "restart":
        import fcntl
        with open(root + "rrouter.lock") as file:
            os.kill(int(file.read()), 15)
            fcntl.flock(file, fcntl.LOCK_EX)        # waits for its end
    if verb == "serve":
        serve(root, "systemd" if "SYSTEMD_EXEC_PID" in os.environ else "launchd")
    if verb in ("start", "restart") and not os.fork():
        os.setsid()
        os.closerange(0, 3)
        serve(root, "start")
    if verb in ("start", "restart"):
        import socket, time
        address, refused = ("127.0.0.1", int(os.environ["RROUTER_PORT"])), True
        while refused:
            time.sleep(0.01)
            with socket.socket() as connection:
                refused = connection.connect_ex(address)
    print("rrouter 0.0.1 did", *sys.argv[1:])
'''

# Runs commands of rrouter, each in a fork, because an import takes a tenth of a second.  They
# install STUB.  A command is killed just before change number `kill_at`, counted from 0.
ZYGOTE = '''
import hashlib, io, itertools, json, marshal, os, pwd, shutil, signal, subprocess, sys, time, types
sys.path.insert(0, sys.argv[1])
import rrouter, zipfile
rrouter.__loader__ = types.SimpleNamespace(get_source=lambda _: sys.argv[2])

def run(words, env, output, kill_at):
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    for descriptor, name in enumerate((os.devnull, output, output)):
        os.dup2(os.open(name, os.O_RDWR | os.O_APPEND), descriptor)
    changes = itertools.count()
    pwd.getpwuid = lambda _: types.SimpleNamespace(pw_dir=env["HOME_OF_USER"])
    def count(event, _):
        if (event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "subprocess.Popen")
                and next(changes) == kill_at):
            os.kill(os.getpid(), signal.SIGKILL)
    if kill_at is not None:
        sys.addaudithook(count)
    return rrouter.run_command(words)

for line in sys.stdin:
    child, status = os.fork(), 70
    if not child:
        try:
            status = run(*json.loads(line))
            sys.stdout.flush()
        except SystemExit as end:
            status = end.code
        finally:
            os._exit(status)
    print(os.waitpid(child, 0)[1], flush=True)
'''


@functools.cache
def light_python():
    """Return an interpreter like this one that starts fast, because it has no site-packages."""
    root, real = pathlib.Path(tempfile.mkdtemp(prefix="rrouter-")), os.path.realpath(sys.executable)
    atexit.register(shutil.rmtree, str(root), True)
    (root / "pyvenv.cfg").write_text(
        f"home = {os.path.dirname(real)}\ninclude-system-site-packages = false\n")
    (root / "bin").mkdir()
    (root / "bin" / "python3").symlink_to(real)
    return str(root / "bin" / "python3")


@functools.cache
def zygote():
    words = light_python(), "-c", ZYGOTE, os.path.dirname(compiled()), STUB
    process = subprocess.Popen(words, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(process.communicate)
    return process


class Installation(Home):
    """An empty HOME with a space in its name, and a stand-in for the given service manager."""

    PROGRAMS = {"systemd": "systemctl", "launchd": "launchctl"}

    def __init__(self, manager=None):
        super().__init__()
        self.home, self.stand_ins = self.root / "ho me", self.root / "stand-ins"
        self.home.mkdir()
        self.dir = self.home / ".rrouter"
        self.program = self.home / "bin" / "rrouter"
        self.unit = self.home / ".config" / "systemd" / "user" / "rrouter.service"
        self.environment = self.home / ".config" / "rrouter.env"
        self.settings = self.home / ".claude" / "settings.json"
        self.url = f"http://localhost:{self.port}"
        self.env.update(HOME=str(self.home), HOME_OF_USER=str(self.home), PYTHON=light_python(),
                        PATH=f"{self.stand_ins}:/usr/bin:/bin")
        self.note("asked", "")
        for name, program in self.PROGRAMS.items():
            self.note(program, MANAGER if manager == name else "#!/bin/sh\nexit 127\n")

    def note(self, name, text):
        self.put(self.stand_ins / name, text.encode(), 0o755)

    def asked(self):
        """Return what the service manager was asked to do since the last call; skip queries."""
        lines = (self.stand_ins / "asked").read_text().replace(str(self.home), "~").splitlines()
        self.note("asked", "")
        return [line for line in lines
                if not re.search(r"\b(show|print|reset|daemon-reload|enable gui)", line)]

    def do(self, *words, status=0, env=(), program=None, kill_at=None):
        """Run a command of the rrouter that installs STUB, or of `program`; return all it printed.

        With `kill_at`, return whether it was killed.
        """
        if program:
            return self.run(*words, program=program, check=status, env=env,
                            stderr=subprocess.STDOUT, cwd=str(self.root)).stdout
        output = self.put(self.stand_ins / "output", b"")
        request = words, {**self.env, **dict(env)}, str(output), kill_at
        print(json.dumps(request), file=zygote().stdin, flush=True)
        ended = os.waitstatus_to_exitcode(int(zygote().stdout.readline()))
        printed = output.read_text()
        if "Traceback" in printed or ended not in (status, kill_at is not None and -9):
            raise AssertionError(f"{words}: status {ended}\n{printed}")
        return printed if kill_at is None else ended == -9

    def rrouter(self, *arguments):
        return self.do(*arguments, program=[str(self.program)])

    def claude(self):
        return json.loads(self.settings.read_text(encoding="utf-8"))

    @staticmethod
    def put(path, content, mode=0o644):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(mode)
        return path

    def tree(self, data=True):
        """Return all files under HOME as {name: (mode, content)}; with ~/.rrouter if `data`."""
        return {str(path.relative_to(self.home)): (
                    stat.S_IMODE(path.lstat().st_mode),
                    os.readlink(path) if path.is_symlink() else
                    path.read_bytes() if path.is_file() else None)
                for path in sorted(self.home.rglob("*")) if data or ".rrouter" not in path.parts}

    def remove(self):
        for name in (self.stand_ins / "pid", self.dir / "rrouter.lock"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(name.read_text().split()[0]), signal.SIGTERM)
        super().remove()


DEFAULT_FILE = (rrouter.config_text(rrouter.config_of(None)) + "\n").encode()


class InstallTest(unittest.TestCase):
    """Base of the tests that install."""

    def installation(self, manager=None):
        installation = Installation(manager)
        self.addCleanup(installation.remove)
        return installation


class ServiceFilesTest(InstallTest):

    def test_the_installed_service_files_equal_those_of_the_repository(self):
        """Each default config.json ever shipped stays in OLD_DEFAULTS."""
        for name, text in rrouter.SERVICE_FILES.items():
            self.assertEqual((HERE / name).read_text(encoding="utf-8"), text, name)
        self.assertIn(rrouter.digest(DEFAULT_FILE)[:16], rrouter.OLD_DEFAULTS)

    def test_services_give_up_on_a_taken_port_and_leave_streams_time_to_end(self):
        unit, agent = rrouter.SERVICE_FILES.values()
        seconds = {name: int(value) for name, value in re.findall(r"(?m)^(\w+)=([0-9]+)$", unit)}
        self.assertLess(seconds["RestartSec"] * seconds["StartLimitBurst"],
                        seconds["StartLimitIntervalSec"])       # or it would restart for ever
        self.assertGreater(min(seconds["TimeoutStopSec"],
                               plistlib.loads(agent.encode())["ExitTimeOut"]), rrouter.DRAIN_S)

    @unittest.skipUnless(shutil.which("systemd-analyze"), "systemd-analyze is not here")
    def test_systemd_finds_nothing_wrong_with_the_unit(self):
        home = self.installation()
        home.put(home.root / "bin" / "rrouter", b"#!/bin/sh\n", 0o755)
        env = {"HOME": str(home.root), "XDG_RUNTIME_DIR": str(home.root)}
        self.assertEqual(home.do("--user", "verify", str(HERE / "rrouter.service"),
                                 program=["systemd-analyze"], env=env), "")


class ProgramTest(InstallTest):
    """The zip application."""

    def setUp(self):
        self.home = self.installation()
        self.program = self.home.program

    def write(self, interpreter):
        """Write ~/bin/rrouter, STUB with this interpreter in its first line; return its bytes."""
        loader = types.SimpleNamespace(get_source=lambda _: STUB)
        with mock.patch.object(rrouter, "__loader__", loader):
            return self.home.put(self.program, rrouter.program_bytes(str(interpreter)),
                                 0o755).read_bytes()

    def test_program_runs_with_any_interpreter_and_check_names_it_when_it_is_gone(self):
        for name in ("my pythons", "l" * 120):
            python = pathlib.Path(light_python()).with_name(name) / "python3"
            python.parent.mkdir()
            python.symlink_to(light_python())
            self.assertEqual(self.write(python)[:10], b"#!/bin/sh\n")
            self.assertEqual(self.home.rrouter("a b", "c"), "rrouter 0.0.1 did a b c\n")
            line = f"program: {self.program}, run by {python}"
            self.assertIn(f"ok    {line}\n", self.home.do("check", status=1))
            shutil.rmtree(python.parent)
            self.assertIn(f"fail  {line}, which is gone: run in", self.home.do("check", status=1))

    def test_program_imports_no_file_next_to_it_and_survives_an_upgrade_of_python(self):
        content = self.write(light_python())
        self.assertEqual(content.partition(b"\n")[0], b"#!" + light_python().encode())
        with zipfile.ZipFile(self.program) as archive:
            module = archive.read("rrouter.pyc")
        self.assertEqual(module[4:8], b"\1\0\0\0")      # not checked against the source
        for name in ("json.py", "argparse.py", "rrouter.py"):
            self.home.put(self.program.parent / name, b"raise SystemExit('run')")
        for text in content, content.replace(module[:4], b"\0\0\r\n"):
            self.home.put(self.program, text, 0o755)
            self.assertEqual(self.home.rrouter("x"), "rrouter 0.0.1 did x\n")
        code = "import sys; sys.version_info = (3, 8); exec(sys.argv[1])"
        self.assertEqual(self.home.do("-c", code, rrouter.ZIP_MAIN, program=PYTHON, status=1),
                         "rrouter: Python 3.8 is too old: run install.sh again\n")

    def test_program_names_an_interpreter_that_lasts(self):
        real, (stable, mine, none) = os.path.realpath(sys.executable), (
            str(self.home.root / name) for name in ("stable", "mine", "none"))
        for path in (stable, mine):
            os.symlink(real, path)
        for python, link, chosen in ((mine, stable, mine), ("/bin/sh", stable, stable),
                                     ("", none, real)):
            with mock.patch.multiple(rrouter, STABLE_LINKS=(none, link)), \
                    mock.patch.multiple(
                        sys, executable=light_python(), prefix="/a virtual environment"), \
                    mock.patch.dict(os.environ, PYTHON=python):
                found = rrouter.stable_interpreter()
            self.assertEqual(os.path.realpath(found) if chosen == real else found, chosen)
            self.assertNotEqual(found, light_python())


class InstallScriptTest(InstallTest):
    """install.sh: the options, and the choice of Python."""

    def setUp(self):
        self.home = self.installation()
        # PATH has only the stand-ins and the tools of the script, so no interpreter is found.
        for tool in ("sh", "awk", "cat", "dirname", "tail", "uname"):
            (self.home.stand_ins / tool).symlink_to(shutil.which(tool))
        self.home.env.update(PYTHON="", PATH=str(self.home.stand_ins))
        self.clone = self.home.put(
            self.home.root / "a clone" / "rrouter.py",
            b"import sys\nprint(*sys.argv[1:], sys.executable)").parent
        shutil.copy(HERE / "install.sh", self.clone)
        # This interpreter reports the version 3.8.
        code = "import sys; sys.version_info = (3, 8, 18); exec(sys.argv[1])"
        self.home.note("python3", f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$4"\n')
        self.home.note("python3.13", "#!/bin/sh\necho 'no such version' >&2; exit 127\n")

    def script(self, *options, shell="sh", **how):
        program, *words = shell.split()
        return self.home.do(*options, program=[shutil.which(program), *words,
                                               str(self.clone / "install.sh")], **how)

    def test_a_suitable_python_gets_the_options_in_every_shell(self):
        # The path of a shim is not printed.
        self.home.note("python3.12", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        for shell in ("sh", "bash --posix", "busybox sh", "zsh --emulate sh"):
            for options, words in (((), "install"),
                                   (("two words", "--claude"), "install two words --claude"),
                                   (("--purge", "--uninstall"), "uninstall --purge")):
                if shutil.which(shell.split()[0]):
                    self.assertEqual(self.script(*options, shell=shell),
                                     f"{words} {sys.executable}\n", (shell, options))
        self.assertRegex(self.script("-h"), r"^Usage: ./install\.sh")
        self.assertIn("--purge goes with --uninstall", self.script("--purge", status=1))

    def test_the_variable_python_is_used_or_all_candidates_are_named(self):
        for value, says in (("python3", "is Python 3.8"), ("/no/python", "not a program")):
            self.assertIn(says, self.script(status=1, env={"PYTHON": value}))
        self.assertEqual(self.script(env={"PYTHON": sys.executable}), f"install {sys.executable}\n")
        if not any(map(os.path.exists, ("/usr/local/bin/python3", "/opt/homebrew/bin/python3"))):
            said = self.script(status=1)
            for says in ("3.9 or newer", "stand-ins/python3: is Python 3.8",
                         "python3.13: no such version", "PYTHON"):
                self.assertIn(says, said)


class InstalledLifeTest(InstallTest):
    """From an empty HOME through an upgrade to the end, with the real program."""

    def test_installation_does_not_need_the_clone_and_uninstall_leaves_nothing(self):
        home = self.installation()
        copied = shutil.copy(RROUTER, home.root / "copied.py")
        said = home.do("install", "--claude", program=[*PYTHON, copied])
        os.unlink(copied)
        self.assertRegex(said, (
            rf"(?s)\nrrouter {rrouter.__version__} is installed as {home.program}\n"
            "no service, because service managers serve your home directory.*\ninstalled or "
            rf"changed: {home.program}, {home.settings}\nok    daemon: .*\nfail  upstream: .*"
            rf"hint: ~/bin is not in PATH.*\nnext: '{home.program}' status\n"))
        first = home.health()
        self.assertEqual((first["startedBy"], first["mode"], first["problems"]),
                         ("start", "auto", []))
        self.assertEqual([oct(path.stat().st_mode)[-3:] for path in (
            home.dir, home.dir / "mode", home.dir / "install.json", home.program)],
            ["700", "600", "600", "755"])
        self.assertFalse((home.dir / "config.json").exists())
        if shutil.which("curl"):
            self.assertEqual(home.do("-c", home.claude()["statusLine"]["command"],
                                     program=["sh"]), "auto → antigravity\n")
        home.write("mode", "claude\n")
        home.env["PATH"] += f":{home.program.parent}"
        del home.env["RROUTER_PORT"]        # the daemon keeps its port
        said = home.rrouter("install")
        self.assertIn(f"{home.program} (before: {rrouter.__version__})\n", said)
        self.assertTrue(said.endswith("\nnext: rrouter status\n"), said)
        home.env["RROUTER_PORT"] = str(home.port)
        second = home.health()
        self.assertEqual((second["pid"] == first["pid"], second["mode"]), (False, "claude"))
        home.env["ANTHROPIC_BASE_URL"] = home.url
        said = home.rrouter("uninstall")
        self.assertIn("\nstill pointing at rrouter: this shell: remove ANTHROPIC_BASE_URL ", said)
        self.assertIn(f"stays: {home.dir} (mode, config, state and logs): rm -r '{home.dir}'\n",
                      said)
        removed = (home.settings, home.settings.parent, home.program, home.program.parent)
        self.assertIn(f"\nremoved: {', '.join(map(str, removed))}\n", said)
        self.assertEqual((home.tree(data=False), home.read("mode"), home.health()),
                         ({}, "claude\n", None))
        with socket.create_server(("127.0.0.1", home.port)):
            said = home.do("install", program=[*PYTHON, RROUTER], status=1,
                           env={"RROUTER_PORT": str(home.port)})
        self.assertRegex(said, f"\nrrouter: .*{home.port}.*\n\\Z")
        self.assertNotIn(f"stays: {home.program}", home.do("uninstall", "--purge"))
        shutil.copy(RROUTER, home.put(home.program, b"", 0o755))    # a plain copy is ours, too
        home.do("install", program=[*PYTHON, home.program])
        home.do("uninstall", "--purge", program=[home.program])
        self.assertEqual(home.tree(), {})

    def test_of_two_installations_at_once_the_second_waits(self):
        home = self.installation()
        home.put(home.settings, b'{"env":{"ANTHROPIC_BASE_URL":"http://old"}}')
        before = home.tree()
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for ended in [pool.submit(home.do, "install", "--claude", program=[*PYTHON, RROUTER])
                          for _ in range(2)]:
                ended.result()
        home.do("uninstall", "--purge")
        self.assertEqual(home.tree(), before)


class ServiceManagerTest(InstallTest):
    """The requests to the service manager, which starts STUB."""

    DOMAIN = f"gui/{os.getuid()}"
    ORDERS = {
        # manager: the request to stop, then those to start
        "systemd": ["--user stop rrouter.service", "--user start rrouter.service"],
        # `kickstart -k` would keep the old agent, and `bootstrap` fails where it is still loaded.
        "launchd": [f"bootout {DOMAIN}/com.rrouter",
                    f"bootstrap {DOMAIN} ~/Library/LaunchAgents/com.rrouter.plist",
                    f"kickstart {DOMAIN}/com.rrouter"],
    }

    def test_manager_takes_over_from_the_forked_daemon(self):
        for manager, (stop, *start) in self.ORDERS.items():
            home, program = self.installation(), Installation.PROGRAMS[manager]
            self.assertIn("no service, because neither systemd nor launchd", home.do("install"))
            home.note(program, MANAGER)
            home.do("install")
            self.assertEqual(home.asked(), [])
            home.do("restart")              # STUB has forked again
            home.asked()
            home.do("restart")
            self.assertEqual((home.health()["startedBy"], home.asked()), (manager, [stop, *start]))
            self.assertIn(f"would stop the service of {manager}", home.do("uninstall", "--dry-run"))
            self.assertEqual((home.asked(), home.health()["startedBy"]), ([], manager))
            home.do("uninstall", "--purge")
            self.assertEqual((home.asked(), home.tree(), home.health()), ([stop], {}, None))

    CONFIGS = (
        # XDG_CONFIG_HOME of the manager, of the installing shell, of the uninstalling one
        ("its own", None,   None),
        ("its own", "mine", "mine"),
        ("",        "mine", None),
        ("",        None,   "mine"),
    )

    def test_unit_is_where_the_manager_looks_and_every_shell_finds_it(self):
        for of_manager, *of_shells in self.CONFIGS:
            home = self.installation("systemd")
            directory = home.home / (of_manager or ".config")
            home.note("environment", f"XDG_CONFIG_HOME=$'{directory}'\n" * bool(of_manager) + "A=B")
            env = [{"XDG_CONFIG_HOME": str(home.home / name)} if name else {} for name in of_shells]
            home.do("install", env=env[0])
            self.assertTrue((directory / "systemd" / "user" / "rrouter.service").exists())
            home.do("uninstall", "--purge", env=env[1])
            self.assertEqual((home.asked(), home.tree()), (["--user stop rrouter.service"], {}))

    def test_a_trial_in_another_home_touches_neither_the_manager_nor_the_real_home(self):
        real, home = self.installation("systemd"), self.installation()
        real.do("install", "--claude")
        before, _ = real.tree(), real.asked()
        home.env.update(PATH=real.env["PATH"], HOME_OF_USER=str(real.home),
                        XDG_CONFIG_HOME=str(real.home / ".config"))
        claude = {"CLAUDE_CONFIG_DIR": str(real.settings.parent)}
        self.assertIn("settings.json is not in HOME=",
                      home.do("install", "--claude", env=claude, status=2))
        self.assertIn("\nno service, because service managers serve your home directory, ",
                      home.do("install", env=claude))
        home.do("install", "--claude")
        home.do("restart")
        home.do("uninstall", "--purge", env=claude)
        self.assertEqual((real.tree(), (real.stand_ins / "asked").read_text(), home.tree()),
                         (before, "", {}))

    def test_a_manager_that_does_not_answer_is_named_and_leaves_no_unit(self):
        home = self.installation("systemd")
        home.note("fails", "")
        self.assertIn("\nno service, because systemctl --user does not answer: scripted failure\n",
                      home.do("install"))
        self.assertFalse(home.unit.exists())
        self.assertEqual(rrouter.run_program(("sleep", "9"), 0.01)[0], 124)     # 127: not installed
        home.note("fails", "nothing")
        home.do("install")
        home.note("fails", "")
        self.assertTrue((home.unit.parent / "default.target.wants").is_dir())
        home.do("uninstall", "--purge")
        self.assertEqual(home.tree(), {})

    def test_a_service_gets_the_settings_of_the_shells_that_installed_it(self):
        home, ports = self.installation("systemd"), (free_port(), free_port())
        for env, lines in (
                ({"PORT": ports[0], "UPSTREAM": "http://h/a=b", "HOST": "0.0.0.0"},
                 f"PORT='{ports[0]}' UPSTREAM='http://h/a=b' HOST='0.0.0.0'"),
                ({"PORT": ports[1], "UPSTREAM": "", "HOST": ""},
                 f"PORT='{ports[1]}' UPSTREAM='http://h/a=b' HOST='0.0.0.0'")):
            home.do("install", "--claude", env={f"RROUTER_{name}": str(env[name]) for name in env})
            self.assertIn(f'"http://localhost:{env["PORT"]}"', home.settings.read_text())
            self.assertEqual(sorted(home.environment.read_text().splitlines()[1:]),
                             sorted(f"RROUTER_{line}" for line in lines.split()))
        mine = home.environment.read_bytes() + b"export RROUTER_X=1\n"
        home.put(home.environment, mine, 0o600)
        self.assertIn(f"leave {home.environment} as it is, because it is yours", home.do("install"))
        self.assertIn(f"stays: {home.environment} (changed since ", home.do("uninstall", "--purge"))
        self.assertEqual(home.environment.read_bytes(), mine)


class ForeignFilesTest(InstallTest):
    """Files of others at the paths of the installation, before it and after it."""

    PROGRAM, UNIT = "bin/rrouter", ".config/systemd/user/rrouter.service"
    SETTINGS, LINK = ".claude/settings.json", os.path.dirname(UNIT) + "/" + rrouter.WANTED_LINK
    CONFIG, RECORD = ".rrouter/config.json", ".rrouter/install.json"
    RULES, DEFAULTS = '{"modes": {"a": {"mappings": []}}}', DEFAULT_FILE.decode()
    OURS = rrouter.SERVICE_FILES["rrouter.service"]
    OTHERS = {"bin/other.1.2.tmp": "", "bin/rrouter.tmp": "", "bin/rrouter.x.1.tmp": ""}
    SITUATIONS = (
        # Files before ("->": a link); commands (i: install, c: with --claude, u: uninstall) and
        # writes (None: remove); all files after, or some if rrouter is installed; last output.
        ({PROGRAM: "\x7fELF"}, "iiu", {PROGRAM: "\x7fELF"}, "put the old .*/bin/rrouter back"),
        ({PROGRAM: "-> /no/such"}, "iiu", {PROGRAM: "-> /no/such"}, "."),
        ({PROGRAM: "-> ../x", "x": "mine"}, "iiu", {PROGRAM: "-> ../x", "x": "mine"}, "."),
        ({}, ("i", {PROGRAM: "mine"}, "u"), {PROGRAM: "mine"},
         r"stays: (.*/bin/rrouter) \(changed since it was installed\): rm '\1'"),
        ({PROGRAM: "1st"}, ("i", {PROGRAM: "2nd"}, "u"),
         {PROGRAM: "2nd", PROGRAM + ".bak": "1st"}, "stays: .*bak-.* .an earlier backup.: look "),
        ({PROGRAM: "1st"}, ("i", {PROGRAM: "3rd"}, "iu"),
         {PROGRAM: "1st", PROGRAM + ".bak": "3rd"}, "."),
        ({UNIT: "mine"}, ("i", {UNIT: OURS + "# edited"}, "iu"),
         {UNIT: "mine", UNIT + ".bak": OURS + "# edited"}, "."),
        ({}, ("i", {UNIT: "mine"}, "i"), {UNIT: OURS}, "keep the old .*service as "),
        ({}, ("i", {UNIT: "mine"}, "iu"), {UNIT + ".bak": "mine"}, r"stays: .*e\.bak-"),
        ({UNIT: "mine", LINK: "-> ../rrouter.service"}, "iiu",
         {UNIT: "mine", LINK: "-> ../rrouter.service"}, "."),
        ({}, ("i", {RECORD: None, ".config/rrouter.env": None}, "iu"), {}, "."),
        ({}, ("c", {RECORD: None, ".config/rrouter.env": None}, "cu"),
         {SETTINGS: '{\n  "env": {}\n}\n'}, "."),
        ({SETTINGS: ""}, "cu", {SETTINGS: ""}, "."),
        ({UNIT: OURS}, "iu", {}, "."),
        ({PROGRAM: "x", UNIT: OURS}, "u", {PROGRAM: "x", UNIT: OURS},
         "removed: nothing\nstays: .*/rrouter .not recorded as installed.: look at it .*\nstays: "),
        ({}, ("i", {**OTHERS, "bin/rrouter.1.2.tmp": ""}, "u"), OTHERS, "."),
        ({".rrouter": "-> real", "real/mine": "x"}, "iu",
         {".rrouter": "-> real", "real/mine": "x", "real/install.json": None}, "stays: .*: rm -r"),
        ({CONFIG: RULES}, "i", {CONFIG: RULES}, r"\A(?!(?s:.*)set the mode)"),
        ({CONFIG: DEFAULTS}, "i", {CONFIG: None, CONFIG + ".bak": DEFAULTS},
         "move .*, which holds nothing but defaults, "),
    )

    def write(self, home, files):
        for name, text in files.items():
            path = home.home / name
            if text is None:
                path.unlink()
            elif text.startswith("-> "):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.symlink_to(text[3:])
            else:
                home.put(path, text.encode(), 0o755)

    def left(self, home):
        """Return all files and links; the names of backups lack their time."""
        return {re.sub(r"\.bak-.*", ".bak", name): (
                    f"-> {content}" if isinstance(content, str) else content.decode("latin-1"))
                for name, (_, content) in home.tree().items() if content is not None}

    def test_files_of_others_stay_or_come_back(self):
        for before, steps, after, says in self.SITUATIONS:
            with self.subTest(before=[*before], steps=steps):
                home, said = self.installation("systemd"), ""
                self.write(home, before)
                for step in steps:
                    if isinstance(step, dict):
                        self.write(home, step)
                        continue
                    for letter in step:
                        said = home.do(*{"i": ["install"], "c": ["install", "--claude"],
                                         "u": ["uninstall", "--purge"]}[letter])
                self.assertRegex(said, says)
                left = self.left(home)
                if step[-1] == "i" or ".rrouter" in before:
                    left = {name: left.get(name) for name in after}
                self.assertEqual(left, after)

    def test_file_of_others_stays_in_place_on_a_full_disk(self):
        home = self.installation()
        home.put(home.program, b"the old one", 0o755)
        shell = ["/bin/sh", "-c", 'ulimit -f 16; exec "$@"', "sh", *PYTHON, RROUTER]
        self.assertIn(f"\nrrouter: {home.home}: file too large: fix that, then run this again\n",
                      home.do("install", program=shell, status=1))
        self.assertNotIn(str(home.program), home.do("uninstall"))       # nor advice to remove it
        self.assertEqual([path.read_bytes() for path in home.program.parent.iterdir()],
                         [b"the old one"])

    def test_a_dry_run_changes_nothing_and_wrong_conditions_are_refused(self):
        home = self.installation("systemd")
        plan = home.do("install", "--dry-run", "--claude")
        for says in (f"would install {home.program}\n", "default.target.wants/rrouter.service\n",
                     "would set the mode to auto", "would point Claude Code at rrouter in "):
            self.assertIn(says, plan)
        created = re.findall("would create (.*)", plan)
        self.assertIn(str(home.unit.parent), created)
        self.assertEqual(len(created), len(set(created)), created)
        self.assertIn("RROUTER_PORT=x: ",
                      home.do("install", status=2, env={"RROUTER_PORT": "x"}))
        self.assertIn("RROUTER_UPSTREAM: a service cannot have a quote",
                      home.do("install", status=2, env={"RROUTER_UPSTREAM": "http://h/'"}))
        self.assertEqual((home.tree(), home.asked()), ({}, []))
        home.program.mkdir(parents=True)
        self.assertIn("bin/rrouter: is a directory: fix that, ", home.do("install", status=1))
        self.assertEqual([*home.tree()], ["bin", "bin/rrouter"])
        for record in ("{", "[]", '{"files": 1}', '{"files": {"/x": [1]}}', '{"directories": 1}',
                       '{"settings": {"/x": 1}}', '{"settings": {"/x": {"env": ["", "x"]}}}',
                       '{"files": {"/another/bin/rrouter": ["", "its digest"]}}'):
            home.write("install.json", record)
            for command in ("install", "uninstall"):
                self.assertIn("install.json is for HOME=/another, " if "another" in record
                              else "install.json: not what rrouter wrote",
                              home.do(command, status=1))
                self.assertIn("HOME is not set", home.do(command, status=2, env={"HOME": ""}))
        if os.getuid() == 0:
            os.chown(home.home, 1, 1)
            for command in ("install", "uninstall"):
                self.assertIn("run this without sudo", home.do(command, status=1))

    OF_5_0_0 = (
        # `before` in its record, settings the user added, settings left
        ({},                                  {},       '{"model": "opus"}'),
        ({},                                  {"a": 1}, '{"model": "opus", "a": 1}'),
        ({"env": {"ANTHROPIC_BASE_URL": ""}}, {},
         '{"model": "opus", "env": {"ANTHROPIC_BASE_URL": ""}}'),
        (None,                                {},       '{"model": "opus"}'),
        (None,                                {},       "null"),     # no file
    )

    def test_an_installation_of_5_0_0_is_upgraded_and_uninstalled(self):
        upgrades = (), ("install",), ("install", "--claude")
        for (before, added, left), upgrade in itertools.product(self.OF_5_0_0, upgrades):
            home = self.installation("systemd")
            link = home.unit.parent / "default.target.wants" / home.unit.name
            settings = {"model": "opus"} if left != "null" else {}
            settings["env"] = {"ANTHROPIC_BASE_URL": home.url}
            files = {home.program: STUB.replace("0.0.1", "5.0.0"), home.unit: "[Unit] of 5.0.0",
                     home.settings: json.dumps(settings, indent=2) + "\n"}
            digests = {str(home.put(path, text.encode(), 0o755)): rrouter.digest(text.encode())
                       for path, text in files.items()}
            claude = {"before": before, "written": [home.url], "backup": None,
                      "sha256": digests[str(home.settings)]}
            link.parent.mkdir()
            link.symlink_to(home.unit)      # as `systemctl enable` did
            home.write("install.json", json.dumps({
                "files": {str(path): {"backup": None, "sha256": [digests[str(path)]]}
                          for path in (home.program, home.unit)},
                "directories": [str(home.home / name) for name in (
                    "bin", ".config", ".config/systemd", ".config/systemd/user")],
                "claude": claude}))
            if added:
                home.settings.write_text(json.dumps({**settings, **added}))
            if upgrade:
                self.assertIn(f"{home.program} (before: 5.0.0)\n", home.do(*upgrade))
            home.do("uninstall", "--purge")
            self.assertEqual(json.loads(self.left(home).get(self.SETTINGS, "null")),
                             json.loads(left))
            shutil.rmtree(home.settings.parent)
            self.assertEqual(home.tree(), {})


class ClaudeSettingsTest(InstallTest):
    """`install --claude` and its reversal."""

    TABS = '{\r\n\t"한국어": "\\ud55c",\r\n\t"env": {\r\n\t\t"A": "1"\r\n\t}\r\n}'
    EDITS = (
        # settings, member, settings after the edit
        ("{\n}\n",         "x",     '{\n  "x": 0\n}\n'),
        ("\ufeff {}",      "x",     '\ufeff {"x": 0}'),
        ('{"a":[1.50]}',   "x",     '{"x": 0,"a":[1.50]}'),
        ('{"x" : "}"\n}',  "x",     '{"x" : 0\n}'),
        (TABS,             "env.x", TABS.replace('\t"A"', '\t"x": 0,\r\n\t\t"A"')),
        ('{"env": {}, "env": {"x": [1e-7, 2]}}', "env.x", '{"env": {}, "env": {"x": 0}}'),
        ('{"env": {\n}}',  "env.x", '{"env": {\n  "x": 0\n}}'),
        ("{}",             "env.x", "{}"),
    )

    def test_an_edit_changes_one_member_and_no_other_byte(self):
        for before, name, after in self.EDITS:
            text, old = rrouter.edit_member(before, name, "0")
            self.assertEqual(text, after)
            self.assertEqual(rrouter.edit_member(text, name, old)[0], before)
        for name, after in (("a", '{\n "b": 2}'), ("b", '{"a": 1}')):
            self.assertEqual(rrouter.edit_member('{"a": 1 ,\n "b": 2}', name, None),
                             (after, {"a": "1", "b": "2"}[name]))

    CHANGES = (
        # settings before, members added after the installation, settings left (...: as before)
        (None,                               {},                   None),
        (TABS,                               {},                   TABS),
        ('\ufeff{"env":{"ANTHROPIC_BASE_URL":"x"},"z":[1.50,1e999]}', {}, ...),
        ('{"statusLine": {"command": "mine"}, "env": {}}', {}, ...),
        (None,                               {"model": "x"},       '{"model": "x"}'),
        ('{"a": 1}',                         {"env": {"B": "z"}},  '{"a": 1, "env": {"B": "z"}}'),
        ('{"a": 1}',                         {"statusLine": 2},    '{"a": 1, "statusLine": 2}'),
        ('{"env": {"ANTHROPIC_BASE_URL": "y"}}', {"env": {"ANTHROPIC_BASE_URL": "new"}},
         '{"env": {"ANTHROPIC_BASE_URL": "new"}}'),
    )

    def test_settings_are_restored_to_the_byte_but_later_changes_stay(self):
        for before, since, left in self.CHANGES:
            home, left = self.installation(), before if left is ... else left
            if before is not None:
                home.put(home.settings, before.encode(), 0o640)
            home.do("install", "--claude", env={"RROUTER_PORT": str(free_port())})
            home.do("install")              # changes the port in the settings
            settings = json.loads(home.settings.read_text(encoding="utf-8-sig"))
            self.assertEqual(settings["env"]["ANTHROPIC_BASE_URL"], home.url)
            line = "mine" if before and "mine" in before else f"curl -s '{home.url}/health?line'"
            self.assertEqual(settings["statusLine"]["command"], line)
            self.assertEqual(stat.S_IMODE(home.settings.stat().st_mode), 0o640 if before else 0o600)
            if since:
                home.settings.write_text(json.dumps({**settings, **since}))
            home.do("uninstall", "--purge")
            if since:
                self.assertEqual(home.claude(), json.loads(left))
            else:
                self.assertEqual([content for _, content in home.tree().values() if content],
                                 [left.encode()] if left else [])

    def test_a_mode_in_the_url_survives_upgrades_and_is_removed_with_it(self):
        home = self.installation()
        home.put(home.settings, b'{"a": 1}')
        home.do("install", "--claude", env={"RROUTER_PORT": str(free_port())})
        text = home.settings.read_text()
        url = json.loads(text)["env"]["ANTHROPIC_BASE_URL"]
        home.settings.write_text(text.replace(f'{url}"', f'{url}/@claude"'))
        for words in ("install",), ("install", "--claude"):     # the first one changes the port
            home.do(*words)
            self.assertEqual(home.claude()["env"]["ANTHROPIC_BASE_URL"], f"{home.url}/@claude")
        home.do("uninstall", "--purge")
        self.assertEqual(home.settings.read_bytes(), b'{"a": 1}')

    def test_settings_that_cannot_be_edited_stay_and_the_rest_is_installed(self):
        home = self.installation()
        for content, mode in ((b'{"a": 1, // why\n "env": {}}', 0o644), (b"[]", 0o644),
                              (b'{"env": null}', 0o644), (b'{"a": NaN}', 0o644),
                              (b'{"a": "\xff"}', 0o644), (b"[" * 100000, 0o644), (b"{}", 0o444)):
            home.put(home.settings, content, mode)
            said = home.do("install", "--claude", status=1)
            self.assertIn(f"cannot point Claude Code at rrouter: {home.settings}: ", said)
            self.assertIn("is installed as ", said)
            home.do("uninstall", "--purge")
            self.assertEqual(home.tree(), {".claude": (0o755, None),
                                           ".claude/settings.json": (mode, content)})
            home.settings.unlink()
        home.do("install", "--claude")      # while they cannot be edited, the program stays, too
        good = home.settings.read_bytes()
        home.put(home.settings, b"{")
        said = home.do("uninstall", "--purge", status=1)
        self.assertIn(f"not undone: {home.settings}: 1:2: ", said)
        self.assertIn(": left as it is: fix that, then run this again", said)
        self.assertTrue(home.program.exists() and (home.dir / "install.json").exists())
        home.put(home.settings, good)
        home.do("uninstall", "--purge")
        self.assertEqual([*home.tree()], [".claude"])       # it was there before

    def test_a_link_stays_a_link_and_the_record_names_its_directory(self):
        home = self.installation()
        link = home.home / "claude's" / "settings.json"
        real = home.put(home.home / "dot files" / "claude.json", b"{}", 0o600)
        link.parent.mkdir()
        link.symlink_to("../dot files/claude.json")
        before = home.tree()
        home.do("install", "--claude", env={"CLAUDE_CONFIG_DIR": str(link.parent)})
        home.do("install", "--claude")
        for path in (real, home.settings):
            self.assertEqual(json.loads(path.read_text())["env"]["ANTHROPIC_BASE_URL"], home.url)
        self.assertTrue(link.is_symlink())
        home.do("uninstall", "--purge")
        self.assertEqual(home.tree(), before)

    OURS = "localhost,127.0.0.1,::1"
    PROXIES = (
        # environment,                          typed,  NO_PROXY for the settings; None: not asked
        ({},                                    "y\n",  None),
        ({"HTTPS_PROXY": "http://p"},           "\n",   OURS),
        ({"http_proxy": "p", "NO_PROXY": "a"},  "y\n",  "a," + OURS),
        ({"ALL_PROXY": "http://p"},             "no\n", ""),
        ({"ALL_PROXY": "http://p"},             "",     ""),
        ({"https_proxy": "p", "no_proxy": "b, localhost"}, "y\n", None),
    )

    def test_no_proxy_is_offered_on_a_terminal_where_a_proxy_is_set(self):
        for env, typed, value in self.PROXIES:
            for place in ({"env": env}, {}):        # the settings; the environment
                terminal, screen = io.StringIO(typed), io.StringIO()
                terminal.isatty = screen.isatty = lambda: True
                with mock.patch.dict(os.environ, env if place == {} else {}, clear=True), \
                        mock.patch.multiple(sys, stdin=terminal, stdout=screen):
                    offered = rrouter.offer_no_proxy(json.dumps(place))
                self.assertEqual(offered, {"env.NO_PROXY": value} if value else {})
                self.assertEqual("write it?" in screen.getvalue(), value is not None)
        with mock.patch.dict(os.environ, {"HTTPS_PROXY": "http://p"}, clear=True), \
                mock.patch.object(sys, "stdin", io.StringIO("y\n")):
            self.assertEqual(rrouter.offer_no_proxy("{}"), {})

    @unittest.skipUnless(PROC, "no /proc here")
    def test_processes_that_still_point_here_are_named(self):
        home, directory, pids = self.installation(), tempfile.mkdtemp(), []
        self.addCleanup(shutil.rmtree, directory)
        home.put(home.settings, b'{"env": {"ANTHROPIC_BASE_URL": "http://localhost:1"}}')
        home.do("install", "--claude")
        for name, url in (("shell", home.url), ("claude", "x"), ("none", "http://localhost:1")):
            os.symlink(shutil.which("sleep"), os.path.join(directory, name))
            process = home.begin("60", program=[os.path.join(directory, name)],
                                 env={"ANTHROPIC_BASE_URL": url})
            self.addCleanup(process.wait)
            self.addCleanup(process.kill)
            pids.append(process.pid)
        said = home.do("uninstall", "--purge").splitlines()[-1]
        self.assertTrue(said.startswith("still pointing at rrouter: "), said)
        self.assertEqual([f"(pid {pid})" in said for pid in pids], [True, True, False], said)


class InterruptedInstallTest(InstallTest):
    """If a command is killed at any change, `install` and `uninstall` still work."""

    OWN = b"[Service]\n# mine\n"
    SETTINGS = b'{"statusLine":7,"env":{"NO_PROXY":"x","ANTHROPIC_BASE_URL":"http://x"}}'

    def setUp(self):
        self.home = self.installation("systemd")
        self.home.put(self.home.program, b"the old one", 0o755)
        self.home.put(self.home.unit, self.OWN)
        self.home.put(self.home.settings, self.SETTINGS)
        self.before = self.home.tree()

    def test_a_killed_command_can_be_repeated_or_undone(self):
        for words in ("install", "--claude"), ("uninstall", "--purge"):
            if words[0] == "uninstall":
                self.home.do("install", "--claude")
                self.home.do("stop")
            start = shutil.copytree(self.home.home, self.home.root / words[0], symlinks=True)
            for number in itertools.count():
                is_killed = self.home.do(*words, kill_at=number)
                for path, content in (
                        (self.home.program, b"the old one"), (self.home.unit, self.OWN)):
                    found = path.parent.glob(f"{path.name}*")
                    self.assertIn(content, [file.read_bytes() for file in found])
                self.assertIn(self.home.claude()["env"]["ANTHROPIC_BASE_URL"],
                              ("http://x", self.home.url))
                if number % 4 == 0 and is_killed:
                    self.home.do(*words, env={"TZ": "XXX5"})      # backups get other names
                self.home.do("uninstall", "--purge")
                self.assertEqual(self.home.tree(), self.before, number)
                if not is_killed:
                    break
                shutil.rmtree(self.home.home)
                shutil.copytree(start, self.home.home, symlinks=True)
            self.assertGreater(number, 12)


# Faults of the machine ########################################################

def all_files(home):
    """Return {name: content} of all files under ~/.rrouter except the log and the lock."""
    return {path.name: path.read_bytes() for path in home.dir.rglob("*")
            if path.is_file() and path.name not in ("rrouter.log", "rrouter.lock", "fill")}


class FaultTest(LoopbackTest):
    """Base of the tests with a home in auto mode, which switches at the first failure."""

    def setUp(self):
        self.upstream = self.start_upstream(stream())
        self.home = self.make_home(self.upstream, "auto", HASTY_CONFIG)

    def assert_switches(self, router):
        """A failure is rescued and auto mode switches; more requests are served."""
        self.upstream.play(error(503))
        self.assertEqual([router.post().status for _ in range(9)], [200] * 9)
        self.assertTrue(router.health()["autoSwitch"]["switched"])

    def wait_for_problems(self, router, *names):
        """Post until /health has exactly one problem for each of these files."""
        def is_so():
            self.assertEqual(router.post().status, 200)
            problems = router.health()["problems"]
            return sorted(problem.split(":")[0] for problem in problems) == sorted(names)
        wait_until(is_so)

    def assert_recovers(self, router):
        """Without a restart the problems end and log lines are written again."""
        before = len(router.log())
        self.wait_for_problems(router)
        wait_until(lambda: "[REQ]" in router.log()[before:])


class FullDiskTest(FaultTest):
    """No room for a single byte: requests are served, nothing is lost, one message is logged."""

    def run_without_room(self, *arguments):
        """Run a command that cannot write to a file; its output goes to a pipe."""
        limits = 0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        return self.home.run(
            *arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))

    def test_commands_fail_and_change_nothing(self):
        old = all_files(self.home)
        for command, pattern in (
                (("claude",), r"\.rrouter/mode: .*(large|space).*free space"),
                (("config", "reset"), r"\.rrouter/config\.json.*: .*(large|space).*free space"),
                (("start",), r"rrouter\.lock: cannot be written: .*free space"),
                (("serve",), r"rrouter\.lock: cannot be written: .*free space")):
            with self.subTest(command):
                self.assert_fails(self.run_without_room(*command), 1, pattern)
                self.assertEqual(all_files(self.home), old)
        (self.home.dir / "config.json").unlink()
        self.assert_fails(self.run_without_room("config", "edit"), 1, r"config\.json: ")
        self.assertEqual(set(all_files(self.home)), set(old) - {"config.json"})
        self.home.run("start", check=0)                     # works with room again
        self.home.run("stop", check=0)

    @unittest.skipUnless(hasattr(resource, "prlimit"), "needs limits of another process")
    def test_log_and_state_that_cannot_be_written_are_named_once_and_recover(self):
        with Running(self.upstream, home=self.home) as router:
            soft, hard = resource.prlimit(router.process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(router.process.pid, resource.RLIMIT_FSIZE, (0, hard))
            self.assert_switches(router)
            self.wait_for_problems(router, "rrouter.log", "state.json")
            allowed = {"mode", "config.json", "rrouter.pid", "run.json", "state.json"}
            wait_until(lambda: set(all_files(self.home)) <= allowed)    # no temporary file stays
            resource.prlimit(router.process.pid, resource.RLIMIT_FSIZE, (soft, hard))
            self.assert_recovers(router)
            state = self.home.dir / "state.json"
            wait_until(lambda: state.exists() and "last 503" in state.read_text())


# While the file exists, each write to a file hangs, as on a disk that does not respond.
HANGING_WRITES = """
import os, time
def hanging(real):
    def call(*arguments):
        while os.path.exists(%r):
            time.sleep(0.01)
        return real(*arguments)
    return call
os.write, os.fsync = hanging(os.write), hanging(os.fsync)
"""


class HangingDiskTest(FaultTest):
    """Requests, switches, /health and the end of the process do not wait for a disk."""

    def setUp(self):
        super().setUp()
        self.flag = self.home.root / "the disk hangs"

    def running(self):
        """Return a rrouter whose disk hangs while `self.flag` exists."""
        return Running(self.upstream, code=HANGING_WRITES % str(self.flag), home=self.home)

    def test_hanging_log_or_state_stops_nothing_and_is_written_later(self):
        state = self.home.dir / "state.json"
        with self.running() as router:
            self.flag.touch()
            self.assert_switches(router)
            self.assertNotIn("SWITCH", router.log())
            self.assertFalse(state.exists())
            self.flag.unlink()
            wait_until(lambda: len(request_lines(router.log())) == 9)
            self.assertEqual(len(re.findall(r"\[AUTO\] SWITCH ", router.log())), 1)
            wait_until(lambda: state.exists() and "last 503" in state.read_text())

    def test_hanging_log_does_not_delay_the_end(self):
        with self.running() as router:
            self.flag.touch()
            self.assertEqual(router.post().status, 200)
            begin = time.monotonic()
            router.process.terminate()
            self.assertEqual(router.process.wait(WAIT_S), 0)
            self.assertLess(time.monotonic() - begin, 5)
            self.assertFalse((self.home.dir / "rrouter.pid").exists())

    def test_line_is_in_the_file_within_a_third_of_a_second(self):
        with Running(self.upstream, home=self.home) as router:
            waited = []
            for number in range(9):
                router.request("GET", "/number/%d" % number, fields=())
                begin = time.monotonic()
                wait_until(lambda number=number: "/number/%d " % number in router.log())
                waited.append(time.monotonic() - begin)
            self.assertLess(statistics.median(waited), 0.3, waited)


LIBC = ctypes.CDLL(None)


def without_privileges():
    """Make this child process obey the permissions of files even if it runs as root."""
    if os.geteuid() == 0:
        for capability in range(64):                        # PR_CAPBSET_DROP
            LIBC.prctl(24, capability, 0, 0, 0)


@unittest.skipIf(os.geteuid() == 0 and not hasattr(LIBC, "prctl"), "rights mean nothing to root")
class RightsTest(FaultTest):
    """Directories that cannot be written, and files that cannot be read."""

    def run_powerless(self, *arguments):
        return self.home.run(*arguments, preexec_fn=without_privileges)

    def test_home_that_becomes_read_only_while_running(self):
        with Running(self.upstream, home=self.home, preexec_fn=without_privileges) as router:
            for directory in (self.home.dir / "logs", self.home.dir, self.home.root):
                directory.chmod(0o500)
                self.addCleanup(directory.chmod, 0o700)
            self.assert_switches(router)
            self.wait_for_problems(router, "state.json")
            for directory in (self.home.root, self.home.dir):
                directory.chmod(0o700)
            self.assert_recovers(router)
            self.assertIn("last 503", self.home.read("state.json"))

    def test_home_that_is_read_only_from_the_start_is_named(self):
        self.home.remove_directory()
        self.home.root.chmod(0o500)
        self.addCleanup(self.home.root.chmod, 0o700)
        for command in ("serve", "start", "claude"):
            self.assert_fails(self.run_powerless(command), 1, r"\.rrouter")
        for command in ("status", "check"):
            self.assertIn(self.run_powerless(command).returncode, (1, 3))

    def test_log_that_cannot_be_opened_is_named(self):
        log = self.home.dir / "logs" / "rrouter.log"
        log.mkdir(parents=True)
        self.assert_fails(self.home.run("start"), 1, r"rrouter\.log: is a directory")
        log.rmdir()
        os.mkfifo(str(log))                     # opened like a file, it would block for ever
        self.assert_fails(self.home.run("start", timeout=WAIT_S), 1, r"rrouter\.log: ")
        with Running(self.upstream, home=self.home) as router:
            self.assertEqual([router.post().status for _ in range(3)], [200] * 3)
            self.assertIn("log lines are lost", str(router.health()["problems"]))

    @unittest.skipUnless(os.geteuid() == 0, "only root can give files away")
    def test_home_of_another_user_is_named(self):
        for path in [self.home.dir, *self.home.dir.rglob("*")]:
            os.chown(str(path), 65534, 65534)
        for rights, command in itertools.product((0o700, 0o777), ("serve", "claude")):
            self.home.dir.chmod(rights)
            self.assert_fails(self.run_powerless(command), 1, r"\.rrouter")


class LogGoneTest(FaultTest):
    """A log that is removed or replaced while rrouter runs."""

    def ways(self):
        """Return pairs: what breaks the log, and what repairs it (None: nothing is needed)."""
        logs = self.home.dir / "logs"
        file = logs / "rrouter.log"

        def put_file():
            shutil.rmtree(str(logs))
            logs.write_text("")

        def point_at_full_device():
            file.unlink()
            file.symlink_to("/dev/full")

        ways = [(file.unlink, None), (lambda: shutil.rmtree(str(logs)), None),
                (self.home.remove_directory, None), (put_file, logs.unlink)]
        return ways + [(point_at_full_device, file.unlink)] * os.path.exists("/dev/full")

    def test_requests_are_served_one_message_is_printed_and_the_log_comes_back(self):
        file = self.home.dir / "logs" / "rrouter.log"
        with Running(self.upstream, home=self.home) as router:
            for number, (way, mend) in enumerate(self.ways()):
                with self.subTest(number):
                    before = router.printed().count("log lines are lost")
                    way()
                    if mend:
                        for _ in range(3):
                            self.wait_for_problems(router, "rrouter.log")
                            time.sleep(rrouter.POLL_S)          # a round of the watcher
                        self.assertEqual(router.printed().count("log lines are lost"), before + 1)
                        mend()
                    wait_until(lambda: router.post().status == 200 and file.is_file()
                               and "[REQ]" in router.log())
                    self.wait_for_problems(router)


# Documents and floor plan #####################################################

@unittest.skipUnless((HERE / "README.md").exists(), "no README.md here")
class DocumentsTest(unittest.TestCase):
    """Both READMEs and the help say what the code does."""

    @classmethod
    def setUpClass(cls):
        cls.readmes = {path.name: path.read_text(encoding="utf-8")
                       for path in sorted(HERE.glob("README*.md"))}
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())) as out:
            rrouter.run_command(["help"])
        cls.help = out.buffer.getvalue().decode()

    def test_the_tables_of_commands_name_exactly_the_commands_and_aliases(self):
        names = {word for row in rrouter.COMMANDS for word in (row.name, *row.aliases)}
        for file, text in self.readmes.items():
            with self.subTest(file):
                table = re.search(r"(?m)^\| `rrouter demo`.*\n(?:\|.*\n)*", text).group()
                cells = [cell for row in table.splitlines() for cell in row.split("|")[1:3]]
                found = re.findall(r"`(?:rrouter )?([^` ]+)[^`]*`", " ".join(cells))
                self.assertEqual(set(found), names)
                for action in ("edit", "reset", "path", "NAME"):
                    self.assertRegex(table, r"`[a-z ]*\[?%s\b" % action)

    def test_the_help_names_every_command_and_alias(self):
        for row in rrouter.COMMANDS:
            self.assertIn("\n  %s " % ", ".join([row.usage, *row.aliases]), self.help)

    def test_code_help_and_readmes_name_the_same_environment_variables(self):
        texts = {"code": RROUTER_TEXT, "help": self.help, **self.readmes}
        for file, text in texts.items():
            with self.subTest(file):
                self.assertEqual(set(re.findall(r"\bRROUTER_[A-Z_]*[A-Z]\b", text)),
                                 set(rrouter.DEFAULT_ENVIRONMENT))

    def test_the_default_config_of_the_readmes_is_the_one_in_the_code(self):
        for file, text in self.readmes.items():
            with self.subTest(file):
                block = re.search(r'```json\n(\{\s+"modes".*?)```', text, re.S).group(1)
                self.assertEqual(json.loads(block), rrouter.DEFAULT_CONFIG)

    def test_service_files_start_serve_and_hold_no_settings(self):
        for name, comment, start in (
                ("rrouter.service", r"(?m)^#.*$", "\nExecStart=%h/bin/rrouter serve\n"),
                ("com.rrouter.plist", r"(?s)<!--.*?-->", '\n *exec "$HOME/bin/rrouter" serve<')):
            with self.subTest(name):
                text = re.sub(comment, "", (HERE / name).read_text(encoding="utf-8"))
                self.assertRegex(text, start.replace("$", r"\$"))
                self.assertNotIn("RROUTER_", text)
                self.assertIn(".config/rrouter.env", text)

    def test_no_file_names_a_path_of_one_machine(self):
        for pattern in ("*.md", "*.py", "*.sh", "*.toml", "*.service", "*.plist"):
            for path in HERE.glob(pattern):
                found = re.findall(r"/(?:root|home|Users|work|tmp)/[\w.]+",
                                   path.read_text(encoding="utf-8"))
                self.assertEqual(found, [], path.name)


IO_LINE = "# ---- Everything above is pure; everything below does I/O. ----"
# Modules and functions that are not allowed above the I/O line, except threading.Lock.
EFFECTS = frozenset((
    "fcntl", "http", "importlib", "input", "io", "logging", "mmap", "open", "os", "pathlib",
    "print", "random", "select", "shutil", "signal", "socket", "socketserver", "ssl",
    "subprocess", "sys", "tempfile", "threading", "time"))
CLOCK_READS = frozenset(("now", "today", "utcnow"))         # of datetime


def names_in(code):
    """Return (the names that a code object binds, (name, line) of each outer name that it uses).

    Reading a clock and importing count as uses; threading.Lock does not count.  Annotations are
    not in the code, because they are never evaluated.
    """
    bound, used, line = set(), [], code.co_firstlineno
    instructions = [*dis.get_instructions(code)]
    for index, instruction in enumerate(instructions):
        line = getattr(instruction, "line_number", instruction.starts_line) or line
        what, name = instruction.opname, instruction.argval
        if what in ("STORE_NAME", "STORE_GLOBAL"):
            bound.add(name)
        elif what == "IMPORT_NAME" or what in ("LOAD_ATTR", "LOAD_METHOD") and name in CLOCK_READS:
            used.append((name.partition(".")[0], line))
        elif what in ("LOAD_NAME", "LOAD_GLOBAL") and (
                name != "threading" or instructions[index + 1].argval != "Lock"):
            used.append((name, line))
    if code.co_name != "<module>":          # a class
        used = [(name, line) for name, line in used if name not in bound]
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            used += names_in(inner)[1]
    return bound, used


def floor_plan_breaches(source):
    """Return "line N: what" for each breach of the floor plan in `source`.

    A top-level definition uses only top-level names defined above it, and above the I/O line no
    definition has effects.  The imports before the first banner are exempt.
    """
    lines = source.splitlines()
    io_line = lines.index(IO_LINE) + 1
    first = next((number for number, line in enumerate(lines, 1) if re.match("# .* ##", line)), 0)
    parts, breaches, defined_at = [], [], {}
    for statement in ast.parse(source).body:
        code = compile(ast.Module([statement], []), "rrouter.py", "exec",
                       __future__.annotations.compiler_flag)
        bound, used = names_in(code)
        parts.append((statement, used))
        for name in bound:
            defined_at.setdefault(name, statement.lineno)
    for statement, used in parts:
        for name, line in used:
            if defined_at.get(name, 0) > statement.lineno:
                breaches.append("line %d: uses %s, which is defined in line %d" % (
                    line, name, defined_at[name]))
            elif first < line < io_line and (name in EFFECTS or name in CLOCK_READS):
                breaches.append("line %d: uses %s above the I/O line" % (line, name))
    return breaches


class FloorPlanTest(unittest.TestCase):
    """rrouter.py reads from top to bottom: decisions first, effects after them."""

    def test_definitions_use_what_stands_above_them_and_decisions_have_no_effects(self):
        self.assertEqual(RROUTER_TEXT.count("\n%s\n" % IO_LINE), 1)
        self.assertEqual(floor_plan_breaches(RROUTER_TEXT), [])

    SOUND = """
import os, threading
# Values #####
LIMIT = 3
class Value:
    other: Later
    limit = LIMIT
    lock = threading.Lock()
    def above(self, later=LIMIT):
        return [time for time in later], self.above, Value
{}
class Later(Value):
    def end(self):
        return os.getpid()
    now = lambda bottom: bottom
bottom = Later().end()
"""
    PLANTED = (
        # code above the I/O line, code below it,      the breach
        ("def early(): return lambda: Later()", "",    "line 11: uses Later, which is"),
        ("@bottom\ndef early(): pass", "",             "line 11: uses bottom, which is"),
        ("", "early = [bottom]",                       "line 13: uses bottom, which is"),
        ("def pid(): return os.getpid()", "",          "line 11: uses os above"),
        ("class Late:\n  def f(): import time", "",    "line 12: uses time above"),
        ("NOW = datetime.datetime.now()", "",          "line 11: uses now above"),
        ("WORK = threading.Thread()", "",              "line 11: uses threading above"),
        ("def say(): print()", "",                     "line 11: uses print above"),
    )

    def test_each_kind_of_breach_is_reported(self):
        self.assertEqual(floor_plan_breaches(self.SOUND.format(IO_LINE)), [])
        for above, below, breach in self.PLANTED:
            with self.subTest(breach):
                source = self.SOUND.format("\n".join((above, IO_LINE, below)))
                self.assertEqual([found[:len(breach)] for found in floor_plan_breaches(source)],
                                 [breach])


# Fuzz: random input ###########################################################

FUZZ_SEED = os.environ.get("RROUTER_FUZZ_SEED") or os.environ.get("RROUTER_SOAK") or "20260129"
SPACE = r"[ \t\r\n]*"

# A mark names its connection and request.  It has letters for digits, because digits that damage
# inserts could make it another valid mark.
MARK = re.compile("tok([Q-Z]{6})x[Q-Z]{2}kot")
LETTERS = bytes.maketrans(b"0123456789", b"QRSTUVWXYZ")


def fuzz_cases(suite, soak):
    """Return the number of cases, in the suite or with --soak; RROUTER_FUZZ_CASES overrides it."""
    return int(os.environ.get("RROUTER_FUZZ_CASES") or (soak if SOAKING else suite))


def run_cases(what, cases, case, threads=1):
    """Call `case` with the dice of each case; a failure names the seed and the case."""
    if SOAKING:
        print("soak: seed %s, %d random %s" % (FUZZ_SEED, cases, what), file=sys.stderr)
    numbers = iter(range(cases))

    def work(_):
        for number in numbers:
            try:
                case(Dice(what, number))
            except Exception as problem:
                collections.deque(numbers, maxlen=0)        # ends the other threads
                raise AssertionError("RROUTER_FUZZ_SEED=%s, %s %d: %s: %s" % (
                    FUZZ_SEED, what, number, type(problem).__name__, problem)) from problem

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))


class Dice(random.Random):
    """A source of random bodies, files and HTTP messages, and of damage to them."""

    WORDS = ("model", "model", "Model", "mode", "", "stream", "messages", "type", "thinking",
             "content", "a" * 300, "claude-opus-5", "claude-sonnet-4", '"model":"x"', "\\", '"',
             "/", "\b\f\n\r\t", "\x7f\x80\u2028", "é", "한글", "😀", "\ud83d", "\udc7f", "\0",
             "{}", "claude-sonnet-4-5", "claude-haiku-4-5", "gpt-5", "클로드", "\\u0063laude-\\")
    ATOMS = ("null", "true", "false", "0", "-0", "1", "-1.50", "1E+5", "1e-400", "1e400",
             "9007199254740993", "9" * 400, "0." + "3" * 500, "9" * 5000)

    def __new__(cls, *_):
        return super().__new__(cls)     # Python 3.10 would take at most one argument

    def __init__(self, what, number):
        super().__init__("%s/%s/%d" % (FUZZ_SEED, what, number))
        self.number = number

    def space(self):
        return self.choice(("", "", "", "", " ", "\n  ", "\t", "\r\n", " " * 50))

    def string(self, text):
        """Return `text` as a JSON string, some of its characters escaped."""
        if self.random() < 0.7:
            return json.dumps(text, ensure_ascii=self.random() < 0.5 or not text.isprintable())

        def spelled(character):
            if character.isprintable() and character not in '"\\' and self.random() < 0.8:
                return "\\/" if character == "/" else character
            digits = character.encode("utf-16-be", "surrogatepass").hex()
            return re.sub("....", r"\\u\g<0>", self.choice((digits, digits.upper())))

        return '"%s"' % "".join(map(spelled, text))

    def group(self, brackets, items):
        """Return `items` between brackets, with commas, and white space where JSON allows it."""
        inside = ",".join(self.space() + item + self.space() for item in items)
        return brackets[0] + (inside or self.space()) + brackets[1]

    def member(self, key, value):
        return self.string(key) + self.space() + ":" + self.space() + value

    def value(self, depth=3):
        kind = self.randrange(8 if depth else 6)
        if kind < 3:
            return self.string(self.choice(self.WORDS))
        if kind < 6:
            return self.choice(self.ATOMS)
        items = [self.value(depth - 1) for _ in range(self.randrange(4))]
        if kind == 6:
            return self.group("[]", items)
        return self.group("{}", [self.member(self.choice(self.WORDS), item) for item in items])

    def body(self):
        """Return a body, usually an object with a model; a third of the bodies are damaged."""
        kind = self.random()
        if kind < 0.06:
            text = self.value()
        elif kind < 0.08:
            depth = self.choice((50, 150, 100_000))
            opening, closing = self.choice(("[ ]", '{"model": }', '{"a": }')).split()
            text = '{"x":%s%s,"model":"claude-opus-5"}' % (
                opening * depth + self.choice(("", "1")), closing * depth)
        else:
            members = [self.member(self.choice(self.WORDS), self.value())
                       for _ in range(self.randrange(6))]
            for _ in range(self.choice((1, 1, 1, 2))):
                value = self.string(self.choice(self.WORDS))
                value = self.value(1) if self.random() < 0.15 else value
                key = self.string("model") if self.random() < 0.2 else '"model"'
                members.insert(self.choice((0, 0, self.randrange(len(members) + 1))),
                               key + self.space() + ":" + self.space() + value)
            text = self.space() + self.group("{}", members) + self.space()
        return self.damaged_json(text.encode()) if self.random() < 0.35 else text.encode()

    # Inserted by damage.
    IN_JSON = (*(bytes((byte,)) for byte in b',"\\{}[]:\n\0\x1f\x0b\x0cx0+\xff\xc3\x80\xf5'), b"//",
               b"{}", b"\xc2\xa0", b"\xed\xa0\xbd", b"\xef\xbb\xbf")
    NO_VALUES = (b"NaN", b"Infinity", b"-Infinity", b"nul", b"01", b"+1", b".5", b"1.", b"0x1",
                 b"'a'", b"1 1")
    IN_HTTP = (*(bytes((byte,)) for byte in b'\n\r\0 \t\x0b\x7f:;,01x+-="(\xb2\xe9'), b"\r\n",
               b"\r\n ", b"\r\n\r\n", b", ", b"0x", b"_0", b"f" * 17, b"x" * 300, b", chunked",
               b"identity, ", b", identity", b"\r\nContent-Length: 3", b"\r\nHost: evil.example",
               b"\r\nTransfer-Encoding: chunked")
    FRAMING = re.compile(
        rb"(?im)^(?:content-length|transfer-encoding|host|connection):[^\r]*\r\n|HTTP/1\.[01]|"
        rb"^[0-9a-f]+[^\r\n]*\r\n")
    PIECE = re.compile(rb"\w+|\r\n|.", re.S)

    def damaged(self, data, inserts, found=()):
        """Return `data` truncated, or with a piece of it removed, repeated, replaced or extended.

        The piece is one of the matches `found` or a part of one, if any; it contains no mark.
        """
        if self.random() < 0.1:
            return data[:self.randrange(len(data) + 1)]
        if found:
            match = self.choice(found)
            pieces = [match, *self.PIECE.finditer(data, *match.span())]
        else:
            start = self.randrange(len(data) + 1)
            pieces = [*self.PIECE.finditer(data, start, start + 40)] or [
                re.compile(b"").match(data, start)]
        piece, insert = self.choice(pieces), self.choice(inserts)
        if MARK.search(piece.group().decode("latin-1")):
            return data
        before, after = data[:piece.start()], data[piece.end():]
        return before + self.choice((
            b"", insert, insert + piece.group(), piece.group() + insert, piece.group() * 2)) + after

    def damaged_json(self, body):
        odd = re.sub(rb"\b(?:null|true|1)\b", self.choice(self.NO_VALUES), body, count=1)
        return self.choice((
            odd, odd, body + self.choice(self.IN_JSON), *[self.damaged(body, self.IN_JSON)] * 4,
            body.decode().encode(self.choice(("utf-8-sig", "utf-16", "utf-16-le", "utf-32")))))

    def damaged_message(self, data):
        for _ in range(self.choice((1, 1, 1, 2))):
            found = [*self.FRAMING.finditer(data[:2000])]
            data = self.damaged(data, self.IN_HTTP, found if self.random() < 0.7 else [
                re.match(b"(?s).{0,2000}", data)])
        return data

    KINDS = ("thinking", "thinking", "redacted_thinking", "text", "text", "tool_use",
             "tool_result", "Thinking", "thinking ", "redacted")
    NO_BLOCKS = ("7", "null", '"thinking"', '["thinking"]', "[]", "{}", '{"type":7}')

    def content(self):
        """Return (a content, a pattern for the healed content)."""
        blocks, kept = [], []
        for _ in range(self.choice((1, 1, 2, 3, 5))):
            kind = self.choice(self.KINDS)
            members = self.sample([
                self.member("type", self.string(kind)), self.member("text", self.value(2)),
                self.member("content", '[{"type":"thinking","thinking":"nested"}]')], 3)
            second = self.choice(('"text"', '"thinking"'))      # the first one counts
            members += [self.member("type", second)] * (self.random() < 0.1)
            block = self.group("{}", members)
            if self.random() < 0.1:
                kind = block = self.choice(self.NO_BLOCKS)
            blocks.append(block)
            kept += [block] * (kind not in ("thinking", "redacted_thinking"))
        content, comma = self.group("[]", blocks), SPACE + "," + SPACE
        if self.random() < 0.2:
            content = self.choice(('"thinking"', "null", "7", '{"type":"thinking"}', "[]"))
        elif len(kept) < len(blocks):
            kept = kept or ['{"type":"text","text":"(no content)"}']
            return content, r"\[%s]" % (SPACE + comma.join(map(re.escape, kept)) + SPACE)
        return content, re.escape(content)

    def conversation(self):
        """Return (a body with messages, a pattern for the healed body)."""
        messages = [self.group("{}", self.sample([
            self.member("role", self.value(2)), self.member("thinking", self.value(2)),
            self.member("content", "\1")], 3)) for _ in range(self.randrange(4))]
        members = self.sample([
            self.member("system", '[{"type":"thinking","thinking":"no message"}]'),
            self.member("max_tokens", self.value(2)),
            self.member("messages", self.group("[]", messages))], 3)
        members.append(self.member(self.choice(("messages", "model")),      # the first one counts
                                   '[{"content":[{"type":"thinking"}]}]'))
        body, *parts = (self.space() + self.group("{}", members) + self.space()).split("\1")
        pattern = re.escape(body)
        for part in parts:
            content, left = self.content()
            body, pattern = body + content + part, pattern + left + re.escape(part)
        return body.encode(), pattern

    ODD = (*map(json.dumps, (
        None, True, False, "", "x", "auto", "one", "two", "Loud", "a b", "é", "\ud83d", "\0",
        "a\nb\x1b[31m", "x" * 5000, "*", "[", "[z-a]", "[!a", "[[a--b&&c]*", "*a" * 50, [], ["one"],
        ["one", "one"], ["two", "one"], ["one", 2], [[]], {}, {"match": "*", "rewrite": "odd"},
        {"one": {}}, "modes", "auto", "mappings", "targets", "cooldownMinutes", "colour")),
        "[" * 50 + "]" * 50, "[" * 100_000 + "]" * 100_000,
        "0", "1", "2", "-1", "0.5", "1.0", "150", "1e3", "1e18", "1e999", "-0", "NaN", "Infinity",
        "-Infinity", "9" * 30, "9" * 5000, "01", "0x1", "nan")
    ITEM = re.compile(r'("\w*": )?("[^"]*"|[0-9.]+|\[[^][]*]|\{[^{}]*})')

    def config(self):
        """Return a config.json with up to two changed items, or one that is damaged as a whole."""
        auto = {**DEFAULT_CONFIG["auto"], "targets": ["one", "two"], "cooldownMinutes": [30, 0.5]}
        text = json.dumps(switchboard(1, auto=auto), indent=self.choice((None, 1)))
        for _ in range(self.choice((0, 0, 1, 1, 2))):
            item, odd = self.choice([*self.ITEM.finditer(text)]), self.choice(self.ODD)
            text = text[:item.start()] + self.choice((
                (item[1] or "") + odd, odd, item[0] + "," + item[0])) + text[item.end():]
        content, kind = (self.space() + text + self.space()).encode(), self.random()
        if kind < 0.2:
            return self.damaged_json(content)
        return content if kind > 0.26 else self.choice((
            b"", b" \n", b"\0" * 64, content + content, b"\0" + content, b"\\\"" * 2000,
            b"{" * 100_000, b" " * 2_000_000 + content, b" " * 700_000 + content, self.body()))

    def payload(self, mark):
        """Return the body of an HTTP message, which may look like other messages."""
        hidden = b"GET /hidden/%b HTTP/1.1\r\nHost: localhost\r\n\r\n" % mark
        return self.choice((
            b"", hidden, b"0\r\n\r\n" + hidden, mark + b"\r\n0\r\n\r\n\0\xff\r\r\n\n" + bytes(9),
            b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n" + mark,
            mark * self.choice((1, 1, 1, 9, 9, 9, 99, 20000)),
            self.getrandbits(800).to_bytes(100, "big") + mark))

    def chunks(self, body, mark):
        """Return `body` in chunks of any sizes, with extensions and trailers now and then."""
        out, at = b"", 0
        while at < len(body):
            size = self.choice((1, 2, 9, 99, 9999, 99999)) if len(body) < 9999 else 20000
            piece, at = body[at:at + size], at + size
            out += self.choice((b"%x", b"%X", b"%04x")) % len(piece)
            out += self.choice((b"", b"", b"", b";x", b' ; a="b c"')) + b"\r\n" + piece + b"\r\n"
        return out + self.choice((b"0", b"000", b"0;last")) + b"\r\n" + self.choice((
            b"", b"", b"X-Trailer: %b\r\n" % mark,
            b"Content-Length: 3\r\nHost: evil.example\r\n")) + b"\r\n"

    def framed(self, start, fields, body, framing, mark):
        """Return the message of these parts, with its fields in random order."""
        if framing == "length":
            fields.append(self.choice((b"Content-Length: %d", b"content-length:%d",
                                       b"CONTENT-LENGTH: \t00%d ")) % len(body))
        elif framing == "chunked":
            fields.append(self.choice((b"Transfer-Encoding: chunked",
                                       b"transfer-encoding:\tChunked ")))
            body = self.chunks(body, mark)
        self.shuffle(fields)
        return b"".join(line + b"\r\n" for line in (start, *fields, b"")) + body

    def request(self, mark):
        method = self.choice((b"POST",) * 4 + (b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS",
                                               b"pOsT"))
        target = self.choice((
            b"/", b"/v1/messages?beta=true&", b"//", b"/%2e%2E/../", b"http://localhost/",
            b"HTTP://127.0.0.1:1?", b"/v1/messages/count_tokens?")) + mark
        old = self.random() < 0.04
        body = b"" if method in (b"GET", b"HEAD") and self.random() < 0.9 else self.payload(mark)
        if method == b"POST" and self.random() < 0.6:
            body = self.choice((self.body(), chat(
                "claude-sonnet-" + mark.decode(), stream=self.random() < 0.8,
                messages=[{"role": "user", "content": body.decode("latin-1")}])))
        framing = self.choice(("length", "length" if old else "chunked")) if body else "none"
        fields = self.sample((
            b"Accept: */*", b"X-Empty:", b"x-tab: a\tb  c", b"X-Latin: caf\xe9\x80",
            b"Cookie: a=1", b"cookie: b=2", b"TE: trailers", b"Keep-Alive: timeout=5",
            b"Expect: 100-continue", b"X-Quoted: \"a\\\"b\", ,;", b"Connection: keep-alive",
            b"connection: X-Gone, content-length", b"X-Gone: 1", b"Upgrade: h2c"),
            self.randrange(6))
        fields += [self.choice((b"Host: localhost", b"hOST:127.0.0.1:8316", b"Host: [::1]:1 ")),
                   b"X-Token: " + mark]
        start = b"%b %b HTTP/1.%d" % (method, target, not old)
        blank = self.choice((b"", b"", b"", b"\r\n"))
        return blank + self.framed(start, fields, body, framing, mark)

    def response(self, mark, method):
        status = self.choice((
            b"200 OK", b"200 OK", b"200 OK", b"201 ", b"204 No Content", b"304 Not Modified",
            b"400 Bad", b"404 N\xe9", b"429 Many", b"500", b"529 Overloaded", b"299 Odd"))
        fields = self.sample((
            b"X-Empty:", b"Set-Cookie: a=1", b"set-cookie: b", b"X-Latin: \xe9", b"Keep-Alive: 5",
            b"Connection: close", b"connection: X-Gone", b"X-Gone: 1", b"Date: now",
            b"Access-Control-Allow-Origin: *"), self.randrange(5))
        kind, body = b"application/octet-stream", self.payload(mark)
        if self.random() < 0.4:
            kind, body = b"text/event-stream", b"".join(self.choices((
                event("ping"), b": comment\n\n", event("message_start", text=mark.decode()),
                b"\n", event("error", error={"type": "overloaded_error"}), event("message_stop")),
                k=self.randrange(5)))
        fields += [b"Content-Type: " + kind, b"X-Response: " + mark]
        framing = self.choice(("length", "chunked", "chunked", "close"))
        if method == "HEAD" or status[:3] in (b"204", b"304"):
            framing, body = "none", b""
        interim = self.choice((b"",) * 8 + (
            b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 102 Wait\r\n\r\n" * 3,
            b"HTTP/1.1 103 Hints\r\nLink: <a>\r\n\r\n"))
        old = framing == "close" and self.random() < 0.5
        return interim + self.framed(b"HTTP/1.%d %b" % (not old, status), fields, body, framing,
                                     mark)

    def pieces(self, data):
        """Return `data` in pieces, cut at random places."""
        count = self.choice((0, 0, 0, 1, 1, 2, 2, 5, 40))
        cuts = sorted(self.randrange(len(data) + 1) for _ in range(count))
        pieces = (data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)]))
        return [piece for piece in pieces if piece]


# Fuzz: framing ################################################################

ONE_HOP = {"connection", "proxy-connection", "keep-alive", "proxy-authenticate",
           "proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade"}
Request = collections.namedtuple("Request", "method target fields body framing close")
Case = collections.namedtuple("Case", "request method clean responses")


def marks_in(data):
    """Return the keys of the connections whose marks are in `data`."""
    return set(MARK.findall(data.decode("latin-1")))


def nominated(fields):
    """Return the names in the Connection fields, in lower case."""
    return {name.strip(" \t").lower() for value in values(fields, "connection")
            for name in value.split(",")}


def passing(fields, *more):
    """Return the fields that a proxy forwards, except those in `more`."""
    drop = ONE_HOP | nominated(fields) | {"content-length", *more}
    return [field for field in fields if field[0].lower() not in drop]


def read_request_head(reader):
    """Return (method, target, version, fields) by the letter of RFC 9112; raise Malformed."""
    line = ""
    while not line:
        line = text_line(reader.readline())
    start = re.fullmatch("(%s) ([!-~]+) (HTTP/1[.][0-9])" % TOKEN, line)
    if not start:
        raise Malformed("a request line")
    fields = read_fields(reader)
    if len(values(fields, "host")) not in ((0, 1) if start[3] == "HTTP/1.0" else (1,)):
        raise Malformed("Host")
    return (*start.groups(), fields)


def read_request(reader):
    method, target, version, fields = read_request_head(reader)
    body, framing = read_body(reader, version, fields)
    close = version == "HTTP/1.0" or "close" in nominated(fields)
    return Request(method, target, fields, body, framing, close)


def whole_reply(data, method):
    """Return (the response that `data` begins with, its end); raise Malformed."""
    reader = io.BytesIO(data)
    reply = read_reply_from(reader, method)
    if not reply or not reply.complete:
        raise Unfinished("a response", reply.body if reply else b"")
    return reply, reader.tell()


class FuzzedResponse:
    """The response to one attempt: its bytes, their meaning, and how the connection ends."""

    def __init__(self, dice, data, method, clean):
        self.data, self.clean, self.reply = data, clean, None
        self.early = dice.random() < 0.3        # it is sent as soon as the head has arrived
        self.reset = not clean and dice.random() < 0.1
        if self.reset:
            self.data = data[:dice.randrange(len(data))]
        elif not clean:
            self.data = dice.damaged_message(data)
        elif dice.random() < 0.2 and whole_reply(data, method)[0].framing != "close":
            # Surplus bytes, which must not become the response to another request.
            self.data += b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\ntokZZZZZZxZZkot abcd"
        try:
            self.reply, self.end = whole_reply(self.data, method)
            self.body = self.reply.body
        except Malformed as problem:
            self.body, self.end = problem.body, len(self.data)
        self.lasts = bool(self.reply and self.reply.framing != "close" and not self.reset
                          and "close" not in nominated(self.reply.fields)
                          and dice.random() < 0.97)     # it may close without announcing it

    def send(self, connection, dice):
        """Send the response in pieces, surplus bytes together with the last piece."""
        *pieces, last = dice.pieces(self.data[:self.end]) or [b""]
        for piece in (*pieces, last + self.data[self.end:]):
            connection.sendall(piece)
        if self.reset:
            close_by_reset(connection)


NO_CASE = Case(b"", "", False, [FuzzedResponse(
    Dice("no case", 0), b"HTTP/1.1 500 No Case\r\nContent-Length: 0\r\n\r\n", "GET", True)])


class FuzzedTalk:
    """One client connection: its cases, the requests `meant` by its bytes, and what both sides got.

    `arrived` lists the requests at the upstream by their places in `meant`, `replies` the complete
    responses that the client received, `rest` the bytes after them.
    """

    def __init__(self, dice, mode):
        self.dice, self.mode, self.arrived, self.cases = dice, mode, [], []
        self.key = (b"%06d" % dice.number).translate(LETTERS).decode()
        count = dice.choice((1, 1, 2, 3, 5))
        for place in range(count):
            # Most faults are in the last case, because a fault usually ends the connection.
            mark = ("tok%sx%skot" % (self.key, "QRSTU"[place] * 2)).encode()
            often, seldom = (0.98, 0.9) if place < count - 1 else (0.4, 0.5)
            request, clean = dice.request(mark), dice.random() < often
            method = request.split()[0].decode()
            self.cases.append(Case(
                request if clean else dice.damaged_message(request), method, clean,
                [FuzzedResponse(dice, dice.response(mark, method), method, dice.random() < seldom)
                 for _ in range(2)]))
        self.sent = b"".join(case.request for case in self.cases)
        self.meant, self.ends, reader = [], [0], io.BytesIO(self.sent)
        with contextlib.suppress(Malformed):
            while not (self.meant and self.meant[-1].close):
                self.meant.append(read_request(reader))
                self.ends.append(reader.tell())
        leaves = self.sent and dice.random() < 0.1
        self.leaves_after = dice.randrange(len(self.sent) + 1) if leaves else None
        self.data, self.rest, self.replies, self.ended = b"", b"", [], ""

    def __str__(self):
        return "\n".join("%r\n  responses: %s" % (case.request[:999], ", then ".join(
            repr(response.data[:999]) for response in case.responses)) for case in self.cases)

    def case_of(self, place):
        """Return the case that responds to the request `place`, NO_CASE if its method differs."""
        case = (self.cases + [NO_CASE] * place)[place]
        return case if case.method == self.meant[place].method else NO_CASE

    def place_of(self, method, target, fields):
        """Return which of the requests meant has arrived with this head; raise Malformed."""
        head = method, target, passing(fields, "host"), bool(values(fields, "content-length"))
        for place, meant in enumerate(self.meant):
            path = re.sub("(?i)^https?://[^/?#]*", "", meant.target)
            path = path if path.startswith(("/", "*")) else "/" + path
            if head == (meant.method, path, passing(meant.fields, "host"), meant.framing != "none"):
                return place
        raise Malformed("a request that the client did not mean: %r" % (head,))

    def bodies_of(self, place):
        """Return the bodies that may arrive; SpliceFuzzTest tests the functions used here."""
        body = self.meant[place].body
        start, end, name = rrouter.find_model(body) or (0, 0, None)
        new = rrouter.decide_route(config_with(), "antigravity", name).model
        if new == name:
            return (body,)
        spliced = b"".join(rrouter.splice(body, start, end, new))
        return (spliced, body) if self.mode == "auto" else (spliced,)

    def converse(self, connection):
        """Send the bytes in pieces, the requests at once or one by one, and read the replies."""
        count, ends = len(self.meant), [*self.ends, len(self.sent)]
        parts = [(self.sent[start:end], min(number, count))
                 for number, (start, end) in enumerate(zip(ends, ends[1:]), 1)]
        if self.leaves_after is not None:
            parts = [(self.sent[:self.leaves_after], self.leaves_after > ends[1])]
        elif self.dice.random() < 0.4:
            parts = [(self.sent, count)]
        for data, due in parts:
            with contextlib.suppress(ConnectionError):
                for piece in self.dice.pieces(data):
                    connection.sendall(piece)
            self.read(connection, due)
        if self.leaves_after is None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
            self.read(connection, count + 1)
        elif self.dice.random() < 0.5:
            reset(connection)

    def read(self, connection, due):
        """Read until there are `due` replies or the connection has ended."""
        while len(self.replies) < due:
            place = len(self.replies)
            with contextlib.suppress(Unfinished):
                method = self.meant[place].method if place < len(self.meant) else "GET"
                reply, end = whole_reply(self.rest, method)
                if reply.framing != "close" or self.ended == "closed":
                    self.replies.append(reply)
                    self.rest = self.rest[end:]
                    continue
            if self.ended:
                return
            try:
                block = connection.recv(1 << 20)
                self.data, self.rest = self.data + block, self.rest + block
                self.ended = "" if block else "closed"
            except ConnectionError:
                self.ended = "reset"


class FuzzUpstream(Upstream):
    """Reads requests strictly and plays the responses of their cases."""

    def __init__(self):
        super().__init__()
        self.talks, self.faults = {}, []

    def _exchange(self, connection, reader, number):
        head = talk = response = None
        if not reader.peek(1):
            return False
        try:
            method, target, _, fields = head = read_request_head(reader)
            talk = self.talks[min(marks_in(repr(head).encode()), default=None)]
            place = talk.place_of(method, target, fields)
            with self.changed:
                attempt = talk.arrived.count(place)
                talk.arrived.append(place)
            responses = talk.case_of(place).responses
            response, dice = responses[:attempt + 1][-1], Dice(talk.key, len(talk.arrived))
            if response.early:
                response.send(connection, dice)
            body, framing = read_body(reader, "HTTP/1.1", fields)
            if (framing == "chunked" or body not in talk.bodies_of(place)
                    or values(fields, "host") != [self.url[7:]]):
                raise Malformed("Host or a body that the client did not mean: %r" % body[:2000])
        except (Malformed, KeyError) as problem:
            may_break = talk and talk.leaves_after is not None or response and response.early
            if not (may_break and isinstance(problem, Unfinished)):
                self.faults.append("the upstream received %r of %r\n%s" % (problem, head, talk))
            return False
        if not response.early:
            response.send(connection, dice)
        return response.lasts


class FuzzTest(RouterTest):
    """Random messages on both sides, well-formed or not, cut at random places.

    The upstream receives the request that the client meant, well-formed, once for each of at most
    two attempts, or nothing.  The client receives the response to one attempt, an error made by
    rrouter, or a broken connection: no byte of another request, no parts of two responses, no
    broken response that seems complete.  If neither side made a mistake, it is a response.  This
    holds also if the upstream responds early, resets or closes at any time, or the client leaves.
    """

    CASES = fuzz_cases(1000, soak=20_000)
    upstream_class = FuzzUpstream

    def fuzz(self, mode):
        self.rrouter.home.write("mode", mode + "\n")

        def case(dice):
            talk = FuzzedTalk(dice, mode)
            self.upstream.talks[talk.key] = talk
            try:
                with self.rrouter.connect() as connection:
                    talk.converse(connection)
                self.assertLessEqual(marks_in(talk.data), {talk.key}, "cross-talk")
                if talk.leaves_after is None:   # else its bytes may still arrive
                    self.judge(talk)
                    del self.upstream.talks[talk.key]
            except Exception as problem:
                raise AssertionError("%r\n%s" % (problem, talk)) from problem
            self.assertEqual(self.upstream.faults, [])

        run_cases("connections in mode " + mode, self.CASES // 5, case, threads=4)
        self.assertEqual(self.upstream.faults, [])          # also those after clients left

    def judge(self, talk):
        due = True              # responses are due until something goes wrong
        for place, meant in enumerate(talk.meant):
            case, count = talk.case_of(place), talk.arrived.count(place)
            given, due = case.responses[:max(1, count)], due and case.clean
            # A request on a stale connection is sent once more.
            resent = any(not response.data or response.reset for response in given)
            self.assertLessEqual(count, (1 + (talk.mode == "auto")) * (1 + resent), "too often")
            self.assertTrue(count or not due, "request %d never arrived" % place)
            must = due and all(response.clean for response in given)
            if place >= len(talk.replies):
                self.assertFalse(must, "response %d is missing" % place)
                if place == len(talk.replies) and talk.rest:
                    self.judge_broken(given, talk.rest, meant.method)
                due = False
                continue
            reply = talk.replies[place]
            if self.is_own_error(reply):
                self.assertFalse(must, "response %d is an error of rrouter: %r" % (place, reply))
                due = due and reply.status == 502
                continue
            self.assertTrue(count, "response %d without a request" % place)
            self.assertIn(self.seen_by_client(reply),
                          [self.seen_by_client(response.reply) for response in given
                           if response.reply], "no whole response of the upstream")
            self.assertEqual(bool(reply.header("x-rrouter-target")),
                             rrouter.find_model(meant.body) is not None)
            due = due and "close" not in nominated(reply.fields)
        whole = talk.ends[-1] == len(talk.sent) or talk.meant and talk.meant[-1].close
        for reply in talk.replies[len(talk.meant):]:
            self.assertTrue(self.is_own_error(reply) and not whole and not talk.rest,
                            "a response to nothing: %r" % (reply,))

    @staticmethod
    def seen_by_client(reply):
        """Return the parts of a response that must be equal on both sides of rrouter."""
        return reply.status, reply.reason, reply.body, [
            field for field in passing(reply.fields)
            if not field[0].lower().startswith(("access-control-", "x-rrouter-"))]

    def judge_broken(self, given, rest, method):
        """A broken response is the beginning of one of the upstream's."""
        try:        # where the connection marks the end, only a reset shows that it is broken
            body = whole_reply(rest, method)[0].body
        except Unfinished as problem:
            body = problem.body
        self.assertTrue(any(response.body.startswith(body) for response in given),
                        "%r begins no response" % body)

    @staticmethod
    def is_own_error(reply):
        return (reply.status >= 400 and reply.header("content-type") == "application/json"
                and (b'"message": "rrouter: ' in reply.body or reply.framing == "none"))

    def test_only_well_formed_messages_pass(self):
        self.fuzz("antigravity")

    def test_only_well_formed_messages_pass_in_auto_mode(self):
        self.fuzz("auto")


# Fuzz: bodies #################################################################

def plain_json(body):
    """Return the JSON value in `body`, its objects as tuples of pairs; raise ValueError.

    Invalid UTF-8 in a string is accepted, because the upstream reads bytes too.
    """
    def refuse(constant):
        raise ValueError(constant)
    return json.loads(body.decode("utf-8", "surrogateescape"), object_pairs_hook=tuple,
                      parse_int=float, parse_constant=refuse)


LEADING_MODEL = re.compile(rb'_\{_"model"_:_("[^"\\\0-\x1f]*")_[,}]'.replace(b"_", SPACE.encode()))


class SpliceFuzzTest(unittest.TestCase):
    """Random bodies, sound and damaged.

    Only the value of the first top-level `model` changes, if it is a string.  A body that is not
    JSON does not change, but the bytes after a plain leading `model` are not examined.  Healing
    removes the thinking blocks of the messages and their commas, and nothing else.
    """

    CASES = fuzz_cases(1500, soak=100_000)

    def test_one_value_changes_and_no_other_byte(self):
        def case(dice):
            body, new = dice.body(), dice.choice(dice.WORDS) + "new"
            given, tree, name = dice.choice((bytes, bytearray, memoryview))(body), (), None
            with contextlib.suppress(ValueError, RecursionError):
                tree = plain_json(body)
            keys = [item[0] for item in tree] if isinstance(tree, tuple) else []
            leading = LEADING_MODEL.match(body)
            if leading:
                name = leading[1][1:-1].decode("utf-8", "surrogateescape")
            elif "model" in keys:
                name = tree[keys.index("model")][1]
            if not isinstance(name, str) or re.search("[\udc80-\udcff]", name):
                self.assertIsNone(rrouter.find_model(given), body[:3000])
                return
            start, end, found = rrouter.find_model(given)
            self.assertEqual((found, json.loads(body[start:end])), (name, name), body[:3000])
            changed = b"".join(rrouter.splice(given, start, end, new))
            self.assertEqual(changed, body[:start] + json.dumps(new).encode() + body[end:])
            if keys:
                place = keys.index("model")
                self.assertEqual(plain_json(changed),
                                 (*tree[:place], ("model", new), *tree[place + 1:]))
            if leading:
                self.assertEqual((start, end), leading.span(1))

        run_cases("bodies", self.CASES, case)

    def test_healing_removes_thinking_blocks_and_no_other_byte(self):
        def case(dice):
            body, pattern = dice.conversation()
            result = rrouter.without_thinking(body)
            if pattern == re.escape(body.decode()):
                self.assertIsNone(result, body)
            else:
                self.assertRegex(result.decode(), r"\A%s\Z" % pattern)
            damaged = dice.damaged_json(body)
            result = rrouter.without_thinking(damaged)
            if result:
                self.assertIsNone(rrouter.without_thinking(result), damaged)
                self.assertLess(len(result), len(damaged) + 40)

        run_cases("conversations", self.CASES // 3, case)


# Fuzz: files ##################################################################

class FileFuzzTest(unittest.TestCase):
    """Random contents of config.json, each of which is accepted or refused as a whole."""

    CASES = fuzz_cases(1000, soak=20_000)

    def judge(self, content):
        """Return the config in this content, None if it is refused."""
        try:
            return rrouter.config_of(content)
        except (rrouter.ConfigError, UnicodeDecodeError) as problem:
            complaint = rrouter.describe_config_error(problem)
            self.assertRegex(complaint, r"\Aconfig\.json: ?[^\0-\x1f\x7f]+\Z")
            return None

    def test_a_config_is_accepted_or_refused_as_a_whole(self):
        accepted = []

        def case(dice):
            content = dice.config()
            config = self.judge(content)
            if config is None:
                return
            accepted.append(config)
            plain_json(content[3 * content.startswith(b"\xef\xbb\xbf"):])     # stricter than Python
            again = rrouter.parse_config(rrouter.config_text(config))
            for seconds, others in zip(config.auto.cooldowns_s, again.auto.cooldowns_s):
                self.assertAlmostEqual(seconds, others)
            auto = again.auto._replace(cooldowns_s=config.auto.cooldowns_s)
            self.assertEqual(again._replace(auto=auto, problems=config.problems), config)
            for word in ("one", "auto", "nosuch", config.default_mode):
                mode = config.resolve(word)
                self.assertIn(mode, [*config.modes] + ["auto"] * (not config.auto_error))
                for target in config.auto.targets if mode == "auto" else [mode]:
                    self.assertIsInstance(rrouter.decide_route(config, target, SONNET).model, str)

        run_cases("contents", self.CASES // 3, case)
        self.assertTrue(0.1 < len(accepted) / (self.CASES // 3) < 0.9, len(accepted))

    def test_long_and_deep_contents_are_refused_in_linear_time(self):
        start = time.process_time()
        for content in (b'\\"' * 20_000, b'"\\\n' * 20_000, b'"' + b"\\" * 900_001, b"9" * 999_999,
                        b"-" * 999_999):
            self.assertIsNone(self.judge(content))
        for depth in range(900, 1020):          # around the limit of Python
            for opening, closing in (("[", "]"), ('{"modes":', "}"),
                                     ('{"modes":{"a":{"mappings":[', "]}}}")):
                self.judge(("%s1%s" % (opening * depth, closing * depth)).encode())
        self.assertLess(time.process_time() - start, 2)


# Claude Code ##################################################################

def find_claude():
    """Return the executable of Claude Code, or None; RROUTER_CLAUDE names it, or is "none"."""
    named = os.environ.get("RROUTER_CLAUDE")
    if named:
        return None if named == "none" else named
    return shutil.which("claude") or shutil.which("claude", path=str(HERE / "node_modules/.bin"))


CLAUDE = find_claude()
CLAUDE_WAIT_S = 30      # the net under each turn, because Claude Code retries for three minutes


class Conversation(subprocess.Popen):
    """One Claude Code process that gets one turn after the other; a context manager."""

    def __init__(self, port, home):
        super().__init__(
            [CLAUDE, "-p", "--model", SONNET, "--verbose", "--input-format", "stream-json",
             "--output-format", "stream-json"],
            cwd=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={"PATH": os.environ["PATH"], "HOME": home, "ANTHROPIC_API_KEY": "sk-test",
                 "ANTHROPIC_BASE_URL": "http://127.0.0.1:%d" % port, "DISABLE_TELEMETRY": "1",
                 "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1",
                 "CLAUDE_CODE_GATEWAY_HINT_HEADERS": "1"})

    def say(self, text):
        """Return the text of the reply; fail if the turn ends in an error."""
        watchdog, printed = threading.Timer(CLAUDE_WAIT_S, self.kill), []
        watchdog.start()
        try:
            turn = {"type": "user", "message": {"role": "user", "content": text}}
            self.stdin.write(json.dumps(turn).encode() + b"\n")
            self.stdin.flush()
            for line in self.stdout:
                printed.append(line)
                message = json.loads(line)
                if message["type"] == "result" and not message["is_error"]:
                    return message["result"]
        finally:
            watchdog.cancel()
        raise AssertionError("Claude Code ended within a turn: %s" % b"".join(printed).decode())

    def __exit__(self, *_):
        with self.stdout:
            self.stdin.close()
            try:
                self.wait(WAIT_S)
            except subprocess.TimeoutExpired:
                self.kill()
                self.wait(WAIT_S)


def relay_to(port):
    """Return an Upstream that records what Claude Code sends, and passes it to rrouter."""
    def forward(request):
        with socket.create_connection(("127.0.0.1", port), timeout=CLAUDE_WAIT_S) as connection:
            connection.sendall(request.head + request.body)
            reply = read_reply(connection, request.method)
        if reply is None or not reply.complete:
            return Response(hangup=True)
        return Response(reply.status, reply.body, fields=end_to_end(reply.fields), framing="length")

    return Upstream(forward)


def is_turn(request):
    """Return whether this is a turn; Claude Code also sends HEAD /api/hello and count_tokens."""
    return request.method == "POST" and request.target.partition("?")[0] == "/v1/messages"


def streamed_reply(request, signature=None, call=None):
    """Return a streamed message `<model> heard <text>`.

    With `signature` a thinking block precedes it; with `call`, a name and an input, a tool call
    replaces it.
    """
    contents = [m["content"] for m in request.json()["messages"] if m["role"] == "user"]
    last = contents[-1] if isinstance(contents[-1], str) else contents[-1][-1].get("text")
    text = "%s heard %r" % (request.model, last)
    blocks = [({"type": "text", "text": ""}, {"type": "text_delta", "text": text})]
    if signature:
        blocks.insert(0, ({"type": "thinking", "thinking": "", "signature": ""},
                          {"type": "signature_delta", "signature": signature}))
    if call:
        blocks = [({"type": "tool_use", "id": "toolu_1", "name": call[0], "input": {}},
                   {"type": "input_json_delta", "partial_json": json.dumps(call[1])})]
    events = [event("message_start", message={
        "id": "msg_1", "type": "message", "role": "assistant", "model": request.model,
        "content": [], "stop_reason": None, "stop_sequence": None,
        "usage": {"input_tokens": 3, "output_tokens": 1}})]
    for index, (block, delta) in enumerate(blocks):
        events += [event("content_block_start", index=index, content_block=block), event("ping"),
                   event("content_block_delta", index=index, delta=delta),
                   event("content_block_stop", index=index)]
    end = {"stop_reason": "tool_use" if call else "end_turn", "stop_sequence": None}
    return stream(*events, event("message_delta", delta=end, usage={"output_tokens": 2}),
                  event("message_stop"))


def refuse_foreign_signatures(request):
    """Respond as a backend that accepts only thinking blocks it signed."""
    if not is_turn(request):
        return error(404)
    own = base64.b64encode(request.model.encode())
    if set(re.findall(rb'"signature":"([^"]*)"', request.body)) <= {own}:
        return streamed_reply(request, signature=own.decode())
    wording = ("Corrupted thought signature." if request.model == GEMINI_SONNET else
               "messages.1.content.0: Invalid `signature` in `thinking` block")
    return error(400, wording, "invalid_request_error")


def delegate(request):
    """Respond to the user with the call of a subagent, and to that one with a text."""
    if not is_turn(request):
        return error(404)
    names = [tool["name"] for tool in request.json().get("tools", ())]
    call = next((name for name in names if name in ("Task", "Agent")), None)
    if call is None or b"tool_result" in request.body or request.model == "explorer":
        return streamed_reply(request)
    return streamed_reply(request, call=(call, {
        "description": "look", "prompt": "look around", "subagent_type": "Explore"}))


def fields_without_host(request):
    return [field for field in end_to_end(request.fields) if field[0] != "Host"]


@unittest.skipUnless(CLAUDE, "needs Claude Code: RROUTER_CLAUDE may name its executable")
class ClaudeCodeTest(RouterTest):
    """The real Claude Code as the client; a relay between it and rrouter records what it sent."""

    mode = "claude"
    config = {**DEFAULT_CONFIG, "auto": {"firstByteTimeoutSeconds": 2},
              "modes": {**DEFAULT_CONFIG["modes"], "fast": {
                  "mappings": [{"match": "claude-*", "rewrite": "explorer", "agent": "explore"},
                               {"match": "claude-*", "rewrite": "gemini-3-flash"}]}}}

    def setUp(self):
        super().setUp()
        self.upstream.default = lambda request: (
            streamed_reply(request) if is_turn(request) else error(404))
        self.relay = relay_to(self.rrouter.port)
        self.addCleanup(self.relay.close)
        self.claude = Conversation(self.relay.port, str(self.rrouter.home.root))
        self.addCleanup(self.claude.__exit__)

    def turn(self, *command, text):
        """Run a command and say `text`; return the reply and both sides' requests of this turn."""
        self.rrouter.home.run(*command, check=0)
        for side in self.relay, self.upstream:
            side.clear()
        return (self.claude.say(text), list(filter(is_turn, self.relay.received)),
                list(filter(is_turn, self.upstream.received)))

    def assert_forwarded(self, sent, received, model):
        """The upstream received what the client sent, except for the model's name."""
        self.assertTrue(sent.body.startswith(b'{"model":"%b"' % SONNET.encode()), sent.body[:80])
        self.assertEqual(received.body, sent.body.replace(SONNET.encode(), model.encode(), 1))
        self.assertEqual(received[:3], sent[:3])
        self.assertEqual(fields_without_host(received), fields_without_host(sent))
        self.assertEqual(received.header("host"), "127.0.0.1:%d" % self.upstream.port)
        self.assertEqual(received.header("content-length"), str(len(received.body)))

    TURNS = (
        # command             model at the upstream
        (("ag",),             GEMINI_SONNET),
        (("claude",),         SONNET),
        (("mode", "fast"),    "gemini-3-flash"),
        (("auto",),           GEMINI_SONNET),
    )

    def test_one_conversation_moves_between_models_without_a_restart(self):
        for number, (command, model) in enumerate(self.TURNS):
            with self.subTest(command=command):
                text, (sent,), (received,) = self.turn(*command, text="turn %d" % number)
                self.assertEqual(text, "%s heard 'turn %d'" % (model, number))
                self.assert_forwarded(sent, received, model)
                roles = [message["role"] for message in received.json()["messages"]]
                self.assertEqual(roles.count("assistant"), number)      # one conversation

    def test_request_of_a_subagent_follows_the_rule_of_its_agent(self):
        self.upstream.default = delegate
        self.turn("mode", "fast", text="delegate")
        sent = wait_until(lambda: {     # the subagent may go on in the background
            (request.header("x-claude-code-agent-type"), request.model)
            for request in filter(is_turn, self.upstream.received)} - {(None, "gemini-3-flash")})
        self.assertEqual(sent, {("Explore", "explorer")})

    def test_failure_of_antigravity_is_rescued_unnoticed(self):
        overloaded = {"type": "overloaded_error", "message": "Overloaded"}
        for failure in (
                error(429, "Resource has been exhausted (e.g. check quota).", "rate_limit_error"),
                stream(event("ping"), event("error", error=overloaded)),
                Response(hangup=True), Response(before=self.gate())):
            with self.subTest(failure.wire()):
                self.upstream.default = lambda request: (
                    error(404) if not is_turn(request) else
                    failure if request.model == GEMINI_SONNET else streamed_reply(request))
                pooled = self.upstream.connections
                text, sent, received = self.turn("auto", text="a word")     # clears the counters
                self.assertEqual((text, len(sent)), (SONNET + " heard 'a word'", 1))
                models = [request.model for request in received]
                if failure.hangup and len(models) == 3 and received[0].connection <= pooled:
                    del models[0]           # sent again, because the kept connection seemed stale
                self.assertEqual(models, [GEMINI_SONNET, SONNET])

    def test_foreign_signatures_are_healed_in_both_directions(self):
        self.upstream.default = refuse_foreign_signatures
        for command, model, calls in (("ag", GEMINI_SONNET, 1), ("claude", SONNET, 2),
                                      ("ag", GEMINI_SONNET, 2)):
            with self.subTest(command, calls=calls):
                text, (sent,), received = self.turn(command, text="now " + command)
                self.assertEqual((text, len(received)), (f"{model} heard 'now {command}'", calls))
                self.assert_forwarded(sent, received[0], model)
                if calls == 2:
                    first, healed = received
                    self.assertEqual(healed.body, rrouter.without_thinking(first.body))
                    self.assertEqual(fields_without_host(healed), fields_without_host(sent))


# Running them #################################################################

WORKERS = 3             # on any number of cores, because the tests wait more than they compute
RUN_S = 300             # a longer run must hang, because a good one takes about a minute
SOAK_S = 3600 + int(os.environ.get("RROUTER_SOAK_STREAM_S") or 120)
SLOW_S = 6              # the run prints the classes that take longer and are not in SLOW
# The run begins with these classes, so that the workers end together.
SLOW = ("StartRaceTest", "ListenTest", "SilenceTest", "InstalledLifeTest", "RescueTest", "DemoTest",
        "ReferenceModelTest", "DaemonLifeTest", "CommandLineTest", "DrainTest", "UpstreamAwayTest",
        "ServiceManagerTest", "ParallelStreamsTest", "CrowdOfClientsTest", "HangingDiskTest",
        "StreamTest", "SecretsTest", "FullDiskTest", "LongStreamTest", "LogGoneTest", "LimitsTest",
        "ClaudeSettingsTest", "RunningDaemonTest", "InterruptTest", "StateTest", "FreshnessTest",
        "CheckTest", "ClaudeCodeTest")


def is_test(value):
    return (isinstance(value, type) and issubclass(value, unittest.TestCase)
            and unittest.defaultTestLoader.getTestCaseNames(value))


def run_side_by_side():
    """Run all test classes in WORKERS processes; return the exit status."""
    names = [name for name, value in globals().items() if is_test(value)]
    names.sort(key=lambda name: SLOW.index(name) if name in SLOW else len(SLOW))
    compiled()                                          # once for all workers
    start, numbers, results = time.monotonic(), os.pipe(), os.pipe()
    os.write(numbers[1], bytes(range(len(names))))      # a worker reads the number of a class
    os.close(numbers[1])
    for _ in range(WORKERS):
        sys.stdout.flush()
        if not os.fork():
            os.close(results[0])
            faulthandler.dump_traceback_later(RUN_S, exit=True)     # shows where it hangs
            for number in iter(lambda: os.read(numbers[0], 1), b""):
                os.write(results[1], run_class(names[number[0]]))
            sys.exit()
    os.close(results[1])
    with open(results[0], encoding="utf-8") as lines:
        rows = dict(map(json.loads, lines))
    counts = {kind: sum(row[kind] for row in rows.values())
              for kind in ("run", "failures", "errors", "skipped")}
    unfinished = set(names) - set(rows)
    slow = {name for name, row in rows.items() if row["seconds"] > SLOW_S} - set(SLOW)
    for what, some in ("not finished", unfinished), ("slow, and not in SLOW", slow):
        if some:
            print("\n%s: %s" % (what, ", ".join(sorted(some))), file=sys.stderr)
    bad = bool(counts["failures"] or counts["errors"] or unfinished)
    details = ", ".join("%s=%d" % item for item in [*counts.items()][1:] if item[1])
    print("\n%s\nRan %d tests in %.3fs\n\n%s%s" % (
        "-" * 70, counts["run"], time.monotonic() - start, "FAILED" if bad else "OK",
        details and f" ({details})"), file=sys.stderr)
    return int(bad)


def run_class(name):
    """Run a class and print its failures; return a line of JSON with its counts."""
    output, start = io.StringIO(), time.monotonic()
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(globals()[name])
    result = unittest.TextTestRunner(output, verbosity=0).run(suite)
    row = {"run": result.testsRun, "seconds": time.monotonic() - start,
           "failures": len(result.failures) + len(result.unexpectedSuccesses),
           "errors": len(result.errors), "skipped": len(result.skipped)}
    printed = output.getvalue() if row["failures"] or row["errors"] else "." * row["run"]
    os.write(2, printed.encode())
    return (json.dumps([name, row]) + "\n").encode()


def soaked_classes():
    """Return the names of the classes whose code does more with --soak."""
    return [name for name, value in globals().items() if is_test(value)
            and re.search(r"\bSOAKING\b|\bfuzz_cases\(", inspect.getsource(value))]


if __name__ == "__main__":
    if "--soak" in sys.argv:
        seed = "".join(sys.argv[sys.argv.index("--soak") + 1:]) or "20260129"
        os.execve(sys.executable, [sys.executable, __file__, *soaked_classes()],
                  {**os.environ, "RROUTER_SOAK": seed})
    if SOAKING:
        faulthandler.dump_traceback_later(SOAK_S, exit=True)
    if len(sys.argv) > 1:
        unittest.main()
    sys.exit(run_side_by_side())
