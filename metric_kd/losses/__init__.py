"""Terms, triplet samplers and the objective. Importing the package registers every loss in it."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
