"""A fuzz of everything the package reads from others: ``python tests/fuzz.py --cases 10000 --seed 0``.

Each case damages a valid file and reads it. It has to end in a result or in the one documented error with a message of
one line, within ten seconds and a bounded memory, without a file written outside its folder, a program started or a
connection made. The table counts the cases by target and outcome; what failed is kept in ``--keep``.
"""

import argparse
import faulthandler
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import FrameType

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from fuzz_mutations import mutated
from fuzz_targets import Target, targets
from transformers.utils import logging

from glare.data.sources import BadImage
from glare.errors import UserError

SECONDS = 10
MEMORY_BYTES = 6 * 2**30  # of address space, beyond what the libraries take
LONGEST_MESSAGE = 2000
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.mkdir": 0,
    "os.remove": 0,
    "os.rename": 1,
    "os.rmdir": 0,
    "os.symlink": 1,
    "os.link": 1,
    "os.truncate": 0,
}
"""Event of Python's audit hooks -> which argument is the path that is changed."""

FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")


class Hang(BaseException):
    """A case took too long; no Exception, which readers may catch."""


@dataclass
class Watch:
    """What a case did that it may not do: ``inside`` is the only folder it may write to, None while nobody looks."""

    inside: str | None
    found: list[str]

    def event(self, name: str, arguments: tuple[object, ...]) -> None:
        """An audit hook."""
        if self.inside is None:
            return
        if name in FORBIDDEN:
            self.found.append(f"{name} {arguments!r:.200}")
        path: object = None
        if name == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            path = arguments[0]
        elif name in CHANGES:
            path = arguments[CHANGES[name]]
        if isinstance(path, str | bytes | os.PathLike):
            real = os.path.realpath(os.fsdecode(path))
            if not real.startswith((self.inside, "/dev/null")):
                self.found.append(f"{name} {real}")


def outcome(target: Target, content: bytes, folder: Path, watch: Watch) -> tuple[str, str]:
    """``read``, ``refused`` or what went wrong, and what was said."""
    files = {**target.folder, target.name: content}
    for name, body in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
    watch.inside, watch.found = os.path.realpath(folder), []
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            target.read(folder)
        result = ("read", "")
    except (UserError, BadImage) as error:
        result = _judged(str(error))
    except Hang:
        result = ("hang", traceback.format_exc())
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        result = ("crash", traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        watch.inside = None
    return ("outside", "; ".join(watch.found)) if watch.found else result


def _judged(message: str) -> tuple[str, str]:
    good = message.strip() and "\n" not in message and len(message) <= LONGEST_MESSAGE
    return ("refused", message) if good else ("bad message", message)


def fuzz(cases: int, seed: int, *, keep: Path, only: str = "") -> Counter[tuple[str, str]]:
    """Run the cases; how often each (target, outcome) occurred. Prints what went wrong, with the file's place."""
    known = {name: target for name, target in targets().items() if only in name}
    watch, counts = Watch(None, []), Counter[tuple[str, str]]()
    sys.addaudithook(watch.event)
    with tempfile.TemporaryDirectory(prefix="glare-fuzz-") as scratch, limited():
        for number in range(cases):
            draw = random.Random(f"{seed}:{number}")
            name = draw.choice(sorted(known))
            target, folder = known[name], Path(scratch) / "case"
            content = mutated(target.seeds, draw) if number >= len(known) else target.seeds[0]
            faulthandler.dump_traceback_later(12 * SECONDS, exit=True)
            result, said = outcome(target, content, folder, watch)
            counts[name, result] += 1
            if result not in ("read", "refused"):
                file = keep / f"{seed}-{number}-{Path(target.name).name}"
                keep.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
                print(f"case {number} of {name}: {result}, kept as {file}\n{said}", flush=True)
            shutil.rmtree(folder)
        faulthandler.cancel_dump_traceback_later()
    return counts


@contextmanager
def limited() -> Iterator[None]:
    """Within this block a case that takes too long raises Hang, and one that takes too much memory MemoryError."""

    def stop(_: int, __: FrameType | None) -> None:
        raise Hang

    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, old)


def main() -> int:
    """The exit code is 1 where a case failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets whose name holds this")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder for files that failed")
    given = parser.parse_args()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    started = time.perf_counter()
    counts = fuzz(given.cases, given.seed, keep=given.keep, only=given.only)
    outcomes = sorted({result for _, result in counts}, key=lambda name: (name not in ("read", "refused"), name))
    width = max(len(name) for name, _ in counts)
    print(f"{'':{width}}" + "".join(f"{name:>12}" for name in outcomes))
    for name in (*sorted({name for name, _ in counts}), "all"):
        row = (sum(c for (n, r), c in counts.items() if r == result and name in (n, "all")) for result in outcomes)
        print(f"{name:{width}}" + "".join(f"{count:12,}" for count in row))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{given.cases:,} cases in {time.perf_counter() - started:.0f} s, {peak:.1f} GiB of memory at most")
    return int(any(result not in ("read", "refused") for _, result in counts))


if __name__ == "__main__":
    sys.exit(main())
