"""mergekit's own arithmetic (0.1.5), for `compat`: whole tensors, in the models' type, rounded where mergekit rounds.

One function per method whose steps in half types show in the result; `linear` and `slerp`, which mergekit computes in
float32, run block by block as ever. Random numbers are torch's, drawn in mergekit's order. Legend of both files: n
models, ... the tensor's own shape; a task vector is model minus base.
"""

from __future__ import annotations

from gnomon.merge.compat import directions, task_vectors
from gnomon.merge.compat.task_vectors import Whole


def side_by_side(name: str) -> Whole | None:
    """mergekit's steps of a method; None where the blocks' arithmetic is mergekit's already."""
    return _WHOLE.get(name)


WIDENED = ("arcee_fusion", "ramplus_tl")
"""Methods that multiply by float32 masks: what mergekit makes of half types is float32, where no `out_dtype` is set."""
_WHOLE: dict[str, Whole] = {
    "task_arithmetic": task_vectors.task_arithmetic,
    "ties": task_vectors.ties,
    "breadcrumbs": task_vectors.breadcrumbs(elect=False),
    "breadcrumbs_ties": task_vectors.breadcrumbs(elect=True),
    "dare_linear": task_vectors.dare(elect=False),
    "dare_ties": task_vectors.dare(elect=True),
    "della": task_vectors.della(elect=True),
    "della_linear": task_vectors.della(elect=False),
    "sce": task_vectors.sce,
    "ram": task_vectors.ram(plus=False),
    "ramplus_tl": task_vectors.ram(plus=True),
    "model_stock": directions.model_stock,
    "nuslerp": directions.nuslerp,
    "multislerp": directions.multislerp,
    "karcher": directions.karcher,
    "nearswap": directions.nearswap,
    "passthrough": directions.passthrough,
    "arcee_fusion": directions.arcee_fusion,
}
