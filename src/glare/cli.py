"""The command ``glare <job> ...``: finds the job and turns a user's mistake into one line."""

import importlib
import io
import sys
from collections.abc import Callable, Sequence
from typing import cast

from glare.errors import Stopped, UserError, redacted
from glare.spelling import nearest
from glare.versions import version_of

JOBS = {
    "demo": ("glare.demo:main", "adapt, fine-tune and compare on the built-in scenes, without a network"),
    "pretrain": ("glare.pretrain:main", "adapt a self-supervised ViT to unlabelled images"),
    "classify": ("glare.classify:main", "train a ViT to tell classes of images apart, before fine-tuning"),
    "finetune": ("glare.finetune:main", "train a segmentation head on labelled images"),
    "evaluate": ("glare.evaluate:main", "measure a segmentation model on labelled images"),
    "compare": ("glare.compare:main", "did it help: adapted models against the untouched one and random adapters"),
    "inspect": ("glare.inspect:main", "see what a pre-training would see, and check the data"),
    "convert": ("glare.convert:main", "make a checkpoint of DINO, iBOT, UDI, FLSL, DINOv2 or timm a --backbone"),
    "predict": ("glare.inference:main", "segment images of any size"),
    "bench": ("glare.bench:main", "images a second on this machine, beside the way of research code"),
    "export": ("glare.export:main", "an adapted ViT as a plain checkpoint of transformers"),
    "push": ("glare.hub:main", "publish a model or adapter on the Hub, with its card"),
}
"""Job -> its entry point, called with the arguments after the job, and what it does."""

USER_ERROR, FAILURE, INTERRUPTED = 2, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a job; the exit code is 0, 1 for a failing machine, 2 for a user's mistake or a full disk in a training.

    A job that a signal has ended leaves with 128 + the signal: 130 for Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1.
    """
    job, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    if job in ("-h", "--help"):
        print(_help())
        return 0
    if job == "--version":
        print(f"glare {version_of('glare-ssl')}")
        return 0
    if job not in JOBS:
        return _complain("glare", f"{_unknown(job)}; `glare --help` lists the jobs")
    return _run(job, rest)


def _run(job: str, argv: Sequence[str]) -> int:
    prog = f"glare {job}"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        _entry_point(job)(argv)
    except UserError as error:
        return _complain(prog, str(error))
    except Stopped as stopped:
        return stopped.code
    except KeyboardInterrupt as interrupt:
        return _complain(prog, str(interrupt) or "stopped by Ctrl-C", code=INTERRUPTED)
    except OSError as error:
        return _complain(prog, _sentence(error), code=FAILURE)
    return 0


def _entry_point(job: str) -> Callable[[Sequence[str]], None]:
    """The job's function; only here torch is imported for it."""
    module, _, name = JOBS[job][0].partition(":")
    logging = importlib.import_module("transformers.utils.logging")
    logging.disable_progress_bar()  # jobs have bars of their own, reading weights takes no time
    return cast(Callable[[Sequence[str]], None], getattr(importlib.import_module(module), name))


def _complain(prog: str, message: str, *, code: int = USER_ERROR) -> int:
    """Print one line on stderr; a message that came in several is joined."""
    print(f"{prog}: error: {redacted(' '.join(message.split()))}", file=sys.stderr)
    return code


def _sentence(error: OSError) -> str:
    """What the system says, after the file it is about."""
    if error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


def _unknown(job: str) -> str:
    if not job:
        return "no job was given"
    if job.startswith("-"):
        return f"the option {job} comes after a job"
    return f"there is no job {job!r}; the nearest is {nearest(job, list(JOBS))!r}"


def _help() -> str:
    width = max(map(len, JOBS))
    lines = [f"  {job:{width}}  {text}" for job, (_, text) in JOBS.items()]
    return "\n".join(
        [
            "usage: glare JOB [options] [KEY=VALUE ...]",
            "",
            "Adapt self-supervised ViTs to unlabelled images of a new domain, and segment with them.",
            "",
            "jobs, each with its own --help:",
            *lines,
            "",
            "--version prints the version, --help this text.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
