"""Backbones by name. Each file holds one model and says in its header where it departs from its source."""

from kdsr_jax.models.backbones.sasrec import SASRec
from kdsr_jax.models.backbones.sasrm import SASRM

BACKBONES = {"sasrec": SASRec, "sasrm": SASRM}
