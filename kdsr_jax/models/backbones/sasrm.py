"""SASRM: SASRec whose item input joins the id with modality vectors (the KDSR authors' own baseline, Section 4).

Its source is not public; in the form here each modality's vector is mapped linearly to dim, fused with the id
vector, and read by the encoder of SASRec; scores are taken against the id table.

Deviations from the source: unknown where it is silent. The fusion is the softmax gate by default (``model.fusion``); SASRecF,
the likely model for it, concatenates (``model.fusion="concat"``).
"""

from kdsr_jax.models.backbones.sasrec import SASRec


class SASRM(SASRec):
    """SASRec over fused item vectors with a linear map per modality."""

    project_modalities = True
