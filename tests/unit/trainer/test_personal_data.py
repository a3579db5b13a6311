"""dataset.personalData: what is found, what is not, what takes its place, and that the originals are gone."""

import json
import logging
import time
from pathlib import Path

import pytest
from finetune_api.constants import Stage
from finetune_api.dataset import PersonalDataKind, PersonalDataSpec
from finetune_api.plan import PlanPersonalData
from finetune_api.report import DataReport
from finetune_api.spec import Task
from finetune_trainer.data.convert import Unwanted
from finetune_trainer.data.examples import Conversation, LabelledText, PlainText, Preference, PromptCompletion, Turn
from finetune_trainer.data.personal_data.find import Finder
from finetune_trainer.data.personal_data.protect import PersonalDataLog, Protector, detectors
from finetune_trainer.data.store import open_split
from finetune_trainer.errors import UserError
from finetune_trainer.prepare import run
from finetune_trainer.telemetry import Telemetry
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from benchmarks.personal_data import finder, score, seeded
from tests.models import save_tiny_llama
from tests.plans import make_plan

COUNTRIES = [
    "US",
    "GB",
    "DE",
    "FR",
    "ES",
    "IT",
    "NL",
    "PL",
    "SE",
    "BE",
    "FI",
    "NO",
    "BR",
    "CA",
    "CH",
    "AT",
    "AU",
    "DK",
    "IE",
]
ANYWHERE = Finder([*detectors(PersonalDataSpec(action="Keep"))])
EVERYWHERE = Finder([*detectors(PersonalDataSpec(action="Keep", countries=COUNTRIES))])
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
KEY_BLOCK = "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA7v\nq+/=\n-----END RSA PRIVATE KEY-----"


def found(text: str, finder: Finder = EVERYWHERE) -> list[tuple[str, str]]:
    return [(str(match.kind), text[match.start : match.end]) for match in finder.find(text)]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("Email", "write to «Anna.Schmidt+news@firma-beispiel.de»."),
        ("Email", "(«müller@bücher.example»)"),
        ("Email", "mailto:«o'neil_99@mail.example.co.uk»?subject=x"),
        ("Phone", "call «+49 (0)30 901820» today"),
        ("Phone", "or «+1 212 555 2368», ext. 5"),
        ("Phone", "dial «0044 20 7946 0958»"),
        ("Phone", "«(212) 555-2368»"),
        ("Phone", "Handy: «01712345678»"),
        ("Phone", "au «01 42 68 53 00» svp"),
        ("Phone", "unter «0711 / 50 88 91 40» zu erreichen"),
        ("Phone", "Llámenos: «(+34) 911 23 45 67»."),
        ("IBAN", "IBAN «DE89 3704 0044 0532 0130 00» BIC COBADEFFXXX"),
        ("IBAN", "to «GB82WEST12345698765432»."),
        ("IBAN", "«NO93 8601 1117 947»"),
        ("CreditCard", "«4111 1111 1111 1111»"),
        ("CreditCard", "amex «3782-822463-10005», exp 12/27"),
        ("CreditCard", "«5555555555554444»"),
        ("NationalId", "SSN «123-45-6789»"),
        ("NationalId", "social security number «123456789»"),
        ("NationalId", "NI number «AB 12 34 56 C»"),
        ("NationalId", "Steuer-ID «36574261809»"),
        ("NationalId", "«36 574 261 809»"),
        ("NationalId", "NIR «1 85 05 78 006 084 91»"),
        ("NationalId", "DNI «12345678Z» y NIE «X1234567L»"),
        ("NationalId", "CF «RSSMRA85T10A562S»"),
        ("NationalId", "BSN «111222333»"),
        ("NationalId", "PESEL «44051401458»"),
        ("NationalId", "personnummer «811218-9876»"),
        ("NationalId", "henkilötunnus «131052-308T»"),
        ("NationalId", "CPF «390.533.447-05»"),
        ("NationalId", "AHV «756.9217.0769.85»"),
        ("IPAddress", "from «93.184.216.34»: refused"),
        ("IPAddress", "[«2001:db8::ff00:42:8329»]:443"),
        ("UrlCredentials", "postgres://«app:s3cretpw@db.internal:5432»/x"),
        ("UrlCredentials", "https://host/x?id=1&token=«abc123def456»&y"),
        ("UrlCredentials", "https://host/x?key=«q8Zr27LmPx90», and ftp://«a:s3cretpw@host.example»."),
        ("Secret", "«AKIAIOSFODNN7EXAMPLQ»"),
        ("Secret", "«ghp_abcdefghijklmnopqrstuvwxyzABCDEF1234»"),
        ("Secret", "Bearer «" + JWT + "»"),
        ("Secret", "key:\n«" + KEY_BLOCK + "»\nend"),
        ("Secret", 'AWS_SECRET_ACCESS_KEY="«wJalrXUtnFEMI/K7MDENG/bPxRfiCYzzzzzzKEY»"'),
        ("Secret", "password: «Tr0ub4dor&3», please"),
        ("Secret", "Passwort ist «Geheim!2024»."),
        ("Secret", "Het wachtwoord is «Fiets!Bel99»"),
        ("Secret", "«sk_live_4eC39HqLyjWDarjtT1zdp7dc»"),
    ],
)
def test_what_is_personal_is_found_and_nothing_beside_it(kind, text):
    values = [part.partition("»")[0] for part in text.split("«")[1:]]
    assert found(text.replace("«", "").replace("»", "")) == [(kind, value) for value in values]


