"""URLs whose secrets stay out of everything that is stored, hashed, logged or printed.

A log may come from `http://user:password@host/x?token=…`. What config, manifests, keys and messages hold of it is its
public form, `http://host/x`. The rest is kept in the environment of this process and of those it starts, and put back
by `files.filesystem` where something is opened.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from ncf_dist.stopping import asked

SECRETS = "NCF_URL_SECRETS"
"""A JSON object: public URL → [user info, query]. Of a folder or a glob, all that is under it has the same."""

_LOGIN = re.compile(r"(?<=://)[^/\s?#'\"<>|]*@")
_URL_QUERY = re.compile(r"(https?://(?:(?!::)[^\s?#'\"<>|])*)[?#](?:(?!::)[^\s'\"<>|])*", re.IGNORECASE)
# Elsewhere a question mark is a glob's, unless a name and an equals sign follow.
_OTHER_QUERY = re.compile(r"(\w[\w+.-]*://(?:(?!::)[^\s?'\"<>|])*)\?[\w.-]+=(?:(?!::)[^\s'\"<>|])*")
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
    public = public_url(url)
    if public == url or url in _kept(os.environ.get(SECRETS, "")):
        return url
    number, name = 1, (public := public.rstrip("/"))
    while taken and taken.get(name, url) != url:
        number += 1
        name = f"{public}#{number}"
    login = _LOGIN.search(url)
    without = _LOGIN.sub("", url)
    query = "" if public_url(without) == without else re.sub(r"^[^?#]*", "", without)
    os.environ[SECRETS] = json.dumps({**_kept(os.environ.get(SECRETS, "")), name: [login[0] if login else "", query]})
    return name


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
    login, query = kept[name]
    return re.sub("(?<=://)", lambda _: login, re.sub(r"#\d+$", "", path) if path in kept else path, count=1) + query


def _folder(name: str) -> str:
    """What begins the names of all that is under a URL."""
    fixed = re.split(r"[*\[?]", name, maxsplit=1)[0]
    return fixed.rstrip("/") + "/" if fixed == name else fixed[: fixed.rindex("/") + 1]


@functools.lru_cache(maxsize=4)
def _kept(text: str) -> dict[str, list[str]]:
    return dict(json.loads(text)) if text else {}


def scrub(text: str) -> str:
    """`text` without secrets, whoever wrote it: URLs in their public form, and what was kept of any taken out."""
    text = public_url(text)
    for login, query in _kept(os.environ.get(SECRETS, "")).values():
        parts = [query[1:], *re.split("[?&#]", query)]
        words = {*login.rstrip("@").split(":", 1)[1:], *parts, *(part.partition("=")[2] for part in parts)}
        for word in sorted(words | {unquote(word) for word in words}, key=len, reverse=True):
            if len(word) >= _SHORT:
                text = text.replace(word, "***")
    return text


def scrub_all(tree: Any) -> Any:
    """`tree` (of dicts, lists and tuples) with every text scrubbed."""
    if isinstance(tree, str):
        return scrub(tree)
    if isinstance(tree, Mapping):
        return {key: scrub_all(value) for key, value in tree.items()}
    return [scrub_all(value) for value in tree] if isinstance(tree, list | tuple) else tree


class Formatter(logging.Formatter):
    """Log lines with date and time, and without secrets."""

    def __init__(self, form: str) -> None:
        super().__init__(form, "%Y-%m-%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return scrub(super().format(record))


def log_to_stderr(who: str) -> None:
    """Have this process log to stderr as all of ours do; who: what follows the level."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter(f"%(asctime)s %(levelname)s {who}: %(message)s"))
    # Once this process was asked to stop, Spark's JVM is gone, which is no news.
    handler.addFilter(lambda record: not (asked() and "py4j" in record.pathname))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
