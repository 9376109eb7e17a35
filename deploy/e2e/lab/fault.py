"""Faults that end a run."""


class Fault(Exception):
    """Something of the lab does not work. The text names what, and where its log is."""


class Missing(Exception):
    """A part that this machine does not have. The run is skipped. The text names the remedy."""