@pytest.mark.parametrize(
    "text",
    [
        "on 2023-11-05 at 12:30:45, 05.11.2023 14:30, 11/05/2023",
        "ISBN 978-3-16-148410-0 and EAN 4006381333931",
        "version 1.2.3.4, v10.0.0.1, Chrome/120.0.0.0, section 1.2.3.4",
        "127.0.0.1, 0.0.0.0, 255.255.255.255, 1.2.3.4.5, 999.1.1.1",
        "12:30:45, std::vector, a::b, ::1, 00:1A:2B:3C:4D:5E",
        "IBAN DE89 3704 0044 0532 0130 01 and XX00 1234 5678 9012 34",
        "4111 1111 1111 1112, 1234 5678 9012 3452, order 4111111111111112",
        "SSN 000-12-3456 and 900-12-3456, part 12-345-6789, DNI 12345678A",
        "order number 212 555 2368, Rechnung 030 901820, ticket #1234567890",
        "Bestellnummer 57549285017, Bestelling 4500 118 233",
        "versión 6.1.0.12, Versie 4.0.12.7, Abschnitt 4.3.2.1, Hoofdstuk 2.3.4.5, table 4.1.2.3",
        "git@github.com:owner/repository.git, logo@2x.png, @mention, a@b, foo@bar",
        "3f786850e387550fdab836ed7e6dc881de23001b, 123e4567-e89b-12d3-a456-426614174000",
        "$1,234,567.89, 1 234 567,00 €, 0.123456789, 1.234.567",
        "password: ${DB_PASSWORD}, token = os.environ['TOKEN1234'], api_key: <your-key-123>, the token is expired",
        "https://host/x?page=2&key=ab https://user:${PASS}@host/ http://host:8080/@scope",
        "PESEL 44051401459, BSN 111222334, Steuer-ID 36574261808, and of no meaning that we know: 36574261809",
    ],
)
def test_what_only_looks_personal_is_left_alone(text):
    assert found(text) == []


def test_phones_of_a_country_and_ids_need_the_country():
    assert found("call 030 901820", ANYWHERE) == []
    assert found("call +49 30 901820", ANYWHERE) == [("Phone", "+49 30 901820")]
    swiss = Finder([*detectors(PersonalDataSpec(action="Keep", countries=["CH"]))])
    assert found("123-45-6789 756.9217.0769.85", swiss) == [("NationalId", "756.9217.0769.85")]
    with pytest.raises(UserError, match="XX is no country"):
        list(detectors(PersonalDataSpec(action="Keep", countries=["XX"])))


def test_only_the_kinds_that_are_asked_for_are_found_and_patterns_always():
    wanted = PersonalDataSpec(
        action="Keep",
        kinds=["Email"],
        patterns=[{"name": "STAFF", "pattern": "E-[0-9]+"}, {"name": "NOTHING", "pattern": "q*"}],
    )
    text = "é a@b.example, +49 30 901820, E-77"
    assert found(text, Finder([*detectors(wanted)])) == [("Email", "a@b.example"), ("STAFF", "E-77")]


def test_values_that_overlap_are_covered_together_and_called_after_the_longest():
    own = PersonalDataSpec(action="Keep", patterns=[{"name": "OWN", "pattern": "x@b.example, y"}])
    assert found("x@b.example, y", Finder([*detectors(own)])) == [("OWN", "x@b.example, y")]
    crossing = PersonalDataSpec(action="Keep", patterns=[{"name": "OWN", "pattern": "example, y"}])
    assert found("x@b.example, y", Finder([*detectors(crossing)])) == [("Email", "x@b.example, y")]


def protector(tmp_path: Path | None = None, **settings) -> Protector:
    return Protector(PlanPersonalData(settings=PersonalDataSpec(**settings), key_dir=tmp_path and str(tmp_path)))


