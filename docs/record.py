#!/usr/bin/env python3
"""Draw what a command prints as an animated SVG: `python3 docs/record.py FILE.svg COMMAND ...`.

The command runs in a terminal of 80 columns.  Each line of the picture appears when the command
printed it; after the last one the picture stays.  `docs/demo.svg` is made by

    python3 docs/record.py docs/demo.svg python3 rrouter.py demo
"""

import html
import os
import pty
import re
import sys
import time

COLUMNS = 80
CHARACTER, LINE = 7.8, 19       # width and height in pixels, for 13px
MARGIN, TITLE = 16, 34
COLORS = {"31": "#ff7b72", "32": "#7ee787", "33": "#e3b341", "34": "#79c0ff", "35": "#d2a8ff",
          "36": "#76e3ea", "90": "#9198a1"}
STYLE = """
  text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace;
         fill: #e6edf3; white-space: pre }
  .line { animation: appear 0.01s both }
  @keyframes appear { from { opacity: 0 } to { opacity: 1 } }
  @media (prefers-reduced-motion: reduce) { .line { animation: none } }
"""


def record(command):
    """Return [(seconds since the start, line)] of what the command prints to a terminal."""
    read, write = pty.openpty()
    environment = dict(os.environ, COLUMNS=str(COLUMNS), TERM="xterm-256color")
    begun = time.monotonic()
    pid = os.fork()
    if not pid:
        for descriptor in (0, 1, 2):
            os.dup2(write, descriptor)
        os.execvpe(command[0], command, environment)
    os.close(write)
    lines, rest = [], b""
    while True:
        try:
            data = os.read(read, 65536)
        except OSError:                 # Linux: the terminal's other end is closed
            data = b""
        if not data:
            break
        *whole, rest = (rest + data).split(b"\n")
        lines += [(time.monotonic() - begun, line.decode().rstrip("\r")) for line in whole]
    if os.waitpid(pid, 0)[1]:
        raise SystemExit(f"{command}: failed")
    return lines


def spans(line):
    """Return the line as SVG text: its colours and bold parts as spans."""
    parts, color, bold = [], "", False
    for piece in re.split(r"(\x1b\[[0-9;]*m)", line):
        if piece.startswith("\x1b"):
            for code in piece[2:-1].split(";"):
                color = COLORS.get(code, "" if code in ("", "0", "39") else color)
                bold = code == "1" or (bold and code not in ("", "0", "22"))
        elif piece:
            style = (f' fill="{color}"' if color else "") + (' font-weight="bold"' if bold else "")
            text = html.escape(piece, quote=False)
            parts.append(f"<tspan{style}>{text}</tspan>" if style else text)
    return "".join(parts)


def draw(prompt, lines):
    """Return the SVG."""
    rows = [(0.0, f"\x1b[32m$\x1b[0m {prompt}"), *lines]
    width = round(COLUMNS * CHARACTER + 2 * MARGIN)
    height = TITLE + len(rows) * LINE + MARGIN
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
           f'width="{width}" height="{height}" role="img" aria-label="{html.escape(prompt)}">',
           f"<style>{STYLE}</style>",
           f'<rect width="{width}" height="{height}" rx="10" fill="#0d1117" stroke="#6e7681"/>']
    out += [f'<circle cx="{MARGIN + 6 + 20 * i}" cy="{TITLE / 2}" r="6" fill="{color}"/>'
            for i, color in enumerate(("#ff5f57", "#febc2e", "#28c840"))]
    for number, (at, line) in enumerate(rows):
        y = TITLE + LINE * (number + 0.8)
        out.append(f'<text class="line" style="animation-delay:{at:.2f}s" x="{MARGIN}" y="{y:.0f}" '
                   f'xml:space="preserve">{spans(line)}</text>')
    return "\n".join([*out, "</svg>", ""])


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        command = sys.argv[2:]
        file.write(draw(" ".join(command), record(command)))


if __name__ == "__main__":
    main()
