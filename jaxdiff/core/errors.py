"""Errors that several packages raise or act on."""


class ProcessLostError(RuntimeError):
    """A process that this one needs is gone: no bad input and no bug, and worth starting again (exit code 71)."""
