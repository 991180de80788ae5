"""What writes a device's replies: PyTorch, or llama.cpp with the device's adapters on top of its base of GGUF.

With llama.cpp, PyTorch's weights are in memory only while something is learned, embedded or released, and as long as it
takes to write the adapters down for llama.cpp; its libraries stay. Whatever changes the adapters, a learning, an
erasure, a step back, a server left, the next reply has them as they are then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256

import torch
from gguf import GGUFReader

from florilegium.client.agent.device import Device, Progress
from florilegium.client.agent.errors import AgentError
from florilegium.client.agent.gguf_export import adapters_on
from florilegium.client.agent.openai_messages import LONGEST_REPLY
from florilegium.client.lm.config import SamplingConfig
from florilegium.client.lm.gguf_adapter import gguf_adapter, placement
from florilegium.client.lm.llamacpp import LlamaCpp
from florilegium.client.lm.places import resolve

ENDS = ("eos", "eot")  # control tokens at which llama.cpp ends a reply, as a file names them


def reply(device: Device, prompt: str, sampling: SamplingConfig, seed: int, told: Progress) -> str:
    """A reply of the model with the adapters that are on, by one that has the device to itself; `told` hears it grow.

    The same seed says other things with llama.cpp than with PyTorch.
    """
    if device.config.generation.backend == "torch":
        return device.lm.reply(prompt, adapters_on(device), sampling, seed, told)
    (asked,) = device.format.prompts([prompt])
    return _serving(device).reply(asked.prompt, sampling, seed, told)


@contextmanager
def settled(device: Device) -> Iterator[None]:
    """What is done in it may change the adapters and take PyTorch's weights; afterwards `settle`."""
    yield
    settle(device)


def settle(device: Device) -> None:
    """Has llama.cpp, where it talks, take the adapters as they are now, and puts PyTorch's weights away.

    Nothing where the device is at work: it is settled afterwards, or at the next look.
    """
    if device.config.generation.backend == "torch" or not device.busy.acquire(blocking=False):
        return
    try:
        _serving(device)
        if device.has_weights:
            device.put_away()
    finally:
        device.busy.release()


def close(device: Device) -> None:
    """Ends llama.cpp, unless it is at work: the process that is ending ends it then."""
    if device.busy.acquire(blocking=False):
        if device.server:
            device.server.close()
        device.server, device.served = None, ""
        device.busy.release()


def _serving(device: Device) -> LlamaCpp:
    """llama.cpp with the adapters that are on now."""
    wanted = _fingerprint(device)
    if device.server is None or device.served != wanted:
        base = resolve(device.config.device.model.name)
        reader = GGUFReader(base)
        adapter, stop = gguf_adapter(adapters_on(device), placement(device.lm.engine, reader)), _stop(device, reader)
        if device.server:
            device.server.close()  # before there is another one: memory is scarce
            device.server, device.served = None, ""
        device.server = LlamaCpp(base, _most_tokens(device), torch.get_num_threads(), adapter, stop)
        device.served = wanted
    return device.server


def _fingerprint(device: Device) -> str:
    """Of the adapters that are on, without the model: two that differ are told apart."""
    shared, version = device.used()
    parts = [device.state().personal.numpy().tobytes(), b"" if shared is None else shared.numpy().tobytes()]
    told = device.membership
    parts += [str(version).encode(), told.model_dump_json().encode() if told else b""]
    return sha256(b"".join(sha256(part).digest() for part in parts)).hexdigest()


def _most_tokens(device: Device) -> int:
    """That a prompt and its reply may have together."""
    (empty,) = device.format.prompts([""])
    return (
        len(empty.prompt) + device.format.limits.prompt_tokens + max(LONGEST_REPLY, device.config.chat.max_new_tokens)
    )


def _stop(device: Device, reader: GGUFReader) -> str:
    """The text before which a reply ends; none where it ends with a control token at which llama.cpp does."""
    form = device.format
    if len(form.stop) > 1 or form.stop[0] not in form.spelling.ids:
        return str(form.tokenizer.decode(list(form.stop)))
    named = [reader.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ENDS]
    if form.stop[0] not in [field.contents() for field in named if field is not None]:
        raise AgentError(
            f"replies of {device.config.device.model.name} end with token {form.stop[0]}, which the file does not name "
            "as an end of text: set generation.backend to 'torch'"
        )
    return ""
