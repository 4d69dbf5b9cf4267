# SPDX-License-Identifier: Apache-2.0
"""The table of choices: what the paper, its released code and ours do differently."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from cmoe_hf.configuration_cmoe import ROUTER_TYPES

from ..errors import RequestError, check_known


@dataclass(frozen=True, kw_only=True, repr=False)
class Recipe:
    """The choices in which the paper, its released code (method, section 11.1) and ours differ."""

    name: str = "paper"
    """The recipe of `RECIPES` that it is, or that it differs from."""
    cosine_profile: bool = False
    """Mark neurons by products of cosines instead of by their true activations."""
    importance: str = "rate"
    """What makes a neuron shared: its activation `"rate"`, or the `"energy"` of its output. For
    comparisons also the `"fluctuation"` of that, as in FLAP, and the `"weight"`s alone."""
    clusters: str = "marks"
    """Cluster neurons by their `"marks"`, or by their `"contributions"` to the output."""
    metric: str = "l2"
    """Distance between columns of marks: `"l2"` or `"l1"`."""
    max_iterations: int = 20
    """Assignments of the balanced clustering."""
    router: str = "representative"
    """`"representative"` neurons, or `"linear"`: a ridge regression of the experts' energies."""
    absolute_score: bool = False
    """Route by |s| instead of s."""
    normalised_rows: bool = False
    """Scale the rows of the representative router to length 1."""
    router_ridge: float = 0.5
    """Strength of the linear router's ridge, relative to a mean squared input feature."""
    refit: bool = False
    """Refit the down projections under the routing."""
    refit_ridge: float = 0.003
    """Strength of the refit's ridge, relative to a mean squared activation, for ten calibration
    tokens a neuron and more; with fewer it is raised, see `refit.ridge_for`."""
    held_out_ridge: bool = False
    """Choose the refit's ridge for each layer on held-out tokens, and ignore `refit_ridge`."""
    token_weights: str = "equal"
    """Weigh tokens in the refit `"equal"`, or by their error's share of the `"residual"` stream."""
    router_epochs: int = 0
    """Passes over the calibration tokens that train the linear router to rank the experts."""
    reassignments: int = 0
    """Rounds in which neurons move to the expert for whose tokens they contribute most, and the
    router is made again. Not for a MoE as the source."""
    error_correction: bool = False
    """Refit to the dense model's hidden states, which also corrects the errors of earlier layers,
    instead of to the dense FFN's output."""
    competition: str = "parent"
    """With a MoE as the source, which experts compete: those of one `"parent"`, the expert that
    they were carved from, or of all parents of a `"token"`."""
    always_on: int = 0
    """Active experts that run for every token: those of the most important neurons."""
    adaptive_split: bool = False
    """Choose `always_on` for each layer on held-out calibration tokens."""
    routed_by: str = "router"
    """Who routes while calibrating: the `"router"`, an `"oracle"` (the experts of largest sum |h|)
    or a `"random"` choice. For comparisons: the model keeps its router."""

    @classmethod
    def of(cls, recipe: "str | Recipe", **changes: Any) -> "Recipe":
        """Return a recipe with some choices changed. Raises `RequestError` for unknown ones."""
        if isinstance(recipe, str):
            check_known("recipe", recipe, RECIPES)
            recipe = RECIPES[recipe]
        changes = {FORMER_NAMES.get(name, name): value for name, value in changes.items()}
        known = {choice.name for choice in fields(cls)} - {"name"}
        if unknown := sorted(changes.keys() - known):
            raise RequestError(
                f"a recipe has no choice {', '.join(unknown)}; it has {', '.join(sorted(known))}."
            )
        return replace(recipe, **changes)

    def __repr__(self) -> str:
        return repr(self.title)

    @property
    def title(self) -> str:
        """Return its name, and what was changed in it."""
        changed = [
            f"{choice.name} = {getattr(self, choice.name)}"
            for choice in fields(self)
            if getattr(self, choice.name) != getattr(RECIPES[self.name], choice.name)
        ]
        return f"{self.name} with {', '.join(changed)}" if changed else self.name

    @property
    def needs_dense_stream(self) -> bool:
        """Return whether the dense model runs beside the carved one."""
        return self.refit and self.error_correction

    def __post_init__(self) -> None:
        """Raise `RequestError` for a choice that does not exist or contradicts another."""
        for choice in fields(self):
            kind, value = type(choice.default), getattr(self, choice.name)
            known = CHOICES.get(choice.name)
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise RequestError(
                    f"the recipe's {choice.name} is {value!r}; it must be of type {kind.__name__}."
                )
            if isinstance(value, float) and not math.isfinite(value):
                raise RequestError(f"the recipe's {choice.name} is {value}; it must be finite.")
            if known and value not in known:
                raise RequestError(
                    f"the recipe's {choice.name} is {value!r}; it can be {', '.join(known)}."
                )
        splits = self.always_on or self.adaptive_split
        lowest = min(self.always_on, self.router_epochs, self.reassignments)
        problem = None
        if self.router == "representative" and self.clusters != "marks":
            problem = "a representative router needs clusters of marks: change both, or neither."
        elif splits and self.clusters != "contributions":
            problem = (
                "a budget (experts that are always on, an adaptive split) needs clusters of "
                "contributions: use --recipe refined, or say --shared and --active."
            )
        elif self.adaptive_split and not self.refit:
            problem = "a budget compares refitted layers: leave the refit on."
        elif lowest < 0:
            problem = "the recipe's always_on, epochs and rounds cannot be negative."
        elif min(self.max_iterations, self.router_ridge, self.refit_ridge) <= 0:
            problem = "the recipe's max_iterations and ridges must be above 0."
        if problem:
            raise RequestError(problem)


FORMER_NAMES = {"pinned": "always_on"}
"""Names of choices in commands of cmoe-hf 0.2 and before."""
CHOICES = {
    "importance": ("rate", "energy", "fluctuation", "weight"),
    "clusters": ("marks", "contributions"),
    "metric": ("l1", "l2"),
    "router": ROUTER_TYPES,
    "token_weights": ("equal", "residual"),
    "competition": ("parent", "token"),
    "routed_by": ("router", "oracle", "random"),
}

RECIPES: dict[str, Recipe] = {
    # arXiv 2502.04416v3 as written.
    "paper": Recipe(),
    # The authors' code, where it differs.
    "released": Recipe(
        name="released",
        cosine_profile=True,
        metric="l1",
        max_iterations=1,
        absolute_score=True,
        normalised_rows=True,
    ),
    # Ours: the best we know without labels, and without a gradient that leaves its layer.
    "refined": Recipe(
        name="refined",
        importance="energy",
        clusters="contributions",
        max_iterations=8,
        router="linear",
        router_epochs=4,
        reassignments=8,
        competition="token",
        refit=True,
        held_out_ridge=True,
        token_weights="residual",
        error_correction=True,
    ),
}
