#!/usr/bin/env python3
"""Tests of rrouter: `python3 test_rrouter.py`, or `python3 -m unittest`; `python3 test_rrouter.py --soak [SEED]`.

With --soak the streams of pings last RROUTER_SOAK_STREAM_S seconds, 120 unless it is set; RROUTER_FUZZ_CASES and
RROUTER_FUZZ_SEED say how many random cases there are and which.

What is real: rrouter runs as a process of its own (`rrouter.py serve` in an empty HOME), and every byte goes through
sockets on the loopback addresses, on ports that were free.  What is scripted: the upstream, which records each request
as it came and plays the answers it was given.  Pure parts are tested by tables, with a clock that moves when told to.
"""

import atexit
import base64
import calendar
import collections
import concurrent.futures
import configparser
import contextlib
import ctypes
import copy
import email.utils
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
import unicodedata
import unittest
import zipapp

try:
    import resource
except ImportError:                 # not a Unix
    resource = None

import rrouter

HERE = pathlib.Path(__file__).resolve().parent
RROUTER = str(HERE / "rrouter.py")
PYTHON = sys.executable, "-S"       # without what a machine's site-packages import at each of some hundred starts
RROUTER_TEXT = (HERE / "rrouter.py").read_text(encoding="utf-8")
SOAKING = bool(os.environ.get("RROUTER_SOAK"))      # set by --soak to its seed: what is short otherwise runs at length
WAIT_S = 10             # the net under every wait across threads or processes; never waited out when the code is right

# What Claude Code sends, header for header (the values are made up).
CLAUDE_HEADERS = (
    ("Accept", "application/json"), ("Authorization", "Bearer sk-test"), ("Content-Type", "application/json"),
    ("User-Agent", "claude-cli/2.1.330 (external, cli)"), ("X-Claude-Code-Session-Id", "0f6c-1"),
    ("X-Stainless-Arch", "x64"), ("X-Stainless-Lang", "js"), ("X-Stainless-OS", "Linux"),
    ("X-Stainless-Package-Version", "0.94.0"), ("X-Stainless-Retry-Count", "0"), ("X-Stainless-Runtime", "node"),
    ("X-Stainless-Runtime-Version", "v24.3.0"), ("X-Stainless-Timeout", "600"),
    ("anthropic-beta", "claude-code-20250219,interleaved-thinking-2025-05-14"),
    ("anthropic-dangerous-direct-browser-access", "true"), ("anthropic-version", "2023-06-01"), ("x-app", "cli"),
    ("Connection", "keep-alive"), ("Accept-Encoding", "gzip, deflate, br, zstd"))


# Scripted upstream ############################################################

Received = collections.namedtuple("Received", "method target version fields body head connection")
Received.__doc__ = """One request as the upstream got it: `fields` in order as (name, value), `head` the very bytes."""
Received.header = lambda self, name: ", ".join(v for k, v in self.fields if k.lower() == name.lower()) or None
Received.json = lambda self: json.loads(self.body)
Received.model = property(lambda self: json.loads(self.body).get("model"))


class Answer:
    """One scripted answer.

    `chunks` are sent one by one, chunked unless `framing` says "length", "close" or "none"; `gate` (an Event) holds
    back every chunk but the first until it is set, `before` holds back the head.  `cut` closes the connection after
    the chunks without ending the body; `hangup` closes it without a status line; `raw` (bytes, or a tuple of them,
    the gate between) replaces head and body and closes.
    """

    def __init__(self, status=200, chunks=(b"{}",), *, fields=(("Content-Type", "application/json"),), reason="OK",
                 framing="chunked", gate=None, before=None, cut=False, hangup=False, raw=None, close=False):
        self.status, self.fields, self.reason, self.framing = status, list(fields), reason, framing
        self.chunks = (chunks,) if isinstance(chunks, bytes) else tuple(chunks)
        self.gate, self.before, self.cut, self.hangup, self.raw, self.close = gate, before, cut, hangup, raw, close

    def head(self):
        lines = ["HTTP/1.1 %d %s" % (self.status, self.reason)] + ["%s: %s" % field for field in self.fields]
        if self.framing == "chunked":
            lines.append("Transfer-Encoding: chunked")
        elif self.framing == "length":
            lines.append("Content-Length: %d" % sum(map(len, self.chunks)))
        if self.close or self.framing == "close":
            lines.append("Connection: close")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def event(kind, **data):
    """Return one server-sent event as Anthropic writes it."""
    return ("event: %s\ndata: %s\n\n" % (kind, json.dumps(dict({"type": kind}, **data)))).encode()


def stream(*chunks, **options):
    """Return the answer of a 200 event stream; without arguments a whole short message."""
    chunks = chunks or (event("message_start", message={"id": "msg_1", "usage": {}}),
                        event("content_block_delta", index=0, delta={"type": "text_delta", "text": "hello"}),
                        event("message_stop"))
    return Answer(200, chunks, fields=(("Content-Type", "text/event-stream; charset=utf-8"),), **options)


def error(status, message="scripted", kind="api_error", fields=(), **options):
    """Return an answer of `status` in Anthropic's error shape."""
    body = json.dumps({"type": "error", "error": {"type": kind, "message": message}}).encode()
    return Answer(status, body, fields=(("Content-Type", "application/json"),) + tuple(fields), reason="Scripted",
                  framing="length", **options)


class Upstream:
    """An HTTP server on a free port of 127.0.0.1 that records requests and plays answers.

    `play(*answers)` queues answers; when the queue is empty, `default` is used.  Both take an Answer or a function
    of the Received request that returns one.  `received` lists the requests, `closed` counts connections that the
    other side closed or reset while an answer was due or under way.
    """

    def __init__(self, default=None, port=0, tls=None):
        self.default = default or Answer()
        self.received, self.queue, self.closed, self.connections = [], collections.deque(), 0, 0
        self.changed = threading.Condition()
        self.tls, self.open = tls, set()
        self.listener = socket.create_server(("127.0.0.1", port), backlog=256)
        self.port = self.listener.getsockname()[1]
        self.url = "http%s://127.0.0.1:%d" % ("s" if tls else "", self.port)
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()

    def play(self, *answers):
        self.queue.extend(answers)
        return self

    def clear(self):
        """Forget what was received and queued."""
        with self.changed:
            self.received.clear()
            self.queue.clear()
            self.closed = 0

    def wait(self, condition):
        """Wait until `condition(self)` is true."""
        with self.changed:
            if not self.changed.wait_for(lambda: condition(self), WAIT_S):
                raise AssertionError("upstream: waited %s s in vain; %d received, %d closed" % (
                    WAIT_S, len(self.received), self.closed))

    def close(self):
        """Stop listening and break every connection off."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.break_connections()

    def break_connections(self, reset=False):
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                if reset:               # when its thread closes it
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.shutdown(socket.SHUT_RDWR)

    def models(self):
        """Return the model names received, in order; None for a request without one."""
        return [json.loads(r.body).get("model") if r.body.startswith(b"{") else None for r in list(self.received)]

    def _accept(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            self.open.add(connection)
            threading.Thread(target=self._serve, args=(connection, self.connections), daemon=True).start()

    def _serve(self, connection, number):
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.tls:
                plain, connection = connection, self.tls.wrap_socket(connection, server_side=True)
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
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = reader.readline()
            if not line:
                return False
            head += line
        method, target, version = head.split(b"\r\n")[0].decode("latin-1").split(" ")
        fields = [tuple(line.decode("latin-1").split(": ", 1)) if b": " in line else (line.decode("latin-1")[:-1], "")
                  for line in head.split(b"\r\n")[1:-2]]
        lengths = [int(value) for name, value in fields if name.lower() == "content-length"]
        body = reader.read(lengths[0]) if lengths else b""
        if lengths and len(body) < lengths[0]:
            return False
        received = Received(method, target, version, fields, body, head, number)
        with self.changed:
            self.received.append(received)
            answer = self.queue.popleft() if self.queue else self.default
            self.changed.notify_all()
        if callable(answer):
            answer = answer(received)
        return self._play(connection, answer, method)

    def _play(self, connection, answer, method):
        if answer.before and not self._hold(connection, answer.before):
            return False
        if answer.hangup:
            return False
        try:
            if answer.raw is not None:
                for number, part in enumerate((answer.raw,) if isinstance(answer.raw, bytes) else answer.raw):
                    if number and answer.gate and not self._hold(connection, answer.gate):
                        return False
                    connection.sendall(part)
                return False
            connection.sendall(answer.head())
            if method == "HEAD" or answer.framing == "none":
                return not answer.close
            for number, chunk in enumerate(answer.chunks):
                if number and answer.gate and not self._hold(connection, answer.gate):
                    return False
                connection.sendall(b"%x\r\n%b\r\n" % (len(chunk), chunk) if answer.framing == "chunked" else chunk)
            if answer.cut:
                return False
            if answer.framing == "chunked":
                connection.sendall(b"0\r\n\r\n")
        except OSError:
            self._count_closed()
            return False
        return not answer.close and answer.framing != "close"

    def _hold(self, connection, gate):
        """Wait until `gate` is set; return False if the other side leaves before."""
        while not gate.wait(0.01):
            if select.select([connection], [], [], 0)[0]:
                with contextlib.suppress(OSError):
                    if connection.recv(1, 0 if self.tls else socket.MSG_PEEK):      # TLS cannot peek
                        continue
                self._count_closed()
                return False
        return True

    def _count_closed(self):
        with self.changed:
            self.closed += 1
            self.changed.notify_all()


# rrouter as a process #########################################################

PORT_MARKS = collections.deque()    # UDP sockets on the ports given out last: other workers and suites see them taken


def free_port():
    """Return a port that is free on both loopback addresses just now, and that no other test is about to use.

    Below the range that outgoing connections are given theirs from: one of them could take it before it is used.
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
                    continue                        # without IPv6 at all the port will do
        PORT_MARKS.append(mark)
        while len(PORT_MARKS) > 16:
            PORT_MARKS.popleft().close()
        return port


@atexit.register
def drop_port_marks():
    while PORT_MARKS:
        PORT_MARKS.pop().close()


@functools.lru_cache(maxsize=None)
def compiled():
    """Return rrouter.py compiled once: most processes of the suite run this.

    Python compiles a main script anew at each start, which is half of the time it takes, and a third of the suite's.
    """
    directory, owner = tempfile.mkdtemp(prefix="rrouter test "), os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(directory, ignore_errors=True))
    return py_compile.compile(RROUTER, os.path.join(directory, "rrouter.pyc"), doraise=True)


class Home:
    """An empty HOME with its ~/.rrouter, and the commands of rrouter run in it."""

    def __init__(self, upstream="http://127.0.0.1:9", mode=None, config=None, port=None, env=()):
        self.root = pathlib.Path(tempfile.mkdtemp(prefix="rrouter test "))
        self.dir = self.root / ".rrouter"
        self.port = port or free_port()
        keep = ("PATH", "LANG", "LC_ALL", "PYENV_VERSION", "PYTHONWARNINGS", "PYTHONDEVMODE", "COVERAGE_PROCESS_START")
        self.env = {name: os.environ[name] for name in keep if name in os.environ}
        if sys.warnoptions and "PYTHONWARNINGS" not in self.env:    # -W error holds for the processes too
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

    def run(self, *arguments, check=None, env=(), timeout=60, stdin=subprocess.DEVNULL):
        """Run one command to its end; return it with text `stdout` and `stderr`.  `check` asserts the exit status."""
        done = subprocess.run([*PYTHON, compiled(), *arguments], env=dict(self.env, **dict(env)), stdin=stdin,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=timeout)
        if "Traceback" in done.stderr or (check is not None and done.returncode != check):
            raise AssertionError("rrouter %s: status %d\n%s%s" % (
                " ".join(arguments), done.returncode, done.stdout, done.stderr))
        return done

    def remove(self):
        shutil.rmtree(str(self.root), ignore_errors=True)


class Running:
    """`rrouter serve` as a process in a Home of its own; a context manager."""

    def __init__(self, upstream, mode="antigravity", config=None, env=(), home=None):
        self.upstream = upstream
        self.home = home or Home(upstream, mode, config, env=env)
        self.own_home = home is None
        self.port = self.home.port
        self.start()

    def start(self):
        self.launch(compiled(), "serve")

    def launch(self, *arguments, **options):
        """Start Python with these arguments, and wait until it answers as rrouter; else it is ended."""
        self.output = tempfile.TemporaryFile()
        self.process = subprocess.Popen([*PYTHON, *arguments], env=self.home.env, stdin=subprocess.DEVNULL,
                                        stdout=self.output, stderr=self.output, **options)
        try:
            self.wait_until(self._answers)
        except BaseException:
            self.kill()
            raise

    def kill(self):
        """End it at once, as the machine does that runs out of memory."""
        self.process.kill()
        self.process.wait(WAIT_S)
        self.output.close()

    def _answers(self):
        if self.process.poll() is not None:
            raise AssertionError("rrouter serve ended with status %s:\n%s" % (self.process.returncode, self.printed()))
        try:
            health = self.health()
        except OSError:
            return None
        return health if health["pid"] == self.process.pid else None

    def stop(self, expect=0):
        """End it by SIGTERM, and see that it ends with status `expect` (None: any) and left no traceback.

        If it was stopped before, nothing happens.
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
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait(WAIT_S)
            if self.own_home:
                self.home.remove()

    def printed(self):
        self.output.seek(0)
        return self.output.read().decode("utf-8", "replace")

    def log(self):
        return self.home.read("logs/rrouter.log")

    def health(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        with contextlib.closing(connection):
            connection.request("GET", "/health")
            return json.loads(connection.getresponse().read())

    @staticmethod
    def wait_until(condition):
        """Return the first true value of `condition()`; fail after WAIT_S."""
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            value = condition()
            if value:
                return value
            time.sleep(0.005)
        raise AssertionError("waited %s s in vain" % WAIT_S)

    def connect(self, family=socket.AF_INET):
        """Return a raw socket to rrouter."""
        address = "127.0.0.1" if family == socket.AF_INET else "::1"
        connection = socket.socket(family)
        connection.settimeout(WAIT_S)
        try:
            connection.connect((address, self.port))
        except OSError:
            connection.close()
            raise
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def exchange(self, data, half_close=False):
        """Send raw bytes on a new connection; return all that comes back until rrouter closes it.

        Asks for a closed connection itself only if `data` does (`Connection: close`); fails after WAIT_S.
        """
        with self.connect() as connection:
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            return read_all(connection)

    def request(self, method="POST", target="/v1/messages?beta=true", body=None, fields=CLAUDE_HEADERS):
        """Send one request with exactly these fields (Host and Content-Length added); return a Reply."""
        with self.connect() as connection:
            connection.sendall(request_bytes(method, target, body, fields, self.port))
            return read_reply(connection, method)

    def post(self, model="claude-sonnet-5-5", target="/v1/messages?beta=true", fields=CLAUDE_HEADERS, **members):
        """POST a message for `model`; return a Reply."""
        members.setdefault("messages", [{"role": "user", "content": "hi"}])
        members.setdefault("stream", True)
        body = json.dumps(dict({"model": model}, **members), separators=(",", ":")).encode()
        return self.request("POST", target, body, fields)


def request_bytes(method="POST", target="/v1/messages", body=None, fields=(), port=8316):
    """Return one request as bytes, Host first."""
    head = ["%s %s HTTP/1.1" % (method, target), "Host: localhost:%d" % port] + ["%s: %s" % field for field in fields]
    if body is not None:
        head.append("Content-Length: %d" % len(body))
    return ("\r\n".join(head) + "\r\n\r\n").encode("latin-1") + (body or b"")


# Reading answers ##############################################################

Reply = collections.namedtuple("Reply", "status reason fields body complete interim")
Reply.__doc__ = """An answer as the client got it; `complete` is False where it was broken off, `interim` lists 1xx."""
Reply.header = lambda self, name: ", ".join(v for k, v in self.fields if k.lower() == name.lower()) or None
Reply.json = lambda self: json.loads(self.body)


def read_all(connection):
    """Return all bytes until the end of file or a reset."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while True:
            block = connection.recv(65536)
            if not block:
                break
            data += block
    return data


def read_head(reader):
    """Return (status, reason, fields) read from a binary file; None at its end."""
    line = reader.readline()
    if not line:
        return None
    version, status, reason = (line.decode("latin-1").rstrip("\r\n").split(" ", 2) + [""])[:3]
    assert version in ("HTTP/1.1", "HTTP/1.0"), line
    fields = []
    while True:
        line = reader.readline().decode("latin-1")
        assert line.endswith("\r\n"), "head cut short: %r" % line
        if line == "\r\n":
            return int(status), reason, fields
        name, _, value = line[:-2].partition(":")
        fields.append((name, value.strip()))


def read_reply(connection, method="GET"):
    """Read one answer, strictly framed, and return a Reply; None if the connection ends without one."""
    with connection.makefile("rb") as reader:
        return read_reply_from(reader, method)


def read_reply_from(reader, method="GET"):
    """The same from a binary file, for several answers on one connection."""
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
            assert values["transfer-encoding"] == "chunked" and "content-length" not in values, fields
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


class RouterTest(unittest.TestCase):
    """Base of the tests through real sockets: one scripted upstream and one rrouter for each class.

    `mode`, `config`, `env` and `upstream_class` are class attributes, and `altered`, the code of an Altered one;
    `setUp` gives each test a fresh script and resets the mode.
    """

    mode, config, env, upstream_class, altered = "antigravity", None, (), Upstream, ""

    @classmethod
    def setUpClass(cls):
        cls.upstream = cls.upstream_class()
        cls.addClassCleanup(cls.upstream.close)
        start = functools.partial(Altered, code=cls.altered) if cls.altered else Running
        cls.rrouter = start(cls.upstream, mode=cls.mode, config=cls.config, env=cls.env)
        cls.addClassCleanup(cls.rrouter.__exit__)

    def setUp(self):
        self.upstream.clear()
        self.upstream.default = Answer()
        if self.rrouter.home.read("mode").strip() != self.mode or self.mode == "auto":
            self.rrouter.home.write("mode", self.mode + "\n")       # in auto mode this clears what a test left behind

    def assert_error(self, reply, status, *words):
        """The reply is rrouter's own error: this status, Anthropic's shape, these words in the message."""
        self.assertEqual(reply.status, status, reply)
        content = json.loads(reply.body)
        self.assertEqual(content["type"], "error")
        self.assertTrue(content["error"]["message"].startswith("rrouter: "), content)
        for word in words:
            self.assertIn(word, content["error"]["message"])


# Configuration, by tables #####################################################

class FakeClock:
    """A clock that moves only when told to.  Call it to read it, in Unix seconds."""

    def __init__(self, now=1_800_000_000.0):
        self.now = now

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


def config_of(**changes):
    """Return the default configuration with some top-level members changed."""
    return rrouter.parse_config(json.dumps(dict(rrouter.DEFAULT_CONFIG, **changes)))


class ParseConfigTest(unittest.TestCase):

    def test_the_default_config_has_no_problems_and_round_trips(self):
        config = config_of()
        self.assertEqual(config.problems, ())
        self.assertEqual(rrouter.parse_config(rrouter.config_text(config)), config)
        self.assertEqual(json.loads(rrouter.config_text(config)), rrouter.DEFAULT_CONFIG)

    REFUSED = (
        # what, text, words of the complaint
        ("not JSON", '{"modes": }', "1:11: expecting value"),
        ("cut short", '{"modes":', "the end of the file"),
        ("second line", '{\n  "modes" 1}', "2:11: expecting"),
        ("empty", '', "1:1: expecting value"),
        ("array", '[]', "the top level: expected an object"),
        ("no modes", '{}', "modes: missing"),
        ("no mode", '{"modes": {}}', "modes: expected an object with at least"),
        ("modes is a list", '{"modes": []}', "modes: expected an object"),
        ("mode is a number", '{"modes": {"a": 1}}', "modes.a: expected an object, found 1"),
        ("auto defined", '{"modes": {"auto": {}}}', "modes.auto: expected another name"),
        ("upper case", '{"modes": {"Fast": {}}}', "modes.Fast: expected a name in lower"),
        ("space in the name", '{"modes": {"a b": {}}}', "modes.a b: expected a name"),
        ("empty name", '{"modes": {"": {}}}', "expected a name"),
        ("mappings no list", '{"modes": {"a": {"mappings": {}}}}', "modes.a.mappings: expected a list"),
        ("match is a number", '{"modes": {"a": {"mappings": [{"match": 7, "rewrite": "x"}]}}}',
         "modes.a.mappings[0].match: expected a string"),
        ("no rewrite", '{"modes": {"a": {"mappings": [{"match": "x"}]}}}', "modes.a.mappings[0].rewrite: missing"),
        ("empty rewrite", '{"modes": {"a": {"mappings": [{"match": "x", "rewrite": ""}]}}}',
         "mappings[0].rewrite: expected"),
        ("default unknown", '{"modes": {"a": {}}, "defaultMode": "b"}',
         'defaultMode: expected one of a, auto, found "b"'),
        ("default is null", '{"modes": {"a": {}}, "defaultMode": null}', "defaultMode: expected one of"),
        ("one target", '{"modes": {"a": {}}, "auto": {"targets": ["a"]}}', "auto.targets: expected two"),
        ("twice the same", '{"modes": {"a": {}}, "auto": {"targets": ["a", "a"]}}', "auto.targets: expected two"),
        ("threshold 0", '{"modes": {"a": {}}, "auto": {"failureThreshold": 0}}',
         "auto.failureThreshold: expected a whole"),
        ("threshold 1.5", '{"modes": {"a": {}}, "auto": {"timeoutThreshold": 1.5}}',
         "auto.timeoutThreshold: expected a whole"),
        ("threshold true", '{"modes": {"a": {}}, "auto": {"failureThreshold": true}}', "found true"),
        ("no cooldowns", '{"modes": {"a": {}}, "auto": {"cooldownMinutes": []}}',
         "auto.cooldownMinutes: expected a list"),
        ("negative cooldown", '{"modes": {"a": {}}, "auto": {"cooldownMinutes": [1, -1]}}',
         "auto.cooldownMinutes[1]: expected"),
        ("timeout a string", '{"modes": {"a": {}}, "auto": {"firstByteTimeoutSeconds": "9"}}',
         "auto.firstByteTimeoutSeconds: expected"),
        ("NaN", '{"modes": {"a": {}}, "auto": {"firstByteTimeoutSeconds": NaN}}', "NaN"),
        ("infinite", '{"modes": {"a": {}}, "auto": {"firstByteTimeoutSeconds": 1e999}}',
         "auto.firstByteTimeoutSeconds"),
        ("deep", '[' * 100_000, "nesting that is too deep"),
    )

    def test_what_does_not_fit_is_refused_with_its_place(self):
        for what, text, words in self.REFUSED:
            with self.subTest(what):
                with self.assertRaises(rrouter.ConfigError) as caught:
                    rrouter.parse_config(text)
                self.assertIn(words, str(caught.exception))

    def test_unknown_keys_are_named_and_do_no_harm(self):
        config = rrouter.parse_config('{"modes": {"a": {"x": 1, "mappings": [{"match": "m", "rewrite": "r", "y": 2}]}},'
                                      '"zoom": 3, "auto": {"speed": 4}}')
        self.assertEqual(config.modes["a"], (rrouter.Rule("m", "r"),))
        self.assertEqual([problem.split(":")[0] for problem in config.problems],
                         ["zoom", "modes.a.x", "modes.a.mappings[0].y", "auto.speed"])

    RESOLVED = (
        # modes,  default,  targets,      asked for,  in force
        ("ac",    "c",      ("a", "c"),   "a",        "a"),
        ("ac",    "c",      ("a", "c"),   "auto",     "auto"),
        ("ac",    "c",      ("a", "c"),   "zzz",      "c"),
        ("ac",    "auto",   ("a", "c"),   "zzz",      "auto"),
        ("ac",    "auto",   ("a", "x"),   "zzz",      "a"),
        ("ac",    "c",      ("a", "x"),   "auto",     "c"),
    )

    def test_unknown_modes_and_unusable_auto_fall_back(self):
        for modes, default, targets, asked, expected in self.RESOLVED:
            with self.subTest(default=default, targets=targets, asked=asked):
                config = config_of(modes={name: {} for name in modes}, defaultMode=default,
                                   auto={"targets": list(targets)})
                self.assertEqual(config.resolve(asked), expected)
                self.assertEqual("x" in targets, bool(config.auto_error))


class RouteTest(unittest.TestCase):

    CASES = (
        # rules as match>rewrite,                 model,                 goes on as
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
                mappings = [dict(zip(("match", "rewrite"), rule.split(">"))) for rule in rules.split()]
                config = config_of(modes={"m": {"mappings": mappings}}, defaultMode="m")
                self.assertEqual(rrouter.decide_route(config, "m", model).model, expected)


# Messages, by tables ##########################################################

class ModelSpanTest(unittest.TestCase):

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
        (b'{"x":"\xff","model":"\xff"}',                             None),
        (b'{"x":' + b"[" * 100_000,                                  None),
        (b'\x1f\x8b\x08\x00',                                        None),
    )

    def test_the_first_top_level_model_string_is_found(self):
        for body, expected in self.CASES:
            with self.subTest(body=body[:40]):
                found = rrouter.find_model(body)
                self.assertEqual(found[2] if found else None, expected)

    def test_only_the_value_changes_in_random_bodies(self):
        """Against `json` as oracle: the value becomes the new one, every other byte and member stays."""
        chance = random.Random(8316)
        for _ in range(3000):
            members = [(chance.choice(["model", "a", "b\"", "mödel", "stream"]), random_value(chance, 3))
                       for _ in range(chance.randrange(5))]
            body = ("{" + ",".join("%s%s%s:%s" % (space(chance), json.dumps(key, ensure_ascii=chance.random() < 0.5),
                                                  space(chance), json.dumps(value, ensure_ascii=chance.random() < 0.5))
                                   for key, value in members) + space(chance) + "}").encode()
            found = rrouter.find_model(body)
            first = next((value for key, value in members if key == "model"), None)
            self.assertEqual(found[2] if found else None, first if isinstance(first, str) else None, body)
            if found:
                spliced = b"".join(rrouter.splice(body, found[0], found[1], 'n"w\u00e9'))
                pairs = json.loads(spliced, object_pairs_hook=list)
                changed = [index for index, (key, _) in enumerate(members) if key == "model"][0]
                expected = json.loads(body, object_pairs_hook=list)
                expected[changed] = ("model", 'n"w\u00e9')
                self.assertEqual(pairs, expected)
                self.assertEqual((spliced[:found[0]], spliced[len(spliced) - len(body) + found[1]:]),
                                 (body[:found[0]], body[found[1]:]))
            cut = body[:chance.randrange(len(body))]
            if not re.match(rb'\s*\{\s*"model"', cut):           # a leading model ends the search
                self.assertIsNone(rrouter.find_model(cut), cut)

    def test_a_leading_model_costs_the_same_however_long_the_body(self):
        short, long = b'{"model":"a","x":"' + b"y" * 1000 + b'"}', b'{"model":"a","x":"' + b"y" * 30_000_000 + b'"}'

        def best(body):
            times = []
            for _ in range(20):
                start = time.perf_counter()
                rrouter.find_model(body)
                times.append(time.perf_counter() - start)
            return min(times)
        self.assertLess(best(long), best(short) * 20 + 0.0005)


def space(chance):
    """Return some JSON white space."""
    return chance.choice(["", "", " ", "\n\t ", "\r\n"])


def random_value(chance, depth):
    """Return a random JSON value."""
    kind = chance.randrange(7 if depth else 5)
    if kind < 2:
        return "".join(chance.choice('amodel":,{}[]\\ é한\u2028') for _ in range(chance.randrange(8)))
    if kind < 5:
        return chance.choice([None, True, -0.0, 1e300, 12345678901234567890])
    if kind == 5:
        return [random_value(chance, depth - 1) for _ in range(chance.randrange(4))]
    return {chance.choice(["model", "x", "messages"]): random_value(chance, depth - 1)
            for _ in range(chance.randrange(4))}


class WithoutThinkingTest(unittest.TestCase):

    CASES = (
        # content before,                                            content after; None: nothing to take out
        ('[{"type":"thinking","thinking":"x"} , {"type":"text"}]',   '[{"type":"text"}]'),
        ('[{"type":"text"} ,{"signature":"s","type":"thinking"} ]',  '[{"type":"text"} ]'),
        ('[ {"type":"text"},{"type":"redacted_thinking"},1]',        '[ {"type":"text"},1]'),
        ('[{"type":"thinking"},{"type":"a"},{"type":"thinking"},{"type":"thinking"},{"type":"b"}]',
         '[{"type":"a"},{"type":"b"}]'),
        ('[{"type":"thinking"},{"type":"redacted_thinking"}]',       '[{"type":"text","text":"(no content)"}]'),
        ('[{"type":"text","text":"{\\"type\\":\\"thinking\\"}"}]',   None),
        ('"thinking"',                                               None),
        ('[]',                                                       None),
        ('[{"type":"tool_result","content":[{"type":"thinking"}]}]', None),
    )

    def test_thinking_blocks_go_and_all_else_stays(self):
        for before, after in self.CASES:
            with self.subTest(before):
                frame = '{"model":"m", "messages": [{"role":"assistant","content":%s},{"content":"é"} ],"x":1e400}'
                result = rrouter.without_thinking((frame % before).encode())
                self.assertEqual(result, (frame % after).encode() if after else None)

    def test_bodies_of_other_kinds_are_left_alone(self):
        for body in (b"", b"{}", b"[]", b"x", b'{"messages":7}', b'{"messages":[7]}', b'{"messages":[{"content":[',
                     b"\xff"):
            with self.subTest(body):
                self.assertIsNone(rrouter.without_thinking(body))


class ChunkedBodyTest(unittest.TestCase):

    def test_any_cutting_gives_the_same_payload(self):
        chance = random.Random(8316)
        for _ in range(500):
            chunks = [bytes([chance.randrange(256)]) * chance.choice([1, 2, 17, 300, 5000])
                      for _ in range(chance.randrange(6))]
            coded = b"".join(b"%x%b\r\n%b\r\n" % (len(c), chance.choice([b"", b";a=b", b" ; x"]), c) for c in chunks)
            coded += b"0\r\n" + chance.choice([b"", b"X: y\r\n", b"A: b\r\nC: d\r\n"]) + b"\r\n"
            decoder, payload, position, data = rrouter.ChunkedBody(), b"", 0, coded + b"REST"
            while not decoder.done:
                size = chance.choice([1, 2, 3, 50, 4000, 100_000])
                payload += decoder.feed(data[position:position + size])
                position += size
            self.assertEqual(payload, b"".join(chunks))
            self.assertEqual(decoder.rest + data[position:], b"REST")

    def test_broken_coding_is_refused_at_once(self):
        for coded in (b"0x3\r\nabc\r\n", b"+3\r\n", b"-1\r\n", b" 3\r\n", b"zz\r\n", b"1" * 17 + b"\r\n", b"3\nabc\n",
                      b"3\r\nabcd\r\n", b"3\r\nabcXY", b"3;\x00\r\n", b"\r\n", b"3;" + b"x" * 70_000,
                      b"0\r\nno colon\r\n\r\n", b"0\r\nA: " + b"x" * 9000):
            with self.subTest(coded[:20]):
                with self.assertRaises(rrouter.UpstreamError):
                    rrouter.ChunkedBody().feed(coded)


class EventScanTest(unittest.TestCase):

    CASES = (
        # stream, whether it is committed (or broken after that), whether it is failed
        (b"",                                                                False, False),
        (b": hello\n\n: again\n\n",                                          False, False),
        (b"event: ping\ndata: {\"type\": \"ping\"}\n\n",                     False, False),
        (b"data: {\"type\":\"ping\"}\n\n",                                   False, False),
        (b"event: message_start\ndata: {}\n",                                False, False),
        (b"event: message_start\ndata: {}\n\n",                              True, False),
        (b"event: message_start\r\ndata: {}\r\n\r\n",                        True, False),
        (b"data: hello\n\n",                                                 True, False),
        (b"id: 7\n\n",                                                       False, False),
        (b"event: error\ndata: {}\n\n",                                      False, True),
        (b"event:error\r\ndata: {}\r\n\r\n",                                 False, True),
        (b"data: {\"type\": \"error\", \"error\": {}}\n\n",                  False, True),
        (b": c\n\nevent: ping\ndata: {}\n\nevent: error\ndata: {}\n\n",      False, True),
        (b"event: a\ndata: {}\n\nevent: error\ndata: {}\n\n",                "broken", False),
        (b"event: a\ndata: {}\n\ndata: {\"type\":\"error\"}\n\n",            "broken", False),
        (b"event: a\ndata: {\"t\": \"event: error\\n\"}\n\n",                True, False),
        (b"event: a\ndata: x\n\nevent: error_report\ndata: {}\n\n",          True, False),
    )

    def test_events_are_judged_however_the_stream_is_cut(self):
        for stream_bytes, committed, failed in self.CASES:
            for size in (1, 2, 3, 7, 1000):
                with self.subTest(stream_bytes, size=size):
                    scan = rrouter.EventScan()
                    for start in range(0, len(stream_bytes), size):
                        scan.feed(stream_bytes[start:start + size])
                    self.assertEqual((scan.committed, scan.failed, scan.broken),
                                     (bool(committed), failed, committed == "broken"))


class WatchTest(unittest.TestCase):
    """The time limit of an attempt; `find_limit_s` reads the body, which takes long."""

    def test_limit_is_looked_for_once_and_only_when_the_least_has_passed(self):
        for least_s, found_s, looked_for in ((1000, 1000, 0), (0, 1000, 1), (0, 0, 1)):
            with self.subTest(least=least_s, found=found_s):
                asked = []
                watch = rrouter.Watch(None, least_s, lambda: asked.append(1) or found_s)
                watch.start()
                for _ in range(3):
                    if found_s:
                        self.assertEqual(watch.check(), rrouter.TICK_S)
                    else:
                        with self.assertRaisesRegex(rrouter.UpstreamTimeout, "within 0 s"):
                            watch.check()
                self.assertEqual(len(asked), looked_for)

    def test_there_is_none_unless_asked_for_and_none_once_lifted(self):
        unlimited, lifted = rrouter.Watch(None), rrouter.Watch(None, 0, lambda: 0)
        lifted.start()
        lifted.lift()
        for watch in unlimited, lifted:
            watch.start()
            self.assertEqual(watch.check(), rrouter.TICK_S)


class TextTest(unittest.TestCase):

    def test_printable_escapes_what_could_break_a_line_or_a_terminal(self):
        for text, expected in (("plain", "plain"), ("a\nb", "a\\nb"), ("\x1b[31m", "\\x1b[31m"), ("\x9b", "\\x9b"),
                               ("한", "\\ud55c"), ("\ud83d", "\\ud83d"), ("\x7f", "\\x7f"),
                               ("x" * 400, "x" * 300 + "...")):
            with self.subTest(text[:10]):
                self.assertEqual(rrouter.printable(text), expected)

    def test_retry_after_is_seconds_or_a_date(self):
        now = 1_800_000_000.0
        for value, expected in ((None, None), ("", None), ("120", 120.0), ("-1", None), ("soon", None), ("1e9", None),
                                ("Fri, 15 Jan 2027 08:01:00 GMT", 60.0), ("Fri, 15 Jan 2027 07:00:00 GMT", 0.0)):
            with self.subTest(value):
                self.assertEqual(rrouter.retry_after_s(value, now), expected)


# Failover, by walks ###########################################################

TARGETS = ("ag", "cl")


class FailoverWalk(unittest.TestCase):
    """Base of the walks: `fails` and `serves` carry one request through the machine as `forward` does."""

    cooldowns_min = (30, 60, 120, 240)

    def setUp(self):
        self.clock = FakeClock()
        self.auto = rrouter.AutoSettings(TARGETS, 3, 2, tuple(60.0 * m for m in self.cooldowns_min), 150.0)
        self.failover = rrouter.Failover(self.clock, self.auto)

    def request(self, dead=(), model="opus", what="429", timed_out=False, retry_after=None):
        """Carry one request for `model` through, all attempts on the targets in `dead` failing; return the targets."""
        ticket = self.failover.admit(model, TARGETS)
        tried = [ticket.target]
        if ticket.target in dead:
            self.failover.charge(ticket, rrouter.Failure(what, timed_out, retry_after))
            ticket = self.failover.rescue(ticket, TARGETS)
            tried.append(ticket.target)
        if ticket.target in dead:
            self.failover.charge(ticket, rrouter.Failure(what, timed_out, retry_after))
        else:
            self.failover.credit(ticket)
        return tried

    def requests(self, count, *dead, **options):
        return [self.request(dead, **options) for _ in range(count)][-1]

    def state(self, model=None):
        """Return (target, switches, failures, timeouts, minutes left) of the whole or of a model switched alone."""
        seen = self.failover.report(True)
        if model is not None:
            seen = seen["models"].get(model)
            if seen is None:
                return None
        return (seen["currentTarget"], seen["switchCount"], seen["failureCount"], seen["timeoutCount"],
                round(seen["cooldownRemainingSeconds"] / 60, 1))

    def wait_minutes(self, minutes):
        self.clock.advance(60 * minutes)

    def assert_over_though_nobody_asked(self, model=None):
        """A clock set back, for good or for a while, that only the watcher looks at, lengthens no wait."""
        saved, now = self.failover.save(), self.clock.now
        for label, moves in (("back and right again", (-86400, 86400)), ("back for good", (-86400, 60 * 30)),
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

    def test_two_timeouts_switch_and_are_counted_apart(self):
        self.requests(2, "ag")
        self.requests(1, "ag", timed_out=True)
        self.assertEqual(self.state(), ("ag", 0, 2, 1, 0))
        self.requests(1, "ag", timed_out=True)
        self.assertEqual(self.state(), ("cl", 1, 0, 0, 30))
        self.assertEqual(self.failover.report(True)["reason"], "2 consecutive timeouts")

    def test_a_success_of_the_target_itself_sets_its_counts_back(self):
        self.requests(2, "ag")
        self.requests(1)
        self.assertEqual(self.state(), ("ag", 0, 0, 0, 0))

    def test_the_probe_is_one_and_its_success_brings_all_back(self):
        self.requests(3, "ag")
        self.wait_minutes(30)
        probe = self.failover.admit("opus", TARGETS)
        self.assertEqual((probe.target, bool(probe.probe)), ("ag", True))
        self.assertEqual(self.requests(5, "ag"), ["cl"])                    # others stay
        self.assertEqual(self.failover.credit(probe), ["RECOVERED: ag answers again"])
        self.assertEqual(self.state(), ("ag", 1, 0, 0, 0))

    def test_a_failed_probe_starts_the_next_wait(self):
        self.requests(3, "ag")
        for switches, minutes in ((2, 60), (3, 120), (4, 240), (5, 240)):
            self.wait_minutes(self.state()[4])
            self.assertEqual(self.requests(1, "ag"), ["ag", "cl"])
            self.assertEqual(self.state(), ("cl", switches, 0, 0, minutes))

    def test_a_probe_that_counts_for_nobody_frees_its_place(self):
        self.requests(3, "ag")
        self.wait_minutes(30)
        probe = self.failover.admit("opus", TARGETS)
        self.assertEqual(self.failover.admit("opus", TARGETS).target, "cl")
        self.failover.release(probe)
        self.assertEqual(self.failover.admit("opus", TARGETS).target, "ag")

    def test_the_fallback_failing_in_turn_switches_back_and_voids_the_wait(self):
        self.requests(3, "ag")
        self.requests(2, "cl")
        self.assertEqual(self.state(), ("cl", 1, 2, 0, 30))
        self.requests(1, "cl")
        self.assertEqual(self.state(), ("ag", 2, 0, 0, 0))

    def test_going_back_and_forth_while_all_is_dead_never_lengthens_the_wait(self):
        for _ in range(20):
            self.requests(1, "ag", "cl")
        seen = self.failover.report(True)
        self.assertGreater(seen["switchCount"], 4)
        self.assertIn(seen["cooldownSeconds"], (0, 1800))

    def test_the_wait_grows_only_after_the_new_target_has_answered(self):
        for switched in range(1, 4):
            for _ in range(3):                      # ag fails, rescued by cl
                self.request(("ag",))
            self.assertEqual(self.state()[4], (30, 60, 120)[switched - 1])
            for _ in range(3):
                self.request(("cl",))               # and cl fails, rescued by ag

    def test_a_quiet_time_after_the_return_sets_the_wait_back(self):
        self.requests(3, "ag")
        self.wait_minutes(30)
        self.requests(1)                            # the probe succeeds
        self.wait_minutes(59)
        self.requests(3, "ag")
        self.assertEqual(self.state()[4], 60)
        self.wait_minutes(60)
        self.requests(1)
        self.wait_minutes(120)
        self.requests(3, "ag")
        self.assertEqual(self.state()[4], 30)

    RETRY_AFTER = (
        # Retry-After in seconds,  wait in minutes
        (None,                     30),
        (0,                        1),
        (600,                      10),
        (86400,                    30),
    )

    def test_retry_after_shortens_the_wait_but_never_lengthens_it(self):
        for seconds, minutes in self.RETRY_AFTER:
            with self.subTest(seconds):
                self.setUp()
                self.requests(3, "ag", retry_after=seconds)
                self.assertEqual(self.state()[4], minutes)

    def test_late_failures_from_before_a_switch_do_not_switch_back(self):
        early = [self.failover.admit("opus", TARGETS) for _ in range(40)]
        on_cl = [self.failover.rescue(ticket, TARGETS) for ticket in early]
        for ticket in early + on_cl:
            self.failover.charge(ticket, rrouter.Failure("500"))
        self.assertEqual(self.state(), ("cl", 1, 0, 0, 30))

    def test_a_late_success_of_the_failed_target_does_not_switch_back(self):
        early = self.failover.admit("opus", TARGETS)
        self.requests(3, "ag")
        self.failover.credit(early)
        self.assertEqual(self.state()[0], "cl")

    def test_a_late_outcome_of_a_probe_that_was_overtaken_is_nobodys(self):
        self.requests(3, "ag")
        self.wait_minutes(30)
        probe = self.failover.admit("opus", TARGETS)
        self.requests(3, "cl")                      # back on ag meanwhile
        self.failover.charge(probe, rrouter.Failure("500"))
        self.assertEqual(self.state(), ("ag", 2, 0, 0, 0))

    def test_a_clock_set_back_does_not_lengthen_the_wait_and_one_set_forward_ends_it(self):
        self.requests(3, "ag")
        self.clock.advance(-86400 * 365)
        self.assertEqual(self.state()[4], 30)
        self.wait_minutes(31)
        self.assertEqual(self.requests(1), ["ag"])

    def test_a_clock_set_back_is_noticed_though_nobody_asks(self):
        self.requests(3, "ag")
        self.assert_over_though_nobody_asked()

    def test_a_look_at_the_clock_ends_no_wait_and_moves_none(self):
        self.failover.look_at_clock()
        self.assertEqual(self.state(), ("ag", 0, 0, 0, 0))
        self.requests(3, "ag")
        saved = self.failover.save()
        for minutes, left in ((0, 30), (10, 20), (20, 0)):
            self.wait_minutes(minutes)
            self.failover.look_at_clock()
            self.assertEqual((self.state()[4], self.failover.save()), (left, saved))

    def test_reset_forgets_everything_and_outcomes_of_before(self):
        early = [self.failover.admit("opus", TARGETS) for _ in range(3)]
        self.requests(3, "ag")
        self.assertEqual(self.failover.reset(self.auto, "mode auto"), ["RESET: mode auto; on ag"])
        self.assertEqual(self.failover.reset(self.auto, "mode auto"), [])
        for ticket in early:
            self.failover.charge(ticket, rrouter.Failure("500"))
        self.assertEqual(self.state(), ("ag", 0, 0, 0, 0))

    def test_thresholds_are_those_of_the_config(self):
        self.failover.reset(self.auto._replace(failure_threshold=1), "test")
        self.requests(1, "ag")
        self.assertEqual(self.state()[0], "cl")


class SingleModelWalk(FailoverWalk):

    def opus_fails_alone(self):
        """Let opus fail three times on ag while haiku succeeds in between."""
        for _ in range(3):
            self.request(("ag",), model="opus")
            self.request((), model="haiku")

    def test_a_model_that_fails_while_others_succeed_switches_alone(self):
        self.opus_fails_alone()
        self.assertEqual(self.state(), ("ag", 0, 0, 0, 0))
        self.assertEqual(self.state("opus"), ("cl", 1, 0, 0, 30))
        self.assertEqual(self.request((), model="opus"), ["cl"])
        self.assertEqual(self.request((), model="haiku"), ["ag"])

    def test_its_probe_is_its_own_and_does_not_drag_the_others_along(self):
        self.opus_fails_alone()
        for minutes in (30, 60, 120, 240):
            self.wait_minutes(minutes)
            self.assertEqual(self.request(("ag",), model="opus"), ["ag", "cl"])
        self.assertEqual(self.state(), ("ag", 0, 0, 0, 0))
        self.wait_minutes(240)
        self.assertEqual(self.request((), model="opus"), ["ag"])
        self.assertIsNone(self.state("opus"))

    def test_what_it_had_under_way_when_it_switched_is_charged_to_nobody_else(self):
        early = [self.failover.admit("opus", TARGETS) for _ in range(10)]
        self.opus_fails_alone()
        for ticket in early:
            self.failover.charge(ticket, rrouter.Failure("500"))
        self.assertEqual(self.state()[:2], ("ag", 0))

    def test_when_the_whole_switches_the_counts_of_its_models_start_anew(self):
        self.request(("ag",), model="opus")
        self.request(("ag",), model="opus")
        self.request(("ag",), model="haiku")        # the third in a row, whatever the model
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
        self.wait_minutes(10)
        self.requests(3, "cl", model="haiku")
        self.assertEqual(self.state()[0], "ag")
        self.assertEqual(self.state("opus"), ("cl", 1, 0, 0, 20))

    def test_a_model_that_fails_on_the_fallback_goes_to_the_other_side_alone(self):
        self.requests(3, "ag", model="haiku")
        for _ in range(3):
            self.request(("cl",), model="opus")
            self.request((), model="haiku")
        self.assertEqual(self.state("opus")[0], "ag")
        self.wait_minutes(30)
        self.request((), model="haiku")     # the probe of the whole succeeds: opus has nothing left to be alone for
        self.assertIsNone(self.state("opus"))

    def test_a_clock_set_back_is_noticed_for_a_model_alone_too(self):
        self.opus_fails_alone()
        self.assertEqual(self.state(), ("ag", 0, 0, 0, 0))
        self.assert_over_though_nobody_asked("opus")

    def test_at_most_256_models_are_remembered_and_switched_ones_longest(self):
        self.opus_fails_alone()
        for number in range(400):
            self.request(("ag",), model="m%d" % number)
            self.request((), model="haiku")
        self.assertEqual(self.state("opus")[0], "cl")
        self.assertLessEqual(len(self.failover.save()["models"]), 256)


class SavedStateTest(FailoverWalk):

    def test_a_restart_keeps_waits_levels_and_models(self):
        for _ in range(3):
            self.request(("ag",), model="opus")
            self.request((), model="haiku")
        self.requests(3, "ag", model="haiku")
        saved = json.loads(json.dumps(self.failover.save()))
        self.wait_minutes(10)
        revived = rrouter.Failover(self.clock, self.auto)
        revived.restore(saved)
        self.assertEqual(revived.report(True), self.failover.report(True))
        self.failover = revived
        self.wait_minutes(20)
        self.request(("ag",), model="haiku")        # a failed probe: the second wait
        self.assertEqual(self.state(), ("cl", 2, 0, 0, 60))

    def test_a_reason_with_control_characters_is_escaped(self):
        self.requests(3, "ag")
        saved = self.failover.save()
        saved["whole"]["reason"] = "\x1b[2J"
        self.failover.restore(saved)
        self.assertEqual(self.failover.report(True)["reason"], "\\x1b[2J")

    def test_foreign_content_is_refused_and_changes_nothing(self):
        self.requests(3, "ag")
        good = self.failover.save()
        before = self.failover.report(True)
        for label, change in (
                ("no object", 7), ("empty", {}), ("no models", {"whole": good["whole"]}),
                ("models a list", dict(good, models=[])),
                ("other targets", dict(good, whole=dict(good["whole"], home="x"))),
                ("swapped", dict(good, whole=dict(good["whole"], home="cl", away="ag"))),
                ("negative level", dict(good, whole=dict(good["whole"], level=-1))),
                ("long wait", dict(good, whole=dict(good["whole"], last_cooldown_s=1e9))),
                ("NaN", dict(good, whole=dict(good["whole"], retry_at=float("nan")))),
                ("infinite", dict(good, whole=dict(good["whole"], switched_at=float("inf")))),
                ("open without a wait", dict(good, whole=dict(good["whole"], retry_at=None))),
                ("a wait of 400 digits", dict(good, whole=dict(good["whole"], last_cooldown_s=10 ** 400))),
                ("open since never", dict(good, whole=dict(good["whole"], switched_at=None))),
                ("open for no reason", dict(good, whole=dict(good["whole"], reason=None))),
                ("level true", dict(good, whole=dict(good["whole"], level=True))),
                ("model of another kind", dict(good, models={"m": 1}))):
            with self.subTest(label):
                with self.assertRaises(rrouter.StateError):
                    self.failover.restore(change)
                self.assertEqual(self.failover.report(True), before)


class UsefulnessTest(unittest.TestCase):

    def test_the_order_of_two_failures(self):
        order = [400, 429, 401, 404, 503, 504]
        self.assertEqual(sorted([504, 503, 404, 401, 429, 400], key=rrouter.rank), order)
        for alike in ((400, 413, 422, 402), (401, 403), (500, 503, 529, 408)):
            self.assertEqual(len(set(map(rrouter.rank, alike))), 1, alike)

    def test_which_refusals_blame_the_request(self):
        self.assertEqual([s for s in (200, 301, 400, 401, 403, 404, 408, 413, 422, 429, 500, 529)
                          if rrouter.blames_request(s)], [400, 401, 403, 404, 413, 422])


class CrossingWalk(FailoverWalk):
    """Paths on which waits, probes and the two scopes cross."""

    def test_a_switch_ends_the_quiet_time_of_an_earlier_return(self):
        for minutes in (30, 60, 120):
            self.requests(3, "ag")
            self.wait_minutes(minutes)
            self.requests(1)                        # the probe succeeds
        self.wait_minutes(1)
        self.requests(3, "ag")
        for minutes in (240, 240, 240):
            self.assertEqual(self.state()[4], minutes)
            self.wait_minutes(minutes)
            self.requests(1, "ag")                  # the probe fails

    def test_a_failed_probe_clears_the_counts_of_the_target_that_serves(self):
        self.requests(3, "ag")
        self.requests(2, "cl")
        self.wait_minutes(30)
        self.assertEqual(self.requests(1, "ag"), ["ag", "cl"])
        self.assertEqual(self.requests(1, "cl"), ["cl", "ag"])
        self.assertEqual(self.state()[:3], ("cl", 2, 1))

    def test_a_model_alone_does_not_return_to_the_very_target_that_fails_it(self):
        for _ in range(3):
            self.request(("ag",), model="opus")
            self.request((), model="haiku")
        self.requests(3, "ag", model="haiku")       # the whole follows to cl
        for _ in range(3):
            self.request(("cl",), model="opus")
        self.assertEqual(self.request((), model="opus"), ["ag"])
        self.assertEqual(self.state("opus")[0], "ag")
        self.assertEqual(self.request((), model="haiku"), ["cl"])

    def test_the_257th_model_that_fails_is_counted_like_any_other(self):
        for number in range(258):
            for _ in range(3):
                self.request(("ag",), model="m%d" % number)
                self.request((), model="haiku")
        self.assertEqual(self.state("m257")[0], "cl")
        self.assertLessEqual(len(self.failover.report(True)["models"]), 256)


PROC = os.path.isdir("/proc/self/task")
GEMINI_SONNET = "gemini-claude-sonnet-4-5-thinking"        # what the embedded default makes of claude-sonnet-*
BODY_MAX_BYTES = 64 << 20
ODD_NAME = 'we"ird\\ n\u00e9 \ud55c\U0001f600\u001b'
DEFAULT_MAPPINGS = [{"match": "claude-sonnet-*", "rewrite": GEMINI_SONNET}]


# Proxying #####################################################################

class Exactly(Answer):
    """These very bytes; the connection stays open after them."""

    def __init__(self, data, **options):
        super().__init__(framing="none", **options)
        self.data = data

    def head(self):
        return self.data


def end_to_end(fields):
    """Return `fields` without those that belong to one hop or are rrouter's own; the name Host in its usual form."""
    return [("Host" if name.lower() == "host" else name, value) for name, value in fields
            if name.lower() not in ("connection", "content-length", "transfer-encoding")
            and not name.lower().startswith("x-rrouter-")]


def receive(response, size):
    """Return `size` bytes of the body of an http.client response; less only at its end."""
    data = b""
    while len(data) < size:
        block = response.read1(size - len(data))
        if not block:
            break
        data += block
    return data


def reset(connection):
    """Close a socket so that the other side gets a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def chat(model="claude-sonnet-5-5", **members):
    return json.dumps(dict({"model": model, "stream": True}, **members)).encode()


class ProxyTest(RouterTest):
    """What the tests of the proxy have in common."""

    @classmethod
    def tearDownClass(cls):
        assert "internal error" not in cls.rrouter.printed(), cls.rrouter.printed()

    def converse(self, data, *methods):
        """Send `data` in one piece on one connection; return an answer for each of `methods`."""
        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            connection.sendall(data)
            return [read_reply_from(reader, method) for method in methods]

    def get(self, target="/v1/models", fields=()):
        return self.rrouter.request("GET", target, None, fields)

    def assert_own_error(self, reply, *statuses):
        """One of these statuses, in Anthropic's shape, and labelled as JSON."""
        self.assertIsNotNone(reply, "closed without an answer")
        self.assertIn(reply.status, statuses)
        self.assert_error(reply, reply.status)
        self.assertIn("application/json", reply.header("content-type"))
        self.assertTrue(reply.complete)

    def assert_refused(self, data, *statuses):
        """`data` gets one error of rrouter's own, then the end of the connection; the upstream gets nothing."""
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
    def opened(self, model="claude-sonnet-5-5", target="/v1/messages"):
        """POST for a stream; yield the http.client response when its head is there."""
        connection = http.client.HTTPConnection("127.0.0.1", self.rrouter.port, timeout=WAIT_S)
        with contextlib.closing(connection):
            connection.request("POST", target, chat(model), {"Content-Type": "application/json"})
            with contextlib.closing(connection.getresponse()) as response:
                yield response


# Framing of requests ##########################################################

HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"


def post_with(fields, body=b"abc"):
    """Return a POST with these field lines (bytes), then `body`, then a request that must never be seen as one."""
    return b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\n" + fields + b"\r\n\r\n" + body + HIDDEN


def chunked(body):
    return post_with(b"Transfer-Encoding: chunked", body)


BAD_FIELDS = (
    # label, request
    ("no Host", b"GET / HTTP/1.1\r\n\r\n" + HIDDEN),
    ("the same Host twice", b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n" + HIDDEN),
    ("space before the colon", post_with(b"Content-Length : 3")),
    ("line without a colon", post_with(b"oops\r\nContent-Length: 3")),
    ("empty name", post_with(b": x\r\nContent-Length: 3")),
    ("brackets in a name", post_with(b"X[]: y\r\nContent-Length: 3")),
    ("byte beyond ASCII in a name", post_with(b"X-\xe9: y\r\nContent-Length: 3")),
    ("bare CR in a value", post_with(b"X: one\rContent-Length: 3")),
    ("NUL in a value", post_with(b"X: a\0b\r\nContent-Length: 3")),
    ("vertical tab in a value", post_with(b"X: a\x0bb\r\nContent-Length: 3")),
    ("form feed in a value", post_with(b"X: a\x0cb\r\nContent-Length: 3")),
) + tuple(("Content-Length " + repr(value[:20]), post_with(b"Content-Length: " + value)) for value in (
    b"3, 3", b"+3", b"-1", b"0x3", b"0_3", b"3 0", b"3.0", b"", b"three", b"\xb3", b"9" * 5000,
    b"3\r\nContent-Length: 0", b"3\r\ncontent-length: 3"))

BAD_CODINGS = (
    # label, request
    ("chunked with a length", post_with(b"Transfer-Encoding: chunked\r\nContent-Length: 3", b"0\r\n\r\n")),
    ("the length first", post_with(b"Content-Length: 3\r\nTransfer-Encoding: chunked", b"0\r\n\r\n")),
    ("on HTTP/1.0", chunked(b"0\r\n\r\n").replace(b"HTTP/1.1", b"HTTP/1.0", 1)),
) + tuple((repr(value), post_with(b"Transfer-Encoding: " + value, b"0\r\n\r\n")) for value in (
    b"chunked, chunked", b",chunked", b"identity", b"xchunked", b"gzip, chunked", b"chunked, identity", b"\x0bchunked",
    b"chunked\r\nTransfer-Encoding: chunked", b""))

BAD_CHUNKS = tuple((repr(size), chunked(size + b"\r\nabc\r\n0\r\n\r\n")) for size in (
    b"0x3", b"+3", b"-1", b" 3", b"zz", b"", b"0_3", b"3\n", b"1" + b"0" * 16)) + (
    # label, request
    ("data longer than its size", chunked(b"3\r\nabcd\r\n0\r\n\r\n")),
    ("no line end after the data", chunked(b"3\r\nabc0\r\n\r\n")),
    ("LF alone after the data", chunked(b"3\r\nabc\n0\r\n\r\n")),
    ("64 KB of extension", chunked(b"3;" + b"x" * 65536 + b"\r\nabc\r\n0\r\n\r\n")),
    ("300 bytes of extension", chunked(b"3;" + b"x" * 300 + b"\r\nabc\r\n0\r\n\r\n")),
    ("9 KB of trailers", chunked(b"3\r\nabc\r\n0\r\nX: " + b"x" * 9000 + b"\r\n\r\n")),
)

BAD_LINES = (
    # request line, statuses
    (b"GET /a b HTTP/1.1", (400,)), (b"GET\t/ HTTP/1.1", (400,)), (b"GET  / HTTP/1.1", (400,)),
    (b"GET / HTTP/1.1 ", (400,)), (b" GET / HTTP/1.1", (400,)), (b"GET /\0 HTTP/1.1", (400,)),
    (b"GET /\x7f HTTP/1.1", (400,)), (b"GET /\xc3\xa9 HTTP/1.1", (400,)), (b"G(T / HTTP/1.1", (400,)),
    (b"GET HTTP/1.1", (400,)), (b"GET", (400,)), (b"GET hidden HTTP/1.1", (400,)), (b"GET / http/1.1", (400,)),
    (b"GET / HTTP/1.01", (400, 505)), (b"GET / HTTP/x.y", (400, 505)), (b"GET / HTTP/2.0", (400, 505)),
    (b"PRI * HTTP/2.0", (400, 505)), (b"GET /", (400, 505)),
)


class RequestFramingTest(ProxyTest):
    """What RFC 9112 forbids is refused, the connection closed, and the upstream sees nothing of it."""

    def refuse_each(self, rows):
        for label, data, statuses in rows:
            with self.subTest(label):
                self.assert_refused(data, *statuses)
        self.assertEqual(self.get("/after").status, 200)
        self.assertEqual([received.target for received in self.upstream.received], ["/after"])

    def test_malformed_fields_are_refused(self):
        self.refuse_each((label, data, (400,)) for label, data in BAD_FIELDS)

    def test_ambiguous_transfer_codings_are_refused(self):
        self.refuse_each((label, data, (400, 501)) for label, data in BAD_CODINGS)

    def test_malformed_chunks_are_refused(self):
        self.refuse_each((label, data, (400, 413, 431)) for label, data in BAD_CHUNKS)

    def test_malformed_request_lines_are_refused(self):
        self.refuse_each((line, line + b"\r\nHost: localhost\r\n\r\n" + HIDDEN, statuses)
                         for line, statuses in BAD_LINES)

    def test_body_of_a_refused_request_is_never_parsed(self):
        length = b"Content-Length: %d" % len(HIDDEN)
        self.refuse_each((
            ("foreign Host", post_with(length, HIDDEN).replace(b"localhost", b"evil.com", 1), (403,)),
            ("foreign Origin", post_with(length + b"\r\nOrigin: https://evil.com", HIDDEN), (403,)),
            ("too large", post_with(b"Content-Length: %d" % (BODY_MAX_BYTES + 1), HIDDEN), (413,)),
            ("unknown expectation", post_with(length + b"\r\nExpect: foo", HIDDEN), (417,)),
        ))

    def test_too_much_is_refused_at_once(self):
        many = b"\r\n".join(b"X-%d: y" % number for number in range(300))
        self.refuse_each((
            ("request line of 70 KB", b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", (414, 431)),
            ("head of 70 KB", post_with(b"X: " + b"a" * 70000), (431,)),
            ("300 fields", post_with(many), (431,)),
            ("body of 64 MiB and a byte", post_with(b"Content-Length: %d" % (BODY_MAX_BYTES + 1)), (413,)),
            ("the same in a chunk", chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (BODY_MAX_BYTES + 1, bytes(BODY_MAX_BYTES + 1))),
             (413,)),
            ("length of 15 digits", post_with(b"Content-Length: " + b"9" * 15), (413,)),
        ))

    def test_much_is_accepted(self):
        for label, target, fields in (
                ("request line of 9 KB", "/" + "a" * 9000, ()),
                ("value of 30 KB", "/", (("X", "a" * 30000),)),
                ("99 fields", "/", tuple(("X-%d" % number, "y") for number in range(98)))):
            with self.subTest(label):
                self.assertEqual(self.get(target, fields).status, 200)
                self.assertEqual(self.upstream.received[-1].target, target)
                self.assertEqual(end_to_end(self.upstream.received[-1].fields)[1:], list(fields))

    def test_folded_and_bare_line_ends_never_travel_on(self):
        for label, lines in (
                ("folded by a space", b"X: one\r\n two"), ("folded by a tab", b"X: one\r\n\ttwo"),
                ("LF alone", b"X: one\nY: two"), ("folded Host", b"X: one\r\n Host: evil.com")):
            with self.subTest(label):
                self.upstream.clear()
                reply, = self.converse(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + lines + b"\r\n\r\n", "GET")
                self.assertIn(reply.status, (200, 400))
                self.assertEqual(len(self.upstream.received), int(reply.status == 200))
                for received in self.upstream.received:
                    self.assertNotRegex(received.head, rb"\r\n[ \t]|[^\r]\n")

    def test_garbage_is_closed_on_and_harms_nothing(self):
        rng = random.Random(8316)
        for label, data in (
                ("HTTP/0.9", b"GET /\r\n"), ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"),
                ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.getrandbits(4000).to_bytes(500, "big")),
                ("LF line ends", b"GET / HTTP/1.0\nHost: localhost\n\n"), ("nothing", b""), ("line ends", b"\r\n" * 9),
                ("random", rng.getrandbits(80000).to_bytes(10000, "big")),
                ("random lines", b"\r\n".join(rng.getrandbits(160).to_bytes(20, "big") for _ in range(200)))):
            with self.subTest(label):
                data = self.rrouter.exchange(data, half_close=True)
                self.assertRegex(data, rb"^(HTTP/1\.[01] [245]\d\d |$)")
        self.assertEqual(self.get().status, 200)

    def test_body_that_ends_early_never_reaches_the_upstream(self):
        for label, data in (
                ("half of its length", b"Content-Length: 6\r\n\r\nabc"),
                ("no last chunk", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"),
                ("inside a chunk", b"Transfer-Encoding: chunked\r\n\r\n9\r\nabc")):
            with self.subTest(label):
                answer = self.rrouter.exchange(b"POST / HTTP/1.1\r\nHost: localhost\r\n" + data, half_close=True)
                self.assertRegex(answer, rb"^(HTTP/1\.1 400 |$)")
                self.assertEqual(self.upstream.received, [])

    def test_chunked_body_arrives_with_its_length(self):
        body = chat(text="\ud55c" * 9)
        pieces = b"".join(b"%X;ext=\"a b\"\r\n%b\r\n" % (len(body[at:at + 11]), body[at:at + 11])
                          for at in range(0, len(body), 11))
        for label, trailer in (("no trailer", b""), ("trailers", b"X-T: 1\r\nContent-Length: 3\r\nHost: evil.com\r\n")):
            with self.subTest(label), self.rrouter.connect() as connection:
                data = (b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: Chunked\r\n\r\n" +
                        pieces + b"000\r\n" + trailer + b"\r\n")
                for at in range(len(data)):
                    connection.sendall(data[at:at + 1])
                self.assertEqual(read_reply(connection).status, 200)
                received = self.upstream.received[-1]
                self.assertEqual(received.body, body.replace(b"claude-sonnet-5-5", GEMINI_SONNET.encode()))
                self.assertEqual(received.header("content-length"), str(len(received.body)))
                self.assertIsNone(received.header("transfer-encoding"))

    def test_length_is_sent_where_there_is_a_body(self):
        for label, method, framing, length in (
                ("GET", "GET", b"", None), ("DELETE", "DELETE", b"", None), ("HEAD", "HEAD", b"", None),
                ("POST of nothing", "POST", b"Content-Length: 0\r\n\r\n", "0"),
                ("chunked nothing", "POST", b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "0"),
                ("GET with a body", "GET", b"Content-Length: 3\r\n\r\nabc", "3"),
                ("leading zeros", "PUT", b"Content-Length: 003\r\n\r\nabc", "3")):
            with self.subTest(label):
                head = b"%b / HTTP/1.1\r\nHost: localhost\r\n" % method.encode()
                reply, = self.converse(head + (framing or b"\r\n"), method)
                self.assertEqual(reply.status, 200)
                received = self.upstream.received[-1]
                lengths = [int(value) for name, value in received.fields if name.lower() == "content-length"]
                self.assertEqual(lengths, [] if length is None else [int(length)])
                self.assertIsNone(received.header("transfer-encoding"))

    def test_pipelined_requests_are_answered_in_order(self):
        gate = threading.Event()
        self.addCleanup(gate.set)
        self.upstream.default = lambda received: Answer(
            200, received.target.encode() + received.body, before=gate if received.target == "/slow" else None)
        gets = [request_bytes("GET", "/%d" % number) for number in range(4)]
        post = request_bytes("POST", "/post", HIDDEN) + request_bytes(
            "POST", "/chunked", None, (("Transfer-Encoding", "chunked"),)) + b"3\r\nabc\r\n0\r\n\r\n"
        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            connection.sendall(b"\r\n" + request_bytes("GET", "/slow") + b"".join(gets) + post + gets[0] + b"\r\n" +
                               gets[1])
            self.upstream.wait(lambda upstream: upstream.received)
            gate.set()
            bodies = [read_reply_from(reader).body for _ in range(9)]
        self.assertEqual(bodies, [b"/slow", b"/0", b"/1", b"/2", b"/3", b"/post" + HIDDEN, b"/chunkedabc",
                                  b"/0", b"/1"])

    def test_connection_stays_open_after_errors_of_the_upstream(self):
        self.upstream.play(error(404), error(529), Answer(401, framing="length"), Answer())
        replies = self.converse(request_bytes("POST", "/v1/messages", chat()) * 4, *["POST"] * 4)
        self.assertEqual([reply.status for reply in replies], [404, 529, 401, 200])


    EXPECTING = b"POST /v1/messages HTTP/1.1\r\nHost: %b\r\nExpect: 100-Continue\r\nContent-Length: %d\r\n\r\n"

    def test_continue_is_sent_once_and_before_the_body(self):
        body = chat()
        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            connection.sendall(self.EXPECTING % (b"localhost", len(body)))
            self.assertEqual(read_head(reader)[0], 100)
            connection.sendall(body)
            reply = read_reply_from(reader)
        self.assertEqual((reply.status, reply.interim), (200, []))
        self.assertEqual(self.upstream.models(), [GEMINI_SONNET])

    def test_largest_body_is_asked_for(self):
        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            connection.sendall(self.EXPECTING % (b"localhost", BODY_MAX_BYTES))
            self.assertEqual(read_head(reader)[0], 100)

    def test_body_that_will_be_refused_is_not_asked_for(self):
        self.assert_refused(self.EXPECTING % (b"localhost", BODY_MAX_BYTES + 1), 413)
        self.assert_refused(self.EXPECTING % (b"evil.com", 3), 403)

    def test_http10_client_gets_no_interim_answer(self):
        body = chat()
        self.upstream.play(Exactly(b"HTTP/1.1 103 Early Hints\r\n\r\n" + Answer(framing="length").head() + b"{}"))
        data = (self.EXPECTING % (b"localhost", len(body))).replace(b"HTTP/1.1", b"HTTP/1.0") + body
        self.assertRegex(self.rrouter.exchange(data), rb"^HTTP/1\.[01] 200 ")


    def test_http10_answer_is_not_chunked_and_ends_with_the_connection(self):
        for label, answer in (
                ("chunked", stream()), ("length", Answer(200, b"0123", framing="length")),
                ("close", Answer(200, b"0123", framing="close"))):
            with self.subTest(label):
                self.upstream.play(answer)
                data = self.rrouter.exchange(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
                head, _, body = data.partition(b"\r\n\r\n")
                self.assertRegex(head, rb"^HTTP/1\.[01] 200 OK\r\n")
                self.assertNotIn(b"transfer-encoding", head.lower())
                self.assertEqual(body, b"".join(answer.chunks))

    def test_broken_http10_answer_ends_in_a_reset(self):
        """Without chunks and length nothing else tells a break from the end."""
        self.upstream.play(stream(event("message_start"), cut=True))
        with self.rrouter.connect() as connection:
            connection.sendall(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
            with self.assertRaises(ConnectionError):
                while connection.recv(65536):
                    pass

    def test_head_like_the_last_one_is_read_like_any_other(self):
        """A connection's last head is recognised by its bytes; what only begins like it must not be."""
        def post(length, body, behind=b"\r\n"):
            return b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: %b%b\r\n%b" % (
                length, behind, body)

        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            for length, body, behind in (
                    (b"3", b"abc", b"\r\n"), (b"12", b"abcdefghijkl", b"\r\n"), (b"0", b"", b"\r\n"),
                    (b"0003", b"abc", b"\r\n"), (b"3", b"GET", b"\r\nX-More: 1\r\n"), (b"3", b"xyz", b"\r\n"),
                    (b"3", b"xyz", b" \r\n"), (b"300000", b"x" * 300000, b"\r\n"), (b"3", b"\r\n\r", b"\r\n")):
                for whole in (True, False):
                    data = post(length, body, behind)
                    for part in (data,) if whole else [data[n:n + 1] for n in range(len(data))][:200] + [data[200:]]:
                        connection.sendall(part)
                    self.assertEqual(read_reply_from(reader).status, 200)
                    self.assertEqual(self.upstream.received[-1].body, body)
                    self.assertEqual(self.upstream.received[-1].header("x-more"), "1" if b"More" in behind else None)
            count = len(self.upstream.received)
            connection.sendall(b"\r\n" + post(b"3", b"abc") + b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2)
            self.assertEqual([read_reply_from(reader).status for _ in range(3)], [200] * 3)
            self.assertEqual([(r.method, r.body) for r in self.upstream.received[count:]],
                             [("POST", b"abc"), ("GET", b""), ("GET", b"")])
        for status, length, behind in (
                (400, b"3x", b"\r\n"), (400, b"", b"\r\n"), (400, b"+3", b"\r\n"),
                (400, b"3", b"\r\nContent-Length: 0\r\n"), (400, b"3", b"\r\nTransfer-Encoding: chunked\r\n"),
                (400, b"9" * 16, b"\r\n"), (413, b"9" * 15, b"\r\n"),
                (400, b"3", b"\n"), (403, b"3", b"\r\nOrigin: https://evil.example\r\n")):
            with self.subTest(length, behind=behind):
                before = len(self.upstream.received)
                with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
                    connection.sendall(post(b"3", b"abc"))
                    self.assertEqual(read_reply_from(reader).status, 200)
                    connection.sendall(post(length, b"abc", behind))
                    self.assert_own_error(read_reply_from(reader), status)
                    self.assertEqual(reader.read(), b"")
                self.assertEqual(len(self.upstream.received), before + 1)


# What the upstream gets #######################################################

class ForwardTest(ProxyTest):
    def test_end_to_end_fields_arrive_as_they_were_sent(self):
        before = [("x-first", "1"), ("X-Repeat", "1"), ("x-EMPTY", ""), ("anthropic-foo", "bar, baz")]
        after = [field for field in CLAUDE_HEADERS if field[0] != "Connection"] + [
            ("X-repeat", "2"), ("Cookie", "a=1; b=2"), ("Cookie", "c=3"), ("X-Tab", "a\tb  c"), ("X-Quoted", '"a\\"b"'),
            ("X-Latin", "caf\xe9 \x80\xff"), ("x-claude-code-agent-id", "7"), ("Via", "1.1 other"),
            ("X-Forwarded-For", "10.0.0.1"), ("Range", "bytes=0-1"), ("If-None-Match", '"x"'), ("X-Repeat", "3")]
        body = chat()
        fields = before + [("hOST", "localhost:1")] + after + [("Content-Length", str(len(body)))]
        head = "".join("%s: %s\r\n" % field for field in fields)
        data = b"POST /v1/messages HTTP/1.1\r\n" + head.encode("latin-1") + b"\r\n" + body
        self.assertEqual(self.converse(data, "POST")[0].status, 200)
        received, = self.upstream.received
        self.assertEqual(end_to_end(received.fields), before + [("Host", self.upstream.url[7:])] + after)
        self.assertEqual([int(value) for name, value in received.fields if name.lower() == "content-length"],
                         [len(received.body)])
        self.assertEqual(received.version, "HTTP/1.1")

    def test_nothing_is_added(self):
        self.assertEqual(self.get().status, 200)
        received, = self.upstream.received
        self.assertEqual(received.head, b"GET /v1/models HTTP/1.1\r\nHost: %b\r\n\r\n" % self.upstream.url[7:].encode())

    def test_fields_of_one_hop_are_left_out(self):
        hop = (("Connection", "X-A ,close"), ("X-A", "1"), ("X-B", "1"), ("connection", "x-b"),
               ("Keep-Alive", "timeout=5"), ("Proxy-Connection", "keep-alive"), ("TE", "trailers"), ("Trailer", "X-T"),
               ("Upgrade", "h2c"), ("Proxy-Authorization", "Basic eA=="), ("Proxy-Authenticate", "Basic"))
        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            connection.sendall(request_bytes("GET", "/", None, hop + (("X-C", "1"),)) + HIDDEN)
            self.assertEqual(read_reply_from(reader).status, 200)
            self.assertEqual(reader.read(), b"", "asked to close, and did not")
        received, = self.upstream.received
        self.assertEqual(end_to_end(received.fields)[1:], [("X-C", "1")])
        self.assertIsNone(received.header("connection"))

    def test_connection_field_cannot_take_the_framing_away(self):
        fields = (("Connection", "Host, Content-Length, Content-Type"), ("Content-Type", "text/plain"))
        self.assertEqual(self.rrouter.request("POST", "/", HIDDEN, fields).status, 200)
        received, = self.upstream.received
        self.assertEqual((received.header("host"), received.body), (self.upstream.url[7:], HIDDEN))
        self.assertIsNone(received.header("content-type"))

    def test_target_and_method_arrive_as_they_were_sent(self):
        local = "http://localhost:%d" % self.rrouter.port
        for method, target, expected in (
                ("GET", "//a/../b?x=%zz;y", None), ("GET", "/%2e%2e/./%00?", None), ("GET", "/a?b?c=/d//e", None),
                ("POST", "/v1/messages?beta=true", None), ("GET", "/x?a[]=1&b={c}|d^e`\"<>\\", None),
                ("GET", local + "/x?y=1", "/x?y=1"), ("GET", local + "//x", "//x"), ("GET", local, "/"),
                ("GET", "HTTP://LOCALHOST/Y", "/Y"), ("OPTIONS", "/v1/messages", None), ("PROPFIND", "/", None),
                ("PATCH", "/", None), ("purge", "/", None), ("M-SEARCH", "/", None), ("HEAD", "/api/hello", None),
                ("DELETE", "/v1/x", None), ("POST", "/health", None), ("GET", "/healthz", None),
                ("GET", "/health/", None)):
            with self.subTest(method + " " + target):
                reply, = self.converse(request_bytes(method, target, None, (), self.rrouter.port), method)
                self.assertEqual(reply.status, 200)
                self.assertEqual(self.upstream.received[-1][:2], (method, expected or target))

    def test_methods_for_proxies_are_forwarded_or_refused(self):
        for method, target in (("CONNECT", "localhost:443"), ("TRACE", "/"), ("OPTIONS", "*")):
            with self.subTest(method):
                self.upstream.clear()
                data = request_bytes(method, target, None, (("Authorization", "canary"), ("Connection", "close")))
                answer = self.rrouter.exchange(data)
                self.assertRegex(answer, rb"^HTTP/1\.1 (200|400|403|405|501) ")
                self.assertNotIn(b"canary", answer)
                self.assertEqual([r[:2] for r in self.upstream.received],
                                 [(method, target)] if answer.startswith(b"HTTP/1.1 200") else [])

    def test_replies_about_a_model_say_where_they_come_from(self):
        names = ("x-rrouter-target", "x-rrouter-model", "x-rrouter-attempts")
        for mode, path, body, expected in (
                ("antigravity", "/v1/messages", chat(), ("antigravity", GEMINI_SONNET, "1")),
                ("antigravity", "/v1/messages/count_tokens?beta=true", chat(), ("antigravity", GEMINI_SONNET, "1")),
                ("antigravity", "/v1/messages", chat("gpt-4"), ("antigravity", "gpt-4", "1")),
                ("claude", "/v1/messages", chat(), ("claude", "claude-sonnet-5-5", "1")),
                ("antigravity", "/v1/messages", b"[]", (None,) * 3), ("claude", "/v1/messages", b"", (None,) * 3)):
            for answer in (Answer(), error(503), stream()):
                with self.subTest("%s %s %s" % (mode, body, answer.status)):
                    self.rrouter.home.write("mode", mode)
                    self.upstream.play(answer)
                    reply = self.rrouter.request("POST", path, body)
                    self.assertEqual(reply.status, answer.status)
                    self.assertEqual(tuple(reply.header(name) for name in names), expected)
                    self.assertEqual(self.upstream.received[-1].target, path)

    def test_model_from_outside_cannot_break_the_reply_head(self):
        self.rrouter.home.write("mode", "claude")
        name = 'claude-sonnet\r\nX-Injected: 1\r\n\r\n\u001b[31m \ud55c\ud83d "\\'
        reply = self.rrouter.post(name)
        self.assertEqual((reply.status, reply.header("x-injected"), reply.body), (200, None, b"{}"))
        self.assertRegex(reply.header("x-rrouter-model"), r"\A[ -~]+\Z")
        self.assertEqual(self.upstream.received[-1].model, name)

    def test_failure_is_passed_on_and_not_rescued(self):
        answer = error(529, "overloaded", "overloaded_error", (("Retry-After", "7"), ("x-should-retry", "false")))
        self.upstream.default = answer
        reply = self.rrouter.post()
        self.assertEqual((reply.status, reply.reason, reply.body), (529, "Scripted", answer.chunks[0]))
        self.assertEqual(end_to_end(reply.fields), answer.fields)
        self.assertEqual(self.upstream.models(), [GEMINI_SONNET])


# The model in the body ########################################################

# Bodies with the value of the model left open, and everything else as hard as it comes.
SPLICED = (
    # label, body with %s for the model
    ("first", '{"model":%s,"messages":[]}'),
    ("middle", '{"max_tokens":1,"model":%s,"messages":[]}'),
    ("last", '{"messages":[{"role":"user","content":"hi"}],"model":%s}'),
    ("alone", '{"model":%s}'),
    ("white space", ' \n{\t"a" :\r\n [ 1 , 2 ] , "model"\t:\n %s \r\n, "b" : { } }\n\n'),
    ("white space, first", '\r\n{ \t"model" \n:\r %s ,"a":1 } '),
    ("numbers", '{"a":[1e400,9007199254740993,-0,1E-7,1.0,0.1e+5],"model":%s,"b":123456789012345678901234567890}'),
    ("escapes", '{"a":"\\ud83d \\u0000 \\/ \\" \\\\","\\ud83d\\"":"}","model":%s,"b":"\\u2028\\udc00"}'),
    ("raw UTF-8", '{"\ud55c\uad6d":"\u2028\U0001f600 caf\u00e9","model":%s,"a":"\uffff"}'),
    ("nested before", '{"tools":[{"model":"claude-sonnet-9"},{"input":{"model":"claude-sonnet-8"}}],"model":%s}'),
    ("nested after", '{"model":%s,"tools":[{"model":"claude-sonnet-9"}],"x":{"model":"claude-sonnet-8"}}'),
    ("inside strings", '{"a":"\\"model\\":\\"claude-sonnet-9\\"","b":"model","model":%s,"c":"{\\"model\\":1}"}'),
    ("nearly the key", '{"models":"claude-sonnet-9","Model":"claude-sonnet-8","model ":"x","":1,"model":%s}'),
    ("escaped key", '{"a":1,"\\u006dodel":%s}'),
    ("escaped key, first", '{"m\\u006fdel":%s,"a":1}'),
    ("repeated", '{"a":1,"model":%s,"model":"claude-sonnet-9","\\u006dodel":"claude-opus-1"}'),
    ("repeated, first", '{"model":%s,"model":"claude-sonnet-9"}'),
    ("repeated key elsewhere", '{"a":1,"a":2,"model":%s,"a":{"b":1,"b":2}}'),
    ("broken after it, first", '{"model":%s,"messages":[{"role":'),
    ("garbage after it, first", '{"model":%s} and more'),
)

UNTOUCHED = (
    # label, body
    ("empty", b""), ("white space", b" \n"), ("empty object", b"{}"), ("null", b"null"), ("string", b'"model"'),
    ("array", b'[{"model":"claude-sonnet-5"}]'), ("array first", b'["model","claude-sonnet-5"]'),
    ("array of pairs", b'[{"model":"claude-sonnet-5"},1]'), ("model null", b'{"model":null}'),
    ("model number", b'{"model":5}'), ("model object", b'{"model":{"model":"claude-sonnet-5"}}'),
    ("model array", b'{"a":1,"model":["claude-sonnet-5"]}'), ("model true", b'{"model":true,"a":"claude-sonnet-5"}'),
    ("only nested", b'{"a":{"model":"claude-sonnet-5"},"b":[{"model":"claude-sonnet-5"}]}'),
    ("as a value", b'{"a":"model","claude-sonnet-5":"model"}'), ("other case", b'{"Model":"claude-sonnet-5"}'),
    ("byte order mark", b'\xef\xbb\xbf{"model":"claude-sonnet-5"}'), ("form", b"model=claude-sonnet-5"),
    ("cut short", b'{"a":1,"model":"claude-sonnet-5"'), ("cut in the model", b'{"model":"claude-sonnet-5'),
    ("cut in a string", b'{"model":"claude-sonnet-5\\'), ("garbage behind", b'{"a":1,"model":"claude-sonnet-5"} x'),
    ("two objects", b'{"a":1}{"model":"claude-sonnet-5"}'), ("no quotes", b"{model:\"claude-sonnet-5\"}"),
    ("no colon", b'{"a":1,"model" "claude-sonnet-5"}'), ("colon twice", b'{"model"::"claude-sonnet-5"}'),
    ("key of another kind", b'{1:2,"model":"claude-sonnet-5"}'), ("comma first", b'{,"model":"claude-sonnet-5"}'),
    ("binary", bytes(range(256)) * 4), ("gzip", gzip.compress(b'{"model":"claude-sonnet-5"}')),
    ("UTF-16", '{"model":"claude-sonnet-5"}'.encode("utf-16")), ("lone brace", b"{"), ("brace and quote", b'{"'),
    ("no rule", b'{ "model" : "gpt-4" , "a" : 1e400 }'), ("case of the rule", b'{"model":"Claude-Sonnet-5"}'),
    ("no rule, escaped", b'{"model":"gpt\\u002d4","a":"\\ud83d"}'),
)


class SpliceTest(ProxyTest):
    config = {"modes": {"antigravity": {"mappings": DEFAULT_MAPPINGS}, "claude": {"mappings": []},
                        "odd": {"mappings": [{"match": "*", "rewrite": ODD_NAME}]}}, "defaultMode": "claude"}

    def assert_upstream_gets(self, body, expected):
        reply = self.rrouter.request("POST", "/v1/messages", body)
        self.assertEqual(reply.status, 200)
        received = self.upstream.received.pop()
        self.assertEqual(received.body, expected)
        self.assertEqual(received.header("content-length"), str(len(expected)))
        return reply

    def test_only_the_value_of_the_model_changes(self):
        rewritten = json.dumps(GEMINI_SONNET).encode()
        for label, text in SPLICED:
            for spelled in ('"claude-sonnet-5"', '"claude\\u002dsonnet-5"', '"\\u0063laude-\\u0073onnet-\\/5"'):
                if "after it" in label and "\\" in spelled:
                    continue                        # only a plain leading model ends the search
                with self.subTest("%s, %s" % (label, spelled)):
                    before, after = text.encode("utf-8").split(b"%s")
                    reply = self.assert_upstream_gets(before + spelled.encode() + after, before + rewritten + after)
                    self.assertEqual(reply.header("x-rrouter-model"), GEMINI_SONNET)

    def test_body_without_a_model_to_change_is_untouched(self):
        for label, body in UNTOUCHED:
            with self.subTest(label):
                self.assert_upstream_gets(body, body)

    def test_mode_without_rules_leaves_every_body_untouched(self):
        self.rrouter.home.write("mode", "claude\n")
        for label, text in SPLICED:
            with self.subTest(label):
                body = text.encode("utf-8").replace(b"%s", b'"claude\\u002dsonnet-5"')
                self.assert_upstream_gets(body, body)

    def test_odd_name_of_a_rule_is_written_as_json(self):
        self.rrouter.home.write("mode", "odd\n")
        for label, text in SPLICED:
            with self.subTest(label):
                before, after = text.encode("utf-8").split(b"%s")
                self.rrouter.request("POST", "/v1/messages", before + b'"x"' + after)
                body = self.upstream.received.pop().body
                self.assertTrue(body.startswith(before) and body.endswith(after))
                self.assertEqual(json.loads(body[len(before):len(body) - len(after)].decode("utf-8")), ODD_NAME)

    def test_large_body_is_changed_in_one_place(self):
        filler = b'"messages":[' + b",".join([b'{"content":"line\\n \\"model\\": \xed\x95\x9c"}'] * 200000) + b"]"
        for label, parts in (("first", (b'{"model":"', b'",' + filler + b"}")),
                             ("last", (b"{" + filler + b',"model":"', b'"}'))):
            with self.subTest(label):
                self.rrouter.request("POST", "/v1/messages", b"claude-sonnet-5".join(parts))
                received = self.upstream.received.pop().body
                self.assertTrue(received == GEMINI_SONNET.encode().join(parts))         # no diff of 8 MB

    def test_hostile_body_is_passed_on_and_stops_nobody(self):
        model = b'"model":"claude-sonnet-5"}'
        for label, body in (
                ("nested arrays", b'{"a":' + b"[" * 100000 + b"]" * 100000 + b"," + model),
                ("nested objects", b'{"a":' * 100000 + b"1" + b"}" * 100000),
                ("open arrays", b'{"a":' + b"[" * 100000),
                ("long number", b'{"a":' + b"9" * 1000000 + b"," + model),
                ("open string", b'{"a":"' + b"x" * 5000000),
                ("backslashes", b'{"a":"' + b"\\" * 1000001),
                ("white space", b'{"a":1' + b" " * 1000000 + b"," + model),
                ("many keys", b"{" + b"".join(b'"%d":0,' % number for number in range(100000)) + model)):
            with self.subTest(label):
                self.assertEqual(self.rrouter.request("POST", "/v1/messages", body).status, 200)
                received = self.upstream.received.pop().body
                self.assertTrue(received in (body, body.replace(b"claude-sonnet-5", GEMINI_SONNET.encode())))


# What the client gets #########################################################

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n"
STATUSES = (200, 201, 202, 203, 206, 226, 299, 300, 301, 302, 303, 307, 308, 400, 401, 402, 403, 404, 405, 407, 408,
            409, 413, 416, 418, 422, 426, 429, 431, 451, 499, 500, 501, 502, 503, 504, 505, 507, 529, 599)

BAD_ANSWERS = tuple((label, b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n\r\nhello") for label, fields in (
    ("two lengths", b"Content-Length: 2\r\nContent-Length: 5"), ("length +5", b"Content-Length: +5"),
    ("length -5", b"Content-Length: -5"), ("length 0_5", b"Content-Length: 0_5"),
    ("length abc", b"Content-Length: abc"), ("length and chunked", b"Content-Length: 5\r\nTransfer-Encoding: chunked"),
    ("unknown coding", b"Transfer-Encoding: zip"), ("gzip, chunked", b"Transfer-Encoding: gzip, chunked"),
    ("line without a colon", b"oops\r\nContent-Length: 5"), ("bare CR", b"X: one\rContent-Length: 5"),
    ("NUL", b"X: a\0b\r\nContent-Length: 5"), ("space before the colon", b"Content-Length : 5"),
    ("line of 1 MB", b"X: " + b"a" * 1000000 + b"\r\nContent-Length: 5"),
)) + (
    # label, answer
    ("half a status line", b"HTTP/1.1 200"), ("status line alone", b"HTTP/1.1 200 OK\r\n"),
    ("half a head", b"HTTP/1.1 200 OK\r\nContent-Type: text/ev"), ("status abc", b"HTTP/1.1 abc OK\r\n\r\n"),
    ("status 99", b"HTTP/1.1 99 OK\r\n\r\n"), ("another protocol", b"ICY 200 OK\r\n\r\n"),
    ("no head at all", b"<html>hello</html>\r\n\r\n"), ("nothing after 103", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    ("101 that nobody asked for", b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\nhello"),
)

BROKEN = (
    # label, answer, what the client may get of its body
    ("less than its length", Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + b"x" * 60), b"x" * 60),
    ("no last chunk", stream(event("ping"), event("ping"), cut=True), event("ping") * 2),
) + tuple((label, Answer(raw=CHUNKED + b"5\r\nhello\r\n" + tail), b"hello" + more) for label, tail, more in (
    ("inside a chunk", b"9\r\nworld", b"world"), ("inside a size", b"1", b""), ("after a size", b"9\r\n", b""),
    ("inside the last chunk", b"0\r\n", b""), ("size 0x5", b"0x5\r\nworld\r\n0\r\n\r\n", b""),
    ("size +5", b"+5\r\nworld\r\n0\r\n\r\n", b""), ("size of 17 digits", b"1" + b"0" * 16 + b"\r\nworld", b"world"),
    ("no line end after data", b"5\r\nworld0\r\n\r\n", b"world"), ("no size", b"\r\n", b"")))


class AnswerTest(ProxyTest):
    def test_every_status_arrives_with_reason_fields_and_body(self):
        fields = [("Content-Type", "text/x"), ("Set-Cookie", "a=1; Path=/"), ("X-Repeat", "1"), ("set-cookie", "b=2"),
                  ("x-REPEAT", "2"), ("X-Empty", ""), ("X-Latin", "caf\xe9 \x80\xff"), ("Location", "http://evil.com/"),
                  ("WWW-Authenticate", "Basic realm=x"), ("Retry-After", "3"), ("x-should-retry", "true"),
                  ("anthropic-ratelimit-unified-status", "allowed"), ("Via", "1.1 other"), ("Vary", "Origin")]
        for status in STATUSES:
            for framing in ("chunked", "length"):
                with self.subTest("%d %s" % (status, framing)):
                    body = b"body of %d \0\xff\r\n\r\n" % status
                    reason = "It Is\t%d" % status
                    self.upstream.play(Answer(status, body, fields=fields, reason=reason, framing=framing))
                    reply = self.rrouter.post()
                    self.assertEqual((reply.status, reply.reason, reply.body), (status, reason, body))
                    self.assertEqual(end_to_end(reply.fields), fields)
                    self.assertTrue(reply.complete)
                    if framing == "length":
                        self.assertEqual(reply.header("content-length"), str(len(body)))
        self.assertEqual(len(self.upstream.received), 2 * len(STATUSES))

    def test_compressed_body_stays_compressed(self):
        packed = gzip.compress(b"hello" * 100)
        self.upstream.play(Answer(200, packed, fields=(("Content-Encoding", "gzip"),), framing="length"))
        reply = self.rrouter.post()
        self.assertEqual((reply.body, reply.header("content-encoding")), (packed, "gzip"))

    def test_fields_of_one_hop_and_of_browsers_are_left_out(self):
        for fields in (
                (("Connection", "X-Secret, close"), ("X-Secret", "1")), (("Keep-Alive", "timeout=5"),),
                (("Upgrade", "h2c"),), (("Proxy-Authenticate", "Basic"),), (("Trailer", "X-T"),),
                (("Proxy-Connection", "close"),),
                (("Access-Control-Allow-Origin", "*"), ("access-control-allow-headers", "*"),
                 ("Access-Control-Allow-Credentials", "true"), ("ACCESS-CONTROL-EXPOSE-HEADERS", "x"))):
            with self.subTest(fields):
                self.upstream.play(Answer(fields=fields + (("X-Kept", "1"),)))
                self.assertEqual(end_to_end(self.rrouter.post().fields), [("X-Kept", "1")])

    def test_field_in_several_lines(self):
        """All lines of it go on, but for what Connection names in any of them; two ends of a body are an error."""
        self.upstream.play(
            Answer(fields=(("Connection", "X-One"), ("X-One", "1"), ("Connection", "x-two ,close"), ("X-Two", "2"),
                           ("Retry-After", "7"), ("X-Kept", "1"), ("Retry-After", "9"))),
            *(Answer(raw=b"HTTP/1.1 200 OK\r\n%b\r\n{}" % (lines * 2)) for lines in (
                b"Content-Length: 2\r\n", b"Transfer-Encoding: chunked\r\n")))
        self.assertEqual(end_to_end(self.rrouter.post().fields),
                         [("Retry-After", "7"), ("X-Kept", "1"), ("Retry-After", "9")])
        for _ in range(2):
            self.assert_error(self.rrouter.post(), 502)

    def test_chunks_in_odd_pieces_arrive_whole(self):
        text = b"hello0123456789"
        for label, pieces in (
                ("byte by byte", tuple(bytes([byte]) for byte in (
                    CHUNKED + b"5\r\nhello\r\n00A;x=\"y z\"\r\n0123456789\r\n0\r\n\r\n"))),
                ("chunks of a byte", (CHUNKED, *(b"1\r\n%c\r\n" % byte for byte in text), b"0\r\n\r\n")),
                ("with trailers", CHUNKED + b"f\r\n" + text + b"\r\n0\r\nX-T: 1\r\nContent-Length: 3\r\n\r\n"),
                ("cut at line ends", (CHUNKED[:-2], b"\r\nF\r", b"\n" + text + b"\r", b"\n0\r", b"\n\r", b"\n"))):
            with self.subTest(label):
                self.upstream.play(Answer(raw=pieces))
                reply = self.rrouter.post()
                self.assertEqual((reply.status, reply.body, reply.complete), (200, text, True))

    def test_answer_that_ends_with_its_connection_is_reframed(self):
        for label, answer in (
                ("close-delimited", Answer(200, (b"hel", b"lo"), framing="close")),
                ("HTTP/1.0", Answer(raw=b"HTTP/1.0 200 OK\r\n\r\nhello")),
                ("HTTP/1.0 with length", Answer(raw=b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello")),
                ("no reason", Answer(raw=b"HTTP/1.1 200 \r\nConnection: close\r\n\r\nhello"))):
            with self.subTest(label):
                self.upstream.play(answer, Answer(200, b"next"))
                replies = self.converse(request_bytes("POST", "/", chat()) * 2, "POST", "POST")
                self.assertEqual([reply.body for reply in replies], [b"hello", b"next"])
                self.assertTrue(replies[0].complete and (replies[0].header("content-length") or
                                                         replies[0].header("transfer-encoding")))

    def test_answers_without_a_body_leave_the_connection_in_step(self):
        no_content, not_modified = b"HTTP/1.1 204 No Content\r\n", b"HTTP/1.1 304 Not Modified\r\n"
        for label, method, answer, length in (
                ("HEAD with length", "HEAD", Answer(200, b"12345", framing="length"), "5"),
                ("HEAD chunked", "HEAD", Answer(), None), ("HEAD 404", "HEAD", error(404), None),
                ("HEAD to the end", "HEAD", Answer(framing="close"), None),
                ("204", "GET", Answer(204, (), framing="none"), None),
                ("204 with length", "GET", Exactly(no_content + b"Content-Length: 5\r\n\r\n"), None),
                ("304", "GET", Answer(304, (), framing="none"), None),
                ("304 with length", "GET", Exactly(not_modified + b"Content-Length: 5\r\n\r\n"), None),
                ("304 chunked", "GET", Exactly(not_modified + b"Transfer-Encoding: chunked\r\n\r\n"), None),
                ("empty", "GET", Answer(200, (), framing="length"), "0"),
                ("empty chunked", "GET", Answer(200, ()), None)):
            with self.subTest(label):
                self.upstream.play(answer, Answer(200, b"next"))
                replies = self.converse(request_bytes(method, "/") + request_bytes("GET", "/"), method, "GET")
                self.assertEqual([reply.body for reply in replies], [b"", b"next"])
                if length:
                    self.assertEqual(replies[0].header("content-length"), length)

    def test_connection_field_cannot_take_the_framing_away(self):
        self.upstream.play(Exactly(b"HTTP/1.1 200 OK\r\nConnection: Content-Length\r\nContent-Length: 5\r\n\r\nhello"))
        replies = self.converse(request_bytes("POST", "/", chat()) * 2, "POST", "POST")
        self.assertEqual([reply.body for reply in replies], [b"hello", b"{}"])

    def test_interim_answers_do_not_shift_the_final_ones(self):
        final = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfinal"
        for label, interim in (
                ("100", b"HTTP/1.1 100 Continue\r\n\r\n"), ("102", b"HTTP/1.1 102 Processing\r\n\r\n"),
                ("103", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\nLink: </y>\r\n\r\n"),
                ("many", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 3 + b"HTTP/1.1 102 \r\nContent-Length: 9\r\n\r\n")):
            with self.subTest(label):
                self.upstream.play(Exactly(interim + final), Answer(200, b"next"))
                replies = self.converse(request_bytes("POST", "/", chat()) * 2, "POST", "POST")
                self.assertEqual([(reply.status, reply.body) for reply in replies], [(200, b"final"), (200, b"next")])
                self.assertLessEqual({head[0] for reply in replies for head in reply.interim}, {100, 102, 103})

    def test_malformed_answer_is_a_bad_gateway(self):
        for label, raw in BAD_ANSWERS:
            with self.subTest(label):
                self.upstream.clear()
                self.upstream.default = Answer(raw=raw)
                reply = self.rrouter.post()
                self.assert_own_error(reply, 502)
                self.assert_error(reply, 502, self.upstream.url)
                self.assertEqual(len(self.upstream.received), 1)

    def test_connection_dropped_before_the_head_is_a_bad_gateway(self):
        self.upstream.play(Answer(close=True))
        self.rrouter.post()                         # no connection is left in the pool
        self.upstream.default = Answer(hangup=True)
        reply = self.rrouter.post()
        self.assert_error(reply, 502, self.upstream.url)
        self.assertEqual([reply.header("x-rrouter-" + name) for name in ("target", "model", "attempts")],
                         ["antigravity", GEMINI_SONNET, "1"])
        self.assertEqual(len(self.upstream.received), 2)

    def test_broken_answer_never_looks_complete(self):
        for label, answer, body in BROKEN:
            with self.subTest(label):
                self.upstream.clear()
                self.upstream.play(answer)
                with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
                    connection.sendall(request_bytes("POST", "/v1/messages", chat()))
                    reply = read_reply_from(reader)
                    self.assertIsNotNone(reply)
                    if reply.status != 502:
                        self.assertEqual((reply.status, reply.complete), (200, False))
                        self.assertTrue(body.startswith(reply.body), reply.body)
                        with contextlib.suppress(ConnectionError):
                            self.assertEqual(reader.read(), b"")
                self.assertEqual(len(self.upstream.received), 1)
                self.assertEqual(self.rrouter.post().body, b"{}")

    def test_bytes_nobody_asked_for_reach_nobody(self):
        stray = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray"
        self.upstream.play(Exactly(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nmine" + stray), Answer(200, b"next"))
        self.assertEqual([self.rrouter.post().body for _ in range(2)], [b"mine", b"next"])
        for connection in list(self.upstream.open):         # and on the idle connections
            with contextlib.suppress(OSError):
                connection.sendall(stray)
        self.assertEqual([self.rrouter.post().body for _ in range(3)], [b"{}"] * 3)
        self.assertNotEqual(self.upstream.received[0].connection, self.upstream.received[1].connection)

    def test_connections_are_used_again(self):
        opened = self.upstream.connections
        for _ in range(20):
            self.assertEqual(self.rrouter.post().status, 200)
        self.assertLessEqual(self.upstream.connections - opened, 1)

    def test_stale_connection_is_invisible(self):
        """An upstream may close an idle connection at any time, also at the very moment of the next request."""
        seen = set()

        def once(received):
            fresh = received.connection not in seen
            seen.add(received.connection)
            return Answer() if fresh else Answer(hangup=True)

        after = Answer(framing="length", cut=True)
        for label, answer, tries, padding in (
                ("at reuse", once, 200, 0), ("after the answer", after, 200, 0),
                ("at reuse, 1 MB", once, 20, 1000000), ("after the answer, 1 MB", after, 20, 1000000)):
            with self.subTest(label):
                self.upstream.clear()
                self.upstream.default = answer
                for _ in range(tries):
                    reply = self.rrouter.post(padding="x" * padding)
                    self.assertEqual((reply.status, reply.body, reply.header("x-rrouter-attempts")), (200, b"{}", "1"))
                self.assertLessEqual(len(self.upstream.received), 2 * tries)    # sent again once, not more
                self.assertEqual(set(self.upstream.models()), {GEMINI_SONNET})

    def test_connection_of_an_unfinished_answer_is_not_used_again(self):
        gate = threading.Event()
        self.addCleanup(gate.set)
        self.upstream.play(stream(*EVENTS, gate=gate))
        with self.opened() as response:
            self.assertEqual(receive(response, len(EVENTS[0])), EVENTS[0])
        self.assertEqual(self.rrouter.post().body, b"{}")
        self.assertNotEqual(self.upstream.received[0].connection, self.upstream.received[1].connection)

    def test_segments_of_a_request_do_not_wait_for_each_other(self):
        """Without TCP_NODELAY on both sides each of these takes 40 ms."""
        body, taken = chat(), []
        head = request_bytes("POST", "/v1/messages", body)[:-len(body)]
        with self.rrouter.connect() as connection:
            for _ in range(41):
                start = time.monotonic()
                connection.sendall(head)
                connection.sendall(body)
                self.assertEqual(read_reply(connection).status, 200)
                taken.append(time.monotonic() - start)
        self.assertLess(statistics.median(taken), 0.03)


# Streams ######################################################################

EVENTS = (event("message_start", message={"id": "msg_1"}), b": a comment\n\n", event("ping"),
          b"\r\ndata: \xed\x95\x9c\r\n\r\n:\n\n", b"event: content_block_delta\ndata: {\"a\":", b"1}\n\n",
          event("error", error={"type": "overloaded_error"}), event("message_stop"))


class StreamTest(ProxyTest):
    framings = ("chunked", "close")

    def test_each_event_arrives_before_the_next_is_sent(self):
        for mode in ("antigravity", "claude"):
            for framing in self.framings:
                with self.subTest(mode + " " + framing):
                    self.rrouter.home.write("mode", mode)
                    gates = [threading.Event() for _ in EVENTS]
                    for gate in gates:
                        self.addCleanup(gate.set)
                    answer = stream(*EVENTS, framing=framing)
                    answer.chunks = GatedChunks(gates)
                    self.upstream.play(answer)
                    with self.opened() as response:
                        for gate, data in zip(gates, EVENTS):
                            gate.set()
                            self.assertEqual(receive(response, len(data)), data)
                        self.assertEqual(response.read(), b"")

    def test_head_arrives_before_any_event(self):
        gate = threading.Event()
        self.addCleanup(gate.set)
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        self.upstream.play(Answer(raw=(head, b"2\r\n:\n\r\n0\r\n\r\n"), gate=gate))
        with self.opened() as response:
            self.assertEqual((response.status, response.headers["content-type"]), (200, "text/event-stream"))
            gate.set()
            self.assertEqual(response.read(), b":\n")

    def test_break_in_the_middle_reaches_the_client_at_once(self):
        gate = threading.Event()
        self.addCleanup(gate.set)
        self.upstream.play(stream(EVENTS[0], EVENTS[1], gate=gate, cut=True))
        with self.opened() as response:
            self.assertEqual(receive(response, len(EVENTS[0])), EVENTS[0])
            gate.set()
            with self.assertRaises((http.client.IncompleteRead, ConnectionError)):
                response.read()

    def test_client_that_leaves_closes_the_upstream_request(self):
        gate = threading.Event()
        self.addCleanup(gate.set)
        for how, leave in (("closes", socket.socket.close), ("resets", reset)):
            for when, answer, requests in (
                    ("before the head", Answer(before=gate), 1), ("between events", stream(*EVENTS, gate=gate), 1),
                    ("with another request sent", Answer(before=gate), 2 if hasattr(select, "POLLRDHUP") else 1)):
                with self.subTest("%s %s" % (how, when)):
                    self.upstream.clear()
                    self.upstream.play(answer)
                    with self.rrouter.connect() as connection:
                        connection.sendall(request_bytes("POST", "/v1/messages", chat()) * requests)
                        self.upstream.wait(lambda upstream: upstream.received)
                        if when == "between events":
                            self.assertTrue(connection.recv(1))
                        leave(connection)
                    start = time.monotonic()
                    self.upstream.wait(lambda upstream: upstream.closed)
                    self.assertLess(time.monotonic() - start, 2)        # a second, and one for a busy machine
                    self.rrouter.wait_until(lambda: self.rrouter.health()["activeRequests"] == 0)
                    self.assertEqual(len(self.upstream.received), 1)

    def test_client_that_does_not_read_holds_the_upstream_back(self):
        """64 MiB do not gather in rrouter; and when the client leaves, the upstream is told."""
        sent = []
        answer = stream(framing="close")
        answer.chunks = (sent.append(1) or bytes(1 << 20) for _ in range(64))
        self.upstream.play(answer)
        with self.rrouter.connect() as connection:
            connection.sendall(request_bytes("POST", "/v1/messages", chat()))
            self.rrouter.wait_until(lambda: sent)
            quiet = -1
            while quiet != len(sent):               # until nothing has moved for a while
                quiet = len(sent)
                time.sleep(0.3)
            self.assertLess(quiet, 60)
        self.upstream.wait(lambda upstream: upstream.closed)

    def test_parallel_streams_keep_apart(self):
        count, gate = 50, threading.Event()
        self.addCleanup(gate.set)
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
                reply = read_reply(client)
                self.assertEqual(reply.body, event("start", who="m%d" % number) + event("end", who="m%d" % number))
                self.assertEqual(reply.header("x-rrouter-model"), "m%d" % number)
        self.rrouter.wait_until(lambda: self.threads() <= threads)

    def threads(self):
        """Return the number of rrouter's threads, 0 where it cannot be told."""
        return len(os.listdir("/proc/%d/task" % self.rrouter.process.pid)) if PROC else 0


class GatedChunks:
    """EVENTS as chunks, each given out when its gate is open."""

    def __init__(self, gates):
        self.gates = gates

    def __iter__(self):
        for gate, data in zip(self.gates, EVENTS):
            gate.wait(WAIT_S)
            yield data


# Other upstreams ##############################################################

class Unread(Upstream):
    """Answers 413 as soon as a head has come.  Without a gate it closes then; with one it stays, and goes on reading
    the body when the gate is open."""

    gate = None

    def _exchange(self, connection, reader, number):
        length = 0
        for line in iter(reader.readline, b"\r\n"):
            if not line:
                return False
            if line.lower().startswith(b"content-length:"):
                length = int(line.split()[1])
        answer, gate = error(413, "too long"), self.gate        # the gate before the answer, upon which it is replaced
        connection.sendall(answer.head() + answer.chunks[0])
        return bool(gate and gate.wait(WAIT_S)) and len(reader.read(length)) == length


class LateReader(Upstream):
    """Reads nothing before its gate is open."""

    gate = None

    def _exchange(self, connection, reader, number):
        self.gate.wait(WAIT_S)
        return super()._exchange(connection, reader, number)


class Limited(Running):
    """rrouter with other limits than its own, by the names of its constants."""

    def __init__(self, upstream, env=(), **limits):
        assert set(limits) <= set(vars(rrouter)), limits
        self.limits = limits
        super().__init__(upstream, env=env)

    def start(self):
        code = "import sys, rrouter; vars(rrouter).update(%r); sys.exit(rrouter.main(['serve']))" % self.limits
        self.launch("-c", code, cwd=str(HERE))


class UpstreamTest(unittest.TestCase):
    """Other upstreams than the one of the other classes; each has an rrouter of its own."""

    def serve(self, upstream, **options):
        running = Running(upstream, **options)
        self.addCleanup(running.__exit__)
        return running

    def upstream(self, kind=Upstream, **options):
        upstream = kind(**options)
        self.addCleanup(upstream.close)
        return upstream

    def test_base_path_and_name_of_the_upstream_are_used(self):
        upstream = self.upstream()
        for url, host, path in (("http://localhost:%d/api/v%%31", "localhost:%d", "/api/v%31"),
                                ("http://127.0.0.1:%d/base/", "127.0.0.1:%d", "/base")):
            with self.subTest(url):
                running = self.serve(url % upstream.port, env=dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY"),
                                                                            "http://127.0.0.1:9"))
                for target in ("/v1/messages?beta=true", "/", "//x/../y"):
                    self.assertEqual(running.request("POST", target, chat()).status, 200)
                    received = upstream.received[-1]
                    self.assertEqual((received.target, received.header("host")), (path + target, host % upstream.port))
                self.assertEqual(running.health()["upstreamURL"].rstrip("/"), (url % upstream.port).rstrip("/"))

    def test_upstream_that_is_away_is_a_bad_gateway_until_it_is_back(self):
        port = free_port()
        running = self.serve("http://127.0.0.1:%d" % port)
        for _ in range(2):
            start = time.monotonic()
            reply = running.post()
            self.assertEqual((reply.status, reply.json()["error"]["type"]), (502, "api_error"))
            self.assertRegex(reply.json()["error"]["message"], r"^rrouter: .*http://127\.0\.0\.1:%d" % port)
            self.assertEqual(reply.header("x-rrouter-attempts"), "1")
            self.assertLess(time.monotonic() - start, 5)
            self.assertEqual(running.health()["status"], "ok")
            upstream = self.upstream(port=port)
            self.assertEqual([running.post().status for _ in range(2)], [200, 200])
            upstream.close()
            upstream = self.upstream(port=port)             # a restart between two requests goes unnoticed
            self.assertEqual([running.post().status for _ in range(2)], [200, 200])
            upstream.close()

    def test_upstream_that_is_rrouter_itself_makes_no_storm(self):
        port = free_port()
        home = Home("http://localhost:%d" % port, "antigravity", port=port)
        self.addCleanup(home.remove)
        running = self.serve(None, home=home)
        reply = running.post()
        self.assertGreaterEqual(reply.status, 500)
        self.assertTrue(reply.json()["error"]["message"].startswith("rrouter: "))
        self.assertLessEqual(running.health()["requestCount"], 2)

    def test_answer_before_the_body_was_read_is_passed_on(self):
        upstream = self.upstream(Unread)
        running = self.serve(upstream)
        for stays in (False, True):
            for size in (10, 16 << 20):
                with self.subTest("%d bytes, %s" % (size, "stays" if stays else "closes")):
                    upstream.gate = gate = stays and threading.Event()
                    for padding in (size, 0):       # the second must not become the rest of the first one's body
                        reply = running.request("POST", "/v1/messages", chat(padding="x" * padding))
                        self.assertEqual((reply.status, reply.body), (413, error(413, "too long").chunks[0]))
                        if gate:
                            gate.set()

    def test_kept_connection_that_died_is_noticed(self):
        upstream = self.upstream(Upstream)
        upstream.default = Answer(framing="length")
        running = self.serve(upstream)
        for turn in range(20):
            self.assertEqual(running.post().status, 200)
            upstream.break_connections(reset=turn % 2 == 1)
        self.assertEqual(len(upstream.received), 20)


class WithoutCtypesTest(ProxyTest):
    """A Python without ctypes cannot ask the C library to save memory, and does all the rest."""

    altered = "sys.modules['ctypes'] = None"

    def test_large_answer_is_whole(self):
        content = random.Random(8316).randbytes(5 << 20) if hasattr(random.Random, "randbytes") else os.urandom(5 << 20)
        self.upstream.default = Answer(200, content, framing="length")
        self.assertEqual(self.rrouter.post().body, content)


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


@unittest.skipUnless(shutil.which("openssl"), "no openssl to make a certificate with")
class TlsUpstreamTest(StreamTest):
    """Streams and all the rest, when the upstream speaks TLS."""

    framings = ("chunked",)

    @classmethod
    def setUpClass(cls):
        folder = tempfile.mkdtemp()
        cls.addClassCleanup(shutil.rmtree, folder)
        config, key, cls.certificate = (os.path.join(folder, name) for name in ("config", "key", "certificate"))
        pathlib.Path(config).write_text(CERTIFICATE)
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-config", config,
                        "-keyout", key, "-out", cls.certificate], check=True, stderr=subprocess.DEVNULL,
                       timeout=WAIT_S * 3)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cls.certificate, key)
        cls.upstream = Upstream(tls=context)
        cls.addClassCleanup(cls.upstream.close)
        cls.rrouter = Running(cls.upstream, env={"SSL_CERT_FILE": cls.certificate})
        cls.addClassCleanup(cls.rrouter.__exit__)

    def test_connection_is_used_again(self):
        opened = self.upstream.connections
        for _ in range(10):
            self.assertEqual(self.rrouter.post().status, 200)
        self.assertLessEqual(self.upstream.connections - opened, 1)
        self.assertEqual(self.upstream.models(), [GEMINI_SONNET] * 10)

    def test_large_bodies_pass_both_ways(self):
        """On a new connection and on a used one, which has its limits from the look whether it is still alive."""
        body = chat("x", padding="x" * (16 << 20))
        self.upstream.break_connections()
        for number in range(2):
            self.upstream.play(Answer(200, [bytes(100000)] * 30, framing="length"))
            self.assertEqual(self.rrouter.request("POST", "/v1/messages", body).body, bytes(3000000))
            self.assertTrue(self.upstream.received[number].body == body)        # no diff of 16 MB

    def test_stale_connection_is_invisible(self):
        self.upstream.default = Answer(framing="length", cut=True)
        for _ in range(20):
            self.assertEqual(self.rrouter.post().status, 200)

    def test_upstream_that_reads_late_gets_the_whole_body(self):
        """What a handshake leaves to be read is no early answer."""
        upstream = LateReader(tls=self.upstream.tls)
        self.addCleanup(upstream.close)
        upstream.gate = threading.Event()
        self.addCleanup(upstream.gate.set)
        body = chat("x", padding="x" * (16 << 20))
        with Limited(upstream, {"SSL_CERT_FILE": self.certificate}, TICK_S=0.05) as running:
            threading.Timer(0.3, upstream.gate.set).start()
            self.assertEqual(running.request("POST", "/v1/messages", body).status, 200)
        self.assertTrue(upstream.received[0].body == body)      # no diff of 16 MB

    def test_certificate_nobody_vouches_for_is_a_bad_gateway(self):
        with Running(self.upstream) as distrustful:
            reply = distrustful.post()
            self.assert_error(reply, 502, self.upstream.url)
        self.assertEqual(self.upstream.received, [])


# Browsers and other strangers #################################################

HOSTS = (
    # statuses, Hosts
    ((200,), ("localhost", "LOCALHOST:8316", "Localhost:1", "127.0.0.1", "127.0.0.1:8316", "[::1]", "[::1]:8316")),
    ((403,), ("evil.com", "evil.com:8316", "127.0.0.1.nip.io", "localhost.evil.com", "127.1", "0.0.0.0", "2130706433",
              "0x7f.1", "[::]", "xlocalhost", "localhost-")),
    ((400, 403), ("localhost@evil", "evil@localhost", "[::1].evil", "::1", "[::1", "localhost:x", "localhost, evil.com",
                  "localhost evil.com", "localhost/evil.com", "")),
)

ORIGINS = (
    # status, field lines
    (200, ("Origin: http://localhost:3000", "Origin: https://127.0.0.1", "Origin: http://[::1]:8080",
           "Sec-Fetch-Site: none", "Sec-Fetch-Site: same-origin", "Sec-Fetch-Mode: cors")),
    (403, ("Origin: https://evil.com", "Origin: null", "oRIGIN: http://evil.com:8316",
           "Origin: http://localhost.evil.com", "Origin: http://127.0.0.1.nip.io", "Origin: http://localhost@evil.com",
           "Origin: chrome-extension://abcdef",
           "Origin: file://", "Origin: localhost.evil.com:80", "Origin: http://localhost\r\nOrigin: https://evil.com",
           "Sec-Fetch-Site: cross-site", "sec-fetch-site: cross-site\r\nOrigin: http://localhost")),
)


class GuardTest(ProxyTest):
    def setUp(self):
        super().setUp()
        self.upstream.default = Answer(fields=(("Access-Control-Allow-Origin", "*"), ("X-Kept", "1")))

    def check(self, head, statuses):
        """`head` without its last line end is answered 200, or refused with one of `statuses` and nothing sent on."""
        self.upstream.clear()
        data = head.encode() + b"\r\n"
        reply = self.converse(data, "GET")[0] if 200 in statuses else self.assert_refused(data, *statuses)
        self.assertIn(reply.status, statuses)
        self.assertFalse([name for name, _ in reply.fields if name.lower().startswith("access-control")])

    def test_only_loopback_hosts_are_served(self):
        for statuses, hosts in HOSTS:
            for host in hosts:
                for line in ("POST /v1/messages", "GET /health"):
                    with self.subTest("%s %s" % (line, host)):
                        self.check("%s HTTP/1.1\r\nHost: %s\r\n" % (line, host), statuses)

    def test_only_loopback_origins_are_served(self):
        for status, origins in ORIGINS:
            for fields in origins:
                for line in ("POST /v1/messages", "GET /v1/models", "OPTIONS /v1/messages", "GET /health"):
                    with self.subTest("%s %s" % (line, fields)):
                        self.check("%s HTTP/1.1\r\nHost: localhost\r\n%s\r\n" % (line, fields), (status,))

    def test_authority_of_the_target_counts_as_the_host(self):
        for target in ("http://evil.com/x", "http://localhost.evil.com/", "http://127.1/", "http://localhost@evil.com/",
                       "http://evil.com/health", "http://evil.com"):
            with self.subTest(target):
                self.check("GET %s HTTP/1.1\r\nHost: localhost\r\n" % target, (400, 403))

    def test_refused_head_request_gets_no_body(self):
        data = self.rrouter.exchange(b"HEAD / HTTP/1.1\r\nHost: evil.com\r\n\r\n")
        self.assertRegex(data, rb"(?s)\AHTTP/1\.1 403 .*\r\n\r\n\Z")

    @unittest.skipUnless(os.path.exists("/proc/net/tcp6"), "needs /proc")
    def test_only_loopback_addresses_listen(self):
        listening = set()
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            for line in pathlib.Path(table).read_text().splitlines()[1:]:
                local, state = line.split()[1], line.split()[3]
                if state == "0A" and local.endswith(":%04X" % self.rrouter.port):
                    listening.add(local.split(":")[0])
        self.assertIn("0100007F", listening)
        self.assertLessEqual(listening, {"0100007F", "00000000000000000000000001000000"})

    def test_both_loopback_addresses_answer(self):
        for family in (socket.AF_INET, socket.AF_INET6):
            with self.subTest(family):
                try:
                    connection = self.rrouter.connect(family)
                except OSError as problem:
                    if family == socket.AF_INET6 and problem.errno in (97, 99, 47, 49):     # a machine without IPv6
                        self.skipTest(str(problem))
                    raise
                with connection:
                    connection.sendall(request_bytes("GET", "/"))
                    self.assertEqual(read_reply(connection).status, 200)


# /health and the log ##########################################################

class HealthTest(ProxyTest):
    def test_fields_are_those_promised(self):
        health = self.rrouter.health()
        expected = {
            "status": "ok", "mode": "antigravity", "currentTarget": "antigravity", "defaultMode": "claude",
            "problems": [], "pid": self.rrouter.process.pid, "startedBy": "serve",
            "listenAddr": "localhost:%d" % self.rrouter.port, "upstreamURL": self.upstream.url, "activeRequests": 0}
        self.assertEqual({name: health.get(name) for name in expected}, expected)
        self.assertRegex(health["version"], r"^\d+\.\d+\.\d+$")
        self.assertTrue(0 <= health["uptimeSeconds"] < 3600 and health["requestCount"] >= 0)
        self.assertLessEqual({"active", "targets", "currentTarget", "switched", "switchCount", "failureCount",
                              "timeoutCount", "reason", "switchedAt", "retryAt", "cooldownSeconds",
                              "cooldownRemainingSeconds", "models"}, set(health["autoSwitch"]))
        self.assertEqual(health["autoSwitch"]["active"], False)

    def test_it_is_answered_here_and_nothing_else_is(self):
        for method, target, local in (("GET", "/health", True), ("HEAD", "/health", True),
                                      ("GET", "/health?x=1", True), ("POST", "/health", False),
                                      ("GET", "/health/x", False), ("GET", "/", False)):
            with self.subTest(method + " " + target):
                self.upstream.clear()
                data = request_bytes(method, target) + request_bytes("GET", "/next")
                first, second = self.converse(data, method, "GET")
                self.assertEqual((first.status, second.body), (200, b"{}"))
                self.assertEqual(len(self.upstream.received), 1 if local else 2)
                if local:
                    self.assertIn("application/json", first.header("content-type"))
                    self.assertGreater(int(first.header("content-length")), 100)

    def test_only_proxied_requests_are_counted(self):
        before = self.rrouter.health()["requestCount"]
        self.upstream.play(Answer(), error(500), Answer(hangup=True), Answer(hangup=True))
        self.rrouter.post()
        self.rrouter.post()
        self.rrouter.request("POST", "/v1/messages", b"[]")
        self.upstream.clear()
        self.get("/health")
        self.get("/", (("Origin", "null"),))
        self.converse(b"GET / HTTP/1.1\r\nHost: evil.com\r\n\r\n", "GET")
        self.converse(b"GET / HTTP/1.1\r\n\r\n", "GET")
        self.assertEqual(self.rrouter.health()["requestCount"], before + 3)

    def test_requests_under_way_are_counted(self):
        gate = threading.Event()
        self.addCleanup(gate.set)
        self.upstream.play(Answer(before=gate))
        with self.rrouter.connect() as connection:
            connection.sendall(request_bytes("POST", "/", b"[]"))
            self.upstream.wait(lambda upstream: upstream.received)
            self.assertEqual(self.rrouter.health()["activeRequests"], 1)
            gate.set()
            self.assertEqual(read_reply(connection).status, 200)
        self.rrouter.wait_until(lambda: self.rrouter.health()["activeRequests"] == 0)

    def test_secrets_are_written_nowhere(self):
        canary = (("Authorization", "canary"), ("x-api-key", "canary"), ("Cookie", "canary"), ("X-Odd", "canary"))
        body = chat(system="canary")
        self.upstream.default = Answer(200, b"canary", fields=(("Set-Cookie", "canary"),))
        self.upstream.play(Answer(), error(500, "canary"), Answer(raw=b"HTTP/1.1 canary\r\n\r\n"))
        for _ in range(3):
            self.rrouter.request("POST", "/v1/messages?key=canary", body, canary)
        for extra in (("Host", "canary"), ("Origin", "http://canary"), ("bad name", "canary"), ("Expect", "canary"),
                      ("Transfer-Encoding", "canary")):
            reply = self.rrouter.request("POST", "/v1/messages?canary", body, canary + (extra,))
            self.assertGreaterEqual(reply.status, 400)
        self.rrouter.request("POST", "/last", body, canary)
        self.rrouter.wait_until(lambda: "/last" in self.rrouter.log())
        for place in (self.rrouter.log(), self.rrouter.printed(), json.dumps(self.rrouter.health())):
            self.assertNotIn("canary", place)
        self.assertIn("[REQ]", self.rrouter.log())


# What a web page can send besides, on a page of its own or under a name that it lets point to 127.0.0.1.
PREFLIGHT = ("Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: content-type, x-api-key\r\n"
             "Access-Control-Request-Private-Network: true\r\n")
PAGES = (
    # what, request line, fields, body
    ("a preflight", "OPTIONS /v1/messages", "Origin: https://evil.com\r\n" + PREFLIGHT, ""),
    ("a preflight of a sandboxed frame", "OPTIONS /v1/messages", "Origin: null\r\n" + PREFLIGHT, ""),
    ("a post that needs no preflight", "POST /v1/messages", "Origin: https://evil.com\r\nContent-Type: text/plain\r\n",
     '{"model":"claude-opus-5"}'),
    ("a form", "POST /v1/messages", "Origin: null\r\nContent-Type: application/x-www-form-urlencoded\r\n", "model=x"),
    ("a beacon", "POST /v1/messages",
     "Origin: http://evil.com\r\nContent-Type: text/plain\r\nSec-Fetch-Mode: no-cors\r\n",
     "GET /hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    ("an image", "GET /v1/models", "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: no-cors\r\n", ""),
    ("a link", "GET /v1/models",
     "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate\r\nSec-Fetch-User: ?1\r\n", ""),
    ("a web socket", "GET /", "Origin: https://evil.com\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
     "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", ""),
    ("a browser that says it may", "POST /v1/messages",
     "Origin: https://evil.com\r\nanthropic-dangerous-direct-browser-access: true\r\n", "{}"),
    ("a chunked post", "POST /v1/messages", "Origin: https://evil.com\r\nTransfer-Encoding: chunked\r\n",
     "2\r\n{}\r\n0\r\n\r\n"),
    ("a large post that waits", "POST /v1/messages", "Origin: https://evil.com\r\nExpect: 100-continue\r\n",
     "x" * 9999),
)
FOREIGN_NAMES = ("evil.com", "7f000001.c0a80001.rbndr.us", "localtest.me", "lvh.me", "localhost.localdomain",
                 "ip6-localhost", "127.0.0.2", "127.000.000.001", "0177.0.0.1", "[::ffff:127.0.0.1]",
                 "[0:0:0:0:0:0:0:1]", "[::1%25lo]", "localhost..", "localhost%00.evil.com",
                 "localhost%2eevil.com", "localhost:8316.evil.com", "localhost:8316@evil.com",
                 "localhost\\.evil.com", "localhost;evil.com", "*", "%6cocalhost", "localhost:99999999")
OPENING_FIELDS = ("Access-Control-Allow-Origin: *", "access-control-allow-credentials: true",
                  "ACCESS-CONTROL-ALLOW-METHODS: POST", "Access-Control-Allow-Headers: *", "Access-Control-Max-Age: 9",
                  "Access-Control-Expose-Headers: *", "Access-Control-Allow-Private-Network: true",
                  "Access-Control-Allow-Origin: https://evil.com")


class WebPageTest(ProxyTest):
    """What a web page may try to spend the user's quota, or to learn who the user is."""

    def test_requests_of_pages_are_refused_whatever_their_kind(self):
        for what, line, fields, body in PAGES:
            with self.subTest(what):
                length = "" if "Transfer-Encoding" in fields or not body else "Content-Length: %d\r\n" % len(body)
                data = "%s HTTP/1.1\r\nHost: localhost\r\n%s%s\r\n%s" % (line, fields, length, body)
                reply = self.assert_refused(data.encode(), 403)
                self.assertFalse([name for name, _ in reply.fields if name.lower().startswith("access-control")])

    def test_names_that_lead_here_are_not_enough(self):
        """A name of the page's own can be rebound to 127.0.0.1; then its requests are not even cross-site."""
        for name in FOREIGN_NAMES:
            for head in ("GET /health HTTP/1.1\r\nHost: %s\r\n", "GET http://%s/health HTTP/1.1\r\nHost: localhost\r\n",
                         "GET /v1/models HTTP/1.1\r\nHost: localhost\r\nOrigin: http://%s\r\n",
                         "POST /v1/messages HTTP/1.0\r\nHost: %s\r\nSec-Fetch-Site: same-origin\r\n"):
                with self.subTest(head % name):
                    self.assert_refused((head % name + "\r\n").encode(), 400, 403)

    def test_odd_spellings_of_this_machine_are_served(self):
        for head in ("Host: localhost.", "Host: localhost:", "Host: \tLocalHost:8316 ", "Host: 127.0.0.1.:8316",
                     "Host: localhost\r\nOrigin: HTTP://LOCALHOST:3000", "Host: localhost\r\nOrigin: https://[::1]",
                     "Host: localhost\r\nSec-Fetch-Site: same-site",
                     "Host: localhost\r\nSec-Fetch-Site: none\r\nSec-Fetch-Mode: navigate"):
            with self.subTest(head):
                data = "GET / HTTP/1.1\r\n%s\r\n\r\n" % head
                self.assertEqual(self.converse(data.encode(), "GET")[0].status, 200)

    def test_words_of_browsers_are_read_in_any_case_and_on_any_line(self):
        for fields in ("Sec-Fetch-Site: CROSS-SITE", "sec-fetch-site:cross-site",
                       "Sec-Fetch-Site: same-origin\r\nSec-Fetch-Site: cross-site", "Origin:",
                       "Origin: http://localhost https://evil.com", "Origin: http://localhost,https://evil.com",
                       "Origin: //localhost", "Origin: localhost", "Origin: ws://localhost",
                       "Origin: http://localhost/", "Origin: moz-extension://0f6c", "ORIGIN:\thttps://evil.com"):
            with self.subTest(fields):
                self.assert_refused(("GET / HTTP/1.1\r\nHost: localhost\r\n%s\r\n\r\n" % fields).encode(), 403)

    def test_no_answer_opens_rrouter_to_a_page(self):
        """Not even one to a page of this machine, nor one without a body, an error or an interim one."""
        opening = "\r\n".join(OPENING_FIELDS)
        answers = (
            ("GET", "HTTP/1.1 200 OK\r\n%s\r\nContent-Length: 2\r\n\r\n{}"),
            ("OPTIONS", "HTTP/1.1 204 No Content\r\n%s\r\n\r\n"),
            ("HEAD", "HTTP/1.1 200 OK\r\n%s\r\nContent-Length: 2\r\n\r\n"),
            ("POST", "HTTP/1.1 403 No\r\nX: y\r\n%s\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
            ("POST", "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n%s\r\n\r\ndata: x\n\n"),
            ("GET", "HTTP/1.1 103 Early Hints\r\n%s\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
            ("GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n%s\r\n\r\n"))
        for method, answer in answers:
            with self.subTest(answer):
                self.upstream.play(Answer(raw=(answer % opening).encode()))
                data = self.rrouter.exchange(("%s / HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost:3000\r\n"
                                              "Connection: close\r\n\r\n" % method).encode())
                self.assertRegex(data, b"(?s)\\AHTTP/1\\.1 .*\r\n\r\n")
                self.assertNotIn(b"access-control", data.lower())

    def test_health_tells_neither_user_nor_requests(self):
        """Problems of every file included."""
        home, canary = self.rrouter.home, "cAnArY"
        self.upstream.play(error(500, canary), Answer())
        self.rrouter.post(target="/v1/%s?%s" % (canary, canary), system=canary, fields=(("X-Api-Key", canary),))
        home.write("config.json", "{")
        home.write("mode", "nosuch\n")
        logs = home.dir / "logs"
        logs.rename(home.dir / "kept")
        logs.write_text("")                 # a file in the place of the directory
        try:
            self.rrouter.wait_until(lambda: len(self.rrouter.health()["problems"]) == 3)
            text = json.dumps(self.rrouter.health())
        finally:
            logs.unlink()
            (home.dir / "kept").rename(logs)
            (home.dir / "config.json").unlink()
            home.write("mode", self.mode + "\n")
        for secret in (canary, str(home.root), os.path.expanduser("~"), ".rrouter", "sk-test"):
            self.assertNotIn(secret, text)
        self.rrouter.wait_until(lambda: not self.rrouter.health()["problems"])


SECRET_FIELDS = ("Authorization", "X-Api-Key", "Cookie", "Proxy-Authorization", "anthropic-beta", "User-Agent",
                 "Referer", "X-Claude-Code-Session-Id", "X-Anything")


class SecretsTest(unittest.TestCase):
    """No header value, query or body is written anywhere, whatever becomes of the request.

    Each kind of place has a word of its own, so that a failure tells where it came from.
    """

    def setUp(self):
        self.upstream = Upstream()
        self.addCleanup(self.upstream.close)
        self.words = {place: "sk-%s-%08x" % (place, random.getrandbits(32)) for place in (
            "header", "query", "body", "answerfield", "answerbody", "reason", "chunk", "userinfo", "environment")}

    def fields(self):
        return [(name, "Bearer " + self.words["header"]) for name in SECRET_FIELDS]

    def request(self, router, *answers, **members):
        """Make one request full of secrets, answered with `answers`; return the reply."""
        self.upstream.clear()
        self.upstream.play(*answers)
        body = json.dumps(dict({"model": "claude-sonnet-5-5", "stream": True, "system": self.words["body"]}, **members))
        return router.request("POST", "/v1/messages?key=" + self.words["query"], body.encode(), self.fields())

    def assert_silent(self, *texts, files=None):
        """None of the words is in these texts, nor in any file under the directory `files`."""
        texts = [("output", text) for text in texts] + [
            (str(path), path.read_text(errors="replace")) for path in files.rglob("*") if path.is_file()]
        for where, text in texts:
            for place, word in self.words.items():
                self.assertNotIn(word, text, "%s: %s" % (where, place))

    def answers(self):
        """Return scripts of answers full of secrets, for one request each."""
        words, field = self.words, ("Set-Cookie", self.words["answerfield"])
        told = [("Retry-After", words["answerfield"]), ("Content-Type", words["answerfield"]), field]
        chunk = event("content_block_delta", delta={"text": words["chunk"]})
        broken = [("HTTP/1.1 %s\r\n\r\n" % words["reason"]), "%s\r\n\r\n" % words["reason"],
                  "HTTP/1.1 200 %s\r\n%s\r\n\r\n" % (words["reason"], words["answerfield"]),
                  "HTTP/1.1 200 OK\r\nX: a\rb %s\r\n\r\n" % words["answerfield"],
                  "HTTP/1.1 200 OK\r\nContent-Length: %s\r\n\r\n" % words["answerfield"],
                  "HTTP/1.1 200 OK\r\nTransfer-Encoding: %s\r\n\r\n" % words["answerfield"],
                  "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%s\r\n" % words["chunk"],
                  "HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n%s" % words["chunk"]]
        return [
            (Answer(200, words["answerbody"].encode(), fields=told, reason=words["reason"]),),
            (error(500, words["answerbody"], fields=told), error(429, words["answerbody"], words["answerbody"], told)),
            (error(401, words["answerbody"], fields=told), stream(chunk)),
            (error(502, "unknown provider for model " + words["answerbody"]),) * 2,
            (error(400, "Corrupted thought signature. " + words["answerbody"]), stream(chunk)),
            (error(400, "Corrupted thought signature. " + words["answerbody"]),) * 3,
            (stream(event("error", error={"type": words["chunk"], "message": words["chunk"]})), stream(chunk)),
            (stream(chunk, event("error", error={"type": words["chunk"]})),),
            (stream(chunk, cut=True),), (stream(cut=True, framing="length"),), (Answer(hangup=True),) * 2,
            *((Answer(raw=text.encode()),) * 2 for text in broken)]

    def malformed(self):
        """Return requests that are refused, full of secrets."""
        words = self.words
        start = "POST /v1/messages?key=%s HTTP/1.1\r\nHost: localhost\r\n" % words["query"]
        lines = ("Authorization %s" % words["header"], words["header"], "X-Api-Key : %s" % words["header"],
                 "Authorization: Bearer\r\n %s" % words["header"], "Cookie: %s\0" % words["header"],
                 "Content-Length: %s" % words["header"], "Content-Length: 1\r\nContent-Length: %s" % words["header"],
                 "Transfer-Encoding: %s" % words["header"], "Expect: %s" % words["header"],
                 "Host: %s" % words["header"], "Origin: http://%s" % words["header"],
                 "Sec-Fetch-Site: cross-site\r\nReferer: %s" % words["header"], "Cookie: %s" % (words["header"] * 4000),
                 "Transfer-Encoding: chunked\r\n\r\n%s" % words["body"],
                 "Transfer-Encoding: chunked\r\n\r\n3\r\n%s\r\n0\r\n\r\n" % words["body"],
                 "Content-Length: 9999\r\n\r\n%s" % words["body"],
                 "Content-Length: 999999999\r\n\r\n%s" % words["body"])
        return [start + line + "\r\n\r\n" for line in lines] + [
            "GET /x?key=%s HTTP/9.9\r\nHost: localhost\r\n\r\n" % words["query"],
            "GET /x?key=%s\r\n\r\n" % words["query"], "%s\r\n\r\n" % words["query"],
            "TRACE /x?%s HTTP/1.1\r\nHost: localhost\r\nCookie: %s\r\n\r\n" % (words["query"], words["header"]),
            "GET http://user:%s@localhost/ HTTP/1.1\r\nHost: localhost\r\n\r\n" % words["userinfo"],
            "CONNECT user:%s@localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n" % words["userinfo"],
            "GET /x?%s" % words["query"]]

    def test_nothing_is_written_however_a_request_ends(self):
        """Python's development mode tells more on stderr; the log is about to be rotated."""
        config = auto_config(failureThreshold=2)
        home = Home(self.upstream, "auto", config, env={"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "always"})
        self.addCleanup(home.remove)
        home.dir.joinpath("logs").mkdir()
        with open(home.dir / "logs" / "rrouter.log", "wb") as log:
            log.truncate(rrouter.LOG_MAX_BYTES - 2000)
        thinking = [{"role": "assistant", "content": [{"type": "thinking", "thinking": self.words["body"]}]}]
        with Running(self.upstream, home=home) as router:
            for mode in ("auto", "antigravity"):
                home.write("mode", mode + "\n")
                for answers in self.answers():
                    self.request(router, *answers, messages=thinking)
                for data in self.malformed():
                    router.exchange(data.encode("latin-1"), half_close=True)
                self.request_and_leave(router)
            self.upstream.close()
            self.assertEqual(self.request(router).status, 502)
            text = router.log() + home.read("logs/rrouter.log.1")
            for wanted in ("[AUTO]", "[HEAL]", " 502 ", " 499 ", "stream broke off", "SWITCH"):
                self.assertIn(wanted, text)
            outputs = [home.run(*command) for command in (("status",), ("status", "--json"), ("check",))]
            self.assert_silent(router.printed(), *(done.stdout + done.stderr for done in outputs), files=home.dir)
            self.assertTrue({"run.json", "rrouter.pid", "state.json"} <= {path.name for path in home.dir.iterdir()})
        self.assert_silent(files=home.dir)

    def request_and_leave(self, router):
        """Break off a request in its body, and another one in its stream."""
        self.upstream.clear()
        chunk = event("content_block_delta", delta={"text": self.words["chunk"]})
        gate = threading.Event()
        self.addCleanup(gate.set)
        self.upstream.play(stream(chunk, chunk, gate=gate))
        body = chat(system=self.words["body"])
        data = request_bytes("POST", "/v1/messages?" + self.words["query"], body, self.fields())
        with router.connect() as connection:
            connection.sendall(data[:-5])
            reset(connection)
        with router.connect() as connection:
            connection.sendall(data)
            receive_until(connection, self.words["chunk"].encode())
            reset(connection)
        router.wait_until(lambda: router.health()["activeRequests"] == 0)

    def test_a_defect_tells_where_and_never_what(self):
        """Functions of the standard library fail on the way, with the secret in the exception."""
        for what, code in (
                ("before the request is sent", "import fnmatch\nreal = fnmatch.fnmatchcase\n"
                 "def match(name, glob):\n    if name == 'crash': raise RuntimeError(sys._getframe(3).f_locals)\n"
                 "    return real(name, glob)\nfnmatch.fnmatchcase = match"),
                ("while the answer is passed on", "import socket\n"
                 "real = socket.socket.sendall\n"
                 "def sendall(sock, data, *flags):\n    if b'crash' in bytes(data): raise RuntimeError(bytes(data))\n"
                 "    return real(sock, data, *flags)\nsocket.socket.sendall = sendall")):
            with self.subTest(what), Altered(self.upstream, code, env={"PYTHONDEVMODE": "1"}) as router:
                self.upstream.clear()
                self.upstream.play(Answer(200, b'"crash %s"' % self.words["answerbody"].encode()))
                body = chat(model="crash", system=self.words["body"])
                data = request_bytes("POST", "/v1/messages?" + self.words["query"], body, self.fields())
                with router.connect() as connection:
                    connection.sendall(data)
                    reply = read_reply(connection, "POST")          # an error of ours, or nothing
                self.assertNotIn("RuntimeError", repr(reply))
                self.assert_silent(repr(reply), files=router.home.dir)
                router.wait_until(lambda router=router: "internal error: RuntimeError at " in router.log())
                self.assertNotIn("Traceback", router.printed())
                self.assertEqual(router.health()["status"], "ok")
                self.assert_silent(router.printed(), json.dumps(router.health()), files=router.home.dir)

    def test_a_password_in_the_environment_is_not_shown(self):
        home = Home()
        self.addCleanup(home.remove)
        password = self.words["environment"]
        for url in ("http://user:%s@127.0.0.1:8317", "https://%s@host/x", "user:%s@host:8317", "http:/user:%s@host"):
            env = {"RROUTER_UPSTREAM": url % password, "ANTHROPIC_API_KEY": password,
                   "HTTP_PROXY": "http://x:%s@127.0.0.1:9" % password}
            for command in ("serve", "start", "check"):
                with self.subTest(url, command=command):
                    done = home.run(command, env=env)
                    self.assertNotEqual(done.returncode, 0)
                    self.assertIn("RROUTER_UPSTREAM", done.stdout + done.stderr)
                    self.assert_silent(done.stdout, done.stderr, files=home.root)


class Altered(Running):
    """rrouter in a process whose limits or standard library were altered by `code` first."""

    def __init__(self, upstream, code, **options):
        self.code = code
        super().__init__(upstream, **options)

    def start(self):
        self.launch("-c", "import runpy, sys\n%s\nsys.argv = [%r, 'serve']\nrunpy.run_path(%r, run_name='__main__')" % (
            self.code, RROUTER, compiled()))


# Many and slow connections ####################################################

def processor_seconds(pid):
    """Return what process `pid` has used of the processor so far."""
    fields = pathlib.Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class LoadTest(ProxyTest):
    @classmethod
    def setUpClass(cls):
        if resource:                                # 520 sockets are more than macOS allows unasked
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            wanted = 2048 if hard == resource.RLIM_INFINITY else min(hard, 2048)
            if soft != resource.RLIM_INFINITY and soft < wanted:
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                cls.addClassCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        super().setUpClass()

    def test_hundred_connections_at_once_are_served(self):
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(self.rrouter.connect()) for _ in range(100)]
            for number, client in enumerate(clients):
                client.sendall(request_bytes("GET", "/%d" % number))
            self.assertEqual([read_reply(client).status for client in clients], [200] * 100)

    def test_connections_beyond_the_cap_are_refused_and_the_others_served(self):
        with contextlib.ExitStack() as stack:
            clients = []
            while len(clients) < 520:
                clients.append(stack.enter_context(self.rrouter.connect()))
                if len(clients) in (100, 200, 300, 400, 500):
                    self.rrouter.health()           # they have left the queue in front of it
            first, last = clients[0], clients[-1]
            with contextlib.suppress(ConnectionError):
                last.sendall(request_bytes("GET", "/"))
            self.assert_own_error(read_reply(last), 503)
            first.sendall(request_bytes("GET", "/"))
            self.assertEqual(read_reply(first).status, 200)
        self.rrouter.wait_until(lambda: self.get().status == 200)

    @unittest.skipUnless(PROC and hasattr(resource, "prlimit"), "needs Linux")
    def test_lack_of_descriptors_does_not_spin_and_passes(self):
        with Running(self.upstream) as poor, contextlib.ExitStack() as stack:
            resource.prlimit(poor.process.pid, resource.RLIMIT_NOFILE, (64, 64))
            for _ in range(200):
                client = stack.enter_context(socket.socket())
                client.setblocking(False)           # beyond the backlog connects are not answered
                client.connect_ex(("127.0.0.1", poor.port))
            poor.wait_until(lambda: len(os.listdir("/proc/%d/fd" % poor.process.pid)) >= 60)
            used = processor_seconds(poor.process.pid)
            time.sleep(0.4)                         # the span that is measured
            self.assertLess(processor_seconds(poor.process.pid) - used, 0.2)
            stack.close()
            self.assertEqual(poor.request("GET", "/").status, 200)

    @unittest.skipUnless(PROC, "needs /proc")
    def test_promised_bodies_take_no_memory(self):
        def resident_mb():
            return int(pathlib.Path("/proc/%d/statm" % self.rrouter.process.pid).read_text().split()[1]) * 4096 >> 20

        before = resident_mb()
        with contextlib.ExitStack() as stack:
            for _ in range(10):
                client = stack.enter_context(self.rrouter.connect())
                client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000000\r\n\r\n0123456789")
            self.assertEqual(self.get().status, 200)
            self.assertLess(resident_mb() - before, 30)

    @unittest.skipUnless(PROC, "needs /proc")
    def test_descriptors_and_threads_do_not_grow(self):
        def used():
            return [len(os.listdir("/proc/%d/%s" % (self.rrouter.process.pid, kind))) for kind in ("fd", "task")]

        self.get()
        self.rrouter.wait_until(lambda: self.rrouter.health()["activeRequests"] == 0)
        before = used()
        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            for _ in range(300):
                connection.sendall(request_bytes("POST", "/v1/messages", chat()))
                self.assertEqual(read_reply_from(reader).status, 200)
        for _ in range(50):
            self.assertEqual(self.rrouter.post().status, 200)
        self.rrouter.wait_until(lambda: used() <= [count + 2 for count in before])


class LimitsTest(ProxyTest):
    """What takes too long is ended; here with limits of a fraction of a second."""

    @classmethod
    def setUpClass(cls):
        cls.upstream = Upstream()
        cls.addClassCleanup(cls.upstream.close)
        cls.rrouter = Limited(cls.upstream, HEAD_S=0.3, BODY_STALL_S=0.2, IDLE_S=0.3, WRITE_STALL_S=0.3,
                              READ_AHEAD_S=0.2)
        cls.addClassCleanup(cls.rrouter.__exit__)

    def test_head_that_dribbles_in_is_timed_out(self):
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

    def test_idle_connection_is_closed_in_silence(self):
        for label, data, expected in (("at once", b"", b""), ("line ends", b"\r\n", b""),
                                      ("after an answer", request_bytes("GET", "/"), rb"HTTP/1\.1 200 OK\r\n")):
            with self.subTest(label):
                answer = self.rrouter.exchange(data)
                self.assertRegex(answer, expected or rb"\A\Z")
                self.assertNotIn(b"408", answer)

    def test_client_that_does_not_read_is_given_up(self):
        answer = stream(framing="close")
        answer.chunks = (bytes(1 << 20) for _ in range(64))
        self.upstream.play(answer)
        with self.rrouter.connect() as connection:
            connection.sendall(request_bytes("POST", "/v1/messages", chat()))
            self.upstream.wait(lambda upstream: upstream.closed)

    def test_refusal_whose_body_stalls_is_passed_on(self):
        """The body of a 400 is read first, for it may ask for another try."""
        gate = threading.Event()
        self.addCleanup(gate.set)
        self.upstream.play(Answer(400, (b"one", b"two"), gate=gate))
        with self.opened() as response:
            self.assertEqual((response.status, receive(response, 3)), (400, b"one"))
            gate.set()
            self.assertEqual(response.read(), b"two")


# Load and long life ###########################################################

Usage = collections.namedtuple("Usage", "threads descriptors resident_kb")
Usage.__doc__ = """What a process holds; all 0 where there is no /proc."""


def usage_of(process):
    """Return the least that a process held while nothing was asked of it for a moment."""
    if not PROC:
        return Usage(0, 0, 0)
    root, seen = "/proc/%d/" % process.pid, []
    for _ in range(5):
        status = pathlib.Path(root + "status").read_text()      # a list of task/ can lack one while another one ends
        threads, resident = (int(re.search(name + r":\s+(\d+)", status).group(1)) for name in ("Threads", "VmRSS"))
        seen.append((threads, len(os.listdir(root + "fd")), resident))
        time.sleep(0.01)
    return Usage(*map(min, zip(*seen)))


class RestTest(ProxyTest):
    """Base of the tests after which rrouter has to hold no more than before."""

    @classmethod
    def setUpClass(cls):
        if resource:                                # 500 sockets are more than macOS allows unasked
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            rrouter.raise_descriptor_limit()
            cls.addClassCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        super().setUpClass()
        cls.rrouter.process.send_signal(signal.SIGHUP)      # answered by the last thread of the start
        cls.rrouter.wait_until(lambda: "SIGHUP: files read again" in cls.rrouter.log())

    def at_rest(self):
        """Return what rrouter holds when nothing is under way and one connection is kept to the upstream."""
        self.upstream.break_connections()
        self.rrouter.wait_until(lambda: not self.upstream.open)
        self.assertEqual(self.get().status, 200)    # finds the kept ones dead and closes them
        samples = []
        for _ in range(10):                         # its thread has not ended yet, perhaps
            samples.append(usage_of(self.rrouter.process))
            time.sleep(0.005)
        return min(samples)

    def assert_nothing_gathered(self, before, resident_kb=4096):
        """Threads and descriptors are what they were `before`, and hardly more memory is in use."""
        end = time.monotonic() + WAIT_S
        while True:
            after = self.at_rest()
            if after[:2] == before[:2] and after.resident_kb <= before.resident_kb + resident_kb:
                return
            self.assertLess(time.monotonic(), end, "%s have become %s" % (before, after))

    def assert_prompt(self, seconds):
        """The times that requests took are short, all in all."""
        self.assertLess(statistics.median(seconds), 0.25, seconds)

    def timed(self, count=5):
        """Return the seconds that `count` requests took, each on a connection of its own."""
        seconds = []
        for _ in range(count):
            start = time.monotonic()
            self.assertEqual(self.rrouter.post().status, 200)
            seconds.append(time.monotonic() - start)
        return seconds


CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


@unittest.skipUnless(PROC and len(CORES) > 1, "threads are kept to one core on Linux, where there are more")
class OneCoreTest(ProxyTest):
    """While there is much to do, the threads of connections and log, and they alone, keep to one core."""

    # It takes every second for a busy one.
    altered = "import os, time, types\nos.times = lambda: types.SimpleNamespace(user=time.monotonic())"

    def test_rules(self):
        end, ids = threading.Event(), queue.SimpleQueue()
        with concurrent.futures.ThreadPoolExecutor(9) as pool:
            for _ in range(9):
                pool.submit(lambda: (ids.put(threading.get_native_id()), end.wait(WAIT_S)))
            try:
                *threads, log = [ids.get(timeout=WAIT_S) for _ in range(9)]
                here, core, now, used_s = os.sched_getaffinity(0), rrouter.OneCore(), 1000.0, 50.0
                core.look(8, threads, log, now, used_s)     # what was before is not known: it has used 5 % of its time
                for label, active, known, seconds, share, shared in (
                        ("too little to do", 8, 8, 0.2, 0.19, False), ("too few requests", 7, 8, 0.2, 1.0, False),
                        ("too few threads", 8, 7, 0.2, 1.0, False), ("enough", 8, 8, 0.2, 0.21, True),
                        ("less", 8, 8, 0.2, 0.11, True), ("too short a look", 8, 8, 0.1, 0.0, True),
                        ("more", 50, 8, 0.2, 1.1, True), ("little", 50, 8, 0.2, 0.09, False),
                        ("again", 8, 8, 0.2, 0.9, True), ("fewer requests", 7, 8, 0.2, 1.0, False)):
                    with self.subTest(label):
                        now, used_s = now + seconds, used_s + share * seconds
                        core.look(active, threads[:known], log, now, used_s)
                        places = {frozenset(os.sched_getaffinity(thread)) for thread in [*threads, log]}
                        self.assertEqual(len(places), 1, "some here, some there")
                        self.assertEqual(len(places.pop()), 1 if shared else len(here))
                        self.assertEqual(os.sched_getaffinity(0), here)
                core.look(8, [2 ** 22 + 1] * 8, None, now + 1, used_s + 1)      # threads that have ended; no log yet
            finally:
                end.set()

    def test_what_the_user_allows_is_kept_to(self):
        end, ids = threading.Event(), queue.SimpleQueue()

        def look_about():
            """Be the watcher: its own cores are changed as well."""
            first, last = min(CORES), max(CORES)
            threads = [ids.get(timeout=WAIT_S) for _ in range(8)]
            core, places = rrouter.OneCore(), []
            core.look(8, threads, None, 1000.0, 50.0)
            # cores allowed        busy
            for number, (allowed, share) in enumerate((({first}, 1), ({last}, 1), ({first}, 0), (CORES, 0)), 1):
                for thread in [threading.get_native_id(), *threads]:
                    os.sched_setaffinity(thread, allowed)
                core.look(8, threads, None, 1000.0 + number, 50.0 + share)
                places.append({frozenset(os.sched_getaffinity(thread)) for thread in threads})
                time.sleep(0.01)        # for the threads to have run where they may
            return places, [{frozenset(cores)} for cores in ({first}, {last}, {first}, CORES)]

        with concurrent.futures.ThreadPoolExecutor(9) as pool:
            for _ in range(8):
                pool.submit(lambda: (ids.put(threading.get_native_id()), [
                    time.sleep(0.001) for _ in iter(end.is_set, True)]))
            try:
                self.assertEqual(*pool.submit(look_about).result(WAIT_S))
            finally:
                end.set()

    def alone(self):
        """Return how many of the process's threads keep to one core, and how many there are."""
        tasks = pathlib.Path("/proc/%d/task" % self.rrouter.process.pid)
        places = []
        for task in tasks.iterdir():
            with contextlib.suppress(OSError):
                places.append(os.sched_getaffinity(int(task.name)))
        return sum(len(place) == 1 for place in places), len(places)

    def test_threads_come_together_and_part_again(self):
        gate = threading.Event()
        self.addCleanup(gate.set)
        self.upstream.default = stream(START, event("message_stop"), gate=gate)
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(self.rrouter.connect()) for _ in range(9)]
            for connection in streams:
                connection.sendall(request_bytes(body=b'{"model":"m"}', port=self.rrouter.port))
            self.rrouter.wait_until(lambda: self.alone()[0] == 9 + 1)      # and the log's
            self.assertGreater(self.alone()[1], 9 + 1)
            gate.set()
            for connection in streams:
                self.assertTrue(read_reply(connection).complete)
            self.rrouter.wait_until(lambda: self.alone()[0] == 0)


@unittest.skipUnless(PROC, "memory is read from /proc")
class MemoryWithoutCollectorTest(ProxyTest):
    """A request that has ended holds nothing: its body goes without the help of the garbage collector."""

    altered = "import gc\ngc.disable()"
    ANSWERS = (("whole", Answer(framing="length")), ("a stream", stream()), ("500", error(500)),
               ("cut short", Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{")),
               ("a 400 cut short", Answer(raw=b"HTTP/1.1 400 Bad\r\nContent-Length: 9\r\n\r\n{")),
               ("no HTTP", Answer(raw=b"HTP\r\n\r\n")), ("none", Answer(raw=b"")))

    def test_bodies_do_not_gather_whatever_the_answer(self):
        text = "x" * (200 << 10)
        for mode in ("claude", "auto"):
            for label, answer in self.ANSWERS:
                with self.subTest(label, mode=mode):
                    self.rrouter.home.write("mode", mode + "\n")
                    self.upstream.default = answer
                    resident_kb = []
                    for count in (10, 25):
                        for _ in range(count):
                            self.rrouter.post(messages=[{"role": "user", "content": text}])
                        resident_kb.append(usage_of(self.rrouter.process).resident_kb)
                    self.assertLess(resident_kb[1] - resident_kb[0], 25 * 200 / 2)


class CrowdOfClientsTest(RestTest):

    def test_idle_connections_slow_nobody_and_stay_usable(self):
        before = self.at_rest()
        with contextlib.ExitStack() as stack:
            idle = []
            while len(idle) < 500:
                idle.append(stack.enter_context(self.rrouter.connect()))
                if len(idle) % 100 == 0:
                    self.rrouter.health()           # they have left the queue in front of it
            for client in idle[::2]:                # every other one has had an answer before
                client.sendall(request_bytes("GET", "/first"))
                self.assertEqual(read_reply(client).status, 200)
            self.assert_prompt(self.timed(15))
            for client in idle:
                client.sendall(request_bytes("GET", "/again"))
            self.assertEqual([read_reply(client).status for client in idle], [200] * len(idle))
        self.assert_nothing_gathered(before, 24 * 1024)     # of 500 threads something sticks to the allocator

    def test_dripping_clients_slow_nobody(self):
        """In the head and in the body; they are served when they have come to an end."""
        before, seconds, body = self.at_rest(), [], chat("drip", padding="x" * 50)
        whole = request_bytes("POST", "/v1/messages", body)
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(self.rrouter.connect()) for _ in range(200)]
            begun = [number % 4 * (len(whole) - len(body)) // 3 + 20 for number in range(len(clients))]
            for client, at in zip(clients, begun):
                client.sendall(whole[:at])
            for step in range(3):
                for client, at in zip(clients, begun):
                    client.sendall(whole[at + step:at + step + 1])
                seconds += self.timed()
            self.assert_prompt(seconds)
            self.assertFalse([r for r in self.upstream.received if b"drip" in r.body])
            for client, at in zip(clients, begun):
                client.sendall(whole[at + 3:])
            self.assertEqual([read_reply(client).status for client in clients], [200] * len(clients))
            self.assertEqual([r.body for r in self.upstream.received if b"drip" in r.body], [body] * len(clients))
        self.assert_nothing_gathered(before, 16 * 1024)

    @unittest.skipUnless(SOAKING, "--soak waits until the time for a head is over")
    def test_head_that_drips_for_ever_is_ended(self):
        print("soak: 200 clients that send a byte of a head each second", file=sys.stderr)
        before, start = self.at_rest(), time.monotonic()
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(self.rrouter.connect()) for _ in range(200)]
            dripping = set(clients)
            for client in clients:
                client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Drip: ")
            while dripping:
                self.assert_prompt(self.timed())
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

    def test_hundred_connections_wait_in_the_queue_and_are_all_served(self):
        """rrouter stands still meanwhile, so that they are there at once."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.rrouter.process.send_signal, signal.SIGCONT)
            self.rrouter.process.send_signal(signal.SIGSTOP)
            clients = [stack.enter_context(self.rrouter.connect()) for _ in range(100)]
            for number, client in enumerate(clients):
                client.sendall(request_bytes("POST", "/v1/messages", chat("m%d" % number)))
            self.rrouter.process.send_signal(signal.SIGCONT)
            self.assertEqual([read_reply(client).header("x-rrouter-model") for client in clients],
                             ["m%d" % number for number in range(100)])


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
        """Return when no more has been asked for for a while."""
        quiet = -1
        while quiet != self.sent:
            quiet = self.sent
            time.sleep(0.3)


class BackPressureTest(RestTest):

    def answered_by(self, *bodies):
        """Let the upstream answer the next requests with a stream of each of these bodies."""
        for body in bodies:
            answer = stream(b"")
            answer.chunks = body
            self.upstream.play(answer)

    def resident_kb(self):
        return usage_of(self.rrouter.process).resident_kb

    def warm_up(self):
        """Pass a little of the same, for what is allocated once and kept."""
        self.answered_by(Megabytes(8))
        with self.opened() as response:
            self.assertEqual(len(response.read()), 8 << 20)
        return self.resident_kb()

    def test_client_that_stops_reading_holds_back_its_own_upstream_alone(self):
        before, stays, leaves = self.warm_up(), Megabytes(100), Megabytes(100)
        self.answered_by(stays, leaves)
        with self.opened() as response:
            with self.opened():
                stays.wait_until_blocked()
                leaves.wait_until_blocked()
                for _ in range(5):
                    self.assertEqual(self.rrouter.post().body, b"{}")
                self.assertLess(stays.sent, 60)
                self.assertLess(leaves.sent, 60)
                self.assertLess(self.resident_kb() - before, 8 * 1024)
            start = time.monotonic()
            self.upstream.wait(lambda upstream: upstream.closed)
            self.assertLess(time.monotonic() - start, 2)        # a second, and one for a busy machine
            for block in Megabytes(100):
                self.assertTrue(response.read(1 << 20) == block, "another block than %r" % block[:8])
            self.assertEqual(response.read(), b"")
        self.assertEqual(self.upstream.closed, 1)
        self.assertLess(self.resident_kb() - before, 8 * 1024)

    def test_slow_reader_takes_no_memory(self):
        before, ten = self.warm_up(), Megabytes(10)
        self.answered_by(ten)
        with self.opened() as response:
            data = b""
            for _ in range(15):                     # 10 KB a second
                data += response.read(1024)
                time.sleep(0.1)
            self.assertLess(self.resident_kb() - before, 4 * 1024)
            data += response.read()
        self.assertTrue(data == b"".join(Megabytes(10)))


class ParallelStreamsTest(RestTest):
    """50 streams at once, half of them begun in another mode; each client gets its own events and all of them."""

    STREAMS, SECONDS, PAUSE_S, SEED = 50, 60 if SOAKING else 2, 0.05, os.environ.get("RROUTER_SOAK") or 20260129

    def events(self, mark):
        """Return the events of the stream `mark`, of all sizes."""
        dice = random.Random("%s %s" % (self.SEED, mark))
        events = [event("message_start", message={"id": mark})]
        for number in range(int(self.SECONDS / self.PAUSE_S)):
            text = chr(dice.randrange(0x20, 0xd7ff)) * (20_000 if dice.random() < 0.02 else dice.randrange(200))
            events.append(event("content_block_delta", index=number, delta={"text": text}, mark=mark))
        return events + [event("message_stop", mark=mark)]

    def test_no_stream_gets_events_of_another(self):
        ended = threading.Event()
        self.addCleanup(ended.set)

        def answer(received):
            if received.method == "GET":
                return Answer()
            answer = stream(b"")
            answer.chunks = (data for data in self.events(received.model) if not ended.wait(self.PAUSE_S))
            return answer

        def client(mark):
            with self.rrouter.connect() as connection:
                connection.sendall(request_bytes("POST", "/v1/messages", chat(mark)))
                return read_reply(connection)

        if SOAKING:
            print("soak: %d streams for %d s" % (self.STREAMS, self.SECONDS), file=sys.stderr)
        self.upstream.default = answer
        before, marks = self.at_rest(), ["mark-%d" % number for number in range(self.STREAMS)]
        self.upstream.clear()
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


class WearTest(RestTest):
    """Requests of all kinds and what goes wrong with them leave nothing behind."""

    WARM_UP, REQUESTS, CLIENTS = 300, 15000 if SOAKING else 600, 6
    SEED = os.environ.get("RROUTER_SOAK") or 20260129
    config = {"modes": {"antigravity": {"mappings": DEFAULT_MAPPINGS}, "claude": {"mappings": []}},
              "auto": {"cooldownMinutes": [0.001]}}
    # What the upstream does, and the status that the client gets in every mode and whether all of the answer.
    ANSWERED = {
        "plain": (Answer(), 200, True), "stream": (stream(), 200, True), "close": (Answer(close=True), 200, True),
        "long": (Answer(200, (bytes(100_000),) * 5), 200, True), "busy": (error(429), 429, True),
        "down": (error(503), 503, True), "refused": (error(400), 400, True), "hangup": (Answer(hangup=True), 502, True),
        "garbage": (Answer(raw=b"garbage\r\n"), 502, True),
        "cut": (stream(event("message_start"), cut=True), 200, False)}
    OTHERS = ("kept", "upload", "chunked", "leaves early", "leaves late", "leaves uploading", "malformed")

    def answer(self, received):
        kind = received.target.rpartition("/")[2]
        if kind in self.ANSWERED:
            return self.ANSWERED[kind][0]
        if kind == "upload":
            return Answer(200, b"%d" % len(received.body), framing="length")
        if kind == "silent":
            return Answer(before=self.never)
        return stream(event("message_start"), event("message_stop"), gate=self.never) if kind == "pausing" else Answer()

    def act(self, number):
        """Make one request, of a kind that the seed and its number tell; raise AssertionError if it goes wrong."""
        dice = random.Random("%s %d" % (self.SEED, number))
        kind = dice.choice((*self.ANSWERED, *self.OTHERS))
        if number % 40 == 0:
            self.set_mode(dice.choice(("antigravity", "claude", "auto")), number)
        if kind in self.ANSWERED:
            reply = self.rrouter.post(target="/v1/" + kind, padding="x" * dice.randrange(2000))
            self.assertEqual((reply.status, reply.complete), self.ANSWERED[kind][1:], kind)
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
                connection.sendall(request_bytes("POST", "/v1/upload", None, (("Transfer-Encoding", "chunked"),)))
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

    def set_mode(self, mode, number):
        home = self.rrouter.home
        home.write("mode.%d" % number, mode)
        os.replace(str(home.dir / ("mode.%d" % number)), str(home.dir / "mode"))

    def test_nothing_is_left_behind(self):
        if SOAKING:
            print("soak: seed %s, %d requests and what goes wrong with them" % (self.SEED, self.REQUESTS),
                  file=sys.stderr)
        self.never = threading.Event()
        self.addCleanup(self.never.set)
        self.upstream.default = self.answer
        with concurrent.futures.ThreadPoolExecutor(self.CLIENTS) as pool:
            list(pool.map(self.act, range(self.WARM_UP)))
            before = self.at_rest()
            list(pool.map(self.act, range(self.WARM_UP, self.WARM_UP + self.REQUESTS)))
        self.assert_nothing_gathered(before)
        self.assertEqual(self.rrouter.health()["activeRequests"], 0)


class DescriptorsTest(unittest.TestCase):
    """What happens to the others when there are too few descriptors."""

    def setUp(self):
        self.upstream = Upstream()
        self.addCleanup(self.upstream.close)

    @unittest.skipUnless(PROC and hasattr(resource, "prlimit"), "needs Linux")
    def test_mode_written_while_there_are_none_is_in_force_when_there_are(self):
        """The file cannot be read then; whoever has a connection is served as before."""
        with Running(self.upstream) as poor, contextlib.ExitStack() as stack:
            kept = stack.enter_context(poor.connect())
            reader = stack.enter_context(kept.makefile("rb"))

            def ask(method, target, body=None):
                kept.sendall(request_bytes(method, target, body))
                return read_reply_from(reader)

            self.assertEqual(ask("POST", "/v1/messages", chat()).header("x-rrouter-target"), "antigravity")
            resource.prlimit(poor.process.pid, resource.RLIMIT_NOFILE, (64, 64))
            crowd = stack.enter_context(contextlib.ExitStack())
            for _ in range(100):
                client = crowd.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex(("127.0.0.1", poor.port))
            poor.wait_until(lambda: len(os.listdir("/proc/%d/fd" % poor.process.pid)) >= 64)
            poor.home.write("mode", "claude")
            poor.wait_until(lambda: "too many open files" in str(ask("GET", "/health").json()["problems"]))
            used = processor_seconds(poor.process.pid)
            time.sleep(0.5)                         # the span that is measured; the file is no longer fresh after it
            self.assertLess(processor_seconds(poor.process.pid) - used, 0.25)
            self.assertEqual(ask("POST", "/v1/messages", chat()).header("x-rrouter-target"), "antigravity")
            crowd.close()
            poor.wait_until(lambda: len(os.listdir("/proc/%d/fd" % poor.process.pid)) < 40)
            self.assertEqual(ask("POST", "/v1/messages", chat()).header("x-rrouter-target"), "claude")
            poor.wait_until(lambda: ask("GET", "/health").json()["problems"] == [])

    @unittest.skipUnless(resource, "needs limits")
    def test_few_from_the_start_are_shared_out(self):
        """The cap fits the limit: some of 200 are served, the others told or closed, and nothing breaks."""
        code = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
        with Altered(self.upstream, code) as poor:
            with contextlib.ExitStack() as stack:
                clients = []
                for _ in range(200):
                    clients.append(stack.enter_context(poor.connect()))
                    with contextlib.suppress(ConnectionError):
                        clients[-1].sendall(request_bytes("POST", "/v1/messages", chat()))
                clients_of = collections.defaultdict(list)
                for client in clients:
                    with contextlib.suppress(ConnectionError):
                        reply = read_reply(client)
                        clients_of[reply.status if reply else None].append(client)
                self.assertLessEqual(set(clients_of), {200, 503, None})
                self.assertGreaterEqual(len(clients_of[200]), 10)
                for client in clients_of[200]:      # who was served goes on being served
                    client.sendall(request_bytes("POST", "/v1/messages", chat()))
                    self.assertEqual(read_reply(client).status, 200)
            poor.wait_until(lambda: poor.post().status == 200)
            self.assertNotIn("cannot accept", poor.log())


class Pace:
    """A gate that opens after each of these gaps in turn, and after the last one no more."""

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


class LongStreamTest(ProxyTest):
    """Gaps longer than what rrouter's own waits take end no answer, and do not hide that the client leaves."""

    # With --soak two minutes, or as long as RROUTER_SOAK_STREAM_S says: an hour is 3600.
    GAPS_S = (15,) * (int(os.environ.get("RROUTER_SOAK_STREAM_S") or 120) // 15) if SOAKING else (0.7, 1.1, 0.6)
    PING = event("ping")
    config = {"modes": {"antigravity": {"mappings": []}, "claude": {"mappings": []}}, "defaultMode": "claude",
              "auto": {"firstByteTimeoutSeconds": 0.5}}

    def begin(self, mode, answer):
        """Begin a request in this mode; return the http.client response's future connection."""
        self.upstream.play(answer)
        self.rrouter.home.write("mode", mode)
        before = len(self.upstream.received)
        connection = http.client.HTTPConnection("127.0.0.1", self.rrouter.port, timeout=sum(self.GAPS_S) + WAIT_S)
        self.addCleanup(connection.close)
        connection.request("POST", "/v1/messages", chat())
        self.upstream.wait(lambda upstream: len(upstream.received) > before)
        return connection

    def test_gaps_end_nothing(self):
        if SOAKING:
            print("soak: pings alone for %d s" % sum(self.GAPS_S), file=sys.stderr)
        pings, start = [self.PING] * len(self.GAPS_S), event("message_start")
        silent = self.begin("claude", stream(before=Pace(sum(self.GAPS_S))))
        ended = self.begin("auto", stream(start, *pings, gate=Pace(*self.GAPS_S)))
        endless = self.begin("claude", stream(start, *pings, self.PING, gate=Pace(*self.GAPS_S)))
        for connection, expected in ((ended, start), (endless, start)):
            connection.response = response = connection.getresponse()
            self.addCleanup(response.close)
            self.assertEqual((response.status, receive(response, len(expected))), (200, expected))
        for ping in pings:
            for connection in (ended, endless):
                self.assertEqual(receive(connection.response, len(ping)), ping)
        self.assertEqual(ended.response.read(), b"")
        with contextlib.closing(silent.getresponse()) as response:
            self.assertEqual((response.status, response.read()), (200, b"".join(stream().chunks)))
        self.assertEqual(self.upstream.closed, 0)
        endless.response.close()
        endless.close()
        left = time.monotonic()
        self.upstream.wait(lambda upstream: upstream.closed)
        self.assertLess(time.monotonic() - left, 2)         # a second, and one for a busy machine
        self.rrouter.wait_until(lambda: self.rrouter.health()["activeRequests"] == 0)


LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}) \[[A-Z]+\] \S.*")


class SharedLogTest(unittest.TestCase):
    """Two processes of one HOME write the same log, and it is rotated under load."""

    REQUESTS, CLIENTS = 400, 8
    # Rotation takes a while on a slow disk: both processes are in it at once.
    SLOW_DISK = ("import os, time\nreplace = os.replace\n"
                 "def slow(old, new):\n    time.sleep(0.05 if '.log' in new else 0)\n    replace(old, new)\n"
                 "os.replace = slow")

    def setUp(self):
        self.upstream = Upstream()
        self.addCleanup(self.upstream.close)
        self.home = Home(self.upstream, "claude")
        self.addCleanup(self.home.remove)
        self.beside = Home(self.upstream)
        self.beside.remove()
        self.beside.root, self.beside.dir = self.home.root, self.home.dir
        self.beside.env["HOME"] = self.home.env["HOME"]
        self.logs = self.home.dir / "logs"

    def fill(self):
        """Leave an almost full log, and older ones, behind; return the content of each."""
        shutil.rmtree(str(self.logs), ignore_errors=True)
        self.logs.mkdir(mode=0o700)
        old = {"rrouter.log": b"newest".ljust(79) + b"\n", "rrouter.log.1": b"older\n", "rrouter.log.2": b"oldest\n"}
        old["rrouter.log"] *= (rrouter.LOG_MAX_BYTES - 5000) // 80
        for name, content in old.items():
            (self.logs / name).write_bytes(content)
        return old

    def assert_rotated(self, old, routers):
        """Requests to both at once all succeed, and each has its line, whole, in one of the files."""
        def ask(number):
            return routers[number % 2].request("GET", "/numbered/%d" % number, None, ()).status

        with concurrent.futures.ThreadPoolExecutor(self.CLIENTS) as pool:
            self.assertEqual(set(pool.map(ask, range(self.REQUESTS))), {200})
        for router in routers:
            router.wait_until(lambda: b"".join(path.read_bytes()[-200_000:] for path in self.logs.iterdir()).count(
                b"GET /numbered/") == self.REQUESTS)
        files = {path.name: path.read_bytes() for path in self.logs.iterdir()}
        self.assertEqual(set(files), {"rrouter.log", "rrouter.log.1", "rrouter.log.2", "rrouter.log.3"})
        self.assertEqual((files["rrouter.log.2"], files["rrouter.log.3"]),
                         (old["rrouter.log.1"], old["rrouter.log.2"]))
        self.assertTrue(files["rrouter.log.1"].startswith(old["rrouter.log"]))
        files["rrouter.log.1"] = files["rrouter.log.1"][len(old["rrouter.log"]):]
        text = (files["rrouter.log.1"] + files["rrouter.log"]).decode()
        self.assertTrue(text.endswith("\n"))
        self.assertEqual([line for line in text.splitlines() if not LOG_LINE.fullmatch(line)], [])
        numbers = [int(number) for number in re.findall(r"\[REQ\] #\d+ GET /numbered/(\d+) 200 ", text)]
        self.assertEqual(sorted(numbers), list(range(self.REQUESTS)))
        self.assertIn(b"/numbered/", files["rrouter.log"])

    def test_daemon_and_serve_lose_no_line(self):
        old = self.fill()
        self.addCleanup(self.home.run, "stop")
        self.home.run("start", check=0)
        with Running(self.upstream, home=self.beside) as beside:
            daemon = Running.__new__(Running)       # only to ask it
            daemon.port = self.home.port
            self.assert_rotated(old, (daemon, beside))

    def test_two_that_rotate_at_once_do_it_once(self):
        old = self.fill()
        with Altered(self.upstream, self.SLOW_DISK, home=self.home) as one:
            with Altered(self.upstream, self.SLOW_DISK, home=self.beside) as other:
                self.assert_rotated(old, (one, other))


def last_bytes(path, count=2000):
    """Return the end of a file."""
    with open(str(path), "rb") as file:
        file.seek(-min(count, file.seek(0, os.SEEK_END)), os.SEEK_END)
        return file.read()


class MidnightTest(unittest.TestCase):

    # Half a second before the local midnight of New Year until a file says that time goes on.
    CLOCK = ("import os, time\nreal, flag, begin = time.time, %r, %r\n"
             "def now():\n    return begin + (max(0, real() - os.stat(flag).st_mtime) if os.path.exists(flag) else 0)\n"
             "time.time = now")

    def test_log_goes_on_under_the_new_date(self):
        upstream = Upstream()
        self.addCleanup(upstream.close)
        home = Home(upstream, "claude", env={"TZ": "KST-9"})
        self.addCleanup(home.remove)
        midnight = calendar.timegm((2031, 12, 31, 15, 0, 0))
        flag = home.root / "time goes on"
        with Altered(upstream, self.CLOCK % (str(flag), midnight - 0.5), home=home) as router:
            for _ in range(20):
                self.assertEqual(router.post().status, 200)
            flag.touch()
            turned = threading.Event()

            def ask(_):
                end = time.monotonic() + WAIT_S
                while not turned.is_set() and time.monotonic() < end:
                    self.assertEqual(router.post().status, 200)

            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                asking = pool.map(ask, range(4))
                try:
                    router.wait_until(lambda: b"2032-01-01" in last_bytes(home.dir / "logs" / "rrouter.log"))
                finally:
                    turned.set()
                list(asking)
            for _ in range(20):
                self.assertEqual(router.post().status, 200)
            count = router.health()["requestCount"]
        lines = request_lines(router.log())
        stamps = [LOG_LINE.fullmatch(line).group(1) for line in lines]
        self.assertEqual(len(stamps), count)
        self.assertEqual({stamp[:10] for stamp in stamps}, {"2031-12-31", "2032-01-01"})
        self.assertEqual(stamps[:19], ["2031-12-31 23:59:59.500"] * 19)     # the 20th is written behind its answer
        self.assertEqual(stamps[-20:], sorted(stamps[-20:]))
        dates = [stamp[:10] for stamp in stamps]
        turn = dates.index("2032-01-01")
        self.assertRegex(stamps[turn], r" 00:00:0\d\.")
        self.assertEqual(dates[turn + 4:].count("2031-12-31"), 0)       # four write at a time


# Framing fuzz #################################################################

FUZZ_SEED = os.environ.get("RROUTER_FUZZ_SEED") or os.environ.get("RROUTER_SOAK") or "20260129"


def fuzz_cases(suite, soak):
    """Return how many cases to run: in the suite, or with --soak; RROUTER_FUZZ_CASES overrides both."""
    return int(os.environ.get("RROUTER_FUZZ_CASES") or (soak if SOAKING else suite))


def announce(cases, what):
    if SOAKING:
        print("soak: seed %s, %d %s" % (FUZZ_SEED, cases, what), file=sys.stderr)


class Malformed(Exception):
    """Bytes that are no HTTP/1.1 message, or one that two readers could take differently."""

    def __init__(self, what="", payload=b""):
        super().__init__(what)
        self.payload = payload


class Unfinished(Malformed):
    """Bytes that may yet become a message."""


Message = collections.namedtuple("Message", "start fields body end close framing")
Message.__doc__ = """A message by the plain reader: start line in three parts, fields, body, offset of its end."""

TOKEN = re.compile(rb"tok[Q-Z]{6}x[Q-Z]{2}kot")
LETTERS = bytes.maketrans(b"0123456789", b"QRSTUVWXYZ")     # for digits: a spoilt token is never another one
TCHAR = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
ONE_HOP = {b"connection", b"proxy-connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te",
           b"trailer", b"transfer-encoding", b"upgrade"}


def is_text(value):
    return not re.search(rb"[\0-\x08\x0a-\x1f\x7f]", value)


def plain_lines(data, at):
    """Return (lines, offset behind the blank line that ends them)."""
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
    return {token.strip(b" \t").lower() for value in values(fields, b"connection") for token in value.split(b",")}


def plain_chunks(data, at):
    """Return (payload, offset of the end)."""
    payload = b""
    while True:
        end = data.find(b"\r\n", at)
        if end < 0:
            raise Unfinished("chunks", payload)
        size, semicolon, extension = data[at:end].partition(b";")
        size = size.rstrip(b" \t") if semicolon else size
        if not size or len(size) > 15 or not set(size) <= set(b"0123456789abcdefABCDEF") or not is_text(extension):
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


def plain_message(data, at, start, fields, version, bodiless, default):
    """Return the Message whose body begins at `at`; `default`: how long it is where no field tells ("close" or 0)."""
    lengths, codings = values(fields, b"content-length"), values(fields, b"transfer-encoding")
    close = version == b"HTTP/1.0" or b"close" in nominated(fields)
    if codings and (lengths or version == b"HTTP/1.0" or [coding.lower() for coding in codings] != [b"chunked"]):
        raise Malformed("transfer coding")
    if len(lengths) > 1 or (lengths and not (set(lengths[0]) <= set(b"0123456789") and 0 < len(lengths[0]) < 16)):
        raise Malformed("length")
    if bodiless:
        return Message(start, fields, b"", at, close, "none")
    if codings:
        body, end = plain_chunks(data, at)
        return Message(start, fields, body, end, close, "chunked")
    if not lengths and default == "close":
        return Message(start, fields, data[at:], len(data), True, "close")
    length = int(lengths[0]) if lengths else 0
    if len(data) < at + length:
        raise Unfinished("body", data[at:])
    return Message(start, fields, data[at:at + length], at + length, close, "length" if lengths else "none")


def plain_request(data, at=0):
    """Return the request that begins at `at`, by the letter of RFC 9112, or raise Malformed or Unfinished."""
    while data[at:at + 2] == b"\r\n":
        at += 2
    lines, at = plain_lines(data, at)
    start = tuple(lines[0].split(b" "))
    if len(start) != 3 or not start[0] or not TCHAR.issuperset(start[0]) or not re.fullmatch(rb"HTTP/1\.\d", start[2]):
        raise Malformed("request line")
    if not start[1] or not all(32 < byte < 127 for byte in start[1]):
        raise Malformed("target")
    fields = plain_fields(lines[1:])
    if len(values(fields, b"host")) > 1 or (start[2] != b"HTTP/1.0" and not values(fields, b"host")):
        raise Malformed("host")
    return plain_message(data, at, start, fields, start[2], False, 0)


def plain_answer(data, method, at=0):
    """Return the answer to `method` that begins at `at`, interim ones left out; the data ends with its connection."""
    while True:
        lines, at = plain_lines(data, at)
        version, _, rest = (lines[0] if lines else b"").partition(b" ")
        status, _, reason = rest.partition(b" ")
        if (version not in (b"HTTP/1.1", b"HTTP/1.0") or not re.fullmatch(rb"[1-9][0-9][0-9]", status)
                or rest[3:4] not in (b"", b" ") or status == b"101"):
            raise Malformed("status line")
        fields = plain_fields(lines[1:])
        bodiless = method == b"HEAD" or status in (b"204", b"304") or status < b"200"
        message = plain_message(data, at, (version, status, reason), fields, version, bodiless, "close")
        if status >= b"200":
            return message


def sent_upstream(meant):
    """Return what of a request must arrive: method, path, fields but for Host and length, whether it has a length."""
    target = re.sub(rb"(?i)^https?://[^/?#]*", b"", meant.start[1])
    target = target if target.startswith((b"/", b"*")) else b"/" + target
    drop = (ONE_HOP | nominated(meant.fields) | {b"host"}) - {b"content-length"}
    fields = [field for field in meant.fields if field[0].lower() not in drop | {b"content-length"}]
    return meant.start[0], target, fields, meant.framing != "none"


MODEL = re.compile(rb'("model"\s*:\s*)"claude-sonnet-(?:[^"\\]|\\.)*"')


class FuzzedAnswer:
    """What the upstream answers to one attempt: its bytes, how it lets the connection end, and what that means."""

    def __init__(self, dice, data, method, clean, spoil):
        self.data, self.clean = data, clean
        self.vanish = dice.random() < 0.03      # the upstream closes without saying so
        self.early = dice.random() < 0.3        # it answers as soon as it has the head
        self.reset = not clean and dice.random() < 0.1
        if self.reset:
            self.data = data[:dice.randrange(len(data))]
        elif not clean:
            self.data = spoil(data)
        elif dice.random() < 0.2 and plain_answer(data, method).framing != "close":
            # Bytes nobody asked for, which must not answer another request.
            self.data += b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n" + b"tokZZZZZZxZZkot unasked"[:20]
        try:
            self.meant = plain_answer(self.data, method)
            self.payload, self.end = self.meant.body, self.meant.end
        except Malformed as problem:
            self.meant, self.payload, self.end = None, problem.payload, len(self.data)


class Case:
    """One request and two answers, for as many attempts, as bytes; the token is in all heads and bodies."""

    def __init__(self, dice, token, last):
        self.token, self.dice = token, dice
        self.request = self.make_request()
        self.method = self.request.split(b" ", 1)[0].strip()
        # What goes wrong ends the connection as a rule: mostly the last case does.
        self.clean_request = dice.random() < (0.4 if last else 0.98)
        self.answers = [FuzzedAnswer(dice, self.make_answer(), self.method, dice.random() < (0.5 if last else 0.9),
                                     self.spoil) for _ in range(2)]
        if not self.clean_request:
            self.request = self.spoil(self.request)

    def body(self):
        hidden = b"GET /hidden/%b HTTP/1.1\r\nHost: localhost\r\n\r\n" % self.token
        return self.dice.choice((
            b"", hidden, b"0\r\n\r\n" + hidden, self.token + b"\r\n0\r\n\r\n\0\xff\r\r\n\n" + bytes(9),
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
            b"", b"", b"X-Trailer: %b\r\n" % self.token, b"Content-Length: 3\r\nHost: evil.example\r\n")) + b"\r\n"

    def framed(self, body, fields, framing):
        """Return (fields with those of the framing, in any order, as bytes, body as it goes over the wire)."""
        if framing == "length":
            fields.append(self.dice.choice((b"Content-Length: %d", b"content-length:%d", b"CONTENT-LENGTH: \t00%d ")) %
                          len(body))
        elif framing == "chunked":
            fields.append(self.dice.choice((b"Transfer-Encoding: chunked", b"transfer-encoding:\tChunked ")))
            body = self.chunks(body)
        self.dice.shuffle(fields)
        return b"".join(field + b"\r\n" for field in fields) + b"\r\n", body

    def make_request(self):
        dice, token = self.dice, self.token
        method = dice.choice((b"POST",) * 4 + (b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"pOsT"))
        target = dice.choice((b"/", b"/v1/messages?beta=true&", b"//", b"/%2e%2E/../", b"http://localhost/",
                              b"HTTP://127.0.0.1:1?", b"/v1/messages/count_tokens?")) + token
        old = dice.random() < 0.04
        body = self.body() if method not in (b"GET", b"HEAD") or dice.random() < 0.1 else b""
        if method == b"POST" and dice.random() < 0.6:
            body = json.dumps({"model": "claude-sonnet-" + token.decode(), "stream": dice.random() < 0.8,
                               "messages": [{"role": "user", "content": body.decode("latin-1")}]}).encode()
        framing = dice.choice(("length", "chunked")) if body and not old else "length" if body else "none"
        fields = dice.sample((
            b"Accept: */*", b"X-Empty:", b"x-tab: a\tb  c", b"X-Latin: caf\xe9\x80", b"Cookie: a=1", b"cookie: b=2",
            b"TE: trailers", b"Keep-Alive: timeout=5", b"Expect: 100-continue", b"X-Quoted: \"a\\\"b\", ,;",
            b"Connection: keep-alive", b"connection: X-Gone, content-length", b"X-Gone: 1", b"Upgrade: h2c"),
            dice.randrange(6))
        fields += [dice.choice((b"Host: localhost", b"hOST:127.0.0.1:8316", b"Host: [::1]:1 ")), b"X-Token: " + token]
        head, body = self.framed(body, fields, framing)
        blank = dice.choice((b"", b"", b"", b"\r\n"))
        return blank + b"%b %b HTTP/1.%d\r\n" % (method, target, not old) + head + body

    def make_answer(self):
        dice, token = self.dice, self.token
        status = dice.choice((b"200 OK", b"200 OK", b"200 OK", b"201 ", b"204 No Content", b"304 Not Modified",
                              b"400 Bad", b"404 N\xe9", b"429 Many", b"500", b"529 Overloaded", b"299 Odd"))
        fields = dice.sample((b"X-Empty:", b"Set-Cookie: a=1", b"set-cookie: b", b"X-Latin: \xe9", b"Keep-Alive: 5",
                              b"Connection: close", b"connection: X-Gone", b"X-Gone: 1", b"Date: now",
                              b"Access-Control-Allow-Origin: *"), dice.randrange(5))
        body, kind = self.body(), b"application/octet-stream"
        if dice.random() < 0.4:
            kind, body = b"text/event-stream", b"".join(dice.choices((
                event("ping"), b": comment\n\n", event("message_start", text=token.decode()), b"\n",
                event("error", error={"type": "overloaded_error"}), event("message_stop")), k=dice.randrange(5)))
        fields += [b"Content-Type: " + kind, b"X-Answer: " + token]
        bodiless = self.method == b"HEAD" or status[:3] in (b"204", b"304")
        framing = "none" if bodiless else dice.choice(("length", "chunked", "chunked", "close"))
        head, body = self.framed(b"" if bodiless else body, fields, framing)
        interim = dice.choice((b"",) * 8 + (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 102 Wait\r\n\r\n" * 3,
            b"HTTP/1.1 103 Hints\r\nLink: <a>\r\n\r\n"))
        version = b"HTTP/1.0 " if framing == "close" and dice.random() < 0.5 else b"HTTP/1.1 "
        return interim + version + status + b"\r\n" + head + body

    SPOILS = tuple((re.compile(pattern), replacements) for pattern, replacements in (
        (rb"(?i)(content-length):[ \t]*(\d+)", (
            rb"\1: \2\r\n\1: 0", rb"\1: \2\r\n\1: \2", rb"\1 : \2", rb"\1: +\2", rb"\1: -\2", rb"\1: 0x\2",
            rb"\1: \2, \2",
            rb"\1: \2\r\nTransfer-Encoding: chunked", rb"\1:\r\n \2", rb"\1: \2\nX: y", rb"\1: 1_\2", rb"\1:",
            rb"\1: 1",
            b"\\1: \\2\x0b", b"\\1: \xb2", rb"X:\r\1: \2", rb"\1: 1\2", rb"\1\x00: \2".replace(rb"\x00", b"\0"))),
        (rb"(?i)(transfer-encoding):[ \t]*(chunked)", (
            rb"\1: \2\r\nContent-Length: 3", rb"Content-Length: 0\r\n\1: \2", b"\\1: \x0b\\2", rb"\1 : \2", rb"\1: x\2",
            rb"\1: identity, \2", rb"\1: \2, identity", rb"\1: \2\r\n\1: identity", rb"\1:\r\n \2", rb"\1: \2;q=1",
            rb"\1: \2, \2", rb"\1: ,\2", rb" \1: \2", rb"X: y\n\1: \2", rb"\1: 'chunked'", rb"X\1: \2")),
        (rb"\r\n([0-9A-Fa-f]+)((?:[ \t]*;[^\r\n]*)?)\r\n", (
            b"\r\n0x\\1\r\n", b"\r\n+\\1\r\n", b"\r\n-\\1\r\n", b"\r\n \\1\r\n", b"\r\n\\1 \r\n", b"\r\n\\1\n",
            b"\n\\1\r\n",
            b"\r\n\\1;a\nb\r\n", b"\r\n\\1;\rb\r\n", b"\r\n1\\1\r\n", b"\r\n\r\n", b"\r\n\\1_0\r\n", b"\r\n0\r\n",
            b"\r\nf0000000000000000\\1\r\n", b"\\1\r\n", b"\r\n\\1\r\n\r\n", b"\r\n\\1;" + b"x" * 300 + b"\r\n")),
        (rb"\r\n", (b"\n", b"\r", b"\r\r\n", b"\r\n ", b"\r\n\t", b" \r\n", b"\0\r\n", b"\r\n\r\n", b"\r\n: x\r\n",
         b"")),
        (rb"HTTP/1\.[01]", (b"HTTP/1.1 ", b"HTTP/2.0", b"http/1.1", b"HTTP/1.2", b"HTTP/1.01", b"", b"HTTP/1.0",
         b"ICY")),
        (rb"(?i)Host:([^\r\n]*)", (rb"Host:\1\r\nHost:\1", b"Host: evil.example", b"Host :x", b"X: y", b"Host: ")),
        (rb"(?m)^([\w-]+): ", (rb"\1 : ", rb"\1", b"\\1\xe9: ", rb"(\1): ", rb" \1: ", b"\\1:\0", b"\\1: \x7f")),
    ))

    def spoil(self, data):
        """Return `data` with one or two places changed, outside of the tokens, or cut off."""
        for _ in range(self.dice.choice((1, 1, 1, 2))):
            if not data:
                break
            places = [(list(pattern.finditer(data[:2000]))[:12], replacements) for pattern, replacements in self.SPOILS]
            places = [row for row in places if row[0]]
            if self.dice.random() < 0.7 and places:
                found, replacements = self.dice.choice(places[:2] * 2 + places)     # the framing most of all
                match = self.dice.choice(found)
                data = data[:match.start()] + match.expand(self.dice.choice(replacements)) + data[match.end():]
                continue
            tokens = [match.span() for match in TOKEN.finditer(data[:2000])]
            at = self.dice.randrange(min(len(data), 900))
            if any(start < at < end for start, end in tokens):
                continue
            way, odd = self.dice.randrange(8), self.dice.choice(b"\r\n\0 \t:,;0159af\x7f\xff/\"\\{}")
            if way == 0:
                data = data[:at]
            elif way < 3:
                data = data[:at] + bytes((odd,)) + data[at:]
            elif not any(start <= at < end for start, end in tokens):
                data = data[:at] + (b"" if way < 5 else bytes((odd,))) + data[at + 1:]
        return data


class FuzzedTalk:
    """One client connection: its cases, what the bytes of all their requests mean, and what the upstream got of it."""

    def __init__(self, seed, mode, number):
        dice = self.dice = random.Random("%s/%s/%d" % (seed, mode, number))
        self.mode, self.number, self.received, self.lock = mode, number, [], threading.Lock()
        count, self.key = dice.choice((1, 1, 2, 3, 5)), (b"%06d" % number).translate(LETTERS)
        self.cases = [Case(dice, b"tok%bx%bkot" % (self.key, (b"%02d" % place).translate(LETTERS)), place == count - 1)
                      for place in range(count)]
        self.data, self.meant, at = b"".join(case.request for case in self.cases), [], 0
        self.whole = False                      # nothing is left behind the last request that means something
        self.clean = [case.clean_request for case in self.cases]
        with contextlib.suppress(Malformed):
            while not (self.meant and self.meant[-1].close):
                if at == len(self.data):
                    break
                self.meant.append(plain_request(self.data, at))
                at = self.meant[-1].end
        self.whole = at == len(self.data) or bool(self.meant and self.meant[-1].close)
        self.pipelined = dice.random() < 0.4
        # The client breaks off after so many bytes, in one of two ways.
        self.leaves_after = dice.randrange(len(self.data) + 1) if self.data and dice.random() < 0.05 else None
        self.leaves_by_reset = dice.random() < 0.5

    def case_of(self, place):
        """Return the case whose answer the request `place` gets, made for its method; None if there is none."""
        case = self.cases[place] if place < len(self.cases) else None
        return case if case and case.method == self.meant[place].start[0] else None

    def pieces(self, data):
        """Return `data` cut at random places."""
        cuts = sorted(self.dice.randrange(len(data) + 1) for _ in range(self.dice.choice((0, 0, 0, 1, 1, 2, 2, 5, 40))))
        return [data[start:end] for start, end in zip([0] + cuts, cuts + [len(data)]) if end > start]


class FuzzUpstream(Upstream):
    """Reads requests with the plain reader, each on its own, and answers with the bytes of the case it belongs to."""

    def __init__(self):
        super().__init__()
        self.talks, self.faults, self.held = {}, [], {}

    @staticmethod
    def _keys(data):
        """Return the keys of the conversations that have a token in `data`."""
        return {token[3:9] for token in TOKEN.findall(data)}

    def _fault(self, talk, text, data):
        self.faults.append((talk, "%s: the upstream got %r" % (text, data[:3000])))
        return False

    def _exchange(self, connection, reader, number):
        data, early, talk = self.held.pop(number, b""), None, None
        while True:
            talk = talk or self.talks.get(min(self._keys(data), default=None))
            try:
                message = plain_request(data)
                break
            except Unfinished:
                early = early or (talk and self._answer_early(talk, connection, data))
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
        if talk is None or self._keys(data) != {talk.key}:
            return self._fault(talk, "bytes of another connection", data)
        if message.end != len(data):
            return self._fault(talk, "bytes behind the request", data)
        place = self._place(talk, message)
        if place is None or early and place != early[0]:
            return self._fault(talk, "a request that nobody meant", data)
        return (early or self._reply(talk, place, connection))[1]

    def _answer_early(self, talk, connection, data):
        """Answer to the head alone if the case wants it; return what `_reply` does, or None."""
        head, blank, _ = data.partition(b"\r\n\r\n")
        token = TOKEN.search(head)
        if not blank or not token or not re.search(rb"(?i)\r\nx-token: *" + TOKEN.pattern, head):
            return None
        for place in range(len(talk.meant)):
            case = talk.case_of(place)
            if case and token.group() == case.token and any(answer.early for answer in case.answers):
                return self._reply(talk, place, connection)
        return None

    def _reply(self, talk, place, connection):
        """Send the answer that is next for this request; return (place, whether the connection can go on)."""
        with talk.lock:
            attempt = talk.received.count(place)
            talk.received.append(place)
        case = talk.case_of(place)
        if case is None:
            connection.sendall(b"HTTP/1.1 500 No Case\r\nContent-Length: 0\r\n\r\n")
            return place, True
        answer = case.answers[min(attempt, 1)]
        dice = random.Random("%d/%d" % (talk.number, place))
        cuts = sorted(dice.randrange(max(1, answer.end)) for _ in range(dice.choice((0, 0, 0, 1, 1, 2, 2, 5, 40))))
        for start, end in zip([0] + cuts, cuts + [len(answer.data)]):
            connection.sendall(answer.data[start:end])
        if answer.reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return place, bool(answer.meant and not answer.meant.close and not answer.vanish and not answer.reset)

    def _place(self, talk, got):
        """Return which of the requests meant on its connection this one is; None if none."""
        if (got.start[2] != b"HTTP/1.1" or values(got.fields, b"host") != [self.url[7:].encode()]
                or got.framing == "chunked"):
            return None
        for place, meant in enumerate(talk.meant):
            if sent_upstream(got) != sent_upstream(meant):
                continue
            rewritten = MODEL.sub(lambda match: match.group(1) + b'"gemini-claude-sonnet-4-5-thinking"', meant.body, 1)
            if got.body == rewritten or (got.body == meant.body and (talk.mode == "auto" or not all(talk.clean))):
                return place
        return None


class FuzzTest(RouterTest):
    """Random messages, well-formed and not, on both sides, cut into segments at random places.

    What reaches the upstream is exactly one well-formed request equal to what the client meant, or nothing; in auto
    mode one for each of at most two attempts.  What reaches the client is the answer to one of the attempts, or an
    error of rrouter's own, or a broken connection: never a byte that belongs to another request, never parts of two
    answers, and never a broken answer that seems whole.  Where neither side did anything wrong it is an answer.  That
    holds also where the upstream answers before it has the body, resets or closes unasked, and where the client
    leaves: then a request may be cut short, for no other reason.  What bytes mean is decided by a reader of the whole
    message, in this file, after RFC 9112.

    RROUTER_FUZZ_SEED gives the seed again, RROUTER_FUZZ_CASES the number of cases.
    """

    SEED, CASES, THREADS = FUZZ_SEED, fuzz_cases(1000, soak=20_000), 4

    @classmethod
    def setUpClass(cls):
        announce(cls.CASES, "random messages")
        cls.upstream = FuzzUpstream()
        cls.addClassCleanup(cls.upstream.close)
        cls.rrouter = Running(cls.upstream, cls.mode, cls.config, cls.env)
        cls.addClassCleanup(cls.rrouter.__exit__)

    def converse(self, talk):
        """Carry a conversation through; raise AssertionError where the invariant does not hold."""
        with self.rrouter.connect() as connection:
            data, replies, at, ended = b"", [], 0, False        # ended: "closed" or "reset"
            def read(count):
                nonlocal data, at, ended
                while len(replies) < count:
                    method = talk.meant[len(replies)].start[0] if len(replies) < len(talk.meant) else b"GET"
                    with contextlib.suppress(Unfinished):
                        reply = plain_answer(data, method, at)
                        if reply.framing != "close" or ended == "closed":
                            replies.append(reply)
                            at = reply.end
                            continue
                    if ended:
                        return
                    try:
                        block = connection.recv(1 << 20)
                        data, ended = data + block, not block and "closed"
                    except ConnectionError:
                        ended = "reset"

            def send(block):
                with contextlib.suppress(ConnectionError):
                    for piece in talk.pieces(block):
                        connection.sendall(piece)

            ends = [0] + [meant.end for meant in talk.meant]
            if talk.leaves_after is not None:
                send(talk.data[:talk.leaves_after])
                if talk.leaves_after > min(ends[1:], default=len(talk.data)):
                    read(1)
                if talk.leaves_by_reset:
                    reset(connection)
                self.assertEqual({token[3:9] for token in TOKEN.findall(data)} - {talk.key}, set(), "cross-talk")
                return
            if talk.pipelined:
                send(talk.data)
            else:
                for place, (start, end) in enumerate(zip(ends, ends[1:])):
                    send(talk.data[start:end])
                    read(place + 1)
                    if ended:
                        break
                else:
                    send(talk.data[ends[-1]:])
            read(len(talk.meant))
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
            read(len(talk.meant) + 1)
        self.judge(talk, replies, data, data[at:], ended)

    def judge(self, talk, replies, data, rest, ended):
        self.assertEqual({token[3:9] for token in TOKEN.findall(data)} - {talk.key}, set(), "cross-talk")
        sound = True            # as far as nothing has gone wrong, answers are due
        for place, meant in enumerate(talk.meant):
            case, count = talk.case_of(place), talk.received.count(place)
            clean = sound and case is not None and all(talk.clean[:place + 1])
            given = case.answers[:max(1, count)] if case else []
            silent = any(not answer.data or answer.reset for answer in given)   # on a connection used before: re-sent
            self.assertLessEqual(count, (2 if talk.mode == "auto" else 1) * (2 if silent else 1), "sent too often")
            self.assertTrue(count or not clean, "request %d never arrived" % place)
            must = clean and all(answer.clean for answer in given)
            if place >= len(replies):
                self.assertFalse(must, "answer %d is missing" % place)
                if place == len(replies) and rest:
                    self.judge_broken(given, rest, meant.start[0])
                sound = False
                continue
            reply = replies[place]
            if self.is_own_error(reply):
                self.assertFalse(must, "answer %d is an error of ours: %r" % (place, reply))
                sound = sound and reply.start[1] == b"502"
                continue
            self.assertTrue(count, "answer %d without a request" % place)
            if case is None:
                self.assertEqual(reply.start[1:], (b"500", b"No Case"))
                continue
            self.assertIn(self.seen_by_client(reply.start, reply.fields, reply.body), [
                self.seen_by_client(answer.meant.start, answer.meant.fields, answer.meant.body)
                for answer in given if answer.meant], "no whole answer of the upstream")
            sound = sound and not reply.close
        for reply in replies[len(talk.meant):]:
            self.assertTrue(self.is_own_error(reply) and not talk.whole, "an answer to nothing: %r" % (reply,))
        if len(replies) > len(talk.meant):
            self.assertEqual(rest, b"")

    @staticmethod
    def seen_by_client(start, fields, body):
        """Return what of an answer concerns the client, from either side of rrouter."""
        drop = ONE_HOP | nominated(fields) | {b"content-length"}
        return start[1:], body, [field for field in fields if field[0].lower() not in drop
                                 and not field[0].lower().startswith((b"access-control-", b"x-rrouter-"))]

    def judge_broken(self, given, rest, method):
        """What came of an answer that broke off is the beginning of one of the upstream's."""
        try:
            broken = plain_answer(rest, method)      # without length and chunks: only a reset tells that it is broken
            payload = broken.body
        except Unfinished as problem:
            payload = problem.payload
        wanted = [answer.payload for answer in given]
        self.assertTrue(any(body.startswith(payload) for body in wanted), "%r begins none of %r" % (payload, wanted))

    @staticmethod
    def is_own_error(reply):
        return (reply.start[1] >= b"400" and values(reply.fields, b"content-type") == [b"application/json"]
                and (b'"message": "rrouter: ' in reply.body or reply.framing == "none"))

    def fuzz(self, mode):
        self.rrouter.home.write("mode", mode + "\n")
        numbers, lock, faults, done = iter(range(self.CASES)), threading.Lock(), self.upstream.faults, [0]
        talks = self.upstream.talks

        def client():
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
                    self.converse(talk)
                except Exception as problem:
                    faults.append((talk, "%s: %s" % (type(problem).__name__, problem)))
                if not talk or talk.leaves_after is None:       # what was sent by then may still arrive
                    talks.pop(talk and talk.key, None)

        threads = [threading.Thread(target=client) for _ in range(self.THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if faults:
            talk, text = faults[0]
            self.fail("RROUTER_FUZZ_SEED=%s RROUTER_FUZZ_CASES=%d, mode %s, connection %s\n%s\nthe client sent %s%s" % (
                self.SEED, self.CASES, mode, talk and talk.number, text[:3000],
                "" if talk is None else "at once " if talk.pipelined else "one by one ",
                "" if talk is None else "".join(
                    "\n%r\n  answered by %s" % (case.request[:2000], ", then ".join(
                        repr(answer.data[:2000]) for answer in case.answers)) for case in talk.cases)))
        self.assertNotIn("internal error", self.rrouter.printed())

    def setUp(self):
        self.upstream.faults.clear()
        self.upstream.talks.clear()

    def test_nothing_but_what_was_meant_passes(self):
        self.fuzz("antigravity")

    def test_nothing_but_what_was_meant_passes_in_auto_mode(self):
        self.fuzz("auto")


# Body fuzz ####################################################################

class Pairs(list):
    """A JSON object as its members in order, repeated ones too; never equal to a JSON array."""

    def __eq__(self, other):
        return isinstance(other, Pairs) and list.__eq__(self, other)

    def __ne__(self, other):
        return not self == other

    __hash__ = None

    def first(self, name):
        """Return the place of the first member `name`, or None."""
        return next((place for place, (key, _) in enumerate(self) if key == name), None)


class Number(str):
    """A JSON number as it was written."""


def refuse(word):
    raise ValueError(word)


STRICT = json.JSONDecoder(object_pairs_hook=Pairs, parse_int=Number, parse_float=Number, parse_constant=refuse)
NO_UTF_8 = "\ufffd"         # no generator writes it


def strict_json(body):
    """Return the JSON value in `body`; raise ValueError if there is none.

    A byte that is no UTF-8 is a character like others, in a string: the upstream reads bytes too.
    """
    text = body.decode("utf-8", "replace")
    if text[:1] == "\ufeff":
        raise ValueError("byte order mark")
    return STRICT.decode(text)


def skip_space(body, at):
    while body[at:at + 1] in (b" ", b"\t", b"\r", b"\n"):
        at += 1
    return at


def leading_model(body):
    """Return (start, end) of the value if the first member is a plain string `model` and goes on soundly, else None."""
    at = skip_space(body, 0)
    for mark in (b"{", b'"model"', b":"):
        if not body.startswith(mark, at):
            return None
        at = skip_space(body, at + len(mark))
    end = body.find(b'"', at + 1) + 1
    if body[at:at + 1] != b'"' or not end or any(byte < 32 or byte == 92 for byte in body[at:end]):
        return None
    return (at, end) if body[skip_space(body, end):][:1] in (b",", b"}") else None


def meant_model(body):
    """Return (name, whether the rest of `body` counts), name None where it is to pass untouched."""
    plain = leading_model(body)
    if plain:
        try:
            return body[plain[0] + 1:plain[1] - 1].decode(), False
        except UnicodeDecodeError:
            return None, False
    try:
        members = strict_json(body)
    except (ValueError, RecursionError):
        return None, True
    place = members.first("model") if isinstance(members, Pairs) else None
    name = None if place is None else members[place][1]
    return (name if type(name) is str and NO_UTF_8 not in name else None), True


class BodyDice(random.Random):
    """A source of random JSON texts and of damage to them."""

    WORDS = ("model", "model", "Model", "mode", "", "stream", "messages", "type", "thinking", "content", "a" * 300,
             "claude-opus-5", "claude-sonnet-4", '"model":"x"', "\\", '"', "/", "\b\f\n\r\t", "\x7f\x80\u2028", "é",
             "한글", "😀", "\ud83d", "\udc7f", "\0", "{}")
    NAMES = ("claude-sonnet-4-5", "claude-opus-5", "claude-haiku-4-5", "gpt-5", "", "클로드", "\\u0063laude-\\")
    NUMBERS = ("0", "-0", "1", "-1.50", "1E+5", "1e-400", "1e400", "9007199254740993", "9" * 400, "0." + "3" * 500,
               "9" * 5000)

    def space(self):
        return self.choice(("", "", "", "", " ", "\n  ", "\t", "\r\n", " " * 50))

    def string(self, text):
        """Return `text` as a JSON string, some of its characters escaped."""
        if self.random() < 0.7:
            return json.dumps(text, ensure_ascii=self.random() < 0.5 or not text.isprintable())
        out = []
        for character in text:
            if self.random() < 0.2 or not character.isprintable() or character in '"\\':
                coded = character.encode("utf-16-be", "surrogatepass")
                coded = ["%02x%02x" % (coded[at], coded[at + 1]) for at in range(0, len(coded), 2)]
                out += ["\\u" + (digits.upper() if self.random() < 0.5 else digits) for digits in coded]
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
        return self.object(depth - 1)

    def object(self, depth):
        return self.items("{", "}", [self.member(self.choice(self.WORDS), self.value(depth))
                                     for _ in range(self.randrange(5))])

    def body(self):
        """Return a body: most often an object with a model somewhere, and then damaged or not."""
        kind = self.random()
        if kind < 0.06:
            text = self.value()
        elif kind < 0.08:
            depth = self.choice((50, 150, 100_000))
            nest = self.choice(("[%s]", '{"model":%s}', '{"a": %s}')).split("%s")
            text = '{"x":%s%s,"model":"claude-opus-5"}' % (nest[0] * depth + self.choice(("", "1")), nest[1] * depth)
        else:
            members = [self.member(self.choice(self.WORDS), self.value()) for _ in range(self.randrange(6))]
            for _ in range(self.choice((1, 1, 1, 2))):
                value = self.value(1) if self.random() < 0.15 else self.string(self.choice(self.NAMES + self.WORDS))
                key = self.string("model") if self.random() < 0.2 else '"model"'
                members.insert(self.choice((0, 0, self.randrange(len(members) + 1))),
                               key + self.space() + ":" + self.space() + value)
            text = self.space() + self.items("{", "}", members) + self.space()
        return self.damage(text.encode()) if self.random() < 0.35 else text.encode()

    def damage(self, body):
        at, kind = self.randrange(len(body) + 1), self.randrange(9)
        if kind == 0:
            return body[:at]
        if kind == 1:
            return b"\xef\xbb\xbf" + body
        if kind == 2:
            return body + self.choice((b"x", b"{}", b",", b"\0", b"}", b"\x0c", b"\xc2\xa0"))
        if kind == 3:
            return re.sub(rb"\b(null|true|1)\b", self.choice((b"NaN", b"Infinity", b"-Infinity", b"nul", b"01", b"+1",
                                                              b".5", b"1.", b"0x1", b"'a'", b"1 1")), body, count=1)
        if kind == 4:
            return body[:at] + self.choice((b"\xff", b"\xc3", b"\xed\xa0\xbd", b"\x80", b"\xf5")) + body[at:]
        if kind == 5:
            return body[:at] + body[at + self.randrange(1, 9):]
        if kind == 6:
            return body[:at] + self.choice((b",", b'"', b"\\", b"{", b"}", b"[", b"]", b":", b"\x1f", b"\x0b", b"//",
                                            b"\n")) + body[at:]
        if kind == 7:
            return body.decode().encode(self.choice(("utf-16", "utf-16-le", "utf-32")))
        return body[:at] + body[at:at + 9] + body[at:]


class Conversations(BodyDice):
    """A source of bodies with thinking blocks, and of the very bytes that may be left of each."""

    def block(self):
        """Return (JSON text of a content block, whether it is to go)."""
        if self.random() < 0.1:
            return self.choice(("7", "null", '"thinking"', '["thinking"]', "[]", "{}", '{"type":7}')), False
        kind = self.choice(("thinking", "thinking", "redacted_thinking", "text", "text", "tool_use", "tool_result",
                            "Thinking", "thinking ", "redacted"))
        members = [self.member(self.choice(("text", "thinking", "signature", "data", "input", "x")), self.value(2))
                   for _ in range(self.randrange(3))]
        if kind == "tool_result":
            members.append(self.member("content", '[{"type":"thinking","thinking":"nested"}]'))
        members.insert(self.randrange(len(members) + 1), self.member("type", self.string(kind)))
        if self.random() < 0.1:
            members.append(self.member("type", '"text"' if kind.endswith("thinking") else '"thinking"'))
        return self.items("{", "}", members), kind in ("thinking", "redacted_thinking")

    def conversation(self):
        """Return (body, what must be left of it in pieces, None being any white space; None: nothing to take out)."""
        whole, left, found = [], [], False

        def add(text, pieces=None):
            whole.append(text)
            left.extend(pieces or [text])

        def add_members(members):
            add("{")
            for number, (key, write) in enumerate(members):
                add((self.space() + "," if number else "") + self.space() + self.string(key) + self.space() + ":"
                    + self.space())
                write()
            add(self.space() + "}")

        def add_content():
            nonlocal found
            if self.random() < 0.2:
                add(self.choice(('"thinking"', "null", "7", '{"type":"thinking"}', "[]")))
                return
            blocks = [self.block() for _ in range(self.choice((1, 1, 2, 3, 5)))]
            text = self.items("[", "]", [text for text, _ in blocks])
            if not any(goes for _, goes in blocks):
                add(text)
                return
            found = True
            kept = [text for text, goes in blocks if not goes] or ['{"type":"text","text":"(no content)"}']
            pieces = [piece for block in kept for piece in (",", None, block, None)]
            add(text, ["[", *pieces[1:], "]"])

        def add_message():
            others = [(key, lambda: add(self.value(2))) for key in ("role", "id", "thinking")[:self.randrange(4)]]
            others.insert(self.randrange(len(others) + 1), ("content", add_content))
            add_members(others)

        def add_messages():
            add("[" + self.space())
            for number in range(self.randrange(4)):
                add("," + self.space() if number else "")
                add_message()
                add(self.space())
            add("]")

        members = [(key, lambda: add(self.value(2))) for key in ("model", "max_tokens", "stream", "tools")]
        members.append(("system", lambda: add('[{"type":"thinking","thinking":"no message"}]')))
        self.shuffle(members)
        members = members[:self.randrange(6)]
        members.insert(self.randrange(len(members) + 1), ("messages", add_messages))
        if self.random() < 0.1:
            members.append(("messages", lambda: add('[{"content":[{"type":"thinking"}]}]')))
        add(self.space())
        add_members(members)
        add(self.space())
        left = [piece if piece is None else piece.encode() for piece in left]
        return "".join(whole).encode(), left if found else None


def consists_of(pieces, data):
    """Return whether `data` is these pieces one after the other; a piece None is any white space."""
    at = 0
    for piece in pieces:
        if piece is not None and not data.startswith(piece, at):
            return False
        at = skip_space(data, at) if piece is None else at + len(piece)
    return at == len(data)


def healed(members):
    """Return the JSON object `members` without the thinking blocks of its messages; None if there are none."""
    place = members.first("messages")
    messages, found = list(members[place][1]), False
    for number, message in enumerate(messages):
        at = message.first("content")
        content = message[at][1]
        if isinstance(content, Pairs) or not isinstance(content, list):
            continue
        kept = [block for block in content if not (
            isinstance(block, Pairs) and block.first("type") is not None
            and block[block.first("type")][1] in ("thinking", "redacted_thinking"))]
        if len(kept) < len(content):
            found = True
            kept = kept or [Pairs([("type", "text"), ("text", "(no content)")])]
            messages[number] = Pairs(message[:at] + [("content", kept)] + message[at + 1:])
    return Pairs(members[:place] + [("messages", messages)] + members[place + 1:]) if found else None


def run_cases(what, cases, share, dice_class, case):
    """Call `case` with the dice of each of `cases` / `share` cases; a failure tells how to have it again."""
    announce(cases // share, "random %s" % what)
    for number in range(cases // share):
        try:
            case(dice_class("%s/%s/%d" % (FUZZ_SEED, what, number)))
        except Exception as problem:
            raise AssertionError("RROUTER_FUZZ_SEED=%s RROUTER_FUZZ_CASES=%d, number %d of the %s: %s: %s" % (
                FUZZ_SEED, cases, number, what, type(problem).__name__, problem)) from problem


class SpliceFuzzTest(ProxyTest):
    """Random bodies, sound and damaged, against `json` as the oracle.

    Of a body only the value of the first top-level `model` changes, if that is a string; every other byte stays.  What
    is no JSON as a whole (NaN is none) passes untouched; behind a plain leading `model` nothing is examined.  Healing
    takes thinking blocks out of the messages, with the comma that is then too much, and changes nothing else.

    RROUTER_FUZZ_SEED gives the seed again, RROUTER_FUZZ_CASES the number of cases.
    """

    CASES = fuzz_cases(1500, soak=100_000)
    LIVE_CASES = 200


    def expected(self, body, new):
        """Return `body` with the model `new`, or as it is; `new` is a function of the name."""
        name, whole = meant_model(body)
        if name is None or new(name) == name:
            return body
        start, end = leading_model(body) if not whole else self.place_of(body, name)
        spliced = body[:start] + json.dumps(new(name)).encode() + body[end:]
        if whole:
            before, after = strict_json(body), strict_json(spliced)
            before[before.first("model")] = ("model", new(name))
            self.assertEqual(after, before)
        return spliced

    def place_of(self, body, name):
        """Return (start, end) of the value that rrouter names, which must be the string `name` in full."""
        start, end, _ = rrouter.find_model(body)
        self.assertEqual(strict_json(body[start:end]), name)
        return start, end

    def test_one_value_changes_and_no_other_byte(self):
        def case(dice):
            body = dice.body()
            name, _ = meant_model(body)
            given = dice.choice((bytes, bytearray, memoryview))(body)
            found = rrouter.find_model(given)
            self.assertEqual(found and found[2], name, body[:3000])
            new = dice.choice(dice.WORDS)
            if found and new != name:
                spliced = b"".join(rrouter.splice(given, found[0], found[1], new))
                self.assertEqual(spliced, self.expected(body, lambda _: new))

        run_cases("bodies", self.CASES, 1, BodyDice, case)

    def test_the_upstream_gets_it_so(self):
        rules = [(rule["match"][:-1], rule["rewrite"]) for rule in
                 rrouter.DEFAULT_CONFIG["modes"]["antigravity"]["mappings"]]

        def rewritten(name):
            return next((new for prefix, new in rules if name.startswith(prefix)), name)

        def case(dice):
            body = dice.body()
            connection.sendall(request_bytes(body=body, port=self.rrouter.port))
            reply = read_reply_from(reader, "POST")
            self.assertEqual(reply.status, 200)
            self.assertEqual(self.upstream.received.pop().body, self.expected(body, rewritten))
            self.assertEqual(reply.header("x-rrouter-target"), None if meant_model(body)[0] is None else "antigravity")

        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            run_cases("bodies over the wire", self.CASES, 15, BodyDice, case)

    def test_healing_takes_thinking_blocks_and_no_other_byte(self):
        def case(dice):
            body, pieces = dice.conversation()
            result = rrouter.without_thinking(body)
            self.assertEqual(result is None, pieces is None, body)
            if result is not None:
                self.assertTrue(consists_of(pieces, result), "%r became %r" % (body, result))
                self.assertEqual(strict_json(result), healed(strict_json(body)))

        run_cases("conversations", self.CASES, 3, Conversations, case)

    def test_healing_of_damaged_bodies_fits_what_is_left_of_them(self):
        def case(dice):
            body = dice.damage(dice.conversation()[0])
            result = rrouter.without_thinking(body)
            try:
                wanted = healed(strict_json(body))
            except (ValueError, TypeError, AttributeError):     # no JSON, or messages that are none
                self.assertTrue(result is None or len(result) < len(body) + 40, body)
            else:
                self.assertEqual(result and strict_json(result), wanted, body)

        run_cases("damaged conversations", self.CASES, 3, Conversations, case)


# File fuzz ####################################################################

def nested_text(depth):
    return Number("[" * depth + "]" * depth)


class ConfigDice(BodyDice):
    """A source of contents of config.json and of the mode file, most of them wrong in some way."""

    ODD = (None, True, False, "", "x", "auto", "one", "Loud", "a b", "é", "\ud83d", "a\nb\x1b[31m", "x" * 5000,
           "*", "[", "[z-a]", "[!a", "[[a--b&&c]*", "*a" * 50,
           [], ["one"], ["one", "one"], ["two", "one"], ["one", 2], [[]], nested_text(50), nested_text(100_000),
           Pairs(), Pairs([("match", "*"), ("rewrite", "odd")]), Pairs([("one", Pairs())]),
           *map(Number, ("0", "1", "2", "-1", "0.5", "1.0", "150", "1e3", "1e18", "1e999", "-0", "NaN", "Infinity",
                         "-Infinity", "9" * 30, "9" * 5000, "01", "0x1", "nan")))
    KEYS = ("modes", "defaultMode", "auto", "mappings", "match", "rewrite", "targets", "failureThreshold",
            "timeoutThreshold", "cooldownMinutes", "firstByteTimeoutSeconds", "one", "two", "spare", "colour", "", "\0")

    def write(self, value):
        """Return `value` as JSON text."""
        if isinstance(value, Pairs):
            return self.items("{", "}", [self.member(key, self.write(member)) for key, member in value])
        if isinstance(value, list):
            return self.items("[", "]", list(map(self.write, value)))
        if isinstance(value, Number):
            return value
        return self.string(value) if isinstance(value, str) else json.dumps(value)

    def places(self, value):
        """Yield (container, index) of every member and element in `value`."""
        if isinstance(value, list):
            for index, item in enumerate(value):
                yield value, index
                yield from self.places(item[1] if isinstance(value, Pairs) else item)

    def change(self, config):
        """Change one place of the tree `config`."""
        container, index = self.choice(list(self.places(config)) or [(Pairs(), 0)])
        if not container:
            return
        has_keys, way = isinstance(container, Pairs), self.randrange(8)
        odd = copy.deepcopy(self.choice(self.ODD))      # for it may be changed in turn
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
        """Return the content of a config.json of this edition, none to three places of it changed, or spoilt whole."""
        auto = {"targets": ["one", "two"], "failureThreshold": 3, "timeoutThreshold": 2, "cooldownMinutes": [30, 0.5],
                "firstByteTimeoutSeconds": 150}
        config = STRICT.decode(json.dumps(switchboard(number, auto=auto)))
        for _ in range(self.choice((0, 1, 1, 1, 2, 3))):
            self.change(config)
        content = (self.space() + self.write(config) + self.space()).encode()
        kind = self.random()
        if kind < 0.2:
            return self.damage(content)
        if kind < 0.26:
            return self.choice((
                b"", b" \n", b"\0" * 64, content + content, b"\0" + content, b"\\\"" * 50_000, b"{" * 100_000,
                b" " * 2_000_000 + content, b" " * 700_000 + content, self.body()))
        return content

    def mode(self):
        """Return the content of a mode file."""
        word = self.choice((
            b"one", b"two", b"spare", b"auto", b"ONE", b"Auto", b"three", b"", b"one two", b"\xef\xbb\xbfone", b"\0",
            b"on\xffe", b"\x1b[31mone", "\u00e9in".encode(), b"x" * 5000, b"one\ntwo", b"a" * 2_000_000))
        return self.choice((b"", b" ", b"\n", b"\t\r\n")) + word + self.choice((b"", b"\n", b"\r\n", b" \n\n"))


class FileFuzzTest(RouterTest):
    """Random contents of config.json and of the mode file, and what is no file at all in their places.

    A content is taken as a whole or refused as a whole with one line that says why, and the last good one stays in
    force: for requests, and in /health.  What is to be taken is decided by `config_of` alone, without any file.

    RROUTER_FUZZ_SEED gives the seed again, RROUTER_FUZZ_CASES the number of cases.
    """

    CASES = fuzz_cases(1000, soak=20_000)

    @classmethod
    def setUpClass(cls):
        cls.config, cls.mode = switchboard(0), "one"
        super().setUpClass()

    def judged(self, content):
        """Return (config in this content or None, the complaint in one line or None)."""
        try:
            return rrouter.config_of(content), None
        except (rrouter.ConfigError, UnicodeDecodeError) as problem:
            complaint = rrouter.complain_about_config(problem)
            self.assertRegex(complaint, r"\Aconfig\.json: ?[^\0-\x1f\x7f]+\Z")
            return None, complaint

    def test_a_config_is_taken_or_refused_as_a_whole(self):
        taken = []

        def case(dice):
            content = dice.config(1)
            config, _ = self.judged(content)
            if config is None:
                return
            taken.append(config)
            STRICT.decode(content.decode("utf-8-sig"))          # raises where Python alone would take it for JSON
            again = rrouter.parse_config(rrouter.config_text(config))
            for seconds, others in zip(config.auto.cooldowns_s, again.auto.cooldowns_s):
                self.assertAlmostEqual(seconds, others)
            auto = again.auto._replace(cooldowns_s=config.auto.cooldowns_s)
            self.assertEqual(again._replace(auto=auto, problems=config.problems), config)
            for word in ("one", "auto", "nosuch", config.default_mode):
                mode = config.resolve(word)
                self.assertTrue(mode in config.modes or (mode == "auto" and not config.auto_error), mode)
                for target in config.auto.targets if mode == "auto" else [mode]:
                    self.assertIsInstance(rrouter.decide_route(config, target, "claude-sonnet-5-5").model, str)

        run_cases("contents", self.CASES, 1, ConfigDice, case)
        self.assertTrue(self.CASES // 10 < len(taken) < self.CASES * 9 // 10, "%d taken" % len(taken))

    def test_depth_at_the_edge_of_what_python_reads_is_refused_like_any_other(self):
        for depth in range(900, 1020):
            for opening, closing in (("[", "]"), ('{"modes":', "}"), ('{"modes":{"a":{"mappings":[', "]}}}")):
                self.judged(("%s1%s" % (opening * depth, closing * depth)).encode())

    def test_a_megabyte_of_quotes_is_refused_at_once(self):
        for content in (b'\\"' * 500_000, b'"\\\n' * 300_000, b'"' + b"\\" * 900_001, b"9" * 999_999, b"-" * 999_999):
            self.assertIsNone(self.judged(content)[0])          # where it takes hours, the suite is ended

    def test_live_files_of_any_kind_stop_no_request(self):
        home, state = self.rrouter.home, {"edition": 0}
        state.update(config=rrouter.config_of((home.dir / "config.json").read_bytes()), complaint=None, word="one",
                     mode_complaint=None)
        directory = home.root / "a directory"
        directory.mkdir()

        def odd_thing(dice, name):
            """Put what is no file in the place of the file, or nothing; return how it is told, None for nothing."""
            path, fresh, way = str(home.dir / name), str(home.dir / "odd.new"), dice.randrange(4)
            if way == 0:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                return None
            make = (os.mkfifo, lambda fresh: os.symlink(path, fresh), lambda fresh: os.symlink(str(directory), fresh))
            make[way - 1](fresh)
            os.replace(fresh, path)
            return "config.json: cannot be read: " if name == "config.json" else "mode: "

        def write_config(dice):
            if dice.random() < 0.1:
                state["complaint"] = odd_thing(dice, "config.json")
                if state["complaint"] is None:
                    state["config"] = rrouter.config_of(None)
                return
            state["edition"] += 1
            content = dice.config(state["edition"] % 1000)
            put(home, "config.json", content)
            if len(content) > 1 << 20:
                state["complaint"] = "config.json: cannot be read: larger than 1048576 bytes"
            else:
                config, state["complaint"] = self.judged(content)
                state["config"] = config or state["config"]

        def write_mode(dice):
            if dice.random() < 0.1:
                state["mode_complaint"] = odd_thing(dice, "mode")
                if state["mode_complaint"] is None:
                    state["word"] = None
                return
            content = dice.mode()
            put(home, "mode", content)
            state["mode_complaint"] = "mode: larger than 1048576 bytes" if len(content) > 1 << 20 else None
            if state["mode_complaint"] is None:
                state["word"] = content.decode("utf-8", "replace").strip().lower() or state["word"]

        def case(dice):
            (write_mode if dice.random() < 0.3 else write_config)(dice)
            config, word = state["config"], state["word"]
            mode = config.resolve(config.default_mode if word is None else word)
            targets = [mode]
            if mode == "auto":      # a limit too short for a loaded machine sends the request to the other target
                targets = config.auto.targets[:1 if config.auto.first_byte_s > 5 else 2]
            self.assertEqual(self.rrouter.post().status, 200)
            self.assertIn(self.upstream.models()[-1], [
                rrouter.decide_route(config, target, "claude-sonnet-5-5").model for target in targets])
            self.upstream.clear()
            health = self.rrouter.health()
            self.assertEqual([health[name] for name in ("status", "mode", "defaultMode")],
                             ["ok", mode, config.default_mode])
            problems = health["problems"]
            self.assertNotIn("Traceback", "".join(problems))
            expected = [complaint for complaint in (state["complaint"], state["mode_complaint"]) if complaint]
            expected += ["config.json: " + problem for problem in config.problems]
            if word not in (None, mode, "auto"):
                expected.append("mode: ")
            for complaint in expected:
                self.assertTrue(any(problem.startswith(complaint) for problem in problems), (complaint, problems))
            if not expected and word != "auto":
                self.assertEqual(problems, [])

        run_cases("files", self.CASES, 13, ConfigDice, case)
        self.assertNotIn("internal error", self.rrouter.printed())
        self.assertIsNone(self.rrouter.process.poll())


# Edges ########################################################################

class EdgeTest(ProxyTest):

    def test_the_largest_head_passes_and_the_next_larger_does_not(self):
        host = b"GET /edge HTTP/1.1\r\nHost: localhost\r\n"
        filler = rrouter.HEAD_MAX_BYTES - len(host) - len(b"X: \r\n\r\n")
        for label, count, data in (
                ("fields", rrouter.FIELDS_MAX, lambda more: host + b"X: y\r\n" * (rrouter.FIELDS_MAX - 1 + more)),
                ("bytes", rrouter.HEAD_MAX_BYTES, lambda more: host + b"X: %b\r\n" % (b"y" * (filler + more)))):
            with self.subTest(label, count=count):
                self.upstream.clear()
                self.assertEqual(self.converse(data(0) + b"\r\n", "GET")[0].status, 200)
                self.assertEqual(self.upstream.received.pop().target, "/edge")
                self.assert_refused(data(1) + b"\r\n", 431)

    def test_a_large_body_with_its_model_last_leaves_streams_running(self):
        """30 MB are walked through to the end; an event of another client's stream waits for that no second.

        On a slow machine it may wait for longer, but not for as long as some walks take here.
        """
        gate, events = threading.Event(), [event("ping")] * 100
        self.addCleanup(gate.set)

        def ticking():
            for number, data in enumerate(events):
                if not gate.is_set() or number == 0:
                    time.sleep(0.01)                    # the beat of the stream
                yield data

        answer = stream()
        answer.chunks = ticking()
        self.upstream.play(answer)
        body = b'{"messages":[' + b'{"role":"user","content":"line\\n \\"model\\""},' * 680_000 + b'1],"model":"%b"}'
        start = time.monotonic()
        self.assertIsNotNone(rrouter.find_model(body))
        walk_s, gaps = time.monotonic() - start, []

        def read_events():
            last = time.monotonic()
            while receive(response, len(events[0])):
                gaps.append(time.monotonic() - last)
                last = time.monotonic()

        with self.opened() as response:
            reader = threading.Thread(target=read_events)
            reader.start()
            reply = self.rrouter.request("POST", "/v1/messages", body.replace(b"%b", b"claude-sonnet-5"))
            gate.set()
            reader.join(WAIT_S * 3)
        self.assertEqual((reply.status, reply.header("x-rrouter-model")), (200, GEMINI_SONNET))
        received = self.upstream.received[-1].body
        self.assertTrue(received == body.replace(b"%b", GEMINI_SONNET.encode()))        # no diff of 30 MB
        self.assertEqual(len(gaps), len(events))
        self.assertLess(max(gaps), max(1, 4 * walk_s))

    def test_a_connection_that_was_stale_counts_for_nobody(self):
        self.rrouter.home.write("mode", "auto\n")
        seen = set()

        def once(received):
            fresh = received.connection not in seen
            seen.add(received.connection)
            return stream() if fresh else Answer(hangup=True)

        self.upstream.default = once
        for _ in range(20):
            reply = self.rrouter.post()
            self.assertEqual((reply.status, reply.complete, reply.header("x-rrouter-attempts")), (200, True, "1"))
        auto = self.rrouter.health()["autoSwitch"]
        self.assertEqual((auto["failureCount"], auto["timeoutCount"], auto["switchCount"]), (0, 0, 0))
        self.assertGreater(len(self.upstream.received), 20)             # they were stale, and sent again
        self.assertLessEqual(len(self.upstream.received), 40)

    def test_a_name_service_that_is_dead_does_not_hold_the_start_up(self):
        """`http.server` asks it for the name of the host when it binds; that can take 35 s."""
        code = ("import socket, threading\ndef ask(*_):\n    threading.Event().wait()\n"
                "socket.getfqdn = socket.gethostbyaddr = socket.gethostbyname = socket.getnameinfo = ask\n"
                "real = socket.getaddrinfo\ndef getaddrinfo(host, *others, **options):\n"
                "    return real(host, *others, **options) if host in ('127.0.0.1', '::1', 'localhost') else ask()\n"
                "socket.getaddrinfo = getaddrinfo")
        with Altered(self.upstream, code) as router:
            self.assertEqual(router.post().status, 200)


@unittest.skipUnless(SOAKING, "--soak starts two daemons at once, 50 times")
class StartSoakTest(unittest.TestCase):

    ROUNDS = 50

    def test_two_starts_at_once_leave_one_daemon(self):
        announce(self.ROUNDS, "rounds of two starts at once")
        home = Home()
        self.addCleanup(home.remove)
        self.addCleanup(home.run, "stop")
        for number in range(self.ROUNDS):
            with self.subTest(round=number):
                both = run_all(home, ("start",), ("start",), check=0)
                pid = get_health(home.port)["pid"]
                for done in both:
                    self.assertRegex(done.stdout, r"\b%d\b" % pid)
                    self.assertRegex(done.stdout, r"\b%d\b" % home.port)
                if LINUX:
                    self.assertEqual(processes(home), [pid])
                home.run("stop", check=0)
                self.assertIsNone(get_health(home.port))


# Faults on both sides #########################################################

class HalfSentTest(RouterTest):
    """Requests that the upstream answers, or the client abandons, before they are sent in full."""

    big = b'{"model":"claude-x","pad":"' + b"a" * 12_000_000 + b'"}'

    def test_a_connection_with_half_a_request_on_it_carries_no_other(self):
        """It went back to the pool, and the next request became the tail of this one's body."""
        gate = threading.Event()
        self.addCleanup(gate.set)
        upstream = HalfReadingUpstream(b"HTTP/1.1 413 Big\r\nContent-Length: 2\r\n\r\n{}", gate)
        self.addCleanup(upstream.close)
        with Running(upstream, "claude") as rrouter_:
            self.assertEqual(rrouter_.request(body=self.big).status, 413)
            gate.set()
            self.assertEqual(rrouter_.request(body=b'{"secret":1}').status, 200)
            self.assertEqual(upstream.connections, 2)

    def test_100_continue_from_an_upstream_that_pauses_does_not_cut_the_upload_short(self):
        gate = threading.Event()
        self.addCleanup(gate.set)
        upstream = HalfReadingUpstream(b"HTTP/1.1 100 Continue\r\n\r\n", gate)
        self.addCleanup(upstream.close)
        with Running(upstream, "claude") as rrouter_:
            replies = []
            thread = threading.Thread(target=lambda: replies.append(rrouter_.request(body=self.big)))
            thread.start()
            upstream.paused.wait(WAIT_S)
            gate.set()
            thread.join(WAIT_S)
            self.assertEqual(replies[0].status, 200)
            self.assertEqual(upstream.received, len(self.big))

    def test_a_client_that_leaves_during_a_slow_upload_ends_it(self):
        gate = threading.Event()
        self.addCleanup(gate.set)
        upstream = HalfReadingUpstream(b"", gate)
        self.addCleanup(upstream.close)
        with Running(upstream, "claude") as rrouter_:
            with rrouter_.connect() as client:
                client.sendall(request_bytes(body=self.big, port=rrouter_.port))
                Running.wait_until(lambda: rrouter_.health()["activeRequests"] == 1)
            start = time.monotonic()
            Running.wait_until(lambda: rrouter_.health()["activeRequests"] == 0)
            self.assertLess(time.monotonic() - start, 2)        # a second, and one for a busy machine


class HalfReadingUpstream:
    """Reads the head of the first request, sends `first`, waits for `gate`, reads the rest; the others it serves."""

    def __init__(self, first, gate):
        self.first, self.gate, self.paused = first, gate, threading.Event()
        self.connections = self.received = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = "http://127.0.0.1:%d" % self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(connection, self.connections == 1), daemon=True).start()

    def _serve(self, connection, is_first):
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as reader:
            length = 0
            for line in iter(reader.readline, b"\r\n"):
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            if is_first:
                connection.sendall(self.first)
                self.paused.set()
                self.gate.wait(WAIT_S)
            self.received = len(reader.read(length))
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    def close(self):
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


class LeavingTest(RouterTest):

    def test_a_byte_sent_before_leaving_does_not_hide_the_leaving(self):
        gate = threading.Event()
        self.addCleanup(gate.set)
        self.upstream.play(Answer(before=gate))
        with self.rrouter.connect() as client:
            client.sendall(request_bytes(body=b'{"model":"m"}'))
            self.upstream.wait(lambda u: u.received)
            client.sendall(b"\r\n")
        start = time.monotonic()
        self.upstream.wait(lambda u: u.closed)
        self.assertLess(time.monotonic() - start, 2)        # a second, and one for a busy machine

    def test_a_dripping_refusal_does_not_hide_the_leaving(self):
        """A 400 is read ahead for healing: each of its bytes put the look after the client off."""
        gate = threading.Event()
        self.addCleanup(gate.set)
        chunks = tuple(b"x" for _ in range(10_000))

        def drip(_):
            return Answer(400, chunks, gate=SlowGate())
        self.upstream.play(drip)
        with self.rrouter.connect() as client:
            client.sendall(request_bytes(body=b'{"model":"m"}'))
            self.upstream.wait(lambda u: u.received)
        start = time.monotonic()
        Running.wait_until(lambda: self.rrouter.health()["activeRequests"] == 0)
        self.assertLess(time.monotonic() - start, 2)        # a second, and one for a busy machine

    def test_bytes_behind_the_last_request_do_not_destroy_the_end_of_its_answer(self):
        body = b"x" * 3_000_000
        self.upstream.default = Answer(200, body, framing="length")
        for _ in range(5):
            with self.rrouter.connect() as client:
                client.sendall(request_bytes(body=b'{"model":"m"}', fields=(("Connection", "close"),)))
                self.upstream.wait(lambda u: u.received)
                client.sendall(b"\r\n")
                self.assertEqual(len(read_reply(client).body), len(body))
            self.upstream.clear()


class SlowGate:
    """A gate that opens by itself every 20 ms: an upstream that drips."""

    @staticmethod
    def wait(_):
        time.sleep(0.02)
        return True


class OddAnswerTest(RouterTest):

    def test_connection_cannot_name_the_length_away(self):
        self.upstream.play(Answer(
            raw=b"HTTP/1.1 200 OK\r\nConnection: content-length\r\nContent-Length: 5\r\n\r\nhello"))
        reply = self.rrouter.request(body=b"{}")
        self.assertEqual((reply.body, reply.complete, reply.header("content-length")), (b"hello", True, "5"))

    def test_204_goes_on_without_a_length(self):
        self.upstream.play(Answer(raw=b"HTTP/1.1 204 None\r\nContent-Length: 0\r\n\r\n"))
        self.assertIsNone(self.rrouter.request("GET", "/x").header("content-length"))


class SmallDefectsTest(unittest.TestCase):
    """Small parts, each on the input that once broke it."""

    def test_a_refusal_that_repeats_its_wording_is_searched_in_linear_time(self):
        start = time.perf_counter()
        self.assertFalse(rrouter.names_foreign_signature(b"redacted_thinking " * 60_000))
        self.assertLess(time.perf_counter() - start, 1)

    def test_an_upstream_without_a_port_has_the_one_of_its_scheme(self):
        with socket.create_server(("::1", 80), family=socket.AF_INET6) if ipv6_and_root() else contextlib.nullcontext():
            if not ipv6_and_root():
                self.skipTest("needs port 80 of ::1")
            upstream = rrouter.Upstream("http://[::1]", lambda _: False)
            with contextlib.closing(upstream.open()) as connection:
                self.assertEqual(connection.sock.getpeername()[1], 80)

    ENVIRONMENT = (
        # variable,        value
        ("RROUTER_HOST",   "a..b"),
        ("RROUTER_HOST",   "a" * 70),
        ("RROUTER_UPSTREAM", "http://a..b:80"),
        ("RROUTER_UPSTREAM", "http://user:pa@ss/word@host"),
        ("RROUTER_UPSTREAM", "user:word@host:8317"),
        ("RROUTER_UPSTREAM", "http:user:word@host"),
        ("RROUTER_UPSTREAM", "http:/user:pass\nword@host"),
    )

    def test_host_names_that_are_none_are_refused_and_passwords_not_shown(self):
        for name, value in self.ENVIRONMENT:
            with self.subTest(value):
                with self.assertRaises(rrouter.UsageError) as caught:
                    rrouter.read_environment({name: value})
                self.assertIn(name, str(caught.exception))
                self.assertNotIn("word", str(caught.exception))

    def test_a_glob_that_the_library_cannot_take_is_refused(self):
        try:
            re.compile(__import__("fnmatch").translate("[z-a]*"))
            self.skipTest("this Python takes every glob")
        except re.error:
            with self.assertRaises(rrouter.ConfigError):
                rrouter.parse_config('{"modes": {"m": {"mappings": [{"match": "[z-a]*", "rewrite": "x"}]}}}')

    def test_retry_after_of_any_kind_never_fails(self):
        chance = random.Random(8316)
        words = ["1", "Feb", ",", "00", "Fri", "2027", "GMT", "-0000", ":", "99:99:99", "é", "\x00", " "]
        for _ in range(5000):
            value = " ".join(chance.choice(words) for _ in range(chance.randrange(8)))
            seconds = rrouter.retry_after_s(value, 1e9)
            self.assertTrue(seconds is None or seconds >= 0, value)

    def test_a_directory_in_place_of_a_file_leaves_no_descriptor_open(self):
        with tempfile.TemporaryDirectory() as directory:
            before = os.listdir("/dev/fd")
            for _ in range(20):
                with self.assertRaises(OSError):
                    rrouter.read_file(directory)
            self.assertEqual(len(os.listdir("/dev/fd")), len(before))

    def test_two_signals_at_once_are_two(self):
        code = ("import rrouter, signal, os\n"
                "signals = rrouter.Signals()\n"
                "os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGINT)\n"
                "print(sorted(signals.wait(5) + signals.wait(5)), signals.wait(0))\n")
        done = subprocess.run([sys.executable, "-c", code], cwd=str(HERE), stdout=subprocess.PIPE, timeout=WAIT_S * 3)
        self.assertEqual(done.stdout.split(b"\n")[0], b"[2, 15] b''")


def ipv6_and_root():
    """Return whether port 80 of ::1 is ours to take."""
    try:
        socket.create_server(("::1", 80), family=socket.AF_INET6).close()
        return True
    except OSError:
        return False


class OddStartTest(unittest.TestCase):
    """Starts in surroundings that nobody would arrange on purpose."""

    def setUp(self):
        self.home = Home(mode="auto")
        self.addCleanup(self.home.remove)
        self.addCleanup(self.home.run, "stop")

    def shell(self, command, **env):
        """Run a shell command in which $R is rrouter; return it."""
        script = 'R() { "%s" "%s" "$@"; }\n%s' % (sys.executable, RROUTER, command)
        return subprocess.run(["sh", "-c", script], env=dict(self.home.env, **env), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, universal_newlines=True, timeout=WAIT_S * 6)

    def test_closed_standard_streams_do_no_harm(self):
        """Files opened next got their numbers: the log went into the lock file, or into the pipe of the signals."""
        self.assertEqual(self.shell("R start <&- >&- 2>&-").returncode, 0)
        pid = int(self.home.read("rrouter.pid"))
        self.assertEqual(self.home.read("rrouter.lock").split(), [str(pid)])
        self.assertEqual(self.shell("R status >&-").returncode, 0)
        self.home.run("stop", check=0)
        for closed in ("<&- >&- 2>&-", "</dev/null >&- 2>&-"):
            process = subprocess.Popen(["sh", "-c", 'exec "%s" "%s" serve %s' % (sys.executable, RROUTER, closed)],
                                       env=self.home.env)
            try:
                Running.wait_until(lambda: self.home.run("status").returncode == 0)
                self.assertEqual(self.home.read("rrouter.lock").split(), [str(process.pid)])
                process.terminate()
                self.assertEqual(process.wait(WAIT_S), 0)
            finally:
                process.kill()
                process.wait(WAIT_S)

    def test_a_port_held_by_something_that_resembles_rrouter_is_named(self):
        upstream = Upstream(Answer(200, b'{"status":"ok","autoSwitch":{}}', framing="length"), port=self.home.port)
        self.addCleanup(upstream.close)
        done = self.home.run("start", check=1)
        self.assertIn("port %d is taken" % self.home.port, done.stderr)

    def test_a_hostile_state_file_does_not_keep_rrouter_from_starting(self):
        with Running("http://127.0.0.1:9", home=self.home):
            pass
        state = json.loads(self.home.read("state.json"))
        state["whole"]["last_cooldown_s"] = int("1" * 400)
        self.home.write("state.json", json.dumps(state))
        with Running("http://127.0.0.1:9", home=self.home) as running:
            self.assertIn("state.json set aside", running.log())

    def test_start_while_the_last_one_drains_waits_for_it_and_starts(self):
        gate = threading.Event()
        upstream = Upstream(Answer(before=gate))
        self.addCleanup(upstream.close)
        self.home.env["RROUTER_UPSTREAM"] = upstream.url
        self.home.run("start", check=0)
        pid = int(self.home.read("rrouter.pid"))
        with socket.create_connection(("127.0.0.1", self.home.port), WAIT_S) as client:
            client.sendall(request_bytes("GET", "/x"))
            upstream.wait(lambda u: u.received)
            os.kill(pid, signal.SIGTERM)
            Running.wait_until(lambda: "stopping" in self.home.read("rrouter.lock"))
            self.assertIn("is stopping", self.home.run("status", check=3).stdout)
            starting = subprocess.Popen([sys.executable, RROUTER, "start"], env=self.home.env, stdout=subprocess.PIPE)
            gate.set()
            self.assertEqual(read_reply(client).status, 200)
            output = starting.communicate(timeout=WAIT_S * 3)[0]
        self.assertEqual(starting.returncode, 0, output)
        self.assertNotEqual(int(self.home.read("rrouter.pid")), pid)

    def test_stop_does_not_signal_who_does_not_hold_the_lock(self):
        self.home.run("start", check=0)
        sleeper = subprocess.Popen(["sleep", "60"])
        self.addCleanup(sleeper.wait)
        self.addCleanup(sleeper.kill)
        pid = int(self.home.read("rrouter.pid"))
        os.kill(pid, signal.SIGKILL)
        Running.wait_until(lambda: "not running" in self.home.run("status").stdout)
        for name in ("rrouter.pid", "rrouter.lock", "run.json"):
            self.home.write(name, self.home.read(name).replace(str(pid), str(sleeper.pid)))
        self.assertIn("not running", self.home.run("stop", check=0).stdout)
        self.assertIsNone(sleeper.poll())

    def test_a_file_whose_time_was_set_back_is_read_all_the_same(self):
        upstream = Upstream()
        self.addCleanup(upstream.close)
        config = '{"modes": {"m": {"mappings": [{"match": "*", "rewrite": "%s"}]}}, "defaultMode": "m"}'
        self.home.env["RROUTER_UPSTREAM"] = upstream.url
        self.home.write("mode", "m\n")
        self.home.write("config.json", config % "one")
        past = time.time() - 1000
        os.utime(str(self.home.dir / "config.json"), (past, past))
        with Running(upstream, home=self.home) as running:
            self.assertEqual(running.post().header("x-rrouter-model"), "one")
            self.home.write("config.json", config % "two")
            os.utime(str(self.home.dir / "config.json"), (past, past))
            self.assertEqual(running.post().header("x-rrouter-model"), "two")

    def test_an_odd_list_of_models_is_no_defect(self):
        upstream = Upstream(Answer(200, b'{"data":[{"id":1},{"id":"a"}]}', framing="length"))
        self.addCleanup(upstream.close)
        self.home.env["RROUTER_UPSTREAM"] = upstream.url
        self.assertIn("does not know gemini-3-flash-preview", self.home.run("check", check=1).stdout)


class CrowdTest(RouterTest):

    def test_health_is_answered_beyond_the_cap_and_other_requests_are_told(self):
        with contextlib.ExitStack() as stack:
            for number in range(rrouter.CONNECTIONS_MAX):
                stack.enter_context(self.rrouter.connect())
                if not number % 100:
                    self.rrouter.health()           # they have left the queue in front of it
            Running.wait_until(lambda: self.rrouter.request("GET", "/x").status == 503)
            self.assertEqual(self.rrouter.health()["status"], "ok")
            self.assertEqual(self.rrouter.home.run("ag").returncode, 0)

    def test_413_reaches_a_client_that_sends_all_in_one_piece(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.rrouter.port, timeout=WAIT_S)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/messages", bytes(rrouter.BODY_MAX_BYTES + 1))
            self.assertEqual(connection.getresponse().status, 413)


class RescueOfBrokenCodingTest(RouterTest):
    mode = "auto"

    def test_a_malformed_chunk_right_behind_the_head_is_rescued(self):
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        self.upstream.play(Answer(raw=head + b"zz\r\n"), Answer(200, b"{}"))
        reply = self.rrouter.post()
        self.assertEqual((reply.status, reply.header("x-rrouter-attempts")), (200, "2"))


class CheckFindsTest(unittest.TestCase):
    """What `check` says of surroundings that are not in order."""

    def setUp(self):
        self.upstream = Upstream(error(401))
        self.addCleanup(self.upstream.close)
        self.home = Home(self.upstream)
        self.addCleanup(self.home.remove)
        self.settings = self.home.root / ".claude" / "settings.json"
        self.settings.parent.mkdir()

    def check(self, **env):
        return self.home.run("check", check=1, env=env).stdout

    def test_settings_that_are_no_json_are_named(self):
        self.settings.write_text("{")
        self.assertRegex(self.check(), "(?m)^warn .*settings.json: not JSON")

    def test_a_setting_of_the_shell_alone_will_do(self):
        self.assertRegex(self.check(ANTHROPIC_BASE_URL="http://localhost:%d" % self.home.port), "(?m)^ok    shell: ")

    def test_a_refused_key_is_told_with_its_variable(self):
        self.settings.write_text('{"env": {"ANTHROPIC_API_KEY": "sk-secret"}}')
        printed = self.check()
        self.assertRegex(printed, r"(?m)^warn  upstream: .* refuses .*401.*ANTHROPIC_API_KEY")
        self.assertNotIn("sk-secret", printed)

    def test_a_daemon_of_another_version_is_told(self):
        with Running(self.upstream, home=self.home) as running:
            health = running.health()
            other = pathlib.Path(RROUTER).read_text().replace('__version__ = "%s"' % health["version"],
                                                              '__version__ = "9.9.9"')
            program = self.home.root / "other.py"
            program.write_text(other)
            done = subprocess.run([sys.executable, str(program), "check"], env=self.home.env, stdout=subprocess.PIPE,
                                  timeout=WAIT_S * 2)
            self.assertIn(b"this program 9.9.9: rrouter restart", done.stdout)


class RefusedHeadTest(RouterTest):

    def test_a_head_request_refused_by_the_parser_gets_no_body(self):
        answer = self.rrouter.exchange(b"HEAD / HTTP/1.1\r\nHost: localhost\r\nExpect: foo\r\n\r\n")
        self.assertTrue(answer.startswith(b"HTTP/1.1 417 ") and answer.endswith(b"\r\n\r\n"), answer)


# Faults of the machine ########################################################

def all_files(home):
    """Return {path: content} of all files under ~/.rrouter, but for the log and the lock."""
    return {path.name: path.read_bytes() for path in home.dir.rglob("*")
            if path.is_file() and path.name not in ("rrouter.log", "rrouter.lock", "fill")}


class FullDiskTest(unittest.TestCase):
    """No room for any byte: requests go on, nothing is lost, and it is told once."""

    def setUp(self):
        self.upstream = Upstream()
        self.addCleanup(self.upstream.close)
        self.home = Home(self.upstream, "auto", dict(rrouter.DEFAULT_CONFIG, auto={"failureThreshold": 1}))
        self.addCleanup(self.home.remove)
        self.old = all_files(self.home)

    def run_without_room(self, *arguments):
        """Run a command that can write to no file; a pipe takes what it says."""
        limits = 0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        return subprocess.run([sys.executable, RROUTER, *arguments], env=self.home.env, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                              timeout=WAIT_S * 4, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))

    def assert_told(self, done, *patterns):
        """It failed with one readable line."""
        self.assertEqual((done.returncode, done.stdout), (1, ""), done)
        self.assertRegex(done.stderr, r"^rrouter: [^\n]+\n\Z")
        self.assertNotRegex(done.stderr, "internal error|Traceback|output:")
        for pattern in patterns:
            self.assertRegex(done.stderr, pattern)

    def check_commands(self, run):
        """Each command tells of it, and what was there is there, unchanged and alone."""
        for command in (("claude",), ("auto",), ("mode", "antigravity"), ("config", "reset")):
            with self.subTest(command):
                self.assert_told(run(*command), r"\.rrouter/(mode|config\.json): .*(large|space).*free space")
                self.assertEqual(all_files(self.home), self.old)

    def test_commands_lose_nothing(self):
        self.check_commands(self.run_without_room)
        (self.home.dir / "config.json").unlink()
        del self.old["config.json"]
        self.assert_told(self.run_without_room("config", "edit"), r"config\.json: ")
        self.assertEqual(all_files(self.home), self.old)

    def test_start_and_serve_tell_the_reason(self):
        for command in ("start", "serve"):
            with self.subTest(command):
                self.assert_told(self.run_without_room(command), r"rrouter\.lock: cannot be written: .*free space")
                self.assertEqual(all_files(self.home), self.old)
        self.home.run("start", check=0)                     # nothing of that hinders a later one
        self.assertIsNotNone(get_health(self.home.port))
        self.home.run("stop", check=0)

    def assert_goes_on(self, router, *problems):
        """Requests are served, and auto mode switches; the problems stand in /health, each once."""
        self.upstream.play(error(503))
        self.assertEqual([router.post().status for _ in range(20)], [200] * 20)
        self.assertTrue(router.health()["autoSwitch"]["switched"])
        for problem in problems:
            router.wait_until(lambda: len([p for p in router.health()["problems"] if p.startswith(problem)]) == 1)
        self.assertEqual(router.printed().count("log lines are lost"), 1)

    def assert_recovers(self, router):
        """Without a restart: the problems go, lines are written again."""
        router.wait_until(lambda: router.post().status == 200 and router.health()["problems"] == [])
        router.wait_until(lambda: router.post().status == 200 and "[REQ]" in router.log())

    @unittest.skipUnless(os.path.exists("/dev/full"), "no /dev/full")
    def test_log_on_a_full_device_is_told_once_and_recovers(self):
        (self.home.dir / "logs").mkdir(mode=0o700)
        file = self.home.dir / "logs" / "rrouter.log"
        file.symlink_to("/dev/full")
        with Running(self.upstream, home=self.home) as router:
            self.assert_goes_on(router, "rrouter.log: ")
            file.unlink()
            self.assert_recovers(router)

    @unittest.skipUnless(hasattr(resource, "prlimit"), "the limit of another process cannot be set here")
    def test_state_that_cannot_be_written_is_told_once_and_recovers(self):
        with Running(self.upstream, home=self.home) as router:
            soft, hard = resource.prlimit(router.process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(router.process.pid, resource.RLIMIT_FSIZE, (0, hard))
            self.upstream.play(error(503))
            self.assertEqual([router.post().status for _ in range(20)], [200] * 20)
            for problem in ("state.json: ", "rrouter.log: "):
                router.wait_until(lambda: [p for p in router.health()["problems"] if p.startswith(problem)])
            self.assertTrue(router.health()["autoSwitch"]["switched"])
            allowed = {"mode", "config.json", "rrouter.pid", "run.json", "state.json"}
            router.wait_until(lambda: set(all_files(self.home)) <= allowed)     # tried again four times a second
            resource.prlimit(router.process.pid, resource.RLIMIT_FSIZE, (soft, hard))
            self.assert_recovers(router)
            router.wait_until(lambda: "503" in self.home.read("state.json"))

    def test_small_disk_that_fills_up_while_running(self):
        def mount(*command):
            return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                  timeout=WAIT_S * 2).returncode == 0

        if not shutil.which("mount") or not mount("mount", "-t", "tmpfs", "-o", "size=128k,mode=0700", "rrouter",
                                                  str(self.home.dir)):
            self.skipTest("no right to mount a small file system")
        self.addCleanup(mount, "umount", "-l", str(self.home.dir))
        for name, content in self.old.items():
            (self.home.dir / name).write_bytes(content)
        with Running(self.upstream, home=self.home) as router:
            router.post()
            self.old = {name: content for name, content in self.old.items() if name in ("mode", "config.json")}
            fill = self.home.dir / "fill"
            with contextlib.suppress(OSError), open(str(fill), "wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)
            # The last page of the log has some room left.
            router.wait_until(lambda: router.post().status == 200 and "log" in str(router.health()["problems"]))
            self.assert_goes_on(router, "rrouter.log: ", "state.json: ")
            for command in ("claude",), ("config", "reset"):
                self.assert_told(self.home.run(*command), "no space left")
                self.assertEqual({name: content for name, content in all_files(self.home).items()
                                  if name.startswith(("mode", "config"))}, self.old)
            fill.unlink()
            self.assert_recovers(router)
            self.home.run("claude", check=0)
            self.assertEqual(router.health()["mode"], "claude")


def without_privileges():
    """In a child before its program runs: let root be a user like any other, for whom rights to files count."""
    if os.geteuid() == 0:
        for capability in range(64):                        # PR_CAPBSET_DROP
            LIBC.prctl(24, capability, 0, 0, 0)


LIBC = ctypes.CDLL(None)


class Powerless(Running):
    """rrouter for whom rights to files count."""

    def start(self):
        self.launch(RROUTER, "serve", preexec_fn=without_privileges)


@unittest.skipIf(os.geteuid() == 0 and not hasattr(LIBC, "prctl"), "rights mean nothing to root")
class RightsTest(unittest.TestCase):
    """Directories that cannot be written, and files that cannot be read."""

    def setUp(self):
        self.upstream = Upstream()
        self.addCleanup(self.upstream.close)
        self.home = Home(self.upstream, "auto", dict(rrouter.DEFAULT_CONFIG, auto={"failureThreshold": 1}))
        self.addCleanup(self.home.remove)

    def run_powerless(self, *arguments):
        return subprocess.run([sys.executable, RROUTER, *arguments], env=self.home.env, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                              timeout=WAIT_S * 4, preexec_fn=without_privileges)

    def assert_told(self, *commands):
        """Each fails with one readable line that names the directory."""
        for command in commands:
            with self.subTest(command):
                done = self.run_powerless(*command)
                self.assertEqual((done.returncode, done.stdout), (1, ""), done)
                self.assertRegex(done.stderr, r"^rrouter: [^\n]*\.rrouter[^\n]*\n\Z")
                self.assertNotRegex(done.stderr, "internal error|Traceback")

    def test_home_that_becomes_read_only_while_running(self):
        with Powerless(self.upstream, home=self.home) as router:
            for directory in (self.home.dir / "logs", self.home.dir, self.home.root):
                directory.chmod(0o500)
                self.addCleanup(directory.chmod, 0o700)
            self.upstream.play(error(503))
            self.assertEqual([router.post().status for _ in range(5)], [200] * 5)
            self.assertTrue(router.health()["autoSwitch"]["switched"])
            told = router.wait_until(lambda: router.health()["problems"])
            self.assertEqual([problem.split(":")[0] for problem in told], ["state.json"])
            for _ in range(3):                              # something new to save each time, and a look at the files
                self.upstream.play(error(503), error(503))
                self.assertEqual(router.post().status, 503)
                router.process.send_signal(signal.SIGHUP)
            router.wait_until(lambda: router.log().count("SIGHUP") >= 1)
            self.assertEqual(router.health()["problems"], told)
            self.assertEqual(router.log().count("state.json: cannot be written"), 1)
            for directory in (self.home.root, self.home.dir):
                directory.chmod(0o700)
            router.wait_until(lambda: router.health()["problems"] == [] and (self.home.dir / "state.json").exists())
            self.assertIn("503", self.home.read("state.json"))

    def test_files_that_become_unreadable_while_running(self):
        with Powerless(self.upstream, home=self.home) as router:
            before = router.health()
            for name in ("mode", "config.json"):
                (self.home.dir / name).chmod(0)
                self.assertEqual([router.post().status for _ in range(3)], [200] * 3)
                health = router.health()
                self.assertEqual((health["mode"], health["defaultMode"]), (before["mode"], before["defaultMode"]))
                self.assertRegex(" ".join(health["problems"]), r"^%s: .*permission denied" % name)
                (self.home.dir / name).chmod(0o600)
                self.assertEqual(router.health()["problems"], [])
            self.assertEqual(router.log().count("permission denied"), 1)        # config.json's line

    def test_home_that_is_read_only_from_the_start(self):
        shutil.rmtree(str(self.home.dir))
        self.home.root.chmod(0o500)
        self.addCleanup(self.home.root.chmod, 0o700)
        self.assert_told(("serve",), ("start",), ("claude",), ("config", "reset"))
        for command in ("status",), ("stop",), ("mode",), ("config",), ("check",):
            done = self.run_powerless(*command)
            self.assertNotRegex(done.stderr, "internal error|Traceback")
            self.assertIn(done.returncode, (0, 1, 3))

    def test_log_that_cannot_be_opened_is_named(self):
        (self.home.dir / "logs" / "rrouter.log").mkdir(parents=True)
        done = self.run_powerless("start")
        self.assertEqual((done.returncode, done.stdout), (1, ""), done)
        self.assertRegex(done.stderr, r"^rrouter: .*rrouter\.log: is a directory\n\Z")

    @unittest.skipUnless(os.geteuid() == 0, "only root can give files away")
    def test_home_of_another_user_is_told(self):
        for rights in (0o700, 0o755, 0o777):
            with self.subTest(oct(rights)):
                for path in [self.home.dir, *self.home.dir.rglob("*")]:
                    os.chown(str(path), 65534, 65534)
                self.home.dir.chmod(rights)
                self.assert_told(("serve",), ("start",), ("claude",))


class LogGoneTest(unittest.TestCase):
    """Whatever becomes of the log while rrouter runs: requests go on, it is told once, and lines are written again."""

    def test_log_that_is_removed_or_replaced(self):
        upstream = Upstream()
        self.addCleanup(upstream.close)
        with Running(upstream) as router:
            logs = router.home.dir / "logs"
            file = logs / "rrouter.log"

            def a_directory():
                file.unlink()
                file.mkdir()

            def a_file():
                shutil.rmtree(str(logs))
                logs.write_text("")

            ways = (
                # how                                   whether it lasts until somebody mends it, and how
                (file.unlink,                           None),
                (lambda: shutil.rmtree(str(logs)),      None),
                (a_directory,                           file.rmdir),
                (a_file,                                logs.unlink))
            for number, (way, mend) in enumerate(ways):
                with self.subTest(number):
                    before = router.printed().count("log lines are lost")
                    way()
                    if mend:
                        router.wait_until(lambda: router.health()["problems"])
                        looks = time.monotonic() + 1        # several looks of the watcher, with requests between
                        while time.monotonic() < looks:
                            self.assertEqual(router.post().status, 200)
                            time.sleep(0.02)
                        self.assertRegex(" ".join(router.health()["problems"]), "^rrouter.log: ")
                        self.assertEqual(router.printed().count("log lines are lost"), before + 1)
                        mend()
                    router.wait_until(lambda: router.post().status == 200 and file.is_file()
                                      and "[REQ]" in router.log())
                    self.assertEqual(router.health()["problems"], [])


# Auto mode ####################################################################
# The upstream tells the two targets apart as CLIProxyAPI does, by the model: gemini-* is antigravity, claude-* claude.

SONNET, OPUS, HAIKU = "claude-sonnet-5-5", "claude-opus-5-5", "claude-haiku-4-5"
ON_ANTIGRAVITY = "gemini-claude-sonnet-4-5-thinking"            # what the default rules make of SONNET
COUNT_TOKENS = "/v1/messages/count_tokens?beta=true"
SSE_FIELDS = (("Content-Type", "text/event-stream"),)
PING, COMMENT = event("ping"), b": keep-alive\n\n"
START = event("message_start", message={"id": "msg_1"})
OVERLOADED = event("error", error={"type": "overloaded_error", "message": "Overloaded"})
AUTO_KEYS = {"active", "targets", "currentTarget", "switched", "switchCount", "failureCount", "timeoutCount", "reason",
             "switchedAt", "retryAt", "cooldownSeconds", "cooldownRemainingSeconds", "models"}
MODEL_KEYS = AUTO_KEYS - {"active", "targets", "models"}
UTC_TIME = r"^20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ$"


def events_of(target):
    """Return the events of a whole message that says which target wrote it."""
    return (START, event("content_block_delta", index=0, delta={"type": "text_delta", "text": "by " + target}),
            event("message_stop"))


def whole(target):
    return stream(*events_of(target))


def bytes_of(target):
    return b"".join(events_of(target))


def sse(*chunks, **options):
    """Return the answer of an event stream of these chunks, none included."""
    return Answer(200, chunks, fields=SSE_FIELDS, **options)


def pinging(gate):
    """Return an event stream that sends a comment every 20 ms until `gate` is set, and no event."""
    pings = (b"6\r\n: ok\n\n\r\n" for _ in iter(lambda: gate.wait(0.02), True))
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return Answer(raw=itertools.chain((head,), pings))


def target_of(received):
    """Return the target that a request was routed to; None if it does not begin with a model, as these all do."""
    found = re.match(rb'\s*\{\s*"model"\s*:\s*"(gemini|claude)-', received.body)
    return found and {b"gemini": "antigravity", b"claude": "claude"}[found.group(1)]


def auto_config(**auto):
    """Return the embedded default configuration with these values in its `auto` section."""
    rules = (("claude-sonnet-*", ON_ANTIGRAVITY), ("claude-opus-*", "gemini-claude-opus-4-5-thinking"),
             ("claude-haiku-*", "gemini-3-flash-preview"))
    mappings = [{"match": match, "rewrite": rewrite} for match, rewrite in rules]
    return {"modes": {"antigravity": {"mappings": mappings}, "claude": {"mappings": []}}, "defaultMode": "claude",
            "auto": dict({"targets": ["antigravity", "claude"]}, **auto)}


def upstream_fields(reply):
    """Return the fields of a reply without those that rrouter adds."""
    return [(name, value) for name, value in reply.fields if not name.lower().startswith("x-rrouter-")]


def epoch_of(text):
    """Return a time written as 2026-01-29T15:00:00Z in seconds since the epoch."""
    return calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ"))


class AutoTest(RouterTest):
    """Base of the tests of auto mode: `script` says what each target answers, `ask` posts and tells who was called.

    Calls are written as initials: "ac" is one call to antigravity, then one to claude.
    """

    mode = "auto"

    def setUp(self):
        super().setUp()
        self.script()
        self.upstream.default = self.answer
        self.set_mode(self.mode)

    def set_mode(self, mode):
        """Write the mode file by rename, as `rrouter MODE` does; in auto mode this clears all counts and waits."""
        self.rrouter.home.write("mode.new", mode + "\n")
        os.replace(str(self.rrouter.home.dir / "mode.new"), str(self.rrouter.home.dir / "mode"))

    def configure(self, content):
        """Write config.json for the rest of this test."""
        path = self.rrouter.home.dir / "config.json"
        before = path.read_text() if path.exists() else None
        self.addCleanup(lambda: path.unlink() if before is None else self.rrouter.home.write("config.json", before))
        self.rrouter.home.write("config.json", json.dumps(content))

    def script(self, antigravity=None, claude=None, other=None):
        """Set what the targets answer: an Answer, a function of the request, or a list of them, played once each.

        Where nothing is set or left, a target answers with a whole message.  `other` is for requests without a model.
        """
        self.scripts = {"antigravity": antigravity, "claude": claude, None: other}

    def answer(self, received):
        target = target_of(received)
        script = self.scripts[target]
        if isinstance(script, list):
            script = script.pop(0) if script else None
        if script is None:
            return whole(target) if target else Answer()
        return script(received) if callable(script) else script

    def gate(self):
        """Return an Event that is set at the latest when the test ends."""
        gate = threading.Event()
        self.addCleanup(gate.set)
        return gate

    def silent(self):
        """Return an answer that does not begin while the test runs."""
        return stream(before=self.gate())

    def calls(self, since=0):
        return "".join((target_of(received) or "-")[0] for received in list(self.upstream.received)[since:])

    def ask(self, model=SONNET, **members):
        """Post one message; return (reply, calls made for it)."""
        before = len(self.upstream.received)
        reply = self.rrouter.post(model, **members)
        return reply, self.calls(before)

    def begin(self, model=SONNET, target="/v1/messages?beta=true", **members):
        """Send one message and return the connection, its answer unread."""
        body = json.dumps(dict({"model": model, "stream": True, "messages": []}, **members)).encode()
        connection = self.rrouter.connect()
        self.addCleanup(connection.close)
        connection.sendall(request_bytes("POST", target, body, CLAUDE_HEADERS, self.rrouter.port))
        return connection

    def leave(self, *connections):
        """Close connections from the client's side and wait until rrouter has done with all requests."""
        for connection in connections:
            connection.close()
        self.rrouter.wait_until(lambda: not self.rrouter.health()["activeRequests"])

    def auto(self):
        return self.rrouter.health()["autoSwitch"]

    def trip(self, failure=None, model=SONNET):
        """Let antigravity fail three requests and see traffic switch to claude; it goes on failing afterwards."""
        self.script(antigravity=failure or error(429))
        for _ in range(3):
            self.assertEqual(self.ask(model)[1], "ac")
        self.assert_state("claude")

    def assert_served(self, reply, by, attempts):
        """The reply is the whole message of one target, and says so."""
        self.assertEqual((reply.status, reply.complete, reply.body), (200, True, bytes_of(by)))
        self.assertEqual((reply.header("x-rrouter-target"), reply.header("x-rrouter-attempts")), (by, str(attempts)))

    def assert_state(self, current, **values):
        """/health says that `current` is served from, and `values` of autoSwitch (failureCount=2 and so on)."""
        health = self.rrouter.health()
        found = {name: health["autoSwitch"][name] for name in values}
        self.assertEqual((health["currentTarget"], health["autoSwitch"]["currentTarget"], found),
                         (current, current, values))

    def assert_logged(self, pattern):
        """A line of the log that begins with [AUTO] after its time matches `pattern`."""
        expression = re.compile(r"^.*\[AUTO\].*(?:%s)" % pattern, re.I | re.M)
        try:
            self.rrouter.wait_until(lambda: expression.search(self.rrouter.log()))
        except AssertionError:
            self.fail("no [AUTO] line matches %r:\n%s" % (pattern, self.rrouter.log()[-2000:]))


def in_parallel(function, count):
    """Return what `count` calls of `function` at the same time return."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return [future.result(WAIT_S) for future in [pool.submit(function) for _ in range(count)]]


def receive_until(connection, marker):
    """Receive until `marker` has come; return all bytes so far."""
    data = b""
    while marker not in data:
        block = connection.recv(65536)
        if not block:
            raise AssertionError("the end came before %r: %r" % (marker, data))
        data += block
    return data


class RescueTest(AutoTest):
    """What fails an attempt before its first byte: the other target answers, the failed one is charged."""

    def assert_rescued_then_switched(self, failure, resent=False):
        """Three requests take two targets each, the fourth goes to the other at once."""
        self.set_mode("auto")
        self.script(antigravity=failure)
        for count in (1, 2, 3):
            reply, calls = self.ask()
            self.assert_served(reply, "claude", 2)
            self.assertEqual(calls.replace("aa", "a") if resent else calls, "ac")
            if count < 3:
                self.assert_state("antigravity", failureCount=count, switched=False, switchCount=0)
        self.assert_state("claude", failureCount=0, timeoutCount=0, switched=True, switchCount=1)
        reply, calls = self.ask()
        self.assert_served(reply, "claude", 1)
        self.assertEqual(calls, "c")

    def test_each_failing_status_is_rescued_thrice_then_switches(self):
        for status in (429, 500, 503, 529, 401, 403, 404, 400, 402, 408, 413, 422, 499, 502, 504, 599):
            with self.subTest(status=status):
                self.assert_rescued_then_switched(error(status))
                self.assertEqual(self.auto()["reason"], "3 consecutive HTTP errors, last %d" % status)

    def test_failed_event_stream_is_rescued_thrice_then_switches(self):
        ping_to_error = PING + COMMENT + PING + OVERLOADED
        cases = (
            # what antigravity sends            answer
            ("error event",                     sse(OVERLOADED)),
            ("pings and comments, then error",  sse(PING, COMMENT, PING, OVERLOADED)),
            ("the same in one chunk",           sse(ping_to_error)),
            ("the same byte by byte",           sse(*(ping_to_error[i:i + 1] for i in range(len(ping_to_error))))),
            ("error event with CRLF lines",     sse((PING + OVERLOADED).replace(b"\n", b"\r\n"))),
            ("error event without a blank",     sse(OVERLOADED.replace(b"event: ", b"event:"))),
            ("error event after the head",      sse(PING, OVERLOADED, framing="close")),
            ("message after the error event",   sse(OVERLOADED, *events_of("antigravity"))),
            ("error, connection cut",           sse(OVERLOADED, cut=True)),
            ("empty",                           sse()),
            ("empty, by length",                sse(framing="length")),
            ("empty, by close",                 sse(framing="close")),
            ("empty, cut",                      sse(cut=True)),
            ("only pings",                      sse(PING, PING)),
            ("only comments",                   sse(COMMENT, COMMENT)),
            ("only pings, cut",                 sse(PING, PING, cut=True)),
            ("an empty Content-Encoding",       Answer(200, OVERLOADED,
                                                       fields=SSE_FIELDS + (("Content-Encoding", ""),))),
        )
        for name, failure in cases:
            with self.subTest(name):
                self.assert_rescued_then_switched(failure)
                self.assertRegex(self.auto()["reason"], "^3 consecutive HTTP errors")

    def test_broken_connection_is_rescued_thrice_then_switches(self):
        cases = (
            # what antigravity sends before it closes   answer
            ("nothing",                                 Answer(hangup=True)),
            ("no status line",                          Answer(raw=b"SSH-2.0-OpenSSH_9.6\r\n\r\n")),
            ("half a status line",                      Answer(raw=b"HTTP/1.1 2")),
            ("half a head",                             Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Type: text/ev")),
            ("two lengths",                             Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n"
                                                                   b"Content-Length: 3\r\n\r\n{} ")),
            ("a status with half its body",             Answer(raw=b"HTTP/1.1 500 Oops\r\nContent-Length: 9\r\n\r\n{")),
        )
        for name, failure in cases:
            with self.subTest(name):        # a pooled connection that drops is first sent again: one call more
                self.assert_rescued_then_switched(failure, resent=True)

    def test_not_streamed_request_is_rescued(self):
        self.script(antigravity=error(529), claude=Answer(chunks=b'{"content":[]}'))
        reply, calls = self.ask(stream=False)
        self.assertEqual((reply.status, reply.body, calls), (200, b'{"content":[]}', "ac"))

    def test_rescue_sends_the_original_body_by_the_other_targets_rules(self):
        self.script(antigravity=error(500))
        body = b'{ "model" : "claude-opus-5-5", "messages":[],"n":1e-7, "s":"\\ud83d","stream":true}'
        reply = self.rrouter.request(body=body)
        first, second = [received.body for received in self.upstream.received]
        self.assertEqual(first, body.replace(b"claude-opus-5-5", b"gemini-claude-opus-4-5-thinking"))
        self.assertEqual(second, body)
        self.assertEqual(reply.header("x-rrouter-model"), "claude-opus-5-5")
        fields = [[field for field in received.fields if field[0].lower() != "content-length"]
                  for received in self.upstream.received]
        self.assertEqual(fields[0], fields[1])

    def test_success_answers_with_one_call(self):
        reply, calls = self.ask()
        self.assert_served(reply, "antigravity", 1)
        self.assertEqual((calls, reply.header("x-rrouter-model")), ("a", ON_ANTIGRAVITY))
        self.assert_state("antigravity", failureCount=0, switched=False)

    def test_success_of_the_target_starts_its_count_anew(self):
        failure = error(500)
        self.script(antigravity=[failure, failure, whole("antigravity"), failure, failure])
        self.assertEqual("".join(self.ask()[1] for _ in range(5)), "acac" "a" "acac")
        self.assert_state("antigravity", failureCount=2, switchCount=0)


class HeldHeadTest(AutoTest):
    """The head waits for the first event that is no ping or comment; after that nothing waits."""

    def test_head_is_held_until_the_first_event(self):
        for name, prelude in (("ping", (PING,)), ("comment", (COMMENT,)), ("half a ping", (PING[:9], PING[9:])),
                              ("line of a comment", (b":\n",))):
            with self.subTest(name):
                gate, chunks = self.gate(), prelude + events_of("antigravity")
                self.script(antigravity=sse(*chunks, gate=gate))
                before = len(self.upstream.received)
                connection = self.begin()
                self.upstream.wait(lambda upstream: len(upstream.received) > before)
                self.assertEqual(select.select([connection], [], [], 0.1)[0], [])
                gate.set()
                reply = read_reply(connection)
                self.assertEqual((reply.status, reply.complete, reply.body), (200, True, b"".join(chunks)))

    def test_first_event_goes_on_at_once(self):
        for name, first in (("event", START), ("pings before", PING + COMMENT + START),
                            ("no event line", b'data: {"type":"message_start"}\n\n'),
                            ("CRLF", START.replace(b"\n", b"\r\n"))):
            with self.subTest(name):
                gate = self.gate()
                self.script(antigravity=sse(first, *events_of("antigravity"), gate=gate))
                connection = self.begin()
                data = receive_until(connection, first)         # while the upstream waits
                self.assertTrue(data.startswith(b"HTTP/1.1 200 "), data)
                gate.set()
                self.assertIn(b"by antigravity", receive_until(connection, b"0\r\n\r\n"))

    def test_later_pings_and_comments_go_on_at_once(self):
        for later in (PING, COMMENT):
            gate = self.gate()
            self.script(antigravity=[sse(START, later, gate=gate), sse(START + later, PING, gate=self.gate())])
            connection = self.begin()
            receive_until(connection, START)
            gate.set()
            receive_until(connection, later)
            receive_until(self.begin(), START + later)

    def test_answer_that_is_no_event_stream_is_not_held(self):
        gate = self.gate()
        self.script(antigravity=Answer(chunks=(b'{"a":', b"1}"), gate=gate))
        connection = self.begin()
        receive_until(connection, b'{"a":')
        gate.set()
        receive_until(connection, b"0\r\n\r\n")

    def test_unusual_streams_pass_unchanged(self):
        text = event("content_block_delta", delta={"text": "\nevent: error\ndata: {}\n\n"})
        packed = gzip.compress(bytes_of("antigravity"))
        cases = (
            # stream                       answer
            ("first event of 300 KB",      sse(event("message_start", text="x" * 300000), *events_of("antigravity"))),
            ("a thousand pings",           sse(PING * 500, PING * 500, *events_of("antigravity"))),
            ("text that looks like error", sse(START, text, event("message_stop"))),
            ("such text first",            sse(text, START, event("message_stop"))),
            ("bytes one by one",           sse(*(bytes((byte,)) for byte in bytes_of("antigravity")))),
            ("compressed",                 Answer(200, (packed[:20], packed[20:]),
                                                  fields=SSE_FIELDS + (("Content-Encoding", "gzip"),))),
        )
        for name, answer in cases:
            with self.subTest(name):
                self.script(antigravity=answer)
                reply, calls = self.ask()
                self.assertEqual((reply.status, reply.complete, calls), (200, True, "a"))
                self.assertEqual(reply.body, b"".join(answer.chunks))
                self.assert_state("antigravity", failureCount=0)


class BrokenStreamTest(AutoTest):
    """What fails after the first byte went to the client is passed on as it is, counted, and never rescued."""

    def assert_passed_on_and_counted(self, failure, body, complete):
        self.set_mode("auto")
        self.script(antigravity=failure)
        for count in (1, 2, 3):
            reply, calls = self.ask()
            self.assertEqual((reply.status, reply.body, reply.complete, calls), (200, body, complete, "a"))
            self.assertEqual(reply.header("x-rrouter-attempts"), "1")
            if count < 3:
                self.assert_state("antigravity", failureCount=count)
        self.assert_state("claude", failureCount=0, switchCount=1)
        self.assert_served(self.ask()[0], "claude", 1)

    def test_late_error_event_is_passed_on_and_counted(self):
        message = events_of("antigravity")
        cases = (
            # where the error event stands    chunks
            ("after message_start",           (START, OVERLOADED)),
            ("in its chunk",                  (START + OVERLOADED,)),
            ("after pings",                   (PING, START, PING, OVERLOADED)),
            ("after the whole message",       message + (OVERLOADED,)),
            ("between other events",          message[:2] + (OVERLOADED,) + message[2:]),
            ("split in its name",             (START, OVERLOADED[:9], OVERLOADED[9:])),
            ("byte by byte",                  (START,) + tuple(bytes((byte,)) for byte in OVERLOADED)),
            ("with CRLF lines",               (START.replace(b"\n", b"\r\n"), OVERLOADED.replace(b"\n", b"\r\n"))),
        )
        for name, chunks in cases:
            with self.subTest(name):
                self.assert_passed_on_and_counted(sse(*chunks), b"".join(chunks), complete=True)

    def test_cut_answer_is_broken_off_and_counted(self):
        cases = (
            # what is cut          answer                                          bytes that came
            ("event stream",       sse(START, cut=True),                           START),
            ("event in its midst", sse(START, b"event: content_bl", cut=True),     START + b"event: content_bl"),
            ("chunk in its midst", Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                                              b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\nff\r\nevent: pi"
                                              % (len(START), START)),              START + b"event: pi"),
            ("known length",       Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                                              b"Content-Length: 9\r\n\r\n{"),      b"{"),
        )
        for name, answer, body in cases:
            with self.subTest(name):
                self.set_mode("auto")
                self.script(antigravity=answer)
                for _ in range(3):
                    reply, calls = self.ask()
                    self.assertEqual((reply.status, reply.complete, calls), (200, False, "a"))
                    self.assertTrue(body.startswith(reply.body), reply.body)
                self.assert_state("claude", switchCount=1)

    def test_success_is_counted_at_the_end_of_the_answer_only(self):
        gate = self.gate()
        self.script(antigravity=[error(500), error(500), sse(*events_of("antigravity"), gate=gate)])
        self.ask()
        self.ask()
        connection = self.begin()
        receive_until(connection, START)
        self.assert_state("antigravity", failureCount=2)
        gate.set()
        receive_until(connection, b"0\r\n\r\n")
        self.assert_state("antigravity", failureCount=0)


class BothFailTest(AutoTest):
    """Two failures: the client gets the more useful answer as it came, and a request at fault charges nobody."""

    RANKS = ((400, 413, 422), (429,), (401, 403), (404,), (500, 503, 529, 408))

    @staticmethod
    def refusal(status, target):
        return error(status, "%d by %s: \u00e9" % (status, target), fields=(
            ("Retry-After", str(status)), ("x-should-retry", "false"), ("Request-Id", "req_" + target)))

    def test_more_useful_answer_is_passed_on_whichever_came_first(self):
        rank_of = {status: rank for rank, statuses in enumerate(self.RANKS) for status in statuses}
        for first in rank_of:
            for second in rank_of:
                with self.subTest(antigravity=first, claude=second):
                    self.set_mode("auto")
                    answers = {"antigravity": self.refusal(first, "antigravity"),
                               "claude": self.refusal(second, "claude")}
                    self.script(**answers)
                    best = "antigravity" if rank_of[first] <= rank_of[second] else "claude"
                    reply, calls = self.ask()
                    self.assertEqual((reply.status, reply.body, calls),
                                     (answers[best].status, answers[best].chunks[0], "ac"))
                    self.assertEqual((reply.header("x-rrouter-target"), reply.header("x-rrouter-attempts")),
                                     (best, "2"))

    def test_answer_of_two_failures_keeps_its_head(self):
        answer = self.refusal(400, "claude")
        self.script(antigravity=error(529), claude=answer)
        reply, _ = self.ask()
        self.assertEqual(reply.reason, "Scripted")
        self.assertEqual(upstream_fields(reply), answer.fields + [("Content-Length", str(len(answer.chunks[0])))])

    def test_answer_is_preferred_to_a_dropped_connection(self):
        for status in (400, 429, 401, 404):
            for dropped in ("antigravity", "claude"):
                with self.subTest(status=status, dropped=dropped):
                    self.set_mode("auto")
                    other = "claude" if dropped == "antigravity" else "antigravity"
                    self.script(**{dropped: Answer(hangup=True), other: error(status, "kept")})
                    reply, _ = self.ask()
                    self.assertEqual((reply.status, reply.body), (status, error(status, "kept").chunks[0]))

    def test_two_dropped_connections_give_502(self):
        self.script(antigravity=Answer(hangup=True), claude=Answer(hangup=True))
        reply, _ = self.ask()
        self.assert_error(reply, 502, self.upstream.url.split("//")[1])

    def test_two_error_events_give_the_first_as_it_came(self):
        self.script(antigravity=sse(PING, OVERLOADED), claude=sse(event("error", error={"type": "api_error"})))
        reply, calls = self.ask()
        self.assertEqual((reply.status, reply.body, reply.complete, calls), (200, PING + OVERLOADED, True, "ac"))

    def test_refusal_is_preferred_to_an_error_event(self):
        self.script(antigravity=sse(OVERLOADED), claude=error(400, "kept"))
        reply, _ = self.ask()
        self.assertEqual((reply.status, reply.body), (400, error(400, "kept").chunks[0]))

    def test_request_refused_by_both_trips_nothing(self):
        cases = (
            # antigravity  claude
            (400, 400), (413, 413), (422, 422), (404, 404), (401, 401), (400, 404), (403, 401), (404, 400), (402, 413))
        for first, second in cases:
            with self.subTest(antigravity=first, claude=second):
                self.script(antigravity=error(first, "the very wording"), claude=error(second, "the very wording"))
                for _ in range(5):
                    reply, calls = self.ask()
                    self.assertEqual(calls, "ac")
                    self.assertIn(b"the very wording", reply.body)
                self.assert_state("antigravity", failureCount=0, timeoutCount=0, switchCount=0, models={})

    def test_refusal_shared_with_another_failure_is_charged(self):
        for first, second in ((400, 429), (400, 408), (404, 500), (401, 529), (429, 400), (408, 404), (429, 429),
                              (408, 408), (500, 400)):
            with self.subTest(antigravity=first, claude=second):
                self.set_mode("auto")
                self.script(antigravity=error(first), claude=error(second))
                self.ask()
                self.assert_state("antigravity", failureCount=1)

    def test_refusal_by_both_keeps_the_count_of_before(self):
        self.script(antigravity=[error(500), error(500), error(400), error(500)],
                    claude=[whole("claude"), whole("claude"), error(400)])
        for count in (1, 2, 2):
            self.ask()
            self.assert_state("antigravity", failureCount=count)
        self.ask()
        self.assert_state("claude", switchCount=1)

    def test_everything_down_goes_back_and_forth_without_longer_waits(self):
        self.script(antigravity=error(503, "a"), claude=error(529, "c"))
        for _ in range(20):
            reply, calls = self.ask()
            self.assertIn(reply.status, (503, 529))
            self.assertIn(calls, ("ac", "ca"))
        self.assertGreaterEqual(self.auto()["switchCount"], 3)
        self.script(antigravity=error(503))         # claude is up again
        for _ in range(4):
            self.assertEqual(self.ask()[0].status, 200)
        self.assert_state("claude", cooldownSeconds=1800)

    def test_target_that_recovers_after_both_were_down_serves_at_once(self):
        self.script(antigravity=error(503), claude=error(503))
        for _ in range(7):
            self.ask()
        self.script(claude=error(503))
        reply, calls = self.ask()
        self.assert_served(reply, "antigravity", len(calls))


class CountTest(AutoTest):
    """What counts for nobody, and results that come late."""

    def assert_untouched(self):
        self.assert_state("antigravity", failureCount=0, timeoutCount=0, switchCount=0, switched=False, models={})

    def test_failing_count_tokens_at_once_touch_nothing(self):
        self.script(antigravity=error(500, "as it is"))
        replies = in_parallel(lambda: self.rrouter.post(target=COUNT_TOKENS), 25)
        self.assertEqual([reply.status for reply in replies], [500] * 25)
        self.assertEqual({reply.body for reply in replies}, {error(500, "as it is").chunks[0]})
        self.assertEqual({reply.header("x-rrouter-attempts") for reply in replies}, {"1"})
        self.assertEqual(self.calls(), "a" * 25)
        self.assert_untouched()

    def test_successful_count_tokens_resets_nothing(self):
        self.script(antigravity=lambda received: Answer() if "count_tokens" in received.target else error(500))
        self.ask()
        self.ask()
        self.assertEqual(self.rrouter.post(target=COUNT_TOKENS).status, 200)
        self.ask()
        self.assert_state("claude", switchCount=1)

    def test_count_tokens_goes_to_the_current_target(self):
        self.trip()
        self.upstream.clear()
        self.assertEqual(self.rrouter.post(target=COUNT_TOKENS).header("x-rrouter-target"), "claude")
        self.assertEqual(self.calls(), "c")

    def test_requests_without_a_model_touch_nothing(self):
        cases = (
            # method, target             body
            ("GET", "/v1/models",        None),
            ("POST", "/v1/messages",     b'{"stream":true}'),
            ("POST", "/v1/messages",     b'{"model":null}'),
            ("POST", "/v1/messages",     b'["model"]'),
            ("POST", "/v1/messages",     b"not JSON"),
            ("POST", "/v1/messages",     b""),
        )
        for status in (500, 400, 429):
            self.script(other=error(status))
            for method, target, body in cases:
                with self.subTest(method=method, body=body, status=status):
                    before = len(self.upstream.received)
                    reply = self.rrouter.request(method, target, body)
                    self.assertEqual((reply.status, reply.header("x-rrouter-target"), self.calls(before)),
                                     (status, None, "-"))
        self.assert_untouched()

    def test_broken_requests_without_a_model_touch_nothing(self):
        self.script(other=Answer(hangup=True))
        for _ in range(4):
            self.assert_error(self.rrouter.request("GET", "/v1/models"), 502)
        self.assert_untouched()

    def test_forty_requests_failing_at_once_switch_once(self):
        gate = self.gate()
        self.script(antigravity=error(500, before=gate))
        with concurrent.futures.ThreadPoolExecutor(40) as pool:
            futures = [pool.submit(self.rrouter.post) for _ in range(40)]
            self.upstream.wait(lambda upstream: len(upstream.received) == 40)
            gate.set()
            for future in futures:
                self.assert_served(future.result(WAIT_S), "claude", 2)
        self.assertEqual((self.calls().count("a"), self.calls().count("c")), (40, 40))
        self.assert_state("claude", switchCount=1, failureCount=0, models={})
        self.assertEqual(self.ask()[1], "c")

    def test_late_failures_of_rescues_begun_before_the_switch_do_not_switch_back(self):
        gate = self.gate()
        self.script(antigravity=error(500), claude=error(503, before=gate))
        connections = []
        for number in (1, 2, 3):
            connections.append(self.begin())
            self.upstream.wait(lambda upstream: self.calls().count("c") == number)
        self.assert_state("claude", switchCount=1)
        gate.set()
        self.assertEqual([read_reply(connection).status for connection in connections], [500] * 3)
        self.assert_state("claude", switchCount=1)

    def test_late_failures_after_the_way_back_do_not_switch_again(self):
        gate = self.gate()
        self.script(antigravity=error(500, before=gate))
        late = [self.begin() for _ in range(3)]
        self.upstream.wait(lambda upstream: len(upstream.received) == 3)
        self.trip()
        self.script(claude=error(500))
        for _ in range(3):
            self.assertEqual(self.ask()[1], "ca")
        self.assert_state("antigravity", switchCount=2)
        self.script()
        gate.set()
        for connection in late:
            self.assert_served(read_reply(connection), "claude", 2)
        self.assert_state("antigravity", switchCount=2)

    def test_late_success_of_a_request_begun_before_the_switch_brings_nothing_back(self):
        gate = self.gate()
        self.script(antigravity=sse(*events_of("antigravity"), gate=gate))
        connection = self.begin()
        receive_until(connection, START)
        self.trip()
        gate.set()
        receive_until(connection, b"0\r\n\r\n")
        self.assert_state("claude", switched=True, switchCount=1)
        self.assertEqual(self.ask()[1], "c")


class LeaveTest(AutoTest):
    """Clients that leave: nobody is charged and nobody else is called."""

    def assert_nothing_counts_when_three_leave(self, when, calls, current="antigravity"):
        """Three clients at a time leave when `when(connection)` returns: no other call follows, nothing is charged."""
        self.upstream.clear()
        connections = [self.begin() for _ in range(3)]
        for connection in connections:
            when(connection)
        self.upstream.wait(lambda upstream: len(upstream.received) == 3)
        self.leave(*connections)
        self.upstream.wait(lambda upstream: upstream.closed >= 3)
        self.assertEqual(self.calls(), calls)
        self.assert_state(current, failureCount=0, timeoutCount=0, switchCount=int(current == "claude"))

    def test_clients_that_leave_during_the_first_attempt(self):
        held = sse(PING, *events_of("antigravity"), gate=self.gate())
        self.script(antigravity=[self.silent(), self.silent(), held])
        self.assert_nothing_counts_when_three_leave(lambda connection: None, "aaa")

    def test_clients_that_leave_while_pings_keep_coming(self):
        gate = self.gate()
        self.script(antigravity=lambda received: pinging(gate))
        self.assert_nothing_counts_when_three_leave(lambda connection: None, "aaa")

    def test_clients_that_leave_in_the_midst_of_a_stream(self):
        self.script(antigravity=sse(*events_of("antigravity"), gate=self.gate()))
        self.assert_nothing_counts_when_three_leave(lambda connection: receive_until(connection, START), "aaa")

    def test_clients_that_leave_the_target_switched_to(self):
        self.trip()
        self.script(claude=self.silent())
        self.assert_nothing_counts_when_three_leave(lambda connection: None, "ccc", "claude")

    def test_client_that_left_just_before_the_failure_came_gets_no_second_attempt(self):
        for name, failure in (("status", lambda gate: error(500, before=gate)),
                              ("error event", lambda gate: sse(PING, OVERLOADED, gate=gate)),
                              ("dropped", lambda gate: Answer(raw=(b"HTTP/1.1 200 OK\r\n", b""), gate=gate))):
            with self.subTest(name):
                self.upstream.clear()
                gate = self.gate()
                self.script(antigravity=failure(gate))
                connection = self.begin()
                self.upstream.wait(lambda upstream: len(upstream.received) == 1)
                connection.close()
                gate.set()
                self.leave()
                self.assertEqual(self.calls(), "a")
                self.assert_state("antigravity", failureCount=0)

    def test_client_that_leaves_during_the_second_attempt(self):
        cases = (
            # status of the first   charged to it
            (500,                   1),
            (404,                   0),         # might be the request's fault: who knows without the second answer
        )
        for status, charged in cases:
            with self.subTest(status=status):
                self.set_mode("auto")
                self.upstream.clear()
                self.script(antigravity=error(status), claude=self.silent())
                connection = self.begin()
                self.upstream.wait(lambda upstream: self.calls() == "ac")
                self.leave(connection)
                self.upstream.wait(lambda upstream: upstream.closed >= 1)
                self.assert_state("antigravity", failureCount=charged)


class ModelScopeTest(AutoTest):
    """One model of a target can be switched alone."""

    def setUp(self):
        super().setUp()
        self.exhaust("opus")

    def exhaust(self, *families):
        """Let antigravity answer 429 to these families of models."""
        self.script(antigravity=lambda received: error(429) if any(f in received.model for f in families)
                    else whole("antigravity"))

    def trip_opus(self):
        for _ in range(3):
            self.assert_served(self.ask(OPUS)[0], "claude", 2)
            self.assert_served(self.ask(HAIKU)[0], "antigravity", 1)

    def test_exhausted_model_is_switched_alone(self):
        self.trip_opus()
        health = self.auto()
        self.assertEqual((health["currentTarget"], health["switched"], health["switchCount"]),
                         ("antigravity", False, 0))
        self.assertEqual(list(health["models"]), [OPUS])
        model = health["models"][OPUS]
        self.assertLessEqual(MODEL_KEYS, set(model))
        self.assertEqual((model["currentTarget"], model["switched"], model["switchCount"], model["cooldownSeconds"]),
                         ("claude", True, 1, 1800))
        self.assertEqual(model["reason"], "3 consecutive HTTP errors, last 429")
        self.assert_served(self.ask(OPUS)[0], "claude", 1)
        self.assert_served(self.ask(HAIKU)[0], "antigravity", 1)
        self.assert_served(self.ask(SONNET)[0], "antigravity", 1)
        self.assert_logged("(?=.*SWITCH)(?=.*antigravity -> claude)(?=.*%s)" % OPUS)

    def test_failures_of_different_models_in_a_row_switch_the_target(self):
        self.exhaust("opus", "sonnet", "flash")
        for model in (OPUS, SONNET, HAIKU):
            self.assertEqual(self.ask(model)[1], "ac")
        self.assert_state("claude", switchCount=1, models={})
        for model in (OPUS, SONNET, HAIKU):
            self.assertEqual(self.ask(model)[1], "c")

    def test_one_model_failing_in_a_row_switches_the_target_and_not_the_model_too(self):
        self.trip(model=OPUS)
        self.assert_state("claude", switchCount=1, models={})

    def test_two_models_are_switched_each_alone(self):
        self.exhaust("opus", "sonnet")
        for _ in range(3):
            for model in (OPUS, HAIKU, SONNET, HAIKU):
                self.ask(model)
        self.assertEqual(sorted(self.auto()["models"]), [OPUS, SONNET])
        self.assert_state("antigravity", switchCount=0)

    def test_success_of_the_model_starts_its_count_anew(self):
        answers = {OPUS: iter((error(429), error(429), whole("antigravity"), error(429), error(429)))}
        self.script(antigravity=lambda received: next(answers[OPUS]) if "opus" in received.model
                    else whole("antigravity"))
        for _ in range(5):
            self.ask(OPUS)
            self.ask(HAIKU)
        self.assert_state("antigravity", switchCount=0, models={})

    def test_switch_of_the_target_starts_the_counts_of_its_models_anew(self):
        for _ in range(2):                          # two failures of opus, not in a row for the target
            self.ask(OPUS)
            self.ask(HAIKU)
        self.trip(model=SONNET)
        self.script(antigravity=whole("antigravity"), claude=error(500))
        for _ in range(3):
            self.assertEqual(self.ask(SONNET)[1], "ca")
        self.exhaust("opus")
        self.assert_state("antigravity", switchCount=2)
        self.ask(OPUS)
        self.ask(HAIKU)
        self.assert_state("antigravity", models={})

    def test_model_switched_alone_stays_with_its_own_wait_when_the_target_switches(self):
        self.trip_opus()
        before = self.auto()["models"][OPUS]
        self.exhaust("opus", "flash", "sonnet")
        for _ in range(3):
            self.assertEqual(self.ask(HAIKU)[1], "ac")
        after = self.auto()
        self.assertEqual((after["currentTarget"], after["switchCount"]), ("claude", 1))
        self.assertEqual(after["models"][OPUS]["retryAt"], before["retryAt"])
        self.assertEqual(self.ask(OPUS)[1], "c")

    def test_model_failing_on_the_other_target_switches_back_alone(self):
        self.trip_opus()
        self.script(claude=error(500))
        for _ in range(3):
            self.assertEqual(self.ask(OPUS)[1], "ca")
            self.assertEqual(self.ask(HAIKU)[1], "a")
        self.assertEqual(self.ask(OPUS)[1], "a")
        self.assert_state("antigravity", switchCount=0)


class SwitchTest(AutoTest):
    """How long a switch waits, what it tells, and what clears it."""

    def wait_of(self, *answers):
        """Switch by these three answers of antigravity; return the seconds left."""
        self.set_mode("auto")
        self.script(antigravity=list(answers))
        for _ in range(3):
            self.ask()
        self.assert_state("claude")
        return self.auto()["cooldownRemainingSeconds"]

    def test_retry_after_of_the_last_answer_only_shortens(self):
        def date(seconds):
            return email.utils.formatdate(time.time() + seconds, usegmt=True)

        cases = (
            # Retry-After        seconds waited
            ("600",              600),
            ("60",               60),
            ("5",                60),       # never below one minute
            ("0",                60),
            ("86400",            1800),     # never longer than without
            (date(600),          600),
            (date(-600),         60),
            (date(86400),        1800),
            ("soon",             1800),
            ("1" * 5000,         1800),
            ("",                 1800),
            ("600\r\nRetry-After: 600", 600),       # as two proxies in a row add it
            ("600\r\nRetry-After:", 600),
        )
        for value, seconds in cases:
            with self.subTest(value[:40]):
                left = self.wait_of(error(429), error(429), error(429, fields=(("Retry-After", value),)))
                self.assertLessEqual(left, seconds + 1)
                self.assertGreater(left, seconds - 10)

    def test_retry_after_of_earlier_answers_is_ignored(self):
        hurried = error(429, fields=(("Retry-After", "60"),))
        self.assertGreater(self.wait_of(hurried, hurried, error(429)), 1790)

    def test_retry_after_of_any_failing_status_counts(self):
        self.assertLessEqual(self.wait_of(error(429), error(500), error(503, fields=(("Retry-After", "90"),))), 90)

    def test_health_tells_the_switch(self):
        fresh = self.auto()
        self.assertEqual(set(fresh), AUTO_KEYS)
        self.assert_state("antigravity", active=True, targets=["antigravity", "claude"], switched=False, switchCount=0,
                          failureCount=0, timeoutCount=0, models={})
        for name in ("reason", "switchedAt", "retryAt", "cooldownSeconds", "cooldownRemainingSeconds"):
            self.assertFalse(fresh[name], name)
        before = int(time.time())
        self.trip()
        health = self.auto()
        self.assertEqual(set(health), AUTO_KEYS)
        self.assert_state("claude", active=True, switched=True, switchCount=1, failureCount=0, timeoutCount=0,
                          reason="3 consecutive HTTP errors, last 429", cooldownSeconds=1800)
        self.assertRegex(health["switchedAt"], UTC_TIME)
        self.assertRegex(health["retryAt"], UTC_TIME)
        switched, retry = [epoch_of(health[name]) for name in ("switchedAt", "retryAt")]
        self.assertTrue(before - 1 <= switched <= time.time() + 1, health)
        self.assertAlmostEqual(retry - switched, 1800, delta=1)
        self.assertTrue(1790 <= health["cooldownRemainingSeconds"] <= 1800, health)

    def test_log_tells_each_decision(self):
        self.trip()
        for count in (1, 2):
            self.assert_logged(r"(?=.*antigravity)(?=.*\b429\b)(?=.*\b%d\b)" % count)
        self.assert_logged(r"SWITCH antigravity -> claude: 3 consecutive HTTP errors, last 429; retry in 30m\b")
        self.rrouter.home.run("auto", check=0)
        self.assert_logged("reset|clear")

    def test_status_tells_the_switch_in_words(self):
        self.trip()
        text = " ".join(self.rrouter.home.run("status", check=0).stdout.split())
        self.assertRegex(text, r"on claude since \d\d:\d\d because antigravity gave 3 HTTP errors in a row, last 429; "
                               r"tries antigravity again in (29|30) min")

    def test_second_switch_waits_longer(self):
        waits = []
        for _ in range(3):
            self.trip()
            waits.append(self.auto()["cooldownSeconds"])
            self.ask()                              # the target switched to answers
            self.script(claude=error(500))
            for _ in range(3):                      # and then fails in turn
                self.assertEqual(self.ask()[1], "ca")
            self.assert_state("antigravity")
        self.assertEqual(waits, [1800, 3600, 7200])

    def test_fallback_that_fails_thrice_switches_back_before_the_wait_is_over(self):
        self.trip()
        self.script(claude=error(503))
        for count in (1, 2, 3):
            reply, calls = self.ask()
            self.assert_served(reply, "antigravity", 2)
            self.assertEqual(calls, "ca")
            if count < 3:
                self.assert_state("claude", failureCount=count, switchCount=1)
        self.assert_state("antigravity", failureCount=0, switchCount=2)
        self.assertFalse(self.auto()["cooldownRemainingSeconds"])
        self.assertFalse(self.auto()["retryAt"])
        self.assert_served(self.ask()[0], "antigravity", 1)
        self.assert_logged("SWITCH claude -> antigravity: 3 consecutive HTTP errors, last 503")

    def test_auto_again_clears(self):
        ways = (
            # way                       how
            ("rrouter auto",            lambda: self.rrouter.home.run("auto", check=0)),
            ("file renamed",            lambda: self.set_mode("auto")),
            ("file written",            lambda: self.rrouter.home.write("mode", "AUTO \n")),
            ("leaving by the command",  lambda: (self.rrouter.home.run("claude", check=0), self.set_mode("auto"))),
            ("leaving by the file",     lambda: (self.set_mode("antigravity"), self.ask(), self.set_mode("auto"))),
            ("other auto section",      lambda: self.configure(auto_config(failureThreshold=3, timeoutThreshold=7))),
        )
        for name, way in ways:
            with self.subTest(name):
                self.trip()
                way()
                self.script()
                self.assert_served(self.ask()[0], "antigravity", 1)
                self.assert_state("antigravity", switched=False, switchCount=0, failureCount=0, models={})
                self.assertFalse(self.auto()["retryAt"])

    def test_clearing_forgets_counts_below_the_threshold(self):
        self.script(antigravity=error(500))
        for _ in range(3):
            self.ask()
            self.ask()
            self.assert_state("antigravity", failureCount=2)
            self.set_mode("auto")
            self.assert_state("antigravity", failureCount=0)

    def test_late_failure_after_clearing_counts_nothing(self):
        gate = self.gate()
        self.script(antigravity=error(500, before=gate))
        connections = [self.begin() for _ in range(3)]
        self.upstream.wait(lambda upstream: len(upstream.received) == 3)
        self.set_mode("auto")
        self.assert_state("antigravity", failureCount=0)
        gate.set()
        for connection in connections:
            self.assert_served(read_reply(connection), "claude", 2)
        self.assert_state("antigravity", failureCount=0, switchCount=0)

    def test_request_keeps_mode_and_rules_of_its_begin(self):
        gate = self.gate()
        self.script(antigravity=error(500, before=gate))
        connection = self.begin()
        self.upstream.wait(lambda upstream: len(upstream.received) == 1)
        changed = auto_config()
        changed["modes"]["claude"]["mappings"] = [{"match": "*", "rewrite": "claude-other"}]
        self.configure(changed)
        self.set_mode("antigravity")
        self.assertEqual(self.rrouter.health()["mode"], "antigravity")
        gate.set()
        reply = read_reply(connection)
        self.assert_served(reply, "claude", 2)
        self.assertEqual(self.upstream.models(), [ON_ANTIGRAVITY, SONNET])
        self.assertEqual(self.ask()[0].status, 500)         # and the next one lives by the new mode
        self.set_mode("claude")
        self.ask()
        self.assertEqual(self.upstream.models()[2:], [ON_ANTIGRAVITY, "claude-other"])

    def test_targets_and_thresholds_come_from_the_configuration(self):
        config = auto_config(targets=["claude", "spare"], failureThreshold=2, cooldownMinutes=[0.5])
        config["modes"]["spare"] = {"mappings": [{"match": "*", "rewrite": "gemini-spare"}]}
        self.configure(config)
        self.script(claude=error(500))
        self.assertEqual([self.ask()[1] for _ in range(3)], ["ca", "ca", "a"])
        self.assertEqual(self.ask()[0].header("x-rrouter-target"), "spare")
        self.assert_state("spare", targets=["claude", "spare"], cooldownSeconds=30,
                          reason="2 consecutive HTTP errors, last 500")


class SilenceTest(AutoTest):
    """The first-byte limit, 0.2 s here: silence is rescued and counted as a timeout."""

    config = auto_config(firstByteTimeoutSeconds=0.2)

    def test_silence_is_rescued_and_two_timeouts_switch(self):
        self.script(antigravity=self.silent())
        for count in (1, 2):
            reply, calls = self.ask()
            self.assert_served(reply, "claude", 2)
            self.assertEqual(calls, "ac")
            self.upstream.wait(lambda upstream: upstream.closed >= count)   # the silent one is not left running
            if count < 2:
                self.assert_state("antigravity", timeoutCount=1, failureCount=0)
        self.assert_state("claude", timeoutCount=0, failureCount=0, switchCount=1)
        self.assertRegex(self.auto()["reason"], r"\b2\b.*timeouts")
        self.assertEqual(self.ask()[1], "c")
        self.assert_logged("SWITCH antigravity -> claude: .*timeouts.*; retry in 30m")

    def test_head_or_pings_alone_do_not_stop_the_limit(self):
        cases = (
            # what antigravity sends before it stays silent      answer
            ("half a head",         Answer(raw=(b"HTTP/1.1 200 OK\r\nContent-Type:", b""), gate=self.gate())),
            ("pings",               sse(PING, *events_of("antigravity"), gate=self.gate())),
            ("comments",            sse(COMMENT + COMMENT, *events_of("antigravity"), gate=self.gate())),
        )
        for name, answer in cases:
            with self.subTest(name):
                self.set_mode("auto")
                self.script(antigravity=answer)
                self.assert_served(self.ask()[0], "claude", 2)
                self.assert_state("antigravity", timeoutCount=1, failureCount=0)

    def test_pings_that_keep_coming_do_not_stop_the_limit(self):
        gate = self.gate()
        self.script(antigravity=lambda received: pinging(gate))
        self.assert_served(self.ask()[0], "claude", 2)
        self.assert_state("antigravity", timeoutCount=1, failureCount=0)

    def test_timeouts_and_failures_are_counted_apart(self):
        self.script(antigravity=[error(500), self.silent(), error(500), error(500)])
        for failures, timeouts in ((1, 0), (1, 1), (2, 1)):
            self.ask()
            self.assert_state("antigravity", failureCount=failures, timeoutCount=timeouts)
        self.ask()
        self.assert_state("claude", reason="3 consecutive HTTP errors, last 500")

    def test_success_starts_both_counts_anew(self):
        self.script(antigravity=[error(500), self.silent(), whole("antigravity")])
        for failures, timeouts in ((1, 0), (1, 1), (0, 0)):
            self.ask()
            self.assert_state("antigravity", failureCount=failures, timeoutCount=timeouts)

    def test_two_timeouts_of_one_model_switch_it_alone(self):
        silent = self.silent()
        self.script(antigravity=lambda received: silent if "opus" in received.model else whole("antigravity"))
        for model in (OPUS, HAIKU, OPUS):
            self.ask(model)
        self.assertEqual(list(self.auto()["models"]), [OPUS])
        self.assert_state("antigravity", switchCount=0)
        self.assertEqual((self.ask(OPUS)[1], self.ask(HAIKU)[1]), ("c", "a"))

    def test_request_without_stream_has_twice_as_long(self):
        self.script(antigravity=self.silent())
        slow = self.begin(OPUS, stream=False)
        self.upstream.wait(lambda upstream: len(upstream.received) == 1)
        quick = self.begin(HAIKU, stream=True)
        self.upstream.wait(lambda upstream: self.calls() == "aacc")
        self.assertEqual(self.upstream.models()[2:], [HAIKU, OPUS])
        for connection in (slow, quick):
            self.assert_served(read_reply(connection), "claude", 2)

    def test_silence_of_both_gives_504_and_any_answer_is_preferred(self):
        for first, second, status in ((503, None, 503), (None, 503, 503), (None, 408, 408), (None, 400, 400),
                                      (None, None, 504)):
            with self.subTest(antigravity=first, claude=second):
                self.set_mode("auto")
                self.script(antigravity=error(first) if first else self.silent(),
                            claude=error(second) if second else self.silent())
                reply, calls = self.ask()
                self.assertEqual((reply.status, calls, reply.header("x-rrouter-attempts")), (status, "ac", "2"))
                if status == 504:
                    self.assert_error(reply, 504)
                self.assert_state("antigravity", failureCount=int(bool(first)), timeoutCount=int(not first))

    def test_nothing_else_has_a_limit(self):
        """A stream that began, count_tokens, a request without a model, and one of an explicit mode wait on."""
        gate = self.gate()
        self.script(antigravity=lambda received: Answer(before=gate) if "count_tokens" in received.target
                    else sse(*events_of("antigravity"), gate=gate), other=Answer(before=gate))
        stream_begun = self.begin()
        receive_until(stream_begun, START)
        waiting = [self.begin(target=COUNT_TOKENS), self.begin(model=None)]
        self.set_mode("claude")
        self.scripts["claude"] = lambda received: whole("claude") if gate.is_set() else stream(before=gate)
        waiting.append(self.begin())
        self.upstream.wait(lambda upstream: len(upstream.received) == 4)
        self.set_mode("auto")
        self.script(antigravity=self.silent())      # two expired limits say that theirs would have expired as well
        for _ in range(2):
            self.assert_served(self.ask()[0], "claude", 2)
        gate.set()
        self.assertEqual([read_reply(connection).status for connection in waiting], [200] * 3)
        receive_until(stream_begun, b"message_stop")


class ProbeTest(AutoTest):
    """After the wait, 0.24 s here, one request tries the failed target."""

    config = auto_config(cooldownMinutes=[0.004, 60, 120, 240])

    def wait_out(self, seconds=0.24):
        """Return when a wait of this length that has begun is certainly over."""
        end = time.monotonic() + seconds
        self.rrouter.wait_until(lambda: time.monotonic() > end)

    def trip_and_wait(self):
        self.trip()
        self.wait_out()
        self.upstream.clear()

    def begin_probe(self):
        """Send requests until one is sent to antigravity; return its connection, its answer unread.

        For a client that left cannot know when rrouter has noticed.
        """
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            self.upstream.clear()
            connection = self.begin()
            self.upstream.wait(lambda upstream: upstream.received)
            if self.calls() == "a":
                return connection
            read_reply(connection)
        self.fail("the place of the probe is not free again")

    def test_successful_probe_brings_the_target_back(self):
        self.trip_and_wait()
        self.assert_state("claude", switched=True)
        self.script()
        self.assert_served(self.ask()[0], "antigravity", 1)
        self.assert_state("antigravity", switched=False, switchCount=1, failureCount=0)
        self.assertEqual((self.ask()[1], self.calls()), ("a", "aa"))
        self.assert_logged("prob")
        self.assert_logged("recover|back")

    def test_failed_probe_is_rescued_and_waits_longer(self):
        self.trip_and_wait()
        reply, calls = self.ask()
        self.assert_served(reply, "claude", 2)
        self.assertEqual(calls, "ac")
        self.assert_state("claude", switchCount=2, cooldownSeconds=3600, failureCount=0)
        self.assertGreater(self.auto()["cooldownRemainingSeconds"], 3590)
        self.assertEqual(self.ask()[1], "c")

    def test_probe_that_breaks_off_counts_as_failed(self):
        self.trip_and_wait()
        self.script(antigravity=sse(START, cut=True))
        reply, calls = self.ask()
        self.assertEqual((reply.complete, calls), (False, "a"))
        self.assert_state("claude", switchCount=2, cooldownSeconds=3600)

    def test_hanging_probe_is_the_only_one(self):
        cases = (
            # how the probe ends                                 served from afterwards
            (lambda gate: stream(*events_of("antigravity"), before=gate),     "antigravity"),
            (lambda gate: error(500, before=gate),                            "claude"),
        )
        for answer, current in cases:
            with self.subTest(current):
                self.set_mode("auto")
                self.trip_and_wait()
                gate = self.gate()
                self.script(antigravity=answer(gate))
                probe = self.begin()
                self.upstream.wait(lambda upstream: len(upstream.received) == 1)
                for reply in in_parallel(self.rrouter.post, 8) + [self.rrouter.post(OPUS)]:
                    self.assert_served(reply, "claude", 1)
                self.assertEqual(self.calls(), "a" + "c" * 9)
                self.assert_state("claude", switched=True)
                gate.set()
                self.assertEqual(read_reply(probe).status, 200)
                self.assert_state(current)

    def test_probe_in_mid_answer_is_the_only_one(self):
        self.trip_and_wait()
        gate = self.gate()
        self.script(antigravity=sse(*events_of("antigravity"), gate=gate))
        probe = self.begin()
        receive_until(probe, START)
        self.assertEqual([self.ask()[1] for _ in range(3)], ["c"] * 3)
        gate.set()
        receive_until(probe, b"0\r\n\r\n")
        self.assert_state("antigravity", switched=False)

    def test_requests_at_once_after_the_wait_send_one_probe(self):
        self.trip_and_wait()
        gate = self.gate()
        self.script(antigravity=stream(before=gate), claude=stream(before=gate))
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            futures = [pool.submit(self.rrouter.post) for _ in range(20)]
            self.upstream.wait(lambda upstream: len(upstream.received) == 20)
            self.assertEqual(self.calls().count("a"), 1)
            gate.set()
            self.assertEqual({future.result(WAIT_S).status for future in futures}, {200})

    def test_client_that_leaves_a_probe_frees_its_place(self):
        answers = (
            # how far the probe got     answer
            ("silent",                  self.silent()),
            ("begun",                   sse(START, event("message_stop"), gate=self.gate())),
        )
        self.trip_and_wait()
        for name, answer in answers:
            with self.subTest(name):
                self.script(antigravity=answer)
                connection = self.begin_probe()
                if name == "begun":
                    receive_until(connection, START)
                self.leave(connection)
                self.assert_state("claude", switched=True, switchCount=1)
        self.script()
        self.begin_probe()
        self.rrouter.wait_until(lambda: not self.rrouter.health()["activeRequests"])
        self.assert_state("antigravity", switched=False, switchCount=1)

    def test_probe_refused_by_both_frees_its_place(self):
        self.trip_and_wait()
        self.script(antigravity=error(400), claude=error(400))
        for _ in range(3):
            self.assertEqual(self.ask()[1], "ac")
        self.assert_state("claude", switchCount=1)
        self.script()
        self.assertEqual(self.ask()[1], "a")

    def test_count_tokens_and_requests_without_a_model_do_not_probe(self):
        self.trip_and_wait()
        self.assertEqual(self.rrouter.post(target=COUNT_TOKENS).header("x-rrouter-target"), "claude")
        self.rrouter.request("GET", "/v1/models")
        self.assertEqual(self.calls(), "c-")
        self.assert_state("claude", switchCount=1, switched=True)
        self.script()
        self.assertEqual(self.ask()[1], "a")

    def test_probe_begun_before_clearing_counts_nothing(self):
        self.trip_and_wait()
        gate = self.gate()
        self.script(antigravity=error(500, before=gate))
        probe = self.begin()
        self.upstream.wait(lambda upstream: len(upstream.received) == 1)
        self.set_mode("auto")
        self.assert_state("antigravity", switchCount=0)
        gate.set()
        self.assert_served(read_reply(probe), "claude", 2)
        self.assert_state("antigravity", switchCount=0, failureCount=0)

    def test_switch_back_while_a_probe_hangs_takes_its_result_for_nothing(self):
        self.trip_and_wait()
        gate = self.gate()
        self.script(antigravity=[error(500, before=gate)], claude=error(503))
        probe = self.begin()
        self.upstream.wait(lambda upstream: len(upstream.received) == 1)
        for _ in range(3):
            self.assertEqual(self.ask()[1], "ca")
        self.assert_state("antigravity", switchCount=2)
        self.script()
        gate.set()
        self.assert_served(read_reply(probe), "claude", 2)
        self.assert_state("antigravity", switchCount=2)

    def test_model_switched_alone_is_probed_by_itself(self):
        self.script(antigravity=lambda received: error(429) if "opus" in received.model else whole("antigravity"))
        for _ in range(3):
            self.ask(OPUS)
            self.ask(HAIKU)
        self.assertEqual(list(self.auto()["models"]), [OPUS])
        self.wait_out()
        self.assertEqual((self.ask(HAIKU)[1], self.ask(OPUS)[1]), ("a", "ac"))      # its probe fails
        self.assertEqual((self.auto()["models"][OPUS]["switchCount"], self.auto()["models"][OPUS]["cooldownSeconds"]),
                         (2, 3600))
        self.assert_state("antigravity", switchCount=0)

    def test_model_recovers_alone(self):
        self.script(antigravity=lambda received: error(429) if "opus" in received.model else whole("antigravity"))
        for _ in range(3):
            self.ask(OPUS)
            self.ask(HAIKU)
        self.wait_out()
        self.script()
        self.assertEqual(self.ask(OPUS)[1], "a")
        self.assert_state("antigravity", models={})
        self.assertEqual(self.ask(OPUS)[1], "a")

    def test_switch_soon_after_a_recovery_waits_longer(self):
        self.configure(auto_config(cooldownMinutes=[0.01, 60]))
        self.trip()
        self.wait_out(0.6)
        self.script()
        self.assertEqual(self.ask()[1], "a")
        self.trip()
        self.assert_state("claude", switchCount=2, cooldownSeconds=3600)

    def test_switch_long_after_a_recovery_waits_as_the_first(self):
        self.trip_and_wait()
        self.script()
        self.assertEqual(self.ask()[1], "a")
        self.wait_out(2 * 0.24)
        self.trip()
        self.assertLess(self.auto()["cooldownSeconds"], 3600)
        self.assert_state("claude", switchCount=2)

    def test_last_wait_is_kept(self):
        self.configure(auto_config(cooldownMinutes=[0.001]))
        self.trip()
        for count in (2, 3, 4):
            self.wait_out(0.06)
            self.assertEqual(self.ask()[1], "ac")
            self.assert_state("claude", switchCount=count)


class UpstreamGoneTest(AutoTest):
    """The upstream process itself away: nobody's fault."""

    def reopen(self):
        type(self).upstream = Upstream(self.answer, self.upstream.port)
        self.addClassCleanup(self.upstream.close)

    def close_listener(self):
        with contextlib.suppress(OSError):
            self.upstream.listener.shutdown(socket.SHUT_RDWR)
        self.upstream.listener.close()

    def test_refused_connection_is_502_and_counts_nothing(self):
        self.assert_served(self.ask()[0], "antigravity", 1)
        self.upstream.close()
        for _ in range(4):
            reply = self.rrouter.post()
            self.assert_error(reply, 502, "127.0.0.1:%d" % self.upstream.port)
            self.assertEqual(reply.header("x-rrouter-attempts"), "1")
        self.assert_state("antigravity", failureCount=0, timeoutCount=0, switchCount=0, models={})
        self.reopen()
        self.assert_served(self.ask()[0], "antigravity", 1)

    def test_second_attempt_that_is_refused_charges_the_first(self):
        for status in (404, 400, 500, 429):
            with self.subTest(status=status):
                self.set_mode("auto")
                self.upstream.break_connections()

                def fail_and_go(received):
                    self.close_listener()
                    return error(status, "last words", close=True)

                self.script(antigravity=fail_and_go)
                reply, calls = self.ask()
                self.assertEqual((reply.status, reply.body, calls),
                                 (status, error(status, "last words").chunks[0], "a"))
                self.assert_state("antigravity", failureCount=1)
                self.upstream.close()
                self.reopen()

    def test_refused_probe_frees_its_place(self):
        self.configure(auto_config(cooldownMinutes=[0.001]))
        self.trip()
        end = time.monotonic() + 0.06
        self.rrouter.wait_until(lambda: time.monotonic() > end)
        self.upstream.close()
        for _ in range(2):
            self.assert_error(self.rrouter.post(), 502)
        self.assert_state("claude", switchCount=1)
        self.script()
        self.reopen()
        self.assertEqual(self.ask()[1], "a")
        self.assert_state("antigravity", switchCount=1)


class Cutting(Upstream):
    """An upstream that closes each connection after a raw answer, by a reset if `resets` says so."""

    resets = False

    def _play(self, connection, answer, method):
        going_on = super()._play(connection, answer, method)
        if self.resets and not going_on:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return going_on


class CutAnywhereTest(AutoTest):
    """The upstream ends after each byte of an answer in turn.

    The client gets the whole answer only if all of it came; else an error, the other target's answer, or the payload
    that came and then a broken connection, which no client takes for a whole answer.
    """

    BODY = b'{"type":"message","content":[{"text":"antigravity"}]}'
    FIRST, SECOND = event("message_start", message={"id": "antigravity"}), event("message_stop")
    JSON = ("Content-Type", "application/json")
    # What is cut, and how much of the payload has to have come for the answer to be the client's in auto mode.
    KINDS = {
        "length": (b"", Answer(200, BODY, fields=(JSON,), framing="length"), 0),
        "chunked": (b"", Answer(200, (BODY[:20], BODY[20:]), fields=(JSON,)), 0),
        "stream": (b"", stream(event("ping"), FIRST, SECOND), len(event("ping") + FIRST)),
        "interim": (b"HTTP/1.1 103 Early Hints\r\nLink: </>\r\n\r\n", Answer(200, BODY, framing="length"), 0)}
    upstream_class = Cutting
    config = auto_config(failureThreshold=1000, timeoutThreshold=1000)

    @staticmethod
    def wire_of(before, answer):
        """Return the bytes of head and of body."""
        chunks = [b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in answer.chunks] + [b"0\r\n\r\n"]
        return before + answer.head(), b"".join(chunks if answer.framing == "chunked" else answer.chunks)

    @staticmethod
    def payload_of(answer, body):
        """Return the payload in the first bytes of a body."""
        return read_chunks(io.BytesIO(body))[0] if answer.framing == "chunked" else body

    def cut(self, received):
        if target_of(received) != "antigravity":
            return whole("claude")
        _, kind, end = received.target.rsplit("/", 2)
        return Answer(raw=b"".join(self.wire_of(*self.KINDS[kind][:2]))[:int(end)])

    def check(self, mode, kind, end):
        before, answer, committed = self.KINDS[kind]
        head, body = self.wire_of(before, answer)
        reply = self.rrouter.post(SONNET, "/v1/%s/%d" % (kind, end))
        got = self.payload_of(answer, body[:max(0, end - len(head))])
        what = (mode, kind, end, reply)
        if end == len(head + body):
            self.assertEqual((reply.status, reply.body, reply.complete), (200, b"".join(answer.chunks), True), what)
        elif end >= len(head) and (mode != "auto" or len(got) >= committed):
            self.assertEqual((reply.status, reply.complete), (200, False), what)
            self.assertEqual(reply.body, got, what)
        elif mode == "auto":
            self.assert_served(reply, "claude", 2)
        else:
            self.assert_error(reply, 502)

    def test_closed_after_each_byte(self):
        self.upstream.default = self.cut
        for mode in ("antigravity", "auto"):
            self.set_mode(mode)
            cases = [(mode, kind, end) for kind, (before, answer, _) in self.KINDS.items()
                     for end in range(sum(map(len, self.wire_of(before, answer))) + 1)]
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda case: self.check(*case), cases))
        self.assertEqual(self.rrouter.health()["activeRequests"], 0)

    def test_reset_after_every_seventh_byte(self):
        """A reset can overtake what was sent before it."""
        self.upstream.default, self.upstream.resets = self.cut, True
        self.addCleanup(setattr, self.upstream, "resets", False)
        self.set_mode("antigravity")
        for kind, (before, answer, _) in self.KINDS.items():
            head, body = self.wire_of(before, answer)
            for end in range(0, len(head + body), 7):
                reply = self.rrouter.post(SONNET, "/v1/%s/%d" % (kind, end))
                with self.subTest(kind=kind, end=end):
                    self.assertIn((reply.status, reply.complete), ((502, True), (200, False)))
                    if reply.status == 200:
                        got = self.payload_of(answer, body[:max(0, end - len(head))])
                        self.assertTrue(got.startswith(reply.body))


class MortalUpstreamTest(AutoTest):
    """The upstream, a process, is killed and started again on its port while requests come."""

    LIVES, CLIENTS = 3, 6
    # Answers with the pieces for antigravity or for claude; of its own, for this file takes a second to import.
    CODE = """
import socket, threading
answers, port = %r, %d

def serve(connection):
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection, connection.makefile("rb") as reader:
        while True:
            length = 0
            for line in iter(reader.readline, b"\\r\\n"):
                if not line:
                    return
                if line.lower().startswith(b"content-length:"):
                    length = int(line[15:])
            for piece in answers[b'"model":"gemini-' in reader.read(length)]:
                connection.sendall(piece)

listener = socket.create_server(("127.0.0.1", port), backlog=256)
print("listening", flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""

    @contextlib.contextmanager
    def life(self, port):
        answers = [[whole(target).head(), *(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in
                                            [*whole(target).chunks, b""])] for target in ("claude", "antigravity")]
        with subprocess.Popen([sys.executable, "-c", self.CODE % (answers, port)], stdout=subprocess.PIPE) as process:
            try:
                self.assertEqual(process.stdout.readline(), b"listening\n")
                yield
            finally:
                process.kill()

    def ask_on(self, ended):
        """Ask until told to end; return how the requests went."""
        outcomes = collections.Counter()
        while not ended.is_set():
            reply = self.rrouter.post()
            if reply.status == 502:
                self.assertEqual(reply.json()["type"], "error")
                self.assertIn("rrouter: ", reply.json()["error"]["message"])
            else:
                self.assertEqual(reply.status, 200)
                whole = [bytes_of(target) for target in ("antigravity", "claude")]
                self.assertIn(reply.body, whole if reply.complete else [w[:len(reply.body)] for w in whole])
            outcomes[reply.status, reply.complete] += 1
        return outcomes

    def test_killed_and_started_again_under_load(self):
        self.upstream.close()
        self.addCleanup(setattr, type(self), "upstream", self.upstream)
        for mode in ("claude", "auto"):
            self.set_mode(mode)
            ended = threading.Event()
            with concurrent.futures.ThreadPoolExecutor(self.CLIENTS) as pool:
                clients = [pool.submit(self.ask_on, ended) for _ in range(self.CLIENTS)]
                try:
                    for _ in range(self.LIVES):
                        with self.life(self.upstream.port):
                            served = self.rrouter.health()["requestCount"] + 30
                            self.rrouter.wait_until(lambda: self.rrouter.health()["requestCount"] > served)
                finally:
                    ended.set()
                outcomes = sum((client.result() for client in clients), collections.Counter())
            self.assertGreater(outcomes[200, True], self.LIVES * 5)
            with self.life(self.upstream.port):
                self.assertEqual({self.rrouter.post().status for _ in range(10)}, {200})
        self.rrouter.wait_until(lambda: self.rrouter.health()["activeRequests"] == 0)


class MovedClockTest(AutoTest):
    """The wall clock is set, or the machine slept, which is the same: time limits go by a clock of their own."""

    WAIT_MINUTES = 30
    config = auto_config(cooldownMinutes=[WAIT_MINUTES])
    CODE = ("import time\nreal, path = time.time, %r\n"
            "def now():\n    with open(path) as file:\n        return real() + float(file.read())\n"
            "time.time = now")

    @classmethod
    def setUpClass(cls):
        cls.upstream = Upstream()
        cls.addClassCleanup(cls.upstream.close)
        home = Home(cls.upstream, "auto", cls.config)
        cls.addClassCleanup(home.remove)
        cls.offset = home.root / "offset"
        cls.offset.write_text("0")
        cls.rrouter = Altered(cls.upstream, cls.CODE % str(cls.offset), home=home)
        cls.addClassCleanup(cls.rrouter.__exit__)

    def move_clock(self, seconds):
        fresh = self.offset.with_name("offset.new")
        fresh.write_text(str(seconds))
        os.replace(str(fresh), str(self.offset))

    def tearDown(self):
        self.move_clock(0)

    def remaining_s(self):
        return self.rrouter.health()["autoSwitch"]["cooldownRemainingSeconds"]

    def test_forward_ends_the_wait(self):
        self.trip()
        self.script()
        self.assertEqual(self.ask()[1], "c")
        self.move_clock(8 * 3600)
        self.assertEqual(self.ask()[1], "a")
        self.assert_state("antigravity", switchCount=1)

    def test_back_makes_no_wait_longer(self):
        for back_s in (3600, 366 * 86400, 56 * 365 * 86400):
            with self.subTest(back_s=back_s):
                self.move_clock(0)
                self.set_mode("auto")
                self.trip()
                self.script()
                self.move_clock(-back_s)
                self.assertEqual(self.ask()[1], "c")
                self.assertTrue(0 < self.remaining_s() <= self.WAIT_MINUTES * 60, self.remaining_s())
                self.move_clock(-back_s + self.WAIT_MINUTES * 60 + 1)
                self.assertEqual(self.remaining_s(), 0)
                self.assertEqual(self.ask()[1], "a")

    def test_back_makes_no_wait_longer_though_nobody_asks(self):
        """The watcher alone notices it, as state.json shows; between the moves there is no request, nor /health."""
        def retry_at():
            with contextlib.suppress(FileNotFoundError):
                return json.loads(self.rrouter.home.read("state.json"))["whole"]["retry_at"]

        self.trip()
        self.script()
        self.rrouter.wait_until(lambda: (retry_at() or 0) > time.time())
        self.move_clock(-86400)
        self.rrouter.wait_until(lambda: retry_at() < time.time())
        self.move_clock(-86400 + self.WAIT_MINUTES * 60 + 1)
        self.assertEqual(self.ask()[1], "a")
        self.assert_state("antigravity", switchCount=1)

    def test_limits_of_a_request_do_not_move(self):
        gate = threading.Event()
        self.addCleanup(gate.set)
        self.script(antigravity=stream(*events_of("antigravity"), gate=gate))
        with self.begin() as connection:
            self.upstream.wait(lambda upstream: upstream.received)
            for seconds in (86400, -86400):
                self.move_clock(seconds)
                self.assertEqual(self.rrouter.health()["activeRequests"], 1)
                self.assertGreaterEqual(self.rrouter.health()["uptimeSeconds"], 0)
            gate.set()
            self.assertTrue(read_reply(connection).complete)

    def test_files_written_in_the_future_are_noticed(self):
        for number, mode in enumerate(("claude", "antigravity", "claude")):
            self.rrouter.home.write("mode", mode + "\n")
            os.utime(str(self.rrouter.home.dir / "mode"), (4e9 - number, 4e9 - number))
            self.assertEqual(self.rrouter.post().header("x-rrouter-target"), mode)


class StateFileTest(AutoTest):
    """state.json carries a switch over a restart."""

    def restart(self, between=lambda: None):
        """Stop rrouter, call `between`, start it again."""
        self.rrouter.stop()
        try:
            between()
        finally:
            self.rrouter.start()

    def state_file(self):
        return self.rrouter.home.dir / "state.json"

    def changed_state(self, change):
        """Return the content of state.json with every number and string replaced by `change` of it."""
        def walk(value):
            if isinstance(value, dict):
                return {key: walk(item) for key, item in value.items()}
            if isinstance(value, list):
                return [walk(item) for item in value]
            return value if isinstance(value, bool) or value is None else change(value)
        return json.dumps(walk(json.loads(self.state_file().read_text()))).encode()

    def test_restart_keeps_the_wait(self):
        self.trip()
        before = self.auto()
        self.assertEqual(self.state_file().stat().st_mode & 0o777, 0o600)
        self.restart()
        after = self.auto()
        for name in ("currentTarget", "switched", "switchCount", "reason", "switchedAt", "retryAt", "cooldownSeconds"):
            self.assertEqual(after[name], before[name], name)
        self.assertTrue(0 < after["cooldownRemainingSeconds"] <= before["cooldownRemainingSeconds"])
        self.upstream.clear()
        self.assertEqual(self.ask()[1], "c")

    def test_kill_keeps_the_wait_of_target_and_model(self):
        self.script(antigravity=lambda received: error(429) if "opus" in received.model else whole("antigravity"))
        for _ in range(3):
            self.ask(OPUS)
            self.ask(HAIKU)
        self.assertEqual(list(self.auto()["models"]), [OPUS])
        self.trip(model=HAIKU)
        before = self.auto()
        self.rrouter.wait_until(lambda: self.state_file().read_text().count(before["reason"]) == 2)
        self.rrouter.kill()
        self.rrouter.start()
        after = self.auto()
        for name in ("currentTarget", "switchCount", "retryAt"):
            self.assertEqual(after[name], before[name], name)
            self.assertEqual(after["models"][OPUS][name], before["models"][OPUS][name], name)

    def test_restart_after_a_write_starts_fresh(self):
        ways = (
            # written in between    how
            ("mode file",           lambda: self.set_mode("auto")),
            ("auto section",        lambda: self.configure(auto_config(cooldownMinutes=[20]))),
        )
        for name, way in ways:
            with self.subTest(name):
                self.trip()
                self.restart(way)
                self.script()
                self.assert_served(self.ask()[0], "antigravity", 1)
                self.assert_state("antigravity", switched=False, switchCount=0)

    def test_unusable_state_file_gives_fresh_state_and_a_log_line(self):
        self.trip()
        self.restart()
        self.assert_state("claude", switchCount=1)
        good = self.state_file().read_bytes()
        cases = (
            # name               content
            ("torn",             good[:len(good) // 2]),
            ("no text",          b"\xff\x00\xfe" * 9),
            ("a list",           b"[1, 2]"),
            ("foreign",          b'{"hello": "world"}'),
            ("too deep",         b"[" * 200000),
            ("other types",      self.changed_state(lambda value: 7 if isinstance(value, str) else "x")),
        )
        for name, content in cases:
            with self.subTest(name):
                seen = len(self.rrouter.log())
                self.restart(lambda: self.state_file().write_bytes(content))
                self.assert_state("antigravity", switched=False, switchCount=0, models={})
                self.assertIn("state.json", self.rrouter.log()[seen:])

    def test_times_far_off_lock_no_target_out(self):
        """The clock was set meanwhile: what is left is at most the longest wait."""
        def shift(years):
            def change(value):
                if isinstance(value, str):
                    return re.sub(r"^20(\d\d)-", lambda found: "20%02d-" % (int(found.group(1)) + years), value)
                return value + years * 365 * 86400 if 1e9 < value < 4e9 else value
            return change

        cases = (
            # the clock was    change of each value in the file
            ("set back",       shift(10)),
            ("set forth",      shift(-10)),
            ("nonsense",       lambda value: value if isinstance(value, str) else float("inf")),
        )
        for name, change in cases:
            with self.subTest(name):
                self.set_mode("auto")
                self.trip()
                self.restart(lambda: self.state_file().write_bytes(self.changed_state(change)))
                self.assertLessEqual(self.auto()["cooldownRemainingSeconds"] or 0, 240 * 60)
                self.script()
                self.assertEqual(self.ask()[0].status, 200)
                if name == "set forth":
                    self.assert_state("antigravity", switched=False)


class ExplicitModeTest(AutoTest):
    """The explicit modes neither rescue nor count, and hold nothing back."""

    mode = "antigravity"

    def test_failures_are_passed_on_and_not_counted(self):
        cases = (
            # answer                            status, body
            (error(429, "as it is"),            429, error(429, "as it is").chunks[0]),
            (error(500),                        500, error(500).chunks[0]),
            (error(404),                        404, error(404).chunks[0]),
            (sse(OVERLOADED),                   200, OVERLOADED),
            (sse(),                             200, b""),
            (sse(PING),                         200, PING),
        )
        for answer, status, body in cases:
            with self.subTest(status=status, body=body):
                self.script(antigravity=answer, claude=answer)
                for mode, call in (("antigravity", "a"), ("claude", "c")):
                    self.set_mode(mode)
                    for _ in range(4):
                        reply, calls = self.ask()
                        self.assertEqual((reply.status, reply.body, reply.complete, calls), (status, body, True, call))
                        self.assertEqual((reply.header("x-rrouter-target"), reply.header("x-rrouter-attempts")),
                                         (mode, "1"))
                    health = self.rrouter.health()
                    self.assertEqual(health["currentTarget"], mode)
                    self.assertEqual((health["autoSwitch"]["active"], health["autoSwitch"]["switchCount"],
                                      health["autoSwitch"]["failureCount"]), (False, 0, 0))
        self.set_mode("auto")
        self.assert_state("antigravity", failureCount=0, switchCount=0)

    def test_broken_connections_are_not_rescued(self):
        self.script(antigravity=Answer(hangup=True))
        for _ in range(4):
            reply, calls = self.ask()
            self.assert_error(reply, 502)
            self.assertEqual(set(calls), {"a"})

    def test_pings_are_not_held_back(self):
        for first in (PING, COMMENT, b"ev"):
            gate = self.gate()
            self.script(antigravity=sse(first, *events_of("antigravity"), gate=gate))
            connection = self.begin()
            receive_until(connection, first)
            gate.set()
            receive_until(connection, b"0\r\n\r\n")

    def test_outcomes_of_an_explicit_mode_are_unknown_to_auto(self):
        gate = self.gate()
        self.script(antigravity=error(500, before=gate))
        connections = [self.begin() for _ in range(3)]
        self.upstream.wait(lambda upstream: len(upstream.received) == 3)
        self.set_mode("auto")
        gate.set()
        self.assertEqual([read_reply(connection).status for connection in connections], [500] * 3)
        self.assert_state("antigravity", failureCount=0, switchCount=0)


# Healing ######################################################################

def nested(message):
    """Return a complaint as it comes through Antigravity: JSON in the message of Google's error."""
    inner = json.dumps({"type": "error", "error": {"type": "invalid_request_error", "message": message}})
    return json.dumps({"error": {"code": 400, "message": inner, "status": "INVALID_ARGUMENT"}}).encode()


def complaint(message):
    """Return a 400 of this wording, in Anthropic's shape; bytes are taken as the whole body."""
    if isinstance(message, str):
        return error(400, message, "invalid_request_error")
    return Answer(400, message, reason="Bad Request", framing="length")


INVALID_SIGNATURE = "messages.1.content.0: Invalid `signature` in `thinking` block"
FOREIGN_SIGNATURE_WORDINGS = (
    INVALID_SIGNATURE,
    nested(INVALID_SIGNATURE),
    "messages.1.content.0.thinking.signature: Field required",
    "messages.1.content.0: `thinking` or `redacted_thinking` blocks in the latest assistant message cannot be "
    "modified. These blocks must remain as they were in the original response.",
    "'thinking' or 'redacted_thinking' blocks in the latest assistant message cannot be modified",
    "messages.3.content.1: Invalid data in `redacted_thinking` block",
    "Invalid signature in redacted_thinking",
    "Corrupted thought signature.",
    "Invalid thought signature.",
    "Thought signature is not valid",
    b'{"error":{"code":400,"message":"Corrupted thought signature.","status":"INVALID_ARGUMENT"}}',
)
OTHER_WORDINGS = (
    "prompt is too long: 210000 tokens > 200000 maximum",
    "unknown provider for model gemini-claude-sonnet-4-5-thinking",
    "thinking.budget_tokens: Input should be greater than or equal to 1024",
    "thinking.type: Field required",
)

# Blocks of a history, as bytes: whatever stays has to stay as it was written.
THINKING = b'{"type":"thinking","thinking":"so ]},{ \\"type\\":\\"text\\"","signature":"c2ln"}'
THINKING_LATE = b'{"signature":"x","thinking":"","type":"thinking"}'
REDACTED = b'{"type":"redacted_thinking","data":"ZW5j"}'
TEXT = b'{"type":"text","text":"caf\\u00e9 \\ud83d \\u2028 {\\"type\\":\\"thinking\\"}","n":-0,"f":1E400,"f":1.50}'
TOOL_USE = (b'{"type":"tool_use","id":"t","name":"f","input":{"type":"thinking","content":[{"type":"thinking"},'
            b'{"type":"redacted_thinking"}],"x":1e-7}}')
TOOL_RESULT = b'{"type":"tool_result","tool_use_id":"t","content":[{"type":"text","text":"ok"}]}'


def conversation(*contents, model=SONNET):
    """Return the bytes of a request whose assistant turns have these lists of blocks as content."""
    turns = b",".join(b'{"role":"user","content":"go on"},{"role":"assistant","content":[%b]}' % b",".join(blocks)
                      for blocks in contents)
    return (b'{"model":"%b","messages":[%b,{"role":"user","content":[%b]}],'
            b'"system":[{"type":"text","text":"thinking"}],"thinking":{"type":"adaptive","display":"omitted"},'
            b'"metadata":{"type":"thinking"},"max_tokens":128000,"stream":true}' % (model.encode(), turns, TOOL_RESULT))


class HealingTest(AutoTest):
    """A history with foreign signatures is sent once more without its thinking, to the same target."""

    BEFORE = ([THINKING, TEXT, TOOL_USE], [TEXT, REDACTED], [REDACTED, THINKING, TEXT, THINKING_LATE], [TEXT],
              [TEXT, THINKING, THINKING, TEXT])
    AFTER = ([TEXT, TOOL_USE], [TEXT], [TEXT], [TEXT], [TEXT, TEXT])

    def send(self, body):
        """Post these bytes; return (reply, calls made for it)."""
        before = len(self.upstream.received)
        reply = self.rrouter.request(body=body)
        return reply, self.calls(before)

    def test_each_wording_is_healed_in_every_mode(self):
        for mode, target, model in (("antigravity", "antigravity", ON_ANTIGRAVITY), ("claude", "claude", SONNET),
                                    ("auto", "antigravity", ON_ANTIGRAVITY)):
            for wording in FOREIGN_SIGNATURE_WORDINGS:
                with self.subTest(mode=mode, wording=wording):
                    self.set_mode(mode)
                    self.upstream.clear()
                    self.script(**{target: [complaint(wording), whole(target)]})
                    reply, calls = self.send(conversation(*self.BEFORE))
                    self.assert_served(reply, target, 1)
                    self.assertEqual(calls, target[0] * 2)
                    sent, healed = [received.body for received in self.upstream.received]
                    self.assertEqual(sent, conversation(*self.BEFORE, model=model))
                    self.assertEqual(healed, conversation(*self.AFTER, model=model))
                    self.assertEqual(self.auto()["failureCount"], 0)

    def test_healed_request_keeps_its_head(self):
        self.script(antigravity=[complaint(INVALID_SIGNATURE)])
        self.send(conversation(*self.BEFORE))
        heads = [(received.method, received.target, [field for field in received.fields
                                                     if field[0].lower() != "content-length"])
                 for received in self.upstream.received]
        self.assertEqual(heads[0], heads[1])
        self.assertEqual(self.upstream.received[1].header("content-length"), str(len(self.upstream.received[1].body)))

    def test_content_left_empty_gets_a_short_text(self):
        for blocks in ([THINKING], [REDACTED, THINKING], [THINKING_LATE, REDACTED]):
            with self.subTest(blocks):
                self.upstream.clear()
                self.script(antigravity=[complaint(INVALID_SIGNATURE)])
                self.send(conversation([TEXT], blocks, [THINKING, TEXT]))
                healed = self.upstream.received[1]
                content = healed.json()["messages"][3]["content"]
                self.assertEqual([block["type"] for block in content], ["text"])
                self.assertTrue(0 < len(content[0]["text"].strip()) < 80, content)
                head, tail = conversation([TEXT], [b"|"], [TEXT], model=ON_ANTIGRAVITY).split(b"|")
                self.assertTrue(healed.body.startswith(head) and healed.body.endswith(tail), healed.body)

    def test_body_with_white_space_is_healed(self):
        document = json.loads(conversation([TEXT, THINKING], [REDACTED, TEXT], [TEXT, THINKING, TEXT]))
        for indent in (1, 4, "\t"):
            with self.subTest(indent=indent):
                self.upstream.clear()
                self.script(antigravity=[complaint(INVALID_SIGNATURE)])
                body = json.dumps(document, indent=indent).encode()
                self.assertEqual(self.send(body)[1], "aa")
                sent, healed = [received.json() for received in self.upstream.received]
                self.assertEqual(sent, dict(document, model=ON_ANTIGRAVITY))
                for message in sent["messages"]:
                    if isinstance(message["content"], list):
                        message["content"] = [b for b in message["content"] if "thinking" not in b["type"]]
                self.assertEqual(healed, sent)
                tail = body[body.index(b'"system"'):]
                self.assertTrue(self.upstream.received[1].body.endswith(tail))

    def test_nothing_to_take_out_is_not_sent_again(self):
        bodies = (
            # body
            conversation([TEXT], [TOOL_USE]),
            b'{"model":"claude-sonnet-5-5","messages":[{"role":"user","content":"\\"type\\":\\"thinking\\""}]}',
            b'{"model":"claude-sonnet-5-5","thinking":{"type":"enabled"},"messages":[]}',
            b'{"model":"claude-sonnet-5-5","messages":"thinking"}',
            b'{"model":"claude-sonnet-5-5","messages":[{"type":"thinking"},7,null,{"content":7}]}',
            b'{"model":"claude-sonnet-5-5","messages":[{"content":[{"type":"thinking"}]}',
        )
        answer = complaint("Corrupted thought signature.")
        self.set_mode("antigravity")
        self.script(antigravity=answer)
        for body in bodies:
            with self.subTest(body):
                reply, calls = self.send(body)
                self.assertEqual((reply.status, reply.body, calls), (400, answer.chunks[0], "a"))

    def test_other_refusals_are_not_healed(self):
        answers = [complaint(wording) for wording in OTHER_WORDINGS] + [error(500, INVALID_SIGNATURE),
                                                                        error(429, INVALID_SIGNATURE)]
        self.set_mode("antigravity")
        for answer in answers:
            with self.subTest(answer.chunks[0]):
                self.script(antigravity=answer)
                reply, calls = self.send(conversation(*self.BEFORE))
                self.assertEqual((reply.status, reply.body, calls), (answer.status, answer.chunks[0], "a"))

    def test_failed_healing_gives_the_original_answer(self):
        first = complaint(INVALID_SIGNATURE)
        for mode in ("antigravity", "claude"):
            for name, second in (("same", first), ("other 400", complaint("prompt is too long")), ("500", error(500)),
                                 ("429", error(429)), ("dropped", Answer(hangup=True))):
                with self.subTest(mode=mode, second=name):
                    self.set_mode(mode)
                    self.script(**{mode: [first, second, second]})
                    reply, calls = self.send(conversation(*self.BEFORE))
                    self.assertEqual((reply.status, reply.body), (400, first.chunks[0]))
                    self.assertEqual(upstream_fields(reply), first.fields + [
                        ("Content-Length", str(len(first.chunks[0])))])
                    self.assertEqual(calls.replace("aaa", "aa").replace("ccc", "cc"), mode[0] * 2)

    def test_failed_healing_is_rescued_by_the_other_target_and_charges_nobody(self):
        self.script(antigravity=complaint("Corrupted thought signature."))
        for _ in range(5):
            self.upstream.clear()
            reply, calls = self.send(conversation(*self.BEFORE))
            self.assert_served(reply, "claude", 2)
            self.assertEqual(calls, "aac")
            self.assertEqual(self.upstream.received[2].body, conversation(*self.BEFORE))    # the original
        self.assert_state("antigravity", failureCount=0, timeoutCount=0, switchCount=0, models={})

    def test_failed_healing_on_both_gives_the_first_original_answer(self):
        first, second = complaint("Corrupted thought signature."), complaint(INVALID_SIGNATURE)
        self.script(antigravity=first, claude=second)
        for _ in range(4):
            reply, calls = self.send(conversation(*self.BEFORE))
            self.assertEqual((reply.status, reply.body, calls), (400, first.chunks[0], "aacc"))
        self.assert_state("antigravity", failureCount=0, switchCount=0)

    def test_rescue_by_a_target_that_refuses_the_signatures_is_healed_there(self):
        self.script(antigravity=error(529), claude=[complaint(INVALID_SIGNATURE)])
        reply, calls = self.send(conversation(*self.BEFORE))
        self.assert_served(reply, "claude", 2)
        self.assertEqual(calls, "acc")
        self.assertEqual(self.upstream.received[2].body, conversation(*self.AFTER))
        self.assert_state("antigravity", failureCount=1)

    def test_healing_does_not_count_against_a_target(self):
        history = conversation(*self.BEFORE)
        self.script(antigravity=lambda received: whole("antigravity") if received.body == conversation(
            *self.AFTER, model=ON_ANTIGRAVITY) else complaint("Invalid thought signature."))
        for _ in range(5):
            self.assertEqual(self.send(history)[1], "aa")
        self.assert_state("antigravity", failureCount=0, switchCount=0)


# Soak #########################################################################

@unittest.skipUnless(SOAKING, "--soak sends 10,000 requests over failing targets")
class SoakTest(AutoTest):
    """No client sees an error that one healthy target could have avoided."""

    SEED, REQUESTS, THREADS = int(os.environ.get("RROUTER_SOAK") or 20260129), 10000, 8
    config = auto_config(cooldownMinutes=[0.002, 0.004, 0.008], firstByteTimeoutSeconds=1)

    @staticmethod
    def failures(gate):
        """Return (weight, function of the target that returns an answer) for each way to fail."""
        return (
            (10, lambda target: error(429, target, fields=(("Retry-After", "1"),))), (10, lambda target: error(500)),
            (10, lambda target: error(503)), (10, lambda target: error(529)), (5, lambda target: error(401)),
            (5, lambda target: error(404)), (5, lambda target: error(400)), (10, lambda target: sse(OVERLOADED)),
            (10, lambda target: sse(PING, COMMENT, OVERLOADED)), (5, lambda target: sse()),
            (5, lambda target: sse(PING, cut=True)), (10, lambda target: Answer(hangup=True)),
            (5, lambda target: Answer(raw=b"HTTP/1.1 200 OK\r\nContent-")),
            (5, lambda target: Answer(raw=b"garbage\r\n")),
            (0.3, lambda target: stream(before=gate)))

    def plan(self):
        """Return for each request (model, target that fails or None, number of its way to fail), by the seed alone."""
        dice, plan, dead = random.Random(self.SEED), [], None
        weights = [weight for weight, _ in self.failures(None)]
        for number in range(self.REQUESTS):
            if number % 50 == 0:        # a target is down for a while, so that traffic does switch
                dead = dice.choice((None, "antigravity", "claude"))
            failing = dead if dice.random() < 0.9 else dice.choice((None, "antigravity", "claude"))
            plan.append((dice.choice((SONNET, OPUS, HAIKU)), failing, dice.choices(range(len(weights)), weights)[0]))
        return plan

    def test_soak_shows_no_error(self):
        print("soak: seed %d, %d requests" % (self.SEED, self.REQUESTS), file=sys.stderr)
        gate, plan, numbers = self.gate(), self.plan(), iter(range(self.REQUESTS))
        failures, lock, faults = self.failures(gate), threading.Lock(), []

        def answer(received):
            number, target = received.json()["number"], target_of(received)
            _, failing, way = plan[number]
            if target == failing:
                return failures[way][1](target)
            return sse(START, event("content_block_delta", number=number, by=target), event("message_stop"))

        def client():
            with contextlib.ExitStack() as stack:
                connection = stack.enter_context(self.rrouter.connect())
                reader = stack.enter_context(connection.makefile("rb"))
                while True:
                    with lock:
                        number = next(numbers, None)
                    if number is None or len(faults) > 10:
                        return
                    model, failing, way = plan[number]
                    body = json.dumps({"model": model, "number": number, "stream": True, "messages": []}).encode()
                    connection.sendall(request_bytes("POST", "/v1/messages", body, CLAUDE_HEADERS, self.rrouter.port))
                    reply = read_reply_from(reader, "POST")
                    by = reply and reply.header("x-rrouter-target")
                    wanted = START + event("content_block_delta", number=number, by=by) + event("message_stop")
                    if not reply or (reply.status, reply.complete, reply.body) != (200, True, wanted):
                        faults.append((number, failing, way, reply))
                        if not reply or not reply.complete:
                            return

        self.upstream.default = answer
        threads = [threading.Thread(target=client) for _ in range(self.THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(faults, [], "seed %d" % self.SEED)
        health = self.rrouter.health()
        self.assertEqual((health["requestCount"], health["activeRequests"]), (self.REQUESTS, 0))
        self.assertGreater(health["autoSwitch"]["switchCount"], 10)
        targets = collections.defaultdict(set)
        for received in self.upstream.received:
            targets[received.json()["number"]].add(received.model)
        self.assertEqual(len(targets), self.REQUESTS)
        self.assertLessEqual(max(map(len, targets.values())), 2)


LINUX = sys.platform.startswith("linux")


# Files ########################################################################

DEFAULT_CONFIG = {
    "modes": {"antigravity": {"mappings": [{"match": "claude-sonnet-*", "rewrite": "gemini-claude-sonnet-4-5-thinking"},
                                           {"match": "claude-opus-*", "rewrite": "gemini-claude-opus-4-5-thinking"},
                                           {"match": "claude-haiku-*", "rewrite": "gemini-3-flash-preview"}]},
              "claude": {"mappings": []}},
    "defaultMode": "claude",
    "auto": {"targets": ["antigravity", "claude"], "failureThreshold": 3, "timeoutThreshold": 2,
             "cooldownMinutes": [30, 60, 120, 240], "firstByteTimeoutSeconds": 150},
}
HASTY_CONFIG = dict(DEFAULT_CONFIG, auto={"failureThreshold": 1})       # switches at the first failure


def switchboard(number, **members):
    """Return a config that tells, by the model it writes, which mode and which edition of the file served."""
    modes = {name: {"mappings": [{"match": "*", "rewrite": "%s-%03d" % (name, number)}]}
             for name in ("one", "two", "spare")}
    return dict({"modes": modes, "defaultMode": "spare", "auto": {"targets": ["one", "two"]}}, **members)


def put(home, name, content):
    """Bring ~/.rrouter/NAME about by rename, as editors do, whatever stood there."""
    path = home.dir / name
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    fresh = home.dir / (name + ".new")
    fresh.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    os.replace(str(fresh), str(path))


def altered(path, value):
    """Return a good config as text with `value` put at the JSON path."""
    config = switchboard(1)
    config["auto"].update(failureThreshold=3, timeoutThreshold=2, cooldownMinutes=[30, 60], firstByteTimeoutSeconds=9)
    steps = [int(step) if step.isdigit() else step for step in re.findall(r"[^.\[\]]+", path)]
    place = config
    for step in steps[:-1]:
        place = place[step]
    place[steps[-1]] = value
    return json.dumps(config)


class SwitchboardTest(RouterTest):
    """Base of the tests of the two files: modes one, two and spare, spare the default, edition 0."""

    mode, config = "one", switchboard(0)

    def setUp(self):
        self.home = self.rrouter.home
        put(self.home, "config.json", json.dumps(switchboard(0)))
        put(self.home, "mode", "one\n")
        super().setUp()
        self.assertEqual(self.served(), "one-000")
        self.upstream.clear()

    def served(self):
        """Return the model that the upstream gets for a request made now."""
        self.assertEqual(self.rrouter.post().status, 200)
        return self.upstream.models()[-1]

    def problems(self):
        return " | ".join(self.rrouter.health()["problems"])


class FreshnessTest(SwitchboardTest):
    """Every request that begins after a write has returned is served by what was written."""

    def ask(self, connection, reader):
        """Post on a connection kept open; return the reply."""
        connection.sendall(request_bytes(body=b'{"model":"m"}', port=self.rrouter.port))
        reply = read_reply_from(reader)
        self.assertEqual(reply.status, 200)
        return reply

    def test_two_hundred_writes_serve_the_requests_right_behind_them(self):
        mode, number = "one", 0
        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            for turn in range(200):
                write = self.home.write if turn % 4 < 2 else lambda *written: put(self.home, *written)
                other = {"one": "two", "two": "one"}[mode]
                if turn % 25 == 24:
                    mode = other
                    self.home.run("mode", mode, check=0)
                elif turn % 2:
                    number += 1
                    write("config.json", json.dumps(switchboard(number)))
                else:
                    mode = other
                    write("mode", mode + "\n")
                self.ask(connection, reader)
                self.assertEqual(self.upstream.models()[-1], "%s-%03d" % (mode, number), "kept connection, %d" % turn)
                self.assertEqual(self.served(), "%s-%03d" % (mode, number), "new connection, %d" % turn)

    def test_write_that_leaves_size_and_time_as_they_were_is_seen(self):
        """`cp -p`, `rsync -t` and `touch -r` leave them so."""
        rows = (("mode", (("two\n", "two-000"), ("one\n", "one-000"))),
                ("config.json", tuple((json.dumps(switchboard(number)), "one-00%d" % number) for number in (1, 2))))
        for name, contents in rows:
            for write in (put, Home.write):
                for content, served in contents:
                    with self.subTest(name, by=write.__name__, served=served):
                        write(self.home, name, content)
                        os.utime(str(self.home.dir / name), (10 ** 9, 10 ** 9))
                        self.assertEqual(self.served(), served)

    def test_older_file_moved_over_is_seen(self):
        fresh = self.home.dir / "saved"
        fresh.write_text(json.dumps(switchboard(7)))
        os.utime(str(fresh), (1, 1))
        os.replace(str(fresh), str(self.home.dir / "config.json"))
        self.assertEqual(self.served(), "one-007")

    def test_removed_files_mean_the_defaults(self):
        (self.home.dir / "mode").unlink()
        self.assertEqual(self.served(), "spare-000")
        self.home.write("mode", "two\n")
        (self.home.dir / "config.json").unlink()
        self.assertEqual(self.served(), "claude-sonnet-5-5")
        self.assertEqual(self.rrouter.health()["mode"], "claude")
        self.home.write("mode", "antigravity\n")
        self.assertEqual(self.served(), "gemini-claude-sonnet-4-5-thinking")

    def test_config_reset_is_in_force_when_it_returns(self):
        self.home.write("mode", "antigravity\n")
        self.home.run("config", "reset", check=0)
        self.assertEqual(self.served(), "gemini-claude-sonnet-4-5-thinking")

    def settled(self):
        """Return once what was written is so old that it is no longer read at each request."""
        time.sleep(rrouter.SETTLED_S)
        self.served()

    def test_each_way_to_write_is_heard(self):
        mode, config = self.home.dir / "mode", self.home.dir / "config.json"
        aside, linked = self.home.dir / "aside", self.home.root / "linked"

        def in_place(file, text):
            with open(str(file), "r+b") as opened:
                opened.write(text.encode())

        def by_second_name(text):
            os.link(str(mode), str(linked))
            self.settled()
            in_place(linked, text)

        def by_kept_descriptor(text):
            with open(str(mode), "r+b", buffering=0) as opened:
                self.settled()
                os.pwrite(opened.fileno(), text.encode(), 0)

        def by_map(text):
            with open(str(mode), "r+b") as opened, mmap.mmap(opened.fileno(), 4) as memory:
                self.settled()
                memory[:] = text.encode()
                memory.flush()

        def by_link(text):
            (self.home.root / text.strip()).write_text(text)
            mode.unlink()
            mode.symlink_to(self.home.root / text.strip())

        def by_link_moved_over(text):
            (self.home.root / "link").symlink_to(self.home.root / text.strip())
            os.replace(str(self.home.root / "link"), str(mode))

        def by_other_directory(directory, text):
            """Put a copy with another mode in its place; the log may bring the old name to life in between."""
            copy, old = str(directory) + ".copy", str(directory) + ".old"
            self.addCleanup(shutil.rmtree, old, ignore_errors=True)
            shutil.copytree(str(directory), copy, ignore=shutil.ignore_patterns("*.tmp"))   # these come and go
            pathlib.Path(copy, mode.relative_to(directory)).write_text(text)
            os.rename(str(directory), old)
            for _ in range(1000):
                with contextlib.suppress(OSError):
                    return os.rename(copy, str(directory))
                shutil.rmtree(str(directory), ignore_errors=True)
            self.fail("no place for " + copy)

        for label, write, served in (
                ("written anew", lambda: mode.write_text("two\n"), "two-000"),
                ("over what is there", lambda: in_place(mode, "one\n"), "one-000"),
                ("cut", lambda: os.truncate(str(mode), 0) or mode.write_text("two"), "two-000"),
                ("moved over", lambda: put(self.home, "mode", "one\n"), "one-000"),
                ("moved away", lambda: mode.rename(str(aside)), "spare-000"),
                ("moved back", lambda: aside.rename(str(mode)), "one-000"),
                ("removed", mode.unlink, "spare-000"),
                ("made", lambda: mode.write_text("two\n"), "two-000"),
                ("by a second name", lambda: by_second_name("one\n"), "one-000"),
                ("by a descriptor from before", lambda: by_kept_descriptor("two\n"), "two-000"),
                ("by a map of the file", lambda: by_map("one\n"), "one-000"),
                ("anew", lambda: mode.write_text("two\n"), "two-000"),
                ("the config", lambda: config.write_text(json.dumps(switchboard(1))), "two-001"),
                ("config moved over", lambda: put(self.home, "config.json", json.dumps(switchboard(2))), "two-002"),
                ("a link", lambda: by_link("one\n"), "one-002"),
                ("behind the link", lambda: (self.home.root / "one").write_text("two\n"), "two-002"),
                ("another link", lambda: by_link("one\n"), "one-002"),
                ("a file again", lambda: put(self.home, "mode", "two\n"), "two-002"),
                ("a link over the file", lambda: by_link_moved_over("one\n"), "one-002"),
                ("another directory", lambda: by_other_directory(self.home.dir, "two\n"), "two-002"),
                ("in that directory", lambda: mode.write_text("one\n"), "one-002"),
                ("another home", lambda: by_other_directory(self.home.root, "two\n"), "two-002"),
                ("in that home", lambda: mode.write_text("one\n"), "one-002")):
            with self.subTest(label):
                self.settled()
                write()
                self.assertEqual(self.served(), served)

    def test_a_write_is_heard_while_others_read_it(self):
        """The request that finds the files changed may not be overtaken by the next one before it has read them."""
        done = threading.Event()

        def ask_on():
            with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
                while not done.is_set():
                    self.ask(connection, reader)

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(ask_on) for _ in range(4)]
            try:
                with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
                    for turn in range(150):
                        mode = ("two", "one")[turn % 2]
                        put(self.home, "mode", mode + "\n")
                        self.assertEqual(self.ask(connection, reader).header("x-rrouter-model"), mode + "-000")
            finally:
                done.set()
            for one in asking:
                one.result()

    def test_switches_under_load_never_show_a_torn_file(self):
        """A mode file that is just being written in place is empty for a moment; that keeps the mode."""
        done = threading.Event()

        def switch():
            for turn in range(1000):
                if done.is_set():
                    return
                (Home.write if turn % 4 < 2 else put)(self.home, "mode", ("one\n", "two\n")[turn % 2])

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            switching = pool.submit(switch)
            try:
                served = {self.served() for _ in range(150)}
            finally:
                done.set()
            switching.result()
        self.assertLessEqual(served, {"one-000", "two-000"})

    def test_thousand_configs_under_load_are_each_taken_whole_or_not_at_all(self):
        """Good and bad ones, by rename and in place, where a reader can meet an empty or a half-written file."""
        done = threading.Event()

        def ask():
            while not done.is_set():
                self.assertEqual(self.rrouter.post().status, 200)

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(ask) for _ in range(4)]
            try:
                for number in range(1000):
                    content = json.dumps(switchboard(number))
                    bad = content[:-5] if number % 3 == 0 else content.replace('"*"', "7") if number % 3 == 1 else None
                    (put if number % 2 else Home.write)(self.home, "config.json", bad or content)
            finally:
                done.set()
            for client in clients:
                client.result()
        models = set(self.upstream.models())
        self.assertLessEqual(models, {"one-%03d" % number for number in (0, *range(2, 1000, 3))})
        self.assertGreater(len(models), 3)
        put(self.home, "config.json", json.dumps(switchboard(999)))
        self.assertEqual(self.served(), "one-999")
        self.assertEqual(self.problems(), "")


MODE_FILES = (
    # content, mode in force, the word named in problems (None: there are none)
    (b"two\n", "two", None),
    (b"two", "two", None),
    (b"  TWO \r\n\n", "two", None),
    (b"\tAuto", "auto", None),
    (b"", "one", None),
    (b" \n", "one", None),
    (b"tow\n", "spare", "tow"),
    (b"one two\n", "spare", "one two"),
    (b"one\ntwo\n", "spare", "one"),
    (b"\xff\xfe\n", "spare", "."),
    (b"\x1b[31mred\n", "spare", "red"),
    (b"long" * 30000, "spare", "longlong"),
)


class ModeFileTest(SwitchboardTest):

    def test_content_decides(self):
        for content, mode, word in MODE_FILES:
            with self.subTest(content[:20]):
                put(self.home, "mode", "one\n")
                self.assertEqual(self.served(), "one-000")
                put(self.home, "mode", content)
                self.assertEqual(self.served(), {"auto": "one"}.get(mode, mode) + "-000")
                health = self.rrouter.health()
                self.assertEqual(health["mode"], mode)
                self.assertEqual(bool(health["problems"]), word is not None, health["problems"])
                if word is not None:
                    self.assertIn(word, self.problems())
                    self.assertNotIn("\x1b", self.problems())

    def test_mode_that_the_config_comes_to_define_is_in_force_at_once(self):
        put(self.home, "mode", "late\n")
        self.assertEqual(self.served(), "spare-000")
        self.assertIn("late", self.problems())
        config = switchboard(0)
        config["modes"]["late"] = {"mappings": [{"match": "*", "rewrite": "better"}]}
        put(self.home, "config.json", json.dumps(config))
        self.assertEqual(self.served(), "better")
        self.assertEqual(self.problems(), "")

    def test_default_mode_may_be_auto(self):
        put(self.home, "config.json", json.dumps(switchboard(3, defaultMode="auto")))
        (self.home.dir / "mode").unlink()
        self.assertEqual(self.served(), "one-003")
        health = self.rrouter.health()
        self.assertEqual((health["mode"], health["defaultMode"]), ("auto", "auto"))
        self.assertTrue(health["autoSwitch"]["active"])

    def test_watcher_logs_a_switch_once(self):
        before = len(self.rrouter.log())
        put(self.home, "mode", "two\n")
        for _ in range(5):
            self.served()
        lines = [line for line in self.rrouter.log()[before:].splitlines() if "[MODE]" in line]
        self.assertEqual(len(lines), 1, lines)
        self.assertIn("two", lines[0])

    def test_switch_without_any_request_is_noticed(self):
        before = len(self.rrouter.log())
        put(self.home, "mode", "two\n")
        self.rrouter.wait_until(lambda: "[MODE]" in self.rrouter.log()[before:])
        put(self.home, "config.json", json.dumps(switchboard(4)))
        self.rrouter.wait_until(lambda: "[CONFIG]" in self.rrouter.log()[before:])

    def test_something_that_is_no_file_in_its_place_is_survived(self):
        for name in ("mode", "config.json"):
            for make in (os.mkdir, os.mkfifo):
                with self.subTest(name, made_by=make.__name__):
                    odd = self.home.root / ("%s %s" % (name, make.__name__))
                    make(str(odd))
                    (self.home.dir / "link").symlink_to(odd)
                    os.replace(str(self.home.dir / "link"), str(self.home.dir / name))
                    self.assertIn(self.served(), ("one-000", "spare-000") if name == "mode" else ("one-000",))
                    self.assertIn(name, self.problems())
                    put(self.home, name, {"mode": "one\n"}.get(name) or json.dumps(switchboard(0)))
                    self.assertEqual((self.served(), self.problems()), ("one-000", ""))


UNREADABLE_CONFIGS = (
    # text, what the complaint says as well (a pattern)
    ('{"modes": {', r"\b1:1\d\b"),
    ('{\n  "modes": {\n    "one" {}\n  }}', r"\b3:1\d\b"),
    ('// modes\n{}', r"\b1:1\b"),
    ("", "."),
    ("\0" * 64, "."),
    ("[]", "object"),
    ("7", "object"),
    (json.dumps(switchboard(1)) * 2, r"\b1:\d+"),
    (json.dumps(switchboard(1)).encode("utf-8") + b"\xff", "(?i)utf"),
    (b'{"modes": {"\xc3\x28": {}}}', "(?i)utf"),
    ("[" * 100000, "."),
    ('{"a":' * 100000, "."),
    ('{"defaultMode": "one", "x": %s%s}' % ("[" * 100000, "]" * 100000), "."),
    ('{"defaultMode": "one"}', "modes"),
    (altered("auto.cooldownMinutes[0]", float("nan")), r"\b1:\d{3}\b.*NaN"),
    (altered("auto.firstByteTimeoutSeconds", float("-inf")), r"\b1:\d{3}\b.*-Infinity"),
    (altered("auto.failureThreshold", 7777).replace("7777", "1e999"), r"auto\.failureThreshold"),
)
ANY_NUMBER = r"(?i)number|positive|least|above|greater|finite|minutes|seconds"
UNFIT_CONFIGS = (
    # JSON path (named in the complaint), value found there, what the complaint says as well (a pattern)
    ("modes", [], "object"),
    ("modes", {}, "."),
    ("modes.one", [], "object"),
    ("modes.one", "fast", "object"),
    ("modes.one.mappings", {}, "list|array"),
    ("modes.one.mappings[0]", "x", "object"),
    ("modes.one.mappings[0]", {"rewrite": "x"}, "match"),
    ("modes.one.mappings[0]", {"match": "x"}, "rewrite"),
    ("modes.one.mappings[0].match", 7, "string.*7"),
    ("modes.one.mappings[0].match", None, "string"),
    ("modes.one.mappings[0].rewrite", True, "(?i)string.*true"),
    ("modes.one.mappings[0].rewrite", "", "."),
    ("modes.Loud", {"mappings": []}, "(?i)lower"),
    ("modes.auto", {"mappings": []}, "."),
    ("defaultMode", "nosuch", "nosuch"),
    ("defaultMode", 3, "3"),
    ("auto", [], "object"),
    ("auto.targets", "one", "two|2|list|array"),
    ("auto.targets", [], "(?i)two|2"),
    ("auto.targets", ["one"], "(?i)two|2"),
    ("auto.targets", ["one", "two", "spare"], "(?i)two|2"),
    ("auto.targets", ["one", "one"], "one"),
    ("auto.targets", ["one", 2], "2"),
    ("auto.failureThreshold", 0, "."),
    ("auto.failureThreshold", -1, "."),
    ("auto.failureThreshold", 1.5, "1.5"),
    ("auto.failureThreshold", True, "(?i)true"),
    ("auto.failureThreshold", "3", "."),
    ("auto.failureThreshold", None, "."),
    ("auto.timeoutThreshold", False, "(?i)false"),
    ("auto.timeoutThreshold", [2], "."),
    ("auto.cooldownMinutes", 30, "list|array"),
    ("auto.cooldownMinutes", [], "."),
    ("auto.cooldownMinutes[1]", -1, "-1"),
    ("auto.cooldownMinutes[1]", "60", ANY_NUMBER),
    ("auto.cooldownMinutes[1]", True, "(?i)true"),
    ("auto.firstByteTimeoutSeconds", 0, ANY_NUMBER),
    ("auto.firstByteTimeoutSeconds", -150, ANY_NUMBER),
    ("auto.firstByteTimeoutSeconds", True, "(?i)true"),
    ("auto.firstByteTimeoutSeconds", "150", ANY_NUMBER),
)
HUGE_NUMBERS = (
    # key of `auto`, JSON text of its value
    ("failureThreshold", "9" * 30),
    ("failureThreshold", "9" * 5000),
    ("failureThreshold", "1e999"),
    ("cooldownMinutes", "[1e18]"),
    ("cooldownMinutes", "[1e300]"),
    ("cooldownMinutes", "[%s]" % ("9" * 5000)),
    ("firstByteTimeoutSeconds", "1e10"),
    ("firstByteTimeoutSeconds", "1e300"),
    ("firstByteTimeoutSeconds", "1e999"),
    ("colour", "9" * 5000),
)


class ConfigFileTest(SwitchboardTest):

    def assert_refused(self, content, *patterns):
        """The content is refused as a whole and once, and all is well when the file is good again."""
        before = len(self.rrouter.log())
        put(self.home, "config.json", content)
        self.assertEqual([self.served() for _ in range(3)], ["one-000"] * 3)
        problems = self.problems()
        for pattern in (r"config\.json",) + patterns:
            self.assertRegex(problems, pattern)
        lines = [line for line in self.rrouter.log()[before:].splitlines() if "[CONFIG]" in line]
        self.assertEqual(len(lines), 1, lines)
        self.assertIn("config.json", lines[0])
        put(self.home, "config.json", json.dumps(switchboard(2)))
        self.assertEqual((self.served(), self.problems()), ("one-002", ""))
        put(self.home, "config.json", json.dumps(switchboard(0)))
        self.assertEqual(self.served(), "one-000")

    def test_unreadable_file_keeps_the_last_good_one(self):
        for content, pattern in UNREADABLE_CONFIGS:
            with self.subTest(content[:40]):
                self.assert_refused(content, pattern)

    def test_file_that_does_not_fit_keeps_the_last_good_one(self):
        for path, value, pattern in UNFIT_CONFIGS:
            with self.subTest("%s = %r" % (path, value)):
                name = path.split(".")[-1] if path.startswith("modes.") and "[" not in path else path
                self.assert_refused(altered(path, value), re.escape(name), pattern)

    def test_huge_numbers_do_no_harm(self):
        """Refused or taken, they must fit into a socket's timeout and a date wherever they come to be used."""
        for key, text in HUGE_NUMBERS:
            with self.subTest(key, text=text[:20]):
                config = switchboard(5)
                config["auto"] = dict({"targets": ["one", "two"], "failureThreshold": 1}, **{key: "HERE"})
                put(self.home, "config.json", json.dumps(config).replace('"HERE"', text))
                put(self.home, "mode", "auto\n")
                self.upstream.play(error(503), Answer())
                self.assertRegex(self.served(), "^two-00[05]$")
                self.assertEqual(self.rrouter.health()["status"], "ok")
                put(self.home, "config.json", json.dumps(switchboard(0)))
                put(self.home, "mode", "one\n")
                self.assertEqual((self.served(), self.problems()), ("one-000", ""))

    def test_byte_order_mark_is_accepted(self):
        put(self.home, "config.json", b"\xef\xbb\xbf" + json.dumps(switchboard(6)).encode())
        self.assertEqual((self.served(), self.problems()), ("one-006", ""))

    def test_unknown_keys_are_a_problem_and_do_no_harm(self):
        for path in ("colour", "auto.colour", "modes.one.colour", "modes.one.mappings[0].colour"):
            with self.subTest(path):
                put(self.home, "config.json", altered(path, "red"))
                self.assertEqual(self.served(), "one-001")
                self.assertIn(path, self.problems())

    def test_auto_is_optional_key_by_key(self):
        for auto in ({}, {"failureThreshold": 1}, {"cooldownMinutes": [0.5]}, {"firstByteTimeoutSeconds": 0.5}):
            with self.subTest(auto):
                config = switchboard(1, auto=dict({"targets": ["two", "one"]}, **auto))
                put(self.home, "config.json", json.dumps(config))
                put(self.home, "mode", "auto\n")
                self.assertEqual((self.served(), self.problems()), ("two-001", ""))

    def test_unknown_target_of_auto_falls_back_to_the_default_mode(self):
        for default, served in (("spare", "spare-001"), ("auto", "one-001")):
            with self.subTest(default):
                config = switchboard(1, defaultMode=default, auto={"targets": ["one", "gone"]})
                put(self.home, "config.json", json.dumps(config))
                put(self.home, "mode", "auto\n")
                self.assertEqual(self.served(), served)
                self.assertRegex(self.problems(), "targets.*gone|gone.*targets")
                put(self.home, "mode", "two\n")
                self.assertEqual(self.served(), "two-001")

    def test_rules(self):
        rules = (("claude-opus-*", "first"), ("claude-*-5", "second"), ("Claude-*", "upper"), ("gpt-[45]", "set"),
                 ("k?mi", "mark"), ("claude-opus-5", "never"))
        config = {"modes": {"one": {"mappings": [{"match": m, "rewrite": r} for m, r in rules]}}, "defaultMode": "one"}
        put(self.home, "config.json", json.dumps(config))
        for model, sent in (("claude-opus-5", "first"), ("claude-sonnet-5", "second"), ("Claude-opus-5", "upper"),
                            ("CLAUDE-opus-5", "CLAUDE-opus-5"), ("gpt-4", "set"), ("gpt-6", "gpt-6"), ("kimi", "mark"),
                            ("k1mii", "k1mii"), ("claude-haiku-4", "claude-haiku-4")):
            with self.subTest(model):
                self.rrouter.post(model)
                self.assertEqual(self.upstream.models()[-1], sent)

    def test_stream_keeps_what_it_began_with(self):
        gate = threading.Event()
        self.addCleanup(gate.set)
        self.upstream.play(stream(event("ping"), event("message_stop"), gate=gate))
        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            connection.sendall(request_bytes(body=b'{"model":"m"}', port=self.rrouter.port))
            self.assertEqual(read_head(reader)[0], 200)
            put(self.home, "mode", "two\n")
            put(self.home, "config.json", "{")
            self.assertEqual(self.served(), "two-000")
            gate.set()
            self.assertEqual(read_chunks(reader), (event("ping") + event("message_stop"), True))


class FirstConfigTest(unittest.TestCase):

    def test_bad_config_at_the_start_means_the_embedded_default(self):
        with contextlib.closing(Upstream()) as upstream, Running(upstream, config="{") as router:
            router.post()
            self.assertEqual(upstream.models(), ["gemini-claude-sonnet-4-5-thinking"])
            self.assertRegex(" ".join(router.health()["problems"]), r"config\.json.*1:2")
            self.assertIn("config.json", router.log())


# Health #######################################################################

HEALTH = {
    # field: type
    "status": str, "version": str, "mode": str, "currentTarget": str, "defaultMode": str, "requestCount": int,
    "activeRequests": int, "uptimeSeconds": int, "pid": int, "startedBy": str, "listenAddr": str, "upstreamURL": str,
    "problems": list, "autoSwitch": dict,
}
AUTO_SWITCH = {
    "active": bool, "targets": list, "currentTarget": str, "switched": bool, "switchCount": int, "failureCount": int,
    "timeoutCount": int, "models": dict,
}
AUTO_SWITCH_NULLABLE = ("reason", "switchedAt", "retryAt", "cooldownSeconds", "cooldownRemainingSeconds")


class HealthFieldsTest(RouterTest):

    def test_fields(self):
        health = self.rrouter.health()
        self.assertEqual(set(health), set(HEALTH))
        self.assertEqual(set(health["autoSwitch"]), set(AUTO_SWITCH) | set(AUTO_SWITCH_NULLABLE))
        for table, fields in ((HEALTH, health), (AUTO_SWITCH, health["autoSwitch"])):
            for name, kind in table.items():
                self.assertIs(type(fields[name]), kind, name)
        self.assertEqual(health["pid"], self.rrouter.process.pid)
        self.assertEqual((health["status"], health["startedBy"], health["problems"]), ("ok", "serve", []))
        self.assertEqual(health["listenAddr"], "localhost:%d" % self.rrouter.port)
        self.assertEqual(health["upstreamURL"], self.upstream.url)
        self.assertIn(health["version"], self.rrouter.home.run("version", check=0).stdout)

    def test_current_target_of_an_explicit_mode_is_the_mode(self):
        for mode in ("antigravity", "claude"):
            self.rrouter.home.write("mode", mode + "\n")
            health = self.rrouter.health()
            self.assertEqual((health["mode"], health["currentTarget"], health["defaultMode"]), (mode, mode, "claude"))
            self.assertFalse(health["autoSwitch"]["active"])
        self.rrouter.home.write("mode", "auto\n")
        health = self.rrouter.health()
        self.assertEqual((health["mode"], health["currentTarget"]), ("auto", "antigravity"))
        auto = health["autoSwitch"]
        self.assertEqual([auto[name] for name in ("active", "targets", "currentTarget", "switched", "switchCount")],
                         [True, ["antigravity", "claude"], "antigravity", False, 0])

    def test_get_and_head_are_answered_and_nothing_else(self):
        reply = self.rrouter.request("GET", "/health", fields=())
        self.assertEqual((reply.status, reply.header("content-type").split(";")[0]), (200, "application/json"))
        head = self.rrouter.request("HEAD", "/health", fields=())
        self.assertEqual((head.status, head.header("content-length"), head.body), (200, str(len(reply.body)), b""))
        self.assertEqual(self.upstream.received, [])
        for method, target in (("POST", "/health"), ("GET", "/healthz"), ("GET", "/health/x"), ("DELETE", "/health"),
                               ("GET", "/v1/health")):
            self.rrouter.request(method, target, b"" if method == "POST" else None, fields=())
            self.assertEqual((self.upstream.received[-1].method, self.upstream.received[-1].target), (method, target))

    def test_requests_are_counted_and_health_is_not(self):
        before = self.rrouter.health()["requestCount"]
        gate = threading.Event()
        self.addCleanup(gate.set)
        self.upstream.play(stream(event("ping"), event("message_stop"), gate=gate))
        with self.rrouter.connect() as connection, connection.makefile("rb") as reader:
            connection.sendall(request_bytes(body=b"{}", port=self.rrouter.port))
            read_head(reader)
            self.assertEqual(self.rrouter.health()["activeRequests"], 1)
            gate.set()
            read_chunks(reader)
        self.rrouter.request("GET", "/v1/models")
        self.rrouter.exchange(b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n")
        self.rrouter.exchange(b"nonsense\r\n\r\n")
        self.rrouter.wait_until(lambda: self.rrouter.health()["activeRequests"] == 0)
        self.assertEqual(self.rrouter.health()["requestCount"], before + 2)


# Log ##########################################################################

REQUEST_LINE = re.compile(
    r"\[REQ\] #(?P<number>\d+) (?P<method>\S+) (?P<path>\S+) (?P<model>\S+) -> (?P<target>\S+) (?P<sent>\S+) "
    r"(?P<status>\d{3}) (?P<seconds>\d+\.\d\d)s(?P<notes>( \(.+\))*)$")


def request_lines(text):
    return [line for line in text.splitlines() if "[REQ]" in line]


class LogTest(RouterTest):

    def settled_log(self):
        """Return the log once the lines of all requests are in it; they are written behind the answers."""
        requests = self.rrouter.health()["requestCount"]
        self.rrouter.wait_until(lambda: len(request_lines(self.rrouter.log())) == requests)
        return self.rrouter.log()

    def logged(self, act):
        """Do it and return the one line about a request that it brought."""
        before = len(self.settled_log())
        act()
        self.rrouter.wait_until(lambda: request_lines(self.rrouter.log()[before:]))
        lines = request_lines(self.rrouter.log()[before:])
        self.assertEqual(len(lines), 1, lines)
        return lines[0]

    def test_line_of_a_request(self):
        line = REQUEST_LINE.search(self.logged(lambda: self.rrouter.post("claude-sonnet-4-5")))
        self.assertEqual(line.group("method", "path", "model", "target", "sent", "status"), (
            "POST", "/v1/messages", "claude-sonnet-4-5", "antigravity", "gemini-claude-sonnet-4-5-thinking", "200"))
        self.assertLess(float(line["seconds"]), WAIT_S)
        next_line = REQUEST_LINE.search(self.logged(lambda: self.rrouter.post("other")))
        self.assertEqual(int(next_line["number"]), int(line["number"]) + 1)
        self.assertEqual(next_line.group("model", "target", "sent"), ("other", "antigravity", "other"))
        self.assertEqual(int(next_line["number"]), self.rrouter.health()["requestCount"])

    def test_line_goes_to_stderr_as_well(self):
        line = self.logged(self.rrouter.post)
        self.assertIn(line[line.index("[REQ]"):], self.rrouter.printed())

    def test_status_in_the_line_is_the_one_the_client_got(self):
        self.upstream.play(error(529))
        self.assertEqual(REQUEST_LINE.search(self.logged(self.rrouter.post))["status"], "529")
        self.upstream.play(Answer(raw=b"HTTP/1.1 nonsense\r\n\r\n"))
        self.assertEqual(REQUEST_LINE.search(self.logged(self.rrouter.post))["status"], "502")

    def test_request_without_a_model_has_a_line(self):
        line = self.logged(lambda: self.rrouter.request("GET", "/v1/models?limit=1000"))
        self.assertRegex(line, r"\[REQ\] #\d+ GET /v1/models .*200 \d+\.\d\ds$")
        self.assertNotIn("limit", line)

    def test_client_that_leaves_has_a_line(self):
        gate = threading.Event()
        self.addCleanup(gate.set)
        self.upstream.play(Answer(before=gate))

        def leave():
            with self.rrouter.connect() as connection:
                connection.sendall(request_bytes(body=b'{"model":"m"}', port=self.rrouter.port))
                self.upstream.wait(lambda upstream: upstream.received)
            self.upstream.wait(lambda upstream: upstream.closed)

        self.assertRegex(self.logged(leave), r"POST /v1/messages m ")

    def test_health_has_no_line(self):
        before = len(self.rrouter.log())
        self.rrouter.health()
        self.logged(self.rrouter.post)
        self.assertNotIn("/health", self.rrouter.log()[before:])

    def test_control_characters_are_escaped(self):
        models = ("a\x1b[2Jb", "a\nb 2026 [REQ] #99 forged", "a\r\nX-Forged: 1", "a\tb", "a\0b", "a\x7fb", "a\x9bb",
                  "a\u2028b", "a\u202eb", "\ud83d", "a\x85b")
        before = len(self.rrouter.log())
        for model in models:
            with self.subTest(model):
                line = self.logged(lambda: self.rrouter.post(model))
                self.assertNotIn("#99 forged\n", line)
                self.assertIsNone(self.rrouter.post(model).header("x-forged"))
        for target in (b"/\x1b[2J", b"/\x9b", "/한".encode(), b"/%1b%0a"):
            self.rrouter.exchange(b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        text = self.settled_log()[before:]
        odd = {c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
        self.assertEqual(odd, set())
        self.assertFalse([line for line in text.split("\n") if line.startswith(("b 2026", "X-Forged"))])

    def test_secrets_are_nowhere(self):
        """In no header, query or body of these requests and answers is anything that rrouter may write down."""
        secret = "cAnArY%08x" % random.getrandbits(32)
        fields = [(name, "Bearer " + secret) for name in (
            "Authorization", "X-Api-Key", "Cookie", "X-Anything", "anthropic-beta", "User-Agent", "Referer")]
        body = json.dumps({"model": "claude-sonnet-5-5", "stream": True, "messages": [secret]}).encode()
        head = "POST /v1/messages?key=%s HTTP/1.1\r\nHost: localhost\r\n" % secret
        own = []
        for mode in ("auto\n", "antigravity\n"):
            self.rrouter.home.write("mode", mode)
            for answers in ((Answer(),), (error(503, secret), error(400, secret)), (error(500, secret), stream()),
                            (stream(event("error", error={"type": secret, "message": secret})), stream()),
                            (error(400, "Corrupted thought signature. " + secret),) * 2,
                            (error(429, secret, fields=[("Retry-After", secret), ("Set-Cookie", secret)]), Answer())):
                self.upstream.clear()
                self.upstream.play(*answers)
                self.rrouter.request("POST", "/v1/messages?key=" + secret, body, fields)
            for answer in (Answer(raw=("HTTP/1.1 200 OK\r\n%s\r\n\r\n" % secret).encode()), Answer(hangup=True),
                           Answer(raw=("HTTP/1.1 %s\r\n\r\n" % secret).encode())):
                self.upstream.clear()
                self.upstream.play(answer, answer)
                own.append(self.rrouter.request("POST", "/v1/messages?key=" + secret, body, fields))
        self.upstream.clear()
        for request in ("GET /x?key=%s HTTP/9.9\r\nHost: localhost\r\n\r\n" % secret,
                        "GET /x?key=%s y HTTP/1.1\r\nHost: localhost\r\n\r\n" % secret,
                        head + "Authorization %s\r\n\r\n" % secret,
                        head + "X-Api-Key: %s\r\nContent-Length: 3, 4\r\n\r\n" % secret,
                        head + "Content-Length: 100000000000\r\n\r\n",
                        head + "Cookie: %s\r\n\r\n" % (secret * 9000),
                        head + "Transfer-Encoding: chunked\r\n\r\n%s\r\n" % secret):
            own.append(self.rrouter.exchange(request.encode(), half_close=True))
        for request in ("GET / HTTP/1.1\r\nHost: %s.example\r\n\r\n" % secret,
                        head + "Origin: http://%s.example\r\n\r\n" % secret, head + "Expect: %s\r\n\r\n" % secret):
            self.assertRegex(self.rrouter.exchange(request.encode()), b"^HTTP/1.1 4")
        self.assertEqual(self.upstream.received, [])
        status = self.rrouter.home.run("status")
        self.assertNotIn(secret, json.dumps(self.rrouter.health()) + status.stdout + status.stderr)
        self.assertNotIn(secret, self.rrouter.printed())
        for path in self.rrouter.home.dir.rglob("*"):
            if path.is_file():
                self.assertNotIn(secret, path.read_text(errors="replace"), path)
        for reply in own:
            self.assertNotIn(secret, repr(reply))


class LogFileTest(unittest.TestCase):
    """What happens to the file itself; each test has a process of its own."""

    def setUp(self):
        self.upstream = Upstream()
        self.addCleanup(self.upstream.close)
        self.home = Home(self.upstream, "claude")
        self.addCleanup(self.home.remove)
        (self.home.dir / "logs").mkdir(mode=0o700)
        self.file = self.home.dir / "logs" / "rrouter.log"

    def test_full_file_is_rotated_without_losing_a_line(self):
        filler = b"x" * 79 + b"\n"
        self.file.write_bytes(filler * ((rrouter.LOG_MAX_BYTES - 4000) // len(filler)))
        with Running(self.upstream, home=self.home) as router:
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                replies = list(pool.map(lambda _: router.post("claude-sonnet-5-5").status, range(100)))
            self.assertEqual(replies, [200] * 100)
        old = self.home.read("logs/rrouter.log.1")
        lines = request_lines(old) + request_lines(router.log())
        self.assertTrue(request_lines(router.log()))
        self.assertEqual(sorted(int(REQUEST_LINE.search(line)["number"]) for line in lines), list(range(1, 101)))
        self.assertEqual({stat.S_IMODE(path.stat().st_mode) for path in (self.home.dir / "logs").iterdir()
                          if path.name != "rrouter.log.1"}, {0o600})

    def test_directory_removed_while_running_is_made_again(self):
        with Running(self.upstream, home=self.home) as router:
            router.post()
            shutil.rmtree(str(self.home.dir / "logs"))
            self.assertEqual([router.post().status for _ in range(3)], [200] * 3)
            router.process.send_signal(signal.SIGHUP)
            router.wait_until(lambda: router.post().status == 200 and self.file.exists() and "[REQ]" in router.log())

    @unittest.skipUnless(os.path.exists("/dev/full"), "no /dev/full")
    def test_full_disk_does_not_stop_requests(self):
        self.file.symlink_to("/dev/full")
        with Running(self.upstream, home=self.home) as router:
            self.assertEqual([router.post().status for _ in range(3)], [200] * 3)

    def test_stderr_that_takes_nothing_stops_nothing(self):
        """A terminal after Ctrl-S, a pager: once a pipe full of lines was unread, requests and SIGTERM hung."""
        config = dict(DEFAULT_CONFIG, auto={"failureThreshold": 1000})
        self.home.write("config.json", json.dumps(config))
        unread, stderr = os.pipe()
        with open(unread, "rb"), open(stderr, "wb") as writer:
            os.set_blocking(stderr, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(stderr, b"x" * 4096)
            os.set_blocking(stderr, True)
            process = subprocess.Popen([sys.executable, RROUTER, "serve"], env=self.home.env, stdin=subprocess.DEVNULL,
                                       stdout=subprocess.DEVNULL, stderr=writer)
            with process:
                self.addCleanup(process.kill)
                router = Running.__new__(Running)           # only to ask it
                router.port = self.home.port
                Running.wait_until(lambda: get_health(self.home.port))
                for mode in ("claude", "auto", "antigravity"):
                    self.home.write("mode", mode + "\n")
                    if mode == "auto":
                        self.upstream.play(error(500), error(500))
                    self.assertEqual(router.post().status, 500 if mode == "auto" else 200)
                with router.connect() as connection, connection.makefile("rb") as reader:
                    for _ in range(200):
                        connection.sendall(request_bytes(body=chat(), port=router.port))
                        self.assertEqual(read_reply_from(reader).status, 200)
                process.send_signal(signal.SIGTERM)
                self.assertEqual(process.wait(WAIT_S), 0)
        text = self.file.read_text()
        numbers = [int(line["number"]) for line in map(REQUEST_LINE.search, request_lines(text))]
        self.assertEqual(sorted(numbers), list(range(1, 204)))
        # A line is written behind the last byte of its answer, so only those of one connection have an order.
        self.assertEqual([number for number in numbers if number > 3], list(range(4, 204)))
        self.assertEqual((text.count("[AUTO] "), text.count("rrouter ends")), (3, 1))  # failures, reset

    @unittest.skipUnless(hasattr(os, "mkfifo"), "no FIFO")
    def test_fifo_in_its_place_hangs_nothing(self):
        os.mkfifo(str(self.file))
        with Running(self.upstream, home=self.home) as router:
            self.assertEqual([router.post().status for _ in range(3)], [200] * 3)
            self.assertIn("log lines are lost", str(router.health()["problems"]))
        done = self.home.run("start", check=1)
        self.assertIn("rrouter.log", done.stderr)

    def test_whole_directory_removed_while_running_does_not_stop_requests(self):
        with Running(self.upstream, home=self.home) as router:
            self.home.write("mode", "antigravity\n")
            shutil.rmtree(str(self.home.dir))
            router.post()
            self.assertEqual(self.upstream.models(), ["claude-sonnet-5-5"])
            self.home.run("antigravity", check=0)
            router.post()
            self.assertEqual(self.upstream.models()[-1], "gemini-claude-sonnet-4-5-thinking")


# Command line #################################################################

def run_all(home, *commands, **options):
    """Run the commands (tuples of arguments) side by side; return them, ended, in order."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda arguments: home.run(*arguments, **options), commands))


COMMANDS = ("serve", "start", "stop", "restart", "status", "antigravity", "ag", "claude", "auto", "mode", "--check",
            "check", "health", "config", "edit", "reset", "path", "help", "version")
USAGE_ERRORS = (("nosuch",), ("--nosuch",), ("status", "--nosuch"), ("claude", "extra"), ("mode", "a", "b"),
                ("config", "nosuch"), ("config", "path", "extra"), ("serve", "8316"), ("stop", "--force"), ("",))

EDITOR = """#!/bin/sh
# Stand-in: notes its arguments and what it was given, writes $NEW if there is any, ends with $CODE.
for file; do :; done
printf '%s\\n' "$0" "$@" > "$HOME/arguments"
cat "$file" > "$HOME/given"
[ -z "$NEW" ] || printf %s "$NEW" > "$file"
exit "${CODE:-0}"
"""


class CommandTest(unittest.TestCase):
    """Base of the tests of commands where nothing runs."""

    def setUp(self):
        self.home = Home(env={"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"})
        self.addCleanup(self.home.remove)
        self.file = self.home.dir / "config.json"

    def assert_fails(self, done, status, *patterns):
        """It ended with this status and told why on stderr, as `rrouter: …`, and nothing on stdout."""
        self.assertEqual((done.returncode, done.stdout), (status, ""), done)
        self.assertRegex(done.stderr, r"(?m)^rrouter: ")
        for pattern in patterns:
            self.assertRegex(done.stderr, pattern)


class CommandLineTest(CommandTest):

    def here(self, *arguments):
        """Run a command that needs neither files nor environment in this process, which is faster."""
        out, err = io.StringIO(), io.StringIO()
        out.reconfigure = err.reconfigure = lambda **_: None
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = rrouter.main(list(arguments))
            except SystemExit as end:
                status = end.code
        return status, out.getvalue(), err.getvalue()

    def test_help_names_everything(self):
        texts = [self.home.run(check=0).stdout] + [self.here(word)[1] for word in ("help", "-h", "--help")]
        self.assertEqual(set(texts), {texts[0]})
        for word in COMMANDS + ("RROUTER_PORT", "RROUTER_UPSTREAM", "RROUTER_HOST", "config.json", "logs/rrouter.log"):
            self.assertRegex(texts[0], r"(?<![\w-])%s(?![\w-])" % re.escape(word))
        self.assertRegex(texts[0], "(?i)example")
        self.assertFalse(self.home.dir.exists())

    def test_version(self):
        printed = {self.here(word) for word in ("version", "-V", "--version")}
        self.assertEqual(printed, {(0, "rrouter %s\n" % rrouter.__version__, "")})

    def test_usage_errors_are_status_2(self):
        self.assertEqual(self.home.run("nosuch").returncode, 2)
        for arguments in USAGE_ERRORS:
            with self.subTest(arguments):
                status, out, err = self.here(*arguments)
                self.assertEqual((status, out), (2, ""))
                self.assertIn("rrouter", err)

    def test_modes_by_every_name(self):
        self.home.write("config.json", json.dumps(switchboard(0, modes=dict(
            switchboard(0)["modes"], antigravity={"mappings": []}, claude={"mappings": []}))))
        for arguments, mode in ((("antigravity",), "antigravity"), (("claude",), "claude"), (("ag",), "antigravity"),
                                (("c",), "claude"), (("auto",), "auto"), (("mode", "two"), "two"), (("a",), "auto"),
                                (("mode", "ONE"), "one")):
            with self.subTest(arguments):
                done = self.home.run(*arguments, check=0)
                self.assertEqual(self.home.read("mode"), mode + "\n")
                self.assertIn(mode, done.stdout)
                self.assertRegex(done.stdout + done.stderr, "(?i)no .*run|not running|none run")
        self.assertEqual(self.home.run("mode", check=0).stdout, "one\n")

    def test_unknown_mode_is_refused_and_the_known_ones_are_named(self):
        self.home.write("mode", "claude\n")
        done = self.home.run("mode", "nosuch")
        self.assertIn(done.returncode, (1, 2))
        self.assert_fails(done, done.returncode, "nosuch", "antigravity", "claude", "auto")
        self.assertEqual(self.home.read("mode"), "claude\n")

    def test_fresh_files_are_private(self):
        mask = os.umask(0)
        try:
            for words in (("claude",), ("config", "reset"), ("config", "reset")):
                self.home.run(*words, check=0)
        finally:
            os.umask(mask)
        self.assertEqual(stat.S_IMODE(self.home.dir.stat().st_mode), 0o700)
        files = {path.name.partition(".bak-")[0] for path in self.home.dir.iterdir()}
        self.assertLessEqual({"mode", "config.json"}, files)
        self.assertEqual(len(list(self.home.dir.glob("config.json.bak-*"))), 1)
        for path in self.home.dir.iterdir():
            self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o700 if path.is_dir() else 0o600, path.name)

    def test_nothing_runs(self):
        status, as_json, stop, *checks = run_all(
            self.home, ("status",), ("status", "--json"), ("stop",), ("check",), ("--check",), ("health",))
        self.assertEqual(status.returncode, 3)
        self.assertRegex(status.stdout, "(?i)not running|nothing runs")
        self.assertIn("claude", status.stdout)
        self.assertEqual(as_json.returncode, 3)
        self.assertIsInstance(json.loads(as_json.stdout or "{}"), dict)
        self.assertEqual(stop.returncode, 0)
        self.assertRegex(stop.stdout, "(?i)not running|nothing runs")
        for check in checks:
            self.assertEqual(check.returncode, 1, check)
            self.assertRegex(check.stdout, r"(?im)^\W*fail\b.*(daemon|rrouter)")
            for line in check.stdout.splitlines():
                self.assertRegex(line, r"(?i)^\W*(ok|warn|fail)\b|^\s")

    def test_values_that_no_command_needs_are_not_judged(self):
        bad = {"RROUTER_PORT": "abc", "RROUTER_UPSTREAM": "ftp://x"}
        run_all(self.home, ("help",), ("config",), env=bad, check=0)

    def test_closed_or_full_output_gives_no_traceback(self):
        reader, writer = os.pipe()
        os.close(reader)
        outputs = [writer] + ([os.open("/dev/full", os.O_WRONLY)] if os.path.exists("/dev/full") else [])
        for output in outputs:
            done = subprocess.run([sys.executable, RROUTER, "config"], env=self.home.env, stdin=subprocess.DEVNULL,
                                  stdout=output, stderr=subprocess.PIPE, timeout=WAIT_S * 2)
            os.close(output)
            self.assertNotIn(b"Traceback", done.stderr)
            self.assertNotIn(b"Exception ignored", done.stderr)
            self.assertIn(done.returncode, (1,) if output != writer else (0, 1, 120, 141, -signal.SIGPIPE), done)

    def test_closed_standard_output_gives_no_traceback(self):
        for closed in (">&-", ">&- 2>&-", "<&-"):
            done = subprocess.run(["/bin/sh", "-c", 'exec "$0" "$1" claude ' + closed, sys.executable, RROUTER],
                                  env=self.home.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                  timeout=WAIT_S * 2)
            self.assertNotIn(b"Traceback", done.stderr)
            self.assertEqual((done.returncode, self.home.read("mode")), (0, "claude\n"))

    def test_home_that_cannot_be_used_is_told(self):
        """Permissions mean nothing to root, so a file stands where the directory should be."""
        (self.home.root / ".rrouter").touch()
        env = {"EDITOR": "true"}
        commands = (("claude",), ("config", "reset"), ("config", "edit"), ("serve",), ("start",))
        for arguments, done in zip(commands, run_all(self.home, *commands, env=env, timeout=WAIT_S * 2)):
            with self.subTest(arguments):
                self.assertEqual(done.returncode, 1, done)
                self.assertRegex(done.stderr, r"(?m)^rrouter: .*\.rrouter")
        done = self.home.run("start", env={"HOME": str(self.home.root / ".rrouter")}, timeout=WAIT_S * 2)
        self.assertEqual(done.returncode, 1, done)
        self.assertRegex(done.stderr, r"(?m)^rrouter: .*\.rrouter")
        for done in run_all(self.home, ("status",), ("check",), ("stop",), ("config",), ("mode",), env=env):
            self.assertIn(done.returncode, (0, 1, 3), done)
        self.assertEqual((self.home.root / ".rrouter").read_text(), "")

    def test_without_home_the_path_is_still_absolute(self):
        for value in ({}, {"HOME": ""}):
            env = dict({k: v for k, v in self.home.env.items() if k != "HOME"}, **value)
            done = subprocess.run([sys.executable, RROUTER, "config", "path"], env=env, cwd=str(self.home.root),
                                  stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  timeout=WAIT_S * 2)
            self.assertNotIn(b"Traceback", done.stderr)
            self.assertTrue(done.returncode == 1 or os.path.isabs(done.stdout.strip()), done)


# Runs a command of the program argv[1] many times, each time in a child that gets SIGINT at another moment, the n-th
# call of a function since `main` was called, and prints what became of each.  What stands above the last statement of
# the program, the call of `main`, is run once.
INTERRUPTER = """
import ast, json, os, signal, sys, tempfile
program, some, sys.argv = sys.argv[1], int(sys.argv[2]), sys.argv[1:2] + sys.argv[3:]
signal.signal(signal.SIGINT, signal.default_int_handler)    # whatever the tests were started with
with open(program, encoding="utf-8") as file:
    tree = ast.parse(file.read())
names, last = {"__name__": "__main__", "__file__": program}, compile(ast.Module([tree.body.pop()], []), program, "exec")
exec(compile(tree, program, "exec"), names)

def run(moment):
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            play(moment, output)
            sys.exit()
        status = os.waitpid(child, 0)[1]
        output.seek(0)
        return os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status), output.read().decode()

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

total = int(run(None)[1])
moments = sorted({1, 2, *range(3, total, total // some), *range(total - 4, total + 3)})
print(json.dumps([total, [(moment, *run(moment)) for moment in moments]]))
"""


class InterruptTest(CommandTest):
    """Ctrl-C at any moment of a command, also of its last: it ends, and says nothing."""

    MOMENTS = 300 if SOAKING else 5

    def test_no_moment_shows_a_traceback(self):
        if SOAKING:
            print("soak: Ctrl-C at some %d moments of two commands" % self.MOMENTS, file=sys.stderr)
        # command, its own status
        for arguments, own in ((("nosuch",), 2), (("claude",), 0)):
            with self.subTest(arguments):
                done = subprocess.run([sys.executable, "-c", INTERRUPTER, RROUTER, str(self.MOMENTS), *arguments],
                                      env=self.home.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                      timeout=WAIT_S * (30 if SOAKING else 3), check=True)
                total, moments = json.loads(done.stdout)
                for moment, status, printed in moments:
                    if re.match("Exception ignored in: <function _get_module_lock", printed):
                        continue        # Python's import loses what comes in a callback of its own
                    with self.subTest(moment=moment):
                        self.assertNotRegex(printed, "Traceback|Exception ignored|KeyboardInterrupt")
                        self.assertIn(status, (130, -signal.SIGINT) + (own,) * (moment > total - 5))


class ConfigCommandTest(CommandTest):
    """`config` and what stands under it."""

    def setUp(self):
        super().setUp()
        self.editor = self.home.root / "my editor"
        self.editor.write_text(EDITOR)
        self.editor.chmod(0o755)

    def edit(self, visual=None, editor=None, **env):
        for name, value in (("VISUAL", visual), ("EDITOR", editor)):
            if value is not None:
                env[name] = value
        return self.home.run("config", "edit", env=env, timeout=WAIT_S * 2)

    def test_config_prints_json_alone_on_stdout(self):
        done = self.home.run("config", check=0)
        self.assertEqual(json.loads(done.stdout), DEFAULT_CONFIG)
        self.assertIn(str(self.file), done.stderr)
        self.assertEqual(self.home.run("config", "path", check=0).stdout, str(self.file) + "\n")

    def test_config_prints_what_is_in_force(self):
        config = switchboard(3, auto={"targets": ["two", "one"], "failureThreshold": 1})
        self.home.write("config.json", json.dumps(config))
        printed = json.loads(self.home.run("config", check=0).stdout)
        self.assertEqual(printed["modes"], config["modes"])
        self.assertEqual(printed["auto"], {"targets": ["two", "one"], "failureThreshold": 1, "timeoutThreshold": 2,
                                           "cooldownMinutes": [30, 60, 120, 240], "firstByteTimeoutSeconds": 150})

    def test_config_complains_about_a_bad_file(self):
        self.home.write("config.json", "{")
        done = self.home.run("config")
        self.assertRegex(done.stderr, r"config\.json.*1:2")
        self.assertIn("modes", json.loads(done.stdout or '{"modes": 0}'))

    def test_edit_begins_with_the_defaults(self):
        done = self.edit(visual="'%s' -w" % self.editor, editor="/nonexistent")
        self.assertEqual(done.returncode, 0, done)
        self.assertEqual((self.home.root / "arguments").read_text().splitlines(),
                         [str(self.editor), "-w", str(self.file)])
        self.assertEqual(json.loads((self.home.root / "given").read_text()), DEFAULT_CONFIG)
        self.assertEqual(stat.S_IMODE(self.file.stat().st_mode), 0o600)

    def test_edit_takes_the_first_editor_that_is_named(self):
        programs = self.home.root / "bin"
        programs.mkdir()
        shutil.copy(str(self.editor), str(programs / "vi"))
        path = "%s:%s" % (programs, self.home.env["PATH"])
        for env, name in (({"editor": "'%s'" % self.editor}, str(self.editor)),
                          ({"visual": "", "editor": ""}, "vi"), ({}, "vi")):
            with self.subTest(env):
                self.assertEqual(self.edit(PATH=path, **env).returncode, 0)
                used = (self.home.root / "arguments").read_text().splitlines()[0]
                self.assertEqual(used.rsplit("/", 1)[-1], name.rsplit("/", 1)[-1])

    def test_edit_judges_the_result(self):
        good = json.dumps(switchboard(1))
        for new, status, patterns in ((good, 0, ()), ("{", 1, (r"config\.json", "1:2")),
                                      (altered("auto.failureThreshold", "3"), 1, (r"auto\.failureThreshold",))):
            with self.subTest(new):
                done = self.edit("'%s'" % self.editor, NEW=new)
                self.assertEqual(done.returncode, status, done)
                for pattern in patterns:
                    self.assertRegex(done.stderr, pattern)
                self.assertEqual(self.file.read_text(), new)

    def test_editor_that_fails_is_told(self):
        for command, pattern in (("'%s'" % self.editor, "7"), ("/nonexistent/editor -w", "/nonexistent/editor"),
                                 ("'unbalanced", "unbalanced"), ("'%s'" % self.home.root, "")):
            with self.subTest(command):
                done = self.edit(command, CODE="7")
                self.assertEqual(done.returncode, 1, done)
                self.assertRegex(done.stderr, "rrouter: .*%s" % pattern)

    def backups(self):
        return sorted(path for path in self.home.dir.iterdir() if ".bak" in path.name)

    def test_reset_keeps_what_there_was(self):
        self.home.run("config", "reset", check=0)
        self.assertEqual(self.backups(), [])
        self.assertEqual(json.loads(self.file.read_text()), DEFAULT_CONFIG)
        texts = ["{", "second", "third"]
        for text in texts:
            self.home.write("config.json", text)
            done = self.home.run("config", "reset", "--yes", check=0)
            self.assertRegex(done.stdout + done.stderr, r"config\.json\.bak-\d{8}-\d{6}")
            self.assertEqual(json.loads(self.file.read_text()), DEFAULT_CONFIG)
        self.assertEqual(sorted(path.read_text() for path in self.backups()), sorted(texts))
        self.assertRegex(self.backups()[0].name, r"^config\.json\.bak-\d{8}-\d{6}$")
        self.assertEqual({stat.S_IMODE(path.stat().st_mode) & 0o077 for path in [self.file]}, {0})

    def test_links_stay_links(self):
        """People keep such files in a repository of their own."""
        mine = self.home.root / "dotfiles"
        mine.mkdir()
        self.home.dir.mkdir(mode=0o700)
        for name, text in (("config.json", json.dumps(switchboard(1))), ("mode", "claude\n")):
            (mine / name).write_text(text)
            (self.home.dir / name).symlink_to(mine / name)
        self.assertEqual(self.edit("'%s'" % self.editor, NEW=json.dumps(switchboard(2))).returncode, 0)
        self.assertEqual(json.loads((mine / "config.json").read_text()), switchboard(2))
        run_all(self.home, ("config", "reset"), ("mode", "auto"), check=0)
        self.assertTrue(self.file.is_symlink() and (self.home.dir / "mode").is_symlink())
        self.assertEqual(json.loads((mine / "config.json").read_text()), DEFAULT_CONFIG)
        self.assertEqual((mine / "mode").read_text(), "auto\n")
        self.assertEqual([json.loads(path.read_text()) for path in self.backups()], [switchboard(2)])


BAD_VALUES = (
    # variable, value, what the complaint says is allowed (a pattern)
    ("RROUTER_PORT", "0", "65535"),
    ("RROUTER_PORT", "65536", "65535"),
    ("RROUTER_PORT", "-1", "65535"),
    ("RROUTER_PORT", "abc", "65535"),
    ("RROUTER_PORT", "8_316", "65535"),
    ("RROUTER_PORT", "9" * 5000, "65535"),
    ("RROUTER_UPSTREAM", "ftp://localhost:8317", "https?://"),
    ("RROUTER_UPSTREAM", "localhost:8317", "https?://"),
    ("RROUTER_UPSTREAM", "http://", "https?://"),
    ("RROUTER_UPSTREAM", "http://:8317", "https?://"),
    ("RROUTER_UPSTREAM", "http://localhost:99999", "https?://|65535"),
    ("RROUTER_UPSTREAM", "http://localhost/?key=1", "."),
    ("RROUTER_UPSTREAM", "http://local host/", "."),
    ("RROUTER_UPSTREAM", "http://localhost/\r\nX: y", "."),
    ("RROUTER_UPSTREAM", "http://[::1/", "."),
    ("RROUTER_HOST", "no host", "(?i)address|host"),
)


class EnvironmentTest(CommandTest):

    def test_bad_values_end_serve_with_status_2(self):
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            done = pool.map(lambda row: self.home.run("serve", env={row[0]: row[1]}, timeout=WAIT_S * 2), BAD_VALUES)
            for (name, value, allowed), ended in zip(BAD_VALUES, done):
                with self.subTest(name, value=value[:40]):
                    self.assert_fails(ended, 2, name, re.escape(value.split("\r")[0][:30]), allowed)
                    self.assertEqual(ended.stderr.count("\n"), 1, ended.stderr)

    def test_bad_value_ends_start_with_status_2(self):
        self.assert_fails(self.home.run("start", env={"RROUTER_PORT": "abc"}), 2, "RROUTER_PORT", "abc")
        self.assertEqual(processes(self.home), [])

    def test_empty_means_unset(self):
        done = self.home.run("check", env={"RROUTER_PORT": "", "RROUTER_UPSTREAM": "", "RROUTER_HOST": ""})
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stdout, r"\b8316\b")
        self.assertIn("http://localhost:8317", done.stdout)

    def test_proxies_of_the_environment_are_ignored(self):
        proxy = "http://127.0.0.1:9"
        env = dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "all_proxy"), proxy)
        with contextlib.closing(Upstream()) as upstream, Running(upstream, env=env) as router:
            self.assertEqual(router.post().status, 200)
            self.assertEqual(json.loads(router.home.run("status", "--json", check=0).stdout)["pid"], router.process.pid)


# Serving ######################################################################

def get_health(port, address="127.0.0.1"):
    """Return /health of what listens on the port, or None."""
    connection = http.client.HTTPConnection(address, port, timeout=WAIT_S)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/health")
        return json.loads(connection.getresponse().read())


def processes(home):
    """Return the pids of all processes, but for our own, that have this HOME."""
    found, mark = [], b"HOME=%b\0" % os.fsencode(str(home.root))
    for entry in os.listdir("/proc") if LINUX else ():
        with contextlib.suppress(OSError):
            if entry.isdigit() and mark in pathlib.Path("/proc", entry, "environ").read_bytes():
                found.append(int(entry))
    return found


def listening(pid):
    """Return the addresses, (host, port), on which the process listens."""
    sockets = set()
    for entry in pathlib.Path("/proc/%d/fd" % pid).iterdir():
        with contextlib.suppress(OSError):
            sockets.add(os.readlink(str(entry)))
    found = set()
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in pathlib.Path("/proc/net", name).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and "socket:[%s]" % fields[9] in sockets:
                address, port = fields[1].split(":")
                words = struct.unpack(">%dI" % (len(address) // 8), bytes.fromhex(address))
                packed = struct.pack("=%dI" % len(words), *words)
                found.add((socket.inet_ntop(family, packed), int(port, 16)))
    return found


class ServeTest(unittest.TestCase):

    def setUp(self):
        self.upstream = Upstream()
        self.addCleanup(self.upstream.close)

    def test_taken_port_is_told_with_its_owner(self):
        home = Home(port=self.upstream.port)
        self.addCleanup(home.remove)
        serve, check = home.run("serve", timeout=WAIT_S * 2), home.run("check")
        complaint = [line for line in serve.stderr.splitlines() if line.startswith("rrouter: ")]
        self.assertEqual((serve.returncode, len(complaint)), (1, 1), serve.stderr)
        for line in (complaint[0], check.stdout):
            self.assertIn("port %d" % home.port, line)
            self.assertIn("RROUTER_PORT", line)
            self.assertRegex(line, "(?i)CLIProxyAPI.*pprof")
            if LINUX:
                self.assertRegex(line, r"\b%d\b" % os.getpid())

    def test_one_family_taken_is_enough_to_refuse(self):
        home = Home(self.upstream)
        self.addCleanup(home.remove)
        with socket.socket(socket.AF_INET6) as holder:
            holder.bind(("::1", home.port))
            done = home.run("serve", timeout=WAIT_S * 2)
        self.assertEqual(done.returncode, 1, done)
        self.assertRegex(done.stderr, r"(?m)^rrouter: .*\b%d\b" % home.port)

    def test_address_that_is_not_of_this_machine_is_told(self):
        home = Home(self.upstream, env={"RROUTER_HOST": "203.0.113.1"})
        self.addCleanup(home.remove)
        done = home.run("serve", timeout=WAIT_S * 2)
        self.assertEqual(done.returncode, 1, done)
        self.assertRegex(done.stderr, r"(?m)^rrouter: .*203\.0\.113\.1")

    def test_port_taken_by_another_rrouter_is_told(self):
        with Running(self.upstream) as router:
            for home in (router.home, Home(self.upstream, port=router.port)):
                done = home.run("serve", timeout=WAIT_S * 2)
                self.assertEqual(done.returncode, 1, done)
                self.assertRegex(done.stderr, r"(?m)^rrouter: .*rrouter.*\b%d\b" % router.process.pid)
            home.remove()
            self.assertEqual(router.post().status, 200)

    def test_both_loopback_addresses_answer_and_nothing_else_listens(self):
        with Running(self.upstream) as router:
            self.assertEqual(get_health(router.port, "::1")["pid"], router.process.pid)
            self.assertEqual(get_health(router.port, "localhost")["pid"], router.process.pid)
            if LINUX:
                self.assertEqual(listening(router.process.pid), {("127.0.0.1", router.port), ("::1", router.port)})

    @unittest.skipUnless(LINUX, "only Linux has all of 127/8 on loopback")
    def test_other_host_is_bound_as_given_with_a_warning(self):
        home = Home(self.upstream, env={"RROUTER_HOST": "127.0.0.2"})
        self.addCleanup(home.remove)
        with home_served(home) as process:
            health = Running.wait_until(lambda: get_health(home.port, "127.0.0.2"))
            self.assertEqual(health["listenAddr"], "127.0.0.2:%d" % home.port)
            self.assertEqual(listening(process.pid), {("127.0.0.2", home.port)})
            self.assertIn("RROUTER_HOST", home.read("logs/rrouter.log"))
            self.assertEqual(home.run("status").returncode, 0)

    def test_upstream_that_is_rrouter_itself_is_no_storm(self):
        port = free_port()
        for host in ("localhost", "[::1]", "0.0.0.0"):
            with self.subTest(host):
                home = Home("http://%s:%d" % (host, port), port=port)
                self.addCleanup(home.remove)
                with home_served(home) as process:
                    Running.wait_until(lambda: process.poll() is not None or get_health(port))
                    if process.poll() is None:
                        with socket.create_connection(("127.0.0.1", port), WAIT_S) as connection:
                            connection.sendall(request_bytes(body=b'{"model":"m"}', port=port))
                            reply = read_reply(connection)
                        self.assertGreaterEqual(reply.status, 500)
                        self.assertIn("rrouter: ", reply.json()["error"]["message"])
                        self.assertLess(get_health(port)["requestCount"], 4)
                    else:
                        self.assertIn(process.returncode, (1, 2))

    def test_upstream_that_comes_back_is_used_at_once(self):
        with Running(self.upstream) as router:
            self.assertEqual(router.post().status, 200)
            self.upstream.close()
            reply = router.post()
            self.assertEqual(reply.status, 502)
            self.assertIn(self.upstream.url, reply.json()["error"]["message"])
            for _ in range(2):
                again = Upstream(port=self.upstream.port)
                self.assertEqual(router.post().status, 200)
                self.assertEqual(router.post().status, 200)
                again.close()

    def test_hang_up_signal_rereads_and_does_not_end_it(self):
        with Running(self.upstream, config=switchboard(1), mode="one") as router:
            router.process.send_signal(signal.SIGHUP)
            put(router.home, "mode", "two\n")
            router.process.send_signal(signal.SIGHUP)
            router.wait_until(lambda: "[MODE]" in router.log() and "two" in router.log())
            self.assertEqual(router.post().header("x-rrouter-model"), "two-001")

    def test_interrupt_ends_it_in_peace(self):
        with Running(self.upstream) as router:
            with router.connect():                          # an idle client keeps nobody waiting
                router.process.send_signal(signal.SIGINT)
                self.assertIn(router.process.wait(WAIT_S), (0, 130, -signal.SIGINT))
            router.stop(expect=None)


def begin(home, command):
    """Begin a command whose output does not matter."""
    return subprocess.Popen([sys.executable, RROUTER, command], env=home.env, stdin=subprocess.DEVNULL,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def home_served(home):
    """Run `serve` in the home without waiting for an answer; yield the process."""
    process = begin(home, "serve")
    try:
        yield process
    finally:
        process.terminate()
        process.wait(WAIT_S * 4)


class DrainTest(unittest.TestCase):
    """SIGTERM while an answer is under way."""

    def setUp(self):
        self.gate = threading.Event()
        upstream = Upstream(stream(event("ping"), event("message_stop"), gate=self.gate))
        self.addCleanup(upstream.close)
        self.rrouter = Running(upstream)
        self.addCleanup(self.rrouter.__exit__)
        self.connection = self.rrouter.connect()
        self.addCleanup(self.connection.close)
        self.reader = self.connection.makefile("rb")
        self.addCleanup(self.reader.close)
        self.addCleanup(self.gate.set)
        self.connection.sendall(request_bytes(body=b'{"model":"m"}', port=self.rrouter.port))
        self.assertEqual(read_head(self.reader)[0], 200)

    def refused(self):
        try:
            self.rrouter.connect().close()
        except OSError:
            return True

    def test_stream_finishes_and_nobody_else_comes_in(self):
        idle = self.rrouter.connect()
        self.addCleanup(idle.close)
        self.rrouter.process.terminate()
        self.rrouter.wait_until(self.refused)
        self.assertEqual(read_all(idle), b"")
        self.assertIsNone(self.rrouter.process.poll())
        self.gate.set()
        self.assertEqual(read_chunks(self.reader), (event("ping") + event("message_stop"), True))
        self.assertEqual(self.rrouter.process.wait(WAIT_S), 0)
        self.assertFalse((self.rrouter.home.dir / "rrouter.pid").exists())

    def test_stop_waits_for_the_stream(self):
        stopping = begin(self.rrouter.home, "stop")
        self.rrouter.wait_until(self.refused)
        self.assertIsNone(stopping.poll())
        self.gate.set()
        self.assertTrue(read_chunks(self.reader)[1])
        self.assertEqual(stopping.wait(WAIT_S), 0)
        self.assertEqual(self.rrouter.process.wait(WAIT_S), 0)
        socket.create_server(("127.0.0.1", self.rrouter.port)).close()

    def test_start_meanwhile_does_not_take_it_for_running(self):
        self.rrouter.process.terminate()
        self.rrouter.wait_until(self.refused)
        starting = begin(self.rrouter.home, "start")
        with contextlib.suppress(subprocess.TimeoutExpired):
            starting.wait(1)                            # it may wait for the end of the stream, or say that it must
        self.gate.set()
        self.assertTrue(read_chunks(self.reader)[1])
        self.assertEqual(self.rrouter.process.wait(WAIT_S), 0)
        if starting.wait(WAIT_S) == 0:
            self.assertIsNotNone(get_health(self.rrouter.port))
            self.rrouter.home.run("stop", check=0)

    def test_second_signal_ends_it_at_once(self):
        self.rrouter.process.terminate()
        self.rrouter.wait_until(self.refused)
        self.rrouter.process.terminate()
        self.rrouter.process.wait(WAIT_S)
        with contextlib.suppress(ConnectionResetError):
            self.assertFalse(read_chunks(self.reader)[1])
        self.rrouter.stop(expect=None)


# Daemon #######################################################################

class DaemonTestBase(unittest.TestCase):
    """Base of the tests with homes whose daemons are gone, whatever the test did, when it ends."""

    @classmethod
    def setUpClass(cls):
        cls.upstream = Upstream()
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

    def assert_alone(self, home):
        """Exactly one daemon is there, it answers, and the pid file names it."""
        health = get_health(home.port)
        self.assertIsNotNone(health, "no daemon answers")
        self.assertEqual(home.read("rrouter.pid").strip(), str(health["pid"]))
        if LINUX:
            self.assertEqual(processes(home), [health["pid"]])
        return health["pid"]

    def assert_nothing_left(self, home):
        self.assertEqual(processes(home), [])
        self.assertFalse((home.dir / "rrouter.pid").exists())
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            socket.create_server((address, home.port), family=family).close()


class RunningDaemonTest(DaemonTestBase):
    """One daemon, started under umask 0 by a process that held a pipe open."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.home = cls.new_home(cls.addClassCleanup, "antigravity", HASTY_CONFIG)
        reader, writer = os.pipe()
        cls.addClassCleanup(os.close, reader)
        mask = os.umask(0)
        try:
            cls.started = subprocess.run(
                [sys.executable, os.path.relpath(RROUTER), "start"], env=cls.home.env, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, pass_fds=(writer,),
                timeout=WAIT_S * 3)
        finally:
            os.umask(mask)
            os.close(writer)
        cls.pipe = reader
        cls.health = get_health(cls.home.port)

    def test_start_tells_pid_and_port(self):
        self.assertEqual((self.started.returncode, self.started.stderr), (0, ""))
        self.assertRegex(self.started.stdout, r"\b%d\b" % self.health["pid"])
        self.assertRegex(self.started.stdout, r"\b%d\b" % self.home.port)
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
        """Return the pids above this process: orphans go to 1, or to the nearest of these that collects them."""
        found, pid = {1}, os.getppid()
        while pid > 1:
            found.add(pid)
            pid = int(pathlib.Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[1])
        return found

    def test_its_files_are_private(self):
        get_health(self.home.port)
        for path in [self.home.dir] + list(self.home.dir.rglob("*")):
            if path.name not in ("mode", "config.json"):            # these two the test wrote
                with self.subTest(path.name):
                    self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o700 if path.is_dir() else 0o600)

    def test_run_json_tells_where_it_listens(self):
        run = json.loads(self.home.read("run.json"))
        self.assertEqual((run["host"], run["port"]), ("localhost", self.home.port))
        self.assertEqual((run["pid"], run["upstream"]), (self.health["pid"], self.upstream.url))
        self.assertIn("start", run.values())

    def test_it_is_found_whatever_port_the_shell_has(self):
        other = {"RROUTER_PORT": str(free_port())}
        status, as_json, start, check = run_all(
            self.home, ("status",), ("status", "--json"), ("start",), ("check",), env=other)
        self.assertEqual((status.returncode, as_json.returncode, start.returncode), (0, 0, 0))
        for number in (self.health["pid"], self.home.port):
            self.assertRegex(status.stdout, r"\b%d\b" % number)
            self.assertRegex(start.stdout, r"\b%d\b" % number)
        self.assertRegex(start.stdout, "(?i)already running")
        self.assertEqual(set(json.loads(as_json.stdout)), set(HEALTH))
        self.assertNotRegex(check.stdout, r"(?im)^\W*fail\b.*daemon")

    def test_status_tells_mode_upstream_and_problems(self):
        status = self.home.run("status", check=0).stdout
        self.assertRegex(status, "antigravity")
        self.assertIn(self.upstream.url, status)
        self.assertRegex(status, "(?i)reachable|answers|up")
        self.assertRegex(status, r"\bstart\b")
        put(self.home, "mode", "nosuch\n")
        try:
            self.assertIn("nosuch", self.home.run("status", check=0).stdout)
        finally:
            put(self.home, "mode", "antigravity\n")

    def test_mode_commands_return_when_the_switch_is_in_force(self):
        for mode in ("claude", "auto", "antigravity"):
            done = self.home.run(mode, check=0, env={"RROUTER_PORT": str(free_port())})
            self.assertEqual(get_health(self.home.port)["mode"], mode)
            self.assertIn(mode, done.stdout)
            self.assertNotRegex(done.stdout + done.stderr, "(?i)not running|no daemon")

    def test_mode_commands_work_while_the_config_is_bad(self):
        """The last good config is in force, so its modes are."""
        self.addCleanup(put, self.home, "config.json", self.home.read("config.json"))
        put(self.home, "config.json", "{")
        self.home.run("claude", check=0)
        self.assertEqual(get_health(self.home.port)["mode"], "claude")
        self.home.run("antigravity", check=0)
        self.assertEqual(get_health(self.home.port)["mode"], "antigravity")

    def test_auto_again_clears_the_cooldown(self):
        put(self.home, "mode", "auto\n")
        self.addCleanup(put, self.home, "mode", "antigravity\n")
        self.upstream.play(error(503), Answer())
        with socket.create_connection(("127.0.0.1", self.home.port), WAIT_S) as connection:
            connection.sendall(request_bytes(body=b'{"model":"m"}', port=self.home.port))
            self.assertEqual(read_reply(connection).status, 200)
        self.assertTrue(get_health(self.home.port)["autoSwitch"]["switched"])
        status = self.home.run("status", check=0).stdout
        self.assertRegex(status, "503")
        self.assertRegex(status, r"\b(29|30) ?m")
        self.home.run("auto", check=0)
        auto = get_health(self.home.port)["autoSwitch"]
        self.assertEqual((auto["switched"], auto["currentTarget"], auto["retryAt"]), (False, "antigravity", None))

    def test_serve_beside_it_leaves_its_files_alone(self):
        names = ("rrouter.pid", "run.json", "rrouter.lock")
        before = [self.home.read(name) for name in names]
        beside = Home(self.upstream)
        self.addCleanup(beside.remove)
        port = beside.port
        beside.env = dict(self.home.env, RROUTER_PORT=str(port))
        with Running(self.upstream, home=beside) as router:
            self.assertRegex(router.printed(), "(?i)shar.*config|config.*shar")
            self.assertEqual(router.health()["pid"], router.process.pid)
            self.assertEqual(router.health()["mode"], "antigravity")
            self.assertEqual(json.loads(self.home.run("status", "--json", check=0).stdout)["pid"], self.health["pid"])
        self.assertEqual([self.home.read(name) for name in names], before)
        self.assertEqual(get_health(self.home.port)["pid"], self.health["pid"])


FALSE_FILES = (
    # rrouter.pid, run.json
    ("", ""),
    ("\n", "{"),
    ("not a number\n", "[]"),
    ("12 34\n", "7"),
    ("99999999\n", '{"pid": 99999999, "port": 70000, "host": "localhost", "startedBy": "start"}'),
    ("9" * 400, '{"pid": "x", "port": "y", "host": 7}'),
    ("\0\0\0\0", '{"port": -1}'),
    ("%(sleeper)d\n", '{"pid": %(sleeper)d, "port": %(foreign)d, "host": "localhost", "startedBy": "start"}'),
)


class DaemonTest(DaemonTestBase):

    def home(self, *arguments, **options):
        return self.new_home(self.addCleanup, *arguments, **options)

    def test_life(self):
        home = self.home()
        home.run("start", check=0)
        first = self.assert_alone(home)
        for _ in range(2):
            with socket.create_connection(("127.0.0.1", home.port), WAIT_S) as connection:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                read_all(connection)                    # rrouter closed first: its side stays in TIME_WAIT
            done = home.run("restart", check=0, env={"RROUTER_PORT": str(home.port)})
            self.assertNotIn("in use", done.stdout + done.stderr)
            second = self.assert_alone(home)
            self.assertNotEqual(first, second)
            first = second
        done = home.run("stop", check=0, env={"RROUTER_PORT": str(free_port())})
        self.assert_nothing_left(home)
        self.assertRegex(done.stdout, "(?i)stopped")
        self.assertEqual(home.run("status").returncode, 3)

    def test_restart_starts_when_nothing_runs(self):
        home = self.home()
        home.run("restart", check=0)
        self.assert_alone(home)

    def test_four_starts_at_once_leave_one_daemon(self):
        home = self.home()
        for done in run_all(home, *[("start",)] * 4, check=0):
            self.assertRegex(done.stdout, r"\b%d\b.*\b%d\b|\b%d\b.*\b%d\b" % (
                (self.assert_alone(home), home.port) + (home.port, self.assert_alone(home))))

    def test_killed_daemon_hinders_nothing(self):
        home = self.home()
        home.run("start", check=0)
        killed = self.assert_alone(home)
        os.kill(killed, signal.SIGKILL)
        Running.wait_until(lambda: get_health(home.port) is None)
        self.assertEqual(home.run("status").returncode, 3)
        home.run("start", check=0)
        self.assertNotEqual(self.assert_alone(home), killed)

    def test_false_files_are_harmless(self):
        """Whatever the pid and run files say, only a held lock makes a daemon, and no stranger gets a signal."""
        sleeper = subprocess.Popen(["sleep", "600"])
        self.addCleanup(sleeper.wait)
        self.addCleanup(sleeper.kill)
        values = {"foreign": self.upstream.port, "sleeper": sleeper.pid}
        rows = [(pid % values if "%" in pid else pid, run % values) for pid, run in FALSE_FILES]

        def stop(row):
            home = self.home("claude")
            put(home, "rrouter.pid", row[0])
            put(home, "run.json", row[1])
            return home.run("stop"), home.run("status")

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for row, (stopped, status) in zip(rows, pool.map(stop, rows)):
                with self.subTest(row):
                    self.assertEqual((stopped.returncode, status.returncode), (0, 3), (stopped, status))
                    self.assertRegex(stopped.stdout, "(?i)not running|nothing runs")
        home = self.home("claude")
        put(home, "rrouter.pid", "%d\n" % sleeper.pid)
        put(home, "run.json", rows[-1][1])
        put(home, "rrouter.lock", "%d\n" % sleeper.pid)
        home.run("start", check=0)
        self.assert_alone(home)
        put(home, "rrouter.pid", "%d\n" % sleeper.pid)
        home.run("stop", check=0)
        self.assertEqual(processes(home), [])
        self.assertIsNone(sleeper.poll())

    def test_lock_that_is_no_file_hangs_no_command(self):
        """Opened as a file is, a FIFO without a writer would block for ever."""
        home, kept = self.home("claude"), [("status",), ("stop",), ("mode",), ("claude",)]
        lock = home.dir / "rrouter.lock"
        os.mkfifo(str(lock))
        *done, start, serve = run_all(home, *kept, ("start",), ("serve",), timeout=WAIT_S * 2)
        self.assertEqual([command.returncode for command in done], [3, 0, 0, 0])
        self.assertRegex(done[1].stdout, "not running")
        lock.unlink()
        lock.mkdir()
        for refused in (start, serve, home.run("restart", timeout=WAIT_S * 2)):
            self.assertEqual(refused.returncode, 1, refused)
            self.assertRegex(refused.stderr, r"(?m)^rrouter: .*rrouter\.lock: .*no regular file: remove it$")
        self.assertEqual(processes(home), [])

    # Words in a lock file that somebody holds; as the pid in os.kill, 0 is the caller's own process group.
    NO_PIDS = "0", "99999999999", "abc"

    def test_number_in_a_held_lock_that_is_no_pid_is_not_believed(self):
        """The shell leads the process group of the commands: were the group signalled, it would not come to its end."""
        script = 'for command in status stop claude; do "$0" "$1" $command || echo "status $?"; done; echo whole'

        def commands(words):
            home = self.home("claude")
            put(home, "rrouter.lock", words)
            with open(str(home.dir / "rrouter.lock")) as holder:
                fcntl.flock(holder, fcntl.LOCK_EX)
                return subprocess.run(
                    ["/bin/sh", "-c", script, sys.executable, RROUTER], env=home.env, stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True, start_new_session=True,
                    timeout=WAIT_S * 4)

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for words, done in zip(self.NO_PIDS, pool.map(commands, self.NO_PIDS)):
                with self.subTest(words):
                    self.assertEqual(done.returncode, 0, done)
                    self.assertRegex(done.stdout, r"(?s)\Amode: +claude\ndaemon: +not running.*\nstatus 3\n"
                                                  r"rrouter is not running\nmode claude \(written; .*\)\nwhole\n\Z")

    def test_start_beside_a_lock_that_names_nobody_tells_that_nothing_answers(self):
        home = self.home("claude")
        put(home, "rrouter.lock", "0\n")
        code = "import sys; sys.path.insert(0, %r); import rrouter; rrouter.START_S = 1; rrouter.main()" % str(HERE)
        with open(str(home.dir / "rrouter.lock")) as holder:
            fcntl.flock(holder, fcntl.LOCK_EX)
            done = subprocess.run([sys.executable, "-c", code, "start"], env=home.env, stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                                  start_new_session=True, timeout=WAIT_S * 4)
        self.assertEqual((done.returncode, done.stdout), (1, ""), done)
        self.assertRegex(done.stderr, r"\Arrouter: the daemon (does not answer|did not start); the log ends with\n")

    def test_start_on_a_taken_port_tells_the_reason_and_leaves_nothing(self):
        home = self.home()
        with contextlib.closing(Upstream(port=home.port)):
            done = home.run("start", timeout=WAIT_S * 2)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, r"rrouter: .*\b%d\b" % home.port)
        self.assertRegex(done.stderr, "(?is)CLIProxyAPI.*pprof")
        self.assert_nothing_left(home)

    def test_start_finds_the_port_taken_by_another_homes_rrouter(self):
        first = self.home()
        first.run("start", check=0)
        second = self.home(port=first.port)
        done = second.run("start", timeout=WAIT_S * 2)
        self.assertEqual(done.returncode, 1, done)
        self.assertRegex(done.stderr, r"rrouter.*\b%d\b" % self.assert_alone(first))
        self.assertEqual(processes(second), [])

    def test_start_finds_serve_running(self):
        with Running(self.upstream) as router:
            done = router.home.run("start", check=0)
            self.assertRegex(done.stdout, r"(?i)already running.*\b%d\b" % router.process.pid)
            self.assertEqual(get_health(router.port)["pid"], router.process.pid)
            router.home.run("stop", check=0)
            self.assertEqual(router.process.wait(WAIT_S), 0)

    def test_signals_in_the_middle_of_a_start_hinder_no_later_one(self):
        home = self.home()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL):
            with self.subTest(number):
                starting = begin(home, "start")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    starting.wait(random.uniform(0.02, 0.35))           # the signal may come at any moment
                starting.send_signal(number)
                starting.wait(WAIT_S)
                home.run("start", check=0)
                os.kill(self.assert_alone(home), signal.SIGKILL)
                Running.wait_until(lambda: not processes(home))

    def test_start_without_standard_descriptors(self):
        home = self.home()
        subprocess.run(["/bin/sh", "-c", 'exec "$0" "$1" start <&- >&- 2>&-', sys.executable, RROUTER], env=home.env,
                       check=True, timeout=WAIT_S * 2)
        self.assert_alone(home)

    def test_zip_application(self):
        home = self.home("claude")
        source = home.root / "source"
        source.mkdir()
        shutil.copy(RROUTER, str(source))
        zipapp.create_archive(str(source), str(home.root / "rrouter.pyz"), main="rrouter:main")

        def run(*arguments):
            return subprocess.run([sys.executable, "rrouter.pyz", *arguments], env=home.env, cwd=str(home.root),
                                  stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=WAIT_S * 6).returncode

        self.assertEqual((run("status"), run("start"), run("status")), (3, 0, 0))
        self.assert_alone(home)
        self.assertEqual(run("stop"), 0)
        self.assert_nothing_left(home)


class InterruptedStartTest(unittest.TestCase):
    """A signal at any moment of a start, a restart or a stop leaves nothing in the way of the next start.

    It comes to one process, or to the whole process group of the command, as that of Ctrl-C or of a closed terminal
    does.
    """

    ROUNDS, SEED = 100 if SOAKING else 6, os.environ.get("RROUTER_SOAK") or "20260129"
    SIGNALS = "SIGTERM", "SIGHUP", "SIGINT", "SIGPIPE", "SIGKILL"
    GROUP_SIGNALS = "SIGINT", "SIGTERM", "SIGHUP"

    def assert_no_traceback(self, printed):
        """There is none but of a SIGINT while Python starts: until the last statement of the program calls main."""
        call = RROUTER_TEXT.index('\nif __name__ == "__main__":')
        last = RROUTER_TEXT.count("\n", 0, call) + 2
        for block in printed.split("Traceback (most recent call last)")[1:]:
            frames = re.findall(r'File "[^"]*rrouter\.py", line (\d+), in (\S+)', block)
            starts = not frames or (int(frames[0][0]) < last and frames[0][1] == "<module>")
            self.assertTrue(starts and "KeyboardInterrupt" in block and "_shutdown" not in block, printed)

    def test_next_start_works(self):
        if SOAKING:
            print("soak: seed %s, %d interrupted starts" % (self.SEED, self.ROUNDS), file=sys.stderr)
        home, dice = Home(), random.Random(self.SEED)
        self.addCleanup(home.remove)
        self.addCleanup(home.run, "stop")
        for number in range(self.ROUNDS):
            command = ("start", "serve", "restart", "stop")[number % 4]
            group = number % 3 != 1
            name, delay_s = dice.choice(self.GROUP_SIGNALS if group else self.SIGNALS), dice.random() * 0.3
            with self.subTest(round=number, command=command, signal=name, group=group, delay_s=delay_s):
                with tempfile.TemporaryFile() as output:
                    with subprocess.Popen([sys.executable, RROUTER, command], env=home.env, stdin=subprocess.DEVNULL,
                                          stdout=output, stderr=output, start_new_session=True) as process:
                        time.sleep(delay_s)         # the moment is what the dice say
                        victims = [process.pid, *(processes(home) if LINUX else ())]
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
                    printed = output.read().decode()
                if name == "SIGINT":
                    self.assert_no_traceback(printed)
                else:
                    self.assertNotIn("Traceback", printed)
                home.run("start", check=0)
                pid = get_health(home.port)["pid"]
                if LINUX:
                    # One that lost the race for the lock, or has just given it back, may still be on its way out.
                    Running.wait_until(lambda home=home, pid=pid: processes(home) == [pid])
                self.assert_no_traceback(home.read("logs/rrouter.log"))
                if number % 2:
                    home.run("stop", check=0)
                    self.assertIsNone(get_health(home.port))


class StateTest(DaemonTestBase):
    """The cooldown outlives the process."""

    def setUp(self):
        self.home = self.new_home(self.addCleanup, "auto", HASTY_CONFIG)
        self.upstream.clear()
        self.router = Running(self.upstream, home=self.home)
        self.addCleanup(self.router.__exit__)
        self.upstream.play(error(503), Answer())
        self.assertEqual(self.router.post().status, 200)
        self.before = self.router.health()["autoSwitch"]
        self.assertTrue(self.before["switched"])
        self.router.stop()

    def again(self):
        """Start again; return `autoSwitch` of /health."""
        self.router.start()
        return self.router.health()["autoSwitch"]

    def test_restart_keeps_it(self):
        after = self.again()
        for name in ("switched", "switchCount", "reason", "switchedAt", "retryAt", "cooldownSeconds", "currentTarget"):
            self.assertEqual(after[name], self.before[name], name)
        self.assertLessEqual(after["cooldownRemainingSeconds"], self.before["cooldownRemainingSeconds"])
        self.assertGreater(after["cooldownRemainingSeconds"], 1700)

    def test_mode_written_in_between_clears_it(self):
        self.home.run("auto", check=0)
        self.assertFalse(self.again()["switched"])

    def test_auto_section_written_in_between_clears_it(self):
        put(self.home, "config.json", json.dumps(dict(HASTY_CONFIG, auto={"failureThreshold": 2})))
        self.assertFalse(self.again()["switched"])

    def test_rules_written_in_between_do_not_clear_it(self):
        put(self.home, "config.json", json.dumps(HASTY_CONFIG).replace("claude-opus-*", "opus-*"))
        self.assertTrue(self.again()["switched"])

    def test_clock_set_back_does_not_lock_a_target_out(self):
        """Deadlines far in the future are what a clock set back makes of them."""
        text = re.sub(r"\b20[2-9]\d-", "2090-", self.home.read("state.json"))
        put(self.home, "state.json", re.sub(r"\b1(?=[6-9]\d{8}\b)", "3", text))
        self.assertLessEqual(self.again()["cooldownRemainingSeconds"] or 0, 240 * 60)

    def test_content_that_makes_no_sense_is_forgotten(self):
        saved = json.loads(self.home.read("state.json"))
        own = {name: value for name, value in saved.items() if isinstance(value, dict)}
        wrong = [dict(saved, **dict.fromkeys(own, value)) for value in (7, {"m": 7})]
        wrong.append(dict(saved, **{name: dict.fromkeys(value, "x") for name, value in own.items()}))
        for content in ["", "{", "[]", "[" * 100000] + list(map(json.dumps, wrong)):
            with self.subTest(content[:20]):
                put(self.home, "state.json", content)
                before = len(self.router.log())
                self.assertFalse(self.again()["switched"])
                lines = [line for line in self.router.log()[before:].splitlines() if "state.json" in line]
                self.assertEqual(len(lines), 1, lines)
                self.assertEqual(self.router.post().status, 200)
                self.router.stop()


# Check ########################################################################

LISTED = ("gemini-claude-sonnet-4-5-thinking", "gemini-claude-opus-4-5-thinking", "gemini-3-flash-preview")


def list_models(*names):
    return Answer(200, json.dumps({"object": "list", "data": [{"id": name} for name in names]}).encode())


class CheckTest(RouterTest):

    def setUp(self):
        super().setUp()
        self.home = self.rrouter.home
        self.settings(json.dumps({"env": {"ANTHROPIC_BASE_URL": "http://localhost:%d" % self.rrouter.port,
                                          "ANTHROPIC_AUTH_TOKEN": "sk-secret-token"}}))
        self.models = list_models(*LISTED)
        self.upstream.default = lambda request: self.models if request.target.startswith("/v1/models") else Answer()

    def settings(self, text):
        (self.home.root / ".claude").mkdir(exist_ok=True)
        (self.home.root / ".claude" / "settings.json").write_text(text)

    def check(self, *patterns, env=()):
        """Run it; see that status and lines agree, and that each pattern is found; return what it printed."""
        done = self.home.run("check", env=env)
        self.assertNotIn("sk-secret-token", done.stdout + done.stderr)
        for pattern in patterns:
            self.assertRegex(done.stdout, "(?im)" + pattern)
        self.assertEqual(done.returncode, 1 if re.search(r"(?im)^\W*fail\b", done.stdout) else 0, done.stdout)
        return done.stdout

    def test_all_is_well(self):
        env = {"ANTHROPIC_BASE_URL": "http://localhost:%d" % self.rrouter.port}
        text = self.check(r"^\W*ok\b.*upstream", r"^\W*ok\b.*config", env=env)
        self.assertNotRegex(text, r"(?im)^\W*(fail|warn)\b")
        asked = [request for request in self.upstream.received if request.target.startswith("/v1/models")]
        self.assertTrue(asked)
        for request in asked:
            self.assertEqual(request.header("authorization"), "Bearer sk-secret-token")
            self.assertFalse([name for name, _ in request.fields if name.lower().startswith("anthropic")])
            self.assertNotIn("claude-cli", request.header("user-agent") or "")
        self.assertFalse([request for request in self.upstream.received if request.method == "POST"])

    def test_names_the_upstream_does_not_know_come_with_their_remedy(self):
        self.models = list_models(LISTED[0], "gemini-3-flash")
        text = self.check(r"^\W*(fail|warn)\b.*%s" % LISTED[2], "oauth-model-alias", "alias: .*%s" % LISTED[2])
        self.assertNotRegex(text, r"(?im)^\W*(fail|warn)\b.*know %s" % LISTED[0])

    def test_key_that_the_upstream_refuses(self):
        self.models = Answer(401, b'{"error":"Invalid API key"}', reason="Unauthorized")
        self.check(r"^\W*(fail|warn)\b.*(401|Invalid API key)")

    def test_client_that_points_elsewhere(self):
        for settings, env, pattern in (
                (json.dumps({"env": {"ANTHROPIC_BASE_URL": "http://localhost:1"}}), (), "settings.json"),
                ("{", (), "settings.json"), ("[]", (), "settings.json"), ('{"env": 7}', (), "settings.json"),
                (None, {"ANTHROPIC_BASE_URL": "http://localhost:1/"}, "ANTHROPIC_BASE_URL")):
            with self.subTest(settings=settings, env=env):
                if settings:
                    self.settings(settings)
                done = self.home.run("check", env=env)
                self.assertRegex(done.stdout, r"(?im)^\W*(fail|warn)\b.*%s" % pattern)

    def test_bad_files_of_ours(self):
        put(self.home, "config.json", "{")
        self.addCleanup((self.home.dir / "config.json").unlink)
        put(self.home, "mode", "nosuch\n")
        self.check(r"^\W*fail\b.*config\.json", r"^\W*(fail|warn)\b.*nosuch")

    def test_upstream_is_down(self):
        with contextlib.closing(Upstream()) as upstream:
            pass
        with Running(upstream, env={"HOME": str(self.home.root / "empty home")}) as router:
            done = router.home.run("check")
            self.assertEqual(done.returncode, 1)
            self.assertRegex(done.stdout, r"(?im)^\W*fail\b.*%s" % re.escape(upstream.url))
            status = router.home.run("status", check=0)
            self.assertRegex(status.stdout, "(?i)unreachable|not reachable|refused|down")


# Documents ####################################################################

@unittest.skipUnless((HERE / "README.md").exists(), "no README.md here")
class ReadmeTest(unittest.TestCase):
    """What the two READMEs and the help name is the same."""

    @classmethod
    def setUpClass(cls):
        home = Home()
        cls.addClassCleanup(home.remove)
        cls.help = home.run("help", check=0).stdout
        cls.readmes = [path.read_text(encoding="utf-8") for path in sorted(HERE.glob("README*.md"))]

    def test_commands(self):
        """A row of the help is `NAME [ARGUMENTS], ALIAS, …` and what it does; the table has these in two cells."""
        block = self.help.split("\n\n")[2]
        names = {name.split()[0] for row in block.splitlines()
                 for name in re.split(r" {2,}", row.strip())[0].split(", ")}
        self.assertIn("serve", names)
        for text in self.readmes:
            table = re.search(r"(?m)^\|.*\n\|[ |:-]+\n\|.*`(?:rrouter )?serve`.*\n(?:\|.*\n)*", text)
            cells = [cell for row in table.group().splitlines()[2:] for cell in row.split("|")[1:3]]
            found = [name for cell in cells for name in re.findall(r"`(?:rrouter )?([^`]+)`", cell)]
            self.assertEqual({name.split()[0] for name in found}, names)
            for word in ("edit", "reset", "path"):
                self.assertRegex(table.group(), "`[a-z ]*%s`" % word)

    def test_environment_variables(self):
        names = set(re.findall(r"\bRROUTER_[A-Z]+\b", self.help))
        self.assertEqual(names, {"RROUTER_PORT", "RROUTER_UPSTREAM", "RROUTER_HOST"})
        for text in self.readmes:
            self.assertEqual(set(re.findall(r"\bRROUTER_[A-Z]+\b", text)), names)


# Installation #################################################################

PROJECT = pathlib.Path(RROUTER).resolve().parent

# Stands in for systemctl and launchctl: notes what it is asked, and starts and stops the service as they would, with
# their bare environment.  A file `deaf` makes it answer nobody, `fails` holds a word of the requests that fail.
MANAGER = r'''
import os, signal, sys, time
here, home, asked = os.path.dirname(os.path.abspath(__file__)), os.environ["HOME"], " ".join(sys.argv[1:])

def note(name):
    return os.path.join(here, name)

with open(note("asked"), "a") as file:
    file.write(asked.replace(home, "~") + "\n")
if os.path.exists(note("deaf")):
    sys.exit("Failed to connect to bus: No medium found")
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

def stop():
    for turn in range(6000):        # a minute
        if not pid():
            return
        os.kill(pid() or os.getpid(), 0 if turn else signal.SIGTERM)
        time.sleep(0.01)
    sys.exit("it does not end")

def start(command, **marks):
    stop()
    marks.update(HOME=home, PATH="/usr/bin:/bin:/usr/sbin:/sbin")
    if os.fork() == 0:      # its parent reaps it at once, so that its end is seen
        os.setsid()
        for number in 0, 1, 2:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        daemon = os.posix_spawn(command[0], command, marks)
        with open(note("pid"), "w") as file:
            file.write(str(daemon))
        os.waitpid(daemon, 0)
        os._exit(0)
    for _ in range(6000):
        if pid():
            break
        time.sleep(0.01)

unit = home + "/.config/systemd/user/rrouter.service"
verb = [word for word in sys.argv[1:] if not word.startswith("-")][0]
if verb == "is-active" or verb == "print" and asked.endswith("com.rrouter"):
    sys.exit(not pid())
elif verb in ("cat", "is-enabled"):
    sys.exit(not os.path.exists(unit))
elif verb in ("stop", "bootout") or "disable --now" in asked:
    stop()
elif verb in ("start", "kickstart") and pid():
    pass
elif verb in ("start", "restart"):
    with open(unit) as file:
        settings = dict(line.rstrip().replace("%h", home).split("=", 1) for line in file if "=" in line)
    start(["/bin/sh", "-c", '[ ! -e "$1" ] || { set -a; . "$1"; }; SYSTEMD_EXEC_PID=$$ exec "$2" serve', "sh",
           settings["EnvironmentFile"].lstrip("-"), settings["ExecStart"].rpartition(" ")[0]], INVOCATION_ID="0" * 32)
elif verb == "bootstrap":
    if pid():
        sys.exit("Bootstrap failed: 5: Input/output error")
    import plistlib
    with open(home + "/Library/LaunchAgents/com.rrouter.plist", "rb") as file:
        start(plistlib.load(file)["ProgramArguments"], XPC_SERVICE_NAME="com.rrouter")
'''

# Answers what install.sh asks of rrouter, at once, and does nothing: for what only concerns files.
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

# And goes on until it is stopped, for a manager to run.
SLEEPER = """
if sys.argv[1] == "serve":
    import signal
    signal.sigwait([signal.SIGTERM])
"""

# Kills the whole installation just before the Python inside install.sh does KILL_AT.
KILLER = '''
import os, re, signal, sys
def kill(event, details):
    if getattr(sys, "argv", [""])[0] == "-" and event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
        if re.search(os.environ["KILL_AT"], "%s %s" % (event, details[event == "os.rename"])):
            os.killpg(0, signal.SIGKILL)
sys.addaudithook(kill)
'''


@functools.lru_cache(None)
def light_python():
    """Return an interpreter like this one that starts fast, for it has nothing installed but the KILLER."""
    root = pathlib.Path(tempfile.mkdtemp(prefix="rrouter-python-"))
    atexit.register(shutil.rmtree, str(root), True)
    real = os.path.realpath(sys.executable)
    packages = root / "lib" / ("python%d.%d" % sys.version_info[:2]) / "site-packages"
    packages.mkdir(parents=True)
    (packages / "killer.py").write_text(KILLER)
    (packages / "killer.pth").write_text("import os; os.environ.get('KILL_AT') and __import__('killer')\n")
    (root / "pyvenv.cfg").write_text("home = %s\ninclude-system-site-packages = false\n" % os.path.dirname(real))
    (root / "bin").mkdir()
    (root / "bin" / "python3").symlink_to(real)
    return str(root / "bin" / "python3")


class Installation(Home):
    """An empty HOME with a space in its name, a clone beside it, and stand-ins of the system's programs on PATH."""

    def __init__(self, system="Linux", deaf=False, router=None):
        super().__init__()
        self.home, self.clone, self.stand_ins = (self.root / name for name in ("ho me", "a clone", "stand-ins"))
        self.dir = self.home / ".rrouter"
        self.program = self.home / "bin" / "rrouter"
        self.unit = self.home / ".config" / "systemd" / "user" / "rrouter.service"
        self.agent = self.home / "Library" / "LaunchAgents" / "com.rrouter.plist"
        self.settings = self.home / ".claude" / "settings.json"
        self.url = "http://localhost:%d" % self.port
        self.env.update(HOME=str(self.home), PYTHON=light_python(), SHELL="/bin/bash",
                        PATH="%s:/usr/bin:/bin" % self.stand_ins)
        for directory in (self.home, self.clone, self.stand_ins):
            directory.mkdir()
        for name in ("install.sh", "rrouter.service", "com.rrouter.plist", "rrouter.py"):
            shutil.copy(str(PROJECT / name), str(self.clone))
        if router:
            (self.clone / "rrouter.py").write_text(router)
        self.stand_in("uname", "#!/bin/sh\necho %s\n" % system)
        for name in ("systemctl", "launchctl"):
            self.stand_in(name, "#!/bin/sh\nexec '%s' -IS \"${0%%/*}/manager.py\" \"$@\"\n" % sys.executable)
        self.note("manager.py", MANAGER)
        self.note("asked", "")
        if deaf:
            self.note("deaf", "")

    def stand_in(self, name, text):
        (self.stand_ins / name).write_text(text)
        (self.stand_ins / name).chmod(0o755)

    def note(self, name, text):
        (self.stand_ins / name).write_text(text)

    def asked(self):
        """Return what the service manager was told to do since the last time; not what it was merely asked."""
        lines = (self.stand_ins / "asked").read_text().splitlines()
        self.note("asked", "")
        return [line for line in lines if not re.search(r"\b(show|print|is-|status|cat|list|reset-failed|enable gui)",
                                                        line)]

    def install(self, *options, status=0, env=(), shell="sh"):
        """Run install.sh to its end, and return all it printed."""
        done = subprocess.run([*shell.split(), str(self.clone / "install.sh"), *options], cwd=str(self.root),
                              env=dict(self.env, **dict(env)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, universal_newlines=True, start_new_session=True, timeout=60)
        if done.returncode != status or "Traceback" in done.stdout:
            raise AssertionError("install.sh %s: status %d\n%s" % (" ".join(options), done.returncode, done.stdout))
        return done.stdout

    def rrouter(self, *arguments):
        """Run the installed program; return what it printed on stdout."""
        return subprocess.run([str(self.program), *arguments], env=self.env, stdin=subprocess.DEVNULL, check=True,
                              stdout=subprocess.PIPE, universal_newlines=True, timeout=60).stdout

    def health(self):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)) as connection:
            connection.request("GET", "/health")
            return json.loads(connection.getresponse().read())

    def put(self, path, content, mode=0o644):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(mode)

    def tree(self, data=True):
        """Return everything under HOME as {name: (mode, content)}; without `data`, not what is in ~/.rrouter."""
        return {str(path.relative_to(self.home)): (
                    stat.S_IMODE(path.lstat().st_mode), os.readlink(str(path)) if path.is_symlink() else
                    path.read_bytes() if path.is_file() else None)
                for path in sorted(self.home.rglob("*")) if data or ".rrouter" not in path.parts}

    def remove(self):
        """Leave nothing running, whatever a test did."""
        if (self.stand_ins / "pid").exists():
            with contextlib.suppress(FileNotFoundError):
                (self.stand_ins / "deaf").unlink()
            self._run_quietly(str(self.stand_ins / "systemctl"), "stop")
        if (self.dir / "rrouter.pid").exists():
            self._run_quietly(str(self.program), "stop")
        super().remove()

    def _run_quietly(self, *command):
        subprocess.run(command, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL, timeout=60)


class InstallTest(unittest.TestCase):
    """Base of the tests that install."""

    def installation(self, *arguments, **options):
        installation = Installation(*arguments, **options)
        self.addCleanup(installation.remove)
        return installation

    def side_by_side(self, check, rows):
        """Call `check` with each of the rows, all at once: most of the time goes into starting programs."""
        with concurrent.futures.ThreadPoolExecutor(len(rows)) as pool:
            for row, future in [(row, pool.submit(check, *row)) for row in rows]:
                with self.subTest(row=row):
                    future.result()

    def assert_free(self, port):
        """Nobody listens there any more."""
        with socket.socket() as probe:
            self.assertNotEqual(probe.connect_ex(("127.0.0.1", port)), 0)


class ServiceFilesTest(unittest.TestCase):

    def test_unit_starts_restarts_and_stops_as_promised(self):
        unit = configparser.ConfigParser(interpolation=None)
        unit.optionxform = str
        unit.read(str(PROJECT / "rrouter.service"), encoding="utf-8")
        service = unit["Service"]
        self.assertEqual(service["ExecStart"], "%h/bin/rrouter serve")
        self.assertEqual((service["Restart"], service["RestartPreventExitStatus"]), ("on-failure", "2"))
        self.assertGreater(int(service["TimeoutStopSec"]), 30)
        self.assertIn("-HUP $MAINPID", service["ExecReload"])
        # A taken port ends in `failed`, not in a loop: all the starts that are allowed fit into their interval.
        self.assertLess(int(service["RestartSec"]) * int(unit["Unit"]["StartLimitBurst"]),
                        int(unit["Unit"]["StartLimitIntervalSec"]))
        self.assertEqual(unit["Install"]["WantedBy"], "default.target")

    def test_agent_starts_restarts_and_stops_as_promised(self):
        with open(str(PROJECT / "com.rrouter.plist"), "rb") as file:
            agent = plistlib.load(file)
        self.assertEqual(agent["Label"], "com.rrouter")
        self.assertIn('exec "$HOME/bin/rrouter" serve', agent["ProgramArguments"][-1])
        self.assertEqual(agent["KeepAlive"], {"SuccessfulExit": False})
        self.assertGreaterEqual(agent["ThrottleInterval"], 10)
        self.assertGreater(agent["ExitTimeOut"], 30)

    def test_service_files_hold_no_settings(self):
        for name, comment in (("rrouter.service", r"(?m)^#.*$"), ("com.rrouter.plist", r"(?s)<!--.*?-->")):
            text = (PROJECT / name).read_text(encoding="utf-8")
            self.assertNotIn("RROUTER_", re.sub(comment, "", text), name)
            self.assertIn(".config/rrouter.env", re.sub(comment, "", text), name)

    @unittest.skipUnless(shutil.which("systemd-analyze"), "systemd-analyze is not here")
    def test_systemd_finds_nothing_wrong_with_the_unit(self):
        home = Home()
        self.addCleanup(home.remove)
        for directory in ("bin", "run"):
            (home.root / directory).mkdir()
        shutil.copy(RROUTER, str(home.root / "bin" / "rrouter"))
        (home.root / "bin" / "rrouter").chmod(0o755)
        done = subprocess.run(["systemd-analyze", "--user", "verify", str(PROJECT / "rrouter.service")],
                              env=dict(home.env, XDG_RUNTIME_DIR=str(home.root / "run")), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, universal_newlines=True, timeout=60)
        self.assertEqual((done.returncode, done.stdout), (0, ""))

    @unittest.skipUnless(subprocess.run(["sh", "-c", "systemctl --user show-environment"], stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL, timeout=WAIT_S).returncode == 0,
                         "no systemd user manager runs here")
    def test_real_user_manager_runs_the_unit(self):
        """A copy of the unit under another name, for this HOME: the manager's own rrouter is left alone."""
        home = Home(mode="claude")
        self.addCleanup(home.remove)
        (home.root / "bin").mkdir()
        program = home.root / "bin" / "rrouter"
        program.write_text("#!%s\n%s" % (sys.executable, pathlib.Path(RROUTER).read_text(encoding="utf-8")))
        program.chmod(0o755)
        (home.root / ".config").mkdir()
        (home.root / ".config" / "rrouter.env").write_text("RROUTER_PORT=%d\n" % home.port)
        name = "rrouter-test-%d.service" % os.getpid()
        unit = pathlib.Path(os.environ["XDG_RUNTIME_DIR"], "systemd", "user", name)
        unit.parent.mkdir(parents=True, exist_ok=True)
        unit.write_text((PROJECT / "rrouter.service").read_text(encoding="utf-8").replace(
            "ExecStart=%h/bin/rrouter", 'ExecStart="%s"' % program).replace("%h", str(home.root)).replace(
            "[Service]", '[Service]\nEnvironment="HOME=%s"' % home.root))

        def systemctl(*words):
            return subprocess.run(["systemctl", "--user", *words], stdout=subprocess.PIPE, check=True,
                                  universal_newlines=True, timeout=60).stdout
        try:
            systemctl("daemon-reload")
            systemctl("start", name)
            Running.wait_until(lambda: home.run("status", "--json").returncode == 0)
            self.assertEqual(json.loads(home.run("status", "--json").stdout)["startedBy"], "systemd")
            home.run("auto", check=0)
            self.assertEqual(home.read("mode").strip(), "auto")
            systemctl("reload", name)
            systemctl("stop", name)
            self.assertIn("Result=success", systemctl("show", "-p", "Result", name))
            self.assertTrue((home.dir / "logs" / "rrouter.log").exists())
        finally:
            systemctl("stop", name)
            unit.unlink()
            systemctl("daemon-reload")


class InstallScriptTest(InstallTest):

    @unittest.skipUnless(shutil.which("shellcheck"), "shellcheck is not here")
    def test_shellcheck_finds_nothing(self):
        done = subprocess.run(["shellcheck", str(PROJECT / "install.sh")], stdout=subprocess.PIPE,
                              universal_newlines=True, timeout=60)
        self.assertEqual((done.returncode, done.stdout), (0, ""))

    def test_every_shell_gives_the_same_plan(self):
        installation = self.installation(router=STUB)
        plans = {shell: installation.install("--dry-run", "--claude", shell=shell)
                 for shell in ("sh", "dash", "bash --posix", "busybox sh", "zsh --emulate sh")
                 if shutil.which(shell.split()[0])}
        self.assertEqual(len(set(plans.values())), 1, plans)

    def test_output_that_nobody_takes(self):
        installation = self.installation(router=STUB)
        cases = [("nobody reads", ["--dry-run"], 1, ""),
                 ("nobody reads", [], 1, "install.sh: stopped, for nobody reads its output; run it again to go on\n")]
        if os.path.exists("/dev/full"):
            cases.append(("full", ["--dry-run"], 1, "install.sh: [Errno 28] No space left on device\n"))
        for label, options, status, says in cases:
            with self.subTest(label, options=options):
                if label == "full":
                    output = os.open("/dev/full", os.O_WRONLY)
                else:
                    reader, output = os.pipe()
                    os.close(reader)
                try:
                    done = subprocess.run(["sh", str(installation.clone / "install.sh"), *options],
                                          env=installation.env, stdin=subprocess.DEVNULL, stdout=output,
                                          stderr=subprocess.PIPE, universal_newlines=True, timeout=60)
                finally:
                    os.close(output)
                self.assertEqual((done.returncode, done.stderr), (status, says))
        installation.install()
        installation.install("--uninstall", "--purge")

    def test_options(self):
        installation = self.installation(router=STUB)
        # options                       status  says
        for options, status, says in (
                (["--help"],                 0, "Usage: ./install.sh"),
                (["-h"],                     0, "--uninstall"),
                (["--claud"],                2, "unknown option --claud"),
                (["claude"],                 2, "unknown option claude"),
                (["--purge"],                2, "--purge goes with --uninstall"),
                (["--uninstall", "--claude"], 2, "--claude")):
            with self.subTest(options=options):
                self.assertIn(says, installation.install(*options, status=status))
        self.assertEqual(installation.tree(), {})
        self.assertEqual(installation.asked(), [])

    def test_dry_run_changes_nothing(self):
        installation = self.installation(router=STUB)
        plan = installation.install("--dry-run", "--claude")
        for says in ("would install ~/bin/rrouter", "would run systemctl --user enable", "would set the mode to auto",
                     "would set env.ANTHROPIC_BASE_URL"):
            self.assertIn(says, plan)
        created = re.findall("would create (.*)", plan)
        self.assertIn("~/.config", created)
        self.assertEqual(len(created), len(set(created)), created)
        self.assertEqual(installation.tree(), {})
        installation.put(installation.program, b"another program\n", 0o755)
        installation.put(installation.settings, b'{"model": "opus"}')
        before = installation.tree()
        self.assertIn("would keep the old ~/bin/rrouter", installation.install("--dry-run", "--claude"))
        self.assertEqual(installation.tree(), before)
        self.assertEqual(installation.asked(), [])

    def test_dry_run_of_the_uninstallation_changes_nothing(self):
        installation = self.installation(deaf=True, router=STUB)
        installation.install("--claude")
        before = installation.tree()
        plan = installation.install("--uninstall", "--purge", "--dry-run")
        self.assertEqual(installation.tree(), before)
        for says in ("would remove ~/bin/rrouter", "would remove ~/.rrouter", "would put env.ANTHROPIC_BASE_URL"):
            self.assertIn(says, plan)

    def test_bad_setting_of_this_shell_stops_before_anything_is_done(self):
        installation = self.installation(deaf=True)
        self.assertIn("RROUTER_PORT", installation.install(status=1, env={"RROUTER_PORT": "eighty"}))
        self.assertEqual(installation.tree(), {})

    def test_program_that_does_not_start_replaces_nothing(self):
        installation = self.installation(deaf=True, router=STUB)
        installation.install()
        before = installation.tree(data=False)
        (installation.clone / "rrouter.py").write_text(STUB.replace('print("rrouter 0.0.1")', "sys.exit(1)"))
        self.assertIn("does not start here", installation.install(status=1))
        self.assertEqual(installation.tree(data=False), before)

    def test_daemon_that_does_not_start_is_told_and_claude_code_is_not_sent_there(self):
        installation = self.installation(deaf=True, router=STUB + (
            'elif sys.argv[1] == "restart":\n    sys.exit("rrouter: port 8316 is taken by somebody")\n'))
        self.assertIn("port 8316 is taken by somebody", installation.install("--claude", status=1))
        self.assertFalse(installation.settings.exists())

    def test_path_without_bin_is_told(self):
        installation = self.installation(router=STUB)
        # shell          says
        for shell, says in (("/bin/zsh", "~/.zshrc"), ("/usr/bin/fish", "fish_add_path")):
            self.assertIn(says, installation.install("--dry-run", env={"SHELL": shell}))
        self.assertNotIn("PATH", installation.install("--dry-run", env={
            "PATH": "%s:%s" % (installation.program.parent, installation.env["PATH"])}))


class PythonChoiceTest(InstallTest):

    def setUp(self):
        self.home = self.installation(router=STUB)
        # Only the stand-ins and what the script itself needs: the machine's own interpreters are out of sight.
        self.tools = self.home.root / "tools"
        self.tools.mkdir()
        for tool in ("sh", "awk", "cat", "dirname", "id", "tail"):
            (self.tools / tool).symlink_to(shutil.which(tool))
        del self.home.env["PYTHON"]
        self.home.env["PATH"] = "%s:%s" % (self.home.stand_ins, self.tools)

    def old(self, name):
        """An interpreter that takes itself for 3.8."""
        self.home.stand_in(name, '#!/bin/sh\nexec "%s" -c \'import sys; sys.version_info = (3, 8, 18); '
                                 'code = sys.argv.pop(1); exec(code)\' "$4" "$5" "$6"\n' % sys.executable)

    def shim(self, name):
        """An interpreter behind a script, as pyenv has them."""
        self.home.stand_in(name, '#!/bin/sh\nexec "%s" "$@"\n' % sys.executable)

    def test_old_and_broken_ones_are_passed_over_and_a_shim_is_looked_behind(self):
        self.old("python3")
        self.home.stand_in("python3.13", "#!/bin/sh\necho 'pyenv: python3.13: command not found' >&2\nexit 127\n")
        self.shim("python3.12")
        self.home.note("deaf", "")
        self.home.install()
        line = self.home.program.read_text().split("\n")[0]
        self.assertEqual(os.path.realpath(line[2:]), os.path.realpath(sys.executable))
        self.assertEqual(stat.S_IMODE(self.home.program.stat().st_mode), 0o755)

    @unittest.skipIf(os.path.exists("/usr/local/bin/python3") or os.path.exists("/opt/homebrew/bin/python3"),
                     "one is always found here")
    def test_none_is_refused_with_all_that_was_found(self):
        self.old("python3")
        self.home.stand_in("python3.9", "#!/bin/sh\necho 'no such version' >&2\nexit 127\n")
        said = self.home.install(status=1)
        for says in ("3.9 or newer", "stand-ins/python3: is Python 3.8", "python3.9: no such version", "PYTHON"):
            self.assertIn(says, said)
        self.assertEqual(self.home.tree(), {})

    def test_variable_overrides(self):
        self.old("python3")
        self.assertIn("Python: %s\n" % light_python(), self.home.install("--dry-run", env={"PYTHON": light_python()}))
        # PYTHON      says
        for value, says in (("python3", "is Python 3.8"), ("/no/python", "not a program")):
            self.assertIn(says, self.home.install(status=1, env={"PYTHON": value}))

    def test_interpreter_with_a_space_in_its_path_runs_the_program(self):
        spaced = self.home.root / "my pythons" / "python3"
        spaced.parent.mkdir()
        spaced.symlink_to(os.path.realpath(sys.executable))
        self.home.note("deaf", "")
        self.home.env["PATH"] += ":/usr/bin:/bin"
        self.home.install(env={"PYTHON": str(spaced)})
        self.assertIn(str(spaced), self.home.program.read_text().split("\n")[0])
        self.assertEqual(self.home.rrouter("--version"), "rrouter 0.0.1\n")


class InstalledLifeTest(InstallTest):
    """From an empty HOME through an upgrade to the uninstallation, with the daemon really running."""

    def test_without_a_manager_the_daemon_is_forked(self):
        home = self.installation(deaf=True)
        said = home.install()
        self.assertIn("systemctl --user does not answer: Failed to connect to bus: No medium found", said)
        self.assertIn('"ANTHROPIC_BASE_URL": "%s"' % home.url, said)
        first = home.health()
        self.assertEqual((first["startedBy"], first["mode"], first["problems"]), ("start", "auto", []))
        self.assertEqual([stat.S_IMODE(path.stat().st_mode) for path in (
            home.dir, home.dir / "mode", home.dir / "config.json", home.program)], [0o700, 0o600, 0o600, 0o755])
        self.assertFalse(home.unit.exists() or home.agent.exists() or home.settings.exists())
        # What the user decided since, and a new version.
        home.write("mode", "mine\n")
        home.write("config.json", '{"modes": {"mine": {"mappings": []}}, "defaultMode": "mine"}')
        with open(str(home.clone / "rrouter.py"), "a") as file:
            file.write("# a later version\n")
        self.assertIn("upgrade ~/bin/rrouter", home.install())
        self.assertTrue(home.program.read_text(encoding="utf-8").endswith("# a later version\n"))
        self.assertNotEqual(home.health()["pid"], first["pid"])
        self.assertEqual(home.health()["mode"], "mine")
        home.install("--uninstall")
        self.assertEqual(home.tree(data=False), {})
        self.assertEqual((home.read("mode"), "mine" in home.read("config.json")), ("mine\n", True))
        self.assert_free(home.port)

    def test_forked_daemon_is_upgraded_with_the_settings_it_runs_with(self):
        """In another shell, that is; what this one sets holds."""
        home = self.installation(deaf=True)
        home.install(env={"RROUTER_HOST": "127.0.0.1", "RROUTER_UPSTREAM": "http://127.0.0.1:9/a"})
        first = home.health()["pid"]
        for name in ("RROUTER_PORT", "RROUTER_UPSTREAM"):
            del home.env[name]
        # what the shell sets                                   where the daemon sends
        for env, upstream in (
                ({},                                            "http://127.0.0.1:9/a"),
                ({"RROUTER_UPSTREAM": "http://127.0.0.1:9/b"},  "http://127.0.0.1:9/b")):
            with self.subTest(env=env):
                self.assertIn("answers at " + home.url.replace("localhost", "127.0.0.1"), home.install(env=env))
                self.assertEqual((home.health()["listenAddr"], home.health()["upstreamURL"]),
                                 ("127.0.0.1:%d" % home.port, upstream))
        self.assertNotEqual(home.health()["pid"], first)

    def test_systemd_takes_over_from_the_forked_daemon(self):
        home = self.installation(deaf=True)
        home.install()
        (home.stand_ins / "deaf").unlink()
        home.asked()
        self.assertIn("stop the running rrouter (started by start)", home.install("--claude"))
        self.assertEqual(home.asked(), ["--user daemon-reload", "--user enable rrouter.service",
                                        "--user restart rrouter.service"])
        self.assertEqual(home.unit.read_bytes(), (PROJECT / "rrouter.service").read_bytes())
        self.assertEqual((home.health()["startedBy"], home.health()["mode"]), ("systemd", "auto"))
        self.assertEqual(json.loads(home.settings.read_text()), {"env": {"ANTHROPIC_BASE_URL": home.url}})
        before = home.health()["pid"]
        home.rrouter("restart")
        self.assertEqual([line for line in home.asked() if "reload" not in line],
                         ["--user stop rrouter.service", "--user start rrouter.service"])
        self.assertEqual((home.health()["startedBy"], home.health()["pid"] == before), ("systemd", False))
        home.install("--uninstall", "--purge")
        self.assertEqual(home.asked(), ["--user disable --now rrouter.service", "--user daemon-reload"])
        self.assertEqual(home.tree(), {})
        self.assert_free(home.port)

    def test_launchd_runs_it(self):
        home = self.installation(system="Darwin")
        home.install()
        self.assertEqual(home.health()["startedBy"], "launchd")
        self.assertEqual(home.asked(), ["bootstrap gui/%d ~/Library/LaunchAgents/com.rrouter.plist" % os.getuid()])
        home.rrouter("stop")
        self.assertEqual(home.asked(), ["bootout gui/%d/com.rrouter" % os.getuid()])
        self.assert_free(home.port)
        home.rrouter("start")
        self.assertEqual(home.health()["startedBy"], "launchd")
        home.install("--uninstall", "--purge")
        self.assertEqual(home.tree(), {})
        self.assert_free(home.port)


class ServiceManagerTest(InstallTest):
    """What the managers are asked, with a daemon that is only made up."""

    def installation(self, started_by, **options):
        return super().installation(router=STUB.replace('"start"', '"%s"' % started_by) + SLEEPER, **options)

    def test_systemd_restarts_the_new_version(self):
        home = self.installation("systemd")
        home.install()
        for name in ("mode", "config.json", "state.json"):
            home.write(name, "what was decided, and learned\n")
        tree = home.tree()
        home.asked()
        home.install()
        self.assertEqual(home.asked(), ["--user daemon-reload", "--user enable rrouter.service",
                                        "--user restart rrouter.service"])
        del tree[".rrouter/install.json"]
        self.assertEqual(tree.items() - home.tree().items(), set())

    def test_launchd_loads_the_plist_anew(self):
        """`kickstart -k` would go on with the old one."""
        home = self.installation("launchd", system="Darwin")
        home.install()
        home.asked()
        home.install()
        self.assertEqual(home.asked(), ["bootout gui/%d/com.rrouter" % os.getuid(),
                                        "bootstrap gui/%d ~/Library/LaunchAgents/com.rrouter.plist" % os.getuid()])

    def test_manager_that_cannot_start_it_is_left_for_the_fork(self):
        home = self.installation("start")
        home.note("fails", "enable")
        said = home.install()
        for says in ("scripted failure", "no service: systemd did not start it", "run rrouter start instead"):
            self.assertIn(says, said)
        self.assertFalse(home.unit.exists())

    def test_manager_out_of_reach_at_the_uninstallation_finds_no_unit_later(self):
        home = self.installation("systemd")
        home.install()
        wanted = home.unit.parent / "default.target.wants" / "rrouter.service"
        wanted.parent.mkdir()
        wanted.symlink_to(home.unit)
        home.note("deaf", "")
        home.install("--uninstall", "--purge")
        self.assertEqual(home.tree(), {})

    def test_environment_of_the_service_keeps_what_is_not_set_now(self):
        home = self.installation("systemd")
        environment = home.home / ".config" / "rrouter.env"
        # port, upstream, host of the shell     what the file holds then
        for values, lines in (
                (("", "http://h:1", ""),            ["UPSTREAM='http://h:1'"]),
                (("9005", "", ""),                  ["PORT='9005'", "UPSTREAM='http://h:1'"]),
                (("9006", "http://h/a=b", "::1"),   ["HOST='::1'", "PORT='9006'", "UPSTREAM='http://h/a=b'"]),
                (("", "", ""),                      ["HOST='::1'", "PORT='9006'", "UPSTREAM='http://h/a=b'"])):
            with self.subTest(values=values):
                home.install(env=zip(("RROUTER_PORT", "RROUTER_UPSTREAM", "RROUTER_HOST"), values))
                self.assertEqual(sorted(environment.read_text().splitlines()[1:]),
                                 ["RROUTER_" + line for line in lines])
        home.install("--uninstall")
        self.assertFalse(environment.exists())

    def test_environment_of_the_user_stays_though_it_reads_like_ours(self):
        home = self.installation("systemd")
        environment = home.home / ".config" / "rrouter.env"
        content = "RROUTER_HOST='127.0.0.1'\nRROUTER_PORT='9000'\n"
        home.put(environment, content.encode())
        self.assertIn("rrouter.env as it is: it is yours", home.install(
            env={"RROUTER_PORT": "9000", "RROUTER_UPSTREAM": ""}))
        self.assertEqual(environment.read_text(), content)

    def test_unit_and_environment_of_the_user_stay_at_an_upgrade(self):
        home = self.installation("systemd")
        environment = home.home / ".config" / "rrouter.env"
        home.put(environment, b"RROUTER_PORT=9000\n")
        home.install()
        home.unit.write_bytes(home.unit.read_bytes() + b"# mine\n")
        self.assertIn("rrouter.service as it is: changed since", home.install())
        self.assertTrue(home.unit.read_bytes().endswith(b"# mine\n"))
        home.install("--uninstall")
        self.assertEqual(environment.read_bytes(), b"RROUTER_PORT=9000\n")
        self.assertEqual([path.name[:20] for path in home.unit.parent.iterdir()], ["rrouter.service.bak-"])


class ForeignFilesTest(InstallTest):

    def installation(self):
        return super().installation(deaf=True, router=STUB)

    def test_other_program_of_that_name_comes_back(self):
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
            # what was there        how it got there
            ("a binary",            lambda path: (path.write_bytes(b"\x7fELF\0\xff"), path.chmod(0o750))),
            ("a link into nowhere", lambda path: path.symlink_to("/no/such/rrouter"))))

    def test_what_was_changed_since_is_kept_beside(self):
        home = self.installation()
        home.install()
        self.assertNotIn("keep", home.install())
        for options in ((), ("--uninstall",)):
            changed = home.program.read_bytes() + b"# mine\n"
            home.program.write_bytes(changed)
            home.install(*options)
            self.assertIn(changed, [path.read_bytes() for path in home.program.parent.glob("rrouter.bak-*")])
        self.assertFalse(home.program.exists())

    def test_directory_in_the_way_is_refused(self):
        home = self.installation()
        home.program.mkdir(parents=True)
        self.assertIn("~/bin/rrouter: is a directory", home.install(status=1))

    def test_uninstallation_takes_only_what_was_installed(self):
        home = self.installation()
        home.put(home.program, b"#!/bin/sh\n", 0o755)
        home.put(home.settings, b'{"env": {"ANTHROPIC_BASE_URL": "http://localhost:8316"}}')
        before = home.tree(data=False)
        said = home.install("--uninstall")
        self.assertIn("not installed by install.sh", said)
        self.assertIn("if it means rrouter, take it out", said)
        self.assertEqual(home.tree(data=False), before)

    def test_settings_that_were_never_written_to_need_not_be_json_for_the_uninstallation(self):
        home = self.installation()
        home.put(home.settings, b'{"env": {}, // mine\n}')
        before = home.tree(data=False)
        home.install()
        home.install("--uninstall", "--purge")
        self.assertEqual(home.tree(data=False), before)
        self.assertFalse(home.dir.exists())

    def test_lost_record_still_lets_go_of_what_is_plainly_ours(self):
        home = self.installation()
        home.install()
        (home.dir / "install.json").unlink()
        home.install("--uninstall")
        self.assertFalse(home.program.exists())


class ClaudeSettingsTest(InstallTest):
    """`--claude`, and the way back."""

    def installation(self, before):
        """Return one with these bytes, if any, as settings.json."""
        home = super().installation(deaf=True, router=STUB)
        if before is not None:
            home.put(home.settings, before, 0o640)
        return home

    def install(self, home):
        home.install("--claude")
        return json.loads(home.settings.read_text(encoding="utf-8"))

    def test_key_is_set_and_taken_back(self):
        url = "http://localhost:8316"       # where the stub says it listens

        def check(before, after):
            home = self.installation(before)
            tree = home.tree(data=False)
            self.assertEqual(json.dumps(self.install(home)), json.dumps(after))
            self.assertEqual([path.read_bytes() for path in home.settings.parent.glob("settings.json.bak-*")],
                             [before] if before is not None else [])
            home.install("--uninstall")
            self.assertEqual(home.tree(data=False), tree)

        self.side_by_side(check, (
            # what there is                         what it becomes
            (None,                                  {"env": {"ANTHROPIC_BASE_URL": url}}),
            (b"{}",                                 {"env": {"ANTHROPIC_BASE_URL": url}}),
            (b'{"env": {}, "model": "opus"}\n',     {"env": {"ANTHROPIC_BASE_URL": url}, "model": "opus"}),
            (b'{"env":{"A":"1","ANTHROPIC_BASE_URL":"http://x","B":"2"},\n\t"z":[1.50,1e-7,"\\ud83d\xed\x95\x9c"]}',
             {"env": {"A": "1", "ANTHROPIC_BASE_URL": url, "B": "2"}, "z": [1.5, 1e-7, "\ud83d\ud55c"]})))

    def test_form_of_the_file_is_kept(self):
        text = '{\n\t"한국어": "값",\n\t"env": {\n\t\t"A": "1"\n\t}\n}'
        home = self.installation(text.encode())
        home.settings.chmod(0o600)
        self.install(home)
        self.assertEqual(home.settings.read_text(encoding="utf-8"), text.replace(
            '"1"', '"1",\n\t\t"ANTHROPIC_BASE_URL": "http://localhost:8316"'))
        self.assertEqual(stat.S_IMODE(home.settings.stat().st_mode), 0o600)

    def test_what_cannot_be_kept_is_refused_before_anything_is_done(self):
        def check(content):
            home = self.installation(content)
            before = home.tree()
            self.assertIn("~/.claude/settings.json", home.install("--claude", status=1))
            self.assertEqual(home.tree(), before)

        self.side_by_side(check, [[content] for content in (
            b'{"a": 1, // why\n "env": {}}', b"", b"[]", b'{"env": null}', b'{"a": 1, "a": 2}', b'{"a": NaN}',
            b'{"a": 1e999}', b'{"a": "\xff"}', b"[" * 100000)])

    def test_link_stays_a_link(self):
        home = self.installation(None)
        real = home.home / "dot files" / "claude.json"
        home.put(real, b'{"model": "opus"}', 0o600)
        home.settings.parent.mkdir()
        home.settings.symlink_to("../dot files/claude.json")
        before = home.tree(data=False)
        self.install(home)
        self.assertTrue(home.settings.is_symlink())
        self.assertEqual(list(json.loads(real.read_text())), ["model", "env"])
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

    def test_new_port_is_written_and_the_first_value_comes_back(self):
        home = self.installation(b'{"env": {"ANTHROPIC_BASE_URL": "http://x"}}')
        before = home.tree(data=False)
        self.install(home)
        (home.clone / "rrouter.py").write_text(STUB.replace("8316", "9000"))
        home.install()      # what an earlier --claude wrote follows without being asked again
        self.assertEqual(json.loads(home.settings.read_text())["env"]["ANTHROPIC_BASE_URL"], "http://localhost:9000")
        home.install("--uninstall")
        self.assertEqual(home.tree(data=False), before)


class InterruptedInstallTest(InstallTest):
    """Killed at any point, an installation leaves all that was there in working order, and can go on or back."""

    def installation(self):
        home = super().installation(deaf=True, router=STUB)
        home.put(home.program, b"#!/bin/sh\necho the old one\n", 0o755)
        home.put(home.settings, b'{"env": {"ANTHROPIC_BASE_URL": "http://x"}}')
        return home, home.tree()

    def kill_at(self, home, point, *options):
        home.install(*options, status=-signal.SIGKILL, env={"KILL_AT": point})
        self.assertIn(home.rrouter("--version"), ("the old one\n", "rrouter 0.0.1\n"))
        self.assertIn(json.loads(home.settings.read_text())["env"]["ANTHROPIC_BASE_URL"],
                      ("http://x", "http://localhost:8316"))

    def assert_goes_back(self, home, before):
        """All becomes as it was, but for copies of what is there anyway."""
        home.install("--uninstall", "--purge")
        now = home.tree()
        for name in set(now) - set(before):
            self.assertEqual(now.pop(name), before[name.partition(".bak-")[0]])
        self.assertEqual(now, before)

    def test_installation_killed_goes_back(self):
        def check(point):
            home, before = self.installation()
            self.kill_at(home, point, "--claude")
            self.assert_goes_back(home, before)

        self.side_by_side(check, [[point] for point in (
            "rename .*install[.]json$", "rename .*bin/rrouter$", "rename .*settings[.]json[.]bak-",
            "rename .*settings[.]json$")])

    def test_installation_killed_goes_on(self):
        def check(point):
            home, before = self.installation()
            self.kill_at(home, point, "--claude")
            home.install("--claude")
            self.assertEqual(home.rrouter("--version"), "rrouter 0.0.1\n")
            self.assert_goes_back(home, before)

        self.side_by_side(check, [["rename .*bin/rrouter[.]bak-"], ["rename .*bin/rrouter$"]])

    def test_uninstallation_killed_goes_on(self):
        def check(point):
            home, before = self.installation()
            home.install("--claude")
            self.kill_at(home, point, "--uninstall")
            self.assert_goes_back(home, before)

        self.side_by_side(check, [[point] for point in (
            "rename .*settings[.]json$", "rename .*bin/rrouter$")])


# Claude Code ##################################################################

def find_claude():
    """Return the executable of Claude Code, or None: RROUTER_CLAUDE names it, and its value "none" skips the tests."""
    named = os.environ.get("RROUTER_CLAUDE")
    if named:
        return None if named == "none" else named
    return shutil.which("claude") or shutil.which("claude", path=str(HERE / "node_modules" / ".bin"))


CLAUDE = find_claude()
CLAUDE_ENV = {"ANTHROPIC_API_KEY": "sk-test", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_TELEMETRY": "1",
              "DISABLE_AUTOUPDATER": "1"}
CLAUDE_WAIT_S = 30      # the net under each turn: the client itself would go on trying for three minutes
SHOW_TRANSCRIPT = os.environ.get("RROUTER_TRANSCRIPT") == "1" or "-v" in sys.argv

CLIENT_MODEL = "claude-sonnet-5-5"
MAPPED_MODEL = "gemini-claude-sonnet-4-5-thinking"
CLIENT_MODES = {"antigravity": {"mappings": [{"match": "claude-sonnet-*", "rewrite": MAPPED_MODEL}]},
         "claude": {"mappings": []},
         "fast": {"mappings": [{"match": "claude-*", "rewrite": "gemini-3-flash"}]}}
# Fields that belong to the connection, or that the new length of the body changes.
HOP_FIELDS = ("host", "connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade",
              "content-length")


class RecordingRelay:
    """A byte-transparent relay to a port of 127.0.0.1 that keeps what each client sent."""

    def __init__(self, target):
        self.target, self.sent = target, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.sent.append(bytearray())
            threading.Thread(target=self._carry, args=(client, self.sent[-1]), daemon=True).start()

    def _carry(self, client, sent):
        with contextlib.suppress(OSError), client, socket.create_connection(("127.0.0.1", self.target)) as server:
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
        """Return the requests that were sent since the last call as Received; call it while nothing is under way."""
        requests = []
        for number, sent in enumerate(self.sent):
            data = bytes(sent)
            del sent[:]
            while data:
                head, _, rest = data.partition(b"\r\n\r\n")
                start, *lines = head.decode("latin-1").split("\r\n")
                fields = [tuple(line.split(": ", 1)) for line in lines]
                length = int({name.lower(): value for name, value in fields}.get("content-length", 0))
                requests.append(Received(*start.split(" "), fields, rest[:length], head + b"\r\n\r\n", number))
                data = rest[length:]
        return requests


class Conversation:
    """One Claude Code process that is told one turn after the other; a context manager."""

    def __init__(self, port, home):
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            claude_command("--input-format", "stream-json", "--output-format", "stream-json", "--verbose"),
            env=claude_env(port, home), cwd=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors)

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
                if message["type"] == "result" and not message["is_error"]:
                    return message["result"]
                if message["type"] == "result":
                    raise AssertionError("Claude Code: %s" % message)
        finally:
            watchdog.cancel()
        self.errors.seek(0)
        raise AssertionError("Claude Code ended in the middle of a turn: %s" % self.errors.read().decode())

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
    return [CLAUDE, "-p", "--model", CLIENT_MODEL, *arguments]


def claude_env(port, home):
    return dict(CLAUDE_ENV, PATH=os.environ["PATH"], HOME=home, ANTHROPIC_BASE_URL="http://127.0.0.1:%d" % port)


def is_turn(request):
    """Tell the model calls from what else the client sends (`HEAD /api/hello`, count_tokens)."""
    return request.method == "POST" and request.target.partition("?")[0] == "/v1/messages"


def streamed_reply(request, signature=None):
    """Return a whole message, streamed, that says `<model> heard <text>`; a `signature` puts a thinking first."""
    blocks = [({"type": "text", "text": ""},
               {"type": "text_delta", "text": "%s heard %r" % (request.model, last_user_text(request))})]
    if signature:
        blocks.insert(0, ({"type": "thinking", "thinking": "", "signature": ""},
                          {"type": "signature_delta", "signature": signature}))
    events = [event("message_start", message={
        "id": "msg_1", "type": "message", "role": "assistant", "model": request.model, "content": [],
        "stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 3, "output_tokens": 1}})]
    for index, (block, delta) in enumerate(blocks):
        events += [event("content_block_start", index=index, content_block=block), event("ping"),
                   event("content_block_delta", index=index, delta=delta), event("content_block_stop", index=index)]
    return stream(*events, event("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None},
                                 usage={"output_tokens": 2}), event("message_stop"))


def last_user_text(request):
    """Return the last text of the user in the request's messages."""
    content = [entry["content"] for entry in request.json()["messages"] if entry["role"] == "user"][-1]
    return content if isinstance(content, str) else content[-1]["text"]


def refuse_foreign_signatures(request):
    """Answer as a backend does that accepts no thinking but its own."""
    if not is_turn(request):
        return error(404)
    own = base64.b64encode(request.model.encode()).decode()
    if without_thinking(request, keep=own) == request.json()["messages"]:
        return streamed_reply(request, signature=own)
    return error(400, "Corrupted thought signature." if request.model == MAPPED_MODEL else
                 "messages.1.content.0: Invalid `signature` in `thinking` block", "invalid_request_error")


def without_thinking(request, keep=None):
    """Return the request's messages without their thinking blocks, save those with the signature `keep`."""
    return [entry if isinstance(entry["content"], str) else dict(entry, content=[
        block for block in entry["content"] if block["type"] != "thinking" or block["signature"] == keep])
        for entry in request.json()["messages"]]


def kept_fields(request):
    return [(name, value) for name, value in request.fields if name.lower() not in HOP_FIELDS]


@unittest.skipUnless(CLAUDE, "no Claude Code on this machine: RROUTER_CLAUDE may name its executable")
class ClaudeCodeTest(RouterTest):
    """The real Claude Code as the client: it speaks to rrouter through a relay that keeps what it sent."""

    mode, config = "claude", {"modes": CLIENT_MODES, "defaultMode": "claude"}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.relay = RecordingRelay(cls.rrouter.port)
        cls.addClassCleanup(cls.relay.close)
        cls.home = tempfile.mkdtemp(prefix="claude test ")
        cls.addClassCleanup(shutil.rmtree, cls.home, ignore_errors=True)

    def setUp(self):
        super().setUp()
        self.upstream.default = lambda request: streamed_reply(request) if is_turn(request) else error(404)
        self.relay.take()

    def switch(self, *command):
        self.rrouter.home.run(*command, check=0)

    def turn(self):
        """Return what the client sent, and what the upstream got, for the turn that has just ended."""
        got = list(filter(is_turn, self.upstream.received))
        self.upstream.received.clear()
        return list(filter(is_turn, self.relay.take())), got

    def assert_passed_on(self, sent, got, model):
        """The upstream got what the client sent but for the model's name."""
        self.assertTrue(sent.body.startswith(b'{"model":"%b"' % CLIENT_MODEL.encode()), sent.body[:80])
        self.assertEqual(got.body, sent.body.replace(CLIENT_MODEL.encode(), model.encode(), 1))
        self.assertEqual((got.method, got.target, got.version), (sent.method, sent.target, sent.version))
        self.assertEqual(kept_fields(got), kept_fields(sent))
        self.assertEqual(got.header("host"), "127.0.0.1:%d" % self.upstream.port)
        self.assertEqual(got.header("content-length"), str(len(got.body)))

    def test_one_conversation_moves_between_models_without_a_restart(self):
        # command             model the upstream gets
        table = (
            (("ag",),           MAPPED_MODEL),
            (("claude",),       CLIENT_MODEL),
            (("mode", "fast"),  "gemini-3-flash"),
            (("auto",),         MAPPED_MODEL))
        transcript = []
        with Conversation(self.relay.port, self.home) as claude:
            for number, (command, model) in enumerate(table, 1):
                self.switch(*command)
                text = claude.say("turn %d" % number)
                (sent,), (got,) = self.turn()
                transcript.append("turn %d  rrouter %-10s mode %-12s client sent %s, upstream got %s, reply: %s" % (
                    number, " ".join(command), self.rrouter.health()["mode"], sent.model, got.model, text))
                with self.subTest(turn=number, command=command):
                    self.assertEqual(text, "%s heard 'turn %d'" % (model, number))
                    self.assert_passed_on(sent, got, model)
                    replies = [entry for entry in got.json()["messages"] if entry["role"] == "assistant"]
                    self.assertEqual(len(replies), number - 1)      # it is one conversation
            self.assertIsNone(claude.process.poll())
        if SHOW_TRANSCRIPT:
            print("", *transcript, sep="\n", file=sys.stderr)

    def test_any_failure_of_antigravity_is_rescued_unseen(self):
        never = threading.Event()
        # way it fails          its answer
        table = (
            ("429",                 error(429, "Resource has been exhausted (e.g. check quota).", "rate_limit_error")),
            ("529",                 error(529, "Overloaded", "overloaded_error")),
            ("unknown model",       error(400, "unknown provider for model x", "invalid_request_error")),
            ("error event first",   stream(event("error", error={"type": "api_error", "message": "scripted"}))),
            ("error after a ping",  stream(event("ping"), event("error", error={"type": "overloaded_error",
                                                                                "message": "Overloaded"}))),
            ("empty stream",        Answer(200, (), fields=(("Content-Type", "text/event-stream"),))),
            ("dropped connection",  Answer(hangup=True)),
            ("silence",             Answer(before=never)))
        self.addCleanup(self.rrouter.home.write, "config.json", json.dumps(self.config))
        for way, failure in table:
            with self.subTest(way):
                limit = 0.5 if way == "silence" else 60
                self.rrouter.home.write("config.json", json.dumps(
                    {"modes": CLIENT_MODES, "auto": {"firstByteTimeoutSeconds": limit}}))
                self.switch("auto")         # and so forgets the failures before
                self.assert_rescued(failure, may_repeat=way == "dropped connection")

    def assert_rescued(self, failure, may_repeat):
        """`claude -p` ends well although antigravity answers by `failure`, after one call to each target."""
        self.upstream.default = lambda request: (
            error(404) if not is_turn(request) else
            failure if request.model == MAPPED_MODEL else streamed_reply(request))
        pooled = self.upstream.connections
        done = subprocess.run(claude_command("say a word"), env=claude_env(self.relay.port, self.home), cwd=self.home,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              universal_newlines=True, timeout=CLAUDE_WAIT_S)
        sent, got = self.turn()
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, CLIENT_MODEL + " heard 'say a word'\n", ""))
        self.assertEqual(len(sent), 1)
        models = [request.model for request in got]
        if may_repeat and len(models) == 3 and got[0].connection <= pooled:
            del models[0]                   # an idle connection that drops may just have grown stale: sent once more
        self.assertEqual(models, [MAPPED_MODEL, CLIENT_MODEL])

    def test_foreign_signatures_are_healed_in_both_directions(self):
        # command       model the upstream gets     calls
        table = (
            ("ag",      MAPPED_MODEL,          1),
            ("claude",  CLIENT_MODEL,                      2),
            ("ag",      MAPPED_MODEL,          2))
        self.upstream.default = refuse_foreign_signatures
        with Conversation(self.relay.port, self.home) as claude:
            for command, model, calls in table:
                self.switch(command)
                with self.subTest(command, calls=calls):
                    self.assertEqual(claude.say("now " + command), "%s heard 'now %s'" % (model, command))
                    (sent,), got = self.turn()
                    self.assertEqual(len(got), calls)
                    self.assert_passed_on(sent, got[0], model)
                    if calls == 2:
                        self.assertEqual(got[1].json(), dict(got[0].json(), messages=without_thinking(got[0])))
                        self.assertEqual(kept_fields(got[1]), kept_fields(sent))


# Running them #################################################################

WORKERS = 3             # the tests wait more than they compute
RUN_S = 600             # after which the suite ends though a test hangs; it takes about one
# These take longest, and are begun first, so that the workers end together; those that compute beside those that wait.
SLOW = ("DaemonTest", "ProbeTest", "InstalledLifeTest", "TlsUpstreamTest", "CommandLineTest", "DrainTest",
        "OddStartTest", "ParallelStreamsTest", "ServiceManagerTest", "SilenceTest", "ServeTest", "StreamTest",
        "SecretsTest", "LeaveTest", "FullDiskTest", "LongStreamTest", "LogGoneTest",
        "ConfigCommandTest", "LimitsTest", "ClaudeSettingsTest", "BackPressureTest", "InterruptTest", "StateTest",
        "RunningDaemonTest", "FreshnessTest", "CutAnywhereTest", "ForeignFilesTest", "CheckTest",
        "InterruptedInstallTest")
# What --soak runs, at length.
SOAKED = ("SoakTest", "FuzzTest", "SpliceFuzzTest", "FileFuzzTest", "StartSoakTest", "CrowdOfClientsTest", "WearTest",
          "ParallelStreamsTest", "LongStreamTest", "InterruptTest", "InterruptedStartTest")


def run_side_by_side():
    """Run all test classes in WORKERS processes, each taking the next class when it is done; return the exit status."""
    assert set(SLOW) <= set(globals())
    loader, module = unittest.defaultTestLoader, sys.modules[__name__]
    names = [name for name, value in vars(module).items() if isinstance(value, type)
             and issubclass(value, unittest.TestCase) and loader.getTestCaseNames(value)]
    names.sort(key=lambda name: SLOW.index(name) if name in SLOW else len(SLOW))
    start = time.monotonic()
    compiled()                                          # for all workers
    queue, results = os.pipe(), tempfile.TemporaryFile(mode="w+")
    os.write(queue[1], bytes(range(len(names))))        # each worker reads a byte, the number of its next class
    os.close(queue[1])
    workers = []
    for _ in range(WORKERS):
        sys.stdout.flush()
        workers.append(os.fork())
        if not workers[-1]:
            faulthandler.dump_traceback_later(RUN_S, exit=True)     # shows where it hangs
            with results:
                run_classes(names, queue[0], results.fileno())
            sys.exit()
    statuses = [os.waitpid(worker, 0)[1] for worker in workers]
    os.close(queue[0])
    with results:
        results.seek(0)
        rows = [json.loads(line) for line in results]
    begun, ended = {row["name"] for row in rows}, {row["name"] for row in rows if "run" in row}
    for what, some in (("did not come to an end", begun - ended), ("never begun", set(names) - begun)):
        if some:
            print("\n%s: %s" % (what, ", ".join(sorted(some))), file=sys.stderr)
    counts = {kind: sum(row.get(kind, 0) for row in rows) for kind in ("run", "failures", "errors", "skipped")}
    bad = counts["failures"] or counts["errors"] or set(names) - ended or any(statuses)
    details = ", ".join("%s=%d" % (kind, counts[kind]) for kind in ("failures", "errors", "skipped") if counts[kind])
    print("%s\nRan %d tests in %.3fs\n\n%s%s" % (
        "-" * 70, counts["run"], time.monotonic() - start, "FAILED" if bad else "OK",
        details and " (%s)" % details), file=sys.stderr)
    return 1 if bad else 0


def run_classes(names, queue, results):
    """Run the classes whose numbers are read from `queue`, until there are none; tell `results` of begin and end."""
    for number in iter(lambda: os.read(queue, 1), b""):
        name, output = names[number[0]], io.StringIO()
        os.write(results, (json.dumps({"name": name}) + "\n").encode())
        suite = unittest.defaultTestLoader.loadTestsFromTestCase(vars(sys.modules[__name__])[name])
        result = unittest.TextTestRunner(output, verbosity=0).run(suite)
        row = {"name": name, "run": result.testsRun, "errors": len(result.errors), "skipped": len(result.skipped),
               "failures": len(result.failures) + len(result.unexpectedSuccesses)}
        os.write(results, (json.dumps(row) + "\n").encode())
        os.write(2, (output.getvalue() if row["failures"] or row["errors"] else "." * row["run"]).encode())


if __name__ == "__main__":
    if "--soak" in sys.argv:
        os.execve(sys.executable, [sys.executable, __file__, *SOAKED],
                  dict(os.environ, RROUTER_SOAK="".join(sys.argv[sys.argv.index("--soak") + 1:]) or "20260129"))
    if SOAKING:
        faulthandler.dump_traceback_later(6 * RUN_S + sum(LongStreamTest.GAPS_S), exit=True)
    if len(sys.argv) > 1:
        unittest.main()
    sys.exit(run_side_by_side())
