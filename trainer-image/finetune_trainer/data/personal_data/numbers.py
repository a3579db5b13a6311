"""Numbers with a rule of their own: phones, accounts, cards, national ids and addresses of machines.

Only numbers whose check digits are right count (python-stdnum, phonenumbers). Where these are weak or missing, a word
before the number must say what it is.
"""

import ipaddress
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import phonenumbers
import stdnum.at.vnr
import stdnum.au.tfn
import stdnum.be.nn
import stdnum.br.cpf
import stdnum.ca.sin
import stdnum.ch.ssn
import stdnum.de.idnr
import stdnum.dk.cpr
import stdnum.es.dni
import stdnum.es.nie
import stdnum.fi.hetu
import stdnum.fr.nir
import stdnum.iban
import stdnum.ie.pps
import stdnum.it.codicefiscale
import stdnum.luhn
import stdnum.nl.bsn
import stdnum.no.fodselsnummer
import stdnum.pl.pesel
import stdnum.se.personnummer
import stdnum.us.ssn
from finetune_api.dataset import PersonalDataKind as Kind

from finetune_trainer.data.personal_data.find import Detector, Match

CONTEXT_CHARACTERS = 40
"""How far before a number a word may stand that says what it is."""

NOT_DIGITS = re.compile(r"\D+")
NOT_ALPHANUMERIC = re.compile(r"[\W_]+")

# A phone number with its country, and one without; white space within may be unbreakable.
GAP = "[ \u00a0\u202f./()–-]"
INTERNATIONAL = re.compile(rf"(?<![\w+])(?:\+|00){GAP}?[1-9](?:{GAP}{{0,3}}[0-9]){{6,14}}(?!\w)")
NATIONAL = re.compile(  # all digits that stand together
    rf"(?<![\w+.,/$€£#-])(?<![0-9] )\(?[0-9](?:{GAP}{{0,3}}[0-9]){{6,13}}(?!\w|[.,][0-9]|{GAP}[0-9])"
)
LAST_GROUP = re.compile(r"\D+\d+$")
DATE = re.compile(r"(?:\d{1,2}([./-])\d{1,2}\1(?:19|20)\d\d|(?:19|20)\d\d([./-])\d{1,2}\2\d{1,2})(?!\d)")
US_ID = re.compile(r"\d{3}-\d\d-\d{4}")
DECIMAL = re.compile(r"\d*\.\d+$")
PHONE_WORDS = re.compile(  # tel, call and ring are in many another word
    r"\b(?:tel|tél|call|mobil|cell|sms|dial|ring|reach|handy|ruf|bel\b|ligu)|phone|fax|whatsapp|anruf|rückruf|notruf|durchwahl|"
    r"appel|joindre|llam|móvil|celular|chiam|gsm|zadzwo|kom[oó]rk|numéro|contact|kontakt",
    re.IGNORECASE,
)
OTHER_WORDS = re.compile(
    r"(?:order|invoice|ticket|reference|ref|serial|account|isbn|issn|sku|part|model|version|case|tracking|id|no|nr|number|"
    r"bestell\w*|rechnung\w*|auftrag\w*|kunden\w*|vorgang\w*|aktenzeichen|artikel\w*|commande|facture|référence|pedido|factura|"
    r"ordine|fattura|bestelling|factuur|zamówieni\w*|pesel|bsn|ssn|nummer|numer|número)[\s.:#°º-]*$",
    re.IGNORECASE,
)

CARD = re.compile(  # 4-4-4-4, 4-6-5
    r"(?<![\w.-])(?:[0-9]{4}([ -]?)[0-9]{4}\1[0-9]{4}\1[0-9]{2,7}|3[0-9]{3}([ -]?)[0-9]{6}\2[0-9]{4,5})(?!\w|[.-][0-9])"
)
CARD_BRAND = re.compile(
    r"4(?:\d{15}|\d{18})"  # Visa
    r"|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}"  # Mastercard
    r"|3[47]\d{13}"  # American Express
    r"|3(?:0[0-5]|[689]\d)\d{11}"  # Diners Club
    r"|(?:6011|64[4-9]\d|65\d\d)\d{12,15}"  # Discover
    r"|35(?:2[89]|[3-8]\d)\d{12}"  # JCB
    r"|62\d{14,17}"  # UnionPay
)

IBAN = re.compile(r"(?<![^\W_])[A-Z]{2}[0-9]{2}(?:[ \u00a0-]?[A-Z0-9]){11,30}")
IBAN_PARTS = re.compile(r"(\d+)!")

OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
IP_V4 = re.compile(rf"(?<![\w.-])(?<![a-zA-Z]/){OCTET}(?:\.{OCTET}){{3}}(?![\w-]|\.\d)")
IP_V6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{1,4})?(?::{1,2}[0-9A-Fa-f]{1,4}){2,7}(?:::)?(?![\w:])")
VERSION_WORDS = re.compile(
    r"(?:\b(?:versi[oó]n|versie|release|build|v|firmware|section|table|chapter|kapitel|abschnitt|tabelle|chapitre|apartado|"
    r"cap[ií]tulo|hoofdstuk)|§)[\s.:]*$",
    re.IGNORECASE,
)


