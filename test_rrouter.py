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

import ast
import atexit
import base64
import calendar
import collections
import concurrent.futures
import configparser
import contextlib
import copy
import ctypes
import errno
import faulthandler
import fcntl
import functools
import gzip
import http.client
import io
import itertools
import json
import mmap
import os
import pathlib
import plistlib
import py_compile
import queue
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
import types
import unicodedata
import unittest
import zipapp
import zlib

try:
    import resource
except ImportError:                     # not a Unix
    resource = None

import rrouter
from rrouter import DEFAULT_CONFIG, Fault, Outcome

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

def value_of(fields, name):
    """Return the values of the header `name`, joined by commas; None if it is missing."""
    return ", ".join(value for key, value in fields if key.lower() == name.lower()) or None


class Received(collections.namedtuple(
        "Received", "method target version fields body head connection")):
    """One request as the upstream received it.

    `fields` is a list of (name, value) in order, `head` the exact bytes, `connection` a number.
    """

    __slots__ = ()
    model = property(lambda self: self.json().get("model"))

    def header(self, name):
        return value_of(self.fields, name)

    def json(self):
        return json.loads(self.body)


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
        self.chunks = self._parts(chunks)
        self.raw, self.stays = None if raw is None else self._parts(raw), stays
        self.before, self.gate, self.pause_s = before, gate, pause_s
        self.early, self.unread = early, unread
        self.hangup, self.cut, self.reset, self.close = hangup, cut, reset, close

    @staticmethod
    def _parts(data):
        return (data,) if isinstance(data, bytes) else data if iter(data) is data else tuple(data)

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

    def pieces(self, method="GET"):
        """Yield (number of the chunk, bytes) in order; the number is None for head and end."""
        if self.raw is not None:
            yield from enumerate(self.raw)
            return
        yield None, self.head()
        if method == "HEAD" or self.framing == "none":
            return
        chunked = self.framing == "chunked"
        for number, chunk in enumerate(self.chunks):
            yield number, b"%x\r\n%b\r\n" % (len(chunk), chunk) if chunked else chunk
        if chunked and not self.cut:
            yield None, b"0\r\n\r\n"

    def wire(self, method="GET"):
        """Return all bytes of the response."""
        return b"".join(data for _, data in self.pieces(method))

    def gate_of(self, number):
        """Return the gate ahead of a chunk, or None."""
        if isinstance(self.gate, list):
            return self.gate[number] if number is not None else None
        return self.gate if number else None

    @property
    def keeps_connection(self):
        if self.raw is not None:
            return self.stays
        return not (self.cut or self.close or self.framing == "close")


def event(kind, **data):
    """Return one server-sent event as Anthropic writes it."""
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
        """Wait until `condition(self)` is true."""
        with self.changed:
            if not self.changed.wait_for(lambda: condition(self), WAIT_S):
                raise AssertionError("upstream: waited %s s in vain; %d received, %d closed" % (
                    WAIT_S, len(self.received), self.closed))

    def close(self):
        """Stop listening and break every connection off."""
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
            response = self.queue[0] if self.queue else self.default
            at_head = not callable(response) and (response.early or response.unread)
            if at_head and self.queue:
                self.queue.popleft()
            self.changed.notify_all()
        if at_head and not self._play_early(connection, response):
            return False
        length = int(value_of(fields, "content-length") or 0)
        body = reader.read(length)
        if len(body) < length:
            return False
        received = Received(*start.split(" "), fields, body, head, number)
        with self.changed:
            self.received.append(received)
            if not at_head:
                response = self.queue.popleft() if self.queue else self.default
            self.changed.notify_all()
        if callable(response):
            response = response(received)
        return self._play(connection, response, received.method)

    @staticmethod
    def _play_early(connection, response):
        """Play the part ahead of the request's body; return whether the body is to be read."""
        connection.sendall(response.early)
        if response.unread:
            response.unread.wait(WAIT_S * 3)        # longer than the client waits
        return not (response.early and response.hangup)

    def _play(self, connection, response, method):
        if response.before and not self._hold(connection, response.before):
            return False
        if response.reset:
            close_by_reset(connection)
        if response.hangup:
            return False
        try:
            for number, data in response.pieces(method):
                gate = response.gate_of(number)
                if gate and not self._hold(connection, gate):
                    return False
                if number and response.pause_s:
                    time.sleep(response.pause_s)
                connection.sendall(data)
        except OSError:
            self._count_closed()
            return False
        return response.keeps_connection

    def _hold(self, connection, gate):
        """Wait until `gate` is set; return False if the other side leaves before."""
        while not gate.wait(0.01):
            if select.select([connection], [], [], 0)[0]:
                with contextlib.suppress(OSError):
                    if connection.recv(1, 0 if self.tls else socket.MSG_PEEK):  # TLS cannot peek
                        continue
                self._count_closed()
                return False
        return True

    def _count_closed(self):
        with self.changed:
            self.closed += 1
            self.changed.notify_all()


# rrouter as a process #########################################################

PORT_MARKS = collections.deque()    # UDP sockets: other workers see the last ports as taken


def free_port():
    """Return a port that is free on both loopback addresses and that no other test will use.

    It is below the range of outgoing connections: one of them could take it before its use.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        mark = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with socket.socket() as four, socket.socket(socket.AF_INET6) as six:
            try:
                mark.bind(("127.0.0.1", port))
                four.bind(("127.0.0.1", port))
                six.bind(("::1", port))
            except OSError as problem:
                if problem.errno in (errno.EADDRINUSE, errno.EACCES):
                    mark.close()
                    continue                        # any other error: a machine without IPv6
        PORT_MARKS.append(mark.detach())
        while len(PORT_MARKS) > 16:
            os.close(PORT_MARKS.popleft())
        return port


@functools.cache
def compiled():
    """Return the path of rrouter.py compiled once, which most processes of the suite run.

    Python compiles a main script at each start: half of the time of a start.
    """
    directory, owner = tempfile.mkdtemp(prefix="rrouter test "), os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(directory, ignore_errors=True))
    return py_compile.compile(RROUTER, os.path.join(directory, "rrouter.pyc"), doraise=True)


def altered_program(code, limits):
    """Return a Python program: `code`, then rrouter's `serve` with `limits` for its constants."""
    assert set(limits) <= set(vars(rrouter)), limits
    return "\n".join((
        "import sys", code, "sys.path[0] = %r" % os.path.dirname(compiled()), "import rrouter",
        "vars(rrouter).update(%r)" % dict(limits), "sys.exit(rrouter.main(['serve']))"))


def get_health(port, address="127.0.0.1"):
    """Return /health of the daemon on the port; None if nothing there speaks HTTP."""
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
        if sys.warnoptions and "PYTHONWARNINGS" not in self.env:    # -W error holds there too
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

        `program` (a list) replaces Python and the compiled rrouter.py; standard input is empty
        unless the options say something else.
        """
        options = {"stdin": subprocess.DEVNULL, "env": {**self.env, **dict(env)}, **options}
        return [*(program or (*PYTHON, compiled())), *arguments], options

    def run(self, *arguments, check=None, timeout=60, **options):
        """Run a command to its end; return it with text `stdout` and `stderr`.

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
        """Start a command; return its Popen.  Its output goes nowhere unless the options say so."""
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **options}
        words, options = self.command(*arguments, **options)
        return subprocess.Popen(words, **options)

    def run_all(self, *commands, **options):
        """Run the commands (tuples of arguments) side by side; return them, ended, in order."""
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            return list(pool.map(lambda arguments: self.run(*arguments, **options), commands))

    def health(self):
        """Return /health; None if nothing runs."""
        return get_health(self.port)

    def remove_directory(self):
        """Remove ~/.rrouter in one step, while a daemon may write into it."""
        away = self.dir.rename(self.dir.with_name("removed"))
        shutil.rmtree(str(away))

    def remove(self):
        shutil.rmtree(str(self.root), ignore_errors=True)


class Running:
    """`rrouter serve` as a process, in an empty Home unless one is given; a context manager.

    `code` runs in the process before rrouter is imported, and `limits` replace its constants.
    """

    wait_until = staticmethod(wait_until)

    def __init__(self, upstream, mode="antigravity", config=None, env=(), home=None, *,
                 code="", limits=()):
        self.upstream = upstream
        self.home = home or Home(upstream, mode, config, env=env)
        self.own_home = home is None
        self.port = self.home.port
        self.altered = code, limits
        self.start()

    def start(self):
        if any(self.altered):
            self.launch("-c", altered_program(*self.altered))
        else:
            self.launch(compiled(), "serve")

    def launch(self, *arguments, **options):
        """Start Python with these arguments and wait for /health; end the process otherwise."""
        self.output = tempfile.TemporaryFile()     # noqa: SIM115
        self.process = self.home.begin(*arguments, program=PYTHON, stdout=self.output,
                                       stderr=self.output, **options)
        try:
            self.wait_until(self._answers)
        except BaseException:
            self.kill()
            raise

    def kill(self):
        """End the process at once, as a machine that runs out of memory does."""
        self.process.kill()
        self.process.wait(WAIT_S)
        self.output.close()

    def _answers(self):
        if self.process.poll() is not None:
            raise AssertionError("rrouter serve ended with status %s:\n%s" % (
                self.process.returncode, self.printed()))
        health = self.home.health()
        return health is not None and health["pid"] == self.process.pid

    def stop(self, expect=0):
        """End the process by SIGTERM, and check its exit status and that it left no traceback.

        Any status will do if `expect` is None.  The second call does nothing.
        """
        if self.output.closed:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(WAIT_S * 4)
        printed = self.printed()
        self.output.close()
        if "Traceback" in printed or expect not in (None, status):
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
        """Return a raw socket to rrouter."""
        connection = socket.socket(family)
        connection.settimeout(WAIT_S)
        try:
            connection.connect(("127.0.0.1" if family == socket.AF_INET else "::1", self.port))
        except OSError:
            connection.close()
            raise
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
        """POST a message for `model`; return a Reply."""
        message = {"messages": [{"role": "user", "content": "hi"}], **members}
        return self.request("POST", target, chat(model, **message), fields)


def chat(model=SONNET, **members):
    """Return the body of a message for `model`."""
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

class Reply(collections.namedtuple("Reply", "status reason fields body complete interim")):
    """One response as the client received it.

    `complete` is False where it was broken off; `interim` lists the heads of 1xx responses.
    """

    __slots__ = ()

    def header(self, name):
        return value_of(self.fields, name)

    def json(self):
        return json.loads(self.body)


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


def read_head(reader):
    """Return (status, reason, fields) read from a binary file; None at its end."""
    line = reader.readline()
    if not line:
        return None
    version, status, reason = (*line.decode("latin-1").rstrip("\r\n").split(" ", 2), "")[:3]
    assert version in ("HTTP/1.1", "HTTP/1.0"), line
    fields = []
    while True:
        line = reader.readline().decode("latin-1")
        assert line.endswith("\r\n"), "truncated head: %r" % line
        if line == "\r\n":
            return int(status), reason, fields
        name, _, value = line[:-2].partition(":")
        fields.append((name, value.strip()))


def read_reply(connection, method="GET"):
    """Read one strictly framed response; None if the connection ends without one."""
    with connection.makefile("rb") as reader:
        return read_reply_from(reader, method)


def read_reply_from(reader, method="GET"):
    """Do the same from a binary file, for several responses on one connection."""
    interim = []
    while True:
        try:
            head = read_head(reader)
        except ConnectionError:
            head = None
        if head is None:
            return None
        if head[0] >= 200:
            break
        interim.append(head)
    status, reason, fields = head
    values = {name.lower(): value for name, value in fields}
    body, complete = b"", True
    try:
        if method == "HEAD" or status in (204, 304):
            pass
        elif "transfer-encoding" in values:
            assert values["transfer-encoding"] == "chunked", fields
            assert "content-length" not in values, fields
            body, complete = read_chunks(reader)
        elif "content-length" in values:
            body = reader.read(int(values["content-length"]))
            complete = len(body) == int(values["content-length"])
        else:
            body = reader.read()
    except ConnectionError:
        complete = False
    return Reply(status, reason, fields, body, complete, interim)


def read_chunks(reader):
    """Return (body, whether the last chunk came)."""
    body = b""
    while True:
        line = reader.readline()
        if not line.endswith(b"\r\n"):
            return body, False
        size = int(line, 16)
        data = reader.read(size + 2)
        body += data[:size]
        if len(data) < size + 2:
            return body, False
        assert data[size:] == b"\r\n", "chunk without its end"
        if size == 0:
            return body, True


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
        """Return a gate, an Event that is set at the latest when the test ends."""
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

    def assert_own_error(self, reply, *statuses):
        """One of these statuses, in Anthropic's shape, complete and labelled as JSON."""
        self.assertIsNotNone(reply, "closed without a response")
        self.assertIn(reply.status, statuses)
        self.assert_error(reply, reply.status)
        self.assertIn("application/json", reply.header("content-type"))
        self.assertTrue(reply.complete)


class RouterTest(LoopbackTest):
    """Base of the tests through real sockets: one upstream and one rrouter for each class.

    Class attributes set the mode, the configuration, the environment, the code that alters the
    process and the limits.  Each test begins with a clear script and the mode of its class.
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
        if mode != self.mode or mode == "auto":         # in auto mode this clears all counters
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
        """POST for a stream; yield the http.client response when its head is there."""
        connection = http.client.HTTPConnection("127.0.0.1", self.rrouter.port, timeout=WAIT_S)
        with contextlib.closing(connection):
            connection.request("POST", target, chat(model), {"Content-Type": "application/json"})
            with contextlib.closing(connection.getresponse()) as response:
                yield response


# Configuration, by tables #####################################################

class FakeClock:
    """A clock that moves only by `advance`.  Call it to read it, in Unix seconds."""

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
        # label, text, words of the complaint
        ("not JSON", '{"modes": }', "1:11: expecting value"),
        ("cut short", '{"modes":', "the end of the file"),
        ("second line", '{\n  "modes" 1}', "2:11: expecting"),
        ("empty", '', "1:1: expecting value"),
        ("array", '[]', "the top level: expected an object"),
        ("deep", '[' * 100_000, "nesting that is too deep"),
        ("NaN", '{"modes": {"a": {}},\n "auto": {"firstByteTimeoutSeconds": NaN}}',
         "2:38: expected a plain JSON number, found NaN"),
        ("no modes", '{}', "modes: missing"),
        ("no mode", '{"modes": {}}', "modes: expected an object with at least"),
        ("modes is a list", '{"modes": []}', "modes: expected an object"),
        ("mode is a number", '{"modes": {"a": 1}}', "modes.a: expected an object, found 1"),
        ("auto defined", '{"modes": {"auto": {}}}', "modes.auto: expected another name"),
        ("upper case", '{"modes": {"Fast": {}}}', "modes.Fast: expected a name in lower"),
        ("space in the name", '{"modes": {"a b": {}}}', "modes.a b: expected a name"),
        ("empty name", '{"modes": {"": {}}}', "expected a name"),
        ("mappings no list", '{"modes": {"a": {"mappings": {}}}}',
         "modes.a.mappings: expected a list"),
        ("match is a number", '{"modes": {"a": {"mappings": [{"match": 7, "rewrite": "x"}]}}}',
         "modes.a.mappings[0].match: expected a string"),
        ("no rewrite", '{"modes": {"a": {"mappings": [{"match": "x"}]}}}',
         "modes.a.mappings[0].rewrite: missing"),
        ("empty rewrite", '{"modes": {"a": {"mappings": [{"match": "x", "rewrite": ""}]}}}',
         "mappings[0].rewrite: expected"),
        ("class is null",
         '{"modes": {"a": {"mappings": [{"match": "x", "rewrite": "y", "class": null}]}}}',
         "mappings[0].class: expected a string that is not empty, found null"),
        ("default unknown", '{"modes": {"a": {}}, "defaultMode": "b"}',
         'defaultMode: expected one of a, auto, found "b"'),
        ("default is null", '{"modes": {"a": {}}, "defaultMode": null}',
         "defaultMode: expected one of"),
    )
    REFUSED_AUTO = (
        # member of auto, value, words of the complaint
        ("targets", ["a"], "auto.targets: expected two"),
        ("targets", ["a", "a"], "auto.targets: expected two"),
        ("failureThreshold", 0, "auto.failureThreshold: expected a whole"),
        ("timeoutThreshold", 1.5, "auto.timeoutThreshold: expected a whole"),
        ("failureThreshold", True, "found true"),
        ("cooldownMinutes", [], "auto.cooldownMinutes: expected a list"),
        ("cooldownMinutes", [1, -1], "auto.cooldownMinutes[1]: expected"),
        ("cooldownMinutes", [0], "auto.cooldownMinutes[0]: expected"),
        ("firstByteTimeoutSeconds", "9", "auto.firstByteTimeoutSeconds: expected"),
        ("firstByteTimeoutSeconds", 10 ** 400, "auto.firstByteTimeoutSeconds"),
        ("stay", 61, "auto.stay: expected a number from 0 to 60, found 61"),
        ("onSwitch", "notify-send", 'auto.onSwitch: expected a list of strings, a program and'),
    )

    def assert_refused(self, text, words):
        with self.assertRaises(rrouter.ConfigError) as caught:
            rrouter.parse_config(text)
        self.assertIn(words, str(caught.exception))

    def test_a_config_that_does_not_fit_is_refused_with_its_place(self):
        for label, text, words in self.REFUSED:
            with self.subTest(label):
                self.assert_refused(text, words)
        for member, value, words in self.REFUSED_AUTO:
            with self.subTest(member, value=str(value)[:20]):
                config = {"modes": {"a": {}}, "auto": {member: value}}
                self.assert_refused(json.dumps(config), words)

    @unittest.skipIf(sys.version_info >= (3, 10), "this Python accepts every glob")
    def test_a_glob_that_the_library_rejects_is_refused(self):
        self.assert_refused('{"modes": {"m": {"mappings": [{"match": "[z-a]*", "rewrite": "x"}]}}}',
                            "modes.m.mappings[0].match: expected a glob")

    def test_optional_members_are_kept(self):
        rule = {"match": "m", "rewrite": "r", "agent": "explore", "class": "sub*"}
        config = config_with(modes={"antigravity": {"mappings": [rule]}, "claude": {}},
                             auto={"stay": 0.5, "onSwitch": ["notify-send", "{to}"]})
        self.assertEqual(config.auto[-2:], (30, ("notify-send", "{to}")))
        self.assertEqual(config.modes["antigravity"], (rrouter.Rule("m", "r", "explore", "sub*"),))
        self.assertEqual(config.problems, ())
        self.assertEqual(rrouter.parse_config(rrouter.config_text(config)), config)

    def test_unknown_keys_are_named_and_do_no_harm(self):
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


class ReadEnvironmentTest(unittest.TestCase):

    ACCEPTED = (
        # port, upstream, host,                         settings
        (None, None, None,                              "localhost:8316 http://localhost:8317"),
        ("", "", "",                                    "localhost:8316 http://localhost:8317"),
        ("65535", "https://h/base/", "[::1]",           "[::1]:65535 https://h/base"),
        ("1", "http://[::1]:1", "0.0.0.0",              "0.0.0.0:1 http://[::1]:1"),
    )

    def test_allowed_hosts_are_names_between_commas(self):
        for text, expected in (("", ()), (" Host.Docker.Internal., ,[FD00::1]",
                                          ("host.docker.internal", "fd00::1"))):
            settings = rrouter.read_environment({"RROUTER_ALLOWED_HOSTS": text})
            self.assertEqual(settings.allowed_hosts, expected)

    def test_unset_and_empty_variables_have_their_defaults(self):
        names = ("RROUTER_PORT", "RROUTER_UPSTREAM", "RROUTER_HOST")
        for *given, expected in self.ACCEPTED:
            with self.subTest(given):
                environ = {name: value for name, value in zip(names, given) if value is not None}
                settings = rrouter.read_environment(environ)
                self.assertEqual(f"{settings.listen_addr} {settings.upstream}", expected)

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
    )

    def test_the_first_matching_rule_wins(self):
        for rules, model, expected in self.CASES:
            with self.subTest(rules=rules, model=model):
                mappings = [dict(zip(("match", "rewrite"), rule.split(">")))
                            for rule in rules.split()]
                config = config_with(modes={"m": {"mappings": mappings}}, defaultMode="m")
                self.assertEqual(rrouter.decide_route(config, "m", model).model, expected)

    SENDERS = (
        # the rule's agent, class   the request's agent, class, prompt's agent   whether it matches
        (("explore", ""),           ("", "", "explore"),                         True),
        (("explore", ""),           ("Explore", "subagent", ""),                 True),
        (("explore", ""),           ("Plan", "subagent", "explore"),             False),
        (("explore", ""),           ("custom", "subagent", "explore"),           True),
        (("e*[er]", "sub*"),        ("explorer", "subagent", ""),                True),
        (("*", ""),                 ("", "main", ""),                            False),
        (("", "*"),                 ("Explore", "", "explore"),                  False),
        (("explore", "main"),       ("explore", "subagent", ""),                 False),
    )

    def test_rule_with_agent_or_class_matches_only_their_requests(self):
        for (agent, kind), (header, sent_kind, prompt), expected in self.SENDERS:
            with self.subTest(rule=(agent, kind), request=(header, sent_kind, prompt)):
                sender = rrouter.Sender(header, sent_kind, lambda: prompt)
                rule = rrouter.Rule("*", "g", agent, kind)
                found = rrouter.match_rule([rule], "m", lambda: sender)
                self.assertEqual(found is rule, expected)

    def test_body_is_searched_once_and_only_if_a_rule_asks(self):
        searches = []
        sender = rrouter.Sender(search=lambda: searches.append(1) or "explore")
        rules = rrouter.Rule("other", "g", "*"), rrouter.Rule("*", "g", "", "main")
        rrouter.match_rule(rules, "m", lambda: sender)
        self.assertEqual(searches, [])
        rules = [rrouter.Rule("*", "g", agent) for agent in ("architect", "critic", "explore")]
        self.assertIs(rrouter.match_rule(rules, "m", lambda: sender), rules[2])
        self.assertEqual(searches, [1])

    AGENTS = (
        # the agent, the members of the body after its model
        ("explore",      '"system":"You are oh-my-claudecode:explore."'),
        ("deep-executor_2", '"messages":[{"content":"oh-my-claudecode:critic"}],"system":[{"type":'
                         '"text","text":"Go"},{"type":"text","text":"oh-my-claudecode:'
                         'deep-executor_2\\n\xed\x95\x9c"}]'),
        ("",             '"messages":[{"content":"oh-my-claudecode:explore"}],"system":"Go"'),
        ("",             '"messages":[{"system":"oh-my-claudecode:explore"}]'),
        ("",             '"system":"Go","system":"oh-my-claudecode:explore"'),
        ("",             '"messages":[oh-my-claudecode:explore'),
    )

    def test_agent_is_named_by_the_system_prompt_alone(self):
        for agent, members in self.AGENTS:
            for kind in (bytes, bytearray, memoryview):
                with self.subTest(members, kind=kind):
                    body = ('{"model":"m",%s}' % members).encode("latin-1")
                    self.assertEqual(rrouter.find_agent(kind(body)), agent)

    def test_more_rules_than_fnmatch_caches_cost_little(self):
        rules = [rrouter.Rule(f"model-{number}-*", "g") for number in range(5000)]
        rrouter.match_rule(rules, "x")
        start = time.process_time()
        self.assertIsNone(rrouter.match_rule(rules, "x"))
        self.assertLess(time.process_time() - start, 0.1)


# Messages, by tables ##########################################################

class ModelSpanTest(unittest.TestCase):
    """Where the model of a body stands; SpliceFuzzTest asks the same of random bodies."""

    CASES = (
        # body,                                                      name, or None
        (b'{"model":"a","x":1}',                                     "a"),
        (b' \r\n\t{ "model" : "a" }',                                "a"),
        (b'{"x":{"model":"no"},"model":"a"}',                        "a"),
        (b'{"x":"\\"model\\":\\"no\\"","model":"a"}',                "a"),
        (b'{"\\u006dodel":"a","model":"b"}',                         "a"),
        (b'{"model":"claude\\u002dsonnet"}',                         "claude-sonnet"),
        (b'{"x":"\\ud83d","model":"a"}',                             "a"),
        (b'{"x":[1e400,-0,9007199254740993,1E+5],"model":"a"}',      "a"),
        (b'{"x":' + b"1" * 100_000 + b',"model":"a"}',               "a"),
        ('{"x":"한글","model":"모델"}'.encode(),                      "모델"),
        (b'{"x":1,"model":"a","model":"b"}',                         "a"),
        (b'{"model":"a","model":"b"}',                               "a"),
        (b'{"x":1,"model":null,"model":"b"}',                        None),
        (b'{"x":1,"model":7}',                                       None),
        (b'{"x":1}',                                                 None),
        (b'{}',                                                      None),
        (b'[{"model":"a"}]',                                         None),
        (b'"model"',                                                 None),
        (b'',                                                        None),
        (b'\xef\xbb\xbf{"model":"a"}',                               None),
        (b'{"x":1,"model":"a"',                                      None),
        (b'{"x":1,"model":"a"} x',                                   None),
        (b'{"x":1,"model":"a",}',                                    None),
        (b'{"x" 1,"model":"a"}',                                     None),
        (b'{"x":NaN,"model":"a"}',                                   None),
        (b'{"model":"a\x01"}',                                       None),
        (b'{"x":"\xff","model":"\xff"}',                             None),
        (b'{"x":' + b"[" * 100_000,                                  None),
        (b'\x1f\x8b\x08\x00',                                        None),
    )

    def test_the_first_top_level_model_string_is_found(self):
        for body, expected in self.CASES:
            with self.subTest(body=body[:40]):
                found = rrouter.find_model(body)
                self.assertEqual(found[2] if found else None, expected)

    def test_a_leading_model_costs_the_same_however_long_the_body(self):
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
    )

    def test_thinking_blocks_go_and_all_else_stays(self):
        frame = ('{"model":"m", "messages": [{"role":"assistant","content":%s},{"content":"é"} ],'
                 '"x":1e400}')
        for before, after in self.CASES:
            with self.subTest(before):
                result = rrouter.without_thinking((frame % before).encode())
                self.assertEqual(result, (frame % after).encode() if after else None)

    def test_bodies_without_messages_stay_as_they_are(self):
        for body in (b"", b"{}", b"[]", b"x", b'{"messages":7}', b'{"messages":[7]}',
                     b'{"messages":[{"content":[', b"\xff"):
            with self.subTest(body):
                self.assertIsNone(rrouter.without_thinking(body))

    def test_a_refusal_that_repeats_its_wording_is_searched_in_linear_time(self):
        start = time.process_time()
        self.assertFalse(rrouter.names_foreign_signature(b"redacted_thinking " * 12_000))
        self.assertLess(time.process_time() - start, 0.5)


class ChunkedBodyTest(unittest.TestCase):

    def test_any_cutting_gives_the_same_payload(self):
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

    def test_broken_coding_is_refused_at_once(self):
        for coded in (b"0x3\r\nabc\r\n", b"+3\r\n", b"-1\r\n", b" 3\r\n", b"zz\r\n", b"\r\n",
                      b"1" * 17 + b"\r\n", b"0" * 15 + b"3\r\nabc\r\n", b"3\nabc\n",
                      b"3\r\nabcd\r\n", b"3\r\nabcXY", b"3;\x00\r\n", b"3;" + b"x" * 70_000,
                      b"3;\r\n", b"3;a[=b\r\n", b"3;a=\r\n", b'3;a="b\r\n', b"3;;a\r\n",
                      b"0\r\nno colon\r\n\r\n", b"0\r\nA: " + b"x" * 9000, b"0\r\n\n",
                      b"0\r\nA: b\r\n\n", b"0\r\nA: b\n"):
            with self.subTest(coded[:20]), self.assertRaises(rrouter.UpstreamError):
                rrouter.ChunkedBody().feed(coded)


class StreamScanTest(unittest.TestCase):

    START = b'event: message_start\ndata: {"type":"message_start","message":{}}\n\n'
    TEXT = b'data: {"type":"content_block_delta","delta":{"text":"a \\"error\\""}}\n\n'
    STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    EMPTY_BLOCK = (b'data: {"type":"content_block_start","content_block":{"type":"text",'
                   b'"text":""}}\n\ndata: {"type":"content_block_stop"}\n\n')
    TOOL = b'data: {"type":"content_block_start","content_block":{"type":"tool_use"}}\n\n'
    ERROR = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error"}}\n\n'

    MESSAGES = (
        # stream of /messages,                                    what it has shown
        (b"",                                                     ""),
        (b": hello\n\n: again\n\n",                               ""),
        (b"id: 7\n\n",                                            ""),
        (b'event: ping\ndata: {"type": "ping"}\n\n',             ""),
        (START,                                                   "events=1"),
        (START.replace(b"\n", b"\r\n"),                          "events=1"),
        (START + EMPTY_BLOCK,                                     "events=3"),
        (TEXT[:-1],                                               ""),
        (TEXT,                                                    "committed events=1"),
        (b"\xef\xbb\xbf" + TEXT,                                  "committed events=1"),
        (TEXT.replace(b"\n", b"\r\n"),                           "committed events=1"),
        (TOOL,                                                    "committed events=1"),
        (b'data: {"delta":{},"type":"content_block_delta"}\n\n',  "committed events=1"),
        (START + ERROR,                                           "error event"),
        (b"event:error\r\ndata: {}\r\n\r\n",                      "error event"),
        (b'data: {"error":{"message":"x"},"type":"error"}\n\n',   "error event"),
        (b'data: {"error":{"message":"x"}}\n\n',                  "error event"),
        (b'data: {"type":"message_start","error":null}\n\n',      "events=1"),
        (b"data: [DONE]\n\n",                                     "empty message"),
        (START + EMPTY_BLOCK + STOP,                              "empty message"),
        (b'data: {"type":"message_delta","delta":{"stop_reason":"end_turn"},'
         b'"usage":{"output_tokens":0}}\n\n',                     "empty message"),
        (b'data: {"type":"message_delta","delta":{"stop_reason":"refusal"},'
         b'"usage":{"output_tokens":0}}\n\n',                     "committed events=1"),
        (b'data: {"type":"message_delta","delta":{"stop_reason":"max_tokens"},'
         b'"usage":{"output_tokens":0}}\n\n',                     "committed events=1"),
        (b'data: {"type":"message_delta","usage":{"output_tokens":2}}\n\n',
         "committed events=1"),
        (b'data: {"type":"message_delta","delta":{}}\n\n',        "committed events=1"),
        (TEXT + STOP,                                             "committed ended events=2"),
        (TEXT + ERROR,                                            "committed broken events=2"),
        (TEXT + STOP + ERROR,
         "committed broken ended events=3"),
        (TEXT + b'data: {"error": {"message": "x"}}\n\n',         "committed broken events=2"),
        (TEXT + b'event: ping\ndata: {"type": "ping"}\n\n',      "committed events=1"),
    )
    OTHERS = (
        # stream of another path,                                 what it has shown
        (b'data: {"id":"x","choices":[]}\n\n',                    "committed events=1"),
        (b'data: {"error":{"message":"x"}}\n\n',                  "error event"),
        (b": comment\n\n",                                        ""),
    )

    def assert_shown(self, is_message, data, expected):
        for size in (1, 2, 3, 7, 1000):
            with self.subTest(data, size=size):
                scan = rrouter.StreamScan(is_message)
                for start in range(0, len(data), size):
                    scan.feed(data[start:start + size])
                shown = [name for name in ("committed", "broken", "ended") if getattr(scan, name)]
                shown += ["events=%d" % scan.events] if scan.events else []
                self.assertEqual(scan.defect or " ".join(shown), expected)

    def test_events_are_read_however_the_stream_is_cut(self):
        for data, expected in self.MESSAGES:
            self.assert_shown(True, data, expected)
        for data, expected in self.OTHERS:
            self.assert_shown(False, data, expected)

    def test_an_end_without_content_is_a_defect_and_an_end_after_it_is_none(self):
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

    def test_a_stream_commits_after_the_most_that_is_held_back(self):
        for block in (b": comment\n\n", b"x" * 100_000):
            with self.subTest(block[:10]):
                scan, fed = rrouter.StreamScan(True), 0
                while not scan.committed:
                    scan.feed(block)
                    fed += len(block)
                self.assertLess(fed - rrouter.READ_AHEAD_MAX_BYTES, len(block) + 1)


    def test_the_end_is_seen_whatever_the_order_of_the_members(self):
        scan = rrouter.StreamScan(True)
        scan.feed(self.TEXT + b'data: {"usage":{},"type":"message_stop"}\n\n')
        self.assertTrue(scan.ended)


class TokenReaderTest(unittest.TestCase):

    START = event("message_start", message={"type": "message", "usage": {
        "input_tokens": 1200, "cache_creation_input_tokens": 3, "cache_read_input_tokens": 48211,
        "output_tokens": 1, "cache_creation": {"ephemeral_1h_input_tokens": 7}}})
    BLOCKS = (
        event("content_block_delta", delta={"type": "text_delta", "text": '"usage":{"output_tok'}),
        event("content_block_start", content_block={"input": {"usage": {"output_tokens": 9}}}),
        event("ping") + b": a comment\n\n")
    END = event("message_delta", usage={"output_tokens": 512}) + event("message_stop")
    WHOLE = START + b"".join(BLOCKS) + event("message_delta", usage={"output_tokens": 9}) + END
    NOTE = " in 1203+48211 out 512"
    BODY = json.dumps({"type": "message", "content": [{"input": {"usage": {"output_tokens": 9}}}],
                       "usage": {"input_tokens": 5, "output_tokens": 6}}).encode()

    def note(self, *payloads, kind=b"text/event-stream", coding=b""):
        head = rrouter.parse_response_head(
            b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Encoding: %b\r\n\r\n" % (kind, coding))
        reader = rrouter.TokenReader(head)
        for payload in payloads:
            reader.feed(payload)
        return reader.note()

    STREAMS = (
        # payloads,                                                    the note
        ((WHOLE.replace(b"\n", b"\r\n"),),                            NOTE),
        ((WHOLE.replace(b"\n", b"\r"),),                              NOTE),
        ((START, *BLOCKS, b"data: " + 50_000 * b"x", b"\n", END),      NOTE),
        ((START, event("message_delta", usage={"input_tokens": 0, "output_tokens": 512})), NOTE),
        ((event("message_delta", usage={"output_tokens": True, "input_tokens": -1}),), ""),
        ((event("message_delta", usage=["output_tokens"]), event("message_start", message=3)), ""),
    )

    def test_a_stream_reports_them_at_its_start_and_its_end(self):
        for payloads, note in self.STREAMS:
            with self.subTest(payloads[0][:80]):
                self.assertEqual(self.note(*payloads), note)
        for size in (1, 7, 100, 1000):
            pieces = [self.WHOLE[at:at + size] for at in range(0, len(self.WHOLE), size)]
            self.assertEqual(self.note(*pieces), self.NOTE, size)

    def test_a_body_reports_them_in_its_own_usage(self):
        self.assertEqual(self.note(self.BODY[:60], self.BODY[60:], kind=b"application/json"),
                         " in 5+0 out 6")
        for body in (b"", b"[]", b'{"type":"message","usage":', self.BODY + b" " * 1024 ** 2):
            self.assertEqual(self.note(body, kind=b"application/json"), "")

    def test_gzip_is_read_and_other_encodings_say_nothing(self):
        long = self.START + 100 * event("content_block_delta", text="x" * 5000) + self.END
        packed = gzip.compress(long)
        self.assertEqual(self.note(packed, coding=b"gzip"), self.NOTE)
        self.assertEqual(self.note(*(bytes([byte]) for byte in packed), coding=b"gzip"), self.NOTE)
        self.assertEqual(self.note(gzip.compress(self.BODY), kind=b"text/json", coding=b"gzip"),
                         " in 5+0 out 6")
        self.assertEqual(self.note(packed[:20] + b"damaged" * 9, self.END, coding=b"gzip"), "")
        self.assertEqual(self.note(self.WHOLE, coding=b"br"), "")

    def test_a_line_without_end_costs_little(self):
        start = time.process_time()
        self.assertEqual(self.note(*[b"x" * 1000] * 20_000), "")
        self.assertLess(time.process_time() - start, 1)


class AsksForStreamTest(unittest.TestCase):

    def test_the_member_is_found_at_the_ends_and_in_the_middle(self):
        filler = b'"x":"%b",' % (b"y" * 5000)
        for body, expected in ((b'{"stream":true}', True), (b'{"stream" : true, "a":1}', True),
                               (b"{%b\"stream\":true,%b\"a\":1}" % (filler, filler), True),
                               (b'{"stream":false}', False),
                               (b'{"text":"\\"stream\\":true"}', False)):
            with self.subTest(body[:30]):
                self.assertEqual(rrouter.asks_for_stream(body), expected)


class MessageTest(unittest.TestCase):

    CASES = (
        # body,                                                                  defect
        (b"",                                                                    "empty response"),
        (b" \n",                                                                 "empty response"),
        (b"<html></html>",                                                       "not a message"),
        (b"[]",                                                                  "not a message"),
        (b'{"type":"message","content":[{"type":"text","text":"x"}]',            "not a message"),
        (b'{"choices":[]}',                                                      "not a message"),
        (b'{"type":"error","error":{"message":"x"}}',                            "error in a 2xx"),
        (b'{"type":"message","error":{},"content":[{"type":"text","text":"x"}]}', "error in a 2xx"),
        (b'{"type":"message","content":[],"usage":{"output_tokens":0}}',         "empty message"),
        (b'{"type":"message","content":[{"type":"text","text":""}],'
         b'"stop_reason":"end_turn","usage":{"output_tokens":0}}',               "empty message"),
        (b'{"type":"message","content":[],"usage":{"output_tokens":3}}',         ""),
        (b'{"type":"message","content":[]}',                                     ""),
        (b'{"type":"message","content":[],"stop_reason":"refusal",'
         b'"usage":{"output_tokens":0}}',                                        ""),
        (b'{"type":"message","content":[],"stop_reason":"max_tokens",'
         b'"usage":{"output_tokens":0}}',                                        ""),
        (b'{"type":"message","error":null,"content":[{"type":"tool_use"}],'
         b'"usage":{"output_tokens":0}}',                                        ""),
        (b"[" * 100_000,                                                         "not a message"),
    )

    def test_what_is_wrong_with_a_message(self):
        for body, defect in self.CASES:
            with self.subTest(body[:80]):
                self.assertEqual(rrouter.message_defect(body), defect)


class FailureTest(unittest.TestCase):
    """What a failed response says about its target."""

    FAULTS = (
        # status, text,                                             fault,       called
        (529, b"",                                                  "STATUS",    "529"),
        (400, b"invalid",                                           "STATUS",    "400"),
        (503, b"auth_unavailable: no auth available (providers=x)", "SHELF",
         "503 auth_unavailable"),
        (500, b"auth_unavailable: no auth available",               "STATUS",    "500"),
        (429, b"All credentials for model X are cooling down",      "SHELF",
         "429 cooling down"),
        (429, b"cooling down",                                      "STATUS",    "429"),
        (429, b'{"code":"model_cooldown"}',                         "SHELF",
         "429 model_cooldown"),
        (400, b"unknown provider for model x",                      "SHELF",
         "400 unknown provider for model"),
        (413, b"",                                                  "TOO_LARGE", "413 too large"),
        (400, b"Prompt is too long: 9 tokens \\u003e 8 maximum",    "TOO_LARGE", "400 too large"),
        (422, b"prompt token count of 9 exceeds the limit",         "TOO_LARGE", "422 too large"),
        (500, b"prompt is too long",                                "STATUS",    "500"),
        (503, b'{"error": {"message": "rrouter: too many"}}',       "OWN",       "503"),
    )

    def test_the_fault_is_read_from_status_and_text(self):
        for status, text, fault, name in self.FAULTS:
            with self.subTest(text, status=status):
                self.assertEqual(rrouter.read_failure(status, text), (Fault[fault], name))

    DELAYS = (
        # Retry-After,                    retry-after-ms, text,                    seconds at 8:00
        ("",                              "",             b"",                       None),
        ("120",                           "",             b"",                       120.0),
        ("90.5",                          "",             b"",                       90.5),
        ("999999999",                     "",             b"",                       999999999.0),
        ("-1",                            "",             b"",                       None),
        ("soon",                          "",             b"",                       None),
        ("1e9",                           "",             b"",                       None),
        ("Fri, 15 Jan 2027 08:01:00 GMT", "",             b"",                       60.0),
        ("Fri, 15 Jan 2027 07:00:00 GMT", "",             b"",                       0.0),
        ("120",                           "1500",         b"reset after 7s",         1.5),
        ("",                              "",             b"will reset after 30s.",  30.0),
        ("",                              "",             b"reset after 7200s",      7200.0),
        ("",                              "",             b"reset after 1h2m3s",     3723.0),
        ("",                              "",             b"reset after 5m",         300.0),
        ("",                              "",             b"reset after lunch",      None),
    )

    def test_the_delay_is_read_from_headers_and_text(self):
        for seconds, milliseconds, text, expected in self.DELAYS:
            with self.subTest((seconds, milliseconds, text)):
                self.assertEqual(rrouter.read_retry_after(
                    seconds, milliseconds, text, 1_800_000_000.0), expected)

    def test_a_delay_of_any_kind_never_fails(self):
        chance = random.Random(8316)
        words = ["1", "Feb", ",", "00", "Fri", "2027", "GMT", "-0000", ":", "99:99:99", "é", "\0"]
        for _ in range(2000):
            value = " ".join(chance.choice(words) for _ in range(chance.randrange(8)))
            seconds = rrouter.read_retry_after(value, value, value.encode(), 1e9)
            self.assertTrue(seconds is None or seconds >= 0, value)


class WatchTest(unittest.TestCase):

    def test_there_is_no_limit_by_default_nor_after_lift(self):
        unlimited, lifted = rrouter.Watch(None), rrouter.Watch(None, 0)
        lifted.start()
        lifted.lift()
        for watch in unlimited, lifted:
            watch.start()
            self.assertEqual(watch.check(), rrouter.TICK_S)

    def test_what_has_arrived_is_read_before_the_limit_expires(self):
        watch = rrouter.Watch(None, 0)
        watch.start()
        self.assertEqual(watch.check(lambda: True), rrouter.TICK_S)
        with self.assertRaisesRegex(rrouter.UpstreamTimeout, "within 0 s"):
            watch.check(lambda: False)

    def test_a_client_that_left_ends_the_wait(self):
        watch = rrouter.Watch(lambda: True)
        with self.assertRaises(rrouter.ClientGone):
            while True:
                watch.check()


class TextTest(unittest.TestCase):

    PRINTABLE = (
        # text,      printed as
        ("plain",    "plain"),
        ("a\nb",     "a\\nb"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\x9b",     "\\x9b"),
        ("한",       "\\ud55c"),
        ("\ud83d",   "\\ud83d"),
        ("\x7f",     "\\x7f"),
        ("x" * 400,  "x" * 300 + "..."),
    )

    def test_printable_escapes_what_could_break_a_line_or_a_terminal(self):
        for text, expected in self.PRINTABLE:
            with self.subTest(text[:10]):
                self.assertEqual(rrouter.printable(text), expected)


# Failover, by tables and walks ################################################

def outcome(fault=None, status=None, **changes):
    """Return an Outcome of the fault with this name, and the usual status for it."""
    usual = {None: 200, "TOO_LARGE": 400, "REJECTED": 400, "SHELF": 503, "NO_MESSAGE": 200,
             "TIMEOUT": 504, "LEFT": 499, "STATUS": 529}
    status = status or usual.get(fault, 502)
    return rrouter.Outcome(Fault[fault] if fault else None, status, str(status))._replace(**changes)


class JudgeTest(unittest.TestCase):

    TABLE = (
        # first,                         second,                        counts,         chosen
        (outcome("STATUS"),              outcome(),                     (True, False),  1),
        (outcome("SHELF"),               outcome(),                     (True, False),  1),
        (outcome("NO_MESSAGE"),          outcome(),                     (True, False),  1),
        (outcome("TIMEOUT"),             outcome(),                     (True, False),  1),
        (outcome("TOO_LARGE"),           outcome(),                     (False, False), 1),
        (outcome("REJECTED"),            outcome(),                     (False, False), 1),
        (outcome("DROPPED"),             outcome(),                     (False, False), 1),
        (outcome("STATUS"),              outcome("LEFT"),               (False, False), 0),
        (outcome("STATUS", ended=60.0),  outcome("LEFT"),               (True, False),  0),
        (outcome("STATUS", ended=59.9),  outcome("LEFT"),               (False, False), 0),
        (outcome("DROPPED", ended=60.0), outcome("LEFT"),               (False, False), 0),
        (outcome("TIMEOUT"),             outcome("LEFT"),               (True, False),  0),
        (outcome("STATUS", 500),         outcome("STATUS", 500),        (False, False), 0),
        (outcome("TIMEOUT"),             outcome("STATUS", 529),        (True, False),  1),
        (outcome("STATUS", 529),         outcome("TIMEOUT"),            (False, True),  0),
        (outcome("TIMEOUT"),             outcome("TIMEOUT"),            (False, False), 0),
        (outcome("TIMEOUT"),             outcome("DROPPED"),            (False, False), 0),
        (outcome("DROPPED"),             outcome("TIMEOUT"),            (False, False), 0),
        (outcome("TIMEOUT"),             outcome("UNREACHABLE"),        (False, False), 0),
        (outcome("TIMEOUT", keeps_400=True, status=400), outcome("STATUS", 429), (True, False), 0),
        (outcome("STATUS", 429),         outcome("STATUS", keeps_400=True, status=400),
         (False, False), 1),
    )

    def test_the_verdict_on_two_outcomes(self):
        for first, second, counts, chosen in self.TABLE:
            with self.subTest("%s, %s" % (first, second)):
                self.assertEqual(tuple(rrouter.judge(first, second)), (counts, chosen))

    # Each row is more useful to the client than the rows below it.
    RANKS = (
        (outcome("STATUS", 400), outcome("STATUS", 413), outcome("STATUS", 422),
         outcome("STATUS", 402)),
        (outcome("STATUS", 429),),
        (outcome("STATUS", 401), outcome("STATUS", 403)),
        (outcome("STATUS", 404),),
        (outcome("STATUS", 500), outcome("STATUS", 529), outcome("STATUS", 408)),
        (outcome("STATUS", 504),),
        (outcome("SHELF", 503), outcome("SHELF", 429), outcome("SHELF", 400)),
        (outcome("NO_MESSAGE", 200),),
        (outcome("TIMEOUT"), outcome("DROPPED"), outcome("UNREACHABLE"), outcome("OWN", 503)),
    )

    def test_the_client_gets_the_more_useful_response(self):
        for better in range(len(self.RANKS)):
            for one, other in itertools.product(self.RANKS[better], repeat=2):
                self.assertEqual(rrouter.judge(one, other).chosen, 0, (one, other))
            for worse in range(better + 1, len(self.RANKS)):
                for one, other in itertools.product(self.RANKS[better], self.RANKS[worse]):
                    self.assertEqual(rrouter.judge(one, other).chosen, 0, (one, other))
                    self.assertEqual(rrouter.judge(other, one).chosen, 1, (one, other))

    def test_a_request_too_large_for_one_target_ranks_below_a_passing_failure_of_the_other(self):
        for status, chosen in ((429, 1), (500, 1), (408, 1), (401, 0), (404, 0)):
            with self.subTest(status):
                verdict = rrouter.judge(outcome("TOO_LARGE"), outcome("STATUS", status))
                self.assertEqual(verdict.chosen, chosen)


TARGETS = ("ag", "cl")


class FailoverWalk(unittest.TestCase):
    """Base of the walks: `request` and `requests` carry requests through the machine."""

    cooldowns_min = (30, 60, 120, 240)

    def setUp(self):
        self.clock = FakeClock()
        self.auto = rrouter.AutoSettings(
            TARGETS, 3, 2, tuple(60.0 * minutes for minutes in self.cooldowns_min), 150.0)
        self.failover = rrouter.Failover(self.clock, self.auto)

    def outcome(self, fault="STATUS", what="429", **changes):
        """Return a failure that begins and ends now."""
        return outcome(fault, what=what, began=self.clock.now, ended=self.clock.now, **changes)

    def request(self, dead=(), model="opus", session="", **failure):
        """Carry one request through, each attempt on a target in `dead` failing.

        Return the targets that were tried.
        """
        tickets = [self.failover.admit(model, TARGETS, session)]
        if tickets[0].target in dead:
            tickets.append(self.failover.rescue(tickets[0], TARGETS))
        outcomes = [self.outcome(**failure) if ticket.target in dead else outcome()
                    for ticket in tickets]
        counts = rrouter.judge(*outcomes).counts if len(tickets) == 2 else (False,)
        for ticket, ended, counted in zip(tickets, outcomes, counts):
            if counted:
                self.failover.charge(ticket, ended)
            elif ended.fault is not None:
                self.failover.release(ticket)
            else:
                self.failover.credit(self.failover.commit(ticket)[0])
        return [ticket.target for ticket in tickets]

    def requests(self, count, *dead, **options):
        """Carry `count` requests through; return the targets that the last one tried."""
        return [self.request(dead, **options) for _ in range(count)][-1]

    def opus_fails_alone(self):
        """Let opus fail three times on ag while haiku succeeds in between."""
        for _ in range(3):
            self.request(("ag",), model="opus")
            self.request((), model="haiku")

    def state(self, model=None):
        """Return (target, switches, failures, timeouts, minutes left).

        Of the whole, or of a model that has switched alone; None if it has not.
        """
        seen = self.failover.report(True)
        if model is not None:
            seen = seen["models"].get(model)
            if seen is None:
                return None
        return (seen["currentTarget"], seen["switchCount"], seen["failureCount"],
                seen["timeoutCount"], round(seen["cooldownRemainingSeconds"] / 60, 1))

    def pass_minutes(self, minutes):
        self.clock.advance(60 * minutes)

    def assert_over_without_requests(self, model=None):
        """A clock set back, for good or for a while, never lengthens a cooldown.

        Only the watcher looks at it in between.
        """
        saved, now = self.failover.save(), self.clock.now
        for label, moves in (("back and right again", (-86400, 86400)),
                             ("back for good", (-86400, 60 * 30)),
                             ("back twice", (-86400, -86400, 60 * 30))):
            with self.subTest(label):
                for seconds in moves:
                    self.clock.advance(seconds)
                    self.failover.look_at_clock()
                self.assertEqual(self.state(model)[4], 0)
            self.failover.restore(saved)
            self.clock.now = now


class WholeTargetWalk(FailoverWalk):

    def test_three_failures_in_a_row_switch_though_each_was_rescued(self):
        self.assertEqual(self.requests(2, "ag"), ["ag", "cl"])
        self.assertEqual(self.state(), ("ag", 0, 2, 0, 0))
        self.assertEqual(self.requests(1, "ag"), ["ag", "cl"])
        self.assertEqual(self.state(), ("cl", 1, 0, 0, 30))
        self.assertEqual(self.requests(1, "ag"), ["cl"])

    def test_two_timeouts_switch_and_have_their_own_counter(self):
        self.requests(2, "ag")
        self.requests(1, "ag", fault="TIMEOUT")
        self.assertEqual(self.state(), ("ag", 0, 2, 1, 0))
        self.requests(1, "ag", fault="TIMEOUT")
        self.assertEqual(self.state(), ("cl", 1, 0, 0, 30))
        self.assertEqual(self.failover.report(True)["reason"], "2 consecutive timeouts")

    def test_a_success_of_the_target_itself_resets_its_counters(self):
        self.requests(2, "ag")
        self.requests(1)
        self.assertEqual(self.state(), ("ag", 0, 0, 0, 0))

    def test_one_request_probes_and_its_success_brings_all_back(self):
        self.requests(3, "ag")
        self.pass_minutes(30)
        probe = self.failover.admit("opus", TARGETS)
        self.assertEqual((probe.target, bool(probe.probe)), ("ag", True))
        self.assertEqual(self.requests(5, "ag"), ["cl"])                    # others stay
        self.assertEqual(self.failover.commit(probe)[1], ["RECOVERED: ag answers again"])
        self.assertEqual(self.state(), ("ag", 1, 0, 0, 0))

    def test_a_failed_probe_starts_the_next_cooldown(self):
        self.requests(3, "ag")
        for switches, minutes in ((2, 60), (3, 120), (4, 240), (5, 240)):
            self.pass_minutes(self.state()[4])
            self.assertEqual(self.requests(1, "ag"), ["ag", "cl"])
            self.assertEqual(self.state(), ("cl", switches, 0, 0, minutes))

    def test_the_next_probe_after_a_neutral_one_comes_after_a_minute(self):
        self.requests(3, "ag")
        self.pass_minutes(30)
        probe = self.failover.admit("opus", TARGETS)
        self.assertEqual(self.failover.admit("opus", TARGETS).target, "cl")
        self.failover.release(probe)
        self.assertEqual(self.failover.admit("opus", TARGETS).target, "cl")
        self.assertEqual(self.state(), ("cl", 1, 0, 0, 1))
        self.pass_minutes(1)
        self.assertEqual(self.failover.admit("opus", TARGETS).target, "ag")

    def test_a_later_failure_of_the_stream_that_probed_counts(self):
        self.requests(3, "ag")
        self.pass_minutes(30)
        ticket, _ = self.failover.commit(self.failover.admit("opus", TARGETS))
        self.failover.charge(ticket, self.outcome("NO_MESSAGE", direct=True))
        self.assertEqual(self.state(), ("ag", 1, 1, 0, 0))

    def test_a_direct_failure_does_not_switch_back_before_the_new_target_has_answered(self):
        for _ in range(8):                          # three of ag, five of cl
            self.failover.charge(self.failover.admit("opus", TARGETS), self.outcome(direct=True))
        self.assertEqual((self.state()[0], self.state("opus")), ("cl", None))
        self.requests(1)                            # cl answers
        for _ in range(3):
            self.failover.charge(self.failover.admit("opus", TARGETS), self.outcome(direct=True))
        self.assertEqual(self.state()[0], "ag")

    def test_failures_of_one_event_count_once_whatever_the_order_of_their_rescues(self):
        tickets = [self.failover.admit("opus", TARGETS) for _ in range(12)]
        for seconds in (1.9, 0.3, 2.2, 0.0, 1.0):
            self.failover.charge(tickets.pop(), outcome(
                "STATUS", began=self.clock.now - 5, ended=self.clock.now + seconds))
        self.assertEqual(self.state(), ("ag", 0, 1, 0, 0))
        self.failover.charge(tickets.pop(), outcome(        # 2 s later, but begun before
            "STATUS", began=self.clock.now - 5, ended=self.clock.now + 4))
        self.assertEqual(self.state(), ("ag", 0, 2, 0, 0))
        self.failover.charge(tickets.pop(), outcome(        # within 2 s, but begun after
            "STATUS", began=self.clock.now + 4.1, ended=self.clock.now + 4.2))
        self.assertEqual(self.state()[:2], ("cl", 1))

    def test_a_shelf_costs_a_minute_and_does_not_lengthen_the_next_cooldown(self):
        self.request(("ag",), what="401", status=401)
        self.requests(2, "ag", fault="SHELF", what="503 auth_unavailable")
        self.assertEqual(self.state(), ("cl", 1, 0, 0, 1))
        self.assertEqual(self.failover.report(True)["reason"], (
            "3 consecutive HTTP errors, last 503 auth_unavailable, after 401"))
        self.requests(1)                            # cl answers, which raises N elsewhere
        for failure in ({"fault": "SHELF"}, {"status": 401}, {"status": 404}, {"status": 500}):
            self.pass_minutes(1)
            self.assertEqual(self.requests(1, "ag", **failure), ["ag", "cl"])
            self.assertEqual(self.state(), ("cl", 1, 0, 0, 1))
        self.pass_minutes(1)
        self.requests(1, "ag", status=429)          # not the shelf any more: a switch
        self.assertEqual(self.state(), ("cl", 2, 0, 0, 30))

    def test_a_probe_of_the_shelf_is_logged_only_if_its_response_changes(self):
        self.requests(3, "ag", fault="SHELF", what="503 auth_unavailable")
        for what, lines in (("503 auth_unavailable", 0), ("401", 1), ("401", 0)):
            self.pass_minutes(1)
            ticket = self.failover.admit("opus", TARGETS)
            self.assertTrue(ticket.probe and ticket.quiet)
            logged = self.failover.charge(ticket, self.outcome("SHELF", what))
            self.assertEqual(len(logged), lines, what)

    def test_failures_of_the_fallback_switch_back_and_cancel_the_cooldown(self):
        self.requests(3, "ag")
        self.requests(2, "cl")
        self.assertEqual(self.state(), ("cl", 1, 2, 0, 30))
        self.requests(1, "cl")
        self.assertEqual(self.state(), ("ag", 2, 0, 0, 0))

    def test_nothing_moves_while_both_targets_fail(self):
        for failure in ({}, {"fault": "TIMEOUT"}, {"fault": "SHELF"}):
            self.requests(10, "ag", "cl", **failure)
        self.assertEqual(self.state(), ("ag", 0, 0, 0, 0))

    def test_the_cooldown_grows_only_after_the_new_target_has_answered(self):
        for switched in range(1, 4):
            for _ in range(3):                      # ag fails, rescued by cl
                self.request(("ag",))
            self.assertEqual(self.state()[4], (30, 60, 120)[switched - 1])
            for _ in range(3):
                self.request(("cl",))               # and cl fails, rescued by ag

    def test_a_quiet_time_after_the_return_resets_the_cooldown(self):
        self.requests(3, "ag")
        self.pass_minutes(30)
        self.requests(1)                            # the probe succeeds
        self.pass_minutes(59)
        self.requests(3, "ag")
        self.assertEqual(self.state()[4], 60)
        self.pass_minutes(60)
        self.requests(1)
        self.pass_minutes(120)
        self.requests(3, "ag")
        self.assertEqual(self.state()[4], 30)

    def test_a_switch_ends_the_quiet_time_of_an_earlier_return(self):
        for minutes in (30, 60, 120):
            self.requests(3, "ag")
            self.pass_minutes(minutes)
            self.requests(1)                        # the probe succeeds
        self.pass_minutes(1)
        self.requests(3, "ag")
        for minutes in (240, 240, 240):
            self.assertEqual(self.state()[4], minutes)
            self.pass_minutes(minutes)
            self.requests(1, "ag")                  # the probe fails

    RETRY_AFTER = (
        # Retry-After in seconds,  cooldown in minutes
        (None,                     30),
        (0,                        1),
        (600,                      10),
        (86400,                    30),
    )

    def test_retry_after_shortens_the_cooldown_but_never_lengthens_it(self):
        for seconds, minutes in self.RETRY_AFTER:
            with self.subTest(seconds):
                self.setUp()
                self.requests(3, "ag", retry_after_s=seconds)
                self.assertEqual(self.state()[4], minutes)

    def test_late_failures_from_before_a_switch_do_not_switch_back(self):
        early = [self.failover.admit("opus", TARGETS) for _ in range(40)]
        on_cl = [self.failover.rescue(ticket, TARGETS) for ticket in early]
        for ticket in early + on_cl:
            self.failover.charge(ticket, self.outcome(what="500"))
        self.assertEqual(self.state(), ("cl", 1, 0, 0, 30))

    def test_a_late_success_of_the_failed_target_does_not_switch_back(self):
        early = self.failover.admit("opus", TARGETS)
        self.requests(3, "ag")
        self.failover.credit(early)
        self.assertEqual(self.state()[0], "cl")

    def test_a_late_outcome_of_an_overtaken_probe_is_ignored(self):
        self.requests(3, "ag")
        self.pass_minutes(30)
        probe = self.failover.admit("opus", TARGETS)
        self.requests(3, "cl")                      # back on ag meanwhile
        self.failover.charge(probe, self.outcome(what="500"))
        self.assertEqual(self.state(), ("ag", 2, 0, 0, 0))

    def test_a_failed_probe_resets_the_counters_of_the_target_that_serves(self):
        self.requests(3, "ag")
        self.requests(2, "cl")
        self.pass_minutes(30)
        self.assertEqual(self.requests(1, "ag"), ["ag", "cl"])
        self.assertEqual(self.requests(1, "cl"), ["cl", "ag"])
        self.assertEqual(self.state()[:3], ("cl", 2, 1))

    def test_a_clock_set_back_does_not_lengthen_the_cooldown_and_one_set_forward_ends_it(self):
        self.requests(3, "ag")
        self.clock.advance(-86400 * 365)
        self.assertEqual(self.state()[4], 30)
        self.pass_minutes(31)
        self.assertEqual(self.requests(1), ["ag"])

    def test_a_clock_set_back_is_noticed_without_requests(self):
        self.requests(3, "ag")
        self.assert_over_without_requests()

    def test_a_look_at_the_clock_ends_no_cooldown_and_moves_none(self):
        self.failover.look_at_clock()
        self.assertEqual(self.state(), ("ag", 0, 0, 0, 0))
        self.requests(3, "ag")
        saved = self.failover.save()
        for minutes, left in ((0, 30), (10, 20), (20, 0)):
            self.pass_minutes(minutes)
            self.failover.look_at_clock()
            self.assertEqual((self.state()[4], self.failover.save()), (left, saved))

    def test_reset_forgets_everything_and_earlier_outcomes(self):
        early = [self.failover.admit("opus", TARGETS) for _ in range(3)]
        self.requests(3, "ag")
        self.assertEqual(self.failover.reset(self.auto, "mode auto"), ["RESET: mode auto; on ag"])
        self.assertEqual(self.failover.reset(self.auto, "mode auto"), [])
        for ticket in early:
            self.failover.charge(ticket, self.outcome(what="500"))
        self.assertEqual(self.state(), ("ag", 0, 0, 0, 0))

    def test_thresholds_are_those_of_the_config(self):
        self.failover.reset(self.auto._replace(failure_threshold=1), "test")
        self.requests(1, "ag")
        self.assertEqual(self.state()[0], "cl")


class SingleModelWalk(FailoverWalk):

    def test_a_model_that_fails_while_others_succeed_switches_alone(self):
        self.opus_fails_alone()
        self.assertEqual(self.state(), ("ag", 0, 0, 0, 0))
        self.assertEqual(self.state("opus"), ("cl", 1, 0, 0, 30))
        self.assertEqual(self.request((), model="opus"), ["cl"])
        self.assertEqual(self.request((), model="haiku"), ["ag"])

    def test_its_probes_leave_the_other_models_alone(self):
        self.opus_fails_alone()
        for minutes in (30, 60, 120, 240):
            self.pass_minutes(minutes)
            self.assertEqual(self.request(("ag",), model="opus"), ["ag", "cl"])
        self.assertEqual(self.state(), ("ag", 0, 0, 0, 0))
        self.pass_minutes(240)
        self.assertEqual(self.request((), model="opus"), ["ag"])
        self.assertIsNone(self.state("opus"))

    def test_its_failures_from_before_its_switch_are_not_charged_to_the_whole(self):
        early = [self.failover.admit("opus", TARGETS) for _ in range(10)]
        self.opus_fails_alone()
        for ticket in early:
            self.failover.charge(ticket, self.outcome(what="500"))
        self.assertEqual(self.state()[:2], ("ag", 0))

    def test_a_switch_of_the_whole_resets_the_counters_of_its_models(self):
        self.request(("ag",), model="opus")
        self.request(("ag",), model="opus")
        self.request(("ag",), model="haiku")        # the third in a row, of any model
        self.assertEqual(self.state()[0], "cl")
        self.requests(3, "cl", model="sonnet")      # and back
        self.assertEqual(self.state()[0], "ag")
        self.request((), model="haiku")
        self.request(("ag",), model="opus")
        self.assertIsNone(self.state("opus"))

    def test_a_model_alone_stays_alone_while_the_whole_moves_and_returns(self):
        self.opus_fails_alone()
        self.requests(3, "ag", model="haiku")
        self.assertEqual(self.state()[0], "cl")
        self.pass_minutes(10)
        self.requests(3, "cl", model="haiku")
        self.assertEqual(self.state()[0], "ag")
        self.assertEqual(self.state("opus"), ("cl", 1, 0, 0, 20))

    def test_a_model_that_fails_on_the_fallback_switches_to_the_other_target_alone(self):
        self.requests(3, "ag", model="haiku")
        for _ in range(3):
            self.request(("cl",), model="opus")
            self.request((), model="haiku")
        self.assertEqual(self.state("opus")[0], "ag")
        self.pass_minutes(30)
        self.request((), model="haiku")         # the probe of the whole succeeds: opus follows it
        self.assertIsNone(self.state("opus"))

    def test_a_model_alone_does_not_return_to_the_very_target_that_fails_it(self):
        self.opus_fails_alone()
        self.requests(3, "ag", model="haiku")       # the whole follows to cl
        for _ in range(3):
            self.request(("cl",), model="opus")
        self.assertEqual(self.request((), model="opus"), ["ag"])
        self.assertEqual(self.state("opus")[0], "ag")
        self.assertEqual(self.request((), model="haiku"), ["cl"])

    def test_a_clock_set_back_is_noticed_for_a_model_alone_too(self):
        self.opus_fails_alone()
        self.assertEqual(self.state(), ("ag", 0, 0, 0, 0))
        self.assert_over_without_requests("opus")

    def test_at_most_256_models_are_remembered_and_switched_ones_longest(self):
        self.opus_fails_alone()
        for number in range(400):
            self.request(("ag",), model="m%d" % number)
            self.request((), model="haiku")
        self.assertEqual(self.state("opus")[0], "cl")
        self.assertLessEqual(len(self.failover.save()["models"]), 256)

    def test_the_257th_model_that_fails_is_counted_like_any_other(self):
        for number in range(258):
            for _ in range(3):
                self.request(("ag",), model="m%d" % number)
                self.request((), model="haiku")
        self.assertEqual(self.state("m257")[0], "cl")
        self.assertLessEqual(len(self.failover.report(True)["models"]), 256)


class SessionsWalk(FailoverWalk):
    """After a recovery a session stays where its prompt cache is until it pauses."""

    def recover(self, model="haiku"):
        """Let S and T send to cl, and P's probe recover ag for all models; or for opus alone."""
        self.requests(3, "ag", model="haiku", session="P")
        self.pass_minutes(26)
        for session in "STP":
            self.assertEqual(self.request(session=session), ["cl"])
        self.pass_minutes(4)
        self.assertEqual(self.request(model=model, session="P"), ["ag"])

    def test_it_stays_until_it_pauses_and_all_others_return_at_once(self):
        self.recover()
        for session, model, target in (
                ("S", "opus", "cl"), ("S", "haiku", "ag"), ("", "opus", "ag"),
                ("P", "opus", "ag"), ("new", "opus", "ag")):
            self.assertEqual(self.request(model=model, session=session), [target], session)
        self.pass_minutes(2)
        self.assertEqual(self.request(session="T"), ["ag"])     # a pause of six minutes
        self.pass_minutes(2.9)
        self.assertEqual(self.request(session="S"), ["cl"])
        self.pass_minutes(5)
        self.assertEqual(self.requests(2, session="S"), ["ag"])

    def test_it_stays_at_most_an_hour(self):
        self.recover()
        moves = []
        for _ in range(22):
            moves += self.request(session="S")
            self.pass_minutes(3)
        self.assertEqual(moves, ["cl"] * 21 + ["ag"])

    def test_a_failure_ends_the_stay_and_counts_for_no_target(self):
        self.recover()
        self.assertEqual(self.request("cl", session="S"), ["cl", "ag"])
        self.assertEqual(self.request(session="S"), ["ag"])
        ticket = self.failover.admit("opus", TARGETS, "T")
        self.failover.charge(ticket, self.outcome(direct=True))
        self.assertEqual((ticket.target, self.state()), ("cl", ("ag", 1, 0, 0, 0)))
        self.assertEqual(self.request(session="T"), ["ag"])

    def test_it_stays_where_it_was_rescued_before_the_recovery(self):
        self.requests(3, "ag", session="S", retry_after_s=60)
        self.pass_minutes(1)
        self.assertEqual(self.request(session="P"), ["ag"])
        self.assertEqual(self.request(session="S"), ["cl"])
        self.assertEqual(self.request("ag", session="T"), ["ag", "cl"])
        self.assertEqual(self.request(session="T"), ["ag"])

    def test_only_a_recovery_by_probe_lets_it_stay(self):
        self.requests(3, "ag", session="S")
        self.assertEqual(self.request(session="S"), ["cl"])
        self.requests(3, "cl", session="T")                     # back at once
        self.assertEqual(self.request(session="S"), ["ag"])
        self.requests(3, "ag", session="S")
        self.assertEqual(self.request(session="S"), ["cl"])     # and no session stays at a switch

    def test_a_model_that_was_alone_keeps_its_sessions_too(self):
        self.opus_fails_alone()
        self.pass_minutes(29)
        self.assertEqual(self.request(session="S"), ["cl"])
        self.pass_minutes(1)
        self.assertEqual(self.request(session="P"), ["ag"])
        self.assertEqual([self.request(session=session) for session in "SP"], [["cl"], ["ag"]])

    def test_auto_again_and_a_stay_of_0_move_all(self):
        self.recover()
        self.failover.reset(self.auto, "")
        self.assertEqual(self.request(session="S"), ["ag"])
        self.failover.reset(self.auto._replace(stay_s=0), "")
        self.recover()
        self.assertEqual(self.request(session="S"), ["ag"])


class SavedStateTest(FailoverWalk):

    def test_a_restart_keeps_cooldowns_levels_and_models(self):
        self.opus_fails_alone()
        self.requests(3, "ag", model="haiku")
        saved = json.loads(json.dumps(self.failover.save()))
        self.pass_minutes(10)
        revived = rrouter.Failover(self.clock, self.auto)
        revived.restore(saved)
        self.assertEqual(revived.report(True), self.failover.report(True))
        self.failover = revived
        self.pass_minutes(20)
        self.request(("ag",), model="haiku")        # a failed probe: the second cooldown
        self.assertEqual(self.state(), ("cl", 2, 0, 0, 60))

    def test_control_characters_of_a_reason_are_escaped(self):
        self.requests(3, "ag")
        saved = self.failover.save()
        saved["whole"]["reason"] = "\x1b[2J"
        self.failover.restore(saved)
        self.assertEqual(self.failover.report(True)["reason"], "\\x1b[2J")

    HOSTILE = (
        # label,                       member of `whole`,  value
        ("other targets",              "home",             "x"),
        ("negative level",             "level",            -1),
        ("level true",                 "level",            True),
        ("long cooldown",              "last_cooldown_s",  1e9),
        ("a cooldown of 400 digits",   "last_cooldown_s",  10 ** 400),
        ("NaN",                        "retry_at",         float("nan")),
        ("open without a cooldown",    "retry_at",         None),
        ("infinite",                   "switched_at",      float("inf")),
        ("far in the future",          "switched_at",      1e300),
        ("open since never",           "switched_at",      None),
        ("open for no reason",         "reason",           None),
    )

    def test_foreign_content_is_refused_and_changes_nothing(self):
        self.requests(3, "ag")
        good, before = self.failover.save(), self.failover.report(True)
        rows = [(label, dict(good, whole=dict(good["whole"], **{member: value})))
                for label, member, value in self.HOSTILE]
        rows += [("no object", 7), ("empty", {}), ("no models", {"whole": good["whole"]}),
                 ("models a list", dict(good, models=[])),
                 ("swapped", dict(good, whole=dict(good["whole"], home="cl", away="ag"))),
                 ("model of another kind", dict(good, models={"m": 1}))]
        for label, content in rows:
            with self.subTest(label):
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
# What a step does, and how often.  The last three end a response that has committed.
ACTIONS = {"begin": 30, "attempt": 40, "wait": 16, "wait for probe": 8, "restart": 1, "reset": 0.5,
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
        """Return the steps up to the first difference and both states, or None."""
        lines = []
        for action, which, choice, seconds in steps:
            self.take(action, which, choice, seconds)
            real, model = self.shown(self.real, 0), self.shown(self.model, 1)
            lines.append((self.now, action, which, choice, seconds, *real))
            if real != model:
                return "\n".join(map(str, [*lines, ("the model", *model)]))
        return None

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
        elif action == "reset":
            self.real.reset(self.auto, "rrouter auto")
            self.model = ReferenceFailover(self.clock, self.auto)
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
        """The attempt under way commits or fails."""
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
    """Return a config whose rewritten model names the mode and the edition of the file in use."""
    modes = {name: {"mappings": [{"match": "*", "rewrite": "%s-%03d" % (name, number)}]}
             for name in ("one", "two", "spare")}
    return dict({"modes": modes, "defaultMode": "spare", "auto": {"targets": ["one", "two"]}},
                **members)


def put(home, name, content):
    """Replace ~/.rrouter/NAME by rename, as editors do; also a directory is replaced."""
    path = home.dir / name
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    fresh = home.dir / (name + ".new")
    fresh.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str)
                      else content)
    os.replace(str(fresh), str(path))


def altered(path, value):
    """Return a valid config as text with `value` at the JSON path."""
    config = switchboard(1)
    config["auto"].update(failureThreshold=3, timeoutThreshold=2, cooldownMinutes=[30, 60],
                          firstByteTimeoutSeconds=9)
    steps = [int(step) if step.isdigit() else step for step in re.findall(r"[^.\[\]]+", path)]
    place = config
    for step in steps[:-1]:
        place = place[step]
    place[steps[-1]] = value
    return json.dumps(config)


# Contents that ParseConfigTest, which takes text, does not cover.
REFUSED_CONFIGS = (
    # content, what the complaint says (a pattern)
    (b"// modes\n{}", r"config\.json:1:1: "),
    (b"\0" * 64, r"config\.json:1:1: "),
    (b"7", r"expected an object, found 7"),
    (json.dumps(switchboard(1)).encode() * 2, r"config\.json:1:\d+: "),
    (json.dumps(switchboard(1)).encode() + b"\xff", "expected UTF-8, found byte 0xff at offset"),
    (b'{"a":' * 100_000, "nesting that is too deep"),
    (b'{"defaultMode": "one", "x": %s%s}' % (b"[" * 100_000, b"]" * 100_000), "too deep"),
    (b'{"modes": {"m": {"mappings": []}}, "auto": %s1%s}' % (b"[" * 900, b"]" * 900),
     "auto: |too deep"),
    (b'{"modes": {"m": {}}, "auto": {"failureThreshold": %s}}' % (b"9" * 5000), "number"),
)
REFUSED_VALUES = (
    # JSON path, value found there, a pattern for the rest of the complaint
    ("modes.one", "fast", "object"),
    ("modes.one.mappings[0]", "x", "object"),
    ("modes.one.mappings[0]", {"rewrite": "x"}, "match: missing"),
    ("modes.one.mappings[0].match", None, "string.*null"),
    ("modes.one.mappings[0].rewrite", True, "string.*true"),
    ("defaultMode", 3, "found 3"),
    ("auto", [], "object"),
    ("auto.targets", "one", "two"),
    ("auto.targets", ["one", "two", "spare"], "two"),
    ("auto.targets", ["one", 2], "found .*2"),
    ("auto.failureThreshold", -1, "found -1"),
    ("auto.failureThreshold", 10 ** 30, "number"),
    ("auto.failureThreshold", None, "found null"),
    ("auto.timeoutThreshold", 0, "found 0"),
    ("auto.cooldownMinutes", 30, "list"),
    ("auto.cooldownMinutes[1]", "60", "number"),
    ("auto.cooldownMinutes[1]", True, "found true"),
    ("auto.cooldownMinutes[1]", 1e300, "number"),
    ("auto.firstByteTimeoutSeconds", 0, "number"),
    ("auto.firstByteTimeoutSeconds", -150, "number"),
    ("auto.firstByteTimeoutSeconds", True, "found true"),
    ("auto.firstByteTimeoutSeconds", 1e10, "number"),
)


class ConfigContentTest(unittest.TestCase):
    """The content of config.json, in bytes, decides by itself; no file is read."""

    def assert_refused(self, content, *patterns):
        with self.assertRaises((rrouter.ConfigError, UnicodeDecodeError)) as caught:
            rrouter.config_of(content)
        complaint = rrouter.describe_config_error(caught.exception)
        for pattern in (r"\Aconfig\.json:[^\0-\x1f]+\Z", *patterns):
            self.assertRegex(complaint, pattern)

    def test_content_that_is_not_one_json_object_is_refused_with_its_place(self):
        for content, pattern in REFUSED_CONFIGS:
            with self.subTest(content[:40]):
                self.assert_refused(content, pattern)

    def test_value_that_does_not_fit_is_refused_with_its_path(self):
        for path, value, pattern in REFUSED_VALUES:
            with self.subTest(path, value=value):
                self.assert_refused(altered(path, value).encode(), re.escape(path), pattern)

    def test_byte_order_mark_is_skipped(self):
        content = json.dumps(switchboard(6)).encode()
        self.assertEqual(rrouter.config_of(b"\xef\xbb\xbf" + content), rrouter.config_of(content))


class ReadFileTest(unittest.TestCase):

    def test_directory_in_the_place_of_a_file_leaves_no_descriptor_open(self):
        with tempfile.TemporaryDirectory() as directory:
            before = os.listdir("/dev/fd")
            for _ in range(20):
                with self.assertRaises(OSError):
                    rrouter.read_file(directory)
            self.assertEqual(len(os.listdir("/dev/fd")), len(before))


class SwitchboardTest(RouterTest):
    """Base of the tests of the two files: modes one, two and spare (the default), edition 0."""

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

    def mark_log(self):
        """Return where the log goes on after a line of this very moment."""
        mark = "/mark/%d" % random.getrandbits(64)
        self.get(mark)
        return wait_until(lambda: self.rrouter.log().partition(mark)[2] and len(self.rrouter.log()))

    def wait_for_lines(self, before, tag, *words):
        """Return the log's lines with this tag after `before`; wait for one with all of `words`."""
        def lines():
            return [line for line in self.rrouter.log()[before:].splitlines() if tag in line]
        wait_until(
            lambda: any(all(word in line for word in words) for line in lines()))
        return lines()


class WaysToWrite:
    """The ways in which programs write a file; `settle` waits until the file is not new."""

    def __init__(self, home, settle):
        self.root, self.mode, self.settle = home.root, home.dir / "mode", settle

    def in_place(self, text, file=None):
        with open(str(file or self.mode), "r+b") as opened:
            opened.write(text.encode())

    def with_its_old_times(self, text):
        """As `cp -p`, `rsync -t` and `touch -r` write."""
        before = self.mode.stat()
        self.in_place(text)
        os.utime(str(self.mode), ns=(before.st_atime_ns, before.st_mtime_ns))

    def by_older_file(self, text, file):
        aside = file.with_suffix(".aside")
        aside.write_text(text)
        os.utime(str(aside), (1, 1))
        aside.rename(str(file))

    def by_second_name(self, text):
        os.link(str(self.mode), str(self.root / "second"))
        self.settle()
        self.in_place(text, self.root / "second")

    def by_kept_descriptor(self, text):
        with open(str(self.mode), "r+b", buffering=0) as opened:
            self.settle()
            os.pwrite(opened.fileno(), text.encode(), 0)

    def by_map(self, text):
        with open(str(self.mode), "r+b") as opened, mmap.mmap(opened.fileno(), 4) as memory:
            self.settle()
            memory[:] = text.encode()
            memory.flush()

    def by_link(self, text):
        (self.root / text.strip()).write_text(text)
        (self.root / "link").symlink_to(self.root / text.strip())
        os.replace(str(self.root / "link"), str(self.mode))

    def by_other_directory(self, directory, text):
        """Put a copy with another mode in its place; rrouter may make the directory meanwhile."""
        copied, old = str(directory) + ".copy", str(directory) + ".old"
        shutil.copytree(str(directory), copied, ignore=shutil.ignore_patterns("*.tmp"))
        pathlib.Path(copied, self.mode.relative_to(directory)).write_text(text)
        os.rename(str(directory), old)

        def is_in_place():
            shutil.rmtree(str(directory), ignore_errors=True)
            with contextlib.suppress(OSError):
                os.rename(copied, str(directory))
                return True
        wait_until(is_in_place)
        shutil.rmtree(old, ignore_errors=True)


class FreshnessTest(SwitchboardTest):
    """A request that begins after a write has returned is served by what was written."""

    def ask(self, connection, reader):
        """Post on a connection kept open; return the model that was sent on."""
        connection.sendall(request_bytes(body=b'{"model":"m"}', port=self.rrouter.port))
        reply = read_reply_from(reader)
        self.assertEqual(reply.status, 200)
        return reply.header("x-rrouter-model")

    def test_each_of_many_writes_serves_the_next_request(self):
        mode, number = "one", 0
        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            for turn in range(80):
                write = functools.partial(Home.write if turn % 4 < 2 else put, self.home)
                if turn % 2:
                    number += 1
                    write("config.json", json.dumps(switchboard(number)))
                else:
                    mode = {"one": "two", "two": "one"}[mode]
                    write("mode", mode + "\n")
                expected = "%s-%03d" % (mode, number)
                self.assertEqual(self.ask(connection, reader), expected, "turn %d" % turn)
        self.assertEqual(self.served(), expected)

    # A file system whose time stamps are whole seconds.
    COARSE = ("import os, types\nreal = os.stat\ndef stat(path, **options):\n"
              "    found = real(path, **options)\n"
              "    values = {n: getattr(found, n) for n in dir(found) if n.startswith('st_')}\n"
              "    for name in ('st_mtime_ns', 'st_ctime_ns'):\n"
              "        values[name] -= values[name] % 10 ** 9\n"
              "    return types.SimpleNamespace(**values)\nos.stat = stat")

    def test_each_write_is_noticed_though_time_stamps_are_whole_seconds(self):
        """Newer kernels change the time stamp at each write, so that nothing else shows this."""
        router = self.start_rrouter(self.upstream, "one", switchboard(0), code=self.COARSE)
        with router.connect() as connection, connection.makefile("rb") as reader:
            for turn in range(30):
                mode = ("two", "one")[turn % 2]
                router.home.write("mode", mode + "\n")
                self.assertEqual(self.ask(connection, reader), mode + "-000")

    def test_removed_files_mean_the_defaults(self):
        (self.home.dir / "mode").unlink()
        self.assertEqual(self.served(), "spare-000")
        self.home.write("mode", "two\n")
        (self.home.dir / "config.json").unlink()
        self.assertEqual(self.served(), SONNET)
        self.assertEqual(self.rrouter.health()["mode"], "claude")
        self.home.write("mode", "antigravity\n")
        self.assertEqual(self.served(), GEMINI_SONNET)

    def test_config_reset_is_in_force_when_it_returns(self):
        self.home.write("mode", "antigravity\n")
        self.home.run("config", "reset", check=0)
        self.assertEqual(self.served(), GEMINI_SONNET)

    def settle(self):
        """Return once what was written is so old that requests no longer read it each time."""
        time.sleep(rrouter.SETTLED_S)
        self.served()

    def test_every_way_to_write_is_noticed(self):
        write = WaysToWrite(self.home, self.settle)
        mode, config = self.home.dir / "mode", self.home.dir / "config.json"
        aside, target = self.home.dir / "aside", self.home.root / "two"
        for label, act, served in (
                ("in place", lambda: write.in_place("two\n"), "two-000"),
                ("its times set back", lambda: write.with_its_old_times("one\n"), "one-000"),
                ("moved over", lambda: put(self.home, "mode", "two\n"), "two-000"),
                ("moved away", lambda: mode.rename(str(aside)), "spare-000"),
                ("moved back", lambda: aside.rename(str(mode)), "two-000"),
                ("by a second name", lambda: write.by_second_name("one\n"), "one-000"),
                ("by a descriptor kept open", lambda: write.by_kept_descriptor("two\n"), "two-000"),
                ("by a map of the file", lambda: write.by_map("one\n"), "one-000"),
                ("an older config",
                 lambda: write.by_older_file(json.dumps(switchboard(1)), config), "one-001"),
                ("a link", lambda: write.by_link("two\n"), "two-001"),
                ("the file of the link", lambda: target.write_text("one\n"), "one-001"),
                ("another link", lambda: write.by_link("two\n"), "two-001"),
                ("another directory",
                 lambda: write.by_other_directory(self.home.dir, "one\n"), "one-001"),
                ("another home",
                 lambda: write.by_other_directory(self.home.root, "two\n"), "two-001"),
                ("in that home", lambda: mode.write_text("one\n"), "one-001")):
            with self.subTest(label):
                self.settle()
                act()
                self.assertEqual(self.served(), served)

    def test_write_is_noticed_while_other_requests_read_it(self):
        """The request that finds a change must not let the next one pass before it has read it."""
        done = threading.Event()

        def ask_on():
            with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
                while not done.is_set():
                    self.ask(connection, reader)

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(ask_on) for _ in range(4)]
            try:
                with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
                    for turn in range(100):
                        mode = ("two", "one")[turn % 2]
                        put(self.home, "mode", mode + "\n")
                        self.assertEqual(self.ask(connection, reader), mode + "-000")
            finally:
                done.set()
            for one in asking:
                one.result()

    def test_no_request_acts_on_a_half_written_file(self):
        """A file that is written in place can be empty or half written when a request reads it."""
        done = threading.Event()

        def ask():
            while not done.is_set():
                self.assertEqual(self.rrouter.post().status, 200)

        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            asking = [pool.submit(ask) for _ in range(3)]
            try:
                for number in range(240):
                    content = json.dumps(switchboard(number))
                    bad = (content[:-5], content.replace('"*"', "7"), content)[number % 3]
                    write = put if number % 2 else Home.write
                    write(self.home, "config.json", bad)
                    write(self.home, "mode", ("one\n", "two\n")[number % 4 // 2])
            finally:
                done.set()
            for one in asking:
                one.result()
        models = set(self.upstream.models())
        good = {"%s-%03d" % (mode, number)
                for mode in ("one", "two") for number in (0, *range(2, 240, 3))}
        self.assertLessEqual(models, good)
        self.assertGreater(len(models), 3)
        put(self.home, "config.json", json.dumps(switchboard(999)))
        self.assertEqual((self.served()[-3:], self.problems()), ("999", ""))


MODE_FILES = (
    # content, mode in force, the word that `problems` names (None: no problem)
    (b"two\n", "two", None),
    (b"two", "two", None),
    (b"  TWO \r\n\n", "two", None),
    (b"\tAuto", "auto", None),
    (b"", "one", None),
    (b" \n", "one", None),
    (b"tow\n", "spare", "tow"),
    (b"one two\n", "spare", "one two"),
    (b"one\ntwo\n", "spare", "one"),
    (b"one\x80\n", "spare", "one"),
    (b"\x1b[31mred\n", "spare", "red"),
    (b"long" * 30_000, "spare", "longlong"),
)
CONFIG_FILES = (
    # content, mode, the model sent on, a pattern for `problems`
    ("{", "one", "one-000", r"config\.json:1:2: "),
    (b"\xff", "one", "one-000", r"config\.json: .*UTF-8"),
    (altered("auto.failureThreshold", 0), "one", "one-000", r"auto\.failureThreshold: expected"),
    (altered("auto.colour", "red"), "one", "one-001", r"config\.json: auto\.colour: unknown"),
    (altered("auto.targets", ["one", "gone"]), "auto", "spare-001", r"auto\.targets.*gone"),
    (altered("defaultMode", "auto"), "nosuch", "one-001", r"nosuch"),
)


class ModeAndConfigTest(SwitchboardTest):
    """The content of the two files while rrouter runs."""

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
        before = self.mark_log()
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
        self.wait_for_lines(before, "[MODE]", "two")
        lines = self.wait_for_lines(before, "[CONFIG]")
        for _, _, _, pattern in CONFIG_FILES[:-1]:
            self.assertEqual(len([line for line in lines if re.search(pattern, line)]), 1, lines)

    def test_extreme_settings_of_auto_do_no_harm(self):
        """The numbers accepted must fit into a socket's timeout and a date when they are used."""
        for threshold, minutes in ((1, 525600), (1, 0.0001), (1000, 525600)):
            with self.subTest(threshold=threshold, minutes=minutes):
                put(self.home, "config.json", json.dumps(switchboard(5, auto={
                    "targets": ["one", "two"], "failureThreshold": threshold,
                    "cooldownMinutes": [minutes], "firstByteTimeoutSeconds": 86400})))
                put(self.home, "mode", "auto\n")
                self.upstream.play(error(503))
                self.assertEqual((self.served(), self.problems()), ("two-005", ""))
                self.assertEqual(self.rrouter.health()["autoSwitch"]["switched"], threshold == 1)

    def test_mode_that_the_config_comes_to_define_is_in_force_at_once(self):
        put(self.home, "mode", "late\n")
        self.assertEqual(self.served(), "spare-000")
        self.assertIn("late", self.problems())
        config = switchboard(0)
        config["modes"]["late"] = {"mappings": [{"match": "*", "rewrite": "better"}]}
        put(self.home, "config.json", json.dumps(config))
        self.assertEqual((self.served(), self.problems()), ("better", ""))

    def test_change_is_logged_once_with_and_without_requests(self):
        before = self.mark_log()
        put(self.home, "mode", "two\n")
        for _ in range(5):
            self.served()
        put(self.home, "config.json", json.dumps(switchboard(4)))
        self.wait_for_lines(before, "[CONFIG]")
        self.assertEqual(len(self.wait_for_lines(before, "[MODE]", "two")), 1)
        put(self.home, "mode", "spare\n")
        self.wait_for_lines(before, "[MODE]", "spare")

    def test_directory_or_fifo_in_the_place_of_a_file_is_named_and_hangs_nothing(self):
        for name, good in (("mode", "one\n"), ("config.json", json.dumps(switchboard(0)))):
            for make in (os.mkdir, os.mkfifo):
                with self.subTest(name, made_by=make.__name__):
                    odd = self.home.root / ("%s %s" % (name, make.__name__))
                    make(str(odd))
                    (self.home.dir / "link").symlink_to(odd)
                    os.replace(str(self.home.dir / "link"), str(self.home.dir / name))
                    self.assertEqual(self.served(), "one-000")
                    self.assertRegex(self.problems(), r"^%s: " % re.escape(name))
                    put(self.home, name, good)
                    self.assertEqual((self.served(), self.problems()), ("one-000", ""))

    def test_stream_keeps_the_mode_it_began_with(self):
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
        self.wait_for_lines(0, "[REQ]", " m -> one one-000 200 ")

    def test_bad_config_at_the_start_means_the_embedded_default(self):
        router = self.start_rrouter(self.upstream, config="{")
        router.post()
        self.assertEqual(self.upstream.models(), [GEMINI_SONNET])
        self.assertRegex(" ".join(router.health()["problems"]), r"config\.json:1:2: ")
        wait_until(lambda: "config.json:1:2: " in router.log())


# Upstream #####################################################################

class UpstreamTest(LoopbackTest):
    """Addresses of upstreams; each has a separate rrouter."""

    def test_base_path_and_host_of_the_upstream_are_used(self):
        upstream = self.start_upstream()
        url = "http://localhost:%d/Api/v%%31" % upstream.port
        proxies = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
        running = self.start_rrouter(url + "/", env=proxies)
        for target in ("/v1/messages?beta=true", "/", "//x/../y"):
            with self.subTest(target):
                self.assertEqual(running.request("POST", target, chat()).status, 200)
                received = upstream.received[-1]
                self.assertEqual((received.target, received.header("host")),
                                 ("/Api/v%31" + target, "localhost:%d" % upstream.port))
        self.assertEqual(running.health()["upstreamURL"].rstrip("/"), url)

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

    def test_upstream_that_is_rrouter_itself_makes_no_storm(self):
        port = free_port()
        home = self.make_home("http://localhost:%d" % port, "antigravity", port=port)
        running = self.start_rrouter(None, home=home)
        self.assert_error(running.request("GET", "/v1/models"), 502, "is rrouter itself")
        self.assertLessEqual(running.health()["requestCount"], 2)

    def test_library_removed_under_it_hinders_no_name(self):
        code = """if True:
            import encodings
            "a".encode("idna")
            encodings.__path__ = []"""
        running = self.start_rrouter(self.start_upstream(), code=code)
        self.assertEqual(running.post("\ud55c").status, 200)

    def test_python_without_ctypes_serves_requests(self):
        """ctypes saves memory; some builds of Python lack it."""
        running = self.start_rrouter(self.start_upstream(), code="sys.modules['ctypes'] = None")
        self.assertEqual(running.post().status, 200)


class PoolTest(RouterTest):
    """Connections to the upstream stay open for further requests."""

    def fresh(self, response):
        """Let the upstream answer the first request of each connection so, and drop the others."""
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

    def test_stale_connection_is_invisible(self):
        """An upstream may close an idle connection at any time, even as the next request comes."""
        for when in ("at reuse", "after the response"):
            for tries, padding in ((100, 0), (10, 1_000_000)):
                with self.subTest(when, padding=padding):
                    self.upstream.clear()
                    self.upstream.default = Response(framing="length", cut=True)
                    if when == "at reuse":
                        self.fresh(Response())
                    for _ in range(tries):
                        reply = self.rrouter.post(padding="x" * padding)
                        self.assertEqual(
                            (reply.status, reply.body, reply.header("x-rrouter-attempts")),
                            (200, b"{}", "1"))
                    self.assertLessEqual(len(self.upstream.received), 2 * tries)
                    self.assertEqual(set(self.upstream.models()), {GEMINI_SONNET})

    def test_stale_connection_is_neutral(self):
        self.rrouter.home.write("mode", "auto\n")
        self.fresh(stream())
        for _ in range(20):
            reply = self.rrouter.post()
            self.assertEqual((reply.status, reply.complete, reply.header("x-rrouter-attempts")),
                             (200, True, "1"))
        auto = self.rrouter.health()["autoSwitch"]
        self.assertEqual((auto["failureCount"], auto["timeoutCount"], auto["switchCount"]),
                         (0, 0, 0))
        self.assertGreater(len(self.upstream.received), 20)
        self.assertLessEqual(len(self.upstream.received), 40)

    def test_broken_idle_connection_is_replaced(self):
        for turn in range(20):
            self.assertEqual(self.rrouter.post().status, 200)
            self.upstream.break_connections(reset=turn % 2 == 1)
        self.assertEqual(len(self.upstream.received), 20)

    def test_connection_kept_while_the_machine_slept_is_not_used(self):
        """Only the wall clock goes on during sleep."""
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
        real = rrouter.is_loopback
        self.addCleanup(setattr, rrouter, "is_loopback", real)
        for is_loopback, expected in ((real, 0), (lambda _: False, 120_000)):
            rrouter.is_loopback = is_loopback
            connection = rrouter.Upstream(self.start_upstream().url, lambda _: False).connect()
            with contextlib.closing(connection):
                self.assertEqual(connection.sock.getsockopt(
                    socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT), expected)

    def test_unfinished_response_ends_its_connection(self):
        self.upstream.play(stream(gate=self.gate()))
        with self.opened() as response:
            self.assertTrue(receive(response, 9))
        self.assertEqual(self.rrouter.post().body, b"{}")
        first, second = self.upstream.received
        self.assertNotEqual(first.connection, second.connection)

    def test_unrequested_bytes_reach_no_client(self):
        stray = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray"
        mine = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nmine"
        self.upstream.play(Response(raw=mine + stray, stays=True), Response(200, b"next"))
        self.assertEqual([self.rrouter.post().body for _ in range(2)], [b"mine", b"next"])
        for connection in list(self.upstream.open):         # now on the idle connections
            with contextlib.suppress(OSError):
                connection.sendall(stray)
        self.assertEqual([self.rrouter.post().body for _ in range(3)], [b"{}"] * 3)
        first, second, *_ = self.upstream.received
        self.assertNotEqual(first.connection, second.connection)


class KernelLimitTest(LoopbackTest):
    """The time limits on 32-bit systems, whose `long` has 4 bytes, simulated."""

    CODE = """if True:
        import errno, os, socket, struct
        real = struct.pack
        struct.pack = lambda layout, *values: real(layout.replace("ll", "ii"), *values)
        class Socket(socket.socket):
            def setsockopt(self, level, option, value, *more):
                if option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                    if len(value) == 8 and %(wide)r:
                        raise OSError(errno.EINVAL, "Invalid argument")
                    if len(value) == 16 and not %(wide)r:
                        os._exit(9)                     # it would be misread
                    if len(value) == 8:
                        value = real("qq", *struct.unpack("ii", value))
                super().setsockopt(level, option, value, *more)
        socket.socket = Socket
    """

    def test_both_widths_of_time_are_served(self):
        for wide in (False, True):
            with self.subTest(wide=wide):
                router = self.start_rrouter(self.start_upstream(), code=self.CODE % {"wide": wide})
                self.assertEqual(router.post().status, 200)


class UnreadRequestTest(RouterTest):
    """Upstreams that respond, or pause, before they have read the request's body."""

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
                    # The next request must not become the rest of that body.
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
class UpstreamPortTest(unittest.TestCase):

    def test_an_upstream_without_a_port_has_the_one_of_its_scheme(self):
        connected = []

        def connect(address, *_):
            connected.append(address)
            raise ConnectionRefusedError

        self.addCleanup(setattr, socket, "create_connection", socket.create_connection)
        socket.create_connection = connect
        for url in ("http://[::1]", "https://localhost/base", "http://localhost:8317"):
            with self.assertRaises(rrouter.UpstreamUnreachable):
                rrouter.Upstream(url, lambda _: False).open()
        self.assertEqual(connected, [("::1", 80), ("localhost", 443), ("localhost", 8317)])


class ResentRequestTest(RouterTest):

    def test_request_is_not_sent_again_after_an_interim_response(self):
        self.upstream.play(Response(), Response(raw=b"HTTP/1.1 102 Processing\r\n\r\n"))
        self.assertEqual([self.rrouter.post().status for _ in range(2)], [200, 502])
        self.assertEqual(len(self.upstream.received), 2)


class AbsentUpstreamTest(LoopbackTest):

    def test_parallel_requests_that_miss_the_upstream_count_as_one(self):
        running = self.start_rrouter("http://127.0.0.1:%d" % free_port(),
                                     limits={"RECONNECT_FOR_S": 0.5})
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            replies = list(pool.map(lambda _: running.post(), range(2)))
        for reply in (*replies, running.post()):
            self.assert_error(reply, 502, "start CLIProxyAPI")
        self.assertEqual([reply.header("x-should-retry") for reply in replies], [None, None])
        self.assertEqual(reply.header("x-should-retry"), "false")


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

    def test_stale_connection_is_invisible(self):
        self.upstream.default = Response(framing="length", cut=True)
        for _ in range(20):
            self.assertEqual(self.rrouter.post().status, 200)

    def test_large_bodies_pass_both_ways(self):
        """On a new connection, and on a reused one, whose time limit was changed in between."""
        body = chat("x", padding="x" * (16 << 20))
        self.upstream.break_connections()
        for number in range(2):
            self.upstream.play(Response(200, [bytes(100_000)] * 30, framing="length"))
            reply = self.rrouter.request("POST", "/v1/messages", body)
            self.assertEqual(reply.body, bytes(3_000_000))
            self.assertTrue(self.upstream.received[number].body == body)    # no diff of 16 MB

    def test_rest_of_a_handshake_is_not_taken_for_an_early_response(self):
        body = chat("x", padding="x" * (16 << 20))
        gate = self.gate()
        self.upstream.break_connections()
        self.upstream.play(Response(unread=gate))
        threading.Timer(0.3, gate.set).start()      # six looks for a response
        self.assertEqual(self.rrouter.request("POST", "/v1/messages", body).status, 200)
        self.assertTrue(self.upstream.received[0].body == body)             # no diff of 16 MB

    def test_certificate_of_an_unknown_issuer_is_a_bad_gateway(self):
        distrustful = self.start_rrouter(self.upstream)
        reply = distrustful.request("GET", "/v1/models")
        self.assert_error(reply, 502, self.upstream.url)
        self.assertEqual(self.upstream.received, [])


# Requests: framing ############################################################

HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"
BODY_MAX_BYTES = 64 << 20


def post_with(lines, body=b"abc"):
    """Return a POST with these header lines and `body`, then a request that must stay unseen."""
    return (b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\n" + lines + b"\r\n\r\n" + body +
            HIDDEN)


def chunked(body):
    return post_with(b"Transfer-Encoding: chunked", body)


BAD_LINES = (
    # request line
    b"GET /a b HTTP/1.1", b"GET\t/ HTTP/1.1", b"GET  / HTTP/1.1", b"GET / HTTP/1.1 ",
    b" GET / HTTP/1.1", b"GET /\0 HTTP/1.1", b"GET /\x7f HTTP/1.1", b"GET /\xc3\xa9 HTTP/1.1",
    b"G(T / HTTP/1.1", b"GET HTTP/1.1", b"GET", b"GET hidden HTTP/1.1", b"GET / http/1.1",
    b"GET / HTTP/1.01", b"GET / HTTP/x.y", b"GET / HTTP/2.0", b"PRI * HTTP/2.0", b"GET /",
)
BAD_FIELDS = (
    # header line, ahead of "Content-Length: 3"
    b"Content-Length : 3", b"oops", b": x", b"X[]: y", b"X-\xe9: y", b"X: one\rContent-Length: 3",
    b"X: a\0b", b"X: a\x0bb", b"X: a\x0cb", b"Host: localhost",
)
BAD_LENGTHS = (
    # Content-Length
    b"3, 3", b"+3", b"-1", b"0x3", b"0_3", b"3 0", b"3.0", b"", b"three", b"\xb3", b"9" * 5000,
    b"3\r\nContent-Length: 0", b"3\r\ncontent-length: 3",
)
BAD_CODINGS = (
    # Transfer-Encoding
    b"chunked, chunked", b",chunked", b"identity", b"xchunked", b"gzip, chunked", b"\x0bchunked",
    b"chunked, identity", b"chunked\r\nTransfer-Encoding: chunked", b"",
    b"chunked\r\nContent-Length: 3", b"\r\nContent-Length: 3\r\nTransfer-Encoding: chunked",
)
BAD_CHUNKS = (
    # chunked body
    b"3\r\nabcd\r\n0\r\n\r\n", b"3\r\nabc0\r\n\r\n", b"3\r\nabc\n0\r\n\r\n",
    b"3\r\nabc\r\n0\r\nX: " + b"x" * 9000 + b"\r\n\r\n",
    *(size + b"\r\nabc\r\n0\r\n\r\n" for size in (
        b"0x3", b"+3", b"-1", b" 3", b"zz", b"", b"0_3", b"3\n", b"1" + b"0" * 16,
        b"3;" + b"x" * 65536, b"3;" + b"x" * 300)),
)


class RequestFramingTest(RouterTest):
    """A request that RFC 9112 forbids is refused and closed on, and the upstream gets nothing."""

    def refuse_each(self, requests, *statuses):
        for data in requests:
            with self.subTest(data[:80]):
                self.assert_refused(data, *statuses)
        self.assertEqual(self.get("/after").status, 200)
        self.assertEqual([received.target for received in self.upstream.received], ["/after"])

    def test_malformed_request_lines_are_refused(self):
        self.refuse_each([line + b"\r\nHost: localhost\r\n\r\n" + HIDDEN for line in BAD_LINES],
                         400, 505)

    def test_malformed_headers_are_refused(self):
        self.refuse_each([
            b"GET / HTTP/1.1\r\n\r\n" + HIDDEN,
            *(post_with(line + b"\r\nContent-Length: 3") for line in BAD_FIELDS),
            *(post_with(b"Content-Length: " + value) for value in BAD_LENGTHS)], 400)

    def test_ambiguous_transfer_codings_are_refused(self):
        last = b"0\r\n\r\n"
        self.refuse_each([
            chunked(last).replace(b"HTTP/1.1", b"HTTP/1.0", 1),
            *(post_with(b"Transfer-Encoding: " + value, last) for value in BAD_CODINGS)], 400, 501)

    def test_coding_after_chunked_is_malformed_not_unknown(self):
        for value in (b"chunked, gzip", b"chunked\r\nTransfer-Encoding: gzip"):
            self.assert_refused(post_with(b"Transfer-Encoding: " + value), 400)

    def test_empty_expectation_is_none(self):
        data = b"POST / HTTP/1.1\r\nHost: localhost\r\nExpect: \r\nContent-Length: 1\r\n\r\n"
        self.assertEqual(self.converse(data + b"x", "POST")[0].status, 200)

    def test_chunk_over_the_limit_is_refused_when_its_size_is_read(self):
        with self.rrouter.connect() as connection:
            connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked"
                               b"\r\n\r\n1\r\nx\r\n%x\r\n" % BODY_MAX_BYTES)
            self.assert_own_error(read_reply(connection), 413)

    def test_malformed_chunks_are_refused(self):
        self.refuse_each(map(chunked, BAD_CHUNKS), 400, 413, 431)

    def test_body_of_a_refused_request_is_never_parsed(self):
        length = b"Content-Length: %d" % len(HIDDEN)
        for status, data in (
                (403, post_with(length, HIDDEN).replace(b"localhost", b"evil.com", 1)),
                (403, post_with(length + b"\r\nOrigin: https://evil.com", HIDDEN)),
                (413, post_with(b"Content-Length: %d" % (BODY_MAX_BYTES + 1), HIDDEN)),
                (417, post_with(length + b"\r\nExpect: foo", HIDDEN))):
            self.upstream.clear()
            self.refuse_each([data], status)

    def test_limits_of_a_head_are_exact(self):
        start = b"GET /x HTTP/1.1\r\nHost: localhost\r\n"
        room = rrouter.HEAD_MAX_BYTES - len(start + b"X: \r\n\r\n")
        for largest, more in ((b"X: y\r\n" * (rrouter.FIELDS_MAX - 1), b"X: y\r\n"),
                              (b"X: " + b"y" * room + b"\r\n", b"X: y\r\n")):
            with self.subTest(largest[:9]):
                self.upstream.clear()
                self.assertEqual(self.converse(start + largest + b"\r\n", "GET")[0].status, 200)
                self.assertIn(largest, self.upstream.received.pop().head)
                self.assert_refused(start + more + largest + b"\r\n", 431)
                self.assert_refused(start + largest[:-2] + b"y\r\n" + largest[-6:] + b"\r\n", 431)

    def test_too_much_is_refused_at_once(self):
        over = BODY_MAX_BYTES + 1
        for statuses, data in (
                ((414, 431), b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"),
                ((431,), post_with(b"X: " + b"a" * 70000)),
                ((413,), post_with(b"Content-Length: %d" % over)),
                ((413,), post_with(b"Content-Length: " + b"9" * 15)),
                ((413,), chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (over, bytes(over))))):
            self.upstream.clear()
            self.refuse_each([data], *statuses)

    def test_folded_lines_and_bare_line_ends_never_travel_further(self):
        for lines in (b"X: one\r\n two", b"X: one\r\n\ttwo", b"X: one\nY: two",
                      b"X: one\r\n Host: evil.com"):
            with self.subTest(lines):
                self.assert_refused(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + lines + b"\r\n\r\n",
                                    400)

    def test_garbage_is_closed_on_and_harms_nothing(self):
        rng = random.Random(8316)
        noise = rng.getrandbits(80000).to_bytes(10000, "big")
        for data in (b"GET /\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
                     b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + noise[:500],     # TLS
                     b"GET / HTTP/1.0\nHost: localhost\n\n", b"", b"\r\n" * 9, noise,
                     b"\r\n".join(noise[start:start + 20] for start in range(0, 4000, 20))):
            with self.subTest(data[:30]):
                reply = self.rrouter.exchange(data, half_close=True)
                self.assertRegex(reply, rb"^(HTTP/1\.[01] [245]\d\d |$)")
        self.assertEqual(self.get().status, 200)

    def test_truncated_body_never_reaches_the_upstream(self):
        for data in (b"Content-Length: 6\r\n\r\nabc",
                     b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
                     b"Transfer-Encoding: chunked\r\n\r\n9\r\nabc"):
            with self.subTest(data):
                reply = self.rrouter.exchange(
                    b"POST / HTTP/1.1\r\nHost: localhost\r\n" + data, half_close=True)
                self.assertRegex(reply, rb"^(HTTP/1\.1 400 |$)")
                self.assertEqual(self.upstream.received, [])

    def test_chunked_body_is_forwarded_with_its_length(self):
        body = chat(text="\ud55c" * 9)
        chunks = b"".join(b'%X;ext="a b"\r\n%b\r\n' % (len(body[at:at + 11]), body[at:at + 11])
                          for at in range(0, len(body), 11))
        for trailers in (b"", b"X-T: 1\r\nContent-Length: 3\r\nHost: evil.com\r\n"):
            with self.subTest(trailers), self.rrouter.connect() as connection:
                data = (b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\n"
                        b"Transfer-Encoding: Chunked\r\n\r\n" + chunks + b"000\r\n" + trailers +
                        b"\r\n")
                for at in range(len(data)):
                    connection.sendall(data[at:at + 1])
                self.assertEqual(read_reply(connection).status, 200)
                received = self.upstream.received[-1]
                self.assertEqual((received.model, received.json()["text"]),
                                 (GEMINI_SONNET, "\ud55c" * 9))
                self.assertEqual(received.header("content-length"), str(len(received.body)))
                self.assertIsNone(received.header("transfer-encoding"))

    def test_chunk_that_comes_in_many_parts_is_forwarded_whole(self):
        body = random.Random(8316).getrandbits(8 << 20).to_bytes(1 << 20, "big")
        data = chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        self.assertEqual(self.converse(data, "POST", "GET")[0].status, 200)
        self.assertTrue(self.upstream.received[0].body == body)             # no diff of 1 MB

    def test_length_is_sent_exactly_where_there_is_a_body(self):
        for method, framing, length in (
                (b"GET", b"\r\n", []), (b"DELETE", b"\r\n", []), (b"HEAD", b"\r\n", []),
                (b"POST", b"Content-Length: 0\r\n\r\n", [0]),
                (b"POST", b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [0]),
                (b"GET", b"Content-Length: 3\r\n\r\nabc", [3]),
                (b"PUT", b"Content-Length: 003\r\n\r\nabc", [3])):
            with self.subTest(method + b" " + framing):
                reply, = self.converse(method + b" / HTTP/1.1\r\nHost: localhost\r\n" + framing,
                                       method.decode())
                self.assertEqual(reply.status, 200)
                fields = self.upstream.received[-1].fields
                self.assertEqual(length, [int(value) for name, value in fields
                                          if name.lower() == "content-length"])
                self.assertIsNone(value_of(fields, "transfer-encoding"))

    def test_truncated_http10_response_ends_in_a_reset(self):
        """Without chunks and length only a reset distinguishes a break from the end."""
        self.upstream.play(stream(event("message_start"), cut=True))
        with self.rrouter.connect() as connection:
            connection.sendall(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
            with self.assertRaises(ConnectionError):
                while connection.recv(65536):
                    pass

    def test_http10_response_is_not_chunked_and_ends_with_the_connection(self):
        for framing in ("chunked", "length", "close"):
            with self.subTest(framing):
                self.upstream.play(Response(200, (b"012", b"345"), framing=framing))
                data = self.rrouter.exchange(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
                head, _, body = data.partition(b"\r\n\r\n")
                self.assertRegex(head, rb"^HTTP/1\.[01] 200 OK\r\n")
                self.assertNotIn(b"transfer-encoding", head.lower())
                self.assertEqual(body, b"012345")


# Requests: connections ########################################################

class RequestSequenceTest(RouterTest):
    """Several requests on one connection, and bodies that wait for 100 (Continue)."""

    EXPECTING = (b"POST /v1/messages HTTP/1.1\r\nHost: %b\r\nExpect: 100-Continue\r\n"
                 b"Content-Length: %d\r\n\r\n")

    def test_pipelined_requests_are_answered_in_order(self):
        gate = self.gate()
        self.upstream.default = lambda received: Response(
            200, received.target.encode() + received.body,
            before=gate if received.target == "/slow" else None)
        first, second = request_bytes("GET", "/1"), request_bytes("GET", "/2")
        in_chunks = request_bytes("POST", "/chunked", None, [("Transfer-Encoding", "chunked")])
        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            connection.sendall(b"\r\n".join((
                b"", request_bytes("GET", "/slow") + first + second +
                request_bytes("POST", "/post", HIDDEN) + in_chunks + b"3\r\nabc\r\n0\r\n\r\n" +
                first, second)))
            self.upstream.wait(lambda upstream: upstream.received)
            gate.set()
            self.assertEqual([read_reply_from(reader).body for _ in range(7)], [
                b"/slow", b"/1", b"/2", b"/post" + HIDDEN, b"/chunkedabc", b"/1", b"/2"])

    def test_connection_stays_open_after_errors_of_the_upstream(self):
        self.upstream.play(error(404), error(529), Response(401, framing="length"), Response())
        replies = self.converse(request_bytes("POST", body=chat()) * 4, *["POST"] * 4)
        self.assertEqual([reply.status for reply in replies], [404, 529, 401, 200])

    def test_continue_is_sent_once_and_before_the_body(self):
        body = chat()
        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            connection.sendall(self.EXPECTING % (b"localhost", len(body)))
            self.assertEqual(read_head(reader)[0], 100)
            connection.sendall(body)
            reply = read_reply_from(reader)
        self.assertEqual((reply.status, reply.interim), (200, []))
        self.assertEqual(self.upstream.models(), [GEMINI_SONNET])

    def test_only_a_body_that_will_be_accepted_is_asked_for(self):
        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            connection.sendall(self.EXPECTING % (b"localhost", BODY_MAX_BYTES))
            self.assertEqual(read_head(reader)[0], 100)
        self.assert_refused(self.EXPECTING % (b"localhost", BODY_MAX_BYTES + 1), 413)
        self.assert_refused(self.EXPECTING % (b"evil.com", 3), 403)

    def test_http10_client_gets_no_interim_response(self):
        body = chat()
        self.upstream.play(Response(
            raw=b"HTTP/1.1 103 Early Hints\r\n\r\n" + Response(framing="length").wire()))
        head = self.EXPECTING % (b"localhost", len(body))
        self.assertRegex(self.rrouter.exchange(head.replace(b"HTTP/1.1", b"HTTP/1.0") + body),
                         rb"^HTTP/1\.[01] 200 ")

    @staticmethod
    def post(length=b"3", body=b"abc", after=b"\r\n"):
        return b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: %b%b\r\n%b" % (
            length, after, body)

    ALIKE = (
        # Content-Length, body, rest of the head
        (b"3", b"abc", b"\r\n"), (b"12", b"abcdefghijkl", b"\r\n"), (b"0", b"", b"\r\n"),
        (b"0003", b"abc", b"\r\n"), (b"3", b"GET", b"\r\nX-More: 1\r\n"), (b"3", b"xyz", b"\r\n"),
        (b"3", b"xyz", b" \r\n"), (b"300000", b"x" * 300000, b"\r\n"), (b"3", b"\r\n\r", b"\r\n"),
    )
    ALIKE_BUT_BAD = (
        # status, Content-Length, rest of the head
        (400, b"3x", b"\r\n"), (400, b"", b"\r\n"), (400, b"+3", b"\r\n"),
        (400, b"3", b"\r\nContent-Length: 0\r\n"), (413, b"9" * 15, b"\r\n"),
        (400, b"3", b"\r\nTransfer-Encoding: chunked\r\n"), (400, b"9" * 16, b"\r\n"),
        (400, b"3", b"\n"), (403, b"3", b"\r\nOrigin: https://evil.example\r\n"),
    )

    def test_head_like_the_last_one_is_read_like_any_other(self):
        """A connection remembers its last head; what only begins like it must not match."""
        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            for length, body, after in self.ALIKE:
                data = self.post(length, body, after)
                for pieces in ([data], [*(data[n:n + 1] for n in range(200)), data[200:]]):
                    for piece in pieces:
                        connection.sendall(piece)
                    self.assertEqual(read_reply_from(reader).status, 200)
                    received = self.upstream.received[-1]
                    self.assertEqual((received.body, received.header("x-more")),
                                     (body, "1" if b"More" in after else None))
            self.upstream.clear()
            get = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
            connection.sendall(b"\r\n" + self.post() + get + get)
            self.assertEqual([read_reply_from(reader).status for _ in range(3)], [200] * 3)
            self.assertEqual([(r.method, r.body) for r in self.upstream.received],
                             [("POST", b"abc"), ("GET", b""), ("GET", b"")])

    def test_bad_head_that_begins_like_the_last_one_is_refused(self):
        for status, length, after in self.ALIKE_BUT_BAD:
            with self.subTest(length, after=after):
                self.upstream.clear()
                with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
                    connection.sendall(self.post())
                    self.assertEqual(read_reply_from(reader).status, 200)
                    connection.sendall(self.post(length, b"abc", after))
                    self.assert_own_error(read_reply_from(reader), status)
                    self.assertEqual(reader.read(), b"")
                self.assertEqual(len(self.upstream.received), 1)


# Requests: forwarding #########################################################

class ForwardTest(RouterTest):

    def test_end_to_end_headers_arrive_as_they_were_sent(self):
        before = [("x-first", "1"), ("X-Repeat", "1"), ("x-EMPTY", ""), ("anthropic-foo", "a, b")]
        after = [field for field in CLAUDE_HEADERS if field[0] != "Connection"] + [
            ("X-repeat", "2"), ("Cookie", "a=1; b=2"), ("Cookie", "c=3"), ("X-Tab", "a\tb  c"),
            ("X-Quoted", '"a\\"b"'), ("X-Latin", "caf\xe9 \x80\xff"), ("Via", "1.1 other"),
            ("x-claude-code-agent-id", "7"), ("X-Forwarded-For", "10.0.0.1"),
            ("Range", "bytes=0-1"), ("If-None-Match", '"x"'), ("X-Repeat", "3")]
        body = chat()
        fields = [*before, ("hOST", "localhost:1"), *after, ("Content-Length", str(len(body)))]
        head = "".join("%s: %s\r\n" % field for field in fields)
        data = b"POST /v1/messages HTTP/1.1\r\n" + head.encode("latin-1") + b"\r\n" + body
        self.assertEqual(self.converse(data, "POST")[0].status, 200)
        received, = self.upstream.received
        self.assertEqual(end_to_end(received.fields),
                         [*before, ("Host", self.upstream.url[7:]), *after])
        self.assertEqual(received.header("content-length"), str(len(received.body)))
        self.assertEqual(received.version, "HTTP/1.1")

    def test_nothing_is_added(self):
        self.assertEqual(self.get().status, 200)
        self.assertEqual(self.upstream.received[0].head,
                         b"GET /v1/models HTTP/1.1\r\nHost: %b\r\n\r\n" %
                         self.upstream.url[7:].encode())

    def test_headers_of_one_hop_are_dropped(self):
        hop = (("Connection", "X-A ,close"), ("X-A", "1"), ("X-B", "1"), ("connection", "x-b"),
               ("Keep-Alive", "timeout=5"), ("Proxy-Connection", "keep-alive"), ("Trailer", "X-T"),
               ("TE", "trailers"), ("Upgrade", "h2c"), ("Proxy-Authorization", "Basic eA=="),
               ("Proxy-Authenticate", "Basic"))
        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            connection.sendall(request_bytes("GET", "/", None, (*hop, ("X-C", "1"))) + HIDDEN)
            reply = read_reply_from(reader)
            self.assertEqual((reply.status, reply.header("connection")), (200, "close"))
            self.assertEqual(reader.read(), b"", "asked to close, and did not")
        received, = self.upstream.received
        self.assertEqual(end_to_end(received.fields)[1:], [("X-C", "1")])
        self.assertIsNone(received.header("connection"))

    def test_connection_header_cannot_remove_the_framing(self):
        fields = (("Connection", "Host, Content-Length, Content-Type"), ("Content-Type", "a/b"))
        self.assertEqual(self.rrouter.request("POST", "/", HIDDEN, fields).status, 200)
        received, = self.upstream.received
        self.assertEqual((received.header("host"), received.body), (self.upstream.url[7:], HIDDEN))
        self.assertIsNone(received.header("content-type"))

    TARGETS = (
        # method, target, target at the upstream (None: the same)
        ("GET", "//a/../b?x=%zz;y", None), ("GET", "/%2e%2e/./%00?", None),
        ("GET", "/a?b?c=/d//e", None), ("POST", "/v1/messages?beta=true", None),
        ("GET", "/x?a[]=1&b={c}|d^e`\"<>\\", None), ("OPTIONS", "/v1/messages", None),
        ("GET", "http://localhost:8316/x?y=1", "/x?y=1"), ("GET", "http://localhost//x", "//x"),
        ("GET", "http://127.0.0.1:1", "/"), ("GET", "HTTP://LOCALHOST/Y", "/Y"),
        ("PROPFIND", "/", None), ("PATCH", "/", None), ("purge", "/", None),
        ("M-SEARCH", "/", None), ("HEAD", "/api/hello", None), ("DELETE", "/v1/x", None),
        ("POST", "/health", None), ("GET", "/healthz", None), ("GET", "/health/", None),
    )

    def test_target_and_method_arrive_as_they_were_sent(self):
        for method, target, expected in self.TARGETS:
            with self.subTest(method + " " + target):
                reply, = self.converse(request_bytes(method, target), method)
                self.assertEqual(reply.status, 200)
                self.assertEqual(self.upstream.received[-1][:2], (method, expected or target))

    def test_methods_for_proxies_are_forwarded_or_refused(self):
        for method, target in (("CONNECT", "localhost:443"), ("TRACE", "/"), ("OPTIONS", "*")):
            with self.subTest(method):
                self.upstream.clear()
                reply = self.rrouter.exchange(request_bytes(
                    method, target, None, (("Authorization", "canary"), ("Connection", "close"))))
                self.assertRegex(reply, rb"^HTTP/1\.1 (200|400|403|405|501) ")
                self.assertNotIn(b"canary", reply)
                self.assertEqual([r[:2] for r in self.upstream.received],
                                 [(method, target)] if b" 200 OK" in reply[:20] else [])

    ROUTED = (
        # mode, path, body, x-rrouter-target, x-rrouter-model
        ("antigravity", "/v1/messages", chat(), "antigravity", GEMINI_SONNET),
        ("antigravity", "/v1/messages/count_tokens?a=b", chat(), "antigravity", GEMINI_SONNET),
        ("antigravity", "/v1/messages", chat("gpt-4"), "antigravity", "gpt-4"),
        ("claude", "/v1/messages", chat(), "claude", SONNET),
        ("antigravity", "/v1/messages", b"[]", None, None),
        ("claude", "/v1/messages", b"", None, None),
    )

    def test_replies_to_requests_with_a_model_name_target_and_model(self):
        for mode, path, body, *expected in self.ROUTED:
            for response in (Response(), error(503), stream()):
                with self.subTest("%s %s %s" % (mode, body, response.status)):
                    self.rrouter.home.write("mode", mode)
                    self.upstream.play(response)
                    reply = self.rrouter.request("POST", path, body)
                    self.assertEqual(reply.status, response.status)
                    self.assertEqual(
                        [reply.header("x-rrouter-" + name) for name in (
                            "target", "model", "attempts")],
                        [*expected, expected[0] and "1"])
                    self.assertEqual(self.upstream.received[-1].target, path)

    def test_odd_characters_of_a_model_are_escaped_in_the_reply(self):
        self.rrouter.home.write("mode", "claude")
        name = 'claude-sonnet\r\nX-Injected: 1\r\n\r\n\u001b[31m \ud55c\ud83d "\\'
        reply = self.rrouter.post(name)
        self.assertEqual((reply.status, reply.header("x-injected"), reply.body), (200, None, b"{}"))
        self.assertRegex(reply.header("x-rrouter-model"), r"\A[ -~]+\Z")
        self.assertEqual(self.upstream.received[-1].model, name)


# Requests: the model in the body ##############################################

SPLICED = (
    # body; %s is the model
    '{"model":%s,"messages":[]}', '{"max_tokens":1,"model":%s,"messages":[]}', '{"model":%s}',
    '{"messages":[{"role":"user","content":"hi"}],"model":%s}',
    ' \n{\t"a" :\r\n [ 1 , 2 ] , "model"\t:\n %s \r\n, "b" : { } }\n\n',
    '\r\n{ \t"model" \n:\r %s ,"a":1 } ',
    '{"a":[1e400,9007199254740993,-0,1E-7,0.1e+5],"model":%s,"b":123456789012345678901234567890}',
    '{"a":"\\ud83d \\u0000 \\/ \\" \\\\","\\ud83d\\"":"}","model":%s,"b":"\\u2028\\udc00"}',
    '{"\ud55c\uad6d":"\u2028\U0001f600 caf\u00e9","model":%s,"a":"\uffff"}',
    '{"tools":[{"model":"claude-sonnet-9"},{"input":{"model":"claude-sonnet-8"}}],"model":%s}',
    '{"model":%s,"tools":[{"model":"claude-sonnet-9"}],"x":{"model":"claude-sonnet-8"}}',
    '{"a":"\\"model\\":\\"claude-sonnet-9\\"","b":"model","model":%s,"c":"{\\"model\\":1}"}',
    '{"models":"claude-sonnet-9","Model":"claude-sonnet-8","model ":"x","":1,"model":%s}',
    '{"a":1,"\\u006dodel":%s}', '{"m\\u006fdel":%s,"a":1}', '{"model":%s,"model":"no"}',
    '{"a":1,"model":%s,"model":"claude-sonnet-9","\\u006dodel":"claude-opus-1"}',
    '{"a":1,"a":2,"model":%s,"a":{"b":1,"b":2}}',
)
# Only a leading plain model ends the search; what follows it is not examined.
BROKEN_LATER = '{"model":%s,"messages":[{"role":', '{"model":%s} and more'
UNTOUCHED = (
    # body without a model that can change
    b"", b" \n", b"{}", b"null", b'"model"', b'[{"model":"claude-sonnet-5"}]',
    b'["model","claude-sonnet-5"]', b'[{"model":"claude-sonnet-5"},1]', b'{"model":null}',
    b'{"model":5}', b'{"model":{"model":"claude-sonnet-5"}}', b'{"model":true,"claude-sonnet-5":1}',
    b'{"a":1,"model":["claude-sonnet-5"]}', b'{"model":"claude-sonnet-5\\',
    b'{"a":{"model":"claude-sonnet-5"},"b":[{"model":"claude-sonnet-5"}]}',
    b'{"a":"model","claude-sonnet-5":"model"}', b'{"Model":"claude-sonnet-5"}',
    b'\xef\xbb\xbf{"model":"claude-sonnet-5"}', b"model=claude-sonnet-5",
    b'{"a":1,"model":"claude-sonnet-5"', b'{"model":"claude-sonnet-5',
    b'{"a":1,"model":"claude-sonnet-5"} x', b'{"a":1}{"model":"claude-sonnet-5"}',
    b'{model:"claude-sonnet-5"}', b'{"a":1,"model" "claude-sonnet-5"}',
    b'{"model"::"claude-sonnet-5"}', b'{1:2,"model":"claude-sonnet-5"}',
    b'{,"model":"claude-sonnet-5"}', bytes(range(256)) * 4,
    gzip.compress(b'{"model":"claude-sonnet-5"}'), '{"model":"claude-sonnet-5"}'.encode("utf-16"),
    b"{", b'{"', b'{ "model" : "gpt-4" , "a" : 1e400 }', b'{"model":"Claude-Sonnet-5"}',
    b'{"model":"gpt\\u002d4","a":"\\ud83d"}',
)
ODD_NAME = 'we"ird\\ n\u00e9 \ud55c\U0001f600\u001b'


class SpliceTest(RouterTest):
    """Only the bytes of the model's value change."""

    config = {**DEFAULT_CONFIG, "modes": {
        **DEFAULT_CONFIG["modes"], "odd": {"mappings": [{"match": "*", "rewrite": ODD_NAME}]}}}
    SPELLED = b'"claude-sonnet-5"', b'"claude\\u002dsonnet-5"', b'"\\u0063laude-\\u0073onnet-\\/5"'

    def forwarded(self, body):
        """POST the body; return what the upstream received, its length checked."""
        self.assertEqual(self.rrouter.request("POST", "/v1/messages", body).status, 200)
        received = self.upstream.received.pop()
        self.assertEqual(received.header("content-length"), str(len(received.body)))
        return received.body

    def test_only_the_value_of_the_model_changes(self):
        cases = [*itertools.product(SPLICED, self.SPELLED),
                 *itertools.product(BROKEN_LATER, self.SPELLED[:1])]
        for text, spelled in cases:
            with self.subTest(text, spelled=spelled):
                before, after = text.encode("utf-8").split(b"%s")
                self.assertEqual(self.forwarded(before + spelled + after),
                                 before + json.dumps(GEMINI_SONNET).encode() + after)

    def test_body_without_a_model_to_change_is_untouched(self):
        for body in UNTOUCHED:
            with self.subTest(body):
                self.assertEqual(self.forwarded(body), body)

    def test_mode_without_rules_leaves_every_body_untouched(self):
        self.rrouter.home.write("mode", "claude\n")
        for text in SPLICED:
            with self.subTest(text):
                body = text.encode("utf-8").replace(b"%s", self.SPELLED[1])
                self.assertEqual(self.forwarded(body), body)

    def test_odd_name_of_a_rule_is_written_as_json(self):
        self.rrouter.home.write("mode", "odd\n")
        for text in SPLICED:
            with self.subTest(text):
                before, after = text.encode("utf-8").split(b"%s")
                body = self.forwarded(before + b'"x"' + after)
                self.assertTrue(body.startswith(before) and body.endswith(after))
                self.assertEqual(json.loads(body[len(before):len(body) - len(after)]), ODD_NAME)

    def test_large_body_is_changed_in_one_place(self):
        message = b'{"content":"line\\n \\"model\\": \xed\x95\x9c"}'
        filler = b'"messages":[' + b",".join([message] * 200_000) + b"]"
        for parts in ((b'{"model":"', b'",' + filler + b"}"),
                      (b"{" + filler + b',"model":"', b'"}')):
            with self.subTest(parts[0][:20]):
                body = self.forwarded(b"claude-sonnet-5".join(parts))
                self.assertTrue(body == GEMINI_SONNET.encode().join(parts))     # no diff of 8 MB

    def test_hostile_body_is_forwarded_and_holds_up_no_request(self):
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

HOSTS = (
    # statuses, Hosts
    ((200,), ("localhost", "LOCALHOST:8316", "Localhost:1", "127.0.0.1", "127.0.0.1:8316", "[::1]",
              "[::1]:8316", "localhost.", "localhost:", "\tLocalHost:8316 ", "127.0.0.1.:8316")),
    ((403,), ("evil.com", "evil.com:8316", "127.0.0.1.nip.io", "localhost.evil.com", "127.1",
              "0.0.0.0", "2130706433", "0x7f.1", "[::]", "xlocalhost", "localhost-", "127.0.0.2",
              "localhost.localdomain", "127.000.000.001", "0177.0.0.1", "ip6-localhost", "lvh.me",
              "[::ffff:127.0.0.1]", "[0:0:0:0:0:0:0:1]")),
    ((400,), ("localhost@evil", "evil@localhost", "[::1].evil", "::1", "[::1", "localhost:x",
              "localhost, evil.com", "localhost evil.com", "localhost/evil.com", "[::1%25lo]",
              "localhost\\.evil.com", "localhost:99999999", "localhost?x", "\xe9vil.com",
              "localhost:8316.evil.com")),
    ((403,), ("", "*", "localhost..", "localhost%00.evil.com", "%6cocalhost",
              "localhost;evil.com")),
)
ORIGINS = (
    # status, header lines
    (200, ("Origin: http://localhost:3000", "Origin: https://127.0.0.1", "Sec-Fetch-Mode: cors",
           "Origin: http://[::1]:8080", "Origin: HTTP://LOCALHOST:3000", "Sec-Fetch-Site: none",
           "Sec-Fetch-Site: same-origin", "Sec-Fetch-Site: same-site")),
    (403, ("Origin: https://evil.com", "Origin: null", "oRIGIN:http://evil.com:8316", "Origin:",
           "Origin: http://localhost.evil.com", "Origin: http://127.0.0.1.nip.io",
           "Origin: http://localhost@evil.com", "Origin: chrome-extension://ab", "Origin: file://",
           "Origin: localhost.evil.com:80", "Origin: http://localhost\r\nOrigin: https://evil.com",
           "Origin: http://localhost https://evil.com", "Origin: http://localhost,https://evil.com",
           "Origin: //localhost", "Origin: localhost", "Origin: ws://localhost",
           "Origin: http://localhost/", "Sec-Fetch-Site: CROSS-SITE",
           "sec-fetch-site:cross-site\r\nOrigin: http://localhost",
           "Sec-Fetch-Site: same-origin\r\nSec-Fetch-Site: cross-site")),
)
FOREIGN_TARGETS = ("http://evil.com/x", "http://localhost.evil.com/", "http://127.1/",
                   "http://localhost@evil.com/", "http://evil.com/health", "http://evil.com")
# `http.server` asks the name service for the name of its host, which can take 35 s.
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
    """Only this machine is served, and no web page; the process has no name service."""

    altered = DEAD_NAME_SERVICE

    def setUp(self):
        super().setUp()
        self.upstream.default = Response(
            fields=(("Access-Control-Allow-Origin", "*"), ("X-Kept", "1")))

    def check(self, statuses, start, *lines):
        """A request with this head gets 200, or one of `statuses` and nothing is forwarded."""
        head = "\r\n".join((start + " HTTP/1.1", *lines, "", "")).encode("latin-1")
        with self.subTest(head):
            self.upstream.clear()
            reply = (self.converse(head, "GET")[0] if 200 in statuses else
                     self.assert_refused(head, *statuses))
            self.assertIn(reply.status, statuses)
            self.assertFalse([name for name, _ in reply.fields
                              if name.lower().startswith("access-control")])

    def test_only_loopback_hosts_are_served(self):
        for statuses, hosts in HOSTS:
            for host in hosts:
                for start in ("POST /v1/messages", "GET /health"):
                    self.check(statuses, start, "Host: " + host)

    def test_only_loopback_origins_are_served(self):
        for status, origins in ORIGINS:
            for lines in origins:
                for start in ("POST /v1/messages", "OPTIONS /v1/messages", "GET /health"):
                    self.check((status,), start, "Host: localhost", lines)

    def test_authority_of_the_target_replaces_the_host(self):
        for target in FOREIGN_TARGETS:
            self.check((400, 403), "GET " + target, "Host: localhost")

    def test_invalid_host_beside_an_absolute_target_is_refused(self):
        self.check((400,), "GET http://localhost/", "Host: local/host")

    def test_refused_head_request_gets_no_body(self):
        for status, lines in ((b"403", b"Host: evil.com"),
                              (b"417", b"Host: localhost\r\nExpect: foo")):
            data = self.rrouter.exchange(b"HEAD / HTTP/1.1\r\n" + lines + b"\r\n\r\n")
            self.assertRegex(data, rb"(?s)\AHTTP/1\.1 " + status + rb" .*\r\n\r\n\Z")

    @unittest.skipUnless(os.path.exists("/proc/net/tcp6"), "needs /proc")
    def test_only_loopback_addresses_listen(self):
        listening = set()
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            for line in pathlib.Path(table).read_text().splitlines()[1:]:
                _, local, _, state, *_ = line.split()
                address, _, port = local.partition(":")
                if state == "0A" and port == "%04X" % self.rrouter.port:
                    listening.add(address)
        self.assertIn("0100007F", listening)
        self.assertLessEqual(listening, {"0100007F", "00000000000000000000000001000000"})

    def test_both_loopback_addresses_respond(self):
        for family in (socket.AF_INET, socket.AF_INET6):
            with self.subTest(family):
                try:
                    with self.rrouter.connect(family) as connection:
                        connection.sendall(request_bytes("GET", "/"))
                        self.assertEqual(read_reply(connection).status, 200)
                except OSError as problem:
                    if problem.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                        raise
                    self.skipTest("no IPv6: %s" % problem)


# Responses ####################################################################

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n"
STATUSES = (200, 201, 202, 203, 206, 226, 299, 300, 301, 302, 303, 307, 308, 400, 401, 402, 403,
            404, 405, 407, 408, 409, 413, 416, 418, 422, 426, 429, 431, 451, 499, 500, 501, 502,
            503, 504, 505, 507, 529, 599)
BAD_RESPONSES = (
    # raw response
    b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Type: text/ev",
    b"HTTP/1.1 abc OK\r\n\r\n", b"HTTP/1.1 99 OK\r\n\r\n", b"ICY 200 OK\r\n\r\n",
    b"<html>hello</html>\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    *(b"HTTP/1.1 200 OK\r\n" + lines + b"\r\n\r\nhello" for lines in (
        b"Content-Length: 2\r\nContent-Length: 5", b"Content-Length: 5\r\nContent-Length: 5",
        b"Content-Length: +5", b"Content-Length: -5", b"Content-Length: 0_5",
        b"Content-Length: abc", b"Content-Length: 5\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: zip", b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", b"oops\r\nContent-Length: 5",
        b"X: one\rContent-Length: 5", b"X: a\0b\r\nContent-Length: 5", b"Content-Length : 5",
        b"X: " + b"a" * 1_000_000 + b"\r\nContent-Length: 5")),
)
BROKEN_RESPONSES = (
    # response, the most that the client may get of its body
    (Response(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n" + b"x" * 60), b"x" * 60),
    (stream(event("ping"), event("ping"), cut=True), event("ping") * 2),
    *((Response(raw=CHUNKED + b"5\r\nhello\r\n" + rest), b"hello" + more) for rest, more in (
        (b"9\r\nworld", b"world"), (b"1", b""), (b"9\r\n", b""), (b"0\r\n", b""),
        (b"0x5\r\nworld\r\n0\r\n\r\n", b""), (b"+5\r\nworld\r\n0\r\n\r\n", b""),
        (b"1" + b"0" * 16 + b"\r\nworld", b"world"), (b"5\r\nworld0\r\n\r\n", b"world"),
        (b"\r\n", b""), (b"0\r\nX: " + b"x" * 9000 + b"\r\n\r\n", b""))),
)


class ResponseTest(RouterTest):

    def reply_and_next(self, response, method="POST"):
        """Send two requests on one connection; return the reply to the first.

        The second must get its response whole: the first must not shift it.
        """
        self.upstream.play(response, Response(200, b"next"))
        first, second = self.converse(
            request_bytes(method, "/", chat()) + request_bytes("POST", "/", chat()), method, "POST")
        self.assertEqual((second.status, second.body), (200, b"next"))
        return first

    def test_every_status_arrives_with_reason_headers_and_body(self):
        fields = [("Content-Type", "text/x"), ("Set-Cookie", "a=1; Path=/"), ("X-Repeat", "1"),
                  ("set-cookie", "b=2"), ("x-REPEAT", "2"), ("X-Empty", ""), ("Via", "1.1 other"),
                  ("X-Latin", "caf\xe9 \x80\xff"), ("Location", "http://evil.com/"),
                  ("WWW-Authenticate", "Basic realm=x"), ("Retry-After", "3"), ("Vary", "Origin"),
                  ("x-should-retry", "true"), ("anthropic-ratelimit-unified-status", "allowed")]
        for status in STATUSES:
            for framing in ("chunked", "length"):
                with self.subTest(status, framing=framing):
                    body, reason = b"body of %d \0\xff\r\n\r\n" % status, "It Is\t%d" % status
                    self.upstream.play(Response(status, body, fields=fields, reason=reason,
                                                framing=framing))
                    reply = self.rrouter.post()
                    self.assertEqual((reply.status, reply.reason, reply.body, reply.complete),
                                     (status, reason, body, True))
                    self.assertEqual(end_to_end(reply.fields), fields)
                    self.assertEqual(reply.header("content-length"),
                                     str(len(body)) if framing == "length" else None)
        self.assertEqual(len(self.upstream.received), 2 * len(STATUSES))

    def test_compressed_body_stays_compressed(self):
        packed = gzip.compress(b"hello" * 100)
        self.upstream.play(Response(200, packed, fields=[("Content-Encoding", "gzip")]))
        reply = self.rrouter.post()
        self.assertEqual((reply.body, reply.header("content-encoding")), (packed, "gzip"))

    DROPPED = (
        # headers that the client must not get
        (("Connection", "X-Secret, close"), ("X-Secret", "1")), (("Keep-Alive", "timeout=5"),),
        (("Connection", "X-One"), ("X-One", "1"), ("Connection", "x-two ,close"), ("X-Two", "2")),
        (("Upgrade", "h2c"),), (("Proxy-Authenticate", "Basic"),), (("Trailer", "X-T"),),
        (("Proxy-Connection", "close"),), (("Access-Control-Allow-Origin", "*"),
         ("access-control-allow-headers", "*"), ("ACCESS-CONTROL-EXPOSE-HEADERS", "x")),
    )

    def test_headers_of_one_hop_and_of_browsers_are_dropped(self):
        kept = [("Retry-After", "7"), ("X-Kept", "1"), ("Retry-After", "9")]
        for fields in self.DROPPED:
            with self.subTest(fields):
                self.upstream.play(Response(fields=[kept[0], *fields, *kept[1:]]))
                self.assertEqual(end_to_end(self.rrouter.post().fields), kept)

    def test_connection_header_cannot_remove_the_length(self):
        reply = self.reply_and_next(Response(stays=True, raw=(
            b"HTTP/1.1 200 OK\r\nConnection: content-length\r\nContent-Length: 5\r\n\r\nhello")))
        self.assertEqual((reply.body, reply.header("content-length")), (b"hello", "5"))

    def test_chunks_in_odd_pieces_arrive_whole(self):
        large = bytes(1 << 20)
        self.upstream.play(Response(200, large))
        self.assertTrue(self.rrouter.post().body == large)                  # no diff of 1 MB
        text = b"hello0123456789"
        coded = CHUNKED + b'5\r\nhello\r\n00A;x="y z"\r\n0123456789\r\n0\r\n\r\n'
        for pieces in (
                tuple(coded[at:at + 1] for at in range(len(coded))),
                (CHUNKED, *(b"1\r\n%c\r\n" % byte for byte in text), b"0\r\n\r\n"),
                CHUNKED + b"f\r\n" + text + b"\r\n0\r\nX-T: 1\r\nContent-Length: 3\r\n\r\n",
                (CHUNKED[:-2], b"\r\nF\r", b"\n" + text + b"\r", b"\n0\r", b"\n\r", b"\n")):
            with self.subTest(pieces[0]):
                self.upstream.play(Response(raw=pieces))
                reply = self.rrouter.post()
                self.assertEqual((reply.status, reply.body, reply.complete), (200, text, True))

    def test_response_that_ends_with_its_connection_is_reframed(self):
        for response in (
                Response(200, (b"hel", b"lo"), framing="close"),
                Response(raw=b"HTTP/1.0 200 OK\r\n\r\nhello"),
                Response(raw=b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello"),
                Response(raw=b"HTTP/1.1 200 \r\nConnection: close\r\n\r\nhello")):
            with self.subTest(response.raw):
                reply = self.reply_and_next(response)
                self.assertEqual((reply.body, reply.complete), (b"hello", True))
                self.assertTrue(reply.header("content-length") or reply.header("transfer-encoding"))

    WITHOUT_BODY = (
        # method, response, Content-Length of the reply
        ("HEAD", Response(200, b"12345", framing="length"), "5"), ("HEAD", Response(), None),
        ("HEAD", error(404), "72"), ("HEAD", Response(framing="close"), None),
        ("GET", Response(204, (), framing="none"), None),
        ("GET", Response(304, (), framing="none"), None),
        ("GET", Response(200, (), framing="length"), "0"), ("GET", Response(200, ()), None),
        *(("GET", Response(raw=b"HTTP/1.1 " + head + b"\r\n\r\n", stays=True), length)
          for head, length in (
              (b"204 No Content\r\nContent-Length: 0", None),
              (b"204 No Content\r\nContent-Length: 5", None),
              (b"304 Not Modified\r\nContent-Length: 5", "5"),
              (b"304 Not Modified\r\nTransfer-Encoding: chunked", None))),
    )

    def test_response_without_a_body_leaves_the_connection_in_step(self):
        for method, response, length in self.WITHOUT_BODY:
            with self.subTest(method, response=response.wire()):
                reply = self.reply_and_next(response, method)
                self.assertEqual((reply.body, reply.header("content-length")), (b"", length))

    def test_interim_responses_do_not_shift_the_final_one(self):
        hints = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\nLink: </y>\r\n\r\n"
        for interim, statuses in (
                (b"HTTP/1.1 100 Continue\r\n\r\n", []), (hints, [103]),
                (b"HTTP/1.1 102 Processing\r\n\r\n", [102]),
                (hints * 3 + b"HTTP/1.1 102 \r\nContent-Length: 9\r\n\r\n", [103] * 3 + [102])):
            with self.subTest(interim):
                reply = self.reply_and_next(Response(
                    raw=interim + Response(200, b"final", framing="length").wire(), stays=True))
                self.assertEqual((reply.status, reply.body), (200, b"final"))
                self.assertEqual([head[0] for head in reply.interim], statuses)

    def test_malformed_response_is_a_bad_gateway(self):
        for raw in BAD_RESPONSES:
            with self.subTest(raw[:80]):
                self.upstream.clear()
                self.upstream.default = Response(raw=raw)
                reply = self.rrouter.post()
                self.assert_own_error(reply, 502)
                self.assert_error(reply, 502, self.upstream.url)
                self.assertEqual(len(self.upstream.received), 1)

    def test_response_head_in_bare_line_feeds_is_refused_at_once(self):
        for raw in ((b"HTTP/1.1 200 OK\nContent-Length: 2\n\n{}",),
                    (b"HTTP/1.1 200 OK\r\nX: y", b"\n", b"\n{}")):
            self.upstream.play(Response(raw=raw, pause_s=0.1, stays=True))
            self.assert_own_error(self.rrouter.post(), 502)

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
                    if reply.status != 502:
                        self.assertEqual((reply.status, reply.complete), (200, False))
                        self.assertTrue(body.startswith(reply.body), reply.body)
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

    def test_each_event_arrives_before_the_next_is_sent(self):
        for mode in ("antigravity", "claude"):
            for framing in self.framings:
                with self.subTest(mode + " " + framing):
                    self.rrouter.home.write("mode", mode)
                    gates = [self.gate() for _ in EVENTS]
                    self.upstream.play(stream(*EVENTS, framing=framing, gate=gates))
                    with self.opened() as response:
                        for gate, data in zip(gates, EVENTS):
                            gate.set()
                            self.assertEqual(receive(response, len(data)), data)
                        self.assertEqual(response.read(), b"")

    def test_head_arrives_before_any_event(self):
        gate = self.gate()
        self.upstream.play(stream(b":\n", gate=[gate]))
        with self.opened() as response:
            self.assertEqual((response.status, response.headers["content-type"]),
                             (200, "text/event-stream; charset=utf-8"))
            gate.set()
            self.assertEqual(response.read(), b":\n")

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
        if hasattr(select, "POLLRDHUP"):        # elsewhere unread bytes hide that a client left
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

    def test_client_that_does_not_read_holds_the_upstream_back(self):
        """64 MiB do not gather in rrouter; the upstream request ends when the client leaves."""
        sent = []
        self.upstream.play(stream(framing="close"))
        self.upstream.queue[0].chunks = (sent.append(1) or bytes(1 << 20) for _ in range(64))
        with self.rrouter.connect() as connection:
            connection.sendall(request_bytes("POST", "/v1/messages", chat()))
            wait_until(lambda: sent)
            quiet = -1
            while quiet != len(sent):               # until nothing has moved for a while
                quiet = len(sent)
                time.sleep(0.3)
            self.assertLess(quiet, 60)
        self.upstream.wait(lambda upstream: upstream.closed)

    def test_parallel_streams_stay_separate(self):
        count, gate = 50, self.gate()
        self.upstream.default = lambda received: stream(
            event("start", who=received.model), event("end", who=received.model), gate=gate)
        self.rrouter.home.write("mode", "claude")
        threads = self.threads()
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(self.rrouter.connect()) for _ in range(count)]
            for number, client in enumerate(clients):
                client.sendall(request_bytes("POST", "/v1/messages", chat("m%d" % number)))
            self.upstream.wait(lambda upstream: len(upstream.received) == count)
            self.assertEqual(self.rrouter.health()["activeRequests"], count)
            gate.set()
            for number, client in enumerate(clients):
                name, reply = "m%d" % number, read_reply(client)
                self.assertEqual((reply.body, reply.header("x-rrouter-model")),
                                 (event("start", who=name) + event("end", who=name), name))
        wait_until(lambda: self.threads() <= threads)

    def threads(self):
        """Return how many threads rrouter has; 0 where /proc is missing."""
        return len(os.listdir("/proc/%d/task" % self.rrouter.process.pid)) if PROC else 0

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
    """The same with an upstream that speaks TLS."""

    framings = ("chunked",)


# Auto mode ####################################################################
# The upstream distinguishes the targets as CLIProxyAPI does, by the name of the model: gemini-*
# is antigravity, claude-* is claude.  What CLIProxyAPI 7.2.140 sent is marked "recorded".

OPUS, HAIKU = "claude-opus-5-5", "claude-haiku-4-5"
COUNT_TOKENS, CHAT = "/v1/messages/count_tokens?beta=true", "/v1/chat/completions"
SSE_FIELDS = (("Content-Type", "text/event-stream"),)

PING, COMMENT = event("ping"), b": keep-alive\n\n"
START = event("message_start", message={
    "id": "r", "type": "message", "role": "assistant", "content": [], "model": "claude-sonnet-4-6",
    "stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 3, "output_tokens": 0}})
STOP = event("message_stop")
OVERLOADED = event("error", error={"type": "overloaded_error", "message": "Overloaded"})
BROKEN_OFF = event("error", error={"type": "api_error", "message": "unexpected EOF"})


def block(**content):
    """Return the start of a content block."""
    return event("content_block_start", index=0, content_block=content)


def text_of(words):
    """Return an event with these words of a text."""
    return event("content_block_delta", index=0, delta={"type": "text_delta", "text": words})


def end_of(tokens, reason="end_turn"):
    """Return the event that ends a message after this many tokens."""
    return event("message_delta", delta={"stop_reason": reason, "stop_sequence": None},
                 usage={"input_tokens": 0, "output_tokens": tokens})


NO_TEXT, NO_MORE_TEXT = block(type="text", text=""), event("content_block_stop", index=0)
DELTA = text_of("part one.")


def events_of(target):
    """Return the events of a message that says which target wrote it."""
    return START, NO_TEXT, text_of("by " + target), NO_MORE_TEXT, end_of(7), STOP


def sse(*chunks, **options):
    """Return an event stream of these chunks."""
    return Response(200, chunks, fields=SSE_FIELDS, **options)


def whole(target, **options):
    return sse(*events_of(target), **options)


def plain(content, encoding=None, encode=bytes):
    """Return a 200 that is not streamed; a dictionary is sent as JSON."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    fields = [("Content-Type", "application/json"), ("Content-Encoding", encoding)]
    return Response(200, encode(body), fields=fields[:1 + bool(encoding)], framing="length")


def message(*content, tokens=7, reason="end_turn", **members):
    """Return a message that is not streamed, as a dictionary."""
    return {"id": "r", "type": "message", "role": "assistant", "model": "", "content": content,
            "stop_reason": reason, "stop_sequence": None,
            "usage": {"input_tokens": 0, "output_tokens": tokens}, **members}


def text(words):
    return {"type": "text", "text": words}


QUOTA_429 = error(429, "You have exhausted your capacity on this model. Your quota will reset after"
                  " 7200s.", "rate_limit_error")
SHELF_503 = error(503, "auth_unavailable: no auth available (providers=antigravity, model=%s)"
                  % GEMINI_SONNET)
COOLING_429 = error(429, "All credentials for model %s are cooling down" % GEMINI_SONNET,
                    "rate_limit_error")
UNKNOWN_400 = error(400, "unknown provider for model gemini-nope", "invalid_request_error")
INVALID_KEY_401 = Response(401, b'{"error":"Invalid API key"}', framing="length")
EMPTY_STREAM = sse(START + b"\n", b"\n".join((NO_TEXT, NO_MORE_TEXT, end_of(0), STOP, b"\n")))


def slowly(data):
    """Return an event stream that sends `data` every 20 ms."""
    return sse(*(data,) * 999, pause_s=0.02)


def target_of(received):
    """Return the target of a request by the model that its body begins with, or None."""
    found = re.match(rb'\s*\{\s*"model"\s*:\s*"(gemini|claude)-', received.body)
    return found and {b"gemini": "antigravity", b"claude": "claude"}[found.group(1)]


def auto_config(**auto):
    """Return the default configuration with these values in its `auto` section."""
    config = copy.deepcopy(DEFAULT_CONFIG)
    config["auto"] = {"targets": ["antigravity", "claude"], **auto}
    return config


def upstream_fields(reply):
    """Return the fields of a reply without those that rrouter adds."""
    return [field for field in reply.fields if not field[0].lower().startswith("x-rrouter-")]


def receive_until(connection, marker):
    """Receive until `marker` has come; return all bytes so far."""
    data = b""
    while marker not in data:
        received = connection.recv(65536)
        if not received:
            raise AssertionError("the end came before %r: %r" % (marker, data[-1000:]))
        data += received
    return data


# Shifts the clocks of a process by two numbers in a file that the test has mapped too.
SHIFTED_CLOCKS = """
import mmap, time
with open(%r, "r+b") as file:
    shifts = memoryview(mmap.mmap(file.fileno(), 16)).cast("d")
time.time = lambda real=time.time: real() + shifts[0]
time.monotonic = lambda real=time.monotonic: real() + shifts[1]
"""


class AutoTest(RouterTest):
    """Base of the tests of auto mode: `script` sets the responses of the targets, `ask` posts.

    Calls are written as initials: "ac" is one call to antigravity, then one to claude.  Time passes
    for rrouter when `later` says so, in addition to real time.
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
        self.set_mode(self.mode)

    def later(self, seconds):
        """Let rrouter's clocks move on."""
        self.shifts[0] += seconds
        self.shifts[1] += seconds

    def set_mode(self, mode):
        """Write the mode file by rename, as `rrouter MODE` does; auto clears all state."""
        self.rrouter.home.write("mode.new", mode + "\n")
        os.replace(str(self.rrouter.home.dir / "mode.new"), str(self.rrouter.home.dir / "mode"))

    def configure(self, config):
        """Write config.json for the rest of this test."""
        path = self.rrouter.home.dir / "config.json"
        before = path.read_text() if path.exists() else None
        self.addCleanup(lambda: path.unlink() if before is None
                        else self.rrouter.home.write("config.json", before))
        self.rrouter.home.write("config.json", json.dumps(config))

    def script(self, antigravity=None, claude=None, other=None):
        """Set a response for each target, a function of the request, or a list to play once.

        Without one a target answers with a message.  `other` is for requests without a model.
        """
        self.scripts = {"antigravity": antigravity, "claude": claude, None: other}

    def script_anew(self, *responses, **targets):
        """Do the same with all state and all requests received cleared."""
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
                    else plain(message(text("by " + target))))
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
        """Post messages, for which these calls are made ("ac a"); return the last reply."""
        for expected in calls.split():
            reply, made = self.ask(model, **members)
            self.assertEqual(made, expected)
        return reply

    def begin(self, model=SONNET, target="/v1/messages?beta=true", **members):
        """Send a message; return the connection, its response unread, when the upstream has it."""
        before = len(self.upstream.received)
        connection = self.send(model, target, **members)
        self.upstream.wait(lambda upstream: len(upstream.received) > before)
        return connection

    def begin_until(self, marker, **members):
        """Send a message; return the connection when `marker` has come."""
        connection = self.begin(**members)
        receive_until(connection, marker)
        return connection

    def send(self, model=SONNET, target="/v1/messages?beta=true", **members):
        """Send a message; return the connection."""
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

    def auto(self):
        return self.rrouter.health()["autoSwitch"]

    def trip(self, model=SONNET):
        """Let antigravity fail until traffic switches to claude; it goes on failing afterwards."""
        self.script(error(429))
        self.ask_for("ac ac ac", model)
        self.assert_state("claude")

    def assert_served(self, reply, by, attempts):
        """The reply is the whole message of one target, and its headers say so."""
        self.assertEqual((reply.status, reply.complete), (200, True), reply)
        self.assertIn(reply.body, [b"".join(response.chunks) for response in
                                   (whole(by), plain(message(text("by " + by))))])
        self.assertEqual((reply.header("x-rrouter-target"), reply.header("x-rrouter-attempts")),
                         (by, str(attempts)))

    def assert_state(self, current, **values):
        """/health has `current` as the target, and `values` in autoSwitch (failureCount=2)."""
        health = self.rrouter.health()
        found = {name: health["autoSwitch"][name] for name in values}
        self.assertEqual((health["currentTarget"], health["autoSwitch"]["currentTarget"], found),
                         (current, current, values))

    def assert_untouched(self):
        self.assert_state("antigravity", failureCount=0, timeoutCount=0, switchCount=0, models={})

    def assert_logged(self, pattern):
        """A line of the log matches [AUTO] and then `pattern`."""
        expression = re.compile(r"^.*\[AUTO\].*(?:%s)" % pattern, re.I | re.M)
        wait_until(lambda: expression.search(self.rrouter.log()))

    def assert_silent(self, connection, seconds=0.05):
        """The client gets nothing for a moment."""
        self.assertEqual(select.select([connection], [], [], seconds)[0], [])


DATA_ERROR = b'data: {"error":{"message":"boom"},"type":"error"}\n\n'
FAILED_STREAMS = (
    # label                             response of antigravity
    ("recorded: blocked prompt",        EMPTY_STREAM),
    ("recorded: error first",           sse(OVERLOADED + b"\n")),
    ("recorded: dropped after start",   sse(START + b"\n", BROKEN_OFF)),
    ("pings, comments, error",          sse(PING, COMMENT, PING, OVERLOADED)),
    ("byte by byte",                    sse(*map(bytes, zip(PING + OVERLOADED)))),
    ("CRLF",                            sse((START + OVERLOADED).replace(b"\n", b"\r\n"))),
    ("no blank after the colon",        sse(OVERLOADED.replace(b": ", b":"))),
    ("error without an event line",     sse(DATA_ERROR)),
    ("error without a type",            sse(b'data: {"error":{"message":"boom"}}\n\n')),
    ("error in an empty block",         sse(START, NO_TEXT, DATA_ERROR)),
    ("[DONE] alone",                    sse(b"data: [DONE]\n\n")),
    ("stop at once",                    sse(START, STOP)),
    ("no tokens, no stop",              sse(START, end_of(0))),
    ("clean end after start",           sse(START)),
    ("only pings and comments",         sse(PING, COMMENT)),
    ("nothing",                         sse()),
    ("an empty Content-Encoding",       Response(200, OVERLOADED, fields=(
                                            *SSE_FIELDS, ("Content-Encoding", "")))),
)
EMPTY_MESSAGE, BOOM = message(tokens=0), {"message": "boom"}      # the first one is recorded
FAILED_MESSAGES = (
    # content of the 200
    EMPTY_MESSAGE, message(text(""), text(""), tokens=0), message(text("x"), error=BOOM),
    {"type": "error", "error": BOOM}, {"error": BOOM}, {"choices": []}, b'[{"type":"message"}]',
    plain(message(text("x"))).chunks[0][:-9], b"<html>login</html>", b"")
GOOD_MESSAGES = (
    # content of the 200
    message(text("x")), message(tokens=0, reason="refusal"), message(tokens=0, reason="max_tokens"),
    message(tokens=5), message(text("x"), tokens=0), message(text("x"), error=None),
    message({"type": "tool_use", "name": "f"}, tokens=0), b"x" * (1024 * 1024 + 1))
ENCODINGS = (
    # Content-Encoding, function that encodes
    (None, bytes), ("gzip", gzip.compress), ("deflate", zlib.compress))
DROPPED = (
    # label                             response of antigravity
    ("no byte",                         Response(hangup=True)),
    ("not HTTP",                        Response(raw=b"SSH-2.0-OpenSSH_9.6\r\n\r\n")),
    ("half a head",                     Response(raw=b"HTTP/1.1 200 OK\r\nContent-Type: text/ev")),
    ("two lengths",                     Response(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n"
                                                     b"Content-Length: 3\r\n\r\n{} ")),
    ("a malformed chunk",               Response(raw=sse().head() + b"zz\r\n")),
    ("before an event",                 sse(cut=True)),
    ("before content",                  sse(START, PING, NO_TEXT, cut=True)),
    ("before the end of a message",     Response(200, b'{"type":"message"', cut=True)),
)


class RescueTest(AutoTest):
    """An attempt that fails before the client has a byte is answered by the other target."""

    def assert_rescued(self, response, failures, target="/v1/messages", **members):
        """The other target answers; this many failures are counted."""
        self.script_anew(response)
        reply, calls = self.ask(target=target, **members)
        self.assert_served(reply, "claude", 2)
        self.assertIn(calls, ("ac", "aac"))     # a kept connection that drops is sent to again
        self.assert_state("antigravity", failureCount=failures, timeoutCount=0)

    def test_each_failing_status_is_rescued_and_counted(self):
        for status in (400, 401, 402, 403, 404, 408, 422, 429, 499, 500, 502, 503, 504, 529, 599):
            with self.subTest(status):
                self.assert_rescued(error(status), 1)

    def test_stream_without_content_is_rescued_and_counted(self):
        for label, response in FAILED_STREAMS:
            with self.subTest(label):
                self.assert_rescued(response, 1)

    def test_200_that_is_no_message_is_rescued_and_counted(self):
        for content, encoding in itertools.product(FAILED_MESSAGES, ENCODINGS):
            for streamed in (True, False):
                with self.subTest(content, encoding=encoding[0], stream=streamed):
                    self.assert_rescued(plain(content, *encoding), 1, stream=streamed)

    def test_dropped_connection_is_rescued_and_neutral(self):
        good = whole("antigravity").wire()
        cuts = [("after %d bytes" % end, Response(raw=good[:end]))
                for end in range(1, good.index(b"event: content_block_delta"), 20)]
        for label, response in (*DROPPED, *cuts):
            with self.subTest(label):
                self.assert_rescued(response, 0)

    def test_good_message_is_the_response(self):
        cases = [(content, *encoding) for content in GOOD_MESSAGES for encoding in ENCODINGS]
        for content, encoding, encode in [*cases, (b"\x0b\x02\x80", "br", bytes)]:
            with self.subTest(str(content)[:99], encoding=encoding):
                self.script(plain(content, encoding, encode))
                reply = self.ask_for("a", stream=False)
                self.assertEqual(reply.body, self.scripts["antigravity"].chunks[0])
        self.script(plain(b""))
        reply = self.rrouter.request("HEAD", "/v1/messages", chat())
        self.assertEqual((reply.status, reply.header("x-rrouter-attempts")), (200, "1"))
        self.assert_untouched()

    def test_other_paths_are_judged_by_their_first_event(self):
        self.assert_rescued(sse(), 1, CHAT)
        self.assert_rescued(sse(COMMENT, b'data: {"error":{"message":"boom"}}\n\n'), 1, CHAT)
        first = b'data: {"choices":[{"delta":{}}]}\n\n'
        self.script_anew([plain({}), sse(first, DATA_ERROR), sse(first, b"", gate=self.gate())])
        for body in (b"{}", first + DATA_ERROR):
            self.assertEqual(self.rrouter.post(target=CHAT).body, body)
        self.begin_until(first, target=CHAT)
        self.assert_untouched()

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


COMMITS = (
    # label                     what the client gets at once
    ("text",                    START + PING + DELTA),
    ("thinking",                START + block(type="thinking", thinking="")),
    ("a call",                  START + block(type="tool_use", name="f", input={})),
    ("a block with text",       START + block(type="text", text="x")),
    ("tokens",                  START + end_of(5)),
    ("no number of tokens",     START + event("message_delta", delta={"stop_reason": "end_turn"})),
    ("a refusal",               START + end_of(0, "refusal")),
    ("max_tokens: 0",           START + end_of(0, "max_tokens")),
    ("CRLF",                    (START + DELTA).replace(b"\n", b"\r\n")),
    ("no event line",           b"data: " + DELTA.partition(b"data: ")[2]),
    ("error null",              b'data: {"type":"content_block_delta","error":null}\n\n'),
    ("text like an error",      START + text_of("\nevent: error\ndata: {}\n\n")),
    ("a mebibyte",              PING * 30000),
)


class HeldBackTest(AutoTest):
    """A response is held back as long as it can still fail; after that nothing waits."""

    def test_stream_is_held_back_until_its_first_content(self):
        for prelude in (START, PING + COMMENT, START + NO_TEXT + NO_MORE_TEXT, START + DELTA[:-1]):
            with self.subTest(prelude):
                gate, chunks = self.gate(), (prelude, *events_of("antigravity"))
                self.script(sse(*chunks, gate=gate))
                connection = self.begin()
                self.assert_silent(connection)
                gate.set()
                reply = read_reply(connection)
                self.assertEqual((reply.complete, reply.body), (True, b"".join(chunks)))

    def test_first_content_commits(self):
        for label, first in COMMITS:
            with self.subTest(label):
                gate = self.gate()
                self.script(sse(first, PING, STOP, gate=gate))
                with self.opened() as response:
                    self.assertEqual(receive(response, len(first)), first)
                    gate.set()
                    self.assertEqual(response.read(), PING + STOP)
        self.assert_untouched()

    def test_compressed_stream_is_not_held_back(self):
        packed = gzip.compress(START + DELTA + STOP)
        self.script(Response(200, (packed[:9], packed[9:]), gate=self.gate(), fields=(
            *SSE_FIELDS, ("Content-Encoding", "gzip"))))
        self.begin_until(packed[:9])


LATE_FAILURES = (
    # label                             chunks
    ("recorded: overloaded",            (START, NO_TEXT, PING, DELTA, OVERLOADED)),
    ("recorded: without its end",       (START, NO_TEXT, PING, DELTA)),
    ("recorded: error after the end",   (START + NO_TEXT + DELTA, NO_MORE_TEXT + end_of(0) + STOP,
                                         BROKEN_OFF)),
    ("without message_stop",            (START, DELTA, end_of(5))),
    ("in the chunk of the content",     (START + DELTA + OVERLOADED,)),
    ("before the end",                  (START, DELTA, OVERLOADED, end_of(5), STOP)),
    ("error without an event line",     (START, DELTA, DATA_ERROR, STOP)),
    ("byte by byte",                    (START + DELTA, *map(bytes, zip(OVERLOADED)))),
    ("CRLF",                            ((START + DELTA + OVERLOADED).replace(b"\n", b"\r\n"),)),
)


class LateFailureTest(AutoTest):
    """A failure after the first content is forwarded as it is, and counts without a rescue."""

    def assert_forwarded(self, response, complete):
        self.script_anew(response)
        reply = self.ask_for("a")
        self.assertEqual((reply.status, reply.complete), (200, complete))
        self.assertEqual(reply.body, b"".join(response.chunks))

    def test_error_or_missing_end_counts(self):
        for label, chunks in LATE_FAILURES:
            with self.subTest(label):
                self.assert_forwarded(sse(*chunks), True)
                self.assert_state("antigravity", failureCount=1)

    def test_broken_response_is_broken_off_and_neutral(self):
        good = b"".join(events_of("antigravity"))
        cuts = range(good.index(NO_MORE_TEXT), len(good) - len(STOP), 20)
        for response in (Response(200, b"x" * (1024 * 1024 + 1), cut=True),
                         *(sse(good[:end], cut=True) for end in cuts)):
            self.assert_forwarded(response, False)
            self.assert_untouched()

    def test_recorded_truncation_that_looks_complete_is_a_success(self):
        self.assert_forwarded(sse(START + NO_TEXT + DELTA, NO_MORE_TEXT + end_of(0) + STOP), True)
        self.assert_untouched()

    def test_target_switched_to_is_left_only_after_it_has_answered_once(self):
        broken = sse(START, DELTA)
        self.script(broken, [broken] * 4 + [None] + [broken] * 3)
        self.ask_for("a a a" " c c c c" " c" " c c c" " a")

    def test_client_that_leaves_after_message_stop_has_a_complete_response(self):
        self.script([error(500), sse(START + DELTA + STOP, PING, gate=self.gate())])
        self.ask()
        self.leave(self.begin_until(STOP))
        self.assert_untouched()


TOO_LARGE = "prompt is too long: 210000 tokens > 200000 maximum"
RANKED = (
    # rank, response of a target: the client gets the one of the lower rank, or the first
    *((0, lambda target, status=status: error(status, target, fields=(
        ("Retry-After", "9"), ("x-should-retry", "false")))) for status in (400, 409, 422)),
    (1, lambda target: error(429, target)),
    *((2, lambda target, status=status: error(status, target)) for status in (401, 403)),
    (3, lambda target: error(404, target)),
    *((4, lambda target, status=status: error(status, target)) for status in (500, 529, 408)),
    (5, lambda target: error(504, target)),
    (6, lambda target: error(503, "auth_unavailable: no auth available " + target)),
    (6, lambda target: error(429, "All credentials for model %s are cooling down" % target)),
    (6, lambda target: error(429, target, "model_cooldown")),
    (6, lambda target: error(400, "unknown provider for model " + target)),
    (7, lambda target: sse(PING, b": %b\n\n" % target.encode(), OVERLOADED)),
    (7, lambda target: plain({"error": target})),
    (8, lambda target: Response(hangup=True)),
)


class BothFailTest(AutoTest):
    """If both targets fail, the client gets the more useful response, and nothing counts."""

    def test_more_useful_response_is_forwarded_byte_for_byte(self):
        for (first, make_first), (second, make_second) in itertools.product(RANKED, repeat=2):
            responses = make_first("antigravity"), make_second("claude")
            with self.subTest([response.wire() for response in responses]):
                self.script(*responses)
                reply = self.ask()[0]
                if min(first, second) == 8:
                    self.assert_error(reply, 502, self.upstream.url)
                    continue
                best, target = list(zip(responses, ("antigravity", "claude")))[second < first]
                self.assertEqual((reply.status, reply.body), (best.status, b"".join(best.chunks)))
                self.assertEqual(upstream_fields(reply)[:len(best.fields)], best.fields)
                self.assertEqual((reply.header("x-rrouter-target"),
                                  reply.header("x-rrouter-attempts")), (target, "2"))
        self.assert_untouched()

    def test_too_large_for_one_target_ranks_below_429_and_5xx_of_the_other(self):
        for refusal in (error(400, TOO_LARGE), error(413, "x"), error(422, "Input is too long")):
            for other, best in ((error(429), 429), (error(500), 500), (error(529), 529),
                                (error(404), refusal.status), (EMPTY_STREAM, refusal.status),
                                (error(409), None)):
                for pair in ((refusal, other), (other, refusal)):
                    self.script(*pair)
                    self.assertEqual(self.ask()[0].status, best or pair[0].status)
        self.assert_untouched()

    def test_outage_of_both_moves_nothing(self):
        for response in (error(500), SHELF_503, Response(hangup=True)):
            self.script(response, response)
            for _ in range(11):
                self.assertGreaterEqual(self.ask()[0].status, 500)
            self.assert_untouched()
        self.script()
        self.ask_for("a")


TOO_LARGE_WORDINGS = (
    # status, message
    (400, TOO_LARGE), (400, "Your input exceeds the context window of this model"),
    (400, "The input token count (9) exceeds the maximum number of tokens allowed (8)."),
    (400, "Input is too long for requested model."), (400, "PROMPT TOKEN COUNT OF 9 exceeds"),
    (422, "capability_rejected: prompt_too_long"), (400, "context length exceeded"),
    (400, "Request too large"), (413, "whatever"))
REJECTION = error(400, "messages.1.content.0: Invalid `signature` in `thinking` block")
HISTORY = [{"role": "assistant", "content": [
    {"type": "thinking", "thinking": "", "signature": "x"}, text("x")]}]
OF_A_ROUTER = error(503, fields=(("x-rrouter-error", "1"),))


class NeutralTest(AutoTest):
    """An outcome that says nothing about the target changes no counter."""

    def test_request_too_large_for_one_target_is_rescued_and_neutral(self):
        for status, words in TOO_LARGE_WORDINGS:
            with self.subTest(words):
                self.script(error(status, words))
                self.assert_served(self.ask()[0], "claude", 2)
        self.assert_untouched()
        self.script(error(500, TOO_LARGE))
        self.ask()
        self.assert_state("antigravity", failureCount=1)

    def test_own_error_of_another_rrouter_is_forwarded_and_neutral(self):
        self.script(OF_A_ROUTER)
        reply = self.ask_for("a a a a")
        self.assertEqual((reply.status, reply.header("x-rrouter-error")), (503, "1"))
        self.assert_untouched()

    def test_count_tokens_is_neutral(self):
        self.script(error(500, "as it is"))
        for _ in range(4):
            reply = self.rrouter.post(target=COUNT_TOKENS)
            self.assertEqual((reply.status, reply.header("x-rrouter-attempts")), (500, "1"))
        self.assert_untouched()
        self.ask()
        self.script()
        self.rrouter.post(target=COUNT_TOKENS)
        self.assert_state("antigravity", failureCount=1)

    def test_request_without_a_model_is_neutral(self):
        for response in (error(500), error(429), Response(hangup=True), sse(), REJECTION):
            self.script(other=response)
            for method, target, body in (("GET", "/v1/models", None), ("POST", "/v1/messages", b""),
                                         ("POST", "/v1/messages", b'{"model":null}'),
                                         ("POST", "/v1/messages", b'["model"]')):
                reply = self.rrouter.request(method, target, body)
                self.assertIn(reply.status, (response.status, 502))
                self.assertIsNone(reply.header("x-rrouter-target"))
        self.assert_untouched()

    def test_body_without_a_model_is_not_healed_however_it_is_cut(self):
        self.script(other=REJECTION)
        body = json.dumps({"messages": HISTORY}).encode()
        data = request_bytes(body=body)
        for cut in (len(data) - len(body), len(data) - 9):
            with self.rrouter.connect() as connection:
                connection.sendall(data[:cut])
                self.assert_silent(connection)      # or the kernel joins both segments
                connection.sendall(data[cut:])
                self.assertEqual(read_reply(connection).status, 400)
        self.assertEqual(self.calls(), "--")

    def test_healed_response_is_judged_and_the_client_gets_the_original_400(self):
        for failure in (error(500), EMPTY_STREAM, error(429), REJECTION):
            self.script_anew([REJECTION, failure])
            self.assert_served(self.ask_for("aac", messages=HISTORY), "claude", 2)
            self.assert_state("antigravity", failureCount=1)
            self.script([REJECTION, failure], error(429))
            self.assertEqual(self.ask_for("aac", messages=HISTORY).body, REJECTION.chunks[0])
            self.assert_state("antigravity", failureCount=1)

    def test_refused_request_has_the_header_of_own_errors_and_a_line_in_the_log(self):
        for status, data in ((400, b"GET /\r\n\r\n"),
                             (403, b"GET / HTTP/1.1\r\nHost: evil\r\n\r\n"),
                             (431, b"GET / HTTP/1.1\r\nX: %b" % (b"x" * 70000))):
            self.assertEqual(self.assert_refused(data, status).header("x-rrouter-error"), "1")
            wait_until(lambda: "[REFUSED] %d" % status in self.rrouter.log())


class OneEventTest(AutoTest):
    """Failures of requests that ran side by side count once."""

    def test_forty_requests_that_fail_together_count_once(self):
        gate = self.gate()
        self.script(error(529, before=gate))
        connections = [self.begin() for _ in range(40)]
        gate.set()
        for connection in connections:
            self.assert_served(read_reply(connection), "claude", 2)
        self.assert_state("antigravity", failureCount=1, switchCount=0, models={})

    def test_time_is_that_of_the_failure_however_long_the_rescue_takes(self):
        gate, rescues = self.gate(), [self.gate() for _ in range(12)]
        self.script(error(529, before=gate), [stream(before=rescue) for rescue in rescues])
        for _ in rescues:
            self.begin()
        gate.set()
        self.upstream.wait(lambda upstream: len(upstream.received) == 24)
        for left, rescue in zip(range(11, -1, -1), rescues):
            rescue.set()
            wait_until(lambda: self.rrouter.health()["activeRequests"] == left)
            self.later(1)
        self.assert_state("antigravity", failureCount=1)


class ClientLeavesTest(AutoTest):
    """A client that leaves is neutral unless it has waited for too long."""

    limits = {"TICK_S": 0.05}

    def assert_counted(self, timeouts, seconds, response, received=b"", **members):
        """A client receives these bytes and leaves after some time: so many timeouts count."""
        self.script_anew(response)
        connection = self.begin_until(received, **members)
        self.later(seconds)
        self.leave(connection)
        self.upstream.wait(lambda upstream: upstream.closed == 1)
        self.assertEqual(self.calls(), "a")
        self.assert_state("antigravity", failureCount=0, timeoutCount=timeouts)

    def test_silence_of_120_s_that_the_client_ends_is_a_timeout(self):
        for label, response, received in (
                ("before the head", self.silent(), b""),
                ("in a stream", sse(START + DELTA, DELTA, gate=self.gate()), DELTA),
                ("comments alone", slowly(COMMENT), b""),
                ("pings alone", sse(START + DELTA, *slowly(PING).chunks, pause_s=0.02), DELTA)):
            for seconds, timeouts in ((0, 0), (119, 0), (121, 1)):
                with self.subTest(label, seconds=seconds):
                    self.assert_counted(timeouts, seconds, response, received)
        self.assert_counted(0, 121, self.silent(), stream=False)

    def test_event_ends_the_silence(self):
        for late in (text_of("later"), NO_MORE_TEXT):
            gates = [self.gate() for _ in range(3)]
            gates[0].set()
            self.script(sse(START + DELTA, late, PING, gate=gates))
            connection = self.begin_until(DELTA)
            self.later(100)
            gates[1].set()
            receive_until(connection, late)
            self.later(100)
            self.leave(connection)
            self.assert_untouched()

    def test_client_that_left_before_the_failure_gets_no_second_attempt(self):
        gate = self.gate()
        for response in (error(500, before=gate), sse(PING, OVERLOADED, gate=gate)):
            gate.clear()
            self.script_anew(response)
            self.begin().close()
            gate.set()
            self.leave()
            self.assertEqual(self.calls(), "a")
            self.assert_untouched()

    def test_client_that_leaves_during_the_rescue_leaves_a_failure_after_60_s_counted(self):
        for seconds, failures in ((0, 0), (59, 0), (61, 1)):
            with self.subTest(first_attempt_s=seconds):
                gate = self.gate()
                self.script_anew(error(500, before=gate), self.silent())
                connection = self.begin()
                self.later(seconds)
                gate.set()
                self.upstream.wait(lambda upstream: self.calls() == "ac")
                self.leave(connection)
                self.assert_state("antigravity", failureCount=failures, timeoutCount=0)


def retry_after(value, name="Retry-After"):
    return error(429, fields=((name, value),))


COOLDOWNS = (
    # seconds of at most 4 hours, last of three failures
    (90, retry_after("90")), (90.5, retry_after("90.5")), (14400, retry_after("86400")),
    (90, retry_after("90500", "retry-after-ms")), (90, retry_after("90\r\nRetry-After: 90")),
    (60, retry_after("5")), (60, retry_after("Fri, 27 Nov 2020 01:16:59 GMT")),
    (14400, retry_after("soon")), (3723, error(429, "Your quota will reset after 1h2m3s.")),
    (7200, QUOTA_429), (14400, error(429)), (90, error(503, fields=(("Retry-After", "90"),))))


class SwitchTest(AutoTest):
    """Three failures in a row switch the target, or one model of it."""

    def test_health_and_log_show_the_switch(self):
        self.trip()
        self.assert_state("claude", active=True, switched=True, switchCount=1, failureCount=0,
                          timeoutCount=0, models={}, cooldownSeconds=1800,
                          reason="3 consecutive HTTP errors, last 429")
        self.assertTrue(1790 <= self.auto()["cooldownRemainingSeconds"] <= 1800)
        self.assert_logged(r"antigravity.*\b429\b.*\b2\b")
        self.assert_logged("SWITCH antigravity -> claude: 3 consecutive HTTP errors, last 429; "
                           r"retry in 30m\b")
        self.assertEqual((self.ask()[1], self.ask(HAIKU)[1]), ("c", "c"))

    def test_cooldown_is_shortened_by_the_last_failure_but_never_lengthened(self):
        self.configure(auto_config(cooldownMinutes=[240]))
        for seconds, failure in COOLDOWNS:
            with self.subTest(failure.fields + list(failure.chunks)):
                self.script_anew([retry_after("70"), error(429), failure])
                self.ask_for("ac ac ac")
                self.assert_state("claude")
                self.assertAlmostEqual(self.auto()["cooldownRemainingSeconds"], seconds, delta=5)

    def test_target_that_fails_in_its_turn_is_left_at_once_and_the_next_cooldown_is_longer(self):
        for seconds in (1800, 3600, 7200):
            self.trip()
            self.assert_state("claude", cooldownSeconds=seconds)
            self.ask()
            self.script(claude=error(503))
            self.ask_for("ca ca ca")
            self.assertFalse(self.auto()["retryAt"])
        self.assert_state("antigravity", switchCount=6)
        self.assert_logged("SWITCH claude -> antigravity: 3 consecutive HTTP errors, last 503")

    def test_exhausted_model_switches_and_recovers_alone(self):
        self.script(lambda received: error(429) if "opus" in received.model
                    else whole("antigravity"))
        for _ in range(3):
            self.assertEqual((self.ask(OPUS)[1], self.ask(HAIKU)[1]), ("ac", "a"))
        self.assert_state("antigravity", switched=False, switchCount=0)
        model = self.auto()["models"][OPUS]
        self.assertEqual((model["currentTarget"], model["switchCount"], model["cooldownSeconds"]),
                         ("claude", 1, 1800))
        self.assertEqual([self.ask(name)[1] for name in (OPUS, HAIKU, SONNET)], ["c", "a", "a"])
        self.trip(model=HAIKU)                          # the whole, and opus keeps its own machine
        self.assertEqual(self.auto()["models"][OPUS]["retryAt"], model["retryAt"])
        self.later(1801)
        self.script()
        self.assertEqual([self.ask(name)[1] for name in (HAIKU, OPUS, OPUS)], ["a", "a", "a"])
        self.assert_state("antigravity", models={})

    def test_auto_again_clears_everything(self):
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
                self.assert_untouched()


class SilenceTest(AutoTest):
    """A timeout, after 0.3 s here, is rescued; two switch the target."""

    config, limits = auto_config(firstByteTimeoutSeconds=0.3), {"TICK_S": 0.05}

    def test_two_timeouts_switch(self):
        self.script(self.silent())
        for count in (1, 2):
            self.assert_served(self.ask()[0], "claude", 2)
            self.upstream.wait(lambda upstream: upstream.closed >= count)   # not left running
            if count == 1:
                self.assert_state("antigravity", timeoutCount=1, failureCount=0)
        self.assert_state("claude", timeoutCount=0, switchCount=1)
        self.assert_logged("SWITCH antigravity -> claude: 2 .*timeouts.*; retry in 30m")

    def test_limit_runs_until_the_first_content_or_the_last_byte(self):
        gate = self.gate()
        for label, response in (
                ("half a head", Response(raw=(sse().head()[:40], b""), gate=gate)),
                ("no content", sse(PING + START + NO_TEXT, STOP, gate=gate)),
                ("half a message", Response(200, (b'{"type":', b"}"), gate=gate)),
                ("comments for ever", slowly(COMMENT)), ("pings for ever", slowly(PING)),
                ("blank lines for ever", Response(200, (b"\n",) * 999, pause_s=0.02))):
            with self.subTest(label):
                self.script_anew(response)
                self.assert_served(self.ask(stream="lines" not in label)[0], "claude", 2)
                self.assert_state("antigravity", timeoutCount=1, failureCount=0)

    def test_request_without_stream_has_twice_the_limit(self):
        self.script(self.silent())
        slow, quick = self.begin(OPUS, stream=False), self.begin(HAIKU)
        for connection in (slow, quick):
            self.assert_served(read_reply(connection), "claude", 2)
        self.assertEqual(self.upstream.models()[2:], [HAIKU, OPUS])

    def test_timeout_counts_unless_the_other_target_is_silent_or_drops_too(self):
        for first, second, status, timeouts in (
                (None, error(529), 529, 1), (None, error(400), 400, 1), (None, SHELF_503, 503, 1),
                (error(529), None, 529, 0), (None, None, 504, 0),
                (None, Response(hangup=True), 504, 0)):
            with self.subTest([first and first.status, second and second.status]):
                self.script_anew(first or self.silent(), second or self.silent())
                reply = self.ask()[0]
                self.assertEqual((reply.status, reply.header("x-rrouter-attempts")), (status, "2"))
                self.assertEqual(reply.header("x-rrouter-error"), "1" if status == 504 else None)
                self.assert_state("antigravity", failureCount=0, timeoutCount=timeouts)

    def test_client_that_leaves_during_the_rescue_leaves_the_timeout_counted(self):
        self.script(self.silent(), self.silent())
        connection = self.begin()
        self.upstream.wait(lambda upstream: self.calls() == "ac")
        self.leave(connection)
        self.assert_state("antigravity", failureCount=0, timeoutCount=1)

    def test_nothing_else_has_a_limit(self):
        gate = self.gate()
        self.script(lambda received: Response(before=gate) if "count" in received.target
                    else sse(START + DELTA, STOP, gate=gate), other=Response(before=gate))
        waiting = [self.begin(), self.begin(target=COUNT_TOKENS), self.begin(model=None)]
        self.set_mode("claude")
        self.script(claude=stream(before=gate))
        waiting.append(self.begin())
        self.set_mode("auto")
        self.script(self.silent())      # when these expire, theirs would have expired
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
        self.assert_untouched()


class ShelfTest(AutoTest):
    """After a shelf response asking again is free: the cooldown is one minute."""

    def switch_by(self, *failures):
        self.script_anew(list(failures))
        self.ask_for("ac ac ac")
        self.assert_state("claude", switched=True, switchCount=1)
        self.script()

    def test_switch_by_the_shelf_lasts_a_minute_and_does_not_raise_n(self):
        model_cooldown = Response(429, b'{"error":{"code":"model_cooldown"}}', framing="length")
        for failures, reason in (
                ((error(500), SHELF_503, SHELF_503), "last 503 auth_unavailable, after 500"),
                ((INVALID_KEY_401, SHELF_503, SHELF_503), "last 503 auth_unavailable, after 401"),
                ((SHELF_503, error(500), SHELF_503), "last 503 auth_unavailable, after 500"),
                ((error(401), COOLING_429, COOLING_429), "after 401"),
                ((error(500), SHELF_503, model_cooldown), "after 500"),
                ((UNKNOWN_400,) * 3, "last 400"), ((SHELF_503,) * 3, "last 503 auth_unavailable")):
            with self.subTest(reason):
                self.script_anew(error(500))
                self.rrouter.post(target=COUNT_TOKENS)      # this alone shelves a credential
                self.switch_by(*failures)
                self.assert_state("claude", cooldownSeconds=60)
                self.assertIn(reason, self.auto()["reason"])
                self.later(61)
                self.ask_for("a")
                self.trip()
                self.assert_state("claude", cooldownSeconds=1800, switchCount=2)
        self.switch_by(SHELF_503, SHELF_503, error(500))
        self.assert_state("claude", cooldownSeconds=1800)

    def test_probe_that_fails_as_expected_starts_another_minute_and_is_no_switch(self):
        self.switch_by(error(401), SHELF_503, SHELF_503)
        before = self.auto()
        for failure in (SHELF_503, error(401), error(403), error(404), error(500), COOLING_429):
            self.later(61)
            self.script(failure)
            self.ask_for("ac c")
            after = self.auto()
            for name in ("switchCount", "switchedAt", "reason", "currentTarget"):
                self.assertEqual(after[name], before[name], name)
            self.assertTrue(50 < after["cooldownRemainingSeconds"] <= 60, after)
        self.later(61)
        self.script(error(429))             # a new failure is the next switch
        self.ask_for("ac")
        self.assert_state("claude", switchCount=2, cooldownSeconds=1800)

    def decisions(self):
        """Return the number of lines of auto mode, when all requests have theirs."""
        count = self.rrouter.health()["requestCount"]
        return wait_until(lambda: self.rrouter.log().count("[REQ]") == count
                          and self.rrouter.log().count("[AUTO]"))

    def test_probes_of_the_shelf_are_logged_when_the_response_changes(self):
        self.switch_by(*(SHELF_503,) * 3)
        for failure, is_logged in ((error(401), True), (SHELF_503, True), (SHELF_503, False),
                                   (SHELF_503, False), (error(403), True), (error(403), False)):
            before = self.decisions()
            self.later(61)
            self.script(failure)
            self.ask_for("ac")
            self.assertEqual(self.decisions() > before, is_logged, failure.status)


class ProbeTest(AutoTest):
    """After the cooldown one request probes the target that failed."""

    def trip_and_wait(self):
        self.set_mode("auto")
        self.trip()
        self.later(1801)
        self.upstream.clear()

    def test_a_session_stays_where_it_sent_lately_when_another_one_recovers_the_target(self):
        other = {"fields": (("X-Claude-Code-Session-Id", "S"),)}
        self.trip()
        self.script()
        self.later(1700)
        self.ask_for("c", **other)
        self.later(101)
        self.ask_for("a a")
        self.ask_for("c", **other)
        self.set_mode("auto")
        self.ask_for("a", **other)

    def test_successful_probe_recovers_the_target(self):
        self.trip_and_wait()
        self.script()
        self.ask_for("a a")
        self.assert_state("antigravity", switched=False, switchCount=1, failureCount=0)
        self.assert_logged("probe of antigravity")
        self.assert_logged("recover")

    def test_probe_succeeds_when_it_commits(self):
        self.trip_and_wait()
        gate = self.gate()
        self.script([sse(START + DELTA, OVERLOADED, gate=gate)])
        probe = self.begin_until(DELTA)
        self.assert_state("antigravity", switched=False, failureCount=0)
        gate.set()
        receive_until(probe, b"0\r\n\r\n")
        self.assert_state("antigravity", switched=False, failureCount=1)

    def test_one_request_probes_while_all_others_stay_and_its_failure_is_the_next_switch(self):
        self.trip_and_wait()
        gate = self.gate()
        self.script(error(500, before=gate))
        connections = [self.send() for _ in range(9)]
        self.upstream.wait(lambda upstream: len(upstream.received) == 9)
        self.assertEqual(sorted(self.calls()), list("a" + "c" * 8))
        self.ask_for("c", OPUS)
        gate.set()
        self.assertEqual({read_reply(one).status for one in connections}, {200})
        self.assert_state("claude", switchCount=2, cooldownSeconds=3600, failureCount=0)
        self.ask_for("c")

    def test_neutral_probe_is_followed_by_the_next_after_a_minute(self):
        for label, antigravity, claude in (
                ("dropped", Response(hangup=True), None), ("both fail", error(500), error(500)),
                ("too large", error(400, TOO_LARGE), None), ("own error", OF_A_ROUTER, None),
                ("the client leaves", self.silent(), None)):
            with self.subTest(label):
                self.trip_and_wait()
                self.script(antigravity, claude)
                if label == "the client leaves":
                    self.leave(self.begin())
                else:
                    self.ask()
                self.assertEqual(self.calls()[0], "a")
                self.script()
                self.ask_for("c")
                self.assert_state("claude", switchCount=1)
                self.later(61)
                self.assert_served(self.ask_for("a"), "antigravity", 1)

    def test_probe_that_needs_healing_recovers(self):
        self.trip_and_wait()
        self.script([REJECTION, None])
        self.assert_served(self.ask_for("aa", messages=HISTORY), "antigravity", 1)
        self.assert_state("antigravity", switched=False)

    def test_only_messages_with_a_rule_probe(self):
        self.trip_and_wait()
        self.assertEqual([self.rrouter.post(*request).header("x-rrouter-target") for request in (
            ("gpt-9",), (SONNET, COUNT_TOKENS))], ["claude", "claude"])
        self.get()
        self.assertEqual(self.calls(), "-c-")
        self.ask_for("ac")


class HookTest(AutoTest):
    """auto.onSwitch: a program that runs at each move."""

    limits = {"HOOK_S": 0.5}
    NOTE = ("import sys; print('noise'); open(sys.argv[1], 'a').write(' '.join(sys.argv[2:] + "
            "[chr(10)]))")

    def test_it_runs_at_each_switch_and_recovery_with_the_words_as_arguments(self):
        path = self.rrouter.home.dir / "moves"
        self.configure(auto_config(onSwitch=[
            sys.executable, "-c", self.NOTE, str(path), "{from}>{to} $HOME {}", "{scope}|{reason}",
            "{minutes}"]))
        self.trip()
        wait_until(path.exists)
        self.script()
        self.later(1801)
        self.ask_for("a")
        wait_until(lambda: path.read_text().count("\n") == 2)
        self.assertEqual(path.read_text().splitlines(), [
            "antigravity>claude $HOME {} auto|3 consecutive HTTP errors, last 429 30 ",
            "claude>antigravity $HOME {} auto|answers again 0 "])

    def test_one_that_fails_or_hangs_delays_nothing_and_has_one_line(self):
        for command, words in (
                (["/nowhere"], "/nowhere: [Errno 2] No such file"),
                (["a\0"], "a\\x00: embedded null byte"),
                (["sh", "-c", "exit 3"], "sh: ended with status 3"),
                (["sh", "-c", "sleep 60; true"], "sh: did not end within 0.5 s")):
            self.configure(auto_config(onSwitch=command))
            self.set_mode("auto")
            before, start = len(self.rrouter.log()), time.monotonic()
            self.trip()
            self.assertLess(time.monotonic() - start, 0.4)
            wait_until(lambda: self.rrouter.log()[before:].count("onSwitch: " + words) == 1)
        if LINUX:                       # what it had started is gone too
            wait_until(lambda: len(processes(self.rrouter.home)) == 1)


class UpstreamAwayTest(AutoTest):
    """A request waits up to 15 s for an upstream that is not there, and that is neutral."""

    @staticmethod
    def upstream_class():
        return Upstream(port=free_port())       # which no other socket takes while it is closed

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
            self.later(6)               # the first time came before rrouter had begun to wait
        reply = read_reply(connection)
        self.assert_error(reply, 502, "127.0.0.1:%d" % self.upstream.port)
        self.assertEqual(reply.header("x-rrouter-error"), "1")
        return reply

    def test_restart_of_the_upstream_is_survived_in_every_mode(self):
        for mode, target in (("auto", "antigravity"), ("antigravity",) * 2, ("claude",) * 2):
            with self.subTest(mode):
                self.set_mode(mode)
                with self.away():
                    connection = self.send_and_wait()
                self.assert_served(read_reply(connection), target, 1)

    def test_second_miss_in_a_row_is_not_to_be_retried(self):
        for _ in range(2):
            with self.away():
                retries = [self.miss().header("x-should-retry") for _ in range(3)]
                self.assert_error(self.get(), 502)      # without a model: at once
            self.assertEqual(retries, [None, "false", "false"])
            self.ask_for("a")
        self.assert_untouched()

    def test_client_that_leaves_ends_the_waiting(self):
        with self.away():
            self.leave(self.send_and_wait())
        self.assertEqual(self.upstream.received, [])

    def test_second_attempt_does_not_wait_and_the_first_is_neutral(self):
        self.upstream.break_connections()

        def fail_and_go(_):
            self.upstream.stop_listening()
            return error(429, "last words", close=True)

        self.script(fail_and_go)
        self.assertEqual(self.ask_for("a").body, error(429, "last words").chunks[0])
        self.assert_untouched()
        with self.away():
            pass

    def test_streams_of_an_upstream_that_is_killed_are_broken_off_neutrally(self):
        self.script(sse(START + DELTA, STOP, gate=self.gate()))
        streams = [self.begin_until(DELTA) for _ in range(4)]
        self.upstream.break_connections(reset=True)
        with self.away():
            for connection in streams:
                self.assertFalse(read_all(connection).endswith(b"0\r\n\r\n"))
            waiting = [self.send() for _ in range(4)]
            self.script()
        for connection in waiting:
            self.assert_served(read_reply(connection), "antigravity", 1)
        self.assert_untouched()

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
        self.assert_untouched()
        wait_until(lambda: re.search(r"\[REQ\].*sent again", self.rrouter.log()))


class RequestLoopTest(AutoTest):
    """A request that comes back through another hop unwinds at the connection limit."""

    config, limits = auto_config(), {"CONNECTIONS_MAX": 40}
    config["modes"] = {target: {"mappings": [{"match": "*", "rewrite": target}]}
                       for target in ("antigravity", "claude")}

    def answer(self, received):
        """Be a hop that leads back to rrouter; CLIProxyAPI would drop the headers."""
        reply = self.rrouter.request("POST", received.target, received.body)
        fields = [("x-rrouter-error", reply.header("x-rrouter-error"))] * (not self.drops_headers)
        return Response(reply.status, reply.body, framing="length", fields=fields)

    def test_request_loop_unwinds_at_the_connection_limit(self):
        for mode, self.drops_headers in (("claude", False), ("auto", False), ("auto", True)):
            self.set_mode(mode)
            before, start = self.rrouter.health()["requestCount"], time.monotonic()
            reply = self.rrouter.post()
            self.assert_error(reply, 503)
            self.assertLess(time.monotonic() - start, 5)
            self.leave()
            self.assertLessEqual(self.rrouter.health()["requestCount"] - before, 40)
        self.assert_untouched()


class TruncatedTlsTest(TlsTest, AutoTest):
    """A TLS connection that ends without close_notify, as the scripted one does, is broken."""

    def test_response_that_ends_with_the_connection_is_broken(self):
        response = plain(message(text("x")))
        response.framing = "close"
        self.script(response)
        self.assert_served(self.ask(stream=False)[0], "claude", 2)
        self.assert_untouched()
        self.set_mode("antigravity")
        self.assertFalse(self.ask(stream=False)[0].complete)


class SingleAttemptTest(AutoTest):
    """Explicit modes, and names that both targets would get, have one attempt and no judge."""

    RESPONSES = (error(429, "as it is"), error(500), sse(OVERLOADED), sse(), EMPTY_STREAM,
                 plain(EMPTY_MESSAGE), plain(b"<html>"))

    def assert_forwarded(self, response, target, model=SONNET):
        before = len(self.upstream.received)
        reply = self.rrouter.post(model)
        self.assertEqual((reply.status, reply.body, reply.complete),
                         (response.status, b"".join(response.chunks), True))
        self.assertEqual((reply.header("x-rrouter-target"), reply.header("x-rrouter-attempts"),
                          len(self.upstream.received) - before), (target, "1", 1))

    def test_explicit_mode_neither_rescues_nor_counts(self):
        for mode in ("antigravity", "claude"):
            self.set_mode(mode)
            for response in self.RESPONSES:
                self.script(response, response)
                self.assert_forwarded(response, mode)
            self.assertFalse(self.auto()["active"])

    def test_outcome_of_an_explicit_mode_does_not_reach_auto(self):
        self.set_mode("antigravity")
        gate = self.gate()
        self.script(sse(PING, OVERLOADED, gate=gate))
        connection = self.begin_until(PING)         # not held back
        self.set_mode("auto")
        gate.set()
        receive_until(connection, b"0\r\n\r\n")
        self.assert_untouched()

    def test_name_without_a_rule_goes_once_to_the_current_target(self):
        for response in self.RESPONSES:
            self.script(other=response)
            self.assert_forwarded(response, "antigravity", "gpt-9")
        self.script(other=sse(PING, STOP, gate=self.gate()))
        self.begin_until(PING, model="gpt-9")
        self.assert_untouched()
        self.trip()
        self.scripts[None] = error(500)
        self.assert_forwarded(error(500), "claude", "gpt-9")

    def test_rule_matches_the_very_name_whatever_it_holds(self):
        config = auto_config()
        config["modes"]["antigravity"]["mappings"] = [
            {"match": "claude-opus-4-8[1m]", "rewrite": "gemini-long"}]
        self.configure(config)
        self.assert_served(self.ask("claude-opus-4-8[1m]")[0], "antigravity", 1)
        self.assertEqual(self.upstream.models(), ["gemini-long"])


class RestartTest(AutoTest):
    """The state, and a request under way, when rrouter ends."""

    def test_switch_by_the_shelf_is_one_after_a_kill_too(self):
        self.script(SHELF_503)
        self.ask_for("ac ac ac")
        state = self.rrouter.home.dir / "state.json"
        wait_until(lambda: state.exists() and "auth_unavailable" in state.read_text())
        self.rrouter.kill()
        self.rrouter.start()
        self.ask_for("c")
        self.later(61)
        self.ask_for("ac")
        self.assert_state("claude", switchCount=1)
        self.assertTrue(50 < self.auto()["cooldownRemainingSeconds"] <= 60)

    def test_draining_rrouter_makes_no_second_attempt(self):
        gate = self.gate()
        self.script(error(500, "as it is", before=gate))
        connection = self.begin()
        self.rrouter.process.send_signal(signal.SIGTERM)
        wait_until(lambda: self.rrouter.home.health() is None)      # it accepts no more connections
        gate.set()
        self.assertEqual(read_reply(connection).body, error(500, "as it is").chunks[0])
        self.assertEqual(self.calls(), "a")
        self.rrouter.stop()
        self.rrouter.start()


REAL = (*(error(status) for status in (401, 404, 429, 500, 529)), EMPTY_STREAM,
        sse(PING, OVERLOADED), sse(), plain(EMPTY_MESSAGE))
SHELVED = SHELF_503, COOLING_429, UNKNOWN_400
INNOCENT = (*(response for _, response in DROPPED), error(400, TOO_LARGE))


class RandomFailuresTest(AutoTest):
    """Targets fail at random: no client sees a failure unless both fail, and traffic stays home."""

    SEEDS = (int(os.environ["RROUTER_SOAK"]),) if SOAKING else (1, 2, 3)
    REQUESTS = 20_000 if SOAKING else 400

    def test_traffic_is_away_only_during_a_cooldown_that_three_failures_earned(self):
        self.configure(auto_config(cooldownMinutes=[30]))
        for seed in self.SEEDS:
            with self.subTest(seed=seed):
                self.set_mode("auto")
                self.walk(random.Random(seed))

    def walk(self, dice):
        """Send requests one by one, with time passing in between.

        `earned` has for the whole target (None) and for each model: the failures of home in a row
        that claude rescued, and when the cooldown ends that they earned at most.
        """
        earned, seen = collections.defaultdict(lambda: (0, 0.0)), collections.Counter()
        rates, good = [0, 0], [b"".join(events_of(target)) for target in ("antigravity", "claude")]
        for number in range(self.REQUESTS):
            if dice.random() < 0.1:
                rates = [dice.choice((0, 0, 0.3, 1)) for _ in rates]
            self.later(dice.choice((0, 0, 0, 1, 20, 61, 400, 1801)))
            model = dice.choice((SONNET, SONNET, OPUS, HAIKU))
            home, away = [dice.choice(dice.choice((REAL, REAL, SHELVED, INNOCENT)))
                          if dice.random() < rate else None for rate in rates]
            self.script(home, away)
            now, alone = time.time() + self.shifts[0], self.auto()["models"].get(model)
            reply, calls = self.ask(model)
            calls, what = re.sub(r"(.)\1", r"\1", calls), (number, calls, dict(earned), reply)
            served = reply.complete and reply.body in good
            self.assertEqual(served, not (home and away), what)
            if calls[0] == "c" and not home and not (
                    alone and alone["currentTarget"] == "antigravity"):     # it probes claude
                self.assertTrue(any(count >= 3 and now < end for count, end in
                                    (earned[None], earned[model])), what)
            for scope in (model,) if alone else (None, model):
                earned[scope] = self.learned(*earned[scope], calls, home, away)
            seen[calls, served] += 1
        self.assertEqual(len(seen), 6, seen)            # a, c, ac, ca; ac and ca in vain

    def learned(self, count, end, calls, home, away):
        """Return what a scope has earned after a request that has shown this of the targets."""
        now = time.time() + self.shifts[0]
        if calls == "a":
            return 0, 0.0
        if calls[0] == "a" and (away or home in INNOCENT) and count >= 3:
            return count, max(end, now + 60)            # after a neutral probe
        if calls == "ac" and not away and home not in INNOCENT:
            return count + 1, max(end, now + (60 if home in SHELVED else 1800))
        return count, end

    def test_clients_side_by_side_see_no_failure_that_the_other_target_could_avoid(self):
        dice, failures = random.Random(self.SEEDS[0]), REAL + SHELVED + INNOCENT
        failing = [dice.choice((None, "antigravity", "claude")) for _ in range(self.REQUESTS)]

        def respond(received):
            number, target = received.json()["number"], target_of(received)
            if failing[number // 20] == target:
                return failures[number * 7919 % len(failures)]
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


# Healing ######################################################################

def nested(message):
    """Return a refusal as Antigravity writes it: JSON in the message of Google's error."""
    inner = json.dumps({"type": "error",
                        "error": {"type": "invalid_request_error", "message": message}})
    return json.dumps({"error": {"code": 400, "message": inner, "status": "INVALID_ARGUMENT"}})


def refusal(wording):
    """Return a 400 of this wording in Anthropic's shape; bytes are the whole body, in gzip."""
    if isinstance(wording, str):
        return error(400, wording, "invalid_request_error")
    return Response(400, gzip.compress(wording), fields=[("Content-Encoding", "gzip")])


INVALID_SIGNATURE = "messages.1.content.0: Invalid `signature` in `thinking` block"
CORRUPTED_SIGNATURE = "Corrupted thought signature."
SIGNATURE_REFUSALS = (
    INVALID_SIGNATURE, nested(INVALID_SIGNATURE), CORRUPTED_SIGNATURE,
    "messages.1.content.0.thinking.signature: Field required",
    "messages.1.content.0: `thinking` or `redacted_thinking` blocks in the latest assistant "
    "message cannot be modified. These blocks must remain as they were in the original response.",
    "'thinking' or 'redacted_thinking' blocks in the latest assistant message cannot be modified",
    "messages.3.content.1: Invalid data in `redacted_thinking` block",
    "Invalid signature in redacted_thinking", "Invalid thought signature.",
    "Thought signature is not valid",
    b'{"error":{"code":400,"message":"Corrupted thought signature.","status":"INVALID_ARGUMENT"}}',
)
OTHER_RESPONSES = (
    *(error(400, wording, "invalid_request_error") for wording in (
        "prompt is too long: 210000 tokens > 200000 maximum", "thinking.type: Field required",
        "unknown provider for model gemini-claude-sonnet-4-5-thinking",
        "thinking.budget_tokens: Input should be greater than or equal to 1024")),
    error(500, INVALID_SIGNATURE), error(429, INVALID_SIGNATURE),
)

# Blocks of a history as bytes: each block that stays must stay byte-identical.
THINKING = b'{"type":"thinking","thinking":"so ]},{ \\"type\\":\\"text\\"","signature":"c2ln"}'
THINKING_LATE = b'{"signature":"x","thinking":"","type":"thinking"}'
REDACTED = b'{"type":"redacted_thinking","data":"ZW5j"}'
TEXT = (b'{"type":"text","text":"caf\\u00e9 \\ud83d \\u2028 {\\"type\\":\\"thinking\\"}","n":-0,'
        b'"f":1E400,"f":1.50}')
TOOL_USE = (b'{"type":"tool_use","id":"t","name":"f","input":{"type":"thinking","content":'
            b'[{"type":"thinking"},{"type":"redacted_thinking"}],"x":1e-7}}')
TOOL_RESULT = b'{"type":"tool_result","tool_use_id":"t","content":[{"type":"text","text":"ok"}]}'


def conversation(*contents, model=SONNET):
    """Return the bytes of a request whose assistant turns have these lists of blocks."""
    turns = b",".join(
        b'{"role":"user","content":"go on"},{"role":"assistant","content":[%b]}' % b",".join(blocks)
        for blocks in contents)
    return (b'{"model":"%b","messages":[%b,{"role":"user","content":[%b]}],'
            b'"system":[{"type":"text","text":"thinking"}],"metadata":{"type":"thinking"},'
            b'"thinking":{"type":"adaptive","display":"omitted"},"max_tokens":9,"stream":true}' % (
                model.encode(), turns, TOOL_RESULT))


WITHOUT_THINKING = (
    # request with nothing to remove
    conversation([TEXT], [TOOL_USE]), chat(messages=[{"content": '"type":"thinking"'}]),
    chat(thinking={"type": "enabled"}, messages=[]), chat(messages="thinking"),
    chat(messages=[{"type": "thinking"}, 7, None, {"content": 7}]),
    b'{"model":"claude-sonnet-5-5","messages":[{"content":[{"type":"thinking"}]}',
)


class HealingTest(AutoTest):
    """A history with foreign signatures is sent again to the same target without its thinking."""

    BEFORE = ([THINKING, TEXT, TOOL_USE], [TEXT, REDACTED],
              [REDACTED, THINKING, TEXT, THINKING_LATE], [TEXT], [TEXT, THINKING, THINKING, TEXT])
    AFTER = ([TEXT, TOOL_USE], [TEXT], [TEXT], [TEXT], [TEXT, TEXT])
    HISTORY = conversation(*BEFORE)

    def send(self, body=HISTORY):
        """POST these bytes; return (reply, calls, what the upstream received)."""
        before = len(self.upstream.received)
        reply = self.rrouter.request(body=body)
        return reply, self.calls(before), self.upstream.received[before:]

    def test_each_wording_is_healed_in_every_mode(self):
        for mode, target, model in (("antigravity", "antigravity", GEMINI_SONNET),
                                    ("claude", "claude", SONNET),
                                    ("auto", "antigravity", GEMINI_SONNET)):
            self.set_mode(mode)
            for wording in SIGNATURE_REFUSALS:
                with self.subTest(mode=mode, wording=wording):
                    self.script(**{target: [refusal(wording), whole(target)]})
                    reply, calls, received = self.send()
                    self.assert_served(reply, target, 1)
                    self.assertEqual(calls, target[0] * 2)
                    self.assertEqual([r.body for r in received], [
                        conversation(*self.BEFORE, model=model),
                        conversation(*self.AFTER, model=model)])
                    self.assertEqual(self.auto()["failureCount"], 0)

    def test_healed_request_keeps_its_head(self):
        self.script(antigravity=[refusal(INVALID_SIGNATURE)])
        first, second = self.send()[2]
        self.assertEqual(first[:2], second[:2])
        self.assertEqual(end_to_end(first.fields), end_to_end(second.fields))
        self.assertEqual(second.header("content-length"), str(len(second.body)))

    def test_empty_content_gets_a_short_text(self):
        for blocks in ([THINKING], [REDACTED, THINKING], [THINKING_LATE, REDACTED]):
            with self.subTest(blocks):
                self.script(antigravity=[refusal(INVALID_SIGNATURE)])
                healed = self.send(conversation([TEXT], blocks, [THINKING, TEXT]))[2][1]
                content, = healed.json()["messages"][3]["content"]
                self.assertEqual(content["type"], "text")
                self.assertTrue(0 < len(content["text"].strip()) < 80, content)
                start, end = conversation([TEXT], [b"|"], [TEXT], model=GEMINI_SONNET).split(b"|")
                self.assertTrue(healed.body.startswith(start) and healed.body.endswith(end))

    def test_body_with_white_space_is_healed(self):
        document = json.loads(conversation([TEXT, THINKING], [REDACTED, TEXT], [THINKING, TEXT]))
        for indent in (1, "\t"):
            with self.subTest(indent=indent):
                self.script(antigravity=[refusal(INVALID_SIGNATURE)])
                body = json.dumps(document, indent=indent).encode()
                sent, healed = self.send(body)[2]
                expected = sent.json()
                self.assertEqual(expected, {**document, "model": GEMINI_SONNET})
                for message in expected["messages"]:
                    if isinstance(message["content"], list):
                        message["content"] = [block for block in message["content"]
                                              if "thinking" not in block["type"]]
                self.assertEqual(healed.json(), expected)
                self.assertTrue(healed.body.endswith(body[body.index(b'"system"'):]))

    def test_request_without_thinking_is_not_sent_again(self):
        response = refusal(CORRUPTED_SIGNATURE)
        self.script(antigravity=response)
        self.set_mode("antigravity")
        for body in WITHOUT_THINKING:
            with self.subTest(body):
                reply, calls, _ = self.send(body)
                self.assertEqual((reply.status, reply.body, calls), (400, response.chunks[0], "a"))

    def test_other_refusals_are_not_healed(self):
        self.set_mode("antigravity")
        for response in OTHER_RESPONSES:
            with self.subTest(response.wire()):
                self.script(antigravity=response)
                reply, calls, _ = self.send()
                self.assertEqual((reply.status, reply.body, calls),
                                 (response.status, response.chunks[0], "a"))

    def test_failed_healing_gives_the_original_response(self):
        first = refusal(INVALID_SIGNATURE)
        for mode in ("antigravity", "claude"):
            self.set_mode(mode)
            for second in (first, refusal("prompt is too long"), error(500), error(429),
                           Response(hangup=True)):
                with self.subTest(mode=mode, status=second.status):
                    self.script(**{mode: [first, second, second]})
                    reply, calls, _ = self.send()
                    self.assertEqual((reply.status, reply.body), (400, first.chunks[0]))
                    self.assertEqual(end_to_end(reply.fields), first.fields)
                    # A reused connection that drops is stale: the request goes out once more.
                    self.assertIn(calls, [mode[0] * 2, mode[0] * 3][:1 + second.hangup])

    def test_failed_healing_is_rescued_and_counts(self):
        self.script(antigravity=refusal(CORRUPTED_SIGNATURE))
        for count in (1, 2):
            reply, calls, received = self.send()
            self.assert_served(reply, "claude", 2)
            self.assertEqual((calls, received[2].body), ("aac", self.HISTORY))
            self.assert_state("antigravity", failureCount=count, timeoutCount=0, models={})

    def test_failed_healing_on_both_gives_the_first_original_response(self):
        first = refusal(CORRUPTED_SIGNATURE)
        self.script(antigravity=first, claude=refusal(INVALID_SIGNATURE))
        for _ in range(4):
            reply, calls, _ = self.send()
            self.assertEqual((reply.status, reply.body, calls), (400, first.chunks[0], "aacc"))
        self.assert_state("antigravity", failureCount=0, switchCount=0)

    def test_rescue_that_is_refused_for_its_signatures_is_healed_there(self):
        self.script(antigravity=error(529), claude=[refusal(INVALID_SIGNATURE)])
        reply, calls, received = self.send()
        self.assert_served(reply, "claude", 2)
        self.assertEqual((calls, received[2].body), ("acc", conversation(*self.AFTER)))
        self.assert_state("antigravity", failureCount=1)


# /health, log lines, secrets ##################################################

HEALTH = {
    # field: type
    "status": str, "version": str, "mode": str, "currentTarget": str, "defaultMode": str,
    "requestCount": int, "activeRequests": int, "uptimeSeconds": int, "pid": int, "startedBy": str,
    "listenAddr": str, "upstreamURL": str, "problems": list, "requests": dict, "instance": str,
    "autoSwitch": dict,
}
AUTO_SWITCH = {
    "active": bool, "targets": list, "currentTarget": str, "switched": bool, "switchCount": int,
    "failureCount": int, "timeoutCount": int, "models": dict, "reason": type(None),
    "switchedAt": type(None), "retryAt": type(None),
}


class StatusLineTest(LoopbackTest):
    """GET /health?line."""

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
        ({"cooldownRemainingSeconds": 0}, 1,
         "auto → claude (antigravity 429, now), 1 problem: rrouter status"),
        (HOME, 2, "auto → antigravity, 2 problems: rrouter status"),
        ({**HOME, "models": {"opus": AUTO}}, 0,
         "auto → antigravity, opus → claude (antigravity 429, 23m)"),
        ({**HOME, "models": dict.fromkeys("abcd", HOME)}, 0,
         "auto → antigravity, a → antigravity, b → antigravity, 2 more"),
        ({"active": False}, 0, "claude"),
    )

    def test_it_says_where_requests_go_and_why(self):
        for changes, problems, line in self.LINES:
            with self.subTest(line):
                self.assertEqual(line, rrouter.status_line({
                    "mode": "claude", "problems": ["x"] * problems,
                    "autoSwitch": {**self.AUTO, **changes}}))

    def test_it_says_who_answered_a_session(self):
        auto = {**self.AUTO, "models": {"opus": {**self.AUTO, "reason": "2 consecutive timeouts"}}}
        for models, active, line in (
                (("claude-opus-5-5", "gemini-3.8-flash"), True,
                 "asked opus-5-5, answered gemini-3.8-flash (antigravity 429, 23m)"),
                (("opus", "b"), True, "asked opus, answered b (antigravity timeouts, 23m)"),
                (("claude-x", "claude-x"), False,
                 "asked x, answered x, 1 problem: rrouter status")):
            with self.subTest(line):
                health = {"mode": "claude", "problems": ["x"] * (not active)}
                self.assertEqual(line, rrouter.status_line(
                    {**health, "autoSwitch": {**auto, "active": active}}, models))

    def test_it_is_one_line_of_text(self):
        running = self.start_rrouter("http://127.0.0.1:9", mode="auto")
        for target in ("/health?line", "/health?session=1&line"):
            reply = running.request("GET", target, fields=())
            self.assertEqual((reply.header("content-type"), reply.body.decode()),
                             ("text/plain; charset=utf-8", "auto → antigravity\n"))
        self.assertEqual(running.request("HEAD", "/health?line", fields=()).body, b"")
        self.assertEqual(running.request("GET", "/health?lines", fields=()).json()["mode"], "auto")


class ModeInTargetTest(RouterTest):
    """A target that begins with /@MODE; the mode file says antigravity."""

    TARGETS = (
        # target of the client,               the upstream's,         model there
        ("/@claude/v1/messages?beta=true",    "/v1/messages?beta=true", SONNET),
        ("/@CL%61ude/v1/x%2F?/@y",            "/v1/x%2F?/@y",         SONNET),
        ("/@auto/v1/x",                       "/v1/x",                GEMINI_SONNET),
        ("http://localhost/@claude/a",        "/a",                   SONNET),
        ("/@claude",                          "/",                    SONNET),
        ("/@claude?a",                        "/?a",                  SONNET),
        ("/@claude/@auto/v1/messages",        "/@auto/v1/messages",   SONNET),
        ("/v1/@claude/messages",              "/v1/@claude/messages", GEMINI_SONNET),
        ("//@claude/v1",                      "//@claude/v1",         GEMINI_SONNET),
    )

    def test_it_is_served_in_that_mode_and_goes_on_without_it(self):
        for target, forwarded, model in self.TARGETS:
            with self.subTest(target):
                self.upstream.clear()
                self.assertEqual(self.rrouter.post(target=target).status, 200)
                (received,) = self.upstream.received
                self.assertEqual((received.target, received.model), (forwarded, model))
        wait_until(lambda: " POST /@claude/@auto/v1/messages " in self.rrouter.log())

    def test_unknown_one_is_refused_with_the_names_of_the_modes(self):
        before = self.rrouter.health()["requestCount"]
        for target in ("/@gemini/v1/messages", "/@/v1/messages", "/@gemini/health?line"):
            reply = self.assert_refused(request_bytes("GET", target), 404)
            self.assert_error(reply, 404, "defined are antigravity, claude, auto")
        self.assertEqual(self.rrouter.health()["requestCount"], before)

    def test_health_shows_it(self):
        for mode, line in (("claude", "claude"), ("auto", "auto → antigravity")):
            self.assertEqual(self.get(f"/@{mode}/health").json()["mode"], mode)
            self.assertEqual(self.get(f"/@{mode}/health?line").body.decode(), line + "\n")


class SessionTest(RouterTest):
    """GET /health?line&session=ID."""

    def line(self, session):
        return self.get("/health?line&session=" + session).body.decode().strip()

    def post_as(self, session, model=SONNET, target="/v1/messages", **members):
        return self.rrouter.post(model, target, (("x-claude-code-session-id", session),), **members)

    def test_it_names_the_models_of_its_last_answered_request(self):
        self.post_as("one")
        self.post_as("two 2", target="/@claude/v1/messages")
        self.post_as("two 2", "x", target="/v1/messages/count_tokens")
        self.upstream.play(error(429))
        self.post_as("one", "claude-opus-5-5")
        self.assertEqual(self.line("one"), "asked sonnet-5-5, answered " + GEMINI_SONNET)
        self.assertEqual(self.line("two%202"), "asked sonnet-5-5, answered sonnet-5-5")
        self.assertEqual((self.line("three"), self.line("")), ("antigravity",) * 2)

    def test_only_the_last_256_and_the_beginning_of_names_are_kept(self):
        for number in range(257):
            self.post_as(f"s{number}", "m")
        self.post_as("i" * 300, "m")
        self.post_as("s9", "x\n" * 999)
        long = "x\\n" * 20 + "..."
        self.assertEqual([self.line(session) for session in ("s0", "s1", "i" * 300, "s9")],
                         ["antigravity", "asked m, answered m", "antigravity",
                          f"asked {long}, answered {long}"])


class AgentRuleTest(RouterTest):
    """Rules for agents and classes, through the router."""

    config = {**DEFAULT_CONFIG, "modes": {**DEFAULT_CONFIG["modes"], "antigravity": {"mappings": [
        {"match": "*", "rewrite": "large", "agent": "explore"},
        {"match": "*", "rewrite": "small", "class": "compaction"}]}}}

    def test_headers_and_system_prompt_choose_the_rule(self):
        system = [{"type": "text", "text": "You are oh-my-claudecode:explore"}]
        for fields, members, model in (
                ((), {}, SONNET), ((), {"system": system}, "large"),
                ((("X-Claude-Code-Agent-Type", "Explore"),), {}, "large"),
                ((("x-claude-code-request-class", "compaction"),), {}, "small"),
                ((("x-claude-code-request-class", "main"),), {}, SONNET)):
            with self.subTest(fields=fields, members=members):
                self.upstream.clear()
                self.rrouter.post(fields=fields, **members)
                self.assertEqual(self.upstream.received[0].model, model)
                self.assertEqual(self.upstream.received[0].fields[1:-1], [*fields])
        self.assertEqual(self.rrouter.health()["problems"], [])


class HealthTest(RouterTest):

    def test_every_field_has_its_type_and_value(self):
        health = self.rrouter.health()
        for table, fields in ((HEALTH, health), (AUTO_SWITCH, health["autoSwitch"])):
            for name, kind in table.items():
                self.assertIs(type(fields[name]), kind, name)
        self.assertLessEqual({"cooldownSeconds", "cooldownRemainingSeconds"},
                             set(health["autoSwitch"]))
        expected = {
            "status": "ok", "version": rrouter.__version__, "pid": self.rrouter.process.pid,
            "startedBy": "serve", "listenAddr": "localhost:%d" % self.rrouter.port,
            "upstreamURL": self.upstream.url, "problems": [], "activeRequests": 0}
        self.assertEqual({name: health[name] for name in expected}, expected)
        self.assertTrue(0 <= health["uptimeSeconds"] < 3600)

    def test_current_target_is_the_mode_or_in_auto_the_target_that_serves(self):
        for mode, target in (("antigravity", "antigravity"), ("claude", "claude"),
                             ("auto", "antigravity")):
            with self.subTest(mode):
                self.rrouter.home.write("mode", mode + "\n")
                health = self.rrouter.health()
                self.assertEqual((health["mode"], health["currentTarget"], health["defaultMode"]),
                                 (mode, target, "claude"))
                auto = health["autoSwitch"]
                self.assertEqual(
                    (auto["active"], auto["targets"], auto["currentTarget"], auto["switched"]),
                    (mode == "auto", ["antigravity", "claude"], "antigravity", False))

    def test_only_get_and_head_of_health_are_answered_here(self):
        for method, target, is_ours in (
                ("GET", "/health", True), ("HEAD", "/health", True), ("GET", "/health?x=1", True),
                ("POST", "/health", False), ("DELETE", "/health", False),
                ("GET", "/health/x", False), ("GET", "/healthz", False), ("GET", "/", False)):
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

    def test_results_of_requests_are_counted_and_the_last_failure_is_kept(self):
        def results():
            return dict(self.rrouter.health()["requests"])

        before = results()
        self.rrouter.post()
        self.rrouter.home.write("mode", "auto\n")
        self.upstream.play(error(503), stream())
        self.rrouter.post()                         # rescued
        self.rrouter.home.write("mode", "claude\n")
        self.upstream.play(error(429))
        self.rrouter.post()
        after = results()
        self.assertEqual([after[name] - before[name] for name in ("answered", "rescued", "failed")],
                         [1, 1, 1])
        failure = after["lastFailure"]
        self.assertEqual((failure["target"], failure["what"]), ("claude", "429"))
        self.assertRegex(failure["at"], r"^20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ$")

    def test_proxied_requests_are_counted_and_no_others(self):
        before, gate = self.rrouter.health()["requestCount"], self.gate()
        self.upstream.play(Response(), error(500), Response(hangup=True), Response(hangup=True))
        self.rrouter.post()
        self.rrouter.post()
        self.rrouter.request("POST", "/v1/messages", b"[]")
        self.upstream.clear()
        self.get("/health")
        self.get("/", (("Origin", "null"),))
        self.converse(b"GET / HTTP/1.1\r\nHost: evil.com\r\n\r\n", "GET")
        self.converse(b"GET / HTTP/1.1\r\n\r\n", "GET")
        self.upstream.play(Response(before=gate))
        with self.rrouter.connect() as connection:
            connection.sendall(request_bytes("POST", "/", b"[]"))
            self.upstream.wait(lambda upstream: upstream.received)
            health = self.rrouter.health()
            self.assertEqual((health["requestCount"], health["activeRequests"]), (before + 4, 1))
            gate.set()
            self.assertEqual(read_reply(connection).status, 200)
        self.assertEqual(self.rrouter.health()["activeRequests"], 0)

    def test_it_names_neither_user_nor_paths_nor_requests(self):
        """The problems of every file included."""
        home, canary = self.rrouter.home, "cAnArY"
        self.upstream.play(error(500, canary), Response())
        self.rrouter.post(target="/v1/%s?%s" % (canary, canary), system=canary,
                          fields=(("X-Api-Key", canary),))
        home.write("config.json", "{")
        home.write("mode", "nosuch\n")
        logs = home.dir / "logs"
        logs.rename(home.dir / "kept")
        logs.write_text("")                 # a file in the place of the directory
        try:
            wait_until(lambda: len(self.rrouter.health()["problems"]) == 3)
            text = json.dumps(self.rrouter.health())
        finally:
            logs.unlink()
            (home.dir / "kept").rename(logs)
            (home.dir / "config.json").unlink()
            home.write("mode", self.mode + "\n")
        for secret in (canary, str(home.root), os.path.expanduser("~"), ".rrouter", "sk-test"):
            self.assertNotIn(secret, text)
        wait_until(lambda: not self.rrouter.health()["problems"])


class WebPageTest(RouterTest):
    """A web page tries to spend the user's quota; GuardTest has the plain cases."""

    # A page can let a name it owns point to 127.0.0.1; its requests are then not cross-site.
    FOREIGN_NAMES = (
        "localtest.me", "localhost.localdomain", "ip6-localhost", "127.0.0.2", "127.000.000.001",
        "[::ffff:127.0.0.1]", "[0:0:0:0:0:0:0:1]", "[::1%25lo]", "localhost..",
        "localhost%00.evil.com", "localhost:8316.evil.com", "localhost:8316@evil.com",
        "localhost\\.evil.com", "localhost;evil.com", "*", "%6cocalhost", "localhost:99999999")
    REFUSED = (
        "Sec-Fetch-Site: CROSS-SITE", "sec-fetch-site:cross-site",
        "Sec-Fetch-Site: same-origin\r\nSec-Fetch-Site: cross-site", "Origin:",
        "Origin: http://localhost https://evil.com", "Origin: http://localhost,https://evil.com",
        "Origin: //localhost", "Origin: localhost", "Origin: ws://localhost",
        "Origin: http://localhost/", "ORIGIN:\thttps://evil.com",
        # a request that needs no preflight, in whose body another one hides
        "Origin: null\r\nContent-Type: text/plain\r\nContent-Length: 38\r\n\r\n"
        "GET /hidden HTTP/1.1\r\nHost: localhost")
    SERVED = (
        "Host: localhost.", "Host: localhost:", "Host: \tLocalHost:8316 ", "Host: 127.0.0.1.:8316",
        "Host: localhost\r\nOrigin: HTTP://LOCALHOST:3000",
        "Host: localhost\r\nOrigin: https://[::1]", "Host: localhost\r\nSec-Fetch-Site: same-site")

    def test_name_that_resolves_to_this_machine_is_refused(self):
        for name in self.FOREIGN_NAMES:
            for head in ("GET /health HTTP/1.1\r\nHost: %s\r\n",
                         "GET http://%s/health HTTP/1.1\r\nHost: localhost\r\n",
                         "GET /v1/models HTTP/1.1\r\nHost: localhost\r\nOrigin: http://%s\r\n",
                         "POST / HTTP/1.0\r\nHost: %s\r\nSec-Fetch-Site: same-origin\r\n"):
                with self.subTest(head % name):
                    self.assert_refused((head % name + "\r\n").encode(), 400, 403)

    def test_headers_of_browsers_count_in_any_case_and_on_any_line(self):
        for lines in self.REFUSED:
            with self.subTest(lines):
                data = "POST / HTTP/1.1\r\nHost: localhost\r\n%s\r\n\r\n" % lines
                self.assert_refused(data.encode(), 403)

    def test_unusual_spellings_of_this_machine_are_served(self):
        for lines in self.SERVED:
            with self.subTest(lines):
                data = "GET / HTTP/1.1\r\n%s\r\n\r\n" % lines
                self.assertEqual(self.converse(data.encode(), "GET")[0].status, 200)


REQUEST_LINE = re.compile(
    r"\[REQ\] #(?P<number>\d+) (?P<method>\S+) (?P<path>\S+) "
    r"((?P<model>.+) -> (?P<target>\S+) (?P<sent>.+) )?"
    r"(?P<status>\d{3}) (?P<seconds>\d+\.\d\d)s\b(?P<notes>.*)$")
LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}) \[[A-Z]+\] \S.*")


def request_lines(text):
    return [line for line in text.splitlines() if "[REQ]" in line]


class RequestLineTest(RouterTest):

    def lines_of(self, *acts):
        """Call each of `acts`; return the matches of REQUEST_LINE in the order of the numbers."""
        first = self.rrouter.health()["requestCount"]
        for act in acts:
            act()
        wait_until(lambda: self.rrouter.health()["activeRequests"] == 0)
        count = self.rrouter.health()["requestCount"] - first

        def found():
            lines = [REQUEST_LINE.search(line) for line in request_lines(self.rrouter.log())]
            self.assertNotIn(None, lines)
            new = [line for line in lines if int(line["number"]) > first]
            return sorted(new, key=lambda line: int(line["number"])) if len(new) >= count else None
        lines = wait_until(found) if count else []
        self.assertEqual([int(line["number"]) - first for line in lines],
                         list(range(1, count + 1)))
        return lines

    def leave(self):
        """Send a request and leave without its response."""
        self.upstream.play(Response(before=self.gate()))
        with self.rrouter.connect() as connection:
            connection.sendall(request_bytes(body=b'{"model":"m"}', port=self.rrouter.port))
            self.upstream.wait(lambda upstream: upstream.received)
        self.upstream.wait(lambda upstream: upstream.closed)

    def test_each_request_has_one_line_at_its_end(self):
        self.upstream.play(Response(), Response(), error(529), Response(raw=b"HTTP/1.1 x\r\n\r\n"),
                           Response())
        post = self.rrouter.post
        lines = self.lines_of(
            lambda: post("claude-sonnet-4-5"), lambda: post("other"), post, post,
            lambda: self.get("/v1/models?limit=1000"), self.rrouter.health, self.upstream.clear,
            self.leave)
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

    def test_message_has_the_tokens_that_its_response_reports(self):
        packed = gzip.compress(TokenReaderTest.BODY)
        self.upstream.play(
            stream(TokenReaderTest.WHOLE), stream(TokenReaderTest.WHOLE, framing="close"),
            Response(chunks=(packed,), fields=(("Content-Encoding", "gzip"),)), error(429),
            Response(chunks=(TokenReaderTest.BODY,)), Response(chunks=(TokenReaderTest.BODY,)))
        post, auto = self.rrouter.post, "/@auto/v1/messages"
        lines = self.lines_of(
            post, lambda: post(target=auto), lambda: post(target=auto), lambda: post(target=auto),
            lambda: post(target="/v1/messages/count_tokens"))
        self.assertEqual([line["notes"] for line in lines], [
            TokenReaderTest.NOTE, TokenReaderTest.NOTE, " in 5+0 out 6",
            " in 5+0 out 6 (antigravity failed: 429)", ""])

    def test_refused_request_has_a_line_with_its_status(self):
        before = len(self.rrouter.log())
        for data in (b"GET / HTTP/1.1\r\nHost: evil.com\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
                     b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n"):
            self.rrouter.exchange(data)
        wait_until(lambda: "[REFUSED] 413 " in self.rrouter.log()[before:])
        statuses = re.findall(r"\[REFUSED\] (\d+) \S", self.rrouter.log()[before:])
        self.assertEqual(statuses, ["403", "400", "413"])

    def test_control_characters_are_escaped(self):
        models = ("a\x1b[2Jb", "a\nb 2026 [REQ] #99 forged", "a\r\nX-Forged: 1", "a\tb", "a\0b",
                  "a\x7fb", "a\x9bb", "a\u2028b", "a\u202eb", "\ud83d", "a\x85b")
        targets = b"/\x1b[2J", b"/\x9b", "/한".encode(), b"/%1b%0a"
        before = len(self.rrouter.log())

        def ask():
            for model in models:
                self.assertIsNone(self.rrouter.post(model).header("x-forged"))
            for target in targets:
                self.rrouter.exchange(b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\n"
                                      b"Connection: close\r\n\r\n")
        self.assertGreaterEqual(len(self.lines_of(ask)), len(models))
        text = self.rrouter.log()[before:]
        self.assertEqual(set(filter(lambda c: unicodedata.category(c) in (
            "Cc", "Cf", "Cs", "Zl", "Zp"), text)), {"\n"})
        self.assertFalse([line for line in text.split("\n")
                          if line.startswith(("b 2026", "X-Forged"))])


class SecretsTest(LoopbackTest):
    """No header value, query or body is written anywhere, however a request ends.

    Each kind of place has its own word, so that a failure shows where the word came from.
    """

    FIELDS = ("Authorization", "X-Api-Key", "Cookie", "Proxy-Authorization", "anthropic-beta",
              "User-Agent", "Referer", "X-Claude-Code-Session-Id", "X-Anything")
    PLACES = ("header", "query", "body", "field", "answer", "reason", "chunk", "userinfo",
              "environment")

    def setUp(self):
        self.upstream = self.start_upstream()
        self.words = {place: "sk-%s-%08x" % (place, random.getrandbits(32))
                      for place in self.PLACES}
        self.target = "/v1/messages?key=" + self.words["query"]
        self.fields = [(name, "Bearer " + self.words["header"]) for name in self.FIELDS]

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
            "HTTP/1.1 %(reason)s\r\n\r\n", "%(reason)s\r\n\r\n",
            "HTTP/1.1 200 %(reason)s\r\n%(field)s\r\n\r\n",
            "HTTP/1.1 200 OK\r\nX: a\rb %(field)s\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: %(field)s\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: %(field)s\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%(chunk)s\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n%(chunk)s")
        return [
            (Response(200, words["answer"].encode(), fields=fields, reason=words["reason"]),),
            (error(500, words["answer"], fields=fields),
             error(429, words["answer"], words["answer"], fields)),
            (error(401, words["answer"], fields=fields), stream(chunk)),
            (error(502, "unknown provider for model " + words["answer"]),) * 2,
            (signature, stream(chunk)), (signature,) * 3, (stream(failed), stream(chunk)),
            (stream(chunk, failed),), (stream(chunk, cut=True),), (Response(hangup=True),) * 2,
            *((Response(raw=(text % words).encode()),) * 2 for text in broken)]

    def malformed(self):
        """Return requests full of secrets that are refused."""
        start = "POST /v1/messages?key=%(query)s HTTP/1.1\r\nHost: localhost\r\n"
        lines = (
            "Authorization %(header)s", "%(header)s", "X-Api-Key : %(header)s",
            "Authorization: Bearer\r\n %(header)s", "Cookie: %(header)s\0",
            "Content-Length: %(header)s", "Content-Length: 1\r\nContent-Length: %(header)s",
            "Transfer-Encoding: %(header)s", "Expect: %(header)s", "Host: %(header)s",
            "Origin: http://%(header)s", "Sec-Fetch-Site: cross-site\r\nReferer: %(header)s",
            "Cookie: " + "%(header)s" * 4000, "Transfer-Encoding: chunked\r\n\r\n%(body)s",
            "Transfer-Encoding: chunked\r\n\r\n3\r\n%(body)s\r\n0\r\n\r\n",
            "Content-Length: 9999\r\n\r\n%(body)s", "Content-Length: 999999999\r\n\r\n%(body)s")
        others = (
            "GET /x?key=%(query)s HTTP/9.9\r\nHost: localhost\r\n\r\n",
            "GET /x?key=%(query)s\r\n\r\n", "%(query)s\r\n\r\n", "GET /x?%(query)s",
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
        """Python's development mode prints more on stderr."""
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
                for data in self.malformed():
                    router.exchange(data.encode("latin-1"), half_close=True)
                self.break_off(router)
            for wanted in ("[AUTO]", "[HEAL]", " 502 ", " 499 ", "SWITCH"):
                wait_until(lambda: wanted in router.log())
            outputs = home.run_all(("status",), ("status", "--json"), ("check",))
            self.assert_silent(router.printed(), *(done.stdout + done.stderr for done in outputs),
                               files=home.dir)
            self.assertLessEqual({"run.json", "rrouter.pid", "state.json"},
                                 {path.name for path in home.dir.iterdir()})
        self.assert_silent(files=home.dir)

    # Functions of the standard library that fail, with the secrets in the exception.
    DEFECTS = (
        ("before the request is sent",
         "import http.client\ndef connect(self):\n    frame, found = sys._getframe(), []\n"
         "    while frame: found, frame = found + [repr(frame.f_locals)], frame.f_back\n"
         "    raise RuntimeError(found)\nhttp.client.HTTPConnection.connect = connect"),
        ("while the response is forwarded",
         "import socket\nreal = socket.socket.sendall\ndef sendall(sock, data, *flags):\n"
         "    if b'crash' in bytes(data): raise RuntimeError(bytes(data))\n"
         "    return real(sock, data, *flags)\nsocket.socket.sendall = sendall"),
    )

    def test_defect_is_logged_with_its_place_and_without_values(self):
        for what, code in self.DEFECTS:
            with self.subTest(what), Running(self.upstream, code=code,
                                             env={"PYTHONDEVMODE": "1"}) as router:
                self.upstream.play(Response(200, b'"crash %s"' % self.words["answer"].encode()))
                body = chat("crash", system=self.words["body"])
                with router.connect() as connection:
                    connection.sendall(request_bytes("POST", self.target, body, self.fields))
                    reply = read_reply(connection, "POST")          # an error of ours, or nothing
                self.upstream.clear()
                self.assertNotIn("RuntimeError", repr(reply))
                wait_until(lambda: "internal error: RuntimeError at " in router.log())
                self.assertNotIn("Traceback", router.printed())
                self.assert_silent(repr(reply), router.printed(), json.dumps(router.health()),
                                   files=router.home.dir)

    def test_password_in_the_environment_is_not_shown(self):
        home, password = self.make_home(), self.words["environment"]
        urls = [url % password for url in (
            "http://user:%s@127.0.0.1:8317", "https://%s@host/x", "user:%s@host:8317",
            "http:/user:%s@host")]
        for url in urls:
            with self.subTest(url), self.assertRaises(rrouter.UsageError) as caught:
                rrouter.read_environment({"RROUTER_UPSTREAM": url})
            self.assertIn("RROUTER_UPSTREAM", str(caught.exception))
            self.assert_silent(str(caught.exception))
        env = {"RROUTER_UPSTREAM": urls[0], "ANTHROPIC_API_KEY": password,
               "HTTP_PROXY": "http://x:%s@127.0.0.1:9" % password}
        for done in home.run_all(("serve",), ("start",), ("check",), env=env):
            self.assertNotEqual(done.returncode, 0)
            self.assertIn("RROUTER_UPSTREAM", done.stdout + done.stderr)
            self.assert_silent(done.stdout, done.stderr, files=home.root)


def ending_with(test, process):
    """Return the process, which ends with the test at the latest."""
    test.addCleanup(process.wait)
    test.addCleanup(process.kill)
    return process


class LogFileTest(LoopbackTest):
    """Rotation, times and stderr; HangingDiskTest, FullDiskTest and LogGoneTest have the faults."""

    LIMITS = {"LOG_MAX_BYTES": 100_000}
    # Rotation takes a while: both processes are in it at once.
    SLOW_DISK = ("import os, time\nreplace = os.replace\ndef slow(old, new):\n"
                 "    time.sleep(0.1 if '.log' in new else 0)\n    replace(old, new)\n"
                 "os.replace = slow")

    def setUp(self):
        self.upstream = self.start_upstream(stream())

    def fill(self, home):
        """Leave an almost full log and two older ones; return {name: content}."""
        logs = home.dir / "logs"
        logs.mkdir(mode=0o700)
        old = {"rrouter.log": (b"newest".ljust(79) + b"\n") * 1215, "rrouter.log.1": b"older\n",
               "rrouter.log.2": b"oldest\n"}
        for name, content in old.items():
            (logs / name).write_bytes(content)
        return old

    def assert_rotated_once(self, home, old, numbers):
        """The old files have moved on, and each numbered request has its line in one file."""
        logs = home.dir / "logs"
        files = {path.name: path.read_bytes() for path in logs.iterdir()}
        self.assertEqual(set(files), {*old, "rrouter.log.3"})
        self.assertEqual((files["rrouter.log.2"], files["rrouter.log.3"]),
                         (old["rrouter.log.1"], old["rrouter.log.2"]))
        self.assertTrue(files["rrouter.log.1"].startswith(old["rrouter.log"]))
        text = (files["rrouter.log.1"][len(old["rrouter.log"]):] + files["rrouter.log"]).decode()
        self.assertTrue(text.endswith("\n"))
        self.assertEqual([line for line in text.splitlines() if not LOG_LINE.fullmatch(line)], [])
        found = re.findall(r"\[REQ\] #\d+ GET /numbered/(\d+) 200 ", text)
        self.assertEqual(sorted(map(int, found)), list(numbers))
        self.assertIn(b"/numbered/", files["rrouter.log"])

    def test_two_processes_rotate_the_file_they_share_once_and_lose_no_line(self):
        home = self.make_home(self.upstream, "claude")
        old, logs = self.fill(home), home.dir / "logs"
        beside = copy.copy(home)
        beside.port = free_port()
        beside.env = dict(home.env, RROUTER_PORT=str(beside.port))
        options = {"code": self.SLOW_DISK, "limits": self.LIMITS}
        with Running(self.upstream, home=home, **options) as one, \
                Running(self.upstream, home=beside, **options) as other, \
                concurrent.futures.ThreadPoolExecutor(8) as pool:

            def ask(number):
                router = (one, other)[number % 2]
                return router.request("GET", "/numbered/%d" % number, None, ()).status

            self.assertEqual(set(pool.map(ask, range(120))), {200})
            wait_until(lambda: len(os.listdir(str(logs))) == 4 and (logs / "rrouter.log").exists())
            self.assertEqual(set(pool.map(ask, range(120, 240))), {200})
        self.assert_rotated_once(home, old, range(240))
        self.assertEqual(stat.S_IMODE((logs / "rrouter.log").stat().st_mode), 0o600)

    # Another process rotates the log %r just before this one locks it to do so.
    OVERTAKEN = (
        "import fcntl, os\nlog, real, done = %r, fcntl.flock, []\ndef flock(descriptor, how):\n"
        "    if not done and os.path.samestat(os.fstat(descriptor), os.stat(log)):\n"
        "        done.append(True)\n        for number in '21':\n"
        "            os.replace(log + '.' + number, log + '.%%d' %% (int(number) + 1))\n"
        "        os.replace(log, log + '.1')\n        os.close(os.open(log, os.O_CREAT, 0o600))\n"
        "    return real(descriptor, how)\nfcntl.flock = flock")

    def test_file_that_another_process_has_just_rotated_is_not_rotated_again(self):
        home = self.make_home(self.upstream, "claude")
        old, code = self.fill(home), self.OVERTAKEN % str(home.dir / "logs" / "rrouter.log")
        with Running(self.upstream, home=home, code=code, limits=self.LIMITS) as router:
            for number in range(80):
                router.request("GET", "/numbered/%d" % number, None, ())
        self.assert_rotated_once(home, old, range(80))

    def test_line_has_the_local_date_and_time_of_its_end(self):
        home = self.make_home(self.upstream, "claude", env={"TZ": "KST-9"})
        clock, midnight = home.root / "clock", calendar.timegm((2031, 12, 31, 15, 0, 0))

        def set_clock(seconds):
            (home.root / "next").write_text("%.3f" % seconds)
            (home.root / "next").rename(clock)

        set_clock(midnight - 0.5)
        code = ("import time\ndef now():\n    with open(%r) as file:\n"
                "        return float(file.read())\ntime.time = now" % str(clock))
        with Running(self.upstream, home=home, code=code, env=home.env) as router:
            for number, seconds in enumerate((-0.5, 0.25, 0.75, 60.0), 1):
                set_clock(midnight + seconds)
                router.post()
                wait_until(lambda: len(request_lines(router.log())) == number)
        stamps = [LOG_LINE.fullmatch(line).group(1) for line in request_lines(router.log())]
        self.assertEqual(stamps, ["2031-12-31 23:59:59.500", "2032-01-01 00:00:00.250",
                                  "2032-01-01 00:00:00.750", "2032-01-01 00:01:00.000"])

    def test_stderr_that_takes_nothing_stops_nothing(self):
        """A terminal after Ctrl-S, or a pager."""
        home = self.make_home(self.upstream, "claude",
                              dict(DEFAULT_CONFIG, auto={"failureThreshold": 1000}))
        unread, stderr = os.pipe()
        with open(unread, "rb"), open(stderr, "wb") as writer:
            os.set_blocking(stderr, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(stderr, b"x" * 4096)
            os.set_blocking(stderr, True)
            process = ending_with(self, home.begin("serve", stderr=writer))
            router = Running.__new__(Running)           # only to ask it
            router.port, router.home = home.port, home
            wait_until(home.health)
            for mode in ("claude", "auto", "antigravity"):
                home.write("mode", mode + "\n")
                if mode == "auto":
                    self.upstream.play(error(500))
                self.assertEqual(router.post().status, 200)
            with router.connect() as connection, connection.makefile("rb") as reader:
                for _ in range(100):
                    connection.sendall(request_bytes(body=chat(), port=router.port))
                    self.assertEqual(read_reply_from(reader).status, 200)
            process.send_signal(signal.SIGTERM)
            self.assertEqual(process.wait(WAIT_S), 0)
        text = home.read("logs/rrouter.log")
        numbers = [int(REQUEST_LINE.search(line)["number"]) for line in request_lines(text)]
        self.assertEqual(sorted(numbers), list(range(1, 104)))
        # The lines of one connection are in order.
        self.assertEqual([number for number in numbers if number > 3], list(range(4, 104)))
        self.assertIn("[AUTO]", text)


# Load and long life ###########################################################

def processor_seconds(pid):
    """Return the processor time that process `pid` has used."""
    fields = pathlib.Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


Usage = collections.namedtuple("Usage", "threads descriptors resident_kb")


def usage_of(process):
    """Return what a process holds; all 0 without /proc."""
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
        if resource:                    # macOS allows fewer sockets than these tests open
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            wanted = 2048 if limits[1] == resource.RLIM_INFINITY else min(limits[1], 2048)
            if limits[0] != resource.RLIM_INFINITY and limits[0] < wanted:
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, limits[1]))
                cls.addClassCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
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
        """Threads and descriptors are as `before`, and hardly more memory is in use."""
        end = time.monotonic() + WAIT_S
        while True:
            after = self.at_rest()
            if after[:2] == before[:2] and after.resident_kb <= before.resident_kb + resident_kb:
                return
            self.assertLess(time.monotonic(), end, "%s have become %s" % (before, after))

    def assert_prompt(self, count):
        """Requests on new connections are answered in a short time, in the median."""
        seconds = []
        for _ in range(count):
            start = time.monotonic()
            self.assertEqual(self.rrouter.post().status, 200)
            seconds.append(time.monotonic() - start)
        self.assertLess(statistics.median(seconds), 0.25, seconds)


class CrowdOfClientsTest(LoadTest):

    def connect_many(self, stack, clients, count):
        """Open connections until there are `count` clients, all of them accepted."""
        while len(clients) < count:
            clients.append(stack.enter_context(self.rrouter.connect()))
            if len(clients) % 100 == 0:
                self.rrouter.health()

    def test_idle_clients_slow_no_other_down_and_those_beyond_the_cap_are_refused(self):
        before = self.at_rest()
        with contextlib.ExitStack() as stack:
            clients = []
            self.connect_many(stack, clients, 500)
            for client in clients[::2]:
                client.sendall(request_bytes("GET", "/first"))
                self.assertEqual(read_reply(client).status, 200)
            self.assert_prompt(9)
            for client in clients:
                client.sendall(request_bytes("GET", "/again"))
            self.assertEqual([read_reply(client).status for client in clients], [200] * 500)
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

    def test_dripping_clients_slow_no_other_down_and_are_served_in_the_end(self):
        """In the head and in the body."""
        before, body = self.at_rest(), chat("drip", padding="x" * 50)
        whole = request_bytes("POST", "/v1/messages", body)
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(self.rrouter.connect()) for _ in range(100)]
            begun = [number % 4 * (len(whole) - len(body)) // 3 + 20 for number in range(100)]
            for client, at in zip(clients, begun):
                client.sendall(whole[:at])
            for step in range(3):
                for client, at in zip(clients, begun):
                    client.sendall(whole[at + step:at + step + 1])
                self.assert_prompt(5)
            self.assertFalse([r for r in self.upstream.received if b"drip" in r.body])
            for client, at in zip(clients, begun):
                client.sendall(whole[at + 3:])
            self.assertEqual([read_reply(client).status for client in clients], [200] * 100)
            received = [r.body for r in self.upstream.received if b"drip" in r.body]
            self.assertEqual(received, [body] * 100)
        self.assert_nothing_gathered(before, 16 * 1024)

    @unittest.skipUnless(SOAKING, "--soak waits until the time for a head is over")
    def test_head_that_drips_without_end_is_timed_out(self):
        print("soak: 200 clients that send a byte of a head each second", file=sys.stderr)
        before, start = self.at_rest(), time.monotonic()
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(self.rrouter.connect()) for _ in range(200)]
            dripping = set(clients)
            for client in clients:
                client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Drip: ")
            while dripping:
                self.assert_prompt(5)
                self.assertLess(time.monotonic() - start, rrouter.HEAD_S + WAIT_S)
                for client in list(dripping):
                    if select.select([client], [], [], 0)[0]:
                        self.assertEqual(read_reply(client).status, 408)
                        dripping.remove(client)
                    else:
                        with contextlib.suppress(ConnectionError):
                            client.sendall(b"x")
                time.sleep(1)                   # the pace of the clients
            self.assertGreater(time.monotonic() - start, rrouter.HEAD_S - 1)
        self.assert_nothing_gathered(before, 16 * 1024)

    def test_hundred_connections_in_the_queue_are_all_served(self):
        """rrouter is stopped meanwhile, so that they are there at once."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.rrouter.process.send_signal, signal.SIGCONT)
            self.rrouter.process.send_signal(signal.SIGSTOP)
            clients = [stack.enter_context(self.rrouter.connect()) for _ in range(100)]
            for number, client in enumerate(clients):
                client.sendall(request_bytes("POST", "/v1/messages", chat("m%d" % number)))
            self.rrouter.process.send_signal(signal.SIGCONT)
            self.assertEqual([read_reply(client).header("x-rrouter-model") for client in clients],
                             ["m%d" % number for number in range(100)])

    def test_announced_bodies_take_no_memory_before_they_come(self):
        before = usage_of(self.rrouter.process).resident_kb
        with contextlib.ExitStack() as stack:
            for _ in range(10):
                client = stack.enter_context(self.rrouter.connect())
                client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\n"
                               b"Content-Length: 60000000\r\n\r\n0123456789")
            self.assertEqual(self.get().status, 200)
            self.assertLess(usage_of(self.rrouter.process).resident_kb - before, 30 * 1024)


class LimitsTest(RouterTest):
    """Requests that take too long or are too large are ended; the limits are short here."""

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

    def test_idle_connection_is_closed_without_a_word(self):
        for label, data, expected in (
                ("at once", b"", rb"\A\Z"), ("after line ends", b"\r\n", rb"\A\Z"),
                ("after a response", request_bytes("GET", "/"), rb"\AHTTP/1\.1 200 OK\r\n")):
            with self.subTest(label):
                received = self.rrouter.exchange(data)
                self.assertRegex(received, expected)
                self.assertNotIn(b"408", received)

    def test_client_that_does_not_read_is_given_up(self):
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

    # Claims that the process uses all of its time.
    altered = ("import os, time, types\n"
               "os.times = lambda: types.SimpleNamespace(user=time.monotonic())")
    LOOKS = (
        # what, requests, threads known, seconds since the last look, share of a core, share one?
        ("too little to do", 8, 8, 0.2, 0.19, False),
        ("too few requests", 7, 8, 0.2, 1.0, False),
        ("too few threads", 8, 7, 0.2, 1.0, False),
        ("enough", 8, 8, 0.2, 0.21, True),
        ("less", 8, 8, 0.2, 0.11, True),
        ("too soon after the last look", 8, 8, 0.1, 0.0, True),
        ("more", 50, 8, 0.2, 1.1, True),
        ("little", 50, 8, 0.2, 0.09, False),
        ("much again", 8, 8, 0.2, 0.9, True),
        ("fewer requests", 7, 8, 0.2, 1.0, False))

    @contextlib.contextmanager
    def threads(self, work=None):
        """Yield the native ids of eight threads, which call `work` until the end."""
        end, ids = threading.Event(), queue.SimpleQueue()

        def run():
            ids.put(threading.get_native_id())
            while not end.is_set():
                (work or end.wait)(0.001 if work else WAIT_S)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for _ in range(8):
                pool.submit(run)
            try:
                yield [ids.get(timeout=WAIT_S) for _ in range(8)]
            finally:
                end.set()

    def test_threads_share_a_core_from_a_load_on_and_part_at_a_lower_one(self):
        here, core, now, used_s = os.sched_getaffinity(0), rrouter.OneCore(), 1000.0, 50.0
        with self.threads() as threads:
            core.look(8, threads, now, used_s)      # the first look has nothing to compare with
            for what, active, known, seconds, share, shared in self.LOOKS:
                with self.subTest(what):
                    now, used_s = now + seconds, used_s + share * seconds
                    core.look(active, threads[:known], now, used_s)
                    places = {frozenset(os.sched_getaffinity(thread)) for thread in threads}
                    self.assertEqual([len(place) for place in places],
                                     [1 if shared else len(here)])
                    self.assertEqual(os.sched_getaffinity(0), here)
            core.look(8, [2 ** 22 + 1] * 8, now + 1, used_s + 1)    # threads that have ended

    def test_cores_that_the_user_allows_are_kept_to(self):
        first, last = min(CORES), max(CORES)

        def look_about(threads):
            """Be the watcher: its own cores are changed as well."""
            core = rrouter.OneCore()
            core.look(8, threads, 1000.0, 50.0)
            # cores allowed, share of a core used
            for number, (allowed, share) in enumerate(
                    (({first}, 1), ({last}, 1), ({first}, 0), (CORES, 0)), 1):
                for thread in [threading.get_native_id(), *threads]:
                    os.sched_setaffinity(thread, allowed)
                core.look(8, threads, 1000.0 + number, 50.0 + share)
                yield {frozenset(os.sched_getaffinity(thread)) for thread in threads}
                time.sleep(0.01)        # the threads run where they may

        with self.threads(time.sleep) as threads, concurrent.futures.ThreadPoolExecutor(1) as pool:
            places = pool.submit(lambda: list(look_about(threads))).result(WAIT_S)
        expected = {first}, {last}, {first}, CORES
        self.assertEqual(places, [{frozenset(cores)} for cores in expected])

    def kept_to_one_core(self):
        """Return how many threads of the process keep to one core, and how many there are."""
        places = []
        for task in pathlib.Path("/proc/%d/task" % self.rrouter.process.pid).iterdir():
            with contextlib.suppress(OSError):
                places.append(os.sched_getaffinity(int(task.name)))
        return sum(len(place) == 1 for place in places), len(places)

    def test_threads_of_connections_come_together_and_part_again(self):
        gate = self.gate()
        self.upstream.default = stream(event("ping"), event("message_stop"), gate=gate)
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(self.rrouter.connect()) for _ in range(9)]
            for connection in streams:
                connection.sendall(request_bytes(body=b'{"model":"m"}', port=self.rrouter.port))
            wait_until(lambda: self.kept_to_one_core()[0] >= 9)
            alone, count = self.kept_to_one_core()
            self.assertLess(alone, count)
            gate.set()
            for connection in streams:
                self.assertTrue(read_reply(connection).complete)
            wait_until(lambda: self.kept_to_one_core()[0] == 0)


@unittest.skipUnless(PROC, "memory is read from /proc")
class MemoryWithoutCollectorTest(RouterTest):
    """A request that has ended holds nothing, even without the garbage collector."""

    altered = "import gc\ngc.disable()"
    RESPONSES = (
        Response(framing="length"), stream(), error(500),
        Response(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"),
        Response(raw=b"HTTP/1.1 400 Bad\r\nContent-Length: 9\r\n\r\n{"),
        Response(raw=b"HTP\r\n\r\n"), Response(raw=b""))
    BODY = chat(padding="x" * (200 << 10))

    def test_bodies_do_not_gather_whatever_the_response(self):
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
    """As many numbered chunks of a megabyte; `sent` of them have been asked for."""

    PAD = random.Random(1).getrandbits(8 * ((1 << 20) - 8)).to_bytes((1 << 20) - 8, "big")

    def __init__(self, count):
        self.count, self.sent = count, 0

    def __iter__(self):
        for number in range(1, self.count + 1):
            self.sent = number
            yield b"%08d" % number + self.PAD

    def wait_until_blocked(self):
        """Return when no more has been asked for during a while."""
        quiet = -1
        while quiet != self.sent:
            quiet = self.sent
            time.sleep(0.3)


class ParallelStreamsTest(LoadTest):

    STREAMS, PAUSE_S = 50 if SOAKING else 30, 0.05
    SECONDS = 60 if SOAKING else 1
    SEED = os.environ.get("RROUTER_SOAK") or 20260129

    def stream_of(self, chunks):
        response = stream(b"", pause_s=self.PAUSE_S)
        response.chunks = chunks
        return response

    def events(self, mark):
        """Return the events of the stream `mark`, of all sizes."""
        dice = random.Random("%s %s" % (self.SEED, mark))
        events = [event("message_start", message={"id": mark})]
        for number in range(int(self.SECONDS / self.PAUSE_S)):
            size = 20_000 if dice.random() < 0.02 else dice.randrange(200)
            text = chr(dice.randrange(0x20, 0xd7ff)) * size
            events.append(event("content_block_delta", index=number, delta={"text": text},
                                mark=mark))
        return [*events, event("message_stop", mark=mark)]

    def test_each_client_gets_all_events_of_its_own_stream(self):
        """Half of the streams begin in another mode."""
        def client(mark):
            with self.rrouter.connect() as connection:
                connection.sendall(request_bytes("POST", "/v1/messages", chat(mark)))
                return read_reply(connection)

        if SOAKING:
            print("soak: %d streams for %d s" % (self.STREAMS, self.SECONDS), file=sys.stderr)
        before, marks = self.at_rest(), ["mark-%d" % number for number in range(self.STREAMS)]
        self.upstream.clear()
        self.upstream.default = lambda received: (
            Response() if received.method == "GET" else self.stream_of(self.events(received.model)))
        with concurrent.futures.ThreadPoolExecutor(self.STREAMS) as pool:
            replies = []
            for mode, some in (("claude", marks[::2]), ("auto", marks[1::2])):
                self.rrouter.home.write("mode", mode)
                replies += [(mark, pool.submit(client, mark)) for mark in some]
                self.upstream.wait(lambda upstream: len(upstream.received) == len(replies))
            self.assertEqual(self.rrouter.health()["activeRequests"], self.STREAMS)
            for mark, reply in replies:
                reply = reply.result(self.SECONDS * 4 + WAIT_S)
                self.assertEqual((reply.status, reply.complete), (200, True))
                self.assertTrue(reply.body == b"".join(self.events(mark)), mark)
        self.assert_nothing_gathered(before, 16 * 1024)

    def test_client_that_stops_reading_holds_back_its_own_upstream_alone(self):
        def resident_kb():
            return usage_of(self.rrouter.process).resident_kb

        stays, leaves = Megabytes(100), Megabytes(100)
        for chunks in (Megabytes(8), stays, leaves):
            response = stream(b"")
            response.chunks = chunks
            self.upstream.play(response)
        with self.opened() as response:         # what is allocated once and kept
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
    """Requests of all kinds, good and broken, leave nothing."""

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
    OTHERS = ("kept", "upload", "chunked", "leaves early", "leaves late", "leaves uploading",
              "malformed")

    def respond(self, received):
        kind = received.target.rpartition("/")[2]
        if kind in self.RESPONSES:
            return self.RESPONSES[kind][0]
        if kind == "upload":
            return Response(200, b"%d" % len(received.body), framing="length")
        if kind == "silent":
            return Response(before=self.never)
        if kind == "pausing":
            return stream(event("content_block_delta"), event("message_stop"), gate=self.never)
        return Response()

    def act(self, number):
        """Make the request that the seed and its number choose."""
        dice = random.Random("%s %d" % (self.SEED, number))
        kind = dice.choice((*self.RESPONSES, *self.OTHERS))
        if number % 40 == 0:
            put(self.rrouter.home, "mode", dice.choice(("antigravity", "claude", "auto")))
        if kind in self.RESPONSES:
            reply = self.rrouter.post(target="/v1/" + kind, padding="x" * dice.randrange(2000))
            self.assertEqual((reply.status, reply.complete), self.RESPONSES[kind][1:], kind)
            return
        size = dice.randrange(200_000, 1_500_000)
        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            if kind == "kept":
                for _ in range(3):
                    connection.sendall(request_bytes("POST", "/v1/plain", chat()))
                    self.assertEqual(read_reply_from(reader).status, 200)
            elif kind in ("upload", "leaves uploading"):
                body = chat("other", padding="x" * size)
                data = request_bytes("POST", "/v1/upload", body)
                connection.sendall(data if kind == "upload" else data[:len(data) // 2])
                if kind == "upload":
                    self.assertEqual(read_reply_from(reader).body, b"%d" % len(body))
            elif kind == "chunked":
                connection.sendall(request_bytes("POST", "/v1/upload", None,
                                                 (("Transfer-Encoding", "chunked"),)))
                connection.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (size, bytes(size)))
                self.assertEqual(read_reply_from(reader).body, b"%d" % size)
            elif kind == "leaves early":
                connection.sendall(request_bytes("POST", "/v1/silent", chat()))
            elif kind == "leaves late":
                connection.sendall(request_bytes("POST", "/v1/pausing", chat()))
                self.assertEqual(read_head(reader)[0], 200)
            else:
                connection.sendall(b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n")
                self.assertEqual(read_reply_from(reader).status, 400)

    def test_threads_descriptors_and_memory_stay_as_they_were(self):
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
    def test_mode_written_while_there_are_none_is_in_force_when_there_are(self):
        """The file cannot be read meanwhile; clients that have a connection are served."""
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
            time.sleep(0.5)         # the span that is measured; afterwards the file is not new
            self.assertLess(processor_seconds(poor.process.pid) - used, 0.25)
            self.assertEqual(target(), "antigravity")
            crowd.close()
            wait_until(lambda: descriptors() < 40)
            self.assertEqual(target(), "claude")
            wait_until(lambda: ask("GET", "/health").json()["problems"] == [])
            self.assertEqual(poor.post().status, 200)

    def test_cap_fits_a_limit_that_is_low_from_the_start(self):
        """Some of 200 clients are served, the others refused or closed, and nothing breaks."""
        code = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
        poor = self.start_rrouter(self.start_upstream(), code=code)
        with contextlib.ExitStack() as stack:
            clients, clients_of = [], collections.defaultdict(list)
            for _ in range(200):
                clients.append(stack.enter_context(poor.connect()))
                with contextlib.suppress(ConnectionError):
                    clients[-1].sendall(request_bytes("POST", "/v1/messages", chat()))
            for client in clients:
                with contextlib.suppress(ConnectionError):
                    reply = read_reply(client)
                    clients_of[reply.status if reply else None].append(client)
            self.assertLessEqual(set(clients_of), {200, 503, None})
            self.assertGreaterEqual(len(clients_of[200]), 10)
            for client in clients_of[200]:
                client.sendall(request_bytes("POST", "/v1/messages", chat()))
                self.assertEqual(read_reply(client).status, 200)
        wait_until(lambda: poor.post().status == 200)
        self.assertNotIn("[ERROR]", poor.log())


class Pace:
    """A gate that opens after each of these gaps in turn, and after the last one never again."""

    def __init__(self, *gaps_s):
        self.gaps_s, self.due = iter(gaps_s), None

    def wait(self, timeout_s):
        now = time.monotonic()
        if self.due is None:
            self.due = now + next(self.gaps_s, float("inf"))
        if now < self.due:
            time.sleep(min(timeout_s, self.due - now))
            return False
        self.due = None
        return True


class LongStreamTest(RouterTest):
    """Gaps longer than the waits of rrouter end no response and hide no client that leaves."""

    # With --soak two minutes, or as long as RROUTER_SOAK_STREAM_S says: an hour is 3600.
    GAPS_S = (0.7, 1.1, 0.6)
    if SOAKING:
        GAPS_S = (15,) * (int(os.environ.get("RROUTER_SOAK_STREAM_S") or 120) // 15)
    PING = event("ping")
    config = {"modes": {"antigravity": {"mappings": []}, "claude": {"mappings": []}},
              "defaultMode": "claude", "auto": {"firstByteTimeoutSeconds": 0.5}}

    def begin(self, mode, response):
        """Begin a request in this mode; return its http.client connection."""
        self.upstream.play(response)
        self.rrouter.home.write("mode", mode)
        before = len(self.upstream.received)
        connection = http.client.HTTPConnection("127.0.0.1", self.rrouter.port,
                                                timeout=sum(self.GAPS_S) + WAIT_S)
        self.addCleanup(connection.close)
        connection.request("POST", "/v1/messages", chat())
        self.upstream.wait(lambda upstream: len(upstream.received) > before)
        return connection

    def test_gaps_end_nothing(self):
        if SOAKING:
            print("soak: pings alone for %d s" % sum(self.GAPS_S), file=sys.stderr)
        pings, first = [self.PING] * len(self.GAPS_S), event("content_block_delta")
        silent = self.begin("claude", stream(before=Pace(sum(self.GAPS_S))))
        ended = self.begin("auto", stream(first, *pings, event("message_stop"),
                                          gate=Pace(*self.GAPS_S, 0)))
        endless = self.begin("claude", stream(first, *pings, self.PING, gate=Pace(*self.GAPS_S)))
        for connection in (ended, endless):
            connection.response = response = connection.getresponse()
            self.addCleanup(response.close)
            self.assertEqual((response.status, receive(response, len(first))), (200, first))
        for ping in pings:
            for connection in (ended, endless):
                self.assertEqual(receive(connection.response, len(ping)), ping)
        self.assertEqual(ended.response.read(), event("message_stop"))
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
    """Addresses that are taken, and other addresses than localhost."""

    def test_taken_port_is_named_with_its_owner(self):
        """The owner resembles rrouter."""
        upstream = self.start_upstream(
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
        self.assertEqual(processes(home), [])
        self.assertFalse((home.dir / "rrouter.pid").exists())

    def test_owner_and_upstream_that_drip_without_end_hold_up_no_command(self):
        for raw, commands in (
                ((b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 300), {"start": 1, "status": 3}),
                ((b"HTTP/1.1 200 OK\r\n\r\n", *[b" "] * 300), {"serve": 1, "check": 1})):
            upstream = self.start_upstream(Response(raw=raw, pause_s=0.1))
            home = self.make_home(upstream, port=upstream.port)
            for command, status in commands.items():
                home.run(command, check=status, timeout=WAIT_S)

    def test_one_of_two_addresses_taken_is_enough_to_refuse(self):
        home = self.make_home()
        with socket.socket(socket.AF_INET6) as holder:
            holder.bind(("::1", home.port))
            done = home.run("serve", check=1, timeout=WAIT_S * 2)
        self.assertRegex(done.stderr, r"(?m)^rrouter: .*\b%d\b" % home.port)

    def test_address_of_another_machine_is_refused(self):
        home = self.make_home(env={"RROUTER_HOST": "203.0.113.1"})
        done = home.run("serve", check=1, timeout=WAIT_S * 2)
        self.assertRegex(done.stderr, r"(?m)^rrouter: .*203\.0\.113\.1")

    @unittest.skipUnless(LINUX, "only Linux has all of 127/8 on loopback")
    def test_other_host_is_bound_as_given(self):
        home = self.make_home(self.start_upstream(), env={"RROUTER_HOST": "127.0.0.2"})
        ending_with(self, home.begin("serve"))
        health = wait_until(lambda: get_health(home.port, "127.0.0.2"))
        self.assertEqual(health["listenAddr"], "127.0.0.2:%d" % home.port)
        self.assertIsNone(home.health())                # 127.0.0.1 is not bound
        home.run("status", check=0)

    def ask(self, router, host):
        with router.connect() as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host)
            return read_reply(connection)

    def test_guard_holds_on_every_loopback_address_and_allows_the_names_given(self):
        router = self.start_rrouter(self.start_upstream(), env={
            "RROUTER_HOST": "127.0.0.1", "RROUTER_ALLOWED_HOSTS": "host.docker.internal, Box"})
        for host in (b"host.docker.internal:8316", b"BOX.", b"localhost"):
            self.assertEqual(self.ask(router, host).status, 200)
        self.assert_error(self.ask(router, b"evil.com"), 403, "RROUTER_ALLOWED_HOSTS")
        self.assertNotIn("quota", router.log())

    def test_beyond_loopback_any_host_is_served_with_a_warning(self):
        router = self.start_rrouter(self.start_upstream(), env={"RROUTER_HOST": "0.0.0.0"})
        self.assertEqual(self.ask(router, b"box.lan").status, 200)
        self.assertIn("can spend your quota", router.log())

    def test_one_address_in_two_lines_of_etc_hosts_is_bound_once(self):
        twice = ("import socket\nreal = socket.getaddrinfo\nsocket.getaddrinfo ="
                 " lambda host, *others, **options: real('127.0.0.1', *others, **options) * 2")
        router = self.start_rrouter(self.start_upstream(), env={"RROUTER_HOST": "box"}, code=twice)
        self.assertEqual(self.ask(router, b"box").status, 200)


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

    def wait_until_refused(self):
        def is_refused():
            try:
                self.rrouter.connect().close()
            except OSError:
                return True
        wait_until(is_refused)

    def finish_stream(self):
        """Let the stream end, and rrouter with it."""
        self.assertIsNone(self.rrouter.process.poll())
        self.opened.set()
        self.assertEqual(read_chunks(self.reader), (event("ping") + event("message_stop"), True))
        self.assertEqual(self.rrouter.process.wait(WAIT_S), 0)

    def test_stop_waits_for_the_stream_and_lets_nothing_else_in(self):
        home = self.rrouter.home
        done = home.run("start", check=0)           # finds `serve` running
        self.assertRegex(done.stdout, r"(?i)already running.*\b%d\b" % self.rrouter.process.pid)
        with self.rrouter.connect() as idle:
            stops = [ending_with(self, home.begin("stop"))]
            self.wait_until_refused()
            self.assertEqual(read_all(idle), b"")
        wait_until(lambda: "stopping" in home.read("rrouter.lock"))
        stops.append(ending_with(self, home.begin("stop")))     # sends no second signal
        for _ in range(2):                                      # meanwhile it would have
            self.assertIn("is stopping", home.run("status", check=3).stdout)
        self.assertEqual([stop.poll() for stop in stops], [None, None])
        self.finish_stream()
        self.assertEqual([stop.wait(WAIT_S) for stop in stops], [0, 0])
        socket.create_server(("127.0.0.1", self.rrouter.port)).close()
        for name in ("rrouter.pid", "run.json"):
            self.assertFalse((home.dir / name).exists())

    def test_start_meanwhile_waits_for_the_end_and_starts(self):
        home, pid = self.rrouter.home, self.rrouter.process.pid
        self.rrouter.process.send_signal(signal.SIGINT)
        wait_until(lambda: "stopping" in home.read("rrouter.lock"))
        self.addCleanup(home.run, "stop")
        starting = ending_with(self, home.begin("start"))
        home.run("status", check=3)                 # `start` has looked about meanwhile
        self.assertIsNone(starting.poll())
        self.finish_stream()
        self.assertEqual(starting.wait(WAIT_S * 2), 0)
        self.assertNotEqual(home.health()["pid"], pid)

    def assert_ends_at_once(self):
        self.rrouter.process.wait(WAIT_S)
        with contextlib.suppress(ConnectionResetError):
            self.assertFalse(read_chunks(self.reader)[1])
        self.rrouter.stop(expect=None)

    def test_second_signal_ends_it_at_once(self):
        self.rrouter.process.terminate()
        self.wait_until_refused()
        self.rrouter.process.terminate()
        self.assert_ends_at_once()

    def test_two_signals_at_the_same_time_are_two(self):
        for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
            self.rrouter.process.send_signal(number)
        self.assert_ends_at_once()


class DaemonTestBase(LoopbackTest):
    """Base of the tests with daemons, which end with the test or with the class."""

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

    def sleeper(self, **options):
        """Return a process that is not rrouter."""
        return ending_with(self, subprocess.Popen(["sleep", "600"], **options))

    def assert_alone(self, home):
        """One daemon runs, answers, and is named by pid file and lock; return its pid."""
        health = home.health()
        self.assertIsNotNone(health, "no daemon answers")
        for name in ("rrouter.pid", "rrouter.lock"):
            self.assertEqual(home.read(name).split()[0], str(health["pid"]), name)
        if LINUX:
            # One that lost the race for the lock, or has just released it, may still be ending.
            wait_until(lambda: processes(home) == [health["pid"]])
        return health["pid"]

    def assert_nothing_left(self, home):
        self.assertEqual(processes(home), [])
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

    def test_start_prints_pid_and_port(self):
        self.assertEqual((self.started.returncode, self.started.stderr), (0, ""))
        for number in (self.health["pid"], self.home.port):
            self.assertRegex(self.started.stdout, r"\b%d\b" % number)
        self.assertEqual(self.health["startedBy"], "start")

    def test_it_is_detached(self):
        pid = self.assert_alone(self.home)
        self.assertNotEqual(os.getsid(pid), os.getsid(0))
        self.assertEqual(os.read(self.pipe, 1), b"", "holds a descriptor of its starter")
        if LINUX:
            process = pathlib.Path("/proc", str(pid))
            fields = process.joinpath("stat").read_text().rpartition(")")[2].split()
            parent, terminal = int(fields[1]), int(fields[4])
            self.assertEqual(terminal, 0)
            self.assertIn(parent, self.ancestors())
            self.assertEqual(os.readlink(str(process / "cwd")), "/")
            self.assertEqual(os.readlink(str(process / "fd" / "0")), "/dev/null")

    @staticmethod
    def ancestors():
        """Return the pids above this process: one of them collects orphans."""
        found, pid = {1}, os.getppid()
        while pid > 1:
            found.add(pid)
            fields = pathlib.Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
            pid = int(fields[1])
        return found

    def test_its_files_are_private(self):
        for path in [self.home.dir, *self.home.dir.rglob("*")]:
            if path.name not in ("mode", "config.json"):            # the test wrote these two
                with self.subTest(path.name):
                    self.assertEqual(stat.S_IMODE(path.stat().st_mode),
                                     0o700 if path.is_dir() else 0o600)

    def test_run_json_says_where_it_listens(self):
        run = json.loads(self.home.read("run.json"))
        expected = {"host": "localhost", "port": self.home.port, "pid": self.health["pid"],
                    "upstream": self.upstream.url, "startedBy": "start",
                    "instance": self.health["instance"]}
        self.assertEqual({name: run[name] for name in expected}, expected)
        words = self.home.read("rrouter.lock").split()
        self.assertEqual(words[:3], [str(run["pid"]), run["instance"], socket.gethostname()])

    def test_it_is_found_whatever_port_the_shell_has(self):
        status, start = self.home.run_all(("status", "--json"), ("start",), check=0,
                                          env={"RROUTER_PORT": str(free_port())})
        self.assertLessEqual(set(HEALTH), set(json.loads(status.stdout)))
        for pattern in ("(?i)already running", r"\b%d\b" % self.health["pid"],
                        r"\b%d\b" % self.home.port):
            self.assertRegex(start.stdout, pattern)

    def test_it_is_found_by_the_environment_where_run_json_is_no_help(self):
        good = self.home.dir / "run.json"
        self.addCleanup(good.rename(self.home.dir / "aside").rename, good)
        put(self.home, "run.json", "{")
        status = self.home.run("status", "--json", check=0)
        self.assertEqual(json.loads(status.stdout)["pid"], self.health["pid"])

    def test_status_shows_mode_upstream_daemon_and_problems(self):
        put(self.home, "mode", "nosuch\n")
        status = self.home.run("status", check=0).stdout
        for pattern in ("claude", re.escape(self.upstream.url), "(?i)reachable|answers|up",
                        r"\b%d\b" % self.health["pid"], r"\bstart\b", "nosuch"):
            self.assertRegex(status, pattern)

    def test_mode_commands_return_when_the_switch_is_in_force(self):
        """Also while the config cannot be read: then the last good one is in force."""
        for mode, config in (("claude", "{"), ("antigravity", json.dumps(HASTY_CONFIG))):
            put(self.home, "config.json", config)
            done = self.home.run(mode, check=0, env={"RROUTER_PORT": str(free_port())})
            self.assertEqual(self.home.health()["mode"], mode)
            self.assertIn(mode, done.stdout)
            self.assertNotRegex(done.stdout + done.stderr, "(?i)not running|no daemon")

    def test_auto_again_clears_the_cooldown(self):
        put(self.home, "mode", "auto\n")
        self.upstream.play(error(503))
        with socket.create_connection(("127.0.0.1", self.home.port), WAIT_S) as connection:
            connection.sendall(request_bytes(body=chat(), port=self.home.port))
            self.assertEqual(read_reply(connection).status, 200)
        self.assertTrue(self.home.health()["autoSwitch"]["switched"])
        status = self.home.run("status", check=0).stdout
        self.assertRegex(status, "503")
        self.assertRegex(status, r"\b(29|30) ?m")
        self.home.run("auto", check=0)
        auto = self.home.health()["autoSwitch"]
        self.assertEqual((auto["switched"], auto["currentTarget"], auto["retryAt"]),
                         (False, "antigravity", None))

    def test_hang_up_signal_does_not_end_it(self):
        os.kill(self.health["pid"], signal.SIGHUP)
        wait_until(lambda: "SIGHUP" in self.home.read("logs/rrouter.log"))
        self.assertEqual(self.assert_alone(self.home), self.health["pid"])

    def test_its_port_is_refused_to_another_rrouter(self):
        other = self.new_home(self.addCleanup, port=self.home.port)
        commands = [other.run("start", timeout=WAIT_S * 2), self.home.run("serve")]
        for done in commands:
            self.assertEqual(done.returncode, 1, done)
            self.assertRegex(done.stderr, r"rrouter: .*rrouter.*\b%d\b" % self.health["pid"])
        self.assertEqual(processes(other), [])

    def test_serve_beside_it_leaves_its_files_alone(self):
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

    def home(self, *arguments, **options):
        return self.new_home(self.addCleanup, *arguments, **options)

    def test_restart_starts_and_replaces_and_stop_leaves_nothing(self):
        home = self.home()
        home.run("restart", check=0)
        first = self.assert_alone(home)
        with socket.create_connection(("127.0.0.1", home.port), WAIT_S) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
                               b"Connection: close\r\n\r\n")
            read_all(connection)            # rrouter closes first: its side stays in TIME_WAIT
        done = home.run("restart", check=0)
        self.assertNotIn("in use", done.stdout + done.stderr)
        self.assertNotEqual(self.assert_alone(home), first)
        done = home.run("stop", check=0, env={"RROUTER_PORT": str(free_port())})
        self.assertRegex(done.stdout, "(?i)stopped")
        self.assert_nothing_left(home)
        home.run("status", check=3)

    def test_restart_keeps_port_host_and_upstream_except_what_the_shell_sets(self):
        home = self.home(env={"RROUTER_HOST": "127.0.0.1", "RROUTER_ALLOWED_HOSTS": "a,b"})
        unset = dict.fromkeys(rrouter.DEFAULT_ENVIRONMENT, "")
        home.run("start", check=0)
        kept = ("host", "port", "upstream", "allowedHosts")
        before = json.loads(home.read("run.json"))
        home.run("restart", check=0, env=unset)
        after = json.loads(home.read("run.json"))
        self.assertNotEqual(after["pid"], before["pid"])
        self.assertEqual([after[name] for name in kept], [before[name] for name in kept])
        self.assertEqual(after["allowedHosts"], "a,b")
        home.run("restart", check=0, env=dict(unset, RROUTER_UPSTREAM="http://127.0.0.1:9"))
        after = json.loads(home.read("run.json"))
        self.assertEqual((after["port"], after["upstream"]), (home.port, "http://127.0.0.1:9"))
        os.kill(after["pid"], signal.SIGKILL)
        wait_until(lambda: home.run("status", env=unset).returncode == 3)
        home.run("restart", check=0, env=unset)
        self.assertEqual(json.loads(home.read("run.json"))["port"], home.port)

    def test_daemon_is_found_again_after_its_directory_was_removed(self):
        home = self.home("auto")
        home.run("start", check=0)
        pid = self.assert_alone(home)
        home.remove_directory()
        wait_until((home.dir / "run.json").exists)
        self.assertEqual(self.assert_alone(home), pid)
        wait_until((home.dir / "logs" / "rrouter.log").exists)
        wait_until(lambda: "was removed" in home.read("logs/rrouter.log"))
        wait_until((home.dir / "state.json").exists)
        for path in (home.dir, home.dir / "rrouter.lock"):
            self.assertEqual(path.stat().st_mode & 0o077, 0)
        other = {"RROUTER_PORT": str(free_port())}
        self.assertIn(str(pid), home.run("status", check=0, env=other).stdout)
        self.assertNotIn("no daemon", home.run("auto", check=0, env=other).stdout)
        self.assertEqual(home.health()["mode"], "auto")
        self.assertIn("stopped", home.run("stop", check=0, env=other).stdout)
        self.assert_nothing_left(home)

    def test_directory_of_another_daemon_is_left_alone(self):
        home = self.home()
        home.run("start", check=0)
        pid = self.assert_alone(home)
        with open(home.dir.with_name("lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.kill(pid, signal.SIGSTOP)
            home.dir.rename(home.dir.with_name("old"))
            home.dir.mkdir()
            home.dir.with_name("lock").rename(home.dir / "rrouter.lock")
            os.kill(pid, signal.SIGCONT)
            wait_until((home.dir / "logs" / "rrouter.log").exists)
            time.sleep(0.5)
            self.assertFalse((home.dir / "run.json").exists())
            self.assertEqual(home.read("rrouter.lock"), "")
        wait_until((home.dir / "run.json").exists)
        self.assertEqual(self.assert_alone(home), pid)

    def test_killed_daemon_hinders_nothing_and_no_other_process_is_signalled(self):
        """The files it leaves may come to name another process."""
        home, sleeper = self.home(), self.sleeper()
        home.run("start", check=0)
        killed = self.assert_alone(home)
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
        self.assertEqual(processes(home), [])
        self.assertIsNone(sleeper.poll())

    def test_closed_standard_streams_do_no_harm(self):
        """The files opened next have their numbers, 0 to 2."""
        home = self.home()
        script = 'exec "$@" <&- >&- 2>&-'
        shell = ["/bin/sh", "-c", script, "sh", sys.executable, RROUTER]
        home.run("start", program=shell, check=0)
        self.assert_alone(home)
        home.run("status", program=["/bin/sh", "-c", 'exec "$@" >&-', "sh", sys.executable,
                                    RROUTER], check=0)
        home.run("stop", check=0)
        process = ending_with(self, home.begin("serve", program=shell))
        wait_until(home.health)
        self.assertEqual(self.assert_alone(home), process.pid)
        process.terminate()
        self.assertEqual(process.wait(WAIT_S), 0)
        for line in home.read("logs/rrouter.log").splitlines():
            self.assertRegex(line, LOG_LINE)

    def test_zip_application_starts_and_stops(self):
        home = self.home()
        source = home.root / "source"
        source.mkdir()
        shutil.copy(RROUTER, str(source))
        archive = str(home.root / "rrouter.pyz")
        zipapp.create_archive(str(source), archive, main="rrouter:main")
        program = [sys.executable, os.path.basename(archive)]
        home.run("start", program=program, cwd=str(home.root), check=0)
        self.assert_alone(home)
        home.run("stop", program=program, cwd=str(home.root), check=0)
        self.assert_nothing_left(home)


RUN_FILE = ('{"pid": %d, "instance": "%s", "host": "localhost", "port": 1, "startedBy": "start",'
            ' "upstream": ""}')
NO_RUN_FILES = ("", "{", "[]", "7", '{"port": -1}', '{"pid": %(pid)d, "instance": "1f"}',
                '{"pid": %(pid)d, "instance": "1f", "port": "y", "host": 7}', "[" * 100_000)


class FalseFilesTest(DaemonTestBase):
    """Only a held lock makes a daemon; LockTest has the lines in it."""

    LINE = "%%d 1f %s %d\n" % (
        socket.gethostname(), os.stat("/proc/self/ns/pid").st_ino if LINUX else 0)

    def setUp(self):
        self.home = self.new_home(self.addCleanup, "claude")
        self.lock = self.home.dir / "rrouter.lock"

    @contextlib.contextmanager
    def held(self, line):
        """Hold the lock, with this line in it."""
        self.lock.write_text(line)
        with open(str(self.lock)) as holder:
            fcntl.flock(holder, fcntl.LOCK_EX)
            yield

    def find(self):
        return rrouter.find_daemon(rrouter.Paths(str(self.home.root)))

    def test_files_alone_make_no_daemon(self):
        pid = self.sleeper().pid
        for name, line in (("rrouter.pid", "%d\n"), ("rrouter.lock", self.LINE),
                           ("run.json", RUN_FILE.replace("%s", "1f"))):
            self.home.write(name, line % pid)
        self.assertIsNone(self.find())

    def test_run_json_of_another_instance_or_without_sense_is_ignored(self):
        """Then the environment says where the daemon listens."""
        pid, settings = self.sleeper().pid, rrouter.read_environment(dict(os.environ))
        rows = [(RUN_FILE % (pid, "1f"), 1), (RUN_FILE % (pid, "2e"), settings.port),
                (RUN_FILE % (pid + 1, "1f"), settings.port)]
        rows += [(text % {"pid": pid} if "%" in text else text, settings.port)
                 for text in NO_RUN_FILES]
        with self.held(self.LINE % pid):
            for text, port in rows:
                with self.subTest(text[:60]):
                    self.home.write("run.json", text)
                    found = self.find()
                    self.assertEqual((found.pid, found.port), (pid, port))

    def test_start_beside_a_lock_that_names_no_process_fails_in_time(self):
        code = ("import sys; sys.path.insert(0, %r); import rrouter; rrouter.START_S = 1.2; "
                "rrouter.main()" % str(HERE))
        with self.held("0\n"):
            done = self.home.run("start", program=[*PYTHON, "-c", code], start_new_session=True)
        self.assertEqual((done.returncode, done.stdout), (1, ""), done)
        self.assertRegex(done.stderr, r"\Arrouter: the daemon (does not answer|did not start)")

    def test_fifo_or_directory_in_the_place_of_the_lock_hangs_no_command(self):
        """Opened as a file is, a FIFO without a writer would block without end."""
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
    """Several starts at once, and starts interrupted by signals."""

    ROUNDS = 100 if SOAKING else 6
    SEED = os.environ.get("RROUTER_SOAK") or "20260129"
    SIGNALS = "SIGTERM", "SIGHUP", "SIGINT", "SIGPIPE", "SIGKILL"
    GROUP_SIGNALS = "SIGINT", "SIGTERM", "SIGHUP"       # as Ctrl-C or a closed terminal sends them

    def test_starts_at_once_leave_one_daemon(self):
        home = self.new_home(self.addCleanup)
        for number in range(50 if SOAKING else 1):
            with self.subTest(round=number):
                started = home.run_all(*[("start",)] * (2 if SOAKING else 4), check=0)
                pid = self.assert_alone(home)
                for done in started:
                    for word in (pid, home.port):
                        self.assertRegex(done.stdout, r"\b%d\b" % word)
                home.run("stop", check=0)
                self.assertIsNone(home.health())

    def assert_no_traceback(self, printed):
        """A SIGINT may show one while Python starts: until the program's last statement."""
        call = RROUTER_TEXT.rindex('\nif __name__ == "__main__":')
        last = RROUTER_TEXT.count("\n", 0, call) + 2
        for block in printed.split("Traceback (most recent call last)")[1:]:
            frames = re.findall(r'File "[^"]*rrouter\.py", line (\d+), in (\S+)', block)
            starts = not frames or (int(frames[0][0]) < last and frames[0][1] == "<module>")
            # An import that is interrupted leaves its file open, which -W error shows as well.
            is_import = not frames and "ResourceWarning: unclosed file" in block
            self.assertTrue(is_import or (starts and "KeyboardInterrupt" in block
                                          and "_shutdown" not in block), printed)

    def interrupt(self, home, command, dice, name, group):
        """Begin the command and send the signal to it at some moment; return what was printed."""
        with tempfile.TemporaryFile() as output:
            process = home.begin(command, stdout=output, stderr=output, start_new_session=True)
            with process:
                time.sleep(dice.random() * 0.2)         # the moment is what the dice say
                victims = [process.pid, *processes(home)]
                with contextlib.suppress(ProcessLookupError):
                    if group:
                        os.killpg(process.pid, getattr(signal, name))
                    else:
                        os.kill(dice.choice(victims), getattr(signal, name))
                if command == "serve" and process.poll() is None:
                    process.terminate()
                try:
                    process.wait(WAIT_S * 5)
                finally:
                    process.kill()
            output.seek(0)
            return output.read().decode()

    def test_start_works_after_a_command_that_was_interrupted(self):
        if SOAKING:
            print("soak: seed %s, %d interrupted starts" % (self.SEED, self.ROUNDS),
                  file=sys.stderr)
        home, dice = self.new_home(self.addCleanup), random.Random(self.SEED)
        for number in range(self.ROUNDS):
            command, group = ("start", "serve", "restart", "stop")[number % 4], number % 3 != 1
            name = dice.choice(self.GROUP_SIGNALS if group else self.SIGNALS)
            with self.subTest(round=number, command=command, signal=name, group=group):
                printed = self.interrupt(home, command, dice, name, group)
                if name != "SIGINT":
                    self.assertNotIn("Traceback", printed)
                self.assert_no_traceback(printed)
                home.run("start", check=0)
                self.assert_alone(home)
                self.assert_no_traceback(home.read("logs/rrouter.log"))
                if number % 2:
                    home.run("stop", check=0)
                    self.assertIsNone(home.health())


class StateTest(DaemonTestBase):
    """state.json carries a switch of the target and of a model over kill and restart."""

    OPUS, HAIKU = "claude-opus-5-5", "claude-haiku-4-5"
    KEPT = ("switched", "switchCount", "reason", "switchedAt", "retryAt", "cooldownSeconds",
            "currentTarget")

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.home = cls.new_home(cls.addClassCleanup, "auto", DEFAULT_CONFIG)
        router = Running(cls.upstream, home=cls.home)
        cls.addClassCleanup(router.__exit__)
        for _ in range(3):
            cls.upstream.play(error(429))
            router.post(cls.OPUS)               # rescued
            router.post(cls.HAIKU)
        for _ in range(3):
            cls.upstream.play(error(503))
            router.post(cls.HAIKU)
        cls.before = router.health()["autoSwitch"]
        state = cls.home.dir / "state.json"
        wait_until(lambda: state.exists() and "last 503" in state.read_text()
                   and cls.OPUS in state.read_text())
        router.kill()
        cls.saved = cls.home.read("state.json")

    def setUp(self):
        self.upstream.clear()

    def changed(self, change):
        """Return state.json with `change` of every number and string."""
        def walk(value):
            if isinstance(value, dict):
                return {key: walk(item) for key, item in value.items()}
            if isinstance(value, list):
                return [walk(item) for item in value]
            return value if isinstance(value, bool) or value is None else change(value)
        return json.dumps(walk(json.loads(self.saved)))

    def restarted(self, state, config=DEFAULT_CONFIG, mode=None):
        """Start with these files; return `autoSwitch` of /health and the new lines of the log."""
        put(self.home, "state.json", state)
        put(self.home, "config.json", json.dumps(config))
        if mode is not None:
            self.home.write("mode", mode)
        log = self.home.dir / "logs" / "rrouter.log"
        before = log.stat().st_size
        with Running(self.upstream, home=self.home) as router:
            auto = router.health()["autoSwitch"]
            self.assertEqual(router.post(self.HAIKU).status, 200)
        return auto, log.read_bytes()[before:].decode()

    def test_it_is_kept_or_set_aside_with_a_line(self):
        self.assertEqual(list(self.before["models"]), [self.OPUS])
        rules = json.loads(json.dumps(DEFAULT_CONFIG).replace("claude-haiku-*", "haiku-*"))
        threshold = dict(DEFAULT_CONFIG, auto={"failureThreshold": 2})
        digits = json.loads(self.saved)
        digits["whole"]["last_cooldown_s"] = 10 ** 400
        rows = (
            # what happened meanwhile, state.json, config, mode, kept?
            ("nothing", self.saved, DEFAULT_CONFIG, None, True),
            ("the rules were written", self.saved, rules, None, True),
            ("the auto section was written", self.saved, threshold, None, False),
            ("torn", self.saved[:len(self.saved) // 2], DEFAULT_CONFIG, None, False),
            ("too deep", "[" * 100_000, DEFAULT_CONFIG, None, False),
            ("other types", self.changed(lambda value: 7 if isinstance(value, str) else "x"),
             DEFAULT_CONFIG, None, False),
            ("a number of 400 digits", json.dumps(digits), DEFAULT_CONFIG, None, False),
            # last, because its new time stamp stays
            ("the mode was written", self.saved, DEFAULT_CONFIG, "auto\n", False))
        for what, state, config, mode, kept in rows:
            with self.subTest(what):
                auto, log = self.restarted(state, config, mode)
                if not kept:
                    self.assertEqual((auto["switched"], auto["switchCount"], auto["models"]),
                                     (False, 0, {}))
                    self.assertEqual(len(re.findall(r"\[AUTO\] .*state\.json", log)), 1, log)
                    continue
                for old, new in ((self.before, auto), (self.before["models"][self.OPUS],
                                                       auto["models"][self.OPUS])):
                    self.assertEqual([new[name] for name in self.KEPT],
                                     [old[name] for name in self.KEPT])
                    self.assertTrue(0 < new["cooldownRemainingSeconds"]
                                    <= old["cooldownRemainingSeconds"])

    def test_clock_set_meanwhile_locks_no_target_out(self):
        """The cooldown left is at most the longest one."""
        for years in (10, -10):
            with self.subTest(years=years):
                auto, _ = self.restarted(self.changed(
                    lambda value: value + years * 365 * 86400
                    if isinstance(value, (int, float)) and 1e9 < value < 4e9 else value))
                self.assertLessEqual(auto["cooldownRemainingSeconds"] or 0, 240 * 60)


# The log, the state and the disk ###############################################

# While the file exists, each write to a file hangs, as on a disk that does not respond.
HANGING_WRITES = """
import os, time
write, flag = os.write, %r
def hanging(descriptor, data):
    while os.path.exists(flag):
        time.sleep(0.01)
    return write(descriptor, data)
os.write = hanging
"""
HANGING_FSYNC = HANGING_WRITES.replace("write", "fsync").replace("descriptor, data", "descriptor")


class HangingDiskTest(unittest.TestCase):
    """Requests, decisions of auto mode, /health and the end do not wait for a disk."""

    def setUp(self):
        self.upstream = Upstream(Response(chunks=b'{"type":"message","content":["x"]}'))
        self.addCleanup(self.upstream.close)
        self.home = Home(self.upstream, "auto", dict(DEFAULT_CONFIG, auto={"failureThreshold": 1}))
        self.addCleanup(self.home.remove)
        self.flag = self.home.root / "the disk hangs"

    def running(self, code):
        """Return a rrouter whose disk hangs while `self.flag` exists."""
        return Running(self.upstream, code=code % str(self.flag), home=self.home)

    def assert_goes_on(self, router):
        """A failure is rescued, auto mode switches, and /health says so."""
        self.upstream.play(error(503))
        self.assertEqual([router.post().status for _ in range(20)], [200] * 20)
        auto = router.health()["autoSwitch"]
        self.assertEqual((auto["switched"], auto["reason"][-3:]), (True, "503"))

    def test_hanging_log_stops_nothing_and_loses_no_line(self):
        with self.running(HANGING_WRITES) as router:
            self.flag.touch()
            self.assert_goes_on(router)
            self.assertNotIn("SWITCH", router.log())
            self.flag.unlink()
            router.wait_until(lambda: len(request_lines(router.log())) == 20)
            self.assertEqual(len(re.findall(r"\[AUTO\] SWITCH ", router.log())), 1)

    def test_hanging_state_file_stops_nothing_and_is_written_later(self):
        with self.running(HANGING_FSYNC) as router:
            self.flag.touch()
            self.assert_goes_on(router)
            self.assertFalse((self.home.dir / "state.json").exists())
            self.flag.unlink()
            state = self.home.dir / "state.json"
            router.wait_until(lambda: state.exists() and "last 503" in state.read_text())

    def test_hanging_log_does_not_hold_up_the_end(self):
        with self.running(HANGING_WRITES) as router:
            self.flag.touch()
            self.assertEqual(router.post().status, 200)
            begin = time.monotonic()
            router.process.terminate()
            self.assertEqual(router.process.wait(WAIT_S), 0)
            self.assertLess(time.monotonic() - begin, 5)
            self.assertFalse((self.home.dir / "rrouter.pid").exists())

    @unittest.skipUnless(hasattr(os, "mkfifo"), "no FIFO")
    def test_fifo_that_is_not_read_stops_nothing(self):
        (self.home.dir / "logs").mkdir(mode=0o700)
        path = str(self.home.dir / "logs" / "rrouter.log")
        os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self.addCleanup(os.close, reader)
        with Running(self.upstream, home=self.home) as router:
            if hasattr(fcntl, "F_SETPIPE_SZ"):
                fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
            self.assert_goes_on(router)
            router.wait_until(lambda: router.post().status == 200 and router.health()["problems"])
            self.assertIn("log lines are lost", str(router.health()["problems"]))

    def test_line_is_in_the_file_within_a_third_of_a_second(self):
        with Running(self.upstream, home=self.home) as router:
            waited = []
            for number in range(9):
                router.request("GET", "/number/%d" % number, fields=())
                begin = time.monotonic()
                router.wait_until(lambda number=number: "/number/%d " % number in router.log())
                waited.append(time.monotonic() - begin)
            self.assertLess(statistics.median(waited), 0.3, waited)


class LogQueueTest(unittest.TestCase):
    """Lines that are not yet written."""

    def test_many_lines_wake_the_writer_once(self):
        log, calls = rrouter.Log("/nonexistent/rrouter.log", echo=False), []
        log.wake = lambda: calls.append(None)
        for _ in range(log.MANY - 1):
            log.write("REQ", "line")
        self.assertEqual(calls, [])
        for _ in range(100):
            log.write("REQ", "line")
        self.assertEqual(len(calls), 1)

    def test_lines_beyond_the_most_that_are_held_are_a_problem(self):
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
            rrouter.StateFile(paths.state, log)
            rrouter.Lock(paths.lock)
            rrouter.Signals()
            self.assertEqual(sorted(os.listdir("/dev/fd")), before)
            self.assertEqual(os.listdir(directory), [])


class StateSavingTest(unittest.TestCase):
    """state.json has one writer at a time, and fits one mode file and one auto section."""

    FINGERPRINT = {"modeFile": [1, 2, 3], "auto": [["a", "b"], 3]}

    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = pathlib.Path(directory.name, "sub", "state.json")
        self.path.parent.mkdir()
        self.lines = []
        log = rrouter.Log("/nonexistent/rrouter.log", echo=False)
        log.write = lambda tag, text: self.lines.append(text)
        self.state = rrouter.StateFile(str(self.path), log)

    def save(self, number):
        self.state.save(lambda: dict(self.FINGERPRINT, whole=number))

    def test_older_state_never_replaces_a_newer_one(self):
        number, taken, gate = [1], threading.Event(), threading.Event()

        def make():
            state = dict(self.FINGERPRINT, whole=number[0])
            taken.set()
            gate.wait(WAIT_S)
            return state

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            slow = pool.submit(self.state.save, make)
            taken.wait(WAIT_S)
            number[0] = 2
            fast = pool.submit(self.save, 2)
            with contextlib.suppress(concurrent.futures.TimeoutError):
                fast.result(0.05)               # it waits for its turn
            gate.set()
            concurrent.futures.wait((slow, fast), WAIT_S)
        self.assertEqual(json.loads(self.path.read_text())["whole"], 2)

    def test_what_was_saved_is_loaded(self):
        self.assertIsNone(self.state.load(self.FINGERPRINT))
        self.save(7)
        self.assertEqual(list(json.loads(self.path.read_text())),
                         ["version", "modeFile", "auto", "whole"])
        self.assertEqual(self.state.load(self.FINGERPRINT)["whole"], 7)

    def test_state_of_another_mode_file_or_auto_section_is_set_aside(self):
        self.save(7)
        for name, value, pattern in (("modeFile", [1, 2, 4], "mode file"),
                                     ("modeFile", None, "mode file"), ("auto", [], "auto")):
            with self.subTest(name, value=value), \
                    self.assertRaisesRegex(rrouter.StateError, pattern):
                self.state.load(dict(self.FINGERPRINT, **{name: value}))

    def test_same_state_is_not_written_again(self):
        self.save(7)
        self.path.unlink()
        self.save(7)
        self.assertFalse(self.path.exists())
        self.save(8)
        self.assertTrue(self.path.exists())

    def test_failure_is_logged_once_and_ends(self):
        self.path.parent.rmdir()
        for number in range(3):
            self.save(number)
            self.assertRegex(self.state.problem, "^state.json: cannot be written: ")
        self.assertEqual(self.lines, [self.state.problem])
        self.path.parent.mkdir()
        self.save(2)
        self.assertIsNone(self.state.problem)


# The mode file #################################################################

MODE_WORDS = (
    # content of the mode file              the word in it
    (None,                                  None),
    (b"",                                   ""),
    (b" \n",                                ""),
    (b"AUTO\r\n",                           "auto"),
    ("\ufeffclaude\n".encode(),             "claude"),
    ("\ufeffAuto\r\n".encode("utf-16-le"),  "auto"),
    ("\ufeffauto".encode("utf-16-be"),      "auto"),
    (b"\xff\xfe",                           ""),
    (b"\xff\xfea",                          r"\x61"),
    (b"caf\xe9",                            r"caf\xe9"),
)


class ModeWordTest(unittest.TestCase):

    def test_word_is_read_in_the_encodings_that_shells_write(self):
        for content, word in MODE_WORDS:
            with self.subTest(content):
                self.assertEqual(rrouter.mode_word(content), word)


# The lock ######################################################################

LOCK_LINES = (
    # line                              the holder in it, None if it is not believed
    (b"12\n",                           (12, "", "", 0, False)),
    (b"12 stopping\n",                  (12, "", "", 0, True)),
    (b"12 ab01 host 34\n",              (12, "ab01", "host", 34, False)),
    (b"12 ab01 h.\xc3\xa9 0 stopping\nrest", (12, "ab01", "h.\u00e9", 0, True)),
    (b"12",                             None),                  # half written
    (b"12 ab01 host 3",                 None),
    (b"12 ab01 host\n",                 None),
    (b"12 xyz! host 34\n",              None),
    (b"0\n",                            None),                  # would be our own process group
    (b"-1\n",                           None),
    (b"99999999999\n",                  None),
    (b"",                               None),
)


class LockTest(unittest.TestCase):
    """The lock names its holder, and a process elsewhere never gets a signal."""

    def setUp(self):
        self.home = Home(mode="claude")
        self.addCleanup(self.home.remove)
        self.path = str(self.home.dir / "rrouter.lock")

    @contextlib.contextmanager
    def held(self, line):
        """Hold the lock with `line` (bytes) in it."""
        with open(self.path, "wb") as holder:
            fcntl.flock(holder, fcntl.LOCK_EX)
            holder.write(line)
            holder.flush()
            yield

    def sleeper(self):
        """Return a process that a signal would end."""
        process = subprocess.Popen(["sleep", "600"])
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    @staticmethod
    def own_place():
        host, namespace = rrouter.own_place()
        return os.fsencode(host), namespace

    def test_holder_is_seen_with_its_whole_name(self):
        lock, other = rrouter.Lock(self.path), rrouter.Lock(self.path)
        self.assertIsNone(other.look())
        self.assertTrue(lock.acquire("ab01"))
        self.addCleanup(lock.release)
        self.assertFalse(other.acquire("cd02"))
        self.assertEqual(other.look(), (os.getpid(), "ab01", *rrouter.own_place(), False))
        self.assertEqual(other.look().elsewhere, "")
        lock.stopping = True
        lock.renew()
        self.assertTrue(other.look().stopping)
        self.assertTrue(other.look().is_same(rrouter.Holder(os.getpid(), "ab01")))
        lock.release()
        self.assertIsNone(other.look())

    def test_lock_whose_line_cannot_be_written_can_be_taken_again(self):
        lock = rrouter.Lock(self.path)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
        self.addCleanup(signal.signal, signal.SIGXFSZ, signal.signal(
            signal.SIGXFSZ, signal.SIG_IGN))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        with self.assertRaises(rrouter.DaemonError):
            lock.acquire("ab01")
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        self.assertTrue(lock.acquire("ab01"))
        lock.release()

    def test_only_a_whole_line_is_believed(self):
        lock = rrouter.Lock(self.path)
        lock.PATIENCE_S = 0.05
        for line, holder in LOCK_LINES:
            with self.subTest(line), self.held(line):
                self.assertEqual(lock.look(), holder)

    def test_signal_goes_to_the_process_that_the_lock_names_just_now(self):
        sleeper, lock, (host, namespace) = self.sleeper(), rrouter.Lock(self.path), self.own_place()
        line = b"%d ab01 %b %d\n" % (sleeper.pid, host, namespace)
        with self.held(line):
            seen = lock.look()
            for other in (seen._replace(instance="cd02"), seen._replace(stopping=True)):
                rrouter.send_signal(lock, other, signal.SIGKILL)
        rrouter.send_signal(lock, seen, signal.SIGKILL)             # the lock is free
        with self.held(b"%d ab01 %b %d\n" % (sleeper.pid, host, namespace + 1)):
            rrouter.send_signal(lock, lock.look(), signal.SIGKILL)  # the pid of another process
        with self.held(line):
            rrouter.send_signal(lock, seen, signal.SIGTERM)
        self.assertEqual(sleeper.wait(WAIT_S), -signal.SIGTERM)

    def test_daemon_elsewhere_is_named_and_left_alone(self):
        sleeper, (host, namespace) = self.sleeper(), self.own_place()
        for place in ((b"another.host", namespace), (host, namespace + 1)):
            where = "runs in another container or on another host (%s)" % place[0].decode()
            with self.subTest(where), self.held(b"%d ab01 %b %d\n" % (sleeper.pid, *place)):
                self.home.write("run.json", "{}")
                for command in ("stop", "restart", "start", "status"):
                    done = self.home.run(command, check=1)
                    self.assertRegex(done.stderr, r"\Arrouter: rrouter [^\n]+\n\Z")
                    self.assertIn(where, done.stderr)
                self.assertIn(where, self.home.run("check", check=1).stdout)
                self.assertIn(where, self.home.run("auto", check=0).stdout)
                self.assertEqual(self.home.read("mode"), "auto\n")
                self.assertEqual(self.home.read("run.json"), "{}")
                self.assertIsNone(sleeper.poll())

    IN_NAMESPACE = "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"

    @unittest.skipUnless(LINUX and shutil.which("unshare"), "no pid namespaces")
    def test_process_with_the_pid_of_a_daemon_in_another_namespace_lives_on(self):
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
        health = Running.wait_until(lambda: get_health(self.home.port))
        self.assertEqual(health["pid"], sleeper.pid)
        self.assertEqual(self.home.read("rrouter.lock").split()[:2],
                         [str(health["pid"]), health["instance"]])
        self.assertIn("stop it there", self.home.run("stop", check=1).stderr)
        self.assertIsNone(sleeper.poll())
        self.assertEqual(self.home.run("antigravity", check=0).stdout.split()[:4],
                         ["mode", "antigravity", "(in", "force:"])
        self.assertIn("in another container", self.home.run("status", check=0).stdout)


class DaemonNameTest(DaemonTestBase):
    """Commands recognise a daemon by its instance."""

    def test_lock_run_file_and_health_have_the_same_instance(self):
        home = self.new_home(self.addCleanup)
        home.run("start", check=0)
        pid, instance, *_ = home.read("rrouter.lock").split()
        self.assertRegex(home.read("rrouter.lock"), r"\A\d+ [0-9a-f]{16} \S+ \d+\n\Z")
        for named in (json.loads(home.read("run.json")), get_health(home.port)):
            self.assertEqual((str(named["pid"]), named["instance"]), (pid, instance))
        home.run("restart", check=0)
        self.assertNotEqual(home.read("rrouter.lock").split()[1], instance)

    def test_daemon_of_a_version_that_wrote_its_pid_alone_is_stopped(self):
        home = self.new_home(self.addCleanup)
        home.run("start", check=0)
        pid = self.assert_alone(home)
        home.write("rrouter.lock", "%d\n" % pid)
        run = json.loads(home.read("run.json"))
        del run["instance"]
        home.write("run.json", json.dumps(run))
        self.assertRegex(home.run("stop", check=0).stdout, r"stopped \(pid %d\)" % pid)
        self.assert_nothing_left(home)

    def test_answer_of_another_rrouter_is_not_taken_for_the_daemons(self):
        with Running(self.upstream) as other:
            home = self.new_home(self.addCleanup, "claude", port=other.port)
            with open(str(home.dir / "rrouter.lock"), "w") as holder:
                fcntl.flock(holder, fcntl.LOCK_EX)
                host, namespace = rrouter.own_place()
                holder.write("%d ab01 %s %d\n" % (other.process.pid, host, namespace))
                holder.flush()
                self.assertRegex(home.run("status", check=1).stderr, "does not answer")
                self.assertRegex(home.run("auto", check=1).stderr, "does not answer")

    def test_line_follows_a_host_that_is_renamed(self):
        name = self.new_home(self.addCleanup).root / "name"
        name.write_text("one")
        code = "import pathlib, socket\nsocket.gethostname = pathlib.Path(%r).read_text" % str(name)
        with Running(self.upstream, code=code, mode="claude") as router:
            before = router.home.read("rrouter.lock").split()
            self.assertEqual(before[2], "one")
            name.write_text("another name")
            router.wait_until(lambda: "another_name" in router.home.read("rrouter.lock"))
            after = router.home.read("rrouter.lock").split()
            self.assertEqual(after, [*before[:2], "another_name", before[3]])


# SIGHUP ########################################################################

# Makes its standard input the controlling terminal, then runs a program.
WITH_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[1] == "nohup" else signal.SIG_DFL)
os.execv(sys.argv[2], sys.argv[2:])
"""


class HangUpTest(unittest.TestCase):
    """SIGHUP ends what was started from a terminal; without one the files are read again."""

    def setUp(self):
        self.home = Home(mode="claude")
        self.addCleanup(self.home.remove)

    @contextlib.contextmanager
    def serve_in_terminal(self, how):
        """Run `serve` in a new terminal; yield the process and the other end."""
        near, far = os.openpty()
        self.addCleanup(os.close, near)
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                [*PYTHON, "-c", WITH_TERMINAL, how, *PYTHON, compiled(), "serve"],
                env=self.home.env, stdin=far, stdout=output, stderr=output,
                start_new_session=True)
            os.close(far)
            try:
                Running.wait_until(lambda: process.poll() or get_health(self.home.port))
                yield process, near
            finally:
                process.kill()
                process.wait(WAIT_S)

    def log(self):
        return self.home.read("logs/rrouter.log")

    def test_closed_terminal_ends_it_though_stderr_is_redirected(self):
        with self.serve_in_terminal("default") as (process, terminal):
            os.dup2(os.open(os.devnull, os.O_RDONLY), terminal)         # closes it
            self.assertEqual(process.wait(WAIT_S), 0)
        self.assertIn("[STOP] SIGHUP: running requests may finish", self.log())
        self.assertIn("rrouter ends", self.log())

    def test_nohup_outlives_its_terminal(self):
        with self.serve_in_terminal("nohup") as (process, terminal):
            os.dup2(os.open(os.devnull, os.O_RDONLY), terminal)
            Running.wait_until(lambda: "SIGHUP: files read again" in self.log())
            self.assertEqual(get_health(self.home.port)["pid"], process.pid)

    def test_without_a_terminal_the_files_are_read_again(self):
        self.addCleanup(self.home.run, "stop")
        self.home.run("start", check=0)
        pid = get_health(self.home.port)["pid"]
        os.kill(pid, signal.SIGHUP)
        Running.wait_until(lambda: "SIGHUP: files read again" in self.log())
        self.assertEqual(get_health(self.home.port)["pid"], pid)


class CutOffTest(LoopbackTest):
    """Requests that the drain does not wait for."""

    def test_second_signal_cuts_the_response_off_and_the_log_has_its_line(self):
        for version, end in (("1.1", "chunks"), ("1.0", "reset")):
            with self.subTest(version):
                upstream = self.start_upstream(stream(
                    event("ping"), event("message_stop"), gate=self.gate(), framing="close"))
                running = self.start_rrouter(upstream)
                with running.connect() as connection, connection.makefile("rb") as reader:
                    request = request_bytes(body=b'{"model":"m"}', port=running.port)
                    connection.sendall(request.replace(b"HTTP/1.1", b"HTTP/" + version.encode()))
                    self.assertEqual(read_head(reader)[0], 200)
                    running.process.send_signal(signal.SIGTERM)
                    wait_until(lambda: "[STOP] SIGTERM" in running.log())
                    running.process.send_signal(signal.SIGTERM)
                    self.assertEqual(running.process.wait(WAIT_S), 0)
                    if end == "reset":
                        with self.assertRaises(ConnectionResetError):
                            reader.read()
                    else:
                        self.assertFalse(read_chunks(reader)[1])
                self.assertEqual(len(request_lines(running.log())), 1)

    def test_connection_beyond_the_reserve_is_refused_in_words(self):
        running = self.start_rrouter(
            self.start_upstream(), limits={"CONNECTIONS_MAX": 2, "CONNECTIONS_RESERVE": 1})
        with contextlib.ExitStack() as stack:
            idle = [stack.enter_context(running.connect()) for _ in range(4)]
            refused = select.select(idle, [], [], WAIT_S)[0][0]
            self.assert_error(read_reply(refused), 503, "too many connections (2)")


# Command line #################################################################

USAGE_ERRORS = (("nosuch",), ("--nosuch",), ("status", "--nosuch"), ("claude", "extra"), ("",),
                ("mode", "a", "b"), ("config", "nosuch"), ("config", "path", "extra"),
                ("serve", "8316"), ("stop", "--force"))
NOTHING_RUNS = "(?i)not running|no rrouter is running"

Printed = collections.namedtuple("Printed", "returncode stdout stderr")


def run_here(home, *arguments, **env):
    """Run a command in this process, which is twenty times faster; a defect raises.

    It must neither fork nor serve.  `env` is added to the environment of `home`.
    """
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(home.env, **env)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = rrouter.main(list(arguments))
            except SystemExit as end:
                status = end.code
    finally:
        os.environ.clear()
        os.environ.update(before)
    texts = []
    for stream_ in out, err:
        stream_.flush()
        texts.append(stream_.detach().getvalue().decode())
    return Printed(status, *texts)


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

    def assert_fails(self, done, status, *patterns):
        """It ended with this status and one line on stderr, `rrouter: ...` with the patterns."""
        self.assertEqual((done.returncode, done.stdout), (status, ""), done)
        self.assertRegex(done.stderr, r"\Arrouter: [^\n]*\n\Z")
        for pattern in patterns:
            self.assertRegex(done.stderr, pattern)


class CommandLineTest(CommandTest):

    def test_exit_statuses_reach_the_shell(self):
        # command, status
        rows = ((("version",), 0), (("check",), 1), (("nosuch",), 2), (("status",), 3))
        for (arguments, status), done in zip(rows, self.home.run_all(*[row[0] for row in rows])):
            self.assertEqual(done.returncode, status, arguments)

    def test_every_name_of_help_prints_the_same_text(self):
        texts = {self.run_here(*words, check=0).stdout
                 for words in ((), ("help",), ("-h",), ("--help",))}
        self.assertEqual(len(texts), 1)
        for words in ("edit|reset|path", "config.json", "logs/rrouter.log", "examples"):
            self.assertIn(words, *texts)
        self.assertFalse(self.home.dir.exists())

    def test_every_name_of_version_prints_it(self):
        for word in ("version", "-V", "--version"):
            self.assertEqual(self.run_here(word), (0, f"rrouter {rrouter.__version__}\n", ""))

    def test_usage_errors_are_status_2(self):
        for arguments in USAGE_ERRORS:
            with self.subTest(arguments):
                done = self.run_here(*arguments)
                self.assertEqual((done.returncode, done.stdout), (2, ""))
                self.assertIn("rrouter", done.stderr)

    MODES = (
        # command,            mode
        (("antigravity",),    "antigravity"),
        (("claude",),         "claude"),
        (("ag",),             "antigravity"),
        (("c",),              "claude"),
        (("auto",),           "auto"),
        (("mode", "two"),     "two"),
        (("a",),              "auto"),
        (("mode", "ONE"),     "one"),
    )

    def test_every_name_of_a_mode_sets_it(self):
        board = switchboard(0)
        board["modes"].update(antigravity={"mappings": []}, claude={"mappings": []})
        self.home.write("config.json", json.dumps(board))
        for arguments, mode in self.MODES:
            with self.subTest(arguments):
                done = self.run_here(*arguments, check=0)
                self.assertEqual(self.home.read("mode"), mode + "\n")
                self.assertIn(mode, done.stdout)
                self.assertRegex(done.stdout, NOTHING_RUNS)
        self.assertEqual(self.run_here("mode", check=0).stdout, "one\n")

    def test_an_unknown_mode_is_refused_and_the_known_ones_are_named(self):
        self.home.write("mode", "claude\n")
        self.assert_fails(self.run_here("mode", "nosuch"), 1,
                          "nosuch", "antigravity", "claude", "auto")
        self.assertEqual(self.home.read("mode"), "claude\n")

    def test_fresh_files_are_private(self):
        mask = os.umask(0)
        try:
            for words in (("claude",), ("config", "reset"), ("config", "reset")):
                self.run_here(*words, check=0)
        finally:
            os.umask(mask)
        self.assertEqual(stat.S_IMODE(self.home.dir.stat().st_mode), 0o700)
        names = sorted(path.name.partition("-")[0] for path in self.home.dir.iterdir())
        self.assertLessEqual({"mode", "config.json", "config.json.bak"}, set(names))
        for path in self.home.dir.iterdir():
            self.assertEqual(stat.S_IMODE(path.stat().st_mode),
                             0o700 if path.is_dir() else 0o600, path.name)

    def test_commands_say_that_nothing_runs(self):
        done = self.run_here("status", check=3)
        self.assertRegex(done.stdout, NOTHING_RUNS)
        self.assertIn("claude", done.stdout)
        done = self.run_here("status", "--json", check=3)
        self.assertEqual(done.stdout, "")
        self.assertRegex(done.stderr, NOTHING_RUNS)
        self.assertRegex(self.run_here("stop", check=0).stdout, NOTHING_RUNS)
        for name in ("check", "--check", "health"):
            printed = self.run_here(name, check=1).stdout
            self.assertRegex(printed, r"(?m)^fail  daemon: not running")
            self.assertRegex(printed, r"(?m)^fail  upstream: http://127\.0\.0\.1:9 ")
            for line in printed.splitlines():
                self.assertRegex(line, r"^(ok|warn|fail)\b|^\s")

    def test_an_output_that_cannot_be_written_gives_no_traceback(self):
        reader, writer = os.pipe()
        os.close(reader)
        outputs = [("closed pipe", writer)]
        if os.path.exists("/dev/full"):
            outputs.append(("full", os.open("/dev/full", os.O_WRONLY)))
        for label, output in outputs:
            with self.subTest(label):
                done = self.home.run("config", stdout=output, timeout=WAIT_S * 2)
                os.close(output)
                self.assertNotIn("Exception ignored", done.stderr)
                self.assertEqual(done.returncode, 1, done)

    def test_closed_standard_streams_give_no_traceback(self):
        for closed in (">&-", ">&- 2>&-", "<&-"):
            with self.subTest(closed):
                self.home.run(check=0, program=[
                    "/bin/sh", "-c", 'exec "$0" "$@" claude ' + closed, *PYTHON, compiled()])
                self.assertEqual(self.home.read("mode"), "claude\n")

    def test_a_home_that_cannot_be_used_is_named(self):
        """Permissions do not stop root, so a file stands where the directory should be."""
        (self.home.root / ".rrouter").touch()
        commands = ("serve",), ("start",), ("claude",), ("config", "reset"), ("config", "edit")
        done = self.home.run_all(*commands[:2], timeout=WAIT_S * 2)
        done += [self.run_here(*arguments, EDITOR="true") for arguments in commands[2:]]
        done.append(self.home.run("start", env={"HOME": str(self.home.root / ".rrouter")}))
        for arguments, ended in zip([*commands, ("start",)], done):
            with self.subTest(arguments):
                self.assertEqual(ended.returncode, 1, ended)
                self.assertRegex(ended.stderr, r"(?m)^rrouter: .*\.rrouter")
        for arguments in (("status",), ("check",), ("stop",), ("config",), ("mode",)):
            with self.subTest(arguments):
                self.assertIn(self.run_here(*arguments).returncode, (0, 1, 3))
        self.assertEqual((self.home.root / ".rrouter").read_text(), "")

    def test_a_home_that_is_missing_or_relative_does_no_harm(self):
        for value in (None, "", "here"):
            with self.subTest(value):
                env = {"HOME": value} if value is not None else {}
                del self.home.env["HOME"]
                done = self.run_here("config", "path", **env)
                self.home.env["HOME"] = str(self.home.root)
                if value == "here":
                    self.assert_fails(done, 2, "HOME=here: expected the absolute path")
                else:
                    self.assertTrue(os.path.isabs(done.stdout.strip()), done)


# Runs commands of rrouter, found in the directory argv[1], many times: each time in a child that
# gets SIGINT at another moment, the n-th call of a function since `main` was called.  Prints the
# outcomes.  argv[3] is the statement that calls `main` in the program.
INTERRUPTER = """
import json, os, signal, sys, tempfile
directory, some, last, *commands = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)    # the tests may ignore it
sys.path.insert(0, directory)
import rrouter
names = dict(vars(rrouter), __name__="__main__")

def run(moment):
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            play(moment, output)
            sys.exit()
        status = os.waitpid(child, 0)[1]
        output.seek(0)
        return (os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status),
                output.read().decode())

def play(moment, output):
    calls = None

    def count(frame, event, _):
        nonlocal calls
        if calls is None and frame.f_code.co_name == "main":
            calls = 0
        if calls is not None and "call" in event:
            calls += 1
            if calls == moment:
                sys.setprofile(None)
                os.kill(os.getpid(), signal.SIGINT)
            elif moment is None:
                os.pwrite(output.fileno(), b"%d" % calls, 0)

    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null if moment is None else output.fileno(), 2)
    sys.setprofile(count)
    exec(last, names)

for command in commands:
    sys.argv = ["rrouter", command]
    total = int(run(None)[1])
    moments = {1, 2, *range(3, total, total // int(some)), *range(total - 4, total + 3)}
    print(json.dumps([total, [(moment, *run(moment)) for moment in sorted(moments)]]))
"""


class InterruptTest(CommandTest):
    """Ctrl-C at any moment of a command, also the last: it ends and prints nothing."""

    MOMENTS = 300 if SOAKING else 5

    def test_no_moment_shows_a_traceback(self):
        if SOAKING:
            print("soak: Ctrl-C at some %d moments of two commands" % self.MOMENTS, file=sys.stderr)
        own = {"nosuch": 2, "claude": 0}        # command: its status without Ctrl-C
        last = re.search(r"(?m)^if __name__ == .*\n(?:(?: .*)?\n?)*\Z", RROUTER_TEXT).group()
        done = self.home.run("-c", INTERRUPTER, os.path.dirname(compiled()), str(self.MOMENTS),
                             last, *own, program=PYTHON, timeout=WAIT_S * (60 if SOAKING else 3),
                             check=0)
        outcomes = [json.loads(line) for line in done.stdout.splitlines()]
        self.assertEqual(len(outcomes), len(own))
        for command, (total, moments) in zip(own, outcomes):
            self.assertGreater(len(moments), self.MOMENTS)
            for moment, status, printed in moments:
                if printed.startswith("Exception ignored in: <function _get_module_lock"):
                    continue        # Python's import swallowed it in a callback
                with self.subTest(command, moment=moment):
                    self.assertNotRegex(
                        printed, "Traceback|Exception ignored|KeyboardInterrupt")
                    ends = (130, -signal.SIGINT, own[command] if moment > total - 5 else 130)
                    self.assertIn(status, ends)


EDITOR = """#!/bin/sh
# Stand-in: notes its arguments and the file it gets, writes $NEW if set, ends with $CODE.
for file; do :; done
printf '%s\\n' "$0" "$@" > "$HOME/arguments"
cat "$file" > "$HOME/given"
[ -z "$NEW" ] || printf %s "$NEW" > "$file"
exit "${CODE:-0}"
"""


class ConfigCommandTest(CommandTest):
    """`config` and its actions."""

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

    def test_config_prints_json_alone_on_stdout(self):
        done = self.run_here("config", check=0, RROUTER_PORT="abc", RROUTER_UPSTREAM="ftp://x")
        self.assertEqual(json.loads(done.stdout), DEFAULT_CONFIG)
        self.assertIn(str(self.file), done.stderr)
        self.assertEqual(self.run_here("config", "path"), (0, str(self.file) + "\n", ""))

    def test_config_prints_the_config_in_force(self):
        config = switchboard(3, auto={"targets": ["two", "one"], "failureThreshold": 1})
        self.home.write("config.json", json.dumps(config))
        printed = json.loads(self.run_here("config", check=0).stdout)
        self.assertEqual(printed["modes"], config["modes"])
        self.assertEqual(printed["auto"], {**DEFAULT_CONFIG["auto"], **config["auto"]})

    def test_config_complains_about_a_bad_file(self):
        self.home.write("config.json", "{")
        done = self.run_here("config", check=1)
        self.assertRegex(done.stderr, r"config\.json.*1:2")
        self.assertEqual(done.stdout, "")

    def test_edit_begins_with_the_defaults(self):
        done = self.edit("/nonexistent", VISUAL="'%s' -w" % self.editor)
        self.assertEqual(done.returncode, 0, done)
        self.assertEqual((self.home.root / "arguments").read_text().splitlines(),
                         [str(self.editor), "-w", str(self.file)])
        self.assert_defaults(self.home.root / "given")
        self.assertEqual(stat.S_IMODE(self.file.stat().st_mode), 0o600)

    def test_edit_falls_back_to_vi(self):
        programs = self.home.root / "bin"
        programs.mkdir()
        shutil.copy(str(self.editor), str(programs / "vi"))
        for env in ({"VISUAL": "", "EDITOR": ""}, {}):
            with self.subTest(env):
                path = "%s:%s" % (programs, self.home.env["PATH"])
                self.run_here("config", "edit", check=0, PATH=path, **env)
                used = (self.home.root / "arguments").read_text().splitlines()[0]
                self.assertEqual(os.path.basename(used), "vi")

    def test_edit_judges_the_result(self):
        for new, status, pattern in (
                (json.dumps(switchboard(1)), 0, r"\A\Z"),
                ("{", 1, r"config\.json.*1:2"),
                (altered("auto.failureThreshold", "3"), 1, r"auto\.failureThreshold")):
            with self.subTest(new):
                done = self.edit(NEW=new)
                self.assertEqual(done.returncode, status, done)
                self.assertRegex(done.stderr, pattern)
                self.assertEqual(self.file.read_text(), new)

    def test_an_editor_that_fails_is_named(self):
        for command, pattern in ((None, "7"), ("/nonexistent/editor -w", "/nonexistent/editor"),
                                 ("'unbalanced", "unbalanced"), ("'%s'" % self.home.root, "")):
            with self.subTest(command):
                done = self.edit(command, CODE="7")
                self.assert_fails(done, 1, "rrouter: .*%s" % pattern)

    def test_reset_keeps_each_file_it_replaces(self):
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
        """People keep such files in a repository."""
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
    """`rrouter usage` reads the rotated logs."""

    REQ = "[REQ] #1 POST /v1/messages claude-opus-5-5 -> "
    LOGS = {
        "rrouter.log.3": ("2026-01-01 10:00:00.000 " + REQ + "claude old 200 1.00s in 1+2 out 3",),
        "rrouter.log.1": (
            "%(day)s 10:00:00.000 " + REQ + "antigravity gemini 200 1.00s in 1203+48211 out 512",
            "%(day)s 10:00:01.000 [AUTO] #1 " + REQ, "half a li"),
        "rrouter.log": (
            "%(day)s 10:00:02.000 " + REQ + "antigravity gemini 200 1.00s (claude failed: 429)",
            "%(day)s 10:00:03.000 " + REQ + "antigravity gemini 400 0.02s (claude failed: 429)",
            "%(day)s 10:00:04.000 " + REQ + "antigravity gemini 200 0.02s in 7+0 out 1 "
            "(error event in the stream)",
            "%(day)s 10:00:05.000 " + REQ + "antigravity gemini 499 9.00s (the client left)",
            "%(day)s 10:00:06.000 [REQ] #7 GET /v1/models 200 1.00s",
            "%(day)s 10:00:07.000 [REQ] #8 POST /@claude/v1/messages a b -> c d -> claude e 200 "
            "0.10s (sent again: the kept connection was stale)",
            "%(day)s 10:00:08.000 [REQ] #9 POST /v1/messages/count_tokens a -> claude e 200 0.10s")}

    def setUp(self):
        super().setUp()
        self.day = time.strftime("%Y-%m-%d")
        (self.home.dir / "logs").mkdir(parents=True)
        for name, lines in self.LOGS.items():
            self.home.write("logs/" + name, "\n".join(lines) % {"day": self.day} + "\n")

    def test_it_adds_up_by_day_target_and_model(self):
        for days, expected in (("1", 2), ("99999999", 3), ("-5", 2)):
            done = self.run_here("usage", "--json", f"--days={days}", check=0)
            rows = [list(row.values()) for row in json.loads(done.stdout)]
            self.assertEqual(rows[-2:], [
                [self.day, "antigravity", "gemini", 5, 1, 2, 1210, 48211, 513],
                [self.day, "claude", "e", 1, 0, 0, 0, 0, 0]])
            self.assertEqual(len(rows), expected)

    def test_it_is_a_table_within_80_columns_with_bars_on_a_terminal(self):
        done = self.run_here("usage", check=0)
        self.assertEqual(done.stdout.splitlines()[1:], [
            "2026-01-01",
            "  claude old                                 1       0      0     1      2     3",
            self.day,
            "  antigravity gemini                         5       1      2  1210    48k   513",
            "  claude e                                   1       0      0     0      0     0",
            "all                                          7       1      2  1211    48k   516"])
        key = self.day, "antigravity", "m" * 99
        for count, bar in ((10 ** 15, "#" * 60), (1, "#" * 60), (0, "")):
            counts = collections.Counter(dict.fromkeys(rrouter.USAGE_COLUMNS, count))
            lines = list(rrouter.usage_table({key: counts}, True))
            self.assertEqual(lines[1], f"{self.day} {bar}")
            self.assertEqual({len(line) for line in lines} - {len(lines[1])}, {80})


class CopiedFileTest(LoopbackTest):

    def test_modules_beside_the_copied_file_are_never_imported(self):
        home = self.make_home("http://127.0.0.1:9")
        folder = home.root / "bin"
        folder.mkdir()
        shutil.copy(RROUTER, str(folder / "rrouter"))
        for name in ("argparse", "calendar", "email", "json", "socket", "zlib"):
            (folder / f"{name}.py").write_text("raise SystemExit('imported')\n")
        for command in ("version", "help", "config", "mode", "start", "status", "check", "stop"):
            with self.subTest(command):
                done = subprocess.run([*PYTHON, str(folder / "rrouter"), command], text=True,
                                      env=home.env, stdin=subprocess.DEVNULL, timeout=60,
                                      capture_output=True)
                self.assertNotIn("imported", done.stdout + done.stderr)
                self.assertEqual(done.returncode, int(command == "check"), done)


class EnvironmentTest(CommandTest):
    """Values are judged by ReadEnvironmentTest; these commands need them."""

    def test_an_empty_home_counts_as_unset(self):
        import pwd
        expected = os.path.join(pwd.getpwuid(os.getuid()).pw_dir, ".rrouter", "config.json")
        self.assertEqual(self.home.run("config", "path", check=0, env={"HOME": ""}).stdout.strip(),
                         expected)

    def test_an_odd_umask_keeps_the_files_readable(self):
        shell = ["/bin/sh", "-c", 'umask 0777; exec "$@"', "sh", *PYTHON, RROUTER]
        for command in (("ag",), ("config", "reset"), ("mode",), ("config",)):
            self.home.run(*command, program=shell, check=0)
        for name in ("mode", "config.json"):
            self.assertEqual(stat.S_IMODE((self.home.dir / name).stat().st_mode), 0o600)

    def test_an_unknown_mode_is_shown_and_written_in_any_script_and_locale(self):
        locales = {}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        for env in locales:
            done = self.home.run("mode", "\ud55c".encode(), env=env)
            self.assert_fails(done, 1, r"mode '\\ud55c' is not defined")
        with Running(None, home=self.home, mode=None):
            self.home.write("config.json", "{")         # the daemon judges the mode
            for env in locales:
                done = self.home.run("mode", "\ud55c".encode(), env=env, check=1)
                self.assertIn("is in mode claude", done.stderr)
                self.assertEqual(self.home.read("mode"), "\ud55c\n")

    def test_help_survives_the_loss_of_docstrings(self):
        done = self.home.run("help", program=[sys.executable, "-OO", RROUTER], check=0)
        self.assertIn("usage: rrouter COMMAND", done.stdout)

    def test_a_link_that_leads_nowhere_is_named_as_such(self):
        for target in ("nowhere", ".rrouter"):
            self.home.dir.symlink_to(target)
            for command in ("start", "ag"):
                self.assert_fails(self.home.run(command), 1, r"\.rrouter: .*leads nowhere: remove")
            self.assertIn("not running", self.home.run("status", check=3).stdout)
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
        commands = ("serve",), ("start",), ("restart",)
        ended = self.home.run_all(*commands, env={"RROUTER_PORT": "abc"}, timeout=WAIT_S * 2)
        for arguments, done in zip(commands, ended):
            with self.subTest(arguments):
                self.assert_fails(done, 2, "RROUTER_PORT=abc: .*65535")
        self.assertEqual(processes(self.home), [])


# Check ########################################################################

LISTED = [rule["rewrite"] for rule in DEFAULT_CONFIG["modes"]["antigravity"]["mappings"]]
PROXY_VARIABLES = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "all_proxy")


def list_models(*names):
    return Response(200, json.dumps({"data": [{"id": name} for name in names]}).encode())


class CheckTest(RouterTest):
    """`check` in a sound setup and in setups with one defect each; proxies are set all the time."""

    env = dict.fromkeys(PROXY_VARIABLES, "http://127.0.0.1:9")

    def setUp(self):
        super().setUp()
        self.home = self.rrouter.home
        self.url = "http://localhost:%d" % self.rrouter.port
        self.settings({"ANTHROPIC_BASE_URL": self.url, "ANTHROPIC_AUTH_TOKEN": "sk-secret-token"})
        self.models = list_models(*LISTED)
        self.upstream.default = lambda request: (
            self.models if request.target.startswith("/v1/models") else Response())

    def settings(self, env=None, text=None):
        """Write Claude Code's settings.json: this `env`, or this text."""
        path = self.home.root / ".claude" / "settings.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"env": env}) if text is None else text)

    def check(self, *patterns, **env):
        """Run it; see that status and lines agree and that each pattern is found.

        Return the lines that are not ok.
        """
        done = run_here(self.home, "check", **env)
        self.assertNotIn("sk-secret-token", done.stdout + done.stderr)
        for pattern in patterns:
            self.assertRegex(done.stdout, "(?m)^" + pattern)
        bad = re.findall(r"(?m)^(?:warn|fail) .*", done.stdout)
        self.assertEqual(done.returncode, any(line.startswith("fail") for line in bad), done.stdout)
        return bad

    def test_a_sound_setup_is_ok_in_every_line(self):
        self.assertEqual(self.check(r"ok +upstream: .* accepts the key", r"ok +config: ",
                                    ANTHROPIC_BASE_URL=self.url), [])
        self.assertEqual({request.method for request in self.upstream.received}, {"GET"})
        for request in self.upstream.received:
            self.assertEqual(request.target, "/v1/models")
            self.assertEqual(request.header("authorization"), "Bearer sk-secret-token")
            names = " ".join(name.lower() for name, _ in request.fields)
            self.assertNotIn("anthropic", names)        # with those the upstream disguises names
            self.assertNotIn("claude-cli", request.header("user-agent") or "")

    def test_proxies_of_the_environment_are_ignored(self):
        self.assertEqual(self.rrouter.post().status, 200)
        done = self.home.run("status", "--json", check=0)
        self.assertEqual(json.loads(done.stdout)["pid"], self.rrouter.process.pid)

    CLIENTS = (
        # settings.json,          shell,                 level,  words
        ("http://localhost:1",    "",                    "warn", "settings.json: .*elsewhere"),
        ("http://u:word@h:1",     "",                    "warn", r"\*\*\*@h:1: .*elsewhere"),
        ("{",                     "",                    "warn", "settings.json: not JSON"),
        ("[]",                    "",                    "warn", "settings.json: set "),
        ('{"env": 7}',            "",                    "warn", "settings.json: set "),
        ("{}",                    "",                    "warn", "settings.json: set "),
        ("{}",                    "here",                "ok",   "shell: "),
        ("here",                  "http://localhost:1/", "warn", "shell: .*points elsewhere"),
        ("here",                  "http://u:word@h:1",   "warn", r"shell: .*=http://\*\*\*@h:1 p"),
        ("here",                  "http://[::1",         "warn", "shell: .*points elsewhere"),
    )

    def test_a_client_that_points_elsewhere_is_named(self):
        for settings, shell, level, words in self.CLIENTS:
            with self.subTest(settings=settings, shell=shell):
                if settings[0] in "{[":
                    self.settings(text=settings)
                else:
                    self.settings({"ANTHROPIC_BASE_URL": settings.replace("here", self.url)})
                bad = self.check("%s +.*%s" % (level, words),
                                 ANTHROPIC_BASE_URL=shell.replace("here", self.url))
                self.assertEqual(len(bad), level == "warn", bad)
                self.assertNotIn("word", "".join(bad))

    UPSTREAMS = (
        # status and body of /v1/models,       key in,                 the warning
        (200, "{}",                            "ANTHROPIC_AUTH_TOKEN", "models: .* no list"),
        (200, '{"data":[{"id":1},{"id":"a"}]}', "ANTHROPIC_AUTH_TOKEN", "models: .* know gemini"),
        (404, "{}",                            "ANTHROPIC_AUTH_TOKEN", r"models: .* no list \(404"),
        (401, "{}",                            "ANTHROPIC_AUTH_TOKEN", "401.*ANTHROPIC_AUTH_TOKEN"),
        (403, "{}",                            "ANTHROPIC_API_KEY",    "403.*ANTHROPIC_API_KEY"),
        (401, "{}",                            "X",                    "refuses a request without"),
    )

    def test_an_upstream_that_refuses_or_answers_oddly_is_named(self):
        for status, body, name, words in self.UPSTREAMS:
            with self.subTest(status=status, body=body, key=name):
                self.models = Response(status, body.encode())
                self.settings({"ANTHROPIC_BASE_URL": self.url, name: "sk-secret-token"})
                self.check("warn +.*%s" % words)

    def test_names_the_upstream_does_not_know_come_with_their_remedy(self):
        self.models = list_models(LISTED[0], LISTED[1], "gemini-3-flash")
        self.assertEqual(len(self.check("warn +models: .* know %s" % LISTED[2],
                                        " +oauth-model-alias:", " +alias: .*%s" % LISTED[2])), 1)

    def test_bad_files_of_rrouter_are_named(self):
        put(self.home, "config.json", "{")
        self.addCleanup((self.home.dir / "config.json").unlink)
        put(self.home, "mode", "nosuch\n")
        self.check(r"fail +config: config\.json.*1:2", "warn +mode: .*nosuch")

    def test_an_installed_service_is_examined(self):
        unit = self.home.root / ".config" / "systemd" / "user" / "rrouter.service"
        program = self.home.root / "bin" / "rrouter"
        record = self.home.dir / "install.json"
        for path in (unit, program):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.addCleanup(path.unlink)
        unit.write_text("[Service]\n")
        program.write_text("")
        self.check("fail +service: .*starts .*/bin/rrouter, which does not exist")
        program.chmod(0o755)
        self.check("warn +service: .*its manager does not answer here", PATH="")
        record.write_text(json.dumps({"files": {str(unit): {"sha256": ["of another text"]}}}))
        self.addCleanup(record.unlink)
        self.check("warn +service: .*is not what install.sh wrote")

    def test_a_daemon_of_another_version_is_named(self):
        code = ("import sys; sys.path.insert(0, sys.argv[1]); import rrouter\n"
                "rrouter.__version__ = '9.9.9'; sys.exit(rrouter.main(['check']))")
        done = self.home.run("-c", code, os.path.dirname(compiled()), program=PYTHON, check=0)
        self.assertRegex(done.stdout, "(?m)^warn +version: .* this program 9.9.9: rrouter restart")

    def test_status_and_check_say_that_the_upstream_is_down(self):
        home = self.start_rrouter("http://127.0.0.1:9").home
        self.assertRegex(run_here(home, "status").stdout, "(?m)^upstream: .*:9, not reachable$")
        done = run_here(home, "check")
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stdout, r"(?m)^fail  upstream: http://127\.0\.0\.1:9 ")


# Installation #################################################################

# Stands in for systemctl and launchctl: notes each request, and starts and stops the service with
# the bare environment of a service.  Requests that contain the word in the file `fails` fail.
# As with the real launchd, `bootout` returns before the job ends, perhaps with 36, and launchd
# knows the job a while longer than its process lives.
MANAGER = r'''
import contextlib, os, signal, sys, time
here, home = os.path.dirname(os.path.abspath(__file__)), os.environ["HOME"]
asked = " ".join(sys.argv[1:])

def note(name):
    return os.path.join(here, name)

with open(note("asked"), "a") as file:
    file.write(asked.replace(home, "~") + "\n")
if os.path.exists(note("fails")):
    with open(note("fails")) as file:
        if file.read() in asked:
            sys.exit("scripted failure")

def pid():
    try:
        with open(note("pid")) as file:
            number = int(file.read())
        os.kill(number, 0)
        return number
    except (OSError, ValueError):
        return None

def wait_for(condition, failure):
    for _ in range(4000):
        if condition():
            return
        time.sleep(0.01)
    sys.exit(failure)

def stop():
    if pid():
        os.kill(pid(), signal.SIGTERM)
    wait_for(lambda: not pid(), "it does not end")
    with contextlib.suppress(FileNotFoundError):
        os.remove(note("pid"))

def start(command, **marks):
    """Return when the process exists; a short one may have ended by then."""
    stop()
    marks.update(HOME=home, PATH="/usr/bin:/bin:/usr/sbin:/sbin")
    if os.fork() == 0:      # the parent that reaps it at once, so that its end is seen
        try:
            os.setsid()
            for number in 0, 1, 2:
                os.dup2(os.open(os.devnull, os.O_RDWR), number)
            daemon = os.posix_spawn(command[0], command, marks)
            with open(note("new pid"), "w") as file:
                file.write(str(daemon))
            os.rename(note("new pid"), note("pid"))
            os.waitpid(daemon, 0)
        finally:
            os._exit(0)
    wait_for(lambda: os.path.exists(note("pid")), "it does not start")

unit = home + "/.config/systemd/user/rrouter.service"
verb = [word for word in sys.argv[1:] if not word.startswith("-")][0]
if verb == "print" and asked.endswith("com.rrouter"):
    sys.exit(not pid() and not os.path.exists(note("leaving")))
elif verb == "bootout":
    open(note("leaving"), "w").close()
    if os.fork() == 0:
        for number in 0, 1, 2:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        time.sleep(0.2)
        stop()
        time.sleep(0.4)
        os.remove(note("leaving"))
        os._exit(0)
    if os.path.exists(note("slow")):
        print("Boot-out failed: 36: Operation now in progress")
        sys.exit(36)
elif verb == "stop" or "disable --now" in asked:
    stop()
elif verb in ("start", "kickstart") and pid():
    pass
elif verb == "kickstart":
    sys.exit("Could not find service")
elif verb in ("start", "restart"):
    with open(unit) as file:
        lines = [line.rstrip().replace("%h", home) for line in file if "=" in line]
    settings = dict(line.split("=", 1) for line in lines)
    start(["/bin/sh", "-c",
           '[ ! -e "$1" ] || { set -a; . "$1"; }; SYSTEMD_EXEC_PID=$$ exec "$2" serve', "sh",
           settings["EnvironmentFile"].lstrip("-"), settings["ExecStart"].rpartition(" ")[0]],
          INVOCATION_ID="0" * 32)
elif verb == "bootstrap":
    if pid() or os.path.exists(note("leaving")):
        sys.exit("Bootstrap failed: 5: Input/output error")
    import plistlib
    with open(home + "/Library/LaunchAgents/com.rrouter.plist", "rb") as file:
        start(plistlib.load(file)["ProgramArguments"], XPC_SERVICE_NAME="com.rrouter")
'''

# Answers the requests of install.sh at once and does nothing: for tests of files alone.
STUB = r"""#!/usr/bin/env python3
import sys
RouterError = ValueError
def read_environment(environ):
    pass
if sys.argv[1:] == ["--version"]:
    print("rrouter 0.0.1")
elif sys.argv[1:] == ["status", "--json"]:
    print('{"startedBy": "start", "listenAddr": "localhost:8316"}')
"""

# Added to STUB: a daemon for a service manager.
SLEEPER = """
if sys.argv[1] == "serve":
    import signal
    signal.sigwait([signal.SIGTERM])
"""

# rrouter itself, compiled before: a start takes a third of the time.
COMPILED = """#!/usr/bin/env python3
import marshal
with open(%r, "rb") as file:
    exec(marshal.loads(file.read()[16:]))
"""

# Kills the whole installation just before the Python inside install.sh does KILL_AT.
KILLER = '''
import os, re, signal, sys
def kill(event, details):
    if (getattr(sys, "argv", [""])[0] == "-"
            and event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
            and re.search(os.environ["KILL_AT"], f"{event} {details[event == 'os.rename']}")):
        os.killpg(0, signal.SIGKILL)
sys.addaudithook(kill)
'''


@functools.lru_cache(None)
def light_python():
    """Return an interpreter like this one that starts fast: its site-packages hold KILLER alone."""
    root = pathlib.Path(tempfile.mkdtemp(prefix="rrouter-python-"))
    atexit.register(shutil.rmtree, str(root), True)
    real = os.path.realpath(sys.executable)
    # The directory of the standard library has the ABI in its name: python3.13t
    packages = root / "lib" / os.path.basename(os.path.dirname(os.__file__)) / "site-packages"
    packages.mkdir(parents=True)
    (packages / "killer.py").write_text(KILLER)
    (packages / "killer.pth").write_text(
        "import os; os.environ.get('KILL_AT') and __import__('killer')\n")
    (root / "pyvenv.cfg").write_text("home = %s\ninclude-system-site-packages = false\n"
                                     % os.path.dirname(real))
    (root / "bin").mkdir()
    (root / "bin" / "python3").symlink_to(real)
    return str(root / "bin" / "python3")


class Installation(Home):
    """An empty HOME with a space in its name, a clone, and stand-ins of the system's programs."""

    def __init__(self, router, system="Linux", deaf=False):
        super().__init__()
        self.home, self.clone, self.stand_ins = (
            self.root / name for name in ("ho me", "a clone", "stand-ins"))
        self.dir = self.home / ".rrouter"
        self.program = self.home / "bin" / "rrouter"
        self.unit = self.home / ".config" / "systemd" / "user" / "rrouter.service"
        self.agent = self.home / "Library" / "LaunchAgents" / "com.rrouter.plist"
        self.environment = self.home / ".config" / "rrouter.env"
        self.settings = self.home / ".claude" / "settings.json"
        self.url = "http://localhost:%d" % self.port
        self.env.update(HOME=str(self.home), PYTHON=light_python(), SHELL="/bin/bash",
                        PATH="%s:/usr/bin:/bin" % self.stand_ins)
        for directory in (self.home, self.clone, self.stand_ins):
            directory.mkdir()
        for name in ("install.sh", "rrouter.service", "com.rrouter.plist"):
            shutil.copy(str(HERE / name), str(self.clone))
        (self.clone / "rrouter.py").write_text(router, encoding="utf-8")
        self.stand_in("uname", "#!/bin/sh\necho %s\n" % system)
        for name in ("systemctl", "launchctl"):
            self.stand_in(name, "#!/bin/sh\nexec '%s' -IS \"${0%%/*}/manager.py\" \"$@\"\n"
                          % sys.executable)
        self.note("manager.py", MANAGER)
        self.note("asked", "")
        if deaf:
            self.note("fails", "")

    def stand_in(self, name, text):
        self.note(name, text)
        (self.stand_ins / name).chmod(0o755)

    def note(self, name, text):
        (self.stand_ins / name).write_text(text)

    def asked(self):
        """Return the orders to the service manager since the last call, without mere questions."""
        lines = (self.stand_ins / "asked").read_text().splitlines()
        self.note("asked", "")
        return [line for line in lines
                if not re.search(r"\b(show|print|reset-failed|enable gui)", line)]

    def install(self, *options, status=0, env=(), shell="sh"):
        """Run install.sh to its end and return all it printed."""
        printed = self.run(
            *options, program=[*shell.split(), str(self.clone / "install.sh")], check=status,
            env=env, cwd=str(self.root), stderr=subprocess.STDOUT, start_new_session=True).stdout
        if "Traceback" in printed:
            raise AssertionError(printed)
        return printed

    def rrouter(self, *arguments):
        """Run the installed program; return what it printed on stdout."""
        return self.run(*arguments, program=[str(self.program)], check=0).stdout

    @staticmethod
    def put(path, content, mode=0o644):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(mode)

    def tree(self, data=True):
        """Return all files under HOME as {name: (mode, content)}; with ~/.rrouter if `data`."""
        return {str(path.relative_to(self.home)): (
                    stat.S_IMODE(path.lstat().st_mode),
                    os.readlink(str(path)) if path.is_symlink() else
                    path.read_bytes() if path.is_file() else None)
                for path in sorted(self.home.rglob("*")) if data or ".rrouter" not in path.parts}

    def remove(self):
        """Stop all processes and remove the files."""
        if (self.stand_ins / "pid").exists():
            self.note("fails", "nothing")
            self.run("stop", program=[str(self.stand_ins / "systemctl")])
        if (self.dir / "rrouter.pid").exists():
            self.run("stop", program=[str(self.program)])
        super().remove()


class InstallTest(unittest.TestCase):
    """Base of the tests that install."""

    def installation(self, router=STUB, **options):
        installation = Installation(router, **options)
        self.addCleanup(installation.remove)
        return installation

    def side_by_side(self, check, rows):
        """Call `check` with each of the rows, all at once, because starts take most of the time."""
        with concurrent.futures.ThreadPoolExecutor(len(rows)) as pool:
            for row, future in [(row, pool.submit(check, *row)) for row in rows]:
                with self.subTest(row=row):
                    future.result()

    def assert_gone(self, home):
        """Nothing is left in HOME, and nothing runs."""
        self.assertEqual((home.tree(), home.health()), ({}, None))


class ServiceFilesTest(LoopbackTest):

    def test_the_unit_starts_restarts_and_stops_as_promised(self):
        unit = configparser.ConfigParser(interpolation=None)
        unit.optionxform = str
        unit.read(str(HERE / "rrouter.service"), encoding="utf-8")
        service = unit["Service"]
        self.assertEqual((service["Restart"], service["RestartPreventExitStatus"]),
                         ("on-failure", "2"))
        self.assertGreater(int(service["TimeoutStopSec"]), rrouter.DRAIN_S)
        self.assertIn("-HUP $MAINPID", service["ExecReload"])
        # All the starts that are allowed fit into their interval: a taken port ends in `failed`.
        self.assertLess(int(service["RestartSec"]) * int(unit["Unit"]["StartLimitBurst"]),
                        int(unit["Unit"]["StartLimitIntervalSec"]))
        self.assertEqual(unit["Install"]["WantedBy"], "default.target")

    def test_the_agent_starts_restarts_and_stops_as_promised(self):
        with open(str(HERE / "com.rrouter.plist"), "rb") as file:
            agent = plistlib.load(file)
        self.assertEqual(agent["Label"], "com.rrouter")
        self.assertEqual(agent["KeepAlive"], {"SuccessfulExit": False})
        self.assertGreaterEqual(agent["ThrottleInterval"], 10)
        self.assertGreater(agent["ExitTimeOut"], rrouter.DRAIN_S)

    def home_with_program(self):
        """Return a Home with rrouter as ~/bin/rrouter."""
        home = self.make_home(mode="claude")
        (home.root / "bin").mkdir()
        program = home.root / "bin" / "rrouter"
        program.write_text("#!%s\n%s" % (sys.executable, RROUTER_TEXT), encoding="utf-8")
        program.chmod(0o755)
        return home

    @unittest.skipUnless(shutil.which("systemd-analyze"), "systemd-analyze is not here")
    def test_systemd_finds_nothing_wrong_with_the_unit(self):
        home = self.home_with_program()
        (home.root / "run").mkdir()
        done = home.run(program=["systemd-analyze", "--user", "verify",
                                 str(HERE / "rrouter.service")],
                        env={"XDG_RUNTIME_DIR": str(home.root / "run")}, stderr=subprocess.STDOUT)
        self.assertEqual((done.returncode, done.stdout), (0, ""))

    @unittest.skipUnless(subprocess.run(
        ["sh", "-c", "systemctl --user show-environment"], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, timeout=WAIT_S).returncode == 0, "no systemd user manager here")
    def test_a_real_user_manager_runs_the_unit(self):
        """The unit has another name and this HOME, so that an installed rrouter stays untouched."""
        home = self.home_with_program()
        (home.root / ".config").mkdir()
        (home.root / ".config" / "rrouter.env").write_text("RROUTER_PORT=%d\n" % home.port)
        name = "rrouter-test-%d.service" % os.getpid()
        unit = pathlib.Path(os.environ["XDG_RUNTIME_DIR"], "systemd", "user", name)
        unit.parent.mkdir(parents=True, exist_ok=True)
        text = (HERE / "rrouter.service").read_text(encoding="utf-8")
        text = text.replace("=%h/bin/rrouter", '="%h/bin/rrouter"').replace(
            "[Service]", '[Service]\nEnvironment="HOME=%h"')
        unit.write_text(text.replace("%h", str(home.root)))

        def systemctl(*words):
            return subprocess.run(["systemctl", "--user", *words], stdout=subprocess.PIPE,
                                  check=True, text=True, timeout=60).stdout
        try:
            systemctl("daemon-reload")
            systemctl("start", name)
            self.assertEqual(wait_until(home.health)["startedBy"], "systemd")
            home.run("auto", check=0)
            systemctl("reload", name)
            systemctl("stop", name)
            self.assertIn("Result=success", systemctl("show", "-p", "Result", name))
        finally:
            systemctl("stop", name)
            unit.unlink()
            systemctl("daemon-reload")


class InstallScriptTest(InstallTest):

    def test_an_output_that_cannot_be_written_stops_it(self):
        home = self.installation()
        stopped = "install.sh: stopped, for nobody reads its output; run it again to go on\n"
        full = "install.sh: [Errno 28] No space left on device\n"
        # label, options, what stderr says
        rows = [("closed pipe", ["--dry-run"], ""), ("closed pipe", [], stopped)]
        if os.path.exists("/dev/full"):
            rows.append(("full", ["--dry-run"], full))
        for label, options, says in rows:
            with self.subTest(label, options=options):
                if label == "full":
                    output = os.open("/dev/full", os.O_WRONLY)
                else:
                    reader, output = os.pipe()
                    os.close(reader)
                try:
                    done = home.run(*options, program=["sh", str(home.clone / "install.sh")],
                                    stdout=output, check=1)
                finally:
                    os.close(output)
                self.assertEqual(done.stderr, says)
        home.install()

    OPTIONS = (
        # options                       status  says
        (["-h"],                        0,      "Usage: ./install.sh"),
        (["--claud"],                   2,      "unknown option --claud"),
        (["claude"],                    2,      "unknown option claude"),
        (["--purge"],                   2,      "--purge goes with --uninstall"),
        (["--uninstall", "--claude"],   2,      "--claude"),
    )

    def test_wrong_options_change_nothing(self):
        home = self.installation()
        for options, status, says in self.OPTIONS:
            with self.subTest(options=options):
                self.assertIn(says, home.install(*options, status=status))
        self.assertEqual((home.tree(), home.asked()), ({}, []))

    def test_a_dry_run_changes_nothing_and_every_shell_gives_the_same_plan(self):
        home = self.installation()
        plans = {home.install("--dry-run", "--claude", shell=shell)
                 for shell in ("sh", "bash --posix", "busybox sh", "zsh --emulate sh")
                 if shutil.which(shell.split()[0])}
        self.assertEqual(len(plans), 1, plans)
        plan = plans.pop()
        for says in ("would install ~/bin/rrouter", "would run systemctl --user enable",
                     "would set the mode to auto", "would set env.ANTHROPIC_BASE_URL"):
            self.assertIn(says, plan)
        created = re.findall("would create (.*)", plan)
        self.assertIn("~/.config", created)
        self.assertEqual(len(created), len(set(created)), created)
        self.assertEqual((home.tree(), home.asked()), ({}, []))
        home.put(home.program, b"another program\n", 0o755)
        before = home.tree()
        self.assertIn("would keep the old ~/bin/rrouter", home.install("--dry-run"))
        self.assertEqual((home.tree(), home.asked()), (before, []))

    def test_a_bad_setting_of_this_shell_stops_it_before_any_change(self):
        home = self.installation(RROUTER_TEXT)
        said = home.install(status=1, env={"RROUTER_PORT": "eighty"})
        self.assertIn("RROUTER_PORT=eighty", said)
        self.assertEqual(home.tree(), {})

    def test_a_program_that_does_not_start_replaces_nothing(self):
        home = self.installation(deaf=True)
        home.install()
        before = home.tree(data=False)
        broken = STUB.replace('print("rrouter 0.0.1")', "sys.exit(1)")
        (home.clone / "rrouter.py").write_text(broken)
        self.assertIn("does not start here", home.install(status=1))
        self.assertEqual(home.tree(data=False), before)

    def test_a_daemon_that_does_not_start_leaves_the_settings_of_claude_code(self):
        taken = "rrouter: port 8316 is taken by another program"
        home = self.installation(
            STUB + 'elif sys.argv[1] == "restart":\n    sys.exit("%s")\n' % taken, deaf=True)
        self.assertIn(taken, home.install("--claude", status=1))
        self.assertFalse(home.settings.exists())

    def test_a_path_without_bin_is_named_with_the_remedy(self):
        home = self.installation()
        path = "%s:%s" % (home.program.parent, home.env["PATH"])
        for shell, says in (("/bin/zsh", "~/.zshrc"), ("/usr/bin/fish", "fish_add_path")):
            self.assertIn(says, home.install("--dry-run", env={"SHELL": shell}))
        self.assertNotIn("PATH", home.install("--dry-run", env={"PATH": path}))


class PythonChoiceTest(InstallTest):

    def setUp(self):
        self.home = self.installation(deaf=True)
        # Only the stand-ins and the tools of the script: the machine's interpreters are hidden.
        self.tools = self.home.root / "tools"
        self.tools.mkdir()
        for tool in ("sh", "awk", "cat", "dirname", "id", "tail"):
            (self.tools / tool).symlink_to(shutil.which(tool))
        del self.home.env["PYTHON"]
        self.home.env["PATH"] = "%s:%s" % (self.home.stand_ins, self.tools)

    def old(self, name):
        """Make an interpreter that believes to be 3.8."""
        self.home.stand_in(name, '#!/bin/sh\nexec "%s" -c \'import sys; sys.version_info = '
                           '(3, 8, 18); code = sys.argv.pop(1); exec(code)\' "$4" "$5" "$6"\n'
                           % sys.executable)

    def broken(self, name):
        self.home.stand_in(name, "#!/bin/sh\necho 'no such version' >&2\nexit 127\n")

    def test_old_and_broken_ones_are_passed_over_and_a_shim_is_resolved(self):
        self.old("python3")
        self.broken("python3.13")
        self.home.stand_in("python3.12", '#!/bin/sh\nexec "%s" "$@"\n' % sys.executable)
        self.home.install()
        line = self.home.program.read_text().split("\n")[0]
        self.assertEqual(os.path.realpath(line[2:]), os.path.realpath(sys.executable))
        self.assertEqual(stat.S_IMODE(self.home.program.stat().st_mode), 0o755)

    @unittest.skipIf(any(map(os.path.exists, ("/usr/local/bin/python3",
                                              "/opt/homebrew/bin/python3"))), "one is always here")
    def test_without_a_usable_one_all_that_were_found_are_named(self):
        self.old("python3")
        self.broken("python3.9")
        said = self.home.install(status=1)
        for says in ("3.9 or newer", "stand-ins/python3: is Python 3.8",
                     "python3.9: no such version", "PYTHON"):
            self.assertIn(says, said)
        self.assertEqual(self.home.tree(), {})

    def test_the_variable_overrides_the_search(self):
        self.old("python3")
        for value, says in (("python3", "is Python 3.8"), ("/no/python", "not a program")):
            self.assertIn(says, self.home.install(status=1, env={"PYTHON": value}))

    def test_an_interpreter_with_a_space_in_its_path_runs_the_program(self):
        spaced = self.home.root / "my pythons" / "python3"
        spaced.parent.mkdir()
        spaced.symlink_to(os.path.realpath(sys.executable))
        self.home.env["PATH"] += ":/usr/bin:/bin"
        said = self.home.install(env={"PYTHON": str(spaced)})
        self.assertIn("Python: %s\n" % spaced, said)
        self.assertIn(str(spaced), self.home.program.read_text().split("\n")[0])
        self.assertEqual(self.home.rrouter("--version"), "rrouter 0.0.1\n")


class InstalledLifeTest(InstallTest):
    """From an empty HOME through an upgrade to the uninstallation, with the real daemon."""

    def installation(self, **options):
        return super().installation(COMPILED % compiled(), **options)

    def test_without_a_manager_the_daemon_is_forked(self):
        home = self.installation(deaf=True)
        said = home.install()
        self.assertIn("systemctl --user does not answer: scripted failure", said)
        self.assertIn('"ANTHROPIC_BASE_URL": "%s"' % home.url, said)
        first = home.health()
        self.assertEqual((first["startedBy"], first["mode"], first["problems"]),
                         ("start", "auto", []))
        self.assertEqual([stat.S_IMODE(path.stat().st_mode) for path in (
            home.dir, home.dir / "mode", home.dir / "config.json", home.program)],
            [0o700, 0o600, 0o600, 0o755])
        self.assertFalse(home.unit.exists() or home.agent.exists() or home.settings.exists())
        # The user's decisions since, and another version: the real file.
        home.write("mode", "mine\n")
        home.write("config.json", '{"modes": {"mine": {"mappings": []}}, "defaultMode": "mine"}')
        (home.clone / "rrouter.py").write_text(RROUTER_TEXT, encoding="utf-8")
        self.assertIn("upgrade ~/bin/rrouter", home.install())
        self.assertEqual(home.program.read_text(encoding="utf-8").partition("\n")[2],
                         RROUTER_TEXT.partition("\n")[2])
        second = home.health()
        self.assertEqual((second["pid"] == first["pid"], second["mode"]), (False, "mine"))
        home.install("--uninstall")
        self.assertEqual(home.tree(data=False), {})
        self.assertEqual(home.read("mode"), "mine\n")
        self.assertIn("mine", home.read("config.json"))
        self.assertIsNone(home.health())

    def test_an_upgrade_keeps_the_settings_of_the_forked_daemon(self):
        """It may run in another shell; what that one sets holds."""
        home = self.installation(deaf=True)
        home.install(env={"RROUTER_HOST": "127.0.0.1", "RROUTER_UPSTREAM": "http://127.0.0.1:9/a"})
        del home.env["RROUTER_PORT"], home.env["RROUTER_UPSTREAM"]
        for upstream, env in (("http://127.0.0.1:9/a", {}),
                              ("http://h.invalid/b", {"RROUTER_UPSTREAM": "http://h.invalid/b"})):
            with self.subTest(env=env):
                self.assertIn("answers at http://127.0.0.1:%d" % home.port, home.install(env=env))
                health = home.health()
                self.assertEqual((health["listenAddr"], health["upstreamURL"]),
                                 ("127.0.0.1:%d" % home.port, upstream))

    def test_systemd_takes_over_from_the_forked_daemon(self):
        home = self.installation(deaf=True)
        home.install()
        home.note("fails", "nothing")
        home.asked()
        self.assertIn("stop the running rrouter (started by start)", home.install("--claude"))
        self.assertEqual(home.asked(), ["--user daemon-reload", "--user enable rrouter.service",
                                        "--user restart rrouter.service"])
        self.assertEqual(home.unit.read_bytes(), (HERE / "rrouter.service").read_bytes())
        before = home.health()
        self.assertEqual((before["startedBy"], before["mode"]), ("systemd", "auto"))
        self.assertEqual(json.loads(home.settings.read_text()),
                         {"env": {"ANTHROPIC_BASE_URL": home.url}})
        home.rrouter("restart")
        self.assertEqual([line for line in home.asked() if "reload" not in line],
                         ["--user stop rrouter.service", "--user start rrouter.service"])
        after = home.health()
        self.assertEqual((after["startedBy"], after["pid"] == before["pid"]), ("systemd", False))
        tree = home.tree(data=False)
        plan = home.install("--uninstall", "--purge", "--dry-run")
        for says in ("would remove ~/bin/rrouter", "would remove ~/.rrouter",
                     "would put env.ANTHROPIC_BASE_URL", "would run systemctl --user disable"):
            self.assertIn(says, plan)
        self.assertEqual((home.tree(data=False), home.asked()), (tree, []))
        home.install("--uninstall", "--purge")
        self.assertEqual(home.asked(),
                         ["--user disable --now rrouter.service", "--user daemon-reload"])
        self.assert_gone(home)

    def test_launchd_runs_it(self):
        home = self.installation(system="Darwin")
        bootstrap = "bootstrap gui/%d ~/Library/LaunchAgents/com.rrouter.plist" % os.getuid()
        bootout = "bootout gui/%d/com.rrouter" % os.getuid()
        home.install()
        self.assertEqual((home.health()["startedBy"], home.asked()), ("launchd", [bootstrap]))
        home.install()                  # `kickstart -k` would keep the old plist
        self.assertEqual(home.asked(), [bootout, bootstrap])
        home.rrouter("stop")
        self.assertEqual((home.health(), home.asked()), (None, [bootout]))
        home.rrouter("start")
        self.assertEqual((home.health()["startedBy"], home.asked()[0]), ("launchd", bootstrap))
        home.note("slow", "")
        before = home.health()["pid"]
        home.rrouter("restart")
        self.assertNotEqual(home.health()["pid"], before)
        self.assertEqual((home.health()["startedBy"], home.asked()[:2]),
                         ("launchd", [bootout, bootstrap]))
        (home.stand_ins / "slow").unlink()
        home.install("--uninstall", "--purge")
        self.assert_gone(home)


class ServiceManagerTest(InstallTest):
    """Orders to systemd, and the files of the service; the daemon is a stand-in."""

    def installation(self, started_by="systemd"):
        return super().installation(STUB.replace('"start"', '"%s"' % started_by) + SLEEPER)

    ENVIRONMENTS = (
        # port, upstream, host of the shell    lines of rrouter.env after the installation
        (("", "http://h:1", ""),               "UPSTREAM='http://h:1'"),
        (("9006", "http://h/a=b", "::1"),      "HOST='::1' PORT='9006' UPSTREAM='http://h/a=b'"),
        (("9007", "", ""),                     "HOST='::1' PORT='9007' UPSTREAM='http://h/a=b'"),
    )

    def test_an_upgrade_restarts_the_service_and_keeps_data_and_environment(self):
        home, names = self.installation(), ("RROUTER_PORT", "RROUTER_UPSTREAM", "RROUTER_HOST")
        for values, lines in self.ENVIRONMENTS:
            with self.subTest(values=values):
                home.asked()
                home.install(env=zip(names, values))
                self.assertEqual(sorted(home.environment.read_text().splitlines()[1:]),
                                 ["RROUTER_" + line for line in lines.split()])
                self.assertEqual(home.asked(), [
                    "--user daemon-reload", "--user enable rrouter.service",
                    "--user restart rrouter.service"])
                for name in ("mode", "config.json", "state.json"):
                    if (home.dir / name).exists():
                        self.assertEqual(home.read(name), "decided since\n")
                    home.write(name, "decided since\n")

    def test_a_manager_out_of_reach_finds_no_unit_after_the_uninstallation(self):
        home = self.installation()
        home.install()
        wanted = home.unit.parent / "default.target.wants" / "rrouter.service"
        wanted.parent.mkdir()
        wanted.symlink_to(home.unit)
        home.note("fails", "")
        home.install("--uninstall", "--purge")
        self.assertEqual(home.tree(), {})

    def test_a_manager_that_cannot_start_it_is_replaced_by_the_fork(self):
        home = self.installation("start")
        home.note("fails", "enable")
        said = home.install()
        for says in ("scripted failure", "no service: systemd did not start it",
                     "run rrouter start instead"):
            self.assertIn(says, said)
        self.assertFalse(home.unit.exists())

    def test_files_of_the_user_stay_at_upgrade_and_uninstallation(self):
        home = self.installation()
        content = b"RROUTER_HOST='127.0.0.1'\nRROUTER_PORT='9000'\n"     # as install.sh writes it
        home.put(home.environment, content)
        said = home.install(env={"RROUTER_PORT": "9000", "RROUTER_UPSTREAM": ""})
        self.assertIn("rrouter.env as it is: it is yours", said)
        home.unit.write_bytes(home.unit.read_bytes() + b"# mine\n")
        self.assertIn("rrouter.service as it is: changed since", home.install())
        self.assertTrue(home.unit.read_bytes().endswith(b"# mine\n"))
        home.install("--uninstall")
        self.assertEqual(home.environment.read_bytes(), content)
        self.assertEqual([path.name[:20] for path in home.unit.parent.iterdir()],
                         ["rrouter.service.bak-"])


class ForeignFilesTest(InstallTest):

    def installation(self):
        return super().installation(deaf=True)

    def test_another_program_of_that_name_comes_back(self):
        def check(label, make):
            home = self.installation()
            home.program.parent.mkdir()
            make(home.program)
            before = home.tree(data=False)
            self.assertIn("keep the old ~/bin/rrouter", home.install())
            self.assertEqual(home.rrouter("--version"), "rrouter 0.0.1\n")
            home.install("--uninstall")
            self.assertEqual(home.tree(data=False), before)

        self.side_by_side(check, (
            ("a binary", lambda path: (path.write_bytes(b"\x7fELF\0\xff"), path.chmod(0o750))),
            ("a dead link", lambda path: path.symlink_to("/no/such/rrouter"))))

    def test_changes_made_since_are_kept_beside(self):
        home = self.installation()
        home.install()
        for options in ((), ("--uninstall",)):
            changed = home.program.read_bytes() + b"# mine\n"
            home.program.write_bytes(changed)
            home.install(*options)
            self.assertIn(changed, [path.read_bytes() for path in
                                    home.program.parent.glob("rrouter.bak-*")])
        self.assertFalse(home.program.exists())

    def test_a_directory_in_the_way_is_refused(self):
        home = self.installation()
        home.program.mkdir(parents=True)
        self.assertIn("~/bin/rrouter: is a directory", home.install(status=1))

    def test_an_uninstallation_leaves_files_that_were_not_installed(self):
        home = self.installation()
        home.put(home.program, b"#!/bin/sh\n", 0o755)
        home.put(home.settings, b'{"env": {"ANTHROPIC_BASE_URL": "http://localhost:8316"}}')
        before = home.tree(data=False)
        said = home.install("--uninstall")
        self.assertIn("not installed by install.sh", said)
        self.assertIn("if it means rrouter, take it out", said)
        self.assertEqual(home.tree(data=False), before)

    def test_an_uninstallation_needs_neither_its_record_nor_readable_settings(self):
        home = self.installation()
        home.put(home.settings, b'{"env": {}, // mine\n}')
        before = home.tree(data=False)
        home.install()
        (home.dir / "install.json").unlink()
        home.install("--uninstall", "--purge")
        self.assertFalse(home.program.exists() or home.dir.exists())
        self.assertLessEqual(before.items(), home.tree(data=False).items())


class ClaudeSettingsTest(InstallTest):
    """`--claude`, and the way back."""

    URL = "http://localhost:8316"       # the address of the stub

    def installation(self, before):
        """Return one with these bytes, if any, as settings.json."""
        home = super().installation(deaf=True)
        if before is not None:
            home.put(home.settings, before, 0o640)
        return home

    def install(self, home):
        home.install("--claude")
        return json.loads(home.settings.read_text(encoding="utf-8"))

    def test_the_key_is_set_in_the_form_of_the_file_and_taken_back(self):
        tabs = '{\n\t"한국어": "값",\n\t"env": {\n\t\t"A": "1"\n\t}\n}'
        key = '"ANTHROPIC_BASE_URL": "%s"' % self.URL

        def check(before, after):
            home = self.installation(before)
            tree = home.tree(data=False)
            home.install("--claude")
            text = home.settings.read_text(encoding="utf-8")
            if isinstance(after, str):
                self.assertEqual(text, after)
            else:
                self.assertEqual(json.dumps(json.loads(text)), json.dumps(after))
            if before is not None:
                self.assertEqual(stat.S_IMODE(home.settings.stat().st_mode), 0o640)
            backups = [path.read_bytes() for path in
                       home.settings.parent.glob("settings.json.bak-*")]
            self.assertEqual(backups, [before] if before is not None else [])
            home.install("--uninstall")
            self.assertEqual(home.tree(data=False), tree)

        self.side_by_side(check, (
            # settings.json before, and after
            (None, '{\n  "env": {\n    %s\n  }\n}\n' % key),
            (b'{"env": {}, "model": "opus"}\n',
             {"env": {"ANTHROPIC_BASE_URL": self.URL}, "model": "opus"}),
            (tabs.encode(), tabs.replace('"1"', '"1",\n\t\t' + key)),
            (b'{"env":{"A":"1","ANTHROPIC_BASE_URL":"http://x","B":"2"},'
             b'\n\t"z":[1.50,1e-7,"\\ud83d\xed\x95\x9c"]}',
             {"env": {"A": "1", "ANTHROPIC_BASE_URL": self.URL, "B": "2"},
              "z": [1.5, 1e-7, "\ud83d\ud55c"]})))

    def test_settings_that_cannot_be_kept_are_refused_before_any_change(self):
        def check(content):
            home = self.installation(content)
            before = home.tree()
            self.assertIn("~/.claude/settings.json", home.install("--claude", status=1))
            self.assertEqual(home.tree(), before)

        self.side_by_side(check, [[content] for content in (
            b'{"a": 1, // why\n "env": {}}', b"[]", b'{"env": null}', b'{"a": 1, "a": 2}',
            b'{"a": 1e999}', b'{"a": "\xff"}', b"[" * 100000)])

    def test_a_link_stays_one_a_new_port_is_written_and_the_first_value_comes_back(self):
        home = self.installation(None)
        real = home.home / "dot files" / "claude.json"
        home.put(real, b'{"env": {"ANTHROPIC_BASE_URL": "http://x"}}', 0o600)
        home.settings.parent.mkdir()
        home.settings.symlink_to("../dot files/claude.json")
        before = home.tree(data=False)
        home.install("--claude")
        (home.clone / "rrouter.py").write_text(STUB.replace("8316", "9000"))
        home.install()                  # follows an earlier --claude
        self.assertTrue(home.settings.is_symlink())
        self.assertEqual(json.loads(real.read_text()),
                         {"env": {"ANTHROPIC_BASE_URL": "http://localhost:9000"}})
        home.install("--uninstall")
        self.assertEqual(home.tree(data=False), before)

    def test_other_changes_made_since_are_kept(self):
        def check(before, since, left):
            home = self.installation(before and json.dumps(before).encode())
            home.settings.write_text(json.dumps(dict(self.install(home), **since)))
            home.install("--uninstall")
            self.assertEqual(json.loads(home.settings.read_text()), left)

        url = "ANTHROPIC_BASE_URL"
        self.side_by_side(check, (
            # before              added since          left in the end
            (None,                {"model": "x"},      {"model": "x"}),
            ({"env": {}},         {"model": "x"},      {"env": {}, "model": "x"}),
            ({"env": {url: "y"}}, {"model": "x"},      {"env": {url: "y"}, "model": "x"}),
            ({"a": 1},            {"env": {url: "z"}}, {"a": 1, "env": {url: "z"}})))


class InterruptedInstallTest(InstallTest):
    """A killed installation leaves all files in working order, and can go on or back."""

    POINTS = (
        # the option, the point at which it is killed, whether it is run again before the way back
        ("--claude",    "rename .*install[.]json$",           False),
        ("--claude",    "rename .*bin/rrouter[.]bak-",        True),
        ("--claude",    "rename .*bin/rrouter$",              False),
        ("--claude",    "rename .*settings[.]json[.]bak-",    False),
        ("--claude",    "rename .*settings[.]json$",          False),
        ("--uninstall", "rename .*settings[.]json$",          False),
    )

    def check(self, option, point, goes_on):
        home = self.installation(deaf=True)
        home.put(home.program, b"#!/bin/sh\necho the old one\n", 0o755)
        home.put(home.settings, b'{"env": {"ANTHROPIC_BASE_URL": "http://x"}}')
        before = home.tree()
        if option == "--uninstall":
            home.install("--claude")
        home.install(option, status=-signal.SIGKILL, env={"KILL_AT": point})
        self.assertIn(home.rrouter("--version"), ("the old one\n", "rrouter 0.0.1\n"))
        self.assertIn(json.loads(home.settings.read_text())["env"]["ANTHROPIC_BASE_URL"],
                      ("http://x", "http://localhost:8316"))
        if goes_on:
            home.install(option)
            self.assertEqual(home.rrouter("--version"), "rrouter 0.0.1\n")
        home.install("--uninstall", "--purge")
        now = home.tree()
        for name in set(now) - set(before):         # a copy of what is there anyway does no harm
            self.assertEqual(now.pop(name), before[name.partition(".bak-")[0]])
        self.assertEqual(now, before)

    def test_it_goes_on_or_back_from_every_point(self):
        self.side_by_side(self.check, self.POINTS)


# Faults of the machine ########################################################

def all_files(home):
    """Return {name: content} of all files under ~/.rrouter except the log and the lock."""
    return {path.name: path.read_bytes() for path in home.dir.rglob("*")
            if path.is_file() and path.name not in ("rrouter.log", "rrouter.lock", "fill")}


class FaultTest(LoopbackTest):
    """Base of the tests in a home whose auto mode switches at the first failure."""

    def setUp(self):
        self.upstream = self.start_upstream(stream())
        self.home = self.make_home(self.upstream, "auto", HASTY_CONFIG)

    def assert_told(self, done, *patterns):
        """The command failed with one readable line."""
        self.assertEqual((done.returncode, done.stdout), (1, ""), done)
        self.assertRegex(done.stderr, r"^rrouter: [^\n]+\n\Z")
        self.assertNotRegex(done.stderr, "internal error|output:")
        for pattern in patterns:
            self.assertRegex(done.stderr, pattern)

    def assert_switches(self, router):
        """A failure is rescued and auto mode switches; more requests are served."""
        self.upstream.play(error(503))
        self.assertEqual([router.post().status for _ in range(9)], [200] * 9)
        self.assertTrue(router.health()["autoSwitch"]["switched"])

    def wait_for_problems(self, router, *names):
        """Ask until exactly these files have a problem in /health, each once."""
        def is_so():
            self.assertEqual(router.post().status, 200)
            problems = router.health()["problems"]
            return sorted(problem.split(":")[0] for problem in problems) == sorted(names)
        wait_until(is_so)

    def assert_recovers(self, router):
        """Without a restart the problems go, and lines are written again."""
        before = len(router.log())
        self.wait_for_problems(router)
        wait_until(lambda: "[REQ]" in router.log()[before:])


class FullDiskTest(FaultTest):
    """No room for a single byte: requests are served, nothing is lost, one message says so."""

    def run_without_room(self, *arguments):
        """Run a command that can write to no file; its output goes to a pipe."""
        limits = 0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        return self.home.run(
            *arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))

    def test_commands_fail_and_change_nothing(self):
        old = all_files(self.home)
        for command, pattern in (
                (("claude",), r"\.rrouter/mode: .*(large|space).*free space"),
                (("config", "reset"), r"\.rrouter/config\.json: .*(large|space).*free space"),
                (("start",), r"rrouter\.lock: cannot be written: .*free space"),
                (("serve",), r"rrouter\.lock: cannot be written: .*free space")):
            with self.subTest(command):
                self.assert_told(self.run_without_room(*command), pattern)
                self.assertEqual(all_files(self.home), old)
        (self.home.dir / "config.json").unlink()
        self.assert_told(self.run_without_room("config", "edit"), r"config\.json: ")
        self.assertEqual(set(all_files(self.home)), set(old) - {"config.json"})
        self.home.run("start", check=0)                     # nothing of that hinders a later one
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

    def test_small_disk_that_fills_up_while_running(self):
        def mount(*command):
            return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                  timeout=WAIT_S * 2).returncode == 0

        old = all_files(self.home)
        if not shutil.which("mount") or not mount(
                "mount", "-t", "tmpfs", "-o", "size=128k,mode=0700", "rrouter", str(self.home.dir)):
            self.skipTest("no right to mount a small file system")
        self.addCleanup(mount, "umount", "-l", str(self.home.dir))
        for name, content in old.items():
            (self.home.dir / name).write_bytes(content)
        with Running(self.upstream, home=self.home) as router:
            router.post()
            wait_until(lambda: "[REQ]" in router.log())
            fill = self.home.dir / "fill"
            with contextlib.suppress(OSError), open(str(fill), "wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)
            # The last page of the log has some room left.
            wait_until(lambda: router.post().status == 200
                       and "rrouter.log" in str(router.health()["problems"]))
            self.assert_switches(router)
            self.wait_for_problems(router, "rrouter.log", "state.json")
            self.assertEqual(router.printed().count("log lines are lost"), 1)
            self.assert_told(self.home.run("claude"), "no space left")
            self.assertEqual({name: content for name, content in all_files(self.home).items()
                              if name.startswith(("mode", "config"))}, old)
            fill.unlink()
            self.assert_recovers(router)
            self.home.run("claude", check=0)
            self.assertEqual(router.health()["mode"], "claude")


LIBC = ctypes.CDLL(None)


def without_privileges():
    """Make root an ordinary user, for whom the rights of files count; for a child process."""
    if os.geteuid() == 0:
        for capability in range(64):                        # PR_CAPBSET_DROP
            LIBC.prctl(24, capability, 0, 0, 0)


class Powerless(Running):
    """rrouter for which the rights of files count."""

    def start(self):
        self.launch(compiled(), "serve", preexec_fn=without_privileges)


@unittest.skipIf(os.geteuid() == 0 and not hasattr(LIBC, "prctl"), "rights mean nothing to root")
class RightsTest(FaultTest):
    """Directories that cannot be written, and files that cannot be read."""

    def run_powerless(self, *arguments):
        return self.home.run(*arguments, preexec_fn=without_privileges)

    def test_home_that_becomes_read_only_while_running(self):
        with Powerless(self.upstream, home=self.home) as router:
            for directory in (self.home.dir / "logs", self.home.dir, self.home.root):
                directory.chmod(0o500)
                self.addCleanup(directory.chmod, 0o700)
            self.assert_switches(router)
            self.wait_for_problems(router, "state.json")
            for _ in range(3):                  # something new to save each time, and another look
                self.upstream.play(error(503), error(503))
                self.assertEqual(router.post().status, 503)
                router.process.send_signal(signal.SIGHUP)
            wait_until(lambda: "SIGHUP" in router.log())
            self.wait_for_problems(router, "state.json")
            self.assertEqual(router.log().count("state.json: cannot be written"), 1)
            for directory in (self.home.root, self.home.dir):
                directory.chmod(0o700)
            self.assert_recovers(router)
            self.assertIn("last 503", self.home.read("state.json"))

    def test_files_that_become_unreadable_while_running(self):
        with Powerless(self.upstream, home=self.home) as router:
            before = router.health()
            for name in ("mode", "config.json"):
                (self.home.dir / name).chmod(0)
                self.assertEqual([router.post().status for _ in range(3)], [200] * 3)
                health = router.health()
                self.assertEqual((health["mode"], health["defaultMode"]),
                                 (before["mode"], before["defaultMode"]))
                self.assertRegex(" ".join(health["problems"]), "^%s: .*permission denied" % name)
                (self.home.dir / name).chmod(0o600)
                self.assertEqual(router.health()["problems"], [])
            wait_until(lambda: router.log().count("[REQ]") == 6)
            self.assertEqual(router.log().count("permission denied"), 1)        # config.json's line

    def test_home_that_is_read_only_from_the_start(self):
        self.home.remove_directory()
        self.home.root.chmod(0o500)
        self.addCleanup(self.home.root.chmod, 0o700)
        for command in ("serve", "start", "claude"):
            with self.subTest(command):
                self.assert_told(self.run_powerless(command), r"\.rrouter")
        for command in ("status", "check"):
            self.assertIn(self.run_powerless(command).returncode, (1, 3))

    def test_log_that_cannot_be_opened_is_named(self):
        log = self.home.dir / "logs" / "rrouter.log"
        log.mkdir(parents=True)
        self.assert_told(self.home.run("start"), r"rrouter\.log: is a directory")
        log.rmdir()
        os.mkfifo(str(log))                     # opened as a file is, it would block without end
        self.assert_told(self.home.run("start", timeout=WAIT_S), r"rrouter\.log: ")
        with Running(self.upstream, home=self.home) as router:
            self.assertEqual([router.post().status for _ in range(3)], [200] * 3)
            self.assertIn("log lines are lost", str(router.health()["problems"]))

    @unittest.skipUnless(os.geteuid() == 0, "only root can give files away")
    def test_home_of_another_user_is_named(self):
        for rights in (0o700, 0o777):
            with self.subTest(oct(rights)):
                for path in [self.home.dir, *self.home.dir.rglob("*")]:
                    os.chown(str(path), 65534, 65534)
                self.home.dir.chmod(rights)
                for command in ("serve", "claude"):
                    self.assert_told(self.run_powerless(command), r"\.rrouter")


class LogGoneTest(FaultTest):
    """A log that is removed or replaced while rrouter runs."""

    def ways(self):
        """Return pairs: what happens, and what mends it (None: nothing is needed)."""
        logs = self.home.dir / "logs"
        file = logs / "rrouter.log"

        def put_directory():
            file.unlink()
            file.mkdir()

        def put_file():
            shutil.rmtree(str(logs))
            logs.write_text("")

        def point_at_full_device():
            file.unlink()
            file.symlink_to("/dev/full")

        ways = [(file.unlink, None), (lambda: shutil.rmtree(str(logs)), None),
                (lambda: self.home.remove_directory(), None),
                (put_directory, file.rmdir), (put_file, logs.unlink)]
        return ways + [(point_at_full_device, file.unlink)] * os.path.exists("/dev/full")

    def watcher_looks(self, router):
        """Return when the files have been read again; the line on stderr shows it."""
        before = router.printed().count("SIGHUP")
        router.process.send_signal(signal.SIGHUP)
        wait_until(lambda: router.printed().count("SIGHUP") > before)

    def test_requests_go_on_one_message_says_so_and_the_log_comes_back(self):
        file = self.home.dir / "logs" / "rrouter.log"
        with Running(self.upstream, home=self.home) as router:
            for number, (way, mend) in enumerate(self.ways()):
                with self.subTest(number):
                    self.watcher_looks(router)
                    before = router.printed().count("log lines are lost")
                    way()
                    if mend:
                        self.wait_for_problems(router, "rrouter.log")
                        for _ in range(3):
                            self.watcher_looks(router)
                            self.wait_for_problems(router, "rrouter.log")
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
        cls.help = rrouter.help_text(rrouter.COMMANDS)

    def test_the_tables_of_commands_name_exactly_the_commands_and_aliases(self):
        names = {word for name, aliases, *_ in rrouter.COMMANDS for word in (name, *aliases)}
        for file, text in self.readmes.items():
            with self.subTest(file):
                table = re.search(r"(?m)^\| `rrouter serve`.*\n(?:\|.*\n)*", text).group()
                cells = [cell for row in table.splitlines() for cell in row.split("|")[1:3]]
                found = re.findall(r"`(?:rrouter )?([^` ]+)[^`]*`", " ".join(cells))
                self.assertEqual(sorted(found), sorted(names))
                for action in ("edit", "reset", "path", "NAME", "--json"):
                    self.assertRegex(table, "`[a-z ]*%s`" % action)

    def test_the_help_names_every_command_and_alias_within_its_width(self):
        for name, aliases, *_ in rrouter.COMMANDS:
            self.assertRegex(self.help, r"(?m)^  %s  " % ".*, ".join((name + ".*", *aliases)))
        self.assertLessEqual(max(map(len, self.help.splitlines())), 120)

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
# Modules and functions that no decision may use; a lock of `threading` is the one concession.
EFFECTS = frozenset((
    "fcntl", "http", "importlib", "input", "io", "logging", "mmap", "open", "os", "pathlib",
    "print", "random", "select", "shutil", "signal", "socket", "socketserver", "ssl",
    "subprocess", "sys", "tempfile", "threading", "time"))
CLOCK_READS = frozenset(("now", "today", "utcnow"))         # of datetime


def bound_names(node):
    """Return the names that the statement or function binds, those of inner functions too."""
    names = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Name) and not isinstance(child.ctx, ast.Load):
            names.add(child.id)
        elif isinstance(child, ast.arg):
            names.add(child.arg)
        elif isinstance(child, ast.alias):
            names.add((child.asname or child.name).partition(".")[0])
        elif child is not node and getattr(child, "name", None):    # def, class, except
            names.add(child.name)
    return names


def uses(node, local=frozenset()):
    """Yield (name, line) of each name that the code of `node` takes from outside.

    Annotations are left out, because they are never evaluated; a clock read or an import counts as
    the use of the attribute or module; `threading.Lock` counts as nothing.
    """
    if isinstance(node, ast.Name):
        if isinstance(node.ctx, ast.Load) and node.id not in local:
            yield node.id, node.lineno
        return
    if isinstance(node, ast.Attribute):
        if node.attr in CLOCK_READS:
            yield node.attr, node.lineno
        if node.attr == "Lock" and getattr(node.value, "id", "") == "threading":
            return
    if isinstance(node, ast.Import):
        yield from ((alias.name.partition(".")[0], node.lineno) for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        yield node.module.partition(".")[0], node.lineno
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        local = local | bound_names(node)
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if field not in ("annotation", "returns") and isinstance(child, ast.AST):
                yield from uses(child, local)


def floor_plan_breaches(source):
    """Return "DEFINITION, line N: what" for each breach of the floor plan in `source`.

    A top-level definition uses only top-level names defined above it, and above the I/O line no
    definition has effects.  The imports before the first banner are exempt.
    """
    lines = source.splitlines()
    io_line = lines.index(IO_LINE) + 1
    first = next((number for number, line in enumerate(lines, 1) if re.match("# .* ##", line)), 0)
    statements, breaches, defined_at = ast.parse(source).body, [], {}
    for statement in statements:
        named = isinstance(statement, (ast.FunctionDef, ast.ClassDef))
        for name in [statement.name] if named else bound_names(statement):
            defined_at.setdefault(name, statement.lineno)
    for statement in statements:
        label = getattr(statement, "name", None) or ", ".join(sorted(bound_names(statement)))
        for name, line in uses(statement):
            if defined_at.get(name, 0) > statement.lineno:
                breaches.append("%s, line %d: uses %s, which is defined below, in line %d" % (
                    label, line, name, defined_at[name]))
            elif first < line < io_line and (name in EFFECTS or name in CLOCK_READS):
                breaches.append("%s, line %d: uses %s above the I/O line" % (label, line, name))
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
        # lines above the I/O line, below it,          the breach
        ("def early(): return lambda: Later()", "",    "early, line 11: uses Later, which is"),
        ("@bottom\ndef early(): pass", "",             "early, line 11: uses bottom, which is"),
        ("", "early = [bottom]",                       "early, line 13: uses bottom, which is"),
        ("def pid(): return os.getpid()", "",          "pid, line 11: uses os above"),
        ("class Late:\n  def f(): import time", "",    "Late, line 12: uses time above"),
        ("NOW = datetime.datetime.now()", "",          "NOW, line 11: uses now above"),
        ("WORK = threading.Thread()", "",              "WORK, line 11: uses threading above"),
        ("def say(): print()", "",                     "say, line 11: uses print above"),
    )

    def test_each_kind_of_breach_is_reported(self):
        self.assertEqual(floor_plan_breaches(self.SOUND.format(IO_LINE)), [])
        for above, below, breach in self.PLANTED:
            with self.subTest(breach):
                source = self.SOUND.format("\n".join((above, IO_LINE, below)))
                self.assertEqual([found[:len(breach)] for found in floor_plan_breaches(source)],
                                 [breach])


# Fuzz: framing ################################################################

FUZZ_SEED = os.environ.get("RROUTER_FUZZ_SEED") or os.environ.get("RROUTER_SOAK") or "20260129"


def fuzz_cases(suite, soak):
    """Return the number of cases, in the suite or with --soak; RROUTER_FUZZ_CASES overrides it."""
    return int(os.environ.get("RROUTER_FUZZ_CASES") or (soak if SOAKING else suite))


def announce(cases, what):
    if SOAKING:
        print("soak: seed %s, %d %s" % (FUZZ_SEED, cases, what), file=sys.stderr)


class Malformed(Exception):
    """Bytes that are not an HTTP/1.1 message, or one that two readers could read differently."""

    def __init__(self, what="", payload=b""):
        super().__init__(what)
        self.payload = payload


class Unfinished(Malformed):
    """Bytes that more bytes may complete to a message."""


class Message(collections.namedtuple("Message", "start fields body end close framing")):
    """A message by the plain reader: start line in three parts, fields, body, offset of its end."""


TOKEN = re.compile(rb"tok[Q-Z]{6}x[Q-Z]{2}kot")
LETTERS = bytes.maketrans(b"0123456789", b"QRSTUVWXYZ")     # a damaged digit could be another token
TCHAR = frozenset(b"!#$%&'*+-.^_`|~" + b"0123456789abcdefghijklmnopqrstuvwxyz"
                  b"ABCDEFGHIJKLMNOPQRSTUVWXYZ")
ONE_HOP = {b"connection", b"proxy-connection", b"keep-alive", b"proxy-authenticate",
           b"proxy-authorization", b"te", b"trailer", b"transfer-encoding", b"upgrade"}


def is_text(value):
    return not re.search(rb"[\0-\x08\x0a-\x1f\x7f]", value)


def plain_lines(data, at):
    """Return (lines, offset after the blank line that ends them)."""
    lines = []
    while True:
        end = data.find(b"\r\n", at)
        if end < 0:
            raise Unfinished("head")
        line, at = data[at:end], end + 2
        if not line:
            return lines, at
        if not is_text(line):
            raise Malformed("control character")
        lines.append(line)


def plain_fields(lines):
    fields = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not name or not TCHAR.issuperset(name):
            raise Malformed("field name")
        fields.append((name, value.strip(b" \t")))
    return fields


def values(fields, name):
    return [value for key, value in fields if key.lower() == name]


def nominated(fields):
    """Return the names in the Connection fields, in lower case."""
    return {token.strip(b" \t").lower() for value in values(fields, b"connection")
            for token in value.split(b",")}


def plain_chunks(data, at):
    """Return (payload, offset of the end)."""
    payload = b""
    while True:
        end = data.find(b"\r\n", at)
        if end < 0:
            raise Unfinished("chunks", payload)
        size, semicolon, extension = data[at:end].partition(b";")
        size = size.rstrip(b" \t") if semicolon else size
        if not re.fullmatch(rb"[0-9a-fA-F]{1,15}", size) or not is_text(extension):
            raise Malformed("chunk size", payload)
        at = end + 2
        if not int(size, 16):
            try:
                lines, at = plain_lines(data, at)
                plain_fields(lines)
            except Malformed as problem:
                raise type(problem)("trailers", payload) from None
            return payload, at
        piece = data[at:at + int(size, 16)]
        payload, at = payload + piece, at + int(size, 16)
        if len(data) < at + 2:
            raise Unfinished("chunks", payload)
        if data[at:at + 2] != b"\r\n":
            raise Malformed("chunk end", payload)
        at += 2


def plain_message(data, at, start, fields, version, bodiless, by_close):
    """Return the Message whose body begins at `at`.

    `by_close`: without a length it ends with the connection.
    """
    lengths, codings = values(fields, b"content-length"), values(fields, b"transfer-encoding")
    close = version == b"HTTP/1.0" or b"close" in nominated(fields)
    if codings and (lengths or version == b"HTTP/1.0"
                    or [coding.lower() for coding in codings] != [b"chunked"]):
        raise Malformed("transfer coding")
    if len(lengths) > 1 or (lengths and not re.fullmatch(rb"[0-9]{1,15}", lengths[0])):
        raise Malformed("length")
    if bodiless:
        return Message(start, fields, b"", at, close, "none")
    if codings:
        body, end = plain_chunks(data, at)
        return Message(start, fields, body, end, close, "chunked")
    if not lengths and by_close:
        return Message(start, fields, data[at:], len(data), True, "close")
    length = int(lengths[0]) if lengths else 0
    if len(data) < at + length:
        raise Unfinished("body", data[at:])
    framing = "length" if lengths else "none"
    return Message(start, fields, data[at:at + length], at + length, close, framing)


def plain_request(data, at=0):
    """Return the request that begins at `at`, by the letter of RFC 9112; raise Malformed."""
    while data[at:at + 2] == b"\r\n":
        at += 2
    lines, at = plain_lines(data, at)
    start = tuple(lines[0].split(b" "))
    if (len(start) != 3 or not start[0] or not TCHAR.issuperset(start[0])
            or not re.fullmatch(rb"HTTP/1\.\d", start[2])):
        raise Malformed("request line")
    if not re.fullmatch(rb"[!-~]+", start[1]):
        raise Malformed("target")
    fields, old = plain_fields(lines[1:]), start[2] == b"HTTP/1.0"
    if len(values(fields, b"host")) not in ((0, 1) if old else (1,)):
        raise Malformed("host")
    return plain_message(data, at, start, fields, start[2], False, False)


def plain_response(data, method, at=0):
    """Return the response to `method` that begins at `at`, interim ones left out.

    The data ends with its connection.
    """
    while True:
        lines, at = plain_lines(data, at)
        version, _, rest = (lines[0] if lines else b"").partition(b" ")
        status, _, reason = rest.partition(b" ")
        if (version not in (b"HTTP/1.1", b"HTTP/1.0") or rest[3:4] not in (b"", b" ")
                or not re.fullmatch(rb"[1-9][0-9][0-9]", status) or status == b"101"):
            raise Malformed("status line")
        fields = plain_fields(lines[1:])
        bodiless = method == b"HEAD" or status in (b"204", b"304") or status < b"200"
        message = plain_message(data, at, (version, status, reason), fields, version, bodiless,
                                True)
        if status >= b"200":
            return message


MODEL = re.compile(rb'("model"\s*:\s*)"claude-sonnet-(?:[^"\\]|\\.)*"')


class FuzzedResponse:
    """The response to one attempt: its bytes, their meaning, and how the connection ends."""

    def __init__(self, dice, data, method, clean, damage):
        self.data, self.clean = data, clean
        self.vanish = dice.random() < 0.03      # the upstream closes without saying so
        self.early = dice.random() < 0.3        # it responds as soon as it has the head
        self.reset = not clean and dice.random() < 0.1
        if self.reset:
            self.data = data[:dice.randrange(len(data))]
        elif not clean:
            self.data = damage(data)
        elif dice.random() < 0.2 and plain_response(data, method).framing != "close":
            # Unrequested bytes, which must not become the response to another request.
            self.data += b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\ntokZZZZZZxZZkot abcd"
        try:
            self.meant = plain_response(self.data, method)
            self.payload, self.end = self.meant.body, self.meant.end
        except Malformed as problem:
            self.meant, self.payload, self.end = None, problem.payload, len(self.data)


class Case:
    """One request and two responses, for as many attempts, with the token in heads and bodies."""

    def __init__(self, dice, token, last):
        self.token, self.dice = token, dice
        self.request = self.make_request()
        self.method = self.request.split(b" ", 1)[0].strip()
        # A fault ends the connection as a rule: most of them are in the last case.
        self.clean_request = dice.random() < (0.4 if last else 0.98)
        self.responses = [
            FuzzedResponse(dice, self.make_response(), self.method,
                           dice.random() < (0.5 if last else 0.9), self.damage) for _ in range(2)]
        if not self.clean_request:
            self.request = self.damage(self.request)

    def body(self):
        hidden = b"GET /hidden/%b HTTP/1.1\r\nHost: localhost\r\n\r\n" % self.token
        return self.dice.choice((
            b"", hidden, b"0\r\n\r\n" + hidden,
            self.token + b"\r\n0\r\n\r\n\0\xff\r\r\n\n" + bytes(9),
            b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n" + self.token,
            self.token * self.dice.choice((1, 1, 1, 9, 9, 9, 99, 20000)),
            self.dice.getrandbits(800).to_bytes(100, "big") + self.token))

    def chunks(self, body):
        """Return `body` in chunks of any sizes, with extensions and trailers now and then."""
        out, at, dice = b"", 0, self.dice
        while at < len(body):
            size = dice.choice((1, 2, 9, 99, 9999, 99999)) if len(body) < 9999 else 20000
            piece, at = body[at:at + size], at + size
            out += dice.choice((b"%x", b"%X", b"%04x")) % len(piece)
            out += dice.choice((b"", b"", b"", b";x", b' ; a="b c"')) + b"\r\n" + piece + b"\r\n"
        return out + dice.choice((b"0", b"000", b"0;last")) + b"\r\n" + dice.choice((
            b"", b"", b"X-Trailer: %b\r\n" % self.token,
            b"Content-Length: 3\r\nHost: evil.example\r\n")) + b"\r\n"

    def framed(self, body, fields, framing):
        """Return (fields with those of the framing, in any order, as bytes, the framed body)."""
        if framing == "length":
            fields.append(self.dice.choice((b"Content-Length: %d", b"content-length:%d",
                                            b"CONTENT-LENGTH: \t00%d ")) % len(body))
        elif framing == "chunked":
            fields.append(self.dice.choice((b"Transfer-Encoding: chunked",
                                            b"transfer-encoding:\tChunked ")))
            body = self.chunks(body)
        self.dice.shuffle(fields)
        return b"".join(field + b"\r\n" for field in fields) + b"\r\n", body

    def make_request(self):
        dice, token = self.dice, self.token
        method = dice.choice((b"POST",) * 4 + (b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS",
                                               b"pOsT"))
        target = token.join((dice.choice((
            b"/", b"/v1/messages?beta=true&", b"//", b"/%2e%2E/../", b"http://localhost/",
            b"HTTP://127.0.0.1:1?", b"/v1/messages/count_tokens?")), b""))
        old = dice.random() < 0.04
        body = self.body() if method not in (b"GET", b"HEAD") or dice.random() < 0.1 else b""
        if method == b"POST" and dice.random() < 0.6:
            body = chat("claude-sonnet-" + token.decode(), stream=dice.random() < 0.8,
                        messages=[{"role": "user", "content": body.decode("latin-1")}])
        framing = dice.choice(("length", "length" if old else "chunked")) if body else "none"
        fields = dice.sample((
            b"Accept: */*", b"X-Empty:", b"x-tab: a\tb  c", b"X-Latin: caf\xe9\x80",
            b"Cookie: a=1", b"cookie: b=2", b"TE: trailers", b"Keep-Alive: timeout=5",
            b"Expect: 100-continue", b"X-Quoted: \"a\\\"b\", ,;", b"Connection: keep-alive",
            b"connection: X-Gone, content-length", b"X-Gone: 1", b"Upgrade: h2c"),
            dice.randrange(6))
        fields += [dice.choice((b"Host: localhost", b"hOST:127.0.0.1:8316", b"Host: [::1]:1 ")),
                   b"X-Token: " + token]
        head, body = self.framed(body, fields, framing)
        blank = dice.choice((b"", b"", b"", b"\r\n"))
        return blank + b"%b %b HTTP/1.%d\r\n" % (method, target, not old) + head + body

    def make_response(self):
        dice, token = self.dice, self.token
        status = dice.choice((
            b"200 OK", b"200 OK", b"200 OK", b"201 ", b"204 No Content", b"304 Not Modified",
            b"400 Bad", b"404 N\xe9", b"429 Many", b"500", b"529 Overloaded", b"299 Odd"))
        fields = dice.sample((
            b"X-Empty:", b"Set-Cookie: a=1", b"set-cookie: b", b"X-Latin: \xe9", b"Keep-Alive: 5",
            b"Connection: close", b"connection: X-Gone", b"X-Gone: 1", b"Date: now",
            b"Access-Control-Allow-Origin: *"), dice.randrange(5))
        body, kind = self.body(), b"application/octet-stream"
        if dice.random() < 0.4:
            kind, body = b"text/event-stream", b"".join(dice.choices((
                event("ping"), b": comment\n\n", event("message_start", text=token.decode()),
                b"\n", event("error", error={"type": "overloaded_error"}), event("message_stop")),
                k=dice.randrange(5)))
        fields += [b"Content-Type: " + kind, b"X-Response: " + token]
        bodiless = self.method == b"HEAD" or status[:3] in (b"204", b"304")
        framing = "none" if bodiless else dice.choice(("length", "chunked", "chunked", "close"))
        head, body = self.framed(b"" if bodiless else body, fields, framing)
        interim = dice.choice((b"",) * 8 + (
            b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 102 Wait\r\n\r\n" * 3,
            b"HTTP/1.1 103 Hints\r\nLink: <a>\r\n\r\n"))
        version = b"HTTP/1.0" if framing == "close" and dice.random() < 0.5 else b"HTTP/1.1"
        return interim + version + b" " + status + b"\r\n" + head + body

    DAMAGES = tuple((re.compile(pattern), replacements) for pattern, replacements in (
        (rb"(?i)(content-length):[ \t]*(\d+)", (
            rb"\1: \2\r\n\1: 0", rb"\1: \2\r\n\1: \2", rb"\1 : \2", rb"\1: +\2", rb"\1: -\2",
            rb"\1: 0x\2", rb"\1: \2, \2", rb"\1: \2\r\nTransfer-Encoding: chunked",
            rb"\1:\r\n \2", rb"\1: \2\nX: y", rb"\1: 1_\2", rb"\1:", rb"\1: 1", b"\\1: \\2\x0b",
            b"\\1: \xb2", rb"X:\r\1: \2", rb"\1: 1\2", b"\\1\0: \\2")),
        (rb"(?i)(transfer-encoding):[ \t]*(chunked)", (
            rb"\1: \2\r\nContent-Length: 3", rb"Content-Length: 0\r\n\1: \2", b"\\1: \x0b\\2",
            rb"\1 : \2", rb"\1: x\2", rb"\1: identity, \2", rb"\1: \2, identity",
            rb"\1: \2\r\n\1: identity", rb"\1:\r\n \2", rb"\1: \2;q=1", rb"\1: \2, \2",
            rb"\1: ,\2", rb" \1: \2", rb"X: y\n\1: \2", rb"\1: 'chunked'", rb"X\1: \2")),
        (rb"\r\n([0-9A-Fa-f]+)((?:[ \t]*;[^\r\n]*)?)\r\n", (
            b"\r\n0x\\1\r\n", b"\r\n+\\1\r\n", b"\r\n-\\1\r\n", b"\r\n \\1\r\n", b"\r\n\\1 \r\n",
            b"\r\n\\1\n", b"\n\\1\r\n", b"\r\n\\1;a\nb\r\n", b"\r\n\\1;\rb\r\n", b"\r\n1\\1\r\n",
            b"\r\n\r\n", b"\r\n\\1_0\r\n", b"\r\n0\r\n", b"\r\nf0000000000000000\\1\r\n",
            b"\\1\r\n", b"\r\n\\1\r\n\r\n", b"\r\n\\1;" + b"x" * 300 + b"\r\n")),
        (rb"\r\n", (b"\n", b"\r", b"\r\r\n", b"\r\n ", b"\r\n\t", b" \r\n", b"\0\r\n",
                    b"\r\n\r\n", b"\r\n: x\r\n", b"")),
        (rb"HTTP/1\.[01]", (b"HTTP/1.1 ", b"HTTP/2.0", b"http/1.1", b"HTTP/1.2", b"HTTP/1.01",
                            b"", b"HTTP/1.0", b"ICY")),
        (rb"(?i)Host:([^\r\n]*)", (rb"Host:\1\r\nHost:\1", b"Host: evil.example", b"Host :x",
                                   b"X: y", b"Host: ")),
        (rb"(?m)^([\w-]+): ", (rb"\1 : ", rb"\1", b"\\1\xe9: ", rb"(\1): ", rb" \1: ", b"\\1:\0",
                               b"\\1: \x7f")),
    ))

    ODD_BYTES = b"\r\n\0 \t:,;0159af\x7f\xff/\"\\{}"

    def damage(self, data):
        """Return `data` truncated, or with one or two places changed outside of the tokens."""
        dice = self.dice
        if dice.random() < 0.1:
            return data[:dice.randrange(len(data))]
        for _ in range(dice.choice((1, 1, 1, 2))):
            rows = [(list(pattern.finditer(data[:2000]))[:12], replacements)
                    for pattern, replacements in self.DAMAGES]
            rows = [row for row in rows if row[0]]
            if rows and dice.random() < 0.7:
                found, replacements = dice.choice(rows[:2] * 2 + rows)  # the framing most of all
                match = dice.choice(found)
                change = match.expand(dice.choice(replacements))
                data = data[:match.start()] + change + data[match.end():]
                continue
            at, odd = dice.randrange(min(len(data), 900)), dice.choice(self.ODD_BYTES)
            more, less = dice.choice(((1, 0), (0, 1), (1, 1)))
            spans = [match.span() for match in TOKEN.finditer(data[:2000])]
            if not any(start - less < at < end for start, end in spans):
                data = data[:at] + bytes((odd,)) * more + data[at + less:]
        return data


class FuzzedTalk:
    """One client connection: its cases, the meaning of its bytes, the requests that arrived."""

    def __init__(self, seed, mode, number):
        dice = self.dice = random.Random("%s/%s/%d" % (seed, mode, number))
        self.mode, self.number, self.received, self.lock = mode, number, [], threading.Lock()
        count, self.key = dice.choice((1, 1, 2, 3, 5)), (b"%06d" % number).translate(LETTERS)
        tokens = [b"tok%bx%bkot" % (self.key, (b"%02d" % place).translate(LETTERS))
                  for place in range(count)]
        self.cases = [Case(dice, token, token == tokens[-1]) for token in tokens]
        self.data, self.meant, at = b"".join(case.request for case in self.cases), [], 0
        self.clean = [case.clean_request for case in self.cases]
        with contextlib.suppress(Malformed):
            while at < len(self.data) and not (self.meant and self.meant[-1].close):
                self.meant.append(plain_request(self.data, at))
                at = self.meant[-1].end
        # Whether no byte after the last request has a meaning.
        self.whole = at == len(self.data) or bool(self.meant and self.meant[-1].close)
        self.pipelined = dice.random() < 0.4
        # The client leaves after so many bytes, in one of two ways.
        leaves = self.data and dice.random() < 0.05
        self.leaves_after = dice.randrange(len(self.data) + 1) if leaves else None
        self.leaves_by_reset = dice.random() < 0.5

    def case_of(self, place):
        """Return the case that responds to the request `place`; None if none fits its method."""
        case = self.cases[place] if place < len(self.cases) else None
        return case if case and case.method == self.meant[place].start[0] else None


def keys_in(data):
    """Return the keys of the talks whose tokens are in `data`."""
    return {token[3:9] for token in TOKEN.findall(data)}


def cut_at_random(dice, data):
    """Return `data` in pieces, cut at random places."""
    count = dice.choice((0, 0, 0, 1, 1, 2, 2, 5, 40))
    cuts = sorted(dice.randrange(len(data) + 1) for _ in range(count))
    pieces = (data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)]))
    return [piece for piece in pieces if piece]


def forwarded(meant):
    """Return (method, path, fields without Host and length, whether it has a length)."""
    target = re.sub(rb"(?i)^https?://[^/?#]*", b"", meant.start[1])
    target = target if target.startswith((b"/", b"*")) else b"/" + target
    drop = ONE_HOP | nominated(meant.fields) | {b"host", b"content-length"}
    fields = [field for field in meant.fields if field[0].lower() not in drop]
    return meant.start[0], target, fields, meant.framing != "none"


class FuzzUpstream(Upstream):
    """Reads with the plain reader; responds to each request with the bytes of its case."""

    def __init__(self):
        super().__init__()
        self.talks, self.faults, self.held = {}, [], {}

    def _fault(self, talk, text, data):
        self.faults.append((talk, "%s: the upstream received %r" % (text, data[:3000])))
        return False

    def _exchange(self, connection, reader, number):
        data, early, talk = self.held.pop(number, b""), None, None
        while True:
            talk = talk or self.talks.get(min(keys_in(data), default=None))
            try:
                message = plain_request(data)
                break
            except Unfinished:
                early = early or (talk and self._respond_early(talk, connection, data))
            except Malformed as problem:
                return self._fault(talk, "malformed (%s)" % problem, data)
            block = connection.recv(1 << 20)
            data += block
            if not block:
                if not data or early or (talk and talk.leaves_after is not None):
                    return False
                return self._fault(talk, "a part of a request", data)
        if early:               # so that the next request may be here already
            self.held[number], data = data[message.end:], data[:message.end]
        if talk is None or keys_in(data) != {talk.key}:
            return self._fault(talk, "bytes of another connection", data)
        if message.end != len(data):
            return self._fault(talk, "bytes after the request", data)
        place = self._place(talk, message)
        if place is None or early and place != early[0]:
            return self._fault(talk, "a request that the client did not mean", data)
        return (early or self._respond(talk, place, connection))[1]

    def _respond_early(self, talk, connection, data):
        """Respond to the head alone if the case wants it; return what `_respond` does, or None."""
        head, blank, _ = data.partition(b"\r\n\r\n")
        token = TOKEN.search(head)
        if not blank or not token or not re.search(rb"(?i)\r\nx-token: *" + TOKEN.pattern, head):
            return None
        for place in range(len(talk.meant)):
            case = talk.case_of(place)
            if (case and token.group() == case.token
                    and any(response.early for response in case.responses)):
                return self._respond(talk, place, connection)
        return None

    def _respond(self, talk, place, connection):
        """Send the next response to this request; return (place, whether the connection lives)."""
        with talk.lock:
            attempt = talk.received.count(place)
            talk.received.append(place)
        case = talk.case_of(place)
        if case is None:
            connection.sendall(b"HTTP/1.1 500 No Case\r\nContent-Length: 0\r\n\r\n")
            return place, True
        response = case.responses[min(attempt, 1)]
        dice = random.Random("%d/%d" % (talk.number, place))
        *pieces, last = cut_at_random(dice, response.data[:response.end]) or [b""]
        for piece in (*pieces, last + response.data[response.end:]):
            connection.sendall(piece)
        if response.reset:
            close_by_reset(connection)
        return place, bool(response.meant) and not (
            response.meant.close or response.vanish or response.reset)

    def _place(self, talk, got):
        """Return which of the requests meant on its connection this one is; None if none."""
        target, fields = got.start[1], got.fields
        if (got.start[2] != b"HTTP/1.1" or got.framing == "chunked"
                or values(fields, b"host") != [self.url[7:].encode()]):
            return None
        fields = [field for field in fields if field[0].lower() not in (b"host", b"content-length")]
        for place, meant in enumerate(talk.meant):
            if forwarded(meant) != (got.start[0], target, fields, got.framing != "none"):
                continue
            rewritten = MODEL.sub(b'\\1"%b"' % GEMINI_SONNET.encode(), meant.body, 1)
            if got.body == rewritten or (got.body == meant.body and (
                    talk.mode == "auto" or not all(talk.clean))):
                return place
        return None


class FuzzClient:
    """Carries one talk through: sends its bytes and reads its replies."""

    def __init__(self, talk, connection):
        self.talk, self.connection = talk, connection
        self.data, self.at, self.replies, self.ended = b"", 0, [], False
        if talk.leaves_after is None:
            self.stay()
        else:
            self.leave()

    def stay(self):
        talk = self.talk
        ends = [0, *(meant.end for meant in talk.meant), len(talk.data)]
        parts = list(zip(ends, ends[1:]))
        for start, end in [(0, len(talk.data))] if talk.pipelined else parts:
            self.send(talk.data[start:end])
            if not talk.pipelined:
                self.read(min(len(self.replies) + 1, len(talk.meant)))
            if self.ended:
                break
        self.read(len(talk.meant))
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
        self.read(len(talk.meant) + 1)

    def leave(self):
        talk = self.talk
        self.send(talk.data[:talk.leaves_after])
        if talk.leaves_after > (talk.meant[0].end if talk.meant else len(talk.data)):
            self.read(1)
        if talk.leaves_by_reset:
            reset(self.connection)

    def send(self, data):
        with contextlib.suppress(ConnectionError):
            for piece in cut_at_random(self.talk.dice, data):
                self.connection.sendall(piece)

    def read(self, count):
        """Read until there are `count` replies or the connection has ended."""
        meant = self.talk.meant
        while len(self.replies) < count:
            place = len(self.replies)
            method = meant[place].start[0] if place < len(meant) else b"GET"
            with contextlib.suppress(Unfinished):
                reply = plain_response(self.data, method, self.at)
                if reply.framing != "close" or self.ended == "closed":
                    self.replies.append(reply)
                    self.at = reply.end
                    continue
            if self.ended:
                return
            try:
                block = self.connection.recv(1 << 20)
                self.data += block
                self.ended = not block and "closed"
            except ConnectionError:
                self.ended = "reset"


class FuzzTest(RouterTest):
    """Random messages, well-formed and not, on both sides, cut into segments at random places.

    The upstream receives exactly one well-formed request equal to what the client meant, or
    nothing; in auto mode one for each of at most two attempts.  The client receives the response to
    one of the attempts, an error made by rrouter, or a broken connection: never a byte of another
    request, never parts of two responses, never a broken response that seems whole.  Where neither
    side did anything wrong it is a response.  All of this holds also where the upstream responds
    before it has the body, resets or closes unasked, and where the client leaves: then, and only
    then, a request may be truncated.  A reader of whole messages in this file, written after
    RFC 9112, says what bytes mean.

    RROUTER_FUZZ_SEED repeats a run, RROUTER_FUZZ_CASES sets the number of cases.
    """

    SEED, CASES, THREADS = FUZZ_SEED, fuzz_cases(1000, soak=20_000), 4
    upstream_class = FuzzUpstream

    @classmethod
    def setUpClass(cls):
        announce(cls.CASES, "random messages")
        super().setUpClass()

    def setUp(self):
        self.upstream.faults.clear()
        self.upstream.talks.clear()

    def judge(self, talk, client):
        """Raise AssertionError where the invariant does not hold."""
        self.assertLessEqual(keys_in(client.data), {talk.key}, "cross-talk")
        if talk.leaves_after is not None:
            return
        replies, rest = client.replies, client.data[client.at:]
        sound = True            # as long as nothing has gone wrong, responses are due
        for place, meant in enumerate(talk.meant):
            case, count = talk.case_of(place), talk.received.count(place)
            clean = sound and case is not None and all(talk.clean[:place + 1])
            given = case.responses[:max(1, count)] if case else []
            # On a connection that was used before, the request is sent once more.
            resent = any(not response.data or response.reset for response in given)
            self.assertLessEqual(count, (1 + (talk.mode == "auto")) * (1 + resent), "too often")
            self.assertTrue(count or not clean, "request %d never arrived" % place)
            must = clean and all(response.clean for response in given)
            if place >= len(replies):
                self.assertFalse(must, "response %d is missing" % place)
                if place == len(replies) and rest:
                    self.judge_broken(given, rest, meant.start[0])
                sound = False
                continue
            reply = replies[place]
            if self.is_own_error(reply):
                self.assertFalse(must, "response %d is an error of rrouter: %r" % (place, reply))
                sound = sound and reply.start[1] == b"502"
                continue
            self.assertTrue(count, "response %d without a request" % place)
            if case is None:
                self.assertEqual(reply.start[1:], (b"500", b"No Case"))
                continue
            self.assertIn(self.seen_by_client(reply),
                          [self.seen_by_client(response.meant) for response in given
                           if response.meant], "no whole response of the upstream")
            sound = sound and not reply.close
        for reply in replies[len(talk.meant):]:
            self.assertTrue(self.is_own_error(reply) and not talk.whole,
                            "a response to nothing: %r" % (reply,))
        if len(replies) > len(talk.meant):
            self.assertEqual(rest, b"")

    @staticmethod
    def seen_by_client(message):
        """Return the parts of a response that concern the client, from either side of rrouter."""
        drop = ONE_HOP | nominated(message.fields) | {b"content-length"}
        fields = [field for field in message.fields if field[0].lower() not in drop
                  and not field[0].lower().startswith((b"access-control-", b"x-rrouter-"))]
        return message.start[1:], message.body, fields

    def judge_broken(self, given, rest, method):
        """A broken response is the beginning of one of the upstream's."""
        try:        # where the connection marks the end, only a reset shows that it is broken
            payload = plain_response(rest, method).body
        except Unfinished as problem:
            payload = problem.payload
        wanted = [response.payload for response in given]
        self.assertTrue(any(body.startswith(payload) for body in wanted),
                        "%r begins none of %r" % (payload, wanted))

    @staticmethod
    def is_own_error(reply):
        return (reply.start[1] >= b"400"
                and values(reply.fields, b"content-type") == [b"application/json"]
                and (b'"message": "rrouter: ' in reply.body or reply.framing == "none"))

    def fuzz(self, mode):
        self.rrouter.home.write("mode", mode + "\n")
        numbers, lock, done = itertools.count(), threading.Lock(), [0]
        faults, talks = self.upstream.faults, self.upstream.talks

        def clients():
            while len(faults) < 3:
                with lock:
                    if done[0] >= self.CASES // 2:
                        return
                    number = next(numbers)
                talk = None
                try:
                    talk = FuzzedTalk(self.SEED, mode, number)
                    talks[talk.key] = talk
                    with lock:
                        done[0] += len(talk.cases)
                    with self.rrouter.connect() as connection:
                        client = FuzzClient(talk, connection)
                    self.judge(talk, client)
                except Exception as problem:
                    faults.append((talk, "%s: %s" % (type(problem).__name__, problem)))
                if not talk or talk.leaves_after is None:   # else its bytes may still arrive
                    talks.pop(talk and talk.key, None)

        threads = [threading.Thread(target=clients) for _ in range(self.THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if faults:
            self.fail(self.story(mode, *faults[0]))

    def story(self, mode, talk, text):
        lines = ["RROUTER_FUZZ_SEED=%s RROUTER_FUZZ_CASES=%d, mode %s" % (
            self.SEED, self.CASES, mode), text[:3000]]
        if talk:
            lines.append("connection %d, requests sent %s" % (
                talk.number, "at once" if talk.pipelined else "one by one"))
            for case in talk.cases:
                lines.append("%r\n  responses: %s" % (case.request[:2000], ", then ".join(
                    repr(response.data[:2000]) for response in case.responses)))
        return "\n".join(lines)

    def test_only_what_was_meant_passes(self):
        self.fuzz("antigravity")

    def test_only_what_was_meant_passes_in_auto_mode(self):
        self.fuzz("auto")


# Fuzz: bodies #################################################################

SPACE = rb"[ \t\r\n]*"
JSON_WORD = re.compile(
    SPACE + rb'("(?:[^"\\\0-\x1f]|\\(?:["\\/bfnrt]|u[0-9A-Fa-f]{4}))*"|[][{}:,]|true|false|null'
    rb"|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)")


class Json(collections.namedtuple("Json", "start end text items")):
    """A JSON value in a body: its place and bytes; `items` of an array are Json, else None.

    `items` of an object are (key, Json) in order.
    """

    def member(self, name):
        """Return the first member `name` of an object, or None."""
        return next((value for key, value in self.members() if key == name), None)

    def members(self):
        return self.items if self.text[:1] == b"{" else []

    def elements(self):
        return self.items if self.text[:1] == b"[" else []

    def string(self):
        """Return the text of a string; None for any other value or invalid UTF-8."""
        with contextlib.suppress(UnicodeDecodeError):
            return json.loads(self.text.decode()) if self.text[:1] == b'"' else None


def parse_json(body):
    """Return the value in `body` as a Json, by the letter of RFC 8259; raise ValueError.

    Invalid UTF-8 in a string is accepted, because the upstream reads bytes too.
    """
    at = 0

    def take(*allowed):
        nonlocal at
        word = JSON_WORD.match(body, at)
        if not word or allowed and word[1] not in allowed:
            raise ValueError("unexpected %r" % body[at:at + 20])
        at = word.end()
        return word

    def value():
        first = last = take()
        items, read = None, {b"{": member, b"[": value}.get(first[1])
        if first[1] in b"}]:,":
            raise ValueError("expected a value")
        if read:
            items, closing = [], b"}" if read is member else b"]"
            ahead = JSON_WORD.match(body, at)
            if ahead and ahead[1] == closing:
                last = take()
            while last[1] != closing:
                items.append(read())
                last = take(b",", closing)
        return Json(first.start(1), last.end(), body[first.start(1):last.end()], items)

    def member():
        key = take()[1]
        if key[:1] != b'"':
            raise ValueError("expected a key")
        take(b":")
        return json.loads(key.decode("utf-8", "replace")), value()

    whole = value()
    if body[at:].strip(b" \t\r\n"):
        raise ValueError("more than one value")
    return whole


def meant_model(body):
    """Return (start, end, name) of the model in `body`; None if the body is to pass untouched.

    After a plain `model` as the first member nothing is examined.
    """
    leading = re.match(SPACE + rb"\{" + SPACE + rb'"model"' + SPACE + rb":" + SPACE
                       + rb'("[^"\\\0-\x1f]*")' + SPACE + rb"[,}]", body)
    if leading:
        found = Json(*leading.span(1), leading[1], None)
    else:
        try:
            found = parse_json(body).member("model")
        except (ValueError, RecursionError):
            return None
    name = found and found.string()
    return None if name is None else (found.start, found.end, name)


def healing(body):
    """Return a pattern of what healing must leave of `body`; None if it has no thinking blocks."""
    pattern, at = b"", 0
    messages = parse_json(body).member("messages")
    for message in messages.elements() if messages else ():
        content = message.member("content")
        blocks = content.elements() if content else []
        kinds = [block.member("type") for block in blocks]
        kept = [block.text for block, kind in zip(blocks, kinds)
                if not kind or kind.string() not in ("thinking", "redacted_thinking")]
        if len(kept) < len(blocks):
            kept = kept or [b'{"type":"text","text":"(no content)"}']
            pattern += re.escape(body[at:content.start + 1]) + SPACE
            pattern += (SPACE + b"," + SPACE).join(map(re.escape, kept)) + SPACE
            at = content.end - 1
    return pattern + re.escape(body[at:]) if at else None


class BodyDice(random.Random):
    """A source of random JSON texts and of damage to them."""

    WORDS = ("model", "model", "Model", "mode", "", "stream", "messages", "type", "thinking",
             "content", "a" * 300, "claude-opus-5", "claude-sonnet-4", '"model":"x"', "\\", '"',
             "/", "\b\f\n\r\t", "\x7f\x80\u2028", "é", "한글", "😀", "\ud83d", "\udc7f", "\0",
             "{}")
    NAMES = ("claude-sonnet-4-5", "claude-opus-5", "claude-haiku-4-5", "gpt-5", "", "클로드",
             "\\u0063laude-\\")
    NUMBERS = ("0", "-0", "1", "-1.50", "1E+5", "1e-400", "1e400", "9007199254740993", "9" * 400,
               "0." + "3" * 500, "9" * 5000)

    def space(self):
        return self.choice(("", "", "", "", " ", "\n  ", "\t", "\r\n", " " * 50))

    def string(self, text):
        """Return `text` as a JSON string, some of its characters escaped."""
        if self.random() < 0.7:
            ascii_ = self.random() < 0.5 or not text.isprintable()
            return json.dumps(text, ensure_ascii=ascii_)
        out = []
        for character in text:
            if self.random() < 0.2 or not character.isprintable() or character in '"\\':
                digits = character.encode("utf-16-be", "surrogatepass").hex()
                digits = digits.upper() if self.random() < 0.5 else digits
                out += ["\\u" + digits[at:at + 4] for at in range(0, len(digits), 4)]
            else:
                out.append("\\/" if character == "/" else character)
        return '"%s"' % "".join(out)

    def items(self, opening, closing, items):
        """Return `items` between brackets, with commas, and white space wherever it may be."""
        inside = ",".join(self.space() + item + self.space() for item in items)
        return opening + (inside or self.space()) + closing

    def member(self, key, value):
        return self.string(key) + self.space() + ":" + self.space() + value

    def value(self, depth=3):
        kind = self.randrange(9 if depth else 6)
        if kind < 3:
            return self.string(self.choice(self.WORDS))
        if kind < 5:
            return self.choice(self.NUMBERS)
        if kind == 5:
            return self.choice(("null", "true", "false"))
        if kind == 6:
            return self.items("[", "]", [self.value(depth - 1) for _ in range(self.randrange(4))])
        return self.items("{", "}", [
            self.member(self.choice(self.WORDS), self.value(depth - 1))
            for _ in range(self.randrange(5))])

    def insert(self, items, item):
        items.insert(self.randrange(len(items) + 1), item)

    def body(self):
        """Return a body: most often an object with a model somewhere; a third are damaged."""
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
                name = self.string(self.choice(self.NAMES + self.WORDS))
                value = self.value(1) if self.random() < 0.15 else name
                key = self.string("model") if self.random() < 0.2 else '"model"'
                members.insert(self.choice((0, 0, self.randrange(len(members) + 1))),
                               key + self.space() + ":" + self.space() + value)
            text = self.space() + self.items("{", "}", members) + self.space()
        return self.damage(text.encode()) if self.random() < 0.35 else text.encode()

    PIECES = (b",", b'"', b"\\", b"{", b"}", b"[", b"]", b":", b"\x1f", b"\x0b", b"//", b"\n",
              b"\0", b"x", b"{}", b"\x0c", b"\xc2\xa0", b"\xff", b"\xc3", b"\xed\xa0\xbd", b"\x80",
              b"\xf5")
    VALUES = (b"NaN", b"Infinity", b"-Infinity", b"nul", b"01", b"+1", b".5", b"1.", b"0x1",
              b"'a'", b"1 1")

    def damage(self, body):
        at, piece = self.randrange(len(body) + 1), self.choice(self.PIECES)
        return self.choice((
            body[:at], body + piece, body[:at] + piece + body[at:], b"\xef\xbb\xbf" + body,
            body[:at] + body[at + self.randrange(1, 9):], body[:at] + body[at:at + 9] + body[at:],
            re.sub(rb"\b(null|true|1)\b", self.choice(self.VALUES), body, count=1),
            body.decode().encode(self.choice(("utf-16", "utf-16-le", "utf-32")))))

    def block(self):
        """Return a content block."""
        if self.random() < 0.1:
            return self.choice(("7", "null", '"thinking"', '["thinking"]', "[]", "{}",
                                '{"type":7}'))
        kind = self.choice(("thinking", "thinking", "redacted_thinking", "text", "text",
                            "tool_use", "tool_result", "Thinking", "thinking ", "redacted"))
        members = [self.member(self.choice(("text", "thinking", "signature", "data", "x")),
                               self.value(2)) for _ in range(self.randrange(3))]
        if kind == "tool_result":
            members.append(self.member("content", '[{"type":"thinking","thinking":"nested"}]'))
        self.insert(members, self.member("type", self.string(kind)))
        if self.random() < 0.1:
            second = '"text"' if kind.endswith("thinking") else '"thinking"'
            members.append(self.member("type", second))
        return self.items("{", "}", members)

    def message(self):
        members = [self.member(key, self.value(2))
                   for key in ("role", "id", "thinking")[:self.randrange(4)]]
        content = self.choice(('"thinking"', "null", "7", '{"type":"thinking"}', "[]"))
        if self.random() < 0.8:
            blocks = [self.block() for _ in range(self.choice((1, 1, 2, 3, 5)))]
            content = self.items("[", "]", blocks)
        self.insert(members, self.member("content", content))
        return self.items("{", "}", members)

    def conversation(self):
        """Return a body with thinking blocks, most of them where healing takes them out."""
        members = [self.member(key, self.value(2))
                   for key in ("model", "max_tokens", "stream", "tools")]
        members.append(self.member("system", '[{"type":"thinking","thinking":"no message"}]'))
        self.shuffle(members)
        members = members[:self.randrange(6)]
        messages = [self.message() for _ in range(self.randrange(4))]
        self.insert(members, self.member("messages", self.items("[", "]", messages)))
        if self.random() < 0.1:
            members.append(self.member("messages", '[{"content":[{"type":"thinking"}]}]'))
        return (self.space() + self.items("{", "}", members) + self.space()).encode()


def run_cases(what, cases, share, dice_class, case):
    """Call `case` with the dice of each of `cases` / `share` cases; a failure names its seed."""
    announce(cases // share, "random %s" % what)
    for number in range(cases // share):
        try:
            case(dice_class("%s/%s/%d" % (FUZZ_SEED, what, number)))
        except Exception as problem:
            raise AssertionError("RROUTER_FUZZ_SEED=%s RROUTER_FUZZ_CASES=%d, %s %d: %s: %s" % (
                FUZZ_SEED, cases, what, number, type(problem).__name__, problem)) from problem


class SpliceFuzzTest(RouterTest):
    """Random bodies, sound and damaged; a strict JSON reader in this file is the oracle.

    Only the value of the first top-level `model` of a body changes, if that is a string; every
    other byte stays.  A body that is not JSON as a whole passes untouched; after a plain leading
    `model` nothing is examined.  Healing takes the thinking blocks out of the messages, with the
    commas that are then too many, and changes nothing else.

    RROUTER_FUZZ_SEED repeats a run, RROUTER_FUZZ_CASES sets the number of cases.
    """

    CASES = fuzz_cases(1500, soak=100_000)

    def test_one_value_changes_and_no_other_byte(self):
        def case(dice):
            body, new = dice.body(), dice.choice(dice.WORDS)
            given, meant = dice.choice((bytes, bytearray, memoryview))(body), meant_model(body)
            self.assertEqual(rrouter.find_model(given), meant, body[:3000])
            if meant:
                start, end, _ = meant
                self.assertEqual(b"".join(rrouter.splice(given, start, end, new)),
                                 body[:start] + json.dumps(new).encode() + body[end:])

        run_cases("bodies", self.CASES, 1, BodyDice, case)

    def test_the_upstream_receives_the_changed_body(self):
        rules = [(rule["match"][:-1], rule["rewrite"])
                 for rule in DEFAULT_CONFIG["modes"]["antigravity"]["mappings"]]

        def case(dice):
            body, target = dice.body(), None
            expected, meant = body, meant_model(body)
            if meant:
                start, end, name = meant
                target = "antigravity"
                for new in [new for prefix, new in rules if name.startswith(prefix)]:
                    expected = body[:start] + json.dumps(new).encode() + body[end:]
            connection.sendall(request_bytes(body=body, port=self.rrouter.port))
            reply = read_reply_from(reader, "POST")
            self.assertEqual((reply.status, reply.header("x-rrouter-target")), (200, target))
            self.assertEqual(self.upstream.received.pop().body, expected)

        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            run_cases("bodies over the wire", self.CASES, 15, BodyDice, case)

    def test_healing_takes_thinking_blocks_and_no_other_byte(self):
        def case(dice):
            body = dice.conversation()
            if dice.random() < 0.5:
                body = dice.damage(body)
            result = rrouter.without_thinking(body)
            try:
                pattern = healing(body)
            except ValueError:                  # damaged after the messages, or before
                self.assertTrue(result is None or len(result) < len(body) + 40, body)
            else:
                self.assertEqual(result is None, pattern is None, body)
                self.assertTrue(result is None or re.fullmatch(pattern, result),
                                "%r became %r" % (body, result))

        run_cases("conversations", self.CASES, 2, BodyDice, case)


# Fuzz: files ##################################################################

class Members(list):
    """The members of a JSON object in order, repeated ones too, as (key, value)."""


class Raw(str):
    """JSON text that is written as it stands."""


def nested_text(depth):
    return Raw("[" * depth + "]" * depth)


class ConfigDice(BodyDice):
    """A source of contents of config.json and of the mode file, most of them wrong in some way."""

    ODD = (None, True, False, "", "x", "auto", "one", "Loud", "a b", "é", "\ud83d", "a\nb\x1b[31m",
           "x" * 5000, "*", "[", "[z-a]", "[!a", "[[a--b&&c]*", "*a" * 50,
           [], ["one"], ["one", "one"], ["two", "one"], ["one", 2], [[]],
           nested_text(50), nested_text(100_000),
           Members(), Members([("match", "*"), ("rewrite", "odd")]), Members([("one", Members())]),
           *map(Raw, ("0", "1", "2", "-1", "0.5", "1.0", "150", "1e3", "1e18", "1e999", "-0", "NaN",
                      "Infinity", "-Infinity", "9" * 30, "9" * 5000, "01", "0x1", "nan")))
    KEYS = ("modes", "defaultMode", "auto", "mappings", "match", "rewrite", "targets",
            "failureThreshold", "timeoutThreshold", "cooldownMinutes", "firstByteTimeoutSeconds",
            "one", "two", "spare", "colour", "", "\0")

    def write(self, value):
        """Return `value` as JSON text."""
        if isinstance(value, Members):
            return self.items("{", "}", [self.member(key, self.write(member))
                                         for key, member in value])
        if isinstance(value, list):
            return self.items("[", "]", list(map(self.write, value)))
        if isinstance(value, Raw):
            return value
        return self.string(value) if isinstance(value, str) else json.dumps(value)

    def places(self, value):
        """Yield (container, index) of every member and element in `value`."""
        if isinstance(value, list):
            for index, item in enumerate(value):
                yield value, index
                yield from self.places(item[1] if isinstance(value, Members) else item)

    def change(self, config):
        """Change one place of the tree `config`."""
        container, index = self.choice(list(self.places(config)) or [(Members(), 0)])
        if not container:
            return
        has_keys, way = isinstance(container, Members), self.randrange(8)
        odd = copy.deepcopy(self.choice(self.ODD))      # a later change may alter it
        if way == 0:
            del container[index]
        elif way == 1:
            container.insert(index, copy.deepcopy(container[index]))
        elif way == 2 and has_keys:
            container[index] = (self.choice(self.KEYS), container[index][1])
        elif way == 3 and has_keys:
            container.insert(index, (self.choice(self.KEYS), odd))
        else:
            container[index] = (container[index][0], odd) if has_keys else odd

    def config(self, number):
        """Return the content of a config.json of this edition.

        None to three places are changed, or it is damaged as a whole.
        """
        auto = {**DEFAULT_CONFIG["auto"], "targets": ["one", "two"], "cooldownMinutes": [30, 0.5]}
        config = json.loads(json.dumps(switchboard(number, auto=auto)), parse_int=Raw,
                            parse_float=Raw, object_pairs_hook=Members)
        for _ in range(self.choice((0, 1, 1, 1, 2, 3))):
            self.change(config)
        content = (self.space() + self.write(config) + self.space()).encode()
        kind = self.random()
        if kind < 0.2:
            return self.damage(content)
        if kind < 0.26:
            return self.choice((
                b"", b" \n", b"\0" * 64, content + content, b"\0" + content, b"\\\"" * 2000,
                b"{" * 100_000, b" " * 2_000_000 + content, b" " * 700_000 + content, self.body()))
        return content

    def mode(self):
        """Return the content of a mode file."""
        word = self.choice((
            b"one", b"two", b"spare", b"auto", b"ONE", b"Auto", b"three", b"", b"one two",
            b"\xef\xbb\xbfone", b"\0", b"on\xffe", b"\x1b[31mone", "\u00e9in".encode(), b"x" * 5000,
            b"one\ntwo", b"a" * 2_000_000))
        before = self.choice((b"", b" ", b"\n", b"\t\r\n"))
        return before + word + self.choice((b"", b"\n", b"\r\n", b" \n\n"))


class FileFuzzTest(RouterTest):
    """Random contents of config.json and of the mode file.

    A content is accepted as a whole or refused as a whole, with one line that says why, and the
    last good one stays in force: for requests and in /health.  `rrouter.config_of` alone, without
    any file, decides which contents are accepted.

    RROUTER_FUZZ_SEED repeats a run, RROUTER_FUZZ_CASES sets the number of cases.
    """

    CASES = fuzz_cases(1000, soak=20_000)
    mode, config = "one", switchboard(0)

    def judge(self, content):
        """Return (the config in this content, None) or (None, the complaint in one line)."""
        try:
            return rrouter.config_of(content), None
        except (rrouter.ConfigError, UnicodeDecodeError) as problem:
            complaint = rrouter.describe_config_error(problem)
            self.assertRegex(complaint, r"\Aconfig\.json: ?[^\0-\x1f\x7f]+\Z")
            return None, complaint

    def test_a_config_is_accepted_or_refused_as_a_whole(self):
        accepted = []

        def case(dice):
            content = dice.config(1)
            config, _ = self.judge(content)
            if config is None:
                return
            accepted.append(config)
            parse_json(content[3 * content.startswith(b"\xef\xbb\xbf"):])     # Python reads more
            again = rrouter.parse_config(rrouter.config_text(config))
            for seconds, others in zip(config.auto.cooldowns_s, again.auto.cooldowns_s):
                self.assertAlmostEqual(seconds, others)
            auto = again.auto._replace(cooldowns_s=config.auto.cooldowns_s)
            self.assertEqual(again._replace(auto=auto, problems=config.problems), config)
            for word in ("one", "auto", "nosuch", config.default_mode):
                mode = config.resolve(word)
                usable = mode == "auto" and not config.auto_error
                self.assertTrue(mode in config.modes or usable, mode)
                for target in config.auto.targets if mode == "auto" else [mode]:
                    self.assertIsInstance(rrouter.decide_route(config, target, SONNET).model, str)

        run_cases("contents", self.CASES, 2, ConfigDice, case)
        share = len(accepted) / (self.CASES // 2)
        self.assertTrue(0.1 < share < 0.9, "%.2f accepted" % share)

    def test_depth_at_the_edge_of_what_python_reads_is_refused_like_any_other(self):
        for depth in range(900, 1020):
            for opening, closing in (("[", "]"), ('{"modes":', "}"),
                                     ('{"modes":{"a":{"mappings":[', "]}}}")):
                self.judge(("%s1%s" % (opening * depth, closing * depth)).encode())

    def test_long_tokens_are_refused_in_linear_time(self):
        start = time.process_time()
        for content in (b'\\"' * 20_000, b'"\\\n' * 20_000, b'"' + b"\\" * 900_001, b"9" * 999_999,
                        b"-" * 999_999):
            self.assertIsNone(self.judge(content)[0])
        self.assertLess(time.process_time() - start, 1)

    def test_live_files_of_any_kind_stop_no_request(self):
        self.upstream.default = Response(chunks=b'{"type":"message","content":["x"]}')
        home, word, edition, complaints = self.rrouter.home, "one", 0, {}
        config = self.judge((home.dir / "config.json").read_bytes())[0]

        def change_config(dice):
            nonlocal config, edition
            edition += 1
            content = dice.config(edition % 1000)
            put(home, "config.json", content)
            if len(content) > 1 << 20:
                complaint = "config.json: cannot be read: larger than 1048576 bytes"
            else:
                new, complaint = self.judge(content)
                config = new or config
            complaints["config.json"] = complaint

        def change_mode(dice):
            nonlocal word
            content, complaint = dice.mode(), None
            put(home, "mode", content)
            if len(content) > 1 << 20:
                complaint = "mode: larger than 1048576 bytes"
            else:
                word = rrouter.mode_word(content) or word
            complaints["mode"] = complaint

        def case(dice):
            (change_mode if dice.random() < 0.3 else change_config)(dice)
            mode = config.resolve(word)
            targets = [mode]
            if mode == "auto":      # a short limit may send the request to the other target
                targets = config.auto.targets[:1 if config.auto.first_byte_s > 5 else 2]
            self.assertEqual(self.rrouter.post().status, 200)
            self.assertIn(self.upstream.models()[-1], [
                rrouter.decide_route(config, target, SONNET).model for target in targets])
            self.upstream.clear()
            health = self.rrouter.health()
            self.assertEqual([health[name] for name in ("status", "mode", "defaultMode")],
                             ["ok", mode, config.default_mode])
            problems = health["problems"]
            self.assertNotIn("Traceback", "".join(problems))
            expected = [complaint for complaint in complaints.values() if complaint]
            expected += ["config.json: " + problem for problem in config.problems]
            expected += ["mode: "] * (word not in (mode, "auto"))
            for complaint in expected:
                self.assertTrue(any(problem.startswith(complaint) for problem in problems),
                                (complaint, problems))
            if not expected and word != "auto":
                self.assertEqual(problems, [])

        run_cases("files", self.CASES, 13, ConfigDice, case)
        self.assertIsNone(self.rrouter.process.poll())


# Claude Code ##################################################################

def find_claude():
    """Return the executable of Claude Code, or None; RROUTER_CLAUDE names it, or is "none"."""
    named = os.environ.get("RROUTER_CLAUDE")
    if named:
        return None if named == "none" else named
    return shutil.which("claude") or shutil.which("claude", path=str(HERE / "node_modules/.bin"))


CLAUDE = find_claude()
CLAUDE_ENV = {"ANTHROPIC_API_KEY": "sk-test", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
              "DISABLE_TELEMETRY": "1", "DISABLE_AUTOUPDATER": "1"}
CLAUDE_WAIT_S = 30      # the net under each turn: Claude Code retries for three minutes
SHOW_TRANSCRIPT = os.environ.get("RROUTER_TRANSCRIPT") == "1" or "-v" in sys.argv


class RecordingRelay:
    """A relay to a port of 127.0.0.1 that changes no byte and keeps what each client sent."""

    def __init__(self, target):
        self.target, self.sent = target, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                self.sent.append(bytearray())
                threading.Thread(target=self._carry, args=(client, self.sent[-1]),
                                 daemon=True).start()

    def _carry(self, client, sent):
        target = "127.0.0.1", self.target
        with contextlib.suppress(OSError), client, socket.create_connection(target) as server:
            while True:
                for source in select.select([client, server], [], [])[0]:
                    data = source.recv(65536)
                    if not data:
                        return
                    if source is client:
                        sent += data
                    (server if source is client else client).sendall(data)

    def close(self):
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def take(self):
        """Return the requests since the last call as Received; call it while the client waits."""
        requests = []
        for number, sent in enumerate(self.sent):
            data = bytes(sent)
            del sent[:]
            while data:
                head, _, rest = data.partition(b"\r\n\r\n")
                start, *lines = head.decode("latin-1").split("\r\n")
                fields = [tuple(line.split(": ", 1)) for line in lines]
                length = int(value_of(fields, "content-length") or 0)
                requests.append(Received(*start.split(" "), fields, rest[:length],
                                         head + b"\r\n\r\n", number))
                data = rest[length:]
        return requests


class Conversation:
    """One Claude Code process that gets one turn after the other; a context manager."""

    def __init__(self, port, home):
        self.errors = tempfile.TemporaryFile()     # noqa: SIM115
        self.process = subprocess.Popen(
            claude_command("--input-format", "stream-json", "--output-format", "stream-json",
                           "--verbose"),
            env=claude_env(port, home), cwd=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors)

    def say(self, text):
        """Return the text of the reply; fail if the turn ends in an error."""
        watchdog = threading.Timer(CLAUDE_WAIT_S, self.process.kill)
        watchdog.start()
        try:
            turn = {"type": "user", "message": {"role": "user", "content": text}}
            self.process.stdin.write(json.dumps(turn).encode() + b"\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                message = json.loads(line)
                if message["type"] == "result":
                    if message["is_error"]:
                        raise AssertionError("Claude Code: %s" % message)
                    return message["result"]
        finally:
            watchdog.cancel()
        self.errors.seek(0)
        raise AssertionError("Claude Code ended within a turn: %s" % self.errors.read().decode())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self.process.stdin, self.process.stdout, self.errors:
            self.process.stdin.close()
            try:
                self.process.wait(WAIT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(WAIT_S)


def claude_command(*arguments):
    return [CLAUDE, "-p", "--model", SONNET, *arguments]


def claude_env(port, home):
    return {**CLAUDE_ENV, "PATH": os.environ["PATH"], "HOME": home,
            "ANTHROPIC_BASE_URL": "http://127.0.0.1:%d" % port}


def is_turn(request):
    """Return whether this is a turn; the client also sends `HEAD /api/hello` and count_tokens."""
    return request.method == "POST" and request.target.partition("?")[0] == "/v1/messages"


def streamed_reply(request, signature=None):
    """Return a streamed message `<model> heard <text>`; a `signature` puts a thinking first."""
    text = "%s heard %r" % (request.model, last_user_text(request))
    blocks = [({"type": "text", "text": ""}, {"type": "text_delta", "text": text})]
    if signature:
        blocks.insert(0, ({"type": "thinking", "thinking": "", "signature": ""},
                          {"type": "signature_delta", "signature": signature}))
    events = [event("message_start", message={
        "id": "msg_1", "type": "message", "role": "assistant", "model": request.model,
        "content": [], "stop_reason": None, "stop_sequence": None,
        "usage": {"input_tokens": 3, "output_tokens": 1}})]
    for index, (block, delta) in enumerate(blocks):
        events += [event("content_block_start", index=index, content_block=block), event("ping"),
                   event("content_block_delta", index=index, delta=delta),
                   event("content_block_stop", index=index)]
    end = {"stop_reason": "end_turn", "stop_sequence": None}
    return stream(*events, event("message_delta", delta=end, usage={"output_tokens": 2}),
                  event("message_stop"))


def last_user_text(request):
    """Return the last text of the user in the request's messages."""
    contents = [m["content"] for m in request.json()["messages"] if m["role"] == "user"]
    return contents[-1] if isinstance(contents[-1], str) else contents[-1][-1]["text"]


def refuse_foreign_signatures(request):
    """Respond as a backend that accepts only thinking blocks it signed."""
    if not is_turn(request):
        return error(404)
    own = base64.b64encode(request.model.encode()).decode()
    if messages_without_thinking(request, keep=own) == request.json()["messages"]:
        return streamed_reply(request, signature=own)
    wording = ("Corrupted thought signature." if request.model == GEMINI_SONNET else
               "messages.1.content.0: Invalid `signature` in `thinking` block")
    return error(400, wording, "invalid_request_error")


def messages_without_thinking(request, keep=None):
    """Return the request's messages without the thinking blocks whose signature is not `keep`."""
    return [message if isinstance(message["content"], str) else {**message, "content": [
        block for block in message["content"]
        if block["type"] != "thinking" or block["signature"] == keep]}
        for message in request.json()["messages"]]


def fields_without_host(request):
    return [field for field in end_to_end(request.fields) if field[0] != "Host"]


@unittest.skipUnless(CLAUDE, "needs Claude Code: RROUTER_CLAUDE may name its executable")
class ClaudeCodeTest(RouterTest):
    """The real Claude Code as the client; a relay ahead of rrouter keeps what it sent."""

    mode = "claude"
    config = {**DEFAULT_CONFIG, "modes": {**DEFAULT_CONFIG["modes"], "fast": {
        "mappings": [{"match": "claude-*", "rewrite": "gemini-3-flash"}]}}}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.relay = RecordingRelay(cls.rrouter.port)
        cls.addClassCleanup(cls.relay.close)
        cls.home = tempfile.mkdtemp(prefix="claude test ")
        cls.addClassCleanup(shutil.rmtree, cls.home, ignore_errors=True)

    def setUp(self):
        super().setUp()
        self.upstream.default = lambda request: (
            streamed_reply(request) if is_turn(request) else error(404))
        self.relay.take()

    def switch(self, *command):
        self.rrouter.home.run(*command, check=0)

    def turn(self):
        """Return (requests of the client, requests at the upstream) of the turn just ended."""
        received = list(filter(is_turn, self.upstream.received))
        self.upstream.received.clear()
        return list(filter(is_turn, self.relay.take())), received

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
        transcript = []
        with Conversation(self.relay.port, self.home) as claude:
            for number, (command, model) in enumerate(self.TURNS, 1):
                self.switch(*command)
                text = claude.say("turn %d" % number)
                (sent,), (received,) = self.turn()
                transcript.append(
                    "turn %d  rrouter %-10s client sent %s, upstream received %s, reply: %s" % (
                        number, " ".join(command), sent.model, received.model, text))
                with self.subTest(turn=number, command=command):
                    self.assertEqual(text, "%s heard 'turn %d'" % (model, number))
                    self.assert_forwarded(sent, received, model)
                    roles = [message["role"] for message in received.json()["messages"]]
                    self.assertEqual(roles.count("assistant"), number - 1)  # one conversation
            self.assertIsNone(claude.process.poll())
        if SHOW_TRANSCRIPT:
            print("", *transcript, sep="\n", file=sys.stderr)

    def test_failure_of_antigravity_is_rescued_unseen(self):
        config = self.rrouter.home.read("config.json")
        self.addCleanup(self.rrouter.home.write, "config.json", config)
        overloaded = {"type": "overloaded_error", "message": "Overloaded"}
        for failure in (
                error(429, "Resource has been exhausted (e.g. check quota).", "rate_limit_error"),
                stream(event("ping"), event("error", error=overloaded)),
                Response(hangup=True), Response(before=self.gate())):
            with self.subTest(failure.wire()):
                limit_s = 0.5 if failure.before else 60
                self.rrouter.home.write("config.json", json.dumps(
                    {**self.config, "auto": {"firstByteTimeoutSeconds": limit_s}}))
                self.switch("auto")         # this also clears the counters
                self.assert_rescued(failure)

    def assert_rescued(self, failure):
        """`claude -p` ends well although antigravity fails, after one call to each target."""
        self.upstream.default = lambda request: (
            error(404) if not is_turn(request) else
            failure if request.model == GEMINI_SONNET else streamed_reply(request))
        pooled = self.upstream.connections
        done = subprocess.run(
            claude_command("say a word"), env=claude_env(self.relay.port, self.home),
            cwd=self.home, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=CLAUDE_WAIT_S)
        sent, received = self.turn()
        self.assertEqual((done.returncode, done.stdout, done.stderr),
                         (0, SONNET + " heard 'say a word'\n", ""))
        self.assertEqual(len(sent), 1)
        models = [request.model for request in received]
        if failure.hangup and len(models) == 3 and received[0].connection <= pooled:
            del models[0]                   # the idle connection seemed stale: sent once more
        self.assertEqual(models, [GEMINI_SONNET, SONNET])

    def test_foreign_signatures_are_healed_in_both_directions(self):
        self.upstream.default = refuse_foreign_signatures
        with Conversation(self.relay.port, self.home) as claude:
            for command, model, calls in (("ag", GEMINI_SONNET, 1), ("claude", SONNET, 2),
                                          ("ag", GEMINI_SONNET, 2)):
                self.switch(command)
                with self.subTest(command, calls=calls):
                    self.assertEqual(claude.say("now " + command),
                                     "%s heard 'now %s'" % (model, command))
                    (sent,), received = self.turn()
                    self.assertEqual(len(received), calls)
                    self.assert_forwarded(sent, received[0], model)
                    if calls == 2:
                        first, healed = received
                        self.assertEqual(healed.json(), {
                            **first.json(), "messages": messages_without_thinking(first)})
                        self.assertEqual(fields_without_host(healed), fields_without_host(sent))


# Running them #################################################################

WORKERS = 3             # the tests wait more than they compute
RUN_S = 300             # a run that takes longer hangs; a good one takes about a minute
SOAK_S = 3600 + int(os.environ.get("RROUTER_SOAK_STREAM_S") or 120)
SLOW_S = 6              # the run names the classes that take longer and are not in SLOW
# The run begins with the longest classes, so that the workers end together; the order of the other
# classes does not matter, and a name without a class does no harm.
SLOW = ("StartRaceTest", "ListenTest", "SilenceTest", "InstalledLifeTest", "RandomFailuresTest",
        "DaemonLifeTest", "CommandLineTest", "DrainTest", "UpstreamAwayTest",
        "ServiceManagerTest", "ParallelStreamsTest", "CrowdOfClientsTest", "HangingDiskTest",
        "StreamTest", "SecretsTest", "FullDiskTest", "LongStreamTest", "LogGoneTest",
        "LimitsTest", "ClaudeSettingsTest", "RunningDaemonTest", "InterruptTest", "StateTest",
        "FreshnessTest", "CheckTest", "ClaudeCodeTest")


def run_side_by_side():
    """Run all test classes in WORKERS processes; return the exit status.

    Each worker takes the next class when it is done.
    """
    loader, everything = unittest.defaultTestLoader, vars(sys.modules[__name__]).items()
    names = [name for name, value in everything if isinstance(value, type)
             and issubclass(value, unittest.TestCase) and loader.getTestCaseNames(value)]
    names.sort(key=lambda name: SLOW.index(name) if name in SLOW else len(SLOW))
    start = time.monotonic()
    compiled()                                          # once for all workers
    numbers = os.pipe()
    results = tempfile.TemporaryFile(mode="w+")         # noqa: SIM115 - the workers inherit it
    os.write(numbers[1], bytes(range(len(names))))      # a worker reads the number of a class
    os.close(numbers[1])
    workers = []
    for _ in range(WORKERS):
        sys.stdout.flush()
        workers.append(os.fork())
        if not workers[-1]:
            faulthandler.dump_traceback_later(RUN_S, exit=True)     # shows where it hangs
            with results:
                run_classes(names, numbers[0], results.fileno())
            sys.exit()
    statuses = [os.waitpid(worker, 0)[1] for worker in workers]
    os.close(numbers[0])
    with results:
        results.seek(0)
        return report(names, [json.loads(line) for line in results], any(statuses),
                      time.monotonic() - start)


def run_classes(names, numbers, results):
    """Run the classes whose numbers are read from `numbers`; write begin and end to `results`."""
    for number in iter(lambda: os.read(numbers, 1), b""):
        name, output, start = names[number[0]], io.StringIO(), time.monotonic()
        os.write(results, (json.dumps({"name": name}) + "\n").encode())
        suite = unittest.defaultTestLoader.loadTestsFromTestCase(vars(sys.modules[__name__])[name])
        result = unittest.TextTestRunner(output, verbosity=0).run(suite)
        row = {"name": name, "run": result.testsRun, "seconds": time.monotonic() - start,
               "failures": len(result.failures) + len(result.unexpectedSuccesses),
               "errors": len(result.errors), "skipped": len(result.skipped)}
        os.write(results, (json.dumps(row) + "\n").encode())
        printed = output.getvalue() if row["failures"] or row["errors"] else "." * row["run"]
        os.write(2, printed.encode())


def report(names, rows, crashed, seconds):
    """Print what the rows of the workers add up to; return the exit status."""
    begun, ended = {row["name"] for row in rows}, {row["name"] for row in rows if "run" in row}
    slow = {row["name"] for row in rows if row.get("seconds", 0) > SLOW_S} - set(SLOW)
    for what, some in (("not finished", begun - ended), ("not begun", set(names) - begun),
                       ("slow, and not in SLOW", slow)):
        if some:
            print("\n%s: %s" % (what, ", ".join(sorted(some))), file=sys.stderr)
    counts = {kind: sum(row.get(kind, 0) for row in rows)
              for kind in ("run", "failures", "errors", "skipped")}
    bad = counts["failures"] or counts["errors"] or set(names) - ended or crashed
    details = ", ".join("%s=%d" % (kind, counts[kind]) for kind in ("failures", "errors", "skipped")
                        if counts[kind])
    print("\n%s\nRan %d tests in %.3fs\n\n%s%s" % (
        "-" * 70, counts["run"], seconds, "FAILED" if bad else "OK", details and f" ({details})"),
        file=sys.stderr)
    return 1 if bad else 0


def soaked_classes():
    """Return the names of the classes that do more with --soak: their text says so."""
    text = pathlib.Path(__file__).read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef):
            first = min(part.lineno for part in (node, *node.decorator_list))
            body = "\n".join(text.split("\n")[first - 1:node.end_lineno])
            if re.search(r"\bSOAKING\b|\bfuzz_cases\(", body):
                yield node.name


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
