"""The base of every error that stops a ``farebox`` command."""


class ClusterError(Exception):
    """A farebox cannot be checked, started, changed or asked. The message says why and what to do."""
