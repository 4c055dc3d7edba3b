"""Trained models: encoders, the model bundle, the registry, and scoring.

A feature row is encoded to a float32 matrix by the `Fitted` encoders of a `Bundle`, and the bundle's booster scores it.
`Score` does so in a pipeline through Beam's RunInference, `score` for one batch without Beam.  A bundle is a folder of
plain files whose digests are checked before anything is parsed.  `Registry` names bundles by version and by alias.
"""

from typing import TYPE_CHECKING

from transforms.public_names import import_when_used

if TYPE_CHECKING:
    from transforms.models.bundle import Bundle, bundle_digest, load_bundle, model_manifest, read_bytes, save_bundle
    from transforms.models.encoders import (
        EXACT,
        EncoderState,
        Encoding,
        Fitted,
        Matrix,
        as_categories,
        as_distinct_values,
        as_doubles,
        as_int64,
        columns_needed,
        input_column,
        is_whole,
    )
    from transforms.models.mlflow_pyfunc import load_pyfunc
    from transforms.models.problem_identity import problem_of, require_same_problem
    from transforms.models.registry import CHAMPION, RUN, Registry, RunRecord, preparing_database, registry_uri
    from transforms.models.scoring import (
        ARM,
        PinnedModel,
        Score,
        Scorer,
        carried_name,
        columns_read,
        open_scorer,
        predict,
        score,
    )
    from transforms.models.stored_records import (
        CalibrationBin,
        ChampionMove,
        ClassMetrics,
        CurvePoints,
        ExplanationRecord,
        ExplanationSummary,
        FairnessRecord,
        FindingsRecord,
        GateRecord,
        GateRules,
        GroupRates,
        InputPoints,
        InputShare,
        MetricDetails,
        MetricsRecord,
        ModelManifest,
        ProvenanceRecord,
        RateName,
        RegistrationRecord,
        RequestExample,
        RetrainingRecord,
        RivalRecord,
        SliceRecord,
        SourceRecord,
        Spans,
        SplitBounds,
        SplitCounts,
        TableVersion,
        ThresholdRates,
        TrainingRecord,
        TrialRecord,
    )

import_when_used(__name__)
