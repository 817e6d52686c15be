"""The one exception that is a message to the user."""


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message names the thing, its value and what would be accepted. The command line prints it as one line
    and exits with code 2; everything else is a defect of ours and keeps its traceback.
    """
