"""What all scripts share as commands: errors of one line, numbers in options, and an end by a signal."""

import argparse
import functools
import os
import shlex
import signal
import sys
import time
from pathlib import Path

from served_tokens.files.write import shown


class CommandLine(argparse.ArgumentParser):
    """The parser of a script: its docstring is the help, less its idea; a mistake is one line, without the usage."""

    def __init__(self, doc: str):
        doc = doc.partition("\n\nThe one idea")[0]
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        # group(title): add_argument for what stands under a heading of the help
        self.group = functools.cache(lambda title: self.add_argument_group(title).add_argument)

    def add_limits(self) -> None:
        """The limits of both steps."""
        add = self.group("limits")
        add("--num-proc", type=positive_count, default=os.cpu_count(), metavar="N", help="processes (default: cores)")
        add("--strict", action="store_true", help="stop at the first bad row instead of setting it aside")

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (--help tells the options)\n")


def positive_count(text: str) -> int:
    """A number above zero, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


class Took:
    """How long each part of a command took, to be printed at its end."""

    def __init__(self):
        self.parts, self.since = [], time.monotonic()

    def done(self, part: str) -> None:
        """A part has ended; the next one begins."""
        now = time.monotonic()
        self.parts.append(f"{part} {now - self.since:.0f} s")
        self.since = now

    def __str__(self) -> str:
        return "took: " + ", ".join(self.parts)


def print_command(script: Path, *words: str) -> None:
    """The line with the command for the next step, as it can be pasted here."""
    print(shlex.join(["next:", "python", shown(script), *words]))


def run(main) -> None:
    """Run a script: what the terminal cannot show is escaped; a closed pipe or a full disk ends it without a trace."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        sys.exit(f"{sys.argv[0]}: {error}")


def exit_on_signals() -> None:
    """End by Ctrl-C and SIGTERM without a trace: what is half written is removed, and that is not interrupted."""

    def end(number, frame) -> None:
        for other in (signal.SIGINT, signal.SIGTERM):
            signal.signal(other, lambda *_: None)
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
