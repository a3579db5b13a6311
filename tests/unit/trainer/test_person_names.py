"""dataset.personalData.kinds: PersonName, by Presidio with a language model that is made here."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from finetune_api.dataset import PersonalDataSpec
from finetune_api.plan import PlanPersonalData
from finetune_trainer.data.examples import PlainText
from finetune_trainer.data.personal_data import names
from finetune_trainer.data.personal_data.protect import PersonalDataLog, Protector
from finetune_trainer.errors import UserError

PEOPLE = {"en": ["Maria Keller", "Tom O'Brien"], "de": ["Jürgen Groß"]}


def protector(kinds: list[str]) -> Protector:
    return Protector(PlanPersonalData(settings=PersonalDataSpec(action="Redact", kinds=kinds)))


def redacted(text: str, this: Protector) -> str:
    result = this.protect(PlainText(text), PersonalDataLog("Redact"))
    assert isinstance(result, PlainText)
    return result.text


def configure(monkeypatch, folder: Path, models: dict[str, str]) -> None:
    """JSON is YAML."""
    listed = [{"lang_code": language, "model_name": name} for language, name in models.items()]
    config = folder / "presidio.yaml"
    config.write_text(json.dumps({"nlp_engine_name": "spacy", "models": listed}))
    monkeypatch.setenv(names.CONFIG_VARIABLE, str(config))


@pytest.fixture
def models(tmp_path: Path, monkeypatch) -> None:
    """Pipelines of spaCy that know three persons."""
    spacy = pytest.importorskip("spacy", reason="the extra 'presidio' is not installed")
    folders = {}
    for language, people in PEOPLE.items():
        model = spacy.blank(language)
        model.add_pipe("entity_ruler").add_patterns([{"label": "PERSON", "pattern": person} for person in people])
        folders[language] = str(tmp_path / language)
        model.to_disk(folders[language])
    configure(monkeypatch, tmp_path, folders)


@pytest.mark.usefixtures("models")
def test_names_are_found_in_the_language_of_the_text():
    this = protector(["PersonName", "Email"])
    english = "The contract was signed by Maria Keller and by Tom O'Brien (tom@b.example) on the last day of the year."
    assert redacted(english, this) == (
        "The contract was signed by [PERSON_NAME] and by [PERSON_NAME] ([EMAIL]) on the last day of the year."
    )
    german = "Der Vertrag wurde von Jürgen Groß unterschrieben, aber nicht von Maria Keller, die im Urlaub war."
    assert redacted(german, this) == german.replace("Jürgen Groß", "[PERSON_NAME]")  # the German model knows no other
    assert redacted("Maria Keller", this) == "[PERSON_NAME]"  # too short to tell: the first model


@pytest.mark.usefixtures("models")
def test_long_texts_are_read_in_parts_and_no_name_is_lost():
    line = "Then Maria Keller agreed.\n"
    for text in (line * 4_000, line.replace("\n", " ") * 4_000):
        assert redacted(text, protector(["PersonName"])) == text.replace("Maria Keller", "[PERSON_NAME]")
    assert [part for _, part in names._parts("x" * 100_001)] == ["x" * 50_000, "x" * 50_000, "x"]


def test_names_are_not_looked_for_unless_they_are_asked_for():
    settings = PersonalDataSpec(action="Redact")
    assert redacted("Maria Keller", Protector(PlanPersonalData(settings=settings))) == "Maria Keller"


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv(names.CONFIG_VARIABLE, raising=False)
    if find_spec("presidio_analyzer") is None:
        with pytest.raises(
            UserError, match="PersonName needs Presidio, which is not installed: take an image with the"
        ):
            protector(["PersonName"])
        return
    with pytest.raises(UserError, match="PersonName needs a language model: set FINETUNE_PRESIDIO_CONFIG in the image"):
        protector(["PersonName"])
    configure(monkeypatch, tmp_path, {"en": "en_core_web_nowhere"})
    with pytest.raises(UserError, match=r"the model en_core_web_nowhere of .*presidio.yaml, which is not installed"):
        protector(["PersonName"])
    (tmp_path / "presidio.yaml").write_text("nlp_engine_name: [")
    with pytest.raises(UserError, match=r"a configuration that can be read, but .*presidio.yaml is none"):
        protector(["PersonName"])
    (tmp_path / "empty").mkdir()
    configure(monkeypatch, tmp_path, {"en": str(tmp_path / "empty")})
    with pytest.raises(UserError, match=r"a model that can be loaded, but that of .*presidio.yaml cannot \(OSError\)"):
        protector(["PersonName"])
