"""`florilegium models pretrain` on a few conversations: the stream of windows, its limits, the model that it writes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from florilegium.client.lm.config import ModelConfig
from florilegium.client.lm.model import LanguageModel
from florilegium.simulation.data.conversations import READERS, Conversation, Turn
from florilegium.simulation.models import pretrain
from florilegium.simulation.models.config import ModelShape, PretrainConfig
from florilegium.simulation.settings import ConfigError

WORDS = ["rain", "sea", "jazz", "cats", "books", "bread", "rivers", "boats"]
TALKS = [
    Conversation(str(k), tuple(Turn("ab"[i % 2], f"i like {WORDS[(k + i) % 8]} and {WORDS[k % 8]}") for i in range(4)))
    for k in range(24)
]
SHAPE = ModelShape(vocab_size=300, hidden_size=16, layers=1, heads=2, intermediate_size=16, context=64)


def settings(out: Path, **more: object) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {"out": out, "corpora": ["told"], "model": SHAPE, "tokens": 10_000, "window": 32, "batch_tokens": 256,
         "held_out": 4, "rewrite_share": 0, "device": "cpu", **more}
    )  # fmt: skip


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> Iterator[Conversation]:
        yield from TALKS

    monkeypatch.setitem(READERS, "told", read)


def corpus(config: PretrainConfig, talks: list[Conversation]) -> pretrain.Corpus:
    tokenizer = pretrain.train_tokenizer((t.text for talk in talks for t in talk.turns), SHAPE.vocab_size)
    return pretrain.Corpus(config, tokenizer, talks)


def test_batches_go_through_the_windows_of_an_epoch_once_and_go_on_where_they_stopped(tmp_path: Path) -> None:
    made = corpus(settings(tmp_path), TALKS)
    tokens = torch.from_numpy(made.epoch(0).astype("int64"))
    windows = {tuple(tokens[i : i + 33].tolist()) for i in range(0, len(tokens) - 33, 32)}
    first = list(islice(made.batches(0), len(windows) // 8))
    seen = [tuple(row.tolist()) for batch in first for row in batch]
    assert all(batch.shape == (8, 33) for batch in first) and len(first) > 1
    assert len(set(seen)) == len(seen) and set(seen) <= windows
    assert torch.equal(next(made.batches(1)), first[1])


@pytest.mark.parametrize(("batch", "window"), [(8192, 256), (512, 32), (256, 512)])
def test_fewer_windows_than_a_batch_are_refused_and_not_waited_for(tmp_path: Path, batch: int, window: int) -> None:
    made = corpus(settings(tmp_path, batch_tokens=batch, window=window), TALKS[:2])
    windows = (len(made.epoch(0)) - 1) // window
    told = rf"batch_tokens = {batch} makes {batch // window} windows of {window} tokens, and must make 1 to {windows},"
    with pytest.raises(ConfigError, match=told):
        next(made.batches(0))


def test_a_training_writes_a_model_that_loads(tmp_path: Path) -> None:
    facts = pretrain.pretrain(settings(tmp_path / "out"), report=lambda _: None)
    assert facts["steps"] == 39 and facts["tokens_seen"] == 39 * 256
    assert 0 < facts["held_out_nll"] < 5.7  # ln 300: what knows nothing has
    lm = LanguageModel.load(ModelConfig(name=str(tmp_path / "out"), dtype="float32", device="cpu"))
    assert lm.hidden_size == 16 and len(lm.format.stop) == 1
