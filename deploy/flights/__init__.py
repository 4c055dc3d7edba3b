"""The flights example as a demonstration: `batch` runs the three pipelines on a year of flights, `live` runs the live
jobs on a month of them.  `./run_local.sh` and `./run_local.sh stream` start them."""
