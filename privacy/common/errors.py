"""What Florilegium raises on purpose, as one tree; anything else that is raised is a fault of its own.

FlorilegiumError
├── UserError             settings, files, models, machines: whoever runs it can mend that; told in one line
│   ├── ConfigError, DataError, RunError, ReportError, TooManyFailedError, ElsewhereError, AbsentError  in `simulation`
│   ├── ClusterError, LostProcessError              Ray, and Flower's own simulation, in `simulation`
│   ├── ModelError, UnsupportedModelError, AdapterFormatError, LexiconError, ProfileError, NoRoomError  in `client`
│   ├── DeviceError       HomeError, VaultError, AgentError, RefusedError, RefusedTermsError, RequestError, in
│   │                     `client.agent`
│   ├── BudgetError       a promise that no noise keeps, in `privacy.accounting`
│   ├── TooFewBitsError   a sum that would not fit, in `privacy.secure_aggregation`
│   ├── ExtensionError    a module of the user's own, in `privacy.common.registry`
│   └── NoReleaseError, StepTooLargeError           a round that comes to nothing, or to too much, in `server`
├── DeviceFaultError      what the data or the disk of one device can cause
│   └── StateError, StoreError, LedgerError, TrainingFailedError
├── BrokenDeviceError     a simulated device that raised anything else
├── ReleaseRefusedError   what may not leave a device, in `privacy.release`
├── RoundRefusedError     a round that a device takes no part in, or that has no sum, in `privacy.secure_aggregation`
└── BadReleaseError, TooFewReleasesError            what a server's rule cannot aggregate, in `server`
"""

from __future__ import annotations


class FlorilegiumError(Exception):
    """The root of the tree."""


class UserError(FlorilegiumError):
    """A mistake, or a lack, that whoever runs the program can mend; the message says how."""


class DeviceFaultError(FlorilegiumError):
    """What the data or the disk of one device can cause: of many devices, it may be counted instead of ending a run."""


class BrokenDeviceError(FlorilegiumError):
    """A simulated device raised what is no fault of its data or disk; `traced` is the traceback, maybe a worker's."""

    def __init__(self, device: str, error: str, alike: str, traced: str) -> None:
        super().__init__(device, error, alike, traced)  # as pickle makes it again
        self.device, self.error, self.alike, self.traced = device, error, alike, traced

    def __str__(self) -> str:
        return f"{self.device}: {self.error}; {self.alike}"


def first_line(error: Exception) -> str:
    """What a library said, without the pages that may follow."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
