"""Statistics of tables, the reviewed TFDV schema, and the check before features are published."""
