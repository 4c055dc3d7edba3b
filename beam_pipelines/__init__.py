"""The three pipelines and the command line."""

import logging
import os
import warnings

# Messages of libraries about themselves, on which a user of Millrace cannot act.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"google\..*")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
_NOISE = ("crcmod package not found", "Resource module is not available")
logging.getLogger().addFilter(lambda record: not str(record.msg).startswith(_NOISE))
