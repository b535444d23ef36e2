"""Text of unknown origin, made fit to stand in a page or a drawing."""

import re

# What XML forbids and UTF-8 cannot hold.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def clean(text: object) -> str:
    """Return anything as text in which control characters and lone surrogates are replaced; nothing is escaped."""
    return _UNPRINTABLE.sub("\ufffd", str(text))
