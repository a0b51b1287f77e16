"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """Something the user can put right: the message says what was given, what is allowed and what to do.

    The command line prints it in one line, without a traceback, and exits with code 2.
    """
