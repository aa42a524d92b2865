"""Text as tokens: prompts, answers, positions, batches, streamed corpora, and answer matching."""

from .corpus import fact_texts as fact_texts
from .corpus import token_batches as token_batches
from .matching import matches as matches
from .matching import normalise as normalise
from .tokens import Batch as Batch
from .tokens import Prompt as Prompt
from .tokens import TokenError as TokenError
from .tokens import Where as Where
from .tokens import align as align
from .tokens import answer_ids as answer_ids
from .tokens import decode as decode
from .tokens import encode as encode
from .tokens import last_position as last_position
from .tokens import pad as pad
from .tokens import positions as positions
