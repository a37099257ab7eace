"""JSON values of a row: what they are called, and the error that says what is wrong with them."""

import json

MEDIA = (
    "image",
    "image_url",
    "input_image",
    "video",
    "video_url",
    "audio",
    "audio_url",
    "input_audio",
    "file",
)  # parts


class TrajectoryError(ValueError):
    """What is wrong with one trajectory, and in which message."""


def decoded(value, column: str, kind=list):
    """A value of this kind, whether it is one or a JSON string of one; an empty one where there is nothing.

    Raises TrajectoryError.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise TrajectoryError(f"column {column} is not valid JSON ({error})") from None
    if kind is list and value in (None, ""):
        return []
    if not isinstance(value, kind):
        expected = {list: "a list", dict: "an object"}.get(kind, "a list or an object")
        raise TrajectoryError(f"column {column} is not {expected} but {kind_of(value)}")
    return value


def kind_of(value) -> str:
    """What JSON calls a value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def is_text_parts(content) -> bool:
    """Whether the content of a message is a list of text parts; objects that a tool returned may have texts too."""
    return isinstance(content, list) and all(
        isinstance(part, dict)
        and isinstance(part.get("text"), str)
        and (part["type"] == "text" if "type" in part else len(part) == 1)
        for part in content
    )


def map_texts(value, change):
    """A JSON value with change(text) for each text in it, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [map_texts(item, change) for item in value]
    if isinstance(value, dict):
        return {map_texts(key, change): map_texts(item, change) for key, item in value.items()}
    return value


def says(value) -> bool:
    """Whether there is anything: not null, nor an empty text, list or object."""
    return bool(value) or is_number(value)


def is_number(value) -> bool:
    """Whether it is a number or a boolean."""
    return isinstance(value, (bool, int, float))
