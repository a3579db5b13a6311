"""E-mail addresses, credentials in URLs, API keys and other secrets."""

import math
import re
from collections import Counter
from collections.abc import Iterator

from finetune_api.dataset import PersonalDataKind as Kind

from finetune_trainer.data.personal_data.find import Match

LOCAL_CHARACTERS = 64
LOCAL_PART = re.compile(rf"[\w.%+'&-]{{1,{LOCAL_CHARACTERS}}}\Z")
DOMAIN = re.compile(r"(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.)+([^\W\d_]{2,24})(?![\w-]|\.\w|:[\w/~-]*[/.])")
FILE_ENDINGS = frozenset(
    (
        "png",
        "jpg",
        "jpeg",
        "gif",
        "svg",
        "webp",
        "css",
        "js",
        "ts",
        "html",
        "htm",
        "php",
        "py",
        "json",
        "xml",
        "md",
        "txt",
        "pdf",
    )
)
NO_MAILBOX = frozenset(("git", "hg", "svn"))
"""Users of addresses that are no e-mail addresses, as in git@github.com:owner/repository."""

URL_USER = re.compile(r"(?<=://)[^\s/:@\"'<>]{1,128}:[^\s/@\"'<>]{1,256}@[^\s/?#\"'<>]+")
URL_PARAMETER = re.compile(
    r"(?i)[?&;#](?:[a-z_.-]{0,20}token|(?:api|access|auth|private|secret|subscription)[_-]?key|key|sig|signature|x-amz-signature|"
    r"passw(?:or)?d|pwd|secret|client[_-]secret|auth|credential)=([^\s&#\"'<>()\[\]]{6,2048})"
)

SENTENCE_MARKS = ".,;:!?)]}\\"
"""What ends a sentence and not a URL."""

KNOWN_SECRET = (
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # AWS access key
    r"|\bgh[pousr]_[A-Za-z0-9]{36,251}\b|\bgithub_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}\b"
    r"|\bgl(?:pat|ptt|dt|rt|soat)-[A-Za-z0-9_-]{20,64}"  # GitLab
    r"|\bxox[abeoprs]-[A-Za-z0-9-]{10,250}|\bxapp-\d-[A-Za-z0-9-]{10,250}"  # Slack
    r"|hooks\.slack\.com/services/T[A-Z0-9]{6,12}/B[A-Z0-9]{6,12}/[A-Za-z0-9]{20,28}"
    r"|\bAIza[A-Za-z0-9_-]{35}\b|\bGOCSPX-[A-Za-z0-9_-]{28}|\bya29\.[A-Za-z0-9_-]{20,500}"  # Google
    r"|\b[rs]k_(?:live|test)_[A-Za-z0-9]{16,247}\b|\bwhsec_[A-Za-z0-9]{24,64}\b"  # Stripe
    r"|\bsk-(?:proj-|svcacct-|ant-[a-z0-9]{2,8}-)?[A-Za-z0-9_-]{20,220}"  # OpenAI, Anthropic
    r"|\bhf_[A-Za-z]{34}\b|\bnpm_[A-Za-z0-9]{36}\b|\bpypi-[A-Za-z0-9_-]{50,250}"
    r"|\bSG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}"  # SendGrid
    r"|\beyJ[A-Za-z0-9_-]{10,4000}\.eyJ[A-Za-z0-9_-]{10,8000}\.[A-Za-z0-9_-]{10,1000}"  # JWT
)
KNOWN_SECRET_TRIGGER = (
    r"AKIA|ASIA|gh[pousr]_|github_pat_|gl(?:pat|ptt|dt|rt|soat)-|xox[abeoprs]-|xapp-|hooks\.slack|AIza|GOCSPX-|"
    r"ya29\.|[rs]k_(?:live|test)_|whsec_|sk-|hf_|npm_|pypi-|SG\.|eyJ"
)
KNOWN = re.compile(KNOWN_SECRET, re.ASCII)

PRIVATE_KEY_TRIGGER = r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY"
PRIVATE_KEY = re.compile(
    r"-----BEGIN ([A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?)-----"
    r"(?:[\s\S]{0,32768}?-----END \1-----|[A-Za-z0-9+/=\s\\]{0,32768})"  # whole, or cut off
)

