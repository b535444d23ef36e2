"""Backbones by name. Each file holds one model and says in its header where it departs from its source."""

from kdsr_jax.models.backbones.difsr import DIFSR
from kdsr_jax.models.backbones.gru4rec import GRU4Rec
from kdsr_jax.models.backbones.kdsr_lite import KDSRLite
from kdsr_jax.models.backbones.mmsr import MMSR
from kdsr_jax.models.backbones.mmsr_nodes import MMSRNodes
from kdsr_jax.models.backbones.mmsrec import MMSRec
from kdsr_jax.models.backbones.nova import NOVA
from kdsr_jax.models.backbones.sasrec import SASRec
from kdsr_jax.models.backbones.sasrm import SASRM
from kdsr_jax.models.backbones.srgnn import SRGNN
from kdsr_jax.models.backbones.trans2d import Trans2D

BACKBONES = {
    "gru4rec": GRU4Rec,
    "sasrec": SASRec,
    "srgnn": SRGNN,
    "mmsrec": MMSRec,
    "sasrm": SASRM,
    "nova": NOVA,
    "difsr": DIFSR,
    "trans2d": Trans2D,
    "mmsr": MMSR,
    "mmsr_nodes": MMSRNodes,
    "kdsr_lite": KDSRLite,
}
