"""The folder that a run leaves: commits, report page, model card; what the terminal shows; the audit."""
