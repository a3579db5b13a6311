"""The label of each row, by itself: as it stands there, by its alias, or by the rules of dataset.labelling."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from finetune_api.constants import Reason
from finetune_api.dataset import LabelRule
from finetune_api.plan import PlanDataset

from finetune_trainer.data.convert import Unwanted
from finetune_trainer.data.examples import UNLABELLED, LabelledText
from finetune_trainer.data.label_rules import LabelRules, RuleLog
from finetune_trainer.errors import UserError


def label_rules(dataset: PlanDataset) -> list[LabelRule]:
    return (dataset.labelling.label_rules if dataset.labelling else None) or []


def optional_fields(dataset: PlanDataset) -> Collection[str]:
    """Fields that a row may lack: a label, where rules can give one."""
    return ("label",) if label_rules(dataset) else ()


def rule_columns(dataset: PlanDataset) -> set[str]:
    """Columns that rules look at, besides those that rows are made of."""
    return {rule.column for rule in label_rules(dataset) if rule.column}


@dataclass
class LabellingLog:
    """Rows by alias, rows that have a column which rules look at, and the votes; logs of different rows add up."""

    aliases: Counter[str] = field(default_factory=Counter)
    columns: Counter[str] = field(default_factory=Counter)
    rules: RuleLog = field(default_factory=RuleLog)

    def merge(self, other: "LabellingLog") -> None:
        self.aliases.update(other.aliases)
        self.columns.update(other.columns)
        self.rules.merge(other.rules)


class Labeller:
    """dataset.labels and dataset.labelling at work. `label` is a pure function of the row; it counts into a log.

    Raises UserError (DataInvalid) for a rule's table with a label that dataset.labels does not list.
    """

    def __init__(self, dataset: PlanDataset) -> None:
        settings = dataset.labelling
        self._aliases = {alias.strip(): label for alias, label in ((settings and settings.aliases) or {}).items()}
        self._listed = set(dataset.labels or ())
        self._by_folded = {label.casefold(): label for label in dataset.labels or ()}
        rules = label_rules(dataset)
        _check_tables(rules, self._listed)
        self._rules = LabelRules(rules) if rules else None

    def new_log(self) -> LabellingLog:
        aliases = Counter(dict.fromkeys(self._aliases, 0))
        if self._rules is None:
            return LabellingLog(aliases)
        return LabellingLog(aliases, Counter(dict.fromkeys(self._rules.columns, 0)), RuleLog(self._rules.names))

    def label(self, example: LabelledText, values: Mapping[str, Any], log: LabellingLog) -> LabelledText | Unwanted:
        """The example with its final label, or why it has none. `values`: the columns of its row."""
        given = example.label
        if given in self._aliases:
            log.aliases[given] += 1
            given = self._aliases[given]
        if given != UNLABELLED and self._listed and given not in self._listed:
            return Unwanted("label is unknown", self._what_is_listed(given), invalid=True)
        label: str | Unwanted = given
        if self._rules is not None:
            votes = self._rules.votes(example.text, values)
            log.columns.update(self._rules.columns & values.keys())
            log.rules.count(votes, given)
            label = elected(votes) if given == UNLABELLED else given
        if isinstance(label, Unwanted):
            return label
        return example if label == example.label else replace(example, label=label)

    def _what_is_listed(self, label: str) -> str:
        """Names labels of the spec only: the row's is text of the dataset."""
        near = self._by_folded.get(label.casefold())
        return f"dataset.labels has '{near}', in another case" if near else "dataset.labels does not list it"


def _check_tables(rules: Sequence[LabelRule], listed: Collection[str]) -> None:
    for number, rule in enumerate(rules):
        strange = [label for label in (rule.table or {}).values() if listed and label not in listed]
        if strange:
            raise UserError(
                Reason.DATA_INVALID,
                f"dataset.labelling.rules[{number}].table: '{strange[0]}' is a label that dataset.labels does not list",
            )


def elected(votes: Mapping[int, str]) -> str | Unwanted:
    """The label with the most votes; `votes`: rule -> label."""
    ranked = Counter(votes.values()).most_common(2)
    if not ranked:
        return Unwanted("no rule labels it")
    if len(ranked) == 2 and ranked[0][1] == ranked[1][1]:
        return Unwanted("rules disagree", f"{ranked[0][1]} of {len(votes)} votes each for several labels")
    return ranked[0][0]


def check_columns(dataset: PlanDataset, log: LabellingLog) -> None:
    """Raises UserError (DataInvalid) for a rule whose column no row has."""
    for number, rule in enumerate(label_rules(dataset)):
        if rule.column and log.rules.rows and not log.columns[rule.column]:
            raise UserError(
                Reason.DATA_INVALID,
                f"dataset.labelling.rules[{number}].column: no row of the sources has a column '{rule.column}'",
            )
