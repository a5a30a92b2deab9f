"""A Plan: what compiling a grammar found, as plain values, for another process or another day.

The expensive part is the search: routes tried, normal forms, a shortest text. What a plan leaves to be made anew is
cheap: the validators of the schema as it is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from gnomon.grammar.calls import FORMS
from gnomon.grammar.compiling import compile as compile_grammar
from gnomon.grammar.compiling import pattern_hints, read_schema
from gnomon.grammar.grammar import Grammar
from gnomon.grammar.report import Report
from gnomon.grammar.schema.bounds import checked
from gnomon.grammar.schema.validators import Validators
from gnomon.grammar.tools import NO_PARAMETERS, CallChecks, custom_tool, tool_grammar
from gnomon.models.tokenizer import Tokenizer

Arguments = Mapping[str, Any]
"""compile()'s keywords as JSON values; or `tools`: the fields of ToolCalls."""


class Plan(BaseModel):
    """shortest: a shortest text; None where none was found."""

    model_config = ConfigDict(frozen=True)

    mask: str
    report: Report
    shortest: str | None


def make(arguments: Arguments, tokenizer: Tokenizer | None = None) -> Grammar:
    """Compile from nothing. Raises GrammarError."""
    if "tools" not in arguments:
        return compile_grammar(**arguments, tokenizer=tokenizer)
    tools = arguments["tools"]
    functions, form = tools["functions"], FORMS[tools["form"]]
    choice, parallel, content = tools["choice"], tools["parallel"], tools["content"]
    return tool_grammar(functions, form, choice=choice, parallel=parallel, content=content)


def plan_of(grammar: Grammar) -> Plan:
    """Everything there is to know beforehand, the shortest text included."""
    return Plan(mask=grammar.mask, report=grammar.report, shortest=grammar.known_shortest())


def restore(arguments: Arguments, plan: Plan) -> Grammar:
    """The grammar that `make(arguments)` would give."""
    if "tools" in arguments:
        tools = arguments["tools"]
        form = FORMS[tools["form"]]
        by_name = {
            tool["name"]: (
                custom_tool(place, tool["custom"], form).grammar
                if "custom" in tool
                else _validators(tool.get("parameters"))
            )
            for place, tool in enumerate(tools["functions"])
        }
        content = None if tools["content"] is None else _validators(tools["content"])
        checks = CallChecks(by_name, form, content)
        made = Grammar(plan.mask, plan.report, checks=checks, source=tools["functions"], controls=form.controls)
    elif "schema" in arguments:
        schema = read_schema(arguments["schema"])
        validators = Validators(checked(schema), arguments.get("registry"), arguments.get("formats") != "annotate")
        validators.watch(plan.report.post_validated)
        unsatisfiable = plan.report.unsatisfiable
        made = Grammar(plan.mask, plan.report, unsatisfiable=unsatisfiable, validators=validators, source=schema)
    elif "structural_tag" in arguments:
        made = make(arguments)
    else:
        source = next(arguments[kind] for kind in ("regex", "lark", "gbnf", "ebnf", "choices") if kind in arguments)
        hints = pattern_hints(arguments["regex"]) if "regex" in arguments else None
        made = Grammar(plan.mask, plan.report, unsatisfiable=plan.report.unsatisfiable, checks=hints, source=source)
    made.remember(plan.shortest)
    return made


def _validators(schema: Any) -> Validators:
    return Validators(checked(NO_PARAMETERS if schema is None else schema), None, True)
