"""Reasons counted together whatever they quote, and the error that counts them."""

from __future__ import annotations

from mi_hops.facts import NoUsableFactError
from mi_hops.facts.unusable import count_reasons, describe_reasons

SKIPPED = [
    ("a", "'the author of Misery' does not occur in the prompt 'Who?'"),
    ("b", "no first-hop prompt"),
    ("c", "\"Carrie's author\" does not occur in the prompt 'Who?'"),
    ("d", "the prompts do not end alike after the bridge: [1, 2] and [3]"),
    ("e", "every token of the bridge is one of the answer's"),
]


def test_what_a_reason_quotes_does_not_tell_it_apart():
    assert count_reasons(SKIPPED) == {
        "… does not occur in the prompt …": 2,
        "no first-hop prompt": 1,
        "the prompts do not end alike after the bridge: … and …": 1,
        "every token of the bridge is one of the answer's": 1,
    }
    assert count_reasons([]) == {}


def test_reasons_in_words():
    assert describe_reasons({}) == ""
    assert describe_reasons({"a": 3, "b": 1}) == "3: a; 1: b"
    assert (
        describe_reasons({"a": 3, "b": 2, "c": 2, "d": 1}, most=2) == "3: a; 2: b; 3: other reasons"
    )


def test_the_error_says_what_for_and_why():
    error = NoUsableFactError("erasure", SKIPPED[:2])
    assert isinstance(error, ValueError)
    assert str(error) == (
        "no fact can be used for erasure (1: … does not occur in the prompt …; 1: no first-hop "
        "prompt)"
    )
    assert str(NoUsableFactError("erasure", [])) == "no facts were given for erasure"
