"""A model in one GGUF file: weights, in whatever numbers of bits, tokenizer and chat template.

transformers makes floats of it. What it would leave out without a word is counted here. Not covered: models in several
files, files of the hub, writing GGUF (`gguf_base`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from gguf import GGUFReader
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from florilegium.client.lm.places import ModelError
from florilegium.privacy.common.errors import first_line

log = logging.getLogger(__name__)
FREQUENCIES = ("rope_freqs.", "rope_factors_long.", "rope_factors_short.")  # tensors of these are no weights
CONTROL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
NO_ARCHITECTURES = {"general", "tokenizer"}  # of the names that transformers lists


@contextmanager
def alone(path: Path) -> Iterator[dict[str, str]]:
    """What transformers is told to load, in a folder with nothing beside it that it could read in the file's place."""
    with TemporaryDirectory(prefix="florilegium-") as folder:
        (Path(folder) / path.name).symlink_to(path.absolute())
        yield {"pretrained_model_name_or_path": folder, "gguf_file": path.name}


def read(path: Path, name: str) -> GGUFReader:
    """The file laid open, not read into memory; raises `ModelError` where it is torn, a part, or of no known kind."""
    try:
        reader = GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
        parts = reader.fields["split.count"].contents() if "split.count" in reader.fields else 1
    except Exception as error:  # a torn file ends in whatever its last bytes are taken for
        raise ModelError(
            f"model {name!r}: {path} is no whole GGUF file ({first_line(error)}); fetch it again"
        ) from error
    if parts > 1:
        raise ModelError(f"model {name!r}: {path} is one of {parts} parts; join them with llama-gguf-split --merge")
    known = sorted({*GGUF_SUPPORTED_ARCHITECTURES} - NO_ARCHITECTURES)
    if architecture not in known:
        raise ModelError(
            f"model {name!r}: {path} is of the architecture {architecture!r}, which transformers does not read from "
            f"GGUF (it reads {', '.join(known)}); take the model's folder of safetensors"
        )
    return reader


def with_its_tokens(tokenizer: PreTrainedTokenizerBase, reader: GGUFReader) -> PreTrainedTokenizerBase:
    """The same with the control tokens that the file names, and none behind the file's own.

    transformers adds GPT-2's `<|endoftext|>` to each byte-level vocabulary, which may have no row for it; its version
    5.8 takes the first control token for the end of text.
    """
    state, tokens = json.loads(tokenizer.backend_tokenizer.to_str()), reader.fields["tokenizer.ggml.tokens"].contents()
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < len(tokens)]
    ids = {name: reader.fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in CONTROL.items()}
    named = {name: tokens[found.contents()] for name, found in ids.items() if found is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), chat_template=tokenizer.chat_template, **named
    )


def check_all_taken(reader: GGUFReader, model: PreTrainedModel, name: str) -> None:
    """Raises `ModelError` where transformers has left weights of the file out, as it does where it expects none."""
    held = sum(int(t.n_elements) for t in reader.tensors if not t.name.startswith(FREQUENCIES))
    taken = sum(p.numel() for p in model.parameters())
    if held != taken:
        raise ModelError(
            f"model {name!r}: its file holds {held:,} numbers, of which transformers makes a {type(model).__name__} of "
            f"{taken:,}: it would answer otherwise than it was trained to; take the model's folder of safetensors"
        )
    scaled = [t.name for t in reader.tensors if t.name.startswith(FREQUENCIES)]
    scaled += [key for key in reader.fields if key.endswith(".rope.scaling.type")]
    if scaled:
        log.warning(
            "model %r: transformers does not read %s of a GGUF file: positions are those of a model of shorter texts; "
            "take the model's folder of safetensors for them as they are", name, scaled[0],
        )  # fmt: skip
