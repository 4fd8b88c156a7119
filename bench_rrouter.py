#!/usr/bin/env python3
"""Benchmark of rrouter: `python3 bench_rrouter.py`, on Linux.

It takes about seven minutes, with --quick about one.  It measures these subjects in turn and
interleaves them over rounds:

    direct    no proxy: the cost of the load generator and the upstream alone
    nginx     one location with proxy_buffering off, HTTP/1.1, kept upstream connections and an
              access log
    relay     a threaded byte relay of 30 lines that reads nothing of what it passes: the floor of
              threaded Python
    rrouter   `rrouter.py serve` in antigravity mode, with its log and all its checks
    auto      the same process, switched to auto mode
    other     with --against, a second rrouter.py in antigravity mode

Two processes of one program differ by up to a fifth, because their addresses and hash seeds differ;
therefore each round starts new ones.  The load generator (this process) and the upstream (a child)
use raw sockets and canned bytes and are as fast as wrk, so they add little to the figures.  Each
figure is the median of the rounds, each ratio the median of the ratios within a round, so a slow
spell of the machine hits both sides.  Ratios are costs: above 1, the first subject is slower or
larger, also where the unit is MB/s.
"""

import argparse
import collections
import contextlib
import functools
import gc
import heapq
import inspect
import json
import multiprocessing
import os
import pathlib
import platform
import random
import re
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from time import perf_counter_ns as now_ns

HERE = pathlib.Path(__file__).resolve().parent

ROUNDS, QUICK_ROUNDS = 5, 1
QUICK = 0.35            # a quick run measures this part of each duration below
POST_S = 0.4            # sequential requests of one size
LOAD_S = 3.0            # concurrent requests
STREAM_S = 1.6          # paced event streams
QUIET_S = 0.3           # from a stream's first event to the second: by then every stream is open
GAP_S = 0.8             # one stream without large bodies alongside, then with them
FLOOD_BYTES = 16 << 20  # a stream at full speed, an event per write; ten times that in large ones
SETTLE_S = 1.0          # before memory is read
SETTLED_S = 0.1         # after a change of rrouter's mode
WARM_UP = 10            # requests before those that count; 2 of a large body
WAIT_S = 20             # the limit of every wait

SIZES = (("1 KB", 1 << 10), ("77 KB", 77 << 10), ("1 MB", 1 << 20), ("10 MB", 10 << 20))
CONNECTIONS = 32
STREAMS = (1, 50, 100)
EVENTS_PER_S = 50
GAP_EVENTS_PER_S = 200  # of the stream alongside large bodies, because each body must meet some

# The headers of Claude Code in their order; the values are made up.
CLAUDE_HEADERS = "\n".join((
    "Accept: application/json",
    "Authorization: Bearer sk-0123456789abcdef0123456789abcdef",
    "Content-Type: application/json",
    "User-Agent: claude-cli/2.1.330 (external, cli)",
    "X-Claude-Code-Session-Id: 0f6c1d1e-4a8f-4f0e-9d0c-3f1f4f7c8a11",
    "X-Stainless-Arch: x64",
    "X-Stainless-Lang: js",
    "X-Stainless-OS: Linux",
    "X-Stainless-Package-Version: 0.94.0",
    "X-Stainless-Retry-Count: 0",
    "X-Stainless-Runtime: node",
    "X-Stainless-Runtime-Version: v24.3.0",
    "X-Stainless-Timeout: 600",
    "anthropic-beta: claude-code-20250219,interleaved-thinking-2025-05-14,"
    "context-management-2025-06-27,effort-2025-11-24",
    "anthropic-dangerous-direct-browser-access: true",
    "anthropic-version: 2023-06-01",
    "x-app: cli",
    "Connection: keep-alive",
    "Accept-Encoding: gzip, deflate, br, zstd",
    ""))


class BenchError(Exception):
    """The measurement cannot continue; the message says why."""


# Messages #####################################################################

