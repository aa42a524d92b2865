"""The study: all questions about two hops, asked in order of one model and one set of facts.

gap -> failure types -> lens -> erasure -> locate -> inject -> edit and evaluate. Every step writes
one NetCDF file into the study's folder as it ends, so a stopped study resumes where it stopped.
What is *chosen* (layers, an injection's cell, an edit's covariance) is chosen on one half of the
failures and reported on the other.

The public names are listed in ``__init__.pyi`` and loaded when they are first used, so that a finished
study is reopened without loading torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
