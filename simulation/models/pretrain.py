"""Trains a small dialogue model from scratch: the tokenizer, then a Llama with tied embeddings.

`florilegium models pretrain configs/pretrain/nano.toml` makes the bundled `nano`. Every turn of a conversation
is predicted, not the replies alone. A killed training goes on from its last checkpoint and ends with the same
weights up to the rounding of reductions. Not covered: several machines, evaluation beyond the held-out loss.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from florilegium.simulation.data.conversations import READERS, Conversation
from florilegium.simulation.models.config import ModelShape, PretrainConfig
from florilegium.simulation.settings import ConfigError

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
ROLES = ("<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
Tokens = np.ndarray[Any, np.dtype[np.uint16]]


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the chat template of this project."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, bos_token=BOS, eos_token=END, chat_template=CHAT_TEMPLATE
    )


def corrupt(text: str, rng: np.random.Generator, vocabulary: list[str]) -> str:
    """Drops, replaces and swaps words: the question of a rewriting exercise whose answer is `text`."""
    words: list[str] = []
    for word in text.split(" "):
        chance = rng.random()
        if chance < 0.15:
            continue
        words.append(vocabulary[int(rng.integers(len(vocabulary)))] if chance < 0.25 else word)
    for i in range(len(words) - 1):
        if rng.random() < 0.1:
            words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words)


class Corpus:
    """Conversations as tokens, dealt out as an endless stream that depends on nothing but the seed."""

    def __init__(self, config: PretrainConfig, tokenizer: PreTrainedTokenizerFast, talks: list[Conversation]) -> None:
        self.config = config
        self.bos, self.end, *self.roles = (int(str(tokenizer.convert_tokens_to_ids(t))) for t in (BOS, END, *ROLES))
        rng = np.random.default_rng((config.seed, 1))
        exercises = _rewriting_exercises(talks, config, rng)
        turns = [[t.text for t in talk.turns] for talk in talks] + exercises
        texts = [t for talk in turns for t in talk]
        encoded = iter(tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        self.talks = [[next(encoded) for _ in talk] for talk in turns]
        self.fixed = len(talks)  # talks from this index on are exercises and are never cut

    def epoch(self, number: int) -> Tokens:
        """All conversations once, shuffled, each cut in two at a random turn; (T,) token ids."""
        rng = np.random.default_rng((self.config.seed, 2, number))
        out: list[int] = []
        for i in rng.permutation(len(self.talks)):
            talk = self.talks[i]
            cut = int(rng.integers(len(talk))) if i < self.fixed else 0
            for part in (talk[:cut], talk[cut:]):
                if part:
                    out.append(self.bos)
                for j, turn in enumerate(part):
                    out += [self.roles[j % 2], *turn, self.end]
        return np.array(out, dtype=np.uint16)

    def batches(self, start: int) -> Iterator[torch.Tensor]:
        """Batches `start`, `start + 1`, … of windows; (B, window + 1) ids.

        Raises `ConfigError` where all conversations together have fewer windows than a batch.
        """
        size, window = self.config.batch_tokens // self.config.window, self.config.window
        number, epoch = 0, 0
        while True:
            tokens = self.epoch(epoch)
            windows = (len(tokens) - 1) // window
            if not 0 < size <= windows:
                raise ConfigError(
                    f"batch_tokens = {self.config.batch_tokens} makes {size} windows of {window} tokens, and must make "
                    f"1 to {windows}, of which all conversations together are: set batch_tokens or window, or name "
                    f"more corpora"
                )
            order = np.random.default_rng((self.config.seed, 3, epoch)).permutation(windows)
            for first in range(0, windows - size + 1, size):
                if number >= start:
                    rows = [tokens[w * window : w * window + window + 1] for w in order[first : first + size]]
                    yield torch.from_numpy(np.stack(rows).astype(np.int64))
                number += 1
            epoch += 1


def _rewriting_exercises(
    talks: list[Conversation], config: PretrainConfig, rng: np.random.Generator
) -> list[list[str]]:
    """Pairs of an instruction with a corrupted text and the text in brackets, as synthesis asks for it."""
    texts = [turn.text for talk in talks for turn in talk.turns if 5 <= len(turn.text.split()) <= 40]
    chosen = [text for text in texts if rng.random() < config.rewrite_share]
    vocabulary = [word for text in chosen[:2000] for word in text.split(" ")]
    return [[config.rewrite_instruction + corrupt(text, rng, vocabulary), f"[{text}]"] for text in chosen]


def rate(step: int, steps: int, config: PretrainConfig) -> float:
    """Warm-up, constant, linear decay to 0 (the "trapezoid")."""
    warm = max(1, round(config.warmup_share * steps))
    decay = max(1, round(config.decay_share * steps))
    return config.learning_rate * min(1.0, (step + 1) / warm, (steps - step) / decay)


def token_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each next token, nats; ids (B, T + 1)."""
    logits = model(ids[:, :-1], use_cache=False).logits.float()  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def _optimizer(model: LlamaForCausalLM, config: PretrainConfig) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def _save_checkpoint(folder: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, step: int) -> None:
    """Weights and moments in one file that replaces the last one atomically."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            tensors[f"{moment}.{name}"] = optimizer.state[p][moment]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "new.safetensors", metadata={"step": str(step)})
    (folder / "new.safetensors").replace(folder / f"step{step}.safetensors")
    for old in folder.glob("step*.safetensors"):
        if old.name != f"step{step}.safetensors":
            old.unlink()


def _load_checkpoint(folder: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW) -> int:
    """Puts the last checkpoint back; the number of steps done, 0 without one."""
    found = sorted(folder.glob("step*.safetensors"), key=lambda p: int(p.stem[4:]))
    if not found:
        return 0
    tensors = load_file(found[-1])
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[f"model.{name}"])
            optimizer.state[p] = {m: tensors[f"{m}.{name}"] for m in ("exp_avg", "exp_avg_sq", "step")}
    return int(found[-1].stem[4:])


def _conversations(config: PretrainConfig) -> tuple[list[Conversation], list[Conversation]]:
    """Training and held-out conversations."""
    talks = [talk for name in config.corpora for talk in READERS[name]() if talk.turns]
    order = np.random.default_rng((config.seed, 0)).permutation(len(talks))
    shuffled = [talks[i] for i in order]
    return shuffled[config.held_out :], shuffled[: config.held_out]


def build_model(shape: ModelShape, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights drawn from torch's generator."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            intermediate_size=shape.intermediate_size,
            max_position_embeddings=shape.context,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def pretrain(config: PretrainConfig, report: Callable[[str], None] = print) -> dict[str, float]:
    """Trains, or goes on training, and writes model, tokenizer and `training.json` to `config.out`."""
    device = "cuda" if config.device == "auto" and torch.cuda.is_available() else config.device.replace("auto", "cpu")
    train, held_out = _conversations(config)
    tokenizer = _tokenizer(config, train)
    corpus = Corpus(config, tokenizer, train)
    torch.manual_seed(config.seed)
    model = build_model(config.model, tokenizer)
    torch.nn.Module.to(model, device)
    optimizer = _optimizer(model, config)
    checkpoints = config.out / "checkpoints"
    done, steps = _load_checkpoint(checkpoints, model, optimizer), config.tokens // config.batch_tokens
    report(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}, step {done} of {steps}")
    loss_of = torch.compile(token_loss) if config.compile else token_loss
    saved = began = time.monotonic()
    smooth = 0.0
    for step, ids in zip(range(done, steps), corpus.batches(done), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, config)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = loss_of(model, ids.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        smooth = loss.item() if step == done else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 0:
            speed = (step + 1 - done) * config.batch_tokens / (time.monotonic() - began)
            report(f"step {step}/{steps} loss {smooth:.3f} {speed:,.0f} tokens/s")
        if time.monotonic() - saved > config.checkpoint_every_s:
            _save_checkpoint(checkpoints, model, optimizer, step + 1)
            saved = time.monotonic()
    facts = _facts(config, model, tokenizer, held_out, steps)
    _write(config, model, tokenizer, facts)
    return facts


def _tokenizer(config: PretrainConfig, talks: list[Conversation]) -> PreTrainedTokenizerFast:
    """The tokenizer of a training that was begun, else a new one."""
    if (config.out / "tokenizer.json").exists():
        found: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(config.out)
        return found
    texts = (turn.text for talk in talks for turn in talk.turns)
    tokenizer = train_tokenizer(texts, config.model.vocab_size)
    tokenizer.save_pretrained(config.out)
    return tokenizer


@torch.no_grad()
def _facts(
    config: PretrainConfig,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_out: list[Conversation],
    steps: int,
) -> dict[str, float]:
    """What the model card states: size, steps, tokens, loss on held-out conversations, nats per token."""
    corpus = Corpus(config.model_copy(update={"rewrite_share": 0.0}), tokenizer, held_out)
    tokens = torch.from_numpy(corpus.epoch(0).astype(np.int64))
    rows = tokens[: (len(tokens) - 1) // config.window * config.window + 1]
    windows = rows[:-1].unfold(0, config.window, config.window)
    following = rows[1:].unfold(0, config.window, config.window)
    device = next(model.parameters()).device
    total = sum(
        F.cross_entropy(model(x[None].to(device)).logits[0].float(), y.to(device)).item()
        for x, y in zip(windows, following, strict=True)
    )
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "tokens_seen": steps * config.batch_tokens,
        "held_out_nll": total / len(windows),
        "held_out_tokens": len(windows) * config.window,
    }


def _write(
    config: PretrainConfig, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, facts: dict[str, float]
) -> None:
    torch.nn.Module.to(model, torch.float16)
    model.save_pretrained(config.out)
    tokenizer.save_pretrained(config.out)
    (config.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
