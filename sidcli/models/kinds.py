"""All kinds of denoisers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sidcli.errors import InputError
from sidcli.models.compatibility import OTHER_MODEL
from sidcli.models.flux import FLUX
from sidcli.models.kind import Kind
from sidcli.models.pixart import PIXART
from sidcli.models.sana import SANA
from sidcli.models.sd3 import SD3
from sidcli.models.unet import UNET
from sidcli.printable import with_article

KINDS: tuple[Kind, ...] = (UNET, SD3, PIXART, FLUX, SANA)


def kind_of_pipeline(name: str, index: Mapping[str, Any]) -> Kind:
    """Return the kind of the model `name` from its model_index.json. Raises InputError for an unsupported pipeline."""
    found = index["_class_name"]
    for kind in KINDS:
        if found in kind.rules.pipelines:
            return kind
    raise InputError(f"{name} is {with_article(found)}, which is not supported", OTHER_MODEL)


def kind_of(net: Any) -> Kind:
    """Return the kind of a denoiser."""
    return next(kind for kind in KINDS if isinstance(net, kind.network_class(kind.component)))
