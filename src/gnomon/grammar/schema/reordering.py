"""A lowered schema as a Lark grammar in which the keys of an object come in any order.

An object's rule carries one bit a key (llguidance's parametric rules): a key may come while its bit is clear, and the
object may close when the bits of the required keys are set. What cannot be said so (objects with patternProperties,
allOf, counts of keys, more than MOST_KEYS keys, ...) keeps the schema's order, and is named. Knows nothing of texts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gnomon.grammar.schema.bounds import escape
from gnomon.grammar.schema.patterns import escaped

MOST_KEYS = 60
_SILENT = frozenset(["$defs", "definitions", "$schema", "$id", "id", "$anchor"])
_OBJECT = _SILENT | {"type", "properties", "required", "additionalProperties"}
_ARRAY = _SILENT | {"type", "items", "minItems", "maxItems"}
_TEXT = r'/"(\\(["\\\/bfnrt]|u[a-fA-F0-9]{4})|[^"\\\x00-\x1F\x7F])*"/'


@dataclass(frozen=True)
class Reordered:
    """lark: the grammar. kept: paths of objects whose keys keep their order."""

    lark: str
    kept: tuple[str, ...]


def any_order(schema: Any, spaces: str | None) -> Reordered | None:
    """None where no object's order can be set free. spaces: a pattern of whitespace between tokens; None: none."""
    if not isinstance(schema, Mapping):
        return None
    rules = _Rules(schema, spaces)
    start = rules.value(schema, "#")
    if not rules.objects:
        return None
    lines = ["%llguidance {}", f"start: {start}", *rules.lines]
    return Reordered("\n".join(lines) + "\n", tuple(dict.fromkeys(rules.kept)))


