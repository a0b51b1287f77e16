"""The exceptions that are no fault of the program: a user's mistake, and a signal that ends a run."""


class UserError(Exception):
    """Something the user can put right: the message says what was given, what is allowed and what to do.

    The command line prints it in one line, without a traceback, and exits with code 2.
    """


class Stopped(SystemExit):
    """A run that SIGTERM or SIGUSR1 has ended, after it has said so; the process leaves with 128 + the signal."""

    code: int

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)


def first_line(error: Exception) -> str:
    """What an error says, without the lines that follow; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
