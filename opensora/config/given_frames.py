"""Whether a model can be given the frames that a run's ``conditioning:`` section gives it."""

from opensora.conditioning import ConditioningConfig
from opensora.conditioning.mask_types import is_noisy
from opensora.conditioning.references import kinds_of
from opensora.datasets import DataConfig
from opensora.models.base import ModelConfig
from opensora.models.families import describe


def check_given_frames(conditioning: ConditioningConfig, model: ModelConfig, data: DataConfig) -> None:
    """That the model takes frames where they are given to it, and that there are pixels to mix noise with.

    Raises:
        ValueError: it does not.
    """
    takes = describe(model).references
    if conditioning.masks and takes != "in_place":
        raise ValueError(
            f"conditioning.masks: model.kind={model.kind} takes no clean frames in place of noisy ones; must be {{}}"
        )
    for name, beside in (("references", ("channels", "clip")), ("mask_types", ("channels",))):
        if getattr(conditioning, name) and takes not in beside:
            raise ValueError(f"conditioning.{name}: {reads_no_references(model)}; must be {{}}")
    for kind, weight in conditioning.references.items():
        if weight and kind not in kinds_of(takes):
            raise ValueError(
                f"conditioning.references.{kind}: must be 0, as model.kind={model.kind} reads known frames at the head "
                "alone"
            )
    noisy = [name for name, weight in conditioning.mask_types.items() if weight and is_noisy(name)]
    if noisy and data.features:
        raise ValueError(
            f"conditioning.mask_types.{noisy[0]}: must be 0 with data.features, which holds no pixels to mix with noise"
        )


def reads_no_references(model: ModelConfig) -> str:
    """Why a model takes no reference frames beside the noise, for messages."""
    takes = describe(model).references
    if takes == "in_place":
        return f"model.kind={model.kind} takes known frames in the place of noise, not beside it"
    if takes == "clip":
        return f"model.kind={model.kind} reads known frames as one clip with grey ones"
    if getattr(model, "cond_embed", True):
        return f"model.kind={model.kind} reads no reference frames"
    return "the model reads no reference frames (model.cond_embed=false)"
