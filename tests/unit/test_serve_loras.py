"""The adapters of a service: in every form those of the sampling command."""

from pathlib import Path

import pytest
import torch

from opensora.assembly.adapter_files import FORM_NAMES, convert_adapters
from opensora.config.run import SampleConfig
from opensora.inference.find import find_source, read_adapters
from opensora.serve.config import ServedModel
from opensora.serve.worker.models import _loras
from opensora.utils.errors import UserError
from tests.dist.test_adapter_swap import DIFFERENCES, write_adapters

CFG = SampleConfig(weights="opensora/pretrained/shapes", prompt="x", lora_scale=0.7)


def test_files_of_every_form_are_the_same_adapters(tmp_path: Path) -> None:
    source, original = find_source(CFG), write_adapters(tmp_path, differences=False)["first"]
    places = {form: tmp_path / (form if form == "peft" else f"{form}.safetensors") for form in FORM_NAMES}
    for form, place in places.items():
        convert_adapters(source.model, original, place, form)
    loras = {form: str(place) for form, place in places.items()}
    found = _loras(ServedModel(sample="s.yaml", loras=loras), CFG, source)
    wanted = read_adapters(original, source.model, "lora").exported
    assert wanted is not None and found.keys() == loras.keys()
    for one in found.values():
        assert one.sizes == wanted.sizes() and one.scale == CFG.lora_scale
        for layer in one.sizes:
            for name in (f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"):
                value = torch.empty_like(wanted.tensor(name))
                one.values(name, value)
                assert torch.equal(value, wanted.tensor(name)), name


def test_differences_of_whole_tensors_are_served(tmp_path: Path) -> None:
    loras = {name: str(path) for name, path in write_adapters(tmp_path).items()}
    found = _loras(ServedModel(sample="s.yaml", loras=loras), CFG, find_source(CFG))
    assert {name: {*one.differences} for name, one in found.items()} == {k: {*v} for k, v in DIFFERENCES.items()}


def test_a_file_that_does_not_fit_is_named_by_its_name_in_the_service(tmp_path: Path) -> None:
    served = ServedModel(sample="s.yaml", loras={"sketch": str(tmp_path / "none.safetensors")})
    with pytest.raises(UserError, match=r"loras\.sketch=.*none\.safetensors: no such file"):
        _loras(served, CFG, find_source(CFG))
