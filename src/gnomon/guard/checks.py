"""What a found text must pass before it counts: entropy, digits, check digits, a real phone number.

A check is a function of the found text alone. Knows nothing of patterns.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from typing import Any

from gnomon.errors import ConfigError, MissingExtra
from gnomon.guard import checksums

NATIONAL = {
    "aba": "us.rtn", "abn": "au.abn", "acn": "au.acn", "tfn": "au.tfn", "nhs": "gb.nhs", "fiscale": "it.codicefiscale",
    "vat_it": "it.iva", "nif": "es.nif", "nie": "es.nie", "pesel": "pl.pesel",
    "aadhaar": "in_.aadhaar", "pan": "in_.pan", "hetu": "fi.hetu", "steuer_id": "de.idnr",
    "bsn": "nl.bsn", "nir": "fr.nir", "cpf": "br.cpf", "cnpj": "br.cnpj", "rrn": "kr.rrn", "itin": "us.itin",
    "ssn": "us.ssn", "utr": "gb.utr", "personnummer": "se.personnummer", "isin": "isin", "bic": "bic", "vat": "eu.vat",
    "imei": "imei", "ahv": "ch.ssn", "gstin": "in_.gstin", "cpr": "dk.cpr", "rfc": "mx.rfc",
    "curp": "mx.curp", "tckimlik": "tr.tckimlik", "sin": "ca.sin", "idcard_cn": "cn.ric", "mynumber": "jp.in_",
}  # fmt: skip
"""Check name -> module of python-stdnum (extra `guard`)."""

DATE = re.compile(r"(?:19|20)\d\d[-./ ][01]?\d[-./ ][0-3]?\d(?!\d)|[0-3]?\d[-./][01]?\d[-./](?:19|20)\d\d(?!\d)")


@dataclass(frozen=True)
class Check:
    """All of these must hold."""

    entropy: float = 0.0
    digits: int = 0
    stopwords: tuple[str, ...] = ()
    name: str = ""

    def __call__(self, text: str) -> bool:
        if self.entropy and not varied(text, self.entropy):
            return False
        if self.digits and next(islice(filter(str.isdigit, text), self.digits - 1, None), None) is None:
            return False
        if self.stopwords:
            lower = text.lower()
            for word in self.stopwords:
                if word in lower:
                    return False
        return CHECKS[self.name](text) if self.name else True


def make_check(keys: Mapping[str, Any], where: str) -> Check | None:
    """The check that a rule's keys describe, or None. Raises ConfigError."""
    name = str(keys.get("check", ""))
    if name and name not in CHECKS:
        raise ConfigError(f"{where}: no check `{name}`.", hint=f"Known: {', '.join(sorted(CHECKS))}.", param="check")
    stopwords = tuple(str(word).lower() for word in keys.get("stopwords", ()))
    check = Check(float(keys.get("entropy", 0.0)), int(keys.get("digits", 0)), stopwords, name)
    if name in NATIONAL and find_spec("stdnum") is None:
        raise MissingExtra(f"The check `{name}`", "guard")
    return None if check == Check() else check


_BITS = [0.0, *(n * math.log2(n) for n in range(1, 128))]


def shannon(text: str) -> float:
    """Bits per character of the text's own distribution."""
    total = len(text)
    if not total:
        return 0.0
    if total < len(_BITS):
        return math.log2(total) - sum(map(_BITS.__getitem__, map(text.count, dict.fromkeys(text)))) / total
    return math.log2(total) - sum(n * math.log2(n) for n in Counter(text).values()) / total


def varied(text: str, entropy: float) -> bool:
    """Whether shannon(text) >= entropy; mostly seen from how many different characters there are.

    With d different ones among n, entropy is least when one of them takes all the other places.
    """
    total = len(text)
    if 0 < total < len(_BITS):
        often = total - len(set(text)) + 1
        if (_BITS[total] - _BITS[often]) / total > entropy + 1e-9:
            return True
    return shannon(text) >= entropy


def ip(text: str) -> bool:
    """An IPv4 or IPv6 address, with or without a prefix length, that can be somebody's."""
    import ipaddress

    try:
        address = ipaddress.ip_interface(text.partition("%")[0])
    except ValueError:
        return False
    return not (address.ip.is_loopback or address.ip.is_unspecified)  # these are nobody's


def phone(text: str) -> bool:
    """A number that some country's numbering plan allows; without a leading + it must look like one."""
    import phonenumbers

    digits = sum(c.isdigit() for c in text)
    regions = (
        (None,) if text.lstrip("( ").startswith("+") else ("US", "GB", "DE", "FR", "IL", "IN", "CA", "BR", "AU", "CH")
    )
    if digits < 7 or digits > 17 or DATE.match(text):
        return False
    for region in regions:
        try:
            number = phonenumbers.parse(text, region)
        except phonenumbers.NumberParseException:
            continue
        if phonenumbers.is_valid_number(number) or (region in (None, "US") and phonenumbers.is_possible_number(number)):
            return True
    return False


def base64_text(text: str) -> bool:
    """Base64 that decodes to printable ASCII with a colon: user:password."""
    import base64

    try:
        plain = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        return False
    return b":" in plain and all(32 <= byte < 127 for byte in plain)


def _national(module: str) -> Callable[[str], bool]:
    def check(text: str) -> bool:
        valid: Callable[[str], bool] = import_module(f"stdnum.{module}").is_valid
        return bool(valid(text))

    return check


CHECKS: dict[str, Callable[[str], bool]] = {name: _national(module) for name, module in NATIONAL.items()}
CHECKS |= {"ip": ip, "phone": phone, "basic_auth": base64_text}
CHECKS |= {check.__name__: check for check in (checksums.luhn, checksums.iban, checksums.ssn, checksums.bitcoin)}
