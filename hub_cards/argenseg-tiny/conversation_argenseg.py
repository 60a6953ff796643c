"""Conversations: the wording of a segmentation request, and the images and masks that a conversation holds."""

from typing import Any

SOURCES = {"image": ("image", "url", "path", "base64"), "mask": ("mask", "url", "path")}


def segmentation_conversation(image: Any, prompt: str, mask: Any, request: str, answer: str) -> list[dict]:
    """A user turn with image and request, and, if there is a mask, the assistant's answer with it.

    Args:
        request: wording with `{prompt}`.
        answer: wording with `{mask}`.

    Raises:
        ValueError: the prompt is empty, or no Unicode.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"the prompt is empty; say what to segment (got {prompt!r})")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError(f"the prompt {prompt!r} holds half of a UTF-16 pair, which is no character")
    question = {"type": "text", "text": request.replace("{prompt}", prompt.strip())}
    conversation = [{"role": "user", "content": [{"type": "image", "image": image}, question]}]
    if mask is not None:
        before, after = answer.split("{mask}", 1)
        blocks = [{"type": "text", "text": before}, {"type": "mask", "mask": mask}, {"type": "text", "text": after}]
        conversation.append({"role": "assistant", "content": [block for block in blocks if block.get("text") != ""]})
    return conversation


def collect_contents(conversations: list[list[dict]]) -> tuple[list[list], list[list], list, dict]:
    """The images and masks of conversations, in order, one list per conversation.

    Keys whose value is `None` count as absent: a table of contents holds all keys in every block.

    Returns:
        images, videos (none), audio (none), and a dict with `masks` if there are any.
    """
    image_rows, mask_rows = [], []
    for conversation in conversations:
        rows: dict[str, list] = {"image": [], "mask": []}
        for message in conversation:
            content = message.get("content")
            for block in content if isinstance(content, list) else []:
                if block["type"] in rows:
                    rows[block["type"]] += _source_of(block)
        image_rows.append(rows["image"])
        mask_rows.append(rows["mask"])
    extra = {"masks": mask_rows} if any(mask_rows) else {}
    return image_rows, [[] for _ in conversations], [], extra


def with_image(conversation: list[dict], image: Any) -> list[dict]:
    """The same conversation about another image, which takes the place of every image in it."""
    replaced = []
    for message in conversation:
        content = message.get("content")
        if isinstance(content, list):
            content = [{"type": "image", "image": image} if one["type"] == "image" else one for one in content]
        replaced.append({**message, "content": content})
    return replaced


def _source_of(block: dict) -> list:
    sources = [block[key] for key in SOURCES[block["type"]] if block.get(key) is not None]
    if len(sources) > 1:
        raise ValueError(f"a content of type {block['type']!r} names more than one source: {sorted(block)}")
    return sources
