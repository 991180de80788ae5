"""The error that every reader of data raises."""

from __future__ import annotations

from florilegium.privacy.common.errors import UserError


class DataError(UserError):
    """A data set is missing, malformed or too small for what was asked of it."""
