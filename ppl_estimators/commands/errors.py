"""What a command raises to end with one line and an exit code."""


class CommandError(Exception):
    """The message says what could not be done, why, and what would help.

    ``code``: 1, or 2 where the command line is at fault.
    """

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code
