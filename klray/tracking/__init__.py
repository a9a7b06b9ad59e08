"""What a run measured: kept in its own directory (records), sent to MLflow from there (mlflow_upload)."""
