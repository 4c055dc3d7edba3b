"""From a feature table to a registered model.

A feature row gets its label and its split (`MakeExamples`) and is written to TFRecord and Parquet.  `FitEncoders` fits
the encoders on the training split.  `Train` runs the trials of the search and keeps the best model.  `check_data`
checks the data, `CompareWithChampion` scores the champion on the same test rows, and `publish_trained_model` registers
the model and moves the alias if all gates hold.
"""

from typing import TYPE_CHECKING

from transforms.public_names import import_when_used

if TYPE_CHECKING:
    from transforms.training.champion_comparison import Challenge, CompareWithChampion
    from transforms.training.data_checks import STATISTICS, FindLeaks, check_data, model_columns
    from transforms.training.examples import (
        EXAMPLES_FOLDER,
        ExamplePlan,
        ExamplesAccount,
        MakeExamples,
        add_accounts,
        delete_files,
        read_shard,
        require_usable,
        shards_to_test,
    )
    from transforms.training.fit_encoders import FitEncoders, declared_inputs
    from transforms.training.float32_checks import lost_digits
    from transforms.training.hyperparameter_search import first_trials
    from transforms.training.preparation import (
        TrainingRequest,
        code_digest,
        constraints_digest,
        path_within_source,
        path_within_store,
        prepare_training,
    )
    from transforms.training.publish_model import (
        BUNDLE,
        PENDING,
        REPORT,
        Publication,
        RunOutcome,
        failed_gates,
        publish_trained_model,
        read_record,
        register_model,
        register_run,
        rival_of,
    )
    from transforms.training.trainer import BundleRequest, Study, Train, Trained, save_best
    from transforms.training.trial_log import logged_metrics
    from transforms.training.unseen_categories import warn_of_unseen
    from transforms.training.xgboost_data import examples_of_fold

import_when_used(__name__)
