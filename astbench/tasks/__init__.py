"""Tasks by name, one folder a family. Imports nothing heavy."""

from astbench.tasks.registry import find_task, load_plugin, register_task, registered_tasks
from astbench.tasks.table import TASKS, Task

__all__ = ["TASKS", "Task", "find_task", "load_plugin", "register_task", "registered_tasks"]
