"""Errors that several packages raise or act on."""


class ProcessLostError(RuntimeError):
    """A process that this one needs has ended. Neither bad input nor a bug: start again (exit code 71)."""
