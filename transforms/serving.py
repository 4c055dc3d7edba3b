"""The loader module that registered models name; the code is in `transforms/models/mlflow_pyfunc.py`."""

from transforms.models.mlflow_pyfunc import load_pyfunc as _load_pyfunc

__all__ = ["_load_pyfunc"]
