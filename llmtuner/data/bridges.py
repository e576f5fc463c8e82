"""Puts languages side by side: translations in one document, entries of a glossary, and code-switched documents."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import regex

from llmtuner.console import UserError
from llmtuner.data.held_out import text_hash
from llmtuner.data.readers import Row, read_rows
from llmtuner.data.sources import CodeSwitch, DatasetAttr
from llmtuner.data.term_finder import TermFinder

# One character of a script without spaces is a term too rarely: 人 is one, and most of its occurrences are in other words.
MIN_TERM_CHARS = 2
_FULL_WIDTH = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}ー]")


def by_language(values: dict[str, Any]) -> dict[str, Any]:
    """The texts of a row by language code: columns, or one column `translation` as in the hub's translation datasets."""
    nested = values.get("translation")
    return nested if isinstance(nested, dict) else values


def parallel_document(texts: Sequence[str], number: int) -> str:
    """Translations as one document, a line each, in the order that the number selects from all orders."""
    return "\n".join(_permute(texts, number))


def glossary_documents(texts: Sequence[str], number: int) -> list[str]:
    """One document for each translation, in which it comes first and the others follow in parentheses: ミナ（米娜、Mina）.

    Both directions have to be trained: a model that has read "A is B" does not answer "B is" (arXiv 2309.12288).

    Args:
        number: selects the order inside the parentheses.
    """
    return [alongside(text, _permute([*texts[:i], *texts[i + 1 :]], number)) for i, text in enumerate(texts)]


def alongside(term: str, translations: Sequence[str]) -> str:
    """A term with its translations in parentheses, in the punctuation of the term's script."""
    if _FULL_WIDTH.match(term[-1]):
        return f"{term}（{'、'.join(translations)}）"
    return f"{term} ({', '.join(translations)})"


def _permute(texts: Sequence[str], number: int) -> list[str]:
    left, order = list(texts), []
    while left:
        number, index = divmod(number, len(left))
        order.append(left.pop(index))
    return order


def read_glossary(glossary: DatasetAttr) -> Iterator[dict[str, str]]:
    """Yields the entries of a glossary, or of another dataset of translations: language code -> text, without empty ones.

    Raises:
        UserError: as `read_rows`; at the end, if no row had a text in one of the languages.
    """
    languages = glossary.column_names["translations"]
    found: set[str] = set()
    for row in read_rows(glossary):
        if not row.error and glossary.matches_filter(row.values):
            values = by_language(row.values)
            texts = {code: _valid(values[code]) for code in languages if isinstance(values.get(code), str)}
            entry = {code: text for code, text in texts.items() if text}
            found |= entry.keys()
            yield entry
    if missing := [code for code in languages if code not in found]:
        raise UserError(
            f"dataset {glossary.name}: no row of {glossary.describe_locations()} has text in the column "
            f"{' or '.join(map(repr, missing))}. Correct `columns` in dataset_info.json."
        )


def read_translations(glossary: DatasetAttr, language: str) -> dict[str, list[str]]:
    """The terms of a glossary in one language, each with its translations into all others, of all entries that have it.

    Raises:
        UserError: as `read_glossary`; if the dataset has no translations, or none into this language.
    """
    if language not in (languages := glossary.column_names["translations"]):
        raise UserError(
            f"dataset {glossary.name} has no translations of {language!r} ({', '.join(languages) or 'none at all'}). Name "
            "the column of this language under `translations` in its entry in dataset_info.json, as docs/bridges.md shows."
        )
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for entry in read_glossary(glossary):
        if term := entry.pop(language, ""):
            found[term] |= dict.fromkeys(entry.values())
    return {term: list(translations) for term, translations in found.items()}


def _valid(text: str) -> str:
    """A text without lone surrogates, which JSON can hold."""
    return text.encode(errors="ignore").decode().strip()


def _is_spoken(message: dict[str, Any]) -> bool:
    return message["role"] in ("user", "assistant") and "metadata" not in message


class CodeSwitcher:
    """Replaces terms of a glossary in documents and dialogues (EntityCS, arXiv 2210.12540), or translates them in parentheses
    (LEIA, arXiv 2402.11485).
    """

    def __init__(self, code_switch: CodeSwitch) -> None:
        """Reads the glossary. Of several entries with the same term the first counts.

        Raises:
            UserError: as `read_glossary`; if no entry has both languages.
        """
        self.code_switch = code_switch
        self.terms: dict[str, tuple[str, int]] = {}
        """term -> its translation, and an odd number that depends on the term alone"""
        self.num_documents = self.num_switched = 0
        """Documents or dialogues seen, and those in which at least one term was switched."""
        for entry in read_glossary(code_switch.glossary):
            term, translation = entry.get(code_switch.source, ""), entry.get(code_switch.target, "")
            if len(term) >= MIN_TERM_CHARS and translation not in ("", term):
                self.terms.setdefault(term, (translation, text_hash(term.encode()) | 1))
        if not self.terms:
            raise UserError(
                f"dataset {code_switch.glossary.name}: no entry translates a term of {MIN_TERM_CHARS} characters or more "
                f"from {code_switch.source!r} to {code_switch.target!r}. Correct code_switch in dataset_info.json."
            )
        self.find_terms = TermFinder(self.terms)

    def __call__(self, row: Row) -> None:
        """Switches a converted row: a document, or in a dialogue the terms that the user mentions.

        An answer thus repeats a name as the question has it, and is otherwise in its own language. Calls of tools and what
        they return stay as they are. `row.hash` remains that of the text as it was read, so that a document that is held out
        is held out in every version.
        """
        if isinstance(row.content, bytes):
            switched: Any = self.switch(row.content.decode(), row.hash).encode()
        else:
            asked = [message["content"] for message in row.content if message["role"] == "user"]
            mentioned = {term for text in asked for _, term in self.find_terms(text)}
            switched = [
                {**message, "content": self.switch(message["content"], row.hash, mentioned)}
                if _is_spoken(message)
                else message
                for message in row.content
            ]
        self.num_documents += 1
        self.num_switched += switched != row.content
        row.set_content(switched)

    def switch(self, text: str, document_hash: int, among: Collection[str] | None = None) -> str:
        """Switches a text. Which terms is decided by hash and term alone: equal terms of a dialogue are switched alike.

        Args:
            among: only these terms.
        """
        alone, limit = self.code_switch.style == "replace", self.code_switch.ratio * 2**64
        parts: list[str] = []
        seen: set[str] = set()  # in parentheses only once
        copied = 0
        for start, term in self.find_terms(text):
            translation, term_hash = self.terms[term]
            if document_hash * term_hash % 2**64 >= limit or term in seen or (among is not None and term not in among):
                continue
            if not alone:
                seen.add(term)
                translation = alongside(term, [translation])
            parts += (text[copied:start], translation)
            copied = start + len(term)
        return "".join([*parts, text[copied:]])

    def describe(self) -> str:
        """Says how much was switched, in one line."""
        switch = self.code_switch
        return (
            f"code_switch: {self.num_switched:,} of {self.num_documents:,} documents or dialogues name terms of {switch.glossary.name} "
            f"({len(self.terms):,}) that were translated from {switch.source} to {switch.target}"
        )
