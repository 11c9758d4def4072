"""MkDocs hook: equations become MathML when the site is built, so that pages need neither scripts nor a network."""

import html
import re

from latex2mathml.converter import convert


_EQUATION = re.compile(r'(<(span|div) class="arithmatex">)\\([(\[])(.*?)\\[)\]](</\2>)', re.DOTALL)


def on_page_content(content, page, config, files):
    return _EQUATION.sub(_as_mathml, content)


def _as_mathml(match):
    opening, _, bracket, latex, closing = match.groups()
    return opening + convert(html.unescape(latex), display="inline" if bracket == "(" else "block") + closing
