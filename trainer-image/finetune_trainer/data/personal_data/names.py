"""Names of persons, by Presidio and a language model that the image brings; both are optional."""

import os
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.constants import Reason
from finetune_api.dataset import PersonalDataKind as Kind

from finetune_trainer.data.clean import detect_language
from finetune_trainer.data.personal_data.find import Detector, Match
from finetune_trainer.errors import UserError

if TYPE_CHECKING:
    from presidio_analyzer import AnalyzerEngine

CONFIG_VARIABLE = "FINETUNE_PRESIDIO_CONFIG"
"""Names Presidio's own file that says which language models there are (its `NlpEngineProvider`)."""

PERSON = "PERSON"
PART_CHARACTERS = 50_000
"""A model's memory grows with the text that it is given; spaCy takes no more than a million."""


def name_detector() -> Detector:
    """Raises UserError (DataInvalid) where Presidio, its configuration or a model is missing."""
    analyzer = _load(os.environ.get(CONFIG_VARIABLE, ""))
    return Detector(Kind.PERSON_NAME, "", partial(_find_names, analyzer=analyzer))


def _find_names(text: str, analyzer: "AnalyzerEngine") -> Iterator[Match]:
    languages = analyzer.supported_languages
    language = detect_language(text) if len(languages) > 1 else languages[0]
    for start, part in _parts(text):
        found = analyzer.analyze(part, language if language in languages else languages[0], [PERSON])
        for name in found:
            value = " ".join(part[name.start : name.end].split()).casefold()
            yield Match(start + name.start, start + name.end, Kind.PERSON_NAME, value)


def _parts(text: str) -> Iterator[tuple[int, str]]:
    """(Place, text) of parts that are not too long; they end with a line, or with a word, where there is an end."""
    start = 0
    while len(text) - start > PART_CHARACTERS:
        most = start + PART_CHARACTERS
        end = max(text.rfind("\n", start, most), start) + 1
        if end - start < PART_CHARACTERS // 2:
            end = max(text.rfind(" ", start, most), start) + 1
        if end - start < PART_CHARACTERS // 2:
            end = most
        yield start, text[start:end]
        start = end
    yield start, text[start:]


@cache
def _load(config: str) -> "AnalyzerEngine":
    """Once in a process: a model takes seconds and hundreds of MB."""
    try:
        from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
        from presidio_analyzer.nlp_engine import NlpEngineProvider
    except ImportError:
        raise _unusable("Presidio, which is not installed: take an image with the extra 'presidio'") from None
    if not config:
        raise _unusable(
            f"a language model: set {CONFIG_VARIABLE} in the image to a configuration of Presidio's NLP engine"
        )
    try:
        provider = NlpEngineProvider(conf_file=config)
    except Exception as error:
        raise _unusable(f"a configuration that can be read, but {config} is none ({type(error).__name__})") from None
    for name in _missing_models(provider.nlp_configuration):  # Presidio would download them
        raise _unusable(f"the model {name} of {config}, which is not installed")
    try:
        engine = provider.create_engine()
        languages = engine.get_supported_languages()
        registry = RecognizerRegistry(supported_languages=languages)
        registry.add_nlp_recognizer(engine)
        analyzer: AnalyzerEngine = AnalyzerEngine(registry, engine, supported_languages=languages)
    except Exception as error:
        raise _unusable(f"a model that can be loaded, but that of {config} cannot ({type(error).__name__})") from error
    return analyzer


def _missing_models(configuration: dict[str, Any]) -> list[str]:
    """spaCy's models that are neither installed nor a folder."""
    import spacy

    if configuration["nlp_engine_name"] not in ("spacy", "transformers"):
        return []
    named = [model["model_name"] for model in configuration["models"]]
    names = [name["spacy"] if isinstance(name, dict) else name for name in named]
    return [name for name in names if not (spacy.util.is_package(name) or Path(name).exists())]


def _unusable(what: str) -> UserError:
    return UserError(Reason.DATA_INVALID, f"dataset.personalData.kinds: PersonName needs {what}")
