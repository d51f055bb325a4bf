"""A weight whose experts are spread over ranks: this rank's part, and the whole it belongs to.

Kernels take the part, a plain tensor made anew for every use. What belongs to the parameter, its
cached FP8 copies and its `main_grad`, is found through it. The parameter's version has to be asked
for as well: an optimizer's in-place update of a DTensor raises that of the DTensor alone.
"""

from __future__ import annotations

from typing import Any

import torch


def local_weight(w: torch.Tensor) -> torch.Tensor:
    """The part of a DTensor that is on this rank, differentiable; any other tensor as it is."""
    if type(w) in (torch.Tensor, torch.nn.Parameter):
        return w
    to_local: Any = getattr(w, "to_local", None)
    if to_local is None:
        return w
    local = to_local()
    if not torch.is_grad_enabled():  # torch 2.11 then returns what the DTensor holds, not a view
        local = local.detach()
    local.part_of = w
    return local


def whole(w: torch.Tensor) -> torch.Tensor:
    """The parameter that `w` is the local part of; w itself if it is no part."""
    return getattr(w, "part_of", w)
