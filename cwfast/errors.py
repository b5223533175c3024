"""What can go wrong, by kind; wrong types and values are Python's own TypeError and ValueError."""


class CwfastError(Exception):
    """Base of the errors below."""


class BackendUnavailable(CwfastError, RuntimeError):
    """The backend that was named cannot run here; the message says why. Nothing else was tried in its place."""


class UnsupportedLayer(CwfastError, NotImplementedError):
    """A parameter is used in a way that no layer rule scores; the message names the parameter and the call."""


class CheckpointError(CwfastError, ValueError):
    """A file is broken, or belongs to another model; the message names the file and what it must hold."""
