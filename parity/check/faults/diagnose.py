"""Diagnosis of a divergence by the planted faults that look alike.

The right model is given each known fault in turn. If it then computes what the wrong one
does, that is the fault, or one that nobody can tell from it.
"""

import numpy as np
from jaxtyping import Int

from parity.check.faults.suite import FAULTS
from parity.check.oracles.interface import OF_VISION, Dtype, Pictures, Stages
from parity.check.oracles.lechat_jax import JaxOracle
from parity.check.probes import Model
from parity.check.tolerances import relative
from parity.check.verdict import Stage

FORWARD = (*OF_VISION, "embed", "attn", "mlp", "norm", "logits")


def recognise(
    wrong: Model,
    right: Model,
    stage: Stage,
    tokens: Int[np.ndarray, "B T"],
    dtype: Dtype,
    first_position: int = 0,
    pictures: Pictures = (),
) -> str:
    """The known fault of lechat_jax that makes of `right` what `wrong` does at that stage.

    An empty text if there is none, or if the stage is not one of a forward pass. `stage`
    must be the first at which they part, since only its layer is given a fault.
    """
    if stage.stage not in FORWARD or (stage.layer is not None and stage.stage == "norm"):
        return ""
    label = stage.label

    def made_by(model: Model) -> Stages:
        oracle = JaxOracle(*model, dtype)
        if pictures:
            oracle.show(pictures)
        return oracle.forward(tokens, first_position)

    seen = made_by(wrong)[label]
    for fault in FAULTS:
        if not fault.needs(right.config) or fault.expected.partition(".")[0] != stage.stage:
            continue
        with fault.plant(right, stage.layer or 0) as guess:
            made = made_by(guess).get(label)
        if made is not None and relative(made, seen) <= stage.budget:
            return fault.name
    return ""
