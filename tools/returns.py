"""A griffe extension (mkdocs.yml): what a function returns is told in a sentence, colons and all."""

from __future__ import annotations

import re
from typing import Any

import griffe

_RETURNS = re.compile(r"^(\s*Returns:\n\s+)(?=\S)", re.M)


class WholeSentences(griffe.Extension):
    """Puts the annotated type before the text, where griffe looks for one up to the first colon."""

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Of every function that says what it returns."""
        if func.docstring is not None and func.returns is not None:
            kind = str(func.returns).replace(":", "")
            text = _RETURNS.sub(lambda found: f"{found[1]}{kind}: ", func.docstring.value, count=1)
            func.docstring.value = text
