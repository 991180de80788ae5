"""Chat templates of many kinds: what is trained on and what is prompted with are one rendering of the template.

The templates are small ones of our own, with what those of the field do: they refuse a system's message, raise where
roles do not alternate, begin a reply otherwise than they write one down, and put thinking in or take it out.
"""

from __future__ import annotations

from typing import Any

import pytest
from test_text import CHATML, TALKS, bytelevel, formatted
from transformers import PreTrainedTokenizerFast

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm import hub
from florilegium.client.lm.control import plain
from florilegium.client.lm.places import ModelError

ALTERNATING = (  # as Gemma's: no system, users and models in turn, texts trimmed
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('in turn') }}"
    "{% endif %}<|im_start|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
THINKING = (  # as Qwen 3's: a block in the last reply, earlier ones without theirs
    "{% for m in messages %}{% set said = m['content'].split('</think>')[-1] %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ said }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
ASKED_NOT_TO_THINK = (  # as SmolLM 3's: thinking is on unless it is switched off
    "<|im_start|>system\n{{ '/no_think' if enable_thinking is defined and not enable_thinking else '/think' }}"
    "<|im_end|>\n{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not enable_thinking %}<think>\n\n</think>\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BEGUN_OTHERWISE = (  # as R1's: what begins a reply is in no reply that is written down
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
MARKED_ONCE = (  # as Mistral's: the end of a prompt begins the reply
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>{{ m['content'] }}<|im_end|>"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only users and assistants') }}{% endif %}{% endfor %}"
)
IN_PARTS = CHATML.replace(  # as those of models that see: a content may be a list
    "{{ m['content'] }}",
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{{ m['content'][0]['text'] }}{% endif %}",
)
TEMPLATES = {
    "alternating": ALTERNATING,
    "thinking": THINKING,
    "asked not to think": ASKED_NOT_TO_THINK,
    "begun otherwise": BEGUN_OTHERWISE,
    "marked once": MARKED_ONCE,
    "in parts": IN_PARTS,
}


def whole(tokenizer: PreTrainedTokenizerFast, talk: Dialogue) -> list[int]:
    """The ids of a dialogue by the tokenizer's own template."""
    messages = [
        {"role": "user", "content": plain(talk.prompt).strip()},
        {"role": "assistant", "content": plain(talk.response).strip()},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False)
    ids: list[int] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_learned_and_what_is_prompted_with_are_one_rendering(name: str) -> None:
    tokenizer = bytelevel(template=TEMPLATES[name])
    form = formatted(tokenizer)
    for talk, example, asked in zip(TALKS, form.dialogues(TALKS), form.prompts([t.prompt for t in TALKS]), strict=True):
        ids, expected = [*example.prompt, *example.reply], whole(tokenizer, talk)
        assert ids == expected[: len(ids)]
        assert not tokenizer.decode(expected[len(ids) :]).strip()
        assert asked.prompt == example.prompt
        end = example.reply.index(form.stop[0])
        assert tokenizer.decode(example.reply[:end]).strip() == plain(talk.response).strip()


@pytest.mark.parametrize(
    ("name", "begun"),
    [
        ("alternating", "<|im_start|>model\n"),
        ("thinking", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        ("asked not to think", "<|im_start|>assistant\n<think>\n\n</think>\n"),
        ("begun otherwise", "<|im_start|>assistant\n"),
        ("marked once", "<|im_end|>"),
    ],
)
def test_a_reply_begins_as_it_is_written_down_and_without_thinking(name: str, begun: str) -> None:
    """Recorded replies hold no thoughts, and replies of some tens of tokens have no room for any."""
    tokenizer = bytelevel(template=TEMPLATES[name])
    (asked,) = formatted(tokenizer).prompts(["who are you"])
    text = tokenizer.decode(asked.prompt)
    assert text.endswith(f"who are you{begun}" if name == "marked once" else f"who are you<|im_end|>\n{begun}")
    assert "system\n/think" not in text


def test_thinking_that_a_person_wrote_is_text_and_stays() -> None:
    """The template would cut it out of the message; it is put in where the template's own text is known."""
    form = formatted(bytelevel(template=THINKING))
    (example,) = form.dialogues([Dialogue("", "why </think> so", "a <think>b</think> c")])
    assert "why </think> so" in form.tokenizer.decode(example.prompt)
    assert form.tokenizer.decode(example.reply).startswith("a <think>b</think> c")


def test_of_several_templates_the_default_one_is_taken() -> None:
    templates: Any = {"default": CHATML, "tool_use": "tools {{ messages[0]['content'] }}"}
    (asked,) = formatted(bytelevel(template=templates)).prompts(["who are you"])
    assert bytelevel().decode(asked.prompt).startswith("<|im_start|>user\nwho are you")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('a system message comes first') }}", r"fails \(a system message comes first\)"),
        (CHATML.replace("m['content']", "m['content'][0]['text']"), "drops the user's or the assistant's text"),
    ],
)
def test_a_template_that_takes_no_user_and_assistant_is_refused(template: str, why: str) -> None:
    with pytest.raises(ModelError, match=rf"{why}.*set \[model\] chat_template to 'plain'"):
        tokenizer = bytelevel()
        hub._set_template(tokenizer, "made", template)
        formatted(tokenizer)
