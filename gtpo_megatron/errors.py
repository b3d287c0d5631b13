"""How a program ends: the exit codes of a training run, and the one exception that means "the user can mend this"."""

COMPLETE = 0  # all steps are done
FAILED = 1  # a fault of the program or the machine
MISTAKE = 2  # a UserError
STOPPED = 3  # a signal ended the run early; the same command goes on with it
STUCK = 4  # nothing went on: a rank waited for others in vain


class UserError(Exception):
    """Bad input: a configuration key, a data row, a checkpoint, a server's answer.

    The message names the file, line or key, the value met, the rule that it breaks, and what to do. The command line
    prints it without a traceback.
    """
