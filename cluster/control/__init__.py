"""The controller: who serves, what follows a loss, and every change of the running cluster."""