def request_body(size):
    """Return the JSON of a Claude Code turn of about `size` bytes: `model` first, `stream` last."""
    line = 'def answer(question):\\n    return \\"forty-two\\"  # of \u00bb%06d\u00ab\\n'
    head = (b'{"model":"claude-sonnet-5-5","messages":[{"role":"user",'
            b'"content":[{"type":"text","text":"')
    tail = (b'"}]}],"system":[{"type":"text","text":"You are Claude Code."}],'
            b'"tools":[{"name":"Read","input_schema":'
            b'{"type":"object","properties":{"model":{"type":"string"}}}}],'
            b'"max_tokens":128000,"stream":true}')
    text = "".join(line % n for n in range(size // len((line % 0).encode()) + 1)).encode()
    cut = max(0, size - len(head) - len(tail))
    # Cut neither between an escape and its letter nor inside a character.
    while text[:cut].endswith(b"\\") or (cut < len(text) and text[cut] & 0xC0 == 0x80):
        cut -= 1
    return head + text[:cut] + tail


def request_bytes(body, query=""):
    """Return one POST as Claude Code writes it."""
    head = (f"POST /v1/messages?beta=true{query} HTTP/1.1\n{CLAUDE_HEADERS}"
            f"Host: localhost:8316\nContent-Length: {len(body)}\n\n")
    return head.replace("\n", "\r\n").encode() + body


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(text):
    """Return one event of a message, as one chunk."""
    return chunk(b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
                 b'"delta":{"type":"text_delta","text":"%b"}}\n\n' % text)


RESPONSE_BODY = (
    b'{"id":"msg_01","type":"message","role":"assistant",'
    b'"model":"gemini-claude-sonnet-4-5-thinking","content":[{"type":"text","text":"ok"}],'
    b'"stop_reason":"end_turn","usage":{"input_tokens":9}}')
RESPONSE = (
    b"HTTP/1.1 200 OK\r\nAccess-Control-Allow-Origin: *\r\nContent-Type: application/json\r\n"
    b"Date: Sun, 22 Nov 2026 10:00:00 GMT\r\nContent-Length: %d\r\n\r\n%b"
    % (len(RESPONSE_BODY), RESPONSE_BODY))
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nCache-Control: no-cache\r\nContent-Type: text/event-stream\r\n"
    b"Date: Sun, 22 Nov 2026 10:00:00 GMT\r\nTransfer-Encoding: chunked\r\n\r\n")
LAST_CHUNK = b"0\r\n\r\n"
# In auto mode, rrouter counts a stream of messages without `message_stop` as a failure.
STREAM_END = chunk(b'event: message_stop\ndata: {"type":"message_stop"}\n\n') + LAST_CHUNK
STAMP = re.compile(rb'"text":"(\d{20})"')


# Upstream #####################################################################

class Peer:
    """One connection to the upstream, with the rest of its request and of its stream.

    `missing` counts the bytes of the request still to come, `events` those of the stream.
    """

    __slots__ = ("socket", "head", "missing", "request_line", "events", "interval")

    def __init__(self, connection):
        self.socket, self.head, self.missing = connection, b"", 0
        self.request_line, self.events, self.interval = b"", 0, 0


class Upstream:
    """An epoll loop that discards requests and responds with canned bytes.

    The query can ask for an event stream: `&rate=R&count=N` for N events 1/R s apart, each with the
    time at which it was written; `&flood=N&block=B` for about N bytes as fast as the other side
    accepts them, B events per write.
    """

    LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
    PACED = re.compile(rb"&rate=(\d+)&count=(\d+)")
    FLOOD = re.compile(rb"&flood=(\d+)&block=(\d+)")

    def __init__(self, listener):
        self.listener, self.epoll, self.buffer = listener, select.epoll(), bytearray(1 << 20)
        self.peers, self.due, self.phase = {}, [], random.Random(8316).random
        listener.setblocking(False)
        self.epoll.register(listener, select.EPOLLIN)

    def run(self):
        gc.disable()
        while True:
            if self.due:        # epoll waits in whole milliseconds, select does not
                select.select([self.epoll], [], [], max(0, self.due[0][0] - now_ns()) / 1e9)
                self.send_events()
            for number, _ in self.epoll.poll(0 if self.due else None):
                if number == self.listener.fileno():
                    self.accept()
                else:
                    self.guard(self.read, self.peers.get(number))

    def accept(self):
        connection, _ = self.listener.accept()
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peers[connection.fileno()] = Peer(connection)
        self.epoll.register(connection, select.EPOLLIN)

    def guard(self, step, peer):
        """Run one step; forget the peer if it has gone."""
        try:
            if peer is None or step(peer):
                return
        except BlockingIOError:         # the event belonged to a closed connection of this number
            return
        except OSError:
            pass
        if self.peers.pop(peer.socket.fileno(), None):
            peer.events = 0
            peer.socket.close()

    def read(self, peer):
        """Take what has arrived; respond to a complete request.  Return 0 at the end."""
        size = peer.socket.recv_into(self.buffer)
        if peer.missing:
            peer.missing -= size
            if peer.missing:    # nginx uses Nagle's algorithm here and would wait 40 ms for an ACK
                peer.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        else:
            peer.head += self.buffer[:size]
            end = peer.head.find(b"\r\n\r\n")
            if end < 0:
                return size
            length = self.LENGTH.search(peer.head, 0, end)
            peer.missing = end + 4 + (int(length.group(1)) if length else 0) - len(peer.head)
            peer.request_line, peer.head = peer.head[:peer.head.find(b"\r\n")], b""
        if size and not peer.missing:
            if b"&" in peer.request_line:
                self.stream(peer)
            else:
                peer.socket.send(RESPONSE)
        return size

    def stream(self, peer):
        flood = self.FLOOD.search(peer.request_line)
        if flood:
            self.flood(peer, *map(int, flood.groups()))
            return
        rate, count = map(int, self.PACED.search(peer.request_line).groups())
        peer.socket.send(STREAM_HEAD + event(b"%020d" % now_ns()))
        peer.events, peer.interval = count, 10 ** 9 // rate
        first = now_ns() + int(QUIET_S * 1e9 + self.phase() * peer.interval)
        heapq.heappush(self.due, (first, peer.socket.fileno(), peer))

    def send_events(self):
        while self.due and self.due[0][0] <= now_ns():
            due, number, peer = heapq.heappop(self.due)
            if peer.events:     # 0 if the other side left
                self.guard(self.send_event, peer)
            if peer.events:
                heapq.heappush(self.due, (due + peer.interval, number, peer))

    @staticmethod
    def send_event(peer):
        peer.events -= 1
        return peer.socket.send(event(b"%020d" % now_ns()) if peer.events else STREAM_END)

    @staticmethod
    def flood(peer, size, events):
        """Serve this peer alone until its stream ends."""
        block = event(b"x" * 60) * events
        peer.socket.settimeout(WAIT_S)
        peer.socket.sendall(STREAM_HEAD + event(b"0" * 20))
        for _ in range(size // len(block)):
            peer.socket.sendall(block)
        peer.socket.sendall(STREAM_END)
        peer.socket.setblocking(False)


def start_upstream():
    """Start the upstream as a child; return (port, process)."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    process = multiprocessing.get_context("fork").Process(
        target=lambda: Upstream(listener).run(), daemon=True)
    process.start()
    with listener:
        return listener.getsockname()[1], process


# Subjects #####################################################################

def relay(port, upstream_port):
    """Pass bytes both ways, one thread for each.  The source of this function runs as a program."""
    import socket
    import threading

    def passing(source, sink):
        try:
            data = source.recv(65536)
            while data:
                sink.sendall(data)
                data = source.recv(65536)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            source.close()
            sink.close()

    def serve(client):
        upstream = socket.create_connection(("127.0.0.1", upstream_port))
        for end in (client, upstream):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        back = threading.Thread(target=passing, args=(upstream, client), daemon=True)
        back.start()
        passing(client, upstream)
        back.join()
        upstream.close()
        client.close()

    listener = socket.create_server(("127.0.0.1", port), backlog=256)
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def connect(port):
    connection = socket.create_connection(("127.0.0.1", port), WAIT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class Subject:
    """A process between load generator and upstream, with a directory; a context manager."""

    name = None

    def __init__(self, upstream_port, upstream_pid):
        self.upstream_port, self.upstream_pid = upstream_port, upstream_pid
        self.port, self.process = free_port(), None
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="bench-rrouter-"))

    def fresh(self):
        """Return another subject of this kind, not yet started."""
        return type(self)(self.upstream_port, self.upstream_pid)

    def command(self):
        """Return (arguments, environment) of the process."""
        raise NotImplementedError

    def __enter__(self):
        arguments, environment = self.command()
        self.process = subprocess.Popen(
            arguments, env={**os.environ, **environment}, cwd=self.directory,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self.wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def wait_until_ready(self):
        """Return after the first response: from rrouter, or from the upstream through others."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with connect(self.port) as connection:
                    connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    if connection.recv(4096).startswith(b"HTTP/1.1 200"):
                        return
            except OSError:
                time.sleep(0.001)
        raise BenchError(f"{self.name}: does not respond on port {self.port} "
                         f"(exit status {self.process.poll()})")

    def check(self):
        """Raise BenchError if the subject does not do its job."""

    def take_turn(self):
        """Prepare the subject to be measured."""

    def pids(self):
        pid = self.process.pid
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid] + [int(child) for child in children]

    def cpu_s(self):
        """Return the CPU time that process and children used so far; the kernel counts in 10 ms."""
        ticks = 0
        for pid in self.pids():
            fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])      # utime, stime
        return ticks / os.sysconf("SC_CLK_TCK")

    def rss_mb(self):
        pages = sum(int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
                    for pid in self.pids())
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Direct(Subject):
    name = "direct"

    def __enter__(self):
        self.port = self.upstream_port
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.directory, ignore_errors=True)

    def pids(self):
        return []


