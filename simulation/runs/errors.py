"""What goes wrong with a run's folder, for whoever can mend it."""

from __future__ import annotations

from florilegium.privacy.common.errors import UserError


class RunError(UserError):
    """A run's folder exists, is missing, is damaged or does not fit what is asked of it."""
