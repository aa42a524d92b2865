"""Names that do not exist: mypy and pyright must refuse each of the three."""

import mi_hops
from mi_hops import load_modle

model = load_modle("hops-gpt2")
gap = mi_hops.find_gapp(model, [])
patched = mi_hops.patching.pach(model)
