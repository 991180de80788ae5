"""DP-SGD on one device's row of adapter parameters, by Opacus (Abadi et al. 2016, arXiv 1607.00133).

Each row of a cohort has its own `DPOptimizer`, so that devices are clipped and noised apart. The denominator is
public: the expected, not the actual, number of sampled examples. Accounting is in `privacy.accounting`; the
per-example gradients come from the caller, who must compute each from its own example alone, to the bit. Sums are in
float64: their rounding moves a sum of b examples by less than b² 2⁻⁵² C. Not covered: attacks on the floating-point
numbers of the noise (Mironov 2012).
"""

from __future__ import annotations

import numpy as np
import torch
from opacus.optimizers import DPOptimizer


class KeyedNoise(DPOptimizer):  # type: ignore[misc]
    """Opacus' optimizer with noise from a counter-based generator (Philox) and a key of 128 bits.

    torch's generator on the CPU uses 32 bits of its seed, few enough to try them all and to take the noise off.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, key: int, **settings: float) -> None:
        super().__init__(optimizer, **settings)
        self.draws = np.random.Generator(np.random.Philox(key=key))

    def clip_and_accumulate(self) -> None:
        """Clips and sums as Opacus does, in float64."""
        for p in self.params:
            p.summed_grad = clipped_sum(p.grad_sample, self.max_grad_norm)

    def add_noise(self) -> None:
        """Adds N(0, (σC)²) to each sum of clipped gradients."""
        for p in self.params:
            noise = torch.from_numpy(self.draws.standard_normal(tuple(p.summed_grad.shape)))
            noisy = p.summed_grad + self.noise_multiplier * self.max_grad_norm * noise
            p.grad = noisy.to(p.dtype).view_as(p)


class PrivateRow:
    """One device's parameters during the noisy steps of a round."""

    def __init__(
        self,
        row: torch.Tensor,
        *,
        learning_rate: float,
        clip_norm_l2: float,
        noise_multiplier: float,
        expected_batch: float,
        key: int,
        proximal: float = 0.0,
    ) -> None:
        """`row` is (P,), on the CPU; `expected_batch` is q times the pool's capacity; `key` is secret.

        `proximal` is μ of μ/2 ‖w − row‖² (FedProx, Li et al. 2020, arXiv 1812.06127), which no data enter.
        """
        self.start, self.pull = row.detach().clone(), learning_rate * proximal
        self.parameter = torch.nn.Parameter(row.detach().clone())
        self.optimizer = KeyedNoise(
            torch.optim.SGD([self.parameter], lr=learning_rate),
            noise_multiplier=noise_multiplier,
            max_grad_norm=clip_norm_l2,
            expected_batch_size=expected_batch,  # a mean: it need not be whole
            key=key,
        )

    @property
    def row(self) -> torch.Tensor:
        row: torch.Tensor = self.parameter.detach()
        return row

    def step(self, gradients: torch.Tensor) -> None:
        """Clips each example's gradient (b, P), sums, adds noise, steps. b may be 0: then it is noise alone.

        A gradient with a number that is not finite counts as zero: it must not decide over the others. The proximal
        step depends on what earlier noisy steps have made and on what was received: post-processing, which changes
        neither what is clipped nor the noise, and costs no budget.
        """
        moved = self.row - self.start if self.pull else None
        finite = torch.isfinite(gradients).all(dim=1, keepdim=True)
        self.parameter.grad_sample = torch.where(finite, gradients, 0.0)  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if moved is not None:
            self.parameter.data.sub_(moved, alpha=self.pull)  # η μ (w − w_received), w as before the step


def clipped_sum(gradients: torch.Tensor, clip_norm_l2: float) -> torch.Tensor:
    """Σ g · min(1, C/‖g‖₂) over the rows of (b, P), (P,) in float64: what the noise is added to."""
    wide = gradients.double()
    factors = (clip_norm_l2 / (wide.norm(dim=1) + 1e-6)).clamp(max=1.0)  # (b,); Opacus' 1e-6
    total: torch.Tensor = factors @ wide
    return total


def clipped(rows: torch.Tensor, clip_norm_l2: float) -> torch.Tensor:
    """Each row of (K, P) times min(1, C/‖row‖₂), in the rows' own type."""
    norms = rows.norm(dim=1, keepdim=True)  # (K, 1)
    factors: torch.Tensor = (clip_norm_l2 / norms.clamp(min=1e-12)).clamp(max=1.0)
    return rows * factors
