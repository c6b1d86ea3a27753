"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""


class UserError(ValueError):
    """A mistake in what the user gave: a file, a key, a shape, a prompt.

    The message is one line that says what is wrong, where, what was expected and found, and what to do. The command
    line prints it after `sdv: error:` and exits with status 2; library callers catch it as a `ValueError`.
    """
