"""The one exception that means "the user can mend this": the command line prints its text without a traceback."""


class UserError(Exception):
    """Bad input: a configuration key, a data row, a checkpoint, a server's answer.

    The message names the file, line or key, the value met, the rule that it breaks, and what to do.
    """
