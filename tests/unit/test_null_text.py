"""What a sample reads whose prompt was dropped in training: the model's own null text, or no class."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from acceleration.distributed import mesh as meshes
from acceleration.sequence import SequenceParallel
from opensora.assembly.encoders import Encoders
from opensora.assembly.token_layout import forward_arguments, token_layout
from opensora.conditioning import ConditioningConfig, DropoutConfig
from opensora.conditioning.dropout import dropped_labels
from opensora.models.conditions import TokenBatch
from opensora.models.families import describe
from opensora.train.preparation import Preparation
from tests.dist import stdit
from tests.dist.chapters import MODELS, batches, plain_model
from tests.dist.problem import FakeText
from tests.factored_family import GaussianFlow, GaussianFlowConfig


def outputs(model: Any, cfg: Any, **changes: Tensor | None) -> Tensor:
    """Of the first micro-batch, with some of its conditions changed."""
    sample = batches(cfg, 0)[0]
    tokens = TokenBatch(x=sample.x, positions=sample.positions, grid=sample.grid.sides)
    return model(**forward_arguments(cfg, tokens, sample.t, replace(sample.conditions, **changes))).detach()


@pytest.mark.parametrize("name", ["dit", "latte"])
def test_a_dropped_prompt_is_the_models_own_null_text(name: str) -> None:
    """Of models that read a pooled prompt alone ``dropout.text`` is the share; ``dropout.pooled``, by which others read
    the encoder's vector of "", changes nothing."""
    cfg = MODELS[name]
    model, layout = plain_model(cfg), token_layout(cfg, SequenceParallel(meshes.view({})))
    encoders = Encoders(autoencoder=stdit.Latents(), text_encoder=FakeText(), device=torch.device("cpu"))
    prepare = Preparation(
        encoders=encoders,
        objective=GaussianFlow(GaussianFlowConfig()),
        conditioning=ConditioningConfig(dropout=DropoutConfig(text=0.0, pooled=1.0)),
        model=cfg,
        layout=layout,
        seed=7,
    )
    batch: Any = stdit.Clips(
        torch.zeros(2, 4, 2, 4, 6, dtype=torch.uint8), ["a cat", "dog"], (1, 2), torch.ones(2), stdit.Size(2, 32, 48)
    )
    kept = prepare(batch, 0).inputs
    dropped = replace(prepare, conditioning=ConditioningConfig(dropout=DropoutConfig(text=1.0, pooled=0.0)))
    lost = dropped(batch, 0).inputs
    pooled = FakeText().encode(batch.prompts).y_vec
    assert torch.equal(kept["y"], pooled) and torch.equal(lost["y"], pooled)
    assert not kept["dropped"].any() and lost["dropped"].all()
    null = model.y_embedder.y_embedding.expand(2, -1)  # type: ignore[union-attr, operator]
    assert torch.equal(model(**lost), model(**kept | {"y": null}))
    assert not torch.allclose(model(**lost), model(**kept))


@pytest.mark.parametrize("name", ["dit_class", "latte_class"])
def test_a_dropped_class_is_the_last_row_of_the_table(name: str) -> None:
    cfg = MODELS[name]
    model, sample = plain_model(cfg), batches(cfg, 0)[0]
    label = dropped_labels(torch.tensor([2, 5]), torch.tensor([True, False]), describe(cfg).num_classes)
    assert label is not None and label.tolist() == [7, 5]
    given = {"dropped": None, "label": label}
    told = {"dropped": torch.tensor([True, False]), "label": torch.tensor([2, 5])}
    assert len(sample.x) == 2 and torch.equal(outputs(model, cfg, **given), outputs(model, cfg, **told))
