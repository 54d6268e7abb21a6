"""What a command raises to end with one line and exit code 1."""


class CommandError(Exception):
    """The message says what could not be done, why, and what would help."""
