"""What every pipeline and command runs on: arguments, errors, run report, local runner, job supervisor, terminal."""