class Nginx(Subject):
    name = "nginx"

    #: Request buffering stays on, which is the default, but in memory, because that is nginx's
    #: fastest way to forward a body: files are two to five times slower.  Without
    #: keepalive_requests it would close each connection after 1000 requests.
    CONFIG = """
        daemon off;  worker_processes auto;  %(user)s
        error_log stderr crit;  pid %(directory)s/nginx.pid;
        events { worker_connections 1024; }
        http {
            access_log %(directory)s/access.log;
            client_body_temp_path %(directory)s/body;     proxy_temp_path %(directory)s/proxy;
            fastcgi_temp_path %(directory)s/fastcgi;      uwsgi_temp_path %(directory)s/uwsgi;
            scgi_temp_path %(directory)s/scgi;            tcp_nodelay on;
            client_max_body_size 64m;                     client_body_buffer_size 64m;
            keepalive_requests 100000000;
            upstream backend {
                server 127.0.0.1:%(upstream_port)d;
                keepalive 128;  keepalive_requests 100000000;
            }
            server {
                listen 127.0.0.1:%(port)d backlog=256;
                location / {
                    proxy_pass http://backend;
                    proxy_http_version 1.1;  proxy_set_header Connection "";
                    proxy_buffering off;
                }
            }
        }"""

    @staticmethod
    def program():
        return shutil.which("nginx", path=os.environ.get("PATH", "") + os.pathsep + "/usr/sbin")

    @classmethod
    def version(cls):
        if not cls.program():
            return "not installed"
        output = subprocess.run([cls.program(), "-v"], stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT).stdout
        return output.decode().strip().rpartition("/")[2]

    def command(self):
        config = self.directory / "nginx.conf"
        user = "user root;" if os.geteuid() == 0 else ""
        config.write_text(self.CONFIG % {**vars(self), "user": user})
        return [self.program(), "-e", "stderr", "-p", str(self.directory), "-c", str(config)], {}


