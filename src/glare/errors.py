"""The exceptions that are no fault of the program, and what no message may hold: passwords and access tokens."""

import os
import re

PASSWORD = re.compile(r"(:/{1,2})[^/\s?#]+@")  # and user, of an address; as a path it has one slash
SECRET = re.compile(
    r"\bhf_(?:[A-Za-z0-9]{20,}|(?:oauth|jwt)_[\w.-]{20,})"  # an access token of the Hub
    r"|(?<=[?&])(?i:[\w.-]*(?:token|secret|passw(?:or)?d|signature|(?:api|access)_?key)|sig|key|auth)=[^&\s'\"]+"
)
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
SHORTEST_TOKEN = 8  # letters; a shorter value of the variables would be found in ordinary words
HIDDEN = "***"
LONGEST_LINE = 400  # letters of another program's message that are passed on
LONGEST_VALUE = 120  # letters of a value that a message repeats


class UserError(Exception):
    """Something the user can put right: the message says what was given, what is allowed and what to do.

    The command line prints it in one line, without a traceback, and exits with code 2. Passwords in addresses and
    access tokens that were given are not repeated.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class NotFiniteError(UserError):
    """A loss or a weight that is infinite or not a number, so that a training cannot go on."""


class Stopped(SystemExit):
    """A run that SIGTERM or SIGUSR1 has ended, after it has said so; the process leaves with 128 + the signal."""

    code: int

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)


def redacted(text: str) -> str:
    """``text`` with ``***`` in place of user and password in addresses, of access tokens and of HF_TOKEN's value."""
    for name in TOKEN_VARIABLES:
        value = os.environ.get(name, "").strip()
        if len(value) >= SHORTEST_TOKEN:
            text = text.replace(value, HIDDEN)
    return SECRET.sub(HIDDEN, PASSWORD.sub(rf"\1{HIDDEN}@", text))


def first_line(error: BaseException) -> str:
    """What an error says, without the lines that follow; its type where it says nothing."""
    return shortened((str(error).strip() or type(error).__name__).splitlines()[0], LONGEST_LINE)


def shortened(text: str, limit: int = LONGEST_VALUE) -> str:
    """``text``, of which the middle is left out where it is longer than ``limit``."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}"
