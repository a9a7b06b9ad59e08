"""Ray: the connection, the jobs. Nothing else imports ray or optuna."""

import os

# Read when ray is imported. A cluster of this machine alone then listens on loopback, as on macOS and Windows.
if not os.environ.get("RAY_ADDRESS"):
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
