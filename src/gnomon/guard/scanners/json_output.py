"""JSON: the answer holds JSON that parses; simple damage (fences, trailing commas, missing ends) can be repaired."""

import json
import re

from gnomon.guard.scanning import Judgement, scanner


@scanner("json", about="Is valid JSON, with `required` keys; `repair` mends it.", directions=("output",), state="exact")
def json_output(text: str, *, prompt: str = "", required: tuple[str, ...] = (), repair: bool = True) -> Judgement:
    value, mended = _read(text), None
    if value is None and repair:
        mended = _mend(text)
        value = _read(mended)
    if value is None:
        return Judgement(1.0, "no JSON")
    missing = [key for key in required if not isinstance(value, dict) or key not in value]
    if missing:
        return Judgement(1.0, f"without {', '.join(missing)}")
    return Judgement(0.0, text=mended)


def _read(text: str) -> object | None:
    try:
        found: object = json.loads(text)
    except ValueError:
        return None
    return found


def _mend(text: str) -> str:
    """Fences and prose around it off, trailing commas out, what is open closed."""
    begin = min((place for sign in "{[" if (place := text.find(sign)) >= 0), default=0)
    end = max(text.rfind("}"), text.rfind("]"))
    body = text[begin : end + 1] if end > begin else text[begin:].rstrip("` \n")
    body = re.sub(r",(\s*[}\]])", r"\1", body)
    stack, quoted, escaped = [], False, False
    for character in body:
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = quoted
        elif character == '"':
            quoted = not quoted
        elif not quoted and character in "{[":
            stack.append("}" if character == "{" else "]")
        elif not quoted and character in "}]" and stack:
            stack.pop()
    return re.sub(r",\s*$", "", body + ('"' if quoted else "")) + "".join(reversed(stack))
