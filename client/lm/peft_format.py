"""Adapters in PEFT's own file format, so that their owner can take them to plain `peft`.

Adapters of several kinds cannot be active together there: the shared one is merged into the base, and the personal
one, of whatever kind, put on top of that. README has the lines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PromptTuningConfig
from safetensors.torch import load_file, save

from florilegium.client.lm.adapter import AdapterLayout, Layout, weight_layout
from florilegium.client.lm.ia3 import ScalingLayout
from florilegium.client.lm.places import Base
from florilegium.client.lm.soft_prompt import PromptLayout
from florilegium.privacy.common.errors import UserError

WEIGHTS, PREFIX = "adapter_model.safetensors", "base_model.model."
Tensors = dict[str, torch.Tensor]


class AdapterFormatError(UserError):
    """A PEFT folder does not fit the layout."""


def write_peft(folder: str | Path, layout: Layout, row: torch.Tensor, base: Base | str) -> None:
    """Writes one row (P,) as a folder that `PeftModel.from_pretrained` reads, for the base of that name or path.

    Raises `AdapterFormatError` for an adapter that PEFT does not know, such as a gated one.
    """
    write_files(Path(folder), peft_files(layout, row, Base(base) if isinstance(base, str) else base))


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files by their path in a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def shared_files(layout: AdapterLayout, row: torch.Tensor, base: Base) -> dict[str, bytes]:
    """Of what a server sends (P,) `shared/…`, and `weights/…` where changes of whole weights are behind it."""
    own, behind = row[: layout.width], row[layout.width :]
    found = {f"shared/{name}": content for name, content in peft_files(layout, own, base).items()}
    if len(behind):
        more = peft_files(weight_layout(layout), behind, base)
        found |= {f"weights/{name}": content for name, content in more.items()}
    return found


def peft_files(layout: Layout, row: torch.Tensor, base: Base) -> dict[str, bytes]:
    """One row (P,) as `adapter_config.json` and `adapter_model.safetensors`.

    Raises `AdapterFormatError` for an adapter that PEFT does not know, such as a gated one.
    """
    tensors, config = _described(layout, row.detach().cpu().reshape(1, -1))
    config.task_type, config.inference_mode = "CAUSAL_LM", True
    config.base_model_name_or_path, config.revision = base.name, base.revision
    told = {name: sorted(x) if isinstance(x, set) else x for name, x in config.to_dict().items()}
    weights = save({name: t.contiguous() for name, t in tensors.items()}, metadata={"format": "pt"})
    return {"adapter_config.json": json.dumps(told, indent=2, sort_keys=True).encode(), WEIGHTS: weights}


def _described(layout: Layout, row: torch.Tensor) -> tuple[Tensors, PeftConfig]:
    """The tensors of a row (1, P) by PEFT's names, and what they are."""
    tensors: Tensors = {}
    if isinstance(layout, AdapterLayout) and not layout.gated:
        for name, a, b in layout.split(row):
            tensors[f"{PREFIX}{name}.lora_A.weight"] = (a if a.dim() == 2 else a[0]).cpu()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = (b if b.dim() == 2 else b[0]).cpu()
        names = [layer.name for layer in layout.layers]
        alpha: Any = layout.alpha  # which PEFT divides by r, whole or not
        return tensors, LoraConfig(r=layout.rank, lora_alpha=alpha, target_modules=names)
    if isinstance(layout, ScalingLayout):
        for layer, vector in layout.split(row):
            tensors[f"{PREFIX}{layer.name}.ia3_l"] = vector.reshape((1, -1) if layer.on_input else (-1, 1))
        names = [layer.name for layer in layout.layers]
        inputs = [layer.name for layer in layout.layers if layer.on_input]
        return tensors, IA3Config(target_modules=names, feedforward_modules=inputs)
    if isinstance(layout, PromptLayout):
        tensors["prompt_embeddings"] = row.view(layout.tokens, layout.hidden)
        return tensors, PromptTuningConfig(num_virtual_tokens=layout.tokens, token_dim=layout.hidden)
    raise AdapterFormatError("PEFT's format has no place for an adapter's gates")


def read_peft(folder: str | Path, layout: AdapterLayout) -> torch.Tensor:
    """The row (P,) of PEFT's LoRA; raises `AdapterFormatError` where rank, scale, layers or frozen A differ."""
    folder = Path(folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if config["r"] != layout.rank or config["lora_alpha"] != layout.alpha:
        raise AdapterFormatError(
            f"{folder}: rank {config['r']} and alpha {config['lora_alpha']}, expected {layout.rank} and {layout.alpha}"
        )
    tensors = load_file(folder / WEIGHTS)
    row = torch.zeros(layout.width)
    for name, a, b in layout.split(row[None]):
        try:
            stored_a, stored_b = (tensors.pop(f"{PREFIX}{name}.lora_{x}.weight").float() for x in "AB")
        except KeyError as missing:
            raise AdapterFormatError(f"{folder} has no tensor {missing}") from None
        if a.dim() == 2 and not torch.equal(a.cpu(), stored_a):
            raise AdapterFormatError(f"{folder}: the frozen A of {name} is another one")
        b[0].copy_(stored_b)
        if a.dim() == 3:
            a[0].copy_(stored_a)
    if tensors:
        raise AdapterFormatError(f"{folder} adapts layers that the layout does not have: {sorted(tensors)[:2]}")
    return row
