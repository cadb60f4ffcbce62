"""Under pytest-xdist (`make test` runs two tests at a time) every test, and every process that it starts, has one core."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
