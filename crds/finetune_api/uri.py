"""URIs of models, data and results: their form, and the rules for them."""

from typing import Annotated

from pydantic import StringConstraints

from finetune_api.base import Rule
from finetune_api.kubernetes import NAME

Uri = Annotated[str, StringConstraints(max_length=1024)]
URI_HELP = (
    "hf://owner/name, s3://bucket/path, gs://bucket/path, az://container/path, https://host/path, "
    "pvc://claim/path, configmap://name/key; with `finetune run` also file://path, relative to the manifest"
)
URI_FORM = f"expected one of {URI_HELP}"
# No separators and no control or format characters: URIs are printed at terminals. Not \pC, which since Go 1.25 also means
# every code that the API server's edition of Unicode has no character for.
_UNSEEN = r"\pZ\p{Cc}\p{Cf}\p{Co}"
_CHARACTER = f"[^{_UNSEEN}]"
_SOME = f"[^/{_UNSEEN}]{_CHARACTER}*"
_OBJECT = NAME[1:-1]
_URI = (
    f"^((hf|s3|gs|az|https)://{_SOME}|file://{_CHARACTER}+"
    f"|pvc://{_OBJECT}/{_SOME}|configmap://{_OBJECT}/[-._a-zA-Z0-9]+)$"
)


def uri_rules(output: bool = False) -> tuple[Rule, ...]:
    """Rules of a model with a `uri`: its form, no way out of a folder, no local files in a cluster, a scheme that can be written."""
    unset = "!has(self.uri) || " if output else ""
    rules = [
        Rule(f"{unset}self.uri.matches(r'{_URI}')", URI_FORM, "uri"),
        Rule(f"{unset}!self.uri.matches('(^|/)[.][.](/|$)') || self.uri.startsWith('file://')",
             "a path may not contain '..'", "uri"),
        Rule(f"{unset}!self.uri.matches('^https://[^/]*@')",
             "a URI may not contain a password, because it is shown in status and logs; put it into a Secret and name that in secretRef", "uri"),
        Rule(f"{unset}!self.uri.startsWith('file://')",
             "file:// works only with `finetune run`; in a cluster use pvc://, s3://, gs://, az://, https://, hf:// or configmap://",
             "uri", cluster_only=True),
    ]
    if output:  # a source's claim that cannot be is found out by prepare's Job
        rules.append(Rule("!has(self.uri) || !self.uri.matches('^pvc://[^/]{254}')", "the name of a claim has at most 253 characters", "uri"))
        rules.append(Rule("!has(self.uri) || !self.uri.matches('^(https|configmap)://')",
                          "an output cannot be written to https:// or configmap://; use s3://, gs://, az://, hf:// or pvc://", "uri"))
    return tuple(rules)
