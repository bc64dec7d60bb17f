"""SQuAD's file as the data module reads it, by itself."""

from astbench.tasks.qa.sources import existing
from astbench.tasks.qa.squad import read_squad_file, squad_file


def read_squad(path, whole_articles=False):
    """The questions of a file, or of the folder that holds it."""
    return read_squad_file(squad_file(existing(path), "validation")[0], whole_articles, [])
