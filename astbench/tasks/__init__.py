"""Tasks by name, one folder a family. Imports nothing heavy."""

from astbench.tasks.table import TASKS, Task, find_task

__all__ = ["TASKS", "Task", "find_task"]
