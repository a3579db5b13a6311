"""Examples -> token ids and what is learned of them, in batches (the fast tokenizers use all cores for one).

Text of the dataset never becomes control tokens: "</s>" in a text is four characters. In a chat (`chat`), only what the
template itself adds becomes some.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from finetune_api.constants import Reason
from transformers import PreTrainedTokenizerBase

from finetune_trainer.data.chat import ChatTemplate, Rendered, Span
from finetune_trainer.data.examples import (
    Conversation,
    Example,
    LabelledText,
    PlainText,
    Preference,
    PromptCompletion,
    Turn,
)
from finetune_trainer.data.store import TokenizedRow
from finetune_trainer.data.values import InvalidRowError
from finetune_trainer.errors import UserError


class Encoded(NamedTuple):
    """A row for training, and what it was before it was cut."""

    row: TokenizedRow
    length: int
    """In tokens, before the cut."""
    answer_cut: bool = False
    """Tokens were cut that would have been learned."""
    unlearned: int = 0
    """Answers that are not learned from, see `chat.Rendered`."""


class Encoder:
    """Encodes examples for one model. Rows longer than `max_length` tokens lose their end.

    labels: in the order of the class ids (Classification). vocabulary_size: that of the model, if known.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        labels: Sequence[str] = (),
        vocabulary_size: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.truncation_side = "right"
        self._max_length = max_length
        self._class_ids = {label: number for number, label in enumerate(labels)}
        self._vocabulary_size = vocabulary_size
        self._prefix = special_prefix(tokenizer)
        self._control_ids = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        control_token = _any_of(tokenizer.added_tokens_decoder[id].content for id in self._control_ids)
        self._chat = ChatTemplate(tokenizer, control_token)
        joined = self._encode_turns if self._chat.exists else self._encode_joined
        self._encoders: dict[type, Callable[[Any], list[Encoded | InvalidRowError]]] = {
            LabelledText: self._encode_labelled,
            PlainText: self._encode_plain,
            PromptCompletion: joined,
            Conversation: self._encode_turns,
            Preference: self._encode_pairs,
        }

    def encode(self, examples: Sequence[Example]) -> list[Encoded | InvalidRowError]:
        """One result per example, in their order; an InvalidRowError is returned where nothing can be learned.

        Raises UserError (ModelInvalid) if the tokenizer does not fit the model or the examples.
        """
        places: dict[type, list[int]] = defaultdict(list)
        for place, example in enumerate(examples):
            places[type(example)].append(place)
        results: dict[int, Encoded | InvalidRowError] = {}
        for kind, chosen in places.items():
            results.update(zip(chosen, self._encoders[kind]([examples[i] for i in chosen]), strict=True))
        return [results[place] for place in range(len(examples))]

    @property
    def has_unknown_token(self) -> bool:
        return self._tokenizer.unk_token_id is not None

    def count_tokens(self, texts: list[str]) -> tuple[int, int]:
        """How many tokens the texts have by themselves, and how many of them stand for what is not known."""
        encoded = self._ids(texts)
        unknown = self._tokenizer.unk_token_id
        return sum(map(len, encoded)), sum(ids.count(unknown) for ids in encoded)

    def _encode_labelled(self, examples: list[LabelledText]) -> list[Encoded | InvalidRowError]:
        texts = [example.text for example in examples]
        whole = self._ids(texts, add_special_tokens=True)
        long = [place for place, ids in enumerate(whole) if len(ids) > self._max_length]
        shortened = dict(
            zip(long, self._ids([texts[i] for i in long], add_special_tokens=True, cut=True), strict=True)
            if long
            else ()
        )
        specials = self._tokenizer.num_special_tokens_to_add(pair=False)
        results: list[Encoded | InvalidRowError] = []
        for place, (example, ids) in enumerate(zip(examples, whole, strict=True)):
            if len(ids) <= specials:
                results.append(InvalidRowError("text has no tokens", "the tokenizer drops all its characters"))
                continue
            kept = shortened.get(place, ids)
            self._check_ids(kept)
            row = TokenizedRow(kept, label=self._class_ids[example.label], truncated=place in shortened)
            results.append(Encoded(row, len(ids)))
        return results

    def _encode_plain(self, examples: list[PlainText]) -> list[Encoded | InvalidRowError]:
        encoded = self._ids([example.text for example in examples])
        rows = [[*self._prefix, *ids, self._tokenizer.eos_token_id] for ids in encoded]
        return [self._row(ids, [True] * len(ids)) for ids in rows]

    def _encode_joined(self, examples: list[PromptCompletion]) -> list[Encoded | InvalidRowError]:
        """Prompt + completion + end of text. The prompt's tokens are those that the prompt alone has, as it will be
        when the model is used: where joining would change them, the completion is encoded by itself.
        """
        prompts = self._ids([example.prompt for example in examples])
        wholes = self._ids([example.prompt + example.completion for example in examples])
        results = []
        for example, prompt, whole in zip(examples, prompts, wholes, strict=True):
            if whole[: len(prompt)] == prompt:
                completion = whole[len(prompt) :]
            else:
                (completion,) = self._ids([example.completion])
            start = self._prefix + prompt
            ids = [*start, *completion, self._tokenizer.eos_token_id]
            results.append(self._row(ids, [False] * len(start) + [True] * (len(ids) - len(start))))
        return results

    def _encode_pairs(self, examples: list[Preference]) -> list[Encoded | InvalidRowError]:
        chosen, rejected = self.encode([e.chosen for e in examples]), self.encode([e.rejected for e in examples])
        return [_pair(better, worse) for better, worse in zip(chosen, rejected, strict=True)]

    def _encode_turns(self, examples: list[Conversation | PromptCompletion]) -> list[Encoded | InvalidRowError]:
        rendered = [self._chat.render(*_turns(example)) for example in examples]
        texts = [item.text for item in rendered if not isinstance(item, InvalidRowError)]
        if not self._tokenizer.is_fast:
            raise UserError(
                Reason.MODEL_INVALID,
                "model.uri: its tokenizer has no tokenizer.json, which is needed to find the answers in a chat",
            )
        encodings = iter(self._tokenizer(texts, add_special_tokens=False, verbose=False).encodings if texts else ())
        results: list[Encoded | InvalidRowError] = []
        for item in rendered:
            if isinstance(item, InvalidRowError):
                results.append(item)
                continue
            encoding = next(encodings)
            offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            ids, mask = encoding.ids, _within(offsets, item.answers).tolist()
            if item.spelled:
                ids, mask = self._spell_out(ids, mask, item, offsets)
            results.append(self._row(ids, mask, item.unlearned))
        return results

    def _spell_out(
        self, ids: list[int], mask: list[bool], rendered: Rendered, offsets: np.ndarray
    ) -> tuple[list[int], list[bool]]:
        """Token ids and mask with letters for every control token that a turn's text became."""
        letters: list[tuple[int, bool]] = []
        for id, learned, (start, end), theirs in zip(
            ids, mask, offsets.tolist(), _within(offsets, rendered.spelled).tolist(), strict=True
        ):
            spelled = [id]
            if theirs and id in self._control_ids:
                (spelled,) = self._ids([rendered.text[start:end]])
            letters.extend((letter, learned) for letter in spelled)
        return [id for id, _ in letters], [learned for _, learned in letters]

    def _ids(self, texts: list[str], add_special_tokens: bool = False, cut: bool = False) -> list[list[int]]:
        limits = {"truncation": True, "max_length": self._max_length} if cut else {}
        batch = self._tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **limits,
        )
        ids: list[list[int]] = batch["input_ids"]
        return ids

    def _row(self, ids: list[int], mask: list[bool], unlearned: int = 0) -> Encoded | InvalidRowError:
        """Cuts the row. The first token is predicted by none, so it is never supervised."""
        kept, supervised = ids[: self._max_length], [False, *mask[1 : self._max_length]]
        if not any(supervised):
            cause = f"its prompt alone fills the {self._max_length} tokens" if any(mask[1:]) else "it has no answer"
            return InvalidRowError("nothing left to learn", cause)
        self._check_ids(kept)
        row = TokenizedRow(kept, loss_mask=supervised, truncated=len(kept) < len(ids))
        return Encoded(row, len(ids), any(mask[self._max_length :]), unlearned)

    def _check_ids(self, ids: Sequence[int]) -> None:
        if self._vocabulary_size is not None and max(ids) >= self._vocabulary_size:
            raise UserError(
                Reason.MODEL_INVALID,
                f"model.uri: its tokenizer gives token {max(ids)}, but the model knows only {self._vocabulary_size}",
            )


