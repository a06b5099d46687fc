"""The commands: each file parses one command's flags, calls a function below, prints results."""