def protected(text: str, this: Protector) -> str | Unwanted:
    result = this.protect(PlainText(text), PersonalDataLog("Redact"))
    return result.text if isinstance(result, PlainText) else result


def test_placeholders_say_the_kind():
    text = "a@b.example 4111111111111111 93.184.216.34 http://u:pw12345@h/ E-77"
    this = protector(action="Redact", patterns=[{"name": "STAFF", "pattern": "E-[0-9]+"}])
    assert protected(text, this) == "[EMAIL] [CREDIT_CARD] [IP_ADDRESS] http://[URL_CREDENTIALS]/ [STAFF]"
    assert {kind.value for kind in PersonalDataKind} - {"PersonName"} == {
        str(d.kind) for d in detectors(PersonalDataSpec(action="Keep"))
    }
    assert protected(text, protector(action="Keep")) == text
    assert protected(text, protector(action="Reject")).detail == "Email 1, CreditCard 1, IPAddress 1, UrlCredentials 1"


def test_a_pseudonym_is_the_value_under_a_key(tmp_path):
    secret = {"key_secret_ref": {"name": "pseudonyms"}, "action": "Pseudonymize"}
    keys = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "key").write_text(f"{name}-" * 10 + "\n")
        keys.append(protector(tmp_path / name, **secret))
    first, again, other = (protected(text, keys[0]) for text in ("A@b.example", "a@B.example", "c@b.example"))
    assert first == again != other
    assert first != protected("a@b.example", keys[1])
    assert first.startswith("[EMAIL_")
    assert len(first) == len("[EMAIL_]") + 16
    assert protected("+49 30 901820", keys[0]) == protected("+49 (0)30/901820", keys[0])
    (tmp_path / "one" / "key").write_text("short")
    with pytest.raises(UserError, match="Secret pseudonyms its entry 'key' has 5 bytes; at least 16"):
        protector(tmp_path / "one", **secret)
    with pytest.raises(UserError, match="pseudonyms has no entry 'key'"):
        protector(tmp_path, **secret)
    with pytest.raises(UserError, match="--secret pseudonyms=FOLDER"):
        protector(None, **secret)


def test_every_text_of_an_example_is_protected_and_a_label_is_not():
    this, log = protector(action="Redact"), PersonalDataLog("Redact")
    mail, turns = "to a@b.example", (Turn("user", "to a@b.example"), Turn("assistant", "to a@b.example"))
    hidden = tuple(Turn(turn.role, "to [EMAIL]") for turn in turns)
    cases = {
        LabelledText(mail, mail): LabelledText("to [EMAIL]", mail),
        PromptCompletion(mail, mail): PromptCompletion("to [EMAIL]", "to [EMAIL]"),
        Conversation(turns): Conversation(hidden),
        Preference(PromptCompletion("q", mail), PromptCompletion("q", "no")): Preference(
            PromptCompletion("q", "to [EMAIL]"), PromptCompletion("q", "no")
        ),
    }
    for example, expected in cases.items():
        assert this.protect(example, log) == expected
    assert (log.report().rows, log.report().found) == (4, {"Email": 6})


PIECES = st.sampled_from(
    [
        "@",
        "+49",
        "0",
        " ",
        "-",
        ".",
        ":",
        "4111",
        "DE89",
        "a",
        "Z",
        "é",
        "٣",
        "²",
        "ſ",
        "İ",
        "://",
        "token=",
        "Passwort",
        "api key is",
        "Bearer",
        "\u2003",
        '"',
        "hunter2hunter2x",
        "-----BEGIN ",
        "\n",
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(PIECES | st.text(alphabet="0123456789 -.:/@", max_size=20) | st.text(max_size=5), max_size=12).map("".join)
)
def test_any_text_gives_spans_in_order(text):
    end = 0
    for match in EVERYWHERE.find(text):
        assert end <= match.start < match.end <= len(text)
        end = match.end


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES | st.text(alphabet="0123456789 -.:/@ABZ", max_size=24), max_size=12).map("".join))
def test_no_trigger_hides_what_its_detector_would_find(text):
    every = [*detectors(PersonalDataSpec(action="Keep", countries=COUNTRIES))]
    assert bool([match for detector in every for match in detector.find(text)]) == bool(EVERYWHERE.find(text))


def test_no_text_takes_long():
    hostile = [
        "a" * 100_000 + "@",
        "1" * 100_000,
        "1 " * 50_000,
        "+1" * 50_000,
        "." * 100_000,
        "a.b" * 30_000 + "@" + "a." * 50_000,
    ]
    hostile += [
        "DE89 " * 20_000,
        "::" * 50_000,
        "password" * 10_000,
        "-----BEGIN PRIVATE KEY-----" * 4_000,
        "eyJ" * 30_000,
        "://" + "a" * 100_000,
        "@" * 100_000,
        "a@b.example " * 5_000,
        "1.1.1.1." * 10_000,
        "( " * 50_000 + "0 1" * 30_000,
    ]
    for text in hostile:
        start = time.process_time()
        EVERYWHERE.find(text)
        assert time.process_time() - start < 4, text[:20]


