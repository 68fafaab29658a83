"""Plotly's script as the page carries it: with no address in it that anything could be sent to or asked from."""

from __future__ import annotations

import base64
import gzip
import re
from functools import cache

from plotly.offline import get_plotlyjs

# Names of XML namespaces look like addresses, and a browser compares them letter by letter.
_NAMESPACE = re.compile(r"(https?:)//(?=www\.w3\.org/)")
_ADDRESS = re.compile(r"\b(?:https?|wss?|ftp):(?://|\\/\\/)")


@cache
def plotly() -> str:
    """The script.

    Plotly knows servers for maps, map tiles, icons and shared charts, none of which the report draws. Their addresses lead
    to an empty page here. Namespaces stay what they are, with their slashes written as escapes.
    """
    text = _NAMESPACE.sub(r"\1\\u002f\\u002f", get_plotlyjs())
    return _ADDRESS.sub("about:blank#", text)


@cache
def packed(script: str) -> str:
    """A script as the page keeps it, gzipped and in base64: less than half as long, and parsed after the first paint."""
    return base64.b64encode(gzip.compress(script.encode(), 6, mtime=0)).decode()
