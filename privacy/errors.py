"""What Florilegium raises on purpose, as one tree; anything else that is raised is a fault of its own.

FlorilegiumError
├── UserError               settings, files, models, machines: whoever runs it can mend that; told in one line
│   ├── ConfigError         a config file or an override (`simulation.config`)
│   ├── DataError           a data set (`simulation.data.errors`)
│   ├── ModelError          where a model comes from (`client.lm.hub`)
│   ├── UnsupportedModelError, AdapterFormatError   what adapters can be put on, what PEFT reads (`client.lm`)
│   ├── LexiconError, ProfileError                  word lists, profiles (`client`)
│   ├── BudgetError         a promise that no noise keeps (`privacy.accounting`)
│   ├── StepTooLargeError   of a server's optimizer (`server.optimizers`)
│   ├── RunError, ReportError, AbsentError          a run's folder, its events, a benchmark's arm (`simulation`)
│   ├── ClusterError, LostProcessError              Ray, Flower's own simulation (`simulation`)
│   ├── NoReleaseError      a round without a single release (`server.strategy`)
│   └── DeviceError         a real device's home, vault, agent (`client.agent`)
├── DeviceFaultError        what the data or the disk of one device can cause
│   ├── StateError, StoreError                      its state, and where that is kept (`client.state`)
│   ├── TrainingFailedError                         a loss that is no number (`client.personal.method`)
│   └── LedgerError         its budget's book (`privacy.ledger`)
├── ReleaseRefusedError     what may not leave a device (`privacy.release`)
└── TooFewReleasesError     what a rule cannot aggregate (`server.rules`)
"""

from __future__ import annotations


class FlorilegiumError(Exception):
    """The root of the tree."""


class UserError(FlorilegiumError):
    """A mistake, or a lack, that whoever runs the program can mend; the message says how."""


class DeviceFaultError(FlorilegiumError):
    """What the data or the disk of one device can cause: of many devices, it may be counted instead of ending a run."""
