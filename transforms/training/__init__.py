"""Labels, examples, fitting, hyperparameter search, training and publishing of a model."""
