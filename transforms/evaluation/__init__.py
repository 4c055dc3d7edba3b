"""The test of a model: metrics with confidence intervals, slices, gates, and SHAP contributions.

Each scored test row adds integers to a tally: to the histograms of the metrics, to those of its slices, and to those
of the bootstrap replicates.  `Evaluate` merges the tallies into a `Report`.  `verdicts` compares the report with the
gates of the definition.  `Explain` computes the contributions of a bounded sample of rows.
"""

from typing import TYPE_CHECKING

from transforms.public_names import import_when_used

if TYPE_CHECKING:
    from transforms.evaluation.evaluate import Evaluate, Report, metrics_record, tally_columns
    from transforms.evaluation.gates import (
        BEATS,
        RATES,
        Rival,
        Verdict,
        fairness_records,
        may_know,
        paired_differences,
        verdicts,
    )
    from transforms.evaluation.shap import Explain, Explanation

import_when_used(__name__)
