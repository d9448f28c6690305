"""The version for pyproject.toml: CMakeLists.txt's, with CLARA_FAST_LOCAL_VERSION after a plus where it is set.

So each kind of wheel has a file name of its own: ``0.1.0+cpu``, ``0.1.0+cu130``.
"""

import os
import re
from pathlib import Path


def dynamic_metadata(settings, project):
    source = Path(__file__).parents[1] / "CMakeLists.txt"
    version = re.search(r"project\(clara_fast VERSION ([0-9.]+)", source.read_text())[1]
    label = os.environ.get("CLARA_FAST_LOCAL_VERSION")
    if label and not re.fullmatch(r"cpu|cu[0-9]{3}", label):
        raise ValueError(f"CLARA_FAST_LOCAL_VERSION ({label}) must be cpu or cu with three digits, such as cu130")
    return {"version": f"{version}+{label}" if label else version}
