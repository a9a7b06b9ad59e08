"""Ray: the connection, the training job. Nothing else imports ray or optuna."""
