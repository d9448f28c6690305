"""Print torch's include folder, without importing torch; print nothing where there is no torch.

``find_spec`` sees torch in an ordinary environment. In pip's isolated build environment the interpreter is
still the one that will use the wheel, but its site-packages are off the path, so ``purelib`` is looked at too.
"""

import importlib.util
import sysconfig
from pathlib import Path


def candidates():
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent
    for scheme in ("purelib", "platlib"):
        yield Path(sysconfig.get_path(scheme)) / "torch"


for folder in candidates():
    if (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        print(folder / "include", end="")
        break
