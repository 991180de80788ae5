"""Ditto: each device's own model, kept near the shared one (Li et al. 2021, arXiv 2012.04221).

    min over v_k of F_k(v_k) + λ/2 ‖v_k − w*‖²,   w* the federation's shared model

solved as in the paper's algorithm: in each round a device trains its copy of w for the server and its own v_k for
itself, with w as it was received in the place of w*. v_k is a model of its own: nothing is beneath it but the base.
Here both are adapters, and AdamW takes the place of SGD, which rescales the pull with the gradient that it is part of.

What is sent is a change of w, trained without v_k: it can be protected as our shared adapter is.
"""

from __future__ import annotations

import torch

from florilegium.simulation.baselines.context import BaselineContext, Held, Lessons, halves
from florilegium.simulation.baselines.fedavg import fedavg


def ditto(held: Held, sets: Lessons, context: BaselineContext) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of the steps on the shared model, half on the own one; `held.own` are v (K, P)."""
    to_share, to_keep = halves(sets)
    pull = context.config.baseline.ditto_lambda
    own = context.train(context.layout, held.own, to_keep, proximal=pull, anchor=held.shared)
    return own, fedavg(held, to_share, context)[1]
