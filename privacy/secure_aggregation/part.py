"""`SumPart`: what a device gives to a sum. It leaves behind masks alone (`session.Session.masked`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from florilegium.privacy.release import Release


@dataclass(frozen=True)
class SumPart:
    """A device's change with its share of the noise, in whole units (`rounded_noise.SumCode`).

    The noise protects in a sum: alone, a part has that of one device in so many.
    """

    version: int  # of the shared adapter that it is a change of
    head: str  # of the ledger that has paid for it
    numbers: npt.NDArray[np.int64]  # (P,)


Sendable = Release | SumPart
