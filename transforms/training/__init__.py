"""From a feature table to a registered model.

A feature row gets its label and its split (`MakeExamples`) and is written to TFRecord and Parquet.  `Fit` fits the
encoders on the training split.  `Train` runs the trials of the search and keeps the best model.  `examine` checks the
data, `Compare` scores the champion on the same test rows, and `publish` registers the model and moves the alias if all
gates hold.
"""

from typing import TYPE_CHECKING

from transforms.public_names import import_when_used

if TYPE_CHECKING:
    from transforms.training.champion_comparison import Challenge, Compare
    from transforms.training.data_checks import STATISTICS, Leaks, examine, model_columns
    from transforms.training.examples import (
        FOLDER,
        ExamplePlan,
        ExamplesAccount,
        MakeExamples,
        add_accounts,
        checked,
        delete_files,
        read_shard,
        shards_to_test,
    )
    from transforms.training.fit_encoders import Fit, declared
    from transforms.training.float32_checks import lost_digits
    from transforms.training.hyperparameter_search import trials
    from transforms.training.preparation import (
        TrainingRequest,
        code_digest,
        constraints_digest,
        prepare_training,
        relative_to,
        within,
    )
    from transforms.training.publish_model import (
        BUNDLE,
        PENDING,
        REPORT,
        Publication,
        RunOutcome,
        failed_gates,
        publish,
        read_record,
        register_model,
        register_run,
        rival_of,
    )
    from transforms.training.trainer import BundleRequest, Study, Train, Trained, save_best
    from transforms.training.trial_log import metrics_of
    from transforms.training.unseen_categories import unseen
    from transforms.training.xgboost_data import until

import_when_used(__name__)
