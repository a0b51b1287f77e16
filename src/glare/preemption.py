"""Signals that end a training: the step is finished, a checkpoint written, the exit code is 128 + the signal.

Schedulers send SIGTERM or SIGUSR1 before they kill, Ctrl-C is SIGINT. Outside the loop a run ends at once, since
nothing is lost; in it, after the step, on all processes the same one. A second signal ends it at once, or, within one
long operation, when that returns to Python; equal signals that come within it are one.
"""

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import torch
from accelerate import Accelerator
from tqdm import tqdm

from glare import checkpoints
from glare.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_SECONDS = 2.0
"""Within them a further signal is the first one again: launchers pass on what the scheduler has sent to all."""

P = ParamSpec("P")
R = TypeVar("R")


class Signals:
    """While open, takes the signals that end a run; afterwards they do what they did before.

    In other threads than the main one, where Python takes no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.received = 0
        self._when = -SAME_SECONDS
        self._held = False
        self._agreed = False
        self._run: Path | None = None
        self._bar: tqdm[Any] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                # None: set by other than Python, and cannot be put back
                if before not in (signal.SIG_IGN, None):
                    self._before[number] = before
                    signal.signal(number, self._take)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()  # what is said next begins a line
        for number, before in self._before.items():
            signal.signal(number, before)

    def hold(self, run: Path, bar: "tqdm[Any]") -> None:
        """The loop begins: from now on a signal is noted, and ``asked`` tells of it. ``bar`` counts the run's steps."""
        self._held, self._run, self._bar = True, run, bar

    def asked(self, accelerator: Accelerator) -> bool:
        """Whether to stop after this step: the same answer on all processes, of which one alone may have a signal."""
        number = self.received
        if accelerator.num_processes > 1:
            number = int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())
        self._agreed = number != 0
        if self._agreed and not self.received:
            self.received, self._when = number, time.monotonic()  # as if it had come here
        return self._agreed

    def release(self, accelerator: Accelerator) -> None:
        """The loop is over and its checkpoint written: end the run if it was asked for, from now on at once."""
        self._held = False
        if self.received:
            if self._agreed:
                accelerator.wait_for_everyone()  # a launcher kills the others as soon as one has left
            accelerator.end_training()
            self._end(self.received)

    def _take(self, number: int, _: FrameType | None) -> None:
        """The handler, which Python calls between two of its instructions."""
        first = self.received == 0
        if not first and time.monotonic() - self._when < SAME_SECONDS:
            return
        self.received, self._when = number, time.monotonic()
        if not (self._held and first):
            self._end(number)
        if number == signal.SIGINT:
            # print may be what was interrupted
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

    def _end(self, number: int) -> NoReturn:
        """Say so and leave the job: with KeyboardInterrupt after Ctrl-C, otherwise with Stopped."""
        message = f"stopped by {_name(number)} {self._progress()}"
        before = self._before.get(number)
        self.__exit__()
        if number == signal.SIGINT:
            raise KeyboardInterrupt(message)
        if os.environ.get("RANK", "0") == "0":
            print(message, file=sys.stderr, flush=True)
        if callable(before):
            before(number, None)  # of a plug-in that hands the job back to the scheduler
        raise Stopped(number)

    def _progress(self) -> str:
        """What was done, and how to go on."""
        if self._run is None or self._bar is None:
            return "before any step; nothing is lost, give the command again with --resume"
        found = checkpoints.folders(self._run)
        if not found:
            return f"in {self._run}, before its first checkpoint; --resume begins at the first step"
        step = checkpoints.step_of(found[0])
        return f"with step {step} of {self._bar.total} done; the checkpoint is {found[0]}; go on with --resume"


def stoppable(job: Callable[Concatenate[Signals, P], R]) -> Callable[P, R]:
    """Open ``Signals`` around a job, which gets them as its first argument; callers do not give it."""

    @functools.wraps(job)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with Signals() as signals:
            return job(signals, *args, **kwargs)

    return run


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
