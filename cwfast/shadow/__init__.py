"""Shadow models: who trains on what, jobs that survive kill -9 on any engine, and the signals they end in.

``signals`` does all of it; ``Plan``, ``run`` and ``collect`` are its steps, for jobs of your own.
"""

from cwfast.shadow.fleets import Training, signals
from cwfast.shadow.plan import Plan
from cwfast.shadow.runner import collect, run

__all__ = ["Plan", "Training", "collect", "run", "signals"]
