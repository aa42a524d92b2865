"""The words of the tasks: templates, names and things, all of them common English."""

from __future__ import annotations

#: Of indirect object identification: ``{A}`` and ``{B}`` are met, ``{S}`` (one of them) gives.
IOI_TEMPLATES = (
    "When {A} and {B} went to the {place}, {S} gave a {thing} to",
    "Then {A} and {B} walked to the {place}. {S} handed a {thing} to",
    "After {A} and {B} arrived at the {place}, {S} passed a {thing} to",
    "While {A} and {B} were working at the {place}, {S} offered a {thing} to",
    "Yesterday {A} and {B} met at the {place}, and {S} brought a {thing} to",
    "{A} and {B} had lunch near the {place}, and then {S} sent a {thing} to",
)

NAMES = tuple(
    "Mary John Tom James Dan Martin Amy Anna Paul Mark Alice Jack Robert Sarah Laura Kate David "
    "Peter Simon Emily Lucy Henry Charles George Frank Adam Eric Kevin Brian Andrew Thomas Daniel "
    "Michael William Rachel Maria Lisa Susan Karen Linda Emma Grace Jane Rose Ruth Steven Scott "
    "Jason Ryan Matthew Joseph Richard Edward Victor Oliver Max Leo Ben Sam Alex".split()
)

PLACES = tuple(
    "store park school office house garden station hospital restaurant library market beach".split()
)

THINGS = tuple("drink book ball ring letter key basket bag picture phone bottle ticket".split())

#: Of greater-than: what lasts from one year to a later one of the same century.
NOUNS = tuple(
    "war treaty journey reign strike drought siege project dispute campaign voyage contract".split()
)

CENTURIES = ("12", "13", "14", "15", "16", "17", "18")

#: Of docstring completion: names of functions and arguments, and words for their descriptions.
CODE_NAMES = tuple(
    "load size files last path name mode value index order count data text line table group date "
    "time key type state event source target limit level field model image color width height url "
    "user host port node root parent filter result option".split()
)

DESCRIPTION = tuple(
    "oil piece wind column river stone music garden winter paper bridge village machine window "
    "animal doctor market summer silver castle".split()
)
