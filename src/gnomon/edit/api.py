"""`edit(model, facts)`: facts in, a Patch out, with a report of what the model said before and says now.

The model itself is never changed. Ties together parsing, subjects, the method and the report; knows no method's inside.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gnomon.edit.editor import Editor
from gnomon.edit.evaluation import say
from gnomon.edit.facts import Fact, check_batch, parse_fact
from gnomon.edit.memory import Memory
from gnomon.edit.moments import SELF
from gnomon.edit.probing import probed
from gnomon.edit.registry import MethodOptions
from gnomon.edit.registry import method as named_method
from gnomon.edit.subject import with_subject
from gnomon.errors import EditError, UsageError
from gnomon.models.patch import Patch
from gnomon.version import __version__

if TYPE_CHECKING:
    from gnomon.model import Model

FactLike = Fact | str | Mapping[str, Any]


def edit(
    model: Model,
    facts: FactLike | Iterable[FactLike],
    *,
    method: str = "rome",
    layers: Sequence[int] | int | None = None,
    subject: str | None = None,
    moments: str | None = None,
    tokens: int | None = None,
    seed: int = 0,
    report: bool = True,
    **hyper: Any,
) -> Patch:
    """Change what a model knows, as a patch.

    facts: Fact objects, "PROMPT -> TARGET" strings or mappings, one or several. layers: where (default: the model's
    profile; a model without one is probed once). subject: of the only fact, where it is not to be found automatically.
    moments: the text whose keys must not be disturbed: "self" (default: sampled from the model), a text file, or
    "identity"; tokens: how many of it (default: the profile's). report: also generate before and after. hyper: the
    method's own options (`gnomon edit methods NAME`).
    Raises UsageError for facts or options that cannot be used, EditError when no change could be found.
    """
    chosen = named_method(method)
    wanted = as_facts(facts, subject=subject)
    check_batch(wanted)
    given = {"layers": [layers] if isinstance(layers, int) else list(layers) if layers is not None else None, **hyper}
    given = {key: value for key, value in given.items() if value is not None}
    chosen.parse(given)  # what is wrong is said before anything is computed
    own = Editor.of(model, corpus=moments or SELF, tokens=tokens, seed=seed)
    if chosen.on == "activations":
        own.wrappable(method)
    elif "layers" not in given and not own.profile.measured:
        own.profile = probed(own)
    options = chosen.parse({**own.profile.defaults(method), **given})
    wanted = [with_subject(model, fact) for fact in wanted] if chosen.answers else wanted
    started = time.perf_counter()
    try:
        with own.standing_on(model.worn):
            change = chosen.run(own, wanted, options)
    except MemoryError:
        raise EditError("Not enough memory for this edit; nothing was changed.", hint="Edit fewer facts.") from None
    seconds = time.perf_counter() - started
    metadata = _metadata(own, wanted, method, options, change.about)
    wrappers = {one.name: one for one in change.wrappers}
    patch = Patch(change.deltas, model.checkpoint.identity, metadata, {}, change.attachments, wrappers)
    facts_report = [
        {**fact.as_dict(), **(change.notes[i] if i < len(change.notes) else {})} for i, fact in enumerate(wanted)
    ]
    if report:
        for told, fact, texts in zip(facts_report, wanted, say(model, patch, wanted), strict=True):
            told |= texts | ({"holds": _holds(texts, fact)} if chosen.answers else {})
    return patch.with_report(facts=facts_report, seconds=round(seconds, 3))


def remember(
    model: Model,
    facts: FactLike | Iterable[FactLike],
    *,
    method: str = "ike",
    embedder: str | None = None,
    report: bool = True,
    **options: Any,
) -> Memory:
    """Facts kept beside a model instead of in its weights, as a value that `evaluate` and `generate` take.

    method: `gnomon edit methods` lists them. embedder: the model that looks facts up (default: the zoo's small
    sentence encoder; "self": the model itself). report: also generate before and after. options: the method's own.
    Use it: `model.generate(prompt, remember=memory.as_options())`, or save it and say `--remember @FILE`.
    """
    from gnomon.edit.remembering import EMBEDDER, method_of_memory

    method_of_memory(method).parse(options)
    wanted = as_facts(facts)
    check_batch(wanted)
    memory = Memory(tuple(wanted), method, options, embedder or EMBEDDER)
    if not report:
        return memory
    told = [fact.as_dict() for fact in wanted]
    for one, fact, texts in zip(told, wanted, say(model, memory, wanted), strict=True):
        one |= texts | {"holds": _holds(texts, fact)}
    return replace(memory, report={"facts": told})


def as_facts(facts: FactLike | Iterable[FactLike], *, subject: str | None = None) -> list[Fact]:
    """Whatever names facts, as Facts. Raises UsageError."""
    several = [facts] if isinstance(facts, Fact | str | Mapping) else list(facts)
    found = [_as_fact(one) for one in several]
    if subject is not None:
        if len(found) != 1:
            raise UsageError(f"`subject` is for one fact; {len(found)} were given.", param="subject")
        found = [found[0].with_subject(subject)]
    return found


def _as_fact(given: FactLike) -> Fact:
    if isinstance(given, Fact):
        return given
    if isinstance(given, str):
        return parse_fact(given)
    from gnomon.edit.formats import fact_of

    return fact_of(given)


def _metadata(
    editor: Editor, facts: Sequence[Fact], name: str, options: MethodOptions, about: Mapping[str, Any]
) -> dict[str, Any]:
    used = {layer: editor.moment(layer) for layer in editor._moments}
    return {
        "kind": "edit",
        "method": name,
        "options": options.model_dump(mode="json"),
        "facts": [fact.as_dict() for fact in facts],
        "moments": {str(layer): {"corpus": m.corpus, "tokens": m.tokens} for layer, m in used.items()},
        "seed": editor.seed,
        "made_by": f"gnomon {__version__}",
        **about,
    }


def _holds(texts: Mapping[str, Any], fact: Fact) -> bool:
    from gnomon.edit.protocols import says

    return says(texts["after"], (fact.target,))
