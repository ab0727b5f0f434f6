"""Plain text from a MediaWiki export, by fixed rules, and its split into calibration and held-out articles.

Owns the extractor. Perplexity depends on what is left of the markup, so a change of any rule here changes every figure
measured on this text: `RULES_VERSION` is raised with it. Knows nothing of models or of where the export comes from.
"""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from typing import IO

RULES_VERSION = 1
SHORTEST_ARTICLE = 500

_REDIRECT = re.compile(r"\s*#redirect\b", re.IGNORECASE)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_SELF_CLOSED = re.compile(r"<(?:(?:ref|references|section)\b[^<>]*/|[bh]r\s*/?)>", re.IGNORECASE)
_DROPPED_TAGS = "ref|references|math|gallery|timeline|source|syntaxhighlight|pre|score|imagemap|hiero"
_DROPPED = re.compile(rf"<({_DROPPED_TAGS})\b[^<>]*>.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"</?[a-z][^<>]*>", re.IGNORECASE)
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_DROPPED_LINK = re.compile(r"\s*(?:file|image|category|media)\s*:", re.IGNORECASE)
_URL_LINK = re.compile(r"\[(?:https?:|ftp:)?//[^\s\]]*([^\]]*)\]")
_EMPHASIS = re.compile(r"'{2,5}")
_HEADING = re.compile(r"^(=+)\s*(.*?)\s*\1\s*$")
_LIST_MARK = re.compile(r"^[*#:;]+\s*")
_MAGIC_WORD = re.compile(r"__[A-Z]+__")
_EMPTY_BRACKETS = re.compile(r"\(\s*[,;:]*\s*\)")
_SPACES = re.compile(r"[ \t\u00a0]+")
_SPACE_BEFORE_MARK = re.compile(r" +([,.;:)])")
_LAST_SECTIONS = frozenset(
    ("bibliography", "external links", "footnotes", "further reading", "notes", "references", "see also", "sources")
)


def _repeat(pattern: re.Pattern[str], replacement: str, text: str) -> str:
    """Substitute innermost matches until none is left, so that nested markup goes as a whole."""
    count = 1
    while count:
        text, count = pattern.subn(replacement, text)
    return text


def _link_text(match: re.Match[str]) -> str:
    target = match.group(1)
    if _DROPPED_LINK.match(target):
        return ""
    return target.rsplit("|", 1)[-1]


def _links(text: str) -> str:
    count = 1
    while count:
        text, count = _LINK.subn(_link_text, text)
    return _URL_LINK.sub(lambda match: match.group(1).strip(), text)


def strip_markup(source: str) -> str:
    """The prose of one article's wikitext: paragraphs and headings, one a line, no markup.

    Templates, tables, references, formulas, images and categories go; links and emphasis leave their text. The article
    ends at the first of the closing sections (see also, notes, references, ...).
    """
    text = _COMMENT.sub("", source)
    text = _SELF_CLOSED.sub(" ", text)
    text = _DROPPED.sub("", text)
    text = _repeat(_TEMPLATE, "", text)
    text = _repeat(_TABLE, "", text)
    text = _links(text)
    text = _TAG.sub("", text)
    text = html.unescape(_EMPHASIS.sub("", text))
    text = _MAGIC_WORD.sub("", text)
    lines: list[str] = []
    for raw in text.splitlines():
        line = _SPACES.sub(" ", raw).strip()
        heading = _HEADING.match(line)
        if heading:
            line = heading.group(2)
            if line.lower() in _LAST_SECTIONS:
                break
        line = _EMPTY_BRACKETS.sub("", _LIST_MARK.sub("", line))
        line = _SPACE_BEFORE_MARK.sub(r"\1", _SPACES.sub(" ", line)).strip()
        if line and not line.startswith(("|", "{|", "!", "}}")):
            lines.append(line)
    return "\n".join(lines)


def articles(export: IO[bytes]) -> Iterator[tuple[str, str]]:
    """(title, text) of every article of the main namespace, in file order; redirects and stubs are left out.

    Raises: ValueError (not well-formed XML).
    """
    try:
        for _, element in ElementTree.iterparse(export, events=("end",)):
            if element.tag.rpartition("}")[2] != "page":
                continue
            fields = {child.tag.rpartition("}")[2]: child.text or "" for child in element.iter()}
            element.clear()
            source = fields.get("text", "")
            if fields.get("ns", "0") != "0" or _REDIRECT.match(source):
                continue
            text = strip_markup(source)
            if len(text) >= SHORTEST_ARTICLE:
                yield fields.get("title", ""), text
    except ElementTree.ParseError as error:
        raise ValueError(f"wiki export: must be well-formed XML; got {error}. Download it again.") from error


def split(texts: Iterable[tuple[str, str]]) -> tuple[str, str]:
    """(calibration, held out): of every three consecutive articles the third is held out, title first, blank lines."""
    calibration: list[str] = []
    held_out: list[str] = []
    for index, (title, text) in enumerate(texts):
        (held_out if index % 3 == 2 else calibration).append(f"{title}\n{text}\n")
    return "\n".join(calibration), "\n".join(held_out)
