"""A record of a file as a text: its UTF-8, or a field of its JSON."""

import json
from collections.abc import Callable
from typing import Any


def decode_record(record: bytes, name: str) -> str:
    """UTF-8 as a text.

    Raises:
        ValueError: if it is not UTF-8.
    """
    try:
        return record.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(name, error) from error


def not_utf8(name: str, error: UnicodeDecodeError) -> ValueError:
    """The error of a record that is not UTF-8."""
    return ValueError(f"{name} is not UTF-8 ({error.reason}): write the file again as UTF-8.")


def field_of_json(record: str, field: str, skip_missing: bool, name: Callable[[], str]) -> str:
    """The text in a field of a JSON object; OUTER.INNER is a field within a field.

    Args:
        record: the JSON.
        field: a key, or keys with dots between them.
        skip_missing: whether "" stands for a text that is null or missing.
        name: gives the record's name, for errors.

    Raises:
        ValueError: if it is no JSON object, has a key twice, or has no such text.
    """
    try:
        value = json.loads(record, object_pairs_hook=_unique)
    except _Twice as error:
        raise ValueError(f"{name()} has the key {error} twice: delete one.") from error
    except ValueError as error:
        raise ValueError(f"{name()} is not JSON ({error}): correct or delete it.") from error
    except RecursionError as error:
        raise ValueError(f"{name()} nests too deeply to be read: correct or delete it.") from error
    if not isinstance(value, dict):
        raise no_field(name(), field, type(value).__name__)
    text: Any = value
    for key in [field] if field in value else field.split("."):
        if text is None:
            break
        if not isinstance(text, dict):
            raise no_field(name(), field, sorted(value))
        text = text.get(key)
    if text is None and skip_missing:
        return ""
    if not isinstance(text, str):
        raise no_field(name(), field, sorted(value), missing=text is None)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name()} holds half a surrogate pair, which no text has: correct or delete it."
        ) from error
    return text


class _Twice(Exception):
    """A JSON object has a key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(repr(next(key for key in found if keys.count(key) > 1)))
    return found


def no_field(name: str, field: str, has: Any, *, missing: bool = False) -> ValueError:
    """The error of what lacks the text field that `data.document` names; `has` is in its place.

    `missing` tells that it is null or not there, which may be so of a few documents.
    """
    or_skip = ", or leave this one out by --config.data.skip_missing=True" * missing
    return ValueError(
        f"{name} has no text field {field!r} but {has}: set the FIELD of --config.data.document "
        f"to one that every document has{or_skip}."
    )
