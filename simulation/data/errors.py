"""The error that every reader of data raises."""

from __future__ import annotations


class DataError(ValueError):
    """A data set is missing, malformed or too small for what was asked of it."""
