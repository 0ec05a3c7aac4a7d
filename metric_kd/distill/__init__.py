"""Terms that also read the teacher. Importing the package registers every method in it, one file each."""

import importlib
import pkgutil

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
