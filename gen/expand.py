"""Jinja extensions: expressions that expand at their own indent, and marks that trace output to template lines."""

from __future__ import annotations

import re
from collections.abc import Iterator

from jinja2 import Environment
from jinja2.ext import Extension
from jinja2.lexer import Token, TokenStream

# Comments and raw sections come first, so that what looks like an expression inside them is left alone.
_LONE_EXPRESSION = re.compile(
    r"\{#.*?#\}|\{%[-+]?\s*raw\b.*?\bendraw\s*[-+]?%\}"
    r"|^(?P<indent>[ \t]*)\{\{(?![-+])(?P<expression>(?:(?!\{\{|\}\}|\n).)+)(?<!-)\}\}[ \t]*$(?!\s*\{[{%#]-)",
    re.DOTALL | re.MULTILINE,
)
_MARK = re.compile("\ue000([^\ue000\ue001]*):([0-9]+)\ue001")


class IndentedExpressions(Extension):
    """Expand a `{{ expression }}` alone on its line with every line of the result at that line's indent.

    An empty result removes the line. Where whitespace control (a `-` in this tag, or in the one before or after it)
    takes the line's indent or its end away, the expression is not alone on a line, and Jinja's own meaning stays.
    """

    def __init__(self, environment: Environment) -> None:
        """Add the filter that the rewritten lines call."""
        super().__init__(environment)
        environment.filters["indented"] = indented

    def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:
        """Rewrite the lone expressions of a template; the number of lines stays as it is."""
        return _LONE_EXPRESSION.sub(_indent_expression, source)


class LineMarks(Extension):
    """End every line of template text with a mark that names the template and the line, for `unmark`."""

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        """Put the marks into the template's text; tags and expressions have none."""
        for token in stream:
            yield _marked(token, stream.name) if token.type == "data" else token


def indented(value: object, indent: str) -> str:
    """Return the text of `value` as whole lines at `indent`, blank lines around it removed; "" if it is blank."""
    lines = str(value).split("\n")
    filled = [number for number, line in enumerate(lines) if not _blank(line)]
    if not filled:
        return ""
    margin = min(len(lines[number]) - len(lines[number].lstrip()) for number in filled)
    kept = lines[filled[0] : filled[-1] + 1]
    return "".join(f"{line.strip() if _blank(line) else indent + line[margin:]}\n" for line in kept)


def unmark(text: str) -> tuple[str, list[tuple[str, int] | None]]:
    """Split marked output into the plain text and, for each line, the template line it came from.

    A line without a mark ends inside an expression: it belongs to the next mark.
    """
    origins: list[tuple[str, int] | None] = []
    origin: tuple[str, int] | None = None
    for line in reversed(text.split("\n")):
        marks = _MARK.findall(line)
        if marks:
            origin = (marks[-1][0], int(marks[-1][1]))
        origins.append(origin)
    return _MARK.sub("", text), origins[::-1]


def _indent_expression(match: re.Match[str]) -> str:
    expression = match["expression"]
    before = match.string[: match.start()].rstrip()
    if expression is None or before.endswith(("-%}", "-}}", "-#}")):
        return match[0]
    # trim_blocks removes the newline after a comment, not after an expression; `indented` ends its lines itself.
    return f'{{{{ ({expression}) | indented("{match["indent"]}") }}}}{{# #}}'


def _marked(token: Token, template: str | None) -> Token:
    first, *others = token.value.split("\n")
    text = first
    for number, line in enumerate(others, token.lineno):
        text += f"\ue000{template}:{number}\ue001\n{line}"
    return Token(token.lineno, token.type, text)


def _blank(line: str) -> bool:
    return not _MARK.sub("", line).strip()
