# What editors and type checkers see of the lazy names in __init__.py.
from cwfast import checkpoint as checkpoint
from cwfast import data as data
from cwfast import defense as defense
from cwfast import distributed as distributed
from cwfast import errors as errors
from cwfast import integrations as integrations
from cwfast import layers as layers
from cwfast import llm as llm
from cwfast import mia as mia
from cwfast import ops as ops
from cwfast import optim as optim
from cwfast import reference as reference
from cwfast import report as report
from cwfast import shadow as shadow
from cwfast import testing as testing
from cwfast import training as training
from cwfast._backends import backends as backends
from cwfast.freezing import freeze as freeze
from cwfast.masks import MaskSet as MaskSet
from cwfast.masks import rewind_ as rewind_
from cwfast._selecting import select as select
from cwfast.scoring import SaliencyScorer as SaliencyScorer

__version__: str
