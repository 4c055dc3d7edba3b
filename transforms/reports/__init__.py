"""The HTML report of a training run: one file without scripts that needs no network.

No row passes through this package.  `render` turns the content of `training.json` into a page of sections.
"""

from typing import TYPE_CHECKING

from transforms.public_names import import_when_used

if TYPE_CHECKING:
    from transforms.reports.report import FILE, render

import_when_used(__name__)
