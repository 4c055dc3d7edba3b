"""Live inference: feature rows from a topic or a live table are scored by the model that has the alias.

`prepare_live_inference` finds the first model and the offsets to read from.  `DecodeFeatureRows` decodes a message and
checks its fingerprint and schema.  `ChampionHandler` scores the batch with the current champion; a new champion is
loaded and checked in the background and takes over between two batches.  Predictions are sent to the topic,
acknowledged by the broker, and then committed (`CommitPredictions`).  Batch inference needs only `prepare_inference`:
`transforms.models.Score` scores its rows.
"""

from typing import TYPE_CHECKING

from transforms.public_names import import_when_used

if TYPE_CHECKING:
    from transforms.inference.champion_model import ChampionHandler, close_all
    from transforms.inference.live_input import DecodeFeatureRows, SendFeatureRows
    from transforms.inference.live_output import CommitPredictions, Outlet, TimedCommitPredictions, to_envelope
    from transforms.inference.live_preparation import (
        LiveInferencePlan,
        LiveInferenceRequest,
        live_inference_figures,
        prepare_live_inference,
    )
    from transforms.inference.preparation import InferencePlan, InferenceRequest, prepare_inference

import_when_used(__name__)