def special_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text by itself: most often nothing or the beginning-of-text token."""
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the words, of two that begin alike the longer one; without words nothing."""
    longest_first = sorted(filter(None, words), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _within(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Which tokens, by their offsets (tokens, 2), touch one of the spans."""
    mask = np.zeros(len(offsets), dtype=np.bool_)
    for start, end in spans:
        mask |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
    return mask


def _turns(example: Conversation | PromptCompletion) -> tuple[Sequence[Turn], int, str]:
    """The turns, how many of them are not learned from, and the tools."""
    if isinstance(example, Conversation):
        return example.turns, example.given, example.tools
    return (Turn("user", example.prompt.strip()), Turn("assistant", example.completion.strip())), 1, ""


def _pair(chosen: Encoded | InvalidRowError, rejected: Encoded | InvalidRowError) -> Encoded | InvalidRowError:
    if isinstance(chosen, InvalidRowError):
        return InvalidRowError(chosen.reason, f"chosen: {chosen.detail}")
    if isinstance(rejected, InvalidRowError):
        return InvalidRowError(rejected.reason, f"rejected: {rejected.detail}")
    if list(chosen.row.input_ids) == list(rejected.row.input_ids):
        return InvalidRowError("chosen and rejected are the same", "as far as the tokens that are kept tell")
    return Encoded(
        chosen.row._replace(rejected=rejected.row),
        chosen.length + rejected.length,
        chosen.answer_cut or rejected.answer_cut,
        chosen.unlearned + rejected.unlearned,
    )
