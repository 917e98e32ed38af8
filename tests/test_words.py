"""Words as token ids in every spelling, delimiters of several tokens, and the thinking span."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from decoding_support import word_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rltok.sampling import Rows, resolve_word_ids
from rltok.sampling.words import Delimiter, ThinkingSpan, thinking_end, token_ids

BYTE_SPACE, PIECE_SPACE = "\u0120", "\u2581"
FORMS = ["wait", "Wait", "WAIT", "but", "BUT"]
SPECIAL = ["<pad>", "<eos>"]


def vocabulary(space):
    return word_tokenizer([*SPECIAL, *FORMS, *(space + form for form in FORMS), "x"])


def names(tokenizer, ids):
    return [tokenizer.convert_ids_to_tokens(i) for i in ids]


@pytest.mark.parametrize("space", [BYTE_SPACE, PIECE_SPACE, " "])
def test_spellings(space):
    tokenizer = vocabulary(space)
    expected = {
        "bare": ["wait", "Wait"],
        "space": [space + "wait", space + "Wait"],
        "both": ["wait", "Wait", space + "wait", space + "Wait"],
        "all": ["wait", "Wait", "WAIT", space + "wait", space + "Wait", space + "WAIT"],
    }
    for variants, words in expected.items():
        found = resolve_word_ids(tokenizer, ["wait", "Wait"], variants)
        assert names(tokenizer, found) == words, variants
        assert found == sorted(found)


def test_all_covers_every_case_of_one_spelling():
    tokenizer = vocabulary(BYTE_SPACE)
    for word in ("wait", "Wait", "WAIT", "wAIT"):
        assert resolve_word_ids(tokenizer, [word], "all") == resolve_word_ids(tokenizer, ["wait"], "all")
    assert names(tokenizer, resolve_word_ids(tokenizer, ["but"], "all")) == ["but", "BUT", "\u0120but", "\u0120BUT"]


def test_the_default_is_what_the_authors_bias():
    tokenizer = vocabulary(BYTE_SPACE)
    assert names(tokenizer, resolve_word_ids(tokenizer, ["wait"])) == ["wait"]


def test_duplicates_count_once():
    tokenizer = vocabulary(BYTE_SPACE)
    found = resolve_word_ids(tokenizer, ["wait", "wait", "Wait", "WAIT"], "all")
    assert len(found) == len(set(found)) == 6


def test_missing_words():
    tokenizer = vocabulary(BYTE_SPACE)
    with pytest.warns(UserWarning, match=r"\['perhaps', 'However'\] are no single token") as caught:
        assert names(tokenizer, resolve_word_ids(tokenizer, ["wait", "perhaps", "However"])) == ["wait"]
    assert len(caught) == 1
    with pytest.raises(ValueError, match=r"words=\['perhaps'\] only 0 token"):
        resolve_word_ids(tokenizer, ["perhaps"])
    with pytest.raises(ValueError, match=r"only 1 token.*2 needed"):
        resolve_word_ids(tokenizer, ["wait"], require=2)
    with pytest.warns(UserWarning, match="perhaps"):
        assert resolve_word_ids(tokenizer, ["perhaps"], require=0) == []
    with pytest.raises(ValueError, match=r"variants='every' is unknown; allowed: 'bare', 'space', 'both', 'all'"):
        resolve_word_ids(tokenizer, ["wait"], "every")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve_word_ids(tokenizer, ["wait", "but"])


def test_a_word_of_several_pieces_is_not_its_first_piece():
    """Byte-level BPE: `w` + `ait` would hit all words that begin with w."""
    symbols = ["<pad>", "<eos>", *"abitwux", BYTE_SPACE, "ai", "ait", "bu", "but", BYTE_SPACE + "b", BYTE_SPACE + "but"]
    merges = [("a", "i"), ("ai", "t"), ("b", "u"), ("bu", "t"), (BYTE_SPACE, "b"), (BYTE_SPACE, "but")]
    core = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    assert names(tokenizer, tokenizer.encode("wait but")) == ["w", "ait", "\u0120but"]
    with pytest.warns(UserWarning, match="wait"):
        assert names(tokenizer, resolve_word_ids(tokenizer, ["wait", "but"], "both")) == ["but", "\u0120but"]
    assert names(tokenizer, token_ids(tokenizer, "wait")) == ["w", "ait"]
    assert names(tokenizer, token_ids(tokenizer, "but")) == ["but"]


def test_the_end_of_thinking():
    tokenizer = word_tokenizer([*SPECIAL, "</think>", "done", "now"])
    assert thinking_end(tokenizer, "auto") == (2,)
    assert thinking_end(tokenizer, None) == ()
    assert thinking_end(tokenizer, "done now") == (3, 4)
    assert thinking_end(word_tokenizer([*SPECIAL, "think"]), "auto") == ()  # not one token: no guess


# ---- delimiters

DELIMITERS = [(1,), (1, 2), (1, 1), (1, 1, 2), (1, 2, 1), (1, 2, 1, 2), (1, 1, 1, 2, 1, 1), (1, 2, 1, 1, 2, 1, 2)]


def ends_with(text, delimiter):
    return text[-len(delimiter) :] == delimiter


@pytest.mark.parametrize("delimiter", DELIMITERS)
def test_delimiter_against_brute_force(delimiter):
    texts = torch.tensor(list(itertools.product([1, 2, 9], repeat=8)))  # all texts: those that overlap themselves too
    automaton, matched = Delimiter(delimiter), torch.zeros(len(texts), dtype=torch.long)
    times = 0
    for t in range(8):
        matched, found = automaton.advance(matched, texts[:, t])
        expected = torch.tensor([ends_with(tuple(text[: t + 1]), delimiter) for text in texts.tolist()])
        assert torch.equal(found, expected)
        times += int(found.sum())
    assert times > 0


def test_delimiter_says_how_much_is_matched():
    automaton, matched, seen = Delimiter((5, 6, 5, 7)), torch.zeros(1, dtype=torch.long), []
    for token in (5, 6, 5, 6, 5, 7, 5, 5, 0):
        matched, _ = automaton.advance(matched, torch.tensor([token]))
        seen.append(matched.item())
    assert seen == [1, 2, 3, 2, 3, 4, 1, 1, 0]


# ---- the span


def inside(span, tokens):
    """Whether the row is inside before each of its tokens, and after the last."""
    columns = span.columns(1, torch.device("cpu"))
    seen = [columns["inside"].item()]
    for position, token in enumerate(tokens, start=1):
        span.observe(Rows(torch.tensor([position]), torch.tensor([token]), position), columns)
        seen.append(columns["inside"].item())
    return seen


def test_span():
    assert inside(ThinkingSpan(), [1, 2, 3]) == [True] * 4
    assert inside(ThinkingSpan(end_ids=(2,)), [1, 2, 3]) == [True, True, False, False]
    assert inside(ThinkingSpan(end_ids=(2, 2)), [2, 1, 2, 2, 1]) == [True] * 4 + [False] * 2
    assert inside(ThinkingSpan((1,), (2,)), [3, 1, 3, 2, 3]) == [False, False, True, True, False, False]
    assert inside(ThinkingSpan((1, 2), (3,)), [1, 1, 2, 3]) == [False, False, False, True, False]


def test_span_never_opens_again():
    assert inside(ThinkingSpan((1,), (2,)), [1, 2, 1, 1]) == [False, True, False, False, False]
    assert inside(ThinkingSpan((1,), (2,)), [2, 1, 3]) == [False] * 4  # ended before it began


def test_span_columns_are_updated_in_place():
    span = ThinkingSpan((1,), (2,))
    columns = span.columns(3, torch.device("cpu"))
    assert len({values.data_ptr() for values in columns.values()}) == len(columns)  # no two share their memory
    before = {name: values.data_ptr() for name, values in columns.items()}
    span.observe(Rows(torch.tensor([1, 1, 1]), torch.tensor([1, 2, 3]), 1), columns)
    assert {name: values.data_ptr() for name, values in columns.items()} == before
    assert columns["inside"].tolist() == [True, False, False]
