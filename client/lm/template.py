"""Chat templates, rendered without a clock and without thinking.

Where one asks for the date, it is told the one of the settings. Where one can be told not to think before a reply
(`enable_thinking`), it is: recorded replies hold no thoughts, and short ones have no room for any.
"""

from __future__ import annotations

from datetime import date, datetime

from transformers import PreTrainedTokenizerBase

CODES = "aAbBcdfGHIjmMpSuUVwWxXyYzZ"  # what strftime knows on every system
CLOCK = (
    "{%- macro strftime_now(format) -%}{%- set told = namespace(text=format) -%}"
    "{%- for code, value in strftime_codes.items() -%}"
    "{%- set told.text = told.text | replace(code, value) -%}"
    "{%- endfor -%}{{ told.text }}{%- endmacro +%}"
)


def render(tokenizer: PreTrainedTokenizerBase, prompt: str, reply: str, today: str) -> str:
    """A dialogue in the tokenizer's chat template. `today` (ISO) is what `strftime_now` tells, at midnight."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    template = tokenizer.get_chat_template()
    if "strftime_now" not in template:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False))
    # A function of ours would not do: transformers gives templates plain data only, and its own clock.
    return str(
        tokenizer.apply_chat_template(
            messages,
            chat_template=CLOCK + template,
            strftime_codes=_codes(today),
            tokenize=False,
            enable_thinking=False,
        )
    )


def _codes(today: str) -> dict[str, str]:
    """What strftime makes of each of its codes."""
    day = datetime.combine(date.fromisoformat(today), datetime.min.time())
    return {**{f"%{c}": day.strftime(f"%{c}") for c in CODES}, "%-d": str(day.day), "%-m": str(day.month)}
