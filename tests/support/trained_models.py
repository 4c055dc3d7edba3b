"""Helpers and fixtures for: bundles and the registry: nothing altered is loaded, nothing is registered twice, every
refusal says the way out."""

from __future__ import annotations

import numpy as np
import xgboost

from transforms.models.bundle import Bundle
from transforms.models.encoders import Encoding, Fitted


def trained(seed: int = 0, classes: int = 1) -> Bundle:
    """A real booster over two inputs."""
    random = np.random.default_rng(seed)
    matrix = random.normal(size=(200, 2)).astype(np.float32)
    labels = (matrix[:, 0] > 0).astype(np.float32)
    params = {"objective": "binary:logistic", "max_depth": 2, "seed": seed, "nthread": 1}
    booster = xgboost.train(params, xgboost.DMatrix(matrix, labels, feature_names=["x", "n"]), 3)
    fitted = Fitted((Encoding("x", "float"), Encoding("n", "int64")))
    manifest = {
        "model": "delay",
        "objective": "binary:logistic",
        "classes": classes,
        "fingerprint": "f" * 16,
        "view": "delay",
        "key": ["id"],
        "time": "asked_at",
        "inputs": fitted.inputs,
        "feature_table": {"uri": "somewhere", "version": 3},
    }
    return Bundle(bytes(booster.save_raw("ubj")), fitted, manifest)