@dataclass
class _Rules:
    root: Mapping[str, Any]
    spaces: str | None
    lines: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    objects: int = 0
    by_reference: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gap = "SPACE" if self.spaces else ""
        if self.spaces:
            self.lines.append(f"SPACE: /{self.spaces}/")

    def value(self, node: Any, path: str) -> str:
        """The name of a rule for this schema."""
        if not isinstance(node, Mapping):
            return self._leaf(node, path)
        reference = node.get("$ref")
        if isinstance(reference, str) and set(node) - _SILENT == {"$ref"}:
            return self._referred(reference, node, path)
        keys = set(node)
        if node.get("type") == "object" and keys <= _OBJECT and 0 < len(self._names(node)) <= MOST_KEYS:
            return self._object(node, path)
        if node.get("type") == "array" and keys <= _ARRAY and isinstance(node.get("items"), Mapping):
            return self._array(node, path)
        if isinstance(node.get("anyOf"), list) and keys - _SILENT == {"anyOf"}:
            made = [self.value(one, f"{path}/anyOf/{place}") for place, one in enumerate(node["anyOf"])]
            return self._add("either", " | ".join(made))
        return self._leaf(node, path)

    def _referred(self, reference: str, node: Mapping[str, Any], path: str) -> str:
        if reference in self.by_reference:
            return self.by_reference[reference]
        found, target = self._at(reference)
        if not found:
            return self._leaf(node, path)
        name = f"referred_{len(self.by_reference)}"
        self.by_reference[reference] = name
        self.lines.append(f"{name}: {self.value(target, reference)}")
        return name

    def _at(self, reference: str) -> tuple[bool, Any]:
        if not reference.startswith("#") or "%" in reference:
            return False, None
        value: Any = self.root
        for step in reference[1:].split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            if not isinstance(value, Mapping) or key not in value:
                return False, None
            value = value[key]
        return True, value

    @staticmethod
    def _names(node: Mapping[str, Any]) -> list[str]:
        """Required ones first."""
        properties = node.get("properties") or {}
        required = [name for name in dict.fromkeys(node.get("required", ())) if isinstance(name, str)]
        return [*required, *(name for name, value in properties.items() if name not in required and value is not False)]

    def _object(self, node: Mapping[str, Any], path: str) -> str:
        self.objects += 1
        properties, rest = node.get("properties") or {}, node.get("additionalProperties", True)
        names = self._names(node)
        required = len(dict.fromkeys(node.get("required", ())))
        number = len(self.lines)
        self.lines.append("")  # its place is taken before what stands in it
        values = [self.value(properties.get(name, rest), f"{path}/properties/{escape(name)}") for name in names]
        others = None if rest is False else self.value(rest, f"{path}/additionalProperties")
        if others is not None:
            known = "|".join(escaped(json.dumps(name, ensure_ascii=False)[1:-1]) for name in names)
            known = f' & ~/"({known})"/' if known else ""
            self.lines.append(f"OTHER_{number}: {_TEXT}{known}")
        first = self._members(f"first_{number}", f"more_{number}", names, values, others, required, number, "")
        more = self._members(f"more_{number}", f"more_{number}", names, values, others, required, number, '","')
        self.lines += [first, more]
        name = f"object_{number}"
        self.lines[number] = f'{name}: {self._said(chr(34) + "{" + chr(34))} first_{number}::0x0 "}}"'
        return name

    def _members(
        self,
        rule: str,
        more: str,
        names: list[str],
        values: list[str],
        others: str | None,
        required: int,
        number: int,
        comma: str,
    ) -> str:
        condition = f" %if is_ones([0:{required}])" if required else ""
        before = self._said(comma) + " " if comma else ""
        colon = self._said('":"')
        branches = [f'""{condition}']
        for place, (name, value) in enumerate(zip(names, values, strict=True)):
            key = json.dumps(json.dumps(name, ensure_ascii=False), ensure_ascii=False)
            branches.append(
                f"{before}{key} {self.gap} {colon} {value} {self.gap} {more}::set_bit({place}) %if bit_clear({place})"
            )
        if others is not None:
            branches.append(f"{before}OTHER_{number} {self.gap} {colon} {others} {self.gap} {more}::_")
        return f"{rule}::_: " + "\n  | ".join(branches)

    def _said(self, mark: str) -> str:
        """A mark and the whitespace behind it."""
        return f"{mark} {self.gap}".strip()

    def _array(self, node: Mapping[str, Any], path: str) -> str:
        before = self.objects
        item = self.value(node["items"], f"{path}/items")
        if self.objects == before and item not in self.by_reference.values():
            return self._leaf(node, path)
        least, most = int(node.get("minItems", 0)), node.get("maxItems")
        following = f"({self._said(chr(34) + ',' + chr(34))} {item} {self.gap})"
        times = f"{{{max(least - 1, 0)},{'' if most is None else int(most) - 1}}}"
        items = f"{item} {self.gap} {following}{times}"
        opened = self._said('"["')
        if most == 0:
            return self._add("array", f'{opened} "]"')
        return self._add("array", f'{opened} ({items}){"?" if least == 0 else ""} "]"')

    def _leaf(self, node: Any, path: str) -> str:
        if has_order(node):
            self.kept.append(path)
        schema: dict[str, Any] = dict(node) if isinstance(node, Mapping) else ({} if node else {"enum": []})
        if "$ref" in json.dumps(schema):
            schema |= {key: self.root[key] for key in ("$defs", "definitions", "components") if key in self.root}
        options: dict[str, Any] = {"whitespace_flexible": self.spaces is not None}
        if self.spaces is not None:
            options["whitespace_pattern"] = self.spaces
        return self._add("leaf", f"%json {json.dumps({**schema, 'x-guidance': options})}")

    def _add(self, kind: str, body: str) -> str:
        name = f"{kind}_{len(self.lines)}"
        self.lines.append(f"{name}: {body}")
        return name


def has_order(node: Any) -> bool:
    """Whether an object of several named keys stands in a schema (beside the definitions that it may not use)."""
    if isinstance(node, Mapping):
        properties = node.get("properties")
        if isinstance(properties, Mapping) and len(properties) > 1:
            return True
        return any(has_order(value) for key, value in node.items() if key not in _SILENT)
    return isinstance(node, list) and any(map(has_order, node))
