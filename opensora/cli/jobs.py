"""Which kind of configuration a file is, and what a sampling job is of whose files need not be there."""

from pathlib import Path

from opensora.config.run import SampleConfig
from opensora.config.strict_yaml import read_yaml
from opensora.inference.find import Source, default_objective, find_source
from opensora.utils.errors import UserError


def is_training(path: Path) -> bool:
    """Whether a file, or one that it includes, is of a training run: they say how many steps.

    Raises:
        UserError: it cannot be read.
    """
    layer, _ = read_yaml(path)
    if "train" in layer or "data" in layer or "optim" in layer:
        return True
    included = layer.get("include") or []
    names = [included] if isinstance(included, str) else included
    return any(is_training(path.parent / str(name)) for name in names if isinstance(name, str))


def source_of(cfg: SampleConfig) -> Source:
    """What the weights are of: by their files, or where these are not there by the configuration alone.

    Raises:
        UserError: neither says it.
    """
    try:
        return find_source(cfg)
    except UserError:
        if (source := as_configured(cfg)) is None:
            raise
        return source


def as_configured(cfg: SampleConfig) -> Source | None:
    """What the weights would be of, by the configuration alone; None: it leaves that to them."""
    if cfg.model is None or cfg.vae is None or cfg.text is None:
        return None
    return Source(
        path=Path(cfg.weights),
        checkpoint=None,
        adapters=None,
        model=cfg.model,
        vae=cfg.vae,
        text=cfg.text,
        objective=cfg.objective or default_objective(cfg.model),
        conditioning=None,
        prompt_suffix=False,
    )
