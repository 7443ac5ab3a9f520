"""The one exception that means "the input is wrong, and here is what to change"."""


class UserError(ValueError):
    """A mistake in a setting, a file or a model that the user can mend.

    The message is one line: the setting, the value found, what is needed, the fix. Front doors print that line and
    exit with status 2; the traceback appears only with ``--debug``.
    """
