"""Figures that Qin et al. (DAC 2024, arXiv 2311.12275) printed, to stand beside ours: ROUGE-1 with "Llama-3B".

`policy` is Table 4 and, for the baselines, the ends of the curves in Figure 2, read off the picture (± 0.002);
`synthesis` is Figure 3, on MedDialog. Our `medical_dialog` is a substitute for MedDialog, `diasafety` stands where
Prosocial did, `alpaca` is a sample and `openorca` a probe: the sets are not the same.
"""

from __future__ import annotations

from typing import Any

_POLICIES = ("eoe", "dss", "idd", "quality", "random", "fifo", "kcenter")
_POLICY = {
    "alpaca": (0.2821, 0.2726, 0.2950, 0.3736, 0.265, 0.233, 0.270),
    "dolly": (0.2782, 0.2633, 0.2247, 0.3465, 0.241, 0.221, 0.246),
    "diasafety": (0.2617, 0.2441, 0.2324, 0.3062, 0.237, 0.205, 0.202),
    "empathetic": (0.2661, 0.2726, 0.2707, 0.3260, 0.235, 0.226, 0.214),
    "openorca": (0.2468, 0.2362, 0.2468, 0.2813, 0.239, 0.229, 0.204),
    "medical_dialog": (0.2608, 0.2726, 0.2931, 0.3429, 0.247, 0.241, 0.217),
}
_SYNTHESIS = dict(enumerate((0.241, 0.281, 0.293, 0.314, 0.322, 0.344, 0.344, 0.345, 0.344), start=1))


def _by_policy(config: Any) -> float | None:
    figures = dict(zip(_POLICIES, _POLICY.get(config.data.name, ()), strict=False))
    return figures.get(config.selection.policy)


def _by_synthesis(config: Any) -> float | None:
    return _SYNTHESIS.get(config.synthesis.per_dialogue) if config.data.name == "medical_dialog" else None


PUBLISHED = {"policy": _by_policy, "synthesis": _by_synthesis}
