"""What the owner of a real device, or a federation's operator, can do something about. The message says what."""

from __future__ import annotations

from florilegium.privacy.common.errors import UserError


class DeviceError(UserError):
    """The root of these errors."""


class HomeError(DeviceError):
    """The folder of a device is not there, not whole, or not one's own; the message names the way out."""


class VaultError(DeviceError):
    """The vault cannot be read or written; the message names the way out."""


class AgentError(DeviceError):
    """What was asked cannot be done; the message says why and what can."""


class RefusedTermsError(DeviceError):
    """Terms that a device does not accept; the message says why."""


class RefusedError(DeviceError):
    """The agent says no to its owner's command; the message is its own."""
