"""``ebft methods``: what there is to choose from, ours and other packages'."""

from __future__ import annotations

import dataclasses

from ebft.config import flag, flat_name
from ebft.registry import ALL, summary_of


def methods() -> int:
    """List the criteria, refinements, recoveries, losses and optimizers that there are, with their settings."""
    for registry in ALL:
        print(f"{registry.plural} ({registry.flag})")
        for method in registry:
            print(f"  {method.name:<12} {summary_of(method)}")
            own = [flag(flat_name(field)) for field in dataclasses.fields(method.Settings)]
            if own:
                print(f"  {'':<12} settings: {' '.join(own)}")
        print()
    return 0