def words_before(text: str, start: int) -> str:
    """What stands before a place, on the same line."""
    return text[max(0, start - CONTEXT_CHARACTERS) : start].rpartition("\n")[2]


def phone_detectors(countries: Collection[str]) -> Iterator[Detector]:
    """International numbers, and for each country those that are dialled within it."""
    yield Detector(Kind.PHONE, rf"(?:\+|00){GAP}?[1-9](?:{GAP}{{0,3}}\d){{6}}", _international)
    if countries:
        regions = [(country, _needs_zero(country)) for country in countries]
        yield Detector(Kind.PHONE, rf"\d(?:{GAP}{{0,3}}\d){{6}}", lambda text: _national(text, regions))


def _needs_zero(country: str) -> bool:
    metadata = phonenumbers.PhoneMetadata.metadata_for_region(country)
    return metadata is not None and metadata.national_prefix == "0"


def _international(text: str) -> Iterator[Match]:
    for found in INTERNATIONAL.finditer(text):
        number = found[0]
        while sum(map(str.isdigit, number)) > 7:
            dialled = number if number[0] == "+" else "+" + number[2:]
            value = _valid_phone(dialled, None)
            if value:
                opened = number.count(")") > number.count("(") and text[found.start() - 1 : found.start()] == "("
                yield Match(found.start() - opened, found.start() + len(number), Kind.PHONE, value)
                break
            shorter = LAST_GROUP.sub("", number)
            if shorter == number:
                break
            number = shorter


def _valid_phone(number: str, region: str | None) -> str | None:
    """In E.164, if it is one that is in use."""
    try:
        parsed = phonenumbers.parse(number, region)
    except phonenumbers.NumberParseException:
        return None
    valid = phonenumbers.is_valid_number_for_region(parsed, region) if region else phonenumbers.is_valid_number(parsed)
    return phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.E164) if valid else None


def _national(text: str, regions: list[tuple[str, bool]]) -> Iterator[Match]:
    for found in NATIONAL.finditer(text):
        number = found[0] if ")" in found[0] else found[0].removeprefix("(")
        if number.count("(") != number.count(")"):  # it is the end of another
            continue
        if DATE.match(number) or any(other.fullmatch(number) for other in (DECIMAL, IP_V4, US_ID)):
            continue
        before = words_before(text, found.start())
        called = PHONE_WORDS.search(before) is not None
        if not called and OTHER_WORDS.search(before):
            continue
        for region, needs_zero in regions:
            if not called and not _looks_dialled(number, needs_zero):
                continue
            value = _valid_phone(number, region)
            if value:
                yield Match(found.end() - len(number), found.end(), Kind.PHONE, value)
                break


def _looks_dialled(number: str, needs_zero: bool) -> bool:
    """Whether a number that nothing calls a phone number is written like one."""
    groups = len(NOT_DIGITS.split(number.strip("()")))
    if needs_zero:
        return number.lstrip("(").startswith("0") and (groups > 1 or len(number) >= 10)
    return groups > 2


def find_ibans(text: str) -> Iterator[Match]:
    for found in IBAN.finditer(text):
        candidate = _first_characters(found[0], _iban_length(found[0][:2]))
        if candidate:
            value = NOT_ALPHANUMERIC.sub("", candidate)
            if stdnum.iban.is_valid(value, check_country=False):
                yield Match(found.start(), found.start() + len(candidate), Kind.IBAN, value)


def _iban_length(country: str) -> int:
    """Characters of the country's IBANs; 0 if it has none."""
    ((_, info), *_) = stdnum.iban._ibandb.info(country + "00")
    return 4 + sum(map(int, IBAN_PARTS.findall(info.get("bban", "")))) if info else 0


def _first_characters(text: str, count: int) -> str:
    """The beginning with so many letters and digits; empty if there are less, or the next one belongs to it too."""
    for place, character in enumerate(text):
        count -= character.isalnum()
        if count == 0:
            return text[: place + 1] if not text[place + 1 : place + 2].isalnum() else ""
    return ""


def find_cards(text: str) -> Iterator[Match]:
    for found in CARD.finditer(text):
        value = NOT_DIGITS.sub("", found[0])
        if CARD_BRAND.fullmatch(value) and stdnum.luhn.is_valid(value) and len(set(value)) > 1:
            yield Match(found.start(), found.end(), Kind.CREDIT_CARD, value)


def find_ip_v4(text: str) -> Iterator[Match]:
    for found in IP_V4.finditer(text):
        address = ipaddress.IPv4Address(found[0])
        if _of_a_machine(address) and not VERSION_WORDS.search(words_before(text, found.start())):
            yield Match(found.start(), found.end(), Kind.IP_ADDRESS, str(address))


def find_ip_v6(text: str) -> Iterator[Match]:
    for found in IP_V6.finditer(text):
        groups = [group for group in found[0].split(":") if group]
        try:
            address = ipaddress.IPv6Address(found[0])
        except ValueError:
            continue
        if len(groups) > 2 and any(map(str.isdigit, found[0])) and _of_a_machine(address):
            yield Match(found.start(), found.end(), Kind.IP_ADDRESS, str(address))


