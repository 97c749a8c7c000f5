"""Packages that mmdet wants and PyPI does not have, as far as mmdet calls them; to be imported before mmdet is.

Where the real one is installed, it is used. Users install it, for figures that are published should be those of the reference
program.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # the last place: an installed package is found first
