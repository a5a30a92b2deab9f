"""Check digits and structures of numbers, from their public standards. Text in, whether it holds out."""

from __future__ import annotations

import hashlib

IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28,
    "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
    "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20,
    "LU": 20, "LV": 21, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18, "NO": 15,
    "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SE": 24, "SI": 19,
    "SK": 24, "SM": 27, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20,
    "LY": 25, "SD": 18, "BI": 27, "DJ": 27, "RU": 33, "SO": 23, "NI": 28, "MN": 20, "FK": 18, "OM": 23, "YE": 30,
}  # fmt: skip
"""Characters of an IBAN by country (ISO 13616 registry)."""
BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
BECH32 = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"


def luhn(text: str) -> bool:
    """The check digit of payment cards (ISO/IEC 7812-1), separators ignored; no card has one digit only."""
    digits = [int(c) for c in text if c.isdigit()]
    if len(set(digits)) < 2:
        return False
    doubled = [d if place % 2 == 0 else sum(divmod(2 * d, 10)) for place, d in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0


def iban(text: str) -> bool:
    """Country, length and ISO 7064 mod 97-10."""
    plain = "".join(c for c in text.upper() if c.isalnum())
    if len(plain) != IBAN_LENGTHS.get(plain[:2]):
        return False
    return int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def ssn(text: str) -> bool:
    """A US social security number in one consistent notation that was not ruled out by the SSA's public rules."""
    digits = "".join(c for c in text if c.isdigit())
    separators = {c for c in text if not c.isdigit()}
    if len(digits) != 9 or len(separators) > 1 or len(set(digits)) == 1:
        return False
    area, group, serial = digits[:3], digits[3:5], digits[5:]
    ruled_out = digits in ("123456789", "987654320", "078051120")
    return area not in ("000", "666") and area[0] != "9" and group != "00" and serial != "0000" and not ruled_out


def bitcoin(text: str) -> bool:
    """A Bitcoin address: base58check (P2PKH, P2SH) or bech32/bech32m (BIP 173, BIP 350)."""
    return _bech32(text) if text[:3].lower() == "bc1" else _base58check(text)


def _base58check(text: str) -> bool:
    number = 0
    for character in text:
        if (digit := BASE58.find(character)) < 0:
            return False
        number = number * 58 + digit
    if number >= 1 << 200:
        return False
    raw = number.to_bytes(25, "big")
    return hashlib.sha256(hashlib.sha256(raw[:21]).digest()).digest()[:4] == raw[21:]


def _bech32(text: str) -> bool:
    if text not in (text.lower(), text.upper()):
        return False
    head, _, data = text.lower().rpartition("1")
    values = [BECH32.find(c) for c in data]
    if -1 in values or len(values) < 6:
        return False
    checked = [ord(c) >> 5 for c in head] + [0] + [ord(c) & 31 for c in head] + values
    polynomial = 1
    for value in checked:
        top = polynomial >> 25
        polynomial = (polynomial & 0x1FFFFFF) << 5 ^ value
        for place, generator in enumerate((0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)):
            if top >> place & 1:
                polynomial ^= generator
    return polynomial == (1 if values[0] == 0 else 0x2BC830A3)