class Relay(Subject):
    name = "relay"

    def command(self):
        source = f"{inspect.getsource(relay)}\nrelay({self.port}, {self.upstream_port})\n"
        return [sys.executable, "-c", source], {}


class Rrouter(Subject):
    name, mode, program = "rrouter", "antigravity", str(HERE / "rrouter.py")

    def environment(self):
        return {"HOME": str(self.directory), "RROUTER_PORT": str(self.port), "RROUTER_HOST": "",
                "RROUTER_UPSTREAM": f"http://127.0.0.1:{self.upstream_port}"}

    def command(self):
        self.take_turn()
        return [sys.executable, self.program, "serve"], self.environment()

    def take_turn(self):
        """Set the mode; let its file settle, because rrouter rereads a new one at each request."""
        mode = self.directory / ".rrouter" / "mode"
        mode.parent.mkdir(mode=0o700, exist_ok=True)
        if not mode.exists() or mode.read_text() != self.mode + "\n":
            mode.write_text(self.mode + "\n")
            if self.process is not None:
                time.sleep(SETTLED_S)

    def check(self):
        with connect(self.port) as connection:
            response = Client(connection, request_body(1024)).post()
        if b"x-rrouter-model: gemini-claude-sonnet" not in response:
            raise BenchError(f"{self.name}: {self.program} does not rewrite the model")


class Auto(Rrouter):
    name, mode = "auto", "auto"
    owner = None            # the subject whose process it uses

    def share(self, other):
        """Use the process that `other` will start."""
        shutil.rmtree(self.directory)
        self.owner, self.port, self.directory = other, other.port, other.directory

    def __enter__(self):
        if self.owner is None:
            return super().__enter__()
        self.process = self.owner.process
        return self

    def __exit__(self, *error):
        if self.owner is None:
            super().__exit__(*error)


class Other(Rrouter):
    """A second rrouter.py to compare with, named by --against."""

    name = "other"


# Load #########################################################################

def check_response(data, response):
    """Raise BenchError if the connection ended (`data` is empty) or the status is not 200."""
    if not data or not response.startswith(b"HTTP/1.1 200"):
        raise BenchError(f"expected the upstream's response, got {response[:300]!r}")


def ready(epoll, timeout_s=WAIT_S):
    """Return the descriptors that can be read; raise BenchError if none can in time."""
    events = epoll.poll(timeout_s)
    if timeout_s and not events:
        raise BenchError(f"nothing came for {timeout_s} s")
    return [number for number, _ in events]


class Client:
    """Repeats one request on one connection and checks that the canned response comes back."""

    def __init__(self, connection, body, query=""):
        self.socket, self.request = connection, request_bytes(body, query)

    def post(self):
        """Send the request; return the response."""
        self.socket.sendall(self.request)
        response = self.socket.recv(65536)
        while not response.endswith(RESPONSE_BODY):
            more = self.socket.recv(65536)
            response += more
            check_response(more, response)
        check_response(response, response)
        return response

    def warm_up(self):
        for _ in range(WARM_UP if len(self.request) < 1 << 20 else 2):
            self.post()

    def repeat(self, seconds):
        """Post for that many seconds; return the time each request took, in seconds."""
        times, end = [], now_ns() + int(seconds * 1e9)
        before = now_ns()
        while before < end:
            self.post()
            after = now_ns()
            times.append((after - before) / 1e9)
            before = after
        return times


def load(port, seconds, on_warm):
    """Keep a request under way on each of CONNECTIONS; return the seconds each took after warm-up.

    It calls `on_warm()` when the warm-up ends.
    """
    request, epoll, times = request_bytes(request_body(1024)), select.epoll(), []
    sockets, sent, parts = {}, {}, {}
    now = now_ns()
    warm, end = now + int(seconds * 0.2e9), now + int(seconds * 1.2e9)
    with contextlib.ExitStack() as stack:
        stack.callback(epoll.close)
        for _ in range(CONNECTIONS):
            connection = stack.enter_context(connect(port))
            number = connection.fileno()
            sockets[number], sent[number] = connection, now_ns()
            epoll.register(number, select.EPOLLIN)
            connection.sendall(request)
        while now < end:
            for number in ready(epoll):
                data = sockets[number].recv(65536)
                now = now_ns()
                # Head and body may come one by one.
                if not data.endswith(RESPONSE_BODY) or number in parts:
                    response = parts.pop(number, b"") + data
                    if not response.endswith(RESPONSE_BODY):
                        parts[number] = response
                        check_response(data, response)
                        continue
                    data = response
                check_response(data, data)
                if not warm:
                    times.append((now - sent[number]) / 1e9)
                elif now >= warm:
                    warm = 0
                    on_warm()
                    now = now_ns()
                sent[number] = now
                sockets[number].send(request)
    return times