def _of_a_machine(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Not one that every machine has."""
    everywhere = address.is_loopback or address.is_unspecified or address.is_multicast
    return not everywhere and int(address) != 0xFFFFFFFF and not (address.version == 4 and int(address) < 1 << 24)


@dataclass(frozen=True)
class NationalId:
    """`shape` is RE2. `words` (lower case): one must stand before a number of this shape, whose check is weak."""

    country: str
    shape: str
    is_valid: Callable[[str], bool]
    words: str = ""


def _is_nino(number: str) -> bool:
    """https://www.gov.uk/hmrc-internal-manuals/national-insurance-manual/nim39110"""
    return number[:2] not in ("BG", "GB", "KN", "NK", "NT", "TN", "ZZ")


_TAX_WORDS = "steuer|idnr|id-nr|tin|tax"
NATIONAL_IDS = (
    NationalId("AT", r"\d{4}[ -]?\d{6}", stdnum.at.vnr.is_valid, "sv-?nr|svnr|versicherung|sozialv"),
    NationalId("AU", r"\d{3}[ -]?\d{3}[ -]?\d{3}", stdnum.au.tfn.is_valid, "tfn|tax file"),
    NationalId("BE", r"\d{2}\.\d{2}\.\d{2}-\d{3}\.\d{2}", stdnum.be.nn.is_valid),
    NationalId("BE", r"\d{11}", stdnum.be.nn.is_valid, "rijksregister|registre national|national number|insz|niss"),
    NationalId("BR", r"\d{3}\.\d{3}\.\d{3}-\d{2}", stdnum.br.cpf.is_valid),
    NationalId("BR", r"\d{11}", stdnum.br.cpf.is_valid, "cpf"),
    NationalId("CA", r"\d{3}[ -]?\d{3}[ -]?\d{3}", stdnum.ca.sin.is_valid, r"\bsin\b|social insurance|\bnas\b"),
    NationalId("CH", r"756\.?\d{4}\.?\d{4}\.?\d{2}", stdnum.ch.ssn.is_valid),
    NationalId("DE", r"\d{2} \d{3} \d{3} \d{3}", stdnum.de.idnr.is_valid),
    NationalId("DE", r"\d{11}", stdnum.de.idnr.is_valid, _TAX_WORDS),
    NationalId("DK", r"\d{6}[ -]?\d{4}", stdnum.dk.cpr.is_valid, "cpr|personnummer"),
    NationalId("ES", r"\d{8}[ -]?[A-Z]", stdnum.es.dni.is_valid),
    NationalId("ES", r"[XYZ][ -]?\d{7}[ -]?[A-Z]", stdnum.es.nie.is_valid),
    NationalId("FI", r"\d{6}[-+A-FU-Y]\d{3}[0-9A-Y]", stdnum.fi.hetu.is_valid),
    NationalId("FR", r"[12] ?\d{2} ?\d{2} ?\d[\dAB] ?\d{3} ?\d{3} ?\d{2}", stdnum.fr.nir.is_valid),
    NationalId("GB", r"[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d{2} ?\d{2} ?\d{2} ?[A-D]", _is_nino),
    NationalId("IE", r"\d{7}[A-W][A-IW]?", stdnum.ie.pps.is_valid, "pps"),
    NationalId("IT", r"[A-Z]{6}\d{2}[A-Z]\d{2}[A-Z]\d{3}[A-Z]", stdnum.it.codicefiscale.is_valid),
    NationalId("NL", r"\d{4}\.?\d{2}\.?\d{3}", stdnum.nl.bsn.is_valid, "bsn|burgerservice|sofi"),
    NationalId("NO", r"\d{6} ?\d{5}", stdnum.no.fodselsnummer.is_valid),
    NationalId("PL", r"\d{11}", stdnum.pl.pesel.is_valid, "pesel"),
    NationalId("SE", r"(?:19|20)?\d{6}[-+]\d{4}", stdnum.se.personnummer.is_valid),
    NationalId("US", r"\d{3}-\d{2}-\d{4}", stdnum.us.ssn.is_valid),
    NationalId("US", r"\d{3} ?\d{2} ?\d{4}", stdnum.us.ssn.is_valid, "ssn|social security"),
)


def national_id_detectors(countries: Collection[str]) -> Iterator[Detector]:
    """Those of the countries; of none, all."""
    for wanted in NATIONAL_IDS:
        if not countries or wanted.country in countries:
            yield Detector(Kind.NATIONAL_ID, wanted.shape, _id_finder(wanted))


def _id_finder(wanted: NationalId) -> Callable[[str], Iterator[Match]]:
    shape = re.compile(rf"(?<![\w.-])(?:{wanted.shape})(?!\w|[.-]\d)", re.ASCII)
    words = re.compile(wanted.words)

    def find(text: str) -> Iterator[Match]:
        for found in shape.finditer(text):
            if words.search(words_before(text, found.start()).lower()) and wanted.is_valid(found[0]):
                value = NOT_ALPHANUMERIC.sub("", found[0])
                yield Match(found.start(), found.end(), Kind.NATIONAL_ID, value)

    return find
