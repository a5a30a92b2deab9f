"""Compiled grammars, the most recently used kept: a server sees the same schema again and again.

The key is the canonical text of the options; a vocabulary joins later, inside the Grammar, by its own hash.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from gnomon.grammar.compiling import compile as compile_grammar
from gnomon.grammar.grammar import Grammar
from gnomon.grammar.python_types import looks_like_type
from gnomon.grammar.tools import FORMS, tool_grammar

if TYPE_CHECKING:
    from gnomon.grammar.options import GrammarOptions, ToolCalls

KEPT = 256
_LOCK = threading.Lock()
_KNOWN: OrderedDict[str, Grammar] = OrderedDict()


def _of_tools(tools: ToolCalls) -> Grammar:
    form = FORMS[tools.form]
    return tool_grammar(tools.functions, form, choice=tools.choice, parallel=tools.parallel, content=tools.content)


def compiled(options: GrammarOptions) -> Grammar:
    """Raises GrammarError."""
    source = options.json_schema
    if isinstance(source, Grammar):
        return source
    arguments: dict[str, Any] = {"whitespace": options.whitespace, "formats": options.formats}
    if looks_like_type(source):
        return compile_grammar(type=source, **arguments)
    if options.tools is not None:
        arguments = {"tools": options.tools.model_dump()}
    for name, value in (
        ("schema", source),
        ("regex", options.regex),
        ("lark", options.lark),
        ("gbnf", options.gbnf),
        ("choices", options.choices),
    ):
        if value is not None:
            arguments[name] = value
    try:
        key = json.dumps(arguments)  # key order is part of it: it is the order of what is written
    except (TypeError, ValueError):
        return compile_grammar(**arguments)
    with _LOCK:
        if key in _KNOWN:
            _KNOWN.move_to_end(key)
            return _KNOWN[key]
    grammar = _of_tools(options.tools) if options.tools is not None else compile_grammar(**arguments)
    with _LOCK:
        _KNOWN[key] = grammar
        while len(_KNOWN) > KEPT:
            _KNOWN.popitem(last=False)
    return grammar
