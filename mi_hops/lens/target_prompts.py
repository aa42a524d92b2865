"""Target prompts for Patchscopes, by what they make the model say of the state they are given.

Each ends in a placeholder, the last token, where `patchscope` puts the source's state by
default. They are the few-shot prompts of *Patchscopes* (Ghandeharioun et al. 2024, arXiv 2401.06102);
a small model needs examples in words that it knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

#: Entities and what they are, as published.
ENTITIES = {
    "Syria": "Country in the Middle East",
    "Leonardo DiCaprio": "American actor",
    "Samsung": "South Korean multinational major appliance and consumer electronics corporation",
}

#: Tokens that are repeated, as published.
REPEATED = ("cat", "1135", "hello")


def entity_description_prompt(
    examples: Mapping[str, str] | None = None, placeholder: str = "x"
) -> str:
    """A prompt that makes the model describe the entity in the patched state.

    "Syria: Country in the Middle East, ..., x": generate from it
    (`patchscope_generate`) with the state of the entity's last token.

    Args:
        examples: entity -> description; default `ENTITIES`.

    Raises:
        ValueError: no example, or a placeholder of white space.
    """
    chosen = ENTITIES if examples is None else examples
    return _few_shot([f"{entity}: {what}" for entity, what in chosen.items()], ", ", placeholder)


def next_token_prompt(examples: Sequence[str] | None = None, placeholder: str = "?") -> str:
    """A prompt that makes the model output the token that the patched state predicts.

    A line "cat -> cat" for each word, then "?": the state at a source's last token then reads as the
    source's next token. Into the last layer this is the logit lens, whatever the examples.

    Args:
        examples: words; default `REPEATED`.

    Raises:
        ValueError: no example, or a placeholder of white space.
    """
    chosen = REPEATED if examples is None else examples
    return _few_shot([f"{word} -> {word}" for word in chosen], "\n", placeholder)


def _few_shot(shots: Sequence[str], between: str, placeholder: str) -> str:
    if not shots or not placeholder.strip():
        raise ValueError(
            f"{len(shots)} examples and the placeholder {placeholder!r}; give at least one example, "
            "and a token that the state can replace"
        )
    return between.join([*shots, placeholder.strip()])
