"""Bias: sweeping statements about groups of people, by sentence shapes. A baseline, not measured."""

import re

from gnomon.guard.scanning import Judgement, scanner

GROUP = (
    r"(?:wom[ae]n|men|girls|boys|immigrants|foreigners|muslims|jews|christians|blacks|whites|asians|arabs|gays"
    r"|old people|young people|poor people|refugees|the disabled|americans|mexicans|africans)"
)
SHAPES = [
    rf"\b(?:all|most|typical(?:ly)?|those)\s+{GROUP}\s+(?:are|do|can|lie|steal|never|always)\b",
    rf"\b{GROUP}\s+(?:are|is)\s+(?:all\s+|naturally\s+|inherently\s+)?"
    r"(?:lazy|stupid|inferior|criminals|bad at|weaker|dangerous|dirty)\b",
    rf"\b{GROUP}\s+(?:should not|shouldn't|belong in|cannot|can't)\s+(?:work|vote|lead|drive|the kitchen|be trusted)\b",
]


@scanner("bias", about="Sweeping statements about groups of people (sentence shapes).")
def bias(text: str, *, prompt: str = "") -> Judgement:
    found = sum(bool(re.search(shape, text, re.IGNORECASE)) for shape in SHAPES)
    return Judgement(min(1.0, 0.7 * found))
