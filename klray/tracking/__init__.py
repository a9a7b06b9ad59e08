"""MLflow, and nothing else: what lies in a run's folder is sent there. Nothing else imports mlflow."""
