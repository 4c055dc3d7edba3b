"""The environment of every pipeline and command: arguments, errors, run report, local runner, job supervisor,
terminal."""
