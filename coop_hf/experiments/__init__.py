"""The experiments of prompt learning: tasks, methods, protocols, tables, plots and their commands."""
