"""What a user can cause and mend: such errors end a command with one line, never with a traceback."""


class UserError(ValueError):
    """A mistake in input, configuration or files; the message says what was found and what to change."""
