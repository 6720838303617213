"""The fields of a record, with errors that name the field and what it holds. Left out: what the fields mean."""

from typing import Any

from framework.core.errors import DataError
from framework.data.files import Record


def present(record: Record) -> Record:
    """The record less its null fields: a null field counts as absent."""
    return {name: value for name, value in record.items() if value is not None}


def listing(record: Record) -> str:
    """The names of a record's fields, for an error."""
    return ", ".join(sorted(map(str, record))) or "(none)"


def field(record: Record, name: str) -> Any:
    """A field that must be there."""
    if name not in record:
        raise DataError(f"needs the field '{name}'; the record has {listing(record)}")
    return record[name]


def string(record: Record, name: str, default: str | None = None) -> str:
    """A text; without `default` it must be there."""
    value = record.get(name, default) if default is not None else field(record, name)
    if not isinstance(value, str):
        raise wrong(name, "a string", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"field '{name}' holds half a character: {value[error.start]!a} has no partner") from None
    return value


def items(record: Record, name: str, default: list[Any] | None = None) -> list[Any]:
    """A list; without `default` it must be there."""
    value = record.get(name, default) if default is not None else field(record, name)
    if not isinstance(value, list):
        raise wrong(name, "a list", value)
    return value


def number(record: Record, name: str) -> float | None:
    """A number, None where the record has none."""
    value = record.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise wrong(name, "a number", value)
    return None if value is None else float(value)


def wrong(name: str, wanted: str, value: Any) -> DataError:
    """What to raise for a field of another kind."""
    return DataError(f"field '{name}' must be {wanted}, got {type(value).__name__} {str(value)[:40]!r}")
