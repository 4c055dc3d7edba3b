"""Checks before training of what XGBoost only warns of: unknown parameters, and a device that is not available.

XGBoost reports both as a `UserWarning` whose only content is text, so they are recognised by their text.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence

from schemas.errors import DataError, DefinitionError, nearest
from transforms.training.hyperparameter_search import Trial

# The common names of XGBoost's parameters, from which a message suggests one.
_KNOWN = (
    "alpha",
    "base_score",
    "booster",
    "colsample_bylevel",
    "colsample_bynode",
    "colsample_bytree",
    "eta",
    "gamma",
    "grow_policy",
    "interaction_constraints",
    "lambda",
    "learning_rate",
    "max_bin",
    "max_cat_threshold",
    "max_cat_to_onehot",
    "max_delta_step",
    "max_depth",
    "max_leaves",
    "min_child_weight",
    "monotone_constraints",
    "num_parallel_tree",
    "reg_alpha",
    "reg_lambda",
    "sampling_method",
    "scale_pos_weight",
    "subsample",
    "tree_method",
)


def require_known(objective: str, trials: Sequence[Trial]) -> None:
    """Refuse a parameter that XGBoost ignores in every trial that sets it; XGBoost itself accepts any name.

    The search reports a trial that XGBoost refuses as a whole.

    Raises:
        DefinitionError: XGBoost does not know a name, or ignores it because of another parameter.
    """
    unused: set[str] | None = None
    for params in {repr(sorted(each.params.items())): each.params for each in trials}.values():
        if (found := _unused(objective, params)) is not None:
            unused = found if unused is None else unused & found
    if unused:
        name = min(unused)
        fix = "Rounds are Model(rounds=…)" if name in ("n_estimators", "num_boost_round") else nearest(name, _KNOWN)
        raise DefinitionError(
            "A parameter of params or of the search must be one that XGBoost uses",
            f"there is {name!r}",
            fix if "Did" in fix or "Rounds" in fix else "Correct its name, or leave it out",
        )


def _unused(objective: str, params: Mapping[str, object]) -> set[str] | None:
    """Names in `params` that XGBoost warns it does not use; None if it refuses to train."""
    import numpy as np
    import xgboost

    rows = np.arange(8, dtype=np.float32)[:, None]
    given = {
        name: value for name, value in params.items() if name not in ("monotone_constraints", "interaction_constraints")
    }
    several = {"num_class": 2} if objective == "multi:softprob" else {}
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        try:
            matrix = xgboost.DMatrix(rows, rows[:, 0] % 2, nthread=1)
            xgboost.train(
                {"nthread": 1, **given, **several, "tree_method": "hist", "objective": objective, "verbosity": 1},
                matrix,
                1,
            )
        except (xgboost.core.XGBoostError, TypeError, ValueError):
            return None
    lists = [re.search(r"Parameters: \{(.*)\} are not used", str(each.message)) for each in raised]
    return {name for each in lists if each for name in re.findall(r'"([^"]+)"', each[1])}


def require_device(device: str) -> None:
    """Refuse to train on a device that is not available; XGBoost would use the CPU, with a warning at most.

    Args:
        device: `cpu`, or `cuda` with an optional number, as XGBoost names it.

    Raises:
        DataError: this process has no such device.
    """
    import numpy as np
    import xgboost

    if device == "cpu":
        return
    reason = ""
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        try:
            rows = np.zeros((2, 1), np.float32)
            xgboost.train({"device": device, "verbosity": 1}, xgboost.DMatrix(rows, rows[:, 0], nthread=1), 1)
        except xgboost.core.XGBoostError as error:
            reason = first_line(error)
    reason = reason or next(
        (first_line(each.message) for each in raised if "GPU" in str(each.message) or "CUDA" in str(each.message)), ""
    )
    if reason:
        raise DataError(
            "Trials must run on the device that --device names",
            f"for {device}, XGBoost reports: {reason.rstrip('.')}",
            "Train with --device=cpu, or on workers with such a GPU, its driver, and an XGBoost built for CUDA",
        )


def first_line(error: object) -> str:
    """The line of XGBoost's message that states the fault, without the time and the position in its source."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = next((each for each in lines if "Check failed" in each or "Invalid" in each), lines[0])
    return re.sub(r"^\[[\d:]+\] (WARNING: )?\S+:\d+: ?", "", line).strip()[:300] or lines[-1].strip()[:300]
