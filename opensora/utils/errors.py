"""The one exception a user is meant to read."""


class UserError(ValueError):
    """A mistake in what the user gave us: a key, a file, a layout.

    The message is one line: the dotted key or the file, the value found, what is allowed, what to do.
    Command-line entry points print it without a traceback and exit with code 2.
    """
