"""What is done with personal data: placeholders, pseudonyms, a rejection, or only a count."""

import hashlib
import hmac
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import phonenumbers
import re2
from finetune_api.constants import Reason
from finetune_api.dataset import PersonalDataAction as Action
from finetune_api.dataset import PersonalDataKind as Kind
from finetune_api.dataset import PersonalDataSpec
from finetune_api.plan import PlanPersonalData
from finetune_api.report import PersonalDataReport

from finetune_trainer.data.convert import Unwanted
from finetune_trainer.data.examples import Example, map_texts
from finetune_trainer.data.personal_data import credentials, numbers
from finetune_trainer.data.personal_data.find import Detector, Finder, Match
from finetune_trainer.data.personal_data.names import name_detector
from finetune_trainer.errors import UserError

KEY_FILE = "key"
KEY_BYTES = 16
PSEUDONYM_DIGITS = 16
REJECTED = "personal data"
CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=IP)(?=A)")


class PersonalDataLog:
    """Counts by kind; no value is kept."""

    def __init__(self, action: str | None = None) -> None:
        self._action = action
        self._rows = 0
        self.found: Counter[str] = Counter()

    def add(self, found: Counter[str]) -> None:
        if found:
            self._rows += 1
            self.found.update(found)

    def merge(self, other: "PersonalDataLog") -> None:
        self._action = self._action or other._action
        self._rows += other._rows
        self.found.update(other.found)

    def report(self) -> PersonalDataReport | None:
        """None if nothing was looked for."""
        if self._action is None:
            return None
        return PersonalDataReport(action=self._action, rows=self._rows, found=dict(self.found.most_common()))


class Protector:
    """dataset.personalData at work. Raises UserError (DataInvalid) for a missing key or a country without phones."""

    def __init__(self, plan: PlanPersonalData) -> None:
        self._settings = plan.settings
        self._finder = Finder([*detectors(plan.settings)])
        self._replace: Callable[[Match], str] = _placeholder
        if plan.settings.action is Action.PSEUDONYMIZE:
            self._replace = partial(_pseudonym, key=read_key(plan) or b"")

    def protect(self, example: Example, log: PersonalDataLog) -> Example | Unwanted:
        """The example without the personal data in its texts, or why it is left out."""
        found: Counter[str] = Counter()

        def protect(text: str) -> str:
            matches = self._finder.find(text)
            if not matches:
                return text
            found.update(match.kind for match in matches)
            return self._without(text, matches)

        protected = map_texts(example, protect)
        log.add(found)
        if found and self._settings.action is Action.REJECT:
            return Unwanted(REJECTED, ", ".join(f"{kind} {count}" for kind, count in found.most_common()))
        return protected

    def _without(self, text: str, matches: list[Match]) -> str:
        if self._settings.action in (Action.KEEP, Action.REJECT):
            return text
        parts, end = [], 0
        for match in matches:
            parts += [text[end : match.start], self._replace(match)]
            end = match.end
        return "".join([*parts, text[end:]])


def detectors(settings: PersonalDataSpec) -> Iterator[Detector]:
    """All that the settings ask for."""
    countries = settings.countries or []
    for country in countries:
        if country not in phonenumbers.SUPPORTED_REGIONS:
            raise UserError(
                Reason.DATA_INVALID,
                f"dataset.personalData.countries: {country} is no country; write ISO 3166 codes, like DE and GB",
            )
    every = (
        Detector(Kind.EMAIL, "@", credentials.find_emails),
        Detector(Kind.IBAN, "[A-Z]{2}[0-9]{2}[ \u00a0-]?[A-Z0-9]", numbers.find_ibans),
        Detector(Kind.CREDIT_CARD, r"\d{4}[ -]?\d{4,6}[ -]?\d{4}", numbers.find_cards),
        *numbers.national_id_detectors(countries),
        Detector(Kind.IP_ADDRESS, r"\d\.\d{1,3}\.\d{1,3}\.\d", numbers.find_ip_v4),
        Detector(Kind.IP_ADDRESS, r":[0-9A-Fa-f]{0,4}:[0-9A-Fa-f]", numbers.find_ip_v6),
        Detector(Kind.URL_CREDENTIALS, r"://[^\s/@]*:[^\s/@]*@", credentials.find_url_users),
        Detector(Kind.URL_CREDENTIALS, r"[?&;#][A-Za-z_.-]+=", credentials.find_url_parameters),
        Detector(Kind.SECRET, credentials.KNOWN_SECRET_TRIGGER, credentials.find_known_secrets),
        Detector(Kind.SECRET, credentials.PRIVATE_KEY_TRIGGER, credentials.find_private_keys),
        Detector(Kind.SECRET, credentials.NAMED_SECRET_TRIGGER, credentials.find_named_secrets),
        *numbers.phone_detectors(countries),  # last: of two kinds for the same digits, the one that is harder to meet
    )
    yield from (one for one in every if one.kind in (settings.kinds or Kind))
    if Kind.PERSON_NAME in (settings.kinds or ()):
        yield name_detector()
    for own in settings.patterns or ():
        # no trigger: what a user's pattern costs in one automaton with all others cannot be foreseen
        yield Detector(own.name, "", partial(_find_pattern, name=own.name, pattern=re2.compile(own.pattern)))


def _find_pattern(text: str, name: str, pattern: "re2._Regexp") -> Iterator[Match]:
    for found in pattern.finditer(text):
        if found.end() > found.start():
            yield Match(found.start(), found.end(), name, found[0])


def _label(kind: str) -> str:
    return CAPITAL.sub("_", kind).upper()


def _placeholder(match: Match) -> str:
    return f"[{_label(match.kind)}]"


def _pseudonym(match: Match, key: bytes) -> str:
    """The same for the same value, whatever its spelling; without the key it tells nothing."""
    digest = hmac.new(key, f"{match.kind}\0{match.value}".encode(), hashlib.sha256).hexdigest()
    return f"[{_label(match.kind)}_{digest[:PSEUDONYM_DIGITS]}]"


def read_key(plan: PlanPersonalData) -> bytes | None:
    """The key of the pseudonyms; None if the action needs none. Raises UserError (DataInvalid) if it is missing."""
    if plan.settings.key_secret_ref is None:
        return None
    name = plan.settings.key_secret_ref.name
    field = "dataset.personalData.keySecretRef"
    if plan.key_dir is None:
        raise UserError(Reason.DATA_INVALID, f"{field}: say which folder stands for the Secret: --secret {name}=FOLDER")
    file = Path(plan.key_dir) / KEY_FILE
    key = file.read_bytes().strip() if file.is_file() else b""
    if len(key) < KEY_BYTES:
        found = f"its entry '{KEY_FILE}' has {len(key)} bytes" if key else f"has no entry '{KEY_FILE}'"
        raise UserError(Reason.DATA_INVALID, f"{field}: the Secret {name} {found}; at least {KEY_BYTES} are needed")
    return key
