#!/usr/bin/env python3
"""Tests of rrouter: `python3 test_rrouter.py`, or `python3 -m unittest`.

What is real: rrouter runs as a process of its own (`rrouter.py serve` in an empty HOME), and every byte goes through
sockets on the loopback addresses, on ports that were free.  What is scripted: the upstream, which records each request
as it came and plays the answers it was given.  Pure parts are tested by tables, with a clock that moves when told to.
"""

import base64
import collections
import contextlib
import gzip
import http.client
import json
import os
import pathlib
import random
import re
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest

import rrouter

HERE = pathlib.Path(__file__).resolve().parent
RROUTER = str(HERE / "rrouter.py")
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

    def break_connections(self):
        for connection in list(self.open):
            with contextlib.suppress(OSError):
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

def free_port():
    """Return a port that is free on both loopback addresses just now."""
    while True:
        with socket.socket() as four, socket.socket(socket.AF_INET6) as six:
            four.bind(("127.0.0.1", 0))
            port = four.getsockname()[1]
            try:
                six.bind(("::1", port))
            except OSError as problem:
                if problem.errno in (98, 48):       # taken there; without IPv6 at all the port will do
                    continue
            return port


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
        done = subprocess.run([sys.executable, RROUTER, *arguments], env=dict(self.env, **dict(env)), stdin=stdin,
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
        self.output = tempfile.TemporaryFile()
        self.process = subprocess.Popen([sys.executable, RROUTER, "serve"], env=self.home.env, stdin=subprocess.DEVNULL,
                                        stdout=self.output, stderr=self.output)
        self.wait_until(self._answers)

    def _answers(self):
        if self.process.poll() is not None:
            raise AssertionError("rrouter serve ended with status %s:\n%s" % (self.process.returncode, self.printed()))
        try:
            return self.health()
        except OSError:
            return None

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
                self.process.wait()
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
        connection.connect((address, self.port))
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

    `mode`, `config` and `env` are class attributes; `setUp` gives each test a fresh script and resets the mode.
    """

    mode, config, env = "antigravity", None, ()

    @classmethod
    def setUpClass(cls):
        cls.upstream = Upstream()
        cls.addClassCleanup(cls.upstream.close)
        cls.rrouter = Running(cls.upstream, cls.mode, cls.config, cls.env)
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


if __name__ == "__main__":
    unittest.main()
