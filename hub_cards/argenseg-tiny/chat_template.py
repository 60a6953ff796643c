"""The chat format of InternVL 2.5, with a place for masks."""

IMAGE_TOKEN = "<IMG_CONTEXT>"
START_IMAGE_TOKEN = "<img>"
END_IMAGE_TOKEN = "</img>"
MASK_TOKEN = "<mask>"

# A system message is written only when one is given. `generation` marks what the assistant says, <|im_end|> included.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for block in content -%}
            {%- if block['type'] == 'image' -%}
                {{- '<img><IMG_CONTEXT></img>\\n' -}}
            {%- elif block['type'] == 'mask' -%}
                {{- '<mask>' -}}
            {%- elif block['type'] == 'text' -%}
                {{- block['text'] -}}
            {%- else -%}
                {{- raise_exception('unknown content type: ' + block['type']) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
            {{- render(message['content']) + '<|im_end|>' -}}
        {%- endgeneration -%}
        {{- '\\n' -}}
    {%- else -%}
        {{- render(message['content']) + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def make_chat_template(image: str, start_image: str, end_image: str, mask: str, with_bos: bool) -> str:
    """The chat template with a tokenizer's own names of the special tokens.

    `with_bos` puts the beginning-of-sequence token into the template; then it is there whether or not the caller asks
    the tokenizer for special tokens (trainers do not), and never twice.
    """
    template = CHAT_TEMPLATE.replace(START_IMAGE_TOKEN + IMAGE_TOKEN + END_IMAGE_TOKEN, start_image + image + end_image)
    template = template.replace(MASK_TOKEN, mask)
    return "{{- bos_token -}}\n" + template if with_bos else template
