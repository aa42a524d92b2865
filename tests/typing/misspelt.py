"""Names that do not exist: mypy and pyright must refuse each of the three."""

import mi_hops
from mi_hops import load_modle

mi_hops.find_gapp
mi_hops.patching.pach
