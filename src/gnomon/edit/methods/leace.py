"""LEACE: erase a concept from a layer's output, in closed form, with the least change (arXiv 2306.03819).

Facts are labelled texts: the prompt is the text, the target its class. x' = x - W^+ U U^T W (x - mu) with the whitening
W = Sigma_xx^(-1/2) and U an orthonormal basis of the columns of W Sigma_xz: afterwards no linear classifier does better
than the mean, and no other affine map that achieves this moves x less. Few texts in many dimensions:
Sigma_xx is shrunk towards its mean variance. Several layers are erased from left to right, each as the ones before
leave it (concept scrubbing).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from gnomon.edit.editor import Editor
from gnomon.edit.facts import Fact
from gnomon.edit.methods.steer import last_outputs
from gnomon.edit.registry import Change, MethodOptions, edit_method
from gnomon.errors import EditError, UsageError
from gnomon.kernels.wrappers import make_wrapper
from gnomon.models.patch import Wrapper


class LeaceOptions(MethodOptions):
    """LEACE's options."""

    shrinkage: Annotated[float, Field(ge=0, lt=1, description="Share of the mean variance in Sigma_xx.")] = 0.1
    tolerance: Annotated[float, Field(gt=0, description="Singular values of W Sigma_xz below this do not count.")] = (
        0.01
    )


@dataclass(frozen=True)
class Eraser:
    """x' = x + left (right x) + bias; left [C, r], right [r, C], float64."""

    left_Cr: Tensor
    right_rC: Tensor
    bias_C: Tensor


def eraser(x_UC: Tensor, z_UZ: Tensor, *, shrinkage: float = 0.0, tolerance: float = 0.01) -> Eraser:
    """LEACE of vectors x with concept z (one-hot or numbers). Raises EditError when there is nothing to erase."""
    x, z = x_UC.double(), z_UZ.double()
    mean_C = x.mean(0)
    centred, concept = x - mean_C, z - z.mean(0)
    sigma_CC = centred.T @ centred / len(x)
    size = sigma_CC.shape[0]
    scale = torch.trace(sigma_CC) / size
    sigma_CC = (1 - shrinkage) * sigma_CC + shrinkage * scale * torch.eye(size, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(sigma_CC)
    kept = values > values[-1] * size * torch.finfo(torch.float64).eps
    root = torch.where(kept, values.clamp(min=0).sqrt(), 0.0)
    inverse = torch.where(kept, 1.0 / root, 0.0)
    whiten = vectors * inverse @ vectors.T
    colour = vectors * root @ vectors.T
    basis, strengths, _ = torch.linalg.svd(whiten @ (centred.T @ concept / len(x)), full_matrices=False)
    basis = basis[:, strengths > tolerance]
    if basis.shape[1] == 0:
        raise EditError("The classes do not differ linearly here: there is nothing to erase.", hint="Another --layer.")
    left, right = -(colour @ basis), basis.T @ whiten
    return Eraser(left, right, -(left @ (right @ mean_C)))


@edit_method("leace", LeaceOptions, paper="2306.03819", answers=False, on="activations")
def leace(editor: Editor, facts: Sequence[Fact], options: LeaceOptions) -> Change:
    """Erase what tells the facts' targets apart from a layer's output; prompts are texts, targets their classes."""
    middle = len(editor.anatomy.layers) // 2
    layers = editor.anatomy.check_layers(options.layers if options.layers is not None else [middle])
    classes = sorted({fact.target for fact in facts})
    if len(classes) < 2 or len(facts) < 4:
        raise UsageError(
            f"`leace` erases what tells classes apart; {len(facts)} texts of {len(classes)} classes were given.",
            hint="Give at least four texts as facts, each with its class as target: TEXT -> CLASS.",
            param="facts",
        )
    z_UZ = torch.tensor([[float(fact.target == one) for one in classes] for fact in facts])
    texts = [editor.model.encode(fact.prompt) for fact in facts]
    wrappers, about = [], []
    with ExitStack() as worn:
        for layer in layers:
            found = eraser(
                last_outputs(editor, layer, texts), z_UZ, shrinkage=options.shrinkage, tolerance=options.tolerance
            )
            tensors = {"left": found.left_Cr, "right": found.right_rC, "bias": found.bias_C}
            wrapper = Wrapper("affine", layer, {name: tensor.float() for name, tensor in tensors.items()})
            worn.enter_context(editor.wrapped(layer, partial(make_wrapper, "affine", wrapper.tensors)))
            wrappers.append(wrapper)
            about.append({"layer": layer, "rank": found.left_Cr.shape[1]})
    return Change({}, [{"erased": about} for _ in facts], about={"classes": classes}, wrappers=wrappers)
