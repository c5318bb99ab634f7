"""Docstrings are reStructuredText, the site is Markdown: what of the former they use becomes the latter. And the
parameters that they speak of must be there."""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, DocstringSectionKind, Extension, Function, Object, Parser
from mkdocs.plugins import get_plugin_logger

_OPTIONS: dict[Parser, Any] = {
    Parser.numpy: {"warn_unknown_params": False, "warn_missing_types": False},
    Parser.google: {"warn_unknown_params": False, "warn_missing_types": False, "returns_multiple_items": False},
}
_LOG = get_plugin_logger(__name__)

_ROLE = re.compile(r":(func|class|meth|mod|data|attr):`~?([^`]+)`")
# The head of a parameter or result: in NumPy's style "name : type", in Google's "name (type):".
_HEAD = re.compile(r"^(?:\w+(?:, \w+)* : .+| +\w+ \(.+\):.*)$", re.M)
_RULE = re.compile(r"^ *=+(  +=+)+ *$")


class Markdown(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            style = (
                Parser.google if re.search(r"^(Args|Attributes|Returns):$", obj.docstring.value, re.M) else Parser.numpy
            )
            obj.docstring.parser, obj.docstring.parser_options = style, _OPTIONS[style]
            obj.docstring.value = markdown(obj.docstring.value, obj)
            unknown = _documented(obj) - {name.lstrip("*") for name in _parameters(obj)}
            if unknown:
                _LOG.warning(f"{obj.path} has no {', '.join(sorted(unknown))}, of which its docstring speaks")


def _parameters(obj: Object) -> list[str]:
    return [each.name for each in obj.parameters] if isinstance(obj, (Class, Function)) else []


def _documented(obj: Object) -> set[str]:
    """The parameters in the docstring's sections, where several may share a line."""
    assert obj.docstring
    found = [
        item.name
        for each in obj.docstring.parsed
        if each.kind is DocstringSectionKind.parameters
        for item in each.value
    ]
    return {name.lstrip("*") for names in found for name in names.split(", ")}


def markdown(text: str, obj: Object) -> str:
    # Types are shown as code, in which links and marks would be read as they are written.
    text = _HEAD.sub(lambda head: _plain(head[0]), text)
    text = _ROLE.sub(lambda role: _link(role[2], obj), text)
    text = re.sub(r"^::$", "", re.sub(r"(?<=\S)::$", ":", text, flags=re.M), flags=re.M)
    # Names that share a description, in NumPy's style, would share the first one's type as well; results would be one.
    text = re.sub(r"^(\w+(?:, \w+)+)( : .+)?\n((?: {4}.*\n?)+)", _apart, text, flags=re.M)
    return "\n".join(_tables(text.split("\n")))


def _apart(entry: re.Match[str]) -> str:
    described = entry[3] if entry[3].endswith("\n") else entry[3] + "\n"
    return "".join(f"{name}{entry[2] or ''}\n{described}" for name in entry[1].split(", "))


def _plain(head: str) -> str:
    """Without roles and backticks, up to where a description in Google's style begins."""
    end = head.find("):") if head.startswith(" ") else len(head)
    return _ROLE.sub(r"\2", head[:end]).replace("`", "") + head[end:]


def _link(name: str, obj: Object) -> str:
    """To where the site documents it, if it does."""
    scope: Any = obj
    path = name
    while scope is not None:
        if name in scope.members:
            path = scope.members[name].canonical_path
            break
        scope = scope.parent
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'


def _tables(lines: list[str]) -> list[str]:
    """Tables from a rule of = to an empty line, whose columns are where the rule is. A row without its first cell
    belongs to the one above."""
    found: list[str] = []
    while lines:
        line = lines.pop(0)
        if not _RULE.match(line):
            found.append(line)
            continue
        cuts = [match.span() for match in re.finditer("=+", line)]
        rows: list[list[str]] = []
        while lines and (line := lines.pop(0)).strip():
            if _RULE.match(line):
                continue
            cells = [line[start : None if i == len(cuts) - 1 else end].strip() for i, (start, end) in enumerate(cuts)]
            if cells[0]:
                rows.append(cells)
            else:
                rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
        head, *body = ["| " + " | ".join(row) + " |" for row in rows]
        found += ["", head, "|" + "---|" * len(cuts), *body, ""]
    return found
