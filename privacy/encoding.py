"""How a release's arrays travel: as float32, as bfloat16, or as 8-bit integers with one scale for each array.

Encoding comes after the noise and looks at nothing else, so it costs no privacy (post-processing, Dwork and Roth 2014,
Prop. 2.1). It rounds to the nearest, never at random: the same release is the same bytes. Sizes follow from the
schema alone, so they tell nothing of a device. Not covered: sparse or entropy-coded releases, whose sizes would tell
something; error feedback, which would carry numbers from before the noise into later releases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from florilegium.privacy.release import Array, ReleaseRefusedError, Schema

Coded = npt.NDArray[np.float32 | np.uint16 | np.int8 | np.uint8]
Encoded = Mapping[str, Coded]  # what travels, by name

SCALE_OF = ".scale"  # ends the name of the array that holds the scale of another
LIMIT = 2.0**126  # what is encoded is below it, and what it comes back as is below twice that


@dataclass(frozen=True)
class Encoding:
    """A way to send arrays. `decode(encode(x))` has the names and shapes of x and is float32.

    Both raise `ReleaseRefusedError` for what the other cannot have given; what is left is for the schema to refuse.
    """

    encode: Callable[[Mapping[str, Array]], dict[str, Coded]]
    decode: Callable[[Encoded], dict[str, Array]]
    number_bytes: int
    array_bytes: int = 0  # beside its numbers

    def size_bytes(self, schema: Schema) -> int:
        """Of a release of this schema; names and headers are not counted."""
        return self.number_bytes * schema.width + self.array_bytes * len(schema.shapes)


def encode_fp32(arrays: Mapping[str, Array]) -> dict[str, Coded]:
    """As it is."""
    return {name: _sendable(name, array) for name, array in arrays.items()}


def decode_fp32(encoded: Encoded) -> dict[str, Array]:
    """As it is: what is not float32 or not finite is for the schema to refuse, which has to look anyway."""
    return dict(cast(Mapping[str, Array], encoded))


def encode_bf16(arrays: Mapping[str, Array]) -> dict[str, Coded]:
    """The upper 16 bits of each float32 as uint16, rounded to the nearest, of two to the even one.

    Off by at most 2⁻⁸ of the number, except below float32's smallest normal number, 2⁻¹²⁶.
    """
    return {name: _to_bf16(_sendable(name, array)) for name, array in arrays.items()}


def decode_bf16(encoded: Encoded) -> dict[str, Array]:
    return {name: _sendable(name, _from_bf16(name, array), 2 * LIMIT) for name, array in encoded.items()}


def encode_int8(arrays: Mapping[str, Array]) -> dict[str, Coded]:
    """q = round(x / s) in −127 … 127 with s = max|x| / 127 of the array, next to it as `name.scale` (1,) float32.

    Off by at most s / 2, and by what float32 rounds.
    """
    encoded: dict[str, Coded] = {}
    for name, array in arrays.items():
        if name.endswith(SCALE_OF):
            raise ReleaseRefusedError(f"{name} cannot be sent as int8: {SCALE_OF} ends the names of scales")
        scale = _scale(_sendable(name, array))
        encoded[name] = np.rint(array / (np.float64(scale) or 1.0)).astype(np.int8)
        encoded[name + SCALE_OF] = np.array([scale], dtype=np.float32)
    return encoded


def decode_int8(encoded: Encoded) -> dict[str, Array]:
    numbers = {name: array for name, array in encoded.items() if not name.endswith(SCALE_OF)}
    if set(encoded) != set(numbers) | {name + SCALE_OF for name in numbers}:
        raise ReleaseRefusedError("each int8 array needs its scale, and each scale its array")
    decoded = {}
    for name, array in numbers.items():
        scale = _sendable(name + SCALE_OF, encoded[name + SCALE_OF], LIMIT / 64)
        if not isinstance(array, np.ndarray) or array.dtype != np.int8 or array.min(initial=0) == -128:
            raise ReleaseRefusedError(f"{name} is not an int8 array of numbers from -127 to 127")
        if scale.shape != (1,) or scale[0] < 0:
            raise ReleaseRefusedError(f"the scale of {name} is {scale}, expected one number that is not negative")
        decoded[name] = (array * np.float64(scale[0])).astype(np.float32)
    return decoded


def _sendable(name: str, array: object, below: float = LIMIT) -> Array:
    """The array; raises `ReleaseRefusedError` unless it is float32 and its numbers are `below` a bound."""
    if not isinstance(array, np.ndarray) or array.dtype != np.float32:
        raise ReleaseRefusedError(f"{name} is not a float32 array")
    if not (np.abs(array) < below).all():
        raise ReleaseRefusedError(f"{name} holds a number that is not finite or not below {below:g}")
    return array


def _to_bf16(array: Array) -> npt.NDArray[np.uint16]:
    bits = np.ascontiguousarray(array).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)  # 1 where the upper half is odd: a tie then goes up
    return ((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)


def _from_bf16(name: str, array: object) -> Array:
    if not isinstance(array, np.ndarray) or array.dtype != np.uint16:
        raise ReleaseRefusedError(f"{name} is not bfloat16 as uint16")
    return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _scale(array: Array) -> np.float32:
    """The smallest float32 s with 127 s ≥ max|x|, so that no number is cut off."""
    largest = np.float64(np.abs(array).max(initial=0.0))
    scale = np.float32(largest / 127)
    return scale if np.float64(scale) * 127 >= largest else np.nextafter(scale, np.float32(np.inf))


ENCODINGS: Mapping[str, Encoding] = {
    "fp32": Encoding(encode_fp32, decode_fp32, number_bytes=4),
    "bf16": Encoding(encode_bf16, decode_bf16, number_bytes=2),
    "int8": Encoding(encode_int8, decode_int8, number_bytes=1, array_bytes=4),
}
