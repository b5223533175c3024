"""``cwfast study``: a grid of defenses, each with and without CWRF, on shared trained weights, attacked and compared.

A grid is a list of cells for each data set and seed; a finished cell is two files, so that a run that was killed goes
on where it was. The report is made of the files alone.
"""

from cwfast.study.running import run

__all__ = ["run"]
