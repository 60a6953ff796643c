"""Reads the chat format off a chat template: what it writes around turns, found by rendering conversations.

Templates of vision-language models know no masks, and few mark what the assistant says. The template that is made of
a `ChatFormat` does both.
"""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from processing.chat_template import ChatFormat

# what no template writes by itself
QUESTION, ANSWER, NEXT, SYSTEM = "the-question", "the-answer", "what-comes-next", "the-system-message"


def read_chat_format(tokenizer: Any, template: str, image: str, image_text: str, ends: Sequence[str]) -> ChatFormat:
    """The chat format of a template.

    Args:
        tokenizer: whose special tokens the template may write.
        image: the token that stands for an image in what the template writes.
        image_text: what is to stand there instead, such as the same between a start and an end token.
        ends: tokens that end an answer; the first is written where the template writes none.

    Raises:
        ValueError: the template does more than to write something before and after turns.
    """

    def render(*turns: tuple[str, str], prompt: bool = False, blocks: Sequence[dict] = ()) -> str:
        conversation = [{"role": role, "content": [*blocks, {"type": "text", "text": text}]} for role, text in turns]
        return tokenizer.apply_chat_template(
            conversation, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )

    user, assistant, again = ("user", QUESTION), ("assistant", ANSWER), ("user", NEXT)
    asked, answered = render(user), render(user, assistant)
    first, user_end = _around(asked, QUESTION)
    prompt = _after(render(user, prompt=True), asked)
    spoken, assistant_end = _around(answered, ANSWER)
    user_start, _ = _around(_after(render(user, assistant, again), answered), NEXT)
    before, after = {"user": user_start, "assistant": prompt}, {"user": user_end, "assistant": assistant_end}
    try:
        before["system"], rest = _around(render(("system", SYSTEM), user), SYSTEM)
        after["system"] = _before(_around(rest, QUESTION)[0], user_start)
    except (TemplateError, ValueError):  # no system messages, or they are written into the user's turn
        before.pop("system", None)
    found = [assistant_end.index(end) + len(end) for end in ends if end in assistant_end]
    end = assistant_end[: min(found)] if found else ends[0]
    after["assistant"] = assistant_end.removeprefix(end)
    begin = _after(spoken, first + QUESTION + user_end)
    with_image, _ = _around(render(user, blocks=[{"type": "image"}]), QUESTION)
    shown = _after(with_image, first) if image in with_image else ""
    return ChatFormat(
        before=before,
        after=after,
        begin=begin.removeprefix(prompt) if begin.startswith(prompt) else "",
        end=end,
        image=shown.replace(image, image_text) if shown.count(image) == 1 else image_text + "\n",
        opening=_before(first, user_start),
    )


def _around(text: str, marker: str) -> tuple[str, str]:
    if text.count(marker) != 1:
        raise ValueError(f"the chat template writes a text {text.count(marker)} times")
    before, after = text.split(marker)
    return before, after


def _after(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError(f"the chat template writes {start!r} otherwise when something follows: {text!r}")
    return text.removeprefix(start)


def _before(text: str, end: str) -> str:
    if not text.endswith(end):
        raise ValueError(f"the chat template writes {end!r} before later turns, and {text!r} before the first")
    return text.removesuffix(end)


__all__ = ["read_chat_format"]