class Stream:
    """Reads one paced event stream: the first event's time, each later one's delay and arrival."""

    def __init__(self, port, rate, count):
        self.first_s, self.delays_s, self.arrivals_ns, self.rest = None, [], [], b""
        self.count, self.begun_ns = count, now_ns()
        self.socket = connect(port)
        self.socket.sendall(request_bytes(request_body(1024), f"&rate={rate}&count={count}"))

    def read(self):
        """Take what has arrived; return False at the end of the stream."""
        data = self.socket.recv(65536)
        now = now_ns()
        text = self.rest + data
        end = 0
        for found in STAMP.finditer(text):
            end = found.end()
            if self.first_s is None:
                self.first_s = (now - self.begun_ns) / 1e9
            else:
                self.delays_s.append((now - int(found.group(1))) / 1e9)
                self.arrivals_ns.append(now)
        self.rest = text[end:]
        if text.endswith(LAST_CHUNK):
            self.socket.close()
            if len(self.delays_s) != self.count - 1:
                raise BenchError(f"{len(self.delays_s)} events came, not {self.count - 1}")
            return False
        if not data:
            raise BenchError(f"a stream broke off after {text[-200:]!r}")
        return True


def read_streams(port, number, seconds, on_open, on_end):
    """Open `number` streams at once and read them to the end; return the streams.

    It calls `on_open()` when each has had its first event, `on_end()` when the first one ends.
    """
    epoll, streams, waiting = select.epoll(), {}, number
    done = []

    def pump(timeout_s):
        nonlocal waiting
        for descriptor in ready(epoll, timeout_s):
            stream = streams[descriptor]
            fresh = stream.first_s is None
            if not stream.read():
                if not done:
                    on_end()
                done.append(streams.pop(descriptor))
            elif fresh and stream.first_s is not None:
                waiting -= 1
                if not waiting:
                    on_open()

    for _ in range(number):
        stream = Stream(port, EVENTS_PER_S, int(EVENTS_PER_S * seconds))
        streams[stream.socket.fileno()] = stream
        epoll.register(stream.socket, select.EPOLLIN)
        pump(0)
    while streams:
        pump(WAIT_S)
    epoll.close()
    return done


def read_flood(port, query):
    """Read one stream at full speed; return the seconds from its first bytes to its last."""
    buffer, end = bytearray(1 << 18), b""
    with connect(port) as connection:
        connection.sendall(request_bytes(request_body(1024), query))
        connection.recv_into(buffer)
        begun_ns = now_ns()
        while not end.endswith(LAST_CHUNK):
            got = connection.recv_into(buffer)
            check_response(got, b"HTTP/1.1 200")
            end = end[-8:] + buffer[max(0, got - 8):got]
        return (now_ns() - begun_ns) / 1e9


def post_between(port, start_ns, end_ns):
    """Post bodies of 10 MB, one after the other, between two times; runs in a child."""
    with connect(port) as connection:
        client = Client(connection, request_body(10 << 20))
        time.sleep(max(0, start_ns - now_ns()) / 1e9)
        while now_ns() < end_ns:
            client.post()


# Figures ######################################################################
#
# Each `measure_` function takes a subject and a factor for its durations; it returns {row: value}
# in seconds, MB, or a rate.

