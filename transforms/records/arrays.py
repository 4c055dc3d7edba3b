"""Types of NumPy arrays, by the kind of their elements."""

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]
