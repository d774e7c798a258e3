"""Training: one loop over players, and what it needs. The recipe logs, evaluates and samples between the
steps.

loop        the generator `train` over players (a loss and its optimizer); resumes exactly
checkpoint  atomic checkpoint folders with a manifest; safetensors and JSON only
log         the run folder: configuration, metrics, curves, samples, progress
plan        how long it will take and how much memory it needs, before the first step
optimizers, schedule, ema, precision    what they say
"""

from reverie.train.ema import Ema
from reverie.train.log import Run
from reverie.train.loop import NonFiniteError, Player, Step, Stopped, train
from reverie.train.optimizers import adamw
from reverie.train.plan import Plan, estimate

__all__ = ["Ema", "NonFiniteError", "Plan", "Player", "Run", "Step", "Stopped", "adamw", "estimate", "train"]