SPACE = r"[\s\pZ\x0b\x1c-\x1f\x{85}]"
NAMED_SECRET_TRIGGER = (  # so much of it that texts which only speak of keys and passwords are spared the rest
    r"(?i)(?:pass|pwd|kennwort|wachtwoord|contrase|senha|secret|key|token|credential)[a-z_ñ-]{0,24}[\"'`\])]{0,2}"
    rf"{SPACE}{{0,3}}(?:[:=]|is|es|lautet)[=>t]?{SPACE}{{0,3}}[\"'`]?[^\s\"'`,;<>]{{8}}"
    rf"|(?:bearer|basic){SPACE}{{1,3}}[A-Za-z0-9+/=._~-]{{16}}"
)
NAMED_SECRET = re.compile(
    r"(?i)(?:pass(?:word|wd|wort|phrase|code)?|pwd|kennwort|wachtwoord|contrase[nñ]a|senha|mot de passe|secret"
    r"|(?:api|access|auth|private|account|encryption|signing)[ _-]?key|token|credentials?)"
    r"[a-z_-]{0,20}[\"'`\])]{0,2}\s{0,3}(?::=|=>|[:=]|\b(?:is|ist|lautet|es|est)\b)"
    r"\s{0,3}[\"'`]?([^\s\"'`,;<>]{8,512})"
    r"|\b(?:bearer|basic)\s{1,3}([A-Za-z0-9+/=._~-]{16,4096})"
)
IN_QUERY = re.compile(r"[?&;#][\w.-]*\Z")
PLACEHOLDER = re.compile(
    r"(?i)^[$%{\[(/.]|\$\{|\{\{|^(?:x|\*|\.)+$|x{4,}|\*{3,}|your|example|placeholder|changeme|change_me|redacted|dummy|sample|"
    r"\(|://|^(?:os|process|env|self|config|settings|this)\."
)


def find_emails(text: str) -> Iterator[Match]:
    """By the rules that mail providers keep, not all that RFC 5322 allows."""
    at = text.find("@")
    while at >= 0:
        local = LOCAL_PART.search(text, max(0, at - LOCAL_CHARACTERS), at)
        domain = DOMAIN.match(text, at + 1, at + 256)
        if local and domain and domain[1].lower() not in FILE_ENDINGS:
            name = local[0].lstrip(".'&%+-")
            if name and name[-1] != "." and name not in NO_MAILBOX:
                start = at - len(name)
                yield Match(start, domain.end(), Kind.EMAIL, text[start : domain.end()].lower())
        at = text.find("@", at + 1)


def find_url_users(text: str) -> Iterator[Match]:
    """user:password@host; the host belongs to the match, for it looks like the end of an e-mail address."""
    for found in URL_USER.finditer(text):
        value = found[0].rstrip(SENTENCE_MARKS)
        if not PLACEHOLDER.search(value.rpartition("@")[0].partition(":")[2]):
            yield Match(found.start(), found.start() + len(value), Kind.URL_CREDENTIALS, value)


def find_url_parameters(text: str) -> Iterator[Match]:
    for found in URL_PARAMETER.finditer(text):
        value = found[1].rstrip(SENTENCE_MARKS)
        if value and not PLACEHOLDER.search(value):
            yield Match(found.start(1), found.start(1) + len(value), Kind.URL_CREDENTIALS, value)


def find_known_secrets(text: str) -> Iterator[Match]:
    """Keys that their makers have given a form of their own."""
    for found in KNOWN.finditer(text):
        if found[0].startswith("sk-") and not looks_random(found[0][3:]):
            continue
        yield Match(found.start(), found.end(), Kind.SECRET, found[0])


def find_private_keys(text: str) -> Iterator[Match]:
    for found in PRIVATE_KEY.finditer(text):
        yield Match(found.start(), found.end(), Kind.SECRET, found[0])


def find_named_secrets(text: str) -> Iterator[Match]:
    """What is called a password, key or token and looks like one."""
    for found in NAMED_SECRET.finditer(text):
        if IN_QUERY.search(
            text, max(0, found.start() - 32), found.start()
        ):  # `find_url_parameters` knows where it ends
            continue
        group = found.lastindex or 0
        value = found[group].rstrip(SENTENCE_MARKS)
        if not PLACEHOLDER.search(value) and looks_random(value):
            yield Match(found.start(group), found.start(group) + len(value), Kind.SECRET, value)


def looks_random(value: str) -> bool:
    """Letters and digits, at least 8, with at least 2.5 bits per character (Shannon)."""
    if len(value) < 8 or not any(map(str.isdigit, value)) or not any(map(str.isalpha, value)):
        return False
    total = len(value)
    return -sum(n / total * math.log2(n / total) for n in Counter(value).values()) >= 2.5
