"""Ray: the connection, the jobs. Nothing else imports ray or optuna."""
