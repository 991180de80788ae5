"""Adapters in PEFT's own file format, so that their owner can take them to plain `peft`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from client.lm.adapter import AdapterLayout

WEIGHTS, PREFIX = "adapter_model.safetensors", "base_model.model."


class AdapterFormatError(ValueError):
    """A PEFT folder does not fit the layout."""


def write_peft(folder: Path, layout: AdapterLayout, row: torch.Tensor, base_model: str) -> None:
    """Writes one row (P,) as `adapter_config.json` and `adapter_model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, a, b in layout.split(row.reshape(1, -1)):
        tensors[f"{PREFIX}{name}.lora_A.weight"] = (a if a.dim() == 2 else a[0]).cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b[0].cpu().contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    LoraConfig(
        r=layout.rank,
        lora_alpha=layout.alpha,  # type: ignore[arg-type]  # PEFT divides it by the rank, whole or not
        target_modules=[layer.name for layer in layout.layers],
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
    ).save_pretrained(str(folder))


def read_peft(folder: Path, layout: AdapterLayout) -> torch.Tensor:
    """The row (P,) of a PEFT adapter; raises `AdapterFormatError` where rank, scale, layers or frozen A differ."""
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
