"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """Something the user can put right: the message says what was given, what is allowed and what to do.

    The command line prints it in one line, without a traceback, and exits with code 2.
    """


def first_line(error: Exception) -> str:
    """What an error says, without the lines that follow; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
