"""Where decoded pictures may be kept (pipeline.kept_memory). Imports nothing heavy, since command lines name it too."""

from typing import Literal

Place = Literal["auto", "no", "gpu", "host"]