def percentile(values, percent):
    """Return the smallest value that `percent` % of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def measure_post(subject, factor):
    rows = {}
    for label, size in SIZES:
        with connect(subject.port) as connection:
            client = Client(connection, request_body(size))
            client.warm_up()
            cpu_s = subject.cpu_s()
            times = client.repeat(POST_S * factor)
            cpu_s = subject.cpu_s() - cpu_s
        rows[f"post {label} p50"] = percentile(times, 50)
        rows[f"post {label} p95"] = percentile(times, 95)
        rows[f"post {label} cpu"] = cpu_s / len(times)
    return rows


def measure_core(subject, factor):
    """Measure small bodies again, with all processes on one core.

    Waking a core that sleeps between two messages takes longer than forwarding a message, and the
    scheduler decides whether it sleeps.  One core sleeps less, so the figure shows the work.
    """
    pids = [os.getpid(), subject.upstream_pid, *subject.pids()]
    cores = os.sched_getaffinity(0)
    pin(pids, {min(cores)})
    try:
        rows = {}
        for label, size in SIZES[:2]:
            with connect(subject.port) as connection:
                client = Client(connection, request_body(size))
                client.warm_up()
                times = client.repeat(POST_S * factor)
                rows[f"one core {label} p50"] = percentile(times, 50)
        return rows
    finally:
        pin(pids, cores)


def pin(pids, cores):
    """Restrict every thread of these processes, present and future, to these cores."""
    for pid in pids:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):      # the thread has just ended
                os.sched_setaffinity(int(thread), cores)


def measure_load(subject, factor):
    cpu = []
    seconds = LOAD_S * factor
    times = load(subject.port, seconds, lambda: cpu.append(subject.cpu_s()))
    return {"load requests": len(times) / seconds,
            "load p50": percentile(times, 50), "load p99": percentile(times, 99),
            "load cpu": (subject.cpu_s() - cpu[0]) / len(times)}


def sample_cpu(subject, samples):
    """Append to `samples` the CPU seconds that `subject` has used."""
    samples.append(subject.cpu_s())


def measure_sse(subject, factor):
    rows = {}
    for number in STREAMS:
        cpu = []
        sample = functools.partial(sample_cpu, subject, cpu)
        streams = read_streams(subject.port, number, STREAM_S * factor, sample, sample)
        delays = [delay for stream in streams for delay in stream.delays_s]
        rows[f"sse {number} first"] = percentile([stream.first_s for stream in streams], 50)
        rows[f"sse {number} p50"] = percentile(delays, 50)
        rows[f"sse {number} p99"] = percentile(delays, 99)
        if number > 1:          # one stream uses too little for the kernel's count
            rows[f"sse {number} cpu"] = (cpu[1] - cpu[0]) / len(delays)
    return rows


def measure_flood(subject, factor):
    rows = {}
    for name, full_size, block in (("flood events", FLOOD_BYTES, 1),
                                   ("flood blocks", 10 * FLOOD_BYTES, 400)):
        size = int(full_size * factor)
        cpu_s = subject.cpu_s()
        rows[name] = size / 1e6 / read_flood(subject.port, f"&flood={size}&block={block}")
        rows[f"{name} cpu"] = (subject.cpu_s() - cpu_s) / (size / 1e6)
    return rows


def measure_gap(subject, factor):
    half_ns = int(GAP_S * factor * 1e9)
    start_ns = now_ns() + int(QUIET_S * 1e9) + half_ns
    poster = multiprocessing.get_context("fork").Process(
        target=post_between, args=(subject.port, start_ns, start_ns + half_ns), daemon=True)
    poster.start()
    count = int(2 * GAP_S * factor * GAP_EVENTS_PER_S)
    stream = Stream(subject.port, GAP_EVENTS_PER_S, count)
    while stream.read():
        pass
    poster.join()
    gaps = [(b, (b - a) / 1e9) for a, b in zip(stream.arrivals_ns, stream.arrivals_ns[1:])]
    quiet = percentile([gap for arrival, gap in gaps if arrival < start_ns], 99)
    busy = percentile([gap for arrival, gap in gaps if arrival >= start_ns], 99)
    return {"gap quiet p99": quiet, "gap busy p99": busy, "gap growth": max(0.0, busy - quiet)}


def measure_memory(subject, factor):
    if isinstance(subject, Direct):
        return {}
    with subject.fresh() as fresh:
        time.sleep(SETTLE_S)
        rows = {"rss idle": fresh.rss_mb()}
        with connect(fresh.port) as connection:
            Client(connection, request_body(10 << 20)).repeat(POST_S * factor)
        time.sleep(SETTLE_S)
        rows["rss after 10 MB"] = fresh.rss_mb()
        sizes = []
        read_streams(fresh.port, 100, STREAM_S * factor,
                     lambda: None, lambda: sizes.append(fresh.rss_mb()))
        rows["rss 100 streams"] = sizes[0]
    return rows


def measure_start(subject, factor):
    if isinstance(subject, Direct):
        return {}
    times = []
    for _ in range(max(1, int(3 * factor))):
        begun_ns = now_ns()
        with subject.fresh():
            times.append((now_ns() - begun_ns) / 1e9)
    return {"start": statistics.median(times)}


def measure_commands(subject, factor):
    """Measure `rrouter status` and `rrouter claude` beside a running rrouter.

    Their floor, in the column of the relay, is Python with two of the same imports.
    """
    if isinstance(subject, Relay):
        bare = wall_time([sys.executable, "-c", "import http.client, argparse"], {}, factor)
        return {"status": bare, "claude": bare}
    if not isinstance(subject, Rrouter) or isinstance(subject, Auto):
        return {}
    with subject.fresh() as fresh:
        return {name: wall_time([sys.executable, fresh.program, name], fresh.environment(), factor)
                for name in ("status", "claude")}


def wall_time(arguments, environment, factor):
    times = []
    for _ in range(max(2, int(7 * factor))):
        begun_ns = now_ns()
        status = subprocess.run(
            arguments, env={**os.environ, **environment}, timeout=WAIT_S, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
        times.append((now_ns() - begun_ns) / 1e9)
        if status:
            raise BenchError(f"{' '.join(arguments[1:])}: exit status {status}")
    return statistics.median(times)


MEASURES = {
    "post": measure_post, "core": measure_core, "load": measure_load, "sse": measure_sse,
    "flood": measure_flood, "gap": measure_gap, "memory": measure_memory, "start": measure_start,
    "commands": measure_commands}

#: Measures that take long and vary little run in the first rounds only.
FEW_ROUNDS = {"memory": 1, "start": 3, "commands": 2}

RATES = {"load requests": "/s", "flood events": " MB/s", "flood blocks": " MB/s"}   # more is better
MEGABYTES = ("rss idle", "rss after 10 MB", "rss 100 streams")


class Results:
    """The value of each row for each subject in each round."""

    def __init__(self, subjects):
        self.subjects = subjects
        self.values = collections.OrderedDict()     # {row: {subject: [value of each round]}}

    def add(self, subject, rows):
        for row, value in rows.items():
            self.values.setdefault(row, {}).setdefault(subject, []).append(value)

    def median(self, row, subject):
        """Return the median of the rounds, or None if none measured this row."""
        values = self.values.get(row, {}).get(subject)
        return statistics.median(values) if values else None

    def ratio(self, row, subject, other):
        """Return the cost of `subject` divided by that of `other`; None if one is missing or 0."""
        values = self.values.get(row, {})
        pairs = zip(values.get(subject, ()), values.get(other, ()))
        ratios = [b / a if row in RATES else a / b for a, b in pairs if a > 0 and b > 0]
        return statistics.median(ratios) if ratios else None


def add_delays(results):
    """Add rows of the delay beyond the direct median, round by round, after the delays."""
    for number in STREAMS:
        base = results.values.get(f"sse {number} p50", {}).get("direct", ())
        for percent in ("p50", "p99"):
            added = f"sse {number} added {percent}"
            for subject, values in results.values.get(f"sse {number} {percent}", {}).items():
                for value, direct in zip(values, base) if subject != "direct" else ():
                    results.add(subject, {added: max(0.0, value - direct)})

    def group(row):
        return row.replace(" added", "").rpartition(" ")[0]
    groups = [group(row) for row in results.values]
    for row in sorted(results.values, key=lambda row: groups.index(group(row))):
        results.values.move_to_end(row)


# Report #######################################################################

#: (row, compared with, limit): the limit of rrouter's value, or of its ratio to the other's
TARGETS = (
    ("post 1 KB p50", "nginx", 2.0), ("post 77 KB p50", "nginx", 1.6),
    ("post 1 MB p50", "nginx", 1.3), ("post 10 MB p50", "nginx", 0.9),
    ("load requests", "nginx", 7.5), ("load p99", None, 0.025), ("load cpu", "relay", 3.5),
    ("sse 50 p50", "nginx", 1.0), ("sse 50 p99", "nginx", 2.0), ("sse 100 p99", "nginx", 3.0),
    ("flood events", "nginx", 1 / 0.8), ("gap growth", None, 0.005),
    ("rss idle", None, 21), ("rss after 10 MB", None, 35), ("rss 100 streams", None, 42),
    ("start", "relay", 2.5), ("status", "relay", 2.5), ("claude", "relay", 2.5),
)
AUTO_LIMIT = 1.10       # of auto to antigravity mode, for each target above except:
FREE_OF_MODE = ("gap growth", "status", "claude")


def show(row, value):
    """Return a value as text with its unit."""
    if value is None:
        return "-"
    if row in RATES:
        return f"{value:.0f}{RATES[row]}"
    if row in MEGABYTES:
        return f"{value:.1f} MB"
    if value < 0.001:
        return f"{value * 1e6:.0f} us"
    return f"{value * 1e3:.1f} ms" if value < 0.1 else f"{value * 1e3:.0f} ms"


def show_ratio(value):
    return "-" if value is None else f"{value:.2f}"


def machine():
    """Return one line about the machine and the programs."""
    models = re.findall(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    return (f"{os.cpu_count()} cores {models[0] if models else platform.machine()}, "
            f"{platform.system()} {platform.release()}, "
            f"Python {platform.python_version()}, nginx {Nginx.version()}")


def table(results):
    """Return the lines of the table."""
    names = results.subjects
    pairs = [(a, b) for a, b in (("rrouter", "nginx"), ("rrouter", "relay"),
                                 ("auto", "rrouter"), ("other", "rrouter"))
             if a in names and b in names]
    rows = [["", *names, *(f"{a}/{b}" for a, b in pairs)]]
    for row in results.values:
        rows.append([row, *(show(row, results.median(row, name)) for name in names),
                     *(show_ratio(results.ratio(row, *pair)) for pair in pairs)])
    first, *others = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([row.ljust(first), *map(str.rjust, cells, others)]) for row, *cells in rows]


def judge(results):
    """Return (figure, value, limit, met) of each measured target, those of auto mode last."""
    judged = []
    for row, other, limit in TARGETS:
        value = results.ratio(row, "rrouter", other) if other else results.median(row, "rrouter")
        if value is not None:
            judged.append((f"{row} / {other}" if other else row, value, limit, value <= limit))
    for row, _, _ in TARGETS:
        value = None if row in FREE_OF_MODE else results.ratio(row, "auto", "rrouter")
        if value is not None:
            judged.append((f"auto: {row}", value, AUTO_LIMIT, value <= AUTO_LIMIT))
    return judged


def verdict(figure, value, limit, met):
    """Return the line of one judged target."""
    if "/" in figure or figure.startswith("auto"):
        numbers = f"{show_ratio(value)}, limit {show_ratio(limit)}"
    else:
        numbers = f"{show(figure, value)}, limit {show(figure, limit)}"
    return f"{'met' if met else 'MISSED':7} {figure:26} {numbers}"


def as_json(results, where):
    figures = {row: {"median": {name: results.median(row, name) for name in values},
                     "rounds": values,
                     "toNginx": results.ratio(row, "rrouter", "nginx"),
                     "toRelay": results.ratio(row, "rrouter", "relay"),
                     "autoToRrouter": results.ratio(row, "auto", "rrouter")}
               for row, values in results.values.items()}
    targets = [dict(zip(("figure", "value", "limit", "met"), line)) for line in judge(results)]
    return json.dumps({"machine": where, "figures": figures, "targets": targets}, indent=1)


CHART = (       # (row, words)
    ("post 1 KB p50", "1 KB request, median"), ("post 77 KB p50", "77 KB request, median"),
    ("post 1 MB p50", "1 MB request, median"), ("sse 50 p50", "event, 50 streams, median"),
    ("load requests", "requests/s, 32 connections"), ("rss idle", "memory, idle"))
CHART_SUBJECTS = ("direct", "nginx", "relay", "rrouter", "auto")
CHART_STYLE = """
  text { font: 12px system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif }
  .words { font-weight: 600; font-size: 13px }
  text { fill: #1f2328 } rect { fill: #8c959f } .own { fill: #0969da }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc } rect { fill: #6e7681 } .own { fill: #58a6ff }
  }
