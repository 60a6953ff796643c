"""Chat templates with a place for images and masks, from what stands around the turns of a conversation."""

import json
from dataclasses import dataclass
from string import Template
from typing import Any

IMAGE_TOKEN = "<IMG_CONTEXT>"
START_IMAGE_TOKEN = "<img>"
END_IMAGE_TOKEN = "</img>"
MASK_TOKEN = "<mask>"


@dataclass(frozen=True)
class ChatFormat:
    """What stands around the turns of a conversation.

    Attributes:
        before: what stands before a turn, by its role.
        after: what stands after a turn, by its role.
        begin, end: what the assistant says itself around its text; `after["assistant"]` comes after it.
        image: what stands for an image.
        opening: what stands in place of a system message where a conversation begins without one.
    """

    before: dict[str, str]
    after: dict[str, str]
    end: str
    image: str
    begin: str = ""
    opening: str = ""


def internvl_format(
    image: str = IMAGE_TOKEN, start_image: str = START_IMAGE_TOKEN, end_image: str = END_IMAGE_TOKEN, system: str = ""
) -> ChatFormat:
    """The format of InternVL 2.5.

    Args:
        image, start_image, end_image: a tokenizer's own names of the special tokens.
        system: the message where a conversation has none of its own; "": none is written then.
    """
    before = {role: f"<|im_start|>{role}\n" for role in ("system", "user", "assistant")}
    return ChatFormat(
        before=before,
        after=dict.fromkeys(before, "<|im_end|>\n") | {"assistant": "\n"},
        end="<|im_end|>",
        image=f"{start_image}{image}{end_image}\n",
        opening=f"{before['system']}{system}<|im_end|>\n" if system else "",
    )


# `generation` marks what the assistant says
CHAT_TEMPLATE = Template("""\
{%- set before = $BEFORE -%}
{%- set after = $AFTER -%}
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for block in content -%}
            {%- if block['type'] == 'image' -%}
                {{- $IMAGE -}}
            {%- elif block['type'] == 'mask' -%}
                {{- $MASK -}}
            {%- elif block['type'] == 'text' -%}
                {{- block['text'] -}}
            {%- else -%}
                {{- raise_exception('unknown content type: ' + block['type']) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if not messages or messages[0]['role'] != 'system' -%}
    {{- $OPENING -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] not in before -%}
        {{- raise_exception('this chat format knows no turns of the role ' + message['role']) -}}
    {%- endif -%}
    {{- before[message['role']] -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
            {{- $BEGIN + render(message['content']) + $END -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- render(message['content']) -}}
    {%- endif -%}
    {{- after[message['role']] -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- before['assistant'] -}}
{%- endif -%}
""")


def adds_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer puts a beginning-of-sequence token before what it is given."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def make_chat_template(chat: ChatFormat, mask: str = MASK_TOKEN, with_bos: bool = False) -> str:
    """The Jinja template of a chat format.

    Args:
        mask: what stands for a mask.
        with_bos: put the beginning-of-sequence token into the template; then it is there whether or not the caller asks
            the tokenizer for special tokens (trainers do not), and never twice.
    """
    pieces = {
        "BEFORE": chat.before,
        "AFTER": chat.after,
        "IMAGE": chat.image,
        "MASK": mask,
        "OPENING": chat.opening,
        "BEGIN": chat.begin,
        "END": chat.end,
    }
    template = CHAT_TEMPLATE.substitute({name: json.dumps(piece, ensure_ascii=False) for name, piece in pieces.items()})
    return "{{- bos_token -}}\n" + template if with_bos else template
