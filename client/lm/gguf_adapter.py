"""Adapters as GGUF LoRA files, which llama.cpp puts on a base of its own format.

As llama.cpp's `convert_lora_to_gguf.py` writes them: `NAME.lora_a` (r, in) and `NAME.lora_b` (out, r) in float32, and
`adapter.lora.alpha`, which llama.cpp divides by the rank of each pair. It adds up what several files say, but one that
holds all of it is simpler: factors of several adapters of one layer lie behind each other, with their scales in B.

Trap: where llama.cpp rotates queries and keys in pairs of neighbours, a file's rows of them have another order than
transformers', and so have those of B. In which order they are is looked up in the file, not known by heart. Not
covered: adapters other than LoRA, which llama.cpp does not know.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGUFReader, GGUFWriter, get_tensor_name_map
from gguf.constants import Keys
from gguf.gguf_writer import WriterState
from gguf.quants import dequantize

from florilegium.client.lm.adapter import AdaptedLayer, AdapterLayout, Adapters
from florilegium.client.lm.peft_format import AdapterFormatError

if TYPE_CHECKING:
    from florilegium.client.lm.engine import Engine

ALIKE = 0.2  # of the norm of a layer's weights: more than its numbers of bits may lose, less than another order does
ONLY_LORA = "llama.cpp knows LoRA adapters alone: set kind to 'lora', or export without --gguf"
LLAMA = "llama"  # the architecture whose files are in llama.cpp's own order; also Mistral's and SmolLM2's


@dataclass(frozen=True)
class Placement:
    """Where a base's GGUF file has the layers that adapters change."""

    architecture: str
    names: Mapping[str, str]  # a layer's in transformers → its tensor's in the file, without `.weight`
    heads: Mapping[str, int]  # of layers whose rows are in llama.cpp's order: of how many heads they are

    def ordered(self, layer: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows (out, …) of a layer in the order of the file."""
        return rotated(rows, self.heads[layer]) if layer in self.heads else rows


def rotated(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (out, …) of `heads` heads, from halves that are rotated with each other to neighbours that are."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


# -- where a file has what ------------------------------------------------------------------------------------------


def placement(engine: Engine, reader: GGUFReader | None = None) -> Placement:
    """Of the engine's layers in the file that its base is from; without one, in that which `gguf_base` makes of it.

    Raises `AdapterFormatError` where a file has a layer under no known name or in no known order, and for a base of an
    architecture that `gguf_base` does not write.
    """
    config = engine.model.config
    architecture = reader.fields["general.architecture"].contents() if reader else config.model_type
    if reader is None and architecture != LLAMA:
        raise AdapterFormatError(
            f"a base of the type {architecture!r} that is no GGUF file has no known order of rows in one; set "
            "model.name to its .gguf file (florilegium device rebase), or export without --gguf"
        )
    names = _names(engine, architecture, config.num_hidden_layers)
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    may = {n: queries if "attn_q" in to else keys for n, to in names.items() if to.endswith(("attn_q", "attn_k"))}
    if reader is None:
        return Placement(architecture, names, may)
    return Placement(architecture, names, _found_in(reader, engine, names, may))


def _names(engine: Engine, architecture: str, layers: int) -> dict[str, str]:
    known = get_tensor_name_map({name: arch for arch, name in MODEL_ARCH_NAMES.items()}[architecture], layers)
    found = {name: known.get_name(name) for name in engine.modules}
    if lost := [name for name, to in found.items() if not to]:
        raise AdapterFormatError(f"GGUF has no name for the layer {lost[0]} of the architecture {architecture!r}")
    return {name: str(to) for name, to in found.items()}


def _found_in(reader: GGUFReader, engine: Engine, names: Mapping[str, str], may: Mapping[str, int]) -> dict[str, int]:
    """The layers whose rows the file has in llama.cpp's order: one of each kind is compared with the model's."""
    tensors = {t.name: t for t in reader.tensors}
    if lost := [name for name, to in names.items() if f"{to}.weight" not in tensors]:
        raise AdapterFormatError(f"the base's GGUF file has no tensor {names[lost[0]]}.weight for the layer {lost[0]}")
    orders: dict[str, bool] = {}
    for name, to in names.items():
        kind = to.rpartition(".")[2]
        if kind not in orders:
            stored = tensors[f"{to}.weight"]
            theirs = torch.from_numpy(dequantize(stored.data, stored.tensor_type).astype(np.float32))
            orders[kind] = _is_rotated(name, engine.modules[name].base.weight.float().cpu(), theirs, may.get(name, 0))
    return {name: heads for name, heads in may.items() if orders[names[name].rpartition(".")[2]]}


def _is_rotated(name: str, ours: torch.Tensor, theirs: torch.Tensor, heads: int) -> bool:
    """Whether a file's rows are those of the model in llama.cpp's order, and not as they are."""
    orders = {False: ours, **({True: rotated(ours, heads)} if heads else {})}
    apart = {r: float((x - theirs).norm() / x.norm()) if x.shape == theirs.shape else 1.0 for r, x in orders.items()}
    nearest = min(apart, key=apart.__getitem__)
    if apart[nearest] > ALIKE:
        raise AdapterFormatError(
            f"the base's GGUF file has the weights of {name} in an order that is not known here "
            f"(they differ by {apart[nearest]:.0%}): no adapter can be written for it"
        )
    return nearest


# -- writing ----------------------------------------------------------------------------------------------------------


def gguf_adapter(adapters: Sequence[Adapters], place: Placement) -> bytes:
    """Adapters of one row each, which are on together, as one GGUF file.

    Raises `AdapterFormatError` for what is not LoRA: (IA)³, soft prompts, gates.
    """
    pairs: dict[AdaptedLayer, list[tuple[torch.Tensor, torch.Tensor, float]]] = {}
    for one in adapters:
        layout = lora_alone(one)
        for layer, (_, a, b) in zip(layout.layers, layout.split(one.rows[:1].float().cpu()), strict=True):
            down, up = a.reshape(layout.rank, layer.in_features), b.reshape(layer.out_features, layout.rank)
            pairs.setdefault(layer, []).append((down.cpu(), up.cpu(), layout.scale))
    alone = len(adapters) == 1
    alpha = lora_alone(adapters[0]).alpha if alone else 1.0
    writer = GGUFWriter(None, place.architecture)
    writer.add_type("adapter")
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    tensors: dict[str, np.ndarray] = {}
    for layer, factors in pairs.items():
        rank = sum(len(a) for a, _, _ in factors)
        scaled = [b if alone else b * (scale * rank / alpha) for _, b, scale in factors]  # llama.cpp: alpha / rank
        a, b = torch.cat([a for a, _, _ in factors]), place.ordered(layer.name, torch.cat(scaled, dim=1))
        tensors |= {
            f"{place.names[layer.name]}.weight.lora_{x}": t.contiguous().numpy() for x, t in (("a", a), ("b", b))
        }
    return _packed(writer, tensors)


def lora_alone(adapter: Adapters) -> AdapterLayout:
    """The layout of an adapter that llama.cpp can have; raises `AdapterFormatError` for another one."""
    layout = adapter.layout
    if not isinstance(layout, AdapterLayout):
        raise AdapterFormatError(f"this adapter is a {type(layout).__name__}: {ONLY_LORA}")
    if layout.gated:
        raise AdapterFormatError(f"this adapter has gates, which follow each token: {ONLY_LORA}")
    return layout


def _packed(writer: GGUFWriter, tensors: Mapping[str, np.ndarray]) -> bytes:
    """The file in memory: an adapter of its owner's does not lie on a disk unless they want it to."""
    for name, tensor in tensors.items():
        writer.add_tensor_info(name, tensor.shape, tensor.dtype, tensor.nbytes)
    file = io.BytesIO()
    writer.fout, writer.state = [file], WriterState.EMPTY  # type: ignore[list-item]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(file, file.tell())
    for tensor in tensors.values():
        file.write(tensor.tobytes())
        writer.write_padding(file, tensor.nbytes)
    return file.getvalue()
