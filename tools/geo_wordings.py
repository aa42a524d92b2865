"""The wordings of `geo`: for each relation its noun phrases, statements and questions.

``[X]`` is the slot. Noun phrases are ``(phrase, verb)``: the phrase stands for the object inside
two-hop prompts, and "The PHRASE VERB" is the prompt of the suffix order. Statements start with the
slot. The answer follows each prompt after one space; no wording contains an answer.
"""

from __future__ import annotations

_ASK = "Question: {}\nAnswer:"


def _relation(
    domain: str,
    target: str,
    nouns: list[tuple[str, str]],
    statements: list[str],
    questions: list[str],
) -> dict[str, object]:
    return {
        "domain": domain,
        "range": target,
        "nouns": [list(pair) for pair in nouns],
        "statements": [f"[X] {text}" for text in statements],
        "questions": [*questions, _ASK.format(questions[0])],
    }


RELATIONS = {
    # --- first hops ------------------------------------------------------------------------------
    "country of city": _relation(
        "city",
        "country",
        [
            ("the country that contains [X]", "is"),
            ("the country where [X] is located", "is"),
            ("the home country of [X]", "is"),
            ("the country that has [X] within its borders", "is called"),
        ],
        [
            "is located in the country of",
            "is a city in",
            "lies in the country called",
            "is a city in the country of",
        ],
        ["Which country is [X] in?", "In what country is [X] located?"],
    ),
    "country of capital": _relation(
        "capital",
        "country",
        [
            ("the country whose capital is [X]", "is"),
            ("the country with the capital [X]", "is"),
            ("the country governed from [X]", "is called"),
        ],
        [
            "is the capital of",
            "is the capital city of the country of",
            "is the seat of the government of",
        ],
        ["Which country has [X] as its capital?", "Of which country is [X] the capital?"],
    ),
    "country of landmark": _relation(
        "landmark",
        "country",
        [
            ("the country that is home to [X]", "is"),
            ("the country where [X] is located", "is"),
            ("the country that people visit to see [X]", "is"),
        ],
        ["is located in the country of", "can be visited in", "is a famous sight in"],
        ["Which country is [X] in?", "In what country is [X] located?"],
    ),
    "city of landmark": _relation(
        "landmark",
        "city",
        [
            ("the city that is home to [X]", "is"),
            ("the city where [X] is located", "is"),
            ("the city that people visit to see [X]", "is"),
            ("the name of the city where [X] is located", "is"),
        ],
        ["is located in the city of", "can be visited in", "is a famous sight in the city of"],
        ["Which city is [X] in?", "In what city is [X] located?"],
    ),
    "city of airport": _relation(
        "airport",
        "city",
        [
            ("the city served by [X]", "is"),
            ("the city that travellers reach through [X]", "is"),
            ("the city near [X]", "is"),
        ],
        ["serves the city of", "is the airport of", "is an airport near the city of"],
        ["Which city does [X] serve?", "What city is [X] near?"],
    ),
    "city of airport code": _relation(
        "airport code",
        "city",
        [
            ("the city served by the airport with the code [X]", "is"),
            ("the city whose airport code is [X]", "is"),
            ("the city that a ticket to [X] takes you to", "is"),
        ],
        [
            "is the code of an airport in the city of",
            "is the airport code of",
            "on a boarding pass means a flight to",
        ],
        ["Which city has the airport code [X]?", "What city does the airport code [X] stand for?"],
    ),
    "country of company": _relation(
        "company",
        "country",
        [
            ("the home country of [X]", "is"),
            ("the country where [X] was founded", "is"),
            ("the country that [X] comes from", "is"),
        ],
        ["is a company from", "was founded in the country of", "has its home in"],
        ["Which country does [X] come from?", "In what country was [X] founded?"],
    ),
    "state of city": _relation(
        "US city",
        "state",
        [
            ("the US state that contains [X]", "is"),
            ("the state where [X] is located", "is"),
            ("the home state of [X]", "is"),
            ("the name of the state where [X] is located", "is"),
        ],
        [
            "is a city in the state of",
            "is located in the US state of",
            "lies in the state called",
            "is a city in the US state of",
        ],
        ["Which state is [X] in?", "In what US state is [X] located?"],
    ),
    "state of capital": _relation(
        "state capital",
        "state",
        [
            ("the state whose capital is [X]", "is"),
            ("the US state with the capital [X]", "is"),
            ("the state governed from [X]", "is called"),
            ("the name of the state whose capital is [X]", "is"),
        ],
        [
            "is the capital of the state of",
            "is the capital city of the US state of",
            "is the seat of the government of the state of",
        ],
        ["Which state has [X] as its capital?", "Of which US state is [X] the capital?"],
    ),
    "element of symbol": _relation(
        "symbol",
        "element",
        [
            ("the element with the symbol [X]", "is"),
            ("the chemical element whose symbol is [X]", "is"),
            ("the element written as [X]", "is called"),
        ],
        [
            "is the chemical symbol of",
            "is the symbol of the element",
            "stands for the chemical element",
        ],
        ["Which element has the symbol [X]?", "What element does the symbol [X] stand for?"],
    ),
    "element of number": _relation(
        "atomic number",
        "element",
        [
            ("the element with the atomic number [X]", "is"),
            ("the chemical element whose atomic number is [X]", "is"),
            ("the element at place [X] of the periodic table", "is called"),
        ],
        [
            "is the atomic number of",
            "is the number of protons in an atom of",
            "is the atomic number of the element called",
        ],
        ["Which element has the atomic number [X]?", "What element has [X] as atomic number?"],
    ),
    # --- second hops: countries -------------------------------------------------------------------
    "capital": _relation(
        "country",
        "capital",
        [
            ("the capital of [X]", "is"),
            ("the capital city of [X]", "is"),
            ("the capital of [X]", "is the city of"),
            ("the name of the capital of [X]", "is"),
        ],
        [
            "has its capital in",
            "has a capital city called",
            "has as its capital the city of",
        ],
        ["What is the capital of [X]?", "Which city is the capital of [X]?"],
    ),
    "currency": _relation(
        "country",
        "currency",
        [
            ("the currency of [X]", "is the"),
            ("the official currency of [X]", "is called the"),
            ("the money used in [X]", "is called the"),
        ],
        [
            "uses a currency called the",
            "has as its currency the",
            "pays with a currency known as the",
        ],
        ["What is the currency of [X]?", "Which currency is used in [X]?"],
    ),
    "continent": _relation(
        "country",
        "continent",
        [
            ("the continent of [X]", "is"),
            ("the continent where [X] is located", "is"),
            ("the continent that contains [X]", "is"),
            ("the name of the continent where [X] is located", "is"),
        ],
        ["is located on the continent of", "belongs to the continent of", "is a country in"],
        ["Which continent is [X] on?", "On what continent is [X] located?"],
    ),
    "language": _relation(
        "country",
        "language",
        [
            ("the official language of [X]", "is"),
            ("the main language of [X]", "is"),
            ("the language spoken in [X]", "is"),
        ],
        [
            "has as its official language",
            "is a place where most people speak",
            "has an official language called",
        ],
        ["What is the official language of [X]?", "Which language is spoken in [X]?"],
    ),
    "demonym": _relation(
        "country",
        "demonym",
        [
            ("the nationality of people from [X]", "is"),
            ("the demonym for people from [X]", "is"),
            ("the nationality of a citizen of [X]", "is"),
            ("the adjective for people from [X]", "is"),
        ],
        [
            "has citizens whose nationality is",
            "has inhabitants whose demonym is",
            "gives out passports to people whose nationality is",
        ],
        [
            "What is the nationality of people from [X]?",
            "What is the demonym for people from [X]?",
        ],
    ),
    "neighbour": _relation(
        "country",
        "country",
        [
            ("a country that borders [X]", "is"),
            ("one neighbouring country of [X]", "is"),
            ("a country right next to [X]", "is"),
            ("the name of a country that borders [X]", "is"),
        ],
        ["shares a border with", "has a land border with", "is right next to the country of"],
        ["Which country borders [X]?", "What is a neighbouring country of [X]?"],
    ),
    "calling code": _relation(
        "country",
        "calling code",
        [
            ("the calling code of [X]", "is"),
            ("the country calling code for [X]", "is"),
            ("the international telephone code of [X]", "is"),
        ],
        [
            "has the country calling code",
            "has the international telephone code",
            "is reached by telephone with the code",
        ],
        ["What is the calling code of [X]?", "Which telephone code does [X] have?"],
    ),
    "internet code": _relation(
        "country",
        "internet code",
        [
            ("the two-letter country code of [X]", "is"),
            ("the two-letter internet code of [X]", "is"),
            ("the two letters of the internet domain of [X]", "are"),
        ],
        [
            "has the two-letter country code",
            "has the two-letter internet code",
            "has an internet domain with the letters",
        ],
        [
            "What is the two-letter country code of [X]?",
            "Which two-letter internet code does [X] have?",
        ],
    ),
    # --- second hops: states ----------------------------------------------------------------------
    "state's capital": _relation(
        "state",
        "state capital",
        [
            ("the capital of [X]", "is"),
            ("the state capital of [X]", "is"),
            ("the capital of [X]", "is the city of"),
        ],
        [
            "has its capital in",
            "has a state capital called",
            "has as its capital the city of",
        ],
        ["What is the capital of [X]?", "Which city is the state capital of [X]?"],
    ),
    "largest city": _relation(
        "state",
        "city",
        [
            ("the largest city in [X]", "is"),
            ("the most populous city of [X]", "is"),
            ("the biggest city in [X]", "is called"),
        ],
        [
            "has as its largest city",
            "has a largest city called",
            "has more people in one city than in any other, namely in",
        ],
        ["What is the largest city in [X]?", "Which city is the most populous in [X]?"],
    ),
    "abbreviation": _relation(
        "state",
        "abbreviation",
        [
            ("the two-letter abbreviation of [X]", "is"),
            ("the postal abbreviation of [X]", "is"),
            ("the two-letter postal code of [X]", "is"),
        ],
        [
            "has the two-letter abbreviation",
            "has the postal abbreviation",
            "is shortened in addresses to",
        ],
        [
            "What is the two-letter abbreviation of [X]?",
            "Which postal abbreviation does [X] have?",
        ],
    ),
    "statehood": _relation(
        "state",
        "year",
        [
            ("the year in which [X] became a state", "was"),
            ("the year in which [X] joined the Union", "was"),
            ("the year of the statehood of [X]", "is"),
        ],
        ["became a state in", "joined the Union in the year", "was admitted to the Union in"],
        ["In which year did [X] become a state?", "When did [X] join the Union?"],
    ),
    # --- second hops: elements ----------------------------------------------------------------------
    "symbol": _relation(
        "element",
        "symbol",
        [
            ("the chemical symbol of [X]", "is"),
            ("the symbol of [X]", "is"),
            ("the symbol for [X] in the periodic table", "is"),
        ],
        [
            "has the chemical symbol",
            "is written with the symbol",
            "is abbreviated by chemists as",
        ],
        ["What is the chemical symbol of [X]?", "Which symbol does [X] have?"],
    ),
    "atomic number": _relation(
        "element",
        "atomic number",
        [
            ("the atomic number of [X]", "is"),
            ("the number of protons in an atom of [X]", "is"),
            ("the place of [X] in the periodic table", "is number"),
        ],
        [
            "has the atomic number",
            "has atoms whose number of protons is",
            "stands in the periodic table at number",
        ],
        ["What is the atomic number of [X]?", "Which atomic number does [X] have?"],
    ),
    "group": _relation(
        "element",
        "group",
        [
            ("the group number of [X] in the periodic table", "is"),
            ("the periodic table group of [X]", "is group"),
            ("the column of [X] in the periodic table", "is number"),
        ],
        [
            "belongs to the group with the number",
            "is in the periodic table in group",
            "is found in the column with the number",
        ],
        [
            "What is the group number of [X] in the periodic table?",
            "In which group of the periodic table is [X]?",
        ],
    ),
    "period": _relation(
        "element",
        "period",
        [
            ("the period number of [X] in the periodic table", "is"),
            ("the periodic table period of [X]", "is period"),
            ("the row of [X] in the periodic table", "is number"),
        ],
        [
            "belongs to the period with the number",
            "is in the periodic table in period",
            "is found in the row with the number",
        ],
        [
            "What is the period number of [X] in the periodic table?",
            "In which period of the periodic table is [X]?",
        ],
    ),
    "family": _relation(
        "element",
        "family",
        [
            ("the chemical family of [X]", "is the"),
            ("the category of [X] in the periodic table", "is"),
            ("the class of elements that contains [X]", "is called"),
        ],
        [
            "is a kind of element called a",
            "is classed by chemists as a",
            "belongs to a family of elements called",
        ],
        ["What kind of element is [X]?", "Which family of elements does [X] belong to?"],
    ),
}
