"""URLs whose secrets stay out of everything that is stored, hashed, logged or printed.

A log may come from `http://user:password@host/x?token=…`. What config, manifests, keys and messages hold of it is its
public form, `http://host/x`. The rest is kept in the environment of this process and of those it starts, and put back
by `files.filesystem` where something is opened.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

SECRETS = "NCF_URL_SECRETS"
"""A JSON object: public URL → of each of its parts [user info, query]. Of a folder or a glob, all that is under it has
the same."""

CREDENTIALS = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE"),
)
"""Variables of the environment by which a lake in a store is opened: Spark's Python workers get them as this process
has them. Where they are not set, each machine's own provider chain counts."""
_HIDDEN = CREDENTIALS[:3]

# URLs within a text end where a text may go on. Of a whole URL (`hide`) everything is the URL's.
_LOGIN = re.compile(r"(?<=://)[^/\s?#'\"<>|]*@")
_URL_QUERY = re.compile(
    r"(https?://(?:\[[^\]\s]*\])?(?:(?!::)[^\s?#'\"<>|])*)[?#](?:(?!::)[^\s'\"<>|])*", re.IGNORECASE
)
# Elsewhere a question mark is a glob's, unless a name and an equals sign follow.
_OTHER_QUERY = re.compile(r"(\w[\w+.-]*://(?:(?!::)[^\s?'\"<>|])*)\?[\w.-]+=(?:(?!::)[^\s'\"<>|])*")
_WHOLE = re.compile(r"(?:[\w+.-]+::)*[\w+.-]+://")
_NEXT = re.compile(r"::(?=(?:[\w+.-]+::)*[\w+.-]+://)")
"""Between the parts of a chain (fsspec's zip://x::http://y). Any other :: is a part's own."""
_PART = re.compile(
    r"(?P<scheme>(?:[\w+.-]+::)*[\w+.-]+://)"
    # A password should have no slash of its own; one that has is told from a host by a port that is no number.
    r"(?P<login>[^/?#]*@|[^/?#@:\[\]]+:(?!\d*(?:[/?#]|$)).*@)?"
    r"(?P<rest>.*)",
    re.DOTALL,
)
_CONTAINERS = ("abfs://", "abfss://", "wasb://", "wasbs://")
"""Where what is before the @ is a container's name, unless it has a colon."""
_SHORT = 4
"""A secret this short is no secret, and its characters are everywhere."""


def public_url(text: str) -> str:
    """`text` with every URL in it cut down to what anybody may see: no user info, no query, no fragment."""
    if "://" not in text:
        return text
    return _OTHER_QUERY.sub(r"\1", _URL_QUERY.sub(r"\1", _LOGIN.sub("", text)))


def hide(url: str, taken: Mapping[str, str] | None = None) -> str:
    """The public form of one URL, whose secrets are kept for `real_url`; any other text as it is.

    taken: public forms that other URLs have; where these differ in their query alone, a number tells them apart.
    """
    if not _WHOLE.match(url):
        return public_url(url)
    parts = [_cut(part) for part in _NEXT.split(url)]
    if not any(login or query for _, login, query in parts) or url in _kept(os.environ.get(SECRETS, "")):
        return url
    name = public = "::".join(shown for shown, _, _ in parts).rstrip("/")
    number = 1
    while taken and taken.get(name, url) != url:
        number += 1
        name = f"{public}#{number}"
    secrets = [[login, query] for _, login, query in parts]
    os.environ[SECRETS] = json.dumps({**_kept(os.environ.get(SECRETS, "")), name: secrets})
    return name


def _cut(part: str) -> tuple[str, str, str]:
    """(what anybody may see, user info with its @, query with its ? or fragment) of one part of a chain.

    >>> _cut("http://me:pw@host/x?token=abc")
    ('http://host/x', 'me:pw@', '?token=abc')
    """
    found = _PART.fullmatch(part)
    if found is None:
        return part, "", ""
    scheme, login, rest = found["scheme"], found["login"] or "", found["rest"]
    if login and ":" not in login and scheme.lower().endswith(_CONTAINERS):
        scheme, login = scheme + login, ""
    http = re.search(r"https?://$", scheme, re.IGNORECASE)
    query = re.search(r"[?#].*" if http else r"\?[\w.-]+=.*", rest, re.DOTALL)
    return scheme + rest[: query.start() if query else None], login, query[0] if query else ""


def hide_all(tree: Any, taken: dict[str, str] | None = None) -> Any:
    """`tree` (of dicts, lists and tuples) with every URL in its public form."""
    taken = {} if taken is None else taken
    if isinstance(tree, str):
        name = hide(tree, taken)
        if name != tree:
            taken[name] = tree
        return name
    if isinstance(tree, Mapping):
        return {key: hide_all(value, taken) for key, value in tree.items()}
    return type(tree)(hide_all(value, taken) for value in tree) if isinstance(tree, list | tuple) else tree


def real_url(path: str) -> str:
    """`path` with the secrets that were kept of it, or of the folder or glob that it was found under."""
    kept = _kept(os.environ.get(SECRETS, ""))
    if "://" not in path or not kept:
        return path
    fitting = [name for name in kept if path == name or path.startswith(_folder(name))]
    if not fitting:
        return path
    name = path if path in kept else max(fitting, key=len)
    parts = _NEXT.split(re.sub(r"#\d+$", "", path) if path in kept else path)
    return "::".join(
        re.sub("(?<=://)", lambda _, login=login: login, part, count=1) + query
        for part, (login, query) in zip(parts, kept[name], strict=True)
    )


def _folder(name: str) -> str:
    """What begins the names of all that is under a URL."""
    fixed = re.split(r"[*\[?]", name, maxsplit=1)[0]
    return fixed.rstrip("/") + "/" if fixed == name else fixed[: fixed.rindex("/") + 1]


@functools.lru_cache(maxsize=4)
def _kept(text: str) -> dict[str, list[list[str]]]:
    return dict(json.loads(text)) if text else {}


def scrub(text: str) -> str:
    """`text` without secrets, whoever wrote it: what was kept of any URL taken out, and all URLs in their public
    form."""
    for login, query in (pair for pairs in _kept(os.environ.get(SECRETS, "")).values() for pair in pairs):
        parts = [query[1:], *re.split("[?&#]|::", query)]
        words = {*login.rstrip("@").split(":", 1)[1:], *parts, *(part.partition("=")[2] for part in parts)}
        for word in sorted(words | {unquote(word) for word in words}, key=len, reverse=True):
            if len(word) >= _SHORT:
                text = text.replace(word, "***")
    for name in _HIDDEN:
        if len(word := os.environ.get(name, "")) >= _SHORT:
            text = text.replace(word, "***").replace(quote(word, safe=""), "***")
    return public_url(text)


def scrub_all(tree: Any) -> Any:
    """`tree` (of dicts, lists and tuples) with every text scrubbed."""
    if isinstance(tree, str):
        return scrub(tree)
    if isinstance(tree, Mapping):
        return {key: scrub_all(value) for key, value in tree.items()}
    return [scrub_all(value) for value in tree] if isinstance(tree, list | tuple) else tree