PLANTED = {
    "Email": "anna.schmidt@firma.example",
    "Phone": "+49 30 901820",
    "IBAN": "DE89 3704 0044 0532 0130 00",
    "CreditCard": "4111 1111 1111 1111",
    "NationalId": "123-45-6789",
    "IPAddress": "93.184.216.34",
    "UrlCredentials": "app:s3cretpw@db.example",
    "Secret": "AKIAIOSFODNN7EXAMPLQ",
    "STAFF": "E-778899",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model") / "llama")


def stage(tmp_path: Path, model: Path, **settings):
    values = list(PLANTED.values())
    turns = [
        {
            "prompt": f"row {n}: who? {values[n % 9].replace('app', 'https://app')}",
            "completion": f"{values[(n + 1) % 9]} {n}",
        }
        for n in range(90)
    ]
    odd = [{"prompt": f"no answer {value}", "completion": ""} for value in values]
    held_out = [{"prompt": f"held {value}", "completion": value} for value in values]
    for name, rows in (("train", turns + odd + held_out), ("test", held_out)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = {
        name: {"uri": f"file://{name}.jsonl", "path": str(tmp_path / f"{name}.jsonl")} for name in ("train", "test")
    }
    plan = make_plan(
        tmp_path / "workspace",
        Stage.PREPARE,
        task=Task.GENERATION,
        training={"max_length": 256},
        model={"location": {"uri": "file://llama", "path": str(model)}},
        dataset={
            "sources": [{"location": place["train"], "field": "dataset.sources[0]"}],
            "test": {"sources": [{"location": place["test"], "field": "dataset.test.sources[0]"}]},
            "max_rejected": 0.5,
            "personal_data": {
                "settings": PersonalDataSpec(patterns=[{"name": "STAFF", "pattern": "E-[0-9]{6}"}], **settings),
                "key_dir": str(tmp_path),
            },
        },
    )
    data = run(plan, Telemetry(plan.stage, plan.job)).prepare.data
    report = DataReport.model_validate_json((tmp_path / "workspace" / "report" / "data.json").read_bytes())
    return data, report, plan


@pytest.mark.parametrize("action", ["Redact", "Pseudonymize"])
def test_the_originals_are_nowhere(tmp_path, model, caplog, action):
    (tmp_path / "key").write_text("k" * 32)
    key = {"key_secret_ref": {"name": "key"}} if action == "Pseudonymize" else {}
    with caplog.at_level(logging.DEBUG):
        data, report, _ = stage(tmp_path, model, action=action, **key)
    workspace = tmp_path / "workspace"
    tokenizer = AutoTokenizer.from_pretrained(workspace / "model")
    texts = [caplog.text]
    for split in ("train", "validation", "test"):
        rows = open_split(workspace / "data", split)
        texts += [tokenizer.decode(rows.input_ids(number)) for number in range(len(rows))]
    files = [file for file in workspace.rglob("*") if file.is_file()]
    assert len(files) > 5
    for value in PLANTED.values():
        assert not any(value in text for text in texts)
        assert not any(value.encode() in file.read_bytes() for file in files)
    assert sum("[EMAIL" in text for text in texts) > 10
    assert set(data.personal_data) == set(PLANTED)
    assert data.personal_data == report.personal_data.found
    assert min(data.personal_data.values()) >= 10
    assert data.test_rows == 9
    assert report.rejections == {"completion is empty": 9, "held-out duplicate": 9}


def test_rows_are_rejected_without_being_invalid_and_settings_are_in_the_fingerprint(tmp_path, model):
    for name in "abc":
        (tmp_path / name).mkdir()
    data, report, _ = stage(tmp_path / "a", model, action="Reject", kinds=["Email"])
    assert report.rejections["personal data"] > 10
    kept, report, _ = stage(tmp_path / "b", model, action="Keep")
    fewer, _, _ = stage(tmp_path / "c", model, action="Keep", kinds=["Phone"])
    assert "personal data" not in report.rejections
    assert len({data.fingerprint, kept.fingerprint, fewer.fingerprint}) == 3


def test_precision_and_recall_do_not_fall():
    scores = score(list(seeded(300)), finder())
    assert min(one.there for one in scores.values()) > 40
    for kind, one in scores.items():
        assert one.precision >= 0.95, kind
        assert one.recall >= 0.95, kind
