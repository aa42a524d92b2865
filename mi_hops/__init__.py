"""Find out how a language model answers a two-hop question, why it fails, and repair it.

"The nationality of the author of *Misery* is ___": the model has to recall the *bridge* (Stephen
King), which does not appear in the prompt, and from it the answer. This package asks a TransformerLens
model which such questions fail although both hops are known, where the bridge shows up inside the
model, whether it causes the answer, which modules carry it, and whether a repair holds.

The public names are listed in ``__init__.pyi`` and loaded when they are first used: ``import mi_hops``
runs nothing and imports neither torch nor TransformerLens.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
