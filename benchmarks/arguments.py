"""Numbers on a command line, refused out of their range before anything runs."""

from typing import Annotated

from tyro.constructors import PrimitiveConstructorSpec


def _at_least(least: int, or_none: bool = False) -> PrimitiveConstructorSpec[int | None]:
    def parsed(words: list[str]) -> int | None:
        if or_none and words == ["None"]:
            return None
        value = int(words[0])
        if value < least:
            msg = f"it must be {least} or more, got {value}"
            raise ValueError(msg)
        return value

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=parsed,
        is_instance=lambda value: isinstance(value, int) or (or_none and value is None),
        str_from_instance=lambda value: [str(value)],
    )


# How many there are: at least one; or none at all; or one's own number where it is not given.
Count = Annotated[int, _at_least(1)]
CountOrZero = Annotated[int, _at_least(0)]
CountOrNone = Annotated[int | None, _at_least(1, or_none=True)]