"""


def as_svg(results):
    """Return a chart: a group of bars for each row, each group on its own scale."""
    body, y = [], 8
    for row, words in CHART:
        values = [(name, results.median(row, name)) for name in CHART_SUBJECTS]
        values = [(name, value) for name, value in values if value]
        if not values:
            continue
        y += 16
        body.append(f'<text class="words" x="10" y="{y}">{words}</text>')
        for name, value in values:
            y += 18
            width = 420 * value / max(value for _, value in values)
            own = ' class="own"' if name in ("rrouter", "auto") else ""
            body += [f'<text x="70" y="{y}" text-anchor="end">{name}</text>',
                     f'<rect{own} x="78" y="{y - 11}" width="{width:.1f}" height="13" rx="2"/>',
                     f'<text x="{84 + width:.1f}" y="{y}">{show(row, value)}</text>']
        y += 12
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 {y}" width="600" height="{y}">',
        f"<style>{CHART_STYLE}</style>", *body, "</svg>", ""])


# Run ##########################################################################

def show_progress(text):
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def choose_subjects(against):
    kinds = [Direct, Nginx, Relay, Rrouter, Auto]
    if not Nginx.program():
        print("nginx is not installed: the results lack it and the ratios to it", file=sys.stderr)
        kinds.remove(Nginx)
    if against:
        Other.program = os.path.abspath(against)
        kinds.append(Other)
    return kinds


def make_subjects(kinds, upstream_port, upstream_pid):
    """Return a subject of each kind, not yet started."""
    subjects = [kind(upstream_port, upstream_pid) for kind in kinds]
    rrouter = next(subject for subject in subjects if type(subject) is Rrouter)
    for subject in subjects:
        if isinstance(subject, Auto):
            subject.share(rrouter)
    return subjects


def measure_all(kinds, upstream, measures, rounds, factor):
    """Measure the subjects in turn, the order rotated by one each round; return the Results."""
    results = Results([kind.name for kind in kinds])
    for number in range(rounds):
        with contextlib.ExitStack() as stack:
            subjects = [stack.enter_context(subject) for subject in make_subjects(kinds, *upstream)]
            for subject in subjects:
                subject.take_turn()
                subject.check()
            for name in measures:
                if number >= FEW_ROUNDS.get(name, rounds):
                    continue
                turn = number % len(subjects)
                for subject in subjects[turn:] + subjects[:turn]:
                    show_progress(f"round {number + 1} of {rounds}: {name}, {subject.name}")
                    gc.collect()
                    subject.take_turn()
                    results.add(subject.name, MEASURES[name](subject, factor))
    show_progress("")
    add_delays(results)
    return results


def build_parser():
    parser = argparse.ArgumentParser(description="Measure rrouter against nginx and a plain relay.")
    parser.add_argument("--quick", action="store_true", help="one short round, about a minute")
    parser.add_argument("--only", metavar="NAME,...", default=",".join(MEASURES),
                        help="measure these of %(default)s")
    parser.add_argument("--rounds", type=int, help=f"instead of {ROUNDS}")
    parser.add_argument("--rrouter", metavar="FILE", default=Rrouter.program,
                        help="the rrouter.py to measure")
    parser.add_argument("--against", metavar="FILE",
                        help="another rrouter.py to measure alongside it")
    parser.add_argument("--json", action="store_true",
                        help="print JSON, with the values of each round")
    parser.add_argument("--svg", metavar="FILE", help="draw a chart as well")
    return parser


def main():
    parser = build_parser()
    options = parser.parse_args()
    if not sys.platform.startswith("linux"):
        parser.error("the benchmark needs /proc and epoll: run it on Linux")
    chosen = options.only.split(",")
    unknown = set(chosen) - set(MEASURES)
    if unknown:
        parser.error(f"--only: expected some of {','.join(MEASURES)}, "
                     f"got {','.join(sorted(unknown))}")
    Rrouter.program = os.path.abspath(options.rrouter)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    begun = time.monotonic()
    gc.disable()
    port, upstream = start_upstream()
    try:
        results = measure_all(
            choose_subjects(options.against), (port, upstream.pid),
            [name for name in MEASURES if name in chosen], rounds, QUICK if options.quick else 1)
    except BenchError as error:
        print(f"bench_rrouter: {error}", file=sys.stderr)
        return 1
    finally:
        upstream.terminate()
        upstream.join()
    if options.svg:
        pathlib.Path(options.svg).write_text(as_svg(results), encoding="utf-8")
    if options.json:
        print(as_json(results, machine()))
        return 0
    print(f"{machine()}; {rounds} rounds in {time.monotonic() - begun:.0f} s")
    print("\n".join(table(results)), end="\n\n")
    print("\n".join(verdict(*line) for line in judge(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
